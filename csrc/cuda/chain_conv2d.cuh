// A chain of block-sparse convolutions of a few images in one launch. A group of thread blocks takes some of the images
// through all layers; between two layers its blocks wait for each other, and for no other group. At such sizes a layer
// is latency: what does not depend on the layer in front (weights, steps, bias, places of pixels) is found and fetched
// while pixels of the present one are on their way and its sums are added up, and pixels go from L2 straight into the
// registers that multiply them.
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
constexpr int kChainPixels = 16, kChainColumn = 32;       // pixels and output channels of a warp
constexpr int kChainStepBytes = kChainColumn * 32;        // weights of a step: 32 channels x 16 input channels
constexpr int kChainDepth = 6;                            // steps of a warp on their way
constexpr int kChainPitch = kChainColumn * 4 + 16;        // bytes of a row of sums: no bank conflicts
constexpr int kChainSums = kChainPixels * kChainPitch;    // of a warp
constexpr int kChainSets = 2 * kChainWarps * kChainSums;  // two sets: one is read while the next one is written
constexpr int kFarAway = -(1 << 20);                      // a coordinate outside of every image
constexpr uint32_t kNoColumn = 1 << 24, kEnd = 0xff;      // of an entry of the list

// The tables behind the sums in shared memory, written once: what follows from a layer's numbers, which come slowly
// from the arguments (a layer's are two lines of the constant cache), and the list of the block's items. A division by
// a number that is not known to the compiler takes some 25 instructions that wait for each other, and a warp waits 4 to
// 5 clocks for each (measured on an H200).
// A layer's record: x and weights, steps and bias, y and starts; h, w, c_in and flags; two divisors; strides, c_out and
// outputs; items, those of this block, columns.
enum ChainPart { kXWeights, kStepsBias, kYStarts, kImage, kDivisors, kSizes, kItems, kChainParts };
constexpr int kChainLayerBytes = kChainParts * 16;
constexpr int kChainLayers = kChainSets, kChainList = kChainLayers + SLIM_CUDA_MAX_CHAIN * kChainLayerBytes;
constexpr int kChainListed = kChainThreads;  // items; the list is written anew where a block has more
constexpr int kChainShared = kChainList + kChainListed * 16;

// One step as the table holds it: 16 input channels from `channel` on, of the pixel `down` and `right` from the
// output's; of the 16 there are `left`.
struct ChainStep {
  int channel, down, right, left;
};

// A number to divide by, and 0xffffffff / by. With 2^32 - 1 = by * inverse + r, (n + 1) * inverse is below 2^32 * (n +
// 1) / by by (n + 1) * (r + 1) / by: not enough to miss a quotient while (n + 1) * (r + 1) is at most 2^32. The
// launcher sees to it that (n + 1) * by is.
struct ChainDivisor {
  uint32_t by, inverse;

  SLIM_DEVICE uint32_t divide(uint32_t n) const { return uint32_t(uint64_t(n + 1) * inverse >> 32); }
};

SLIM_DEVICE uint4 two_pointers(const void* a, const void* b) {
  const uint64_t u = reinterpret_cast<uintptr_t>(a), v = reinterpret_cast<uintptr_t>(b);
  return make_uint4(uint32_t(u), uint32_t(u >> 32), uint32_t(v), uint32_t(v >> 32));
}
template <typename T>
SLIM_DEVICE T* pointer_of(uint32_t low, uint32_t high) {
  return reinterpret_cast<T*>(uintptr_t(uint64_t(high) << 32 | low));
}

// A block's tables: an entry of the list is a layer and 16 to 128 of its pixels (`row` << 8 | layer), a column of 32
// output channels, and the column's first and last step. A block without an item in a layer has one of no column: it
// waits for the others all the same.
struct ChainTables {
  uint32_t layers, list;
  int rank, group;

  SLIM_DEVICE uint32_t place(int layer, ChainPart part) const { return layers + layer * kChainLayerBytes + part * 16; }
  SLIM_DEVICE uint4 of_layer(int layer, ChainPart part) const { return hw::load_shared_128(place(layer, part)); }

  // One warp a layer: all its lanes read the same argument.
  SLIM_DEVICE void write_layers(const ChainArguments& a, int which, int images) {
    for (int i = int(threadIdx.x) >> 5; i < a.count; i += kChainWarps) {
      const SlimCudaChainLayer& l = a.layers[i];
      const uint32_t rows = uint32_t(l.p) >> l.pool, cols = uint32_t(l.q) >> l.pool, outputs = images * rows * cols;
      const uint32_t columns = uint32_t(l.c_out + kChainColumn - 1) / kChainColumn;
      const uint32_t pixels = outputs << 2 * l.pool, of_item = kChainPixels << l.row_bits;
      const uint32_t items = columns * ((pixels + of_item - 1) >> (4 + l.row_bits));
      const uint32_t mine = items > uint32_t(rank) ? (items - rank + group - 1) / uint32_t(group) : 1;
      const int64_t x = which * l.x_group, y = which * l.y_group;
      if ((threadIdx.x & 31) != 0) continue;
      const auto write = [&](ChainPart part, uint4 numbers) { hw::store_shared_128(place(i, part), numbers); };
      write(kXWeights, two_pointers(static_cast<const unsigned char*>(l.x) + x, l.weights));
      write(kStepsBias, two_pointers(l.steps, l.bias));
      write(kYStarts, two_pointers(static_cast<unsigned char*>(l.y) + y, l.starts));
      write(kImage, make_uint4(l.h, l.w, l.c_in, l.row_bits | l.pool << 2 | l.relu << 3));
      write(kDivisors, make_uint4(rows * cols, 0xffffffffu / (rows * cols), cols, 0xffffffffu / cols));
      write(kSizes, make_uint4(l.stride_h, l.stride_w, l.c_out, outputs));
      write(kItems, make_uint4(items, mine, columns, 0));
    }
  }

  // The block's entries from `begin` on, one for each thread.
  SLIM_DEVICE void write_list(int count, int begin) const {
    uint32_t left = begin + threadIdx.x;
    int layer = 0;
    uint4 numbers = make_uint4(0, 0, 0, 0);
    for (; layer < count; ++layer) {
      numbers = of_layer(layer, kItems);
      if (left < numbers.y) break;
      left -= numbers.y;
    }
    uint4 entry = make_uint4(kEnd, kNoColumn, 0, 0);
    const uint32_t item = rank + left * group;
    if (layer < count) entry.x = uint32_t(layer);
    if (layer < count && item < numbers.x) {
      const uint4 pointers = of_layer(layer, kYStarts);
      const uint32_t row = item / numbers.z, column = item - row * numbers.z;
      const uint32_t* const starts = pointer_of<const uint32_t>(pointers.z, pointers.w) + column;
      entry =
          make_uint4(row << 8 | uint32_t(layer), column, hw::load_global_32(starts), hw::load_global_32(starts + 1));
    }
    hw::store_shared_128(list + threadIdx.x * 16, entry);
  }
  SLIM_DEVICE uint4 entry(int i) const { return hw::load_shared_128(list + i % kChainListed * 16); }
};

// Where a thread stores: four channels of pixels from `first_pixel` on.
struct ChainStore {
  unsigned char* out;
  int first_pixel, outputs, c_out, flags;
  bool stores;

  SLIM_DEVICE int row_bits() const { return flags & 3; }
  SLIM_DEVICE bool pool() const { return flags & 4; }
  SLIM_DEVICE bool relu() const { return flags & 8; }
};

// What a warp has to do in one item of a layer, 32 output channels and 16 pixels for each warp that does not share a
// pixel's steps with others. All of it follows from numbers.
struct ChainPlace {
  const unsigned char* x;
  const unsigned char* weights;  // this lane's 16 bytes of the warp's first step
  const uint4* steps;
  const void* bias;     // of what this thread stores, or NULL
  int count;            // of the warp's steps
  int h, w, c_in;       // of x
  int y[2], column[2];  // of the two pixels that this lane reads: where they lie,
  int base[2];          // and the distance in elements of their four channels
  ChainStore store;

  SLIM_DEVICE void find(const ChainTables& tables, uint4 entry) {
    const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5, layer = int(entry.x & 0xff);
    const uint4 from = tables.of_layer(layer, kXWeights), more = tables.of_layer(layer, kStepsBias);
    const uint4 to = tables.of_layer(layer, kYStarts), image = tables.of_layer(layer, kImage);
    const uint4 parts = tables.of_layer(layer, kDivisors), sizes = tables.of_layer(layer, kSizes);
    store.flags = int(image.w);
    const int row_bits = store.row_bits(), pool = store.flags >> 2 & 1;
    const int first = int(entry.z), steps_of_column = int(entry.w) - first;
    const int share = warp >> row_bits, share_bits = 3 - row_bits;
    const int before = steps_of_column * share >> share_bits;
    count = (steps_of_column * (share + 1) >> share_bits) - before;
    x = pointer_of<const unsigned char>(from.x, from.y);
    weights = pointer_of<const unsigned char>(from.z, from.w) + int64_t(first + before) * kChainStepBytes + lane * 16;
    steps = pointer_of<const uint4>(more.x, more.y) + (first + before);
    const int channel = int(entry.y) * kChainColumn + (lane & 7) * 4;
    store.c_out = int(sizes.z);
    store.outputs = int(sizes.w);
    store.stores = channel < store.c_out;
    store.first_pixel = int(entry.x >> 8) * (kChainPixels << row_bits);
    store.out = pointer_of<unsigned char>(to.x, to.y) + channel * 2;
    bias = (more.z | more.w) && store.stores ? pointer_of<const unsigned char>(more.z, more.w) + channel * 2 : nullptr;
    h = int(image.x);
    w = int(image.y);
    c_in = int(image.z);
    const ChainDivisor area{parts.x, parts.y}, row{parts.z, parts.w};
    const int first_of_warp = store.first_pixel + (warp & ((1 << row_bits) - 1)) * kChainPixels;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned pixel = unsigned(first_of_warp + (lane >> 2) + i * 8);  // with a pool four of them are a window
      const unsigned at = pixel >> 2 * pool, in = area.divide(at), in_image = at - in * area.by;
      const unsigned out_y = row.divide(in_image), out_x = in_image - out_y * row.by;
      const int top = int(out_y << pool | (pixel >> 1 & unsigned(pool))) * int(sizes.x);
      column[i] = int(out_x << pool | (pixel & unsigned(pool))) * int(sizes.y);
      y[i] = int(at) < store.outputs ? top : kFarAway;
      base[i] = ((int(in) * h + top) * w + column[i]) * c_in + (lane & 3) * 4;
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
  int from[kChainDepth][2];  // of the first steps' pixels: distance in elements from x, negative outside of the image
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

  // Where a step's four channels of one of the two pixels are, and whether they are: not outside of the image, and not
  // of a step that is not `wanted`.
  SLIM_DEVICE int find_pixel(int s, int i, bool wanted, bool& inside) const {
    inside = wanted & (int(threadIdx.x & 3) * 4 < step[s].left) & (unsigned(at.y[i] + step[s].down) < unsigned(at.h)) &
             (unsigned(at.column[i] + step[s].right) < unsigned(at.w));
    return at.base[i] + (step[s].down * at.w + step[s].right) * at.c_in + step[s].channel;
  }
  SLIM_DEVICE uint2 read_pixel(int place, bool inside) const {
    return hw::load_from_peers_64(at.x + int64_t(place) * int(sizeof(T)), inside);
  }
  // Finds the pixels of the first steps, which can be done while the group waits.
  SLIM_DEVICE void aim() {
#pragma unroll
    for (int s = 0; s < kChainDepth; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bool inside;
        const int place = find_pixel(s, i, s < at.count, inside);
        from[s][i] = inside ? place : -1;
      }
    }
    if (at.count > kChainDepth) {
#pragma unroll
      for (int s = 0; s < kChainDepth; ++s) step[s] = read_step(kChainDepth + s);
    }
  }
  SLIM_DEVICE void begin() {
#pragma unroll
    for (int s = 0; s < kChainDepth; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) b[s][i] = read_pixel(from[s][i], from[s][i] >= 0);
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
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          bool inside;
          const int place = find_pixel(s, i, kChainDepth + s < left, inside);
          b[s][i] = read_pixel(place, inside);
        }
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
template <typename T, int ROW_BITS>
SLIM_DEVICE void store_sums(const ChainStore& store, uint2 bias, uint32_t from) {
  constexpr int shares = kChainWarps >> ROW_BITS, apart = kChainSums << ROW_BITS;
#pragma unroll 1
  for (int t = int(threadIdx.x); t < kChainPixels * 8 << ROW_BITS; t += kChainThreads) {
    const uint32_t mine = from + t / 8 / kChainPixels * kChainSums + t / 8 % kChainPixels * kChainPitch + (t & 7) * 16;
    uint4 four[shares];
#pragma unroll
    for (int k = 0; k < shares; ++k) four[k] = hw::load_shared_128(mine + k * apart);
    float v[4] = {hw::unpack<T>(bias.x, false), hw::unpack<T>(bias.x, true), hw::unpack<T>(bias.y, false),
                  hw::unpack<T>(bias.y, true)};
#pragma unroll
    for (int k = 0; k < shares; ++k) {
      v[0] += hw::float_of_bits(four[k].x);
      v[1] += hw::float_of_bits(four[k].y);
      v[2] += hw::float_of_bits(four[k].z);
      v[3] += hw::float_of_bits(four[k].w);
    }
    int at = store.first_pixel + t / 8;
    bool stores = store.stores;
    if (store.pool()) {
#pragma unroll
      for (int far = 8; far <= 16; far *= 2) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = hw::larger(v[e], hw::from_lane_xor(v[e], far));
      }
      stores &= (at & 3) == 0;
      at >>= 2;
    }
    if (stores & (at < store.outputs)) {
      const uint2 packed = store.relu() ? make_uint2(hw::pack<T, true>(v[0], v[1]), hw::pack<T, true>(v[2], v[3]))
                                        : make_uint2(hw::pack<T, false>(v[0], v[1]), hw::pack<T, false>(v[2], v[3]));
      hw::store_global_64(store.out + int64_t(at) * store.c_out * int(sizeof(T)), packed);
    }
  }
}
template <typename T>
SLIM_DEVICE void store_sums(const ChainStore& store, uint2 bias, uint32_t from) {
  switch (store.row_bits()) {
    case 0:  return store_sums<T, 0>(store, bias, from);
    case 1:  return store_sums<T, 1>(store, bias, from);
    case 2:  return store_sums<T, 2>(store, bias, from);
    default: return store_sums<T, 3>(store, bias, from);
  }
}

template <typename T, typename Barrier>
SLIM_DEVICE void chain_conv2d(const ChainArguments& a) {
  const int rank = int(blockIdx.x) % a.group, group = int(blockIdx.x) / a.group, warp = int(threadIdx.x) >> 5;
  const int64_t left = a.n - int64_t(group) * a.images;
  const int images = left < a.images ? int(left) : a.images;
  const uint32_t shared = hw::shared_memory();
  ChainTables tables{shared + kChainLayers, shared + kChainList, rank, a.group};
  Barrier barrier(a.counters, group, a.group);
  ChainTile<T> tile;
  ChainPlace next;
  int set = 0;

  hw::let_next_kernel_begin();
  tables.write_layers(a, group, images);
  hw::synchronize();
  tables.write_list(a.count, 0);
  hw::synchronize();
  uint4 entry = tables.entry(0);
  int layer = 0;
  bool waits = false;
  tile.at.find(tables, entry);
  tile.fetch();
  tile.aim();
  hw::wait_for_previous_kernel();  // which wrote the first layer's x, or still reads y
  for (int i = 1;; ++i) {
    if (waits) barrier.wait();
    tile.begin();
    // What comes next is found while pixels are on their way, and fetched while sums are added up and the group waits.
    if (i % kChainListed == 0) {
      hw::synchronize();
      tables.write_list(a.count, i);
      hw::synchronize();
    }
    entry = tables.entry(i);
    const int next_layer = int(entry.x & 0xff);
    const bool done = next_layer == int(kEnd);
    if (!done) next.find(tables, entry);
    float sum[2][2][4] = {};
    tile.multiply(sum);
    const ChainStore store = tile.at.store;
    const uint2 bias = tile.bias;
    if (!done) {
      tile.at = next;
      tile.fetch();
    }
    const uint32_t sums = shared + set * (kChainSets / 2);
    write_sums(sums + warp * kChainSums, sum);
    hw::synchronize();
    store_sums<T>(store, bias, sums);
    if (done) break;
    waits = next_layer != layer;
    if (waits) barrier.arrive();
    tile.aim();
    layer = next_layer;
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
