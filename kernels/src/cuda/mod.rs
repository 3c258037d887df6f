//! A CUDA device: the kernels of `kernels/cuda`, over a driver.

pub mod activations;
pub mod args;
pub mod attention;
pub mod dense;
pub mod driver;
pub mod embed;
pub mod gemm;
pub mod head;
pub mod kv;
pub mod low_rank;
pub mod matrix;
pub mod nvidia;
pub mod ptx;
