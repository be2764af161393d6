"""Options in the order of the kernels' schemas (csrc/bindings.cpp)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from imbalance_kernels.logit_map import AngularMargin, CircleMargin, LogitMap
from imbalance_kernels.options import SoftmaxOptions

__all__ = ["objective_arguments", "split_arguments"]


def split_arguments(options: SoftmaxOptions) -> tuple[Any, ...]:
    """Return what splits a row into target and rest.

    That is scale, factor, bias, softcap, margin_kind, margin_parameters, class_margin, class_weight, label_smoothing,
    ignore_index.
    """
    logit_map = options.logit_map
    return (
        logit_map.scale,
        logit_map.factor,
        logit_map.bias,
        logit_map.softcap,
        *_margin_arguments(logit_map),
        options.weight,
        options.label_smoothing,
        options.ignore_index,
    )


def objective_arguments(options: SoftmaxOptions) -> tuple[str, list[float], Tensor | None]:
    """Return objective, objective_parameters, class_parameter; a per-class parameter's number is 0, and not read."""
    objective = options.objective
    numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in objective.kernel_parameters()]
    return objective.name, numbers, objective.class_parameter()


def _margin_arguments(logit_map: LogitMap) -> tuple[str, list[float], Tensor | None]:
    margin = logit_map.margin
    if margin is None:
        return "additive", [0.0], None
    if isinstance(margin, AngularMargin):
        return "angular", [margin.m1, margin.m2, margin.m3, float(margin.straight_through)], None
    if isinstance(margin, CircleMargin):
        return "circle", [margin.margin, float(margin.detach)], None
    if isinstance(margin, Tensor):
        return "additive", [0.0], margin
    return "additive", [float(margin)], None
