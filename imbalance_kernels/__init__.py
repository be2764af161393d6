"""imbalance-kernels: losses for imbalanced and large-vocabulary classification, value and gradient in one trip.

import imbalance_kernels as ik
loss = ik.LogitAdjustedLoss(class_counts)      # in place of torch.nn.CrossEntropyLoss()
"""

from imbalance_kernels import binary_objectives, functional, objectives, priors
from imbalance_kernels import implementation as _implementation  # loads the extension, which registers the operations
from imbalance_kernels.batch_statistics import DiceLoss, F1WeightedCrossEntropyLoss, SmoothF1Loss
from imbalance_kernels.implementation import show_config
from imbalance_kernels.linear import LinearLoss, RadiusMarginLoss
from imbalance_kernels.logit_map import AngularMargin
from imbalance_kernels.modules import (
    ArcFaceLoss,
    BalancedSoftmaxLoss,
    CircleLoss,
    CosFaceLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    HardTruncationLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    PolyLoss,
    SmoothAccuracyLoss,
    SoftmaxLoss,
    SoftTruncationLoss,
    VSLoss,
)
from imbalance_kernels.multilabel import MultilabelSoftmaxLoss
from imbalance_kernels.priors import BinaryPrior, Prior, RunningPrior
from imbalance_kernels.sigmoid_modules import (
    AsymmetricLoss,
    QualityFocalLoss,
    SigmoidCrossEntropyLoss,
    SigmoidFocalLoss,
    SigmoidHardTruncationLoss,
    SigmoidLoss,
    SigmoidPolyLoss,
    SigmoidSmoothAccuracyLoss,
    SigmoidSoftTruncationLoss,
    VarifocalLoss,
)
from imbalance_kernels.softmax_row import LossOutput

__version__ = _implementation.version()

__all__ = [
    "AngularMargin",
    "ArcFaceLoss",
    "AsymmetricLoss",
    "BalancedSoftmaxLoss",
    "BinaryPrior",
    "CircleLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "F1WeightedCrossEntropyLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "HardTruncationLoss",
    "LDAMLoss",
    "LinearLoss",
    "LogitAdjustedLoss",
    "LossOutput",
    "MultilabelSoftmaxLoss",
    "PolyLoss",
    "Prior",
    "QualityFocalLoss",
    "RadiusMarginLoss",
    "RunningPrior",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
    "SigmoidHardTruncationLoss",
    "SigmoidLoss",
    "SigmoidPolyLoss",
    "SigmoidSmoothAccuracyLoss",
    "SigmoidSoftTruncationLoss",
    "SmoothAccuracyLoss",
    "SmoothF1Loss",
    "SoftTruncationLoss",
    "SoftmaxLoss",
    "VSLoss",
    "VarifocalLoss",
    "binary_objectives",
    "functional",
    "objectives",
    "priors",
    "show_config",
]
