// Single weights in slabs of input channels: the microkernel and how it is fed. slab_plan.h explains slabs.
//
// A tile is TR x TC pixels of a vector of images, for one output channel after the other. An entry costs a broadcast of
// its weight and TR * TC multiply-adds that read x from the patch, one load each: about 18 cycles for 16 pixels on a
// core that loads one vector a cycle. Taps outside the image are left out for the first or the last row or column of a
// tile, which is all of the padding of a 3x3 convolution. The loops over the entries of such a run are short and end
// unpredictably, but as each begins where the one before ended, and only its end is read from memory, the next
// multiply-adds are under way before the last ones are done.
#pragma once
#include <stdint.h>

#include "../kernels.h"
#include "compiler.h"
#include "plan.h"
#include "ranges.h"
#include "slab_plan.h"

namespace {

// One tile over one slab, for some output channels.
struct SlabCall {
  const float* x;       // in the patch, the place of the tile's first pixel at channel 0, tap (0, 0)
  int64_t x_row;        // floats from a row of pixels in the patch to the next
  const int32_t* ends;  // of the first output channel: [outputs][taps]
  const SlabEntry* entries;
  int64_t outputs, taps, tap_columns;
  TapRuns rows, columns;
  bool every_tap;      // no tap is left out for the whole tile
  bool split_columns;  // some taps are left out for the first or the last column, or for all
  bool first, last;    // slab
  float* sums;         // [outputs][pixels] vectors: partial sums between slabs
  const float* bias;   // of the first output channel, or NULL
  int relu, pool;
  float* y;  // of the tile's first pixel and the first output channel
  int64_t y_row, y_pixel;
  int64_t present_rows, present_columns;  // of y, pooled where it is
};

typedef void (*SlabFunction)(const SlabCall& call);

template <class V, int TR, int TC>
struct SlabTile {
  typedef typename V::type Vector;
  typedef Vector Sums[TR][TC];
  // A multiply-add takes 4 cycles: the smallest tiles sum into several sets of accumulators in turn.
  static constexpr int SETS = TR * TC >= 4 ? 1 : 4 / (TR * TC);

  static void run(const SlabCall& call) {
    const float* x[TR];
    SLIM_UNROLL
    for (int r = 0; r < TR; ++r) x[r] = call.x + r * call.x_row;
    const SlabEntry* entry = call.entries + call.ends[-1];
    const int32_t* ends = call.ends;
    float* partial = call.sums;
    for (int64_t o = 0; o < call.outputs; ++o, ends += call.taps, partial += TR * TC * V::N) {
      Sums sums;
      begin(sums, call, o, partial);
      if (call.split_columns)
        add_rows_and_columns(sums, x, call, ends, entry);
      else
        add_rows(sums, x, call, ends, entry);
      if (!call.last)
        save(sums, partial);
      else if (call.pool)
        finish_pooled(sums, call, o);
      else
        finish(sums, call, o);
    }
  }

 private:
  static SLIM_ALWAYS_INLINE void begin(Sums& sums, const SlabCall& call, int64_t o, const float* partial) {
    if (call.first) {
      const Vector bias = call.bias != nullptr ? V::broadcast(call.bias + o) : V::zero();
      SLIM_UNROLL
      for (int r = 0; r < TR; ++r) {
        SLIM_UNROLL
        for (int c = 0; c < TC; ++c) sums[r][c] = bias;
      }
    } else {
      SLIM_UNROLL
      for (int r = 0; r < TR; ++r) {
        SLIM_UNROLL
        for (int c = 0; c < TC; ++c) sums[r][c] = V::load(partial + (r * TC + c) * V::N);
      }
    }
  }

  // sums[R0..R1][C0..C1] += x[R0..R1][C0..C1] * w[1], for the entries in front of `end`
  template <int R0, int R1, int C0, int C1>
  static SLIM_ALWAYS_INLINE void add(Sums& sums, const float* const (&x)[TR], const SlabEntry*& entry,
                                     const SlabEntry* end) {
    if constexpr (SETS > 1) {
      Sums sets[SETS];  // the first one is not used
      SLIM_UNROLL
      for (int set = 1; set < SETS; ++set) {
        SLIM_UNROLL
        for (int r = R0; r < R1; ++r) {
          SLIM_UNROLL
          for (int c = C0; c < C1; ++c) sets[set][r][c] = V::zero();
        }
      }
      for (; end - entry >= SETS; entry += SETS) {
        add_entry<R0, R1, C0, C1>(sums, x, entry[0]);
        SLIM_UNROLL
        for (int set = 1; set < SETS; ++set) add_entry<R0, R1, C0, C1>(sets[set], x, entry[set]);
      }
      SLIM_UNROLL
      for (int set = 1; set < SETS; ++set) {
        SLIM_UNROLL
        for (int r = R0; r < R1; ++r) {
          SLIM_UNROLL
          for (int c = C0; c < C1; ++c) sums[r][c] = V::add(sums[r][c], sets[set][r][c]);
        }
      }
    }
    for (; entry != end; ++entry) add_entry<R0, R1, C0, C1>(sums, x, *entry);
  }

  template <int R0, int R1, int C0, int C1>
  static SLIM_ALWAYS_INLINE void add_entry(Sums& sums, const float* const (&x)[TR], const SlabEntry& entry) {
    const int64_t offset = entry.offset;
    const Vector w = V::broadcast(&entry.weight);
    SLIM_UNROLL
    for (int r = R0; r < R1; ++r) {
      SLIM_UNROLL
      for (int c = C0; c < C1; ++c) sums[r][c] = V::fma(V::load(x[r] + offset + c * V::N), w, sums[r][c]);
    }
  }

  // Taps are computed for all columns: the runs of rows are contiguous.
  static SLIM_ALWAYS_INLINE void add_rows(Sums& sums, const float* const (&x)[TR], const SlabCall& call,
                                          const int32_t* ends, const SlabEntry*& entry) {
    const int64_t (&rows)[4] = call.rows.bounds;
    if (!call.every_tap) entry = call.entries + ends[rows[0] * call.tap_columns - 1];
    add<1, TR, 0, TC>(sums, x, entry, call.entries + ends[rows[1] * call.tap_columns - 1]);
    add<0, TR, 0, TC>(sums, x, entry, call.entries + ends[rows[2] * call.tap_columns - 1]);
    add<0, TR - 1, 0, TC>(sums, x, entry, call.entries + ends[rows[3] * call.tap_columns - 1]);
  }

  static SLIM_ALWAYS_INLINE void add_rows_and_columns(Sums& sums, const float* const (&x)[TR], const SlabCall& call,
                                                      const int32_t* ends, const SlabEntry*& entry) {
    const int64_t (&rows)[4] = call.rows.bounds;
    for (int64_t i = rows[0]; i < rows[1]; ++i) add_columns<1, TR>(sums, x, call, ends + i * call.tap_columns, entry);
    for (int64_t i = rows[1]; i < rows[2]; ++i) add_columns<0, TR>(sums, x, call, ends + i * call.tap_columns, entry);
    for (int64_t i = rows[2]; i < rows[3]; ++i) {
      add_columns<0, TR - 1>(sums, x, call, ends + i * call.tap_columns, entry);
    }
  }

  // One row of taps.
  template <int R0, int R1>
  static SLIM_ALWAYS_INLINE void add_columns(Sums& sums, const float* const (&x)[TR], const SlabCall& call,
                                             const int32_t* ends, const SlabEntry*& entry) {
    const int64_t (&columns)[4] = call.columns.bounds;
    if (!call.every_tap) entry = call.entries + ends[columns[0] - 1];
    add<R0, R1, 1, TC>(sums, x, entry, call.entries + ends[columns[1] - 1]);
    add<R0, R1, 0, TC>(sums, x, entry, call.entries + ends[columns[2] - 1]);
    add<R0, R1, 0, TC - 1>(sums, x, entry, call.entries + ends[columns[3] - 1]);
  }

  static SLIM_ALWAYS_INLINE void save(const Sums& sums, float* partial) {
    SLIM_UNROLL
    for (int r = 0; r < TR; ++r) {
      SLIM_UNROLL
      for (int c = 0; c < TC; ++c) V::store(partial + (r * TC + c) * V::N, sums[r][c]);
    }
  }

  static SLIM_ALWAYS_INLINE Vector activated(const SlabCall& call, Vector v) { return call.relu ? V::relu(v) : v; }

  // Pixels of the tile beyond the image are not written.
  static SLIM_ALWAYS_INLINE void finish(const Sums& sums, const SlabCall& call, int64_t o) {
    float* const y = call.y + o * V::N;
    SLIM_UNROLL
    for (int r = 0; r < TR; ++r) {
      SLIM_UNROLL
      for (int c = 0; c < TC; ++c) {
        if (r < call.present_rows && c < call.present_columns) {
          V::store(y + r * call.y_row + c * call.y_pixel, activated(call, sums[r][c]));
        }
      }
    }
  }

  static SLIM_ALWAYS_INLINE void finish_pooled(const Sums& sums, const SlabCall& call, int64_t o) {
    float* const y = call.y + o * V::N;
    SLIM_UNROLL
    for (int r = 0; r < TR / 2; ++r) {
      SLIM_UNROLL
      for (int c = 0; c < TC / 2; ++c) {
        const Vector upper = V::max_nan(activated(call, sums[2 * r][2 * c]), activated(call, sums[2 * r][2 * c + 1]));
        const Vector lower =
            V::max_nan(activated(call, sums[2 * r + 1][2 * c]), activated(call, sums[2 * r + 1][2 * c + 1]));
        if (r < call.present_rows && c < call.present_columns) {
          V::store(y + r * call.y_row + c * call.y_pixel, V::max_nan(upper, lower));
        }
      }
    }
  }
};

// The microkernel of SLAB_TILES[tile]. slab_cut takes the first for vectors of 16 floats alone: where there are 16
// registers, its sums would be spilled, and it is not compiled.
template <class V>
inline SlabFunction slab_function(int tile) {
  constexpr SlabFunction functions[SLAB_TILE_COUNT] = {
      SlabTile < V,           V::N == 16 ? 4 : 2,    4 > ::run, SlabTile<V, 2, 4>::run, SlabTile<V, 2, 2>::run,
      SlabTile<V, 2, 1>::run, SlabTile<V, 1, 1>::run};
  return functions[tile];
}

// ---------------------------------------------------------------- the patch

// Where a lane finds what lies some parts below and to the right of its own: the lane of that part of the same image,
// or -1 where the image ends before.
template <class V>
inline void lanes_of_parts(const SlabCut& cut, int64_t below, int64_t right, int32_t (&from)[V::N]) {
  const int64_t rows = cut.rows.parts, columns = cut.columns.parts;
  for (int64_t lane = 0; lane < V::N; ++lane) {
    const int64_t row = lane / columns % rows + below, column = lane % columns + right;
    const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
    from[lane] = inside ? (int32_t)(lane + below * columns + right) : -1;
  }
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// What the tile at (row, column) reads of an image, or of all parts, at `channels` channels from the first of a slab.
//
// Places outside the image keep the zeros that the first slab of a tile has written.
template <class V>
inline void fill_patch(const SlabCut& cut, const float* image, int64_t pixel_floats, int64_t row, int64_t column,
                       int64_t channels, bool first_slab, float* patch) {
  const int64_t height = cut.rows.axis.size, width = cut.columns.axis.size, step = cut.plane * V::N;
  const bool in_parts = cut.rows.parts > 1 || cut.columns.parts > 1;
  float* to = patch;
  for (int64_t i = 0; i < cut.rows.length; ++i) {
    const int64_t y = position_of_place(cut.rows, row, cut.rows.first + i);
    const bool row_inside = y >= 0 && y < height;
    for (int64_t j = 0; j < cut.columns.length; ++j, to += V::N) {
      const int64_t x = position_of_place(cut.columns, column, cut.columns.first + j);
      if (row_inside && x >= 0 && x < width) {
        const float* const from = image + (y * width + x) * pixel_floats;
        for (int64_t c = 0; c < channels; ++c) V::store(to + c * step, V::load(from + c * V::N));
      } else if (in_parts) {
        const int64_t below = floor_div(y, height), right = floor_div(x, width);
        const float* const from = image + ((y - below * height) * width + x - right * width) * pixel_floats;
        int32_t numbers[V::N];
        lanes_of_parts<V>(cut, below, right, numbers);
        const typename V::Lanes lanes = V::lanes(numbers);
        for (int64_t c = 0; c < channels; ++c) V::store(to + c * step, V::moved(V::load(from + c * V::N), lanes));
      } else if (first_slab) {
        for (int64_t c = 0; c < cut.channels; ++c) V::store(to + c * step, V::zero());
      }
    }
  }
}

// ---------------------------------------------------------------- one unit

// `scratch` holds plan.scratch_floats.
template <class V>
inline void run_slab_unit(const Plan& plan, const WorkUnit& unit, float* scratch) {
  const SlimConv2dF32& conv = *plan.conv;
  const SlabCut& cut = plan.slabs;
  const SlabProgram program = slab_program_at(conv, cut, plan.offsets);
  const SlabFunction run = slab_function<V>(cut.tile);
  const int64_t pool = conv.pool ? 2 : 1, taps = (int64_t)conv.r * conv.s;
  const int64_t p_out = conv.p / pool, q_out = conv.q / pool;
  const int64_t output = unit.strips.begin, x_pixel = conv.c_in * V::N;
  // Vectors that lie across two lines of the cache cost twice.
  float* const patch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);

  SlabCall call;
  call.x = patch;
  call.x_row = cut.columns.length * V::N;
  call.entries = program.entries;
  call.outputs = unit.strips.size();
  call.taps = taps;
  call.tap_columns = conv.s;
  call.sums = patch + ceil_div(cut.patch_floats(V::N), 16) * 16;
  call.bias = conv.bias == nullptr ? nullptr : conv.bias + output;
  call.relu = relu_in_tiles(conv);
  call.pool = conv.pool;
  call.y_pixel = conv.c_out * V::N;
  call.y_row = q_out * call.y_pixel;
  for (int64_t image = unit.images.begin; image < unit.images.end; ++image) {
    for (int64_t row = unit.rows.begin; row < unit.rows.end; row += cut.rows.tile) {
      call.rows = tap_runs(cut.rows, row);
      call.present_rows = min64(cut.rows.tile, unit.rows.end - row) / pool;
      for (int64_t column = 0; column < plan.work.columns; column += cut.columns.tile) {
        call.columns = tap_runs(cut.columns, column);
        call.present_columns = min64(cut.columns.tile, plan.work.columns - column) / pool;
        const int64_t (&rows)[4] = call.rows.bounds, (&columns)[4] = call.columns.bounds;
        call.every_tap = rows[0] == 0 && rows[3] == conv.r && columns[0] == 0 && columns[3] == conv.s;
        call.split_columns = columns[1] > 0 || columns[2] < conv.s;
        call.y = conv.y + ((image * p_out + row / pool) * q_out + column / pool) * call.y_pixel + output * V::N;
        const float* const x = conv.x + image * conv.h * conv.w * x_pixel;
        for (int64_t slab = 0; slab < cut.count; ++slab) {
          const int64_t channel = slab * cut.channels, channels = min64(cut.channels, conv.c_in - channel);
          call.first = slab == 0;
          call.last = slab == cut.count - 1;
          fill_patch<V>(cut, x + channel * V::N, x_pixel, row, column, channels, call.first, patch);
          call.ends = program.ends + (slab * conv.c_out + output) * taps;
          run(call);
        }
      }
    }
  }
}

}  // namespace
