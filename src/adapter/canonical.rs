//! The one form every PEFT method is turned into; the kernels know nothing of PEFT names.
//!
//! `y = output_scale ∘ (W (input_scale ∘ x) + b + s·B(A x)) + bias`, where `b` is the base's own bias: a method that leaves
//! `b` unscaled folds the difference into `bias` when it loads.

use std::fmt;

use half::f16;
use kernels::half_matrix::HalfMatrix;
use kernels::low_rank::LowRank;
use serde::Serialize;

use super::manifest::AdapterManifest;
use crate::model::spec::Module;

/// How an adapter was trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub enum Method {
    #[default]
    #[serde(rename = "lora")]
    Lora,
    #[serde(rename = "rslora")]
    RsLora,
    #[serde(rename = "dora")]
    Dora,
    #[serde(rename = "ia3")]
    Ia3,
    #[serde(rename = "prompt-tuning")]
    PromptTuning,
    #[serde(rename = "p-tuning")]
    PTuning,
    #[serde(rename = "prefix-tuning")]
    PrefixTuning,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The name it is serialized under.
        self.serialize(f)
    }
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
    fn bytes(&self) -> usize {
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

/// A loaded adapter: one generation of one name, immutable. Sequences hold it by `Arc` for as long as they run.
#[derive(Debug, Default)]
pub struct Adapter {
    pub name: String,
    /// SHA-256 of the adapter's files, hexadecimal: what a sequence and its KV blocks are pinned to.
    pub generation: String,
    pub method: Method,
    /// `[num_layers][Module as usize]`; empty where no layer is changed.
    pub layers: Vec<[Option<SiteDelta>; Module::ALL.len()]>,
    pub embedding: Option<EmbeddingDelta>,
    pub head: Option<HeadDelta>,
    pub prelude: Option<Prelude>,
    pub coverage: Coverage,
    /// What its author says about it, and the defaults of its requests.
    pub manifest: AdapterManifest,
    /// Of a composition, what it is made of; empty for an adapter of its own.
    pub members: Vec<Member>,
}

/// An adapter at a strength.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Member {
    pub name: String,
    pub generation: String,
    pub scale: f32,
}

impl Adapter {
    pub fn site(&self, layer: usize, module: Module) -> Option<&SiteDelta> {
        self.layers.get(layer)?[module as usize].as_ref()
    }

    /// The adapters of a composition, or this one at strength 1.
    pub fn members(&self) -> Vec<Member> {
        if self.members.is_empty() {
            vec![Member { name: self.name.clone(), generation: self.generation.clone(), scale: 1.0 }]
        } else {
            self.members.clone()
        }
    }

    /// Positions before the first real token of a sequence.
    pub fn num_virtual_tokens(&self) -> usize {
        self.prelude.as_ref().map_or(0, Prelude::num_tokens)
    }
}

/// How much of the base an adapter reaches, reported at load.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Sites the adapter changes, the embedding and the head among them.
    pub num_sites: usize,
    /// Sites its configuration names; equal to `num_sites`, or the adapter is refused.
    pub num_expected_sites: usize,
    pub max_rank: usize,
    /// Positions that stand before every sequence.
    pub num_virtual_tokens: usize,
    /// Bytes of its weights in memory.
    pub resident_bytes: usize,
}

impl Coverage {
    /// Of an adapter whose sites have been found to be those that its configuration names.
    pub fn of(adapter: &Adapter) -> Self {
        let Adapter { layers, embedding, head, prelude, .. } = adapter;
        let sites = || layers.iter().flatten().flatten();
        let head_delta = head.iter().filter_map(|head| match head {
            HeadDelta::Delta(delta) => Some(delta),
            HeadDelta::Replaced(_) => None,
        });
        let ranks = sites().chain(head_delta).filter_map(|site| Some(site.low_rank.as_ref()?.rank()));
        let num_sites = sites().count() + usize::from(embedding.is_some()) + usize::from(head.is_some());
        Self {
            num_sites,
            num_expected_sites: num_sites,
            max_rank: ranks.chain(embedding.iter().map(|delta| delta.rank)).max().unwrap_or(0),
            num_virtual_tokens: adapter.num_virtual_tokens(),
            resident_bytes: sites().map(SiteDelta::bytes).sum::<usize>()
                + embedding.as_ref().map_or(0, EmbeddingDelta::bytes)
                + head.as_ref().map_or(0, HeadDelta::bytes)
                + prelude.as_ref().map_or(0, Prelude::bytes),
        }
    }
}
