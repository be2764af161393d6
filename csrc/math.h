// What the formulas in objectives.h and softmax_row.h need of a number type. A number type is float, double or a SIMD
// lane pack; Math<Number> says how it compares, selects and exponentiates. Nothing here knows torch, a vector width or
// a device.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define IMBALANCE_INLINE __host__ __device__ __forceinline__
#else
#define IMBALANCE_INLINE inline __attribute__((always_inline))
#endif

namespace imbalance {

template <class Number>
struct Math;

template <class Number>
struct Pair {
  Number first, second;
};

// Plain numbers, with the C library's functions.
template <class Number>
struct PlainMath {
  using Scalar = Number;
  static IMBALANCE_INLINE Number infinity() { return std::numeric_limits<Number>::infinity(); }
  static IMBALANCE_INLINE bool less(Number a, Number b) { return a < b; }
  static IMBALANCE_INLINE bool equal(Number a, Number b) { return a == b; }
  static IMBALANCE_INLINE bool any(bool condition) { return condition; }
  static IMBALANCE_INLINE Number select(bool condition, Number a, Number b) { return condition ? a : b; }
  static IMBALANCE_INLINE Number minus_abs(Number x) { return -std::abs(x); }
  static IMBALANCE_INLINE Number exp_nonpositive(Number x) { return std::exp(x); }
  static IMBALANCE_INLINE Number sqrt(Number x) { return std::sqrt(x); }
  static IMBALANCE_INLINE Pair<Number> exp_and_expm1_nonpositive(Number x) { return {std::exp(x), std::expm1(x)}; }
  static IMBALANCE_INLINE Number log(Number x) { return std::log(x); }
  // log(sum), where sum is 1 + x without its rounding
  static IMBALANCE_INLINE Number log1p(Number x, Number sum) {
    return x > Number(-0.5) ? std::log1p(x) : std::log(sum);
  }
  static IMBALANCE_INLINE Number log1p_unit(Number x) { return std::log1p(x); }  // for x in [0, 1]
#if defined(__CUDA_ARCH__)  // a device's sin and cos take a stack frame, for angles that no margin has
  static IMBALANCE_INLINE Number cos(Number angle) { return ::cospi(angle * Number(0.31830988618379067)); }
  static IMBALANCE_INLINE Number sin(Number angle) { return ::sinpi(angle * Number(0.31830988618379067)); }
#else
  static IMBALANCE_INLINE Number cos(Number angle) { return std::cos(angle); }
  static IMBALANCE_INLINE Number sin(Number angle) { return std::sin(angle); }
#endif
};

template <>
struct Math<float> : PlainMath<float> {};
template <>
struct Math<double> : PlainMath<double> {};

}  // namespace imbalance
