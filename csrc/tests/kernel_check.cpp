// Checks every CPU kernel of csrc/kernels.h, in both layouts and in pairs, against sums in double precision, without
// Python or torch, so that it runs under sanitizers and in an emulator. Prints one line per instruction set and one per
// engine of steps in pairs; exit status 1 on a mismatch, 2 on a bad option.
//
//   kernel_check [--isa scalar|avx2|avx512] [--engine scalar|avx512bf16|amx] [--cases N] [--max-threads N]
//
// With --isa or --engine just what they name is checked. Engines run the same under every instruction set's entry
// point, and take one of those that this machine has, or the named one.
//
// Inputs are heap blocks of exact size (AddressSanitizer sees one element too many), the output lies between guard
// zones and is pre-filled with a pattern that must be gone afterwards.
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "cpu/pairs_engine.h"
#include "kernels.h"

#ifndef SLIM_HAVE_AVX2
#define SLIM_HAVE_AVX2 1
#endif
#ifndef SLIM_HAVE_AVX512
#define SLIM_HAVE_AVX512 1
#endif

namespace {

constexpr uint32_t kUnwritten = 0x7fc0dead;  // a quiet NaN no kernel produces
constexpr int64_t kGuard = 64;               // floats on both sides of y: one AVX-512 tile row of 64 bytes is 16

struct Rng {  // splitmix64
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
  int64_t range(int64_t lo, int64_t hi) { return lo + below(hi - lo + 1); }
  bool chance(int percent) { return below(100) < percent; }
  float value() { return float(double(next() >> 11) * 0x1p-52 - 1.0); }  // [-1, 1)
  template <size_t N>
  int64_t pick(const int64_t (&list)[N]) {
    return list[below(N)];
  }
};

// A heap block of exactly the asked size; `shift` elements are left unused at the front, to take the alignment away.
template <typename T>
struct Block {
  T* base;
  T* data;
  Block(int64_t count, int64_t shift = 0)
      : base(static_cast<T*>(malloc(size_t(count + shift > 0 ? count + shift : 1) * sizeof(T)))), data(base + shift) {
    if (base == nullptr) abort();
  }
  ~Block() { free(base); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

struct Isa {
  const char* name;
  int (*run)(const SlimStepF32*, int64_t, int32_t);
  int (*weight_gradient)(const SlimWeightGradientF32*, int32_t);
  int (*batch_norm)(const SlimBatchNormF32*, int32_t);
  int32_t lanes;  // of images innermost
  bool supported;
};

struct Tally {
  long cases = 0, outputs = 0, failures = 0;
  double worst = 0.0;  // largest error as a share of its bound
};

double maximum(double a, double b) { return isnan(a) || a > b ? a : b; }  // NaN stays

// The definition in kernels.h, term by term in double; `scale` sums the magnitudes for the rounding bound.
double output(const SlimConv2dF32& a, int64_t n, int64_t p, int64_t q, int64_t o, double* scale, long* terms) {
  const int64_t taps = int64_t(a.r) * a.s, strip = o / a.strip, lane = o % a.strip;
  double sum = a.bias != nullptr ? double(a.bias[o]) : 0.0;
  *scale = fabs(sum);
  *terms = 1;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t iy = p * a.stride_h - a.pad_h + tap / a.s * a.dil_h;
    const int64_t ix = q * a.stride_w - a.pad_w + tap % a.s * a.dil_w;
    if (iy < 0 || iy >= a.h || ix < 0 || ix >= a.w) continue;
    for (int32_t e = a.tap_ptr[strip * taps + tap]; e < a.tap_ptr[strip * taps + tap + 1]; ++e) {
      for (int32_t k = 0; k < a.depth; ++k) {
        const double term = double(a.weights[int64_t(e) * a.strip * a.depth + (a.depth > 1 ? k : lane)]) *
                            double(a.x[((n * a.h + iy) * a.w + ix) * a.c_in + a.channels[e] + k]);
        sum += term;
        *scale += fabs(term);
        ++*terms;
      }
    }
  }
  if (a.residual != nullptr) {
    const double term = a.residual[((n * a.p + p) * a.q + q) * a.c_out + o];
    sum += term;
    *scale += fabs(term);
    ++*terms;
  }
  return a.relu && sum < 0.0 ? 0.0 : sum;
}

// `k` additions and multiplications in fp32, in any order, fused or not, stay within k 2^-24 of the summed magnitudes
// (Higham, Accuracy and Stability, section 3.1); one more term each for products and the final rounding, and DBL noise.
double bound(double scale, long terms) { return double(terms + 3) * 0x1p-24 * scale * 1.01 + FLT_MIN; }

void describe(const char* isa, const SlimConv2dF32& a) {
  printf(
      "  %s: n=%ld h=%ld w=%ld c_in=%ld c_out=%ld p=%ld q=%ld r=%d s=%d stride=%d,%d pad=%d,%d dil=%d,%d "
      "strip=%d depth=%d relu=%d pool=%d bias=%d residual=%d\n",
      isa, long(a.n), long(a.h), long(a.w), long(a.c_in), long(a.c_out), long(a.p), long(a.q), a.r, a.s, a.stride_h,
      a.stride_w, a.pad_h, a.pad_w, a.dil_h, a.dil_w, a.strip, a.depth, a.relu, a.pool, a.bias != nullptr,
      a.residual != nullptr);
}

// How a problem is run.
struct Way {
  bool images;   // innermost, between two layout steps
  bool parts;    // of images, where they fit
  bool offsets;  // given, or computed in the call
  int32_t slot, threads;
  int64_t y_shift;
};

// Cuts images into as many parts as fit a vector and their sizes. Nothing changes where none do.
void cut_into_parts(SlimConv2dF32* a) {
  if (a->strip != 1 || a->p * a->stride_h != a->h || a->q * a->stride_w != a->w) return;
  const int64_t at_border = a->pool ? 2 : 1;
  int32_t parts_h = 1, parts_w = 1;
  for (int32_t rows = 1; rows <= a->lanes && a->p % (rows * at_border) == 0; rows *= 2) {
    for (int32_t columns = 1; rows * columns <= a->lanes && a->q % (columns * at_border) == 0; columns *= 2) {
      // The most parts, and of those cuts the one nearest to a square.
      const int32_t more = rows * columns - parts_h * parts_w, longest = rows > columns ? rows : columns;
      if (more < 0 || (more == 0 && longest >= (parts_h > parts_w ? parts_h : parts_w))) continue;
      parts_h = rows;
      parts_w = columns;
    }
  }
  a->parts_h = parts_h;
  a->parts_w = parts_w;
  a->n *= parts_h * parts_w;
  a->h /= parts_h;
  a->p /= parts_h;
  a->w /= parts_w;
  a->q /= parts_w;
}

int run(const Isa& isa, SlimConv2dF32 a, const Way& way) {
  a.lanes = way.images ? isa.lanes : 1;
  if (way.images && way.parts) cut_into_parts(&a);
  Block<int32_t> offsets(slim_entry_offsets_count(&a));
  if (way.offsets) {
    slim_entry_offsets(&a, offsets.data);
    a.offsets = offsets.data;
  }
  if (!way.images) {
    const SlimStepF32 step = {SLIM_STEP_CONV2D, way.slot, a};
    return isa.run(&step, 1, way.threads);
  }
  const int64_t groups = (a.n + a.lanes - 1) / a.lanes;
  const int64_t out_h = a.pool ? a.p / 2 : a.p, out_w = a.pool ? a.q / 2 : a.q;
  // Vectors are read and written whole and unaligned.
  const int64_t outputs = groups * out_h * out_w * a.c_out * a.lanes;
  Block<float> x(groups * a.h * a.w * a.c_in * a.lanes, 1), y(outputs, 3), residual(outputs, 2);
  SlimStepF32 steps[4];
  memset(steps, 0, sizeof steps);
  steps[0] = {SLIM_STEP_TO_IMAGES, way.slot, a};
  steps[0].conv.y = x.data;
  steps[1] = {SLIM_STEP_CONV2D, way.slot, a};
  steps[1].conv.x = x.data;
  steps[1].conv.y = y.data;
  steps[2] = {SLIM_STEP_FROM_IMAGES, way.slot, a};
  steps[2].conv.x = y.data;
  steps[2].conv.h = out_h;
  steps[2].conv.w = out_w;
  steps[2].conv.c_in = a.c_out;
  if (a.residual == nullptr) return isa.run(steps, 3, way.threads);
  steps[1].conv.residual = residual.data;
  steps[3] = {SLIM_STEP_TO_IMAGES, way.slot, a};
  steps[3].conv.x = a.residual;
  steps[3].conv.y = residual.data;
  steps[3].conv.h = out_h;
  steps[3].conv.w = out_w;
  steps[3].conv.c_in = a.c_out;
  const SlimStepF32 in_order[] = {steps[3], steps[0], steps[1], steps[2]};
  return isa.run(in_order, 4, way.threads);
}

// Runs one problem and compares every output and both guard zones.
void check(const Isa& isa, SlimConv2dF32 a, const Way& way, Tally* tally) {
  const int64_t out_h = a.pool ? a.p / 2 : a.p, out_w = a.pool ? a.q / 2 : a.q;
  const int64_t count = a.n * out_h * out_w * a.c_out;
  Block<uint32_t> y(count + 2 * kGuard, way.y_shift);
  for (int64_t i = 0; i < count + 2 * kGuard; ++i) y.data[i] = kUnwritten;
  a.y = reinterpret_cast<float*>(y.data + kGuard);
  const long before = tally->failures;
  const int status = run(isa, a, way);
  if (status != SLIM_OK) {
    printf("  status %d\n", status);
    ++tally->failures;
  }
  for (int64_t i = 0; i < kGuard; ++i) {
    if (y.data[i] != kUnwritten || y.data[kGuard + count + i] != kUnwritten) {
      printf("  wrote outside y, %ld floats from its %s\n", long(y.data[i] != kUnwritten ? kGuard - i : i + 1),
             y.data[i] != kUnwritten ? "start" : "end");
      ++tally->failures;
      break;
    }
  }
  for (int64_t i = 0; status == SLIM_OK && i < count; ++i) {
    const int64_t o = i % a.c_out, pixel = i / a.c_out;
    const int64_t q = pixel % out_w, p = pixel / out_w % out_h, n = pixel / out_w / out_h;
    double want, limit = 0.0, scale;
    long terms;
    if (a.pool) {
      want = -INFINITY;
      for (int64_t k = 0; k < 4; ++k) {
        want = maximum(output(a, n, 2 * p + k / 2, 2 * q + k % 2, o, &scale, &terms), want);
        limit = fmax(limit, bound(scale, terms));
      }
    } else {
      want = output(a, n, p, q, o, &scale, &terms);
      limit = bound(scale, terms);
    }
    const float got = a.y[i];
    const bool unwritten = y.data[kGuard + i] == kUnwritten;
    const double error = fabs(double(got) - want);
    const bool match = isnan(want) ? isnan(got) : isinf(want) ? double(got) == want : error <= limit;
    if (!unwritten && match) {
      if (isfinite(want) && error / limit > tally->worst) tally->worst = error / limit;
      continue;
    }
    if (tally->failures++ == before) {
      if (unwritten) {
        printf("  y[%ld,%ld,%ld,%ld] was not written\n", long(n), long(p), long(q), long(o));
      } else {
        printf("  y[%ld,%ld,%ld,%ld] = %.9g, expected %.9g within %.3g\n", long(n), long(p), long(q), long(o),
               double(got), want, limit);
      }
    }
  }
  if (tally->failures != before) {
    describe(isa.name, a);
    printf("  images innermost %d, in parts %d, offsets given %d, slot %d, %d threads\n", way.images, way.parts,
           way.offsets, way.slot, way.threads);
  }
  ++tally->cases;
  tally->outputs += count;
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dil) {
  const int64_t reach = size + 2 * pad - dil * (kernel - 1) - 1;
  return reach < 0 ? 0 : reach / stride + 1;
}

// One random problem: the same one for every instruction set, since it depends on its number alone.
void run_case(const Isa& isa, long number, int max_threads, Tally* tally) {
  Rng rng{uint64_t(number) * 0x632be59bd9b4e019u + 1};
  static const int64_t kSizes[] = {1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 13, 16, 17};
  static const int64_t kKernels[] = {1, 1, 2, 3, 3, 3, 3, 5};
  static const int64_t kStrips[] = {8, 16, 24, 32}, kNarrow[] = {1, 1, 2, 4};
  static const int64_t kChannels[] = {1, 2, 3, 7, 8, 9, 16, 24, 31, 32, 33, 64, 96};
  SlimConv2dF32 a;
  memset(&a, 0, sizeof a);
  a.parts_h = a.parts_w = 1;
  const bool linear = rng.chance(15), large = number % 97 == 96;
  const bool parts = !linear && !large && rng.chance(15);  // of images, whose sizes have to fit
  static const int64_t kEvenSizes[] = {2, 4, 4, 8, 8, 12, 16};
  do {
    a.h = linear ? 1 : large ? 32 : rng.pick(kSizes);
    a.w = linear ? 1 : large ? 32 : rng.chance(70) ? a.h : rng.pick(kSizes);
    a.r = linear ? 1 : int32_t(rng.pick(kKernels));
    a.s = linear ? 1 : rng.chance(80) ? a.r : int32_t(rng.pick(kKernels));
    a.stride_h = rng.chance(75) ? 1 : int32_t(rng.range(1, 3));
    a.stride_w = rng.chance(75) ? a.stride_h : int32_t(rng.range(1, 3));
    a.dil_h = rng.chance(80) ? 1 : int32_t(rng.range(1, 3));
    a.dil_w = rng.chance(80) ? a.dil_h : int32_t(rng.range(1, 3));
    a.pad_h = linear ? 0 : rng.chance(60) ? (a.r - 1) / 2 * a.dil_h : int32_t(rng.range(0, 4));
    a.pad_w = linear ? 0 : rng.chance(60) ? (a.s - 1) / 2 * a.dil_w : int32_t(rng.range(0, 4));
    if (parts) {
      a.h = rng.pick(kEvenSizes);
      a.w = rng.pick(kEvenSizes);
      a.stride_h = a.stride_w = 1;
      a.pad_h = (a.r - 1) / 2 * a.dil_h;
      a.pad_w = (a.s - 1) / 2 * a.dil_w;
    }
    a.p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h);
    a.q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  } while (a.p < 1 || a.q < 1);
  a.n = linear ? rng.range(1, 70) : rng.range(1, 20);
  a.c_in = large ? 64 : rng.pick(kChannels);
  a.c_out = rng.chance(50) ? rng.pick(kChannels) : rng.range(1, 70);
  const bool images = parts || rng.chance(50);
  a.strip = int32_t(images && rng.chance(60) ? rng.pick(kNarrow) : rng.pick(kStrips));
  a.depth = images || a.c_in < 8 || rng.chance(60) ? 1 : a.c_in < 16 || rng.chance(50) ? 8 : 16;
  if (a.depth > 1) a.strip = 1;
  if (parts) a.strip = 1;
  a.relu = rng.chance(50);
  a.pool = a.depth == 1 && a.p >= 2 && a.q >= 2 && rng.chance(35);

  // Density 0 leaves whole strips, and whole taps, without entries.
  const int64_t strips = (a.c_out + a.strip - 1) / a.strip, taps = int64_t(a.r) * a.s;
  static const int64_t kDensities[] = {0, 5, 12, 12, 25, 50, 100};
  std::vector<int32_t> channels, tap_ptr{0};
  std::vector<int64_t> lanes;  // per entry, how many channels of its strip exist
  for (int64_t i = 0; i < strips; ++i) {
    const int density = int(large ? 12 : rng.pick(kDensities));
    for (int64_t tap = 0; tap < taps; ++tap) {
      const bool empty = rng.chance(15);
      for (int32_t c = 0; c <= a.c_in - a.depth && !empty; ++c) {
        if (!rng.chance(density)) continue;
        channels.push_back(c);
        lanes.push_back(a.c_out - i * a.strip);
      }
      tap_ptr.push_back(int32_t(channels.size()));
    }
  }
  const int64_t entries = int64_t(channels.size());
  const double work = double(a.p * a.q) * double(entries) * a.strip * a.depth;
  const double limit = large ? 1e7 : 4e5;  // multiply-adds of the double reference
  while (a.n > 1 && double(a.n) * work > limit) a.n = (a.n + 1) / 2;

  const int64_t shift = rng.range(0, 3);
  Block<float> x(a.n * a.h * a.w * a.c_in, shift);
  const int64_t entry_weights = int64_t(a.strip) * a.depth;
  Block<float> weights(entries * entry_weights, rng.range(0, 3)), bias(a.c_out, rng.range(0, 3));
  Block<float> residual(a.n * a.p * a.q * a.c_out, rng.range(0, 3));
  Block<int32_t> channel_block(entries), tap_block(int64_t(tap_ptr.size()));
  for (int64_t i = 0; i < a.n * a.h * a.w * a.c_in; ++i) x.data[i] = rng.value();
  for (int64_t i = 0; i < entries * entry_weights; ++i) {
    const bool beyond = a.depth == 1 && i % a.strip >= lanes[size_t(i / a.strip)];
    weights.data[i] = beyond || rng.chance(10) ? 0.0f : rng.value();
  }
  for (int64_t i = 0; i < a.c_out; ++i) bias.data[i] = rng.value();
  for (int64_t i = 0; i < a.n * a.p * a.q * a.c_out; ++i) residual.data[i] = rng.value();
  if (rng.chance(20)) {  // non-finite inputs reach the outputs that read them, and no others
    static const float kSpecial[] = {NAN, INFINITY, -INFINITY};
    for (int k = 0; k < 3; ++k) x.data[rng.below(a.n * a.h * a.w * a.c_in)] = kSpecial[rng.below(3)];
  }
  if (entries > 0) memcpy(channel_block.data, channels.data(), size_t(entries) * sizeof(int32_t));
  memcpy(tap_block.data, tap_ptr.data(), tap_ptr.size() * sizeof(int32_t));
  a.x = x.data;
  a.bias = rng.chance(70) ? bias.data : nullptr;
  a.residual = !a.pool && rng.chance(40) ? residual.data : nullptr;
  a.weights = weights.data;
  a.channels = channel_block.data;
  a.tap_ptr = tap_block.data;
  static const int64_t kThreads[] = {1, 1, 2, 3};
  Way way;
  way.threads = int32_t(rng.pick(kThreads));
  if (way.threads > max_threads) way.threads = max_threads;
  way.images = images;
  way.offsets = rng.chance(50);
  way.slot = rng.chance(30) ? int32_t(rng.below(4)) : -1;
  way.y_shift = rng.range(0, 3);
  way.parts = parts || rng.chance(50);
  check(isa, a, way, tally);
}

// One random weight gradient: the same one for every instruction set.
void run_gradient_case(const Isa& isa, long number, int max_threads, Tally* tally) {
  Rng rng{uint64_t(number) * 0x2545f4914f6cdd1du + 7};
  static const int64_t kSizes[] = {1, 1, 2, 3, 4, 5, 8, 13, 16}, kKernels[] = {1, 1, 2, 3, 3, 3, 5};
  static const int64_t kBlockOut[] = {8, 16, 16, 24, 32}, kBlockIn[] = {1, 1, 2, 4, 8, 16};
  SlimWeightGradientF32 a;
  memset(&a, 0, sizeof a);
  const bool large = number % 97 == 96;  // several chunks of rows, and parts
  do {
    a.h = large ? 33 : rng.pick(kSizes);
    a.w = large ? 40 : rng.chance(60) ? a.h : rng.pick(kSizes);
    a.r = int32_t(rng.pick(kKernels));
    a.s = rng.chance(80) ? a.r : int32_t(rng.pick(kKernels));
    a.stride_h = rng.chance(70) ? 1 : int32_t(rng.range(1, 3));
    a.stride_w = rng.chance(70) ? a.stride_h : int32_t(rng.range(1, 3));
    a.dil_h = rng.chance(80) ? 1 : int32_t(rng.range(1, 3));
    a.dil_w = rng.chance(80) ? a.dil_h : int32_t(rng.range(1, 3));
    a.pad_h = rng.chance(60) ? (a.r - 1) / 2 * a.dil_h : int32_t(rng.range(0, 6));
    a.pad_w = rng.chance(60) ? (a.s - 1) / 2 * a.dil_w : int32_t(rng.range(0, 6));
    a.p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h);
    a.q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  } while (a.p < 1 || a.q < 1);
  a.n = a.h * a.w == 1 ? rng.range(1, 600) : rng.range(1, 20);
  a.c_in = rng.range(1, 40);
  a.c_out = rng.range(1, 50);
  a.block_out = int32_t(rng.pick(kBlockOut));
  a.block_in = int32_t(rng.pick(kBlockIn));
  const int64_t rows = (a.c_out + a.block_out - 1) / a.block_out, groups = (a.c_in + a.block_in - 1) / a.block_in;
  static const int64_t kDensities[] = {0, 5, 12, 25, 50, 100};
  std::vector<int32_t> crow{0}, columns;
  for (int64_t row = 0; row < rows; ++row) {
    const int density = int(rng.pick(kDensities));
    for (int64_t column = 0; column < a.r * a.s * groups; ++column) {
      if (rng.chance(density)) columns.push_back(int32_t(column));
    }
    crow.push_back(int32_t(columns.size()));
  }
  const int64_t blocks = int64_t(columns.size()), size = int64_t(a.block_out) * a.block_in;
  const double work = double(a.p * a.q) * double(blocks) * double(size);
  while (a.n > 1 && double(a.n) * work > 4e5) a.n = (a.n + 1) / 2;

  Block<float> x(a.n * a.h * a.w * a.c_in, rng.range(0, 3)), grad(a.n * a.p * a.q * a.c_out, rng.range(0, 3));
  Block<int32_t> crow_block(int64_t(crow.size())), column_block(blocks);
  Block<uint32_t> out(blocks * size + 2 * kGuard, rng.range(0, 3));
  for (int64_t i = 0; i < a.n * a.h * a.w * a.c_in; ++i) x.data[i] = rng.value();
  for (int64_t i = 0; i < a.n * a.p * a.q * a.c_out; ++i) grad.data[i] = rng.value();
  if (rng.chance(20)) x.data[rng.below(a.n * a.h * a.w * a.c_in)] = INFINITY;
  if (rng.chance(20)) grad.data[rng.below(a.n * a.p * a.q * a.c_out)] = NAN;
  memcpy(crow_block.data, crow.data(), crow.size() * sizeof(int32_t));
  if (blocks > 0) memcpy(column_block.data, columns.data(), size_t(blocks) * sizeof(int32_t));
  for (int64_t i = 0; i < blocks * size + 2 * kGuard; ++i) out.data[i] = kUnwritten;
  a.x = x.data;
  a.grad = grad.data;
  a.values_grad = reinterpret_cast<float*>(out.data + kGuard);
  a.crow_indices = crow_block.data;
  a.col_indices = column_block.data;
  const int32_t threads = int32_t(rng.range(1, max_threads));
  const long before = tally->failures;
  if (isa.weight_gradient(&a, threads) != SLIM_OK) ++tally->failures;
  for (int64_t i = 0; i < kGuard; ++i) {
    if (out.data[i] != kUnwritten || out.data[kGuard + blocks * size + i] != kUnwritten) ++tally->failures;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = crow[size_t(row)] * size; i < crow[size_t(row) + 1] * size; ++i) {
      const int64_t column = columns[size_t(i / size)], tap = column / groups;
      const int64_t o = row * a.block_out + i % size / a.block_in, c = column % groups * a.block_in + i % a.block_in;
      double want = 0.0, scale = 0.0;
      long terms = 1;
      for (int64_t pixel = 0; o < a.c_out && c < a.c_in && pixel < a.n * a.p * a.q; ++pixel) {
        const int64_t q = pixel % a.q, p = pixel / a.q % a.p, n = pixel / a.q / a.p;
        const int64_t iy = p * a.stride_h - a.pad_h + tap / a.s * a.dil_h;
        const int64_t ix = q * a.stride_w - a.pad_w + tap % a.s * a.dil_w;
        if (iy < 0 || iy >= a.h || ix < 0 || ix >= a.w) continue;
        const double term = double(a.grad[pixel * a.c_out + o]) * double(a.x[((n * a.h + iy) * a.w + ix) * a.c_in + c]);
        want += term;
        scale += fabs(term);
        ++terms;
      }
      const double got = a.values_grad[i], limit = bound(scale, terms), error = fabs(got - want);
      const bool match = isnan(want) ? isnan(got) : isinf(want) ? got == want : error <= limit;
      if (out.data[kGuard + i] != kUnwritten && match) {
        if (isfinite(want) && error / limit > tally->worst) tally->worst = error / limit;
      } else if (tally->failures++ == before) {
        printf("  values_grad[%ld] = %.9g, expected %.9g within %.3g\n", long(i), got, want, limit);
      }
    }
  }
  if (tally->failures != before) {
    printf(
        "  %s: weight gradient, n=%ld h=%ld w=%ld c_in=%ld c_out=%ld p=%ld q=%ld r=%d s=%d stride=%d,%d pad=%d,%d "
        "dil=%d,%d block=%d,%d, %ld blocks, %d threads\n",
        isa.name, long(a.n), long(a.h), long(a.w), long(a.c_in), long(a.c_out), long(a.p), long(a.q), a.r, a.s,
        a.stride_h, a.stride_w, a.pad_h, a.pad_w, a.dil_h, a.dil_w, a.block_out, a.block_in, long(blocks), threads);
  }
  ++tally->cases;
  tally->outputs += blocks * size;
}

// One random batch norm, all four passes. Values are multiples of a power of two that float holds exactly whatever the
// order, so that the same pixels of a window are equal here and there, and results are compared bit by bit.
void run_norm_case(const Isa& isa, long number, int max_threads, Tally* tally) {
  Rng rng{uint64_t(number) * 0x2545f4914f6cdd1du + 11};
  static const int64_t kSizes[] = {1, 2, 2, 3, 4, 5, 8, 13};
  SlimBatchNormF32 a;
  memset(&a, 0, sizeof a);
  a.relu = rng.chance(70);
  a.pool = a.relu && rng.chance(60);
  do {
    a.h = rng.pick(kSizes);
    a.w = rng.chance(60) ? a.h : rng.pick(kSizes);
  } while (a.pool && (a.h < 2 || a.w < 2));
  a.c = rng.range(1, 70);
  a.n = rng.range(1, 1 + 60000 / (a.h * a.w * a.c));  // up to several parts
  const int64_t p = a.pool ? a.h / 2 : a.h, q = a.pool ? a.w / 2 : a.w;
  const int64_t size = a.n * a.h * a.w * a.c, outputs = a.n * p * q * a.c;
  const auto eighths = [&rng](int64_t most) { return float(rng.range(-most, most)) / 8.0f; };
  Block<float> x(size, rng.range(0, 3)), grad(outputs, rng.range(0, 3)), coefficients(5 * a.c, rng.range(0, 3));
  Block<uint32_t> y(outputs + 2 * kGuard, rng.range(0, 3)), dx(size + 2 * kGuard, rng.range(0, 3));
  Block<double> sums(6 * a.c);
  for (int64_t i = 0; i < size; ++i) x.data[i] = eighths(20);
  for (int64_t i = 0; i < outputs; ++i) grad.data[i] = eighths(8);
  for (int64_t i = 0; i < 5 * a.c; ++i) coefficients.data[i] = eighths(12);
  for (int64_t i = 0; i < outputs + 2 * kGuard; ++i) y.data[i] = kUnwritten;
  for (int64_t i = 0; i < size + 2 * kGuard; ++i) dx.data[i] = kUnwritten;
  const int32_t threads = int32_t(rng.range(1, max_threads));
  const long before = tally->failures;
  a.x = x.data;
  a.sums = sums.data;
  a.which = SLIM_NORM_MOMENTS;
  if (isa.batch_norm(&a, threads) != SLIM_OK) ++tally->failures;
  for (int64_t c = 0; c < a.c; ++c) {
    const double count = double(size / a.c);
    double mean = 0, square = 0;
    for (int64_t i = c; i < size; i += a.c) mean += x.data[i] / count;
    for (int64_t i = c; i < size; i += a.c) square += (x.data[i] - mean) * (x.data[i] - mean) / count;
    if (!(fabs(sums.data[c] - mean) <= 1e-6) || !(fabs(sums.data[a.c + c] - square) <= 1e-5 * square + 1e-12))
      ++tally->failures;
  }
  static const float kOdd[] = {NAN, INFINITY, -INFINITY};
  for (int64_t count = rng.chance(20) ? rng.range(1, 3) : 0; count > 0; --count)
    x.data[rng.below(size)] = kOdd[rng.below(3)];
  a.grad = grad.data;
  a.coefficients = coefficients.data;
  for (a.which = SLIM_NORM_OUTPUT; a.which <= SLIM_NORM_INPUT_GRADIENT; ++a.which) {
    a.sums = sums.data + 2 * a.c * (a.which - 1);
    a.y = reinterpret_cast<float*>((a.which == SLIM_NORM_OUTPUT ? y.data : dx.data) + kGuard);
    if (isa.batch_norm(&a, threads) != SLIM_OK) ++tally->failures;
  }
  for (int64_t i = 0; i < kGuard; ++i) {
    if (y.data[i] != kUnwritten || y.data[kGuard + outputs + i] != kUnwritten) ++tally->failures;
    if (dx.data[i] != kUnwritten || dx.data[kGuard + size + i] != kUnwritten) ++tally->failures;
  }
  const auto same = [](double got, double want) { return isnan(want) ? isnan(got) : got == want; };
  const float* const got_y = reinterpret_cast<float*>(y.data + kGuard);
  const float* const got_dx = reinterpret_cast<float*>(dx.data + kGuard);
  std::vector<float> own(size_t(a.n * a.h * a.w));  // the gradient of z, of one channel
  for (int64_t c = 0; c < a.c; ++c) {
    const float* const of = coefficients.data + c;
    const auto shifted = [&](int64_t pixel) { return x.data[pixel * a.c + c] + of[0]; };
    own.assign(own.size(), 0.0f);
    for (int64_t o = 0; o < a.n * p * q; ++o) {
      const int64_t image = o / q / p, row = o / q % p, column = o % q, step = a.pool ? 2 : 1;
      int64_t found = -1;
      float largest = 0;
      for (int64_t i = 0; i < step * step; ++i) {
        const int64_t pixel = (image * a.h + row * step + i / step) * a.w + column * step + i % step;
        const float z = shifted(pixel) * of[a.c] + of[2 * a.c];
        if (found >= 0 && !(z > largest) && !isnan(z)) continue;
        found = pixel;
        largest = z;
      }
      if (!same(got_y[o * a.c + c], a.relu && largest <= 0 ? 0.0f : largest)) ++tally->failures;
      if (!a.relu || !(largest <= 0)) own[size_t(found)] = grad.data[o * a.c + c];
    }
    double sum = 0, product = 0;
    for (int64_t pixel = 0; pixel < a.n * a.h * a.w; ++pixel) {
      const float g = own[size_t(pixel)];
      sum += g;
      if (g != 0) product += double(g) * double(shifted(pixel));
      const float want = g * of[a.c] + (shifted(pixel) * of[3 * a.c] + of[4 * a.c]);
      if (!same(got_dx[pixel * a.c + c], want)) ++tally->failures;
    }
    const double* const found = sums.data + 2 * a.c;
    // 0 times infinity: a kernel multiplies where the gradient is zero, too.
    const bool odd = isnan(found[a.c + c]);
    if (!same(found[c], sum) || !(same(found[a.c + c], product) || odd)) ++tally->failures;
  }
  if (tally->failures != before) {
    printf("  %s: batch norm, n=%ld h=%ld w=%ld c=%ld relu=%d pool=%d, %d threads\n", isa.name, long(a.n), long(a.h),
           long(a.w), long(a.c), a.relu, a.pool, threads);
  }
  ++tally->cases;
  tally->outputs += outputs + size;
}

// ---------------------------------------------------------------- steps in pairs

typedef uint16_t Bf16;

constexpr int64_t kImages = 16, kStrip = 16, kRows = 16;  // of a row, a strip and a group
constexpr int64_t kPair = 2 * kImages;                    // numbers of bf16 in a row
// As one float and as two numbers of bf16 a signaling NaN, which no kernel writes: arithmetic and rounding make it
// quiet.
constexpr uint32_t kUnwrittenPair = 0x7fad7fad;
constexpr Bf16 kNan = 0x7fc0;

struct Engine {
  const char* name;
  int32_t number;  // SLIM_ENGINE_*
};

// What runs the steps of an engine.
typedef std::vector<const Isa*> Isas;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The i-th number in memory that was allocated as another type.
template <typename T>
T number_at(const void* memory, int64_t i) {
  T v;
  memcpy(&v, static_cast<const char*>(memory) + i * int64_t(sizeof v), sizeof v);
  return v;
}

float float_of(Bf16 v) {
  const uint32_t bits = uint32_t(v) << 16;
  return number_at<float>(&bits, 0);
}

// To the nearest, ties to even. NaN becomes a quiet one.
Bf16 bf16_of(float v) {
  if (isnan(v)) return kNan;
  const uint32_t bits = number_at<uint32_t>(&v, 0), odd = bits >> 16 & 1;
  return Bf16((bits + 0x7fff + odd) >> 16);
}

// A heap block of exactly the asked size at a multiple of 64 bytes. Whatever lies in pairs is whole rows of 64 bytes.
template <typename T>
struct RowBlock {
  T* data;
  explicit RowBlock(int64_t count)
      : data(static_cast<T*>(aligned_alloc(64, size_t(count > 0 ? count : 64) * sizeof(T)))) {
    if (data == nullptr) abort();
  }
  ~RowBlock() { free(data); }
  RowBlock(const RowBlock&) = delete;
  RowBlock& operator=(const RowBlock&) = delete;
};

// The output of a step in pairs between its guard zones: 32-bit words, of a float or of two numbers of bf16.
struct PairsOutput {
  int64_t words;
  RowBlock<uint32_t> block;
  explicit PairsOutput(int64_t count) : words(count), block(count + 2 * kGuard) {
    for (int64_t i = 0; i < count + 2 * kGuard; ++i) block.data[i] = kUnwrittenPair;
  }
  const uint32_t* data() const { return block.data + kGuard; }
  float* y() { return reinterpret_cast<float*>(block.data + kGuard); }
  bool kept_inside() const {
    bool kept = true;
    for (int64_t i = 0; i < kGuard; ++i)
      kept = kept && block.data[i] == kUnwrittenPair && block.data[kGuard + words + i] == kUnwrittenPair;
    return kept;
  }
};

// An output and what it should be: between want - limit and want + limit, and then rounded where y is bf16.
struct Expected {
  double want, limit;
  bool to_floats;
};

// Rounding never changes the order of two numbers, so y lies between the rounded ends.
bool matches(const Expected& e, double got) {
  if (isnan(e.want)) return isnan(got);
  if (isinf(e.want)) return got == e.want;
  double low = e.want - e.limit, high = e.want + e.limit;
  if (!e.to_floats) {
    low = float_of(bf16_of(float(low)));
    high = float_of(bf16_of(float(high)));
  }
  return low <= got && got <= high;
}

// Compares channel c of lane `image` at a pixel of y, which has `channels` of them. The first failure of a case is
// printed.
void check_number(const uint32_t* y, int64_t pixel, int64_t channels, int64_t c, int64_t image, const Expected& e,
                  bool first, Tally* tally) {
  const int64_t row = e.to_floats ? pixel * channels + c : pixel * ceil_div(channels, 2) + c / 2;
  const int64_t word = row * kImages + image;
  const Bf16 half = number_at<Bf16>(y, 2 * word + c % 2);
  const double got = e.to_floats ? number_at<float>(y, word) : float_of(half);
  const bool unwritten = e.to_floats ? y[word] == kUnwrittenPair : half == Bf16(kUnwrittenPair);
  if (!unwritten && matches(e, got)) {
    const double share = fabs(got - e.want) / e.limit;
    if (e.to_floats && e.limit > 0.0 && isfinite(e.want) && share > tally->worst) tally->worst = share;
    return;
  }
  ++tally->failures;
  if (first && unwritten) {
    printf("  pixel %ld channel %ld lane %ld was not written\n", long(pixel), long(c), long(image));
  } else if (first) {
    printf("  pixel %ld channel %ld lane %ld = %.9g, expected %.9g within %.3g%s\n", long(pixel), long(c), long(image),
           got, e.want, e.limit, e.to_floats ? "" : " and the rounding to bf16");
  }
}

// One strip at one pixel of a group of images, before bias and residual.
struct StripSums {
  double sum[kStrip][kImages], scale[kStrip][kImages];
  long terms[kStrip];
};

// The definition in kernels.h, source by source in double. A stored column counts for all channels of its strip, so
// that NaN times a weight of zero is NaN there, and nowhere else.
void add_strip(const SlimConv2dF32& a, int64_t image_group, int64_t p, int64_t q, int64_t strip, StripSums* sums) {
  memset(sums, 0, sizeof *sums);
  const Bf16* const weights = reinterpret_cast<const Bf16*>(a.weights);
  for (int32_t g = a.tap_ptr[strip]; g < a.tap_ptr[strip + 1]; ++g) {
    const SlimPairsGroup& group = reinterpret_cast<const SlimPairsGroup*>(a.channels)[g];
    for (int64_t column = 0; column < 2 * group.rows; ++column) {
      const SlimPairsSource source = column % 2 == 0 ? group.row[column / 2].even : group.row[column / 2].odd;
      const int64_t iy = p * a.stride_h - a.pad_h + source.tap / a.s * a.dil_h;
      const int64_t ix = q * a.stride_w - a.pad_w + source.tap % a.s * a.dil_w;
      if (source.tap == SLIM_PAIRS_MAX_TAPS || iy < 0 || iy >= a.h || ix < 0 || ix >= a.w) continue;
      const int64_t pixel = (image_group * a.h + iy) * a.w + ix;
      const int64_t first = pixel * ceil_div(a.c_in, 2) * kPair + source.row / 2 + column % 2;
      double x[kImages];
      for (int64_t n = 0; n < kImages; ++n) x[n] = float_of(reinterpret_cast<const Bf16*>(a.x)[first + 2 * n]);
      for (int64_t o = 0; o < kStrip && strip * kStrip + o < a.c_out; ++o) {
        const double weight = float_of(weights[(g * kStrip + o) * 2 * kRows + column]);
        sums->terms[o] += weight != 0.0;
        for (int64_t n = 0; n < kImages; ++n) {
          sums->sum[o][n] += weight * x[n];
          sums->scale[o][n] += fabs(weight * x[n]);
        }
      }
    }
  }
}

// Compares all outputs of a convolution in pairs: all lanes are computed, also those beyond n.
void compare_conv(const SlimConv2dF32& a, const uint32_t* y, Tally* tally) {
  const int64_t out_h = a.pool ? a.p / 2 : a.p, out_w = a.pool ? a.q / 2 : a.q, window = a.pool ? 4 : 1;
  const int64_t pixels = ceil_div(a.n, kImages) * out_h * out_w;
  const long before = tally->failures;
  StripSums sums[4];
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t q = pixel % out_w, p = pixel / out_w % out_h, image_group = pixel / out_w / out_h;
    for (int64_t first = 0; first < a.c_out; first += kStrip) {
      for (int64_t k = 0; k < window; ++k) {
        const int64_t row = a.pool ? 2 * p + k / 2 : p, column = a.pool ? 2 * q + k % 2 : q;
        add_strip(a, image_group, row, column, first / kStrip, &sums[k]);
      }
      for (int64_t o = 0; o < kStrip && first + o < a.c_out; ++o) {
        const int64_t c = first + o;
        const double bias = a.bias != nullptr ? double(a.bias[c]) : 0.0;
        for (int64_t n = 0; n < kImages; ++n) {
          Expected e = {-INFINITY, 0.0, a.to_floats != 0};
          double residual = 0.0;
          if (a.residual != nullptr) {
            const int64_t at = (pixel * ceil_div(a.c_out, 2) + c / 2) * kPair + 2 * n + c % 2;
            residual = float_of(reinterpret_cast<const Bf16*>(a.residual)[at]);
          }
          for (int64_t k = 0; k < window; ++k) {
            e.want = maximum(sums[k].sum[o][n] + bias + residual, e.want);
            // Products that are zero because they are denormals stay below FLT_MIN each.
            const double denormals = double(sums[k].terms[o]) * FLT_MIN;
            const double limit = bound(sums[k].scale[o][n] + fabs(bias) + fabs(residual), sums[k].terms[o] + 2);
            if (isfinite(limit)) e.limit = fmax(e.limit, limit + denormals);
          }
          if (a.relu && e.want < 0.0) e.want = 0.0;
          check_number(y, pixel, a.c_out, c, n, e, tally->failures == before, tally);
        }
      }
    }
  }
  tally->outputs += pixels * a.c_out * kImages;
}

// The same of a copy into pairs, which rounds; lanes beyond n become zeros.
void compare_copy(const SlimConv2dF32& a, const void* y, Tally* tally) {
  const int64_t pixels = a.h * a.w, image_groups = ceil_div(a.n, kImages);
  const long before = tally->failures;
  for (int64_t pixel = 0; pixel < image_groups * pixels; ++pixel) {
    for (int64_t c = 0; c < a.c_in; ++c) {
      for (int64_t n = 0; n < kImages; ++n) {
        const int64_t image = pixel / pixels * kImages + n;
        const float from = image < a.n ? a.x[(image * pixels + pixel % pixels) * a.c_in + c] : 0.0f;
        const Expected e = {float_of(bf16_of(from)), 0.0, false};
        check_number(static_cast<const uint32_t*>(y), pixel, a.c_in, c, n, e, tally->failures == before, tally);
      }
    }
  }
  tally->outputs += image_groups * pixels * a.c_in * kImages;
}

// The same of a pooling in pairs.
void compare_pool(const SlimConv2dF32& a, int32_t kind, const uint32_t* y, Tally* tally) {
  const int64_t pixels = ceil_div(a.n, kImages) * a.p * a.q, pairs = ceil_div(a.c_in, 2);
  const bool max = kind == SLIM_STEP_PAIRS_MAX_POOL, padded = kind == SLIM_STEP_PAIRS_PADDED_AVERAGE_POOL;
  const long before = tally->failures;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t q = pixel % a.q, p = pixel / a.q % a.p, image_group = pixel / a.q / a.p;
    for (int64_t c = 0; c < a.c_in; ++c) {
      for (int64_t n = 0; n < kImages; ++n) {
        double largest = -INFINITY, sum = 0.0, scale = 0.0;
        long inside = 0;
        for (int64_t tap = 0; tap < int64_t(a.r) * a.s; ++tap) {
          const int64_t iy = p * a.stride_h - a.pad_h + tap / a.s * a.dil_h;
          const int64_t ix = q * a.stride_w - a.pad_w + tap % a.s * a.dil_w;
          if (iy < 0 || iy >= a.h || ix < 0 || ix >= a.w) continue;
          const int64_t row = ((image_group * a.h + iy) * a.w + ix) * pairs + c / 2;
          const double x = float_of(reinterpret_cast<const Bf16*>(a.x)[row * kPair + 2 * n + c % 2]);
          largest = maximum(x, largest);
          sum += x;
          scale += fabs(x);
          ++inside;
        }
        const double count = padded ? double(a.r) * a.s : double(inside > 0 ? inside : 1);
        const Expected e = {max ? largest : sum / count, max ? 0.0 : bound(scale / count, inside), a.to_floats != 0};
        check_number(y, pixel, a.c_in, c, n, e, tally->failures == before, tally);
      }
    }
  }
  tally->outputs += pixels * a.c_in * kImages;
}

// Numbers in pairs: every lane is finite. The odd half of the last pair of an odd number of channels, of which nothing
// is asked, is NaN, which must reach nothing.
void fill_pairs(Rng& rng, Bf16* x, int64_t pixels, int64_t channels) {
  const int64_t pairs = ceil_div(channels, 2);
  for (int64_t i = 0; i < pixels * pairs * kPair; ++i) {
    const bool exists = i / kPair % pairs * 2 + i % 2 < channels;
    x[i] = exists ? bf16_of(rng.value()) : kNan;
  }
}

// Where NaN and infinities go: a channel of a pixel of an image that exists.
struct Place {
  int64_t image, pixel, channel;
  Place(Rng& rng, const SlimConv2dF32& a)
      : image(rng.below(a.n)), pixel(rng.below(a.h * a.w)), channel(rng.below(a.c_in)) {}
  int64_t channels_last(const SlimConv2dF32& a) const { return (image * a.h * a.w + pixel) * a.c_in + channel; }
  int64_t in_pairs(const SlimConv2dF32& a) const {
    const int64_t row = (image / kImages * a.h * a.w + pixel) * ceil_div(a.c_in, 2) + channel / 2;
    return row * kPair + 2 * (image % kImages) + channel % 2;
  }
};

float special(Rng& rng) {
  static const float kSpecial[] = {NAN, INFINITY, -INFINITY};
  return kSpecial[rng.below(3)];
}

// One group of `taps` taps and `channels` input channels, of a kind that these have.
SlimPairsGroup random_group(Rng& rng, int64_t taps, int64_t channels) {
  const int64_t whole_pairs = channels / 2;
  SlimPairsGroup group;
  memset(&group, 0x7f, sizeof group);  // rows that the group lacks are not read
  group.kind = SLIM_GROUP_MIXED;
  if (whole_pairs >= 1 && rng.chance(30)) group.kind = SLIM_GROUP_WHOLE;
  if (whole_pairs >= kRows && rng.chance(40)) group.kind = SLIM_GROUP_DIRECT;
  group.rows = int32_t(group.kind == SLIM_GROUP_DIRECT || rng.chance(40) ? kRows : rng.range(1, kRows));
  group.taps = 0;
  const SlimPairsSource none = {SLIM_PAIRS_MAX_TAPS, 0};
  const auto pair = [&](int64_t tap, int64_t number) { return SlimPairsSource{int32_t(tap), int32_t(number * 64)}; };
  // Any channel in an even (0) or an odd (1) place; in half of the groups one that lies in such a place in its pair.
  const bool in_place = rng.chance(50);
  const auto single = [&](int64_t place) {
    int64_t c = rng.below(channels);
    if (in_place && c % 2 != place) c = c % 2 == 1 ? c - 1 : c + 1 < channels ? c + 1 : c;
    return SlimPairsSource{int32_t(rng.below(taps)), int32_t(c / 2 * 64 + 2 * (c % 2 - place))};
  };
  const int64_t tap = rng.below(taps), first = rng.below(whole_pairs >= kRows ? whole_pairs - kRows + 1 : 1);
  for (int32_t r = 0; r < group.rows; ++r) {
    SlimPairsRow& row = group.row[r];
    if (group.kind == SLIM_GROUP_MIXED || group.kind == SLIM_GROUP_SHIFTED) {
      row.even = rng.chance(10) ? none : single(0);
      row.odd = rng.chance(20) ? none : single(1);
    } else if (group.kind == SLIM_GROUP_WHOLE) {
      row.even = row.odd = rng.chance(3) ? none : pair(rng.below(taps), rng.below(whole_pairs));
    } else {
      row.even = row.odd = pair(tap, first + r);
    }
    if (row.even.row % 64 != 0 || row.odd.row % 64 != 0) group.kind = SLIM_GROUP_SHIFTED;
    if (row.even.tap != SLIM_PAIRS_MAX_TAPS) group.taps |= uint64_t(1) << row.even.tap;
    if (row.odd.tap != SLIM_PAIRS_MAX_TAPS) group.taps |= uint64_t(1) << row.odd.tap;
  }
  return group;
}

void describe_pairs(const Engine& engine, const Isa& isa, const SlimConv2dF32& a, int32_t slot, int32_t threads) {
  printf("  engine %s: to_floats=%d, slot %d, %d threads\n", engine.name, a.to_floats, slot, threads);
  describe(isa.name, a);
}

// How the steps of a case run.
struct PairsWay {
  const Isa* isa;
  int32_t slot, threads;
  PairsWay(Rng& rng, const Isas& isas, int max_threads)
      : isa(isas[size_t(rng.below(int64_t(isas.size())))]),
        slot(rng.chance(30) ? int32_t(rng.below(4)) : -1),
        threads(int32_t(rng.chance(40) ? 1 : rng.range(1, max_threads))) {}
};

// One random convolution in pairs, every other one behind the copy of its input: the same one for every engine.
void run_pairs_conv_case(const Engine& engine, const Isas& isas, long number, int max_threads, Tally* tally) {
  Rng rng{uint64_t(number) * 0xd1342543de82ef95u + 13};
  static const int64_t kSizes[] = {1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9, 13, 17}, kKernels[] = {1, 1, 2, 3, 3, 3, 5, 7};
  static const int64_t kMostTaps[] = {1, 3, 7, 9, 21, 63};
  static const int64_t kChannels[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 34, 47, 64, 65, 130};
  SlimConv2dF32 a;
  memset(&a, 0, sizeof a);
  const bool large = number % 97 == 96, most_taps = number % 31 == 30, many_strips = !large && number % 17 == 16;
  do {
    a.h = large ? 24 : many_strips ? rng.range(1, 4) : rng.pick(kSizes);
    a.w = large ? 24 : rng.chance(60) ? a.h : rng.pick(kSizes);
    a.r = int32_t(most_taps ? rng.pick(kMostTaps) : rng.pick(kKernels));
    a.s = int32_t(most_taps ? SLIM_PAIRS_MAX_TAPS / a.r : rng.chance(80) ? a.r : rng.pick(kKernels));
    a.stride_h = rng.chance(70) ? 1 : int32_t(rng.range(1, 3));
    a.stride_w = rng.chance(70) ? a.stride_h : int32_t(rng.range(1, 3));
    a.dil_h = rng.chance(80) ? 1 : int32_t(rng.range(1, 3));
    a.dil_w = rng.chance(80) ? a.dil_h : int32_t(rng.range(1, 3));
    a.pad_h = rng.chance(60) ? (a.r - 1) / 2 * a.dil_h : int32_t(rng.range(0, 6));
    a.pad_w = rng.chance(60) ? (a.s - 1) / 2 * a.dil_w : int32_t(rng.range(0, 6));
    a.p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h);
    a.q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  } while (a.p < 1 || a.q < 1);
  a.n = rng.chance(20) ? kImages : rng.range(1, 40);
  a.c_in = rng.pick(kChannels);
  a.c_out = many_strips ? rng.range(150, 400) : rng.chance(50) ? rng.pick(kChannels) : rng.range(1, 70);
  a.strip = kStrip;
  a.depth = a.parts_h = a.parts_w = 1;
  a.lanes = kImages;
  a.engine = engine.number;
  a.relu = rng.chance(50);
  a.pool = a.p >= 2 && a.q >= 2 && rng.chance(30);
  a.to_floats = rng.chance(30);

  // Groups fall on strips at random, so that some have none; as many as the double reference can do.
  const int64_t strips = ceil_div(a.c_out, kStrip);
  const double limit = (large ? 4e7 : 3e6) / (2 * kRows * kStrip * kImages);
  while (a.n > kImages && double(ceil_div(a.n, kImages) * a.p * a.q * strips) > limit) a.n = (a.n + 1) / 2;
  const int64_t image_groups = ceil_div(a.n, kImages), most = int64_t(limit / double(image_groups * a.p * a.q)) + 1;
  const int64_t wanted = rng.range(0, 4 * strips), count = wanted < most ? wanted : most;
  std::vector<int32_t> starts(size_t(strips) + 1, 0);
  for (int64_t g = 0; g < count; ++g) ++starts[size_t(rng.below(strips)) + 1];
  for (int64_t strip = 0; strip < strips; ++strip) starts[size_t(strip) + 1] += starts[size_t(strip)];
  std::vector<SlimPairsGroup> groups;
  for (int64_t g = 0; g < count; ++g) groups.push_back(random_group(rng, int64_t(a.r) * a.s, a.c_in));

  // Groups and starts lie at odd multiples of 8 bytes.
  constexpr int64_t kWords = sizeof(SlimPairsGroup) / sizeof(uint64_t);
  Block<uint64_t> group_block(count * kWords, 1);
  Block<int32_t> start_block(strips + 1, 2);
  Block<float> bias(a.c_out, rng.range(0, 3));
  RowBlock<Bf16> weights(count * kStrip * 2 * kRows);
  const int64_t x_pixels = image_groups * a.h * a.w, pairs_in = ceil_div(a.c_in, 2), pairs_out = ceil_div(a.c_out, 2);
  const int64_t y_pixels = image_groups * (a.pool ? (a.p / 2) * (a.q / 2) : a.p * a.q);
  RowBlock<Bf16> residual(y_pixels * pairs_out * kPair);
  if (count > 0) memcpy(group_block.data, groups.data(), size_t(count) * sizeof(SlimPairsGroup));
  memcpy(start_block.data, starts.data(), starts.size() * sizeof(int32_t));
  int64_t strip = 0;
  for (int64_t i = 0; i < count * kStrip * 2 * kRows; ++i) {
    const int64_t g = i / (kStrip * 2 * kRows), o = i / (2 * kRows) % kStrip, row = i / 2 % kRows;
    while (g >= starts[size_t(strip) + 1]) ++strip;
    const bool beyond = strip * kStrip + o >= a.c_out || row >= groups[size_t(g)].rows;
    weights.data[i] = beyond || rng.chance(10) ? Bf16(0) : bf16_of(rng.value());
  }
  for (int64_t i = 0; i < a.c_out; ++i) bias.data[i] = rng.value();
  fill_pairs(rng, residual.data, y_pixels, a.c_out);
  a.weights = reinterpret_cast<const float*>(weights.data);
  a.channels = reinterpret_cast<const int32_t*>(group_block.data);
  a.tap_ptr = start_block.data;
  a.bias = rng.chance(70) ? bias.data : nullptr;
  a.residual = !a.pool && rng.chance(40) ? reinterpret_cast<const float*>(residual.data) : nullptr;

  // Non-finite inputs reach the outputs of strips that store their column, and no others.
  const int64_t specials = rng.chance(25) ? rng.range(1, 4) : 0;
  const bool copied = rng.chance(50);
  Block<float> x_floats(copied ? a.n * a.h * a.w * a.c_in : 0, rng.range(0, 3));
  RowBlock<Bf16> x(copied ? 0 : x_pixels * pairs_in * kPair);
  PairsOutput copy(copied ? x_pixels * pairs_in * kImages : 0);
  if (copied) {
    for (int64_t i = 0; i < a.n * a.h * a.w * a.c_in; ++i) x_floats.data[i] = rng.value();
    for (int64_t i = 0; i < specials; ++i) x_floats.data[Place(rng, a).channels_last(a)] = special(rng);
  } else {
    fill_pairs(rng, x.data, x_pixels, a.c_in);
    for (int64_t i = 0; i < specials; ++i) x.data[Place(rng, a).in_pairs(a)] = bf16_of(special(rng));
  }
  PairsOutput y(y_pixels * (a.to_floats ? a.c_out : pairs_out) * kImages);
  a.x = copied ? copy.y() : reinterpret_cast<const float*>(x.data);
  a.y = y.y();

  const PairsWay way(rng, isas, max_threads);
  SlimStepF32 steps[2];
  memset(steps, 0, sizeof steps);
  steps[0] = {SLIM_STEP_TO_PAIRS, way.slot, a};
  steps[0].conv.x = x_floats.data;
  steps[0].conv.y = copy.y();
  steps[1] = {SLIM_STEP_PAIRS_CONV2D, way.slot, a};
  const long before = tally->failures;
  const int status = copied ? way.isa->run(steps, 2, way.threads) : way.isa->run(steps + 1, 1, way.threads);
  if (status != SLIM_OK || !copy.kept_inside() || !y.kept_inside()) {
    printf("  status %d, or wrote outside y\n", status);
    ++tally->failures;
  } else {
    if (copied) compare_copy(steps[0].conv, copy.data(), tally);
    compare_conv(a, y.data(), tally);
  }
  if (tally->failures != before) {
    describe_pairs(engine, *way.isa, a, way.slot, way.threads);
    printf("  case %ld: %ld groups, input copied into pairs %d, non-finite inputs %ld\n", number, long(count), copied,
           long(specials));
  }
  ++tally->cases;
}

// One random copy into pairs, of numbers that are hard to round.
void run_pairs_copy_case(const Engine& engine, const Isas& isas, long number, int max_threads, Tally* tally) {
  Rng rng{uint64_t(number) * 0xd1342543de82ef95u + 17};
  SlimConv2dF32 a;
  memset(&a, 0, sizeof a);
  const bool large = number % 13 == 12;  // several units of a group of images
  a.h = large ? 9 : rng.range(1, 8);
  a.w = large ? 11 : rng.range(1, 8);
  a.n = rng.range(1, 40);
  a.c_in = large ? rng.range(64, 140) : rng.range(1, 40);
  a.lanes = kImages;
  a.engine = engine.number;
  const int64_t count = a.n * a.h * a.w * a.c_in;
  Block<float> x(count, rng.range(0, 3));
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = uint32_t(rng.next());
    // Ties, and what lies beside them. Some engines take denormals for zeros.
    static const uint32_t kLow[] = {0x8000, 0x7fff, 0x8001, 0x0000, 0xffff};
    if (rng.chance(50)) bits = (bits & 0xffff0000u) | kLow[rng.below(5)];
    if (rng.chance(5)) bits |= 0x7f800000u;  // NaN of any payload
    if (rng.chance(2)) bits = (bits & 0x80000000u) | 0x7f800000u;
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
    memcpy(x.data + i, &bits, sizeof bits);
  }
  PairsOutput y(ceil_div(a.n, kImages) * a.h * a.w * ceil_div(a.c_in, 2) * kImages);
  a.x = x.data;
  a.y = y.y();
  const PairsWay way(rng, isas, max_threads);
  const SlimStepF32 step = {SLIM_STEP_TO_PAIRS, way.slot, a};
  const long before = tally->failures;
  const int status = way.isa->run(&step, 1, way.threads);
  if (status != SLIM_OK || !y.kept_inside()) {
    printf("  status %d, or wrote outside y\n", status);
    ++tally->failures;
  } else {
    compare_copy(a, y.data(), tally);
  }
  if (tally->failures != before) {
    describe_pairs(engine, *way.isa, a, way.slot, way.threads);
    printf("  copy into pairs, case %ld\n", number);
  }
  ++tally->cases;
}

// One random pooling in pairs, of any of the three kinds.
void run_pairs_pool_case(const Engine& engine, const Isas& isas, long number, int max_threads, Tally* tally) {
  Rng rng{uint64_t(number) * 0xd1342543de82ef95u + 19};
  static const int64_t kSizes[] = {1, 2, 3, 4, 5, 7, 8, 13}, kWindows[] = {1, 2, 2, 3, 3, 4, 7};
  SlimConv2dF32 a;
  memset(&a, 0, sizeof a);
  do {
    a.h = rng.pick(kSizes);
    a.w = rng.chance(60) ? a.h : rng.pick(kSizes);
    a.r = int32_t(rng.pick(kWindows));
    a.s = rng.chance(70) ? a.r : int32_t(rng.pick(kWindows));
    a.stride_h = int32_t(rng.range(1, 3));
    a.stride_w = rng.chance(70) ? a.stride_h : int32_t(rng.range(1, 3));
    a.dil_h = rng.chance(80) ? 1 : int32_t(rng.range(1, 3));
    a.dil_w = rng.chance(80) ? a.dil_h : int32_t(rng.range(1, 3));
    a.pad_h = int32_t(rng.range(0, a.r / 2));
    a.pad_w = int32_t(rng.range(0, a.s / 2));
    a.p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h);
    a.q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  } while (a.p < 1 || a.q < 1);
  // One more window where it begins inside, as in torch's ceil_mode.
  if (rng.chance(30) && a.p * a.stride_h - a.pad_h < a.h) ++a.p;
  if (rng.chance(30) && a.q * a.stride_w - a.pad_w < a.w) ++a.q;
  a.n = rng.range(1, 40);
  a.c_in = rng.range(1, 20);
  a.lanes = kImages;
  a.engine = engine.number;
  a.to_floats = rng.chance(40);
  const int64_t image_groups = ceil_div(a.n, kImages), pairs = ceil_div(a.c_in, 2);
  RowBlock<Bf16> x(image_groups * a.h * a.w * pairs * kPair);
  fill_pairs(rng, x.data, image_groups * a.h * a.w, a.c_in);
  for (int64_t i = rng.chance(25) ? rng.range(1, 4) : 0; i > 0; --i)
    x.data[Place(rng, a).in_pairs(a)] = bf16_of(special(rng));
  PairsOutput y(image_groups * a.p * a.q * (a.to_floats ? a.c_in : pairs) * kImages);
  a.x = reinterpret_cast<const float*>(x.data);
  a.y = y.y();
  const PairsWay way(rng, isas, max_threads);
  const SlimStepF32 step = {int32_t(rng.range(SLIM_STEP_PAIRS_MAX_POOL, SLIM_STEP_PAIRS_PADDED_AVERAGE_POOL)), way.slot,
                            a};
  const long before = tally->failures;
  const int status = way.isa->run(&step, 1, way.threads);
  if (status != SLIM_OK || !y.kept_inside()) {
    printf("  status %d, or wrote outside y\n", status);
    ++tally->failures;
  } else {
    compare_pool(a, step.kind, y.data(), tally);
  }
  if (tally->failures != before) {
    describe_pairs(engine, *way.isa, a, way.slot, way.threads);
    printf("  pooling in pairs, step %d, case %ld\n", step.kind, number);
  }
  ++tally->cases;
}

// ---------------------------------------------------------------- lines

void print_line(const char* name, const Tally& tally) {
  printf("%s %s: %ld cases, %ld outputs, %ld mismatches, worst error %.3f of its bound\n", name,
         tally.failures == 0 ? "ok" : "FAILED", tally.cases, tally.outputs, tally.failures, tally.worst);
  fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const char* only = nullptr;
  const char* only_engine = nullptr;
  long cases = 400;
  int max_threads = 3;
  for (int i = 1; i < argc; ++i) {
    const bool has_value = i + 1 < argc;
    if (has_value && strcmp(argv[i], "--isa") == 0) {
      only = argv[++i];
    } else if (has_value && strcmp(argv[i], "--engine") == 0) {
      only_engine = argv[++i];
    } else if (has_value && strcmp(argv[i], "--cases") == 0) {
      cases = atol(argv[++i]);
    } else if (has_value && strcmp(argv[i], "--max-threads") == 0) {
      max_threads = atoi(argv[++i]);
    } else {
      fprintf(stderr, "kernel_check: expected --isa NAME, --engine NAME, --cases N or --max-threads N, got %s\n",
              argv[i]);
      return 2;
    }
  }
  if (cases < 1 || max_threads < 1) {
    fprintf(stderr, "kernel_check: expected --cases and --max-threads of at least 1\n");
    return 2;
  }
  const Isa isas[] = {
      {"scalar", slim_run_steps_f32_scalar, slim_weight_gradient_f32_scalar, slim_batch_norm_f32_scalar, 4, true},
#if SLIM_HAVE_AVX2
      {"avx2", slim_run_steps_f32_avx2, slim_weight_gradient_f32_avx2, slim_batch_norm_f32_avx2, 8,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#if SLIM_HAVE_AVX512
      {"avx512", slim_run_steps_f32_avx512, slim_weight_gradient_f32_avx512, slim_batch_norm_f32_avx512, 16,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw")},
#endif
  };
  const Engine engines[] = {
      {"scalar", SLIM_ENGINE_SCALAR}, {"avx512bf16", SLIM_ENGINE_AVX512BF16}, {"amx", SLIM_ENGINE_AMX}};
  bool failed = false, found = false;
  Isas usable;
  for (const Isa& isa : isas) {
    if (only != nullptr && strcmp(only, isa.name) != 0) continue;
    found = true;
    if (!isa.supported) {
      printf("%-7s not supported by this CPU\n", isa.name);
      failed = failed || only != nullptr;
      continue;
    }
    usable.push_back(&isa);
    if (only_engine != nullptr && only == nullptr) continue;
    Tally tally;
    for (long number = 0; number < cases; ++number) {
      if (number % 4 == 3)
        run_gradient_case(isa, number / 4, max_threads, &tally);
      else if (number % 8 == 5)
        run_norm_case(isa, number / 8, max_threads, &tally);
      else
        run_case(isa, number, max_threads, &tally);
    }
    char name[32];
    snprintf(name, sizeof name, "%-7s", isa.name);
    print_line(name, tally);
    failed = failed || tally.failures != 0;
  }
  if (!found) {
    fprintf(stderr, "kernel_check: expected --isa scalar, avx2 or avx512 as compiled in, got %s\n", only);
    return 2;
  }
  found = false;
  for (const Engine& engine : engines) {
    if (only_engine != nullptr ? strcmp(only_engine, engine.name) != 0 : only != nullptr) continue;
    found = true;
    char name[32];
    snprintf(name, sizeof name, "pairs %-10s", engine.name);
    if (usable.empty() || slim_pairs_engine(engine.number) == nullptr) {
      printf("%s not supported by this CPU, or not compiled in\n", name);
      failed = failed || only_engine != nullptr;
      continue;
    }
    Tally tally;
    for (long number = 0; number < cases; ++number) {
      if (number % 4 == 3)
        run_pairs_pool_case(engine, usable, number / 4, max_threads, &tally);
      else if (number % 8 == 5)
        run_pairs_copy_case(engine, usable, number / 8, max_threads, &tally);
      else
        run_pairs_conv_case(engine, usable, number, max_threads, &tally);
    }
    print_line(name, tally);
    failed = failed || tally.failures != 0;
  }
  if (only_engine != nullptr && !found) {
    fprintf(stderr, "kernel_check: expected --engine scalar, avx512bf16 or amx, got %s\n", only_engine);
    return 2;
  }
  return failed ? 1 : 0;
}
