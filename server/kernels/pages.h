// How keys and values lie in the pages of the cache: as products (product.h) take their right operand.
//
// A page holds kPage positions of one sequence, for each key-value head. With W numbers to a lane (2 of bfloat16, 1 of
// float32), keys lie as [key size / W][kPage][W], so that one vector holds W dimensions of 16 positions; values as
// [kPage / W][value size][W], so that one holds W positions of 16 dimensions.
#pragma once

#include <algorithm>

#include "simd.h"

namespace recontrol {
namespace {

constexpr int64_t kPage = 64;

// Numbers that share a lane of a vector.
template <typename T>
constexpr int64_t kPerLane = sizeof(float) / sizeof(T);

template <typename T>
struct Cache {
    T* keys;
    T* values;
    int64_t kv_heads, key_size, value_size;

    T* keys_of(int32_t page, int64_t head) const { return keys + (page * kv_heads + head) * kPage * key_size; }
    T* values_of(int32_t page, int64_t head) const { return values + (page * kv_heads + head) * kPage * value_size; }
};

// Where the value of a slot in one dimension lies in a page.
template <typename T>
int64_t value_at(int64_t slot, int64_t dimension, int64_t value_size) {
    constexpr int64_t W = kPerLane<T>;
    return slot / W * W * value_size + W * dimension + slot % W;
}

template <typename T>
void write(const Cache<T>& cache, const int32_t* table, int64_t position, int64_t head, const T* key, const T* value) {
    constexpr int64_t W = kPerLane<T>;
    const int64_t slot = position % kPage;
    T* keys = cache.keys_of(table[position / kPage], head) + W * slot;
    T* values = cache.values_of(table[position / kPage], head) + value_at<T>(slot, 0, cache.value_size);
    for (int64_t i = 0; i < cache.key_size; i += W) std::memcpy(keys + i * kPage, key + i, W * sizeof(T));
    for (int64_t i = 0; i < cache.value_size; ++i) values[W * i] = value[i];
}

// The bits of a number's exponent; what is not finite has all of them set.
inline uint32_t exponent_of(bf16 x) { return x & 0x7F80u; }
inline uint32_t exponent_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7F800000u;
}
inline uint32_t full_exponent(bf16) { return 0x7F80u; }
inline uint32_t full_exponent(float) { return 0x7F800000u; }

template <typename T>
bool is_finite(T x) {
    return exponent_of(x) != full_exponent(x);
}

template <typename T>
bool are_finite(const T* values, int64_t count) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, exponent_of(values[i]));
    return largest != full_exponent(T());
}

// The first values of a page, with zeros for what is not finite: a weight of zero does not make nothing of those.
template <typename T>
void copy_finite(const T* values, int64_t count, T* finite) {
    for (int64_t i = 0; i < count; ++i) finite[i] = is_finite(values[i]) ? values[i] : T{0};
}

// Adds to a row's sums [value_size] what `copy_finite` left out at the slots [begin, end), with the row's weights.
template <typename T>
void add_nonfinite(const T* weights, const T* values, int64_t value_size, int64_t begin, int64_t end, float* sums) {
    for (int64_t slot = begin; slot < end; ++slot)
        for (int64_t i = 0; i < value_size; ++i) {
            const T value = values[value_at<T>(slot, i, value_size)];
            if (!is_finite(value)) sums[i] += to_float(weights[slot]) * to_float(value);
        }
}

}  // namespace
}  // namespace recontrol
