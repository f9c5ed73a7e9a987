// Calls that show what threads of server/kernels/pool.h do, for test_pool.py.
#include "pool.h"

#include <chrono>
#include <mutex>
#include <set>
#include <thread>

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace recontrol;

static void sleep_us(int64_t us) {
    if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

// times[i] grows by one for each time that piece i is done; `of_threads` is how many threads did any.
EXPORT int count(int64_t threads, int64_t pieces, int64_t us, int64_t* times, int64_t* of_threads) {
    return called(threads, [&] {
        std::mutex mutex;
        std::set<std::thread::id> seen;
        share_each(pieces, 1, [&](int64_t piece) {
            times[piece] += 1;
            sleep_us(us);
            const std::lock_guard lock(mutex);
            seen.insert(std::this_thread::get_id());
        });
        *of_threads = (int64_t)seen.size();
    });
}

// Two pieces, each of which waits for the other to begin: 0 if they do within a minute.
EXPORT int meet(int64_t threads) {
    std::atomic<int> begun{0}, met{0};
    called(threads, [&] {
        share_each(2, 1, [&](int64_t) {
            ++begun;
            for (int i = 0; i < 60000 && begun.load() < 2; ++i) sleep_us(1000);
            if (begun.load() == 2) ++met;
        });
    });
    return met.load() == 2 ? 0 : 1;
}

// Each piece shares `inner` pieces of its own; sums[piece] grows by one for each.
EXPORT int nest(int64_t threads, int64_t pieces, int64_t inner, int64_t* sums) {
    return called(threads, [&] {
        share_each(pieces, 1, [&](int64_t piece) { share_each(inner, 1, [&](int64_t) { sums[piece] += 1; }); });
    });
}

// The pieces from `first` on find no memory, of which each before does some work.
EXPORT int fail(int64_t threads, int64_t pieces, int64_t first, int64_t* num_running) {
    std::atomic<int64_t> running{0};
    const int result = called(threads, [&] {
        share_each(pieces, 1, [&](int64_t piece) {
            ++running;
            sleep_us(100);
            --running;
            if (piece >= first) throw std::bad_alloc();
        });
    });
    *num_running = running.load();
    return result;
}
