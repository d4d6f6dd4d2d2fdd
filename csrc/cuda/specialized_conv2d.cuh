// Block-sparse convolution for sm_90a whose warps specialise: some only load, the others only multiply. As in
// resident_conv2d.cuh a thread block keeps the weights of its output channels in shared memory and walks over tiles of
// output pixels, whose input streams through a ring of slabs. Here a group of four warps never waits for a copy that it
// has to issue itself, products stay on their way while the next pixels are read, and shared memory holds no borders: a
// pixel outside of the image is read from a place that is zero.
#pragma once
#include "common.cuh"
#include "loader.cuh"
#include "sparse_tile.cuh"

namespace slim {

constexpr int kMostTaps = 32;                // one bit each says whether a pixel has the tap
constexpr uint32_t kStepPlace = 0xffffff;    // of a step's word: bytes from a pixel's place; above them its tap
constexpr int kZeroBytes = 128;              // all 32 banks

// Where things lie in shared memory, in bytes; the same for host and device.
struct SpecializedLayout {
  int32_t weights, steps, slabs, bias, windows, pixels, barriers, zeros, ring, stage, total;
};

template <typename Shape>
__host__ __device__ inline SpecializedLayout specialized_layout(const SlimCudaResidentConv2d& a) {
  SpecializedLayout l;
  const int slabs = (int(a.c_in) + a.slab - 1) / a.slab;
  l.weights = 0;
  l.steps = a.steps * Shape::STEP_BYTES;
  l.slabs = (l.steps + a.steps * 4 + 15) / 16 * 16;
  l.bias = l.slabs + (slabs + 1) * 16;
  l.windows = l.bias + Shape::COLUMN * kBiasBytes;
  l.pixels = l.windows + Shape::WINDOWS * 16;
  l.barriers = l.pixels + a.tile_images * a.load_rows * a.load_cols * 16;
  l.zeros = (l.barriers + Shape::GROUPS * a.stages * 16 + slabs * 8 + 127) / 128 * 128;
  l.ring = l.zeros + kZeroBytes;
  l.stage = (a.patch * a.slab * 2 + 127) / 128 * 128;
  l.total = l.ring + Shape::GROUPS * a.stages * l.stage;
  return l;
}

namespace {

// Four warps load, for all groups.
template <typename Shape>
constexpr int kLoadingThreads = 128 / Shape::GROUPS;  // of a group
template <typename Shape>
constexpr int kSpecializedThreads = Shape::THREADS + 128;

// Bits that a place's number changes in its chunks' so that eight pixels whose numbers differ modulo 8 lie in different
// banks: a slab of 64 channels is all banks wide, one of 32 half of them.
SLIM_DEVICE uint32_t swizzle_mask(const SlimCudaResidentConv2d& a) { return uint32_t(a.slab * 2 - 16); }
SLIM_DEVICE uint32_t swizzled(uint32_t place, uint32_t mask) { return place ^ ((place >> 3) & mask); }

// The barriers of a place in the ring: its pixels are there, and they are not needed any more. Behind those of all groups
// every slab has one for its weights.
struct RingBarriers {
  uint32_t full, free;
};
SLIM_DEVICE RingBarriers ring_barriers(uint32_t first, int slot) { return {first + slot * 16, first + slot * 16 + 8}; }

// Where eight images or more are a tile, an instruction's eight windows are the same one of eight images, whose places
// differ modulo 8 if the distance between two images is odd.
template <typename Shape>
SLIM_DEVICE void write_windows_by_image(const SlimCudaResidentConv2d& a, uint32_t windows, int thread) {
  const int across = a.tile_cols / 2, of_image = across * (a.tile_rows / 2);
  const int together = a.tile_images % 8 == 0 ? 8 : 1;
  const OutputSteps step = output_steps(a);
  for (int i = thread; i < Shape::WINDOWS; i += Shape::THREADS) {
    const int rest = i % (of_image * together), window = rest / together;
    const int image = i / (of_image * together) * together + rest % together;
    const int y = window / across * 2, x = window % across * 2;
    const bool used = image < a.tile_images;
    const int place =
        image * a.patch_image + (y * a.stride_h - a.load_top) * a.patch_row + x * a.stride_w - a.load_left;
    const int out = image * step.image + (a.pool ? y / 2 : y) * step.row + (a.pool ? x / 2 : x) * step.pixel;
    hw::store_shared_128(windows + i * 16,
                         make_uint4(used ? place : 0, out, uint32_t(y) << 16 | x, used ? image : kNoImage));
  }
}

// The pixels and channels of one lane, and the products' sums.
template <typename T, typename Shape>
struct SpecializedTile : SparseTile<T, Shape> {
  using Base = SparseTile<T, Shape>;
  int from[Shape::M_TILES];          // bytes from a slab's begin, as a step of no distance reads; may be negative
  uint32_t inside[Shape::M_TILES];   // the taps that lie in the image

  SLIM_DEVICE void find(const SlimCudaResidentConv2d& a, uint32_t all_windows, int warp, int lane) {
    this->swapped = 0;
    this->windows = all_windows + warp * Shape::WINDOWS_OF_WARP * 16;
    const int pitch = a.slab * 2;
#pragma unroll
    for (int t = 0; t < Shape::M_TILES / 2; ++t) {
      uint32_t seen = 0, second = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t bit = 1u << (hw::load_shared_32(this->windows + (t * 8 + i) * 16) & 7);
        if (seen & bit) second |= 1u << i;
        seen ^= bit;
      }
      const uint4 window = hw::load_shared_128(this->windows + (t * 8 + (lane & 7)) * 16);
      const int lower = lane >> 3 & 1;
      const int y = (int(window.z >> 16) + lower) * a.stride_h - a.load_top;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int right = int(second >> (lane & 7) & 1) ^ side;
        const int x = (int(window.z & 0xffff) + right) * a.stride_w - a.load_left;
        const int place = int(window.x) + lower * a.stride_h * a.patch_row + right * a.stride_w;
        uint32_t taps = 0;
        for (int r = 0; r < a.r; ++r) {
          for (int s = 0; s < a.s; ++s) {
            const bool found = (unsigned(y + r * a.dil_h) < unsigned(a.load_rows)) &
                               (unsigned(x + s * a.dil_w) < unsigned(a.load_cols)) & (window.w != kNoImage);
            taps |= uint32_t(found) << (r * a.s + s);
          }
        }
        from[2 * t + side] = place * pitch + (lane >> 4) * 16;
        inside[2 * t + side] = taps;
      }
      this->swapped |= (second >> (lane >> 2) & 1) << t;
    }
  }
};

#if SLIM_HAS_WGMMA
// Multiplies the tiles of one group, by its four warps.
template <typename T, typename Shape>
SLIM_DEVICE void multiply_tiles(const SlimCudaResidentConv2d& a, const SpecializedLayout& at, uint32_t base, int group,
                                int warp, int lane, int column, int tile, int tile_step, int tiles) {
  SpecializedTile<T, Shape> product;
  product.find(a, base + at.windows, warp, lane);
  product.channel = column * Shape::COLUMN;
  const int live_count = int(hw::load_shared_32(base + at.slabs));
  const int step_count = int(hw::load_shared_32(base + at.slabs + 4));
  const uint32_t live = base + at.slabs + 16, barriers = base + at.barriers + group * a.stages * 16;
  const uint32_t ring = base + at.ring + group * a.stages * at.stage, zeros = base + at.zeros;
  const uint32_t steps = base + at.steps, weights = base + at.weights, mask = swizzle_mask(a);
  const uint32_t weight_barriers = base + at.barriers + Shape::GROUPS * a.stages * 16;
  int slot = 0, phase = 0, weights_awaited = 0;
  uint32_t pixels[2][Shape::M_TILES][4];
  for (; tile < tiles; tile += tile_step) {
    product.begin(base + at.bias, lane);
    int next = first_slab(tile, live_count), step = 0, end = 0;
    const auto add = [&](uint32_t (&operand)[Shape::M_TILES][4]) {
      const RingBarriers ring_at = ring_barriers(barriers, slot);
      if (step == end) {
        const uint4 entry = hw::load_shared_128(live + next * 16);
        step = int(entry.y);
        end = int(entry.z);
        if (weights_awaited < live_count) {
          hw::mbarrier_wait(weight_barriers + next * 8, 0);
          ++weights_awaited;
        }
        if (++next == live_count) next = 0;
        hw::mbarrier_wait(ring_at.full, phase);
      }
      const uint32_t word = hw::load_shared_32(steps + step * 4), tap = word >> 24;
      const uint32_t begin = ring + slot * at.stage;
#pragma unroll
      for (int i = 0; i < Shape::M_TILES; ++i) {
        const uint32_t place = swizzled(uint32_t(product.from[i]) + (word & kStepPlace), mask);
        const bool there = product.inside[i] >> tap & 1;
        hw::load_matrices(operand[i], there ? begin + place : zeros + (place & (kZeroBytes - 1)));
      }
      const uint64_t b = hw::group_operand(weights + step * Shape::STEP_BYTES, Shape::COLUMN * 16, 128);
      hw::multiply_group_fence();
#pragma unroll
      for (int i = 0; i < Shape::M_TILES; ++i) hw::multiply_group<T>(product.sums[0][i], operand[i], b);
      hw::multiply_group_commit();
      if (++step == end) {  // the slab's pixels are in registers
        hw::synchronize_warp();
        if (lane == 0) hw::mbarrier_arrive(ring_at.free);
        if (++slot == a.stages) {
          slot = 0;
          phase ^= 1;
        }
      }
    };
    int left = step_count;
#pragma unroll 1
    for (; left >= 2; left -= 2) {  // an operand is overwritten once the product that reads it is done
      add(pixels[0]);
      hw::multiply_group_wait<1>();
      add(pixels[1]);
      hw::multiply_group_wait<1>();
    }
    if (left) add(pixels[0]);
    hw::multiply_group_wait<0>();
    product.settle();
    product.store(a, tile_position(a, tile), int(a.c_out), lane);
  }
}

// Loads the tiles of one group, by `kLoadingThreads`.
template <typename T, typename Shape>
SLIM_DEVICE void load_tiles(const SlimCudaResidentConv2d& a, const SpecializedLayout& at, uint32_t base, int group,
                            int thread, int tile, int tile_step, int tiles) {
  const int live_count = int(hw::load_shared_32(base + at.slabs)), chunks = a.slab / 8;
  if (live_count == 0) return;
  const uint32_t barriers = base + at.barriers + group * a.stages * 16;
  Loader<T, true> loader{a,
                         base + at.pixels + thread / chunks * 16,
                         base + at.slabs + 16,
                         base + at.ring + group * a.stages * at.stage,
                         at.stage,
                         live_count,
                         tile,
                         tile_step,
                         tiles};
  loader.chunk = thread % chunks;
  loader.pixel_step = kLoadingThreads<Shape> / chunks;
  loader.pixel_count = a.tile_images * a.load_rows * a.load_cols - thread / chunks;
  loader.start_tile();
  for (int phase = 1; loader.tile < tiles;) {
    const RingBarriers ring_at = ring_barriers(barriers, loader.slot);
    hw::mbarrier_wait(ring_at.free, phase);
    loader.fill();
    hw::mbarrier_arrive_behind_copies(ring_at.full);
    if (loader.slot == 0) phase ^= 1;
  }
}

// Lists the slabs that hold any step, their number, first step and end, behind how many they are and how many steps; has
// the weights of each copied, those of the slab that the block's first tile begins with first; sets up all barriers. Done
// by one warp.
template <typename Shape>
SLIM_DEVICE void begin_weights(const SlimCudaResidentConv2d& a, const SpecializedLayout& at, uint32_t base,
                               const int32_t* starts, int lane, int first_tile) {
  const int step_groups = (int(a.c_in) + 15) / 16, slabs = (int(a.c_in) + a.slab - 1) / a.slab, of_slab = a.slab / 16;
  const int32_t first_step = starts[0], steps = starts[step_groups] - first_step;
  int count = 0;
  for (int first = 0; first < slabs; first += 32) {
    const int slab = first + lane;
    const int begin = slab < slabs ? starts[slab * of_slab] - first_step : 0;
    const int end = slab < slabs ? starts[min((slab + 1) * of_slab, step_groups)] - first_step : 0;
    const uint32_t used = hw::ballot(begin != end);
    const int before = count + hw::count_bits(used & ((1u << lane) - 1));
    if (begin != end) hw::store_shared_128(base + at.slabs + 16 + before * 16, make_uint4(slab, begin, end, 0));
    count += hw::count_bits(used);
  }
  if (lane == 0) hw::store_shared_128(base + at.slabs, make_uint4(count, steps, 0, 0));
  const uint32_t of_weights = base + at.barriers + Shape::GROUPS * a.stages * 16;
  for (int i = lane; i < Shape::GROUPS * a.stages; i += 32) {
    const RingBarriers ring_at = ring_barriers(base + at.barriers, i);
    hw::mbarrier_init(ring_at.full, kLoadingThreads<Shape>);
    hw::mbarrier_init(ring_at.free, 4);  // a lane of each warp
  }
  for (int i = lane; i < count; i += 32) hw::mbarrier_init(of_weights + i * 8, 1);
  hw::fence_mbarrier_init();
  hw::synchronize_warp();
  for (int i = lane; i < count; i += 32) {
    const int slab = (first_slab(first_tile, count) + i) % count;
    const uint4 entry = hw::load_shared_128(base + at.slabs + 16 + slab * 16);
    const uint32_t bytes = (entry.z - entry.y) * Shape::STEP_BYTES;
    const unsigned char* const from = static_cast<const unsigned char*>(a.weights);
    hw::mbarrier_arrive_and_expect(of_weights + slab * 8, bytes);
    hw::copy_bulk(base + at.weights + entry.y * Shape::STEP_BYTES,
                  from + (int64_t(first_step) + entry.y) * Shape::STEP_BYTES, bytes, of_weights + slab * 8);
  }
}

template <typename T, typename Shape>
SLIM_DEVICE void specialized_conv2d(const SlimCudaResidentConv2d& a) {
  static_assert(Shape::COLUMNS == 1 && Shape::WGMMA && sizeof(T) == 2, "one column, of 16-bit numbers, by wgmma");
  const SpecializedLayout at = specialized_layout<Shape>(a);
  const int thread = int(threadIdx.x), lane = thread & 31;
  const uint32_t base = hw::shared_memory();
  const int step_groups = (int(a.c_in) + 15) / 16;
  const int columns = (int(a.c_out) + Shape::COLUMN - 1) / Shape::COLUMN, column = int(blockIdx.x) % columns;
  const int32_t* const starts = a.group_start + int64_t(column) * (step_groups + 1);
  // Blocks of one column take tiles in turn, first the first groups of all blocks: few tiles spread over all processors.
  const int tiles = tile_count(a), blocks_of_column = (int(gridDim.x) - column + columns - 1) / columns;
  const int tile_step = blocks_of_column * Shape::GROUPS;
  const auto first_tile = [&](int group) { return group * blocks_of_column + int(blockIdx.x) / columns; };

  hw::let_next_kernel_begin();
  if (thread < Shape::THREADS) {
    const int32_t first_step = starts[0], step_count = starts[step_groups] - first_step;
    for (int i = thread; i < step_count; i += Shape::THREADS) {
      const int32_t word = a.taps[first_step + i], tap = word >> 16, part = (word & 0xffff) % (a.slab / 16);
      const int place = tap / a.s * a.dil_h * a.patch_row + tap % a.s * a.dil_w;
      hw::store_shared_32(base + at.steps + i * 4, uint32_t(tap) << 24 | uint32_t(place * a.slab * 2 + part * 32));
    }
    write_windows_by_image<Shape>(a, base + at.windows, thread);
    write_bias<T, Shape>(base + at.bias, a.bias, column * Shape::COLUMN, a.c_out);
  } else if (thread < Shape::THREADS + 32) {
    begin_weights<Shape>(a, at, base, starts, lane, first_tile(0));
  } else {
    const int loading = thread - Shape::THREADS - 32, loaded = a.load_rows * a.load_cols;
    for (int i = loading; i < a.tile_images * loaded; i += 96) {
      const int image = i / loaded, y = i % loaded / a.load_cols, x = i % a.load_cols;
      const uint32_t place = uint32_t(image * a.patch_image + y * a.patch_row + x) * uint32_t(a.slab * 2);
      const int from = ((image * int(a.h) + y) * int(a.w) + x) * int(a.c_in) * 2;
      hw::store_shared_128(base + at.pixels + i * 16,
                           make_uint4(swizzled(place, swizzle_mask(a)), from, uint32_t(y) << 16 | x, image));
    }
    for (int i = loading; i < kZeroBytes / 16; i += 96) {
      hw::store_shared_128(base + at.zeros + i * 16, make_uint4(0, 0, 0, 0));
    }
  }
  hw::synchronize();

  if (thread < Shape::THREADS) {
    if constexpr (Shape::GROUPS == 2) hw::more_registers();
    hw::wait_for_previous_kernel();  // which may still read y
    const int group = thread >> 7;
    multiply_tiles<T, Shape>(a, at, base, group, thread >> 5 & 3, lane, column, first_tile(group), tile_step, tiles);
  } else {
    if constexpr (Shape::GROUPS == 2) hw::fewer_registers();
    hw::wait_for_previous_kernel();  // which wrote x
    const int loading = thread - Shape::THREADS, group = loading / kLoadingThreads<Shape>;
    load_tiles<T, Shape>(a, at, base, group, loading % kLoadingThreads<Shape>, first_tile(group), tile_step, tiles);
  }
}
#endif

template <typename T, typename Shape>
__global__ void __launch_bounds__(kSpecializedThreads<Shape>, 1)
    specialized_conv2d_kernel(const __grid_constant__ SlimCudaResidentConv2d a) {
#if SLIM_HAS_WGMMA
  specialized_conv2d<T, Shape>(a);
#else
  hw::stop();  // compiled for another processor: the launcher does not choose it
#endif
}

template <typename T, typename Shape>
int launch_specialized(const SlimCudaResidentConv2d& a) {
  return launch_kernel(specialized_conv2d_kernel<T, Shape>, a, a.blocks, kSpecializedThreads<Shape>,
                       specialized_layout<Shape>(a).total, a.overlap != 0);
}

}  // namespace
}  // namespace slim
