"""Priors as arguments: what may be given as one, and what it adds to the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.priors.fixed import BinaryPrior, Prior, checked_tau, tempered
from imbalance_kernels.priors.running import RunningPrior

__all__ = ["AnyPrior", "chosen_prior", "prior_bias"]

AnyPrior = Prior | RunningPrior | Tensor


def chosen_prior(
    class_counts: Tensor | Any | None, tau: float, zero_count: str | None, prior: AnyPrior | None
) -> Prior | RunningPrior:
    """Return the prior of a logit-adjusted loss, given by counts or as a prior, one of them."""
    if (class_counts is None) == (prior is None):
        given = "neither" if prior is None else "both"
        raise ValueError(f"class_counts and prior: {given} given, but the loss takes exactly one of them")
    if prior is None:
        return Prior(class_counts, tau, zero_count)
    if zero_count is not None:
        raise ValueError(
            "zero_count is given with prior, but it belongs to counts: Prior(class_counts, zero_count=...)"
        )
    if isinstance(prior, Prior | RunningPrior):
        if tau != 1.0:
            kind = type(prior).__name__
            raise ValueError(f"tau is given with a {kind}, which has its own: {kind}(..., tau=...)")
        return prior
    return Prior.from_probabilities(_checked(prior), tau)


def prior_bias(prior: AnyPrior, tau: float | None = None) -> Tensor:
    """Return tau * log prior (C,) in float64: what a softmax-family loss adds to its logits.

    Args:
        prior: a `Prior`, a `RunningPrior` as it stands, or class probabilities (C,).
        tau: instead of the prior's own; that of probabilities is 1.

    Raises:
        TypeError: it is none of these.
        ValueError: it requires grad; on CPU, probabilities that are none.
    """
    if isinstance(prior, Prior | RunningPrior):
        return prior.bias if tau is None else tempered(prior.log_prior, checked_tau(tau))
    probabilities = _checked(prior)
    tau = 1.0 if tau is None else checked_tau(tau)
    if probabilities.device.type == "cpu" and not torch.compiler.is_compiling():
        return Prior.from_probabilities(probabilities, tau).bias
    return tau * torch.log(probabilities.to(torch.float64))  # values are not read: that would wait for the device


def _checked(prior: Any) -> Tensor:
    if isinstance(prior, BinaryPrior):
        raise TypeError(
            "prior is a BinaryPrior, of classes that are present or absent each on its own, but the classes of a "
            "softmax exclude one another: use Prior(class_counts)"
        )
    if not isinstance(prior, Tensor):
        raise TypeError(
            f"prior is a {type(prior).__name__}, but it must be a Prior, a RunningPrior or a tensor of probabilities "
            "(C,)"
        )
    if prior.requires_grad:
        raise ValueError("prior requires grad, but class vectors are constants: pass prior.detach()")
    return prior
