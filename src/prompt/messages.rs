//! OpenAI's messages in the form that chat templates take.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::PromptError;
use crate::hexadecimal::hexadecimal;

/// How a template takes the calls of an assistant. Most take any way that is `""` and objects; some pass over a call beside a
/// content, or put arguments into text as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallForm {
    /// An assistant that only calls has a content of `none`, not of `""`.
    silence_is_none: bool,
    arguments_are_text: bool,
}

impl CallForm {
    /// The first in which a template shows a call is the one that it takes.
    pub const ALL: [Self; 4] = [
        Self { silence_is_none: false, arguments_are_text: false },
        Self { silence_is_none: true, arguments_are_text: false },
        Self { silence_is_none: false, arguments_are_text: true },
        Self { silence_is_none: true, arguments_are_text: true },
    ];

    /// What [`Self::probe`] calls.
    pub const PROBED: &str = "look_up";

    /// A conversation with a call.
    pub fn probe() -> [Value; 3] {
        let function = json!({"name": Self::PROBED, "arguments": "{\"word\": \"probe\"}"});
        let call = json!({"id": "abcdefgh1", "type": "function", "function": function});
        [
            json!({"role": "user", "content": "Look it up."}),
            json!({"role": "assistant", "content": null, "tool_calls": [call]}),
            json!({"role": "tool", "tool_call_id": "abcdefgh1", "content": "found"}),
        ]
    }

    /// Whether the call of [`Self::probe`] is in what was rendered of it.
    pub fn is_shown(rendered: &str) -> bool {
        [Self::PROBED, "word", "probe"].iter().all(|part| rendered.contains(part))
    }
}

fn malformed(field: String, reason: &'static str) -> PromptError {
    PromptError::Messages { field, reason }
}

/// Messages with a string `role` and a string `content` each, as templates expect them: contents of several text parts are
/// joined, the role `developer` is `system`, and a field that is `null` is none.
///
/// # Errors
/// The place that is malformed.
pub fn for_template(messages: &[Value], call_form: CallForm) -> Result<Vec<Value>, PromptError> {
    if messages.is_empty() {
        return Err(malformed("messages".into(), "must hold at least one message"));
    }
    messages.iter().enumerate().map(|(index, message)| message_for_template(index, message, call_form)).collect()
}

fn message_for_template(index: usize, message: &Value, call_form: CallForm) -> Result<Value, PromptError> {
    let field = format!("messages[{index}]");
    let Value::Object(message) = message else {
        return Err(malformed(field, "must be an object with role and content"));
    };
    let mut message = message.clone();
    let role = match message.get("role").and_then(Value::as_str) {
        Some("developer") => "system",
        Some(role) => role,
        None => return Err(malformed(format!("{field}.role"), "must be a string")),
    };
    let role = Value::from(role);
    let content = content_text(&field, message.get("content"))?;
    message.insert("role".into(), role);
    message.retain(|_, value| !value.is_null());
    name_thoughts(&mut message);
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    let calls = calls.map_or(&mut [][..], Vec::as_mut_slice);
    let is_silent = content.is_empty() && !calls.is_empty();
    if !call_form.arguments_are_text {
        calls.iter_mut().for_each(parse_arguments);
    }
    if calls.is_empty() {
        message.remove("tool_calls");
    }
    let content = if is_silent && call_form.silence_is_none { Value::Null } else { Value::from(content) };
    message.insert("content".into(), content);
    Ok(Value::Object(message))
}

/// What a model thought before it answered has several names among clients, and two among templates.
fn name_thoughts(message: &mut Map<String, Value>) {
    let thoughts = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|name| message.get(*name)).cloned();
    if let Some(thoughts) = thoughts {
        message.entry("thinking").or_insert_with(|| thoughts.clone());
        message.insert("reasoning_content".to_owned(), thoughts);
    }
}

/// Absent content is empty, as in an assistant's message that only calls tools.
fn content_text(message: &str, content: Option<&Value>) -> Result<String, PromptError> {
    let field = || format!("{message}.content");
    match content {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(i, part)| {
                let text = match part.get("type").and_then(Value::as_str) {
                    Some("text") => part.get("text").and_then(Value::as_str),
                    _ => None,
                };
                text.ok_or_else(|| {
                    malformed(format!("{}[{i}]", field()), "must be a part of type text with a string text")
                })
            });
            texts.collect()
        }
        Some(_) => Err(malformed(field(), "must be a string or a list of text parts")),
    }
}

/// OpenAI sends arguments as JSON in a string; most templates write them with `tojson`, which would quote it again.
fn parse_arguments(call: &mut Value) {
    if let Some(arguments) = call.pointer_mut("/function/arguments")
        && let Some(object) = arguments.as_str().and_then(|json| serde_json::from_str::<Map<String, Value>>(json).ok())
    {
        *arguments = Value::Object(object);
    }
}

/// Mistral's templates refuse ids of calls that are not nine letters and digits, whoever made them.
pub fn shorten_ids(message: &mut Value) {
    const NUM_CHARS: usize = 9;
    let shorten = |id: &mut Value| {
        let Some(long) = id.as_str() else { return };
        if long.len() != NUM_CHARS || !long.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            *id = hexadecimal(Sha256::new_with_prefix(long))[..NUM_CHARS].into();
        }
    };
    message.get_mut("tool_call_id").into_iter().for_each(shorten);
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten();
    calls.filter_map(|call| call.get_mut("id")).for_each(shorten);
}
