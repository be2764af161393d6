"""sigmoid_loss: value and gradient of any sigmoid-family loss, logit by logit, in one trip (one_trip.py).

Labels are read as they are given: class labels and lists of classes never become one-hot.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.differentiation import only_once
from imbalance_kernels.implementation import choose
from imbalance_kernels.ops.checks import check_inplace, check_normalizer
from imbalance_kernels.ops.labels import as_labels, check_label_range, check_label_weights, check_sigmoid_options
from imbalance_kernels.ops.one_trip import kernel_loss
from imbalance_kernels.options import SigmoidOptions, accumulate_dtype

__all__ = ["sigmoid_loss"]


def sigmoid_loss(
    input: Tensor,
    target: Tensor,
    options: SigmoidOptions,
    *,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int = 1,
    impl: str | None = None,
) -> Tensor:
    """Return the loss of `options`; the public form is imbalance_kernels.functional.sigmoid_loss."""
    labels = as_labels(input, target, class_dim)
    logits = labels.logits
    options = options.of_classes(logits.shape[1])
    check_sigmoid_options(options, logits.shape[1])
    chosen = choose(impl, input)
    if options.inplace:
        check_inplace(input, labels, class_dim)
    if chosen != "cpu":
        check_label_range(labels, options.ignore_index)
    sample_weight = check_label_weights(labels, sample_weight)
    normalizer = check_normalizer(normalizer, options.reduction, logits)
    options = options.to(input.device, accumulate_dtype(input.dtype))
    if labels.owned and not options.inplace:
        options = replace(options, inplace=True)  # the gradient may overwrite our own copy
    if chosen == "reference":
        logits = only_once(logits) if torch.is_grad_enabled() and logits.requires_grad else logits
        loss = reference.sigmoid_loss(logits, labels.target, options, sample_weight, normalizer)
    else:
        loss = kernel_loss(logits, labels.target, sample_weight, normalizer, options, chosen).loss
    return labels.like_input(loss) if options.reduction == "none" else loss
