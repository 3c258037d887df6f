//! A CUDA device: the kernels of `kernels/cuda`, over a driver.

pub mod args;
pub mod attention;
pub mod driver;
pub mod embed;
pub mod kv;
pub mod nvidia;
pub mod ptx;
