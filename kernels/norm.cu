// RMS norm and layer norm, forward and the gradient of the input (weights are frozen).
//
//     y = x̂ · (w + unit_offset) [+ b],   x̂ = (x - mean) · rstd     (mean = 0 for the RMS norm)
//     dx = rstd · (g - [avg(g)] - x̂ · avg(g · x̂)),   g = dy · (w + unit_offset)
//
// Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450. Gemma stores w - 1: unit_offset = 1.
//
// A row of x is a token, or one head of a token where queries and keys are normalised: row r starts at
// (r / heads) · ld + (r % heads) · c, so heads inside a wider q|k|v matrix are reached in place. ld is a parameter of
// each operand. Launch: block (32, n) takes n short rows, a warp each; block (32 m, 1) takes one row.
// Grid: ceil(rows / blockDim.y).
#include "common.cuh"

__device__ __forceinline__ i64 row_start(i64 row, int c, int heads, i64 ld) {
    return heads == 1 ? row * ld : row / heads * ld + row % heads * c;
}

// Over the threads that share a row. A warp that has no row has left already, so there is no block barrier for it.
__device__ __forceinline__ float row_sum(float v) { return blockDim.x == 32 ? warp_sum(v) : block_sum(v); }

template <int N, class T, class F>
__device__ __forceinline__ float sum_over_row(const T* x, int c, F term) {
    float sum = 0.0f;
    for (int i = threadIdx.x * N; i < c; i += blockDim.x * N) {
        float v[N];
        load<N>(x + i, v);
        for (int j = 0; j < N; ++j) sum += term(i + j, v[j]);
    }
    return row_sum(sum);
}

// Scales and shifts a row that is already reduced. `weight` and `bias` may be null.
template <int N, class T>
__device__ __forceinline__ void write_normalised(const T* x, const T* weight, const T* bias, T* y, int c, float mean, float rstd,
                                                 float unit_offset) {
    for (int i = threadIdx.x * N; i < c; i += blockDim.x * N) {
        float v[N], w[N], b[N];
        load<N>(x + i, v);
        if (weight) load<N>(weight + i, w);
        if (bias) load<N>(bias + i, b);
        for (int j = 0; j < N; ++j) {
            v[j] = (v[j] - mean) * rstd;
            if (weight) v[j] *= w[j] + unit_offset;
            if (bias) v[j] += b[j];
        }
        store<N>(y + i, v);
    }
}

template <int N, class T>
__device__ __forceinline__ void rms_norm_fwd_row(const T* x, const T* weight, T* y, float* rstd, int c, float eps,
                                                 float unit_offset) {
    const float r = rsqrtf(sum_over_row<N>(x, c, [](int, float v) { return v * v; }) / c + eps);
    if (rstd && threadIdx.x == 0) *rstd = r;
    write_normalised<N>(x, weight, static_cast<const T*>(nullptr), y, c, 0.0f, r, unit_offset);
}

// The variance is summed from differences in a second pass: a sum of squares loses all digits where |mean| is large.
template <int N, class T>
__device__ __forceinline__ void layer_norm_fwd_row(const T* x, const T* weight, const T* bias, T* y, float* mean, float* rstd,
                                                   int c, float eps, float unit_offset) {
    const float m = sum_over_row<N>(x, c, [](int, float v) { return v; }) / c;
    const float r = rsqrtf(sum_over_row<N>(x, c, [m](int, float v) { return (v - m) * (v - m); }) / c + eps);
    if (mean && threadIdx.x == 0) *mean = m;
    if (rstd && threadIdx.x == 0) *rstd = r;
    write_normalised<N>(x, weight, bias, y, c, m, r, unit_offset);
}

// `centred` adds the term of the mean (layer norm). An element of dy and of the old dx is read by the thread that
// writes it, after the reductions, so dx may be dy.
template <int N, bool centred, class T>
__device__ __forceinline__ void norm_bwd_row(const T* dy, const T* x, const T* weight, float mean, float rstd, T* dx, int c,
                                             float unit_offset, bool accumulate) {
    float sum_g = 0.0f, sum_gx = 0.0f;
    for (int i = threadIdx.x * N; i < c; i += blockDim.x * N) {
        float g[N], v[N], w[N];
        load<N>(dy + i, g);
        load<N>(x + i, v);
        if (weight) load<N>(weight + i, w);
        for (int j = 0; j < N; ++j) {
            if (weight) g[j] *= w[j] + unit_offset;
            sum_g += g[j];
            sum_gx += g[j] * (v[j] - mean) * rstd;
        }
    }
    const float avg_g = centred ? row_sum(sum_g) / c : 0.0f;
    const float avg_gx = row_sum(sum_gx) / c;
    for (int i = threadIdx.x * N; i < c; i += blockDim.x * N) {
        float g[N], v[N], w[N], d[N];
        load<N>(dy + i, g);
        load<N>(x + i, v);
        if (weight) load<N>(weight + i, w);
        if (accumulate) load<N>(dx + i, d);
        for (int j = 0; j < N; ++j) {
            if (weight) g[j] *= w[j] + unit_offset;
            const float value = rstd * (g[j] - avg_g - (v[j] - mean) * rstd * avg_gx);
            d[j] = accumulate ? d[j] + value : value;
        }
        store<N>(dx + i, d);
    }
}

// x (rows, c), weight (c) or null -> y (rows, c), rstd (rows) or null.
template <class T>
__device__ void rms_norm_fwd(const T* x, const T* weight, T* y, float* rstd, int rows, int c, int heads, i64 ld_x, i64 ld_y,
                             float eps, float unit_offset) {
    const i64 row = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const bool in_packs = wide<T>(c, ld_x) && wide<T>(c, ld_y) && aligned(x) && aligned(weight) && aligned(y);
    x += row_start(row, c, heads, ld_x);
    y += row_start(row, c, heads, ld_y);
    float* r = rstd ? rstd + row : nullptr;
    if (in_packs)
        rms_norm_fwd_row<WIDE<T>>(x, weight, y, r, c, eps, unit_offset);
    else
        rms_norm_fwd_row<1>(x, weight, y, r, c, eps, unit_offset);
}

// The same with a bias and a mean, each of which may be null.
template <class T>
__device__ void layer_norm_fwd(const T* x, const T* weight, const T* bias, T* y, float* mean, float* rstd, int rows, int c,
                               int heads, i64 ld_x, i64 ld_y, float eps, float unit_offset) {
    const i64 row = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const bool in_packs =
        wide<T>(c, ld_x) && wide<T>(c, ld_y) && aligned(x) && aligned(weight) && aligned(bias) && aligned(y);
    x += row_start(row, c, heads, ld_x);
    y += row_start(row, c, heads, ld_y);
    float* m = mean ? mean + row : nullptr;
    float* r = rstd ? rstd + row : nullptr;
    if (in_packs)
        layer_norm_fwd_row<WIDE<T>>(x, weight, bias, y, m, r, c, eps, unit_offset);
    else
        layer_norm_fwd_row<1>(x, weight, bias, y, m, r, c, eps, unit_offset);
}

// dx (rows, c) = or += the gradient of x; mean is null for the RMS norm.
template <bool centred, class T>
__device__ void norm_bwd(const T* dy, const T* x, const T* weight, const float* mean, const float* rstd, T* dx, int rows, int c,
                         int heads, i64 ld_dy, i64 ld_x, i64 ld_dx, float unit_offset, int accumulate) {
    const i64 row = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const bool in_packs = wide<T>(c, ld_dy) && wide<T>(c, ld_x) && wide<T>(c, ld_dx) && aligned(dy) && aligned(x) &&
                          aligned(weight) && aligned(dx);
    dy += row_start(row, c, heads, ld_dy);
    x += row_start(row, c, heads, ld_x);
    dx += row_start(row, c, heads, ld_dx);
    const float m = centred ? mean[row] : 0.0f;
    if (in_packs)
        norm_bwd_row<WIDE<T>, centred>(dy, x, weight, m, rstd[row], dx, c, unit_offset, accumulate);
    else
        norm_bwd_row<1, centred>(dy, x, weight, m, rstd[row], dx, c, unit_offset, accumulate);
}

#define INSTANTIATE(T, type)                                                                                                  \
    extern "C" __global__ void rms_norm_fwd_##type(const T* x, const T* weight, T* y, float* rstd, int rows, int c, int heads, \
                                                   i64 ld_x, i64 ld_y, float eps, float unit_offset) {                        \
        rms_norm_fwd(x, weight, y, rstd, rows, c, heads, ld_x, ld_y, eps, unit_offset);                                       \
    }                                                                                                                         \
    extern "C" __global__ void rms_norm_bwd_##type(const T* dy, const T* x, const T* weight, const float* rstd, T* dx,        \
                                                   int rows, int c, int heads, i64 ld_dy, i64 ld_x, i64 ld_dx,                \
                                                   float unit_offset, int accumulate) {                                       \
        norm_bwd<false>(dy, x, weight, nullptr, rstd, dx, rows, c, heads, ld_dy, ld_x, ld_dx, unit_offset, accumulate);       \
    }                                                                                                                         \
    extern "C" __global__ void layer_norm_fwd_##type(const T* x, const T* weight, const T* bias, T* y, float* mean,           \
                                                     float* rstd, int rows, int c, int heads, i64 ld_x, i64 ld_y, float eps,  \
                                                     float unit_offset) {                                                     \
        layer_norm_fwd(x, weight, bias, y, mean, rstd, rows, c, heads, ld_x, ld_y, eps, unit_offset);                         \
    }                                                                                                                         \
    extern "C" __global__ void layer_norm_bwd_##type(const T* dy, const T* x, const T* weight, const float* mean,             \
                                                     const float* rstd, T* dx, int rows, int c, int heads, i64 ld_dy,         \
                                                     i64 ld_x, i64 ld_dx, float unit_offset, int accumulate) {                \
        norm_bwd<true>(dy, x, weight, mean, rstd, dx, rows, c, heads, ld_dy, ld_x, ld_dx, unit_offset, accumulate);           \
    }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
