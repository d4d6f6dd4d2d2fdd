#include "streamed_conv2d.cuh"

#include "resident_conv2d.cuh"

namespace slim {
namespace {

using StreamedWide = TileShape<4, 1, 2, 16, 2, true>;   // 2 x 128 pixels x 128 channels
using StreamedNarrow = TileShape<4, 1, 4, 8, 2, true>;  // 2 x 256 pixels x 64 channels

}  // namespace

template <typename T>
int launch_streamed_columns(const SlimCudaResidentConv2d& a) {
  switch (a.variant) {
    case 1: return launch_streamed<T, StreamedWide>(a);
    case 2: return launch_streamed<T, StreamedNarrow>(a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}

template int launch_streamed_columns<__half>(const SlimCudaResidentConv2d& a);
template int launch_streamed_columns<__nv_bfloat16>(const SlimCudaResidentConv2d& a);

}  // namespace slim
