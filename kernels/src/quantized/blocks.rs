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
}

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
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
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
            Self::Q5_0 => 16,
            Self::Q8_0 => 128,
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
