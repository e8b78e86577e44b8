// The products of block-sparse matrices on the CPU, and passes over what lies between them: the functions that
// `hf_dynsparse/ops/native.py` calls.
//
// Compiled once per instruction set into a library of its own (setup.py). Plain C interface: no PyTorch, no Python.

#include "backward.hpp"
#include "cross_entropy.hpp"
#include "dropout.hpp"
#include "processor.hpp"
#include "residual_norm.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
// What all functions need to know of a layer; `hf_dynsparse/ops/native.py` fills it in.
struct Layer {
    int32_t rows, columns;  // of a block
    int32_t depth;          // 1: float32, 2: bfloat16 (formats.hpp)
    int32_t threads;
    int64_t tokens, out_features, in_features, nnzb;
};
}

// Calls BODY with the constants DEPTH, ROWS and COLUMNS; returns 1 for a format or a block shape that is not compiled.
#define SHAPE(D, R, C, ...)                                                                     \
    if (layer->depth == (D) && layer->rows == (R) && layer->columns == (C)) {                   \
        constexpr int DEPTH = (D), ROWS = (R), COLUMNS = (C);                                   \
        __VA_ARGS__;                                                                            \
        return 0;                                                                               \
    }
#define SQUARES(D, ...)                                                               \
    SHAPE(D, 4, 4, __VA_ARGS__) SHAPE(D, 8, 8, __VA_ARGS__) SHAPE(D, 16, 16, __VA_ARGS__) \
    SHAPE(D, 32, 32, __VA_ARGS__) SHAPE(D, 64, 64, __VA_ARGS__)
#if defined(__AVX512BF16__)
#define PAIRS(...) SQUARES(2, __VA_ARGS__)
#else
#define PAIRS(...)
#endif
#define FOR_LAYER(...) \
    SHAPE(1, 1, 1, __VA_ARGS__) SHAPE(1, 1, 4, __VA_ARGS__) SQUARES(1, __VA_ARGS__) PAIRS(__VA_ARGS__) return 1;

// Grows with every change of the functions below: a library from an older build is refused.
EXPORT int interface_version() { return 4; }

// The best variant for this CPU: 5 for x86-64-v4 with AVX512-BF16, 4 for x86-64-v4, 3 for x86-64-v3, 0 for the
// portable one.
EXPORT int best_variant() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = runs_v3(), v4 = runs_v4();
    return v4 && __builtin_cpu_supports("avx512bf16") ? 5 : v4 ? 4 : v3 ? 3 : 0;
#else
    return 0;
#endif
}

// output [tokens, out] = input [tokens, in] @ W.T + bias; `bias` [out] is float32 and may be null.
EXPORT int forward(const Layer* layer, const Order* by_row, const float* input, const float* values,
                   const float* bias, float* output) {
    const Lines lines{by_row->offsets, by_row->columns, by_row->slots};
    FOR_LAYER((forward<DEPTH, ROWS, COLUMNS>(input, layer->tokens, layer->in_features, lines, values, bias,
                                             layer->out_features, output, layer->threads)))
}

// From grad [tokens, out]: grad_input [tokens, in] = grad @ W, grad_values [nnzb, rows, columns] = the active blocks of
// grad.T @ input, grad_bias [out] = the sum over tokens; each may be null. The last two are float32.
EXPORT int backward(const Layer* layer, const Order* by_row, const Order* by_column, const float* grad,
                    const float* input, const float* values, float* grad_input, float* grad_values, float* grad_bias) {
    FOR_LAYER((Backward<DEPTH, ROWS, COLUMNS>{layer->tokens, layer->out_features, layer->in_features, layer->nnzb,
                                              *by_row, *by_column, grad, input, values,
                                              Gradients{grad_input, grad_values, grad_bias}}
                   .run(layer->threads)))
}

// output [count] = input with each entry zero with probability threshold / 2^32 and multiplied by `scale` otherwise;
// `depth` as in Layer. The same seed drops the same entries.
EXPORT void dropout(int depth, int threads, int64_t count, uint64_t seed, uint32_t threshold, float scale,
                    const void* input, void* output) {
    if (depth == 1)
        dropout(static_cast<const float*>(input), static_cast<float*>(output), count, seed, threshold, scale, threads);
    else
        dropout(static_cast<const uint16_t*>(input), static_cast<uint16_t*>(output), count, seed, threshold, scale,
                threads);
}

// cross_entropy.hpp
EXPORT int64_t cross_entropy(int threads, int64_t rows, int64_t classes, const float* logits, const int64_t* labels,
                             float* losses, LogSum* sums) {
    return cross_entropy(logits, labels, rows, classes, losses, sums, threads);
}

EXPORT void cross_entropy_backward(int threads, int64_t rows, int64_t classes, const float* grad, const float* logits,
                                   const int64_t* labels, const LogSum* sums, float* grad_logits) {
    cross_entropy_backward(grad, logits, labels, sums, rows, classes, grad_logits, threads);
}

// residual_norm.hpp
EXPORT void residual_norm(const Residual* of, const float* input, const float* residual, const float* weight,
                          const float* bias, float* mean, float* deviation, float* output) {
    residual_norm(*of, input, residual, weight, bias, mean, deviation, output);
}

EXPORT void residual_norm_backward(const Residual* of, const float* grad, const float* input, const float* residual,
                                   const float* mean, const float* deviation, const float* weight, float* grad_input,
                                   float* grad_residual, float* grad_weight, float* grad_bias) {
    residual_norm_backward(*of, grad, input, residual, mean, deviation, weight, grad_input, grad_residual, grad_weight,
                           grad_bias);
}
