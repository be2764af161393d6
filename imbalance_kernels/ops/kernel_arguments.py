"""Options in the order of the kernels' schemas (csrc/bindings.cpp), and back."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from imbalance_kernels.logit_map import AngularMargin, CircleMargin, LogitMap, Margin
from imbalance_kernels.objectives import REGISTRY, Objective
from imbalance_kernels.options import SigmoidOptions, SoftmaxOptions

__all__ = [
    "LossArguments",
    "MultilabelArguments",
    "SigmoidArguments",
    "SplitArguments",
    "loss_arguments",
    "objective_arguments",
    "options_of_loss",
    "options_of_split",
    "sigmoid_arguments",
    "split_arguments",
]


class SplitArguments(NamedTuple):
    """What splits rows, as the schemas have it after the logits."""

    target: Tensor
    scale: float
    factor: Tensor | None
    bias: Tensor | None
    softcap: float | None
    margin_kind: str
    margin_parameters: list[float]
    class_margin: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int

    def rows(self, rows: slice | Tensor) -> SplitArguments:
        """Return the arguments of some rows."""
        return self._replace(target=self.target[rows])


class LossArguments(NamedTuple):
    """What a loss is made of, as the schemas have it after the logits."""

    target: Tensor
    scale: float
    factor: Tensor | None
    bias: Tensor | None
    softcap: float | None
    margin_kind: str
    margin_parameters: list[float]
    class_margin: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    objective: str
    objective_parameters: list[float]
    class_parameter: Tensor | None
    sample_weight: Tensor | None
    normalizer: Tensor | None
    reduction: str
    z_loss: float

    def rows(self, rows: slice | Tensor) -> LossArguments:
        """Return the arguments of some rows."""
        sample_weight = None if self.sample_weight is None else self.sample_weight[rows]
        return self._replace(target=self.target[rows], sample_weight=sample_weight)


class SigmoidArguments(NamedTuple):
    """What a sigmoid loss is made of, as the schemas have it after the logits."""

    target: Tensor
    objective: str
    objective_parameters: list[float]
    class_parameter: Tensor | None
    positive: float  # where positive_weight is None
    negative: float
    positive_weight: Tensor | None
    negative_weight: Tensor | None
    bias: Tensor | None
    sample_weight: Tensor | None
    normalizer: Tensor | None
    ignore_index: int
    reduction: str


class MultilabelArguments(NamedTuple):
    """What a multi-label softmax is made of, as the schemas have it after the logits."""

    target: Tensor
    bias: Tensor | None
    sample_weight: Tensor | None
    normalizer: Tensor | None
    ignore_index: int
    reduction: str


def sigmoid_arguments(
    target: Tensor, options: SigmoidOptions, sample_weight: Tensor | None, normalizer: Tensor | None
) -> SigmoidArguments:
    """Return the arguments of a sigmoid loss."""
    weights = (options.positive_weight, options.negative_weight)
    positive, negative = (1.0 if isinstance(weight, Tensor) else float(weight) for weight in weights)
    positive_weight, negative_weight = (weight if isinstance(weight, Tensor) else None for weight in weights)
    return SigmoidArguments(
        target,
        *objective_arguments(options.objective),
        positive,
        negative,
        positive_weight,
        negative_weight,
        options.bias,
        sample_weight,
        normalizer,
        options.ignore_index,
        options.reduction,
    )


def loss_arguments(
    target: Tensor,
    options: SoftmaxOptions,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
) -> LossArguments:
    """Return the arguments of a loss."""
    of_rows = (sample_weight, normalizer, options.reduction, options.z_loss)
    return LossArguments(*(target, *split_arguments(options), *objective_arguments(options.objective), *of_rows))


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


def objective_arguments(objective: Objective) -> tuple[str, list[float], Tensor | None]:
    """Return objective, objective_parameters, class_parameter; a per-class parameter's number is 0, and not read."""
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


def options_of_loss(call: LossArguments) -> SoftmaxOptions:
    """Return the options that `loss_arguments` took apart: for the reference, where a kernel would be called."""
    return SoftmaxOptions(
        objective=_objective(call),
        logit_map=_logit_map(call),
        weight=call.class_weight,
        label_smoothing=call.label_smoothing,
        z_loss=call.z_loss,
        ignore_index=call.ignore_index,
        reduction=call.reduction,
    )


def options_of_split(call: SplitArguments) -> SoftmaxOptions:
    """Return the options that `split_arguments` took apart."""
    return SoftmaxOptions(
        logit_map=_logit_map(call),
        weight=call.class_weight,
        label_smoothing=call.label_smoothing,
        ignore_index=call.ignore_index,
    )


def _objective(call: LossArguments) -> Objective:
    objective = REGISTRY[call.objective].from_kernel_parameters(*call.objective_parameters)
    return objective.with_class_parameter(call.class_parameter)


def _logit_map(call: SplitArguments | LossArguments) -> LogitMap:
    return LogitMap(call.scale, call.factor, call.bias, call.softcap, _margin(call))


def _margin(call: SplitArguments | LossArguments) -> Margin | None:
    numbers = call.margin_parameters
    if call.margin_kind == "angular":
        m1, m2, m3, straight_through = numbers
        return AngularMargin(m1, m2, m3, bool(straight_through))
    if call.margin_kind == "circle":
        margin, detach = numbers
        return CircleMargin(margin, bool(detach))
    return numbers[0] if call.class_margin is None else call.class_margin
