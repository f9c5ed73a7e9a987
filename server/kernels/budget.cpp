// How far along a change of logits a row may go within a bound on its divergence from where it began.
//
// The search is that of server/control/budget.py, which explains it; here each row does it while its logits are in the
// cache.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"

namespace recontrol {
namespace {

constexpr double kMinTotal = 1e-30;
constexpr double kAim[] = {0.985, 0.985, 0.985, 0.98, 0.95, 0.9, 0.7, 0.5};
constexpr double kCloseEnough = 0.97;

float largest(const float* x, int64_t size) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < size; i += kLanes) {
        const __m512 v = _mm512_mask_loadu_ps(top, lanes_left(size - i), x + i);
        top = _mm512_max_ps(top, v);
    }
    return _mm512_reduce_max_ps(top);
}

// One row: base logits l and a change d, less its largest entry.
class Row {
   public:
    Row(const float* logits, const float* delta, int64_t size)
        : logits_(logits), delta_(delta), size_(size), top_(largest(logits, size)), peak_(largest(delta, size)) {}

    // KL(softmax(l + s d) || softmax(l)); not a number where it cannot be told, which is never within a bound.
    double divergence(float scale) {
        const Sums sums = over(scale, scale == 1.0f && mass_ == 0);
        if (mass_ == 0) mass_ = sums.mass, first_ = sums.first, second_ = sums.second;
        if (!(sums.total > kMinTotal)) return std::numeric_limits<double>::infinity();
        return std::max(scale * sums.weighted / sums.total - std::log(sums.total / mass_), 0.0);
    }

    // Derivative of sqrt(KL) at s = 0. After the first call of `divergence`.
    double root_slope() const {
        const double mean = first_ / mass_;
        return std::sqrt(std::max(0.5 * (second_ / mass_ - mean * mean), 0.0));
    }

   private:
    struct Sums {
        double total = 0, weighted = 0, mass = 0, first = 0, second = 0;
    };

    Sums over(float scale, bool with_moments) const {
        constexpr int64_t kBlock = 1024;
        const __m512 top = _mm512_set1_ps(top_), peak = _mm512_set1_ps(peak_), s = _mm512_set1_ps(scale);
        Sums sums;
        for (int64_t begin = 0; begin < size_; begin += kBlock) {
            __m512 total = _mm512_setzero_ps(), weighted = total, mass = total, first = total, second = total;
            for (int64_t i = begin; i < std::min(begin + kBlock, size_); i += kLanes) {
                const __mmask16 mask = lanes_left(size_ - i);
                const __m512 l = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, logits_ + i), top);
                const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, delta_ + i), peak);
                const __m512 w = _mm512_maskz_mov_ps(mask, exp_ps(_mm512_fmadd_ps(s, d, l)));
                total = _mm512_add_ps(total, w);
                weighted = _mm512_fmadd_ps(w, d, weighted);
                if (with_moments) {
                    const __m512 p = _mm512_maskz_mov_ps(mask, exp_ps(l)), pd = _mm512_mul_ps(p, d);
                    mass = _mm512_add_ps(mass, p);
                    first = _mm512_add_ps(first, pd);
                    second = _mm512_fmadd_ps(pd, d, second);
                }
            }
            sums.total += _mm512_reduce_add_ps(total);
            sums.weighted += _mm512_reduce_add_ps(weighted);
            if (with_moments) {
                sums.mass += _mm512_reduce_add_ps(mass);
                sums.first += _mm512_reduce_add_ps(first);
                sums.second += _mm512_reduce_add_ps(second);
            }
        }
        return sums;
    }

    const float *logits_, *delta_;
    int64_t size_;
    float top_, peak_;
    double mass_ = 0, first_ = 0, second_ = 0;
};

// Largest scale found in [0, 1] whose divergence is at most `limit`, and that divergence.
void search(Row& row, double limit, float* scale, float* divergence) {
    const double full = row.divergence(1.0f);
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

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// For edited rows r of logits [.., vocabulary], rows[r] being their places: scales[r] in [0, 1] and divergences[r] of
// moving by scales[r] * shares[r] * delta, delta of the row's own or, with a delta_stride of 0, shared. `apply` moves
// the logits. `scratch` [threads, vocabulary] holds the part of a shared change that a row takes.
EXPORT void scale_within_budget_f32(float* logits, int64_t vocabulary, const int64_t* rows, int64_t num_rows,
                                    const float* delta, int64_t delta_stride, const float* shares, const float* limits,
                                    float* scales, float* divergences, float* scratch, int apply) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t r = 0; r < num_rows; ++r) {
        float* row_logits = logits + rows[r] * vocabulary;
        const float* change = delta + r * delta_stride;
        if (shares[r] != 1.0f) {
            float* taken = scratch + omp_get_thread_num() * vocabulary;
            for (int64_t i = 0; i < vocabulary; ++i) taken[i] = shares[r] * change[i];
            change = taken;
        }
        Row row(row_logits, change, vocabulary);
        search(row, limits[r], scales + r, divergences + r);
        if (!apply || scales[r] == 0) continue;
        const __m512 scale = _mm512_set1_ps(scales[r]);
        for (int64_t i = 0; i < vocabulary; i += kLanes) {
            const __mmask16 mask = lanes_left(vocabulary - i);
            const __m512 moved = _mm512_fmadd_ps(scale, _mm512_maskz_loadu_ps(mask, change + i),
                                                 _mm512_maskz_loadu_ps(mask, row_logits + i));
            _mm512_mask_storeu_ps(row_logits + i, mask, moved);
        }
    }
}
