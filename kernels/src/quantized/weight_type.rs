//! The types of weights that a base's file holds.

use half::{bf16, f16};

use super::BlockFormat;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    Blocks(BlockFormat),
    F16,
    BF16,
    F32,
}

impl WeightType {
    /// Bytes of a row of `width` weights, or `None` when `width` does not divide into blocks.
    pub fn row_bytes(self, width: usize) -> Option<usize> {
        match self {
            Self::Blocks(format) => format.row_bytes(width),
            Self::F16 | Self::BF16 => Some(width * 2),
            Self::F32 => Some(width * 4),
        }
    }

    /// A row of the file as f32, `[width]`.
    pub fn dequantize_row(self, bytes: &[u8], row: &mut [f32]) {
        match self {
            Self::Blocks(format) => format.dequantize_row(bytes, row),
            Self::F16 => fill(row, bytes.as_chunks().0, |bytes| f16::from_le_bytes(*bytes).to_f32()),
            Self::BF16 => fill(row, bytes.as_chunks().0, |bytes| bf16::from_le_bytes(*bytes).to_f32()),
            Self::F32 => fill(row, bytes.as_chunks().0, |bytes| f32::from_le_bytes(*bytes)),
        }
    }
}

fn fill<const N: usize>(row: &mut [f32], weights: &[[u8; N]], to_f32: impl Fn(&[u8; N]) -> f32) {
    row.iter_mut().zip(weights).for_each(|(to, from)| *to = to_f32(from));
}
