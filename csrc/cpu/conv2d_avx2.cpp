// AVX2 + FMA kernels of csrc/kernels.h.
#include <stdint.h>

#include "../kernels.h"
#include "batch_norm.h"
#include "images_layout.h"
#include "peak.h"
#include "steps.h"
#include "vec8.h"
#include "weight_gradient.h"

namespace {

// Of the 16 vector registers 12 hold accumulators, 3 hold x and 1 a weight: 7 loads for 12 multiply-adds.
StripKernels images_innermost(int strip) {
  // <vector, channels of a one-pixel tile, channels of larger tiles, most pixels, strip>
  switch (strip) {
    case 1:  return images_innermost_kernels<Vec8, 1, 1, 10, 1>();
    case 2:  return images_innermost_kernels<Vec8, 2, 2, 6, 2>();
    case 4:  return images_innermost_kernels<Vec8, 4, 4, 3, 4>();
    case 8:  return images_innermost_kernels<Vec8, 8, 4, 3, 8>();
    case 16: return images_innermost_kernels<Vec8, 8, 4, 3, 16>();
    case 24: return images_innermost_kernels<Vec8, 8, 4, 3, 24>();
    case 32: return images_innermost_kernels<Vec8, 8, 4, 3, 32>();
    default: return no_kernels();
  }
}

// Of the 16 vector registers 12 hold accumulators, 2 hold weights and 1 an input. A strip of 24 takes 3 weights, 4
// pixels and 1 input: 7 loads for 12 multiply-adds, where a strip of 16 needs 8.
//
// Of the 15 general registers 4 hold the weights, the offsets, their end and the current offset. With 10 pixel pointers
// beside them nothing in the loop comes from the stack.
StripKernels channels_last(int strip) {
  // <vector, vectors, most pixels, most pixels tap by tap, strip>
  switch (strip) {
    case 8:  return channels_last_kernels<Vec8, 1, 10, 12, 8>();
    case 16: return channels_last_kernels<Vec8, 2, 6, 6, 16>();
    case 24: return channels_last_kernels<Vec8, 3, 4, 4, 24>();
    case 32: return channels_last_kernels<Vec8, 2, 6, 2, 32>();
    default: return no_kernels();
  }
}

// Sums of 10 pixels, a weight and one input; each multiply-add loads its input.
StripKernels deep(int depth) {
  // <vector, vectors an entry, most pixels>
  switch (depth) {
    case 8:  return deep_kernels<Vec8, 1, 10>();
    case 16: return deep_kernels<Vec8, 2, 10>();
    default: return no_kernels();
  }
}

constexpr InstructionSet kAvx2 = {
    Vec8::N, channels_last, images_innermost, deep, run_layout_unit<Transpose8>, run_pool_unit<Vec8>};

// Of the 16 vector registers 12 hold sums, 2 hold `grad` and 1 an input; 10 rows of x leave the general registers that
// the pairs need.
GradientKernels weight_gradient_kernels(int block_out) {
  // <vector, vectors of a panel, most entries, 8 x 8 transposition>
  if (block_out % 16 == 0) return gradient_kernels<Vec8, 2, 6, Transpose8>();
  return gradient_kernels<Vec8, 1, 10, Transpose8>();
}

}  // namespace

extern "C" int slim_run_steps_f32_avx2(const SlimStepF32* steps, int64_t count, int32_t threads) {
  return run_steps(kAvx2, steps, count, threads, 0);
}

extern "C" int slim_run_delayed_steps_f32_avx2(const SlimStepF32* steps, int64_t count, int32_t threads,
                                               uint32_t seed) {
  return run_steps(kAvx2, steps, count, threads, seed);
}

extern "C" int slim_weight_gradient_f32_avx2(const SlimWeightGradientF32* a, int32_t threads) {
  return weight_gradient(*a, weight_gradient_kernels(a->block_out), threads);
}

extern "C" double slim_multiply_adds_f32_avx2(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec8, 12>(iterations, threads);
}

extern "C" int slim_batch_norm_f32_avx2(const SlimBatchNormF32* a, int32_t threads) {
  return batch_norm<Vec8>(*a, threads);
}
