//! What a step tells the kernels: arrays at fixed places of one run of device memory, sent in one piece.
//!
//! The places depend on the capacity alone, so that recorded launches stay valid from step to step. Rows beyond the step's own,
//! up to the bucket that the launches were recorded for, are harmless: a token of the vocabulary, stored nowhere, no adapter,
//! no queries.

use crate::attention::BLOCK_SIZE;
use crate::device::{DeviceError, StepLimits};
use crate::shape::DecoderShape;
use crate::step::{SequenceRows, Step};

use super::adapters::{Adapters, Placed};
use super::args::AttendTile;
use super::attention::AttentionShape;
use super::driver::{DeviceMemory, Driver, DriverError};
use super::graphs::MAX_BUCKET;

/// The slot of a row whose K and V are not stored.
const NOT_STORED: i32 = -1;

/// What kind of launches a step needs, beside its number of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Needs {
    pub has_adapters: bool,
    /// An adapter scales the input of a layer.
    pub scales_inputs: bool,
    /// An adapter has a head of its own.
    pub replaces_head: bool,
}

/// Addresses of a step's arrays.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepAddresses {
    /// `u32 [rows]`
    pub tokens: u64,
    /// `i32 [rows]`
    pub positions: u64,
    /// `i32 [rows]`
    pub slots: u64,
    /// Tables of the rows' adapters, `u64 [rows]`.
    pub adapters: u64,
    /// `AttendTile [rows]`
    pub tiles: u64,
    /// `i32 [rows]`
    pub logits_rows: u64,
    /// Tables of the adapters of the rows whose logits are wanted, `u64 [rows]`.
    pub logits_adapters: u64,
    /// `i32` count, and after 16 bytes pairs of blocks, `i32 [max_sequences][2]`.
    pub copies: u64,
    /// `i32`
    pub block_tables: u64,
}

/// The arrays, in the order they lie in.
#[derive(Debug, Clone, Copy)]
enum Array {
    Adapters,
    LogitsAdapters,
    Tokens,
    Positions,
    Slots,
    Tiles,
    LogitsRows,
    Copies,
    /// The last: of it only what is used is sent.
    BlockTables,
}

/// Bytes before the pairs of blocks to be copied, the first four their number.
pub(super) const COPIES_HEAD: usize = 16;

/// Places of the arrays, from the beginning.
#[derive(Debug, Clone, Copy)]
struct Places {
    rows: usize,
    /// `[Array]`
    starts: [usize; 9],
    len: usize,
}

impl Places {
    /// A small step has the rows of its bucket, though there be fewer in any step.
    fn new(limits: StepLimits, context_length: usize) -> Self {
        let StepLimits { max_rows, max_sequences: sequences } = limits;
        let rows = max_rows.max(MAX_BUCKET);
        let table = (context_length.div_ceil(BLOCK_SIZE) + 1) * sequences;
        let sizes = [
            rows * 8,
            rows * 8,
            rows * 4,
            rows * 4,
            rows * 4,
            rows * 16,
            rows * 4,
            COPIES_HEAD + sequences * 8,
            table * 4,
        ];
        let mut len = 0;
        let starts = sizes.map(|size| {
            let start = len;
            len = (len + size).next_multiple_of(16);
            start
        });
        Self { rows, starts, len }
    }
}

#[derive(Debug)]
pub(super) struct StepData<D: Driver> {
    memory: D::Memory,
    places: Places,
    max_sequences: usize,
    /// As the memory is to become; reused.
    bytes: Vec<u8>,
    pub num_tiles: usize,
    pub num_copies: usize,
    pub needs: Needs,
}

/// Bytes that the arrays of such steps take.
pub(super) fn step_bytes(limits: StepLimits, context_length: usize) -> usize {
    Places::new(limits, context_length).len
}

impl<D: Driver> StepData<D> {
    pub fn new(driver: &D, limits: StepLimits, context_length: usize) -> Result<Self, DriverError> {
        let places = Places::new(limits, context_length);
        Ok(Self {
            memory: driver.allocate(places.len)?,
            places,
            max_sequences: limits.max_sequences,
            bytes: Vec::new(),
            num_tiles: 0,
            num_copies: 0,
            needs: Needs::default(),
        })
    }

    /// Whether the arrays hold such a step.
    pub fn holds(&self, step: &Step<'_>) -> bool {
        step.num_rows() <= self.places.rows && step.sequences.len().max(step.copies.len()) <= self.max_sequences
    }

    pub fn addresses(&self) -> StepAddresses {
        let [adapters, logits_adapters, tokens, positions, slots, tiles, logits_rows, copies, block_tables] =
            self.places.starts.map(|start| self.memory.address() + start as u64);
        StepAddresses { tokens, positions, slots, adapters, tiles, logits_rows, logits_adapters, copies, block_tables }
    }

    /// Writes the arrays of a step, with rows up to `bucket`.
    ///
    /// # Errors
    /// When a token is of neither the vocabulary nor a prelude, or an adapter is not on the device.
    pub fn write(
        &mut self,
        driver: &D,
        step: &Step<'_>,
        bucket: usize,
        shape: &DecoderShape,
        attention: &AttentionShape,
        adapters: &Adapters<D>,
    ) -> Result<(), DeviceError> {
        let num_blocks: usize = step.sequences.iter().map(num_blocks).sum();
        self.bytes.clear();
        self.bytes.resize(self.places.starts[Array::BlockTables as usize] + num_blocks * 4, 0);
        self.needs = Needs::default();
        self.put_adapters(step, adapters)?;
        self.put_tokens(step, shape.vocab_size)?;
        self.put_positions(step, bucket);
        self.put_tiles(step, attention);
        for (i, &row) in step.logits_rows.iter().enumerate() {
            self.put(Array::LogitsRows, i, &(row as i32).to_le_bytes());
        }
        self.num_copies = step.copies.len();
        self.put(Array::Copies, 0, &(self.num_copies as i32).to_le_bytes());
        for (i, copy) in step.copies.iter().enumerate() {
            self.put(Array::Copies, COPIES_HEAD / 4 + 2 * i, &copy.from.0.to_le_bytes());
            self.put(Array::Copies, COPIES_HEAD / 4 + 2 * i + 1, &copy.to.0.to_le_bytes());
        }
        Ok(driver.write(&self.memory, 0, &self.bytes)?)
    }

    /// Element `index` of array `array`.
    fn put<const N: usize>(&mut self, array: Array, index: usize, value: &[u8; N]) {
        let at = self.places.starts[array as usize] + index * N;
        self.bytes[at..at + N].copy_from_slice(value);
    }

    fn put_adapters(&mut self, step: &Step<'_>, adapters: &Adapters<D>) -> Result<(), DeviceError> {
        for group in step.groups.iter() {
            let Placed { address, needs, .. } = adapters.placed(group.generation)?;
            for row in group.rows.clone() {
                self.put(Array::Adapters, row, &address.to_le_bytes());
            }
            for (i, row) in step.logits_rows.iter().enumerate() {
                if group.rows.contains(row) {
                    self.put(Array::LogitsAdapters, i, &address.to_le_bytes());
                }
            }
            self.needs.has_adapters = true;
            self.needs.scales_inputs |= needs.scales_inputs;
            self.needs.replaces_head |= needs.replaces_head;
        }
        Ok(())
    }

    fn put_tokens(&mut self, step: &Step<'_>, vocab_size: usize) -> Result<(), DeviceError> {
        for (row, token) in step.rows(vocab_size).enumerate() {
            token.map_err(DeviceError::Token)?;
            self.put(Array::Tokens, row, &step.tokens[row].to_le_bytes());
        }
        Ok(())
    }

    fn put_positions(&mut self, step: &Step<'_>, bucket: usize) {
        for sequence in step.sequences {
            for (row, slot) in sequence.rows.clone().zip(sequence.slots()) {
                self.put(Array::Positions, row, &(slot.position as i32).to_le_bytes());
                let place = slot.block.0 as usize * BLOCK_SIZE + slot.offset;
                self.put(Array::Slots, row, &(place as i32).to_le_bytes());
            }
        }
        for row in step.num_rows()..bucket {
            self.put(Array::Slots, row, &NOT_STORED.to_le_bytes());
        }
    }

    /// Cuts the sequences into tiles, and writes their block tables one behind the other.
    fn put_tiles(&mut self, step: &Step<'_>, attention: &AttentionShape) {
        let (mut num_tiles, mut table) = (0, 0);
        for sequence in step.sequences {
            for tile in attention.tiles(sequence.rows.clone(), sequence.first_position, table) {
                let AttendTile { first_row, num_rows, first_position, block_table } = tile;
                for (i, field) in [first_row, num_rows, first_position, block_table].into_iter().enumerate() {
                    self.put(Array::Tiles, num_tiles * 4 + i, &field.to_le_bytes());
                }
                num_tiles += 1;
            }
            for block in &sequence.block_table[..num_blocks(sequence)] {
                self.put(Array::BlockTables, table, &block.0.to_le_bytes());
                table += 1;
            }
        }
        self.num_tiles = num_tiles;
    }
}

/// KV blocks that a sequence's rows see.
fn num_blocks(sequence: &SequenceRows<'_>) -> usize {
    (sequence.first_position + sequence.rows.len()).div_ceil(BLOCK_SIZE)
}
