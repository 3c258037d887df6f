//! What a request asks for, and what it got.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Example, IclError, Store};

pub const MAX_K: usize = 256;
/// Examples when the request does not say how many.
pub const DEFAULT_K: usize = 3;
/// Of `random`, when the request gives no seed.
pub const DEFAULT_SEED: u64 = 42;

/// Of the `icl` of a request.
const FIELDS: [&str; 5] = ["store", "k", "select", "seed", "budget"];

/// How examples are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Select {
    /// The first k.
    Fixed,
    /// k drawn with the seed, as Python's `random.sample` draws them.
    Random,
    /// The k nearest to the instruction by words.
    Bm25,
    /// The k nearest by words and by embeddings.
    Hybrid,
}

/// The `icl` of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    pub store: String,
    pub k: usize,
    pub select: Select,
    pub seed: Option<u64>,
    /// Most tokens for the examples, beyond which the least wanted are left out; none: all k or an error.
    pub budget: Option<usize>,
}

/// The examples a request gets, from one version of one store.
#[derive(Debug, Clone)]
pub struct Chosen {
    pub store: Arc<Store>,
    pub select: Select,
    /// Only of `random`.
    pub seed: Option<u64>,
    /// Ids (places in the store) in the order of the prompt.
    pub ids: Vec<usize>,
}

impl Chosen {
    /// In the order of the prompt.
    pub fn examples(&self) -> Vec<&Example> {
        self.ids.iter().map(|&id| &self.store.examples()[id]).collect()
    }
}

impl Selection {
    /// Reads the object `icl` of a request; `null` is an absent field.
    ///
    /// # Errors
    /// A missing store, a field of the wrong type or that nobody knows, an unknown `select`.
    pub fn parse(fields: &Map<String, Value>) -> Result<Self, IclError> {
        // Unlike a request, it has no other server's fields: what is not read is a mistake, and would choose other examples.
        if let Some(unknown) = fields.keys().find(|name| !FIELDS.contains(&name.as_str())) {
            let reason = format!("has {}, and no `{unknown:.80}`", FIELDS.map(|name| format!("`{name}`")).join(", "));
            return Err(IclError::Field { field: "icl", reason });
        }
        let get = |name: &str| fields.get(name).filter(|value| !value.is_null());
        let wrong = |field, expected: &str, value: &Value| IclError::Field {
            field,
            reason: format!("must be {expected}, not {value:.80}"),
        };
        let integer = |name, field| {
            let whole = |value: &Value| value.as_u64().ok_or_else(|| wrong(field, "an integer from 0", value));
            get(name).map(whole).transpose()
        };
        let size = |name, field| -> Result<Option<usize>, IclError> {
            Ok(integer(name, field)?.map(|n| usize::try_from(n).unwrap_or(usize::MAX)))
        };
        let store = match get("store") {
            Some(Value::String(store)) => store.clone(),
            Some(other) => return Err(wrong("icl.store", "the name of an example store", other)),
            None => return Err(IclError::Field { field: "icl.store", reason: "is required".to_owned() }),
        };
        let select = match get("select") {
            None => Select::Fixed,
            Some(value) => match value.as_str() {
                Some("fixed") => Select::Fixed,
                Some("random") => Select::Random,
                Some("bm25") => Select::Bm25,
                Some("hybrid") => Select::Hybrid,
                _ => return Err(wrong("icl.select", "`fixed`, `random`, `bm25` or `hybrid`", value)),
            },
        };
        Ok(Self {
            store,
            k: size("k", "icl.k")?.unwrap_or(DEFAULT_K),
            select,
            seed: integer("seed", "icl.seed")?,
            budget: size("budget", "icl.budget")?,
        })
    }

    /// Splits `<model>+icl:<store>@<k>` into the model's own name and a fixed selection; another name is returned whole.
    ///
    /// # Errors
    /// A name with `+icl:` and no store and number after it.
    pub fn split_model_name(name: &str) -> Result<(&str, Option<Self>), IclError> {
        let Some((model, examples)) = name.rsplit_once("+icl:") else { return Ok((name, None)) };
        let parts = examples.rsplit_once('@').filter(|(store, _)| !store.is_empty());
        let Some((store, Ok(k))) = parts.map(|(store, k)| (store, k.parse())) else {
            return Err(IclError::ModelName(name.to_owned()));
        };
        let selection = Self { store: store.to_owned(), k, select: Select::Fixed, seed: None, budget: None };
        Ok((model, Some(selection)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(icl: Value) -> Result<Selection, IclError> {
        Selection::parse(icl.as_object().unwrap())
    }

    #[test]
    fn every_field_is_read_and_all_but_the_store_have_defaults() {
        let selection = parse(json!({"store": "s", "k": 16, "select": "random", "seed": 777, "budget": 9})).unwrap();
        let expected = Selection { store: "s".into(), k: 16, select: Select::Random, seed: Some(777), budget: Some(9) };
        assert_eq!(selection, expected);
        let defaults = Selection { store: "s".into(), k: 3, select: Select::Fixed, seed: None, budget: None };
        assert_eq!(parse(json!({"store": "s", "k": null, "seed": null})).unwrap(), defaults);
    }

    #[test]
    fn the_field_at_fault_is_named() {
        let cases = [
            (json!({}), "icl.store", "is required"),
            (json!({"store": 1}), "icl.store", "not 1"),
            (json!({"store": "s", "k": -1}), "icl.k", "not -1"),
            (json!({"store": "s", "k": "3"}), "icl.k", "not \"3\""),
            (json!({"store": "s", "select": "best"}), "icl.select", "`bm25`"),
            (json!({"store": "s", "seed": 0.5}), "icl.seed", "0.5"),
            (json!({"store": "s", "budget": []}), "icl.budget", "not []"),
            (json!({"store": "s", "n": 5}), "icl", "no `n`"),
            (json!({"store": "s", "method": "bm25"}), "icl", "no `method`"),
            (json!({"store": "s", "K": null}), "icl", "`store`, `k`, `select`, `seed`, `budget`, and no `K`"),
        ];
        for (icl, field, reason) in cases {
            let error = parse(icl).unwrap_err();
            assert_eq!(error.field(), Some(field));
            assert!(error.to_string().contains(reason) && error.to_string().contains(field), "{error}");
        }
    }

    #[test]
    fn a_model_name_may_end_in_a_store_and_a_number() {
        let (model, selection) = Selection::split_model_name("qwen2.5-coder:0.5b-conala+icl:py.v1@16").unwrap();
        let selection = selection.unwrap();
        assert_eq!((model, selection.store.as_str(), selection.k), ("qwen2.5-coder:0.5b-conala", "py.v1", 16));
        assert_eq!(selection.select, Select::Fixed);
        assert_eq!(Selection::split_model_name("conala@3").unwrap(), ("conala@3", None));
        for name in ["m+icl:", "m+icl:s", "m+icl:s@", "m+icl:@3", "m+icl:s@-1", "m+icl:s@three"] {
            assert_eq!(Selection::split_model_name(name).unwrap_err().field(), Some("model"), "{name}");
        }
    }
}
