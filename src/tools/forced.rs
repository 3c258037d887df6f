//! An output that must be a call, or whose calls must be what the tools say.

use serde_json::{Map, Value, json};

use super::{CallFormat, Tools};
use crate::grammar::Constraint;

/// Where a schema keeps what it refers to.
pub(super) const DEFINITIONS: [&str; 2] = ["$defs", "definitions"];

/// Whether, and what, the model must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    Auto,
    /// Any of the tools.
    Required,
    Named(String),
}

impl Tools {
    /// What the output must be where a call is forced, or any tool is strict. A forced call is one without a marker before
    /// it, which is read all the same: as JSON, or in the XML of its model. `special_id` knows the control tokens.
    ///
    /// # Errors
    /// Says why no such call can be put into one schema.
    pub fn constraint(
        &self,
        format: CallFormat,
        special_id: impl Fn(&str) -> Option<u32>,
    ) -> Result<Option<Constraint>, String> {
        let is_wanted = |name: &str| match &self.choice {
            ToolChoice::Auto => false,
            ToolChoice::Required => true,
            ToolChoice::Named(wanted) => wanted == name,
        };
        if self.choice == ToolChoice::Auto {
            let is_any_strict = !self.strict.is_empty();
            return Ok(is_any_strict.then(|| Constraint::Lark(self.grammar_of_calls(format, special_id))));
        }
        if format == CallFormat::Xml {
            return Ok(self.grammar_of_xml_call(is_wanted).map(Constraint::Lark));
        }
        let arguments = format.arguments();
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
    use std::collections::HashSet;

    use super::*;

    fn tools(choice: ToolChoice) -> Tools {
        let tool = |name: &str, parameters: Value| json!({"function": {"name": name, "parameters": parameters}});
        let referring = json!({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}});
        let definitions = vec![tool("f", referring), tool("g", Value::Null)];
        Tools { definitions, strict: HashSet::new(), parallel: true, choice }
    }

    fn schema(choice: ToolChoice, format: CallFormat) -> Value {
        match tools(choice).constraint(format, |_| None) {
            Ok(Some(Constraint::JsonSchema(schema))) => schema,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_forced_is_in_the_schema_and_nothing_else() {
        assert_eq!(tools(ToolChoice::Auto).constraint(CallFormat::Hermes, |_| None), Ok(None));
        assert_eq!(tools(ToolChoice::Auto).constraint(CallFormat::Xml, |_| None), Ok(None));
        let any = schema(ToolChoice::Required, CallFormat::Hermes);
        assert_eq!(any["anyOf"].as_array().unwrap().len(), 2);
        assert_eq!(any["anyOf"][1]["properties"]["arguments"], json!({"type": "object"}));
        let one = schema(ToolChoice::Named("f".to_owned()), CallFormat::Llama);
        assert_eq!(one["anyOf"].as_array().unwrap().len(), 1);
        assert_eq!(one["anyOf"][0]["properties"]["name"], json!({"const": "f"}));
        assert_eq!(one["anyOf"][0]["properties"]["parameters"]["type"], "object");
        assert_eq!(one["$defs"]["A"], json!({"type": "integer"}), "references count from the root");
        match tools(ToolChoice::Named("g".to_owned())).constraint(CallFormat::Xml, |_| None) {
            Ok(Some(Constraint::Lark(grammar))) => {
                assert!(grammar.contains("<function=g>") && !grammar.contains("=f>"))
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn definitions_that_contradict_each_other_are_refused() {
        let mut tools = tools(ToolChoice::Required);
        tools.definitions[1]["function"]["parameters"] = json!({"$defs": {"A": {"type": "string"}}});
        assert!(tools.constraint(CallFormat::Hermes, |_| None).unwrap_err().contains("`A`"));
    }
}
