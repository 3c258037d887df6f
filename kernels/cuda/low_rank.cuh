// The first half of an adapter's low-rank pair, t = scales ∘ A x. The second half, y += B t, is done where y is made.
#pragma once
#include "products.cuh"

constexpr i32 SHRINK_THREADS = 256;
constexpr i32 SHRINK_WARPS = SHRINK_THREADS / 32;
constexpr i32 RANKS_AT_ONCE = 4;

// Grid: rank slots, tiles of rows, products. A block takes every so many'th group of ranks for the rows of its tile.
struct ShrinkArgs {
    const f32* x; // [rows][x_stride], x_stride a multiple of 4
    RowAdapters adapters;
    f32* t; // [product][rows][t_stride]; written up to the rank rounded up to 8, for rows with a pair there
    i32 x_stride;
    i32 num_rows;
    i32 in_features;
    i32 t_stride;
    i32 sites[3];  // of each product
    i32 tile_rows; // at most TILE_ROWS
};
static_assert(sizeof(ShrinkArgs) == 56, "as in low_rank.rs");

typedef f32 ShrinkSums[SHRINK_WARPS][TILE_ROWS * RANKS_AT_ONCE];

// Rows first..first + n of one adapter, n at most ROWS. All threads of the block share the inputs.
template <i32 ROWS, i32 RANKS>
DEVICE void shrink_rows(const ShrinkArgs& args, const Site& site, i32 first, i32 n, ShrinkSums& partial) {
    constexpr i32 N = ROWS * RANKS;
    f32* t = args.t + ((i64)block_z() * args.num_rows + first) * args.t_stride;
    Operands<ROWS, RANKS> from;
    from.x = args.x + (i64)first * args.x_stride;
    from.in_features = args.in_features;
#pragma unroll
    for (i32 m = 0; m < ROWS; m++) from.offsets[m] = minimum(m, n - 1) * args.x_stride;
    for (i32 rank = block_x() * RANKS; rank < site.rank; rank += grid_x() * RANKS) {
#pragma unroll
        for (i32 r = 0; r < RANKS; r++) from.weights[r] = site.a + (i64)minimum(rank + r, site.rank - 1) * site.a_stride;
        f32 sums[N];
        partial_products<F16>(from, thread_index() * AT_ONCE, SHRINK_THREADS * AT_ONCE, sums);
        f32 sum = warp_sums(sums);
        if (lane_index() % LANES_OF_SUM<N> == 0) partial[warp_index()][lane_index() / LANES_OF_SUM<N>] = sum;
        sync_block();
        i32 m = thread_index() / RANKS, r = rank + thread_index() % RANKS;
        if (m < n && r < site.rank) {
            sum = partial[0][thread_index()];
            for (i32 warp = 1; warp < SHRINK_WARPS; warp++) sum += partial[warp][thread_index()];
            t[(i64)m * args.t_stride + r] = site.scales[r] * sum;
        }
        sync_block();
    }
    // Whoever multiplies by B may read 8 at a time.
    i32 m = thread_index() / 8, r = site.rank / 8 * 8 + thread_index() % 8;
    if (block_x() == 0 && site.rank % 8 != 0 && m < n && r >= site.rank) t[(i64)m * args.t_stride + r] = 0.0f;
}

KERNEL(shrink, ShrinkArgs, SHRINK_THREADS) {
    SHARED ShrinkSums partial;
    i32 first = block_y() * args.tile_rows, end = minimum(first + args.tile_rows, args.num_rows);
    for (i32 n; first < end; first += n) {
        n = num_alike(args.adapters, first, end);
        const AdapterTable* table = adapter_of(args.adapters, first);
        if (!table) continue;
        const Site& site = *site_of(table, args.sites[block_z()]);
        if (!site.a) continue;
        // One row gains nothing from ranks taken together while there are blocks for each.
        if (n == 1 && site.rank <= grid_x()) shrink_rows<1, 1>(args, site, first, n, partial);
        else if (n == 1) shrink_rows<1, RANKS_AT_ONCE>(args, site, first, n, partial);
        else if (n == 2) shrink_rows<2, RANKS_AT_ONCE>(args, site, first, n, partial);
        else if (n <= 4) shrink_rows<4, RANKS_AT_ONCE>(args, site, first, n, partial);
        else shrink_rows<TILE_ROWS, RANKS_AT_ONCE>(args, site, first, n, partial);
    }
}
