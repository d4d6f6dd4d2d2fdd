// Eight floats in one AVX register, for the AVX2 and AVX-512 files; included into an anonymous namespace like conv2d_strips.h.

struct Vec8 {
  static constexpr int N = 8;
  typedef __m256 type;
  static inline type zero() { return _mm256_setzero_ps(); }
  static inline type load(const float* p) { return _mm256_loadu_ps(p); }
  static inline type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static inline void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  // Lanes below `count` (any int): all but those read 0 and are not written.
  static inline __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static inline type load_part(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  static inline void store_part(float* p, type v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  static inline type add(type a, type b) { return _mm256_add_ps(a, b); }
  static inline type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  // vmaxps returns its second operand when one is NaN, so a NaN passes.
  static inline type relu(type v) { return _mm256_max_ps(zero(), v); }
  static inline type max_nan(type a, type b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
};
