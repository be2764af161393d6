// The sum over a block.
#pragma once

#include "row_reduce.cuh"

namespace imbalance::cuda {

// Of whole warps, `threads` of them in all, for the first warp: in an order that depends on the number of threads
// alone.
template <int threads, class T>
__device__ __forceinline__ T sum_over_block(T x) {
  constexpr int warps = threads / kWarp;
  SHARED_ARRAY(T, of_warps, warps);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  x = sum_over_lanes(x, kWarp);
  if (lane == 0) of_warps[warp] = x;
  __syncthreads();
  return sum_over_lanes(lane < warps ? of_warps[lane] : T(0), kWarp);
}

}  // namespace imbalance::cuda
