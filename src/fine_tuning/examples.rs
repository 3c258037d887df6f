//! What a training file must be: lines of JSON, each `{"messages": […]}` or `{"prompt", "completion"}`, all of one kind.
//! lab/tasks.py reads the same.

use std::fmt;
use std::io::{self, BufRead, Read};

use serde_json::{Map, Value};

/// JSON takes many times its bytes once it is read.
const MAX_LINE_BYTES: u64 = 4 << 20;

/// Where a file is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLine {
    /// From 1 on.
    pub line: usize,
    /// The path of the field, such as `messages[0].role`; `None` where the line as a whole is at fault.
    pub field: Option<String>,
    pub reason: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ExamplesError {
    #[error("{0}")]
    BadLine(BadLine),
    #[error("it has {found} examples, and at least {min} are needed")]
    TooFew { found: usize, min: usize },
    #[error("it cannot be read: {0}")]
    Unreadable(#[from] io::Error),
}

/// What a file has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExampleCount {
    pub lines: usize,
    /// To be learned; a chat may have several.
    pub answers: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Messages,
    Pair,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.field {
            Some(field) => write!(f, "line {}: `{field}` {}", self.line, self.reason),
            None => write!(f, "line {} {}", self.line, self.reason),
        }
    }
}

/// What is wrong in a line: the field and the reason.
type Fault = (Option<String>, String);

/// What `file` has.
///
/// # Errors
/// The first line that is no example, or that there are fewer than `min`.
pub fn check(mut file: impl BufRead, min: usize) -> Result<ExampleCount, ExamplesError> {
    let (mut found, mut kind) = (ExampleCount::default(), None);
    let mut line = Vec::new();
    while file.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line)? > 0 {
        found.lines += 1;
        let bad = |(field, reason)| ExamplesError::BadLine(BadLine { line: found.lines, field, reason });
        let (this, num_answers) = check_line(&line).map_err(bad)?;
        if *kind.get_or_insert(this) != this {
            let reason = "is of another kind than line 1: all must have `messages`, or all `prompt` and `completion`";
            return Err(bad((None, reason.to_owned())));
        }
        found.answers += num_answers;
        line.clear();
    }
    if found.lines < min {
        return Err(ExamplesError::TooFew { found: found.lines, min });
    }
    Ok(found)
}

/// Its kind, and how many answers are learned of it.
fn check_line(line: &[u8]) -> Result<(Kind, usize), Fault> {
    if line.len() as u64 > MAX_LINE_BYTES {
        return Err((None, format!("is longer than {} MiB: split it", MAX_LINE_BYTES >> 20)));
    }
    if line.trim_ascii().is_empty() {
        return Err((None, "is empty".to_owned()));
    }
    let row: Value = serde_json::from_slice(line).map_err(|e| (None, format!("is not JSON: {e}")))?;
    let Value::Object(row) = row else { return Err((None, "is no JSON object".to_owned())) };
    if row.contains_key("messages") {
        check_names("", &row, &["messages"])?;
        return Ok((Kind::Messages, check_messages(&row)?));
    }
    if !row.contains_key("prompt") && !row.contains_key("completion") {
        return Err((None, "has neither `messages` nor `prompt` and `completion`".to_owned()));
    }
    check_names("", &row, &["prompt", "completion"])?;
    text("prompt", row.get("prompt"))?;
    if text("completion", row.get("completion"))?.is_empty() {
        return Err(at("completion", "must not be empty"));
    }
    Ok((Kind::Pair, 1))
}

/// How many answers are learned.
fn check_messages(row: &Map<String, Value>) -> Result<usize, Fault> {
    let messages = row.get("messages").and_then(Value::as_array).filter(|messages| !messages.is_empty());
    let messages = messages.ok_or_else(|| at("messages", "must be an array that is not empty"))?;
    let mut num_learned = 0;
    let last = messages.len() - 1;
    for (index, message) in messages.iter().enumerate() {
        let path = format!("messages[{index}]");
        let message = message.as_object().ok_or_else(|| at(&path, "must be an object"))?;
        check_names(&format!("{path}."), message, &["role", "content", "weight"])?;
        let role = text(&format!("{path}.role"), message.get("role"))?;
        if !["system", "user", "assistant"].contains(&role) {
            return Err(at(format!("{path}.role"), "must be `system`, `user` or `assistant`"));
        }
        if index == 0 && role == "assistant" {
            return Err(at(format!("{path}.role"), "must not be `assistant` in the first message: it answers nothing"));
        }
        let content = text(&format!("{path}.content"), message.get("content"))?;
        if index == last && role != "assistant" {
            return Err(at(format!("{path}.role"), "must be `assistant` in the last message: nothing answers it"));
        }
        let weight = match message.get("weight").filter(|weight| !weight.is_null()) {
            None => 1,
            Some(weight) if role == "assistant" && weight.as_u64().is_some_and(|weight| weight <= 1) => {
                weight.as_u64().unwrap_or_default()
            }
            Some(_) => return Err(at(format!("{path}.weight"), "must be 0 or 1, and in an assistant's message")),
        };
        if role == "assistant" && weight == 1 {
            num_learned += 1;
            if content.is_empty() {
                return Err(at(format!("{path}.content"), "must not be empty where it is to be learned"));
            }
        }
    }
    if num_learned == 0 {
        return Err(at("messages", "must have an answer of the assistant to learn, of a `weight` that is not 0"));
    }
    Ok(num_learned)
}

/// Fields that nobody reads would be trained without: tools, images.
fn check_names(path: &str, fields: &Map<String, Value>, known: &[&str]) -> Result<(), Fault> {
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => {
            Err(at(format!("{path}{name}"), &format!("cannot be trained on: known are {}", known.join(", "))))
        }
        None => Ok(()),
    }
}

fn text<'a>(path: &str, value: Option<&'a Value>) -> Result<&'a str, Fault> {
    value.and_then(Value::as_str).ok_or_else(|| at(path, "must be a string"))
}

fn at(path: impl Into<String>, reason: &str) -> Fault {
    (Some(path.into()), reason.to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    const PAIR: &str = r#"{"prompt": "a", "completion": "b"}"#;
    const CHAT: &str = r#"{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0}, {"role": "assistant", "content": "c"}]}"#;

    fn refusal(lines: &[&str]) -> String {
        let text: Vec<String> = lines.iter().map(|line| line.replace('\n', " ")).collect();
        check(text.join("\n").as_bytes(), 1).unwrap_err().to_string()
    }

    #[test]
    fn both_kinds_are_taken_with_and_without_a_last_newline() {
        let chat = CHAT.replace('\n', " ");
        for line in [PAIR, &chat] {
            for end in ["", "\n", "\r\n"] {
                let found = check(format!("{line}\r\n{line}{end}").as_bytes(), 2).unwrap();
                assert_eq!(found, ExampleCount { lines: 2, answers: 2 });
            }
        }
    }

    #[test]
    fn each_answer_that_is_learned_is_counted() {
        let message = |role: &str| format!(r#"{{"role": "{role}", "content": "a"}}"#);
        let chat = ["user", "assistant", "user", "assistant"].map(message).join(", ");
        let lines = format!("{{\"messages\": [{chat}]}}\n").repeat(3);
        assert_eq!(check(lines.as_bytes(), 1).unwrap(), ExampleCount { lines: 3, answers: 6 });
    }

    #[test]
    fn a_line_that_is_too_long_is_refused_by_its_number_and_not_read_on() {
        let long = format!(r#"{{"prompt": "a", "completion": "{}"}}"#, "b".repeat(4 << 20));
        assert_eq!(refusal(&[PAIR, &long]), "line 2 is longer than 4 MiB: split it");
        let fits = format!(r#"{{"prompt": "a", "completion": "{}"}}"#, "b".repeat((4 << 20) - 64));
        assert_eq!(check(fits.as_bytes(), 1).unwrap().lines, 1);
        // A file that never ends a line.
        let endless = BufReader::new(io::repeat(b'['));
        assert!(check(endless, 1).unwrap_err().to_string().contains("line 1 is longer"));
    }

    #[test]
    fn a_bad_line_is_named_with_its_field() {
        let message = |fields: &str| format!(r#"{{"messages": [{{"role": "user", "content": "a"}}, {{{fields}}}]}}"#);
        for (line, said) in [
            (" ", "line 2 is empty"),
            ("{", "line 2 is not JSON"),
            (r#"{"prompt": "\ud800", "completion": "b"}"#, "line 2 is not JSON"),
            ("[1]", "line 2 is no JSON object"),
            (r#"{"text": "a"}"#, "line 2 has neither `messages` nor"),
            (r#"{"prompt": "a"}"#, "line 2: `completion` must be a string"),
            (r#"{"prompt": 1, "completion": "b"}"#, "line 2: `prompt` must be a string"),
            (r#"{"prompt": "a", "completion": ""}"#, "line 2: `completion` must not be empty"),
            (r#"{"prompt": "a", "completion": "b", "tools": []}"#, "line 2: `tools` cannot be trained on"),
            (r#"{"messages": []}"#, "line 2: `messages` must be an array"),
            (r#"{"messages": [1]}"#, "line 2: `messages[0]` must be an object"),
            (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "`messages[0].role` must not be `assistant`"),
            (&message(r#""role": "tool", "content": "a""#), "line 2: `messages[1].role` must be"),
            (
                &message(r#""role": "user", "content": "b""#),
                "line 2: `messages[1].role` must be `assistant` in the last",
            ),
            (&message(r#""role": "assistant", "content": ["a"]"#), "line 2: `messages[1].content` must be a string"),
            (&message(r#""role": "assistant", "content": """#), "line 2: `messages[1].content` must not be empty"),
            (
                r#"{"messages": [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]}"#,
                "line 2: `messages[0].weight` must be",
            ),
            (&message(r#""role": "assistant", "content": "a", "weight": 2"#), "line 2: `messages[1].weight` must be"),
            (&message(r#""role": "assistant", "content": "a", "tool_calls": []"#), "line 2: `messages[1].tool_calls`"),
            (&message(r#""role": "assistant", "content": "a", "weight": 0"#), "line 2: `messages` must have an answer"),
        ] {
            let refusal = refusal(&[PAIR, line]);
            assert!(refusal.contains(said), "{line}: {refusal}");
        }
        assert!(refusal(&[PAIR, CHAT]).starts_with("line 2 is of another kind than line 1"));
    }

    #[test]
    fn too_few_examples_are_refused_by_their_number() {
        assert_eq!(
            check(PAIR.as_bytes(), 10).unwrap_err().to_string(),
            "it has 1 examples, and at least 10 are needed"
        );
        assert!(matches!(check(&b""[..], 1), Err(ExamplesError::TooFew { found: 0, min: 1 })));
    }
}
