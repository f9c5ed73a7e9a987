// Memory that kernels work in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace recontrol {
namespace {

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows of `width` numbers; unlike a vector's, they begin a line of the cache and are not set.
template <typename T>
using Rows = std::unique_ptr<T[], void (*)(void*)>;

template <typename T>
Rows<T> make_rows(int64_t rows, int64_t width) {
    const int64_t lines = std::max<int64_t>(parts(rows * width * sizeof(T), 64), 1);
    void* memory = std::aligned_alloc(64, lines * 64);
    if (!memory) throw std::bad_alloc();
    return {(T*)memory, std::free};
}

}  // namespace
}  // namespace recontrol
