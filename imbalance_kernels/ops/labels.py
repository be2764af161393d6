"""What the sigmoid family takes: logits and their labels, in the layout that kernels see, and its checks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from imbalance_kernels.ops import layout
from imbalance_kernels.ops.checks import check_class_vector, check_input, check_reduction, may_read_values
from imbalance_kernels.options import SigmoidOptions, accumulate_dtype

__all__ = [
    "Labels",
    "as_labels",
    "check_label_range",
    "check_label_weights",
    "check_row_weights",
    "check_sigmoid_options",
]


class Labels(NamedTuple):
    """Logits and their labels, rows with classes last or images with classes first, whichever needs no copy."""

    logits: Tensor  # (N, C) with stride(1) == 1, or (B, C, P) with stride(2) == 1; N = B * P
    target: Tensor  # (N,) int64 labels in [0, C], (N, K) int64 lists of classes, or the logits' shape, contiguous
    shape: torch.Size  # of the input
    class_dim: int  # of the input, at least 0
    owned: bool  # logits are a copy of the caller's, free to be overwritten

    @property
    def rows_shape(self) -> torch.Size:
        """The input's shape without its classes."""
        return self.shape[: self.class_dim] + self.shape[self.class_dim + 1 :]

    def like_logits(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the input's shape as kernels see the logits, contiguous."""
        arrange = layout.as_rows if self.logits.dim() == 2 else layout.as_planes
        return arrange(tensor, self.class_dim).contiguous()

    def like_input(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the logits' shape as the input is."""
        if self.logits.dim() == 2:
            return tensor.reshape(*self.rows_shape, self.shape[self.class_dim]).movedim(-1, self.class_dim)
        images, num_classes, pixels = tensor.shape
        if math.prod(self.shape[: self.class_dim]) == images:
            return tensor.reshape(self.shape)
        return tensor.reshape(num_classes, *self.rows_shape).movedim(0, self.class_dim)  # one image of all rows


def as_labels(input: Tensor, target: Tensor, class_dim: int) -> Labels:
    """Return input and target as kernels see them, without a copy of the input where its layout allows it."""
    class_dim = check_input(input, target, class_dim)
    are_rows = layout.are_rows(input.movedim(class_dim, -1))
    are_planes = not are_rows and layout.are_planes(input, class_dim)
    logits = (layout.as_planes if are_planes else layout.as_rows)(input, class_dim)
    owned = not are_planes and not are_rows
    logits = logits.contiguous() if owned else logits
    labels = Labels(logits, target, input.shape, class_dim, owned)
    rows, num_classes = labels.rows_shape, input.shape[class_dim]
    num_rows = math.prod(rows)
    if target.is_floating_point() or target.dtype == torch.bool:
        if target.shape != input.shape:
            raise ValueError(
                f"target holds dense labels ({target.dtype}) of shape {tuple(target.shape)}, but they must have "
                f"input's shape {tuple(input.shape)}; class labels are int64 or int32"
            )
        if target.requires_grad:
            raise ValueError("target requires grad, but labels are constants: pass target.detach()")
        as_they_are = (torch.bool, logits.dtype, accumulate_dtype(logits.dtype))
        dense = target if target.dtype in as_they_are else target.to(accumulate_dtype(logits.dtype))
        return labels._replace(target=labels.like_logits(dense))
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target has dtype {target.dtype}, but it must be int64 or int32 class labels, or dense labels in floating "
            "point or bool"
        )
    if target.shape == rows:
        return labels._replace(target=target.reshape(num_rows).to(torch.int64))
    if target.shape == input.shape:
        raise ValueError(
            f"target has input's shape {tuple(input.shape)} and dtype {target.dtype}: dense labels must be floating "
            "point or bool (target.float()), lists of classes must not be as long as there are classes (pad them with "
            "ignore_index)"
        )
    if target.dim() == len(rows) + 1 and target.shape[:-1] == rows:
        return labels._replace(target=target.reshape(num_rows, target.shape[-1]).to(torch.int64).contiguous())
    message = (
        f"target has shape {tuple(target.shape)}, but with input {tuple(input.shape)} and class_dim={class_dim} it "
        f"must be class labels {tuple(rows)}, lists of classes {(*rows, 'K')}, or dense labels {tuple(input.shape)} "
        "in floating point or bool"
    )
    if target.shape == input.shape[:-1]:
        message += f"; if the {num_classes} classes are the last dimension, pass class_dim=-1"
    raise ValueError(message.replace("'K'", "K"))


def check_sigmoid_options(options: SigmoidOptions, num_classes: int) -> None:
    """Check everything that does not depend on values."""
    check_reduction(options.reduction)
    check_class_vector("gamma", options.objective.class_parameter(), num_classes)
    check_class_vector("prior", options.bias, num_classes)
    for name in ("positive_weight", "negative_weight"):
        weight = getattr(options, name)
        if isinstance(weight, Tensor):
            check_class_vector("alpha, weight or pos_weight", weight, num_classes)


def check_label_range(labels: Labels, ignore_index: int) -> None:
    """Check that labels name classes, or the background, where values may be read (`may_read_values`).

    Raises:
        IndexError: one does not. The CPU kernels find it themselves.
    """
    target = labels.target
    if target.is_floating_point() or target.dtype == torch.bool or not may_read_values(labels.logits):
        return
    last = labels.logits.shape[1] - (0 if target.dim() == 1 else 1)
    outside = ((target < 0) | (target > last)) & (target != ignore_index)
    if bool(outside.any()):
        wants = f"[0, {last}] ({last} is the background)" if target.dim() == 1 else f"[0, {last}]"
        raise IndexError(
            f"target {int(target[outside][0])} is out of bounds: it must be in {wants} or ignore_index={ignore_index}"
        )


def check_label_weights(labels: Labels, sample_weight: Tensor | None) -> Tensor | None:
    """Return sample_weight (N,), or of the logits' shape, in the accumulation dtype."""
    if sample_weight is None:
        return None
    if not isinstance(sample_weight, Tensor):
        raise TypeError(f"sample_weight is a {type(sample_weight).__name__}, but it must be a tensor")
    if sample_weight.requires_grad:
        raise ValueError("sample_weight requires grad, but it is a constant: pass sample_weight.detach()")
    if sample_weight.device != labels.logits.device:
        raise ValueError(f"sample_weight is on {sample_weight.device}, but input is on {labels.logits.device}")
    weight = sample_weight.to(accumulate_dtype(labels.logits.dtype))
    if weight.shape == labels.shape:
        return labels.like_logits(weight)
    if weight.shape != labels.rows_shape:
        raise ValueError(
            f"sample_weight has shape {tuple(sample_weight.shape)}, but it must be {tuple(labels.rows_shape)} or "
            f"input's {tuple(labels.shape)}"
        )
    return weight.reshape(-1).contiguous()


def check_row_weights(labels: Labels, sample_weight: Tensor | None) -> Tensor | None:
    """Return sample_weight (N,) in the accumulation dtype, of an operation that weights rows alone."""
    if sample_weight is not None and sample_weight.shape != labels.rows_shape:
        raise ValueError(
            f"sample_weight has shape {tuple(sample_weight.shape)}, but it must be one number for each row, "
            f"{tuple(labels.rows_shape)}"
        )
    return check_label_weights(labels, sample_weight)
