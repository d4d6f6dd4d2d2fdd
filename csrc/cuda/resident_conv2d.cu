#include "resident_conv2d.cuh"

namespace slim {
namespace {

// The compiled shapes of wide columns, by SlimCudaResidentConv2d::variant; narrow_conv2d.cu has the others, and
// tf32_conv2d.cu those of float32. slimkernels/kernels/resident_plan.py has the same lists.
using Portable = TileShape<2, 2, 4, 8, 2, false>;   // 128 pixels x 2 columns of 64 channels
using Hopper = TileShape<4, 1, 2, 16, 2, true>;     // 128 pixels x 128 channels
using Narrow = TileShape<4, 1, 4, 8, 2, true>;      // 256 pixels x 64 channels
using HopperHalf = TileShape<4, 1, 2, 8, 2, true>;  // 128 pixels x 64 channels

template <typename T>
int dispatch(const SlimCudaResidentConv2d& a) {
  switch (a.variant) {
    case 0: return launch_resident<T, Portable>(a);
    case 1: return launch_resident<T, Hopper>(a);
    case 2: return launch_resident<T, Narrow>(a);
    case 7: return launch_resident<T, HopperHalf>(a);
  }
  return a.variant < 8 ? launch_narrow_columns<T>(a) : launch_streamed_columns<T>(a);
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_resident_conv2d(const SlimCudaResidentConv2d* a) {
  if (a->dtype == SLIM_DTYPE_F32) return slim::on_device(a->device, [a] { return slim::launch_tf32(*a); });
  return slim::with_half_type(a->device, a->dtype, [a](auto number) { return slim::dispatch<decltype(number)>(*a); });
}
