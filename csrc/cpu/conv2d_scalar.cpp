// Plain C++ kernels of csrc/kernels.h, for the base instruction set.
#include <stdint.h>
#include <stdlib.h>

#include "../kernels.h"

namespace {

// Four floats: what the compiler turns into one SSE2 register on x86-64 and into NEON on Arm.
struct Vec4 {
  static constexpr int N = 4;
  struct type {
    float f[4];
  };
  static inline type zero() { return type{{0, 0, 0, 0}}; }
  static inline type load(const float* p) { return type{{p[0], p[1], p[2], p[3]}}; }
  static inline type broadcast(const float* p) { return type{{p[0], p[0], p[0], p[0]}}; }
  static inline void store(float* p, const type& v) {
    for (int i = 0; i < 4; ++i) p[i] = v.f[i];
  }
  // Lanes below `count` (any int): all but those read 0 and are not written.
  static inline type load_part(const float* p, int count) {
    type r = zero();
    for (int i = 0; i < 4 && i < count; ++i) r.f[i] = p[i];
    return r;
  }
  static inline void store_part(float* p, const type& v, int count) {
    for (int i = 0; i < 4 && i < count; ++i) p[i] = v.f[i];
  }
  static inline type add(const type& a, const type& b) {
    type r;
    for (int i = 0; i < 4; ++i) r.f[i] = a.f[i] + b.f[i];
    return r;
  }
  static inline type fma(const type& a, const type& b, const type& c) {
    type r;
    for (int i = 0; i < 4; ++i) r.f[i] = a.f[i] * b.f[i] + c.f[i];
    return r;
  }
  static inline type relu(const type& v) {
    type r;
    for (int i = 0; i < 4; ++i) r.f[i] = v.f[i] < 0 ? 0 : v.f[i];
    return r;
  }
  static inline type max_nan(const type& a, const type& b) {
    type r;
    for (int i = 0; i < 4; ++i) r.f[i] = a.f[i] > b.f[i] || a.f[i] != a.f[i] ? a.f[i] : b.f[i];
    return r;
  }
};

#include "conv2d_strips.h"

}  // namespace

extern "C" int slim_conv2d_f32_scalar(const SlimConv2dF32* a) {
  if (a->strip == 8) return conv2d<Vec4>(a, make_tiles<Vec4, 2, 4, 8>());
  if (a->strip == 24) return conv2d<Vec4>(a, make_tiles<Vec4, 3, 3, 24>());
  return a->strip == 16 ? conv2d<Vec4>(a, make_tiles<Vec4, 4, 2, 16>()) : conv2d<Vec4>(a, make_tiles<Vec4, 4, 2, 32>());
}

extern "C" double slim_multiply_adds_f32_scalar(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec4, 6>(iterations, threads);
}
