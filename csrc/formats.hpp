// What a four-byte unit of a matrix holds, and the one arithmetic step that depends on it.
//
// DEPTH 1: a float. DEPTH 2: two neighbouring bfloat16, which CPUs with AVX512-BF16 multiply and add in pairs. Units
// are moved, transposed and packed alike, and all sums are floats, so the kernels are written once.

#pragma once

#include <cstdint>

#include "vectors.hpp"

namespace {

template <int DEPTH>
INLINE Vector multiply_add(Vector sum, Vector a, Vector b) {
#if defined(__AVX512BF16__)
    if constexpr (DEPTH == 2) return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    static_assert(DEPTH == 1 || LANES == 16, "only AVX512-BF16 multiplies pairs");
    return sum + a * b;
}

// The unit that multiplies by one: added up with it, a row gives its sum.
template <int DEPTH>
INLINE Vector ones() {
    if constexpr (DEPTH == 2) return (Vector)(Indices{} + 0x3f803f80);
    return broadcast(1.0f);
}

#if defined(__AVX512BF16__)
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t Wholes __attribute__((vector_size(4 * LANES)));

// Two rows of floats -> one row of pairs, rounded to nearest even.
INLINE Vector join_pairs(Vector low, Vector high) {
    const Wholes a = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)low), Wholes);
    const Wholes b = __builtin_convertvector((Halves)_mm512_cvtneps_pbh((__m512)high), Wholes);
    return (Vector)(a | b << 16);
}

// Pairs of features, token by token, [features / 2, TOKENS] -> pairs of tokens, feature by feature, [features, TOKENS / 2].
template <int TOKENS>
void pair_tokens(const float* panel, int64_t features, float* turned) {
    for (int64_t pair = 0; pair < features / 2; pair++, panel += TOKENS, turned += TOKENS)
        UNROLL for (int token = 0; token < TOKENS; token += LANES) {
            const Wholes both = (Wholes)load(panel + token);
            *(Halves*)(turned + token / 2) = __builtin_convertvector(both, Halves);
            *(Halves*)(turned + (TOKENS + token) / 2) = __builtin_convertvector(both >> 16, Halves);
        }
}
#endif

}  // namespace
