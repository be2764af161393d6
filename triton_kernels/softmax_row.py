"""The row program: from a row's split into target and rest to its loss and the coefficients of its gradient.

Mirrors csrc/softmax_row.h and imbalance_kernels/softmax_row.py. With q the softmax over the rest and u the class
weights of smoothing (or the weighted class probabilities), the gradient of the row in its effective logits z is

    dz_t = target - weights * u_t            dz_j = rest * q_j - weights * u_j        (j != t)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from imbalance_kernels.triton_kernels.objectives import truth_of

__all__ = ["RowGradient", "RowOptions", "RowSplit", "log_probability", "log_rest", "row_program"]


class RowSplit(NamedTuple):
    """A row as its sweep leaves it; target and the weighted sum are relative to the shift."""

    target: Any  # z_t - shift
    total: Any  # sum_{j != t} exp(z_j - shift)
    shift: Any  # max_{j != t} z_j, 0 where there is none
    weighted_logits: Any  # sum_j u_j (z_j - shift)
    weight_sum: Any  # sum_j u_j


class RowOptions(NamedTuple):
    """What the row program needs beside the row; what is None takes no part."""

    first_parameter: Any  # of the objective
    second_parameter: Any
    class_parameter: Any  # (C,) first parameters
    kept: Any  # 1 - label smoothing
    smoothing_per_class: Any  # label smoothing / C
    z_loss: Any


class RowGradient(NamedTuple):
    """The coefficients of a row's gradient in its effective logits; rest multiplies exponentials."""

    target: Any
    rest: Any
    weights: Any


@triton.jit
def log_rest(total):
    """Return log of the rest's sum; -inf where there is no rest."""
    return tl.where(total == 0, -float("inf"), tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit
def log_probability(row):
    """Return log p_t of rows."""
    return truth_of(row.target - log_rest(row.total)).log_p


@triton.jit
def row_program(row, has_target: tl.constexpr, class_weight, class_parameter, row_options, objective: tl.constexpr):
    """Return the loss of rows and their RowGradient, both without sample weight and divisor."""
    rest = log_rest(row.total)
    zero = tl.zeros_like(rest)
    if has_target:
        truth = truth_of(row.target - rest)
        # A number is never assigned to a name: that would make a float32 of a constant meant for float64.
        if row_options.class_parameter is None:
            loss, slope = objective(truth, row_options.first_parameter, row_options.second_parameter)
        else:
            loss, slope = objective(truth, class_parameter, row_options.second_parameter)
        loss = class_weight * loss
        slope = class_weight * slope
        if row_options.kept is not None:
            loss = row_options.kept * loss
            slope = row_options.kept * slope
        p = truth.p
        n = truth.n
        logsumexp = tl.where(row.target < rest, rest, row.target) + truth.log_sum
        spread = zero
        weights = zero
        if row_options.smoothing_per_class is not None:
            weights = zero + row_options.smoothing_per_class
            spread = weights * row.weight_sum
            loss = loss + weights * (row.weight_sum * logsumexp - row.weighted_logits)
    else:
        slope = zero
        p = zero
        n = zero + 1.0
        logsumexp = rest
        weights = zero + 1.0
        spread = row.weight_sum
        loss = row.weight_sum * logsumexp - row.weighted_logits
    if row_options.z_loss is not None:
        full = row.shift + logsumexp
        loss = loss + row_options.z_loss * (full * full)
        spread = spread + 2.0 * row_options.z_loss * full
    of_rest = tl.where(row.total == 0, 0.0, (spread * n - slope) / row.total)
    return loss, RowGradient(slope + spread * p, of_rest, weights)
