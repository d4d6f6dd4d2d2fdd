// Just enough of the CUDA language and runtime to run csrc/cuda on a CPU, one CTA at a time, its threads as coroutines
// that switch where they wait. tests/helpers/cuda_emulation.py rewrites what C++ cannot express: kernel<<<...>>>(...)
// to emulate(...), and `extern __shared__`.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
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
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulated {
constexpr int kDevices = 2;
constexpr size_t kStack = 256 * 1024;
inline int shared_limit = 99 * 1024;  // the least that any GPU from sm_80 on has
inline int current_device = 0, launch_device = -1, launch_shared = 0, dynamic_limit = 48 * 1024;
inline void* launch_stream = nullptr;
inline cudaError_t last_error = cudaSuccess;
inline std::vector<char> dynamic_shared;
// Threads are coroutines, which hand over where they wait. In orders 0 and 1 all threads run rising and falling; in
// orders 2 and 3 one warp runs ahead of the others as far as it can, the first or the last. What a warp does in the
// background happens late in half of the modes. A barrier or a wait that is missing survives some of them, not all.
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
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned running = 0;
inline const std::function<void()>* body = nullptr;
struct Barrier {
  unsigned arrived = 0;
  long passed = 0;
};
inline Barrier barriers[16];

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
  Barrier& barrier = barriers[id];
  const long passed = barrier.passed;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.passed;
  } else {
    wait_until([&barrier, passed] { return barrier.passed != passed; });
  }
}

inline bool run_thread(unsigned t) {
  Thread& thread = threads[t];
  if (thread.done || (thread.ready && !thread.ready())) return false;
  thread.ready = nullptr;
  running = t;
  threadIdx.x = t;
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

inline void block(unsigned count, int with_mode) {
  const int order = with_mode % 4;
  late = (with_mode ^ with_mode / 4) & 1;
  static std::vector<char> stacks;
  stacks.resize(count * kStack);
  threads.assign(count, Thread());
  for (Barrier& barrier : barriers) barrier = Barrier();
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

inline void __syncthreads() { emulated::meet(0, unsigned(emulated::threads.size())); }

inline void emulate(const std::function<void()>& kernel, unsigned grid, unsigned threads, int shared,
                    cudaStream_t stream) {
  emulated::launch_device = emulated::current_device;
  emulated::launch_stream = stream;
  emulated::launch_shared = shared;
  if (grid == 0 || shared > emulated::dynamic_limit) {
    emulated::last_error = cudaErrorInvalidValue;
    return;
  }
  emulated::body = &kernel;
  gridDim.x = grid;
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx.x = b;
    emulated::dynamic_shared.assign(size_t(shared), char(0xff));  // NaN, as floats
    emulated::block(threads, emulated::mode < 0 ? int(b % emulated::kModes) : emulated::mode);
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
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  if (bytes > emulated::shared_limit) return emulated::last_error = cudaErrorInvalidValue;
  emulated::dynamic_limit = bytes;
  return cudaSuccess;
}

// A launch by configuration.
struct dim3 {
  unsigned x = 1;
  dim3& operator=(unsigned v) {
    x = v;
    return *this;
  }
};
enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  int id = 0;
  struct {
    int programmaticStreamSerializationAllowed = 0;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
template <typename Kernel, typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Args& args) {
  emulate([=] { kernel(args); }, config->gridDim.x, config->blockDim.x, int(config->dynamicSmemBytes), config->stream);
  return cudaGetLastError();
}
