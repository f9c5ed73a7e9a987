#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace recontrol {
namespace {

using Clock = std::chrono::steady_clock;

// The next call of a step comes within so long; a piece takes less.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kPausesBetweenLooks = 8;

template <class Condition>
bool spin_until(const Condition& holds) {
    const auto end = Clock::now() + kSpin;
    do {
        for (int i = 0; i < kPausesBetweenLooks; ++i) {
            if (holds()) return true;
            _mm_pause();
        }
    } while (Clock::now() < end);
    return holds();
}

// Threads and the one call that they work at.
class Pool {
   public:
    // False, and nothing done, if they are at another's call.
    bool run(int64_t threads, Stretches& stretches, Work& work) {
        if (is_taken_.exchange(true, std::memory_order_acquire)) return false;
        const uint64_t places = helpers(threads - 1);
        stretches_ = &stretches, work_ = &work, error_ = nullptr, places_ = places;
        num_left_.store(0, std::memory_order_relaxed);
        const uint64_t call = (offer_.load(std::memory_order_relaxed) / (kPlaces + 1) + 1) * (kPlaces + 1);
        offer_.store(call + places);
        wake(places);
        take_part(0);
        const uint64_t left = offer_.exchange(call) - call;
        wait_for(places - left);
        const std::exception_ptr error = error_;
        is_taken_.store(false, std::memory_order_release);
        if (error) std::rethrow_exception(error);
        return true;
    }

   private:
    // An offer is the number of a call, above, and of the helpers that may yet join it, in its lowest bits.
    static constexpr uint64_t kPlaces = 0xFFFF;

    // How many there are, of those that are wanted.
    int64_t helpers(int64_t wanted) {
        while (num_helpers_ < std::min(wanted, most_helpers_)) start();
        return std::min(num_helpers_, wanted);
    }

    // One more, or, where no more are allowed here, it is done with those that there are. Signals are for the program's
    // own threads.
    void start() {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            std::thread([this] { help(); }).detach();
            ++num_helpers_;
        } catch (const std::exception&) {
            most_helpers_ = num_helpers_;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void help() {
        while (true) {
            uint64_t offer = wait_for_offer();
            // The call is over only when all who joined have left it, and the number tells calls apart.
            if (!offer_.compare_exchange_strong(offer, offer - 1)) continue;
            if (!stretches_->are_taken()) take_part((int64_t)(places_ + 1 - (offer & kPlaces)));
            num_left_.fetch_add(1);
            if (is_caller_asleep_.load()) {
                { const std::lock_guard lock(mutex_); }
                caller_.notify_one();
            }
        }
    }

    void take_part(int64_t thread) {
        try {
            Pieces pieces(*stretches_, thread);
            work_->run(pieces);
        } catch (...) {
            stretches_->abandon();
            const std::lock_guard lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    uint64_t wait_for_offer() {
        uint64_t offer;
        const auto is_there = [&] { return ((offer = offer_.load()) & kPlaces) != 0; };
        if (spin_until(is_there)) return offer;
        std::unique_lock lock(mutex_);
        ++num_asleep_;
        helpers_.wait(lock, is_there);
        --num_asleep_;
        return offer;
    }

    void wake(uint64_t count) {
        uint64_t asleep = std::min<uint64_t>(num_asleep_.load(), count);
        if (asleep == 0) return;
        { const std::lock_guard lock(mutex_); }
        while (asleep-- > 0) helpers_.notify_one();
    }

    void wait_for(uint64_t helpers) {
        const auto have_left = [&] { return num_left_.load() == helpers; };
        if (spin_until(have_left)) return;
        is_caller_asleep_.store(true);
        std::unique_lock lock(mutex_);
        caller_.wait(lock, have_left);
        is_caller_asleep_.store(false);
    }

    std::atomic<bool> is_taken_{false};
    int64_t num_helpers_ = 0, most_helpers_ = kPlaces;
    uint64_t places_ = 0;
    Stretches* stretches_ = nullptr;
    Work* work_ = nullptr;
    std::exception_ptr error_;
    alignas(64) std::atomic<uint64_t> offer_{0};
    alignas(64) std::atomic<uint64_t> num_left_{0}, num_asleep_{0};
    std::atomic<bool> is_caller_asleep_{false};
    std::mutex mutex_;
    std::condition_variable helpers_, caller_;
};

// Never destroyed, since its threads outlive whatever else ends at exit.
std::atomic<Pool*> the_pool{nullptr};

// A forked process has none of its parent's threads, and their locks as they happened to be: it gets its own pool.
[[maybe_unused]] const int is_registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });

Pool& pool() {
    Pool* current = the_pool.load();
    if (current) return *current;
    Pool* made = new Pool;
    if (the_pool.compare_exchange_strong(current, made)) return *made;
    delete made;
    return *current;
}

thread_local int64_t threads_of_call = 1;

}  // namespace

Threads::Threads(int64_t count) : before_(threads_of_call) { threads_of_call = count; }
Threads::~Threads() { threads_of_call = before_; }

Stretches::Stretches(int64_t count, int64_t threads)
    : count_(count), num_(std::max<int64_t>(std::min(threads, kMost), 1)) {
    for (int64_t s = 0; s < num_; ++s) {
        stretches_[s].next.store(count * s / num_, std::memory_order_relaxed);
        stretches_[s].end = count * (s + 1) / num_;
    }
}

int64_t Stretches::take(int64_t& at) {
    for (int64_t tried = 0; tried < num_; ++tried, ++at) {
        Stretch& stretch = stretches_[at % num_];
        if (stretch.next.load(std::memory_order_relaxed) >= stretch.end) continue;
        const int64_t piece = stretch.next.fetch_add(1, std::memory_order_relaxed);
        if (piece < stretch.end) return piece;
    }
    return -1;
}

bool Stretches::are_taken() const {
    for (int64_t s = 0; s < num_; ++s)
        if (stretches_[s].next.load(std::memory_order_relaxed) < stretches_[s].end) return false;
    return true;
}

void Stretches::abandon() {
    for (int64_t s = 0; s < num_; ++s) stretches_[s].next.store(stretches_[s].end, std::memory_order_relaxed);
}

void share_work(int64_t count, Work& work) {
    const int64_t threads = std::min(threads_of_call, count);
    Stretches stretches(count, threads);
    if (threads > 1 && pool().run(threads, stretches, work)) return;
    Pieces pieces(stretches, 0);
    work.run(pieces);
}

}  // namespace recontrol
