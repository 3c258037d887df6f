//! Activations rounded to int8, the right-hand side of every quantized GEMM.

use crate::simd::{Simd, dispatch};
use crate::threads::DisjointMut;
use crate::{Cpu, Isa};

/// Activations per scale.
pub const BLOCK: usize = 32;
/// Activations per sum; the smallest group of weights that shares a scale.
pub const SUM_GROUP: usize = 16;

/// Rows of activations as int8 with one scale per [`BLOCK`]: `x ≈ scale · q`. Buffers are reused from step to step.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    num_rows: usize,
    width: usize,
    /// `[rows, width / BLOCK]`
    blocks: Vec<QuantizedBlock>,
}

/// [`BLOCK`] activations and what a product needs beside their values: one cache line.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct QuantizedBlock {
    pub values: [i8; BLOCK],
    pub scale: f32,
    /// Of both [`SUM_GROUP`]s, the sum of the values times their scale: what a minimum of the weights is multiplied with.
    scaled_sum: f32,
    /// The sum of the values times -128: what to begin with where weights are bytes with 128 on top.
    pub start: i32,
    /// The same of each [`SUM_GROUP`].
    pub starts: [i32; 2],
    /// Sums over each [`SUM_GROUP`]: of the first and of the last two of every four, which is how 16-bit kernels sum them.
    pub sums: [[i16; 2]; 2],
}

/// What weights are stored with on top where they are bytes.
const BYTE_OFFSET: i32 = 128;

impl QuantizedBlock {
    #[inline(always)]
    fn of<S: Simd>(x: &[f32]) -> Self {
        let mut values = [0; BLOCK];
        let mut scale = 0.0;
        quantize_block::<S>(x, &mut values, |largest| {
            scale = largest / 127.0;
            if largest > 0.0 { 127.0 / largest } else { 0.0 }
        });
        let mut sums = [[0; 2]; 2];
        for (sums, group) in sums.iter_mut().zip(values.as_chunks::<SUM_GROUP>().0) {
            for q in group.as_chunks::<4>().0 {
                sums[0] += i16::from(q[0]) + i16::from(q[1]);
                sums[1] += i16::from(q[2]) + i16::from(q[3]);
            }
        }
        let whole = sums.map(|[a, b]| i32::from(a) + i32::from(b));
        let [a, b] = whole.map(|sum| sum as f32 * scale);
        let starts = whole.map(|sum| -BYTE_OFFSET * sum);
        Self { values, scale, scaled_sum: a + b, start: starts[0] + starts[1], starts, sums }
    }

    /// [`QuantizedBlock::start`] where weights have `offset` on top: of the block, or of one of its groups.
    #[inline(always)]
    pub fn start_for(&self, offset: i32, group: Option<usize>) -> i32 {
        -offset * self.sum(group)
    }

    /// [`QuantizedBlock::scaled_sum`] of the block, or of one of its groups.
    #[inline(always)]
    pub fn scaled_sum(&self, group: Option<usize>) -> f32 {
        group.map_or(self.scaled_sum, |_| self.sum(group) as f32 * self.scale)
    }

    #[inline(always)]
    fn sum(&self, group: Option<usize>) -> i32 {
        -(group.map_or(self.start, |group| self.starts[group]) >> BYTE_OFFSET.ilog2())
    }
}

impl QuantizedRows {
    /// Space for `num_rows` rows of `width` without another allocation.
    ///
    /// # Panics
    /// When `width` is not a multiple of [`BLOCK`].
    pub fn with_capacity(num_rows: usize, width: usize) -> Self {
        assert_eq!(width % BLOCK, 0, "rows of {width} do not divide into blocks of {BLOCK}");
        let mut rows = Self::default();
        rows.resize(num_rows, width);
        rows.num_rows = 0;
        rows
    }

    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows to be set.
    pub(crate) fn resize(&mut self, num_rows: usize, width: usize) {
        self.num_rows = num_rows;
        self.width = width;
        self.blocks.resize(num_rows * width / BLOCK, QuantizedBlock::default());
    }

    /// Replaces the content with `num_rows` rows, each written as f32 by `produce(row, buffer)` and rounded here.
    ///
    /// `source` is the f32 copy of the rows, `[rows, width]`: the low-rank deltas read it.
    pub(crate) fn fill(
        &mut self,
        cpu: &Cpu,
        num_rows: usize,
        width: usize,
        source: &mut [f32],
        produce: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        assert_eq!(width % BLOCK, 0, "rows of {width} do not divide into blocks of {BLOCK}");
        self.resize(num_rows, width);
        let source = DisjointMut::new(&mut source[..num_rows * width]);
        let blocks = DisjointMut::new(&mut self.blocks);
        let isa = cpu.isa();
        cpu.pool().run(num_rows, &|row| {
            // SAFETY: each task takes the ranges of its own row.
            let (x, blocks) =
                unsafe { (source.slice(row * width, width), blocks.slice(row * width / BLOCK, width / BLOCK)) };
            produce(row, x);
            let x = &*x;
            dispatch!(isa, quantize_row(x: &[f32], blocks: &mut [QuantizedBlock]));
        });
    }

    /// Rounds one row, on the thread at hand.
    pub(crate) fn set_row(&mut self, isa: Isa, row: usize, x: &[f32]) {
        let blocks = &mut self.blocks[row * self.width / BLOCK..][..self.width / BLOCK];
        dispatch!(isa, quantize_row(x: &[f32], blocks: &mut [QuantizedBlock]));
    }

    /// `[width / BLOCK]`
    pub(crate) fn row(&self, row: usize) -> &[QuantizedBlock] {
        &self.blocks[row * self.width / BLOCK..][..self.width / BLOCK]
    }

    /// Rounds `rows` `[num_rows, width]`.
    pub fn quantize(&mut self, cpu: &Cpu, num_rows: usize, width: usize, rows: &mut [f32]) {
        self.fill(cpu, num_rows, width, rows, &|_, _| {});
    }
}

#[inline(always)]
fn quantize_row<S: Simd>(x: &[f32], blocks: &mut [QuantizedBlock]) {
    for (block, x) in blocks.iter_mut().zip(x.chunks_exact(BLOCK)) {
        *block = QuantizedBlock::of::<S>(x);
    }
}

/// Rounds [`BLOCK`] values times what `inverse_of` makes of the largest magnitude among them.
#[inline(always)]
pub(crate) fn quantize_block<S: Simd>(block: &[f32], q: &mut [i8], inverse_of: impl FnOnce(f32) -> f32) {
    let lanes: [S; 4] = std::array::from_fn(|i| S::load(&block[i * 8..]));
    let [a, b, c, d] = lanes.map(S::abs);
    let inverse = inverse_of(a.max(b).max(c.max(d)).max_lane());
    S::store_i8(lanes.map(|lane| lane.mul(S::splat(inverse))), q);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_error_is_at_most_half_a_step_and_sums_match() {
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let mut x: Vec<f32> = (0..5 * 96).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.13).collect();
            x[96..128].fill(0.0);
            let mut rows = QuantizedRows::default();
            rows.quantize(&cpu, 5, 96, &mut x);
            for (block, x) in rows.blocks.iter().zip(x.as_chunks::<BLOCK>().0) {
                for (q, v) in block.values.iter().zip(x) {
                    assert!((f32::from(*q) * block.scale - v).abs() <= block.scale * 0.5001);
                }
                let sum_of = |values: &[i8]| values.iter().map(|&v| i32::from(v)).sum::<i32>();
                assert_eq!(block.start, -128 * sum_of(&block.values));
                assert_eq!(block.start_for(16, None), -16 * sum_of(&block.values));
                assert_eq!(block.scaled_sum(None), block.scaled_sum(Some(0)) + block.scaled_sum(Some(1)));
                for (g, values) in block.values.as_chunks::<SUM_GROUP>().0.iter().enumerate() {
                    assert_eq!(block.start_for(32, Some(g)), -32 * sum_of(values));
                    assert_eq!(block.scaled_sum(Some(g)), sum_of(values) as f32 * block.scale);
                    let (first, last): (Vec<_>, Vec<_>) = values.iter().enumerate().partition(|(i, _)| i % 4 < 2);
                    let sum_of = |half: Vec<(usize, &i8)>| half.into_iter().map(|(_, v)| i16::from(*v)).sum::<i16>();
                    assert_eq!(block.sums[g], [first, last].map(sum_of));
                }
            }
        }
    }
}
