// Block-sparse convolution on the BSR weight as stored: a gathered matrix product of
//   rows:  64 output pixels (n, p, q)
//   cols:  up to 64 output channels of one block row
//   depth: the stored columns of that block row, (block, channel inside the block) flattened, so that narrow blocks
//          still fill a stage
#include "common.cuh"

namespace slim {
namespace {

constexpr int ROWS = 64;
constexpr int DEPTH = 16;

template <typename T, int COLS>
__global__ void __launch_bounds__(256) bsr_conv2d_kernel(const SlimCudaBsrConv2d a, int segments, unsigned out_tiles) {
  using Product = TileProduct<ROWS, COLS, DEPTH>;
  __shared__ typename Product::Shared shared;
  __shared__ int64_t image[ROWS];  // offset of the pixel's image in x, -1 beyond the last pixel
  __shared__ int64_t top[ROWS], left[ROWS];

  const T* __restrict__ x = static_cast<const T*>(a.x);
  const T* __restrict__ values = static_cast<const T*>(a.values);
  const int block_row = (blockIdx.x % out_tiles) / segments;
  const int first_out = (blockIdx.x % out_tiles) % segments * COLS;  // inside the block row
  const int64_t first_pixel = int64_t(blockIdx.x / out_tiles) * ROWS;
  const int64_t pixels = a.n * a.p * a.q;
  if (threadIdx.x < ROWS) {
    const int64_t m = first_pixel + threadIdx.x;
    image[threadIdx.x] = m < pixels ? m / (a.p * a.q) * a.h * a.w * a.c_in : -1;
    top[threadIdx.x] = m / a.q % a.p * a.stride_h - a.pad_h;
    left[threadIdx.x] = m % a.q * a.stride_w - a.pad_w;
  }
  __syncthreads();

  const int first_block = a.crow_indices[block_row];
  const int depth = (a.crow_indices[block_row + 1] - first_block) * a.block_in;
  const int groups = int((a.c_in + a.block_in - 1) / a.block_in);
  float sum[Product::I][Product::J];
  Product::run(
      shared, sum, depth,
      [&](int k) {
        const int column = a.col_indices[first_block + k / a.block_in];
        const int tap = column / groups;
        const int64_t c = int64_t(column % groups) * a.block_in + k % a.block_in;
        const int64_t dy = int64_t(tap / a.s) * a.dil_h, dx = int64_t(tap % a.s) * a.dil_w;
        return [&, c, dy, dx](int row) {
          const int64_t iy = top[row] + dy, ix = left[row] + dx;
          const bool inside = image[row] >= 0 && c < a.c_in && iy >= 0 && iy < a.h && ix >= 0 && ix < a.w;
          return inside ? to_float(x[image[row] + (iy * a.w + ix) * a.c_in + c]) : 0.0f;
        };
      },
      [&](int k) {
        const int64_t block = first_block + k / a.block_in;
        const T* at = values + block * a.block_out * a.block_in + k % a.block_in;
        return [&, at](int col) {
          const int out = first_out + col;
          return out < a.block_out ? to_float(at[int64_t(out) * a.block_in]) : 0.0f;
        };
      });

  T* y = static_cast<T*>(a.y);
  const T* bias = static_cast<const T*>(a.bias);
#pragma unroll
  for (int i = 0; i < Product::I; ++i) {
    const int64_t m = first_pixel + threadIdx.x / 16 * Product::I + i;
    if (m >= pixels) continue;
#pragma unroll
    for (int j = 0; j < Product::J; ++j) {
      const int out = first_out + threadIdx.x % 16 + 16 * j;
      const int64_t o = int64_t(block_row) * a.block_out + out;
      if (out < a.block_out && o < a.c_out) y[m * a.c_out + o] = epilogue(sum[i][j], bias, o, a.relu != 0);
    }
  }
}

template <typename T, int COLS>
int launch(const SlimCudaBsrConv2d& a) {
  const int64_t segments = (a.block_out + COLS - 1) / COLS;
  const int64_t out_tiles = (a.c_out + a.block_out - 1) / a.block_out * segments;
  const int64_t row_tiles = (a.n * a.p * a.q + ROWS - 1) / ROWS;
  if (row_tiles > INT32_MAX / out_tiles) return SLIM_ERROR_UNSUPPORTED;
  bsr_conv2d_kernel<T, COLS><<<unsigned(row_tiles * out_tiles), 256, 0, static_cast<cudaStream_t>(a.stream)>>>(
      a, int(segments), unsigned(out_tiles));
  return status(cudaGetLastError());
}

template <typename T>
int dispatch(const SlimCudaBsrConv2d& a) {
  if (a.block_out <= 16) return launch<T, 16>(a);
  if (a.block_out <= 32) return launch<T, 32>(a);
  return launch<T, 64>(a);
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_bsr_conv2d(const SlimCudaBsrConv2d* a) {
  const slim::DeviceGuard guard(a->device);
  if (guard.error() != cudaSuccess) return slim::status(guard.error());
  switch (a->dtype) {
    case SLIM_DTYPE_F32:  return slim::dispatch<float>(*a);
    case SLIM_DTYPE_F16:  return slim::dispatch<__half>(*a);
    case SLIM_DTYPE_BF16: return slim::dispatch<__nv_bfloat16>(*a);
  }
  return SLIM_ERROR_UNSUPPORTED;
}
