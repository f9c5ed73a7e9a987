// Attention of a step's rows over a paged key-value cache, and the writing of their keys and values into it.
//
// A page holds kPage positions of one sequence, for each key-value head. Keys lie as [P / 2][kPage][2], so that one
// vector holds a pair of dimensions of 16 positions; values as [kPage / 2][P][2], so that one holds a pair of positions
// of 16 dimensions. Every query is computed by itself, in the order of the positions: how a prompt was cut into chunks,
// and what else a step holds, cannot be seen in the numbers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.h"

// Not on levels below: their library has no attention, and torch does it.
#ifdef __AVX512BF16__

namespace recontrol {
namespace {

constexpr int64_t kPage = 64;
constexpr int kMaxQueries = 8;

struct Cache {
    bf16* keys;
    bf16* values;
    int64_t kv_heads, head_size;
    int64_t page(int32_t page, int64_t head) const { return (page * kv_heads + head) * kPage * head_size; }
};

struct Options {
    float scaling, softcap;
    int64_t window;
};

// Consecutive positions first.. of one sequence, as many as there are rows.
struct Span {
    int64_t row, rows, first;
    const int32_t* table;
};

inline __m512bh pair_of(const bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

void write(const Cache& cache, const int32_t* table, int64_t position, int64_t head, const bf16* key,
           const bf16* value, bool is_followed) {
    const int64_t at = cache.page(table[position / kPage], head), slot = position % kPage;
    bf16* k = cache.keys + at + 2 * slot;
    for (int64_t i = 0; i < cache.head_size; i += 2) {
        k[i * kPage] = key[i];
        k[i * kPage + 1] = key[i + 1];
    }
    bf16* v = cache.values + at + (slot / 2) * 2 * cache.head_size;
    for (int64_t i = 0; i < cache.head_size; ++i) v[2 * i + slot % 2] = value[i];
    // The pair's other half is not written yet; zero, so that nothing stale meets a weight of zero.
    if (slot % 2 == 0 && !is_followed)
        for (int64_t i = 0; i < cache.head_size; ++i) v[2 * i + 1] = 0;
}

template <int Q>
void score(const bf16* const* queries, const bf16* keys, int64_t head_size, int64_t slots, float* scores,
           int64_t stride, float scaling) {
    for (int64_t s = 0; s < slots; s += kLanes) {
        __m512 acc[Q];
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) acc[q] = _mm512_setzero_ps();
        for (int64_t i = 0; i < head_size; i += 2) {
            const __m512bh k = (__m512bh)_mm512_loadu_si512(keys + i * kPage + 2 * s);
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) acc[q] = _mm512_dpbf16_ps(acc[q], k, pair_of(queries[q] + i));
        }
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q)
            _mm512_storeu_ps(scores + q * stride + s, _mm512_mul_ps(acc[q], _mm512_set1_ps(scaling)));
    }
}

template <int Q>
void gather(const bf16* weights, int64_t stride, const bf16* values, int64_t head_size, int64_t slots, float* out) {
    for (int64_t i = 0; i < head_size; i += kLanes) {
        __m512 acc[Q];
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) acc[q] = _mm512_loadu_ps(out + q * head_size + i);
        for (int64_t s = 0; s < slots; s += 2) {
            const __m512bh v = (__m512bh)_mm512_loadu_si512(values + (s * head_size + 2 * i));
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) acc[q] = _mm512_dpbf16_ps(acc[q], v, pair_of(weights + q * stride + s));
        }
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) _mm512_storeu_ps(out + q * head_size + i, acc[q]);
    }
}

using Score = void (*)(const bf16* const*, const bf16*, int64_t, int64_t, float*, int64_t, float);
using Gather = void (*)(const bf16*, int64_t, const bf16*, int64_t, int64_t, float*);
constexpr Score kScore[] = {nullptr,  score<1>, score<2>, score<3>, score<4>,
                            score<5>, score<6>, score<7>, score<8>};
constexpr Gather kGather[] = {nullptr,   gather<1>, gather<2>, gather<3>, gather<4>,
                              gather<5>, gather<6>, gather<7>, gather<8>};

// Softmax weights of positions [begin, end) in place of their scores, in bfloat16; others get zero. Returns 1 / sum.
float weigh(float* scores, bf16* weights, int64_t length, int64_t begin, int64_t end, float softcap) {
    const __m512 low = _mm512_set1_ps(-INFINITY);
    __m512 highest = low;
    for (int64_t s = 0; s < length; s += kLanes) {
        const __mmask16 mask = first_lanes(std::max<int64_t>(end - s, 0)) & (__mmask16)~first_lanes(std::max<int64_t>(begin - s, 0));
        __m512 x = _mm512_mask_loadu_ps(low, mask, scores + s);
        if (softcap > 0) {
            // c tanh(x / c) = c (1 - 2 / (exp(2 x / c) + 1))
            const __m512 e = exp(_mm512_mul_ps(x, _mm512_set1_ps(2.0f / softcap)));
            const __m512 t = _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
            x = _mm512_mask_mul_ps(low, mask, _mm512_sub_ps(_mm512_set1_ps(1.0f), t), _mm512_set1_ps(softcap));
        }
        _mm512_storeu_ps(scores + s, x);
        highest = _mm512_max_ps(highest, x);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < length; s += kLanes) {
        const __m512 weight = exp(_mm512_sub_ps(_mm512_loadu_ps(scores + s), top));
        sum = _mm512_add_ps(sum, weight);
        store_bf16(weights + s, weight);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

// One key-value head over the rows of a span; `group` queries share the head.
void attend(const Cache& cache, const Options& how, const bf16* q, int64_t q_stride, bf16* out, int64_t out_stride,
            int64_t head, int64_t group, const Span& span, std::vector<float>& scores, std::vector<bf16>& weights) {
    const int64_t size = cache.head_size, last = span.first + span.rows - 1;
    const int64_t first_page = how.window > 0 ? std::max<int64_t>(span.first + 1 - how.window, 0) / kPage : 0;
    const int64_t origin = first_page * kPage, length = last + 1 - origin;
    const int64_t stride = (length + kLanes - 1) / kLanes * kLanes;
    const int queries = (int)(span.rows * group);
    const bf16* pointers[kMaxQueries];
    for (int n = 0; n < queries; ++n)
        pointers[n] = q + (span.row + n / group) * q_stride + (head * group + n % group) * size;
    scores.resize(queries * stride);
    weights.resize(queries * stride);
    for (int64_t page = first_page; page <= last / kPage; ++page) {
        const int64_t at = page * kPage - origin, slots = std::min(kPage, length - at);
        kScore[queries](pointers, cache.keys + cache.page(span.table[page], head), size, slots, scores.data() + at,
                        stride, how.scaling);
    }
    float inverse[kMaxQueries];
    for (int n = 0; n < queries; ++n) {
        const int64_t end = span.first + n / group + 1;
        const int64_t begin = how.window > 0 ? std::max<int64_t>(end - how.window, 0) : 0;
        inverse[n] = weigh(scores.data() + n * stride, weights.data() + n * stride, length, begin - origin,
                           end - origin, how.softcap);
    }
    std::vector<float> sums(queries * size, 0.0f);
    for (int64_t page = first_page; page <= last / kPage; ++page) {
        const int64_t at = page * kPage - origin, slots = std::min(kPage, length - at);
        kGather[queries](weights.data() + at, stride, cache.values + cache.page(span.table[page], head), size, slots,
                         sums.data());
    }
    for (int n = 0; n < queries; ++n) {
        bf16* target = out + (span.row + n / group) * out_stride + (head * group + n % group) * size;
        for (int64_t i = 0; i < size; i += kLanes)
            store_bf16(target + i, _mm512_mul_ps(_mm512_loadu_ps(sums.data() + n * size + i), _mm512_set1_ps(inverse[n])));
    }
}

}  // namespace
}  // namespace recontrol

using namespace recontrol;

// Write the rows' keys and values into their pages, then attend: out [rows, heads * head_size].
//
// q, k and v are rows of heads, `stride` elements apart; row r stands at positions[r] of the sequence whose pages are
// tables[sequences[r]][..]. Rows of one sequence must come one after the other, in order of their positions. A window of 0 attends to
// everything, a softcap of 0 caps nothing. head_size must be a multiple of 32, heads / kv_heads at most 8.
EXPORT void paged_attention_bf16(const bf16* q, const bf16* k, const bf16* v, int64_t q_stride, int64_t k_stride,
                                 int64_t v_stride, bf16* keys, bf16* values, const int32_t* tables,
                                 int64_t table_stride, const int64_t* sequences, const int64_t* positions, bf16* out,
                                 int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_size, float scaling,
                                 float softcap, int64_t window) {
    const Cache cache{keys, values, kv_heads, head_size};
    const Options how{scaling, softcap, window};
    const int64_t group = heads / kv_heads, most = std::max<int64_t>(kMaxQueries / group, 1);
    const auto table = [&](int64_t r) { return tables + sequences[r] * table_stride; };
    // A page that is written to belongs to one sequence alone, so the page tells whether two rows are of the same.
    const auto continues = [&](int64_t r) {
        if (r == 0 || r == rows || positions[r] != positions[r - 1] + 1) return false;
        const int64_t page = positions[r - 1] / kPage;
        return table(r)[page] == table(r - 1)[page];
    };
    std::vector<Span> spans;
    for (int64_t r = 0; r < rows; ++r) {
        if (continues(r) && spans.back().rows < most)
            ++spans.back().rows;
        else
            spans.push_back({r, 1, positions[r], table(r)});
    }
    // A task is one span and head: enough of them to share out when there are few rows, and long ones do not wait.
    const int64_t tasks = (int64_t)spans.size() * kv_heads;
#pragma omp parallel
    {
        std::vector<float> scores;
        std::vector<bf16> weights;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t head = 0; head < kv_heads; ++head)
                write(cache, table(r), positions[r], head, k + r * k_stride + head * head_size,
                      v + r * v_stride + head * head_size, continues(r + 1));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task)
            attend(cache, how, q, q_stride, out, heads * head_size, task % kv_heads, group, spans[task / kv_heads], scores,
                   weights);
    }
}

#endif
