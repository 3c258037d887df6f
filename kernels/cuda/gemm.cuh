// The quantized GEMM: y[m][n] = Σ_k w[n][k] · x[m][k] + bias[n], and for rows with an adapter what it does to the layer.
//
// Two kinds of kernels do the same operations per output, so that a row has the same bits whichever ran it:
// - The superblocks of the inputs are cut into 8 ranges by their number alone. Within a range the blocks of 32 (or groups of 16)
//   are added in input order in f32; the ranges' sums are added in order.
// - A block's products are summed in integers on the tensor cores, exactly. The sum starts at the bits of 1.5 · 2^23 less
//   offset · Σ x: read as f32 it is 1.5 · 2^23 + Σ (q - offset) · x, which saves the slow conversion.
// `gemm_decode_*`, up to 64 rows: the 8 warps of a block are the 8 ranges. `gemm_prefill`: a warp does all ranges in turn.
//
// Rows that go to different experts come in groups of one each, as data: a launch has as many blocks as there may be groups.
#pragma once
#include "matrix.cuh"

constexpr i32 RANGES = 8;
constexpr i32 GEMM_THREADS = RANGES * 32;
constexpr i32 MAX_PRODUCTS = 3;
constexpr f32 EXACT = 12582912.0f; // 1.5 · 2^23: whole numbers to ± 2^22 may be added and are exact
constexpr i32 EXACT_BITS = 0x4B400000;

struct Product {
    Matrix w;        // null: `out` holds the product already, bias included
    const f32* bias; // [out], or null
    f32* out;        // [rows][out]
    i32 site;        // of adapters
    i32 activations_offset_rows; // where its rows begin among the activations' rows
};

struct GemmArgs {
    Product products[MAX_PRODUCTS];
    Activations activations;
    RowAdapters adapters;
    const f32* shrunk; // [products][rows][shrunk_stride]
    i32 shrunk_stride;
    i32 num_products;
    const RowGroup* groups; // [num_groups], of as many rows as a block takes; null: all rows, of one matrix
    i32 num_groups;
    i32 unused;
};
static_assert(sizeof(Product) == 56 && sizeof(GemmArgs) == 232, "as in gemm.rs");

// ---- What both kinds share ---------------------------------------------------------------------------------------------------

// Which product the block works on, and the first of its `tiles` tiles. Blocks are numbered product by product.
struct Place { i32 product, tile; };
DEVICE Place place_of(const GemmArgs& args, i32 block, i32 tiles) {
    i32 product = 0;
    for (; product < args.num_products - 1; product++) {
        i32 outputs = TILE * tiles, blocks = (args.products[product].w.out_features + outputs - 1) / outputs;
        if (block < blocks) break;
        block -= blocks;
    }
    return {product, block * tiles};
}

// The rows that a block works on, of which there are at most so many.
DEVICE RowGroup group_of(const GemmArgs& args, i32 number, i32 most) {
    if (args.groups) return args.groups[number];
    i32 first = number * most;
    return {0, first, minimum(most, args.activations.num_rows - first), 0};
}

// Where range `range` of a row's superblocks begins.
DEVICE i32 range_start(i32 range, i32 num_super) { return (i32)((i64)range * num_super / RANGES); }

// Activations of two blocks of 32 for a row tile: `values` of row `group`, `meta` of rows 2 · quad and 2 · quad + 1.
struct PairOfBlocks {
    Words4 values;
    Words4 meta[2];
};

// Rows of activations in device memory.
struct MemoryRows {
    const i8* values;
    const BlockMeta* meta;
    i32 stride;
    i32 num_rows;
};
DEVICE MemoryRows rows_of(const Activations& x, const Product& product, const RowGroup& group) {
    i64 first = product.activations_offset_rows + group.first;
    return {x.values + first * x.stride, x.meta + first * (x.stride / 32), x.stride, group.count};
}

// A lane's part of at most 64 of them. Where they are no whole row tiles, the last one begins early and holds rows of the one
// before again; where they are less than one, the last row fills it. Offsets are in bytes: 32 bits save registers.
struct LaneRows {
    MemoryRows rows;
    u32 value;   // where the values of row `group` begin, the quad's
    u32 meta[2]; // where those of rows 2 · quad and 2 · quad + 1 begin
    i32 last_start;
};
DEVICE LaneRows lane_rows(const MemoryRows& rows) {
    i32 group = lane_index() / 4, quad = lane_index() % 4, last = rows.num_rows - 1;
    LaneRows lane{rows, 0, {}, last < 8 ? 0 : last - 7};
    lane.value = minimum(group, last) * rows.stride + quad * 16;
    for (i32 i = 0; i < 2; i++) lane.meta[i] = minimum(quad * 2 + i, last) * (rows.stride / 4);
    return lane;
}
DEVICE PairOfBlocks load_pair(const LaneRows& from, i32 row_tile, i32 pair) {
    u32 start = row_tile == 0 ? 0 : minimum(row_tile * 8, from.last_start), stride = from.rows.stride;
    PairOfBlocks x;
    x.values = *(const Words4*)(from.rows.values + (from.value + start * stride + pair * PAIR));
#pragma unroll
    for (i32 i = 0; i < 2; i++)
        x.meta[i] = *(const Words4*)((const u8*)from.rows.meta + (from.meta[i] + start * (stride / 4) + pair * (PAIR / 4)));
    return x;
}

// A block of 32 inputs of a tile, unpacked.
template <typename F> struct TileBlock {
    u32 a[4];
    f32 scale[F::GROUPS][2];
    f32 min[F::GROUPS][2];
};
template <typename F> DEVICE TileBlock<F> unpack(const LaneRecord<F>& lane, i32 block) {
    TileBlock<F> w;
#pragma unroll
    for (i32 j = 0; j < 4; j++) w.a[j] = weights_of(lane, block, j);
#pragma unroll
    for (i32 g = 0; g < F::GROUPS; g++)
#pragma unroll
        for (i32 side = 0; side < 2; side++) {
            w.scale[g][side] = half_of(lane.scales[side], block * F::GROUPS + g);
            if constexpr (F::MIN) w.min[g][side] = half_of(lane.minima[side], block * F::GROUPS + g);
        }
    return w;
}

// Adds a block of 32 inputs to the four sums of a lane: outputs `group` and group + 8 of two rows each.
template <typename F>
DEVICE void add_block(const TileBlock<F>& w, i32 offset, const u32 (&x)[2], const f32 (&scale_x)[2], const u32 (&sums)[2],
                      f32 (&acc)[4]) {
#pragma unroll
    for (i32 g = 0; g < F::GROUPS; g++) {
        i32 sum[2], d[4];
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            i32 first = (i16)(sums[i] & 0xffffu), last = (i32)sums[i] >> 16;
            sum[i] = F::GROUPS == 1 ? first + last : g == 0 ? first : last;
        }
#pragma unroll
        for (i32 i = 0; i < 4; i++) d[i] = F::MIN ? EXACT_BITS : EXACT_BITS - offset * sum[i % 2];
        if constexpr (F::GROUPS == 1) mma_u8s8(d, w.a, x);
        else mma_u8s8_k16(d, w.a[2 * g], w.a[2 * g + 1], x[g]);
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            acc[i] = fmaf(as_f32((u32)d[i]) - EXACT, w.scale[g][i / 2] * scale_x[i % 2], acc[i]);
            if constexpr (F::MIN) {
                f32 sum_x = as_f32((u32)(EXACT_BITS + sum[i % 2])) - EXACT;
                acc[i] = fmaf(-w.min[g][i / 2], sum_x * scale_x[i % 2], acc[i]);
            }
        }
    }
}

// Adds pair `pair` of blocks: TILES tiles times ROW_TILES row tiles.
template <typename F, i32 TILES, i32 ROW_TILES, typename Rows>
DEVICE void add_pair(const LaneRecord<F> (&w)[TILES], i32 offset, const Rows& rows, i32 pair, f32 (&acc)[TILES][ROW_TILES][4]) {
    TileBlock<F> blocks[TILES][2];
#pragma unroll
    for (i32 tile = 0; tile < TILES; tile++)
#pragma unroll
        for (i32 b = 0; b < 2; b++) blocks[tile][b] = unpack(w[tile], b);
#pragma unroll
    for (i32 t = 0; t < ROW_TILES; t++) {
        PairOfBlocks x = load_pair(rows, t, pair);
#pragma unroll
        for (i32 b = 0; b < 2; b++) {
            u32 values[2] = {x.values.v[b * 2], x.values.v[b * 2 + 1]};
            f32 scales[2] = {as_f32(x.meta[0].v[b * 2]), as_f32(x.meta[1].v[b * 2])};
            u32 sums[2] = {x.meta[0].v[b * 2 + 1], x.meta[1].v[b * 2 + 1]};
#pragma unroll
            for (i32 tile = 0; tile < TILES; tile++) add_block(blocks[tile][b], offset, values, scales, sums, acc[tile][t]);
        }
    }
}

// The first record of a tile of an expert; of the last one for those beyond it, whose results nobody stores.
template <typename F> DEVICE const u8* first_record(const Matrix& w, i32 expert, i32 tile) {
    i32 num_tiles = (w.out_features + TILE - 1) / TILE;
    return w.records + (i64)(expert * num_tiles + minimum(tile, num_tiles - 1)) * (w.num_super * 2) * F::RECORD_BYTES;
}

// What a row's adapter does to output `n` of the layer: in the order of `../src/linear.rs`.
DEVICE f32 adapted(const GemmArgs& args, i32 product, const Site& site, i32 row, i32 n, f32 y) {
    if (site.b) {
        const Words4* b = (const Words4*)(site.b + (i64)n * site.b_stride);
        const f32* t = args.shrunk + ((i64)product * args.activations.num_rows + row) * args.shrunk_stride;
        f32 sum = 0.0f;
        for (i32 first = 0; first < site.rank; first += 8) {
            Words4 eight = b[first / 8];
#pragma unroll
            for (i32 i = 0; i < 8; i++)
                if (first + i < site.rank) sum = fmaf(half_of(eight.v, i), t[first + i], sum);
        }
        y += sum;
    }
    if (site.output_scale) y *= site.output_scale[n];
    if (site.bias) y += site.bias[n];
    return y;
}

// Writes output `n` of row `number` of a group, whose product is `total`.
DEVICE void finish(const GemmArgs& args, i32 index, const RowGroup& group, i32 number, i32 n, f32 total) {
    const Product& product = args.products[index];
    if (number >= group.count || n >= product.w.out_features) return;
    i32 row = group.first + number;
    const AdapterTable* table = adapter_of(args.adapters, row);
    f32* out = product.out + (i64)row * product.w.out_features + n;
    f32 y = total;
    if (!product.w.records) {
        if (!table) return;
        y = *out;
    } else if (product.bias) {
        y += product.bias[n];
    }
    *out = table ? adapted(args, index, *site_of(table, product.site), row, n, y) : y;
}

// ---- Up to 64 rows -----------------------------------------------------------------------------------------------------------

// A warp's part: pairs of blocks first..last of TILES tiles, with the weights of the next DEPTH pairs under way.
template <i32 TILES, i32 ROW_TILES, i32 DEPTH> struct RangeWork {
    const Matrix& w;
    LaneRows rows;
    i32 expert, first_tile, first, last;
    f32 acc[TILES][ROW_TILES][4];
};
template <typename F, i32 TILES, i32 ROW_TILES, i32 DEPTH> DEVICE void multiply(F, RangeWork<TILES, ROW_TILES, DEPTH>& work) {
    const u8* tile = first_record<F>(work.w, work.expert, work.first_tile);
    u32 apart = (u32)(first_record<F>(work.w, work.expert, work.first_tile + 1) - tile); // of two tiles
    i32 first = work.first, last = work.last;
    LaneRecord<F> ahead[DEPTH][TILES] = {};
#pragma unroll
    for (i32 d = 0; d < DEPTH; d++)
#pragma unroll
        for (i32 i = 0; i < TILES; i++)
            if (first + d < last) ahead[d][i] = load_record<F, true>(tile + i * apart + (i64)(first + d) * F::RECORD_BYTES);
#pragma unroll 1
    for (i32 pair = first; pair < last; pair += DEPTH) {
#pragma unroll
        for (i32 d = 0; d < DEPTH; d++) {
            if (pair + d >= last) break;
            LaneRecord<F> now[TILES];
#pragma unroll
            for (i32 i = 0; i < TILES; i++) {
                now[i] = ahead[d][i];
                i32 next = pair + d + DEPTH;
                if (next < last) ahead[d][i] = load_record<F, true>(tile + i * apart + (i64)next * F::RECORD_BYTES);
            }
            LaneRows rows = work.rows;
            rows.last_start = opaque(rows.last_start);
            add_pair(now, work.w.offset, rows, pair + d, work.acc);
        }
    }
}

constexpr i32 COLUMN = TILE + 4; // floats between rows of a tile in shared memory: no two lanes of a store meet in a bank
constexpr i32 TILE_SUMS = 8 * COLUMN; // of 16 outputs and 8 rows
constexpr i32 MAX_AT_ONCE = 8;        // tiles whose ranges' sums pass through shared memory at once

template <i32 TILES, i32 ROW_TILES, i32 DEPTH> DEVICE void decode(const GemmArgs& args, f32* shared) {
    RowGroup rows = group_of(args, block_y(), ROW_TILES * 8);
    if (rows.count == 0) return;
    Place place = place_of(args, block_x(), TILES);
    const Product& product = args.products[place.product];
    const Matrix& w = product.w;
    i32 first = range_start(warp_index(), w.num_super) * 2, last = range_start(warp_index() + 1, w.num_super) * 2;
    LaneRows of_lane = lane_rows(rows_of(args.activations, product, rows));
    RangeWork<TILES, ROW_TILES, DEPTH> work{w, of_lane, rows.expert, place.tile, first, last, {}};
    if (w.records) with_form(w.layout, work);
    constexpr i32 ALL = TILES * ROW_TILES, AT_ONCE = ALL < MAX_AT_ONCE ? ALL : MAX_AT_ONCE;
    i32 group = lane_index() / 4, quad = lane_index() % 4;
#pragma unroll
    for (i32 begin = 0; begin < ALL; begin += AT_ONCE) {
        if (begin > 0) sync_block();
#pragma unroll
        for (i32 i = 0; i < AT_ONCE; i++) {
            f32* tile = shared + (warp_index() * AT_ONCE + i) * TILE_SUMS;
#pragma unroll
            for (i32 j = 0; j < 4; j++)
                tile[(quad * 2 + j % 2) * COLUMN + group + j / 2 * 8] = work.acc[(begin + i) % TILES][(begin + i) / TILES][j];
        }
        sync_block();
        for (i32 e = thread_index(); e < AT_ONCE * 8 * TILE; e += GEMM_THREADS) {
            i32 output = e % (TILE * TILES), column = e / (TILE * TILES) % 8, row_tile = e / (TILE * TILES * 8);
            i32 tile = row_tile * TILES + output / TILE;
            f32 total = 0.0f;
            for (i32 range = 0; range < RANGES; range++)
                total += shared[(range * AT_ONCE + tile) * TILE_SUMS + column * COLUMN + output % TILE];
            i32 first_row = (begin / TILES + row_tile) * 8, row = minimum(first_row, work.rows.last_start) + column;
            if (row >= first_row) finish(args, place.product, rows, row, place.tile * TILE + output, total);
        }
    }
}

// For 8, 16, 32 and 64 rows. More rows share the loads of their activations among two tiles of outputs.
KERNEL(gemm_decode_1, GemmArgs, GEMM_THREADS, 2) {
    SHARED f32 shared[RANGES * 1 * TILE_SUMS];
    decode<1, 1, 3>(args, shared);
}
KERNEL(gemm_decode_2, GemmArgs, GEMM_THREADS, 2) {
    SHARED f32 shared[RANGES * 2 * TILE_SUMS];
    decode<1, 2, 2>(args, shared);
}
KERNEL(gemm_decode_4, GemmArgs, GEMM_THREADS) {
    SHARED f32 shared[RANGES * MAX_AT_ONCE * TILE_SUMS];
    decode<2, 4, 1>(args, shared);
}
KERNEL(gemm_decode_8, GemmArgs, GEMM_THREADS) {
    SHARED f32 shared[RANGES * MAX_AT_ONCE * TILE_SUMS];
    decode<2, 8, 1>(args, shared);
}

// ---- More rows ---------------------------------------------------------------------------------------------------------------

// A block takes 128 outputs times 64 rows; its warps 32 times 32 each, 4 along the outputs and 2 along the rows. The
// activations of the next two superblocks are on their way to shared memory while one is multiplied.
constexpr i32 PREFILL_TILES = 8;
constexpr i32 PREFILL_ROWS = 64;
constexpr i32 STAGES = 3;

struct Stage {
    Words4 values[PREFILL_ROWS][8]; // vector v of row r stands at v ^ r % 2 · 4: rows that are read at once are in other banks
    Words4 meta[PREFILL_ROWS][3];   // two vectors, and one that spaces the rows for the same reason
};
constexpr i32 RESULT_STRIDE = PREFILL_TILES * TILE + 4; // floats between rows of results
static_assert(sizeof(Stage) * STAGES >= PREFILL_ROWS * RESULT_STRIDE * 4, "the results lie where the activations were");

struct StagedRows {
    const Stage* stages;
    i32 first_row; // of the warp
};
DEVICE PairOfBlocks load_pair(const StagedRows& from, i32 row_tile, i32 pair) {
    i32 group = lane_index() / 4, quad = lane_index() % 4;
    const Stage& stage = from.stages[pair / 2 % STAGES];
    i32 first = from.first_row + row_tile * 8, row = first + group;
    PairOfBlocks x;
    x.values = stage.values[row][(pair % 2 * 4 + quad) ^ (row % 2 * 4)];
#pragma unroll
    for (i32 i = 0; i < 2; i++) x.meta[i] = stage.meta[first + quad * 2 + i][pair % 2];
    return x;
}

// Sends superblock `super` of the block's rows on its way.
DEVICE void stage_rows(Stage* stages, const MemoryRows& from, i32 super) {
    Stage& stage = stages[super % STAGES];
#pragma unroll
    for (i32 i = 0; i < PREFILL_ROWS * 8 / GEMM_THREADS; i++) {
        i32 at = i * GEMM_THREADS + thread_index(), row = at / 8, vector = at % 8;
        const i8* values = from.values + (i64)minimum(row, from.num_rows - 1) * from.stride;
        copy_async(&stage.values[row][vector ^ (row % 2 * 4)], values + super * SUPER + vector * 16);
    }
    if (thread_index() < PREFILL_ROWS * 2) {
        i32 row = thread_index() / 2, vector = thread_index() % 2;
        const BlockMeta* meta = from.meta + (i64)minimum(row, from.num_rows - 1) * (from.stride / 32);
        copy_async(&stage.meta[row][vector], meta + super * 4 + vector * 2);
    }
}

// A warp's part: two tiles times 32 rows.
struct BlockWork {
    const Matrix& w;
    MemoryRows rows;
    Stage* stages;
    i32 warp_row; // of the warp, the first
    i32 expert;
    i32 first_tile; // of the warp
    bool is_idle;   // all its outputs or rows are beyond the last: the activations are staged by all
    f32 totals[2][4][4];
};
template <typename F> DEVICE void multiply(F, BlockWork& work) {
    i32 num_super = work.w.num_super;
    const u8* tiles[2];
#pragma unroll
    for (i32 i = 0; i < 2; i++) tiles[i] = first_record<F>(work.w, work.expert, work.first_tile + i);
    StagedRows staged{work.stages, work.warp_row};
    for (i32 s = 0; s < STAGES - 1; s++) {
        if (s < num_super) stage_rows(work.stages, work.rows, s);
        copies_commit();
    }
    LaneRecord<F> ahead[2];
#pragma unroll
    for (i32 i = 0; i < 2; i++) ahead[i] = load_record<F, false>(tiles[i]);
    for (i32 range = 0; range < RANGES; range++) {
        f32 acc[2][4][4] = {};
        i32 first = range_start(range, num_super) * 2, last = range_start(range + 1, num_super) * 2;
#pragma unroll 1
        for (i32 pair = first; pair < last; pair++) {
            if (pair % 2 == 0) {
                copies_wait<STAGES - 2>();
                sync_block();
                i32 next = pair / 2 + STAGES - 1;
                if (next < num_super) stage_rows(work.stages, work.rows, next);
                copies_commit();
            }
            if (work.is_idle) continue;
            LaneRecord<F> now[2];
#pragma unroll
            for (i32 i = 0; i < 2; i++) {
                now[i] = ahead[i];
                if (pair + 1 < num_super * 2) ahead[i] = load_record<F, false>(tiles[i] + (i64)(pair + 1) * F::RECORD_BYTES);
            }
            add_pair(now, work.w.offset, staged, pair, acc);
        }
#pragma unroll
        for (i32 i = 0; i < 32; i++) work.totals[i / 16][i / 4 % 4][i % 4] += acc[i / 16][i / 4 % 4][i % 4];
    }
}

// Blocks: groups of rows, then outputs, so that those that run together read the same weights.
KERNEL(gemm_prefill, GemmArgs, GEMM_THREADS) {
    SHARED Stage stages[STAGES];
    RowGroup group = group_of(args, block_x(), PREFILL_ROWS);
    if (group.count == 0) return;
    Place place = place_of(args, block_y(), PREFILL_TILES);
    const Product& product = args.products[place.product];
    const Matrix& w = product.w;
    i32 tile = warp_index() % 4 * 2, warp_row = warp_index() / 4 * 32;
    f32* results = (f32*)stages;
    if (w.records) {
        bool is_idle = (place.tile + tile) * TILE >= w.out_features || warp_row >= group.count;
        MemoryRows rows = rows_of(args.activations, product, group);
        BlockWork work{w, rows, stages, warp_row, group.expert, place.tile + tile, is_idle, {}};
        with_form(w.layout, work);
        sync_block();
        i32 group = lane_index() / 4, quad = lane_index() % 4;
#pragma unroll
        for (i32 i = 0; i < 32; i++) {
            i32 row = warp_row + i / 4 % 4 * 8 + quad * 2 + i % 2, output = (tile + i / 16) * TILE + group + i / 2 % 2 * 8;
            results[row * RESULT_STRIDE + output] = work.totals[i / 16][i / 4 % 4][i % 4];
        }
    }
    sync_block();
    for (i32 e = thread_index(); e < PREFILL_ROWS * PREFILL_TILES * TILE; e += GEMM_THREADS) {
        i32 row = e / (PREFILL_TILES * TILE), output = e % (PREFILL_TILES * TILE);
        finish(args, place.product, group, row, place.tile * TILE + output, results[row * RESULT_STRIDE + output]);
    }
}
