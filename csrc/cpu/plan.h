// How one convolution is cut into units of work.
//
// The plan follows from the problem alone and never from the number of threads, so results do not depend on that number
// either. It is decided in four steps, each a function of the workload and of what the steps before it decided:
//
//   choose_order            whether a tile passes over all taps at once, tap by tap, or in slabs of input channels
//   split_images_and_rows   images and output rows of a unit
//   fit_pool_scratch        fewer of them where the outputs in front of a max-pool would not stay in L2
//   split_strips            strips of a unit
#pragma once
#include <stdint.h>
#include <stdlib.h>

#include "../kernels.h"
#include "ranges.h"
#include "slab_plan.h"
#include "tiles.h"

namespace {

// ---------------------------------------------------------------- the problem

// What a convolution has to compute, in the numbers that the steps decide by.
struct Workload {
  int64_t lanes;                // images in one vector: the vector's width, or 1 with channels last
  int64_t image_groups;         // groups of `lanes` images
  int64_t rows, columns;        // of the output; with pooling cut to even, since the last odd one is dropped
  int64_t channels;             // of the output
  int64_t strips, strip_width;  // strips of `strip_width` output channels
  int64_t entry_weights;        // of an entry: one for each output channel of the strip, or each of its input channels
  int64_t taps;                 // r * s
  int64_t entries;              // of all strips: pairs of an input channel and a tap that have weights
  int64_t pixel_macs;           // multiply-adds of an average strip for one pixel of all lanes, at least 1 a lane
  int64_t input_bytes;          // of one group of images
  int64_t weight_bytes;         // with the offset of each entry
  int64_t tile_pixels;          // most pixels that a microkernel takes
  bool pool;
  bool deep;  // an entry has several input channels
};

inline Workload workload_of(const SlimConv2dF32& conv, int64_t tile_pixels) {
  Workload work;
  work.lanes = conv.lanes;
  work.image_groups = ceil_div(conv.n, conv.lanes);
  work.pool = conv.pool != 0;
  work.deep = conv.depth > 1;
  work.rows = conv.pool ? conv.p / 2 * 2 : conv.p;
  work.columns = conv.pool ? conv.q / 2 * 2 : conv.q;
  work.channels = conv.c_out;
  work.strip_width = conv.strip;
  work.entry_weights = (int64_t)conv.strip * conv.depth;
  work.strips = ceil_div(conv.c_out, conv.strip);
  work.taps = (int64_t)conv.r * conv.s;
  work.entries = conv.tap_ptr[work.strips * work.taps];
  work.pixel_macs = max64(1, work.entries / work.strips * work.entry_weights) * conv.lanes;
  work.input_bytes = 4 * conv.h * conv.w * conv.c_in * conv.lanes;
  work.weight_bytes = 4 * work.entries * (work.entry_weights + 1);
  work.tile_pixels = tile_pixels;
  return work;
}

// ---------------------------------------------------------------- step 1

enum Order {
  // Each call of a microkernel sums over all taps inside the image. The pixels of a tile all see the same taps.
  ALL_TAPS,
  // A microkernel is given other pixel pointers for every tap, so a tile takes any pixels: taps outside the image point
  // at zeros.
  TAP_BY_TAP,
  // A tile passes over a few input channels at a time, at all taps (slab_plan.h).
  SLABS,
};

// Limits of TAP_BY_TAP; units.h keeps the pointers of this many pixels and taps on the stack.
constexpr int64_t TAP_BY_TAP_MAX_PIXELS = 48, TAP_BY_TAP_MAX_TAPS = 25;

// Corners and edges of a few small images are classes of one to four pixels, too small to fill tiles of one class. Tap
// by tap wins there, if a strip has enough entries at each tap to outweigh the pointers that change with it.
inline Order choose_order(const Workload& work, const SlabCut& slabs) {
  if (slabs.used) return SLABS;
  constexpr int64_t MIN_ENTRIES_PER_TAP = 4;
  const bool has_classes = work.taps > 1 && work.taps <= TAP_BY_TAP_MAX_TAPS;
  const bool few_pixels = work.image_groups * work.rows * work.columns <= TAP_BY_TAP_MAX_PIXELS;
  const bool many_entries = work.entries >= MIN_ENTRIES_PER_TAP * work.strips * work.taps;
  return has_classes && work.lanes == 1 && !work.deep && few_pixels && many_entries ? TAP_BY_TAP : ALL_TAPS;
}

// ---------------------------------------------------------------- step 2

// Multiply-adds that a unit should have: about 30 microseconds, so that two threads balance and a parallel region pays.
constexpr int64_t UNIT_MACS = 1500000;
// Units that a layer should have so that threads stay busy.
constexpr int64_t WANTED_UNITS = 8;

// How many groups of images and how many output rows a unit takes.
struct PixelSplit {
  int64_t images, rows;
};

// Rows that give a unit `wanted_pixels` and UNIT_MACS, an even number of them for the pooling.
inline int64_t rows_of_enough_work(const Workload& work, int64_t wanted_pixels) {
  const int64_t macs_per_row = work.pixel_macs * work.strips * work.columns;
  const int64_t rows = max64(ceil_div(wanted_pixels, work.columns), ceil_div(UNIT_MACS, macs_per_row));
  return min64(work.rows, ceil_div(rows, 2) * 2);
}

// Rows that share a layer among a few threads, but not less than a few full tiles each.
inline int64_t rows_for_sharing(const Workload& work) {
  constexpr int64_t WANTED_ROW_UNITS = 4, MIN_TILES = 3;
  const int64_t multiple = work.pool ? 2 : 1;
  const int64_t least = ceil_div(MIN_TILES * work.tile_pixels, work.columns);
  return ceil_div(max64(least, ceil_div(work.rows, WANTED_ROW_UNITS)), multiple) * multiple;
}

// Small images go together until a unit has 384 pixels: their corner and edge classes fill tiles only across several
// images. Large images are cut into rows of enough work.
//
// A single image, or a single vector of them, then may have fewer units than threads want. Threads that share its rows
// read all weights, from L3; threads that share its strips read all of the input, half of which another core has just
// written, and that is several times slower. So rows are shared first, unless the weights have more than four times the
// bytes of the input.
inline PixelSplit split_images_and_rows(const Workload& work) {
  constexpr int64_t UNIT_PIXELS = 384, MOST_WEIGHTS_PER_INPUT = 4;
  const int64_t pixels = work.rows * work.columns;
  const int64_t wanted_pixels = max64(work.lanes == 1 ? 1 : work.tile_pixels, UNIT_PIXELS / work.lanes);
  const int64_t images = min64(work.image_groups, ceil_div(wanted_pixels, pixels));
  int64_t rows = work.rows;
  if (images == 1 && pixels > 2 * wanted_pixels) rows = rows_of_enough_work(work, wanted_pixels);
  const bool few_units = work.image_groups == 1 && ceil_div(work.rows, rows) < WANTED_UNITS;
  const bool light_weights = work.weight_bytes < MOST_WEIGHTS_PER_INPUT * work.input_bytes;
  if (few_units && light_weights) rows = min64(rows, rows_for_sharing(work));
  return {images, rows};
}

// In slabs a unit takes whole tiles of one vector of images: as many rows of tiles as make enough work, since tiles
// share nothing.
inline PixelSplit split_slab_rows(const Workload& work, const SlabCut& slabs) {
  const int64_t macs = work.pixel_macs * work.strips * work.columns * slabs.rows.tile;
  return {1, min64(ceil_div(work.rows, slabs.rows.tile), ceil_div(UNIT_MACS, macs)) * slabs.rows.tile};
}

// ---------------------------------------------------------------- step 3

// A unit with pooling writes its outputs to scratch memory and pools from there. They should stay in half of a 512 KB
// L2, which is 64 K floats; two rows of one group of images are the least.
inline PixelSplit fit_pool_scratch(const Workload& work, PixelSplit split) {
  if (!work.pool) return split;
  constexpr int64_t SCRATCH_FLOATS = 64 * 1024;
  const int64_t row_floats = work.columns * work.channels * work.lanes;
  const int64_t rows = max64(2, min64(split.rows, SCRATCH_FLOATS / row_floats / 2 * 2));
  const int64_t images = max64(1, min64(split.images, SCRATCH_FLOATS / (row_floats * rows)));
  return {images, rows};
}

// ---------------------------------------------------------------- step 4

// The number of strips of a unit. At least four strips share the input of each tile while it is in L1, and more where a
// unit would otherwise have less than UNIT_MACS. A layer of few pixels is then shared by strips until it has
// WANTED_UNITS, unless the whole of it has less than an eighth of UNIT_MACS, which is too small to share.
inline int64_t split_strips(const Workload& work, PixelSplit split) {
  constexpr int64_t MIN_STRIPS = 4;
  const int64_t macs_per_strip = work.pixel_macs * split.images * split.rows * work.columns;
  const int64_t strips = min64(work.strips, max64(MIN_STRIPS, ceil_div(UNIT_MACS, macs_per_strip)));
  const int64_t pixel_units = ceil_div(work.image_groups, split.images) * ceil_div(work.rows, split.rows);
  const bool too_small = macs_per_strip * work.strips * pixel_units < UNIT_MACS / 8;
  const int64_t wanted_units = too_small ? 1 : WANTED_UNITS;
  if (pixel_units * ceil_div(work.strips, strips) >= wanted_units) return strips;
  return ceil_div(work.strips, min64(work.strips, ceil_div(wanted_units, pixel_units)));
}

// In slabs the units that share a tile each copy what it reads, and their partial sums should leave L2 some room. In
// parts of images a layer has few tiles, and threads share them.
inline int64_t split_slab_strips(const Workload& work, const SlabCut& slabs, PixelSplit split) {
  constexpr int64_t MOST = 512;
  const int64_t least = slabs.rows.parts * slabs.columns.parts > 1 ? 32 : 128;
  const int64_t pixel_units = work.image_groups * ceil_div(work.rows, split.rows);
  const int64_t parts = min64(max64(1, work.strips / least), ceil_div(WANTED_UNITS, pixel_units));
  return min64(MOST, ceil_div(work.strips, parts));
}

// ---------------------------------------------------------------- the plan

// Whether the microkernels end with the ReLU; a residual is added after them and in front of it.
inline int relu_in_tiles(const SlimConv2dF32& conv) { return conv.relu && conv.residual == nullptr; }

// A piece of work for one thread.
struct WorkUnit {
  Range images, rows, strips;  // images count groups of `lanes`
};

struct Plan {
  const SlimConv2dF32* conv;
  TileSet tiles;
  Workload work;
  Order order;
  PixelSplit pixels_per_unit;
  int64_t strips_per_unit;
  int64_t image_parts, row_parts, strip_parts, units;  // units is the product of the three
  int64_t macs;                                        // of all units, taps in the padding included
  int64_t scratch_floats;  // that one thread needs: in front of the pooling, or for a patch and partial sums
  SlabCut slabs;
  const int32_t*
      offsets;           // of each entry: elements from the pixel pointers that tiles are given; in slabs, the program
  int32_t* own_offsets;  // the same where the plan allocated them, else NULL
  float* zeros;          // with TAP_BY_TAP: what a tap outside the image reads, c_in floats, else NULL
};

// Everything of a plan but its tiles and its memory.
inline void decide(Plan& plan, const SlimConv2dF32& conv, int64_t tile_pixels) {
  const Workload work = workload_of(conv, tile_pixels);
  plan.slabs = slab_cut(conv);
  plan.order = choose_order(work, plan.slabs);
  const bool slabs = plan.order == SLABS;
  const PixelSplit split =
      slabs ? split_slab_rows(work, plan.slabs) : fit_pool_scratch(work, split_images_and_rows(work));
  plan.conv = &conv;
  plan.work = work;
  plan.pixels_per_unit = split;
  plan.strips_per_unit = slabs ? split_slab_strips(work, plan.slabs, split) : split_strips(work, split);
  plan.image_parts = ceil_div(work.image_groups, split.images);
  plan.row_parts = ceil_div(work.rows, split.rows);
  plan.strip_parts = ceil_div(work.strips, plan.strips_per_unit);
  plan.units = plan.image_parts * plan.row_parts * plan.strip_parts;
  plan.macs = work.pixel_macs * work.strips * work.image_groups * work.rows * work.columns;
  if (slabs) {
    constexpr int64_t LINE_FLOATS = 16;  // of which one may be lost in front of the patch, and one behind it
    const int64_t sums = plan.strips_per_unit * plan.slabs.pixels() * work.lanes;
    plan.scratch_floats = plan.slabs.patch_floats(work.lanes) + sums + 2 * LINE_FLOATS;
    return;
  }
  const int64_t unit_channels = min64(plan.strips_per_unit * work.strip_width, work.channels);
  plan.scratch_floats = work.pool ? split.images * split.rows * work.columns * unit_channels * work.lanes : 0;
}

// Units are numbered with strips innermost, so that neighbours read the same input.
inline WorkUnit unit_at(const Plan& plan, int64_t index) {
  const int64_t strip = index % plan.strip_parts * plan.strips_per_unit, rest = index / plan.strip_parts;
  const int64_t image = rest / plan.row_parts * plan.pixels_per_unit.images;
  const int64_t row = rest % plan.row_parts * plan.pixels_per_unit.rows;
  return {{image, min64(plan.work.image_groups, image + plan.pixels_per_unit.images)},
          {row, min64(plan.work.rows, row + plan.pixels_per_unit.rows)},
          {strip, min64(plan.work.strips, strip + plan.strips_per_unit)}};
}

// Writes the offset of each entry from tap (0, 0) of its pixel, in elements of x.
inline void entry_offsets(const SlimConv2dF32& conv, int32_t* offsets) {
  const int64_t taps = (int64_t)conv.r * conv.s, strips = ceil_div(conv.c_out, conv.strip);
  for (int64_t strip = 0; strip < strips; ++strip) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t row = tap / conv.s * conv.dil_h, column = tap % conv.s * conv.dil_w;
      const int64_t shift = (row * conv.w + column) * conv.c_in;
      const int32_t* const run = conv.tap_ptr + strip * taps + tap;
      for (int32_t e = run[0]; e < run[1]; ++e) offsets[e] = (int32_t)((conv.channels[e] + shift) * conv.lanes);
    }
  }
  const int64_t entries = conv.tap_ptr[strips * taps];
  for (int64_t i = 0; i < SLIM_OFFSETS_MARGIN; ++i) offsets[entries + i] = 0;
}

// How many numbers the offsets of a convolution have: those of its entries and a margin, or the program of its slabs.
inline int64_t offsets_count(const SlimConv2dF32& conv) {
  const SlabCut slabs = slab_cut(conv);
  if (slabs.used) return slab_program_numbers(conv, slabs);
  return conv.tap_ptr[ceil_div(conv.c_out, conv.strip) * conv.r * conv.s] + SLIM_OFFSETS_MARGIN;
}

inline void write_offsets(const SlimConv2dF32& conv, int32_t* offsets) {
  const SlabCut slabs = slab_cut(conv);
  if (slabs.used)
    write_slab_program(conv, slabs, offsets);
  else
    entry_offsets(conv, offsets);
}

// Fills in the plan for `conv` with the tiles that take its strips; false when memory ran out. Whether or not it did,
// the caller frees own_offsets and zeros.
inline bool make_plan(Plan& plan, const SlimConv2dF32& conv, const TileSet& tiles) {
  plan.tiles = tiles;
  plan.own_offsets = nullptr;
  plan.zeros = nullptr;
  decide(plan, conv, tiles.most_pixels);
  if (plan.order == TAP_BY_TAP) {
    plan.zeros = (float*)calloc((size_t)conv.c_in, sizeof(float));
    if (plan.zeros == nullptr) return false;
  }
  // With one tap, or with pointers for each tap, an entry lies its input channel away from the pointer.
  const bool channels_suffice = conv.lanes == 1 && (plan.work.taps == 1 || plan.order == TAP_BY_TAP);
  plan.offsets = channels_suffice ? conv.channels : conv.offsets;
  const bool usable = plan.order != SLABS || (plan.offsets != nullptr && is_slab_program(plan.slabs, plan.offsets));
  if (plan.offsets != nullptr && usable) return true;
  plan.own_offsets = (int32_t*)malloc(sizeof(int32_t) * (size_t)offsets_count(conv));
  if (plan.own_offsets == nullptr) return false;
  write_offsets(conv, plan.own_offsets);
  plan.offsets = plan.own_offsets;
  return true;
}

}  // namespace
