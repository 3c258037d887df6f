//! `generation_config.json` of a checkpoint: what ends an output, and what else would change every reply.

use std::path::Path;

use serde_json::{Map, Value};
use tracing::info;

use super::fields::ids;
use super::{CheckpointError, read_json};

pub const FILE: &str = "generation_config.json";

/// Fields that forbid or force tokens of every reply, which no request here can ask for.
const CONSTRAINTS: &[&str] = &[
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_decoder_ids",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "token_healing",
    "watermarking_config",
];
/// Those that a request says or goes without.
const LEFT_TO_REQUESTS: &[&str] =
    &["do_sample", "min_p", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p"];

/// The tokens that end an output, where the file is there and says them.
///
/// # Errors
/// When it forbids or forces tokens, by the name of the field.
pub fn ends(folder: &Path) -> Result<Option<Vec<u32>>, CheckpointError> {
    let values = read_json::<Map<String, Value>>(folder, FILE)?.unwrap_or_default();
    refuse_constraints(&values)?;
    let said = values.get("eos_token_id").filter(|value| !value.is_null());
    let wrong = || CheckpointError::file(FILE, "eos_token_id: is no token id");
    said.map(|value| ids(value).ok_or_else(wrong)).transpose()
}

fn refuse_constraints(values: &Map<String, Value>) -> Result<(), CheckpointError> {
    let is_off = |name: &str, value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(if name == "guidance_scale" { 1.0 } else { 0.0 }),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    };
    let said = |names: &[&'static str]| -> Vec<String> {
        let said = names.iter().filter_map(|name| values.get_key_value(*name));
        said.filter(|(name, value)| !is_off(name, value)).map(|(name, value)| format!("{name} {value}")).collect()
    };
    if let Some(constraint) = said(CONSTRAINTS).first() {
        return Err(CheckpointError::file(FILE, format!("{constraint} is not served: it would change every reply")));
    }
    let left = said(LEFT_TO_REQUESTS);
    if !left.is_empty() {
        info!("{FILE}: {} is left to requests", left.join(", "));
    }
    Ok(())
}
