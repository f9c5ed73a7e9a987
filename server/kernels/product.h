// Products of a few rows with a matrix: sums[r][c] (+)= a[r][:] . b[:][c].
//
// a is rows of bfloat16 or float32; b is [depth / W][columns][W] of the same, with W numbers to a lane (pages.h); sums
// are float32. Depth is a multiple of kDepthStep, columns one of kColumnStep. A row's sums are made in an order that
// depends on nothing but the depth: not on how many rows there are.
#pragma once

#include "pages.h"
#include "simd.h"
#include "tiles.h"

namespace recontrol {
namespace {

// Distances are between rows, in elements; b's between its groups of W rows.
template <typename T>
struct Product {
    const T* a;
    int64_t a_stride;
    const T* b;
    int64_t b_stride;
    float* sums;
    int64_t sums_stride;
    int64_t depth, columns;
    bool adds;
};

// What a lane of either operand holds, as `dot` takes it: a pair of bfloat16 numbers, or one of float32.
inline Pairs load_terms(const bf16* p) { return load_pairs(p); }
inline Floats load_terms(const float* p) { return load(p); }
inline Pairs all_terms(const bf16* p) { return all_pairs(p); }
inline Floats all_terms(const float* p) { return all(*p); }
inline Floats dot(Floats sum, Floats a, Floats b) { return fma(a, b, sum); }

// By vectors, as many rows and vectors of columns at a time as there are registers for.
template <typename T>
class VectorProducts {
   public:
    static constexpr int64_t kDepthStep = kPerLane<T>, kColumnStep = kLanes;

    void set_rows(int rows) { rows_ = rows; }

    void multiply(const Product<T>& of) const {
        int row = 0;
        for (; row + kRows <= rows_; row += kRows) multiply_rows<kRows>(of, row);
        multiply_rest<kRows - 1>(of, row, rows_ - row);
    }

   private:
#ifdef __AVX512F__
    static constexpr int kRows = 8, kSums = 16;
#else
    static constexpr int kRows = 4, kSums = 4;
#endif

    template <int R>
    static void multiply_rest(const Product<T>& of, int row, int rows) {
        if (rows == R) multiply_rows<R>(of, row);
        if constexpr (R > 1) multiply_rest<R - 1>(of, row, rows);
    }

    template <int R>
    static void multiply_rows(const Product<T>& of, int64_t row) {
        multiply_columns<R, (kSums / R >= 4 ? 4 : kSums / R >= 2 ? 2 : 1)>(of, row, 0);
    }

    template <int R, int V>
    static void multiply_columns(const Product<T>& of, int64_t row, int64_t column) {
        for (; column + V * kLanes <= of.columns; column += V * kLanes) multiply_part<R, V>(of, row, column);
        if constexpr (V > 1) multiply_columns<R, V / 2>(of, row, column);
    }

    template <int R, int V>
    static void multiply_part(const Product<T>& of, int64_t row, int64_t column) {
        const T* a = of.a + row * of.a_stride;
        float* sums = of.sums + row * of.sums_stride + column;
        Floats acc[R][V];
        // Unrolled, so that the accumulators are registers and nothing else.
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = of.adds ? load(sums + r * of.sums_stride + v * kLanes) : zeros();
        constexpr int64_t W = kPerLane<T>;
        for (int64_t i = 0; i < of.depth; i += W) {
            decltype(load_terms(of.b)) b[V];
            for (int v = 0; v < V; ++v) b[v] = load_terms(of.b + i / W * of.b_stride + W * (column + v * kLanes));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const auto terms = all_terms(a + r * of.a_stride + i);
                for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], b[v], terms);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) store(sums + r * of.sums_stride + v * kLanes, acc[r][v]);
    }

    int rows_ = 0;
};

template <typename T>
struct ProductsOf {
    using Type = VectorProducts<T>;
};

#ifdef __AMX_BF16__

// By tiles, whose rows do not see each other. One for each thread, for products of at most 16 rows.
class TileProducts {
   public:
    static constexpr int64_t kDepthStep = 32, kColumnStep = 32;

    TileProducts() = default;
    ~TileProducts() { _tile_release(); }
    TileProducts(const TileProducts&) = delete;

    // From here on products have so many rows.
    void set_rows(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        shape_tiles({rows, rows, rows, rows, rows, kTileRows, kTileRows, 0});
    }

    void multiply(const Product<bf16>& of) const {
        settle(of.a);
        int64_t column = 0;
        for (; column + 64 <= of.columns; column += 64) multiply_columns<true>(of, column);
        if (column < of.columns) multiply_columns<false>(of, column);
        settle(of.sums);
    }

   private:
    // 64 columns, or 32. Tiles 0 to 3 hold sums, 4 is of a, 5 and 6 are of b.
    template <bool kIsWide>
    static void multiply_columns(const Product<bf16>& of, int64_t column) {
        const int64_t a_bytes = 2 * of.a_stride, b_bytes = 2 * of.b_stride, sums_bytes = 4 * of.sums_stride;
        float* sums = of.sums + column;
        if (of.adds) {
            _tile_loadd(0, sums, sums_bytes);
            _tile_loadd(1, sums + 16, sums_bytes);
            if (kIsWide) _tile_loadd(2, sums + 32, sums_bytes);
            if (kIsWide) _tile_loadd(3, sums + 48, sums_bytes);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if (kIsWide) _tile_zero(2);
            if (kIsWide) _tile_zero(3);
        }
        for (int64_t i = 0; i < of.depth; i += 32) {
            const bf16* b = of.b + i / 2 * of.b_stride + 2 * column;
            _tile_loadd(4, of.a + i, a_bytes);
            _tile_loadd(5, b, b_bytes);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, b + 32, b_bytes);
            _tile_dpbf16ps(1, 4, 6);
            if (!kIsWide) continue;
            _tile_loadd(5, b + 64, b_bytes);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(6, b + 96, b_bytes);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, sums, sums_bytes);
        _tile_stored(1, sums + 16, sums_bytes);
        if (kIsWide) _tile_stored(2, sums + 32, sums_bytes);
        if (kIsWide) _tile_stored(3, sums + 48, sums_bytes);
    }

    int rows_ = 0;
};

template <>
struct ProductsOf<bf16> {
    using Type = TileProducts;
};

#endif

// Those of a level for numbers of a type.
template <typename T>
using Products = typename ProductsOf<T>::Type;

}  // namespace
}  // namespace recontrol
