// The tensor-core convolution in columns of 16 and 32 output channels, several of which share a thread block's input.
//
// What bounds them is shared memory, which gives a processor 128 bytes in a clock: 16 pixels x 16 channels take 4
// clocks to load for 2 products (a column of 16) or 4 (32). The tensor cores do a product in 1 clock, or in 1.6 at the
// rate that mma.sync is said to reach on Hopper. A warp takes eight such tiles a step, which share the loads of its
// weights:
//   16 channels: 8 * 4 + 4 + 1 = 37 clocks for 16 products, so 43% of the tensor cores' peak
//   32 channels: 8 * 4 + 8 + 1 = 41 clocks for 32 products, so mma.sync is the limit (51 clocks on Hopper)
// Issue slots are not: about 40 and 60 instructions a step and warp, of which a processor does four in a clock.
#include "resident_conv2d.cuh"

namespace slim {
namespace {

using Columns4x32 = TileShape<1, 4, 8, 4, 2, false>;     // 128 pixels x 4 columns of 32 channels
using Columns2x32 = TileShape<2, 2, 8, 4, 2, false>;     // 256 pixels x 2 columns of 32
using Columns8x16 = TileShape<1, 4, 8, 2, 2, false, 2>;  // 128 pixels x 8 columns of 16
using Columns4x16 = TileShape<2, 2, 8, 2, 2, false, 2>;  // 256 pixels x 4 columns of 16

}  // namespace

template <typename T>
int launch_narrow_columns(const SlimCudaResidentConv2d& a) {
  switch (a.variant) {
    case 3: return launch_resident<T, Columns4x32>(a);
    case 4: return launch_resident<T, Columns2x32>(a);
    case 5: return launch_resident<T, Columns8x16>(a);
    case 6: return launch_resident<T, Columns4x16>(a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}

template int launch_narrow_columns<__half>(const SlimCudaResidentConv2d& a);
template int launch_narrow_columns<__nv_bfloat16>(const SlimCudaResidentConv2d& a);

}  // namespace slim
