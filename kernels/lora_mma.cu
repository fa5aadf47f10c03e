// The products of a linear layer's adapters by tensor cores, bf16 and f16, all of the layer's adapters and dropout in one launch
// each: for few tokens a step's time is that of its launches.
//
//     h = drop(x) Aᵀ        y[:, columns] += s h[:, ranks] Bᵀ                    Hu et al. 2021, arXiv:2106.09685
//     dh[:, ranks] = s dy[:, columns] B        dB += s dyᵀ h        dA += dhᵀ drop(x)        dx += drop(dh A)
//
// Sizes: x and dx (tokens, cols), y and dy (tokens, outs), h and dh (tokens, all_ranks), A (all_ranks, cols), the A's of all adapters
// below one another, and for each adapter B (columns, ranks). cols, and where an adapter's columns begin and how many there are, are
// multiples of 8, ranks of 2; matrices are aligned to 16 bytes. Blocks have up to 64 ranks at a time. A and B are of the activations'
// type, their gradients f32. Fragments are those of mma.m16n8k16: which of the summed elements a lane brings is free as
// long as both sides agree, so a lane takes eight neighbours of 32 where both sides have them in a row.
#include "lora.cuh"

constexpr int MOST_RANKS = 64;  // at a time
typedef Pack<uint32_t, 4> Eight;  // eight neighbours of a row

// One adapter, as src/ops/lora.rs writes it: where its B begins among all parameters, and its part of y and h.
struct Adapter {
    i64 b;
    int column, columns, rank, ranks;
    float scale;
    int unused;
};

// Element j of eight.
template <class T>
__device__ __forceinline__ float element_of(const Eight& eight, int j) {
    union {
        Eight words;
        Pack<T, 8> v;
    } u;
    u.words = eight;
    return to_float(u.v.v[j]);
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
#pragma unroll
    for (int j = 0; j < 8; ++j) u.v.v[j] = from_float<T>(to_float(u.v.v[j]) * mask.at(index + j));
    return u.words;
}

// Where there are too few blocks of 16 tokens for the device, several share a sum: sums go through `partial` (shares, gridDim.y, tokens,
// MOST_RANKS), and the last of a block's shares adds them up in their order. `done` is a zero for each.
struct Shares {
    float* partial;
    int* done;
};

// out (tokens, ranks) = scale · left (tokens, cols) rightᵀ, right (ranks, cols), for 16 tokens from 16 blockIdx.x on. The 8 warps of all
// gridDim.z blocks share the columns. `Right` reads eight columns of some ranks, and tells which ranks its tiles hold.
template <class T, class Right, class Masked>
__device__ void narrow_product(const T* left, i64 ld, int tokens, int cols, int ranks, T* out, i64 ld_out, float scale, Shares shares,
                               const Right& right, Masked masked) {
    __shared__ float partial[8][16][MOST_RANKS + 8];  // few of the rows written at once share a bank
    struct Chunk {
        Eight left[2];
        typename Right::Words right;
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
    const int rows[2] = {int(blockIdx.x) * 16 + group, int(blockIdx.x) * 16 + group + 8};
    const auto fetch = [&](int col) {
        Chunk chunk = {};
        if (col >= cols) return chunk;
        for (int half = 0; half < 2; ++half)
            if (rows[half] < tokens) chunk.left[half] = *reinterpret_cast<const Eight*>(left + rows[half] * ld + col);
        right.read(chunk.right, col, group);
        return chunk;
    };
    const int step = gridDim.z * 8 * 32;
    float sums[MOST_RANKS / 8][4] = {};
    int first = (blockIdx.z * 8 + warp) * 32;
    Chunk next = fetch(first + quarter * 8);
    for (; first < cols; first += step) {
        Chunk now = next;
        next = fetch(first + step + quarter * 8);  // while this one is multiplied
        for (int half = 0; half < 2; ++half) now.left[half] = masked(now.left[half], rows[half], first + quarter * 8);
        const uint32_t(&top)[4] = now.left[0].v;
        const uint32_t(&low)[4] = now.left[1].v;
#pragma unroll
        for (int n = 0; n < MOST_RANKS / 8; ++n) {
            if (n >= right.tiles()) break;
            const Eight eight = right.tile(now.right, n);
#pragma unroll
            for (int i = 0; i < 4; i += 2) mma_16x8x16<T>(sums[n], {top[i], low[i], top[i + 1], low[i + 1]}, eight.v[i], eight.v[i + 1]);
        }
    }
#pragma unroll
    for (int n = 0; n < MOST_RANKS / 8; ++n) {
        if (n >= right.tiles()) break;
        for (int i = 0; i < 4; ++i) partial[warp][group + i / 2 * 8][right.rank_of(n, quarter * 2 + i % 2)] = sums[n][i];
    }
    __syncthreads();
    // Calls f with each row and rank of the block's.
    const auto each = [&](auto f) {
        for (int i = threadIdx.x; i < 16 * ranks; i += 256)
            if (int(blockIdx.x) * 16 + i / ranks < tokens) f(i / ranks, i % ranks);
    };
    const auto of_warps = [&](int row, int rank) {
        float sum = 0.0f;
        for (int w = 0; w < 8; ++w) sum += partial[w][row][rank];
        return sum;
    };
    const auto put = [&](int row, int rank, float sum) { out[(i64(blockIdx.x) * 16 + row) * ld_out + rank] = from_float<T>(scale * sum); };
    if (gridDim.z == 1) return each([&](int row, int rank) { put(row, rank, of_warps(row, rank)); });

    const i64 share = i64(gridDim.y) * tokens * MOST_RANKS;
    float* own = shares.partial + (i64(blockIdx.y) * tokens + blockIdx.x * 16) * MOST_RANKS;
    each([&](int row, int rank) { own[blockIdx.z * share + row * MOST_RANKS + rank] = of_warps(row, rank); });
    if (!is_last_share(shares.done + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z)) return;
    each([&](int row, int rank) {
        float sum = 0.0f;
        for (unsigned z = 0; z < gridDim.z; ++z) sum += __ldcg(own + z * share + row * MOST_RANKS + rank);
        put(row, rank, sum);
    });
}

// A (ranks, cols): eight columns are neighbours.
template <class T>
struct RowsOfA {
    const T* a;
    int cols, ranks;
    typedef Eight Words[MOST_RANKS / 8];

    __device__ __forceinline__ int tiles() const { return (ranks + 7) / 8; }
    __device__ __forceinline__ int rank_of(int n, int column) const { return n * 8 + column; }
    __device__ __forceinline__ void read(Words& words, int col, int group) const {
#pragma unroll
        for (int n = 0; n < MOST_RANKS / 8; ++n)
            if (n * 8 + group < ranks) words[n] = *reinterpret_cast<const Eight*>(a + i64(n * 8 + group) * cols + col);
    }
    __device__ __forceinline__ Eight tile(const Words& words, int n) const { return words[n]; }
};

// B (columns, ranks), of which two neighbouring ranks are a word: a lane takes ranks 16 m + 2 group, + 1 of its eight columns, the first
// for tile 2 m and the second for tile 2 m + 1.
template <class T>
struct ColumnsOfB {
    const T* b;  // from the first of `ranks` on
    int ld, ranks;
    typedef uint32_t Words[MOST_RANKS / 16][8];

    __device__ __forceinline__ int tiles() const { return (ranks + 15) / 16 * 2; }
    __device__ __forceinline__ int rank_of(int n, int column) const { return n / 2 * 16 + column * 2 + n % 2; }
    __device__ __forceinline__ void read(Words& words, int col, int group) const {
#pragma unroll
        for (int m = 0; m < MOST_RANKS / 16; ++m)
            if (m * 16 + group * 2 < ranks)
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    words[m][j] = *reinterpret_cast<const uint32_t*>(b + i64(col + j) * ld + m * 16 + group * 2);
    }
    __device__ __forceinline__ Eight tile(const Words& words, int n) const {
        Eight eight;
        for (int i = 0; i < 4; ++i) eight.v[i] = __byte_perm(words[n / 2][2 * i], words[n / 2][2 * i + 1], n % 2 ? 0x7632 : 0x5410);
        return eight;
    }
};

// h = drop(x) Aᵀ. Grid (ceil(tokens / 16), ceil(all_ranks / 64), shares), block 256.
template <class T>
__device__ void down(const T* x, const T* a, T* h, int tokens, int cols, int all_ranks, Shares shares, Mask mask) {
    const int rank = blockIdx.y * MOST_RANKS, ranks = min(all_ranks - rank, MOST_RANKS);
    const RowsOfA<T> rows{a + i64(rank) * cols, cols, ranks};
    const auto masked = [=](Eight x, int row, int col) { return dropped<T>(x, mask, i64(row) * cols + col); };
    narrow_product(x, cols, tokens, cols, ranks, h + rank, all_ranks, 1.0f, shares, rows, masked);
}

// dh[:, ranks] = s dy[:, columns] B. Grid (ceil(tokens / 16), 64 ranks of each adapter, shares), block 256.
template <class T>
__device__ void down_grad(const T* dy, const T* parameters, const Adapter* adapters, T* dh, int tokens, int all_ranks, i64 ld, Shares shares) {
    int part = blockIdx.y;
    for (int parts; part >= (parts = (adapters->ranks + MOST_RANKS - 1) / MOST_RANKS); part -= parts) ++adapters;
    const Adapter adapter = *adapters;
    const int rank = part * MOST_RANKS, ranks = min(adapter.ranks - rank, MOST_RANKS);
    const ColumnsOfB<T> b{parameters + adapter.b + rank, adapter.ranks, ranks};
    const auto as_it_is = [](Eight dy, int, int) { return dy; };
    narrow_product(dy + adapter.column, ld, tokens, adapter.columns, ranks, dh + adapter.rank + rank, all_ranks, adapter.scale, shares, b, as_it_is);
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
    if (first >= tokens) return;
    // y is asked for before the products, so that these hide the time that it takes.
    const auto at = [&](int i) { return y + (first + group + i / 2 * 8) * ld + adapter.column + tile * 64 + i % 2 * 32 + quarter * 8; };
    bool there[4];
    Eight old[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        there[i] = first + group + i / 2 * 8 < tokens && tile * 64 + i % 2 * 32 + quarter * 8 < adapter.columns;
        if (there[i]) old[i] = *reinterpret_cast<const Eight*>(at(i));
    }
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
        if (!there[i]) continue;
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = element_of<T>(old[i], j) + adapter.scale * sums[i % 2 * 4 + j / 2][i / 2 * 2 + j % 2];
        store<8>(at(i), v);
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
    const int channel = threadIdx.x % 8 * 8;
    const auto index = [&](int i) { return i64(first + i * 16 + int(threadIdx.x) / 8) * ld + col + channel; };
    Eight eights[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (first + i * 16 + int(threadIdx.x) / 8 < tokens && col + channel < cols) eights[i] = *reinterpret_cast<const Eight*>(x + index(i));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i * 16 + threadIdx.x / 8;
        uint32_t kept = 0xff;
        if (mask.limit) {
            Pack<T, 8> masked;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float factor = mask.at(index(i) + j);
                if (factor == 0.0f) kept &= ~(1u << j);
                masked.v[j] = from_float<T>(element_of<T>(eights[i], j) * factor);
            }
            *reinterpret_cast<Pack<T, 8>*>(tiles.wide + row * WIDTH + channel) = masked;
        } else {
            *reinterpret_cast<Eight*>(tiles.wide + row * WIDTH + channel) = eights[i];
        }
        tiles.kept[row * 8 + channel / 8] = uint8_t(kept);
    }
}

// tiles.a (ranks, 64) = columns col.. of A, zero up to the next multiple of 16 ranks.
template <class T>
__device__ __forceinline__ void load_a(Tiles<T>& tiles, const T* a, int col, int cols, int ranks) {
    for (int i = threadIdx.x; i < (ranks + 15) / 16 * 16 * 8; i += 128) {
        const int rank = i / 8, channel = i % 8 * 8;
        Eight eight = {};
        if (rank < ranks && col + channel < cols) eight = *reinterpret_cast<const Eight*>(a + i64(rank) * cols + col + channel);
        *reinterpret_cast<Eight*>(tiles.a + rank * WIDTH + channel) = eight;
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

// sums (16 tokens of this warp, 64 columns) += narrow A.
template <class T>
__device__ __forceinline__ void multiply_narrow(float (&sums)[8][4], const Tiles<T>& tiles, int ranks) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
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
}

// This thread's part of 64 rows and columns of dx. It is asked for before the products, so that these hide the time that it takes.
template <class T>
struct PartOfDx {
    T* dx;  // its first element
    i64 ld;
    int rows, cols;  // from that on
    Pack<T, 2> old[2][8];

    __device__ __forceinline__ PartOfDx(T* all, i64 ld, int first, int tokens, int col, int cols) : ld(ld) {
        const int row = first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, channel = col + threadIdx.x % 4 * 2;
        dx = all + row * ld + channel;
        rows = tokens - row;
        this->cols = cols - channel;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int c = 0; c < 8; ++c)
                if (there(half, c)) old[half][c] = *reinterpret_cast<const Pack<T, 2>*>(dx + half * 8 * ld + c * 8);
    }
    __device__ __forceinline__ bool there(int half, int c) const { return half * 8 < rows && c * 8 < cols; }
    // dx += drop(sums), by the mask that the tile's rows noted.
    __device__ __forceinline__ void add(const float (&sums)[8][4], const uint8_t* kept, float scale) const {
        kept += (threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                if (!there(half, c)) continue;
                const uint32_t bits = kept[half * 64 + c] >> threadIdx.x % 4 * 2;
                float v[2];
                for (int j = 0; j < 2; ++j) v[j] = to_float(old[half][c].v[j]) + (bits >> j & 1 ? sums[c][half * 2 + j] * scale : 0.0f);
                store<2>(dx + half * 8 * ld + c * 8, v);
            }
    }
};

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
    const int col = tile * 64;
    const bool with_dx = is_a && dx, at_once = adapter.ranks <= MOST_RANKS;
    float* out = is_a ? da : grads + adapter.b;
    const i64 by_rank = is_a ? cols : 1, by_column = is_a ? 1 : adapter.ranks;
    for (int rank0 = 0; rank0 < adapter.ranks; rank0 += MOST_RANKS) {
        const int ranks = min(adapter.ranks - rank0, MOST_RANKS);
        __syncthreads();  // all are done with the ranks before
        if (with_dx && at_once) load_a(tiles, a, col, cols, ranks);
        float sums[MOST_RANKS / 8][4] = {};
        for (int first = 0; first < tokens; first += TOKEN_TILE) {
            __syncthreads();  // all are done with the tiles before
            if (is_a)
                load_wide(tiles, x, cols, first, tokens, col, cols, mask);
            else
                load_wide(tiles, dy + adapter.column, ld, first, tokens, col, adapter.columns, Mask{0, 0, 1.0f});
            load_narrow(tiles.narrow, (is_a ? dh : h) + adapter.rank + rank0, all_ranks, first, tokens, ranks);
            __syncthreads();
            if (with_dx && at_once) {
                const PartOfDx<T> part(dx, cols, first, tokens, col, cols);
                float d[8][4] = {};
                multiply_narrow(d, tiles, ranks);
                part.add(d, tiles.kept, mask.scale);
            }
            multiply_wide(sums, tiles, ranks);
        }
        // dA (ranks, cols), dB (columns, ranks): calls f with each sum and where it belongs.
        const auto each = [&](auto f) {
#pragma unroll
            for (int n = 0; n < MOST_RANKS / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column = col + threadIdx.x / 32 * 16 + lane / 4 + i / 2 * 8, rank = n * 8 + lane % 4 * 2 + i % 2;
                    if (column < adapter.columns && rank < ranks) f(sums[n][i], out + (rank0 + rank) * by_rank + column * by_column);
                }
        };
        // All that is read is asked for before anything is written: nothing waits for each element in turn.
        each([&](float& sum, const float* at) { sum = *at + adapter.scale * sum; });
        each([](float sum, float* at) { *at = sum; });
    }
    if (!with_dx || at_once) return;
    // More ranks than a block has at a time: dx is the sum over all of them, rounded once.
    for (int first = 0; first < tokens; first += TOKEN_TILE) {
        const PartOfDx<T> part(dx, cols, first, tokens, col, cols);
        float d[8][4] = {};
        for (int rank0 = 0; rank0 < all_ranks; rank0 += MOST_RANKS) {
            const int ranks = min(all_ranks - rank0, MOST_RANKS);
            __syncthreads();  // all are done with the tiles before
            if (rank0 == 0) load_wide(tiles, x, cols, first, tokens, col, cols, mask);  // for its mask
            load_a(tiles, a + i64(rank0) * cols, col, cols, ranks);
            load_narrow(tiles.narrow, dh + rank0, all_ranks, first, tokens, ranks);
            __syncthreads();
            multiply_narrow(d, tiles, ranks);
        }
        part.add(d, tiles.kept, mask.scale);
    }
}

#define INSTANTIATE(T, type)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                         \
        lora_down_##type(const T* x, const T* a, T* h, float* partial, int* done, int tokens, int cols, int all_ranks, uint64_t seed, \
                         uint32_t limit, float scale) {                                                                       \
        down(x, a, h, tokens, cols, all_ranks, Shares{partial, done}, Mask{seed, limit, scale});                              \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) lora_up_##type(const T* h, const T* parameters, const Adapter* adapters, T* y, \
                                                                     int tokens, int all_ranks, i64 ld) {                     \
        up(h, parameters, adapters, y, tokens, all_ranks, ld);                                                                \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256) lora_down_grad_##type(                                                  \
        const T* dy, const T* parameters, const Adapter* adapters, T* dh, float* partial, int* done, int tokens, int all_ranks, i64 ld) { \
        down_grad(dy, parameters, adapters, dh, tokens, all_ranks, ld, Shares{partial, done});                                \
    }                                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) lora_gradients_##type(                                                  \
        const T* x, const T* dy, const T* h, const T* dh, const T* a, T* dx, float* da, float* grads, const Adapter* adapters, int tokens, \
        int cols, int all_ranks, i64 ld, uint64_t seed, uint32_t limit, float scale) {                                        \
        gradients(x, dy, h, dh, a, dx, da, grads, adapters, tokens, cols, all_ranks, ld, Mask{seed, limit, scale});           \
    }
INSTANTIATE(__nv_bfloat16, bf16)
INSTANTIATE(__half, f16)
#undef INSTANTIATE
