//! A response while it is written, as items and as the events that tell of them.

use std::collections::VecDeque;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::kept::Turn;
use super::tools::{OfferedTools, ToolKind, custom_arguments, custom_input, function_name};
use crate::engine::request::FinishReason;
use crate::generation::SequenceUsage;
use crate::http::AppState;
use crate::http::error::ApiError;
use crate::http::reply::{random_id, unix_seconds};
use crate::http::run::{Ending, Run, RunEvent};
use crate::http::sse;

/// An event: its name, and its data.
type Named = (&'static str, Value);

#[derive(Debug)]
pub struct Writer {
    id: String,
    created_at: u64,
    model: String,
    echoed: Map<String, Value>,
    offered: OfferedTools,
    output: Vec<Item>,
    /// Whether the last item is still written.
    is_open: bool,
    sequence_number: usize,
}

#[derive(Debug)]
struct Item {
    id: String,
    kind: ItemKind,
}

#[derive(Debug)]
enum ItemKind {
    Message {
        text: String,
    },
    Call {
        call_id: String,
        namespace: Option<String>,
        name: String,
        arguments: String,
    },
    /// Of a freeform tool, whose input is known when the call has ended.
    CustomCall {
        call_id: String,
        name: String,
        input: String,
    },
}

impl Item {
    fn to_json(&self, status: &str) -> Value {
        let id = &self.id;
        match &self.kind {
            ItemKind::Message { text } => {
                let content = if status == "in_progress" { json!([]) } else { json!([text_part(text)]) };
                json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
            }
            ItemKind::Call { call_id, namespace, name, arguments } => {
                let mut call = json!({"id": id, "type": "function_call", "status": status, "call_id": call_id,
                    "name": name, "arguments": arguments});
                if let Some(namespace) = namespace {
                    call["namespace"] = json!(namespace);
                }
                call
            }
            ItemKind::CustomCall { call_id, name, input } => {
                json!({"id": id, "type": "custom_tool_call", "status": status,
                "call_id": call_id, "name": name, "input": input})
            }
        }
    }
}

fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

impl Writer {
    pub fn new(id: String, model: &str, echoed: Map<String, Value>, offered: OfferedTools) -> Self {
        let (created_at, model) = (unix_seconds(), model.to_owned());
        Self { id, created_at, model, echoed, offered, output: Vec::new(), is_open: false, sequence_number: 0 }
    }

    /// The whole response as it stands. `usage` is there once it has ended.
    fn response(&self, status: &str, usage: Option<SequenceUsage>) -> Value {
        let item_status = |index: usize| match status {
            "completed" => "completed",
            _ if index + 1 < self.output.len() => "completed",
            other => other,
        };
        let output: Vec<Value> =
            self.output.iter().enumerate().map(|(index, item)| item.to_json(item_status(index))).collect();
        let mut response = self.echoed.clone();
        let incomplete = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        for (name, value) in [
            ("id", json!(self.id)),
            ("object", json!("response")),
            ("created_at", json!(self.created_at)),
            ("status", json!(status)),
            ("error", Value::Null),
            ("incomplete_details", json!(incomplete)),
            ("model", json!(self.model)),
            ("output", json!(output)),
            ("usage", json!(usage.map(usage_json))),
        ] {
            response.insert(name.to_owned(), value);
        }
        Value::Object(response)
    }

    fn begin(&mut self) -> Vec<Named> {
        let response = self.response("in_progress", None);
        ["response.created", "response.in_progress"].map(|name| self.event(name, json!({"response": response}))).into()
    }

    /// What came before the end.
    fn write(&mut self, event: RunEvent) -> Vec<Named> {
        let mut events = Vec::new();
        match event {
            RunEvent::Text(text) => self.write_text(text, &mut events),
            RunEvent::CallStarted { name } => {
                self.close("completed", &mut events);
                let call = self.call(name);
                self.open(call, &mut events);
            }
            RunEvent::Arguments(fragment) => self.write_arguments(&fragment, &mut events),
            // An item ends with the next one, or in `end`, which knows whether it was cut off.
            RunEvent::CallEnded { arguments, .. } => self.write_input(&arguments, &mut events),
            RunEvent::Finished(_) => {}
        }
        events
    }

    fn call(&self, name: String) -> Item {
        let (call_id, arguments) = (random_id("call"), String::new());
        let kind = match self.offered.kind(&name) {
            ToolKind::Function => ItemKind::Call { call_id, namespace: None, name, arguments },
            ToolKind::Namespaced { namespace, name } => {
                ItemKind::Call { call_id, namespace: Some(namespace), name, arguments }
            }
            ToolKind::Custom => {
                return Item { id: random_id("ctc"), kind: ItemKind::CustomCall { call_id, name, input: arguments } };
            }
        };
        Item { id: random_id("fc"), kind }
    }

    fn write_arguments(&mut self, fragment: &str, events: &mut Vec<Named>) {
        if let Some(Item { kind: ItemKind::Call { arguments, .. }, .. }) = self.output.last_mut() {
            arguments.push_str(fragment);
            events.push(self.item_event("response.function_call_arguments.delta", json!({"delta": fragment})));
        }
    }

    /// The input of a freeform tool, which is the text of one JSON string, comes at once.
    fn write_input(&mut self, given: &Map<String, Value>, events: &mut Vec<Named>) {
        let Some(Item { kind: ItemKind::CustomCall { input, .. }, .. }) = self.output.last_mut() else { return };
        if let Some(text) = custom_input(given) {
            input.push_str(text);
            events.push(self.item_event("response.custom_tool_call_input.delta", json!({"delta": text})));
        }
    }

    fn write_text(&mut self, text: String, events: &mut Vec<Named>) {
        if !(self.is_open && matches!(self.output.last(), Some(Item { kind: ItemKind::Message { .. }, .. }))) {
            self.close("completed", events);
            self.open(Item { id: random_id("msg"), kind: ItemKind::Message { text: String::new() } }, events);
            let part = json!({"content_index": 0, "part": text_part("")});
            events.push(self.item_event("response.content_part.added", part));
        }
        if let Some(Item { kind: ItemKind::Message { text: whole }, .. }) = self.output.last_mut() {
            whole.push_str(&text);
        }
        let delta = json!({"content_index": 0, "delta": text, "logprobs": []});
        events.push(self.item_event("response.output_text.delta", delta));
    }

    fn open(&mut self, item: Item, events: &mut Vec<Named>) {
        let added = item.to_json("in_progress");
        self.output.push(item);
        self.is_open = true;
        let data = json!({"output_index": self.output.len() - 1, "item": added});
        events.push(self.event("response.output_item.added", data));
    }

    fn close(&mut self, status: &str, events: &mut Vec<Named>) {
        let Some(item) = self.output.last().filter(|_| self.is_open) else { return };
        let done = item.to_json(status);
        match &item.kind {
            ItemKind::Message { text } => {
                let whole = json!({"content_index": 0, "text": text, "logprobs": []});
                let part = json!({"content_index": 0, "part": text_part(text)});
                events.push(self.item_event("response.output_text.done", whole));
                events.push(self.item_event("response.content_part.done", part));
            }
            ItemKind::Call { name, arguments, .. } => {
                let whole = json!({"name": name, "arguments": arguments});
                events.push(self.item_event("response.function_call_arguments.done", whole));
            }
            ItemKind::CustomCall { input, .. } => {
                let whole = json!({"input": input});
                events.push(self.item_event("response.custom_tool_call_input.done", whole));
            }
        }
        let data = json!({"output_index": self.output.len() - 1, "item": done});
        events.push(self.event("response.output_item.done", data));
        self.is_open = false;
    }

    /// The last events, and the response as it is then.
    fn end(&mut self, reason: FinishReason, usage: SequenceUsage) -> (Vec<Named>, Value) {
        let mut events = Vec::new();
        let (status, name) = match reason {
            FinishReason::Stop => ("completed", "response.completed"),
            FinishReason::Length => ("incomplete", "response.incomplete"),
        };
        self.close(status, &mut events);
        let response = self.response(status, Some(usage));
        events.push(self.event(name, json!({"response": response})));
        (events, response)
    }

    fn fail(&mut self, error: ApiError) -> Named {
        let mut response = self.response("failed", None);
        response["error"] = json!({"code": "server_error", "message": error.into_envelope().error.message()});
        self.event("response.failed", json!({"response": response}))
    }

    /// What was said, as messages of a chat.
    fn answer(&self) -> Vec<Value> {
        let (mut content, mut calls) = (String::new(), Vec::new());
        for item in &self.output {
            let (call_id, name, arguments) = match &item.kind {
                ItemKind::Message { text } => {
                    content.push_str(text);
                    continue;
                }
                ItemKind::Call { call_id, namespace, name, arguments } => {
                    (call_id, function_name(&json!(namespace), &json!(name)), json!(arguments))
                }
                ItemKind::CustomCall { call_id, name, input } => (call_id, json!(name), custom_arguments(input)),
            };
            calls.push(json!({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}));
        }
        let mut message = json!({"role": "assistant", "content": content});
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        vec![message]
    }

    /// An event of the item that is written.
    fn item_event(&mut self, name: &'static str, mut data: Value) -> Named {
        data["item_id"] = json!(self.output.last().map(|item| &item.id));
        data["output_index"] = json!(self.output.len().saturating_sub(1));
        self.event(name, data)
    }

    fn event(&mut self, name: &'static str, mut data: Value) -> Named {
        data["type"] = json!(name);
        data["sequence_number"] = json!(self.sequence_number);
        self.sequence_number += 1;
        (name, data)
    }
}

fn usage_json(usage: SequenceUsage) -> Value {
    let SequenceUsage { num_prompt_tokens, num_cached_tokens, num_output_tokens, .. } = usage;
    json!({
        "input_tokens": num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": num_cached_tokens},
        "output_tokens": num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt_tokens + num_output_tokens,
    })
}

pub async fn whole(mut run: Run, mut writer: Writer, turn: Turn) -> Result<Response, ApiError> {
    while let Some(event) = run.next().await {
        match event? {
            RunEvent::Finished(Ending { reason, usage, .. }) => {
                let (_, response) = writer.end(reason, usage);
                turn.keep(&writer.id, response.clone(), writer.answer());
                return Ok(Json(response).into_response());
            }
            event => drop(writer.write(event)),
        }
    }
    Err(ApiError::internal())
}

/// The generation lives in the response: dropping that cancels it.
pub fn stream(state: &AppState, run: Run, mut writer: Writer, turn: Turn) -> Response {
    let events = VecDeque::from(writer.begin());
    let stream = Stream { run, writer, turn: Some(turn), events };
    let named = futures::stream::unfold(stream, async |mut stream| {
        let (name, data) = stream.next().await?;
        Some(((name, sse::json(&data)), stream))
    });
    sse::respond_named(state, named)
}

struct Stream {
    run: Run,
    writer: Writer,
    /// Until the end.
    turn: Option<Turn>,
    events: VecDeque<Named>,
}

impl Stream {
    async fn next(&mut self) -> Option<Named> {
        while self.events.is_empty() {
            match self.run.next().await? {
                Ok(RunEvent::Finished(Ending { reason, usage, .. })) => {
                    let (events, response) = self.writer.end(reason, usage);
                    self.events.extend(events);
                    if let Some(turn) = self.turn.take() {
                        turn.keep(&self.writer.id, response, self.writer.answer());
                    }
                }
                Ok(event) => self.events.extend(self.writer.write(event)),
                Err(error) => self.events.push_back(self.writer.fail(error)),
            }
        }
        self.events.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::Fields;
    use crate::http::sent_as::SentAs;

    fn names(events: &[Named]) -> Vec<&str> {
        events.iter().map(|(name, _)| name.strip_prefix("response.").unwrap()).collect()
    }

    #[test]
    fn every_item_is_told_from_its_beginning_to_its_end() {
        let mut writer = writer();
        let mut events = writer.begin();
        for told in [
            RunEvent::Text("Hm.".to_owned()),
            RunEvent::CallStarted { name: "f".to_owned() },
            RunEvent::Arguments("{\"a\": 1}".to_owned()),
            RunEvent::CallEnded { name: "f".to_owned(), arguments: Map::from_iter([("a".to_owned(), json!(1))]) },
        ] {
            events.extend(writer.write(told));
        }
        let (last, response) = writer.end(FinishReason::Stop, SequenceUsage::default());
        events.extend(last);
        let expected = [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ];
        assert_eq!(names(&events), expected);
        let numbers = events.iter().map(|(_, data)| data["sequence_number"].as_u64().unwrap());
        assert!(numbers.eq(0..expected.len() as u64));
        assert_eq!(response["output"][0]["content"][0]["text"], "Hm.");
        assert_eq!(response["output"][1]["arguments"], "{\"a\": 1}");
        let [answer] = writer.answer().try_into().unwrap();
        assert_eq!(answer["tool_calls"][0]["id"], response["output"][1]["call_id"]);
    }

    fn writer() -> Writer {
        Writer::new("resp-1".to_owned(), "m", Map::new(), OfferedTools::default())
    }

    #[test]
    fn calls_are_told_as_what_was_offered() {
        let tools = json!({"tools": [{"type": "custom", "name": "patch"}, {"type": "namespace", "name": "n", "tools": [
            {"type": "function", "name": "f"}]}]});
        let fields = Fields::parse(tools.to_string().as_bytes()).unwrap();
        let offered = OfferedTools::parse(&fields, &mut SentAs::default()).unwrap();
        let mut writer = Writer { offered, ..writer() };
        let mut events = Vec::new();
        for (name, arguments) in [("patch", json!({"input": "a\nb"})), ("n.f", json!({}))] {
            let (name, arguments) = (name.to_owned(), arguments.as_object().cloned().unwrap());
            events.extend(writer.write(RunEvent::CallStarted { name: name.clone() }));
            events.extend(writer.write(RunEvent::Arguments(json!(arguments).to_string())));
            events.extend(writer.write(RunEvent::CallEnded { name, arguments }));
        }
        let (last, response) = writer.end(FinishReason::Stop, SequenceUsage::default());
        events.extend(last);
        let expected = [
            "output_item.added",
            "custom_tool_call_input.delta",
            "custom_tool_call_input.done",
            "output_item.done",
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
            "completed",
        ];
        assert_eq!(names(&events), expected);
        let [custom, function] = [0, 1].map(|index| &response["output"][index]);
        assert_eq!((&custom["type"], &custom["input"]), (&json!("custom_tool_call"), &json!("a\nb")));
        assert_eq!((&function["namespace"], &function["name"]), (&json!("n"), &json!("f")));
        let [answer] = writer.answer().try_into().unwrap();
        assert_eq!(answer["tool_calls"][0]["function"]["arguments"], r#"{"input":"a\nb"}"#);
        assert_eq!(answer["tool_calls"][1]["function"]["name"], "n.f");
    }

    #[test]
    fn what_was_cut_off_is_incomplete() {
        let mut writer = writer();
        writer.write(RunEvent::Text("a".to_owned()));
        let (events, response) = writer.end(FinishReason::Length, SequenceUsage::default());
        assert_eq!(names(&events).last(), Some(&"incomplete"));
        assert_eq!(response["incomplete_details"]["reason"], "max_output_tokens");
        assert_eq!(response["output"][0]["status"], "incomplete");
    }
}
