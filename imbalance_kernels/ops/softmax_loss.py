"""softmax_loss: value and gradient of any softmax-family loss in one trip over the logits.

The logits are read once and their gradient is written once, in the forward, for an upstream gradient of one; backward
scales it where the upstream gradient is another number. Without grad the logits are only read. float16 and
``reduction="none"`` go by `target_and_rest` instead, which needs the upstream gradient first: a mean's 1/N would
underflow in float16 before a gradient scaler's factor arrives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.implementation import choose
from imbalance_kernels.ops.checks import Rows, as_rows, check_cosines, check_options, check_range, check_row_tensors
from imbalance_kernels.ops.kernel_arguments import objective_arguments, split_arguments
from imbalance_kernels.ops.target_and_rest import graph_is_kept, split_rows
from imbalance_kernels.options import SoftmaxOptions, accumulate_dtype
from imbalance_kernels.softmax_row import RowTargets, reduce_rows, row_losses

__all__ = ["prepare", "softmax_loss"]


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        normalizer: Tensor | None,
        options: SoftmaxOptions,
    ) -> Tensor:
        arguments = _loss_arguments(options, sample_weight, normalizer)
        if options.inplace:
            loss = torch.ops.imbalance_kernels.softmax_loss_(logits, target, *arguments)
            torch.autograd.graph.increment_version(logits)
            d_logits = logits
        else:
            loss, d_logits = torch.ops.imbalance_kernels.softmax_loss(logits, target, *arguments, True)
        ctx.save_for_backward(d_logits)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (d_logits,) = ctx.saved_tensors
        if torch.compiler.is_compiling() or graph_is_kept():
            d_logits = d_logits * d_loss
        else:
            torch.ops.imbalance_kernels.scale_(d_logits, d_loss)
            d_logits = d_logits.detach()  # a tensor of its own, which .grad can take without a copy
        return d_logits, None, None, None, None  # target, sample_weight, normalizer, options


def _loss_arguments(
    options: SoftmaxOptions, sample_weight: Tensor | None, normalizer: Tensor | None
) -> tuple[Any, ...]:
    return (
        *split_arguments(options),
        *objective_arguments(options),
        sample_weight,
        normalizer,
        options.reduction == "mean",
        options.z_loss,
    )


def prepare(
    input: Tensor,
    target: Tensor,
    options: SoftmaxOptions,
    class_dim: int,
    impl: str | None,
) -> tuple[Rows, SoftmaxOptions, str]:
    """Check the arguments of a loss; return its rows, its options on their device, and the implementation."""
    rows = as_rows(input, target, class_dim)
    check_options(options, rows.logits.shape[1], target)
    chosen = choose(impl, input)
    if options.inplace:
        if input.is_leaf and input.requires_grad and torch.is_grad_enabled():
            raise ValueError("inplace=True would overwrite input, a leaf that requires grad: its values would be lost")
        if rows.owned:
            raise ValueError(
                f"inplace=True needs an input that can be seen as (N, C) rows without a copy, but its shape is "
                f"{tuple(input.shape)} with strides {input.stride()} and class_dim={class_dim}"
            )
    if chosen != "cpu":
        check_range(rows, options)
    if options.logit_map.cosines:
        check_cosines(rows, options)
    options = options.to(input.device, accumulate_dtype(input.dtype))
    if rows.owned and not options.inplace:
        options = replace(options, inplace=True)  # the gradient may overwrite our own copy
    return rows, options, chosen


def softmax_loss(
    input: Tensor,
    target: Tensor,
    options: SoftmaxOptions,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int = 1,
    impl: str | None = None,
) -> Tensor:
    """Return the loss of `options`; the public form is imbalance_kernels.functional.softmax_loss."""
    rows, options, impl = prepare(input, target, options, class_dim, impl)
    sample_weight, normalizer = check_row_tensors(options, rows, sample_weight, normalizer)
    logits, target = rows.logits, rows.target
    if impl == "reference" and options.reduction != "none":
        return reference.softmax_loss(logits, target, options, sample_weight, normalizer)

    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if options.reduction == "none" or (needs_grad and logits.dtype == torch.float16):
        num_classes = logits.shape[1]
        split = split_rows(logits, target, options, impl)
        targets = None if target.is_floating_point() else RowTargets.of(target, num_classes, options.ignore_index)
        losses = row_losses(split, targets, options, sample_weight, num_classes)
        loss = reduce_rows(losses, targets, options, sample_weight, normalizer)
        return loss.reshape(rows.shape) if options.reduction == "none" else loss
    if needs_grad:
        return _SoftmaxLoss.apply(logits, target, sample_weight, normalizer, options)
    arguments = _loss_arguments(options, sample_weight, normalizer)
    return torch.ops.imbalance_kernels.softmax_loss(logits, target, *arguments, False)[0]


if hasattr(torch.ops.imbalance_kernels, "softmax_loss"):

    @torch.library.register_fake("imbalance_kernels::softmax_loss")
    def _(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        with_gradient = options[-1]
        loss = logits.new_empty((), dtype=accumulate_dtype(logits.dtype))
        return loss, logits.new_empty(logits.shape if with_gradient else (0,))

    @torch.library.register_fake("imbalance_kernels::softmax_loss_")
    def _(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
        return logits.new_empty((), dtype=accumulate_dtype(logits.dtype))

    @torch.library.register_fake("imbalance_kernels::scale_")
    def _(gradient: Tensor, factor: Tensor) -> None:
        return None
