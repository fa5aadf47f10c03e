// Products with 4-bit weights W (rows, cols): codes are read and decoded in registers, never written out. As after nf4_dequantize,
// level · absmax is rounded to the type of x, and sums are f32. x and y may be parts of wider matrices: their rows are `ldx`
// and `ldy` elements apart. `codes`, `nested_code` and `offset` are those of double quantization; without it, codes is null.
// `kind` as in nf4.cu.
#include "nf4.cuh"

template <class T>
__device__ __forceinline__ void put(T* y, float sum, bool accumulate) {
    *y = from_float<T>(accumulate ? to_float(*y) + sum : sum);
}

constexpr int CODE_BOOK = 256;

// The code book of double quantization (null: none) in shared memory, after the block's next barrier.
__device__ __forceinline__ const float* shared_code(const float* nested_code, float* shared) {
    if (!nested_code) return nullptr;
    for (int i = threadIdx.x; i < CODE_BOOK; i += blockDim.x) shared[i] = nested_code[i];
    return shared;
}

// --- A few rows of x, as in decoding: y (n, rows) = or += x (n, cols) Wᵀ for n <= PRODUCT_ROWS ---
//
// Launch: blocks of PRODUCT_WARPS warps.

constexpr int PRODUCT_ROWS = 8;
constexpr int PRODUCT_WARPS = 8;

struct FewRows {
    const uint8_t* packed;
    Scales scales;
    int n, rows, cols;
    i64 ldx, ldy;
    bool accumulate;
};

// Any type and size: a warp for each row of W.
template <class T>
__device__ void product(const FewRows& job, const T* x, T* y, int kind) {
    __shared__ float levels[16];
    load_levels(levels, kind);
    const int lane = threadIdx.x % 32, row = blockIdx.x * PRODUCT_WARPS + threadIdx.x / 32;
    if (row >= job.rows) return;
    const i64 first = i64(row) * job.cols;
    float sums[PRODUCT_ROWS] = {};
    const auto add = [&](int k, float w) {
        const float rounded = to_float(from_float<T>(w));
        for (int n = 0; n < PRODUCT_ROWS; ++n)
            if (n < job.n) sums[n] += rounded * to_float(x[n * job.ldx + k]);
    };
    const int worded = first % 8 == 0 && reinterpret_cast<uintptr_t>(job.packed) % 4 == 0 ? job.cols / 8 * 8 : 0;
    for (int k = lane * 8; k < worded; k += 32 * 8) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(job.packed + (first + k) / 2);
        const float absmax = job.scales[(first + k) / QUANT_BLOCK];
        for (int j = 0; j < 8; ++j) add(k + j, value_of(word, j, levels, absmax));
    }
    for (int k = worded + lane; k < job.cols; k += 32) {
        const i64 at = first + k;
        const unsigned code = at % 2 ? job.packed[at / 2] & 15 : job.packed[at / 2] >> 4;
        add(k, __fmul_rn(levels[code], job.scales[at / QUANT_BLOCK]));
    }
    for (int n = 0; n < PRODUCT_ROWS; ++n) {
        const float sum = warp_sum(sums[n]);
        if (lane == 0 && n < job.n) put(y + n * job.ldy + row, sum, job.accumulate);
    }
}

// By tensor cores: 16 rows of W for each block, whose warps share the columns. cols is a multiple of 32, x and its rows are aligned
// to 16 bytes. The fragments of mma.m16n8k16 take W as the left side and x as the right one. Which four columns a lane brings is
// free as long as both sides agree: here they are neighbours, so that a lane reads 32 codes of a row and 8 elements of x at once.
template <class T>
__device__ void product_mma(const FewRows& job, const T* x, T* y, int kind) {
    constexpr int COLS = 32;  // of a lane at a time: all of one scale
    __shared__ float levels[16];
    __shared__ float partial[PRODUCT_WARPS][PRODUCT_ROWS][16];
    __shared__ float nested_code[CODE_BOOK];
    Scales scales = job.scales;
    scales.nested_code = shared_code(scales.nested_code, nested_code);
    load_levels(levels, kind);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quarter = lane % 4;
    const int rows[2] = {int(blockIdx.x) * 16 + group, int(blockIdx.x) * 16 + group + 8};
    struct Chunk {
        Pack<uint32_t, 4> codes[2];
        Scales::Raw absmax[2];
    };
    // Of rows and columns that are not there others are read, times zero: no branch keeps one load waiting for another.
    const auto fetch = [&](int k) {
        Chunk chunk;
        for (int half = 0; half < 2; ++half) {
            const i64 at = i64(min(rows[half], job.rows - 1)) * job.cols + min(k, job.cols - COLS);
            chunk.codes[half] = *reinterpret_cast<const Pack<uint32_t, 4>*>(job.packed + at / 2);
            chunk.absmax[half] = scales.fetch(at / QUANT_BLOCK);
        }
        return chunk;
    };
    constexpr int STEP = PRODUCT_WARPS * 4 * COLS;
    float sums[4] = {};
    Chunk next = fetch((warp * 4 + quarter) * COLS);
    for (int first = warp * 4 * COLS; first < job.cols; first += STEP) {
        const int k = first + quarter * COLS;
        const Chunk now = next;
        next = fetch(k + STEP);  // while this one is decoded and multiplied
        Pack<uint32_t, 4> right[4] = {};  // eight elements each of one row of x
#pragma unroll
        for (int w = 0; w < 4; ++w)
            if (group < job.n && k < job.cols) right[w] = *reinterpret_cast<const Pack<uint32_t, 4>*>(x + group * job.ldx + k + 8 * w);
        float absmax[2];
        for (int half = 0; half < 2; ++half) absmax[half] = rows[half] < job.rows && k < job.cols ? scales.decode(now.absmax[half]) : 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w)
            for (int step = 0; step < 2; ++step) {
                uint32_t left[4];
                for (int i = 0; i < 4; ++i) {
                    const int half = i % 2, j = 4 * step + i / 2 * 2;
                    left[i] = pack_two<T>(value_of(now.codes[half].v[w], j, levels, absmax[half]),
                                          value_of(now.codes[half].v[w], j + 1, levels, absmax[half]));
                }
                mma_16x8x16<T>(sums, left, right[w].v[2 * step], right[w].v[2 * step + 1]);
            }
    }
    for (int i = 0; i < 4; ++i) partial[warp][quarter * 2 + i % 2][group + i / 2 * 8] = sums[i];
    __syncthreads();
    const int n = threadIdx.x / 16, row = blockIdx.x * 16 + threadIdx.x % 16;
    if (n >= job.n || row >= job.rows) return;
    float sum = 0.0f;
    for (int w = 0; w < PRODUCT_WARPS; ++w) sum += partial[w][n][threadIdx.x % 16];
    put(y + n * job.ldy + row, sum, job.accumulate);
}

// --- Many rows of x, as in training: y (tokens, outs) = or += x (tokens, ins) V, by tensor cores ---
//
// V is Wᵀ, or W itself for the gradient of x. W's rows are those of some matrices, one after another, each quantized by itself. cols
// is a multiple of 64, ins and the rows of each matrix are of 8, x and its rows are aligned to 16 bytes.
//
// A block has 128 outs and up to 128 tokens. Its ins pass in stages of 128: x and codes come by asynchronous copies while the
// stage before is computed. Four warps take 32 outs each for one half of a stage, four others for the other half, so that a
// value is decoded once for all tokens. V is the left side of mma.m16n8k16 and x the right one; which ins a lane brings is free
// as long as both sides agree: lane l has, of 32, the eight from 8 (l % 4) on, one load of x and codes of one word.
//
// Grid (token tiles, tiles of outs, shares of ins), block 256, MANY_SHARED bytes. Forward a tile of outs is of one matrix, backward a
// stage. With more than one share (where there are too few tiles for the device), sums go through `partial` (shares, tokens, outs), and
// a tile's last block adds them up in their order; `done`, a zero for each tile, counts its blocks, and is zero again in the end.

constexpr int SIDE = 128;  // outs, tokens and ins of a stage
constexpr int STAGE_SCALES = 2 * SIDE;
constexpr int STAGE_BYTES = SIDE * SIDE * 2 + SIDE * SIDE / 2 + STAGE_SCALES * 4;
constexpr int SUM_STRIDE = SIDE + 4;  // lanes that hold other tokens write to other banks
constexpr int MANY_SHARED = 2 * STAGE_BYTES;
static_assert(SIDE * SUM_STRIDE * 4 <= MANY_SHARED, "the sums of both halves take the place of the stages");

// Some rows of W, as src/ops/nf4_product.rs writes them.
struct Rows4 {
    const uint8_t* packed;
    const float* absmax;
    const uint8_t* codes;
    float offset;
    int rows;
};

struct ManyRows {
    const Rows4* matrices;
    const float* nested_code;
    float* partial;
    int* done;
    int tokens, tile_tokens, rows, cols;
    i64 ldx, ldy;
    bool accumulate;
};

// One stage in shared memory. Chunks of 16 bytes stand where eight lanes that read at once find them in different banks.
template <bool BACKWARD, class T>
struct Stage {
    T* x;            // (SIDE tokens, SIDE ins)
    uint8_t* codes;  // (SIDE rows of W, SIDE columns / 2): rows are outs, or ins in the backward product
    float* scales;   // (2 blocks of columns, SIDE rows of W)

    __device__ __forceinline__ Stage(unsigned char* shared, int i) {
        x = reinterpret_cast<T*>(shared + i * STAGE_BYTES);
        codes = reinterpret_cast<uint8_t*>(x + SIDE * SIDE);
        scales = reinterpret_cast<float*>(codes + SIDE * SIDE / 2);
    }
    // Where token t has ins 8 chunk .. + 7.
    __device__ __forceinline__ T* x_at(int t, int chunk) const { return x + t * SIDE + (chunk ^ (t & 1) << 2) * 8; }
    // Where a row of W has columns 32 chunk .. + 31.
    __device__ __forceinline__ uint8_t* codes_at(int row, int chunk) const {
        return codes + row * (SIDE / 2) + (chunk ^ (row / (BACKWARD ? 8 : 2) & 3)) * 16;
    }
};

// What one thread copies of a block's stages: 16 bytes of codes of every 64th row of W, 16 bytes of x of every 16th token, and one
// scale. What is not there becomes zero.
template <bool BACKWARD, class T>
struct Source {
    const ManyRows& job;
    const T* all;  // of this thread's first token
    int tokens;
    const Rows4* matrix;
    Scales scales;
    int rows, before, row, col;  // of the matrix; rows of those before it; where the stage begins in it
    const uint8_t* codes;
    const T* x;
    i64 scale;

    __device__ __forceinline__ Source(const ManyRows& job, const T* x, int token, int tokens)
        : job(job), all(x + i64(token + threadIdx.x / 16) * job.ldx), tokens(tokens), matrix(job.matrices), before(0) {}
    // Goes to a row and a column of this matrix.
    __device__ __forceinline__ void enter(int from_row, int from_col) {
        scales = Scales{matrix->absmax, matrix->codes, job.nested_code, matrix->offset};
        rows = matrix->rows;
        row = from_row;
        col = from_col;
        codes = matrix->packed + (i64(row + threadIdx.x / 4) * job.cols + col) / 2 + threadIdx.x % 4 * 16;
        x = all + (BACKWARD ? before + row : col) + threadIdx.x % 16 * 8;
        scale = i64(row + threadIdx.x / 2) * (job.cols / QUANT_BLOCK) + col / QUANT_BLOCK + threadIdx.x % 2;
    }
    // Goes to the tile of rows `tile`, counted over all matrices, and to column `from_col`.
    __device__ __forceinline__ void seek(int tile, int from_col) {
        for (int tiles; tile >= (tiles = (matrix->rows + SIDE - 1) / SIDE); tile -= tiles) before += matrix++->rows;
        enter(tile * SIDE, from_col);
    }
    __device__ __forceinline__ void to_next() {
        x += SIDE;
        if (!BACKWARD) {
            col += SIDE;
            codes += SIDE / 2;
            scale += SIDE / QUANT_BLOCK;
        } else if (row + SIDE < rows) {
            row += SIDE;
            codes += i64(SIDE / 2) * job.cols;
            scale += i64(SIDE) * (job.cols / QUANT_BLOCK);
        } else {
            before += rows;
            ++matrix;
            enter(0, col);
        }
    }
    // A copy that is not valid reads nothing, wherever it points to.
    __device__ __forceinline__ void copy_to(const Stage<BACKWARD, T>& stage) const {
        const int four = threadIdx.x % 4, sixteen = threadIdx.x % 16;
        const bool has_codes = col + four * 32 < job.cols, has_x = BACKWARD ? row + sixteen * 8 < rows : col + sixteen * 8 < job.cols;
        uint8_t* to_codes = stage.codes_at(threadIdx.x / 4, four);
#pragma unroll
        for (int r = 0; r < SIDE; r += 64)  // rows that are 64 apart lie alike in shared memory, as do tokens 16 apart
            copy_async(to_codes + r * (SIDE / 2), codes + i64(r / 2) * job.cols, has_codes && row + int(threadIdx.x / 4) + r < rows);
        T* to_x = stage.x_at(threadIdx.x / 16, sixteen);
        const T* from = x;
        const i64 step = 16 * job.ldx;
#pragma unroll
        for (int t = 0; t < SIDE; t += 16, from += step)
            copy_async_if(t < tokens, to_x + t * SIDE, from, has_x && int(threadIdx.x / 16) + t < tokens);
        copy_commit();
    }
    // The scale of row threadIdx.x / 2 of the stage's rows of W and block threadIdx.x % 2 of its columns, as memory has it.
    __device__ __forceinline__ bool fetch(Scales::Raw& raw) const {
        const bool valid = row + int(threadIdx.x / 2) < rows && col + int(threadIdx.x % 2) * QUANT_BLOCK < job.cols;
        if (valid) raw = scales.fetch(scale);
        return valid;
    }
    __device__ __forceinline__ void bring(const Stage<BACKWARD, T>& stage, bool valid, Scales::Raw raw) const {
        stage.scales[threadIdx.x % 2 * SIDE + threadIdx.x / 2] = valid ? scales.decode(raw) : 0.0f;
    }
};

// A lane's part of V: 32 ins in two steps of 16 for two tiles of 16 outs.
typedef uint32_t Left[2][2][4];

// A warp's outs 0..31 are the rows of its tiles in order.
template <class T>
__device__ __forceinline__ void decode_forward(Left& left, const Stage<false, T>& stage, const float* levels, int outs, int half, int w) {
    const int group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int tile = i / 2, row = outs + i * 8 + group;
        const uint32_t word = *reinterpret_cast<const uint32_t*>(stage.codes_at(row, half * 2 + w) + quarter * 4);
        const float absmax = stage.scales[half * SIDE + row];
#pragma unroll
        for (int j = 0; j < 8; j += 2)
            left[j / 4][tile][i % 2 + j % 4] = pack_two<T>(value_of(word, j, levels, absmax), value_of(word, j + 1, levels, absmax));
    }
}

// A lane's four outs are neighbours: row `group` and `group` + 8 of its first tile, then of the second.
template <class T>
__device__ __forceinline__ void decode_backward(Left& left, const Stage<true, T>& stage, const float* levels, int outs, int half, int w) {
    const int group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4, first = half * (SIDE / 2) + w * 32 + quarter * 8;
    float absmax[8];
    load<8>(stage.scales + outs / QUANT_BLOCK * SIDE + first, absmax);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t codes[2];
        for (int k = 0; k < 2; ++k) codes[k] = *reinterpret_cast<const uint16_t*>(stage.codes_at(first + j + k, outs / 32) + group * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            left[j / 4][i / 2][i % 2 + j % 4] =
                pack_two<T>(value_of(codes[0], i, levels, absmax[j]), value_of(codes[1], i, levels, absmax[j + 1]));
    }
}

// sums[n][tile] += this warp's half of a stage, for the first `pairs` of 8 pairs of 8 tokens.
template <bool BACKWARD, class T>
__device__ __forceinline__ void multiply_stage(float (&sums)[16][2][4], const Stage<BACKWARD, T>& stage, const float* levels, int outs,
                                               int half, int pairs) {
    typedef Pack<uint32_t, 4> Right;  // eight ins of a token
    const int group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
        Left left;
        if constexpr (BACKWARD)
            decode_backward<T>(left, stage, levels, outs, half, w);
        else
            decode_forward<T>(left, stage, levels, outs, half, w);
        const T* x = stage.x_at(group, half * 8 + w * 4 + quarter);
        Right next[2] = {load_shared(x), load_shared(x + 8 * SIDE)};
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) {
            if (pair >= pairs) break;
            const Right now[2] = {next[0], next[1]};
            // While these are multiplied. Behind the last pair lies what is read and not used.
            if (pair < 7)
                for (int n = 0; n < 2; ++n) next[n] = load_shared(x + (pair * 2 + 2 + n) * 8 * SIDE);
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int tile = 0; tile < 2; ++tile)
                        mma_16x8x16<T>(sums[pair * 2 + n][tile], left[step][tile], now[n].v[2 * step], now[n].v[2 * step + 1]);
        }
    }
}

// all (tokens, outs) = the sums of both halves, the second's first.
template <bool BACKWARD>
__device__ __forceinline__ void gather_sums(float* all, const float (&sums)[16][2][4], int outs, int half, int pairs) {
    const int group = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
    for (int turn = 1; turn >= 0; --turn) {
        __syncthreads();
        if (turn != half) continue;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            if (n / 2 >= pairs) break;
#pragma unroll
            for (int token = 0; token < 2; ++token) {
                float* row = all + (n * 8 + quarter * 2 + token) * SUM_STRIDE + outs;
                // Of outs group, + 8, + 16, + 24, or of four neighbours.
                float own[4] = {sums[n][0][token], sums[n][0][2 + token], sums[n][1][token], sums[n][1][2 + token]};
                if (BACKWARD) {
                    float others[4] = {};
                    if (!turn) load<4>(row + group * 4, others);
                    for (int i = 0; i < 4; ++i) own[i] += others[i];
                    store<4>(row + group * 4, own);
                } else {
                    for (int i = 0; i < 4; ++i) row[i * 8 + group] = turn ? own[i] : row[i * 8 + group] + own[i];
                }
            }
        }
    }
    __syncthreads();
}

// y (tokens, outs) = or += what `sum(v, t)` gives for tokens t, t + 2, .. t + 14 of this thread's out. All that is read is asked for
// before anything is written: a thread that waits for each element in turn would wait longer than it multiplied.
template <class T, class Sum>
__device__ __forceinline__ void write_tile(T* y, i64 ld, int tokens, bool accumulate, Sum sum) {
    for (int first = threadIdx.x / SIDE; first < tokens; first += 16) {
        float v[8], old[8] = {};
#pragma unroll
        for (int u = 0; u < 8; ++u)
            if (accumulate && first + 2 * u < tokens) old[u] = to_float(y[(first + 2 * u) * ld]);
        sum(v, first);
#pragma unroll
        for (int u = 0; u < 8; ++u)
            if (first + 2 * u < tokens) y[(first + 2 * u) * ld] = from_float<T>(old[u] + v[u]);
    }
}

template <bool BACKWARD, class T>
__device__ void product_many(ManyRows job, const T* x, T* y, int kind) {
    __shared__ float levels[16];
    __shared__ float nested_code[CODE_BOOK];
    DYNAMIC_SHARED(unsigned char, shared);
    const int warp = threadIdx.x / 32, outs = warp % 4 * 32, half = warp / 4;
    const int token0 = int(blockIdx.x) * job.tile_tokens, tokens = min(job.tile_tokens, job.tokens - token0), pairs = (tokens + 15) / 16;
    unsigned stages = (job.cols + SIDE - 1) / SIDE;
    if (BACKWARD) {
        stages = 0;
        const Rows4* matrix = job.matrices;
        for (int rows = 0; rows < job.rows; rows += matrix++->rows) stages += (matrix->rows + SIDE - 1) / SIDE;
    }
    const int begin = stages * blockIdx.z / gridDim.z, end = stages * (blockIdx.z + 1) / gridDim.z;

    Source<BACKWARD, T> source(job, x, token0, tokens);
    source.seek(BACKWARD ? begin : blockIdx.y, BACKWARD ? blockIdx.y * SIDE : begin * SIDE);
    // Where the block's outs begin, and how many there are.
    const int out0 = BACKWARD ? source.col : source.before + source.row, n_outs = BACKWARD ? job.cols - source.col : source.rows - source.row;
    Scales::Raw raw{};
    bool valid = source.fetch(raw);
    source.copy_to(Stage<BACKWARD, T>(shared, begin % 2));
    // While the first stage comes.
    source.scales.nested_code = job.nested_code = shared_code(job.nested_code, nested_code);
    load_levels(levels, kind);
    source.bring(Stage<BACKWARD, T>(shared, begin % 2), valid, raw);
    float sums[16][2][4] = {};
    for (int s = begin; s < end; ++s) {
        const Stage<BACKWARD, T> stage(shared, s % 2), next(shared, (s + 1) % 2);
        copy_wait();
        __syncthreads();  // all have copied this stage, and none reads the one before
        if (s + 1 < end) {
            source.to_next();
            valid = source.fetch(raw);
            source.copy_to(next);
        }
        multiply_stage(sums, stage, levels, outs, half, pairs);
        if (s + 1 < end) source.bring(next, valid, raw);
    }
    float* all = reinterpret_cast<float*>(shared);
    gather_sums<BACKWARD>(all, sums, outs, half, pairs);

    // A thread has one out of the tile and every other token.
    const int out = threadIdx.x % SIDE;
    y += token0 * job.ldy + out0 + out;
    if (gridDim.z == 1) {
        const auto own = [&](float (&v)[8], int first) {
#pragma unroll
            for (int u = 0; u < 8; ++u) v[u] = first + 2 * u < tokens ? all[(first + 2 * u) * SUM_STRIDE + out] : 0.0f;
        };
        if (out < n_outs) write_tile(y, job.ldy, tokens, job.accumulate, own);
        return;
    }
    const i64 width = BACKWARD ? job.cols : job.rows, share = job.tokens * width;
    float* partial = job.partial + token0 * width + out0 + out;
    for (int t = threadIdx.x / SIDE; t < tokens; t += 2)
        if (out < n_outs) partial[blockIdx.z * share + t * width] = all[t * SUM_STRIDE + out];
    if (!is_last_share(job.done + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z)) return;
    const auto of_all = [&](float (&v)[8], int first) {
        for (int u = 0; u < 8; ++u) v[u] = 0.0f;
        for (unsigned z = 0; z < gridDim.z; ++z)
#pragma unroll
            for (int u = 0; u < 8; ++u)
                if (first + 2 * u < tokens) v[u] += __ldcg(partial + z * share + (first + 2 * u) * width);
    };
    if (out < n_outs) write_tile(y, job.ldy, tokens, job.accumulate, of_all);
}

#define FEW(name, function, T, type)                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * PRODUCT_WARPS) name##_##type(                                         \
        const uint8_t* packed, const float* absmax, const uint8_t* codes, const float* nested_code, float offset, const T* x, T* y, \
        int n, int rows, int cols, i64 ldx, i64 ldy, int accumulate, int kind) {                                            \
        function(FewRows{packed, Scales{absmax, codes, nested_code, offset}, n, rows, cols, ldx, ldy, accumulate != 0}, x, y, kind); \
    }
#define INSTANTIATE(T, type) FEW(nf4_product, product, T, type)
FOR_EACH_TYPE(INSTANTIATE)
#undef INSTANTIATE
FEW(nf4_product_mma, product_mma, __nv_bfloat16, bf16)
FEW(nf4_product_mma, product_mma, __half, f16)
#undef FEW

// `nested_code` is null without double quantization.
#define MANY(name, backward, T, type)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 1) name##_##type(                                                     \
        const Rows4* matrices, const float* nested_code, const T* x, T* y, float* partial, int* done, int tokens, int tile_tokens, \
        int rows, int cols, i64 ldx, i64 ldy, int accumulate, int kind) {                                                             \
        const ManyRows job{matrices, nested_code, partial, done, tokens, tile_tokens, rows, cols, ldx, ldy, accumulate != 0};     \
        product_many<backward>(job, x, y, kind);                                                                            \
    }
#define INSTANTIATE(T, type)               \
    MANY(nf4_product_many, false, T, type) \
    MANY(nf4_product_many_backward, true, T, type)
INSTANTIATE(__nv_bfloat16, bf16)
INSTANTIATE(__half, f16)
#undef INSTANTIATE
#undef MANY
