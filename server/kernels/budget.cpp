// What an edit costs and does: how far along a change of logits a row may go within a bound on its divergence from where
// it began, and what value heads read of a state.
//
// The search is that of server/control/budget.py, which explains it; here each row does it while its logits are in the
// cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "pool.h"
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

// A shift of states that many rows share, as server/control/shared.py lays it out: linear heads' first layers read
// `weight` [heads, size] . h; `numbers` is the shift's length and the largest entry of `delta` (not a number where the
// shift is not finite), then for each head its bias, its change of value by the shift, and mean and scale of rewards.
struct Shift {
    int64_t heads;
    const float* numbers;
    const float* weight;
    const float* delta;
    const float* tilts;
    float length() const { return numbers[0]; }
    float peak() const { return numbers[1]; }
    const float* each(int64_t head) const { return numbers + 2 + 4 * head; }
};

void widen(const bf16* from, float* to, int64_t size) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(to + i, load_bf16(from + i));
    for (; i < size; ++i) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        std::memcpy(to + i, &bits, sizeof bits);
    }
}

inline Floats widened(const float* p) { return load(p); }
inline Floats widened(const bf16* p) { return load_bf16(p); }

// Readings [heads] of a state, and its length. size a multiple of 16.
template <class T>
float read(const T* hidden, int64_t size, const Shift& shift, float* readings) {
    Floats squares = zeros();
    for (int64_t i = 0; i < size; i += kLanes) squares = fma(widened(hidden + i), widened(hidden + i), squares);
    for (int64_t k = 0; k < shift.heads; ++k) {
        Floats sum = zeros();
        for (int64_t i = 0; i < size; i += kLanes)
            sum = fma(widened(hidden + i), load(shift.weight + k * size + i), sum);
        readings[k] = shift.each(k)[0] + sum_of(sum);
    }
    return std::sqrt(sum_of(squares));
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

using namespace recontrol;

// For rows r of logits [num_rows, vocabulary]: scales[r] in [0, 1] and divergences[r], within limits[r], of moving by
// scales[r] * delta, delta [num_rows, vocabulary].
EXPORT int largest_scales_f32(int64_t threads, const float* logits, int64_t vocabulary, int64_t num_rows,
                              const float* delta, const float* limits, float* scales, float* divergences) {
    return called(threads, [&] {
        share(num_rows, [&](Pieces& pieces) {
            const std::unique_ptr<float[]> probs(new float[vocabulary]);
            for (const int64_t r : pieces) {
                const float* change = delta + r * vocabulary;
                const Row row(logits + r * vocabulary, change, largest(change, vocabulary), 1.0f, nullptr, vocabulary,
                              probs.get());
                search(row, limits[r], scales + r, divergences + r);
            }
        });
    });
}

// Edits rows[r] of logits [.., vocabulary] by the shift shifts[shift_of[r]], for r < num_edited, as far as it is within
// caps[r] of the length of the row's state in hidden [.., size], and limits[r] allows. Where there is a `source`, in
// bfloat16 with rows source_stride apart, each row of logits is first made of that; this is all that is done for rows
// from num_edited on. taken[r] is what was taken of the shift. report [num_edited, width]: a
// head's values before, values after, divergence, length of the shift relative to the state, what held it (`held_by_kl`,
// `held_by_cap` or 0), and whether it was not finite.
EXPORT int edit_shared(int64_t threads, const void* hidden, int is_f32, int64_t size, const bf16* source,
                       int64_t source_stride, float* logits, int64_t vocabulary, const Shift* shifts,
                       const int64_t* shift_of, const int64_t* rows, int64_t num_rows, int64_t num_edited,
                       const float* caps, const float* limits, float* taken, float* report, int64_t width,
                       float held_by_kl, float held_by_cap) {
    return called(threads, [&] {
        share(num_rows, [&](Pieces& pieces) {
            const std::unique_ptr<float[]> probs(new float[vocabulary]);
            for (const int64_t r : pieces) {
                float* row_logits = logits + rows[r] * vocabulary;
                if (source) widen(source + rows[r] * source_stride, row_logits, vocabulary);
                if (r >= num_edited) continue;
                const Shift& shift = shifts[shift_of[r]];
                float *before = report + r * width, *after = before + shift.heads, *rest = after + shift.heads;
                const float length = is_f32 ? read((const float*)hidden + rows[r] * size, size, shift, before)
                                            : read((const bf16*)hidden + rows[r] * size, size, shift, before);
                const float ratio = shift.length() / length;
                bool is_finite = std::isfinite(ratio) && std::isfinite(shift.peak());
                for (int64_t k = 0; k < shift.heads; ++k) is_finite &= std::isfinite(before[k]);
                const float share = ratio > caps[r] ? caps[r] / ratio : 1.0f;
                float scale = 0, divergence = 0;
                if (is_finite) {
                    const Row row(row_logits, shift.delta, shift.peak(), share, shift.tilts, vocabulary,
                                  probs.get());
                    search(row, limits[r], &scale, &divergence);
                    if (scale * share * ratio > 0) move(row_logits, shift.delta, scale * share, vocabulary);
                }
                taken[r] = scale * share;
                for (int64_t k = 0; k < shift.heads; ++k) {
                    const float *head = shift.each(k), unit = before[k];
                    before[k] = head[2] + head[3] * unit;
                    after[k] = taken[r] > 0 ? head[2] + head[3] * (unit + taken[r] * head[1]) : before[k];
                }
                // No shift, no divergence: what is left of it would be rounding.
                rest[0] = ratio * share > 0 && is_finite ? divergence : 0.0f;
                rest[1] = is_finite ? ratio * taken[r] : 0.0f;
                rest[2] = !is_finite ? 0.0f : scale < 1 ? held_by_kl : share < 1 ? held_by_cap : 0.0f;
                rest[3] = is_finite ? 0.0f : 1.0f;
            }
        });
    });
}
