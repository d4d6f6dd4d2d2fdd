// AVX-512 kernels of csrc/kernels.h.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#include "../kernels.h"

namespace {

struct Vec16 {
  static constexpr int N = 16;
  typedef __m512 type;
  static inline type zero() { return _mm512_setzero_ps(); }
  static inline type load(const float* p) { return _mm512_loadu_ps(p); }
  static inline type broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static inline void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  static inline type add(type a, type b) { return _mm512_add_ps(a, b); }
  static inline type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  // vmaxps returns its second operand when one is NaN, so a NaN passes.
  static inline type relu(type v) { return _mm512_max_ps(zero(), v); }
  static inline type max_nan(type a, type b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
};

struct Vec8 {
  static constexpr int N = 8;
  typedef __m256 type;
  static inline type zero() { return _mm256_setzero_ps(); }
  static inline type load(const float* p) { return _mm256_loadu_ps(p); }
  static inline type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static inline void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  static inline type add(type a, type b) { return _mm256_add_ps(a, b); }
  static inline type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  static inline type relu(type v) { return _mm256_max_ps(zero(), v); }
  static inline type max_nan(type a, type b) {
    return _mm256_mask_mov_ps(_mm256_max_ps(a, b), _mm256_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
};

#include "conv2d_strips.h"

}  // namespace

// 32 vector registers, but 15 general ones: 11 or 12 pixel pointers are what fits beside weight, offset and end pointers.
extern "C" int slim_conv2d_f32_avx512(const SlimConv2dF32* a) {
  if (a->strip == 8) return conv2d<Vec8>(a, make_tiles<Vec8, 1, 11>());
  return a->strip == 16 ? conv2d<Vec16>(a, make_tiles<Vec16, 1, 11>()) : conv2d<Vec16>(a, make_tiles<Vec16, 2, 11>());
}

extern "C" double slim_multiply_adds_f32_avx512(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec16, 16>(iterations, threads);
}
