// Computes one unit of work of a plan: its tiles over its strips, and the pooling. plan.h explains the orders over
// the taps, slab_tiles.h has the units in slabs.
#pragma once
#include <stdint.h>

#include "../kernels.h"
#include "plan.h"
#include "ranges.h"
#include "slab_tiles.h"
#include "tiles.h"

namespace {

// ---------------------------------------------------------------- pixels

// Where a unit's outputs go: y itself, or the scratch memory in front of the pooling, which begins at the unit's first
// pixel.
struct Destination {
  float* base;  // of image0, row0, column 0 and channel0
  int64_t image_stride, row_stride, pixel_stride, image0, row0, channel0;
  float* at(int64_t image, int64_t row, int64_t column) const {
    return base + (image - image0) * image_stride + (row - row0) * row_stride + column * pixel_stride;
  }
};

inline Destination unit_destination(const Plan& plan, const WorkUnit& unit, float* scratch) {
  const SlimConv2dF32& conv = *plan.conv;
  Destination to;
  if (conv.pool) {
    to.base = scratch;
    to.image0 = unit.images.begin;
    to.row0 = unit.rows.begin;
    to.channel0 = unit.strips.begin * conv.strip;
    to.pixel_stride = (min64(unit.strips.end * conv.strip, conv.c_out) - to.channel0) * plan.work.lanes;
    to.row_stride = plan.work.columns * to.pixel_stride;
    to.image_stride = unit.rows.size() * to.row_stride;
  } else {
    to.base = conv.y;
    to.image0 = to.row0 = to.channel0 = 0;
    to.pixel_stride = conv.c_out * plan.work.lanes;
    to.row_stride = conv.q * to.pixel_stride;
    to.image_stride = conv.p * to.row_stride;
  }
  return to;
}

inline Axis vertical_axis(const SlimConv2dF32& conv) { return {conv.h, conv.stride_h, conv.pad_h, conv.dil_h, conv.r}; }
inline Axis horizontal_axis(const SlimConv2dF32& conv) {
  return {conv.w, conv.stride_w, conv.pad_w, conv.dil_w, conv.s};
}

// Hands out the pixels of images x rows x columns, in that order, in tiles of nearly equal size. Pointers advance by
// additions: where strips and entries are few, computing each pixel's address was a third of the time.
struct PixelCursor {
  const Plan* plan;
  const Destination* to;
  Range rows, columns;
  int64_t image, row;                 // of the next pixel
  int64_t left_in_row, left;          // pixels to come
  int64_t tile_pixels, larger_tiles;  // the first `larger_tiles` tiles have one pixel more
  const float* next_x;                // of the next pixel, at tap (0, 0)
  float* next_y;                      // of the next pixel, at the destination's channel 0
  int64_t x_step, y_step;             // from one pixel of a row to the next

  PixelCursor(const Plan& plan_, const Destination& to_, Range images, Range rows_, Range columns_)
      : plan(&plan_), to(&to_), rows(rows_), columns(columns_), left_in_row(0), next_x(nullptr), next_y(nullptr) {
    image = images.begin;
    row = rows.begin;
    x_step = plan->conv->stride_w * plan->conv->c_in * plan->work.lanes;
    y_step = to->pixel_stride;
    left = rows.end > rows.begin && columns.end > columns.begin ? images.size() * rows.size() * columns.size() : 0;
    const int64_t tiles = ceil_div(left, plan->tiles.most_pixels);
    tile_pixels = tiles > 0 ? left / tiles : 0;
    larger_tiles = tiles > 0 ? left % tiles : 0;
    if (left > 0) start_row();
  }

  void start_row() {
    const SlimConv2dF32& conv = *plan->conv;
    const int64_t x_row = row * conv.stride_h - conv.pad_h, x_column = columns.begin * conv.stride_w - conv.pad_w;
    next_x = conv.x + ((image * conv.h + x_row) * conv.w + x_column) * conv.c_in * plan->work.lanes;
    next_y = to->at(image, row, columns.begin);
    left_in_row = columns.size();
  }

  // Writes the pointers of the next tile and returns its number of pixels, 0 at the end.
  int next(const float** x, float** y) {
    if (left == 0) return 0;
    int size = (int)tile_pixels;
    if (larger_tiles > 0) {
      --larger_tiles;
      ++size;
    }
    left -= size;
    for (int m = 0; m < size;) {
      const int run = (int)min64(size - m, left_in_row);
      const float* px = next_x;
      float* py = next_y;
      for (int i = 0; i < run; ++i, px += x_step, py += y_step) {
        x[m + i] = px;
        y[m + i] = py;
      }
      next_x = px;
      next_y = py;
      m += run;
      left_in_row -= run;
      if (left_in_row == 0 && left + size - m > 0) {
        if (++row == rows.end) {
          row = rows.begin;
          ++image;
        }
        start_row();
      }
    }
    return size;
  }
};

// Reads one float of every cache line. The hardware prefetchers follow this order: the weights of a 512 x 512 layer on
// a 2x2 image came from L3 at 100 GB/s, where in the microkernels' own order, and with software prefetches too, the
// latency of the L1 misses in flight held them to 20 GB/s. Lines that another core has just written also come faster
// when more of them are asked for at once.
inline void read_ahead(const float* from, int64_t count) {
  constexpr int64_t LINE_FLOATS = 16;
  float sum = 0;
  for (int64_t i = 0; i < count; i += LINE_FLOATS) sum += from[i];
  __asm__ volatile("" : : "m"(sum));  // keeps the loop
}

// ---------------------------------------------------------------- all taps at once

// Tap rows that one call of a microkernel may be given, and segments of all its strips.
constexpr int MAX_SEGMENTS = 64, MAX_LISTED = 1024;

// As many strips as keep their weights and offsets in L2 while tiles pass over them, half of the smallest L2 aimed at
// (512 KB), and as can be listed.
inline Range strips_in_cache(const Plan& plan, Range strips) {
  constexpr int64_t CACHED_BYTES = 256 * 1024;
  const SlimConv2dF32& conv = *plan.conv;
  const int64_t entry_bytes = plan.work.entry_weights * 4 + 4;
  const int64_t first_entry = conv.tap_ptr[strips.begin * plan.work.taps];
  const int64_t last = min64(strips.end, strips.begin + MAX_LISTED / min64(conv.r, MAX_SEGMENTS));
  int64_t end = strips.begin + 1;
  for (; end < last; ++end) {
    const int64_t end_entry = conv.tap_ptr[(end + 1) * plan.work.taps];
    if ((end_entry - first_entry) * entry_bytes > CACHED_BYTES) break;
  }
  return {strips.begin, end};
}

// The entries of strips at these taps: of each, one run for each row of taps, or a single one where the rows are
// complete and so adjoin. Returns the number of runs of a strip.
inline int list_segments(const Plan& plan, Range strips, Range tap_rows, Range tap_columns, Segment* segments) {
  const SlimConv2dF32& conv = *plan.conv;
  if (tap_rows.begin >= tap_rows.end || tap_columns.begin >= tap_columns.end) return 0;
  const bool complete = tap_columns.begin == 0 && tap_columns.end == conv.s;
  for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
    const int32_t* tap_ptr = conv.tap_ptr + strip * plan.work.taps;
    if (complete) {
      *segments++ = {tap_ptr[tap_rows.begin * conv.s], tap_ptr[tap_rows.end * conv.s]};
      continue;
    }
    for (int64_t i = tap_rows.begin; i < tap_rows.end; ++i) {
      *segments++ = {tap_ptr[i * conv.s + tap_columns.begin], tap_ptr[i * conv.s + tap_columns.end]};
    }
  }
  return complete ? 1 : (int)tap_rows.size();
}

// The pixels of one tile.
struct TilePixels {
  const float* x[MAX_TILE_PIXELS];
  float* y[MAX_TILE_PIXELS];
  int size;
};

// Computes the pixels of rows x columns, which see the same taps, for some strips, tile after tile. More rows of taps
// than one call of a microkernel takes are added in several rounds, each of which goes on from what the one before has
// written to y.
inline void run_class(const Plan& plan, const WorkUnit& unit, const Destination& to, Range strips, const TapClass& rows,
                      const TapClass& columns) {
  const SlimConv2dF32& conv = *plan.conv;
  const int64_t first = strips.begin * conv.strip;
  Segment segments[MAX_LISTED];
  Strips call;
  call.count = strips.size();
  call.weights = conv.weights;
  call.offsets = plan.offsets;
  call.segments = segments;
  call.bias = conv.bias == nullptr ? nullptr : conv.bias + first;
  call.channel = first - to.channel0;
  call.present = conv.c_out - first;
  Range part = {rows.taps.begin, 0};
  do {
    part.end = min64(rows.taps.end, part.begin + MAX_SEGMENTS);
    call.runs = list_segments(plan, strips, part, columns.taps, segments);
    call.start = part.begin == rows.taps.begin ? START_AT_BIAS : START_AT_Y;
    call.relu = relu_in_tiles(conv) && part.end >= rows.taps.end;
    PixelCursor cursor(plan, to, unit.images, rows.positions, columns.positions);
    TilePixels tile;
    while ((tile.size = cursor.next(tile.x, tile.y)) != 0) plan.tiles.run[tile.size](tile.x, tile.y, call);
    part.begin = part.end;
  } while (part.begin < rows.taps.end);
}

// ALL_TAPS: each class of pixels (corners, edges, interior) is cut into tiles, and each tile passes over all strips
// that the cache holds.
inline void unit_all_taps(const Plan& plan, const WorkUnit& unit, const Destination& to) {
  const SlimConv2dF32& conv = *plan.conv;
  const Axis vertical = vertical_axis(conv), horizontal = horizontal_axis(conv);
  for (Range strips = {unit.strips.begin, 0}; strips.begin < unit.strips.end; strips.begin = strips.end) {
    strips = strips_in_cache(plan, {strips.begin, unit.strips.end});
    const int64_t first = conv.tap_ptr[strips.begin * plan.work.taps], last = conv.tap_ptr[strips.end * plan.work.taps];
    read_ahead(conv.weights + first * plan.work.entry_weights, (last - first) * plan.work.entry_weights);
    for (int64_t row = unit.rows.begin; row < unit.rows.end;) {
      const TapClass rows = tap_class(vertical, row, unit.rows.end);
      for (int64_t column = 0; column < plan.work.columns;) {
        const TapClass columns = tap_class(horizontal, column, plan.work.columns);
        run_class(plan, unit, to, strips, rows, columns);
        column = columns.positions.end;
      }
      row = rows.positions.end;
    }
  }
}

// ---------------------------------------------------------------- tap by tap

// TAP_BY_TAP: a tile takes any pixels and reads zeros at the taps outside the image. A few small images fill whole
// tiles this way, and their accumulators stay in registers over all taps. Strips are the outer loop, so that their
// weights are read in order.
inline void unit_tap_by_tap(const Plan& plan, const WorkUnit& unit, const Destination& to) {
  const SlimConv2dF32& conv = *plan.conv;
  const Axis vertical = vertical_axis(conv), horizontal = horizontal_axis(conv);
  const int64_t taps = plan.work.taps;
  const int64_t pixels = unit.images.size() * unit.rows.size() * plan.work.columns;
  const int64_t tiles = ceil_div(pixels, plan.tiles.most_pixels_taps);
  const int64_t image_floats = conv.h * conv.w * conv.c_in;
  read_ahead(conv.x + unit.images.begin * image_floats, unit.images.size() * image_floats);

  // For each tile in turn: x[tap][pixel of the tile], y[pixel of the tile].
  const float* x[TAP_BY_TAP_MAX_TAPS * TAP_BY_TAP_MAX_PIXELS];
  float* y[TAP_BY_TAP_MAX_PIXELS];
  int64_t image = unit.images.begin, row = unit.rows.begin, column = 0;
  for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
    const int64_t size = pixels * (tile + 1) / tiles - first;
    for (int64_t m = 0; m < size; ++m) {
      y[first + m] = to.at(image, row, column);
      const Range tap_rows = taps_inside(vertical, row), tap_columns = taps_inside(horizontal, column);
      for (int64_t i = 0; i < conv.r; ++i) {
        for (int64_t j = 0; j < conv.s; ++j) {
          const int64_t x_row = row * conv.stride_h - conv.pad_h + i * conv.dil_h;
          const int64_t x_column = column * conv.stride_w - conv.pad_w + j * conv.dil_w;
          const bool inside = i >= tap_rows.begin && i < tap_rows.end && j >= tap_columns.begin && j < tap_columns.end;
          x[first * taps + (i * conv.s + j) * size + m] =
              inside ? conv.x + ((image * conv.h + x_row) * conv.w + x_column) * conv.c_in : plan.zeros;
        }
      }
      if (++column == plan.work.columns) {
        column = 0;
        if (++row == unit.rows.end) {
          row = unit.rows.begin;
          ++image;
        }
      }
    }
    first += size;
  }

  for (int64_t strip = unit.strips.begin; strip < unit.strips.end; ++strip) {
    const int64_t channel = strip * conv.strip;
    const float* const bias = conv.bias == nullptr ? nullptr : conv.bias + channel;
    const int present = (int)min64(conv.strip, conv.c_out - channel);
    for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
      const int64_t size = pixels * (tile + 1) / tiles - first;
      plan.tiles.run_taps[size](x + first * taps, taps, y + first, channel - to.channel0, conv.weights, conv.channels,
                                conv.tap_ptr + strip * taps, bias, relu_in_tiles(conv), present);
      first += size;
    }
  }
}

// ---------------------------------------------------------------- residual

// y = epilogue(y + residual) for the unit's outputs, which are still in the cache.
template <class V>
inline void add_residual(const Plan& plan, const WorkUnit& unit, const Destination& to) {
  const SlimConv2dF32& conv = *plan.conv;
  const int64_t begin = unit.strips.begin * conv.strip * plan.work.lanes;
  const int64_t count = min64(unit.strips.end * conv.strip * plan.work.lanes, to.pixel_stride) - begin;
  for (int64_t image = unit.images.begin; image < unit.images.end; ++image) {
    for (int64_t row = unit.rows.begin; row < unit.rows.end; ++row) {
      for (int64_t column = 0; column < plan.work.columns; ++column) {
        float* const y = to.at(image, row, column) + begin;
        const float* const added = conv.residual + (y - conv.y);
        int64_t i = 0;
        for (; i + V::N <= count; i += V::N) {
          const typename V::type sum = V::add(V::load(y + i), V::load(added + i));
          V::store(y + i, conv.relu ? V::relu(sum) : sum);
        }
        for (; i < count; ++i) {
          const float sum = y[i] + added[i];
          y[i] = conv.relu && sum < 0 ? 0 : sum;  // NaN passes
        }
      }
    }
  }
}

// ---------------------------------------------------------------- pooling

// 2x2 stride-2 max-pool of the unit's outputs in scratch memory into y.
template <class V>
inline void pool_unit(const Plan& plan, const WorkUnit& unit, const Destination& from) {
  const SlimConv2dF32& conv = *plan.conv;
  const int64_t p_out = conv.p / 2, q_out = conv.q / 2;
  // Floats of one pixel of y, of which the unit has [begin, begin + count).
  const int64_t pixel = conv.c_out * plan.work.lanes;
  const int64_t begin = unit.strips.begin * conv.strip * plan.work.lanes;
  const int64_t count = min64(unit.strips.end * conv.strip * plan.work.lanes, pixel) - begin;
  for (int64_t image = unit.images.begin; image < unit.images.end; ++image) {
    for (int64_t row = unit.rows.begin; row < unit.rows.end; row += 2) {
      for (int64_t column = 0; column < plan.work.columns; column += 2) {
        const float* s00 = from.at(image, row, column);
        const float* s01 = s00 + from.pixel_stride;
        const float* s10 = s00 + from.row_stride;
        const float* s11 = s10 + from.pixel_stride;
        float* y = conv.y + ((image * p_out + row / 2) * q_out + column / 2) * pixel + begin;
        int64_t i = 0;
        for (; i + V::N <= count; i += V::N) {
          const typename V::type upper = V::max_nan(V::load(s00 + i), V::load(s01 + i));
          const typename V::type lower = V::max_nan(V::load(s10 + i), V::load(s11 + i));
          V::store(y + i, V::max_nan(upper, lower));
        }
        for (; i < count; ++i) {
          const float others[3] = {s01[i], s10[i], s11[i]};
          float most = s00[i];
          for (float other : others) {
            if (other > most || other != other) most = other;  // NaN passes
          }
          y[i] = most;
        }
      }
    }
  }
}

// ---------------------------------------------------------------- one unit

// `scratch` holds plan.scratch_floats.
template <class V>
inline void run_unit(const Plan& plan, int64_t index, float* scratch) {
  const WorkUnit unit = unit_at(plan, index);
  if (plan.order == SLABS) {
    run_slab_unit<V>(plan, unit, scratch);
    if (plan.conv->residual != nullptr) add_residual<V>(plan, unit, unit_destination(plan, unit, scratch));
    return;
  }
  const Destination to = unit_destination(plan, unit, scratch);
  if (plan.order == TAP_BY_TAP)
    unit_tap_by_tap(plan, unit, to);
  else
    unit_all_taps(plan, unit, to);
  if (plan.conv->residual != nullptr) add_residual<V>(plan, unit, to);
  if (plan.conv->pool) pool_unit<V>(plan, unit, to);
}

}  // namespace
