//! The configuration of prompt tuning, P-tuning and prefix tuning.

use super::fields::Fields;
use crate::adapter::error::AdapterError;
use crate::model::spec::ModelSpec;

/// More than any trained prompt has, and few enough to stand before every sequence.
const MAX_VIRTUAL_TOKENS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreludeKind {
    PromptTuning,
    PTuning,
    PrefixTuning,
}

/// What stands before every sequence, and the shape of the base it was trained on where the file says it.
#[derive(Debug)]
pub struct PreludeConfig {
    pub kind: PreludeKind,
    pub num_virtual_tokens: usize,
    num_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    token_dim: Option<usize>,
}

impl PreludeConfig {
    /// # Errors
    /// When a field is malformed or asks for what this server does not do; names it.
    pub(super) fn read(mut fields: Fields, kind: PreludeKind) -> Result<Self, AdapterError> {
        let num_virtual_tokens = match fields.take_as("num_virtual_tokens")? {
            Some(number @ 1..=MAX_VIRTUAL_TOKENS) => number,
            Some(number) => {
                let reason = format!("{number} is not between 1 and {MAX_VIRTUAL_TOKENS}");
                return Err(AdapterError::field("num_virtual_tokens", reason));
            }
            None => return Err(AdapterError::field("num_virtual_tokens", "missing")),
        };
        if let Some(number) = fields.take_as::<usize>("num_transformer_submodules")?.filter(|number| *number != 1) {
            let reason = format!("{number} is not supported: a decoder has 1");
            return Err(AdapterError::field("num_transformer_submodules", reason));
        }
        let config = Self {
            kind,
            num_virtual_tokens,
            num_layers: fields.take_as("num_layers")?,
            num_attention_heads: fields.take_as("num_attention_heads")?,
            token_dim: fields.take_as("token_dim")?,
        };
        if kind == PreludeKind::PrefixTuning && !fields.is_null("init_weights") {
            fields.take_text("init_weights", &["zero"])?;
        }
        // The file holds what an encoder made of its weights: the encoder itself matters to training only.
        fields.refuse_rest(match kind {
            PreludeKind::PromptTuning => {
                &["prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"]
            }
            PreludeKind::PTuning => {
                &["encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"]
            }
            PreludeKind::PrefixTuning => &["encoder_hidden_size", "prefix_projection"],
        })?;
        Ok(config)
    }

    /// # Errors
    /// When a field says that it was trained on a base of another shape.
    pub fn check_base(&self, spec: &ModelSpec) -> Result<(), AdapterError> {
        // A prefix counts in the heads of keys and values.
        let (heads, token_dim) = match self.kind {
            PreludeKind::PrefixTuning => (spec.num_kv_heads, spec.num_kv_heads * spec.head_dim),
            PreludeKind::PromptTuning | PreludeKind::PTuning => (spec.num_heads, spec.hidden_size),
        };
        for (field, found, expected) in [
            ("num_layers", self.num_layers, spec.num_layers),
            ("num_attention_heads", self.num_attention_heads, heads),
            ("token_dim", self.token_dim, token_dim),
        ] {
            if let Some(found) = found.filter(|found| *found != expected) {
                let reason = format!("{found} is the shape of another base, this one has {expected}");
                return Err(AdapterError::field(field, reason));
            }
        }
        Ok(())
    }
}
