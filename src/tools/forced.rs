//! An output that must be a call.

use serde_json::{Map, Value, json};

use super::{CallFormat, Tools};
use crate::grammar::Constraint;

/// Where a schema keeps what it refers to.
const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// Whether, and what, the model must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    Auto,
    /// Any of the tools.
    Required,
    Named(String),
}

impl Tools {
    /// What the output must be where a call is forced: one call as JSON, which is read as one without a marker before it.
    ///
    /// # Errors
    /// Says why no such call can be put into one schema.
    pub fn forced_call(&self, format: CallFormat) -> Result<Option<Constraint>, String> {
        let is_wanted = |name: &str| match &self.choice {
            ToolChoice::Auto => false,
            ToolChoice::Required => true,
            ToolChoice::Named(wanted) => wanted == name,
        };
        let arguments = match format {
            CallFormat::Hermes | CallFormat::Mistral => "arguments",
            CallFormat::Llama => "parameters",
            CallFormat::Xml if self.choice == ToolChoice::Auto => return Ok(None),
            CallFormat::Xml => return Err("calls of this model are not JSON, and cannot be forced".to_owned()),
        };
        let mut definitions = Map::new();
        let mut calls = Vec::new();
        for tool in &self.definitions {
            let function = &tool["function"];
            let Some(name) = function["name"].as_str().filter(|name| is_wanted(name)) else { continue };
            let parameters = parameters(function, &mut definitions)
                .map_err(|key| format!("two tools define `{key}` differently; give it two names"))?;
            calls.push(json!({
                "type": "object",
                "properties": {"name": {"const": name}, arguments: parameters},
                "required": ["name", arguments],
                "additionalProperties": false,
            }));
        }
        if calls.is_empty() {
            return Ok(None);
        }
        let mut schema = json!({"anyOf": calls});
        for (place, values) in definitions {
            schema[place] = values;
        }
        Ok(Some(Constraint::JsonSchema(schema)))
    }
}

/// The schema of a function's arguments, an object; what it refers to is moved to `definitions`, as references count from the
/// root of a schema. The name that is taken already is an error.
fn parameters(function: &Value, definitions: &mut Map<String, Value>) -> Result<Value, String> {
    let Value::Object(parameters) = &function["parameters"] else { return Ok(json!({"type": "object"})) };
    let mut parameters = parameters.clone();
    for place in DEFINITIONS {
        let Some(Value::Object(moved)) = parameters.remove(place) else { continue };
        let own = definitions.entry(place).or_insert_with(|| json!({}));
        for (key, value) in moved {
            if own.get(&key).is_some_and(|other| *other != value) {
                return Err(key);
            }
            own[&key] = value;
        }
    }
    parameters.entry("type").or_insert_with(|| "object".into());
    Ok(Value::Object(parameters))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools(choice: ToolChoice) -> Tools {
        let tool = |name: &str, parameters: Value| json!({"function": {"name": name, "parameters": parameters}});
        let referring = json!({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}});
        Tools { definitions: vec![tool("f", referring), tool("g", Value::Null)], parallel: true, choice }
    }

    fn schema(choice: ToolChoice, format: CallFormat) -> Value {
        match tools(choice).forced_call(format) {
            Ok(Some(Constraint::JsonSchema(schema))) => schema,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_forced_is_in_the_schema_and_nothing_else() {
        assert_eq!(tools(ToolChoice::Auto).forced_call(CallFormat::Hermes), Ok(None));
        assert_eq!(tools(ToolChoice::Auto).forced_call(CallFormat::Xml), Ok(None));
        let any = schema(ToolChoice::Required, CallFormat::Hermes);
        assert_eq!(any["anyOf"].as_array().unwrap().len(), 2);
        assert_eq!(any["anyOf"][1]["properties"]["arguments"], json!({"type": "object"}));
        let one = schema(ToolChoice::Named("f".to_owned()), CallFormat::Llama);
        assert_eq!(one["anyOf"].as_array().unwrap().len(), 1);
        assert_eq!(one["anyOf"][0]["properties"]["name"], json!({"const": "f"}));
        assert_eq!(one["anyOf"][0]["properties"]["parameters"]["type"], "object");
        assert_eq!(one["$defs"]["A"], json!({"type": "integer"}), "references count from the root");
        assert!(tools(ToolChoice::Required).forced_call(CallFormat::Xml).is_err());
    }

    #[test]
    fn definitions_that_contradict_each_other_are_refused() {
        let mut tools = tools(ToolChoice::Required);
        tools.definitions[1]["function"]["parameters"] = json!({"$defs": {"A": {"type": "string"}}});
        assert!(tools.forced_call(CallFormat::Hermes).unwrap_err().contains("`A`"));
    }
}
