// What a linear layer with LoRA does element by element: dropout on the adapter's input, bias, sums, and the casts
// between f32 adapters and the compute type. Its products are cuBLAS's, or for few tokens those of lora_mma.cu.
//
//     y = x Wᵀ + b + (alpha / r) · dropout(x) Aᵀ Bᵀ        Hu et al. 2021, arXiv:2106.09685
//
// Launch: any grid and block, unless noted.
#include "lora.cuh"

template <int N, class T>
__device__ __forceinline__ void dropout_packs(const T* x, T* y, i64 from, i64 to, i64 step, Mask mask, bool accumulate) {
    for (i64 i = from; i < to; i += step) {
        float v[N], old[N];
        load<N>(x + i, v);
        if (accumulate) load<N>(y + i, old);
        for (int j = 0; j < N; ++j) {
            const float kept = v[j] * mask.at(i + j);
            v[j] = accumulate ? old[j] + kept : kept;
        }
        store<N>(y + i, v);
    }
}

// y (n) = or += x · mask. Forward on x, backward on the gradient. y may be x.
template <class T>
__device__ void dropout(const T* x, T* y, i64 n, Mask mask, int accumulate) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
    constexpr int N = WIDE<T>;
    const i64 packed = aligned(x) && aligned(y) ? n / N * N : 0;
    dropout_packs<N>(x, y, thread * N, packed, threads * N, mask, accumulate);
    dropout_packs<1>(x, y, packed + thread, n, threads, mask, accumulate);
}

template <int N, class From, class To>
__device__ __forceinline__ void add_packs(const From* x, To* y, i64 from, i64 to, i64 step, float scale, bool accumulate) {
    for (i64 i = from; i < to; i += step) {
        float v[N], old[N];
        load<N>(x + i, v);
        if (accumulate) load<N>(y + i, old);
        for (int j = 0; j < N; ++j) v[j] = accumulate ? old[j] + scale * v[j] : scale * v[j];
        store<N>(y + i, v);
    }
}

// y (n) = or += scale · x, between any two types. y may be x when the types are the same.
template <class From, class To>
__device__ void add(const From* x, To* y, i64 n, float scale, int accumulate) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
    constexpr int N = WIDE<From> > WIDE<To> ? WIDE<From> : WIDE<To>;
    const i64 packed = aligned(x) && aligned(y) ? n / N * N : 0;
    add_packs<N>(x, y, thread * N, packed, threads * N, scale, accumulate);
    add_packs<1>(x, y, packed + thread, n, threads, scale, accumulate);
}

template <int N, class T>
__device__ __forceinline__ void add_bias_row(T* y, const float* bias, int c) {
    for (int i = threadIdx.x * N; i < c; i += blockDim.x * N) {
        float v[N], b[N];
        load<N>(y + i, v);
        load<N>(bias + i, b);
        for (int j = 0; j < N; ++j) v[j] += b[j];
        store<N>(y + i, v);
    }
}

// Row blockIdx.x of y (rows, c), `ld` apart, += bias (c), which is f32.
template <class T>
__device__ void add_bias(T* y, const float* bias, int c, i64 ld) {
    const bool in_packs = wide<T>(c, ld) && aligned(y) && aligned(bias);
    y += blockIdx.x * ld;
    if (in_packs)
        add_bias_row<WIDE<T>>(y, bias, c);
    else
        add_bias_row<1>(y, bias, c);
}

#define INSTANTIATE(T, type)                                                                                            \
    extern "C" __global__ void dropout_##type(const T* x, T* y, i64 n, uint64_t seed, uint32_t limit,                     \
                                              float scale, int accumulate) {                                            \
        dropout(x, y, n, Mask{seed, limit, scale}, accumulate);                                                   \
    }                                                                                                                   \
    extern "C" __global__ void add_##type(const T* x, T* y, i64 n, float scale, int accumulate) {                       \
        add(x, y, n, scale, accumulate);                                                                                \
    }                                                                                                                   \
    extern "C" __global__ void add_bias_##type(T* y, const float* bias, int c, i64 ld) { add_bias(y, bias, c, ld); }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE

// Adapters are f32: down to the compute type before a product, and gradients back up.
#define INSTANTIATE(T, type)                                                                                            \
    extern "C" __global__ void add_f32_to_##type(const float* x, T* y, i64 n, float scale, int accumulate) {            \
        add(x, y, n, scale, accumulate);                                                                                \
    }                                                                                                                   \
    extern "C" __global__ void add_##type##_to_f32(const T* x, float* y, i64 n, float scale, int accumulate) {          \
        add(x, y, n, scale, accumulate);                                                                                \
    }
INSTANTIATE(__nv_bfloat16, bf16)
INSTANTIATE(__half, f16)
#undef INSTANTIATE
