// What every kernel file shares: element types, wide loads and stores, reductions over a warp and a block.
//
// Kernels are templates over the activation type, instantiated for f32, bf16 and f16 by FOR_EACH_TYPE and named
// `rms_norm_fwd_bf16`. Sums are f32 whatever the type; each result is rounded once, when stored. Offsets are 64 bit.
// Sizes are arbitrary: a kernel takes 16 bytes at a time where sizes and addresses allow, else single elements.
// With EMULATE defined the same sources compile for the host (emulate/emulate.h), which is how they are tested.
#pragma once

#ifdef EMULATE
#include "emulate/emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

typedef long long i64;

#define FOR_EACH_TYPE(INSTANTIATE) \
    INSTANTIATE(float, f32)        \
    INSTANTIATE(__nv_bfloat16, bf16) \
    INSTANTIATE(__half, f16)

constexpr unsigned ALL_LANES = 0xffffffffu;
#define MINUS_INFINITY __uint_as_float(0xff800000u)
#define NOT_A_NUMBER __uint_as_float(0x7fc00000u)

// --- Element types ---

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
    return __float2half(v);
}

// --- Several elements at a time ---

// Elements in 16 bytes, the widest load that a thread can make.
template <class T>
constexpr int WIDE = 16 / int(sizeof(T));

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

template <int N, class T>
__device__ __forceinline__ void load(const T* p, float (&out)[N]) {
    constexpr int STEP = N < WIDE<T> ? N : WIDE<T>;
    for (int i = 0; i < N; i += STEP) {
        const Pack<T, STEP> pack = *reinterpret_cast<const Pack<T, STEP>*>(p + i);
        for (int j = 0; j < STEP; ++j) out[i + j] = to_float(pack.v[j]);
    }
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&in)[N]) {
    constexpr int STEP = N < WIDE<T> ? N : WIDE<T>;
    for (int i = 0; i < N; i += STEP) {
        Pack<T, STEP> pack;
        for (int j = 0; j < STEP; ++j) pack.v[j] = from_float<T>(in[i + j]);
        *reinterpret_cast<Pack<T, STEP>*>(p + i) = pack;
    }
}

// Whether a pointer may be read 16 bytes at a time; a null pointer may, as nobody reads it.
__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows of `n` elements, `ld` apart, can be read 16 bytes at a time from an aligned pointer.
template <class T>
__device__ __forceinline__ bool wide(i64 n, i64 ld) {
    return n % WIDE<T> == 0 && ld % WIDE<T> == 0;
}

// --- Reductions ---

__device__ __forceinline__ float warp_sum(float v) {
    for (int by = 16; by > 0; by >>= 1) v += __shfl_xor_sync(ALL_LANES, v, by);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int by = 16; by > 0; by >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, by));
    return v;
}

// Sum over a one-dimensional block of whole warps; every thread gets it. The order of additions is fixed.
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float sums[32];
    v = warp_sum(v);
    __syncthreads();  // the last reduction's result may still be being read
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f);
}

__device__ __forceinline__ float block_max(float v) {
    __shared__ float maxima[32];
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_max(threadIdx.x % 32 < blockDim.x / 32 ? maxima[threadIdx.x % 32] : MINUS_INFINITY);
}

// --- Sums that several blocks share ---

// Whether this block is the last of `shares` that are done, for which `done` counts from zero, and is zero again in the end. The last one
// sees what the threads of the others wrote before; what it reads of it goes past the first-level cache (__ldcg). All threads call it.
__device__ __forceinline__ bool is_last_share(int* done, unsigned shares) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(done, 1) + 1 == int(shares);
        if (is_last) *done = 0;
    }
    __syncthreads();
    if (is_last) __threadfence();
    return is_last;
}

// --- Which keys a query sees (attention.cu, attention_mma.cu) ---

// The first key of its own that query `row` sees; the last is `row + offset`. Does not decrease with `row`.
// `segment_start` (null: all 0) is where each query's sample starts, `window` (0: none) counts the query itself.
__device__ __forceinline__ int first_key(const int* segment_start, int row, int offset, int window) {
    const int start = segment_start ? segment_start[row] : 0;
    return window > 0 ? max(start, row + offset - window + 1) : start;
}

// The keys that a query sees: some of its sample's own, and some of the `prefix` first ones, with which all samples begin.
struct Seen {
    int from, last, prefix_from, prefix;

    // Without branches: there are as many of these as scores.
    __device__ __forceinline__ bool has(int key) const {
        return (key <= last) & ((key >= from) | ((key < prefix) & (key >= prefix_from)));
    }

    // Whether `count` keys are all its sample's own; those of the prefix do not count.
    __device__ __forceinline__ bool has_all(int first, int count) const { return first >= from && first + count - 1 <= last; }
};

__device__ __forceinline__ Seen seen_by(const int* segment_start, int row, int tokens, int offset, int prefix, int window) {
    if (row >= tokens) return {0, -1, 0, 0};
    const int start = segment_start && prefix > 0 ? segment_start[row] : prefix, position = prefix + row + offset - start;
    return {first_key(segment_start, row, offset, window), row + offset, window > 0 ? max(0, position - window + 1) : 0, prefix};
}

// What `count` queries from `row` on all see of their own; nothing where one of them is not there.
__device__ __forceinline__ Seen seen_by_all(const int* segment_start, int row, int count, int tokens, int offset, int window) {
    if (row + count > tokens) return {0, -1, 0, 0};
    return {first_key(segment_start, row + count - 1, offset, window), row + offset, 0, 0};
}

// The tile of keys after the one at `key`, for queries that see of their own none before the tile at `begin`.
__device__ __forceinline__ int next_tile(int key, int tile, int prefix, int begin) {
    key += tile;
    return key >= prefix && key < begin ? begin : key;
}

// cap · tanh(s / cap), the soft cap on scores and logits (Gemma 2, arXiv:2408.00118); 0 stands for no cap.
__device__ __forceinline__ float soft_capped(float s, float cap) { return cap > 0.0f ? cap * tanhf(s / cap) : s; }

// Its derivative, from the capped value.
__device__ __forceinline__ float soft_cap_slope(float capped, float cap) {
    if (cap <= 0.0f) return 1.0f;
    const float t = capped / cap;
    return 1.0f - t * t;
}

// --- Tensor cores and asynchronous copies (sm_80 and later) ---

// Two values as the 32 bits that a fragment holds, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
    union {
        Pack<T, 2> two;
        uint32_t bits;
    } u;
    u.two = Pack<T, 2>{{from_float<T>(low), from_float<T>(high)}};
    return u.bits;
}

#ifdef EMULATE
template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const emulate::Product out =
        emulate::mma<T>({{c[0], c[1], c[2], c[3]}}, {{a[0], a[1], a[2], a[3]}, {b0, b1}}, __LINE__);
    for (int i = 0; i < 4; ++i) c[i] = out.c[i];
}
template <bool transposed>
void load_matrices(uint32_t (&out)[4], const void* row) {
    const emulate::Matrices m = emulate::load_matrices(row, transposed, __LINE__);
    for (int i = 0; i < 4; ++i) out[i] = m.v[i];
}
inline Pack<uint32_t, 4> load_shared(const void* shared) { return *static_cast<const Pack<uint32_t, 4>*>(shared); }
inline void copy_async(void* shared, const void* global, bool valid) { emulate::copy_async(shared, global, valid); }
inline void copy_async_if(bool wanted, void* shared, const void* global, bool valid) {
    if (wanted) emulate::copy_async(shared, global, valid);
}
inline void copy_commit() { emulate::copy_commit(); }
inline void copy_wait() { emulate::copy_wait(0); }
#else
// c (16 x 8, f32) += a (16 x 16) b (16 x 8), held by a warp in the fragments of mma.m16n8k16.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices from shared memory: lane l brings the address of row l % 8 of matrix l / 8, 16-byte aligned.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
    if (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address)
                     : "memory");
}

// 16 bytes of shared memory, read here and not where they are first used: what stands between hides the time that it takes.
__device__ __forceinline__ Pack<uint32_t, 4> load_shared(const void* shared) {
    Pack<uint32_t, 4> out;
    asm volatile("ld.volatile.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.v[0]), "=r"(out.v[1]), "=r"(out.v[2]), "=r"(out.v[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(shared)))
                 : "memory");
    return out;
}

// 16 bytes into shared memory without passing through registers; zeros where not `valid`, when nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// The same where it is wanted, without a branch, which would part the copies of a thread.
__device__ __forceinline__ void copy_async_if(bool wanted, void* shared, const void* global, bool valid) {
    asm volatile(
        "{ .reg .pred wanted; setp.ne.u32 wanted, %3, 0; @wanted cp.async.cg.shared.global [%0], [%1], 16, %2; }" ::"r"(
            uint32_t(__cvta_generic_to_shared(shared))),
        "l"(global), "r"(valid ? 16 : 0), "r"(uint32_t(wanted))
        : "memory");
}
// Ends a group of copies; copy_wait waits for all groups of this thread. Other threads' copies need a barrier after it.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }
#endif
