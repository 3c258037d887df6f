//! The latest responses, in memory: what a client may go on from without sending it again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::http::auth::Caller;

/// The oldest leaves first.
const MAX_RESPONSES: usize = 1024;
const MAX_BYTES: usize = 64 << 20;

/// A conversation up to a response.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// As it was sent.
    pub response: Value,
    /// As a chat, the answer included.
    pub messages: Vec<Value>,
}

#[derive(Debug, Default)]
pub struct KeptResponses(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    responses: HashMap<String, (Option<String>, usize, Kept)>,
    /// Of the ids, the oldest first; those removed may still be among them.
    order: VecDeque<String>,
    num_bytes: usize,
}

/// What becomes of a response when it is whole.
#[derive(Debug)]
pub struct Turn {
    /// Where it is kept, if it is to be.
    pub responses: Option<Arc<KeptResponses>>,
    pub identity: Option<String>,
    /// What led to it, as a chat.
    pub messages: Vec<Value>,
}

impl Turn {
    /// `answer` is what the model said, as messages of a chat.
    pub fn keep(mut self, id: &str, response: Value, answer: Vec<Value>) {
        if let Some(responses) = self.responses {
            self.messages.extend(answer);
            responses.put(id, self.identity, Kept { response, messages: self.messages });
        }
    }
}

impl KeptResponses {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` for what is not kept, or is another caller's.
    pub fn get(&self, caller: &Caller, id: &str) -> Option<Kept> {
        let state = self.state();
        let (identity, _, kept) = state.responses.get(id)?;
        (*identity == caller.identity).then(|| kept.clone())
    }

    pub fn remove(&self, caller: &Caller, id: &str) -> bool {
        let mut state = self.state();
        if state.responses.get(id).is_none_or(|(identity, ..)| *identity != caller.identity) {
            return false;
        }
        state.remove(id);
        true
    }

    fn put(&self, id: &str, identity: Option<String>, kept: Kept) {
        let num_bytes = num_bytes(&kept.response) + kept.messages.iter().map(num_bytes).sum::<usize>();
        if num_bytes > MAX_BYTES {
            return;
        }
        let mut state = self.state();
        while state.num_bytes + num_bytes > MAX_BYTES || state.responses.len() >= MAX_RESPONSES {
            let Some(oldest) = state.order.pop_front() else { break };
            state.remove(&oldest);
        }
        state.num_bytes += num_bytes;
        state.order.push_back(id.to_owned());
        state.responses.insert(id.to_owned(), (identity, num_bytes, kept));
    }
}

impl State {
    fn remove(&mut self, id: &str) {
        if let Some((_, num_bytes, _)) = self.responses.remove(id) {
            self.num_bytes -= num_bytes;
            // Ids of what was removed must not pile up.
            self.order.retain(|kept| kept != id);
        }
    }
}

/// About what it takes in memory.
fn num_bytes(value: &Value) -> usize {
    let own = size_of::<Value>();
    own + match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(num_bytes).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + num_bytes(value)).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn kept(text: &str) -> Kept {
        Kept { response: json!({}), messages: vec![json!(text)] }
    }

    #[test]
    fn the_oldest_leave_when_there_are_too_many_or_they_are_too_large() {
        let responses = KeptResponses::default();
        for index in 0..MAX_RESPONSES + 2 {
            responses.put(&index.to_string(), None, kept("a"));
        }
        assert_eq!(responses.state().responses.len(), MAX_RESPONSES);
        assert!(!responses.state().responses.contains_key("1") && responses.state().responses.contains_key("2"));
        responses.put("large", None, kept(&"a".repeat(MAX_BYTES - 1000)));
        assert!(responses.state().responses.len() < 20 && responses.state().num_bytes <= MAX_BYTES);
        responses.put("too large", None, kept(&"a".repeat(MAX_BYTES + 1)));
        assert!(responses.state().responses.contains_key("large"));
    }
}
