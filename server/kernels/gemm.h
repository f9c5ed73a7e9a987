// What products with packed weights share: panels of 32 outputs, and the writing of their sums.
#pragma once

#include <vector>

#include "simd.h"

namespace recontrol {
namespace {

constexpr int kPanel = 32, kGroup = 32;

// A tile is as many rows, and halves of a panel, as the registers hold sums of.
#ifdef __AVX512F__
constexpr int kMaxTile = 12, kHalves = 2;
#else
constexpr int kMaxTile = 6, kHalves = 1;
#endif

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }
inline int64_t padded(int64_t inputs) { return (inputs + kGroup - 1) / kGroup * kGroup; }

// Inputs as products take them: as they are, or widened once for all outputs.
template <class Input, class Number>
struct Inputs {
    Inputs(const Number* given, int64_t) : numbers(given) {}
    const Input* numbers;
};
template <>
struct Inputs<float, bf16> {
    Inputs(const bf16* given, int64_t size) : wide(size), numbers(wide.data()) {
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) store(wide.data() + i, load_bf16(given + i));
        for (; i < size; ++i) wide[i] = to_float(given[i]);
    }
    std::vector<float> wide;
    const float* numbers;
};

// How products of bfloat16 numbers are summed: pairs at once where there is an instruction for it. Elsewhere the first
// numbers of pairs and then the second ones, of inputs that are widened, so that few registers hold weights and many
// hold sums.
struct PairProducts {
#ifdef __AVX512BF16__
    using Input = bf16;
    using Terms = Pairs;
    static constexpr int kParts = 1;
    static Pairs inputs(const bf16* p, int) { return all_pairs(p); }
    static Floats multiply(Floats sum, Pairs w, Pairs x) { return dot(sum, w, x); }
#else
    using Input = float;
    using Terms = Floats;
    static constexpr int kParts = 2;
    static Floats inputs(const float* p, int part) { return all(p[part]); }
    static Floats multiply(Floats sum, Floats w, Floats x) { return fma(w, x, sum); }
#endif
};

// 16 of a row's outputs from `column` on, with the bias if there is one. y is float32 or bfloat16, `row` its offset.
inline void store_outputs(Floats sums, void* y, int64_t row, int64_t column, int64_t outputs, const float* bias,
                          bool is_f32) {
    if (column >= outputs) return;
    const Mask mask = first_lanes(outputs - column);
    if (bias) sums = add(sums, load_or_zero(bias + column, mask));
    if (is_f32)
        store((float*)y + row + column, mask, sums);
    else
        store_bf16((bf16*)y + row + column, mask, sums);
}

// A panel's outputs of `count` rows from `first` on, of their sums [count, 32].
inline void store_panel(const float* sums, int64_t count, void* y, int64_t first, int64_t panel, int64_t outputs,
                        const float* bias, bool is_f32) {
    for (int64_t m = 0; m < count; ++m)
        for (int h = 0; h < 2; ++h)
            store_outputs(load(sums + m * kPanel + h * kLanes), y, (first + m) * outputs, panel * kPanel + h * kLanes,
                          outputs, bias, is_f32);
}

}  // namespace
}  // namespace recontrol
