//! A CUDA device: the kernels of `kernels/cuda`, over a driver.

pub mod args;
pub mod attention;
pub mod dense;
pub mod driver;
pub mod embed;
pub mod head;
pub mod kv;
pub mod low_rank;
pub mod nvidia;
pub mod ptx;
