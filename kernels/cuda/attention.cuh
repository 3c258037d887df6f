// Grouped-query attention over the KV store with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022), and the
// division of a long context among warps (Dao et al. 2023, "Flash-Decoding") into units that depend on positions alone.
//
// Scores are powers of two: log2(e) is in their scale. A unit of which a row sees nothing leaves its sums as they are, bit for
// bit, so that work may begin with any unit that is not behind the first one that it sees.
#pragma once
#include "activations.cuh"
#include "args.cuh"

// 2^x within 3e-7 for x <= 0, not less than 2^-126; NaN stays NaN.
DEVICE f32 power_of_two(f32 x) {
    x = x < -126.0f ? -126.0f : x;
    f32 whole = x + 12582912.0f; // 1.5 · 2^23: the low bits are x rounded
    f32 r = x - (whole - 12582912.0f);
    f32 p = 0.00133813046f;
    p = fmaf(p, r, 0.00966636837f);
    p = fmaf(p, r, 0.0555038117f);
    p = fmaf(p, r, 0.240223497f);
    p = fmaf(p, r, 0.693147182f);
    p = fmaf(p, r, 1.0f);
    return p * as_f32((as_u32(whole) << 23) + 0x3f800000u);
}

// What two parts of a softmax are multiplied with to become one: the part with the smaller maximum is scaled down.
// A part that a row sees nothing of is zeros below the least maximum, and leaves the total as it is; so does a total of nothing
// the part.
struct Merging { f32 max, total, part; };
DEVICE Merging merging(f32 total_max, f32 part_max) {
    f32 smaller = total_max == part_max ? 1.0f : power_of_two(-absolute(total_max - part_max));
    return total_max >= part_max ? Merging{total_max, 1.0f, smaller} : Merging{part_max, smaller, 1.0f};
}
DEVICE f32 merge(const Merging& m, f32 total, f32 part) { return fmaf(total, m.total, part * m.part); }

struct AttendArgs {
    const f16* q;            // [rows][num_heads · head_dim]
    const u8* keys;          // of the layer, as args.cuh says
    const u8* values;        // the same
    const AttendTile* tiles; // [num_tiles]
    const i32* block_tables; // of all sequences of the step
    f32* partials;           // [rows · num_heads][partials_per_row][head_dim + 2]: weighted values, maximum, sum of weights
    f32 scale;               // of the products of queries and keys, times log2(e); with a cap, of what that leaves
    f32 cap_scale;           // score = scale · tanh(product · cap_scale); 0: no cap
    i32 num_tiles;
    i32 num_heads;
    i32 num_kv_heads;
    i32 partials_per_row;
    i32 num_slots; // warps that share the units of a tile, one partial each unit; 0: a warp merges all of its tile's units
    i32 window;    // positions that a row sees, its own among them
};
static_assert(sizeof(AttendArgs) == 80, "as in attention.rs");

// Heads above 128 are summed in two parts, so that the sums stay in registers.
template <i32 DIM> constexpr i32 PARTS = DIM > 128 ? 2 : 1;
template <i32 DIM> constexpr i32 COLUMNS = DIM / PARTS<DIM>;

// The softmax of 16 queries, as far as a lane has it: of queries g and g + 8 (g = lane / 4), two columns of every 8.
template <i32 DIM> struct Softmax {
    f32 max[2];
    f32 sum[2];
    f32 out[COLUMNS<DIM> / 8][4];
};

// Queries of a lane as the A fragments of m16n8k16. Keys are read 16 bytes at a time, so that of every 32 dimensions a lane
// has 8 neighbours, in two fragments: a dot product does not mind the order, as long as queries and keys have the same.
template <i32 DIM> DEVICE void load_query(u32 (&a)[DIM / 16][4], const f16* query, i32 half) {
    i32 quad = lane_index() % 4;
#pragma unroll
    for (i32 c = 0; c < DIM / 32; c++) {
        Words4 w = query ? *(const Words4*)(query + c * 32 + quad * 8) : Words4{};
        a[c * 2][half] = w.v[0], a[c * 2][half + 2] = w.v[1];
        a[c * 2 + 1][half] = w.v[2], a[c * 2 + 1][half + 2] = w.v[3];
    }
    if constexpr (DIM % 32 != 0) {
        Words2 w = query ? *(const Words2*)(query + DIM - 16 + quad * 4) : Words2{};
        a[DIM / 16 - 1][half] = w.v[0], a[DIM / 16 - 1][half + 2] = w.v[1];
    }
}

// Four bytes of q8_0 as f16; two have one of a pair of scales each.
DEVICE Words2 scaled(u32 bytes, const u32 (&scales)[2]) {
    return {multiply_f16x2(bytes_to_f16x2<0>(bytes), scales[0]), multiply_f16x2(bytes_to_f16x2<2>(bytes), scales[1])};
}

// 8 dimensions of a key of a head, from `first` on.
template <i32 DIM, KvType KV> DEVICE Words4 load_key(const u8* keys, i32 position, i32 first) {
    if constexpr (KV == KV_F16) {
        return *(const Words4*)((const f16*)keys + position * DIM + first);
    } else {
        Words2 bytes = *(const Words2*)(keys + position * DIM + first);
        u32 scale = ((const f16*)(keys + DIM * KV_BLOCK))[position * (DIM / 32) + first / 32] * 0x10001u;
        Words2 low = scaled(bytes.v[0], {scale, scale}), high = scaled(bytes.v[1], {scale, scale});
        return {low.v[0], low.v[1], high.v[0], high.v[1]};
    }
}

// Of 8 columns of the values of a head, from `first` on, that of this lane, at its four positions: as it is stored, and as f16.
template <KvType KV> struct StoredValues { Words2 v; };
template <> struct StoredValues<KV_Q8_0> { u32 v; };
template <KvType KV> DEVICE StoredValues<KV> load_values(const u8* values, i32 first) {
    i32 at = (first + lane_index() / 4) * KV_BLOCK + lane_index() % 4 * 4;
    if constexpr (KV == KV_F16) return {*(const Words2*)((const f16*)values + at)};
    else return {*(const u32*)(values + at)};
}
template <i32 DIM, KvType KV> DEVICE Words2 to_halves(const StoredValues<KV>& stored, const u8* values, i32 first) {
    if constexpr (KV == KV_F16) {
        return stored.v;
    } else {
        // Where the scales are is found out here: registers are few.
        i32 at = opaque(lane_index() % 4 * 8) + DIM * KV_BLOCK + first / 32 * KV_BLOCK * 2;
        return scaled(stored.v, ((const Words2*)(values + at))->v);
    }
}

// Scores of 8 positions; `position` is that of this lane's column.
template <i32 DIM, KvType KV> DEVICE void score(f32 (&s)[4], const u32 (&q)[DIM / 16][4], const u8* keys, i32 position) {
    static_assert(KV == KV_F16 || DIM % 32 == 0, "q8_0 has scales for 32 dimensions");
    i32 quad = lane_index() % 4;
#pragma unroll
    for (i32 c = 0; c < DIM / 32; c++) {
        Words4 k = load_key<DIM, KV>(keys, position, c * 32 + quad * 8);
        mma_f16(s, q[c * 2], {k.v[0], k.v[1]});
        mma_f16(s, q[c * 2 + 1], {k.v[2], k.v[3]});
    }
    if constexpr (DIM % 32 != 0) {
        Words2 k = *(const Words2*)((const f16*)keys + position * DIM + DIM - 16 + quad * 4);
        mma_f16(s, q[DIM / 16 - 1], {k.v[0], k.v[1]});
    }
}

// Adds a block's 16 positions, of the values the columns from `column` on. Of this lane's four positions, each of its two queries
// sees hidden..visible.
template <i32 DIM, KvType KV>
DEVICE void add_block(Softmax<DIM>& part, const u32 (&q)[DIM / 16][4], const u8* keys, const u8* values, i32 column,
                      const AttendArgs& args, const i32 (&hidden)[2], const i32 (&visible)[2]) {
    f32 scale = args.scale;
    // Columns 2t and 2t + 1 of both products of scores are positions 4t..4t + 4: values are read four positions at a time.
    i32 group = lane_index() / 4, position = group / 2 * 4 + group % 2;
    f32 s[2][4] = {};
    score<DIM, KV>(s[0], q, keys, position);
    score<DIM, KV>(s[1], q, keys, position + 2);
    StoredValues<KV> stored[COLUMNS<DIM> / 8];
#pragma unroll
    for (i32 n = 0; n < COLUMNS<DIM> / 8; n++) stored[n] = load_values<KV>(values, column + n * 8);
    u32 weights[4];
    f32 correction[2];
#pragma unroll
    for (i32 i = 0; i < 2; i++) {
        f32 x[4] = {s[0][i * 2], s[0][i * 2 + 1], s[1][i * 2], s[1][i * 2 + 1]};
#pragma unroll
        for (i32 e = 0; e < 4; e++) {
            if (args.cap_scale != 0.0f) x[e] = hyperbolic_tangent(x[e] * args.cap_scale);
            x[e] = e < visible[i] && e >= hidden[i] ? x[e] : minus_infinity();
        }
        f32 max = maximum(maximum(x[0], x[1]), maximum(x[2], x[3]));
        max = maximum(max, shuffle_xor(max, 1));
        max = maximum(max, shuffle_xor(max, 2));
        max = maximum(part.max[i], max * scale);
        // Nothing seen so far: any finite number, for weights of zero.
        f32 shift = max == minus_infinity() ? 0.0f : max;
#pragma unroll
        for (i32 e = 0; e < 4; e++) x[e] = power_of_two(fmaf(x[e], scale, -shift));
        weights[i] = to_f16x2(x[0], x[1]);
        weights[i + 2] = to_f16x2(x[2], x[3]);
        correction[i] = power_of_two(part.max[i] - shift);
        part.max[i] = max;
        // The weights as they are multiplied, so that they are a whole together.
        f32 low = to_f32((f16)weights[i]) + to_f32((f16)(weights[i] >> 16));
        f32 high = to_f32((f16)weights[i + 2]) + to_f32((f16)(weights[i + 2] >> 16));
        part.sum[i] = fmaf(part.sum[i], correction[i], low + high);
    }
#pragma unroll
    for (i32 n = 0; n < COLUMNS<DIM> / 8; n++) {
        for (i32 i = 0; i < 4; i++) part.out[n][i] *= correction[i / 2];
        Words2 v = to_halves<DIM, KV>(stored[n], values, column + n * 8);
        mma_f16(part.out[n], weights, {v.v[0], v.v[1]});
    }
}

// Where the lanes of a warp keep the softmax of the units before: the registers are for the unit under way.
struct alignas(16) Floats4 { f32 v[4]; };
template <i32 DIM> struct Total {
    Floats4 out[COLUMNS<DIM> / 8][32];
    Floats4 max_sum[32]; // maxima, then sums
};

// Adds a unit's softmax to the total; `part` is both then.
template <i32 DIM> DEVICE void merge_unit(Total<DIM>& total, Softmax<DIM>& part, bool is_first) {
    i32 lane = lane_index();
    if (!is_first) {
        Floats4 before = total.max_sum[lane];
        Merging m[2];
#pragma unroll
        for (i32 i = 0; i < 2; i++) {
            m[i] = merging(before.v[i], part.max[i]);
            part.max[i] = m[i].max;
            part.sum[i] = merge(m[i], before.v[i + 2], part.sum[i]);
        }
#pragma unroll
        for (i32 n = 0; n < COLUMNS<DIM> / 8; n++) {
            before = total.out[n][lane];
            for (i32 i = 0; i < 4; i++) part.out[n][i] = merge(m[i / 2], before.v[i], part.out[n][i]);
        }
    }
    total.max_sum[lane] = {part.max[0], part.max[1], part.sum[0], part.sum[1]};
#pragma unroll
    for (i32 n = 0; n < COLUMNS<DIM> / 8; n++)
        total.out[n][lane] = {part.out[n][0], part.out[n][1], part.out[n][2], part.out[n][3]};
}

// A tile of queries that a warp works on, for one KV head (and one part of its columns).
template <i32 DIM> struct TileWork {
    const u8* keys;   // of the KV head in block 0
    const u8* values; // the same
    const i32* table;
    i32 column;      // of this part, the first
    i32 block_bytes; // of a KV block
    i32 last[2]; // position of each of the lane's queries: what it sees ends there
    i32 num_positions;
    u32 q[DIM / 16][4];
};

template <i32 DIM, KvType KV>
DEVICE void sum_unit(Softmax<DIM>& part, const TileWork<DIM>& work, const AttendArgs& args, i32 unit) {
#pragma unroll
    for (i32 n = 0; n < COLUMNS<DIM> / 8; n++)
        for (i32 i = 0; i < 4; i++) part.out[n][i] = 0.0f;
    for (i32 i = 0; i < 2; i++) part.max[i] = minus_infinity(), part.sum[i] = 0.0f;
    i32 first = unit_start(unit) / KV_BLOCK;
    i32 end = (minimum(unit_start(unit + 1), work.num_positions) + KV_BLOCK - 1) / KV_BLOCK;
    i32 of_lane = lane_index() % 4 * 4;
    i32 next = work.table[first];
    for (i32 b = first; b < end; b++) {
        i64 start = (i64)next * work.block_bytes;
        if (b + 1 < end) next = work.table[b + 1];
        i32 lane_first = b * KV_BLOCK + of_lane;
        i32 hidden[2] = {first_seen(work.last[0], args.window) - lane_first, first_seen(work.last[1], args.window) - lane_first};
        i32 visible[2] = {work.last[0] + 1 - lane_first, work.last[1] + 1 - lane_first};
        add_block<DIM, KV>(part, work.q, work.keys + start, work.values + start, work.column, args, hidden, visible);
    }
    for (i32 i = 0; i < 2; i++) {
        part.sum[i] += shuffle_xor(part.sum[i], 1);
        part.sum[i] += shuffle_xor(part.sum[i], 2);
    }
}

// Leaves a lane's sums as partial `index` of its queries; those that the tile does not have are negative.
template <i32 DIM>
DEVICE void write_partial(const AttendArgs& args, const i32 (&query)[2], i32 index, i32 column, const Softmax<DIM>& part) {
    i32 quad = lane_index() % 4;
#pragma unroll
    for (i32 i = 0; i < 2; i++) {
        if (query[i] < 0) continue;
        f32* to = args.partials + ((i64)query[i] * args.partials_per_row + index) * (DIM + 2);
#pragma unroll
        for (i32 n = 0; n < COLUMNS<DIM> / 8; n++)
            *(Words2*)(to + column + n * 8 + quad * 2) = {as_u32(part.out[n][i * 2]), as_u32(part.out[n][i * 2 + 1])};
        if (quad == 0 && column == 0) *(Words2*)(to + DIM) = {as_u32(part.max[i]), as_u32(part.sum[i])};
    }
}

// Grid: tiles (four to a block where a warp does all of its tile, so that they share what they read), KV heads and their
// parts, slots (four to a block).
template <i32 DIM, KvType KV> DEVICE void attend(const AttendArgs& args) {
    bool is_split = args.num_slots > 0;
    // The last tiles of a prefill have the longest contexts: start with them, so that all end together.
    i32 index = is_split ? block_x() : args.num_tiles - 1 - block_x() * 4 - warp_index();
    i32 slot = is_split ? block_z() * 4 + warp_index() : 0;
    if (index < 0) return;
    AttendTile tile = args.tiles[index];
    TileWork<DIM> work;
    work.num_positions = tile.first_position + tile.num_rows;
    // What lies before the window of the tile's first row is before those of all.
    i32 first_unit = num_units(first_seen(tile.first_position, args.window) + 1) - 1;
    i32 units = num_units(work.num_positions);
    if (tile.num_rows == 0 || first_unit + slot >= units) return;

    i32 kv_head = block_y() / PARTS<DIM>, head_bytes = kv_head_bytes(KV, DIM);
    i32 heads = args.num_heads / args.num_kv_heads;
    i32 query[2]; // row · num_heads + head
#pragma unroll
    for (i32 i = 0; i < 2; i++) {
        i32 number = lane_index() / 4 + i * 8, row = number / heads;
        bool is_there = row < tile.num_rows;
        query[i] = is_there ? (tile.first_row + row) * args.num_heads + kv_head * heads + number % heads : -1;
        work.last[i] = tile.first_position + row;
        load_query<DIM>(work.q, is_there ? args.q + (i64)query[i] * DIM : nullptr, i);
    }
    work.column = block_y() % PARTS<DIM> * COLUMNS<DIM>;
    work.block_bytes = args.num_kv_heads * head_bytes;
    work.keys = args.keys + (i64)kv_head * head_bytes;
    work.values = args.values + (i64)kv_head * head_bytes;
    work.table = args.block_tables + tile.block_table;

    SHARED Total<DIM> totals[4];
    Softmax<DIM> part;
    for (i32 unit = first_unit + slot; unit < units; unit += is_split ? args.num_slots : 1) {
        sum_unit<DIM, KV>(part, work, args, unit);
        if (is_split) {
            write_partial<DIM>(args, query, unit, work.column, part);
        } else {
            merge_unit<DIM>(totals[warp_index()], part, unit == first_unit);
        }
    }
    if (!is_split) write_partial<DIM>(args, query, 0, work.column, part);
}

#define ATTEND(NAME, KV, DIM, BLOCKS) KERNEL(attend_##NAME##_##DIM, AttendArgs, 128, BLOCKS) { attend<DIM, KV>(args); }
ATTEND(f16, KV_F16, 16, 8)
ATTEND(f16, KV_F16, 32, 5)
ATTEND(f16, KV_F16, 64, 4)
ATTEND(f16, KV_F16, 80, 3)
ATTEND(f16, KV_F16, 96, 3)
ATTEND(f16, KV_F16, 112, 3)
ATTEND(f16, KV_F16, 128, 2)
ATTEND(f16, KV_F16, 256, 2)
ATTEND(q8_0, KV_Q8_0, 32, 5)
ATTEND(q8_0, KV_Q8_0, 64, 4)
ATTEND(q8_0, KV_Q8_0, 96, 3)
ATTEND(q8_0, KV_Q8_0, 128, 2)
ATTEND(q8_0, KV_Q8_0, 256, 2)
#undef ATTEND

struct CombineArgs {
    const f32* partials;  // as in AttendArgs
    const i32* positions; // [rows]; null: each row has one partial
    f32* attended;        // [rows][num_heads · head_dim]
    Activations activations; // the same, rounded
    i32 partials_per_row;
    i32 num_heads;
    i32 head_dim;
    i32 window;
};
static_assert(sizeof(CombineArgs) == 64, "as in attention.rs");

DEVICE f32 combined(const CombineArgs& args, i64 query, i32 column, i32 first, i32 count) {
    i32 stride = args.head_dim + 2;
    const f32* partial = args.partials + (query * args.partials_per_row + first) * stride;
    f32 value = partial[column], max = partial[args.head_dim], sum = partial[args.head_dim + 1];
#pragma unroll 4
    for (i32 unit = 1; unit < count; unit++) {
        const f32* part = partial + (i64)unit * stride;
        Merging m = merging(max, part[args.head_dim]);
        max = m.max;
        sum = merge(m, sum, part[args.head_dim + 1]);
        value = merge(m, value, part[column]);
    }
    // A zero's sign may depend on how much of a tile was masked.
    return divide(value, sum) + 0.0f;
}

// Grid: rows, 256 values of a row.
KERNEL(combine_quantize, CombineArgs, 256) {
    i32 row = block_x(), k = block_y() * 256 + thread_index();
    i32 width = args.num_heads * args.head_dim, stride = args.activations.stride;
    if (k - lane_index() >= stride) return;
    f32 value = 0.0f;
    if (k < width) {
        i32 first = args.positions ? num_units(first_seen(args.positions[row], args.window) + 1) - 1 : 0;
        i32 count = args.positions ? num_units(args.positions[row] + 1) - first : 1;
        value = combined(args, (i64)row * args.num_heads + k / args.head_dim, k % args.head_dim, first, count);
        args.attended[(i64)row * width + k] = value;
    }
    quantize_lane(value, (i8*)args.activations.values + (i64)row * stride,
                  (BlockMeta*)args.activations.meta + (i64)row * (stride / 32), k);
}
