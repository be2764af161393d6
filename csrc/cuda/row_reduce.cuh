// The sums over the rest of a row, and how threads, warps and blocks join theirs.
#pragma once

#include "vector.cuh"

namespace imbalance::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

constexpr float kLog2E = 1.4426950408889634f;

// exp(x) for x <= 0, in two instructions; good for sums whose largest term is exp(0).
__device__ __forceinline__ float exponential(float x) { return exp2_quick(x * kLog2E); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The maximum as a shift: 0 where everything is masked, since -inf - -inf is NaN.
template <class T>
__device__ __forceinline__ T shift_of(T highest) {
  return highest == -infinity<T>() ? T(0) : highest;
}

// exp(z - shift) for the numbers z of a row, in two instructions each: 2^(z * log2(e) - offset), where the offset is
// shift * log2(e), rounded once. The product with z is not rounded, so all of a row are off by the same factor, however
// far the shift is from 0: `correction` times each of them, or their sum, is right.
template <class T>
struct Exponentials {
  T shift;

  static constexpr T correction = T(1);
  __device__ __forceinline__ T operator()(T z) const { return exp(z - shift); }
};

template <>
struct Exponentials<float> {
  float base, offset, correction;  // log2 of the base

  Exponentials() = default;

  // From 2^30 the correction would soon leave float's range; but there neighbours are so far apart that any base above
  // 1 gives 1 or next to nothing.
  __device__ __forceinline__ explicit Exponentials(float shift)
      : base(fabsf(shift) < 0x1p30f ? kLog2E : 1.0f),
        offset(shift * base),
        correction(exp2_quick(fmaf(-shift, base, offset))) {}

  __device__ __forceinline__ float operator()(float z) const { return exp2_quick(fmaf(z, base, -offset)); }
};

// What is known of some of a row's rest; sums are relative to shift_of(highest).
template <class T>
struct RowSums {
  T highest;          // max z_j
  T total;            // sum exp(z_j - shift)
  T weighted_logits;  // sum u_j (z_j - shift)
  T weight_sum;       // sum u_j

  static __device__ __forceinline__ RowSums nothing() { return {-infinity<T>(), T(0), T(0), T(0)}; }

  // One number's, whose logit is relative to the shift.
  __device__ __forceinline__ void add_weight(T u, T relative) {
    if (u != T(0)) weighted_logits += u * relative;
    weight_sum += u;
  }

  // The same, relative to a higher maximum.
  __device__ __forceinline__ RowSums raised(T to) const {
    const T shift = shift_of(to);
    const T factor = highest == -infinity<T>() ? T(0) : exponential(highest - shift);
    return {to, total * factor, weighted_logits + (shift_of(highest) - shift) * weight_sum, weight_sum};
  }

  // With others that are relative to the same maximum.
  __device__ __forceinline__ RowSums plus(const RowSums& other) const {
    return {highest, total + other.total, weighted_logits + other.weighted_logits, weight_sum + other.weight_sum};
  }
};

template <class T>
__device__ __forceinline__ T maximum(T a, T b) {
  return a > b ? a : b;
}
__device__ __forceinline__ float maximum(float a, float b) { return fmaxf(a, b); }

// The maximum and the sum over `lanes` neighbours, a power of two; each of them gets it.
template <class T>
__device__ __forceinline__ T max_over_lanes(T x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    x = maximum(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}
template <class T>
__device__ __forceinline__ T sum_over_lanes(T x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The sums of `lanes` neighbours that are relative to the same maximum.
template <bool weighted, class T>
__device__ __forceinline__ RowSums<T> add_over_lanes(const RowSums<T>& of_lane, int lanes) {
  RowSums<T> sums = of_lane;
  sums.total = sum_over_lanes(of_lane.total, lanes);
  if constexpr (weighted) {
    sums.weighted_logits = sum_over_lanes(of_lane.weighted_logits, lanes);
    sums.weight_sum = sum_over_lanes(of_lane.weight_sum, lanes);
  }
  return sums;
}

// The same where each has a maximum of its own.
template <bool weighted, class T>
__device__ __forceinline__ RowSums<T> join_lanes(const RowSums<T>& of_lane, int lanes) {
  return add_over_lanes<weighted>(of_lane.raised(max_over_lanes(of_lane.highest, lanes)), lanes);
}

}  // namespace imbalance::cuda
