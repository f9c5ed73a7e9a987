// Vectors of 16 floats as two of AVX2's, with the functions of simd_avx512.h.
#pragma once

namespace recontrol {
namespace {

struct Floats {
    __m256 low, high;
};
struct Mask {
    __m256 low, high;  // all bits of a lane, or none
};

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }

inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fms(Floats a, Floats b, Floats c) {
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats nearest(Floats x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
// x 2^n for whole n from -126 to 127.
inline __m256 times_power_of_two(__m256 x, __m256 n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
inline Floats times_power_of_two(Floats x, Floats n) {
    return {times_power_of_two(x.low, n.low), times_power_of_two(x.high, n.high)};
}
inline float sum_of(Floats x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest_of(Floats x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline Mask first_lanes(int64_t count) {
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i limit = _mm256_set1_epi32((int)(count > kLanes ? kLanes : count < 0 ? 0 : count));
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, number)),
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, _mm256_add_epi32(number, _mm256_set1_epi32(8))))};
}
inline Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.low, b.low), _mm256_and_ps(a.high, b.high)}; }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline Mask but_not(Mask a, Mask b) { return {_mm256_andnot_ps(b.low, a.low), _mm256_andnot_ps(b.high, a.high)}; }
inline unsigned bits_of(Mask a) { return _mm256_movemask_ps(a.low) | _mm256_movemask_ps(a.high) << 8; }
inline bool any(Mask a) { return bits_of(a) != 0; }
template <int kComparison>
inline Mask compared(Floats a, Floats b) {
    return {_mm256_cmp_ps(a.low, b.low, kComparison), _mm256_cmp_ps(a.high, b.high, kComparison)};
}
inline Mask is_less(Floats a, Floats b) { return compared<_CMP_LT_OQ>(a, b); }
inline Mask is_at_least(Floats a, Floats b) { return compared<_CMP_GE_OQ>(a, b); }
inline Mask is_nan(Floats x) { return compared<_CMP_UNORD_Q>(x, x); }
inline Floats choose(Mask mask, Floats yes, Floats no) {
    return {_mm256_blendv_ps(no.low, yes.low, mask.low), _mm256_blendv_ps(no.high, yes.high, mask.high)};
}
inline Floats load(const float* p, Mask mask, Floats rest) {
    const Floats loaded = {_mm256_maskload_ps(p, _mm256_castps_si256(mask.low)),
                           _mm256_maskload_ps(p + 8, _mm256_castps_si256(mask.high))};
    return choose(mask, loaded, rest);
}
inline void store(float* p, Mask mask, Floats x) {
    _mm256_maskstore_ps(p, _mm256_castps_si256(mask.low), x.low);
    _mm256_maskstore_ps(p + 8, _mm256_castps_si256(mask.high), x.high);
}
// Lanes of the mask one after the other; returns how many.
inline int64_t store_chosen(float* p, Mask mask, Floats x) {
    alignas(32) float lanes[kLanes];
    store(lanes, x);
    float* const begin = p;
    for (unsigned bits = bits_of(mask); bits; bits &= bits - 1) *p++ = lanes[__builtin_ctz(bits)];
    return p - begin;
}

inline __m256 widened(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Floats load_bf16(const bf16* p) {
    return {widened(_mm_loadu_si128((const __m128i*)p)), widened(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Floats load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
// To the nearest, ties to even; a NaN stays one.
inline __m256i rounded_bits(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7FFF), _mm256_and_si256(high, _mm256_set1_epi32(1)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline void store_bf16(bf16* p, Floats x) {
    const __m256i packed = _mm256_packus_epi32(rounded_bits(x.low), rounded_bits(x.high));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xD8));
}
inline void store_bf16(bf16* p, Mask mask, Floats x) {
    alignas(32) bf16 lanes[kLanes];
    store_bf16(lanes, x);
    for (unsigned bits = bits_of(mask); bits; bits &= bits - 1) p[__builtin_ctz(bits)] = lanes[__builtin_ctz(bits)];
}
inline Floats round_bf16(Floats x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(rounded_bits(x.low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(rounded_bits(x.high), 16))};
}

// Pairs of bfloat16 numbers, widened.
struct Pairs {
    Floats even, odd;
};
inline __m256 upper(__m256i x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xFFFF0000)));
}
inline __m256 lower(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Floats load_even(const bf16* p) {
    return {lower(_mm256_loadu_si256((const __m256i*)p)), lower(_mm256_loadu_si256((const __m256i*)(p + 16)))};
}
inline Floats load_odd(const bf16* p) {
    return {upper(_mm256_loadu_si256((const __m256i*)p)), upper(_mm256_loadu_si256((const __m256i*)(p + 16)))};
}
inline Pairs load_pairs(const bf16* p) { return {load_even(p), load_odd(p)}; }
inline Pairs all_pairs(int32_t pair) {
    const __m256i a = _mm256_set1_epi32(pair);
    return {{lower(a), lower(a)}, {upper(a), upper(a)}};
}
inline Floats dot(Floats sum, Pairs a, Pairs b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }

// Of 16 pairs of signed bytes, the first numbers or the second.
inline Floats load_int8_floats(const uint8_t* p, int is_second) {
    const auto eight = [is_second](const uint8_t* from) {
        const __m256i pairs = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, is_second ? 16 : 24), 24));
    };
    return {eight(p), eight(p + 16)};
}
// Of numbers of 4 bits, the lower ones of bytes or the higher.
inline Floats load_int4_floats(const uint8_t* p, int is_high, int is_second) {
    const auto eight = [shift = 4 * is_high + 8 * is_second](const uint8_t* from) {
        const __m256i pairs = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(pairs, shift), _mm256_set1_epi32(15)));
    };
    return {eight(p), eight(p + 16)};
}

}  // namespace
}  // namespace recontrol
