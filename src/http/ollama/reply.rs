//! Replies as Ollama words them, whole or as lines of JSON.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use chrono::{SecondsFormat, Utc};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::http::dialect::ollama_error;
use crate::http::error::ApiError;
use crate::http::run::{Ending, Run, RunEvent};
use crate::http::sse::UNBUFFERED;
use crate::http::types::reason_name;

const NDJSON: &str = "application/x-ndjson";

#[derive(Debug, Clone, Copy)]
pub enum Wording {
    Generate,
    Chat,
}

/// A whole reply, or one line of it.
#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaReply")]
pub struct Reply<'a> {
    model: &'a str,
    /// RFC 3339.
    created_at: String,
    #[serde(flatten)]
    said: Said,
    done: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    done_reason: Option<&'static str>,
    #[serde(flatten)]
    costs: Option<Costs>,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaSaid")]
#[serde(rename_all = "snake_case")]
enum Said {
    Response(String),
    Message(Message),
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaMessage")]
struct Message {
    role: &'static str,
    content: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaToolCall")]
struct ToolCall {
    function: Function,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaFunction")]
struct Function {
    name: String,
    arguments: Map<String, Value>,
}

/// Durations in nanoseconds.
#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaCosts")]
struct Costs {
    total_duration: u64,
    /// The base is always loaded; what an adapter took is in the time of the prompt, as is the wait for a place.
    load_duration: u64,
    prompt_eval_count: usize,
    prompt_eval_duration: u64,
    eval_count: usize,
    eval_duration: u64,
}

impl Wording {
    fn said(self, text: String, tool_calls: Vec<ToolCall>) -> Said {
        match self {
            Self::Generate => Said::Response(text),
            Self::Chat => Said::Message(Message { role: "assistant", content: text, tool_calls }),
        }
    }
}

impl ToolCall {
    fn new(name: String, arguments: Map<String, Value>) -> Self {
        Self { function: Function { name, arguments } }
    }
}

impl Costs {
    fn of(Ending { usage, timing, .. }: &Ending) -> Self {
        let first_token = timing.first_token.unwrap_or(timing.total);
        Self {
            total_duration: nanoseconds(timing.total),
            load_duration: 0,
            prompt_eval_count: usage.num_prompt_tokens,
            prompt_eval_duration: nanoseconds(first_token),
            eval_count: usage.num_output_tokens,
            eval_duration: nanoseconds(timing.total.saturating_sub(first_token)),
        }
    }
}

impl<'a> Reply<'a> {
    fn part(model: &'a str, said: Said) -> Self {
        Self { model, created_at: now(), said, done: false, done_reason: None, costs: None }
    }

    fn last(model: &'a str, said: Said, reason: &'static str, costs: Option<Costs>) -> Self {
        Self { done: true, done_reason: Some(reason), costs, ..Self::part(model, said) }
    }
}

/// The answer to a request that asks for no text; the only line of a stream, too.
pub fn without_text(model: &str, wording: Wording, reason: &'static str) -> Response {
    Json(Reply::last(model, wording.said(String::new(), Vec::new()), reason, None)).into_response()
}

pub async fn whole(mut run: Run, wording: Wording) -> Result<Response, ApiError> {
    let (mut text, mut calls) = (String::new(), Vec::new());
    while let Some(event) = run.next().await {
        match event? {
            RunEvent::Text(more) => text.push_str(&more),
            RunEvent::CallEnded { name, arguments } => calls.push(ToolCall::new(name, arguments)),
            RunEvent::CallStarted { .. } | RunEvent::Arguments(_) => {}
            RunEvent::Finished(ending) => {
                let (reason, costs) = (reason_name(ending.reason), Costs::of(&ending));
                let reply = Reply::last(run.model_id(), wording.said(text, calls), reason, Some(costs));
                return Ok(Json(reply).into_response());
            }
        }
    }
    Err(ApiError::internal())
}

/// The generation lives in the response: dropping that cancels it.
pub fn stream(run: Run, wording: Wording) -> Response {
    let lines = futures::stream::unfold((run, wording), async |(mut run, wording)| {
        loop {
            let event = run.next().await?;
            if let Some(line) = line(run.model_id(), wording, event) {
                return Some((Ok::<_, Infallible>(line + "\n"), (run, wording)));
            }
        }
    });
    let content_type = (header::CONTENT_TYPE, HeaderValue::from_static(NDJSON));
    ([content_type, UNBUFFERED], Body::from_stream(lines)).into_response()
}

/// `None` for what is told later: a call is sent whole.
fn line(model: &str, wording: Wording, event: Result<RunEvent, ApiError>) -> Option<String> {
    let said = |text, calls| wording.said(text, calls);
    let reply = match event {
        Ok(RunEvent::Text(text)) => Reply::part(model, said(text, Vec::new())),
        Ok(RunEvent::CallEnded { name, arguments }) => {
            Reply::part(model, said(String::new(), vec![ToolCall::new(name, arguments)]))
        }
        Ok(RunEvent::CallStarted { .. } | RunEvent::Arguments(_)) => return None,
        Ok(RunEvent::Finished(ending)) => {
            let (reason, costs) = (reason_name(ending.reason), Costs::of(&ending));
            Reply::last(model, said(String::new(), Vec::new()), reason, Some(costs))
        }
        Err(error) => return Some(ollama_error(&error.into_envelope().error).to_string()),
    };
    Some(serde_json::to_string(&reply).unwrap_or_else(|error| {
        tracing::error!(%error, "a line could not be written as JSON");
        ollama_error(&ApiError::internal().into_envelope().error).to_string()
    }))
}

fn now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Nanos, true)
}

fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos().try_into().unwrap_or(u64::MAX)
}
