// NF4 and FP4 weights in blocks of 64, with plain or doubly quantized scales: the device twin of src/ops/nf4.rs, which
// describes the format, and equal to it bit for bit (but for the mean below). Products and sums are rounded apart (__fmul_rn, __fadd_rn), as a
// fused multiply-add would not be.
//
//     x ≈ level[c] · absmax,   absmax = nested_code[q] · nested_absmax + offset       Dettmers et al. 2023, arXiv:2305.14314
//
// `kind`: 0 NF4, 1 FP4. A first value `first` selects rows (first = row · cols); it may lie within a byte.
// Launch: any grid and a block of whole warps, unless noted.
#include "common.cuh"

constexpr int QUANT_BLOCK = 64;
constexpr int NESTED_BLOCK = 256;
constexpr float SMALLEST_ABSMAX = 1e-38f;

__constant__ float LEVELS[2][16] = {
    {-1.0f, -0.696192801f, -0.525073051f, -0.394917488f, -0.284441382f, -0.18477343f, -0.0910500363f, 0.0f, 0.0795802996f,
     0.160930201f, 0.246112302f, 0.337915242f, 0.440709829f, 0.562617004f, 0.722956836f, 1.0f},
    {0.0f, 0.00520833349f, 0.666666687f, 1.0f, 0.333333343f, 0.5f, 0.166666672f, 0.25f, 0.0f, -0.00520833349f, -0.666666687f,
     -1.0f, -0.333333343f, -0.5f, -0.166666672f, -0.25f}};
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

// The scale of block i, from plain scales (codes is null) or doubly quantized ones.
struct Scales {
    const float* absmax;  // or nested_absmax
    const uint8_t* codes;
    const float* nested_code;
    float offset;

    __device__ __forceinline__ float operator[](i64 i) const {
        if (!codes) return absmax[i];
        return __fadd_rn(__fmul_rn(nested_code[codes[i]], absmax[i / NESTED_BLOCK]), offset);
    }
};

// The value j of the eight that a word of codes holds; the first of a byte is its high half.
__device__ __forceinline__ float value_of(uint32_t word, int j, const float* levels, float absmax) {
    return __fmul_rn(levels[word >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15], absmax);
}

// 16 words in 16 banks of shared memory: any codes are looked up without a conflict.
__device__ __forceinline__ void load_levels(float* levels, int kind) {
    if (threadIdx.x < 16) levels[threadIdx.x] = LEVELS[kind][threadIdx.x];
    __syncthreads();
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

// --- Products of a few rows, as in decoding: W is read once in its 4 bits and never written out ---
//
// y (n, rows) = or += x (n, cols) Wᵀ for n <= PRODUCT_ROWS, rows of x and y `ldx` and `ldy` apart. As after dequantize, level ·
// absmax is rounded to the type of x, and sums are f32. Launch: blocks of PRODUCT_WARPS warps.

constexpr int PRODUCT_ROWS = 8;
constexpr int PRODUCT_WARPS = 8;

struct FewRows {
    const uint8_t* packed;
    Scales scales;
    int n, rows, cols;
    i64 ldx, ldy;
    bool accumulate;
};

template <class T>
__device__ __forceinline__ void put(T* y, float sum, bool accumulate) {
    *y = from_float<T>(accumulate ? to_float(*y) + sum : sum);
}

// Any type and size: a warp for each row of W.
template <class T>
__device__ void product(const FewRows& job, const T* x, T* y, int kind) {
    __shared__ float levels[16];
    load_levels(levels, kind);
    const int lane = threadIdx.x % 32, row = blockIdx.x * PRODUCT_WARPS + threadIdx.x / 32;
    if (row >= job.rows) return;
    const i64 first = i64(row) * job.cols;
    float sums[PRODUCT_ROWS] = {};
    const auto add = [&](int k, float w) {
        const float rounded = to_float(from_float<T>(w));
        for (int n = 0; n < PRODUCT_ROWS; ++n)
            if (n < job.n) sums[n] += rounded * to_float(x[n * job.ldx + k]);
    };
    const int worded = first % 8 == 0 && reinterpret_cast<uintptr_t>(job.packed) % 4 == 0 ? job.cols / 8 * 8 : 0;
    for (int k = lane * 8; k < worded; k += 32 * 8) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(job.packed + (first + k) / 2);
        const float absmax = job.scales[(first + k) / QUANT_BLOCK];
        for (int j = 0; j < 8; ++j) add(k + j, value_of(word, j, levels, absmax));
    }
    for (int k = worded + lane; k < job.cols; k += 32) {
        const i64 at = first + k;
        const unsigned code = at % 2 ? job.packed[at / 2] & 15 : job.packed[at / 2] >> 4;
        add(k, __fmul_rn(levels[code], job.scales[at / QUANT_BLOCK]));
    }
    for (int n = 0; n < PRODUCT_ROWS; ++n) {
        const float sum = warp_sum(sums[n]);
        if (lane == 0 && n < job.n) put(y + n * job.ldy + row, sum, job.accumulate);
    }
}

// By tensor cores: 16 rows of W for each block, whose warps share the columns. cols is a multiple of 32, x and its rows are aligned
// to 16 bytes. The fragments of mma.m16n8k16 take W as the left side and x as the right one. Which four columns a lane brings is
// free as long as both sides agree: here they are neighbours, so that a lane reads 32 codes of a row and 8 elements of x at once.
template <class T>
__device__ void product_mma(const FewRows& job, const T* x, T* y, int kind) {
    constexpr int COLS = 32;  // of a lane at a time: all of one scale
    __shared__ float levels[16];
    __shared__ float partial[PRODUCT_WARPS][PRODUCT_ROWS][16];
    __shared__ float nested_code[NESTED_BLOCK];
    Scales scales = job.scales;
    if (scales.codes) {
        for (int i = threadIdx.x; i < NESTED_BLOCK; i += 32 * PRODUCT_WARPS) nested_code[i] = scales.nested_code[i];
        scales.nested_code = nested_code;
    }
    load_levels(levels, kind);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
    const int rows[2] = {int(blockIdx.x) * 16 + group, int(blockIdx.x) * 16 + group + 8};
    float sums[4] = {};
    for (int first = warp * 4 * COLS; first < job.cols; first += PRODUCT_WARPS * 4 * COLS) {
        const int k = first + quarter * COLS;
        Pack<uint32_t, 4> codes[2];
        float absmax[2];
        // Of rows and columns that are not there others are read, times zero: no branch keeps one load waiting for another.
        for (int half = 0; half < 2; ++half) {
            const i64 at = i64(min(rows[half], job.rows - 1)) * job.cols + min(k, job.cols - COLS);
            codes[half] = *reinterpret_cast<const Pack<uint32_t, 4>*>(job.packed + at / 2);
            absmax[half] = scales[at / QUANT_BLOCK];
        }
        for (int half = 0; half < 2; ++half)
            if (rows[half] >= job.rows || k >= job.cols) absmax[half] = 0.0f;
        for (int w = 0; w < 4; ++w) {
            Pack<uint32_t, 4> right = {};  // eight elements of one row of x
            if (group < job.n && k < job.cols) right = *reinterpret_cast<const Pack<uint32_t, 4>*>(x + group * job.ldx + k + 8 * w);
            for (int step = 0; step < 2; ++step) {
                uint32_t left[4];
                for (int i = 0; i < 4; ++i) {
                    const int half = i % 2, j = 4 * step + i / 2 * 2;
                    left[i] = pack_two<T>(value_of(codes[half].v[w], j, levels, absmax[half]),
                                          value_of(codes[half].v[w], j + 1, levels, absmax[half]));
                }
                mma_16x8x16<T>(sums, left, right.v[2 * step], right.v[2 * step + 1]);
            }
        }
    }
    for (int i = 0; i < 4; ++i) partial[warp][quarter * 2 + i % 2][group + i / 2 * 8] = sums[i];
    __syncthreads();
    const int n = threadIdx.x / 16, row = blockIdx.x * 16 + threadIdx.x % 16;
    if (n >= job.n || row >= job.rows) return;
    float sum = 0.0f;
    for (int w = 0; w < PRODUCT_WARPS; ++w) sum += partial[w][n][threadIdx.x % 16];
    put(y + n * job.ldy + row, sum, job.accumulate);
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

// `codes`, `nested_code` and `offset` are those of double quantization; without it, codes is null.
#define PRODUCT(name, function, T, type)                                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * PRODUCT_WARPS) name##_##type(                                         \
        const uint8_t* packed, const float* absmax, const uint8_t* codes, const float* nested_code, float offset, const T* x, T* y, \
        int n, int rows, int cols, i64 ldx, i64 ldy, int accumulate, int kind) {                                            \
        function(FewRows{packed, Scales{absmax, codes, nested_code, offset}, n, rows, cols, ldx, ldy, accumulate != 0}, x, y, kind); \
    }
#define INSTANTIATE(T, type) PRODUCT(nf4_product, product, T, type)
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
PRODUCT(nf4_product_mma, product_mma, __nv_bfloat16, bf16)
PRODUCT(nf4_product_mma, product_mma, __half, f16)
#undef PRODUCT
