// Products of f32 rows with rows of a matrix, which dense.cuh and low_rank.cuh share. A thread takes 8 inputs at a time, and
// of each row those that are its own whatever else is multiplied with it; so a product has the same bits in any company.
#pragma once
#include "args.cuh"

constexpr i32 AT_ONCE = 8;   // inputs
constexpr i32 TILE_ROWS = 8; // rows of activations that may share a row of the matrix

enum Element : i32 { F16, BF16, F32 };

// 8 weights from input k on. Rows begin at multiples of 16 bytes and are zeros up to a multiple of 8.
template <Element ELEMENT> DEVICE void load_weights(const void* row, i32 k, f32 (&w)[AT_ONCE]) {
    if constexpr (ELEMENT == F32) {
        const Words4* words = (const Words4*)((const f32*)row + k);
        Words4 low = load_stream(words), high = load_stream(words + 1);
#pragma unroll
        for (i32 i = 0; i < 4; i++) w[i] = as_f32(low.v[i]), w[4 + i] = as_f32(high.v[i]);
    } else {
        Words4 words = load_stream((const Words4*)((const u16*)row + k));
#pragma unroll
        for (i32 i = 0; i < AT_ONCE; i++) {
            u16 bits = (u16)(words.v[i / 2] >> (i % 2 * 16));
            w[i] = ELEMENT == F16 ? to_f32(bits) : bf16_to_f32(bits);
        }
    }
}

// ROWS rows of activations, all at `x` and so many floats on, and OUTS rows of a matrix. Where there are fewer, the last one
// stands in for those that are missing. Rows of x begin at multiples of 16 bytes; in_features is a multiple of 4.
template <i32 ROWS, i32 OUTS> struct Operands {
    const f32* x;
    i32 offsets[ROWS];
    const void* weights[OUTS];
    i32 in_features;
};

// Adds the products of 8 inputs from k on.
template <Element ELEMENT, i32 ROWS, i32 OUTS>
DEVICE void add_products(const Operands<ROWS, OUTS>& from, i32 k, f32 (&sums)[ROWS * OUTS]) {
    f32 w[OUTS][AT_ONCE];
#pragma unroll
    for (i32 n = 0; n < OUTS; n++) load_weights<ELEMENT>(from.weights[n], k, w[n]);
    // Behind the last input: zero weights times inputs of this row, whatever they are.
    i32 second = k + 4 < from.in_features ? 1 : 0;
#pragma unroll
    for (i32 m = 0; m < ROWS; m++) {
        const Words4* x = (const Words4*)(from.x + from.offsets[m] + k);
        Words4 halves[2] = {x[0], x[second]};
#pragma unroll
        for (i32 n = 0; n < OUTS; n++)
#pragma unroll
            for (i32 i = 0; i < AT_ONCE; i++)
                sums[m * OUTS + n] = fmaf(w[n][i], as_f32(halves[i / 4].v[i % 4]), sums[m * OUTS + n]);
    }
}

// A thread's part of all products: the inputs from `first` on, 8 of every `step`.
template <Element ELEMENT, i32 ROWS, i32 OUTS>
DEVICE void partial_products(const Operands<ROWS, OUTS>& from, i32 first, i32 step, f32 (&sums)[ROWS * OUTS]) {
#pragma unroll
    for (i32 i = 0; i < ROWS * OUTS; i++) sums[i] = 0.0f;
    // Few products leave registers for more loads under way.
#pragma unroll(ROWS * OUTS == 1 ? 4 : ROWS * OUTS <= 4 ? 2 : 1)
    for (i32 k = first; k < from.in_features; k += step) add_products<ELEMENT>(from, k, sums);
}

// The lanes of a warp that get each of N sums.
template <i32 N> constexpr i32 LANES_OF_SUM = 32 / N;

// The sums of N values over a warp: lane l gets that of value l / LANES_OF_SUM<N>, with the bits that warp_sum gives it. Each
// exchange halves the values that a lane is still concerned with.
template <i32 N> DEVICE f32 warp_sums(f32 (&v)[N]) {
#pragma unroll
    for (i32 level = 0; level < 5; level++) {
        i32 mask = 16 >> level, half = N >> (level + 1);
        bool upper = (lane_index() & mask) != 0;
        if (half == 0) v[0] += shuffle_xor(v[0], mask);
#pragma unroll
        for (i32 i = 0; i < N / 2; i++) {
            if (i >= half) continue;
            f32 other = shuffle_xor(upper ? v[i] : v[i + half], mask);
            v[i] = (upper ? v[i + half] : v[i]) + other;
        }
    }
    return v[0];
}

// How many rows from `first` on, and before `end`, have the adapter of `first`.
DEVICE i32 num_alike(RowAdapters adapters, i32 first, i32 end) {
    i32 n = 1;
    while (first + n < end && adapter_of(adapters, first + n) == adapter_of(adapters, first)) n++;
    return n;
}
