"""The keyword arguments that every sigmoid-family loss shares, and what they become."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.keywords import CALL_KEYWORDS, checked_keywords
from imbalance_kernels.objectives import CrossEntropy, Objective
from imbalance_kernels.options import SigmoidOptions
from imbalance_kernels.priors import BinaryPrior, Prior

__all__ = ["sigmoid_options_of", "with_own_sigmoid"]


def sigmoid_options_of(
    objective: Objective | None = None,
    *,
    alpha: float | Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    prior: BinaryPrior | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
) -> SigmoidOptions:
    """Return the options of a loss: alpha, weight and pos_weight as weights of positives and negatives."""
    alpha = _exact("alpha", checked_alpha(alpha))
    positive: float | Tensor = 1.0 if alpha is None else alpha
    negative: float | Tensor = 1.0 if alpha is None else 1 - alpha
    if weight is not None:
        positive, negative = (side * _exact("weight", weight) for side in (positive, negative))
    if pos_weight is not None:
        positive = positive * _exact("pos_weight", pos_weight)
    return SigmoidOptions(
        objective=CrossEntropy() if objective is None else objective,
        positive_weight=positive,
        negative_weight=negative,
        bias=None if prior is None else binary_bias(prior),
        ignore_index=ignore_index,
        reduction=reduction,
        inplace=inplace,
    )


def _exact(name: str, value: Any) -> Any:
    """Return class weights in float64, so that their products are rounded once; a number, or None, as it is."""
    if name == "alpha" and not isinstance(value, Tensor):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, but it must be a tensor (C,)")
    if value.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but it must be (C,)")
    return value.to(torch.float64)


def checked_alpha(alpha: float | Tensor | None) -> float | Tensor | None:
    """Return alpha, None where it is switched off, as torchvision does with a negative one.

    Raises:
        ValueError: a number above 1.
    """
    if alpha is None or isinstance(alpha, Tensor):
        return alpha
    if not alpha <= 1:
        raise ValueError(
            f"alpha is {alpha!r}, but it must be at most 1 (negative or None: positives and negatives alike)"
        )
    return None if alpha < 0 else float(alpha)


def binary_bias(prior: BinaryPrior | Tensor) -> Tensor:
    """Return tau * log(prior / (1 - prior)) (C,) in float64."""
    if isinstance(prior, BinaryPrior):
        return prior.bias
    if isinstance(prior, Prior):
        raise TypeError(
            "prior is a Prior, whose classes exclude one another, but here each is present or absent on its own: use "
            "BinaryPrior(positive_counts, total_count)"
        )
    if not isinstance(prior, Tensor):
        raise TypeError(
            f"prior is a {type(prior).__name__}, but it must be a BinaryPrior or a tensor of probabilities (C,)"
        )
    if prior.requires_grad:
        raise ValueError("prior requires grad, but class vectors are constants: pass prior.detach()")
    if prior.device.type == "cpu" and not torch.compiler.is_compiling():
        return BinaryPrior.from_probabilities(prior).bias
    return torch.logit(prior.to(torch.float64))  # its values are not read: that would wait for the device


_OF_CLASSES = {*inspect.signature(sigmoid_options_of).parameters, "class_dim", "impl"}
_OF_FUNCTIONS = _OF_CLASSES | set(CALL_KEYWORDS)


def with_own_sigmoid(loss: Callable[..., Any], keywords: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Return the shared keyword arguments of a sigmoid-family loss, see `with_own`."""
    return checked_keywords(loss, keywords, _OF_CLASSES if isinstance(loss, type) else _OF_FUNCTIONS, own)
