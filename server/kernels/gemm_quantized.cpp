// y = x W^T + b for frozen weights of 4 or 8 bits in groups of 32 inputs; x and the products are bfloat16, sums float32.
//
//     4 bits   w = scale * q + least, q in 0..15      (llama.cpp's Q4_1)
//     8 bits   w = scale * q,         q in -127..127  (its Q8_0)
//
// Whole numbers of so few bits are exact in bfloat16, so a group is summed as gemm.h sums and scaled once. Panels of
// 32 outputs; in each, for every pair of inputs, 32 pairs of numbers; for every group, 32 scales and (4 bits) leasts in
// float16. Each output element is one chain of sums, whatever the number of rows.
#include <vector>

#include "gemm.h"

namespace recontrol {
namespace {

constexpr int kGroupPairs = kGroup / 2;
// Two sums an output: of the group, and of all.
constexpr int kMaxQuantizedTile = kMaxTile / 2;

struct Int4 {
    static constexpr int64_t kPairBytes = 32, kScales = 2 * kPanel;
    static constexpr bool kHasLeast = true;
    // A byte holds a number of each half.
    static Pairs weights(const uint8_t* p, int half) {
        Pairs low, high;
        load_int4_pairs(p, low, high);
        return half ? high : low;
    }
};

struct Int8 {
    static constexpr int64_t kPairBytes = 64, kScales = kPanel;
    static constexpr bool kHasLeast = false;
    static Pairs weights(const uint8_t* p, int half) { return load_int8_pairs(p + half * kPairBytes / 2); }
};

// For the halves of a panel from `first_half` on. sums [M][groups] of x over each group, for what the least number of a
// group adds.
template <class Format, int M>
void quantized_tile(const bf16* x, int64_t x_stride, const uint8_t* panel, const uint16_t* scales, const float* sums,
                    int64_t groups, int first_half, Floats out[][kHalves]) {
    Floats total[M][kHalves];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < kHalves; ++h) total[m][h] = zeros();
    for (int64_t g = 0; g < groups; ++g) {
        Floats acc[M][kHalves];
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < kHalves; ++h) acc[m][h] = zeros();
        const uint8_t* numbers = panel + g * kGroupPairs * Format::kPairBytes;
        for (int64_t k = 0; k < kGroupPairs; ++k) {
            _mm_prefetch((const char*)(numbers + k * Format::kPairBytes + 2048), _MM_HINT_T0);
            Pairs weights[kHalves];
            for (int h = 0; h < kHalves; ++h)
                weights[h] = Format::weights(numbers + k * Format::kPairBytes, first_half + h);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                const Pairs xs = all_pairs(x + m * x_stride + g * kGroup + 2 * k);
                for (int h = 0; h < kHalves; ++h) acc[m][h] = dot(acc[m][h], weights[h], xs);
            }
        }
        for (int h = 0; h < kHalves; ++h) {
            const uint16_t* of_half = scales + g * Format::kScales + (first_half + h) * kLanes;
            const Floats scale = load_half(of_half);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                total[m][h] = fma(scale, acc[m][h], total[m][h]);
                if constexpr (Format::kHasLeast)
                    total[m][h] = fma(load_half(of_half + kPanel), all(sums[m * groups + g]), total[m][h]);
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < kHalves; ++h) out[m][h] = total[m][h];
}

template <class Format>
void quantized(const bf16* x, const uint8_t* packed, const uint16_t* scales, const float* bias, void* y, int64_t rows,
               int64_t inputs, int64_t outputs, bool is_f32) {
    using Tile = void (*)(const bf16*, int64_t, const uint8_t*, const uint16_t*, const float*, int64_t, int,
                          Floats[][kHalves]);
    static constexpr Tile kTiles[] = {
        nullptr, quantized_tile<Format, 1>, quantized_tile<Format, 2>,
#ifdef __AVX512F__
        quantized_tile<Format, 3>, quantized_tile<Format, 4>, quantized_tile<Format, 5>, quantized_tile<Format, 6>,
#endif
    };
    const int64_t panels = panels_of(outputs), groups = inputs / kGroup;
    const int64_t tiles = (rows + kMaxQuantizedTile - 1) / kMaxQuantizedTile;
    std::vector<float> sums(Format::kHasLeast ? rows * groups : 0);
    if constexpr (Format::kHasLeast)
        for (int64_t i = 0; i < rows * groups; ++i) {
            const bf16* group = x + i * kGroup;
            sums[i] = sum_of(add(load_bf16(group), load_bf16(group + kLanes)));
        }
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
        const uint8_t* panel = packed + p * groups * kGroupPairs * Format::kPairBytes;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            for (int half = 0; half < 2; half += kHalves) {
                Floats out[kMaxQuantizedTile][kHalves];
                kTiles[count](x + first * inputs, inputs, panel, scales + p * groups * Format::kScales,
                              sums.data() + first * groups, groups, half, out);
                for (int64_t m = 0; m < count; ++m)
                    for (int h = 0; h < kHalves; ++h)
                        store_outputs(out[m][h], y, (first + m) * outputs, p * kPanel + (half + h) * kLanes, outputs,
                                      bias, is_f32);
            }
        }
    }
}

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// As linear_bf16 (gemm.h); inputs must be a multiple of 32. packed [panels, inputs / 2, 32 bytes], scales
// [panels, inputs / 32, 2, 32] float16.
EXPORT void linear_int4(const bf16* x, const uint8_t* packed, const uint16_t* scales, const float* bias, void* y,
                        int64_t rows, int64_t inputs, int64_t outputs, int out_f32) {
    quantized<Int4>(x, packed, scales, bias, y, rows, inputs, outputs, out_f32);
}

// packed [panels, inputs / 2, 64 bytes], scales [panels, inputs / 32, 32] float16.
EXPORT void linear_int8(const bf16* x, const uint8_t* packed, const uint16_t* scales, const float* bias, void* y,
                        int64_t rows, int64_t inputs, int64_t outputs, int out_f32) {
    quantized<Int8>(x, packed, scales, bias, y, rows, inputs, outputs, out_f32);
}
