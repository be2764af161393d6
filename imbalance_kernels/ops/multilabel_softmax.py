"""multilabel_softmax: value and gradient of a softmax loss over any number of labels in one trip (one_trip.py).

    loss = log(1 + sum_{j negative} exp(z_j)) + log(1 + sum_{j positive} exp(-z_j))

Labels are read as they are given: class labels and lists of classes never become one-hot.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.differentiation import only_once
from imbalance_kernels.implementation import choose
from imbalance_kernels.ops.checks import check_class_vector, check_inplace, check_normalizer, check_reduction
from imbalance_kernels.ops.labels import as_labels, check_label_range, check_row_weights
from imbalance_kernels.ops.one_trip import kernel_loss
from imbalance_kernels.options import MultilabelOptions, accumulate_dtype

__all__ = ["multilabel_softmax"]


def multilabel_softmax(
    input: Tensor,
    target: Tensor,
    options: MultilabelOptions,
    *,
    threshold: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    class_dim: int = 1,
    impl: str | None = None,
) -> Tensor:
    """Return the loss of `options`; the public form is imbalance_kernels.functional.multilabel_softmax_loss."""
    labels = as_labels(input, target, class_dim, planes=False)
    logits, num_classes = labels.logits, labels.logits.shape[1]
    check_reduction(options.reduction)
    check_class_vector("prior", options.bias, num_classes)
    chosen = choose(impl, input)
    if options.inplace:
        check_inplace(input, labels, class_dim)
    if chosen != "cpu":
        check_label_range(labels, options.ignore_index)
    sample_weight = check_row_weights(labels, sample_weight)
    normalizer = check_normalizer(normalizer, options.reduction, logits)
    if threshold != 0:
        bias = torch.zeros(num_classes, dtype=torch.float64) if options.bias is None else options.bias
        options = replace(options, bias=bias - threshold)
    options = options.to(input.device, accumulate_dtype(input.dtype))
    if labels.owned and not options.inplace:
        options = replace(options, inplace=True)  # the gradient may overwrite our own copy
    if chosen == "reference":
        logits = only_once(logits) if torch.is_grad_enabled() and logits.requires_grad else logits
        loss = reference.multilabel_softmax(logits, labels.target, options, sample_weight, normalizer)
    else:
        loss = kernel_loss(logits, labels.target, sample_weight, normalizer, options, chosen).loss
    return loss.reshape(labels.rows_shape) if options.reduction == "none" else loss
