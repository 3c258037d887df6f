// One source for two compilers. Under NVRTC this is CUDA; under a C++ compiler the same kernels run on the CPU, every CUDA
// thread a fibre (../emulator/fibres.h), so that they can be proven where there is no GPU.
//
// Rules for kernels: every barrier and every warp function is reached by all threads of its block or warp; a product that is
// rounded once is written fmaf, since the compilers contract nothing by themselves; no function of a math library but those
// below, so that both worlds round alike.
#pragma once

#ifdef __CUDACC_RTC__
typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
#else
#include <cstdint>
typedef int8_t i8;
typedef uint8_t u8;
typedef int16_t i16;
typedef uint16_t u16;
typedef int32_t i32;
typedef uint32_t u32;
typedef int64_t i64;
typedef uint64_t u64;
#endif
typedef float f32;
typedef u16 f16;  // the bits of an IEEE half
typedef u16 bf16; // the bits of a bfloat16

#ifdef __CUDACC_RTC__

// A kernel takes one structure of arguments by value. After it: the size of its blocks in threads; and, where the compiler
// would rather spill registers than have fewer at once, how many of them a multiprocessor holds.
#define KERNEL(name, Arguments, ...) \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Arguments args)
#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define CONSTANT __constant__

DEVICE i32 thread_index() { return threadIdx.x; }
DEVICE i32 block_x() { return blockIdx.x; }
DEVICE i32 block_y() { return blockIdx.y; }
DEVICE i32 block_z() { return blockIdx.z; }
DEVICE i32 grid_x() { return gridDim.x; }
DEVICE i32 grid_y() { return gridDim.y; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE f32 shuffle(f32 v, i32 lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE i32 shuffle(i32 v, i32 lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE f32 shuffle_xor(f32 v, i32 mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE i32 shuffle_xor(i32 v, i32 mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE i32 warp_sum(i32 v) { return __reduce_add_sync(0xffffffffu, v); }
// A bit for each lane.
DEVICE u32 ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
DEVICE i32 count_bits(u32 v) { return __popc(v); }

DEVICE f32 to_f32(f16 h) { f32 f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE f16 to_f16(f32 f) { f16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE u32 to_f16x2(f32 low, f32 high) { u32 h; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(high), "f"(low)); return h; }
DEVICE u32 multiply_f16x2(u32 a, u32 b) { u32 p; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(p) : "r"(a), "r"(b)); return p; }
// Two bytes, from byte FIRST of four on, less 128 as halves: 0x6400 + byte are the bits of 1024 + byte.
template <i32 FIRST> DEVICE u32 bytes_to_f16x2(u32 bytes) {
    u32 h;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(h) : "r"(__byte_perm(bytes, 0x64646464u, FIRST == 0 ? 0x4140 : 0x4342)), "r"(0x64806480u));
    return h;
}
DEVICE f32 as_f32(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_u32(f32 f) { return __float_as_uint(f); }
DEVICE f32 square_root(f32 f) { return __fsqrt_rn(f); }
DEVICE f32 divide(f32 a, f32 b) { return __fdiv_rn(a, b); }
DEVICE f32 round_even(f32 f) { return rintf(f); }
// The same number, of which the compiler knows nothing: what is computed from it is computed here and not kept in registers.
DEVICE i32 opaque(i32 v) { asm volatile("" : "+r"(v)); return v; }

// d += a · b over 32 (16) bytes: a is 16 rows of unsigned weights, b is 8 columns of signed activations. Which lane holds what:
// PTX ISA, "Matrix Fragments for mma.m16n8k32" (and k16) "with .u8/.s8"; model in ../emulator/mma.h.
DEVICE void mma_u8s8(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_u8s8_k16(i32 (&d)[4], u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(b));
}
// d += a · b in f16 with f32 sums, 16 rows, 8 columns, 16 deep: "Matrix Fragments for mma.m16n8k16 with floating point type".
DEVICE void mma_f16(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from device memory to shared memory, in the background; both addresses are multiples of 16.
DEVICE void copy_async(void* shared, const void* global) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING committed groups of this thread are under way. A barrier must follow before others read.
template <i32 PENDING> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

struct alignas(8) Words2 { u32 v[2]; };
struct alignas(16) Words4 { u32 v[4]; };
// Weights are read once a step: they must not push out what is read again.
DEVICE Words4 load_stream(const Words4* p) {
    Words4 w;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3]) : "l"(p));
    return w;
}
DEVICE Words2 load_stream(const Words2* p) {
    Words2 w;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(w.v[0]), "=r"(w.v[1]) : "l"(p));
    return w;
}

#else
#include "fibres.h"
#include "mma.h"
#endif

DEVICE i32 lane_index() { return thread_index() & 31; }
DEVICE i32 warp_index() { return thread_index() >> 5; }
DEVICE f32 maximum(f32 a, f32 b) { return a > b ? a : b; }
DEVICE i32 minimum(i32 a, i32 b) { return a < b ? a : b; }
DEVICE f32 absolute(f32 f) { return as_f32(as_u32(f) & 0x7fffffffu); }
DEVICE f32 minus_infinity() { return as_f32(0xff800000u); }
DEVICE f32 bf16_to_f32(bf16 b) { return as_f32((u32)b << 16); }

// Sums and maxima over a warp by halves: one order, the same result in every lane.
DEVICE f32 warp_sum(f32 v) {
    for (i32 mask = 16; mask > 0; mask >>= 1) v += shuffle_xor(v, mask);
    return v;
}
DEVICE f32 warp_max(f32 v) {
    for (i32 mask = 16; mask > 0; mask >>= 1) v = maximum(v, shuffle_xor(v, mask));
    return v;
}
DEVICE i32 warp_max(i32 v) {
    for (i32 mask = 16; mask > 0; mask >>= 1) {
        i32 other = shuffle_xor(v, mask);
        v = v > other ? v : other;
    }
    return v;
}
// The largest magnitude in a warp; not a number if one is none, whose bits are greater than those of any number.
DEVICE f32 warp_max_magnitude(f32 v) { return as_f32((u32)warp_max((i32)as_u32(absolute(v)))); }

// e^x within 2 units in the last place for -87..=88, clamped to that range: as `Simd::exp` of the CPU kernels (Cephes expf).
DEVICE f32 exponential(f32 x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    f32 n = round_even(x * 1.44269504f);
    f32 r = fmaf(n, -0.6933594f, x);
    r = fmaf(n, 2.1219444e-4f, r);
    f32 p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3982e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 5e-1f);
    f32 y = fmaf(p, r * r, r + 1.0f);
    return y * as_f32((u32)((i32)n + 127) << 23);
}

DEVICE f32 sigmoid(f32 x) { return divide(1.0f, 1.0f + exponential(-x)); }
DEVICE f32 hyperbolic_tangent(f32 x) { return 1.0f - divide(2.0f, 1.0f + exponential(x + x)); }
