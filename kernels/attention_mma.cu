// Causal attention on tensor cores, bf16 and f16: the same formulas, layout and arguments as the plain twin in
// attention.cu, which it must agree with. Dao 2023, FlashAttention-2, arXiv:2307.08691.
//
// Needs head_size and every ld to be multiples of 8 and pointers aligned to 16 bytes; else use the plain twin. Names end
// in the head size that tiles are padded to: _d64, _d128, _d256. delta comes from attention_bwd_delta.
//
// A block of 4 warps owns 64 rows (queries, or keys in dkv), 16 a warp, in shared memory, and passes over tiles of the
// other side. All products are of two kinds: own rows with rows of the tile (`multiply_rows`), whose result stays in
// registers, and that result with the tile (`multiply_tile`). A thread of a warp holds rows g and g + 8, g = lane / 4, of
// a result, and columns 2 (lane % 4), + 1 of every 8 columns. p and ds are rounded to the type before the second product.
#include "common.cuh"

constexpr int OWN_ROWS = 64;

// Rows of a tile: as many as registers and 99 KB of shared memory (sm_86, sm_89) allow.
template <int D>
constexpr int FORWARD_TILE = D == 256 ? 32 : 64;
template <int D>
constexpr int BACKWARD_TILE = D == 64 ? 64 : 32;
// Where a row of D channels has one of them in shared memory. Each of 8 rows has its chunks of 16 bytes in another order, so that
// one chunk of all lies in different banks; without room between rows, two blocks fit where there are 100 KB (sm_86, sm_89).
template <int D>
__device__ __forceinline__ int place(int row, int channel) {
    return row * D + (channel ^ row % 8 * 8);
}

// Starts copying rows first.. of a head; what lies beyond `end` or head_size becomes zero.
template <int D, int ROWS, class T>
__device__ __forceinline__ void copy_rows(T* shared, const T* head, i64 ld, int first, int end, int head_size) {
    constexpr int CHUNKS = D / 8;
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += 128) {
        const int row = i / CHUNKS, channel = i % CHUNKS * 8;
        const bool valid = first + row < end && channel < head_size;
        copy_async(shared + place<D>(row, channel), valid ? head + (first + row) * ld + channel : head, valid);
    }
}

// out (16, N) = own (16, D) tileᵀ, tile (N, D), of which the first N rows count.
template <int D, int N, class T>
__device__ __forceinline__ void multiply_rows(float (&out)[N / 8][4], const T* own, const T* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
        for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < D; k += 16) {
        uint32_t a[4];
        load_matrices<false>(a, own + place<D>(lane % 16, k ^ lane / 16 * 8));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t b[4];
            load_matrices<false>(b, tile + place<D>(n + lane / 16 * 8 + lane % 8, k ^ lane / 8 % 2 * 8));
            mma_16x8x16<T>(out[n / 8], a, b[0], b[1]);
            mma_16x8x16<T>(out[n / 8 + 1], a, b[2], b[3]);
        }
    }
}

// acc (16, C) += weight (16, N) tile (N, C), C columns of the tile. A result's fragments are an operand's, two by two.
template <int D, int N, int C, class T>
__device__ __forceinline__ void multiply_tile(float (&acc)[C / 8][4], const float (&weight)[N / 8][4], const T* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N; k += 16) {
        const float(&left)[4] = weight[k / 8];
        const float(&right)[4] = weight[k / 8 + 1];
        const uint32_t a[4] = {pack_two<T>(left[0], left[1]), pack_two<T>(left[2], left[3]), pack_two<T>(right[0], right[1]),
                               pack_two<T>(right[2], right[3])};
#pragma unroll
        for (int c = 0; c < C; c += 16) {
            uint32_t b[4];
            load_matrices<true>(b, tile + place<D>(k + lane % 16, c ^ lane / 16 * 8));
            mma_16x8x16<T>(acc[c / 8], a, b[0], b[1]);
            mma_16x8x16<T>(acc[c / 8 + 1], a, b[2], b[3]);
        }
    }
}

// Over the four lanes that hold a row.
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(ALL_LANES, v, 1);
    return v + __shfl_xor_sync(ALL_LANES, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 1));
    return fmaxf(v, __shfl_xor_sync(ALL_LANES, v, 2));
}

// Calls f with whether every key of a tile is seen and whether scores are capped, as constants: a branch or a tangent for
// each score would take as long as the products.
template <bool VALUE>
struct Constant {
    static constexpr bool value = VALUE;
};
template <class F>
__device__ __forceinline__ void with_rule(bool all_seen, bool capped, F f) {
    if (capped)
        f(Constant<false>(), Constant<true>());
    else if (all_seen)
        f(Constant<true>(), Constant<false>());
    else
        f(Constant<false>(), Constant<false>());
}

// Rows first.. of acc, times a factor for each of this thread's two rows, columns `from`.. of a head.
template <int C, class T>
__device__ __forceinline__ void store_rows(T* head, i64 ld, int first, int end, int from, int head_size, const float (&acc)[C / 8][4],
                                           float factor0, float factor1) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first + lane / 4 + half * 8;
        if (row >= end) continue;
        const float factor = half ? factor1 : factor0;
#pragma unroll
        for (int j = 0; j < C / 8; ++j) {
            const int channel = from + j * 8 + lane % 4 * 2;
            if (channel >= head_size) continue;
            *reinterpret_cast<uint32_t*>(head + row * ld + channel) =
                pack_two<T>(acc[j][half * 2] * factor, acc[j][half * 2 + 1] * factor);
        }
    }
}

// Gives what this block has of its rows to the last block of them, which goes on with what all have together: true there.
template <int N>
__device__ __forceinline__ bool add_shares(float (&acc)[N][4], float (&top)[2], float (&sum)[2], float* partial, int* done) {
    constexpr int VALUES = N * 4 + 4;
    const int shares = gridDim.z, rows = blockIdx.y * gridDim.x + blockIdx.x;
    partial += i64(rows) * shares * VALUES * 128 + threadIdx.x;
    const auto at = [&](int share, int value) { return partial + (share * VALUES + value) * 128; };
#pragma unroll
    for (int i = 0; i < N * 4; ++i) *at(blockIdx.z, i) = acc[i / 4][i % 4];
    for (int half = 0; half < 2; ++half) {
        *at(blockIdx.z, N * 4 + half) = top[half];
        *at(blockIdx.z, N * 4 + 2 + half) = sum[half];
    }
    if (!is_last_share(done + rows, shares)) return false;
    for (int half = 0; half < 2; ++half)
        for (int s = 0; s < shares; ++s) top[half] = fmaxf(top[half], __ldcg(at(s, N * 4 + half)));
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < N * 4; ++i) acc[i / 4][i % 4] = 0.0f;
    for (int s = 0; s < shares; ++s) {
        float factor[2];
        for (int half = 0; half < 2; ++half) {
            const float its_top = __ldcg(at(s, N * 4 + half));
            factor[half] = its_top > MINUS_INFINITY ? __expf(its_top - top[half]) : 0.0f;
            sum[half] += factor[half] * __ldcg(at(s, N * 4 + 2 + half));
        }
#pragma unroll
        for (int i = 0; i < N * 4; ++i) acc[i / 4][i % 4] += factor[i % 4 / 2] * __ldcg(at(s, i));
    }
    return true;
}

// Grid (ceil(tokens / 64), n_head, shares), block 128, shared memory (64 + 2 · FORWARD_TILE) · D · 2 bytes. With more than one share,
// as for a few queries of many keys, each passes over its part of the tiles; what they have goes through `partial`
// (gridDim.x · gridDim.y · shares · 128 · (D / 2 + 4)), and the last block of some rows puts it together; `done`, a zero for each, counts.
template <int D, class T>
__device__ void attention_mma_fwd(const T* q, const T* k, const T* v, T* o, float* lse, const int* segment_start, int tokens,
                                  int offset, int prefix, int n_head, int n_query_groups, int head_size, i64 ld_q, i64 ld_k,
                                  i64 ld_v, i64 ld_o, float scale, float soft_cap, int window, float* partial, int* done) {
    constexpr int TILE = FORWARD_TILE<D>;
    DYNAMIC_SHARED(T, shared);
    T* q_rows = shared;
    T* k_tile = q_rows + OWN_ROWS * D;
    T* v_tile = k_tile + TILE * D;
    const int first = int(gridDim.x - 1 - blockIdx.x) * OWN_ROWS, head = blockIdx.y, group = head / (n_head / n_query_groups);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, keys = tokens + offset;
    k += i64(group) * head_size;
    v += i64(group) * head_size;
    const int begin = first_key(segment_start, first, offset, window) / TILE * TILE, end = min(first + OWN_ROWS, tokens) + offset;

    float acc[D / 8][4] = {}, top[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {};
    int row[2];
    Seen seen[2];
    for (int half = 0; half < 2; ++half) {
        row[half] = first + own + lane / 4 + half * 8;
        seen[half] = seen_by(segment_start, row[half], tokens, offset, prefix, window);
    }
    const Seen by_all = seen_by_all(segment_start, first + own, 16, tokens, offset, window);
    copy_rows<D, OWN_ROWS>(q_rows, q + i64(head) * head_size, ld_q, first, tokens, head_size);
    const int shares = gridDim.z, share = blockIdx.z;
    const auto after = [&](int key0, int tiles) {
        for (; tiles > 0; --tiles) key0 = next_tile(key0, TILE, prefix, begin);
        return key0;
    };
    const int start = after(prefix > 0 ? 0 : begin, share);
    copy_rows<D, TILE>(k_tile, k, ld_k, start, keys, head_size);
    copy_commit();
    for (int key0 = start; key0 < end; key0 = after(key0, shares)) {
        copy_wait();
        __syncthreads();  // keys are there, and everyone is done with the last tile's values
        copy_rows<D, TILE>(v_tile, v, ld_v, key0, keys, head_size);
        copy_commit();
        float p[TILE / 8][4];
        multiply_rows<D, TILE>(p, q_rows + own * D, k_tile);
        float new_top[2] = {top[0], top[1]};
        with_rule(by_all.has_all(key0, TILE), soft_cap > 0.0f, [&](auto all, auto capped) {
#pragma unroll
            for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = key0 + j * 8 + lane % 4 * 2 + i % 2;
                    const float score = p[j][i] * scale, s = capped.value ? soft_capped(score, soft_cap) : score;
                    p[j][i] = all.value || seen[i / 2].has(key) ? s : MINUS_INFINITY;
                    new_top[i / 2] = fmaxf(new_top[i / 2], p[j][i]);
                }
        });
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            new_top[half] = quad_max(new_top[half]);
            const float shrink = top[half] > MINUS_INFINITY ? __expf(top[half] - new_top[half]) : 0.0f;
            top[half] = new_top[half];
            sum[half] *= shrink;
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                acc[j][half * 2] *= shrink;
                acc[j][half * 2 + 1] *= shrink;
            }
        }
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                p[j][i] = p[j][i] == MINUS_INFINITY ? 0.0f : __expf(p[j][i] - top[i / 2]);  // NaN stays
                sum[i / 2] += p[j][i];
            }
        copy_wait();
        __syncthreads();  // values are there, and everyone is done with the keys
        const int next = after(key0, shares);
        if (next < end) copy_rows<D, TILE>(k_tile, k, ld_k, next, keys, head_size);
        copy_commit();
        multiply_tile<D, TILE, D>(acc, p, v_tile);
    }
    if (shares > 1) {
        copy_wait();  // copies that no tile came for must not outlive the block
        if (!add_shares(acc, top, sum, partial, done)) return;
    }
    for (int half = 0; half < 2; ++half) {
        sum[half] = quad_sum(sum[half]);
        if (lse && lane % 4 == 0 && row[half] < tokens) lse[i64(head) * tokens + row[half]] = top[half] + logf(sum[half]);
    }
    store_rows<D>(o + i64(head) * head_size, ld_o, first + own, tokens, 0, head_size, acc, 1.0f / sum[0], 1.0f / sum[1]);
}

// Grid (ceil(tokens / 64), n_head), block 128, shared memory (128 + 2 · BACKWARD_TILE) · D · 2 bytes.
template <int D, class T>
__device__ void attention_mma_bwd_dq(const T* q, const T* k, const T* v, const T* d_o, const float* lse, const float* delta, T* dq,
                                     const int* segment_start, int tokens, int offset, int prefix, int n_head,
                                     int n_query_groups, int head_size, i64 ld_q, i64 ld_k, i64 ld_v, i64 ld_do, i64 ld_dq,
                                     float scale, float soft_cap, int window) {
    constexpr int TILE = BACKWARD_TILE<D>;
    DYNAMIC_SHARED(T, shared);
    T* q_rows = shared;
    T* do_rows = q_rows + OWN_ROWS * D;
    T* k_tile = do_rows + OWN_ROWS * D;
    T* v_tile = k_tile + TILE * D;
    const int first = int(gridDim.x - 1 - blockIdx.x) * OWN_ROWS, head = blockIdx.y, group = head / (n_head / n_query_groups);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
    const int keys = tokens + offset;
    const int begin = first_key(segment_start, first, offset, window) / TILE * TILE, end = min(first + OWN_ROWS, tokens) + offset;

    float acc[D / 8][4] = {}, row_lse[2] = {}, row_delta[2] = {};
    Seen seen[2];
    for (int half = 0; half < 2; ++half) {
        const int row = first + own + lane / 4 + half * 8;
        seen[half] = seen_by(segment_start, row, tokens, offset, prefix, window);
        if (row >= tokens) continue;
        row_lse[half] = lse[i64(head) * tokens + row];
        row_delta[half] = delta[i64(head) * tokens + row];
    }
    const Seen by_all = seen_by_all(segment_start, first + own, 16, tokens, offset, window);
    copy_rows<D, OWN_ROWS>(q_rows, q + i64(head) * head_size, ld_q, first, tokens, head_size);
    copy_rows<D, OWN_ROWS>(do_rows, d_o + i64(head) * head_size, ld_do, first, tokens, head_size);
    for (int key0 = prefix > 0 ? 0 : begin; key0 < end; key0 = next_tile(key0, TILE, prefix, begin)) {
        __syncthreads();
        copy_rows<D, TILE>(k_tile, k + i64(group) * head_size, ld_k, key0, keys, head_size);
        copy_rows<D, TILE>(v_tile, v + i64(group) * head_size, ld_v, key0, keys, head_size);
        copy_commit();
        copy_wait();
        __syncthreads();
        float s[TILE / 8][4], ds[TILE / 8][4];
        multiply_rows<D, TILE>(s, q_rows + own * D, k_tile);
        multiply_rows<D, TILE>(ds, do_rows + own * D, v_tile);
        with_rule(by_all.has_all(key0, TILE), soft_cap > 0.0f, [&](auto all, auto capped) {
#pragma unroll
            for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = key0 + j * 8 + lane % 4 * 2 + i % 2;
                    const float score = capped.value ? soft_capped(s[j][i] * scale, soft_cap) : s[j][i] * scale;
                    const float slope = capped.value ? soft_cap_slope(score, soft_cap) * scale : scale;
                    const float p = all.value || seen[i / 2].has(key) ? __expf(score - row_lse[i / 2]) : 0.0f;
                    ds[j][i] = p * (ds[j][i] - row_delta[i / 2]) * slope;
                }
        });
        multiply_tile<D, TILE, D>(acc, ds, k_tile);
    }
    store_rows<D>(dq + i64(head) * head_size, ld_dq, first + own, tokens, 0, head_size, acc, 1.0f, 1.0f);
}

// Grid (ceil(keys / 64), n_query_groups · shares, D == 256 ? 2 : 1), block 128, shared memory as for dq. The block owns keys and
// passes over the queries of a share of the heads that read them. With 256 channels each of two blocks sums half of them: all
// would not fit in registers. With more than one share, where there are few groups, sums go through `partial` (gridDim.x · gridDim.y ·
// gridDim.z · 128 · channels of a block), and the last block of a group adds them up in their order; `done`, a zero for each, counts.
template <int D, class T>
__device__ void attention_mma_bwd_dkv(const T* q, const T* k, const T* v, const T* d_o, const float* lse, const float* delta, T* dk,
                                      T* dv, const int* segment_start, int tokens, int offset, int prefix, int n_head,
                                      int n_query_groups, int head_size, i64 ld_q, i64 ld_k, i64 ld_v, i64 ld_do, i64 ld_dk,
                                      i64 ld_dv, float scale, float soft_cap, int window, float* partial, int* done) {
    constexpr int TILE = BACKWARD_TILE<D>, C = D == 256 ? 128 : D;
    DYNAMIC_SHARED(T, shared);
    T* k_rows = shared;
    T* v_rows = k_rows + OWN_ROWS * D;
    T* q_tile = v_rows + OWN_ROWS * D;
    T* do_tile = q_tile + TILE * D;
    const int shares = gridDim.y / n_query_groups, group = blockIdx.y / shares, share = blockIdx.y % shares;
    const int first = blockIdx.x * OWN_ROWS, heads = n_head / n_query_groups, from = blockIdx.z * C;
    const int first_head = group * heads + share * heads / shares, end_head = group * heads + (share + 1) * heads / shares;
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;

    float acc_k[C / 8][4] = {}, acc_v[C / 8][4] = {};
    const int keys = tokens + offset, begin = max(0, first - offset) / TILE * TILE;
    copy_rows<D, OWN_ROWS>(k_rows, k + i64(group) * head_size, ld_k, first, keys, head_size);
    copy_rows<D, OWN_ROWS>(v_rows, v + i64(group) * head_size, ld_v, first, keys, head_size);
    for (int head = first_head; head < end_head; ++head) {
        for (int row0 = begin; row0 < tokens; row0 += TILE) {
            // From the first tile on whose queries see none of these keys, no later one does; the prefix any may see.
            if (first >= prefix && first_key(segment_start, row0, offset, window) >= first + OWN_ROWS) break;
            __syncthreads();
            copy_rows<D, TILE>(q_tile, q + i64(head) * head_size, ld_q, row0, tokens, head_size);
            copy_rows<D, TILE>(do_tile, d_o + i64(head) * head_size, ld_do, row0, tokens, head_size);
            copy_commit();
            // What a lane knows of 32 rows, one each, it tells the others later.
            float lse_of[TILE / 32], delta_of[TILE / 32];
            int from_of[TILE / 32], prefix_from_of[TILE / 32];
            for (int part = 0; part < TILE / 32; ++part) {
                const int row = row0 + part * 32 + lane;
                const Seen seen = seen_by(segment_start, row, tokens, offset, prefix, window);
                lse_of[part] = row < tokens ? lse[i64(head) * tokens + row] : 0.0f;
                delta_of[part] = row < tokens ? delta[i64(head) * tokens + row] : 0.0f;
                from_of[part] = row < tokens ? seen.from : keys;
                prefix_from_of[part] = row < tokens ? seen.prefix_from : prefix;
            }
            const bool by_all = seen_by_all(segment_start, row0, TILE, tokens, offset, window).has_all(first + own, 16);
            copy_wait();
            __syncthreads();
            float p[TILE / 8][4], ds[TILE / 8][4];
            multiply_rows<D, TILE>(p, k_rows + own * D, q_tile);
            multiply_rows<D, TILE>(ds, v_rows + own * D, do_tile);
            with_rule(by_all, soft_cap > 0.0f, [&](auto all, auto capped) {
#pragma unroll
                for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
                    for (int column = 0; column < 2; ++column) {
                        const int part = j / 4, source = j % 4 * 8 + lane % 4 * 2 + column, row = row0 + part * 32 + source;
                        const float row_lse = __shfl_sync(ALL_LANES, lse_of[part], source);
                        const float row_delta = __shfl_sync(ALL_LANES, delta_of[part], source);
                        Seen seen = {0, row + offset, 0, prefix};
                        if (!all.value) {
                            seen.from = __shfl_sync(ALL_LANES, from_of[part], source);
                            seen.prefix_from = __shfl_sync(ALL_LANES, prefix_from_of[part], source);
                        }
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int i = half * 2 + column, key = first + own + lane / 4 + half * 8;
                            const float score = capped.value ? soft_capped(p[j][i] * scale, soft_cap) : p[j][i] * scale;
                            const float slope = capped.value ? soft_cap_slope(score, soft_cap) * scale : scale;
                            p[j][i] = all.value || seen.has(key) ? __expf(score - row_lse) : 0.0f;
                            ds[j][i] = p[j][i] * (ds[j][i] - row_delta) * slope;
                        }
                    }
            });
            multiply_tile<D, TILE, C>(acc_v, p, do_tile + from);
            multiply_tile<D, TILE, C>(acc_k, ds, q_tile + from);
        }
    }
    copy_commit();
    copy_wait();  // copies of rows that no query came for must not outlive the block
    if (shares > 1) {
        const int sum = (blockIdx.z * n_query_groups + group) * gridDim.x + blockIdx.x;
        partial += i64(sum) * shares * 128 * C + threadIdx.x;
#pragma unroll
        for (int i = 0; i < C; ++i) {
            const float(&acc)[C / 8][4] = i < C / 2 ? acc_k : acc_v;
            partial[(share * C + i) * 128] = acc[i % (C / 2) / 4][i % 4];
        }
        if (!is_last_share(done + sum, shares)) return;
#pragma unroll
        for (int i = 0; i < C; ++i) {
            float(&acc)[C / 8][4] = i < C / 2 ? acc_k : acc_v;
            float all = 0.0f;
            for (int s = 0; s < shares; ++s) all += __ldcg(partial + (s * C + i) * 128);
            acc[i % (C / 2) / 4][i % 4] = all;
        }
    }
    store_rows<C>(dk + i64(group) * head_size, ld_dk, first + own, keys, from, head_size, acc_k, 1.0f, 1.0f);
    store_rows<C>(dv + i64(group) * head_size, ld_dv, first + own, keys, from, head_size, acc_v, 1.0f, 1.0f);
}

#define INSTANTIATE_SIZE(T, type, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) attention_mma_fwd_##type##_d##D(                                        \
        const T* q, const T* k, const T* v, T* o, float* lse, const int* segment_start, int tokens, int offset, int prefix,   \
        int n_head, int n_query_groups, int head_size, i64 ld_q, i64 ld_k, i64 ld_v, i64 ld_o, float scale, float soft_cap,   \
        int window, float* partial, int* done) {                                                                              \
        attention_mma_fwd<D>(q, k, v, o, lse, segment_start, tokens, offset, prefix, n_head, n_query_groups, head_size, ld_q, \
                              ld_k, ld_v, ld_o, scale, soft_cap, window, partial, done);                                      \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) attention_mma_bwd_dq_##type##_d##D(                                     \
        const T* q, const T* k, const T* v, const T* d_o, const float* lse, const float* delta, T* dq,                        \
        const int* segment_start, int tokens, int offset, int prefix, int n_head, int n_query_groups, int head_size, i64 ld_q,\
        i64 ld_k, i64 ld_v, i64 ld_do, i64 ld_dq, float scale, float soft_cap, int window) {                                  \
        attention_mma_bwd_dq<D>(q, k, v, d_o, lse, delta, dq, segment_start, tokens, offset, prefix, n_head,                  \
                                 n_query_groups, head_size, ld_q, ld_k, ld_v, ld_do, ld_dq, scale, soft_cap,                  \
                                 window);                                                                                     \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) attention_mma_bwd_dkv_##type##_d##D(                                    \
        const T* q, const T* k, const T* v, const T* d_o, const float* lse, const float* delta, T* dk, T* dv,                 \
        const int* segment_start, int tokens, int offset, int prefix, int n_head, int n_query_groups, int head_size, i64 ld_q,\
        i64 ld_k, i64 ld_v, i64 ld_do, i64 ld_dk, i64 ld_dv, float scale, float soft_cap, int window, float* partial,         \
        int* done) {                                                                                                          \
        attention_mma_bwd_dkv<D>(q, k, v, d_o, lse, delta, dk, dv, segment_start, tokens, offset, prefix, n_head,             \
                                 n_query_groups, head_size, ld_q, ld_k, ld_v, ld_do, ld_dk, ld_dv, scale, soft_cap,           \
                                 window, partial, done);                                                                      \
    }
#define INSTANTIATE(T, type)      \
    INSTANTIATE_SIZE(T, type, 64) \
    INSTANTIATE_SIZE(T, type, 128) \
    INSTANTIATE_SIZE(T, type, 256)
INSTANTIATE(__nv_bfloat16, bf16)
INSTANTIATE(__half, f16)
#undef INSTANTIATE
#undef INSTANTIATE_SIZE
