//! The decoder: what one forward pass sees and what it gives back.

pub mod base_file;
pub mod base_weights;
pub mod catalogue;
pub mod checkpoint;
pub mod decoder;
pub mod family;
pub mod file;
pub mod gguf;
pub mod host_memory;
pub mod listing;
pub mod memory;
pub mod metadata;
pub mod pull;
pub mod random;
pub mod resident;
pub mod rope;
pub mod spec;
pub mod tensors;
pub mod unquantized;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kernels::attention::KvStore;
use kernels::device::{AdapterTier, Caller, DeviceError, Lease, Peaks, Placement};
pub use kernels::step::{BlockCopy, FIRST_VIRTUAL_TOKEN, SequenceRows};

use crate::adapter::canonical::Adapter;
use gguf::GgufError;
use spec::{ModelSpec, Module};

/// The rows of one step, packed: prefill chunks and decode rows of many sequences, each row one token position.
///
/// Rows of one sequence are contiguous and in position order; sequences of one adapter are contiguous.
#[derive(Debug)]
pub struct ForwardBatch<'a> {
    /// Blocks to be copied in the KV store before any row is computed.
    pub copies: &'a [BlockCopy],
    /// Token ids, `[rows]`.
    pub tokens: &'a [u32],
    /// The sequences in row order; their ranges cover `0..rows` without gaps.
    pub sequences: &'a [SequenceRows<'a>],
    /// Row ranges that run with an adapter, ascending and disjoint. Rows outside every group run the base alone.
    pub groups: &'a [AdapterGroup],
    /// Rows whose logits are wanted, ascending.
    pub logits_rows: &'a [usize],
}

/// Rows that run with one adapter, which has been placed.
#[derive(Debug, Clone)]
pub struct AdapterGroup {
    pub rows: Range<usize>,
    pub adapter: Arc<Adapter>,
}

/// What the loader of an adapter may ask of the base. Rows are in Hugging Face order.
pub trait BaseWeights: fmt::Debug + Send + Sync {
    fn spec(&self) -> &ModelSpec;

    /// Row `row` of a linear layer, dequantized: `[in_features]`.
    ///
    /// # Errors
    /// When the file of the base cannot be read any more.
    fn dequantize_row(&self, layer: usize, module: Module, row: usize, values: &mut [f32]) -> Result<(), GgufError>;

    /// The layer's own bias, `[out_features]`, where it has one.
    ///
    /// # Errors
    /// When the file of the base cannot be read any more.
    fn bias(&self, layer: usize, module: Module) -> Result<Option<Vec<f32>>, GgufError>;

    /// The row of `token`, dequantized: `[hidden_size]`.
    fn dequantize_token(&self, matrix: VocabularyMatrix, token: usize, values: &mut [f32]);

    /// Bits that the file has for each weight of the matrix.
    fn bits_per_weight(&self, matrix: VocabularyMatrix) -> f64;
}

/// A matrix with a row for every token, `[vocab_size, hidden_size]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VocabularyMatrix {
    Embedding,
    /// The embedding again where the base ties the two.
    Head,
}

/// A model the engine can step. One thread owns it, and it owns its KV store.
pub trait Model: Send {
    fn spec(&self) -> &ModelSpec;

    /// Blocks of the KV store.
    fn num_kv_blocks(&self) -> usize;

    /// The KV store, where it is in the host's memory.
    fn host_kv(&mut self) -> Option<&mut KvStore> {
        None
    }

    /// Sees to it that rows can run with an adapter; they may for as long as the lease is held. What is on its way comes with
    /// steps, or by [`Model::bring_adapters`].
    ///
    /// # Errors
    /// When it can never be held.
    fn place(&mut self, _adapter: &Adapter) -> Result<Placement, DeviceError> {
        Ok(Placement::Ready(Lease::default()))
    }

    /// Where no step is to be made: takes adapters on, and says whether one has arrived or failed.
    fn bring_adapters(&mut self) -> bool {
        false
    }

    /// What of the adapters is on the device, where that is not the host's memory.
    fn adapter_tier(&self) -> Option<AdapterTier> {
        None
    }

    /// Bytes of the weights on the device.
    fn weight_bytes(&self) -> usize {
        0
    }

    /// What the device can do at most, where it measures that.
    ///
    /// # Errors
    /// When it does not answer.
    fn measure_peaks(&self) -> Result<Option<Peaks>, DeviceError> {
        Ok(None)
    }

    /// Runs the batch: writes the K and V of every row and calls `caller.on_logits(i, logits)` once for each
    /// `batch.logits_rows[i]`, in order; before that `caller.meanwhile()`, when the device has all it needs.
    ///
    /// A row's arithmetic depends on its own sequence and adapter alone, never on its neighbours in the batch.
    ///
    /// # Errors
    /// When the device fails, a token is of no vocabulary, or `on_logits` does.
    fn forward(&mut self, batch: &ForwardBatch<'_>, caller: &mut dyn Caller) -> Result<(), DeviceError>;
}
