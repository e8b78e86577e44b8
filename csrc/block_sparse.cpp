// The products of block-sparse matrices on the processor: the functions that `hf_dynsparse/ops/native.py` calls.
//
// Compiled once per instruction set into a library of its own (setup.py). Plain C interface: no PyTorch, no Python.

#include "dds.hpp"
#include "sdd.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Calls BODY with the constants ROWS and COLUMNS set to the block shape; returns 1 for a shape that is not compiled.
#define SHAPE(R, C, ...)                      \
    if (rows == (R) && columns == (C)) {      \
        constexpr int ROWS = (R), COLUMNS = (C); \
        __VA_ARGS__;                          \
        return 0;                             \
    }
#define FOR_BLOCK_SHAPE(...)                                                                          \
    SHAPE(1, 1, __VA_ARGS__) SHAPE(1, 4, __VA_ARGS__) SHAPE(4, 4, __VA_ARGS__) SHAPE(8, 8, __VA_ARGS__) \
    SHAPE(16, 16, __VA_ARGS__) SHAPE(32, 32, __VA_ARGS__) SHAPE(64, 64, __VA_ARGS__) return 1;

// Grows with every change of the functions below: a library from an older build is refused.
EXPORT int interface_version() { return 1; }

// The best variant for this processor: 4 for x86-64-v4, 3 for x86-64-v3, 0 for the portable one.
EXPORT int best_variant() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? 4 : v3 ? 3 : 0;
#else
    return 0;
#endif
}

// output [tokens, out] = input [tokens, in] @ W.T + bias; `transposed`: output [tokens, in] = input [tokens, out] @ W.
// The lines are block rows of W, or block columns if `transposed`; `bias` may be null.
EXPORT int dds(int rows, int columns, int transposed, int threads, int64_t tokens, int64_t out_features,
               int64_t in_features, const float* input, const int32_t* offsets, const int32_t* blocks,
               const int32_t* slots, const float* values, const float* bias, float* output) {
    const Lines lines{offsets, blocks, slots};
    FOR_BLOCK_SHAPE(
        if (transposed) dds<COLUMNS, ROWS, true>(input, tokens, out_features, lines, values, bias, in_features, output,
                                                 threads);
        else dds<ROWS, COLUMNS, false>(input, tokens, in_features, lines, values, bias, out_features, output, threads))
}

// output [nnzb, rows, columns] = the active blocks of grad [tokens, out].T @ input [tokens, in], which are walked block
// row by block row, or block column by block column if `by_column` (square blocks only).
EXPORT int sdd(int rows, int columns, int by_column, int threads, int64_t tokens, int64_t out_features,
               int64_t in_features, const float* grad, const float* input, int64_t nnzb, const int32_t* row_of,
               const int32_t* column_of, const int32_t* slots, float* output) {
    FOR_BLOCK_SHAPE(
        if constexpr (ROWS == COLUMNS) if (by_column) {
            sdd<COLUMNS, ROWS, true>(input, in_features, grad, out_features, tokens,
                                     Walk{nnzb, column_of, row_of, slots}, output, threads);
            return 0;
        }
        sdd<ROWS, COLUMNS, false>(grad, out_features, input, in_features, tokens,
                                  Walk{nnzb, row_of, column_of, slots}, output, threads))
}
