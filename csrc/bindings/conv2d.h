// The members of SlimConv2dF32 and what is checked of them.
#pragma once
#include <algorithm>
#include <string>

#include "bindings/members.h"
#include "kernels.h"

namespace slim {

template <>
struct Members<SlimConv2dF32> {
  using Struct = SlimConv2dF32;  // Conv2dArguments in slimkernels/kernels/cpu/abi.py
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),
      SLIM_MEMBER(y, kAddress),
      SLIM_MEMBER(bias, kAddress),
      SLIM_MEMBER(weights, kAddress),
      SLIM_MEMBER(channels, kAddress),
      SLIM_MEMBER(tap_ptr, kAddress),
      SLIM_MEMBER(offsets, kAddress),
      SLIM_MEMBER(residual, kAddress),
      SLIM_MEMBER(n, kImages),
      SLIM_MEMBER(h, kNatural),
      SLIM_MEMBER(w, kNatural),
      SLIM_MEMBER(c_in, kPositive),
      SLIM_MEMBER(c_out, kPositive),
      SLIM_MEMBER(p, kPositive),
      SLIM_MEMBER(q, kPositive),
      SLIM_MEMBER(r, kPositive),
      SLIM_MEMBER(s, kPositive),
      SLIM_MEMBER(stride_h, kPositive),
      SLIM_MEMBER(stride_w, kPositive),
      SLIM_MEMBER(pad_h, kNatural),
      SLIM_MEMBER(pad_w, kNatural),
      SLIM_MEMBER(dil_h, kPositive),
      SLIM_MEMBER(dil_w, kPositive),
      SLIM_MEMBER(strip, (Range{1, 32})),
      SLIM_MEMBER(depth, (Range{1, 16})),
      SLIM_MEMBER(relu, kFlag),
      SLIM_MEMBER(pool, kFlag),
      SLIM_MEMBER(lanes, (Range{1, 16})),
      SLIM_MEMBER(parts_h, (Range{1, 16})),
      SLIM_MEMBER(parts_w, (Range{1, 16})),
      SLIM_MEMBER(engine, (Range{0, SLIM_ENGINE_AMX})),
      SLIM_MEMBER(to_floats, kFlag),
  };
};
static_assert(members_fill_the_struct<SlimConv2dF32>());

constexpr int kMembers = kCount<SlimConv2dF32>;
constexpr int kPointers = 8, kLanes = kMembers - 5;  // how many come first, and where `lanes` is

// What is wrong with the parts of images; "" where nothing is.
inline std::string parts_fault(const SlimConv2dF32& a) {
  const int64_t parts = int64_t(a.parts_h) * a.parts_w;
  return a.lanes % parts != 0 || a.n % parts != 0 ? "lanes or n is no multiple of the parts of an image" : "";
}

// What is wrong with the members by what kernels.h asks for, as far as numbers tell; "" where nothing is. `a` is the
// struct of these numbers.
inline std::string conv2d_fault(const int64_t* numbers, const SlimConv2dF32& a) {
  const std::string fault = range_fault<SlimConv2dF32>(numbers);
  if (!fault.empty()) return fault;
  const int64_t lanes = a.lanes, strip = a.strip, strips = (a.c_out + strip - 1) / strip;
  if (!is_one_of(strip, {1, 2, 4, 8, 16, 24, 32})) return "strip = " + std::to_string(strip) + " is no known width";
  if (!is_one_of(lanes, {1, 4, 8, 16})) return "lanes = " + std::to_string(lanes) + " is no known vector";
  if (!is_one_of(a.depth, {1, 8, 16})) return "depth = " + std::to_string(a.depth) + " is no known depth";
  if (a.depth > 1 && (strip != 1 || lanes != 1 || a.pool || a.depth > a.c_in))
    return "a depth goes with strips of one channel, channels last, no pooling and as many input channels";
  if (a.tap_ptr == nullptr) return "tap_ptr is NULL";
  if (a.parts_h > 1 || a.parts_w > 1) {
    if (!parts_fault(a).empty()) return parts_fault(a);
    const bool cut_at_strides = a.p * a.stride_h == a.h && a.q * a.stride_w == a.w;
    const bool cut_at_pools = !a.pool || (a.p % 2 == 0 && a.q % 2 == 0);
    if (strip != 1 || a.depth != 1 || a.r > SLIM_PARTS_MAX_TAPS || a.s > SLIM_PARTS_MAX_TAPS || !cut_at_strides ||
        !cut_at_pools)
      return "images cannot be cut into parts";
  }
  if (!product_fits(a.h, a.w, a.c_in * lanes) || a.c_in * lanes > kInt32Max)
    return "an image has 2^31 elements or more";
  if (!product_fits(a.p, a.q, a.c_out * lanes) || a.c_out * lanes > kInt32Max)
    return "an output has 2^31 elements or more";
  if (!product_fits(a.r, a.s, strips)) return "tap_ptr has 2^31 elements or more";
  // Both factors of each product fit 31 bits; the sum below is at most 2^62 + 2^31.
  const int64_t taps_down = int64_t(a.dil_h) * (a.r - 1), taps_right = int64_t(a.dil_w) * (a.s - 1);
  const int64_t down = std::max<int64_t>(taps_down, a.pad_h);
  const int64_t right = std::max<int64_t>({taps_right, a.pad_w, a.stride_w}) + 1;
  if (down > kInt32Max || right > kInt32Max || down * a.w + right > kInt32Max / (a.c_in * lanes))
    return "an offset is 2^31 or more";
  return "";
}

// The same of a convolution that is about to run: its tensors must be there, and its output must have the size that
// follows from the input's.
inline std::string run_fault(const int64_t* numbers, const SlimConv2dF32& a) {
  const std::string fault = conv2d_fault(numbers, a);
  if (!fault.empty()) return fault;
  if (a.x == nullptr || a.y == nullptr) return "x or y is NULL";
  if (a.p != output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h) ||
      a.q != output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w) || a.p <= a.pool || a.q <= a.pool)
    return "p or q is not the size of the output";
  if (a.residual != nullptr && a.pool) return "a residual is added in front of no pooling";
  const int64_t lanes = a.lanes, vector_of_images = std::max({a.h * a.w * a.c_in, a.p * a.q * a.c_out, int64_t(1)});
  return a.n > (INT64_MAX >> 3) / (vector_of_images * lanes) ? "n is out of range" : "";
}

// The same of a step that copies between layouts, which reads n, h, w, c_in, lanes and the parts alone.
inline std::string layout_fault(const int64_t* numbers, const SlimConv2dF32& a) {
  for (const std::string& fault :
       {range_fault<SlimConv2dF32>(numbers, kPointers, 4), range_fault<SlimConv2dF32>(numbers, kLanes, 5)}) {
    if (!fault.empty()) return fault;
  }
  const int64_t lanes = a.lanes;
  if (!is_one_of(lanes, {4, 8, 16})) return "lanes = " + std::to_string(lanes) + " is no known vector";
  if (!parts_fault(a).empty()) return parts_fault(a);
  if (!product_fits(a.h, a.w, a.c_in * lanes) || a.c_in * lanes > kInt32Max)
    return "an image has 2^31 elements or more";
  const int64_t vector_of_images = std::max(a.h * a.w * a.c_in, int64_t(1)) * lanes;
  return a.n > (INT64_MAX >> 3) / vector_of_images ? "n is out of range" : "";
}

// The same of a pooling step, which has neither weights nor parts.
inline std::string pool_fault(const int64_t* numbers, const SlimConv2dF32& a) {
  const int c_out = kPointers + 4;  // not read, as strip and what follows it up to the lanes
  for (const std::string& fault : {range_fault<SlimConv2dF32>(numbers, kPointers, 4),
                                   range_fault<SlimConv2dF32>(numbers, c_out + 1, kLanes - 4 - (c_out + 1)),
                                   range_fault<SlimConv2dF32>(numbers, kLanes, 5)}) {
    if (!fault.empty()) return fault;
  }
  const int64_t lanes = a.lanes;
  if (!is_one_of(lanes, {1, 4, 8, 16})) return "lanes = " + std::to_string(lanes) + " is no known vector";
  if (a.parts_h != 1 || a.parts_w != 1) return "a pooling takes whole images";
  if (!product_fits(a.h, a.w, a.c_in * lanes) || a.c_in * lanes > kInt32Max)
    return "an image has 2^31 elements or more";
  if (!product_fits(a.p, a.q, a.c_in * lanes)) return "an output has 2^31 elements or more";
  if (a.p != output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h) ||
      a.q != output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w))
    return "p or q is not the size of the output";
  const int64_t down = int64_t(a.dil_h) * (a.r - 1), right = int64_t(a.dil_w) * (a.s - 1);
  if (down > kInt32Max || right > kInt32Max) return "a window is 2^31 or more";
  const int64_t vector_of_images = std::max(a.h * a.w, a.p * a.q) * a.c_in * lanes;
  return a.n > (INT64_MAX >> 3) / std::max(vector_of_images, int64_t(1)) ? "n is out of range" : "";
}

// The same of a convolution in pairs.
inline std::string pairs_conv_fault(const int64_t* numbers, const SlimConv2dF32& a) {
  if (a.strip != 16 || a.depth != 1 || a.lanes != 16 || a.parts_h != 1 || a.parts_w != 1)
    return "pairs go with strips of 16 channels, no depth, 16 images innermost and whole images";
  if (int64_t(a.r) * a.s > SLIM_PAIRS_MAX_TAPS) return "more taps than a convolution in pairs has";
  return run_fault(numbers, a);
}

}  // namespace slim
