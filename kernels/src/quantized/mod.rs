//! GGUF's quantized weights, repacked once at load into the order the GEMM reads them in.

mod blocks;
mod packed;
mod weight_type;

pub(crate) use blocks::Block32;
pub use blocks::BlockFormat;
pub(crate) use packed::{Layout, ROWS_PER_TILE, row_bytes_of};
pub use packed::{PackError, PackedMatrix};
pub use weight_type::WeightType;
