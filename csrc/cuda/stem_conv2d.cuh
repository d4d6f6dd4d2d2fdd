// The first two convolutions of a network in one kernel: a dense 3x3 one of an image of at most three channels, with
// ReLU, and the block-sparse one behind it. What lies between them never leaves shared memory.
#pragma once
#include "sparse_tile.cuh"

namespace slim {

constexpr int kStemChannels = 64;                        // of the first convolution
constexpr int kStemPitch = kStemChannels * 2 + 16;       // bytes between places
constexpr int kStemFirstBytes = kStemChannels * 32 * 2;  // its weights: 64 channels x 32, 3 x 10 of them used

// Where things lie in shared memory, in bytes. An image row is a pixel of border, its pixels and another border, three
// channels each; it is held twice, the second time two bytes on, so that every pixel finds its neighbours at a multiple
// of four bytes in one of them.
struct StemLayout {
  int32_t weights, first, steps, bias, windows, pixels, groups, rows, row, copy, group, total;
};

template <typename Shape>
__host__ __device__ inline StemLayout stem_layout(const SlimCudaStemConv2d& a) {
  StemLayout l;
  l.weights = 0;
  l.first = a.steps * Shape::STEP_BYTES;
  l.steps = l.first + kStemFirstBytes;
  l.bias = (l.steps + a.steps * 4 + 15) / 16 * 16;  // of the second convolution, then of the first
  l.windows = l.bias + 2 * kStemChannels * kBiasBytes;
  l.pixels = l.windows + Shape::WINDOWS * 16;
  l.groups = (l.pixels + (a.load_rows * a.load_cols + 63) / 64 * 64 * 16 + 127) / 128 * 128;
  l.rows = (a.patch * kStemPitch + 127) / 128 * 128;  // from a group's begin
  l.row = ((a.load_cols + 2) * 6 + 4 + 15) / 16 * 16;
  l.copy = (a.load_rows + 2) * l.row;
  l.group = (l.rows + 2 * l.copy + 127) / 128 * 128;
  l.total = l.groups + Shape::GROUPS * l.group;
  return l;
}

namespace {

constexpr int kStemWordsOfThread = 8;

// The image rows of a tile, three channels, on their way from global to shared memory through registers.
template <typename T, typename Shape>
struct StemRows {
  uint32_t words[kStemWordsOfThread];

  // Words of two numbers; a row begins at an even number in memory because rows are whole and their length is even.
  SLIM_DEVICE static int words_of_row(const SlimCudaStemConv2d& a) { return int(a.w) * 3 / 2; }

  SLIM_DEVICE void load(const SlimCudaStemConv2d& a, int tile, int tiles, int thread) {
    if (tile >= tiles) return;
    const TilePosition position = tile_position(a, tile);
    const int top = position.y - a.pad_h + a.load_top - 1, of_row = words_of_row(a);
    const uint32_t* const from = static_cast<const uint32_t*>(a.x) + position.image * a.h * of_row;
#pragma unroll
    for (int k = 0; k < kStemWordsOfThread; ++k) {
      const int i = thread + k * 128, row = top + i / of_row;
      const bool read = i < (a.load_rows + 2) * of_row && unsigned(row) < unsigned(a.h);
      words[k] = read ? hw::load_global_32(from + row * of_row + i % of_row) : 0;
    }
  }
  SLIM_DEVICE void store(const SlimCudaStemConv2d& a, const StemLayout& at, uint32_t rows, int thread) const {
    const int of_row = words_of_row(a);
#pragma unroll
    for (int k = 0; k < kStemWordsOfThread; ++k) {
      const int i = thread + k * 128;
      if (i >= (a.load_rows + 2) * of_row) break;
      const uint32_t to = rows + i / of_row * at.row + i % of_row * 4;  // behind the border's three numbers
      hw::store_shared_16(to + 6, words[k] & 0xffff);
      hw::store_shared_16(to + 8, words[k] >> 16);
      hw::store_shared_32(to + at.copy + 8, words[k]);
    }
  }
};

// One group's first convolution: fills the patch from the image rows.
template <typename T, typename Shape>
SLIM_DEVICE void fill_patch(const SlimCudaStemConv2d& a, const StemLayout& at, uint32_t base, uint32_t patch, int tile,
                            int warp, int lane) {
  const int g = lane >> 2, q = lane & 3, pixels = a.load_rows * a.load_cols;
  const uint32_t rows = patch + at.rows;
  const TilePosition position = tile_position(a, tile);
  const int y0 = position.y - a.pad_h + a.load_top;
  // Of the 32 products of a pixel, ten belong to each row of taps: three pixels of three channels, and one that is
  // not wanted.
  uint32_t offset[4], mask[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = q + i * 4;
    offset[i] = pair == 15 ? 0 : pair / 5 * at.row + pair % 5 * 4;
    mask[i] = pair == 15 ? 0 : pair % 5 == 4 ? 0x0000ffffu : 0xffffffffu;
  }
  for (int m = warp * 16; m < (pixels + 63) / 64 * 64; m += 64) {
    const uint4 upper = hw::load_shared_128(base + at.pixels + (m + g) * 16);
    const uint4 lower = hw::load_shared_128(base + at.pixels + (m + 8 + g) * 16);
    uint32_t operand[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      operand[i / 2][i % 2 * 2] = hw::load_shared_32(rows + upper.y + offset[i]) & mask[i];
      operand[i / 2][i % 2 * 2 + 1] = hw::load_shared_32(rows + lower.y + offset[i]) & mask[i];
    }
    float sum[8][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint4 four =
          hw::load_shared_128(base + at.bias + kStemChannels * kBiasBytes + (j >> 2) * 256 + q * 64 + (j & 3) * 16);
      sum[j][0] = hw::float_of_bits(four.x);
      sum[j][1] = hw::float_of_bits(four.y);
      sum[j][2] = hw::float_of_bits(four.z);
      sum[j][3] = hw::float_of_bits(four.w);
    }
#if SLIM_HAS_WGMMA
    if constexpr (Shape::WGMMA) {
      hw::settle(sum);
      hw::multiply_group_fence();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        hw::multiply_group<T>(sum, operand[k], hw::group_operand(base + at.first + k * 2048, 1024, 128));
      }
      hw::multiply_group_commit();
      hw::multiply_group_wait<0>();
      hw::settle(sum);
    }
#endif
    if constexpr (!Shape::WGMMA) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const uint4 b = hw::load_shared_128(base + at.first + k * 2048 + v * 512 + lane * 16);
          hw::multiply<T>(sum[2 * v], operand[k], b.x, b.y);
          hw::multiply<T>(sum[2 * v + 1], operand[k], b.z, b.w);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 pixel = half == 0 ? upper : lower;
      if (pixel.w == kNoImage) continue;
      const bool inside = unsigned(y0 + int(pixel.z)) < unsigned(a.h);  // outside of the image is zero, not relu(bias)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = h * 4, s = half * 2;
        const float v[8] = {sum[j][s],     sum[j][s + 1],     sum[j + 1][s], sum[j + 1][s + 1],
                            sum[j + 2][s], sum[j + 2][s + 1], sum[j + 3][s], sum[j + 3][s + 1]};
        const uint4 packed = eight_packed<T>(v, true);
        hw::store_shared_128(patch + pixel.x + h * 64 + q * 16, inside ? packed : make_uint4(0, 0, 0, 0));
      }
    }
  }
}

template <typename T, typename Shape>
SLIM_DEVICE void stem_conv2d(const SlimCudaStemConv2d& a) {
  static_assert(Shape::WARPS_N == 1 && Shape::COLUMN == 64, "one column of 64 channels");
  const StemLayout at = stem_layout<Shape>(a);
  const int thread = int(threadIdx.x), lane = thread & 31, group = thread >> 7, warp = thread >> 5 & 3;
  const uint32_t base = hw::shared_memory(), patch = base + at.groups + group * at.group;
  const int tiles = tile_count(a), tile_step = int(gridDim.x) * Shape::GROUPS;

  hw::let_next_kernel_begin();
  copy_weights<Shape>(base + at.weights, a.weights, 0, a.steps);
  for (int i = thread * 16; i < kStemFirstBytes; i += Shape::THREADS * 16) {
    hw::copy_async_16(base + at.first + i, static_cast<const unsigned char*>(a.first_weights) + i, true);
  }
  hw::copy_async_commit();
  int tile = group * int(gridDim.x) + int(blockIdx.x);
  write_steps<T, Shape>(a, base + at.steps, 0, a.steps, kStemChannels);
  write_windows<Shape>(a, base + at.windows);
  write_bias<T, Shape>(base + at.bias, a.bias, 0, a.c_out);
  write_bias<T, Shape>(base + at.bias + kStemChannels * kBiasBytes, a.first_bias, 0, kStemChannels);
  const int pixels = a.load_rows * a.load_cols;
  for (int i = thread; i < (pixels + 63) / 64 * 64; i += Shape::THREADS) {
    const int y = i / a.load_cols, x = i % a.load_cols;
    const uint32_t from = i < pixels ? uint32_t(y * at.row + x * 6 + (x & 1 ? at.copy + 2 : 0)) : 0;
    const int place = (y + a.load_top) * a.patch_row + x + a.load_left;
    hw::store_shared_128(base + at.pixels + i * 16, make_uint4(place * kStemPitch, from, y, i < pixels ? 0 : kNoImage));
  }
  for (int i = thread * 16; i < at.total - at.groups; i += Shape::THREADS * 16) {
    hw::store_shared_128(base + at.groups + i, make_uint4(0, 0, 0, 0));
  }
  hw::wait_for_previous_kernel();  // which wrote x, or still reads y
  StemRows<T, Shape> rows;
  rows.load(a, tile, tiles, thread & 127);
  hw::copy_async_wait<0>();
#if SLIM_HAS_WGMMA
  if (Shape::WGMMA) hw::fence_for_multiply_group();
#endif
  hw::synchronize();

  SparseTile<T, Shape> product;
  product.find_places(a, base + at.windows, warp, lane, kStemPitch);
  product.channel = 0;
  for (; tile < tiles; tile += tile_step) {
    rows.store(a, at, patch + at.rows, thread & 127);
    hw::synchronize(1 + group, 128);  // the rows are there, and nobody multiplies the last patch any more
    rows.load(a, tile + tile_step, tiles, thread & 127);
    fill_patch<T, Shape>(a, at, base, patch, tile, warp, lane);
    hw::synchronize(1 + group, 128);  // the patch is there, and nobody reads the rows any more
    product.begin(base + at.bias, lane);
    product.multiply(patch, base + at.steps, base + at.weights, 0, a.steps, lane);
    product.store(a, tile_position(a, tile), int(a.c_out), lane);
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) stem_conv2d_kernel(const __grid_constant__ SlimCudaStemConv2d a) {
  if constexpr (!Shape::WGMMA || SLIM_HAS_WGMMA) {
    stem_conv2d<T, Shape>(a);
  } else {
    hw::stop();  // compiled for another processor: the launcher does not choose it
  }
}

}  // namespace
}  // namespace slim
