// Max and average pooling, as a step between convolutions. In either layout the channels of a pixel (times the images
// of a vector) lie next to each other, so a pool combines rows of floats, whatever they stand for.
#pragma once
#include <math.h>
#include <stdint.h>

#include "../kernels.h"
#include "ranges.h"

namespace {

struct PoolPlan {
  const SlimConv2dF32* conv;  // kernels.h says which members are read
  int kind;                   // SLIM_STEP_MAX_POOL, ...
  Axis rows, columns;
  int64_t floats;  // of a pixel
  int64_t units;   // a row of output pixels of a vector of images each
};

inline PoolPlan plan_pool(const SlimConv2dF32& conv, int kind) {
  PoolPlan plan;
  plan.conv = &conv;
  plan.kind = kind;
  plan.rows = {conv.h, conv.stride_h, conv.pad_h, conv.dil_h, conv.r};
  plan.columns = {conv.w, conv.stride_w, conv.pad_w, conv.dil_w, conv.s};
  plan.floats = conv.c_in * conv.lanes;
  plan.units = ceil_div(conv.n, conv.lanes) * conv.p;
  return plan;
}

// The pixels that one output reads, as places in x.
struct PoolWindow {
  const float* x;  // of the first pixel
  int64_t rows, columns, row_step, column_step;
  float start, scale;  // of max: minus infinity and 1; of a mean: 0 and one over the pixels it is of
};

// COUNT vectors of neighbouring channels at once, so that several sums are under way.
template <class V, int COUNT, bool MAX>
inline void pool_channels(const PoolWindow& window, int64_t channel, float* y) {
  typename V::type found[COUNT];
  for (int i = 0; i < COUNT; ++i) found[i] = V::broadcast(&window.start);
  for (int64_t row = 0; row < window.rows; ++row) {
    const float* pixel = window.x + row * window.row_step + channel;
    for (int64_t column = 0; column < window.columns; ++column, pixel += window.column_step) {
      for (int i = 0; i < COUNT; ++i) {
        const typename V::type v = V::load(pixel + i * V::N);
        found[i] = MAX ? V::max_nan(found[i], v) : V::add(found[i], v);
      }
    }
  }
  const typename V::type scale = V::broadcast(&window.scale);
  for (int i = 0; i < COUNT; ++i) {
    V::store(y + channel + i * V::N, MAX ? found[i] : V::fma(found[i], scale, V::zero()));
  }
}

// The channels behind the last whole vector.
template <class V, bool MAX>
inline void pool_last_channels(const PoolWindow& window, int64_t channel, int count, float* y) {
  typename V::type found = V::broadcast(&window.start);
  for (int64_t row = 0; row < window.rows; ++row) {
    const float* pixel = window.x + row * window.row_step + channel;
    for (int64_t column = 0; column < window.columns; ++column, pixel += window.column_step) {
      const typename V::type v = V::load_part(pixel, count);
      found = MAX ? V::max_nan(found, v) : V::add(found, v);
    }
  }
  const typename V::type scale = V::broadcast(&window.scale);
  V::store_part(y + channel, MAX ? found : V::fma(found, scale, V::zero()), count);
}

// A function of its own: inlined, it would read the window from the stack in its loops.
template <class V, bool MAX>
__attribute__((noinline)) void pool_pixel(const PoolWindow& window, int64_t floats, float* y) {
  constexpr int COUNT = 4;
  int64_t channel = 0;
  for (; channel + COUNT * V::N <= floats; channel += COUNT * V::N) pool_channels<V, COUNT, MAX>(window, channel, y);
  for (; channel + V::N <= floats; channel += V::N) pool_channels<V, 1, MAX>(window, channel, y);
  if (channel < floats) pool_last_channels<V, MAX>(window, channel, (int)(floats - channel), y);
}

// One row of output pixels.
template <class V>
inline void run_pool_unit(const PoolPlan& plan, int64_t unit) {
  const SlimConv2dF32& conv = *plan.conv;
  const int64_t group = unit / conv.p, row = unit % conv.p;
  const Range down = taps_inside(plan.rows, row);
  const int64_t y = row * conv.stride_h - conv.pad_h + down.begin * conv.dil_h;
  PoolWindow window;
  window.rows = down.size();
  window.row_step = conv.dil_h * conv.w * plan.floats;
  window.column_step = conv.dil_w * plan.floats;
  window.start = plan.kind == SLIM_STEP_MAX_POOL ? -INFINITY : 0.0f;
  for (int64_t column = 0; column < conv.q; ++column) {
    const Range right = taps_inside(plan.columns, column);
    const int64_t x = column * conv.stride_w - conv.pad_w + right.begin * conv.dil_w;
    window.columns = right.size();
    window.x = conv.x + ((group * conv.h + y) * conv.w + x) * plan.floats;
    const int64_t inside = window.rows * window.columns, all = (int64_t)conv.r * conv.s;
    window.scale = 1.0f / (float)(plan.kind == SLIM_STEP_PADDED_AVERAGE_POOL ? all : max64(inside, 1));
    float* const to = conv.y + ((group * conv.p + row) * conv.q + column) * plan.floats;
    if (plan.kind == SLIM_STEP_MAX_POOL)
      pool_pixel<V, true>(window, plan.floats, to);
    else
      pool_pixel<V, false>(window, plan.floats, to);
  }
}

}  // namespace
