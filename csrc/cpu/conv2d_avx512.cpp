// AVX-512 kernels of csrc/kernels.h.
#include <immintrin.h>
#include <stdint.h>

#include "../kernels.h"
#include "batch_norm.h"
#include "images_layout.h"
#include "peak.h"
#include "steps.h"
#include "vec8.h"
#include "weight_gradient.h"

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

// Of the 32 vector registers 24 hold accumulators, 3 hold x and 1 a weight: 11 loads for 24 multiply-adds. A single
// pixel takes 16 channels where the strip has them: 17 loads for 16 multiply-adds.
StripKernels images_innermost(int strip) {
  // <vector, channels of a one-pixel tile, channels of larger tiles, most pixels, strip>
  switch (strip) {
    case 1:  return images_innermost_kernels<Vec16, 1, 1, 10, 1>();
    case 2:  return images_innermost_kernels<Vec16, 2, 2, 10, 2>();
    case 4:  return images_innermost_kernels<Vec16, 4, 4, 6, 4>();
    case 8:  return images_innermost_kernels<Vec16, 8, 8, 3, 8>();
    case 16: return images_innermost_kernels<Vec16, 16, 8, 3, 16>();
    case 24: return images_innermost_kernels<Vec16, 8, 8, 3, 24>();
    case 32: return images_innermost_kernels<Vec16, 16, 8, 3, 32>();
    default: return no_kernels();
  }
}

// There are 32 vector registers but only 15 general ones, 4 of which hold the weights, the offsets, their end and the
// current offset. With 10 pixel pointers beside them nothing in the loop comes from the stack. A strip of 16 then needs
// 12 loads for 10 multiply-adds, 83% of peak at two loads a cycle, and a strip of 32 needs 13 for 20. Strips of 8 and
// 24 are whole vectors of 8 floats only.
StripKernels channels_last(int strip) {
  // <vector, vectors, most pixels, most pixels tap by tap, strip>
  switch (strip) {
    case 8:  return channels_last_kernels<Vec8, 1, 10, 16, 8>();
    case 16: return channels_last_kernels<Vec16, 1, 10, 8, 16>();
    case 24: return channels_last_kernels<Vec8, 3, 8, 8, 24>();
    case 32: return channels_last_kernels<Vec16, 2, 10, 12, 32>();
    default: return no_kernels();
  }
}

// 10 pixel pointers, as above: 11 loads for 10 multiply-adds.
StripKernels deep(int depth) {
  // <vector, vectors an entry, most pixels>
  switch (depth) {
    case 8:  return deep_kernels<Vec8, 1, 10>();
    case 16: return deep_kernels<Vec16, 1, 10>();
    default: return no_kernels();
  }
}

constexpr InstructionSet kAvx512 = {
    Vec16::N, channels_last, images_innermost, deep, run_layout_unit<Transpose8>, run_pool_unit<Vec16>};

// Of the 15 general registers 10 hold rows of x, the others the panel, the pair, the end of the pairs and two offsets.
GradientKernels weight_gradient_kernels(int block_out) {
  // <vector, vectors of a panel, most entries, 8 x 8 transposition>
  if (block_out % 16 == 0) return gradient_kernels<Vec16, 1, 10, Transpose8>();
  return gradient_kernels<Vec8, 1, 10, Transpose8>();
}

}  // namespace

extern "C" int slim_run_steps_f32_avx512(const SlimStepF32* steps, int64_t count, int32_t threads) {
  return run_steps(kAvx512, steps, count, threads, 0);
}

extern "C" int slim_run_delayed_steps_f32_avx512(const SlimStepF32* steps, int64_t count, int32_t threads,
                                                 uint32_t seed) {
  return run_steps(kAvx512, steps, count, threads, seed);
}

extern "C" int slim_weight_gradient_f32_avx512(const SlimWeightGradientF32* a, int32_t threads) {
  return weight_gradient(*a, weight_gradient_kernels(a->block_out), threads);
}

extern "C" double slim_multiply_adds_f32_avx512(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec16, 16>(iterations, threads);
}

extern "C" int slim_batch_norm_f32_avx512(const SlimBatchNormF32* a, int32_t threads) {
  return batch_norm<Vec16>(*a, threads);
}
