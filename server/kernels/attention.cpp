// Attention of a step's rows over a paged key-value cache, and the writing of their keys and values into it.
//
// The queries of a block of positions that share a key-value head go together over the sequence's pages, in order, with
// a running softmax; a decode row is a block of one position. A query's numbers are made from its own pages in one
// order, and what is hidden from it adds nothing to the bit: how a prompt was cut into chunks, and what else a step
// holds, cannot be seen in them.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "pages.h"
#include "product.h"
#include "softmax.h"

namespace recontrol {
namespace {

constexpr int64_t kMostRows = 256;  // queries of a block, unless one position has more: their sums stay in the cache

struct Step {
    const bf16 *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    Cache cache;
    bf16* out;
    int64_t heads, group;
    float scaling, softcap;
    int64_t window;

    int64_t begin(int64_t position) const { return window > 0 ? std::max<int64_t>(position + 1 - window, 0) : 0; }
};

// Consecutive positions first.. of one sequence in one page, as many as there are rows.
struct Block {
    int64_t row, rows, first;
    const int32_t* table;
    bool is_alone;  // no other row of the step is of this sequence

    int64_t last() const { return first + rows - 1; }
};

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows of head_size numbers; unlike a vector's, they begin a line of the cache and are not set.
template <typename T>
using Rows = std::unique_ptr<T[], void (*)(void*)>;

template <typename T>
Rows<T> make_rows(int64_t rows, int64_t head_size) {
    return {(T*)std::aligned_alloc(64, rows * head_size * sizeof(T)), std::free};
}

// A thread's own, for blocks of up to so many queries.
struct Scratch {
    Rows<bf16> queries, finite;
    Rows<float> sums;
    std::vector<Running> running;  // of each tile
    Products products;
    alignas(64) float scores[kLanes * kPage];
    alignas(64) bf16 weights[kLanes * kPage];

    Scratch(int64_t rows, int64_t head_size)
        : queries(make_rows<bf16>(rows + kLanes, head_size)),
          finite(make_rows<bf16>(kPage, head_size)),
          sums(make_rows<float>(rows + kLanes, head_size)) {}
};

void write_block(const Step& step, const Block& block, int64_t head) {
    const int64_t size = step.cache.head_size;
    for (int64_t r = 0; r < block.rows; ++r)
        write(step.cache, block.table, block.first + r, head, step.k + (block.row + r) * step.k_stride + head * size,
              step.v + (block.row + r) * step.v_stride + head * size);
}

// One key-value head over the positions of a block. Row n is query n % group at position n / group of the block; rows
// go by tiles of nearly equal size, at most 16.
class Attention {
   public:
    Attention(const Step& step, const Block& block, int64_t head, Scratch& scratch)
        : step_(step), block_(block), head_(head), size_(step.cache.head_size), rows_(block.rows * step.group),
          tiles_(parts(rows_, kLanes)), tile_rows_(parts(rows_, tiles_)), scratch_(scratch) {}

    void run() {
        begin();
        for (int64_t page = step_.begin(block_.first) / kPage; page <= block_.last() / kPage; ++page) attend(page);
        for (int64_t n = 0; n < rows_; ++n) {
            bf16* out = step_.out + (row_of(n) * step_.heads + query_of(n)) * size_;
            finish(scratch_.running[n / tile_rows_].totals[n % tile_rows_], sums_of(n), size_, out);
        }
    }

   private:
    int64_t row_of(int64_t n) const { return block_.row + n / step_.group; }
    int64_t query_of(int64_t n) const { return head_ * step_.group + n % step_.group; }
    float* sums_of(int64_t n) const { return scratch_.sums.get() + n * size_; }

    void begin() {
        bf16* queries = scratch_.queries.get();
        for (int64_t n = 0; n < rows_; ++n)
            std::copy_n(step_.q + row_of(n) * step_.q_stride + query_of(n) * size_, size_, queries + n * size_);
        const int64_t padded = tiles_ * tile_rows_;
        std::fill(queries + rows_ * size_, queries + padded * size_, bf16{0});
        std::fill(sums_of(0), sums_of(padded), 0.0f);
        scratch_.running.assign(tiles_, Running());
        scratch_.products.set_rows((int)tile_rows_);
    }

    void attend(int64_t page) {
        const int64_t origin = page * kPage;
        const bool has_hidden = block_.last() - origin < kPage || origin < step_.begin(block_.last());
        const bf16* keys = step_.cache.keys_of(block_.table[page], head_);
        const bf16* values = step_.cache.values_of(block_.table[page], head_);
        const bf16* finite = values;
        const int64_t most = slots_for(rows_ - 1, origin) * size_;
        if (has_hidden && !are_finite(values, most)) {
            copy_finite(values, most, scratch_.finite.get());
            finite = scratch_.finite.get();
        }
        for (int64_t first = 0; first < rows_; first += tile_rows_) {
            const int rows = (int)std::min(tile_rows_, rows_ - first);
            const int64_t slots = slots_for(first + rows - 1, origin);
            score(first, keys, slots);
            for (int n = 0; has_hidden && n < rows; ++n) {
                const auto [begin, end] = seen(first + n, origin);
                hide(scratch_.scores + n * kPage, slots, begin, end);
            }
            weigh(scratch_.scores, rows, slots, scale(), scratch_.weights, scratch_.running[first / tile_rows_],
                  sums_of(first), size_);
            scratch_.products.multiply(
                {scratch_.weights, kPage, finite, 2 * size_, sums_of(first), size_, slots, size_, true});
            for (int n = 0; finite != values && n < rows; ++n) {
                const auto [begin, end] = seen(first + n, origin);
                add_nonfinite(scratch_.weights + n * kPage, values, size_, begin, end, sums_of(first + n));
            }
        }
    }

    void score(int64_t first, const bf16* keys, int64_t slots) {
        const bf16* queries = scratch_.queries.get() + first * size_;
        scratch_.products.multiply({queries, size_, keys, 2 * kPage, scratch_.scores, kPage, size_, slots, false});
        if (step_.softcap > 0) cap(scratch_.scores, tile_rows_ * kPage, step_.scaling, step_.softcap);
    }

    float scale() const { return step_.softcap > 0 ? 1.0f : step_.scaling * kLog2E; }

    // The slots of the page from `origin` on that row n sees, [begin, end).
    std::pair<int64_t, int64_t> seen(int64_t n, int64_t origin) const {
        const int64_t position = block_.first + n / step_.group;
        return {std::max<int64_t>(step_.begin(position) - origin, 0), std::min(position + 1 - origin, kPage)};
    }

    // How many of them products take to have all that row n sees.
    int64_t slots_for(int64_t n, int64_t origin) const {
        return parts(seen(n, origin).second, Products::kStep) * Products::kStep;
    }

    const Step& step_;
    const Block& block_;
    const int64_t head_, size_, rows_, tiles_, tile_rows_;
    Scratch& scratch_;
};

// The step's rows as blocks, those with the most to compute first, so that no thread begins a long one at the end.
std::vector<Block> blocks_of(const int32_t* tables, int64_t table_stride, const int64_t* sequences,
                             const int64_t* positions, int64_t rows, const Step& step) {
    int64_t most = kPage;
    while (most > 1 && most * step.group > kMostRows) most /= 2;
    const auto table = [&](int64_t r) { return tables + sequences[r] * table_stride; };
    // A page that is written to belongs to one sequence alone, so the page tells whether two rows are of the same.
    const auto continues = [&](int64_t r) {
        if (r == 0 || r == rows || positions[r] != positions[r - 1] + 1) return false;
        const int64_t page = positions[r - 1] / kPage;
        return table(r)[page] == table(r - 1)[page];
    };
    std::vector<Block> blocks;
    for (int64_t r = 0; r < rows; ++r) {
        if (continues(r) && positions[r] % most != 0)
            ++blocks.back().rows;
        else
            blocks.push_back({r, 1, positions[r], table(r), !continues(r) && !continues(r + 1)});
    }
    const auto cost = [&](const Block& block) { return (block.last() + 1 - step.begin(block.first)) * block.rows; };
    std::stable_sort(blocks.begin(), blocks.end(), [&](const Block& a, const Block& b) { return cost(a) > cost(b); });
    return blocks;
}

void attend(const Step& step, const std::vector<Block>& blocks) {
    const int64_t kv_heads = step.cache.kv_heads, tasks = (int64_t)blocks.size() * kv_heads;
    bool has_parts = false;
    int64_t most = 1;
    for (const Block& block : blocks) {
        has_parts |= !block.is_alone;
        most = std::max(most, block.rows);
    }
#pragma omp parallel
    {
        // A block whose sequence has others must find their keys written; one that is alone writes its own.
        if (has_parts) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; ++task)
                if (!blocks[task / kv_heads].is_alone) write_block(step, blocks[task / kv_heads], task % kv_heads);
        }
        Scratch scratch(most * step.group, step.cache.head_size);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < tasks; ++task) {
            const Block& block = blocks[task / kv_heads];
            if (block.is_alone) write_block(step, block, task % kv_heads);
            Attention(step, block, task % kv_heads, scratch).run();
        }
    }
}

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// Write the rows' keys and values into their pages, then attend: out [rows, heads * head_size].
//
// q, k and v are rows of heads, `stride` elements apart; row r stands at positions[r] of the sequence whose pages are
// tables[sequences[r]][..]. Rows of one sequence must come one after the other, in order of their positions, and a page
// that they write to must be of no other. A window of 0 attends to everything, a softcap of 0 caps nothing. head_size
// must be a multiple of 32.
EXPORT void paged_attention_bf16(const bf16* q, const bf16* k, const bf16* v, int64_t q_stride, int64_t k_stride,
                                 int64_t v_stride, bf16* keys, bf16* values, const int32_t* tables,
                                 int64_t table_stride, const int64_t* sequences, const int64_t* positions, bf16* out,
                                 int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_size, float scaling,
                                 float softcap, int64_t window) {
    const Step step{q,   k,     v,       q_stride, k_stride, v_stride, {keys, values, kv_heads, head_size},
                    out, heads, heads / kv_heads,  scaling,  softcap,  window};
    attend(step, blocks_of(tables, table_stride, sequences, positions, rows, step));
}
