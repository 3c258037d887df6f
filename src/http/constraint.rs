//! What the output must be, in the fields of OpenAI, vLLM and llama.cpp.

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use crate::grammar::Constraint;

/// Every field that constrains the output.
pub const CONSTRAINT_NAMES: [&str; 9] = [
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_json_object",
    "structured_outputs",
    "grammar",
    "json_schema",
];
/// What vLLM constrains the output with, one of them.
const STRUCTURED_OUTPUTS: [&str; 5] = ["json", "regex", "choice", "grammar", "json_object"];
pub const MAX_CHOICES: usize = 1000;

/// The constraint that the fields ask for, and the field that does.
///
/// # Errors
/// When a field has no meaning, or two of them ask for something.
pub fn parse_constraint(fields: &Fields) -> Result<Option<(Constraint, &'static str)>, ApiError> {
    let mut asked = None;
    for name in CONSTRAINT_NAMES {
        let Some(value) = fields.get(name) else { continue };
        let constraint = match name {
            "response_format" => response_format(value)?,
            "structured_outputs" => structured_outputs(value)?,
            "json_schema" => json(name, value)?,
            _ => of_kind(name, name.trim_start_matches("guided_"), value)?,
        };
        match (constraint, &asked) {
            (None, _) => {}
            (Some(constraint), None) => asked = Some((constraint, name)),
            (Some(_), Some((_, other))) => {
                let message =
                    format!("`{name}` does not go with `{other}`: an output has one constraint, leave one out");
                return Err(ApiError::invalid(name, message));
            }
        }
    }
    Ok(asked)
}

fn response_format(value: &Value) -> Result<Option<Constraint>, ApiError> {
    let Value::Object(format) = value else { return Err(wrong_type("response_format", "an object", value)) };
    if format.is_empty() {
        return Ok(None);
    }
    let kind = format.get("type").unwrap_or(&Value::Null);
    // llama.cpp takes a schema beside the type.
    let schema = format.get("schema").filter(|schema| !schema.is_null());
    match (kind.as_str(), schema) {
        (Some("text"), _) => Ok(None),
        (Some("json_object"), None) => Ok(Some(Constraint::Json)),
        (Some("json_object"), Some(schema)) => json("response_format.schema", schema),
        (Some("json_schema"), beside) => {
            let of_type = format.get("json_schema").and_then(|named| named.get("schema"));
            let named =
                of_type.filter(|schema| !schema.is_null()).map(|schema| ("response_format.json_schema.schema", schema));
            match named.or(beside.map(|schema| ("response_format.schema", schema))) {
                Some((at, schema)) => json(at, schema),
                None => {
                    let at = "response_format.json_schema.schema";
                    Err(ApiError::invalid(at, format!("`{at}` is required: it is the schema of the output")))
                }
            }
        }
        (Some(other), _) => {
            let message = format!("`response_format.type` is `{other:.40}`, not one of text, json_object, json_schema");
            Err(ApiError::invalid("response_format.type", message))
        }
        (None, _) => Err(wrong_type("response_format.type", "a string", kind)),
    }
}

fn structured_outputs(value: &Value) -> Result<Option<Constraint>, ApiError> {
    let Value::Object(outputs) = value else { return Err(wrong_type("structured_outputs", "an object", value)) };
    let mut constraint = None;
    for (name, value) in outputs.iter().filter(|(_, value)| !value.is_null() && **value != false) {
        let at = format!("structured_outputs.{name}");
        if !STRUCTURED_OUTPUTS.contains(&name.as_str()) {
            let message = format!("`{at}` is not served: send one of {}", STRUCTURED_OUTPUTS.join(", "));
            return Err(ApiError::invalid(&at, message));
        }
        let another = of_kind(&at, name, value)?;
        if constraint.is_some() && another.is_some() {
            let message = format!("`{at}` is a second constraint: an output has one, leave one out");
            return Err(ApiError::invalid(&at, message));
        }
        constraint = constraint.or(another);
    }
    Ok(constraint)
}

/// What `value`, at `at`, asks for in vLLM's terms; `""`, `[]` and `false` ask for nothing.
fn of_kind(at: &str, kind: &str, value: &Value) -> Result<Option<Constraint>, ApiError> {
    let text = || value.as_str().map(str::to_owned).ok_or_else(|| wrong_type(at, "a string", value));
    match kind {
        "json" => json(at, value),
        "json_object" => match value.as_bool() {
            Some(is_asked) => Ok(is_asked.then_some(Constraint::Json)),
            None => Err(wrong_type(at, "true or false", value)),
        },
        "choice" => choice(at, value),
        "regex" => Ok(Some(text()?).filter(|pattern| !pattern.is_empty()).map(Constraint::Regex)),
        _ => Ok(Some(text()?).filter(|grammar| !grammar.is_empty()).map(grammar)),
    }
}

/// A schema, as JSON or as its text.
fn json(at: &str, value: &Value) -> Result<Option<Constraint>, ApiError> {
    match value {
        Value::Object(_) | Value::Bool(true) => Ok(Some(Constraint::JsonSchema(value.clone()))),
        Value::Bool(false) => Ok(None),
        Value::String(text) if text.is_empty() => Ok(None),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(schema @ Value::Object(_)) => Ok(Some(Constraint::JsonSchema(schema))),
            _ => Err(ApiError::invalid(at, format!("`{at}` must be a JSON schema, and is a string that is none"))),
        },
        _ => Err(wrong_type(at, "a JSON schema", value)),
    }
}

fn choice(at: &str, value: &Value) -> Result<Option<Constraint>, ApiError> {
    let expected = "an array of strings that are not empty";
    let Value::Array(items) = value else { return Err(wrong_type(at, expected, value)) };
    if items.len() > MAX_CHOICES {
        return Err(ApiError::invalid(at, format!("`{at}` has {} texts, {MAX_CHOICES} are the most", items.len())));
    }
    let text = |item: &Value| match item {
        Value::String(text) if text.is_empty() => {
            Err(ApiError::invalid(at, format!("`{at}` must be {expected}: leave out the empty one")))
        }
        Value::String(text) => Ok(text.clone()),
        other => Err(wrong_type(at, expected, other)),
    };
    let texts = items.iter().map(text).collect::<Result<Vec<_>, _>>()?;
    Ok((!texts.is_empty()).then_some(Constraint::Choice(texts)))
}

/// In GBNF, as llama.cpp's clients write it, or in Lark's notation.
fn grammar(text: String) -> Constraint {
    if text.contains("::=") { Constraint::Gbnf(text) } else { Constraint::Lark(text) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: Value) -> Result<Option<(Constraint, &'static str)>, String> {
        let fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        let param = |error: ApiError| serde_json::to_value(error.into_envelope()).unwrap()["error"]["param"].clone();
        parse_constraint(&fields).map_err(|error| param(error).as_str().unwrap_or_default().to_owned())
    }

    #[test]
    fn each_dialect_says_the_same() {
        let schema = json!({"type": "object"});
        let of_schema = Constraint::JsonSchema(schema.clone());
        let regex = Constraint::Regex("a+".to_owned());
        let choice = Constraint::Choice(vec!["a".to_owned(), "b".to_owned()]);
        let (lark, gbnf) = ("start: \"a\"", "root ::= \"a\"");
        for (body, constraint) in [
            (json!({"response_format": {"type": "json_object"}}), Constraint::Json),
            (json!({"response_format": {"type": "json_object", "schema": schema}}), of_schema.clone()),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
                of_schema.clone(),
            ),
            (json!({"guided_json": schema}), of_schema.clone()),
            (json!({"guided_json": schema.to_string()}), of_schema.clone()),
            (json!({"json_schema": schema}), of_schema.clone()),
            (json!({"structured_outputs": {"json": schema, "regex": null}}), of_schema),
            (json!({"structured_outputs": {"json_object": true}}), Constraint::Json),
            (json!({"guided_json_object": true}), Constraint::Json),
            (json!({"guided_regex": "a+"}), regex.clone()),
            (json!({"structured_outputs": {"regex": "a+"}}), regex),
            (json!({"guided_choice": ["a", "b"]}), choice.clone()),
            (json!({"structured_outputs": {"choice": ["a", "b"]}}), choice),
            (json!({"guided_grammar": lark}), Constraint::Lark(lark.to_owned())),
            (json!({"grammar": lark}), Constraint::Lark(lark.to_owned())),
            (json!({"grammar": gbnf}), Constraint::Gbnf(gbnf.to_owned())),
            (json!({"structured_outputs": {"grammar": gbnf}}), Constraint::Gbnf(gbnf.to_owned())),
        ] {
            let parsed = parse(body.clone()).unwrap().unwrap_or_else(|| panic!("{body}"));
            assert_eq!(parsed.0, constraint, "{body}");
            assert!(body.get(parsed.1).is_some(), "{body}");
        }
    }

    #[test]
    fn nothing_is_asked_for_by_neutral_values() {
        for body in [
            json!({}),
            json!({"response_format": {"type": "text"}, "guided_json": null, "guided_regex": "", "guided_choice": []}),
            json!({"response_format": {}, "structured_outputs": {}, "grammar": "", "guided_json_object": false}),
            json!({"structured_outputs": {"json": null, "disable_any_whitespace": false}, "json_schema": false}),
        ] {
            assert_eq!(parse(body.clone()), Ok(None), "{body}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"kind": "text"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema.schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"guided_json": "no schema"}), "guided_json"),
            (json!({"guided_regex": 1}), "guided_regex"),
            (json!({"guided_choice": "a"}), "guided_choice"),
            (json!({"guided_choice": ["a", 1]}), "guided_choice"),
            (json!({"guided_choice": ["a", ""]}), "guided_choice"),
            (json!({"grammar": {"type": "json"}}), "grammar"),
            (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs.structural_tag"),
            (json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}), "structured_outputs.choice"),
            (json!({"guided_regex": "a", "grammar": "start: \"a\""}), "grammar"),
            (json!({"response_format": {"type": "json_object"}, "guided_json": {}}), "guided_json"),
        ] {
            assert_eq!(parse(body.clone()).unwrap_err(), param, "{body}");
        }
    }
}
