// Dropout, the sum with what went around the layer, and layer normalisation (arXiv:1607.06450), one pass each way.

#pragma once

#include <cmath>

#include "dropout.hpp"

namespace {

// Sizes, all but `rows` and `width` those of dropout (dropout.hpp); `threshold` 0 drops nothing. `width` is a multiple of
// LANES.
struct Residual {
    int64_t rows, width;
    uint64_t seed;
    uint32_t threshold;
    float scale, epsilon;
    int threads;
};

// All ones where the entry `place` + lane is dropped.
INLINE Words dropped(int64_t place, const Residual& of) {
    return of.threshold ? dropped(place, of.seed, of.threshold) : Words{};
}

INLINE Vector drop(Vector x, Words places, const Residual& of) { return (Vector)((Words)(x * of.scale) & ~places); }

INLINE float lane_sum(Vector x) {
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += x[l];
    return sum;
}

// output = (sum - mean) * deviation * weight + bias of each row of sum = dropout(input) + residual, all [rows, width];
// `mean` and `deviation` [rows], the inverse of the standard deviation, are kept for the way back.
inline void residual_norm(const Residual of, const float* input, const float* residual, const float* weight,
                          const float* bias, float* mean, float* deviation, float* output) {
    use_large_pages(output, of.rows * of.width * int64_t(sizeof(float)));
#pragma omp parallel for schedule(static) num_threads(of.threads)
    for (int64_t row = 0; row < of.rows; row++) {
        const int64_t begin = row * of.width, end = begin + of.width;
        Vector total{}, squares{};
        for (int64_t i = begin; i < end; i += LANES) {
            const Vector x = drop(load(input + i), dropped(i, of), of) + load(residual + i);
            store(output + i, x);  // a row stays in the first cache
            total += x;
        }
        const float center = mean[row] = lane_sum(total) / float(of.width);
        for (int64_t i = begin; i < end; i += LANES) {
            const Vector x = load(output + i) - center;
            squares += x * x;
        }
        const float factor = deviation[row] = 1.0f / std::sqrt(lane_sum(squares) / float(of.width) + of.epsilon);
        for (int64_t i = begin; i < end; i += LANES)
            store(output + i, (load(output + i) - center) * factor * load(weight + i - begin) + load(bias + i - begin));
    }
}

// From grad [rows, width] of the output, those of input, residual, weight [width] and bias [width]. That of the input is
// null where nothing was dropped: it is that of the residual.
inline void residual_norm_backward(const Residual of, const float* grad, const float* input, const float* residual,
                                   const float* mean, const float* deviation, const float* weight, float* grad_input,
                                   float* grad_residual, float* grad_weight, float* grad_bias) {
    const int64_t width = of.width, bytes = of.rows * width * int64_t(sizeof(float));
    use_large_pages(grad_residual, bytes);
    if (grad_input) use_large_pages(grad_input, bytes);
    float* parts = sum_memory.get(2 * width * of.threads);  // of weight and bias, for each thread
    std::memset(parts, 0, 2 * width * of.threads * sizeof(float));
#pragma omp parallel for schedule(static, 1) num_threads(of.threads)
    for (int thread = 0; thread < of.threads; thread++) {
        float *of_weight = parts + 2 * width * thread, *of_bias = of_weight + width;
        for (int64_t row = of.rows * thread / of.threads; row < of.rows * (thread + 1) / of.threads; row++) {
            const int64_t begin = row * width;
            const float center = mean[row], factor = deviation[row];
            Vector total{}, products{};
            for (int64_t j = 0; j < width; j += LANES) {
                const int64_t i = begin + j;
                const Words places = dropped(i, of);
                const Vector sum = drop(load(input + i), places, of) + load(residual + i);
                const Vector g = load(grad + i), x = (sum - center) * factor, weighted = g * load(weight + j);
                store(grad_residual + i, x);  // both rows stay in the first cache
                if (grad_input) store(grad_input + i, (Vector)places);
                store(of_weight + j, load(of_weight + j) + g * x);
                store(of_bias + j, load(of_bias + j) + g);
                total += weighted;
                products += weighted * x;
            }
            const float average = lane_sum(total) / float(width), slope = lane_sum(products) / float(width);
            for (int64_t j = 0; j < width; j += LANES) {
                const int64_t i = begin + j;
                const Vector weighted = load(grad + i) * load(weight + j);
                const Vector back = (weighted - average - load(grad_residual + i) * slope) * factor;
                store(grad_residual + i, back);
                if (grad_input) store(grad_input + i, drop(back, (Words)load(grad_input + i), of));
            }
        }
    }
    for (int64_t j = 0; j < width; j += LANES) {
        Vector of_weight{}, of_bias{};
        for (int thread = 0; thread < of.threads; thread++) {
            of_weight += load(parts + 2 * width * thread + j);
            of_bias += load(parts + 2 * width * thread + width + j);
        }
        store(grad_weight + j, of_weight);
        store(grad_bias + j, of_bias);
    }
}

}  // namespace
