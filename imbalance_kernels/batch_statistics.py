"""Losses of what a batch sums up to: soft counts of each class, and F1 made of them; functions and modules.

F1 is a ratio of sums over the whole batch, no mean of something of each row: it is made of three column sums
(`column_sums`), which are (C,) vectors, and everything after these is plain PyTorch. So is a loss of your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.objectives import CrossEntropy
from imbalance_kernels.ops import column_sums as column_sums_op
from imbalance_kernels.ops.checks import check_reduction
from imbalance_kernels.ops.column_sums import ColumnSums
from imbalance_kernels.ops.sigmoid_loss import sigmoid_loss
from imbalance_kernels.options import SigmoidOptions

__all__ = [
    "ColumnSums",
    "DiceLoss",
    "F1WeightedCrossEntropyLoss",
    "SmoothF1Loss",
    "column_sums",
    "dice_loss",
    "f1_weighted_cross_entropy",
    "smooth_f1_loss",
]

AVERAGES = ("per_class", "global")


def column_sums(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    from_softmax: bool = False,
    class_dim: int = 1,
    process_group: Any = None,
    impl: str | None = None,
) -> ColumnSums:
    """Sums over a batch, class by class: of p, of y p and of y, with ``p = sigmoid(x)``; differentiable in the logits.

    They are the soft counts of predictions, of true positives and of positives that F1, precision, recall and their
    relatives are made of. Labels never become one-hot, and nothing of the logits' size exists beside their gradient.
    The order of summation does not depend on chance.

    Args:
        input: logits (N, C), (C,), (N, C, d1, ...) or, with ``class_dim=-1``, (..., C); float32, float64, bfloat16 or
            float16. Images with classes first are read as they lie.
        target: class labels, lists of classes or dense labels as of `sigmoid_loss`, which see.
        ignore_index: a class label whose row does not count; padding of lists.
        sample_weight: weights of rows, of input's shape without its classes; a row of weight 0 adds nothing.
        from_softmax: p is the softmax over classes instead; a logit of -inf masks its class, and a row of nothing but
            these is NaN, as torch's softmax is.
        class_dim: 1 as torch has it, or -1 for classes last.
        process_group: a group of torch.distributed whose batches are summed up together, such as
            torch.distributed.group.WORLD; None is this process alone. Gradients are summed over the group too, so that
            after the averaging of DistributedDataParallel they are those of one process with the whole batch.
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.

    Returns:
        A NamedTuple `ColumnSums` of predicted, true_positives and positives (C,), and rows (); float32, float64 for
        float64 logits. The first two are differentiable.

    Raises:
        ValueError, TypeError, IndexError: as `sigmoid_loss`. On an accelerator, unless IMBALANCE_KERNELS_CHECK=1, a
            label that is no class makes predicted and true_positives NaN instead.

    Example:
        >>> logits = torch.randn(6, 3, requires_grad=True)
        >>> sums = column_sums(logits, torch.tensor([0, 3, 1, 1, -100, 3]))  # 3: background, -100: ignored
        >>> sums.positives.tolist(), float(sums.rows)
        ([1.0, 2.0, 0.0], 5.0)
        >>> recall = sums.true_positives / sums.positives.clamp_min(1)
        >>> (1 - recall).mean().backward()
    """
    return column_sums_op.column_sums(
        input,
        target,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        from_softmax=from_softmax,
        class_dim=class_dim,
        process_group=process_group,
        impl=impl,
    )


def smooth_f1_loss(
    input: Tensor,
    target: Tensor,
    average: str = "per_class",
    smooth: float = 0.0,
    from_softmax: bool = False,
    *,
    ignore_index: int = -100,
    class_dim: int = 1,
    process_group: Any = None,
    impl: str | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """``loss = 1 - (2 sum y p + smooth) / (sum (y + p) + smooth)``, sums over the batch: 1 - F1 of probabilities, Dice.

    A class without positives has no F1. With ``smooth=0`` it is left out of the mean over classes, and a batch without
    any costs 0 with a gradient of 0; with ``smooth`` above 0 it counts, and costs what is predicted of it.

    Args:
        input: logits, see `column_sums`.
        target: labels, see `column_sums`.
        average: "per_class" for the mean of the classes' losses, "global" for one F1 of all classes' sums.
        smooth: at least 0, added above and below.
        from_softmax: p is the softmax over classes instead of a sigmoid.
        ignore_index: a class label whose row does not count; padding of lists.
        class_dim: 1 as torch has it, or -1 for classes last.
        process_group: whose batches are summed up together, see `column_sums`.
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.
        sample_weight: weights of rows.

    Source: kexue.fm 7708; Milletari et al. 2016 (Dice).

    Example:
        >>> images, labels = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randint(4, (2, 8, 8))  # 3: background
        >>> smooth_f1_loss(images, labels, smooth=1.0).backward()
    """
    _check_f1(average, smooth)
    sums = column_sums(
        input,
        target,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        from_softmax=from_softmax,
        class_dim=class_dim,
        process_group=process_group,
        impl=impl,
    )
    twice_true, total, positives = _counts(sums, average)
    present = (positives > 0) | (smooth > 0)
    f1 = (twice_true + smooth) / torch.where(present, total + smooth, torch.ones_like(total))
    losses = torch.where(present, 1 - f1, torch.zeros_like(f1))
    return losses.sum() / present.sum().clamp_min(1)


def dice_loss(input: Tensor, target: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    """`smooth_f1_loss` by its other name: Dice of probabilities is their F1.

    Example:
        >>> loss = dice_loss(torch.randn(4, 3), torch.tensor([0, 2, 3, 1]), smooth=1.0)
    """
    return smooth_f1_loss(input, target, *arguments, **keywords)


def f1_weighted_cross_entropy(
    input: Tensor,
    target: Tensor,
    average: str = "per_class",
    smooth: float = 0.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_dim: int = 1,
    inplace: bool = False,
    process_group: Any = None,
    impl: str | None = None,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """``loss = -(1 - F1/2) y log p - (F1/2) (1 - y) log(1 - p)``, F1 of this batch's probabilities, a constant.

    The weights are those that p has in the gradient of 1 - F1; log p is in its place. A class without positives in the
    batch has F1 = 0, so that its negatives cost nothing then (a running average, `F1WeightedCrossEntropyLoss`, or
    ``smooth`` above 0 are ways out); one that is neither there nor predicted has F1 = 1.

    Args:
        input: logits, see `sigmoid_loss`; read twice, once for F1.
        target: labels, see `sigmoid_loss`.
        average: "per_class" for an F1 of each class, "global" for one of all classes' sums.
        smooth: at least 0: F1 = (2 sum y p + smooth) / (sum (y + p) + smooth).
        ignore_index: a class label whose row does not count; padding of lists.
        reduction: "none", "sum" or "mean", see `sigmoid_loss`.
        class_dim: 1 as torch has it, or -1 for classes last.
        inplace: the gradient may overwrite input's storage, see `sigmoid_loss`.
        process_group: whose batches F1 is of, see `column_sums`.
        impl: "reference", "cpu", "cuda", "triton" or None for the best one available.
        sample_weight: weights of rows, of F1's sums too.
        normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0.

    Source: kexue.fm 7708.

    Example:
        >>> logits, labels = torch.randn(6, 3, requires_grad=True), torch.tensor([0, 3, 1, 1, 2, 3])  # 3: background
        >>> f1_weighted_cross_entropy(logits, labels).backward()
    """
    _check_f1(average, smooth)
    with torch.no_grad():
        sums = column_sums(
            input,
            target,
            ignore_index=ignore_index,
            sample_weight=sample_weight,
            class_dim=class_dim,
            process_group=process_group,
            impl=impl,
        )
        f1 = _f1(sums, average, smooth)
    return _weighted_by_f1(
        f1,
        input,
        target,
        SigmoidOptions(CrossEntropy(), ignore_index=ignore_index, reduction=reduction, inplace=inplace),
        sample_weight=sample_weight,
        normalizer=normalizer,
        class_dim=class_dim,
        impl=impl,
    )


class SmoothF1Loss(torch.nn.Module):
    """``loss = 1 - (2 sum y p + smooth) / (sum (y + p) + smooth)``, sums over the batch: 1 - F1 of probabilities, Dice.

    A class without positives is left out of the mean with ``smooth=0`` and counts with more, see
    imbalance_kernels.functional.smooth_f1_loss. In a process group it is the loss of all batches together.

    Args:
        average: "per_class" or "global".
        smooth: at least 0, added above and below.
        from_softmax: p is the softmax over classes instead of a sigmoid.
        ignore_index, class_dim, process_group, impl: see imbalance_kernels.functional.column_sums.

    Source: kexue.fm 7708; Milletari et al. 2016 (Dice).

    Example:
        >>> loss = SmoothF1Loss(average="global", smooth=1.0)
        >>> loss(torch.randn(4, 3, requires_grad=True), torch.rand(4, 3) < 0.3).backward()
    """

    def __init__(
        self,
        average: str = "per_class",
        smooth: float = 0.0,
        from_softmax: bool = False,
        *,
        ignore_index: int = -100,
        class_dim: int = 1,
        process_group: Any = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        _check_f1(average, smooth)
        self.average = average
        self.smooth = float(smooth)
        self.from_softmax = from_softmax
        self.ignore_index = ignore_index
        self.class_dim = class_dim
        self.process_group = process_group
        self.impl = impl

    def forward(self, input: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """Return the loss ().

        Args:
            input: logits (N, C), (C,), (N, C, d1, ...), or (..., C) with class_dim=-1.
            target: class labels of input's shape without its classes, C is the background; lists of classes, one
                dimension more, padded with ignore_index; or dense labels of input's shape, floating point or bool.
            sample_weight: weights of rows; a row of weight 0 adds nothing.
        """
        return smooth_f1_loss(
            input,
            target,
            self.average,
            self.smooth,
            self.from_softmax,
            ignore_index=self.ignore_index,
            class_dim=self.class_dim,
            process_group=self.process_group,
            impl=self.impl,
            sample_weight=sample_weight,
        )

    def extra_repr(self) -> str:
        """Return the options."""
        softmax = ", from_softmax=True" if self.from_softmax else ""
        return f"average={self.average}, smooth={self.smooth:g}{softmax}"


DiceLoss = SmoothF1Loss


class F1WeightedCrossEntropyLoss(torch.nn.Module):
    """``loss = -(1 - F1/2) y log p - (F1/2) (1 - y) log(1 - p)``, F1 a constant, of the batch or a running average.

    A running average is one of the sums that F1 is made of, never of F1s: ``sums = momentum sums + (1 - momentum)
    batch's``, divided by what the batches weigh so far, in buffers of the state dict that training updates and
    evaluation reads. A batch whose sums are not finite is left out. Of a batch alone see
    imbalance_kernels.functional.f1_weighted_cross_entropy.

    Args:
        average: "per_class" for an F1 of each class, "global" for one of all classes' sums.
        smooth: at least 0: F1 = (2 sum y p + smooth) / (sum (y + p) + smooth).
        momentum: None for the batch's own F1; else how much of the running sums is kept, in [0, 1).
        num_classes: C, needed with momentum.
        ignore_index, reduction, class_dim, inplace, impl: see imbalance_kernels.functional.sigmoid_loss.
        process_group: whose batches F1 is of, see imbalance_kernels.functional.column_sums.

    Source: kexue.fm 7708.

    Example:
        >>> loss = F1WeightedCrossEntropyLoss(momentum=0.9, num_classes=3)
        >>> loss(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 3, 1])).backward()  # 3: background
    """

    running_sums: Tensor | None  # (3, C) float32: predicted, true positives, positives
    running_weight: Tensor | None  # () what the batches in them weigh: less than 1 after the first ones

    def __init__(
        self,
        average: str = "per_class",
        smooth: float = 0.0,
        *,
        momentum: float | None = None,
        num_classes: int | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        class_dim: int = 1,
        inplace: bool = False,
        process_group: Any = None,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        _check_f1(average, smooth)
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum!r}, but it must be None or in [0, 1)")
        if (momentum is None) != (num_classes is None):
            given, missing = ("num_classes", "momentum") if momentum is None else ("momentum", "num_classes")
            raise ValueError(f"{given} is given without {missing}, but a running average takes both")
        self.average = average
        self.smooth = float(smooth)
        self.momentum = momentum
        self.ignore_index = ignore_index
        check_reduction(reduction)
        self.reduction = reduction
        self.class_dim = class_dim
        self.inplace = inplace
        self.process_group = process_group
        self.impl = impl
        running = None if num_classes is None else torch.zeros(3, num_classes, dtype=torch.float32)
        self.register_buffer("running_sums", running)
        self.register_buffer("running_weight", None if running is None else torch.zeros(()))

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
            target: labels as of imbalance_kernels.functional.sigmoid_loss.
            sample_weight: weights of rows, of F1's sums too; a row of weight 0 costs exactly 0.
            normalizer: a number or tensor () that replaces the divisor of "mean" and "sum"; 0 gives 0.
        """
        running = self._running()
        with torch.no_grad():
            if running is None:
                sums = self._of_batch(input, target, sample_weight)
            else:
                self._check_num_classes(input)
                if self.training:
                    running = self._with(self._of_batch(input, target, sample_weight), *running)
                weight = torch.where(running[1] == 0, torch.ones_like(running[1]), running[1])
                predicted, true_positives, positives = running[0] / weight
                sums = ColumnSums(predicted, true_positives, positives, weight)
            f1 = _f1(sums, self.average, self.smooth)
        loss = _weighted_by_f1(
            f1,
            input,
            target,
            SigmoidOptions(
                CrossEntropy(), ignore_index=self.ignore_index, reduction=self.reduction, inplace=self.inplace
            ),
            sample_weight=sample_weight,
            normalizer=normalizer,
            class_dim=self.class_dim,
            impl=self.impl,
        )
        if running is not None and self.training:  # only now: what raised has changed nothing
            for held, new in zip(self._running() or (), running, strict=True):
                held.copy_(new)
        return loss

    def _running(self) -> tuple[Tensor, Tensor] | None:
        """Return the running sums and their weight, or None."""
        if self.running_sums is None or self.running_weight is None:
            return None
        return self.running_sums, self.running_weight

    def _of_batch(self, input: Tensor, target: Tensor, sample_weight: Tensor | None) -> ColumnSums:
        return column_sums(
            input,
            target,
            ignore_index=self.ignore_index,
            sample_weight=sample_weight,
            class_dim=self.class_dim,
            process_group=self.process_group,
            impl=self.impl,
        )

    def _with(self, batch: ColumnSums, sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return running sums and their weight with a batch, unless its sums are not finite."""
        assert self.momentum is not None
        found = torch.stack(batch[:3]).to(sums.dtype)
        step = torch.where(torch.isfinite(found).all(), 1 - self.momentum, 0.0).to(sums.dtype)
        found = torch.where(step == 0, torch.zeros_like(found), found)
        return (1 - step) * sums + step * found, (1 - step) * weight + step

    def _check_num_classes(self, input: Tensor) -> None:
        assert self.running_sums is not None
        class_dim = self.class_dim if input.dim() > 1 else 0
        expected = self.running_sums.shape[1]
        if -input.dim() <= class_dim < input.dim() and input.shape[class_dim] != expected:
            raise ValueError(f"num_classes is {expected}, but input has {input.shape[class_dim]} classes")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> F1WeightedCrossEntropyLoss:
        """Move the running sums, which keep their precision: a half has neither their digits nor their range."""
        before = {"running_sums": self.running_sums, "running_weight": self.running_weight}
        super()._apply(fn, recurse)
        for name, exact in before.items():
            moved = getattr(self, name)
            if exact is not None and moved.dtype != exact.dtype:
                setattr(self, name, exact.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Return the options."""
        running = "" if self.momentum is None else f", momentum={self.momentum:g}"
        return f"average={self.average}, smooth={self.smooth:g}{running}"


def _check_f1(average: str, smooth: float) -> None:
    if average not in AVERAGES:
        raise ValueError(f"average is {average!r}, but it must be one of {AVERAGES}")
    if not (math.isfinite(smooth) and smooth >= 0):
        raise ValueError(f"smooth is {smooth!r}, but it must be at least 0 and finite")


def _counts(sums: ColumnSums, average: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return twice the true positives, predicted and positives together, and positives: (C,), or () of all classes."""
    counts = (2 * sums.true_positives, sums.predicted + sums.positives, sums.positives)
    return counts if average == "per_class" else tuple(count.sum() for count in counts)  # type: ignore[return-value]


def _f1(sums: ColumnSums, average: str, smooth: float) -> Tensor:
    """Return F1 (C,); 1 where there is neither a positive nor a prediction."""
    twice_true, total, _ = _counts(sums, average)
    empty = total + smooth == 0
    f1 = torch.where(empty, 1.0, (twice_true + smooth) / torch.where(empty, 1.0, total + smooth))
    return f1.expand_as(sums.positives)


def _weighted_by_f1(f1: Tensor, input: Tensor, target: Tensor, options: SigmoidOptions, **keywords: Any) -> Tensor:
    """Return sigmoid cross-entropy of positives weighted by 1 - F1/2 and negatives by F1/2, F1 (C,)."""
    weighted = replace(options, positive_weight=1 - f1 / 2, negative_weight=f1 / 2)
    return sigmoid_loss(input, target, weighted, **keywords)
