// What stands between the matrix products of a Llama-like layer. Rounds to bfloat16 wherever transformers does.
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "simd.h"

using namespace recontrol;

// A piece is enough rows to be worth the handing out.
static int64_t rows_of_piece(int64_t size) { return std::max<int64_t>(8192 / size, 1); }

// residual += x (when x is not null), then out = weight * bf16(residual / rms(residual)).
// Shapes: x, residual, out [rows, size]; weight [size]; size a multiple of 16.
EXPORT int add_rms_norm_bf16(int64_t threads, const bf16* x, bf16* residual, const bf16* weight, bf16* out,
                             int64_t rows, int64_t size, float epsilon) {
    return called(threads, [&] {
        share_each(rows, rows_of_piece(size), [&](int64_t r) {
            bf16* row = residual + r * size;
            Floats squares = zeros();
            for (int64_t i = 0; i < size; i += kLanes) {
                Floats value = load_bf16(row + i);
                if (x) {
                    value = round_bf16(add(value, load_bf16(x + r * size + i)));
                    store_bf16(row + i, value);
                }
                squares = fma(value, value, squares);
            }
            const float mean = sum_of(squares) / (float)size;
            const Floats scale = all(1.0f / std::sqrt(mean + epsilon));
            for (int64_t i = 0; i < size; i += kLanes) {
                const Floats normed = round_bf16(mul(load_bf16(row + i), scale));
                store_bf16(out + r * size + i, mul(load_bf16(weight + i), normed));
            }
        });
    });
}

// out = bf16(silu(gate)) * up, for gate_up [rows, 2 * size] with the gates first; size a multiple of 16.
EXPORT int silu_mul_bf16(int64_t threads, const bf16* gate_up, bf16* out, int64_t rows, int64_t size) {
    return called(threads, [&] {
        share_each(rows, rows_of_piece(size), [&](int64_t r) {
            const bf16* gate = gate_up + r * 2 * size;
            for (int64_t i = 0; i < size; i += kLanes) {
                const Floats g = load_bf16(gate + i);
                const Floats one_plus = add(all(1.0f), exp(sub(zeros(), g)));
                const Floats activated = round_bf16(div(g, one_plus));
                store_bf16(out + r * size + i, mul(activated, load_bf16(gate + size + i)));
            }
        });
    });
}

// Rotate the queries and keys of qkv [rows, stride] in place: heads of head_size each, the first num_heads of a row.
// cosines, sines [positions, head_size / 2] float32; head_size a multiple of 32.
EXPORT int rotate_bf16(int64_t threads, bf16* qkv, int64_t stride, const int64_t* positions, const float* cosines,
                       const float* sines, int64_t rows, int64_t num_heads, int64_t head_size) {
    return called(threads, [&] {
        const int64_t half = head_size / 2;
        share_each(rows, rows_of_piece(num_heads * head_size), [&](int64_t r) {
            const float* c = cosines + positions[r] * half;
            const float* s = sines + positions[r] * half;
            for (int64_t h = 0; h < num_heads; ++h) {
                bf16* head = qkv + r * stride + h * head_size;
                for (int64_t i = 0; i < half; i += kLanes) {
                    const Floats cosine = load(c + i), sine = load(s + i);
                    const Floats a = load_bf16(head + i), b = load_bf16(head + half + i);
                    store_bf16(head + i, fms(a, cosine, mul(b, sine)));
                    store_bf16(head + half + i, fma(b, cosine, mul(a, sine)));
                }
            }
        });
    });
}
