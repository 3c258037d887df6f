//! Attention of some queries of one KV head: scores, softmax and weighted sum, one span of positions after the other.
//!
//! Spans begin at multiples of [`SPAN`] of the sequence, so that a query's sums are made of the same parts in any tile.
//!
//! What works on lanes stands in loops, not in closures, which carry no target features where they are not inlined.

use std::ops::Range;

use half::f16;

use super::store::{KEY_FORMAT, KEY_LAYOUT, halves, spread};
use super::{BLOCK_SIZE, BlockId, KvStore, KvType, MAX_HEAD_DIM, Scoring};
use crate::Isa;
use crate::activations::{BLOCK, QuantizedRows};
use crate::gemm;
use crate::simd::Lanes;
use crate::threads::DisjointMut;

/// Queries (rows times heads of one group) that share one pass over the KV blocks.
pub(super) const MAX_TILE_QUERIES: usize = 64;

const SPAN_BLOCKS: usize = 4;
/// Positions that one step of the softmax takes.
const SPAN: usize = SPAN_BLOCKS * BLOCK_SIZE;

pub(super) struct Tile<'a> {
    pub isa: Isa,
    pub store: &'a KvStore,
    pub layer: usize,
    pub scoring: Scoring,
    pub kv_head: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Floats per row of `q` and `out`.
    pub width: usize,
    pub first_row: usize,
    pub num_rows: usize,
    pub first_position: usize,
    pub block_table: &'a [BlockId],
}

/// What a tile works in.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Keys of the span at hand, `[head_dim][SPAN]`, where scores are made of floats.
    keys: Vec<f32>,
    /// Values of the span at hand, `[SPAN][head_dim]`.
    values: Vec<f32>,
    /// The queries, where scores are made of whole numbers.
    queries: QuantizedRows,
}

type Scores = [[f32; SPAN]; MAX_TILE_QUERIES];

impl Tile<'_> {
    fn num_queries(&self) -> usize {
        self.num_rows * self.group
    }

    fn position(&self, query: usize) -> usize {
        self.first_position + query / self.group
    }

    /// Where a query, and what comes of it, begins in `q` and `out`.
    fn start_of(&self, query: usize) -> usize {
        let (row, head) = (query / self.group, query % self.group);
        (self.first_row + row) * self.width + (self.kv_head * self.group + head) * self.store.head_dim()
    }

    /// The first position that the row at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.scoring.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// What a query sees of the span that begins at `start`.
    fn seen(&self, query: usize, start: usize) -> Range<usize> {
        let position = self.position(query);
        self.first_seen(position).saturating_sub(start)..SPAN.min(position + 1 - start)
    }

    /// Keys and values of the tile's head in a block.
    fn head(&self, block: BlockId) -> [&[u8]; 2] {
        self.store.head(self.layer, block, self.kv_head)
    }
}

#[inline(always)]
pub(super) fn attend_tile<S: Lanes>(
    tile: &Tile<'_>,
    q: &[f32],
    out: &DisjointMut<'_, f32>,
    Scratch { keys, values, queries }: &mut Scratch,
) {
    let (head_dim, num_queries) = (tile.store.head_dim(), tile.num_queries());
    assert!(head_dim <= MAX_HEAD_DIM && head_dim.is_multiple_of(16), "heads of {head_dim}");
    assert!(num_queries <= MAX_TILE_QUERIES, "tile too large");
    keys.resize(head_dim * SPAN, 0.0);
    values.resize(SPAN * head_dim, 0.0);
    let query_of = |query: usize| &q[tile.start_of(query)..][..head_dim];
    if tile.store.kv_type() == KvType::Q8_0 {
        queries.resize(num_queries, head_dim);
        let mut turned = [0.0; MAX_HEAD_DIM];
        let turned = &mut turned[..head_dim];
        for query in 0..num_queries {
            turned.copy_from_slice(query_of(query));
            turned.as_chunks_mut::<BLOCK>().0.iter_mut().for_each(spread);
            queries.set_row(tile.isa, query, turned);
        }
    }
    // `out` holds the running weighted sum of the values.
    // SAFETY: this tile alone has these heads of these rows.
    let out_of = |query: usize| unsafe { out.slice(tile.start_of(query), head_dim) };
    (0..num_queries).for_each(|query| out_of(query).fill(0.0));
    let mut softmax = [Softmax { max: f32::NEG_INFINITY, sum: 0.0 }; MAX_TILE_QUERIES];
    let mut scores: Scores = [[0.0; SPAN]; MAX_TILE_QUERIES];
    let last_position = tile.position(num_queries - 1);
    let blocks = &tile.block_table[..=last_position / BLOCK_SIZE];
    let first_span = tile.first_seen(tile.first_position) / SPAN;
    for (span, blocks) in blocks.chunks(SPAN_BLOCKS).enumerate().skip(first_span) {
        let start = span * SPAN;
        // Queries before the span see nothing of it.
        let (first, last) = (start.saturating_sub(tile.first_position) * tile.group, num_queries);
        match tile.store.kv_type() {
            KvType::F16 => {
                load_halves::<S>(tile, blocks, keys, values);
                let width = blocks.len() * BLOCK_SIZE;
                let mut query = first;
                while query < last {
                    let count = (last - query).min(4);
                    let scores = &mut scores[query..query + count];
                    match count {
                        4 => score::<S, 4>(std::array::from_fn(|i| query_of(query + i)), keys, scores, width),
                        3 => score::<S, 3>(std::array::from_fn(|i| query_of(query + i)), keys, scores, width),
                        2 => score::<S, 2>(std::array::from_fn(|i| query_of(query + i)), keys, scores, width),
                        _ => score::<S, 1>([query_of(query)], keys, scores, width),
                    }
                    query += count;
                }
            }
            KvType::Q8_0 => {
                load_q8_values::<S>(tile, blocks, values);
                score_q8(tile, blocks, queries, first..last, &mut scores);
            }
        }
        let mut query = first;
        while query < last {
            let seen = tile.seen(query, start);
            let alike = (query + 1..last.min(query + 4)).take_while(|query| tile.seen(*query, start) == seen);
            let count = 1 + alike.count();
            // A row has the same bits in any tile: what it does not see is not even added as nothing.
            if !seen.is_empty() {
                let of = query..query + count;
                let (scores, softmax) = (&mut scores[of.clone()], &mut softmax[of]);
                let outs = |i: usize| out_of(query + i);
                match count {
                    4 => add_span::<S, 4>(tile.scoring, seen, scores, softmax, values, std::array::from_fn(outs)),
                    3 => add_span::<S, 3>(tile.scoring, seen, scores, softmax, values, std::array::from_fn(outs)),
                    2 => add_span::<S, 2>(tile.scoring, seen, scores, softmax, values, std::array::from_fn(outs)),
                    _ => add_span::<S, 1>(tile.scoring, seen, scores, softmax, values, std::array::from_fn(outs)),
                }
            }
            query += count;
        }
    }
    for (query, Softmax { sum, .. }) in softmax[..num_queries].iter().enumerate() {
        let inverse = S::splat(1.0 / sum);
        for o in out_of(query).chunks_exact_mut(S::COUNT) {
            S::load(o).mul(inverse).store(o);
        }
    }
}

/// Keys and values of f16 as floats.
#[inline(always)]
fn load_halves<S: Lanes>(tile: &Tile<'_>, blocks: &[BlockId], keys: &mut [f32], values: &mut [f32]) {
    let block_len = tile.store.head_dim() * BLOCK_SIZE;
    for ((number, block), values) in blocks.iter().enumerate().zip(values.chunks_exact_mut(block_len)) {
        let [k, v] = tile.head(*block).map(halves);
        for (k, keys) in k.as_chunks::<BLOCK_SIZE>().0.iter().zip(keys.chunks_exact_mut(SPAN)) {
            widen::<S>(k, &mut keys[number * BLOCK_SIZE..][..BLOCK_SIZE]);
        }
        widen::<S>(v, values);
    }
}

#[inline(always)]
fn widen<S: Lanes>(source: &[f16], target: &mut [f32]) {
    for (s, t) in source.chunks_exact(S::COUNT).zip(target.chunks_exact_mut(S::COUNT)) {
        S::load_f16(s).store(t);
    }
}

/// Values of q8_0 as floats.
#[inline(always)]
fn load_q8_values<S: Lanes>(tile: &Tile<'_>, blocks: &[BlockId], values: &mut [f32]) {
    let block_len = tile.store.head_dim() * BLOCK_SIZE;
    for (block, values) in blocks.iter().zip(values.chunks_exact_mut(block_len)) {
        let [_, v] = tile.head(*block);
        let (rounded, scales) = v.split_at(block_len);
        let groups = rounded.as_chunks::<BLOCK>().0.iter().zip(values.as_chunks_mut::<BLOCK>().0);
        for ((rounded, values), scale) in groups.zip(halves(scales)) {
            let scale = S::splat(scale.to_f32());
            for (s, t) in rounded.chunks_exact(S::COUNT).zip(values.chunks_exact_mut(S::COUNT)) {
                S::load_i8(s).mul(scale).store(t);
            }
        }
    }
}

/// `scores[i][t] = q[i] · k[t]` for the first `width` positions of a span.
#[inline(always)]
fn score<S: Lanes, const N: usize>(q: [&[f32]; N], keys: &[f32], scores: &mut [[f32; SPAN]], width: usize) {
    let mut scores = scores.iter_mut();
    let scores = std::array::from_fn(|_| &mut scores.next().expect("N of them")[..width]);
    multiply_add::<S, N>(q, None, keys, SPAN, scores);
}

/// The same of keys in q8_0, with the queries rounded to 8 bits too: products of whole numbers, summed exactly over 32 dimensions.
#[inline(always)]
fn score_q8(tile: &Tile<'_>, blocks: &[BlockId], queries: &QuantizedRows, of: Range<usize>, scores: &mut Scores) {
    let mut products = [[0.0; BLOCK_SIZE]; MAX_TILE_QUERIES];
    for (number, block) in blocks.iter().enumerate() {
        let [records, _] = tile.head(*block);
        let job = gemm::Tile { layout: KEY_LAYOUT, offset: KEY_FORMAT.offset(), records, activations: queries };
        let products = &mut products[of.clone()];
        gemm::multiply_rows(tile.isa, &[job], of.start, &mut [products]);
        for (scores, products) in scores[of.clone()].iter_mut().zip(products) {
            scores[number * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(products);
        }
    }
}

/// Adds what queries see of a span, all of them the same, to their sums.
#[inline(always)]
fn add_span<S: Lanes, const N: usize>(
    scoring: Scoring,
    seen: Range<usize>,
    scores: &mut [[f32; SPAN]],
    softmax: &mut [Softmax],
    values: &[f32],
    out: [&mut [f32]; N],
) {
    let head_dim = out[0].len();
    let mut corrections = [1.0; N];
    for ((correction, softmax), scores) in corrections.iter_mut().zip(softmax).zip(&mut *scores) {
        *correction = softmax.weigh::<S>(scores, seen.clone(), scoring);
    }
    let weights = std::array::from_fn(|i| &scores[i][seen.clone()]);
    multiply_add::<S, N>(weights, Some(corrections), &values[seen.start * head_dim..], head_dim, out);
}

/// Running maximum and sum of a query.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    sum: f32,
}

impl Softmax {
    /// Makes scores weights, 0 where nothing is seen. What was summed before is to be multiplied by the result, since the maximum
    /// may have grown.
    #[inline(always)]
    fn weigh<S: Lanes>(&mut self, scores: &mut [f32; SPAN], seen: Range<usize>, scoring: Scoring) -> f32 {
        let scale = match scoring.soft_cap {
            Some(cap) => {
                soften::<S>(scores, scoring.scale, cap);
                1.0
            }
            None => scoring.scale,
        };
        let hide = |scores: &mut [f32; SPAN], with: f32| {
            scores[..seen.start].fill(with);
            scores[seen.end..].fill(with);
        };
        hide(scores, f32::NEG_INFINITY);
        let scale = S::splat(scale);
        let mut largest = S::splat(self.max);
        for scores in scores.chunks_exact_mut(S::COUNT) {
            let scaled = S::load(scores).mul(scale);
            scaled.store(scores);
            largest = largest.max(scaled);
        }
        let max = largest.max_lane();
        let shift = S::splat(max);
        for scores in scores.chunks_exact_mut(S::COUNT) {
            S::load(scores).sub(shift).exp().store(scores);
        }
        hide(scores, 0.0);
        let mut sum = S::splat(0.0);
        for weights in scores.chunks_exact(S::COUNT) {
            sum = sum.add(S::load(weights));
        }
        let correction = if self.max == max { 1.0 } else { (self.max - max).exp() };
        *self = Self { max, sum: self.sum * correction + sum.sum() };
        correction
    }
}

/// `cap · tanh(score · scale / cap)`
#[inline(always)]
fn soften<S: Lanes>(scores: &mut [f32], scale: f32, cap: f32) {
    let (scale, cap) = (S::splat(scale / cap), S::splat(cap));
    for scores in scores.chunks_exact_mut(S::COUNT) {
        S::load(scores).mul(scale).tanh().mul(cap).store(scores);
    }
}

/// `out[i] = Σ_k rows[i][k] · matrix[k]`, on top of `out[i] · factors[i]` where there are such; row k of the matrix begins at `k ·
/// stride`.
#[inline(always)]
fn multiply_add<S: Lanes, const N: usize>(
    rows: [&[f32]; N],
    factors: Option<[f32; N]>,
    matrix: &[f32],
    stride: usize,
    mut out: [&mut [f32]; N],
) {
    let width = out[0].len();
    // As many sums in registers as hide the latency of the FMA, of which there are 32 where there are sixteen lanes, and else 16.
    let is_large = N == 1 || S::COUNT == 16;
    let mut at = 0;
    while at < width {
        let left = (width - at) / S::COUNT;
        let vectors = match left {
            4.. if is_large => sums::<S, N, 4>(rows, factors, matrix, stride, at, &mut out),
            2.. => sums::<S, N, 2>(rows, factors, matrix, stride, at, &mut out),
            _ => sums::<S, N, 1>(rows, factors, matrix, stride, at, &mut out),
        };
        at += vectors * S::COUNT;
    }
}

/// [`multiply_add`] for some vectors of columns, from the column `at` on. Says how many.
#[inline(always)]
fn sums<S: Lanes, const N: usize, const VECTORS: usize>(
    rows: [&[f32]; N],
    factors: Option<[f32; N]>,
    matrix: &[f32],
    stride: usize,
    at: usize,
    out: &mut [&mut [f32]; N],
) -> usize {
    let depth = rows[0].len();
    // What the unchecked reads below rely on.
    assert!(rows.iter().all(|row| row.len() == depth));
    assert!(depth == 0 || (depth - 1) * stride + at + VECTORS * S::COUNT <= matrix.len());
    let mut acc = [[S::splat(0.0); VECTORS]; N];
    if let Some(factors) = factors {
        for i in 0..N {
            for v in 0..VECTORS {
                acc[i][v] = S::load(&out[i][at + v * S::COUNT..]).mul(S::splat(factors[i]));
            }
        }
    }
    for k in 0..depth {
        let start = k * stride + at;
        // SAFETY: `k < depth`, and the asserts above.
        let matrix = unsafe { matrix.get_unchecked(start..start + VECTORS * S::COUNT) };
        let mut columns = [S::splat(0.0); VECTORS];
        for v in 0..VECTORS {
            columns[v] = S::load(&matrix[v * S::COUNT..]);
        }
        for i in 0..N {
            // SAFETY: as above.
            let x = S::splat(unsafe { *rows[i].get_unchecked(k) });
            for v in 0..VECTORS {
                acc[i][v] = columns[v].mul_add(x, acc[i][v]);
            }
        }
    }
    for (acc, out) in acc.into_iter().zip(out) {
        for (v, acc) in acc.into_iter().enumerate() {
            acc.store(&mut out[at + v * S::COUNT..]);
        }
    }
    VECTORS
}
