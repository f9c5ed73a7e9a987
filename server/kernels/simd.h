// What the kernels are written in: vectors of 16 floats, masks of 16 lanes, and pairs of bfloat16 numbers.
//
// A level is what a processor must have: AVX2, AVX-512, that with bfloat16, and AMX. setup.py compiles every file once for
// each, into a library of its own, and __init__.py chooses one when it loads it. Only simd_*.h, and a kernel that does
// something special on one level, look at the compiler's macros (__AVX512F__, __AVX512BF16__, __AMX_BF16__).
//
// Every kernel computes a row of the batch from that row alone, in an order of summation that depends on nothing but
// the row's own sizes. So a row has the same bits in every batch, on each level; levels may differ in the last bits.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace recontrol {
namespace {

using bf16 = uint16_t;
constexpr int kLanes = 16;

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace
}  // namespace recontrol

#ifdef __AVX512F__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace recontrol {
namespace {

inline Floats load_or_zero(const float* p, Mask mask) { return load(p, mask, zeros()); }

// exp(x), relative error below 2e-7; 0 below -87.3, infinite above 88, NaN stays NaN. Cephes' polynomial.
inline Floats exp(Floats x) {
    const Floats lowest = all(-87.3f), highest = all(88.0f);
    // The operand order matters: max and min give back their second operand for a NaN.
    const Floats bounded = min(highest, max(lowest, x));
    const Floats n = nearest(mul(bounded, all(1.44269504f)));
    Floats r = fnma(n, all(0.693359375f), bounded);
    r = fnma(n, all(-2.12194440e-4f), r);
    Floats y = all(1.9875691500e-4f);
    y = fma(y, r, all(1.3981999507e-3f));
    y = fma(y, r, all(8.3334519073e-3f));
    y = fma(y, r, all(4.1665795894e-2f));
    y = fma(y, r, all(1.6666665459e-1f));
    y = fma(y, r, all(5.0000001201e-1f));
    y = fma(y, mul(r, r), add(r, all(1.0f)));
    y = choose(is_less(highest, x), all(INFINITY), times_power_of_two(y, n));
    return choose(is_less(x, lowest), zeros(), y);
}

// Two numbers that lie one behind the other, in every lane.
inline Pairs all_pairs(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return all_pairs(pair);
}

}  // namespace
}  // namespace recontrol
