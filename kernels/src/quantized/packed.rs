//! The packed form: tiles of 16 output rows, all that a tile needs of one block of 32 inputs side by side in memory.
//!
//! One record per (tile, block of 32 inputs), so that a tile is one forward stream through memory:
//!
//! ```text
//! weights   quad q of row r holds the inputs 4q..4q+4: 64-byte vectors [16 rows][4 inputs], 8 quads
//!           low 4 bits:  4 vectors, quads 0..4 in the low nibbles and quads 4..8 in the high ones
//!           fifth bits:  1 vector, bit q of a byte belongs to quad q
//!           bits 5 and 6: 2 vectors of bit pairs, for quads 0..4 and 4..8
//!           8-bit:       8 vectors
//! scales    f16 [groups][16 rows], one group per 32 or two groups of 16 inputs
//! minima    f16 [groups][16 rows], where the format has them
//! ```

use std::io;

use half::f16;

use super::blocks::{Block32, BlockFormat};
use crate::Cpu;
use crate::arena::Memory;
use crate::threads::DisjointMut;

pub(crate) const ROWS_PER_TILE: usize = 16;
/// Bytes of one 64-byte vector of a record: one quad of all rows of a tile.
const VECTOR: usize = 64;

/// What varies between records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Bits per weight in memory: 4, 5, 6 or 8.
    pub bits: usize,
    /// Scales per 32 inputs: 1 or 2.
    pub groups: usize,
    pub has_min: bool,
}

impl Layout {
    pub fn of(format: BlockFormat) -> Self {
        use BlockFormat::*;
        let (bits, groups, has_min) = match format {
            Q4_0 => (4, 1, false),
            Q4_1 | Q4_K => (4, 1, true),
            Q5_0 | MXFP4 => (5, 1, false),
            Q5_1 | Q5_K => (5, 1, true),
            // Tables are looked up once, here.
            Q8_0 | IQ4_NL | IQ4_XS => (8, 1, false),
            Q2_K => (4, 2, true),
            Q3_K => (4, 2, false),
            Q6_K => (6, 2, false),
        };
        Self { bits, groups, has_min }
    }

    pub const fn weight_bytes(self) -> usize {
        VECTOR * self.bits
    }

    pub const fn scales_bytes(self) -> usize {
        2 * ROWS_PER_TILE * self.groups
    }

    pub const fn record_bytes(self) -> usize {
        self.weight_bytes() + self.scales_bytes() * if self.has_min { 2 } else { 1 }
    }
}

/// A weight matrix `[out_features, in_features]` in the packed form.
#[derive(Debug)]
pub struct PackedMatrix {
    out_features: usize,
    in_features: usize,
    layout: Layout,
    offset: i32,
    /// `[out_features / 16, rounded up][in_features / 32]` records; each is a multiple of 32 bytes, and so aligned.
    records: Memory,
}

/// Why a tensor cannot be packed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PackError {
    #[error("rows of {width} weights do not divide into blocks of {block_len} ({format:?})")]
    Width { width: usize, block_len: usize, format: BlockFormat },
    #[error("{got} bytes for a {format:?} matrix of {expected} bytes")]
    Length { got: usize, expected: usize, format: BlockFormat },
    #[error("no memory for {bytes} bytes of weights: {reason}")]
    Memory { bytes: usize, reason: String },
}

/// Bytes of a row of the file, whose matrix `[out_features, in_features]` is `bytes`.
pub(crate) fn row_bytes_of(
    format: BlockFormat,
    (out_features, in_features): (usize, usize),
    bytes: &[u8],
) -> Result<usize, PackError> {
    let row_bytes = format.row_bytes(in_features).ok_or(PackError::Width {
        width: in_features,
        block_len: format.block_len(),
        format,
    })?;
    if bytes.len() != row_bytes * out_features {
        return Err(PackError::Length { got: bytes.len(), expected: row_bytes * out_features, format });
    }
    Ok(row_bytes)
}

impl PackedMatrix {
    /// Packs a matrix as it lies in the file, row-major `[out_features, in_features]`.
    ///
    /// `row_order[i]` says which row of the file becomes row `i`; `None` keeps the order.
    pub fn pack(
        cpu: &Cpu,
        format: BlockFormat,
        (out_features, in_features): (usize, usize),
        bytes: &[u8],
        row_order: Option<&[usize]>,
    ) -> Result<Self, PackError> {
        let row_bytes = row_bytes_of(format, (out_features, in_features), bytes)?;
        let layout = Layout::of(format);
        let num_tiles = out_features.div_ceil(ROWS_PER_TILE);
        let num_blocks = in_features / 32;
        let per_tile = num_blocks * layout.record_bytes();
        let needed = Self::bytes_of(format, (out_features, in_features));
        let no_memory = |e: io::Error| PackError::Memory { bytes: needed, reason: e.to_string() };
        let mut records = cpu.arena().take(needed).map_err(no_memory)?;
        let target = DisjointMut::new(&mut records);
        cpu.pool().run(num_tiles, &|tile| {
            // SAFETY: each task takes its own tile.
            let tile_records = unsafe { target.slice(tile * per_tile, per_tile) };
            let mut row = vec![Block32::default(); num_blocks];
            for r in 0..ROWS_PER_TILE.min(out_features - tile * ROWS_PER_TILE) {
                let out_row = tile * ROWS_PER_TILE + r;
                let source = row_order.map_or(out_row, |order| order[out_row]);
                format.decode_row(&bytes[source * row_bytes..][..row_bytes], &mut row);
                for (block, record) in row.iter().zip(tile_records.chunks_exact_mut(layout.record_bytes())) {
                    write_row(layout, record, r, block);
                }
            }
        });
        Ok(Self { out_features, in_features, layout, offset: format.offset(), records })
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bytes in memory of a matrix `[out_features, in_features]` whose rows divide into blocks.
    pub fn bytes_of(format: BlockFormat, (out_features, in_features): (usize, usize)) -> usize {
        out_features.div_ceil(ROWS_PER_TILE) * (in_features / 32) * Layout::of(format).record_bytes()
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.records.len()
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    pub(crate) fn offset(&self) -> i32 {
        self.offset
    }

    pub(crate) fn num_tiles(&self) -> usize {
        self.out_features.div_ceil(ROWS_PER_TILE)
    }

    /// The records of one tile, in input order.
    pub(crate) fn tile(&self, tile: usize) -> &[u8] {
        let per_tile = self.in_features / 32 * self.layout.record_bytes();
        &self.records[tile * per_tile..][..per_tile]
    }
}

/// Sets row `r` of a record that was zero.
fn write_row(layout: Layout, record: &mut [u8], r: usize, block: &Block32) {
    for (k, &q) in block.q.iter().enumerate() {
        let (quad, at) = (k / 4, r * 4 + k % 4);
        if layout.bits == 8 {
            record[quad * VECTOR + at] = q;
            continue;
        }
        record[quad % 4 * VECTOR + at] |= (q & 15) << (quad / 4 * 4);
        match layout.bits {
            5 => record[4 * VECTOR + at] |= (q >> 4) << quad,
            6 => record[(4 + quad / 4) * VECTOR + at] |= (q >> 4) << (quad % 4 * 2),
            _ => {}
        }
    }
    let mut put = |at: usize, value: f32| {
        record[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    };
    for g in 0..layout.groups {
        let at = layout.weight_bytes() + 2 * (g * ROWS_PER_TILE + r);
        put(at, block.scale[g]);
        if layout.has_min {
            put(at + layout.scales_bytes(), block.min[g]);
        }
    }
}
