"""Class priors: what is expected of each class, what a loss, a first bias and a prediction make of it.

`Prior` and `BinaryPrior` are fixed (fixed.py), `RunningPrior` counts while a loss trains (running.py), `class_counts`
counts beforehand (counts.py). Weights, margins and factors made of counts, and what weights do to a prior, are in
weights.py; prediction rules, thresholds and first biases in prediction.py.
"""

from imbalance_kernels.priors.arguments import chosen_prior, prior_bias
from imbalance_kernels.priors.counts import class_counts
from imbalance_kernels.priors.fixed import BinaryPrior, Prior
from imbalance_kernels.priors.prediction import (
    adjust_logits,
    best_threshold,
    init_focal_bias_,
    init_prior_bias_,
    predict,
)
from imbalance_kernels.priors.running import RunningPrior
from imbalance_kernels.priors.weights import (
    effective_number_weights,
    effective_prior,
    inverse_frequency_weights,
    ldam_margins,
    vs_factors,
    warn_if_corrected_twice,
)

__all__ = [
    "BinaryPrior",
    "Prior",
    "RunningPrior",
    "adjust_logits",
    "best_threshold",
    "chosen_prior",
    "class_counts",
    "effective_number_weights",
    "effective_prior",
    "init_focal_bias_",
    "init_prior_bias_",
    "inverse_frequency_weights",
    "ldam_margins",
    "predict",
    "prior_bias",
    "vs_factors",
    "warn_if_corrected_twice",
]
