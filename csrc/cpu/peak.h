// The machine's limit; included into an anonymous namespace.

// Runs `iterations` rounds of independent multiply-adds on `threads` threads and returns the FLOPs done (2 per multiply-add), the
// ceiling that the convolution is compared with.
template <class V, int CHAINS>
inline double multiply_adds(int64_t iterations, int32_t threads) {
  float sink = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sink) if (threads > 1)
  {
    // Chains start apart, or the compiler would compute one of them for all.
    float start[V::N * CHAINS];
    for (int i = 0; i < V::N * CHAINS; ++i) start[i] = (float)i;
    typename V::type acc[CHAINS];
    const float factor = 0.999f;
    SLIM_UNROLL for (int i = 0; i < CHAINS; ++i) acc[i] = V::load(start + i * V::N);
    const typename V::type f = V::broadcast(&factor);
    for (int64_t n = 0; n < iterations; ++n) {
      SLIM_UNROLL for (int i = 0; i < CHAINS; ++i) acc[i] = V::fma(acc[i], f, f);
    }
    SLIM_UNROLL for (int i = 0; i < CHAINS; ++i) {
      V::store(start, acc[i]);
      sink += start[0];
    }
  }
  // The sum is finite; asking keeps the loop from being removed.
  return sink == sink ? 2.0 * CHAINS * V::N * (double)iterations * threads : 0;
}
