//! Tokens become hidden states: `kernels/cuda/embed.cuh`.

use super::driver::{Driver, DriverError, KernelArgs, bytes_of};
use crate::quantized::{BlockFormat, WeightType};

/// Types of weights that the kernel reads as they are in a file, by GGML's numbers.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)] // the formats' own names
pub enum RowType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
    MXFP4 = 39,
}

impl From<WeightType> for RowType {
    fn from(weight_type: WeightType) -> Self {
        match weight_type {
            WeightType::F32 => Self::F32,
            WeightType::F16 => Self::F16,
            WeightType::BF16 => Self::BF16,
            WeightType::Blocks(format) => match format {
                BlockFormat::Q4_0 => Self::Q4_0,
                BlockFormat::Q4_1 => Self::Q4_1,
                BlockFormat::Q5_0 => Self::Q5_0,
                BlockFormat::Q5_1 => Self::Q5_1,
                BlockFormat::Q8_0 => Self::Q8_0,
                BlockFormat::Q2_K => Self::Q2_K,
                BlockFormat::Q3_K => Self::Q3_K,
                BlockFormat::Q4_K => Self::Q4_K,
                BlockFormat::Q5_K => Self::Q5_K,
                BlockFormat::Q6_K => Self::Q6_K,
                BlockFormat::IQ4_NL => Self::IQ4_NL,
                BlockFormat::IQ4_XS => Self::IQ4_XS,
                BlockFormat::MXFP4 => Self::MXFP4,
            },
        }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct EmbedArgs {
    /// u32 `[rows]`. Those of no prelude are less than the vocabulary.
    pub tokens: u64,
    /// `[vocab, row_bytes]`, as in the file, at a multiple of 4.
    pub table: u64,
    /// f32 `[rows, hidden_size]`, written.
    pub hidden: u64,
    /// Addresses of [`AdapterTable`](super::args::AdapterTable)s or 0, `[rows]`; or none.
    pub adapters: u64,
    pub row_bytes: i64,
    pub row_type: RowType,
    pub hidden_size: i32,
    /// Of embeddings of the vocabulary.
    pub scale: f32,
    /// Of those of a prelude.
    pub virtual_scale: f32,
}

const _: () = assert!(size_of::<EmbedArgs>() == 56);

// SAFETY: no padding; whoever fills it in vouches for the addresses.
unsafe impl KernelArgs for EmbedArgs {}

/// Writes each row's embedding, with what its adapter adds; or the position of its adapter's prelude that it is.
///
/// # Errors
/// When the driver fails.
pub fn embed<D: Driver>(driver: &D, num_rows: usize, args: EmbedArgs) -> Result<(), DriverError> {
    // SAFETY: `KernelArgs`; hidden alone is written.
    unsafe { driver.launch("embed", [num_rows as u32, 1, 1], bytes_of(&args)) }
}
