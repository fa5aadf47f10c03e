// Rows moved, added and scaled: embedding, the rows that have a target, the rows that visit an expert, kept keys and
// values. Rows hold `c` elements. Launch: a block per row, of whole warps.
#include "common.cuh"

// y (rows, c): row r is row index[r] of x.
template <class T>
__device__ void gather_rows(const T* x, const int* index, T* y, int c) {
    x += i64(index[blockIdx.x]) * c;
    y += i64(blockIdx.x) * c;
    for (int i = threadIdx.x; i < c; i += blockDim.x) y[i] = x[i];
}

// Row index[r] of y += factor[r] (null: 1) · row r of part. No row is named twice.
template <class T>
__device__ void scatter_add_rows(const T* part, const int* index, const float* factor, T* y, int c) {
    const float by = factor ? factor[blockIdx.x] : 1.0f;
    y += i64(index[blockIdx.x]) * c;
    part += i64(blockIdx.x) * c;
    for (int i = threadIdx.x; i < c; i += blockDim.x) y[i] = from_float<T>(to_float(y[i]) + by * to_float(part[i]));
}

// Row r of x *= factor[r].
template <class T>
__device__ void scale_rows(T* x, const float* factor, int c) {
    const float by = factor[blockIdx.x];
    x += i64(blockIdx.x) * c;
    for (int i = threadIdx.x; i < c; i += blockDim.x) x[i] = from_float<T>(by * to_float(x[i]));
}

// out[index[r]] = row r of a · row r of b.
template <class T>
__device__ void dot_rows(const T* a, const T* b, const int* index, float* out, int c) {
    a += i64(blockIdx.x) * c;
    b += i64(blockIdx.x) * c;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < c; i += blockDim.x) sum += to_float(a[i]) * to_float(b[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[index[blockIdx.x]] = sum;
}

// A rectangle into another; rows are ld_x and ld_y apart.
template <class T>
__device__ void copy_rows(const T* x, T* y, int c, i64 ld_x, i64 ld_y) {
    x += blockIdx.x * ld_x;
    y += blockIdx.x * ld_y;
    for (int i = threadIdx.x; i < c; i += blockDim.x) y[i] = x[i];
}

#define INSTANTIATE(T, type)                                                                                              \
    extern "C" __global__ void gather_rows_##type(const T* x, const int* index, T* y, int c) { gather_rows(x, index, y, c); } \
    extern "C" __global__ void scatter_add_rows_##type(const T* part, const int* index, const float* factor, T* y, int c) {   \
        scatter_add_rows(part, index, factor, y, c);                                                                      \
    }                                                                                                                     \
    extern "C" __global__ void scale_rows_##type(T* x, const float* factor, int c) { scale_rows(x, factor, c); }          \
    extern "C" __global__ void dot_rows_##type(const T* a, const T* b, const int* index, float* out, int c) {                 \
        dot_rows(a, b, index, out, c);                                                                                    \
    }                                                                                                                     \
    extern "C" __global__ void copy_rows_##type(const T* x, T* y, int c, i64 ld_x, i64 ld_y) {                            \
        copy_rows(x, y, c, ld_x, ld_y);                                                                                   \
    }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
