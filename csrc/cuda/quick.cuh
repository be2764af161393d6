// A float whose functions are the device's approximations: a number type for the formulas of objectives.h, to a few
// units in the last place where a result matters.
//
// sigmoid_loss works on every logit, where softmax_loss has one truth a row: a copy leaves about 27 instructions a
// number of halves, and 8 of their slots go to each of the approximations, so they are few.
#pragma once

#include "../objectives.h"
#include "row_reduce.cuh"

namespace imbalance {

struct Quick {
  float value;

  Quick() = default;
  IMBALANCE_INLINE Quick(float x) : value(x) {}

  friend IMBALANCE_INLINE Quick operator+(Quick a, Quick b) { return a.value + b.value; }
  friend IMBALANCE_INLINE Quick operator-(Quick a, Quick b) { return a.value - b.value; }
  friend IMBALANCE_INLINE Quick operator*(Quick a, Quick b) { return a.value * b.value; }
  friend IMBALANCE_INLINE Quick operator/(Quick a, Quick b);
  IMBALANCE_INLINE Quick operator-() const { return -value; }
};

template <>
struct Math<Quick> {
  using Scalar = float;
  static constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

  static IMBALANCE_INLINE Quick infinity() { return std::numeric_limits<float>::infinity(); }
  static IMBALANCE_INLINE bool less(Quick a, Quick b) { return a.value < b.value; }
  static IMBALANCE_INLINE bool equal(Quick a, Quick b) { return a.value == b.value; }
  static IMBALANCE_INLINE bool any(bool condition) { return condition; }
  static IMBALANCE_INLINE Quick select(bool condition, Quick a, Quick b) { return condition ? a.value : b.value; }

#if defined(__CUDACC__) && !defined(__CUDA_ARCH__)  // nvcc's pass for the host, where nothing calls these
  static IMBALANCE_INLINE float exp2(float x) { return x; }
  static IMBALANCE_INLINE float log2(float x) { return x; }
  static IMBALANCE_INLINE float reciprocal(float x) { return x; }
#else
  static IMBALANCE_INLINE float exp2(float x) { return cuda::exp2_quick(x); }
  static IMBALANCE_INLINE float log2(float x) { return cuda::log2_quick(x); }
  static IMBALANCE_INLINE float reciprocal(float x) { return cuda::reciprocal_quick(x); }
#endif

  // The argument is rounded: relative errors grow as x does, to 2e-6 at -30.
  static IMBALANCE_INLINE Quick exp_nonpositive(Quick x) { return exp2(x.value * kLog2E); }
  // The latter by its series where the difference would cancel, 3.2e-7.
  static IMBALANCE_INLINE Pair<Quick> exp_and_expm1_nonpositive(Quick x) {
    const float a = x.value;
    float series = 1.9841270e-4f;
    series = series * a + 1.3888889e-3f;
    series = series * a + 8.3333333e-3f;
    series = series * a + 4.1666667e-2f;
    series = series * a + 1.6666667e-1f;
    series = series * a + 0.5f;
    const Quick power = exp_nonpositive(x);
    return {power, a > -0.5f ? a * (series * a + 1.0f) : power.value - 1.0f};
  }
  static IMBALANCE_INLINE Quick sqrt(Quick x) { return sqrtf(x.value); }
  static IMBALANCE_INLINE Quick log(Quick x) { return log2(x.value) * kLn2; }
  static IMBALANCE_INLINE Quick minus_abs(Quick x) { return -fabsf(x.value); }
  // By a series for x in [0, 1], minimax, 3.3e-7 with all roundings: no logarithm, and it does not cancel.
  static IMBALANCE_INLINE Quick log1p_unit(Quick x) {
    const float a = x.value;
    float series = -0.008539168164134026f;
    series = series * a + 0.04408948868513107f;
    series = series * a - 0.1076815202832222f;
    series = series * a + 0.17745228111743927f;
    series = series * a - 0.24495458602905273f;
    series = series * a + 0.33275479078292847f;
    series = series * a - 0.4999740421772003f;
    return a * (series * a + 0.9999998211860657f);
  }
  // For x in (-1, 0].
  static IMBALANCE_INLINE Quick log1p(Quick x, Quick sum) { return x.value > -0.5f ? -log1p_unit(-x / sum) : log(sum); }
};

IMBALANCE_INLINE Quick operator/(Quick a, Quick b) { return a.value * Math<Quick>::reciprocal(b.value); }

// As the template has it, with fewer instructions: |d| and min(d, 0) are one each.
template <>
IMBALANCE_INLINE Truth<Quick>::Truth(Quick log_odds) : d(log_odds) {
  const float x = d.value;
  const bool positive = x > 0;
  const Quick small = M::exp_nonpositive(-fabsf(x));
  const Quick larger = M::reciprocal(1 + small.value), smaller = small * larger;
  p = M::select(positive, larger, smaller);
  n = M::select(positive, smaller, larger);
  log_sum = M::log1p_unit(small);
  log_p = fminf(x, 0) - log_sum;
  log_n = fminf(-x, 0) - log_sum;
}

// 0 at d = -inf, where log p is, in one instruction more than the product.
template <>
IMBALANCE_INLINE Quick Truth<Quick>::p_log_p() const {
  return p * Quick(fmaxf(log_p.value, -std::numeric_limits<float>::max()));
}

}  // namespace imbalance
