"""Value and gradient of a loss in one trip over the logits, for every family whose kernels do that.

The logits are read once and their gradient is written once, in the forward, for an upstream gradient of one; backward
scales it where the upstream gradient is another number. Without grad the logits are only read.

float16 and ``reduction="none"`` need the upstream gradient first (in float16 a mean's 1/N would underflow before a
gradient scaler's factor arrives): their forward only reads, and backward runs the same kernel for the gradient, rounded
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.differentiation import anchor, graph_is_kept, once_differentiable
from imbalance_kernels.ops.kernel_arguments import (
    LossArguments,
    MultilabelArguments,
    SigmoidArguments,
    loss_arguments,
    sigmoid_arguments,
)
from imbalance_kernels.ops.kernels import kernels
from imbalance_kernels.options import MultilabelOptions, SigmoidOptions, SoftmaxOptions
from imbalance_kernels.softmax_row import LossOutput

__all__ = ["kernel_loss"]

Options = SoftmaxOptions | SigmoidOptions | MultilabelOptions
FAMILIES: dict[type, str] = {
    SoftmaxOptions: "softmax_loss",
    SigmoidOptions: "sigmoid_loss",
    MultilabelOptions: "multilabel_softmax",
}


def operation(impl: str, options: Options, form: str = "") -> Callable[..., Any]:
    """Return the family's operation of an implementation: "", "_", "_backward" or "_backward_"."""
    return getattr(kernels(impl), FAMILIES[type(options)] + form)


def arguments_of(
    target: Tensor,
    options: Options,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,
) -> LossArguments | SigmoidArguments | MultilabelArguments:
    """Return what the operation takes after the logits."""
    if isinstance(options, SoftmaxOptions):
        return loss_arguments(target, options, sample_weight, normalizer)
    if isinstance(options, MultilabelOptions):
        of_rows = (options.bias, sample_weight, normalizer)
        return MultilabelArguments(target, *of_rows, options.ignore_index, options.reduction)
    return sigmoid_arguments(target, options, sample_weight, normalizer)


def _reports(options: Options) -> tuple[bool, ...]:
    """Return what the operation takes last: with_log_probs and with_correct, of the softmax family alone."""
    return (options.return_log_probs, options.return_correct) if isinstance(options, SoftmaxOptions) else ()


def _outputs(ctx: Any, loss: Tensor, of_rows: Sequence[Tensor], options: Options) -> Tensor | tuple[Tensor, ...]:
    """Return what a Function's forward returns: the loss, and where asked for log_probs and correct, constants."""
    if not any(_reports(options)):
        return loss
    ctx.mark_non_differentiable(*of_rows)
    return loss, *of_rows


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
        options: Options,
        impl: str,
    ) -> Tensor | tuple[Tensor, ...]:
        arguments = arguments_of(target, options, sample_weight, normalizer)
        if options.inplace:
            outputs = operation(impl, options, "_")(logits, *arguments, *_reports(options))
            loss, *of_rows = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.graph.increment_version(logits)
            d_logits = logits
        else:
            loss, d_logits, *of_rows = operation(impl, options)(logits, *arguments, True, *_reports(options))
        ctx.save_for_backward(d_logits, logits_anchor)
        ctx.impl = impl
        return _outputs(ctx, loss, of_rows, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_of_rows: Any) -> tuple[Tensor | None, ...]:
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
        options: Options,
        impl: str,
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.save_for_backward(logits, target, sample_weight, normalizer, *options.class_vectors())
        ctx.options = options
        ctx.impl = impl
        arguments = arguments_of(target, options, sample_weight, normalizer)
        loss, _, *of_rows = operation(impl, options)(logits, *arguments, False, *_reports(options))
        return _outputs(ctx, loss, of_rows, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_of_rows: Any) -> tuple[Tensor | None, ...]:
        logits, target, sample_weight, normalizer, *_ = ctx.saved_tensors
        arguments = (logits, *arguments_of(target, ctx.options, sample_weight, normalizer), d_loss)
        if ctx.options.inplace and not torch.compiler.is_compiling() and not graph_is_kept():
            operation(ctx.impl, ctx.options, "_backward_")(*arguments)
            torch.autograd.graph.increment_version(logits)
            d_logits = logits.detach()
        else:
            d_logits = operation(ctx.impl, ctx.options, "_backward")(*arguments)
        return d_logits, None, None, None, None, None  # target, sample_weight, normalizer, options, impl


def _unscaled_rows(d_logits: Tensor) -> Sequence[Tensor]:
    """Return a gradient as matrices with a last stride of 1, which is what `scale_` takes."""
    if d_logits.dim() == 2:
        return (d_logits,)
    if d_logits.stride(0) == d_logits.shape[1] * d_logits.stride(1):
        return (d_logits.view(-1, d_logits.shape[2]),)
    return d_logits.unbind(0)


def kernel_loss(
    logits: Tensor,  # (N, C), or channels first (B, C, P)
    target: Tensor,
    sample_weight: Tensor | None,
    normalizer: Tensor | None,  # ()
    options: Options,
    impl: str,
) -> LossOutput:
    """Return the loss of `options` by an implementation's kernels, differentiable where the logits are.

    What else they ask for is (N,); what they do not ask for is None, or of no elements.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        arguments = arguments_of(target, options, sample_weight, normalizer)
        loss, _, *of_rows = operation(impl, options)(logits, *arguments, False, *_reports(options))
        return LossOutput(loss, *of_rows)
    if options.reduction == "none" or logits.dtype == torch.float16:
        outputs = _LossThenGradient.apply(logits, target, sample_weight, normalizer, options, impl)
    else:
        outputs = _LossAndGradient.apply(logits, anchor(logits), target, sample_weight, normalizer, options, impl)
    return LossOutput(*outputs) if isinstance(outputs, tuple) else LossOutput(outputs)
