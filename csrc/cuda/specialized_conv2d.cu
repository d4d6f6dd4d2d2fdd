#include "specialized_conv2d.cuh"

#include "resident_conv2d.cuh"

namespace slim {
namespace {

using Wide = TileShape<4, 1, 2, 16, 2, true>;     // two groups, 128 pixels x 128 channels
using WideAlone = TileShape<4, 1, 2, 16, 1, true>;  // one group: all of the ring for few tiles
using Narrow = TileShape<4, 1, 4, 8, 2, true>;    // two groups, 256 pixels x 64 channels

}  // namespace

template <typename T>
int launch_specialized_columns(const SlimCudaResidentConv2d& a) {
  switch (a.variant) {
    case 8: return launch_specialized<T, Wide>(a);
    case 9: return launch_specialized<T, WideAlone>(a);
    case 10: return launch_specialized<T, Narrow>(a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}

template int launch_specialized_columns<__half>(const SlimCudaResidentConv2d& a);
template int launch_specialized_columns<__nv_bfloat16>(const SlimCudaResidentConv2d& a);

}  // namespace slim
