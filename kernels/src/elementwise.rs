//! What stands between the matrix products of a decoder block, one parallel region each.

use crate::Cpu;
use crate::activations::QuantizedRows;
use crate::simd::{Simd, dispatch};
use crate::threads::DisjointMut;

/// Weights of a root-mean-square norm.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// `[width]`, a multiple of 8.
    pub weight: &'a [f32],
    pub eps: f32,
}

/// `hidden += delta` (where given), then `normed = norm(hidden)`, also as int8. All are `[rows, width]`.
pub fn add_norm_quantize(
    cpu: &Cpu,
    hidden: &mut [f32],
    delta: Option<&[f32]>,
    norm: RmsNorm<'_>,
    normed: &mut [f32],
    quantized: &mut QuantizedRows,
) {
    let width = norm.weight.len();
    let num_rows = hidden.len() / width;
    let isa = cpu.isa();
    let hidden = DisjointMut::new(hidden);
    quantized.fill(cpu, num_rows, width, normed, &|row, normed| {
        // SAFETY: each task takes its own row.
        let hidden = unsafe { hidden.slice(row * width, width) };
        let delta = delta.map(|d| &d[row * width..][..width]);
        dispatch!(isa, add_norm(hidden: &mut [f32], delta: Option<&[f32]>, norm: RmsNorm<'_>, normed: &mut [f32]));
    });
}

/// Root-mean-square norm of one row (Zhang and Sennrich 2019): `x / sqrt(mean(x²) + eps) · weight`.
#[inline(always)]
fn add_norm<S: Simd>(hidden: &mut [f32], delta: Option<&[f32]>, norm: RmsNorm<'_>, normed: &mut [f32]) {
    if let Some(delta) = delta {
        for (h, d) in hidden.chunks_exact_mut(8).zip(delta.chunks_exact(8)) {
            S::load(h).add(S::load(d)).store(h);
        }
    }
    let mut squares = S::splat(0.0);
    for h in hidden.chunks_exact(8) {
        let h = S::load(h);
        squares = h.mul_add(h, squares);
    }
    let scale = S::splat(1.0 / (squares.sum() / hidden.len() as f32 + norm.eps).sqrt());
    let rows = hidden.chunks_exact(8).zip(norm.weight.chunks_exact(8)).zip(normed.chunks_exact_mut(8));
    for ((h, w), n) in rows {
        S::load(h).mul(scale).mul(S::load(w)).store(n);
    }
}

/// `scaled = scale_of(row) ∘ x`, also as int8; rows without a scale are copied and keep the bits they have in `x`. `x` and
/// `scaled` are `[rows, width]` and may be longer, a scale is `[width]`.
pub fn scale_quantize<'a>(
    cpu: &Cpu,
    (num_rows, width): (usize, usize),
    x: &[f32],
    scale_of: &(dyn Fn(usize) -> Option<&'a [f32]> + Sync),
    scaled: &mut [f32],
    quantized: &mut QuantizedRows,
) {
    quantized.fill(cpu, num_rows, width, scaled, &|row, scaled| {
        let x = &x[row * width..][..width];
        match scale_of(row) {
            Some(scale) => scaled.iter_mut().zip(x).zip(scale).for_each(|((y, x), s)| *y = x * s),
            None => scaled.copy_from_slice(x),
        }
    });
}

/// `activated = silu(gate) ∘ up`, also as int8. `gate` and `up` are `[rows, width]`, `width` a multiple of 8.
pub fn swiglu_quantize(
    cpu: &Cpu,
    num_rows: usize,
    gate: &[f32],
    up: &[f32],
    activated: &mut [f32],
    quantized: &mut QuantizedRows,
) {
    let width = gate.len() / num_rows.max(1);
    let isa = cpu.isa();
    quantized.fill(cpu, num_rows, width, activated, &|row, activated| {
        let (gate, up) = (&gate[row * width..][..width], &up[row * width..][..width]);
        dispatch!(isa, swiglu(gate: &[f32], up: &[f32], activated: &mut [f32]));
    });
}

/// `g / (1 + e^-g) · u` per element (Shazeer 2020).
#[inline(always)]
fn swiglu<S: Simd>(gate: &[f32], up: &[f32], activated: &mut [f32]) {
    let one = S::splat(1.0);
    let rows = gate.chunks_exact(8).zip(up.chunks_exact(8)).zip(activated.chunks_exact_mut(8));
    for ((g, u), a) in rows {
        let g = S::load(g);
        let sigmoid = one.div(one.add(S::splat(0.0).sub(g).exp()));
        g.mul(sigmoid).mul(S::load(u)).store(a);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    fn ramp(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 29 % 83) as f32 - 40.0) * 0.07).collect()
    }

    #[test]
    fn norm_follows_its_formula_on_every_path() {
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let (mut hidden, delta, weight) = (ramp(3 * 64), ramp(3 * 64), ramp(64));
            let before = hidden.clone();
            let (mut normed, mut quantized) = (vec![0.0; 3 * 64], QuantizedRows::default());
            let norm = RmsNorm { weight: &weight, eps: 1e-5 };
            add_norm_quantize(&cpu, &mut hidden, Some(&delta), norm, &mut normed, &mut quantized);
            for row in 0..3 {
                let x: Vec<f32> = (0..64).map(|i| before[row * 64 + i] + delta[row * 64 + i]).collect();
                let rms = (x.iter().map(|v| v * v).sum::<f32>() / 64.0 + 1e-5).sqrt();
                for i in 0..64 {
                    assert_eq!(hidden[row * 64 + i], x[i]);
                    assert!((normed[row * 64 + i] - x[i] / rms * weight[i]).abs() < 1e-5, "{isa}");
                }
            }
        }
    }

    #[test]
    fn scaling_touches_only_the_rows_that_have_a_scale() {
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let (x, scale) = (ramp(3 * 64), ramp(64));
            let (mut scaled, mut quantized) = (vec![0.0; 3 * 64], QuantizedRows::default());
            let scale_of = |row: usize| (row == 1).then_some(scale.as_slice());
            scale_quantize(&cpu, (3, 64), &x, &scale_of, &mut scaled, &mut quantized);
            for i in 0..3 * 64 {
                assert_eq!(scaled[i], if i / 64 == 1 { x[i] * scale[i % 64] } else { x[i] });
            }
            let mut alone = QuantizedRows::default();
            alone.quantize(&cpu, 1, 64, &mut x[128..].to_vec());
            assert_eq!(quantized.row(2).values, alone.row(0).values);
            assert_eq!(quantized.row(2).scales, alone.row(0).scales);
        }
    }

    #[test]
    fn swiglu_follows_its_formula_on_every_path() {
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let (gate, up) = (ramp(2 * 64), ramp(2 * 64));
            let (mut activated, mut quantized) = (vec![0.0; 2 * 64], QuantizedRows::default());
            swiglu_quantize(&cpu, 2, &gate, &up, &mut activated, &mut quantized);
            for i in 0..2 * 64 {
                let expected = gate[i] / (1.0 + (-gate[i]).exp()) * up[i];
                assert!((activated[i] - expected).abs() < 1e-5, "{isa}");
            }
        }
    }
}
