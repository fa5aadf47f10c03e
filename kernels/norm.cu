// RMS norm and layer norm, forward and the gradient of the input (weights are frozen).
//
//     y = x̂ · w [+ b],   x̂ = (x - mean) · rstd,   rstd = 1 / √(avg((x - mean)²) + eps)     (mean = 0 for the RMS norm)
//     dx = rstd · (g - [avg(g)] - x̂ · avg(g · x̂)),   g = dy · w
//
// Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450. Nothing is saved: the backward finds a
// row's statistics again. Weights and biases are f32, as a unit offset is added to them before (Gemma stores w - 1).
//
// A row of x is a token, or one head of a token where queries and keys are normalised: row r starts at
// (r / heads) · ld + (r % heads) · c, so heads inside a wider q|k|v matrix are reached in place. ld is a parameter of
// each operand. Row r has the weights r % weights of weight (weights, c). y may be x, and dx may be dy.
// Launch: block (32, n) takes n short rows, a warp each; block (32 m, 1) takes one row. Grid: ceil(rows / blockDim.y).
#include "common.cuh"

// Divided in 32 bits: in 64 it is a function that takes longer than a short row.
__device__ __forceinline__ i64 row_start(int row, int c, int heads, i64 ld) {
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

// Mean (0 unless `centred`) and 1 / standard deviation. The variance is summed from differences in a second pass: a sum of
// squares loses all digits where |mean| is large.
struct Statistics {
    float mean, rstd;
};

template <int N, bool centred, class T>
__device__ __forceinline__ Statistics statistics(const T* x, int c, float eps) {
    const float m = centred ? sum_over_row<N>(x, c, [](int, float v) { return v; }) / c : 0.0f;
    return {m, rsqrtf(sum_over_row<N>(x, c, [m](int, float v) { return (v - m) * (v - m); }) / c + eps)};
}

template <int N, bool centred, class T>
__device__ __forceinline__ void norm_fwd_row(const T* x, const float* weight, const float* bias, T* y, T* copy, int c, float eps) {
    const Statistics s = statistics<N, centred>(x, c, eps);
    for (int i = threadIdx.x * N; i < c; i += blockDim.x * N) {
        float v[N], w[N], b[N];
        load<N>(x + i, v);
        if (copy) store<N>(copy + i, v);
        load<N>(weight + i, w);
        if (bias) load<N>(bias + i, b);
        for (int j = 0; j < N; ++j) v[j] = (v[j] - s.mean) * s.rstd * w[j] + (bias ? b[j] : 0.0f);
        store<N>(y + i, v);
    }
}

// An element of dy and of the old dx is read by the thread that writes it, after the reductions.
template <int N, bool centred, class T>
__device__ __forceinline__ void norm_bwd_row(const T* dy, const T* x, const float* weight, T* dx, int c, float eps, bool accumulate) {
    const Statistics s = statistics<N, centred>(x, c, eps);
    float sum_g = 0.0f, sum_gx = 0.0f;
    for (int i = threadIdx.x * N; i < c; i += blockDim.x * N) {
        float g[N], v[N], w[N];
        load<N>(dy + i, g);
        load<N>(x + i, v);
        load<N>(weight + i, w);
        for (int j = 0; j < N; ++j) {
            sum_g += g[j] * w[j];
            sum_gx += g[j] * w[j] * (v[j] - s.mean) * s.rstd;
        }
    }
    const float avg_g = centred ? row_sum(sum_g) / c : 0.0f;
    const float avg_gx = row_sum(sum_gx) / c;
    for (int i = threadIdx.x * N; i < c; i += blockDim.x * N) {
        float g[N], v[N], w[N], d[N];
        load<N>(dy + i, g);
        load<N>(x + i, v);
        load<N>(weight + i, w);
        if (accumulate) load<N>(dx + i, d);
        for (int j = 0; j < N; ++j) {
            const float value = s.rstd * (g[j] * w[j] - avg_g - (v[j] - s.mean) * s.rstd * avg_gx);
            d[j] = accumulate ? d[j] + value : value;
        }
        store<N>(dx + i, d);
    }
}

// x (rows, c), weight (weights, c), bias (the same) or null -> y (rows, c); and x again in copy, which lies as x does, or null.
template <bool centred, class T>
__device__ void norm_fwd(const T* x, const float* weight, const float* bias, T* y, T* copy, int rows, int c, int heads, int weights,
                         i64 ld_x, i64 ld_y, float eps) {
    const int row = int(blockIdx.x * blockDim.y + threadIdx.y);
    if (row >= rows) return;
    const bool in_packs = wide<T>(c, ld_x) && wide<T>(c, ld_y) && aligned(x) && aligned(weight) && aligned(bias) && aligned(y) &&
                          aligned(copy);
    x += row_start(row, c, heads, ld_x);
    if (copy) copy += row_start(row, c, heads, ld_x);
    y += row_start(row, c, heads, ld_y);
    weight += i64(row % weights) * c;
    if (bias) bias += i64(row % weights) * c;
    if (in_packs)
        norm_fwd_row<WIDE<T>, centred>(x, weight, bias, y, copy, c, eps);
    else
        norm_fwd_row<1, centred>(x, weight, bias, y, copy, c, eps);
}

// dx (rows, c) = or += the gradient of x.
template <bool centred, class T>
__device__ void norm_bwd(const T* dy, const T* x, const float* weight, T* dx, int rows, int c, int heads, int weights, i64 ld_dy,
                         i64 ld_x, i64 ld_dx, float eps, int accumulate) {
    const int row = int(blockIdx.x * blockDim.y + threadIdx.y);
    if (row >= rows) return;
    const bool in_packs = wide<T>(c, ld_dy) && wide<T>(c, ld_x) && wide<T>(c, ld_dx) && aligned(dy) && aligned(x) &&
                          aligned(weight) && aligned(dx);
    dy += row_start(row, c, heads, ld_dy);
    x += row_start(row, c, heads, ld_x);
    dx += row_start(row, c, heads, ld_dx);
    weight += i64(row % weights) * c;
    if (in_packs)
        norm_bwd_row<WIDE<T>, centred>(dy, x, weight, dx, c, eps, accumulate);
    else
        norm_bwd_row<1, centred>(dy, x, weight, dx, c, eps, accumulate);
}

#define INSTANTIATE_KIND(T, type, kind, centred)                                                                             \
    extern "C" __global__ void kind##_fwd_##type(const T* x, const float* weight, const float* bias, T* y, T* copy,          \
                                                 int rows, int c, int heads, int weights, i64 ld_x, i64 ld_y, float eps) {   \
        norm_fwd<centred>(x, weight, bias, y, copy, rows, c, heads, weights, ld_x, ld_y, eps);                               \
    }                                                                                                                        \
    extern "C" __global__ void kind##_bwd_##type(const T* dy, const T* x, const float* weight, T* dx, int rows, int c,       \
                                                 int heads, int weights, i64 ld_dy, i64 ld_x, i64 ld_dx, float eps,          \
                                                 int accumulate) {                                                           \
        norm_bwd<centred>(dy, x, weight, dx, rows, c, heads, weights, ld_dy, ld_x, ld_dx, eps, accumulate);                  \
    }
#define INSTANTIATE(T, type)                     \
    INSTANTIATE_KIND(T, type, rms_norm, false) \
    INSTANTIATE_KIND(T, type, layer_norm, true)
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
#undef INSTANTIATE_KIND
