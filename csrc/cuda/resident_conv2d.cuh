// Block-sparse convolution on tensor cores. A thread block keeps the weights of its output channels in shared memory and walks over tiles of
// output pixels, whose input streams through a ring of slabs (a few channels of all pixels that a tile reads).
#pragma once
#include <type_traits>

#include "kernels.h"
#include "tensor_cores.cuh"

namespace slim {

// How the warps of a group share a tile. A warp multiplies 16 M_TILES pixels by 8 N_TILES channels; WARPS_M x WARPS_N warps, always four, are a
// group; GROUPS groups share the weights and each walks over tiles of its own, so that one computes while another waits or stores.
template <int WARPS_M_, int WARPS_N_, int M_TILES_, int N_TILES_, int GROUPS_, bool RESIDENT_, bool WGMMA_>
struct TileShape {
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, M_TILES = M_TILES_, N_TILES = N_TILES_, GROUPS = GROUPS_;
  static constexpr bool RESIDENT = RESIDENT_, WGMMA = WGMMA_;
  static constexpr int PIXELS = WARPS_M * M_TILES * 16;  // of a group's tile
  static constexpr int WINDOWS = PIXELS / 4;             // the tile is made of 2x2 windows
  static constexpr int COLUMN = N_TILES * 8;             // output channels of a warp: one list of steps
  static constexpr int STEP_BYTES = COLUMN * 32;         // weights of a step: COLUMN channels x 16 input channels
  static constexpr int THREADS = GROUPS * 128;
  static_assert(WARPS_M * WARPS_N == 4 && M_TILES % 2 == 0 && N_TILES % 4 == 0, "tile shape");
  static_assert(!WGMMA || (WARPS_N == 1 && RESIDENT), "a warp group multiplies resident weights by all its rows");
};

// Where things lie in shared memory, in bytes; the same for host and device.
struct ResidentLayout {
  int32_t weights, steps, starts, live, windows, pixels, ring, stage, total;
};

template <typename Shape>
__host__ __device__ inline ResidentLayout resident_layout(const SlimCudaResidentConv2d& a) {
  ResidentLayout l;
  const int slabs = int((a.c_in + a.slab - 1) / a.slab);
  l.weights = 0;
  l.steps = Shape::RESIDENT ? a.steps * Shape::STEP_BYTES : 0;
  l.starts = l.steps + (a.steps + 1) * 4;
  l.live = l.starts + Shape::WARPS_N * (slabs + 1) * 4;
  l.windows = (l.live + (slabs + 1) * 4 + 15) / 16 * 16;
  l.pixels = l.windows + Shape::WINDOWS * 16;
  l.ring = (l.pixels + a.tile_images * a.load_rows * a.load_cols * 16 + 127) / 128 * 128;
  l.stage = (a.patch * (a.slab * 2 + 16) + 127) / 128 * 128;
  l.total = l.ring + Shape::GROUPS * a.stages * l.stage;
  return l;
}

namespace {

struct TilePosition {
  int64_t image;
  int32_t y, x;  // of the first output pixel
};

SLIM_DEVICE TilePosition tile_position(const SlimCudaResidentConv2d& a, int tile) {
  const int across = (int(a.q) + a.tile_cols - 1) / a.tile_cols, down = (int(a.p) + a.tile_rows - 1) / a.tile_rows;
  const int image = tile / (across * down), rest = tile % (across * down);
  return {int64_t(image) * a.tile_images, rest / across * a.tile_rows, rest % across * a.tile_cols};
}

// Fills the slabs of the ring, `stages - 1` ahead of their use.
template <typename T, typename Shape>
struct Loader {
  const SlimCudaResidentConv2d& a;
  uint32_t pixels, live, ring;
  int stage_bytes, live_count, tile, tile_step, tiles, at = 0, slot = 0;
  int first_pixel, pixel_step, pixel_count, chunk;
  const T* corner;  // the first pixel of the tile's patch, which may lie outside the image
  int64_t images_left;
  int32_t y, x;

  SLIM_DEVICE void start_tile() {
    if (tile >= tiles) return;
    const TilePosition p = tile_position(a, tile);
    y = p.y * a.stride_h - a.pad_h + a.load_top;
    x = p.x * a.stride_w - a.pad_w + a.load_left;
    images_left = a.n - p.image;
    corner = static_cast<const T*>(a.x) + ((p.image * a.h + y) * a.w + x) * a.c_in;
  }
  SLIM_DEVICE void fill() {
    if (tile < tiles) {
      const int channel = int(hw::load_shared_32(live + at * 4)) * a.slab + chunk * 8;
      const uint32_t to = ring + slot * stage_bytes + chunk * 16;
      const bool stored = channel < a.c_in;
#pragma unroll 4
      for (int i = first_pixel; i < pixel_count; i += pixel_step) {
        const uint4 pixel = hw::load_shared_128(pixels + i * 16);
        const bool inside = stored && int(pixel.w) < images_left && unsigned(y + int(pixel.z >> 16)) < unsigned(a.h) &&
                            unsigned(x + int(pixel.z & 0xffff)) < unsigned(a.w);
        hw::copy_async_16(to + pixel.x, inside ? corner + (int64_t(int(pixel.y)) + channel) : static_cast<const T*>(a.x), inside);
      }
      if (++at == live_count) {
        at = 0;
        tile += tile_step;
        start_tile();
      }
      if (++slot == a.stages) slot = 0;
    }
    hw::copy_async_commit();
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) resident_conv2d_kernel(const __grid_constant__ SlimCudaResidentConv2d a) {
  constexpr int WINDOWS_OF_WARP = Shape::M_TILES * 4;
  const ResidentLayout at = resident_layout<Shape>(a);
  const int thread = int(threadIdx.x), lane = thread & 31, group = thread >> 7, warp = thread >> 5 & 3;
  const int warp_m = warp % Shape::WARPS_M, warp_n = warp / Shape::WARPS_M;
  const uint32_t base = hw::shared_memory();
  const int groups_of_16 = int((a.c_in + 15) / 16), slabs = (int(a.c_in) + a.slab - 1) / a.slab;
  const int columns = (int(a.c_out) + Shape::COLUMN - 1) / Shape::COLUMN, rows = (columns + Shape::WARPS_N - 1) / Shape::WARPS_N;
  const int row = int(blockIdx.x) % rows;
  const int first_column = row * Shape::WARPS_N, end_column = min(first_column + Shape::WARPS_N, columns);
  const int32_t first_step = a.group_start[first_column * (groups_of_16 + 1)];
  const int32_t step_count = a.group_start[(end_column - 1) * (groups_of_16 + 1) + groups_of_16] - first_step;
  const int pitch = a.slab * 2 + 16;

  // Weights first: they come from far away. They arrive with the ring's first slab.
  if (Shape::RESIDENT) {
    const unsigned char* from = static_cast<const unsigned char*>(a.weights) + int64_t(first_step) * Shape::STEP_BYTES;
    for (int i = thread * 16; i < step_count * Shape::STEP_BYTES; i += Shape::THREADS * 16) hw::copy_async_16(base + at.weights + i, from + i, true);
  }
  // Each step's distance from a pixel's place in a slab, each slab's steps, and the slabs that hold any step.
  for (int i = thread; i < step_count; i += Shape::THREADS) {
    const int32_t word = a.taps[first_step + i], tap = word >> 16, part = (word & 0xffff) % (a.slab / 16);
    hw::store_shared_32(base + at.steps + i * 4, (tap / a.s * a.dil_h * a.patch_row + tap % a.s * a.dil_w) * pitch + part * 32);
  }
  for (int i = thread; i < Shape::WARPS_N * (slabs + 1); i += Shape::THREADS) {
    const int column = first_column + i / (slabs + 1), slab = i % (slabs + 1);
    const int32_t* const start = a.group_start + (column < end_column ? column : 0) * (groups_of_16 + 1);
    hw::store_shared_32(base + at.starts + i * 4, column < end_column ? start[min(slab * (a.slab / 16), groups_of_16)] - first_step : 0);
  }
  for (int i = thread; i < Shape::WINDOWS; i += Shape::THREADS) {
    const int across = a.tile_cols / 2, down = a.tile_rows / 2, image = i / (across * down);
    const int y = i % (across * down) / across * 2, x = i % across * 2;
    const bool used = image < a.tile_images;
    const int place = image * a.patch_image + y * a.stride_h * a.patch_row + x * a.stride_w;
    hw::store_shared_128(base + at.windows + i * 16, make_uint4(used ? place : 0, used ? image : 0x7fff, y, x));
  }
  const int loaded = a.load_rows * a.load_cols;
  for (int i = thread; i < a.tile_images * loaded; i += Shape::THREADS) {
    const int image = i / loaded, y = i % loaded / a.load_cols, x = i % a.load_cols;
    const int place = image * a.patch_image + (y + a.load_top) * a.patch_row + x + a.load_left;
    hw::store_shared_128(base + at.pixels + i * 16,
                         make_uint4(place * pitch, ((image * int(a.h) + y) * int(a.w) + x) * int(a.c_in), uint32_t(y) << 16 | x, image));
  }
  // Pixels outside the image stay zero.
  for (int i = thread * 16; i < at.total - at.ring; i += Shape::THREADS * 16) hw::store_shared_128(base + at.ring + i, make_uint4(0, 0, 0, 0));
  hw::synchronize();
  if (thread == 0) {
    int count = 0;
    for (int slab = 0; slab < slabs; ++slab) {
      bool used = false;
      for (int n = 0; n < Shape::WARPS_N; ++n) {
        const uint32_t start = base + at.starts + (n * (slabs + 1) + slab) * 4;
        used |= hw::load_shared_32(start) != hw::load_shared_32(start + 4);
      }
      if (used) hw::store_shared_32(base + at.live + 4 * ++count, slab);
    }
    hw::store_shared_32(base + at.live, count);
  }
  hw::synchronize();
  const int live_count = int(hw::load_shared_32(base + at.live));
  const uint32_t live = base + at.live + 4;

  const int64_t image_tiles = (a.n + a.tile_images - 1) / a.tile_images;
  const int tiles = int(image_tiles) * ((int(a.p) + a.tile_rows - 1) / a.tile_rows) * ((int(a.q) + a.tile_cols - 1) / a.tile_cols);
  // Blocks of one row take tiles in turn, first the first groups of all blocks: few tiles spread over all processors.
  const int blocks_of_row = (int(gridDim.x) - row + rows - 1) / rows;
  const int first_tile = group * blocks_of_row + int(blockIdx.x) / rows, tile_step = blocks_of_row * Shape::GROUPS;
  const uint32_t ring = base + at.ring + group * a.stages * at.stage;
  const int chunks = a.slab / 8;
  Loader<T, Shape> loader{a, base + at.pixels, live, ring, at.stage, live_count, live_count ? first_tile : tiles, tile_step, tiles};
  loader.chunk = (thread & 127) % chunks;
  loader.first_pixel = (thread & 127) / chunks;
  loader.pixel_step = 128 / chunks;
  loader.pixel_count = a.tile_images * loaded;
  loader.start_tile();
  for (int s = 0; s < a.stages - 1; ++s) loader.fill();

  // This lane's rows of the A operand: matrix rows 0 to 7 and 8 to 15 of tile 2 t are the upper and the lower pixel of one column of eight
  // windows, those of tile 2 t + 1 of the other column. Which column goes first alternates between windows whose places would otherwise
  // share banks: a place is an odd multiple of 16 bytes, so eight places with different remainders modulo 8 are free of conflicts.
  uint32_t place[Shape::M_TILES];
  uint32_t swapped = 0;  // bit t: the window of row lane / 4, which this lane stores, has its right column first
#pragma unroll
  for (int t = 0; t < Shape::M_TILES / 2; ++t) {
    const uint32_t windows = base + at.windows + (warp_m * WINDOWS_OF_WARP + t * 8) * 16;
    uint32_t seen = 0, second = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t bit = 1u << (hw::load_shared_32(windows + i * 16) & 7);
      if (seen & bit) second |= 1u << i;
      seen ^= bit;
    }
    const int mine = int(hw::load_shared_32(windows + (lane & 7) * 16)) + (lane & 8 ? a.stride_h * a.patch_row : 0);
    const bool right = second >> (lane & 7) & 1;
    place[2 * t] = uint32_t(mine + (right ? a.stride_w : 0)) * pitch + (lane >> 4) * 16;
    place[2 * t + 1] = uint32_t(mine + (right ? 0 : a.stride_w)) * pitch + (lane >> 4) * 16;
    swapped |= (second >> (lane >> 2) & 1) << t;
  }

  if (Shape::RESIDENT) {
    hw::copy_async_wait<0>();
#if SLIM_HAS_WGMMA
    if (Shape::WGMMA) hw::fence_for_multiply_group();
#endif
    hw::synchronize();
  }
  const int column = first_column + warp_n;
  const uint32_t starts = base + at.starts + warp_n * (slabs + 1) * 4, steps = base + at.steps;
  const uint32_t my_weights = base + at.weights + (Shape::WGMMA ? 0 : lane * 16);
  const unsigned char* const far_weights = static_cast<const unsigned char*>(a.weights) + int64_t(first_step) * Shape::STEP_BYTES + lane * 16;
  const int q = lane & 3;
  int slot = 0;
  for (int tile = first_tile; tile < tiles; tile += tile_step) {
    float sum[Shape::M_TILES][Shape::N_TILES][4];
#pragma unroll
    for (int j = 0; j < Shape::N_TILES; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // column (j, q, e) was packed as channel 32 (j / 4) + 8 q + 2 (j % 4) + e
        const int o = column * Shape::COLUMN + (j >> 2) * 32 + q * 8 + (j & 3) * 2 + e;
        const float bias = a.bias != nullptr && o < a.c_out ? hw::load_number(static_cast<const T*>(a.bias) + o) : 0.0f;
#pragma unroll
        for (int i = 0; i < Shape::M_TILES; ++i) sum[i][j][e] = sum[i][j][e + 2] = bias;
      }
    }
    uint4 ahead[Shape::RESIDENT ? 1 : Shape::N_TILES / 2];
    int next_step = int(hw::load_shared_32(starts));
    if (!Shape::RESIDENT) {
#pragma unroll
      for (int v = 0; v < Shape::N_TILES / 2; ++v) ahead[v] = hw::load_global_128(far_weights + int64_t(next_step) * Shape::STEP_BYTES + v * 512);
    }
    for (int l = 0; l < live_count; ++l) {
      hw::copy_async_wait_all_but(a.stages - 2);
      hw::synchronize(1 + group, 128);
      loader.fill();
      const uint32_t slab = hw::load_shared_32(live + l * 4);
      int step = int(hw::load_shared_32(starts + slab * 4));
      const int end = int(hw::load_shared_32(starts + slab * 4 + 4));
      const uint32_t patch = ring + slot * at.stage;
      if (++slot == a.stages) slot = 0;
#if SLIM_HAS_WGMMA
      if constexpr (Shape::WGMMA) {
        uint32_t rows_of[2][Shape::M_TILES][4];
        const auto multiply = [&](uint32_t (&operand)[Shape::M_TILES][4]) {
          const uint32_t from = patch + hw::load_shared_32(steps + step * 4);
#pragma unroll
          for (int i = 0; i < Shape::M_TILES; ++i) hw::load_matrices(operand[i], place[i] + from);
          const uint64_t b = hw::group_operand(my_weights + step * Shape::STEP_BYTES, Shape::COLUMN * 16, 128);
          hw::multiply_group_fence();
#pragma unroll
          for (int i = 0; i < Shape::M_TILES; ++i) hw::multiply_group<T>(sum[i], operand[i], b);
          hw::multiply_group_commit();
          ++step;
        };
        if (step < end) {
          multiply(rows_of[0]);
          while (step + 1 < end) {
            multiply(rows_of[1]);
            hw::multiply_group_wait<1>();
            multiply(rows_of[0]);
            hw::multiply_group_wait<1>();
          }
          if (step < end) multiply(rows_of[1]);
          hw::multiply_group_wait<0>();
        }
        continue;
      }
#endif
      if constexpr (!Shape::WGMMA) {
        for (; step < end; ++step) {
          const uint32_t from = patch + hw::load_shared_32(steps + step * 4);
          uint32_t pixels[Shape::M_TILES][4];
#pragma unroll
          for (int i = 0; i < Shape::M_TILES; ++i) hw::load_matrices(pixels[i], place[i] + from);
          const int64_t next = step + 1;  // one step of padding follows the last
#pragma unroll
          for (int v = 0; v < Shape::N_TILES / 2; ++v) {
            const uint4 b = Shape::RESIDENT ? hw::load_shared_128(my_weights + step * Shape::STEP_BYTES + v * 512) : ahead[v];
#pragma unroll
            for (int i = 0; i < Shape::M_TILES; ++i) {
              hw::multiply<T>(sum[i][2 * v], pixels[i], b.x, b.y);
              hw::multiply<T>(sum[i][2 * v + 1], pixels[i], b.z, b.w);
            }
            if (!Shape::RESIDENT) ahead[v] = hw::load_global_128(far_weights + next * Shape::STEP_BYTES + v * 512);
          }
        }
      }
    }
    // A lane holds eight neighbouring channels of all four pixels of its windows.
    const TilePosition position = tile_position(a, tile);
    T* const y = static_cast<T*>(a.y);
#pragma unroll
    for (int t = 0; t < Shape::M_TILES / 2; ++t) {
      const uint4 window = hw::load_shared_128(base + at.windows + (warp_m * WINDOWS_OF_WARP + t * 8 + (lane >> 2)) * 16);
      const int64_t image = position.image + window.y;
      const int oy = position.y + int(window.z), ox = position.x + int(window.w);
      if (window.y == 0x7fff || image >= a.n) continue;
      const int turn = swapped >> t & 1;
#pragma unroll
      for (int h = 0; h < Shape::N_TILES / 4; ++h) {
        const int o = column * Shape::COLUMN + h * 32 + q * 8;
        if (o >= a.c_out) continue;
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // the window's pixels, or its maximum
          float v[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            const int j = h * 4 + e / 2, s = e & 1;
            v[e] = sum[2 * t + k / 2][j][k % 2 * 2 + s];
            if (a.pool) v[e] = hw::larger(hw::larger(sum[2 * t][j][s], sum[2 * t][j][2 + s]), hw::larger(sum[2 * t + 1][j][s], sum[2 * t + 1][j][2 + s]));
          }
          const uint4 packed = a.relu ? make_uint4(hw::pack<T, true>(v[0], v[1]), hw::pack<T, true>(v[2], v[3]), hw::pack<T, true>(v[4], v[5]), hw::pack<T, true>(v[6], v[7]))
                                      : make_uint4(hw::pack<T, false>(v[0], v[1]), hw::pack<T, false>(v[2], v[3]), hw::pack<T, false>(v[4], v[5]), hw::pack<T, false>(v[6], v[7]));
          if (a.pool) {
            const int64_t rows_out = a.p / 2, cols_out = a.q / 2;
            if (oy / 2 < rows_out && ox / 2 < cols_out) hw::store_global_128(y + ((image * rows_out + oy / 2) * cols_out + ox / 2) * a.c_out + o, packed);
            break;
          }
          const int py = oy + k % 2, px = ox + (k / 2 ^ turn);
          if (py < a.p && px < a.q) hw::store_global_128(y + ((image * a.p + py) * a.q + px) * a.c_out + o, packed);
        }
      }
    }
  }
  hw::copy_async_wait<0>();
}

}  // namespace
}  // namespace slim
