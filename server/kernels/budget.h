// How far along a change of logits a row may go within a bound on its divergence from where it began, and the change.
//
// The search is that of server/control/budget.py, which explains it; here each row does it while its logits are in the
// cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace recontrol {
namespace {

constexpr double kMinTotal = 1e-30;
constexpr double kAim[] = {0.985, 0.985, 0.985, 0.98, 0.95, 0.9, 0.7, 0.5};
constexpr double kCloseEnough = 0.97;

float largest(const float* x, int64_t size) {
    Floats top = all(-INFINITY);
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats v = load(x + i, first_lanes(size - i), top);
        top = max(top, v);
    }
    return largest_of(top);
}

// The largest number; not a number where any is not finite.
float largest_if_finite(const float* x, int64_t size) {
    Floats top = all(-INFINITY), none = zeros();
    for (int64_t i = 0; i < size; i += kLanes) {
        const Mask mask = first_lanes(size - i);
        const Floats v = load_or_zero(x + i, mask);
        top = max(top, choose(mask, v, top));
        none = add(none, sub(v, v));
    }
    return sum_of(none) == 0 ? largest_of(top) : NAN;
}

constexpr int64_t kBlock = 1024;  // summed in float32, blocks in float64

// One row: base logits l, kept as p = exp(l - max(l)) in `probs`, and a change d, less its largest entry, of which
// `share` is the most that is taken.
class Row {
   public:
    // `tilts` holds exp(d) if it is known, and saves time where the share is whole.
    Row(const float* logits, const float* delta, float largest_delta, float share, const float* tilts, int64_t size,
        float* probs)
        : probs_(probs), delta_(delta), size_(size), peak_(largest_delta), share_(share) {
        const Floats top = all(largest(logits, size)), peak = all(peak_);
        const Floats most = all(share);
        const bool is_known = tilts && share == 1.0f;
        for (int64_t begin = 0; begin < size; begin += kBlock) {
            Floats mass = zeros(), first = mass, second = mass, total = mass, weighted = mass;
            for (int64_t i = begin; i < std::min(begin + kBlock, size); i += kLanes) {
                const Mask mask = first_lanes(size - i);
                const Floats lowered = sub(load_or_zero(logits + i, mask), top);
                const Floats p = choose(mask, exp(lowered), zeros());
                store(probs + i, mask, p);
                const Floats d = sub(load_or_zero(delta + i, mask), peak);
                const Floats tilt = is_known ? load_or_zero(tilts + i, mask) : exp(mul(most, d));
                const Floats w = mul(p, tilt), pd = mul(p, d);
                mass = add(mass, p);
                first = add(first, pd);
                second = fma(pd, d, second);
                total = add(total, w);
                weighted = fma(w, d, weighted);
            }
            mass_ += sum_of(mass);
            first_ += sum_of(first), second_ += sum_of(second);
            total_ += sum_of(total), weighted_ += sum_of(weighted);
        }
        full_ = of(share, total_, weighted_);
    }

    // KL(softmax(l + share d) || softmax(l)).
    double full() const { return full_; }

    // KL(softmax(l + s share d) || softmax(l)); not a number where it cannot be told, which is never within a bound.
    double divergence(float scale) const {
        const float taken = scale * share_;
        const Floats peak = all(peak_), s = all(taken);
        double total = 0, weighted = 0;
        for (int64_t begin = 0; begin < size_; begin += kBlock) {
            Floats block = zeros(), times_d = block;
            for (int64_t i = begin; i < std::min(begin + kBlock, size_); i += kLanes) {
                const Mask mask = first_lanes(size_ - i);
                const Floats d = sub(load_or_zero(delta_ + i, mask), peak);
                const Floats p = load_or_zero(probs_ + i, mask);
                const Floats w = mul(p, exp(mul(s, d)));
                block = add(block, w);
                times_d = fma(w, d, times_d);
            }
            total += sum_of(block), weighted += sum_of(times_d);
        }
        return of(taken, total, weighted);
    }

    // Derivative of sqrt(KL) at s = 0.
    double root_slope() const {
        const double mean = first_ / mass_;
        return share_ * std::sqrt(std::max(0.5 * (second_ / mass_ - mean * mean), 0.0));
    }

   private:
    double of(double scale, double total, double weighted) const {
        if (!(total > kMinTotal)) return std::numeric_limits<double>::infinity();
        return std::max(scale * weighted / total - std::log(total / mass_), 0.0);
    }

    float* probs_;
    const float* delta_;
    int64_t size_;
    float peak_, share_;
    double mass_ = 0, first_ = 0, second_ = 0, total_ = 0, weighted_ = 0, full_ = 0;
};

// Largest scale found in [0, 1] whose divergence is at most `limit`, and that divergence.
void search(const Row& row, double limit, float* scale, float* divergence) {
    const double full = row.full();
    if (full <= limit) {
        *scale = 1.0f, *divergence = (float)full;
        return;
    }
    double low = 0, low_kl = 0, high = 1, high_kl = full;
    const double slope = row.root_slope();
    for (int step = 0; step < (int)(sizeof kAim / sizeof *kAim) && low_kl < kCloseEnough * limit; ++step) {
        const double wanted = std::sqrt(std::max(kAim[step] * limit, 0.0));
        const double low_root = std::sqrt(low_kl), high_root = std::sqrt(high_kl);
        double share = (wanted - low_root) / (high_root - low_root);
        // With the slope at zero known: the curve a s / (1 + c s) through both ends instead of a straight line.
        if (step == 0 && slope > 0) share = wanted / (slope * (1 - wanted / high_root) + wanted);
        share = std::isfinite(share) && std::isfinite(high_root) ? std::min(std::max(share, 0.01), 0.99) : 0.5;
        const float middle = (float)(low + share * (high - low));
        const double kl = row.divergence(middle);
        if (kl <= limit)
            low = middle, low_kl = kl;
        else
            high = middle, high_kl = kl;
    }
    *scale = (float)low, *divergence = (float)low_kl;
}

void move(float* logits, const float* delta, float scale, int64_t size) {
    const Floats s = all(scale);
    for (int64_t i = 0; i < size; i += kLanes) {
        const Mask mask = first_lanes(size - i);
        store(logits + i, mask, fma(s, load_or_zero(delta + i, mask),
                                                                load_or_zero(logits + i, mask)));
    }
}

}  // namespace
}  // namespace recontrol
