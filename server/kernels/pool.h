// Threads that compute a kernel's pieces: whoever is free takes the next one, the caller too.
//
// A piece is some of the kernel's results, each computed whole and in one order, so that no number depends on who took
// which piece, or on how many threads there are. One that is stopped by a busy neighbour holds up no more than the
// piece in its hand. Threads wait by spinning for microseconds and then sleep; they start when first needed, and last
// as long as the process.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

namespace recontrol {

// The pieces [0, count) of one call, in a stretch for each thread that may take part.
class Stretches {
   public:
    Stretches(int64_t count, int64_t threads);
    Stretches(const Stretches&) = delete;

    // The next piece of the stretch `at`, or, when it has none left, of those behind it, and then `at` is that; or -1.
    int64_t take(int64_t& at);
    bool are_taken() const;
    // No more of them are handed out.
    void abandon();
    int64_t count() const { return count_; }

   private:
    static constexpr int64_t kMost = 64;
    struct alignas(64) Stretch {
        std::atomic<int64_t> next;
        int64_t end;
    };

    const int64_t count_, num_;
    Stretch stretches_[kMost];
};

// Those that one thread takes, as `for (const int64_t piece : pieces)`: of its own stretch, one behind the other, then
// what others have left.
class Pieces {
   public:
    Pieces(Stretches& of, int64_t thread) : of_(of), at_(thread) {}
    Pieces(const Pieces&) = delete;

    struct End {};
    class Taking {
       public:
        explicit Taking(Pieces& pieces) : pieces_(pieces), piece_(pieces.take()) {}
        int64_t operator*() const { return piece_; }
        void operator++() { piece_ = pieces_.take(); }
        bool operator!=(End) const { return piece_ >= 0; }

       private:
        Pieces& pieces_;
        int64_t piece_;
    };
    Taking begin() { return Taking(*this); }
    End end() { return {}; }

   private:
    int64_t take() { return of_.take(at_); }

    Stretches& of_;
    int64_t at_;
};

// What threads do with the pieces of a call.
class Work {
   public:
    virtual void run(Pieces& pieces) = 0;

   protected:
    ~Work() = default;
};

// Runs `work` on this thread and the others of its call at once, and returns when all pieces are done; what the first
// to fail threw is thrown here, once nobody works any longer, and pieces may then be left. Where the others are busy
// with another call, or this is called within a piece, this thread does all by itself.
void share_work(int64_t count, Work& work);

// `run(pieces)` on each thread that takes part, which takes its pieces from there.
template <class Run>
void share(int64_t count, const Run& run) {
    struct Of final : Work {
        const Run& run_;
        explicit Of(const Run& run) : run_(run) {}
        void run(Pieces& pieces) override { run_(pieces); }
    };
    Of work(run);
    share_work(count, work);
}

// `each(i)` for i in [0, count), `size` in a row to a piece.
template <class Each>
void share_each(int64_t count, int64_t size, const Each& each) {
    share((count + size - 1) / size, [&](Pieces& pieces) {
        for (const int64_t piece : pieces)
            for (int64_t i = piece * size; i < count && i < (piece + 1) * size; ++i) each(i);
    });
}

// How many threads, this one among them, share what it does while this lives; without, it works alone.
class Threads {
   public:
    explicit Threads(int64_t count);
    ~Threads();
    Threads(const Threads&) = delete;

   private:
    const int64_t before_;
};

// A call from outside, by so many threads. Gives 0, or 1 where there was no memory for it.
template <class Body>
int called(int64_t threads, const Body& body) {
    const Threads of_call(threads);
    try {
        body();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace recontrol
