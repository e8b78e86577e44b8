// Dense = dense x sparse.
//
// A line is a block row of the matrix (forward) or a block column (transposed): the blocks that one group of output
// features reads. The work is the same for both; only the place of an entry inside a stored block differs.

#pragma once

#include "panels.hpp"

namespace {

// The active blocks, line by line.
struct Lines {
    const int32_t* offsets;  // [lines + 1] where each line begins
    const int32_t* blocks;   // [nnzb] which block of input features each block reads
    const int32_t* slots;    // [nnzb] where its entries are stored
};

// OUT output features of a line, for all tokens of a panel: group [OUT, TOKENS].
//
// Four outputs and a few vectors of tokens are summed in registers: each vector of the panel serves four products, each
// entry of a block as many products as there are vectors. IN and OUT are loop bounds only, so small blocks cost no more.
// Long lines are summed in chunks of 64 input features, which keeps the rounding error near that of a dense product.
template <int OUT, int IN, bool TRANSPOSED, int TOKENS>
INLINE void sum_line(const float* panel, const int32_t* blocks, const int32_t* slots, int64_t count,
                     const float* values, const float* bias, float* group) {
    constexpr int VECTORS_IN_PANEL = TOKENS / LANES;
    constexpr int J = OUT < 4 ? OUT : VECTORS_IN_PANEL == 1 && OUT % 8 == 0 ? 8 : 4;
    constexpr int MOST = J == 1 ? 8 : REGISTERS == 32 ? 4 : 2;
    constexpr int V = VECTORS_IN_PANEL < MOST ? VECTORS_IN_PANEL : MOST;
    constexpr int K = IN < 8 ? IN : 4;  // unrolled
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
                    const float* x = panel + int64_t(blocks[i]) * (IN * TOKENS) + token;
                    const float* w = values + (slots ? int64_t(slots[i]) : i) * (OUT * IN) + j0 * (TRANSPOSED ? 1 : IN);
                    for (int k0 = 0; k0 < IN; k0 += K) UNROLL for (int k = k0; k < k0 + K; k++) {
                        Vector row[V];
                        UNROLL for (int v = 0; v < V; v++) row[v] = load(x + k * TOKENS + v * LANES);
                        UNROLL for (int j = 0; j < J; j++) {
                            const Vector entry = broadcast(w[TRANSPOSED ? k * OUT + j : j * IN + k]);
                            UNROLL for (int v = 0; v < V; v++) sum[j][v] += entry * row[v];
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

// input [tokens, in] -> output [tokens, out] for one panel.
template <int OUT, int IN, bool TRANSPOSED, int TOKENS>
void dds_panel(const float* input, int64_t tokens, int64_t in, Lines lines, const float* values, const float* bias,
               int64_t out, float* panel, float* output, bool streamed) {
    // Wide enough that each token's part of a group is written as a run of several cache lines.
    constexpr int64_t GROUP = 4096 / TOKENS < 64 ? 64 : 4096 / TOKENS;
    alignas(64) float group[GROUP * TOKENS];
    pack<TOKENS>(input, tokens, in, panel);
    for (int64_t first = 0; first < out; first += GROUP) {
        const int64_t width = out - first < GROUP ? out - first : GROUP;
        for (int64_t j = 0; j < width; j += OUT) {
            const int64_t line = (first + j) / OUT, begin = lines.offsets[line], end = lines.offsets[line + 1];
            sum_line<OUT, IN, TRANSPOSED, TOKENS>(
                panel, lines.blocks + begin, lines.slots ? lines.slots + begin : nullptr, end - begin,
                lines.slots ? values : values + begin * (OUT * IN), bias ? bias + first + j : nullptr,
                group + j * TOKENS);
        }
        unpack<TOKENS>(group, width, output + first, tokens, out, streamed);
    }
    if (streamed) finish_streams();
}

template <int OUT, int IN, bool TRANSPOSED>
void dds(const float* input, int64_t tokens, int64_t in, Lines lines, const float* values, const float* bias,
         int64_t out, float* output, int threads) {
    const Panels panels(tokens, threads);
    const bool streamed = is_streamed(output, tokens, out);

    // Every panel reads all blocks: put them in the order in which they are read.
    if (panels.count > 2) {
        const int64_t nnzb = lines.offsets[out / OUT];
        float* ordered = entry_memory.get(nnzb * (OUT * IN));
        for (int64_t i = 0; i < nnzb; i++)
            std::memcpy(ordered + i * (OUT * IN), values + int64_t(lines.slots[i]) * (OUT * IN),
                        OUT * IN * sizeof(float));
        values = ordered;
        lines.slots = nullptr;
    }

#pragma omp parallel for schedule(static) num_threads(panels.threads(threads))
    for (int64_t i = 0; i < panels.count; i++) {
        const int64_t begin = panels.begin(i), length = panels.length(i);
        float* panel = first_panel_memory.get(in * PANEL);
        const auto product = length <= SMALL_PANEL ? dds_panel<OUT, IN, TRANSPOSED, SMALL_PANEL>
                                                   : dds_panel<OUT, IN, TRANSPOSED, PANEL>;
        product(input + begin * in, length, in, lines, values, bias, out, panel, output + begin * out,
                streamed);
    }
}

}  // namespace
