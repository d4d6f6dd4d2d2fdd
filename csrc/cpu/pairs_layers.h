// The other steps of pairs.h: into pairs from channels last, and pooling.
#pragma once
#include <math.h>
#include <stdint.h>

#include "../kernels.h"
#include "images_layout.h"
#include "pairs.h"
#include "pairs_engine.h"
#include "pairs_plan.h"
#include "ranges.h"

namespace {

// Copies some pixels of one group of images. Images that a last group lacks become zeros, which are computed with, too.
template <class Engine>
inline void run_pairs_layout_unit(const LayoutPlan& plan, int64_t index) {
  typedef typename Engine::Floats V;
  const SlimConv2dF32& conv = *plan.conv;
  const int64_t group = index / plan.pixel_parts, first = index % plan.pixel_parts * plan.pixels_per_unit;
  const int64_t end = min64(plan.pixels, first + plan.pixels_per_unit), pairs = ceil_div(conv.c_in, 2);
  const int present = (int)min64(PAIR_IMAGES, conv.n - group * PAIR_IMAGES);
  const int64_t image = plan.pixels * conv.c_in;
  for (int64_t pixel = first; pixel < end; ++pixel) {
    const float* const from = conv.x + group * PAIR_IMAGES * image + pixel * conv.c_in;
    char* const to = (char*)conv.y + (group * plan.pixels + pixel) * pairs * PAIR_ROW;
    for (int64_t c = 0; c < conv.c_in; c += 2) {
      const typename V::type even = Engine::of_images(from + c, image, present);
      const typename V::type odd = c + 1 < conv.c_in ? Engine::of_images(from + c + 1, image, present) : V::zero();
      Engine::store_pair(to + c / 2 * PAIR_ROW, even, odd);
    }
  }
}

// One row of output pixels.
template <class Engine>
inline void run_pairs_pool_unit(const PairsPoolPlan& plan, int64_t unit) {
  typedef typename Engine::Floats V;
  const SlimConv2dF32& conv = *plan.pool.conv;
  const bool max = plan.pool.kind == SLIM_STEP_MAX_POOL;
  const int64_t group = unit / conv.p, row = unit % conv.p, pairs = ceil_div(conv.c_in, 2);
  const Range down = taps_inside(plan.pool.rows, row);
  for (int64_t column = 0; column < conv.q; ++column) {
    const Range right = taps_inside(plan.pool.columns, column);
    const int64_t place = (group * conv.p + row) * conv.q + column;
    const int64_t count = plan.pool.kind == SLIM_STEP_PADDED_AVERAGE_POOL ? (int64_t)conv.r * conv.s
                                                                          : max64(down.size() * right.size(), 1);
    const float start = max ? -INFINITY : 0.0f, scale = max ? 1.0f : 1.0f / (float)count;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      typename V::type even = V::broadcast(&start), odd = even;
      for (int64_t r = down.begin; r < down.end; ++r) {
        const int64_t y = row * conv.stride_h - conv.pad_h + r * conv.dil_h;
        for (int64_t s = right.begin; s < right.end; ++s) {
          const int64_t x = column * conv.stride_w - conv.pad_w + s * conv.dil_w;
          const char* const from =
              (const char*)conv.x + (((group * conv.h + y) * conv.w + x) * pairs + pair) * PAIR_ROW;
          even = max ? V::max_nan(even, Engine::even(from)) : V::add(even, Engine::even(from));
          odd = max ? V::max_nan(odd, Engine::odd(from)) : V::add(odd, Engine::odd(from));
        }
      }
      even = V::fma(even, V::broadcast(&scale), V::zero());
      odd = V::fma(odd, V::broadcast(&scale), V::zero());
      if (!plan.to_floats) {
        Engine::store_pair((char*)conv.y + (place * pairs + pair) * PAIR_ROW, even, odd);
        continue;
      }
      float* const to = conv.y + (place * conv.c_in + 2 * pair) * PAIR_IMAGES;
      V::store(to, even);
      if (2 * pair + 1 < conv.c_in) V::store(to + PAIR_IMAGES, odd);
    }
  }
}

template <class Engine>
void run_conv_unit_of(const void* plan, int64_t unit, void* scratch) {
  run_pairs_unit<Engine>(*(const PairsPlan*)plan, unit, (char*)scratch);
}

template <class Engine>
void run_layout_unit_of(const void* plan, int64_t unit) {
  run_pairs_layout_unit<Engine>(*(const LayoutPlan*)plan, unit);
}

template <class Engine>
void run_pool_unit_of(const void* plan, int64_t unit) {
  run_pairs_pool_unit<Engine>(*(const PairsPoolPlan*)plan, unit);
}

template <class Engine>
constexpr SlimPairsEngine engine_of() {
  return {run_conv_unit_of<Engine>, run_layout_unit_of<Engine>, run_pool_unit_of<Engine>};
}

}  // namespace
