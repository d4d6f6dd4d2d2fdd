// How one convolution is cut into units of work; included into an anonymous namespace.

struct Range {
  int64_t begin, end;
};

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
  int64_t lanes;              // images that lie innermost: a vector of them, or 1 (channels last)
  int64_t images;             // groups of `lanes` images
  int64_t rows, columns;      // outputs computed: p x q, cut to even with pooling
  int64_t strips, taps;
  int tap_by_tap;
  int64_t image_step, row_step, strip_step, image_units, row_units, strip_units, units;
  int64_t macs;               // of all units, taps in the padding included
  int64_t scratch_floats;     // of one thread, in front of the pooling
  const int32_t* offsets;     // of all entries: from tap (0, 0) of a pixel, or with tap_by_tap the channel alone
  int32_t* own_offsets;       // the same where the plan allocated them, else NULL
  float* zeros;               // with tap_by_tap: what a tap outside the image reads, c_in floats, else NULL
};

// Tap rows that one call of a microkernel may be given.
constexpr int MAX_SEGMENTS = 64;
// Multiply-adds a unit should have: about 30 microseconds, so that two threads balance and a parallel region pays.
constexpr int64_t UNIT_MACS = 1500000;
// Pixels a unit should have: the corner and edge classes of small images fill their tiles only across several images.
constexpr int64_t UNIT_PIXELS = 384;
// Units a layer of few pixels should have. Of one image, or one vector of them, rows are shared out first, and strips only where the
// weights weigh more than this many times the input: threads that share rows read all weights, from L3; threads that share strips read
// all of the input, half of which another core has just written, and that is several times slower.
constexpr int64_t WANTED_UNITS = 8, WANTED_ROW_UNITS = 4, ROW_SPLIT_SHARE = 4, ROW_SPLIT_TILES = 3;
// Strips a unit should have at least, to share each tile's input while it is in L1.
constexpr int64_t UNIT_STRIPS = 4;
// Tap by tap wins where the classes of pixels are too small to fill tiles and a strip has enough entries to outweigh the pointers that
// change at every tap.
constexpr int64_t TAP_BY_TAP_MAX_PIXELS = 48, TAP_BY_TAP_MAX_TAPS = 25, TAP_BY_TAP_MIN_ENTRIES = 4;
// Floats of scratch a pooled unit may use: half of a 512 KB L2.
constexpr int64_t SCRATCH_FLOATS = 64 * 1024;

// Offsets of all entries from tap (0, 0) of their pixel, in elements of x.
inline void entry_offsets(const SlimConv2dF32& a, int32_t* offsets) {
  const int64_t taps = (int64_t)a.r * a.s, strips = ceil_div(a.c_out, a.strip);
  for (int64_t k = 0; k < strips; ++k)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t shift = (tap / a.s * a.dil_h * a.w + tap % a.s * a.dil_w) * a.c_in;
      const int32_t end = a.tap_ptr[k * taps + tap + 1];
      for (int32_t e = a.tap_ptr[k * taps + tap]; e < end; ++e) offsets[e] = (int32_t)((a.channels[e] + shift) * a.lanes);
    }
  for (int64_t e = a.tap_ptr[strips * taps], i = 0; i < SLIM_OFFSETS_MARGIN; ++i) offsets[e + i] = 0;
}

// Fills in a plan for `a` with the tiles that take its strips; false when memory ran out.
inline bool make_plan(Plan& plan, const SlimConv2dF32& a) {
  plan.a = &a;
  plan.lanes = a.lanes;
  plan.images = ceil_div(a.n, a.lanes);
  plan.taps = (int64_t)a.r * a.s;
  plan.strips = ceil_div(a.c_out, a.strip);
  plan.rows = a.pool ? a.p / 2 * 2 : a.p;
  plan.columns = a.pool ? a.q / 2 * 2 : a.q;
  const int64_t entries = a.tap_ptr[plan.strips * plan.taps];
  const bool few_pixels = plan.images * plan.rows * plan.columns <= TAP_BY_TAP_MAX_PIXELS;
  const bool many_entries = entries >= TAP_BY_TAP_MIN_ENTRIES * plan.strips * plan.taps;
  plan.tap_by_tap = plan.taps > 1 && plan.taps <= TAP_BY_TAP_MAX_TAPS && a.lanes == 1 && few_pixels && many_entries;

  const int64_t even = a.pool ? 2 : 1;
  const int64_t pixels = plan.rows * plan.columns;
  const int64_t strip_macs = max64(1, entries / plan.strips * a.strip) * a.lanes;  // of one pixel
  const int64_t unit_pixels = max64(a.lanes == 1 ? 1 : plan.tiles.mr, UNIT_PIXELS / a.lanes);
  plan.image_step = min64(plan.images, ceil_div(unit_pixels, pixels));
  plan.row_step = plan.rows;
  if (plan.image_step == 1 && pixels > 2 * unit_pixels) {
    const int64_t row_macs = strip_macs * plan.strips * plan.columns;
    const int64_t row_count = max64(ceil_div(unit_pixels, plan.columns), ceil_div(UNIT_MACS, row_macs));
    plan.row_step = min64(plan.rows, ceil_div(row_count, 2) * 2);
  }
  const int64_t x_bytes = 4 * a.h * a.w * a.c_in * a.lanes, weight_bytes = 4 * entries * (a.strip + 1);
  if (plan.images == 1 && ceil_div(plan.rows, plan.row_step) < WANTED_UNITS && weight_bytes < ROW_SPLIT_SHARE * x_bytes) {
    const int64_t least = ceil_div(ROW_SPLIT_TILES * plan.tiles.mr, plan.columns);
    plan.row_step = min64(plan.row_step, ceil_div(max64(least, ceil_div(plan.rows, WANTED_ROW_UNITS)), even) * even);
  }
  if (a.pool) {
    const int64_t row_floats = plan.columns * a.c_out * a.lanes;
    plan.row_step = max64(even, min64(plan.row_step, SCRATCH_FLOATS / row_floats / 2 * 2));
    plan.image_step = max64(1, min64(plan.image_step, SCRATCH_FLOATS / (row_floats * plan.row_step)));
  }
  plan.image_units = ceil_div(plan.images, plan.image_step);
  plan.row_units = ceil_div(plan.rows, plan.row_step);
  const int64_t unit_strip_macs = strip_macs * plan.image_step * plan.row_step * plan.columns;
  plan.strip_step = min64(plan.strips, max64(UNIT_STRIPS, ceil_div(UNIT_MACS, unit_strip_macs)));
  // Few pixels: as many units as keep the threads busy, unless the whole layer is too small to share.
  const int64_t pixel_units = plan.image_units * plan.row_units;
  const int64_t wanted_units = unit_strip_macs * plan.strips * pixel_units < UNIT_MACS / 8 ? 1 : WANTED_UNITS;
  if (pixel_units * ceil_div(plan.strips, plan.strip_step) < wanted_units)
    plan.strip_step = ceil_div(plan.strips, min64(plan.strips, ceil_div(wanted_units, pixel_units)));
  plan.strip_units = ceil_div(plan.strips, plan.strip_step);
  plan.units = plan.image_units * plan.row_units * plan.strip_units;
  plan.macs = strip_macs * plan.strips * plan.images * pixels;
  plan.scratch_floats =
      a.pool ? plan.image_step * plan.row_step * plan.columns * min64(plan.strip_step * a.strip, a.c_out) * a.lanes : 0;

  const bool channels_suffice = a.lanes == 1 && (plan.taps == 1 || plan.tap_by_tap);
  plan.own_offsets = nullptr;
  plan.zeros = nullptr;
  if (plan.tap_by_tap) {
    plan.zeros = (float*)calloc((size_t)a.c_in, sizeof(float));
    if (plan.zeros == nullptr) return false;
  }
  plan.offsets = channels_suffice ? a.channels : a.offsets;
  if (plan.offsets == nullptr) {
    plan.own_offsets = (int32_t*)malloc(sizeof(int32_t) * (size_t)(entries + SLIM_OFFSETS_MARGIN));
    if (plan.own_offsets == nullptr) return false;
    entry_offsets(a, plan.own_offsets);
    plan.offsets = plan.own_offsets;
  }
  return true;
}
