// Eight floats in one AVX register, for the AVX2 and the AVX-512 kernels. tiles.h says what a vector type has.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

struct Vec8 {
  static constexpr int N = 8;
  typedef __m256 type;
  static inline type zero() { return _mm256_setzero_ps(); }
  static inline type load(const float* p) { return _mm256_loadu_ps(p); }
  static inline type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static inline void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  // A mask of the lanes below `count`, which may be any int. The other lanes are read as 0 and not written.
  static inline __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static inline type load_part(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  static inline void store_part(float* p, type v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  static inline type add(type a, type b) { return _mm256_add_ps(a, b); }
  static inline type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  // to[i] = the sum of the lanes of the i-th vector.
  static inline void sum_lanes(float* to, type a, type b, type c, type d) {
    // Twice the sums of neighbours: the lower and the upper half each hold four sums of a, b, c and d.
    const type sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
  // vmaxps returns its second operand when either is NaN, so a NaN in `v` stays.
  static inline type relu(type v) { return _mm256_max_ps(zero(), v); }
  // For the same reason a NaN in `b` stays; one in `a` is put back.
  static inline type max_nan(type a, type b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  // All ones in the lanes for which it holds.
  typedef __m256 Mask;
  static inline Mask positive(type v) { return _mm256_cmp_ps(v, zero(), _CMP_NLE_UQ); }  // or NaN
  static inline Mask greater_or_nan(type a, type b) {
    return _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static inline type select(Mask m, type a, type b) { return _mm256_blendv_ps(b, a, m); }
  static inline type where(Mask m, type v) { return _mm256_and_ps(m, v); }
  static inline type where_not(Mask m, type v) { return _mm256_andnot_ps(m, v); }
  typedef __m256i Lanes;
  static inline Lanes lanes(const int32_t* numbers) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
  }
  static inline type moved(type v, Lanes from) {
    const __m256i inside = _mm256_cmpgt_epi32(from, _mm256_set1_epi32(-1));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(v, from), _mm256_castsi256_ps(inside));
  }
};

// Transposes 8 x 8 floats: to[j][i] = from[i][j].
struct Transpose8 {
  static inline void run(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_stride);
    // Pairs of rows, interleaved float by float: b[i] and b[i + 1] hold 2 x 2 blocks of the result.
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    // Pairs of those, two floats at a time: a[i] holds column i of four rows in its lower half and column i + 4 in its
    // upper half.
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    // The lower halves are columns 0 to 3 of all eight rows, the upper halves columns 4 to 7.
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }
};

}  // namespace
