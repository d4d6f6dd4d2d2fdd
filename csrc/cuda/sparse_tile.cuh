// What the tensor-core convolutions share: a group of four warps multiplies the pixels of a tile, whose input lies in
// shared memory as a patch, by the stored blocks, whose weights lie there too.
#pragma once
#include "kernels.h"
#include "tensor_cores.cuh"

namespace slim {

// How the warps of a group share a tile. A warp multiplies 16 M_TILES pixels by 8 N_TILES channels of each of its
// OF_WARP columns; WARPS_M x WARPS_N warps are a group; GROUPS groups share the weights and each walks over tiles of
// its own, so that one computes while another waits or stores.
template <int WARPS_M_, int WARPS_N_, int M_TILES_, int N_TILES_, int GROUPS_, bool WGMMA_, int OF_WARP_ = 1>
struct TileShape {
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, M_TILES = M_TILES_, N_TILES = N_TILES_, GROUPS = GROUPS_;
  static constexpr bool WGMMA = WGMMA_;
  static constexpr int OF_WARP = OF_WARP_;
  static constexpr int COLUMNS = WARPS_N * OF_WARP;      // of a thread block
  static constexpr int PIXELS = WARPS_M * M_TILES * 16;  // of a tile
  static constexpr int WINDOWS = PIXELS / 4;             // a tile is made of 2x2 windows
  static constexpr int WINDOWS_OF_WARP = M_TILES * 4;
  static constexpr int COLUMN = N_TILES * 8;      // output channels that follow one list of steps
  static constexpr int STEP_BYTES = COLUMN * 32;  // weights of a step: COLUMN channels x kStepChannels input channels
  static constexpr int THREADS = GROUPS * 128;
  // Column 8 j + 2 q + e of an instruction is channel 8 RUN (j / RUN) + 2 RUN q + 2 (j % RUN) + e: a lane, which holds
  // the columns of one q, has 2 RUN neighbouring channels of every 8 RUN, 16 bytes where there are so many.
  template <typename T>
  static constexpr int RUN = N_TILES < 8 / int(sizeof(T)) ? N_TILES : 8 / int(sizeof(T));
  static_assert(WARPS_M * WARPS_N == 4 && M_TILES % 2 == 0 && N_TILES % 2 == 0, "tile shape");
  static_assert(!WGMMA || (COLUMNS == 1 && N_TILES >= 4), "with wgmma four warps multiply by the same weights");
};

namespace {

// Input channels of a step: 32 bytes of them, which is how deep an instruction multiplies.
template <typename T>
constexpr int kStepChannels = 32 / int(sizeof(T));

// Eight numbers rounded to T, in the order of memory.
template <typename T>
SLIM_DEVICE uint4 eight_packed(const float (&v)[8], bool relu) {
  return relu ? make_uint4(hw::pack<T, true>(v[0], v[1]), hw::pack<T, true>(v[2], v[3]), hw::pack<T, true>(v[4], v[5]),
                           hw::pack<T, true>(v[6], v[7]))
              : make_uint4(hw::pack<T, false>(v[0], v[1]), hw::pack<T, false>(v[2], v[3]),
                           hw::pack<T, false>(v[4], v[5]), hw::pack<T, false>(v[6], v[7]));
}

struct TilePosition {
  int64_t image;
  int32_t y, x;  // of the first output pixel
};

template <typename Args>
SLIM_DEVICE TilePosition tile_position(const Args& a, int tile) {
  const int across = (int(a.q) + a.tile_cols - 1) / a.tile_cols, down = (int(a.p) + a.tile_rows - 1) / a.tile_rows;
  if (across * down == 1) return {int64_t(tile) * a.tile_images, 0, 0};
  const int image = tile / (across * down), rest = tile % (across * down);
  return {int64_t(image) * a.tile_images, rest / across * a.tile_rows, rest % across * a.tile_cols};
}

template <typename Args>
SLIM_DEVICE int tile_count(const Args& a) {
  return int((a.n + a.tile_images - 1) / a.tile_images) * ((int(a.p) + a.tile_rows - 1) / a.tile_rows) *
         ((int(a.q) + a.tile_cols - 1) / a.tile_cols);
}

constexpr uint32_t kNoImage = 0x7fff;

// Elements from an image, a row and a pixel of y to the next.
struct OutputSteps {
  int32_t image, row, pixel;
};

SLIM_DEVICE OutputSteps output_steps(const SlimCudaResidentConv2d& a) { return {a.y_image, a.y_row, a.y_pixel}; }

SLIM_DEVICE OutputSteps output_steps(const SlimCudaStemConv2d& a) {
  const int rows = a.pool ? int(a.p) / 2 : int(a.p), cols = a.pool ? int(a.q) / 2 : int(a.q), c_out = int(a.c_out);
  return {rows * cols * c_out, cols * c_out, c_out};
}

// Writes a tile's windows: place of the upper left pixel in the patch, distance of the window's first output from the
// tile's in elements, row << 16 | column in the tile, and image.
template <typename Shape, typename Args>
SLIM_DEVICE void write_windows(const Args& a, uint32_t windows) {
  const int across = a.tile_cols / 2, down = a.tile_rows / 2;
  const OutputSteps step = output_steps(a);
  for (int i = int(threadIdx.x); i < Shape::WINDOWS; i += Shape::THREADS) {
    const int image = i / (across * down), y = i % (across * down) / across * 2, x = i % across * 2;
    const bool used = image < a.tile_images;
    const int place = image * a.patch_image + y * a.stride_h * a.patch_row + x * a.stride_w;
    const int out = image * step.image + (a.pool ? y / 2 : y) * step.row + (a.pool ? x / 2 : x) * step.pixel;
    hw::store_shared_128(windows + i * 16,
                         make_uint4(used ? place : 0, out, uint32_t(y) << 16 | x, used ? image : kNoImage));
  }
}

// Writes the bias of all channels of a thread block, or zeros, in fp32. Every pair of channels comes twice, as the four
// sums of a lane want it: from any other order the compiler keeps the sums of one tile apart and moves them into place
// in each step.
template <typename T, typename Shape>
SLIM_DEVICE void write_bias(uint32_t to, const void* bias, int first, int64_t c_out) {
  for (int i = int(threadIdx.x); i < Shape::COLUMN * Shape::COLUMNS; i += Shape::THREADS) {
    const bool given = bias != nullptr && first + i < c_out;
    const float v = given ? hw::load_number(static_cast<const T*>(bias) + first + i) : 0.0f;
    hw::store_shared_32(to + i / 2 * 16 + i % 2 * 4, hw::bits_of_float(v));
    hw::store_shared_32(to + i / 2 * 16 + i % 2 * 4 + 8, hw::bits_of_float(v));
  }
}
constexpr int kBiasBytes = 8;  // of a channel

// Writes each step's distance in bytes from a pixel's place to the channels that it multiplies; slabs hold `slab`
// channels.
template <typename T, typename Shape, typename Args>
SLIM_DEVICE void write_steps(const Args& a, uint32_t steps, int32_t first, int32_t count, int slab) {
  for (int i = int(threadIdx.x); i < count; i += Shape::THREADS) {
    const int32_t word = a.taps[first + i], tap = word >> 16, part = (word & 0xffff) % (slab / kStepChannels<T>);
    hw::store_shared_32(
        steps + i * 4,
        (tap / a.s * a.dil_h * a.patch_row + tap % a.s * a.dil_w) * (slab * int(sizeof(T)) + 16) + part * 32);
  }
}

// A thread block's weights, in the background. Every block begins elsewhere: all at one place would wait for the same
// part of L2.
template <typename Shape>
SLIM_DEVICE void copy_weights(uint32_t to, const void* weights, int32_t first, int32_t count) {
  const unsigned char* const from = static_cast<const unsigned char*>(weights) + int64_t(first) * Shape::STEP_BYTES;
  const int turn = count == 0 ? 0 : int(blockIdx.x) % count;
  for (int i = int(threadIdx.x) * 16; i < count * Shape::STEP_BYTES; i += Shape::THREADS * 16) {
    int at = i + turn * Shape::STEP_BYTES;
    if (at >= count * Shape::STEP_BYTES) at -= count * Shape::STEP_BYTES;
    hw::copy_async_16(to + at, from + at, true);
  }
}

// The pixels and channels of one lane, and the products' sums.
template <typename T, typename Shape>
struct SparseTile {
  float sums[Shape::OF_WARP][Shape::M_TILES][Shape::N_TILES][4];
  // This lane's rows of the A operand, in bytes from the patch: matrix rows 0 to 7 and 8 to 15 of tile 2 t are the
  // upper and the lower pixel of one column of eight windows, those of tile 2 t + 1 of the other column.
  uint32_t place[Shape::M_TILES];
  uint32_t swapped;  // bit t: of the window that this lane stores, the right column comes first
  uint32_t flipped;  // bit t: of that window, the lower row comes first
  int channel;       // the first of the warp's
  uint32_t windows;  // the warp's, in shared memory

  // Which column of a window goes first alternates between windows whose places would otherwise share banks: a place is
  // an odd multiple of 16 bytes, so eight places with different remainders modulo 8 are free of conflicts.
  template <typename Args>
  SLIM_DEVICE void find_places(const Args& a, uint32_t all_windows, int warp_m, int lane, int pitch) {
    swapped = flipped = 0;
    windows = all_windows + warp_m * Shape::WINDOWS_OF_WARP * 16;
#pragma unroll
    for (int t = 0; t < Shape::M_TILES / 2; ++t) {
      uint32_t seen = 0, second = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t bit = 1u << (hw::load_shared_32(windows + (t * 8 + i) * 16) & 7);
        if (seen & bit) second |= 1u << i;
        seen ^= bit;
      }
      const int upper = int(hw::load_shared_32(windows + (t * 8 + (lane & 7)) * 16));
      const int mine = upper + (lane & 8 ? a.stride_h * a.patch_row : 0);
      const bool right = second >> (lane & 7) & 1;
      place[2 * t] = uint32_t(mine + (right ? a.stride_w : 0)) * pitch + (lane >> 4) * 16;
      place[2 * t + 1] = uint32_t(mine + (right ? 0 : a.stride_w)) * pitch + (lane >> 4) * 16;
      swapped |= (second >> (lane >> 2) & 1) << t;
    }
  }

  // Keeps the compiler from moving or merging registers across: the sums of a product in the background, and the many
  // that begin alike.
  SLIM_DEVICE void settle() {
#pragma unroll
    for (auto& column : sums) {
#pragma unroll
      for (int i = 0; i < Shape::M_TILES; ++i) hw::settle(column[i]);
    }
  }

  // The sums begin with the bias of the warp's channels.
  SLIM_DEVICE void begin(uint32_t bias, int lane) {
    constexpr int RUN = Shape::template RUN<T>;
#pragma unroll
    for (int c = 0; c < Shape::OF_WARP; ++c) {
#pragma unroll
      for (int j = 0; j < Shape::N_TILES; ++j) {
        const int pair = c * (Shape::COLUMN / 2) + j / RUN * (4 * RUN) + (lane & 3) * RUN + j % RUN;
        const uint4 four = hw::load_shared_128(bias + pair * 16);
#pragma unroll
        for (int i = 0; i < Shape::M_TILES; ++i) {
          sums[c][i][j][0] = hw::float_of_bits(four.x);
          sums[c][i][j][1] = hw::float_of_bits(four.y);
          sums[c][i][j][2] = hw::float_of_bits(four.z);
          sums[c][i][j][3] = hw::float_of_bits(four.w);
        }
      }
    }
    settle();
  }

  // Adds steps [step, end) of the warp's column C on a patch; `weights` is what the block holds from its first step on.
  template <int C = 0>
  SLIM_DEVICE void multiply(uint32_t patch, uint32_t steps, uint32_t weights, int step, int end, int lane) {
    auto& sum = sums[C];
#if SLIM_HAS_WGMMA
    if constexpr (Shape::WGMMA) {
      uint32_t pixels[2][Shape::M_TILES][4];
      const auto add = [&](uint32_t (&operand)[Shape::M_TILES][4]) {
        const uint32_t from = patch + hw::load_shared_32(steps + step * 4);
#pragma unroll
        for (int i = 0; i < Shape::M_TILES; ++i) hw::load_matrices(operand[i], place[i] + from);
        const uint64_t b = hw::group_operand(weights + step * Shape::STEP_BYTES, Shape::COLUMN * 16, 128);
        hw::multiply_group_fence();
#pragma unroll
        for (int i = 0; i < Shape::M_TILES; ++i) hw::multiply_group<T>(sum[i], operand[i], b);
        hw::multiply_group_commit();
        ++step;
      };
      settle();
      if ((end - step) & 1) {
        add(pixels[0]);
        hw::multiply_group_wait<0>();
        settle();
      }
#pragma unroll 1
      while (step < end) {  // an operand is overwritten once the product that reads it is done
        add(pixels[0]);
        add(pixels[1]);
        hw::multiply_group_wait<0>();
        settle();
      }
    }
#endif
    if constexpr (!Shape::WGMMA) {
      const uint32_t mine = weights + lane * 16;
      for (; step < end; ++step) {
        const uint32_t from = patch + hw::load_shared_32(steps + step * 4);
        uint32_t pixels[Shape::M_TILES][4];
#pragma unroll
        for (int i = 0; i < Shape::M_TILES; ++i) {
          hw::load_matrices(pixels[i], place[i] + from);
          hw::round_operand<T>(pixels[i]);
        }
#pragma unroll
        for (int v = 0; v < Shape::N_TILES / 2; ++v) {
          const uint4 b = hw::load_shared_128(mine + step * Shape::STEP_BYTES + v * 512);
#pragma unroll
          for (int i = 0; i < Shape::M_TILES; ++i) {
            hw::multiply<T>(sum[i][2 * v], pixels[i], b.x, b.y);
            hw::multiply<T>(sum[i][2 * v + 1], pixels[i], b.z, b.w);
          }
        }
      }
    }
  }

  SLIM_DEVICE static void store_channels(T* to, const float (&v)[8], bool relu) {
    hw::store_global_128(to, eight_packed<T>(v, relu));
  }
  SLIM_DEVICE static void store_channels(T* to, const float (&v)[4], bool relu) {
    if constexpr (sizeof(T) == 4) {
      const auto bits = [relu](float sum) { return hw::bits_of_float(relu && sum < 0.0f ? 0.0f : sum); };
      hw::store_global_128(to, make_uint4(bits(v[0]), bits(v[1]), bits(v[2]), bits(v[3])));
    } else {
      hw::store_global_64(to, relu ? make_uint2(hw::pack<T, true>(v[0], v[1]), hw::pack<T, true>(v[2], v[3]))
                                   : make_uint2(hw::pack<T, false>(v[0], v[1]), hw::pack<T, false>(v[2], v[3])));
    }
  }

  // A lane holds neighbouring channels of all four pixels of its windows. Channels from `end` on are not this block's.
  template <typename Args>
  SLIM_DEVICE void store(const Args& a, const TilePosition& position, int end, int lane) const {
    const OutputSteps step = output_steps(a);
    const int y = a.pool ? position.y / 2 : position.y, x = a.pool ? position.x / 2 : position.x;
    constexpr int RUN = Shape::template RUN<T>, PER_COLUMN = Shape::N_TILES / RUN;
    const int first = channel + (lane & 3) * 2 * RUN;
    T* const out = static_cast<T*>(a.y) + position.image * step.image + (y * step.row + x * step.pixel + first);
    const int images_left = int(a.n - position.image < kNoImage ? a.n - position.image : kNoImage);
#pragma unroll
    for (int t = 0; t < Shape::M_TILES / 2; ++t) {
      const uint4 window = hw::load_shared_128(windows + (t * 8 + (lane >> 2)) * 16);
      const int oy = position.y + int(window.z >> 16), ox = position.x + int(window.z & 0xffff);
      const bool here = int(window.w) < images_left;
      T* const to = out + int(window.y);
      if (a.pool) {
        if (!here || oy + 1 >= a.p || ox + 1 >= a.q) continue;
#pragma unroll
        for (int h = 0; h < Shape::OF_WARP * PER_COLUMN; ++h) {
          const auto& sum = sums[h / PER_COLUMN];
          float v[2 * RUN];
#pragma unroll
          for (int e = 0; e < 2 * RUN; ++e) {
            const int j = h % PER_COLUMN * RUN + e / 2, s = e & 1;
            v[e] = hw::larger(hw::larger(sum[2 * t][j][s], sum[2 * t][j][2 + s]),
                              hw::larger(sum[2 * t + 1][j][s], sum[2 * t + 1][j][2 + s]));
          }
          if (first + h * 8 * RUN < end) store_channels(to + h * 8 * RUN, v, a.relu);
        }
        continue;
      }
      const int turn = swapped >> t & 1, flip = flipped >> t & 1;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int down = k % 2 ^ flip, right = k / 2 ^ turn;
        if (!here || oy + down >= a.p || ox + right >= a.q) continue;
        T* const pixel = to + (down * step.row + right * step.pixel);
#pragma unroll
        for (int h = 0; h < Shape::OF_WARP * PER_COLUMN; ++h) {
          const auto& sum = sums[h / PER_COLUMN][2 * t + k / 2];
          float v[2 * RUN];
#pragma unroll
          for (int e = 0; e < 2 * RUN; ++e) v[e] = sum[h % PER_COLUMN * RUN + e / 2][k % 2 * 2 + (e & 1)];
          if (first + h * 8 * RUN < end) store_channels(pixel + h * 8 * RUN, v, a.relu);
        }
      }
    }
  }
};

}  // namespace
}  // namespace slim
