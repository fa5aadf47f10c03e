// Causal attention in tiles, without a T x T matrix: the plain twin, which runs for every type, size and alignment.
// attention_mma.cu does the same on tensor cores.
//
//     s = cap(scale · q·k),  p = exp(s - lse),  o = Σ p v,  lse = log Σ exp s          over the keys that a query sees
//     δ = do·o,  dp = do·v,  ds = p (dp - δ) · cap'(s) · scale,  dq = Σ ds k,  dk = Σ ds q,  dv = Σ p do
//
// Dao 2023, FlashAttention-2, arXiv:2307.08691. Query t sees keys first_key(t) ..= t + offset (common.cuh): causal,
// within its packed sample, within the window; and of the first `prefix` keys, with which all samples begin, those within
// the window. Query head h reads key head h / (n_head / n_query_groups).
//
// Layout: row t of q, k, v, o and their gradients starts at t · ld and holds the heads side by side, so all may lie in
// one q|k|v matrix. lse, delta: (n_head, tokens), f32. Sums have a fixed order: no atomics, runs repeat bit for bit.
//
// A block of 4 warps owns ROWS rows, 4 a warp, in shared memory, and passes over tiles of TILE rows of the other side,
// one per lane. Each score lives in one lane and each row in one warp, so the softmax needs no block barrier. In the
// second product lane l accumulates channels l, l + 32, ... of its warp's rows. J = head_size / 32, rounded up to 2, 4
// or 8, which names the kernel: _d64, _d128, _d256.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int OWN = 4;  // rows of a warp
constexpr int ROWS = WARPS * OWN;
constexpr int TILE = 32;

// Rows `first`.. of a head into shared memory as f32, `stride` apart; rows from `end` on are zero.
template <class T>
__device__ __forceinline__ void load_rows(float* shared, int stride, const T* head, i64 ld, int first, int count, int end,
                                          int head_size) {
    for (int i = threadIdx.x; i < count * head_size; i += blockDim.x) {
        const int row = i / head_size, channel = i % head_size;
        shared[row * stride + channel] = first + row < end ? to_float(head[(first + row) * ld + channel]) : 0.0f;
    }
}

// out[r] = own row r · this lane's row of the tile.
__device__ __forceinline__ void dot_tile(float (&out)[OWN], const float* own, const float* tile_row, int head_size) {
    for (int r = 0; r < OWN; ++r) out[r] = 0.0f;
    for (int d = 0; d < head_size; ++d) {
        const float t = tile_row[d];
        for (int r = 0; r < OWN; ++r) out[r] += own[r * head_size + d] * t;
    }
}

// acc[r] += Σ over the tile's rows of weight[r] (which lane i holds for row i) · row i.
template <int J>
__device__ __forceinline__ void add_tile(float (&acc)[OWN][J], const float (&weight)[OWN], const float* tile, int stride,
                                         int head_size) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < TILE; ++i) {
        float w[OWN];
        for (int r = 0; r < OWN; ++r) w[r] = __shfl_sync(ALL_LANES, weight[r], i);
        for (int j = 0; j < J; ++j) {
            const int d = lane + 32 * j;
            const float t = d < head_size ? tile[i * stride + d] : 0.0f;
            for (int r = 0; r < OWN; ++r) acc[r][j] += w[r] * t;
        }
    }
}

template <int J, class T>
__device__ __forceinline__ void store_row(T* row, const float (&acc)[J], float factor, int head_size) {
    for (int j = 0; j < J; ++j) {
        const int d = threadIdx.x % 32 + 32 * j;
        if (d < head_size) row[d] = from_float<T>(acc[j] * factor);
    }
}

// Grid (ceil(tokens / 16), n_head), block 128, shared memory (16 D + 32 (D | 1)) · 4 bytes.
template <int J, class T>
__device__ void attention_fwd(const T* q, const T* k, const T* v, T* o, float* lse, const int* segment_start, int tokens,
                              int offset, int prefix, int n_head, int n_query_groups, int head_size, i64 ld_q, i64 ld_k,
                              i64 ld_v, i64 ld_o, float scale, float soft_cap, int window) {
    DYNAMIC_SHARED(float, shared);
    const int stride = head_size | 1;  // odd: lanes that read one channel of 32 rows meet no bank twice
    float* q_rows = shared;
    float* tile = shared + ROWS * head_size;
    // Late rows see the most keys: they start first.
    const int first = int(gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, group = head / (n_head / n_query_groups);
    const int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * OWN;
    q += i64(head) * head_size;
    k += i64(group) * head_size;
    v += i64(group) * head_size;
    o += i64(head) * head_size;
    const int keys = tokens + offset;
    const int begin = first_key(segment_start, first, offset, window) / TILE * TILE, end = min(first + ROWS, tokens) + offset;

    float acc[OWN][J] = {}, top[OWN], sum[OWN];
    Seen seen[OWN];
    for (int r = 0; r < OWN; ++r) {
        top[r] = MINUS_INFINITY;
        sum[r] = 0.0f;
        seen[r] = seen_by(segment_start, first + own_row + r, tokens, offset, prefix, window);
    }
    load_rows(q_rows, head_size, q, ld_q, first, ROWS, tokens, head_size);
    for (int key0 = prefix > 0 ? 0 : begin; key0 < end; key0 = next_tile(key0, TILE, prefix, begin)) {
        __syncthreads();
        load_rows(tile, stride, k, ld_k, key0, TILE, keys, head_size);
        __syncthreads();
        float p[OWN];
        dot_tile(p, q_rows + own_row * head_size, tile + lane * stride, head_size);
        for (int r = 0; r < OWN; ++r) {
            const bool is_seen = seen[r].has(key0 + lane);
            const float s = is_seen ? soft_capped(p[r] * scale, soft_cap) : MINUS_INFINITY;
            const float new_top = fmaxf(top[r], warp_max(s));
            p[r] = is_seen ? __expf(s - new_top) : 0.0f;
            const float shrink = top[r] > MINUS_INFINITY ? __expf(top[r] - new_top) : 0.0f;
            sum[r] = sum[r] * shrink + warp_sum(p[r]);
            top[r] = new_top;
            for (int j = 0; j < J; ++j) acc[r][j] *= shrink;
        }
        __syncthreads();
        load_rows(tile, stride, v, ld_v, key0, TILE, keys, head_size);
        __syncthreads();
        add_tile(acc, p, tile, stride, head_size);
    }
    for (int r = 0; r < OWN; ++r) {
        const int row = first + own_row + r;
        if (row >= tokens) continue;
        store_row(o + row * ld_o, acc[r], 1.0f / sum[r], head_size);
        if (lse && lane == 0) lse[i64(head) * tokens + row] = top[r] + logf(sum[r]);
    }
}

// delta (n_head, tokens) = do · o. A warp per (row, head): grid ceil(tokens · n_head / warps of a block).
template <class T>
__device__ void attention_bwd_delta(const T* o, const T* d_o, float* delta, int tokens, int n_head, int head_size, i64 ld_o,
                                    i64 ld_do) {
    const i64 item = i64(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (item >= i64(tokens) * n_head) return;
    const i64 row = item / n_head, head = item % n_head;
    o += row * ld_o + head * head_size;
    d_o += row * ld_do + head * head_size;
    float sum = 0.0f;
    for (int d = threadIdx.x % 32; d < head_size; d += 32) sum += to_float(o[d]) * to_float(d_o[d]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[head * tokens + row] = sum;
}

// Grid (ceil(tokens / 16), n_head), block 128, shared memory (32 D + 64 (D | 1)) · 4 bytes.
template <int J, class T>
__device__ void attention_bwd_dq(const T* q, const T* k, const T* v, const T* d_o, const float* lse, const float* delta, T* dq,
                                 const int* segment_start, int tokens, int offset, int prefix, int n_head,
                                 int n_query_groups, int head_size, i64 ld_q, i64 ld_k, i64 ld_v, i64 ld_do, i64 ld_dq,
                                 float scale, float soft_cap, int window) {
    DYNAMIC_SHARED(float, shared);
    const int stride = head_size | 1;
    float* q_rows = shared;
    float* do_rows = q_rows + ROWS * head_size;
    float* k_tile = do_rows + ROWS * head_size;
    float* v_tile = k_tile + TILE * stride;
    const int first = int(gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, group = head / (n_head / n_query_groups);
    const int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * OWN;
    const int keys = tokens + offset;
    const int begin = first_key(segment_start, first, offset, window) / TILE * TILE, end = min(first + ROWS, tokens) + offset;

    float acc[OWN][J] = {}, row_lse[OWN] = {}, row_delta[OWN] = {};
    Seen seen[OWN];
    for (int r = 0; r < OWN; ++r) {
        const int row = first + own_row + r;
        seen[r] = seen_by(segment_start, row, tokens, offset, prefix, window);
        if (row >= tokens) continue;
        row_lse[r] = lse[i64(head) * tokens + row];
        row_delta[r] = delta[i64(head) * tokens + row];
    }
    load_rows(q_rows, head_size, q + i64(head) * head_size, ld_q, first, ROWS, tokens, head_size);
    load_rows(do_rows, head_size, d_o + i64(head) * head_size, ld_do, first, ROWS, tokens, head_size);
    for (int key0 = prefix > 0 ? 0 : begin; key0 < end; key0 = next_tile(key0, TILE, prefix, begin)) {
        __syncthreads();
        load_rows(k_tile, stride, k + i64(group) * head_size, ld_k, key0, TILE, keys, head_size);
        load_rows(v_tile, stride, v + i64(group) * head_size, ld_v, key0, TILE, keys, head_size);
        __syncthreads();
        float s[OWN], ds[OWN];
        dot_tile(s, q_rows + own_row * head_size, k_tile + lane * stride, head_size);
        dot_tile(ds, do_rows + own_row * head_size, v_tile + lane * stride, head_size);
        for (int r = 0; r < OWN; ++r) {
            const float capped = soft_capped(s[r] * scale, soft_cap);
            const float p = seen[r].has(key0 + lane) ? __expf(capped - row_lse[r]) : 0.0f;
            ds[r] = p * (ds[r] - row_delta[r]) * soft_cap_slope(capped, soft_cap) * scale;
        }
        add_tile(acc, ds, k_tile, stride, head_size);
    }
    for (int r = 0; r < OWN; ++r) {
        const int row = first + own_row + r;
        if (row < tokens) store_row(dq + row * ld_dq + i64(head) * head_size, acc[r], 1.0f, head_size);
    }
}

// Grid (ceil(keys / 16), n_query_groups), block 128, shared memory as for dq: here the block owns keys, and the tiles
// are of queries, those of every head that reads the key head.
template <int J, class T>
__device__ void attention_bwd_dkv(const T* q, const T* k, const T* v, const T* d_o, const float* lse, const float* delta, T* dk,
                                  T* dv, const int* segment_start, int tokens, int offset, int prefix, int n_head,
                                  int n_query_groups, int head_size, i64 ld_q, i64 ld_k, i64 ld_v, i64 ld_do, i64 ld_dk,
                                  i64 ld_dv, float scale, float soft_cap, int window) {
    DYNAMIC_SHARED(float, shared);
    const int stride = head_size | 1;
    float* k_rows = shared;
    float* v_rows = k_rows + ROWS * head_size;
    float* q_tile = v_rows + ROWS * head_size;
    float* do_tile = q_tile + TILE * stride;
    const int first = blockIdx.x * ROWS, group = blockIdx.y, heads = n_head / n_query_groups;
    const int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * OWN;

    float acc_k[OWN][J] = {}, acc_v[OWN][J] = {};
    const int keys = tokens + offset, begin = max(0, first - offset) / TILE * TILE;
    load_rows(k_rows, head_size, k + i64(group) * head_size, ld_k, first, ROWS, keys, head_size);
    load_rows(v_rows, head_size, v + i64(group) * head_size, ld_v, first, ROWS, keys, head_size);
    for (int head = group * heads; head < (group + 1) * heads; ++head) {
        for (int row0 = begin; row0 < tokens; row0 += TILE) {
            // From the first tile on whose queries see none of these keys, no later one does; the prefix any may see.
            if (first >= prefix && first_key(segment_start, row0, offset, window) >= first + ROWS) break;
            __syncthreads();
            load_rows(q_tile, stride, q + i64(head) * head_size, ld_q, row0, TILE, tokens, head_size);
            load_rows(do_tile, stride, d_o + i64(head) * head_size, ld_do, row0, TILE, tokens, head_size);
            __syncthreads();
            const int row = row0 + lane;
            const bool exists = row < tokens;
            const Seen seen = seen_by(segment_start, row, tokens, offset, prefix, window);
            const float row_lse = exists ? lse[i64(head) * tokens + row] : 0.0f;
            const float row_delta = exists ? delta[i64(head) * tokens + row] : 0.0f;
            float p[OWN], ds[OWN];
            dot_tile(p, k_rows + own_row * head_size, q_tile + lane * stride, head_size);
            dot_tile(ds, v_rows + own_row * head_size, do_tile + lane * stride, head_size);
            for (int r = 0; r < OWN; ++r) {
                const int key = first + own_row + r;
                const float capped = soft_capped(p[r] * scale, soft_cap);
                p[r] = seen.has(key) ? __expf(capped - row_lse) : 0.0f;
                ds[r] = p[r] * (ds[r] - row_delta) * soft_cap_slope(capped, soft_cap) * scale;
            }
            add_tile(acc_v, p, do_tile, stride, head_size);
            add_tile(acc_k, ds, q_tile, stride, head_size);
        }
    }
    for (int r = 0; r < OWN; ++r) {
        const int key = first + own_row + r;
        if (key >= keys) continue;
        store_row(dk + key * ld_dk + i64(group) * head_size, acc_k[r], 1.0f, head_size);
        store_row(dv + key * ld_dv + i64(group) * head_size, acc_v[r], 1.0f, head_size);
    }
}

#define INSTANTIATE_SIZE(T, type, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) attention_fwd_##type##_d##D(                                            \
        const T* q, const T* k, const T* v, T* o, float* lse, const int* segment_start, int tokens, int offset, int prefix,   \
        int n_head, int n_query_groups, int head_size, i64 ld_q, i64 ld_k, i64 ld_v, i64 ld_o, float scale, float soft_cap,   \
        int window) {                                                                                                         \
        attention_fwd<D / 32>(q, k, v, o, lse, segment_start, tokens, offset, prefix, n_head, n_query_groups, head_size, ld_q,\
                              ld_k, ld_v, ld_o, scale, soft_cap, window);                                                     \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) attention_bwd_dq_##type##_d##D(                                         \
        const T* q, const T* k, const T* v, const T* d_o, const float* lse, const float* delta, T* dq,                        \
        const int* segment_start, int tokens, int offset, int prefix, int n_head, int n_query_groups, int head_size, i64 ld_q,\
        i64 ld_k, i64 ld_v, i64 ld_do, i64 ld_dq, float scale, float soft_cap, int window) {                                  \
        attention_bwd_dq<D / 32>(q, k, v, d_o, lse, delta, dq, segment_start, tokens, offset, prefix, n_head,                 \
                                 n_query_groups, head_size, ld_q, ld_k, ld_v, ld_do, ld_dq, scale, soft_cap,                  \
                                 window);                                                                                     \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) attention_bwd_dkv_##type##_d##D(                                        \
        const T* q, const T* k, const T* v, const T* d_o, const float* lse, const float* delta, T* dk, T* dv,                 \
        const int* segment_start, int tokens, int offset, int prefix, int n_head, int n_query_groups, int head_size, i64 ld_q,\
        i64 ld_k, i64 ld_v, i64 ld_do, i64 ld_dk, i64 ld_dv, float scale, float soft_cap, int window) {                       \
        attention_bwd_dkv<D / 32>(q, k, v, d_o, lse, delta, dk, dv, segment_start, tokens, offset, prefix, n_head,            \
                                 n_query_groups, head_size, ld_q, ld_k, ld_v, ld_do, ld_dk, ld_dv, scale, soft_cap,           \
                                 window);                                                                                     \
    }
#define INSTANTIATE(T, type)                                                                                                  \
    extern "C" __global__ void attention_bwd_delta_##type(const T* o, const T* d_o, float* delta, int tokens, int n_head,     \
                                                          int head_size, i64 ld_o, i64 ld_do) {                               \
        attention_bwd_delta(o, d_o, delta, tokens, n_head, head_size, ld_o, ld_do);                                           \
    }                                                                                                                         \
    INSTANTIATE_SIZE(T, type, 64)                                                                                             \
    INSTANTIATE_SIZE(T, type, 128)                                                                                            \
    INSTANTIATE_SIZE(T, type, 256)
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
#undef INSTANTIATE_SIZE
