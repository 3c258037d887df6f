// One weight of a row as a GGUF file holds it, with the bits that `BlockFormat::dequantize_row` of the CPU kernels gives it.
#pragma once
#include "device.cuh"

// GGML's numbers of types.
enum struct RowType : i32 {
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
};

// What nibbles stand for, as in ../src/quantized/blocks.rs.
CONSTANT i8 NON_LINEAR[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
CONSTANT i8 FLOATS[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

DEVICE f32 half_at(const u8* bytes) { return to_f32(*(const f16*)bytes); }

// Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum where HAS_MIN, fifth bits where HAS_HIGH, 32 nibbles; weights are less OFFSET.
template <bool HAS_MIN, bool HAS_HIGH, i32 OFFSET> DEVICE f32 legacy_value(const u8* row, i32 k) {
    constexpr i32 HIGH = HAS_MIN ? 4 : 2, NIBBLES = HIGH + (HAS_HIGH ? 4 : 0);
    const u8* block = row + (i64)(k / 32) * (NIBBLES + 16);
    i32 i = k % 32;
    i32 q = block[NIBBLES + i % 16] >> (i / 16 * 4) & 15;
    if constexpr (HAS_HIGH) q |= (block[HIGH + i / 8] >> (i % 8) & 1) << 4;
    f32 product = half_at(block) * (f32)(q - OFFSET);
    if constexpr (HAS_MIN) return product + half_at(block + 2);
    return product;
}

DEVICE f32 q8_0_value(const u8* row, i32 k) {
    const u8* block = row + (i64)(k / 32) * 34;
    return half_at(block) * (f32)(i8)block[2 + k % 32];
}

// Sixteen groups of 16: scales and minima in nibbles, 2-bit weights.
DEVICE f32 q2_k_value(const u8* row, i32 k) {
    const u8* block = row + (i64)(k / 256) * 84;
    i32 i = k % 256, scale = block[i / 16];
    i32 q = block[16 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
    return half_at(block + 80) * (f32)(scale & 15) * (f32)q - half_at(block + 82) * (f32)(scale >> 4);
}

// Sixteen groups of 16: 6-bit signed scales, 2-bit weights with a third bit in a mask.
DEVICE f32 q3_k_value(const u8* row, i32 k) {
    const u8* block = row + (i64)(k / 256) * 110;
    const u8* packed = block + 96;
    i32 i = k % 256, group = i / 16;
    i32 low = packed[group % 8] >> (group / 8 * 4) & 15, high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
    i32 q = (block[32 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3) | (block[i % 32] >> (i / 32) & 1) << 2;
    return half_at(block + 108) * (f32)((low | high << 4) - 32) * (f32)(q - 4);
}

// Q4_K and Q5_K, eight groups of 32: 6-bit scales and minima, nibbles, fifth bits where HAS_HIGH.
template <bool HAS_HIGH> DEVICE f32 q45_k_value(const u8* row, i32 k) {
    constexpr i32 NIBBLES = HAS_HIGH ? 48 : 16;
    const u8* block = row + (i64)(k / 256) * (NIBBLES + 128);
    const u8* packed = block + 4;
    i32 i = k % 256, group = i / 32;
    i32 scale, min;
    if (group < 4) {
        scale = packed[group] & 63;
        min = packed[group + 4] & 63;
    } else {
        scale = (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
        min = packed[group + 4] >> 4 | packed[group] >> 6 << 4;
    }
    i32 q = block[NIBBLES + i / 64 * 32 + i % 32] >> (group % 2 * 4) & 15;
    if constexpr (HAS_HIGH) q |= (block[16 + i % 32] >> group & 1) << 4;
    return half_at(block) * (f32)scale * (f32)q - half_at(block + 2) * (f32)min;
}

// Sixteen groups of 16: signed byte scales, nibbles with two high bits.
DEVICE f32 q6_k_value(const u8* row, i32 k) {
    const u8* block = row + (i64)(k / 256) * 210;
    i32 i = k % 256, half = i / 128, group = i / 32 % 4;
    i32 low = block[half * 64 + group % 2 * 32 + i % 32] >> (group / 2 * 4) & 15;
    i32 high = block[128 + half * 32 + i % 32] >> (group * 2) & 3;
    return half_at(block + 208) * (f32)(i8)block[192 + i / 16] * (f32)((low | high << 4) - 32);
}

// Number i of 32 nibbles, the first half of them the low ones, by what `table` says.
DEVICE f32 from_table(const i8* table, const u8* nibbles, i32 i) {
    return (f32)table[nibbles[i % 16] >> (i / 16 * 4) & 15];
}

DEVICE f32 iq4_nl_value(const u8* row, i32 k) {
    const u8* block = row + (i64)(k / 32) * 18;
    return half_at(block) * from_table(NON_LINEAR, block + 2, k % 32);
}

// Eight groups of 32: 6-bit signed scales, nibbles.
DEVICE f32 iq4_xs_value(const u8* row, i32 k) {
    const u8* block = row + (i64)(k / 256) * 136;
    i32 group = k % 256 / 32;
    i32 low = block[4 + group / 2] >> (group % 2 * 4) & 15, high = *(const u16*)(block + 2) >> (group * 2) & 3;
    return half_at(block) * (f32)((low | high << 4) - 32) * from_table(NON_LINEAR, block + 8 + group * 16, k % 32);
}

// The scale is a power of two, of half the floats' unit: 2^(byte - 128), which is subnormal for the two least.
DEVICE f32 mxfp4_value(const u8* row, i32 k) {
    const u8* block = row + (i64)(k / 32) * 17;
    u32 exponent = block[0];
    f32 scale = as_f32(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
    return scale * from_table(FLOATS, block + 1, k % 32);
}

// Weight k of a row.
DEVICE f32 block_value(RowType type, const u8* row, i32 k) {
    switch (type) {
        case RowType::F32: return ((const f32*)row)[k];
        case RowType::F16: return to_f32(((const f16*)row)[k]);
        case RowType::BF16: return bf16_to_f32(((const bf16*)row)[k]);
        case RowType::Q4_0: return legacy_value<false, false, 8>(row, k);
        case RowType::Q4_1: return legacy_value<true, false, 0>(row, k);
        case RowType::Q5_0: return legacy_value<false, true, 16>(row, k);
        case RowType::Q5_1: return legacy_value<true, true, 0>(row, k);
        case RowType::Q8_0: return q8_0_value(row, k);
        case RowType::Q2_K: return q2_k_value(row, k);
        case RowType::Q3_K: return q3_k_value(row, k);
        case RowType::Q4_K: return q45_k_value<false>(row, k);
        case RowType::Q5_K: return q45_k_value<true>(row, k);
        case RowType::IQ4_NL: return iq4_nl_value(row, k);
        case RowType::IQ4_XS: return iq4_xs_value(row, k);
        case RowType::MXFP4: return mxfp4_value(row, k);
        default: return q6_k_value(row, k);
    }
}
