// Batch norm of a training step with the ReLU and the 2x2 max-pool behind it, in four passes: the moments of x, the
// output, the sums of the gradients, the gradient of the input. Backward computes the output again, by the same
// operations, in place of reading it: what binds is memory, and x is read anyhow.
//
// Rows of the output are cut into parts, which threads share. Sums run over a chunk of pixels in float and over the
// chunks of a part, then over all parts in their order, in double. How many parts and chunks there are follows from the
// problem alone, so results do not depend on the number of threads.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels.h"
#include "compiler.h"
#include "ranges.h"
#include "team.h"

namespace {

enum NormEpilogue { NORM_PLAIN, NORM_RELU, NORM_RELU_POOL };

struct NormPlan {
  const SlimBatchNormF32* a;
  NormEpilogue epilogue;  // of the pass: moments are of x itself
  int64_t p, q;           // size of the output
  int64_t rows;           // of the output, of all images
  int64_t parts;
  double* partial;  // (parts, 2, c)

  Range part_rows(int64_t part) const { return {rows * part / parts, rows * (part + 1) / parts}; }

  // Elements of x between the pixels, or the windows, of one row of the output.
  int64_t step() const { return epilogue == NORM_RELU_POOL ? 2 * a->c : a->c; }

  // Where output pixel `pixel`, counted over all images, begins in x.
  const float* input(int64_t pixel) const {
    if (epilogue != NORM_RELU_POOL) return a->x + pixel * a->c;
    const int64_t row = pixel / q, column = pixel % q;
    return a->x + ((row / p * a->h + 2 * (row % p)) * a->w + 2 * column) * a->c;
  }
};

inline NormPlan plan_norm(const SlimBatchNormF32& a) {
  constexpr int64_t LEAST_FLOATS = 16384, MOST_PARTS = 64;
  NormPlan plan;
  plan.a = &a;
  plan.epilogue = a.which == SLIM_NORM_MOMENTS || !a.relu ? NORM_PLAIN : a.pool ? NORM_RELU_POOL : NORM_RELU;
  plan.p = plan.epilogue == NORM_RELU_POOL ? a.h / 2 : a.h;
  plan.q = plan.epilogue == NORM_RELU_POOL ? a.w / 2 : a.w;
  plan.rows = a.n * plan.p;
  plan.parts = max64(1, min64(min64(MOST_PARTS, plan.rows), a.n * (a.h * a.w * a.c) / LEAST_FLOATS));
  plan.partial = nullptr;
  return plan;
}

template <class V, bool PART>
SLIM_ALWAYS_INLINE typename V::type load_channels(const float* from, int count) {
  return PART ? V::load_part(from, count) : V::load(from);
}

template <class V, bool PART>
SLIM_ALWAYS_INLINE void store_channels(float* to, typename V::type v, int count) {
  if (PART)
    V::store_part(to, v, count);
  else
    V::store(to, v);
}

// Runs `body` on all channels: COUNT vectors at a time, then one, then the channels behind the last whole vector.
template <class V, int COUNT, class Body>
inline void for_channels(int64_t c, const Body& body) {
  int64_t channel = 0;
  for (; channel + COUNT * V::N <= c; channel += COUNT * V::N) body.template run<COUNT, false>(channel, 0);
  for (; channel + V::N <= c; channel += V::N) body.template run<1, false>(channel, 0);
  if (channel < c) body.template run<1, true>(channel, (int)(c - channel));
}

// ---------------------------------------------------------------- moments

// The mean of a chunk and the sum of squared distances from it. A mean in float is off by its last bits: the distances
// from it say by how much, and that is kept beside it.
template <class V>
struct MomentsOfChunk {
  typedef typename V::type Vector;
  const float* x;
  int64_t pixels, c;
  float* found;  // (3, c): rounded means, what they lack, squares

  template <int COUNT, bool PART>
  void run(int64_t channel, int lanes) const {
    const float share_of_one = 1.0f / (float)pixels, minus_one = -1.0f;
    const Vector share = V::broadcast(&share_of_one), negative = V::broadcast(&minus_one);
    const float* const first = x + channel;
    Vector total[COUNT], minus_mean[COUNT], off[COUNT], square[COUNT];
    SLIM_UNROLL
    for (int i = 0; i < COUNT; ++i) total[i] = off[i] = square[i] = V::zero();
    const float* pixel = first;
    for (int64_t k = 0; k < pixels; ++k, pixel += c) {
      SLIM_UNROLL
      for (int i = 0; i < COUNT; ++i) total[i] = V::add(total[i], load_channels<V, PART>(pixel + i * V::N, lanes));
    }
    SLIM_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      total[i] = V::fma(total[i], share, V::zero());
      minus_mean[i] = V::fma(total[i], negative, V::zero());
    }
    pixel = first;
    for (int64_t k = 0; k < pixels; ++k, pixel += c) {
      SLIM_UNROLL
      for (int i = 0; i < COUNT; ++i) {
        const Vector distance = V::add(load_channels<V, PART>(pixel + i * V::N, lanes), minus_mean[i]);
        off[i] = V::add(off[i], distance);
        square[i] = V::fma(distance, distance, square[i]);
      }
    }
    SLIM_UNROLL
    for (int i = 0; i < COUNT; ++i) {
      const Vector correction = V::fma(off[i], share, V::zero());
      const Vector minus = V::fma(correction, negative, V::zero());
      float* const to = found + channel + i * V::N;
      store_channels<V, PART>(to, total[i], lanes);
      store_channels<V, PART>(to + c, correction, lanes);
      store_channels<V, PART>(to + 2 * c, V::fma(minus, off[i], square[i]), lanes);
    }
  }
};

// Joins the moments of `count` more values, which `more_mean` and `more_squares` tell of a channel, to those of
// `before` values (Chan, Golub and LeVeque 1983).
template <class Mean, class Squares>
inline void join_moments(double* mean, double* squares, int64_t c, int64_t before, int64_t count, Mean more_mean,
                         Squares more_squares) {
  const double share = (double)count / (double)(before + count), weight = (double)before * share;
  for (int64_t i = 0; i < c; ++i) {
    const double apart = more_mean(i) - mean[i];
    mean[i] += apart * share;
    squares[i] += more_squares(i) + apart * apart * weight;
  }
}

template <class V>
inline void moments_of_part(const NormPlan& plan, int64_t part, float* scratch) {
  const int64_t c = plan.a->c;
  const Range rows = plan.part_rows(part);
  const int64_t end = rows.end * plan.q;
  const int64_t most = max64(32, min64(256, 8192 / c));  // 32 KB, which the second reading finds in a cache
  double* const mean = plan.partial + part * 2 * c;
  double* const squares = mean + c;
  memset(mean, 0, sizeof(double) * 2 * (size_t)c);
  for (int64_t pixel = rows.begin * plan.q, done = 0; pixel < end;) {
    const int64_t pixels = min64(most, end - pixel);
    for_channels<V, 2>(c, MomentsOfChunk<V>{plan.input(pixel), pixels, c, scratch});
    join_moments(
        mean, squares, c, done, pixels, [=](int64_t i) { return (double)scratch[i] + (double)scratch[c + i]; },
        [=](int64_t i) { return (double)scratch[2 * c + i]; });
    pixel += pixels;
    done += pixels;
  }
}

// ---------------------------------------------------------------- one pixel, or the window of a pool

// Some channels' coefficients; kernels.h says what they are.
template <class V, bool PART>
struct Coefficients {
  typedef typename V::type Vector;
  Vector shift, scale, bias;

  SLIM_ALWAYS_INLINE Coefficients(const SlimBatchNormF32& a, int64_t channel, int lanes)
      : shift(load_channels<V, PART>(a.coefficients + channel, lanes)),
        scale(load_channels<V, PART>(a.coefficients + a.c + channel, lanes)),
        bias(load_channels<V, PART>(a.coefficients + 2 * a.c + channel, lanes)) {}

  SLIM_ALWAYS_INLINE Vector shifted(Vector x) const { return V::add(x, shift); }
  SLIM_ALWAYS_INLINE Vector normalised(Vector shifted) const { return V::fma(shifted, scale, bias); }
};

// Which pixel of a window, row by row, is the largest: of equals the first, of NaN the last, as torch chooses.
template <class V>
struct PoolWindowOf {
  typedef typename V::type Vector;
  typename V::Mask later[3];  // where pixel i + 1 is larger than those in front of it
  Vector largest;
  Vector chosen;  // the same pixel, shifted

  template <bool PART>
  SLIM_ALWAYS_INLINE PoolWindowOf(const Coefficients<V, PART>& of, const float* x, int64_t right, int64_t down,
                                  int lanes) {
    const int64_t places[4] = {0, right, down, down + right};
    chosen = of.shifted(load_channels<V, PART>(x, lanes));
    largest = of.normalised(chosen);
    SLIM_UNROLL
    for (int i = 1; i < 4; ++i) {
      const Vector shifted = of.shifted(load_channels<V, PART>(x + places[i], lanes));
      const Vector z = of.normalised(shifted);
      later[i - 1] = V::greater_or_nan(z, largest);
      largest = V::select(later[i - 1], z, largest);
      chosen = V::select(later[i - 1], shifted, chosen);
    }
  }

  // What each pixel gets of the largest one's gradient.
  SLIM_ALWAYS_INLINE void spread(Vector grad, Vector (&to)[4]) const {
    SLIM_UNROLL
    for (int i = 3; i > 0; --i) {
      to[i] = V::where(later[i - 1], grad);
      grad = V::where_not(later[i - 1], grad);
    }
    to[0] = grad;
  }
};

// ---------------------------------------------------------------- output

template <class V, NormEpilogue EPILOGUE>
struct OutputOfPixel {
  const SlimBatchNormF32& a;
  const float* x;
  float* y;

  template <int COUNT, bool PART>
  SLIM_ALWAYS_INLINE void run(int64_t channel, int lanes) const {
    static_assert(COUNT == 1, "one vector");
    const Coefficients<V, PART> of(a, channel, lanes);
    typename V::type z;
    if constexpr (EPILOGUE == NORM_RELU_POOL) {
      z = PoolWindowOf<V>(of, x + channel, a.c, a.w * a.c, lanes).largest;
    } else {
      z = of.normalised(of.shifted(load_channels<V, PART>(x + channel, lanes)));
    }
    store_channels<V, PART>(y + channel, EPILOGUE == NORM_PLAIN ? z : V::relu(z), lanes);
  }
};

template <class V, NormEpilogue EPILOGUE>
inline void output_of_part(const NormPlan& plan, int64_t part) {
  const SlimBatchNormF32& a = *plan.a;
  const Range rows = plan.part_rows(part);
  float* y = a.y + rows.begin * plan.q * a.c;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* x = plan.input(row * plan.q);
    for (int64_t column = 0; column < plan.q; ++column, x += plan.step(), y += a.c)
      for_channels<V, 1>(a.c, OutputOfPixel<V, EPILOGUE>{a, x, y});
  }
}

// ---------------------------------------------------------------- sums of the gradients

// Of the output pixels [begin, end): the sums of the gradient of z, and of it times x + shift.
template <class V, NormEpilogue EPILOGUE>
struct SumsOfChunk {
  typedef typename V::type Vector;
  const NormPlan& plan;
  int64_t begin, end;
  float* sums;      // (c)
  float* products;  // (c)

  template <int COUNT, bool PART>
  void run(int64_t channel, int lanes) const {
    static_assert(COUNT == 1, "one vector");
    const SlimBatchNormF32& a = *plan.a;
    const Coefficients<V, PART> of(a, channel, lanes);
    Vector sum = V::zero(), product = V::zero();
    const float* grads = a.grad + begin * a.c + channel;
    for (int64_t pixel = begin; pixel < end;) {
      // Pixels of one row follow each other.
      const int64_t stop = min64(end, (pixel / plan.q + 1) * plan.q);
      const float* x = plan.input(pixel) + channel;
      for (; pixel < stop; ++pixel, grads += a.c, x += plan.step()) {
        Vector grad = load_channels<V, PART>(grads, lanes), shifted;
        if constexpr (EPILOGUE == NORM_RELU_POOL) {
          const PoolWindowOf<V> window(of, x, a.c, a.w * a.c, lanes);
          grad = V::where(V::positive(window.largest), grad);
          shifted = window.chosen;
        } else {
          shifted = of.shifted(load_channels<V, PART>(x, lanes));
          if (EPILOGUE == NORM_RELU) grad = V::where(V::positive(of.normalised(shifted)), grad);
        }
        sum = V::add(sum, grad);
        product = V::fma(grad, shifted, product);
      }
    }
    store_channels<V, PART>(sums + channel, sum, lanes);
    store_channels<V, PART>(products + channel, product, lanes);
  }
};

template <class V, NormEpilogue EPILOGUE>
inline void sums_of_part(const NormPlan& plan, int64_t part, float* scratch) {
  constexpr int64_t MOST_PIXELS = 64;
  const int64_t c = plan.a->c;
  const Range rows = plan.part_rows(part);
  const int64_t end = rows.end * plan.q;
  double* const sums = plan.partial + part * 2 * c;
  memset(sums, 0, sizeof(double) * 2 * (size_t)c);
  for (int64_t pixel = rows.begin * plan.q; pixel < end; pixel += MOST_PIXELS) {
    for_channels<V, 1>(c, SumsOfChunk<V, EPILOGUE>{plan, pixel, min64(end, pixel + MOST_PIXELS), scratch, scratch + c});
    for (int64_t i = 0; i < 2 * c; ++i) sums[i] += scratch[i];
  }
}

// ---------------------------------------------------------------- gradient of the input

// The gradient of a pixel, or of the four of a window.
template <class V, NormEpilogue EPILOGUE>
struct InputGradientOfPixel {
  typedef typename V::type Vector;
  const SlimBatchNormF32& a;
  const float* x;
  const float* grad;  // NULL where no window has the pixel
  float* to;

  template <int COUNT, bool PART>
  SLIM_ALWAYS_INLINE void run(int64_t channel, int lanes) const {
    static_assert(COUNT == 1, "one vector");
    const Coefficients<V, PART> of(a, channel, lanes);
    const Vector slope = load_channels<V, PART>(a.coefficients + 3 * a.c + channel, lanes);
    const Vector constant = load_channels<V, PART>(a.coefficients + 4 * a.c + channel, lanes);
    Vector g = grad == nullptr ? V::zero() : load_channels<V, PART>(grad + channel, lanes);
    if constexpr (EPILOGUE == NORM_RELU_POOL) {
      const int64_t right = a.c, down = a.w * a.c, places[4] = {0, right, down, down + right};
      const PoolWindowOf<V> window(of, x + channel, right, down, lanes);
      Vector each[4];
      window.spread(V::where(V::positive(window.largest), g), each);
      SLIM_UNROLL
      for (int i = 0; i < 4; ++i) {
        // Loaded once more: of AVX2's 16 registers there are too few to keep four pixels.
        const Vector shifted = of.shifted(load_channels<V, PART>(x + places[i] + channel, lanes));
        const Vector own = V::fma(each[i], of.scale, V::fma(shifted, slope, constant));
        store_channels<V, PART>(to + places[i] + channel, own, lanes);
      }
    } else {
      const Vector shifted = of.shifted(load_channels<V, PART>(x + channel, lanes));
      if (EPILOGUE == NORM_RELU) g = V::where(V::positive(of.normalised(shifted)), g);
      store_channels<V, PART>(to + channel, V::fma(g, of.scale, V::fma(shifted, slope, constant)), lanes);
    }
  }
};

template <class V, NormEpilogue EPILOGUE>
inline void input_gradient_of_part(const NormPlan& plan, int64_t part) {
  const SlimBatchNormF32& a = *plan.a;
  const Range rows = plan.part_rows(part);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* x = plan.input(row * plan.q);
    const float* grad = a.grad + row * plan.q * a.c;
    for (int64_t column = 0; column < plan.q; ++column, x += plan.step(), grad += a.c)
      for_channels<V, 1>(a.c, InputGradientOfPixel<V, EPILOGUE>{a, x, grad, a.y + (x - a.x)});
    if (EPILOGUE != NORM_RELU_POOL) continue;
    // No window has the last column of an odd width, nor the last row of an odd height.
    const int64_t first = plan.input(row * plan.q) - a.x, line = a.w * a.c;
    const auto alone = [&](int64_t at) {
      for_channels<V, 1>(a.c, InputGradientOfPixel<V, NORM_PLAIN>{a, a.x + at, nullptr, a.y + at});
    };
    for (int64_t column = 2 * plan.q; column < a.w; ++column) {
      alone(first + column * a.c);
      alone(first + line + column * a.c);
    }
    if (row % plan.p == plan.p - 1 && a.h > 2 * plan.p) {
      for (int64_t column = 0; column < a.w; ++column) alone(first + 2 * line + column * a.c);
    }
  }
}

// ---------------------------------------------------------------- all parts

template <class V, NormEpilogue EPILOGUE>
inline void run_norm_part(const NormPlan& plan, int64_t part, float* scratch) {
  switch (plan.a->which) {
    case SLIM_NORM_OUTPUT:         return output_of_part<V, EPILOGUE>(plan, part);
    case SLIM_NORM_GRADIENT_SUMS:  return sums_of_part<V, EPILOGUE>(plan, part, scratch);
    case SLIM_NORM_INPUT_GRADIENT: return input_gradient_of_part<V, EPILOGUE>(plan, part);
    default:                       return moments_of_part<V>(plan, part, scratch);
  }
}

// Joins what the parts have found.
inline void finish_norm(const NormPlan& plan) {
  const SlimBatchNormF32& a = *plan.a;
  memset(a.sums, 0, sizeof(double) * 2 * (size_t)a.c);
  for (int64_t part = 0; part < plan.parts; ++part) {
    const double* const own = plan.partial + part * 2 * a.c;
    if (a.which == SLIM_NORM_MOMENTS) {
      const Range rows = plan.part_rows(part);
      join_moments(
          a.sums, a.sums + a.c, a.c, rows.begin * plan.q, rows.size() * plan.q, [=](int64_t i) { return own[i]; },
          [=, &a](int64_t i) { return own[a.c + i]; });
    } else {
      for (int64_t i = 0; i < 2 * a.c; ++i) a.sums[i] += own[i];
    }
  }
  if (a.which != SLIM_NORM_MOMENTS) return;
  for (int64_t i = 0; i < a.c; ++i) a.sums[a.c + i] /= (double)(plan.rows * plan.q);
}

template <class V>
inline int batch_norm(const SlimBatchNormF32& a, int32_t threads) {
  NormPlan plan = plan_norm(a);
  const int team = (int)min64(threads, plan.parts);
  const bool sums = a.which == SLIM_NORM_MOMENTS || a.which == SLIM_NORM_GRADIENT_SUMS;
  constexpr size_t LINE = 64;
  const size_t scratch_floats = ((size_t)a.c * 3 + 15) / 16 * 16;
  float* scratch = nullptr;
  bool failed = false;
  if (sums) {
    plan.partial = (double*)malloc(sizeof(double) * 2 * (size_t)(plan.parts * a.c));
    failed = posix_memalign((void**)&scratch, LINE, sizeof(float) * scratch_floats * (size_t)team) != 0;
    failed = failed || plan.partial == nullptr;
  }
  if (!failed) {
    Share parts_taken = {};
#pragma omp parallel num_threads(team) if (team > 1)
    {
      float* const own = sums ? scratch + scratch_floats * (size_t)omp_get_thread_num() : nullptr;
      for (int64_t part; (part = take(parts_taken)) < plan.parts;) {
        switch (plan.epilogue) {
          case NORM_PLAIN:     run_norm_part<V, NORM_PLAIN>(plan, part, own); break;
          case NORM_RELU:      run_norm_part<V, NORM_RELU>(plan, part, own); break;
          case NORM_RELU_POOL: run_norm_part<V, NORM_RELU_POOL>(plan, part, own); break;
        }
      }
    }
    if (sums) finish_norm(plan);
  }
  free(scratch);
  free(plan.partial);
  return failed ? SLIM_ERROR_NO_MEMORY : SLIM_OK;
}

}  // namespace
