// Convolutions in bf16, of activations that lie in *pairs*: (ceil(n/16), h, w, ceil(c/2), 16 images, 2 channels). A row
// of 64 bytes holds two channels of one pixel of 16 images, which is what the dot products of AVX512_BF16 and AMX read.
//
// A strip is 16 output channels. Its stored columns (tap, input channel) are cut into groups of at most 16 rows, each
// of two columns: the channels of one pair, where both are stored, else any two. The rows of a group, gathered, and its
// weights are the two operands of one product, 16 channels x 16 images x 32 columns. Taps outside the image read a row
// of zeros, and a group of which no tap lies inside is left out.
//
// An engine is an instruction set's way to add up these products (pairs_*.cpp).
//
// On an Intel Xeon with AMX one product takes 4.6 ns, and 10 with its rows from the first-level cache: 7 to gather
// them. From the second level the rows decide: blocks of one channel read two lines for a row, blocks of two or more
// one.
#pragma once
#include <math.h>
#include <stdint.h>

#include "../kernels.h"
#include "pairs_plan.h"
#include "ranges.h"

namespace {

// ---------------------------------------------------------------- pixels

// The i-th output pixel of an image in the order in which they are computed: those with all taps inside, row by row,
// then the rows above and below, then what lies on their left and right.
struct PixelOrder {
  Range rows, columns;  // inside
  int64_t p, q;
  void at(int64_t i, int64_t* row, int64_t* column) const {
    const int64_t width = columns.size(), height = rows.size();
    if (width == 0 || height == 0) {
      *row = i / q, *column = i % q;
      return;
    }
    if (i < width * height) {
      *row = rows.begin + i / width, *column = columns.begin + i % width;
      return;
    }
    i -= width * height;
    const int64_t outer_rows = p - height;
    if (i < outer_rows * q) {
      const int64_t k = i / q;
      *row = k < rows.begin ? k : k + height;
      *column = i % q;
      return;
    }
    i -= outer_rows * q;
    const int64_t k = i % (q - width);
    *row = rows.begin + i / (q - width);
    *column = k < columns.begin ? k : k + width;
  }
};

// Finds what an output pixel reads.
inline void find_pixel(const PairsPlan& plan, int64_t image_group, int64_t row, int64_t column, int i,
                       PairsChunk& chunk) {
  const SlimConv2dF32& conv = *plan.conv;
  const int64_t y = row * conv.stride_h - conv.pad_h, x = column * conv.stride_w - conv.pad_w;
  const Range down = taps_inside(plan.rows, row), right = taps_inside(plan.columns, column);
  chunk.places[i] = (image_group * conv.p + row) * conv.q + column;
  chunk.taps[i] = 0;
  for (int64_t tap = 0; tap < (int64_t)conv.r * conv.s; ++tap) chunk.pixels[i][tap] = plan.zeros;
  chunk.pixels[i][SLIM_PAIRS_MAX_TAPS] = plan.zeros;
  for (int64_t r = down.begin; r < down.end; ++r) {
    const int64_t line = ((image_group * conv.h + y + r * conv.dil_h) * conv.w + x) * plan.pixel_bytes;
    for (int64_t s = right.begin; s < right.end; ++s) {
      chunk.taps[i] |= 1ull << (r * conv.s + s);
      chunk.pixels[i][r * conv.s + s] = (const char*)conv.x + line + s * conv.dil_w * plan.pixel_bytes;
    }
  }
}

inline void find_chunk(const PairsPlan& plan, int64_t image_group, int64_t index, PairsChunk& chunk) {
  const SlimConv2dF32& conv = *plan.conv;
  if (conv.pool) {
    const int64_t row = index / (conv.q / 2) * 2, column = index % (conv.q / 2) * 2;
    chunk.count = CHUNK_PIXELS;
    for (int i = 0; i < CHUNK_PIXELS; ++i) find_pixel(plan, image_group, row + i / 2, column + i % 2, i, chunk);
    chunk.places[0] = (image_group * (conv.p / 2) + row / 2) * (conv.q / 2) + column / 2;
    return;
  }
  const PixelOrder order = {plan.inside_rows, plan.inside_columns, conv.p, conv.q};
  const int64_t first = index * CHUNK_PIXELS;
  chunk.count = (int)min64(CHUNK_PIXELS, conv.p * conv.q - first);
  for (int i = 0; i < CHUNK_PIXELS; ++i) {
    // Places behind the last pixel compute it again.
    int64_t row, column;
    order.at(first + min64(i, chunk.count - 1), &row, &column);
    find_pixel(plan, image_group, row, column, i, chunk);
  }
}

// ---------------------------------------------------------------- one strip of a chunk

// A strip's groups.
struct StripGroups {
  const SlimPairsGroup* groups;
  const Bf16* weights;  // 16 x 32 for each group
  int64_t count;
};

inline const char* row_at(const char* const* pixels, SlimPairsSource source) { return pixels[source.tap] + source.row; }

// What becomes of a strip's sums: the same of every pixel.
struct Epilogue {
  float bias[PAIRS_STRIP];
  float least;       // 0 with a ReLU, else minus infinity
  int64_t channels;  // up to 16
};

inline Epilogue epilogue_of(const SlimConv2dF32& conv, int64_t strip) {
  Epilogue epilogue;
  const int64_t first = strip * PAIRS_STRIP;
  epilogue.channels = min64(PAIRS_STRIP, conv.c_out - first);
  epilogue.least = conv.relu ? 0.0f : -INFINITY;
  for (int64_t o = 0; o < PAIRS_STRIP; ++o)
    epilogue.bias[o] = conv.bias != nullptr && o < epilogue.channels ? conv.bias[first + o] : 0.0f;
  return epilogue;
}

// One channel of a pixel, or of a window's CHUNK_PIXELS pixels.
template <class V, bool POOL>
inline typename V::type output(const float* sums, const float* bias) {
  typename V::type v = V::load(sums);
  if (POOL) {
    for (int j = 1; j < CHUNK_PIXELS; ++j) v = V::max_nan(v, V::load(sums + j * PAIRS_STRIP * PAIR_IMAGES));
  }
  return V::add(v, V::broadcast(bias));
}

// Writes what the sums of one pixel become. Engine::Floats holds 16 of them.
template <class Engine, bool POOL>
inline void write_pairs(const Epilogue& epilogue, const float* sums, const char* residual, char* y) {
  typedef typename Engine::Floats V;
  const typename V::type least = V::broadcast(&epilogue.least);
  for (int64_t o = 0; o < epilogue.channels; o += 2) {
    typename V::type even = output<V, POOL>(sums + o * PAIR_IMAGES, epilogue.bias + o);
    typename V::type odd = output<V, POOL>(sums + (o + 1) * PAIR_IMAGES, epilogue.bias + o + 1);
    if (residual != nullptr) {
      even = V::add(even, Engine::even(residual + o / 2 * PAIR_ROW));
      odd = V::add(odd, Engine::odd(residual + o / 2 * PAIR_ROW));
    }
    Engine::store_pair(y + o / 2 * PAIR_ROW, V::max_second_nan(least, even), V::max_second_nan(least, odd));
  }
}

template <class Engine, bool POOL>
inline void write_floats(const Epilogue& epilogue, const float* sums, const char* residual, float* y) {
  typedef typename Engine::Floats V;
  const typename V::type least = V::broadcast(&epilogue.least);
  for (int64_t o = 0; o < epilogue.channels; ++o) {
    typename V::type v = output<V, POOL>(sums + o * PAIR_IMAGES, epilogue.bias + o);
    if (residual != nullptr) {
      const char* const row = residual + o / 2 * PAIR_ROW;
      v = V::add(v, o % 2 == 0 ? Engine::even(row) : Engine::odd(row));
    }
    V::store(y + o * PAIR_IMAGES, V::max_second_nan(least, v));
  }
}

template <class Engine, bool POOL>
inline void write_outputs(const PairsPlan& plan, const Epilogue& epilogue, const PairsChunk& chunk, int64_t strip,
                          const float* sums) {
  const SlimConv2dF32& conv = *plan.conv;
  for (int i = 0; i < (POOL ? 1 : chunk.count); ++i) {
    const float* const from = sums + i * PAIRS_STRIP * PAIR_IMAGES;
    const int64_t place = (chunk.places[i] * plan.pairs_out + strip * PAIRS_STRIP / 2) * PAIR_ROW;
    const char* const residual = conv.residual == nullptr ? nullptr : (const char*)conv.residual + place;
    if (plan.to_floats)
      write_floats<Engine, POOL>(epilogue, from, residual,
                                 conv.y + (chunk.places[i] * conv.c_out + strip * PAIRS_STRIP) * PAIR_IMAGES);
    else
      write_pairs<Engine, POOL>(epilogue, from, residual, (char*)conv.y + place);
  }
}

template <class Engine>
inline void run_pairs_unit(const PairsPlan& plan, int64_t index, char* scratch) {
  const SlimConv2dF32& conv = *plan.conv;
  scratch = (char*)(((uintptr_t)scratch + 63) / 64 * 64);
  const int64_t strip_part = index % plan.strip_parts, rest = index / plan.strip_parts;
  const int64_t image_group = rest / plan.chunk_parts, chunk0 = rest % plan.chunk_parts * plan.chunks_per_unit;
  const int64_t chunk_end = min64(plan.chunks, chunk0 + plan.chunks_per_unit);
  const int64_t strip0 = strip_part * plan.strips_per_unit,
                strip_end = min64(plan.strips, strip0 + plan.strips_per_unit);
  PairsChunk* const chunks = (PairsChunk*)(scratch + SCRATCH_CHUNKS);
  Engine engine;
  for (int64_t block = chunk0; block < chunk_end; block += plan.chunks_per_block) {
    const int64_t count = min64(plan.chunks_per_block, chunk_end - block);
    for (int64_t i = 0; i < count; ++i) find_chunk(plan, image_group, block + i, chunks[i]);
    for (int64_t strip = strip0; strip < strip_end; ++strip) {
      const int64_t first = conv.tap_ptr[strip];
      const StripGroups groups = {(const SlimPairsGroup*)conv.channels + first,
                                  (const Bf16*)conv.weights + first * PAIRS_STRIP * 2 * GROUP_ROWS,
                                  conv.tap_ptr[strip + 1] - first};
      const Epilogue epilogue = epilogue_of(conv, strip);
      for (int64_t i = 0; i < count; ++i) {
        float* const sums = (float*)(scratch + SCRATCH_SUMS);
        engine.add_up(groups, chunks[i], scratch + SCRATCH_BUFFERS, sums);
        if (conv.pool)
          write_outputs<Engine, true>(plan, epilogue, chunks[i], strip, sums);
        else
          write_outputs<Engine, false>(plan, epilogue, chunks[i], strip, sums);
      }
    }
  }
}

}  // namespace
