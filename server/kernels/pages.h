// How keys and values lie in the pages of the cache: as products of pairs (product.h) take their right operand.
//
// A page holds kPage positions of one sequence, for each key-value head. Keys lie as [P / 2][kPage][2], so that one
// vector holds a pair of dimensions of 16 positions; values as [kPage / 2][P][2], so that one holds a pair of positions
// of 16 dimensions.
#pragma once

#include <algorithm>

#include "simd.h"

namespace recontrol {
namespace {

constexpr int64_t kPage = 64;

struct Cache {
    bf16* keys;
    bf16* values;
    int64_t kv_heads, head_size;

    bf16* keys_of(int32_t page, int64_t head) const { return keys + (page * kv_heads + head) * kPage * head_size; }
    bf16* values_of(int32_t page, int64_t head) const { return values + (page * kv_heads + head) * kPage * head_size; }
};

// Where the value of a slot in one dimension lies in a page.
inline int64_t value_at(int64_t slot, int64_t dimension, int64_t head_size) {
    return slot / 2 * 2 * head_size + 2 * dimension + slot % 2;
}

inline void write(const Cache& cache, const int32_t* table, int64_t position, int64_t head, const bf16* key,
                  const bf16* value) {
    const int64_t slot = position % kPage;
    bf16* keys = cache.keys_of(table[position / kPage], head) + 2 * slot;
    bf16* values = cache.values_of(table[position / kPage], head) + value_at(slot, 0, cache.head_size);
    for (int64_t i = 0; i < cache.head_size; i += 2) std::memcpy(keys + i * kPage, key + i, 2 * sizeof(bf16));
    for (int64_t i = 0; i < cache.head_size; ++i) values[2 * i] = value[i];
}

// What is not finite has all bits of its exponent set.
constexpr bf16 kExponent = 0x7F80;

inline bool is_finite(bf16 x) { return (x & kExponent) != kExponent; }

inline bool are_finite(const bf16* values, int64_t count) {
    bf16 largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max<bf16>(largest, values[i] & kExponent);
    return largest != kExponent;
}

// The first values of a page, with zeros for what is not finite: a weight of zero does not make nothing of those.
inline void copy_finite(const bf16* values, int64_t count, bf16* finite) {
    for (int64_t i = 0; i < count; ++i) finite[i] = is_finite(values[i]) ? values[i] : 0;
}

inline float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Adds to a row's sums [head_size] what `copy_finite` left out at the slots [begin, end), with the row's weights.
inline void add_nonfinite(const bf16* weights, const bf16* values, int64_t head_size, int64_t begin, int64_t end,
                          float* sums) {
    for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t i = 0; i < head_size; ++i) {
            const bf16 value = values[value_at(slot, i, head_size)];
            if (!is_finite(value)) sums[i] += to_float(weights[slot]) * to_float(value);
        }
}

}  // namespace
}  // namespace recontrol
