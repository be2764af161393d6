"""The keyword arguments that every sigmoid-family loss shares, and what they become."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.keywords import CALL_KEYWORDS, checked_keywords
from imbalance_kernels.objectives import CrossEntropy, Objective
from imbalance_kernels.ops.checks import check_class_vector
from imbalance_kernels.options import SigmoidOptions
from imbalance_kernels.priors import BinaryPrior, Prior, RunningPrior

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
    alpha = checked_alpha(alpha)
    vectors = _exact(alpha=alpha, weight=weight, pos_weight=pos_weight)
    alpha = vectors.get("alpha", alpha)
    positive: float | Tensor = 1.0 if alpha is None else alpha
    negative: float | Tensor = 1.0 if alpha is None else 1 - alpha
    if "weight" in vectors:
        positive, negative = positive * vectors["weight"], negative * vectors["weight"]
    if "pos_weight" in vectors:
        positive = vectors["pos_weight"] * positive
    return SigmoidOptions(
        objective=CrossEntropy() if objective is None else objective,
        positive_weight=positive,
        negative_weight=negative,
        bias=None if prior is None else binary_bias(prior),
        ignore_index=ignore_index,
        reduction=reduction,
        inplace=inplace,
    )


def _exact(**vectors: Any) -> dict[str, Tensor]:
    """Return the class vectors that are given, checked, in float64 on one device: products of them are rounded once.

    A pos_weight of one number is ().

    Raises:
        TypeError: one is no tensor of floating point. ValueError: it requires grad, or is not (C,) as the others are.
    """
    exact: dict[str, Tensor] = {}
    for name, vector in vectors.items():
        if vector is None or (name == "alpha" and not isinstance(vector, Tensor)):
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name} is a {type(vector).__name__}, but it must be a tensor (C,)")
        first = next(iter(exact.values()), None)
        if name == "pos_weight" and vector.dim() <= 1 and vector.numel() == 1:
            vector = vector.reshape(())  # of every class, as torch has it
        elif vector.dim() != 1 or (first is not None and vector.shape != first.shape):
            others = "" if first is None else f" as {next(iter(exact))} is, ({first.shape[0]},)"
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, but it must be (C,){others}")
        check_class_vector(name, vector.reshape(-1), vector.numel())
        exact[name] = vector.to(vector.device if first is None else first.device, torch.float64)
    return exact


def checked_alpha(alpha: float | Tensor | None) -> float | Tensor | None:
    """Return alpha, None where it is switched off, as torchvision does with a negative one.

    Raises:
        ValueError: a number above 1, or a class's outside 0 to 1. TypeError: it is neither.
    """
    if isinstance(alpha, Tensor):
        # A value check waits for the device and breaks a compiled graph: only on CPU, only eagerly.
        if alpha.device.type == "cpu" and not torch.compiler.is_compiling():
            if not bool(((alpha >= 0) & (alpha <= 1)).all()):
                raise ValueError(f"alpha is {alpha!r}, but each class's must be from 0 to 1")
        return alpha
    if alpha is None:
        return None
    if not isinstance(alpha, int | float):
        raise TypeError(f"alpha is a {type(alpha).__name__}, but it must be a number, a tensor (C,) or None")
    if not alpha <= 1:
        raise ValueError(
            f"alpha is {alpha!r}, but it must be at most 1 (negative or None: positives and negatives alike)"
        )
    return None if alpha < 0 else float(alpha)


def binary_bias(prior: BinaryPrior | Tensor) -> Tensor:
    """Return tau * log(prior / (1 - prior)) (C,) in float64."""
    if isinstance(prior, BinaryPrior):
        return prior.bias
    if isinstance(prior, Prior | RunningPrior):
        raise TypeError(
            f"prior is a {type(prior).__name__}, whose classes exclude one another, but here each is present or absent "
            "on its own: use BinaryPrior(positive_counts, total_count)"
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
