//! The decoder: what one forward pass sees and what it gives back.

pub mod adapted_linear;
pub mod base_weights;
pub mod catalogue;
pub mod decoder;
mod embedding;
pub mod gguf;
pub mod pull;
pub mod spec;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kernels::attention::{BlockId, KvStore};

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

/// The block `to` is to begin as the block `from` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: BlockId,
    pub to: BlockId,
}

/// One sequence's share of a batch.
#[derive(Debug, Clone)]
pub struct SequenceRows<'a> {
    pub rows: Range<usize>,
    /// Position of the first of these rows in the sequence; all earlier positions are already in the KV store.
    pub first_position: usize,
    /// KV blocks of the sequence; covers at least `first_position + rows.len()` positions.
    pub block_table: &'a [BlockId],
}

/// Rows that run with one adapter.
#[derive(Debug, Clone)]
pub struct AdapterGroup {
    pub rows: Range<usize>,
    pub adapter: Arc<Adapter>,
}

/// Tokens from here on are not of the vocabulary: `FIRST_VIRTUAL_TOKEN + i` is position `i` of the prelude of the row's
/// adapter.
pub const FIRST_VIRTUAL_TOKEN: u32 = 1 << 31;

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
}

/// Why a step could not be run: a fault of the server, never of a request.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error("base layer: {0}")]
    BaseLayer(#[from] candle_core::Error),
    #[error("token {0} is neither of the vocabulary nor of the prelude of its row's adapter")]
    Token(u32),
}

/// A model the engine can step. One thread owns it.
pub trait Model: Send {
    fn spec(&self) -> &ModelSpec;

    /// Runs the batch: writes the K and V of every row into `kv` and calls `on_logits(i, logits)` once for each
    /// `batch.logits_rows[i]`, in order, with `logits` of `[vocab_size]` that the callee may change freely.
    ///
    /// A row's arithmetic depends on its own sequence and adapter alone, never on its neighbours in the batch.
    fn forward(
        &mut self,
        batch: &ForwardBatch<'_>,
        kv: &mut KvStore,
        on_logits: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<(), StepError>;
}
