// Activations between the matrix products: made, and rounded to int8 with one scale for 32 as the CPU rounds them
// (../src/activations.rs), so that equal numbers give equal integers.
#pragma once
#include "args.cuh"

// Rounds the inputs 32b..32b + 32 of a row, of which this lane has input k = 32b + lane. For a whole warp. What is not a number
// makes the block's scale not a number, and so all that the row is multiplied to.
DEVICE void quantize_lane(f32 x, i8* values_row, BlockMeta* meta_row, i32 k) {
    f32 largest = warp_max_magnitude(x);
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
    const f32* bias;     // [width], or null
    f32* normed;         // [rows][width]
    const i32* row_list; // [rows]: row i of the outputs is made of row row_list[i] of hidden and delta. Null: of row i
    Activations activations;
    i32 width;
    f32 eps;
};
static_assert(sizeof(NormArgs) == 80, "as in activations.rs");

// The sum over a block of NORM_THREADS, the same in every thread.
DEVICE f32 norm_sum(f32* of_warps, f32 v) {
    v = warp_sum(v);
    sync_block(); // what was there before has been read
    if (lane_index() == 0) of_warps[warp_index()] = v;
    sync_block();
    f32 total = 0.0f;
    for (i32 i = 0; i < NORM_THREADS / 32; i++) total += of_warps[i];
    return total;
}
DEVICE f32 norm_scale(f32 squares, i32 width, f32 eps) {
    return divide(1.0f, square_root(divide(squares, (f32)width) + eps));
}

// h = hidden + delta, normed = h / sqrt(mean(h²) + eps) · weight, and that as int8; with a bias, (h - mean(h)) in place of h,
// and that added. A block a row.
KERNEL(add_norm_quantize, NormArgs, NORM_THREADS) {
    SHARED f32 sums[NORM_THREADS / 32];
    i64 row = block_x(), source = args.row_list ? args.row_list[row] : row;
    f32* hidden = args.hidden + source * args.width;
    const f32* delta = args.delta + source * args.width;
    f32* normed = args.normed + row * args.width;
    f32 squares = 0.0f, sum = 0.0f, mean = 0.0f;
    for (i32 k = thread_index(); k < args.width; k += NORM_THREADS) {
        f32 h = hidden[k];
        if (args.delta) {
            h += delta[k];
            if (!args.row_list) hidden[k] = h;
        }
        normed[k] = h;
        sum += h;
        squares = fmaf(h, h, squares);
    }
    if (args.bias) {
        mean = divide(norm_sum(sums, sum), (f32)args.width);
        squares = 0.0f;
        for (i32 k = thread_index(); k < args.width; k += NORM_THREADS) {
            f32 h = normed[k] - mean;
            squares = fmaf(h, h, squares);
        }
    }
    f32 scale = norm_scale(norm_sum(sums, squares), args.width, args.eps);
    i8* values = values_of(args.activations, row);
    BlockMeta* meta = meta_of(args.activations, row);
    // Each thread reads again what it wrote.
    for (i32 k = thread_index(); k < args.activations.stride; k += NORM_THREADS) {
        f32 x = 0.0f;
        if (k < args.width) {
            x = args.bias ? fmaf((normed[k] - mean) * scale, args.weight[k], args.bias[k]) : normed[k] * scale * args.weight[k];
            normed[k] = x;
        }
        quantize_lane(x, values, meta, k);
    }
}

// ---- Norms in place ----------------------------------------------------------------------------------------------------------

struct InPlaceArgs {
    f32* x;            // [vectors][width]
    const f32* weight; // [width], or null: no norm
    i32 num_vectors;
    i32 width;
    f32 eps;
    f32 scale;
};
static_assert(sizeof(InPlaceArgs) == 32, "as in activations.rs");

// x = x / sqrt(mean(x²) + eps) · weight · scale. A block a vector.
KERNEL(norm_rows, InPlaceArgs, NORM_THREADS) {
    SHARED f32 sums[NORM_THREADS / 32];
    f32* x = args.x + (i64)block_x() * args.width;
    f32 inverse = 1.0f;
    if (args.weight) {
        f32 squares = 0.0f;
        for (i32 k = thread_index(); k < args.width; k += NORM_THREADS) squares = fmaf(x[k], x[k], squares);
        inverse = norm_scale(norm_sum(sums, squares), args.width, args.eps);
    }
    for (i32 k = thread_index(); k < args.width; k += NORM_THREADS)
        x[k] = (args.weight ? x[k] * inverse * args.weight[k] : x[k]) * args.scale;
}

// The same of heads, which are small: a warp each, eight to a block.
KERNEL(norm_heads, InPlaceArgs, 256) {
    i32 head = block_x() * 8 + warp_index();
    if (head >= args.num_vectors) return;
    f32* x = args.x + (i64)head * args.width;
    f32 squares = 0.0f;
    for (i32 k = lane_index(); k < args.width; k += 32) squares = fmaf(x[k], x[k], squares);
    f32 inverse = norm_scale(warp_sum(squares), args.width, args.eps);
    for (i32 k = lane_index(); k < args.width; k += 32) x[k] = x[k] * inverse * args.weight[k];
}

// ---- Element by element: a block takes 1024 inputs of a row -------------------------------------------------------------------

constexpr i32 SLICE = 1024;
constexpr i32 SLICE_THREADS = 256;

// What stands between the projections of a feed-forward, by number.
enum Activation : i32 { GATED_SILU, GATED_GELU, GELU };

struct ActivateArgs {
    const f32* gate; // [rows][width]; not read where there is no gate
    const f32* up;
    f32* activated;
    Activations activations;
    i32 width;
    Activation activation;
};
static_assert(sizeof(ActivateArgs) == 56, "as in activations.rs");

// GELU by its approximation with tanh, as `gelu` of the CPU kernels.
DEVICE f32 gelu(f32 g) { return g * sigmoid(g * fmaf(g * g, 0.044715f * 1.595769f, 1.595769f)); }

DEVICE f32 activated(const ActivateArgs& args, i64 at) {
    if (args.activation == GELU) return gelu(args.up[at]);
    f32 gate = args.gate[at];
    return (args.activation == GATED_GELU ? gelu(gate) : gate * sigmoid(gate)) * args.up[at];
}

// activated = silu(gate) ∘ up or what else the activation is, and that as int8. Blocks: slices, rows.
KERNEL(activate_quantize, ActivateArgs, SLICE_THREADS) {
    i64 row = block_y();
    i8* values = values_of(args.activations, row);
    BlockMeta* meta = meta_of(args.activations, row);
    i32 last = minimum((block_x() + 1) * SLICE, args.activations.stride);
#pragma unroll 4
    for (i32 k = block_x() * SLICE + thread_index(); k < last; k += SLICE_THREADS) {
        f32 x = 0.0f;
        if (k < args.width) args.activated[row * args.width + k] = x = activated(args, row * args.width + k);
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
