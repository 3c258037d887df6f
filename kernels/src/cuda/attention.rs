//! Attention over the KV store: `kernels/cuda/attention.cuh`.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::args::{Activations, AttendTile, num_units};
use super::driver::{Driver, DriverError, Grid, KernelArgs, bytes_of};
use crate::attention::{KvType, Scoring};

/// Queries of a tile: the rows of a tensor core's product.
const TILE_QUERIES: usize = 16;
/// Warps of a block.
const BLOCK_WARPS: usize = 4;
/// Rows of a step up to which contexts are divided among warps: more rows keep a card busy by themselves, and what they
/// would leave in the workspace is more than they read.
pub const MAX_SPLIT_ROWS: usize = 64;
/// Warps that keep a card busy.
const ENOUGH_WARPS: usize = 2048;

/// The kernels, for heads of so many dimensions whose keys and values are kept so.
const KERNELS: [(KvType, usize, &str); 13] = [
    (KvType::F16, 16, "attend_f16_16"),
    (KvType::F16, 32, "attend_f16_32"),
    (KvType::F16, 64, "attend_f16_64"),
    (KvType::F16, 80, "attend_f16_80"),
    (KvType::F16, 96, "attend_f16_96"),
    (KvType::F16, 112, "attend_f16_112"),
    (KvType::F16, 128, "attend_f16_128"),
    (KvType::F16, 256, "attend_f16_256"),
    (KvType::Q8_0, 32, "attend_q8_0_32"),
    (KvType::Q8_0, 64, "attend_q8_0_64"),
    (KvType::Q8_0, 96, "attend_q8_0_96"),
    (KvType::Q8_0, 128, "attend_q8_0_128"),
    (KvType::Q8_0, 256, "attend_q8_0_256"),
];

/// What attention is of a model, refused where no kernel is made for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    max_positions: usize,
    kernel: &'static str,
}

/// Addresses of one layer's attention, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct AttendMemory {
    /// f16 `[rows, num_heads, head_dim]`
    pub q_half: u64,
    /// Of the layer, as [`super::kv`] says.
    pub keys: u64,
    /// Of the layer, as [`super::kv`] says.
    pub values: u64,
    /// [`AttendTile`] `[num_tiles]`
    pub tiles: u64,
    /// i32, the sequences' blocks one after the other. Every block that a tile sees is one of the store's.
    pub block_tables: u64,
    /// i32 `[rows]`: the positions that the tiles give the rows; of rows without a tile any below the longest context.
    pub positions: u64,
    /// [`AttentionShape::workspace_bytes`]
    pub workspace: u64,
    /// f32 `[rows, num_heads, head_dim]`, written.
    pub attended: u64,
    /// The same as int8, written; of the width rounded up to a multiple of 128.
    pub activations: Activations,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct AttendArgs {
    q: u64,
    keys: u64,
    values: u64,
    tiles: u64,
    block_tables: u64,
    partials: u64,
    scale: f32,
    cap_scale: f32,
    num_tiles: i32,
    num_heads: i32,
    num_kv_heads: i32,
    partials_per_row: i32,
    num_slots: i32,
    window: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct CombineArgs {
    partials: u64,
    positions: u64,
    attended: u64,
    activations: Activations,
    partials_per_row: i32,
    num_heads: i32,
    head_dim: i32,
    window: i32,
}

const _: () = {
    assert!(size_of::<AttendArgs>() == 80);
    assert!(size_of::<CombineArgs>() == 64);
};

// SAFETY: no padding; `AttendMemory`'s author vouches for the addresses.
unsafe impl KernelArgs for AttendArgs {}
// SAFETY: as above.
unsafe impl KernelArgs for CombineArgs {}

impl AttentionShape {
    /// Keys and values are kept as `kv_type`; `max_positions` is the longest context.
    ///
    /// # Errors
    /// When there is no kernel for heads of this size, or of so many for one KV head.
    pub fn new(
        kv_type: KvType,
        (num_heads, num_kv_heads): (usize, usize),
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Self, DriverError> {
        let of_type = KERNELS.iter().filter(|(of, ..)| *of == kv_type);
        let Some((.., kernel)) = of_type.clone().find(|(_, dim, _)| *dim == head_dim) else {
            let known: Vec<_> = of_type.map(|(_, dim, _)| dim.to_string()).collect();
            let message = format!(
                "the CUDA device has no attention for a head_dim of {head_dim} with engine.kv_cache_type = \"{kv_type}\", \
                 only for {}",
                known.join(", ")
            );
            return Err(DriverError::Failed(message));
        };
        if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) || num_heads / num_kv_heads > TILE_QUERIES {
            let message = format!(
                "the CUDA device has no attention for {num_heads} heads over {num_kv_heads} KV heads: each KV head \
                 serves a whole number of heads, at most {TILE_QUERIES}"
            );
            return Err(DriverError::Failed(message));
        }
        Ok(Self { num_heads, num_kv_heads, head_dim, max_positions, kernel })
    }

    /// Rows of one sequence that a tile takes at most.
    pub fn rows_per_tile(&self) -> usize {
        TILE_QUERIES * self.num_kv_heads / self.num_heads
    }

    /// Tiles of one sequence: its `rows` of the step, the first of them at `first_position`, its blocks from `block_table`
    /// of the step's block tables on.
    pub fn tiles(
        &self,
        rows: Range<usize>,
        first_position: usize,
        block_table: usize,
    ) -> impl Iterator<Item = AttendTile> + use<> {
        let step = self.rows_per_tile();
        rows.clone().step_by(step).map(move |row| AttendTile {
            first_row: row as i32,
            num_rows: step.min(rows.end - row) as i32,
            first_position: (first_position + row - rows.start) as i32,
            block_table: block_table as i32,
        })
    }

    /// Bytes of the workspace for steps of at most `max_rows` rows.
    pub fn workspace_bytes(&self, max_rows: usize) -> usize {
        let of = |rows: usize| rows * self.num_heads * self.partials_per_row(rows) * (self.head_dim + 2) * 4;
        of(max_rows).max(of(max_rows.min(MAX_SPLIT_ROWS)))
    }

    fn partials_per_row(&self, num_rows: usize) -> usize {
        if num_rows <= MAX_SPLIT_ROWS { num_units(self.max_positions).max(1) } else { 1 }
    }

    /// Writes `softmax(scores) V` of every row that a tile has, with scores as `scoring` says, as f32 and as int8; rows of
    /// `num_rows` that no tile has get something, or nothing that is a number.
    ///
    /// All that depends on the step is in device memory, so that the launches may be replayed with other tiles.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn attend<D: Driver>(
        &self,
        driver: &D,
        scoring: Scoring,
        num_rows: usize,
        num_tiles: usize,
        memory: &AttendMemory,
    ) -> Result<(), DriverError> {
        let is_split = num_rows <= MAX_SPLIT_ROWS;
        let window = scoring.window.map_or(i32::MAX, |window| i32::try_from(window).unwrap_or(i32::MAX));
        let partials_per_row = self.partials_per_row(num_rows) as i32;
        // Heads above 128 are two parts.
        let heads = self.num_kv_heads * if self.head_dim > 128 { 2 } else { 1 };
        let slot_blocks = if is_split { self.slot_blocks(num_tiles * heads) } else { 0 };
        let args = AttendArgs {
            q: memory.q_half,
            keys: memory.keys,
            values: memory.values,
            tiles: memory.tiles,
            block_tables: memory.block_tables,
            partials: memory.workspace,
            scale: LOG2_E * scoring.soft_cap.unwrap_or(scoring.scale),
            cap_scale: scoring.soft_cap.map_or(0.0, |cap| scoring.scale / cap),
            num_tiles: num_tiles as i32,
            num_heads: self.num_heads as i32,
            num_kv_heads: self.num_kv_heads as i32,
            partials_per_row,
            num_slots: (slot_blocks * BLOCK_WARPS) as i32,
            window,
        };
        let grid: Grid = if is_split {
            [num_tiles as u32, heads as u32, slot_blocks as u32]
        } else {
            [num_tiles.div_ceil(BLOCK_WARPS) as u32, heads as u32, 1]
        };
        // SAFETY: `KernelArgs`; the workspace alone is written.
        unsafe { driver.launch(self.kernel, grid, bytes_of(&args))? };
        let combine = CombineArgs {
            partials: memory.workspace,
            positions: if is_split { memory.positions } else { 0 },
            attended: memory.attended,
            activations: memory.activations,
            partials_per_row,
            num_heads: args.num_heads,
            head_dim: self.head_dim as i32,
            window,
        };
        let blocks = (memory.activations.stride as u32).div_ceil(256);
        // SAFETY: `KernelArgs`; written are attended and activations.
        unsafe { driver.launch("combine_quantize", [num_rows as u32, blocks, 1], bytes_of(&combine)) }
    }

    /// Blocks of warps that share the units of a tile, where there are `tiles` of them over all heads.
    fn slot_blocks(&self, tiles: usize) -> usize {
        let most = num_units(self.max_positions).div_ceil(BLOCK_WARPS).max(1);
        ENOUGH_WARPS.div_ceil(BLOCK_WARPS * tiles.max(1)).clamp(1, most)
    }
}
