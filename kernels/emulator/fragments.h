// For tests: which lane holds what of a tensor-core product, and such products done by a warp.
#pragma once

// Where an element of a matrix stands. Matrices: 0 A and 1 B of bytes, 2 A and 3 B of halves, 4 the sums.
extern "C" void lorry_emulator_fragment(int matrix, int row, int column, int* lane, int* index) {
    using namespace emulator;
    Fragment of[] = {a_of(row, column), b_of(row, column), a16_of(row, column), b16_of(row, column), d_of(row, column)};
    *lane = of[matrix].lane;
    *index = of[matrix].index;
}

// Every lane's registers; halves: whether the product is of f16.
struct ProductArgs {
    const u32* a; // [32][4]
    const u32* b; // [32][2]
    i32* sums;    // [32][4], f32 for halves
    i32 depth;
    i32 halves;
};
static_assert(sizeof(ProductArgs) == 32, "as in tests/fragments.rs");

KERNEL(test_product, ProductArgs, 32) {
    const u32 *a = args.a + thread_index() * 4, *b = args.b + thread_index() * 2;
    const u32 fragment_a[4] = {a[0], a[1], a[2], a[3]}, fragment_b[2] = {b[0], b[1]};
    i32* sums = args.sums + thread_index() * 4;
    if (args.halves) {
        f32 d[4];
        for (i32 i = 0; i < 4; i++) d[i] = as_f32((u32)sums[i]);
        mma_f16(d, fragment_a, fragment_b);
        for (i32 i = 0; i < 4; i++) sums[i] = (i32)as_u32(d[i]);
        return;
    }
    i32 d[4] = {sums[0], sums[1], sums[2], sums[3]};
    if (args.depth == 32) mma_u8s8(d, fragment_a, fragment_b);
    else mma_u8s8_k16(d, fragment_a[0], fragment_a[1], fragment_b[0]);
    for (i32 i = 0; i < 4; i++) sums[i] = d[i];
}
