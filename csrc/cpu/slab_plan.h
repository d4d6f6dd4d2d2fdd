// Single weights with images innermost, in slabs of input channels: how a convolution is cut, and its *program*, the
// weights in the order in which the tiles read them.
//
// A single weight costs one load of x for each multiply-add, so x must come from L1. A tile of pixels reads all input
// channels at all taps: 16 pixels of 512 channels are 1 MB. So a tile walks the channels slab by slab: it copies what
// it reads of a slab into a *patch* of about the size of L1, adds what all output channels have there, and keeps their
// partial sums, which lie next to each other and stream from L2. In x itself the pixels of one channel lie a power of
// two apart and would fall into the same few lines of L1.
//
// In the patch the pixels of a tile are neighbours whatever the stride, so an entry is one offset and one weight, and
// the pixels are constant distances away from there.
//
// Where the lanes hold parts of images (kernels.h), what lies beyond the border of one part lies in another lane at the
// same place of another part. The copy into the patch moves it over, and everything else is as with images. Taps are
// then never left out: what lies outside the image in one lane lies inside in another.
#pragma once
#include <stdint.h>

#include "../kernels.h"
#include "ranges.h"

namespace {

// ---------------------------------------------------------------- one axis of a tile

// The patch has a row of *places* for an axis. They hold the input positions that the tile reaches: with stride 1 in
// order, with stride 2 first every other one, then those between, so that the pixels of a tile are always neighbours.
// Where taps are far apart, every tap has places of its own instead.
struct SlabAxis {
  Axis axis;      // of a part
  int64_t parts;  // that an image is cut into
  int64_t out;    // output positions that are computed
  int64_t tile;   // of them in a tile
  int64_t phase;  // places that are `stride` input positions apart, or 0: every tap has `tile` places of its own
  int64_t first, length;  // places that tiles read: first .. first + length
  int64_t most;           // places that one tile reads, at most
};

// The place of a tile's first position at a tap.
inline int64_t place_of_tap(const SlabAxis& a, int64_t tap) {
  if (a.phase == 0) return tap * a.tile;
  const int64_t reach = tap * a.axis.dilation;
  return reach % a.axis.stride * a.phase + reach / a.axis.stride;
}

// The input position of a place for the tile that starts at an output position.
inline int64_t position_of_place(const SlabAxis& a, int64_t start, int64_t place) {
  const int64_t origin = start * a.axis.stride - a.axis.pad;
  if (a.phase == 0) return origin + place % a.tile * a.axis.stride + place / a.tile * a.axis.dilation;
  return origin + place % a.phase * a.axis.stride + place / a.phase;
}

// The taps of one tile, in three runs: taps [0] to [1] lie outside the image for the tile's first position, [1] to [2]
// are computed for all positions, [2] to [3] lie outside for the last one, or there is no last one. All other taps lie
// outside the image for the whole tile. A position that is computed although it lies outside reads a zero.
struct TapRuns {
  int64_t bounds[4];
};

inline TapRuns tap_runs(const SlabAxis& a, int64_t start) {
  const int64_t present = min64(a.tile, a.out - start);
  TapRuns runs = {{0, 0, 0, 0}};
  bool any = false, whole = false, cut = false;
  const bool in_parts = a.parts > 1;
  for (int64_t tap = 0; tap < a.axis.taps; ++tap) {
    // Positions below `low` lie in front of the image, those from `high` on behind it. Neither grows with the tap.
    int64_t low = 0, high = 0;
    for (int64_t i = 0; i < present; ++i) {
      const int64_t position = (start + i) * a.axis.stride - a.axis.pad + tap * a.axis.dilation;
      low += position < 0 && !in_parts;
      high += position < a.axis.size || in_parts;
    }
    if (low < high) {
      if (!any) runs.bounds[0] = runs.bounds[1] = runs.bounds[2] = tap;
      any = true;
      runs.bounds[3] = tap + 1;
    }
    if (!any) continue;
    whole = whole || low == 0;
    cut = cut || (low == 0 && high < a.tile);
    if (!whole) runs.bounds[1] = tap + 1;
    if (!cut) runs.bounds[2] = tap + 1;
  }
  for (int i = 2; i >= 0; --i) runs.bounds[i] = min64(runs.bounds[i], runs.bounds[3]);
  return runs;
}

// The places that the tile at `start` reads.
inline Range places_read(const SlabAxis& a, int64_t start) {
  const TapRuns runs = tap_runs(a, start);
  Range read = {INT64_MAX, 0};
  for (int64_t tap = runs.bounds[0]; tap < runs.bounds[3]; ++tap) {
    const int64_t place = place_of_tap(a, tap);
    read.begin = min64(read.begin, place + (tap < runs.bounds[1]));
    read.end = max64(read.end, place + a.tile - (tap >= runs.bounds[2]));
  }
  if (read.begin >= read.end) read = {0, 0};
  return read;
}

inline SlabAxis slab_axis(const Axis& axis, int64_t parts, int64_t out, int64_t tile) {
  const int64_t phase = tile + (axis.taps - 1) * axis.dilation / axis.stride;
  const bool together = axis.stride * phase <= axis.taps * tile;
  SlabAxis a = {axis, parts, out, tile, together ? phase : 0, 0, 0, 0};
  a.length = a.most = together ? axis.stride * phase : axis.taps * tile;
  if (out > 2 * tile) return a;
  // Places in the padding that neither of the two tiles reads are left out.
  Range all = {a.length, 0};
  a.most = 1;
  for (int64_t start = 0; start < out; start += tile) {
    const Range read = places_read(a, start);
    all.begin = min64(all.begin, read.begin);
    all.end = max64(all.end, read.end);
    a.most = max64(a.most, read.size());
  }
  a.first = min64(all.begin, all.end);
  a.length = max64(1, all.end - a.first);
  return a;
}

// ---------------------------------------------------------------- the cut

struct SlabTileSize {
  int64_t rows, columns;
};

// Tiles that there are microkernels for. 16 accumulators need an instruction set of 32 registers. Those with even sides
// take all images, since a max-pool stays inside of a tile; the others are for parts of small images.
constexpr SlabTileSize SLAB_TILES[] = {{4, 4}, {2, 4}, {2, 2}, {2, 1}, {1, 1}};
constexpr int SLAB_TILE_COUNT = 5, SLAB_EVEN_TILE_COUNT = 3;

inline bool in_parts(const SlimConv2dF32& conv) { return conv.parts_h > 1 || conv.parts_w > 1; }

struct SlabCut {
  bool used;  // false: the problem is not run in slabs, and nothing else is set
  int tile;   // index into SLAB_TILES
  SlabAxis rows, columns;
  int64_t channels, count;  // of a slab, and how many slabs
  int64_t plane;            // places of one channel
  int64_t pixels() const { return SLAB_TILES[tile].rows * SLAB_TILES[tile].columns; }
  int64_t patch_floats(int64_t lanes) const { return channels * plane * lanes; }
};

// The slabs of one size of tile.
inline SlabCut slab_cut_of(const SlimConv2dF32& conv, int tile) {
  // Half as much again as the L1 of 32 KB that this was measured with: a few misses that L2 serves cost less than the
  // partial sums of more slabs. 28 KB took 8% longer, 112 KB 9%.
  constexpr int64_t PATCH_BYTES = 48 * 1024;
  const SlabTileSize size = SLAB_TILES[tile];
  const Axis vertical = {conv.h, conv.stride_h, conv.pad_h, conv.dil_h, conv.r};
  const Axis horizontal = {conv.w, conv.stride_w, conv.pad_w, conv.dil_w, conv.s};
  SlabCut cut;
  cut.used = true;
  cut.tile = tile;
  cut.rows = slab_axis(vertical, conv.parts_h, conv.pool ? conv.p / 2 * 2 : conv.p, size.rows);
  cut.columns = slab_axis(horizontal, conv.parts_w, conv.pool ? conv.q / 2 * 2 : conv.q, size.columns);
  cut.plane = cut.rows.length * cut.columns.length;
  const int64_t read_bytes = 4 * conv.lanes * cut.rows.most * cut.columns.most;
  const int64_t most = max64(1, min64(conv.c_in, PATCH_BYTES / read_bytes));
  cut.count = ceil_div(conv.c_in, most);
  cut.channels = ceil_div(conv.c_in, cut.count);
  return cut;
}

// About how many cycles a cut takes: a multiply-add costs one and an entry two more, the sums of an output channel are
// loaded and stored for each slab, and x is copied.
inline int64_t slab_cycles(const SlimConv2dF32& conv, const SlabCut& cut, int64_t entries) {
  const int64_t pixels = cut.pixels(), sums = cut.count * conv.c_out;
  const int64_t copied = conv.c_in * cut.rows.most * cut.columns.most;
  const int64_t tiles = ceil_div(cut.rows.out, cut.rows.tile) * ceil_div(cut.columns.out, cut.columns.tile);
  return tiles * (entries * (pixels + 2) + sums * (2 * pixels + 10) + 4 * copied);
}

// How a convolution is cut into slabs, if it is: with images innermost and strips of one channel, on images that have
// the pixels of a tile, where every output channel has a few weights in a slab. Parts of images always are.
inline SlabCut slab_cut(const SlimConv2dF32& conv) {
  constexpr int64_t MOST_TAPS = SLIM_PARTS_MAX_TAPS, MOST_PLACES = 4096, LEAST_ENTRIES = 2;
  const bool parts = in_parts(conv);
  SlabCut best;
  best.used = false;
  if (conv.lanes == 1 || conv.strip != 1 || (!parts && (conv.p < 2 || conv.q < 2))) return best;
  if (conv.r > MOST_TAPS || conv.s > MOST_TAPS) return best;
  const int64_t entries = conv.tap_ptr[conv.c_out * conv.r * conv.s];
  int64_t least = INT64_MAX;
  const int tiles = parts && !conv.pool ? SLAB_TILE_COUNT : SLAB_EVEN_TILE_COUNT;
  for (int tile = conv.lanes == 16 ? 0 : 1; tile < tiles; ++tile) {
    const SlabCut cut = slab_cut_of(conv, tile);
    const bool pays = cut.plane <= MOST_PLACES && entries / conv.c_out >= LEAST_ENTRIES * cut.count;
    if (!parts && !pays) continue;
    const int64_t cycles = slab_cycles(conv, cut, entries);
    if (cycles >= least) continue;
    least = cycles;
    best = cut;
  }
  return best;
}

// ---------------------------------------------------------------- the program

// One weight, and where its input channel at its tap lies: floats from the patch's place of a tile's first pixel.
struct SlabEntry {
  int32_t offset;
  float weight;
};

// A program is `HEADER` numbers that say which cut it was made for, then for every slab, output channel and tap the end
// of its entries, with a 0 in front, and the entries in that order.
struct SlabProgram {
  static constexpr int64_t HEADER = 8;
  const int32_t* ends;  // [slabs][c_out][taps]; ends[-1] is 0
  const SlabEntry* entries;
};

inline int64_t slab_runs(const SlimConv2dF32& conv, const SlabCut& cut) {
  return cut.count * conv.c_out * conv.r * conv.s;
}

inline int64_t slab_program_numbers(const SlimConv2dF32& conv, const SlabCut& cut) {
  return SlabProgram::HEADER + slab_runs(conv, cut) + 1 + 2 * (int64_t)conv.tap_ptr[conv.c_out * conv.r * conv.s];
}

inline SlabProgram slab_program_at(const SlimConv2dF32& conv, const SlabCut& cut, const int32_t* numbers) {
  const int32_t* const ends = numbers + SlabProgram::HEADER + 1;
  return {ends, reinterpret_cast<const SlabEntry*>(ends + slab_runs(conv, cut))};
}

inline void slab_header(const SlabCut& cut, int32_t (&header)[SlabProgram::HEADER]) {
  const int64_t numbers[] = {cut.tile,       cut.channels,    cut.plane,         cut.count,
                             cut.rows.first, cut.rows.length, cut.columns.first, cut.columns.length};
  for (int64_t i = 0; i < SlabProgram::HEADER; ++i) header[i] = (int32_t)numbers[i];
}

// Whether a program was made for this cut.
inline bool is_slab_program(const SlabCut& cut, const int32_t* numbers) {
  int32_t header[SlabProgram::HEADER];
  slab_header(cut, header);
  bool same = true;
  for (int64_t i = 0; i < SlabProgram::HEADER; ++i) same = same && header[i] == numbers[i];
  return same;
}

inline void write_slab_program(const SlimConv2dF32& conv, const SlabCut& cut, int32_t* numbers) {
  const int64_t taps = (int64_t)conv.r * conv.s, outputs = conv.c_out, runs = slab_runs(conv, cut);
  int32_t header[SlabProgram::HEADER];
  slab_header(cut, header);
  for (int64_t i = 0; i < SlabProgram::HEADER; ++i) numbers[i] = header[i];
  int32_t* const ends = numbers + SlabProgram::HEADER + 1;
  SlabEntry* const entries = reinterpret_cast<SlabEntry*>(ends + runs);
  // Counts, then where each run begins, which moves to its end while the run is filled.
  for (int64_t i = -1; i < runs; ++i) ends[i] = 0;
  for (int64_t run = 0; run < outputs * taps; ++run) {
    for (int32_t e = conv.tap_ptr[run]; e < conv.tap_ptr[run + 1]; ++e) {
      ++ends[conv.channels[e] / cut.channels * outputs * taps + run];
    }
  }
  for (int64_t i = 0, begin = 0; i < runs; ++i) {
    const int32_t count = ends[i];
    ends[i] = (int32_t)begin;
    begin += count;
  }
  for (int64_t run = 0; run < outputs * taps; ++run) {
    const int64_t tap = run % taps;
    const int64_t row = place_of_tap(cut.rows, tap / conv.s) - cut.rows.first;
    const int64_t column = place_of_tap(cut.columns, tap % conv.s) - cut.columns.first;
    const int64_t place = row * cut.columns.length + column;
    for (int32_t e = conv.tap_ptr[run]; e < conv.tap_ptr[run + 1]; ++e) {
      const int64_t slab = conv.channels[e] / cut.channels, channel = conv.channels[e] % cut.channels;
      SlabEntry* const entry = entries + ends[slab * outputs * taps + run]++;
      entry->offset = (int32_t)((channel * cut.plane + place) * conv.lanes);
      entry->weight = conv.weights[e];
    }
  }
}

}  // namespace
