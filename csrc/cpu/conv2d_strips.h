// Block-sparse convolution over strip packs, written once over a vector type; see csrc/kernels.h for the operation.
//
// Each instruction set's translation unit defines, in an anonymous namespace, the vector types it has and includes this file
// (also into an anonymous namespace, so that no symbol compiled for one instruction set can be linked into another's code).
//
// Microkernel: MR pixels x L output channels (one strip) stay in registers while the strip's entries stream by; one entry is an
// input channel at a tap and L weights: MR broadcasts, MR * NV multiply-adds. Each pixel has its own pointer, so a tile may take
// any pixels that see the same taps: no multiply-add is spent on padding.
//
// Two orders over the taps:
// - all_taps: the tile's accumulators stay in registers over every tap inside the image. Pixels are classed by the taps they
//   see (corners, edges, interior), and a tile holds pixels of one class.
// - tap_by_tap: taps outermost, accumulators kept in y. For a few small images, whose classes hold one to four pixels each: every
//   tile then takes all pixels that see the tap.

struct Range {
  int64_t begin, end;
};

// One contiguous run of entries, its offsets relative to the pixel pointers.
struct Segment {
  int32_t begin, end;
};

// Where a tile's accumulators start and what happens to them at the end.
enum { INIT_BIAS = 0, INIT_Y = 1 };

// ---------------------------------------------------------------- microkernel

// Accumulators live in registers only when every loop over them disappears before the compiler splits the array.
#define SLIM_UNROLL _Pragma("GCC unroll 16")

// Weights of consecutive entries are STRIDE floats apart, a constant: one register more for pixel pointers.
template <class V, int NV, int MR, int STRIDE>
struct Tile {
  // Independent accumulator sets, so that MR * NV * SETS multiply-adds cover the latency (4 cycles, 2 units) on small tiles.
  static constexpr int SETS = MR * NV >= 6 ? 1 : (MR * NV >= 3 ? 2 : 4);

  // x, y_pixels: MR pixel pointers each; outputs go to y_pixels[m] + channel. w: weights of entry 0. offsets: elements relative to
  // x. lanes: channels of the strip that exist.
  static void run(const float* const* x, float* const* y_pixels, int64_t channel, const float* w, const int32_t* offsets,
                  const Segment* segments, int count, const float* bias, int init, int relu, int lanes) {
    typename V::type acc[SETS][MR][NV];
    const float* px[MR];
    SLIM_UNROLL for (int m = 0; m < MR; ++m) px[m] = x[m];

    const bool full = lanes == V::N * NV;
    SLIM_UNROLL for (int v = 0; v < NV; ++v) {
      const int present = lanes - v * V::N;
      if (init == INIT_Y) {
        SLIM_UNROLL for (int m = 0; m < MR; ++m) {
          const float* source = y_pixels[m] + channel + v * V::N;
          acc[0][m][v] = full ? V::load(source) : V::load_part(source, present);
        }
      } else {
        const typename V::type start =
            bias == nullptr ? V::zero() : (full ? V::load(bias + v * V::N) : V::load_part(bias + v * V::N, present));
        SLIM_UNROLL for (int m = 0; m < MR; ++m) acc[0][m][v] = start;
      }
    }
    SLIM_UNROLL for (int u = 1; u < SETS; ++u)
      SLIM_UNROLL for (int m = 0; m < MR; ++m)
        SLIM_UNROLL for (int v = 0; v < NV; ++v) acc[u][m][v] = V::zero();

    for (int i = 0; i < count; ++i) {
      const float* weight = w + (int64_t)segments[i].begin * STRIDE;
      const int32_t* o = offsets + segments[i].begin;
      const int32_t* const end = offsets + segments[i].end;
      for (; end - o >= SETS; o += SETS, weight += SETS * STRIDE) {
        SLIM_UNROLL for (int u = 0; u < SETS; ++u) step(acc[u], px, weight + u * STRIDE, o[u]);
      }
      if (SETS > 1)
        for (; o != end; ++o, weight += STRIDE) step(acc[0], px, weight, o[0]);
    }

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
          V::store_part(target + v * V::N, acc[0][m][v], lanes - v * V::N);
      }
    }
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
};

typedef void (*TileFunction)(const float* const*, float* const*, int64_t, const float*, const int32_t*, const Segment*, int,
                             const float*, int, int, int);

constexpr int MAX_MR = 16;

template <class V, int NV, int MR, int STRIDE>
void fill_tiles(TileFunction* table) {
  if constexpr (MR > 1) fill_tiles<V, NV, MR - 1, STRIDE>(table);
  table[MR] = Tile<V, NV, MR, STRIDE>::run;
}

// The tiles for strips of one width: `lanes` channels at a time, up to `mr` pixels.
struct TileSet {
  TileFunction run[MAX_MR + 1];
  int mr, lanes;
};

template <class V, int NV, int MR, int STRIDE>
TileSet make_tiles() {
  static_assert(MR <= MAX_MR && STRIDE % (V::N * NV) == 0, "");
  TileSet set;
  set.run[0] = nullptr;
  fill_tiles<V, NV, MR, STRIDE>(set.run);
  set.mr = MR;
  set.lanes = V::N * NV;
  return set;
}

// ---------------------------------------------------------------- geometry

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Output positions [begin, end) whose input `i * stride - pad + shift` lies in [0, size).
inline Range positions(int64_t out, int64_t size, int64_t stride, int64_t pad, int64_t shift) {
  const int64_t low = pad - shift;
  const int64_t begin = low > 0 ? ceil_div(low, stride) : 0;
  const int64_t last = size - 1 + pad - shift;
  const int64_t end = last < 0 ? 0 : last / stride + 1;
  const Range r = {min64(begin, out), min64(end, out)};
  return r;
}

// Taps [begin, end) that output position i sees along one axis.
inline Range taps_seen(int64_t i, int64_t size, int64_t stride, int64_t pad, int64_t dilation, int64_t taps) {
  const int64_t origin = i * stride - pad;
  int64_t begin = 0, end = taps;
  while (begin < taps && origin + begin * dilation < 0) ++begin;
  while (end > begin && origin + (end - 1) * dilation >= size) --end;
  const Range r = {begin, end};
  return r;
}

// Where a unit's outputs go: y itself, or the scratch in front of the pooling.
struct Destination {
  float* base;
  int64_t image_stride, row_stride, pixel_stride, image0, row0, channel0;
  float* at(int64_t n, int64_t p, int64_t q) const {
    return base + (n - image0) * image_stride + (p - row0) * row_stride + q * pixel_stride;
  }
};

// A piece of work for one thread: images x output rows x strips. Units depend on the problem alone, never on the number of
// threads, so results do not either.
struct Unit {
  Range images, rows, strips;
};

struct Plan {
  const SlimConv2dF32* a;
  TileSet tiles;
  int64_t rows, columns;      // outputs computed: p x q, cut to even with pooling
  int64_t strips, taps;
  int tap_by_tap;
  int64_t image_step, row_step, strip_step, image_units, row_units, strip_units;
  const int32_t* offsets;     // per entry: tap offset + channel (all_taps), or the channel alone (tap_by_tap)
};

// ---------------------------------------------------------------- one unit

// Pixels of images x rows x columns in order, handed out in tiles of nearly equal size. Pointers advance by additions: with few
// strips and few entries, address arithmetic per pixel was a third of the time.
struct PixelCursor {
  const Plan* plan;
  const Destination* to;
  Range rows, columns;
  int64_t n, p, left_in_row, left, base_size, larger_tiles;
  const float* xp;
  float* yp;
  int64_t x_step, y_step;

  PixelCursor(const Plan& pl, const Destination& d, Range images, Range r, Range c) : plan(&pl), to(&d), rows(r), columns(c) {
    n = images.begin;
    p = r.begin;
    x_step = pl.a->stride_w * pl.a->c_in;
    y_step = d.pixel_stride;
    left = r.end > r.begin && c.end > c.begin ? (images.end - images.begin) * (r.end - r.begin) * (c.end - c.begin) : 0;
    const int64_t tiles = ceil_div(left, pl.tiles.mr);
    base_size = tiles > 0 ? left / tiles : 0;
    larger_tiles = tiles > 0 ? left % tiles : 0;
    if (left > 0) start_row();
  }

  void start_row() {
    const SlimConv2dF32& a = *plan->a;
    const int64_t row = p * a.stride_h - a.pad_h, column = columns.begin * a.stride_w - a.pad_w;
    xp = a.x + ((n * a.h + row) * a.w + column) * a.c_in;
    yp = to->at(n, p, columns.begin);
    left_in_row = columns.end - columns.begin;
  }

  // Writes the pointers of the next tile, x at tap (0, 0); returns its number of pixels, 0 at the end.
  int next(const float** x, float** y) {
    if (left == 0) return 0;
    int size = (int)base_size;
    if (larger_tiles > 0) {
      --larger_tiles;
      ++size;
    }
    left -= size;
    for (int m = 0; m < size;) {
      const int run = (int)min64(size - m, left_in_row);
      const float* px = xp;
      float* py = yp;
      for (int i = 0; i < run; ++i, px += x_step, py += y_step) {
        x[m + i] = px;
        y[m + i] = py;
      }
      xp = px;
      yp = py;
      m += run;
      left_in_row -= run;
      if (left_in_row == 0 && left + size - m > 0) {
        if (++p == rows.end) {
          p = rows.begin;
          ++n;
        }
        start_row();
      }
    }
    return size;
  }
};

// Bytes of weights and offsets that should stay in L2 while tiles pass over them; half of the smallest L2 aimed at (512 KB).
constexpr int64_t WEIGHT_BYTES = 256 * 1024;

// Tap rows that one call of a microkernel may be given; taller kernels go tap by tap.
constexpr int MAX_SEGMENTS = 64;

// Runs one tile over the strips, `segments_of` giving the entries of a strip.
template <class SegmentsOf>
inline void run_strips(const Plan& plan, Range strips, const float* const* x, float* const* y, int size, int64_t channel0,
                       int init, int relu, const SegmentsOf& segments_of) {
  const SlimConv2dF32& a = *plan.a;
  const TileFunction run = plan.tiles.run[size];
  const int width = plan.tiles.lanes;
  Segment segments[MAX_SEGMENTS];
  for (int64_t k = strips.begin; k < strips.end; ++k) {
    const int count = segments_of(k, segments);
    if (count == 0 && init == INIT_Y) continue;
    int64_t channel = k * a.strip;
    for (int part = 0; part < a.strip && channel < a.c_out; part += width, channel += width)
      run(x, y, channel - channel0, a.weights + part, plan.offsets, segments, count,
          a.bias == nullptr ? nullptr : a.bias + channel, init, relu, (int)min64(width, a.c_out - channel));
  }
}

inline void unit_all_taps(const Plan& plan, const Unit& unit, const Destination& to) {
  const SlimConv2dF32& a = *plan.a;
  const float* x[MAX_MR];
  float* y[MAX_MR];
  for (int64_t first = unit.strips.begin; first < unit.strips.end;) {
    // As many strips as keep their weights in L2.
    int64_t last = first + 1;
    const int64_t per_entry = a.strip * 4 + 4;
    const int64_t start = a.tap_ptr[first * plan.taps];
    while (last < unit.strips.end && (a.tap_ptr[(last + 1) * plan.taps] - start) * per_entry <= WEIGHT_BYTES) ++last;
    const Range strips = {first, last};
    first = last;
    for (int64_t p = unit.rows.begin; p < unit.rows.end;) {
      const Range r = taps_seen(p, a.h, a.stride_h, a.pad_h, a.dil_h, a.r);
      int64_t p_end = p + 1;
      for (; p_end < unit.rows.end; ++p_end) {
        const Range other = taps_seen(p_end, a.h, a.stride_h, a.pad_h, a.dil_h, a.r);
        if (other.begin != r.begin || other.end != r.end) break;
      }
      const Range rows = {p, p_end};
      p = p_end;
      for (int64_t q = 0; q < plan.columns;) {
        const Range s = taps_seen(q, a.w, a.stride_w, a.pad_w, a.dil_w, a.s);
        int64_t q_end = q + 1;
        for (; q_end < plan.columns; ++q_end) {
          const Range other = taps_seen(q_end, a.w, a.stride_w, a.pad_w, a.dil_w, a.s);
          if (other.begin != s.begin || other.end != s.end) break;
        }
        const Range columns = {q, q_end};
        q = q_end;
        const int whole_rows = s.begin == 0 && s.end == a.s;
        const auto segments_of = [&](int64_t k, Segment* out) {
          const int32_t* ptr = a.tap_ptr + k * plan.taps;
          if (r.begin >= r.end || s.begin >= s.end) return 0;
          if (whole_rows) {
            out[0].begin = ptr[r.begin * a.s];
            out[0].end = ptr[r.end * a.s];
            return 1;
          }
          int count = 0;
          for (int64_t i = r.begin; i < r.end; ++i, ++count) {
            out[count].begin = ptr[i * a.s + s.begin];
            out[count].end = ptr[i * a.s + s.end];
          }
          return count;
        };
        PixelCursor cursor(plan, to, unit.images, rows, columns);
        for (int size; (size = cursor.next(x, y)) != 0;)
          run_strips(plan, strips, x, y, size, to.channel0, INIT_BIAS, a.relu, segments_of);
      }
    }
  }
}

template <class V>
inline void each_output(const Plan& plan, const Unit& unit, const Destination& to, const float* bias, int relu) {
  const SlimConv2dF32& a = *plan.a;
  const int64_t begin = unit.strips.begin * a.strip, count = min64(unit.strips.end * a.strip, a.c_out) - begin;
  for (int64_t n = unit.images.begin; n < unit.images.end; ++n)
    for (int64_t p = unit.rows.begin; p < unit.rows.end; ++p)
      for (int64_t q = 0; q < plan.columns; ++q) {
        float* y = to.at(n, p, q) + (begin - to.channel0);
        int64_t i = 0;
        if (relu) {
          for (; i + V::N <= count; i += V::N) V::store(y + i, V::relu(V::load(y + i)));
          for (; i < count; ++i) y[i] = y[i] < 0 ? 0 : y[i];
        } else if (bias != nullptr) {
          for (; i + V::N <= count; i += V::N) V::store(y + i, V::load(bias + begin + i));
          for (; i < count; ++i) y[i] = bias[begin + i];
        } else {
          for (; i < count; ++i) y[i] = 0;
        }
      }
}

template <class V>
inline void unit_tap_by_tap(const Plan& plan, const Unit& unit, const Destination& to) {
  const SlimConv2dF32& a = *plan.a;
  const float* x[MAX_MR];
  float* y[MAX_MR];
  each_output<V>(plan, unit, to, a.bias, 0);
  for (int64_t tap = 0; tap < plan.taps; ++tap) {
    const int64_t i = tap / a.s, j = tap % a.s;
    Range rows = positions(a.p, a.h, a.stride_h, a.pad_h, i * a.dil_h);
    Range columns = positions(a.q, a.w, a.stride_w, a.pad_w, j * a.dil_w);
    rows.begin = max64(rows.begin, unit.rows.begin);
    rows.end = min64(rows.end, unit.rows.end);
    columns.end = min64(columns.end, plan.columns);
    const int64_t shift = (i * a.dil_h * a.w + j * a.dil_w) * a.c_in;
    const auto segments_of = [&](int64_t k, Segment* out) {
      out[0].begin = a.tap_ptr[k * plan.taps + tap];
      out[0].end = a.tap_ptr[k * plan.taps + tap + 1];
      return out[0].end > out[0].begin ? 1 : 0;
    };
    PixelCursor cursor(plan, to, unit.images, rows, columns);
    for (int size; (size = cursor.next(x, y)) != 0;) {
      for (int m = 0; m < size; ++m) x[m] += shift;
      run_strips(plan, unit.strips, x, y, size, to.channel0, INIT_Y, 0, segments_of);
    }
  }
  if (a.relu) each_output<V>(plan, unit, to, nullptr, 1);
}

// 2x2 stride-2 max-pool of the unit's outputs in scratch into y.
template <class V>
inline void pool_unit(const Plan& plan, const Unit& unit, const Destination& from) {
  const SlimConv2dF32& a = *plan.a;
  const int64_t begin = unit.strips.begin * a.strip, count = min64(unit.strips.end * a.strip, a.c_out) - begin;
  const int64_t p_out = a.p / 2, q_out = a.q / 2;
  for (int64_t n = unit.images.begin; n < unit.images.end; ++n)
    for (int64_t p = unit.rows.begin; p < unit.rows.end; p += 2)
      for (int64_t q = 0; q < plan.columns; q += 2) {
        const float* s0 = from.at(n, p, q);
        const float* s1 = s0 + from.pixel_stride;
        const float* s2 = s0 + from.row_stride;
        const float* s3 = s2 + from.pixel_stride;
        float* y = a.y + ((n * p_out + p / 2) * q_out + q / 2) * a.c_out + begin;
        int64_t i = 0;
        for (; i + V::N <= count; i += V::N)
          V::store(y + i, V::max_nan(V::max_nan(V::load(s0 + i), V::load(s1 + i)), V::max_nan(V::load(s2 + i), V::load(s3 + i))));
        for (; i < count; ++i) {
          float m = s0[i];
          const float others[3] = {s1[i], s2[i], s3[i]};
          for (int j = 0; j < 3; ++j)
            if (others[j] > m || others[j] != others[j]) m = others[j];
          y[i] = m;
        }
      }
}

// ---------------------------------------------------------------- the call

// Multiply-adds a unit should have: about 30 microseconds, so that two threads balance and a parallel region pays.
constexpr int64_t UNIT_MACS = 1500000;
// Pixels a unit should have: the corner and edge classes of small images fill their tiles only across several images.
constexpr int64_t UNIT_PIXELS = 384;
// Strips a unit should have at least, to share each tile's input while it is in L1.
constexpr int64_t UNIT_STRIPS = 4;
// Tap by tap wins where the classes of pixels are too small to fill tiles and a strip has enough entries a tap to outweigh the
// accumulator traffic in y (measured on Zen 3: 1.5x at 1 image of 4x4 and 2x2, even at 16 images).
constexpr int64_t TAP_BY_TAP_MAX_PIXELS = 48, TAP_BY_TAP_MIN_ENTRIES = 8;
// Floats of scratch a pooled unit may use: half of a 512 KB L2.
constexpr int64_t SCRATCH_FLOATS = 64 * 1024;

inline void make_plan(Plan& plan) {
  const SlimConv2dF32& a = *plan.a;
  plan.taps = (int64_t)a.r * a.s;
  plan.strips = ceil_div(a.c_out, a.strip);
  plan.rows = a.pool ? a.p / 2 * 2 : a.p;
  plan.columns = a.pool ? a.q / 2 * 2 : a.q;
  const int64_t entries = a.tap_ptr[plan.strips * plan.taps];
  const bool few_pixels = a.n * plan.rows * plan.columns <= TAP_BY_TAP_MAX_PIXELS;
  const bool many_entries = entries >= TAP_BY_TAP_MIN_ENTRIES * plan.strips * plan.taps;
  plan.tap_by_tap = plan.taps > 1 && (a.r > MAX_SEGMENTS || (few_pixels && many_entries));

  const int64_t even = a.pool ? 2 : 1;
  const int64_t pixels = plan.rows * plan.columns;
  const int64_t strip_macs = max64(1, entries / plan.strips * a.strip);   // of one pixel
  plan.image_step = min64(a.n, ceil_div(UNIT_PIXELS, pixels));
  plan.row_step = plan.rows;
  if (plan.image_step == 1 && pixels > 2 * UNIT_PIXELS) {
    const int64_t row_macs = strip_macs * plan.strips * plan.columns;
    const int64_t row_count = max64(ceil_div(UNIT_PIXELS, plan.columns), ceil_div(UNIT_MACS, row_macs));
    plan.row_step = min64(plan.rows, ceil_div(row_count, 2) * 2);
  }
  if (a.pool) {
    const int64_t row_floats = plan.columns * a.c_out;
    plan.row_step = max64(even, min64(plan.row_step, SCRATCH_FLOATS / row_floats / 2 * 2));
    plan.image_step = max64(1, min64(plan.image_step, SCRATCH_FLOATS / (row_floats * plan.row_step)));
  }
  plan.image_units = ceil_div(a.n, plan.image_step);
  plan.row_units = ceil_div(plan.rows, plan.row_step);
  const int64_t unit_strip_macs = strip_macs * plan.image_step * plan.row_step * plan.columns;
  plan.strip_step = min64(plan.strips, max64(UNIT_STRIPS, ceil_div(UNIT_MACS, unit_strip_macs)));
  // Few pixels: as many units as keep the threads busy, unless the whole layer is too small to share.
  const int64_t pixel_units = plan.image_units * plan.row_units;
  const int64_t wanted_units = unit_strip_macs * plan.strips * pixel_units < UNIT_MACS / 8 ? 1 : 8;
  if (pixel_units * ceil_div(plan.strips, plan.strip_step) < wanted_units)
    plan.strip_step = ceil_div(plan.strips, min64(plan.strips, ceil_div(wanted_units, pixel_units)));
  plan.strip_units = ceil_div(plan.strips, plan.strip_step);
}

template <class V>
inline void run_unit(const Plan& plan, int64_t index, float* scratch) {
  const SlimConv2dF32& a = *plan.a;
  const int64_t k = index % plan.strip_units, rest = index / plan.strip_units;
  const int64_t i = rest / plan.row_units, j = rest % plan.row_units;
  Unit unit;
  unit.images.begin = i * plan.image_step;
  unit.images.end = min64(a.n, unit.images.begin + plan.image_step);
  unit.rows.begin = j * plan.row_step;
  unit.rows.end = min64(plan.rows, unit.rows.begin + plan.row_step);
  unit.strips.begin = k * plan.strip_step;
  unit.strips.end = min64(plan.strips, unit.strips.begin + plan.strip_step);
  Destination to;
  if (a.pool) {
    to.channel0 = unit.strips.begin * a.strip;
    to.pixel_stride = min64(unit.strips.end * a.strip, a.c_out) - to.channel0;
    to.row_stride = plan.columns * to.pixel_stride;
    to.image_stride = (unit.rows.end - unit.rows.begin) * to.row_stride;
    to.base = scratch;
    to.image0 = unit.images.begin;
    to.row0 = unit.rows.begin;
  } else {
    to.base = a.y;
    to.pixel_stride = a.c_out;
    to.row_stride = a.q * a.c_out;
    to.image_stride = a.p * to.row_stride;
    to.image0 = to.row0 = to.channel0 = 0;
  }
  if (plan.tap_by_tap)
    unit_tap_by_tap<V>(plan, unit, to);
  else
    unit_all_taps(plan, unit, to);
  if (a.pool) pool_unit<V>(plan, unit, to);
}

// Offsets of all entries relative to a pixel's tap (0, 0).
inline int32_t* entry_offsets(const Plan& plan) {
  const SlimConv2dF32& a = *plan.a;
  const int64_t entries = a.tap_ptr[plan.strips * plan.taps];
  int32_t* offsets = (int32_t*)malloc(sizeof(int32_t) * (size_t)max64(entries, 1));
  if (offsets == nullptr) return nullptr;
  for (int64_t k = 0; k < plan.strips; ++k)
    for (int64_t tap = 0; tap < plan.taps; ++tap) {
      const int32_t shift = (int32_t)((tap / a.s * a.dil_h * a.w + tap % a.s * a.dil_w) * a.c_in);
      const int32_t end = a.tap_ptr[k * plan.taps + tap + 1];
      for (int32_t e = a.tap_ptr[k * plan.taps + tap]; e < end; ++e) offsets[e] = a.channels[e] + shift;
    }
  return offsets;
}

template <class V>
inline int conv2d(const SlimConv2dF32* a, const TileSet& tiles) {
  Plan plan;
  plan.a = a;
  plan.tiles = tiles;
  make_plan(plan);
  int32_t* offsets = nullptr;
  if (plan.taps > 1 && !plan.tap_by_tap) {
    offsets = entry_offsets(plan);
    if (offsets == nullptr) return SLIM_ERROR_NO_MEMORY;
  }
  plan.offsets = offsets != nullptr ? offsets : a->channels;
  const int64_t units = plan.image_units * plan.row_units * plan.strip_units;
  const size_t scratch_bytes =
      a->pool ? sizeof(float) * (size_t)(plan.image_step * plan.row_step * plan.columns * min64(plan.strip_step * a->strip, a->c_out)) : 0;
  const int threads = (int)min64(a->threads, units);
  int failed = 0;
  if (threads <= 1) {
    float* scratch = a->pool ? (float*)malloc(scratch_bytes) : nullptr;
    if (a->pool && scratch == nullptr)
      failed = 1;
    else
      for (int64_t i = 0; i < units; ++i) run_unit<V>(plan, i, scratch);
    free(scratch);
  } else {
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
      float* scratch = a->pool ? (float*)malloc(scratch_bytes) : nullptr;
      const int usable = !a->pool || scratch != nullptr;
      if (!usable) failed = 1;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < units; ++i)
        if (usable) run_unit<V>(plan, i, scratch);
      free(scratch);
    }
  }
  free(offsets);
  return failed ? SLIM_ERROR_NO_MEMORY : SLIM_OK;
}

// ---------------------------------------------------------------- the machine's limit

// Runs `iterations` rounds of independent multiply-adds on `threads` threads and returns the FLOPs done (2 per multiply-add), the
// ceiling that the convolution is compared with.
template <class V, int CHAINS>
inline double multiply_adds(int64_t iterations, int32_t threads) {
  float sink = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sink) if (threads > 1)
  {
    // Chains start apart, or the compiler would compute one of them for all.
    float start[V::N * CHAINS];
    for (int i = 0; i < V::N * CHAINS; ++i) start[i] = (float)i;
    typename V::type acc[CHAINS];
    const float factor = 0.999f;
    SLIM_UNROLL for (int i = 0; i < CHAINS; ++i) acc[i] = V::load(start + i * V::N);
    const typename V::type f = V::broadcast(&factor);
    for (int64_t n = 0; n < iterations; ++n) {
      SLIM_UNROLL for (int i = 0; i < CHAINS; ++i) acc[i] = V::fma(acc[i], f, f);
    }
    SLIM_UNROLL for (int i = 0; i < CHAINS; ++i) {
      V::store(start, acc[i]);
      sink += start[0];
    }
  }
  // The sum is finite; asking keeps the loop from being removed.
  return sink == sink ? 2.0 * CHAINS * V::N * (double)iterations * threads : 0;
}
