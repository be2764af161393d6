"""Every loss of the sigmoid family as a torch.nn.Module; functional.sigmoid_loss has the details.

The only state is `weight` and `pos_weight` (as in torch). Priors, alpha and gamma of each class are constants of the
constructor (LossModule).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from imbalance_kernels import objectives
from imbalance_kernels.binary_objectives import Asymmetric, QualityFocal, Varifocal
from imbalance_kernels.keywords import legacy_reduction
from imbalance_kernels.loss_module import LossModule
from imbalance_kernels.objectives import Objective
from imbalance_kernels.ops.sigmoid_loss import sigmoid_loss
from imbalance_kernels.options import SigmoidOptions
from imbalance_kernels.priors import BinaryPrior
from imbalance_kernels.sigmoid_keywords import binary_bias, checked_alpha, sigmoid_options_of, with_own_sigmoid

__all__ = [
    "AsymmetricLoss",
    "QualityFocalLoss",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
    "SigmoidHardTruncationLoss",
    "SigmoidLoss",
    "SigmoidPolyLoss",
    "SigmoidSmoothAccuracyLoss",
    "SigmoidSoftTruncationLoss",
    "VarifocalLoss",
]


class SigmoidLoss(LossModule):
    """Any objective of each logit's own log-odds of the truth: the base of every sigmoid-family loss.

    Args:
        objective: one of imbalance_kernels.objectives or imbalance_kernels.binary_objectives; cross-entropy by default.
        alpha: weight of positives, 1 - alpha of negatives; a number, (C,), or None for neither.
        weight: class weights (C,); in the state dict, and may be reassigned at any time.
        pos_weight: weight of positives alone, (C,) or one number for all classes; as weight.
        prior: a `BinaryPrior`, or the probability of each class to be present (C,).
        ignore_index, reduction, class_dim, inplace, impl: see imbalance_kernels.functional.sigmoid_loss.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument that does not fit; what depends on the number of classes is raised by forward.

    Example:
        >>> loss = SigmoidLoss(objectives.GeneralizedCrossEntropy(0.5), alpha=0.25)
        >>> loss(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 3, 3])).backward()  # 3: background
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
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
    ) -> None:
        super().__init__(
            ignore_index=ignore_index, reduction=reduction, class_dim=class_dim, inplace=inplace, impl=impl
        )
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.objective = objectives.CrossEntropy() if objective is None else objective
        alpha = checked_alpha(alpha)
        self.alpha = None if isinstance(alpha, Tensor) else alpha
        self._register_constants(
            alpha=alpha if isinstance(alpha, Tensor) else None,
            bias=None if prior is None else binary_bias(prior),
            class_parameter=self.objective.class_parameter(),
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss, () or of input's shape for reduction="none".

        Args:
            input: logits (N, C), (C,), (N, C, d1, ...), or (..., C) with class_dim=-1.
            target: class labels of input's shape without its classes, C is the background; lists of classes, one
                dimension more, padded with ignore_index; or dense labels of input's shape, floating point or bool.
            sample_weight: weights of the labels' shape, or of input's; what has weight 0 costs exactly 0.
            normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0.
        """
        return sigmoid_loss(
            input,
            target,
            self._options(input),
            sample_weight=sample_weight,
            normalizer=normalizer,
            class_dim=self.class_dim,
            impl=self.impl,
        )

    def _options(self, input: Tensor) -> SigmoidOptions:
        options = sigmoid_options_of(
            self.objective.with_class_parameter(self._constant("class_parameter", input)),
            alpha=self._constant("alpha", input) if self.alpha is None else self.alpha,
            weight=self.weight,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            inplace=self.inplace,
        )
        return replace(options, bias=self._constant("bias", input))

    def extra_repr(self) -> str:
        """Return the objective and the options that are not at their defaults."""
        return self._shown(
            self.objective.name,
            alpha="per class" if self._constants["alpha"] is not None else self.alpha,
            class_parameter=self._constants["class_parameter"] is not None or None,
            weight=self.weight is not None or None,
            pos_weight=self.pos_weight is not None or None,
            prior=self._constants["bias"] is not None or None,
        )


class SigmoidCrossEntropyLoss(SigmoidLoss):
    """``loss = -pos_weight y log p - (1 - y) log(1 - p)``: drop-in for torch.nn.BCEWithLogitsLoss, plus a prior.

    Args:
        weight: class weights (C,), along the class dimension (torch broadcasts from the last one).
        size_average, reduce, reduction: as in torch (two of them deprecated there).
        pos_weight: weight of positives, (C,) or one number for all classes.
        keywords: the other shared keyword arguments of `SigmoidLoss`.

    Example:
        >>> loss = SigmoidCrossEntropyLoss(prior=BinaryPrior([10, 1], total_count=1000))
        >>> value = loss(torch.randn(4, 2), torch.tensor([0, 2, 1, 2]))
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(
            weight=weight,
            reduction=legacy_reduction(size_average, reduce, reduction),
            pos_weight=pos_weight,
            **with_own_sigmoid(type(self), keywords, objective=objectives.CrossEntropy()),
        )


class SigmoidFocalLoss(SigmoidLoss):
    """``loss = -alpha_t (1 - p_t)^gamma log p_t``, p_t of the label. Lin et al. 2017.

    Labels between 0 and 1 as torchvision has them: ``p_t = y p + (1 - y) (1 - p)``, times the cross-entropy.

    Args:
        alpha: weight of positives, 1 - alpha of negatives; a number, (C,), negative or None for neither.
        gamma: at least 0, a number or (C,).
        keywords: the shared keyword arguments of `SigmoidLoss`.

    Example:
        >>> loss = SigmoidFocalLoss(alpha=0.25, gamma=2.0)
        >>> anchors, labels = torch.randn(6, 80), torch.tensor([80, 80, 3, 80, -100, 17])  # 80 is the background
        >>> value = loss(anchors, labels, normalizer=(labels < 80).logical_and(labels >= 0).sum())
    """

    def __init__(self, alpha: float | Tensor | None = 0.25, gamma: float | Tensor = 2.0, **keywords: Any) -> None:
        super().__init__(
            **with_own_sigmoid(type(self), keywords, objective=objectives.Focal(gamma), alpha=alpha),
        )


class SigmoidHardTruncationLoss(SigmoidLoss):
    """``loss = -log p_t`` where ``p_t < threshold``, half of it at equality, else 0. kexue.fm 4733.

    Half weight at equality lets a zero-initialised head train, whose p_t is 0.5 everywhere.

    Args:
        threshold: a probability in (0, 1].
        keywords: the shared keyword arguments of `SigmoidLoss`.

    Example:
        >>> loss = SigmoidHardTruncationLoss(threshold=0.7)
    """

    def __init__(self, threshold: float = 0.5, **keywords: Any) -> None:
        super().__init__(**with_own_sigmoid(type(self), keywords, objective=objectives.HardTruncation(threshold)))


class SigmoidSoftTruncationLoss(SigmoidLoss):
    """``loss = -sigmoid(-K d) log p_t``, ``d = (2 y - 1) x``. kexue.fm 4733; K = 1 is focal loss with gamma = 1.

    Args:
        sharpness: K, above 0.
        keywords: the shared keyword arguments of `SigmoidLoss`.

    Example:
        >>> loss = SigmoidSoftTruncationLoss(sharpness=2.0)
    """

    def __init__(self, sharpness: float = 1.0, **keywords: Any) -> None:
        super().__init__(**with_own_sigmoid(type(self), keywords, objective=objectives.SoftTruncation(sharpness)))


class SigmoidPolyLoss(SigmoidLoss):
    """``loss = -log p_t + epsilon (1 - p_t)``. Leng et al. 2022.

    Args:
        epsilon: at least -1.
        keywords: the shared keyword arguments of `SigmoidLoss`.

    Example:
        >>> loss = SigmoidPolyLoss(epsilon=2.0)
    """

    def __init__(self, epsilon: float = 1.0, **keywords: Any) -> None:
        super().__init__(**with_own_sigmoid(type(self), keywords, objective=objectives.Poly(epsilon)))


class SigmoidSmoothAccuracyLoss(SigmoidLoss):
    """``loss = 1 - p_t``: the error rate of each label with the probability in place of a decision. kexue.fm 7708.

    Example:
        >>> loss = SigmoidSmoothAccuracyLoss()
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**with_own_sigmoid(type(self), keywords, objective=objectives.SmoothAccuracy()))


class QualityFocalLoss(SigmoidLoss):
    """``loss = |y - p|^beta BCE(x, y)`` for labels y that are scores in [0, 1]. Li et al. 2020.

    Args:
        beta: at least 1.
        keywords: the shared keyword arguments of `SigmoidLoss`.

    Example:
        >>> loss = QualityFocalLoss(beta=2.0)
        >>> value = loss(torch.randn(4, 3), torch.rand(4, 3))
    """

    def __init__(self, beta: float = 2.0, **keywords: Any) -> None:
        super().__init__(**with_own_sigmoid(type(self), keywords, objective=QualityFocal(beta)))


class VarifocalLoss(SigmoidLoss):
    """``loss = y BCE(x, y)`` where y > 0, else ``-alpha p^gamma log(1 - p)``. Zhang et al. 2021.

    Args:
        alpha: weight of negatives.
        gamma: at least 0.
        keywords: the shared keyword arguments of `SigmoidLoss`.

    Example:
        >>> loss = VarifocalLoss(alpha=0.75, gamma=2.0)
        >>> value = loss(torch.randn(4, 3), torch.rand(4, 3) * torch.eye(4, 3))
    """

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0, **keywords: Any) -> None:
        super().__init__(**with_own_sigmoid(type(self), keywords, objective=Varifocal(gamma, alpha)))


class AsymmetricLoss(SigmoidLoss):
    """``loss = -(1 - p)^gamma_pos log p`` of positives, ``-m^gamma_neg log(1 - m)`` of negatives. Ridnik et al. 2021.

    ``m = max(p - clip, 0)``. The gradient is the formula's own; the authors' code holds the powers constant by default.

    Args:
        gamma_neg: at least 0.
        gamma_pos: at least 0.
        clip: in [0, 1): negatives below this probability cost nothing.
        reduction: "sum" by default, as the authors have it.
        keywords: the other shared keyword arguments of `SigmoidLoss`.

    Example:
        >>> loss = AsymmetricLoss(gamma_neg=4.0, gamma_pos=1.0, clip=0.05)
        >>> value = loss(torch.randn(4, 3), torch.tensor([[0, -100], [2, 1], [-100, -100], [1, -100]]))
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        reduction: str = "sum",
        **keywords: Any,
    ) -> None:
        super().__init__(
            reduction=reduction,
            **with_own_sigmoid(type(self), keywords, objective=Asymmetric(gamma_neg, gamma_pos, clip)),
        )
