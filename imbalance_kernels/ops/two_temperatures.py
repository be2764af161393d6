"""Soft truncation of a softmax: cross-entropy weighted by a probability at another temperature.

    softmax_neg             loss = -r_t log p_t            r = softmax(-K z)    kexue.fm 4733
    one_minus_softmax       loss = -(1 - s_t) log p_t      s = softmax(K z)     its reader's form

Composed from two `target_and_rest` of the same logits, so that it reads them twice forward and twice backward; once
more where it is to say which rows are correct.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from imbalance_kernels.objectives import SoftTruncation
from imbalance_kernels.ops.checks import Rows, check_row_tensors
from imbalance_kernels.ops.linear import linear_correct, linear_split, prepare_linear
from imbalance_kernels.ops.softmax_loss import prepare, rows_correct
from imbalance_kernels.ops.target_and_rest import split_rows
from imbalance_kernels.options import SoftmaxOptions
from imbalance_kernels.softmax_row import (
    Loss,
    LossOutput,
    RowSplit,
    RowTargets,
    log_probs_of,
    reduce_rows,
    returned,
    row_losses,
    without_rows,
)

__all__ = ["FORMS", "linear_two_temperature_loss", "two_temperature_loss"]

FORMS = ("softmax_neg", "one_minus_softmax")


def two_temperature_loss(
    input: Tensor,
    target: Tensor,
    options: SoftmaxOptions,
    form: str,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int = 1,
    impl: str | None = None,
    return_log_probs: bool = False,
    return_correct: bool = False,
) -> Loss:
    """Return the loss of `form`, whose K is that of the options' objective, a SoftTruncation.

    The public form is imbalance_kernels.functional.soft_truncation_loss.
    """
    if options.inplace:
        raise ValueError(
            f"inplace=True is not possible with form={form!r}, which reads the logits twice: use form='log_odds'"
        )
    options = options.reporting(return_log_probs, return_correct)
    rows, options, impl = prepare(input, target, options, class_dim, impl)
    options = replace(options, inplace=False)

    def split(options: SoftmaxOptions, target: Tensor) -> RowSplit:
        return split_rows(rows.logits, target, options, impl)

    def correct(target: Tensor) -> Tensor:
        return rows_correct(rows.logits, target, options, impl)

    return _loss(split, correct, rows, options, form, rows.logits.shape[1], sample_weight, normalizer)


def linear_two_temperature_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    options: SoftmaxOptions,
    form: str,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    chunk_bytes: int | None = None,
    accumulate: str = "float32",
    impl: str | None = None,
    return_log_probs: bool = False,
    return_correct: bool = False,
) -> Loss:
    """Return the same of a linear layer, whose logits are made twice forward and twice backward."""
    options = options.reporting(return_log_probs, return_correct)
    linear, rows, options = prepare_linear(
        input, linear_weight, target, linear_bias, options, chunk_bytes=chunk_bytes, accumulate=accumulate, impl=impl
    )

    def split(options: SoftmaxOptions, target: Tensor) -> RowSplit:
        return linear_split(linear, target, options)

    def correct(target: Tensor) -> Tensor:
        return linear_correct(linear, target, options)

    return _loss(split, correct, rows, options, form, linear_weight.shape[0], sample_weight, normalizer)


def _loss(
    split_of: Callable[[SoftmaxOptions, Tensor], RowSplit],
    correct_of: Callable[[Tensor], Tensor],
    rows: Rows,
    options: SoftmaxOptions,
    form: str,
    num_classes: int,
    sample_weight: Tensor | None,
    normalizer: Tensor | float | None,
) -> Loss:
    assert isinstance(options.objective, SoftTruncation)
    sample_weight, normalizer = check_row_tensors(options, rows, sample_weight, normalizer)
    sharpness = options.objective.sharpness
    target = without_rows(rows.target, options, normalizer)
    targets = RowTargets.of(target, num_classes, options.ignore_index)
    split = split_of(options, target)
    sharp = split_of(_at_temperature(options, -sharpness if form == "softmax_neg" else sharpness), target)
    log_odds = sharp.log_odds if form == "softmax_neg" else -sharp.log_odds
    # A masked target has p = 0: weight 1, and nothing to differentiate in it.
    masked = split.target == -math.inf
    weight = torch.where(masked, 1.0, torch.sigmoid(torch.where(masked, torch.zeros_like(log_odds), log_odds)))
    value = weight * -torch.nn.functional.logsigmoid(split.log_odds)
    losses = row_losses(split, targets, options, sample_weight, num_classes, value)
    loss = reduce_rows(losses, targets, options, sample_weight, normalizer)
    log_probs = log_probs_of(split, targets) if options.return_log_probs else None
    correct = correct_of(target) if options.return_correct else None
    return returned(LossOutput(loss, log_probs, correct), options, rows.shape)


def _at_temperature(options: SoftmaxOptions, temperature: float) -> SoftmaxOptions:
    """Return options whose effective logits are `temperature` times those of `options`; masks stay masks."""
    logit_map = options.logit_map
    bias = logit_map.bias
    if bias is not None:
        bias = torch.where(bias == -math.inf, bias, temperature * bias)
    logit_map = replace(logit_map, scale=temperature * logit_map.scale, bias=bias)
    return replace(options, logit_map=logit_map, label_smoothing=0.0, weight=None)
