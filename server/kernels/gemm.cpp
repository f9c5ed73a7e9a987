// y = x W^T + b for frozen bfloat16 weights, packed once.
//
// Packed layout: panels of 32 outputs; in each, for every pair of inputs, 32 pairs of weights. Each output element is
// one chain of fused products over the inputs in order, whatever the number of rows.
#include <cstring>

#include "common.h"

namespace recontrol {
namespace {

constexpr int kPanel = 32;
constexpr int kMaxTile = 12;

template <int M>
void tile(const bf16* x, int64_t x_stride, const bf16* panel, int64_t pairs, __m512 out[][2]) {
    __m512 acc[M][2];
    // Unrolled, so that the accumulators are registers and nothing else.
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; ++k) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel);
        const __m512bh w1 = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel + 2 * kLanes);
        _mm_prefetch((const char*)(panel + (k + 16) * 2 * kPanel), _MM_HINT_T0);
        _mm_prefetch((const char*)(panel + (k + 16) * 2 * kPanel + 2 * kLanes), _MM_HINT_T0);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
            int32_t pair;
            std::memcpy(&pair, x + m * x_stride + 2 * k, sizeof pair);
            const __m512bh xs = (__m512bh)_mm512_set1_epi32(pair);
            acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, xs);
            acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, xs);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) out[m][0] = acc[m][0], out[m][1] = acc[m][1];
}

using Tile = void (*)(const bf16*, int64_t, const bf16*, int64_t, __m512[][2]);
constexpr Tile kTiles[kMaxTile + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>,  tile<6>,
                                       tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// weight [outputs, inputs] -> packed [ceil(outputs / 32), inputs / 2, 32, 2]; inputs must be even.
EXPORT void pack_bf16(const bf16* weight, int64_t outputs, int64_t inputs, bf16* packed) {
    const int64_t panels = (outputs + kPanel - 1) / kPanel;
#pragma omp parallel for
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t k = 0; k < inputs; k += 2)
            for (int64_t n = 0; n < kPanel; ++n) {
                const int64_t row = p * kPanel + n;
                bf16* target = packed + ((p * inputs / 2 + k / 2) * kPanel + n) * 2;
                target[0] = row < outputs ? weight[row * inputs + k] : 0;
                target[1] = row < outputs ? weight[row * inputs + k + 1] : 0;
            }
}

// y [rows, outputs] in float32 if out_f32, else bfloat16; bias [outputs] float32 or null. Rows of x are x_stride apart.
EXPORT void linear_bf16(const bf16* x, int64_t x_stride, const bf16* packed, const float* bias, void* y, int64_t rows,
                        int64_t inputs, int64_t outputs, int out_f32) {
    const int64_t panels = (outputs + kPanel - 1) / kPanel, pairs = inputs / 2;
    const int64_t tiles = (rows + kMaxTile - 1) / kMaxTile;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
        const bf16* panel = packed + p * pairs * kPanel * 2;
        for (int64_t t = 0; t < tiles; ++t) {
            // Tiles of nearly equal size.
            const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            __m512 out[kMaxTile][2];
            kTiles[count](x + first * x_stride, x_stride, panel, pairs, out);
            for (int64_t m = 0; m < count; ++m)
                store_panel(out[m], y, (first + m) * outputs, p * kPanel, outputs, bias, out_f32);
        }
    }
}
