// NF4 and FP4 weights in blocks of 64, with plain or doubly quantized scales: the device twin of src/ops/nf4.rs, which
// describes the format, and equal to it bit for bit (but for the mean below). Products and sums are rounded apart (__fmul_rn, __fadd_rn), as a
// fused multiply-add would not be.
//
//     x ≈ level[c] · absmax,   absmax = nested_code[q] · nested_absmax + offset       Dettmers et al. 2023, arXiv:2305.14314
//
// `kind`: 0 NF4, 1 FP4. A first value `first` selects rows (first = row · cols); it may lie within a byte.
// Launch: any grid and a block of whole warps, unless noted.
#include "nf4.cuh"

constexpr float SMALLEST_ABSMAX = 1e-38f;

// Above LIMITS[i] a value gets the level of rank i + 1 or higher: the midpoint as f32 rounds it.
__constant__ float LIMITS[2][15] = {
    {-0.848096371f, -0.610632896f, -0.45999527f, -0.33967942f, -0.234607399f, -0.137911737f, -0.0455250181f, 0.0397901498f,
     0.120255247f, 0.203521252f, 0.292013764f, 0.389312536f, 0.501663446f, 0.64278692f, 0.861478448f},
    {-0.833333373f, -0.583333373f, -0.416666687f, -0.291666687f, -0.208333343f, -0.0859375f, -0.00260416674f,
     0.00260416674f, 0.0859375f, 0.208333343f, 0.291666687f, 0.416666687f, 0.583333373f, 0.833333373f, 2.0f}};
// Codes by rank; FP4's second zero is never written.
__constant__ uint8_t ASCENDING[2][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                         {11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3, 3}};

__device__ __forceinline__ unsigned nearest_code(float scaled, int kind) {
    int rank = 0;
    for (int i = 0; i < 15; ++i) rank += scaled > LIMITS[kind][i];
    return ASCENDING[kind][rank];
}

// x (n) -> packed (ceil(n / 2)), absmax (ceil(n / 64)). A warp per block of 64, two neighbours a lane.
template <class T>
__device__ void quantize(const T* x, uint8_t* packed, float* absmax, i64 n, int kind) {
    const i64 blocks = (n + QUANT_BLOCK - 1) / QUANT_BLOCK, warps = i64(gridDim.x) * (blockDim.x / 32);
    const int lane = threadIdx.x % 32;
    for (i64 block = i64(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; block < blocks; block += warps) {
        const i64 i = block * QUANT_BLOCK + lane * 2;
        const float a = i < n ? to_float(x[i]) : 0.0f, b = i + 1 < n ? to_float(x[i + 1]) : 0.0f;
        const float largest = warp_max(fmaxf(fabsf(a), fabsf(b)));
        const float inverse = __frcp_rn(fmaxf(largest, SMALLEST_ABSMAX));
        if (lane == 0) absmax[block] = largest;
        if (i < n)
            packed[i / 2] =
                uint8_t(nearest_code(__fmul_rn(a, inverse), kind) << 4 | nearest_code(__fmul_rn(b, inverse), kind));
    }
}

// offset[0] = mean of absmax (n), summed in f64. The CPU sums in f32 in torch's order, so the last bits may differ; what
// is stored decodes the same either way. One block of 256 threads.
extern "C" __global__ void nf4_absmax_mean(const float* absmax, float* offset, i64 n) {
    __shared__ double sums[256];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < n; i += 256) sum += absmax[i];
    sums[threadIdx.x] = sum;
    for (unsigned half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *offset = float(sums[0] / double(n > 0 ? n : 1));
}

// absmax (n) -> codes (n), nested_absmax (ceil(n / 256)). Block b of 256 threads takes nested block b.
extern "C" __global__ void nf4_quantize_absmax(const float* absmax, const float* offset, const float* nested_code, uint8_t* codes,
                                               float* nested_absmax, i64 n) {
    const i64 i = i64(blockIdx.x) * NESTED_BLOCK + threadIdx.x;
    const float centred = i < n ? __fadd_rn(absmax[i], -*offset) : 0.0f;
    const float largest = block_max(fabsf(centred));
    if (threadIdx.x == 0) nested_absmax[blockIdx.x] = largest;
    if (i >= n) return;
    const float scaled = __fmul_rn(centred, __frcp_rn(fmaxf(largest, SMALLEST_ABSMAX)));
    // The nearest of 65,536 points, for each of which bitsandbytes 0.50 keeps the code in a table on the CPU.
    const float point = floorf(__fadd_rn(__fmul_rn(__fadd_rn(scaled, 1.0f), 32767.5f), 0.5f)) / 32767.5f - 1.0f;
    // The last code whose midpoint to the one below is under it; where all scales are equal, bitsandbytes' 0.
    int low = 0, high = largest == 0.0f ? 0 : 255;
    while (low < high) {
        const int at = (low + high + 1) / 2;
        if (point > __fadd_rn(nested_code[at - 1], nested_code[at]) / 2.0f)
            low = at;
        else
            high = at - 1;
    }
    codes[i] = uint8_t(low);
}

// y (n) = values first..first + n, eight at a time where they are the codes of one aligned word.
template <class T>
__device__ void dequantize(const uint8_t* packed, Scales scales, T* y, i64 first, i64 n, int kind) {
    __shared__ float levels[16];
    load_levels(levels, kind);
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
    const bool in_words = first % 8 == 0 && aligned(y) && reinterpret_cast<uintptr_t>(packed + first / 2) % 4 == 0;
    const i64 worded = in_words ? n / 8 * 8 : 0;
    for (i64 i = thread * 8; i < worded; i += threads * 8) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(packed + (first + i) / 2);
        const float absmax = scales[(first + i) / QUANT_BLOCK];
        float v[8];
        for (int j = 0; j < 8; ++j) v[j] = value_of(word, j, levels, absmax);
        store<8>(y + i, v);
    }
    for (i64 i = worded + thread; i < n; i += threads) {
        const i64 at = first + i;
        const unsigned code = at % 2 ? packed[at / 2] & 15 : packed[at / 2] >> 4;
        y[i] = from_float<T>(__fmul_rn(levels[code], scales[at / QUANT_BLOCK]));
    }
}

#define INSTANTIATE(T, type)                                                                                             \
    extern "C" __global__ void nf4_quantize_##type(const T* x, uint8_t* packed, float* absmax, i64 n, int kind) {        \
        quantize(x, packed, absmax, n, kind);                                                                            \
    }                                                                                                                    \
    extern "C" __global__ void nf4_dequantize_##type(const uint8_t* packed, const float* absmax, T* y, i64 first, i64 n, \
                                                     int kind) {                                                         \
        dequantize(packed, Scales{absmax, nullptr, nullptr, 0.0f}, y, first, n, kind);                                   \
    }                                                                                                                    \
    extern "C" __global__ void nf4_dequantize_double_##type(const uint8_t* packed, const uint8_t* codes,                 \
                                                            const float* nested_absmax, const float* nested_code,        \
                                                            float offset, T* y, i64 first, i64 n, int kind) {            \
        dequantize(packed, Scales{nested_absmax, codes, nested_code, offset}, y, first, n, kind);                        \
    }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
