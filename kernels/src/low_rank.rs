//! The low-rank delta `y += s·B(A x)`: f16 weights in memory, f32 accumulation, at each adapter's own rank.
//!
//! `shrink` is `t = s·A x`, `expand` is `y += B t`. Both are vectorised over the weights' outer dimension (ranks in
//! `shrink`, outputs in `expand`), and sum in one fixed order for any number of rows taken together.

use half::f16;

use crate::Isa;
use crate::simd::{Simd, dispatch};

const LANES: usize = 8;
/// Independent partial sums of `shrink`, each over a quarter of the inputs: enough to hide the latency of the FMA.
const CHAINS: usize = 4;

/// One adapter's low-rank pair at one site, packed for the kernels.
#[derive(Debug)]
pub struct LowRank {
    rank: usize,
    in_features: usize,
    out_features: usize,
    scale: f32,
    /// `[rank / 8, rounded up][in_features][8 ranks]`
    a: Vec<f16>,
    /// `[out_features / 8, rounded up][rank][8 outputs]`
    b: Vec<f16>,
}

impl LowRank {
    /// Packs `a` `[rank, in_features]` and `b` `[out_features, rank]`, both row-major; `scale` is alpha/rank or its kin.
    ///
    /// # Panics
    /// When the slices do not have these sizes, or `in_features` is not a multiple of 4; the caller has checked the file's
    /// shapes.
    pub fn pack(rank: usize, in_features: usize, out_features: usize, scale: f32, a: &[f32], b: &[f32]) -> Self {
        assert_eq!(a.len(), rank * in_features, "lora_a");
        assert_eq!(b.len(), out_features * rank, "lora_b");
        assert_eq!(in_features % CHAINS, 0, "in_features");
        let mut packed_a = vec![f16::ZERO; rank.next_multiple_of(LANES) * in_features];
        for (r, row) in a.chunks_exact(in_features).enumerate() {
            for (k, &v) in row.iter().enumerate() {
                packed_a[(r / LANES * in_features + k) * LANES + r % LANES] = f16::from_f32(v);
            }
        }
        let mut packed_b = vec![f16::ZERO; out_features.next_multiple_of(LANES) * rank];
        for (o, row) in b.chunks_exact(rank).enumerate() {
            for (r, &v) in row.iter().enumerate() {
                packed_b[(o / LANES * rank + r) * LANES + o % LANES] = f16::from_f32(v);
            }
        }
        Self { rank, in_features, out_features, scale, a: packed_a, b: packed_b }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Floats that `shrink` writes per row.
    pub(crate) fn padded_rank(&self) -> usize {
        self.rank.next_multiple_of(LANES)
    }

    /// Bytes of the packed weights in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(self.a.as_slice()) + size_of_val(self.b.as_slice())
    }

    /// `t = s·A x` for rows of `x` `[n, in_features]`; row i of the result starts at `t[i * stride]`.
    pub(crate) fn shrink(&self, isa: Isa, x: &[f32], t: &mut [f32], stride: usize) {
        let pair = self;
        dispatch!(isa, shrink(pair: &LowRank, x: &[f32], t: &mut [f32], stride: usize));
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
fn shrink<S: Simd>(pair: &LowRank, x: &[f32], t: &mut [f32], stride: usize) {
    let n = pair.in_features;
    let num_rows = x.len() / n;
    let mut row = 0;
    while row < num_rows {
        let (x, t) = (&x[row * n..], &mut t[row * stride..]);
        row += match num_rows - row {
            1 => shrink_rows::<S, 1, 4>(pair, x, t, stride),
            2 | 3 => shrink_rows::<S, 2, 4>(pair, x, t, stride),
            4..8 => shrink_rows::<S, 4, 2>(pair, x, t, stride),
            _ => shrink_rows::<S, 8, 1>(pair, x, t, stride),
        };
    }
}

/// `ROWS` rows at once, `AT_ONCE` of the four chains at a time; returns `ROWS`.
#[inline(always)]
fn shrink_rows<S: Simd, const ROWS: usize, const AT_ONCE: usize>(
    pair: &LowRank,
    x: &[f32],
    t: &mut [f32],
    stride: usize,
) -> usize {
    let n = pair.in_features;
    let quarter = n / CHAINS;
    let x: [&[f32]; ROWS] = std::array::from_fn(|m| &x[m * n..][..n]);
    for (v, a) in pair.a.chunks_exact(n * LANES).enumerate() {
        let mut sums = [[S::splat(0.0); CHAINS]; ROWS];
        for first in (0..CHAINS).step_by(AT_ONCE) {
            let mut acc = [[S::splat(0.0); AT_ONCE]; ROWS];
            for i in 0..quarter {
                for c in 0..AT_ONCE {
                    let k = (first + c) * quarter + i;
                    let w = S::load_f16(&a[k * LANES..]);
                    for (acc, x) in acc.iter_mut().zip(x) {
                        acc[c] = w.mul_add(S::splat(x[k]), acc[c]);
                    }
                }
            }
            for m in 0..ROWS {
                sums[m][first..first + AT_ONCE].copy_from_slice(&acc[m]);
            }
        }
        for (m, [s0, s1, s2, s3]) in sums.into_iter().enumerate() {
            let total = s0.add(s1).add(s2.add(s3)).mul(S::splat(pair.scale));
            total.store(&mut t[m * stride + v * LANES..]);
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
    let rank = pair.rank;
    let t: [&[f32]; ROWS] = std::array::from_fn(|m| &t[m * stride..][..rank]);
    let width = y[0].len();
    let mut at = 0;
    while at < width {
        let b = &pair.b[(first_out + at) * rank..];
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

    fn apply(isa: Isa, pair: &LowRank, x: &[f32], y: &mut [f32], split: usize) {
        let stride = pair.padded_rank() + 3;
        let num_rows = x.len() / pair.in_features();
        let mut t = vec![0.0; num_rows * stride];
        pair.shrink(isa, x, &mut t, stride);
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
            let pair = LowRank::pack(rank, n, out, 0.5, &a, &b);
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
    }
}
