"""The losses of the sigmoid family as functions; imbalance_kernels.functional has them all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from imbalance_kernels import objectives
from imbalance_kernels.binary_objectives import Asymmetric, QualityFocal, Varifocal
from imbalance_kernels.keywords import legacy_reduction
from imbalance_kernels.objectives import Objective
from imbalance_kernels.ops import sigmoid_loss as sigmoid_loss_op
from imbalance_kernels.priors import BinaryPrior
from imbalance_kernels.sigmoid_keywords import sigmoid_options_of, with_own_sigmoid

__all__ = [
    "asymmetric_loss",
    "quality_focal_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "sigmoid_hard_truncation_loss",
    "sigmoid_loss",
    "sigmoid_poly_loss",
    "sigmoid_smooth_accuracy_loss",
    "sigmoid_soft_truncation_loss",
    "varifocal_loss",
]


def sigmoid_loss(
    input: Tensor,
    target: Tensor,
    objective: Objective | None = None,
    *,
    alpha: float | Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    prior: BinaryPrior | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_dim: int = 1,
    inplace: bool = False,
    impl: str | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Any objective of each logit's own log-odds of the truth: the general form of every sigmoid-family loss.

    ``z = x + tau log(prior_j / (1 - prior_j))``; a label y = 1 costs ``objective(z)``, a label 0 ``objective(-z)``, one
    between mixes the two. Nothing of the logits' size exists beside them and their gradient; labels never become
    one-hot.

    Args:
        input: logits (N, C), (C,), (N, C, d1, ...) or, with ``class_dim=-1``, (..., C); float32, float64, bfloat16 or
            float16. Images with classes first are read as they lie.
        target: int64 or int32 class labels, of input's shape without its class dimension: from 0 to C - 1, and C for
            the background, which is no class; or lists of classes, with one dimension more, padded with ignore_index;
            or dense labels of input's shape, any floating point (0 to 1) or bool.
        objective: one of imbalance_kernels.objectives or binary_objectives; cross-entropy by default.
        alpha: weight of positives, 1 - alpha of negatives; a number, (C,), or None (or negative) for neither.
        weight: class weights (C,), of positives and negatives alike.
        pos_weight: weights of positives, (C,) or one number for all classes.
        prior: a `BinaryPrior`, or the probability of each class to be present (C,).
        ignore_index: a class label that does not count: its logits cost exactly 0. Dense labels have none: use
            sample_weight.
        reduction: "none", "sum" or "mean"; the mean divides by the number of logits, those of ignored labels not
            counted. Weights are not in the divisor, as in torch.nn.BCEWithLogitsLoss.
        class_dim: 1 as torch has it, or -1 for classes last.
        inplace: the gradient may overwrite input's storage (in forward; float16 and "none" in backward).
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.
        sample_weight: weights of the labels' shape, or of input's; what has weight 0 costs exactly 0.
        normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0. Detectors divide by
            their number of positives.

    Returns:
        The loss, () or of input's shape for "none"; float32 for half-precision input.

    Raises:
        ValueError: a shape, device or number that does not fit (the message names the argument); integers of input's
            shape, which could be dense labels or lists of classes.
        TypeError: a dtype that is not supported, or an unknown keyword.
        IndexError: a label that is no class, not the background and not ignore_index (on an accelerator its logits are
            NaN instead, unless IMBALANCE_KERNELS_CHECK=1).

    Example:
        >>> logits = torch.randn(4, 3, requires_grad=True)
        >>> labels = torch.tensor([0, 3, 1, -100])  # a class, the background, a class, ignored
        >>> loss = sigmoid_loss(logits, labels, objectives.Focal(2.0), alpha=0.25, normalizer=2)
        >>> loss.backward()
    """
    options = sigmoid_options_of(
        objective,
        alpha=alpha,
        weight=weight,
        pos_weight=pos_weight,
        prior=prior,
        ignore_index=ignore_index,
        reduction=reduction,
        inplace=inplace,
    )
    return sigmoid_loss_op.sigmoid_loss(
        input, target, options, sample_weight=sample_weight, normalizer=normalizer, class_dim=class_dim, impl=impl
    )


def sigmoid_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    """``loss = -pos_weight y log p - (1 - y) log(1 - p)``: F.binary_cross_entropy_with_logits in its positional order.

    Example:
        >>> loss = sigmoid_cross_entropy(torch.randn(4, 3), torch.tensor([0, 2, 3, -100]))  # 3: background
    """
    return sigmoid_loss(
        input,
        target,
        weight=weight,
        reduction=legacy_reduction(size_average, reduce, reduction),
        pos_weight=pos_weight,
        **with_own_sigmoid(sigmoid_cross_entropy, keywords, objective=objectives.CrossEntropy()),
    )


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | Tensor | None = 0.25,
    gamma: float | Tensor = 2.0,
    reduction: str = "none",
    **keywords: Any,
) -> Tensor:
    """``loss = -alpha_t (1 - p_t)^gamma log p_t``: torchvision.ops.sigmoid_focal_loss, its signature and values.

    Beyond torchvision: int64 or int32 labels instead of one-hot ones, and all keyword arguments of `sigmoid_loss`. The
    gradient is finite for every gamma. Half-precision inputs give a float32 loss.

    Args:
        inputs: logits, see `sigmoid_loss`.
        targets: dense labels of inputs' shape, or class labels, see `sigmoid_loss`.
        alpha: weight of positives, 1 - alpha of negatives; a number, (C,), negative or None for neither.
        gamma: at least 0, a number or (C,).
        reduction: "none", "mean" or "sum".
        keywords: the shared keyword arguments of `sigmoid_loss`.

    Source: Lin et al. 2017.

    Example:
        >>> logits, labels = torch.randn(4, 3), torch.tensor([0, 3, 1, 3])  # 3: background
        >>> loss = sigmoid_focal_loss(logits, labels, reduction="sum", normalizer=2)
    """
    return sigmoid_loss(
        inputs,
        targets,
        alpha=alpha,
        reduction=reduction,
        **with_own_sigmoid(sigmoid_focal_loss, keywords, objective=objectives.Focal(gamma)),
    )


def sigmoid_hard_truncation_loss(input: Tensor, target: Tensor, threshold: float = 0.5, **keywords: Any) -> Tensor:
    """``loss = -log p_t`` where ``p_t < threshold``, half of it at equality, else 0. kexue.fm 4733.

    Example:
        >>> loss = sigmoid_hard_truncation_loss(torch.zeros(4, 3), torch.tensor([0, 2, 3, 3]))
    """
    own = with_own_sigmoid(sigmoid_hard_truncation_loss, keywords, objective=objectives.HardTruncation(threshold))
    return sigmoid_loss(input, target, **own)


def sigmoid_soft_truncation_loss(input: Tensor, target: Tensor, sharpness: float = 1.0, **keywords: Any) -> Tensor:
    """``loss = -sigmoid(-K d) log p_t``, ``d = (2 y - 1) x``. kexue.fm 4733.

    Example:
        >>> loss = sigmoid_soft_truncation_loss(torch.randn(4, 3), torch.tensor([0, 2, 3, 3]), sharpness=2.0)
    """
    own = with_own_sigmoid(sigmoid_soft_truncation_loss, keywords, objective=objectives.SoftTruncation(sharpness))
    return sigmoid_loss(input, target, **own)


def sigmoid_poly_loss(input: Tensor, target: Tensor, epsilon: float = 1.0, **keywords: Any) -> Tensor:
    """``loss = -log p_t + epsilon (1 - p_t)``. Leng et al. 2022.

    Example:
        >>> loss = sigmoid_poly_loss(torch.randn(4, 3), torch.tensor([0, 2, 3, 3]))
    """
    own = with_own_sigmoid(sigmoid_poly_loss, keywords, objective=objectives.Poly(epsilon))
    return sigmoid_loss(input, target, **own)


def sigmoid_smooth_accuracy_loss(input: Tensor, target: Tensor, **keywords: Any) -> Tensor:
    """``loss = 1 - p_t``: the error rate of each label with the probability in place of a decision. kexue.fm 7708.

    Example:
        >>> loss = sigmoid_smooth_accuracy_loss(torch.randn(4, 3), torch.tensor([0, 2, 3, 3]))
    """
    own = with_own_sigmoid(sigmoid_smooth_accuracy_loss, keywords, objective=objectives.SmoothAccuracy())
    return sigmoid_loss(input, target, **own)


def quality_focal_loss(input: Tensor, target: Tensor, beta: float = 2.0, **keywords: Any) -> Tensor:
    """``loss = |y - p|^beta BCE(x, y)`` for labels y that are scores in [0, 1]. Li et al. 2020.

    Example:
        >>> loss = quality_focal_loss(torch.randn(4, 3), torch.rand(4, 3))
    """
    own = with_own_sigmoid(quality_focal_loss, keywords, objective=QualityFocal(beta))
    return sigmoid_loss(input, target, **own)


def varifocal_loss(input: Tensor, target: Tensor, alpha: float = 0.75, gamma: float = 2.0, **keywords: Any) -> Tensor:
    """``loss = y BCE(x, y)`` where y > 0, else ``-alpha p^gamma log(1 - p)``. Zhang et al. 2021.

    Example:
        >>> loss = varifocal_loss(torch.randn(4, 3), torch.rand(4, 3) * torch.eye(4, 3))
    """
    own = with_own_sigmoid(varifocal_loss, keywords, objective=Varifocal(gamma, alpha))
    return sigmoid_loss(input, target, **own)


def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    reduction: str = "sum",
    **keywords: Any,
) -> Tensor:
    """``loss = -(1 - p)^gamma_pos log p`` of positives, ``-m^gamma_neg log(1 - m)`` of negatives, m = max(p - clip, 0).

    Ridnik et al. 2021 (ASL). The gradient is the formula's own; the authors' code holds the powers constant by default.

    Example:
        >>> labels = torch.tensor([[0, -100], [2, 1], [-100, -100], [1, -100]])  # lists of classes
        >>> loss = asymmetric_loss(torch.randn(4, 3), labels)
    """
    own = with_own_sigmoid(asymmetric_loss, keywords, objective=Asymmetric(gamma_neg, gamma_pos, clip))
    return sigmoid_loss(input, target, reduction=reduction, **own)
