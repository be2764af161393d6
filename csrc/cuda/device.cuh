// What the kernels use beyond plain CUDA C++: shared memory, clusters, launches, streaming loads, fast exponentials.
//
// Kernels come to these by this header alone, because tests compile the same .cu files with g++ and run them on the
// CPU: there tests/emulation/emulator.h stands for everything below, and for the CUDA runtime. So kernels keep to what
// it has: no plain __shared__, no <<<>>>, no inline PTX; all threads of a block reach a barrier at the same line, and
// none returns before one; clusters meet before the first remote(). What is added here needs its twin there.
#pragma once

#if defined(__CUDACC__)

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstring>
#include <limits>
#include <map>
#include <tuple>

namespace imbalance::cuda {

// A T[n] in the block's shared memory.
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]

// `count` numbers at a byte offset of the shared memory that the launch asked for.
template <class T>
__device__ __forceinline__ T* dynamic_smem(unsigned offset, unsigned /*count*/) {
  extern __shared__ uint4 imbalance_dynamic_smem[];
  return reinterpret_cast<T*>(reinterpret_cast<char*>(imbalance_dynamic_smem) + offset);
}

// Clusters of blocks; before compute capability 9 every block is one of its own. At cluster_sync all threads of a
// cluster meet, and see what those warps that publish wrote before: such a warp waits until all its stores have
// arrived.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ __forceinline__ unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ __forceinline__ void cluster_sync(bool publishes = true) {
  if (publishes) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
template <class T>
__device__ __forceinline__ T* remote(T* p, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync(bool /*publishes*/ = true) { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* remote(T* p, unsigned /*rank*/) {
  return p;
}
#endif

// A vector of up to 16 bytes that is read or written once: first to leave the caches.
template <class Vector>
__device__ __forceinline__ Vector load_streaming(const Vector* p) {
  return __ldcs(p);
}
template <class Vector>
__device__ __forceinline__ void store_streaming(Vector* p, Vector x) {
  __stcs(p, x);
}

// What no thread writes while the kernel runs, so that its loads may come before any store.
template <class T>
__device__ __forceinline__ T load_constant(const T* p) {
  return __ldg(p);
}

// 2^x to two units in the last place, results below 2^-126 flushed to 0: one instruction.
__device__ __forceinline__ float exp2_quick(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The base-2 logarithm, to 2^-22: absolutely between 1/2 and 2, relatively elsewhere. The reciprocal, to
// one unit in the last place. What is below 2^-126 counts as 0.
__device__ __forceinline__ float log2_quick(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_quick(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Makes the compiler forget what it knows of a register, or of memory. Between two passes over packed numbers it would
// else keep them unpacked, and all their columns, in several times the registers.
template <class Word>
__device__ __forceinline__ void forget(Word& word) {
  asm volatile("" : "+r"(word));
}
// Of a pointer: it is then not computed anew wherever it is used.
template <class T>
__device__ __forceinline__ void forget(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}
__device__ __forceinline__ void forget_memory() { asm volatile("" ::: "memory"); }

struct Device {
  int multiprocessors;
  int shared_memory;  // bytes that a block can ask for
  int cache;          // bytes of L2
  bool has_clusters;
};

inline cudaError_t current_device(Device* device) {
  int index = 0, major = 0;
  if (const cudaError_t error = cudaGetDevice(&index)) return error;
  const auto get = [index](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, index);
  };
  if (const cudaError_t error = get(&device->multiprocessors, cudaDevAttrMultiProcessorCount)) return error;
  if (const cudaError_t error = get(&device->shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return error;
  if (const cudaError_t error = get(&device->cache, cudaDevAttrL2CacheSize)) return error;
  if (const cudaError_t error = get(&major, cudaDevAttrComputeCapabilityMajor)) return error;
  device->has_clusters = major >= 9;
  return cudaSuccess;
}

struct Shape {
  unsigned blocks;   // of the grid, a multiple of cluster
  unsigned threads;  // of a block
  unsigned cluster;  // blocks
  unsigned shared_memory;
};

inline cudaLaunchConfig_t configuration(const Shape& shape, cudaStream_t stream, cudaLaunchAttribute* attribute) {
  *attribute = {};
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_memory;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return config;
}

// Launches a kernel; arguments are converted to its parameters. Clusters, and more shared memory than any kernel may
// have, need resident_clusters() before.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Shape& shape, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configuration(shape, stream, &attribute);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// How many clusters of this shape the current device runs at a time; 0 where it cannot run one. Lets the kernel have
// all of a block's shared memory, and clusters of every size. Each thread of the host asks once of each kernel, shape
// and device.
template <class... Parameters>
cudaError_t resident_clusters(void (*kernel)(Parameters...), const Shape& shape, int* clusters) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index)) return error;
  static thread_local std::map<std::tuple<const void*, int, unsigned, unsigned, unsigned>, int> known;
  const std::tuple key{function, index, shape.threads, shape.cluster, shape.shared_memory};
  if (const auto found = known.find(key); found != known.end()) {
    *clusters = found->second;
    return cudaSuccess;
  }
  Device device;
  if (const cudaError_t error = current_device(&device)) return error;
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, function)) return error;
  const int dynamic = device.shared_memory - static_cast<int>(attributes.sharedSizeBytes);
  if (const auto error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic)) {
    return error;
  }
  if (shape.cluster == 1) {
    const auto threads = static_cast<int>(shape.threads);
    const cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(clusters, kernel, threads, shape.shared_memory);
    if (error != cudaSuccess) return error;
    *clusters *= device.multiprocessors;
  } else if (attributes.ptxVersion < 90) {
    // Compiled for compute capability 8 and run on a later one, it takes each block for a cluster (above).
    *clusters = 0;
  } else {
    if (const auto error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) {
      return error;
    }
    cudaLaunchAttribute attribute;
    const Shape one{shape.cluster, shape.threads, shape.cluster, shape.shared_memory};
    const cudaLaunchConfig_t config = configuration(one, nullptr, &attribute);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
    if (error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidConfiguration ||
        error == cudaErrorInvalidValue) {
      cudaGetLastError();  // an answer: not on this device
      *clusters = 0;
    } else if (error != cudaSuccess) {
      return error;
    }
  }
  known[key] = *clusters;
  return cudaSuccess;
}

}  // namespace imbalance::cuda

#else
#include "emulator.h"
#endif
