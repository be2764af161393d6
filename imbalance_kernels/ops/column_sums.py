"""column_sums: sums of probabilities and labels over a batch, class by class, differentiable in the logits.

The forward reads the logits and writes (C,) vectors; the backward reads them again and writes their gradient: with
``g = d_predicted + y d_true_positives`` it is ``p (1 - p) g`` of a sigmoid and ``p (g - sum p g)`` of a softmax, summed
over the row. Nothing else of their size exists, and labels never become one-hot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.differentiation import once_differentiable, only_once
from imbalance_kernels.implementation import choose
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.ops.labels import as_labels, check_label_range, check_row_weights
from imbalance_kernels.options import accumulate_dtype

__all__ = ["ColumnSums", "column_sums"]


class ColumnSums(NamedTuple):
    """What a batch sums up to, weighted by sample_weight; float32, float64 for float64 logits."""

    predicted: Tensor  # (C,) sum of p: how often each class is predicted, softly
    true_positives: Tensor  # (C,) sum of y p
    positives: Tensor  # (C,) sum of y, not differentiable
    rows: Tensor  # () sum of the weights of rows that count


class _ColumnSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        ignore_index: int,
        from_softmax: bool,
        impl: str,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, target, sample_weight)
        ctx.options = (ignore_index, from_softmax)
        ctx.impl = impl
        arguments = (logits, target, sample_weight, *ctx.options)
        predicted, true_positives, positives = kernels(impl).column_sums(*arguments)
        ctx.mark_non_differentiable(positives)
        return predicted, true_positives, positives

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_predicted: Tensor, d_true_positives: Tensor, _positives: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, target, sample_weight = ctx.saved_tensors
        arguments = (logits, target, sample_weight, *ctx.options, d_predicted, d_true_positives)
        d_logits = kernels(ctx.impl).column_sums_backward(*arguments)
        return d_logits, None, None, None, None, None  # target, sample_weight, ignore_index, from_softmax, impl


class _AllReduce(torch.autograd.Function):
    """The sum over a process group; so is its gradient, because every process's loss depends on every summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(d_total, ctx.process_group), None  # process_group


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
    """Return the sums of a batch; the public form is imbalance_kernels.functional.column_sums."""
    labels = as_labels(input, target, class_dim)
    logits, target = labels.logits, labels.target
    chosen = choose(impl, input)
    if chosen != "cpu":
        check_label_range(labels, ignore_index)
    sample_weight = check_row_weights(labels, sample_weight)
    rows = _rows(labels.logits, target, ignore_index, sample_weight)
    if chosen == "reference":
        logits = only_once(logits) if torch.is_grad_enabled() and logits.requires_grad else logits
        sums = reference.column_sums(logits, target, ignore_index, sample_weight, from_softmax=from_softmax)
    elif torch.is_grad_enabled() and logits.requires_grad:
        sums = _ColumnSums.apply(logits, target, sample_weight, ignore_index, from_softmax, chosen)
    else:
        sums = kernels(chosen).column_sums(logits, target, sample_weight, ignore_index, from_softmax)
    if process_group is None:
        return ColumnSums(*sums, rows)
    num_classes = logits.shape[1]
    *vectors, rows = _AllReduce.apply(torch.cat([*sums, rows[None]]), process_group).split([num_classes] * 3 + [1])
    predicted, true_positives, positives = vectors
    return ColumnSums(predicted, true_positives, positives.detach(), rows.detach().squeeze(0))


def _rows(logits: Tensor, target: Tensor, ignore_index: int, sample_weight: Tensor | None) -> Tensor:
    """Return the sum of the weights of rows that count, ()."""
    dtype = accumulate_dtype(logits.dtype)
    if target.dim() == 1:
        counts = target != ignore_index
        if sample_weight is None:
            return counts.to(dtype).sum()
        return torch.where(counts, sample_weight, torch.zeros_like(sample_weight)).sum()
    if sample_weight is not None:
        return sample_weight.sum()
    num_rows = logits.numel() // max(1, logits.shape[1]) if logits.dim() == 3 else logits.shape[0]
    return torch.full((), num_rows, dtype=dtype, device=logits.device)
