#include "chain_conv2d.cuh"

#include "common.cuh"

namespace slim {
namespace {

// A cluster's blocks ask for more than half of an sm_90 processor's shared memory: each has a processor to itself.
constexpr int kAloneShared = 116 * 1024;
constexpr int kMaxPortableCluster = 8;
constexpr int kMaxCluster = 16;

// The configuration of a launch; its attributes point into itself.
struct ChainLaunch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  ChainLaunch(int group, int barrier, int groups, void* stream, bool overlap) {
    const bool cluster = barrier == SLIM_CHAIN_CLUSTER;
    if (cluster) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim.x = unsigned(group);
      attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    } else {
      attributes[0].id = cudaLaunchAttributeCooperative;  // else the blocks need not run at the same time
      attributes[0].val.cooperative = 1;
    }
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = unsigned(group * groups);
    config.blockDim = unsigned(kChainThreads);
    config.dynamicSmemBytes = size_t(cluster ? kAloneShared : kChainShared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = overlap ? 2 : 1;
  }
};

template <typename T, typename Barrier>
struct ChainKernel {
  static cudaError_t prepare(int shared, int group) {
    const auto kernel = chain_conv2d_kernel<T, Barrier>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess && group > kMaxPortableCluster) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return error;
  }

  static cudaError_t launch(const SlimCudaChain& a) {
    ChainArguments arguments{};
    for (int i = 0; i < a.count; ++i) arguments.layers[i] = a.layers[i];
    arguments.n = a.n;
    arguments.counters = a.counters;
    arguments.count = a.count;
    arguments.images = a.images;
    arguments.group = a.group;
    const int groups = int((a.n + a.images - 1) / a.images);
    const ChainLaunch launch(a.group, a.barrier, groups, a.stream, a.overlap != 0);
    const cudaError_t error =
        prepare(int(launch.config.dynamicSmemBytes), a.barrier == SLIM_CHAIN_CLUSTER ? a.group : 1);
    if (error != cudaSuccess) return error;
    return cudaLaunchKernelEx(&launch.config, chain_conv2d_kernel<T, Barrier>, arguments);
  }

  static cudaError_t groups(int group, int barrier, int device, int32_t* groups) {
    const ChainLaunch launch(group, barrier, 1, nullptr, false);
    const int shared = int(launch.config.dynamicSmemBytes);
    cudaError_t error = prepare(shared, barrier == SLIM_CHAIN_CLUSTER ? group : 1);
    if (error != cudaSuccess) return error;
    const auto kernel = chain_conv2d_kernel<T, Barrier>;
    if (barrier == SLIM_CHAIN_CLUSTER) return cudaOccupancyMaxActiveClusters(groups, kernel, &launch.config);
    int processors = 0, blocks = 0;
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kChainThreads, size_t(shared));
    *groups = blocks * processors / group;
    return error;
  }
};

// Calls `what` with the kernel of this type and barrier.
template <typename What>
int dispatch_chain(int dtype, int barrier, What what) {
  const bool half = dtype == SLIM_DTYPE_F16, cluster = barrier == SLIM_CHAIN_CLUSTER;
  if (!half && dtype != SLIM_DTYPE_BF16) return SLIM_ERROR_UNSUPPORTED;
  if (half && cluster) return status(what(ChainKernel<__half, ClusterBarrier>()));
  if (half) return status(what(ChainKernel<__half, CounterBarrier>()));
  if (cluster) return status(what(ChainKernel<__nv_bfloat16, ClusterBarrier>()));
  return status(what(ChainKernel<__nv_bfloat16, CounterBarrier>()));
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_chain_conv2d(const SlimCudaChain* a) {
  const slim::DeviceGuard guard(a->device);
  if (guard.error() != cudaSuccess) return slim::status(guard.error());
  return slim::dispatch_chain(a->dtype, a->barrier, [&](auto kernel) { return kernel.launch(*a); });
}

extern "C" int slim_cuda_chain_groups(int32_t group, int32_t barrier, int32_t dtype, int32_t device, int32_t* groups) {
  *groups = 0;
  if (barrier == SLIM_CHAIN_CLUSTER && group > slim::kMaxCluster) return SLIM_OK;
  const slim::DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return slim::status(guard.error());
  return slim::dispatch_chain(dtype, barrier,
                              [&](auto kernel) { return kernel.groups(group, barrier, device, groups); });
}
