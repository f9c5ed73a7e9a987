// Drawing a token for each of a step's rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace recontrol {
namespace {

// Largest entry; NaN if any is NaN.
float highest(const float* x, int64_t size) {
    Floats top = all(-INFINITY);
    Mask unordered = first_lanes(0);
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats v = load(x + i, first_lanes(size - i), top);
        unordered = either(unordered, is_nan(v));
        top = max(top, v);
    }
    return any(unordered) ? std::numeric_limits<float>::quiet_NaN() : largest_of(top);
}

// p = exp(scale * (x - top)), returns the sum.
double exponentials(const float* x, float* p, int64_t size, float top, float scale) {
    constexpr int64_t kBlock = 1024;
    double total = 0;
    for (int64_t first = 0; first < size; first += kBlock) {
        Floats sum = zeros();
        for (int64_t i = first; i < std::min(first + kBlock, size); i += kLanes) {
            const Mask mask = first_lanes(size - i);
            const Floats lowered = sub(load_or_zero(x + i, mask), all(top));
            const Floats e = choose(mask, exp(mul(lowered, all(scale))), zeros());
            store(p + i, mask, e);
            sum = add(sum, e);
        }
        total += sum_of(sum);
    }
    return total;
}

double sum_from(const float* p, int64_t size, float least) {
    Floats sum = zeros();
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats v = load_or_zero(p + i, first_lanes(size - i));
        sum = add(sum, choose(is_at_least(v, all(least)), v, zeros()));
    }
    return sum_of(sum);
}

void take_from(const float* p, int64_t size, float least, std::vector<float>& out) {
    out.resize(size + kLanes);
    float* end = out.data();
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats v = load_or_zero(p + i, first_lanes(size - i));
        const Mask mask = both(first_lanes(size - i), is_at_least(v, all(least)));
        end += store_chosen(end, mask, v);
    }
    out.resize(end - out.data());
}

// Weights lie in (0, 1], the largest being 1: floors above which most filters find all that they keep.
constexpr size_t kFewWeights = 1024;
constexpr float kFloors[] = {1e-2f, 1e-3f, 1e-4f, 0.0f};

float kth_largest(const float* p, int64_t size, int64_t k, std::vector<float>& scratch) {
    for (const float floor : kFloors) {
        take_from(p, size, floor, scratch);
        if ((int64_t)scratch.size() >= k) break;
    }
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
    return scratch[k - 1];
}

// Of weights in descending order, keeps a slice that holds the one at which `mass` is reached; `before` grows by what
// lies above it. A slice is ten bits of the floats' patterns, from `shift` on, which order weights as their values do.
void narrow(std::vector<float>& weights, int shift, double mass, double& before) {
    constexpr uint32_t kSlices = 1024;
    const auto slice_of = [shift](float weight) {
        uint32_t pattern;
        std::memcpy(&pattern, &weight, sizeof pattern);
        return (pattern >> shift) % kSlices;
    };
    double held[kSlices] = {};
    for (const float weight : weights) held[slice_of(weight)] += weight;
    uint32_t kept = 0;
    double sum = before;
    // The lowest slice that holds anything is kept where, by rounding, all come to less than the mass.
    for (uint32_t slice = kSlices; slice-- > 0 && sum < mass;) {
        if (held[slice] == 0) continue;
        kept = slice;
        before = sum;
        sum += held[slice];
    }
    const auto is_left_out = [&](float weight) { return slice_of(weight) != kept; };
    weights.erase(std::remove_if(weights.begin(), weights.end(), is_left_out), weights.end());
}

// Smallest weight in the smallest set of the largest weights that holds `mass`.
float nucleus_threshold(const float* p, int64_t size, double mass, float least, std::vector<float>& scratch) {
    for (const float floor : kFloors) {
        take_from(p, size, std::max(floor, least), scratch);
        double held = 0;
        for (const float weight : scratch) held += weight;
        if (held >= mass || floor <= least) break;
    }
    double before = 0;
    // Of a flat distribution the nucleus is most of the vocabulary: far too much to sort.
    for (int shift = 20; shift >= 0 && scratch.size() > kFewWeights; shift -= 10) narrow(scratch, shift, mass, before);
    std::sort(scratch.begin(), scratch.end(), std::greater<float>());
    for (const float weight : scratch) {
        before += weight;
        if (before >= mass) return weight;
    }
    return scratch.back();
}

// First token, in order of ids, at which the weights of at least `least` come to more than `target`.
int64_t draw(const float* p, int64_t size, float least, double target) {
    constexpr int64_t kBlock = 256;
    double before = 0;
    int64_t last = -1;
    for (int64_t first = 0; first < size; first += kBlock) {
        const int64_t count = std::min(kBlock, size - first);
        const double block = sum_from(p + first, count, least);
        if (before + block <= target && first + kBlock < size) {
            before += block;
            continue;
        }
        for (int64_t i = first; i < first + count; ++i) {
            if (!(p[i] >= least) || p[i] == 0) continue;
            last = i;
            before += p[i];
            if (before > target) return i;
        }
        // Rounding: the block's elements came to less than its sum. Go on behind it.
    }
    if (last >= 0) return last;
    return std::max_element(p, p + size) - p;
}

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// Token ids [rows] from logits [rows, vocabulary]: the inverse of the cumulative distribution at uniforms[r], after
// min-p, top-k and top-p (of what those left). A temperature of 0 takes the largest logit, a top_k of 0 keeps all. A row
// whose largest logit is not finite gets token -1.
EXPORT int sample_f32(int64_t threads, const float* logits, int64_t rows, int64_t vocabulary, const float* temperatures,
                      const int64_t* top_k, const double* top_p, const float* min_p, const double* uniforms,
                      int64_t* tokens) {
    return called(threads, [&] {
        share(rows, [&](Pieces& pieces) {
            std::vector<float> weights(vocabulary), scratch;
            for (const int64_t r : pieces) {
                const float* row = logits + r * vocabulary;
                const float top = highest(row, vocabulary);
                if (!std::isfinite(top)) {
                    tokens[r] = -1;
                    continue;
                }
                if (temperatures[r] == 0) {
                    tokens[r] = std::find(row, row + vocabulary, top) - row;
                    continue;
                }
                double total = exponentials(row, weights.data(), vocabulary, top, 1.0f / temperatures[r]);
                float least = min_p[r];
                if (0 < top_k[r] && top_k[r] < vocabulary)
                    least = std::max(least, kth_largest(weights.data(), vocabulary, top_k[r], scratch));
                if (least > 0) total = sum_from(weights.data(), vocabulary, least);
                if (top_p[r] < 1) {
                    least = nucleus_threshold(weights.data(), vocabulary, top_p[r] * total, least, scratch);
                    total = sum_from(weights.data(), vocabulary, least);
                }
                tokens[r] = draw(weights.data(), vocabulary, least, uniforms[r] * total);
            }
        });
    });
}
