// One unit of work: its tiles over its strips, and the pooling; included into an anonymous namespace.
//
// Two orders over the taps:
// - all_taps: the tile's accumulators stay in registers over every tap inside the image. Pixels are classed by the taps they
//   see (corners, edges, interior), and a tile holds pixels of one class.
// - tap_by_tap (channels last only): for a few small images, whose classes hold one to four pixels each. A tile takes any pixels, and
//   new pointers at every tap.

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

  PixelCursor(const Plan& pl, const Destination& d, Range images, Range r, Range c)
      : plan(&pl), to(&d), rows(r), columns(c), left_in_row(0), xp(nullptr), yp(nullptr) {
    n = images.begin;
    p = r.begin;
    x_step = pl.a->stride_w * pl.a->c_in * pl.lanes;
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
    xp = a.x + ((n * a.h + row) * a.w + column) * a.c_in * plan->lanes;
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

// Runs one tile over the channels of one strip.
inline void run_strip(const Plan& plan, int64_t strip, const float* const* x, float* const* y, int size, int64_t channel0,
                      const Segment* segments, int count, int init, int relu) {
  const SlimConv2dF32& a = *plan.a;
  const int width = plan.tiles.width[size];
  int64_t channel = strip * a.strip;
  for (int part = 0; part < a.strip && channel < a.c_out; part += width, channel += width)
    plan.tiles.run[size](x, y, channel - channel0, a.weights + part, plan.offsets, segments, count,
                         a.bias == nullptr ? nullptr : a.bias + channel, init, relu, (int)min64(width, a.c_out - channel));
}

// Entries of a strip at the taps r x s, one run for each row of taps, or one for all of them; returns the number of runs.
inline int list_segments(const Plan& plan, int64_t strip, Range r, Range s, Segment* out) {
  const SlimConv2dF32& a = *plan.a;
  const int32_t* ptr = a.tap_ptr + strip * plan.taps;
  if (r.begin >= r.end || s.begin >= s.end) return 0;
  if (s.begin == 0 && s.end == a.s) {
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
}

// Reads one float of every cache line. In this order the hardware prefetchers follow: 512 x 512 weights of a 2x2 image came from L3 at 100
// GB/s, where the microkernels' own order, and software prefetches, were bound by the latency of the L1 misses in flight at 20 GB/s. What
// another core has just written comes the faster, too, the more lines are asked for at once.
inline void read_ahead(const float* from, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; i += 16) sum += from[i];
  __asm__ volatile("" : : "m"(sum));
}

inline void unit_all_taps(const Plan& plan, const Unit& unit, const Destination& to) {
  const SlimConv2dF32& a = *plan.a;
  Segment segments[MAX_SEGMENTS];
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
    read_ahead(a.weights + start * a.strip, (a.tap_ptr[last * plan.taps] - start) * a.strip);
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
        PixelCursor cursor(plan, to, unit.images, rows, columns);
        for (int size; (size = cursor.next(x, y)) != 0;)
          for (int64_t k = strips.begin; k < strips.end; ++k) {
            // A kernel of more tap rows than one call takes goes on from y.
            int64_t from = r.begin;
            do {
              const Range part = {from, min64(r.end, from + MAX_SEGMENTS)};
              const int count = list_segments(plan, k, part, s, segments);
              const int last = part.end >= r.end;
              run_strip(plan, k, x, y, size, to.channel0, segments, count, from == r.begin ? INIT_BIAS : INIT_Y, a.relu && last);
              from = part.end;
            } while (from < r.end);
          }
      }
    }
  }
}

// Every strip takes a tile's pixels through all taps at once; a pixel that does not see a tap reads zeros there. A few small images fill
// whole tiles this way, and accumulators stay in registers. Strips outermost: their weights are then read in order.
inline void unit_tap_by_tap(const Plan& plan, const Unit& unit, const Destination& to) {
  const SlimConv2dF32& a = *plan.a;
  const int64_t count = (unit.images.end - unit.images.begin) * (unit.rows.end - unit.rows.begin) * plan.columns;
  const int64_t tiles = ceil_div(count, plan.tiles.mr_taps);
  read_ahead(a.x + unit.images.begin * a.h * a.w * a.c_in, (unit.images.end - unit.images.begin) * a.h * a.w * a.c_in);
  // Pointers of a tile's pixels lie together, those of each tap behind those of the one before.
  const float* x[TAP_BY_TAP_MAX_TAPS * TAP_BY_TAP_MAX_PIXELS];
  float* y[TAP_BY_TAP_MAX_PIXELS];
  int64_t n = unit.images.begin, p = unit.rows.begin, q = 0;
  for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
    const int64_t size = count * (tile + 1) / tiles - first;
    for (int64_t m = 0; m < size; ++m) {
      y[first + m] = to.at(n, p, q);
      const Range r = taps_seen(p, a.h, a.stride_h, a.pad_h, a.dil_h, a.r);
      const Range s = taps_seen(q, a.w, a.stride_w, a.pad_w, a.dil_w, a.s);
      for (int64_t i = 0; i < a.r; ++i)
        for (int64_t j = 0; j < a.s; ++j) {
          const int64_t row = p * a.stride_h - a.pad_h + i * a.dil_h, column = q * a.stride_w - a.pad_w + j * a.dil_w;
          const bool seen = i >= r.begin && i < r.end && j >= s.begin && j < s.end;
          x[first * plan.taps + (i * a.s + j) * size + m] = seen ? a.x + ((n * a.h + row) * a.w + column) * a.c_in : plan.zeros;
        }
      if (++q == plan.columns) {
        q = 0;
        if (++p == unit.rows.end) {
          p = unit.rows.begin;
          ++n;
        }
      }
    }
    first += size;
  }
  for (int64_t k = unit.strips.begin; k < unit.strips.end; ++k) {
    const int64_t channel = k * a.strip;
    for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
      const int64_t size = count * (tile + 1) / tiles - first;
      plan.tiles.run_taps[size](x + first * plan.taps, plan.taps, y + first, channel - to.channel0, a.weights, a.channels,
                                a.tap_ptr + k * plan.taps, a.bias == nullptr ? nullptr : a.bias + channel, a.relu,
                                (int)min64(a.strip, a.c_out - channel));
      first += size;
    }
  }
}

// 2x2 stride-2 max-pool of the unit's outputs in scratch into y.
template <class V>
inline void pool_unit(const Plan& plan, const Unit& unit, const Destination& from) {
  const SlimConv2dF32& a = *plan.a;
  const int64_t begin = unit.strips.begin * a.strip * plan.lanes;
  const int64_t pixel = a.c_out * plan.lanes, count = min64(unit.strips.end * a.strip * plan.lanes, pixel) - begin;
  const int64_t p_out = a.p / 2, q_out = a.q / 2;
  for (int64_t n = unit.images.begin; n < unit.images.end; ++n)
    for (int64_t p = unit.rows.begin; p < unit.rows.end; p += 2)
      for (int64_t q = 0; q < plan.columns; q += 2) {
        const float* s0 = from.at(n, p, q);
        const float* s1 = s0 + from.pixel_stride;
        const float* s2 = s0 + from.row_stride;
        const float* s3 = s2 + from.pixel_stride;
        float* y = a.y + ((n * p_out + p / 2) * q_out + q / 2) * pixel + begin;
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

template <class V>
inline void run_unit(const Plan& plan, int64_t index, float* scratch) {
  const SlimConv2dF32& a = *plan.a;
  const int64_t k = index % plan.strip_units, rest = index / plan.strip_units;
  const int64_t i = rest / plan.row_units, j = rest % plan.row_units;
  Unit unit;
  unit.images.begin = i * plan.image_step;
  unit.images.end = min64(plan.images, unit.images.begin + plan.image_step);
  unit.rows.begin = j * plan.row_step;
  unit.rows.end = min64(plan.rows, unit.rows.begin + plan.row_step);
  unit.strips.begin = k * plan.strip_step;
  unit.strips.end = min64(plan.strips, unit.strips.begin + plan.strip_step);
  Destination to;
  if (a.pool) {
    to.channel0 = unit.strips.begin * a.strip;
    to.pixel_stride = (min64(unit.strips.end * a.strip, a.c_out) - to.channel0) * plan.lanes;
    to.row_stride = plan.columns * to.pixel_stride;
    to.image_stride = (unit.rows.end - unit.rows.begin) * to.row_stride;
    to.base = scratch;
    to.image0 = unit.images.begin;
    to.row0 = unit.rows.begin;
  } else {
    to.base = a.y;
    to.pixel_stride = a.c_out * plan.lanes;
    to.row_stride = a.q * to.pixel_stride;
    to.image_stride = a.p * to.row_stride;
    to.image0 = to.row0 = to.channel0 = 0;
  }
  if (plan.tap_by_tap)
    unit_tap_by_tap(plan, unit, to);
  else
    unit_all_taps(plan, unit, to);
  if (a.pool) pool_unit<V>(plan, unit, to);
}
