"""Every loss as a function, and the primitives that they are made of.

Each twin of a module takes the module's own arguments and the keyword arguments of `softmax_loss`, which computes
them all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalance_kernels import objectives
from imbalance_kernels.batch_statistics import (
    ColumnSums,
    column_sums,
    dice_loss,
    f1_weighted_cross_entropy,
    smooth_f1_loss,
)
from imbalance_kernels.keywords import SOFTMAX_CALL_KEYWORDS, legacy_reduction, options_of, reject_alpha, with_own
from imbalance_kernels.logit_map import AngularMargin, CircleMargin, LogitMap, Margin
from imbalance_kernels.multilabel import multilabel_softmax_loss
from imbalance_kernels.objectives import Objective
from imbalance_kernels.ops import softmax_loss as softmax_loss_op
from imbalance_kernels.ops.checks import check_class_vector
from imbalance_kernels.ops.linear import linear_loss, linear_split, prepare_linear
from imbalance_kernels.ops.softmax_loss import prepare
from imbalance_kernels.ops.target_and_rest import split_rows
from imbalance_kernels.ops.two_temperatures import FORMS, two_temperature_loss
from imbalance_kernels.options import SoftmaxOptions
from imbalance_kernels.priors import Prior, chosen_prior, ldam_margins, vs_factors
from imbalance_kernels.priors.arguments import AnyPrior
from imbalance_kernels.sigmoid_functional import (
    asymmetric_loss,
    quality_focal_loss,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    sigmoid_hard_truncation_loss,
    sigmoid_loss,
    sigmoid_poly_loss,
    sigmoid_smooth_accuracy_loss,
    sigmoid_soft_truncation_loss,
    varifocal_loss,
)
from imbalance_kernels.softmax_row import Loss

__all__ = [
    "ColumnSums",
    "TargetAndRest",
    "arcface_loss",
    "asymmetric_loss",
    "balanced_softmax_loss",
    "circle_loss",
    "column_sums",
    "cosface_loss",
    "cross_entropy",
    "dice_loss",
    "f1_weighted_cross_entropy",
    "focal_loss",
    "generalized_cross_entropy",
    "hard_truncation_loss",
    "ldam_loss",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_target_and_rest",
    "logit_adjusted_loss",
    "multilabel_softmax_loss",
    "poly_loss",
    "quality_focal_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "sigmoid_hard_truncation_loss",
    "sigmoid_loss",
    "sigmoid_poly_loss",
    "sigmoid_smooth_accuracy_loss",
    "sigmoid_soft_truncation_loss",
    "smooth_accuracy_loss",
    "smooth_f1_loss",
    "soft_truncation_loss",
    "softmax_loss",
    "target_and_rest",
    "target_log_odds",
    "target_log_probs",
    "varifocal_loss",
    "vs_loss",
]


def softmax_loss(
    input: Tensor,
    target: Tensor,
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
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    return_log_probs: bool = False,
    return_correct: bool = False,
) -> Loss:
    """Any objective of the log-odds of the truth, on mapped logits: the general form of every loss here.

    ``z_j = scale * factor_j * softcap(x_j) + tau * log prior_j``, the target with its margin first;
    ``loss = weight_t * objective(z_t - log sum_{j != t} exp(z_j))``, plus label smoothing and z-loss.

    Args:
        input: raw logits (N, C), (C,), (N, C, d1, ...) or, with ``class_dim=-1``, (..., C); float32, float64,
            bfloat16 or float16. A logit of -inf masks its class.
        target: class indices int64 or int32, of input's shape without its class dimension; for cross-entropy also class
            probabilities of input's shape.
        objective: one of imbalance_kernels.objectives; cross-entropy by default.
        weight: class weights (C,).
        ignore_index: a target that does not count; its rows give exactly 0.
        reduction: "none", "sum" or "mean"; the mean divides by the sum of sample_weight * weight_t over valid rows
            (with class probabilities: of sample_weight, or N).
        label_smoothing: eps in [0, 1]: (1 - eps) times the loss + (eps / C) sum_j weight_j (log-sum-exp - z_j), over
            unmasked classes. For another objective than cross-entropy this is our own definition.
        prior: a `Prior`, a `RunningPrior` as it stands (a function does not count: call its `update` before), or class
            probabilities (C,): adds tau * log prior.
        margin: taken off the target's capped logit before scale, a number or (C,); or an `AngularMargin` on cosines.
        scale: multiplies every logit (an inverse temperature).
        factor: multiplies class by class (C,).
        softcap: k > 0: caps raw logits to k tanh(x / k).
        z_loss: adds z_loss * log-sum-exp^2, which carries sample_weight and not the class weight.
        cosines: input holds cosines, which is checked for the targets where that waits for no device.
        class_dim: 1 as torch has it, or -1 for classes last.
        inplace: the gradient may overwrite input's storage (in forward; float16 and "none" in backward); whoever
            reads it later sees the gradient, and an operation that saved it for its own backward raises there.
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.
        sample_weight: weights of rows, of target's shape.
        normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0.
        return_log_probs: return log p_t of the effective logits too, whatever the objective, smoothing and z-loss.
        return_correct: return too whether the target is what the raw logits (before prior, margin, scale) predict: no
            class's is above its own, so that ties are correct.

    Returns:
        The loss, () or of target's shape for "none"; float32 for half-precision input. With `return_log_probs` or
        `return_correct` a `LossOutput` (loss, log_probs, correct), where log_probs, in the loss's dtype, and correct,
        bool, are of target's shape and detached, or None if not asked for. Where a target does not count (it is
        ignored, or the normalizer is 0) they are 0 and False, in a row that is NaN they are NaN and False. Both come
        from the sweep that makes the loss; with impl="cuda" and "triton", and for losses with two temperatures, what is
        correct takes one more read of the logits (fused, of two temperatures and of radii, one more product).

    Raises:
        ValueError: a shape, device or number that does not fit (the message names the argument); return_log_probs or
            return_correct with class probabilities, which name no one class.
        TypeError: a dtype that is not supported, or an unknown keyword.
        IndexError: a target outside [0, C) that is not ignore_index (on an accelerator the row is NaN instead, unless
            IMBALANCE_KERNELS_CHECK=1).

    Example:
        >>> logits = torch.randn(4, 3, requires_grad=True)
        >>> loss = softmax_loss(logits, torch.tensor([0, 2, 1, 1]), objectives.Focal(2.0), prior=Prior([90, 9, 1]))
        >>> loss.backward()
    """
    options = options_of(
        objective,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        prior=prior,
        margin=margin,
        scale=scale,
        factor=factor,
        softcap=softcap,
        z_loss=z_loss,
        inplace=inplace,
        cosines=cosines,
    )
    return softmax_loss_op.softmax_loss(
        input,
        target,
        options,
        sample_weight=sample_weight,
        normalizer=normalizer,
        class_dim=class_dim,
        impl=impl,
        return_log_probs=return_log_probs,
        return_correct=return_correct,
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    **keywords: Any,
) -> Loss:
    """``loss = -log p_t``: torch.nn.functional.cross_entropy in its positional order, with all shared keywords.

    Example:
        >>> loss = cross_entropy(torch.randn(4, 3), torch.tensor([0, 2, 1, -100]), label_smoothing=0.1)
    """
    return softmax_loss(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=legacy_reduction(size_average, reduce, reduction),
        label_smoothing=label_smoothing,
        **with_own(cross_entropy, keywords, objective=objectives.CrossEntropy()),
    )


def logit_adjusted_loss(
    input: Tensor,
    target: Tensor,
    class_counts: Tensor | Any | None = None,
    tau: float = 1.0,
    *,
    zero_count: str | None = None,
    prior: AnyPrior | None = None,
    **keywords: Any,
) -> Loss:
    """``loss = -log softmax(x + tau log prior)_t``. kexue.fm 7615; Menon et al. 2021.

    Args:
        input: logits, see `softmax_loss`.
        target: class indices or probabilities, see `softmax_loss`.
        class_counts: (C,), or give `prior`, one of them.
        tau: temperature of the prior.
        zero_count: what a zero count means, see `Prior`.
        prior: a `Prior` or a `RunningPrior` (which have their own tau), or class probabilities (C,).
        keywords: the shared keyword arguments of `softmax_loss`.

    Raises:
        ValueError: both or neither of class_counts and prior; a zero count without zero_count.

    Example:
        >>> loss = logit_adjusted_loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), [90, 9, 1])
    """
    return softmax_loss(
        input,
        target,
        **with_own(logit_adjusted_loss, keywords, prior=chosen_prior(class_counts, tau, zero_count, prior)),
    )


def balanced_softmax_loss(input: Tensor, target: Tensor, class_counts: Tensor | Any, **keywords: Any) -> Loss:
    """``loss = -log softmax(x + log n)_t``: logit adjustment with tau = 1. Ren et al. 2020.

    Example:
        >>> loss = balanced_softmax_loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), [90, 9, 1])
    """
    return softmax_loss(input, target, **with_own(balanced_softmax_loss, keywords, prior=Prior(class_counts)))


def focal_loss(input: Tensor, target: Tensor, gamma: float | Tensor = 2.0, **keywords: Any) -> Loss:
    """``loss = -(1 - p_t)^gamma log p_t``. Lin et al. 2017; kexue.fm 4733.

    Args:
        input: logits, see `softmax_loss`.
        target: class indices, see `softmax_loss`.
        gamma: at least 0, a number or (C,); 0 is cross-entropy, exactly.
        keywords: the shared keyword arguments of `softmax_loss`.

    Example:
        >>> loss = focal_loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), gamma=0.5)
    """
    reject_alpha(keywords)
    return softmax_loss(input, target, **with_own(focal_loss, keywords, objective=objectives.Focal(gamma)))


def hard_truncation_loss(input: Tensor, target: Tensor, threshold: float = 0.5, **keywords: Any) -> Loss:
    """``loss = -log p_t`` where ``p_t < threshold``, half of it at equality, else 0. kexue.fm 4733.

    Example:
        >>> loss = hard_truncation_loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), threshold=0.7)
    """
    return softmax_loss(
        input, target, **with_own(hard_truncation_loss, keywords, objective=objectives.HardTruncation(threshold))
    )


def soft_truncation_loss(
    input: Tensor,
    target: Tensor,
    sharpness: float = 1.0,
    form: str = "softmax_neg",
    **keywords: Any,
) -> Loss:
    """``loss = -r_t log p_t``, ``r = softmax(-K z)`` ("softmax_neg"). kexue.fm 4733.

    The other forms weight by ``1 - softmax(K z)_t`` ("one_minus_softmax", its reader's) and by ``sigmoid(-K log-odds)``
    ("log_odds", one trip over the logits). All are equal for two classes, and tend to hard truncation for large K.

    Args:
        input: logits, see `softmax_loss`.
        target: class indices, see `softmax_loss`.
        sharpness: K, above 0.
        form: "softmax_neg", "one_minus_softmax" or "log_odds"; the first two read the logits twice, and not in place.
        keywords: the shared keyword arguments of `softmax_loss`.

    Example:
        >>> loss = soft_truncation_loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), sharpness=2.0, form="log_odds")
    """
    objective = objectives.SoftTruncation(sharpness)
    keywords = with_own(soft_truncation_loss, keywords, objective=objective)
    if form == "log_odds":
        return softmax_loss(input, target, **keywords)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, but it must be one of {(*FORMS, 'log_odds')}")
    call = {name: keywords.pop(name) for name in SOFTMAX_CALL_KEYWORDS if name in keywords}
    return two_temperature_loss(input, target, options_of(**keywords), form, **call)


def poly_loss(input: Tensor, target: Tensor, epsilon: float = 1.0, **keywords: Any) -> Loss:
    """``loss = -log p_t + epsilon (1 - p_t)``. Leng et al. 2022.

    Example:
        >>> loss = poly_loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), epsilon=2.0)
    """
    return softmax_loss(input, target, **with_own(poly_loss, keywords, objective=objectives.Poly(epsilon)))


def generalized_cross_entropy(input: Tensor, target: Tensor, q: float = 0.7, **keywords: Any) -> Loss:
    """``loss = (1 - p_t^q) / q``, robust to noisy labels. Zhang and Sabuncu 2018.

    Example:
        >>> loss = generalized_cross_entropy(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), q=0.5)
    """
    return softmax_loss(
        input, target, **with_own(generalized_cross_entropy, keywords, objective=objectives.GeneralizedCrossEntropy(q))
    )


def smooth_accuracy_loss(input: Tensor, target: Tensor, **keywords: Any) -> Loss:
    """``loss = 1 - p_t``: the error rate with the probability in place of the argmax. kexue.fm 7708.

    Example:
        >>> loss = smooth_accuracy_loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]))
    """
    return softmax_loss(
        input, target, **with_own(smooth_accuracy_loss, keywords, objective=objectives.SmoothAccuracy())
    )


def ldam_loss(
    input: Tensor,
    target: Tensor,
    class_counts: Tensor | Any,
    max_margin: float = 0.5,
    scale: float = 30.0,
    **keywords: Any,
) -> Loss:
    """``loss = -log softmax(scale (x - m_t [j = t]))_t``, ``m_j = max_margin (n_min / n_j)^(1/4)``. Cao et al. 2019.

    Args:
        input: cosines (N, C), see `softmax_loss`.
        target: class indices, see `softmax_loss`.
        class_counts: (C,), none zero; they set margins, never a prior.
        max_margin: the rarest class's margin, in units of the cosine.
        scale: multiplies cosines and margins.
        keywords: the shared keyword arguments of `softmax_loss`, but margin.

    Example:
        >>> loss = ldam_loss(torch.rand(4, 3), torch.tensor([0, 2, 1, 1]), [90, 9, 1])
    """
    return softmax_loss(
        input, target, **with_own(ldam_loss, keywords, margin=ldam_margins(class_counts, max_margin), scale=scale)
    )


def cosface_loss(
    input: Tensor,
    target: Tensor,
    margin: float | Tensor = 0.35,
    scale: float = 64.0,
    **keywords: Any,
) -> Loss:
    """``loss = -log softmax(scale (x - margin [j = t]))_t`` on cosines x. Wang et al. 2018 (CosFace, AM-softmax).

    Example:
        >>> loss = cosface_loss(torch.rand(4, 3), torch.tensor([0, 2, 1, 1]))
    """
    return softmax_loss(input, target, **with_own(cosface_loss, keywords, margin=margin, scale=scale, cosines=True))


def arcface_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 0.5,
    scale: float = 64.0,
    straight_through: bool = False,
    **keywords: Any,
) -> Loss:
    """``loss = -log softmax(scale cos(theta_j + margin [j = t]))_t`` on cosines. Deng et al. 2019 (ArcFace).

    Args:
        input: cosines (N, C), see `softmax_loss`.
        target: class indices, see `softmax_loss`.
        margin: radians, from 0 to pi; past theta + margin = pi the target is x - margin sin(margin).
        scale: multiplies the cosines.
        straight_through: the angle's slope is 1 instead of the true one.
        keywords: the shared keyword arguments of `softmax_loss`, but margin.

    Example:
        >>> loss = arcface_loss(torch.rand(4, 3), torch.tensor([0, 2, 1, 1]))
    """
    angle = AngularMargin(m2=margin, straight_through=straight_through)
    return softmax_loss(input, target, **with_own(arcface_loss, keywords, margin=angle, scale=scale))


def circle_loss(
    input: Tensor,
    target: Tensor,
    margin: float = 0.25,
    scale: float = 256.0,
    detach: bool = True,
    **keywords: Any,
) -> Loss:
    """Circle loss at class level: cross-entropy of cosines s that pull and push in their own measure. Sun et al. 2020.

    ``z_t = scale relu(1 + m - s_t) (s_t - (1 - m))``, ``z_j = scale relu(s_j + m) (s_j - m)``.

    Args:
        input: cosines (N, C), see `softmax_loss`.
        target: class indices, see `softmax_loss`.
        margin: m.
        scale: the paper's gamma.
        detach: the paper's gradient, in which the relu factors are constants.
        keywords: the shared keyword arguments of `softmax_loss`, but margin.

    Example:
        >>> loss = circle_loss(torch.rand(4, 3), torch.tensor([0, 2, 1, 1]))
    """
    return softmax_loss(
        input, target, **with_own(circle_loss, keywords, margin=CircleMargin(margin, detach), scale=scale)
    )


def vs_loss(
    input: Tensor,
    target: Tensor,
    class_counts: Tensor | Any,
    gamma: float = 0.3,
    tau: float = 1.0,
    *,
    zero_count: str | None = None,
    **keywords: Any,
) -> Loss:
    """``loss = -log softmax((n_j / n_max)^gamma x_j + tau log prior_j)_t``; tau = 0 is CDT. Kini et al. 2021.

    Example:
        >>> loss = vs_loss(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), [90, 9, 1])
    """
    prior = Prior(class_counts, tau, zero_count)
    return softmax_loss(input, target, **with_own(vs_loss, keywords, prior=prior, factor=vs_factors(prior, gamma)))


class TargetAndRest(NamedTuple):
    """A row's split, each of target's shape; target and rest are relative to shift, a constant of differentiation."""

    target: Tensor
    rest: Tensor
    shift: Tensor

    @property
    def log_odds(self) -> Tensor:
        """log(p_t / (1 - p_t))."""
        return self.target - self.rest

    @property
    def log_prob(self) -> Tensor:
        """log p_t, accurate where p_t is near 1; 0 for an ignored row."""
        return torch.nn.functional.logsigmoid(self.log_odds)

    @property
    def logsumexp(self) -> Tensor:
        """log sum_j exp(z_j), over all classes."""
        return self.shift + torch.logaddexp(self.target, self.rest)


def target_and_rest(
    input: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    class_dim: int = 1,
    impl: str | None = None,
) -> TargetAndRest:
    """Each row as two numbers: ``target = z_t - shift`` and ``rest = log sum_{j != t} exp(z_j - shift)``.

    Differentiable with one read of the logits forward, one read and one write backward: write any loss on them in plain
    PyTorch. Gradients are those of ``target + shift`` and ``rest + shift``.

    Args:
        input: logits, see `softmax_loss`; ``z_j = scale * softcap(x_j) + bias_j``.
        target: class indices.
        scale: multiplies every logit.
        bias: class vector (C,), a constant.
        softcap: k > 0, caps raw logits to k tanh(x / k).
        ignore_index: such rows give target 0, rest -inf, shift 0 (log-odds +inf, log-probability 0) and no gradient.
        class_dim: 1 as torch has it, or -1 for classes last.
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.

    Returns:
        TargetAndRest of target's shape in float32 (float64 for float64).

    Raises:
        ValueError: class probabilities, or what `softmax_loss` raises.

    Example:
        >>> logits = torch.randn(4, 3, requires_grad=True)
        >>> split = target_and_rest(logits, torch.tensor([0, 2, 1, 1]))
        >>> hinge = torch.relu(1 - split.log_odds).mean()  # a loss of your own
        >>> hinge.backward()
    """
    if target.is_floating_point():
        raise ValueError("target holds class probabilities, but target_and_rest needs class indices")
    if -input.dim() <= class_dim < input.dim() or input.dim() == 1:  # else as_rows says so
        check_class_vector("bias", bias, input.shape[class_dim if input.dim() > 1 else 0])
    options = SoftmaxOptions(
        objective=objectives.CrossEntropy(),  # not read; torch.compile cannot take it from the field's default
        logit_map=LogitMap(scale=float(scale), bias=bias, softcap=softcap),
        ignore_index=ignore_index,
    )
    rows, options, impl = prepare(input, target, options, class_dim, impl)
    split = split_rows(rows.logits, rows.target, options, impl)
    return TargetAndRest(*(vector.reshape(rows.shape) for vector in split[:3]))


def target_log_odds(input: Tensor, target: Tensor, **keywords: Any) -> Tensor:
    """Return ``log(p_t / (1 - p_t))`` of target's shape, differentiable; arguments as in `target_and_rest`.

    Example:
        >>> odds = target_log_odds(torch.randn(4, 3), torch.tensor([0, 2, 1, 1]))
    """
    return target_and_rest(input, target, **keywords).log_odds


def target_log_probs(input: Tensor, target: Tensor, **keywords: Any) -> Tensor:
    """Return ``log p_t`` of target's shape, differentiable, 0 for ignored rows; arguments as in `target_and_rest`.

    Example:
        >>> log_probs = target_log_probs(torch.randn(2, 5, 3), torch.randint(3, (2, 5)), class_dim=-1)
    """
    return target_and_rest(input, target, **keywords).log_prob


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    chunk_bytes: int | None = None,
    accumulate: str = "float32",
    impl: str | None = None,
    return_log_probs: bool = False,
    return_correct: bool = False,
    **keywords: Any,
) -> Loss:
    """``loss = cross_entropy(input linear_weight^T + linear_bias, target)`` without the logits.

    torch.nn.functional.linear_cross_entropy with its arguments, for a weight (C, D); other losses have it as a method,
    `loss.linear`.

    Args:
        input: (..., D).
        linear_weight: (C, D).
        target: class indices (...) or class probabilities (..., C).
        linear_bias: (C,).
        weight: class weights (C,).
        reduction: see `softmax_loss`.
        ignore_index: see `softmax_loss`; None is -100.
        label_smoothing: see `softmax_loss`.
        sample_weight: weights of rows, of target's shape.
        normalizer: replaces the divisor, see `softmax_loss`.
        chunk_bytes: memory for a chunk's logits, see `imbalance_kernels.SoftmaxLoss.linear`.
        accumulate: "float32" or "weight", see there.
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.
        return_log_probs: return a `LossOutput`, see `softmax_loss`.
        return_correct: the same.
        keywords: the other keyword arguments of `softmax_loss` that describe a loss: prior, margin, softcap, ...

    Raises:
        ValueError, TypeError, IndexError: as `softmax_loss` does.

    Example:
        >>> head = torch.nn.Linear(8, 100, bias=False)
        >>> loss = linear_cross_entropy(torch.randn(4, 8), head.weight, torch.tensor([5, 0, 99, 7]))
        >>> loss.backward()
    """
    own = {"weight": weight, "reduction": reduction, "label_smoothing": label_smoothing}
    own["ignore_index"] = -100 if ignore_index is None else ignore_index
    options = options_of(**with_own(linear_cross_entropy, keywords, **own))
    return linear_loss(
        input,
        linear_weight,
        target,
        linear_bias,
        options,
        sample_weight=sample_weight,
        normalizer=normalizer,
        chunk_bytes=chunk_bytes,
        accumulate=accumulate,
        impl=impl,
        return_log_probs=return_log_probs,
        return_correct=return_correct,
    )


def linear_target_and_rest(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    accumulate: str = "float32",
    impl: str | None = None,
) -> TargetAndRest:
    """`target_and_rest` of the logits ``input linear_weight^T + linear_bias``, which are never held.

    Write any loss on it in plain PyTorch; backward makes the logits again, a chunk at a time, for whatever upstream
    gradients.

    Args:
        input: (..., D).
        linear_weight: (C, D).
        target: class indices (...).
        linear_bias: (C,), learned; `bias` is a constant added after scale and soft cap.
        scale: see `target_and_rest`.
        bias: see `target_and_rest`.
        softcap: see `target_and_rest`.
        ignore_index: see `target_and_rest`.
        chunk_bytes: memory for a chunk's logits, see `imbalance_kernels.SoftmaxLoss.linear`.
        accumulate: "float32" or "weight", see there.
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.

    Returns:
        TargetAndRest of target's shape in float32 (float64 for float64).

    Example:
        >>> head = torch.nn.Linear(8, 100, bias=False)
        >>> split = linear_target_and_rest(torch.randn(4, 8), head.weight, torch.tensor([5, 0, 99, 7]))
        >>> torch.relu(1 - split.log_odds).mean().backward()  # a loss of your own
    """
    if target.is_floating_point():
        raise ValueError("target holds class probabilities, but linear_target_and_rest needs class indices")
    if linear_weight.dim() == 2:  # else prepare_linear says so
        check_class_vector("bias", bias, linear_weight.shape[0])
    options = SoftmaxOptions(
        objective=objectives.CrossEntropy(),  # not read; torch.compile cannot take it from the field's default
        logit_map=LogitMap(scale=float(scale), bias=bias, softcap=softcap),
        ignore_index=ignore_index,
    )
    linear, rows, options = prepare_linear(
        input, linear_weight, target, linear_bias, options, chunk_bytes=chunk_bytes, accumulate=accumulate, impl=impl
    )
    split = linear_split(linear, rows.target, options)
    return TargetAndRest(*(vector.reshape(rows.shape) for vector in split[:3]))


def linear_log_probs(input: Tensor, linear_weight: Tensor, target: Tensor, **keywords: Any) -> Tensor:
    """Return ``log p_t`` of target's shape, differentiable, 0 for ignored rows: of preference and policy training.

    Args:
        input: (..., D).
        linear_weight: (C, D).
        target: class indices (...).
        keywords: those of `linear_target_and_rest`; ``scale`` is an inverse temperature.

    Example:
        >>> head = torch.nn.Linear(8, 100, bias=False)
        >>> log_probs = linear_log_probs(torch.randn(2, 5, 8), head.weight, torch.randint(100, (2, 5)))
        >>> log_probs.sum(dim=1).shape
        torch.Size([2])
    """
    return linear_target_and_rest(input, linear_weight, target, **keywords).log_prob
