//! Every kernel of lorry, and every `unsafe` line of it, behind safe functions on slices.
//!
//! All of them take a [`Cpu`]: the instruction set chosen at start and the pool of compute threads. Each output element
//! is computed in one fixed order of operations, whatever the number of rows, tasks or threads: a row's bits never
//! depend on its neighbours.

pub mod activations;
mod arena;
pub mod attention;
pub mod canonical;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod elementwise;
pub mod gemm;
pub mod half_matrix;
pub mod heap;
pub mod host;
pub mod linear;
pub mod low_rank;
pub mod mapped_file;
pub mod merged_norm;
pub mod quantized;
pub mod shape;
mod simd;
pub mod step;
pub mod threads;

pub use cpu::{Cpu, Isa};
