"""Class priors: what is expected of each class, what a loss, a first bias and a prediction make of it.

`Prior` and `BinaryPrior` are fixed (fixed.py), `RunningPrior` counts while a loss trains (running.py), `class_counts`
counts beforehand (counts.py). Weights, margins and factors made of counts, and what weights do to a prior, are in
weights.py.
"""

from imbalance_kernels.priors.arguments import chosen_prior, prior_bias
from imbalance_kernels.priors.counts import class_counts
from imbalance_kernels.priors.fixed import BinaryPrior, Prior
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
    "chosen_prior",
    "class_counts",
    "effective_number_weights",
    "effective_prior",
    "inverse_frequency_weights",
    "ldam_margins",
    "prior_bias",
    "vs_factors",
    "warn_if_corrected_twice",
]
