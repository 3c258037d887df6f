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
    f16* keys;   // of the layer, as args.cuh says
    f16* values; // the same
    f16* q_half; // [rows][num_heads · head_dim]: q rotated
    i32 num_heads;
    i32 num_kv_heads;
    i32 head_dim;
    i32 layer;
    i32 turned_pairs; // dimensions i and i + turned_pairs turn together; those beyond twice as many stay as they are
    i32 unused;
};
static_assert(sizeof(RotateArgs) == 120, "as in kv.rs");

// Dimensions i and i + half of a head, turned. Roundings as on the CPU.
struct Turned { f32 first, second; };
DEVICE Turned turn(const f32* head, i32 half, i32 i, const f32* cos, const f32* sin) {
    f32 a = head[i], b = head[i + half], c = cos[i], s = sin[i];
    return {a * c - b * s, b * c + a * s};
}

// One head of a position as it is stored, in f16: what the row computed, or what its prelude has there.
struct HeadSource {
    const f32* k;
    const f32* v;
    const f16* prelude_k;
    const f16* prelude_v;
};

DEVICE f16 value_of(const HeadSource& source, i32 d) { return source.prelude_v ? source.prelude_v[d] : to_f16(source.v[d]); }
DEVICE bool is_finite(f16 h) { return (h & 0x7c00) != 0x7c00; }

// A warp stores one head. A masked position counts 0 · its value, which would be NaN for every row that must not see it if
// the value were NaN or infinite. Such values are stored as zeros, and the key as NaN: only rows that see it get NaN.
DEVICE void store_head(const HeadSource& source, const f32* cos, const f32* sin, i32 half, i32 head_dim, f16* keys,
                       f16* values) {
    i32 lane = lane_index();
    i32 broken = 0;
    for (i32 d = lane; d < head_dim; d += 32) {
        f16 value = value_of(source, d);
        broken |= is_finite(value) ? 0 : 1;
        values[d * KV_BLOCK] = is_finite(value) ? value : (f16)0;
    }
    broken = warp_sum(broken);
    for (i32 i = lane; i < half; i += 32) {
        f16 first, second;
        if (source.prelude_k) {
            first = source.prelude_k[i];
            second = source.prelude_k[i + half];
        } else {
            Turned turned = turn(source.k, half, i, cos, sin);
            first = to_f16(turned.first);
            second = to_f16(turned.second);
        }
        keys[i] = broken ? (f16)0x7e00 : first;
        keys[i + half] = broken ? (f16)0x7e00 : second;
    }
    for (i32 d = 2 * half + lane; d < head_dim; d += 32) {
        f16 key = source.prelude_k ? source.prelude_k[d] : to_f16(source.k[d]);
        keys[d] = broken ? (f16)0x7e00 : key;
    }
}

DEVICE HeadSource head_source(const RotateArgs& args, i32 row, i32 kv_head) {
    i32 width = args.num_kv_heads * args.head_dim;
    i64 at = (i64)row * width + kv_head * args.head_dim;
    HeadSource source = {args.k + at, args.v + at, nullptr, nullptr};
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
    i32 row = block_x(), head = block_y() * 8 + warp_index(), half = args.turned_pairs;
    const f32* cos = args.cos + (i64)args.positions[row] * half;
    const f32* sin = args.sin + (i64)args.positions[row] * half;
    if (head < args.num_heads) {
        i64 at = ((i64)row * args.num_heads + head) * args.head_dim;
        for (i32 i = lane_index(); i < half; i += 32) {
            Turned turned = turn(args.q + at, half, i, cos, sin);
            args.q_half[at + i] = to_f16(turned.first);
            args.q_half[at + i + half] = to_f16(turned.second);
        }
        for (i32 d = 2 * half + lane_index(); d < args.head_dim; d += 32) args.q_half[at + d] = to_f16(args.q[at + d]);
        return;
    }
    i32 kv_head = head - args.num_heads, slot = args.slots[row];
    if (kv_head >= args.num_kv_heads || slot < 0) return;
    i64 start = ((i64)(slot / KV_BLOCK) * args.num_kv_heads + kv_head) * KV_BLOCK * args.head_dim;
    i32 offset = slot % KV_BLOCK;
    store_head(head_source(args, row, kv_head), cos, sin, half, args.head_dim, args.keys + start + offset * args.head_dim,
               args.values + start + offset);
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
