//! The quantized GEMM: `y[m][n] = Σ_k w[n][k] · x[m][k]` with packed weights and int8 activations.
//!
//! Within a block of 32 inputs the products are summed exactly in integers; the blocks are summed in f32 in input order.
//! Every path does the same operations per output element, so rows computed together or alone, by one thread or many,
//! have the same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod passes;
mod portable;
mod portions;

use std::fmt;
use std::ops::Range;

use self::portions::Portions;
use crate::activations::{BLOCK, QuantizedRows};
use crate::quantized::{Layout, PackedMatrix, ROWS_PER_TILE};
use crate::threads::DisjointMut;
use crate::{Cpu, Isa};

/// One product of a call: all products of a call share their activations.
#[derive(Debug)]
pub struct Product<'a> {
    /// `None`: somebody else has multiplied already, `out` holds the result, bias included.
    pub weights: Option<Weights<'a>>,
    /// Added to every row, `[out_features]`.
    pub bias: Option<&'a [f32]>,
    /// `[rows, out_features]`, overwritten.
    pub out: &'a mut [f32],
}

/// What the rows of a call are multiplied by.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    /// All by one matrix.
    One(&'a PackedMatrix),
    /// Each by the matrix of its group.
    ByGroup(&'a dyn RowGroups),
}

impl<'a> From<&'a PackedMatrix> for Weights<'a> {
    fn from(matrix: &'a PackedMatrix) -> Self {
        Self::One(matrix)
    }
}

/// Rows in groups that have a matrix each, all of one shape and layout.
pub trait RowGroups: fmt::Debug + Sync {
    /// At least one.
    fn count(&self) -> usize;

    /// The rows of a group, which follow those of the group before, and its matrix.
    fn get(&self, group: usize) -> (Range<usize>, &PackedMatrix);
}

/// A [`Product`] whose output the tasks share.
struct Work<'a> {
    weights: Weights<'a>,
    bias: Option<&'a [f32]>,
    out: DisjointMut<'a, f32>,
    /// Of the tiles of a group, each a task.
    portions: Portions,
    tasks_per_group: usize,
    num_tasks: usize,
}

impl<'a> Work<'a> {
    /// # Panics
    /// When shapes do not match the activations.
    fn of(product: &'a mut Product<'_>, activations: &QuantizedRows, num_threads: usize) -> Option<Self> {
        let weights = product.weights?;
        let num_rows = activations.num_rows();
        let num_groups = weights.num_groups();
        let (_, matrix) = weights.group(0, num_rows);
        let out_features = matrix.out_features();
        assert_eq!(product.out.len(), num_rows * out_features, "output does not fit the weights");
        assert!(product.bias.is_none_or(|b| b.len() == out_features), "bias does not fit the weights");
        let mut end = 0;
        for group in 0..num_groups {
            let (rows, other) = weights.group(group, num_rows);
            assert!(rows.start == end && rows.end >= end, "groups of rows do not follow each other");
            assert_eq!(other.in_features(), activations.width(), "activations do not fit the weights");
            assert!(other.out_features() == out_features && other.layout() == matrix.layout(), "groups differ");
            end = rows.end;
        }
        assert_eq!(end, num_rows, "groups of rows do not cover the activations");
        let tile_bytes = matrix.in_features() / BLOCK * matrix.layout().record_bytes();
        // Six rows take about as long as reading the weights.
        let rows_per_group = num_rows.div_ceil(num_groups);
        let tiles_per_task = (6 * TASK_BYTES / (tile_bytes * (6 + rows_per_group))).max(1);
        let portions = Portions {
            total: matrix.num_tiles(),
            num_threads: num_threads.div_ceil(num_groups),
            unit: TILES_PER_CALL,
            least: tiles_per_task.next_multiple_of(TILES_PER_CALL),
        };
        let tasks_per_group = portions.count();
        let num_tasks = num_groups * tasks_per_group;
        let out = DisjointMut::new(&mut *product.out);
        Some(Self { weights, bias: product.bias, out, portions, tasks_per_group, num_tasks })
    }
}

impl<'a> Weights<'a> {
    fn num_groups(self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::ByGroup(groups) => groups.count(),
        }
    }

    /// The rows of a group out of `num_rows`, and its matrix.
    fn group(self, group: usize, num_rows: usize) -> (Range<usize>, &'a PackedMatrix) {
        match self {
            Self::One(matrix) => (0..num_rows, matrix),
            Self::ByGroup(groups) => groups.get(group),
        }
    }
}

/// What a tile kernel works on: 16 output rows times some rows of activations.
pub(crate) struct Tile<'a> {
    pub layout: Layout,
    /// What every weight is stored with on top.
    pub offset: i32,
    /// Records of this tile.
    pub records: &'a [u8],
    pub activations: &'a QuantizedRows,
}

/// Results of one tile: `[activation row][16]`.
pub(crate) type TileOut = [[f32; ROWS_PER_TILE]];

/// Least work of a task in bytes of packed weights, for one row of activations.
const TASK_BYTES: usize = 128 * 1024;

/// Activation rows handed to a tile kernel at once; bounds its result buffer.
const ROWS_PER_CALL: usize = 128;
/// Tiles handed to a kernel at once: what is loaded of the activations serves both.
const TILES_PER_CALL: usize = 2;

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
    let isa = cpu.isa();
    let work: [Option<Work<'_>>; MAX_PRODUCTS] = {
        let mut products = products.iter_mut();
        std::array::from_fn(|_| Work::of(products.next()?, activations, cpu.pool().num_threads()))
    };
    let num_tasks = work.iter().flatten().map(|work| work.num_tasks).sum::<usize>();
    // Tasks of all products in one region, and those of others behind them.
    cpu.pool().run(num_tasks + num_extra, &|task| {
        let mut task_of_product = task;
        for work in work.iter().flatten() {
            if task_of_product < work.num_tasks {
                return work.run(isa, activations, task_of_product);
            }
            task_of_product -= work.num_tasks;
        }
        extra(task - num_tasks);
    });
}

impl Work<'_> {
    /// Some tiles of a group.
    fn run(&self, isa: Isa, activations: &QuantizedRows, task: usize) {
        let (rows, matrix) = self.weights.group(task / self.tasks_per_group, activations.num_rows());
        let Range { start: first_tile, end: last_tile } = self.portions.get(task % self.tasks_per_group);
        let out_features = matrix.out_features();
        let mut buffers = [[[0.0; ROWS_PER_TILE]; ROWS_PER_CALL]; TILES_PER_CALL];
        let (layout, offset) = (matrix.layout(), matrix.offset());
        for first_tile in (first_tile..last_tile).step_by(TILES_PER_CALL) {
            let num_tiles = TILES_PER_CALL.min(last_tile - first_tile);
            let tile = |number: usize| {
                let records = matrix.tile(first_tile + number.min(num_tiles - 1));
                Tile { layout, offset, records, activations }
            };
            let tiles: [Tile<'_>; TILES_PER_CALL] = std::array::from_fn(tile);
            let first_out = first_tile * ROWS_PER_TILE;
            let width = (num_tiles * ROWS_PER_TILE).min(out_features - first_out);
            for first_row in rows.clone().step_by(ROWS_PER_CALL) {
                let num_rows = ROWS_PER_CALL.min(rows.end - first_row);
                let mut outs = buffers.each_mut().map(|buffer| &mut buffer[..num_rows]);
                multiply_rows(isa, &tiles[..num_tiles], first_row, &mut outs[..num_tiles]);
                for row in 0..num_rows {
                    let start = (first_row + row) * out_features + first_out;
                    // SAFETY: this task alone writes these columns of these rows of this product.
                    let targets = unsafe { self.out.slice(start, width) }.chunks_mut(ROWS_PER_TILE);
                    for ((target, out), first_out) in targets.zip(&outs).zip((first_out..).step_by(ROWS_PER_TILE)) {
                        put(target, &out[row], self.bias.map(|bias| &bias[first_out..]));
                    }
                }
            }
        }
    }
}

/// Writes a row's results of one tile, as many as there are, with the bias of these columns.
#[inline(always)]
fn put(target: &mut [f32], results: &[f32; ROWS_PER_TILE], bias: Option<&[f32]>) {
    match bias {
        Some(bias) => {
            for ((t, r), b) in target.iter_mut().zip(results).zip(bias) {
                *t = r + b;
            }
        }
        None => match <&mut [f32; ROWS_PER_TILE]>::try_from(&mut *target) {
            // The size is known here, so this is a few stores instead of a call.
            Ok(whole) => *whole = *results,
            Err(_) => target.copy_from_slice(&results[..target.len()]),
        },
    }
}

/// Multiplies at most [`TILES_PER_CALL`] tiles, all alike, with the rows from `first_row` on, as many as each of `outs` has.
pub(crate) fn multiply_rows(isa: Isa, tiles: &[Tile<'_>], first_row: usize, outs: &mut [&mut TileOut]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::AvxVnni => {
            let has_vnni = isa == Isa::AvxVnni;
            tiles.iter().zip(outs).for_each(|(tile, out)| avx2::multiply(has_vnni, tile, first_row, out));
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => avx512::multiply(tiles, first_row, outs),
        _ => tiles.iter().zip(outs).for_each(|(tile, out)| portable::multiply(tile, first_row, out)),
    }
}

#[cfg(test)]
mod tests;
