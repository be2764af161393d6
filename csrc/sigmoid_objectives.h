// The objectives of sigmoid_loss as types, so that each gets a loop of its own: what a hard label costs, and a soft
// one.
//
// An objective is a small struct with
//     hard(t, positive, parameter): value and slope in the log-odds of the truth, of which t is
//     soft(t, y, parameter): both sides' value and slope in the logit, of which t is
// where `parameter`, its first, may differ from class to class. The formulas are in objectives.h and
// binary_objectives.h. Plain C++ on any number type (math.h).
#pragma once

#include <type_traits>

#include "arguments.h"
#include "binary_objectives.h"

namespace imbalance {

// What Math<Number>::less returns.
template <class Number>
using MaskOf = decltype(Math<Number>::less(Number(), Number()));

template <class Number>
IMBALANCE_INLINE Number number(double x) {
  return Number(static_cast<typename Math<Number>::Scalar>(x));
}

// An exponent of the objectives below is a double, a HalfExponent, or one that the compiler knows.
template <int halves>
struct FixedExponent {
  double value = halves / 2.0;
};

// The latter as the formulas take it: its power is known, and what it multiplies is one instruction of a register's
// number, where a constant 2 would become an addition.
template <class Number, int halves>
struct KnownExponent {
  Number value;

  IMBALANCE_INLINE operator HalfExponent() const { return {halves}; }
};
template <class Number, int halves>
IMBALANCE_INLINE Number number_of(KnownExponent<Number, halves> exponent) {
  return exponent.value;
}
template <class Number, int halves>
IMBALANCE_INLINE KnownExponent<Number, halves - 2> less_one(KnownExponent<Number, halves> exponent) {
  return {exponent.value - Number(1)};
}

template <class Number>
IMBALANCE_INLINE Number exponent(double gamma) {
  return number<Number>(gamma);
}
template <class Number>
IMBALANCE_INLINE HalfExponent exponent(HalfExponent gamma) {
  return gamma;
}
template <class Number, int halves>
IMBALANCE_INLINE KnownExponent<Number, halves> exponent(FixedExponent<halves> gamma) {
  return {number<Number>(gamma.value)};
}

// objective.hard as a function of the truth alone.
template <class Objective, class Number>
struct HardCost {
  const Objective& objective;
  Number parameter;

  IMBALANCE_INLINE ValueAndSlope<Number> operator()(const Truth<Number>& t) const {
    return objective.hard(t, MaskOf<Number>(), parameter);
  }
};

// One of the registry.
template <ObjectiveKind kind>
struct OfRegistry {
  double second;

  template <class Number>
  IMBALANCE_INLINE ValueAndSlope<Number> hard(const Truth<Number>& t, MaskOf<Number>, Number parameter) const {
    return evaluate(kind, t, parameter, number<Number>(second));
  }
  template <class Number>
  IMBALANCE_INLINE Sides<Number> soft(const Truth<Number>& t, Number y, Number parameter) const {
    if constexpr (kind == ObjectiveKind::focal) {
      return focal_sides(t, y, parameter);
    } else {
      return mixed_sides(t, HardCost<OfRegistry, Number>{*this, parameter});
    }
  }
};

// The same with a power that is made of products.
template <class Exponent>
struct FocalOfProducts {
  Exponent gamma;

  template <class Number>
  IMBALANCE_INLINE ValueAndSlope<Number> hard(const Truth<Number>& t, MaskOf<Number>, Number) const {
    return focal(t, exponent<Number>(gamma));
  }
  template <class Number>
  IMBALANCE_INLINE Sides<Number> soft(const Truth<Number>& t, Number y, Number) const {
    return focal_sides(t, y, exponent<Number>(gamma));
  }
};

// Soft truncation with K = 1 is focal loss with gamma = 1, of hard labels and of what soft ones mix.
struct SoftTruncationOfOne {
  template <class Number>
  IMBALANCE_INLINE ValueAndSlope<Number> hard(const Truth<Number>& t, MaskOf<Number>, Number) const {
    return focal(t, HalfExponent{2});
  }
  template <class Number>
  IMBALANCE_INLINE Sides<Number> soft(const Truth<Number>& t, Number, Number parameter) const {
    return mixed_sides(t, HardCost<SoftTruncationOfOne, Number>{*this, parameter});
  }
};

template <class Exponent>
struct PolyFocalOfProducts {
  Exponent gamma;
  double epsilon;

  template <class Number>
  IMBALANCE_INLINE ValueAndSlope<Number> hard(const Truth<Number>& t, MaskOf<Number>, Number) const {
    return poly_focal(t, exponent<Number>(gamma), number<Number>(epsilon));
  }
  template <class Number>
  IMBALANCE_INLINE Sides<Number> soft(const Truth<Number>& t, Number, Number parameter) const {
    return mixed_sides(t, HardCost<PolyFocalOfProducts, Number>{*this, parameter});
  }
};

template <class Exponent>
struct QualityFocal {
  Exponent beta;

  template <class Number>
  IMBALANCE_INLINE ValueAndSlope<Number> hard(const Truth<Number>& t, MaskOf<Number>, Number) const {
    return focal(t, exponent<Number>(beta));
  }
  template <class Number>
  IMBALANCE_INLINE Sides<Number> soft(const Truth<Number>& t, Number y, Number) const {
    return quality_focal_sides(t, y, exponent<Number>(beta));
  }
};

template <class Exponent>
struct Varifocal {
  Exponent gamma;
  double alpha;

  template <class Number>
  IMBALANCE_INLINE ValueAndSlope<Number> hard(const Truth<Number>& t, MaskOf<Number> positive, Number) const {
    using M = Math<Number>;
    const Number weight = number<Number>(alpha);
    ValueAndSlope<Number> of_negative = focal(t, exponent<Number>(gamma));
    of_negative = {weight * of_negative.value, weight * of_negative.slope};
    if (!M::any(positive)) return of_negative;  // as in most packs
    const ValueAndSlope<Number> of_positive = cross_entropy(t);
    return {M::select(positive, of_positive.value, of_negative.value),
            M::select(positive, of_positive.slope, of_negative.slope)};
  }
  template <class Number>
  IMBALANCE_INLINE Sides<Number> soft(const Truth<Number>& t, Number y, Number) const {
    return varifocal_sides(t, y, exponent<Number>(gamma), number<Number>(alpha));
  }
};

// Whether negatives are clipped. Without a clip both sides are focal; with one, most packs, which hold no positive,
// need one logarithm, if the compiler knows of it.
enum class Clipping { none, some, asked };

template <Clipping clipping, class NegativeExponent, class PositiveExponent>
struct Asymmetric {
  NegativeExponent gamma_neg;
  PositiveExponent gamma_pos;
  double clip;

  template <class Number>
  IMBALANCE_INLINE ValueAndSlope<Number> of_negative(const Truth<Number>& t) const {
    if constexpr (clipping != Clipping::some) {
      if (clipping == Clipping::none || clip == 0) return focal(t, exponent<Number>(gamma_neg));
    }
    return clipped_focal(t, exponent<Number>(gamma_neg), number<Number>(clip));
  }
  template <class Number>
  IMBALANCE_INLINE ValueAndSlope<Number> hard(const Truth<Number>& t, MaskOf<Number> positive, Number) const {
    using M = Math<Number>;
    const ValueAndSlope<Number> negative = of_negative(t);
    if (!M::any(positive)) return negative;  // as in most packs
    const ValueAndSlope<Number> of_positive = focal(t, exponent<Number>(gamma_pos));
    return {M::select(positive, of_positive.value, negative.value),
            M::select(positive, of_positive.slope, negative.slope)};
  }
  template <class Number>
  IMBALANCE_INLINE Sides<Number> soft(const Truth<Number>& t, Number, Number) const {
    const ValueAndSlope<Number> negative = of_negative(t.flipped());
    return {focal(t, exponent<Number>(gamma_pos)), {negative.value, -negative.slope}};
  }
};

// run(objective) with the type that stands for the call's objective. Exponents::choose(gamma, body) and
// Exponents::choose(first, second, body) say which exponents have a type of their own: they call body with it, or with
// doubles.
template <class Exponents, class Run>
auto with_objective(const SigmoidArguments& call, const Run& run) {
  const double first = call.objective_parameters[0], second = call.objective_parameters[1];
  const bool of_classes = call.class_parameter != nullptr;
  switch (call.objective) {
    case BinaryObjectiveKind::cross_entropy:
      break;
    case BinaryObjectiveKind::focal:
      if (of_classes) return run(OfRegistry<ObjectiveKind::focal>{0});
      return Exponents::choose(first, [&](auto gamma) {
        if constexpr (std::is_same_v<decltype(gamma), double>) {
          return run(OfRegistry<ObjectiveKind::focal>{0});
        } else {
          return run(FocalOfProducts<decltype(gamma)>{gamma});
        }
      });
    case BinaryObjectiveKind::hard_truncation:
      return run(OfRegistry<ObjectiveKind::hard_truncation>{0});
    case BinaryObjectiveKind::soft_truncation:
      if (first == 1) return run(SoftTruncationOfOne{});
      return run(OfRegistry<ObjectiveKind::soft_truncation>{0});
    case BinaryObjectiveKind::poly:
      return run(OfRegistry<ObjectiveKind::poly>{0});
    case BinaryObjectiveKind::poly_focal:
      if (of_classes) return run(OfRegistry<ObjectiveKind::poly_focal>{second});
      return Exponents::choose(first, [&](auto gamma) {
        if constexpr (std::is_same_v<decltype(gamma), double>) {
          return run(OfRegistry<ObjectiveKind::poly_focal>{second});
        } else {
          return run(PolyFocalOfProducts<decltype(gamma)>{gamma, second});
        }
      });
    case BinaryObjectiveKind::gce:
      return run(OfRegistry<ObjectiveKind::gce>{second});
    case BinaryObjectiveKind::smooth_accuracy:
      return run(OfRegistry<ObjectiveKind::smooth_accuracy>{0});
    case BinaryObjectiveKind::token_scaled:
      return run(OfRegistry<ObjectiveKind::token_scaled>{0});
    case BinaryObjectiveKind::quality_focal:
      return Exponents::choose(first, [&](auto beta) { return run(QualityFocal<decltype(beta)>{beta}); });
    case BinaryObjectiveKind::varifocal:
      return Exponents::choose(first, [&](auto gamma) { return run(Varifocal<decltype(gamma)>{gamma, second}); });
    case BinaryObjectiveKind::asymmetric:
      return Exponents::choose(first, second, [&](auto negative, auto positive) {
        const double clip = call.objective_parameters[2];
        if (clip == 0) {
          return run(Asymmetric<Clipping::none, decltype(negative), decltype(positive)>{negative, positive, clip});
        }
        return run(Asymmetric<Clipping::some, decltype(negative), decltype(positive)>{negative, positive, clip});
      });
  }
  return run(OfRegistry<ObjectiveKind::cross_entropy>{0});
}

}  // namespace imbalance
