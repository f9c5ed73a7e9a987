// y = x W^T + b for frozen weights of 4 or 8 bits in groups of 32 inputs; x and the products are bfloat16, sums float32.
//
//     4 bits   w = scale * q + least, q in 0..15      (llama.cpp's Q4_1)
//     8 bits   w = scale * q,         q in -127..127  (its Q8_0)
//
// Whole numbers of so few bits are exact in bfloat16, so a group is summed as gemm.h sums and scaled once. Panels of
// 32 outputs; in each, for every pair of inputs, 32 pairs of numbers; for every group, 32 scales and (4 bits) leasts in
// float16. Each output element is one chain of sums, whatever the number of rows.
#include <algorithm>
#include <vector>

#include "amx.h"
#include "gemm.h"
#include "pool.h"

namespace recontrol {
namespace {

constexpr int kGroupPairs = kGroup / 2;
#ifdef __AVX512F__
// Two sums an output: of the group, and of all.
constexpr int kMaxQuantizedTile = kMaxTile / 2;
#else
// Numbers take so long to widen here that the sums of all leave the registers while a group is summed.
constexpr int kMaxQuantizedTile = kMaxTile;
#endif

struct Int4 {
    static constexpr int64_t kPairBytes = 32, kScales = 2 * kPanel;
    static constexpr bool kHasLeast = true;
    // A byte holds a number of each half.
    static Floats floats(const uint8_t* p, int half, int part) { return load_int4_floats(p, half, part); }
#ifdef __AVX512BF16__
    static Pairs weights(const uint8_t* p, int half, int = 0) {
        Pairs low, high;
        load_int4_pairs(p, low, high);
        return half ? high : low;
    }
#else
    static Floats weights(const uint8_t* p, int half, int part) { return floats(p, half, part); }
#endif
};

struct Int8 {
    static constexpr int64_t kPairBytes = 64, kScales = kPanel;
    static constexpr bool kHasLeast = false;
    static Floats floats(const uint8_t* p, int half, int part) {
        return load_int8_floats(p + half * kPairBytes / 2, part);
    }
#ifdef __AVX512BF16__
    static Pairs weights(const uint8_t* p, int half, int = 0) { return load_int8_pairs(p + half * kPairBytes / 2); }
#else
    static Floats weights(const uint8_t* p, int half, int part) { return floats(p, half, part); }
#endif
};

#ifndef __AVX512BF16__
// A format's numbers of kHalves halves of a panel, widened once for several tiles: [pairs, 2, kHalves, 16] floats.
template <class Format>
struct Widened {
    static constexpr int64_t kPairBytes = 2 * kHalves * kLanes * sizeof(float), kScales = Format::kScales;
    static constexpr bool kHasLeast = Format::kHasLeast;
    static Floats weights(const uint8_t* p, int half, int part) {
        return load((const float*)p + (part * kHalves + half % kHalves) * kLanes);
    }
};

template <class Format>
void widen_halves(const uint8_t* numbers, int64_t pairs, int first_half, float* wide) {
    for (; pairs > 0; --pairs, numbers += Format::kPairBytes)
        for (int part = 0; part < 2; ++part)
            for (int h = 0; h < kHalves; ++h, wide += kLanes)
                store(wide, Format::floats(numbers, first_half + h, part));
}
#endif

// For the halves of a panel from `first_half` on; sums [M][groups] as sums_of_groups has them.
template <class Format, int M>
void quantized_tile(const PairProducts::Input* x, int64_t x_stride, const uint8_t* panel, const uint16_t* scales,
                    const float* sums, int64_t groups, int first_half, Floats out[][kHalves]) {
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
            const uint8_t* w = numbers + k * Format::kPairBytes;
            _mm_prefetch((const char*)(w + 2048), _MM_HINT_T0);
#pragma GCC unroll 2
            for (int part = 0; part < PairProducts::kParts; ++part) {
                PairProducts::Terms weights[kHalves];
                for (int h = 0; h < kHalves; ++h) weights[h] = Format::weights(w, first_half + h, part);
#pragma GCC unroll 6
                for (int m = 0; m < M; ++m) {
                    const auto xs = PairProducts::inputs(x + m * x_stride + g * kGroup + 2 * k, part);
                    for (int h = 0; h < kHalves; ++h) acc[m][h] = PairProducts::multiply(acc[m][h], weights[h], xs);
                }
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

// Of x over each group, for what the least number of a group adds.
template <class Format>
std::vector<float> sums_of_groups(const bf16* x, int64_t groups) {
    std::vector<float> sums(Format::kHasLeast ? groups : 0);
    for (size_t g = 0; g < sums.size(); ++g)
        sums[g] = sum_of(add(load_bf16(x + g * kGroup), load_bf16(x + g * kGroup + kLanes)));
    return sums;
}

using QuantizedTile = void (*)(const PairProducts::Input*, int64_t, const uint8_t*, const uint16_t*, const float*,
                               int64_t, int, Floats[][kHalves]);
template <class Format>
constexpr QuantizedTile kQuantizedTiles[] = {
    nullptr,
    quantized_tile<Format, 1>, quantized_tile<Format, 2>, quantized_tile<Format, 3>,
    quantized_tile<Format, 4>, quantized_tile<Format, 5>, quantized_tile<Format, 6>,
};

template <class Format>
void quantized(const bf16* given, const uint8_t* packed, const uint16_t* scales, const float* bias, void* y,
               int64_t rows, int64_t inputs, int64_t outputs, bool is_f32) {
    const Inputs<PairProducts::Input, bf16> x(given, rows * inputs);
    const int64_t groups = inputs / kGroup, tiles = (rows + kMaxQuantizedTile - 1) / kMaxQuantizedTile;
    const std::vector<float> sums = sums_of_groups<Format>(given, rows * groups);
    share(panels_of(outputs), [&](Pieces& pieces) {
        const QuantizedTile* tile_of = kQuantizedTiles<Format>;
#ifndef __AVX512BF16__
        const bool is_widened = tiles > 2;
        std::vector<float> wide(is_widened ? inputs * kHalves * kLanes : 0);
        if (is_widened) tile_of = kQuantizedTiles<Widened<Format>>;
#endif
        for (const int64_t p : pieces)
            for (int half = 0; half < 2; half += kHalves) {
                const uint8_t* numbers = packed + p * groups * kGroupPairs * Format::kPairBytes;
#ifndef __AVX512BF16__
                if (is_widened) {
                    widen_halves<Format>(numbers, groups * kGroupPairs, half, wide.data());
                    numbers = (const uint8_t*)wide.data();
                }
#endif
                for (int64_t t = 0; t < tiles; ++t) {
                    // Tiles of nearly equal size.
                    const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
                    Floats out[kMaxQuantizedTile][kHalves];
                    tile_of[count](x.numbers + first * inputs, inputs, numbers, scales + p * groups * Format::kScales,
                                   sums.data() + first * groups, groups, half, out);
                    for (int64_t m = 0; m < count; ++m)
                        for (int h = 0; h < kHalves; ++h)
                            store_outputs(out[m][h], y, (first + m) * outputs, p * kPanel + (half + h) * kLanes,
                                          outputs, bias, is_f32);
                }
            }
    });
}

#ifdef __AMX_BF16__
// While it lives, this thread's vectors take and give zero in place of what is below the normal numbers, as tiles do.
class WithoutSubnormals {
   public:
    WithoutSubnormals() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
    ~WithoutSubnormals() { _mm_setcsr(before_); }
    WithoutSubnormals(const WithoutSubnormals&) = delete;

   private:
    const unsigned before_ = _mm_getcsr();
};

// A row alone, in vectors: to fill tiles for it takes longer than the products. This is what the architecture defines
// TDPBF16PS to do, to the bit: first and second numbers of the pairs are summed apart by fused products, in order, then
// together, and that is added to what was there. x is widened; `totals` [32].
template <class Format>
void quantized_row(const float* x, const uint8_t* numbers, const uint16_t* scales, const float* sums_of_x,
                   int64_t groups, float* totals) {
    Floats total[2] = {zeros(), zeros()};
    for (int64_t g = 0; g < groups; ++g, scales += Format::kScales) {
        Floats first[2] = {zeros(), zeros()}, second[2] = {zeros(), zeros()};
        for (int64_t k = 0; k < kGroupPairs; ++k, numbers += Format::kPairBytes, x += 2) {
            _mm_prefetch((const char*)numbers + 2048, _MM_HINT_T0);
            for (int h = 0; h < 2; ++h) {
                first[h] = fma(Format::floats(numbers, h, 0), all(x[0]), first[h]);
                second[h] = fma(Format::floats(numbers, h, 1), all(x[1]), second[h]);
            }
        }
        for (int h = 0; h < 2; ++h) {
            const uint16_t* of_half = scales + h * kLanes;
            total[h] = fma(load_half(of_half), add(zeros(), add(first[h], second[h])), total[h]);
            if constexpr (Format::kHasLeast) total[h] = fma(load_half(of_half + kPanel), all(sums_of_x[g]), total[h]);
        }
    }
    for (int h = 0; h < 2; ++h) store(totals + h * kLanes, total[h]);
}

template <class Format>
void quantized_alone(const bf16* x, const uint8_t* packed, const uint16_t* scales, const float* bias, void* y,
                     int64_t inputs, int64_t outputs, bool is_f32) {
    const int64_t groups = inputs / kGroup;
    const std::vector<float> sums_of_x = sums_of_groups<Format>(x, groups);
    std::vector<float> wide(inputs);
    for (int64_t i = 0; i < inputs; i += kLanes) store(wide.data() + i, load_bf16(x + i));
    share(panels_of(outputs), [&](Pieces& pieces) {
        const WithoutSubnormals as_tiles;
        alignas(64) float totals[kPanel];
        for (const int64_t p : pieces) {
            quantized_row<Format>(wide.data(), packed + p * groups * kGroupPairs * Format::kPairBytes,
                                  scales + p * groups * Format::kScales, sums_of_x.data(), groups, totals);
            store_panel(totals, 1, y, 0, p, outputs, bias, is_f32);
        }
    });
}

// A panel's numbers of one group as bfloat16 [16, 32, 2].
template <class Format>
void widen(const uint8_t* numbers, bf16* weights) {
    for (int64_t k = 0; k < kGroupPairs; ++k, numbers += Format::kPairBytes, weights += 2 * kPanel) {
        _mm_prefetch((const char*)numbers + 2048, _MM_HINT_T0);
        _mm512_store_si512(weights, (__m512i)Format::weights(numbers, 0));
        _mm512_store_si512(weights + kPanel, (__m512i)Format::weights(numbers, 1));
    }
}

// totals [count, 32] of a group more: its sums times its scales and, where there are any, leasts times sums of x.
template <class Format>
void add_scaled(const float* sums, const uint16_t* scales, const float* sums_of_x, int64_t groups, int64_t count,
                float* totals) {
    for (int h = 0; h < 2; ++h) {
        const Floats scale = load_half(scales + h * kLanes);
        const Floats least = Format::kHasLeast ? load_half(scales + kPanel + h * kLanes) : zeros();
        for (int64_t m = 0; m < count; ++m) {
            float* total = totals + m * kPanel + h * kLanes;
            Floats sum = fma(scale, load(sums + m * kPanel + h * kLanes), load(total));
            if constexpr (Format::kHasLeast) sum = fma(least, all(sums_of_x[m * groups]), sum);
            store(total, sum);
        }
    }
}

// As `quantized`, each group a product of tiles. Numbers are widened once for all rows.
template <class Format>
void quantized_on_tiles(const bf16* x, const uint8_t* packed, const uint16_t* scales, const float* bias, void* y,
                        int64_t rows, int64_t inputs, int64_t outputs, bool is_f32) {
    if (rows == 0) return;
    const TileInputs tiled(x, rows, inputs);
    const Blocks blocks(rows);
    const BlockSums sum = blocks.has_lower() ? block_sums<true> : block_sums<false>;
    const int64_t panels = panels_of(outputs), groups = tiled.groups();
    const std::vector<float> sums_of_x = sums_of_groups<Format>(x, rows * groups);
    share(panels, [&](Pieces& pieces) {
        const Tiles tiles(blocks.size);
        const WithoutSubnormals as_tiles;
        alignas(64) float sums[kBlockRows * kPanel];
        alignas(64) bf16 weights[kGroup * kPanel];
        std::vector<float> totals(rows * kPanel);
        for (const int64_t p : pieces) {
            std::fill(totals.begin(), totals.end(), 0.0f);
            for (int64_t g = 0, of_panel = p * groups; g < groups; ++g) {
                widen<Format>(packed + (of_panel + g) * kGroupPairs * Format::kPairBytes, weights);
                for (int64_t b = 0; b < blocks.count; ++b) {
                    const int64_t first = blocks.begin(b), count = blocks.begin(b + 1) - first;
                    sum(tiled, first, g, g + 1, weights, {}, sums);
                    add_scaled<Format>(sums, scales + (of_panel + g) * Format::kScales,
                                       sums_of_x.data() + first * groups + g, groups, count,
                                       totals.data() + first * kPanel);
                }
            }
            store_panel(totals.data(), rows, y, 0, p, outputs, bias, is_f32);
        }
    });
}
#endif

template <class Format>
void map(const bf16* x, const uint8_t* packed, const uint16_t* scales, const float* bias, void* y, int64_t rows,
         int64_t inputs, int64_t outputs, bool is_f32) {
#ifdef __AMX_BF16__
    if (rows == 1) return quantized_alone<Format>(x, packed, scales, bias, y, inputs, outputs, is_f32);
    quantized_on_tiles<Format>(x, packed, scales, bias, y, rows, inputs, outputs, is_f32);
#else
    quantized<Format>(x, packed, scales, bias, y, rows, inputs, outputs, is_f32);
#endif
}

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// As linear_bf16 (gemm.h); inputs must be a multiple of 32. packed [panels, inputs / 2, 32 bytes], scales
// [panels, inputs / 32, 2, 32] float16.
EXPORT int linear_int4(int64_t threads, const bf16* x, const uint8_t* packed, const uint16_t* scales, const float* bias,
                       void* y, int64_t rows, int64_t inputs, int64_t outputs, int out_f32) {
    return called(threads, [&] {
        map<Int4>(x, packed, scales, bias, y, rows, inputs, outputs, out_f32);
    });
}

// packed [panels, inputs / 2, 64 bytes], scales [panels, inputs / 32, 32] float16.
EXPORT int linear_int8(int64_t threads, const bf16* x, const uint8_t* packed, const uint16_t* scales, const float* bias,
                       void* y, int64_t rows, int64_t inputs, int64_t outputs, int out_f32) {
    return called(threads, [&] {
        map<Int8>(x, packed, scales, bias, y, rows, inputs, outputs, out_f32);
    });
}
