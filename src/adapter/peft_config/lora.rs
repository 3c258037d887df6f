//! The configuration of LoRA and what grew from it: rsLoRA, DoRA, patterns, biases, a head saved whole.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::fields::{Fields, INSTEAD, checked_rank};
use crate::adapter::error::AdapterError;
use crate::adapter::path_pattern::PathPattern;
use crate::adapter::sites::{HEAD_PATH, SiteSelector, paths_in_training};

/// Entries of one `*_pattern`: several per site of any base, and few enough to compile.
const MAX_PATTERN_ENTRIES: usize = 2048;
/// Those of them that are more than a path, which may take a hundred times as much memory. Trainers write few.
const MAX_REGEX_ENTRIES: usize = 128;

/// PEFT's defaults for fields a file may leave out.
const DEFAULT_RANK: usize = 8;
pub(super) const DEFAULT_ALPHA: f64 = 8.0;

/// Initialisations that left the base as it was.
const PLAIN_INITS: [&str; 4] = ["eva", "gaussian", "mica", "orthogonal"];

/// What `init_lora_weights` decides about, which is read; what training and other runtimes need; and ms-swift's own fields
/// of training.
pub(super) const WITHOUT_EFFECT: &[&str] = &[
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_dropout",
    "lora_dtype",
    "lora_ga_config",
    "lorap_emb_lr",
    "lorap_lr_ratio",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
];

/// How the low-rank pairs of a LoRA adapter are to be applied.
#[derive(Debug)]
pub struct LoraConfig {
    pub selector: SiteSelector,
    /// Whether every site brings a `lora_B.bias`.
    pub lora_bias: bool,
    /// Whether every site brings a `lora_magnitude_vector`.
    pub use_dora: bool,
    pub use_rslora: bool,
    /// Whether the file holds a whole head.
    pub replaces_head: bool,
    rank: usize,
    alpha: f64,
    rank_pattern: Vec<(PathPattern, usize)>,
    alpha_pattern: Vec<(PathPattern, f64)>,
}

impl LoraConfig {
    /// # Errors
    /// When a field is malformed or asks for what this server does not do; names it.
    pub(super) fn read(mut fields: Fields) -> Result<Self, AdapterError> {
        fields.refuse_biases()?;
        // The other initialisations subtracted the initial delta from the base weights, which the file does not hold.
        match fields.take("init_lora_weights") {
            Value::Null | Value::Bool(_) => {}
            Value::String(name) if PLAIN_INITS.iter().any(|plain| name.eq_ignore_ascii_case(plain)) => {}
            other => {
                let reason = format!(
                    "{other} changed the base weights: save the adapter again with PEFT's \
                     path_initial_model_for_weight_conversion, or {INSTEAD}"
                );
                return Err(AdapterError::field("init_lora_weights", reason));
            }
        }

        let parameters: Vec<String> = fields.take_as("target_parameters")?.unwrap_or_default();
        let targets_parameters = !parameters.is_empty();
        let mut config = Self {
            rank: fields.take_rank("r", DEFAULT_RANK)?,
            alpha: fields.take_as("lora_alpha")?.unwrap_or(DEFAULT_ALPHA),
            rank_pattern: take_patterns(&mut fields, "rank_pattern", checked_rank)?,
            alpha_pattern: take_patterns(&mut fields, "alpha_pattern", |_, alpha| Ok(alpha))?,
            use_rslora: fields.take_as("use_rslora")?.unwrap_or(false),
            use_dora: fields.take_as("use_dora")?.unwrap_or(false),
            lora_bias: fields.take_as("lora_bias")?.unwrap_or(false),
            selector: fields.take_selector(parameters)?,
            replaces_head: false,
        };
        fields.take_layers(&mut config.selector)?;
        let saved: Vec<String> = fields.take_as("modules_to_save")?.unwrap_or_default();
        if let Some(module) = saved.iter().find(|module| *module != HEAD_PATH) {
            let reason = format!("{module:?} is not supported (supported: {HEAD_PATH}): {INSTEAD}");
            return Err(AdapterError::field("modules_to_save", reason));
        }
        let tokens = fields.take("trainable_token_indices");
        if ![Value::Null, json!([]), json!({})].contains(&tokens) {
            let reason = format!("embeddings of single tokens are not supported: {INSTEAD}");
            return Err(AdapterError::field("trainable_token_indices", reason));
        }
        config.replaces_head = !saved.is_empty();
        for (is_set, field) in [(config.use_dora, "use_dora"), (config.lora_bias, "lora_bias")] {
            if is_set && targets_parameters {
                return Err(AdapterError::field(field, "not defined together with target_parameters"));
            }
        }
        if config.use_dora && config.lora_bias {
            return Err(AdapterError::field("use_dora", "not defined together with lora_bias"));
        }
        fields.refuse_rest(WITHOUT_EFFECT)?;
        Ok(config)
    }

    /// Rank of the pair at a module path.
    ///
    /// # Errors
    /// When a pattern takes too many steps; names its field.
    pub fn rank(&self, path: &str) -> Result<usize, AdapterError> {
        Ok(first_match(&self.rank_pattern, path)?.unwrap_or(self.rank))
    }

    /// What the delta at a module path is multiplied by.
    ///
    /// # Errors
    /// When it is no finite 32-bit number, or as [`LoraConfig::rank`].
    pub fn scale(&self, path: &str) -> Result<f32, AdapterError> {
        let rank = self.rank(path)? as f64;
        let alpha = first_match(&self.alpha_pattern, path)?.unwrap_or(self.alpha);
        let scale = (alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32;
        if scale.is_finite() {
            Ok(scale)
        } else {
            Err(AdapterError::field("lora_alpha", format!("{alpha} gives no finite scale at {path}")))
        }
    }
}

fn first_match<T: Copy>(patterns: &[(PathPattern, T)], path: &str) -> Result<Option<T>, AdapterError> {
    let paths = paths_in_training(path);
    for (pattern, value) in patterns {
        if pattern.matches_any(&paths)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// The entries of a `*_pattern` in the order of the file: of several that match, PEFT takes the first.
fn take_patterns<T: DeserializeOwned, U>(
    fields: &mut Fields,
    field: &str,
    check: impl Fn(&str, T) -> Result<U, AdapterError>,
) -> Result<Vec<(PathPattern, U)>, AdapterError> {
    let entries: Map<String, Value> = fields.take_as(field)?.unwrap_or_default();
    let is_regex = |key: &&String| key.contains(|c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c)));
    for (count, limit, what) in [
        (entries.len(), MAX_PATTERN_ENTRIES, "entries"),
        (entries.keys().filter(is_regex).count(), MAX_REGEX_ENTRIES, "entries that are patterns, not paths"),
    ] {
        if count > limit {
            return Err(AdapterError::field(field, format!("{count} {what}: at most {limit} are read")));
        }
    }
    let compile = |(key, value)| {
        let field = format!("{field}[{key}]");
        let value = serde_json::from_value(value).map_err(|e| AdapterError::field(&field, e))?;
        Ok((PathPattern::whole(&field, &format!(r"(?:.*\.)?(?:{key})"))?, check(&field, value)?))
    };
    entries.into_iter().map(compile).collect()
}
