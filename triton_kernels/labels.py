"""Labels beside a block of logits, read as they are given: class labels and lists of classes never become one-hot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imbalance_kernels.options import accumulate_dtype
from imbalance_kernels.triton_kernels.rows import widened

__all__ = ["Counted", "Labels", "counted_rows", "labels_of", "load_labels"]


class Labels(NamedTuple):
    """One of the three; what is None takes no part."""

    classes: Any  # (N,) int64 in [0, C], C is the background
    lists: Any  # (N, K) int64, padded with ignore_index
    dense: Any  # the logits' shape, contiguous; bool as uint8


class Counted(NamedTuple):
    """What rows there are and how much they count; of the shape of their index."""

    is_read: Any
    outside: Any  # the label is neither class, background nor ignored, or a list names what is no class: NaN
    label: Any  # class, -1 where there is none
    weight: Any


def labels_of(logits: Tensor, target: Tensor, num_rows: int) -> Labels:
    """Return the labels of logits (N, C) or (B, C, P) as kernels take them.

    Raises:
        ValueError: a shape or device that does not fit.
    """
    is_dense = target.is_floating_point() or target.dtype == torch.bool
    fits = target.shape == logits.shape if is_dense else target.dim() in (1, 2) and target.shape[0] == num_rows
    if not fits or target.device != logits.device:
        raise ValueError(f"target has shape {tuple(target.shape)} on {target.device}, which does not fit the logits")
    if target.dtype == torch.bool:
        return Labels(None, None, target.contiguous().view(torch.uint8))
    if is_dense:
        as_they_are = (logits.dtype, accumulate_dtype(logits.dtype))
        return Labels(None, None, (target if target.dtype in as_they_are else target.to(as_they_are[1])).contiguous())
    target = target.to(torch.int64).contiguous()
    return Labels(target, None, None) if target.dim() == 1 else Labels(None, target, None)


@triton.jit
def counted_rows(index, exists, classes, ignore_index, list_length, labels, sample_weight, dtype: tl.constexpr):
    """Return Counted of the rows at `index`, as far as they exist."""
    is_read = exists
    outside = index < 0
    label = (index * 0 - 1).to(tl.int32)
    weight = tl.zeros_like(index).to(dtype) + 1.0
    if sample_weight is not None:
        weight = tl.load(sample_weight + index, mask=exists, other=0.0)
        is_read = is_read & (weight != 0)
    if labels.classes is not None:
        given = tl.load(labels.classes + index, mask=exists, other=0)
        is_read = is_read & (given != ignore_index)
        valid = (given >= 0) & (given <= classes)
        outside = is_read & (valid == 0)
        is_read = is_read & valid
        label = tl.where(is_read, given, -1).to(tl.int32)
    if labels.lists is not None:
        wrong = label * 0
        for k in range(0, list_length):
            entry = tl.load(labels.lists + index * list_length + k, mask=is_read, other=ignore_index)
            is_class = (entry >= 0) & (entry < classes)
            wrong += tl.where(is_class | (entry == ignore_index), 0, 1)
        outside = wrong > 0
        is_read = is_read & (wrong == 0)
    return Counted(is_read, outside, label, weight)


@triton.jit
def load_labels(labels, index, columns, at, label, is_read, inside, ignore_index, list_length):
    """Return what the labels of logits are: bool, or numbers from 0 to 1.

    `index`, `label` and `is_read` are of rows, `columns` and `inside` of classes; their shapes make that of the logits.
    `at` are the logits' places in contiguous memory.
    """
    if labels.classes is not None:
        return columns == label
    elif labels.lists is not None:
        named = (columns + index * 0).to(tl.int32) * 0
        for k in range(0, list_length):
            entry = tl.load(labels.lists + index * list_length + k, mask=is_read, other=-1)
            entry = tl.where(entry == ignore_index, -1, entry)
            named += (entry == columns).to(tl.int32)
        return named > 0
    else:
        y = tl.load(labels.dense + at, mask=is_read & inside, other=0)
        if y.dtype == tl.uint8:
            return y != 0
        else:
            return widened(y)
