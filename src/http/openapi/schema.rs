//! Schemas of what a field may be. `null` is an absent field everywhere, so each takes it.

use serde_json::{Map, Value, json};

/// Fields by name.
pub type Properties = Map<String, Value>;

/// The object that `json!` makes, as fields.
pub fn properties(object: Value) -> Properties {
    match object {
        Value::Object(properties) => properties,
        _ => Properties::new(),
    }
}

pub fn text(description: &str) -> Value {
    json!({"type": ["string", "null"], "description": description})
}

pub fn boolean(description: &str) -> Value {
    json!({"type": ["boolean", "null"], "description": description})
}

pub fn integer(min: i64, max: i64, description: &str) -> Value {
    json!({"type": ["integer", "null"], "minimum": min, "maximum": max, "description": description})
}

pub fn count(min: u32, max: u32, description: &str) -> Value {
    integer(min.into(), max.into(), description)
}

pub fn number(min: f64, max: f64, description: &str) -> Value {
    json!({"type": ["number", "null"], "minimum": min, "maximum": max, "description": description})
}

pub fn array(items: Value, description: &str) -> Value {
    json!({"type": ["array", "null"], "items": items, "description": description})
}

/// An object that may have other fields, too.
pub fn object(properties: Value, required: &[&str], description: &str) -> Value {
    json!({"type": ["object", "null"], "properties": properties, "required": required, "description": description})
}

/// As [`object`], where `null` will not do.
pub fn item(properties: Value, required: &[&str]) -> Value {
    json!({"type": "object", "properties": properties, "required": required})
}

/// `object` without other fields.
pub fn closed(mut object: Value) -> Value {
    object["additionalProperties"] = false.into();
    object
}

pub fn required_text() -> Value {
    json!({"type": "string"})
}

/// One of `names`, or nothing.
pub fn one_of(names: &[&str], description: &str) -> Value {
    let values: Vec<Value> = names.iter().map(|name| json!(name)).chain([Value::Null]).collect();
    json!({"enum": values, "description": description})
}

/// What is given must not be `null`.
pub fn not_null(mut schema: Value) -> Value {
    if let Some(Value::Array(kinds)) = schema.get_mut("type") {
        kinds.retain(|kind| kind != "null");
    }
    schema
}
