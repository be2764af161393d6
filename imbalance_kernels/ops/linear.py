"""A loss fused with the linear layer before it: value and gradients without ever holding the (N, C) logits.

Rows go through one buffer of logits, a chunk at a time (linear_kernels.py). Where the upstream gradient is one number
("mean" and "sum") the gradients are made in forward, in three products, and backward scales them. Where it is a number
per row ("none", the split and what is written on it) forward keeps vectors of N, and backward makes the logits again:
four products.

Halves: the gradient of a chunk's logits is made for coefficients of order one, and what they were divided by (1/N of a
mean, the upstream gradient) is multiplied in float32 after the products, so that it does not underflow. It is a power
of two, so that nothing is rounded a second time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalance_kernels.differentiation import anchor, graph_is_kept, once_differentiable
from imbalance_kernels.implementation import choose
from imbalance_kernels.ops.checks import (
    Rows,
    as_linear_rows,
    check_linear_cosines,
    check_options,
    check_range,
    check_row_tensors,
)
from imbalance_kernels.ops.kernel_arguments import loss_arguments, split_arguments
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.ops.linear_kernels import Plan, Wants, operations
from imbalance_kernels.options import SoftmaxOptions, accumulate_dtype
from imbalance_kernels.softmax_row import Loss, LossOutput, RowSplit, RowTargets, returned, row_weights

__all__ = ["Linear", "linear_correct", "linear_loss", "linear_split", "prepare_linear"]


HALVES = (torch.bfloat16, torch.float16)


class Linear(NamedTuple):
    """A linear layer and its input, checked."""

    input: Tensor  # (N, D)
    weight: Tensor  # (C, D), of input's dtype, or float32 with an input of halves
    bias: Tensor | None  # (C,)
    plan: Plan

    @property
    def wants(self) -> Wants:
        """The gradients that autograd will ask for."""
        if not torch.is_grad_enabled():
            return Wants()
        d_bias = self.bias is not None and self.bias.requires_grad
        return Wants(self.input.requires_grad, self.weight.requires_grad, d_bias)


class _GradientsInForward(torch.autograd.Function):
    """One upstream gradient: forward makes the gradients for an upstream gradient of one, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands_anchor: Tensor | None,
        target: Tensor,
        sample_weight: Tensor | None,
        normalizer: Tensor | None,
        options: SoftmaxOptions,
        plan: Plan,
        wants: Wants,
    ) -> tuple[Tensor, ...]:
        arguments = loss_arguments(target, options, sample_weight, normalizer)
        outputs = operations.linear_loss(input, weight, bias, *arguments, *_reports(options), *plan, *wants)
        loss, log_probs, correct, *gradients = outputs
        ctx.save_for_backward(*_wanted(gradients, wants), operands_anchor)
        ctx.dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.impl = plan.impl
        ctx.mark_non_differentiable(log_probs, correct)
        return loss, log_probs, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _log_probs: Any, _correct: Any) -> tuple[Tensor | None, ...]:
        in_place = not torch.compiler.is_compiling() and not graph_is_kept()
        *gradients, _ = ctx.saved_tensors
        scaled = _scaled(gradients, d_loss, ctx.dtypes, ctx.impl, in_place)
        # anchor, target, sample_weight, normalizer, options, plan, wants
        return *scaled, None, None, None, None, None, None, None


class _GradientsInBackward(torch.autograd.Function):
    """An upstream gradient per row: backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        sample_weight: Tensor | None,
        options: SoftmaxOptions,
        plan: Plan,
        wants: Wants,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(input, weight, bias, target, sample_weight, *options.class_vectors())
        ctx.options, ctx.plan, ctx.wants = options, plan, wants
        arguments = loss_arguments(target, options, sample_weight, None)
        outputs = operations.linear_loss(input, weight, bias, *arguments, *_reports(options), *plan, *Wants())
        loss, log_probs, correct, *_ = outputs
        ctx.mark_non_differentiable(log_probs, correct)
        return loss, log_probs, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor, _log_probs: Any, _correct: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, sample_weight, *_ = ctx.saved_tensors
        bound = _bound(ctx.options, target, sample_weight, torch.ones_like(d_losses))
        (upstream,), factor = _of_order_one((d_losses,), bound, input.dtype)
        arguments = loss_arguments(target, ctx.options, sample_weight, None)
        gradients = operations.linear_loss_backward(input, weight, bias, *arguments, upstream, *ctx.plan, *ctx.wants)
        dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
        scaled = _scaled(
            _wanted(gradients, ctx.wants), factor, dtypes, ctx.plan.impl, not torch.compiler.is_compiling()
        )
        return *scaled, None, None, None, None, None  # target, sample_weight, options, plan, wants


class _Split(torch.autograd.Function):
    """The split of rows (`target_and_rest`); backward makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        options: SoftmaxOptions,
        plan: Plan,
        wants: Wants,
    ) -> tuple[Tensor, ...]:
        split = operations.linear_split(input, weight, bias, target, *split_arguments(options), *plan)
        _, rest, shift, _, weight_sum = split
        ctx.save_for_backward(input, weight, bias, target, rest, shift, *options.class_vectors())
        ctx.options, ctx.plan, ctx.wants = options, plan, wants
        ctx.mark_non_differentiable(shift, weight_sum)
        return tuple(split)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_target: Tensor, d_rest: Tensor, _shift: Tensor, d_weighted_logits: Tensor, _weight_sum: Tensor
    ) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, rest, shift, *_ = ctx.saved_tensors
        one = d_target.new_ones(())  # u_j of the weighted logits is a probability, or a class weight
        heaviest = one if ctx.options.weight is None else ctx.options.weight.abs().amax().clamp_min(1)
        upstream, factor = _of_order_one((d_target, d_rest, d_weighted_logits), heaviest, input.dtype)
        arguments = (target, *split_arguments(ctx.options), rest, shift, *upstream)
        gradients = operations.linear_split_backward(input, weight, bias, *arguments, *ctx.plan, *ctx.wants)
        dtypes = input.dtype, weight.dtype, None if bias is None else bias.dtype
        scaled = _scaled(
            _wanted(gradients, ctx.wants), factor, dtypes, ctx.plan.impl, not torch.compiler.is_compiling()
        )
        return *scaled, None, None, None, None  # target, options, plan, wants


def _reports(options: SoftmaxOptions) -> tuple[bool, bool]:
    return options.return_log_probs, options.return_correct


def _wanted(gradients: Any, wants: Wants) -> list[Tensor | None]:
    return [gradient if wanted else None for gradient, wanted in zip(gradients, wants, strict=True)]


def _scaled(
    gradients: Any, factor: Tensor | None, dtypes: tuple[torch.dtype | None, ...], impl: str, in_place: bool
) -> list[Tensor | None]:
    """Return gradients * factor (), multiplied in float32 and rounded to `dtypes`; at once where the factor is one."""
    return [
        None if gradient is None else _scaled_one(gradient, factor, dtype, impl, in_place)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    ]


def _scaled_one(
    gradient: Tensor, factor: Tensor | None, dtype: torch.dtype | None, impl: str, in_place: bool
) -> Tensor:
    if factor is None:
        return gradient.to(dtype)
    if in_place and impl != "reference":
        kernels(impl).scale_(gradient if gradient.dim() == 2 else gradient[None], factor)
        return gradient.detach().to(dtype)  # a tensor of its own, which .grad can take without a copy
    return (gradient.to(accumulate_dtype(gradient.dtype)) * factor).to(dtype)


def _of_order_one(
    upstream: tuple[Tensor, ...], bound: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return upstream gradients (N,) such that halves hold `bound` (N,) times them, and what they were divided by."""
    if dtype not in HALVES:
        return upstream, None
    size = _size(torch.cat([vector * bound for vector in upstream]))
    return tuple(vector / size for vector in upstream), size


def _size(vector: Tensor) -> Tensor:
    """Return the power of two () below the largest finite number in a vector (N,) of float32; 1 where that is 0."""
    finite = torch.where(vector.isfinite(), vector.abs(), 0.0)
    largest = torch.cat((finite, vector.new_zeros(1))).amax()
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    return torch.where(power > 0, power, torch.ones_like(power))


def _bound(options: SoftmaxOptions, target: Tensor, sample_weight: Tensor | None, ones: Tensor) -> Tensor:
    """Return about the largest coefficient of a row's gradient (N,): its weights, and that of the z-loss."""
    of_class = ones
    if options.weight is not None:
        spread = target.is_floating_point() or options.label_smoothing > 0
        if spread:
            of_class = ones * options.weight.abs().amax()
        else:
            targets = RowTargets.of(target, options.weight.numel(), options.ignore_index)
            of_class = torch.where(targets.valid, options.weight[targets.indices].abs(), 0.0)
    bound = of_class + options.z_loss
    return bound if sample_weight is None else bound * sample_weight.abs()


def _divisors(
    linear: Linear, target: Tensor, options: SoftmaxOptions, sample_weight: Tensor | None, normalizer: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return by what the kernels divide, by what their loss is multiplied, and what is added to it: () or None.

    A mean's divisor is that of all rows, so it comes before the first chunk. For halves the kernels divide by about the
    largest coefficient, so that the gradients that they round are of order one, and the rest is a factor.
    """
    dtype = accumulate_dtype(linear.input.dtype)
    ones = linear.input.new_ones(linear.input.shape[:1], dtype=dtype)  # (N,)
    divisor, ratio, offset = normalizer, None, None
    if normalizer is None and options.reduction == "mean":
        targets = None
        if not target.is_floating_point():
            targets = RowTargets.of(target, linear.weight.shape[0], options.ignore_index)
        total = row_weights(ones, targets, options, sample_weight).sum()
        offset = torch.where(total == 0, math.nan, 0.0).to(dtype)  # the mean of nothing is NaN, and its gradient 0
        divisor = torch.where(total == 0, torch.ones_like(total), total)
    if linear.input.dtype in HALVES:
        if divisor is None:
            divisor = ones.new_ones(())
        share = _bound(options, target, sample_weight, ones) / torch.where(
            divisor == 0, torch.ones_like(divisor), divisor
        )
        ratio = _size(share)
        divisor = divisor * ratio  # a normalizer of 0 stays 0
    return divisor, ratio, offset


def prepare_linear(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: SoftmaxOptions,
    *,
    chunk_bytes: int | None,
    accumulate: str,
    impl: str | None,
) -> tuple[Linear, Rows, SoftmaxOptions]:
    """Check the arguments of a fused loss; return its layer, its rows (whose logits are the input) and options."""
    rows = as_linear_rows(input, linear_weight, target, linear_bias)
    num_classes = linear_weight.shape[0]
    check_options(options, num_classes, target)
    if chunk_bytes is not None and not (isinstance(chunk_bytes, (int, torch.SymInt)) and chunk_bytes > 0):
        raise ValueError(f"chunk_bytes is {chunk_bytes!r}, but it must be None or an int above 0")
    if accumulate not in ("float32", "weight"):
        raise ValueError(f"accumulate is {accumulate!r}, but it must be 'float32' or 'weight'")
    if accumulate == "weight" and linear_weight.dtype == torch.float16:
        raise ValueError(
            "accumulate is 'weight', but a sum over rows may leave float16's range before it is divided: use 'float32'"
        )
    plan = Plan(choose(impl, rows.logits), chunk_bytes, accumulate)
    check_range(rows, options, num_classes)
    if options.logit_map.cosines:
        check_linear_cosines(rows, linear_weight, linear_bias, options)
    options = options.to(input.device, accumulate_dtype(rows.logits.dtype))
    return Linear(rows.logits, linear_weight, linear_bias, plan), rows, options


def linear_split(linear: Linear, target: Tensor, options: SoftmaxOptions) -> RowSplit:
    """Return the split of the layer's logits with target (N,) class indices or (N, C) probabilities."""
    input, weight, bias, plan = linear
    wants = linear.wants
    if any(wants):
        split = _Split.apply(input, weight, bias, target, options, plan, wants)
    else:
        split = operations.linear_split(input, weight, bias, target, *split_arguments(options), *plan)
    if target.is_floating_point() or options.label_smoothing > 0:
        return RowSplit(*split)
    return RowSplit(*split[:3])


def linear_correct(linear: Linear, target: Tensor, options: SoftmaxOptions) -> Tensor:
    """Return whether no logit of the layer is above the target's (N,), for a loss that has only splits: one product."""
    input, weight, bias, plan = linear
    arguments = loss_arguments(target, replace(options, reduction="sum"), None, None)
    with torch.no_grad():
        return operations.linear_loss(input, weight, bias, *arguments, False, True, *plan, *Wants())[2]


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: SoftmaxOptions,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    chunk_bytes: int | None = None,
    accumulate: str = "float32",
    impl: str | None = None,
    return_log_probs: bool = False,
    return_correct: bool = False,
) -> Loss:
    """Return the loss of `options` on the layer's logits; the public form is SoftmaxLoss.linear."""
    options = options.reporting(return_log_probs, return_correct)
    linear, rows, options = prepare_linear(
        input, linear_weight, target, linear_bias, options, chunk_bytes=chunk_bytes, accumulate=accumulate, impl=impl
    )
    sample_weight, normalizer = check_row_tensors(options, rows, sample_weight, normalizer)
    input, weight, bias, plan = linear
    target, wants = rows.target, linear.wants
    if options.reduction == "none":
        if any(wants):
            outputs = _GradientsInBackward.apply(input, weight, bias, target, sample_weight, options, plan, wants)
        else:
            arguments = loss_arguments(target, options, sample_weight, None)
            outputs = operations.linear_loss(input, weight, bias, *arguments, *_reports(options), *plan, *wants)
        return returned(LossOutput(*outputs[:3]), options, rows.shape)

    kernel_divisor, ratio, offset = _divisors(linear, target, options, sample_weight, normalizer)
    of_sum = replace(options, reduction="sum")
    if any(wants):
        outputs = _GradientsInForward.apply(
            input, weight, bias, anchor(input, weight, bias), target, sample_weight, kernel_divisor, of_sum, plan, wants
        )
    else:
        arguments = loss_arguments(target, of_sum, sample_weight, kernel_divisor)
        outputs = operations.linear_loss(input, weight, bias, *arguments, *_reports(options), *plan, *wants)
    loss, log_probs, correct = outputs[:3]
    loss = loss if ratio is None else loss * ratio
    loss = loss if offset is None else loss + offset
    return returned(LossOutput(loss, log_probs, correct), options, rows.shape)
