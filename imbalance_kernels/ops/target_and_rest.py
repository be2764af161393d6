"""target_and_rest: each row of logits split into its target and the log-sum-exp of the rest, differentiable.

Reads the logits once; its backward reads them once and writes their gradient once. Nothing else of their size exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.differentiation import graph_is_kept, once_differentiable, only_once
from imbalance_kernels.ops.kernel_arguments import split_arguments
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.options import SoftmaxOptions
from imbalance_kernels.softmax_row import RowSplit

__all__ = ["split_rows"]


class _TargetAndRest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, options: SoftmaxOptions, impl: str) -> tuple[Tensor, ...]:
        split = kernels(impl).target_and_rest(logits, target, *split_arguments(options))
        _, rest, shift, _, weight_sum = split
        ctx.save_for_backward(logits, target, rest, shift, *options.class_vectors())
        ctx.options = options
        ctx.impl = impl
        ctx.mark_non_differentiable(shift, weight_sum)
        return tuple(split)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_target: Tensor, d_rest: Tensor, _shift: Tensor, d_weighted_logits: Tensor, _weight_sum: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, target, rest, shift, *_ = ctx.saved_tensors
        arguments = (logits, target, *split_arguments(ctx.options), rest, shift, d_target, d_rest, d_weighted_logits)
        if ctx.options.inplace and not torch.compiler.is_compiling() and not graph_is_kept():
            kernels(ctx.impl).target_and_rest_backward_(*arguments)
            torch.autograd.graph.increment_version(logits)
            d_logits = logits.detach()
        else:
            d_logits = kernels(ctx.impl).target_and_rest_backward(*arguments)
        return d_logits, None, None, None  # target, options, impl


def split_rows(logits: Tensor, target: Tensor, options: SoftmaxOptions, impl: str) -> RowSplit:
    """Return the split of logits (N, C) with target (N,) class indices or (N, C) probabilities.

    The class vectors of `options` are already on the logits' device in the accumulation dtype.
    """
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if impl == "reference":
        return reference.target_and_rest(only_once(logits) if needs_grad else logits, target, options)
    if needs_grad:
        split = _TargetAndRest.apply(logits, target, options, impl)
    else:
        split = kernels(impl).target_and_rest(logits, target, *split_arguments(options))
    if target.is_floating_point() or options.label_smoothing > 0:
        return RowSplit(*split)
    return RowSplit(*split[:3])
