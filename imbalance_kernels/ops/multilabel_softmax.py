"""multilabel_softmax: value and gradient of a softmax loss over any number of labels in one trip (one_trip.py).

    loss = log(1 + sum_{j negative} exp(z_j)) + log(1 + sum_{j positive} exp(-z_j))

Labels are read as they are given: class labels and lists of classes never become one-hot. Channels-first images are
read where they are too, each pixel a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.ops.checks import check_class_vector, check_reduction
from imbalance_kernels.ops.label_loss import label_loss
from imbalance_kernels.ops.labels import as_labels, check_row_weights
from imbalance_kernels.options import MultilabelOptions

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
    labels = as_labels(input, target, class_dim)
    num_classes = labels.logits.shape[1]
    check_reduction(options.reduction)
    check_class_vector("prior", options.bias, num_classes)
    if threshold != 0:
        nothing = torch.zeros(num_classes, dtype=torch.float64, device=input.device)  # made there: no copy to wait for
        options = replace(options, bias=(nothing if options.bias is None else options.bias) - threshold)
    loss = label_loss(
        reference.multilabel_softmax,
        input,
        labels,
        options,
        sample_weight=check_row_weights(labels, sample_weight),
        normalizer=normalizer,
        class_dim=class_dim,
        impl=impl,
    )
    return loss.reshape(labels.rows_shape) if options.reduction == "none" else loss
