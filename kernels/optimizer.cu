// AdamW over one flat f32 buffer that holds all adapters, and the norm of its gradient. No number comes back to the
// host in a step: the norm, the clipping and the learning rate are read on the device.
//
//     g ← s g · min(1, max_norm / (‖s g‖ + 1e-6));   m ← β₁ m + (1 - β₁) g;   v ← β₂ v + (1 - β₂) g²
//     p ← p (1 - lr · weight_decay) - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)
//
// Loshchilov and Hutter 2017, arXiv:1711.05101, as torch.optim.AdamW and clip_grad_norm_ compute it.
// Launch: any grid, a block of whole warps; reductions as noted.
#include "common.cuh"

// The numbers of a step, in this order in device memory. The host computes each in f64: 1 - 0.999 in f32 is 5e-5 off.
struct Hyper {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
    float keep;             // 1 - lr · weight_decay
    float step_size;        // lr / (1 - β₁ᵗ)
    float root_correction;  // √(1 - β₂ᵗ)
    float grad_scale;       // s, by which the loss was not yet divided
    float max_norm;         // 0: no clipping
};

template <int N>
__device__ __forceinline__ void adamw_packs(float* p, const float* g, float* m, float* v, i64 from, i64 to, i64 step,
                                            const Hyper& h, float grad_factor) {
    for (i64 i = from; i < to; i += step) {
        float pi[N], gi[N], mi[N], vi[N];
        load<N>(p + i, pi);
        load<N>(g + i, gi);
        load<N>(m + i, mi);
        load<N>(v + i, vi);
        for (int j = 0; j < N; ++j) {
            const float grad = gi[j] * grad_factor;
            mi[j] = h.beta1 * mi[j] + h.one_minus_beta1 * grad;
            vi[j] = h.beta2 * vi[j] + h.one_minus_beta2 * grad * grad;
            pi[j] = pi[j] * h.keep - h.step_size * mi[j] / (sqrtf(vi[j]) / h.root_correction + h.eps);
        }
        store<N>(p + i, pi);
        store<N>(m + i, mi);
        store<N>(v + i, vi);
    }
}

// p, g, m, v (n). `sum_squares` points to ‖g‖² (sum_partials_f32); it is not read when max_norm is 0.
extern "C" __global__ void adamw_f32(float* p, const float* g, float* m, float* v, i64 n, const Hyper* hyper,
                                     const float* sum_squares) {
    const Hyper h = *hyper;
    float factor = h.grad_scale;
    if (h.max_norm > 0.0f) factor *= fminf(1.0f, h.max_norm / (h.grad_scale * sqrtf(*sum_squares) + 1e-6f));
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, threads = i64(gridDim.x) * blockDim.x;
    const i64 packed = aligned(p) && aligned(g) && aligned(m) && aligned(v) ? n / 4 * 4 : 0;
    adamw_packs<4>(p, g, m, v, thread * 4, packed, threads * 4, h, factor);
    adamw_packs<1>(p, g, m, v, packed + thread, n, threads, h, factor);
}

// partial[blockIdx.x] = this block's part of Σ x². No atomics, so that a run can be repeated bit for bit.
extern "C" __global__ void sum_squares_f32(const float* x, float* partial, i64 n) {
    float sum = 0.0f;
    const i64 threads = i64(gridDim.x) * blockDim.x;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads) sum += x[i] * x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// out[0] = scale · Σ partial, added to what is there if `accumulate`. One block. For the norm (scale 1) and the loss.
extern "C" __global__ void sum_partials_f32(const float* partial, float* out, int n, float scale, int accumulate) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum * scale + (accumulate ? *out : 0.0f);
}

// x *= *factor, which lies on the device.
extern "C" __global__ void scale_f32(float* x, i64 n, const float* factor) {
    const float by = *factor;
    const i64 threads = i64(gridDim.x) * blockDim.x;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads) x[i] *= by;
}
