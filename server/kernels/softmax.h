// A softmax that runs over the positions page by page, for up to 16 rows at once.
//
// After each page a row knows its highest score so far, the sum of its weights and of its weighted values, all relative
// to that score; a page that brings a higher one scales the sums down. A page that is hidden from a row changes nothing
// for it, to the bit. Scores are in units of log2, so that weights are powers of two. T is what weights and results are
// kept in.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "pages.h"

namespace recontrol {
namespace {

constexpr float kLog2E = 1.44269504f;

// Of 16 rows, up to the page before.
struct Running {
    alignas(64) float highest[kLanes];
    alignas(64) float totals[kLanes][kLanes];  // of the weights, by position modulo 16

    Running() : totals{} { std::fill(highest, highest + kLanes, -FLT_MAX); }

    // Row n has seen a place with this logit, and no value. A NaN stays one.
    void see_sink(int64_t n, float logit) {
        const float score = logit * kLog2E;
        highest[n] = score < -FLT_MAX ? -FLT_MAX : score;
        totals[n][0] = 1.0f;
    }
};

// To T.
inline void store_as(float* p, Floats x) { store(p, x); }
inline void store_as(float* p, Mask mask, Floats x) { store(p, mask, x); }
inline void store_as(bf16* p, Floats x) { store_bf16(p, x); }
inline void store_as(bf16* p, Mask mask, Floats x) { store_bf16(p, mask, x); }

// 2^r for r from 0 to 1, 2^0 exactly: relative error below 2e-7, and for bfloat16 below 3e-6.
template <typename T>
Floats exp2_of_fraction(Floats r) {
    Floats y = all(0.0002161291512f);
    y = fma(y, r, all(0.001246784639f));
    y = fma(y, r, all(0.009675451574f));
    y = fma(y, r, all(0.05548528061f));
    y = fma(y, r, all(0.2402293056f));
    y = fma(y, r, all(0.6931470444f));
    return fma(y, r, all(1.0f));
}
template <>
inline Floats exp2_of_fraction<bf16>(Floats r) {
    Floats y = all(0.01342664782f);
    y = fma(y, r, all(0.05224253282f));
    y = fma(y, r, all(0.2412801775f));
    y = fma(y, r, all(0.6930448483f));
    return fma(y, r, all(1.0f));
}

// 2^x; 0 for -inf, NaN stays NaN. At most 2^127 on AVX2.
template <typename T>
Floats exp2(Floats x) {
#ifdef __AVX512F__
    const Floats fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_of_fraction<T>(fraction), x);
#else
    // The operand order matters: max and min give back their second operand for a NaN.
    const Floats bounded = min(all(127.0f), max(all(-126.0f), x));
    const Floats whole = nearest(sub(bounded, all(0.5f)));
    const Floats y = times_power_of_two(exp2_of_fraction<T>(sub(bounded, whole)), whole);
    return choose(is_less(x, all(-126.0f)), zeros(), y);
#endif
}

// tanh(x) = 1 - 2 / (exp(2 x) + 1), and near zero, where that cancels, Cephes' polynomial.
template <typename T>
Floats tanh(Floats x) {
    const Floats square = mul(x, x);
    Floats near = all(-5.70498872745e-3f);
    near = fma(near, square, all(2.06390887954e-2f));
    near = fma(near, square, all(-5.37397155531e-2f));
    near = fma(near, square, all(1.33314422036e-1f));
    near = fma(near, square, all(-3.33332819422e-1f));
    near = fma(mul(near, square), x, x);
    const Floats e = exp2<T>(mul(x, all(2.0f * kLog2E)));
    const Floats far = sub(all(1.0f), div(all(2.0f), add(e, all(1.0f))));
    return choose(is_less(square, all(0.625f * 0.625f)), near, far);
}

// c tanh(x / c) of x = scaling * score, in units of log2.
template <typename T>
void cap(float* scores, int64_t count, float scaling, float softcap) {
    const Floats inner = all(scaling / softcap), outer = all(softcap * kLog2E);
    for (int64_t s = 0; s < count; s += kLanes)
        store(scores + s, mul(tanh<T>(mul(load(scores + s), inner)), outer));
}

// Hides a row's slots outside [begin, end).
inline void hide(float* scores, int64_t slots, int64_t begin, int64_t end) {
    for (int64_t s = 0; s < slots; s += kLanes) {
        const Mask is_seen = but_not(first_lanes(end - s), first_lanes(begin - s));
        store(scores + s, choose(is_seen, load(scores + s), all(-INFINITY)));
    }
}

// Scales rows down to the highest score of this page and those before, where it has risen; a factor of 1 needs no work.
inline void scale_down(const float* factors, int rows, Running& running, float* sums, int64_t width) {
    for (int n = 0; n < rows; ++n) {
        if (factors[n] == 1.0f) continue;
        const Floats factor = all(factors[n]);
        store(running.totals[n], mul(load(running.totals[n]), factor));
        for (float* sum = sums + n * width; sum < sums + (n + 1) * width; sum += kLanes)
            store(sum, mul(load(sum), factor));
    }
}

// The weights 2^(scale * score - highest) of a page, and what they change in the sums [rows][width] so far, whose width
// is a multiple of 16. Scores and weights are [rows][kPage], of which the first `slots` count.
template <typename T>
void weigh(const float* scores, int rows, int64_t slots, float scale, T* weights, Running& running, float* sums,
           int64_t width) {
    alignas(64) float highest[kLanes], factors[kLanes];
    std::fill(highest + rows, highest + kLanes, -INFINITY);
    for (int n = 0; n < rows; ++n) {
        Floats row = load(scores + n * kPage);
        for (int64_t s = kLanes; s < slots; s += kLanes) row = max(load(scores + n * kPage + s), row);
        highest[n] = largest_of(row);
    }
    const Floats before = load(running.highest), now = max(mul(load(highest), all(scale)), before);
    store(running.highest, now);
    store(factors, exp2<T>(sub(before, now)));
    scale_down(factors, rows, running, sums, width);
    for (int n = 0; n < rows; ++n) {
        const Floats top = all(running.highest[n]);
        Floats total = load(running.totals[n]);
        for (int64_t s = 0; s < slots; s += kLanes) {
            const Floats weight = exp2<T>(fms(load(scores + n * kPage + s), all(scale), top));
            total = add(total, weight);
            store_as(weights + n * kPage + s, weight);
        }
        store(running.totals[n], total);
    }
}

// A row's weighted values over its weights, [value_size]. What is below the normal numbers becomes zero, and -0 becomes
// 0, since products on some levels do that to them even when they add nothing: so what is hidden leaves no trace.
template <typename T>
void finish(const float* totals, const float* sums, int64_t value_size, T* out) {
    const Floats inverse = all(1.0f / sum_of(load(totals)));
    const auto result = [&](int64_t i) {
        const Floats sum = load(sums + i);
        const Mask is_small = both(is_less(sum, all(FLT_MIN)), is_less(all(-FLT_MIN), sum));
        return choose(is_small, zeros(), mul(sum, inverse));
    };
    int64_t i = 0;
    for (; i + kLanes <= value_size; i += kLanes) store_as(out + i, result(i));
    if (i < value_size) store_as(out + i, first_lanes(value_size - i), result(i));
}

}  // namespace
}  // namespace recontrol
