//! Anthropic's messages in OpenAI's fields, which are then read like any other chat's.

use serde_json::{Map, Value, json};

use crate::http::error::ApiError;
use crate::http::fields::{Fields, two_values, wrong_type};
use crate::http::sent_as::{SentAs, Translated};
use crate::http::unsupported::{Route, refuse_unsupported};

/// Read here; all others go on as they are.
const OWN_FIELDS: [&str; 13] = [
    "system",
    "messages",
    "metadata",
    "tools",
    "tool_choice",
    "thinking",
    "temperature",
    "stream",
    "context_management",
    "output_config",
    "output_format",
    "mcp_servers",
    "container",
];
/// Blocks that carry no text here. Earlier thinking is left out by Anthropic's own models, too.
const THINKING: [&str; 2] = ["thinking", "redacted_thinking"];
const BETWEEN_BLOCKS: &str = "\n\n";

/// A chat's fields. `cache_control` is read nowhere: every prompt's prefix is found again without being marked.
///
/// # Errors
/// 400 that names what is wrong or not served, by its place in Anthropic's own fields.
pub fn read_messages(fields: &Fields) -> Result<Translated, ApiError> {
    refuse_unsupported(fields, Route::Messages)?;
    check_context_management(fields)?;
    let mut converted = fields.without(&OWN_FIELDS);
    let mut sent_as = SentAs::default();
    let mut messages = Messages { said: read_system(fields)?.into_iter().collect(), sent_as: &mut sent_as };
    if !messages.said.is_empty() {
        messages.sent_as.add("messages[0].content", "system");
    }
    let given = fields.array("messages")?.ok_or_else(|| ApiError::invalid("messages", "`messages` is required"))?;
    for (index, message) in given.iter().enumerate() {
        messages.read(&format!("messages[{index}]"), message)?;
    }
    let messages = messages.said;
    if messages.last().is_some_and(|message| message["role"] == "assistant") {
        let at = format!("messages[{}]", given.len() - 1);
        sent_as.set(&mut converted, "continue_final_message", &at, true.into())?;
    }
    converted.insert("messages".to_owned(), Value::Array(messages));
    if let Some(temperature) = fields.number("temperature", 0.0..=1.0)? {
        converted.insert("temperature".to_owned(), temperature.into());
    }
    if let Some(user) = fields.object("metadata")?.and_then(|metadata| metadata.get("user_id")) {
        sent_as.set(&mut converted, "user", "metadata.user_id", user.clone())?;
    }
    if let Some(tools) = fields.array("tools")? {
        for index in 0..tools.len() {
            let at = format!("tools[{index}]");
            sent_as.add(format!("{at}.function"), &at);
            sent_as.add(format!("{at}.function.parameters"), format!("{at}.input_schema"));
        }
        let tools = tools.iter().enumerate().map(|(index, tool)| read_tool(&format!("tools[{index}]"), tool));
        converted.insert("tools".to_owned(), tools.collect::<Result<_, _>>()?);
    }
    if let Some(choice) = fields.object("tool_choice")? {
        sent_as.add("tool_choice.function", "tool_choice");
        converted.insert("tool_choice".to_owned(), read_tool_choice(choice)?);
        let at = "tool_choice.disable_parallel_tool_use";
        match choice.get("disable_parallel_tool_use") {
            None | Some(Value::Null | Value::Bool(false)) => {}
            Some(Value::Bool(true)) => sent_as.set(&mut converted, "parallel_tool_calls", at, false.into())?,
            Some(other) => return Err(wrong_type(at, "true or false", other)),
        }
    }
    if let Some((at, format)) = read_output_format(fields)? {
        sent_as.add("response_format.json_schema", at);
        sent_as.set(&mut converted, "response_format", at, format)?;
    }
    Ok(Translated { fields: converted.into(), sent_as })
}

/// `context_management`: no thinking is kept, so there is none to clear, and nothing else is.
fn check_context_management(fields: &Fields) -> Result<(), ApiError> {
    let name = "context_management";
    let edits = match fields.object(name)?.and_then(|management| management.get("edits")) {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(edits)) => edits,
        Some(other) => return Err(wrong_type("context_management.edits", "an array", other)),
    };
    let is_harmless = |edit: &Value| edit["type"].as_str().is_some_and(|edit| edit.starts_with("clear_thinking"));
    if edits.iter().all(is_harmless) {
        return Ok(());
    }
    Err(ApiError::invalid(name, format!("`{name}` is not served as asked: a conversation is read whole, shorten it")))
}

/// `output_config.format`, or the older `output_format`, as a chat's `response_format`, and where it is.
fn read_output_format(fields: &Fields) -> Result<Option<(&'static str, Value)>, ApiError> {
    let config = fields.object("output_config")?;
    let is_given = |(name, value): &(&String, &Value)| *name != "format" && !value.is_null();
    if let Some((name, _)) = config.into_iter().flatten().find(is_given) {
        let at = format!("output_config.{name}");
        return Err(ApiError::invalid(&at, format!("`{at}` is not served: leave it out")));
    }
    let of_config = config.and_then(|config| config.get("format")).filter(|format| !format.is_null());
    fields.object("output_format")?;
    let of_field = fields.get("output_format").filter(|format| **format != json!({}));
    let (at, format) = match (of_config, of_field) {
        (Some(format), Some(other)) if format != other => {
            return Err(two_values("output_format", "output_config.format"));
        }
        (Some(format), _) => ("output_config.format", format),
        (None, Some(format)) => ("output_format", format),
        (None, None) => return Ok(None),
    };
    if format["type"] != "json_schema" {
        let at = format!("{at}.type");
        return Err(ApiError::invalid(&at, format!("`{at}` must be \"json_schema\"")));
    }
    let schema = json!({"name": "output", "schema": format["schema"]});
    Ok(Some((at, json!({"type": "json_schema", "json_schema": schema}))))
}

fn read_system(fields: &Fields) -> Result<Option<Value>, ApiError> {
    let text = match fields.get("system") {
        None => return Ok(None),
        Some(system) => read_text("system", system)?,
    };
    Ok((!text.is_empty()).then(|| json!({"role": "system", "content": text})))
}

/// A string, or blocks of text.
fn read_text(at: &str, value: &Value) -> Result<String, ApiError> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(blocks) => {
            let texts = blocks.iter().enumerate().map(|(index, block)| read_block(&format!("{at}[{index}]"), block));
            Ok(texts.collect::<Result<Vec<_>, _>>()?.join(BETWEEN_BLOCKS))
        }
        other => Err(wrong_type(at, "a string or an array of blocks", other)),
    }
}

/// The text of a block of text.
fn read_block<'v>(at: &str, block: &'v Value) -> Result<&'v str, ApiError> {
    match block["type"].as_str() {
        Some("text") => {
            block["text"].as_str().ok_or_else(|| wrong_type(&format!("{at}.text"), "a string", &block["text"]))
        }
        Some(other) => {
            let message = format!("`{at}` is a block of type `{other}`, which is not served here: send `text`");
            Err(ApiError::invalid(&format!("{at}.type"), message))
        }
        None => Err(wrong_type(&format!("{at}.type"), "a string", &block["type"])),
    }
}

/// Messages in OpenAI's words, and where each came from.
struct Messages<'a> {
    said: Vec<Value>,
    sent_as: &'a mut SentAs,
}

impl Messages<'_> {
    /// One message may be several: OpenAI has the result of each tool in a message of its own.
    fn read(&mut self, at: &str, message: &Value) -> Result<(), ApiError> {
        let role = match message["role"].as_str() {
            Some(role @ ("user" | "assistant")) => role,
            Some(other) => {
                let message = format!("`{at}.role` is `{other}`, not one of user, assistant");
                return Err(ApiError::invalid(&format!("{at}.role"), message));
            }
            None => return Err(wrong_type(&format!("{at}.role"), "a string", &message["role"])),
        };
        let content = format!("{at}.content");
        let blocks = match &message["content"] {
            Value::Array(blocks) => blocks,
            Value::String(text) => {
                self.push(Some(json!({"role": role, "content": text})), at);
                return Ok(());
            }
            other => return Err(wrong_type(&content, "a string or an array of blocks", other)),
        };
        let (mut texts, mut calls) = (Vec::new(), Vec::new());
        for (index, block) in blocks.iter().enumerate() {
            let block_at = format!("{content}[{index}]");
            match block["type"].as_str() {
                Some("tool_result") if role == "user" => {
                    self.push(said(role, &mut texts, Vec::new()), at);
                    self.push(Some(read_result(&block_at, block)?), &block_at);
                    let read = format!("messages[{}].tool_call_id", self.said.len() - 1);
                    self.sent_as.add(read, format!("{block_at}.tool_use_id"));
                }
                Some("tool_use") if role == "assistant" => calls.push(read_call(&block_at, block)?),
                Some(kind) if THINKING.contains(&kind) && role == "assistant" => {}
                _ => texts.push(read_block(&block_at, block)?),
            }
        }
        self.push(said(role, &mut texts, calls), at);
        Ok(())
    }

    fn push(&mut self, message: Option<Value>, at: &str) {
        if let Some(message) = message {
            self.sent_as.add(format!("messages[{}]", self.said.len()), at);
            self.said.push(message);
        }
    }
}

fn said(role: &str, texts: &mut Vec<&str>, calls: Vec<Value>) -> Option<Value> {
    let texts = std::mem::take(texts);
    match calls.is_empty() {
        true if texts.is_empty() => None,
        true => Some(json!({"role": role, "content": texts.join(BETWEEN_BLOCKS)})),
        false => Some(json!({"role": role, "content": texts.join(BETWEEN_BLOCKS), "tool_calls": calls})),
    }
}

fn read_call(at: &str, block: &Value) -> Result<Value, ApiError> {
    let string =
        |name: &str| block[name].as_str().ok_or_else(|| wrong_type(&format!("{at}.{name}"), "a string", &block[name]));
    let (id, name) = (string("id")?, string("name")?);
    if !block["input"].is_object() {
        return Err(wrong_type(&format!("{at}.input"), "an object", &block["input"]));
    }
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": block["input"].to_string()}}))
}

fn read_result(at: &str, block: &Value) -> Result<Value, ApiError> {
    let id = &block["tool_use_id"];
    let id = id.as_str().ok_or_else(|| wrong_type(&format!("{at}.tool_use_id"), "a string", id))?;
    let text = match &block["content"] {
        Value::Null => String::new(),
        content => read_text(&format!("{at}.content"), content)?,
    };
    // OpenAI has no field for it.
    let text = if block["is_error"] == true { format!("Error: {text}") } else { text };
    Ok(json!({"role": "tool", "tool_call_id": id, "content": text}))
}

fn read_tool(at: &str, tool: &Value) -> Result<Value, ApiError> {
    match &tool["type"] {
        Value::Null => {}
        Value::String(kind) if kind == "custom" => {}
        other => {
            let at = format!("{at}.type");
            let message = format!("`{at}` is `{other}`: this server runs no tools of its own, send \"custom\" ones");
            return Err(ApiError::invalid(&at, message));
        }
    }
    let of_claude = [
        ("defer_loading", tool["defer_loading"] == true, "every tool is told to the model"),
        ("input_examples", tool["input_examples"].as_array().is_some_and(|all| !all.is_empty()), "describe them"),
        (
            "allowed_callers",
            !tool["allowed_callers"].is_null() && tool["allowed_callers"] != json!(["direct"]),
            "the model alone calls tools",
        ),
    ];
    if let Some((name, _, cause)) = of_claude.into_iter().find(|(_, is_asked, _)| *is_asked) {
        let at = format!("{at}.{name}");
        return Err(ApiError::invalid(&at, format!("`{at}` is not served as asked here: {cause}, leave it out")));
    }
    if !tool["input_schema"].is_object() {
        return Err(wrong_type(&format!("{at}.input_schema"), "an object", &tool["input_schema"]));
    }
    let function =
        ["name", "description", "strict"].into_iter().filter_map(|name| Some((name, tool.get(name)?.clone())));
    let function: Map<String, Value> = function
        .chain([("parameters", tool["input_schema"].clone())])
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    Ok(json!({"type": "function", "function": function}))
}

fn read_tool_choice(choice: &Map<String, Value>) -> Result<Value, ApiError> {
    let kind = choice.get("type").and_then(Value::as_str).unwrap_or_default();
    match kind {
        "auto" | "none" => Ok(kind.into()),
        "any" => Ok("required".into()),
        "tool" => Ok(json!({"type": "function", "function": {"name": choice.get("name")}})),
        _ => {
            let message = "`tool_choice.type` must be one of auto, any, tool, none";
            Err(ApiError::invalid("tool_choice.type", message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Value, ApiError> {
        let Translated { fields, .. } = read_messages(&Fields::parse(body.to_string().as_bytes()).unwrap())?;
        Ok(fields.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    #[test]
    fn text_in_strings_and_in_blocks_is_the_same() {
        let block = |text: &str| json!({"type": "text", "text": text, "cache_control": {"type": "ephemeral"}});
        let read = read(json!({"system": [block("a"), block("b")], "messages": [
            {"role": "user", "content": "c"}, {"role": "assistant", "content": [block("d")]},
            {"role": "user", "content": [block("e")]}], "metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"},
            "max_tokens": 3, "stop_sequences": ["x"], "temperature": 0.5}));
        let messages = json!([{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]);
        let expected = json!({"messages": messages, "user": "u", "max_tokens": 3, "stop_sequences": ["x"],
            "temperature": 0.5});
        assert_eq!(read.unwrap(), expected);
    }

    #[test]
    fn calls_and_their_results_are_messages_of_their_own() {
        let read = read(json!({"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "is_error": true, "content": [{"type": "text", "text": "c"}]},
                {"type": "tool_result", "tool_use_id": "t2"}, {"type": "text", "text": "d"}]}],
            "tools": [{"name": "f", "description": "g", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": true}}));
        let read = read.unwrap();
        let call = json!({"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}});
        let expected = json!([
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": "Error: c"},
            {"role": "tool", "tool_call_id": "t2", "content": ""}, {"role": "user", "content": "d"}]);
        assert_eq!(read["messages"], expected);
        let function = json!({"name": "f", "description": "g", "parameters": {"type": "object"}});
        assert_eq!(read["tools"], json!([{"type": "function", "function": function}]));
        assert_eq!((&read["tool_choice"], &read["parallel_tool_calls"]), (&json!("auto"), &json!(false)));
    }

    #[test]
    fn a_schema_of_the_output_is_a_format() {
        let messages = json!([{"role": "user", "content": "a"}]);
        let format = json!({"type": "json_schema", "schema": {"type": "object"}});
        for (name, value) in [("output_config", json!({"format": format})), ("output_format", format.clone())] {
            let read = read(json!({"messages": messages, name: value})).unwrap();
            assert_eq!(read["response_format"]["json_schema"]["schema"], json!({"type": "object"}), "{name}");
            assert!(read.get(name).is_none());
        }
    }

    #[test]
    fn an_answer_that_is_begun_is_to_be_gone_on_with() {
        let asks = |content: Value| {
            let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]);
            read(json!({"messages": messages})).unwrap().get("continue_final_message").cloned()
        };
        assert_eq!(asks(json!("def f(")), Some(json!(true)));
        assert_eq!(asks(json!([{"type": "text", "text": "def f("}])), Some(json!(true)));
        assert_eq!(asks(json!([{"type": "thinking", "thinking": "hm"}])), None);
    }

    #[test]
    fn errors_of_a_chat_are_told_in_the_clients_own_fields() {
        let body = json!({"system": "s", "messages": [{"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "t", "content": "b"}]}],
            "tools": [{"name": "f", "input_schema": {}}], "metadata": {"user_id": "u"}});
        let Translated { sent_as, .. } = read_messages(&Fields::parse(body.to_string().as_bytes()).unwrap()).unwrap();
        for (read, sent) in [
            ("messages[0].content", "system"),
            ("messages[1].content", "messages[0].content"),
            ("messages[2].tool_call_id", "messages[0].content[1].tool_use_id"),
            ("tools[0].function.name", "tools[0].name"),
            ("tools[0].function.parameters", "tools[0].input_schema"),
            ("user", "metadata.user_id"),
            ("top_k", "top_k"),
        ] {
            assert_eq!(sent_as.word(ApiError::invalid(read, "no")).param(), Some(sent));
        }
    }

    #[test]
    fn what_is_not_served_is_refused_by_its_place() {
        let user = json!([{"role": "user", "content": "a"}]);
        let content = |block: Value| json!({"messages": [{"role": "user", "content": [block]}]});
        let format = json!({"type": "json_schema", "schema": {"type": "object"}});
        let other = json!({"type": "json_schema", "schema": {"type": "array"}});
        for (body, place) in [
            (json!({}), "messages"),
            (json!({"messages": [{"role": "system", "content": "a"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (content(json!({"type": "image", "source": {}})), "messages[0].content[0].type"),
            (content(json!({"type": "tool_use", "id": "a"})), "messages[0].content[0].type"),
            (content(json!({"type": "tool_result"})), "messages[0].content[0].tool_use_id"),
            (json!({"messages": user, "system": [{"type": "image"}]}), "system[0].type"),
            (json!({"messages": user, "thinking": {"type": "enabled", "budget_tokens": 9}}), "thinking"),
            (json!({"messages": user, "temperature": 1.5}), "temperature"),
            (json!({"messages": user, "mcp_servers": [{"url": "x"}]}), "mcp_servers"),
            (json!({"messages": user, "user": "a", "metadata": {"user_id": "b"}}), "user"),
            (json!({"messages": user, "output_format": format, "output_config": {"format": other}}), "output_format"),
            (json!({"messages": user, "output_format": format, "response_format": {}}), "response_format"),
            (json!({"messages": user, "output_config": {"effort": "high"}}), "output_config.effort"),
            (json!({"messages": user, "output_config": {"format": {"type": "xml"}}}), "output_config.format.type"),
            (
                json!({"messages": user, "tools": [{"name": "f", "input_schema": {}, "defer_loading": true}]}),
                "tools[0].defer_loading",
            ),
            (
                json!({"messages": user, "tools": [{"name": "f", "input_schema": {}, "input_examples": [{}]}]}),
                "tools[0].input_examples",
            ),
            (
                json!({"messages": user, "context_management": {"edits": [{"type": "clear_tool_uses_1"}]}}),
                "context_management",
            ),
            (json!({"messages": user, "context_management": []}), "context_management"),
            (json!({"messages": user, "context_management": {"edits": {}}}), "context_management.edits"),
            (json!({"messages": user, "tools": [{"type": "bash_20250124", "name": "bash"}]}), "tools[0].type"),
            (json!({"messages": user, "tools": [{"name": "f"}]}), "tools[0].input_schema"),
            (json!({"messages": user, "tool_choice": {"type": "all"}}), "tool_choice.type"),
            (
                json!({"messages": user, "tool_choice": {"type": "auto", "disable_parallel_tool_use": "true"}}),
                "tool_choice.disable_parallel_tool_use",
            ),
        ] {
            assert_eq!(read(body.clone()).unwrap_err().param(), Some(place), "{body}");
        }
    }
}
