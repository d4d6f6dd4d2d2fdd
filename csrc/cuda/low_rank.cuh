// Two factors of a layer in one kernel, on tensor cores: h = x V^T, V a matrix or a convolution, and y = h U^T. A
// thread block has a few rows of x (output pixels); their h stays in shared memory, rounded to the type of x. Both
// products run through one ring of stages 64 numbers deep, filled in the background: first x and V, then U.
#pragma once
#include "kernels.h"
#include "sparse_tile.cuh"
#include "tensor_cores.cuh"

namespace slim {

constexpr int kDepth = 64;             // numbers of a row in a stage
constexpr int kRowBytes = kDepth * 2;  // all banks once
constexpr int kChunks = kDepth / 8;    // of 16 bytes
constexpr int kOutside = -(1 << 30);   // a pixel's row that no image has

// A warp multiplies 16 M_TILES rows by RANK / WARPS_N columns of h, then by COLUMNS / WARPS_N of y at a time.
template <int WARPS_M_, int WARPS_N_, int M_TILES_, int RANK_, int COLUMNS_>
struct LowRankShape {
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, M_TILES = M_TILES_, RANK = RANK_, COLUMNS = COLUMNS_;
  static constexpr int ROWS = WARPS_M * M_TILES * 16;
  static constexpr int RANK_TILES = RANK / WARPS_N / 8, COLUMN_TILES = COLUMNS / WARPS_N / 8;
  static constexpr int THREADS = WARPS_M * WARPS_N * 32;
  static constexpr int ROW_BYTES = ROWS * kRowBytes;  // x's part of a stage, and 64 columns of h
  static constexpr int INNER_BYTES = RANK / kDepth * ROW_BYTES;
  static constexpr int STAGE_BYTES = ROW_BYTES + (RANK > COLUMNS ? RANK : COLUMNS) * kRowBytes;
  static_assert(RANK_TILES % 4 == 0 && COLUMN_TILES % 4 == 0 && RANK % kDepth == 0 &&
                    COLUMNS % (THREADS / kChunks) == 0,
                "tile shape");
};

// Which products a kernel does: both, or one of them.
enum LowRankPart { kBoth, kFirst, kSecond };
struct LowRankArgs : SlimCudaLowRank {
  LowRankPart part;
};

template <typename Shape>
__host__ __device__ inline int low_rank_shared_bytes(int stages) {
  return Shape::INNER_BYTES + stages * Shape::STAGE_BYTES;
}

namespace {

// In a stage, rows that lanes read together lie at 128 bytes' distance, so their chunks of 16 bytes change places: by
// the row's last three bits in the left operand, and in the right one, whose columns are dealt out in eights (see
// `multiply` below), by bits 4, 3 and 0.
SLIM_DEVICE int left_key(int row) { return row & 7; }
SLIM_DEVICE int right_key(int row) { return (row >> 3 & 3) * 2 + (row & 1); }

// Fills the stages of the ring one after the other: x and V to the depth of a row of V, then U, `columns` rows at a
// time.
template <typename T, typename Shape>
struct LowRankLoader {
  static constexpr int STEP = Shape::THREADS / kChunks;  // rows that all threads together copy at once
  static constexpr int LEFT = (Shape::ROWS + STEP - 1) / STEP, RIGHT = Shape::RANK / STEP,
                       OUTER = Shape::COLUMNS / STEP;
  static_assert(Shape::ROWS % STEP == 0 && Shape::RANK % STEP == 0, "threads divide the rows");

  const SlimCudaLowRank& a;
  uint32_t ring;
  int stages, depth, chunk, row, slot = 0;
  // The first product: of each of this thread's rows the pixel that the first tap reads, and the next chunk's place.
  const T* pixel[LEFT];
  int y[LEFT], x[LEFT];
  int k, channel, tap_y = 0, tap_x = 0;
  // The second product: the tile of outputs and its part of the rank.
  int column, column_step, inner = 0;

  SLIM_DEVICE LowRankLoader(const SlimCudaLowRank& args, uint32_t ring_at, int tile, int first, int first_column,
                            int thread)
      : a(args),
        ring(ring_at),
        stages(args.stages),
        depth(args.r * args.s * int(args.c_in)),
        chunk(thread % kChunks),
        row(thread / kChunks),
        k(first * kDepth + chunk * 8),
        channel(k),
        column(first_column),
        column_step(args.splits * Shape::COLUMNS) {
    const int pixels = int(a.p) * int(a.q), rows = int(a.n) * pixels;
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const int m = tile * Shape::ROWS + row + i * STEP;
      const int image = m / pixels, rest = m % pixels;
      y[i] = m < rows ? rest / int(a.q) * a.stride_h - a.pad_h : kOutside;
      x[i] = rest % int(a.q) * a.stride_w - a.pad_w;
      const int64_t first = m < rows ? (int64_t(image) * a.h + y[i]) * a.w + x[i] : 0;
      pixel[i] = static_cast<const T*>(a.x) + first * a.c_in;
    }
    wrap();
  }

  // Chunks of a tap's channels follow each other; behind the last one comes the next tap.
  SLIM_DEVICE void wrap() {
    while (channel >= a.c_in) {
      channel -= int(a.c_in);
      if (++tap_x == a.s) {
        tap_x = 0;
        ++tap_y;
      }
    }
  }

  SLIM_DEVICE void fill_inner() {
    const uint32_t to = ring + slot * Shape::STAGE_BYTES + row * kRowBytes;
    const int down = tap_y * a.dil_h, right = tap_x * a.dil_w;
    const int64_t offset = (int64_t(down) * a.w + right) * a.c_in + channel;
    const bool within = k < depth;
#pragma unroll
    for (int i = 0; i < LEFT; ++i) {
      const bool inside = within & (unsigned(y[i] + down) < unsigned(a.h)) & (unsigned(x[i] + right) < unsigned(a.w));
      hw::copy_async_16(to + i * STEP * kRowBytes + (chunk ^ left_key(row)) * 16, pixel[i] + offset, inside);
    }
    const T* from = static_cast<const T*>(a.v) + int64_t(row) * depth + k;
#pragma unroll
    for (int i = 0; i < RIGHT; ++i) {
      const int r = row + i * STEP;
      hw::copy_async_16(to + Shape::ROW_BYTES + i * STEP * kRowBytes + (chunk ^ right_key(r)) * 16, from,
                        within & (r < a.rank));
      from += int64_t(STEP) * depth;
    }
    k += kDepth;
    channel += kDepth;
    wrap();
  }

  SLIM_DEVICE void fill_outer() {
    if (column < a.c_out) {
      const uint32_t to = ring + slot * Shape::STAGE_BYTES + Shape::ROW_BYTES + row * kRowBytes;
      const int at = inner + chunk * 8;
      const T* from = static_cast<const T*>(a.u) + int64_t(column + row) * a.u_row + at;
#pragma unroll
      for (int i = 0; i < OUTER; ++i) {
        const int o = row + i * STEP;
        hw::copy_async_16(to + i * STEP * kRowBytes + (chunk ^ right_key(o)) * 16, from,
                          (at < a.u_row) & (column + o < a.c_out));
        from += int64_t(STEP) * a.u_row;
      }
      inner += kDepth;
      if (inner >= a.rank) {
        inner = 0;
        column += column_step;
      }
    }
    advance();
  }

  // The next stage, of whichever product.
  SLIM_DEVICE void fill(bool first_product) {
    if (!first_product) return fill_outer();
    fill_inner();
    advance();
  }

  SLIM_DEVICE void advance() {
    hw::copy_async_commit();
    if (++slot == stages) slot = 0;
  }
};

// A warp's sums: 16 M_TILES rows by 8 N_TILES columns. Column 8 j + 2 q + e of an instruction is column
// 32 (j / 4) + 8 q + 2 (j % 4) + e of the matrix, so that a lane has eight neighbours of every 32.
template <typename T, int M_TILES, int N_TILES>
struct WarpTile {
  float sum[M_TILES][N_TILES][4];

  SLIM_DEVICE void begin(const void* bias, int first, int end, int lane) {
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = first + j / 4 * 32 + (lane & 3) * 8 + j % 4 * 2 + e;
        const bool given = bias != nullptr && column < end;
        const float v = given ? hw::load_number(static_cast<const T*>(bias) + column) : 0.0f;
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) sum[i][j][e] = sum[i][j][2 + e] = v;
      }
    }
  }

  // Adds 64 numbers of depth; `left` and `right` are the warp's first row of either operand.
  SLIM_DEVICE void multiply(uint32_t left, uint32_t right, int lane) {
    const int matrix = lane >> 3, i8 = lane & 7;
    const uint32_t rows = left + (lane & 15) * kRowBytes, row_chunk = ((lane >> 4) ^ left_key(lane)) * 16;
    const int column = (i8 >> 1) * 8 + (matrix >> 1) * 2 + (i8 & 1);
    const uint32_t columns = right + column * kRowBytes, column_chunk = ((matrix & 1) ^ right_key(column)) * 16;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[M_TILES][4];
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) hw::load_matrices(a[i], rows + (row_chunk ^ k * 32) + i * 16 * kRowBytes);
#pragma unroll
      for (int j = 0; j < N_TILES; j += 2) {
        uint32_t b[4];
        hw::load_matrices(b, columns + (column_chunk ^ k * 32) + (j / 4 * 32 + j % 4 * 2) * kRowBytes);
#pragma unroll
        for (int i = 0; i < M_TILES; ++i) {
          hw::multiply<T>(sum[i][j], a[i], b[0], b[1]);
          hw::multiply<T>(sum[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // All sums of the lane in vectors of four, a vector of all threads together: written, and those of so many blocks
  // added up, several blocks' at once because each load takes long.
  static constexpr int VECTORS = M_TILES * N_TILES;
  SLIM_DEVICE void store_partial(unsigned char* to, int64_t of_vector) const {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const float (&d)[4] = sum[v / N_TILES][v % N_TILES];
      hw::store_global_128(to + v * of_vector, make_uint4(hw::bits_of_float(d[0]), hw::bits_of_float(d[1]),
                                                          hw::bits_of_float(d[2]), hw::bits_of_float(d[3])));
    }
  }
  SLIM_DEVICE void add_partial(const unsigned char* from, int64_t of_vector, int blocks) {
    constexpr int TOGETHER = VECTORS < 16 ? 16 / VECTORS : 1;
    for (int first = 0; first < blocks; first += TOGETHER) {
      uint4 four[TOGETHER][VECTORS];
#pragma unroll
      for (int b = 0; b < TOGETHER; ++b) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
          four[b][v] = make_uint4(0, 0, 0, 0);
          if (first + b < blocks) {
            four[b][v] = hw::load_global_128(from + (int64_t(first + b) * VECTORS + v) * of_vector);
          }
        }
      }
#pragma unroll
      for (int b = 0; b < TOGETHER; ++b) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
          float (&d)[4] = sum[v / N_TILES][v % N_TILES];
          d[0] += hw::float_of_bits(four[b][v].x);
          d[1] += hw::float_of_bits(four[b][v].y);
          d[2] += hw::float_of_bits(four[b][v].z);
          d[3] += hw::float_of_bits(four[b][v].w);
        }
      }
    }
  }

  // Calls put(row, column, eight neighbouring sums) for all that this lane has, counted from the warp's first.
  template <typename Put>
  SLIM_DEVICE void each_eight(int lane, Put put) const {
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int group = 0; group < N_TILES / 4; ++group) {
          float v[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = sum[i][group * 4 + e / 2][half * 2 + e % 2];
          put(i * 16 + half * 8 + (lane >> 2), group * 32 + (lane & 3) * 8, v);
        }
      }
    }
  }
};

template <typename T, typename Shape>
SLIM_DEVICE void low_rank(const LowRankArgs& a) {
  using Inner = WarpTile<T, Shape::M_TILES, Shape::RANK_TILES>;
  using Outer = WarpTile<T, Shape::M_TILES, Shape::COLUMN_TILES>;
  const int thread = int(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const int warp_m = warp % Shape::WARPS_M, warp_n = warp / Shape::WARPS_M;
  const int blocks_of_tile = a.part == kFirst ? a.depth_splits : a.splits;
  const int tile = int(blockIdx.x) / blocks_of_tile, split = int(blockIdx.x) % blocks_of_tile;
  const int tiles = int(gridDim.x) / blocks_of_tile;
  const uint32_t inner = hw::shared_memory(), ring = inner + Shape::INNER_BYTES;
  const int first_row = warp_m * Shape::M_TILES * 16, first_rank = warp_n * Shape::RANK_TILES * 8;
  // The stages of the first product that are this block's.
  const int depth_steps = (a.r * a.s * int(a.c_in) + kDepth - 1) / kDepth;
  const int begin = a.part == kFirst ? int(int64_t(depth_steps) * split / a.depth_splits) : 0;
  const int end = a.part == kFirst ? int(int64_t(depth_steps) * (split + 1) / a.depth_splits) : depth_steps;
  const int steps = a.part == kSecond ? 0 : end - begin, parts = (a.rank + kDepth - 1) / kDepth;

  if (a.part == kFirst) hw::let_next_kernel_begin();
  LowRankLoader<T, Shape> loader(a, ring, tile, begin, a.part == kFirst ? int(a.c_out) : split * Shape::COLUMNS,
                                 thread);
  for (int i = 0; i < a.stages - 1; ++i) loader.fill(i < steps);
  int slot = 0, filled = a.stages - 1;
  const auto next = [&](bool first_product) {
    hw::copy_async_wait_all_but(a.stages - 2);
    hw::synchronize();  // the stage has arrived, and nobody multiplies the one that is filled now
    loader.fill(first_product);
    const uint32_t stage = ring + slot * Shape::STAGE_BYTES;
    if (++slot == a.stages) slot = 0;
    return stage;
  };

  {
    Inner product;
    product.begin(nullptr, 0, 0, lane);
    for (int i = 0; i < steps; ++i) {
      const uint32_t stage = next(filled++ < steps);
      product.multiply(stage + first_row * kRowBytes, stage + Shape::ROW_BYTES + first_rank * kRowBytes, lane);
    }
    unsigned char* const partial =
        static_cast<unsigned char*>(a.partial) + (int64_t(tile) * Shape::THREADS + thread) * 16;
    const int64_t of_vector = int64_t(tiles) * Shape::THREADS * 16;
    if (a.part == kFirst) {
      product.store_partial(partial + split * Inner::VECTORS * of_vector, of_vector);
      hw::copy_async_wait<0>();
      return;
    }
    if (a.part == kSecond) {
      hw::wait_for_previous_kernel();  // which wrote the partial sums, or still reads y
      product.add_partial(partial, of_vector, a.depth_splits);
    }
    product.each_eight(lane, [&](int row, int column, float (&v)[8]) {
      row += first_row;
      column += first_rank;
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = column + e < a.rank ? v[e] : 0.0f;  // not NaN, where a number of x is infinite
      hw::store_shared_128(
          inner + column / kDepth * Shape::ROW_BYTES + row * kRowBytes + (column % kDepth / 8 ^ left_key(row)) * 16,
          eight_packed<T>(v, false));
    });
  }
  const int rows = int(a.n) * int(a.p) * int(a.q) - tile * Shape::ROWS;
  for (int column = split * Shape::COLUMNS; column < a.c_out; column += a.splits * Shape::COLUMNS) {
    Outer product;
    const int first_column = warp_n * Shape::COLUMN_TILES * 8;
    product.begin(a.bias, column + first_column, int(a.c_out), lane);
    for (int i = 0; i < parts; ++i) {
      const uint32_t stage = next(false);  // behind its barrier h is complete
      product.multiply(inner + i * Shape::ROW_BYTES + first_row * kRowBytes,
                       stage + Shape::ROW_BYTES + first_column * kRowBytes, lane);
    }
    T* const to = static_cast<T*>(a.y) + int64_t(tile) * Shape::ROWS * a.c_out + column;
    product.each_eight(lane, [&](int row, int at, const float (&v)[8]) {
      row += first_row;
      at += first_column;
      if (row < rows && column + at < a.c_out) {
        hw::store_global_128(to + int64_t(row) * a.c_out + at, eight_packed<T>(v, a.relu != 0));
      }
    });
  }
  hw::copy_async_wait<0>();
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) low_rank_kernel(const __grid_constant__ LowRankArgs a) {
  low_rank<T, Shape>(a);
}

}  // namespace
}  // namespace slim
