// The target's side of the logit map: z_t = scale * factor_t * psi(cap(x_t)) + bias_t, with its slope dz_t/dx_t.
//
// Mirrors imbalance_kernels/logit_map.py. The other classes' map is a vector loop of the kernels.
#pragma once

#include "math.h"

namespace imbalance {

enum class MarginKind : int { additive, angular, circle };

// Where |x| reaches 1 an angular margin's slope is infinite: sin(theta) is kept above this.
inline constexpr double kSineFloor = 1e-3;

template <class T>
struct TargetLogit {
  T value;
  T slope;
};

template <class T>
struct TargetMap {
  using M = Math<T>;

  MarginKind kind;
  // additive: margin (where it is not per class); angular: m1, m2, m3, straight_through; circle: margin, detach
  T parameters[4];
  T softcap;  // 0: none

  // x is finite; margin is the target class's additive margin.
  IMBALANCE_INLINE TargetLogit<T> operator()(T x, T margin) const {
    T capped = x, cap_slope = 1;
    if (softcap > 0) {
      const T tanh = std::tanh(x / softcap);
      capped = softcap * tanh;
      cap_slope = (1 - tanh) * (1 + tanh);
    }
    TargetLogit<T> mapped{capped - margin, T(1)};
    if (kind == MarginKind::angular) mapped = angular(capped);
    if (kind == MarginKind::circle) mapped = circle(capped);
    return {mapped.value, mapped.slope * cap_slope};
  }

 private:
  IMBALANCE_INLINE TargetLogit<T> angular(T cosine) const {
    const T m1 = parameters[0], m2 = parameters[1], m3 = parameters[2];
    const bool straight_through = parameters[3] != 0;
    cosine = cosine < -1 ? T(-1) : cosine > 1 ? T(1) : cosine;
    const T sine = std::sqrt((1 - cosine) * (1 + cosine));
    const T sine_divisor = sine > T(kSineFloor) ? sine : T(kSineFloor);
    TargetLogit<T> mapped;
    if (m1 != 1) {
      const T angle = m1 * std::acos(cosine) + m2;
      const T turn = std::floor(angle / T(3.14159265358979323846));
      const T sign = 1 - 2 * (turn - 2 * std::floor(turn / 2));
      mapped = {sign * M::cos(angle) - 2 * turn, sign * m1 * M::sin(angle) / sine_divisor};
    } else if (cosine < -M::cos(m2)) {  // theta > pi - m2: the usual continuation
      mapped = {cosine - m2 * M::sin(m2), T(1)};
    } else {
      mapped = {cosine * M::cos(m2) - sine * M::sin(m2), M::cos(m2) + cosine * M::sin(m2) / sine_divisor};
    }
    return {mapped.value - m3, straight_through ? T(1) : mapped.slope};
  }

  IMBALANCE_INLINE TargetLogit<T> circle(T cosine) const {
    const T margin = parameters[0];
    const bool detach = parameters[1] != 0;
    const T pull = 1 + margin - cosine;
    const T distance = cosine - (1 - margin);
    if (!(pull > 0)) return {0 * distance, T(0)};
    return {pull * distance, detach ? pull : pull - distance};
  }
};

}  // namespace imbalance
