// Rotary position embedding, in place: each pair (x[i], x[i + rotary_dim / 2]) of a head turns by an angle that grows
// with the token's position. The rest of the head, from rotary_dim on, stays as it is.
//
//     y[i] = x[i] cos - x[i + half] sin,   y[i + half] = x[i + half] cos + x[i] sin
//
// A rotation's gradient is the rotation back, so the backward is the same kernel with sign = -1.
// Su et al. 2021, arXiv:2104.09864; halves instead of neighbours, as in Hugging Face's models.
// Launch: a block per token, any number of threads; grid: tokens.
#include "common.cuh"

template <int N, class T>
__device__ __forceinline__ void rotate_heads(T* x, const float* cos, const float* sin, int n_heads, int head_size, int half,
                                             float sign) {
    const int per_head = half / N;
    for (int p = threadIdx.x; p < n_heads * per_head; p += blockDim.x) {
        const int i = p % per_head * N;
        T* head = x + i64(p / per_head) * head_size;
        float a[N], b[N], c[N], s[N];
        load<N>(head + i, a);
        load<N>(head + half + i, b);
        load<N>(cos + i, c);
        load<N>(sin + i, s);
        for (int j = 0; j < N; ++j) {
            const float u = a[j], v = b[j], turn = s[j] * sign;
            a[j] = u * c[j] - v * turn;
            b[j] = v * c[j] + u * turn;
        }
        store<N>(head + i, a);
        store<N>(head + half + i, b);
    }
}

// x: row t, `ld` apart, begins with n_heads heads of head_size. cos, sin: (positions, rotary_dim / 2), f32.
// positions: (tokens).
template <class T>
__device__ void rope(T* x, const float* cos, const float* sin, const int* positions, int n_heads, int head_size, int rotary_dim,
                     i64 ld, float sign) {
    const int half = rotary_dim / 2;
    const i64 token = blockIdx.x;
    const i64 position = positions[token];
    const bool in_packs = wide<T>(half, ld) && wide<T>(head_size, ld) && aligned(x) && aligned(cos) && aligned(sin);
    x += token * ld;
    cos += position * half;
    sin += position * half;
    if (in_packs)
        rotate_heads<WIDE<T>>(x, cos, sin, n_heads, head_size, half, sign);
    else
        rotate_heads<1>(x, cos, sin, n_heads, head_size, half, sign);
}

#define INSTANTIATE(T, type)                                                                                              \
    extern "C" __global__ void rope_##type(T* x, const float* cos, const float* sin, const int* positions, int n_heads,   \
                                           int head_size, int rotary_dim, i64 ld, float sign) {                           \
        rope(x, cos, sin, positions, n_heads, head_size, rotary_dim, ld, sign);                                           \
    }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
