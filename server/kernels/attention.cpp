// Attention of a step's rows over a paged key-value cache, and the writing of their keys and values into it.
//
// The queries of a block of positions that share a key-value head go together over the sequence's pages, in order, with
// a running softmax; a decode row is a block of one position. A query's numbers are made from its own pages in one
// order, and what is hidden from it adds nothing to the bit: how a prompt was cut into chunks, and what else a step
// holds, cannot be seen in them.
//
// T is the type of queries, keys, values and results: bfloat16 or float32. Sizes of heads that do not fill a step of the
// products are padded with zeros: queries when a block begins, and of each page the part that is left over.
#include <algorithm>
#include <utility>
#include <vector>

#include "pages.h"
#include "pool.h"
#include "product.h"
#include "scratch.h"
#include "softmax.h"

namespace recontrol {
namespace {

constexpr int64_t kMostRows = 256;  // queries of a block, unless one position has more: their sums stay in the cache

template <typename T>
struct Step {
    const T *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    Cache<T> cache;
    const float* sinks;  // of each query head, or null
    T* out;
    int64_t heads, group;
    float scaling, softcap;
    int64_t window, chunk;

    // The first position that one sees.
    int64_t begin(int64_t position) const {
        const int64_t of_window = window > 0 ? std::max<int64_t>(position + 1 - window, 0) : 0;
        return chunk > 0 ? std::max(of_window, position / chunk * chunk) : of_window;
    }
};

// Consecutive positions first.. of one sequence in one page, as many as there are rows.
struct Block {
    int64_t row, rows, first;
    const int32_t* table;
    bool is_alone;  // no other row of the step is of this sequence

    int64_t last() const { return first + rows - 1; }
};

template <typename T>
void write_block(const Step<T>& step, const Block& block, int64_t head) {
    const Cache<T>& cache = step.cache;
    for (int64_t r = 0; r < block.rows; ++r)
        write(cache, block.table, block.first + r, head, step.k + (block.row + r) * step.k_stride + head * cache.key_size,
              step.v + (block.row + r) * step.v_stride + head * cache.value_size);
}

// One key-value head over the positions of a block. Row n is query n % group at position n / group of the block; rows
// go by tiles of nearly equal size, at most 16.
template <typename T>
class Attention {
   public:
    Attention(const Step<T>& step, const Block& block, int64_t head, Scratch<T>& scratch)
        : step_(step), block_(block), head_(head), rows_(block.rows * step.group), tiles_(parts(rows_, kLanes)),
          tile_rows_(parts(rows_, tiles_)), key_(scratch.key), value_(scratch.value), scratch_(scratch) {}

    void run() {
        begin();
        for (int64_t page = step_.begin(block_.first) / kPage; page <= block_.last() / kPage; ++page) attend(page);
        for (int64_t n = 0; n < rows_; ++n) {
            T* out = step_.out + (row_of(n) * step_.heads + query_of(n)) * value_.size;
            finish(scratch_.running[n / tile_rows_].totals[n % tile_rows_], sums_of(n), value_.size, out);
        }
    }

   private:
    static constexpr int64_t W = kPerLane<T>;

    int64_t row_of(int64_t n) const { return block_.row + n / step_.group; }
    int64_t query_of(int64_t n) const { return head_ * step_.group + n % step_.group; }
    T* queries_of(int64_t n) const { return scratch_.queries.get() + n * key_.padded(); }
    float* sums_of(int64_t n) const { return scratch_.sums.get() + n * value_.padded(); }

    void begin() {
        const int64_t padded = tiles_ * tile_rows_;
        std::fill(queries_of(0), queries_of(padded), T{0});
        std::fill(sums_of(0), sums_of(padded), 0.0f);
        scratch_.running.assign(tiles_, Running());
        scratch_.products.set_rows((int)tile_rows_);
        for (int64_t n = 0; n < rows_; ++n) {
            std::copy_n(step_.q + row_of(n) * step_.q_stride + query_of(n) * key_.size, key_.size, queries_of(n));
            if (step_.sinks) scratch_.running[n / tile_rows_].see_sink(n % tile_rows_, step_.sinks[query_of(n)]);
        }
    }

    void attend(int64_t page) {
        const int64_t origin = page * kPage;
        const bool has_hidden = block_.last() - origin < kPage || origin < step_.begin(block_.last());
        const T* keys = step_.cache.keys_of(block_.table[page], head_);
        const T* values = step_.cache.values_of(block_.table[page], head_);
        const T* finite = values;
        const int64_t most = slots_for(rows_ - 1, origin);
        if (has_hidden && !are_finite(values, most * value_.size)) {
            copy_finite(values, most * value_.size, scratch_.finite.get());
            finite = scratch_.finite.get();
        }
        if (key_.rest) scratch_.copy_rest_of_keys(keys);
        if (value_.rest) scratch_.copy_rest_of_values(finite, most);
        for (int64_t first = 0; first < rows_; first += tile_rows_) {
            const int rows = (int)std::min(tile_rows_, rows_ - first);
            const int64_t slots = slots_for(first + rows - 1, origin);
            score(first, keys, slots);
            for (int n = 0; has_hidden && n < rows; ++n) {
                const auto [begin, end] = seen(first + n, origin);
                hide(scratch_.scores + n * kPage, slots, begin, end);
            }
            weigh(scratch_.scores, rows, slots, scale(), scratch_.weights, scratch_.running[first / tile_rows_],
                  sums_of(first), value_.padded());
            add_values(first, finite, slots);
            for (int n = 0; finite != values && n < rows; ++n) {
                const auto [begin, end] = seen(first + n, origin);
                add_nonfinite(scratch_.weights + n * kPage, values, value_.size, begin, end, sums_of(first + n));
            }
        }
    }

    void score(int64_t first, const T* keys, int64_t slots) {
        const int64_t width = key_.padded(), whole = key_.whole;
        const T *queries = queries_of(first), *rest = scratch_.rest_of_keys.get();
        float* scores = scratch_.scores;
        scratch_.products.multiply({queries, width, keys, W * kPage, scores, kPage, whole, slots, false});
        if (key_.rest)
            scratch_.products.multiply({queries + whole, width, rest, W * kPage, scores, kPage, key_.step, slots, true});
        if (step_.softcap > 0) cap<T>(scores, tile_rows_ * kPage, step_.scaling, step_.softcap);
    }

    void add_values(int64_t first, const T* values, int64_t slots) {
        const int64_t width = value_.padded(), whole = value_.whole, step = value_.step;
        const T *weights = scratch_.weights, *rest = scratch_.rest_of_values.get();
        float* sums = sums_of(first);
        scratch_.products.multiply({weights, kPage, values, W * value_.size, sums, width, slots, whole, true});
        if (value_.rest)
            scratch_.products.multiply({weights, kPage, rest, W * step, sums + whole, width, slots, step, true});
    }

    float scale() const { return step_.softcap > 0 ? 1.0f : step_.scaling * kLog2E; }

    // The slots of the page from `origin` on that row n sees, [begin, end).
    std::pair<int64_t, int64_t> seen(int64_t n, int64_t origin) const {
        const int64_t position = block_.first + n / step_.group;
        return {std::max<int64_t>(step_.begin(position) - origin, 0), std::min(position + 1 - origin, kPage)};
    }

    // How many of them products take to have all that row n sees.
    int64_t slots_for(int64_t n, int64_t origin) const {
        return parts(seen(n, origin).second, Products<T>::kColumnStep) * Products<T>::kColumnStep;
    }

    const Step<T>& step_;
    const Block& block_;
    const int64_t head_, rows_, tiles_, tile_rows_;
    const Size key_, value_;
    Scratch<T>& scratch_;
};

// The step's rows as blocks, those with the most to compute first, so that no thread begins a long one at the end.
template <typename T>
std::vector<Block> blocks_of(const int32_t* tables, int64_t table_stride, const int64_t* sequences,
                             const int64_t* positions, int64_t rows, const Step<T>& step) {
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

template <typename T>
void attend(const Step<T>& step, const std::vector<Block>& blocks) {
    const int64_t kv_heads = step.cache.kv_heads, tasks = (int64_t)blocks.size() * kv_heads;
    bool has_parts = false;
    int64_t most = 1;
    for (const Block& block : blocks) {
        has_parts |= !block.is_alone;
        most = std::max(most, block.rows);
    }
    // A block whose sequence has others must find their keys written; one that is alone writes its own.
    if (has_parts)
        share_each(tasks, 1, [&](int64_t task) {
            if (!blocks[task / kv_heads].is_alone) write_block(step, blocks[task / kv_heads], task % kv_heads);
        });
    share(tasks, [&](Pieces& pieces) {
        Scratch<T> scratch(most * step.group, step.cache.key_size, step.cache.value_size);
        for (const int64_t task : pieces) {
            const Block& block = blocks[task / kv_heads];
            if (block.is_alone) write_block(step, block, task % kv_heads);
            Attention(step, block, task % kv_heads, scratch).run();
        }
    });
}

template <typename T>
void paged_attention(const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride, int64_t v_stride, T* keys,
                     T* values, const int32_t* tables, int64_t table_stride, const int64_t* sequences,
                     const int64_t* positions, const float* sinks, T* out, int64_t rows, int64_t heads,
                     int64_t kv_heads, int64_t key_size, int64_t value_size, float scaling, float softcap,
                     int64_t window, int64_t chunk) {
    const Cache<T> cache{keys, values, kv_heads, key_size, value_size};
    const Step<T> step{q,   k,     v,                q_stride, k_stride, v_stride, cache, sinks,
                       out, heads, heads / kv_heads, scaling,  softcap,  window,   chunk};
    attend(step, blocks_of(tables, table_stride, sequences, positions, rows, step));
}

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// Write the rows' keys and values into their pages, then attend: out [rows, heads * value_size].
//
// q, k and v are rows of heads, `stride` elements apart; row r stands at positions[r] of the sequence whose pages are
// tables[sequences[r]][..]. Rows of one sequence must come one after the other, in order of their positions, and a page
// that they write to must be of no other. Queries and keys have key_size numbers, which must be even in bfloat16;
// values have value_size.
//
// A row at position p sees those up to its own: the last `window` of them, and those from p / chunk * chunk on. A window
// or chunk of 0 is none, a softcap of 0 caps nothing. `sinks` [heads], or null, are logits that take a share of their
// head's attention and give nothing.
EXPORT int paged_attention_bf16(int64_t threads, const bf16* q, const bf16* k, const bf16* v, int64_t q_stride,
                                int64_t k_stride, int64_t v_stride, bf16* keys, bf16* values, const int32_t* tables,
                                int64_t table_stride, const int64_t* sequences, const int64_t* positions,
                                const float* sinks, bf16* out, int64_t rows, int64_t heads, int64_t kv_heads,
                                int64_t key_size, int64_t value_size, float scaling, float softcap, int64_t window,
                                int64_t chunk) {
    return called(threads, [&] {
        paged_attention(q, k, v, q_stride, k_stride, v_stride, keys, values, tables, table_stride, sequences, positions,
                        sinks, out, rows, heads, kv_heads, key_size, value_size, scaling, softcap, window, chunk);
    });
}
EXPORT int paged_attention_f32(int64_t threads, const float* q, const float* k, const float* v, int64_t q_stride,
                               int64_t k_stride, int64_t v_stride, float* keys, float* values, const int32_t* tables,
                               int64_t table_stride, const int64_t* sequences, const int64_t* positions,
                               const float* sinks, float* out, int64_t rows, int64_t heads, int64_t kv_heads,
                               int64_t key_size, int64_t value_size, float scaling, float softcap, int64_t window,
                               int64_t chunk) {
    return called(threads, [&] {
        paged_attention(q, k, v, q_stride, k_stride, v_stride, keys, values, tables, table_stride, sequences, positions,
                        sinks, out, rows, heads, kv_heads, key_size, value_size, scaling, softcap, window, chunk);
    });
}
