// Just enough of the CUDA language and runtime to run csrc/cuda on a CPU, one CTA at a time, its threads as coroutines that
// switch at __syncthreads. Threads run in rising and falling order in turn, which a missing barrier does not survive.
// tests/test_cuda.py rewrites kernel<<<...>>>(...) to emulate(...) and `extern __shared__`, which C++ cannot express.
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
inline Index threadIdx, blockIdx;

inline int min(int a, int b) { return a < b ? a : b; }

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
constexpr int kSharedLimit = 99 * 1024;
inline int current_device = 0, launch_device = -1, dynamic_limit = 48 * 1024;
inline void* launch_stream = nullptr;
inline cudaError_t last_error = cudaSuccess;
inline std::vector<char> dynamic_shared;
inline ucontext_t scheduler;
inline ucontext_t* running = nullptr;
inline bool waiting = false;
inline const std::function<void()>* body = nullptr;

inline void thread_main() { (*body)(); }

inline void block(unsigned threads) {
  static std::vector<char> stacks;
  stacks.resize(threads * kStack);
  std::vector<ucontext_t> contexts(threads);
  std::vector<bool> done(threads, false);
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = &stacks[t * kStack];
    contexts[t].uc_stack.ss_size = kStack;
    contexts[t].uc_link = &scheduler;
    makecontext(&contexts[t], thread_main, 0);
  }
  unsigned left = threads;
  for (unsigned phase = 0; left > 0; ++phase) {
    unsigned at_barrier = 0;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = phase % 2 == 0 ? i : threads - 1 - i;
      if (done[t]) continue;
      threadIdx.x = t;
      running = &contexts[t];
      waiting = false;
      swapcontext(&scheduler, running);
      if (waiting) {
        ++at_barrier;
      } else {
        done[t] = true;
        --left;
      }
    }
    if (at_barrier != 0 && at_barrier != threads) {
      fprintf(stderr, "cuda_on_cpu: %u of %u threads reached a barrier\n", at_barrier, threads);
      abort();
    }
  }
}
}  // namespace emulated

inline void __syncthreads() {
  const unsigned thread = threadIdx.x;
  emulated::waiting = true;
  swapcontext(emulated::running, &emulated::scheduler);
  threadIdx.x = thread;
}

inline void emulate(const std::function<void()>& kernel, unsigned grid, unsigned threads, int shared, cudaStream_t stream) {
  emulated::launch_device = emulated::current_device;
  emulated::launch_stream = stream;
  if (grid == 0 || shared > emulated::dynamic_limit) {
    emulated::last_error = cudaErrorInvalidValue;
    return;
  }
  emulated::body = &kernel;
  for (unsigned b = 0; b < grid; ++b) {
    blockIdx.x = b;
    emulated::dynamic_shared.assign(size_t(shared), char(0xff));  // NaN, as floats
    emulated::block(threads);
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
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : error == cudaSuccess ? "no error" : "invalid argument";
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  if (bytes > emulated::kSharedLimit) return emulated::last_error = cudaErrorInvalidValue;
  emulated::dynamic_limit = bytes;
  return cudaSuccess;
}
