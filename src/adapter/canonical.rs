//! A loaded adapter: its weights in the one form that every PEFT method is turned into, and what is known about it.

use std::fmt;
use std::sync::Arc;

pub use kernels::canonical::{AdapterWeights, EmbeddingDelta, HeadDelta, Prelude, SiteDelta};
use kernels::low_rank::LowRank;
use schemars::JsonSchema;
use serde::Serialize;

use super::manifest::AdapterManifest;
use crate::model::spec::Module;

/// How an adapter was trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, JsonSchema, Serialize)]
pub enum Method {
    #[default]
    #[serde(rename = "lora")]
    Lora,
    #[serde(rename = "rslora")]
    RsLora,
    #[serde(rename = "dora")]
    Dora,
    #[serde(rename = "adalora")]
    AdaLora,
    #[serde(rename = "vera")]
    Vera,
    #[serde(rename = "miss")]
    Miss,
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

/// A loaded adapter: one generation of one name, immutable. Sequences hold it by `Arc` for as long as they run.
#[derive(Debug, Default)]
pub struct Adapter {
    pub name: String,
    /// SHA-256 of the adapter's files, hexadecimal: what a sequence and its KV blocks are pinned to.
    pub generation: String,
    pub method: Method,
    /// Its layers are `[num_layers][Module::index]`.
    pub weights: Arc<AdapterWeights>,
    pub coverage: Coverage,
    /// What its author says about it, and the defaults of its requests.
    pub manifest: AdapterManifest,
    /// Of a composition, what it is made of; empty for an adapter of its own.
    pub members: Vec<Member>,
}

/// An adapter at a strength.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct Member {
    pub name: String,
    pub generation: String,
    pub scale: f32,
}

impl Adapter {
    pub fn site(&self, layer: usize, module: Module) -> Option<&SiteDelta> {
        self.weights.site(layer, module.index())
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
        self.weights.prelude.as_ref().map_or(0, Prelude::num_tokens)
    }
}

/// How much of the base an adapter reaches, reported at load.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Sites the adapter changes, the embedding and the head among them.
    pub num_sites: usize,
    /// Sites its configuration names, but those of which AdaLoRA left nothing; equal to `num_sites`, or the adapter is refused.
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
        let AdapterWeights { embedding, head, .. } = &*adapter.weights;
        let sites = adapter.weights.sites().chain(adapter.weights.head_delta());
        let ranks = sites.filter_map(|site| site.low_rank.as_ref().map(LowRank::rank));
        let num_sites =
            adapter.weights.sites().count() + usize::from(embedding.is_some()) + usize::from(head.is_some());
        Self {
            num_sites,
            num_expected_sites: num_sites,
            max_rank: ranks.chain(embedding.iter().map(|delta| delta.rank)).max().unwrap_or(0),
            num_virtual_tokens: adapter.num_virtual_tokens(),
            resident_bytes: adapter.weights.bytes(),
        }
    }
}
