//! The activations of a step in device memory.

use crate::device::Output;
use crate::shape::DecoderShape;

use super::args::{BlockMeta, SUPER};
use super::attention::AttentionShape;
use super::driver::{DeviceMemory, Driver, DriverError};
use super::head::{RowSummary, scratch_bytes};

/// Rows whose logits are computed together.
pub(super) const LOGITS_ROWS: usize = 64;

/// What is kept between two launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Buffer {
    /// f32 `[rows, hidden]`
    Hidden,
    /// f32 `[rows, width]`: what the next linear layers read.
    Exact,
    /// The same as int8, and its [`BlockMeta`].
    Values,
    Meta,
    /// The input of each product of a call, scaled by adapters.
    ScaledValues,
    ScaledMeta,
    /// f32 `[products, rows, width]`
    ScaledExact,
    /// f32 `[products, rows, rank stride]`
    Shrunk,
    /// f16 `[rows, heads · head_dim]`: rotated queries.
    Queries,
    /// Of attention: what parts of a context give.
    Partials,
    /// f32 `[LOGITS_ROWS, vocab]`
    Logits,
    /// Of the head: what slices of the vocabulary give.
    Slices,
    /// [`RowSummary`] `[LOGITS_ROWS]`
    Summaries,
    Q,
    K,
    V,
    Gate,
    Up,
    Residual,
}

const ALL: [Buffer; 19] = [
    Buffer::Hidden,
    Buffer::Exact,
    Buffer::Values,
    Buffer::Meta,
    Buffer::ScaledValues,
    Buffer::ScaledMeta,
    Buffer::ScaledExact,
    Buffer::Shrunk,
    Buffer::Queries,
    Buffer::Partials,
    Buffer::Logits,
    Buffer::Slices,
    Buffer::Summaries,
    Buffer::Q,
    Buffer::K,
    Buffer::V,
    Buffer::Gate,
    Buffer::Up,
    Buffer::Residual,
];

impl Buffer {
    pub fn of(output: Output) -> Self {
        match output {
            Output::Q => Self::Q,
            Output::K => Self::K,
            Output::V => Self::V,
            Output::Gate => Self::Gate,
            Output::Up => Self::Up,
            Output::Residual => Self::Residual,
        }
    }

    fn bytes(self, shape: &DecoderShape, attention: &AttentionShape, rows: usize, rank_stride: usize) -> usize {
        let (hidden, intermediate) = (shape.hidden_size, shape.intermediate_size);
        let widest = intermediate.max(shape.q_width()).max(hidden);
        let slots = shape.num_slots(rows);
        let stride = |width: usize| width.next_multiple_of(SUPER);
        // Of rows as attention reads them, and of slots as what follows the activation does.
        let all = |width: &dyn Fn(usize) -> usize| (rows * width(widest)).max(slots * width(intermediate));
        // Products that share an input read the hidden state; there are three at most, and two of experts.
        let scaled =
            |width: &dyn Fn(usize) -> usize| all(width).max(3 * rows * width(hidden)).max(2 * slots * width(hidden));
        let meta = size_of::<BlockMeta>();
        match self {
            Self::Hidden | Self::Residual => rows * hidden * 4,
            Self::Exact => all(&|width| width) * 4,
            Self::Values => all(&stride),
            Self::Meta => all(&stride) / 32 * meta,
            Self::ScaledValues => scaled(&stride),
            Self::ScaledMeta => scaled(&stride) / 32 * meta,
            Self::ScaledExact => scaled(&|width| width) * 4,
            Self::Shrunk => (3 * rows).max(2 * slots) * rank_stride * 4,
            Self::Queries => rows * shape.q_width() * 2,
            Self::Partials => attention.workspace_bytes(rows),
            Self::Logits => LOGITS_ROWS * shape.vocab_size * 4,
            Self::Slices => scratch_bytes(LOGITS_ROWS, shape.vocab_size),
            Self::Summaries => LOGITS_ROWS * RowSummary::BYTES,
            Self::Q => rows * shape.q_width() * 4,
            Self::K | Self::V => rows * shape.kv_width() * 4,
            Self::Gate | Self::Up => slots * intermediate * 4,
        }
    }
}

#[derive(Debug)]
pub(super) struct Buffers<D: Driver> {
    pub rows: usize,
    pub rank_stride: usize,
    /// `[Buffer as usize]`
    memory: Vec<D::Memory>,
}

impl<D: Driver> Buffers<D> {
    /// For steps of up to `rows` rows and low-rank pairs of up to `rank_stride` ranks.
    pub fn new(
        driver: &D,
        shape: &DecoderShape,
        attention: &AttentionShape,
        rows: usize,
        rank_stride: usize,
    ) -> Result<Self, DriverError> {
        let rows = rows.max(LOGITS_ROWS);
        let allocate = |buffer: Buffer| driver.allocate(buffer.bytes(shape, attention, rows, rank_stride));
        Ok(Self { rows, rank_stride, memory: ALL.into_iter().map(allocate).collect::<Result<_, _>>()? })
    }

    /// Takes memory for more ranks. All else stays where it is.
    pub fn grow_ranks(
        &mut self,
        driver: &D,
        shape: &DecoderShape,
        attention: &AttentionShape,
        rank_stride: usize,
    ) -> Result<(), DriverError> {
        let bytes = Buffer::Shrunk.bytes(shape, attention, self.rows, rank_stride);
        self.memory[Buffer::Shrunk as usize] = driver.allocate(bytes)?;
        self.rank_stride = rank_stride;
        Ok(())
    }

    /// Bytes that such buffers take.
    pub fn bytes(shape: &DecoderShape, attention: &AttentionShape, rows: usize, rank_stride: usize) -> usize {
        let rows = rows.max(LOGITS_ROWS);
        let bytes = |buffer: Buffer| buffer.bytes(shape, attention, rows, rank_stride).next_multiple_of(512);
        ALL.into_iter().map(bytes).sum()
    }

    pub fn memory(&self, buffer: Buffer) -> &D::Memory {
        &self.memory[buffer as usize]
    }

    pub fn address(&self, buffer: Buffer) -> u64 {
        self.memory(buffer).address()
    }
}
