"""The methods of the long-tail study: how each trains, and what its logits mean at test time.

At test time a model is asked two questions: which class is it, if classes are as frequent as in training ("overall"),
and if all are equally frequent ("balanced"). Both follow from the model's evidence log p(x | class) + constant, which
each method leaves in its logits in a way of its own: a model of cross-entropy has the training set's log prior in them,
a model of logit adjustment does not, class weights w leave log w there, and so on (`Method.evidence`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import imbalance_kernels as ik
from imbalance_kernels import priors

Evidence = Callable[[Tensor, Tensor], Tensor]  # logits (N, C), class counts (C,) -> evidence (N, C)


def log_prior(counts: Tensor) -> Tensor:
    return torch.log(counts.double() / counts.sum()).float()


def has_prior(logits: Tensor, counts: Tensor) -> Tensor:
    """Trained on the data as they are: the prior is in the logits."""
    return logits - log_prior(counts)


def has_none(logits: Tensor, counts: Tensor) -> Tensor:
    """The loss, the sampler or the weights made all classes equally likely."""
    return logits


def has_prior_to(power: float) -> Evidence:
    """Adjusted with tau = 1 - power: what the loss does not add the model learns."""
    return lambda logits, counts: logits - power * log_prior(counts)


def has_weights(weights: Callable[[Tensor], Tensor]) -> Evidence:
    """Weights w of classes are as good as drawing each w times as often: log (prior w) is in the logits."""
    return lambda logits, counts: logits - log_prior(counts) - torch.log(weights(counts)).float()


def of_vs(logits: Tensor, counts: Tensor) -> Tensor:
    """VS loss multiplies logits by a factor of their class, in training; the prior is in its bias."""
    return logits * priors.vs_factors(ik.Prior(counts), VS_GAMMA).float()


@dataclass(frozen=True)
class Method:
    name: str
    group: str
    loss: Callable[[Tensor], nn.Module]  # class counts (C,) -> loss
    evidence: Evidence = has_prior
    deferred: Callable[[Tensor], Tensor] | None = None  # class weights that are switched on late
    scale: float = 1.0  # of logits: a cosine head, if it is not 1
    is_balanced: bool = False  # batches draw every class as often
    starts_with_prior: bool = False  # in the last layer's bias


SHARPNESS = 4.0  # of soft truncation: with 1 two of its forms are focal loss with gamma 1
VS_GAMMA = 0.15
LDAM_SCALE = 30.0
TAUS = (0.5, 1.0, 1.5, 2.0)

inverse = priors.inverse_frequency_weights
effective = priors.effective_number_weights


def adjusted(tau: float) -> Callable[[Tensor], nn.Module]:
    return lambda counts: ik.LogitAdjustedLoss(counts, tau=tau)


def with_prior_of(**changed: str) -> Callable[[Tensor], nn.Module]:
    """Logit adjustment by the prior that is left after a sampler or weights."""

    def loss(counts: Tensor) -> nn.Module:
        weight = inverse(counts) if "weight" in changed else None
        prior = priors.effective_prior(ik.Prior(counts), sampler=changed.get("sampler"), weight=weight)
        return ik.CrossEntropyLoss(weight=None if weight is None else weight.float(), prior=prior)

    return loss


PLAIN, WEIGHTED, HARD, MARGINS, ADJUSTED, COMBINED, TWICE = (
    "plain",
    "class weights",
    "hard examples",
    "margins",
    "logit adjustment",
    "combinations",
    "corrected twice, and repaired",
)
CROSS_ENTROPY, POST_HOC = "cross-entropy", "post-hoc adjustment"
LDAM_DRW, LOGIT_ADJUSTMENT, FOCAL = "LDAM-DRW", "logit adjustment, τ = 1", "focal, γ = 1"
STARTED, RUNNING = "logit adjustment as the bias' start", "logit adjustment, running prior"

METHODS = (
    Method(CROSS_ENTROPY, PLAIN, lambda counts: ik.CrossEntropyLoss()),
    Method("weights 1/p", WEIGHTED, lambda counts: ik.CrossEntropyLoss(weight=inverse(counts).float()), has_none),
    Method("weights 1/p, deferred", WEIGHTED, lambda counts: ik.CrossEntropyLoss(), has_none, deferred=inverse),
    Method(
        "effective number",
        WEIGHTED,
        lambda counts: ik.CrossEntropyLoss(weight=effective(counts).float()),
        has_weights(effective),
    ),
    Method(
        "effective number, deferred",
        WEIGHTED,
        lambda counts: ik.CrossEntropyLoss(),
        has_weights(effective),
        deferred=effective,
    ),
    Method("balanced sampler", WEIGHTED, lambda counts: ik.CrossEntropyLoss(), has_none, is_balanced=True),
    Method("focal, γ = 0.5", HARD, lambda counts: ik.FocalLoss(0.5)),
    Method(FOCAL, HARD, lambda counts: ik.FocalLoss(1.0)),
    Method("focal, γ = 2", HARD, lambda counts: ik.FocalLoss(2.0)),
    Method("hard truncation", HARD, lambda counts: ik.HardTruncationLoss()),
    *(
        Method(f"soft truncation, {form}", HARD, lambda counts, form=form: ik.SoftTruncationLoss(SHARPNESS, form=form))
        for form in ("softmax_neg", "one_minus_softmax", "log_odds")
    ),
    Method("poly", HARD, lambda counts: ik.PolyLoss()),
    Method("GCE", HARD, lambda counts: ik.GeneralizedCrossEntropyLoss()),
    Method("LDAM", MARGINS, lambda counts: ik.LDAMLoss(counts, scale=LDAM_SCALE), scale=LDAM_SCALE),
    Method(
        LDAM_DRW,
        MARGINS,
        lambda counts: ik.LDAMLoss(counts, scale=LDAM_SCALE),
        has_weights(effective),
        deferred=effective,
        scale=LDAM_SCALE,
    ),
    Method("VS", MARGINS, lambda counts: ik.VSLoss(counts, gamma=VS_GAMMA, tau=1.0), of_vs),
    *(Method(f"logit adjustment, τ = {tau:g}", ADJUSTED, adjusted(tau), has_prior_to(1 - tau)) for tau in TAUS),
    Method(
        RUNNING, ADJUSTED, lambda counts: ik.LogitAdjustedLoss(prior=priors.RunningPrior(len(counts))), has_none
    ),
    Method(STARTED, ADJUSTED, lambda counts: ik.CrossEntropyLoss(), starts_with_prior=True),
    Method("focal, γ = 1 + adjustment", COMBINED, lambda counts: ik.FocalLoss(1.0, prior=ik.Prior(counts)), has_none),
    Method(
        "hard truncation + adjustment", COMBINED, lambda counts: ik.HardTruncationLoss(prior=ik.Prior(counts)), has_none
    ),
    Method("poly + adjustment", COMBINED, lambda counts: ik.PolyLoss(prior=ik.Prior(counts)), has_none),
    Method(
        "smoothing 0.1 + adjustment",
        COMBINED,
        lambda counts: ik.CrossEntropyLoss(label_smoothing=0.1, prior=ik.Prior(counts)),
        has_none,
    ),
    Method(
        "LDAM + adjustment",
        COMBINED,
        lambda counts: ik.LDAMLoss(counts, scale=LDAM_SCALE, prior=ik.Prior(counts)),
        has_none,
        scale=LDAM_SCALE,
    ),
    Method(
        "adjustment + weights 1/p",
        TWICE,
        lambda counts: ik.LogitAdjustedLoss(counts, weight=inverse(counts).float()),
        has_none,
    ),
    Method("effective prior of weights 1/p", TWICE, with_prior_of(weight="1/p"), has_none),
    Method("adjustment + balanced sampler", TWICE, adjusted(1.0), has_none, is_balanced=True),
    Method(
        "effective prior of the balanced sampler",
        TWICE,
        with_prior_of(sampler="balanced"),
        has_none,
        is_balanced=True,
    ),
)  # fmt: skip

MAIN = (
    CROSS_ENTROPY,
    "weights 1/p",
    "effective number, deferred",
    FOCAL,
    LDAM_DRW,
    "VS",
    LOGIT_ADJUSTMENT,
)  # and POST_HOC, which is cross-entropy's model

BY_NAME = {method.name: method for method in METHODS}
