//! GGUF's quantized weights, repacked once at load into the order the GEMM reads them in.

mod blocks;
mod packed;
mod weight_type;

pub use blocks::BlockFormat;
pub use packed::PackedMatrix;
pub(crate) use packed::{Layout, ROWS_PER_TILE};
pub use weight_type::WeightType;
