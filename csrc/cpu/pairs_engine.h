// What steps.h calls of an engine of bf16 steps, see pairs.h. Plans are of the anonymous namespace, hence the pointers.
#pragma once
#include <stdint.h>

#include "../kernels.h"

extern "C" {

typedef struct SlimPairsEngine {
  void (*run_conv_unit)(const void* pairs_plan, int64_t unit, void* scratch);  // PAIRS_SCRATCH bytes
  void (*run_layout_unit)(const void* layout_plan, int64_t unit);              // from channels last
  void (*run_pool_unit)(const void* pairs_pool_plan, int64_t unit);
} SlimPairsEngine;

// One of SLIM_ENGINE_*; NULL where it was not built or this machine does not run it.
SLIM_HIDDEN const SlimPairsEngine* slim_pairs_engine(int32_t engine);

// Of pairs_avx512bf16.cpp and pairs_amx.cpp, which not every compiler takes.
SLIM_HIDDEN extern const SlimPairsEngine slim_pairs_engine_avx512bf16 __attribute__((weak));
SLIM_HIDDEN extern const SlimPairsEngine slim_pairs_engine_amx __attribute__((weak));
}
