//! Functions that a chat offers to the model, and how calls of them are read from what it writes.
//!
//! How a model words a call is known from its chat template alone: from what it renders of one, or tells the model
//! ([`CallFormat`]). A call is read while it is written ([`CallReader`]); what only looks like one stays text.

mod call_grammar;
mod forced;
mod format;
mod reader;
mod value;

use std::collections::HashSet;

use serde_json::Value;

pub use forced::ToolChoice;
pub use format::CallFormat;
pub use reader::{CallReader, ChatPart};

/// What a request offers.
#[derive(Debug, Clone, PartialEq)]
pub struct Tools {
    /// As OpenAI words them, `{"type": "function", "function": {"name", "description", "parameters"}}`; never empty.
    pub definitions: Vec<Value>,
    /// Names of those whose arguments must be what the schema says, whether or not a call is forced.
    pub strict: HashSet<String>,
    /// Whether one reply may hold several calls.
    pub parallel: bool,
    pub choice: ToolChoice,
}

impl Tools {
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.definitions.iter().filter_map(|tool| tool["function"]["name"].as_str())
    }

    pub fn has(&self, name: &str) -> bool {
        self.names().any(|own| own == name)
    }

    /// Bytes of all that is rendered, at least.
    pub fn num_text_bytes(&self) -> usize {
        fn of(value: &Value) -> usize {
            match value {
                Value::String(text) => text.len(),
                Value::Array(items) => items.iter().map(of).sum(),
                Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + of(value)).sum(),
                _ => 0,
            }
        }
        self.definitions.iter().map(of).sum()
    }

    /// The JSON schema of one parameter.
    fn parameter(&self, name: &str, parameter: &str) -> Option<&Value> {
        let tool = self.definitions.iter().find(|tool| tool["function"]["name"] == name)?;
        tool["function"]["parameters"]["properties"].get(parameter)
    }
}
