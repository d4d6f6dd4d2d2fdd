// AVX2 + FMA kernels of csrc/kernels.h.
#include <immintrin.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "../kernels.h"

namespace {

#include "vec8.h"
#include "conv2d.h"

// Images innermost: 12 accumulators, 3 vectors of x, 1 weight: 7 loads for 12 multiply-adds.
// Channels last: 16 vector registers: 12 accumulators, 2 weights, 1 input. 15 general registers, weights, offsets, their end and the
// current offset among them: with 10 pixel pointers nothing in the loop comes from the stack. A strip of 24 takes 3 weights, 4 pixels, 1
// input: 7 loads for 12 multiply-adds, where a strip of 16 needs 8.
inline bool family_for(int strip, int lanes, Family& family) {
  if (lanes != 1 && lanes != Vec8::N) return false;
  const bool images = lanes != 1;
  if (!images && strip < 8) return false;
  switch (strip) {
    case 1: family = images_innermost<Vec8, 1, 1, 10, 1>(); return true;
    case 2: family = images_innermost<Vec8, 2, 2, 6, 2>(); return true;
    case 4: family = images_innermost<Vec8, 4, 4, 3, 4>(); return true;
    case 8: family = images ? images_innermost<Vec8, 8, 4, 3, 8>() : channels_last<Vec8, 1, 10, 12, 8>(); return true;
    case 16: family = images ? images_innermost<Vec8, 8, 4, 3, 16>() : channels_last<Vec8, 2, 6, 6, 16>(); return true;
    case 24: family = images ? images_innermost<Vec8, 8, 4, 3, 24>() : channels_last<Vec8, 3, 4, 4, 24>(); return true;
    case 32: family = images ? images_innermost<Vec8, 8, 4, 3, 32>() : channels_last<Vec8, 2, 6, 2, 32>(); return true;
    default: return false;
  }
}

}  // namespace

extern "C" int slim_run_steps_f32_avx2(const SlimStepF32* steps, int64_t count, int32_t threads) {
  return run_steps(steps, count, threads, 0);
}

extern "C" int slim_run_delayed_steps_f32_avx2(const SlimStepF32* steps, int64_t count, int32_t threads, uint32_t seed) {
  return run_steps(steps, count, threads, seed);
}

extern "C" double slim_multiply_adds_f32_avx2(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec8, 12>(iterations, threads);
}
