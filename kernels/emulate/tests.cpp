// Every kernel on the CPU against a reference in f64. Run by tests/kernels.rs, or by hand:
//     c++ -std=c++17 -O1 -ffp-contract=off -DEMULATE -o target/kernels kernels/emulate/tests.cpp && target/kernels
// Here: norm, rope, glu, head, optimizer, nf4, and main. Attention and lora are in files of their own.
#include "attention_tests.h"

#include "../glu.cu"
#include "../head.cu"
#include "../lora.cu"
#include "../lora_mma.cu"
#include "../nf4.cu"
#include "../nf4_product.cu"
#include "../norm.cu"
#include "../optimizer.cu"
#include "../quantized.cu"
#include "../rope.cu"

using check::Buffer;
using check::close;
using check::random;
using check::real;
using check::SIZES;
using check::with;
using Reference = std::vector<double>;

// The kernels of one type by one name.
template <class T>
struct Kernels;
#define NAMES(T, type)                                                                        \
    template <>                                                                               \
    struct Kernels<T> {                                                                       \
        static constexpr auto rms_norm_fwd = rms_norm_fwd_##type;                             \
        static constexpr auto rms_norm_bwd = rms_norm_bwd_##type;                             \
        static constexpr auto layer_norm_fwd = layer_norm_fwd_##type;                         \
        static constexpr auto layer_norm_bwd = layer_norm_bwd_##type;                         \
        static constexpr auto rope = rope_##type;                                             \
        static constexpr auto glu_fwd = glu_fwd_##type;                                       \
        static constexpr auto glu_bwd = glu_bwd_##type;                                       \
        static constexpr auto activation_fwd = activation_fwd_##type;                         \
        static constexpr auto activation_bwd = activation_bwd_##type;                         \
        static constexpr auto cross_entropy = cross_entropy_##type;                           \
        static constexpr auto dropout = dropout_##type;                                       \
        static constexpr auto add = add_##type;                                               \
        static constexpr auto add_bias = add_bias_##type;                                     \
        static constexpr auto nf4_quantize = nf4_quantize_##type;                             \
        static constexpr auto nf4_dequantize = nf4_dequantize_##type;                         \
        static constexpr auto nf4_dequantize_double = nf4_dequantize_double_##type;           \
        static constexpr auto nf4_product = nf4_product_##type;                               \
        static constexpr auto int8_dequantize = int8_dequantize_##type;                       \
        static constexpr auto int8_product = int8_product_##type;                             \
    };
FOR_EACH_TYPE(NAMES)

#include "lora_tests.h"

// --- norm ---

// One case: `rows` of `c`, in `heads` a token, inside rows that are `gap` elements wider than the heads.
template <class T>
void test_norm(int rows, int c, int heads, int gap, int weights, bool layer, bool accumulate, dim3 threads) {
    const std::string what = with(layer ? "layer_norm" : "rms_norm", {{"rows", rows}, {"c", c}, {"heads", heads}, {"gap", gap},
                                  {"weights", weights}, {"accumulate", accumulate}, {"threads", threads.x}});
    const float eps = 1e-3f;
    const i64 ld = i64(heads) * c + gap;
    const int tokens = rows / heads;
    const auto x = random<T>(tokens * ld, 1, layer ? 3.0 : 0.0);
    const auto w = random<float>(weights * c, 2), b = random<float>(weights * c, 3);
    const auto dy = random<T>(tokens * ld, 4), old = random<T>(tokens * ld, 5);
    Buffer<T> y(old), dx(old), copied(old);
    T* copy = accumulate ? copied.data() : nullptr;
    const dim3 grid((rows + threads.y - 1) / threads.y);
    emulate::launch(grid, threads, 0, [&] {
        if (layer)
            Kernels<T>::layer_norm_fwd(x.data(), w.data(), b.data(), y.data(), copy, rows, c, heads, weights, ld, ld, eps);
        else
            Kernels<T>::rms_norm_fwd(x.data(), w.data(), nullptr, y.data(), copy, rows, c, heads, weights, ld, ld, eps);
    });
    const auto backward = layer ? Kernels<T>::layer_norm_bwd : Kernels<T>::rms_norm_bwd;
    emulate::launch(grid, threads, 0, [&] {
        backward(dy.data(), x.data(), w.data(), dx.data(), rows, c, heads, weights, ld, ld, ld, eps, accumulate);
    });
    Reference want_y(tokens * ld), want_dx(tokens * ld), want_copy(tokens * ld);
    for (size_t i = 0; i < want_y.size(); ++i) want_y[i] = want_dx[i] = want_copy[i] = real(old[i]);  // the gap stays
    for (int row = 0; row < rows; ++row) {
        const size_t at = row / heads * ld + row % heads * c, own = row % weights * c;
        double m = 0, variance = 0, avg_g = 0, avg_gx = 0;
        if (layer)
            for (int i = 0; i < c; ++i) m += real(x[at + i]) / c;
        for (int i = 0; i < c; ++i) variance += std::pow(real(x[at + i]) - m, 2) / c;
        const double r = 1 / std::sqrt(variance + eps);
        const auto g = [&](int i) { return real(dy[at + i]) * real(w[own + i]); };
        const auto normed = [&](int i) { return (real(x[at + i]) - m) * r; };
        for (int i = 0; i < c; ++i) {
            if (layer) avg_g += g(i) / c;
            avg_gx += g(i) * normed(i) / c;
        }
        for (int i = 0; i < c; ++i) {
            want_y[at + i] = normed(i) * real(w[own + i]) + (layer ? real(b[own + i]) : 0);
            want_dx[at + i] = r * (g(i) - avg_g - normed(i) * avg_gx) + (accumulate ? real(old[at + i]) : 0);
            if (copy) want_copy[at + i] = real(x[at + i]);
        }
    }
    close(what + " y", y.data(), want_y, 1e-5);
    close(what + " dx", dx.data(), want_dx, 2e-5);
    close(what + " copy", copied.data(), want_copy, 0);
}

template <class T>
void test_norms() {
    for (bool layer : {false, true}) {
        for (int c : SIZES) test_norm<T>(5, c, 1, 0, 1, layer, c % 2, dim3(c > 200 ? 256 : 96));
        test_norm<T>(6, 64, 3, 64, 1, layer, true, dim3(32, 4));   // heads inside a wider matrix, a warp each
        test_norm<T>(9, 20, 3, 7, 3, layer, false, dim3(32, 2));  // each head with its own weights
    }
    // In place: y may be x, dx may be dy.
    const int rows = 3, c = 123;
    const auto x = random<T>(rows * c, 1);
    const auto w = random<float>(c, 2);
    Buffer<T> z(x), y(size_t(rows * c)), d(random<T>(rows * c, 4)), dx(size_t(rows * c));
    for (T* to : {y.data(), z.data()})
        emulate::launch(dim3(rows), dim3(64), 0, [&] {
            Kernels<T>::rms_norm_fwd(z.data(), w.data(), nullptr, to, nullptr, rows, c, 1, 1, c, c, 1e-3f);
        });
    for (T* to : {dx.data(), d.data()})
        emulate::launch(dim3(rows), dim3(64), 0, [&] {
            Kernels<T>::rms_norm_bwd(d.data(), x.data(), w.data(), to, rows, c, 1, 1, c, c, c, 1e-3f, 0);
        });
    Reference want_y, want_dx;
    for (const T& v : y) want_y.push_back(real(v));
    for (const T& v : dx) want_dx.push_back(real(v));
    close("rms_norm_fwd in place", z.data(), want_y, 0);
    close("rms_norm_bwd in place", d.data(), want_dx, 0);
}

// --- rope ---

template <class T>
void test_rope(int tokens, int heads, int head_size, int rotary, int gap) {
    const i64 ld = i64(heads) * head_size + gap;
    const int half = rotary / 2, length = 40;
    const auto x = random<T>(tokens * ld, 1);
    Buffer<float> cos(length * half), sin(length * half);
    for (int p = 0; p < length; ++p)
        for (int i = 0; i < half; ++i) {
            cos[p * half + i] = float(std::cos(p * std::pow(100.0, -double(i) / half)));
            sin[p * half + i] = float(std::sin(p * std::pow(100.0, -double(i) / half)));
        }
    Buffer<int> positions(tokens);
    for (int t = 0; t < tokens; ++t) positions[t] = (t * 7) % length;
    for (float sign : {1.0f, -1.0f}) {
        Buffer<T> y(x);
        emulate::launch(dim3(tokens), dim3(64), 0, [&] {
            Kernels<T>::rope(y.data(), cos.data(), sin.data(), positions.data(), heads, head_size, rotary, ld, sign);
        });
        Reference want;
        for (const T& v : x) want.push_back(real(v));
        for (int t = 0; t < tokens; ++t)
            for (int h = 0; h < heads; ++h)
                for (int i = 0; i < half; ++i) {
                    const size_t a = t * ld + h * head_size + i, b = a + half;
                    const double c = cos[positions[t] * half + i], s = sign * sin[positions[t] * half + i];
                    want[a] = real(x[a]) * c - real(x[b]) * s;
                    want[b] = real(x[b]) * c + real(x[a]) * s;
                }
        close(with("rope", {{"heads", heads}, {"head_size", head_size}, {"rotary", rotary}, {"gap", gap}, {"sign", sign}}), y.data(), want);
    }
}

template <class T>
void test_ropes() {
    test_rope<T>(5, 3, 64, 64, 128);
    test_rope<T>(5, 2, 20, 8, 3);   // part of the head turns, nothing is aligned
    test_rope<T>(3, 4, 80, 32, 0);
    test_rope<T>(3, 1, 10, 10, 5);
}

// --- glu ---

double activate_reference(double g, int act, bool slope) {
    const auto value = [&](double g) {
        switch (act) {
            case 0: return g / (1 + std::exp(-g));
            case 1: return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
            case 2: return 0.5 * g * (1 + std::erf(g / std::sqrt(2.0)));
            default: return std::max(g, 0.0);
        }
    };
    const double h = 1e-5;  // the central difference is good to 1e-10 here
    if (slope && act == 3) return g > 0;
    return slope ? (value(g + h) - value(g - h)) / (2 * h) : value(g);
}

template <class T>
void test_glu(int rows, int inner, int act, unsigned grid_y, size_t shift) {
    const auto x = random<T>(2 * rows * inner, 1, 0, 2, shift), dy = random<T>(rows * inner, 2);
    Buffer<T> y(size_t(rows * inner)), dx(x);
    emulate::launch(dim3(rows, grid_y), dim3(64), 0, [&] { Kernels<T>::glu_fwd(x.data(), y.data(), inner, act); });
    emulate::launch(dim3(rows, grid_y), dim3(64), 0, [&] { Kernels<T>::glu_bwd(dx.data(), dy.data(), inner, act); });
    Reference want_y(rows * inner), want_dx(2 * rows * inner);
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < inner; ++i) {
            const size_t gate = r * 2 * inner + i, up = gate + inner, out = r * inner + i;
            const double g = real(x[gate]), u = real(x[up]), d = real(dy[out]);
            want_y[out] = activate_reference(g, act, false) * u;
            want_dx[gate] = d * u * activate_reference(g, act, true);
            want_dx[up] = d * activate_reference(g, act, false);
        }
    const std::string what = with("glu", {{"inner", inner}, {"act", act}, {"shift", double(shift)}});
    close(what + " y", y.data(), want_y, 1e-5);
    close(what + " dx", dx.data(), want_dx, 1e-5);
}

template <class T>
void test_activation(int n, int act) {
    const auto x = random<T>(n, 1, 0, 2), dy = random<T>(n, 2);
    Buffer<T> y(size_t{size_t(n)}), dx(x);
    emulate::launch(dim3(2), dim3(64), 0, [&] { Kernels<T>::activation_fwd(x.data(), y.data(), n, act); });
    emulate::launch(dim3(2), dim3(64), 0, [&] { Kernels<T>::activation_bwd(dx.data(), dy.data(), dx.data(), n, act); });
    Reference want_y, want_dx;
    for (int i = 0; i < n; ++i) {
        want_y.push_back(activate_reference(real(x[i]), act, false));
        want_dx.push_back(real(dy[i]) * activate_reference(real(x[i]), act, true));
    }
    close(with("activation y", {{"n", n}, {"act", act}}), y.data(), want_y, 1e-5);
    close(with("activation dx", {{"n", n}, {"act", act}}), dx.data(), want_dx, 1e-5);
}

template <class T>
void test_glus() {
    for (int act = 0; act < 4; ++act) {
        for (int inner : SIZES) test_glu<T>(3, inner, act, inner > 200 ? 2 : 1, 0);
        test_glu<T>(2, 64, act, 1, 1);
        for (int n : {5, 123, 1024}) test_activation<T>(n, act);
    }
}

// --- head ---

template <class T>
void test_head(int rows, int v, int padding, float logit_scale, float cap, bool gradient) {
    const i64 ld = v + padding;
    const float scale = 0.3f;
    const auto logits = random<T>(rows * ld, 1, 0, 4);
    Buffer<T> got(logits);
    Buffer<int> labels(rows);
    for (int r = 0; r < rows; ++r) labels[r] = r == 1 ? -100 : (r * 31 + 2) % v;
    labels[rows - 1] = v;  // not a token
    Buffer<float> loss(rows);
    emulate::launch(dim3(rows), dim3(96), 0, [&] {
        Kernels<T>::cross_entropy(got.data(), labels.data(), loss.data(), &scale, v, ld, logit_scale, cap, -100, gradient);
    });
    Reference want(rows * ld, 0.0), want_loss(rows - 1, 0.0);
    for (int r = 0; r + 1 < rows; ++r) {
        if (labels[r] == -100) continue;
        std::vector<double> z(v), slope(v, logit_scale);
        double top = -1e300, sum = 0;
        for (int i = 0; i < v; ++i) {
            z[i] = real(logits[r * ld + i]) * logit_scale;
            if (cap > 0) {
                const double t = std::tanh(z[i] / cap);
                z[i] = cap * t;
                slope[i] = logit_scale * (1 - t * t);
            }
            top = std::max(top, z[i]);
        }
        for (double x : z) sum += std::exp(x - top);
        want_loss[r] = top + std::log(sum) - z[labels[r]];
        for (int i = 0; i < v; ++i) want[r * ld + i] = (std::exp(z[i] - top) / sum - (i == labels[r])) * scale * slope[i];
    }
    if (!gradient)
        for (size_t i = 0; i < want.size(); ++i) want[i] = real(logits[i]);
    const std::string what = with("cross_entropy", {{"v", v}, {"padding", padding}, {"logit_scale", logit_scale}, {"cap", cap}, {"gradient", gradient}});
    close(what + " loss", loss.data(), want_loss, 1e-5);
    close(what + " gradient", got.data(), want, 1e-6);  // the log-sum-exp, of up to 30, is good to 1e-6
    if (!std::isnan(loss[rows - 1])) {
        ++check::failures;
        std::printf("FAILED: %s: a label outside the vocabulary must give a NaN loss\n", what.c_str());
    }
}

// A logit that is not a number is neither the largest nor the label's, and must reach the loss all the same.
template <class T>
void test_nan_logit(int v) {
    const float scale = 1.0f;
    auto logits = random<T>(v, 1);
    logits[v / 2] = from_float<T>(NOT_A_NUMBER);
    Buffer<int> labels(1);
    labels[0] = 0;
    Buffer<T> got(logits);
    Buffer<float> loss(1);
    emulate::launch(dim3(1), dim3(96), 0, [&] {
        Kernels<T>::cross_entropy(got.data(), labels.data(), loss.data(), &scale, v, v, 1.0f, 0.0f, -100, 0);
    });
    if (!std::isnan(loss[0])) {
        ++check::failures;
        std::printf("FAILED: cross_entropy of %d logits, one of them NaN, gives the loss %g\n", v, double(loss[0]));
    }
}

template <class T>
void test_heads() {
    for (int v : {3, 123, 256}) test_nan_logit<T>(v);
    for (int v : SIZES) test_head<T>(4, v, 0, 1.0f, v % 2 ? 5.0f : 0.0f, true);
    test_head<T>(4, 123, 5, 0.5f, 30.0f, true);
    test_head<T>(4, 256, 64, 2.0f, 0.0f, true);
    test_head<T>(4, 123, 0, 1.0f, 0.0f, false);
}

void test_casts(int n) {
    const auto x = random<float>(n, 1), old = random<float>(n, 2);
    const auto xb = random<__nv_bfloat16>(n, 1);
    Buffer<__nv_bfloat16> down(size_t{size_t(n)});
    Buffer<float> up(old);
    emulate::launch(dim3(2), dim3(32), 0, [&] { add_f32_to_bf16(x.data(), down.data(), n, 2.0f, 0); });
    emulate::launch(dim3(2), dim3(32), 0, [&] { add_bf16_to_f32(xb.data(), up.data(), n, 2.0f, 1); });
    Reference want_down, want_up;
    for (int i = 0; i < n; ++i) {
        want_down.push_back(2 * real(x[i]));
        want_up.push_back(real(old[i]) + 2 * real(xb[i]));
    }
    close(with("add_f32_to_bf16", {{"n", n}}), down.data(), want_down);
    close(with("add_bf16_to_f32", {{"n", n}}), up.data(), want_up);
}

// --- optimizer ---

void test_optimizer(int n, double max_norm, size_t shift) {
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay = 0.1, grad_scale = 0.25;
    Buffer<float> p(random<float>(n, 1, 0, 1, shift)), m(size_t{size_t(n)}), v(size_t{size_t(n)});
    std::fill(m.begin(), m.end(), 0.0f);
    std::fill(v.begin(), v.end(), 0.0f);
    Reference want_p, want_m(n, 0.0), want_v(n, 0.0);
    for (float x : p) want_p.push_back(x);
    for (int step = 1; step <= 3; ++step) {
        const auto g = random<float>(n, 10 + step);
        double squares = 0;
        for (float x : g) squares += double(x) * x;
        Buffer<float> partial(3), total(1);
        emulate::launch(dim3(3), dim3(64), 0, [&] { sum_squares_f32(g.data(), partial.data(), n); });
        emulate::launch(dim3(1), dim3(64), 0, [&] { sum_partials_f32(partial.data(), total.data(), 3, 1.0f, 0); });
        close(with("sum_squares", {{"n", n}}), total.data(), Reference{squares}, 1e-6 * squares);
        const double root = std::sqrt(1 - std::pow(beta2, step)), rate = lr / (1 - std::pow(beta1, step));
        const Hyper hyper{float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(eps), float(1 - lr * decay),
                          float(rate), float(root), float(grad_scale), float(max_norm)};
        emulate::launch(dim3(2), dim3(32), 0, [&] { adamw_f32(p.data(), g.data(), m.data(), v.data(), n, &hyper, total.data()); });
        double factor = grad_scale;
        if (max_norm > 0) factor *= std::min(1.0, max_norm / (grad_scale * std::sqrt(squares) + 1e-6));
        for (int i = 0; i < n; ++i) {
            const double grad = g[i] * factor;
            want_m[i] = beta1 * want_m[i] + (1 - beta1) * grad;
            want_v[i] = beta2 * want_v[i] + (1 - beta2) * grad * grad;
            want_p[i] = want_p[i] * (1 - lr * decay) - rate * want_m[i] / (std::sqrt(want_v[i]) / root + eps);
        }
    }
    const std::string what = with("adamw", {{"n", n}, {"max_norm", max_norm}, {"shift", double(shift)}});
    close(what + " p", p.data(), want_p, 1e-6);
    close(what + " m", m.data(), want_m, 1e-6);
    close(what + " v", v.data(), want_v, 1e-6);
}

void test_scale(int n) {
    Buffer<float> x(random<float>(n, 1));
    Reference want;
    for (float v : x) want.push_back(v * 0.37f);
    const float factor = 0.37f;
    emulate::launch(dim3(2), dim3(32), 0, [&] { scale_f32(x.data(), n, &factor); });
    close(with("scale", {{"n", n}}), x.data(), want);
}

// --- nf4 ---

// Nearest level by the midpoints in f32, half way to the lower: bitsandbytes' choice, see src/ops/nf4.rs.
float nearest_reference(float x, const float* levels, int n) {
    std::vector<float> ascending(levels, levels + n);
    std::sort(ascending.begin(), ascending.end());
    int rank = 0;
    while (rank + 1 < n && x > (ascending[rank] + ascending[rank + 1]) / 2) ++rank;
    return ascending[rank];
}

template <class T>
void test_nf4(int n, int kind) {
    const auto x = random<T>(n, 1);
    const int blocks = (n + 63) / 64, nested = (blocks + 255) / 256;
    Buffer<uint8_t> packed((n + 1) / 2);
    Buffer<float> absmax(blocks), offset(1), nested_absmax(nested), code(256);
    Buffer<uint8_t> codes(blocks);
    emulate::launch(dim3(2), dim3(64), 0, [&] { Kernels<T>::nf4_quantize(x.data(), packed.data(), absmax.data(), n, kind); });
    std::vector<float> want(n);
    for (int i = 0; i < n; ++i) {
        float largest = 0;
        for (int j = i / 64 * 64; j < std::min(n, i / 64 * 64 + 64); ++j) largest = std::max(largest, std::abs(float(real(x[j]))));
        want[i] = nearest_reference(float(real(x[i])) * (1.0f / largest), LEVELS[kind], 16) * largest;
    }
    // Whole, and from values that are inside a word, inside a byte and inside a block.
    for (int first : {0, 8, 3, 70}) {
        if (first >= n) continue;
        Buffer<T> y(size_t(n - first)), plain(size_t(n - first));
        emulate::launch(dim3(2), dim3(32), 0, [&] { Kernels<T>::nf4_dequantize(packed.data(), absmax.data(), y.data(), first, n - first, kind); });
        for (int i = first; i < n; ++i) plain[i - first] = check::rounded<T>(want[i]);
        check::equal(with("nf4_dequantize", {{"n", n}, {"kind", kind}, {"first", first}}), reinterpret_cast<const uint8_t*>(y.data()),
                     reinterpret_cast<const uint8_t*>(plain.data()), y.size() * sizeof(T));
    }
    // Double: the code book only has to be ascending here; the true one is checked in src/ops/nf4.rs.
    for (int i = 0; i < 256; ++i) code[i] = float(i < 127 ? -std::pow((127 - i) / 127.0, 3) : std::pow((i - 127) / 128.0, 3));
    emulate::launch(dim3(1), dim3(256), 0, [&] { nf4_absmax_mean(absmax.data(), offset.data(), blocks); });
    emulate::launch(dim3(nested), dim3(256), 0, [&] {
        nf4_quantize_absmax(absmax.data(), offset.data(), code.data(), codes.data(), nested_absmax.data(), blocks);
    });
    double mean = 0;
    for (float a : absmax) mean += double(a) / blocks;
    close(with("nf4_absmax_mean", {{"n", n}}), offset.data(), Reference{mean}, 1e-9);
    std::vector<float> scales(blocks);
    for (int b = 0; b < blocks; ++b) {
        float largest = 0;
        for (int j = b / 256 * 256; j < std::min(blocks, b / 256 * 256 + 256); ++j) largest = std::max(largest, std::abs(absmax[j] - offset[0]));
        const float scaled = (absmax[b] - offset[0]) * (1.0f / std::max(largest, 1e-38f));
        scales[b] = nearest_reference(scaled, code.data(), 256) * largest + offset[0];
    }
    Buffer<T> y(size_t{size_t(n)}), plain(size_t{size_t(n)});
    emulate::launch(dim3(2), dim3(32), 0, [&] {
        Kernels<T>::nf4_dequantize_double(packed.data(), codes.data(), nested_absmax.data(), code.data(), offset[0], y.data(), 0, n, kind);
    });
    for (int i = 0; i < n; ++i) {
        const uint8_t byte = packed[i / 2];
        plain[i] = check::rounded<T>(LEVELS[kind][i % 2 ? byte & 15 : byte >> 4] * scales[i / 64]);
    }
    check::equal(with("nf4_dequantize_double", {{"n", n}, {"kind", kind}}), reinterpret_cast<const uint8_t*>(y.data()),
                 reinterpret_cast<const uint8_t*>(plain.data()), y.size() * sizeof(T));
}

// W (rows, cols) with any codes and scales, plain (`nested` false) or doubly quantized.
struct Weight4 {
    int rows, cols, kind;
    bool nested;
    Buffer<uint8_t> packed, codes;
    Buffer<float> absmax, code;
    static constexpr float OFFSET = 0.7f;

    Weight4(int rows, int cols, int kind, bool nested)
        : rows(rows), cols(cols), kind(kind), nested(nested), packed((size_t(rows) * cols + 1) / 2), codes(blocks()),
          absmax(random<float>(nested ? (blocks() + 255) / 256 : blocks(), rows)), code(random<float>(256, 2)) {
        std::mt19937 rng(rows);  // matrices of one product differ
        for (uint8_t& byte : packed) byte = uint8_t(rng());
        for (uint8_t& byte : codes) byte = uint8_t(rng());
    }
    int blocks() const { return (rows * cols + 63) / 64; }
    // As after nf4_dequantize.
    template <class T>
    double at(int row, int col) const {
        const size_t i = size_t(row) * cols + col;
        const float scale = nested ? code[codes[i / 64]] * absmax[i / 64 / 256] + OFFSET : absmax[i / 64];
        return real(check::rounded<T>(LEVELS[kind][i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * scale));
    }
};

// x (n, ins) Wᵀ, or x W where `backward`, with the rows of all of `ws`; what is beside the rows of y stays.
template <class T>
Reference product4(const std::vector<Weight4>& ws, const Buffer<T>& x, const Buffer<T>& old, int n, i64 ldx, i64 ldy, bool backward, bool accumulate) {
    Reference want(n * ldy);
    for (size_t i = 0; i < want.size(); ++i) want[i] = real(old[i]);
    const int cols = ws[0].cols;
    std::vector<Reference> rows;
    for (const Weight4& w : ws)
        for (int row = 0; row < w.rows; ++row) {
            rows.emplace_back(cols);
            for (int col = 0; col < cols; ++col) rows.back()[col] = w.at<T>(row, col);
        }
    const int outs = backward ? cols : int(rows.size()), ins = backward ? int(rows.size()) : cols;
    for (int t = 0; t < n; ++t)
        for (int out = 0; out < outs; ++out) {
            double sum = accumulate ? want[t * ldy + out] : 0.0;
            for (int in = 0; in < ins; ++in) sum += (backward ? rows[in][out] : rows[out][in]) * real(x[t * ldx + in]);
            want[t * ldy + out] = sum;
        }
    return want;
}

template <class T, class Kernel>
void test_nf4_product(const char* name, Kernel kernel, int rows_of_block, int n, const Weight4& w, bool accumulate) {
    const i64 ldx = w.cols + 8, ldy = w.rows + 3;
    const auto x = random<T>(n * ldx, 3), old = random<T>(n * ldy, 4);
    Buffer<T> y(old);
    const unsigned grid = (w.rows + rows_of_block - 1) / rows_of_block;
    emulate::launch(dim3(grid), dim3(32 * PRODUCT_WARPS), 0, [&] {
        kernel(w.packed.data(), w.absmax.data(), w.nested ? w.codes.data() : nullptr, w.nested ? w.code.data() : nullptr,
               w.nested ? w.OFFSET : 0.0f, x.data(), y.data(), n, w.rows, w.cols, ldx, ldy, accumulate, w.kind);
    });
    const std::string what = with(name, {{"n", n}, {"rows", w.rows}, {"cols", w.cols}, {"kind", w.kind}, {"nested", w.nested}, {"accumulate", accumulate}});
    close(what, y.data(), product4({w}, x, old, n, ldx, ldy, false, accumulate), 2e-5);
}

template <class T, class Kernel>
void test_nf4_product_many(const char* name, Kernel kernel, bool backward, int n, int tiles, int shares, const std::vector<Weight4>& ws, bool accumulate) {
    const Weight4& first = ws[0];
    std::vector<Rows4> matrices;
    int rows = 0, row_tiles = 0;
    for (const Weight4& w : ws) {
        matrices.push_back({w.packed.data(), w.absmax.data(), w.nested ? w.codes.data() : nullptr, w.OFFSET, w.rows});
        rows += w.rows;
        row_tiles += (w.rows + SIDE - 1) / SIDE;
    }
    const int cols = first.cols, outs = backward ? cols : rows, ins = backward ? rows : cols;
    const i64 ldx = ins + 8, ldy = outs + 3;
    const auto x = random<T>(n * ldx, 3), old = random<T>(n * ldy, 4);
    Buffer<T> y(old);
    Buffer<float> partial(shares > 1 ? size_t(shares) * n * outs : 0);
    const int tile_tokens = ((n + tiles - 1) / tiles + 15) / 16 * 16, out_tiles = backward ? (cols + SIDE - 1) / SIDE : row_tiles;
    const std::vector<int> zeros(tiles * out_tiles);
    std::vector<int> done(zeros);
    emulate::launch(dim3(tiles, out_tiles, shares), dim3(256), MANY_SHARED, [&] {
        kernel(matrices.data(), first.nested ? first.code.data() : nullptr, x.data(), y.data(), partial.data(), done.data(), n, tile_tokens,
               rows, cols, ldx, ldy, accumulate, first.kind);
    });
    const std::string what = with(name, {{"n", n}, {"rows", rows}, {"cols", cols}, {"kind", first.kind}, {"nested", first.nested}, {"accumulate", accumulate}});
    close(what, y.data(), product4(ws, x, old, n, ldx, ldy, backward, accumulate), 1e-4);
    check::equal(what + " done", done.data(), zeros.data(), zeros.size());
}

template <class T>
void test_nf4_products() {
    // Every number of rows of x; rows of W that end within a block, columns within a word, a lane's share and a warp's.
    for (int n = 1; n <= PRODUCT_ROWS; ++n) {
        const bool odd = n % 2;
        const Weight4 w(11 + n, odd ? 301 : 328, odd, n % 3 == 0);
        test_nf4_product<T>("nf4_product", Kernels<T>::nf4_product, PRODUCT_WARPS, n, w, n > 4);
    }
    test_nf4_product<T>("nf4_product", Kernels<T>::nf4_product, PRODUCT_WARPS, 2, Weight4(8, 4, 0, false), false);
}

template <class T, class Kernel>
void test_nf4_products_mma(Kernel kernel) {
    for (int n = 1; n <= PRODUCT_ROWS; ++n) {
        const int cols[] = {32, 64, 96, 128, 160, 1024, 1056, 2208};
        test_nf4_product<T>("nf4_product_mma", kernel, 16, n, Weight4(13 + 2 * n, cols[n - 1], n % 2, n % 3 == 0), n > 4);
    }
}

template <class T, class Kernel>
void test_nf4_products_many(Kernel forward, Kernel backward) {
    struct Case {
        int n, tiles, shares, cols, kind;
        bool nested, accumulate;
        std::vector<int> rows;
    };
    // Whole and cut tiles on every side, one token, a stage that is half there, several stages and matrices, shares of ins.
    const Case cases[] = {{128, 1, 1, 128, 0, false, false, {128}},    {1, 1, 1, 64, 1, true, false, {8}},
                          {40, 2, 1, 192, 0, true, true, {136}},       {131, 2, 2, 448, 1, false, false, {200, 64}},
                          {17, 1, 3, 384, 0, true, true, {8, 256, 128}}};
    for (const Case& c : cases) {
        std::vector<Weight4> ws;
        for (int rows : c.rows) ws.emplace_back(rows, c.cols, c.kind, c.nested);
        test_nf4_product_many<T>("nf4_product_many", forward, false, c.n, c.tiles, c.shares, ws, c.accumulate);
        test_nf4_product_many<T>("nf4_product_many_backward", backward, true, c.n, c.tiles, c.shares, ws, c.accumulate);
    }
    test_nf4_product_many<T>("nf4_product_many", forward, false, 20, 1, 1, {Weight4(131, 128, 0, false)}, false);
}

// Any codes, -128 among them: the largest magnitude of a row is 127 only in what was quantized here.
template <class T>
void test_int8(int n, int rows, int cols, int shift, bool accumulate) {
    const i64 ldx = cols + 8, ldy = rows + 3;
    const auto x = random<T>(n * ldx, 3), old = random<T>(n * ldy, 4);
    const auto absmax = random<float>(rows, 5);
    Buffer<signed char> all(size_t(rows) * cols + shift);
    std::mt19937 rng(rows);
    for (signed char& code : all) code = static_cast<signed char>(rng());
    const signed char* codes = all.data() + shift;
    Buffer<T> y(old), decoded(size_t(rows - 1) * cols), plain(size_t(rows - 1) * cols);
    emulate::launch(dim3(rows - 1), dim3(64), 0, [&] { Kernels<T>::int8_dequantize(codes, absmax.data(), decoded.data(), 1, cols); });
    for (size_t i = 0; i < plain.size(); ++i) plain[i] = check::rounded<T>(codes[cols + i] * (absmax[1 + i / cols] / 127.0f));
    const std::string sizes = with("", {{"n", n}, {"rows", rows}, {"cols", cols}, {"shift", shift}, {"accumulate", accumulate}});
    check::equal("int8_dequantize" + sizes, reinterpret_cast<const uint8_t*>(decoded.data()), reinterpret_cast<const uint8_t*>(plain.data()),
                 plain.size() * sizeof(T));
    emulate::launch(dim3((rows + INT8_WARPS - 1) / INT8_WARPS), dim3(32 * INT8_WARPS), 0, [&] {
        Kernels<T>::int8_product(codes, absmax.data(), x.data(), y.data(), n, rows, cols, ldx, ldy, accumulate);
    });
    Reference want(n * ldy);
    for (size_t i = 0; i < want.size(); ++i) want[i] = real(old[i]);
    for (int t = 0; t < n; ++t)
        for (int row = 0; row < rows; ++row) {
            double sum = 0;
            for (int col = 0; col < cols; ++col) sum += codes[i64(row) * cols + col] * real(x[t * ldx + col]);
            double& out = want[t * ldy + row];
            out = (accumulate ? out : 0.0) + sum * absmax[row] / 127.0;
        }
    close("int8_product" + sizes, y.data(), want, 2e-5);
}

template <class T>
void test_int8s() {
    // Every number of rows of x; rows of W that end within a block; columns of which all, some and none are read 16 at a time.
    for (int n = 1; n <= INT8_ROWS; ++n) test_int8<T>(n, 6 + n, n % 2 ? 560 : 1200, 0, n > 4);
    test_int8<T>(3, 9, 301, 0, false);
    test_int8<T>(2, 4, 8, 0, true);
    test_int8<T>(2, 5, 64, 1, false);
}

// The limits are the midpoints as f32 rounds them.
void test_nf4_limits() {
    for (int kind : {0, 1})
        for (int rank = 0; rank + 1 < (kind ? 15 : 16); ++rank) {
            const float low = LEVELS[kind][ASCENDING[kind][rank]], high = LEVELS[kind][ASCENDING[kind][rank + 1]];
            const float want = (low + high) / 2;
            check::equal(with("nf4 limit", {{"kind", kind}, {"rank", rank}}), &LIMITS[kind][rank], &want, 1);
        }
}

template <class T>
void test_nf4s() {
    for (int kind : {0, 1})
        for (int n : {5, 64, 123, 1027, 64 * 300 + 1}) test_nf4<T>(n, kind);
    test_nf4_products<T>();
}

// The emulator's own half precision: every value there and back, and ties.
void test_half() {
    for (unsigned bits = 0; bits < 65536; ++bits) {
        const float f = __half2float(__half{uint16_t(bits)});
        if (!std::isnan(f) && __half2float(__float2half(f)) != f) {
            ++check::failures;
            std::printf("FAILED: f16 %04x comes back as %04x\n", bits, __float2half(f).bits);
            return;
        }
    }
}

template <class T>
void test_type() {
    test_norms<T>();
    test_ropes<T>();
    test_glus<T>();
    test_heads<T>();
    test_loras<T>();
    test_nf4s<T>();
    test_int8s<T>();
    test_attentions<T>();
}

int main() {
    test_half();
    test_nf4_limits();
    for (unsigned seed : {0u, 1u, 2u}) {  // 0: threads in order, 1: each warp runs ahead, 2: shuffled
        emulate::seed = seed;
        test_type<float>();
        test_type<__nv_bfloat16>();
        test_type<__half>();
        test_attentions_mma<__nv_bfloat16>();
        test_nf4_products_mma<__nv_bfloat16>(nf4_product_mma_bf16);
        test_nf4_products_mma<__half>(nf4_product_mma_f16);
        test_nf4_products_many<__nv_bfloat16>(nf4_product_many_bf16, nf4_product_many_backward_bf16);
        test_loras_mma<__nv_bfloat16>(LORA_MMA(bf16));
        if (seed == 0) test_loras_mma<__half>(LORA_MMA(f16));
        if (seed == 0) test_nf4_products_many<__half>(nf4_product_many_f16, nf4_product_many_backward_f16);
        if (seed == 0) test_attentions_mma<__half>();
        for (int n : SIZES) {
            test_casts(n);
            test_scale(n);
            test_optimizer(n, 0, 0);
            test_optimizer(n, 1.0, 0);
        }
        test_optimizer(64, 1.0, 1);
    }
    std::printf("%d comparisons, %d failures\n", check::comparisons, check::failures);
    return check::failures ? 1 : 0;
}
