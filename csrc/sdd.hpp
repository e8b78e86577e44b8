// Sparse = dense x dense: the active blocks of left.T @ right.
//
// Both operands are packed, so that every entry of a block is a dot product over the tokens of two panels. As many dot
// products as a vector has lanes are computed together and then summed across lanes together.

#pragma once

#include <omp.h>

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
template <int LEFT, int RIGHT, int TOKENS>
INLINE void add_tiles(const float* left, const float* right, const Walk& walk, float* sums) {
    constexpr int J = SumOrder<LEFT, RIGHT>::J, K = SumOrder<LEFT, RIGHT>::K;
    for (int64_t i = 0; i < walk.nnzb; i++) {
        const float* rows = left + int64_t(walk.left[i]) * (LEFT * TOKENS);
        const float* columns = right + int64_t(walk.right[i]) * (RIGHT * TOKENS);
        for (int j0 = 0; j0 < LEFT; j0 += J)
            for (int k0 = 0; k0 < RIGHT; k0 += K, sums += LANES) {
                Vector dot[LANES] = {};
                UNROLL for (int token = 0; token < TOKENS; token += LANES) {
                    Vector column[K];
                    UNROLL for (int k = 0; k < K; k++) column[k] = load(columns + (k0 + k) * TOKENS + token);
                    UNROLL for (int j = 0; j < J; j++) {
                        const Vector row = load(rows + (j0 + j) * TOKENS + token);
                        UNROLL for (int k = 0; k < K; k++) dot[j * K + k] += row * column[k];
                    }
                }
                store(sums, load(sums) + lane_sums(dot));
            }
    }
}

// The same for blocks of one row: the dot products of neighbouring blocks are taken together.
template <int RIGHT, int TOKENS>
INLINE void add_rows(const float* left, const float* right, const Walk& walk, float* sums) {
    constexpr int BLOCKS = LANES / RIGHT;
    for (int64_t i0 = 0; i0 < walk.nnzb; i0 += BLOCKS) {
        Vector dot[LANES];
        UNROLL for (int i = 0; i < BLOCKS; i++) {
            const int64_t block = i0 + i < walk.nnzb ? i0 + i : i0;  // beyond the end: a dot product nobody reads
            const float* row = left + int64_t(walk.left[block]) * TOKENS;
            const float* columns = right + int64_t(walk.right[block]) * (RIGHT * TOKENS);
            UNROLL for (int k = 0; k < RIGHT; k++) {
                Vector sum = load(row) * load(columns + k * TOKENS);
                UNROLL for (int token = LANES; token < TOKENS; token += LANES)
                    sum += load(row + token) * load(columns + k * TOKENS + token);
                dot[i * RIGHT + k] = sum;
            }
        }
        store(sums + i0 * RIGHT, load(sums + i0 * RIGHT) + lane_sums(dot));
    }
}

template <int LEFT, int RIGHT, int TOKENS>
void add_panels(const float* left, int64_t left_features, const float* right, int64_t right_features, int64_t tokens,
                const Walk& walk, float* left_panel, float* right_panel, float* sums) {
    pack<TOKENS>(left, tokens, left_features, left_panel);
    pack<TOKENS>(right, tokens, right_features, right_panel);
    if constexpr (LEFT == 1)
        add_rows<RIGHT, TOKENS>(left_panel, right_panel, walk, sums);
    else
        add_tiles<LEFT, RIGHT, TOKENS>(left_panel, right_panel, walk, sums);
}

// left [tokens, left_features], right [tokens, right_features] -> output [nnzb, LEFT, RIGHT], or [nnzb, RIGHT, LEFT] if
// TRANSPOSED. Each thread sums over its tokens; the threads' sums are added in order, so that the result depends on
// nothing but the number of threads.
template <int LEFT, int RIGHT, bool TRANSPOSED>
void sdd(const float* left, int64_t left_features, const float* right, int64_t right_features, int64_t tokens,
         Walk walk, float* output, int threads) {
    using Order = SumOrder<LEFT, RIGHT>;
    const Panels panels(tokens, threads);
    const int team = panels.threads(threads) < 1 ? 1 : panels.threads(threads);
    const int64_t size = (walk.nnzb * (LEFT * RIGHT) + LANES - 1) / LANES * LANES;
    const float** sums_of = new const float*[team];

#pragma omp parallel num_threads(team)
    {
        float* left_panel = first_panel_memory.get(left_features * PANEL);
        float* right_panel = second_panel_memory.get(right_features * PANEL);
        float* sums = entry_memory.get(size);
        std::memset(sums, 0, size * sizeof(float));
        sums_of[omp_get_thread_num()] = sums;

#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels.count; i++) {
            const int64_t begin = panels.begin(i), length = panels.length(i);
            const auto add = length <= SMALL_PANEL ? add_panels<LEFT, RIGHT, SMALL_PANEL>
                                                   : add_panels<LEFT, RIGHT, PANEL>;
            add(left + begin * left_features, left_features, right + begin * right_features, right_features, length,
                walk, left_panel, right_panel, sums);
        }

        const int members = omp_get_num_threads();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < walk.nnzb; i++) {
            float* block = output + int64_t(walk.slots[i]) * (LEFT * RIGHT);
            for (int j = 0; j < LEFT; j++)
                for (int k = 0; k < RIGHT; k++) {
                    const int64_t place = i * (LEFT * RIGHT) + Order::place(j, k);
                    float sum = sums_of[0][place];
                    for (int member = 1; member < members; member++) sum += sums_of[member][place];
                    block[TRANSPOSED ? k * LEFT + j : j * RIGHT + k] = sum;
                }
        }
    }
    delete[] sums_of;
}

}  // namespace
