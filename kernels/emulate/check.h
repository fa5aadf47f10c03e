// What the kernel tests share: typed buffers with guarded ends, random values, comparison with a reference in f64.
//
// A result may be off by one rounding of its type, and by the sums in f32 that led to it. A failure prints the case,
// the worst element and both values; the run goes on, and main returns 1.
#pragma once
#include "emulate.h"

#include <string>

namespace check {

inline int failures = 0;
inline int comparisons = 0;

// Half a unit in the last place, relative: what rounding a result once can cost.
template <class T>
constexpr double ROUNDING = 6e-8;
template <>
constexpr double ROUNDING<__nv_bfloat16> = 1.0 / 256;
template <>
constexpr double ROUNDING<__half> = 1.0 / 2048;

template <class T>
const char* NAME = "f32";
template <>
inline const char* NAME<__nv_bfloat16> = "bf16";
template <>
inline const char* NAME<__half> = "f16";

inline double real(float v) { return v; }
inline double real(double v) { return v; }
inline double real(__nv_bfloat16 v) { return __bfloat162float(v); }
inline double real(__half v) { return __half2float(v); }
template <class T>
T rounded(double v);
template <>
inline float rounded<float>(double v) { return float(v); }
template <>
inline __nv_bfloat16 rounded<__nv_bfloat16>(double v) { return __float2bfloat16(float(v)); }
template <>
inline __half rounded<__half>(double v) { return __float2half(float(v)); }

// Elements on a 16-byte boundary, or `shift` elements behind one, with bytes on both sides that must stay.
template <class T>
class Buffer {
    static constexpr size_t GUARD = 64;
    std::vector<char> bytes;
    size_t start = 0, count = 0;

  public:
    explicit Buffer(size_t n, size_t shift = 0) : bytes(n * sizeof(T) + 3 * GUARD, char(0xa5)), count(n) {
        const size_t address = reinterpret_cast<size_t>(bytes.data());
        start = (address + GUARD + 15) / 16 * 16 - address + shift * sizeof(T);
        std::fill(begin(), end(), rounded_nan());
    }
    Buffer(const Buffer& other) : Buffer(other.count, other.start % 16 / sizeof(T)) {
        std::copy(other.begin(), other.end(), begin());
    }
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        for (size_t i = 0; i < bytes.size(); ++i)
            if ((i < start || i >= start + count * sizeof(T)) && bytes[i] != char(0xa5)) {
                std::printf("FAILED: written outside a buffer of %zu elements, byte %td\n", count, ptrdiff_t(i - start));
                ++failures;
                return;
            }
    }
    static T rounded_nan() {
        T v;
        std::memset(&v, 0xff, sizeof(T));
        return v;
    }
    T* data() { return reinterpret_cast<T*>(bytes.data() + start); }
    const T* data() const { return reinterpret_cast<const T*>(bytes.data() + start); }
    T* begin() { return data(); }
    T* end() { return data() + count; }
    const T* begin() const { return data(); }
    const T* end() const { return data() + count; }
    size_t size() const { return count; }
    T& operator[](size_t i) { return data()[i]; }
    const T& operator[](size_t i) const { return data()[i]; }
};

template <class T>
Buffer<T> random(size_t n, unsigned seed, double mean = 0, double deviation = 1, size_t shift = 0) {
    std::mt19937 rng(seed);
    std::normal_distribution<double> normal(mean, deviation);
    Buffer<T> out(n, shift);
    for (T& v : out) v = rounded<T>(normal(rng));
    return out;
}

// Each element within one rounding of `want` plus `slack`, which is in units of the result.
template <class T>
void close(const std::string& what, const T* got, const std::vector<double>& want, double slack = 2e-6) {
    ++comparisons;
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        const double off = std::abs(real(got[i]) - want[i]) / (ROUNDING<T> * std::abs(want[i]) + slack);
        if (!(off <= worst)) {
            worst = off;
            at = i;
            if (std::isnan(off)) break;
        }
    }
    if (worst <= 1.0) return;
    ++failures;
    std::printf("FAILED: %s, %s, seed %u: element %zu of %zu: got %.9g, expected %.9g (%.2g of what is allowed)\n", what.c_str(),
                NAME<T>, emulate::seed, at, want.size(), real(got[at]), want[at], worst);
}

template <class T>
void equal(const std::string& what, const T* got, const T* want, size_t n) {
    ++comparisons;
    for (size_t i = 0; i < n; ++i)
        if (std::memcmp(&got[i], &want[i], sizeof(T))) {
            ++failures;
            std::printf("FAILED: %s, seed %u: element %zu of %zu: got %.9g, expected %.9g\n", what.c_str(), emulate::seed, i, n,
                        double(got[i]), double(want[i]));
            return;
        }
}

inline std::string with(const char* name, std::initializer_list<std::pair<const char*, double>> values) {
    std::string text = name;
    for (const auto& [key, value] : values) {
        char number[64];
        std::snprintf(number, sizeof number, " %s=%g", key, value);
        text += number;
    }
    return text;
}

// Sizes that are odd, shorter than a warp, longer than a block, and a multiple of every pack.
constexpr int SIZES[] = {5, 64, 123, 256, 1027};

}  // namespace check
