// What the card can do at most: memory read, and int8 products in registers. What other kernels reach is measured against it.
#pragma once
#include "args.cuh"

struct PeakArgs {
    const Words4* memory; // [num_words]
    u32* out;             // [blocks · PEAK_THREADS]: so that nothing is left out
    i64 num_words;
    i32 rounds;
    i32 unused;
};
static_assert(sizeof(PeakArgs) == 32, "as in peak.rs");

constexpr i32 PEAK_THREADS = 256;

// Every word once.
KERNEL(read_memory, PeakArgs, PEAK_THREADS) {
    i64 stride = (i64)grid_x() * PEAK_THREADS;
    u32 mixed = 0;
#pragma unroll 8
    for (i64 i = (i64)block_x() * PEAK_THREADS + thread_index(); i < args.num_words; i += stride) {
        Words4 w = load_stream(args.memory + i);
        mixed ^= w.v[0] ^ w.v[1] ^ w.v[2] ^ w.v[3];
    }
    args.out[block_x() * PEAK_THREADS + thread_index()] = mixed;
}

// `rounds` times eight independent products of 16 · 8 · 32 multiply-adds in each warp.
KERNEL(multiply_registers, PeakArgs, PEAK_THREADS) {
    i32 sums[8][4];
    u32 a[4], b[2];
    for (i32 i = 0; i < 4; i++) a[i] = 0x01010101u * (u32)(thread_index() & 3);
    for (i32 i = 0; i < 2; i++) b[i] = 0x01010101u;
    for (i32 n = 0; n < 8; n++)
        for (i32 i = 0; i < 4; i++) sums[n][i] = n;
    for (i32 round = 0; round < args.rounds; round++) {
#pragma unroll
        for (i32 n = 0; n < 8; n++) mma_u8s8(sums[n], a, b);
    }
    u32 mixed = 0;
    for (i32 n = 0; n < 8; n++)
        for (i32 i = 0; i < 4; i++) mixed += (u32)sums[n][i];
    args.out[block_x() * PEAK_THREADS + thread_index()] = mixed;
}
