// What goes into the KV store: rotated keys, values, and blocks copied within it.
#pragma once
#include "args.cuh"

struct RotateArgs {
    const f32* q;         // [rows][num_heads · head_dim]
    const f32* k;         // [rows][num_kv_heads · head_dim]
    const f32* v;         // the same
    const f32* cos;       // [position][turned_pairs]
    const f32* sin;       // the same
    const i32* positions; // [rows]
    const i32* slots;     // [rows]: block · KV_BLOCK + offset; negative: the row is not stored
    const u32* tokens;    // [rows]
    RowAdapters adapters;
    const f32* common; // [num_kv_heads · head_dim]: added to all keys, or null; q8_0 goes without what hardly turns of it
    const f32* stays;  // [head_dim]: 1 for what hardly turns, or else 0
    u8* keys;          // of the layer, as args.cuh says
    u8* values;        // the same
    f16* q_half;       // [rows][num_heads · head_dim]: q rotated, and spread for q8_0
    i32 num_heads;
    i32 num_kv_heads;
    i32 head_dim;
    i32 layer;
    i32 turned_pairs; // dimensions i and i + turned_pairs turn together; those beyond twice as many stay as they are
    KvType kv_type;
};
static_assert(sizeof(RotateArgs) == 136, "as in kv.rs");

// How a position turns.
struct Angles {
    const f32* cos;
    const f32* sin;
    i32 pairs;
};

// Dimension d of a head, turned. Roundings as on the CPU.
DEVICE f32 turned(const f32* head, i32 d, const Angles& by) {
    if (d >= 2 * by.pairs) return head[d];
    i32 i = d < by.pairs ? d : d - by.pairs;
    f32 a = head[i], b = head[i + by.pairs], c = by.cos[i], s = by.sin[i];
    return d < by.pairs ? a * c - b * s : b * c + a * s;
}

// ---- q8_0 --------------------------------------------------------------------------------------------------------------------
//
// Of 32 dimensions a lane has one. All as on the CPU (../src/attention/store.rs).

// Turns 32 dimensions by Hadamard's matrix over sqrt(32), which leaves the products of queries and keys that are both turned as
// they were.
DEVICE f32 spread(f32 x) {
    for (i32 mask = 16; mask > 0; mask >>= 1) {
        f32 other = shuffle_xor(x, mask);
        x = lane_index() & mask ? other - x : x + other;
    }
    return x * 0.17677669529663687f;
}

// 32 values as whole numbers of a scale, which is not a number if one of them is none.
struct Rounded {
    u8 byte; // 128 is zero
    f16 scale;
};
DEVICE Rounded round_block(f32 x) {
    f16 scale = to_f16(divide(warp_max_magnitude(x), 127.0f));
    // Of what it is once it is rounded.
    f32 inverse = to_f32(scale) > 0.0f ? divide(1.0f, to_f32(scale)) : 0.0f;
    f32 q = maximum(round_even(x * inverse), -128.0f);
    return {(u8)((i32)(q < 127.0f ? q : 127.0f) + 128), scale};
}

// ---- What is stored --------------------------------------------------------------------------------------------------------

// One head of a position: what the row computed, or what its prelude has there.
struct HeadSource {
    const f32* k;
    const f32* v;
    const f16* prelude_k;
    const f16* prelude_v;
    Angles angles;
};

DEVICE f32 key_of(const HeadSource& source, i32 d) {
    return source.prelude_k ? to_f32(source.prelude_k[d]) : turned(source.k, d, source.angles);
}
DEVICE f32 value_of(const HeadSource& source, i32 d) { return source.prelude_v ? to_f32(source.prelude_v[d]) : source.v[d]; }
DEVICE bool is_finite(f16 h) { return (h & 0x7c00) != 0x7c00; }
constexpr f16 NO_NUMBER = 0x7e00;

// A warp stores one head, at position `offset` of a block. A masked position counts 0 · its value, which would be NaN for every
// row that must not see it if the value were NaN or infinite. Such values are stored as zeros, and the key as NaN: only rows
// that see it get NaN.
DEVICE void store_f16(const HeadSource& source, i32 head_dim, i32 offset, f16* keys, f16* values) {
    i32 broken = 0;
    for (i32 d = lane_index(); d < head_dim; d += 32) {
        f16 value = to_f16(value_of(source, d));
        broken |= is_finite(value) ? 0 : 1;
        values[d * KV_BLOCK + offset] = is_finite(value) ? value : (f16)0;
    }
    broken = warp_sum(broken);
    for (i32 d = lane_index(); d < head_dim; d += 32)
        keys[offset * head_dim + d] = broken ? NO_NUMBER : to_f16(key_of(source, d));
}

// The same in q8_0, of which 32 values are zeros together. `common` is of the head.
DEVICE void store_q8_0(const HeadSource& source, const f32* common, const f32* stays, i32 head_dim, i32 offset, u8* keys,
                       u8* values) {
    f16* key_scales = (f16*)(keys + head_dim * KV_BLOCK);
    f16* value_scales = (f16*)(values + head_dim * KV_BLOCK);
    i32 num_groups = head_dim / 32;
    bool broken = false;
    for (i32 group = 0; group < num_groups; group++) {
        i32 d = group * 32 + lane_index();
        Rounded value = round_block(value_of(source, d));
        // Of the greatest that may be read.
        bool finite = is_finite(to_f16(127.0f * to_f32(value.scale)));
        broken |= !finite;
        values[d * KV_BLOCK + offset] = value.byte;
        if (lane_index() == 0) value_scales[group * KV_BLOCK + offset] = finite ? value.scale : (f16)0;
    }
    for (i32 group = 0; group < num_groups; group++) {
        i32 d = group * 32 + lane_index();
        f32 key = key_of(source, d);
        if (common) key -= common[d] * stays[d];
        Rounded rounded = round_block(spread(key));
        keys[offset * head_dim + d] = rounded.byte;
        if (lane_index() == 0) key_scales[offset * num_groups + group] = broken ? NO_NUMBER : rounded.scale;
    }
}

DEVICE HeadSource head_source(const RotateArgs& args, i32 row, i32 kv_head, const Angles& angles) {
    i32 width = args.num_kv_heads * args.head_dim;
    i64 at = (i64)row * width + kv_head * args.head_dim;
    HeadSource source = {args.k + at, args.v + at, nullptr, nullptr, angles};
    u32 token = args.tokens[row];
    const AdapterTable* adapter = adapter_of(args.adapters, row);
    if (token < FIRST_VIRTUAL_TOKEN || !adapter || !adapter->prelude_keys) return source;
    i64 position = token - FIRST_VIRTUAL_TOKEN;
    if (position >= adapter->num_virtual) return source;
    at = ((i64)args.layer * adapter->num_virtual + position) * width + kv_head * args.head_dim;
    source.prelude_k = adapter->prelude_keys + at;
    source.prelude_v = adapter->prelude_values + at;
    return source;
}

// Grid: rows, then the heads of queries and of keys, a warp each.
KERNEL(rotate_and_store, RotateArgs, 256) {
    i32 row = block_x(), head = block_y() * 8 + warp_index(), head_dim = args.head_dim;
    i64 first_angle = (i64)args.positions[row] * args.turned_pairs;
    Angles angles = {args.cos + first_angle, args.sin + first_angle, args.turned_pairs};
    bool is_q8_0 = args.kv_type == KV_Q8_0;
    if (head < args.num_heads) {
        i64 at = ((i64)row * args.num_heads + head) * head_dim;
        for (i32 d = lane_index(); d < head_dim; d += 32) {
            f32 q = turned(args.q + at, d, angles);
            args.q_half[at + d] = to_f16(is_q8_0 ? spread(q) : q);
        }
        return;
    }
    i32 kv_head = head - args.num_heads, slot = args.slots[row];
    if (kv_head >= args.num_kv_heads || slot < 0) return;
    i64 start = ((i64)(slot / KV_BLOCK) * args.num_kv_heads + kv_head) * kv_head_bytes(args.kv_type, head_dim);
    u8 *keys = args.keys + start, *values = args.values + start;
    HeadSource source = head_source(args, row, kv_head, angles);
    const f32* common = args.common ? args.common + kv_head * head_dim : nullptr;
    if (is_q8_0) store_q8_0(source, common, args.stays, head_dim, slot % KV_BLOCK, keys, values);
    else store_f16(source, head_dim, slot % KV_BLOCK, (f16*)keys, (f16*)values);
}

struct CopyArgs {
    Words4* keys;       // [layers][num_blocks][block_words]
    Words4* values;     // the same
    const i32* copies;  // [max_copies][2]: from, to
    const i32* num_copies;
    i64 layer_words; // of 16 bytes
    i32 block_words; // of 16 bytes
    i32 unused;
};
static_assert(sizeof(CopyArgs) == 48, "as in kv.rs");

// Grid: layers, keys and values, words of a block. Each thread does all copies of its word, in order: a block may be read
// after it was written.
KERNEL(copy_blocks, CopyArgs, 256) {
    i32 word = block_z() * 256 + thread_index(), count = *args.num_copies;
    if (word >= args.block_words) return;
    Words4* store = (block_y() == 0 ? args.keys : args.values) + block_x() * args.layer_words + word;
    for (i32 i = 0; i < count; i++) {
        i64 from = args.copies[i * 2], to = args.copies[i * 2 + 1];
        store[to * args.block_words] = store[from * args.block_words];
    }
}
