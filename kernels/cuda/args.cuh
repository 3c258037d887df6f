// What several kernels read: how activations, adapters and KV blocks lie in device memory. The structures stand in
// ../src/cuda/args.rs too, field by field, and so do the kernels' own arguments in the files named like theirs.
#pragma once

// ---- Activations -------------------------------------------------------------------------------------------------------
//
// Rows of int8, `stride` bytes each: the width rounded up to 128, what is beyond it zero. Integers of a block of 32 may be
// summed in any order, so they lie as the tensor cores' B fragment wants them: of every two blocks, for each quad of lanes
// first the 8 values of one block, then those of the other; 8 values are inputs 4q..4q+4 and 16+4q..16+4q+4 of their block.

constexpr i32 SUPER = 128; // inputs of a superblock: 4 blocks of 32

// Of one block of one row: [row][stride / 32].
struct BlockMeta {
    f32 scale;
    i16 sums[2]; // of the first and of the last 16 values
};

// Where input k of a row stands among its `stride` bytes.
DEVICE i32 activation_place(i32 k) {
    i32 pair = k / 64, block = k / 32 % 2, half = k / 16 % 2, quad = k / 4 % 4;
    return pair * 64 + quad * 16 + block * 8 + half * 4 + k % 4;
}

struct Activations {
    const i8* values;      // [rows][stride]
    const BlockMeta* meta; // [rows][stride / 32]
    i32 stride;
    i32 num_rows;
};

// ---- Adapters ----------------------------------------------------------------------------------------------------------

// What an adapter does to one linear layer: y = output_scale ∘ (W (input_scale ∘ x) + b + B (scales ∘ A x)) + bias. A null
// address: not that. Rows of A and of B begin at multiples of 16 bytes.
struct Site {
    const f16* a;            // [rank][a_stride]
    const f16* b;            // [out][b_stride], zeros beyond rank
    const f32* scales;       // [rank]
    const f32* input_scale;  // [in]
    const f32* output_scale; // [out]
    const f32* bias;         // [out]
    i32 rank;
    i32 a_stride; // in rounded up to 8
    i32 b_stride; // rank rounded up to 8
    i32 unused;
};

// An adapter in device memory. Its sites follow: layer by layer those of q, k, v, o, gate, up, down, or instead of
// the last three those of the router and of each expert's gate, up, down; then the head.
struct AdapterTable {
    const f16* embedding_a;    // [vocab][embedding_rank]
    const f32* embedding_b;    // [embedding_rank][hidden]
    const f32* prelude_rows;   // [num_virtual][hidden]
    const f16* prelude_keys;   // [layers][num_virtual][kv_width]
    const f16* prelude_values; // the same
    const f16* head;           // [vocab][head_stride], instead of the base's; head_stride is hidden rounded up to 8
    i32 embedding_rank;
    i32 num_virtual; // positions of the prelude
};

// The adapter of each row of a step, null for the base alone. `rows` is null when no row of the step has one.
struct RowAdapters {
    const AdapterTable* const* rows;
};

DEVICE const AdapterTable* adapter_of(RowAdapters adapters, i32 row) { return adapters.rows ? adapters.rows[row] : nullptr; }
DEVICE const Site* site_of(const AdapterTable* table, i32 site) { return (const Site*)(table + 1) + site; }

// ---- Experts -----------------------------------------------------------------------------------------------------------

// Rows of a launch that are multiplied together: of one expert, where rows go to different ones. None: nothing to do.
struct RowGroup {
    i32 expert;
    i32 first;
    i32 count;
    i32 unused;
};

// ---- Attention ---------------------------------------------------------------------------------------------------------
//
// A KV block holds 16 positions of every layer. Keys are [layer][block][kv_head] of what a head is, and so are values:
//
//         keys                                              values
//   f16   [16 positions][head_dim]                          [head_dim][16 positions]
//   q8_0  the same in bytes, of which 128 is zero; behind   the same in bytes; behind them
//         them their scales, f16                            their scales, f16
//         [16 positions][head_dim / 32]                     [head_dim / 32][16 positions]
//
// Keys in q8_0, and the queries for them, are spread (kv.cuh). Whoever reads q8_0 makes f16 of it.

constexpr i32 KV_BLOCK = 16;
enum KvType : i32 { KV_F16, KV_Q8_0 };
// Bytes of the keys, and of the values, of a head.
DEVICE i32 kv_head_bytes(KvType type, i32 head_dim) {
    return type == KV_F16 ? head_dim * KV_BLOCK * 2 : head_dim * KV_BLOCK + head_dim / 32 * KV_BLOCK * 2;
}

constexpr u32 FIRST_VIRTUAL_TOKEN = 1u << 31; // token FIRST_VIRTUAL_TOKEN + i: position i of the row's prelude

// Queries of one sequence that one warp takes: num_rows · (heads of one KV head) is at most 16. num_rows 0: nothing to do.
struct AttendTile {
    i32 first_row;
    i32 num_rows;
    i32 first_position; // of first_row; row first_row + i sees positions up to first_position + i
    i32 block_table;    // where the sequence's blocks begin in the step's block tables
};

// The positions of a context are summed unit by unit, and the units' results in order. Units depend on the position alone, so
// that a row has the same bits however the work is shared: 16 of 64 positions, 16 of 256, then 1024 each.
DEVICE i32 unit_start(i32 unit) {
    return unit < 16 ? unit * 64 : unit < 32 ? 1024 + (unit - 16) * 256 : 5120 + (unit - 32) * 1024;
}
// The first position that the row at `position` sees.
DEVICE i32 first_seen(i32 position, i32 window) { return position < window ? 0 : position - window + 1; }
// Units that hold `positions` positions.
DEVICE i32 num_units(i32 positions) {
    return positions <= 1024 ? (positions + 63) / 64
         : positions <= 5120 ? 16 + (positions - 1024 + 255) / 256
                             : 32 + (positions - 5120 + 1023) / 1024;
}

static_assert(sizeof(BlockMeta) == 8 && sizeof(Activations) == 24, "as in args.rs");
static_assert(sizeof(Site) == 64 && sizeof(AdapterTable) == 56 && sizeof(AttendTile) == 16, "as in args.rs");
static_assert(sizeof(RowGroup) == 16, "as in args.rs");
