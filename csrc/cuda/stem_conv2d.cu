#include "stem_conv2d.cuh"

#include "common.cuh"

namespace slim {
namespace {

// By SlimCudaStemConv2d::variant.
using Portable = TileShape<4, 1, 4, 8, 2, false>;  // 256 pixels x 64 channels
using Hopper = TileShape<4, 1, 4, 8, 2, true>;

template <typename T, typename Shape>
int launch(const SlimCudaStemConv2d& a) {
  return launch_kernel(stem_conv2d_kernel<T, Shape>, a, a.blocks, Shape::THREADS, stem_layout<Shape>(a).total,
                       a.overlap != 0);
}

template <typename T>
int dispatch(const SlimCudaStemConv2d& a) {
  switch (a.variant) {
    case 0: return launch<T, Portable>(a);
    case 1: return launch<T, Hopper>(a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_stem_conv2d(const SlimCudaStemConv2d* a) {
  return slim::with_half_type(a->device, a->dtype, [a](auto number) { return slim::dispatch<decltype(number)>(*a); });
}
