// The CUDA entry points of kernels.h for Python: each takes the members of its struct in order.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings/members.h"
#include "kernels.h"

namespace slim {

constexpr int64_t kMaxPlaces = 65535;  // places of a patch, far more than shared memory holds
constexpr Range kPlaces = {1, kMaxPlaces};
constexpr Range kPlacesOrNone = {0, kMaxPlaces};
constexpr Range kSide = {2, kMaxPlaces};
constexpr Range kSteps = {0, kMaxPlaces};
constexpr Range kTileImages = {1, INT64_MAX >> 8};
constexpr Range kFusedRank = {1, SLIM_CUDA_MAX_FUSED_RANK};
constexpr Range kDtype = {SLIM_DTYPE_F32, SLIM_DTYPE_BF16};
constexpr Range kHalfDtype = {SLIM_DTYPE_F16, SLIM_DTYPE_BF16};

template <>
struct Members<SlimCudaBsrConv2d> {
  using Struct = SlimCudaBsrConv2d;
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),
      SLIM_MEMBER(y, kAddress),
      SLIM_MEMBER(bias, kAddress),
      SLIM_MEMBER(values, kAddress),
      SLIM_MEMBER(crow_indices, kAddress),
      SLIM_MEMBER(col_indices, kAddress),
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
      SLIM_MEMBER(block_out, kPositive),
      SLIM_MEMBER(block_in, kPositive),
      SLIM_MEMBER(relu, kFlag),
      SLIM_MEMBER(dtype, kDtype),
      SLIM_MEMBER(device, kNatural),
      SLIM_MEMBER(stream, kAddress),
  };
};
static_assert(members_fill_the_struct<SlimCudaBsrConv2d>());

// The members that SlimCudaResidentConv2d and SlimCudaStemConv2d have in common.
#define SLIM_TILE_MEMBERS                                                                                           \
  SLIM_MEMBER(r, kPlaces), SLIM_MEMBER(s, kPlaces), SLIM_MEMBER(stride_h, kPlaces), SLIM_MEMBER(stride_w, kPlaces), \
      SLIM_MEMBER(pad_h, kPlacesOrNone), SLIM_MEMBER(pad_w, kPlacesOrNone), SLIM_MEMBER(dil_h, kPlaces),            \
      SLIM_MEMBER(dil_w, kPlaces), SLIM_MEMBER(relu, kFlag), SLIM_MEMBER(pool, kFlag),                              \
      SLIM_MEMBER(tile_images, kPlaces), SLIM_MEMBER(tile_rows, kSide), SLIM_MEMBER(tile_cols, kSide),              \
      SLIM_MEMBER(patch_row, kPlaces), SLIM_MEMBER(patch_image, kPlacesOrNone), SLIM_MEMBER(patch, kPlaces),        \
      SLIM_MEMBER(load_top, kPlacesOrNone), SLIM_MEMBER(load_left, kPlacesOrNone), SLIM_MEMBER(load_rows, kPlaces), \
      SLIM_MEMBER(load_cols, kPlaces)

template <>
struct Members<SlimCudaResidentConv2d> {
  using Struct = SlimCudaResidentConv2d;
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),
      SLIM_MEMBER(y, kAddress),
      SLIM_MEMBER(bias, kAddress),
      SLIM_MEMBER(weights, kAddress),
      SLIM_MEMBER(group_start, kAddress),
      SLIM_MEMBER(taps, kAddress),
      SLIM_MEMBER(n, kTileImages),
      SLIM_MEMBER(h, kPositive),
      SLIM_MEMBER(w, kPositive),
      SLIM_MEMBER(c_in, kPositive),
      SLIM_MEMBER(c_out, kPositive),
      SLIM_MEMBER(p, kPositive),
      SLIM_MEMBER(q, kPositive),
      SLIM_TILE_MEMBERS,
      SLIM_MEMBER(y_image, kNatural),
      SLIM_MEMBER(y_row, kNatural),
      SLIM_MEMBER(y_pixel, kNatural),
      SLIM_MEMBER(slab, (Range{8, 128})),
      SLIM_MEMBER(stages, (Range{2, 8})),
      SLIM_MEMBER(steps, kSteps),
      SLIM_MEMBER(slots, (Range{0, 64})),
      SLIM_MEMBER(columns, (Range{1, 8})),
      SLIM_MEMBER(variant, (Range{0, 6})),
      SLIM_MEMBER(blocks, kPositive),
      SLIM_MEMBER(overlap, kFlag),
      SLIM_MEMBER(dtype, kDtype),
      SLIM_MEMBER(device, kNatural),
      SLIM_MEMBER(stream, kAddress),
  };
};
static_assert(members_fill_the_struct<SlimCudaResidentConv2d>());

template <>
struct Members<SlimCudaStemConv2d> {
  using Struct = SlimCudaStemConv2d;
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),
      SLIM_MEMBER(y, kAddress),
      SLIM_MEMBER(first_weights, kAddress),
      SLIM_MEMBER(first_bias, kAddress),
      SLIM_MEMBER(weights, kAddress),
      SLIM_MEMBER(bias, kAddress),
      SLIM_MEMBER(taps, kAddress),
      SLIM_MEMBER(n, kTileImages),
      SLIM_MEMBER(h, kPositive),
      SLIM_MEMBER(w, (Range{2, kMaxPlaces})),
      SLIM_MEMBER(c_out, (Range{1, 64})),
      SLIM_MEMBER(p, kPositive),
      SLIM_MEMBER(q, kPositive),
      SLIM_TILE_MEMBERS,
      SLIM_MEMBER(steps, kSteps),
      SLIM_MEMBER(variant, kFlag),
      SLIM_MEMBER(blocks, kPositive),
      SLIM_MEMBER(overlap, kFlag),
      SLIM_MEMBER(dtype, kHalfDtype),
      SLIM_MEMBER(device, kNatural),
      SLIM_MEMBER(stream, kAddress),
  };
};
static_assert(members_fill_the_struct<SlimCudaStemConv2d>());

#undef SLIM_TILE_MEMBERS

template <>
struct Members<SlimCudaWeightGradient> {
  using Struct = SlimCudaWeightGradient;
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),
      SLIM_MEMBER(grad, kAddress),
      SLIM_MEMBER(values_grad, kAddress),
      SLIM_MEMBER(partial, kAddress),
      SLIM_MEMBER(crow_indices, kAddress),
      SLIM_MEMBER(col_indices, kAddress),
      SLIM_MEMBER(n, kImages),
      SLIM_MEMBER(h, kPositive),
      SLIM_MEMBER(w, kPositive),
      SLIM_MEMBER(c_in, kPositive),
      SLIM_MEMBER(c_out, kPositive),
      SLIM_MEMBER(p, kPositive),
      SLIM_MEMBER(q, kPositive),
      SLIM_MEMBER(elements, kImages),
      SLIM_MEMBER(part_pixels, kPositive),
      SLIM_MEMBER(r, kPositive),
      SLIM_MEMBER(s, kPositive),
      SLIM_MEMBER(stride_h, kPositive),
      SLIM_MEMBER(stride_w, kPositive),
      SLIM_MEMBER(pad_h, kNatural),
      SLIM_MEMBER(pad_w, kNatural),
      SLIM_MEMBER(dil_h, kPositive),
      SLIM_MEMBER(dil_w, kPositive),
      SLIM_MEMBER(block_out, kPositive),
      SLIM_MEMBER(block_in, kPositive),
      SLIM_MEMBER(step_n, kNatural),
      SLIM_MEMBER(step_p, kNatural),
      SLIM_MEMBER(step_q, kNatural),
      SLIM_MEMBER(parts, kPositive),
      SLIM_MEMBER(chunks, kPositive),
      SLIM_MEMBER(stages, (Range{2, 8})),
      SLIM_MEMBER(variant, (Range{0, 3})),
      SLIM_MEMBER(dtype, kHalfDtype),
      SLIM_MEMBER(device, kNatural),
      SLIM_MEMBER(stream, kAddress),
  };
};
static_assert(members_fill_the_struct<SlimCudaWeightGradient>());

template <>
struct Members<SlimCudaChainLayer> {
  using Struct = SlimCudaChainLayer;
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),
      SLIM_MEMBER(y, kAddress),
      SLIM_MEMBER(bias, kAddress),
      SLIM_MEMBER(weights, kAddress),
      SLIM_MEMBER(starts, kAddress),
      SLIM_MEMBER(steps, kAddress),
      SLIM_MEMBER(x_group, (Range{0, INT64_MAX >> 32})),
      SLIM_MEMBER(y_group, (Range{0, INT64_MAX >> 32})),
      SLIM_MEMBER(h, kPositive),
      SLIM_MEMBER(w, kPositive),
      SLIM_MEMBER(c_in, kPositive),
      SLIM_MEMBER(c_out, kPositive),
      SLIM_MEMBER(p, kPositive),
      SLIM_MEMBER(q, kPositive),
      SLIM_MEMBER(stride_h, kPlaces),
      SLIM_MEMBER(stride_w, kPlaces),
      SLIM_MEMBER(relu, kFlag),
      SLIM_MEMBER(pool, kFlag),
      SLIM_MEMBER(row_bits, (Range{0, 3})),
  };
};
static_assert(members_fill_the_struct<SlimCudaChainLayer>());

template <>
struct Members<SlimCudaChain> {
  using Struct = SlimCudaChain;
  static constexpr Member list[] = {
      SLIM_MEMBER(layers, kAddress),  SLIM_MEMBER(counters, kAddress),
      SLIM_MEMBER(n, kImages),        SLIM_MEMBER(count, (Range{1, SLIM_CUDA_MAX_CHAIN})),
      SLIM_MEMBER(images, kPlaces),   SLIM_MEMBER(group, (Range{1, 1024})),
      SLIM_MEMBER(barrier, kFlag),    SLIM_MEMBER(overlap, kFlag),
      SLIM_MEMBER(dtype, kHalfDtype), SLIM_MEMBER(device, kNatural),
      SLIM_MEMBER(stream, kAddress),
  };
};
static_assert(members_fill_the_struct<SlimCudaChain>());

template <>
struct Members<SlimCudaLowRankLinear> {
  using Struct = SlimCudaLowRankLinear;
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),      SLIM_MEMBER(y, kAddress),    SLIM_MEMBER(bias, kAddress),
      SLIM_MEMBER(u, kAddress),      SLIM_MEMBER(v, kAddress),    SLIM_MEMBER(m, kImages),
      SLIM_MEMBER(in, kPositive),    SLIM_MEMBER(out, kPositive), SLIM_MEMBER(rank, kFusedRank),
      SLIM_MEMBER(relu, kFlag),      SLIM_MEMBER(dtype, kDtype),  SLIM_MEMBER(device, kNatural),
      SLIM_MEMBER(stream, kAddress),
  };
};
static_assert(members_fill_the_struct<SlimCudaLowRankLinear>());

template <>
struct Members<SlimCudaLowRank> {
  using Struct = SlimCudaLowRank;
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),
      SLIM_MEMBER(y, kAddress),
      SLIM_MEMBER(bias, kAddress),
      SLIM_MEMBER(u, kAddress),
      SLIM_MEMBER(v, kAddress),
      SLIM_MEMBER(partial, kAddress),
      SLIM_MEMBER(n, kPositive),
      SLIM_MEMBER(h, kPositive),
      SLIM_MEMBER(w, kPositive),
      SLIM_MEMBER(c_in, kPositive),
      SLIM_MEMBER(c_out, kPositive),
      SLIM_MEMBER(p, kPositive),
      SLIM_MEMBER(q, kPositive),
      SLIM_MEMBER(r, kPlaces),
      SLIM_MEMBER(s, kPlaces),
      SLIM_MEMBER(stride_h, kPlaces),
      SLIM_MEMBER(stride_w, kPlaces),
      SLIM_MEMBER(pad_h, kPlacesOrNone),
      SLIM_MEMBER(pad_w, kPlacesOrNone),
      SLIM_MEMBER(dil_h, kPlaces),
      SLIM_MEMBER(dil_w, kPlaces),
      SLIM_MEMBER(rank, (Range{1, 256})),
      SLIM_MEMBER(u_row, (Range{1, 256})),
      SLIM_MEMBER(relu, kFlag),
      SLIM_MEMBER(variant, (Range{0, 6})),
      SLIM_MEMBER(stages, (Range{2, 8})),
      SLIM_MEMBER(splits, kPlaces),
      SLIM_MEMBER(depth_splits, (Range{1, 64})),
      SLIM_MEMBER(overlap, kFlag),
      SLIM_MEMBER(dtype, kHalfDtype),
      SLIM_MEMBER(device, kNatural),
      SLIM_MEMBER(stream, kAddress),
  };
};
static_assert(members_fill_the_struct<SlimCudaLowRank>());

// "" where a tile reads and writes inside its patch and no offset wraps, else what is wrong.
template <typename T>
std::string tile_plan_fault(const T& a, int64_t c_in, int64_t bytes_of_number = 2, bool borders = true) {
  const int64_t images = a.tile_images, rows = a.tile_rows, cols = a.tile_cols;
  if (c_in % 8 != 0 || a.c_out % 8 != 0) return "c_in and c_out are not multiples of 8";
  if (a.p <= a.pool || a.q <= a.pool) return "p or q is too small";
  if (rows % 2 != 0 || cols % 2 != 0) return "a tile's rows and columns are not even";
  if (!product_fits(images * a.h, a.w, bytes_of_number * c_in) || !product_fits(images * a.p, a.q, a.c_out))
    return "the images of a tile have 2^31 bytes or more";
  if (images * a.load_rows * a.load_cols > kMaxPlaces) return "a tile reads too many pixels";
  // All factors are at most 2^16, and so the places between rows are too: the products stay far below 2^62.
  const int64_t before = (images - 1) * a.patch_image;
  const int64_t down = (rows - 1) * a.stride_h + int64_t(a.r - 1) * a.dil_h;
  const int64_t right = (cols - 1) * a.stride_w + int64_t(a.s - 1) * a.dil_w;
  const int64_t loads = int64_t(a.load_top + a.load_rows - 1) * a.patch_row + a.load_left + a.load_cols - 1;
  if (borders && before + std::max(down * a.patch_row + right, loads) >= a.patch)
    return "a tile reaches beyond its patch";
  const int64_t tiles = (a.p + rows - 1) / rows * ((a.q + cols - 1) / cols);
  if ((a.n + images - 1) / images > kInt32Max / tiles) return "there are 2^31 tiles or more";
  return "";
}

// The struct of a function's arguments, one a member; throws where their number or one of them is wrong.
template <typename T>
T struct_of_arguments(const char* function, const pybind11::args& args) {
  if (args.size() != size_t(kCount<T>)) {
    throw pybind11::type_error(std::string(function) + ": expected " + std::to_string(kCount<T>) + " arguments, got " +
                               std::to_string(args.size()));
  }
  int64_t numbers[kCount<T>];
  for (int i = 0; i < kCount<T>; ++i) {
    numbers[i] = PyLong_AsLongLong(args[size_t(i)].ptr());
    if (numbers[i] == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  }
  const std::string fault = range_fault<T>(numbers);
  if (!fault.empty()) throw pybind11::value_error(std::string(function) + ": " + fault);
  return struct_of<T>(numbers);
}

inline int cuda_bsr_conv2d(const pybind11::args& args) {
  const auto a = struct_of_arguments<SlimCudaBsrConv2d>("cuda_bsr_conv2d", args);
  const int64_t block_in = a.block_in;
  if (!product_fits(a.r, a.s, (a.c_in + block_in - 1) / block_in * block_in) || a.c_in > kInt32Max - block_in)
    throw pybind11::value_error("cuda_bsr_conv2d: an output channel has 2^31 weights or more");
  pybind11::gil_scoped_release release;
  return slim_cuda_bsr_conv2d(&a);
}

// "" where the outputs of a tile's images lie within 2^31 elements, 16 bytes aligned, else what is wrong.
inline std::string output_steps_fault(const SlimCudaResidentConv2d& a) {
  if (a.y_image % 8 != 0 || a.y_row % 8 != 0 || a.y_pixel % 8 != 0) return "a step of y is not a multiple of 8";
  const int64_t down = (a.p - 1) * int64_t(a.y_row), right = (a.q - 1) * int64_t(a.y_pixel);
  if (!product_fits(a.tile_images, a.y_image, 1) || down > kInt32Max || right > kInt32Max ||
      down + right + a.c_out > kInt32Max)
    return "the images of a tile have 2^31 elements of y or more";
  return "";
}

// "" where tensor copies fill the patch, a step's word holds its place and every tile has its thread block, else what
// is wrong.
inline std::string streamed_fault(const SlimCudaResidentConv2d& a, int64_t column) {
  const int64_t loads = int64_t(a.load_rows) * a.load_cols;
  if (a.patch_row != a.load_cols || a.patch_image != loads || a.patch != a.tile_images * loads)
    return "a patch is not what a tensor copy leaves";
  if (std::max({a.tile_images, a.load_rows, a.load_cols}) > 256) return "a patch is more than a tensor copy brings";
  if (int64_t(a.r) * a.s > 32) return "there are more than 32 taps";
  const int64_t reach = (a.r - 1) * int64_t(a.dil_h) * a.patch_row + (a.s - 1) * int64_t(a.dil_w) + 1;
  if (a.slab > 64 || reach >= (1 << 24) / (2 * a.slab)) return "a step's place does not fit 24 bits";
  if (a.slots < 3) return "there are fewer than three places for weights";
  const int64_t tiles = (a.n + a.tile_images - 1) / a.tile_images * ((a.p + a.tile_rows - 1) / a.tile_rows) *
                        ((a.q + a.tile_cols - 1) / a.tile_cols);
  const int64_t columns = (a.c_out + column - 1) / column;
  return tiles > (kInt32Max / 2 - a.blocks) / columns ? "there are too many tiles" : "";
}

inline int cuda_resident_conv2d(const pybind11::args& args) {
  const auto a = struct_of_arguments<SlimCudaResidentConv2d>("cuda_resident_conv2d", args);
  const bool f32 = a.dtype == SLIM_DTYPE_F32, streamed = is_one_of(a.variant, {1, 2});
  std::string fault = tile_plan_fault(a, a.c_in, f32 ? 4 : 2, !streamed);
  if (fault.empty() && f32 && !is_one_of(a.variant, {0, 4, 6}))
    fault = "variant = " + std::to_string(a.variant) + " takes no float32";
  const int64_t column[] = {64, 128, 64, 32, 32, 16, 16};
  const int64_t channels = a.columns * column[a.variant];  // of a thread block
  if (fault.empty() && channels > (is_one_of(a.variant, {2, 4, 6}) ? 64 : 128))
    fault = "columns = " + std::to_string(a.columns) + " is more than the variant has";
  if (fault.empty() && streamed) fault = streamed_fault(a, column[a.variant]);
  if (fault.empty()) fault = output_steps_fault(a);
  if (fault.empty() && !is_one_of(f32 ? 2 * a.slab : a.slab, {16, 32, 64, 128}))
    fault = "slab = " + std::to_string(a.slab) + " is no known width";
  if (fault.empty() && !streamed && a.blocks < (a.c_out + channels - 1) / channels)
    fault = "there are fewer blocks than rows of channels";
  if (!fault.empty()) throw pybind11::value_error("cuda_resident_conv2d: " + fault);
  pybind11::gil_scoped_release release;
  return slim_cuda_resident_conv2d(&a);
}

inline int cuda_stem_conv2d(const pybind11::args& args) {
  const auto a = struct_of_arguments<SlimCudaStemConv2d>("cuda_stem_conv2d", args);
  std::string fault = tile_plan_fault(a, 64);
  if (fault.empty() && (a.p != output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h) ||
                        a.q != output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w)))
    fault = "p or q is not the size of the output";
  if (fault.empty() &&
      (a.w % 2 != 0 || a.load_cols != a.w || a.load_left != a.pad_w || a.tile_cols < a.q || a.tile_images != 1))
    fault = "a tile is not made of whole rows of one image of even width";
  if (fault.empty() && (a.load_rows + 2) * a.w * 3 / 2 > 1024) fault = "the rows of a tile hold more than 1024 words";
  if (!fault.empty()) throw pybind11::value_error("cuda_stem_conv2d: " + fault);
  pybind11::gil_scoped_release release;
  return slim_cuda_stem_conv2d(&a);
}

// "" where no address of a weight gradient wraps and every pixel and piece has its thread block, else what is wrong.
inline std::string weight_gradient_fault(const SlimCudaWeightGradient& a) {
  const int64_t column = 128 >> a.variant, block = int64_t(a.block_out) * a.block_in;
  if (a.c_in % 8 != 0 || a.c_out % 8 != 0) return "c_in and c_out are not multiples of 8";
  if (a.block_out % column != 0 || a.block_in % 16 != 0) return "the blocks are not made of the variant's pieces";
  if (a.elements % block != 0) return "elements is no number of blocks";
  if (a.p != output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h) ||
      a.q != output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w) || a.p < 1 || a.q < 1)
    return "p or q is not the size of the output";
  if (!product_fits(a.p, a.q, a.c_out) || !product_fits(a.h, a.w, a.c_in)) return "an image has 2^31 elements or more";
  const int64_t down = int64_t(a.r - 1) * a.dil_h, right = int64_t(a.s - 1) * a.dil_w;
  if (down > kInt32Max / 2 || right > kInt32Max / 2 || down > (kInt32Max - right - 1) / a.w ||
      !product_fits(down * a.w + right + 1, a.c_in + a.block_in, 1))
    return "the taps reach 2^31 elements or more";
  if (a.part_pixels % 32 != 0) return "part_pixels is not a multiple of 32";
  if (a.n > (INT64_MAX >> 3) / (a.p * a.q * a.c_out) || a.n > (INT64_MAX >> 3) / (a.h * a.w * a.c_in))
    return "n is out of range";
  const int64_t pixels = a.n * a.p * a.q;
  if (a.parts != (pixels - 1) / a.part_pixels + 1) return "the parts are not those of the pixels";
  if (a.step_n != 32 / (a.p * a.q) || a.step_p != 32 % (a.p * a.q) / a.q || a.step_q != 32 % a.q)
    return "the steps are not those of 32 pixels";
  if (a.chunks > kInt32Max / a.parts || a.elements / 1024 >= kInt32Max) return "there are 2^31 thread blocks or more";
  return "";
}

inline int cuda_weight_gradient(const pybind11::args& args) {
  const auto a = struct_of_arguments<SlimCudaWeightGradient>("cuda_weight_gradient", args);
  const std::string fault = weight_gradient_fault(a);
  if (!fault.empty()) throw pybind11::value_error("cuda_weight_gradient: " + fault);
  pybind11::gil_scoped_release release;
  return slim_cuda_weight_gradient(&a);
}

// "" where no offset in a layer of a chain wraps, else what is wrong.
inline std::string chain_layer_fault(const SlimCudaChainLayer& l, int64_t images) {
  if (l.c_in % 8 != 0 || l.c_out % 8 != 0) return "c_in and c_out are not multiples of 8";
  if (l.p <= l.pool || l.q <= l.pool) return "p or q is too small";
  // A group's last blocks may have up to 128 pixels that no image has.
  const int64_t counted = images + 128;
  if (!product_fits(counted * l.h, l.w, l.c_in) || !product_fits(counted * l.p, l.q, l.c_out) ||
      int64_t(l.p) * l.stride_h > kInt32Max / l.w / counted / l.c_in || int64_t(l.q) * l.stride_w > kInt32Max / l.c_in)
    return "the images of a group have 2^31 elements or more";
  // What the kernel divides by the outputs of an image (ChainDivisor), and a block's 256 pixels more.
  const int64_t outputs = int64_t(l.p >> l.pool) * (l.q >> l.pool);
  if (images * outputs + 256 > (int64_t(1) << 32) / outputs) return "the images of a group have too many outputs";
  return "";
}

inline int cuda_chain_conv2d(const pybind11::list& layers, const pybind11::args& args) {
  std::vector<SlimCudaChainLayer> structs;
  for (const pybind11::handle& layer : layers) {
    structs.push_back(struct_of_arguments<SlimCudaChainLayer>("cuda_chain_conv2d", layer.cast<pybind11::args>()));
  }
  pybind11::list numbers;
  numbers.append(reinterpret_cast<intptr_t>(structs.data()));
  for (size_t i = 0; i < args.size(); ++i) {
    if (i == 2) numbers.append(structs.size());  // count
    numbers.append(args[i]);
  }
  const auto a = struct_of_arguments<SlimCudaChain>("cuda_chain_conv2d", pybind11::args(pybind11::tuple(numbers)));
  std::string fault;
  for (const SlimCudaChainLayer& l : structs) {
    if (fault.empty()) fault = chain_layer_fault(l, a.images);
  }
  if (fault.empty() && (a.n + a.images - 1) / a.images > kInt32Max / a.group) fault = "there are 2^31 blocks or more";
  if (!fault.empty()) throw pybind11::value_error("cuda_chain_conv2d: " + fault);
  pybind11::gil_scoped_release release;
  return slim_cuda_chain_conv2d(&a);
}

// How many groups run at the same time, or the negative status.
inline int cuda_chain_groups(int32_t group, int32_t barrier, int32_t dtype, int32_t device) {
  if (group < 1 || group > 1024 || barrier < 0 || barrier > 1 || device < 0)
    throw pybind11::value_error("cuda_chain_groups: group, barrier or device is out of range");
  int32_t groups = 0;
  const int status = slim_cuda_chain_groups(group, barrier, dtype, device, &groups);
  return status == SLIM_OK ? groups : -status;
}

inline int cuda_low_rank_linear(const pybind11::args& args) {
  const auto a = struct_of_arguments<SlimCudaLowRankLinear>("cuda_low_rank_linear", args);
  pybind11::gil_scoped_release release;
  return slim_cuda_low_rank_linear(&a);
}

// "" where what a call describes can be, else what is wrong.
inline std::string low_rank_fault(const SlimCudaLowRank& a) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.y) |
                              reinterpret_cast<uintptr_t>(a.u) | reinterpret_cast<uintptr_t>(a.v) |
                              reinterpret_cast<uintptr_t>(a.partial);
  if (addresses % 16 != 0) return "an address is not a multiple of 16";
  if (a.c_in % 8 != 0 || a.c_out % 8 != 0 || a.u_row % 8 != 0) return "c_in, c_out and u_row are not multiples of 8";
  if (a.rank > a.u_row) return "rank is greater than u_row";
  if (a.rank > (a.variant == 6 ? 128 : 64 << a.variant % 3)) return "rank is greater than the variant's";
  if (a.p != output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h) ||
      a.q != output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w))
    return "p or q is not the size of the output";
  // With room for the rows of a last tile and for a step beyond the last column and the last number of depth.
  if (!product_fits(a.n, a.p, a.q) || a.n * a.p * a.q > kInt32Max - 128) return "there are 2^31 - 128 rows or more";
  if (!product_fits(a.h, a.w, 2 * a.c_in)) return "an image has 2^31 bytes or more";
  if (!product_fits(2 * int64_t(a.r), a.s, a.c_in) || a.c_out > kInt32Max / 2)
    return "c_out or the numbers in a row of v are 2^30 or more";
  if (a.depth_splits > 1 && a.partial == nullptr) return "depth_splits needs room for partial sums";
  return "";
}

inline int cuda_low_rank(const pybind11::args& args) {
  const auto a = struct_of_arguments<SlimCudaLowRank>("cuda_low_rank", args);
  const std::string fault = low_rank_fault(a);
  if (!fault.empty()) throw pybind11::value_error("cuda_low_rank: " + fault);
  pybind11::gil_scoped_release release;
  return slim_cuda_low_rank(&a);
}

}  // namespace slim
