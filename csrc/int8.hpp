// Dense = dense x sparse with integers, for one panel of tokens: uint8 inputs, int8 weights, int32 sums.
//
// A unit of a panel holds four neighbouring features of a token: a quad. Weights are packed alike, in strips of a few
// rows: only quads that hold a weight are there, and say which features they read.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "panels.hpp"

namespace {

typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

constexpr int QUAD = 4;
constexpr int64_t LONG_PANEL = 64, SHORT_PANEL = 16;  // tokens

INLINE Integers broadcast_integer(int32_t x) { return x - Integers{}; }

// Whether products are added in pairs of 16 bits on the way: two weights of a pair may then be 128 together at most,
// since 255 * 128 fits; weights are packed accordingly.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
constexpr bool ADDS_PAIRS = true;
#else
constexpr bool ADDS_PAIRS = false;
#endif

// Four products for each lane, added to its sum: unsigned bytes of x, signed ones of w.
INLINE Integers multiply_add(Integers sum, Integers x, Integers w) {
#if defined(__AVX512VNNI__)
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__AVXVNNI__)
    return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
#elif defined(__AVX512BW__)
    return sum + (Integers)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)x, (__m512i)w), _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    return sum + (Integers)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)x, (__m256i)w), _mm256_set1_epi16(1));
#else
    UNROLL for (int byte = 0; byte < 32; byte += 8) sum += (x >> byte & 255) * (w << (24 - byte) >> 24);
    return sum;
#endif
}

INLINE Vector clamp(Vector x, Vector low, Vector high) {
    x = x > low ? x : low;
    return x < high ? x : high;
}

// What inputs are rounded by: number = (integer - zero_point) / reciprocal.
struct Rounding {
    float reciprocal;
    int32_t zero_point;

    // LANES numbers -> their bytes. Added to 1.5 * 2^23, a float has no digits but those of the nearest integer, ties to even.
    INLINE Bytes round(Vector x) const {
        constexpr float MAGIC = 12582912.0f;
        constexpr int32_t MAGIC_BITS = 0x4b400000;
        const Vector low = broadcast(float(-zero_point)), high = broadcast(float(255 - zero_point));
        const Vector nearest = clamp(x * broadcast(reciprocal), low, high) + broadcast(MAGIC);
        return __builtin_convertvector((Integers)nearest - broadcast_integer(MAGIC_BITS - zero_point), Bytes);
    }

    // row [features] -> bytes [features rounded up to LANES]. Adds 0 to `seen` for each number, NaN if it is not finite.
    INLINE void round_row(const float* row, int64_t features, uint8_t* bytes, Vector& seen) const {
        int64_t at = 0;
        for (; at + LANES <= features; at += LANES) {
            const Vector x = load(row + at);
            seen += x * broadcast(0.0f);
            *(Bytes*)(bytes + at) = round(x);
        }
        if (at == features) return;
        float rest[LANES] = {};
        std::memcpy(rest, row + at, (features - at) * sizeof(float));
        const Vector x = load(rest);
        seen += x * broadcast(0.0f);
        *(Bytes*)(bytes + at) = round(x);
    }
};

// matrix [tokens, features], tokens <= TOKENS -> panel [units, TOKENS], anything beyond the last token. `bytes` is room
// for TILE tokens.
template <int TOKENS>
void round_and_pack(const float* matrix, int64_t tokens, int64_t features, Rounding rounding, int64_t units, float* bytes,
                    float* panel, Vector& seen) {
    for (int64_t token = 0; token < tokens; token += TILE) {
        const int64_t rows = tokens - token < TILE ? tokens - token : TILE;
        for (int64_t row = 0; row < rows; row++)
            rounding.round_row(matrix + (token + row) * features, features, (uint8_t*)(bytes + row * units), seen);
        for (int64_t unit = 0; unit < units; unit += TILE)
            transpose_tile(bytes + unit, units, panel + unit * TOKENS + token, TOKENS);
    }
}

// The weight of a layer, packed.
struct Strips {
    const int32_t* offsets;  // [strips + 1] where the quads of each begin
    const uint16_t* quads;   // [count] which four features each reads
    const int8_t* values;    // [count, HEIGHT, QUAD]
    const int32_t* starts;   // [out] what the sums begin with: less the zero point times the sum of a row
    const float* bias;       // [out]
    float step;              // what 1 means in a sum
};

// One strip for all tokens of a panel: group [HEIGHT, TOKENS] floats.
//
// Where few tokens leave few sums, as many again run side by side: none waits for the one before.
template <int HEIGHT, int TOKENS>
INLINE void sum_strip(const float* panel, const Strips& strips, int64_t strip, float* group) {
    constexpr int VECTORS_IN_PANEL = TOKENS / LANES;
    constexpr int MOST = HEIGHT == 1 ? 8 : REGISTERS == 32 ? 4 : 2;
    constexpr int V = VECTORS_IN_PANEL < MOST ? VECTORS_IN_PANEL : MOST;
    constexpr int CHAINS = HEIGHT * V >= 8 || REGISTERS == 16 ? 1 : 8 / (HEIGHT * V);
    const int64_t begin = strips.offsets[strip], end = strips.offsets[strip + 1];

    for (int token = 0; token < TOKENS; token += V * LANES) {
        Integers sum[CHAINS][HEIGHT][V] = {};
        const auto add = [&](int64_t i, int chain) __attribute__((always_inline)) {
            const float* x = panel + int64_t(strips.quads[i]) * TOKENS + token;
            const int32_t* w = (const int32_t*)(strips.values + i * (HEIGHT * QUAD));
            Integers row[V];
            UNROLL for (int v = 0; v < V; v++) row[v] = *(const Integers*)(x + v * LANES);
            UNROLL for (int j = 0; j < HEIGHT; j++) {
                const Integers entry = broadcast_integer(w[j]);
                UNROLL for (int v = 0; v < V; v++) sum[chain][j][v] = multiply_add(sum[chain][j][v], row[v], entry);
            }
        };
        int64_t i = begin;
        for (; i + CHAINS <= end; i += CHAINS) UNROLL for (int chain = 0; chain < CHAINS; chain++) add(i + chain, chain);
        for (; i < end; i++) add(i, 0);
        UNROLL for (int j = 0; j < HEIGHT; j++) UNROLL for (int v = 0; v < V; v++) {
            Integers total = broadcast_integer(strips.starts[strip * HEIGHT + j]);
            UNROLL for (int chain = 0; chain < CHAINS; chain++) total += sum[chain][j][v];
            store(group + j * TOKENS + token + v * LANES,
                  broadcast(strips.bias[strip * HEIGHT + j]) +
                      broadcast(strips.step) * __builtin_convertvector(total, Vector));
        }
    }
}

// input [tokens, in] -> output [tokens, out]. False, and nothing of use in `output`, if a number is not finite.
template <int HEIGHT>
bool multiply(const float* input, int64_t tokens, int64_t in, Rounding rounding, const Strips& strips, int64_t out,
              float* output, int threads) {
    const Panels panels(tokens, SHORT_PANEL, LONG_PANEL, threads);
    const bool streamed = is_streamed(output, tokens, out);
    const int64_t units = (in + QUAD * TILE - 1) / (QUAD * TILE) * TILE;
    bool finite = true;
    use_large_pages(output, tokens * out * int64_t(sizeof(float)));
#pragma omp parallel num_threads(panels.team(threads)) reduction(&& : finite)
    {
        float* panel = first_panel_memory.get(units * panels.size);
        float* bytes = second_panel_memory.get(units * TILE);
        Vector seen = {};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels.count; i++) {
            const int64_t begin = panels.begin(i), length = panels.length(i);
            with_panel<SHORT_PANEL, LONG_PANEL>(length, [&](auto size) {
                constexpr int TOKENS = decltype(size)::value;
                // Wide enough that each token's part of a group is written as a run of several cache lines.
                constexpr int64_t GROUP = 4096 / TOKENS < 64 ? 64 : 4096 / TOKENS;
                alignas(64) float group[GROUP * TOKENS];
                round_and_pack<TOKENS>(input + begin * in, length, in, rounding, units, bytes, panel, seen);
                for (int64_t first = 0; first < out; first += GROUP) {
                    const int64_t width = out - first < GROUP ? out - first : GROUP;
                    for (int64_t j = 0; j < width; j += HEIGHT)
                        sum_strip<HEIGHT, TOKENS>(panel, strips, (first + j) / HEIGHT, group + j * TOKENS);
                    unpack<TOKENS>(group, width, output + begin * out + first, length, out, streamed);
                }
            });
        }
        if (streamed) finish_streams();
        for (int lane = 0; lane < LANES; lane++) finite = finite && seen[lane] == 0.0f;
    }
    return finite;
}

}  // namespace
