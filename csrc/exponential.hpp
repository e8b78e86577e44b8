// The exponential of one register of floats.

#pragma once

#include "vectors.hpp"

namespace {

template <int COUNT>
INLINE Vector polynomial(const float (&coefficients)[COUNT], Vector x) {
    Vector sum = broadcast(coefficients[COUNT - 1]);
    UNROLL for (int i = COUNT - 2; i >= 0; i--) sum = sum * x + coefficients[i];
    return sum;
}

// e^x for x at most 0, within 2 units in the last place; 0 below -87, where numbers stop being normal.
//
// With x = n ln 2 + r: 2^n times a polynomial in r, fitted for the smallest largest relative error (3e-9).
INLINE Vector exponential(Vector x) {
    constexpr float FITTED[] = {0.49999994f, 0.166665211f, 0.041668389f, 0.00836871006f, 0.00138146116f};
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction, and its last bits are an integer
    const Vector shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
    const Vector r = x - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts: n times the first is exact
    const Vector power = (Vector)(((Indices)shifted + 127) << 23);
    const Vector result = (polynomial(FITTED, r) * (r * r) + r + 1.0f) * power;
    return (Vector)((Indices)result & ~(Indices)(x < -87.0f));
}

}  // namespace
