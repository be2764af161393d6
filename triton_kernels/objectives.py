"""Every objective once: its value G and slope A = dG/dd in the log-odds d of the truth.

Mirrors imbalance_kernels/objectives.py, the specification, by name. Notation: p = sigmoid(d), n = 1 - p = sigmoid(-d),
l = log p. No objective divides by n, so confident rows give no NaN. A kernel gets one function of `OBJECTIVES` as a
compile-time constant; `first` may differ from row to row (per-class gamma), `second` does not. Where an exponent is
known at compile time to be a multiple of one half, `halves` of it, its powers are products and a root.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from imbalance_kernels.triton_kernels.math import exp_nonpositive, expm1_nonpositive, log1p_unit

__all__ = ["OBJECTIVES", "Truth", "flipped", "power_of", "truth_of"]


class Truth(NamedTuple):
    """What all objectives are made of, from one exponential and one logarithm of the log-odds."""

    d: Any  # log-odds
    p: Any  # sigmoid(d)
    n: Any  # sigmoid(-d)
    log_p: Any
    log_n: Any
    log_sum: Any  # log(1 + exp(-|d|))


@triton.jit
def truth_of(d):
    """Return the Truth of log-odds d."""
    positive = d > 0
    small = exp_nonpositive(-tl.abs(d))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    log_sum = log1p_unit(small)
    return Truth(
        d,
        tl.where(positive, larger, smaller),
        tl.where(positive, smaller, larger),
        tl.where(positive, 0.0, d) - log_sum,
        tl.where(positive, -d, 0.0) - log_sum,
        log_sum,
    )


@triton.jit
def flipped(t):
    """Return the Truth of the log-odds -d, the other label's."""
    return Truth(-t.d, t.n, t.p, t.log_n, t.log_p, t.log_sum)


@triton.jit
def _p_log_p(t):
    """p * log p, which is 0 at d = -inf, where the product would be 0 * inf."""
    return tl.where(t.d == -float("inf"), 0.0, t.p * t.log_p)


@triton.jit
def power_of(n, log_n, gamma, halves: tl.constexpr):
    """n ^ gamma; products where gamma is 0, 1 or 2 are exact to the last bits, and 0 ^ 0 is 1."""
    if halves is None:
        power = exp_nonpositive(gamma * log_n)
        power = tl.where(gamma == 2, n * n, power)
        power = tl.where(gamma == 1, n, power)
        power = tl.where(gamma == 0, 1.0, power)
    else:
        power = tl.zeros_like(n) + 1.0
        if halves % 2 == 1:
            power = tl.sqrt(n)
        for _ in tl.static_range(halves // 2):
            power = power * n
    return power


@triton.jit
def cross_entropy(t, first, second):
    return -t.log_p, -t.n


@triton.jit
def focal(t, gamma, second, halves: tl.constexpr = None):
    power = power_of(t.n, t.log_n, gamma, halves)
    return -(power * t.log_p), -(power * (t.n - gamma * _p_log_p(t)))


@triton.jit
def hard_truncation(t, limit, second):
    """limit = logit(threshold): p < threshold without an exponential."""
    weight = tl.where(t.d > limit, 0.0, tl.where(t.d == limit, 0.5, 1.0))
    return -(weight * t.log_p), -(weight * t.n)


@triton.jit
def soft_truncation(t, sharpness, second):
    sharp = truth_of(sharpness * t.d)
    sharp_log_p = tl.where(t.d == -float("inf"), 0.0, sharp.p * t.log_p)
    return -(sharp.n * t.log_p), -(sharp.n * (t.n - sharpness * sharp_log_p))


@triton.jit
def poly(t, epsilon, second):
    return epsilon * t.n - t.log_p, -(t.n + epsilon * (t.p * t.n))


@triton.jit
def poly_focal(t, gamma, epsilon, halves: tl.constexpr = None):
    value, slope = focal(t, gamma, epsilon, halves)
    power = power_of(t.n, t.log_n, gamma, halves) * t.n
    return value + epsilon * power, slope - epsilon * (gamma + 1.0) * (power * t.p)


@triton.jit
def gce(t, q, second):
    return -(expm1_nonpositive(q * t.log_p) / q), -(exp_nonpositive(q * t.log_p) * t.n)


@triton.jit
def smooth_accuracy(t, first, second):
    return t.n, -(t.p * t.n)


@triton.jit
def token_scaled(t, first, second):
    return -_p_log_p(t), -(t.p * t.n)


OBJECTIVES = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "hard_truncation": hard_truncation,
    "soft_truncation": soft_truncation,
    "poly": poly,
    "poly_focal": poly_focal,
    "gce": gce,
    "smooth_accuracy": smooth_accuracy,
    "token_scaled": token_scaled,
}
