// What the engines with AVX-512 share: sixteen floats, and rows of pairs.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "../kernels.h"
#include "vec16.h"

namespace {

struct PairsVec16 {
  typedef Vec16 Floats;

  // A row of a group: the numbers in even places from one row of x, those in odd places from another. In a group of
  // kind SHIFTED they may also come from two bytes beside a row: nothing else is read there.
  template <int KIND>
  static inline __m512i blend(const void* even, const void* odd) {
    const __m512i x = KIND == SLIM_GROUP_SHIFTED ? _mm512_maskz_loadu_epi16(0x55555555, even) : _mm512_load_si512(even);
    return KIND == SLIM_GROUP_WHOLE ? x : _mm512_mask_loadu_epi16(x, 0xaaaaaaaa, odd);
  }
  static inline __m512 even(const void* row) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_load_si512(row), 16));
  }
  static inline __m512 odd(const void* row) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_load_si512(row), _mm512_set1_epi32((int)0xffff0000)));
  }
  static inline void store_pair(void* row, __m512 even, __m512 odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    _mm512_store_si512(row, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // One number each of the first `count` images, which lie so many numbers apart; zeros behind them.
  static inline __m512 of_images(const float* from, int64_t distance, int count) {
    const __m512i image = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_mullo_epi32(image, _mm512_set1_epi32((int)distance));
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), Vec16::first(count), index, from, 4);
  }
};

}  // namespace
