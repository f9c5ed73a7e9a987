// What the kernels share: bfloat16 as raw bits, and exp over a vector of floats.
//
// Every kernel computes a row of the batch from that row alone, in an order of summation that depends on nothing but
// the row's own sizes. So a row has the same bits in every batch.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace recontrol {

using bf16 = uint16_t;
constexpr int kLanes = 16;

inline __m512 load_bf16(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline void store_bf16(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

// Rounds to bfloat16 and back, where the model's own code keeps an intermediate result in bfloat16.
inline __m512 round_bf16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

inline __mmask16 lanes_left(int64_t left) { return left >= kLanes ? (__mmask16)0xFFFF : (__mmask16)((1u << left) - 1); }

// exp(x), relative error below 2e-7; 0 below -87.3 and for -inf, NaN stays NaN. Cephes' polynomial.
inline __m512 exp_ps(__m512 x) {
    const __m512 lowest = _mm512_set1_ps(-87.3f);
    // The operand order matters: max and min give back their second operand for a NaN.
    const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(lowest, x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), bounded);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    y = _mm512_scalef_ps(y, n);
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, lowest, _CMP_LT_OQ), _mm512_setzero_ps());
}

// A row's 32 outputs from `column` on, to y (float32 or bfloat16) at `row`, with the bias if there is one.
inline void store_panel(const __m512* sums, void* y, int64_t row, int64_t column, int64_t outputs, const float* bias,
                        int out_f32) {
    for (int half = 0; half < 2; ++half, column += kLanes) {
        if (column >= outputs) return;
        const __mmask16 mask = lanes_left(outputs - column);
        __m512 value = sums[half];
        if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + column));
        if (out_f32)
            _mm512_mask_storeu_ps((float*)y + row + column, mask, value);
        else
            _mm256_mask_storeu_epi16((bf16*)y + row + column, mask, (__m256i)_mm512_cvtneps_pbh(value));
    }
}

}  // namespace recontrol
