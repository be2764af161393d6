"""The options of a softmax-family loss as one frozen object that travels from a module to a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imbalance_kernels.logit_map import LogitMap
from imbalance_kernels.objectives import CrossEntropy, Objective

__all__ = ["LOGIT_DTYPES", "SoftmaxOptions", "accumulate_dtype"]

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
