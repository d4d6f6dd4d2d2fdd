#include "resident_conv2d.cuh"

namespace slim {
namespace {

// The compiled shape of wide columns on any processor, by SlimCudaResidentConv2d::variant; streamed_conv2d.cu has those
// of sm_90a, narrow_conv2d.cu the narrow columns, and tf32_conv2d.cu those of float32.
// slimkernels/kernels/resident_plan.py has the same lists.
using Portable = TileShape<2, 2, 4, 8, 2, false>;  // 128 pixels x 2 columns of 64 channels

template <typename T>
int dispatch(const SlimCudaResidentConv2d& a) {
  switch (a.variant) {
    case 0: return launch_resident<T, Portable>(a);
    case 1:
    case 2: return launch_streamed_columns<T>(a);
  }
  return launch_narrow_columns<T>(a);
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_resident_conv2d(const SlimCudaResidentConv2d* a) {
  if (a->dtype == SLIM_DTYPE_F32) return slim::on_device(a->device, [a] { return slim::launch_tf32(*a); });
  return slim::with_half_type(a->device, a->dtype, [a](auto number) { return slim::dispatch<decltype(number)>(*a); });
}
