// The first launch of a step: each row's token, real or virtual, becomes its hidden state.
#pragma once
#include "args.cuh"
#include "blocks.cuh"

struct EmbedArgs {
    const u32* tokens; // [rows]
    const u8* table;   // [vocab][row_bytes], as in the file
    f32* hidden;       // [rows][hidden_size]
    RowAdapters adapters;
    i64 row_bytes;
    RowType row_type;
    i32 hidden_size;
    f32 scale;         // of embeddings of the vocabulary
    f32 virtual_scale; // of those of a prelude
};
static_assert(sizeof(EmbedArgs) == 56, "as in embed.rs");

// Input k of a position of a prelude: nothing when it has keys and values in place of rows, since then no other row reads it.
DEVICE f32 virtual_value(const AdapterTable* adapter, i64 position, i32 hidden_size, i32 k) {
    bool has_rows = adapter && adapter->prelude_rows && position < adapter->num_virtual;
    return has_rows ? adapter->prelude_rows[position * hidden_size + k] : 0.0f;
}

DEVICE f32 real_value(const EmbedArgs& args, const AdapterTable* adapter, i64 token, i32 k) {
    f32 value = block_value(args.row_type, args.table + token * args.row_bytes, k);
    if (!adapter || !adapter->embedding_a) return value;
    i32 rank = adapter->embedding_rank;
    const f16* a = adapter->embedding_a + token * rank;
    // Two roundings, as on the CPU.
    for (i32 r = 0; r < rank; r++) value += to_f32(a[r]) * adapter->embedding_b[(i64)r * args.hidden_size + k];
    return value;
}

// One block per row.
KERNEL(embed, EmbedArgs, 256) {
    i32 row = block_x();
    u32 token = args.tokens[row];
    const AdapterTable* adapter = adapter_of(args.adapters, row);
    f32* hidden = args.hidden + (i64)row * args.hidden_size;
    for (i32 k = thread_index(); k < args.hidden_size; k += 256) {
        hidden[k] = token >= FIRST_VIRTUAL_TOKEN
            ? virtual_value(adapter, token - FIRST_VIRTUAL_TOKEN, args.hidden_size, k) * args.virtual_scale
            : real_value(args, adapter, token, k) * args.scale;
    }
}
