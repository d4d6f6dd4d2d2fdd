// Integer arithmetic on sizes and positions.
//
// All headers of this folder put what they define into an anonymous namespace: each instruction set's source file is
// compiled with its own flags, and a function that two of them shared by name could be linked from the AVX-512 file
// into code for older CPUs.
#pragma once
#include <stdint.h>

namespace {

struct Range {
  int64_t begin, end;  // end is not included
  int64_t size() const { return end - begin; }
};

inline bool operator==(const Range& a, const Range& b) { return a.begin == b.begin && a.end == b.end; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// One axis of a convolution. At each tap, output position i reads input position i * stride - pad + tap * dilation.
struct Axis {
  int64_t size, stride, pad, dilation, taps;
};

// The taps of output position i that lie inside the image.
inline Range taps_inside(const Axis& axis, int64_t i) {
  const int64_t origin = i * axis.stride - axis.pad;
  Range taps = {0, axis.taps};
  while (taps.begin < axis.taps && origin + taps.begin * axis.dilation < 0) ++taps.begin;
  while (taps.end > taps.begin && origin + (taps.end - 1) * axis.dilation >= axis.size) --taps.end;
  return taps;
}

// Neighbouring output positions that read the same taps: a corner, an edge, or the interior of an image.
struct TapClass {
  Range positions, taps;
};

// The class that starts at `begin`, which lies in front of `end`.
inline TapClass tap_class(const Axis& axis, int64_t begin, int64_t end) {
  TapClass found = {{begin, begin + 1}, taps_inside(axis, begin)};
  while (found.positions.end < end && taps_inside(axis, found.positions.end) == found.taps) ++found.positions.end;
  return found;
}

}  // namespace
