"""The keyword arguments that every softmax-family loss shares, and what they become."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from imbalance_kernels.logit_map import AngularMargin, CircleMargin, LogitMap, Margin
from imbalance_kernels.objectives import CrossEntropy, Objective
from imbalance_kernels.options import SoftmaxOptions
from imbalance_kernels.priors.arguments import AnyPrior, prior_bias

__all__ = [
    "CALL_KEYWORDS",
    "SOFTMAX_CALL_KEYWORDS",
    "checked_keywords",
    "legacy_reduction",
    "options_of",
    "reject_alpha",
    "with_own",
]

# What goes to the call; the rest describes the loss (options_of).
CALL_KEYWORDS = ("sample_weight", "normalizer", "class_dim", "impl")
SOFTMAX_CALL_KEYWORDS = (*CALL_KEYWORDS, "return_log_probs", "return_correct")


def options_of(
    objective: Objective | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    prior: AnyPrior | None = None,
    margin: Margin | None = None,
    scale: float = 1.0,
    factor: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    inplace: bool = False,
    cosines: bool = False,
) -> SoftmaxOptions:
    """Return the options of a loss: the prior as a bias, the margin on cosines where it says so."""
    if objective is not None and not isinstance(objective, Objective):
        raise TypeError(
            f"objective is {objective!r}, but it must be one of imbalance_kernels.objectives, such as Focal()"
        )
    if isinstance(margin, bool) or (isinstance(margin, int | float) and not -math.inf < margin < math.inf):
        raise ValueError(f"margin is {margin!r}, but it must be a finite number, a tensor (C,) or an AngularMargin")
    return SoftmaxOptions(
        objective=CrossEntropy() if objective is None else objective,
        logit_map=LogitMap(
            scale=float(scale),
            factor=factor,
            bias=None if prior is None else prior_bias(prior),
            softcap=None if softcap is None else float(softcap),
            margin=margin,
            cosines=cosines or isinstance(margin, AngularMargin | CircleMargin),
        ),
        weight=weight,
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        ignore_index=ignore_index,
        reduction=reduction,
        inplace=inplace,
    )


# What every class and function takes beside its own arguments; sample_weight and normalizer go to a class's forward.
_OF_BOTH = {*inspect.signature(options_of).parameters, "class_dim", "impl"}
_OF_CLASSES = _OF_BOTH | {"chunk_bytes", "accumulate"}
_OF_FUNCTIONS = _OF_BOTH | set(SOFTMAX_CALL_KEYWORDS)


def with_own(loss: Callable[..., Any], keywords: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Return the shared keyword arguments of a loss: what it sets itself, `own`, and what its caller gave.

    Raises:
        TypeError: a keyword is unknown or set already.
    """
    return checked_keywords(loss, keywords, _OF_CLASSES if isinstance(loss, type) else _OF_FUNCTIONS, own)


def checked_keywords(
    loss: Callable[..., Any], keywords: dict[str, Any], shared: set[str], own: dict[str, Any]
) -> dict[str, Any]:
    """Return `own` and `keywords`, which are among those that its family shares.

    Raises:
        TypeError: a keyword is unknown or set already. Python would name what `loss` calls, which its caller did not.
    """
    taken = shared - own.keys()
    for name in keywords:
        if name not in taken:
            arguments = [
                name
                for name in inspect.signature(loss).parameters
                if name not in ("input", "inputs", "target", "targets", "keywords")
            ]
            if name in own:
                reason = f"sets {name} itself" + (
                    f"; its own arguments are {', '.join(arguments)}" if arguments else ""
                )
            elif name in (SOFTMAX_CALL_KEYWORDS if shared is _OF_CLASSES else CALL_KEYWORDS):
                reason = f"takes {name} when it is called, beside the target"
            else:
                known = [*arguments, *sorted(taken.difference(arguments))]
                near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
                reason = f"has no keyword {name}: use {near[0]}"
            raise TypeError(f"{loss.__name__} {reason}")
    return {**own, **keywords}


def legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return torch's reduction for its deprecated pair of flags, which drop-in callers may still pass."""
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def reject_alpha(keywords: Any) -> None:
    """Raise where `alpha` is given to a softmax focal loss."""
    if "alpha" in keywords:
        raise TypeError(
            "alpha balances positives and negatives of a sigmoid focal loss (SigmoidFocalLoss, as in torchvision); the "
            "softmax focal loss takes class weights: weight= (C,)"
        )
