// Runs CUDA C++ kernels on the CPU, so that their indexing, reductions and barriers are tested without a GPU.
//
// A thread is a fiber. The blocks of a grid run one after another; the threads of a block take turns and hand over at
// barriers and warp exchanges, which are checked: every live thread must stand at the same source line, else the run
// stops with both lines. The order of threads, warps and blocks changes with `emulate::seed`, so that a missing barrier
// shows as a result that changes. Dynamic shared memory is NaN before every block and has a guarded end (static shared memory
// keeps what the last block left). Asynchronous copies land when they are waited for, not before. Matrix products of
// the tensor cores (`mma_16x8x16`, `load_matrices`) follow the fragment layouts of the PTX manual. Not covered:
// streams, clusters, memory ordering, speed but for the banks of `load_matrices`. Included by common.cuh when EMULATE is defined; C++17, -O1.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one at a time, so a block's shared memory may be static.
#define __shared__ static
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulate::dynamic_shared())

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
    uint32_t u = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {  // round to nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return {uint16_t((u >> 16) | 0x40)};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

// Half precision by arithmetic: not every compiler has _Float16 in C++.
struct __half {
    uint16_t bits;
};
inline float __half2float(__half v) {
    const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    float f = exponent == 31 ? (mantissa ? NAN : INFINITY)
              : exponent     ? std::ldexp(float(mantissa + 1024), exponent - 25)
                             : std::ldexp(float(mantissa), -24);
    return v.bits & 0x8000 ? -f : f;
}
inline __half __float2half(float f) {  // round to nearest, ties to even
    const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    if (std::isnan(f)) return {0x7fff};
    const float size = std::fabs(f);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    if (size == 0.0f) return {sign};
    // One unit in the last place is 2^(exponent - 11), or 2^-24 for denormals; a carry moves into the exponent field.
    const int exponent = std::max(std::ilogb(size), -14);
    const int steps = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return {uint16_t(sign | (((exponent + 14) << 10) + steps))};
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __uint_as_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int atomicAdd(int* at, int by) { return std::exchange(*at, *at + by); }
inline float __ldcg(const float* at) { return *at; }
inline void __threadfence() {}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t bytes = low | uint64_t(high) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= uint32_t(bytes >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
using std::max;
using std::min;

namespace emulate {

inline unsigned seed = 0;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Thread {
    ucontext_t context;
    jmp_buf resume;
    State state = State::ready;
    int line = 0;
    dim3 index;
    std::unique_ptr<char[]> stack;
    std::vector<std::vector<Copy>> copies;  // groups of asynchronous copies; the last is open
};

// What a block's threads run on. They outlive it: making them takes longer than most kernels.
inline std::vector<Thread> fibers(1024);

struct Block {
    size_t n = 0;
    std::vector<uint64_t> slots;  // one per thread: what a warp exchanges
    std::vector<char> dynamic_shared;
    ucontext_t scheduler_context;
    jmp_buf scheduler;
    size_t current = 0;
    const std::function<void()>* kernel = nullptr;
};
inline Block* block = nullptr;

inline void* dynamic_shared() { return block->dynamic_shared.data(); }

// Fibers are started by swapcontext, and from then on switched by _setjmp: it makes no system call.
inline void wait(State at, int line) {
    Thread& me = fibers[block->current];
    me.state = at;
    me.line = line;
    if (!_setjmp(me.resume)) _longjmp(block->scheduler, 1);
}

// One thread after another; each begins where the fiber is resumed.
inline void enter() {
    for (;;) {
        (*block->kernel)();
        wait(State::done, 0);
    }
}

inline void resume(size_t t) {
    constexpr size_t stack_bytes = 64 * 1024;
    Thread& thread = fibers[t];
    block->current = t;
    threadIdx = thread.index;
    if (_setjmp(block->scheduler)) return;
    if (thread.stack) _longjmp(thread.resume, 1);
    thread.stack.reset(new char[stack_bytes]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = stack_bytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    swapcontext(&block->scheduler_context, &thread.context);
}

// Lets the threads [from, to) past their barrier when all that live are there.
inline bool release(State at, size_t from, size_t to) {
    int line = 0;
    for (size_t t = from; t < to; ++t) {
        const Thread& thread = fibers[t];
        if (thread.state == State::done) continue;
        if (thread.state != at) return false;
        if (line && line != thread.line) {
            std::fprintf(stderr, "emulate: threads wait at different barriers, lines %d and %d\n", line, thread.line);
            std::abort();
        }
        line = thread.line;
    }
    if (!line) return false;
    for (size_t t = from; t < to; ++t)
        if (fibers[t].state == at) fibers[t].state = State::ready;
    return true;
}

inline void start_threads() {
    for (size_t t = 0; t < block->n; ++t) {
        Thread& thread = fibers[t];
        thread.state = State::ready;
        if (thread.copies.size() != 1 || !thread.copies[0].empty()) thread.copies.assign(1, {});
        thread.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    }
}

// Runs every ready thread of [from, to) once; whether there was any.
inline bool run_ready(size_t from, size_t to, std::mt19937& rng) {
    size_t order[warpSize];
    std::iota(order, order + (to - from), from);
    if (seed) std::shuffle(order, order + (to - from), rng);
    bool moved = false;
    for (size_t i = 0; i < to - from; ++i) {
        const size_t t = order[i];
        if (fibers[t].state != State::ready) continue;
        resume(t);
        moved = true;
    }
    return moved;
}

// Even seeds keep the warps in step from one exchange to the next. Odd seeds let each run as far ahead of the others as
// the block's barriers allow, in a random order: the two show different races.
inline void run_block(std::mt19937& rng) {
    start_threads();
    const size_t n = block->n;
    std::vector<size_t> warps;
    for (size_t from = 0; from < n; from += warpSize) warps.push_back(from);
    for (bool moved = true; moved;) {
        moved = false;
        if (seed) std::shuffle(warps.begin(), warps.end(), rng);
        for (size_t from : warps) {
            const size_t to = std::min(n, from + warpSize);
            do moved |= run_ready(from, to, rng);
            while (release(State::at_warp_barrier, from, to) && (moved = true) && seed % 2);
        }
        moved |= release(State::at_block_barrier, 0, n);
    }
    for (size_t t = 0; t < n; ++t)
        if (fibers[t].state != State::done) {
            std::fprintf(stderr, "emulate: a thread waits for ever at line %d\n", fibers[t].line);
            std::abort();
        }
}

inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
    constexpr size_t guard_bytes = 4096;
    Block storage;
    const size_t n = size_t(threads.x) * threads.y * threads.z;
    storage.n = n;
    if (n > fibers.size()) {
        std::fprintf(stderr, "emulate: a block of %zu threads\n", n);
        std::abort();
    }
    storage.slots.resize(n);
    storage.kernel = &kernel;
    block = &storage;
    gridDim = grid;
    blockDim = threads;
    std::mt19937 rng(seed);
    const size_t blocks = size_t(grid.x) * grid.y * grid.z;
    std::vector<size_t> order(seed ? blocks : 0);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    for (size_t i = 0; i < blocks; ++i) {
        const size_t b = seed ? order[i] : i;
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        storage.dynamic_shared.assign(shared_bytes + guard_bytes, char(0xff));  // NaN in every float type
        run_block(rng);
        for (size_t at = shared_bytes; at < storage.dynamic_shared.size(); ++at)
            if (storage.dynamic_shared[at] != char(0xff)) {
                std::fprintf(stderr, "emulate: dynamic shared memory written at byte %zu of %zu\n", at, shared_bytes);
                std::abort();
            }
    }
    block = nullptr;
}

inline int lane() { return int(block->current % warpSize); }

// Shows every lane's `mine` to `use(read)`, where `read(lane)` is what that lane passed (or `mine` for a lane that is
// not there); no lane goes on before all have looked.
template <class T, class Use>
auto with_warp(const T& mine, int line, Use use) {
    const size_t me = block->current, warp = me / warpSize * warpSize;
    block->slots[me] = uint64_t(reinterpret_cast<uintptr_t>(&mine));
    wait(State::at_warp_barrier, line);
    const auto result = use([&](int from) -> const T& {
        const size_t t = warp + size_t(from);
        if (from < 0 || from >= warpSize || t >= block->slots.size()) return mine;
        return *reinterpret_cast<const T*>(uintptr_t(block->slots[t]));
    });
    wait(State::at_warp_barrier, line);
    return result;
}

template <class T>
T exchange(T value, int source_lane, int line) {
    return with_warp(value, line, [&](auto read) { return read(source_lane); });
}

struct Fragments {
    uint32_t a[4], b[2];
};
struct Product {
    float c[4];
};
inline uint16_t half_of(uint32_t two, int which) { return uint16_t(which ? two >> 16 : two); }
inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
inline float widen(__half v) { return __half2float(v); }

// One lane's part of C (16 x 8) += A (16 x 16) B (16 x 8), "Matrix Fragments for mma.m16n8k16" in the PTX manual.
template <class T>
Product mma(Product c, const Fragments& mine, int line) {
    return with_warp(mine, line, [&](auto read) {
        Product out = c;
        for (int i = 0; i < 4; ++i) {
            const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) {
                const uint32_t a = read(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
                const uint32_t b = read(column * 4 + k % 8 / 2).b[k / 8];
                out.c[i] += widen(T{half_of(a, k % 2)}) * widen(T{half_of(b, k % 2)});
            }
        }
        return out;
    });
}

struct Matrices {
    uint32_t v[4];
};
// ldmatrix.x4: lane l brings the address of row l % 8 of matrix l / 8 and takes two neighbours of every matrix.
inline Matrices load_matrices(const void* row, bool transposed, int line) {
    if (reinterpret_cast<uintptr_t>(row) % 16) {
        std::fprintf(stderr, "emulate: a matrix row that is not aligned to 16 bytes, line %d\n", line);
        std::abort();
    }
    return with_warp(row, line, [&](auto read) {
        Matrices out;
        for (int m = 0; m < 4; ++m) {
            unsigned banks = 0;
            for (int r = 0; r < 8; ++r) banks |= 1u << reinterpret_cast<uintptr_t>(read(m * 8 + r)) / 16 % 8;
            if (banks != 255) {
                std::fprintf(stderr, "emulate: rows of a matrix that lie in the same banks, line %d\n", line);
                std::abort();
            }
            uint16_t two[2];
            for (int i = 0; i < 2; ++i) {
                const int r = transposed ? lane() % 4 * 2 + i : lane() / 4;
                const int c = transposed ? lane() / 4 : lane() % 4 * 2 + i;
                two[i] = static_cast<const uint16_t*>(read(m * 8 + r))[c];
            }
            out.v[m] = two[0] | uint32_t(two[1]) << 16;
        }
        return out;
    });
}

inline void copy_async(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16)) {
        std::fprintf(stderr, "emulate: an asynchronous copy that is not aligned to 16 bytes\n");
        std::abort();
    }
    fibers[block->current].copies.back().push_back({to, from, valid});
}
inline void copy_commit() { fibers[block->current].copies.emplace_back(); }
inline void copy_wait(size_t still_open) {
    auto& groups = fibers[block->current].copies;
    while (groups.size() > still_open + 1) {
        for (const Copy& copy : groups.front()) {
            if (copy.valid)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

}  // namespace emulate

#define __syncthreads() emulate::wait(emulate::State::at_block_barrier, __LINE__)
#define __syncwarp(...) emulate::wait(emulate::State::at_warp_barrier, __LINE__)
#define __shfl_sync(mask, value, source) emulate::exchange(value, int(source), __LINE__)
#define __shfl_xor_sync(mask, value, bits) emulate::exchange(value, emulate::lane() ^ int(bits), __LINE__)
