// Dense = dense x sparse, for one panel of tokens.
//
// A line is a block row of the matrix (forward) or a block column (input gradient): the blocks that one group of output
// features reads. For the input gradient the blocks are transposed while they are copied, so the work is the same.

#pragma once

#include "orders.hpp"
#include "panels.hpp"

namespace {

// OUT output features of a line, for all tokens of a panel: group [OUT, TOKENS] floats.
//
// Four outputs and a few vectors of tokens are summed in registers: each vector of the panel serves four products, each
// entry of a block as many products as there are vectors. IN and OUT are loop bounds only, so small blocks cost no more.
// Long lines are summed in chunks of 64 input features, which keeps the rounding error near that of a dense product.
template <int DEPTH, int OUT, int IN, int TOKENS>
INLINE void sum_line(const float* panel, const int32_t* blocks, const int32_t* slots, int64_t count,
                     const float* values, const float* bias, float* group) {
    constexpr int UNITS = IN / DEPTH;
    constexpr int VECTORS_IN_PANEL = TOKENS / LANES;
    constexpr int J = OUT < 4 ? OUT : VECTORS_IN_PANEL == 1 && OUT % 8 == 0 ? 8 : 4;
    constexpr int MOST = J == 1 ? 8 : REGISTERS == 32 ? 4 : 2;
    constexpr int V = VECTORS_IN_PANEL < MOST ? VECTORS_IN_PANEL : MOST;
    constexpr int K = UNITS < 8 ? UNITS : 4;  // unrolled
    constexpr int64_t CHUNK = IN < 64 ? 64 / IN : 1;  // blocks

    for (int j0 = 0; j0 < OUT; j0 += J)
        for (int token = 0; token < TOKENS; token += V * LANES) {
            float* to = group + j0 * TOKENS + token;
            UNROLL for (int j = 0; j < J; j++) UNROLL for (int v = 0; v < V; v++)
                store(to + j * TOKENS + v * LANES, bias ? broadcast(bias[j0 + j]) : Vector{});
            for (int64_t begin = 0; begin < count; begin += CHUNK) {
                const int64_t end = count - begin < CHUNK ? count : begin + CHUNK;
                Vector sum[J][V] = {};
                for (int64_t i = begin; i < end; i++) {
                    const float* x = panel + int64_t(blocks[i]) * (UNITS * TOKENS) + token;
                    const float* w = values + (slots ? int64_t(slots[i]) : i) * (OUT * UNITS) + j0 * UNITS;
                    for (int k0 = 0; k0 < UNITS; k0 += K) UNROLL for (int k = k0; k < k0 + K; k++) {
                        Vector row[V];
                        UNROLL for (int v = 0; v < V; v++) row[v] = load(x + k * TOKENS + v * LANES);
                        UNROLL for (int j = 0; j < J; j++) {
                            const Vector entry = broadcast(w[j * UNITS + k]);
                            UNROLL for (int v = 0; v < V; v++) sum[j][v] = multiply_add<DEPTH>(sum[j][v], entry, row[v]);
                        }
                    }
                }
                UNROLL for (int j = 0; j < J; j++) UNROLL for (int v = 0; v < V; v++) {
                    float* at = to + j * TOKENS + v * LANES;
                    store(at, load(at) + sum[j][v]);
                }
            }
        }
}

// panel [in, TOKENS] -> output [tokens, out] for the tokens of the panel. The lines lie in the order in which they are
// read, or are found through `slots`.
template <int DEPTH, int OUT, int IN, int TOKENS>
void multiply_panel(const float* panel, int64_t tokens, Lines lines, const float* values, const float* bias,
                    int64_t out, float* output, bool streamed) {
    // Wide enough that each token's part of a group is written as a run of several cache lines.
    constexpr int64_t GROUP = 4096 / TOKENS < 64 ? 64 : 4096 / TOKENS;
    alignas(64) float group[GROUP * TOKENS];
    for (int64_t first = 0; first < out; first += GROUP) {
        const int64_t width = out - first < GROUP ? out - first : GROUP;
        for (int64_t j = 0; j < width; j += OUT) {
            const int64_t line = (first + j) / OUT, begin = lines.offsets[line], end = lines.offsets[line + 1];
            sum_line<DEPTH, OUT, IN, TOKENS>(
                panel, lines.blocks + begin, lines.slots ? lines.slots + begin : nullptr, end - begin,
                lines.slots ? values : values + begin * (OUT * IN / DEPTH), bias ? bias + first + j : nullptr,
                group + j * TOKENS);
        }
#if defined(__AVX512BF16__)
        if constexpr (DEPTH == 2)
            for (int64_t at = 0; at < width * TOKENS / 2; at += LANES) {
                const float* low = group + at / TOKENS * (2 * TOKENS) + at % TOKENS;
                store(group + at, join_pairs(load(low), load(low + TOKENS)));
            }
#endif
        unpack<TOKENS>(group, width / DEPTH, output + first / DEPTH, tokens, out / DEPTH, streamed);
    }
    if (streamed) finish_streams();
}

// input [tokens, in] -> output [tokens, out] + bias.
template <int DEPTH, int OUT, int IN>
void forward(const float* input, int64_t tokens, int64_t in, Lines lines, const float* values, const float* bias,
             int64_t out, float* output, int threads) {
    constexpr int SMALL = SMALL_PANEL<DEPTH>, LARGE = PANEL<DEPTH>;
    const Panels panels(tokens, SMALL, LARGE, threads);
    const bool streamed = is_streamed(output, tokens, out / DEPTH);
    const int64_t nnzb = lines.offsets[out / OUT];
    use_large_pages(output, tokens * out / DEPTH * int64_t(sizeof(float)));

    // Every panel reads all blocks: where there are several, put them in the order in which they are read.
    const int32_t* slots = lines.slots;
    float* ordered = panels.count > 2 ? entry_memory.get(nnzb * (OUT * IN / DEPTH)) : nullptr;
    if (ordered) {
        lines.slots = nullptr;
    }
#pragma omp parallel num_threads(panels.team(threads))
    {
        if (ordered) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < nnzb; i++)
                std::memcpy(ordered + i * (OUT * IN / DEPTH), values + int64_t(slots[i]) * (OUT * IN / DEPTH),
                            OUT * IN / DEPTH * sizeof(float));
        }
        float* panel = first_panel_memory.get(in / DEPTH * panels.size);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < panels.count; i++) {
            const int64_t begin = panels.begin(i), length = panels.length(i);
            with_panel<SMALL, LARGE>(length, [&](auto size) {
                constexpr int TOKENS = decltype(size)::value;
                pack<TOKENS>(input + begin * in / DEPTH, length, in / DEPTH, panel);
                multiply_panel<DEPTH, OUT, IN, TOKENS>(panel, length, lines, ordered ? ordered : values, bias, out,
                                                       output + begin * out / DEPTH, streamed);
            });
        }
    }
}

}  // namespace
