// Attention, forward and backward, against a dense computation in f64, which is itself checked by finite differences.
#pragma once
#include "../attention.cu"
#include "../attention_mma.cu"
#include "check.h"

// One layer's sizes and rules, and the dense reference.
struct AttentionCase {
    int tokens, n_head, n_query_groups, head_size;
    float soft_cap;
    int window;
    std::vector<int> segments;  // where samples start, 0 first; empty: none told
    int offset = 0;             // keys before the first query
    int gap = 0;                // what rows are wider than their heads
    int prefix = 0;             // keys that all samples begin with, no more than `offset`

    float scale() const { return 1.3f / std::sqrt(float(head_size)); }
    // At which key the sample of each query starts, or goes on after the prefix.
    std::vector<int> starts() const {
        std::vector<int> out(tokens, 0);
        for (int start : segments)
            for (int t = start; t < tokens; ++t) out[t] = start + prefix;
        return out;
    }
    // The keys that a query sees.
    std::vector<int> seen(int t) const {
        const int start = starts()[t], last = t + offset, position = prefix + last - start;
        std::vector<int> out;
        for (int j = 0; j < prefix; ++j)
            if (window == 0 || position - j < window) out.push_back(j);
        for (int j = start; j <= last; ++j)
            if (window == 0 || last - j < window) out.push_back(j);
        return out;
    }
    std::string name(const char* kernel) const {
        return check::with(kernel, {{"T", tokens}, {"H", n_head}, {"G", n_query_groups}, {"D", head_size}, {"cap", soft_cap},
                                    {"window", window}, {"segments", double(segments.size())}, {"offset", offset}, {"prefix", prefix}, {"gap", gap}});
    }
};

struct Dense {
    std::vector<double> q, k, v, d_o;  // (T, H, D) or (T, G, D)
    std::vector<double> o, lse, delta, dq, dk, dv;

    void forward(const AttentionCase& c) { rows(c, false); }
    void backward(const AttentionCase& c) { rows(c, true); }

  private:
    void rows(const AttentionCase& c, bool gradients) {
        const int D = c.head_size, H = c.n_head, G = c.n_query_groups;
        o.assign(size_t(c.tokens) * H * D, 0);
        lse.assign(size_t(c.tokens) * H, 0);
        delta.assign(lse.size(), 0);
        dq.assign(q.size(), 0);
        dk.assign(k.size(), 0);
        dv.assign(v.size(), 0);
        for (int t = 0; t < c.tokens; ++t)
            for (int h = 0; h < H; ++h) {
                const int g = h / (H / G);
                const std::vector<int> seen = c.seen(t);
                const size_t at = (size_t(t) * H + h) * D;
                std::vector<double> p, slope;
                double top = -1e300, sum = 0;
                for (int j : seen) {
                    double s = 0, tangent = 0;
                    for (int d = 0; d < D; ++d) s += q[at + d] * k[(size_t(j) * G + g) * D + d];
                    s *= double(c.scale());
                    if (c.soft_cap > 0) {
                        tangent = std::tanh(s / double(c.soft_cap));
                        s = double(c.soft_cap) * tangent;
                    }
                    p.push_back(s);
                    slope.push_back(1 - tangent * tangent);
                    top = std::max(top, s);
                }
                for (double& x : p) sum += x = std::exp(x - top);
                lse[size_t(h) * c.tokens + t] = top + std::log(sum);
                double& do_o = delta[size_t(h) * c.tokens + t];
                for (size_t i = 0; i < seen.size(); ++i)
                    for (int d = 0; d < D; ++d) {
                        const double part = p[i] / sum * v[(size_t(seen[i]) * G + g) * D + d];
                        o[at + d] += part;
                        if (gradients) do_o += d_o[at + d] * part;
                    }
                for (size_t i = 0; gradients && i < seen.size(); ++i) {
                    const size_t key = (size_t(seen[i]) * G + g) * D;
                    double dp = 0;
                    for (int d = 0; d < D; ++d) dp += d_o[at + d] * v[key + d];
                    const double prob = p[i] / sum, ds = prob * (dp - do_o) * slope[i] * double(c.scale());
                    for (int d = 0; d < D; ++d) {
                        dv[key + d] += prob * d_o[at + d];
                        dk[key + d] += ds * q[at + d];
                        dq[at + d] += ds * k[key + d];
                    }
                }
            }
    }
};

// The reference's own gradients, by central differences of Σ o · d_o.
inline void test_dense_reference() {
    AttentionCase c{9, 4, 2, 3, 2.0f, 4, {0, 3}};
    Dense dense;
    std::mt19937 rng(1);
    std::normal_distribution<double> normal;
    for (auto* x : {&dense.q, &dense.d_o}) x->resize(9 * 4 * 3);
    for (auto* x : {&dense.k, &dense.v}) x->resize(9 * 2 * 3);
    for (auto* x : {&dense.q, &dense.k, &dense.v, &dense.d_o})
        for (double& v : *x) v = normal(rng);
    dense.backward(c);
    const std::vector<double> gradients[] = {dense.dq, dense.dk, dense.dv};
    std::vector<double>* inputs[] = {&dense.q, &dense.k, &dense.v};
    for (int which = 0; which < 3; ++which) {
        std::vector<double> numeric;
        for (double& x : *inputs[which]) {
            const double keep = x, h = 1e-5;
            double sides[2];
            for (int side : {0, 1}) {
                x = keep + (side ? h : -h);
                dense.forward(c);
                sides[side] = std::inner_product(dense.o.begin(), dense.o.end(), dense.d_o.begin(), 0.0);
            }
            x = keep;
            numeric.push_back((sides[1] - sides[0]) / (2 * h));
        }
        std::vector<float> got(gradients[which].begin(), gradients[which].end());
        check::close(std::string("dense attention gradient ") + "qkv"[which], got.data(), numeric, 1e-6);
    }
}

// Kernels of one type and padded head size by one name.
template <class T, int D>
struct AttentionKernels;
#define ATTENTION_SIZE(T, type, D)                                          \
    template <>                                                             \
    struct AttentionKernels<T, D> {                                         \
        template <class... A>                                               \
        static void fwd(float*, int*, A... args) {                          \
            attention_fwd_##type##_d##D(args...);                           \
        }                                                                   \
        static constexpr auto delta = attention_bwd_delta_##type;           \
        static constexpr auto dq = attention_bwd_dq_##type##_d##D;          \
        template <class... A>                                               \
        static void dkv(float*, int*, A... args) {                          \
            attention_bwd_dkv_##type##_d##D(args...);                       \
        }                                                                   \
    };
#define ATTENTION_NAMES(T, type) ATTENTION_SIZE(T, type, 64) ATTENTION_SIZE(T, type, 128) ATTENTION_SIZE(T, type, 256)
FOR_EACH_TYPE(ATTENTION_NAMES)

// The same on tensor cores.
template <class T, int D>
struct MmaKernels;
#define MMA_SIZE(T, type, D)                                                \
    template <>                                                             \
    struct MmaKernels<T, D> {                                               \
        template <class... A>                                               \
        static void fwd(float* partial, int* done, A... args) {             \
            attention_mma_fwd_##type##_d##D(args..., partial, done);        \
        }                                                                   \
        static constexpr auto delta = attention_bwd_delta_##type;           \
        static constexpr auto dq = attention_mma_bwd_dq_##type##_d##D;      \
        template <class... A>                                               \
        static void dkv(float* partial, int* done, A... args) {             \
            attention_mma_bwd_dkv_##type##_d##D(args..., partial, done);    \
        }                                                                   \
    };
#define MMA_NAMES(T, type) MMA_SIZE(T, type, 64) MMA_SIZE(T, type, 128) MMA_SIZE(T, type, 256)
MMA_NAMES(__nv_bfloat16, bf16)
MMA_NAMES(__half, f16)

// How a family of kernels is launched.
struct AttentionLaunch {
    const char* name;
    int rows, keys;                 // a block's rows: of queries (forward, dq), of keys (dkv)
    size_t fwd_bytes, bwd_bytes;    // shared memory
    unsigned threads, dkv_blocks;   // dkv_blocks: grid.z of dkv
    double slack;                   // beyond rounding the result, relative to its largest value
    int shares = 1;                 // of a group's heads, in dkv
    int key_shares = 1;             // of the tiles of keys, forward
};

// Rows of `heads` heads, `gap` wider than they need be, from dense values.
template <class T>
check::Buffer<T> attention_rows(const std::vector<double>& dense, int width, int gap) {
    const size_t rows = dense.size() / width;
    check::Buffer<T> out(rows * (width + gap));
    for (size_t r = 0; r < rows; ++r)
        for (int i = 0; i < width; ++i) out[r * (width + gap) + i] = check::rounded<T>(dense[r * width + i]);
    return out;
}

// Compares heads inside wider rows; the gap must still be NaN.
template <class T>
void attention_close(const std::string& what, const check::Buffer<T>& got, const std::vector<double>& want, int width, int gap,
                     double slack) {
    std::vector<T> dense;
    const size_t rows = want.size() / width;
    double largest = 0;
    for (size_t r = 0; r < rows; ++r)
        for (int i = 0; i < width; ++i) dense.push_back(got[r * (width + gap) + i]);
    for (double v : want) largest = std::max(largest, std::abs(v));
    check::close(what, dense.data(), want, slack * std::max(largest, 0.1));
    for (size_t r = 0; r < rows; ++r)
        for (int i = width; i < width + gap; ++i)
            if (!std::isnan(check::real(got[r * (width + gap) + i]))) {
                ++check::failures;
                std::printf("FAILED: %s wrote beside its heads\n", what.c_str());
                return;
            }
}

template <class T, class Kernels>
void test_attention(const AttentionCase& c, const AttentionLaunch& launch) {
    const int D = c.head_size, H = c.n_head, G = c.n_query_groups, T_ = c.tokens, keys = c.tokens + c.offset;
    Dense dense;
    const auto fill = [&](std::vector<double>& to, size_t n, unsigned seed) {
        for (const T& v : check::random<T>(n, seed)) to.push_back(check::real(v));
    };
    fill(dense.q, size_t(T_) * H * D, 1);
    fill(dense.k, size_t(keys) * G * D, 2);
    fill(dense.v, size_t(keys) * G * D, 3);
    fill(dense.d_o, size_t(T_) * H * D, 4);
    const auto q = attention_rows<T>(dense.q, H * D, c.gap), k = attention_rows<T>(dense.k, G * D, c.gap);
    const auto v = attention_rows<T>(dense.v, G * D, c.gap), d_o = attention_rows<T>(dense.d_o, H * D, c.gap);
    const i64 ld_h = i64(H) * D + c.gap, ld_g = i64(G) * D + c.gap;
    const std::vector<int> starts = c.starts();
    const int* segment_start = c.segments.empty() ? nullptr : starts.data();
    const int padded = D <= 64 ? 64 : D <= 128 ? 128 : 256;
    dense.backward(c);

    check::Buffer<T> o(q.size());
    check::Buffer<float> lse(size_t(T_) * H);
    const unsigned row_blocks = (T_ + launch.rows - 1) / launch.rows;
    check::Buffer<float> parts(launch.key_shares > 1 ? row_blocks * H * launch.key_shares * 128 * (padded / 2 + 4) : 0);
    const std::vector<int> no_rows(row_blocks * H);
    std::vector<int> done_rows(no_rows);
    emulate::launch(dim3(row_blocks, H, launch.key_shares), dim3(launch.threads), launch.fwd_bytes, [&] {
        Kernels::fwd(parts.data(), done_rows.data(), q.data(), k.data(), v.data(), o.data(), lse.data(), segment_start, T_, c.offset, c.prefix, H, G, D, ld_h,
                     ld_g, ld_g, ld_h, c.scale(), c.soft_cap, c.window);
    });
    const std::string what = c.name(launch.name);
    attention_close(what + " o", o, dense.o, H * D, c.gap, launch.slack);
    check::close(what + " lse", lse.data(), dense.lse, 1e-5);
    check::equal(what + " done rows", done_rows.data(), no_rows.data(), no_rows.size());

    // δ is compared for the rounded o that the kernel is given; what follows gets the exact δ and lse, so that its own
    // error is not hidden behind theirs.
    check::Buffer<float> delta(size_t(T_) * H);
    emulate::launch(dim3((T_ * H + 1) / 2), dim3(64), 0, [&] { Kernels::delta(o.data(), d_o.data(), delta.data(), T_, H, D, ld_h, ld_h); });
    std::vector<double> want_delta(delta.size(), 0.0);
    for (int t = 0; t < T_; ++t)
        for (int i = 0; i < H * D; ++i) want_delta[size_t(i / D) * T_ + t] += check::real(o[t * ld_h + i]) * check::real(d_o[t * ld_h + i]);
    check::close(what + " delta", delta.data(), want_delta, 1e-5);
    std::copy(dense.delta.begin(), dense.delta.end(), delta.begin());
    std::copy(dense.lse.begin(), dense.lse.end(), lse.begin());
    check::Buffer<T> dq(q.size()), dk(k.size()), dv(v.size());
    emulate::launch(dim3((T_ + launch.rows - 1) / launch.rows, H), dim3(launch.threads), launch.bwd_bytes, [&] {
        Kernels::dq(q.data(), k.data(), v.data(), d_o.data(), lse.data(), delta.data(), dq.data(), segment_start, T_, c.offset, c.prefix,
                    H, G, D, ld_h, ld_g, ld_g, ld_h, ld_h, c.scale(), c.soft_cap, c.window);
    });
    const unsigned key_blocks = (keys + launch.keys - 1) / launch.keys, sums = key_blocks * G * launch.dkv_blocks;
    check::Buffer<float> partial(launch.shares > 1 ? sums * launch.shares * 128 * std::min(padded, 128) : 0);
    const std::vector<int> zeros(sums);
    std::vector<int> done(zeros);
    emulate::launch(dim3(key_blocks, G * launch.shares, launch.dkv_blocks), dim3(launch.threads), launch.bwd_bytes, [&] {
        Kernels::dkv(partial.data(), done.data(), q.data(), k.data(), v.data(), d_o.data(), lse.data(), delta.data(), dk.data(), dv.data(), segment_start, T_, c.offset,
                     c.prefix, H, G, D, ld_h, ld_g, ld_g, ld_h, ld_g, ld_g, c.scale(), c.soft_cap, c.window);
    });
    attention_close(what + " dq", dq, dense.dq, H * D, c.gap, launch.slack);
    attention_close(what + " dk", dk, dense.dk, G * D, c.gap, launch.slack);
    attention_close(what + " dv", dv, dense.dv, G * D, c.gap, launch.slack);
    check::equal(what + " done", done.data(), zeros.data(), zeros.size());
}

inline std::vector<AttentionCase> attention_cases() {
    return {
        {5, 1, 1, 5, 0.0f, 0, {}},
        {37, 2, 2, 64, 0.0f, 0, {}, 0, 8},
        {70, 4, 2, 20, 2.0f, 0, {}, 0, 3},
        {77, 3, 1, 16, 0.0f, 9, {0, 5, 6, 40}},
        {50, 2, 1, 24, 1.5f, 40, {0, 33}, 0, 8},
        {5, 2, 1, 8, 0.0f, 0, {}, 41},
        {3, 2, 2, 16, 0.0f, 7, {}, 70},
        // Samples after a prefix, a window that reaches into it or does not, one that ends inside a tile of keys.
        {40, 2, 1, 16, 0.0f, 0, {0, 1, 30}, 37, 0, 37},
        {60, 4, 2, 16, 1.5f, 20, {0, 33}, 70, 8, 70},
        {90, 1, 1, 8, 0.0f, 45, {0, 3, 80}, 5, 0, 5},
    };
}

template <class T>
AttentionLaunch plain_launch(int head_size) {
    const size_t D = head_size, stride = D | 1;
    return {"attention", 16, 16, (16 * D + 32 * stride) * 4, (32 * D + 64 * stride) * 4, 128, 1, 1e-5};
}

template <class T>
void test_attentions() {
    if (emulate::seed == 0 && sizeof(T) == 4) test_dense_reference();
    for (const AttentionCase& c : attention_cases()) test_attention<T, AttentionKernels<T, 64>>(c, plain_launch<T>(c.head_size));
    const AttentionCase large = {35, 2, 1, 80, 0.0f, 0, {}}, largest = {20, 1, 1, 256, 0.0f, 12, {0, 3}};
    test_attention<T, AttentionKernels<T, 128>>(large, plain_launch<T>(80));
    test_attention<T, AttentionKernels<T, 256>>(largest, plain_launch<T>(256));
}

// p and ds are rounded before their products: the error of a sum is below a rounding of its largest terms.
template <class T, int D>
AttentionLaunch mma_launch() {
    const size_t row = D * 2;
    return {"attention_mma", 64, 64, (64 + 2 * FORWARD_TILE<D>) * row, (128 + 2 * BACKWARD_TILE<D>) * row, 128, D == 256 ? 2u : 1u,
            check::ROUNDING<T>};
}

template <class T>
void test_attentions_mma() {
    for (const AttentionCase& c : attention_cases())
        if (c.head_size % 8 == 0 && c.gap % 8 == 0) test_attention<T, MmaKernels<T, 64>>(c, mma_launch<T, 64>());
    // More than one block, tiles that nobody sees, samples that begin inside a tile.
    test_attention<T, MmaKernels<T, 64>>({150, 2, 1, 64, 3.0f, 50, {0, 7, 90}, 0, 8}, mma_launch<T, 64>());
    test_attention<T, MmaKernels<T, 64>>({150, 2, 1, 32, 0.0f, 0, {0, 7, 90, 149}, 130, 8, 130}, mma_launch<T, 64>());
    test_attention<T, MmaKernels<T, 64>>({150, 1, 1, 16, 0.0f, 60, {0, 90}, 70, 0, 70}, mma_launch<T, 64>());
    test_attention<T, MmaKernels<T, 128>>({70, 2, 1, 80, 0.0f, 0, {}}, mma_launch<T, 128>());
    // Heads of a group in shares, of one length and not; keys in shares, of which some have none, with a prefix and a window.
    const auto in_shares = [](AttentionLaunch launch, int shares) {
        launch.shares = launch.key_shares = shares;
        return launch;
    };
    test_attention<T, MmaKernels<T, 64>>({3, 4, 2, 24, 0.0f, 0, {}, 300}, in_shares(mma_launch<T, 64>(), 2));
    test_attention<T, MmaKernels<T, 64>>({5, 3, 1, 64, 2.0f, 90, {0, 2}, 400, 8, 150}, in_shares(mma_launch<T, 64>(), 3));
    test_attention<T, MmaKernels<T, 64>>({70, 6, 2, 16, 0.0f, 0, {0, 20}}, in_shares(mma_launch<T, 64>(), 2));
    test_attention<T, MmaKernels<T, 128>>({20, 3, 1, 72, 2.0f, 9, {}, 50}, in_shares(mma_launch<T, 128>(), 3));
    test_attention<T, MmaKernels<T, 256>>({66, 4, 2, 136, 0.0f, 0, {}}, in_shares(mma_launch<T, 256>(), 2));
    test_attention<T, MmaKernels<T, 128>>({66, 1, 1, 128, 0.0f, 33, {0, 40}, 0, 16}, mma_launch<T, 128>());
    test_attention<T, MmaKernels<T, 256>>({67, 2, 1, 256, 5.0f, 0, {0, 3}}, mma_launch<T, 256>());
}
