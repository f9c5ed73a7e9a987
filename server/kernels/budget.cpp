// What an edit costs and does: how far along a change of logits a row may go within a bound on its divergence from where
// it began, and what value heads read of a state.
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

constexpr int64_t kBlock = 1024;  // summed in float32, blocks in float64

// One row: base logits l, kept as p = exp(l - max(l)) in `probs`, and a change d, less its largest entry.
class Row {
   public:
    // `tilts` holds exp(d) if it is known: then the divergence of the whole change comes from the same pass.
    Row(const float* logits, const float* delta, float largest_delta, const float* tilts, int64_t size, float* probs)
        : probs_(probs), delta_(delta), size_(size), peak_(largest_delta) {
        const __m512 top = _mm512_set1_ps(largest(logits, size)), peak = _mm512_set1_ps(peak_);
        for (int64_t begin = 0; begin < size; begin += kBlock) {
            __m512 mass = _mm512_setzero_ps(), total = mass, weighted = mass;
            for (int64_t i = begin; i < std::min(begin + kBlock, size); i += kLanes) {
                const __mmask16 mask = lanes_left(size - i);
                const __m512 lowered = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, logits + i), top);
                const __m512 p = _mm512_maskz_mov_ps(mask, exp_ps(lowered));
                _mm512_mask_storeu_ps(probs + i, mask, p);
                mass = _mm512_add_ps(mass, p);
                if (tilts) {
                    const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, delta + i), peak);
                    const __m512 w = _mm512_mul_ps(p, _mm512_maskz_loadu_ps(mask, tilts + i));
                    total = _mm512_add_ps(total, w);
                    weighted = _mm512_fmadd_ps(w, d, weighted);
                }
            }
            mass_ += _mm512_reduce_add_ps(mass);
            if (tilts) total_ += _mm512_reduce_add_ps(total), weighted_ += _mm512_reduce_add_ps(weighted);
        }
        full_ = tilts ? of(1.0, total_, weighted_) : divergence(1.0f);
    }

    // KL(softmax(l + d) || softmax(l)).
    double full() const { return full_; }

    // KL(softmax(l + s d) || softmax(l)); not a number where it cannot be told, which is never within a bound.
    double divergence(float scale) const {
        const __m512 peak = _mm512_set1_ps(peak_), s = _mm512_set1_ps(scale);
        double total = 0, weighted = 0;
        for (int64_t begin = 0; begin < size_; begin += kBlock) {
            __m512 block = _mm512_setzero_ps(), times_d = block;
            for (int64_t i = begin; i < std::min(begin + kBlock, size_); i += kLanes) {
                const __mmask16 mask = lanes_left(size_ - i);
                const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, delta_ + i), peak);
                const __m512 p = _mm512_maskz_loadu_ps(mask, probs_ + i);
                const __m512 w = _mm512_mul_ps(p, exp_ps(_mm512_mul_ps(s, d)));
                block = _mm512_add_ps(block, w);
                times_d = _mm512_fmadd_ps(w, d, times_d);
            }
            total += _mm512_reduce_add_ps(block), weighted += _mm512_reduce_add_ps(times_d);
        }
        return of(scale, total, weighted);
    }

    // Derivative of sqrt(KL) at s = 0.
    double root_slope() const {
        double first = 0, second = 0;
        for (int64_t begin = 0; begin < size_; begin += kBlock) {
            __m512 one = _mm512_setzero_ps(), two = one;
            for (int64_t i = begin; i < std::min(begin + kBlock, size_); i += kLanes) {
                const __mmask16 mask = lanes_left(size_ - i);
                const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, delta_ + i), _mm512_set1_ps(peak_));
                const __m512 pd = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, probs_ + i), d);
                one = _mm512_add_ps(one, pd);
                two = _mm512_fmadd_ps(pd, d, two);
            }
            first += _mm512_reduce_add_ps(one), second += _mm512_reduce_add_ps(two);
        }
        const double mean = first / mass_;
        return std::sqrt(std::max(0.5 * (second / mass_ - mean * mean), 0.0));
    }

   private:
    double of(double scale, double total, double weighted) const {
        if (!(total > kMinTotal)) return std::numeric_limits<double>::infinity();
        return std::max(scale * weighted / total - std::log(total / mass_), 0.0);
    }

    float* probs_;
    const float* delta_;
    int64_t size_;
    float peak_;
    double mass_ = 0, total_ = 0, weighted_ = 0, full_ = 0;
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

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// For edited rows r of logits [.., vocabulary], rows[r] being their places: scales[r] in [0, 1] and divergences[r] of
// moving by scales[r] * shares[r] * delta, delta of the row's own or, with a delta_stride of 0, shared. For a shared one
// `tilts` may hold exp(delta - max(delta)), or null. `apply` moves the logits. scratch [threads, 2, vocabulary].
EXPORT void scale_within_budget_f32(float* logits, int64_t vocabulary, const int64_t* rows, int64_t num_rows,
                                    const float* delta, int64_t delta_stride, const float* tilts, const float* shares,
                                    const float* limits, float* scales, float* divergences, float* scratch, int apply) {
    const bool is_shared = delta_stride == 0;
    const float shared_peak = is_shared ? largest(delta, vocabulary) : 0;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t r = 0; r < num_rows; ++r) {
        float* row_logits = logits + rows[r] * vocabulary;
        const float* change = delta + r * delta_stride;
        float* probs = scratch + omp_get_thread_num() * 2 * vocabulary;
        const bool is_whole = shares[r] == 1.0f;
        if (!is_whole) {
            float* taken = probs + vocabulary;
            for (int64_t i = 0; i < vocabulary; ++i) taken[i] = shares[r] * change[i];
            change = taken;
        }
        const float peak = is_shared && is_whole ? shared_peak : largest(change, vocabulary);
        const Row row(row_logits, change, peak, is_whole ? tilts : nullptr, vocabulary, probs);
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

// Readings [num_rows, units] of heads' first layers and lengths [num_rows] of states, for rows rows[r] of hidden
// [.., size]: weight [units, size] . h + bias. size a multiple of 16.
EXPORT void read_rows_bf16(const bf16* hidden, int64_t size, const int64_t* rows, int64_t num_rows, const float* weight,
                           const float* bias, int64_t units, float* readings, float* lengths) {
    for (int64_t r = 0; r < num_rows; ++r) {
        const bf16* row = hidden + rows[r] * size;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += kLanes) {
            const __m512 h = load_bf16(row + i);
            squares = _mm512_fmadd_ps(h, h, squares);
        }
        lengths[r] = std::sqrt(_mm512_reduce_add_ps(squares));
        for (int64_t u = 0; u < units; ++u) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < size; i += kLanes)
                sum = _mm512_fmadd_ps(load_bf16(row + i), _mm512_loadu_ps(weight + u * size + i), sum);
            readings[r * units + u] = bias[u] + _mm512_reduce_add_ps(sum);
        }
    }
}
