// The machine's limit, which the convolution is compared with.
#pragma once
#include <stdint.h>

#include "compiler.h"

namespace {

// Runs `iterations` rounds of CHAINS independent multiply-adds on `threads` threads and returns the FLOPs done, 2 for
// each multiply-add of each lane.
template <class V, int CHAINS>
inline double multiply_adds(int64_t iterations, int32_t threads) {
  float sink = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sink) if (threads > 1)
  {
    // All chains start at different numbers, or the compiler would compute one of them for all.
    float start[V::N * CHAINS];
    for (int i = 0; i < V::N * CHAINS; ++i) start[i] = (float)i;
    typename V::type chains[CHAINS];
    SLIM_UNROLL
    for (int i = 0; i < CHAINS; ++i) chains[i] = V::load(start + i * V::N);
    const float number = 0.999f;
    const typename V::type factor = V::broadcast(&number);
    for (int64_t n = 0; n < iterations; ++n) {
      SLIM_UNROLL
      for (int i = 0; i < CHAINS; ++i) chains[i] = V::fma(chains[i], factor, factor);
    }
    SLIM_UNROLL
    for (int i = 0; i < CHAINS; ++i) {
      V::store(start, chains[i]);
      sink += start[0];
    }
  }
  // The sum is finite; the question keeps the compiler from removing the loop.
  return sink == sink ? 2.0 * CHAINS * V::N * (double)iterations * threads : 0;
}

}  // namespace
