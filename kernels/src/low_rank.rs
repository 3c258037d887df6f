//! The low-rank delta `y += B (s ∘ A x)`: f16 weights in memory, f32 accumulation, at each adapter's own rank.
//!
//! `shrink` is `t = s ∘ A x`, `expand` is `y += B t`. Both are vectorised over the weights' outer dimension (ranks in
//! `shrink`, outputs in `expand`), and sum in one fixed order for any number of rows taken together.

use std::ops::Range;

use half::f16;

use crate::Isa;
use crate::half_matrix::{HalfMatrix, LANES, products};
use crate::simd::{Simd, dispatch};

/// One adapter's low-rank pair at one site, packed for the kernels; clones share the weights.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, in_features]`
    a: HalfMatrix,
    /// `[out_features, rank]`
    b: HalfMatrix,
    /// One for each rank, and zeros up to a multiple of 8.
    scales: Vec<f32>,
}

impl LowRank {
    /// Packs `a` `[rank, in_features]` and `b` `[out_features, rank]`, both row-major; `scale` is alpha/rank or its kin.
    ///
    /// # Panics
    /// When the slices do not have these sizes, or `in_features` is not a multiple of 4; the caller has checked the file's
    /// shapes.
    pub fn pack(rank: usize, in_features: usize, out_features: usize, scale: f32, a: &[f16], b: &[f16]) -> Self {
        Self::pack_scaled(&vec![scale; rank], in_features, out_features, a, b)
    }

    /// As [`LowRank::pack`], with a scale for each rank.
    ///
    /// # Panics
    /// As [`LowRank::pack`].
    pub fn pack_scaled(scales: &[f32], in_features: usize, out_features: usize, a: &[f16], b: &[f16]) -> Self {
        assert_eq!(in_features % 4, 0, "in_features");
        let rank = scales.len();
        let mut scales = scales.to_vec();
        scales.resize(rank.next_multiple_of(LANES), 0.0);
        Self { a: HalfMatrix::pack(rank, in_features, a), b: HalfMatrix::pack(out_features, rank, b), scales }
    }

    /// `factor` times this pair, with the same weights.
    pub fn scaled(&self, factor: f32) -> Self {
        let scales = self.scales.iter().map(|scale| scale * factor).collect();
        Self { a: self.a.clone(), b: self.b.clone(), scales }
    }

    /// The sum of all members as one pair, whose rank is the sum of theirs.
    ///
    /// # Panics
    /// When there are none, or they differ in inputs or outputs.
    pub fn stack(members: &[&Self]) -> Self {
        let a = HalfMatrix::stack_rows(members.iter().map(|member| &member.a));
        let b = HalfMatrix::stack_columns(members.iter().map(|member| &member.b));
        let mut scales: Vec<f32> = members.iter().flat_map(|member| &member.scales[..member.rank()]).copied().collect();
        scales.resize(scales.len().next_multiple_of(LANES), 0.0);
        Self { a, b, scales }
    }

    pub fn rank(&self) -> usize {
        self.a.num_rows()
    }

    pub fn in_features(&self) -> usize {
        self.a.num_columns()
    }

    pub fn out_features(&self) -> usize {
        self.b.num_rows()
    }

    /// `[rank, in_features]`
    pub fn a(&self) -> &HalfMatrix {
        &self.a
    }

    /// `[out_features, rank]`
    pub fn b(&self) -> &HalfMatrix {
        &self.b
    }

    /// One for each rank, and zeros up to a multiple of 8.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Floats that `shrink` writes per row.
    pub(crate) fn padded_rank(&self) -> usize {
        self.scales.len()
    }

    /// What [`LowRank::bytes`] is of a pair of these sizes.
    pub const fn bytes_of(rank: usize, in_features: usize, out_features: usize) -> usize {
        let (rows_of_a, rows_of_b) = (rank.next_multiple_of(LANES), out_features.next_multiple_of(LANES));
        (rows_of_a * in_features + rows_of_b * rank) * size_of::<f16>() + rows_of_a * size_of::<f32>()
    }

    /// Bytes of the packed weights in memory.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes() + size_of_val(self.scales.as_slice())
    }

    /// `t = s ∘ A x` for rows of `x` `[n, in_features]` and the ranks of some groups of eight: `t[i]` is that part of row i.
    pub(crate) fn shrink(&self, isa: Isa, groups: Range<usize>, x: &[f32], t: &mut [&mut [f32]]) {
        let pair = self;
        dispatch!(isa, shrink(pair: &LowRank, groups: Range<usize>, x: &[f32], t: &mut [&mut [f32]]));
    }

    /// `y += B t` for the outputs `first_out..first_out + width` of each row: `y[i]` is that part of row i.
    ///
    /// `first_out` is a multiple of 8.
    pub(crate) fn expand(&self, isa: Isa, t: &[f32], stride: usize, first_out: usize, y: &mut [&mut [f32]]) {
        let pair = self;
        dispatch!(isa, expand(pair: &LowRank, t: &[f32], stride: usize, first_out: usize, y: &mut [&mut [f32]]));
    }
}

#[inline(always)]
fn shrink<S: Simd>(pair: &LowRank, groups: Range<usize>, x: &[f32], t: &mut [&mut [f32]]) {
    let mut row = 0;
    while row < t.len() {
        let (x, groups, t) = (&x[row * pair.in_features()..], groups.clone(), &mut t[row..]);
        row += match t.len() {
            1 => shrink_rows::<S, 1, 4>(pair, groups, x, t),
            2 | 3 => shrink_rows::<S, 2, 4>(pair, groups, x, t),
            4..8 => shrink_rows::<S, 4, 2>(pair, groups, x, t),
            _ => shrink_rows::<S, 8, 1>(pair, groups, x, t),
        };
    }
}

/// `ROWS` rows at once, `AT_ONCE` of the four chains at a time; returns `ROWS`.
#[inline(always)]
fn shrink_rows<S: Simd, const ROWS: usize, const AT_ONCE: usize>(
    pair: &LowRank,
    groups: Range<usize>,
    x: &[f32],
    t: &mut [&mut [f32]],
) -> usize {
    let first = groups.start;
    for group in groups {
        let totals = products::<S, ROWS, AT_ONCE>(pair.a.group(group), pair.in_features(), x);
        let scales = S::load(&pair.scales[group * LANES..]);
        for (m, total) in totals.into_iter().enumerate() {
            total.mul(scales).store(&mut t[m][(group - first) * LANES..]);
        }
    }
    ROWS
}

#[inline(always)]
fn expand<S: Simd>(pair: &LowRank, t: &[f32], stride: usize, first_out: usize, y: &mut [&mut [f32]]) {
    let num_rows = y.len();
    let mut row = 0;
    while row < num_rows {
        let (t, y) = (&t[row * stride..], &mut y[row..]);
        row += match num_rows - row {
            1 => expand_rows::<S, 1, 8>(pair, t, stride, first_out, y),
            2 | 3 => expand_rows::<S, 2, 4>(pair, t, stride, first_out, y),
            _ => expand_rows::<S, 4, 2>(pair, t, stride, first_out, y),
        };
    }
}

/// `ROWS` rows at once, `AT_ONCE` vectors of outputs at a time; returns `ROWS`.
#[inline(always)]
fn expand_rows<S: Simd, const ROWS: usize, const AT_ONCE: usize>(
    pair: &LowRank,
    t: &[f32],
    stride: usize,
    first_out: usize,
    y: &mut [&mut [f32]],
) -> usize {
    let rank = pair.rank();
    let t: [&[f32]; ROWS] = std::array::from_fn(|m| &t[m * stride..][..rank]);
    let width = y[0].len();
    let mut at = 0;
    while at < width {
        let b = pair.b.groups_from((first_out + at) / LANES);
        if at + AT_ONCE * LANES <= width {
            let mut acc = [[S::splat(0.0); AT_ONCE]; ROWS];
            for r in 0..rank {
                for v in 0..AT_ONCE {
                    let w = S::load_f16(&b[(v * rank + r) * LANES..]);
                    for m in 0..ROWS {
                        acc[m][v] = w.mul_add(S::splat(t[m][r]), acc[m][v]);
                    }
                }
            }
            for m in 0..ROWS {
                for v in 0..AT_ONCE {
                    let y = &mut y[m][at + v * LANES..];
                    S::load(y).add(acc[m][v]).store(y);
                }
            }
            at += AT_ONCE * LANES;
        } else {
            for m in 0..ROWS {
                let mut acc = S::splat(0.0);
                for r in 0..rank {
                    acc = S::load_f16(&b[r * LANES..]).mul_add(S::splat(t[m][r]), acc);
                }
                let y = &mut y[m][at..];
                if y.len() >= LANES {
                    S::load(y).add(acc).store(y);
                } else {
                    for (y, v) in y.iter_mut().zip(acc.to_array()) {
                        *y += v;
                    }
                }
            }
            at += LANES;
        }
    }
    ROWS
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                // Exact in f16, so that the reference sees the same weights.
                f32::from(((state >> 57) as i8) - 64) / 64.0
            })
            .collect()
    }

    fn halves(values: &[f32]) -> Vec<f16> {
        values.iter().map(|value| f16::from_f32(*value)).collect()
    }

    fn pair(rank: usize, n: usize, out: usize, scale: f32, seed: u64) -> LowRank {
        LowRank::pack(rank, n, out, scale, &halves(&values(rank * n, seed)), &halves(&values(out * rank, seed ^ 1)))
    }

    fn apply(isa: Isa, pair: &LowRank, x: &[f32], y: &mut [f32], split: usize) {
        let stride = pair.padded_rank() + 3;
        let num_rows = x.len() / pair.in_features();
        let mut t = vec![0.0; num_rows * stride];
        let mut rows: Vec<&mut [f32]> = t.chunks_exact_mut(stride).collect();
        let ranks = pair.a().num_groups() / 2;
        pair.shrink(isa, 0..ranks, x, &mut rows);
        rows.iter_mut().for_each(|row| *row = &mut std::mem::take(row)[ranks * LANES..]);
        pair.shrink(isa, ranks..pair.a().num_groups(), x, &mut rows);
        let (out, split) = (pair.out_features(), split.min(pair.out_features()) / LANES * LANES);
        for (first, end) in [(0, split), (split, out)] {
            if first < end {
                let mut parts: Vec<&mut [f32]> = y.chunks_exact_mut(out).map(|row| &mut row[first..end]).collect();
                pair.expand(isa, &t, stride, first, &mut parts);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn delta_equals_the_formula_and_a_row_alone_has_the_same_bits(
            rank in 1usize..40, quads in 1usize..30, out in 1usize..70, rows in 1usize..20, split in 0usize..70, seed: u64,
        ) {
            let n = quads * 4;
            let (a, b) = (values(rank * n, seed), values(out * rank, seed ^ 1));
            let x = values(rows * n, seed ^ 2);
            let pair = LowRank::pack(rank, n, out, 0.5, &halves(&a), &halves(&b));
            for isa in Isa::available() {
                let mut y = vec![1.0; rows * out];
                apply(isa, &pair, &x, &mut y, split);
                for m in 0..rows {
                    for o in 0..out {
                        let expected = 1.0 + 0.5 * (0..rank).map(|r| {
                            let t: f64 = (0..n).map(|k| f64::from(a[r * n + k]) * f64::from(x[m * n + k])).sum();
                            f64::from(b[o * rank + r]) * t
                        }).sum::<f64>();
                        prop_assert!((f64::from(y[m * out + o]) - expected).abs() < 1e-3, "{isa} {m} {o}");
                    }
                    let mut alone = vec![1.0; out];
                    apply(isa, &pair, &x[m * n..][..n], &mut alone, 0);
                    prop_assert!(alone.iter().zip(&y[m * out..]).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa} row {m}");
                }
            }
        }

        #[test]
        fn a_stack_adds_up_its_members(
            ranks in prop::collection::vec(1usize..20, 1..4), quads in 1usize..20, out in 1usize..40, seed: u64,
        ) {
            let n = quads * 4;
            let members: Vec<LowRank> = (0u32..)
                .zip(&ranks)
                .map(|(i, &rank)| pair(rank, n, out, 0.5 * (i + 1) as f32, seed ^ u64::from(i) << 8))
                .collect();
            let stack = LowRank::stack(&members.iter().collect::<Vec<_>>());
            prop_assert_eq!(stack.rank(), ranks.iter().sum::<usize>());
            let x = values(3 * n, seed ^ 2);
            for isa in Isa::available() {
                let (mut together, mut one_by_one) = (vec![0.0; 3 * out], vec![0.0; 3 * out]);
                apply(isa, &stack, &x, &mut together, 8);
                members.iter().for_each(|member| apply(isa, member, &x, &mut one_by_one, 8));
                for (a, b) in together.iter().zip(&one_by_one) {
                    prop_assert!((a - b).abs() < 1e-3 * b.abs().max(1.0), "{isa}: {a}, expected {b}");
                }
            }
        }

        #[test]
        fn scaling_by_one_changes_no_bit_and_by_two_doubles(rank in 1usize..20, out in 1usize..40, seed: u64) {
            let pair = pair(rank, 32, out, 0.75, seed);
            let x = values(2 * 32, seed ^ 2);
            for isa in Isa::available() {
                let delta = |pair: &LowRank| {
                    let mut y = vec![0.0; 2 * out];
                    apply(isa, pair, &x, &mut y, 8);
                    y
                };
                let (y, once, twice) = (delta(&pair), delta(&pair.scaled(1.0)), delta(&pair.scaled(2.0)));
                prop_assert!(y.iter().zip(&once).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}");
                prop_assert!(y.iter().zip(&twice).all(|(a, b)| (2.0 * a).to_bits() == b.to_bits()), "{isa}");
            }
        }
    }
}
