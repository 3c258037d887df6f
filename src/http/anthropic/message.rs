//! Replies as Anthropic words them.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::engine::request::FinishReason;
use crate::generation::SequenceUsage;
use crate::http::error::ApiError;
use crate::http::run::{Ending, Run, RunEvent};

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "AnthropicMessage")]
pub struct Message {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub role: &'static str,
    pub model: String,
    pub content: Vec<Block>,
    #[serde(flatten)]
    pub stop: Stop,
    pub usage: Usage,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "AnthropicBlock")]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Block {
    Text { text: String },
    ToolUse { id: String, name: String, input: Map<String, Value> },
}

/// `null` both while a reply is under way.
#[derive(Debug, Default, JsonSchema, Serialize)]
#[schemars(rename = "AnthropicStop")]
pub struct Stop {
    pub stop_reason: Option<&'static str>,
    /// The one of the request that ended the reply.
    pub stop_sequence: Option<String>,
}

/// In tokens; those found in the prefix cache are no `input_tokens`.
#[derive(Debug, Clone, Copy, JsonSchema, Serialize)]
#[schemars(rename = "AnthropicUsage")]
pub struct Usage {
    pub input_tokens: usize,
    /// Nothing is charged for what is kept.
    pub cache_creation_input_tokens: usize,
    pub cache_read_input_tokens: usize,
    pub output_tokens: usize,
}

impl From<SequenceUsage> for Usage {
    fn from(usage: SequenceUsage) -> Self {
        Self {
            input_tokens: usage.num_prompt_tokens.saturating_sub(usage.num_cached_tokens),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: usage.num_cached_tokens,
            output_tokens: usage.num_output_tokens,
        }
    }
}

impl Message {
    pub fn new(id: String, model: String, content: Vec<Block>, stop: Stop, usage: SequenceUsage) -> Self {
        Self { id, kind: "message", role: "assistant", model, content, stop, usage: usage.into() }
    }
}

impl Stop {
    /// `stops` are the request's own: those of an adapter end a turn.
    pub fn of(ending: Ending, stops: &[String]) -> Self {
        let stop_sequence = ending.stop.filter(|stop| stops.contains(stop));
        let reason = match ending.reason {
            FinishReason::Length => "max_tokens",
            FinishReason::Stop if ending.has_calls => "tool_use",
            FinishReason::Stop if stop_sequence.is_some() => "stop_sequence",
            FinishReason::Stop => "end_turn",
        };
        Self { stop_reason: Some(reason), stop_sequence }
    }
}

pub fn tool_use_id() -> String {
    format!("toolu_{:032x}", rand::random::<u128>())
}

/// Waits for the end of `run`.
pub async fn whole(id: String, mut run: Run, stops: &[String]) -> Result<Message, ApiError> {
    let mut content = Vec::new();
    while let Some(event) = run.next().await {
        match event? {
            RunEvent::Text(text) => match content.last_mut() {
                Some(Block::Text { text: said }) => said.push_str(&text),
                _ => content.push(Block::Text { text }),
            },
            RunEvent::CallStarted { .. } | RunEvent::Arguments(_) => {}
            RunEvent::CallEnded { name, arguments } => {
                content.push(Block::ToolUse { id: tool_use_id(), name, input: arguments });
            }
            RunEvent::Finished(ending) => {
                let (model, usage) = (run.model_id().to_owned(), ending.usage);
                return Ok(Message::new(id, model, content, Stop::of(ending, stops), usage));
            }
        }
    }
    Err(ApiError::internal())
}
