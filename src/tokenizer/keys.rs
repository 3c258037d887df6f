//! Which `tokenizer.ggml.*` keys are known: one that is not may change the tokens of a text.

use super::TokenizerError;
use crate::model::gguf::{GgufError, GgufFile};
use crate::model::metadata;

const PREFIX: &str = "tokenizer.ggml.";
/// Ids of tokens that no text becomes and no reply ends with are left alone.
const TOKEN_ID: &str = "_token_id";
/// Keys that are read, and a number of kinds that only encoders have.
const KNOWN: [&str; 9] = [
    "model",
    "pre",
    "tokens",
    "token_type",
    "token_type_count",
    "scores",
    "merges",
    "add_bos_token",
    "add_space_prefix",
];

/// Refuses a key that asks for what this tokenizer does not do; one that is off asks for nothing.
pub fn refuse_unknown(gguf: &GgufFile) -> Result<(), TokenizerError> {
    let is_known = |key: &str| match key.strip_prefix(PREFIX) {
        Some(name) => name.ends_with(TOKEN_ID) || KNOWN.contains(&name),
        None => true,
    };
    let unknown = gguf.metadata_pairs().filter(|(key, value)| !is_known(key) && !metadata::is_off(value));
    match unknown.min_by_key(|(key, _)| *key) {
        None => Ok(()),
        Some((key, value)) => {
            let reason = "this tokenizer does not do what it asks for; use another conversion";
            Err(GgufError::of_key(key, value, reason).into())
        }
    }
}
