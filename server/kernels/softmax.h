// A softmax that runs over the positions page by page, for up to 16 rows at once.
//
// After each page a row knows its highest score so far, the sum of its weights and of its weighted values, all relative
// to that score; a page that brings a higher one scales the sums down. A page that is hidden from a row changes nothing
// for it, to the bit. Scores are in units of log2, so that weights are powers of two.
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
};

// 2^r for r from 0 to 1, relative error below 3e-6 (weights are kept in bfloat16), 2^0 exactly.
inline Floats exp2_of_fraction(Floats r) {
    Floats y = all(0.01342664782f);
    y = fma(y, r, all(0.05224253282f));
    y = fma(y, r, all(0.2412801775f));
    y = fma(y, r, all(0.6930448483f));
    return fma(y, r, all(1.0f));
}

// 2^x; 0 for -inf, NaN stays NaN. At most 2^127 on AVX2.
inline Floats exp2(Floats x) {
#ifdef __AVX512F__
    const Floats fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_of_fraction(fraction), x);
#else
    // The operand order matters: max and min give back their second operand for a NaN.
    const Floats bounded = min(all(127.0f), max(all(-126.0f), x));
    const Floats whole = nearest(sub(bounded, all(0.5f)));
    const Floats y = times_power_of_two(exp2_of_fraction(sub(bounded, whole)), whole);
    return choose(is_less(x, all(-126.0f)), zeros(), y);
#endif
}

// c tanh(x / c) = c (1 - 2 / (exp(2 x / c) + 1)) of x = scaling * score, in units of log2.
inline void cap(float* scores, int64_t count, float scaling, float softcap) {
    const Floats inner = all(2.0f * kLog2E * scaling / softcap), outer = all(softcap * kLog2E);
    for (int64_t s = 0; s < count; s += kLanes) {
        const Floats e = exp2(mul(load(scores + s), inner));
        const Floats tanh = sub(all(1.0f), div(all(2.0f), add(e, all(1.0f))));
        store(scores + s, mul(tanh, outer));
    }
}

// Hides a row's slots outside [begin, end).
inline void hide(float* scores, int64_t slots, int64_t begin, int64_t end) {
    for (int64_t s = 0; s < slots; s += kLanes) {
        const Mask is_seen = but_not(first_lanes(end - s), first_lanes(begin - s));
        store(scores + s, choose(is_seen, load(scores + s), all(-INFINITY)));
    }
}

// Scales rows down to the highest score of this page and those before, where it has risen; a factor of 1 needs no work.
inline void scale_down(const float* factors, int rows, Running& running, float* sums, int64_t head_size) {
    for (int n = 0; n < rows; ++n) {
        if (factors[n] == 1.0f) continue;
        const Floats factor = all(factors[n]);
        store(running.totals[n], mul(load(running.totals[n]), factor));
        for (float* sum = sums + n * head_size; sum < sums + (n + 1) * head_size; sum += kLanes)
            store(sum, mul(load(sum), factor));
    }
}

// The weights 2^(scale * score - highest) of a page in bfloat16, and what they change in the sums [rows][head_size] so
// far. Scores and weights are [rows][kPage], of which the first `slots` count.
inline void weigh(const float* scores, int rows, int64_t slots, float scale, bf16* weights, Running& running,
                  float* sums, int64_t head_size) {
    alignas(64) float highest[kLanes], factors[kLanes];
    std::fill(highest + rows, highest + kLanes, -INFINITY);
    for (int n = 0; n < rows; ++n) {
        Floats row = load(scores + n * kPage);
        for (int64_t s = kLanes; s < slots; s += kLanes) row = max(load(scores + n * kPage + s), row);
        highest[n] = largest_of(row);
    }
    const Floats before = load(running.highest), now = max(mul(load(highest), all(scale)), before);
    store(running.highest, now);
    store(factors, exp2(sub(before, now)));
    scale_down(factors, rows, running, sums, head_size);
    for (int n = 0; n < rows; ++n) {
        const Floats top = all(running.highest[n]);
        Floats total = load(running.totals[n]);
        for (int64_t s = 0; s < slots; s += kLanes) {
            const Floats weight = exp2(fms(load(scores + n * kPage + s), all(scale), top));
            total = add(total, weight);
            store_bf16(weights + n * kPage + s, weight);
        }
        store(running.totals[n], total);
    }
}

// A row's weighted values over its weights, [head_size]. What is below the normal numbers becomes zero, and -0 becomes
// 0, since products on some levels do that to them even when they add nothing: so what is hidden leaves no trace.
inline void finish(const float* totals, const float* sums, int64_t head_size, bf16* out) {
    const Floats inverse = all(1.0f / sum_of(load(totals)));
    for (int64_t i = 0; i < head_size; i += kLanes) {
        const Floats sum = load(sums + i);
        const Mask is_small = both(is_less(sum, all(FLT_MIN)), is_less(all(-FLT_MIN), sum));
        store_bf16(out + i, choose(is_small, zeros(), mul(sum, inverse)));
    }
}

}  // namespace
}  // namespace recontrol
