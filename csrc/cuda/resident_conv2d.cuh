// Block-sparse convolution on tensor cores. A thread block keeps the weights of its output channels in shared memory
// and walks over tiles of output pixels, whose input streams through a ring of slabs: a few channels of all pixels that
// a tile reads.
#pragma once
#include "common.cuh"
#include "sparse_tile.cuh"

namespace slim {

// Launches the shapes of narrow_conv2d.cu.
template <typename T>
int launch_narrow_columns(const SlimCudaResidentConv2d& a);

// Launches the shapes of streamed_conv2d.cu.
template <typename T>
int launch_streamed_columns(const SlimCudaResidentConv2d& a);

// Launches the shapes of tf32_conv2d.cu.
int launch_tf32(const SlimCudaResidentConv2d& a);

// Where things lie in shared memory, in bytes; the same for host and device.
struct ResidentLayout {
  int32_t weights, steps, starts, live, bias, windows, pixels, ring, stage, total;
};

template <typename T, typename Shape>
__host__ __device__ inline ResidentLayout resident_layout(const SlimCudaResidentConv2d& a) {
  ResidentLayout l;
  const int slabs = (int(a.c_in) + a.slab - 1) / a.slab;
  l.weights = 0;
  l.steps = a.steps * Shape::STEP_BYTES;
  l.starts = l.steps + a.steps * 4;
  l.live = l.starts + Shape::COLUMNS * (slabs + 1) * 4;
  l.bias = (l.live + (slabs + 1) * 4 + 15) / 16 * 16;
  l.windows = l.bias + Shape::COLUMNS * Shape::COLUMN * kBiasBytes;
  l.pixels = l.windows + Shape::WINDOWS * 16;
  l.ring = (l.pixels + a.tile_images * a.load_rows * a.load_cols * 16 + 127) / 128 * 128;
  l.stage = (a.patch * (a.slab * int32_t(sizeof(T)) + 16) + 127) / 128 * 128;
  l.total = l.ring + Shape::GROUPS * a.stages * l.stage;
  return l;
}

namespace {

constexpr int kBatch = 4;

// The slab that a tile begins with, of those that hold any step. Thread blocks that all began with the first would read
// the same few bytes of every pixel at the same time, from a part of L2 where a pixel is as long as a power of two.
SLIM_DEVICE int first_slab(int tile, int live_count) { return live_count ? tile % live_count : 0; }

// Fills the slabs of the ring, `stages - 1` ahead of their use. An entry of its table of pixels: place in a slab in
// bytes, distance in x from the patch's corner in bytes, row << 16 | column, and image.
template <typename T>
struct Loader {
  static constexpr int kOfChunk = 16 / int(sizeof(T));  // channels of 16 bytes
  const SlimCudaResidentConv2d& a;
  uint32_t first_pixel, live, ring;  // first_pixel: this thread's entry of the table of pixels
  int stage_bytes, live_count, tile, tile_step, tiles, at = 0, left = 0, slot = 0;  // left: slabs of the tile
  int pixel_step, pixel_count, chunk;  // pixel_count: of the table, from this thread's entry on
  const unsigned char* corner;         // the first pixel of the tile's patch, which may lie outside the image
  int32_t images_left, y, x;

  SLIM_DEVICE void start_tile() {
    if (tile >= tiles) return;
    at = first_slab(tile, live_count);
    left = live_count;
    const TilePosition p = tile_position(a, tile);
    y = p.y * a.stride_h - a.pad_h + a.load_top;
    x = p.x * a.stride_w - a.pad_w + a.load_left;
    images_left = int(a.n - p.image < kNoImage ? a.n - p.image : kNoImage);
    corner = static_cast<const unsigned char*>(a.x) + ((p.image * a.h + y) * a.w + x) * a.c_in * int64_t(sizeof(T));
  }
  SLIM_DEVICE void fill() {
    if (tile < tiles) {
      const int channel = int(hw::load_shared_32(live + at * 4)) * a.slab + chunk * kOfChunk;
      const uint32_t to = ring + slot * stage_bytes + chunk * 16;
      const int images = channel < a.c_in ? images_left : 0;
      const unsigned height = unsigned(a.h), width = unsigned(a.w);
      const unsigned char* const from = corner + channel * int(sizeof(T));
      for (int i = 0; i < pixel_count; i += kBatch * pixel_step) {
        uint4 pixel[kBatch];  // all are read before the first copy: each of these loads takes long
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (i + k * pixel_step < pixel_count) pixel[k] = hw::load_shared_128(first_pixel + (i + k * pixel_step) * 16);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (i + k * pixel_step >= pixel_count) break;
          // No &&: what a branch would save is less than what it costs.
          const bool inside = (int(pixel[k].w) < images) & (unsigned(y + int(pixel[k].z >> 16)) < height) &
                              (unsigned(x + int(pixel[k].z & 0xffff)) < width);
          hw::copy_async_16(to + pixel[k].x, from + int(pixel[k].y), inside);
        }
      }
      if (++at == live_count) at = 0;
      if (--left == 0) {
        tile += tile_step;
        start_tile();
      }
      if (++slot == a.stages) slot = 0;
    }
    hw::copy_async_commit();
  }
};

template <typename T, typename Shape>
SLIM_DEVICE void resident_conv2d(const SlimCudaResidentConv2d& a) {
  static_assert(!Shape::WGMMA, "streamed_conv2d.cuh has the shapes that multiply by wgmma");
  const ResidentLayout at = resident_layout<T, Shape>(a);
  const int thread = int(threadIdx.x), lane = thread & 31, group = thread >> 7, warp = thread >> 5 & 3;
  const int warp_m = warp % Shape::WARPS_M, warp_n = warp / Shape::WARPS_M;
  const uint32_t base = hw::shared_memory();
  constexpr int OF_STEP = kStepChannels<T>;
  const int step_groups = (int(a.c_in) + OF_STEP - 1) / OF_STEP, slabs = (int(a.c_in) + a.slab - 1) / a.slab;
  const int columns = (int(a.c_out) + Shape::COLUMN - 1) / Shape::COLUMN;
  const int rows = (columns + a.columns - 1) / a.columns;
  const int row = int(blockIdx.x) % rows;
  const int first_column = row * a.columns, end_column = min(first_column + a.columns, columns);
  const int32_t first_step = a.group_start[first_column * (step_groups + 1)];
  const int32_t step_count = a.group_start[(end_column - 1) * (step_groups + 1) + step_groups] - first_step;
  const int pitch = a.slab * int(sizeof(T)) + 16;

  hw::let_next_kernel_begin();
  // Weights first: they come from far away. They arrive with the ring's first slab.
  copy_weights<Shape>(base + at.weights, a.weights, first_step, step_count);
  write_steps<T, Shape>(a, base + at.steps, first_step, step_count, a.slab);
  for (int i = thread; i < Shape::COLUMNS * (slabs + 1); i += Shape::THREADS) {  // each slab's steps
    const int column = first_column + i / (slabs + 1), slab = i % (slabs + 1);
    const int32_t* const start = a.group_start + (column < end_column ? column : 0) * (step_groups + 1);
    hw::store_shared_32(base + at.starts + i * 4,
                        column < end_column ? start[min(slab * (a.slab / OF_STEP), step_groups)] - first_step : 0);
  }
  write_windows<Shape>(a, base + at.windows);
  write_bias<T, Shape>(base + at.bias, a.bias, first_column * Shape::COLUMN, a.c_out);
  const int loaded = a.load_rows * a.load_cols;
  for (int i = thread; i < a.tile_images * loaded; i += Shape::THREADS) {
    const int image = i / loaded, y = i % loaded / a.load_cols, x = i % a.load_cols;
    const int place = image * a.patch_image + (y + a.load_top) * a.patch_row + x + a.load_left;
    const int from = ((image * int(a.h) + y) * int(a.w) + x) * int(a.c_in) * int(sizeof(T));
    hw::store_shared_128(base + at.pixels + i * 16, make_uint4(place * pitch, from, uint32_t(y) << 16 | x, image));
  }
  // Pixels that no tile reads stay zero.
  for (int i = thread * 16; i < at.total - at.ring; i += Shape::THREADS * 16) {
    hw::store_shared_128(base + at.ring + i, make_uint4(0, 0, 0, 0));
  }
  hw::synchronize();
  // The slabs that hold any step, their number first.
  const auto used = [&](int slab) {
    bool any = false;
    for (int n = 0; n < Shape::COLUMNS; ++n) {
      const uint32_t start = base + at.starts + (n * (slabs + 1) + slab) * 4;
      any |= hw::load_shared_32(start) != hw::load_shared_32(start + 4);
    }
    return any;
  };
  for (int slab = thread; slab <= slabs; slab += Shape::THREADS) {
    int before = 0;
    for (int i = 0; i < slab; ++i) before += used(i) ? 1 : 0;
    if (slab == slabs) {
      hw::store_shared_32(base + at.live, before);
    } else if (used(slab)) {
      hw::store_shared_32(base + at.live + 4 + before * 4, slab);
    }
  }
  hw::synchronize();
  const int live_count = int(hw::load_shared_32(base + at.live));
  const uint32_t live = base + at.live + 4;

  // Blocks of one row take tiles in turn, first the first groups of all blocks: few tiles spread over all processors.
  const int tiles = tile_count(a);
  const int blocks_of_row = (int(gridDim.x) - row + rows - 1) / rows;
  const int first_tile = group * blocks_of_row + int(blockIdx.x) / rows, tile_step = blocks_of_row * Shape::GROUPS;
  const uint32_t ring = base + at.ring + group * a.stages * at.stage;
  const int chunks = a.slab / Loader<T>::kOfChunk;
  const uint32_t pixels = base + at.pixels + (thread & 127) / chunks * 16;
  const int begin = live_count ? first_tile : tiles;  // without any step there is nothing to load
  Loader<T> loader{a, pixels, live, ring, at.stage, live_count, begin, tile_step, tiles};
  loader.chunk = (thread & 127) % chunks;
  loader.pixel_step = 128 / chunks;
  loader.pixel_count = a.tile_images * loaded - (thread & 127) / chunks;
  loader.start_tile();
  hw::wait_for_previous_kernel();  // which wrote x, or still reads y
  for (int s = 0; s < a.stages - 1; ++s) loader.fill();

  SparseTile<T, Shape> product;
  product.find_places(a, base + at.windows, warp_m, lane, pitch);
  const int column_of_warp = warp_n * Shape::OF_WARP;
  product.channel = (first_column + column_of_warp) * Shape::COLUMN;
  hw::copy_async_wait<0>();
  hw::synchronize();

  const uint32_t starts = base + at.starts + column_of_warp * (slabs + 1) * 4;
  int slot = 0;
  for (int tile = first_tile; tile < tiles; tile += tile_step) {
    product.begin(base + at.bias + column_of_warp * Shape::COLUMN * kBiasBytes, lane);
    int l = first_slab(tile, live_count);
    for (int left = live_count; left > 0; --left) {
      hw::copy_async_wait_all_but(a.stages - 2);
      hw::synchronize(1 + group, 128);
      loader.fill();
      const uint32_t start = starts + hw::load_shared_32(live + l * 4) * 4;
      product.multiply(ring + slot * at.stage, base + at.steps, base + at.weights, int(hw::load_shared_32(start)),
                       int(hw::load_shared_32(start + 4)), lane);
      if constexpr (Shape::OF_WARP == 2) {
        const uint32_t second = start + (slabs + 1) * 4;
        product.template multiply<1>(ring + slot * at.stage, base + at.steps, base + at.weights,
                                     int(hw::load_shared_32(second)), int(hw::load_shared_32(second + 4)), lane);
      }
      if (++slot == a.stages) slot = 0;
      if (++l == live_count) l = 0;
    }
    product.store(a, tile_position(a, tile), min(end_column * Shape::COLUMN, int(a.c_out)), lane);
  }
  hw::copy_async_wait<0>();
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    resident_conv2d_kernel(const __grid_constant__ SlimCudaResidentConv2d a) {
  resident_conv2d<T, Shape>(a);
}

template <typename T, typename Shape>
int launch_resident(const SlimCudaResidentConv2d& a) {
  return launch_kernel(resident_conv2d_kernel<T, Shape>, a, a.blocks, Shape::THREADS,
                       resident_layout<T, Shape>(a).total, a.overlap != 0);
}

}  // namespace
}  // namespace slim
