//! Fields of `config.json`, of which every one must be taken.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::CheckpointError;
use crate::model::metadata::MAX_COUNT;

pub const FILE: &str = "config.json";

pub struct Fields {
    /// What messages put before a field's name: that of the object it is in, and a dot.
    within: String,
    values: Map<String, Value>,
    taken: RefCell<BTreeSet<String>>,
}

impl Fields {
    pub fn new(values: Map<String, Value>) -> Self {
        Self { within: String::new(), values, taken: RefCell::default() }
    }

    /// Those of an object that is a field itself.
    pub fn of_object(name: &str, value: &Value) -> Result<Self, CheckpointError> {
        let values = value.as_object().ok_or_else(|| refuse(name, "is no object"))?.clone();
        Ok(Self { within: format!("{name}."), values, taken: RefCell::default() })
    }

    pub fn refuse(&self, name: &str, reason: impl ToString) -> CheckpointError {
        refuse(&format!("{}{name}", self.within), reason)
    }

    /// A field with a value; one that is `null` is as one that is not there.
    pub fn take(&self, name: &str) -> Option<&Value> {
        self.taken.borrow_mut().insert(name.to_owned());
        self.values.get(name).filter(|value| !value.is_null())
    }

    /// Whether a field is there, be it without a value.
    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// Whether a field is there and says that it has no value.
    pub fn is_null(&self, name: &str) -> bool {
        self.values.get(name).is_some_and(Value::is_null)
    }

    /// The fields with such names.
    pub fn take_all(&self, is_wanted: impl Fn(&str) -> bool) -> Vec<(&str, &Value)> {
        let wanted: Vec<_> = self.values.iter().filter(|(name, _)| is_wanted(name)).collect();
        self.taken.borrow_mut().extend(wanted.iter().map(|(name, _)| (*name).clone()));
        wanted.into_iter().map(|(name, value)| (name.as_str(), value)).collect()
    }

    pub fn text(&self, name: &str) -> Result<Option<String>, CheckpointError> {
        let wrong = || self.refuse(name, "is not text");
        self.take(name).map(|value| value.as_str().map(str::to_owned).ok_or_else(wrong)).transpose()
    }

    pub fn flag(&self, name: &str) -> Result<Option<bool>, CheckpointError> {
        let wrong = || self.refuse(name, "is not true or false");
        self.take(name).map(|value| value.as_bool().ok_or_else(wrong)).transpose()
    }

    /// At least 1, and no more than a file may say.
    pub fn optional_count(&self, name: &str) -> Result<Option<usize>, CheckpointError> {
        let count = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
        let Some(value) = self.take(name) else { return Ok(None) };
        match count(value) {
            None => Err(self.refuse(name, "is not a number from 1 on")),
            Some(count) if count > MAX_COUNT => Err(self.refuse(name, format!("{count} is more than {MAX_COUNT}"))),
            count => Ok(count),
        }
    }

    pub fn count(&self, name: &str) -> Result<usize, CheckpointError> {
        self.optional_count(name)?.ok_or_else(|| self.refuse(name, "is missing"))
    }

    pub fn optional_number(&self, name: &str) -> Result<Option<f32>, CheckpointError> {
        self.take(name).map(|value| number(&format!("{}{name}", self.within), value)).transpose()
    }

    pub fn number(&self, name: &str) -> Result<f32, CheckpointError> {
        self.optional_number(name)?.ok_or_else(|| self.refuse(name, "is missing"))
    }

    /// Refuses a field that is there with another value than these.
    pub fn must_be(&self, name: &str, accepted: &[Value]) -> Result<(), CheckpointError> {
        match self.take(name) {
            Some(value) if !accepted.contains(value) => Err(self.refuse(name, format!("{value} is not served"))),
            _ => Ok(()),
        }
    }

    /// One id or a list of them.
    pub fn ids(&self, name: &str) -> Result<Vec<u32>, CheckpointError> {
        self.take(name).map_or(Ok(Vec::new()), |value| ids(value).ok_or_else(|| self.refuse(name, "is no token id")))
    }

    /// What is left must be `without_effect`, or be off.
    pub fn refuse_the_rest(&self, without_effect: &[&str]) -> Result<(), CheckpointError> {
        let taken = self.taken.borrow();
        let is_off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        let left = self
            .values
            .iter()
            .find(|(name, value)| !taken.contains(*name) && !without_effect.contains(&name.as_str()) && !is_off(value));
        match left {
            Some((name, value)) => {
                Err(self.refuse(name, format!("{value} is not known, and may change what the model computes")))
            }
            None => Ok(()),
        }
    }
}

/// One token id or a list of them.
pub fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().map(id).collect(),
        value => Some(vec![id(value)?]),
    }
}

pub fn number(name: &str, value: &Value) -> Result<f32, CheckpointError> {
    let number = value.as_f64().map(|n| n as f32).filter(|n| n.is_finite());
    number.ok_or_else(|| refuse(name, format!("{value} is not a number")))
}

pub fn refuse(field: &str, reason: impl ToString) -> CheckpointError {
    CheckpointError::file(FILE, format!("{field}: {}", reason.to_string()))
}
