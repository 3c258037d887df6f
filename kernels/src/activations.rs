//! Activations rounded to int8, the right-hand side of every quantized GEMM.

use crate::Cpu;
use crate::simd::{Simd, dispatch};
use crate::threads::DisjointMut;

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
    pub(crate) values: Vec<i8>,
    /// `[rows, width / BLOCK]`
    pub(crate) scales: Vec<f32>,
    /// Sum of each [`SUM_GROUP`] of `values`, `[rows, width / SUM_GROUP]`.
    pub(crate) sums: Vec<i32>,
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

    fn resize(&mut self, num_rows: usize, width: usize) {
        self.num_rows = num_rows;
        self.width = width;
        self.values.resize(num_rows * width, 0);
        self.scales.resize(num_rows * width / BLOCK, 0.0);
        self.sums.resize(num_rows * width / SUM_GROUP, 0);
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
        let isa = cpu.isa();
        cpu.pool().run(num_rows, &|row| {
            // SAFETY: each task takes the ranges of its own row.
            let (x, q, scale, sum) = unsafe {
                (
                    source.slice(row * width, width),
                    values.slice(row * width, width),
                    scales.slice(row * width / BLOCK, width / BLOCK),
                    sums.slice(row * width / SUM_GROUP, width / SUM_GROUP),
                )
            };
            produce(row, x);
            let x = &*x;
            dispatch!(isa, quantize_row(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]));
        });
    }

    /// Rounds `rows` `[num_rows, width]`.
    pub fn quantize(&mut self, cpu: &Cpu, num_rows: usize, width: usize, rows: &mut [f32]) {
        self.fill(cpu, num_rows, width, rows, &|_, _| {});
    }
}

#[inline(always)]
fn quantize_row<S: Simd>(x: &[f32], values: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    let blocks = x.chunks_exact(BLOCK).zip(values.chunks_exact_mut(BLOCK));
    for ((block, q), (scale, sums)) in blocks.zip(scales.iter_mut().zip(sums.chunks_exact_mut(2))) {
        let lanes: [S; 4] = std::array::from_fn(|i| S::load(&block[i * 8..]));
        let [a, b, c, d] = lanes.map(S::abs);
        let largest = a.max(b).max(c.max(d)).max_lane();
        *scale = largest / 127.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        S::store_i8(lanes.map(|lane| lane.mul(S::splat(inverse))), q);
        for (sum, group) in sums.iter_mut().zip(q.chunks_exact(SUM_GROUP)) {
            *sum = group.iter().map(|&v| i32::from(v)).sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

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
                let expected: i32 = rows.values[g * 16..][..16].iter().map(|&v| i32::from(v)).sum();
                assert_eq!(*sum, expected);
            }
        }
    }
}
