// The gradient of stored weights on tensor cores: for every stored block a product over pixels,
//   dW[o, c] = sum over output pixels of grad[pixel, o] * x[the pixel that the block's tap reads, c]
// A thread block has up to 8 SLOTS pieces of one block row's stored blocks, COLUMN output channels x 16 input channels
// each, and walks over one part of the pixels. Their gradients, which all its pieces multiply, and each piece's own
// pixels stream through a ring in shared memory, 32 pixels a stage. Both operands lie there pixel by pixel, so both are
// transposed where they are loaded. The parts' sums are added in their order by a second kernel.
//
// What bounds it with 128 output channels: of a piece, 16 pixels are 16 products, which take 16 clocks, or 26 at the
// rate that mma.sync reaches on Hopper. Shared memory gives 2.5 KB of operands for them and takes 0.8 KB, 26 clocks at
// 128 bytes; L2 gives the 0.8 KB, 17 clocks at the 44 bytes that an H200 gave to a processor. With fewer channels a
// piece's pixels are shared by fewer products: 32 channels need 4 products and 0.5 KB from L2, which then is the limit.
#pragma once
#include "common.cuh"
#include "tensor_cores.cuh"

namespace slim {

constexpr int kPieceChannels = 16;  // input channels of a piece
constexpr int kStagePixels = 32;
constexpr int kPieceBytes = kStagePixels * kPieceChannels * 2;

template <int M_TILES_, int SLOTS_>
struct GradientShape {
  static constexpr int M_TILES = M_TILES_;
  static constexpr int SLOTS = SLOTS_;  // pieces of a warp
  static constexpr int WARPS = 8, THREADS = WARPS * 32;
  static constexpr int PIECES = WARPS * SLOTS;  // of a thread block
  static constexpr int COLUMN = M_TILES * 16;   // output channels
  static constexpr int ROW_BYTES = COLUMN * 2;  // of a pixel's gradient
  static constexpr int GRAD_BYTES = kStagePixels * ROW_BYTES;
  static constexpr int STAGE_BYTES = GRAD_BYTES + PIECES * kPieceBytes;
  static constexpr int TABLE_BYTES = (PIECES * 16 + 127) / 128 * 128;
};

template <typename Shape>
constexpr int gradient_shared_bytes(int stages) {
  return Shape::TABLE_BYTES + stages * Shape::STAGE_BYTES;
}

namespace {

// Which 16 bytes of a pixel's row go where: eight pixels that one instruction reads at once lie on different banks.
template <int ROW_BYTES>
SLIM_DEVICE int turn_of_row(int pixel) {
  constexpr int CHUNKS = ROW_BYTES / 16 < 8 ? ROW_BYTES / 16 : 8;
  return pixel / (8 / CHUNKS) % CHUNKS;
}

// The pieces of a thread block: of block row `row`, `count` ones from `first` on, `sub` COLUMNs below the block's top.
struct Pieces {
  int row, sub, first, count;
};

template <typename Shape>
SLIM_DEVICE Pieces find_pieces(const SlimCudaWeightGradient& a, int chunk) {
  const int wide = a.block_in / kPieceChannels, high = a.block_out / Shape::COLUMN;
  const int rows = (int(a.c_out) + a.block_out - 1) / a.block_out;
  for (int row = 0; row < rows; ++row) {
    const int stored = (a.crow_indices[row + 1] - a.crow_indices[row]) * wide;
    const int chunks = (stored + Shape::PIECES - 1) / Shape::PIECES;
    if (chunk < chunks * high) {
      const int each = (stored + chunks - 1) / chunks, first = chunk / high * each;
      return {row, chunk % high, first, max(min(each, stored - first), 0)};
    }
    chunk -= chunks * high;
  }
  return {0, 0, 0, 0};
}

// Fills stages of the ring. A thread has one pixel of each stage, whose input it copies for a quarter of the pieces,
// and its share of the stage's gradients. Everything that moves with the pixel is advanced, not computed anew.
template <typename T, typename Shape>
struct GradientLoader {
  static constexpr int CHUNKS = Shape::COLUMN / 8;  // of 16 bytes of a pixel's gradient
  static constexpr int GRAD_COPIES = kStagePixels * CHUNKS;
  static constexpr int GRAD_ROWS = Shape::THREADS / CHUNKS;  // pixels further is a thread's next copy

  const SlimCudaWeightGradient& a;
  uint32_t table, stage, first_stage, last_stage;
  int32_t left;             // pixels of the part from the stage's first on
  int32_t y, x, top, edge;  // the pixel's, and the row and column of its first tap
  bool grad_inside;         // this thread's channels exist
  const unsigned char* grad;
  const unsigned char* pixel;                                // of x, at its first tap
  int64_t grad_row, grad_stage, step, next_row, next_image;  // in bytes

  SLIM_DEVICE void start(uint32_t at, uint32_t ring, int64_t begin, int64_t end, int channel) {
    const int thread = int(threadIdx.x), k = thread >> 1 & 31, half = thread & 1;
    constexpr int64_t SIZE = sizeof(T);
    table = at + (thread >> 6) * 16;
    first_stage = stage = ring;
    last_stage = ring + (a.stages - 1) * Shape::STAGE_BYTES;
    left = int32_t(end - begin);
    const int64_t area = a.p * a.q, mine = begin + k, image = mine / area;
    y = int(mine % area / a.q);
    x = int(mine % a.q);
    top = y * a.stride_h - a.pad_h;
    edge = x * a.stride_w - a.pad_w;
    const int64_t row_bytes = a.w * a.c_in * SIZE;
    pixel =
        static_cast<const unsigned char*>(a.x) + (image * a.h + top) * row_bytes + (edge * a.c_in + half * 8) * SIZE;
    step = (a.step_n * a.h + int64_t(a.step_p) * a.stride_h) * row_bytes + a.step_q * a.stride_w * a.c_in * SIZE;
    next_row = a.stride_h * row_bytes - a.q * a.stride_w * a.c_in * SIZE;
    next_image = (a.h - a.p * a.stride_h) * row_bytes;
    const int row = thread / CHUNKS, chunk = thread % CHUNKS;
    grad_row = GRAD_ROWS * a.c_out * SIZE;
    grad_stage = kStagePixels * a.c_out * SIZE;
    grad = static_cast<const unsigned char*>(a.grad) + ((begin + row) * a.c_out + channel + chunk * 8) * SIZE;
    grad_inside = channel + chunk * 8 < a.c_out && thread < GRAD_COPIES;
  }
  SLIM_DEVICE void fill() {
    if (left > 0) {
      const int thread = int(threadIdx.x), k = thread >> 1 & 31, half = thread & 1;
      const int row = thread / CHUNKS, chunk = thread % CHUNKS;
      const uint32_t to_grad = stage + row * Shape::ROW_BYTES + (chunk ^ turn_of_row<Shape::ROW_BYTES>(row)) * 16;
      if (GRAD_COPIES >= Shape::THREADS || thread < GRAD_COPIES) {
#pragma unroll
        for (int i = 0; i * Shape::THREADS < GRAD_COPIES; ++i) {  // GRAD_ROWS is a multiple of 8: the turn is the same
          const bool inside = grad_inside & (row + i * GRAD_ROWS < left);
          hw::copy_async_16(to_grad + i * GRAD_ROWS * Shape::ROW_BYTES, grad + i * grad_row, inside);
        }
      }
      const uint32_t to =
          stage + Shape::GRAD_BYTES + (thread >> 6) * kPieceBytes + k * 32 + (half ^ turn_of_row<32>(k)) * 16;
      const bool here = k < left;
#pragma unroll
      for (int i = 0; i < Shape::PIECES / (Shape::THREADS / 64); ++i) {
        const uint4 entry = hw::load_shared_128(table + i * (Shape::THREADS / 64) * 16);
        const bool inside = here & (unsigned(top + int(entry.x)) < unsigned(a.h)) &
                            (unsigned(edge + int(entry.y)) < unsigned(a.w)) & (half * 8 < int(entry.w));
        hw::copy_async_16(to + i * (Shape::THREADS / 64) * kPieceBytes,
                          pixel + int64_t(int(entry.z)) * int64_t(sizeof(T)), inside);
      }
      advance();
    }
    hw::copy_async_commit();
  }
  // To the same pixel of the next stage.
  SLIM_DEVICE void advance() {
    left -= kStagePixels;
    grad += grad_stage;
    x += a.step_q;
    y += a.step_p;
    pixel += step;
    if (x >= a.q) {
      x -= int(a.q);
      ++y;
      pixel += next_row;
    }
    if (y >= a.p) {
      y -= int(a.p);
      pixel += next_image;
    }
    top = y * a.stride_h - a.pad_h;
    edge = x * a.stride_w - a.pad_w;
    stage = stage == last_stage ? first_stage : stage + Shape::STAGE_BYTES;
  }
};

template <typename T, typename Shape>
SLIM_DEVICE void weight_gradient(const SlimCudaWeightGradient& a) {
  const int thread = int(threadIdx.x), lane = thread & 31, warp = thread >> 5;
  const int part = int(blockIdx.x) / a.chunks;  // blocks of one part are neighbours: they share pixels in L2
  const Pieces pieces = find_pieces<Shape>(a, int(blockIdx.x) % a.chunks);
  if (pieces.count == 0) return;
  const uint32_t table = hw::shared_memory(), ring = table + Shape::TABLE_BYTES;
  const int wide = a.block_in / kPieceChannels, groups = (int(a.c_in) + a.block_in - 1) / a.block_in;
  // Of each piece: rows and columns from the pixel's first tap, elements from it to the piece's first channel, and how
  // many channels there are from there on.
  if (thread < Shape::PIECES) {
    uint4 entry = make_uint4(0, 0, 0, 0);
    if (thread < pieces.count) {
      const int piece = pieces.first + thread;
      const int column = a.col_indices[a.crow_indices[pieces.row] + piece / wide];
      const int tap = column / groups, channel = column % groups * a.block_in + piece % wide * kPieceChannels;
      const int down = tap / a.s * a.dil_h, right = tap % a.s * a.dil_w;
      entry = make_uint4(down, right, (down * int(a.w) + right) * int(a.c_in) + channel, max(int(a.c_in) - channel, 0));
    }
    hw::store_shared_128(table + thread * 16, entry);
  }
  hw::synchronize();

  const int64_t pixels = a.n * a.p * a.q, begin = part * a.part_pixels;
  const int64_t end = begin + a.part_pixels < pixels ? begin + a.part_pixels : pixels;
  const int channel = pieces.row * a.block_out + pieces.sub * Shape::COLUMN;
  GradientLoader<T, Shape> loader{a};
  loader.start(table, ring, begin, end, channel);
  for (int s = 0; s < a.stages - 1; ++s) loader.fill();

  float sum[Shape::SLOTS][Shape::M_TILES][2][4];
#pragma unroll
  for (int s = 0; s < Shape::SLOTS; ++s) {
#pragma unroll
    for (int m = 0; m < Shape::M_TILES; ++m) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[s][m][e / 4][e % 4] = 0.0f;
    }
  }
  // This lane's rows: of a tile of gradients, matrices 0 and 1 are the first eight pixels, 1 and 3 the upper channels;
  // of a piece, 1 and 3 are the last eight pixels, 2 and 3 the upper channels.
  const int matrix = lane >> 3, row_of_grad = (matrix >> 1) * 8 + (lane & 7), row_of_x = (matrix & 1) * 8 + (lane & 7);
  const int turn = turn_of_row<Shape::ROW_BYTES>(row_of_grad);
  const uint32_t grad_at = row_of_grad * Shape::ROW_BYTES + ((matrix ^ turn) & 1) * 16;
  const uint32_t grad_turn = (turn & ~1) * 16;
  const uint32_t x_at =
      Shape::GRAD_BYTES + warp * kPieceBytes + row_of_x * 32 + ((matrix >> 1) ^ turn_of_row<32>(row_of_x)) * 16;
  uint32_t stage = ring;
  const int stages = int((end - begin + kStagePixels - 1) / kStagePixels);
  for (int i = 0; i < stages; ++i) {
    hw::copy_async_wait_all_but(a.stages - 2);
    hw::synchronize();
    loader.fill();
#pragma unroll
    for (int k = 0; k < kStagePixels; k += 16) {
      uint32_t grads[Shape::M_TILES][4];
#pragma unroll
      for (int m = 0; m < Shape::M_TILES; ++m) {
        hw::load_matrices_transposed(grads[m], stage + grad_at + k * Shape::ROW_BYTES + ((m * 32) ^ grad_turn));
      }
#pragma unroll
      for (int s = 0; s < Shape::SLOTS; ++s) {
        if (warp + s * Shape::WARPS < pieces.count) {
          uint32_t inputs[4];
          hw::load_matrices_transposed(inputs, stage + x_at + s * Shape::WARPS * kPieceBytes + k * 32);
#pragma unroll
          for (int m = 0; m < Shape::M_TILES; ++m) {
            hw::multiply<T>(sum[s][m][0], grads[m], inputs[0], inputs[1]);
            hw::multiply<T>(sum[s][m][1], grads[m], inputs[2], inputs[3]);
          }
        }
      }
    }
    stage = stage == loader.last_stage ? ring : stage + Shape::STAGE_BYTES;
  }
  hw::copy_async_wait<0>();

  float* const out = a.partial + part * a.elements + int64_t(pieces.sub * Shape::COLUMN + (lane >> 2)) * a.block_in;
#pragma unroll
  for (int s = 0; s < Shape::SLOTS; ++s) {
    const int piece = pieces.first + warp + s * Shape::WARPS;
    if (warp + s * Shape::WARPS >= pieces.count) break;
    const int64_t block = a.crow_indices[pieces.row] + piece / wide;
    float* const to = out + block * a.block_out * a.block_in + piece % wide * kPieceChannels + (lane & 3) * 2;
#pragma unroll
    for (int m = 0; m < Shape::M_TILES; ++m) {
#pragma unroll
      for (int h = 0; h < 4; ++h) {  // eight channels to the right, eight below
        hw::store_global_64(to + int64_t(m * 16 + h / 2 * 8) * a.block_in + h % 2 * 8,
                            make_uint2(hw::bits_of_float(sum[s][m][h % 2][h / 2 * 2]),
                                       hw::bits_of_float(sum[s][m][h % 2][h / 2 * 2 + 1])));
      }
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    weight_gradient_kernel(const __grid_constant__ SlimCudaWeightGradient a) {
  weight_gradient<T, Shape>(a);
}

constexpr int kSumThreads = 256;

// Adds the parts in their order and rounds once. Blocks behind the stored ones are 0.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) gradient_sum_kernel(const __grid_constant__ SlimCudaWeightGradient a) {
  const int64_t at = (int64_t(blockIdx.x) * kSumThreads + threadIdx.x) * 4;
  if (at >= a.elements) return;
  const int rows = (int(a.c_out) + a.block_out - 1) / a.block_out;
  float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (at < int64_t(a.crow_indices[rows]) * a.block_out * a.block_in) {
#pragma unroll 4
    for (int part = 0; part < a.parts; ++part) {
      const uint4 four = hw::load_global_128(a.partial + part * a.elements + at);
      v[0] += hw::float_of_bits(four.x);
      v[1] += hw::float_of_bits(four.y);
      v[2] += hw::float_of_bits(four.z);
      v[3] += hw::float_of_bits(four.w);
    }
  }
  hw::store_global_64(static_cast<T*>(a.values_grad) + at,
                      make_uint2(hw::pack<T, false>(v[0], v[1]), hw::pack<T, false>(v[2], v[3])));
}

}  // namespace
}  // namespace slim
