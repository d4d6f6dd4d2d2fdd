// What the CUDA kernels share: conversions, the staged tile product, device selection and the error message.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "kernels.h"

namespace slim {

void remember_error(cudaError_t error);

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Bias is added, ReLU keeps NaN (a comparison with NaN is false).
template <typename T>
__device__ __forceinline__ T epilogue(float sum, const T* bias, int64_t o, bool relu) {
  if (bias != nullptr) sum += to_float(bias[o]);
  return from_float<T>(relu && sum < 0.0f ? 0.0f : sum);
}

// One CTA of 256 threads multiplies a (ROWS x k_end) by a (k_end x COLS) matrix through shared memory, K elements at a
// time. Thread (ty, tx) = (thread / 16, thread % 16) owns rows ty * ROWS/16 + i and columns tx + 16 j: 16 neighbouring
// threads store 16 neighbouring outputs. `rows(k)` and `cols(k)` return functions of the row or column giving that
// element of depth k; a thread asks for one k a stage, so what depends on k alone (the BSR look-up) is computed once
// for all rows.
template <int ROWS, int COLS, int K>
struct TileProduct {
  static constexpr int THREADS = 256;
  static constexpr int I = ROWS / 16;
  static constexpr int J = COLS / 16;
  static constexpr int STEP = THREADS / K;
  static_assert(ROWS % 16 == 0 && COLS % 16 == 0 && THREADS % K == 0 && ROWS % STEP == 0 && COLS % STEP == 0,
                "tile shape");

  struct Shared {
    float rows[K][ROWS + 1];  // + 1: neighbouring threads write down a column, which would hit one bank
    float cols[K][COLS + 1];
  };

  template <typename Rows, typename Cols>
  static __device__ __forceinline__ void run(Shared& shared, float (&sum)[I][J], int k_end, Rows rows, Cols cols) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const int stage_k = threadIdx.x % K, stage_first = threadIdx.x / K;
#pragma unroll
    for (int i = 0; i < I; ++i) {
#pragma unroll
      for (int j = 0; j < J; ++j) sum[i][j] = 0.0f;
    }
    for (int k0 = 0; k0 < k_end; k0 += K) {
      const int k = k0 + stage_k;
      if (k < k_end) {
        const auto row_at = rows(k);
        const auto col_at = cols(k);
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP) shared.rows[stage_k][stage_first + i] = row_at(stage_first + i);
#pragma unroll
        for (int j = 0; j < COLS; j += STEP) shared.cols[stage_k][stage_first + j] = col_at(stage_first + j);
      }
      __syncthreads();
      const int depth = min(K, k_end - k0);
#pragma unroll 4
      for (int kk = 0; kk < depth; ++kk) {
        float col[J];
#pragma unroll
        for (int j = 0; j < J; ++j) col[j] = shared.cols[kk][tx + 16 * j];
#pragma unroll
        for (int i = 0; i < I; ++i) {
          const float row = shared.rows[kk][ty * I + i];
#pragma unroll
          for (int j = 0; j < J; ++j) sum[i][j] += row * col[j];
        }
      }
      __syncthreads();
    }
  }
};

// Makes `device` current while it lives. This module carries its own CUDA runtime, whose idea of the current device may
// lag behind torch's.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      restore_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool restore_ = false;
  cudaError_t error_;
};

inline int status(cudaError_t error) {
  if (error == cudaSuccess) return SLIM_OK;
  remember_error(error);
  return SLIM_ERROR_CUDA;
}

// Calls `what`, which returns a status, `device` being the current one meanwhile.
template <typename What>
int on_device(int device, What what) {
  const DeviceGuard guard(device);
  return guard.error() == cudaSuccess ? what() : status(guard.error());
}

// Calls `what` with a number of the type that SLIM_DTYPE_F16 or SLIM_DTYPE_BF16 stands for, `device` being the current
// one meanwhile; what it returns is a status.
template <typename What>
int with_half_type(int device, int dtype, What what) {
  return on_device(device, [dtype, &what]() -> int {
    switch (dtype) {
      case SLIM_DTYPE_F16:  return what(__half());
      case SLIM_DTYPE_BF16: return what(__nv_bfloat16());
    }
    return SLIM_ERROR_UNSUPPORTED;
  });
}

// Launches kernel(args, more...) with so much dynamic shared memory. With `overlap` it may begin while the kernel in
// front of it ends, on GPUs that can: it waits for that one by itself.
template <typename Kernel, typename Args, typename... More>
int launch_kernel(Kernel kernel, const Args& args, int blocks, int threads, int shared_bytes, bool overlap,
                  const More&... more) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return status(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = unsigned(blocks);
  config.blockDim = unsigned(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(args.stream);
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return status(cudaLaunchKernelEx(&config, kernel, args, more...));
}

}  // namespace slim
