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
    /// `[rows, width]`
    values: Vec<i8>,
    /// `[rows, width / BLOCK]`
    scales: Vec<f32>,
    /// Sums over each [`SUM_GROUP`] of `values`, `[rows, width / SUM_GROUP]`: of the first and of the last two of every
    /// four, which is how 16-bit kernels sum them.
    sums: Vec<[i16; 2]>,
    /// Each group's sum times its scale: what a minimum of the weights is multiplied with.
    scaled_sums: Vec<f32>,
}

/// A row of [`QuantizedRows`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantizedRow<'a> {
    pub values: &'a [i8],
    pub scales: &'a [f32],
    pub sums: &'a [[i16; 2]],
    pub scaled_sums: &'a [f32],
}

/// Sum of one or more groups' values.
#[inline(always)]
pub(crate) fn sum_of(groups: &[[i16; 2]]) -> i32 {
    groups.iter().map(|[a, b]| i32::from(*a) + i32::from(*b)).sum()
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
        self.values.resize(num_rows * width, 0);
        self.scales.resize(num_rows * width / BLOCK, 0.0);
        self.sums.resize(num_rows * width / SUM_GROUP, [0; 2]);
        self.scaled_sums.resize(num_rows * width / SUM_GROUP, 0.0);
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
        let values = DisjointMut::new(&mut self.values);
        let scales = DisjointMut::new(&mut self.scales);
        let sums = DisjointMut::new(&mut self.sums);
        let scaled_sums = DisjointMut::new(&mut self.scaled_sums);
        let isa = cpu.isa();
        cpu.pool().run(num_rows, &|row| {
            // SAFETY: each task takes the ranges of its own row.
            let (x, q, scale, sum, scaled) = unsafe {
                (
                    source.slice(row * width, width),
                    values.slice(row * width, width),
                    scales.slice(row * width / BLOCK, width / BLOCK),
                    sums.slice(row * width / SUM_GROUP, width / SUM_GROUP),
                    scaled_sums.slice(row * width / SUM_GROUP, width / SUM_GROUP),
                )
            };
            produce(row, x);
            let x = &*x;
            dispatch!(
                isa,
                quantize_row(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [[i16; 2]], scaled: &mut [f32])
            );
        });
    }

    /// Rounds one row, on the thread at hand.
    pub(crate) fn set_row(&mut self, isa: Isa, row: usize, x: &[f32]) {
        let of = |per: usize| row * self.width / per..(row + 1) * self.width / per;
        let (q, scale) = (&mut self.values[of(1)], &mut self.scales[of(BLOCK)]);
        let (sum, scaled) = (&mut self.sums[of(SUM_GROUP)], &mut self.scaled_sums[of(SUM_GROUP)]);
        dispatch!(
            isa,
            quantize_row(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [[i16; 2]], scaled: &mut [f32])
        );
    }

    /// One row's values, scales and sums.
    pub(crate) fn row(&self, row: usize) -> QuantizedRow<'_> {
        let of = |per: usize| row * self.width / per..(row + 1) * self.width / per;
        QuantizedRow {
            values: &self.values[of(1)],
            scales: &self.scales[of(BLOCK)],
            sums: &self.sums[of(SUM_GROUP)],
            scaled_sums: &self.scaled_sums[of(SUM_GROUP)],
        }
    }

    /// Rounds `rows` `[num_rows, width]`.
    pub fn quantize(&mut self, cpu: &Cpu, num_rows: usize, width: usize, rows: &mut [f32]) {
        self.fill(cpu, num_rows, width, rows, &|_, _| {});
    }
}

#[inline(always)]
fn quantize_row<S: Simd>(
    x: &[f32],
    values: &mut [i8],
    scales: &mut [f32],
    sums: &mut [[i16; 2]],
    scaled_sums: &mut [f32],
) {
    let blocks = x.chunks_exact(BLOCK).zip(values.chunks_exact_mut(BLOCK));
    for ((block, q), (scale, sums)) in blocks.zip(scales.iter_mut().zip(sums.chunks_exact_mut(2))) {
        quantize_block::<S>(block, q, |largest| {
            *scale = largest / 127.0;
            if largest > 0.0 { 127.0 / largest } else { 0.0 }
        });
        for (sum, group) in sums.iter_mut().zip(q.chunks_exact(SUM_GROUP)) {
            *sum = [0; 2];
            for q in group.as_chunks::<4>().0 {
                sum[0] += i16::from(q[0]) + i16::from(q[1]);
                sum[1] += i16::from(q[2]) + i16::from(q[3]);
            }
        }
    }
    for ((scaled, sum), i) in scaled_sums.iter_mut().zip(sums).zip(0..) {
        *scaled = sum_of(&[*sum]) as f32 * scales[i / (BLOCK / SUM_GROUP)];
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
            for (i, v) in x.iter().enumerate() {
                let scale = rows.scales[i / BLOCK];
                assert!((f32::from(rows.values[i]) * scale - v).abs() <= scale * 0.5001);
            }
            for (g, sum) in rows.sums.iter().enumerate() {
                let values = rows.values[g * 16..][..16].iter().map(|&v| i16::from(v)).enumerate();
                let (first, last): (Vec<_>, Vec<_>) = values.partition(|(i, _)| i % 4 < 2);
                assert_eq!(*sum, [first, last].map(|half| half.iter().map(|(_, v)| v).sum::<i16>()));
            }
        }
    }
}
