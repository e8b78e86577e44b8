// Cross-entropy of rows of logits, without a copy of their logarithms of probabilities: those are computed again where
// the gradient is written.

#pragma once

#include <cmath>
#include <cstring>

#include "exponential.hpp"
#include "memory.hpp"

namespace {

constexpr int64_t IGNORED = -100;  // a label that does not count

// The vector of a row that begins at column `i`; beyond its end, what counts for nothing.
INLINE Vector load_logits(const float* row, int64_t i, int64_t classes) {
    if (i + LANES <= classes) return load(row + i);
    Vector x = broadcast(-INFINITY);
    for (int64_t l = 0; i + l < classes; l++) x[l] = row[i + l];
    return x;
}

// The largest logit of a row, and the logarithm of the sum of exponentials of all logits less that one: apart, since
// their sum would lose what is small beside large logits. The row is read from memory once.
struct LogSum {
    float largest, rest;
};

inline LogSum log_sum(const float* row, int64_t classes) {
    constexpr int SUMS = 4;  // running ones: their rounding errors are smaller, and they do not wait for each other
    Vector largest = broadcast(-INFINITY), sums[SUMS] = {};
    for (int64_t i = 0; i < classes; i += LANES) {
        const Vector x = load_logits(row, i, classes);
        largest = x > largest ? x : largest;
    }
    float most = -INFINITY;
    for (int l = 0; l < LANES; l++) most = largest[l] > most ? largest[l] : most;
    for (int64_t i = 0; i < classes; i += SUMS * LANES) UNROLL for (int s = 0; s < SUMS; s++)
        if (i + s * LANES < classes) sums[s] += exponential(load_logits(row, i + s * LANES, classes) - most);
    const Vector sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int l = 0; l < LANES; l++) total += sum[l];
    return {most, std::log(float(total))};
}

// logits [rows, classes], labels [rows] -> losses [rows], 0 where the label is ignored, and the sums [rows] that the
// gradient needs. The result is the first row with a label that is no class, or `rows`.
inline int64_t cross_entropy(const float* logits, const int64_t* labels, int64_t rows, int64_t classes, float* losses,
                             LogSum* sums, int threads) {
    for (int64_t row = 0; row < rows; row++)
        if (labels[row] != IGNORED && (labels[row] < 0 || labels[row] >= classes)) return row;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const bool counts = labels[row] != IGNORED;
        const LogSum sum = sums[row] = counts ? log_sum(logits + row * classes, classes) : LogSum{};
        losses[row] = counts ? sum.largest - logits[row * classes + labels[row]] + sum.rest : 0.0f;
    }
    return rows;
}

// grad [rows] of the losses -> grad_logits [rows, classes].
inline void cross_entropy_backward(const float* grad, const float* logits, const int64_t* labels, const LogSum* sums,
                                   int64_t rows, int64_t classes, float* grad_logits, int threads) {
    use_large_pages(grad_logits, rows * classes * int64_t(sizeof(float)));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const float* x = logits + row * classes;
        float* to = grad_logits + row * classes;
        if (labels[row] == IGNORED) {
            std::memset(to, 0, classes * sizeof(float));
            continue;
        }
        const float scale = grad[row];
        const LogSum sum = sums[row];
        for (int64_t i = 0; i < classes; i += LANES) {
            const Vector y = exponential(load_logits(x, i, classes) - sum.largest - sum.rest) * scale;
            if (i + LANES <= classes)
                store(to + i, y);
            else
                for (int64_t l = 0; i + l < classes; l++) to[i + l] = y[l];
        }
        to[labels[row]] -= scale;
    }
}

}  // namespace
