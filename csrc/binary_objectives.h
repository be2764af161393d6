// Losses of one logit x with a label y in [0, 1]: what it costs as a positive, V+, and as a negative, V-, with slopes
// in x.
//
//     loss = positive_weight y V+(x, y) + negative_weight (1 - y) V-(x, y)
//
// Mirrors imbalance_kernels/binary_objectives.py, the specification, by name; the objectives of the registry come from
// objectives.h. A hard label, 0 or 1, needs one side only, and its value and slope in the log-odds of the truth:
// d = (2 y - 1) x. Plain C++ on any number type (math.h).
#pragma once

#include "objectives.h"

namespace imbalance {

// The first are those of ObjectiveKind.
enum class BinaryObjectiveKind : int {
  cross_entropy,
  focal,
  hard_truncation,
  soft_truncation,
  poly,
  poly_focal,
  gce,
  smooth_accuracy,
  token_scaled,
  quality_focal,
  varifocal,
  asymmetric,
};

// BINARY_REGISTRY's names, in the order of BinaryObjectiveKind.
inline constexpr const char* kBinaryObjectiveNames[] = {
    "cross_entropy", "focal",           "hard_truncation", "soft_truncation", "poly",      "poly_focal",
    "gce",           "smooth_accuracy", "token_scaled",    "quality_focal",   "varifocal", "asymmetric",
};

template <class Number>
struct Sides {
  ValueAndSlope<Number> positive;
  ValueAndSlope<Number> negative;
};

// y * x, which is 0 where y is, whatever x is.
template <class Number>
IMBALANCE_INLINE Number share_of(Number y, Number x) {
  using M = Math<Number>;
  return M::select(M::equal(y, Number(0)), Number(0), y * x);
}

// BCE(x, y) and its slope p - y, without the cancellation of a confident positive.
template <class Number>
IMBALANCE_INLINE ValueAndSlope<Number> soft_cross_entropy(const Truth<Number>& t, Number y) {
  const Number rest = Number(1) - y;
  return {-(share_of(y, t.log_p) + share_of(rest, t.log_n)), rest * t.p - y * t.n};
}

// ---------------------------------------------------------------- soft labels; t is of the log-odds x

// Any objective of the registry: objective(t) is its value and slope.
template <class Number, class Objective>
IMBALANCE_INLINE Sides<Number> mixed_sides(const Truth<Number>& t, const Objective& objective) {
  const ValueAndSlope<Number> negative = objective(t.flipped());
  return {objective(t), {negative.value, -negative.slope}};
}

// (y n + (1 - y) p)^gamma BCE(x, y): the factor of the mixed probability, as torchvision has it.
template <class Number, class Exponent>
IMBALANCE_INLINE Sides<Number> focal_sides(const Truth<Number>& t, Number y, Exponent gamma) {
  using M = Math<Number>;
  const Number one(1), rest = one - y;
  const auto positive = M::equal(y, one), negative = M::equal(y, Number(0));
  Truth<Number> mixed = t;  // whose n is the mixed probability's
  mixed.n = y * t.n + rest * t.p;
  mixed.log_n = M::log(mixed.n);
  mixed.log_n = M::select(positive, t.log_n, M::select(negative, t.log_p, mixed.log_n));
  // (d mixed.n / dx) / mixed.n, where a hard label needs no division by what may be 0
  const Number soft_growth = (rest - y) * (t.p * t.n) / mixed.n;
  const Number growth = M::select(positive, -t.p, M::select(negative, t.n, soft_growth));
  const ValueAndSlope<Number> base = soft_cross_entropy(t, y);
  const Number power = mixed.n_power(gamma);
  const Number pull = M::select(M::equal(growth, Number(0)), Number(0), growth * base.value);
  const ValueAndSlope<Number> both{power * base.value, power * (base.slope + number_of<Number>(gamma) * pull)};
  return {both, both};
}

template <class Number>
IMBALANCE_INLINE Number less_one(Number exponent) {
  return exponent - Number(1);
}
IMBALANCE_INLINE HalfExponent less_one(HalfExponent exponent) { return {exponent.halves - 2}; }

// |y - p|^beta BCE(x, y), beta at least 1
template <class Number, class Exponent>
IMBALANCE_INLINE Sides<Number> quality_focal_sides(const Truth<Number>& t, Number y, Exponent beta) {
  using M = Math<Number>;
  const ValueAndSlope<Number> base = soft_cross_entropy(t, y);
  const Number miss = base.slope;
  const auto below = M::less(miss, Number(0));
  const Number size = M::select(below, -miss, miss);
  Truth<Number> missed = t;
  missed.n = size;
  missed.log_n = M::log(size);
  const Number power = missed.n_power(less_one(beta));  // |y - p|^(beta - 1)
  const Number variance = t.p * t.n;
  const Number pull =
      M::select(M::equal(variance, Number(0)), Number(0), number_of<Number>(beta) * (variance * base.value));
  const Number signed_pull = M::select(below, -pull, M::select(M::equal(miss, Number(0)), Number(0), pull));
  const ValueAndSlope<Number> both{power * size * base.value, power * (size * miss + signed_pull)};
  return {both, both};
}

// BCE(x, y); -alpha p^gamma log n where y is 0
template <class Number, class Exponent>
IMBALANCE_INLINE Sides<Number> varifocal_sides(const Truth<Number>& t, Number y, Exponent gamma, Number alpha) {
  using M = Math<Number>;
  const ValueAndSlope<Number> negative = focal(t.flipped(), gamma);
  const Number weight = M::select(M::less(Number(0), y), Number(0), alpha);
  return {soft_cross_entropy(t, y), {share_of(weight, negative.value), -share_of(weight, negative.slope)}};
}

// ---------------------------------------------------------------- hard labels; t is of the truth

// -m^gamma log(1 - m) with m = max(n - clip, 0) of a negative, whose p is 1 - n. With a clip of 0 it is focal.
template <class Number, class Exponent>
IMBALANCE_INLINE ValueAndSlope<Number> clipped_focal(const Truth<Number>& t, Exponent gamma, Number clip) {
  using M = Math<Number>;
  const Number one(1);
  const auto counts = M::less(clip, t.n);
  const Number limit = M::select(counts, clip, t.n);  // so that m is 0 below the clip, and a NaN stays one
  const Number m = t.n - limit;
  const Number rest = t.p + limit;  // 1 - m
  const Number cost = -M::log1p(-m, rest);
  Truth<Number> clipped = t;
  clipped.n = m;
  clipped.log_n = M::log(m);  // of a general power alone
  const Number power = clipped.n_power(gamma);
  // 1 / (1 - m) + gamma cost / m, by one division
  const Number pull = (m + number_of<Number>(gamma) * (cost * rest)) / (rest * M::select(counts, m, one));
  return {power * cost, -M::select(counts, (t.p * t.n) * power * pull, m)};
}

}  // namespace imbalance
