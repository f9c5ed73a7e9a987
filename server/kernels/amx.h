// Products of bfloat16 on AMX's tiles: up to 32 rows of x by a panel of 32 outputs (gemm.h has the layout).
//
// A tile holds 16 rows of 64 bytes. TDPBF16PS adds to each element of a tile of sums its row of 32 inputs by a column of
// weights; which other rows the tile holds, or how many, it does not see. Groups of 32 inputs are added in their order.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "tiles.h"

#ifdef __AMX_BF16__
namespace recontrol {
namespace {

constexpr int kBlockRows = 2 * kTileRows;

// Rows in blocks of nearly equal size, at most 32. The last is a largest one, so that a block may read as many rows as the
// largest has, and all are computed with tiles of one shape.
struct Blocks {
    int64_t rows, count, size;
    explicit Blocks(int64_t rows)
        : rows(rows), count((rows + kBlockRows - 1) / kBlockRows), size(count ? (rows + count - 1) / count : 0) {}
    int64_t begin(int64_t block) const { return rows * block / count; }
    bool has_lower() const { return size > kTileRows; }
};

// This thread's tiles, while it lives. Sums of so many rows are in tiles 0 to 3, by upper and lower rows and first and
// second half of the panel; x is in 4 and 5, weights in 6 and 7.
class Tiles {
   public:
    explicit Tiles(int64_t rows) {
        const int64_t upper = std::min<int64_t>(rows, kTileRows), lower = rows - upper;
        shape_tiles({upper, upper, lower, lower, upper, lower, kTileRows, kTileRows});
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// Rows of x as tiles read them: a row's last group is apart, padded with zeros, if it is not whole.
class TileInputs {
   public:
    TileInputs(const bf16* x, int64_t rows, int64_t inputs) : x_(x), inputs_(inputs), whole_(inputs / kGroup) {
        const int64_t left = inputs % kGroup;
        if (left == 0) return;
        last_.resize(rows * kGroup, 0);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(x + (r + 1) * inputs - left, left, last_.data() + r * kGroup);
    }
    int64_t groups() const { return whole_ + !last_.empty(); }
    const bf16* at(int64_t row, int64_t group) const {
        return group < whole_ ? x_ + row * inputs_ + group * kGroup : last_.data() + row * kGroup;
    }
    // Between rows, in bytes.
    int64_t stride(int64_t group) const { return group < whole_ ? inputs_ * 2 : kTileBytes; }

   private:
    const bf16* x_;
    int64_t inputs_, whole_;
    std::vector<bf16> last_;
};

// Adds a group of inputs by its weights [16, 32, 2] to the sums.
template <bool kHasLower>
inline void add_tiles(const TileInputs& x, int64_t row, int64_t group, const bf16* weights) {
    const int64_t stride = x.stride(group);
    _tile_loadd(4, x.at(row, group), stride);
    _tile_loadd(6, weights, 2 * kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + kGroup, 2 * kTileBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kHasLower) {
        _tile_loadd(5, x.at(row + kTileRows, group), stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

template <bool kHasLower>
inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kHasLower) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

// sums [rows, 32].
template <bool kHasLower>
inline void take_sums(float* sums) {
    _tile_stored(0, sums, 2 * kTileBytes);
    _tile_stored(1, sums + kLanes, 2 * kTileBytes);
    if constexpr (kHasLower) {
        _tile_stored(2, sums + kTileRows * kPanel, 2 * kTileBytes);
        _tile_stored(3, sums + kTileRows * kPanel + kLanes, 2 * kTileBytes);
    }
    settle(sums);
}

// What is fetched into the cache with each group of weights, since it is wanted next: `bytes` from `offset` bytes behind.
struct Ahead {
    int64_t offset = 0, bytes = 0;
};

// A block's part, of so many, of the weights that lie `size` numbers behind.
inline Ahead fetch_ahead(int64_t size, int64_t block, int64_t blocks) {
    constexpr int64_t kLines = kGroup * kPanel * sizeof(bf16) / kTileBytes;
    const int64_t begin = kLines * block / blocks, end = kLines * (block + 1) / blocks;
    return {size * (int64_t)sizeof(bf16) + begin * kTileBytes, (end - begin) * kTileBytes};
}

// Sums [block's rows, 32] over the groups [begin, end), whose weights are at `weights`.
template <bool kHasLower>
void block_sums(const TileInputs& x, int64_t row, int64_t begin, int64_t end, const bf16* weights, const Ahead& ahead,
                float* sums) {
    settle(weights);
    clear_sums<kHasLower>();
    for (int64_t g = begin; g < end; ++g, weights += kGroup * kPanel) {
        for (int64_t i = 0; i < ahead.bytes; i += kTileBytes)
            _mm_prefetch((const char*)weights + ahead.offset + i, _MM_HINT_T1);
        add_tiles<kHasLower>(x, row, g, weights);
    }
    take_sums<kHasLower>(sums);
}

using BlockSums = void (*)(const TileInputs&, int64_t, int64_t, int64_t, const bf16*, const Ahead&, float*);

}  // namespace
}  // namespace recontrol
#endif
