// y = x W^T + b for frozen weights of 4 or 8 bits in groups of 32 inputs; x and the products are bfloat16, sums float32.
//
//     4 bits   w = scale * q + least, q in 0..15      (llama.cpp's Q4_1)
//     8 bits   w = scale * q,         q in -127..127  (its Q8_0)
//
// Whole numbers of so few bits are exact in bfloat16, so a group is summed as gemm.cpp sums and scaled once. Panels of
// 32 outputs; in each, for every pair of inputs, 32 pairs of numbers; for every group, 32 scales and (4 bits) leasts in
// float16. Each output element is one chain of sums, whatever the number of rows.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common.h"

namespace recontrol {
namespace {

constexpr int kPanel = 32, kGroup = 32, kGroupPairs = kGroup / 2;
constexpr int kMaxTile = 6;

struct Pair {
    __m512bh low, high;  // outputs 0..15 and 16..31 of the panel
};

struct Int4 {
    static constexpr int64_t kPairBytes = 32, kScales = 2 * kPanel;
    static constexpr bool kHasLeast = true;
    __m512i table;
    Int4() {
        alignas(64) bf16 numbers[32];
        for (int i = 0; i < 32; ++i) {
            const float number = (float)(i % 16);
            uint32_t bits;
            std::memcpy(&bits, &number, sizeof bits);
            numbers[i] = (bf16)(bits >> 16);
        }
        table = _mm512_load_si512(numbers);
    }
    // A byte holds a number of each half. The look-up reads five bits, of which the table ignores the fifth.
    Pair load(const uint8_t* p) const {
        const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        return {(__m512bh)_mm512_permutexvar_epi16(words, table),
                (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table)};
    }
};

struct Int8 {
    static constexpr int64_t kPairBytes = 64, kScales = kPanel;
    static constexpr bool kHasLeast = false;
    static __m512bh numbers(const uint8_t* p) {
        const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
        return _mm512_cvtne2ps_pbh(second, first);
    }
    Pair load(const uint8_t* p) const { return {numbers(p), numbers(p + 32)}; }
};

inline __m512 load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// sums [M][groups] of x over each group, for what the least number of a group adds.
template <class Format, int M>
void tile(const Format& format, const bf16* x, int64_t x_stride, const uint8_t* panel, const uint16_t* scales,
          const float* sums, int64_t groups, __m512 out[][2]) {
    __m512 total[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) total[m][0] = total[m][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
        __m512 acc[M][2];
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
        const uint8_t* numbers = panel + g * kGroupPairs * Format::kPairBytes;
        for (int64_t k = 0; k < kGroupPairs; ++k) {
            _mm_prefetch((const char*)(numbers + k * Format::kPairBytes + 2048), _MM_HINT_T0);
            const Pair w = format.load(numbers + k * Format::kPairBytes);
#pragma GCC unroll 6
            for (int m = 0; m < M; ++m) {
                int32_t pair;
                std::memcpy(&pair, x + m * x_stride + g * kGroup + 2 * k, sizeof pair);
                const __m512bh xs = (__m512bh)_mm512_set1_epi32(pair);
                acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w.low, xs);
                acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w.high, xs);
            }
        }
        const uint16_t* of_group = scales + g * Format::kScales;
        const __m512 scale0 = load_half(of_group), scale1 = load_half(of_group + kLanes);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            total[m][0] = _mm512_fmadd_ps(scale0, acc[m][0], total[m][0]);
            total[m][1] = _mm512_fmadd_ps(scale1, acc[m][1], total[m][1]);
            if constexpr (Format::kHasLeast) {
                const __m512 sum = _mm512_set1_ps(sums[m * groups + g]);
                total[m][0] = _mm512_fmadd_ps(load_half(of_group + kPanel), sum, total[m][0]);
                total[m][1] = _mm512_fmadd_ps(load_half(of_group + kPanel + kLanes), sum, total[m][1]);
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) out[m][0] = total[m][0], out[m][1] = total[m][1];
}

template <class Format>
void linear(const bf16* x, int64_t x_stride, const uint8_t* packed, const uint16_t* scales, const float* bias, void* y,
            int64_t rows, int64_t inputs, int64_t outputs, int out_f32) {
    using Tile = void (*)(const Format&, const bf16*, int64_t, const uint8_t*, const uint16_t*, const float*, int64_t,
                          __m512[][2]);
    constexpr Tile kTiles[kMaxTile + 1] = {nullptr,         tile<Format, 1>, tile<Format, 2>, tile<Format, 3>,
                                           tile<Format, 4>, tile<Format, 5>, tile<Format, 6>};
    const Format format;
    const int64_t panels = (outputs + kPanel - 1) / kPanel, groups = inputs / kGroup;
    const int64_t tiles = (rows + kMaxTile - 1) / kMaxTile;
    std::vector<float> sums(Format::kHasLeast ? rows * groups : 0);
    if constexpr (Format::kHasLeast)
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t g = 0; g < groups; ++g) {
                const bf16* group = x + m * x_stride + g * kGroup;
                sums[m * groups + g] = _mm512_reduce_add_ps(_mm512_add_ps(load_bf16(group), load_bf16(group + kLanes)));
            }
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
        const uint8_t* panel = packed + p * groups * kGroupPairs * Format::kPairBytes;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            __m512 out[kMaxTile][2];
            kTiles[count](format, x + first * x_stride, x_stride, panel, scales + p * groups * Format::kScales,
                          sums.data() + first * groups, groups, out);
            for (int64_t m = 0; m < count; ++m)
                store_panel(out[m], y, (first + m) * outputs, p * kPanel, outputs, bias, out_f32);
        }
    }
}

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// As linear_bf16 (gemm.cpp); inputs must be a multiple of 32. packed [panels, inputs / 2, 32 bytes], scales
// [panels, inputs / 32, 2, 32] float16.
EXPORT void linear_int4(const bf16* x, int64_t x_stride, const uint8_t* packed, const uint16_t* scales,
                        const float* bias, void* y, int64_t rows, int64_t inputs, int64_t outputs, int out_f32) {
    linear<Int4>(x, x_stride, packed, scales, bias, y, rows, inputs, outputs, out_f32);
}

// packed [panels, inputs / 2, 64 bytes], scales [panels, inputs / 32, 32] float16.
EXPORT void linear_int8(const bf16* x, int64_t x_stride, const uint8_t* packed, const uint16_t* scales,
                        const float* bias, void* y, int64_t rows, int64_t inputs, int64_t outputs, int out_f32) {
    linear<Int8>(x, x_stride, packed, scales, bias, y, rows, inputs, outputs, out_f32);
}
