"""The options of a loss as one frozen object that travels from a module to a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imbalance_kernels.logit_map import LogitMap
from imbalance_kernels.objectives import CrossEntropy, Objective

__all__ = ["LOGIT_DTYPES", "MultilabelOptions", "SigmoidOptions", "SoftmaxOptions", "accumulate_dtype"]

LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics, class vectors and losses: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class SoftmaxOptions:
    """Everything about a softmax-family loss but its tensors per row. Class vectors are (C,)."""

    objective: Objective = CrossEntropy()
    logit_map: LogitMap = LogitMap()
    weight: Tensor | None = None  # (C,)
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    inplace: bool = False
    return_log_probs: bool = False
    return_correct: bool = False

    @property
    def reports(self) -> bool:
        """Whether more of the rows is asked for than their loss."""
        return self.return_log_probs or self.return_correct

    def reporting(self, return_log_probs: bool, return_correct: bool) -> SoftmaxOptions:
        """Return the options of a call that asks for these.

        Raises:
            TypeError: one of them is no bool.
        """
        for name, value in (("return_log_probs", return_log_probs), ("return_correct", return_correct)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, but it must be True or False")
        if not (return_log_probs or return_correct):
            return self
        return replace(self, return_log_probs=return_log_probs, return_correct=return_correct)

    def class_vectors(self) -> list[Tensor]:
        """Return the class vectors that are there: what a backward saves, so that a change in between raises."""
        margin = self.logit_map.margin if isinstance(self.logit_map.margin, Tensor) else None
        vectors = (self.objective.class_parameter(), self.logit_map.factor, self.logit_map.bias, margin, self.weight)
        return [vector for vector in vectors if vector is not None]

    def to(self, device: torch.device, dtype: torch.dtype) -> SoftmaxOptions:
        """Return the options with their class vectors on `device` in `dtype`."""
        objective = self.objective.to(device, dtype)
        logit_map = self.logit_map.to(device, dtype)
        weight = None if self.weight is None else self.weight.to(device, dtype)
        if objective is self.objective and logit_map is self.logit_map and weight is self.weight:
            return self
        return replace(self, objective=objective, logit_map=logit_map, weight=weight)


@dataclass(frozen=True, eq=False)
class SigmoidOptions:
    """Everything about a sigmoid-family loss but its targets and their weights. Class vectors are (C,)."""

    objective: Objective = CrossEntropy()
    positive_weight: float | Tensor = 1.0  # a number, (), or (C,)
    negative_weight: float | Tensor = 1.0  # a number, or (C,)
    bias: Tensor | None = None  # (C,) added to the logits
    ignore_index: int = -100
    reduction: str = "mean"
    inplace: bool = False

    def class_vectors(self) -> list[Tensor]:
        """Return the class vectors that are there: what a backward saves, so that a change in between raises."""
        vectors = (self.objective.class_parameter(), self.positive_weight, self.negative_weight, self.bias)
        return [vector for vector in vectors if isinstance(vector, Tensor)]

    def to(self, device: torch.device, dtype: torch.dtype) -> SigmoidOptions:
        """Return the options with their class vectors on `device` in `dtype`."""

        def moved(value: float | Tensor) -> float | Tensor:
            return value.to(device, dtype) if isinstance(value, Tensor) else value

        return replace(
            self,
            objective=self.objective.to(device, dtype),
            positive_weight=moved(self.positive_weight),
            negative_weight=moved(self.negative_weight),
            bias=None if self.bias is None else self.bias.to(device, dtype),
        )

    def of_classes(self, num_classes: int) -> SigmoidOptions:
        """Return the options with a weight () as a class vector, because reading its number may wait for a device."""
        weight = self.positive_weight
        if not isinstance(weight, Tensor) or weight.dim() == 1:
            return self
        return replace(self, positive_weight=weight.repeat(num_classes))


@dataclass(frozen=True, eq=False)
class MultilabelOptions:
    """Everything about a multi-label softmax but its targets and their weights."""

    bias: Tensor | None = None  # (C,) added to the logits
    ignore_index: int = -100
    reduction: str = "mean"
    inplace: bool = False

    def class_vectors(self) -> list[Tensor]:
        """Return the class vectors that are there: what a backward saves, so that a change in between raises."""
        return [] if self.bias is None else [self.bias]

    def to(self, device: torch.device, dtype: torch.dtype) -> MultilabelOptions:
        """Return the options with their class vectors on `device` in `dtype`."""
        return self if self.bias is None else replace(self, bias=self.bias.to(device, dtype))
