// What the host needs of the logits to draw from them: the greatest, and the sum of all weights. First for each slice of a
// row, then for the row.
#pragma once
#include "device.cuh"

constexpr i32 NUM_CANDIDATES = 64;
constexpr i32 VALUES = 16; // that a thread holds
constexpr i32 HEAD_THREADS = 256;
constexpr i32 MERGE_THREADS = 512;
constexpr i32 HEAD_SLICE = HEAD_THREADS * VALUES; // logits
constexpr i32 MAX_SLICES = MERGE_THREADS * VALUES / NUM_CANDIDATES;
constexpr i32 ID_BITS = 19; // MAX_SLICES · HEAD_SLICE is 2^19
constexpr i32 NO_ID = 0x7fffffff;

// Of a row, or of a slice, whose candidates are in no order. A row's beyond num_candidates: ids 0, logits -infinity.
struct RowSummary {
    i32 ids[NUM_CANDIDATES];
    f32 logits[NUM_CANDIDATES];
    f32 max; // the greatest that is a number
    f32 sum; // of exp(logit - max) over all that are numbers; 0 where max is infinite
    i32 num_candidates;
    i32 has_nan;
};

struct HeadArgs {
    const f32* logits;     // [rows][vocab]
    RowSummary* slices;    // [rows][num_slices]
    RowSummary* summaries; // [rows]
    i32 num_rows;
    i32 vocab;
    i32 num_slices;
    i32 unused;
};
static_assert(sizeof(RowSummary) == 528 && sizeof(HeadArgs) == 40, "as in head.rs");

// A greater key for what is greater in IEEE's total order.
DEVICE u32 key_of(f32 logit) {
    u32 bits = as_u32(logit);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
DEVICE f32 logit_of(u32 key) { return as_f32(key >> 31 ? key & 0x7fffffffu : ~key); }
DEVICE f32 negative_infinity() { return as_f32(0xff800000u); }
DEVICE bool is_infinite(f32 v) { return absolute(v) == -negative_infinity(); }

// What a thread holds: keys and ids, absent ones key 0 and NO_ID.
struct Held {
    u32 keys[VALUES];
    i32 ids[VALUES];
};

// What a block shares.
template <i32 THREADS> struct Selection {
    i32 counts[2][THREADS / 32];
    f32 maxima[THREADS / 32];
    f32 sums[THREADS / 32];
    u32 keys[NUM_CANDIDATES];
    i32 ids[NUM_CANDIDATES];
};

// The sum over all warps of the block, and over those before this one. Counts alternate between two places, so that one
// barrier is enough: who writes to a place again has passed the barrier behind which the others had read it.
template <i32 THREADS> DEVICE i32 sum_warps(Selection<THREADS>& shared, i32& turn, i32 of_warp, i32& before) {
    const i32* counts = shared.counts[turn];
    if (lane_index() == 0) shared.counts[turn][warp_index()] = of_warp;
    turn ^= 1;
    sync_block();
    i32 sum = 0;
    before = 0;
#pragma unroll
    for (i32 warp = 0; warp < THREADS / 32; warp++) {
        if (warp < warp_index()) before += counts[warp];
        sum += counts[warp];
    }
    return sum;
}
template <i32 THREADS> DEVICE i32 block_sum(Selection<THREADS>& shared, i32& turn, i32 v) {
    i32 before;
    return sum_warps(shared, turn, warp_sum(v), before);
}

// How many keys are at least `key`.
template <i32 THREADS> DEVICE i32 count_from(Selection<THREADS>& shared, i32& turn, const Held& held, u32 key) {
    i32 n = 0;
#pragma unroll
    for (i32 i = 0; i < VALUES; i++) n += held.keys[i] >= key && held.ids[i] != NO_ID;
    return block_sum(shared, turn, n);
}
// How many have this key and an id below `id`.
template <i32 THREADS> DEVICE i32 count_ties(Selection<THREADS>& shared, i32& turn, const Held& held, u32 key, i32 id) {
    i32 n = 0;
#pragma unroll
    for (i32 i = 0; i < VALUES; i++) n += held.keys[i] == key && held.ids[i] < id;
    return block_sum(shared, turn, n);
}

// Puts the `wanted` greatest of all that the block holds, which are as many or more, into shared.keys and shared.ids, in no
// order; of equal ones those with the lowest ids.
template <i32 THREADS> DEVICE void select(Selection<THREADS>& shared, i32& turn, const Held& held, i32 wanted) {
    u32 least = 0; // the greatest key that `wanted` keys reach, bit by bit; done before the last bit when no more reach it
    i32 num_reaching = -1;
    for (i32 bit = 31; bit >= 0 && num_reaching != wanted; bit--) {
        i32 n = count_from(shared, turn, held, least | 1u << bit);
        if (n >= wanted) least |= 1u << bit, num_reaching = n;
    }
    if (least == 0) num_reaching = count_from(shared, turn, held, least);
    i32 last_tie = NO_ID - 1; // of those whose key is the least
    if (num_reaching != wanted) {
        i32 wanted_ties = wanted - (num_reaching - count_ties(shared, turn, held, least, NO_ID));
        last_tie = 0;
        for (i32 bit = ID_BITS - 1; bit >= 0; bit--)
            if (count_ties(shared, turn, held, least, last_tie | 1 << bit) < wanted_ties) last_tie |= 1 << bit;
    }
    bool chosen[VALUES];
    i32 n = 0;
#pragma unroll
    for (i32 i = 0; i < VALUES; i++) {
        chosen[i] = held.ids[i] != NO_ID && (held.keys[i] > least || (held.keys[i] == least && held.ids[i] <= last_tie));
        n += chosen[i];
    }
    i32 place = n; // the lanes up to this one have so many
    for (i32 distance = 1; distance < 32; distance *= 2) {
        i32 lower = shuffle(place, lane_index() - distance);
        if (lane_index() >= distance) place += lower;
    }
    i32 before, of_warp = shuffle(place, 31);
    sum_warps(shared, turn, of_warp, before);
    place += before - n;
#pragma unroll
    for (i32 i = 0; i < VALUES; i++) {
        if (!chosen[i]) continue;
        shared.keys[place] = held.keys[i];
        shared.ids[place] = held.ids[i];
        place++;
    }
    sync_block();
}

struct CapArgs {
    f32* logits; // [count]
    i64 count;
    f32 cap;
    i32 unused;
};
static_assert(sizeof(CapArgs) == 24, "as in head.rs");

// logit = cap · tanh(logit / cap)
KERNEL(cap_logits, CapArgs, HEAD_THREADS) {
    for (i64 i = (i64)block_x() * HEAD_THREADS + thread_index(); i < args.count; i += (i64)grid_x() * HEAD_THREADS)
        args.logits[i] = hyperbolic_tangent(divide(args.logits[i], args.cap)) * args.cap;
}

// Grid: slices, rows.
KERNEL(head_slices, HeadArgs, HEAD_THREADS) {
    SHARED Selection<HEAD_THREADS> shared;
    i32 slice = block_x(), row = block_y(), len = minimum(args.vocab - slice * HEAD_SLICE, HEAD_SLICE), turn = 0;
    const f32* logits = args.logits + (i64)row * args.vocab + slice * HEAD_SLICE;
    RowSummary& summary = args.slices[(i64)row * args.num_slices + slice];
    Held held;
    f32 max = negative_infinity();
    i32 num_nan = 0;
#pragma unroll
    for (i32 i = 0; i < VALUES; i++) {
        i32 index = i * HEAD_THREADS + thread_index();
        bool is_there = index < len;
        f32 logit = is_there ? logits[index] : negative_infinity();
        held.keys[i] = is_there ? key_of(logit) : 0;
        held.ids[i] = is_there ? slice * HEAD_SLICE + index : NO_ID;
        num_nan += logit != logit;
        max = logit > max ? logit : max;
    }
    max = warp_max(max);
    if (lane_index() == 0) shared.maxima[warp_index()] = max;
    sync_block();
    for (i32 warp = 0; warp < HEAD_THREADS / 32; warp++) max = maximum(max, shared.maxima[warp]);
    f32 sum = 0.0f;
#pragma unroll
    for (i32 i = 0; i < VALUES; i++) {
        f32 logit = logit_of(held.keys[i]);
        if (held.ids[i] != NO_ID && logit == logit && !is_infinite(max)) sum += exponential(logit - max);
    }
    sum = warp_sum(sum);
    if (lane_index() == 0) shared.sums[warp_index()] = sum;
    num_nan = block_sum(shared, turn, num_nan);
    i32 wanted = minimum(len, NUM_CANDIDATES), at = thread_index();
    select(shared, turn, held, wanted);
    if (at < wanted) {
        summary.ids[at] = shared.ids[at];
        summary.logits[at] = logit_of(shared.keys[at]);
    }
    if (at > 0) return;
    sum = shared.sums[0];
    for (i32 warp = 1; warp < HEAD_THREADS / 32; warp++) sum += shared.sums[warp];
    summary.max = max;
    summary.sum = sum;
    summary.num_candidates = wanted;
    summary.has_nan = num_nan > 0;
}

// Maximum and sum of a row, by one warp.
DEVICE void merge_sums(const RowSummary* slices, i32 num_slices, RowSummary& summary) {
    f32 max = negative_infinity(), sum = 0.0f;
    i32 num_nan = 0;
    for (i32 slice = lane_index(); slice < num_slices; slice += 32) {
        max = maximum(max, slices[slice].max);
        num_nan += slices[slice].has_nan;
    }
    max = warp_max(max);
    for (i32 slice = lane_index(); slice < num_slices && !is_infinite(max); slice += 32)
        sum += slices[slice].sum * exponential(slices[slice].max - max);
    sum = warp_sum(sum);
    num_nan = warp_sum(num_nan);
    if (lane_index() > 0) return;
    summary.max = max;
    summary.sum = sum;
    summary.has_nan = num_nan > 0;
}

// Grid: rows.
KERNEL(head_merge, HeadArgs, MERGE_THREADS) {
    SHARED Selection<MERGE_THREADS> shared;
    i32 row = block_x(), wanted = minimum(args.vocab, NUM_CANDIDATES), at = thread_index(), turn = 0;
    const RowSummary* slices = args.slices + (i64)row * args.num_slices;
    RowSummary& summary = args.summaries[row];
    Held held;
#pragma unroll
    for (i32 i = 0; i < VALUES; i++) {
        i32 index = i * MERGE_THREADS + at, slice = index / NUM_CANDIDATES, place = index % NUM_CANDIDATES;
        bool is_there = place < args.vocab - slice * HEAD_SLICE; // a slice that is not there would begin behind the vocabulary
        held.keys[i] = is_there ? key_of(slices[slice].logits[place]) : 0;
        held.ids[i] = is_there ? slices[slice].ids[place] : NO_ID;
    }
    if (warp_index() == 0) merge_sums(slices, args.num_slices, summary);
    select(shared, turn, held, wanted);
    if (at == 0) summary.num_candidates = wanted;
    if (at >= NUM_CANDIDATES) return;
    if (at >= wanted) {
        summary.ids[at] = 0;
        summary.logits[at] = negative_infinity();
        return;
    }
    u32 key = shared.keys[at];
    i32 id = shared.ids[at], rank = 0;
    for (i32 i = 0; i < wanted; i++) rank += shared.keys[i] > key || (shared.keys[i] == key && shared.ids[i] < id);
    summary.ids[rank] = id;
    summary.logits[rank] = logit_of(key);
}
