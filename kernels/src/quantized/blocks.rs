//! The block formats of GGML, decoded to small unsigned integers with scales and minima.
//!
//! Layouts as in ggml's `ggml-common.h`; all little-endian.

use half::f16;

/// A quantized weight type of GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)] // the format's own names
pub enum BlockFormat {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// What the sixteen numbers of [`BlockFormat::IQ4_NL`] and [`BlockFormat::IQ4_XS`] stand for, closer where weights are many.
const NON_LINEAR: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice what those of [`BlockFormat::MXFP4`] do: floats of two bits of exponent and one of mantissa (OCP MX, E2M1).
const FLOATS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// 32 weights: `w[i] = scale[i / 16] · (q[i] - offset) - min[i / 16]`, with the offset of their format.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Block32 {
    pub q: [u8; 32],
    pub scale: [f32; 2],
    pub min: [f32; 2],
}

impl BlockFormat {
    /// Weights per block of the file.
    pub fn block_len(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4_NL | Self::MXFP4 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K | Self::IQ4_XS => 256,
        }
    }

    /// Bytes per block of the file.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
            Self::IQ4_NL => 18,
            Self::IQ4_XS => 136,
            Self::MXFP4 => 17,
        }
    }

    /// Bytes of a row of `width` weights, or `None` when `width` does not divide into blocks.
    pub fn row_bytes(self, width: usize) -> Option<usize> {
        width.is_multiple_of(self.block_len()).then(|| width / self.block_len() * self.block_bytes())
    }

    /// What is subtracted from every `q` before scaling.
    pub(crate) fn offset(self) -> i32 {
        match self {
            Self::Q4_0 => 8,
            Self::Q5_0 | Self::MXFP4 => 16,
            Self::Q8_0 | Self::IQ4_NL | Self::IQ4_XS => 128,
            Self::Q3_K => 4,
            Self::Q6_K => 32,
            Self::Q4_1 | Self::Q5_1 | Self::Q2_K | Self::Q4_K | Self::Q5_K => 0,
        }
    }

    /// Decodes a row into `row[i]`, 32 weights each.
    pub(crate) fn decode_row(self, bytes: &[u8], row: &mut [Block32]) {
        let per_block = self.block_len() / 32;
        for (bytes, blocks) in bytes.chunks_exact(self.block_bytes()).zip(row.chunks_exact_mut(per_block)) {
            match self {
                Self::Q4_0 => blocks[0] = legacy(bytes, false, false),
                Self::Q4_1 => blocks[0] = legacy(bytes, true, false),
                Self::Q5_0 => blocks[0] = legacy(bytes, false, true),
                Self::Q5_1 => blocks[0] = legacy(bytes, true, true),
                Self::Q8_0 => blocks[0] = q8_0(bytes),
                Self::Q2_K => q2_k(bytes, blocks),
                Self::Q3_K => q3_k(bytes, blocks),
                Self::Q4_K => q45_k(bytes, blocks, false),
                Self::Q5_K => q45_k(bytes, blocks, true),
                Self::Q6_K => q6_k(bytes, blocks),
                Self::IQ4_NL => blocks[0] = from_table(&bytes[2..], &NON_LINEAR, self.offset(), f16_at(bytes, 0)),
                Self::IQ4_XS => iq4_xs(bytes, blocks),
                // A power of two, of half the floats' unit.
                Self::MXFP4 => {
                    let scale = (f32::from(bytes[0]) - 128.0).exp2();
                    blocks[0] = from_table(&bytes[1..], &FLOATS, self.offset(), scale);
                }
            }
        }
    }

    /// Decodes a row of the file to f32: `row` is `[width]`.
    pub fn dequantize_row(self, bytes: &[u8], row: &mut [f32]) {
        let offset = self.offset();
        let mut blocks = [Block32::default(); 8];
        let blocks = &mut blocks[..self.block_len() / 32];
        for (bytes, row) in bytes.chunks_exact(self.block_bytes()).zip(row.chunks_exact_mut(self.block_len())) {
            self.decode_row(bytes, blocks);
            for (block, row) in blocks.iter().zip(row.chunks_exact_mut(32)) {
                for (i, (w, q)) in row.iter_mut().zip(block.q).enumerate() {
                    *w = block.scale[i / 16] * (i32::from(q) - offset) as f32 - block.min[i / 16];
                }
            }
        }
    }
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum where `has_min`, fifth bits where `has_high`, 32 nibbles.
fn legacy(bytes: &[u8], has_min: bool, has_high: bool) -> Block32 {
    let scale = f16_at(bytes, 0);
    let min = if has_min { -f16_at(bytes, 2) } else { 0.0 };
    let rest = &bytes[if has_min { 4 } else { 2 }..];
    let (high, nibbles) = if has_high {
        (u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]), &rest[4..20])
    } else {
        (0, &rest[..16])
    };
    let mut q = [0; 32];
    for (i, byte) in nibbles.iter().enumerate() {
        q[i] = (byte & 15) | (((high >> i) & 1) as u8 * 16);
        q[i + 16] = (byte >> 4) | (((high >> (i + 16)) & 1) as u8 * 16);
    }
    Block32 { q, scale: [scale; 2], min: [min; 2] }
}

/// 32 nibbles, the first half of the weights in the low ones, which `table` says the meaning of.
fn from_table(nibbles: &[u8], table: &[i8; 16], offset: i32, scale: f32) -> Block32 {
    let value = |nibble: u8| (i32::from(table[usize::from(nibble)]) + offset) as u8;
    let mut q = [0; 32];
    for (i, byte) in nibbles[..16].iter().enumerate() {
        q[i] = value(byte & 15);
        q[i + 16] = value(byte >> 4);
    }
    Block32 { q, scale: [scale; 2], min: [0.0; 2] }
}

/// Eight groups of 32: 6-bit signed scales, nibbles.
fn iq4_xs(bytes: &[u8], blocks: &mut [Block32]) {
    let d = f16_at(bytes, 0);
    let high = u16::from_le_bytes([bytes[2], bytes[3]]);
    let (low, nibbles) = (&bytes[4..8], &bytes[8..136]);
    for (b, block) in blocks.iter_mut().enumerate() {
        let scale = i32::from(low[b / 2] >> (b % 2 * 4) & 15) | i32::from(high >> (2 * b) & 3) << 4;
        let scale = d * (scale - 32) as f32;
        *block = from_table(&nibbles[b * 16..], &NON_LINEAR, BlockFormat::IQ4_XS.offset(), scale);
    }
}

fn q8_0(bytes: &[u8]) -> Block32 {
    let scale = f16_at(bytes, 0);
    let mut q = [0; 32];
    for (q, byte) in q.iter_mut().zip(&bytes[2..34]) {
        *q = byte ^ 128;
    }
    Block32 { q, scale: [scale; 2], min: [0.0; 2] }
}

/// Sixteen groups of 16: scales and minima in nibbles, 2-bit weights.
fn q2_k(bytes: &[u8], blocks: &mut [Block32]) {
    let (scales, weights) = (&bytes[..16], &bytes[16..80]);
    let (d, dmin) = (f16_at(bytes, 80), f16_at(bytes, 82));
    for (b, block) in blocks.iter_mut().enumerate() {
        let source = &weights[b / 4 * 32..][..32];
        for (q, byte) in block.q.iter_mut().zip(source) {
            *q = byte >> (b % 4 * 2) & 3;
        }
        for half in 0..2 {
            let scale = scales[b * 2 + half];
            block.scale[half] = d * f32::from(scale & 15);
            block.min[half] = dmin * f32::from(scale >> 4);
        }
    }
}

/// Sixteen groups of 16: 6-bit signed scales, 2-bit weights with a third bit in a mask.
fn q3_k(bytes: &[u8], blocks: &mut [Block32]) {
    let (mask, weights, packed) = (&bytes[..32], &bytes[32..96], &bytes[96..108]);
    let d = f16_at(bytes, 108);
    let scale = |j: usize| {
        let low = if j < 8 { packed[j] & 15 } else { packed[j - 8] >> 4 };
        let high = packed[8 + j % 4] >> (j / 4 * 2) & 3;
        d * (i32::from(low | high << 4) - 32) as f32
    };
    for (b, block) in blocks.iter_mut().enumerate() {
        let source = &weights[b / 4 * 32..][..32];
        for (i, q) in block.q.iter_mut().enumerate() {
            *q = source[i] >> (b % 4 * 2) & 3 | (mask[i] >> b & 1) << 2;
        }
        block.scale = [scale(b * 2), scale(b * 2 + 1)];
        block.min = [0.0; 2];
    }
}

/// Q4_K and Q5_K, eight groups of 32: 6-bit scales and minima, nibbles, fifth bits where `has_high`.
fn q45_k(bytes: &[u8], blocks: &mut [Block32], has_high: bool) {
    let (d, dmin) = (f16_at(bytes, 0), f16_at(bytes, 2));
    let packed = &bytes[4..16];
    let (high, nibbles) = if has_high { (&bytes[16..48], &bytes[48..176]) } else { (&bytes[..0], &bytes[16..144]) };
    for (b, block) in blocks.iter_mut().enumerate() {
        let (scale, min) = if b < 4 {
            (packed[b] & 63, packed[b + 4] & 63)
        } else {
            (packed[b + 4] & 15 | packed[b - 4] >> 6 << 4, packed[b + 4] >> 4 | packed[b] >> 6 << 4)
        };
        let source = &nibbles[b / 2 * 32..][..32];
        for (i, q) in block.q.iter_mut().enumerate() {
            *q = source[i] >> (b % 2 * 4) & 15;
            if has_high {
                *q |= (high[i] >> b & 1) << 4;
            }
        }
        block.scale = [d * f32::from(scale); 2];
        block.min = [dmin * f32::from(min); 2];
    }
}

/// Sixteen groups of 16: signed byte scales, nibbles with two high bits.
fn q6_k(bytes: &[u8], blocks: &mut [Block32]) {
    let (low, high, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let d = f16_at(bytes, 208);
    for (b, block) in blocks.iter_mut().enumerate() {
        // Each half of 128 weights: the first two groups of 32 in the low nibbles, the next two in the high ones.
        let (half, group) = (b / 4, b % 4);
        let nibbles = &low[half * 64 + group % 2 * 32..][..32];
        let pairs = &high[half * 32..][..32];
        for (i, q) in block.q.iter_mut().enumerate() {
            *q = nibbles[i] >> (group / 2 * 4) & 15 | (pairs[i] >> (group * 2) & 3) << 4;
        }
        for side in 0..2 {
            block.scale[side] = d * f32::from(scales[b * 2 + side].cast_signed());
        }
        block.min = [0.0; 2];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the package `gguf` of llama.cpp makes of the same bytes.
    #[test]
    fn formats_with_tables_hold_the_weights_that_llama_cpp_reads() {
        let dequantized = |format: BlockFormat, scale: &[u8]| {
            let mut bytes: Vec<u8> = (0..format.block_bytes()).map(|i| (i * 37 + 11) as u8).collect();
            bytes[..scale.len()].copy_from_slice(scale);
            let mut row = vec![0.0; format.block_len()];
            format.dequantize_row(&bytes, &mut row);
            row
        };
        let quarter = f16::from_f32(0.25).to_le_bytes();
        let row = dequantized(BlockFormat::IQ4_NL, &quarter);
        assert_eq!(row[..8], [-8.75, 6.25, 28.25, -12.25, 3.25, 22.25, -16.25, 0.25]);
        assert_eq!(row[16..24], [-8.75, -2.5, 3.25, 13.25, 22.25, -31.75, -16.25, -8.75]);
        let row = dequantized(BlockFormat::IQ4_XS, &quarter);
        let places = [0, 15, 16, 31, 32, 63, 64, 100, 128, 130, 160, 191, 192, 200, 224, 255];
        let expected = [
            16.25, -22.25, 16.25, 8.75, 113.75, -43.75, 195.0, 10.0, -146.25, 155.25, -227.5, 311.5, -487.5, 285.0,
            260.0, -4.0,
        ];
        assert_eq!(places.map(|place| row[place]), expected);
        let row = dequantized(BlockFormat::MXFP4, &[125]);
        assert_eq!(row[..8], [0.0, 0.75, -0.25, -1.5, 0.5, -0.125, -1.0, 0.375]);
        assert_eq!(row[16..24], [0.375, 0.75, 1.5, -0.125, -0.5, -1.0, 0.0, 0.375]);
    }
}
