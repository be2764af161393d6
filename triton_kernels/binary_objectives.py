"""Losses of one logit x with a label y in [0, 1]: what it costs as a positive, V+, and as a negative, V-, with slopes.

    loss = positive_weight y V+(x, y) + negative_weight (1 - y) V-(x, y)

Mirrors imbalance_kernels/binary_objectives.py, the specification, by name; the objectives of the registry come from
objectives.py. A hard label, 0 or 1, needs one side only, and its value and slope in the log-odds of the truth:
d = (2 y - 1) x. `BINARY_OBJECTIVES` has both forms of each objective. What they share is how they are called:

    hard(t, positive, first, numbers, objective)    value, slope in d; t is of the truth, `positive` where y is 1
    soft(t, y, first, numbers, objective)           V+, its slope in x, V-, its slope in x; t is of the log-odds x

`first` may differ from class to class; `objective` is the function of objectives.py, where there is one.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from imbalance_kernels.triton_kernels.math import log1p_unit
from imbalance_kernels.triton_kernels.objectives import OBJECTIVES, cross_entropy, flipped, focal, power_of

__all__ = ["BINARY_OBJECTIVES", "EXPONENTS", "BinaryObjective", "Numbers", "share_of"]


class Numbers(NamedTuple):
    """The parameters of an objective, and of the exponents among them the halves, where their powers are products."""

    first: Any
    second: Any
    third: Any
    first_halves: Any  # compile-time, or None
    second_halves: Any


class BinaryObjective(NamedTuple):
    """Functions, compile-time constants of a kernel."""

    objective: Any  # of objectives.py, or None
    hard: Any
    soft: Any


@triton.jit
def share_of(y, x):
    """y * x, which is 0 where y is, whatever x is."""
    return tl.where(y == 0, 0.0, y * x)


@triton.jit
def _soft_cross_entropy(t, y):
    """BCE(x, y) and its slope p - y, without the cancellation of a confident positive."""
    rest = 1.0 - y
    return -(share_of(y, t.log_p) + share_of(rest, t.log_n)), rest * t.p - y * t.n


# ---------------------------------------------------------------- the registry's


@triton.jit
def _hard(t, positive, first, numbers, objective: tl.constexpr):
    if numbers.first_halves is None:
        value, slope = objective(t, first, numbers.second)
    else:
        value, slope = objective(t, first, numbers.second, numbers.first_halves)
    return value, slope


@triton.jit
def _mixed_sides(t, y, first, numbers, objective: tl.constexpr):
    value, slope = _hard(t, y, first, numbers, objective)
    other_value, other_slope = _hard(flipped(t), y, first, numbers, objective)
    return value, slope, other_value, -other_slope


@triton.jit
def _focal_sides(t, y, gamma, numbers, objective: tl.constexpr):
    """(y n + (1 - y) p)^gamma BCE(x, y): the factor of the mixed probability, as torchvision has it."""
    rest = 1.0 - y
    mixed = y * t.n + rest * t.p
    log_mixed = tl.where(y == 1, t.log_n, tl.where(y == 0, t.log_p, tl.log(mixed)))
    # (d mixed / dx) / mixed, where a hard label needs no division by what may be 0
    growth = tl.where(y == 1, -t.p, tl.where(y == 0, t.n, (rest - y) * (t.p * t.n) / mixed))
    cost, cost_slope = _soft_cross_entropy(t, y)
    power = power_of(mixed, log_mixed, gamma, numbers.first_halves)
    pull = share_of(growth, cost)
    value = power * cost
    slope = power * (cost_slope + gamma * pull)
    return value, slope, value, slope


# ---------------------------------------------------------------- those that need the label itself


@triton.jit
def _quality_focal(t, positive, beta, numbers, objective: tl.constexpr):
    """(1 - p_t)^beta BCE: focal loss."""
    return focal(t, beta, numbers.second, numbers.first_halves)


@triton.jit
def _quality_focal_sides(t, y, beta, numbers, objective: tl.constexpr):
    """|y - p|^beta BCE(x, y), beta at least 1."""
    cost, miss = _soft_cross_entropy(t, y)
    size = tl.abs(miss)
    if numbers.first_halves is None:  # |y - p|^(beta - 1)
        power = power_of(size, tl.log(size), beta - 1.0, None)
    else:
        power = power_of(size, size, beta, numbers.first_halves - 2)
    pull = beta * share_of(t.p * t.n, cost)
    pull = tl.where(miss < 0, -pull, tl.where(miss == 0, 0.0, pull))
    value = power * size * cost
    slope = power * (size * miss + pull)
    return value, slope, value, slope


@triton.jit
def _varifocal(t, positive, gamma, numbers, objective: tl.constexpr):
    """BCE of a positive, alpha (1 - p_t)^gamma BCE of a negative."""
    value, slope = cross_entropy(t, gamma, numbers.second)
    negative_value, negative_slope = focal(t, gamma, numbers.second, numbers.first_halves)
    return (
        tl.where(positive, value, numbers.second * negative_value),
        tl.where(positive, slope, numbers.second * negative_slope),
    )


@triton.jit
def _varifocal_sides(t, y, gamma, numbers, objective: tl.constexpr):
    """BCE(x, y); -alpha p^gamma log n where y is 0."""
    cost, cost_slope = _soft_cross_entropy(t, y)
    value, slope = focal(flipped(t), gamma, numbers.second, numbers.first_halves)
    weight = tl.where(y > 0, 0.0, tl.zeros_like(y) + numbers.second)
    return cost, cost_slope, share_of(weight, value), -share_of(weight, slope)


@triton.jit
def _clipped_focal(t, gamma, clip, halves: tl.constexpr):
    """-m^gamma log(1 - m) with m = max(n - clip, 0) of a negative, whose p is 1 - n. With a clip of 0 it is focal."""
    counts = t.n > clip
    limit = tl.where(counts, clip, t.n)  # so that m is 0 below the clip, and a NaN stays one
    m = t.n - limit
    rest = t.p + limit  # 1 - m
    # log(1 - m): of a small m by log1p, whose argument is at most 1; of a large one by the logarithm
    small = m < 0.5
    cost = tl.where(small, log1p_unit(tl.where(small, m / rest, 0.0)), -tl.log(rest))
    power = power_of(m, tl.log(m), gamma, halves)
    slope = (t.p * t.n) * power * (1.0 / rest + gamma * (cost / m))  # 0 / 0 below the clip
    return power * cost, -tl.where(counts, slope, m)


@triton.jit
def _asymmetric_negative(t, gamma_neg, numbers):
    if numbers.third is None:
        value, slope = focal(t, gamma_neg, numbers.second, numbers.first_halves)
    else:
        value, slope = _clipped_focal(t, gamma_neg, numbers.third, numbers.first_halves)
    return value, slope


@triton.jit
def _asymmetric(t, positive, gamma_neg, numbers, objective: tl.constexpr):
    value, slope = focal(t, numbers.second, numbers.third, numbers.second_halves)
    negative_value, negative_slope = _asymmetric_negative(t, gamma_neg, numbers)
    return tl.where(positive, value, negative_value), tl.where(positive, slope, negative_slope)


@triton.jit
def _asymmetric_sides(t, y, gamma_neg, numbers, objective: tl.constexpr):
    value, slope = focal(t, numbers.second, numbers.third, numbers.second_halves)
    negative_value, negative_slope = _asymmetric_negative(flipped(t), gamma_neg, numbers)
    return value, slope, negative_value, -negative_slope


BINARY_OBJECTIVES = {
    **{name: BinaryObjective(objective, _hard, _mixed_sides) for name, objective in OBJECTIVES.items()},
    "focal": BinaryObjective(OBJECTIVES["focal"], _hard, _focal_sides),
    "quality_focal": BinaryObjective(None, _quality_focal, _quality_focal_sides),
    "varifocal": BinaryObjective(None, _varifocal, _varifocal_sides),
    "asymmetric": BinaryObjective(None, _asymmetric, _asymmetric_sides),
}

# How many of an objective's first parameters are exponents.
EXPONENTS = {"focal": 1, "poly_focal": 1, "quality_focal": 1, "varifocal": 1, "asymmetric": 2}
