//! A request body read field by field, so that an error names the field at fault.
//!
//! `null` is an absent field. Fields that nobody reads are ignored, as clients of many servers send them, but those that
//! would change a reply are refused by `unsupported.rs`, and all of them where adapters are changed or trained.

use std::ops::RangeInclusive;

use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequest, Path, Request};
use axum::http::request::Parts;
use serde_json::{Map, Value};

use super::AppState;
use super::body::{HeldBytes, parse_json, read_json};
use super::error::ApiError;

/// The JSON object of a request, whatever its content type says.
#[derive(Debug)]
pub struct Fields {
    fields: Map<String, Value>,
    /// `None` for fields that did not come as a body.
    _held: Option<HeldBytes>,
}

impl FromRequest<AppState> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (fields, held) = read_json(request, state, Self::parse).await?;
        Ok(Self { _held: Some(held), ..fields })
    }
}

impl From<Map<String, Value>> for Fields {
    fn from(fields: Map<String, Value>) -> Self {
        Self { fields, _held: None }
    }
}

/// `None` when there is no body.
impl OptionalFromRequest<AppState> for Fields {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Option<Self>, ApiError> {
        let parse = |body: &[u8]| if body.is_empty() { Ok(None) } else { Self::parse(body).map(Some) };
        let (fields, held) = read_json(request, state, parse).await?;
        Ok(fields.map(|fields| Self { _held: Some(held), ..fields }))
    }
}

/// The JSON of a request that need not be an object.
#[derive(Debug)]
pub struct JsonBody {
    pub json: Value,
    _held: HeldBytes,
}

impl FromRequest<AppState> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (json, held) = read_json(request, state, parse_json).await?;
        Ok(Self { json, _held: held })
    }
}

/// The name that a path ends in or has in its middle.
#[derive(Debug)]
pub struct PathName(pub String);

impl FromRequestParts<AppState> for PathName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(_) => Err(ApiError::malformed("the path has a name that is not UTF-8")),
        }
    }
}

impl Fields {
    /// # Errors
    /// 400 when `body` is no JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match parse_json(body)? {
            Value::Object(fields) => Ok(fields.into()),
            _ => Err(ApiError::malformed("the request body must be a JSON object")),
        }
    }

    /// Every field that is there, `null` or not.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Value)> + Clone {
        self.fields.iter()
    }

    /// Copies of all fields but these, to be said in the words of another interface.
    pub fn without(&self, names: &[&str]) -> Map<String, Value> {
        let others = self.iter().filter(|(name, _)| !names.contains(&name.as_str()));
        others.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// For changes: with a field passed over that is misspelt, another would be made than the one that is asked for.
    ///
    /// # Errors
    /// 400 for a field that is none of `known`.
    pub fn refuse_others(&self, known: &[&str]) -> Result<(), ApiError> {
        match self.iter().find(|(name, value)| !value.is_null() && !known.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) => {
                Err(ApiError::invalid(name, format!("`{name}` is not known: known are {}", known.join(", "))))
            }
        }
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// What is asked for under any of several names for the same.
    ///
    /// # Errors
    /// 400 where two of them ask for different things.
    pub fn one_of<T: PartialEq>(
        &self,
        names: &[&str],
        read: impl Fn(&str) -> Result<Option<T>, ApiError>,
    ) -> Result<Option<T>, ApiError> {
        let mut found: Option<(&str, T)> = None;
        for name in names {
            let Some(value) = read(name)? else { continue };
            match &found {
                None => found = Some((name, value)),
                Some((_, same)) if *same == value => {}
                Some((other, _)) => return Err(two_values(name, other)),
            }
        }
        Ok(found.map(|(_, value)| value))
    }

    pub fn string(&self, name: &str) -> Result<Option<&str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    pub fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub fn array(&self, name: &str) -> Result<Option<&Vec<Value>>, ApiError> {
        self.typed(name, "an array", Value::as_array)
    }

    pub fn object(&self, name: &str) -> Result<Option<&Map<String, Value>>, ApiError> {
        self.typed(name, "an object", Value::as_object)
    }

    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(number) = self.typed(name, "a number", Value::as_f64)? else { return Ok(None) };
        if !range.contains(&number) {
            return Err(out_of_range(name, range.start(), range.end(), number));
        }
        Ok(Some(number as f32))
    }

    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(integer) = self.typed(name, "an integer", as_integer)? else { return Ok(None) };
        if !range.contains(&integer) {
            return Err(out_of_range(name, range.start(), range.end(), integer));
        }
        Ok(Some(integer))
    }

    /// A count from 0 or 1 up to `max`.
    pub fn count(&self, name: &str, range: RangeInclusive<u32>) -> Result<Option<usize>, ApiError> {
        let range = i64::from(*range.start())..=i64::from(*range.end());
        Ok(self.integer(name, range)?.map(|count| count as usize))
    }

    /// One string, or an array of strings.
    pub fn strings(&self, name: &str) -> Result<Vec<String>, ApiError> {
        let as_strings = |value: &Value| match value {
            Value::String(string) => Some(vec![string.clone()]),
            Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        Ok(self.typed(name, "a string or an array of strings", as_strings)?.unwrap_or_default())
    }

    fn typed<'a, T>(
        &'a self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| wrong_type(name, expected, value)),
        }
    }
}

/// 400 for a value of the wrong type; `name` may be a path such as `messages[0].role`.
pub fn wrong_type(name: &str, expected: &str, value: &Value) -> ApiError {
    let got = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::invalid(name, format!("`{name}` must be {expected}, not {got}"))
}

/// 400 for two fields that are names of the same and ask for different things.
pub fn two_values(name: &str, other: &str) -> ApiError {
    ApiError::invalid(name, format!("`{name}` and `{other}` are the same here and differ: leave one out"))
}

fn out_of_range<T: std::fmt::Display>(name: &str, min: T, max: T, got: impl std::fmt::Display) -> ApiError {
    ApiError::invalid(name, format!("`{name}` must be from {min} to {max}, not {got}"))
}

/// Also `16.0`, as languages with one number type write it.
fn as_integer(value: &Value) -> Option<i64> {
    let whole = |float: &f64| float.fract() == 0.0 && float.abs() < 2f64.powi(53);
    value.as_i64().or_else(|| value.as_f64().filter(whole).map(|float| float as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    fn message(error: ApiError) -> String {
        serde_json::to_string(&error.into_envelope()).unwrap()
    }

    #[test]
    fn a_body_that_is_no_object_is_malformed() {
        for body in ["", "{", "[1]", "\"x\"", "{\"a\":1e999}", "\u{fffd}"] {
            assert!(Fields::parse(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn half_a_character_is_a_replacement_character() {
        assert_eq!(fields(r#"{"prompt": "x = \"\ud83d"}"#).string("prompt").unwrap(), Some("x = \"\u{fffd}"));
    }

    #[test]
    fn null_is_absent() {
        let fields = fields(r#"{"a": null}"#);
        assert_eq!(fields.string("a").unwrap(), None);
        assert_eq!(fields.integer("a", 0..=1).unwrap(), None);
    }

    #[test]
    fn a_wrong_type_names_the_field_and_both_types() {
        let error = message(fields(r#"{"max_tokens": "16"}"#).integer("max_tokens", 0..=9).unwrap_err());
        assert!(error.contains("`max_tokens` must be an integer, not a string"), "{error}");
        assert!(error.contains(r#""param":"max_tokens""#), "{error}");
    }

    #[test]
    fn a_value_out_of_range_names_the_range() {
        let error = message(fields(r#"{"top_p": 1.5}"#).number("top_p", 0.0..=1.0).unwrap_err());
        assert!(error.contains("`top_p` must be from 0 to 1, not 1.5"), "{error}");
    }

    #[test]
    fn whole_floats_are_integers_and_broken_ones_are_not() {
        let fields = fields(r#"{"whole": 16.0, "broken": 16.5, "huge": 1e300}"#);
        assert_eq!(fields.integer("whole", 0..=99).unwrap(), Some(16));
        assert!(fields.integer("broken", 0..=99).is_err());
        assert!(fields.integer("huge", 0..=99).is_err());
    }

    #[test]
    fn strings_may_be_one_or_many() {
        let fields = fields(r#"{"one": "a", "many": ["a", "b"], "mixed": ["a", 1]}"#);
        assert_eq!(fields.strings("one").unwrap(), ["a"]);
        assert_eq!(fields.strings("many").unwrap(), ["a", "b"]);
        assert!(fields.strings("mixed").is_err());
        assert!(fields.strings("absent").unwrap().is_empty());
    }
}
