"""softmax_loss: value and gradient of any softmax-family loss in one trip over the logits.

The logits are read once and their gradient is written once, in the forward, for an upstream gradient of one; backward
scales it where the upstream gradient is another number. Without grad the logits are only read.

float16 and ``reduction="none"`` need the upstream gradient first (in float16 a mean's 1/N would underflow before a
gradient scaler's factor arrives): their forward only reads, and backward runs the same kernel for the gradient, rounded
once.

Channels-first logits (N, C, d1, ...) are read and written where they are, as B images of P pixels (B, C, P), each pixel
a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.differentiation import anchor, graph_is_kept, once_differentiable, only_once
from imbalance_kernels.implementation import choose, serves_planes
from imbalance_kernels.ops.checks import (
    Rows,
    as_rows,
    check_cosines,
    check_inplace,
    check_input,
    check_options,
    check_range,
    check_row_tensors,
)
from imbalance_kernels.ops.kernel_arguments import loss_arguments
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.options import SoftmaxOptions, accumulate_dtype

__all__ = ["prepare", "softmax_loss"]


class _LossAndGradient(torch.autograd.Function):
    """The gradient is made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        logits_anchor: Tensor | None,
        target: Tensor,
        sample_weight: Tensor | None,
        normalizer: Tensor | None,
        options: SoftmaxOptions,
        impl: str,
    ) -> Tensor:
        arguments = loss_arguments(target, options, sample_weight, normalizer)
        if options.inplace:
            loss = kernels(impl).softmax_loss_(logits, *arguments)
            torch.autograd.graph.increment_version(logits)
            d_logits = logits
        else:
            loss, d_logits = kernels(impl).softmax_loss(logits, *arguments, True)
        ctx.save_for_backward(d_logits, logits_anchor)
        ctx.impl = impl
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_logits, _ = ctx.saved_tensors
        if torch.compiler.is_compiling() or graph_is_kept():
            d_logits = d_logits * d_loss
        else:
            for rows in _unscaled_rows(d_logits):
                kernels(ctx.impl).scale_(rows, d_loss)
            d_logits = d_logits.detach()  # a tensor of its own, which .grad can take without a copy
        return d_logits, None, None, None, None, None, None  # anchor, target, sample_weight, normalizer, options, impl


class _LossThenGradient(torch.autograd.Function):
    """The gradient is made in backward, when the upstream gradient is known."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        normalizer: Tensor | None,
        options: SoftmaxOptions,
        impl: str,
    ) -> Tensor:
        ctx.save_for_backward(logits, target, sample_weight, normalizer, *options.class_vectors())
        ctx.options = options
        ctx.impl = impl
        arguments = loss_arguments(target, options, sample_weight, normalizer)
        return kernels(impl).softmax_loss(logits, *arguments, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, sample_weight, normalizer, *_ = ctx.saved_tensors
        arguments = (logits, *loss_arguments(target, ctx.options, sample_weight, normalizer), d_loss)
        if ctx.options.inplace and not torch.compiler.is_compiling() and not graph_is_kept():
            kernels(ctx.impl).softmax_loss_backward_(*arguments)
            torch.autograd.graph.increment_version(logits)
            d_logits = logits.detach()
        else:
            d_logits = kernels(ctx.impl).softmax_loss_backward(*arguments)
        return d_logits, None, None, None, None, None  # target, sample_weight, normalizer, options, impl


def _unscaled_rows(d_logits: Tensor) -> Sequence[Tensor]:
    """Return a gradient as matrices with a last stride of 1, which is what `scale_` takes."""
    if d_logits.dim() == 2:
        return (d_logits,)
    if d_logits.stride(0) == d_logits.shape[1] * d_logits.stride(1):
        return (d_logits.view(-1, d_logits.shape[2]),)
    return d_logits.unbind(0)


def prepare(
    input: Tensor,
    target: Tensor,
    options: SoftmaxOptions,
    class_dim: int,
    impl: str | None,
    planes: bool = False,
) -> tuple[Rows, SoftmaxOptions, str]:
    """Check the arguments of a loss; return its rows, its options on their device, and the implementation.

    With `planes` the logits may be channels-first, where the implementation takes that.
    """
    dimension = check_input(input, target, class_dim)
    check_options(options, input.shape[dimension], target)
    chosen = choose(impl, input)
    rows = as_rows(input, target, dimension, planes and serves_planes(chosen))
    if options.inplace:
        check_inplace(input, rows, class_dim)
    if chosen != "cpu":
        check_range(rows, options, input.shape[dimension])
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
    rows, options, impl = prepare(input, target, options, class_dim, impl, planes=True)
    sample_weight, normalizer = check_row_tensors(options, rows, sample_weight, normalizer)
    logits, target = rows.logits, rows.target
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if impl == "reference":
        logits = only_once(logits) if needs_grad else logits
        loss = reference.softmax_loss(logits, target, options, sample_weight, normalizer)
    elif not needs_grad:
        arguments = loss_arguments(target, options, sample_weight, normalizer)
        loss = kernels(impl).softmax_loss(logits, *arguments, False)[0]
    elif options.reduction == "none" or logits.dtype == torch.float16:
        loss = _LossThenGradient.apply(logits, target, sample_weight, normalizer, options, impl)
    else:
        loss = _LossAndGradient.apply(logits, anchor(logits), target, sample_weight, normalizer, options, impl)
    return loss.reshape(rows.shape) if options.reduction == "none" else loss
