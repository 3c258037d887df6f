//! What past replies said, for guesses: where the last few tokens of a sequence occurred in a reply of the same adapter, what
//! followed there may follow again. Requests for one thing at a time, as editors send them, are answered with much the same text.
//!
//! A guess that comes true makes a reply faster, and so tells that its text was in a reply before. Nobody is to learn that of
//! others: what a key's requests were answered is used for that key alone.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::fairness::Flow;
use super::sequence::Sequence;
use crate::adapter::canonical::Adapter;

/// Tokens that are kept of one key's replies by one adapter, and for how many such pairs: 1 MiB in all.
const MAX_TOKENS: usize = 4096;
const MAX_HISTORIES: usize = 64;
/// Tokens of the prompt that are kept before a reply, so that its first ones can be guessed.
const CONTEXT_LENGTH: usize = 5;
/// Least tokens of a reply that is kept.
const MIN_REPLY_LENGTH: usize = 2;
/// Stands between replies; no token.
const END: u32 = u32::MAX;

#[derive(Debug, Default)]
pub struct PastReplies {
    histories: HashMap<Source, History>,
    num_learned: u64,
}

/// Key, and generation of the adapter; `None` is the base.
type Source = (Arc<str>, Option<Arc<str>>);

#[derive(Debug, Default)]
struct History {
    /// Replies, each after its context and before an [`END`]; the oldest first.
    tokens: Vec<u32>,
    /// `None` is the base, which never goes.
    adapter: Option<Weak<Adapter>>,
    /// Which of all replies was the last one here.
    last_learned: u64,
}

impl PastReplies {
    /// Those of the same key and adapter.
    pub fn of(&self, flow: &Flow) -> &[u32] {
        self.histories.get(&source(flow)).map_or(&[], |history| &history.tokens)
    }

    /// Learns from what a sequence has been answered, complete or not. A single token is forgotten: there is little to guess of it,
    /// and the beams of a search, each of whose steps is a sequence of one, would push every reply out.
    pub fn learn(&mut self, sequence: &Sequence) {
        let tokens = sequence.tokens();
        let output = sequence.num_virtual_tokens() + sequence.num_prompt_tokens();
        let context = output.saturating_sub(CONTEXT_LENGTH).max(sequence.num_virtual_tokens());
        if tokens.len() < output + MIN_REPLY_LENGTH {
            return;
        }
        let reply = &tokens[context.max(tokens.len().saturating_sub(MAX_TOKENS - 1))..];
        self.num_learned += 1;
        let history = self.histories.entry(source(sequence.flow())).or_default();
        history.adapter = sequence.adapter().map(Arc::downgrade);
        history.last_learned = self.num_learned;
        history.add(reply);
        if self.histories.len() > MAX_HISTORIES {
            let oldest = self.histories.iter().min_by_key(|(_, history)| history.last_learned);
            if let Some(source) = oldest.map(|(source, _)| source.clone()) {
                self.histories.remove(&source);
            }
        }
    }

    /// Forgets what adapters said that are gone from memory, as those are that have been replaced.
    pub fn forget_gone(&mut self) {
        let is_there = |adapter: &Weak<Adapter>| adapter.strong_count() > 0;
        self.histories.retain(|_, history| history.adapter.as_ref().is_none_or(is_there));
    }
}

impl History {
    /// One that is there already moves to the end.
    fn add(&mut self, reply: &[u32]) {
        let whole = reply.iter().copied().chain([END]);
        let len = reply.len() + 1;
        let known = self.tokens.windows(len).position(|window| window.iter().copied().eq(whole.clone()));
        if let Some(at) = known {
            self.tokens.drain(at..at + len);
        }
        self.tokens.drain(..(self.tokens.len() + len).saturating_sub(MAX_TOKENS));
        self.tokens.extend(whole);
    }
}

fn source(flow: &Flow) -> Source {
    (flow.account.key.clone(), flow.generation.clone())
}

/// What followed `end` in past replies, where it occurred last.
pub fn continuation<'a>(past: &'a [u32], end: &[u32]) -> Option<&'a [u32]> {
    let at = past.windows(end.len()).rposition(|window| window == end)? + end.len();
    let next = past[at..].split(|token| *token == END).next()?;
    (!next.is_empty()).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fairness::Account;
    use crate::engine::request::PromptOutput;
    use crate::engine::sequence::SequenceId;

    fn answered(key: &str, adapter: Option<&Arc<Adapter>>, prompt: &[u32], reply: &[u32]) -> Sequence {
        let account = Account { key: Arc::from(key), ..Account::default() };
        let mut sequence = Sequence::new(SequenceId(0), prompt, reply.len(), adapter.cloned(), PromptOutput::Nothing)
            .for_account(account);
        reply.iter().for_each(|token| sequence.push(*token));
        sequence
    }

    fn adapter(name: &str) -> Arc<Adapter> {
        Arc::new(Adapter { name: name.to_owned(), generation: name.to_owned(), ..Adapter::default() })
    }

    #[test]
    fn what_followed_last_is_found_after_the_prompt_and_within_a_reply_and_not_across_two() {
        let mut past = PastReplies::default();
        let reply = answered("", None, &[1, 2, 3], &[4, 5, 6]);
        past.learn(&reply);
        past.learn(&answered("", None, &[2, 3], &[7, 8]));
        let of = |end: &[u32]| continuation(past.of(reply.flow()), end);
        assert_eq!(of(&[1, 2, 3]), Some(&[4, 5, 6][..]));
        assert_eq!(of(&[2, 3]), Some(&[7, 8][..]));
        assert_eq!([of(&[5, 6]), of(&[9, 9]), of(&[5, 6, 2])], [None; 3]);
    }

    #[test]
    fn no_key_and_no_adapter_sees_what_others_were_answered() {
        let mut past = PastReplies::default();
        let (a, b) = (adapter("a"), adapter("b"));
        past.learn(&answered("first", Some(&a), &[1, 2], &[3, 4]));
        let is_seen = |key, adapter| !past.of(answered(key, adapter, &[1, 2], &[]).flow()).is_empty();
        assert!(is_seen("first", Some(&a)));
        assert!(!is_seen("second", Some(&a)) && !is_seen("first", Some(&b)) && !is_seen("first", None));
    }

    #[test]
    fn the_steps_of_a_beam_search_push_no_reply_out() {
        let mut past = PastReplies::default();
        let reply = answered("", None, &[1, 2, 3], &[4, 5, 6]);
        past.learn(&reply);
        (0..MAX_TOKENS as u32).for_each(|step| past.learn(&answered("", None, &[1, 2, step], &[step])));
        assert_eq!(continuation(past.of(reply.flow()), &[1, 2, 3]), Some(&[4, 5, 6][..]));
    }

    #[test]
    fn replies_go_with_their_adapter() {
        let mut past = PastReplies::default();
        let (a, b) = (adapter("a"), adapter("b"));
        for adapter in [None, Some(&a), Some(&b)] {
            past.learn(&answered("", adapter, &[1, 2], &[3, 4]));
        }
        drop(a);
        past.forget_gone();
        let mut left: Vec<_> = past.histories.into_keys().map(|(_, generation)| generation).collect();
        left.sort_unstable();
        assert_eq!(left, [None, Some(Arc::from("b"))]);
    }

    #[test]
    fn memory_is_bounded_in_each_history_and_in_all() {
        let mut past = PastReplies::default();
        let adapters: Vec<_> = (0..2 * MAX_HISTORIES).map(|index| adapter(&index.to_string())).collect();
        for adapter in &adapters {
            let long: Vec<u32> = (0..3 * MAX_TOKENS as u32).collect();
            past.learn(&answered("", Some(adapter), &[1, 2], &long));
            (0..20).for_each(|token| past.learn(&answered("", Some(adapter), &[1, 2], &[token; 1000])));
        }
        assert_eq!(past.histories.len(), MAX_HISTORIES);
        assert!(past.histories.values().all(|history| history.tokens.len() <= MAX_TOKENS));
        let last = answered("", adapters.last(), &[1], &[]);
        let before = past.of(last.flow()).to_vec();
        past.learn(&answered("", adapters.last(), &[1, 2], &[18; 1000]));
        assert_eq!(past.of(last.flow()).len(), before.len(), "the same again takes no more");
    }
}
