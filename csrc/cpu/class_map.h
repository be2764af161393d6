// What a class does to its logit and weighs, whichever way lanes run: over the classes of a row, or over rows.
#pragma once

#include "../arguments.h"
#include "packs.h"

namespace imbalance::cpu {
namespace {

// Typed views of the arguments that split rows, with what every layout computes from them.
template <class S, int Bytes>
class ClassMap {
 public:
  using T = typename AccumulateOf<S>::type;
  using L = Lanes<T, Bytes>;
  using M = Math<L>;

  const SplitArguments& arguments;
  const int64_t classes;

  explicit IMBALANCE_INLINE ClassMap(const SplitArguments& a)
      : arguments(a),
        classes(a.classes),
        factor_(static_cast<const T*>(a.factor)),
        bias_(static_cast<const T*>(a.bias)),
        class_margin_(static_cast<const T*>(a.class_margin)),
        class_weight_(static_cast<const T*>(a.class_weight)),
        scale_(static_cast<T>(a.scale)),
        smoothing_(static_cast<T>(a.label_smoothing)),
        uniform_(smoothing_ / static_cast<T>(a.classes)),
        target_map_{a.margin_kind,
                    {static_cast<T>(a.margin_parameters[0]), static_cast<T>(a.margin_parameters[1]),
                     static_cast<T>(a.margin_parameters[2]), static_cast<T>(a.margin_parameters[3])},
                    static_cast<T>(a.softcap)} {}

  IMBALANCE_INLINE bool has_target() const { return arguments.target != nullptr; }
  IMBALANCE_INLINE bool has_weights() const { return !has_target() || arguments.label_smoothing > 0; }
  IMBALANCE_INLINE bool bends() const { return target_map_.softcap > 0 || target_map_.kind == MarginKind::circle; }
  // Whether effective logits of the rest are the raw ones.
  IMBALANCE_INLINE bool maps_nothing() const { return !bends() && !factor_ && !bias_ && scale_ == 1; }
  IMBALANCE_INLINE T class_weight(int64_t row) const {
    return has_target() && class_weight_ ? class_weight_[arguments.target[row]] : T(1);
  }

 protected:
  const T* factor_;
  const T* bias_;
  const T* class_margin_;
  const T* class_weight_;
  const T scale_;
  const T smoothing_;
  const T uniform_;  // smoothing / C
  const TargetMap<T> target_map_;

  // z_t of a raw logit and its slope dz_t/dx_t. A masked target is -inf with the slope of a logit of 0.
  IMBALANCE_INLINE TargetLogit<T> target_logit(T x, int64_t target) const {
    const T infinity = std::numeric_limits<T>::infinity();
    const T additive = class_margin_ ? class_margin_[target] : target_map_.parameters[0];
    const TargetLogit<T> mapped = target_map_(x == -infinity ? T(0) : x, additive);
    const T multiplier = factor_ ? scale_ * factor_[target] : scale_;
    const T bias = bias_ ? bias_[target] : T(0);
    return {x == -infinity ? -infinity : multiplier * mapped.value + bias, multiplier * mapped.slope};
  }

  // The bend of raw logits before scale: the soft cap, or Circle loss's map of the rest; -inf where x is.
  template <bool circle>
  IMBALANCE_INLINE L bend(std::bool_constant<circle>, L raw) const {
    const L margin(target_map_.parameters[0]), softcap(target_map_.softcap);
    L y;
    if constexpr (circle) {
      y = positive_part(raw + margin) * (raw - margin);
    } else {
      y = softcap * tanh_of(raw / softcap);
    }
    return M::select(M::equal(raw, -M::infinity()), raw, y);
  }

  template <bool circle>
  IMBALANCE_INLINE L slope_of_bend(std::bool_constant<circle>, L raw) const {
    const L margin(target_map_.parameters[0]), softcap(target_map_.softcap);
    const T moving = target_map_.parameters[1] != 0 ? T(0) : T(1);  // Circle loss's factor is differentiated too
    if constexpr (circle) {
      const L push = raw + margin;
      return M::select(M::less(L(T(0)), push), push + L(moving) * (raw - margin), L(T(0)));
    } else {
      const L tanh = tanh_of(raw / softcap);
      return (L(T(1)) - tanh) * (L(T(1)) + tanh);
    }
  }

  // u of a class probability: smoothed over unmasked classes, and weighted.
  IMBALANCE_INLINE L weight_of(L probability, typename L::Mask masked, L class_weight) const {
    return class_weight * (L(1 - smoothing_) * probability + M::select(masked, L(T(0)), L(uniform_)));
  }

  template <class Whole>
  IMBALANCE_INLINE L load_probabilities(Whole whole, int64_t at, int64_t m) const {
    if (arguments.probabilities_are_logits_dtype) {
      return load_pack<L>(whole, static_cast<const S*>(arguments.probabilities) + at, m, T(0));
    }
    return load_pack<L>(whole, static_cast<const T*>(arguments.probabilities) + at, m, T(0));
  }

 private:
  static IMBALANCE_INLINE L positive_part(L x) { return M::select(M::less(L(T(0)), x), x, L(T(0))); }

  static IMBALANCE_INLINE L tanh_of(L x) {
    const auto negative = M::less(x, L(T(0)));
    const L magnitude = M::select(negative, -x, x);
    const L minus = M::exp_and_expm1_nonpositive(L(T(-2)) * magnitude).second;
    const L tanh = -minus / (L(T(2)) + minus);
    return M::select(negative, -tanh, tanh);
  }
};

}  // namespace
}  // namespace imbalance::cpu
