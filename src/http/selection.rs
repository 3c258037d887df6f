//! The fields that say which weights a request wants: `model`, and one of those that name adapters: `adapters`, `lora` of
//! llama.cpp, `adapter` of mistral.rs, `adapter_id` of LoRAX and TGI, `lora_path` of SGLang, `lora_name` of vLLM.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use crate::generation::{AdapterEntry, AdapterField, AdapterRef, Selection};
use crate::icl;

/// Strengths beyond this only make noise.
pub const MAX_SCALE: f64 = 4.0;
pub const MAX_ADAPTERS: usize = 16;
pub const ADAPTER_FIELDS: [&str; 6] = ["adapters", "lora", "adapter", "adapter_id", "lora_path", "lora_name"];
/// Those of a list; the others hold one name.
pub const LISTS: [&str; 2] = ["adapters", "lora"];
/// LoRAX's name for no adapter.
const NO_ADAPTER: &str = "__base_model__";

/// The weights, and the in-context examples of `icl` or of a model name that ends in `+icl:<store>@<k>`.
pub fn parse_selection(fields: &Fields) -> Result<(Selection, Option<icl::Selection>), ApiError> {
    let (model, by_name) = match fields.string("model")? {
        None => (None, None),
        Some(name) => {
            let (model, icl) = icl::Selection::split_model_name(name)?;
            (Some(model.to_owned()), icl)
        }
    };
    let by_field = fields.object("icl")?.map(icl::Selection::parse).transpose()?;
    if by_name.is_some() && by_field.is_some() {
        return Err(ApiError::invalid(
            "icl",
            "`model` names in-context examples too: leave them out of one of the two",
        ));
    }
    Ok((parse_weights(fields, model)?, by_field.or(by_name)))
}

fn parse_weights(fields: &Fields, model: Option<String>) -> Result<Selection, ApiError> {
    // An empty name names nothing, as an empty `model` does.
    let is_given = |name: &&str| fields.get(name).is_some_and(|value| *value != "");
    let mut given = ADAPTER_FIELDS.into_iter().filter(is_given);
    let Some(name) = given.next() else { return Ok(Selection { model, adapters: None }) };
    if let Some(other) = given.next() {
        return Err(ApiError::invalid(other, format!("`{other}` cannot be combined with `{name}`: use one of them")));
    }
    let entries = if LISTS.contains(&name) {
        parse_entries(name, fields.array(name)?.map_or(&[], Vec::as_slice))?
    } else {
        let adapter = fields.string(name)?.filter(|adapter| *adapter != NO_ADAPTER);
        adapter.map(|adapter| entry(name, named(adapter), 1.0)).into_iter().collect()
    };
    Ok(Selection { model, adapters: Some(AdapterField { name, entries }) })
}

/// `[{"name" | "id", "scale"}]`; `place` is what the list is called in errors.
pub fn parse_entries(place: &str, items: &[Value]) -> Result<Vec<AdapterEntry>, ApiError> {
    if items.len() > MAX_ADAPTERS {
        return Err(ApiError::invalid(place, format!("{} adapters at once are more than {MAX_ADAPTERS}", items.len())));
    }
    items.iter().enumerate().map(|(index, item)| parse_entry(&format!("{place}[{index}]"), item)).collect()
}

fn parse_entry(at: &str, item: &Value) -> Result<AdapterEntry, ApiError> {
    let Value::Object(item) = item else { return Err(wrong_type(at, "an object with a `name`", item)) };
    if let Some(key) = item.keys().find(|key| !["name", "id", "scale"].contains(&key.as_str())) {
        let message = format!("`{at}.{key}` is not known; an adapter has `name` or `id`, and `scale`");
        return Err(ApiError::invalid(&format!("{at}.{key}"), message));
    }
    let scale = parse_scale(&format!("{at}.scale"), item)?;
    let present = |key| item.get(key).filter(|value| !value.is_null());
    match (present("name"), present("id")) {
        (Some(Value::String(name)), None) => Ok(entry(&format!("{at}.name"), named(name), scale)),
        (Some(other), None) => Err(wrong_type(&format!("{at}.name"), "a string", other)),
        (None, Some(id)) => match id.as_u64().and_then(|id| usize::try_from(id).ok()) {
            Some(id) => Ok(entry(&format!("{at}.id"), AdapterRef::Id(id), scale)),
            None => Err(ApiError::invalid(&format!("{at}.id"), format!("`{at}.id` must be a whole number from 0"))),
        },
        (Some(_), Some(_)) => {
            Err(ApiError::invalid(&format!("{at}.id"), format!("`{at}` has both `name` and `id`: leave one out")))
        }
        (None, None) => Err(ApiError::invalid(&format!("{at}.name"), format!("`{at}.name` is required"))),
    }
}

fn parse_scale(at: &str, item: &Map<String, Value>) -> Result<f32, ApiError> {
    let scale = match item.get("scale") {
        None | Some(Value::Null) => return Ok(1.0),
        Some(scale) => scale.as_f64().ok_or_else(|| wrong_type(at, "a number", scale))?,
    };
    if !(-MAX_SCALE..=MAX_SCALE).contains(&scale) {
        return Err(ApiError::invalid(at, format!("`{at}` must be from -{MAX_SCALE} to {MAX_SCALE}, not {scale}")));
    }
    Ok(scale as f32)
}

fn named(name: &str) -> AdapterRef {
    AdapterRef::Name(name.to_owned())
}

fn entry(param: &str, adapter: AdapterRef, scale: f32) -> AdapterEntry {
    AdapterEntry { param: param.to_owned(), adapter, scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Selection, ApiError> {
        parse_selection(&Fields::parse(json.as_bytes()).unwrap()).map(|(selection, _)| selection)
    }

    fn entries(json: &str) -> Vec<AdapterEntry> {
        parse(json).unwrap().adapters.unwrap().entries
    }

    #[test]
    fn adapters_are_named_in_three_fields_at_strength_1_unless_said_otherwise() {
        assert_eq!(parse(r#"{"model": "m", "adapters": null}"#), Ok(Selection::model("m")));
        let two = entries(r#"{"adapters": [{"name": "a", "scale": -0.5}, {"name": "b"}]}"#);
        assert_eq!(two, [entry("adapters[0].name", named("a"), -0.5), entry("adapters[1].name", named("b"), 1.0)]);
        let by_id = entries(r#"{"lora": [{"id": 3, "scale": 0}, {"name": "b"}]}"#);
        assert_eq!(by_id, [entry("lora[0].id", AdapterRef::Id(3), 0.0), entry("lora[1].name", named("b"), 1.0)]);
        assert_eq!(entries(r#"{"adapter": "a"}"#), [entry("adapter", named("a"), 1.0)]);
        assert_eq!(entries(r#"{"lora": []}"#), []);
    }

    #[test]
    fn the_fields_of_other_servers_name_one_adapter_or_none() {
        for name in ["adapter", "adapter_id", "lora_path", "lora_name"] {
            let body = |value: &str| format!(r#"{{"model": "m", "{name}": "{value}"}}"#);
            assert_eq!(entries(&body("a")), [entry(name, named("a"), 1.0)]);
            assert_eq!(parse(&body("")), Ok(Selection::model("m")), "{name}");
            assert_eq!(entries(&body(NO_ADAPTER)), [], "{name}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place() {
        let many = format!(r#"{{"adapters": [{}]}}"#, vec![r#"{"name": "a"}"#; 17].join(","));
        for (body, place) in [
            (r#"{"adapters": {"name": "a"}}"#, "adapters"),
            (r#"{"adapters": ["a"]}"#, "adapters[0]"),
            (r#"{"adapters": [{"name": "a"}, {"scale": 1}]}"#, "adapters[1].name"),
            (r#"{"adapters": [{"name": 1}]}"#, "adapters[0].name"),
            (r#"{"adapters": [{"name": "a", "id": 1}]}"#, "adapters[0].id"),
            (r#"{"lora": [{"id": -1}]}"#, "lora[0].id"),
            (r#"{"lora": [{"id": 1.5}]}"#, "lora[0].id"),
            (r#"{"lora": [{"id": 0, "scale": "1"}]}"#, "lora[0].scale"),
            (r#"{"adapters": [{"name": "a", "scale": 4.1}]}"#, "adapters[0].scale"),
            (r#"{"adapters": [{"name": "a", "scale": -1e300}]}"#, "adapters[0].scale"),
            (r#"{"adapters": [{"name": "a", "weight": 1}]}"#, "adapters[0].weight"),
            (r#"{"adapter": {"generation": "x"}}"#, "adapter"),
            (r#"{"adapters": [], "lora": []}"#, "lora"),
            (r#"{"adapter": "a", "adapter_id": "a"}"#, "adapter_id"),
            (r#"{"lora_path": ["a", "b"]}"#, "lora_path"),
            (&many, "adapters"),
        ] {
            let error = serde_json::to_value(parse(body).unwrap_err().into_envelope()).unwrap();
            assert_eq!(error["error"]["param"], place, "{body}: {error}");
        }
    }
}
