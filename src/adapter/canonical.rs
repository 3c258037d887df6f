//! The one form every PEFT method is turned into; the kernels know nothing of PEFT names.
//!
//! `y = (W x + b) + s·B(A x) + bias`: everything an adapter does comes after the base's own result, so that the base never
//! has to know who else reads its activations.

use kernels::low_rank::LowRank;

use super::manifest::AdapterManifest;
use crate::model::spec::Module;

/// What an adapter does at one site (a linear layer of one decoder block). Rows are in Hugging Face order.
#[derive(Debug)]
pub struct SiteDelta {
    /// `s·B(A x)`, with the scale `s` folded in.
    pub low_rank: Option<LowRank>,
    /// `[out]`, added to the base's own.
    pub bias: Option<Vec<f32>>,
}

/// A loaded adapter: one generation of one name, immutable. Sequences hold it by `Arc` for as long as they run.
#[derive(Debug)]
pub struct Adapter {
    pub name: String,
    /// SHA-256 of the adapter's files, hexadecimal: what a sequence and its KV blocks are pinned to.
    pub generation: String,
    /// `[num_layers][Module as usize]`
    pub layers: Vec<[Option<SiteDelta>; Module::ALL.len()]>,
    pub coverage: Coverage,
    /// What its author says about it, and the defaults of its requests.
    pub manifest: AdapterManifest,
}

impl Adapter {
    pub fn site(&self, layer: usize, module: Module) -> Option<&SiteDelta> {
        self.layers[layer][module as usize].as_ref()
    }
}

/// How much of the base an adapter reaches, reported at load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    /// Sites the adapter changes.
    pub num_sites: usize,
    /// Sites its configuration names; equal to `num_sites`, or the adapter is refused.
    pub num_expected_sites: usize,
    pub max_rank: usize,
    /// Bytes of its weights in memory.
    pub resident_bytes: usize,
}
