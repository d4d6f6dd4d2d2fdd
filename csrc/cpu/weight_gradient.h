// The gradient of the stored weights: for each stored block the products of its input channels at its tap with its
// output channels of `grad`, summed over all images and output pixels.
//
// The outputs of a *chunk* (a few images, or a few rows of one) and the input that they read are copied into a cache's
// worth of scratch memory first: `grad` as panels (panel, pixel, WIDTH), one for every WIDTH output channels, and x as
// rows of pixels (channel, pixel), so that a stored channel reads one short run of memory. Then a microkernel keeps the
// sums of up to MR channels in registers while the pixels of a tap that lie inside the image pass by:
//
//   an entry, here, is an input channel of a stored block; at each pixel it costs a broadcast of x and NV multiply-adds
//
// Several parts of the chunks are summed into memory of their own, which is added up in the end, part by part. How many
// parts there are follows from the problem alone, so results do not depend on the number of threads.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include "../kernels.h"
#include "compiler.h"
#include "images_layout.h"
#include "ranges.h"
#include "team.h"

namespace {

// ---------------------------------------------------------------- microkernels

// One output pixel of a chunk and the pixel that it reads at a tap.
struct PixelPair {
  int32_t grad;  // elements from the start of a panel
  int32_t x;     // elements from the start of a row
};

// Adds the products of `count` pairs to the sums of some entries, or, for the first chunk, writes them there.
//   panel    of `grad`
//   rows     of x, one an entry
//   sums     of the entries, `stride` elements from one to the next
typedef void (*EntriesFunction)(const float* panel, const float* const* rows, const PixelPair* pairs, int64_t count,
                                float* sums, int64_t stride, bool first);

template <class V, int NV, int MR>
struct EntriesTile {
  static constexpr int SETS = MR * NV >= 5 ? 1 : 2;  // enough independent multiply-adds, see Tile in tiles.h
  typedef typename V::type Vector;

  static void run(const float* panel, const float* const* rows, const PixelPair* pairs, int64_t count, float* sums,
                  int64_t stride, bool first) {
    Vector total[SETS][MR][NV];
    const float* x[MR];  // [MR]
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) x[m] = rows[m];
    SLIM_UNROLL
    for (int set = 0; set < SETS; ++set) {
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) {
        SLIM_UNROLL
        for (int v = 0; v < NV; ++v) total[set][m][v] = V::zero();
      }
    }
    const PixelPair* const end = pairs + count;
    for (; end - pairs >= SETS; pairs += SETS) {
      SLIM_UNROLL
      for (int set = 0; set < SETS; ++set) add_pixel(total[set], x, panel, pairs[set]);
    }
    if (SETS > 1) {
      for (; pairs != end; ++pairs) add_pixel(total[0], x, panel, pairs[0]);
    }
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) {
      SLIM_UNROLL
      for (int v = 0; v < NV; ++v) {
        Vector sum = total[0][m][v];
        SLIM_UNROLL
        for (int set = 1; set < SETS; ++set) sum = V::add(sum, total[set][m][v]);
        float* const target = sums + m * stride + v * V::N;
        V::store(target, first ? sum : V::add(V::load(target), sum));
      }
    }
  }

 private:
  // total[MR][NV] += x[MR][1] * grad[1][NV]
  static SLIM_ALWAYS_INLINE void add_pixel(Vector (&total)[MR][NV], const float* const (&x)[MR], const float* panel,
                                           const PixelPair& pair) {
    Vector grad[NV];  // V::N output channels each
    SLIM_UNROLL
    for (int v = 0; v < NV; ++v) grad[v] = V::load(panel + pair.grad + v * V::N);
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) {
      const Vector input = V::broadcast(x[m] + pair.x);
      SLIM_UNROLL
      for (int v = 0; v < NV; ++v) total[m][v] = V::fma(input, grad[v], total[m][v]);
    }
  }
};

constexpr int MAX_TILE_ENTRIES = 12;

// What an instruction set has for panels of one width. Index m is a tile of m entries.
struct GradientKernels {
  int width;  // output channels of a panel, 0 where there are no kernels
  int most_entries;
  EntriesFunction run[MAX_TILE_ENTRIES + 1];
  void (*transpose)(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                    int64_t columns);
};

template <class V, int NV, int MR>
void add_entries_tiles(GradientKernels& kernels) {
  static_assert(MR <= MAX_TILE_ENTRIES, "the table holds no larger tile");
  if constexpr (MR > 1) add_entries_tiles<V, NV, MR - 1>(kernels);
  kernels.run[MR] = EntriesTile<V, NV, MR>::run;
  kernels.most_entries = MR;
}

// Tiles of up to MR entries x NV vectors.
template <class V, int NV, int MR, class Transpose8>
GradientKernels gradient_kernels() {
  GradientKernels kernels;
  kernels.width = V::N * NV;
  add_entries_tiles<V, NV, MR>(kernels);
  kernels.transpose = transpose<Transpose8>;
  return kernels;
}

// ---------------------------------------------------------------- the plan

// Images and output rows that are copied together.
struct Chunk {
  Range images, rows, x_rows;  // x_rows are those of the input that the outputs read
};

struct GradientPlan {
  const SlimWeightGradientF32* a;
  GradientKernels kernels;
  Axis vertical, horizontal;
  int64_t block_rows, groups;  // of the weight: its block columns are taps * groups
  int64_t panels_per_row;      // panels of a block row
  int64_t images_per_chunk, rows_per_chunk;
  int64_t row_chunks, chunks;      // of an image, or of a few; of all
  int64_t image_parts, row_parts;  // units are the product of the two
  int64_t most_x_pixels, pitch;    // of a chunk; elements from one row of x in scratch memory to the next
  int64_t sums;                    // of one part: one for each weight
  int64_t scratch_floats;          // that one thread needs
  float* parts;                    // image_parts x sums
};

inline Chunk chunk_at(const GradientPlan& plan, int64_t index) {
  const SlimWeightGradientF32& a = *plan.a;
  const int64_t image = index / plan.row_chunks * plan.images_per_chunk;
  const int64_t row = index % plan.row_chunks * plan.rows_per_chunk;
  Chunk chunk = {
      {image, min64(a.n, image + plan.images_per_chunk)}, {row, min64(a.p, row + plan.rows_per_chunk)}, {0, 0}};
  const int64_t first = chunk.rows.begin * a.stride_h - a.pad_h;
  const int64_t last = (chunk.rows.end - 1) * a.stride_h - a.pad_h + (int64_t)(a.r - 1) * a.dil_h;
  chunk.x_rows.begin = min64(a.h, max64(0, first));
  chunk.x_rows.end = max64(chunk.x_rows.begin, min64(a.h, last + 1));
  return chunk;
}

inline GradientPlan plan_gradient(const SlimWeightGradientF32& a, const GradientKernels& kernels) {
  // What is copied stays in half of an L2 of 1 MB, and a panel in L1. More pixels would mean fewer additions to sums
  // that are not in registers.
  constexpr int64_t CHUNK_FLOATS = 128 * 1024, MOST_PIXELS = 256, LEAST_PIXELS = 32, MOST_X_PIXELS = 4096;
  constexpr int64_t WANTED_UNITS = 8, PARTS_BYTES = 64 * 1024 * 1024, LINE_FLOATS = 16;
  GradientPlan plan;
  plan.a = &a;
  plan.kernels = kernels;
  plan.vertical = {a.h, a.stride_h, a.pad_h, a.dil_h, a.r};
  plan.horizontal = {a.w, a.stride_w, a.pad_w, a.dil_w, a.s};
  plan.block_rows = ceil_div(a.c_out, a.block_out);
  plan.groups = ceil_div(a.c_in, a.block_in);
  plan.panels_per_row = a.block_out / kernels.width;
  const int64_t fitting = CHUNK_FLOATS / (a.c_in + a.c_out);
  const int64_t pixels = min64(MOST_PIXELS, max64(LEAST_PIXELS, fitting));
  const auto x_rows_of = [&](int64_t rows) {
    return min64(a.h, (rows - 1) * a.stride_h + (int64_t)(a.r - 1) * a.dil_h + 1);
  };
  plan.rows_per_chunk = min64(a.p, max64(1, pixels / a.q));
  // Far apart taps may read much more than is computed.
  const int64_t images = min64(pixels / (a.p * a.q), MOST_X_PIXELS / (x_rows_of(a.p) * a.w));
  plan.images_per_chunk = min64(a.n, max64(1, images));
  plan.row_chunks = ceil_div(a.p, plan.rows_per_chunk);
  if (plan.row_chunks > 1) plan.images_per_chunk = 1;
  plan.chunks = ceil_div(a.n, plan.images_per_chunk) * plan.row_chunks;
  plan.sums = (int64_t)a.crow_indices[plan.block_rows] * a.block_out * a.block_in;
  const int64_t affordable = max64(1, PARTS_BYTES / 4 / max64(1, plan.sums));
  plan.image_parts = min64(min64(WANTED_UNITS, affordable), plan.chunks);
  plan.row_parts = min64(plan.block_rows, ceil_div(WANTED_UNITS, plan.image_parts));
  plan.most_x_pixels = plan.images_per_chunk * x_rows_of(plan.rows_per_chunk) * a.w;
  // An odd number of cache lines: rows that lay a power of two apart would share a few sets of L1.
  plan.pitch = (ceil_div(plan.most_x_pixels, LINE_FLOATS) | 1) * LINE_FLOATS;
  const int64_t chunk_pixels = plan.images_per_chunk * plan.rows_per_chunk * a.q;
  const int64_t panels = ceil_div(plan.block_rows, plan.row_parts) * plan.panels_per_row;
  const int64_t pairs = ceil_div(chunk_pixels * 2, LINE_FLOATS) * LINE_FLOATS;  // of two int32
  const int64_t cursors = ceil_div(plan.block_rows, LINE_FLOATS) * LINE_FLOATS;
  plan.scratch_floats = plan.groups * a.block_in * plan.pitch + panels * chunk_pixels * kernels.width + pairs + cursors;
  plan.scratch_floats = ceil_div(plan.scratch_floats, LINE_FLOATS) * LINE_FLOATS;
  return plan;
}

// ---------------------------------------------------------------- one unit

// Copies the rows of x that a chunk reads. Channels beyond c_in, of the last blocks, are rows of zeros.
inline void copy_x(const GradientPlan& plan, const Chunk& chunk, float* rows) {
  const SlimWeightGradientF32& a = *plan.a;
  const int64_t pixels = chunk.x_rows.size() * a.w;
  for (int64_t image = chunk.images.begin; image < chunk.images.end; ++image) {
    const float* const from = a.x + (image * a.h + chunk.x_rows.begin) * a.w * a.c_in;
    plan.kernels.transpose(from, a.c_in, rows + (image - chunk.images.begin) * pixels, plan.pitch, pixels, a.c_in);
  }
  for (int64_t c = a.c_in; c < plan.groups * a.block_in; ++c) {
    for (int64_t i = 0; i < chunk.images.size() * pixels; ++i) rows[c * plan.pitch + i] = 0;
  }
}

// Copies the output channels of some block rows into panels. Channels beyond c_out are zeros.
inline void copy_grad(const GradientPlan& plan, const Chunk& chunk, Range block_rows, float* panels) {
  const SlimWeightGradientF32& a = *plan.a;
  const int64_t width = plan.kernels.width, pixels = chunk.rows.size() * a.q, all = chunk.images.size() * pixels;
  const int64_t channel0 = block_rows.begin * a.block_out, end = block_rows.end * a.block_out;
  for (int64_t image = chunk.images.begin; image < chunk.images.end; ++image) {
    const float* from = a.grad + (image * a.p + chunk.rows.begin) * a.q * a.c_out;
    float* to = panels + (image - chunk.images.begin) * pixels * width;
    for (int64_t pixel = 0; pixel < pixels; ++pixel, from += a.c_out, to += width) {
      for (int64_t channel = channel0; channel < end; channel += width) {
        float* const panel = to + (channel - channel0) * all;
        const int64_t present = min64(width, a.c_out - channel);
        for (int64_t i = 0; i < width; ++i) panel[i] = i < present ? from[channel + i] : 0;
      }
    }
  }
}

// Lists the output pixels of a chunk whose tap (tap_row, tap_column) lies inside the image.
inline int64_t list_pairs(const GradientPlan& plan, const Chunk& chunk, int64_t tap_row, int64_t tap_column,
                          PixelPair* pairs) {
  const SlimWeightGradientF32& a = *plan.a;
  const int64_t width = plan.kernels.width;
  int64_t count = 0;
  for (int64_t image = 0; image < chunk.images.size(); ++image) {
    for (int64_t row = 0; row < chunk.rows.size(); ++row) {
      const int64_t y = (chunk.rows.begin + row) * a.stride_h - a.pad_h + tap_row * a.dil_h;
      if (y < 0 || y >= a.h) continue;
      const int64_t x_row = (image * chunk.x_rows.size() + y - chunk.x_rows.begin) * a.w;
      const int64_t grad_row = (image * chunk.rows.size() + row) * a.q;
      for (int64_t column = 0; column < a.q; ++column) {
        const int64_t x = column * a.stride_w - a.pad_w + tap_column * a.dil_w;
        if (x < 0 || x >= a.w) continue;
        pairs[count++] = {(int32_t)((grad_row + column) * width), (int32_t)(x_row + x)};
      }
    }
  }
  return count;
}

// Sums of the blocks [begin, end) of one block row, which share a tap.
inline void run_blocks(const GradientPlan& plan, Range blocks, int64_t first_column, const float* panels,
                       int64_t panel_floats, const float* x_rows, const PixelPair* pairs, int64_t count, float* sums,
                       bool first) {
  const SlimWeightGradientF32& a = *plan.a;
  const int64_t entries = blocks.size() * a.block_in, tiles = ceil_div(entries, plan.kernels.most_entries);
  const float* rows[MAX_TILE_ENTRIES];
  for (int64_t tile = 0, entry = 0; tile < tiles; ++tile) {
    const int64_t end = entries * (tile + 1) / tiles;  // tiles of nearly equal size
    const int size = (int)(end - entry);
    for (int m = 0; m < size; ++m) {
      const int64_t block = blocks.begin + (entry + m) / a.block_in, inside = (entry + m) % a.block_in;
      rows[m] = x_rows + ((a.col_indices[block] - first_column) * a.block_in + inside) * plan.pitch;
    }
    float* const target = sums + (blocks.begin * a.block_in + entry) * a.block_out;
    for (int64_t panel = 0; panel < plan.panels_per_row; ++panel) {
      plan.kernels.run[size](panels + panel * panel_floats, rows, pairs, count, target + panel * plan.kernels.width,
                             a.block_out, first);
    }
    entry = end;
  }
}

// A part of the chunks over a part of the block rows.
inline void run_gradient_unit(const GradientPlan& plan, int64_t unit, float* scratch) {
  const SlimWeightGradientF32& a = *plan.a;
  const int64_t part = unit / plan.row_parts, row_part = unit % plan.row_parts;
  const Range block_rows = {plan.block_rows * row_part / plan.row_parts,
                            plan.block_rows * (row_part + 1) / plan.row_parts};
  const int64_t first_chunk = plan.chunks * part / plan.image_parts;
  const int64_t end_chunk = plan.chunks * (part + 1) / plan.image_parts;
  const int64_t most_pixels = plan.images_per_chunk * plan.rows_per_chunk * a.q;
  float* const x_rows = scratch;
  float* const panels = x_rows + plan.groups * a.block_in * plan.pitch;
  PixelPair* const pairs = (PixelPair*)(panels + block_rows.size() * a.block_out * most_pixels);
  int32_t* const next = (int32_t*)(pairs + most_pixels);  // of each block row, the first block not yet summed
  float* const sums = plan.parts + part * plan.sums;
  for (int64_t index = first_chunk; index < end_chunk; ++index) {
    const Chunk chunk = chunk_at(plan, index);
    const int64_t panel_floats = chunk.images.size() * chunk.rows.size() * a.q * plan.kernels.width;
    copy_x(plan, chunk, x_rows);
    copy_grad(plan, chunk, block_rows, panels);
    for (int64_t row = block_rows.begin; row < block_rows.end; ++row)
      next[row - block_rows.begin] = a.crow_indices[row];
    for (int64_t tap = 0; tap < (int64_t)a.r * a.s; ++tap) {
      const int64_t count = list_pairs(plan, chunk, tap / a.s, tap % a.s, pairs);
      for (int64_t row = block_rows.begin; row < block_rows.end; ++row) {
        Range blocks = {next[row - block_rows.begin], next[row - block_rows.begin]};
        const int64_t end = a.crow_indices[row + 1];
        while (blocks.end < end && a.col_indices[blocks.end] < (tap + 1) * plan.groups) ++blocks.end;
        next[row - block_rows.begin] = (int32_t)blocks.end;
        const float* const own = panels + (row - block_rows.begin) * plan.panels_per_row * panel_floats;
        run_blocks(plan, blocks, tap * plan.groups, own, panel_floats, x_rows, pairs, count, sums,
                   index == first_chunk);
      }
    }
  }
}

// Adds up the parts of the blocks of one block row and writes them as (block_out, block_in). Weights beyond c_out or
// c_in have no gradient.
inline void finish_block_row(const GradientPlan& plan, int64_t row) {
  const SlimWeightGradientF32& a = *plan.a;
  const int64_t size = (int64_t)a.block_out * a.block_in;
  const int64_t present_out = min64(a.block_out, a.c_out - row * a.block_out);
  for (int64_t block = a.crow_indices[row]; block < a.crow_indices[row + 1]; ++block) {
    float* const sums = plan.parts + block * size;
    for (int64_t part = 1; part < plan.image_parts; ++part) {
      const float* const others = sums + part * plan.sums;
      for (int64_t i = 0; i < size; ++i) sums[i] += others[i];
    }
    float* const to = a.values_grad + block * size;
    plan.kernels.transpose(sums, a.block_out, to, a.block_in, a.block_in, a.block_out);
    const int64_t group = a.col_indices[block] % plan.groups;
    const int64_t present_in = min64(a.block_in, a.c_in - group * a.block_in);
    if (present_out == a.block_out && present_in == a.block_in) continue;
    for (int64_t o = 0; o < a.block_out; ++o) {
      for (int64_t i = o < present_out ? present_in : 0; i < a.block_in; ++i) to[o * a.block_in + i] = 0;
    }
  }
}

// ---------------------------------------------------------------- all units

inline int weight_gradient(const SlimWeightGradientF32& a, const GradientKernels& kernels, int32_t threads) {
  if (kernels.width == 0) return SLIM_ERROR_UNSUPPORTED;
  GradientPlan plan = plan_gradient(a, kernels);
  const int64_t units = plan.image_parts * plan.row_parts;
  const int team = (int)min64(threads, units);
  const size_t scratch_floats = (size_t)plan.scratch_floats;
  constexpr size_t LINE = 64;
  float* scratch = nullptr;
  float* parts = nullptr;
  const size_t parts_floats = (size_t)max64(1, plan.image_parts * plan.sums);
  bool failed = posix_memalign((void**)&scratch, LINE, sizeof(float) * scratch_floats * (size_t)team) != 0;
  failed = posix_memalign((void**)&parts, LINE, sizeof(float) * parts_floats) != 0 || failed;
  if (!failed) {
    plan.parts = parts;
    Share units_taken = {}, rows_taken = {};
#pragma omp parallel num_threads(team) if (team > 1)
    {
      float* const own = scratch + scratch_floats * (size_t)omp_get_thread_num();
      for (int64_t unit; (unit = take(units_taken)) < units;) run_gradient_unit(plan, unit, own);
#pragma omp barrier
      for (int64_t row; (row = take(rows_taken)) < plan.block_rows;) finish_block_row(plan, row);
    }
  }
  free(parts);
  free(scratch);
  return failed ? SLIM_ERROR_NO_MEMORY : SLIM_OK;
}

}  // namespace
