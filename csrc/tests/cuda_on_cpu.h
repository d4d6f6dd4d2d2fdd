// Just enough of the CUDA language and runtime to run csrc/cuda on a CPU, one CTA at a time, or those of a cluster or
// of a cooperative launch side by side, their threads as coroutines that switch where they wait.
// tests/helpers/cuda_emulation.py rewrites what C++ cannot express: kernel<<<...>>>(...) to emulate(...), and `extern
// __shared__`.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUDART_VERSION 0

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// Types

struct __half {
  _Float16 value;
};
inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half_rn(float v) { return {_Float16(v)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (isnan(v)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Runtime: two devices, of which the kernels must leave the current one as it was

typedef int cudaError_t;
typedef void* cudaStream_t;
enum {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
  cudaErrorInvalidResourceConfiguration = 915,
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributeNonPortableClusterSizeAllowed = 14 };

namespace emulated {
constexpr int kDevices = 2;
constexpr size_t kStack = 256 * 1024;
inline int shared_limit = 99 * 1024;  // the least that any GPU from sm_80 on has
inline int current_device = 0, launch_device = -1, launch_shared = 0, dynamic_limit = 48 * 1024;
inline void* launch_stream = nullptr;
inline cudaError_t last_error = cudaSuccess;
inline std::vector<char> dynamic_shared;
// Threads are coroutines, which hand over where they wait. In orders 0 and 1 all threads run rising and falling; in
// orders 2 and 3 one warp runs ahead of the others as far as it can, the first or the last, of all CTAs that run side
// by side. In orders 1 and 3 the last block comes first. What a warp does in the background happens late in half of the
// modes, and then global memory shows what a thread stored only when it must. A barrier or a wait that is missing
// survives some of them, not all.
constexpr int kModes = 8;
inline int mode = -1;  // -1: all of them in turn, a block each
inline bool late = false;
inline void (*block_begins)() = nullptr;
inline void (*block_ends)() = nullptr;
struct Thread {
  ucontext_t context;
  bool done = false;
  std::function<bool()> ready;  // empty: it may run
};
inline std::vector<Thread> threads;  // of all CTAs that run side by side, one CTA's after the other's
inline unsigned cta_threads = 0;     // of one CTA
inline ucontext_t scheduler;
inline unsigned running = 0;
inline const std::function<void()>* body = nullptr;
struct Barrier {
  unsigned arrived = 0;
  long passed = 0;
};
constexpr int kBarriers = 16;
inline std::vector<Barrier> barriers;  // of each CTA
inline unsigned running_cta() { return running / cta_threads; }

inline void fail(const char* what) {
  fprintf(stderr, "cuda_on_cpu: %s\n", what);
  abort();
}

inline void thread_main() {
  (*body)();
  threads[running].done = true;
}

// Lets others run until `ready` holds.
inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  const unsigned thread = running;
  threads[thread].ready = std::move(ready);
  swapcontext(&threads[thread].context, &scheduler);
}

inline void meet(int id, unsigned expected) {
  Barrier& barrier = barriers[running_cta() * kBarriers + id];
  const long passed = barrier.passed;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.passed;
  } else {
    wait_until([&barrier, passed] { return barrier.passed != passed; });
  }
}

inline unsigned first_cta = 0;
inline bool run_thread(unsigned t) {
  Thread& thread = threads[t];
  if (thread.done || (thread.ready && !thread.ready())) return false;
  thread.ready = nullptr;
  running = t;
  threadIdx.x = t % cta_threads;
  blockIdx.x = first_cta + t / cta_threads;
  swapcontext(&scheduler, &thread.context);
  return true;
}

inline bool run_warp_ahead(unsigned warp, unsigned count) {
  bool any = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned t = warp * 32; t < warp * 32 + 32 && t < count; ++t) again |= run_thread(t);
    any |= again;
  }
  return any;
}

// Runs `ctas` CTAs of so many threads from CTA `first` on.
inline void run_ctas(unsigned first, unsigned ctas, unsigned threads_of_cta, int with_mode) {
  const unsigned count = ctas * threads_of_cta;
  const int order = with_mode % 4;
  late = (with_mode ^ with_mode / 4) & 1;
  first_cta = first;
  cta_threads = threads_of_cta;
  static std::unique_ptr<char[]> stacks;
  static unsigned stacked = 0;
  if (stacked < count) {
    stacks.reset(new char[count * kStack]);  // not touched: what no thread uses takes no memory
    stacked = count;
  }
  threads.assign(count, Thread());
  barriers.assign(ctas * kBarriers, Barrier());
  for (unsigned t = 0; t < count; ++t) {
    ucontext_t& context = threads[t].context;
    getcontext(&context);
    context.uc_stack.ss_sp = &stacks[t * kStack];
    context.uc_stack.ss_size = kStack;
    context.uc_link = &scheduler;
    makecontext(&context, thread_main, 0);
  }
  if (block_begins != nullptr) block_begins();
  const unsigned warps = (count + 31) / 32;
  for (bool left = true; left;) {
    bool any = false;
    if (order < 2) {
      for (unsigned i = 0; i < count; ++i) any |= run_thread(order == 0 ? i : count - 1 - i);
    } else {
      for (unsigned i = 0; i < warps && !any; ++i) any = run_warp_ahead(order == 2 ? i : warps - 1 - i, count);
    }
    left = false;
    for (const Thread& thread : threads) left |= !thread.done;
    if (left && !any) fail("threads wait for each other for ever");
  }
  for (const Barrier& barrier : barriers) {
    if (barrier.arrived != 0) fail("a thread left while others wait at a barrier");
  }
  if (block_ends != nullptr) block_ends();
}
}  // namespace emulated

inline void __syncthreads() { emulated::meet(0, emulated::cta_threads); }

inline void emulate(const std::function<void()>& kernel, unsigned grid, unsigned threads, int shared,
                    cudaStream_t stream, unsigned side_by_side = 1) {
  emulated::launch_device = emulated::current_device;
  emulated::launch_stream = stream;
  emulated::launch_shared = shared;
  if (grid == 0 || shared > emulated::dynamic_limit) {
    emulated::last_error = cudaErrorInvalidValue;
    return;
  }
  emulated::body = &kernel;
  gridDim.x = grid;
  const bool backwards = emulated::mode > 0 && emulated::mode % 2 == 1;
  for (unsigned done = 0; done < grid; done += side_by_side) {
    const unsigned b = backwards ? grid - side_by_side - done : done;
    emulated::dynamic_shared.assign(size_t(shared) * side_by_side, char(0xff));  // NaN, as floats
    const int of_modes = int(b / side_by_side % emulated::kModes);
    emulated::run_ctas(b, side_by_side, threads, emulated::mode < 0 ? of_modes : emulated::mode);
  }
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emulated::last_error;
  emulated::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulated::kDevices;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulated::kDevices) return emulated::last_error = cudaErrorInvalidDevice;
  emulated::current_device = device;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error == cudaErrorIllegalAddress) return "an illegal memory access was encountered";
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
// A launch by configuration.
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3& operator=(unsigned v) {
    x = v;
    return *this;
  }
};
enum {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};
enum { cudaDevAttrMultiProcessorCount = 16 };
struct cudaLaunchAttribute {
  int id = 0;
  struct {
    int programmaticStreamSerializationAllowed = 0, cooperative = 0;
    struct {
      unsigned x = 1, y = 1, z = 1;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulated {
constexpr int kProcessors = 20;  // for thread blocks that run side by side, each on one
inline bool cluster_of_16 = false;
// The error that a device gives that has no clusters of more than 8: where that is allowed, or where they are counted.
inline cudaError_t when_allowed = cudaSuccess, when_counted = cudaSuccess;
inline unsigned launch_cluster = 0;
}  // namespace emulated

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    if (emulated::when_allowed != cudaSuccess) return emulated::last_error = emulated::when_allowed;
    emulated::cluster_of_16 = value != 0;
    return cudaSuccess;
  }
  if (value > emulated::shared_limit) return emulated::last_error = cudaErrorInvalidValue;
  emulated::dynamic_limit = value;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = emulated::kProcessors;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t* config) {
  const int size = int(config->attrs[0].val.clusterDim.x);
  if (size > 8 && emulated::when_counted != cudaSuccess) return emulated::last_error = emulated::when_counted;
  *clusters = emulated::kProcessors / size;
  return cudaSuccess;
}

template <typename Kernel, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Args&... args) {
  unsigned side_by_side = 1;
  emulated::launch_cluster = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) {
      side_by_side = config->gridDim.x;
      if (int(side_by_side) > emulated::kProcessors) return emulated::last_error = cudaErrorInvalidValue;
    }
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      emulated::launch_cluster = side_by_side = attribute.val.clusterDim.x;
      const bool allowed = side_by_side <= 8 || (side_by_side <= 16 && emulated::cluster_of_16);
      if (!allowed || config->gridDim.x % side_by_side != 0) return emulated::last_error = cudaErrorInvalidValue;
    }
  }
  emulate([=] { kernel(args...); }, config->gridDim.x, config->blockDim.x, int(config->dynamicSmemBytes),
          config->stream, side_by_side);
  return cudaGetLastError();
}
