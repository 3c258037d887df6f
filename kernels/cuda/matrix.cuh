// A packed weight matrix in device memory, as the tensor cores' A fragment wants it (written by ../src/cuda/matrix.rs).
//
// Tiles of 16 outputs times pairs of blocks of 32 inputs, one record each, so that a tile is one forward stream through memory.
// A row of a tile is padded to whole superblocks of 128 inputs, two records. Weights are unsigned; what their format subtracts
// is subtracted with the activations' sums. Lane 4 · group + quad of a warp holds 16 weights of each block in four registers:
// a0 and a2 of output `group`, a1 and a3 of output group + 8; a0 and a1 the inputs 4 · quad .. + 4, a2 and a3 those 16 further
// on. A byte is a weight, the first input the lowest byte.
//
//     low 4 bits   [32 lanes][4 registers][4]: the first block in the low nibbles
//     fifth bits   [32 lanes][4]: bit 4 · block + register
//     bits 5, 6    [32 lanes][2 blocks][4]: bits 2 · register and the next
//     8 bits       [2 blocks][32 lanes][4 registers][4], instead of all these
//     scales       f16 [16 outputs][2 blocks][groups], one group for 32 inputs or two for 16 each
//     minima       the same, where the format has them
#pragma once
#include "args.cuh"

constexpr i32 TILE = 16; // outputs of a tile
constexpr i32 PAIR = 64; // inputs of a record

struct Matrix {
    const u8* records; // of all experts, if there are such, one behind the other; null: not here
    i32 out_features;  // of one, a multiple of TILE where there are more
    i32 in_features;
    i32 num_super; // superblocks of a row
    i32 layout;    // Form::ID
    i32 offset;    // w = scale · (q - offset) - min
    i32 unused;
};
static_assert(sizeof(Matrix) == 32, "as in matrix.rs");

// What varies between records.
template <i32 BITS_, i32 GROUPS_, bool MIN_> struct Form {
    static constexpr i32 BITS = BITS_, GROUPS = GROUPS_;
    static constexpr bool MIN = MIN_;
    static constexpr i32 ID = BITS * 4 + (GROUPS - 1) * 2 + MIN;
    static constexpr i32 WEIGHT_BYTES = TILE * PAIR * BITS / 8;
    static constexpr i32 SCALE_BYTES = TILE * 2 * GROUPS * 2;
    static constexpr i32 RECORD_BYTES = WEIGHT_BYTES + SCALE_BYTES * (MIN ? 2 : 1);
};

// Calls `multiply(form, work)` with the form of a layout: the same one in a whole block.
template <typename Work> DEVICE void with_form(i32 layout, Work& work) {
    switch (layout) {
    case Form<4, 1, false>::ID: return multiply(Form<4, 1, false>(), work);
    case Form<4, 1, true>::ID: return multiply(Form<4, 1, true>(), work);
    case Form<4, 2, false>::ID: return multiply(Form<4, 2, false>(), work);
    case Form<4, 2, true>::ID: return multiply(Form<4, 2, true>(), work);
    case Form<5, 1, false>::ID: return multiply(Form<5, 1, false>(), work);
    case Form<5, 1, true>::ID: return multiply(Form<5, 1, true>(), work);
    case Form<6, 2, false>::ID: return multiply(Form<6, 2, false>(), work);
    case Form<8, 1, false>::ID: return multiply(Form<8, 1, false>(), work);
    }
}

// A lane's part of a record, as it lies in memory. Scales and minima are of outputs `group` and group + 8.
template <typename F> struct LaneRecord {
    u32 low[F::BITS == 8 ? 2 : 1][4];
    u32 high[F::BITS == 6 ? 2 : 1];
    u32 scales[2][F::GROUPS];
    u32 minima[2][F::GROUPS];
};

template <bool STREAM> DEVICE void load_words(u32 (&to)[1], const u8* from) { to[0] = *(const u32*)from; }
template <bool STREAM> DEVICE void load_words(u32 (&to)[2], const u8* from) {
    Words2 words = STREAM ? load_stream((const Words2*)from) : *(const Words2*)from;
    for (i32 i = 0; i < 2; i++) to[i] = words.v[i];
}
template <bool STREAM> DEVICE void load_words(u32 (&to)[4], const u8* from) {
    Words4 words = STREAM ? load_stream((const Words4*)from) : *(const Words4*)from;
    for (i32 i = 0; i < 4; i++) to[i] = words.v[i];
}

// STREAM: nobody else reads the record soon.
template <typename F, bool STREAM> DEVICE LaneRecord<F> load_record(const u8* record) {
    LaneRecord<F> lane = {};
    i32 index = lane_index();
    load_words<STREAM>(lane.low[0], record + index * 16);
    if constexpr (F::BITS == 8) load_words<STREAM>(lane.low[1], record + 512 + index * 16);
    if constexpr (F::BITS == 5) load_words<STREAM>(lane.high, record + 512 + index * 4);
    if constexpr (F::BITS == 6) load_words<STREAM>(lane.high, record + 512 + index * 8);
    const u8* scales = record + F::WEIGHT_BYTES + index / 4 * (4 * F::GROUPS);
#pragma unroll
    for (i32 side = 0; side < 2; side++) {
        load_words<STREAM>(lane.scales[side], scales + side * (F::SCALE_BYTES / 2));
        if constexpr (F::MIN) load_words<STREAM>(lane.minima[side], scales + F::SCALE_BYTES + side * (F::SCALE_BYTES / 2));
    }
    return lane;
}

// Moves bits up where `by` is positive, else down.
DEVICE u32 shifted(u32 word, i32 by) { return by >= 0 ? word << by : word >> -by; }

// Register `j` of the A fragment of a block.
template <typename F> DEVICE u32 weights_of(const LaneRecord<F>& lane, i32 block, i32 j) {
    if constexpr (F::BITS == 8) {
        return lane.low[block][j];
    } else {
        u32 weights = lane.low[0][j] >> (block * 4) & 0x0F0F0F0Fu;
        if constexpr (F::BITS == 5) weights |= shifted(lane.high[0], 4 - (block * 4 + j)) & 0x10101010u;
        if constexpr (F::BITS == 6) weights |= shifted(lane.high[block], 4 - 2 * j) & 0x30303030u;
        return weights;
    }
}

DEVICE f32 half_of(const u32* words, i32 index) { return to_f32((f16)(words[index / 2] >> (index % 2 * 16))); }
