// The CUDA runtime's state: errors, versions.
#include "common.cuh"

namespace slim {
namespace {
thread_local cudaError_t last_error = cudaSuccess;
}

void remember_error(cudaError_t error) {
  last_error = error;
  cudaGetLastError();  // clear it, so that the next launch does not report it again
}

}  // namespace slim

extern "C" const char* slim_cuda_error_message(void) {
  return slim::last_error == cudaSuccess ? "" : cudaGetErrorString(slim::last_error);
}

extern "C" const char* slim_cuda_unavailable_reason(void) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

extern "C" int slim_cuda_version(void) { return CUDART_VERSION; }
