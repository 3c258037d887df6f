//! What a response may call, in the words of a chat, which knows functions alone: a freeform tool is one with its text as
//! the only argument, and a function of a namespace has it before its name.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::http::error::ApiError;
use crate::http::fields::{Fields, wrong_type};
use crate::http::sent_as::SentAs;

/// The argument of a freeform tool.
const INPUT: &str = "input";

/// What a function of the chat is to the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolKind {
    Function,
    /// Its input is text.
    Custom,
    /// A function of several that belong together.
    Namespaced {
        namespace: String,
        name: String,
    },
}

#[derive(Debug, Default)]
pub struct OfferedTools {
    /// As a chat's `tools`.
    pub definitions: Vec<Value>,
    /// As they were sent, for the response to repeat.
    pub sent: Vec<Value>,
    /// By the name of the chat's function.
    kinds: HashMap<String, ToolKind>,
}

impl OfferedTools {
    pub fn parse(fields: &Fields, sent_as: &mut SentAs) -> Result<Self, ApiError> {
        let mut offered = Self::default();
        for (index, tool) in fields.array("tools")?.into_iter().flatten().enumerate() {
            let at = format!("tools[{index}]");
            match tool["type"].as_str() {
                Some("function") => offered.add(&at, function(tool, None), ToolKind::Function, sent_as),
                Some("custom") => offered.add(&at, custom(&at, tool)?, ToolKind::Custom, sent_as),
                Some("namespace") => offered.add_namespace(&at, tool, sent_as)?,
                // Without the web it would search what this server has of it, which is nothing: no call finds anything.
                Some("web_search") if tool["external_web_access"] == false => continue,
                kind => return Err(refused(&at, kind)),
            }
            offered.sent.push(tool.clone());
        }
        Ok(offered)
    }

    /// By the name that the model calls.
    pub fn kind(&self, name: &str) -> ToolKind {
        self.kinds.get(name).cloned().unwrap_or(ToolKind::Function)
    }

    fn add(&mut self, at: &str, function: Map<String, Value>, kind: ToolKind, sent_as: &mut SentAs) {
        sent_as.add(format!("tools[{}].function", self.definitions.len()), at);
        if let Some(name) = function.get("name").and_then(Value::as_str) {
            self.kinds.insert(name.to_owned(), kind);
        }
        self.definitions.push(json!({"type": "function", "function": function}));
    }

    fn add_namespace(&mut self, at: &str, tool: &Value, sent_as: &mut SentAs) -> Result<(), ApiError> {
        let string = |name: &str| {
            tool[name].as_str().ok_or_else(|| wrong_type(&format!("{at}.{name}"), "a string", &tool[name]))
        };
        let namespace = string("name")?;
        let Value::Array(tools) = &tool["tools"] else {
            return Err(wrong_type(&format!("{at}.tools"), "an array", &tool["tools"]));
        };
        for (index, tool_of) in tools.iter().enumerate() {
            let at = format!("{at}.tools[{index}]");
            if tool_of["type"] != "function" {
                return Err(refused(&at, tool_of["type"].as_str()));
            }
            let name = tool_of["name"].as_str().unwrap_or_default().to_owned();
            let kind = ToolKind::Namespaced { namespace: namespace.to_owned(), name };
            self.add(&at, function(tool_of, Some((namespace, &tool["description"]))), kind, sent_as);
        }
        Ok(())
    }
}

/// The name of the chat's function that a client calls so.
pub fn function_name(namespace: &Value, name: &Value) -> Value {
    match (namespace.as_str(), name.as_str()) {
        (Some(namespace), Some(name)) => format!("{namespace}.{name}").into(),
        _ => name.clone(),
    }
}

/// A freeform tool's input as the arguments of a function.
pub fn custom_arguments(input: &str) -> Value {
    json!({INPUT: input}).to_string().into()
}

/// The other way round; `None` where the arguments were cut off.
pub fn custom_input(arguments: &Map<String, Value>) -> Option<&str> {
    arguments.get(INPUT)?.as_str()
}

/// What is wrong with its fields is told by the chat, where all functions are checked.
fn function(tool: &Value, namespace: Option<(&str, &Value)>) -> Map<String, Value> {
    let given = ["name", "description", "parameters", "strict"].into_iter();
    let mut function: Map<String, Value> = given
        .filter_map(|name| Some((name.to_owned(), tool.get(name).filter(|value| !value.is_null())?.clone())))
        .collect();
    if let Some((namespace, description)) = namespace {
        function.insert("name".to_owned(), function_name(&namespace.into(), &tool["name"]));
        let descriptions = [description.as_str(), tool["description"].as_str()];
        let description = descriptions.into_iter().flatten().collect::<Vec<_>>().join("\n\n");
        function.insert("description".to_owned(), description.into());
    }
    function
}

fn custom(at: &str, tool: &Value) -> Result<Map<String, Value>, ApiError> {
    if tool["format"].as_object().is_some_and(|format| format.get("type").is_some_and(|kind| kind != "text")) {
        let at = format!("{at}.format");
        let message = format!("`{at}` is not served: no call is held to a grammar here, leave it out");
        return Err(ApiError::invalid(&at, message));
    }
    let mut function = function(tool, None);
    let parameters = json!({"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT],
        "additionalProperties": false});
    function.insert("parameters".to_owned(), parameters);
    Ok(function)
}

fn refused(at: &str, kind: Option<&str>) -> ApiError {
    let at = format!("{at}.type");
    let kind = kind.unwrap_or_default();
    let advice = match kind {
        "local_shell" | "shell" | "apply_patch" => "send it as a function of your own",
        "web_search" => "this server has no access to the web: leave it out, or send `external_web_access`: false",
        _ => "this server runs no tools of its own: send \"function\", \"custom\" or \"namespace\"",
    };
    ApiError::invalid(&at, format!("`{at}` is `{kind:.80}`, which is not served: {advice}"))
}

/// A chat's `tool_choice`.
pub fn tool_choice(fields: &Fields, sent_as: &mut SentAs) -> Result<Option<Value>, ApiError> {
    match fields.get("tool_choice") {
        None => Ok(None),
        Some(Value::Object(choice)) => {
            let kind = choice.get("type").and_then(Value::as_str).unwrap_or_default();
            if !["function", "custom"].contains(&kind) {
                let at = "tool_choice.type";
                let message = format!(
                    "`{at}` is `{kind:.80}`, which is not served: send a string, or name a function or custom tool"
                );
                return Err(ApiError::invalid(at, message));
            }
            sent_as.add("tool_choice.function", "tool_choice");
            let null = Value::Null;
            let name = function_name(choice.get("namespace").unwrap_or(&null), choice.get("name").unwrap_or(&null));
            Ok(Some(json!({"type": "function", "function": {"name": name}})))
        }
        Some(choice) => Ok(Some(choice.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(tools: Value) -> Result<(OfferedTools, SentAs), ApiError> {
        let mut sent_as = SentAs::default();
        let fields = Fields::parse(json!({"tools": tools}).to_string().as_bytes()).unwrap();
        OfferedTools::parse(&fields, &mut sent_as).map(|offered| (offered, sent_as))
    }

    #[test]
    fn every_kind_is_a_function_of_the_chat_and_known_again() {
        let (offered, sent_as) = parse(json!([
            {"type": "function", "name": "f", "strict": true, "parameters": {"type": "object"}},
            {"type": "web_search", "external_web_access": false},
            {"type": "custom", "name": "patch", "description": "d", "format": {"type": "text"}},
            {"type": "namespace", "name": "agents", "description": "Of agents.",
                "tools": [{"type": "function", "name": "close", "description": "Close one.", "parameters": {}}]},
        ]))
        .unwrap();
        let functions: Vec<_> = offered.definitions.iter().map(|tool| &tool["function"]).collect();
        assert_eq!(functions[0], &json!({"name": "f", "strict": true, "parameters": {"type": "object"}}));
        assert_eq!(functions[1]["parameters"]["required"], json!(["input"]));
        assert_eq!(functions[2]["name"], "agents.close");
        assert_eq!(functions[2]["description"], "Of agents.\n\nClose one.");
        assert_eq!((functions.len(), offered.sent.len()), (3, 3), "a search that finds nothing is not offered");
        assert_eq!(offered.kind("patch"), ToolKind::Custom);
        let namespaced = ToolKind::Namespaced { namespace: "agents".to_owned(), name: "close".to_owned() };
        assert_eq!(offered.kind("agents.close"), namespaced);
        let error = sent_as.word(ApiError::invalid("tools[2].function.name", "no"));
        assert_eq!(error.param(), Some("tools[3].tools[0].name"));
    }

    #[test]
    fn what_the_server_would_have_to_run_is_refused_by_its_place() {
        for (tool, place) in [
            (json!({"type": "web_search"}), "tools[0].type"),
            (json!({"type": "web_search", "external_web_access": true}), "tools[0].type"),
            (json!({"type": "local_shell"}), "tools[0].type"),
            (json!({"type": "mcp", "server_label": "x"}), "tools[0].type"),
            (json!({}), "tools[0].type"),
            (
                json!({"type": "custom", "name": "p", "format": {"type": "grammar", "syntax": "lark"}}),
                "tools[0].format",
            ),
            (json!({"type": "namespace", "name": "n"}), "tools[0].tools"),
            (json!({"type": "namespace", "tools": []}), "tools[0].name"),
            (json!({"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}), "tools[0].tools[0].type"),
        ] {
            assert_eq!(parse(json!([tool])).unwrap_err().param(), Some(place), "{tool}");
        }
    }
}
