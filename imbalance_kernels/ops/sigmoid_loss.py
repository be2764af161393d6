"""sigmoid_loss: value and gradient of any sigmoid-family loss, logit by logit, in one trip (one_trip.py).

Labels are read as they are given: class labels and lists of classes never become one-hot.
"""

from __future__ import annotations

from torch import Tensor

from imbalance_kernels import reference
from imbalance_kernels.ops.label_loss import label_loss
from imbalance_kernels.ops.labels import as_labels, check_label_weights, check_sigmoid_options
from imbalance_kernels.options import SigmoidOptions

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
    num_classes = labels.logits.shape[1]
    options = options.of_classes(num_classes)
    check_sigmoid_options(options, num_classes)
    loss = label_loss(
        reference.sigmoid_loss,
        input,
        labels,
        options,
        sample_weight=check_label_weights(labels, sample_weight),
        normalizer=normalizer,
        class_dim=class_dim,
        impl=impl,
    )
    return labels.like_input(loss) if options.reduction == "none" else loss
