// Dropout whose mask is a function of a seed and of the place of an entry: nothing is stored, and drawing is cheaper than
// reading the entry.

#pragma once

#include <cstdint>
#include <cstring>

#include "memory.hpp"
#include "vectors.hpp"

namespace {

typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

// A bijection of 32-bit words with little bias: two multiplications between shifts (constants: C. Wellons, Hash function
// prospector).
INLINE Words mix(Words x) {
    x ^= x >> 16;
    x *= 0x21f0aaad;
    x ^= x >> 15;
    x *= 0x735a2d97;
    return x ^ x >> 15;
}

// All ones where the entry `first` + lane is dropped.
INLINE Words dropped(uint64_t first, uint64_t seed, uint32_t threshold) {
    Words lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    const uint32_t high = uint32_t(first >> 32) * 0x9e3779b9u;
    const Words x = mix((lane + uint32_t(first)) ^ uint32_t(seed)) + (uint32_t(seed >> 32) ^ high);
    return (Words)(mix(x) < threshold);
}

INLINE void drop_vector(const float* from, float* to, float scale, Words drop) {
    store(to, (Vector)((Words)(load(from) * scale) & ~drop));
}

// bfloat16 as it is stored: rounded to nearest even.
INLINE void drop_vector(const uint16_t* from, uint16_t* to, float scale, Words drop) {
    for (int l = 0; l < LANES; l++) {
        const uint32_t wide = uint32_t(from[l]) << 16;
        float x;
        std::memcpy(&x, &wide, sizeof x);
        x *= scale;
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        const bool nan = x != x;
        bits = nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
        to[l] = drop[l] ? 0 : uint16_t(bits >> 16);
    }
}

// to[i] = 0 with probability threshold / 2^32, from[i] * scale otherwise.
template <typename Entry>
void dropout(const Entry* from, Entry* to, int64_t count, uint64_t seed, uint32_t threshold, float scale, int threads) {
    constexpr int64_t CHUNK = 1 << 14;
    const int64_t chunks = (count + CHUNK - 1) / CHUNK;
    use_large_pages(to, count * int64_t(sizeof(Entry)));
#pragma omp parallel for schedule(static) num_threads(chunks < threads ? int(chunks < 1 ? 1 : chunks) : threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t begin = chunk * CHUNK, end = count - begin < CHUNK ? count : begin + CHUNK;
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) drop_vector(from + i, to + i, scale, dropped(i, seed, threshold));
        if (i < end) {
            Entry padded[LANES] = {};
            std::memcpy(padded, from + i, (end - i) * sizeof(Entry));
            drop_vector(padded, padded, scale, dropped(i, seed, threshold));
            std::memcpy(to + i, padded, (end - i) * sizeof(Entry));
        }
    }
}

}  // namespace
