//! A request for a response, as one for a chat.

use serde_json::{Map, Value, json};

use super::tools::{OfferedTools, custom_arguments, function_name, tool_choice};
use crate::http::error::ApiError;
use crate::http::fields::{Fields, wrong_type};
use crate::http::sent_as::{SentAs, Translated};
use crate::http::unsupported::{Route, refuse_unsupported};

#[derive(Debug)]
pub struct ResponseRequest {
    /// The same in the words of a chat.
    pub chat: Translated,
    pub offered: OfferedTools,
    /// The conversation, without what holds for this response alone.
    pub messages: Vec<Value>,
    pub is_stored: bool,
    /// What a response repeats of its request.
    pub echoed: Map<String, Value>,
}

/// Fields that a chat has under other names, or not at all.
const OWN: [&str; 15] = [
    "input",
    "instructions",
    "max_output_tokens",
    "tools",
    "tool_choice",
    "text",
    "store",
    "previous_response_id",
    "metadata",
    "include",
    "truncation",
    "reasoning",
    "background",
    "stream",
    "stream_options",
];

impl ResponseRequest {
    /// `previous` is the conversation that this goes on from.
    pub fn parse(fields: &Fields, previous: Vec<Value>) -> Result<Self, ApiError> {
        refuse_unsupported(fields, Route::Responses)?;
        check_reasoning(fields)?;
        check_verbosity(fields)?;
        check_include(fields)?;
        fields.object("stream_options")?;
        let mut sent_as = SentAs::default();
        for (read, sent) in [
            ("messages", "input"),
            ("max_tokens", "max_output_tokens"),
            ("response_format", "text.format"),
            ("response_format.json_schema", "text.format"),
        ] {
            sent_as.add(read, sent);
        }
        let instructions = fields.string("instructions")?;
        let told = instructions.map(|text| json!({"role": "system", "content": text}));
        let mut said = Messages { said: previous, num_told: usize::from(told.is_some()), sent_as: &mut sent_as };
        said.read_input(fields)?;
        let messages = said.said;
        let mut chat = fields.without(&OWN);
        chat.insert("messages".to_owned(), told.into_iter().chain(messages.iter().cloned()).collect());
        if let Some(most) = fields.count("max_output_tokens", 1..=u32::MAX)? {
            chat.insert("max_tokens".to_owned(), most.into());
        }
        let offered = OfferedTools::parse(fields, &mut sent_as)?;
        if !offered.definitions.is_empty() {
            chat.insert("tools".to_owned(), offered.definitions.clone().into());
        }
        if let Some(choice) = tool_choice(fields, &mut sent_as)? {
            chat.insert("tool_choice".to_owned(), choice);
        }
        if let Some(format) = text_format(fields)? {
            chat.insert("response_format".to_owned(), format);
        }
        let is_stored = fields.boolean("store")?.unwrap_or(true);
        let echoed = echoed(fields, is_stored, &offered);
        let chat = Translated { fields: Fields::from(chat), sent_as };
        Ok(Self { chat, offered, messages, is_stored, echoed })
    }
}

fn echoed(fields: &Fields, is_stored: bool, offered: &OfferedTools) -> Map<String, Value> {
    let mut echoed = Map::new();
    for (name, default) in [
        ("instructions", Value::Null),
        ("max_output_tokens", Value::Null),
        ("metadata", json!({})),
        ("parallel_tool_calls", json!(true)),
        ("previous_response_id", Value::Null),
        ("reasoning", json!({"effort": null, "summary": null})),
        ("temperature", Value::Null),
        ("text", json!({"format": {"type": "text"}})),
        ("tool_choice", json!("auto")),
        ("top_p", Value::Null),
        ("user", Value::Null),
    ] {
        echoed.insert(name.to_owned(), fields.get(name).cloned().unwrap_or(default));
    }
    echoed.insert("tools".to_owned(), offered.sent.clone().into());
    echoed.insert("background".to_owned(), false.into());
    echoed.insert("store".to_owned(), is_stored.into());
    echoed.insert("truncation".to_owned(), "disabled".into());
    echoed
}

fn check_verbosity(fields: &Fields) -> Result<(), ApiError> {
    match fields.object("text")?.and_then(|text| text.get("verbosity")) {
        None | Some(Value::Null) => Ok(()),
        Some(verbosity) if verbosity == "medium" => Ok(()),
        Some(other) => {
            let message = format!("`text.verbosity` is {other:.80}, but `medium` only: say it in the instructions");
            Err(ApiError::invalid("text.verbosity", message))
        }
    }
}

/// The models here think no longer when they are asked to, and of no thoughts the summary is none.
fn check_reasoning(fields: &Fields) -> Result<(), ApiError> {
    for (name, value) in fields.object("reasoning")?.into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        let (is_harmless, advice) = match name.as_str() {
            "effort" => (value == "none", "no model here reasons before it answers: send `none`, or leave it out"),
            "summary" | "generate_summary" => {
                let kinds = ["auto", "concise", "detailed", "none"];
                (value.as_str().is_some_and(|kind| kinds.contains(&kind)), "send `auto`, or leave it out")
            }
            _ => (false, "leave it out"),
        };
        if !is_harmless {
            let at = format!("reasoning.{name}");
            return Err(ApiError::invalid(&at, format!("`{at}` is not served as asked here ({value:.80}): {advice}")));
        }
    }
    Ok(())
}

/// Extras of a reply: thoughts there are none of, others are not served.
fn check_include(fields: &Fields) -> Result<(), ApiError> {
    let included = fields.strings("include")?;
    match included.iter().find(|name| *name != "reasoning.encrypted_content") {
        None => Ok(()),
        Some(name) => {
            Err(ApiError::invalid("include", format!("`include` asks for `{name:.80}`, which no response has")))
        }
    }
}

/// A conversation in the words of a chat, and where each message came from.
struct Messages<'a> {
    said: Vec<Value>,
    /// Messages that will stand before these.
    num_told: usize,
    sent_as: &'a mut SentAs,
}

impl Messages<'_> {
    fn read_input(&mut self, fields: &Fields) -> Result<(), ApiError> {
        match fields.get("input") {
            None => Err(ApiError::invalid("input", "`input` is required")),
            Some(Value::String(text)) => {
                self.push(json!({"role": "user", "content": text}), "input");
                Ok(())
            }
            Some(Value::Array(items)) if items.is_empty() => {
                Err(ApiError::invalid("input", "`input` is an empty array"))
            }
            Some(Value::Array(items)) => {
                items.iter().enumerate().try_for_each(|(index, item)| self.read_item(&format!("input[{index}]"), item))
            }
            Some(other) => Err(wrong_type("input", "a string or an array of items", other)),
        }
    }

    fn read_item(&mut self, at: &str, item: &Value) -> Result<(), ApiError> {
        if !item.is_object() {
            return Err(wrong_type(at, "an object", item));
        }
        if !item["call_id"].is_null() && !item["call_id"].is_string() {
            return Err(wrong_type(&format!("{at}.call_id"), "a string", &item["call_id"]));
        }
        match item["type"].as_str().unwrap_or("message") {
            "message" => {
                let content = content(&format!("{at}.content"), &item["content"])?;
                self.push(json!({"role": item["role"], "content": content}), at);
            }
            "function_call" => {
                self.push_call(function_name(&item["namespace"], &item["name"]), &item["arguments"], item, at)
            }
            "custom_tool_call" => {
                let input = &item["input"];
                let input = input.as_str().ok_or_else(|| wrong_type(&format!("{at}.input"), "a string", input))?;
                self.push_call(item["name"].clone(), &custom_arguments(input), item, at);
            }
            "function_call_output" | "custom_tool_call_output" => {
                let output = format!("{at}.output");
                let content = content(&output, &item["output"])?;
                self.push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": content}), at);
                let read = self.place();
                self.sent_as.add(format!("{read}.tool_call_id"), format!("{at}.call_id"));
                self.sent_as.add(format!("{read}.content"), output);
            }
            // Another model's thoughts are not part of what was said.
            "reasoning" => {}
            other => {
                let at = format!("{at}.type");
                let message = format!(
                    "`{at}` is `{other:.80}`, not one of message, function_call, function_call_output, custom_tool_call, \
                     custom_tool_call_output, reasoning"
                );
                return Err(ApiError::invalid(&at, message));
            }
        }
        Ok(())
    }

    /// Calls of one answer are in one message.
    fn push_call(&mut self, name: Value, arguments: &Value, item: &Value, at: &str) {
        let call =
            json!({"id": item["call_id"], "type": "function", "function": {"name": name, "arguments": arguments}});
        match self.said.last_mut().filter(|last| last["role"] == "assistant") {
            Some(Value::Object(last)) => match last.entry("tool_calls").or_insert_with(|| json!([])) {
                Value::Array(calls) => calls.push(call),
                other => *other = json!([call]),
            },
            _ => self.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}), at),
        }
        let calls = self.said.last().and_then(|last| last["tool_calls"].as_array()).map_or(0, Vec::len);
        self.sent_as.add(format!("{}.tool_calls[{}].function", self.place(), calls.saturating_sub(1)), at);
    }

    fn push(&mut self, message: Value, at: &str) {
        self.said.push(message);
        self.sent_as.add(self.place(), at);
    }

    /// Where the chat will have the last message.
    fn place(&self) -> String {
        format!("messages[{}]", self.num_told + self.said.len() - 1)
    }
}

/// Parts in the words of a chat; what they are is checked there.
fn content(at: &str, content: &Value) -> Result<Value, ApiError> {
    let Value::Array(parts) = content else { return Ok(content.clone()) };
    let part = |(index, part): (usize, &Value)| match part["type"].as_str() {
        Some("input_text" | "output_text" | "text") => Ok(json!({"type": "text", "text": part["text"]})),
        Some("refusal") => Ok(json!({"type": "text", "text": part["refusal"]})),
        _ => {
            let at = format!("{at}[{index}].type");
            Err(ApiError::invalid(&at, format!("`{at}` must be \"input_text\" or \"output_text\"")))
        }
    };
    parts.iter().enumerate().map(part).collect()
}

/// `text.format`, as a chat's `response_format`.
fn text_format(fields: &Fields) -> Result<Option<Value>, ApiError> {
    let Some(format) = fields.object("text")?.and_then(|text| text.get("format")) else { return Ok(None) };
    match format["type"].as_str() {
        None if format.is_null() => Ok(None),
        Some("json_schema") => {
            let schema = json!({"name": format["name"], "schema": format["schema"], "strict": format["strict"]});
            Ok(Some(json!({"type": "json_schema", "json_schema": schema})))
        }
        Some(_) => Ok(Some(format.clone())),
        None => Err(wrong_type("text.format.type", "a string", &format["type"])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<ResponseRequest, ApiError> {
        ResponseRequest::parse(&Fields::parse(body.to_string().as_bytes()).unwrap(), Vec::new())
    }

    #[test]
    fn items_become_the_messages_of_a_chat() {
        let request = parse(json!({"instructions": "Be brief.", "max_output_tokens": 7, "top_k": 3, "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "b"},
        ], "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true}],
            "tool_choice": {"type": "function", "name": "f"}}))
        .unwrap();
        let chat = &request.chat.fields;
        let messages = chat.get("messages").unwrap();
        assert_eq!(messages[0], json!({"role": "system", "content": "Be brief."}));
        assert_eq!(messages[1]["content"][0], json!({"type": "text", "text": "a"}));
        assert_eq!(messages[2]["tool_calls"][1]["function"]["name"], "g");
        assert_eq!(messages[3], json!({"role": "tool", "tool_call_id": "1", "content": "b"}));
        assert_eq!(chat.get("max_tokens"), Some(&json!(7)));
        assert_eq!(chat.get("top_k"), Some(&json!(3)));
        assert_eq!(chat.get("tools").unwrap()[0]["function"]["name"], "f");
        assert_eq!(chat.get("tool_choice").unwrap()["function"]["name"], "f");
        assert_eq!(request.messages.len(), 3, "instructions hold for this response alone");
    }

    #[test]
    fn freeform_calls_and_those_of_a_namespace_go_back_as_they_came() {
        let request = parse(json!({"input": [
            {"role": "user", "content": "a"},
            {"type": "custom_tool_call", "call_id": "1", "name": "patch", "input": "x"},
            {"type": "function_call", "call_id": "2", "namespace": "n", "name": "f", "arguments": "{}"},
            {"type": "custom_tool_call_output", "call_id": "1", "output": "b"}]}))
        .unwrap();
        let calls = &request.messages[1]["tool_calls"];
        assert_eq!(calls[0]["function"], json!({"name": "patch", "arguments": r#"{"input":"x"}"#}));
        assert_eq!(calls[1]["function"]["name"], "n.f");
        assert_eq!(request.messages[2]["tool_call_id"], "1");
    }

    #[test]
    fn errors_of_the_chat_are_told_in_the_clients_own_fields() {
        let request = parse(json!({"instructions": "i", "input": [
            {"type": "reasoning"}, {"role": "user", "content": "a"},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": 1},
            {"type": "function_call_output", "call_id": "3", "output": "b"}]}))
        .unwrap();
        for (read, sent) in [
            ("messages", "input"),
            ("messages[1].role", "input[1].role"),
            ("messages[2].tool_calls[1].function.arguments", "input[3].arguments"),
            ("messages[3].tool_call_id", "input[4].call_id"),
            ("messages[3].content", "input[4].output"),
            ("max_tokens", "max_output_tokens"),
            ("response_format.json_schema.schema", "text.format.schema"),
        ] {
            let error = request.chat.sent_as.word(ApiError::invalid(read, "no"));
            assert_eq!(error.param(), Some(sent));
        }
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        for (body, place) in [
            (json!({}), "input"),
            (json!({"input": []}), "input"),
            (json!({"input": 1}), "input"),
            (json!({"input": [1]}), "input[0]"),
            (json!({"input": [{"type": "item_reference"}]}), "input[0].type"),
            (json!({"input": [{"type": "function_call_output", "call_id": 1, "output": "a"}]}), "input[0].call_id"),
            (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0].content[0].type"),
            (json!({"input": [{"type": "custom_tool_call", "name": "p", "input": 1}]}), "input[0].input"),
            (json!({"input": "a", "background": true}), "background"),
            (json!({"input": "a", "truncation": "auto"}), "truncation"),
            (json!({"input": "a", "reasoning": {"effort": "high"}}), "reasoning.effort"),
            (json!({"input": "a", "text": {"verbosity": "low"}}), "text.verbosity"),
            (json!({"input": "a", "include": ["file_search_call.results"]}), "include"),
            (json!({"input": "a", "reasoning": {"summary": "long"}}), "reasoning.summary"),
            (json!({"input": "a", "reasoning": {"mode": "pro"}}), "reasoning.mode"),
            (json!({"input": "a", "tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"input": "a", "tool_choice": {"type": "allowed_tools"}}), "tool_choice.type"),
            (json!({"input": "a", "max_tokens": 1}), "max_tokens"),
            (json!({"input": "a", "conversation": "c"}), "conversation"),
        ] {
            let error = parse(body.clone()).expect_err(place);
            assert_eq!(error.param(), Some(place), "{body}");
        }
        let harmless = json!({"input": "a", "background": false, "truncation": "disabled", "top_logprobs": 0,
            "reasoning": {"effort": null, "summary": "auto"}, "include": ["reasoning.encrypted_content"], "text": {"format": null}});
        assert!(parse(harmless).is_ok());
    }
}
