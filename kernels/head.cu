// Cross-entropy over a chunk of logit rows: the loss of each row, and the logits overwritten with their gradient, so
// that the chunk is the only copy of either.
//
//     z = soft_cap(l · logit_scale);   loss = log Σ exp z - z[label];   dl = (softmax(z) - onehot(label)) · scale · dz/dl
//
// Rows whose label is `ignore_index` get loss 0 and gradient 0. A label outside 0..v gets a NaN loss and no gradient:
// it must not pass unseen. Columns v..ld, the padding of the vocabulary, get gradient 0.
// Logits are read twice and written once; the sum is kept with its running maximum (Milakov and Gimelshein 2018,
// arXiv:1805.02867). Launch: grid (rows), a block of whole warps.
#include "common.cuh"

template <int N, class T>
__device__ __forceinline__ void log_sum_exp_part(const T* logits, int v, float logit_scale, float soft_cap, float& maximum, float& sum) {
    for (int i = threadIdx.x * N; i < v; i += blockDim.x * N) {
        float z[N];
        load<N>(logits + i, z);
        for (int j = 0; j < N; ++j) {
            z[j] = soft_capped(z[j] * logit_scale, soft_cap);
            if (z[j] > maximum) {
                sum *= expf(maximum - z[j]);
                maximum = z[j];
            }
            if (z[j] != MINUS_INFINITY) sum += expf(z[j] - maximum);  // NaN, too, which the loss must show
        }
    }
}

template <int N, class T>
__device__ __forceinline__ void write_gradient_row(T* logits, int v, float logit_scale, float soft_cap, float log_sum_exp, int label, float scale) {
    for (int i = threadIdx.x * N; i < v; i += blockDim.x * N) {
        float z[N];
        load<N>(logits + i, z);
        for (int j = 0; j < N; ++j) {
            const float capped = soft_capped(z[j] * logit_scale, soft_cap);
            const float p = expf(capped - log_sum_exp) - (i + j == label ? 1.0f : 0.0f);
            z[j] = p * scale * logit_scale * soft_cap_slope(capped, soft_cap);
        }
        store<N>(logits + i, z);
    }
}

// logits (rows, ld), of which v columns count; labels (rows); loss (rows), not scaled. `scale` points to one f32 on
// the device (1 / number of targets), so that a captured graph can be replayed with another. `write_gradient` = 0
// leaves the logits as they are.
template <class T>
__device__ void cross_entropy(T* logits, const int* labels, float* loss, const float* scale, int v, i64 ld, float logit_scale, float soft_cap,
                              int ignore_index, int write_gradient) {
    const i64 row = blockIdx.x;
    const bool in_packs = wide<T>(v, ld) && aligned(logits);
    logits += row * ld;
    const int label = labels[row];
    const bool counted = label >= 0 && label < v && label != ignore_index;
    if (write_gradient)
        for (i64 i = (counted ? v : 0) + threadIdx.x; i < ld; i += blockDim.x) logits[i] = from_float<T>(0.0f);
    if (!counted) {  // the same for the whole block
        if (threadIdx.x == 0) loss[row] = label == ignore_index ? 0.0f : NOT_A_NUMBER;
        return;
    }
    float maximum = MINUS_INFINITY, sum = 0.0f;
    if (in_packs)
        log_sum_exp_part<WIDE<T>>(logits, v, logit_scale, soft_cap, maximum, sum);
    else
        log_sum_exp_part<1>(logits, v, logit_scale, soft_cap, maximum, sum);
    const float top = block_max(maximum);
    const float log_sum_exp = top + logf(block_sum(maximum > MINUS_INFINITY ? sum * expf(maximum - top) : sum));
    if (threadIdx.x == 0) loss[row] = log_sum_exp - soft_capped(to_float(logits[label]) * logit_scale, soft_cap);
    if (!write_gradient) return;
    __syncthreads();  // the label's logit is read above and overwritten below
    if (in_packs)
        write_gradient_row<WIDE<T>>(logits, v, logit_scale, soft_cap, log_sum_exp, label, *scale);
    else
        write_gradient_row<1>(logits, v, logit_scale, soft_cap, log_sum_exp, label, *scale);
}

// logits (n) = soft_cap(logits · scale), for those that are read rather than learned from. Any grid and block.
template <class T>
__device__ void transform_logits(T* logits, i64 n, float scale, float soft_cap) {
    const i64 threads = i64(gridDim.x) * blockDim.x;
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads)
        logits[i] = from_float<T>(soft_capped(to_float(logits[i]) * scale, soft_cap));
}

#define INSTANTIATE(T, type)                                                                                               \
    extern "C" __global__ void cross_entropy_##type(T* logits, const int* labels, float* loss, const float* scale, int v,  \
                                                    i64 ld, float logit_scale, float soft_cap, int ignore_index, int write_gradient) {        \
        cross_entropy(logits, labels, loss, scale, v, ld, logit_scale, soft_cap, ignore_index, write_gradient);                         \
    }
#define INSTANTIATE_TRANSFORM(T, type)                                                                        \
    extern "C" __global__ void transform_logits_##type(T* logits, i64 n, float scale, float soft_cap) {         \
        transform_logits(logits, n, scale, soft_cap);                                                         \
    }
FOR_EACH_TYPE(INSTANTIATE)
FOR_EACH_TYPE(INSTANTIATE_TRANSFORM)
#undef INSTANTIATE_TRANSFORM
#undef INSTANTIATE
