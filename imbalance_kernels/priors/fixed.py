"""Fixed class priors: how often each class is expected, and what a zero count means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.priors.counts import checked_counts

__all__ = ["BinaryPrior", "Prior", "checked_tau", "tempered"]

ZERO_COUNT_POLICIES = ("laplace", "floor", "exclude")


def checked_tau(tau: float) -> float:
    """Return the temperature of a prior.

    Raises:
        ValueError: it is not finite.
    """
    if not math.isfinite(tau):
        raise ValueError(f"tau is {tau!r}, but it must be finite")
    return float(tau)


def tempered(log_prior: Tensor, tau: float) -> Tensor:
    """Return tau * log prior (C,); an excluded class stays at -inf, whatever tau is."""
    return torch.where(log_prior == -math.inf, log_prior, tau * log_prior)


class Prior:
    """A fixed class prior: adds tau * log prior_j to the logits of a loss (logit adjustment).

    Computed in float64 from the counts and kept so: every loss takes its own copy in the precision that it computes in.

    Args:
        class_counts: how often each class occurs (C,): tensor, array or list, integers or frequencies.
        tau: temperature of the prior; 1 is near optimal, 0 switches it off.
        zero_count: what a count of zero means. "laplace": one is added to every count; "floor": it counts as one;
            "exclude": the class gets probability zero (bias -inf) and is never predicted.

    Raises:
        ValueError: a zero count without `zero_count`; negative, infinite or all-zero counts; tau not finite.

    Source: kexue.fm 7615; Menon et al. 2021, "Long-tail learning via logit adjustment".

    Example:
        >>> prior = Prior([900, 90, 10])
        >>> prior.probabilities.tolist()
        [0.9, 0.09, 0.01]
    """

    def __init__(self, class_counts: Tensor | Sequence[float] | Any, tau: float = 1.0, zero_count: str | None = None):
        counts = checked_counts(class_counts)
        if zero_count is not None and zero_count not in ZERO_COUNT_POLICIES:
            raise ValueError(f"zero_count is {zero_count!r}, but it must be None or one of {ZERO_COUNT_POLICIES}")
        zeros = 0 if torch.compiler.is_compiling() else int((counts == 0).sum())
        if zeros and zero_count is None:
            raise ValueError(
                f"class_counts has {zeros} zero(s), whose log prior is -inf: choose zero_count='laplace' (add one to "
                "every count), 'floor' (zero counts as one) or 'exclude' (the class is never predicted)"
            )
        if zero_count == "laplace":
            counts = counts + 1
        elif zero_count == "floor":
            counts = torch.where(counts == 0, torch.ones_like(counts), counts)
        self._set(counts, tau)

    @classmethod
    def from_probabilities(cls, probabilities: Tensor | Sequence[float] | Any, tau: float = 1.0) -> Prior:
        """Make a prior from class probabilities (C,), above 0; they are normalised to sum 1.

        Raises:
            ValueError: a probability that is not above 0, or a sum that is not 1 within 1 %.
        """
        values = checked_counts(probabilities, "probabilities")
        if torch.compiler.is_compiling():
            pass
        elif not bool((values > 0).all()):
            raise ValueError(
                "probabilities must be above 0: for classes that never occur give Prior counts and zero_count"
            )
        elif abs(float(values.sum()) - 1) > 0.01:
            raise ValueError(
                f"probabilities sum to {float(values.sum()):.6g}, but they must sum to 1: are they counts?"
            )
        prior = cls.__new__(cls)
        prior._set(values, tau)
        return prior

    def _set(self, counts: Tensor, tau: float) -> None:
        self.tau = checked_tau(tau)
        self.counts = counts  # (C,) float64 on CPU, the zero-count policy applied
        self.log_prior = torch.log(counts) - torch.log(counts.sum())  # (C,) float64 on CPU
        self.bias = tempered(self.log_prior, self.tau)  # tau * log prior (C,), float64 on CPU

    @property
    def num_classes(self) -> int:
        """C."""
        return self.counts.numel()

    @property
    def probabilities(self) -> Tensor:
        """The prior (C,), float64 on CPU."""
        return self.counts / self.counts.sum()

    def __repr__(self) -> str:
        return f"Prior(num_classes={self.num_classes}, tau={self.tau:g})"


class BinaryPrior:
    """A fixed prior of each class on its own: adds tau * log(prior_j / (1 - prior_j)) to the logits of a sigmoid loss.

    It is the logit adjustment of two classes, present and absent. A last layer whose bias starts at tau log-odds is the
    same training loss; RetinaNet's initialisation is that with one probability, 0.01, for all classes.

    Args:
        positive_counts: how often each class is present (C,): tensor, array or list.
        total_count: out of how many: one number, or (C,).
        tau: temperature of the prior; 0 switches it off.
        zero_count: "laplace" adds one positive and one negative to every class, "floor" counts a zero as one; without
            it a class that is never, or always, present raises.

    Raises:
        ValueError: a count of zero, or equal to the total, without `zero_count`; counts above the total; tau not
            finite.

    Source: kexue.fm 7615; Menon et al. 2021; Lin et al. 2017, section 4.1.

    Example:
        >>> prior = BinaryPrior([500, 10], total_count=1000)
        >>> prior.probabilities.tolist()
        [0.5, 0.01]
    """

    def __init__(
        self,
        positive_counts: Tensor | Sequence[float] | Any,
        total_count: float | Tensor | Any,
        tau: float = 1.0,
        zero_count: str | None = None,
    ):
        positives = checked_counts(positive_counts, "positive_counts")
        total = torch.as_tensor(total_count, dtype=torch.float64, device="cpu").expand_as(positives)
        negatives = total - positives
        if zero_count not in (None, "laplace", "floor"):
            raise ValueError(f"zero_count is {zero_count!r}, but it must be None, 'laplace' or 'floor'")
        if not torch.compiler.is_compiling():
            if not bool((torch.isfinite(total) & (negatives >= 0)).all()):
                raise ValueError(f"total_count is {total_count!r}, but it must be finite and at least positive_counts")
            if zero_count is None and bool(((positives == 0) | (negatives == 0)).any()):
                raise ValueError(
                    "positive_counts has a class that is never, or always, present, whose log-odds are infinite: "
                    "choose zero_count='laplace' (add one of each) or 'floor' (zero counts as one)"
                )
        if zero_count == "laplace":
            positives, negatives = positives + 1, negatives + 1
        elif zero_count == "floor":
            positives, negatives = positives.clamp_min(1), negatives.clamp_min(1)
        self._set(positives, negatives, tau)

    @classmethod
    def from_probabilities(cls, probabilities: Tensor | Sequence[float] | Any, tau: float = 1.0) -> BinaryPrior:
        """Make a prior from the probability of each class to be present (C,), between 0 and 1.

        Raises:
            ValueError: a probability that is not between 0 and 1.
        """
        values = checked_counts(probabilities, "probabilities")
        if not torch.compiler.is_compiling() and not bool(((values > 0) & (values < 1)).all()):
            raise ValueError("probabilities must be between 0 and 1, each of them without the ends")
        prior = cls.__new__(cls)
        prior._set(values, 1 - values, tau)
        return prior

    def _set(self, positives: Tensor, negatives: Tensor, tau: float) -> None:
        self.tau = checked_tau(tau)
        self.probabilities = positives / (positives + negatives)  # (C,) float64 on CPU
        self.log_prior = torch.log(positives) - torch.log(negatives)  # log-odds (C,), float64 on CPU
        self.bias = self.tau * self.log_prior  # (C,) float64 on CPU

    @property
    def num_classes(self) -> int:
        """C."""
        return self.bias.numel()

    def __repr__(self) -> str:
        return f"BinaryPrior(num_classes={self.num_classes}, tau={self.tau:g})"
