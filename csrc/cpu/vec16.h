// The vector type of AVX-512.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

// Sixteen floats in one AVX-512 register. tiles.h says what a vector type has.
struct Vec16 {
  static constexpr int N = 16;
  typedef __m512 type;
  static inline type zero() { return _mm512_setzero_ps(); }
  static inline type load(const float* p) { return _mm512_loadu_ps(p); }
  static inline type broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static inline void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  // A mask of the lanes below `count`, which may be any int. The other lanes are read as 0 and not written.
  static inline __mmask16 first(int count) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(count), lane);
  }
  static inline type load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static inline void store_part(float* p, type v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  static inline type add(type a, type b) { return _mm512_add_ps(a, b); }
  static inline type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  // to[i] = the sum of the lanes of the i-th vector.
  static inline void sum_lanes(float* to, type a, type b, type c, type d) {
    // The masked forms with every lane: of the plain ones GCC 12 says that they read what was never written.
    constexpr __mmask16 ALL = 0xffff;
    const type ab = _mm512_add_ps(_mm512_maskz_unpacklo_ps(ALL, a, b), _mm512_maskz_unpackhi_ps(ALL, a, b));
    const type cd = _mm512_add_ps(_mm512_maskz_unpacklo_ps(ALL, c, d), _mm512_maskz_unpackhi_ps(ALL, c, d));
    // Each quarter holds a sum of a, b, c and d.
    const type sums =
        _mm512_add_ps(_mm512_maskz_shuffle_ps(ALL, ab, cd, 0x44), _mm512_maskz_shuffle_ps(ALL, ab, cd, 0xee));
    const __m256 lower = _mm512_maskz_extractf32x8_ps((__mmask8)ALL, sums, 0);
    const __m256 halves = _mm256_add_ps(lower, _mm512_maskz_extractf32x8_ps((__mmask8)ALL, sums, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
  // vmaxps returns its second operand when either is NaN, so a NaN in `v` stays.
  static inline type relu(type v) { return _mm512_max_ps(zero(), v); }
  static inline type max_second_nan(type a, type b) { return _mm512_max_ps(a, b); }
  // For the same reason a NaN in `b` stays; one in `a` is put back.
  static inline type max_nan(type a, type b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  typedef __mmask16 Mask;
  static inline Mask positive(type v) { return _mm512_cmp_ps_mask(v, zero(), _CMP_NLE_UQ); }  // or NaN
  static inline Mask greater_or_nan(type a, type b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  }
  static inline type select(Mask m, type a, type b) { return _mm512_mask_mov_ps(b, m, a); }
  static inline type where(Mask m, type v) { return _mm512_maskz_mov_ps(m, v); }
  static inline type where_not(Mask m, type v) { return _mm512_maskz_mov_ps((Mask)~m, v); }
  typedef __m512i Lanes;
  static inline Lanes lanes(const int32_t* numbers) { return _mm512_loadu_si512(numbers); }
  static inline type moved(type v, Lanes from) {
    return _mm512_maskz_permutexvar_ps(_mm512_cmpge_epi32_mask(from, _mm512_setzero_si512()), from, v);
  }
};

}  // namespace
