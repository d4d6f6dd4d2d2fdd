// How a convolution in pairs is cut into units of work; pairs.h says what pairs are.
#pragma once
#include <stdint.h>

#include "../kernels.h"
#include "pooling.h"
#include "ranges.h"

namespace {

typedef uint16_t Bf16;

constexpr int64_t PAIR_IMAGES = 16, PAIR_ROW = 64;  // images and bytes of a row
constexpr int GROUP_ROWS = 16;                      // of a product
constexpr int CHUNK_PIXELS = 4;                     // output pixels whose sums are under way at a time: a pool's window
constexpr int PAIRS_STRIP = 16;
constexpr int MAX_BLOCK_CHUNKS = 8;  // chunks whose pixels are found at a time

// CHUNK_PIXELS output pixels, or fewer, of one group of images.
struct PairsChunk {
  int count;
  int64_t places[CHUNK_PIXELS];  // in y, counted in pixels
  uint64_t taps[CHUNK_PIXELS];   // a bit for each tap inside the image
  const char* pixels[CHUNK_PIXELS]
                    [SLIM_PAIRS_MAX_TAPS + 1];  // that the taps read; zeros outside the image, and for none
};

// Memory of a thread, in bytes from its first whole cache line.
constexpr int64_t SCRATCH_SUMS = 0;  // floats (CHUNK_PIXELS, 16 channels, 16 images)
constexpr int64_t SCRATCH_BUFFERS =
    SCRATCH_SUMS + CHUNK_PIXELS * PAIRS_STRIP * PAIR_ROW;  // 2 x CHUNK_PIXELS groups of rows
constexpr int64_t SCRATCH_CHUNKS = SCRATCH_BUFFERS + 2 * CHUNK_PIXELS * GROUP_ROWS * PAIR_ROW;
constexpr int64_t PAIRS_SCRATCH =
    SCRATCH_CHUNKS + MAX_BLOCK_CHUNKS * (int64_t)sizeof(PairsChunk) + 64;  // and what aligns it

struct PairsPlan {
  const SlimConv2dF32* conv;
  bool to_floats;  // y is fp32 with 16 images innermost
  Axis rows, columns;
  Range inside_rows, inside_columns;  // output positions all of whose taps lie inside the image
  int64_t image_groups, strips, pairs_out;
  int64_t pixel_bytes;  // of x
  const char* zeros;    // a pixel of x
  int64_t chunks, chunks_per_block, chunks_per_unit, chunk_parts, strips_per_unit, strip_parts;
  int64_t units, macs;  // macs with those of weights that the groups lack
};

// Output positions of which every tap lies inside.
inline Range all_taps_inside(const Axis& axis, int64_t positions) {
  Range found = {0, 0};
  for (int64_t i = 0; i < positions; ++i) {
    if (taps_inside(axis, i).size() != axis.taps) continue;
    if (found.size() == 0) found.begin = i;
    found.end = i + 1;
  }
  return found;
}

inline PairsPlan plan_pairs(const SlimConv2dF32& conv, bool to_floats, const char* zeros) {
  PairsPlan plan;
  plan.conv = &conv;
  plan.to_floats = to_floats;
  plan.rows = {conv.h, conv.stride_h, conv.pad_h, conv.dil_h, conv.r};
  plan.columns = {conv.w, conv.stride_w, conv.pad_w, conv.dil_w, conv.s};
  plan.inside_rows = all_taps_inside(plan.rows, conv.p);
  plan.inside_columns = all_taps_inside(plan.columns, conv.q);
  plan.image_groups = ceil_div(conv.n, PAIR_IMAGES);
  plan.strips = ceil_div(conv.c_out, PAIRS_STRIP);
  plan.pixel_bytes = ceil_div(conv.c_in, 2) * PAIR_ROW;
  plan.zeros = zeros;
  plan.pairs_out = ceil_div(conv.c_out, 2);
  plan.chunks = conv.pool ? (conv.p / 2) * (conv.q / 2) : ceil_div(conv.p * conv.q, CHUNK_PIXELS);
  const int64_t groups = conv.tap_ptr[plan.strips], strip_groups = ceil_div(max64(groups, 1), plan.strips);
  // A unit has about so many products. Of a few chunks it takes all and a part of the strips, whose weights then stay
  // in the first-level cache; of many chunks a part, which should stay there while all strips pass over it.
  constexpr int64_t BLOCK_BYTES = 32 * 1024, UNIT_PRODUCTS = 256, FEW_CHUNKS = 8;
  if (plan.chunks <= FEW_CHUNKS && plan.strips > 1) {
    plan.chunks_per_block = plan.chunks_per_unit = plan.chunks;
    plan.strips_per_unit = max64(1, min64(plan.strips, UNIT_PRODUCTS / (strip_groups * CHUNK_PIXELS * plan.chunks)));
  } else {
    const int64_t chunk_bytes = CHUNK_PIXELS * conv.stride_h * conv.stride_w * plan.pixel_bytes;
    plan.chunks_per_block = max64(1, min64(MAX_BLOCK_CHUNKS, BLOCK_BYTES / chunk_bytes));
    plan.chunks_per_unit =
        min64(plan.chunks, max64(plan.chunks_per_block, UNIT_PRODUCTS / (CHUNK_PIXELS * max64(groups, 1))));
    plan.strips_per_unit = plan.strips;
  }
  plan.chunk_parts = ceil_div(plan.chunks, plan.chunks_per_unit);
  plan.strip_parts = ceil_div(plan.strips, plan.strips_per_unit);
  plan.units = plan.image_groups * plan.chunk_parts * plan.strip_parts;
  plan.macs = groups * GROUP_ROWS * 2 * PAIRS_STRIP * PAIR_IMAGES * plan.image_groups * conv.p * conv.q;
  return plan;
}

struct PairsPoolPlan {
  PoolPlan pool;
  bool to_floats;  // y is fp32 with 16 images innermost
};

}  // namespace
