// Clamping to [-limit, limit], in place; the gradient is zero where a value was beyond. Launch: any grid and block.
#include "common.cuh"

// beyond (n): 1 where x (n) was clamped.
template <class T>
__device__ void clip_fwd(T* x, uint8_t* beyond, i64 n, float limit) {
    const i64 threads = i64(gridDim.x) * blockDim.x;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads) {
        const float v = to_float(x[i]);
        beyond[i] = fabsf(v) > limit;
        if (beyond[i]) x[i] = from_float<T>(v > 0.0f ? limit : -limit);
    }
}

template <class T>
__device__ void clip_bwd(T* d, const uint8_t* beyond, i64 n) {
    const i64 threads = i64(gridDim.x) * blockDim.x;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads)
        if (beyond[i]) d[i] = from_float<T>(0.0f);
}

#define INSTANTIATE(T, type)                                                                                             \
    extern "C" __global__ void clip_fwd_##type(T* x, uint8_t* beyond, i64 n, float limit) { clip_fwd(x, beyond, n, limit); } \
    extern "C" __global__ void clip_bwd_##type(T* d, const uint8_t* beyond, i64 n) { clip_bwd(d, beyond, n); }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
