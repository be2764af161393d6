"""The logit map: from raw logits x to effective logits z, and its slopes.

    z_j = scale * factor_j * cap(x_j) + bias_j            every class, as one of the rest
    z_t = scale * factor_t * psi(cap(x_t)) + bias_t       the target alone

Mirrors imbalance_kernels/logit_map.py and csrc/logit_map.h. A raw logit of -inf, or a bias of -inf, is a mask.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from imbalance_kernels.triton_kernels.math import arccos, tanh, tanh_slope

__all__ = ["LogitMap", "bend_slope", "effective_logits", "load_class_vector", "margin_numbers", "target_logit"]

SINE_FLOOR = tl.constexpr(1e-3)  # where |x| reaches 1 an angular margin's slope is infinite
PI = tl.constexpr(math.pi)


class LogitMap(NamedTuple):
    """The constants of the map; what is None takes no part."""

    scale: Any
    factor: Any  # (C,)
    bias: Any  # (C,)
    softcap: Any
    margin_kind: Any  # compile-time: None, "additive", "arc", "sphere" or "circle"
    margin: Any  # its numbers, see margin_numbers
    declared_slope: Any  # compile-time: straight_through or detach
    class_margin: Any  # (C,), of "additive"


def margin_numbers(kind: str, parameters: Sequence[float]) -> tuple[str | None, tuple[float, ...], bool]:
    """Return margin_kind, margin and declared_slope of csrc/bindings.cpp's margin_kind and margin_parameters."""
    if kind == "circle":
        margin, detach = parameters
        return "circle", (margin, 0.0, 0.0, 0.0), bool(detach)
    if kind == "angular":
        m1, m2, m3, straight_through = parameters
        if m1 == 1:  # cos(m2), sin(m2), the continuation's offset, m3
            return "arc", (math.cos(m2), math.sin(m2), m2 * math.sin(m2), m3), bool(straight_through)
        return "sphere", (m1, m2, m3, 0.0), bool(straight_through)
    return ("additive" if parameters[0] != 0 else None), (parameters[0], 0.0, 0.0, 0.0), False


@triton.jit
def load_class_vector(vector, columns, inside, other):
    """Return a class vector at columns; loaded as one row (BLOCK,) where all rows of a block share them."""
    loaded = tl.load(vector + columns, mask=inside, other=other, eviction_policy="evict_last")
    if len(columns.shape) == 1:
        loaded = loaded[None, :]
    return loaded


@triton.jit
def effective_logits(x, columns, inside, maps):
    """Return z of every class as one of the rest, -inf where masked, and where masked; `inside` are classes to load."""
    masked = x == -float("inf")
    z = x
    if maps.margin_kind == "circle":
        push = x + maps.margin[0]
        z = tl.where(push > 0, push, 0.0) * (x - maps.margin[0])
    elif maps.softcap is not None:
        z = maps.softcap * tanh(x / maps.softcap)
    if maps.scale is not None:
        z = z * maps.scale
    if maps.factor is not None:
        z = z * load_class_vector(maps.factor, columns, inside, 1.0)
    if maps.margin_kind == "circle" or maps.softcap is not None or maps.scale is not None or maps.factor is not None:
        z = tl.where(masked, -float("inf"), z)  # elsewhere -inf stays what it is
    if maps.bias is not None:
        bias = load_class_vector(maps.bias, columns, inside, 0.0)
        z = z + bias
        masked = masked | (bias == -float("inf"))
    return z, masked


@triton.jit
def bend_slope(x, maps):
    """Return the slope of what comes before scale and factor: the soft cap, or Circle loss's map of the rest."""
    if maps.margin_kind == "circle":
        push = x + maps.margin[0]
        moving = push
        if not maps.declared_slope:
            moving = push + (x - maps.margin[0])
        slope = tl.where(push > 0, moving, 0.0)
    else:
        slope = tanh_slope(x / maps.softcap)
    return slope


@triton.jit
def target_logit(x, target, valid, maps):
    """Return z_t and dz_t/dx_t of the targets' raw logits x; as in torch a masked one has the slope of a logit of 0."""
    masked = x == -float("inf")
    z = tl.where(masked, 0.0, x)
    slope = tl.zeros_like(z) + 1.0
    if maps.softcap is not None:
        slope = tanh_slope(z / maps.softcap)
        z = maps.softcap * tanh(z / maps.softcap)
    if maps.class_margin is not None:
        z = z - tl.load(maps.class_margin + target, mask=valid, other=0.0)
    elif maps.margin_kind == "additive":
        z = z - maps.margin[0]
    elif maps.margin_kind == "circle":
        z, mapped_slope = _circle(z, maps)
        slope = slope * mapped_slope
    elif maps.margin_kind is not None:
        z, mapped_slope = _angular(z, maps)
        slope = slope * mapped_slope
    if maps.scale is not None:
        z = z * maps.scale
        slope = slope * maps.scale
    if maps.factor is not None:
        factor = tl.load(maps.factor + target, mask=valid, other=1.0)
        z = z * factor
        slope = slope * factor
    if maps.bias is not None:
        z = z + tl.load(maps.bias + target, mask=valid, other=0.0)
    return tl.where(masked, -float("inf"), z), slope


@triton.jit
def _circle(cosine, maps):
    """a_p (s - (1 - m)) with a_p = relu(1 + m - s), and its declared slope."""
    pull = (1.0 - cosine) + maps.margin[0]
    distance = (cosine - 1.0) + maps.margin[0]
    slope = pull
    if not maps.declared_slope:
        slope = pull - distance
    return tl.where(pull > 0, pull * distance, 0.0 * distance), tl.where(pull > 0, slope, 0.0)


@triton.jit
def _angular(cosine, maps):
    """cos(m1 theta + m2) - m3, continued where the angle passes pi, and its slope."""
    cosine = tl.where(cosine < -1.0, -1.0, tl.where(cosine > 1.0, 1.0, cosine))
    sine = tl.sqrt((1.0 - cosine) * (1.0 + cosine))
    sine_divisor = tl.where(sine > SINE_FLOOR, sine, SINE_FLOOR)
    if maps.margin_kind == "arc":  # m1 = 1
        continued = cosine + maps.margin[0] < 0  # theta > pi - m2
        inner = cosine * maps.margin[0] - sine * maps.margin[1]
        z = tl.where(continued, cosine - maps.margin[2], inner) - maps.margin[3]
        slope = tl.where(continued, 1.0, maps.margin[0] + cosine * maps.margin[1] / sine_divisor)
    else:
        angle = maps.margin[0] * arccos(cosine) + maps.margin[1]
        turn = tl.floor(angle / PI)
        sign = 1.0 - 2.0 * (turn - 2.0 * tl.floor(turn / 2.0))
        z = sign * tl.cos(angle) - 2.0 * turn - maps.margin[2]
        slope = sign * maps.margin[0] * tl.sin(angle) / sine_divisor
    if maps.declared_slope:
        slope = tl.zeros_like(slope) + 1.0
    return z, slope
