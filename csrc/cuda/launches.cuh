// How many threads and blocks a kernel is launched with, and for which type.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../arguments.h"
#include "row_reduce.cuh"

namespace imbalance::cuda {

inline int ceiling(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

// The fewest lanes, a power of two up to `most`, whose packs hold so many numbers, or `most`.
inline int lanes_for(int numbers, int per_lane, int most) {
  int lanes = 1;
  while (lanes < most && lanes * per_lane < numbers) lanes *= 2;
  return lanes;
}

// Whole warps that share so many numbers.
inline int threads_for(int numbers, int per_thread, int most) {
  return std::clamp(ceiling(ceiling(numbers, per_thread), kWarp) * kWarp, kWarp, most);
}

// f(S{}) for the storage type of a dtype.
template <class Function>
cudaError_t with_dtype(Dtype dtype, const Function& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float64:
      return f(double{});
    case Dtype::bfloat16:
      return f(BFloat16{});
    case Dtype::float16:
      return f(Float16{});
  }
  return cudaErrorInvalidValue;
}

constexpr double kCacheShare = 0.7;  // of the L2 cache, for what is read again

// So many rows or tiles of so many bytes that the cache holds them until they are read again, or half as many as there
// are multiprocessors.
inline std::int64_t most_at_a_time(const Device& device, double bytes) {
  const int fitting = static_cast<int>(kCacheShare * device.cache / std::max(1.0, bytes));
  return std::max({1, device.multiprocessors / 2, fitting});
}

constexpr cudaError_t kNoSuchCluster = cudaErrorInvalidClusterSize;

// As many clusters as the device runs at a time and `most` allows; fewer, where none then works on more rows.
template <class... Parameters>
cudaError_t fill_device(void (*kernel)(Parameters...), std::int64_t work, Shape* shape, std::int64_t most = INT32_MAX) {
  int resident = 0;
  if (const cudaError_t error = resident_clusters(kernel, *shape, &resident)) return error;
  if (resident == 0) return kNoSuchCluster;
  const std::int64_t rounds = ceiling(work, std::min<std::int64_t>(resident, most));
  shape->blocks = static_cast<unsigned>(ceiling(work, rounds)) * shape->cluster;
  return cudaSuccess;
}

}  // namespace imbalance::cuda
