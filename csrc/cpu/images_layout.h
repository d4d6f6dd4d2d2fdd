// Copies activations between the two layouts: channels last (n, h, w, c), and images innermost, which is
// (ceil(n / lanes), h, w, c, lanes). With parts of images (kernels.h), n, h and w are those of the parts.
#pragma once
#include <stdint.h>

#include "../kernels.h"
#include "ranges.h"

namespace {

struct LayoutPlan {
  const SlimConv2dF32* conv;  // of which x, y, n, h, w, c_in, lanes, parts_h and parts_w are read
  bool to_images;             // from channels last to images innermost, or the other way round
  int64_t pixels;             // of one image, or part
  int64_t pixels_per_unit, pixel_parts;
  int64_t units;  // pixel_parts for each group of `lanes` images
};

// A unit reads as much as lets L2 hold both what it reads and what it writes.
inline LayoutPlan plan_layout(const SlimConv2dF32& conv, bool to_images) {
  constexpr int64_t UNIT_BYTES = 128 * 1024;
  LayoutPlan plan;
  plan.conv = &conv;
  plan.to_images = to_images;
  plan.pixels = conv.h * conv.w;
  plan.pixels_per_unit = min64(plan.pixels, max64(1, UNIT_BYTES / (4 * conv.c_in * conv.lanes)));
  plan.pixel_parts = ceil_div(plan.pixels, plan.pixels_per_unit);
  plan.units = ceil_div(conv.n, conv.lanes) * plan.pixel_parts;
  return plan;
}

// Transposes rows x columns floats: to[j][i] = from[i][j]. Transpose8 is the instruction set's, for 8 x 8 of them.
template <class Transpose8>
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                      int64_t columns) {
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) {
    int64_t j = 0;
    for (; j + 8 <= columns; j += 8) {
      Transpose8::run(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
    for (; j < columns; ++j) {
      for (int64_t k = i; k < i + 8; ++k) to[j * to_stride + k] = from[k * from_stride + j];
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// Where lanes lie in the tensor that is channels last: `together` of them, from one that it divides, are `distance`
// floats apart.
struct LanesOfImages {
  int64_t parts_h, parts_w, part_h, part_w, channels, together, distance;

  explicit LanesOfImages(const SlimConv2dF32& conv)
      : parts_h(conv.parts_h), parts_w(conv.parts_w), part_h(conv.h), part_w(conv.w), channels(conv.c_in) {
    const bool whole = parts_h * parts_w == 1;
    together = whole ? conv.lanes : parts_w;
    distance = whole ? part_h * part_w * channels : part_w * channels;
  }

  // Of a pixel of an image or part, counted from the first of the tensor.
  int64_t at(int64_t part, int64_t pixel) const {
    if (parts_h * parts_w == 1) return (part * part_h * part_w + pixel) * channels;
    const int64_t image = part / (parts_h * parts_w), part_row = part / parts_w % parts_h, part_column = part % parts_w;
    const int64_t row = part_row * part_h + pixel / part_w, column = part_column * part_w + pixel % part_w;
    return ((image * parts_h * part_h + row) * parts_w * part_w + column) * channels;
  }
};

// Copies some pixels of one group of images. At each pixel that is a transposition of lanes x c_in floats.
template <class Transpose8>
inline void run_layout_unit(const LayoutPlan& plan, int64_t index) {
  const SlimConv2dF32& conv = *plan.conv;
  const LanesOfImages images(conv);
  const int64_t lanes = conv.lanes, channels = conv.c_in;
  const int64_t group = index / plan.pixel_parts, first = index % plan.pixel_parts * plan.pixels_per_unit;
  const int64_t end = min64(plan.pixels, first + plan.pixels_per_unit);
  const int64_t image0 = group * lanes;
  const int64_t present = min64(lanes, conv.n - image0);  // the last group may have fewer images than lanes
  for (int64_t pixel = first; pixel < end; ++pixel) {
    const int64_t images_innermost = (group * plan.pixels + pixel) * channels * lanes;
    for (int64_t lane = 0; lane < present; lane += images.together) {
      const int64_t count = min64(images.together, present - lane), channels_last = images.at(image0 + lane, pixel);
      if (plan.to_images)
        transpose<Transpose8>(conv.x + channels_last, images.distance, conv.y + images_innermost + lane, lanes, count,
                              channels);
      else
        transpose<Transpose8>(conv.x + images_innermost + lane, lanes, conv.y + channels_last, images.distance,
                              channels, count);
    }
    if (plan.to_images) {
      float* const to = conv.y + images_innermost;
      // Lanes without an image are computed too, so they must hold something finite.
      for (int64_t c = 0; present < lanes && c < channels; ++c) {
        for (int64_t lane = present; lane < lanes; ++lane) to[c * lanes + lane] = 0;
      }
    }
  }
}

}  // namespace
