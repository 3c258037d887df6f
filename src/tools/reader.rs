//! Calls out of text, as it comes.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::format::{ARGUMENTS, CALL_ID};
use super::value::ValueEnd;
use super::{CallFormat, Tools};

/// What a chat's output is made of. The text of all parts in any cut of the output into pushes is the same.
#[derive(Debug, Clone, PartialEq)]
pub enum ChatPart {
    Text(String),
    /// A call of one of the tools begins; `index` counts the calls of the reply.
    CallStarted {
        index: usize,
        name: String,
    },
    /// More of the arguments of the call that began last: all together a JSON object.
    Arguments {
        index: usize,
        fragment: String,
    },
}

/// Reads one output. What begins like a call and is none is text.
#[derive(Debug, Clone)]
pub struct CallReader {
    format: CallFormat,
    tools: Arc<Tools>,
    /// What is not decided yet.
    pending: String,
    state: State,
    num_calls: usize,
    /// Whether any text, other than white space, has been let go.
    has_text: bool,
}

/// Of JSON in Markdown.
const FENCE: &str = "```json";

/// Of a call in XML.
const FUNCTION: &str = "<function=";
/// What is behind a marker and longer is no name.
const MAX_HEAD_BYTES: usize = 512;

#[derive(Debug, Clone)]
enum State {
    /// Outside of calls.
    Text,
    /// Behind what opens a call; `opening` is what that was, should it turn out to be text.
    Opened { opening: &'static str },
    /// Within the arguments of a call.
    Arguments(ValueEnd),
    /// Behind the arguments, before the end of the object that they are in.
    Ending,
    /// Behind a call: white space and closings go.
    Closed,
}

/// What a text is the beginning of.
enum Head {
    /// It is too short to say.
    Open,
    No,
    /// So many bytes are before the arguments, an object.
    Call {
        name: String,
        num_bytes: usize,
    },
}

impl CallReader {
    pub fn new(format: CallFormat, tools: Arc<Tools>) -> Self {
        Self { format, tools, pending: String::new(), state: State::Text, num_calls: 0, has_text: false }
    }

    /// Whether a call has begun.
    pub fn has_calls(&self) -> bool {
        self.num_calls > 0
    }

    /// The parts that are certain with this text.
    pub fn push(&mut self, text: &str) -> Vec<ChatPart> {
        self.pending.push_str(text);
        let mut parts = Vec::new();
        while self.advance(&mut parts) {}
        parts
    }

    /// What is left when the output has ended, in or outside of a call.
    pub fn finish(&mut self) -> Vec<ChatPart> {
        let mut parts = Vec::new();
        match &self.state {
            State::Opened { opening } => {
                let opening = *opening;
                if !self.take_whole_call(&mut parts) {
                    self.pending.insert_str(0, opening);
                    self.let_go(self.pending.len(), &mut parts);
                }
            }
            State::Text => self.let_go(self.pending.len(), &mut parts),
            State::Arguments(_) | State::Ending | State::Closed => self.pending.clear(),
        }
        self.state = State::Closed;
        parts
    }

    /// One step; false when more text is needed.
    fn advance(&mut self, parts: &mut Vec<ChatPart>) -> bool {
        match &mut self.state {
            State::Text => self.look_for_call(parts),
            State::Opened { .. } => self.open_call(parts),
            State::Arguments(end) => {
                let (num_bytes, is_end) = end.push(&self.pending);
                let fragment: String = self.pending.drain(..num_bytes).collect();
                if !fragment.is_empty() {
                    parts.push(ChatPart::Arguments { index: self.num_calls - 1, fragment });
                }
                if is_end {
                    self.state = State::Ending;
                }
                is_end
            }
            State::Ending => {
                let rest = self.pending.trim_start();
                let Some(first) = rest.chars().next() else { return false };
                self.pending = if first == '}' { rest[1..].to_owned() } else { rest.to_owned() };
                self.state = State::Closed;
                true
            }
            State::Closed => self.close_call(),
        }
    }

    fn look_for_call(&mut self, parts: &mut Vec<ChatPart>) -> bool {
        let opening = self.format.opening();
        // Small models leave the marker out, or write a fence for it.
        if !self.has_text && self.format == CallFormat::Xml {
            let begun = self.pending.trim_start();
            if begun.starts_with(FUNCTION) {
                self.state = State::Opened { opening: "" };
                return true;
            }
            if FUNCTION.starts_with(begun) {
                return false;
            }
        } else if !self.has_text {
            let begun = self.pending.trim_start();
            if begun.starts_with('{') {
                self.state = State::Opened { opening: "" };
                return true;
            }
            if let Some(rest) = begun.strip_prefix(FENCE) {
                self.pending = rest.to_owned();
                self.state = State::Opened { opening: FENCE };
                return true;
            }
            if FENCE.starts_with(begun) {
                return false;
            }
        }
        if let Some(at) = self.pending.find(opening) {
            let before = self.pending[..at].trim_end().len();
            let rest = self.pending.split_off(at + opening.len());
            self.pending.truncate(before);
            self.let_go(before, parts);
            self.pending = rest;
            self.state = State::Opened { opening };
            return true;
        }
        // White space may stand before a call, and the end may be the beginning of a marker.
        let held = (0..=self.pending.len())
            .filter(|at| self.pending.is_char_boundary(*at))
            .find(|at| opening.starts_with(self.pending[*at..].trim_start()))
            .unwrap_or(self.pending.len());
        self.let_go(held, parts);
        false
    }

    fn open_call(&mut self, parts: &mut Vec<ChatPart>) -> bool {
        let head = match (self.format, &self.state) {
            (CallFormat::Xml, _) => Head::Open,
            (CallFormat::MistralNamed, State::Opened { opening }) if *opening == self.format.opening() => {
                self.named_head()
            }
            _ => self.head(),
        };
        match head {
            Head::Call { name, num_bytes } if self.tools.has(&name) => {
                self.pending.drain(..num_bytes);
                self.start_call(name, parts);
                self.state = State::Arguments(ValueEnd::default());
                true
            }
            // Keys in another order, and whatever else needs the whole to be judged.
            Head::Open | Head::No if self.take_whole_call(parts) => true,
            Head::Open => false,
            Head::No if self.may_become_call() => false,
            Head::No | Head::Call { .. } => {
                let State::Opened { opening } = self.state else { return false };
                self.pending.insert_str(0, opening);
                // Past what opened it, so that it is not looked at again.
                let first = self.pending.chars().next().map_or(0, char::len_utf8);
                let num_bytes = opening.len().max(first);
                self.state = State::Text;
                self.let_go(num_bytes, parts);
                true
            }
        }
    }

    /// Whether a JSON object is under way that is not whole yet.
    fn may_become_call(&self) -> bool {
        let object = object_of(&self.pending);
        object.starts_with('{') && !ValueEnd::default().push(object).1
    }

    /// `{"name": "…", "arguments": {`, or `parameters`; behind a marker in a list or alone.
    fn head(&self) -> Head {
        let text = &self.pending;
        let mut at = text.len() - object_of(text).len();
        let steps: [&[&str]; 6] = [&["{"], &["\"name\""], &[":"], &[], &[","], &["\"arguments\"", "\"parameters\""]];
        let mut name = String::new();
        for step in steps {
            at += white_space(&text[at..]);
            let rest = &text[at..];
            if step.is_empty() {
                let Some(string) = rest.strip_prefix('"') else { return no_or_open(rest, &["\""]) };
                let Some(end) = string.find('"') else { return Head::Open };
                name = string[..end].to_owned();
                at += end + 2;
                continue;
            }
            match step.iter().find(|word| rest.starts_with(**word)) {
                Some(word) => at += word.len(),
                None => return no_or_open(rest, step),
            }
        }
        for word in [":", "{"] {
            at += white_space(&text[at..]);
            if !text[at..].starts_with(word) {
                return no_or_open(&text[at..], &[word]);
            }
            // The brace belongs to the arguments.
            at += usize::from(word == ":");
        }
        Head::Call { name, num_bytes: at }
    }

    /// `NAME[ARGS]{`, or `NAME[CALL_ID]ID[ARGS]{`.
    fn named_head(&self) -> Head {
        let text = &self.pending;
        let Some((head, rest)) = text.split_once(ARGUMENTS) else {
            let is_short = text.len() < MAX_HEAD_BYTES && !text.trim_start().contains(char::is_whitespace);
            return if is_short { Head::Open } else { Head::No };
        };
        let name = head.split(CALL_ID).next().unwrap_or_default().trim().to_owned();
        let object = rest.trim_start();
        match object.chars().next() {
            None => Head::Open,
            // The brace belongs to the arguments.
            Some('{') => Head::Call { name, num_bytes: text.len() - object.len() },
            Some(_) => Head::No,
        }
    }

    /// A call of which all is there.
    fn take_whole_call(&mut self, parts: &mut Vec<ChatPart>) -> bool {
        let found = if self.format == CallFormat::Xml { self.xml_call() } else { self.json_call() };
        let Some((name, arguments, num_bytes)) = found.filter(|(name, ..)| self.tools.has(name)) else { return false };
        self.pending.drain(..num_bytes);
        self.start_call(name, parts);
        parts.push(ChatPart::Arguments { index: self.num_calls - 1, fragment: arguments });
        self.state = State::Closed;
        true
    }

    fn json_call(&self) -> Option<(String, String, usize)> {
        let object = object_of(&self.pending);
        let (num_bytes, is_end) = ValueEnd::default().push(object);
        let call: Map<String, Value> = serde_json::from_str(object.get(..num_bytes).filter(|_| is_end)?).ok()?;
        let name = call.get("name")?.as_str()?.to_owned();
        let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
            None => "{}".to_owned(),
            // JSON in a string.
            Some(Value::String(json)) => {
                serde_json::from_str::<Map<String, Value>>(json).is_ok().then(|| json.clone())?
            }
            Some(object @ Value::Object(_)) => object.to_string(),
            Some(_) => return None,
        };
        Some((name, arguments, self.pending.len() - object.len() + num_bytes))
    }

    fn xml_call(&self) -> Option<(String, String, usize)> {
        const END: &str = "</function>";
        let text = &self.pending;
        let end = text.find(END)?;
        let (name, mut rest) = text[..end].trim_start().strip_prefix(FUNCTION)?.split_once('>')?;
        let mut arguments = Map::new();
        while let Some((key, value)) =
            rest.split_once("<parameter=").and_then(|(_, parameter)| parameter.split_once('>'))
        {
            let (value, behind) = value.split_once("</parameter>")?;
            let value = value.strip_prefix('\n').unwrap_or(value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            let is_text = self.tools.parameter(name, key).is_some_and(|schema| schema["type"] == "string");
            let text = || Value::from(value);
            let value = if is_text { text() } else { serde_json::from_str(value).unwrap_or_else(|_| text()) };
            arguments.insert(key.to_owned(), value);
            rest = behind;
        }
        Some((name.to_owned(), Value::Object(arguments).to_string(), end + END.len()))
    }

    fn start_call(&mut self, name: String, parts: &mut Vec<ChatPart>) {
        parts.push(ChatPart::CallStarted { index: self.num_calls, name });
        self.num_calls += 1;
    }

    /// What stands between calls goes; what stands behind the last one is text.
    fn close_call(&mut self) -> bool {
        let rest = self.pending.trim_start();
        if !self.tools.parallel {
            self.pending.clear();
            return false;
        }
        if rest.is_empty() {
            return false;
        }
        let closings = self.format.closings();
        if let Some(closing) = closings.iter().find(|closing| rest.starts_with(**closing)) {
            self.pending = rest[closing.len()..].to_owned();
            return true;
        }
        if closings.iter().any(|closing| closing.starts_with(rest)) {
            return false;
        }
        // Several calls stand in one list, or, as those of Llama, side by side.
        let has_several = self.format.is_list() || self.format == CallFormat::Llama;
        let next = rest.strip_prefix(',').map(str::trim_start);
        // White space behind the comma goes too, whenever it comes.
        if has_several && next == Some("") {
            return false;
        }
        let is_next = has_several && (next.is_some() || rest.starts_with('{'));
        self.pending = next.unwrap_or(rest).to_owned();
        self.state = if is_next { State::Opened { opening: "" } } else { State::Text };
        true
    }

    /// The first `num_bytes` are text.
    fn let_go(&mut self, num_bytes: usize, parts: &mut Vec<ChatPart>) {
        let text: String = self.pending.drain(..num_bytes).collect();
        if !text.is_empty() {
            self.has_text |= !text.trim().is_empty();
            parts.push(ChatPart::Text(text));
        }
    }
}

/// Behind white space and the bracket of a list.
fn object_of(text: &str) -> &str {
    let text = text.trim_start();
    text.strip_prefix('[').map_or(text, str::trim_start)
}

fn white_space(text: &str) -> usize {
    text.len() - text.trim_start().len()
}

fn no_or_open(rest: &str, words: &[&str]) -> Head {
    if words.iter().any(|word| word.starts_with(rest)) { Head::Open } else { Head::No }
}

#[cfg(test)]
#[path = "reader/tests.rs"]
mod tests;
