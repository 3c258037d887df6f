//! What interfaces that fill gaps have in common: text from other files.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::wrong_type;
use crate::generation::{ContextFile, GenerationRequest, Prompt};

/// The fields of an item, and what stands for a name that is not there.
pub struct ItemFields {
    pub name: &'static str,
    pub text: &'static str,
    pub unnamed: &'static str,
}

/// The items of the array at `at`, each an object.
pub fn context_files(at: &str, items: &[Value], fields: &ItemFields) -> Result<Vec<ContextFile>, ApiError> {
    let file = |(index, item): (usize, &Value)| {
        let at = format!("{at}[{index}]");
        let Value::Object(item) = item else { return Err(wrong_type(&at, "an object", item)) };
        Ok(ContextFile {
            name: text(item, &at, fields.name)?.unwrap_or(fields.unnamed).to_owned(),
            text: text(item, &at, fields.text)?.unwrap_or_default().to_owned(),
        })
    };
    items.iter().enumerate().map(file).collect()
}

/// The string `name` of the object at `at`.
pub fn text<'a>(object: &'a Map<String, Value>, at: &str, name: &str) -> Result<Option<&'a str>, ApiError> {
    match object.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong_type(&format!("{at}.{name}"), "a string", other)),
    }
}

/// Puts `context` before the gaps of `request`.
pub fn set_context(request: &mut GenerationRequest, context: &[ContextFile]) {
    for prompt in &mut request.prompts {
        if let Prompt::FillInMiddle { files, .. } = prompt {
            *files = context.to_vec();
        }
    }
}
