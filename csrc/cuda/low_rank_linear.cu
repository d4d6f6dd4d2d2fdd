// Fused low-rank linear layer: a CTA keeps the (32 x rank) product of its rows with V^T in shared memory and multiplies
// it by U^T from there, so the intermediate never reaches global memory and one launch does both factors.
#include "common.cuh"

namespace slim {
namespace {

constexpr int ROWS = 32;
constexpr int COLS = 64;
constexpr int DEPTH = 32;
using Product = TileProduct<ROWS, COLS, DEPTH>;

// Two CTAs a multiprocessor: left alone, ptxas 13.0 aims for five (48 registers) on sm_90a and spills for it.
template <typename T>
__global__ void __launch_bounds__(256, 2) low_rank_linear_kernel(const SlimCudaLowRankLinear a) {
  __shared__ Product::Shared shared;
  extern __shared__ float inner[];  // (rank, ROWS + 1)

  const T* __restrict__ x = static_cast<const T*>(a.x);
  const T* __restrict__ u = static_cast<const T*>(a.u);
  const T* __restrict__ v = static_cast<const T*>(a.v);
  const T* bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  const int64_t first_row = int64_t(blockIdx.x) * ROWS;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int rank = int(a.rank);
  float sum[Product::I][Product::J];

  for (int r0 = 0; r0 < rank; r0 += COLS) {
    Product::run(
        shared, sum, int(a.in),
        [&](int k) {
          return [&, k](int row) { return first_row + row < a.m ? to_float(x[(first_row + row) * a.in + k]) : 0.0f; };
        },
        [&, r0](int k) {
          return [&, r0, k](int col) { return r0 + col < rank ? to_float(v[(r0 + col) * a.in + k]) : 0.0f; };
        });
#pragma unroll
    for (int i = 0; i < Product::I; ++i) {
#pragma unroll
      for (int j = 0; j < Product::J; ++j) {
        const int r = r0 + tx + 16 * j;
        if (r < rank) inner[r * (ROWS + 1) + ty * Product::I + i] = sum[i][j];
      }
    }
  }
  __syncthreads();

  for (int64_t o0 = 0; o0 < a.out; o0 += COLS) {
    Product::run(
        shared, sum, rank, [&](int k) { return [&, k](int row) { return inner[k * (ROWS + 1) + row]; }; },
        [&, o0](int k) {
          return [&, o0, k](int col) { return o0 + col < a.out ? to_float(u[(o0 + col) * a.rank + k]) : 0.0f; };
        });
#pragma unroll
    for (int i = 0; i < Product::I; ++i) {
      const int64_t m = first_row + ty * Product::I + i;
      if (m >= a.m) continue;
#pragma unroll
      for (int j = 0; j < Product::J; ++j) {
        const int64_t o = o0 + tx + 16 * j;
        if (o < a.out) y[m * a.out + o] = epilogue(sum[i][j], bias, o, a.relu != 0);
      }
    }
  }
}

template <typename T>
int launch(const SlimCudaLowRankLinear& a) {
  const int64_t tiles = (a.m + ROWS - 1) / ROWS;
  if (tiles > INT32_MAX || a.in > INT32_MAX || a.rank > SLIM_CUDA_MAX_FUSED_RANK) return SLIM_ERROR_UNSUPPORTED;
  const int bytes = int(a.rank) * (ROWS + 1) * int(sizeof(float));
  const cudaError_t error =
      cudaFuncSetAttribute(low_rank_linear_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return status(error);
  low_rank_linear_kernel<T><<<unsigned(tiles), 256, bytes, static_cast<cudaStream_t>(a.stream)>>>(a);
  return status(cudaGetLastError());
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_low_rank_linear(const SlimCudaLowRankLinear* a) {
  const slim::DeviceGuard guard(a->device);
  if (guard.error() != cudaSuccess) return slim::status(guard.error());
  switch (a->dtype) {
    case SLIM_DTYPE_F32:  return slim::launch<float>(*a);
    case SLIM_DTYPE_F16:  return slim::launch<__half>(*a);
    case SLIM_DTYPE_BF16: return slim::launch<__nv_bfloat16>(*a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}
