"""Softmax losses for any number of labels: the function and the module; imbalance_kernels.functional has the former."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from imbalance_kernels.loss_module import LossModule
from imbalance_kernels.ops.multilabel_softmax import multilabel_softmax
from imbalance_kernels.options import MultilabelOptions
from imbalance_kernels.priors import BinaryPrior
from imbalance_kernels.sigmoid_keywords import binary_bias

__all__ = ["MultilabelSoftmaxLoss", "multilabel_softmax_loss"]


def multilabel_softmax_loss(
    input: Tensor,
    target: Tensor,
    threshold: float = 0.0,
    *,
    prior: BinaryPrior | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_dim: int = 1,
    inplace: bool = False,
    impl: str | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """``loss = log(1 + sum_neg exp(z_j)) + log(1 + sum_pos exp(-z_j))``, z = x - threshold: ZLPR.

    Cross-entropy of a softmax over the labels of a row against its other classes: it asks every positive to be above
    the threshold and every negative below, and is balanced whatever their numbers. Predict the classes whose logit is
    above the threshold. Labels y between 0 and 1 weigh the exponentials: 1 - y in the first sum, y in the second.

    Value and gradient take one trip over the logits, which are read where they lie, classes last or first. Labels never
    become one-hot; a positive is left out of the first sum and a negative out of the second, neither is subtracted.

    Args:
        input: logits (N, C), (C,), (N, C, d1, ...) or, with ``class_dim=-1``, (..., C); float32, float64, bfloat16 or
            float16. A logit of -inf masks its class, which then costs nothing whatever its label. One of +inf costs a
            negative +inf, with a gradient of NaN, and a positive nothing.
        target: lists of classes, int64 or int32, of input's shape with a length K in place of its classes as the last
            dimension, padded with ignore_index; or dense labels of input's shape, any floating point (0 to 1) or bool;
            or class labels of input's shape without its classes, one of each row, C for none (the background).
        threshold: what a logit must exceed for its class to be predicted; 0 as in the source. It moves all logits.
        prior: a `BinaryPrior`, or the probability of each class to be present (C,): adds its log-odds to the logits.
        ignore_index: padding of lists; of class labels, a row that costs exactly 0 and is not in the mean's divisor.
        reduction: "none", "sum" or "mean" over rows; the mean divides by the number of rows, whatever their weights.
        class_dim: 1 as torch has it, or -1 for classes last.
        inplace: the gradient may overwrite input's storage (in forward; float16 and "none" in backward).
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.
        sample_weight: weights of rows, of input's shape without its classes; a row of weight 0 costs exactly 0.
        normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0.

    Returns:
        The loss, () or one number for each row for "none"; float32 for half-precision input.

    Raises:
        ValueError: a shape, device or number that does not fit (the message names the argument); integers of input's
            shape, which could be dense labels or lists of classes.
        TypeError: a dtype that is not supported.
        IndexError: a label that is no class, not the background and not ignore_index. On an accelerator, unless
            IMBALANCE_KERNELS_CHECK=1, it makes its row NaN instead; a row of a wrong list stays in the mean's divisor.

    Source: kexue.fm 7359; Su et al. 2022, "ZLPR"; soft labels: kexue.fm 9064.

    Example:
        >>> logits = torch.randn(3, 5, requires_grad=True)
        >>> labels = torch.tensor([[0, 3], [2, -100], [-100, -100]])  # lists of classes; the last row has none
        >>> multilabel_softmax_loss(logits, labels).backward()
    """
    return multilabel_softmax(
        input,
        target,
        MultilabelOptions(
            bias=None if prior is None else binary_bias(prior),
            ignore_index=ignore_index,
            reduction=reduction,
            inplace=inplace,
        ),
        threshold=_checked_threshold(threshold),
        sample_weight=sample_weight,
        normalizer=normalizer,
        class_dim=class_dim,
        impl=impl,
    )


class MultilabelSoftmaxLoss(LossModule):
    """``loss = log(1 + sum_neg exp(z_j)) + log(1 + sum_pos exp(-z_j))``, z = x - threshold: ZLPR. kexue.fm 7359.

    Args:
        threshold: what a logit must exceed for its class to be predicted.
        prior: a `BinaryPrior`, or the probability of each class to be present (C,).
        ignore_index, reduction, class_dim, inplace, impl: see imbalance_kernels.functional.multilabel_softmax_loss.

    Raises:
        ValueError: an argument that does not fit; what depends on the number of classes is raised by forward.

    Example:
        >>> loss = MultilabelSoftmaxLoss()
        >>> logits, labels = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5) < 0.3
        >>> loss(logits, labels).backward()
        >>> predicted = logits > 0
    """

    def __init__(
        self,
        threshold: float = 0.0,
        *,
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
        self.threshold = _checked_threshold(threshold)
        self._register_constants(bias=None if prior is None else binary_bias(prior))

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss, () or one number for each row for reduction="none".

        Args:
            input: logits (N, C), (C,), (N, C, d1, ...), or (..., C) with class_dim=-1.
            target: lists of classes padded with ignore_index, dense labels of input's shape, or one label of each row.
            sample_weight: weights of rows; a row of weight 0 costs exactly 0.
            normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0.
        """
        options = MultilabelOptions(None, self.ignore_index, self.reduction, self.inplace)
        return multilabel_softmax(
            input,
            target,
            replace(options, bias=self._constant("bias", input)),
            threshold=self.threshold,
            sample_weight=sample_weight,
            normalizer=normalizer,
            class_dim=self.class_dim,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """Return the options that are not at their defaults."""
        return self._shown(
            threshold=self.threshold or None,
            prior=self._constants["bias"] is not None or None,
        )


def _checked_threshold(threshold: float) -> float:
    if not math.isfinite(threshold):
        raise ValueError(f"threshold is {threshold!r}, but it must be finite")
    return float(threshold)
