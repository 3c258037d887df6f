//! Adapted linear layers: `y = W x + b`, and for rows with an adapter `+ s·B(A x) + bias`, in two parallel regions.
//!
//! All layers of a call read the same activations (q, k and v; gate and up). The first region multiplies the base for all
//! rows and shrinks every adapter's rows beside it; the second expands, and is skipped when no row has an adapter.

use std::ops::Range;

use crate::Cpu;
use crate::activations::QuantizedRows;
use crate::gemm::{self, Product};
use crate::low_rank::LowRank;
use crate::threads::DisjointMut;

/// What one adapter adds to the rows it runs, at one of the call's products.
#[derive(Debug, Clone)]
pub struct RowDelta<'a> {
    /// Index into the call's products.
    pub product: usize,
    pub rows: Range<usize>,
    pub low_rank: Option<&'a LowRank>,
    /// `[out_features]`, added last.
    pub bias: Option<&'a [f32]>,
}

/// The deltas of a call, asked for by number so that nobody has to store a list: `get(i)` for `i` in `0..count`.
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
/// Rows that an expanding task takes at once.
const EXPAND_ROWS: usize = 8;

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
    if deltas.count == 0 || activations.num_rows() == 0 {
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
        let rows = part(&delta.rows, task % PARTS);
        if rows.is_empty() {
            return;
        }
        assert_eq!(low_rank.in_features(), width, "adapter does not fit the activations");
        // SAFETY: the deltas of one product have disjoint rows, and tasks of one delta take disjoint parts of them.
        let t = unsafe { target.slice(slot(delta.product, rows.start), rows.len() * stride) };
        low_rank.shrink(isa, &x[rows.start * width..rows.end * width], t, stride);
    });
    let shrunk = &shrunk.0;
    let mut products = products.iter_mut();
    let outs: [Option<(usize, DisjointMut<'_, f32>)>; 4] =
        std::array::from_fn(|_| products.next().map(|p| (p.out.len() / num_rows, DisjointMut::new(&mut *p.out))));
    cpu.pool().run(deltas.count * PARTS, &|task| {
        let Some(delta) = (deltas.get)(task / PARTS) else { return };
        let Some((out_features, out)) = &outs[delta.product] else { return };
        // Few rows are split by outputs, many by rows; a multiple of 8 outputs either way.
        let (rows, columns) = if delta.rows.len() < PARTS * EXPAND_ROWS {
            let whole = part(&(0..out_features.div_ceil(8)), task % PARTS);
            (delta.rows.clone(), whole.start * 8..(whole.end * 8).min(*out_features))
        } else {
            (part(&delta.rows, task % PARTS), 0..*out_features)
        };
        if columns.is_empty() {
            return;
        }
        for first in rows.clone().step_by(EXPAND_ROWS) {
            let num = EXPAND_ROWS.min(rows.end - first);
            let mut targets: [&mut [f32]; EXPAND_ROWS] = std::array::from_fn(|m| {
                let row = first + m.min(num - 1);
                let len = if m < num { columns.len() } else { 0 };
                // SAFETY: this task alone has these rows and columns of this product; places past `num` are empty.
                unsafe { out.slice(row * out_features + columns.start, len) }
            });
            let targets = &mut targets[..num];
            if let Some(low_rank) = delta.low_rank {
                assert_eq!(low_rank.out_features(), *out_features, "adapter does not fit the layer");
                low_rank.expand(isa, &shrunk[slot(delta.product, first)..], stride, columns.start, targets);
            }
            if let Some(bias) = delta.bias {
                for target in targets {
                    target.iter_mut().zip(&bias[columns.clone()]).for_each(|(y, b)| *y += b);
                }
            }
        }
    });
}

/// Part `i` of [`PARTS`] nearly equal ones.
fn part(range: &Range<usize>, i: usize) -> Range<usize> {
    let cut = |i: usize| range.start + range.len() * i / PARTS;
    cut(i)..cut(i + 1)
}
