"""What counts become beside a prior: class weights, margins, factors; and what weights and samplers do to a prior."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.priors.arguments import AnyPrior, prior_bias
from imbalance_kernels.priors.counts import checked_counts, count_weights
from imbalance_kernels.priors.fixed import Prior

__all__ = [
    "effective_number_weights",
    "effective_prior",
    "inverse_frequency_weights",
    "ldam_margins",
    "vs_factors",
    "warn_if_corrected_twice",
]

# Weights that undo this part of the prior's spread, or more, are taken for its inverse. Those of effective numbers undo
# 0.94 of counts from 6000 to 60, square roots of the inverse 0.5.
UNDONE = 0.75
MATTERS = math.log(2)  # a prior whose classes differ by less than this factor is not worth a warning


def _positive_counts(class_counts: Tensor | Any, infinite: str) -> Tensor:
    """Return counts (C,) float64, all above 0; `infinite` is what a zero would make of a class."""
    counts = checked_counts(class_counts)
    if not torch.compiler.is_compiling() and bool((counts == 0).any()):
        raise ValueError(f"class_counts has a zero, whose {infinite} is infinite: leave the class out or count it once")
    return counts


def inverse_frequency_weights(class_counts: Tensor | Any) -> Tensor:
    """Return class weights (C,) in float64, ``sum(n) / (C n_j)``: 1 / prior, such that a sample weighs 1 on average.

    They are scikit-learn's "balanced". The losses here take them as they are, torch's want the logits' dtype. They are
    another way to do what a prior does: see `effective_prior` before combining both.

    Args:
        class_counts: n (C,), none zero.

    Raises:
        ValueError: a class without examples, whose weight would be infinite.

    Source: King and Zeng 2001, "Logistic regression in rare events data".

    Example:
        >>> inverse_frequency_weights([4, 2, 1, 1]).tolist()
        [0.5, 1.0, 2.0, 2.0]
    """
    counts = _positive_counts(class_counts, "weight 1 / n")
    return counts.sum() / (counts.numel() * counts)


def effective_number_weights(class_counts: Tensor | Any, beta: float = 0.9999) -> Tensor:
    """Return class-balanced weights (C,) in float64, ``(1 - beta) / (1 - beta^n_j)``, normalised to sum C.

    From equal weights (``beta = 0``) to 1 / prior (beta towards 1).

    Args:
        class_counts: n (C,), none zero.
        beta: in [0, 1).

    Raises:
        ValueError: a class without examples, whose weight would be infinite; beta outside [0, 1).

    Source: Cui et al. 2019, "Class-balanced loss based on effective number of samples".

    Example:
        >>> [round(weight, 3) for weight in effective_number_weights([100000, 100, 1], beta=0.9).tolist()]
        [0.25, 0.25, 2.5]
    """
    counts = _positive_counts(class_counts, "effective weight 1 / (1 - beta^n)")
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta!r}, but it must be in [0, 1)")
    log_beta = math.log(beta) if beta > 0 else -math.inf
    weights = (1 - beta) / -torch.expm1(counts * log_beta)  # 1 - beta^n loses its digits where n (1 - beta) is small
    return weights * (counts.numel() / weights.sum())


def ldam_margins(class_counts: Tensor | Any, max_margin: float = 0.5) -> Tensor:
    """Return LDAM's margins (C,) in float64: ``max_margin * (n_min / n_j)^(1/4)``. Cao et al. 2019.

    Raises:
        ValueError: a class without examples, whose margin would be infinite; max_margin not above 0.

    Example:
        >>> ldam_margins([10000, 16, 1]).tolist()
        [0.05, 0.25, 0.5]
    """
    counts = _positive_counts(class_counts, "LDAM margin n^(-1/4)")
    if not (math.isfinite(max_margin) and max_margin > 0):
        raise ValueError(f"max_margin is {max_margin!r}, but it must be above 0 and finite")
    return max_margin * (counts.min() / counts) ** 0.25


def vs_factors(prior: Prior, gamma: float = 0.3) -> Tensor:
    """Return VS loss's factors (C,) in float64: ``(n_j / n_max)^gamma``. Kini et al. 2021.

    Raises:
        ValueError: gamma negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma is {gamma!r}, but it must be at least 0 and finite")
    return (prior.counts / prior.counts.max()) ** gamma


def effective_prior(
    prior: AnyPrior,
    sampler: Tensor | torch.utils.data.WeightedRandomSampler | str | Any | None = None,
    weight: Tensor | Any | None = None,
    *,
    targets: Tensor | Any | None = None,
) -> Prior:
    """Return the prior that a model carries after a sampler and class weights: ``s_j w_j``, normalised.

    A model that sees class j with frequency s_j and weighs its loss by w_j learns ``log(s_j w_j)`` in its logits, not
    the log prior of the data. Where one of these corrects the imbalance already, a loss that adds the data's prior
    corrects it a second time; this is what it should add instead, and what `predict` should take off.

    Args:
        prior: that of the data: a `Prior`, a `RunningPrior` (as it stands; it has counted what a sampler drew: give no
            sampler then) or class probabilities (C,).
        sampler: None for one that draws the data as they are; "balanced" for one that draws each class as often; (C,)
            how often it draws each class, as counts or probabilities; or, with targets, the weight of each sample (N,),
            or a torch WeightedRandomSampler.
        weight: the loss's class weights (C,), or None.
        targets: the data's class indices (N,), in the order of the sampler's weights.

    Returns:
        A `Prior`, with the tau of the one given. A class that was excluded from it stays so.

    Raises:
        ValueError: a shape that does not fit; a class that is never drawn, or has weight 0, but is not excluded; a
            WeightedRandomSampler without targets, or without replacement, by which the drawn depends on how many are.
        TypeError: a prior that is none.

    Source: kexue.fm 7615; Menon et al. 2021.

    Example:
        >>> prior = Prior([4, 2, 1, 1])
        >>> effective_prior(prior, weight=inverse_frequency_weights([4, 2, 1, 1])).probabilities.tolist()
        [0.25, 0.25, 0.25, 0.25]
        >>> effective_prior(prior, sampler="balanced", weight=[1, 1, 2, 4]).probabilities.tolist()
        [0.125, 0.125, 0.25, 0.5]
    """
    log_prior = prior_bias(prior, 1.0).detach().cpu()  # (C,) float64
    excluded = log_prior == -math.inf
    shares = log_prior.exp() if sampler is None else _drawn(sampler, targets, excluded)
    if sampler is None and targets is not None:
        raise ValueError("targets is given without a sampler, whose weights it is for")
    if weight is not None:
        weights = checked_counts(weight, "weight")
        _check_classes("weight", weights, excluded)
        shares = shares * weights
    tau = 1.0 if isinstance(prior, Tensor) else prior.tau
    shares = torch.where(excluded, torch.zeros_like(shares), shares)
    return Prior(shares, tau, "exclude" if bool(excluded.any()) else None)


def _drawn(sampler: Any, targets: Any, excluded: Tensor) -> Tensor:
    """Return how often a sampler draws each class (C,), up to a factor."""
    if isinstance(sampler, str):
        if sampler != "balanced":
            raise ValueError(
                f"sampler is {sampler!r}, but it must be 'balanced' or how often each class is drawn, (C,)"
            )
        if targets is not None:
            raise ValueError("targets is given with sampler='balanced', which needs none")
        return torch.ones(excluded.shape, dtype=torch.float64)
    if isinstance(sampler, torch.utils.data.WeightedRandomSampler):
        if targets is None:
            raise ValueError("sampler is a WeightedRandomSampler: give the data's targets (N,) too, in its order")
        if not sampler.replacement:
            raise ValueError(
                "sampler is a WeightedRandomSampler without replacement, which draws classes by how many samples it "
                "draws: count them, sampler=class_counts(...)"
            )
        sampler = sampler.weights
    elif isinstance(sampler, torch.utils.data.Sampler):
        raise TypeError(
            f"sampler is a {type(sampler).__name__}, which does not say how often it draws a class: count it, "
            "sampler=class_counts(...)"
        )
    shares = checked_counts(sampler, "sampler")
    if targets is not None:
        shares = count_weights(targets, shares, excluded.numel())
    _check_classes("sampler", shares, excluded)
    return shares


def _check_classes(argument: str, values: Tensor, excluded: Tensor) -> None:
    if values.shape != excluded.shape:
        raise ValueError(
            f"{argument} has shape {tuple(values.shape)}, but prior has {excluded.numel()} classes: it must be "
            f"({excluded.numel()},)"
        )
    missing = (values == 0) & ~excluded
    if bool(missing.any()):
        raise ValueError(
            f"{argument} is 0 for class {int(missing.nonzero()[0, 0])}, of which nothing is learned then: exclude it "
            "from the prior, Prior(..., zero_count='exclude')"
        )


def warn_if_corrected_twice(weight: Tensor | None, log_prior: Tensor | None) -> None:
    """Warn where class weights (C,) are close to 1 / prior beside a prior, given by its logarithm (C,)."""
    if weight is None or log_prior is None or torch.compiler.is_compiling():
        return
    if type(weight) is not Tensor or weight.is_meta or weight.shape != log_prior.shape:  # raised by the call
        return
    log_weight = torch.log(weight.detach().to("cpu", torch.float64))
    log_prior = log_prior.detach().to("cpu")
    counted = torch.isfinite(log_weight) & torch.isfinite(log_prior)
    spread, left = _spread(log_prior[counted]), _spread((log_weight + log_prior)[counted])
    if spread >= MATTERS and left <= (1 - UNDONE) * spread:
        warnings.warn(
            "weight is close to 1 / prior, and prior is given too, which corrects the imbalance twice: leave one out, "
            "or give prior=imbalance_kernels.priors.effective_prior(prior, weight=weight)",
            UserWarning,
            stacklevel=_callers_level(),
        )


def _spread(values: Tensor) -> float:
    return float(values.max() - values.min()) if values.numel() else 0.0


def _callers_level() -> int:
    """Return the stacklevel, seen from the function that calls this one, of the first frame outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("imbalance_kernels."):
        level, frame = level + 1, frame.f_back
    return level
