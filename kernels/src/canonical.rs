//! The one form every PEFT method is turned into; the kernels know nothing of PEFT names.
//!
//! `y = output_scale ∘ (W (input_scale ∘ x) + b + s·B(A x)) + bias`, where `b` is the base's own bias: a method that leaves
//! `b` unscaled folds the difference into `bias` when it loads.

use half::f16;

use crate::half_matrix::HalfMatrix;
use crate::low_rank::LowRank;

/// Linear layers of a decoder block: q, k, v, o, gate, up, down.
pub const LAYERS_PER_BLOCK: usize = 7;
/// In a block with experts, the number of the router, which stands in the place of gate.
pub const ROUTER: usize = 4;

/// In a block with experts, the number of an expert's gate (`part` 0), up (1) or down (2).
pub const fn expert_layer(expert: usize, part: usize) -> usize {
    ROUTER + 1 + 3 * expert + part
}

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

impl SiteDelta {
    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        let vectors = [&self.input_scale, &self.output_scale, &self.bias].into_iter().flatten();
        self.low_rank.as_ref().map_or(0, LowRank::bytes) + vectors.map(|v| size_of_val(v.as_slice())).sum::<usize>()
    }
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

impl EmbeddingDelta {
    /// Adds what it changes for `token` to the token's embedding `[hidden_size]`.
    pub fn add_to(&self, token: usize, embedding: &mut [f32]) {
        let a = &self.a[token * self.rank..][..self.rank];
        for (a, b) in a.iter().zip(self.b.chunks_exact(embedding.len())) {
            let a = a.to_f32();
            embedding.iter_mut().zip(b).for_each(|(e, b)| *e += a * b);
        }
    }

    /// Bytes in memory.
    fn bytes(&self) -> usize {
        size_of_val(self.a.as_slice()) + size_of_val(self.b.as_slice())
    }
}

/// What an adapter does to the output head.
#[derive(Debug)]
pub enum HeadDelta {
    Delta(SiteDelta),
    /// A head of its own, `[vocab_size, hidden_size]`, instead of the base's.
    Replaced(HalfMatrix),
}

impl HeadDelta {
    /// Bytes in memory.
    fn bytes(&self) -> usize {
        match self {
            Self::Delta(delta) => delta.bytes(),
            Self::Replaced(matrix) => matrix.bytes(),
        }
    }
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

    /// Bytes in memory.
    fn bytes(&self) -> usize {
        match self {
            Self::Embeddings { rows, .. } => size_of_val(rows.as_slice()),
            Self::KeyValues { keys, values, .. } => {
                keys.iter().chain(values).map(|rows| size_of_val(rows.as_slice())).sum()
            }
        }
    }
}

/// All that an adapter does to the base's arithmetic.
#[derive(Debug, Default)]
pub struct AdapterWeights {
    /// `[num_layers][linear layer of the block]`, no longer than to the last change.
    pub layers: Vec<Vec<Option<SiteDelta>>>,
    pub embedding: Option<EmbeddingDelta>,
    pub head: Option<HeadDelta>,
    pub prelude: Option<Prelude>,
}

impl AdapterWeights {
    /// What it does to linear layer `module` of decoder block `layer`.
    pub fn site(&self, layer: usize, module: usize) -> Option<&SiteDelta> {
        self.layers.get(layer)?.get(module)?.as_ref()
    }

    /// Has it do this there.
    pub fn set_site(&mut self, layer: usize, module: usize, delta: SiteDelta) {
        if self.layers.len() <= layer {
            self.layers.resize_with(layer + 1, Vec::new);
        }
        let modules = &mut self.layers[layer];
        if modules.len() <= module {
            modules.resize_with(module + 1, || None);
        }
        modules[module] = Some(delta);
    }

    /// Every changed linear layer of a decoder block.
    pub fn sites(&self) -> impl Iterator<Item = &SiteDelta> {
        self.layers.iter().flatten().flatten()
    }

    /// What it adds to the base's head, unless it replaces it.
    pub fn head_delta(&self) -> Option<&SiteDelta> {
        match self.head.as_ref()? {
            HeadDelta::Delta(delta) => Some(delta),
            HeadDelta::Replaced(_) => None,
        }
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.sites().map(SiteDelta::bytes).sum::<usize>()
            + self.embedding.as_ref().map_or(0, EmbeddingDelta::bytes)
            + self.head.as_ref().map_or(0, HeadDelta::bytes)
            + self.prelude.as_ref().map_or(0, Prelude::bytes)
    }
}
