//! What a client asks to go on from.

use serde::Serialize;
use serde_json::{Value, json};

use super::GenerationError;
use crate::prompt::fim::ContextFile;
use crate::prompt::formats::split_system;

/// One prompt of a request.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Already templated by the client: special tokens written in it are special tokens.
    Text(String),
    Tokens(Vec<u32>),
    /// Text around the gap, never read as special tokens.
    FillInMiddle {
        /// From the oldest to the newest: the oldest go first where there is no room.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        files: Vec<ContextFile>,
        prefix: String,
        suffix: String,
    },
    /// OpenAI chat messages, checked to have a `role` and text `content`.
    Chat(Vec<Value>),
}

impl Prompt {
    /// What the user wants: the text, or the last thing they said. Formats know nothing of roles.
    pub(super) fn instruction(&self) -> Result<String, GenerationError> {
        let instruction = match self {
            Self::Text(text) => Some(text.clone()),
            Self::Chat(messages) => last_user_text(messages),
            Self::Tokens(_) | Self::FillInMiddle { .. } => None,
        };
        instruction.ok_or_else(|| self.invalid("no message has the role `user`"))
    }

    /// Another question, to which no conversation has led.
    pub(super) fn with_other_question(&self) -> Self {
        match self {
            Self::Chat(messages) => {
                let question = json!({"role": "user", "content": "?"});
                Self::Chat(split_system(messages).0.iter().cloned().chain([question]).collect())
            }
            _ => Self::Text("?".to_owned()),
        }
    }

    pub(super) fn param(&self) -> &'static str {
        if matches!(self, Prompt::Chat(_)) { "messages" } else { "prompt" }
    }

    pub(super) fn invalid(&self, cause: impl ToString) -> GenerationError {
        GenerationError::InvalidParameter { param: self.param(), message: cause.to_string() }
    }

    /// Of what must fit in the context as it is.
    pub(super) fn num_text_bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Chat(messages) => messages.iter().map(num_text_bytes).sum(),
            Self::Tokens(_) | Self::FillInMiddle { .. } => 0,
        }
    }
}

fn num_text_bytes(message: &Value) -> usize {
    match &message["content"] {
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).map(str::len).sum(),
        content => content.as_str().map_or(0, str::len),
    }
}

fn last_user_text(messages: &[Value]) -> Option<String> {
    let message = messages.iter().rfind(|message| message["role"] == "user")?;
    match &message["content"] {
        Value::Array(parts) => Some(parts.iter().filter_map(|part| part["text"].as_str()).collect()),
        content => content.as_str().map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_user_text_is_found_among_other_roles_and_in_parts() {
        let messages = vec![
            json!({"role": "user", "content": "first"}),
            json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
            json!({"role": "assistant", "content": "c"}),
        ];
        assert_eq!(last_user_text(&messages).as_deref(), Some("ab"));
        assert_eq!(last_user_text(&messages[2..]), None);
    }
}
