// Vectors of 16 floats as AVX-512 has them, with its bfloat16 instructions where the level has those.
#pragma once

namespace recontrol {
namespace {

using Floats = __m512;
using Mask = __mmask16;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }

inline Mask first_lanes(int64_t count) {
    return count >= kLanes ? (Mask)0xFFFF : count <= 0 ? (Mask)0 : (Mask)((1u << count) - 1);
}
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline Mask but_not(Mask a, Mask b) { return a & (Mask)~b; }
inline bool any(Mask a) { return a != 0; }
inline Mask is_less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask is_at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask is_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline Floats choose(Mask mask, Floats yes, Floats no) { return _mm512_mask_blend_ps(mask, no, yes); }
inline Floats load(const float* p, Mask mask, Floats rest) { return _mm512_mask_loadu_ps(rest, mask, p); }
inline void store(float* p, Mask mask, Floats x) { _mm512_mask_storeu_ps(p, mask, x); }
// Lanes of the mask one after the other; returns how many.
inline int64_t store_chosen(float* p, Mask mask, Floats x) {
    _mm512_mask_compressstoreu_ps(p, mask, x);
    return __builtin_popcount(mask);
}

inline Floats widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Floats load_bf16(const bf16* p) { return widened(_mm256_loadu_si256((const __m256i*)p)); }
inline Floats load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

#ifdef __AVX512BF16__
inline __m256i narrowed(Floats x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
// To the nearest, ties to even; a NaN stays one.
inline __m256i narrowed(Floats x) {
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), _mm512_and_si512(high, _mm512_set1_epi32(1)));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan(x), rounded, quiet));
}
#endif
inline void store_bf16(bf16* p, Floats x) { _mm256_storeu_si256((__m256i*)p, narrowed(x)); }
inline void store_bf16(bf16* p, Mask mask, Floats x) { _mm256_mask_storeu_epi16(p, mask, narrowed(x)); }
inline Floats round_bf16(Floats x) { return widened(narrowed(x)); }

// 16 pairs of bfloat16 numbers, of which `dot` adds both products to each lane.
#ifdef __AVX512BF16__
using Pairs = __m512bh;
inline Pairs as_pairs(__m512i bits) { return (Pairs)bits; }
inline Floats dot(Floats sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }
#else
struct Pairs {
    Floats even, odd;
};
inline Floats lower(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Floats upper(__m512i x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xFFFF0000)));
}
inline Floats load_even(const bf16* p) { return lower(_mm512_loadu_si512(p)); }
inline Floats load_odd(const bf16* p) { return upper(_mm512_loadu_si512(p)); }
inline Pairs as_pairs(__m512i bits) { return {lower(bits), upper(bits)}; }
inline Floats dot(Floats sum, Pairs a, Pairs b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }
#endif
inline Pairs load_pairs(const bf16* p) { return as_pairs(_mm512_loadu_si512(p)); }
inline Pairs all_pairs(int32_t pair) { return as_pairs(_mm512_set1_epi32(pair)); }

// Of 16 pairs of signed bytes, the first numbers or the second.
inline Floats load_int8_floats(const uint8_t* p, int is_second) {
    const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, is_second ? 16 : 24), 24));
}
// Of numbers of 4 bits, the lower ones of bytes or the higher. The look-up reads four bits.
inline Floats load_int4_floats(const uint8_t* p, int is_high, int is_second) {
    alignas(64) static constexpr float kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4 * is_high + 8 * is_second), load(kNumbers));
}

#ifdef __AVX512BF16__
// 16 pairs of signed bytes. Whole numbers of so few bits are exact in the upper half of a float.
inline Pairs load_int8_pairs(const uint8_t* p) {
    const auto number = [p](int part) { return _mm512_castps_si512(load_int8_floats(p, part)); };
    return as_pairs(_mm512_or_si512(_mm512_srli_epi32(number(0), 16), number(1)));
}
// 32 pairs of numbers of 4 bits: a byte holds one of `low` below one of `high`. The look-up reads five bits, of which
// the table ignores the fifth.
inline void load_int4_pairs(const uint8_t* p, Pairs& low, Pairs& high) {
    alignas(64) static constexpr bf16 kNumbers[32] = {
        0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0,
        0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i table = _mm512_load_si512(kNumbers);
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
    low = as_pairs(_mm512_permutexvar_epi16(words, table));
    high = as_pairs(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table));
}
#endif

}  // namespace
}  // namespace recontrol
