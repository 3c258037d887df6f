//! The fields of a configuration, taken one by one; what is left in the end must have its default value.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

use super::FILE;
use crate::adapter::error::AdapterError;
use crate::adapter::path_pattern::PathPattern;
use crate::adapter::sites::{ChosenLayers, PathMatch, SiteSelector};
use crate::model::spec::Module;

/// Fields of every method that matter to training, provenance or other runtimes only.
const WITHOUT_EFFECT: &[&str] =
    &["auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"];

/// What to do with an adapter that needs more than is added here.
pub(super) const INSTEAD: &str = "merge the adapter into its base and serve that";

/// Configurations of variants of a method, which PEFT turns on by an empty one too.
const TURNED_ON_BY_EMPTY: &[&str] =
    &["arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"];

/// What families name linear layers of decoder blocks beside Llama's names, for `all-linear`.
const OTHER_MODULES: [&str; 5] = ["qkv_proj", "gate_up_proj", "c_fc", "c_proj", "gate"];

#[derive(Deserialize)]
#[serde(untagged, expecting = "neither a value of the right type nor a list of them")]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

impl OneOrMany<String> {
    /// PEFT reads a single text as a pattern for the whole path, a list as names.
    pub fn into_path_match(self, field: &str) -> Result<PathMatch, AdapterError> {
        match self {
            Self::One(pattern) => PathPattern::whole(field, &pattern).map(PathMatch::Pattern),
            Self::Many(names) => Ok(PathMatch::Names(names)),
        }
    }
}

const MAX_RANK: usize = 1024;

/// # Errors
/// When it is none, or above what is served; names `field`.
pub(super) fn checked_rank(field: &str, rank: i64) -> Result<usize, AdapterError> {
    match usize::try_from(rank) {
        Ok(rank @ 1..=MAX_RANK) => Ok(rank),
        _ => Err(AdapterError::field(field, format!("{rank} is not a rank between 1 and {MAX_RANK}"))),
    }
}

/// The fields not yet interpreted. Of a key that stands there twice, the last value counts at the first place, as in Python.
pub(super) struct Fields(BTreeMap<String, Value>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;

        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            // As a map's own, but that an error says which field it is in.
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Fields, M::Error> {
                let mut fields = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    let value = map.next_value().map_err(|e| M::Error::custom(format!("field {name:?}: {e}")))?;
                    fields.insert(name, value);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(FieldsVisitor)
    }
}

impl Fields {
    pub fn parse(text: &[u8]) -> Result<Self, AdapterError> {
        serde_json::from_slice(text).map_err(|e| AdapterError::parse(FILE, e))
    }

    pub fn is_null(&self, name: &str) -> bool {
        self.0.get(name).is_none_or(Value::is_null)
    }

    pub fn take(&mut self, name: &str) -> Value {
        self.0.remove(name).unwrap_or(Value::Null)
    }

    pub fn take_as<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, AdapterError> {
        serde_json::from_value(self.take(name)).map_err(|e| AdapterError::field(name, e))
    }

    /// A rank, or `default` where there is none.
    pub fn take_rank(&mut self, name: &str, default: usize) -> Result<usize, AdapterError> {
        self.take_as(name)?.map_or(Ok(default), |rank| checked_rank(name, rank))
    }

    /// A text that must be there and be one of `supported`.
    pub fn take_text(&mut self, name: &str, supported: &[&'static str]) -> Result<&'static str, AdapterError> {
        let value = self.take(name);
        let found = value.as_str().and_then(|text| supported.iter().copied().find(|candidate| *candidate == text));
        found.ok_or_else(|| {
            let problem = if value.is_null() { "missing".to_string() } else { format!("{value} is not supported") };
            AdapterError::field(name, format!("{problem} (supported: {})", supported.join(", ")))
        })
    }

    /// # Errors
    /// When `bias` says that biases of the base were trained.
    pub fn refuse_biases(&mut self) -> Result<(), AdapterError> {
        match self.take("bias") {
            Value::Null => Ok(()),
            Value::String(name) if name == "none" => Ok(()),
            other => {
                let reason =
                    format!("{other} is not supported (supported: none): biases of the base were trained; {INSTEAD}");
                Err(AdapterError::field("bias", reason))
            }
        }
    }

    /// `target_modules` and `exclude_modules`: what every method that changes layers has. `parameters` are named besides.
    pub fn take_selector(&mut self, parameters: Vec<String>) -> Result<SiteSelector, AdapterError> {
        let targets = match self.take_as::<OneOrMany<String>>("target_modules")? {
            Some(OneOrMany::One(text)) if text.eq_ignore_ascii_case("all-linear") => {
                let names = Module::PLAIN.map(Module::name).into_iter().chain(OTHER_MODULES);
                PathMatch::Names(names.map(str::to_string).collect())
            }
            Some(targets) => targets.into_path_match("target_modules")?,
            None if !parameters.is_empty() => PathMatch::Names(Vec::new()),
            None => return Err(AdapterError::field("target_modules", "missing: it must name the adapted modules")),
        };
        let excluded = self
            .take_as::<OneOrMany<String>>("exclude_modules")?
            .map(|excluded| excluded.into_path_match("exclude_modules"))
            .transpose()?;
        Ok(SiteSelector { targets, parameters, excluded, layers: None })
    }

    /// `layers_to_transform` and `layers_pattern`, which narrow `selector`.
    pub fn take_layers(&mut self, selector: &mut SiteSelector) -> Result<(), AdapterError> {
        let layers: Vec<usize> = self.take_as("layers_to_transform")?.map(OneOrMany::into_vec).unwrap_or_default();
        if !layers.is_empty() && matches!(selector.targets, PathMatch::Pattern(_)) {
            let reason = "has no meaning when target_modules is a pattern: put the layers into the pattern";
            return Err(AdapterError::field("layers_to_transform", reason));
        }
        let lists: Vec<String> = self.take_as("layers_pattern")?.map(OneOrMany::into_vec).unwrap_or_default();
        let lists: Vec<&str> = lists.iter().map(String::as_str).filter(|list| !list.is_empty()).collect();
        let chosen = ChosenLayers::new(layers.into_iter().collect(), &lists)?;
        selector.layers = (!chosen.numbers.is_empty()).then_some(chosen);
        Ok(())
    }

    /// Refuses what changes the arithmetic in a way this server does not know.
    ///
    /// `without_effect` are the method's own fields that matter to its training only.
    pub fn refuse_rest(self, without_effect: &[&str]) -> Result<(), AdapterError> {
        for (name, value) in self.0 {
            let is_default = match &value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(entries) => entries.is_empty() && !TURNED_ON_BY_EMPTY.contains(&name.as_str()),
                Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
            };
            let has_effect = !WITHOUT_EFFECT.iter().chain(without_effect).any(|field| *field == name);
            if !is_default && has_effect {
                let reason = format!("{value} asks for what this server does not do: {INSTEAD}");
                return Err(AdapterError::field(&name, reason));
            }
        }
        Ok(())
    }
}
