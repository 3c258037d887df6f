//! Adapted linear layers: `y = W x + b`, and for rows with an adapter `output_scale ∘ (W x + b + s·B(A x)) + bias`, in two
//! parallel regions.
//!
//! All layers of a call read the same activations (q, k and v; gate and up). The first region multiplies the base for all
//! rows and shrinks every adapter's rows beside it; the second does the rest, and is skipped when no row has an adapter
//! that changes one of these layers.

use std::ops::Range;

use crate::Cpu;
use crate::activations::QuantizedRows;
use crate::gemm::{self, Product};
use crate::half_matrix::LANES;
use crate::low_rank::LowRank;
use crate::threads::DisjointMut;

/// What one adapter does to the rows it runs, at one of the call's products.
#[derive(Debug, Clone)]
pub struct RowDelta<'a> {
    /// Index into the call's products.
    pub product: usize,
    pub rows: Range<usize>,
    pub low_rank: Option<&'a LowRank>,
    /// `[out_features]`
    pub output_scale: Option<&'a [f32]>,
    /// `[out_features]`, added last.
    pub bias: Option<&'a [f32]>,
}

/// The deltas of a call, asked for by number so that nobody has to store a list: `get(i)` for `i` in `0..count`; `None`
/// where there is none.
pub struct Deltas<'a> {
    pub count: usize,
    pub get: &'a (dyn Fn(usize) -> Option<RowDelta<'a>> + Sync),
}

impl std::fmt::Debug for Deltas<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deltas").field("count", &self.count).finish_non_exhaustive()
    }
}

/// The shrunk rows between the two regions; reused from call to call.
#[derive(Debug, Default)]
pub struct Shrunk(Vec<f32>);

/// Tasks per delta and region.
const PARTS: usize = 4;
/// Rows that a task takes at once.
const ROWS_AT_ONCE: usize = 8;

/// Runs the layers. `x` `[rows, in_features]` are the activations before rounding, which the deltas read.
///
/// # Panics
/// When shapes do not match.
pub fn run(
    cpu: &Cpu,
    activations: &QuantizedRows,
    x: &[f32],
    products: &mut [Product<'_>],
    deltas: &Deltas<'_>,
    shrunk: &mut Shrunk,
) {
    if activations.num_rows() == 0 || !(0..deltas.count).any(|i| (deltas.get)(i).is_some()) {
        return gemm::run(cpu, activations, products, 0, &|_| {});
    }
    let (num_rows, width) = (activations.num_rows(), activations.width());
    let isa = cpu.isa();
    let num_products = products.len();
    let low_ranks = (0..deltas.count).filter_map(|i| (deltas.get)(i)?.low_rank);
    let stride = low_ranks.map(LowRank::padded_rank).max().unwrap_or(0);
    shrunk.0.resize(num_rows * num_products * stride, 0.0);
    // `[product][row][stride]`
    let slot = |product: usize, row: usize| (product * num_rows + row) * stride;
    let target = DisjointMut::new(&mut shrunk.0);
    gemm::run(cpu, activations, products, deltas.count * PARTS, &|task| {
        let Some(delta) = (deltas.get)(task / PARTS) else { return };
        let Some(low_rank) = delta.low_rank else { return };
        assert_eq!(low_rank.in_features(), width, "adapter does not fit the activations");
        // Few rows are split by ranks, so that A is read once, many by rows.
        let (part, whole) = (task % PARTS, 0..low_rank.a().num_groups());
        let (rows, ranks) = if delta.rows.len() < ROWS_AT_ONCE {
            (delta.rows.clone(), portion(&whole, part))
        } else {
            (portion(&delta.rows, part), whole)
        };
        if rows.is_empty() || ranks.is_empty() {
            return;
        }
        low_rank.a().prefetch(ranks.clone());
        for first in rows.clone().step_by(ROWS_AT_ONCE) {
            let num = ROWS_AT_ONCE.min(rows.end - first);
            let mut targets: [&mut [f32]; ROWS_AT_ONCE] = std::array::from_fn(|m| {
                let row = first + m.min(num - 1);
                let len = if m < num { ranks.len() * LANES } else { 0 };
                // SAFETY: the deltas of one product have disjoint rows, and tasks of one delta take disjoint parts of them, or
                // of their ranks; places past `num` are empty.
                unsafe { target.slice(slot(delta.product, row) + ranks.start * LANES, len) }
            });
            low_rank.shrink(isa, ranks.clone(), &x[first * width..], &mut targets[..num]);
        }
    });
    let shrunk = &shrunk.0;
    let mut products = products.iter_mut();
    let outs: [Option<(usize, DisjointMut<'_, f32>)>; 4] =
        std::array::from_fn(|_| products.next().map(|p| (p.out.len() / num_rows, DisjointMut::new(&mut *p.out))));
    cpu.pool().run(deltas.count * PARTS, &|task| {
        let Some(delta) = (deltas.get)(task / PARTS) else { return };
        let Some((out_features, out)) = &outs[delta.product] else { return };
        // Few rows are split by outputs, many by rows; a multiple of 8 outputs either way.
        let (rows, columns) = if delta.rows.len() < PARTS * ROWS_AT_ONCE {
            let whole = portion(&(0..out_features.div_ceil(LANES)), task % PARTS);
            (delta.rows.clone(), whole.start * LANES..(whole.end * LANES).min(*out_features))
        } else {
            (portion(&delta.rows, task % PARTS), 0..*out_features)
        };
        if rows.is_empty() || columns.is_empty() {
            return;
        }
        if let Some(low_rank) = delta.low_rank {
            assert_eq!(low_rank.out_features(), *out_features, "adapter does not fit the layer");
            low_rank.b().prefetch(columns.start / LANES..columns.end.div_ceil(LANES));
        }
        for first in rows.clone().step_by(ROWS_AT_ONCE) {
            let num = ROWS_AT_ONCE.min(rows.end - first);
            let mut targets: [&mut [f32]; ROWS_AT_ONCE] = std::array::from_fn(|m| {
                let row = first + m.min(num - 1);
                let len = if m < num { columns.len() } else { 0 };
                // SAFETY: this task alone has these rows and columns of this product; places past `num` are empty.
                unsafe { out.slice(row * out_features + columns.start, len) }
            });
            let targets = &mut targets[..num];
            if let Some(low_rank) = delta.low_rank {
                low_rank.expand(isa, &shrunk[slot(delta.product, first)..], stride, columns.start, targets);
            }
            for target in targets {
                if let Some(scale) = delta.output_scale {
                    target.iter_mut().zip(&scale[columns.clone()]).for_each(|(y, s)| *y *= s);
                }
                if let Some(bias) = delta.bias {
                    target.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, b)| *y += b);
                }
            }
        }
    });
}

/// Part `i` of [`PARTS`] nearly equal ones.
fn portion(range: &Range<usize>, i: usize) -> Range<usize> {
    let cut = |i: usize| range.start + range.len() * i / PARTS;
    cut(i)..cut(i + 1)
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::Isa;
    use crate::quantized::{BlockFormat, PackedMatrix};

    const WIDTH: usize = 64;
    const OUT: usize = 40;

    /// One layer for `x`; `rows` run with the delta.
    fn layer(cpu: &Cpu, weights: &PackedMatrix, x: &[f32], rows: Range<usize>, delta: &RowDelta<'_>) -> Vec<f32> {
        let num_rows = x.len() / WIDTH;
        let mut activations = QuantizedRows::default();
        activations.quantize(cpu, num_rows, WIDTH, &mut x.to_vec());
        let mut out = vec![f32::NAN; num_rows * OUT];
        let get = |_| Some(RowDelta { rows: rows.clone(), ..delta.clone() }).filter(|delta| !delta.rows.is_empty());
        let products = &mut [Product { weights: Some(weights.into()), bias: None, out: &mut out }];
        run(cpu, &activations, x, products, &Deltas { count: 1, get: &get }, &mut Shrunk::default());
        out
    }

    #[test]
    fn a_delta_scales_its_own_rows_then_adds_its_bias_with_the_same_bits_in_any_batch() {
        let values = |n: usize, step: usize| (0..n).map(|i| ((i * step % 61) as f32 - 30.0) * 0.05).collect::<Vec<_>>();
        let halves = |n, step| values(n, step).into_iter().map(f16::from_f32).collect::<Vec<_>>();
        let pair = LowRank::pack(3, WIDTH, OUT, 0.5, &halves(3 * WIDTH, 7), &halves(OUT * 3, 11));
        let (scale, bias, x) = (values(OUT, 13), values(OUT, 17), values(40 * WIDTH, 19));
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let bytes = vec![0x35; OUT * WIDTH / 32 * BlockFormat::Q8_0.block_bytes()];
            let weights = PackedMatrix::pack(&cpu, BlockFormat::Q8_0, (OUT, WIDTH), &bytes, None).unwrap();
            let plain = RowDelta { product: 0, rows: 0..0, low_rank: None, output_scale: None, bias: None };
            let added = RowDelta { low_rank: Some(&pair), ..plain.clone() };
            let whole = RowDelta { output_scale: Some(&scale), bias: Some(&bias), ..added.clone() };
            let base = layer(&cpu, &weights, &x, 0..0, &plain);
            for rows in [1..3, 2..40] {
                let sums = layer(&cpu, &weights, &x, rows.clone(), &added);
                let results = layer(&cpu, &weights, &x, rows.clone(), &whole);
                for row in 0..40 {
                    let of = |all: &[f32]| all[row * OUT..][..OUT].to_vec();
                    let expected = if rows.contains(&row) {
                        let alone = layer(&cpu, &weights, &x[row * WIDTH..][..WIDTH], 0..1, &whole);
                        assert_eq!(of(&results), alone, "{isa} row {row}");
                        of(&sums).iter().zip(&scale).zip(&bias).map(|((y, s), b)| y * s + b).collect()
                    } else {
                        of(&base)
                    };
                    assert_eq!(of(&results), expected, "{isa} row {row}");
                }
            }
        }
    }
}
