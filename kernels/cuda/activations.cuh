// Activations rounded to int8 with one scale for 32 as the CPU rounds them (../src/activations.rs), so that equal numbers give
// equal integers.
#pragma once
#include "args.cuh"

// Rounds the inputs 32b..32b + 32 of a row, of which this lane has input k = 32b + lane. For a whole warp. What is not a number
// makes the block's scale not a number, and so all that the row is multiplied to.
DEVICE void quantize_lane(f32 x, i8* values_row, BlockMeta* meta_row, i32 k) {
    f32 largest = as_f32((u32)warp_max((i32)as_u32(absolute(x))));
    f32 inverse = largest > 0.0f ? divide(127.0f, largest) : 0.0f;
    f32 rounded = round_even(x * inverse);
    i32 q = absolute(rounded) <= 127.0f ? (i32)rounded : 0;
    i32 sum = q; // of 16
    for (i32 mask = 8; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
    i32 last_sum = shuffle(sum, 16);
    values_row[activation_place(k)] = (i8)q;
    if (lane_index() == 0) meta_row[k / 32] = {divide(largest, 127.0f), {(i16)sum, (i16)last_sum}};
}
