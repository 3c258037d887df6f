//! A message as events: its start, blocks one after the other, why it ended, its end.

use std::collections::VecDeque;

use axum::response::Response;
use serde_json::{Value, json};

use super::message::{Message, Stop, Usage, tool_use_id};
use crate::http::AppState;
use crate::http::dialect::anthropic_error;
use crate::http::run::{Run, RunEvent};
use crate::http::sse;

/// The generation lives in the response: dropping that cancels it.
pub fn respond(state: &AppState, id: String, run: Run, stops: Vec<String>) -> Response {
    let events = Events { id, run, stops, block: None, num_blocks: 0, has_begun: false, ready: VecDeque::new() };
    sse::respond_named(state, futures::stream::unfold(events, async |mut events| Some((events.next().await?, events))))
}

struct Events {
    id: String,
    run: Run,
    /// The stop strings of the request.
    stops: Vec<String>,
    block: Option<OpenBlock>,
    num_blocks: usize,
    has_begun: bool,
    ready: VecDeque<(&'static str, Value)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OpenBlock {
    Text,
    ToolUse,
}

impl Events {
    async fn next(&mut self) -> Option<(&'static str, String)> {
        loop {
            if let Some((name, data)) = self.ready.pop_front() {
                return Some((name, sse::json(&data)));
            }
            match self.run.next().await? {
                Ok(event) => self.on_event(event),
                Err(error) => self.push("error", anthropic_error(&error.into_envelope().error, None)),
            }
        }
    }

    fn on_event(&mut self, event: RunEvent) {
        // Not before: what of the prompt was cached is known with the first event.
        if !std::mem::replace(&mut self.has_begun, true) {
            let (model, usage) = (self.run.model_id().to_owned(), self.run.usage());
            let message = Message::new(self.id.clone(), model, Vec::new(), Stop::default(), usage);
            self.push("message_start", json!({"type": "message_start", "message": message}));
        }
        match event {
            RunEvent::Text(text) => {
                if self.block != Some(OpenBlock::Text) {
                    self.open(OpenBlock::Text, json!({"type": "text", "text": ""}));
                }
                self.delta(json!({"type": "text_delta", "text": text}));
            }
            RunEvent::CallStarted { name } => {
                let block = json!({"type": "tool_use", "id": tool_use_id(), "name": name, "input": {}});
                self.open(OpenBlock::ToolUse, block);
            }
            RunEvent::Arguments(fragment) => {
                self.delta(json!({"type": "input_json_delta", "partial_json": fragment}));
            }
            RunEvent::CallEnded { .. } => self.close(),
            RunEvent::Finished(ending) => {
                self.close();
                let usage = Usage::from(ending.usage);
                let stop = Stop::of(ending, &self.stops);
                self.push("message_delta", json!({"type": "message_delta", "delta": stop, "usage": usage}));
                self.push("message_stop", json!({"type": "message_stop"}));
            }
        }
    }

    fn open(&mut self, block: OpenBlock, content: Value) {
        self.close();
        self.block = Some(block);
        let index = self.num_blocks;
        self.push(
            "content_block_start",
            json!({"type": "content_block_start", "index": index, "content_block": content}),
        );
    }

    fn delta(&mut self, delta: Value) {
        let index = self.num_blocks;
        self.push("content_block_delta", json!({"type": "content_block_delta", "index": index, "delta": delta}));
    }

    fn close(&mut self) {
        if self.block.take().is_some() {
            let index = self.num_blocks;
            self.push("content_block_stop", json!({"type": "content_block_stop", "index": index}));
            self.num_blocks += 1;
        }
    }

    fn push(&mut self, name: &'static str, data: Value) {
        self.ready.push_back((name, data));
    }
}
