//! Paged attention and the KV store it reads.
//!
//! Grouped-query attention with an online softmax over KV blocks in position order (Dao et al. 2022, FlashAttention;
//! Kwon et al. 2023, PagedAttention). A query's result depends on its own keys alone: the same bits in any tile.

use std::ops::Range;

use half::f16;
use half::slice::HalfBitsSliceExt;

use crate::Cpu;
use crate::shape::{DecoderShape, LayerAttention, Rotary};
use crate::simd::{Simd, dispatch};
use crate::threads::DisjointMut;

/// Tokens per KV block.
pub const BLOCK_SIZE: usize = 16;

/// Queries (rows times heads of one group) that share one pass over the KV blocks.
const MAX_TILE_QUERIES: usize = 32;

/// Index of a block in a [`KvStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// K and V of every layer for `num_blocks` blocks of [`BLOCK_SIZE`] positions, f16.
///
/// Memory is reserved at once but touched only as blocks are written (which is why the elements are the bits of f16:
/// zeroed integers come from the system untouched).
#[derive(Debug)]
pub struct KvStore {
    num_kv_heads: usize,
    head_dim: usize,
    num_blocks: usize,
    layers: Vec<LayerKv>,
}

#[derive(Debug)]
struct LayerKv {
    /// `[block][kv_head][head_dim][BLOCK_SIZE]`: transposed, so that 8 positions' scores grow side by side.
    k: Vec<u16>,
    /// `[block][kv_head][BLOCK_SIZE][head_dim]`
    v: Vec<u16>,
}

impl KvStore {
    pub fn new(num_layers: usize, num_kv_heads: usize, head_dim: usize, num_blocks: usize) -> Self {
        let len = num_blocks * num_kv_heads * head_dim * BLOCK_SIZE;
        let zeros = || vec![0_u16; len];
        let layers = (0..num_layers).map(|_| LayerKv { k: zeros(), v: zeros() }).collect();
        Self { num_kv_heads, head_dim, num_blocks, layers }
    }

    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(num_layers: usize, num_kv_heads: usize, head_dim: usize) -> usize {
        num_layers * 2 * num_kv_heads * head_dim * BLOCK_SIZE * size_of::<f16>()
    }

    /// Replaces the K and V of one position, `[num_kv_heads, head_dim]` each, rounded to f16.
    ///
    /// # Panics
    /// When the slot lies outside the store, or the rows do not fit it.
    pub fn set(&mut self, layer: usize, slot: KvSlot, keys: &[f32], values: &[f32]) {
        let (head_dim, head_len) = (self.head_dim, self.head_len());
        let width = self.num_kv_heads * head_dim;
        assert!(slot.offset < BLOCK_SIZE && keys.len() == width && values.len() == width, "K and V of one position");
        let LayerKv { k, v } = &mut self.layers[layer];
        let heads = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        for ((keys, values), head) in heads.zip(slot.block.0 as usize * self.num_kv_heads..) {
            let (k, v) = (&mut k[head * head_len..][..head_len], &mut v[head * head_len..][..head_len]);
            for (to, key) in k[slot.offset..].iter_mut().step_by(BLOCK_SIZE).zip(keys) {
                *to = f16::from_f32(*key).to_bits();
            }
            for (to, value) in v[slot.offset * head_dim..].iter_mut().zip(values) {
                *to = f16::from_f32(*value).to_bits();
            }
        }
    }

    /// Replaces all of `to` by `from`, in every layer.
    ///
    /// # Panics
    /// When one of them lies outside the store.
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let block_len = self.num_kv_heads * self.head_len();
        let (from, to) = (from.0 as usize * block_len, to.0 as usize * block_len);
        for LayerKv { k, v } in &mut self.layers {
            k.copy_within(from..from + block_len, to);
            v.copy_within(from..from + block_len, to);
        }
    }

    fn head_len(&self) -> usize {
        self.head_dim * BLOCK_SIZE
    }
}

/// Rotary position embedding (Su et al. 2021): cosines and sines per position, `[position][turned dimensions / 2]`.
#[derive(Debug)]
pub struct RotaryTable {
    half_dim: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryTable {
    /// For positions `0..num_positions`, of whole heads.
    pub fn new(num_positions: usize, head_dim: usize, theta: f32) -> Self {
        Self::of(num_positions, &Rotary::plain(head_dim, theta))
    }

    /// For positions `0..num_positions`.
    pub fn of(num_positions: usize, rotary: &Rotary) -> Self {
        let Rotary { frequencies, magnitude } = rotary;
        let positions = (0..num_positions).map(|position| position as f64);
        let angles = positions.flat_map(|position| frequencies.iter().map(move |frequency| position * frequency));
        let (cos, sin) = angles.map(|a| ((a.cos() * magnitude) as f32, (a.sin() * magnitude) as f32)).unzip();
        Self { half_dim: frequencies.len(), cos, sin }
    }

    /// `[position][turned dimensions / 2]`
    pub fn cos(&self) -> &[f32] {
        &self.cos
    }

    /// `[position][turned dimensions / 2]`
    pub fn sin(&self) -> &[f32] {
        &self.sin
    }
}

/// Where one row's K and V go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSlot {
    pub block: BlockId,
    /// Position within the block.
    pub offset: usize,
    /// Position within the sequence.
    pub position: usize,
}

/// Turns `q` `[rows, num_heads, head_dim]` and `k` `[rows, num_kv_heads, head_dim]` in place and writes `k` and `v` of each
/// row to its slot.
///
/// # Panics
/// When a slot lies outside the store or the table. Slots of one call must differ.
pub fn rotate_and_store(
    cpu: &Cpu,
    store: &mut KvStore,
    layer: usize,
    table: &RotaryTable,
    slots: &[KvSlot],
    [q, k, v]: [&mut [f32]; 3],
) {
    let (head_dim, kv_heads, head_len) = (store.head_dim, store.num_kv_heads, store.head_len());
    let (q_width, kv_width) = (q.len() / slots.len().max(1), kv_heads * head_dim);
    let num_blocks = store.num_blocks;
    let v = &*v;
    let (q, k) = (DisjointMut::new(q), DisjointMut::new(k));
    let LayerKv { k: store_k, v: store_v } = &mut store.layers[layer];
    let (store_k, store_v) =
        (DisjointMut::new(store_k.reinterpret_cast_mut()), DisjointMut::new(store_v.reinterpret_cast_mut()));
    let isa = cpu.isa();
    // Small rows: a few to a task.
    const ROWS_PER_TASK: usize = 4;
    cpu.pool().run(slots.len().div_ceil(ROWS_PER_TASK), &|task| {
        for row in task * ROWS_PER_TASK..((task + 1) * ROWS_PER_TASK).min(slots.len()) {
            let slot = slots[row];
            assert!((slot.block.0 as usize) < num_blocks && slot.offset < BLOCK_SIZE, "KV slot outside the store");
            let angles = slot.position * table.half_dim..(slot.position + 1) * table.half_dim;
            let (cos, sin) = (&table.cos[angles.clone()], &table.sin[angles]);
            // SAFETY: each row belongs to one task.
            let (q, k) = unsafe { (q.slice(row * q_width, q_width), k.slice(row * kv_width, kv_width)) };
            for head in q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)) {
                // Dimensions beyond twice the table's stay as they are.
                let (first, second) = head.split_at_mut(table.half_dim);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
            let v = &v[row * kv_width..][..kv_width];
            for head in 0..kv_heads {
                let start = (slot.block.0 as usize * kv_heads + head) * head_len;
                for d in 0..head_dim {
                    let at = start + d * BLOCK_SIZE + slot.offset;
                    // SAFETY: slots of one call differ, so no other task writes this position.
                    let target = unsafe { store_k.slice(at, 1) };
                    target[0] = f16::from_f32(k[head * head_dim + d]);
                }
                let at = start + slot.offset * head_dim;
                // SAFETY: as above.
                let target = unsafe { store_v.slice(at, head_dim) };
                let v = &v[head * head_dim..][..head_dim];
                dispatch!(isa, narrow(v: &[f32], target: &mut [f16]));
            }
        }
    });
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
    let num_heads = q.len() / num_rows.max(1) / store.head_dim;
    let group = num_heads / store.num_kv_heads;
    let rows_per_tile = (MAX_TILE_QUERIES / group).max(1);
    let width = num_heads * store.head_dim;
    // A task is one tile of one KV head of one sequence.
    let total: usize = (0..num_sequences).map(|i| sequence(i).num_rows.div_ceil(rows_per_tile)).sum();
    let out = DisjointMut::new(out);
    let isa = cpu.isa();
    let tile = |queries: Queries<'_>, tile: usize, kv_head: usize| {
        let first = tile * rows_per_tile;
        let tile = Tile {
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
        dispatch!(isa, attend_tile(tile: &Tile<'_>, q: &[f32], out: &DisjointMut<'_, f32>));
    };
    let kv_heads = store.num_kv_heads;
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

struct Tile<'a> {
    store: &'a KvStore,
    layer: usize,
    scoring: Scoring,
    kv_head: usize,
    /// Query heads per KV head.
    group: usize,
    /// Floats per row of `q` and `out`.
    width: usize,
    first_row: usize,
    num_rows: usize,
    first_position: usize,
    block_table: &'a [BlockId],
}

/// Heads larger than this are not supported by the buffers below.
pub const MAX_HEAD_DIM: usize = 256;

#[inline(always)]
fn attend_tile<S: Simd>(tile: &Tile<'_>, q: &[f32], out: &DisjointMut<'_, f32>) {
    let head_dim = tile.store.head_dim;
    assert!(head_dim <= MAX_HEAD_DIM && head_dim.is_multiple_of(16), "heads of {head_dim}");
    let LayerKv { k, v } = &tile.store.layers[tile.layer];
    let (k, v): (&[f16], &[f16]) = (k.reinterpret_cast(), v.reinterpret_cast());
    let head_len = tile.store.head_len();
    let Scoring { scale, soft_cap, window } = tile.scoring;
    // The first position that the row at `position` sees.
    let first_seen = |position: usize| window.map_or(0, |window| (position + 1).saturating_sub(window));
    let mut k_block = [0.0f32; MAX_HEAD_DIM * BLOCK_SIZE];
    let mut v_block = [0.0f32; MAX_HEAD_DIM * BLOCK_SIZE];
    let (k_block, v_block) = (&mut k_block[..head_len], &mut v_block[..head_len]);
    let num_queries = tile.num_rows * tile.group;
    assert!(num_queries <= MAX_TILE_QUERIES.max(tile.group), "tile too large");
    // Per query: running maximum and sum of the softmax. `out` holds the running weighted sum of V.
    let mut softmax = [(f32::NEG_INFINITY, 0.0f32); MAX_TILE_QUERIES];
    let softmax = &mut softmax[..num_queries];
    let start_of = |query: usize| {
        let (row, head) = (query / tile.group, query % tile.group);
        (tile.first_row + row) * tile.width + (tile.kv_head * tile.group + head) * head_dim
    };
    for query in 0..num_queries {
        // SAFETY: this tile alone has these heads of these rows.
        unsafe { out.slice(start_of(query), head_dim) }.fill(0.0);
    }
    let last_position = tile.first_position + tile.num_rows - 1;
    let first_block = first_seen(tile.first_position) / BLOCK_SIZE;
    let blocks = tile.block_table[..=last_position / BLOCK_SIZE].iter().enumerate();
    for (b, &block) in blocks.skip(first_block) {
        let start = (block.0 as usize * tile.store.num_kv_heads + tile.kv_head) * head_len;
        widen::<S>(&k[start..][..head_len], k_block);
        widen::<S>(&v[start..][..head_len], v_block);
        // Queries before this block's first position see nothing of it.
        let first_query = (b * BLOCK_SIZE).saturating_sub(tile.first_position) * tile.group;
        let mut query = first_query;
        while query < num_queries {
            let count = if query + 4 <= num_queries { 4 } else { 1 };
            let mut scores = [[0.0f32; BLOCK_SIZE]; 4];
            match count {
                4 => scores_of::<S, 4>(
                    std::array::from_fn(|i| &q[start_of(query + i)..][..head_dim]),
                    k_block,
                    &mut scores,
                ),
                _ => scores_of::<S, 1>([&q[start_of(query)..][..head_dim]], k_block, &mut scores),
            }
            for (i, scores) in scores[..count].iter_mut().enumerate() {
                let position = tile.first_position + (query + i) / tile.group;
                let visible = BLOCK_SIZE.min(position + 1 - b * BLOCK_SIZE);
                let hidden = first_seen(position).saturating_sub(b * BLOCK_SIZE);
                // A row has the same bits in any tile: what lies before its window is not even added as nothing.
                if hidden >= visible {
                    continue;
                }
                if let Some(cap) = soft_cap {
                    soften::<S>(scores, scale, cap);
                }
                let scale = if soft_cap.is_some() { 1.0 } else { scale };
                // SAFETY: this tile alone has these heads of these rows.
                let out = unsafe { out.slice(start_of(query + i), head_dim) };
                accumulate::<S>(scores, hidden..visible, scale, &mut softmax[query + i], v_block, out);
            }
            query += count;
        }
    }
    for (query, (_, sum)) in softmax.iter().enumerate() {
        // SAFETY: this tile alone has these heads of these rows.
        let out = unsafe { out.slice(start_of(query), head_dim) };
        let inverse = S::splat(1.0 / sum);
        for o in out.chunks_exact_mut(8) {
            S::load(o).mul(inverse).store(o);
        }
    }
}

#[inline(always)]
fn widen<S: Simd>(source: &[f16], target: &mut [f32]) {
    for (s, t) in source.chunks_exact(8).zip(target.chunks_exact_mut(8)) {
        S::load_f16(s).store(t);
    }
}

#[inline(always)]
fn narrow<S: Simd>(source: &[f32], target: &mut [f16]) {
    for (s, t) in source.chunks_exact(8).zip(target.chunks_exact_mut(8)) {
        S::load(s).store_f16(t);
    }
}

/// `scores[i][t] = q[i] · k[t]` for the 16 positions of a block; `k_block` is `[head_dim][16]`.
#[inline(always)]
fn scores_of<S: Simd, const QUERIES: usize>(
    q: [&[f32]; QUERIES],
    k_block: &[f32],
    scores: &mut [[f32; BLOCK_SIZE]; 4],
) {
    let mut acc = [[S::splat(0.0); 2]; QUERIES];
    for (d, k) in k_block.chunks_exact(BLOCK_SIZE).enumerate() {
        let k = [S::load(&k[..8]), S::load(&k[8..])];
        for i in 0..QUERIES {
            let x = S::splat(q[i][d]);
            acc[i] = [k[0].mul_add(x, acc[i][0]), k[1].mul_add(x, acc[i][1])];
        }
    }
    for i in 0..QUERIES {
        acc[i][0].store(&mut scores[i][..8]);
        acc[i][1].store(&mut scores[i][8..]);
    }
}

/// `cap · tanh(score · scale / cap)`
#[inline(always)]
fn soften<S: Simd>(scores: &mut [f32], scale: f32, cap: f32) {
    let (scale, cap) = (S::splat(scale / cap), S::splat(cap));
    for scores in scores.chunks_exact_mut(8) {
        S::load(scores).mul(scale).tanh().mul(cap).store(scores);
    }
}

/// One block's share of the online softmax: rescales what was summed before when the maximum grows.
#[inline(always)]
fn accumulate<S: Simd>(
    scores: &mut [f32; BLOCK_SIZE],
    seen: Range<usize>,
    scale: f32,
    (max, sum): &mut (f32, f32),
    v_block: &[f32],
    out: &mut [f32],
) {
    let head_dim = out.len();
    scores[..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..].fill(f32::NEG_INFINITY);
    let (low, high) = (S::load(&scores[..8]).mul(S::splat(scale)), S::load(&scores[8..]).mul(S::splat(scale)));
    let new_max = low.max(high).max_lane().max(*max);
    let shift = S::splat(new_max);
    low.sub(shift).exp().store(&mut scores[..8]);
    high.sub(shift).exp().store(&mut scores[8..]);
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    let correction = if *max == new_max { 1.0 } else { (*max - new_max).exp() };
    *max = new_max;
    *sum = *sum * correction + S::load(&scores[..8]).add(S::load(&scores[8..])).sum();
    // As many output vectors in registers as hide the latency of the FMA.
    let mut at = 0;
    while at < head_dim {
        if at + 64 <= head_dim {
            weigh::<S, 8>(&scores[..seen.end], correction, &v_block[at..], head_dim, &mut out[at..at + 64]);
            at += 64;
        } else {
            weigh::<S, 2>(&scores[..seen.end], correction, &v_block[at..], head_dim, &mut out[at..at + 16]);
            at += 16;
        }
    }
}

/// `out = out · correction + Σ_t weights[t] · v[t]`; row t of `v` starts at `t * stride`.
#[inline(always)]
fn weigh<S: Simd, const VECTORS: usize>(weights: &[f32], correction: f32, v: &[f32], stride: usize, out: &mut [f32]) {
    let correction = S::splat(correction);
    let mut acc: [S; VECTORS] = std::array::from_fn(|i| S::load(&out[i * 8..]).mul(correction));
    for (t, &w) in weights.iter().enumerate() {
        let (v, w) = (&v[t * stride..][..VECTORS * 8], S::splat(w));
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = S::load(&v[i * 8..]).mul_add(w, *acc);
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        acc.store(&mut out[i * 8..]);
    }
}

#[cfg(test)]
mod tests;
