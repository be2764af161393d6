// The row program: from a row's split into target and rest to its loss and the coefficients of its gradient.
//
// Mirrors imbalance_kernels/softmax_row.py. With q the softmax over the rest and u the class weights of smoothing (or
// the weighted class probabilities), the gradient of the row in its effective logits z is
//     dz_t = target - weights * u_t            dz_j = rest * q_j - weights * u_j        (j != t)
#pragma once

#include "objectives.h"

namespace imbalance {

template <class Number>
struct RowSplit {
  Number target;           // z_t - shift
  Number rest;             // log sum_{j != t} exp(z_j - shift)
  Number shift;            // max_{j != t} z_j
  Number weighted_logits;  // sum_j u_j (z_j - shift)
  Number weight_sum;       // sum_j u_j
  Number class_weight;     // w_t
  Number sample_weight;
  Number parameter;  // the objective's first parameter for this row
};

template <class Scalar>
struct RowOptions {
  bool has_target;  // false: class probabilities
  ObjectiveKind objective;
  Scalar second_parameter;
  Scalar label_smoothing;
  Scalar smoothing_per_class;  // label_smoothing / C
  Scalar z_loss;
  Scalar inverse_divisor;  // of the gradient; losses are not divided
};

template <class Number>
struct RowResult {
  Number loss;
  Number target;  // coefficients of the gradient, see above
  Number rest;
  Number weights;
};

// log p_t of a row, by its split: beside the row program, whose callers seldom ask for it.
template <class Number>
IMBALANCE_INLINE Number log_probability(Number target, Number rest) {
  return Truth<Number>(target - rest).log_p;
}

template <class Number, class Scalar>
IMBALANCE_INLINE RowResult<Number> row_program(const RowSplit<Number>& row, const RowOptions<Scalar>& options) {
  using M = Math<Number>;
  Number loss, slope(0), spread(0), weights(0), p(0), n(1), logsumexp;
  if (options.has_target) {
    const Truth<Number> truth(row.target - row.rest);
    const ValueAndSlope<Number> objective =
        evaluate(options.objective, truth, row.parameter, Number(options.second_parameter));
    const Number coefficient = row.class_weight * Number(1 - options.label_smoothing);
    loss = coefficient * objective.value;
    slope = coefficient * objective.slope;
    p = truth.p;
    n = truth.n;
    logsumexp = M::select(M::less(row.target, row.rest), row.rest, row.target) + truth.log_sum;
    if (options.label_smoothing > 0) {
      weights = Number(options.smoothing_per_class);
      spread = weights * row.weight_sum;
      loss = loss + weights * (row.weight_sum * logsumexp - row.weighted_logits);
    }
  } else {
    logsumexp = row.rest;
    weights = Number(1);
    spread = row.weight_sum;
    loss = row.weight_sum * logsumexp - row.weighted_logits;
  }
  if (options.z_loss > 0) {
    const Number full = row.shift + logsumexp;
    loss = loss + Number(options.z_loss) * (full * full);
    spread = spread + Number(2 * options.z_loss) * full;
  }
  const Number scale = row.sample_weight * Number(options.inverse_divisor);
  return {loss * row.sample_weight, scale * (slope + spread * p), scale * (spread * n - slope), scale * weights};
}

}  // namespace imbalance
