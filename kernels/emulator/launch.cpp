// Every kernel of lorry as C++, and the loop that runs their blocks.
#include "../cuda/kernels.cu"
//
#include "fragments.h"

#include <memory>
#include <mutex>
#include <vector>

#if defined(__x86_64__)
// Saves what a function must keep, and goes on where `to` was saved.
asm(R"(
.text
.globl lorry_switch
.type lorry_switch, @function
lorry_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx
.size lorry_switch, .-lorry_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl lorry_switch
.type lorry_switch, %function
lorry_switch:
    sub sp, sp, #176
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #176
    ret
)");
#else
#error "the emulator switches fibres on x86-64 and aarch64 only"
#endif

namespace emulator {

// Blocks are kept for the next launch: their stacks are memory that is warm.
struct Lease {
    static inline std::mutex lock;
    static inline std::vector<std::unique_ptr<Block>> idle;
    std::unique_ptr<Block> block;
    Lease() {
        std::lock_guard<std::mutex> guard(lock);
        if (!idle.empty()) {
            block = std::move(idle.back());
            idle.pop_back();
        } else {
            block.reset(new Block);
        }
        the_block = block.get();
    }
    ~Lease() {
        std::lock_guard<std::mutex> guard(lock);
        idle.push_back(std::move(block));
    }
};

static void fibre_main() {
    Block& b = block();
    b.kernel->enter(b.args);
    b.fibres[b.current].wait = Wait::Done;
    b.alive--;
    yield(b);
    std::abort(); // a fibre that has ended is not run again
}

static void* fresh_stack(char* stack) {
    void** top = (void**)(stack + STACK_BYTES);
#if defined(__x86_64__)
    *--top = nullptr; // where a caller's return address would be
    *--top = (void*)fibre_main;
    for (int i = 0; i < 6; i++) *--top = nullptr;
#else
    top -= 22;
    std::memset(top, 0, 176);
    top[11] = (void*)fibre_main;
#endif
    return top;
}

// Whether any lane of the warp did something.
static bool run_warp(Block& b, int first) {
    bool any = false;
    for (bool more = true; more && !b.fault;) {
        more = false;
        for (int t = first; t < first + 32 && !b.fault; t++) {
            Fibre& fibre = b.fibres[t];
            if (fibre.wait == Wait::Done || fibre.wait == Wait::Block) continue;
            if (fibre.wait == Wait::Warp && b.warps[t >> 5].generation == fibre.generation) continue;
            fibre.wait = Wait::Nothing;
            b.current = t;
            lorry_switch(&b.scheduler, fibre.stack_pointer);
            more = any = true;
        }
    }
    return any;
}

static const char* run_block(Block& b) {
    b.alive = b.threads;
    b.at_barrier = 0;
    b.fault = nullptr;
    for (int t = 0; t < b.threads; t++) b.fibres[t] = {fresh_stack(b.stacks + t * STACK_BYTES), Wait::Nothing, nullptr, 0};
    for (int w = 0; w < b.threads / 32; w++) b.warps[w].generation = b.warps[w].arrived = 0;
    while (b.alive > 0) {
        bool any = false;
        for (int first = 0; first < b.threads; first += 32) any |= run_warp(b, first);
        if (b.fault) return b.fault;
        if (b.at_barrier > 0 && b.at_barrier == b.alive) {
            b.at_barrier = 0;
            for (int t = 0; t < b.threads; t++)
                if (b.fibres[t].wait == Wait::Block) b.fibres[t].wait = Wait::Nothing;
        } else if (!any) {
            return "a barrier or warp function is not reached by all threads";
        }
    }
    return nullptr;
}

} // namespace emulator

// Runs blocks first..last (in order of x, then y, then z) of a launch on the calling thread. Returns null, or what went wrong.
extern "C" const char* lorry_emulator_launch(const char* name, const unsigned* grid, size_t first, size_t last, const void* args,
                                             size_t argument_bytes) {
    using namespace emulator;
    const Kernel* kernel = kernels;
    while (kernel && std::strcmp(kernel->name, name)) kernel = kernel->next;
    if (!kernel) return "there is no such kernel";
    if (kernel->argument_bytes != argument_bytes) return "the arguments have another size than the kernel's";
    Lease lease;
    Block& b = *lease.block;
    b.kernel = kernel;
    b.args = args;
    b.threads = kernel->threads;
    std::memcpy(b.grid, grid, sizeof b.grid);
    for (size_t i = first; i < last; i++) {
        b.index[0] = i % grid[0];
        b.index[1] = i / grid[0] % grid[1];
        b.index[2] = i / grid[0] / grid[1];
        if (const char* fault = run_block(b)) return fault;
    }
    return nullptr;
}
