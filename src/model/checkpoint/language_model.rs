//! The language model within a checkpoint that also sees: its configuration is an object of the whole one's, and its tensors have
//! a prefix. What else there is, the tower and the projector of images, is left out.

use serde_json::{Map, Value, json};

use super::CheckpointError;
use super::config::WITHOUT_EFFECT;
use super::fields::refuse;

/// What a whole's configuration calls the language model's.
const PART: &str = "text_config";

/// Types of wholes, and of the language model in each.
const WHOLES: [(&str, &str); 2] = [("gemma3", "gemma3_text"), ("mistral3", "mistral")];

/// Fields that say how images are seen, or where they stand among the tokens.
const OF_IMAGES: &[&str] = &[
    "boi_token_index",
    "eoi_token_index",
    "image_token_id",
    "image_token_index",
    "mm_tokens_per_image",
    "multimodal_projector_bias",
    "projector_hidden_act",
    "spatial_merge_size",
    "vision_config",
    "vision_feature_layer",
];

/// The fields of the language model, if `values` are those of a whole that has one.
pub fn within(values: &Map<String, Value>) -> Result<Option<Map<String, Value>>, CheckpointError> {
    let model_type = values.get("model_type").and_then(Value::as_str);
    let Some((_, expected)) = WHOLES.iter().find(|(whole, _)| Some(*whole) == model_type) else { return Ok(None) };
    let part = values.get(PART).ok_or_else(|| refuse(PART, "is missing"))?;
    let mut part = part.as_object().ok_or_else(|| refuse(PART, "is no object"))?.clone();
    match part.get("model_type") {
        Some(found) if found == expected => {}
        found => {
            let found = found.unwrap_or(&Value::Null);
            return Err(refuse(&format!("{PART}.model_type"), format!("{found} is not {expected:?}")));
        }
    }
    for (name, value) in values {
        let is_left_out = name == PART || name == "model_type" || OF_IMAGES.contains(&name.as_str());
        if is_left_out || value.is_null() {
            continue;
        }
        // Who generates looks at the whole's tokens.
        let is_decided = name.ends_with("_token_id") || WITHOUT_EFFECT.contains(&name.as_str());
        match part.get(name).filter(|of_part| !of_part.is_null() && *of_part != value && !is_decided) {
            Some(of_part) => {
                return Err(refuse(name, format!("{value}, and in {PART} {of_part}: they must be the same")));
            }
            None => _ = part.insert(name.clone(), value.clone()),
        }
    }
    if *expected == "gemma3_text" {
        add_defaults_of_gemma3(&mut part);
    }
    Ok(Some(part))
}

/// What published configurations leave to the class: `Gemma3TextConfig` of transformers.
fn add_defaults_of_gemma3(part: &mut Map<String, Value>) {
    let Value::Object(defaults) = json!({
        "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096
    }) else {
        return;
    };
    for (name, value) in defaults {
        part.entry(name).or_insert(value);
    }
    if !part.contains_key("rope_parameters") {
        part.entry("rope_theta").or_insert(json!(1e6));
        part.entry("rope_local_base_freq").or_insert(json!(1e4));
    }
}

/// The name that a tensor of a whole would have in a checkpoint of the language model alone; `None` for what is not of it.
/// Before version 4.52 transformers had the prefix outside, since then it has it inside.
pub fn tensor_name(name: &str) -> Option<String> {
    const OF_IMAGES: [&str; 2] = ["vision_tower.", "multi_modal_projector."];
    let inner = name.strip_prefix("model.").unwrap_or(name);
    if OF_IMAGES.iter().any(|prefix| inner.starts_with(prefix)) {
        return None;
    }
    if let Some(inner) = name.strip_prefix("model.language_model.") {
        return Some(format!("model.{inner}"));
    }
    Some(name.strip_prefix("language_model.").unwrap_or(name).to_owned())
}
