// The nonlinearity of the MLP: gated (act(gate) · up) and plain (act(x)), forward and backward.
//
//     y = act(g) · u,   dg = dy · u · act'(g),   du = dy · act(g)
//     silu(g) = g σ(g);   gelu_tanh(g) = g/2 (1 + tanh(√(2/π) (g + 0.044715 g³)));   gelu_erf(g) = g Φ(g);
//     relu(g) = max(g, 0)
//
// Shazeer 2020, arXiv:2002.05202; Hendrycks and Gimpel 2016, arXiv:1606.08415. Gate and up stand side by side in rows
// of 2 · inner, gate first, as one product writes them. The gated backward overwrites them with their gradients.
// `act`: 0 silu, 1 gelu_tanh, 2 gelu_erf, 3 relu. Launch (gated): grid (rows, any), any block. Launch (plain): any grid and block.
#include "common.cuh"

constexpr int SILU = 0;
constexpr int GELU_TANH = 1;
constexpr int RELU = 3;

struct Activated {
    float value, slope;
};

__device__ __forceinline__ Activated activate(float g, int act) {
    if (act == SILU) {
        const float s = 1.0f / (1.0f + __expf(-g));
        return {g * s, s * (1.0f + g * (1.0f - s))};
    }
    if (act == GELU_TANH) {
        constexpr float K = 0.7978845608028654f, CUBE = 0.044715f;  // √(2/π)
        const float t = tanhf(K * (g + CUBE * g * g * g));
        return {0.5f * g * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * K * (1.0f + 3.0f * CUBE * g * g)};
    }
    if (act == RELU) return {fmaxf(g, 0.0f), g > 0.0f ? 1.0f : 0.0f};
    constexpr float ROOT_HALF = 0.7071067811865476f, DENSITY = 0.3989422804014327f;  // √½, 1/√(2π)
    const float phi = 0.5f * (1.0f + erff(g * ROOT_HALF));
    return {g * phi, phi + g * DENSITY * __expf(-0.5f * g * g)};
}

template <int N, class T>
__device__ __forceinline__ void glu_fwd_row(const T* gate, const T* up, T* y, int inner, int act) {
    for (i64 i = (i64(blockIdx.y) * blockDim.x + threadIdx.x) * N; i < inner; i += i64(gridDim.y) * blockDim.x * N) {
        float g[N], u[N];
        load<N>(gate + i, g);
        load<N>(up + i, u);
        for (int j = 0; j < N; ++j) u[j] *= activate(g[j], act).value;
        store<N>(y + i, u);
    }
}

template <int N, class T>
__device__ __forceinline__ void glu_bwd_row(T* gate, T* up, const T* dy, int inner, int act) {
    for (i64 i = (i64(blockIdx.y) * blockDim.x + threadIdx.x) * N; i < inner; i += i64(gridDim.y) * blockDim.x * N) {
        float g[N], u[N], d[N];
        load<N>(gate + i, g);
        load<N>(up + i, u);
        load<N>(dy + i, d);
        for (int j = 0; j < N; ++j) {
            const Activated a = activate(g[j], act);
            g[j] = d[j] * u[j] * a.slope;
            u[j] = d[j] * a.value;
        }
        store<N>(gate + i, g);
        store<N>(up + i, u);
    }
}

// gate_up (rows, 2 inner) -> y (rows, inner).
template <class T>
__device__ void glu_fwd(const T* gate_up, T* y, int inner, int act) {
    const i64 row = blockIdx.x;
    const T* gate = gate_up + row * 2 * inner;
    if (wide<T>(inner, inner) && aligned(gate_up) && aligned(y))
        glu_fwd_row<WIDE<T>>(gate, gate + inner, y + row * inner, inner, act);
    else
        glu_fwd_row<1>(gate, gate + inner, y + row * inner, inner, act);
}

// gate_up (rows, 2 inner) becomes its gradient, given dy (rows, inner).
template <class T>
__device__ void glu_bwd(T* gate_up, const T* dy, int inner, int act) {
    const i64 row = blockIdx.x;
    T* gate = gate_up + row * 2 * inner;
    if (wide<T>(inner, inner) && aligned(gate_up) && aligned(dy))
        glu_bwd_row<WIDE<T>>(gate, gate + inner, dy + row * inner, inner, act);
    else
        glu_bwd_row<1>(gate, gate + inner, dy + row * inner, inner, act);
}

// With `dy` null: out = act(x). Else out = dy · act'(x). `out` may be x or dy. `from` is this thread's first pack.
template <int N, class T>
__device__ __forceinline__ void activation_packs(const T* x, const T* dy, T* out, i64 from, i64 to, i64 step, int act) {
    for (i64 i = from; i < to; i += step) {
        float v[N], d[N];
        load<N>(x + i, v);
        if (dy) load<N>(dy + i, d);
        for (int j = 0; j < N; ++j) {
            const Activated a = activate(v[j], act);
            v[j] = dy ? d[j] * a.slope : a.value;
        }
        store<N>(out + i, v);
    }
}

template <class T>
__device__ void activation(const T* x, const T* dy, T* out, i64 n, int act) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
    constexpr int N = WIDE<T>;
    const i64 packed = aligned(x) && aligned(dy) && aligned(out) ? n / N * N : 0;
    activation_packs<N>(x, dy, out, thread * N, packed, threads * N, act);
    activation_packs<1>(x, dy, out, packed + thread, n, threads, act);
}

#define INSTANTIATE(T, type)                                                                                    \
    extern "C" __global__ void glu_fwd_##type(const T* gate_up, T* y, int inner, int act) {                     \
        glu_fwd(gate_up, y, inner, act);                                                                        \
    }                                                                                                           \
    extern "C" __global__ void glu_bwd_##type(T* gate_up, const T* dy, int inner, int act) {                    \
        glu_bwd(gate_up, dy, inner, act);                                                                       \
    }                                                                                                           \
    extern "C" __global__ void activation_fwd_##type(const T* x, T* y, i64 n, int act) {                        \
        activation(x, static_cast<const T*>(nullptr), y, n, act);                                               \
    }                                                                                                           \
    extern "C" __global__ void activation_bwd_##type(const T* x, const T* dy, T* dx, i64 n, int act) {          \
        activation(x, dy, dx, n, act);                                                                          \
    }
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
