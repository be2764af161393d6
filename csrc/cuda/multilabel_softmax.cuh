// What the kernels of multilabel_softmax share: rows, what a logit adds to their two sums, their loss.
//
// Every logit takes the side of its label, so that a positive is left out of the first sum and a negative out of the
// second; neither is subtracted. Labels between 0 and 1 take both, weighted. The shift of a sum is 0 where no logit is
// so large that it is needed: then small sums keep their digits, in log1p.
#pragma once

#include <type_traits>

#include "labels.cuh"
#include "launches.cuh"
#include "multilabel_softmax.h"

namespace imbalance::cuda {

constexpr float kNoShift = 16;  // exponents up to here are summed as they are

template <class S>
struct MultilabelRows {
  using T = Accumulate<S>;

  std::int64_t count;   // N
  std::int64_t pixels;  // P of channels-first logits, else 0
  const S* logits;
  std::int64_t image_stride;  // of rows too
  std::int64_t class_stride;
  LabelsOf<S> labels;
  const T* bias;      // (C,) or null
  const T* upstream;  // (N,), or () with a step of 0; null: one
  std::int64_t upstream_step;
  const T* normalizer;  // ()
  const T* divisor;     // ()
  T* losses;            // (N,) or null
  S* d_logits;          // the logits' shape, or null
  std::int64_t gradient_image_stride;
  std::int64_t gradient_class_stride;

  template <bool dense>
  __device__ __forceinline__ Counted<T> counted(std::int64_t row) const {
    const bool nothing = row >= count || (normalizer != nullptr && *normalizer == T(0));
    return nothing ? Counted<T>{false, false, -1, T(0)} : counted_row<dense>(labels, row);
  }
};

// Finite, also where the highest exponent is not: that makes its sum +inf, and nothing NaN but its own gradient.
template <class T>
__device__ __forceinline__ T multilabel_shift(T highest) {
  constexpr T most = std::numeric_limits<T>::max();
  return highest > T(kNoShift) ? (highest > most ? most : highest) : T(0);
}

// What is known of both sums of some of a row: they are relative to multilabel_shift of the highest exponents.
template <class T>
struct TwoSums {
  T highest, highest_positive;
  T negative, positive;

  static __device__ __forceinline__ TwoSums nothing() { return {-infinity<T>(), -infinity<T>(), T(0), T(0)}; }

  // The same, relative to higher exponents.
  __device__ __forceinline__ TwoSums raised(T to, T to_positive) const {
    const T by = multilabel_shift(highest) - multilabel_shift(to);
    const T by_positive = multilabel_shift(highest_positive) - multilabel_shift(to_positive);
    return {to, to_positive, negative * exponential(by), positive * exponential(by_positive)};
  }
  __device__ __forceinline__ TwoSums plus(const TwoSums& other) const {
    return {highest, highest_positive, negative + other.negative, positive + other.positive};
  }
};

template <class T>
__device__ __forceinline__ TwoSums<T> join(const TwoSums<T>& of_lane, int lanes) {
  const T highest = max_over_lanes(of_lane.highest, lanes), positive = max_over_lanes(of_lane.highest_positive, lanes);
  const TwoSums<T> raised = of_lane.raised(highest, positive);
  return {highest, positive, sum_over_lanes(raised.negative, lanes), sum_over_lanes(raised.positive, lanes)};
}

// log(1 + sum), of a sum relative to a shift, and 1 + sum relative to it.
template <class T>
struct OnePlus {
  T log, total;

  __device__ __forceinline__ OnePlus(T sum, T shift) {
    total = sum + std::exp(-shift);
    log = shift == T(0) ? std::log1p(sum) : shift + std::log(total);
  }
};

// The factors of exponentials in a row's gradient, and its shifts.
template <class T>
struct TwoFactors {
  T negative, positive;
  T shift, shift_of_positives;
};

// The end of a row that was read: its loss, written if this thread `writes`, and its gradient's factors.
template <class S>
__device__ __forceinline__ TwoFactors<Accumulate<S>> finish(const MultilabelRows<S>& rows, std::int64_t row,
                                                            const Counted<Accumulate<S>>& counted,
                                                            const TwoSums<Accumulate<S>>& sums, bool writes) {
  using T = Accumulate<S>;
  const T shift = multilabel_shift(sums.highest), shift_of_positives = multilabel_shift(sums.highest_positive);
  const OnePlus<T> negative(sums.negative, shift), positive(sums.positive, shift_of_positives);
  if (writes && rows.losses) rows.losses[row] = counted.weight * (negative.log + positive.log);
  T factor = counted.weight;
  if (rows.upstream) factor *= rows.upstream[row * rows.upstream_step];
  const T* const divisor = rows.normalizer ? rows.normalizer : rows.divisor;
  if (divisor) factor /= *divisor;
  return {factor / negative.total, factor / positive.total, shift, shift_of_positives};
}

// What a logit z (-inf where masked) with label y adds to the first sum and to the second; of a hard label one
// exponential serves.
template <bool dense, class T>
__device__ __forceinline__ void two_exponentials(T z, T y, T shift, T shift_of_positives, T* negative, T* positive) {
  const bool is_positive = y == T(1), is_soft = dense && !is_positive && y != T(0);
  const bool masked = z == -infinity<T>();
  const T e = exponential(masked ? z : is_positive ? -z - shift_of_positives : z - shift);
  *negative = is_positive ? T(0) : (T(1) - y) * e;
  *positive = is_positive ? e : T(0);
  if (is_soft && !masked) *positive = y * exponential(-z - shift_of_positives);
}

// Its exponent, on the side or sides that it has, where that is higher.
template <class T>
__device__ __forceinline__ void raise_exponents(T z, T y, T* highest, T* highest_positive) {
  if (y != T(1)) *highest = maximum(*highest, z);
  if (y != T(0) && z != -infinity<T>()) *highest_positive = maximum(*highest_positive, -z);
}

// f(dense, aligned) as constants.
template <class Function>
cudaError_t with_form(bool dense, bool aligned, const Function& f) {
  if (dense) return aligned ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  return aligned ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
}

}  // namespace imbalance::cuda
