// Every objective once: its value G and slope A = dG/dd in the log-odds d of the truth.
//
// Mirrors imbalance_kernels/objectives.py, the specification, by name. Notation: p = sigmoid(d), n = 1 - p =
// sigmoid(-d), l = log p. No objective divides by n, so confident rows give no NaN. Plain C++ on any number type
// (math.h).
#pragma once

#include "math.h"

namespace imbalance {

enum class ObjectiveKind : int {
  cross_entropy,
  focal,
  hard_truncation,
  soft_truncation,
  poly,
  poly_focal,
  gce,
  smooth_accuracy,
  token_scaled,
};

// The registry's names, in the order of ObjectiveKind.
inline constexpr const char* kObjectiveNames[] = {
    "cross_entropy", "focal", "hard_truncation", "soft_truncation", "poly",
    "poly_focal",    "gce",   "smooth_accuracy", "token_scaled",
};

template <class Number>
struct ValueAndSlope {
  Number value;
  Number slope;
};

// An exponent that is a multiple of one half, and no other from lane to lane: its powers are products and a root.
struct HalfExponent {
  int halves;
};

template <class Number>
IMBALANCE_INLINE Number number_of(Number exponent) {
  return exponent;
}
template <class Number>
IMBALANCE_INLINE Number number_of(HalfExponent exponent) {
  return Number(typename Math<Number>::Scalar(0.5) * static_cast<typename Math<Number>::Scalar>(exponent.halves));
}

// What all objectives are made of, from one exponential and one logarithm of the log-odds.
template <class Number>
struct Truth {
  using M = Math<Number>;
  Number d;        // log-odds
  Number p;        // sigmoid(d)
  Number n;        // sigmoid(-d)
  Number log_p;    // log p
  Number log_n;    // log n
  Number log_sum;  // log(1 + exp(-|d|))

  explicit IMBALANCE_INLINE Truth(Number log_odds) : d(log_odds) {
    const auto positive = M::less(Number(0), d);
    const Number small = M::exp_nonpositive(M::minus_abs(d));
    const Number larger = Number(1) / (Number(1) + small);
    const Number smaller = small * larger;
    p = M::select(positive, larger, smaller);
    n = M::select(positive, smaller, larger);
    log_sum = M::log1p_unit(small);
    log_p = M::select(positive, Number(0), d) - log_sum;
    log_n = M::select(positive, -d, Number(0)) - log_sum;
  }

  IMBALANCE_INLINE auto hopeless() const { return M::equal(d, -M::infinity()); }  // p is exactly 0

  // p * log p, which is 0 at d = -inf, where the product would be 0 * inf.
  IMBALANCE_INLINE Number p_log_p() const { return M::select(hopeless(), Number(0), p * log_p); }

  // n ^ gamma; products where gamma is 0, 1 or 2 are exact to the last bits, and 0 ^ 0 is 1.
  IMBALANCE_INLINE Number n_power(Number gamma) const {
    Number power = M::exp_nonpositive(gamma * log_n);
    power = M::select(M::equal(gamma, Number(2)), n * n, power);
    power = M::select(M::equal(gamma, Number(1)), n, power);
    return M::select(M::equal(gamma, Number(0)), Number(1), power);
  }
  IMBALANCE_INLINE Number n_power(HalfExponent gamma) const {
    if (gamma.halves == 4) return n * n;
    if (gamma.halves == 0) return Number(1);
    Number power = gamma.halves % 2 ? M::sqrt(n) : n;
    for (int i = (gamma.halves - 1) / 2; i > 0; --i) power = power * n;
    return power;
  }

  // Of the log-odds -d, the other label's.
  IMBALANCE_INLINE Truth flipped() const {
    Truth other = *this;
    other.d = -d;
    other.p = n;
    other.n = p;
    other.log_p = log_n;
    other.log_n = log_p;
    return other;
  }
};

template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> cross_entropy(const Truth<Number>& t) {
  return {-t.log_p, -t.n};
}

// gamma is a Number or a HalfExponent
template <class Number, class Exponent>
IMBALANCE_INLINE ValueAndSlope<Number> focal(const Truth<Number>& t, Exponent gamma) {
  const Number power = t.n_power(gamma);
  return {-(power * t.log_p), -(power * (t.n - number_of<Number>(gamma) * t.p_log_p()))};
}

// limit = logit(threshold), so that p < threshold needs no exponential; the caller has it in double, since 1 -
// threshold may cancel.
template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> hard_truncation(const Truth<Number>& t, Number limit) {
  using M = Math<Number>;
  const Number at_limit = M::select(M::equal(t.d, limit), Number(0.5), Number(1));
  const Number weight = M::select(M::less(limit, t.d), Number(0), at_limit);
  return {-(weight * t.log_p), -(weight * t.n)};
}

template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> soft_truncation(const Truth<Number>& t, Number sharpness) {
  using M = Math<Number>;
  const Truth<Number> sharp(sharpness * t.d);
  const Number sharp_log_p = M::select(t.hopeless(), Number(0), sharp.p * t.log_p);
  return {-(sharp.n * t.log_p), -(sharp.n * (t.n - sharpness * sharp_log_p))};
}

template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> poly(const Truth<Number>& t, Number epsilon) {
  return {epsilon * t.n - t.log_p, -(t.n + epsilon * (t.p * t.n))};
}

template <class Number, class Exponent>
IMBALANCE_INLINE ValueAndSlope<Number> poly_focal(const Truth<Number>& t, Exponent gamma, Number epsilon) {
  const ValueAndSlope<Number> base = focal(t, gamma);
  const Number power = t.n_power(gamma) * t.n;
  return {base.value + epsilon * power, base.slope - epsilon * (number_of<Number>(gamma) + Number(1)) * (power * t.p)};
}

// inverse_q = 1 / q
template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> gce(const Truth<Number>& t, Number q, Number inverse_q) {
  const Pair<Number> power = Math<Number>::exp_and_expm1_nonpositive(q * t.log_p);  // p^q, p^q - 1
  return {-(power.second * inverse_q), -(power.first * t.n)};
}

template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> smooth_accuracy(const Truth<Number>& t) {
  return {t.n, -(t.p * t.n)};
}

template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> token_scaled(const Truth<Number>& t) {
  return {-t.p_log_p(), -(t.p * t.n)};
}

// The objective's value and slope; `first` may differ from row to row (per-class gamma), `second` does not.
template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> evaluate(ObjectiveKind kind, const Truth<Number>& truth, Number first,
                                                Number second) {
  switch (kind) {
    case ObjectiveKind::cross_entropy:
      return cross_entropy(truth);
    case ObjectiveKind::focal:
      return focal(truth, first);
    case ObjectiveKind::hard_truncation:
      return hard_truncation(truth, first);
    case ObjectiveKind::soft_truncation:
      return soft_truncation(truth, first);
    case ObjectiveKind::poly:
      return poly(truth, first);
    case ObjectiveKind::poly_focal:
      return poly_focal(truth, first, second);
    case ObjectiveKind::gce:
      return gce(truth, first, second);
    case ObjectiveKind::smooth_accuracy:
      return smooth_accuracy(truth);
    case ObjectiveKind::token_scaled:
      return token_scaled(truth);
  }
  return cross_entropy(truth);
}

}  // namespace imbalance
