// Microkernels: one tile of outputs stays in registers while the entries of a strip stream by. Included into an anonymous namespace.
//
// A strip's entry is an input channel at a tap with `STRIDE` weights, one for each output channel of the strip. Each pixel of a tile has
// its own pointer, so a tile may take any pixels that see the same taps: no multiply-add is spent on padding.
//
// - Tile (channels last): a vector holds output channels. MR pixels x NV vectors: an entry costs NV weight loads, MR broadcasts of x
//   and MR * NV multiply-adds, MR + NV loads for MR multiply-adds where the strip is one vector wide.
// - ImagesTile (images innermost): a vector holds one channel of V::N images. MR pixels x NO channels: an entry costs MR loads of x, NO
//   broadcasts of weights and MR * NO multiply-adds, 11 loads for 24 of them at 3 x 8, so the multiply-adds are the limit. Strips may be
//   as narrow as one channel, which is unstructured sparsity: 11 loads for 10 multiply-adds at 10 x 1.

// One contiguous run of entries.
struct Segment {
  int32_t begin, end;
};

// Where a tile's accumulators start.
enum { INIT_BIAS = 0, INIT_Y = 1 };

// Accumulators live in registers only when every loop over them disappears before the compiler splits the array.
#define SLIM_UNROLL _Pragma("GCC unroll 16")

// x: MR pixel pointers at tap (0, 0). y_pixels: MR output pointers, of channel 0. channel: first output channel of the tile. w: weights of
// entry 0. offsets: x elements of each entry from the pixel pointer. present: output channels of the tile that exist, from 1 on.
typedef void (*TileFunction)(const float* const* x, float* const* y_pixels, int64_t channel, const float* w, const int32_t* offsets,
                             const Segment* segments, int count, const float* bias, int init, int relu, int present);

// The same for a tile that takes other pixel pointers at every tap: x holds `size` of them for each of the `taps`, and tap_ptr the runs.
typedef void (*TapsFunction)(const float* const* x, int64_t taps, float* const* y_pixels, int64_t channel, const float* w,
                             const int32_t* channels, const int32_t* tap_ptr, const float* bias, int relu, int present);

template <class V, int NV, int MR, int STRIDE>
struct Tile {
  static constexpr int WIDTH = V::N * NV;
  // Independent accumulator sets, so that MR * NV * SETS multiply-adds cover the latency (4 cycles, 2 units) on small tiles.
  static constexpr int SETS = MR * NV >= 6 ? 1 : (MR * NV >= 3 ? 2 : 4);
  typedef typename V::type Accumulators[SETS][MR][NV];

  static void run(const float* const* x, float* const* y_pixels, int64_t channel, const float* w, const int32_t* offsets,
                  const Segment* segments, int count, const float* bias, int init, int relu, int present) {
    Accumulators acc;
    const float* px[MR];
    SLIM_UNROLL for (int m = 0; m < MR; ++m) px[m] = x[m];
    begin(acc, y_pixels, channel, bias, init, present);
    for (int i = 0; i < count; ++i) add(acc, px, w, offsets, segments[i].begin, segments[i].end);
    finish(acc, y_pixels, channel, relu, present);
  }

  static void run_taps(const float* const* x, int64_t taps, float* const* y_pixels, int64_t channel, const float* w,
                       const int32_t* channels, const int32_t* tap_ptr, const float* bias, int relu, int present) {
    Accumulators acc;
    begin(acc, y_pixels, channel, bias, INIT_BIAS, present);
    for (int64_t tap = 0; tap < taps; ++tap, x += MR) {
      const float* px[MR];
      SLIM_UNROLL for (int m = 0; m < MR; ++m) px[m] = x[m];
      add(acc, px, w, channels, tap_ptr[tap], tap_ptr[tap + 1]);
    }
    finish(acc, y_pixels, channel, relu, present);
  }

 private:
  static inline __attribute__((always_inline)) void begin(Accumulators& acc, float* const* y_pixels, int64_t channel,
                                                          const float* bias, int init, int present) {
    const bool full = present == WIDTH;
    SLIM_UNROLL for (int v = 0; v < NV; ++v) {
      const int lanes = present - v * V::N;
      if (init == INIT_Y) {
        SLIM_UNROLL for (int m = 0; m < MR; ++m) {
          const float* source = y_pixels[m] + channel + v * V::N;
          acc[0][m][v] = full ? V::load(source) : V::load_part(source, lanes);
        }
      } else {
        const typename V::type start =
            bias == nullptr ? V::zero() : (full ? V::load(bias + v * V::N) : V::load_part(bias + v * V::N, lanes));
        SLIM_UNROLL for (int m = 0; m < MR; ++m) acc[0][m][v] = start;
      }
    }
    SLIM_UNROLL for (int u = 1; u < SETS; ++u)
      SLIM_UNROLL for (int m = 0; m < MR; ++m)
        SLIM_UNROLL for (int v = 0; v < NV; ++v) acc[u][m][v] = V::zero();
  }

  static inline __attribute__((always_inline)) void add(Accumulators& acc, const float* const (&px)[MR], const float* w,
                                                        const int32_t* offsets, int64_t first, int64_t last) {
    const float* weight = w + first * STRIDE;
    const int32_t* o = offsets + first;
    const int32_t* const end = offsets + last;
    for (; end - o >= SETS; o += SETS, weight += SETS * STRIDE) {
      SLIM_UNROLL for (int u = 0; u < SETS; ++u) step(acc[u], px, weight + u * STRIDE, o[u]);
    }
    if (SETS > 1)
      for (; o != end; ++o, weight += STRIDE) step(acc[0], px, weight, o[0]);
  }

  static inline __attribute__((always_inline)) void step(typename V::type (&acc)[MR][NV], const float* const (&px)[MR],
                                                         const float* weight, int64_t offset) {
    typename V::type wv[NV];
    SLIM_UNROLL for (int v = 0; v < NV; ++v) wv[v] = V::load(weight + v * V::N);
    SLIM_UNROLL for (int m = 0; m < MR; ++m) {
      const typename V::type xv = V::broadcast(px[m] + offset);
      SLIM_UNROLL for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(xv, wv[v], acc[m][v]);
    }
  }

  static inline __attribute__((always_inline)) void finish(Accumulators& acc, float* const* y_pixels, int64_t channel, int relu,
                                                           int present) {
    const bool full = present == WIDTH;
    SLIM_UNROLL for (int u = 1; u < SETS; ++u)
      SLIM_UNROLL for (int m = 0; m < MR; ++m)
        SLIM_UNROLL for (int v = 0; v < NV; ++v) acc[0][m][v] = V::add(acc[0][m][v], acc[u][m][v]);
    if (relu)
      SLIM_UNROLL for (int m = 0; m < MR; ++m)
        SLIM_UNROLL for (int v = 0; v < NV; ++v) acc[0][m][v] = V::relu(acc[0][m][v]);
    SLIM_UNROLL for (int m = 0; m < MR; ++m) {
      float* target = y_pixels[m] + channel;
      SLIM_UNROLL for (int v = 0; v < NV; ++v) {
        if (full)
          V::store(target + v * V::N, acc[0][m][v]);
        else
          V::store_part(target + v * V::N, acc[0][m][v], present - v * V::N);
      }
    }
  }
};

// How many entries ahead ImagesTile asks for x, about 200 cycles: which channels come is not a pattern that hardware prefetchers know.
constexpr int PREFETCH_ENTRIES = SLIM_OFFSETS_MARGIN;

template <class V, int NO, int MR, int STRIDE>
struct ImagesTile {
  static constexpr int SETS = MR * NO >= 8 ? 1 : (MR * NO >= 4 ? 2 : (MR * NO >= 2 ? 4 : 8));
  // Where an entry has few multiply-adds for each load of x, asking ahead would cost more loads than it saves.
  static constexpr bool PREFETCH = NO >= 4;

  static void run(const float* const* x, float* const* y_pixels, int64_t channel, const float* w, const int32_t* offsets,
                  const Segment* segments, int count, const float* bias, int /*init*/, int relu, int present) {
    typename V::type acc[SETS][MR][NO];
    const float* px[MR];
    SLIM_UNROLL for (int m = 0; m < MR; ++m) px[m] = x[m];
    SLIM_UNROLL for (int o = 0; o < NO; ++o) {
      const typename V::type start = bias != nullptr && o < present ? V::broadcast(bias + o) : V::zero();
      SLIM_UNROLL for (int m = 0; m < MR; ++m) acc[0][m][o] = start;
    }
    SLIM_UNROLL for (int u = 1; u < SETS; ++u)
      SLIM_UNROLL for (int m = 0; m < MR; ++m)
        SLIM_UNROLL for (int o = 0; o < NO; ++o) acc[u][m][o] = V::zero();
    for (int i = 0; i < count; ++i) {
      const float* weight = w + (int64_t)segments[i].begin * STRIDE;
      const int32_t* at = offsets + segments[i].begin;
      const int32_t* const end = offsets + segments[i].end;
      for (; end - at >= SETS; at += SETS, weight += SETS * STRIDE) {
        if (PREFETCH) {
          const int64_t coming = at[PREFETCH_ENTRIES];
          SLIM_UNROLL for (int m = 0; m < MR; ++m) __builtin_prefetch(px[m] + coming);
        }
        SLIM_UNROLL for (int u = 0; u < SETS; ++u) step(acc[u], px, weight + u * STRIDE, at[u]);
      }
      if (SETS > 1)
        for (; at != end; ++at, weight += STRIDE) step(acc[0], px, weight, at[0]);
    }
    SLIM_UNROLL for (int u = 1; u < SETS; ++u)
      SLIM_UNROLL for (int m = 0; m < MR; ++m)
        SLIM_UNROLL for (int o = 0; o < NO; ++o) acc[0][m][o] = V::add(acc[0][m][o], acc[u][m][o]);
    SLIM_UNROLL for (int o = 0; o < NO; ++o) {
      if (o < present) {
        SLIM_UNROLL for (int m = 0; m < MR; ++m)
          V::store(y_pixels[m] + (channel + o) * V::N, relu ? V::relu(acc[0][m][o]) : acc[0][m][o]);
      }
    }
  }

 private:
  // The shorter side stays in registers, the longer one passes by.
  static inline __attribute__((always_inline)) void step(typename V::type (&acc)[MR][NO], const float* const (&px)[MR],
                                                         const float* weight, int64_t offset) {
    if constexpr (MR <= NO) {
      typename V::type xv[MR];
      SLIM_UNROLL for (int m = 0; m < MR; ++m) xv[m] = V::load(px[m] + offset);
      SLIM_UNROLL for (int o = 0; o < NO; ++o) {
        const typename V::type wv = V::broadcast(weight + o);
        SLIM_UNROLL for (int m = 0; m < MR; ++m) acc[m][o] = V::fma(xv[m], wv, acc[m][o]);
      }
    } else {
      typename V::type wv[NO];
      SLIM_UNROLL for (int o = 0; o < NO; ++o) wv[o] = V::broadcast(weight + o);
      SLIM_UNROLL for (int m = 0; m < MR; ++m) {
        const typename V::type xv = V::load(px[m] + offset);
        SLIM_UNROLL for (int o = 0; o < NO; ++o) acc[m][o] = V::fma(xv, wv[o], acc[m][o]);
      }
    }
  }
};

constexpr int MAX_MR = 16;

// The tiles for strips of one width: run[m] takes m pixels, up to `mr`, and width[m] output channels; run_taps[m], up to `mr_taps`, the
// whole strip.
struct TileSet {
  TileFunction run[MAX_MR + 1];
  TapsFunction run_taps[MAX_MR + 1];
  int width[MAX_MR + 1];
  int mr, mr_taps;
};

template <class V, int NV, int MR, int STRIDE>
void add_tiles(TileSet& set) {
  static_assert(MR <= MAX_MR && STRIDE % (V::N * NV) == 0, "");
  if constexpr (MR > 1) add_tiles<V, NV, MR - 1, STRIDE>(set);
  set.run[MR] = Tile<V, NV, MR, STRIDE>::run;
  set.width[MR] = V::N * NV;
  set.mr = MR;
}

template <class V, int NV, int MR, int STRIDE>
void add_taps_tiles(TileSet& set) {
  static_assert(MR <= MAX_MR, "");
  if constexpr (MR > 1) add_taps_tiles<V, NV, MR - 1, STRIDE>(set);
  set.run_taps[MR] = Tile<V, NV, MR, STRIDE>::run_taps;
  set.mr_taps = MR;
}

// Tiles of 1 .. MR pixels x NO channels; a tile of one pixel takes NO1 channels.
template <class V, int NO1, int NO, int MR, int STRIDE>
void add_images_tiles(TileSet& set) {
  static_assert(MR <= MAX_MR && STRIDE % NO == 0 && STRIDE % NO1 == 0, "");
  if constexpr (MR > 1) add_images_tiles<V, NO1, NO, MR - 1, STRIDE>(set);
  constexpr int WIDTH = MR == 1 ? NO1 : NO;
  set.run[MR] = ImagesTile<V, WIDTH, MR, STRIDE>::run;
  set.width[MR] = WIDTH;
  set.mr = MR;
  set.mr_taps = 0;
}
