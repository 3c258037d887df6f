// Feed-forwards of experts: which rows go to which, and the sum of what comes of them.
//
// A row at one of its experts is a slot. Slots lie by expert, those of one in the order of their rows, and products take them in
// groups of one expert. Which these are is known to the device alone: a launch has as many groups as there may be, and those
// that there are not have no rows.
#pragma once
#include "args.cuh"

constexpr i32 MAX_EXPERTS = 512;
constexpr i32 MAX_USED = 32; // experts of a row: a lane has each

struct ChooseArgs {
    const f32* scores; // [rows][num_experts]
    i32* chosen;       // [rows][used]: the experts of a row, the best first
    f32* shares;       // the same: what each has of the sum
    i32 num_rows;
    i32 num_experts;
    i32 used;
    i32 normalizes_shares; // whether those of a row add up to 1
};
static_assert(sizeof(ChooseArgs) == 40, "as in experts.rs");

struct Choice {
    f32 score;
    i32 expert;
};
DEVICE bool is_better(Choice a, Choice b) { return a.score > b.score || (a.score == b.score && a.expert < b.expert); }

// A warp a row.
KERNEL(choose_experts, ChooseArgs, 256) {
    i32 row = block_x() * 8 + warp_index(), lane = lane_index();
    if (row >= args.num_rows) return;
    const f32* scores = args.scores + (i64)row * args.num_experts;
    Choice before = {-minus_infinity(), -1};
    i32 expert = 0; // this lane's
    for (i32 i = 0; i < args.used; i++) {
        Choice best = {minus_infinity(), MAX_EXPERTS};
        for (i32 e = lane; e < args.num_experts; e += 32) {
            // What is no number is the worst.
            Choice next = {maximum(scores[e], minus_infinity()), e};
            if (is_better(before, next) && is_better(next, best)) best = next;
        }
        for (i32 mask = 16; mask > 0; mask >>= 1) {
            Choice other = {shuffle_xor(best.score, mask), shuffle_xor(best.expert, mask)};
            if (is_better(other, best)) best = other;
        }
        if (lane == i) expert = best.expert;
        before = best;
    }
    f32 score = scores[expert], most = shuffle(score, 0), share = exponential(score - most), total = 0.0f;
    if (args.normalizes_shares) {
        for (i32 i = 0; i < args.used; i++) total += shuffle(share, i);
    } else {
        for (i32 e = lane; e < args.num_experts; e += 32) total += exponential(scores[e] - most);
        total = warp_sum(total);
    }
    if (lane >= args.used) return;
    args.chosen[row * args.used + lane] = expert;
    args.shares[row * args.used + lane] = divide(share, total);
}

struct DealArgs {
    const i32* chosen; // [slots], row by row
    RowAdapters adapters;
    i32* places;  // [slots]: the slot of each choice
    i32* rows;    // [slots]: of each slot
    i32* experts; // the same
    // The same, if rows have adapters: where an adapter's table would be if the sites of the slot's expert were those of the
    // first. So whoever reads sites of slots needs not know of experts.
    const AdapterTable** slot_adapters;
    RowGroup* groups; // [num_groups]
    i32 num_slots;
    i32 used;
    i32 num_experts;
    i32 group_rows; // of a group, at most
    i32 num_groups;
    i32 unused;
};
static_assert(sizeof(DealArgs) == 80, "as in experts.rs");

// One block, whose warps take an expert each.
constexpr i32 DEAL_THREADS = 1024;

DEVICE bool is_chosen(const DealArgs& args, i32 index, i32 expert) {
    return index < args.num_slots && args.chosen[index] == expert;
}

KERNEL(deal_slots, DealArgs, DEAL_THREADS) {
    SHARED i32 counts[MAX_EXPERTS];
    i32 lane = lane_index(), size = args.group_rows;
    for (i32 expert = warp_index(); expert < args.num_experts; expert += DEAL_THREADS / 32) {
        i32 count = 0;
        for (i32 i = lane; i - lane < args.num_slots; i += 32) count += is_chosen(args, i, expert) ? 1 : 0;
        count = warp_sum(count);
        if (lane == 0) counts[expert] = count;
    }
    sync_block();
    for (i32 expert = warp_index(); expert < args.num_experts; expert += DEAL_THREADS / 32) {
        i32 slot = 0, group = 0; // before the expert's
        for (i32 i = lane; i < expert; i += 32) slot += counts[i], group += (counts[i] + size - 1) / size;
        slot = warp_sum(slot);
        group = warp_sum(group);
        i32 count = counts[expert], num_groups = (count + size - 1) / size;
        for (i32 i = lane; i < num_groups; i += 32)
            args.groups[group + i] = {expert, slot + i * size, minimum(size, count - i * size), 0};
        if (expert == args.num_experts - 1)
            for (i32 i = group + num_groups + lane; i < args.num_groups; i += 32) args.groups[i] = {};
        for (i32 i = lane; i - lane < args.num_slots; i += 32) {
            bool is_its = is_chosen(args, i, expert);
            u32 its = ballot(is_its);
            if (is_its) {
                i32 to = slot + count_bits(its & ((1u << lane) - 1)), row = i / args.used;
                args.places[i] = to;
                args.rows[to] = row;
                args.experts[to] = expert;
                const AdapterTable* table = adapter_of(args.adapters, row);
                if (args.adapters.rows)
                    args.slot_adapters[to] = table ? (const AdapterTable*)((const Site*)table + expert * 3) : nullptr;
            }
            slot += count_bits(its);
        }
    }
}

struct GatherArgs {
    const f32* exact; // [rows][width]
    f32* slot_exact;  // [slots][width]
    const i32* rows;  // [slots]
    Activations activations;
    Activations slot_activations;
    i32 width; // a multiple of 4
    i32 unused;
};
static_assert(sizeof(GatherArgs) == 80, "as in experts.rs");

DEVICE void copy_words(const void* from, void* to, i32 num_words) {
    for (i32 i = thread_index(); i < num_words; i += 256) ((Words4*)to)[i] = ((const Words4*)from)[i];
}

// What the slots' rows read, slot by slot. A block a slot.
KERNEL(gather_slots, GatherArgs, 256) {
    i64 slot = block_x(), row = args.rows[slot];
    i32 stride = args.activations.stride;
    const Activations &from = args.activations, &to = args.slot_activations;
    copy_words(args.exact + row * args.width, args.slot_exact + slot * args.width, args.width / 4);
    copy_words(from.values + row * stride, (i8*)to.values + slot * stride, stride / 16);
    copy_words(from.meta + row * (stride / 32), (BlockMeta*)to.meta + slot * (stride / 32), stride / 64);
}

struct SumSlotsArgs {
    const f32* slots;  // [slots][width]
    const i32* places; // [rows][used]
    const f32* shares; // the same
    f32* sums;         // [rows][width]
    i32 width;
    i32 used;
};
static_assert(sizeof(SumSlotsArgs) == 40, "as in experts.rs");

// A row adds up its own slots, the best first. Blocks: rows, 256 outputs.
KERNEL(sum_slots, SumSlotsArgs, 256) {
    i64 row = block_x();
    i32 k = block_y() * 256 + thread_index();
    if (k >= args.width) return;
    f32 sum = 0.0f;
    for (i32 i = 0; i < args.used; i++) {
        i64 slot = args.places[row * args.used + i];
        sum = fmaf(args.slots[slot * args.width + k], args.shares[row * args.used + i], sum);
    }
    args.sums[row * args.width + k] = sum;
}
