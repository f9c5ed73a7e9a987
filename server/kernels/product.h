// Products of a few rows with a matrix whose rows are interleaved by pairs: sums[r][c] (+)= a[r][:] . b[:][c].
//
// a is rows of bfloat16; b is [depth / 2][columns][2]; sums are float32. Depth and columns are multiples of kStep. A
// row's sums are made in an order that depends on nothing but the depth: not on how many rows there are.
#pragma once

#include "simd.h"
#include "tiles.h"

namespace recontrol {
namespace {

// Distances are between rows, in elements; b's between pairs of rows.
struct Product {
    const bf16* a;
    int64_t a_stride;
    const bf16* b;
    int64_t b_stride;
    float* sums;
    int64_t sums_stride;
    int64_t depth, columns;
    bool adds;
};

#ifdef __AMX_BF16__

// By tiles, whose rows do not see each other. One for each thread, for products of at most 16 rows.
class Products {
   public:
    static constexpr int64_t kStep = 32;

    Products() = default;
    ~Products() { _tile_release(); }
    Products(const Products&) = delete;

    // From here on products have so many rows.
    void set_rows(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        shape_tiles({rows, rows, rows, rows, rows, kTileRows, kTileRows, 0});
    }

    void multiply(const Product& of) const {
        settle(of.a);
        int64_t column = 0;
        for (; column + 64 <= of.columns; column += 64) multiply_columns<true>(of, column);
        if (column < of.columns) multiply_columns<false>(of, column);
        settle(of.sums);
    }

   private:
    // 64 columns, or 32. Tiles 0 to 3 hold sums, 4 is of a, 5 and 6 are of b.
    template <bool kIsWide>
    static void multiply_columns(const Product& of, int64_t column) {
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

#else

// By vectors, as many rows and vectors of columns at a time as there are registers for.
class Products {
   public:
    static constexpr int64_t kStep = kLanes;

    void set_rows(int rows) { rows_ = rows; }

    void multiply(const Product& of) const {
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
    static void multiply_rest(const Product& of, int row, int rows) {
        if (rows == R) multiply_rows<R>(of, row);
        if constexpr (R > 1) multiply_rest<R - 1>(of, row, rows);
    }

    template <int R>
    static void multiply_rows(const Product& of, int64_t row) {
        multiply_columns<R, (kSums / R >= 4 ? 4 : kSums / R >= 2 ? 2 : 1)>(of, row, 0);
    }

    template <int R, int V>
    static void multiply_columns(const Product& of, int64_t row, int64_t column) {
        for (; column + V * kLanes <= of.columns; column += V * kLanes) multiply_part<R, V>(of, row, column);
        if constexpr (V > 1) multiply_columns<R, V / 2>(of, row, column);
    }

    template <int R, int V>
    static void multiply_part(const Product& of, int64_t row, int64_t column) {
        const bf16* a = of.a + row * of.a_stride;
        float* sums = of.sums + row * of.sums_stride + column;
        Floats acc[R][V];
        // Unrolled, so that the accumulators are registers and nothing else.
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = of.adds ? load(sums + r * of.sums_stride + v * kLanes) : zeros();
        for (int64_t i = 0; i < of.depth; i += 2) {
            Pairs b[V];
            for (int v = 0; v < V; ++v) b[v] = load_pairs(of.b + i / 2 * of.b_stride + 2 * (column + v * kLanes));
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Pairs pair = all_pairs(a + r * of.a_stride + i);
                for (int v = 0; v < V; ++v) acc[r][v] = dot(acc[r][v], b[v], pair);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) store(sums + r * of.sums_stride + v * kLanes, acc[r][v]);
    }

    int rows_ = 0;
};

#endif

}  // namespace
}  // namespace recontrol
