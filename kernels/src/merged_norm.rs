//! The length of a base row with a low-rank delta merged into it: what DoRA (Liu et al. 2024) divides by.

use crate::Isa;
use crate::simd::{Simd, dispatch};

/// `‖row + Σ_r b[r]·a[r]‖` for `row` `[in]`, `a` `[rank, in]` and `b` `[rank]`, the scale folded into `b`.
///
/// # Panics
/// When the shapes do not match, or `in` is not a multiple of 8.
pub fn merged_norm(isa: Isa, row: &[f32], a: &[f32], b: &[f32]) -> f32 {
    assert!(row.len().is_multiple_of(8) && a.len() == b.len() * row.len(), "low-rank pair does not fit the row");
    // An instruction set that the processor lacks is lowered to the best it has.
    let isa = isa.min(Isa::detect());
    dispatch!(isa, norm(row: &[f32], a: &[f32], b: &[f32]) -> f32)
}

#[inline(always)]
fn norm<S: Simd>(row: &[f32], a: &[f32], b: &[f32]) -> f32 {
    const AT_ONCE: usize = 4;
    let mut squares = [S::splat(0.0); AT_ONCE];
    let mut at = 0;
    while at < row.len() {
        let num = AT_ONCE.min((row.len() - at) / 8);
        if num == AT_ONCE {
            let mut merged: [S; AT_ONCE] = std::array::from_fn(|i| S::load(&row[at + i * 8..]));
            for (a, b) in a.chunks_exact(row.len()).zip(b) {
                let b = S::splat(*b);
                for (i, merged) in merged.iter_mut().enumerate() {
                    *merged = S::load(&a[at + i * 8..]).mul_add(b, *merged);
                }
            }
            for (squares, merged) in squares.iter_mut().zip(merged) {
                *squares = merged.mul_add(merged, *squares);
            }
            at += AT_ONCE * 8;
        } else {
            let mut merged = S::load(&row[at..]);
            for (a, b) in a.chunks_exact(row.len()).zip(b) {
                merged = S::load(&a[at..]).mul_add(S::splat(*b), merged);
            }
            squares[0] = merged.mul_add(merged, squares[0]);
            at += 8;
        }
    }
    let [s0, s1, s2, s3] = squares;
    s0.add(s1).add(s2.add(s3)).sum().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_that_of_the_merged_row_on_every_path() {
        let values = |n: usize| -> Vec<f32> { (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.03).collect() };
        for width in [8, 24, 32, 72] {
            let (row, a, b) = (values(width), values(3 * width), [0.5, -0.25, 2.0]);
            let merged = |k: usize| row[k] + b[0] * a[k] + b[1] * a[width + k] + b[2] * a[2 * width + k];
            let expected = (0..width).map(|k| f64::from(merged(k)).powi(2)).sum::<f64>().sqrt();
            for isa in Isa::available() {
                let norm = f64::from(merged_norm(isa, &row, &a, &b));
                assert!((norm - expected).abs() < 1e-5 * expected, "{isa}: {norm}, expected {expected}");
            }
        }
    }
}
