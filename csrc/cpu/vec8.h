// Eight floats in one AVX register, for the AVX2 and AVX-512 files; included into an anonymous namespace like conv2d.h.

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

// to[j][i] = from[i][j], 8 x 8.
struct Transpose8 {
  static inline void run(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
};
