// A chain of block-sparse convolutions of a few images in one launch. A group of thread blocks takes some of the images
// through all layers; between two layers its blocks wait for each other, and for no other group. At such sizes a layer
// is latency: what does not depend on the layer in front (weights, steps, bias, places of pixels) is fetched while the
// group waits, and pixels go from L2 straight into the registers that multiply them.
#pragma once
#include "kernels.h"
#include "tensor_cores.cuh"

namespace slim {

struct ChainArguments {
  SlimCudaChainLayer layers[SLIM_CUDA_MAX_CHAIN];
  int64_t n;
  int32_t* counters;
  int32_t count, images, group;
  void* stream;
};

namespace {

constexpr int kChainWarps = 8, kChainThreads = kChainWarps * 32;
constexpr int kChainPixels = 16, kChainColumn = 32;         // pixels and output channels of a warp
constexpr int kChainStepBytes = kChainColumn * 32;          // weights of a step: 32 channels x 16 input channels
constexpr int kChainDepth = 6;                              // steps of a warp on their way
constexpr int kChainPitch = kChainColumn * 4 + 16;          // bytes of a row of sums: no bank conflicts
constexpr int kChainSums = kChainPixels * kChainPitch;      // of a warp
constexpr int kChainShared = 2 * kChainWarps * kChainSums;  // two sets: one is read while the next one is written
constexpr int kFarAway = -(1 << 20);                        // a coordinate outside of every image

// One step as the table holds it: 16 input channels from `channel` on, of the pixel `down` and `right` from the
// output's; of the 16 there are `left`.
struct ChainStep {
  int channel, down, right, left;
};

// What a warp has to do in one item of a layer, 32 output channels and 16 pixels for each warp that does not share a
// pixel's steps with others. All of it follows from numbers.
struct ChainPlace {
  const unsigned char* x;
  const unsigned char* weights;  // this lane's 16 bytes of the warp's first step
  const uint4* steps;
  const void* bias;    // of what this thread stores, or NULL
  unsigned char* out;  // where this thread stores: four channels, of pixels from `first_pixel` on
  int count;           // of the warp's steps
  int first_pixel, outputs;
  int h, w, c_in;       // of x
  int y[2], column[2];  // of the two pixels that this lane reads: where they lie,
  int base[2];          // and the distance in elements of their four channels
  bool stores;

  SLIM_DEVICE static unsigned columns(const SlimCudaChainLayer& l) {
    return unsigned(l.c_out + kChainColumn - 1) / kChainColumn;
  }
  SLIM_DEVICE static int outputs_of(const SlimCudaChainLayer& l, int images) {
    return images * (l.pool ? (l.p >> 1) * (l.q >> 1) : l.p * l.q);
  }
  SLIM_DEVICE static int items(const SlimCudaChainLayer& l, int images) {
    const int pixels = outputs_of(l, images) << (l.pool ? 2 : 0), of_item = kChainPixels << l.row_bits;
    return int(columns(l)) * ((pixels + of_item - 1) >> (4 + l.row_bits));
  }

  // `first` and `last` are the steps of the item's column.
  SLIM_DEVICE void find(const SlimCudaChainLayer& l, int group, int images, int item, int first, int last) {
    const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
    const unsigned row = unsigned(item) / columns(l), item_column = unsigned(item) - row * columns(l);
    const int share = warp >> l.row_bits, share_bits = 3 - l.row_bits;
    const int begin = first + ((last - first) * share >> share_bits);
    const bool any = item < items(l, images);
    count = any ? first + ((last - first) * (share + 1) >> share_bits) - begin : 0;
    x = static_cast<const unsigned char*>(l.x) + group * l.x_group;
    weights = static_cast<const unsigned char*>(l.weights) + int64_t(begin) * kChainStepBytes + lane * 16;
    steps = reinterpret_cast<const uint4*>(l.steps) + begin;
    const int channel = int(item_column) * kChainColumn + (lane & 7) * 4;
    stores = any & (channel < l.c_out);
    bias = l.bias != nullptr && stores ? static_cast<const unsigned char*>(l.bias) + channel * 2 : nullptr;
    out = static_cast<unsigned char*>(l.y) + group * l.y_group + channel * 2;
    first_pixel = int(row) * (kChainPixels << l.row_bits);
    outputs = outputs_of(l, images);
    h = l.h;
    w = l.w;
    c_in = l.c_in;
    const unsigned rows = unsigned(l.p) >> l.pool, cols = unsigned(l.q) >> l.pool;
    const int first_of_warp = first_pixel + (warp & ((1 << l.row_bits) - 1)) * kChainPixels;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned pixel = unsigned(first_of_warp + (lane >> 2) + i * 8);  // with a pool four of them are a window
      const unsigned at = pixel >> 2 * l.pool, image = at / (rows * cols), in_image = at - image * (rows * cols);
      const unsigned out_y = in_image / cols, out_x = in_image - out_y * cols;
      const int top = int(out_y << l.pool | (pixel >> 1 & unsigned(l.pool))) * l.stride_h;
      column[i] = int(out_x << l.pool | (pixel & unsigned(l.pool))) * l.stride_w;
      y[i] = int(image) < images ? top : kFarAway;
      base[i] = ((int(image) * h + top) * w + column[i]) * c_in + (lane & 3) * 4;
    }
  }
};

// What a warp multiplies. Weights are the instruction's rows and pixels its columns: then a lane's operands are what
// one load brings.
template <typename T>
struct ChainTile {
  ChainPlace at;
  uint2 bias;
  ChainStep step[kChainDepth];
  uint32_t a[kChainDepth][2][4];
  uint2 b[kChainDepth][2];

  SLIM_DEVICE ChainStep read_step(int i) const {
    const uint4 v = hw::load_global_128(at.steps + i);
    return {int(v.x), int(v.y), int(v.z), int(v.w)};
  }
  SLIM_DEVICE void read_weights(int i, int s) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint4 v = hw::load_global_128(at.weights + i * kChainStepBytes + t * 512);
      a[s][t][0] = v.x;
      a[s][t][1] = v.y;
      a[s][t][2] = v.z;
      a[s][t][3] = v.w;
    }
  }

  // Everything that does not hang on the layer in front.
  SLIM_DEVICE void fetch() {
#pragma unroll
    for (int s = 0; s < kChainDepth; ++s) step[s] = read_step(s);  // the table goes on behind the last step
#pragma unroll
    for (int s = 0; s < kChainDepth; ++s) {
      if (s < at.count) read_weights(s, s);
    }
    bias = make_uint2(0, 0);
    if (at.bias != nullptr) bias = hw::load_global_64(at.bias);
  }

  // The two pixels' four channels of a step, zeros of a step that is not `wanted`; nothing outside of the image is
  // read.
  SLIM_DEVICE void read_pixels(int s, bool wanted) {
    const int away = (step[s].down * at.w + step[s].right) * at.c_in + step[s].channel;
    const bool there = wanted & (int(threadIdx.x & 3) * 4 < step[s].left);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = there & (unsigned(at.y[i] + step[s].down) < unsigned(at.h)) &
                          (unsigned(at.column[i] + step[s].right) < unsigned(at.w));
      b[s][i] = hw::load_from_peers_64(at.x + int64_t(at.base[i] + away) * int(sizeof(T)), inside);
    }
  }
  SLIM_DEVICE void begin() {
#pragma unroll
    for (int s = 0; s < kChainDepth; ++s) read_pixels(s, s < at.count);
    if (at.count > kChainDepth) {
#pragma unroll
      for (int s = 0; s < kChainDepth; ++s) step[s] = read_step(kChainDepth + s);
    }
  }

  SLIM_DEVICE void add(float (&sum)[2][2][4], int s) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int t = 0; t < 2; ++t) hw::multiply<T>(sum[t][i], a[s][t], b[s][i].x, b[s][i].y);
    }
  }
  // Adds the products of all steps.
  SLIM_DEVICE void multiply(float (&sum)[2][2][4]) {
    int left = at.count;
#pragma unroll 1
    for (; left > kChainDepth; left -= kChainDepth) {
#pragma unroll
      for (int s = 0; s < kChainDepth; ++s) {
        add(sum, s);
        if (kChainDepth + s < left) read_weights(kChainDepth + s, s);
        read_pixels(s, kChainDepth + s < left);
        step[s] = read_step(2 * kChainDepth + s);
      }
      at.weights += kChainDepth * kChainStepBytes;
      at.steps += kChainDepth;
    }
#pragma unroll
    for (int s = 0; s < kChainDepth; ++s) {
      if (s < left) add(sum, s);
    }
  }
};

// Row 8 h + g of the instruction's matrix t was packed as channel 4 g + 2 t + h: a lane has four neighbouring channels
// of pixels 2 q and 2 q + 1 of each eight.
SLIM_DEVICE void write_sums(uint32_t to, const float (&sum)[2][2][4]) {
  const int lane = int(threadIdx.x) & 31;
  const uint32_t mine = to + (lane & 3) * 2 * kChainPitch + (lane >> 2) * 16;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      hw::store_shared_128(mine + (i * 8 + e) * kChainPitch,
                           make_uint4(hw::bits_of_float(sum[0][i][e]), hw::bits_of_float(sum[0][i][2 + e]),
                                      hw::bits_of_float(sum[1][i][e]), hw::bits_of_float(sum[1][i][2 + e])));
    }
  }
}

// Adds the shares of the warps in their order. A thread has four channels of a pixel, and with a pool the window's
// other pixels are in the lanes eight, sixteen and twenty-four on.
template <typename T>
SLIM_DEVICE void store_sums(const SlimCudaChainLayer& l, const ChainTile<T>& tile, uint32_t from) {
  const int shares = kChainWarps >> l.row_bits, apart = kChainSums << l.row_bits;
  for (int t = int(threadIdx.x); t < kChainPixels * 8 << l.row_bits; t += kChainThreads) {
    const uint32_t mine = from + t / 8 / kChainPixels * kChainSums + t / 8 % kChainPixels * kChainPitch + (t & 7) * 16;
    float v[4] = {hw::unpack<T>(tile.bias.x, false), hw::unpack<T>(tile.bias.x, true),
                  hw::unpack<T>(tile.bias.y, false), hw::unpack<T>(tile.bias.y, true)};
#pragma unroll 4
    for (int k = 0; k < shares; ++k) {
      const uint4 four = hw::load_shared_128(mine + k * apart);
      v[0] += hw::float_of_bits(four.x);
      v[1] += hw::float_of_bits(four.y);
      v[2] += hw::float_of_bits(four.z);
      v[3] += hw::float_of_bits(four.w);
    }
    int at = tile.at.first_pixel + t / 8;
    bool stores = tile.at.stores;
    if (l.pool) {
#pragma unroll
      for (int far = 8; far <= 16; far *= 2) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = hw::larger(v[e], hw::from_lane_xor(v[e], far));
      }
      stores &= (at & 3) == 0;
      at >>= 2;
    }
    if (stores & (at < tile.at.outputs)) {
      const uint2 four = l.relu ? make_uint2(hw::pack<T, true>(v[0], v[1]), hw::pack<T, true>(v[2], v[3]))
                                : make_uint2(hw::pack<T, false>(v[0], v[1]), hw::pack<T, false>(v[2], v[3]));
      hw::store_global_64(tile.at.out + int64_t(at) * l.c_out * int(sizeof(T)), four);
    }
  }
}

template <typename T, typename Barrier>
SLIM_DEVICE void chain_conv2d(const ChainArguments& a) {
  const int rank = int(blockIdx.x) % a.group, group = int(blockIdx.x) / a.group, warp = int(threadIdx.x) >> 5;
  const int64_t left = a.n - int64_t(group) * a.images;
  const int images = left < a.images ? int(left) : a.images;
  const uint32_t shared = hw::shared_memory();
  const auto column_start = [&](const SlimCudaChainLayer& l, int item, int next) {
    const unsigned column = unsigned(item) % ChainPlace::columns(l) + next;
    return int(hw::load_global_32(reinterpret_cast<const uint32_t*>(l.starts) + column));
  };
  Barrier barrier(a.counters, group, a.group);
  ChainTile<T> tile;
  int layer = 0, item = rank, set = 0;

  hw::let_next_kernel_begin();
  tile.at.find(a.layers[0], group, images, rank, column_start(a.layers[0], rank, 0),
               column_start(a.layers[0], rank, 1));
  tile.fetch();
  hw::wait_for_previous_kernel();  // which wrote the first layer's x, or still reads y
  while (true) {
    // What comes next is found while the sums are on their way to L2, and fetched while the group waits.
    const SlimCudaChainLayer& l = a.layers[layer];
    const bool more = item + a.group < ChainPlace::items(l, images), done = !more & (layer + 1 == a.count);
    const int next_layer = more | done ? layer : layer + 1, next_item = more ? item + a.group : rank;
    const SlimCudaChainLayer& next = a.layers[next_layer];
    const int first = column_start(next, next_item, 0), last = column_start(next, next_item, 1);
    if (item == rank && layer > 0) barrier.wait();
    tile.begin();
    float sum[2][2][4] = {};
    tile.multiply(sum);
    const uint32_t sums = shared + set * (kChainShared / 2);
    write_sums(sums + warp * kChainSums, sum);
    hw::synchronize();
    store_sums(l, tile, sums);
    if (done) break;
    tile.at.find(next, group, images, next_item, first, last);
    if (!more) barrier.arrive();
    tile.fetch();
    layer = next_layer;
    item = next_item;
    set ^= 1;
  }
}

// Blocks of a group that are a cluster: the hardware's barrier.
struct ClusterBarrier {
  SLIM_DEVICE ClusterBarrier(int32_t*, int, int) {}
  SLIM_DEVICE void arrive() { hw::cluster_arrive(); }
  SLIM_DEVICE void wait() { hw::cluster_wait(); }
};

// Blocks that run at the same time otherwise: a counter of each group, zero at first.
struct CounterBarrier {
  int32_t* counter;
  int group, target = 0;
  SLIM_DEVICE CounterBarrier(int32_t* counters, int which, int blocks) : counter(counters + which), group(blocks) {}
  SLIM_DEVICE void arrive() {
    hw::synchronize();
    if (threadIdx.x == 0) hw::add_release(counter, 1);
  }
  SLIM_DEVICE void wait() {
    target += group;
    if (threadIdx.x == 0) hw::wait_acquire(counter, target);
    hw::synchronize();
  }
};

template <typename T, typename Barrier>
__global__ void __launch_bounds__(kChainThreads, 1) chain_conv2d_kernel(const __grid_constant__ ChainArguments a) {
  chain_conv2d<T, Barrier>(a);
}

}  // namespace
}  // namespace slim
