//! The quantized GEMM: `y[m][n] = Σ_k w[n][k] · x[m][k]` with packed weights and int8 activations.
//!
//! Within a block of 32 inputs the products are summed exactly in integers; the blocks are summed in f32 in input order.
//! Every path does the same operations per output element, so rows computed together or alone, by one thread or many,
//! have the same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::activations::{BLOCK, QuantizedRows};
use crate::quantized::{PackedMatrix, ROWS_PER_TILE};
use crate::threads::DisjointMut;
use crate::{Cpu, Isa};

/// One product of a call: all products of a call share their activations.
#[derive(Debug)]
pub struct Product<'a> {
    /// `None`: somebody else has multiplied already, `out` holds the result, bias included.
    pub weights: Option<&'a PackedMatrix>,
    /// Added to every row, `[out_features]`.
    pub bias: Option<&'a [f32]>,
    /// `[rows, out_features]`, overwritten.
    pub out: &'a mut [f32],
}

/// A [`Product`] whose output the tasks share.
struct Work<'a> {
    weights: &'a PackedMatrix,
    bias: Option<&'a [f32]>,
    out: DisjointMut<'a, f32>,
}

impl<'a> Work<'a> {
    fn of(product: &'a mut Product<'_>) -> Option<Self> {
        Some(Self { weights: product.weights?, bias: product.bias, out: DisjointMut::new(&mut *product.out) })
    }
}

/// What a tile kernel works on: 16 output rows times some rows of activations.
struct Tile<'a> {
    weights: &'a PackedMatrix,
    /// Records of this tile.
    records: &'a [u8],
    activations: &'a QuantizedRows,
}

/// Results of one tile: `[activation row][16]`.
type TileOut = [[f32; ROWS_PER_TILE]];

/// Work of one task in bytes of packed weights, about 50 µs for one row of activations.
const TASK_BYTES: usize = 128 * 1024;

/// Activation rows handed to a tile kernel at once; bounds its result buffer.
const ROWS_PER_CALL: usize = 64;

/// Multiplies all rows of `activations` with every product's weights.
///
/// `extra` further tasks run in the same parallel region, e.g. the first half of low-rank deltas of the same activations.
///
/// # Panics
/// When a product's shapes do not match the activations.
pub fn run(
    cpu: &Cpu,
    activations: &QuantizedRows,
    products: &mut [Product<'_>],
    num_extra: usize,
    extra: &(dyn Fn(usize) + Sync),
) {
    const MAX_PRODUCTS: usize = 4;
    assert!(products.len() <= MAX_PRODUCTS, "at most {MAX_PRODUCTS} products share a call");
    let num_rows = activations.num_rows();
    let isa = cpu.isa();
    // Tasks of all products in one region: `task_ends[i]` is the first task after product i.
    let mut task_ends = [0; MAX_PRODUCTS];
    let mut tiles_per_task = [1; MAX_PRODUCTS];
    let mut num_tasks = 0;
    for (i, product) in products.iter().enumerate() {
        task_ends[i] = num_tasks;
        let Some(weights) = product.weights else { continue };
        assert_eq!(weights.in_features(), activations.width(), "activations do not fit the weights");
        assert_eq!(product.out.len(), num_rows * weights.out_features(), "output does not fit the weights");
        assert!(product.bias.is_none_or(|b| b.len() == weights.out_features()), "bias does not fit the weights");
        let tile_bytes = weights.in_features() / BLOCK * weights.layout().record_bytes();
        tiles_per_task[i] = (TASK_BYTES / (tile_bytes * num_rows.clamp(1, 8))).max(1);
        num_tasks += weights.num_tiles().div_ceil(tiles_per_task[i]);
        task_ends[i] = num_tasks;
    }
    let num_products = products.len();
    let work: [Option<Work<'_>>; MAX_PRODUCTS] = {
        let mut products = products.iter_mut();
        std::array::from_fn(|_| products.next().and_then(Work::of))
    };
    cpu.pool().run(num_tasks + num_extra, &|task| {
        let Some(index) = task_ends[..num_products].iter().position(|&end| task < end) else {
            return extra(task - num_tasks);
        };
        let Some(Work { weights, bias, out }) = &work[index] else { return };
        let first_task = if index == 0 { 0 } else { task_ends[index - 1] };
        let first_tile = (task - first_task) * tiles_per_task[index];
        let last_tile = (first_tile + tiles_per_task[index]).min(weights.num_tiles());
        let mut buffer = [[0.0; ROWS_PER_TILE]; ROWS_PER_CALL];
        for tile in first_tile..last_tile {
            let job = Tile { weights, records: weights.tile(tile), activations };
            let first_out = tile * ROWS_PER_TILE;
            let width = ROWS_PER_TILE.min(weights.out_features() - first_out);
            multiply_tile(isa, &job, &mut buffer, &mut |row, results| {
                // SAFETY: this task alone writes these columns of this product.
                let target = unsafe { out.slice(row * weights.out_features() + first_out, width) };
                match bias {
                    Some(bias) => {
                        for ((t, r), b) in target.iter_mut().zip(results).zip(&bias[first_out..]) {
                            *t = r + b;
                        }
                    }
                    None => match <&mut [f32; ROWS_PER_TILE]>::try_from(&mut *target) {
                        // The size is known here, so this is two stores instead of a call.
                        Ok(whole) => *whole = *results,
                        Err(_) => target.copy_from_slice(&results[..width]),
                    },
                }
            });
        }
    });
}

/// Multiplies one tile with all rows and gives each row's 16 results to `store`.
fn multiply_tile(
    isa: Isa,
    tile: &Tile<'_>,
    buffer: &mut [[f32; ROWS_PER_TILE]; ROWS_PER_CALL],
    store: &mut dyn FnMut(usize, &[f32; ROWS_PER_TILE]),
) {
    let num_rows = tile.activations.num_rows();
    for first_row in (0..num_rows).step_by(ROWS_PER_CALL) {
        let out = &mut buffer[..ROWS_PER_CALL.min(num_rows - first_row)];
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::multiply(tile, first_row, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => avx512::multiply(tile, first_row, out),
            _ => portable::multiply(tile, first_row, out),
        }
        for (i, results) in out.iter().enumerate() {
            store(first_row + i, results);
        }
    }
}

#[cfg(test)]
mod tests;
