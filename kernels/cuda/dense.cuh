// Products with matrices that are not quantized: y = W x + bias in f32, W in f16, bf16 or f32.
#pragma once
#include "products.cuh"

constexpr i32 DENSE_THREADS = 128;
constexpr i32 OUTS_AT_ONCE = 4;

// Grid: tiles of TILE_ROWS rows, slots of outputs. A warp takes every so many'th group of outputs for the rows of its tile.
struct DenseArgs {
    const void* weights; // [out][stride], zeros beyond in, or that of each expert; null where each row's adapter has them
    const f32* bias;     // [out], or null
    const f32* x;        // [rows][x_stride], x_stride a multiple of 4
    f32* y;              // [rows][out]
    RowAdapters adapters;
    const i32* experts; // [rows]: those that the rows go to, or null
    i32 x_stride;
    i32 stride; // a multiple of 8
    i32 num_rows;
    i32 in_features;
    i32 out_features;
    i32 unused;
};
static_assert(sizeof(DenseArgs) == 72, "as in dense.rs");

// Rows first..first + n, n at most ROWS.
template <Element ELEMENT, i32 ROWS, i32 OUTS>
DEVICE void dense_rows(const DenseArgs& args, const void* weights, i32 first, i32 n) {
    constexpr i32 N = ROWS * OUTS, SIZE = ELEMENT == F32 ? 4 : 2, WARPS = DENSE_THREADS / 32;
    Operands<ROWS, OUTS> from;
    from.x = args.x + (i64)first * args.x_stride;
    from.in_features = args.in_features;
#pragma unroll
    for (i32 m = 0; m < ROWS; m++) from.offsets[m] = minimum(m, n - 1) * args.x_stride;
    i32 slot = block_y() * WARPS + warp_index();
    for (i32 out = slot * OUTS; out < args.out_features; out += grid_y() * WARPS * OUTS) {
#pragma unroll
        for (i32 o = 0; o < OUTS; o++)
            from.weights[o] = (const u8*)weights + (i64)minimum(out + o, args.out_features - 1) * args.stride * SIZE;
        f32 sums[N];
        partial_products<ELEMENT>(from, lane_index() * AT_ONCE, 32 * AT_ONCE, sums);
        f32 sum = warp_sums(sums);
        i32 index = lane_index() / LANES_OF_SUM<N>, m = index / OUTS, o = out + index % OUTS;
        if (lane_index() % LANES_OF_SUM<N> == 0 && m < n && o < args.out_features)
            args.y[(i64)(first + m) * args.out_features + o] = args.bias ? sum + args.bias[o] : sum;
    }
}

template <Element ELEMENT> DEVICE void dense_tile(const DenseArgs& args, const void* weights, i32 first, i32 n) {
    // One row gains nothing from outputs taken together while there are warps for each.
    bool one_each = args.out_features <= grid_y() * (DENSE_THREADS / 32);
    if (n == 1 && one_each) dense_rows<ELEMENT, 1, 1>(args, weights, first, n);
    else if (n == 1) dense_rows<ELEMENT, 1, OUTS_AT_ONCE>(args, weights, first, n);
    else if (n == 2) dense_rows<ELEMENT, 2, OUTS_AT_ONCE>(args, weights, first, n);
    else if (n <= 4) dense_rows<ELEMENT, 4, OUTS_AT_ONCE>(args, weights, first, n);
    else dense_rows<ELEMENT, TILE_ROWS, OUTS_AT_ONCE>(args, weights, first, n);
}

template <Element ELEMENT> DEVICE void dense(const DenseArgs& args) {
    constexpr i32 SIZE = ELEMENT == F32 ? 4 : 2;
    i32 first = block_x() * TILE_ROWS, end = minimum(first + TILE_ROWS, args.num_rows);
    for (i32 n; first < end; first += n) {
        i32 expert = args.experts ? args.experts[first] : 0;
        n = 1;
        while (first + n < end && (!args.experts || args.experts[first + n] == expert)) n++;
        i64 before = (i64)expert * args.out_features * args.stride;
        dense_tile<ELEMENT>(args, (const u8*)args.weights + before * SIZE, first, n);
    }
}

KERNEL(dense_f16, DenseArgs, DENSE_THREADS, 3) { dense<F16>(args); }
KERNEL(dense_bf16, DenseArgs, DENSE_THREADS, 3) { dense<BF16>(args); }
KERNEL(dense_f32, DenseArgs, DENSE_THREADS, 3) { dense<F32>(args); }

// The logits of the rows whose adapter has a head of its own; the others' stay.
KERNEL(adapter_heads, DenseArgs, DENSE_THREADS, 3) {
    i32 first = block_x() * TILE_ROWS, end = minimum(first + TILE_ROWS, args.num_rows);
    for (i32 n; first < end; first += n) {
        n = num_alike(args.adapters, first, end);
        const AdapterTable* table = adapter_of(args.adapters, first);
        if (table && table->head) dense_tile<F16>(args, table->head, first, n);
    }
}
