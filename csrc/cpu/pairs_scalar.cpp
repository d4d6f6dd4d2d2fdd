// The engine that runs everywhere, for tests, and which engines run here.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "pairs.h"
#include "pairs_engine.h"
#include "pairs_layers.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

inline float float_of(Bf16 v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

// To the nearest, ties to even; NaN stays NaN.
inline Bf16 bf16_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  if (v != v) return (Bf16)(bits >> 16 | 0x40);
  return (Bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Floats16 {
  struct type {
    float v[PAIR_IMAGES];
  };
  template <class F>
  static inline type each(F f) {
    type t;
    for (int i = 0; i < PAIR_IMAGES; ++i) t.v[i] = f(i);
    return t;
  }
  static inline type zero() {
    return each([](int) { return 0.0f; });
  }
  static inline type load(const float* p) {
    return each([p](int i) { return p[i]; });
  }
  static inline type broadcast(const float* p) {
    return each([p](int) { return *p; });
  }
  static inline void store(float* p, const type& t) { memcpy(p, t.v, sizeof t.v); }
  static inline type add(const type& a, const type& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static inline type fma(const type& a, const type& b, const type& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  // A NaN in b stays.
  static inline type max_second_nan(const type& a, const type& b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static inline type max_nan(const type& a, const type& b) {
    return each([&](int i) { return a.v[i] > b.v[i] || a.v[i] != a.v[i] ? a.v[i] : b.v[i]; });
  }
};

struct Scalar {
  typedef Floats16 Floats;

  static inline float at(const void* row, int64_t image, int which) {
    return float_of(((const Bf16*)row)[2 * image + which]);
  }
  static inline Floats::type even(const void* row) {
    return Floats::each([row](int i) { return at(row, i, 0); });
  }
  static inline Floats::type odd(const void* row) {
    return Floats::each([row](int i) { return at(row, i, 1); });
  }
  static inline void store_pair(void* row, const Floats::type& even, const Floats::type& odd) {
    for (int i = 0; i < PAIR_IMAGES; ++i) {
      ((Bf16*)row)[2 * i] = bf16_of(even.v[i]);
      ((Bf16*)row)[2 * i + 1] = bf16_of(odd.v[i]);
    }
  }
  static inline Floats::type of_images(const float* from, int64_t distance, int count) {
    return Floats::each([=](int i) { return i < count ? from[i * distance] : 0.0f; });
  }

  static void add_up(const StripGroups& strip, const PairsChunk& chunk, char*, float* sums) {
    memset(sums, 0, sizeof(float) * CHUNK_PIXELS * PAIRS_STRIP * PAIR_IMAGES);
    for (int64_t g = 0; g < strip.count; ++g) {
      const SlimPairsGroup& group = strip.groups[g];
      const Bf16* const weights = strip.weights + g * PAIRS_STRIP * 2 * GROUP_ROWS;
      for (int i = 0; i < chunk.count; ++i) {
        if ((group.taps & chunk.taps[i]) == 0) continue;
        for (int r = 0; r < group.rows; ++r) {
          const char* const even = row_at(chunk.pixels[i], group.row[r].even);
          const char* const odd = row_at(chunk.pixels[i], group.row[r].odd);
          for (int o = 0; o < PAIRS_STRIP; ++o) {
            const float w0 = float_of(weights[(o * GROUP_ROWS + r) * 2]);
            const float w1 = float_of(weights[(o * GROUP_ROWS + r) * 2 + 1]);
            float* const sum = sums + (i * PAIRS_STRIP + o) * PAIR_IMAGES;
            for (int n = 0; n < PAIR_IMAGES; ++n) sum[n] += w0 * at(even, n, 0) + w1 * at(odd, n, 1);
          }
        }
      }
    }
  }
};

const SlimPairsEngine kScalar = engine_of<Scalar>();

struct Machine {
  bool avx512bf16 = false, amx = false;
  Machine() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // no xgetbv
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned AVX512_STATE = 0xe6, TILE_STATE = 0x60000;
    if ((low & AVX512_STATE) != AVX512_STATE || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    constexpr unsigned F = 1u << 16, DQ = 1u << 17, BW = 1u << 30, VL = 1u << 31;
    if ((b & F) == 0 || (b & DQ) == 0 || (b & BW) == 0 || (b & VL) == 0) return;
    const bool tiles = (d >> 24 & 1) && (d >> 22 & 1) && (low & TILE_STATE) == TILE_STATE;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    avx512bf16 = a >> 5 & 1;
    // Linux saves the 8 KB of tiles only for processes that have asked; threads inherit it.
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18;
    amx = avx512bf16 && tiles && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#endif
  }
};

}  // namespace

extern "C" const SlimPairsEngine* slim_pairs_engine(int32_t engine) {
  static const Machine machine;
  switch (engine) {
    case SLIM_ENGINE_SCALAR:     return &kScalar;
    case SLIM_ENGINE_AVX512BF16: return machine.avx512bf16 ? &slim_pairs_engine_avx512bf16 : nullptr;
    case SLIM_ENGINE_AMX:        return machine.amx ? &slim_pairs_engine_amx : nullptr;
    default:                     return nullptr;
  }
}
