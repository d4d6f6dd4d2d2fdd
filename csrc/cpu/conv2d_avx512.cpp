// AVX-512 kernels of csrc/kernels.h.
#include <immintrin.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "../kernels.h"

namespace {

struct Vec16 {
  static constexpr int N = 16;
  typedef __m512 type;
  static inline type zero() { return _mm512_setzero_ps(); }
  static inline type load(const float* p) { return _mm512_loadu_ps(p); }
  static inline type broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static inline void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  // Lanes below `count` (any int): all but those read 0 and are not written.
  static inline __mmask16 first(int count) {
    return _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(count), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  }
  static inline type load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static inline void store_part(float* p, type v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  static inline type add(type a, type b) { return _mm512_add_ps(a, b); }
  static inline type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  // vmaxps returns its second operand when one is NaN, so a NaN passes.
  static inline type relu(type v) { return _mm512_max_ps(zero(), v); }
  static inline type max_nan(type a, type b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
};

#include "vec8.h"

#include "conv2d.h"

// Images innermost: 24 accumulators, 3 vectors of x, 1 weight: 11 loads for 24 multiply-adds. A single pixel takes 16 channels where it can,
// 17 loads for 16.
// Channels last: 32 vector registers, but 15 general ones, weights, offsets, their end and the current offset among them: with 10
// pixel pointers nothing in the loop comes from the stack. A strip of 16 then needs 12 loads for 10 multiply-adds (83% of peak at two
// loads a cycle), a strip of 32 needs 13 for 20.
inline bool family_for(int strip, int lanes, Family& family) {
  if (lanes != 1 && lanes != Vec16::N) return false;
  const bool images = lanes != 1;
  if (!images && strip < 8) return false;
  switch (strip) {
    case 1: family = images_innermost<Vec16, 1, 1, 10, 1>(); return true;
    case 2: family = images_innermost<Vec16, 2, 2, 10, 2>(); return true;
    case 4: family = images_innermost<Vec16, 4, 4, 6, 4>(); return true;
    case 8: family = images ? images_innermost<Vec16, 8, 8, 3, 8>() : channels_last<Vec8, 1, 10, 16, 8>(); return true;
    case 16: family = images ? images_innermost<Vec16, 16, 8, 3, 16>() : channels_last<Vec16, 1, 10, 8, 16>(); return true;
    case 24: family = images ? images_innermost<Vec16, 8, 8, 3, 24>() : channels_last<Vec8, 3, 8, 8, 24>(); return true;
    case 32: family = images ? images_innermost<Vec16, 16, 8, 3, 32>() : channels_last<Vec16, 2, 10, 12, 32>(); return true;
    default: return false;
  }
}

}  // namespace

extern "C" int slim_run_steps_f32_avx512(const SlimStepF32* steps, int64_t count, int32_t threads) {
  return run_steps(steps, count, threads, 0);
}

extern "C" int slim_run_delayed_steps_f32_avx512(const SlimStepF32* steps, int64_t count, int32_t threads, uint32_t seed) {
  return run_steps(steps, count, threads, seed);
}

extern "C" double slim_multiply_adds_f32_avx512(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec16, 16>(iterations, threads);
}
