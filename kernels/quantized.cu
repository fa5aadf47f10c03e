// Weights in 8 bits with a scale for each row: the device twin of Codes::Int8 in src/ops/quantized.rs.
//
//     x ≈ q · absmax / 127        the weights of Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339
#include "common.cuh"

// The four codes of a word. Above 128 each is the last byte of a float from 2^23 on: conversions of bytes are a quarter as fast.
__device__ __forceinline__ void floats_of(uint32_t word, float* out) {
    word ^= 0x80808080u;
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + i)) - 8388736.0f;
}

// y (rows, c) = rows first.. of codes (all rows, c). Launch: a block per row.
template <class T>
__device__ void int8_dequantize(const signed char* codes, const float* absmax, T* y, i64 first, int c) {
    constexpr int CODES = 8;  // of a thread at a time
    const i64 row = first + blockIdx.x;
    const float scale = absmax[row] / 127.0f;
    codes += row * c;
    y += i64(blockIdx.x) * c;
    const int wide_cols = reinterpret_cast<uintptr_t>(codes) % CODES == 0 && aligned(y) ? c / CODES * CODES : 0;
    for (int i = threadIdx.x * CODES; i < wide_cols; i += blockDim.x * CODES) {
        const auto words = *reinterpret_cast<const Pack<uint32_t, CODES / 4>*>(codes + i);
        float v[CODES];
        for (int j = 0; j < CODES / 4; ++j) floats_of(words.v[j], v + 4 * j);
        for (int j = 0; j < CODES; ++j) v[j] *= scale;
        store<CODES>(y + i, v);
    }
    for (int i = wide_cols + threadIdx.x; i < c; i += blockDim.x) y[i] = from_float<T>(float(codes[i]) * scale);
}

// A few rows of x, as in decoding: y (n, rows) = or += x (n, cols) Wᵀ for n <= INT8_ROWS. x and y may be parts of wider matrices: their
// rows are `ldx` and `ldy` elements apart. Codes are read once and multiplied as they are; a row's sum, in f32, is scaled in the end.
// Launch: a warp per row of W, blocks of INT8_WARPS.

constexpr int INT8_ROWS = 8;
constexpr int INT8_WARPS = 8;

template <class T>
__device__ void int8_product(const signed char* codes, const float* absmax, const T* x, T* y, int n, int rows, int cols, i64 ldx, i64 ldy,
                             bool accumulate) {
    constexpr int CODES = 16;  // of a lane at a time
    const int lane = threadIdx.x % 32, row = blockIdx.x * INT8_WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    codes += i64(row) * cols;
    float sums[INT8_ROWS] = {};
    const int wide_cols = aligned(codes) && aligned(x) && ldx % WIDE<T> == 0 ? cols / CODES * CODES : 0;
    const auto fetch = [&](int k) { return *reinterpret_cast<const Pack<uint32_t, CODES / 4>*>(codes + min(k, wide_cols - CODES)); };
    Pack<uint32_t, CODES / 4> next{};
    if (wide_cols > 0) next = fetch(lane * CODES);
    for (int k = lane * CODES; k < wide_cols; k += 32 * CODES) {
        const auto words = next;
        next = fetch(k + 32 * CODES);  // while these are multiplied
        float w[CODES];
        for (int i = 0; i < CODES / 4; ++i) floats_of(words.v[i], w + 4 * i);
#pragma unroll
        for (int t = 0; t < INT8_ROWS; ++t) {
            if (t >= n) break;
            float v[CODES];
            load<CODES>(x + t * ldx + k, v);
            for (int i = 0; i < CODES; ++i) sums[t] += w[i] * v[i];
        }
    }
    for (int k = wide_cols + lane; k < cols; k += 32)
        for (int t = 0; t < INT8_ROWS; ++t)
            if (t < n) sums[t] += float(codes[k]) * to_float(x[t * ldx + k]);
    const float scale = absmax[row] / 127.0f;
    for (int t = 0; t < INT8_ROWS; ++t) {
        const float sum = warp_sum(sums[t]) * scale;
        T* out = y + t * ldy + row;
        if (lane == 0 && t < n) *out = from_float<T>(accumulate ? to_float(*out) + sum : sum);
    }
}

#define INSTANTIATE(T, type)                                                                                                \
    extern "C" __global__ void int8_dequantize_##type(const signed char* codes, const float* absmax, T* y, i64 first, int c) { \
        int8_dequantize(codes, absmax, y, first, c);                                                                        \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * INT8_WARPS) int8_product_##type(                                      \
        const signed char* codes, const float* absmax, const T* x, T* y, int n, int rows, int cols, i64 ldx, i64 ldy, int accumulate) { \
        int8_product(codes, absmax, x, y, n, rows, cols, ldx, ldy, accumulate != 0);                                        \
    }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
