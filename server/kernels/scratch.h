// What a thread works in while it attends: a block's queries, scores, weights and sums, and of each page what is padded.
#pragma once

#include <vector>

#include "product.h"
#include "rows.h"
#include "softmax.h"

namespace recontrol {
namespace {

// A size of heads as products take it: whole steps, and what is left over, which is padded to one more.
struct Size {
    int64_t size, step, whole, rest;

    Size(int64_t size, int64_t step) : size(size), step(step), whole(size / step * step), rest(size - whole) {}

    int64_t padded() const { return rest ? whole + step : whole; }
};

// A thread's own, for blocks of up to so many queries.
template <typename T>
struct Scratch {
    static constexpr int64_t W = kPerLane<T>;

    const Size key, value;
    Rows<T> queries, finite;
    Rows<T> rest_of_keys, rest_of_values;  // of the page, [step / W][kPage][W] and [kPage / W][step][W]
    Rows<float> sums;
    std::vector<Running> running;  // of each tile
    Products<T> products;
    alignas(64) float scores[kLanes * kPage];
    alignas(64) T weights[kLanes * kPage];

    Scratch(int64_t rows, int64_t key_size, int64_t value_size)
        : key(key_size, Products<T>::kDepthStep), value(value_size, Products<T>::kColumnStep),
          queries(make_rows<T>(rows + kLanes, key.padded())), finite(make_rows<T>(kPage, value_size)),
          rest_of_keys(make_rows<T>(kPage, key.step)), rest_of_values(make_rows<T>(kPage, value.step)),
          sums(make_rows<float>(rows + kLanes, value.padded())) {
        std::fill_n(rest_of_keys.get(), kPage * key.step, T{0});
        std::fill_n(rest_of_values.get(), kPage * value.step, T{0});
    }

    void copy_rest_of_keys(const T* keys) {
        std::copy_n(keys + key.whole * kPage, key.rest * kPage, rest_of_keys.get());
    }

    void copy_rest_of_values(const T* values, int64_t slots) {
        for (int64_t s = 0; s < slots; s += W)
            std::copy_n(values + s * value.size + W * value.whole, W * value.rest, rest_of_values.get() + s * value.step);
    }
};

}  // namespace
}  // namespace recontrol
