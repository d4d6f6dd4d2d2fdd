#include "low_rank.cuh"

#include "common.cuh"

namespace slim {
namespace {

// The compiled shapes, by SlimCudaLowRank::variant; slimkernels/kernels/low_rank_plan.py has the same list.
using Few64 = LowRankShape<1, 2, 1, 64, 64>;  // 16 rows
using Few128 = LowRankShape<1, 4, 1, 128, 128>;
using Few256 = LowRankShape<1, 4, 1, 256, 128>;
using Some64 = LowRankShape<2, 2, 2, 64, 64>;  // 64 rows
using Some128 = LowRankShape<2, 2, 2, 128, 128>;
using Some256 = LowRankShape<2, 4, 2, 256, 256>;
using Many128 = LowRankShape<4, 2, 2, 128, 128>;  // 128 rows

template <typename T, typename Shape>
int launch_part(const SlimCudaLowRank& a, LowRankPart part, int64_t tiles, int32_t splits, bool overlap) {
  return launch_kernel(low_rank_kernel<T, Shape>, LowRankArgs{a, part}, int(tiles * splits), Shape::THREADS,
                       low_rank_shared_bytes<Shape>(a.stages), overlap);
}

template <typename T, typename Shape>
int launch(const SlimCudaLowRank& a) {
  const int64_t tiles = (a.n * a.p * a.q + Shape::ROWS - 1) / Shape::ROWS;
  if (tiles > INT32_MAX / a.splits || tiles > INT32_MAX / a.depth_splits) return SLIM_ERROR_UNSUPPORTED;
  if (a.depth_splits == 1) return launch_part<T, Shape>(a, kBoth, tiles, a.splits, false);
  const int first = launch_part<T, Shape>(a, kFirst, tiles, a.depth_splits, false);
  return first != SLIM_OK ? first : launch_part<T, Shape>(a, kSecond, tiles, a.splits, a.overlap != 0);
}

template <typename T>
int dispatch(const SlimCudaLowRank& a) {
  switch (a.variant) {
    case 0: return launch<T, Few64>(a);
    case 1: return launch<T, Few128>(a);
    case 2: return launch<T, Few256>(a);
    case 3: return launch<T, Some64>(a);
    case 4: return launch<T, Some128>(a);
    case 5: return launch<T, Some256>(a);
    case 6: return launch<T, Many128>(a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_low_rank(const SlimCudaLowRank* a) {
  return slim::with_half_type(a->device, a->dtype, [a](auto number) { return slim::dispatch<decltype(number)>(*a); });
}
