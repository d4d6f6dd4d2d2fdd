#include "resident_conv2d.cuh"

#include "common.cuh"

namespace slim {
namespace {

// The compiled shapes, by SlimCudaResidentConv2d::variant; slimkernels/kernels/resident_plan.py has the same list.
using Portable = TileShape<2, 2, 4, 8, 2, false>;  // 128 pixels x 2 columns of 64 channels
using Hopper = TileShape<4, 1, 2, 16, 2, true>;    // 128 pixels x 128 channels
using Narrow = TileShape<4, 1, 4, 8, 2, true>;     // 256 pixels x 64 channels

template <typename T, typename Shape>
int launch(const SlimCudaResidentConv2d& a) {
  return launch_kernel(resident_conv2d_kernel<T, Shape>, a, a.blocks, Shape::THREADS, resident_layout<Shape>(a).total,
                       a.overlap != 0);
}

template <typename T>
int dispatch(const SlimCudaResidentConv2d& a) {
  switch (a.variant) {
    case 0: return launch<T, Portable>(a);
    case 1: return launch<T, Hopper>(a);
    case 2: return launch<T, Narrow>(a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_resident_conv2d(const SlimCudaResidentConv2d* a) {
  const slim::DeviceGuard guard(a->device);
  if (guard.error() != cudaSuccess) return slim::status(guard.error());
  switch (a->dtype) {
    case SLIM_DTYPE_F16:  return slim::dispatch<__half>(*a);
    case SLIM_DTYPE_BF16: return slim::dispatch<__nv_bfloat16>(*a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}
