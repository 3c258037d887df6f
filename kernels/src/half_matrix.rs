//! f16 matrices packed for products with f32 rows: eight matrix rows side by side, which are the lanes of a vector.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::ops::Range;
use std::sync::Arc;

use half::f16;

use crate::Cpu;
#[cfg(target_arch = "x86_64")]
use crate::simd::LINE;
use crate::simd::{Simd, dispatch};
use crate::threads::DisjointMut;

pub(crate) const LANES: usize = 8;
/// Independent partial sums of a product, each over a quarter of the columns: enough to hide the latency of the FMA.
const CHAINS: usize = 4;
/// Weights that one task of [`HalfMatrix::multiply`] reads.
const TASK_BYTES: usize = 128 * 1024;

/// A matrix `[rows, columns]`; clones share the weights.
#[derive(Debug, Clone)]
pub struct HalfMatrix {
    num_rows: usize,
    num_columns: usize,
    /// `[rows / 8, rounded up][columns][8 rows]`
    weights: Arc<[f16]>,
}

impl HalfMatrix {
    /// Packs `weights`, row-major.
    ///
    /// # Panics
    /// When there are not `num_rows * num_columns` of them.
    pub fn pack(num_rows: usize, num_columns: usize, weights: &[f16]) -> Self {
        assert_eq!(weights.len(), num_rows * num_columns, "f16 matrix");
        Self::build(num_rows, num_columns, |packed| {
            let groups = weights.chunks(LANES * num_columns).zip(packed.chunks_exact_mut(LANES * num_columns));
            for (rows, packed) in groups {
                if rows.len() == packed.len() {
                    let rows: [&[f16]; LANES] = std::array::from_fn(|lane| &rows[lane * num_columns..][..num_columns]);
                    for (column, lanes) in packed.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                        *lanes = std::array::from_fn(|lane| rows[lane][column]);
                    }
                } else {
                    for (lane, row) in rows.chunks_exact(num_columns).enumerate() {
                        packed[lane..].iter_mut().step_by(LANES).zip(row).for_each(|(to, from)| *to = *from);
                    }
                }
            }
        })
    }

    /// The rows of all members, one below the other.
    ///
    /// # Panics
    /// When there are none, or they differ in columns.
    pub(crate) fn stack_rows<'a>(members: impl Iterator<Item = &'a Self> + Clone) -> Self {
        let num_rows = members.clone().map(|member| member.num_rows).sum();
        let num_columns = members.clone().next().map_or(0, |member| member.num_columns);
        Self::build(num_rows, num_columns, |packed| {
            let rows = members.flat_map(|member| {
                assert_eq!(member.num_columns, num_columns, "stacked matrices");
                (0..member.num_rows).map(move |row| &member.group(row / LANES)[row % LANES..])
            });
            for (at, row) in rows.enumerate() {
                let to = &mut packed[at / LANES * LANES * num_columns + at % LANES..];
                to.iter_mut()
                    .step_by(LANES)
                    .zip(row.iter().step_by(LANES))
                    .take(num_columns)
                    .for_each(|(t, f)| *t = *f);
            }
        })
    }

    /// The columns of all members, side by side.
    ///
    /// # Panics
    /// When there are none, or they differ in rows.
    pub(crate) fn stack_columns<'a>(members: impl Iterator<Item = &'a Self> + Clone) -> Self {
        let num_columns: usize = members.clone().map(|member| member.num_columns).sum();
        let num_rows = members.clone().next().map_or(0, |member| member.num_rows);
        assert!(members.clone().all(|member| member.num_rows == num_rows), "stacked matrices");
        Self::build(num_rows, num_columns, |packed| {
            for (group, packed) in packed.chunks_exact_mut(LANES * num_columns).enumerate() {
                let mut rest = packed;
                for member in members.clone() {
                    let (to, others) = rest.split_at_mut(LANES * member.num_columns);
                    to.copy_from_slice(member.group(group));
                    rest = others;
                }
            }
        })
    }

    /// Takes zeroed memory once and lets `fill` write the packed weights.
    fn build(num_rows: usize, num_columns: usize, fill: impl FnOnce(&mut [f16])) -> Self {
        assert!(num_rows > 0 && num_columns > 0, "f16 matrix of {num_rows} x {num_columns}");
        let len = num_rows.next_multiple_of(LANES) * num_columns;
        let mut weights: Arc<[f16]> = std::iter::repeat_n(f16::ZERO, len).collect();
        fill(Arc::make_mut(&mut weights));
        Self { num_rows, num_columns, weights }
    }

    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub fn num_columns(&self) -> usize {
        self.num_columns
    }

    /// Bytes of the packed weights in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.weights)
    }

    pub(crate) fn num_groups(&self) -> usize {
        self.num_rows.div_ceil(LANES)
    }

    /// Rows `8 * index..8 * index + 8`, `[columns][8 rows]`.
    pub(crate) fn group(&self, index: usize) -> &[f16] {
        self.groups(index..index + 1)
    }

    pub(crate) fn groups(&self, groups: Range<usize>) -> &[f16] {
        let len = self.num_columns * LANES;
        &self.weights[groups.start * len..groups.end * len]
    }

    /// Asks memory for some groups that are read next: of one adapter they are too short a stream for the processor to foresee.
    pub(crate) fn prefetch(&self, groups: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        for line in self.groups(groups).chunks(LINE / size_of::<f16>()) {
            // SAFETY: every x86-64 has the instruction, which reads nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = groups;
    }

    /// Group `index` and all after it.
    pub(crate) fn groups_from(&self, index: usize) -> &[f16] {
        &self.weights[index * self.num_columns * LANES..]
    }

    /// `y = W x` for each row of `x` `[n, columns]`; `y` is `[n, rows]`. A row's bits are the same in any batch.
    ///
    /// # Panics
    /// When the shapes do not match, or the columns are not a multiple of 4.
    pub fn multiply(&self, cpu: &Cpu, x: &[f32], y: &mut [f32]) {
        assert_eq!(x.len() * self.num_rows, y.len() * self.num_columns, "f16 product");
        let groups_per_task = (TASK_BYTES / size_of_val(self.group(0))).max(1);
        let (matrix, isa, y) = (self, cpu.isa(), &DisjointMut::new(y));
        cpu.pool().run(self.num_groups().div_ceil(groups_per_task), &|task| {
            let (first, end) = (task * groups_per_task, ((task + 1) * groups_per_task).min(matrix.num_groups()));
            dispatch!(isa, multiply(matrix: &HalfMatrix, first: usize, end: usize, x: &[f32], y: &DisjointMut<'_, f32>));
        });
    }
}

/// The outputs of groups `first..end`, which belong to this task alone.
#[inline(always)]
fn multiply<S: Simd>(matrix: &HalfMatrix, first: usize, end: usize, x: &[f32], y: &DisjointMut<'_, f32>) {
    let width = matrix.num_columns;
    let num_rows = x.len() / width;
    for group in first..end {
        let mut row = 0;
        while row < num_rows {
            let x = &x[row * width..];
            let at = row * matrix.num_rows + group * LANES;
            row += match num_rows - row {
                1 => store(products::<S, 1, 4>(matrix.group(group), width, x), matrix, group, at, y),
                2 | 3 => store(products::<S, 2, 4>(matrix.group(group), width, x), matrix, group, at, y),
                4..8 => store(products::<S, 4, 2>(matrix.group(group), width, x), matrix, group, at, y),
                _ => store(products::<S, 8, 1>(matrix.group(group), width, x), matrix, group, at, y),
            };
        }
    }
}

/// Writes one group's outputs of `ROWS` rows, the first at `at`; returns `ROWS`.
#[inline(always)]
fn store<S: Simd, const ROWS: usize>(
    totals: [S; ROWS],
    matrix: &HalfMatrix,
    group: usize,
    at: usize,
    y: &DisjointMut<'_, f32>,
) -> usize {
    let width = LANES.min(matrix.num_rows - group * LANES);
    for (m, total) in totals.into_iter().enumerate() {
        // SAFETY: each task has groups of its own, and so columns of `y` of its own.
        let target = unsafe { y.slice(at + m * matrix.num_rows, width) };
        if width == LANES {
            total.store(target);
        } else {
            target.copy_from_slice(&total.to_array()[..width]);
        }
    }
    ROWS
}

/// The products of one group `[width][8 rows]` with `ROWS` rows of `x` `[.., width]`, `AT_ONCE` of the four chains at a
/// time. Each is summed in the same order for any number of rows.
#[inline(always)]
pub(crate) fn products<S: Simd, const ROWS: usize, const AT_ONCE: usize>(
    group: &[f16],
    width: usize,
    x: &[f32],
) -> [S; ROWS] {
    assert_eq!(width % CHAINS, 0, "columns of an f16 product");
    let quarter = width / CHAINS;
    let x: [&[f32]; ROWS] = std::array::from_fn(|m| &x[m * width..][..width]);
    let mut sums = [[S::splat(0.0); CHAINS]; ROWS];
    for first in (0..CHAINS).step_by(AT_ONCE) {
        let mut acc = [[S::splat(0.0); AT_ONCE]; ROWS];
        for i in 0..quarter {
            for c in 0..AT_ONCE {
                let k = (first + c) * quarter + i;
                let w = S::load_f16(&group[k * LANES..]);
                for (acc, x) in acc.iter_mut().zip(x) {
                    acc[c] = w.mul_add(S::splat(x[k]), acc[c]);
                }
            }
        }
        for m in 0..ROWS {
            sums[m][first..first + AT_ONCE].copy_from_slice(&acc[m]);
        }
    }
    sums.map(|[s0, s1, s2, s3]| s0.add(s1).add(s2.add(s3)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Isa;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            // Exact in f16, so that the reference sees the same weights.
            f32::from(((state >> 57) as i8) - 64) / 64.0
        };
        (0..n).map(|_| next()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_product_equals_the_formula_and_a_row_alone_has_the_same_bits(
            num_rows in 1usize..600, quads in 1usize..40, batch in 1usize..18, seed: u64,
        ) {
            let width = quads * 4;
            let (w, x) = (values(num_rows * width, seed), values(batch * width, seed ^ 1));
            let weights: Vec<f16> = w.iter().map(|w| f16::from_f32(*w)).collect();
            let matrix = HalfMatrix::pack(num_rows, width, &weights);
            for isa in Isa::available() {
                let cpu = Cpu::new(isa, 2);
                let mut y = vec![f32::NAN; batch * num_rows];
                matrix.multiply(&cpu, &x, &mut y);
                for (x, y) in x.chunks_exact(width).zip(y.chunks_exact(num_rows)) {
                    for (w, y) in w.chunks_exact(width).zip(y) {
                        let expected: f64 = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        prop_assert!((f64::from(*y) - expected).abs() < 1e-3, "{isa}: {y}, expected {expected}");
                    }
                    let mut alone = vec![f32::NAN; num_rows];
                    matrix.multiply(&cpu, x, &mut alone);
                    prop_assert!(alone.iter().zip(y).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}");
                }
            }
        }
    }
}
