// Weights in 8 bits with a scale for each row: the device twin of Codes::Int8 in src/ops/quantized.rs.
//
//     x ≈ q · absmax / 127        the weights of Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339
//
// Launch: a block per row.
#include "common.cuh"

// y (rows, c) = rows first.. of codes (all rows, c).
template <class T>
__device__ void int8_dequantize(const signed char* codes, const float* absmax, T* y, i64 first, int c) {
    const i64 row = first + blockIdx.x;
    const float scale = absmax[row] / 127.0f;
    codes += row * c;
    y += i64(blockIdx.x) * c;
    for (int i = threadIdx.x; i < c; i += blockDim.x) y[i] = from_float<T>(float(codes[i]) * scale);
}

#define INSTANTIATE(T, type)                                                                                                \
    extern "C" __global__ void int8_dequantize_##type(const signed char* codes, const float* absmax, T* y, i64 first, int c) { \
        int8_dequantize(codes, absmax, y, first, c);                                                                        \
    }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
