//! `t = scales ∘ A x` for the rows of a step and their adapters: `kernels/cuda/low_rank.cuh`, and its weights.

use half::f16;

use super::driver::{Driver, DriverError, KernelArgs, bytes_of};
use crate::half_matrix::{HalfMatrix, LANES};

/// Products that one launch takes.
pub const MAX_PRODUCTS: usize = 3;
/// Rows of a step from which blocks are many enough to be spent on more rows each.
const MANY_ROWS: usize = 65;

/// Weights from one row to the next, so that rows begin at multiples of 16 bytes.
pub fn row_stride(columns: usize) -> usize {
    columns.next_multiple_of(8)
}

/// Appends the rows of `matrix`, each followed by zeros up to `stride` columns, as bits of f16.
///
/// # Panics
/// When a row is longer than `stride`.
pub fn row_major(matrix: &HalfMatrix, stride: usize, out: &mut Vec<u16>) {
    let (num_rows, num_columns) = (matrix.num_rows(), matrix.num_columns());
    assert!(num_columns <= stride, "rows of {num_columns} columns, {stride} apart");
    let start = out.len();
    out.resize(start + num_rows * stride, 0);
    for (index, rows) in out[start..].chunks_mut(LANES * stride).enumerate() {
        let group: &[[f16; LANES]] = matrix.group(index).as_chunks().0;
        for (lane, row) in rows.chunks_exact_mut(stride).enumerate() {
            row.iter_mut().zip(group).for_each(|(to, lanes)| *to = lanes[lane].to_bits());
        }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct ShrinkArgs {
    /// f32 `[num_rows, x_stride]`, `x_stride` a multiple of 4.
    pub x: u64,
    /// Addresses of [`AdapterTable`](super::args::AdapterTable)s or 0, `[num_rows]`; those of one adapter side by side.
    pub adapters: u64,
    /// f32 `[num_products, num_rows, t_stride]`, written for rows whose adapter has a pair there, up to its rank rounded up
    /// to 8.
    pub t: u64,
    pub x_stride: i32,
    pub num_rows: i32,
    /// A multiple of 4.
    pub in_features: i32,
    pub t_stride: i32,
    /// Of each product, the place among the adapter's sites.
    pub sites: [i32; MAX_PRODUCTS],
    /// [`shrink`] chooses.
    pub tile_rows: i32,
}

const _: () = assert!(size_of::<ShrinkArgs>() == 56);

// SAFETY: no padding; whoever fills it in vouches for the addresses.
unsafe impl KernelArgs for ShrinkArgs {}

/// `t = scales ∘ A x` for `num_products` products with the same `x`; nothing where no row has an adapter.
///
/// # Errors
/// When the driver fails.
///
/// # Panics
/// When rows of `x` do not begin at multiples of 16 bytes, or the products are too many.
pub fn shrink<D: Driver>(driver: &D, args: ShrinkArgs, num_products: usize) -> Result<(), DriverError> {
    assert!((1..=MAX_PRODUCTS).contains(&num_products), "{num_products} products");
    assert!(args.in_features % 4 == 0 && args.x_stride % 4 == 0, "inputs of low-rank pairs");
    let num_rows = args.num_rows as usize;
    if args.adapters == 0 || num_rows == 0 {
        return Ok(());
    }
    // Few rows: a block for each or for two, and for each rank. More: rows share what is read of A.
    let (tile_rows, max_slots) = match num_rows {
        ..=8 => (1, 16),
        9..MANY_ROWS => (2, 16),
        _ => (8, 4),
    };
    let slots = max_slots.min(args.t_stride.max(1) as u32);
    let grid = [slots, num_rows.div_ceil(tile_rows) as u32, num_products as u32];
    let args = ShrinkArgs { tile_rows: tile_rows as i32, ..args };
    // SAFETY: `KernelArgs`; t alone is written, as `ShrinkArgs` says.
    unsafe { driver.launch("shrink", grid, bytes_of(&args)) }
}
