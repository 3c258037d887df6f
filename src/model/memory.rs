//! What a model takes of the host's memory, by its shape and the types of its weights.

use std::convert::Infallible;

use kernels::attention::BLOCK_SIZE;
use kernels::host;
use kernels::low_rank::LowRank;
use kernels::quantized::{BlockFormat, WeightType};
use serde::Deserialize;

use super::base_weights::{EMBEDDING_TENSOR, HEAD_TENSOR};
use super::gguf::{GgufError, GgufFile};
use super::spec::{ModelSpec, Module};
use crate::config::EngineConfig;

/// Memory for keys and values on the host where nobody says otherwise.
const DEFAULT_KV_BYTES: usize = 1 << 30;
/// The rank that adapters are compared at.
pub const ADAPTER_RANK: usize = 16;

/// Bytes on the host. Beside them, the rows of the embedding that are in use stay in memory as part of the mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Of all linear layers and the head.
    pub weight_bytes: usize,
    /// Of a LoRA of rank [`ADAPTER_RANK`] on every linear layer.
    pub adapter_bytes: usize,
}

impl Memory {
    /// `weight_type` says the type of a tensor by its name in GGUF and the length of its rows.
    ///
    /// # Errors
    /// Those of `weight_type`.
    pub fn of<E>(spec: &ModelSpec, weight_type: impl Fn(&str, usize) -> Result<WeightType, E>) -> Result<Self, E> {
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let mut weight_bytes = host::weight_bytes(weight_type(HEAD_TENSOR, hidden)?, (vocab, hidden));
        let mut adapter_bytes = 0;
        for layer in 0..spec.num_layers {
            for module in spec.modules() {
                let (inputs, outputs) = spec.module_shape(module);
                let name = format!("blk.{layer}.{}.weight", spec.file_rows(module).part);
                weight_bytes += host::weight_bytes(weight_type(&name, inputs)?, (outputs, inputs));
                adapter_bytes += LowRank::bytes_of(ADAPTER_RANK, inputs, outputs);
            }
        }
        Ok(Self { weight_bytes, adapter_bytes })
    }

    /// # Errors
    /// The file is of no decoder that is served, or lacks a matrix.
    pub fn of_file(file: &GgufFile) -> Result<Self, GgufError> {
        let is_tied = !file.has_tensor(HEAD_TENSOR);
        Self::of(&file.spec()?, |name, _| {
            file.weight_type(if is_tied && name == HEAD_TENSOR { EMBEDDING_TENSOR } else { name })
        })
    }

    /// Of a file that is not at hand.
    pub fn of_mix(spec: &ModelSpec, mix: Mix) -> Self {
        let weight_type = |name: &str, width| {
            // Routers stay as they are.
            if name.contains(Module::Router.gguf_name()) {
                return Ok::<_, Infallible>(WeightType::F32);
            }
            Ok(WeightType::Blocks(mix.format(has_six_bits(name, spec.num_layers), name, width)))
        };
        match Self::of(spec, weight_type) {
            Ok(memory) => memory,
            Err(never) => match never {},
        }
    }

    /// What a server of the base alone takes, with its KV store full.
    pub fn needed_bytes(&self, spec: &ModelSpec, config: &EngineConfig) -> usize {
        let asked = if config.context_length == 0 { usize::MAX } else { config.context_length };
        let spec = ModelSpec { context_length: spec.context_length.min(asked), ..spec.clone() };
        let num_blocks = host_kv_blocks(&spec, config);
        self.weight_bytes + num_blocks * kv_block_bytes(&spec, config) + rotary_bytes(&spec, num_blocks)
    }
}

/// Which types a file has its matrices in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Mix {
    /// llama.cpp's: Q6_K for the head, and for `v` and `down` of half of the layers, Q4_K for the rest; where rows do not divide
    /// into 256, Q8_0 and Q5_0.
    #[default]
    #[serde(rename = "q4_k_m")]
    Q4KM,
    /// llama.cpp's: Q4_1, but for the head.
    #[serde(rename = "q4_1")]
    Q4_1,
    /// What a checkpoint is quantized to unless `model.quantize` says otherwise: Q4_K, but for the head; Q4_1 where rows do not
    /// divide.
    #[serde(rename = "q4k")]
    Q4K,
}

impl Mix {
    fn format(self, has_six_bits: bool, name: &str, width: usize) -> BlockFormat {
        let is_wide = width.is_multiple_of(256);
        let has_six_bits = if self == Self::Q4KM { has_six_bits } else { name == HEAD_TENSOR };
        match (self, has_six_bits) {
            (_, true) if is_wide => BlockFormat::Q6_K,
            (_, true) => BlockFormat::Q8_0,
            (Self::Q4KM | Self::Q4K, false) if is_wide => BlockFormat::Q4_K,
            (Self::Q4KM, false) => BlockFormat::Q5_0,
            (Self::Q4K | Self::Q4_1, false) => BlockFormat::Q4_1,
        }
    }
}

/// Whether llama.cpp's Q4_K_M gives a matrix more bits: those outside of layers, and `v` and `down` of the first and the last
/// eighth of the layers and of every third between (`use_more_bits` in its `llama-quant.cpp`).
pub fn has_six_bits(name: &str, num_layers: usize) -> bool {
    let Some(layer) = name.split('.').nth(1).and_then(|number| number.parse::<usize>().ok()) else { return true };
    let eighth = num_layers / 8;
    let is_favoured = layer < eighth || layer >= 7 * num_layers / 8 || (layer - eighth) % 3 == 2;
    is_favoured && (name.contains("ffn_down") || name.contains("attn_v"))
}

/// Of one block of the KV store, over all layers.
pub fn kv_block_bytes(spec: &ModelSpec, config: &EngineConfig) -> usize {
    spec.shape().kv_block_bytes(config.kv_cache_type)
}

/// Of the keys and values of one token.
pub fn kv_token_bytes(spec: &ModelSpec, config: &EngineConfig) -> usize {
    kv_block_bytes(spec, config) / BLOCK_SIZE
}

/// Of the cosines and sines of all positions that there are blocks for.
fn rotary_bytes(spec: &ModelSpec, num_blocks: usize) -> usize {
    let num_angles: usize = spec.attention_plan().rotaries.iter().map(|rotary| rotary.frequencies.len()).sum();
    2 * size_of::<f32>() * num_angles * spec.context_length.min(num_blocks.saturating_mul(BLOCK_SIZE))
}

/// Blocks of the host's KV store: more than all sequences together could fill would never be touched.
pub fn host_kv_blocks(spec: &ModelSpec, config: &EngineConfig) -> usize {
    let bytes = if config.kv_cache_mib == 0 { DEFAULT_KV_BYTES } else { config.kv_cache_mib.saturating_mul(1 << 20) };
    (bytes / kv_block_bytes(spec, config)).clamp(1, max_kv_blocks(spec, config))
}

/// What all sequences together could fill.
pub fn max_kv_blocks(spec: &ModelSpec, config: &EngineConfig) -> usize {
    config.max_sequences.saturating_mul(spec.context_length.div_ceil(BLOCK_SIZE))
}

/// A size for people: `1.9 GiB`, `730 MiB`, `12 KiB`.
pub fn readable(bytes: usize) -> String {
    match bytes as f64 / 1024.0 {
        kib if kib >= 1024.0 * 1024.0 => format!("{:.1} GiB", kib / 1024.0 / 1024.0),
        kib if kib >= 1024.0 => format!("{:.0} MiB", kib / 1024.0),
        kib => format!("{kib:.0} KiB"),
    }
}

#[cfg(test)]
mod tests {
    use kernels::attention::KvType;

    use super::*;
    use crate::config::{Config, Overrides};
    use crate::model::random::{Shape, lora};

    #[test]
    fn an_adapter_takes_what_it_is_said_to_take() {
        let mut spec = "0.5b".parse::<Shape>().unwrap().spec;
        spec.num_layers = 2;
        let memory = Memory::of_mix(&spec, Mix::Q4KM);
        assert_eq!(memory.adapter_bytes, lora(&spec, ADAPTER_RANK, 1).coverage.resident_bytes);
    }

    #[test]
    fn half_of_the_layers_have_more_bits() {
        for (num_layers, expected) in [(24, 12), (28, 14), (32, 16), (36, 18), (64, 32)] {
            let favoured =
                (0..num_layers).filter(|layer| has_six_bits(&format!("blk.{layer}.attn_v.weight"), num_layers));
            assert_eq!(favoured.count(), expected, "{num_layers}");
        }
        assert!(!has_six_bits("blk.0.attn_q.weight", 24) && has_six_bits("output.weight", 24));
    }

    #[test]
    fn the_kv_store_is_no_larger_than_what_sequences_fill() {
        let spec = "0.5b".parse::<Shape>().unwrap().spec;
        let default = Config::load(None, &Overrides::default()).unwrap().engine;
        let config = |kv_cache_mib, max_sequences| EngineConfig { kv_cache_mib, max_sequences, ..default.clone() };
        // 24 layers, 2 heads of 64 dimensions, keys and values, f16.
        assert_eq!(kv_token_bytes(&spec, &config(0, 64)), 24 * 2 * 64 * 2 * 2);
        assert_eq!(host_kv_blocks(&spec, &config(0, 64)), (1 << 30) / (12_288 * 16));
        assert_eq!(host_kv_blocks(&spec, &config(1, 64)), (1 << 20) / (12_288 * 16));
        for kv_cache_mib in [1 << 20, 1 << 44] {
            assert_eq!(host_kv_blocks(&spec, &config(kv_cache_mib, 2)), 2 * 32_768 / 16);
        }
        // 34 bytes for 32 values, where f16 takes 64.
        let q8 = EngineConfig { kv_cache_type: KvType::Q8_0, ..config(0, 64) };
        assert_eq!(kv_token_bytes(&spec, &q8), 12_288 / 64 * 34);
        assert_eq!(host_kv_blocks(&spec, &q8), (1 << 30) / (6_528 * 16));
    }

    #[test]
    fn what_is_needed_is_weights_keys_and_values_and_the_turns_of_positions() {
        let spec = "0.5b".parse::<Shape>().unwrap().spec;
        let default = Config::load(None, &Overrides::default()).unwrap().engine;
        let memory = Memory::of_mix(&spec, Mix::Q4KM);
        let beside = |context_length, max_sequences| {
            let config = EngineConfig { context_length, max_sequences, ..default.clone() };
            memory.needed_bytes(&spec, &config) - memory.weight_bytes
        };
        // A token's keys and values, and the cosines and sines of 32 angles.
        let (token, turns) = (12_288, 32 * 2 * 4);
        assert_eq!(beside(0, 64), (1 << 30) / (16 * token) * 16 * token + 32_768 * turns);
        assert_eq!(beside(0, 1), 32_768 * token + 32_768 * turns);
        assert_eq!(beside(1024, 2), 2 * 1024 * token + 1024 * turns);
        assert_eq!(beside(1 << 20, 1), beside(0, 1));
        // A store that is smaller than the context bounds the positions.
        let config = EngineConfig { kv_cache_mib: 6, max_sequences: 1, ..default };
        let num_positions = (6 << 20) / (16 * token) * 16;
        let needed = memory.needed_bytes(&spec, &config) - memory.weight_bytes;
        assert_eq!((num_positions, needed), (512, 512 * (token + turns)));
    }

    #[test]
    fn sizes_are_written_in_their_own_unit() {
        assert_eq!(
            [readable(2_040_109_466), readable(765_460_480), readable(12_288)],
            ["1.9 GiB", "730 MiB", "12 KiB"]
        );
    }
}
