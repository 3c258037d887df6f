//! `tools`, `tool_choice` and `parallel_tool_calls` of a chat, and the calls in its messages.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use crate::tools::{ToolChoice, Tools};

pub const MAX_TOOLS: usize = 128;
pub const MAX_NAME_CHARS: usize = 64;

/// What the model is offered; `None` where that is nothing, or nothing is to be called.
pub fn parse_tools(fields: &Fields) -> Result<Option<Arc<Tools>>, ApiError> {
    let definitions = fields.array("tools")?.map_or(&[] as &[Value], Vec::as_slice);
    if definitions.len() > MAX_TOOLS {
        let message = format!("`tools` has {} tools, {MAX_TOOLS} are the most", definitions.len());
        return Err(ApiError::invalid("tools", message));
    }
    let mut names = HashSet::new();
    for (index, tool) in definitions.iter().enumerate() {
        let name = check_tool(&format!("tools[{index}]"), tool)?;
        if !names.insert(name) {
            let at = format!("tools[{index}].function.name");
            return Err(ApiError::invalid(&at, format!("`{at}` is `{name}`, as that of a tool before it")));
        }
    }
    let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let choice = match fields.get("tool_choice") {
        None => Some(ToolChoice::Auto),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => Some(ToolChoice::Auto),
            "none" => None,
            "required" => Some(ToolChoice::Required),
            other => {
                let message = format!(
                    "`tool_choice` is `{other}`, not one of auto, none, required, or an object that names a function"
                );
                return Err(ApiError::invalid("tool_choice", message));
            }
        },
        Some(Value::Object(choice)) => Some(named(choice, &names)?),
        Some(other) => return Err(wrong_type("tool_choice", "a string or an object", other)),
    };
    if definitions.is_empty() && choice.as_ref().is_some_and(|choice| *choice != ToolChoice::Auto) {
        return Err(ApiError::invalid("tool_choice", "`tool_choice` forces a call, but there are no `tools`"));
    }
    let choice = choice.filter(|_| !definitions.is_empty());
    Ok(choice.map(|choice| {
        let (definitions, strict) = split_strict(definitions);
        Arc::new(Tools { definitions, strict, parallel, choice })
    }))
}

/// Checked tools without `strict`, which is for the server and no word to the model, and the names of those that are.
fn split_strict(tools: &[Value]) -> (Vec<Value>, HashSet<String>) {
    let (mut definitions, mut strict) = (tools.to_vec(), HashSet::new());
    for function in definitions.iter_mut().filter_map(|tool| tool["function"].as_object_mut()) {
        let is_strict = function.remove("strict").is_some_and(|strict| strict == true);
        strict.extend(function.get("name").and_then(Value::as_str).filter(|_| is_strict).map(str::to_owned));
    }
    (definitions, strict)
}

/// `{"type": "function", "function": {"name": …}}`
fn named(choice: &Map<String, Value>, names: &HashSet<&str>) -> Result<ToolChoice, ApiError> {
    let at = "tool_choice.function.name";
    let name = choice.get("function").map_or(&Value::Null, |function| &function["name"]);
    let name = name.as_str().ok_or_else(|| wrong_type(at, "a string", name))?;
    if !names.contains(name) {
        return Err(ApiError::invalid(at, format!("`{at}` is `{name:.80}`, which none of the `tools` is")));
    }
    Ok(ToolChoice::Named(name.to_owned()))
}

/// The name of a function that is defined as OpenAI does.
fn check_tool<'v>(at: &str, tool: &'v Value) -> Result<&'v str, ApiError> {
    if !tool.is_object() {
        return Err(wrong_type(at, "an object", tool));
    }
    if tool["type"] != "function" {
        let message = format!("`{at}.type` must be \"function\": this server runs no tools of its own");
        return Err(ApiError::invalid(&format!("{at}.type"), message));
    }
    let at = format!("{at}.function");
    let function = &tool["function"];
    if !function.is_object() {
        return Err(wrong_type(&at, "an object", function));
    }
    for (field, expected, is_right) in [
        ("description", "a string", function["description"].is_string()),
        ("parameters", "an object", function["parameters"].is_object()),
        ("strict", "true or false", function["strict"].is_boolean()),
    ] {
        if !is_right && !function[field].is_null() {
            return Err(wrong_type(&format!("{at}.{field}"), expected, &function[field]));
        }
    }
    let at = format!("{at}.name");
    let name = function["name"].as_str().ok_or_else(|| wrong_type(&at, "a string", &function["name"]))?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
    if name.is_empty() || name.len() > MAX_NAME_CHARS || !name.chars().all(is_plain) {
        let message = format!(
            "`{at}` must be 1 to {MAX_NAME_CHARS} ASCII letters, digits, `_`, `-`, `.`, `:` or `/`, not `{name:.80}`"
        );
        return Err(ApiError::invalid(&at, message));
    }
    Ok(name)
}

/// The `tool_calls` of an assistant's message.
pub fn check_calls(at: &str, calls: &Value) -> Result<(), ApiError> {
    let calls = match calls {
        Value::Null => return Ok(()),
        Value::Array(calls) => calls,
        other => return Err(wrong_type(&format!("{at}.tool_calls"), "an array", other)),
    };
    for (index, call) in calls.iter().enumerate() {
        let at = format!("{at}.tool_calls[{index}].function");
        let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
        if !name.is_string() {
            return Err(wrong_type(&format!("{at}.name"), "a string", name));
        }
        if !(arguments.is_string() || arguments.is_object()) {
            return Err(wrong_type(&format!("{at}.arguments"), "JSON in a string", arguments));
        }
    }
    Ok(())
}

/// Each message of a tool must be the result of a call before it.
pub fn check_results(messages: &[Value]) -> Result<(), ApiError> {
    let mut called = HashSet::new();
    for (index, message) in messages.iter().enumerate() {
        let calls = message["tool_calls"].as_array().into_iter().flatten();
        called.extend(calls.filter_map(|call| call["id"].as_str()));
        if message["role"] == "tool" {
            let at = format!("messages[{index}].tool_call_id");
            let id = &message["tool_call_id"];
            let id = id.as_str().ok_or_else(|| wrong_type(&at, "a string", id))?;
            if !called.contains(id) {
                let message = format!("`{at}` is `{id:.80}`, which no call before it has: send the call, too");
                return Err(ApiError::invalid(&at, message));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: &Value) -> Result<Option<Arc<Tools>>, ApiError> {
        parse_tools(&Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "description": "x", "parameters": {"type": "object"}}})
    }

    #[test]
    fn tools_are_offered_unless_none_is_to_be_called() {
        let offered = parse(&json!({"tools": [tool("a"), tool("b")], "parallel_tool_calls": false})).unwrap().unwrap();
        assert!(offered.has("b") && !offered.has("c") && !offered.parallel);
        assert_eq!(parse(&json!({})), Ok(None));
        assert_eq!(parse(&json!({"tools": [], "tool_choice": "auto"})), Ok(None));
        assert_eq!(parse(&json!({"tools": [tool("a")], "tool_choice": "none"})), Ok(None));
        let choice = |choice: Value| {
            parse(&json!({"tools": [tool("a")], "tool_choice": choice})).unwrap().unwrap().choice.clone()
        };
        assert_eq!(choice(json!("required")), ToolChoice::Required);
        let named = json!({"type": "function", "function": {"name": "a"}});
        assert_eq!(choice(named), ToolChoice::Named("a".to_owned()));
    }

    #[test]
    fn whether_a_tool_is_strict_is_known_and_not_told_to_the_model() {
        let mut strict = tool("a");
        strict["function"]["strict"] = json!(true);
        let mut loose = tool("b");
        loose["function"]["strict"] = json!(false);
        let tools = parse(&json!({"tools": [strict, loose]})).unwrap().unwrap();
        assert_eq!(tools.definitions, [tool("a"), tool("b")]);
        assert_eq!(tools.strict, HashSet::from(["a".to_owned()]));
    }

    #[test]
    fn a_bad_tool_is_named_by_its_place() {
        for (body, place) in [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [1]}), "tools[0]"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [{"type": "function", "function": {}}]}), "tools[0].function.name"),
            (json!({"tools": [tool("a"), tool("a b")]}), "tools[1].function.name"),
            (json!({"tools": [tool("a"), tool("a")]}), "tools[1].function.name"),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]}),
                "tools[0].function.parameters",
            ),
            (
                json!({"tools": [{"type": "function", "function": {"name": "a", "strict": "yes"}}]}),
                "tools[0].function.strict",
            ),
            (json!({"tools": [tool("a")], "tool_choice": "always"}), "tool_choice"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [tool("a")], "tool_choice": {"type": "function"}}), "tool_choice.function.name"),
            (json!({"tools": [tool("a")], "tool_choice": {"function": {"name": "b"}}}), "tool_choice.function.name"),
            (json!({"tools": vec![tool("a"); MAX_TOOLS + 1]}), "tools"),
        ] {
            let error = parse(&body).expect_err(place);
            assert_eq!(error.param(), Some(place), "{body}");
        }
    }
}
