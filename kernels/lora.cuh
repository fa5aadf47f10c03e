// Dropout's mask on an adapter's input (lora.cu, lora_mma.cu).
//
// It is a function of seed and element, the same as in src/ops/lora.rs, so that the backward draws it again instead of keeping
// it and a run is the same on either device: an element is dropped where the hash of its index is below limit = p · 2³².
// The index counts in 32 bits; beyond 2³² elements the mask repeats.
#pragma once
#include "common.cuh"

// 32 random bits of element `index`: the finalizer of MurmurHash3 over both, twice.
__device__ __forceinline__ uint32_t hash(uint64_t seed, uint32_t index) {
    uint32_t h = index ^ uint32_t(seed);
    for (int round = 0; round < 2; ++round) {
        h ^= h >> 16;
        h *= 0x85ebca6bu;
        h ^= h >> 13;
        h *= 0xc2b2ae35u;
        h ^= h >> 16;
        h += uint32_t(seed >> 32);
    }
    return h;
}

struct Mask {
    uint64_t seed;
    uint32_t limit;
    float scale;  // 1 / (1 - p)

    // What element `index` is multiplied by.
    __device__ __forceinline__ float at(i64 index) const { return limit && hash(seed, uint32_t(index)) < limit ? 0.0f : scale; }
};
