// Block-sparse convolution for sm_90a through which everything streams: one thread has the pixels copied, one the
// weights, and eight warps do nothing but multiply.
//
// A thread block walks over pairs of a tile of output pixels and a column of output channels. Its two groups of four
// warps have half of the tile each and share the weights. Pixels come by tensor copies, a slab of input channels of all
// that the tile reads at a time, weights by bulk copies, a chunk of steps at a time, and each kind has a ring of
// places. Shared memory holds no borders to the left and right: a pixel outside of what was loaded is read from a place
// that is zero.
#pragma once
#include "common.cuh"
#include "sparse_tile.cuh"

namespace slim {

constexpr uint32_t kStepPlace = 0xffffff;  // of a step's word: bytes from a pixel's place; above them its tap
constexpr int kZeroBytes = 128;            // all 32 banks
constexpr int kMostOrdered = 32;           // columns that are taken by their number of steps, one a lane
// Steps whose weights come together and whose products are issued together. A warp cannot go on until the tensor cores
// have begun its last product, and then needs some 300 clocks to read the next pixels: two steps of 128 clocks keep the
// tensor cores busy for the other group of warps meanwhile, one does not (400 clocks a step on an H200, where 256 are
// the limit).
template <typename Shape>
constexpr int kChunk = 4 / Shape::M_TILES;

// Where things lie in shared memory, in bytes; the same for host and device.
struct StreamedLayout {
  int32_t pixels, stage, weights, zeros, windows, barriers, bias, steps, starts, order, pairs, total;
};

template <typename Shape>
__host__ __device__ inline int streamed_columns(const SlimCudaResidentConv2d& a) {
  return (int(a.c_out) + Shape::COLUMN - 1) / Shape::COLUMN;
}

template <typename Shape>
__host__ __device__ inline StreamedLayout streamed_layout(const SlimCudaResidentConv2d& a) {
  StreamedLayout l;
  const int slabs = (int(a.c_in) + a.slab - 1) / a.slab, columns = streamed_columns<Shape>(a);
  l.pixels = 0;
  l.stage = (a.patch * a.slab * 2 + 1023) / 1024 * 1024;  // the pattern in which a tensor copy writes repeats itself
  l.weights = a.stages * l.stage;
  l.zeros = l.weights + a.slots * kChunk<Shape> * Shape::STEP_BYTES;
  l.windows = l.zeros + kZeroBytes;
  l.barriers = l.windows + Shape::GROUPS * Shape::WINDOWS * 16;
  l.bias = l.barriers + (a.stages + a.slots + 1) * 16;  // the last one is for the head start
  l.steps = l.bias + columns * Shape::COLUMN * kBiasBytes;
  l.starts = l.steps + 4 * (a.steps + kChunk<Shape>);  // behind the last, words are read and not used
  l.order = l.starts + columns * (slabs + 1) * 4;
  l.pairs = l.order + columns * 4;
  l.total = (l.pairs + 4 + 15) / 16 * 16;
  return l;
}

namespace {

// Of four warps more, one has pixels copied and another one weights; the other two make their registers free.
template <typename Shape>
constexpr int kStreamedThreads = Shape::THREADS + 128;

// A place in a ring, and its two barriers: it is full, and it is free.
struct RingPlace {
  int place = 0, phase = 0;
  SLIM_DEVICE void advance(int places) {
    if (++place == places) {
      place = 0;
      phase ^= 1;
    }
  }
  SLIM_DEVICE uint32_t full(uint32_t barriers) const { return barriers + place * 16; }
  SLIM_DEVICE uint32_t free(uint32_t barriers) const { return barriers + place * 16 + 8; }
};

// The pairs of one thread block: tile by tile all columns, the one of most steps first, and every other round of blocks
// backwards, so that who had much has little next. Columns of a tile are neighbours in time: they read the same pixels.
struct Pairs {
  int columns, all, round = 0;
  SLIM_DEVICE int number() const {
    const int blocks = int(gridDim.x), block = int(blockIdx.x);
    return round * blocks + (round & 1 ? blocks - 1 - block : block);
  }
  SLIM_DEVICE bool left() const { return round * int(gridDim.x) < all; }
};

// Bits that a place's number changes in its chunks, as a tensor copy writes them: eight pixels whose numbers differ
// modulo 8 lie in different banks. A slab of 64 channels is all banks wide, one of 32 half of them.
SLIM_DEVICE uint32_t swizzled(uint32_t place, uint32_t mask) { return place ^ ((place >> 3) & mask); }

// The pixels and channels of one lane, and the products' sums.
template <typename T, typename Shape>
struct StreamedTile : SparseTile<T, Shape> {
  int from[Shape::M_TILES];         // bytes from a slab's begin, as a step of no distance reads; may be negative
  uint32_t inside[Shape::M_TILES];  // the taps that were loaded, a bit each

  // An instruction reads one pixel of each of eight windows, which must lie in different banks: which of a window's
  // four comes first, of its columns and of its rows, is chosen so, window after window.
  SLIM_DEVICE void find(const SlimCudaResidentConv2d& a, uint32_t all_windows, int warp, int lane) {
    this->swapped = this->flipped = 0;
    this->windows = all_windows + warp * Shape::WINDOWS_OF_WARP * 16;
    const int pitch = a.slab * 2, below = a.stride_h * a.patch_row;
#pragma unroll
    for (int t = 0; t < Shape::M_TILES / 2; ++t) {
      const uint4 window = hw::load_shared_128(this->windows + (t * 8 + (lane & 7)) * 16);
      uint32_t banks = 0;  // of the window's four pixels, four bits each
      for (int key = 0; key < 4; ++key) {
        banks |= ((window.x + (key & 1) * a.stride_w + (key >> 1) * below) & 7) << key * 4;
      }
      uint32_t seen = 0, columns = 0, rows = 0;
#pragma unroll 1
      for (int i = 0; i < 8; ++i) {
        const uint32_t of_window = hw::from_lane(banks, i);
        int key = 0;
        for (int k = 3; k >= 0; --k) {
          if (!(seen >> (of_window >> k * 4 & 7) & 1)) key = k;
        }
        seen |= 1u << (of_window >> key * 4 & 7);
        columns |= uint32_t(key & 1) << i;
        rows |= uint32_t(key >> 1) << i;
      }
      const int down = int(rows >> (lane & 7) & 1) ^ (lane >> 3 & 1);
      const int y = (int(window.z >> 16) + down) * a.stride_h - a.load_top;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int right = int(columns >> (lane & 7) & 1) ^ side;
        const int x = (int(window.z & 0xffff) + right) * a.stride_w - a.load_left;
        uint32_t of_row = 0, taps = 0;
#pragma unroll 1
        for (int s = 0; s < a.s; ++s) of_row |= uint32_t(unsigned(x + s * a.dil_w) < unsigned(a.load_cols)) << s;
#pragma unroll 1
        for (int r = 0; r < a.r; ++r) {
          if (unsigned(y + r * a.dil_h) < unsigned(a.load_rows)) taps |= of_row << r * a.s;
        }
        from[2 * t + side] = (int(window.x) + down * below + right * a.stride_w) * pitch + (lane >> 4) * 16;
        inside[2 * t + side] = window.w == kNoImage ? 0 : taps;
      }
      this->swapped |= (columns >> (lane >> 2) & 1) << t;
      this->flipped |= (rows >> (lane >> 2) & 1) << t;
    }
  }
};

template <int N>
struct Steps {
  static constexpr int COUNT = N;
};

#if SLIM_HAS_WGMMA
// Multiplies half of each of the block's tiles, by the four warps of a group.
template <typename T, typename Shape>
SLIM_DEVICE void multiply_pairs(const SlimCudaResidentConv2d& a, const StreamedLayout& at, uint32_t base, int group,
                                int warp, int lane) {
  const int slabs = (int(a.c_in) + a.slab - 1) / a.slab;
  const uint32_t x_barriers = base + at.barriers, w_barriers = x_barriers + a.stages * 16;
  const uint32_t mask = uint32_t(a.slab * 2 - 16), zeros = base + at.zeros;
  StreamedTile<T, Shape> product;
  product.find(a, base + at.windows + group * Shape::WINDOWS * 16, warp, lane);
  RingPlace x, w, used;  // used: the place of the weights whose product was waited for last
  // Group 0 goes ahead by half a pair, or as much as half of either ring holds, so that one group multiplies while the
  // other stores. Chunks and slabs that it has left until group 1 may begin:
  const uint32_t head_start = w_barriers + a.slots * 16;
  bool alone = group == 0;
  int chunks_alone = 0, slabs_alone = max(a.stages / 2, 1);
  const auto end_head_start = [&] {
    if (warp == 0 && lane == 0) hw::mbarrier_arrive(head_start);
    alone = false;
  };
  Pairs pairs{streamed_columns<Shape>(a), int(hw::load_shared_32(base + at.pairs))};
  for (; pairs.left(); ++pairs.round) {
    const int number = pairs.number();
    if (number >= pairs.all) continue;
    const int column = int(hw::load_shared_32(base + at.order + number % pairs.columns * 4));
    uint32_t next_start = base + at.starts + column * (slabs + 1) * 4;
    int step = int(hw::load_shared_32(next_start)), end = step;
    int left = int(hw::load_shared_32(next_start + slabs * 4)) - step;
    product.channel = column * Shape::COLUMN;
    product.begin(base + at.bias + column * Shape::COLUMN * kBiasBytes, lane);
    uint32_t places[kChunk<Shape>][Shape::M_TILES], weights = 0, operands[2][kChunk<Shape>][Shape::M_TILES][4];
    int count = 0;  // steps of the chunk
    // Finds where the next chunk reads, while the one in front of it is multiplied, and waits until that is there.
    const auto prepare = [&] {
      if (step == end) {
        do {
          next_start += 4;
          end = int(hw::load_shared_32(next_start));
        } while (step == end);
        hw::mbarrier_wait(x.full(x_barriers), x.phase);
      }
      count = min(end - step, kChunk<Shape>);
      const uint32_t begin = base + at.pixels + x.place * at.stage;
#pragma unroll
      for (int k = 0; k < kChunk<Shape>; ++k) {  // of a step that the chunk does not have nobody reads what is found
        const uint32_t word = hw::load_shared_32(base + at.steps + (step + k) * 4), tap = word >> 24;
#pragma unroll
        for (int i = 0; i < Shape::M_TILES; ++i) {
          const uint32_t place = swizzled(uint32_t(product.from[i]) + (word & kStepPlace), mask);
          places[k][i] = product.inside[i] >> tap & 1 ? begin + place : zeros + (place & (kZeroBytes - 1));
        }
      }
      weights = base + at.weights + w.place * (kChunk<Shape> * Shape::STEP_BYTES);
      hw::mbarrier_wait(w.full(w_barriers), w.phase);
      w.advance(a.slots);
    };
    const auto issue = [&](uint32_t (&operand)[kChunk<Shape>][Shape::M_TILES][4], auto steps) {
      static_assert(kChunk<Shape> <= 2, "a chunk has all its steps or one");
#pragma unroll
      for (int k = 0; k < decltype(steps)::COUNT; ++k) {
#pragma unroll
        for (int i = 0; i < Shape::M_TILES; ++i) hw::load_matrices(operand[k][i], places[k][i]);
      }
      hw::multiply_group_fence();
#pragma unroll
      for (int k = 0; k < decltype(steps)::COUNT; ++k) {
        const uint64_t b = hw::group_operand(weights + k * Shape::STEP_BYTES, Shape::COLUMN * 16, 128);
#pragma unroll
        for (int i = 0; i < Shape::M_TILES; ++i) hw::multiply_group<T>(product.sums[0][i], operand[k][i], b);
      }
      hw::multiply_group_commit();
    };
    const auto multiply = [&](uint32_t (&operand)[kChunk<Shape>][Shape::M_TILES][4]) {
      if (kChunk<Shape> == 1 || count == 1) {
        issue(operand, Steps<1>());
      } else {
        issue(operand, Steps<kChunk<Shape>>());
      }
      step += count;
      left -= count;
      if (alone && --chunks_alone == 0) end_head_start();
      if (step == end) {  // the slab's pixels are in registers
        hw::synchronize_warp();
        if (lane == 0) hw::mbarrier_arrive(x.free(x_barriers));
        x.advance(a.stages);
        if (alone && --slabs_alone == 0) end_head_start();
      }
    };
    const auto release = [&] {
      if (lane == 0) hw::mbarrier_arrive(used.free(w_barriers));
      used.advance(a.slots);
    };
    const bool any = left > 0;
    if (any) prepare();
    if (pairs.round == 0) {
      chunks_alone = max(1, min(left / (2 * kChunk<Shape>), a.slots / 2));
      if (group != 0) hw::mbarrier_wait(head_start, 0);
    }
    bool first = true;
#pragma unroll 1
    while (left > 0) {  // an operand is overwritten once the product that reads it is done
      multiply(operands[0]);
      if (left > 0) prepare();
      hw::multiply_group_wait<1>();
      if (!first) release();
      first = false;
      if (left == 0) break;
      multiply(operands[1]);
      if (left > 0) prepare();
      hw::multiply_group_wait<1>();
      release();
    }
    hw::multiply_group_wait<0>();
    product.settle();
    if (any) release();
    if (alone) end_head_start();
    product.store(a, tile_position(a, number / pairs.columns), int(a.c_out), lane);
  }
}
#endif

// Has the pixels of all pairs copied, by one thread.
template <typename Shape>
SLIM_DEVICE void copy_pixels(const SlimCudaResidentConv2d& a, const hw::TensorMap& map, const StreamedLayout& at,
                             uint32_t base) {
  const int slabs = (int(a.c_in) + a.slab - 1) / a.slab;
  const uint32_t barriers = base + at.barriers;
  const uint32_t bytes = uint32_t(a.tile_images * a.load_rows * a.load_cols * a.slab * 2);
  Pairs pairs{streamed_columns<Shape>(a), int(hw::load_shared_32(base + at.pairs))};
  for (RingPlace x; pairs.left(); ++pairs.round) {
    const int number = pairs.number();
    if (number >= pairs.all) continue;
    const int column = int(hw::load_shared_32(base + at.order + number % pairs.columns * 4));
    const TilePosition tile = tile_position(a, number / pairs.columns);
    const int top = tile.y * a.stride_h - a.pad_h + a.load_top, left = tile.x * a.stride_w - a.pad_w + a.load_left;
    const uint32_t starts = base + at.starts + column * (slabs + 1) * 4;
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      if (hw::load_shared_32(starts + slab * 4) == hw::load_shared_32(starts + slab * 4 + 4)) continue;
      hw::mbarrier_wait(x.free(barriers), x.phase ^ 1);
      hw::mbarrier_arrive_and_expect(x.full(barriers), bytes);
      hw::copy_tensor(base + at.pixels + x.place * at.stage, map, slab * a.slab, left, top, int(tile.image),
                      x.full(barriers));
      x.advance(a.stages);
    }
  }
}

// Has the weights of all pairs copied, by one thread.
template <typename Shape>
SLIM_DEVICE void copy_steps(const SlimCudaResidentConv2d& a, const StreamedLayout& at, uint32_t base) {
  const int slabs = (int(a.c_in) + a.slab - 1) / a.slab;
  const uint32_t barriers = base + at.barriers + a.stages * 16;
  const unsigned char* const weights =
      static_cast<const unsigned char*>(a.weights) + int64_t(a.group_start[0]) * Shape::STEP_BYTES;
  Pairs pairs{streamed_columns<Shape>(a), int(hw::load_shared_32(base + at.pairs))};
  for (RingPlace w; pairs.left(); ++pairs.round) {
    const int number = pairs.number();
    if (number >= pairs.all) continue;
    const int column = int(hw::load_shared_32(base + at.order + number % pairs.columns * 4));
    const uint32_t starts = base + at.starts + column * (slabs + 1) * 4;
    const int end = int(hw::load_shared_32(starts + slabs * 4));
    uint32_t next_start = starts;
    int step = int(hw::load_shared_32(starts));
    for (int of_slab = step; step < end;) {
      while (step == of_slab) of_slab = int(hw::load_shared_32(next_start += 4));
      const int count = min(of_slab - step, kChunk<Shape>);
      hw::mbarrier_wait(w.free(barriers), w.phase ^ 1);
      hw::mbarrier_arrive_and_expect(w.full(barriers), count * Shape::STEP_BYTES);
      hw::copy_bulk(base + at.weights + w.place * (kChunk<Shape> * Shape::STEP_BYTES),
                    weights + int64_t(step) * Shape::STEP_BYTES, count * Shape::STEP_BYTES, w.full(barriers));
      w.advance(a.slots);
      step += count;
    }
  }
}

// a / b of small numbers: a whole division takes 150 clocks and its code, which is run once, longer to fetch.
SLIM_DEVICE int quotient(int a, int b) { return int((float(a) + 0.5f) * hw::reciprocal(float(b))); }

// Fills the tables that all pairs share.
template <typename T, typename Shape>
SLIM_DEVICE void write_tables(const SlimCudaResidentConv2d& a, const StreamedLayout& at, uint32_t base, int thread) {
  const int step_groups = (int(a.c_in) + 15) / 16, slabs = (int(a.c_in) + a.slab - 1) / a.slab, of_slab = a.slab / 16;
  const int columns = streamed_columns<Shape>(a), first_step = a.group_start[0];
#pragma unroll 1
  for (int i = thread; i < a.steps + kChunk<Shape>; i += Shape::THREADS) {
    const int32_t word = i < a.steps ? a.taps[first_step + i] : 0, tap = word >> 16, part = word & (of_slab - 1);
    const int row = quotient(tap, a.s), place = row * a.dil_h * a.patch_row + (tap - row * a.s) * a.dil_w;
    hw::store_shared_32(base + at.steps + i * 4, uint32_t(tap) << 24 | uint32_t(place * a.slab * 2 + part * 32));
  }
#pragma unroll 1
  for (int i = thread; i < columns * (slabs + 1); i += Shape::THREADS) {
    const int column = quotient(i, slabs + 1), group = min((i - column * (slabs + 1)) * of_slab, step_groups);
    hw::store_shared_32(base + at.starts + i * 4,
                        a.group_start[int64_t(column) * (step_groups + 1) + group] - first_step);
  }
  const int across = a.tile_cols / 2, of_image = across * (a.tile_rows / 2);
  const OutputSteps step = output_steps(a);
#pragma unroll 1
  for (int i = thread; i < Shape::GROUPS * Shape::WINDOWS; i += Shape::THREADS) {
    const int image = quotient(i, of_image), rest = i - image * of_image, line = quotient(rest, across);
    const int y = line * 2, x = (rest - line * across) * 2;
    const bool used = image < a.tile_images;
    const int place =
        image * a.patch_image + (y * a.stride_h - a.load_top) * a.patch_row + x * a.stride_w - a.load_left;
    const int out = image * step.image + (a.pool ? y / 2 : y) * step.row + (a.pool ? x / 2 : x) * step.pixel;
    hw::store_shared_128(base + at.windows + i * 16,
                         make_uint4(used ? place : 0, out, uint32_t(y) << 16 | x, used ? image : kNoImage));
  }
#pragma unroll 1
  for (int column = 0; column < columns; ++column) {
    const int first = column * Shape::COLUMN;
    write_bias<T, Shape>(base + at.bias + first * kBiasBytes, a.bias, first, a.c_out);
  }
  if (thread < kZeroBytes / 16) hw::store_shared_128(base + at.zeros + thread * 16, make_uint4(0, 0, 0, 0));
}

// Columns by their number of steps, the most first, where a warp's lanes suffice.
template <typename Shape>
SLIM_DEVICE void write_order(const SlimCudaResidentConv2d& a, uint32_t order, int lane) {
  const int step_groups = (int(a.c_in) + 15) / 16, columns = streamed_columns<Shape>(a);
  if (columns > kMostOrdered) {
#pragma unroll 1
    for (int i = lane; i < columns; i += 32) hw::store_shared_32(order + i * 4, i);
    return;
  }
  const int32_t* const start = a.group_start + int64_t(min(lane, columns - 1)) * (step_groups + 1);
  const uint32_t mine = lane < columns ? uint32_t(start[step_groups] - start[0]) + 1 : 0;
  int before = 0;
#pragma unroll 1
  for (int other = 0; other < columns; ++other) {
    const uint32_t theirs = hw::from_lane(mine, other);
    before += theirs > mine || (theirs == mine && other < lane);
  }
  if (lane < columns) hw::store_shared_32(order + before * 4, lane);
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kStreamedThreads<Shape>, 1)
    streamed_conv2d_kernel(const __grid_constant__ SlimCudaResidentConv2d a,
                           const __grid_constant__ hw::TensorMap map) {
#if SLIM_HAS_WGMMA
  static_assert(Shape::COLUMNS == 1 && Shape::WGMMA && sizeof(T) == 2, "one column, of 16-bit numbers, by wgmma");
  const StreamedLayout at = streamed_layout<Shape>(a);
  const int thread = int(threadIdx.x), warp = thread >> 5, lane = thread & 31;
  const uint32_t base = hw::shared_memory();
  hw::let_next_kernel_begin();
  if (thread < Shape::THREADS) {
    write_tables<T, Shape>(a, at, base, thread);
  } else if (warp == Shape::THREADS / 32) {
    write_order<Shape>(a, base + at.order, lane);
  } else if (lane == 0) {  // lanes would take turns
#pragma unroll 1
    for (int i = warp - Shape::THREADS / 32 - 1; i < a.stages + a.slots + 1; i += 3) {
      hw::mbarrier_init(base + at.barriers + i * 16, 1);                      // who asks for the copy, or is ahead
      hw::mbarrier_init(base + at.barriers + i * 16 + 8, Shape::GROUPS * 4);  // a lane of each warp
    }
    hw::fence_mbarrier_init();
    if (warp == Shape::THREADS / 32 + 3)
      hw::store_shared_32(base + at.pairs, tile_count(a) * streamed_columns<Shape>(a));
  }
  hw::synchronize();
  if (thread < Shape::THREADS) {
    hw::more_registers();
    hw::wait_for_previous_kernel();  // which may still read y
    multiply_pairs<T, Shape>(a, at, base, thread >> 7, warp & 3, lane);
  } else {
    hw::fewer_registers();
    if (lane == 0 && warp == Shape::THREADS / 32) {
      hw::wait_for_previous_kernel();  // which wrote x
      copy_pixels<Shape>(a, map, at, base);
    } else if (lane == 0 && warp == Shape::THREADS / 32 + 1) {
      copy_steps<Shape>(a, at, base);
    }
  }
#else
  hw::stop();  // compiled for another processor: the launcher does not choose it
#endif
}

template <typename T, typename Shape>
int launch_streamed(const SlimCudaResidentConv2d& a) {
  hw::TensorMap map;
  const int64_t sizes[] = {a.c_in, a.w, a.h, a.n};
  const int32_t box[] = {a.slab, a.load_cols, a.load_rows, a.tile_images};
  const cudaError_t error = hw::make_tensor_map(map, a.x, sizes, box);
  if (error != cudaSuccess) return status(error);
  return launch_kernel(streamed_conv2d_kernel<T, Shape>, a, a.blocks, kStreamedThreads<Shape>,
                       streamed_layout<Shape>(a).total, a.overlap != 0, map);
}

}  // namespace
}  // namespace slim
