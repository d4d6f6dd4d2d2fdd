// Plain C++ kernels of csrc/kernels.h, for the base instruction set.
#include <stdint.h>

#include "../kernels.h"
#include "batch_norm.h"
#include "images_layout.h"
#include "peak.h"
#include "plan.h"
#include "steps.h"
#include "weight_gradient.h"

namespace {

// Four floats, which the compiler turns into one SSE2 register on x86-64 and into NEON on Arm. tiles.h says what a
// vector type has.
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
  // Lanes from `count` on, which may be any int, are read as 0 and not written.
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
  // to[i] = the sum of the lanes of the i-th vector.
  static inline void sum_lanes(float* to, const type& a, const type& b, const type& c, const type& d) {
    const type* const vectors[] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; ++i) {
      const float* const f = vectors[i]->f;
      to[i] = (f[0] + f[1]) + (f[2] + f[3]);
    }
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
  struct Mask {
    bool b[4];
  };
  static inline Mask positive(const type& v) {  // or NaN
    Mask m;
    for (int i = 0; i < 4; ++i) m.b[i] = !(v.f[i] <= 0);
    return m;
  }
  static inline Mask greater_or_nan(const type& a, const type& b) {
    Mask m;
    for (int i = 0; i < 4; ++i) m.b[i] = a.f[i] > b.f[i] || a.f[i] != a.f[i];
    return m;
  }
  static inline type select(const Mask& m, const type& a, const type& b) {
    type r;
    for (int i = 0; i < 4; ++i) r.f[i] = m.b[i] ? a.f[i] : b.f[i];
    return r;
  }
  static inline type where(const Mask& m, const type& v) { return select(m, v, zero()); }
  static inline type where_not(const Mask& m, const type& v) { return select(m, zero(), v); }
  struct Lanes {
    int32_t from[4];
  };
  static inline Lanes lanes(const int32_t* numbers) { return {{numbers[0], numbers[1], numbers[2], numbers[3]}}; }
  static inline type moved(const type& v, const Lanes& lanes) {
    type r = zero();
    for (int i = 0; i < 4; ++i) {
      if (lanes.from[i] >= 0) r.f[i] = v.f[lanes.from[i]];
    }
    return r;
  }
};

// Transposes 8 x 8 floats: to[j][i] = from[i][j].
struct Transpose8 {
  static inline void run(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
};

// The base instruction sets have 16 vector registers (x86-64) or 32 (Arm); tiles are sized for 16.
StripKernels images_innermost(int strip) {
  // <vector, channels of a one-pixel tile, channels of larger tiles, most pixels, strip>
  switch (strip) {
    case 1:  return images_innermost_kernels<Vec4, 1, 1, 8, 1>();
    case 2:  return images_innermost_kernels<Vec4, 2, 2, 4, 2>();
    case 4:  return images_innermost_kernels<Vec4, 4, 4, 2, 4>();
    case 8:  return images_innermost_kernels<Vec4, 8, 4, 3, 8>();
    case 16: return images_innermost_kernels<Vec4, 8, 4, 3, 16>();
    case 24: return images_innermost_kernels<Vec4, 8, 4, 3, 24>();
    case 32: return images_innermost_kernels<Vec4, 8, 4, 3, 32>();
    default: return no_kernels();
  }
}

StripKernels channels_last(int strip) {
  // <vector, vectors, most pixels, most pixels tap by tap, strip>
  switch (strip) {
    case 8:  return channels_last_kernels<Vec4, 2, 4, 4, 8>();
    case 16: return channels_last_kernels<Vec4, 4, 2, 2, 16>();
    case 24: return channels_last_kernels<Vec4, 3, 3, 3, 24>();
    case 32: return channels_last_kernels<Vec4, 4, 2, 1, 32>();
    default: return no_kernels();
  }
}

StripKernels deep(int depth) {
  // <vector, vectors an entry, most pixels>
  switch (depth) {
    case 8:  return deep_kernels<Vec4, 2, 8>();
    case 16: return deep_kernels<Vec4, 4, 8>();
    default: return no_kernels();
  }
}

constexpr InstructionSet kScalar = {
    Vec4::N, channels_last, images_innermost, deep, run_layout_unit<Transpose8>, run_pool_unit<Vec4>};

GradientKernels weight_gradient_kernels(int block_out) {
  // <vector, vectors of a panel, most entries, 8 x 8 transposition>
  if (block_out % 16 == 0) return gradient_kernels<Vec4, 4, 2, Transpose8>();
  return gradient_kernels<Vec4, 2, 4, Transpose8>();
}

}  // namespace

extern "C" int slim_run_steps_f32_scalar(const SlimStepF32* steps, int64_t count, int32_t threads) {
  return run_steps(kScalar, steps, count, threads, 0);
}

extern "C" int slim_run_delayed_steps_f32_scalar(const SlimStepF32* steps, int64_t count, int32_t threads,
                                                 uint32_t seed) {
  return run_steps(kScalar, steps, count, threads, seed);
}

extern "C" int slim_weight_gradient_f32_scalar(const SlimWeightGradientF32* a, int32_t threads) {
  return weight_gradient(*a, weight_gradient_kernels(a->block_out), threads);
}

extern "C" double slim_multiply_adds_f32_scalar(int64_t iterations, int32_t threads) {
  return multiply_adds<Vec4, 6>(iterations, threads);
}

extern "C" int64_t slim_entry_offsets_count(const SlimConv2dF32* a) { return offsets_count(*a); }

extern "C" void slim_entry_offsets(const SlimConv2dF32* a, int32_t* offsets) { write_offsets(*a, offsets); }

extern "C" int slim_batch_norm_f32_scalar(const SlimBatchNormF32* a, int32_t threads) {
  return batch_norm<Vec4>(*a, threads);
}
