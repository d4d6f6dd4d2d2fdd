// The members of SlimWeightGradientF32 and what is checked of them.
#pragma once
#include <algorithm>
#include <string>

#include "bindings/members.h"
#include "kernels.h"

namespace slim {

template <>
struct Members<SlimWeightGradientF32> {
  using Struct = SlimWeightGradientF32;  // WeightGradientArguments in slimkernels/kernels/cpu/abi.py
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),           SLIM_MEMBER(grad, kAddress),
      SLIM_MEMBER(values_grad, kAddress), SLIM_MEMBER(crow_indices, kAddress),
      SLIM_MEMBER(col_indices, kAddress), SLIM_MEMBER(n, kImages),
      SLIM_MEMBER(h, kPositive),          SLIM_MEMBER(w, kPositive),
      SLIM_MEMBER(c_in, kPositive),       SLIM_MEMBER(c_out, kPositive),
      SLIM_MEMBER(p, kPositive),          SLIM_MEMBER(q, kPositive),
      SLIM_MEMBER(r, kPositive),          SLIM_MEMBER(s, kPositive),
      SLIM_MEMBER(stride_h, kPositive),   SLIM_MEMBER(stride_w, kPositive),
      SLIM_MEMBER(pad_h, kNatural),       SLIM_MEMBER(pad_w, kNatural),
      SLIM_MEMBER(dil_h, kPositive),      SLIM_MEMBER(dil_w, kPositive),
      SLIM_MEMBER(block_out, kPositive),  SLIM_MEMBER(block_in, kPositive),
  };
};
static_assert(members_fill_the_struct<SlimWeightGradientF32>());

// What is wrong with the members by what kernels.h asks for, as far as numbers tell; "" where nothing is.
inline std::string weight_gradient_fault(const int64_t* numbers, const SlimWeightGradientF32& a) {
  const std::string fault = range_fault<SlimWeightGradientF32>(numbers);
  if (!fault.empty()) return fault;
  if (a.x == nullptr || a.grad == nullptr || a.values_grad == nullptr) return "x, grad or values_grad is NULL";
  if (a.crow_indices == nullptr || a.col_indices == nullptr) return "crow_indices or col_indices is NULL";
  if (a.block_out % 8 != 0) return "block_out = " + std::to_string(a.block_out) + " is no multiple of 8";
  const int64_t groups = (a.c_in + a.block_in - 1) / a.block_in, rows = (a.c_out + a.block_out - 1) / a.block_out;
  if (!product_fits(a.r, a.s, groups) || groups * a.block_in > kInt32Max || rows * a.block_out > kInt32Max ||
      !product_fits(a.block_out, a.block_in, 1))
    return "the weight has 2^31 columns, channels or numbers of a block or more";
  if (!product_fits(a.h, a.w, groups * a.block_in)) return "an image has 2^31 elements or more";
  if (!product_fits(a.p, a.q, rows * a.block_out)) return "an output has 2^31 elements or more";
  if (a.p != output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h) ||
      a.q != output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w))
    return "p or q is not the size of the output";
  const int64_t image = std::max(a.h * a.w * a.c_in, a.p * a.q * a.c_out);
  return a.n > (INT64_MAX >> 3) / image ? "n is out of range" : "";
}

}  // namespace slim
