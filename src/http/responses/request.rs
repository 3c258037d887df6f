//! A request for a response, as one for a chat.

use serde_json::{Map, Value, json};

use crate::http::error::ApiError;
use crate::http::fields::{Fields, wrong_type};

#[derive(Debug)]
pub struct ResponseRequest {
    /// The same in the words of a chat.
    pub chat: Fields,
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

/// What would change the response and is not served: names, what changes nothing, and what to do instead.
type Refused = (&'static str, fn(&Value) -> bool, &'static str);

const REFUSED: [Refused; 9] = [
    ("background", |value| *value == false, "send `stream`: true, or wait"),
    ("truncation", |value| *value == "disabled", "a conversation that is too long is refused: shorten it"),
    ("conversation", |_| false, "send `previous_response_id`"),
    ("prompt", |_| false, "prompts are not kept here: send `instructions` and `input`"),
    ("max_tool_calls", |_| false, "this server runs no tools of its own"),
    ("messages", |_| false, "send them as `input`"),
    ("max_tokens", |_| false, "send it as `max_output_tokens`"),
    ("top_logprobs", |value| *value == 0, "responses have no log-probabilities: use /v1/chat/completions"),
    ("response_format", |value| value["type"] == "text", "send it as `text.format`"),
];

impl ResponseRequest {
    /// `previous` is the conversation that this goes on from.
    pub fn parse(fields: &Fields, previous: Vec<Value>) -> Result<Self, ApiError> {
        for (name, is_harmless, advice) in REFUSED {
            if let Some(value) = fields.get(name).filter(|value| !is_harmless(value)) {
                let message = format!("`{name}` is not served as asked here ({value:.80}): {advice}");
                return Err(ApiError::invalid(name, message));
            }
        }
        check_reasoning(fields)?;
        check_verbosity(fields)?;
        check_include(fields)?;
        fields.object("stream_options")?;
        let mut messages = previous;
        messages.extend(input(fields)?);
        let instructions = fields.string("instructions")?;
        let told = instructions.map(|text| json!({"role": "system", "content": text}));
        let mut chat = fields.without(&OWN);
        chat.insert("messages".to_owned(), told.into_iter().chain(messages.iter().cloned()).collect());
        if let Some(most) = fields.count("max_output_tokens", 1..=u32::MAX)? {
            chat.insert("max_tokens".to_owned(), most.into());
        }
        let tools = tools(fields)?;
        if !tools.is_empty() {
            chat.insert("tools".to_owned(), tools.into());
        }
        if let Some(choice) = tool_choice(fields)? {
            chat.insert("tool_choice".to_owned(), choice);
        }
        if let Some(format) = text_format(fields)? {
            chat.insert("response_format".to_owned(), format);
        }
        let is_stored = fields.boolean("store")?.unwrap_or(true);
        Ok(Self { chat: Fields::from(chat), messages, is_stored, echoed: echoed(fields, is_stored) })
    }
}

fn echoed(fields: &Fields, is_stored: bool) -> Map<String, Value> {
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
        ("tools", json!([])),
        ("top_p", Value::Null),
        ("user", Value::Null),
    ] {
        echoed.insert(name.to_owned(), fields.get(name).cloned().unwrap_or(default));
    }
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

/// The models here think no longer when they are asked to.
fn check_reasoning(fields: &Fields) -> Result<(), ApiError> {
    let effort = fields.object("reasoning")?.and_then(|reasoning| reasoning.get("effort"));
    match effort {
        None | Some(Value::Null) => Ok(()),
        Some(effort) if *effort == "none" => Ok(()),
        Some(effort) => {
            let message = format!("`reasoning.effort` is {effort:.80}, but `none` only: leave it out");
            Err(ApiError::invalid("reasoning.effort", message))
        }
    }
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

fn input(fields: &Fields) -> Result<Vec<Value>, ApiError> {
    match fields.get("input") {
        None => Err(ApiError::invalid("input", "`input` is required")),
        Some(Value::String(text)) => Ok(vec![json!({"role": "user", "content": text})]),
        Some(Value::Array(items)) if items.is_empty() => Err(ApiError::invalid("input", "`input` is an empty array")),
        Some(Value::Array(items)) => messages(items),
        Some(other) => Err(wrong_type("input", "a string or an array of items", other)),
    }
}

fn messages(items: &[Value]) -> Result<Vec<Value>, ApiError> {
    let mut messages: Vec<Value> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let at = format!("input[{index}]");
        if !item.is_object() {
            return Err(wrong_type(&at, "an object", item));
        }
        match item["type"].as_str().unwrap_or("message") {
            "message" => messages.push(json!({"role": item["role"], "content": content(&at, &item["content"])?})),
            "function_call" => {
                let function = json!({"name": item["name"], "arguments": item["arguments"]});
                let call = json!({"id": item["call_id"], "type": "function", "function": function});
                // Calls of one answer are in one message.
                match messages.last_mut().filter(|last| last["role"] == "assistant") {
                    Some(Value::Object(last)) => match last.entry("tool_calls").or_insert_with(|| json!([])) {
                        Value::Array(calls) => calls.push(call),
                        other => *other = json!([call]),
                    },
                    _ => messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
                }
            }
            "function_call_output" => {
                let content = content(&at, &item["output"])?;
                messages.push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": content}));
            }
            // Another model's thoughts are not part of what was said.
            "reasoning" => {}
            other => {
                let at = format!("{at}.type");
                let message = format!(
                    "`{at}` is `{other:.80}`, not one of message, function_call, function_call_output, reasoning"
                );
                return Err(ApiError::invalid(&at, message));
            }
        }
    }
    Ok(messages)
}

/// Parts in the words of a chat; what they are is checked there.
fn content(at: &str, content: &Value) -> Result<Value, ApiError> {
    let Value::Array(parts) = content else { return Ok(content.clone()) };
    let part = |(index, part): (usize, &Value)| match part["type"].as_str() {
        Some("input_text" | "output_text" | "text") => Ok(json!({"type": "text", "text": part["text"]})),
        Some("refusal") => Ok(json!({"type": "text", "text": part["refusal"]})),
        _ => {
            let at = format!("{at}.content[{index}].type");
            Err(ApiError::invalid(&at, format!("`{at}` must be \"input_text\" or \"output_text\"")))
        }
    };
    parts.iter().enumerate().map(part).collect()
}

fn tools(fields: &Fields) -> Result<Vec<Value>, ApiError> {
    let tools = fields.array("tools")?.map_or(&[] as &[Value], Vec::as_slice);
    let tool = |(index, tool): (usize, &Value)| {
        if tool["type"] != "function" {
            let at = format!("tools[{index}].type");
            let message = format!("`{at}` must be \"function\": this server runs no tools of its own");
            return Err(ApiError::invalid(&at, message));
        }
        let mut function = Map::new();
        for name in ["name", "description", "parameters"] {
            if let Some(value) = tool.get(name).filter(|value| !value.is_null()) {
                function.insert(name.to_owned(), value.clone());
            }
        }
        Ok(json!({"type": "function", "function": function}))
    };
    tools.iter().enumerate().map(tool).collect()
}

fn tool_choice(fields: &Fields) -> Result<Option<Value>, ApiError> {
    match fields.get("tool_choice") {
        None => Ok(None),
        Some(Value::Object(choice)) if choice.get("type").is_some_and(|kind| kind == "function") => {
            Ok(Some(json!({"type": "function", "function": {"name": choice.get("name")}})))
        }
        Some(Value::Object(_)) => {
            Err(ApiError::invalid("tool_choice", "`tool_choice` must be a string, or name a function"))
        }
        Some(choice) => Ok(Some(choice.clone())),
    }
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
        let messages = request.chat.get("messages").unwrap();
        assert_eq!(messages[0], json!({"role": "system", "content": "Be brief."}));
        assert_eq!(messages[1]["content"][0], json!({"type": "text", "text": "a"}));
        assert_eq!(messages[2]["tool_calls"][1]["function"]["name"], "g");
        assert_eq!(messages[3], json!({"role": "tool", "tool_call_id": "1", "content": "b"}));
        assert_eq!(request.chat.get("max_tokens"), Some(&json!(7)));
        assert_eq!(request.chat.get("top_k"), Some(&json!(3)));
        assert_eq!(request.chat.get("tools").unwrap()[0]["function"]["name"], "f");
        assert_eq!(request.chat.get("tool_choice").unwrap()["function"]["name"], "f");
        assert_eq!(request.messages.len(), 3, "instructions hold for this response alone");
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        for (body, place) in [
            (json!({}), "input"),
            (json!({"input": []}), "input"),
            (json!({"input": 1}), "input"),
            (json!({"input": [1]}), "input[0]"),
            (json!({"input": [{"type": "item_reference"}]}), "input[0].type"),
            (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0].content[0].type"),
            (json!({"input": "a", "background": true}), "background"),
            (json!({"input": "a", "truncation": "auto"}), "truncation"),
            (json!({"input": "a", "reasoning": {"effort": "high"}}), "reasoning.effort"),
            (json!({"input": "a", "text": {"verbosity": "low"}}), "text.verbosity"),
            (json!({"input": "a", "include": ["file_search_call.results"]}), "include"),
            (json!({"input": "a", "tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"input": "a", "max_tokens": 1}), "max_tokens"),
            (json!({"input": "a", "conversation": "c"}), "conversation"),
        ] {
            let error = parse(body.clone()).expect_err(place);
            assert_eq!(error.param(), Some(place), "{body}");
        }
        let harmless = json!({"input": "a", "background": false, "truncation": "disabled", "top_logprobs": 0,
            "reasoning": {"effort": null}, "include": ["reasoning.encrypted_content"], "text": {"format": null}});
        assert!(parse(harmless).is_ok());
    }
}
