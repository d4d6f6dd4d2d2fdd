// Plain C++ kernels of csrc/kernels.h, for the base instruction set.
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

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

// to[j][i] = from[i][j], 8 x 8.
struct Transpose8 {
  static inline void run(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
};

#include "conv2d.h"

inline bool family_for(int strip, int lanes, Family& family) {
  if (lanes != 1 && lanes != Vec4::N) return false;
  const bool images = lanes != 1;
  if (!images && strip < 8) return false;
  switch (strip) {
    case 1: family = images_innermost<Vec4, 1, 1, 8, 1>(); return true;
    case 2: family = images_innermost<Vec4, 2, 2, 4, 2>(); return true;
    case 4: family = images_innermost<Vec4, 4, 4, 2, 4>(); return true;
    case 8: family = images ? images_innermost<Vec4, 8, 4, 3, 8>() : channels_last<Vec4, 2, 4, 4, 8>(); return true;
    case 16: family = images ? images_innermost<Vec4, 8, 4, 3, 16>() : channels_last<Vec4, 4, 2, 2, 16>(); return true;
    case 24: family = images ? images_innermost<Vec4, 8, 4, 3, 24>() : channels_last<Vec4, 3, 3, 3, 24>(); return true;
    case 32: family = images ? images_innermost<Vec4, 8, 4, 3, 32>() : channels_last<Vec4, 4, 2, 1, 32>(); return true;
    default: return false;
  }
}

}  // namespace

extern "C" int slim_run_steps_f32_scalar(const SlimStepF32* steps, int64_t count, int32_t threads) {
  return run_steps(steps, count, threads, 0);
}

extern "C" int slim_run_delayed_steps_f32_scalar(const SlimStepF32* steps, int64_t count, int32_t threads, uint32_t seed) {
  return run_steps(steps, count, threads, seed);
}

extern "C" double slim_multiply_adds_f32_scalar(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec4, 6>(iterations, threads);
}

extern "C" void slim_entry_offsets(const SlimConv2dF32* a, int32_t* offsets) { entry_offsets(*a, offsets); }
