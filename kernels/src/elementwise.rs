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

/// Weights of a norm that centers.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm<'a> {
    /// `[width]`, a multiple of 8.
    pub weight: &'a [f32],
    /// `[width]`
    pub bias: &'a [f32],
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
    let isa = cpu.isa();
    quantize_normed(cpu, hidden, delta, norm.weight.len(), normed, quantized, |hidden, delta, normed| {
        dispatch!(isa, add_norm(hidden: &mut [f32], delta: Option<&[f32]>, norm: RmsNorm<'_>, normed: &mut [f32]));
    });
}

/// As [`add_norm_quantize`], for norms that center their input.
pub fn add_layer_norm_quantize(
    cpu: &Cpu,
    hidden: &mut [f32],
    delta: Option<&[f32]>,
    norm: LayerNorm<'_>,
    normed: &mut [f32],
    quantized: &mut QuantizedRows,
) {
    let isa = cpu.isa();
    quantize_normed(cpu, hidden, delta, norm.weight.len(), normed, quantized, |hidden, delta, normed| {
        dispatch!(
            isa,
            layer_norm(hidden: &mut [f32], delta: Option<&[f32]>, norm: LayerNorm<'_>, normed: &mut [f32])
        );
    });
}

/// Rows of `width` as `norm_row` makes them of a row of `hidden` and of `delta`, also as int8.
fn quantize_normed(
    cpu: &Cpu,
    hidden: &mut [f32],
    delta: Option<&[f32]>,
    width: usize,
    normed: &mut [f32],
    quantized: &mut QuantizedRows,
    norm_row: impl Fn(&mut [f32], Option<&[f32]>, &mut [f32]) + Sync,
) {
    let num_rows = hidden.len() / width;
    let hidden = DisjointMut::new(hidden);
    quantized.fill(cpu, num_rows, width, normed, &|row, normed| {
        // SAFETY: each task takes its own row.
        let hidden = unsafe { hidden.slice(row * width, width) };
        norm_row(hidden, delta.map(|delta| &delta[row * width..][..width]), normed);
    });
}

/// LayerNorm of one row (Ba, Kiros and Hinton 2016): `(x - mean) / sqrt(mean((x - mean)²) + eps) · weight + bias`.
#[inline(always)]
fn layer_norm<S: Simd>(hidden: &mut [f32], delta: Option<&[f32]>, norm: LayerNorm<'_>, normed: &mut [f32]) {
    let mut sum = S::splat(0.0);
    for (at, h) in hidden.chunks_exact_mut(8).enumerate() {
        let x = delta.map_or(S::load(h), |delta| S::load(h).add(S::load(&delta[at * 8..])));
        x.store(h);
        sum = sum.add(x);
    }
    let mean = S::splat(sum.sum() / hidden.len() as f32);
    let mut squares = S::splat(0.0);
    for h in hidden.chunks_exact(8) {
        let h = S::load(h).sub(mean);
        squares = h.mul_add(h, squares);
    }
    let scale = S::splat(1.0 / (squares.sum() / hidden.len() as f32 + norm.eps).sqrt());
    let weights = norm.weight.chunks_exact(8).zip(norm.bias.chunks_exact(8));
    for ((h, (w, b)), n) in hidden.chunks_exact(8).zip(weights).zip(normed.chunks_exact_mut(8)) {
        S::load(h).sub(mean).mul(scale).mul_add(S::load(w), S::load(b)).store(n);
    }
}

/// `rows = norm(rows) · scale` in place, for rows as wide as the norm; without one, `rows · scale`. Their number times the
/// width is a multiple of 8.
pub fn norm_in_place(cpu: &Cpu, rows: &mut [f32], width: usize, norm: Option<RmsNorm<'_>>, scale: f32) {
    let num_rows = rows.len() / width;
    let isa = cpu.isa();
    let rows = DisjointMut::new(rows);
    // Heads are small: a few to a task.
    const ROWS_PER_TASK: usize = 8;
    cpu.pool().run(num_rows.div_ceil(ROWS_PER_TASK), &|task| {
        for row in task * ROWS_PER_TASK..((task + 1) * ROWS_PER_TASK).min(num_rows) {
            // SAFETY: each row belongs to one task.
            let row = unsafe { rows.slice(row * width, width) };
            dispatch!(isa, norm_row(row: &mut [f32], norm: Option<RmsNorm<'_>>, scale: f32));
        }
    });
}

#[inline(always)]
fn norm_row<S: Simd>(row: &mut [f32], norm: Option<RmsNorm<'_>>, scale: f32) {
    if let Some(norm) = norm {
        let mut squares = S::splat(0.0);
        for x in row.chunks_exact(8) {
            let x = S::load(x);
            squares = x.mul_add(x, squares);
        }
        let inverse = S::splat(1.0 / (squares.sum() / row.len() as f32 + norm.eps).sqrt());
        for (x, w) in row.chunks_exact_mut(8).zip(norm.weight.chunks_exact(8)) {
            S::load(x).mul(inverse).mul(S::load(w)).store(x);
        }
    }
    if scale != 1.0 {
        row.chunks_exact_mut(8).for_each(|x| S::load(x).mul(S::splat(scale)).store(x));
    }
}

/// `cap · tanh(value / cap)` in place; the number of values need not be a multiple of anything.
pub fn soft_cap(cpu: &Cpu, values: &mut [f32], cap: f32) {
    const VALUES_PER_TASK: usize = 8192;
    let isa = cpu.isa();
    let (len, values) = (values.len(), DisjointMut::new(values));
    cpu.pool().run(len.div_ceil(VALUES_PER_TASK), &|task| {
        let first = task * VALUES_PER_TASK;
        // SAFETY: each task takes its own range.
        let values = unsafe { values.slice(first, VALUES_PER_TASK.min(len - first)) };
        dispatch!(isa, cap_values(values: &mut [f32], cap: f32));
    });
}

#[inline(always)]
fn cap_values<S: Simd>(values: &mut [f32], cap: f32) {
    let mut chunks = values.chunks_exact_mut(8);
    let capped = |x: &[f32]| S::load(x).div(S::splat(cap)).tanh().mul(S::splat(cap));
    (&mut chunks).for_each(|x| capped(x).store(x));
    let rest = chunks.into_remainder();
    let mut last = [0.0; 8];
    last[..rest.len()].copy_from_slice(rest);
    rest.copy_from_slice(&capped(&last).to_array()[..rest.len()]);
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

/// `out[row] = Σ share · rows[index]` over the `terms` `(index, share)` of the row, in their order: `[rows, terms of each]`. All
/// rows are `[width]`, a multiple of 8.
pub fn sum_rows(cpu: &Cpu, width: usize, rows: &[f32], terms: &[(usize, f32)], out: &mut [f32]) {
    let (num_rows, isa) = (out.len() / width, cpu.isa());
    let terms_each = terms.len() / num_rows.max(1);
    let out = DisjointMut::new(out);
    cpu.pool().run(num_rows, &|row| {
        // SAFETY: each task takes its own row.
        let out = unsafe { out.slice(row * width, width) };
        let terms = &terms[row * terms_each..][..terms_each];
        dispatch!(isa, sum_row(rows: &[f32], terms: &[(usize, f32)], out: &mut [f32]));
    });
}

#[inline(always)]
fn sum_row<S: Simd>(rows: &[f32], terms: &[(usize, f32)], out: &mut [f32]) {
    let width = out.len();
    for (at, out) in out.chunks_exact_mut(8).enumerate() {
        let sum = terms.iter().fold(S::splat(0.0), |sum, (index, share)| {
            S::load(&rows[index * width + at * 8..]).mul_add(S::splat(*share), sum)
        });
        sum.store(out);
    }
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
    let rows = gate.chunks_exact(8).zip(up.chunks_exact(8)).zip(activated.chunks_exact_mut(8));
    for ((g, u), a) in rows {
        let g = S::load(g);
        g.mul(g.sigmoid()).mul(S::load(u)).store(a);
    }
}

/// `activated = gelu(gate) ∘ up`, or `gelu(gate)` without `up`, also as int8. All are `[rows, width]`, `width` a multiple
/// of 8.
pub fn gelu_quantize(
    cpu: &Cpu,
    num_rows: usize,
    gate: &[f32],
    up: Option<&[f32]>,
    activated: &mut [f32],
    quantized: &mut QuantizedRows,
) {
    let width = gate.len() / num_rows.max(1);
    let isa = cpu.isa();
    quantized.fill(cpu, num_rows, width, activated, &|row, activated| {
        let (gate, up) = (&gate[row * width..][..width], up.map(|up| &up[row * width..][..width]));
        dispatch!(isa, gelu(gate: &[f32], up: Option<&[f32]>, activated: &mut [f32]));
    });
}

/// The approximation of GELU with tanh (Hendrycks and Gimpel 2016), `g / 2 · (1 + tanh(√(2/π) (g + 0.044715 g³)))`, which is
/// `g · sigmoid` of twice the argument.
#[inline(always)]
fn gelu<S: Simd>(gate: &[f32], up: Option<&[f32]>, activated: &mut [f32]) {
    let (linear, cubic) = (S::splat(1.595_769), S::splat(0.044_715 * 1.595_769));
    for (at, (g, a)) in gate.chunks_exact(8).zip(activated.chunks_exact_mut(8)).enumerate() {
        let g = S::load(g);
        let y = g.mul(g.mul(g.mul(g).mul_add(cubic, linear)).sigmoid());
        up.map_or(y, |up| y.mul(S::load(&up[at * 8..]))).store(a);
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
            assert_eq!(quantized.row(2), alone.row(0));
        }
    }

    #[test]
    fn layer_norm_follows_its_formula_on_every_path() {
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let (mut hidden, delta, weight, bias) = (ramp(3 * 64), ramp(3 * 64), ramp(64), ramp(64));
            let (mut normed, mut quantized) = (vec![0.0; 3 * 64], QuantizedRows::default());
            let norm = LayerNorm { weight: &weight, bias: &bias, eps: 1e-5 };
            add_layer_norm_quantize(&cpu, &mut hidden, Some(&delta), norm, &mut normed, &mut quantized);
            for row in 0..3 {
                let x: Vec<f32> = (0..64).map(|i| 2.0 * delta[row * 64 + i]).collect();
                let mean = x.iter().sum::<f32>() / 64.0;
                let deviation = (x.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 64.0 + 1e-5).sqrt();
                for i in 0..64 {
                    assert_eq!(hidden[row * 64 + i], x[i]);
                    let expected = (x[i] - mean) / deviation * weight[i] + bias[i];
                    assert!((normed[row * 64 + i] - expected).abs() < 1e-5, "{isa}");
                }
            }
        }
    }

    #[test]
    fn a_norm_in_place_takes_every_row_for_itself_and_scales_it() {
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let (before, weight) = (ramp(40 * 16), ramp(16));
            let [mut normed, mut scaled] = [before.clone(), before.clone()];
            norm_in_place(&cpu, &mut normed, 16, Some(RmsNorm { weight: &weight, eps: 1e-5 }), 0.5);
            norm_in_place(&cpu, &mut scaled, 16, None, 0.5);
            for (i, x) in before.iter().enumerate() {
                let row = &before[i / 16 * 16..][..16];
                let rms = (row.iter().map(|v| v * v).sum::<f32>() / 16.0 + 1e-5).sqrt();
                assert!((normed[i] - x / rms * weight[i % 16] * 0.5).abs() < 1e-5, "{isa}");
                assert_eq!(scaled[i], x * 0.5);
            }
        }
    }

    #[test]
    fn a_soft_cap_follows_its_formula_to_the_last_value() {
        for isa in Isa::available() {
            let mut values = ramp(9000 + 3).into_iter().map(|x| x * 20.0).collect::<Vec<_>>();
            let before = values.clone();
            soft_cap(&Cpu::new(isa, 2), &mut values, 30.0);
            for (value, x) in values.iter().zip(before) {
                assert!((value - 30.0 * (x / 30.0).tanh()).abs() < 1e-4, "{isa}: {x} {value}");
            }
        }
    }

    #[test]
    fn gelu_follows_its_formula_on_every_path() {
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let (gate, up) = (ramp(2 * 64), ramp(2 * 64));
            let (mut activated, mut quantized) = (vec![0.0; 2 * 64], QuantizedRows::default());
            for up in [None, Some(up.as_slice())] {
                gelu_quantize(&cpu, 2, &gate, up, &mut activated, &mut quantized);
                for i in 0..2 * 64 {
                    let g = f64::from(gate[i]);
                    let tanh = ((2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh();
                    let expected = g / 2.0 * (1.0 + tanh) * up.map_or(1.0, |up| f64::from(up[i]));
                    assert!((f64::from(activated[i]) - expected).abs() < 1e-5, "{isa}");
                }
            }
        }
    }

    #[test]
    fn a_sum_of_rows_takes_the_terms_of_each_row_by_their_shares() {
        for isa in Isa::available() {
            let (rows, mut out) = (ramp(4 * 64), vec![f32::NAN; 2 * 64]);
            let terms = [(3, 0.75), (0, 0.25), (1, -2.0), (3, 1.0)];
            sum_rows(&Cpu::new(isa, 2), 64, &rows, &terms, &mut out);
            for (i, sum) in out.iter().enumerate() {
                let [(a, x), (b, y)] = [terms[i / 64 * 2], terms[i / 64 * 2 + 1]];
                let expected = x * rows[a * 64 + i % 64] + y * rows[b * 64 + i % 64];
                assert!((sum - expected).abs() < 1e-5, "{isa}");
            }
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
