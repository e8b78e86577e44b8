// Sparse = dense x dense, for one panel of tokens: the active blocks of left.T @ right.
//
// Both operands are packed, so that every entry of a block is a dot product over the tokens of two panels. As many dot
// products as a vector has lanes are computed together and then summed across lanes together. A panel has UNITS units of
// tokens for each feature.

#pragma once

#include "panels.hpp"

namespace {

// The active blocks in the order of the walk.
struct Walk {
    int64_t nnzb;
    const int32_t* left;   // [nnzb] block of features of the left operand
    const int32_t* right;  // [nnzb] block of features of the right operand
    const int32_t* slots;  // [nnzb] where the block is stored
};

// The running sums of a block [LEFT, RIGHT] are kept in tiles of J x K = LANES entries, each one vector.
template <int LEFT, int RIGHT>
struct SumOrder {
    static constexpr int J = LEFT < 4 ? 1 : 4, K = LEFT < 4 ? RIGHT : LANES / 4;

    static constexpr int place(int j, int k) {
        return (j / J * (RIGHT / K) + k / K) * (J * K) + j % J * K + k % K;
    }
};

// Adds the blocks of one pair of panels to sums [nnzb, LEFT * RIGHT]: blocks of at least four rows.
template <int DEPTH, int LEFT, int RIGHT, int UNITS>
INLINE void add_tiles(const float* left, const float* right, const Walk& walk, float* sums) {
    constexpr int J = SumOrder<LEFT, RIGHT>::J, K = SumOrder<LEFT, RIGHT>::K;
    for (int64_t i = 0; i < walk.nnzb; i++) {
        const float* rows = left + int64_t(walk.left[i]) * (LEFT * UNITS);
        const float* columns = right + int64_t(walk.right[i]) * (RIGHT * UNITS);
        for (int j0 = 0; j0 < LEFT; j0 += J)
            for (int k0 = 0; k0 < RIGHT; k0 += K, sums += LANES) {
                Vector dot[LANES] = {};
                UNROLL for (int unit = 0; unit < UNITS; unit += LANES) {
                    Vector column[K];
                    UNROLL for (int k = 0; k < K; k++) column[k] = load(columns + (k0 + k) * UNITS + unit);
                    UNROLL for (int j = 0; j < J; j++) {
                        const Vector row = load(rows + (j0 + j) * UNITS + unit);
                        UNROLL for (int k = 0; k < K; k++)
                            dot[j * K + k] = multiply_add<DEPTH>(dot[j * K + k], row, column[k]);
                    }
                }
                store(sums, load(sums) + lane_sums(dot));
            }
    }
}

// The same for blocks of one row: the dot products of neighbouring blocks are taken together.
template <int RIGHT, int UNITS>
INLINE void add_rows(const float* left, const float* right, const Walk& walk, float* sums) {
    constexpr int BLOCKS = LANES / RIGHT;
    for (int64_t i0 = 0; i0 < walk.nnzb; i0 += BLOCKS) {
        Vector dot[LANES];
        UNROLL for (int i = 0; i < BLOCKS; i++) {
            const int64_t block = i0 + i < walk.nnzb ? i0 + i : i0;  // beyond the end: a dot product nobody reads
            const float* row = left + int64_t(walk.left[block]) * UNITS;
            const float* columns = right + int64_t(walk.right[block]) * (RIGHT * UNITS);
            UNROLL for (int k = 0; k < RIGHT; k++) {
                Vector sum = load(row) * load(columns + k * UNITS);
                UNROLL for (int unit = LANES; unit < UNITS; unit += LANES)
                    sum += load(row + unit) * load(columns + k * UNITS + unit);
                dot[i * RIGHT + k] = sum;
            }
        }
        store(sums + i0 * RIGHT, load(sums + i0 * RIGHT) + lane_sums(dot));
    }
}

template <int DEPTH, int LEFT, int RIGHT, int UNITS>
INLINE void add_blocks(const float* left, const float* right, const Walk& walk, float* sums) {
    if constexpr (LEFT == 1)
        add_rows<RIGHT, UNITS>(left, right, walk, sums);
    else
        add_tiles<DEPTH, LEFT, RIGHT, UNITS>(left, right, walk, sums);
}

// Adds the sum of each feature over the tokens of a panel to sums [features rounded up to LANES].
template <int DEPTH, int UNITS>
INLINE void add_features(const float* panel, int64_t features, float* sums) {
    for (int64_t feature = 0; feature < features; feature += LANES) {
        Vector sum[LANES] = {};
        UNROLL for (int i = 0; i < LANES; i++) {
            const float* row = panel + (feature + i < features ? feature + i : feature) * UNITS;
            UNROLL for (int unit = 0; unit < UNITS; unit += LANES)
                sum[i] = multiply_add<DEPTH>(sum[i], load(row + unit), ones<DEPTH>());
        }
        store(sums + feature, load(sums + feature) + lane_sums(sum));
    }
}

}  // namespace
