"""The logit map: from raw logits x (N, C) to effective logits z (N, C), before any loss.

    z_j = scale * factor_j * cap(x_j) + bias_j            every class
    z_t = scale * factor_t * psi(cap(x_t)) + bias_t       the target alone: a margin or an angle

``cap(x) = k tanh(x / k)`` is the soft cap. Logit adjustment is a bias, VS loss a factor and a bias, LDAM and CosFace a
margin and a scale, ArcFace an angle. A raw logit of -inf is a mask, tested before anything else; a bias of -inf
excludes its class in the same way. Class vectors are constants: they carry no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imbalance_kernels.differentiation import declared

__all__ = ["AngularMargin", "CircleMargin", "LogitMap", "Margin"]

# Where |x| reaches 1 the slope of an angular margin is infinite: sin(theta) is kept above this (as in
# csrc/logit_map.h).
SINE_FLOOR = 1e-3


@dataclass(frozen=True)
class AngularMargin:
    """An angular margin on the target's cosine: cos(m1 theta + m2) - m3.

    With m1 = 1 (ArcFace, CosFace) the continuation where theta + m2 passes pi is x - m2 sin(m2) - m3; with another m1
    (SphereFace, combined margin) it is (-1)^k cos(phi) - 2 k - m3 with phi = m1 theta + m2 and k = floor(phi / pi).

    Args:
        m1: factor of the angle, at least 1.
        m2: margin added to the angle, in radians, from 0 to pi.
        m3: margin taken off the cosine.
        straight_through: the slope is 1 instead of the true one.

    Raises:
        ValueError: m1 below 1, or m2 outside 0 to pi (degrees?).

    Example:
        >>> AngularMargin(m2=0.5)
        AngularMargin(m1=1.0, m2=0.5, m3=0.0, straight_through=False)
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    straight_through: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.m1) and self.m1 >= 1):
            raise ValueError(f"AngularMargin: m1 is {self.m1!r}, but it must be at least 1")
        if not 0 <= self.m2 <= math.pi:
            raise ValueError(f"AngularMargin: m2 is {self.m2!r}, but it must be from 0 to pi: the unit is radians")
        if not math.isfinite(self.m3):
            raise ValueError(f"AngularMargin: m3 is {self.m3!r}, but it must be finite")

    def value(self, cosine: Tensor) -> Tensor:
        """Return the target's cosine (N,) with the margin."""
        cosine = cosine.clamp(-1, 1)
        if self.m1 == 1:
            sine = torch.sqrt((1 - cosine) * (1 + cosine))
            inside = cosine * math.cos(self.m2) - sine * math.sin(self.m2)
            return torch.where(self._continued(cosine), cosine - self.m2 * math.sin(self.m2), inside) - self.m3
        angle = self.m1 * torch.arccos(cosine) + self.m2
        turn = torch.floor(angle / math.pi)
        return self._sign(turn) * torch.cos(angle) - 2 * turn - self.m3

    def slope(self, cosine: Tensor) -> Tensor:
        """Return d value / d cosine (N,)."""
        if self.straight_through:
            return torch.ones_like(cosine)
        cosine = cosine.clamp(-1, 1)
        sine = torch.sqrt((1 - cosine) * (1 + cosine)).clamp_min(SINE_FLOOR)
        if self.m1 == 1:
            inside = math.cos(self.m2) + cosine * math.sin(self.m2) / sine
            return torch.where(self._continued(cosine), torch.ones_like(cosine), inside)
        angle = self.m1 * torch.arccos(cosine) + self.m2
        return self._sign(torch.floor(angle / math.pi)) * self.m1 * torch.sin(angle) / sine

    def _continued(self, cosine: Tensor) -> Tensor:
        return cosine < -math.cos(self.m2)  # theta > pi - m2

    @staticmethod
    def _sign(turn: Tensor) -> Tensor:
        return 1 - 2 * torch.remainder(turn, 2)


@dataclass(frozen=True)
class CircleMargin:
    """Circle loss at class level (Sun et al. 2020), a map of cosines s: the target's and the others' own slopes.

    target: a_p (s - (1 - m)), a_p = relu(1 + m - s); others: a_n (s - m), a_n = relu(s + m).

    Args:
        margin: m, the relaxation.
        detach: the paper's form: a_p and a_n are held constant in the gradient.
    """

    margin: float = 0.25
    detach: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.margin):
            raise ValueError(f"CircleMargin: margin is {self.margin!r}, but it must be finite")

    def value(self, cosine: Tensor) -> Tensor:
        """Return the target's mapped cosine (N,)."""
        return (1 + self.margin - cosine).clamp_min(0) * (cosine - (1 - self.margin))

    def slope(self, cosine: Tensor) -> Tensor:
        """Return its declared slope (N,)."""
        pull = 1 + self.margin - cosine
        moving = 0.0 if self.detach else (cosine - (1 - self.margin))
        return torch.where(pull > 0, pull - moving, torch.zeros_like(cosine))

    def rest_value(self, cosine: Tensor) -> Tensor:
        """Return the other classes' mapped cosines (N, C)."""
        return (cosine + self.margin).clamp_min(0) * (cosine - self.margin)

    def rest_slope(self, cosine: Tensor) -> Tensor:
        """Return their declared slope (N, C)."""
        push = cosine + self.margin
        moving = 0.0 if self.detach else (cosine - self.margin)
        return torch.where(push > 0, push + moving, torch.zeros_like(cosine))


Margin = float | Tensor | AngularMargin | CircleMargin


@dataclass(frozen=True, eq=False)
class LogitMap:
    """The constants of the map; class vectors are tensors (C,), None is absent."""

    scale: float = 1.0
    factor: Tensor | None = None  # (C,)
    bias: Tensor | None = None  # (C,)
    softcap: float | None = None
    margin: Margin | None = None
    cosines: bool = False  # raw logits are cosines: checked where values may be read

    def to(self, device: torch.device, dtype: torch.dtype) -> LogitMap:
        """Return the map with its class vectors on `device` in `dtype`."""
        factor = None if self.factor is None else self.factor.to(device, dtype)
        bias = None if self.bias is None else self.bias.to(device, dtype)
        margin = self.margin.to(device, dtype) if isinstance(self.margin, Tensor) else self.margin
        if factor is self.factor and bias is self.bias and margin is self.margin:
            return self
        return replace(self, factor=factor, bias=bias, margin=margin)

    def masked(self, logits: Tensor) -> Tensor:
        """Return where (N, C) a class takes no part: a raw logit or a bias of -inf."""
        masked = logits == -math.inf
        return masked if self.bias is None else masked | (self.bias == -math.inf)

    def every_class(self, logits: Tensor) -> Tensor:
        """Return z (N, C) of logits (N, C) without -inf, all classes treated as the rest."""
        z = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        if isinstance(self.margin, CircleMargin):
            z = declared(z, self.margin.rest_value, self.margin.rest_slope)
        return self._affine(z, self.factor, self.bias)

    def target(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return z_t (N,) of the targets' raw logits (N,) without -inf; target (N,) are the class indices."""
        z = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        if isinstance(self.margin, AngularMargin | CircleMargin):
            z = declared(z, self.margin.value, self.margin.slope)
        elif self.margin is not None:
            z = z - (self.margin[target] if isinstance(self.margin, Tensor) else self.margin)
        factor = None if self.factor is None else self.factor[target]
        bias = None if self.bias is None else self.bias[target]
        return self._affine(z, factor, bias)

    def _affine(self, z: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
        z = self.scale * z
        z = z if factor is None else factor * z
        return z if bias is None else z + bias
