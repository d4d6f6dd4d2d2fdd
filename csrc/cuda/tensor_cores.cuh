// The hardware instructions that the tensor-core kernels use, one small function each. Shared memory is spoken of by
// 32-bit address, as the instructions take it. csrc/tests/tensor_cores_on_cpu.h supplies the same functions lane by
// lane on a CPU.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#define SLIM_DEVICE __device__ __forceinline__
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SLIM_HAS_WGMMA 1
#else
#define SLIM_HAS_WGMMA 0
#endif

namespace slim {

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

namespace hw {

SLIM_DEVICE uint32_t shared_memory() { return uint32_t(__cvta_generic_to_shared(dynamic_shared_memory)); }

SLIM_DEVICE uint32_t load_shared_32(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}
SLIM_DEVICE uint4 load_shared_128(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}
SLIM_DEVICE void store_shared_16(uint32_t at, uint32_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(static_cast<unsigned short>(v)) : "memory");
}
SLIM_DEVICE void store_shared_32(uint32_t at, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
SLIM_DEVICE void store_shared_128(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Global memory that nothing writes while the kernel runs.
SLIM_DEVICE uint32_t load_global_32(const uint32_t* at) { return __ldg(at); }
SLIM_DEVICE uint2 load_global_64(const void* at) { return __ldg(static_cast<const uint2*>(at)); }
SLIM_DEVICE uint4 load_global_128(const void* at) { return __ldg(static_cast<const uint4*>(at)); }
SLIM_DEVICE void store_global_64(void* at, uint2 v) { *static_cast<uint2*>(at) = v; }
SLIM_DEVICE void store_global_128(void* at, uint4 v) { *static_cast<uint4*>(at) = v; }

// 8 bytes of global memory that other blocks of this launch write: past L1, which does not see what they wrote. Zero,
// and nothing is read, where `inside` is false.
SLIM_DEVICE uint2 load_from_peers_64(const void* at, bool inside) {
  uint2 v;
  asm volatile(
      "{\n.reg .pred inside;\nsetp.ne.b32 inside, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
      "@inside ld.global.cg.v2.u32 {%0, %1}, [%2];\n}"
      : "=r"(v.x), "=r"(v.y)
      : "l"(at), "r"(int(inside))
      : "memory");
  return v;
}

// 16 bytes from global to shared memory in the background; `inside` false writes zeros and reads nothing.
SLIM_DEVICE void copy_async_16(uint32_t to, const void* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
SLIM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are still on their way.
template <int N>
SLIM_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// The same for a number known at run time, at most 6.
SLIM_DEVICE void copy_async_wait_all_but(int groups) {
  switch (groups) {
    case 0:  return copy_async_wait<0>();
    case 1:  return copy_async_wait<1>();
    case 2:  return copy_async_wait<2>();
    case 3:  return copy_async_wait<3>();
    case 4:  return copy_async_wait<4>();
    case 5:  return copy_async_wait<5>();
    default: return copy_async_wait<6>();
  }
}

// Ends the kernel with an error.
SLIM_DEVICE void stop() { __trap(); }

// Waits for all threads of the block, or for `threads` of them that meet at barrier `id` (1 to 15).
SLIM_DEVICE void synchronize() { __syncthreads(); }
SLIM_DEVICE void synchronize(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Where a launch may begin before the kernel in front of it has ended (common.cuh): the next one may begin from here
// on, and this one waits for what the one in front has written. Without such a launch both do nothing.
SLIM_DEVICE void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
SLIM_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The barrier of a cluster of thread blocks (sm_90), which all its threads take in two steps: what a thread wrote
// before it arrived is seen by all behind their wait.
SLIM_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  stop();
#endif
}
SLIM_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A barrier of blocks that run at the same time, of a counter in global memory: what a block wrote before it met at
// `synchronize` and one of its threads added is seen by the thread that waits for the sum, and by those that meet it.
SLIM_DEVICE void add_release(int32_t* counter, int32_t v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(v) : "memory");
}
SLIM_DEVICE void wait_acquire(const int32_t* counter, int32_t target) {
  int32_t v;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  } while (v < target);
}

// What the warp's lanes did before is seen by the others behind it.
SLIM_DEVICE void synchronize_warp() { __syncwarp(); }

// A barrier of 8 bytes in shared memory: a phase of it ends when `count` threads have arrived. `mbarrier_wait` waits
// for the end of the phase of this parity, the first of which is 0; the phase before the first has ended.
SLIM_DEVICE void mbarrier_init(uint32_t at, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
SLIM_DEVICE void mbarrier_arrive(uint32_t at) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(at) : "memory");
}
// Arrives, and the phase ends only when so many bytes of `copy_bulk` are there too.
SLIM_DEVICE void mbarrier_arrive_and_expect(uint32_t at, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}
// Barriers that this thread has set up are seen by `copy_bulk`.
SLIM_DEVICE void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// A multiple of 16 bytes from global to shared memory in the background, which wgmma may read behind the barrier.
SLIM_DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(mbarrier)
               : "memory");
#endif
}
SLIM_DEVICE void mbarrier_wait(uint32_t at, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@done bra.uni ended;\n"
      "bra.uni again;\nended:\n}" ::"r"(at),
      "r"(parity)
      : "memory");
#else
  stop();
#endif
}

// Moves registers from the four warps that call the second to the eight that call the first: 384 threads of 168 become
// 256 of 232 and 128 of 40.
SLIM_DEVICE void more_registers() {
#if SLIM_HAS_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#endif
}
SLIM_DEVICE void fewer_registers() {
#if SLIM_HAS_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
}

// An array of 16-bit numbers in global memory, (images, rows, columns, channels), a box of which a tensor copy brings.
struct TensorMap {
  CUtensorMap map;
};

// Of `sizes`: channels, columns, rows, images; the box's alike. Pixels of a box lie side by side, 32, 64 or 128 bytes
// of channels each, whose 16 bytes change places by the low bits of the pixel's number (`swizzled`).
inline cudaError_t make_tensor_map(TensorMap& to, const void* from, const int64_t (&sizes)[4],
                                   const int32_t (&box)[4]) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (function == nullptr || found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  cuuint64_t dims[4], strides[3];
  cuuint32_t boxes[4], ones[4] = {1, 1, 1, 1};
  cuuint64_t bytes = 2;
  for (int i = 0; i < 4; ++i) {
    dims[i] = cuuint64_t(sizes[i]);
    boxes[i] = cuuint32_t(box[i]);
    bytes *= dims[i];
    if (i < 3) strides[i] = bytes;
  }
  const CUtensorMapSwizzle swizzle = box[0] == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                    : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult made = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &to.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(from), dims, strides, boxes, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The map's box from there on to shared memory, in the background; what lies outside of the array is zero.
SLIM_DEVICE void copy_tensor(uint32_t to, const TensorMap& map, int channel, int column, int row, int image,
                             uint32_t mbarrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map.map), "r"(channel), "r"(column), "r"(row), "r"(image), "r"(mbarrier)
      : "memory");
#endif
}

SLIM_DEVICE uint32_t from_lane(uint32_t v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
// The number of the lane whose index differs by these bits.
SLIM_DEVICE float from_lane_xor(float v, int bits) { return __shfl_xor_sync(0xffffffffu, v, bits); }

// Four 8x8 matrices of 16-bit numbers; lane 8 m + i gives the address of row i of matrix m.
SLIM_DEVICE void load_matrices(uint32_t (&v)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at)
               : "memory");
}

// The same with every matrix transposed: a lane that would get elements 2 i and 2 i + 1 of row j gets row 2 i's and row
// 2 i + 1's element j.
SLIM_DEVICE void load_matrices_transposed(uint32_t (&v)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at)
               : "memory");
}

// Keeps the compiler from moving what it does to these sums across, and from merging equal ones.
template <int N>
SLIM_DEVICE void settle(float (&d)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][e])::"memory");
  }
}
// d += a b in a warp: 16x16 times 16x8, of float, which is read in TF32, 16x8 times 8x8. A register holds two
// neighbours of 16 bits, or one float: either way 32 bytes of depth, in the same places.
template <typename T>
SLIM_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
SLIM_DEVICE void multiply<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
SLIM_DEVICE void multiply<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
SLIM_DEVICE void multiply<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An operand as `multiply` wants it: float rounded to TF32, to the nearest number and from the middle away from zero.
template <typename T>
SLIM_DEVICE void round_operand(uint32_t (&v)[4]) {
  if constexpr (__is_same(T, float)) {
#pragma unroll
    for (uint32_t& number : v) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(number) : "f"(__uint_as_float(number)));
  }
}

// Two numbers rounded to T and packed, `low` in the low half; negative numbers become 0 with RELU, NaN stays.
template <typename T, bool RELU>
SLIM_DEVICE uint32_t pack(float low, float high) {
  uint32_t v;
  if constexpr (sizeof(T) == 2 && RELU) {
    if constexpr (__is_same(T, __half)) {
      asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    }
  } else if constexpr (__is_same(T, __half)) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  }
  return v;
}

// One of two packed numbers.
template <typename T>
SLIM_DEVICE float unpack(uint32_t v, bool high) {
  if constexpr (__is_same(T, __half)) return __half2float(__ushort_as_half(uint16_t(high ? v >> 16 : v)));
  return __uint_as_float(high ? v & 0xffff0000u : v << 16);
}

// The larger one; NaN where either is NaN.
SLIM_DEVICE float larger(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

SLIM_DEVICE float reciprocal(float v) { return __frcp_rn(v); }
SLIM_DEVICE uint32_t bits_of_float(float v) { return __float_as_uint(v); }
SLIM_DEVICE float float_of_bits(uint32_t v) { return __uint_as_float(v); }
SLIM_DEVICE float load_number(const float* at) { return __ldg(at); }
SLIM_DEVICE float load_number(const __nv_bfloat16* at) { return __bfloat162float(__ldg(at)); }
SLIM_DEVICE float load_number(const __half* at) { return __half2float(__ldg(at)); }

// Four warps together: d += a b, 64x16 times 16x128 or 16x64, in the background. Warp w has the rows from 16 w of a and
// d in its registers; b, in shared memory, is described by `group_operand`.
SLIM_DEVICE uint64_t group_operand(uint32_t at, uint32_t depth_stride, uint32_t column_stride) {
  return uint64_t((at & 0x3ffff) >> 4) | uint64_t(depth_stride >> 4) << 16 | uint64_t(column_stride >> 4) << 32;
}
#if SLIM_HAS_WGMMA
template <typename T>
SLIM_DEVICE void multiply_group(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b);  // 128 columns
template <typename T>
SLIM_DEVICE void multiply_group(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b);  // 64 columns
#define SLIM_D(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
template <>
SLIM_DEVICE void multiply_group<__nv_bfloat16>(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
      : SLIM_D(0), SLIM_D(1), SLIM_D(2), SLIM_D(3), SLIM_D(4), SLIM_D(5), SLIM_D(6), SLIM_D(7), SLIM_D(8), SLIM_D(9),
        SLIM_D(10), SLIM_D(11), SLIM_D(12), SLIM_D(13), SLIM_D(14), SLIM_D(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
SLIM_DEVICE void multiply_group<__half>(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
      : SLIM_D(0), SLIM_D(1), SLIM_D(2), SLIM_D(3), SLIM_D(4), SLIM_D(5), SLIM_D(6), SLIM_D(7), SLIM_D(8), SLIM_D(9),
        SLIM_D(10), SLIM_D(11), SLIM_D(12), SLIM_D(13), SLIM_D(14), SLIM_D(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
SLIM_DEVICE void multiply_group<__nv_bfloat16>(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
      : SLIM_D(0), SLIM_D(1), SLIM_D(2), SLIM_D(3), SLIM_D(4), SLIM_D(5), SLIM_D(6), SLIM_D(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
SLIM_DEVICE void multiply_group<__half>(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"
      : SLIM_D(0), SLIM_D(1), SLIM_D(2), SLIM_D(3), SLIM_D(4), SLIM_D(5), SLIM_D(6), SLIM_D(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef SLIM_D
SLIM_DEVICE void multiply_group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SLIM_DEVICE void multiply_group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
SLIM_DEVICE void multiply_group_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// What this thread wrote to shared memory is seen by wgmma.
SLIM_DEVICE void fence_for_multiply_group() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif
}  // namespace hw
}  // namespace slim
