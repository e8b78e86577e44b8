// One register of floats, as wide as the instruction set this file is compiled for, and its shuffles.
//
// Only GCC and Clang vector extensions: the compiler picks the instructions, so the same source serves AVX-512, AVX2 and
// any other CPU.

#pragma once

#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

namespace {

// Number of vector registers: how many running sums a kernel may hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Indices __attribute__((vector_size(4 * LANES)));

INLINE Vector load(const float* from) { return *(const Vector*)from; }
INLINE void store(float* to, Vector x) { *(Vector*)to = x; }

// A store of a whole, aligned cache line that goes past the caches, so that the line need not be read first. The thread
// that streamed calls `finish_streams` before others may read.
#if defined(__AVX512F__)
constexpr bool STREAMS = true;
INLINE void stream(float* to, Vector x) { _mm512_stream_ps(to, (__m512)x); }
INLINE void finish_streams() { _mm_sfence(); }
#else
constexpr bool STREAMS = false;  // a vector is less than a line
INLINE void stream(float* to, Vector x) { store(to, x); }
INLINE void finish_streams() {}
#endif

// x - 0 is x for every x, so nothing but the broadcast remains; 0 + x would turn -0 into 0.
INLINE Vector broadcast(float x) { return x - Vector{}; }

// Lane l of the result is lane source(l) of the pair (a, b): a has lanes 0 .. LANES - 1, b has LANES .. 2 LANES - 1.
template <int (*source)(int), int... lane>
INLINE Vector shuffle(Vector a, Vector b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, source(lane)...);
#else
    return __builtin_shuffle(a, b, Indices{source(lane)...});
#endif
}

template <int (*source)(int)>
INLINE Vector shuffle(Vector a, Vector b) {
    return shuffle<source>(a, b, std::make_integer_sequence<int, LANES>{});
}

// The six shuffles that every instruction set has as one instruction. A quad is four lanes (128 bits).
//   singles: x0 y0 x1 y1 of each quad (low), x2 y2 x3 y3 (high)
//   pairs:   x0 x1 y0 y1 of each quad (low), x2 x3 y2 y3 (high)
//   quads:   quads 0, 2, .. of x and then of y (even), quads 1, 3, .. (odd)
constexpr int singles_low(int l) { return (l & ~3) + (l & 3) / 2 + (l & 1) * LANES; }
constexpr int singles_high(int l) { return singles_low(l) + 2; }
constexpr int pairs_low(int l) { return (l & ~3) + (l & 1) + (l & 3) / 2 * LANES; }
constexpr int pairs_high(int l) { return pairs_low(l) + 2; }
constexpr int quads_even(int l) { return l / 4 * 8 + (l & 3); }
constexpr int quads_odd(int l) { return quads_even(l) + 4; }

// r[row] lane column -> r[column] lane row.
INLINE void transpose(Vector (&r)[LANES]) {
    Vector t[LANES];
    // Each quad of four neighbouring rows is a 4 x 4 matrix: transpose it.
    UNROLL for (int i = 0; i < LANES; i += 4) {
        Vector a = shuffle<singles_low>(r[i], r[i + 1]), b = shuffle<singles_high>(r[i], r[i + 1]);
        Vector c = shuffle<singles_low>(r[i + 2], r[i + 3]), d = shuffle<singles_high>(r[i + 2], r[i + 3]);
        t[i] = shuffle<pairs_low>(a, c);
        t[i + 1] = shuffle<pairs_high>(a, c);
        t[i + 2] = shuffle<pairs_low>(b, d);
        t[i + 3] = shuffle<pairs_high>(b, d);
    }
    // Then the matrix of quads: t[4 g + c] quad q -> r[4 q + c] quad g.
    UNROLL for (int c = 0; c < 4; c++) {
#if LANES == 16
        Vector a = shuffle<quads_even>(t[c], t[4 + c]), b = shuffle<quads_odd>(t[c], t[4 + c]);
        Vector d = shuffle<quads_even>(t[8 + c], t[12 + c]), e = shuffle<quads_odd>(t[8 + c], t[12 + c]);
        r[c] = shuffle<quads_even>(a, d);
        r[4 + c] = shuffle<quads_even>(b, e);
        r[8 + c] = shuffle<quads_odd>(a, d);
        r[12 + c] = shuffle<quads_odd>(b, e);
#elif LANES == 8
        r[c] = shuffle<quads_even>(t[c], t[4 + c]);
        r[4 + c] = shuffle<quads_odd>(t[c], t[4 + c]);
#else
        r[c] = t[c];
#endif
    }
}

// Lane i of the result is the sum of all lanes of r[i]: a transposition that adds as it goes.
INLINE Vector lane_sums(const Vector (&r)[LANES]) {
    Vector t[LANES / 4];
    UNROLL for (int i = 0; i < LANES / 4; i++) {
        const Vector* x = r + 4 * i;
        Vector a = shuffle<singles_low>(x[0], x[1]) + shuffle<singles_high>(x[0], x[1]);
        Vector b = shuffle<singles_low>(x[2], x[3]) + shuffle<singles_high>(x[2], x[3]);
        t[i] = shuffle<pairs_low>(a, b) + shuffle<pairs_high>(a, b);
    }
    UNROLL for (int count = LANES / 4; count > 1; count /= 2) {
        UNROLL for (int i = 0; i < count / 2; i++)
            t[i] = shuffle<quads_even>(t[2 * i], t[2 * i + 1]) + shuffle<quads_odd>(t[2 * i], t[2 * i + 1]);
    }
    return t[0];
}

}  // namespace
