//! Paged attention and the KV store it reads.
//!
//! Grouped-query attention with an online softmax over the KV blocks in position order (Dao et al. 2022, FlashAttention;
//! Kwon et al. 2023, PagedAttention). A query's result depends on its own keys alone: the same bits in any tile.

mod rotary;
mod store;
mod tile;

use std::cell::RefCell;

use crate::Cpu;
use crate::shape::{DecoderShape, LayerAttention};
use crate::simd::dispatch_widest;
use crate::threads::DisjointMut;

pub use rotary::{RotaryTable, rotate_and_store};
pub use store::{BlockId, KvSlot, KvStore, KvType};
use tile::{MAX_TILE_QUERIES, Scratch, Tile, attend_tile};

/// Tokens per KV block.
pub const BLOCK_SIZE: usize = 16;

/// Heads larger than this are not supported.
pub const MAX_HEAD_DIM: usize = 256;

thread_local! {
    /// Of the tile at hand; grows to the largest head once.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// One sequence's queries in a call of [`attend`].
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    pub first_row: usize,
    pub num_rows: usize,
    /// Position of the first row; row i sees the positions up to `first_position + i`.
    pub first_position: usize,
    pub block_table: &'a [BlockId],
}

/// What is made of the products of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    pub scale: f32,
    /// `cap · tanh(score / cap)`
    pub soft_cap: Option<f32>,
    /// How many positions a row sees, its own among them; `None` is all.
    pub window: Option<usize>,
}

impl Scoring {
    /// That of one layer of a decoder.
    pub fn of(shape: &DecoderShape, layer: LayerAttention) -> Self {
        Self { scale: shape.attention_scale, soft_cap: shape.attention_soft_cap, window: layer.window }
    }

    /// `1 / sqrt(head_dim)`, and nothing else.
    pub fn plain(head_dim: usize) -> Self {
        Self { scale: DecoderShape::default_attention_scale(head_dim), soft_cap: None, window: None }
    }
}

/// `out[row][head] = softmax(scores(q·Kᵀ)) V` over each row's own and earlier positions, as far as `scoring` lets it see.
///
/// `q` and `out` are `[rows, num_heads, head_dim]`; all K and V that the rows see are in the store. `sequence(i)` for `i` in
/// `0..num_sequences` gives the sequences, whose rows do not overlap.
///
/// # Panics
/// When a block table is too short or names a block outside the store.
pub fn attend<'a>(
    cpu: &Cpu,
    store: &KvStore,
    (layer, scoring): (usize, Scoring),
    num_sequences: usize,
    sequence: &(dyn Fn(usize) -> Queries<'a> + Sync),
    q: &[f32],
    out: &mut [f32],
) {
    let num_rows: usize = (0..num_sequences).map(|i| sequence(i).num_rows).sum();
    let num_heads = q.len() / num_rows.max(1) / store.head_dim();
    let group = num_heads / store.num_kv_heads();
    let rows_per_tile = (MAX_TILE_QUERIES / group).max(1);
    let width = num_heads * store.head_dim();
    // A task is one tile of one KV head of one sequence.
    let total: usize = (0..num_sequences).map(|i| sequence(i).num_rows.div_ceil(rows_per_tile)).sum();
    let out = DisjointMut::new(out);
    let isa = cpu.isa();
    let tile = |queries: Queries<'_>, tile: usize, kv_head: usize| {
        let first = tile * rows_per_tile;
        let tile = Tile {
            isa,
            store,
            layer,
            scoring,
            kv_head,
            group,
            width,
            first_row: queries.first_row + first,
            num_rows: rows_per_tile.min(queries.num_rows - first),
            first_position: queries.first_position + first,
            block_table: queries.block_table,
        };
        let (tile, q, out) = (&tile, q, &out);
        SCRATCH.with_borrow_mut(|scratch| {
            dispatch_widest!(
                isa,
                attend_tile(tile: &Tile<'_>, q: &[f32], out: &DisjointMut<'_, f32>, scratch: &mut Scratch)
            );
        });
    };
    let kv_heads = store.num_kv_heads();
    cpu.pool().run(total * kv_heads, &|task| {
        // The longest contexts come last in a prefill: start with them, so that the threads end together.
        let mut number = total - 1 - task / kv_heads;
        for i in 0..num_sequences {
            let queries = sequence(i);
            let tiles = queries.num_rows.div_ceil(rows_per_tile);
            if number < tiles {
                return tile(queries, number, task % kv_heads);
            }
            number -= tiles;
        }
    });
}

#[cfg(test)]
mod tests;
