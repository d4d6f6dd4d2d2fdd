#include "weight_gradient.cuh"

namespace slim {
namespace {

// The compiled shapes, by SlimCudaWeightGradient::variant; slimkernels/kernels/cuda_gradients.py has the same list.
using Wide = GradientShape<8, 2>;     // 16 pieces of 128 output channels
using Half = GradientShape<4, 4>;     // 32 pieces of 64
using Quarter = GradientShape<2, 4>;  // 32 pieces of 32
using Eighth = GradientShape<1, 4>;   // 32 pieces of 16

template <typename T, typename Shape>
int launch_gradient(const SlimCudaWeightGradient& a) {
  const int failed = launch_kernel(weight_gradient_kernel<T, Shape>, a, a.chunks * a.parts, Shape::THREADS,
                                   gradient_shared_bytes<Shape>(a.stages), false);
  if (failed != SLIM_OK) return failed;
  const int sums = int((a.elements / 4 + kSumThreads - 1) / kSumThreads);
  return launch_kernel(gradient_sum_kernel<T>, a, sums, kSumThreads, 0, false);
}

template <typename T>
int dispatch(const SlimCudaWeightGradient& a) {
  switch (a.variant) {
    case 0: return launch_gradient<T, Wide>(a);
    case 1: return launch_gradient<T, Half>(a);
    case 2: return launch_gradient<T, Quarter>(a);
    case 3: return launch_gradient<T, Eighth>(a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_weight_gradient(const SlimCudaWeightGradient* a) {
  return slim::with_half_type(a->device, a->dtype, [a](auto number) { return slim::dispatch<decltype(number)>(*a); });
}
