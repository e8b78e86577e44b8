// The three gradients of a block-sparse linear layer in one pass over the tokens, each of them optional.
//
// The gradient of the output is packed once and serves all three. Each thread sums the gradients of values and bias over
// its tokens; the threads' sums are added in order, so that the result depends on nothing but the number of threads.

#pragma once

#include <omp.h>

#include <vector>

#include "dds.hpp"
#include "sdd.hpp"

namespace {

// [ROWS, COLUMNS] -> [COLUMNS, ROWS], in units of pairs along the last side if DEPTH is 2.
template <int DEPTH, int ROWS, int COLUMNS>
INLINE void transpose_block(const float* block, float* turned) {
    if constexpr (DEPTH == 1) {
        for (int column = 0; column < COLUMNS; column++)
            for (int row = 0; row < ROWS; row++) turned[column * ROWS + row] = block[row * COLUMNS + column];
    } else {
        uint16_t from[ROWS * COLUMNS], to[ROWS * COLUMNS];
        std::memcpy(from, block, sizeof from);
        for (int column = 0; column < COLUMNS; column++)
            for (int row = 0; row < ROWS; row++) to[column * ROWS + row] = from[row * COLUMNS + column];
        std::memcpy(turned, to, sizeof to);
    }
}

struct Gradients {
    float* input;   // [tokens, in]; null where it is not wanted, like the others
    float* values;  // [nnzb, ROWS, COLUMNS]
    float* bias;    // [out]
};

template <int DEPTH, int ROWS, int COLUMNS>
struct Backward {
    static constexpr int SMALL = SMALL_PANEL<DEPTH>, LARGE = PANEL<DEPTH>;

    // Floats of all threads' sums together. Many threads and a dense layer would need more: then fewer threads share.
    static constexpr int64_t MOST_SUMS = 1 << 26;

    int64_t tokens, out, in, nnzb;
    Order by_row, by_column;
    const float *grad, *input, *values;
    Gradients to;

    static int64_t rounded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

    // The operand that is read again for each line of the other should be the smaller one.
    bool walks_columns() const { return in > out && ROWS == COLUMNS; }
    Walk walk() const {
        return walks_columns() ? Walk{nnzb, by_column.columns, by_column.rows, by_column.slots}
                               : Walk{nnzb, by_row.rows, by_row.columns, by_row.slots};
    }

    int64_t values_size() const { return to.values ? rounded(nnzb * (ROWS * COLUMNS)) : 0; }
    int64_t sums_size() const { return values_size() + (to.bias ? rounded(out) : 0); }

    // Adds the gradients of values and bias of one pair of panels to `sums`.
    template <int TOKENS>
    void add(const float* left, const float* right, float* sums) const {
        constexpr int UNITS = TOKENS / DEPTH;
        if (to.bias) add_features<DEPTH, UNITS>(left, out, sums + values_size());
        if (!to.values) return;
        if constexpr (ROWS == COLUMNS)
            if (walks_columns()) return add_blocks<DEPTH, COLUMNS, ROWS, UNITS>(right, left, walk(), sums);
        add_blocks<DEPTH, ROWS, COLUMNS, UNITS>(left, right, walk(), sums);
    }

    template <int TOKENS>
    void panel(int64_t begin, int64_t length, const float* turned, bool streamed, float* packed, float* paired,
               float* sums) const {
        // With pairs, packing goes through `packed` to pairs of tokens in one of the two halves of `paired`.
        float *left = packed, *right = paired;
        pack<TOKENS>(grad + begin * out / DEPTH, length, out / DEPTH, packed);
        if (to.input)
            multiply_panel<DEPTH, COLUMNS, ROWS, TOKENS>(
                packed, length, Lines{by_column.offsets, by_column.rows, nullptr}, turned, nullptr, in,
                to.input + begin * in / DEPTH, streamed);
        if (!to.values && !to.bias) return;
#if defined(__AVX512BF16__)
        if constexpr (DEPTH == 2) {
            left = paired, right = paired + out * (TOKENS / DEPTH);
            pair_tokens<TOKENS>(packed, out, left);
        }
#endif
        if (to.values) {
            float* at = DEPTH == 2 ? packed : right;
            pack<TOKENS>(input + begin * in / DEPTH, length, in / DEPTH, at);
#if defined(__AVX512BF16__)
            if constexpr (DEPTH == 2) pair_tokens<TOKENS>(packed, in, right);
#endif
        }
        add<TOKENS>(left, right, sums);
    }

    // Entry `place` of every thread's sums, in the order of the threads.
    static float total(const std::vector<const float*>& sums_of, int64_t place) {
        float sum = sums_of[0][place];
        for (size_t member = 1; member < sums_of.size(); member++) sum += sums_of[member][place];
        return sum;
    }

    // Entry (row, column) of a block -> its place among the sums of the block, in the order of the walk.
    int place(int row, int column) const {
        if constexpr (ROWS == COLUMNS)
            if (walks_columns()) return SumOrder<COLUMNS, ROWS>::place(column, row);
        return SumOrder<ROWS, COLUMNS>::place(row, column);
    }

    void run(int threads) const {
        const Panels panels(tokens, SMALL, LARGE, threads);
        const int64_t most = sums_size() ? MOST_SUMS / sums_size() : threads;
        const int team = panels.team(most < 1 ? 1 : most < threads ? int(most) : threads);
        const bool streamed = to.input && is_streamed(to.input, tokens, in / DEPTH);
        float* turned = to.input ? entry_memory.get(nnzb * (ROWS * COLUMNS / DEPTH)) : nullptr;
        if (to.input) use_large_pages(to.input, tokens * in / DEPTH * int64_t(sizeof(float)));
        std::vector<const float*> sums_of(team);

#pragma omp parallel num_threads(team)
        {
            float* packed = first_panel_memory.get((in > out ? in : out) / DEPTH * panels.size);
            float* paired = second_panel_memory.get((in + (DEPTH == 2 ? out : 0)) / DEPTH * panels.size);
            float* sums = sum_memory.get(sums_size());
            if (sums_size()) std::memset(sums, 0, sums_size() * sizeof(float));
            sums_of[omp_get_thread_num()] = sums;
            if (to.input) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < nnzb; i++)
                    transpose_block<DEPTH, ROWS, COLUMNS>(
                        values + int64_t(by_column.slots[i]) * (ROWS * COLUMNS / DEPTH),
                        turned + i * (ROWS * COLUMNS / DEPTH));
            }
#pragma omp for schedule(static)
            for (int64_t i = 0; i < panels.count; i++)
                with_panel<SMALL, LARGE>(panels.length(i), [&](auto size) {
                    panel<decltype(size)::value>(panels.begin(i), panels.length(i), turned, streamed, packed, paired,
                                                 sums);
                });
            if (to.values) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < nnzb; i++) {
                    float* block = to.values + int64_t(walk().slots[i]) * (ROWS * COLUMNS);
                    for (int row = 0; row < ROWS; row++)
                        for (int column = 0; column < COLUMNS; column++)
                            block[row * COLUMNS + column] =
                                total(sums_of, i * (ROWS * COLUMNS) + place(row, column));
                }
            }
            if (to.bias) {
#pragma omp for schedule(static)
                for (int64_t feature = 0; feature < out; feature++)
                    to.bias[feature] = total(sums_of, values_size() + feature);
            }
        }
    }
};

}  // namespace
