// Activations between the matrix products: made, and rounded to int8 with one scale for 32 as the CPU rounds them
// (../src/activations.rs), so that equal numbers give equal integers.
#pragma once
#include "args.cuh"

// Rounds the inputs 32b..32b + 32 of a row, of which this lane has input k = 32b + lane. For a whole warp. What is not a number
// makes the block's scale not a number, and so all that the row is multiplied to.
DEVICE void quantize_lane(f32 x, i8* values_row, BlockMeta* meta_row, i32 k) {
    f32 largest = as_f32((u32)warp_max((i32)as_u32(absolute(x))));
    f32 inverse = largest > 0.0f ? divide(127.0f, largest) : 0.0f;
    f32 rounded = round_even(x * inverse);
    i32 q = absolute(rounded) <= 127.0f ? (i32)rounded : 0;
    i32 sum = q; // of 16
    for (i32 mask = 8; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
    i32 last_sum = shuffle(sum, 16);
    values_row[activation_place(k)] = (i8)q;
    if (lane_index() == 0) meta_row[k / 32] = {divide(largest, 127.0f), {(i16)sum, (i16)last_sum}};
}

DEVICE i8* values_of(const Activations& to, i64 row) { return (i8*)to.values + row * to.stride; }
DEVICE BlockMeta* meta_of(const Activations& to, i64 row) { return (BlockMeta*)to.meta + row * (to.stride / 32); }

// ---- The norm before a product ---------------------------------------------------------------------------------------------

constexpr i32 NORM_THREADS = 512;

struct NormArgs {
    f32* hidden;         // [rows][width]; += delta, unless there is a row list
    const f32* delta;    // the same, or null
    const f32* weight;   // [width]
    f32* normed;         // [rows][width]
    const i32* row_list; // [rows]: row i of the outputs is made of row row_list[i] of hidden and delta. Null: of row i
    Activations activations;
    i32 width;
    f32 eps;
};
static_assert(sizeof(NormArgs) == 72, "as in activations.rs");

// h = hidden + delta, normed = h / sqrt(mean(h²) + eps) · weight, and that as int8. A block a row.
KERNEL(add_norm_quantize, NormArgs, NORM_THREADS) {
    SHARED f32 sums[NORM_THREADS / 32];
    i64 row = block_x(), source = args.row_list ? args.row_list[row] : row;
    f32* hidden = args.hidden + source * args.width;
    const f32* delta = args.delta + source * args.width;
    f32* normed = args.normed + row * args.width;
    f32 squares = 0.0f;
    for (i32 k = thread_index(); k < args.width; k += NORM_THREADS) {
        f32 h = hidden[k];
        if (args.delta) {
            h += delta[k];
            if (!args.row_list) hidden[k] = h;
        }
        normed[k] = h;
        squares = fmaf(h, h, squares);
    }
    squares = warp_sum(squares);
    if (lane_index() == 0) sums[warp_index()] = squares;
    sync_block();
    f32 total = 0.0f;
    for (i32 i = 0; i < NORM_THREADS / 32; i++) total += sums[i];
    f32 scale = divide(1.0f, square_root(divide(total, (f32)args.width) + args.eps));
    i8* values = values_of(args.activations, row);
    BlockMeta* meta = meta_of(args.activations, row);
    // Each thread reads again what it wrote.
    for (i32 k = thread_index(); k < args.activations.stride; k += NORM_THREADS) {
        f32 x = 0.0f;
        if (k < args.width) normed[k] = x = normed[k] * scale * args.weight[k];
        quantize_lane(x, values, meta, k);
    }
}

// ---- Element by element: a block takes 1024 inputs of a row -------------------------------------------------------------------

constexpr i32 SLICE = 1024;
constexpr i32 SLICE_THREADS = 256;

struct SwigluArgs {
    const f32* gate; // [rows][width]
    const f32* up;
    f32* activated;
    Activations activations;
    i32 width;
    i32 unused;
};
static_assert(sizeof(SwigluArgs) == 56, "as in activations.rs");

// activated = silu(gate) ∘ up, and that as int8. Blocks: slices, rows.
KERNEL(swiglu_quantize, SwigluArgs, SLICE_THREADS) {
    i64 row = block_y();
    i8* values = values_of(args.activations, row);
    BlockMeta* meta = meta_of(args.activations, row);
    i32 last = minimum((block_x() + 1) * SLICE, args.activations.stride);
#pragma unroll 4
    for (i32 k = block_x() * SLICE + thread_index(); k < last; k += SLICE_THREADS) {
        f32 x = 0.0f;
        if (k < args.width) {
            f32 gate = args.gate[row * args.width + k];
            f32 sigmoid = divide(1.0f, 1.0f + exponential(-gate));
            args.activated[row * args.width + k] = x = gate * sigmoid * args.up[row * args.width + k];
        }
        quantize_lane(x, values, meta, k);
    }
}

struct ScaleArgs {
    const f32* x; // [rows][width]
    f32* scaled;  // [products][rows][width], or null: for matrices that are not quantized
    RowAdapters adapters;
    Activations activations; // [products][rows]
    i32 sites[3];            // of the products
    i32 width;
};
static_assert(sizeof(ScaleArgs) == 64, "as in activations.rs");

// input_scale ∘ x as int8, once for each product: each with the input scale that a row's adapter has at the product's site,
// and x itself where it has none. Blocks: slices, rows, products.
KERNEL(scale_quantize, ScaleArgs, SLICE_THREADS) {
    i64 row = block_y(), to = block_z() * (i64)args.activations.num_rows + row;
    const AdapterTable* table = adapter_of(args.adapters, block_y());
    const f32* scale = table ? site_of(table, args.sites[block_z()])->input_scale : nullptr;
    i8* values = values_of(args.activations, to);
    BlockMeta* meta = meta_of(args.activations, to);
    i32 last = minimum((block_x() + 1) * SLICE, args.activations.stride);
#pragma unroll 4
    for (i32 k = block_x() * SLICE + thread_index(); k < last; k += SLICE_THREADS) {
        f32 x = k < args.width ? args.x[row * args.width + k] : 0.0f;
        if (scale && k < args.width) x *= scale[k];
        if (args.scaled && k < args.width) args.scaled[to * args.width + k] = x;
        quantize_lane(x, values, meta, k);
    }
}
