#include "chain_conv2d.cuh"

#include "common.cuh"

namespace slim {
namespace {

// A cluster's blocks ask for more than half of an sm_90 processor's shared memory: each has a processor to itself.
constexpr int kAloneShared = 116 * 1024;
constexpr int kMaxPortableCluster = 8;
constexpr int kMaxCluster = 16;

// Whether an error says that clusters of this size cannot run here. Which of them a driver answers for a size that it
// does not take is not written down: these are the ones whose description fits.
bool says_no_such_cluster(cudaError_t error) {
  return error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ||
         error == cudaErrorLaunchOutOfResources || error == cudaErrorNotSupported ||
         error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidResourceConfiguration;
}

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
    const auto kernel = chain_conv2d_kernel<T, Barrier>;
    cudaError_t error = prepare(shared, barrier == SLIM_CHAIN_CLUSTER ? group : 1);
    if (barrier == SLIM_CHAIN_CLUSTER) {
      if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(groups, kernel, &launch.config);
      if (!says_no_such_cluster(error)) return error;
      *groups = 0;
      cudaGetLastError();  // clear it, so that the next launch does not report it
      return cudaSuccess;
    }
    if (error != cudaSuccess) return error;
    int processors = 0, blocks = 0;
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kChainThreads, size_t(shared));
    *groups = blocks * processors / group;
    return error;
  }
};

// Calls `what` with the kernel of this type and barrier, on the device.
template <typename What>
int dispatch_chain(int device, int dtype, int barrier, What what) {
  return with_half_type(device, dtype, [&](auto number) {
    using T = decltype(number);
    return status(barrier == SLIM_CHAIN_CLUSTER ? what(ChainKernel<T, ClusterBarrier>())
                                                : what(ChainKernel<T, CounterBarrier>()));
  });
}

}  // namespace
}  // namespace slim

extern "C" int slim_cuda_chain_conv2d(const SlimCudaChain* a) {
  return slim::dispatch_chain(a->device, a->dtype, a->barrier, [a](auto kernel) { return kernel.launch(*a); });
}

extern "C" int slim_cuda_chain_groups(int32_t group, int32_t barrier, int32_t dtype, int32_t device, int32_t* groups) {
  *groups = 0;
  if (barrier == SLIM_CHAIN_CLUSTER && group > slim::kMaxCluster) return SLIM_OK;
  return slim::dispatch_chain(device, dtype, barrier,
                              [&](auto kernel) { return kernel.groups(group, barrier, device, groups); });
}
