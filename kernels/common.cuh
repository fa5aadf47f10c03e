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

// --- Which keys a query sees (attention.cu, attention_mma.cu) ---

// The first key that query `row` sees; the last is `row + offset`. Does not decrease with `row`.
// `segment_start` (null: all 0) is where each query's sample starts, `window` (0: none) counts the query itself.
__device__ __forceinline__ int first_key(const int* segment_start, int row, int offset, int window) {
    const int start = segment_start ? segment_start[row] : 0;
    return window > 0 ? max(start, row + offset - window + 1) : start;
}

// cap · tanh(s / cap), the soft cap on scores and logits (Gemma 2, arXiv:2408.00118); 0 stands for no cap.
__device__ __forceinline__ float soft_capped(float s, float cap) { return cap > 0.0f ? cap * tanhf(s / cap) : s; }

// Its derivative, from the capped value.
__device__ __forceinline__ float soft_cap_slope(float capped, float cap) {
    if (cap <= 0.0f) return 1.0f;
    const float t = capped / cap;
    return 1.0f - t * t;
}
