// The tensor-core products as NVIDIA's PTX ISA defines their fragments: which lane holds which element in which register.
#pragma once

namespace emulator {

// "Matrix Fragments for mma.m16n8k32 with .u8/.s8": group = lane / 4, quad = lane % 4.
struct Fragment { int lane, index; };
// A, 16 rows: bytes 0..4 of a lane are register 0, and so on.
constexpr Fragment a_of(int row, int k) { return {(row & 7) * 4 + (k & 15) / 4, (k & 3) + (row >= 8 ? 4 : 0) + (k >= 16 ? 8 : 0)}; }
constexpr Fragment b_of(int k, int column) { return {column * 4 + (k & 15) / 4, (k & 3) + (k >= 16 ? 4 : 0)}; }
// C and D, 32-bit elements, in both products.
constexpr Fragment d_of(int row, int column) { return {(row & 7) * 4 + column / 2, (column & 1) + (row >= 8 ? 2 : 0)}; }
// "Matrix Fragments for mma.m16n8k16 with floating point type": indexes count halves.
constexpr Fragment a16_of(int row, int k) { return {(row & 7) * 4 + (k & 7) / 2, (k & 1) + (row >= 8 ? 2 : 0) + (k >= 8 ? 4 : 0)}; }
constexpr Fragment b16_of(int k, int column) { return {column * 4 + (k & 7) / 2, (k & 1) + (k >= 8 ? 2 : 0)}; }

struct MmaBytes { u32 a[4]; u32 b[2]; };
struct Sums { i32 v[4]; };
struct FloatSums { f32 v[4]; };

template <int K> void multiply_bytes(Warp& w) {
    alignas(64) i16 a[16][K], b[8][K];
    for (int lane = 0; lane < 32; lane++) {
        const u8* in = (const u8*)w.in[lane];
        int group = lane / 4, quad = lane % 4;
        for (int half = 0; half < K / 16; half++)
            for (int i = 0; i < 4; i++) {
                int k = half * 16 + quad * 4 + i;
                a[group][k] = in[half * 8 + i];
                a[group + 8][k] = in[half * 8 + 4 + i];
                b[group][k] = (i8)in[16 + half * 4 + i];
            }
    }
    for (int lane = 0; lane < 32; lane++) {
        Sums sums;
        for (int i = 0; i < 4; i++) {
            const i16 *x = a[lane / 4 + (i >= 2 ? 8 : 0)], *y = b[lane % 4 * 2 + (i & 1)];
            i32 sum = 0;
            for (int k = 0; k < K; k++) sum += x[k] * y[k];
            sums.v[i] = sum;
        }
        std::memcpy(w.out[lane], &sums, sizeof sums);
    }
}

struct MmaHalves { u32 a[4]; u32 b[2]; };

inline void multiply_halves(Warp& w) {
    alignas(64) f32 a[16][16], b[8][16];
    for (int lane = 0; lane < 32; lane++) {
        f16 in[12];
        std::memcpy(in, w.in[lane], sizeof in);
        int group = lane / 4, quad = lane % 4;
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 2; i++) {
                int k = half * 8 + quad * 2 + i;
                a[group][k] = to_f32(in[half * 4 + i]);
                a[group + 8][k] = to_f32(in[half * 4 + 2 + i]);
                b[group][k] = to_f32(in[8 + half * 2 + i]);
            }
    }
    for (int lane = 0; lane < 32; lane++) {
        FloatSums sums;
        for (int i = 0; i < 4; i++) {
            const f32 *x = a[lane / 4 + (i >= 2 ? 8 : 0)], *y = b[lane % 4 * 2 + (i & 1)];
            f32 sum = 0;
            for (int k = 0; k < 16; k++) sum += x[k] * y[k];
            sums.v[i] = sum;
        }
        std::memcpy(w.out[lane], &sums, sizeof sums);
    }
}

template <int K> __attribute__((noinline)) static Sums warp_multiply_bytes(const MmaBytes& in) {
    return meet_warp<MmaBytes, Sums>((void*)warp_multiply_bytes<K>, in, [](Warp& w) { multiply_bytes<K>(w); });
}
__attribute__((noinline)) static FloatSums warp_multiply_halves(const MmaHalves& in) {
    return meet_warp<MmaHalves, FloatSums>((void*)warp_multiply_halves, in, [](Warp& w) { multiply_halves(w); });
}

} // namespace emulator

DEVICE void mma_u8s8(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::Sums sums = emulator::warp_multiply_bytes<32>({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    for (int i = 0; i < 4; i++) d[i] += sums.v[i];
}
DEVICE void mma_u8s8_k16(i32 (&d)[4], u32 a0, u32 a1, u32 b) {
    emulator::Sums sums = emulator::warp_multiply_bytes<16>({{a0, a1, 0, 0}, {b, 0}});
    for (int i = 0; i < 4; i++) d[i] += sums.v[i];
}
DEVICE void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::FloatSums sums = emulator::warp_multiply_halves({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    for (int i = 0; i < 4; i++) d[i] += sums.v[i];
}
