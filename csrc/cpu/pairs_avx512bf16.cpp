// The engine of AVX512_BF16: dot products of two channels, sixteen images at a time.
#include <immintrin.h>

#include "pairs.h"
#include "pairs_layers.h"
#include "pairs_vec16.h"

namespace {

struct Avx512Bf16 : PairsVec16 {
  // The sums of one pixel stay in 16 of the 32 vector registers: a row of a group meets 16 weights, each a pair of
  // channels that is broadcast from memory.
  static void add_up(const StripGroups& strip, const PairsChunk& chunk, char*, float* sums) {
    for (int i = 0; i < chunk.count; ++i) {
      const char* const* const pixels = chunk.pixels[i];
      __m512 sum[PAIRS_STRIP];
      for (int o = 0; o < PAIRS_STRIP; ++o) sum[o] = _mm512_setzero_ps();
      for (int64_t g = 0; g < strip.count; ++g) {
        const SlimPairsGroup& group = strip.groups[g];
        if ((group.taps & chunk.taps[i]) == 0) continue;
        const int32_t* const weights = (const int32_t*)(strip.weights + g * PAIRS_STRIP * 2 * GROUP_ROWS);
        for (int r = 0; r < group.rows; ++r) {
          const SlimPairsRow row = group.row[r];
          const __m512bh x = (__m512bh)blend<SLIM_GROUP_SHIFTED>(row_at(pixels, row.even), row_at(pixels, row.odd));
#pragma GCC unroll 16
          for (int o = 0; o < PAIRS_STRIP; ++o)
            sum[o] = _mm512_dpbf16_ps(sum[o], (__m512bh)_mm512_set1_epi32(weights[o * GROUP_ROWS + r]), x);
        }
      }
      for (int o = 0; o < PAIRS_STRIP; ++o) _mm512_store_ps(sums + (i * PAIRS_STRIP + o) * PAIR_IMAGES, sum[o]);
    }
  }
};

}  // namespace

extern "C" const SlimPairsEngine slim_pairs_engine_avx512bf16 = engine_of<Avx512Bf16>();
