// The two sides of multilabel_softmax, negatives and positives, as packs of lanes, and their sums.
//
// The shift of a sum is 0 where no exponent is so large that it is needed: then 1 + the sum goes through log1p, and
// small sums keep their digits. Elsewhere it is the highest exponent, so that a sum with its 1 is never below 1 and
// nothing divides by 0. It is finite where that is not: an exponent of +inf (a negative's alone: a positive's logit of
// -inf is a mask) makes the sum +inf and nothing NaN but its own gradient.
#pragma once

#include "packs.h"

namespace imbalance::cpu {
namespace {

template <class T>
constexpr T kNoShift = 16;  // exponents up to here are summed as they are

template <class T>
IMBALANCE_INLINE T multilabel_shift(T highest) {
  constexpr T most = std::numeric_limits<T>::max();
  return highest > kNoShift<T> ? (highest > most ? most : highest) : T(0);
}

template <class T, int Bytes>
IMBALANCE_INLINE Lanes<T, Bytes> multilabel_shift(Lanes<T, Bytes> highest) {
  using L = Lanes<T, Bytes>;
  using M = Math<L>;
  const L most(std::numeric_limits<T>::max());
  return M::select(M::less(L(kNoShift<T>), highest), M::select(M::less(most, highest), most, highest), L(T(0)));
}

// exp of an exponent relative to its shift; it is +inf only where `infinite` says that some are.
template <bool infinite, class L>
IMBALANCE_INLINE L exponential(std::bool_constant<infinite>, L exponent) {
  using M = Math<L>;
  const L e = M::exp_nonpositive(exponent);
  if constexpr (infinite) return M::select(M::equal(exponent, M::infinity()), exponent, e);
  return e;
}

// A pack's part in both sums.
template <class L>
struct TwoSides {
  using T = typename L::Scalar;
  using M = Math<L>;
  using Mask = typename L::Mask;

  L negative, positive;

  // Exponents, of highest ones their shifts.
  IMBALANCE_INLINE TwoSides shifts() const { return {multilabel_shift(negative), multilabel_shift(positive)}; }
  IMBALANCE_INLINE bool has_infinite() const { return M::any(M::equal(negative, M::infinity())); }

  // Where labels are 0 or 1: the exponent of a logit z (-inf is a mask) on its side, and what it adds to the sums.
  static IMBALANCE_INLINE L hard_exponent(L z, Mask is_positive) {
    return M::select(is_positive & ~M::equal(z, -M::infinity()), -z, z);
  }
  static IMBALANCE_INLINE TwoSides of_side(L x, Mask is_positive, L otherwise) {
    return {M::select(is_positive, otherwise, x), M::select(is_positive, x, otherwise)};
  }
  template <bool infinite>
  static IMBALANCE_INLINE TwoSides hard(std::bool_constant<infinite> some, L exponent, Mask is_positive,
                                        const TwoSides& shift) {
    const L e = exponential(some, exponent - M::select(is_positive, shift.positive, shift.negative));
    return of_side(e, is_positive, L(T(0)));
  }

  // Where they are between, weights of both sides' exponentials.
  static IMBALANCE_INLINE TwoSides soft_exponents(L z, L y) {
    const Mask masked = M::equal(z, -M::infinity());
    return {M::select(M::equal(y, L(T(1))), -M::infinity(), z),
            M::select(M::equal(y, L(T(0))) | masked, -M::infinity(), -z)};
  }
  template <bool infinite>
  static IMBALANCE_INLINE TwoSides soft(std::bool_constant<infinite> some, L z, L y, const TwoSides& shift) {
    const TwoSides of = soft_exponents(z, y);
    return {(L(T(1)) - y) * exponential(some, of.negative - shift.negative),
            y * M::exp_nonpositive(of.positive - shift.positive)};
  }
};

// log(1 + sum) and 1 + sum relative to the shift, of a sum relative to it.
template <class L>
struct OnePlus {
  using T = typename L::Scalar;
  using M = Math<L>;

  L log, total;

  IMBALANCE_INLINE OnePlus(L sum, L shift) {
    total = M::exp_nonpositive(-shift) + sum;
    log = M::select(M::equal(shift, L(T(0))), M::log1p(sum, total), shift + M::log(total));
    log = M::select(M::equal(total, M::infinity()), total, log);  // of which M::log makes a number
  }
};

}  // namespace
}  // namespace imbalance::cpu
