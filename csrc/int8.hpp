// Dense = dense x sparse with integers, for one panel of tokens: uint8 inputs, int8 weights, int32 sums.
//
// A unit of a panel holds four neighbouring features of a token: a quad. Weights are packed alike, in strips of a few
// rows: only quads that hold a weight are there, and say which features they read.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>

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

// As many bytes are written at once.
constexpr int STEP = 4 * LANES;

// Integers in [0, 255] as bytes.
INLINE void store_bytes(uint8_t* to, const Integers (&x)[4]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Packed within halves of a register: the last step puts groups of four in order.
    const __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
#else
    UNROLL for (int i = 0; i < 4; i++) *(Bytes*)(to + i * LANES) = __builtin_convertvector(x[i], Bytes);
#endif
}

// What inputs are rounded by: number = (integer - zero_point) / reciprocal.
struct Rounding {
    float reciprocal;
    int32_t zero_point;

    // LANES numbers -> their integers. Added to 1.5 * 2^23, a float has no digits but those of the nearest integer, ties to
    // even.
    INLINE Integers round(Vector x) const {
        constexpr float MAGIC = 12582912.0f;
        constexpr int32_t MAGIC_BITS = 0x4b400000;
        const Vector low = broadcast(float(-zero_point)), high = broadcast(float(255 - zero_point));
        const Vector nearest = clamp(x * broadcast(reciprocal), low, high) + broadcast(MAGIC);
        return (Integers)nearest - broadcast_integer(MAGIC_BITS - zero_point);
    }

    // STEP numbers -> their bytes. Adds 0 to `seen` for each number, NaN if it is not finite.
    INLINE void round_step(const float* numbers, uint8_t* bytes, Vector (&seen)[4]) const {
        Integers rounded[4];
        UNROLL for (int i = 0; i < 4; i++) {
            const Vector x = load(numbers + i * LANES);
            seen[i] += x * broadcast(0.0f);
            rounded[i] = round(x);
        }
        store_bytes(bytes, rounded);
    }

    // row [features] -> bytes [features rounded up to STEP].
    INLINE void round_row(const float* row, int64_t features, uint8_t* bytes, Vector (&seen)[4]) const {
        int64_t at = 0;
        for (; at + STEP <= features; at += STEP) round_step(row + at, bytes + at, seen);
        if (at == features) return;
        float rest[STEP] = {};
        std::memcpy(rest, row + at, (features - at) * sizeof(float));
        round_step(rest, bytes + at, seen);
    }
};

// matrix [tokens, features], tokens <= TOKENS -> panel [units, TOKENS], anything beyond the last token. `bytes` is room
// for TILE tokens.
template <int TOKENS>
void round_and_pack(const float* matrix, int64_t tokens, int64_t features, Rounding rounding, int64_t units, float* bytes,
                    float* panel, Vector& seen) {
    Vector seen_here[4] = {};
    for (int64_t token = 0; token < tokens; token += TILE) {
        const int64_t rows = tokens - token < TILE ? tokens - token : TILE;
        for (int64_t row = 0; row < rows; row++)
            rounding.round_row(matrix + (token + row) * features, features, (uint8_t*)(bytes + row * units), seen_here);
        for (int64_t unit = 0; unit < units; unit += TILE)
            transpose_tile(bytes + unit, units, panel + unit * TOKENS + token, TOKENS);
    }
    UNROLL for (int i = 0; i < 4; i++) seen += seen_here[i];
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

// What one call knows of a layer.
struct Int8Layer {
    int32_t height;  // of a strip: 1 or 4
    Rounding rounding;
    int64_t out_features, in_features;
    Strips strips;

    // Units of a panel that inputs in rows are packed into.
    int64_t units() const { return (in_features + QUAD * TILE - 1) / (QUAD * TILE) * TILE; }
};

// panel -> output [tokens, out] for the tokens of the panel.
template <int HEIGHT, int TOKENS>
void multiply_panel(const float* panel, int64_t tokens, const Int8Layer& layer, float* output, bool streamed) {
    // Wide enough that each token's part of a group is written as a run of several cache lines.
    constexpr int64_t GROUP = 4096 / TOKENS < 64 ? 64 : 4096 / TOKENS;
    alignas(64) float group[GROUP * TOKENS];
    const int64_t out = layer.out_features;
    for (int64_t first = 0; first < out; first += GROUP) {
        const int64_t width = out - first < GROUP ? out - first : GROUP;
        for (int64_t j = 0; j < width; j += HEIGHT)
            sum_strip<HEIGHT, TOKENS>(panel, layer.strips, (first + j) / HEIGHT, group + j * TOKENS);
        unpack<TOKENS>(group, width, output + first, tokens, out, streamed);
    }
    if (streamed) finish_streams();
}

// x / 2 * (1 + erf(x / sqrt 2)), to 6e-7. erf(z) / z is a polynomial of z^2, fitted at Chebyshev's points for z in [0, 3.9],
// beyond which erf is 1 in float32; its argument is brought to [-1, 1].
INLINE Vector gelu(Vector x) {
    constexpr float END = 3.9f;
    constexpr float COEFFICIENTS[] = {
        0.362583995f, -0.181011453f, 0.134688452f, -0.109517045f, 0.0907170847f,
        -0.0739864185f, 0.0575924888f, -0.0418249667f, 0.0301181842f, -0.0220831465f,
        0.0120105688f, -0.00353632425f, 0.00314039364f, -0.00402476592f, 0.00154320302f};
    constexpr int DEGREE = sizeof(COEFFICIENTS) / sizeof(float) - 1;
    const Vector z = clamp(x * broadcast(0.707106781f), broadcast(-END), broadcast(END));
    const Vector u = z * z * broadcast(2 / (END * END)) - broadcast(1.0f);
    Vector ratio = broadcast(COEFFICIENTS[DEGREE]);
    UNROLL for (int i = DEGREE - 1; i >= 0; i--) ratio = ratio * u + broadcast(COEFFICIENTS[i]);
    const Vector half = x * broadcast(0.5f);
    return half + half * (z * ratio);
}

// panel -> the panel of the next layer: its inputs are GELU of this layer's outputs.
template <int HEIGHT, int TOKENS>
void multiply_panel_on(const float* panel, const Int8Layer& layer, Rounding next, float* to, Vector& seen) {
    alignas(64) float rows[QUAD * TOKENS] = {};
    const int64_t out = layer.out_features;
    for (int64_t first = 0; first < out; first += QUAD, to += TOKENS) {
        const int64_t width = out - first < QUAD ? out - first : QUAD;
        for (int64_t j = 0; j < width; j += HEIGHT)
            sum_strip<HEIGHT, TOKENS>(panel, layer.strips, (first + j) / HEIGHT, rows + j * TOKENS);
        for (int token = 0; token < TOKENS; token += LANES) {
            Integers unit = {};
            UNROLL for (int j = 0; j < QUAD; j++) {
                const Vector x = gelu(load(rows + j * TOKENS + token));
                seen += x * broadcast(0.0f);
                unit |= next.round(x) << (8 * j);
            }
            *(Integers*)(to + token) = unit;
        }
    }
}

// Calls `work` with the number of each panel, its tokens, a constant no less than them, and a vector to note in what is
// seen. False if a number was not finite.
template <typename Work>
bool for_panels(int64_t tokens, int threads, Work work) {
    const Panels panels(tokens, SHORT_PANEL, LONG_PANEL, threads);
    bool finite = true;
#pragma omp parallel num_threads(panels.team(threads)) reduction(&& : finite)
    {
        Vector seen = {};
#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels.count; i++)
            with_panel<SHORT_PANEL, LONG_PANEL>(panels.length(i),
                                                [&](auto size) { work(panels.begin(i), panels.length(i), size, seen); });
        for (int lane = 0; lane < LANES; lane++) finite = finite && seen[lane] == 0.0f;
    }
    return finite;
}

// Calls `work` with the height of the strips of a layer, a constant; 1 if it is not compiled.
template <typename Work>
int with_height(const Int8Layer& layer, Work work) {
    if (layer.height == 1) return work(std::integral_constant<int, 1>{});
    if (layer.height == 4) return work(std::integral_constant<int, 4>{});
    return 1;
}

// What follows the last product of a call: LayerNorm(output + residual).
struct Ending {
    const float* residual;  // [tokens, features]
    const float* weight;    // [features]
    const float* bias;      // [features]
    float epsilon;
};

INLINE float lane_sum(Vector x) {
    float sum = 0;
    UNROLL for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

// The same for one token, in place. The features beyond the last whole vector are taken one by one.
inline void finish_row(float* row, const float* residual, int64_t features, const Ending& ending) {
    const int64_t whole = features / LANES * LANES;
    Vector sums = {}, squares = {};
    float sum = 0, square = 0;
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vector x = load(row + i) + load(residual + i);
        store(row + i, x);
        sums += x;
    }
    for (int64_t i = whole; i < features; i++) sum += row[i] += residual[i];
    const float mean = (sum + lane_sum(sums)) / float(features);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vector x = load(row + i) - broadcast(mean);
        squares += x * x;
    }
    for (int64_t i = whole; i < features; i++) square += (row[i] - mean) * (row[i] - mean);
    const float scale = 1 / std::sqrt((square + lane_sum(squares)) / float(features) + ending.epsilon);
    for (int64_t i = 0; i < whole; i += LANES)
        store(row + i, (load(row + i) - broadcast(mean)) * broadcast(scale) * load(ending.weight + i) + load(ending.bias + i));
    for (int64_t i = whole; i < features; i++) row[i] = (row[i] - mean) * scale * ending.weight[i] + ending.bias[i];
}

// One call: through a layer or, with GELU between them, whose numbers never leave the cache, through two.
struct Call {
    const Int8Layer& layer;
    const Int8Layer* next;  // may be null
    const Ending* ending;   // may be null
    int64_t tokens;
    const float* input;  // [tokens, in]
    float* output;       // [tokens, out]

    const Int8Layer& last() const { return next ? *next : layer; }

    // What is normalised is read again at once.
    bool streamed() const { return !ending && is_streamed(output, tokens, last().out_features); }

    template <int HEIGHT, int NEXT_HEIGHT, int TOKENS>
    void run_panel(int64_t begin, int64_t length, Vector& seen) const {
        const int64_t in = layer.in_features, out = last().out_features;
        float* panel = first_panel_memory.get(layer.units() * TOKENS);
        float* bytes = second_panel_memory.get(layer.units() * TILE);
        round_and_pack<TOKENS>(input + begin * in, length, in, layer.rounding, layer.units(), bytes, panel, seen);
        if (next) {
            float* between = entry_memory.get(next->units() * TOKENS);
            multiply_panel_on<HEIGHT, TOKENS>(panel, layer, next->rounding, between, seen);
            panel = between;
        }
        multiply_panel<NEXT_HEIGHT, TOKENS>(panel, length, last(), output + begin * out, streamed());
        if (ending)
            for (int64_t token = begin; token < begin + length; token++)
                finish_row(output + token * out, ending->residual + token * out, out, *ending);
    }

    // 0, or 1 as `with_height`, or 2 if a number is not finite.
    int run(int threads) const {
        use_large_pages(output, tokens * last().out_features * int64_t(sizeof(float)));
        return with_height(layer, [&](auto height) {
            return with_height(last(), [&](auto next_height) {
                return for_panels(tokens, threads, [&](int64_t begin, int64_t length, auto size, Vector& seen) {
                    run_panel<decltype(height)::value, decltype(next_height)::value, decltype(size)::value>(begin, length,
                                                                                                       seen);
                }) ? 0 : 2;
            });
        });
    }
};

}  // namespace
