// How a kernel reads 4-bit weights: levels, scales, values (nf4.cu, nf4_product.cu). src/ops/nf4.rs describes the format.
#pragma once
#include "common.cuh"

constexpr int QUANT_BLOCK = 64;
constexpr int NESTED_BLOCK = 256;

__constant__ float LEVELS[2][16] = {
    {-1.0f, -0.696192801f, -0.525073051f, -0.394917488f, -0.284441382f, -0.18477343f, -0.0910500363f, 0.0f, 0.0795802996f,
     0.160930201f, 0.246112302f, 0.337915242f, 0.440709829f, 0.562617004f, 0.722956836f, 1.0f},
    {0.0f, 0.00520833349f, 0.666666687f, 1.0f, 0.333333343f, 0.5f, 0.166666672f, 0.25f, 0.0f, -0.00520833349f, -0.666666687f,
     -1.0f, -0.333333343f, -0.5f, -0.166666672f, -0.25f}};

// The scale of block i, from plain scales (codes is null) or doubly quantized ones.
struct Scales {
    const float* absmax;  // or nested_absmax
    const uint8_t* codes;
    const float* nested_code;
    float offset;

    // As memory has it, so that a scale can be asked for long before it is needed.
    struct Raw {
        float absmax;
        uint8_t code;
    };
    __device__ __forceinline__ Raw fetch(i64 i) const {
        if (!codes) return {absmax[i], 0};
        return {absmax[i / NESTED_BLOCK], codes[i]};
    }
    __device__ __forceinline__ float decode(Raw raw) const {
        return codes ? __fadd_rn(__fmul_rn(nested_code[raw.code], raw.absmax), offset) : raw.absmax;
    }
    __device__ __forceinline__ float operator[](i64 i) const { return decode(fetch(i)); }
};

// The value j of the eight that a word of codes holds; the first of a byte is its high half.
__device__ __forceinline__ float value_of(uint32_t word, int j, const float* levels, float absmax) {
    // A code times the four bytes of a level, so that it needs no arithmetic behind its mask.
    const int bit = j / 2 * 8 + (j % 2 ? 0 : 4);
    const uint32_t bytes = (bit ? word >> (bit - 2) : word << 2) & 15 << 2;
    return __fmul_rn(*reinterpret_cast<const float*>(reinterpret_cast<const char*>(levels) + bytes), absmax);
}

// 16 words in 16 banks of shared memory: any codes are looked up without a conflict.
__device__ __forceinline__ void load_levels(float* levels, int kind) {
    if (threadIdx.x < 16) levels[threadIdx.x] = LEVELS[kind][threadIdx.x];
    __syncthreads();
}
