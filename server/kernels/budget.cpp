// Edits whose change of the logits is there, row by row: how far each may go, and going there.
#include <memory>

#include "budget.h"
#include "pool.h"

using namespace recontrol;

// For rows[r] of logits [.., vocabulary], rows `stride` apart: scales[r] in [0, 1] and divergences[r], within limits[r],
// of moving by scales[r] * delta[r], delta [num_rows, vocabulary]. Both are 0 where a change is not finite.
EXPORT int largest_scales_f32(int64_t threads, const float* logits, int64_t stride, int64_t vocabulary,
                              const int64_t* rows, int64_t num_rows, const float* delta, const float* limits,
                              float* scales, float* divergences) {
    return called(threads, [&] {
        share(num_rows, [&](Pieces& pieces) {
            const std::unique_ptr<float[]> probs(new float[vocabulary]);
            for (const int64_t r : pieces) {
                const float* change = delta + r * vocabulary;
                const float peak = largest_if_finite(change, vocabulary);
                scales[r] = divergences[r] = 0;
                if (std::isnan(peak)) continue;
                const Row row(logits + rows[r] * stride, change, peak, 1.0f, nullptr, vocabulary, probs.get());
                search(row, limits[r], scales + r, divergences + r);
            }
        });
    });
}

// Moves rows[r] of logits [.., vocabulary], rows `stride` apart, by scales[r] * delta[r], where that scale is above 0.
EXPORT int move_rows_f32(int64_t threads, float* logits, int64_t stride, int64_t vocabulary, const int64_t* rows,
                         int64_t num_rows, const float* delta, const float* scales) {
    return called(threads, [&] {
        share(num_rows, [&](Pieces& pieces) {
            for (const int64_t r : pieces)
                if (scales[r] > 0) move(logits + rows[r] * stride, delta + r * vocabulary, scales[r], vocabulary);
        });
    });
}
