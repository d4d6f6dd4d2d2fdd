// The members of SlimBatchNormF32 and what is checked of them.
#pragma once
#include <string>

#include "bindings/members.h"
#include "kernels.h"

namespace slim {

template <>
struct Members<SlimBatchNormF32> {
  using Struct = SlimBatchNormF32;  // BatchNormArguments in slimkernels/kernels/cpu/abi.py
  static constexpr Range kPass = {SLIM_NORM_MOMENTS, SLIM_NORM_INPUT_GRADIENT};
  static constexpr Member list[] = {
      SLIM_MEMBER(x, kAddress),  SLIM_MEMBER(grad, kAddress), SLIM_MEMBER(coefficients, kAddress),
      SLIM_MEMBER(y, kAddress),  SLIM_MEMBER(sums, kAddress), SLIM_MEMBER(n, kImages),
      SLIM_MEMBER(h, kPositive), SLIM_MEMBER(w, kPositive),   SLIM_MEMBER(c, kPositive),
      SLIM_MEMBER(which, kPass), SLIM_MEMBER(relu, kFlag),    SLIM_MEMBER(pool, kFlag),
  };
};
static_assert(members_fill_the_struct<SlimBatchNormF32>());

// What is wrong with the members by what kernels.h asks for, as far as numbers tell; "" where nothing is.
inline std::string batch_norm_fault(const int64_t* numbers, const SlimBatchNormF32& a) {
  const std::string fault = range_fault<SlimBatchNormF32>(numbers);
  if (!fault.empty()) return fault;
  const bool sums = a.which == SLIM_NORM_MOMENTS || a.which == SLIM_NORM_GRADIENT_SUMS;
  const bool gradient = a.which == SLIM_NORM_GRADIENT_SUMS || a.which == SLIM_NORM_INPUT_GRADIENT;
  if (a.x == nullptr || (sums ? (void*)a.sums : (void*)a.y) == nullptr) return "x or what is written is NULL";
  if (a.which != SLIM_NORM_MOMENTS && a.coefficients == nullptr) return "coefficients is NULL";
  if (gradient && a.grad == nullptr) return "grad is NULL";
  if (a.pool && (!a.relu || a.h < 2 || a.w < 2)) return "a pool follows a ReLU and needs an image of 2x2";
  if (!product_fits(a.h, a.w, a.c)) return "an image has 2^31 elements or more";
  return a.n > (INT64_MAX >> 9) / (a.h * a.w * a.c) ? "n is out of range" : "";
}

}  // namespace slim
