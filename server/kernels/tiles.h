// What products on AMX's tiles share: the shapes of a thread's tiles, and the order of memory around them.
#pragma once

#include "simd.h"

#ifdef __AMX_BF16__
namespace recontrol {
namespace {

constexpr int kTileRows = 16;
constexpr int64_t kTileBytes = 64;

// GCC's tile instructions do not tell the compiler which memory they read and write. This does: what was written before
// is in memory, and what is read after comes from there.
inline void settle(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Gives each of this thread's tiles so many rows of 64 bytes; one of none is not used.
inline void shape_tiles(const int64_t (&rows)[8]) {
    alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i)
        if (rows[i]) config.bytes[i] = kTileBytes, config.rows[i] = (uint8_t)rows[i];
    settle(&config);
    _tile_loadconfig(&config);
}

}  // namespace
}  // namespace recontrol
#endif
