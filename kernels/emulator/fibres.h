// CUDA's threads as fibres of the CPU. The threads of a block take turns on one system thread; what a warp or a block does
// together happens once all its threads have come. A barrier or warp function that some threads miss, and one that threads of
// a warp enter at different calls, ends the launch with a message.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define DEVICE static inline __attribute__((always_inline))
#define SHARED alignas(16) static thread_local
#define CONSTANT static const
#define __restrict__ __restrict
#define KERNEL(name, Arguments, THREADS, ...)                                                                  \
    static void name(const Arguments& args);                                                                   \
    static void enter_##name(const void* args) { name(*(const Arguments*)args); }                              \
    static emulator::Registration register_##name(#name, enter_##name, sizeof(Arguments), THREADS);            \
    static void name(const Arguments& args)

namespace emulator {

constexpr int MAX_THREADS = 1024;
// Not a power of two: the tops of all stacks must not fall into the same lines of the cache.
constexpr size_t STACK_BYTES = (32 << 10) + 9 * 64;

struct Kernel {
    const char* name;
    void (*enter)(const void*);
    size_t argument_bytes;
    int threads;
    Kernel* next;
};
inline Kernel* kernels = nullptr;
struct Registration {
    Kernel kernel;
    Registration(const char* name, void (*enter)(const void*), size_t bytes, int threads)
        : kernel{name, enter, bytes, threads, kernels} { kernels = &kernel; }
};

// Where a fibre goes on: its stack pointer, everything else lies on the stack.
extern "C" void lorry_switch(void** save, void* to);

enum class Wait : int { Nothing, Warp, Block, Done };

struct Fibre {
    void* stack_pointer;
    Wait wait;
    const void* place; // of the warp function it waits in
    unsigned generation;
};

struct Warp {
    unsigned generation; // of warp functions completed
    int arrived;
    int alive;
    alignas(16) char in[32][32];
    alignas(16) char out[32][32];
};

// One block at a time on each system thread.
struct Block {
    Fibre fibres[MAX_THREADS];
    Warp warps[MAX_THREADS / 32];
    void* scheduler;
    char* stacks;
    int current, threads, alive, at_barrier;
    unsigned barriers;
    unsigned index[3], grid[3];
    const Kernel* kernel;
    const void* args;
    const char* fault;
    Block() : stacks((char*)std::aligned_alloc(4096, MAX_THREADS * STACK_BYTES)) {}
    ~Block() { std::free(stacks); }
};
inline thread_local Block* the_block = nullptr;
inline Block& block() { return *the_block; }

inline void yield(Block& b) { lorry_switch(&b.fibres[b.current].stack_pointer, b.scheduler); }

// Waits until the warp has come and `together` has run once, with every lane's input in `in`.
template <typename In, typename Out, typename Together>
__attribute__((always_inline)) inline Out meet_warp(const void* place, const In& in, Together together) {
    static_assert(sizeof(In) <= 32 && sizeof(Out) <= 32, "a lane's slot");
    Block& b = block();
    int lane = b.current & 31;
    Warp& warp = b.warps[b.current >> 5];
    Fibre& fibre = b.fibres[b.current];
    std::memcpy(warp.in[lane], &in, sizeof(In));
    fibre.place = place;
    if (++warp.arrived == 32) {
        int first = b.current & ~31;
        for (int i = 0; i < 32; i++)
            if (b.fibres[first + i].place != place) b.fault = "the threads of a warp are in different warp functions";
        together(warp);
        warp.arrived = 0;
        warp.generation++;
    } else {
        fibre.wait = Wait::Warp;
        fibre.generation = warp.generation;
        yield(b);
    }
    Out out;
    std::memcpy(&out, warp.out[lane], sizeof(Out));
    return out;
}

inline void meet_block() {
    Block& b = block();
    b.fibres[b.current].wait = Wait::Block;
    b.at_barrier++;
    yield(b);
}

} // namespace emulator

DEVICE i32 thread_index() { return emulator::block().current; }
DEVICE i32 block_x() { return emulator::block().index[0]; }
DEVICE i32 block_y() { return emulator::block().index[1]; }
DEVICE i32 block_z() { return emulator::block().index[2]; }
DEVICE i32 grid_x() { return emulator::block().grid[0]; }
DEVICE i32 grid_y() { return emulator::block().grid[1]; }
DEVICE void sync_block() { emulator::meet_block(); }

template <typename T> __attribute__((noinline)) static T lane_value(T v, i32 source) {
    struct In { T v; i32 source; };
    return emulator::meet_warp<In, T>((void*)lane_value<T>, In{v, source}, [](emulator::Warp& w) {
        for (int i = 0; i < 32; i++) {
            In in;
            std::memcpy(&in, w.in[i], sizeof in);
            std::memcpy(w.out[i], w.in[in.source & 31], sizeof(T));
        }
    });
}
DEVICE void sync_warp() { lane_value<i32>(0, 0); }
DEVICE f32 shuffle(f32 v, i32 lane) { return lane_value<f32>(v, lane); }
DEVICE i32 shuffle(i32 v, i32 lane) { return lane_value<i32>(v, lane); }
DEVICE f32 shuffle_xor(f32 v, i32 mask) { return lane_value<f32>(v, (thread_index() & 31) ^ mask); }
DEVICE i32 shuffle_xor(i32 v, i32 mask) { return lane_value<i32>(v, (thread_index() & 31) ^ mask); }
__attribute__((noinline)) static i32 warp_sum(i32 v) {
    return emulator::meet_warp<i32, i32>((void*)(i32 (*)(i32))warp_sum, v, [](emulator::Warp& w) {
        i32 sum = 0;
        for (int i = 0; i < 32; i++) {
            i32 in;
            std::memcpy(&in, w.in[i], sizeof in);
            sum += in;
        }
        for (int i = 0; i < 32; i++) std::memcpy(w.out[i], &sum, sizeof sum);
    });
}
__attribute__((noinline)) static u32 ballot(bool v) {
    return emulator::meet_warp<bool, u32>((void*)ballot, v, [](emulator::Warp& w) {
        u32 bits = 0;
        for (int i = 0; i < 32; i++) bits |= (u32)*(const bool*)w.in[i] << i;
        for (int i = 0; i < 32; i++) std::memcpy(w.out[i], &bits, sizeof bits);
    });
}
DEVICE i32 count_bits(u32 v) { return __builtin_popcount(v); }

DEVICE f32 as_f32(u32 bits) { f32 f; std::memcpy(&f, &bits, 4); return f; }
DEVICE u32 as_u32(f32 f) { u32 bits; std::memcpy(&bits, &f, 4); return bits; }
#if defined(__F16C__)
DEVICE f32 to_f32(f16 h) { return _cvtsh_ss(h); }
DEVICE f16 to_f16(f32 f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
DEVICE f32 to_f32(f16 h) {
    u32 sign = (u32)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) return as_f32(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Scaling by 2^112 gives subnormals their exponent too.
    f32 f = as_f32(magnitude << 13) * as_f32(0x77800000u);
    return as_f32(sign | as_u32(f));
}
DEVICE f16 to_f16(f32 f) {
    u32 bits = as_u32(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (f16)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (f16)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) return (f16)(sign | (as_u32(as_f32(magnitude) + 0.5f) - 0x3f000000u));
    return (f16)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}
#endif
DEVICE u32 to_f16x2(f32 low, f32 high) { return to_f16(low) | (u32)to_f16(high) << 16; }
DEVICE u32 multiply_f16x2(u32 a, u32 b) {
    return to_f16x2(to_f32((f16)a) * to_f32((f16)b), to_f32((f16)(a >> 16)) * to_f32((f16)(b >> 16)));
}
template <i32 FIRST> DEVICE u32 bytes_to_f16x2(u32 bytes) {
    i32 first = bytes >> (FIRST * 8) & 255, second = bytes >> (FIRST * 8 + 8) & 255;
    return to_f16x2((f32)(first - 128), (f32)(second - 128));
}
DEVICE f32 square_root(f32 f) { return std::sqrt(f); }
DEVICE f32 divide(f32 a, f32 b) { return a / b; }
DEVICE f32 round_even(f32 f) { return std::nearbyintf(f); }
using std::fmaf;
DEVICE i32 opaque(i32 v) { return v; }

DEVICE void copy_async(void* shared, const void* global) { std::memcpy(shared, global, 16); }
DEVICE void copies_commit() {}
template <i32 PENDING> DEVICE void copies_wait() {}
struct alignas(8) Words2 { u32 v[2]; };
struct alignas(16) Words4 { u32 v[4]; };
DEVICE Words4 load_stream(const Words4* p) { return *p; }
DEVICE Words2 load_stream(const Words2* p) { return *p; }
