// The tensor-core convolution of float32, which the tensor cores read in TF32: ten bits behind the point of a number,
// as fp16 has, and the exponent of float32. Products are exact and sums are float32.
//
// A step is 32 bytes of depth, 8 channels in place of 16, so everything lies where 16-bit numbers lie and only its
// amount doubles. Weights are rounded to TF32 when they are packed. The input is rounded as it is read: a copy in the
// background brings it to shared memory as it is, and a pass over what arrived would take half as much again of what
// bounds these shapes. Of a stage of 32 channels and 162 places (8x8 pixels, two images), 87.5% zeros, the steps of two
// columns of 64 read 72 KB, 576 clocks at 128 bytes a clock; reading and writing 20.7 KB once more takes 324. Rounding
// in registers takes two instructions a number, a comparison that spares infinite ones and an addition (the compiler
// leaves the low bits, which an HMMA does not read), 32 of a warp's step of 82: its issue slots stay below the 128
// clocks in which shared memory feeds four warps, one on each of a processor's schedulers. In columns of 32 they are
// 123 of 164 clocks, in columns of 16 they are 102 of 148.
//
// The shapes have 64 or 128 channels a thread block, since its weights take twice the memory.
#include "resident_conv2d.cuh"

namespace slim {
namespace {

using Columns2x64 = TileShape<2, 2, 4, 8, 2, false>;     // 128 pixels x 2 columns of 64 channels
using Columns2x32 = TileShape<2, 2, 8, 4, 2, false>;     // 256 pixels x 2 columns of 32
using Columns4x16 = TileShape<2, 2, 8, 2, 2, false, 2>;  // 256 pixels x 4 columns of 16

}  // namespace

int launch_tf32(const SlimCudaResidentConv2d& a) {
  switch (a.variant) {
    case 0: return launch_resident<float, Columns2x64>(a);
    case 4: return launch_resident<float, Columns2x32>(a);
    case 6: return launch_resident<float, Columns4x16>(a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}

}  // namespace slim
