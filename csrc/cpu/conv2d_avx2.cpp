// AVX2 + FMA kernels of csrc/kernels.h.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#include "../kernels.h"

namespace {

#include "vec8.h"
#include "conv2d_strips.h"

}  // namespace

// 16 vector registers: 12 accumulators, 2 weights, 1 input. 15 general registers, weights, offsets, their end and the current offset
// among them: with 10 pixel pointers nothing in the loop comes from the stack.
extern "C" int slim_conv2d_f32_avx2(const SlimConv2dF32* a) {
  if (a->strip == 8) return conv2d<Vec8>(a, make_tiles<Vec8, 1, 10, 8>());
  // 3 weights, 4 pixels, 1 input: 7 loads for 12 multiply-adds, where a strip of 16 needs 8.
  if (a->strip == 24) return conv2d<Vec8>(a, make_tiles<Vec8, 3, 4, 24>());
  return a->strip == 16 ? conv2d<Vec8>(a, make_tiles<Vec8, 2, 6, 16>()) : conv2d<Vec8>(a, make_tiles<Vec8, 2, 6, 32>());
}

extern "C" double slim_multiply_adds_f32_avx2(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec8, 12>(iterations, threads);
}
