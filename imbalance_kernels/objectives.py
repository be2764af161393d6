"""The registry of objectives: every hard-target loss as a value and a slope in the log-odds of the truth.

With ``d = log(p / (1 - p))`` the log-odds that a row gives to its true class, a loss is a function ``G(d)`` and its
gradient is the slope ``A(d) = dG/dd``, spread over the row: ``A`` on the target, ``-A * q_j`` on the other classes,
where ``q`` is the softmax over the rest. A sigmoid loss is the same function of ``d = (2 y - 1) x``. This file is the
specification; csrc/objectives.h mirrors it by name, and every kernel, test and benchmark iterates `REGISTRY`.

The notation of the formulas: ``p = sigmoid(d)``, ``n = 1 - p = sigmoid(-d)``, ``l = log p``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from imbalance_kernels.differentiation import declared

__all__ = [
    "REGISTRY",
    "CrossEntropy",
    "Focal",
    "GeneralizedCrossEntropy",
    "HardTruncation",
    "Objective",
    "Poly",
    "PolyFocal",
    "SmoothAccuracy",
    "SoftTruncation",
    "TokenScaled",
    "evaluate",
    "require",
    "require_finite_number",
]


@dataclass(frozen=True, eq=False)
class Objective:
    """A loss as a function of the log-odds of the truth.

    Subclasses are frozen dataclasses whose fields are the loss's parameters. The first parameter may be a tensor (C,)
    with one entry per target class where the class says so.
    """

    name: ClassVar[str] = ""

    def value(self, log_odds: Tensor) -> Tensor:
        """Return G(log_odds), element by element."""
        raise NotImplementedError

    def slope(self, log_odds: Tensor) -> Tensor:
        """Return A = dG / d log_odds, element by element."""
        raise NotImplementedError

    def parameters(self) -> tuple[Any, ...]:
        """Return the parameters in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def kernel_parameters(self) -> tuple[Any, ...]:
        """Return the parameters as kernels take them (csrc/objectives.h, triton_kernels/objectives.py)."""
        return self.parameters()

    @classmethod
    def from_kernel_parameters(cls, *parameters: float) -> Objective:
        """Return the objective of `kernel_parameters`."""
        return cls(*parameters)

    def class_parameter(self) -> Tensor | None:
        """Return the (C,) tensor of a per-class first parameter, or None."""
        first = next(iter(self.parameters()), None)
        return first if isinstance(first, Tensor) else None

    def with_class_parameter(self, per_class: Tensor | None) -> Objective:
        """Return the objective with another per-class first parameter; None leaves it as it is."""
        return self if per_class is None else replace(self, **{fields(self)[0].name: per_class})

    def at(self, target: Tensor) -> Objective:
        """Return the objective of rows with class indices `target` (N,): per-class parameters are gathered."""
        per_class = self.class_parameter()
        return self if per_class is None else self.with_class_parameter(per_class[target])

    def to(self, device: torch.device, dtype: torch.dtype) -> Objective:
        """Return the objective with a per-class parameter on `device` in `dtype`."""
        per_class = self.class_parameter()
        if per_class is None:
            return self
        moved = per_class.to(device, dtype)
        return self if moved is per_class else self.with_class_parameter(moved)


def evaluate(objective: Objective, log_odds: Tensor) -> Tensor:
    """Return ``objective.value(log_odds)``, differentiable through ``objective.slope``.

    Args:
        objective: the objective.
        log_odds: any shape, float32 or float64.

    Example:
        >>> d = torch.tensor([0.0, 2.0], requires_grad=True)
        >>> evaluate(Focal(gamma=2.0), d).sum().backward()
        >>> bool(torch.equal(d.grad, Focal(gamma=2.0).slope(d)))
        True
    """
    return declared(log_odds, objective.value, objective.slope)


def _log_p(d: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(d)


def _n(d: Tensor) -> Tensor:
    return torch.sigmoid(-d)


def _p_log_p(d: Tensor) -> Tensor:
    """p * log p, which is 0 at d = -inf, where the product would be 0 * inf."""
    return torch.where(d == -math.inf, torch.zeros_like(d), torch.sigmoid(d) * _log_p(d))


def _n_power(d: Tensor, gamma: float | Tensor) -> Tensor:
    """n ** gamma without dividing by n in its slope's users; n ** 0 is 1 also at d = +inf, where n is 0."""
    if isinstance(gamma, Tensor):
        return torch.where(gamma == 0, torch.ones_like(d), torch.exp(gamma * _log_p(-d)))
    return torch.ones_like(d) if gamma == 0 else torch.exp(gamma * _log_p(-d))


def require(condition: bool, owner: Objective, argument: str, got: object, wants: str) -> None:
    """Raise ValueError where a parameter of an objective is not what it must be."""
    if not condition:
        raise ValueError(f"{owner.name}: {argument} is {got!r}, but it must be {wants}")


def require_finite_number(owner: Objective, argument: str, value: object, wants: str) -> None:
    """The same of a parameter that must be a finite number, and is not a flag."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    require(number, owner, argument, value, wants)


@dataclass(frozen=True, eq=False)
class CrossEntropy(Objective):
    """G = -l, A = -n."""

    name: ClassVar[str] = "cross_entropy"

    def value(self, log_odds: Tensor) -> Tensor:
        """-log p."""
        return -_log_p(log_odds)

    def slope(self, log_odds: Tensor) -> Tensor:
        """-(1 - p)."""
        return -_n(log_odds)


@dataclass(frozen=True, eq=False)
class Focal(Objective):
    """G = -n^gamma l, A = -n^gamma (n - gamma p l). Lin et al. 2017; kexue 4733.

    Args:
        gamma: at least 0 (0 is cross-entropy, exactly); a float, or a tensor (C,) indexed by the target class.
    """

    name: ClassVar[str] = "focal"
    gamma: float | Tensor = 2.0

    def __post_init__(self) -> None:
        wants = "at least 0 and finite"
        if isinstance(self.gamma, Tensor):
            # A value check waits for the device and breaks a compiled graph: only on CPU, only eagerly.
            if self.gamma.device.type == "cpu" and not torch.compiler.is_compiling():
                valid = bool((torch.isfinite(self.gamma) & (self.gamma >= 0)).all())
                require(valid, self, "gamma", self.gamma, wants)
        else:
            require_finite_number(self, "gamma", self.gamma, wants)
            require(self.gamma >= 0, self, "gamma", self.gamma, wants)

    def value(self, log_odds: Tensor) -> Tensor:
        """-(1 - p)^gamma log p."""
        return _n_power(log_odds, self.gamma) * -_log_p(log_odds)

    def slope(self, log_odds: Tensor) -> Tensor:
        """-(1 - p)^gamma (1 - p - gamma p log p)."""
        return -_n_power(log_odds, self.gamma) * (_n(log_odds) - self.gamma * _p_log_p(log_odds))


@dataclass(frozen=True, eq=False)
class HardTruncation(Objective):
    """G = -l h, A = -n h, h = 1 where p < threshold, 1/2 at equality, else 0. kexue 4733.

    Half weight at equality lets a zero-initialised binary head, whose p is 0.5 exactly, train.

    Args:
        threshold: a probability in (0, 1]; rows that are at least this sure do not train.
    """

    name: ClassVar[str] = "hard_truncation"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        wants = "a probability in (0, 1]"
        require_finite_number(self, "threshold", self.threshold, wants)
        require(0 < self.threshold <= 1, self, "threshold", self.threshold, wants)

    def kernel_parameters(self) -> tuple[Any, ...]:
        """Return logit(threshold)."""
        return (self._limit(),)

    @classmethod
    def from_kernel_parameters(cls, *parameters: float) -> Objective:
        """Return the objective of a logit(threshold)."""
        (limit,) = parameters
        return cls(math.exp(limit) / (1 + math.exp(limit)) if limit < 0 else 1 / (1 + math.exp(-limit)))

    def _limit(self) -> float:
        return math.inf if self.threshold == 1 else math.log(self.threshold) - math.log1p(-self.threshold)

    def _weight(self, d: Tensor) -> Tensor:
        return torch.heaviside(self._limit() - d, d.new_tensor(0.5))  # p < threshold without an exponential

    def value(self, log_odds: Tensor) -> Tensor:
        """-h log p."""
        return -_log_p(log_odds) * self._weight(log_odds)

    def slope(self, log_odds: Tensor) -> Tensor:
        """-h (1 - p)."""
        return -_n(log_odds) * self._weight(log_odds)


@dataclass(frozen=True, eq=False)
class SoftTruncation(Objective):
    """G = -sigmoid(-K d) l, A = -sigmoid(-K d) (n - K sigmoid(K d) l). kexue 4733; K = 1 is focal with gamma = 1.

    Args:
        sharpness: K, above 0; hard truncation is its limit.
    """

    name: ClassVar[str] = "soft_truncation"
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        wants = "above 0 and finite"
        require_finite_number(self, "sharpness", self.sharpness, wants)
        require(self.sharpness > 0, self, "sharpness", self.sharpness, wants)

    def value(self, log_odds: Tensor) -> Tensor:
        """-sigmoid(-K d) log p."""
        return torch.sigmoid(-self.sharpness * log_odds) * -_log_p(log_odds)

    def slope(self, log_odds: Tensor) -> Tensor:
        """-sigmoid(-K d) (1 - p - K sigmoid(K d) log p)."""
        sharp = self.sharpness * log_odds
        sharp_log_p = torch.where(log_odds == -math.inf, 0.0, torch.sigmoid(sharp) * _log_p(log_odds))
        return -torch.sigmoid(-sharp) * (_n(log_odds) - self.sharpness * sharp_log_p)


@dataclass(frozen=True, eq=False)
class Poly(Objective):
    """G = -l + epsilon n, A = -n - epsilon p n. Leng et al. 2022.

    Args:
        epsilon: at least -1 (below, a confident row would be pushed away from its class).
    """

    name: ClassVar[str] = "poly"
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        wants = "at least -1 and finite"
        require_finite_number(self, "epsilon", self.epsilon, wants)
        require(self.epsilon >= -1, self, "epsilon", self.epsilon, wants)

    def value(self, log_odds: Tensor) -> Tensor:
        """-log p + epsilon (1 - p)."""
        return -_log_p(log_odds) + self.epsilon * _n(log_odds)

    def slope(self, log_odds: Tensor) -> Tensor:
        """-(1 - p) - epsilon p (1 - p)."""
        n = _n(log_odds)
        return -n - self.epsilon * torch.sigmoid(log_odds) * n


@dataclass(frozen=True, eq=False)
class PolyFocal(Objective):
    """G = focal(gamma) + epsilon n^(gamma + 1), A = focal's A - epsilon (gamma + 1) n^(gamma + 1) p. Leng et al. 2022.

    Args:
        gamma: at least 0; a float, or a tensor (C,) indexed by the target class.
        epsilon: at least -1.
    """

    name: ClassVar[str] = "poly_focal"
    gamma: float | Tensor = 2.0
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        Focal(self.gamma)
        Poly(self.epsilon)

    def value(self, log_odds: Tensor) -> Tensor:
        """-(1 - p)^gamma log p + epsilon (1 - p)^(gamma + 1)."""
        return Focal(self.gamma).value(log_odds) + self.epsilon * _n_power(log_odds, self.gamma + 1)

    def slope(self, log_odds: Tensor) -> Tensor:
        """Focal's slope - epsilon (gamma + 1) (1 - p)^(gamma + 1) p."""
        power = _n_power(log_odds, self.gamma + 1)
        return Focal(self.gamma).slope(log_odds) - self.epsilon * (self.gamma + 1) * power * torch.sigmoid(log_odds)


@dataclass(frozen=True, eq=False)
class GeneralizedCrossEntropy(Objective):
    """G = (1 - p^q) / q, written -expm1(q l) / q; A = -p^q n. Zhang and Sabuncu 2018.

    Args:
        q: in (0, 1]; towards 0 it is cross-entropy, 1 is smooth accuracy.
    """

    name: ClassVar[str] = "gce"
    q: float = 0.7

    def __post_init__(self) -> None:
        wants = "in (0, 1]"
        require_finite_number(self, "q", self.q, wants)
        require(0 < self.q <= 1, self, "q", self.q, wants)

    def kernel_parameters(self) -> tuple[Any, ...]:
        """Return q and 1 / q."""
        return self.q, 1 / self.q

    @classmethod
    def from_kernel_parameters(cls, *parameters: float) -> Objective:
        """Return the objective of q and 1 / q."""
        return cls(parameters[0])

    def value(self, log_odds: Tensor) -> Tensor:
        """(1 - p^q) / q."""
        return -torch.expm1(self.q * _log_p(log_odds)) / self.q

    def slope(self, log_odds: Tensor) -> Tensor:
        """-p^q (1 - p)."""
        return -torch.exp(self.q * _log_p(log_odds)) * _n(log_odds)


@dataclass(frozen=True, eq=False)
class SmoothAccuracy(Objective):
    """G = n, A = -p n. kexue 7708 (ACC_smooth): one minus the accuracy with the probability in place of the argmax."""

    name: ClassVar[str] = "smooth_accuracy"

    def value(self, log_odds: Tensor) -> Tensor:
        """1 - p."""
        return _n(log_odds)

    def slope(self, log_odds: Tensor) -> Tensor:
        """-p (1 - p)."""
        return -torch.sigmoid(log_odds) * _n(log_odds)


@dataclass(frozen=True, eq=False)
class TokenScaled(Objective):
    """G = -stop(p) l, A = -p n: cross-entropy scaled by the detached probability, a value whose slope is declared.

    Known as token scaling and as dynamic fine-tuning (DFT).
    """

    name: ClassVar[str] = "token_scaled"

    def value(self, log_odds: Tensor) -> Tensor:
        """-p log p."""
        return -_p_log_p(log_odds)

    def slope(self, log_odds: Tensor) -> Tensor:
        """-p (1 - p), with the factor p held constant."""
        return -torch.sigmoid(log_odds) * _n(log_odds)


REGISTRY: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        CrossEntropy,
        Focal,
        HardTruncation,
        SoftTruncation,
        Poly,
        PolyFocal,
        GeneralizedCrossEntropy,
        SmoothAccuracy,
        TokenScaled,
    )
}
