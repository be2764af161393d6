"""Every loss as a torch.nn.Module, drop-in for torch.nn.CrossEntropyLoss; functional.py has the formulas' details.

State is `weight` (as in torch) and a `RunningPrior`, where one is given. A fixed prior, margins and factors are
constants of the constructor (LossModule).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels import objectives
from imbalance_kernels.keywords import legacy_reduction, options_of, reject_alpha, with_own
from imbalance_kernels.logit_map import AngularMargin, CircleMargin, Margin
from imbalance_kernels.loss_module import LossModule
from imbalance_kernels.objectives import Objective
from imbalance_kernels.ops.linear import linear_loss
from imbalance_kernels.ops.softmax_loss import softmax_loss
from imbalance_kernels.ops.two_temperatures import FORMS, linear_two_temperature_loss, two_temperature_loss
from imbalance_kernels.options import SoftmaxOptions
from imbalance_kernels.priors import (
    Prior,
    RunningPrior,
    chosen_prior,
    ldam_margins,
    prior_bias,
    vs_factors,
    warn_if_corrected_twice,
)
from imbalance_kernels.priors.arguments import AnyPrior
from imbalance_kernels.softmax_row import Loss

__all__ = [
    "ArcFaceLoss",
    "BalancedSoftmaxLoss",
    "CircleLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "HardTruncationLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "PolyLoss",
    "SmoothAccuracyLoss",
    "SoftTruncationLoss",
    "SoftmaxLoss",
    "VSLoss",
]


class SoftmaxLoss(LossModule):
    """Any objective of the log-odds of the truth, on mapped logits: the base of every softmax-family loss.

    Args:
        objective: one of imbalance_kernels.objectives; cross-entropy by default.
        weight: class weights (C,); in the state dict, and may be reassigned at any time.
        ignore_index, reduction, label_smoothing, margin, scale, factor, softcap, z_loss, cosines: see
            imbalance_kernels.functional.softmax_loss.
        prior: a `Prior` or class probabilities (C,); or a `RunningPrior`, which in training counts the targets of each
            call first.
        class_dim, inplace, impl: see there.
        chunk_bytes, accumulate: of `linear`, see there.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument that does not fit; what depends on the number of classes is raised by forward.

    Warns:
        UserWarning: weight is close to 1 / prior beside a prior, when it is given or reassigned: this corrects the
            imbalance twice (`imbalance_kernels.priors.effective_prior`).

    Example:
        >>> loss = SoftmaxLoss(objectives.Focal(1.0), prior=Prior([90, 9, 1]), label_smoothing=0.1)
        >>> loss(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])).backward()
    """

    weight: Tensor | None
    running_prior: RunningPrior | None
    _bias: Tensor | None
    _factor: Tensor | None
    _margin: Tensor | None
    _class_parameter: Tensor | None

    def __init__(
        self,
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
        cosines: bool = False,
        class_dim: int = 1,
        inplace: bool = False,
        impl: str | None = None,
        chunk_bytes: int | None = None,
        accumulate: str = "float32",
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, reduction=reduction, class_dim=class_dim, inplace=inplace, impl=impl
        )
        running_prior = prior if isinstance(prior, RunningPrior) else None
        options = options_of(
            objective,
            prior=None if running_prior is not None else prior,
            margin=margin,
            scale=scale,
            factor=factor,
            softcap=softcap,
            cosines=cosines,
        )
        self.register_buffer("weight", weight)
        self.running_prior = running_prior
        self._log_prior = None if prior is None or running_prior is not None else prior_bias(prior, 1.0)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.chunk_bytes = chunk_bytes
        self.accumulate = accumulate
        self._exact = options.to(torch.device("cpu"), torch.float64)  # the objective and the logit map
        margin = self._exact.logit_map.margin
        self._register_constants(
            bias=self._exact.logit_map.bias,
            factor=self._exact.logit_map.factor,
            margin=margin if isinstance(margin, Tensor) else None,
            class_parameter=self._exact.objective.class_parameter(),
        )
        self._warn_if_corrected_twice()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._warn_if_corrected_twice()

    def _warn_if_corrected_twice(self) -> None:
        if self.weight is not None:
            log_prior = self._log_prior if self.running_prior is None else self.running_prior.log_prior
            warn_if_corrected_twice(self.weight, log_prior)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        return_log_probs: bool = False,
        return_correct: bool = False,
    ) -> Loss:
        """Return the loss, () or of target's shape for reduction="none"; or a `LossOutput`, where it is asked for.

        Args:
            input: raw logits (N, C), (C,), (N, C, d1, ...), or (..., C) with class_dim=-1.
            target: class indices of input's shape without its classes; for cross-entropy also class probabilities.
            sample_weight: weights of rows, of target's shape.
            normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0.
            return_log_probs: return a `LossOutput` with the targets' log-probabilities, see
                imbalance_kernels.functional.softmax_loss.
            return_correct: return a `LossOutput` with whether the raw logits predict the target, see there.
        """
        counts = self._counts_with(target, sample_weight, self.class_dim)
        options = self._options(input, counts).reporting(return_log_probs, return_correct)
        loss = self._of_logits(input, target, options, sample_weight, normalizer)
        self._keep(counts)
        return loss

    def linear(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        return_log_probs: bool = False,
        return_correct: bool = False,
    ) -> Loss:
        """Return the loss of the logits ``input linear_weight^T + linear_bias``, which are never held.

        Rows go through one buffer of at most `chunk_bytes` (None: 256 MiB on a CPU, 1 GiB on a GPU, and at least 128
        rows). With "mean" and "sum" the gradients are made in forward, in three products; with "none" backward makes
        the logits again. On a GPU rows that are ignored are multiplied all the same, as zeros. `inplace` means nothing
        here: the buffer is always overwritten.

        Args:
            input: (..., D); under autocast it is cast as a linear layer's would be.
            linear_weight: (C, D), of input's dtype, or float32 with an input in half precision. For halves its gradient
                is summed in float32 and rounded once (``accumulate="float32"``, an argument of the module), or summed
                in its own dtype (``accumulate="weight"``), which saves that sum's memory.
            target: class indices (...), or for cross-entropy class probabilities (..., C).
            linear_bias: (C,).
            sample_weight: weights of rows, of target's shape.
            normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0.
            return_log_probs: as in forward, from each chunk's logits as they pass.
            return_correct: the same; losses with two temperatures and radii make the logits once more for it.

        Returns:
            The loss, () or of target's shape for reduction="none"; float32 for half-precision input. With
            `return_log_probs` or `return_correct` a `LossOutput`.

        Raises:
            ValueError, TypeError, IndexError: as in forward.
            TypeError: a DTensor, whose sharded form does not exist yet.
            ValueError: accumulate="weight" with a float16 weight, whose range a sum over rows may leave.

        Example:
            >>> head = torch.nn.Linear(8, 100, bias=False)
            >>> loss = FocalLoss().linear(torch.randn(4, 8), head.weight, torch.tensor([5, 0, 99, 7]))
            >>> loss.backward()
        """
        counts = self._counts_with(target, sample_weight, -1)
        options = self._options(input, counts).reporting(return_log_probs, return_correct)
        loss = self._of_linear(input, linear_weight, target, linear_bias, options, sample_weight, normalizer)
        self._keep(counts)
        return loss

    def _of_logits(
        self,
        input: Tensor,
        target: Tensor,
        options: SoftmaxOptions,
        sample_weight: Tensor | None,
        normalizer: Tensor | float | None,
    ) -> Loss:
        return softmax_loss(
            input,
            target,
            options,
            sample_weight=sample_weight,
            normalizer=normalizer,
            class_dim=self.class_dim,
            impl=self.impl,
        )

    def _of_linear(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        options: SoftmaxOptions,
        sample_weight: Tensor | None,
        normalizer: Tensor | float | None,
    ) -> Loss:
        return linear_loss(
            input,
            linear_weight,
            target,
            linear_bias,
            options,
            sample_weight=sample_weight,
            normalizer=normalizer,
            chunk_bytes=self.chunk_bytes,
            accumulate=self.accumulate,
            impl=self.impl,
        )

    def _counts_with(self, target: Tensor, sample_weight: Tensor | None, class_dim: int) -> Tensor | None:
        """Return the running prior's counts with this batch, or None where nothing counts it."""
        prior = self.running_prior
        if prior is None or not prior.training:
            return None
        return prior.counts_with(
            target, ignore_index=self.ignore_index, class_dim=class_dim, sample_weight=sample_weight
        )

    def _keep(self, counts: Tensor | None) -> None:
        """Keep the running prior's counts, when the loss is there: what raised has changed nothing."""
        if self.running_prior is not None and counts is not None:
            self.running_prior.keep(counts)

    def _options(self, input: Tensor, counts: Tensor | None = None) -> SoftmaxOptions:
        """Return the options for an input, with the running prior of these counts, or as it stands."""
        exact = self._exact
        objective, logit_map = exact.objective, exact.logit_map
        if input.dtype != torch.float64:
            objective = objective.with_class_parameter(self._class_parameter)
            if self._bias is not None or self._factor is not None or self._margin is not None:
                margin = logit_map.margin if self._margin is None else self._margin
                logit_map = replace(logit_map, bias=self._bias, factor=self._factor, margin=margin)
        prior = self.running_prior
        if prior is not None:
            logit_map = replace(logit_map, bias=prior.bias if counts is None else prior.bias_of(counts))
        return SoftmaxOptions(
            objective=objective,
            logit_map=logit_map,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=float(self.label_smoothing),
            z_loss=float(self.z_loss),
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        """Return the objective and the options that are not at their defaults."""
        logit_map = self._exact.logit_map
        return self._shown(
            self._exact.objective.name,
            class_parameter=self._class_parameter is not None or None,
            weight=self.weight is not None or None,
            prior=logit_map.bias is not None or None,
            factor=logit_map.factor is not None or None,
            margin="per class" if isinstance(logit_map.margin, Tensor) else logit_map.margin,
            scale=None if logit_map.scale == 1 else logit_map.scale,
            softcap=logit_map.softcap,
            label_smoothing=self.label_smoothing or None,
            z_loss=self.z_loss or None,
        )


class CrossEntropyLoss(SoftmaxLoss):
    """``loss = -log p_t``: drop-in for torch.nn.CrossEntropyLoss, with its positional order.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in torch (two of them deprecated
            there).
        keywords: the other shared keyword arguments of `SoftmaxLoss`.

    Example:
        >>> loss = CrossEntropyLoss(label_smoothing=0.1)
        >>> value = loss(torch.randn(4, 3), torch.tensor([0, 2, 1, -100]))
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **keywords: Any,
    ) -> None:
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            reduction=legacy_reduction(size_average, reduce, reduction),
            label_smoothing=label_smoothing,
            **with_own(type(self), keywords, objective=objectives.CrossEntropy()),
        )


class LogitAdjustedLoss(SoftmaxLoss):
    """``loss = -log softmax(x + tau log prior)_t``. kexue.fm 7615; Menon et al. 2021.

    Args:
        class_counts: (C,), or give `prior`, one of them.
        tau: temperature of the prior; 1 is near optimal.
        zero_count: "laplace", "floor" or "exclude" for counts of zero, see `Prior`.
        prior: a `Prior` or a `RunningPrior` (which have their own tau), or class probabilities (C,).
        keywords: the other shared keyword arguments of `SoftmaxLoss`.

    Raises:
        ValueError: both or neither of class_counts and prior; a zero count without zero_count.

    Example:
        >>> loss = LogitAdjustedLoss([90, 9, 1])
        >>> value = loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]))
    """

    def __init__(
        self,
        class_counts: Tensor | Any | None = None,
        tau: float = 1.0,
        *,
        zero_count: str | None = None,
        prior: AnyPrior | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(**with_own(type(self), keywords, prior=chosen_prior(class_counts, tau, zero_count, prior)))


class BalancedSoftmaxLoss(SoftmaxLoss):
    """``loss = -log softmax(x + log n)_t``: logit adjustment with tau = 1. Ren et al. 2020.

    Args:
        class_counts: n (C,), none zero (`LogitAdjustedLoss` has policies for zeros).
        keywords: the shared keyword arguments of `SoftmaxLoss`, but prior.

    Example:
        >>> loss = BalancedSoftmaxLoss([90, 9, 1])
    """

    def __init__(self, class_counts: Tensor | Any, **keywords: Any) -> None:
        super().__init__(**with_own(type(self), keywords, prior=Prior(class_counts)))


class FocalLoss(SoftmaxLoss):
    """``loss = -(1 - p_t)^gamma log p_t`` of a softmax. Lin et al. 2017; kexue.fm 4733.

    Args:
        gamma: at least 0, a number or a tensor (C,) indexed by the target; 0 is cross-entropy, exactly.
        keywords: the shared keyword arguments of `SoftmaxLoss`; class weights are `weight`, not alpha.

    Example:
        >>> loss = FocalLoss(gamma=2.0, prior=Prior([90, 9, 1]))
    """

    def __init__(self, gamma: float | Tensor = 2.0, **keywords: Any) -> None:
        reject_alpha(keywords)
        super().__init__(**with_own(type(self), keywords, objective=objectives.Focal(gamma)))


class HardTruncationLoss(SoftmaxLoss):
    """``loss = -log p_t`` where ``p_t < threshold``, half of it at equality, else 0. kexue.fm 4733.

    Args:
        threshold: a probability in (0, 1].
        keywords: the shared keyword arguments of `SoftmaxLoss`.

    Example:
        >>> loss = HardTruncationLoss(threshold=0.7)
    """

    def __init__(self, threshold: float = 0.5, **keywords: Any) -> None:
        super().__init__(**with_own(type(self), keywords, objective=objectives.HardTruncation(threshold)))


class SoftTruncationLoss(SoftmaxLoss):
    """``loss = -r_t log p_t``, ``r = softmax(-K z)``, and two relatives. kexue.fm 4733.

    Args:
        sharpness: K, above 0.
        form: "softmax_neg" (the formula above), "one_minus_softmax" (``1 - softmax(K z)_t`` in place of r_t) or
            "log_odds" (``sigmoid(-K log-odds)``, one trip over the logits). The first two read the logits twice, and
            not in place; `linear` makes them twice.
        keywords: the shared keyword arguments of `SoftmaxLoss`.

    Example:
        >>> loss = SoftTruncationLoss(sharpness=2.0, form="log_odds")
    """

    def __init__(self, sharpness: float = 1.0, form: str = "softmax_neg", **keywords: Any) -> None:
        if form not in (*FORMS, "log_odds"):
            raise ValueError(f"form is {form!r}, but it must be one of {(*FORMS, 'log_odds')}")
        super().__init__(**with_own(type(self), keywords, objective=objectives.SoftTruncation(sharpness)))
        if self.inplace and form != "log_odds":
            raise ValueError(
                f"inplace=True is not possible with form={form!r}, which reads the logits twice: use form='log_odds'"
            )
        self.form = form

    def _of_logits(
        self,
        input: Tensor,
        target: Tensor,
        options: SoftmaxOptions,
        sample_weight: Tensor | None,
        normalizer: Tensor | float | None,
    ) -> Loss:
        if self.form == "log_odds":
            return super()._of_logits(input, target, options, sample_weight, normalizer)
        return two_temperature_loss(
            input,
            target,
            options,
            self.form,
            sample_weight=sample_weight,
            normalizer=normalizer,
            class_dim=self.class_dim,
            impl=self.impl,
        )

    def _of_linear(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None,
        options: SoftmaxOptions,
        sample_weight: Tensor | None,
        normalizer: Tensor | float | None,
    ) -> Loss:
        if self.form == "log_odds":
            return super()._of_linear(input, linear_weight, target, linear_bias, options, sample_weight, normalizer)
        return linear_two_temperature_loss(
            input,
            linear_weight,
            target,
            linear_bias,
            options,
            self.form,
            sample_weight=sample_weight,
            normalizer=normalizer,
            chunk_bytes=self.chunk_bytes,
            accumulate=self.accumulate,
            impl=self.impl,
        )


class PolyLoss(SoftmaxLoss):
    """``loss = -log p_t + epsilon (1 - p_t)``. Leng et al. 2022.

    Args:
        epsilon: at least -1.
        keywords: the shared keyword arguments of `SoftmaxLoss`.

    Example:
        >>> loss = PolyLoss(epsilon=2.0)
    """

    def __init__(self, epsilon: float = 1.0, **keywords: Any) -> None:
        super().__init__(**with_own(type(self), keywords, objective=objectives.Poly(epsilon)))


class GeneralizedCrossEntropyLoss(SoftmaxLoss):
    """``loss = (1 - p_t^q) / q``, robust to noisy labels. Zhang and Sabuncu 2018.

    Args:
        q: in (0, 1].
        keywords: the shared keyword arguments of `SoftmaxLoss`.

    Example:
        >>> loss = GeneralizedCrossEntropyLoss(q=0.5)
    """

    def __init__(self, q: float = 0.7, **keywords: Any) -> None:
        super().__init__(**with_own(type(self), keywords, objective=objectives.GeneralizedCrossEntropy(q)))


class SmoothAccuracyLoss(SoftmaxLoss):
    """``loss = 1 - p_t``: the error rate with the probability in place of the argmax. kexue.fm 7708.

    Example:
        >>> loss = SmoothAccuracyLoss()
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**with_own(type(self), keywords, objective=objectives.SmoothAccuracy()))


class LDAMLoss(SoftmaxLoss):
    """``loss = -log softmax(scale (x - m_t [j = t]))_t``, ``m_j = max_margin (n_min / n_j)^(1/4)``. Cao et al. 2019.

    Args:
        class_counts: (C,), none zero; they set margins, never a prior.
        max_margin: the rarest class's margin, in units of the cosine.
        scale: multiplies cosines and margins.
        keywords: the shared keyword arguments of `SoftmaxLoss`, but margin.

    Example:
        >>> loss = LDAMLoss([90, 9, 1])
    """

    def __init__(
        self,
        class_counts: Tensor | Any,
        max_margin: float = 0.5,
        scale: float = 30.0,
        **keywords: Any,
    ) -> None:
        super().__init__(**with_own(type(self), keywords, margin=ldam_margins(class_counts, max_margin), scale=scale))


class CosFaceLoss(SoftmaxLoss):
    """``loss = -log softmax(scale (x - margin [j = t]))_t`` on cosines x. Wang et al. 2018 (CosFace, AM-softmax).

    Args:
        margin: taken off the target's cosine, a number or (C,).
        scale: multiplies the cosines.
        keywords: the shared keyword arguments of `SoftmaxLoss`.

    Example:
        >>> loss = CosFaceLoss(margin=0.35, scale=64.0)
    """

    def __init__(self, margin: float | Tensor = 0.35, scale: float = 64.0, **keywords: Any) -> None:
        super().__init__(**with_own(type(self), keywords, margin=margin, scale=scale, cosines=True))


class ArcFaceLoss(SoftmaxLoss):
    """``loss = -log softmax(scale cos(theta_j + margin [j = t]))_t`` on cosines. Deng et al. 2019 (ArcFace).

    Args:
        margin: radians, from 0 to pi; past theta + margin = pi the target is x - margin sin(margin).
        scale: multiplies the cosines.
        straight_through: the angle's slope is 1 instead of the true one.
        keywords: the shared keyword arguments of `SoftmaxLoss`, but margin.

    Raises:
        ValueError: margin above pi: its unit is radians.

    Example:
        >>> loss = ArcFaceLoss(margin=0.5, scale=64.0)
    """

    def __init__(
        self,
        margin: float = 0.5,
        scale: float = 64.0,
        straight_through: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(
            **with_own(
                type(self), keywords, margin=AngularMargin(m2=margin, straight_through=straight_through), scale=scale
            )
        )


class CircleLoss(SoftmaxLoss):
    """Circle loss at class level, on cosines s. Sun et al. 2020.

    ``z_t = scale relu(1 + m - s_t) (s_t - (1 - m))``, ``z_j = scale relu(s_j + m) (s_j - m)``, then cross-entropy.

    Args:
        margin: m.
        scale: the paper's gamma.
        detach: the paper's gradient, in which the relu factors are constants.
        keywords: the shared keyword arguments of `SoftmaxLoss`, but margin and softcap.

    Example:
        >>> loss = CircleLoss(margin=0.25, scale=256.0)
    """

    def __init__(self, margin: float = 0.25, scale: float = 256.0, detach: bool = True, **keywords: Any) -> None:
        super().__init__(**with_own(type(self), keywords, margin=CircleMargin(margin, detach), scale=scale))


class VSLoss(SoftmaxLoss):
    """``loss = -log softmax((n_j / n_max)^gamma x_j + tau log prior_j)_t``; tau = 0 is CDT. Kini et al. 2021.

    Args:
        class_counts: n (C,).
        gamma: exponent of the factors, at least 0.
        tau: temperature of the prior.
        zero_count: "laplace", "floor" or "exclude" for counts of zero, see `Prior`.
        keywords: the shared keyword arguments of `SoftmaxLoss`, but prior.

    Example:
        >>> loss = VSLoss([90, 9, 1], gamma=0.3, tau=1.0)
    """

    def __init__(
        self,
        class_counts: Tensor | Any,
        gamma: float = 0.3,
        tau: float = 1.0,
        *,
        zero_count: str | None = None,
        **keywords: Any,
    ) -> None:
        prior = Prior(class_counts, tau, zero_count)
        super().__init__(**with_own(type(self), keywords, prior=prior, factor=vs_factors(prior, gamma)))
