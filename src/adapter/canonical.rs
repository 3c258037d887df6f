//! The one form every PEFT method is turned into; the kernels know nothing of PEFT names.
//!
//! `y = output_scale ∘ (W (input_scale ∘ x) + b + s·B(A x)) + bias`, where `b` is the base's own bias: a method that leaves
//! `b` unscaled folds the difference into `bias` when it loads.

use half::f16;
use kernels::low_rank::LowRank;

use super::manifest::AdapterManifest;
use crate::model::spec::Module;

/// What an adapter does at one site (a linear layer of one decoder block). Rows are in Hugging Face order.
#[derive(Debug, Default)]
pub struct SiteDelta {
    /// `[in]`
    pub input_scale: Option<Vec<f32>>,
    /// `s·B(A x)`, with the scale `s` folded in.
    pub low_rank: Option<LowRank>,
    /// `[out]`
    pub output_scale: Option<Vec<f32>>,
    /// `[out]`, added last.
    pub bias: Option<Vec<f32>>,
}

/// `E[x] + s·(Aᵀ[x])Bᵀ`: what an adapter adds to the embedding of a token.
#[derive(Debug)]
pub struct EmbeddingDelta {
    pub rank: usize,
    /// `[vocab_size, rank]`
    pub a: Vec<f16>,
    /// `[rank, hidden_size]`, with the scale folded in.
    pub b: Vec<f32>,
}

/// What an adapter does to the output head.
#[derive(Debug)]
pub enum HeadDelta {
    Delta(SiteDelta),
    /// A head of its own, `[vocab_size, hidden_size]`, instead of the base's.
    Replaced(Vec<f16>),
}

/// What stands before the tokens of every sequence of an adapter: positions `0..num_tokens`, real tokens come after.
#[derive(Debug)]
pub enum Prelude {
    /// Rows in place of token embeddings, `[num_tokens, hidden_size]` (prompt tuning, P-tuning).
    Embeddings { num_tokens: usize, rows: Vec<f32> },
    /// Keys and values in place of computed ones, without rotary embedding (prefix tuning).
    /// `keys` and `values` are `[num_layers][num_tokens, num_kv_heads · head_dim]`, heads in Hugging Face order.
    KeyValues { num_tokens: usize, keys: Vec<Vec<f32>>, values: Vec<Vec<f32>> },
}

impl Prelude {
    /// Positions before the first real token.
    pub fn num_tokens(&self) -> usize {
        match self {
            Self::Embeddings { num_tokens, .. } | Self::KeyValues { num_tokens, .. } => *num_tokens,
        }
    }
}

/// A loaded adapter: one generation of one name, immutable. Sequences hold it by `Arc` for as long as they run.
#[derive(Debug, Default)]
pub struct Adapter {
    pub name: String,
    /// SHA-256 of the adapter's files, hexadecimal: what a sequence and its KV blocks are pinned to.
    pub generation: String,
    /// `[num_layers][Module as usize]`
    pub layers: Vec<[Option<SiteDelta>; Module::ALL.len()]>,
    pub embedding: Option<EmbeddingDelta>,
    pub head: Option<HeadDelta>,
    pub prelude: Option<Prelude>,
    pub coverage: Coverage,
    /// What its author says about it, and the defaults of its requests.
    pub manifest: AdapterManifest,
}

impl Adapter {
    pub fn site(&self, layer: usize, module: Module) -> Option<&SiteDelta> {
        self.layers[layer][module as usize].as_ref()
    }

    /// Positions before the first real token of a sequence.
    pub fn num_virtual_tokens(&self) -> usize {
        self.prelude.as_ref().map_or(0, Prelude::num_tokens)
    }
}

/// How much of the base an adapter reaches, reported at load.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Sites the adapter changes.
    pub num_sites: usize,
    /// Sites its configuration names; equal to `num_sites`, or the adapter is refused.
    pub num_expected_sites: usize,
    pub max_rank: usize,
    /// Bytes of its weights in memory.
    pub resident_bytes: usize,
}
