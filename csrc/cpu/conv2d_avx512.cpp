// AVX-512 kernels of csrc/kernels.h.
#include <immintrin.h>
#include <stdint.h>

#include "../kernels.h"
#include "batch_norm.h"
#include "images_layout.h"
#include "peak.h"
#include "steps.h"
#include "vec16.h"
#include "vec8.h"
#include "weight_gradient.h"

namespace {

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
