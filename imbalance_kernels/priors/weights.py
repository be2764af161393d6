"""What counts become beside a prior: margins and factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.priors.counts import checked_counts
from imbalance_kernels.priors.fixed import Prior

__all__ = ["ldam_margins", "vs_factors"]


def _positive_counts(class_counts: Tensor | Any, infinite: str) -> Tensor:
    """Return counts (C,) float64, all above 0; `infinite` is what a zero would make of a class."""
    counts = checked_counts(class_counts)
    if not torch.compiler.is_compiling() and bool((counts == 0).any()):
        raise ValueError(f"class_counts has a zero, whose {infinite} is infinite: leave the class out or count it once")
    return counts


def ldam_margins(class_counts: Tensor | Any, max_margin: float = 0.5) -> Tensor:
    """Return LDAM's margins (C,) in float64: ``max_margin * (n_min / n_j)^(1/4)``. Cao et al. 2019.

    Raises:
        ValueError: a class without examples, whose margin would be infinite; max_margin not above 0.

    Example:
        >>> ldam_margins([10000, 16, 1]).tolist()
        [0.05, 0.25, 0.5]
    """
    counts = _positive_counts(class_counts, "LDAM margin n^(-1/4)")
    if not (math.isfinite(max_margin) and max_margin > 0):
        raise ValueError(f"max_margin is {max_margin!r}, but it must be above 0 and finite")
    return max_margin * (counts.min() / counts) ** 0.25


def vs_factors(prior: Prior, gamma: float = 0.3) -> Tensor:
    """Return VS loss's factors (C,) in float64: ``(n_j / n_max)^gamma``. Kini et al. 2021.

    Raises:
        ValueError: gamma negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma is {gamma!r}, but it must be at least 0 and finite")
    return (prior.counts / prior.counts.max()) ** gamma
