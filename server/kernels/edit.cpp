// Whole edits of heads whose ascents are straight: what they read of a state, the change of its logits, how far that may
// go, and going there, each row while its logits are in the cache.
#include <cstring>
#include <memory>

#include "budget.h"
#include "pool.h"

namespace recontrol {
namespace {

// What many rows share of an edit, as server/control/shared.py lays it out. Heads read `weight` [units, size] . h, and
// the first unit of each is its value. The shift is sum_u c[u] * ascent[u], c[u] the factor of the unit times, for those
// behind a head's first, what it reads, cut to `bound`. Where no head has more than one, it is one for all states.
struct Shift {
    int64_t heads, units;
    const float* numbers;  // [length, largest change, bound], [units, 2], [heads, 3], [heads, units]
    const float* weight;   // [units, size]
    // Of a shift that is one for all states: the change of the logits, and exp(change - largest).
    const float* delta;
    const float* tilts;
    // Of one that follows the state: what ascent rows are, [units, size], and what each does to the logits.
    const float* ascent;
    const float* const* row_logits;

    bool follows_state() const { return row_logits; }
    float length() const { return numbers[0]; }
    float peak() const { return numbers[1]; }
    float bound() const { return numbers[2]; }
    float bias(int64_t unit) const { return numbers[3 + 2 * unit]; }
    float factor(int64_t unit) const { return numbers[3 + 2 * unit + 1]; }
    const float* head(int64_t k) const { return numbers + 3 + 2 * units + 3 * k; }
    int64_t first_unit(int64_t k) const { return (int64_t)head(k)[0]; }
    float reward(int64_t k, float value) const { return head(k)[1] + head(k)[2] * value; }
    // The change of a head's value by the whole shift.
    float climb(int64_t k, const float* coefficients) const {
        const float* each = numbers + 3 + 2 * units + 3 * heads + k * units;
        float sum = 0;
        for (int64_t u = 0; u < units; ++u) sum += each[u] * coefficients[u];
        return sum;
    }
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

// Readings [units] of a state, and its length. size a multiple of 16.
template <class T>
float read(const T* hidden, int64_t size, const Shift& shift, float* readings) {
    Floats squares = zeros();
    for (int64_t i = 0; i < size; i += kLanes) squares = fma(widened(hidden + i), widened(hidden + i), squares);
    for (int64_t u = 0; u < shift.units; ++u) {
        Floats sum = zeros();
        for (int64_t i = 0; i < size; i += kLanes)
            sum = fma(widened(hidden + i), load(shift.weight + u * size + i), sum);
        readings[u] = shift.bias(u) + sum_of(sum);
    }
    return std::sqrt(sum_of(squares));
}

// sum_u coefficients[u] * row(u)[0..size).
template <class Rows>
void combine(const float* coefficients, int64_t units, const Rows& row, int64_t size, float* sum) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
        Floats total[4] = {zeros(), zeros(), zeros(), zeros()};
        for (int64_t u = 0; u < units; ++u) {
            const Floats c = all(coefficients[u]);
            const float* from = row(u) + i;
            for (int j = 0; j < 4; ++j) total[j] = fma(c, load(from + j * kLanes), total[j]);
        }
        for (int j = 0; j < 4; ++j) store(sum + i + j * kLanes, total[j]);
    }
    for (; i < size; i += kLanes) {
        const Mask mask = first_lanes(size - i);
        Floats total = zeros();
        for (int64_t u = 0; u < units; ++u) total = fma(all(coefficients[u]), load_or_zero(row(u) + i, mask), total);
        store(sum + i, mask, total);
    }
}

float length_of(const float* x, int64_t size) {
    Floats squares = zeros();
    for (int64_t i = 0; i < size; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    return std::sqrt(sum_of(squares));
}

// A shift at one state.
struct Change {
    const float* delta;
    const float* tilts;  // or null
    float peak, length;
};

// What a thread works in.
struct Scratch {
    const int64_t vocabulary, size;
    std::unique_ptr<float[]> numbers;
    float *probs, *delta, *moved, *readings, *coefficients;

    Scratch(int64_t vocabulary, int64_t size, int64_t units)
        : vocabulary(vocabulary), size(size), numbers(new float[2 * vocabulary + size + 2 * units]),
          probs(numbers.get()), delta(probs + vocabulary), moved(delta + vocabulary), readings(moved + size),
          coefficients(readings + units) {}

    // The change by a shift at the state that was read.
    Change of(const Shift& shift) {
        for (int64_t u = 0; u < shift.units; ++u) {
            const float feature = std::min(std::max(readings[u], -shift.bound()), shift.bound());
            coefficients[u] = shift.factor(u) * feature;
        }
        for (int64_t k = 0; k < shift.heads; ++k) coefficients[shift.first_unit(k)] = shift.factor(shift.first_unit(k));
        if (!shift.follows_state()) return {shift.delta, shift.tilts, shift.peak(), shift.length()};
        combine(coefficients, shift.units, [&](int64_t u) { return shift.ascent + u * size; }, size, moved);
        combine(coefficients, shift.units, [&](int64_t u) { return shift.row_logits[u]; }, vocabulary, delta);
        return {delta, nullptr, largest_if_finite(delta, vocabulary), length_of(moved, size)};
    }
};

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// Edits rows[r] of logits [.., vocabulary] by the shift shifts[shift_of[r]], for r < num_edited, as far as it is within
// caps[r] of the length of the row's state in hidden [.., size], and limits[r] allows. Where there is a `source`, in
// bfloat16 with rows source_stride apart, each row of logits is first made of that; this is all that is done for rows
// from num_edited on. No shift has more than max_units. taken[r] is what was taken of the shift. report
// [num_edited, width]: a head's values before, values after, divergence, length of the shift relative to the state, what
// held it (`held_by_kl`, `held_by_cap` or 0), and whether it was not finite.
EXPORT int edit_shared(int64_t threads, const void* hidden, int is_f32, int64_t size, const bf16* source,
                       int64_t source_stride, float* logits, int64_t vocabulary, const Shift* shifts,
                       int64_t max_units, const int64_t* shift_of, const int64_t* rows, int64_t num_rows,
                       int64_t num_edited, const float* caps, const float* limits, float* taken, float* report,
                       int64_t width, float held_by_kl, float held_by_cap) {
    return called(threads, [&] {
        share(num_rows, [&](Pieces& pieces) {
            Scratch scratch(vocabulary, size, max_units);
            const float *readings = scratch.readings, *coefficients = scratch.coefficients;
            for (const int64_t r : pieces) {
                float* row_logits = logits + rows[r] * vocabulary;
                if (source) widen(source + rows[r] * source_stride, row_logits, vocabulary);
                if (r >= num_edited) continue;
                const Shift& shift = shifts[shift_of[r]];
                const float length = is_f32
                                         ? read((const float*)hidden + rows[r] * size, size, shift, scratch.readings)
                                         : read((const bf16*)hidden + rows[r] * size, size, shift, scratch.readings);
                const Change change = scratch.of(shift);
                const float ratio = change.length / length;
                float *before = report + r * width, *after = before + shift.heads, *rest = after + shift.heads;
                bool is_finite = std::isfinite(ratio) && std::isfinite(change.peak);
                for (int64_t u = 0; u < shift.units; ++u) is_finite &= std::isfinite(readings[u]);
                for (int64_t k = 0; k < shift.heads; ++k) {
                    before[k] = readings[shift.first_unit(k)];
                    after[k] = shift.climb(k, coefficients);
                    is_finite &= std::isfinite(after[k]);
                }
                const float share = ratio > caps[r] ? caps[r] / ratio : 1.0f;
                float scale = 0, divergence = 0;
                if (is_finite) {
                    const Row row(row_logits, change.delta, change.peak, share, change.tilts, vocabulary,
                                  scratch.probs);
                    search(row, limits[r], &scale, &divergence);
                    if (scale * share * ratio > 0) move(row_logits, change.delta, scale * share, vocabulary);
                }
                taken[r] = scale * share;
                for (int64_t k = 0; k < shift.heads; ++k) {
                    after[k] = shift.reward(k, taken[r] > 0 ? before[k] + taken[r] * after[k] : before[k]);
                    before[k] = shift.reward(k, before[k]);
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

// Moves rows[r] of logits [.., vocabulary], rows `stride` apart, by scales[r] * sum_u coefficients[r, u] * row_logits[u],
// each of `units` row_logits [vocabulary], with scales[r] in [0, 1] and divergences[r] within limits[r]; finite[r] is 0
// for a change that is not finite, which is not taken.
EXPORT int edit_straight_f32(int64_t threads, float* logits, int64_t stride, int64_t vocabulary, const int64_t* rows,
                             int64_t num_rows, const float* coefficients, int64_t units,
                             const float* const* row_logits, const float* limits, float* scales, float* divergences,
                             uint8_t* finite) {
    return called(threads, [&] {
        share(num_rows, [&](Pieces& pieces) {
            const std::unique_ptr<float[]> scratch(new float[2 * vocabulary]);
            float *probs = scratch.get(), *change = probs + vocabulary;
            for (const int64_t r : pieces) {
                const float* taken = coefficients + r * units;
                finite[r] = 1, scales[r] = limits[r] >= 0, divergences[r] = 0;
                if (std::all_of(taken, taken + units, [](float c) { return c == 0; })) continue;
                combine(taken, units, [&](int64_t u) { return row_logits[u]; }, vocabulary, change);
                const float peak = largest_if_finite(change, vocabulary);
                finite[r] = !std::isnan(peak), scales[r] = 0;
                if (!finite[r]) continue;
                float* moved = logits + rows[r] * stride;
                const Row row(moved, change, peak, 1.0f, nullptr, vocabulary, probs);
                search(row, limits[r], scales + r, divergences + r);
                if (scales[r] > 0) move(moved, change, scales[r], vocabulary);
            }
        });
    });
}

// sums[r] = sum_u coefficients[r, u] * rows[u], each of `units` rows [size].
EXPORT int combine_rows_f32(int64_t threads, const float* coefficients, int64_t num_rows, int64_t units,
                            const float* const* rows, int64_t size, float* sums) {
    return called(threads, [&] {
        share(num_rows, [&](Pieces& pieces) {
            for (const int64_t r : pieces)
                combine(coefficients + r * units, units, [&](int64_t u) { return rows[u]; }, size, sums + r * size);
        });
    });
}
