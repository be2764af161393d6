"""From checked labels to a loss: what sigmoid_loss and multilabel_softmax have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from imbalance_kernels.differentiation import only_once
from imbalance_kernels.implementation import choose
from imbalance_kernels.ops.checks import check_inplace, check_normalizer
from imbalance_kernels.ops.labels import Labels, check_label_range
from imbalance_kernels.ops.one_trip import kernel_loss
from imbalance_kernels.options import MultilabelOptions, SigmoidOptions, accumulate_dtype

__all__ = ["label_loss"]


def label_loss(
    specification: Callable[..., Tensor],
    input: Tensor,
    labels: Labels,
    options: SigmoidOptions | MultilabelOptions,
    *,
    sample_weight: Tensor | None,
    normalizer: Tensor | float | None,
    class_dim: int,
    impl: str | None,
) -> Tensor:
    """Return the loss of `options`, for "none" as the operation has it, by the kernels or else by `specification`.

    Checked here is what both losses check; `labels`, class vectors and sample_weight are checked before.
    """
    chosen = choose(impl, input)
    if options.inplace:
        check_inplace(input, labels, class_dim)
    if chosen != "cpu":
        check_label_range(labels, options.ignore_index)
    logits, target = labels.logits, labels.target
    normalizer = check_normalizer(normalizer, options.reduction, logits)
    options = options.to(input.device, accumulate_dtype(input.dtype))
    if labels.owned and not options.inplace:
        options = replace(options, inplace=True)  # the gradient may overwrite our own copy
    if chosen == "reference":
        logits = only_once(logits) if torch.is_grad_enabled() and logits.requires_grad else logits
        return specification(logits, target, options, sample_weight, normalizer)
    return kernel_loss(logits, target, sample_weight, normalizer, options, chosen).loss
