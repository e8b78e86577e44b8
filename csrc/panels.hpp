// Panels: a few dozen tokens of a matrix, stored feature-major, so that vectors run along tokens.
//
// A panel of 768 features takes 192 KiB: it stays in the level-2 cache while every active block that reads it is worked
// off. Matrices outside are token-major, as PyTorch stores activations. Features are counted in units (formats.hpp).

#pragma once

#include <cstring>
#include <type_traits>

#include "formats.hpp"
#include "memory.hpp"

namespace {

template <int DEPTH>
constexpr int PANEL = 64 * DEPTH;  // tokens of a panel
template <int DEPTH>
constexpr int SMALL_PANEL = 16 * DEPTH;  // tokens of a panel where there are few
constexpr int64_t TILE = 16;             // tokens and units transposed at once: one cache line of each

// [TILE, TILE] units with row strides.
template <bool STREAMED = false>
INLINE void transpose_tile(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    UNROLL for (int row = 0; row < TILE; row += LANES) UNROLL for (int column = 0; column < TILE; column += LANES) {
        Vector r[LANES];
        UNROLL for (int i = 0; i < LANES; i++) r[i] = load(from + (row + i) * from_stride + column);
        transpose(r);
        UNROLL for (int i = 0; i < LANES; i++) {
            float* at = to + (column + i) * to_stride + row;
            if constexpr (STREAMED)
                stream(at, r[i]);
            else
                store(at, r[i]);
        }
    }
}

// Reads [rows, columns] of the tile, the rest counts as zero; writes [columns, TILE].
inline void transpose_tile_in(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                              int64_t to_stride) {
    alignas(64) float padded[TILE * TILE] = {}, turned[TILE * TILE];
    for (int64_t row = 0; row < rows; row++)
        std::memcpy(padded + row * TILE, from + row * from_stride, columns * sizeof(float));
    transpose_tile(padded, TILE, turned, TILE);
    for (int64_t column = 0; column < columns; column++)
        std::memcpy(to + column * to_stride, turned + column * TILE, TILE * sizeof(float));
}

// Reads the whole tile; writes [rows, columns] of its transpose.
inline void transpose_tile_out(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                               int64_t columns) {
    alignas(64) float turned[TILE * TILE];
    transpose_tile(from, from_stride, turned, TILE);
    for (int64_t row = 0; row < rows; row++)
        std::memcpy(to + row * to_stride, turned + row * TILE, columns * sizeof(float));
}

// matrix [tokens, features], tokens <= TOKENS -> panel [features, TOKENS], zero beyond the last token.
template <int TOKENS>
void pack(const float* matrix, int64_t tokens, int64_t features, float* panel) {
    for (int64_t token = 0; token < TOKENS; token += TILE) {
        const int64_t rows = tokens - token < 0 ? 0 : tokens - token < TILE ? tokens - token : TILE;
        const float* from = matrix + token * features;
        float* to = panel + token;
        int64_t feature = 0;
        if (rows == TILE)
            for (; feature + TILE <= features; feature += TILE)
                transpose_tile(from + feature, features, to + feature * TOKENS, TOKENS);
        for (; feature < features; feature += TILE) {
            const int64_t columns = features - feature < TILE ? features - feature : TILE;
            transpose_tile_in(from + feature, features, rows, columns, to + feature * TOKENS, TOKENS);
        }
    }
}

// group [count rounded up to TILE, TOKENS] -> count columns of matrix [tokens, features], which begins at the first.
template <int TOKENS>
INLINE void unpack(const float* group, int64_t count, float* matrix, int64_t tokens, int64_t features, bool streamed) {
    for (int64_t token = 0; token < tokens; token += TILE)
        for (int64_t column = 0; column < count; column += TILE) {
            const float* from = group + column * TOKENS + token;
            float* to = matrix + token * features + column;
            const int64_t rows = tokens - token, columns = count - column;
            if (rows >= TILE && columns >= TILE && streamed)
                transpose_tile<true>(from, TOKENS, to, features);
            else if (rows >= TILE && columns >= TILE)
                transpose_tile(from, TOKENS, to, features);
            else
                transpose_tile_out(from, TOKENS, to, features, rows < TILE ? rows : TILE,
                                   columns < TILE ? columns : TILE);
        }
}

// Whether a matrix is written past the caches: it is too large to be found there by whoever reads it next, and its rows
// are made of whole cache lines.
inline bool is_streamed(const float* matrix, int64_t tokens, int64_t features) {
    constexpr int64_t LARGE = 1 << 19;  // units: more than the level-2 cache holds
    return STREAMS && tokens * features >= LARGE && features % TILE == 0 && reinterpret_cast<uintptr_t>(matrix) % 64 == 0;
}

// How the tokens of one call are split: in panels of `large`, or of `small` where threads would go without.
struct Panels {
    int64_t tokens, size, count;

    Panels(int64_t tokens, int64_t small, int64_t large, int threads)
        : tokens(tokens), size(tokens <= small * threads ? small : large), count((tokens + size - 1) / size) {}

    int64_t begin(int64_t panel) const { return panel * size; }
    int64_t length(int64_t panel) const { return tokens - begin(panel) < size ? tokens - begin(panel) : size; }
    int team(int threads) const { return count < 1 ? 1 : count < threads ? int(count) : threads; }
};

// Calls `work` with the size of the panel, a constant, that `length` tokens need.
template <int SMALL, int LARGE, typename Work>
INLINE void with_panel(int64_t length, Work work) {
    if (length <= SMALL)
        work(std::integral_constant<int, SMALL>{});
    else
        work(std::integral_constant<int, LARGE>{});
}

}  // namespace
