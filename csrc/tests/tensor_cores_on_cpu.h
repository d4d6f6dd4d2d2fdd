// What csrc/cuda/tensor_cores.cuh offers, on a CPU: instructions of a whole warp are done once its 32 lanes have come,
// each lane's registers placed as PTX defines them. Copies and group multiplications in the background happen at once,
// or as late as the waits allow with their destination spoilt until then.
#pragma once
#include <deque>
#include <map>

#include "cuda_on_cpu.h"

#define __host__
#define __grid_constant__
#define SLIM_DEVICE inline
#define SLIM_HAS_WGMMA 1

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulated {

constexpr uint32_t kBase = 1024;  // address of the first byte of shared memory: 0 is never valid
constexpr int kSpoilt = 0xff;     // NaN in every type

struct Copy {
  uint32_t to;
  uint8_t data[16];
};
struct GroupProduct {
  const uint32_t* a[32];
  float* d[32];
  int columns;
  bool half;
  uint64_t b;
};
struct Stored {  // in global memory, where other CTAs do not see it yet
  void* at;
  size_t bytes;
  uint8_t data[16];
};
struct Landing {  // bytes that an mbarrier waits for
  uint8_t* at;
  std::vector<uint8_t> data;
};
struct MBarrier {
  unsigned expected = 0, arrived = 0;
  long phase = 0, bytes = 0;  // bytes: of bulk copies that the phase waits for
  std::vector<Landing> on_their_way;
  long bytes_behind = 0;  // of those copies
};
struct Lane {
  std::deque<std::vector<Copy>> copies{1};  // committed groups, the open one last
  std::vector<Stored> stored;
  long cluster_phase = -1;  // that this thread has arrived at and not waited for
};
struct Warp {
  int arrived = 0;
  long done = 0;
  const char* instruction = nullptr;
  void* arguments[32];
  std::deque<std::vector<GroupProduct>> products{1};
};
inline std::vector<Lane> lanes;
inline std::vector<Warp> warps;
inline std::vector<uint16_t> unfenced;  // of each 16 bytes: 1 + the thread whose writes wgmma may not see yet, or 0
inline std::map<const uint8_t*, MBarrier> mbarriers;
inline Barrier cluster;     // of all CTAs that run side by side
inline long conflicts = 0;  // rows of matrices that waited for another row's bank

// Called where a block begins and where it ends.
inline void begin_tensor_cores() {
  lanes.assign(threads.size(), Lane());
  warps.assign(threads.size() / 32, Warp());
  unfenced.assign(dynamic_shared.size() / 16 + 1, 0);
  mbarriers.clear();
  cluster = Barrier();
}
// What a thread stored is seen by all.
inline void show_stored(Lane& lane) {
  for (const Stored& stored : lane.stored) memcpy(stored.at, stored.data, stored.bytes);
  lane.stored.clear();
}
inline void end_tensor_cores() {
  for (Lane& lane : lanes) {
    show_stored(lane);
    for (const auto& group : lane.copies) {
      if (!group.empty()) fail("a thread left with copies on their way");
    }
  }
  for (const Warp& warp : warps) {
    if (warp.products.size() > 1 || !warp.products.back().empty()) fail("a warp left with products on their way");
  }
  if (cluster.arrived != 0) fail("a thread left while others wait for the cluster");
  for (const auto& at : mbarriers) {
    if (!at.second.on_their_way.empty() || at.second.bytes != 0) fail("a block left with copies on their way");
  }
}
inline const bool registered = (block_begins = begin_tensor_cores, block_ends = end_tensor_cores, true);

inline uint8_t* shared_at(uint32_t at, uint32_t bytes) {
  if (at % bytes != 0) fail("a shared address is not aligned");
  const size_t size = dynamic_shared.size() / (threads.size() / cta_threads);
  if (at < kBase || at - kBase + bytes > size) fail("a shared address is outside");
  return reinterpret_cast<uint8_t*>(dynamic_shared.data()) + running_cta() * size + (at - kBase);
}
inline uint16_t& unfenced_at(uint32_t at) {
  return unfenced[size_t(shared_at(at / 16 * 16, 16) - reinterpret_cast<uint8_t*>(dynamic_shared.data())) / 16];
}
inline void mark_unfenced(uint32_t at) { unfenced_at(at) = uint16_t(running + 1); }
inline void land(const Copy& copy) { memcpy(shared_at(copy.to, 16), copy.data, 16); }

// Runs `all` once, when every lane of the warp has come with its argument.
template <typename Argument, typename All>
void together(const char* instruction, Argument& argument, All all) {
  Warp& warp = warps[running / 32];
  if (warp.arrived != 0 && warp.instruction != instruction) fail("lanes of a warp meet at different instructions");
  warp.instruction = instruction;
  warp.arguments[running % 32] = &argument;
  if (++warp.arrived == 32) {
    all([&warp](int lane) -> Argument& { return *static_cast<Argument*>(warp.arguments[lane]); });
    warp.arrived = 0;
    ++warp.done;
  } else {
    const long done = warp.done;
    wait_until([&warp, done] { return warp.done != done; });
  }
}

inline float number(uint16_t bits, bool half) {
  if (!half) return __bfloat162float({bits});
  _Float16 value;
  memcpy(&value, &bits, 2);
  return float(value);
}
inline float number_of_word(uint32_t word, int which, bool half) {
  return number(uint16_t(which ? word >> 16 : word), half);
}
inline uint16_t bits_of(float v, bool half) {
  uint16_t bits;
  if (half) {
    const _Float16 value = _Float16(v);
    memcpy(&bits, &value, 2);
  } else {
    bits = __float2bfloat16_rn(v).bits;
  }
  return bits;
}

// A number as an instruction reads it in TF32. PTX says nothing of the 13 low bits of one that was not rounded, so such
// a number is NaN here; infinite ones have none, and what is NaN stays so.
inline float tf32_of_word(uint32_t word) {
  float v;
  memcpy(&v, &word, 4);
  return word & 0x1fff ? NAN : v;
}

// How often eight rows of 16 bytes that are read at once fall on a bank that another row has.
inline void count_conflicts(const uint32_t* rows) {
  int most = 0;
  for (uint32_t bank = 0; bank < 8; ++bank) {
    int count = 0;
    for (int i = 0; i < 8; ++i) {
      bool first = true;
      for (int j = 0; j < i; ++j) first = first && rows[j] != rows[i];
      count += first && rows[i] / 16 % 8 == bank;
    }
    most = count > most ? count : most;
  }
  conflicts += most - 1;
}

inline void carry_out(const GroupProduct& product) {
  const uint32_t start = uint32_t(product.b & 0x3fff) << 4, depth_stride = uint32_t(product.b >> 16 & 0x3fff) << 4;
  const uint32_t column_stride = uint32_t(product.b >> 32 & 0x3fff) << 4;
  std::vector<float> b(size_t(product.columns) * 16);
  for (int n = 0; n < product.columns; ++n) {
    for (int k = 0; k < 16; ++k) {  // matrices of 8 columns x 8 depths, a column's 16 bytes together
      const uint32_t at = start + n / 8 * column_stride + k / 8 * depth_stride + n % 8 * 16 + k % 8 * 2;
      if (unfenced_at(at) != 0) fail("wgmma reads what a thread wrote without a fence");
      uint16_t bits;
      memcpy(&bits, shared_at(at, 2), 2);
      b[size_t(n) * 16 + k] = number(bits, product.half);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < product.columns; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) {
        const uint32_t word = product.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
        sum += number_of_word(word, k % 2, product.half) * b[size_t(n) * 16 + k];
      }
      product.d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2] += sum;
    }
  }
}

}  // namespace emulated

namespace slim {
namespace hw {

using namespace emulated;

template <typename T>
constexpr bool is_half = false;
template <>
inline constexpr bool is_half<__half> = true;

inline uint32_t shared_memory() { return kBase; }
inline uint32_t load_shared_32(uint32_t at) {
  uint32_t v;
  memcpy(&v, shared_at(at, 4), 4);
  return v;
}
inline uint4 load_shared_128(uint32_t at) {
  uint4 v;
  memcpy(&v, shared_at(at, 16), 16);
  return v;
}
inline void store_shared_16(uint32_t at, uint32_t v) {
  memcpy(shared_at(at, 2), &v, 2);
  mark_unfenced(at);
}
inline void store_shared_32(uint32_t at, uint32_t v) {
  memcpy(shared_at(at, 4), &v, 4);
  mark_unfenced(at);
}
inline void store_shared_128(uint32_t at, uint4 v) {
  memcpy(shared_at(at, 16), &v, 16);
  mark_unfenced(at);
}

inline uint32_t load_global_32(const uint32_t* at) { return *at; }
template <typename V>
V load_global(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0) fail("a global address is not aligned");
  V v;
  memcpy(&v, at, sizeof(V));
  return v;
}
// Seen by others at once, or as late as the barriers allow.
template <typename V>
void store_global(void* at, const V& v) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(V) != 0) fail("a global address is not aligned");
  if (!late) {
    memcpy(at, &v, sizeof(V));
    return;
  }
  Stored stored{at, sizeof(V), {}};
  memcpy(stored.data, &v, sizeof(V));
  lanes[running].stored.push_back(stored);
}
inline uint2 load_global_64(const void* at) { return load_global<uint2>(at); }
inline uint4 load_global_128(const void* at) { return load_global<uint4>(at); }
inline void store_global_64(void* at, uint2 v) { store_global(at, v); }
inline void store_global_128(void* at, uint4 v) { store_global(at, v); }
inline uint2 load_from_peers_64(const void* at, bool inside) { return inside ? load_global<uint2>(at) : uint2{0, 0}; }
inline float reciprocal(float v) { return 1.0f / v; }
inline uint32_t bits_of_float(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
inline float float_of_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
inline float load_number(const float* at) { return *at; }
inline float load_number(const __nv_bfloat16* at) { return __bfloat162float(*at); }
inline float load_number(const __half* at) { return __half2float(*at); }

inline void copy_async_16(uint32_t to, const void* from, bool inside) {
  if (inside && reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a copy's source is not aligned");
  Copy copy{to, {}};
  if (inside) memcpy(copy.data, from, 16);
  mark_unfenced(to);
  if (!late) return land(copy);
  memset(shared_at(to, 16), kSpoilt, 16);
  lanes[running].copies.back().push_back(copy);
}
inline void copy_async_commit() { lanes[running].copies.emplace_back(); }
inline void copy_async_wait_all_but(int groups) {
  auto& copies = lanes[running].copies;
  while (int(copies.size()) > groups + 1) {
    for (const Copy& copy : copies.front()) land(copy);
    copies.pop_front();
  }
}
template <int N>
void copy_async_wait() {
  copy_async_wait_all_but(N);
}

inline void stop() { fail("a kernel stopped"); }

inline void synchronize() { meet(0, cta_threads); }
inline void synchronize(int id, int count) { meet(id, unsigned(count)); }

inline void let_next_kernel_begin() {}
inline void wait_for_previous_kernel() {}

inline void cluster_arrive() {
  Lane& lane = lanes[running];
  if (lane.cluster_phase >= 0) fail("a thread arrives twice at its cluster");
  show_stored(lane);
  lane.cluster_phase = cluster.passed;
  if (++cluster.arrived == threads.size()) {
    cluster.arrived = 0;
    ++cluster.passed;
  }
}
inline void cluster_wait() {
  Lane& lane = lanes[running];
  const long phase = lane.cluster_phase;
  if (phase < 0) fail("a thread waits for its cluster without arriving");
  lane.cluster_phase = -1;
  wait_until([phase] { return cluster.passed > phase; });
}
// Shows what the whole CTA has stored, though of the others only what they stored before they met this thread must be
// seen: a barrier that is missing in front shows where they store later.
inline void add_release(int32_t* counter, int32_t v) {
  for (unsigned t = 0; t < cta_threads; ++t) show_stored(lanes[running_cta() * cta_threads + t]);
  *counter += v;
}
inline void wait_acquire(const int32_t* counter, int32_t target) {
  wait_until([counter, target] { return *counter >= target; });
}

inline void synchronize_warp() {
  int nothing = 0;
  together("syncwarp", nothing, [](auto) {});
}
inline uint32_t from_lane(uint32_t v, int lane) {
  struct Argument {
    uint32_t v, found;
    int lane;
  } argument{v, 0, lane};
  together("shfl.idx", argument, [](auto of) {
    for (int lane = 0; lane < 32; ++lane) of(lane).found = of(of(lane).lane).v;
  });
  return argument.found;
}

inline MBarrier& mbarrier_at(uint32_t at) {
  const auto found = mbarriers.find(shared_at(at, 8));
  if (found == mbarriers.end()) fail("an mbarrier was not initialised");
  return found->second;
}
inline void end_phase_if_complete(MBarrier& barrier) {
  if (barrier.arrived < barrier.expected || barrier.bytes != 0) return;
  barrier.arrived = 0;
  ++barrier.phase;
}
inline void arrive(MBarrier& barrier) {
  if (++barrier.arrived > barrier.expected) fail("more threads arrive at an mbarrier than it expects");
  end_phase_if_complete(barrier);
}
// Everything that is on its way to a barrier lands: late, when somebody looks at it.
inline void land_all(MBarrier& barrier) {
  for (const Landing& landing : barrier.on_their_way) memcpy(landing.at, landing.data.data(), landing.data.size());
  barrier.on_their_way.clear();
  barrier.bytes -= barrier.bytes_behind;
  if (barrier.bytes_behind != 0) end_phase_if_complete(barrier);
  barrier.bytes_behind = 0;
}
inline void mbarrier_init(uint32_t at, int count) {
  MBarrier barrier;
  barrier.expected = unsigned(count);
  if (!mbarriers.emplace(shared_at(at, 8), barrier).second) fail("an mbarrier begins twice");
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t at) { arrive(mbarrier_at(at)); }
inline void mbarrier_arrive_and_expect(uint32_t at, uint32_t bytes) {
  mbarrier_at(at).bytes += bytes;
  arrive(mbarrier_at(at));
}
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a bulk copy is not aligned");
  MBarrier& barrier = mbarrier_at(mbarrier);
  const uint8_t* const data = static_cast<const uint8_t*>(from);
  for (uint32_t i = 0; i < bytes; i += 16) {
    unfenced_at(to + i) = 0;  // written as wgmma reads
    if (late) memset(shared_at(to + i, 16), kSpoilt, 16);
    barrier.on_their_way.push_back({shared_at(to + i, 16), std::vector<uint8_t>(data + i, data + i + 16)});
  }
  barrier.bytes_behind += bytes;
  if (!late) land_all(barrier);
}
inline void mbarrier_wait(uint32_t at, int parity) {
  MBarrier& barrier = mbarrier_at(at);
  wait_until([&barrier, parity] {
    land_all(barrier);
    return (barrier.phase & 1) != parity;
  });
}
inline void more_registers() {}
inline void fewer_registers() {}

struct TensorMap {
  const uint8_t* from;
  int64_t sizes[4];
  int32_t box[4];
};
inline cudaError_t make_tensor_map(TensorMap& to, const void* from, const int64_t (&sizes)[4],
                                   const int32_t (&box)[4]) {
  to.from = static_cast<const uint8_t*>(from);
  for (int i = 0; i < 4; ++i) {
    if (box[i] < 1 || box[i] > 256 || sizes[i] < 1) return emulated::last_error = cudaErrorInvalidValue;
    to.sizes[i] = sizes[i];
    to.box[i] = box[i];
  }
  const bool right = sizes[0] % 8 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0 &&
                     (box[0] == 16 || box[0] == 32 || box[0] == 64);
  return right ? cudaSuccess : emulated::last_error = cudaErrorInvalidValue;
}
inline void copy_tensor(uint32_t to, const TensorMap& map, int channel, int column, int row, int image,
                        uint32_t mbarrier) {
  if (to % 1024 != 0) fail("a tensor copy is not aligned");  // the pattern below begins anew every 1024 bytes
  const int64_t begin[] = {channel, column, row, image};
  const uint32_t pitch = uint32_t(map.box[0]) * 2;
  uint32_t pixel = 0;
  MBarrier& barrier = mbarrier_at(mbarrier);
  for (int n = 0; n < map.box[3]; ++n) {
    for (int y = 0; y < map.box[2]; ++y) {
      for (int x = 0; x < map.box[1]; ++x, ++pixel) {
        for (uint32_t chunk = 0; chunk < pitch / 16; ++chunk) {
          const int64_t at[] = {begin[0] + chunk * 8, begin[1] + x, begin[2] + y, begin[3] + n};
          bool inside = true;
          for (int i = 0; i < 4; ++i) inside = inside && at[i] >= 0 && at[i] < map.sizes[i];
          const int64_t number = ((at[3] * map.sizes[2] + at[2]) * map.sizes[1] + at[1]) * map.sizes[0] + at[0];
          std::vector<uint8_t> data(16, 0);
          if (inside) memcpy(data.data(), map.from + number * 2, 16);
          const uint32_t place = pixel * pitch, turned = chunk ^ (place >> 7 & (pitch / 16 - 1));
          uint8_t* const there = shared_at(to + place + turned * 16, 16);
          if (late) memset(there, kSpoilt, 16);
          barrier.on_their_way.push_back({there, data});
        }
      }
    }
  }
  barrier.bytes_behind += pixel * pitch;
  if (!late) land_all(barrier);
}

inline float from_lane_xor(float v, int bits) {
  struct Argument {
    float v, found;
    int bits;
  } argument{v, 0, bits};
  together("shfl", argument, [](auto of) {
    for (int lane = 0; lane < 32; ++lane) of(lane).found = of(lane ^ of(lane).bits).v;
  });
  return argument.found;
}

inline void load_matrices(uint32_t (&v)[4], uint32_t at) {
  struct Argument {
    uint32_t* v;
    uint32_t at;
  } argument{v, at};
  together("ldmatrix", argument, [](auto of) {
    for (int m = 0; m < 4; ++m) {
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = of(m * 8 + i).at;
      count_conflicts(rows);
      for (int lane = 0; lane < 32; ++lane) memcpy(&of(lane).v[m], shared_at(rows[lane / 4], 16) + lane % 4 * 4, 4);
    }
  });
}

inline void load_matrices_transposed(uint32_t (&v)[4], uint32_t at) {
  struct Argument {
    uint32_t* v;
    uint32_t at;
  } argument{v, at};
  together("ldmatrix.trans", argument, [](auto of) {
    for (int m = 0; m < 4; ++m) {
      uint32_t rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = of(m * 8 + i).at;
      count_conflicts(rows);
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) memcpy(&pair[e], shared_at(rows[lane % 4 * 2 + e], 16) + lane / 4 * 2, 2);
        memcpy(&of(lane).v[m], pair, 4);
      }
    }
  });
}

template <typename T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Argument {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } argument{d, a, {b0, b1}};
  together("mma", argument, [](auto of) {
    constexpr int DEPTH = 32 / sizeof(T), PER_WORD = DEPTH / 8;
    float rows[16][DEPTH], columns[DEPTH][8];
    const auto number_at = [](uint32_t word, int e) {
      return PER_WORD == 1 ? tf32_of_word(word) : number_of_word(word, e, is_half<T>);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int e = 0; e < PER_WORD; ++e) {
        const int k = q * PER_WORD + e;
        for (int i = 0; i < 4; ++i) rows[g + i % 2 * 8][k + i / 2 * (DEPTH / 2)] = number_at(of(lane).a[i], e);
        for (int i = 0; i < 2; ++i) columns[k + i * (DEPTH / 2)][g] = number_at(of(lane).b[i], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int k = 0; k < DEPTH; ++k) sum += rows[lane / 4 + i / 2 * 8][k] * columns[k][lane % 4 * 2 + i % 2];
        of(lane).d[i] += sum;
      }
    }
  });
}

template <typename T>
void round_operand(uint32_t (&v)[4]) {
  if (sizeof(T) != 4) return;
  for (uint32_t& number : v) {
    if ((number & 0x7f800000) != 0x7f800000) number += 0x1000;  // half of the last bit that stays
    number &= 0xffffe000;
  }
}

template <typename T, bool RELU>
uint32_t pack(float low, float high) {
  const auto rectified = [](float v) { return RELU && v < 0.0f ? 0.0f : v; };
  return uint32_t(bits_of(rectified(high), is_half<T>)) << 16 | bits_of(rectified(low), is_half<T>);
}
template <typename T>
float unpack(uint32_t v, bool high) {
  return number_of_word(v, high, is_half<T>);
}
inline float larger(float a, float b) { return isnan(a) ? a : isnan(b) ? b : a > b ? a : b; }

inline uint64_t group_operand(uint32_t at, uint32_t depth_stride, uint32_t column_stride) {
  return uint64_t((at & 0x3ffff) >> 4) | uint64_t(depth_stride >> 4) << 16 | uint64_t(column_stride >> 4) << 32;
}
template <typename T, int N>
void multiply_group(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b) {
  struct Argument {
    float* d;
    const uint32_t* a;
    uint64_t b;
  } argument{d[0], a, b};
  Warp& warp = warps[running / 32];
  together("wgmma", argument, [&warp](auto of) {
    GroupProduct product{{}, {}, N * 8, is_half<T>, of(0).b};
    for (int lane = 0; lane < 32; ++lane) {
      if (of(lane).b != product.b) fail("lanes describe different operands");
      product.a[lane] = of(lane).a;
      product.d[lane] = of(lane).d;
    }
    warp.products.back().push_back(product);
  });
}
template <int N>
void settle(float (&)[N][4]) {}
inline void multiply_group_fence() {}
inline void multiply_group_commit() {
  int nothing = 0;
  Warp& warp = warps[running / 32];
  together("wgmma.commit", nothing, [&warp](auto) { warp.products.emplace_back(); });
}
template <int N>
void multiply_group_wait() {
  int nothing = 0;
  Warp& warp = warps[running / 32];
  together("wgmma.wait", nothing, [&warp](auto) {
    while (int(warp.products.size()) > N + 1) {
      for (const GroupProduct& product : warp.products.front()) carry_out(product);
      warp.products.pop_front();
    }
  });
}
inline void fence_for_multiply_group() {
  for (uint16_t& thread : unfenced) {
    if (thread == running + 1) thread = 0;
  }
}

}  // namespace hw
}  // namespace slim
