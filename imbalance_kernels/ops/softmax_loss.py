"""softmax_loss: value and gradient of any softmax-family loss in one trip over the logits (one_trip.py).

Channels-first logits (N, C, d1, ...) are read and written where they are, as B images of P pixels (B, C, P), each pixel
a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.differentiation import only_once
from imbalance_kernels.implementation import choose
from imbalance_kernels.ops.checks import (
    Rows,
    as_rows,
    check_cosines,
    check_inplace,
    check_input,
    check_options,
    check_range,
    check_row_tensors,
    check_target,
)
from imbalance_kernels.ops.one_trip import kernel_loss
from imbalance_kernels.options import SoftmaxOptions, accumulate_dtype
from imbalance_kernels.softmax_row import Loss, returned

__all__ = ["prepare", "rows_correct", "softmax_loss"]


def prepare(
    input: Tensor,
    target: Tensor,
    options: SoftmaxOptions,
    class_dim: int,
    impl: str | None,
    planes: bool = False,
) -> tuple[Rows, SoftmaxOptions, str]:
    """Check the arguments of a loss; return its rows, its options on their device, and the implementation.

    With `planes` the logits may be channels-first.
    """
    dimension = check_input(input, target, class_dim)
    check_target(input, target, dimension)
    check_options(options, input.shape[dimension], target)
    chosen = choose(impl, input)
    rows = as_rows(input, target, dimension, planes)
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


def rows_correct(logits: Tensor, target: Tensor, options: SoftmaxOptions, impl: str) -> Tensor:
    """Return whether no logit is above the target's (N,), for a loss that has only splits: one more read of logits."""
    options = replace(options, reduction="sum", inplace=False, return_log_probs=False, return_correct=True)
    with torch.no_grad():
        if impl == "reference":
            output = reference.softmax_loss(logits, target, options)
        else:
            output = kernel_loss(logits, target, None, None, options, impl)
    assert output.correct is not None
    return output.correct


def softmax_loss(
    input: Tensor,
    target: Tensor,
    options: SoftmaxOptions,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int = 1,
    impl: str | None = None,
    return_log_probs: bool = False,
    return_correct: bool = False,
) -> Loss:
    """Return the loss of `options`; the public form is imbalance_kernels.functional.softmax_loss."""
    options = options.reporting(return_log_probs, return_correct)
    rows, options, impl = prepare(input, target, options, class_dim, impl, planes=True)
    sample_weight, normalizer = check_row_tensors(options, rows, sample_weight, normalizer)
    logits, target = rows.logits, rows.target
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if impl == "reference":
        logits = only_once(logits) if needs_grad else logits
        output = reference.softmax_loss(logits, target, options, sample_weight, normalizer)
    else:
        output = kernel_loss(logits, target, sample_weight, normalizer, options, impl)
    return returned(output, options, rows.shape)
