// y = x W^T + b for frozen weights, packed once: float32 for float32, bfloat16 for bfloat16.
//
// Packed layout: panels of 32 outputs. float32: in each panel, for every input, 32 weights. bfloat16: for every pair of
// inputs, 32 pairs of weights, the number of inputs padded with zeros to a multiple of 32, so that AMX's tiles (amx.h)
// read the same layout. Each output element is one chain of fused products over the inputs in order, whatever the
// number of rows.
#include "amx.h"
#include "gemm.h"
#include "pool.h"

namespace recontrol {
namespace {

// A format's weights are multiplied in `kParts`, one after the other, each with its own inputs of a step.
struct Float32 {
    using Number = float;
    using Input = float;
    static constexpr int kStep = 1, kParts = 1;
    static int64_t panel_size(int64_t inputs) { return inputs * kPanel; }
    static Floats weights(const float* p, int) { return load(p); }
    static Floats inputs(const float* p, int) { return all(*p); }
    static Floats last_inputs(const float* p, int) { return all(*p); }
    static Floats multiply(Floats sum, Floats w, Floats x) { return fma(w, x, sum); }
};

struct Bfloat16 : PairProducts {
    using Number = bf16;
    static constexpr int kStep = 2;
    static int64_t panel_size(int64_t inputs) { return padded(inputs) * kPanel; }
#ifdef __AVX512BF16__
    static Pairs weights(const bf16* p, int) { return load_pairs(p); }
    static Pairs last_inputs(const bf16* p, int) { return all_pairs((int32_t)*p); }
#else
    static Floats weights(const bf16* p, int part) { return part ? load_odd(p) : load_even(p); }
    static Floats last_inputs(const float* p, int part) { return part ? zeros() : all(*p); }
#endif
};

// Sums [M][kHalves] over all inputs of M rows, for the halves of a panel that begin at `panel`.
template <class Format, int M>
void tile(const typename Format::Input* x, int64_t x_stride, const typename Format::Number* panel, int64_t inputs,
          Floats out[][kHalves]) {
    constexpr int kStep = Format::kStep;
    Floats acc[M][kHalves];
    // Unrolled, so that the accumulators are registers and nothing else.
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < kHalves; ++h) acc[m][h] = zeros();
    const auto step = [&](int64_t k, auto inputs_at) {
        const auto* w = panel + k * kPanel;
        _mm_prefetch((const char*)w + 2048, _MM_HINT_T0);
        _mm_prefetch((const char*)w + 2048 + 64, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int part = 0; part < Format::kParts; ++part) {
            decltype(Format::weights(w, part)) weights[kHalves];
            for (int h = 0; h < kHalves; ++h) weights[h] = Format::weights(w + h * kLanes * kStep, part);
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m) {
                const auto xs = inputs_at(x + m * x_stride + k, part);
                for (int h = 0; h < kHalves; ++h) acc[m][h] = Format::multiply(acc[m][h], weights[h], xs);
            }
        }
    };
    int64_t k = 0;
    for (; k + kStep <= inputs; k += kStep) step(k, Format::inputs);
    if (k < inputs) step(k, Format::last_inputs);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < kHalves; ++h) out[m][h] = acc[m][h];
}

template <class Format>
void linear(const typename Format::Number* given, const typename Format::Number* packed, const float* bias, void* y,
            int64_t rows, int64_t inputs, int64_t outputs, bool is_f32) {
    using Number = typename Format::Number;
    using Input = typename Format::Input;
    using Tile = void (*)(const Input*, int64_t, const Number*, int64_t, Floats[][kHalves]);
    static constexpr Tile kTiles[] = {
        nullptr,         tile<Format, 1>, tile<Format, 2>, tile<Format, 3>, tile<Format, 4>,
        tile<Format, 5>, tile<Format, 6>,
#ifdef __AVX512F__
        tile<Format, 7>, tile<Format, 8>, tile<Format, 9>,
        tile<Format, 10>, tile<Format, 11>, tile<Format, 12>,
#endif
    };
    const Inputs<Input, Number> x(given, rows * inputs);
    const int64_t panels = panels_of(outputs), tiles = (rows + kMaxTile - 1) / kMaxTile;
    share_each(panels, 1, [&](int64_t p) {
        for (int64_t t = 0; t < tiles; ++t) {
            // Tiles of nearly equal size.
            const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            for (int half = 0; half < 2; half += kHalves) {
                Floats out[kMaxTile][kHalves];
                const Number* panel = packed + p * Format::panel_size(inputs) + half * kLanes * Format::kStep;
                kTiles[count](x.numbers + first * inputs, inputs, panel, inputs, out);
                for (int64_t m = 0; m < count; ++m)
                    for (int h = 0; h < kHalves; ++h)
                        store_outputs(out[m][h], y, (first + m) * outputs, p * kPanel + (half + h) * kLanes, outputs,
                                      bias, is_f32);
            }
        }
    });
}

#ifdef __AMX_BF16__
void linear_on_tiles(const bf16* x, const bf16* packed, const float* bias, void* y, int64_t rows, int64_t inputs,
                     int64_t outputs, bool is_f32) {
    if (rows == 0) return;
    const TileInputs tiled(x, rows, inputs);
    const Blocks blocks(rows);
    const BlockSums sum = blocks.has_lower() ? block_sums<true> : block_sums<false>;
    const int64_t size = Bfloat16::panel_size(inputs);
    share(panels_of(outputs), [&](Pieces& pieces) {
        const Tiles tiles(blocks.size);
        alignas(64) float sums[kBlockRows * kPanel];
        for (const int64_t p : pieces)
            for (int64_t b = 0; b < blocks.count; ++b) {
                const int64_t first = blocks.begin(b), count = blocks.begin(b + 1) - first;
                // The next panel lies behind this one; each block has a part of it fetched.
                sum(tiled, first, 0, tiled.groups(), packed + p * size, fetch_ahead(size, b, blocks.count), sums);
                store_panel(sums, count, y, first, p, outputs, bias, is_f32);
            }
    });
}
#endif

// weight [outputs, inputs] -> [panels, inputs / kStep, 32, kStep], zeros where there is no weight.
template <class Format>
void pack(const typename Format::Number* weight, int64_t outputs, int64_t inputs, typename Format::Number* packed) {
    constexpr int kStep = Format::kStep;
    const int64_t panels = panels_of(outputs), size = Format::panel_size(inputs);
    share_each(panels, 1, [&](int64_t p) {
        for (int64_t i = 0; i < size; ++i) {
            const int64_t row = p * kPanel + i / kStep % kPanel, k = i / (kStep * kPanel) * kStep + i % kStep;
            packed[p * size + i] = row < outputs && k < inputs ? weight[row * inputs + k] : 0;
        }
    });
}

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// weight [outputs, inputs] -> packed [ceil(outputs / 32), inputs, 32].
EXPORT int pack_f32(int64_t threads, const float* weight, int64_t outputs, int64_t inputs, float* packed) {
    return called(threads, [&] {
        pack<Float32>(weight, outputs, inputs, packed);
    });
}

// weight [outputs, inputs] -> packed [ceil(outputs / 32), ceil(inputs / 32) * 16, 32, 2].
EXPORT int pack_bf16(int64_t threads, const bf16* weight, int64_t outputs, int64_t inputs, bf16* packed) {
    return called(threads, [&] {
        pack<Bfloat16>(weight, outputs, inputs, packed);
    });
}

// x [rows, inputs], bias [outputs] float32 or null, y [rows, outputs] float32 if out_f32, else bfloat16.
EXPORT int linear_f32(int64_t threads, const float* x, const float* packed, const float* bias, void* y, int64_t rows,
                      int64_t inputs, int64_t outputs, int out_f32) {
    return called(threads, [&] {
        linear<Float32>(x, packed, bias, y, rows, inputs, outputs, out_f32);
    });
}

// As above.
EXPORT int linear_bf16(int64_t threads, const bf16* x, const bf16* packed, const float* bias, void* y, int64_t rows,
                       int64_t inputs, int64_t outputs, int out_f32) {
    return called(threads, [&] {
#ifdef __AMX_BF16__
        linear_on_tiles(x, packed, bias, y, rows, inputs, outputs, out_f32);
#else
        linear<Bfloat16>(x, packed, bias, y, rows, inputs, outputs, out_f32);
#endif
    });
}
