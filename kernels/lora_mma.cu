// The products of a linear layer's adapters by tensor cores, bf16 and f16, all of the layer's adapters and dropout in one launch
// each: for few tokens a step's time is that of its launches.
//
//     h = drop(x) Aᵀ        y[:, columns] += s h[:, ranks] Bᵀ                    Hu et al. 2021, arXiv:2106.09685
//     dh[:, ranks] = s dy[:, columns] B        dB += s dyᵀ h        dA += dhᵀ drop(x)        dx += drop(dh A)
//
// Sizes: x and dx (tokens, cols), y and dy (tokens, outs), h and dh (tokens, all_ranks), A (all_ranks, cols), the A's of all adapters
// below one another, and for each adapter B (columns, ranks). cols, and where an adapter's columns begin and how many there are, are
// multiples of 8, ranks of 2; all_ranks is at most 64; matrices are aligned to 16 bytes. A and B are of the activations'
// type, their gradients f32. Fragments are those of mma.m16n8k16: which of the summed elements a lane brings is free as
// long as both sides agree, so a lane takes eight neighbours of 32 where both sides have them in a row.
#include "lora.cuh"

constexpr int MOST_RANKS = 64;
typedef Pack<uint32_t, 4> Eight;  // eight neighbours of a row

// One adapter, as src/ops/lora.rs writes it: where its B begins among all parameters, and its part of y and h.
struct Adapter {
    i64 b;
    int column, columns, rank, ranks;
    float scale;
    int unused;
};

template <class T>
__device__ __forceinline__ uint32_t bits_of(T v) {
    union {
        T v;
        uint16_t bits;
    } u;
    u.v = v;
    return u.bits;
}

// x times the mask of the elements from `index` on.
template <class T>
__device__ __forceinline__ Eight dropped(Eight x, const Mask& mask, i64 index) {
    if (!mask.limit) return x;
    union {
        Eight words;
        Pack<T, 8> v;
    } u;
    u.words = x;
    for (int j = 0; j < 8; ++j) u.v.v[j] = from_float<T>(to_float(u.v.v[j]) * mask.at(index + j));
    return u.words;
}

// out (tokens, ranks) = scale · left (tokens, cols) rightᵀ, right (ranks, cols), for 16 tokens from 16 blockIdx.x on. A block of 8 warps
// shares the columns. `read(rank, col)` gives eight columns of `right`, `masked(eight, row, col)` changes those of `left`.
template <class T, class Read, class Masked>
__device__ void narrow_product(const T* left, i64 ld, int tokens, int cols, int ranks, T* out, i64 ld_out, float scale, Read read, Masked masked) {
    __shared__ float partial[8][16][MOST_RANKS];
    struct Chunk {
        Eight left[2], right[MOST_RANKS / 8];
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
    const int rows[2] = {int(blockIdx.x) * 16 + group, int(blockIdx.x) * 16 + group + 8};
    const auto fetch = [&](int col) {
        Chunk chunk = {};
        if (col >= cols) return chunk;
        for (int half = 0; half < 2; ++half)
            if (rows[half] < tokens) chunk.left[half] = *reinterpret_cast<const Eight*>(left + rows[half] * ld + col);
#pragma unroll
        for (int n = 0; n < MOST_RANKS / 8; ++n)
            if (n * 8 + group < ranks) chunk.right[n] = read(n * 8 + group, col);
        return chunk;
    };
    float sums[MOST_RANKS / 8][4] = {};
    Chunk next = fetch(warp * 32 + quarter * 8);
    for (int first = warp * 32; first < cols; first += 8 * 32) {
        Chunk now = next;
        next = fetch(first + 8 * 32 + quarter * 8);  // while this one is multiplied
        for (int half = 0; half < 2; ++half) now.left[half] = masked(now.left[half], rows[half], first + quarter * 8);
        const uint32_t(&top)[4] = now.left[0].v;
        const uint32_t(&low)[4] = now.left[1].v;
#pragma unroll
        for (int n = 0; n < MOST_RANKS / 8; ++n) {
            if (n * 8 >= ranks) break;
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                mma_16x8x16<T>(sums[n], {top[i], low[i], top[i + 1], low[i + 1]}, now.right[n].v[i], now.right[n].v[i + 1]);
        }
    }
#pragma unroll
    for (int n = 0; n < MOST_RANKS / 8; ++n)
        for (int i = 0; i < 4; ++i) partial[warp][group + i / 2 * 8][n * 8 + quarter * 2 + i % 2] = sums[n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * ranks; i += 256) {
        const int row = i / ranks, rank = i % ranks, token = blockIdx.x * 16 + row;
        if (token >= tokens) return;
        float sum = 0.0f;
        for (int w = 0; w < 8; ++w) sum += partial[w][row][rank];
        out[token * ld_out + rank] = from_float<T>(scale * sum);
    }
}

// h = drop(x) Aᵀ. Grid ceil(tokens / 16), block 256.
template <class T>
__device__ void down(const T* x, const T* a, T* h, int tokens, int cols, int all_ranks, Mask mask) {
    const auto read = [=](int rank, int col) { return *reinterpret_cast<const Eight*>(a + i64(rank) * cols + col); };
    const auto masked = [=](Eight x, int row, int col) { return dropped<T>(x, mask, i64(row) * cols + col); };
    narrow_product(x, cols, tokens, cols, all_ranks, h, all_ranks, 1.0f, read, masked);
}

// dh[:, ranks] = s dy[:, columns] B. Grid (ceil(tokens / 16), adapters), block 256.
template <class T>
__device__ void down_grad(const T* dy, const T* parameters, const Adapter* adapters, T* dh, int tokens, int all_ranks, i64 ld) {
    const Adapter adapter = adapters[blockIdx.y];
    const T* b = parameters + adapter.b;
    const auto read = [=](int rank, int col) {
        Eight eight;
        for (int i = 0; i < 4; ++i) {
            const T* pair = b + i64(col + 2 * i) * adapter.ranks + rank;
            eight.v[i] = bits_of(pair[0]) | bits_of(pair[adapter.ranks]) << 16;
        }
        return eight;
    };
    const auto as_it_is = [](Eight dy, int, int) { return dy; };
    narrow_product(dy + adapter.column, ld, tokens, adapter.columns, adapter.ranks, dh + adapter.rank, all_ranks, adapter.scale, read, as_it_is);
}

// y[:, columns] += s h[:, ranks] Bᵀ. Grid (ceil(tokens / 64), tiles of 64 columns of all adapters), block 128: 16 tokens a warp.
template <class T>
__device__ void up(const T* h, const T* parameters, const Adapter* adapters, T* y, int tokens, int all_ranks, i64 ld) {
    const int lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
    int tile = blockIdx.y;
    for (int tiles; tile >= (tiles = (adapters->columns + 63) / 64); tile -= tiles) ++adapters;
    const Adapter adapter = *adapters;
    const T* b = parameters + adapter.b;
    const int first = blockIdx.x * 64 + threadIdx.x / 32 * 16;
    float sums[8][4] = {};
    for (int k = 0; k < adapter.ranks; k += 16) {
        uint32_t left[4] = {}, right[8][2] = {};
        for (int i = 0; i < 4; ++i) {
            const int row = first + group + i % 2 * 8, rank = k + i / 2 * 8 + quarter * 2;
            if (row < tokens && rank < adapter.ranks)
                left[i] = *reinterpret_cast<const uint32_t*>(h + i64(row) * all_ranks + adapter.rank + rank);
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            // A lane's columns of four tiles are eight neighbours.
            const int col = tile * 64 + n / 4 * 32 + group / 2 * 8 + n % 4 * 2 + group % 2;
            for (int i = 0; i < 2; ++i) {
                const int rank = k + i * 8 + quarter * 2;
                if (col < adapter.columns && rank < adapter.ranks)
                    right[n][i] = *reinterpret_cast<const uint32_t*>(b + i64(col) * adapter.ranks + rank);
            }
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) mma_16x8x16<T>(sums[n], left, right[n][0], right[n][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = first + group + i / 2 * 8, half = i % 2, col = tile * 64 + half * 32 + quarter * 8;
        if (row >= tokens || col >= adapter.columns) continue;
        T* at = y + row * ld + adapter.column + col;
        float v[8];
        load<8>(at, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] += adapter.scale * sums[half * 4 + j / 2][i / 2 * 2 + j % 2];
        store<8>(at, v);
    }
}

// --- Gradients: dA and dx for 64 columns of x, or dB for 64 columns of one adapter ---

constexpr int TOKEN_TILE = 64;  // tokens at a time
constexpr int WIDTH = 64 + 8;   // elements from a row to the next in shared memory: 8 rows of a matrix in different banks

// One block's shared memory.
template <class T>
struct alignas(16) Tiles {
    T wide[TOKEN_TILE * WIDTH];     // drop(x) or dy
    T narrow[TOKEN_TILE * WIDTH];   // dh or h
    T a[MOST_RANKS * WIDTH];  // A
    uint8_t kept[TOKEN_TILE * 8];   // the mask of eight columns a byte
};

// narrow (TOKEN_TILE, ranks) = rows first.. of h, zero up to the next multiple of 16 ranks and behind the last token.
template <class T>
__device__ __forceinline__ void load_narrow(T* narrow, const T* h, i64 ld, int first, int tokens, int ranks) {
    const int pairs = (ranks + 15) / 16 * 8;
    for (int i = threadIdx.x; i < TOKEN_TILE * pairs; i += 128) {
        const int row = i / pairs, rank = i % pairs * 2;
        uint32_t two = 0;
        if (first + row < tokens && rank < ranks) two = *reinterpret_cast<const uint32_t*>(h + i64(first + row) * ld + rank);
        *reinterpret_cast<uint32_t*>(narrow + row * WIDTH + rank) = two;
    }
}

// wide (TOKEN_TILE, 64) = rows first.. and columns col.. of a matrix of `cols`, times the mask, which is noted.
template <class T>
__device__ __forceinline__ void load_wide(Tiles<T>& tiles, const T* x, i64 ld, int first, int tokens, int col, int cols, const Mask& mask) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i * 16 + threadIdx.x / 8, channel = threadIdx.x % 8 * 8;
        union {
            Eight words;
            Pack<T, 8> v;
        } u = {};
        uint32_t kept = 0xff;
        if (first + row < tokens && col + channel < cols) {
            const i64 at = (first + row) * ld + col + channel;
            u.words = *reinterpret_cast<const Eight*>(x + at);
            for (int j = 0; mask.limit && j < 8; ++j) {
                const float factor = mask.at(at + j);
                if (factor == 0.0f) kept &= ~(1u << j);
                u.v.v[j] = from_float<T>(to_float(u.v.v[j]) * factor);
            }
        }
        *reinterpret_cast<Eight*>(tiles.wide + row * WIDTH + channel) = u.words;
        tiles.kept[row * 8 + channel / 8] = uint8_t(kept);
    }
}

// sums (16 columns of this warp, ranks) += wideᵀ narrow.
template <class T>
__device__ __forceinline__ void multiply_wide(float (&sums)[MOST_RANKS / 8][4], const Tiles<T>& tiles, int ranks) {
    const int lane = threadIdx.x % 32, columns = threadIdx.x / 32 * 16;
#pragma unroll
    for (int k = 0; k < TOKEN_TILE; k += 16) {
        uint32_t left[4];
        load_matrices<true>(left, tiles.wide + (k + lane / 16 * 8 + lane % 8) * WIDTH + columns + lane / 8 % 2 * 8);
#pragma unroll
        for (int n = 0; n < MOST_RANKS; n += 16) {
            if (n >= ranks) break;
            uint32_t right[4];
            load_matrices<true>(right, tiles.narrow + (k + lane % 16) * WIDTH + n + lane / 16 * 8);
            mma_16x8x16<T>(sums[n / 8], left, right[0], right[1]);
            mma_16x8x16<T>(sums[n / 8 + 1], left, right[2], right[3]);
        }
    }
}

// dx (16 tokens of this warp, 64 columns) += drop(narrow A).
template <class T>
__device__ __forceinline__ void add_to_dx(T* dx, i64 ld, const Tiles<T>& tiles, int first, int tokens, int col, int cols, int ranks, float scale) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
    float sums[8][4] = {};
#pragma unroll
    for (int k = 0; k < MOST_RANKS; k += 16) {
        if (k >= ranks) break;
        uint32_t left[4];
        load_matrices<false>(left, tiles.narrow + (own + lane % 16) * WIDTH + k + lane / 16 * 8);
#pragma unroll
        for (int c = 0; c < 64; c += 16) {
            uint32_t right[4];
            load_matrices<true>(right, tiles.a + (k + lane % 16) * WIDTH + c + lane / 16 * 8);
            mma_16x8x16<T>(sums[c / 8], left, right[0], right[1]);
            mma_16x8x16<T>(sums[c / 8 + 1], left, right[2], right[3]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = own + lane / 4 + half * 8;
        if (first + row >= tokens) continue;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const int channel = c * 8 + lane % 4 * 2;
            if (col + channel >= cols) continue;
            T* at = dx + (first + row) * ld + col + channel;
            float v[2];
            load<2>(at, v);
            for (int j = 0; j < 2; ++j)
                if (tiles.kept[row * 8 + c] >> (channel % 8 + j) & 1) v[j] += sums[c][half * 2 + j] * scale;
            store<2>(at, v);
        }
    }
}

// A's gradients (f32) are those of all adapters below one another; dx may be null. Grid: ceil(cols / 64) blocks for dA and dx, then one
// for every 64 columns of each adapter's B; block 128.
template <class T>
__device__ void gradients(const T* x, const T* dy, const T* h, const T* dh, const T* a, T* dx, float* da, float* grads, const Adapter* adapters,
                          int tokens, int cols, int all_ranks, i64 ld, Mask mask) {
    __shared__ Tiles<T> tiles;
    const int lane = threadIdx.x % 32, of_a = (cols + 63) / 64;
    const bool is_a = int(blockIdx.x) < of_a;
    int tile = is_a ? blockIdx.x : blockIdx.x - of_a;
    if (!is_a)
        for (int count; tile >= (count = (adapters->columns + 63) / 64); tile -= count) ++adapters;
    const Adapter adapter = is_a ? Adapter{0, 0, cols, 0, all_ranks, 1.0f, 0} : *adapters;
    const int col = tile * 64, ranks = adapter.ranks;
    if (is_a && dx)
        for (int i = threadIdx.x; i < (ranks + 15) / 16 * 16 * 8; i += 128) {
            const int rank = i / 8, channel = i % 8 * 8;
            Eight eight = {};
            if (rank < ranks && col + channel < cols) eight = *reinterpret_cast<const Eight*>(a + i64(rank) * cols + col + channel);
            *reinterpret_cast<Eight*>(tiles.a + rank * WIDTH + channel) = eight;
        }
    float sums[MOST_RANKS / 8][4] = {};
    for (int first = 0; first < tokens; first += TOKEN_TILE) {
        __syncthreads();  // all are done with the tiles before
        load_narrow(tiles.narrow, (is_a ? dh : h) + adapter.rank, all_ranks, first, tokens, ranks);
        if (is_a)
            load_wide(tiles, x, cols, first, tokens, col, cols, mask);
        else
            load_wide(tiles, dy + adapter.column, ld, first, tokens, col, adapter.columns, Mask{0, 0, 1.0f});
        __syncthreads();
        multiply_wide(sums, tiles, ranks);
        if (is_a && dx) add_to_dx(dx, cols, tiles, first, tokens, col, cols, ranks, mask.scale);
    }
    // dA (ranks, cols), dB (columns, ranks).
    float* out = is_a ? da : grads + adapter.b;
    const i64 by_rank = is_a ? cols : 1, by_column = is_a ? 1 : ranks;
#pragma unroll
    for (int n = 0; n < MOST_RANKS / 8; ++n)
        for (int i = 0; i < 4; ++i) {
            const int column = col + threadIdx.x / 32 * 16 + lane / 4 + i / 2 * 8, rank = n * 8 + lane % 4 * 2 + i % 2;
            if (column < adapter.columns && rank < ranks) out[rank * by_rank + column * by_column] += adapter.scale * sums[n][i];
        }
}

#define INSTANTIATE(T, type)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                         \
        lora_down_##type(const T* x, const T* a, T* h, int tokens, int cols, int all_ranks, uint64_t seed, uint32_t limit, float scale) { \
        down(x, a, h, tokens, cols, all_ranks, Mask{seed, limit, scale});                                                     \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) lora_up_##type(const T* h, const T* parameters, const Adapter* adapters, T* y, \
                                                                     int tokens, int all_ranks, i64 ld) {                     \
        up(h, parameters, adapters, y, tokens, all_ranks, ld);                                                                \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256) lora_down_grad_##type(                                                  \
        const T* dy, const T* parameters, const Adapter* adapters, T* dh, int tokens, int all_ranks, i64 ld) {                \
        down_grad(dy, parameters, adapters, dh, tokens, all_ranks, ld);                                                       \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) lora_gradients_##type(                                                  \
        const T* x, const T* dy, const T* h, const T* dh, const T* a, T* dx, float* da, float* grads, const Adapter* adapters, int tokens, \
        int cols, int all_ranks, i64 ld, uint64_t seed, uint32_t limit, float scale) {                                        \
        gradients(x, dy, h, dh, a, dx, da, grads, adapters, tokens, cols, all_ranks, ld, Mask{seed, limit, scale});           \
    }
INSTANTIATE(__nv_bfloat16, bf16)
INSTANTIATE(__half, f16)
#undef INSTANTIATE
