// Microkernels: the outputs of one tile stay in registers while the weights of a strip stream by.
//
// An *entry* of a strip is an input channel at a tap, with `STRIDE` weights: one for each output channel of the strip.
// Each pixel of a tile has its own pointer into x, so a tile may take any pixels that see the same taps. Entries of
// taps outside the image are left out by the caller, so no multiply-add is spent on padding.
//
// There are three kinds of tiles:
//
// - Tile, channels last: a vector holds V::N output channels of one pixel, and a tile is MR pixels x NV vectors.
//   An entry costs NV loads of weights, MR broadcasts of x and MR * NV multiply-adds. Where the strip is one vector
//   wide, that is MR + 1 loads for MR multiply-adds.
// - ImagesTile, images innermost: a vector holds one channel of V::N images, and a tile is MR pixels x NO output
//   channels. An entry costs MR loads of x, NO broadcasts of weights and MR * NO multiply-adds. At 3 x 8 that is 11
//   loads for 24 multiply-adds, so the multiply-adds are the limit. Strips may be as narrow as one channel, which is
//   unstructured sparsity: at 10 x 1 there are 11 loads for 10 multiply-adds.
// - DotTile, channels last, for entries of several input channels: a vector holds V::N of those of one pixel, and a
// tile
//   is MR pixels x one output channel, each the sum of its vector's lanes in the end. An entry costs NV loads of
//   weights, MR * NV loads of x and as many multiply-adds.
//
// The vector type V is the instruction set's. It has V::N floats in V::type, and zero, load, load_part, broadcast,
// store, store_part, add, fma (a * b + c), sum_lanes (of four vectors), relu and max_nan, the last two of which keep
// NaN. Vectors of images also have V::Lanes, which V::lanes makes of V::N lane numbers, and moved: each lane takes the
// one of its number, and zero where that is -1.
#pragma once
#include <stdint.h>

#include "../kernels.h"
#include "compiler.h"

namespace {

// A contiguous run of entries.
struct Segment {
  int32_t begin, end;
};

// Where the accumulators start.
enum Start {
  START_AT_BIAS,
  START_AT_Y,  // a call before has written the sum over other taps there
};

// Strips that follow each other, and what a tile needs to pass over them in one call: where strips have few entries, a
// call for each of them was a tenth of the time.
struct Strips {
  int64_t count;
  const float* weights;     // of entry 0
  const int32_t* offsets;   // of each entry: elements of x from a pixel's pointer
  const Segment* segments;  // [count][runs], the entries of each strip
  int runs;
  const float* bias;  // of the first strip's first channel on, or NULL
  int64_t channel;    // of the first strip, counted from where the tile's pointers into y point
  int64_t present;    // how many output channels exist from there on: the last strip may reach beyond c_out
  Start start;
  int relu;
};

// Computes a tile for all output channels of some strips.
//   x         pointers to the tile's pixels in x, at tap (0, 0)
//   y_pixels  pointers to the tile's pixels in y, at channel 0
typedef void (*TileFunction)(const float* const* x, float* const* y_pixels, const Strips& strips);

// Hands out the output channels of strips that have STRIDE of them, WIDTH at a time, which divides STRIDE.
template <int WIDTH, int STRIDE>
struct ChannelCursor {
  int64_t channel, left;
  const float* weights;  // of entry 0
  const Segment* segments;
  const float* bias;
  int part;  // channels of the present strip that are over

  explicit ChannelCursor(const Strips& strips)
      : channel(strips.channel),
        left(strips.count * STRIDE < strips.present ? strips.count * STRIDE : strips.present),
        weights(strips.weights),
        segments(strips.segments),
        bias(strips.bias),
        part(0) {}

  bool more() const { return left > 0; }
  int present() const { return left < WIDTH ? (int)left : WIDTH; }

  void advance(int runs) {
    channel += WIDTH;
    left -= WIDTH;
    weights += WIDTH;
    if (bias != nullptr) bias += WIDTH;
    part += WIDTH;
    if (part == STRIDE) {
      part = 0;
      weights -= STRIDE;
      segments += runs;
    }
  }
};

// Computes a tile whose pixel pointers are given for every tap: x holds those of tap 0, then those of tap 1, and so on.
// tap_ptr[tap] .. tap_ptr[tap + 1] are the entries of a tap, `channels` the elements of x from a pixel's pointer.
typedef void (*TapsFunction)(const float* const* x, int64_t taps, float* const* y_pixels, int64_t channel,
                             const float* weights, const int32_t* channels, const int32_t* tap_ptr, const float* bias,
                             int relu, int present);

// ---------------------------------------------------------------- channels last

template <class V, int NV, int MR, int STRIDE>
struct Tile {
  static constexpr int WIDTH = V::N * NV;  // output channels
  // A multiply-add takes 4 cycles and two start in each, so about 8 should be independent. Small tiles sum into several
  // sets of accumulators in turn, which are added up at the end.
  static constexpr int SETS = MR * NV >= 6 ? 1 : (MR * NV >= 3 ? 2 : 4);
  typedef typename V::type Vector;
  typedef Vector Sums[MR][NV];
  typedef Sums Accumulators[SETS];

  static void run(const float* const* x, float* const* y_pixels, const Strips& strips) {
    const float* pixels[MR];  // [MR]
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) pixels[m] = x[m];
    for (ChannelCursor<WIDTH, STRIDE> at(strips); at.more(); at.advance(strips.runs)) {
      Accumulators sums;  // [SETS][MR][NV] vectors
      begin(sums, y_pixels, at.channel, at.bias, strips.start, at.present());
      for (int i = 0; i < strips.runs; ++i) {
        add_entries(sums, pixels, at.weights, strips.offsets, at.segments[i].begin, at.segments[i].end);
      }
      finish(sums, y_pixels, at.channel, strips.relu, at.present());
    }
  }

  static void run_taps(const float* const* x, int64_t taps, float* const* y_pixels, int64_t channel,
                       const float* weights, const int32_t* channels, const int32_t* tap_ptr, const float* bias,
                       int relu, int present) {
    Accumulators sums;  // [SETS][MR][NV] vectors
    begin(sums, y_pixels, channel, bias, START_AT_BIAS, present);
    for (int64_t tap = 0; tap < taps; ++tap, x += MR) {
      const float* pixels[MR];  // [MR], of this tap
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) pixels[m] = x[m];
      add_entries(sums, pixels, weights, channels, tap_ptr[tap], tap_ptr[tap + 1]);
    }
    finish(sums, y_pixels, channel, relu, present);
  }

 private:
  // Set 0 starts at the bias or at y, the others at zero.
  static SLIM_ALWAYS_INLINE void begin(Accumulators& sums, float* const* y_pixels, int64_t channel, const float* bias,
                                       Start start, int present) {
    const bool full = present == WIDTH;
    SLIM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int lanes = present - v * V::N;
      if (start == START_AT_Y) {
        SLIM_UNROLL
        for (int m = 0; m < MR; ++m) {
          const float* source = y_pixels[m] + channel + v * V::N;
          sums[0][m][v] = full ? V::load(source) : V::load_part(source, lanes);
        }
      } else {
        Vector first = V::zero();
        if (bias != nullptr) first = full ? V::load(bias + v * V::N) : V::load_part(bias + v * V::N, lanes);
        SLIM_UNROLL
        for (int m = 0; m < MR; ++m) sums[0][m][v] = first;
      }
    }
    SLIM_UNROLL
    for (int set = 1; set < SETS; ++set) {
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) {
        SLIM_UNROLL
        for (int v = 0; v < NV; ++v) sums[set][m][v] = V::zero();
      }
    }
  }

  // The main loop: entry `first + i` goes into set i % SETS, and the entries that do not fill all sets into set 0.
  static SLIM_ALWAYS_INLINE void add_entries(Accumulators& sums, const float* const (&pixels)[MR], const float* weights,
                                             const int32_t* offsets, int64_t first, int64_t last) {
    const float* weight = weights + first * STRIDE;  // [entry, STRIDE], its first WIDTH are the tile's
    const int32_t* offset = offsets + first;         // [entry]
    const int32_t* const end = offsets + last;
    for (; end - offset >= SETS; offset += SETS, weight += SETS * STRIDE) {
      SLIM_UNROLL
      for (int set = 0; set < SETS; ++set) add_entry(sums[set], pixels, weight + set * STRIDE, offset[set]);
    }
    if (SETS > 1) {
      for (; offset != end; ++offset, weight += STRIDE) add_entry(sums[0], pixels, weight, offset[0]);
    }
  }

  // sums[MR][NV] += x[MR][1] * w[1][NV]
  static SLIM_ALWAYS_INLINE void add_entry(Sums& sums, const float* const (&pixels)[MR], const float* weight,
                                           int64_t offset) {
    Vector w[NV];  // V::N output channels each
    SLIM_UNROLL
    for (int v = 0; v < NV; ++v) w[v] = V::load(weight + v * V::N);
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) {
      const Vector x = V::broadcast(pixels[m] + offset);  // one input channel of one pixel, in every lane
      SLIM_UNROLL
      for (int v = 0; v < NV; ++v) sums[m][v] = V::fma(x, w[v], sums[m][v]);
    }
  }

  // Adds up the sets, applies the ReLU and writes the channels that exist.
  static SLIM_ALWAYS_INLINE void finish(Accumulators& sums, float* const* y_pixels, int64_t channel, int relu,
                                        int present) {
    const bool full = present == WIDTH;
    SLIM_UNROLL
    for (int set = 1; set < SETS; ++set) {
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) {
        SLIM_UNROLL
        for (int v = 0; v < NV; ++v) sums[0][m][v] = V::add(sums[0][m][v], sums[set][m][v]);
      }
    }
    if (relu) {
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) {
        SLIM_UNROLL
        for (int v = 0; v < NV; ++v) sums[0][m][v] = V::relu(sums[0][m][v]);
      }
    }
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) {
      float* target = y_pixels[m] + channel;
      SLIM_UNROLL
      for (int v = 0; v < NV; ++v) {
        if (full)
          V::store(target + v * V::N, sums[0][m][v]);
        else
          V::store_part(target + v * V::N, sums[0][m][v], present - v * V::N);
      }
    }
  }
};

// ---------------------------------------------------------------- images innermost

// How many entries ahead ImagesTile prefetches x, about 200 cycles. Which channels a strip reads is not a pattern that
// the hardware prefetchers know. Offsets are read this far beyond the last entry, hence the margin behind them.
constexpr int PREFETCH_ENTRIES = SLIM_OFFSETS_MARGIN;

template <class V, int NO, int MR, int STRIDE>
struct ImagesTile {
  // As in Tile: enough independent multiply-adds to cover their latency.
  static constexpr int SETS = MR * NO >= 8 ? 1 : (MR * NO >= 4 ? 2 : (MR * NO >= 2 ? 4 : 8));
  // With fewer channels an entry has so few multiply-adds for each load of x that prefetching costs more loads than it
  // saves.
  static constexpr bool PREFETCH = NO >= 4;
  typedef typename V::type Vector;
  typedef Vector Sums[MR][NO];

  // `start` is not read: the kernels of this layout have at most MAX_SEGMENTS rows of taps, which one call takes.
  static void run(const float* const* x, float* const* y_pixels, const Strips& strips) {
    const float* pixels[MR];  // [MR]
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) pixels[m] = x[m];
    for (ChannelCursor<NO, STRIDE> at(strips); at.more(); at.advance(strips.runs)) {
      add_channels(pixels, y_pixels, at.channel, at.weights, strips.offsets, at.segments, strips.runs, at.bias,
                   strips.relu, at.present());
    }
  }

 private:
  static SLIM_ALWAYS_INLINE void add_channels(const float* const (&pixels)[MR], float* const* y_pixels, int64_t channel,
                                              const float* weights, const int32_t* offsets, const Segment* segments,
                                              int count, const float* bias, int relu, int present) {
    Sums sums[SETS];  // [SETS][MR][NO] vectors of V::N images
    // Set 0 starts at the bias, the others at zero. Channels that do not exist have no bias to read.
    SLIM_UNROLL
    for (int o = 0; o < NO; ++o) {
      const Vector first = bias != nullptr && o < present ? V::broadcast(bias + o) : V::zero();
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) sums[0][m][o] = first;
    }
    SLIM_UNROLL
    for (int set = 1; set < SETS; ++set) {
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) {
        SLIM_UNROLL
        for (int o = 0; o < NO; ++o) sums[set][m][o] = V::zero();
      }
    }

    // The main loop: the entries of a run go into the sets in turn, those that do not fill all sets into set 0.
    for (int i = 0; i < count; ++i) {
      const int64_t first = segments[i].begin;
      const float* weight = weights + first * STRIDE;  // [entry, STRIDE], its first NO are the tile's
      const int32_t* offset = offsets + first;         // [entry]
      const int32_t* const end = offsets + segments[i].end;
      for (; end - offset >= SETS; offset += SETS, weight += SETS * STRIDE) {
        if (PREFETCH) {
          const int64_t coming = offset[PREFETCH_ENTRIES];
          SLIM_UNROLL
          for (int m = 0; m < MR; ++m) __builtin_prefetch(pixels[m] + coming);
        }
        SLIM_UNROLL
        for (int set = 0; set < SETS; ++set) add_entry(sums[set], pixels, weight + set * STRIDE, offset[set]);
      }
      if (SETS > 1) {
        for (; offset != end; ++offset, weight += STRIDE) add_entry(sums[0], pixels, weight, offset[0]);
      }
    }

    SLIM_UNROLL
    for (int set = 1; set < SETS; ++set) {
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) {
        SLIM_UNROLL
        for (int o = 0; o < NO; ++o) sums[0][m][o] = V::add(sums[0][m][o], sums[set][m][o]);
      }
    }
    SLIM_UNROLL
    for (int o = 0; o < NO; ++o) {
      if (o < present) {
        SLIM_UNROLL
        for (int m = 0; m < MR; ++m) {
          V::store(y_pixels[m] + (channel + o) * V::N, relu ? V::relu(sums[0][m][o]) : sums[0][m][o]);
        }
      }
    }
  }

  // sums[MR][NO] += x[MR][1] * w[1][NO]. The shorter of x and w is held in registers while the longer one passes by.
  static SLIM_ALWAYS_INLINE void add_entry(Sums& sums, const float* const (&pixels)[MR], const float* weight,
                                           int64_t offset) {
    if constexpr (MR <= NO) {
      Vector x[MR];  // one input channel of V::N images each
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) x[m] = V::load(pixels[m] + offset);
      SLIM_UNROLL
      for (int o = 0; o < NO; ++o) {
        const Vector w = V::broadcast(weight + o);  // one output channel, in every lane
        SLIM_UNROLL
        for (int m = 0; m < MR; ++m) sums[m][o] = V::fma(x[m], w, sums[m][o]);
      }
    } else {
      Vector w[NO];
      SLIM_UNROLL
      for (int o = 0; o < NO; ++o) w[o] = V::broadcast(weight + o);
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) {
        const Vector x = V::load(pixels[m] + offset);
        SLIM_UNROLL
        for (int o = 0; o < NO; ++o) sums[m][o] = V::fma(x, w[o], sums[m][o]);
      }
    }
  }
};

// ---------------------------------------------------------------- several input channels an entry

template <class V, int NV, int MR>
struct DotTile {
  static constexpr int DEPTH = V::N * NV;  // input channels of an entry
  // As in Tile: enough independent multiply-adds to cover their latency.
  static constexpr int SETS = MR >= 6 ? 1 : (MR >= 3 ? 2 : 4);
  static constexpr int FOURS = (MR + 3) / 4;
  typedef typename V::type Vector;
  typedef Vector Sums[FOURS * 4];  // of which MR are in use, and zeros behind them

  static void run(const float* const* x, float* const* y_pixels, const Strips& strips) {
    const float* pixels[MR];  // [MR]
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) pixels[m] = x[m];
    for (ChannelCursor<1, 1> at(strips); at.more(); at.advance(strips.runs)) {
      add_channel(pixels, y_pixels, at.channel, at.weights, strips.offsets, at.segments, strips.runs, at.bias,
                  strips.start, strips.relu);
    }
  }

 private:
  static SLIM_ALWAYS_INLINE void add_channel(const float* const (&pixels)[MR], float* const* y_pixels, int64_t channel,
                                             const float* weights, const int32_t* offsets, const Segment* segments,
                                             int count, const float* bias, Start start, int relu) {
    Sums sums[SETS];  // [SETS][MR] vectors of V::N input channels
    SLIM_UNROLL
    for (int set = 0; set < SETS; ++set) {
      SLIM_UNROLL
      for (int m = 0; m < FOURS * 4; ++m) sums[set][m] = V::zero();
    }

    // The main loop: the entries of a run go into the sets in turn, those that do not fill all sets into set 0.
    for (int i = 0; i < count; ++i) {
      const float* weight = weights + (int64_t)segments[i].begin * DEPTH;  // [entry, DEPTH]
      const int32_t* offset = offsets + segments[i].begin;                 // [entry]
      const int32_t* const end = offsets + segments[i].end;
      for (; end - offset >= SETS; offset += SETS, weight += SETS * DEPTH) {
        SLIM_UNROLL
        for (int set = 0; set < SETS; ++set) add_entry(sums[set], pixels, weight + set * DEPTH, offset[set]);
      }
      if (SETS > 1) {
        for (; offset != end; ++offset, weight += DEPTH) add_entry(sums[0], pixels, weight, offset[0]);
      }
    }

    SLIM_UNROLL
    for (int set = 1; set < SETS; ++set) {
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) sums[0][m] = V::add(sums[0][m], sums[set][m]);
    }
    float totals[FOURS * 4];  // [MR]
    SLIM_UNROLL
    for (int m = 0; m < MR; m += 4) {
      V::sum_lanes(totals + m, sums[0][m], sums[0][m + 1], sums[0][m + 2], sums[0][m + 3]);
    }
    const float first = bias != nullptr ? bias[0] : 0;
    SLIM_UNROLL
    for (int m = 0; m < MR; ++m) {
      float* const y = y_pixels[m] + channel;
      const float sum = totals[m] + (start == START_AT_Y ? y[0] : first);
      y[0] = relu && sum < 0 ? 0 : sum;  // NaN passes
    }
  }

  // sums[MR][DEPTH] += x[MR][DEPTH] * w[1][DEPTH]
  static SLIM_ALWAYS_INLINE void add_entry(Sums& sums, const float* const (&pixels)[MR], const float* weight,
                                           int64_t offset) {
    SLIM_UNROLL
    for (int v = 0; v < NV; ++v) {
      const Vector w = V::load(weight + v * V::N);  // V::N input channels
      SLIM_UNROLL
      for (int m = 0; m < MR; ++m) sums[m] = V::fma(V::load(pixels[m] + offset + v * V::N), w, sums[m]);
    }
  }
};

// ---------------------------------------------------------------- tables of tiles

constexpr int MAX_TILE_PIXELS = 16;

// The tiles for strips of one width. Index m is a tile of m pixels.
struct TileSet {
  TileFunction run[MAX_TILE_PIXELS + 1];
  TapsFunction run_taps[MAX_TILE_PIXELS + 1];  // these take the whole strip
  int most_pixels, most_pixels_taps;           // the largest m of run and of run_taps; 0 where there is none
};

// Tiles of 1 .. MR pixels x NV vectors.
template <class V, int NV, int MR, int STRIDE>
void add_tiles(TileSet& set) {
  static_assert(MR <= MAX_TILE_PIXELS && STRIDE % (V::N * NV) == 0, "tiles divide the strip");
  if constexpr (MR > 1) add_tiles<V, NV, MR - 1, STRIDE>(set);
  set.run[MR] = Tile<V, NV, MR, STRIDE>::run;
  set.most_pixels = MR;
}

// Tiles of 1 .. MR pixels x NV vectors, whose pointers change by tap.
template <class V, int NV, int MR, int STRIDE>
void add_taps_tiles(TileSet& set) {
  static_assert(MR <= MAX_TILE_PIXELS && STRIDE == V::N * NV, "the tile takes the whole strip");
  if constexpr (MR > 1) add_taps_tiles<V, NV, MR - 1, STRIDE>(set);
  set.run_taps[MR] = Tile<V, NV, MR, STRIDE>::run_taps;
  set.most_pixels_taps = MR;
}

// Tiles of one pixel x NO1 channels, and of 2 .. MR pixels x NO channels.
template <class V, int NO1, int NO, int MR, int STRIDE>
void add_images_tiles(TileSet& set) {
  static_assert(MR <= MAX_TILE_PIXELS && STRIDE % NO == 0 && STRIDE % NO1 == 0, "tiles divide the strip");
  if constexpr (MR > 1) add_images_tiles<V, NO1, NO, MR - 1, STRIDE>(set);
  constexpr int WIDTH = MR == 1 ? NO1 : NO;
  set.run[MR] = ImagesTile<V, WIDTH, MR, STRIDE>::run;
  set.most_pixels = MR;
}

// Tiles of 1 .. MR pixels x one channel, for entries of V::N * NV input channels.
template <class V, int NV, int MR>
void add_dot_tiles(TileSet& set) {
  static_assert(MR <= MAX_TILE_PIXELS, "a table holds no larger tile");
  if constexpr (MR > 1) add_dot_tiles<V, NV, MR - 1>(set);
  set.run[MR] = DotTile<V, NV, MR>::run;
  set.most_pixels = MR;
}

}  // namespace
