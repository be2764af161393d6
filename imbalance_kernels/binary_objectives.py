"""Losses of one logit x with a label y in [0, 1], as value and slope in x: the sigmoid family's side of objectives.py.

    loss = positive_weight y V+(x, y) + negative_weight (1 - y) V-(x, y)

For every objective of the registry V+ is G(x) and V- is G(-x), because the log-odds of the truth are (2 y - 1) x: a
soft label mixes the two. Focal loss has torchvision's form, whose factor is of the mixed probability; it is the same
where labels are 0 or 1. What is defined here beside the registry needs the label itself. csrc/binary_objectives.h
mirrors this file, the specification, by name.

The notation: ``p = sigmoid(x)``, ``n = 1 - p``, ``BCE(x, y) = -y log p - (1 - y) log n``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from imbalance_kernels.objectives import REGISTRY, Focal, Objective, require, require_finite_number

__all__ = [
    "BINARY_REGISTRY",
    "Asymmetric",
    "BinaryObjective",
    "QualityFocal",
    "Sides",
    "Varifocal",
    "side_slopes",
    "side_values",
]


class Sides(NamedTuple):
    """What a logit costs as a positive and as a negative, before it is weighted by its label."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True, eq=False)
class BinaryObjective(Objective):
    """An objective that is no function of the log-odds of the truth alone, so that a softmax cannot take it."""

    def value(self, log_odds: Tensor) -> Tensor:
        """Raise."""
        raise TypeError(f"{self.name} is a loss of a logit and its label: it has no softmax form")

    def slope(self, log_odds: Tensor) -> Tensor:
        """Raise."""
        raise TypeError(f"{self.name} is a loss of a logit and its label: it has no softmax form")

    def side_values(self, x: Tensor, y: Tensor) -> Sides:
        """Return V+ and V-."""
        raise NotImplementedError

    def side_slopes(self, x: Tensor, y: Tensor) -> Sides:
        """Return their derivatives in x."""
        raise NotImplementedError


def side_values(objective: Objective, x: Tensor, y: Tensor) -> Sides:
    """Return V+ and V- of logits and labels of one shape; a per-class parameter has been made to fit it."""
    if isinstance(objective, BinaryObjective):
        return objective.side_values(x, y)
    if isinstance(objective, Focal):
        value = _mixed_power(x, y, objective.gamma) * _cross_entropy(x, y)
        return Sides(value, value)
    return Sides(objective.value(x), objective.value(-x))


def side_slopes(objective: Objective, x: Tensor, y: Tensor) -> Sides:
    """Return the derivatives of `side_values` in x."""
    if isinstance(objective, BinaryObjective):
        return objective.side_slopes(x, y)
    if isinstance(objective, Focal):
        p, n = torch.sigmoid(x), torch.sigmoid(-x)
        mixed = y * n + (1 - y) * p
        # (d mixed / dx) / mixed, where a hard label needs no division by what may be 0
        growth = torch.where(y == 1, -p, torch.where(y == 0, n, (1 - 2 * y) * p * n / mixed))
        slope = _mixed_power(x, y, objective.gamma) * (
            _cross_entropy_slope(x, y) + objective.gamma * _times(growth, _cross_entropy(x, y))
        )
        return Sides(slope, slope)
    return Sides(objective.slope(x), -objective.slope(-x))


def _times(y: Tensor, x: Tensor) -> Tensor:
    """y * x, which is 0 where y is, whatever x is."""
    return torch.where(y == 0, torch.zeros_like(x), y * x)


def _cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    """BCE(x, y)."""
    return -_times(y, torch.nn.functional.logsigmoid(x)) - _times(1 - y, torch.nn.functional.logsigmoid(-x))


def _cross_entropy_slope(x: Tensor, y: Tensor) -> Tensor:
    """p - y, without the cancellation of a confident positive."""
    return (1 - y) * torch.sigmoid(x) - y * torch.sigmoid(-x)


def _mixed_power(x: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
    """(y n + (1 - y) p) ^ gamma: of a hard label by its logarithm, and 0 ^ 0 is 1."""
    log_p, log_n = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    log_mixed = torch.log(y * torch.sigmoid(-x) + (1 - y) * torch.sigmoid(x))
    log_mixed = torch.where(y == 1, log_n, torch.where(y == 0, log_p, log_mixed))
    gamma = torch.as_tensor(gamma, dtype=x.dtype, device=x.device)
    return torch.where(gamma == 0, torch.ones_like(x), torch.exp(gamma * log_mixed))


@dataclass(frozen=True, eq=False)
class QualityFocal(BinaryObjective):
    """V+ = V- = |y - p|^beta BCE(x, y), for labels that are scores. Li et al. 2020.

    Args:
        beta: at least 1 (below, the slope is infinite where a score is met).
    """

    name: ClassVar[str] = "quality_focal"
    beta: float = 2.0

    def __post_init__(self) -> None:
        wants = "at least 1 and finite"
        require_finite_number(self, "beta", self.beta, wants)
        require(self.beta >= 1, self, "beta", self.beta, wants)

    def side_values(self, x: Tensor, y: Tensor) -> Sides:
        """|y - p|^beta BCE(x, y), twice."""
        value = _cross_entropy_slope(x, y).abs() ** self.beta * _cross_entropy(x, y)
        return Sides(value, value)

    def side_slopes(self, x: Tensor, y: Tensor) -> Sides:
        """|y - p|^(beta - 1) (|y - p| (p - y) + beta sign(p - y) p n BCE(x, y)), twice."""
        miss = _cross_entropy_slope(x, y)
        size = miss.abs()
        variance = torch.sigmoid(x) * torch.sigmoid(-x)
        pull = torch.where(variance == 0, torch.zeros_like(x), variance * _cross_entropy(x, y))
        slope = size ** (self.beta - 1) * (size * miss + self.beta * torch.sign(miss) * pull)
        return Sides(slope, slope)


@dataclass(frozen=True, eq=False)
class Varifocal(BinaryObjective):
    """V+ = BCE(x, y); V- = -alpha p^gamma log n where y is 0, and nothing where y is above. Zhang et al. 2021.

    Args:
        gamma: at least 0.
        alpha: weight of negatives, at least 0.
    """

    name: ClassVar[str] = "varifocal"
    gamma: float = 2.0
    alpha: float = 0.75

    def __post_init__(self) -> None:
        wants = "at least 0 and finite"
        for argument, value in (("gamma", self.gamma), ("alpha", self.alpha)):
            require_finite_number(self, argument, value, wants)
            require(value >= 0, self, argument, value, wants)

    def side_values(self, x: Tensor, y: Tensor) -> Sides:
        """BCE(x, y) and, of labels 0, -alpha p^gamma log n."""
        negative = self.alpha * Focal(self.gamma).value(-x)
        return Sides(_cross_entropy(x, y), torch.where(y > 0, torch.zeros_like(x), negative))

    def side_slopes(self, x: Tensor, y: Tensor) -> Sides:
        """p - y and, of labels 0, alpha p^gamma (p - gamma n log n)."""
        negative = -self.alpha * Focal(self.gamma).slope(-x)
        return Sides(_cross_entropy_slope(x, y), torch.where(y > 0, torch.zeros_like(x), negative))


@dataclass(frozen=True, eq=False)
class Asymmetric(BinaryObjective):
    """V+ = -n^gamma_pos log p; V- = -m^gamma_neg log(1 - m), m = max(p - clip, 0). Ridnik et al. 2021 (ASL).

    The slope is the formula's own; the authors' code holds the powers constant unless told otherwise.

    Args:
        gamma_neg: at least 0, of negatives.
        gamma_pos: at least 0, of positives.
        clip: in [0, 1): negatives below this probability cost nothing.
    """

    name: ClassVar[str] = "asymmetric"
    gamma_neg: float = 4.0
    gamma_pos: float = 1.0
    clip: float = 0.05

    def __post_init__(self) -> None:
        wants = "at least 0 and finite"
        for argument, gamma in (("gamma_neg", self.gamma_neg), ("gamma_pos", self.gamma_pos)):
            require_finite_number(self, argument, gamma, wants)
            require(gamma >= 0, self, argument, gamma, wants)
        require_finite_number(self, "clip", self.clip, "in [0, 1)")
        require(0 <= self.clip < 1, self, "clip", self.clip, "in [0, 1)")

    def side_values(self, x: Tensor, y: Tensor) -> Sides:
        """The two values."""
        positive = Focal(self.gamma_pos).value(x)
        if self.clip == 0:
            return Sides(positive, Focal(self.gamma_neg).value(-x))
        m = (torch.sigmoid(x) - self.clip).clamp_min(0)
        return Sides(positive, -(m**self.gamma_neg) * torch.log1p(-m))

    def side_slopes(self, x: Tensor, y: Tensor) -> Sides:
        """n^gamma_pos (...) as of focal loss; p n m^gamma_neg (1 / (1 - m) - gamma_neg log(1 - m) / m) above clip."""
        positive = Focal(self.gamma_pos).slope(x)
        if self.clip == 0:
            return Sides(positive, -Focal(self.gamma_neg).slope(-x))
        p, n = torch.sigmoid(x), torch.sigmoid(-x)
        m = (p - self.clip).clamp_min(0)
        ratio = torch.where(m > 0, -torch.log1p(-m) / torch.where(m > 0, m, torch.ones_like(m)), torch.ones_like(m))
        slope = p * n * m**self.gamma_neg * (1 / (1 - m) + self.gamma_neg * ratio)
        return Sides(positive, torch.where(p <= self.clip, torch.zeros_like(x), slope))


BINARY_REGISTRY: dict[str, type[Objective]] = {
    **REGISTRY,
    **{objective.name: objective for objective in (QualityFocal, Varifocal, Asymmetric)},
}
