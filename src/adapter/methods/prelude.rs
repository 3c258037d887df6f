//! Prompt tuning (Lester et al. 2021), P-tuning (Liu et al. 2021) and prefix tuning (Li and Liang 2021): positions that
//! stand before every sequence.

use std::sync::Arc;

use crate::adapter::canonical::{Adapter, AdapterWeights, Method, Prelude};
use crate::adapter::error::AdapterError;
use crate::adapter::peft_config::{PreludeConfig, PreludeKind};
use crate::adapter::tensors::Tensors;
use crate::model::spec::ModelSpec;

/// The one key of the file.
const KEY: &str = "prompt_embeddings";

/// # Errors
/// When the file holds anything but the prompt, or the prompt has the wrong shape or type or a value that is not finite.
pub fn load(config: &PreludeConfig, mut tensors: Tensors<'_>, spec: &ModelSpec) -> Result<Adapter, AdapterError> {
    config.check_base(spec)?;
    let prompt = tensors.take(KEY);
    tensors.refuse_rest()?;
    let prompt = prompt.ok_or_else(|| AdapterError::Sites(format!("the file holds no tensor {KEY:?}")))?;

    let num_tokens = config.num_virtual_tokens;
    let (method, prelude) = match config.kind {
        PreludeKind::PromptTuning | PreludeKind::PTuning => {
            prompt.check_shape(&[num_tokens, spec.hidden_size])?;
            let rows = prompt.f32_values()?;
            let is_prompt_tuning = config.kind == PreludeKind::PromptTuning;
            let method = if is_prompt_tuning { Method::PromptTuning } else { Method::PTuning };
            (method, Prelude::Embeddings { num_tokens, rows })
        }
        PreludeKind::PrefixTuning => {
            // `[num_tokens][num_layers][K, V][num_kv_heads · head_dim]`
            let width = spec.num_kv_heads * spec.head_dim;
            prompt.check_shape(&[num_tokens, 2 * spec.num_layers * width])?;
            // The KV store keeps f16.
            let values = prompt.f16_values()?;
            let part = |index: usize| -> Vec<f32> {
                let tokens = values.chunks_exact(2 * spec.num_layers * width);
                tokens.flat_map(|token| &token[index * width..][..width]).map(|value| value.to_f32()).collect()
            };
            let keys = (0..spec.num_layers).map(|layer| part(2 * layer)).collect();
            let values = (0..spec.num_layers).map(|layer| part(2 * layer + 1)).collect();
            (Method::PrefixTuning, Prelude::KeyValues { num_tokens, keys, values })
        }
    };
    let weights = Arc::new(AdapterWeights { prelude: Some(prelude), ..AdapterWeights::default() });
    Ok(Adapter { method, weights, ..Adapter::default() })
}
