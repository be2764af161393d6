"""The benchmarked losses: as arguments of `imbalance_kernels.SoftmaxLoss`, and the same formula written eagerly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import imbalance_kernels as ik
from imbalance_kernels.logit_map import CircleMargin
from imbalance_kernels.objectives import REGISTRY, CrossEntropy, Focal, Objective
from imbalance_kernels.priors import ldam_margins, vs_factors

CROSS_ENTROPY = "cross_entropy"
FOCAL_ADJUSTED = "focal + logit adjustment"
LOGIT_ADJUSTMENT = "logit adjustment"

SMOOTHING = 0.1
SOFTCAP = 30.0
Z_LOSS = 1e-4
FACE_SCALE, FACE_MARGIN, ANGLE = 64.0, 0.35, 0.5
LDAM_SCALE = 30.0
CIRCLE_SCALE, CIRCLE_MARGIN = 80.0, 0.25


@dataclass(frozen=True)
class ClassVectors:
    """What the losses know of the classes; all are (C,)."""

    counts: Tensor  # int64
    log_prior: Tensor
    weight: Tensor
    factor: Tensor
    margin: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> ClassVectors:
        prior = ik.Prior(counts)
        weight = (counts.double() / counts.sum() * len(counts)) ** -0.5
        return cls(counts, prior.bias, weight, vs_factors(prior), ldam_margins(counts))

    def to(self, dtype: torch.dtype) -> ClassVectors:
        """Vectors in the logits' dtype, as a module of eager losses has them after `.to(dtype)`."""
        vectors = (self.log_prior, self.weight, self.factor, self.margin)
        return ClassVectors(self.counts, *(vector.to(dtype) for vector in vectors))


Eager = Callable[[Tensor, Tensor, ClassVectors], Tensor]  # logits (N, C), target (N,) -> the mean loss


@dataclass(frozen=True)
class Loss:
    """A loss to benchmark; `beside` names the loss that its time is a ratio to, `limit` how much that may be."""

    name: str
    arguments: Callable[[ClassVectors], dict[str, Any]]  # of imbalance_kernels.SoftmaxLoss
    eager: Eager | None
    on_cosines: bool = False
    beside: str = CROSS_ENTROPY
    limit: float | None = None

    def module(self, classes: ClassVectors, **keywords: Any) -> ik.SoftmaxLoss:
        return ik.SoftmaxLoss(**self.arguments(classes), **keywords)


# The objectives as functions of the target's log-probability (N,), which is how they are usually written.
EAGER_OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda log_p: -log_p,
    "focal": lambda log_p: -((1 - log_p.exp()) ** 2) * log_p,
    "hard_truncation": lambda log_p: -log_p * (log_p < math.log(0.5)),
    "soft_truncation": lambda log_p: -(1 - log_p.exp()) * log_p,
    "poly": lambda log_p: -log_p + (1 - log_p.exp()),
    "poly_focal": lambda log_p: -((1 - log_p.exp()) ** 2) * log_p + (1 - log_p.exp()) ** 3,
    "gce": lambda log_p: (1 - (0.7 * log_p).exp()) / 0.7,
    "smooth_accuracy": lambda log_p: 1 - log_p.exp(),
    "token_scaled": lambda log_p: -log_p.exp().detach() * log_p,
}


def _target_log_p(x: Tensor, target: Tensor) -> Tensor:
    """(N,); a little faster than gathering from F.log_softmax, forward and backward."""
    return -F.cross_entropy(x, target, reduction="none")


def eager_objective(name: str) -> Eager | None:
    formula = EAGER_OBJECTIVES.get(name)
    if formula is None:  # a newcomer to the registry is timed all the same
        return None
    return lambda x, target, classes: formula(_target_log_p(x, target)).mean()


def eager_focal_adjusted(x: Tensor, target: Tensor, classes: ClassVectors) -> Tensor:
    return EAGER_OBJECTIVES["focal"](_target_log_p(x + classes.log_prior, target)).mean()


def _with_margin(x: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    return x.scatter_add(1, target[:, None], -margin[:, None])


def eager_ldam(x: Tensor, target: Tensor, classes: ClassVectors) -> Tensor:
    return F.cross_entropy(LDAM_SCALE * _with_margin(x, target, classes.margin[target]), target)


def eager_cosface(x: Tensor, target: Tensor, classes: ClassVectors) -> Tensor:
    return F.cross_entropy(FACE_SCALE * _with_margin(x, target, torch.full_like(x[:, 0], FACE_MARGIN)), target)


def eager_arcface(x: Tensor, target: Tensor, classes: ClassVectors) -> Tensor:
    cosine = x.gather(1, target[:, None])
    shifted = torch.cos(torch.arccos(cosine.clamp(-1, 1)) + ANGLE)
    shifted = torch.where(cosine < -math.cos(ANGLE), cosine - ANGLE * math.sin(ANGLE), shifted)
    return F.cross_entropy(FACE_SCALE * x.scatter(1, target[:, None], shifted), target)


def eager_circle(x: Tensor, target: Tensor, classes: ClassVectors) -> Tensor:
    positive = x.gather(1, target[:, None])
    pull = (1 + CIRCLE_MARGIN - positive).detach().relu() * (positive - (1 - CIRCLE_MARGIN))
    push = (x + CIRCLE_MARGIN).detach().relu() * (x - CIRCLE_MARGIN)
    return F.cross_entropy(CIRCLE_SCALE * push.scatter(1, target[:, None], pull), target)


def eager_z_loss(x: Tensor, target: Tensor, classes: ClassVectors) -> Tensor:
    return F.cross_entropy(x, target) + Z_LOSS * x.logsumexp(dim=1).square().mean()


def with_margin_and_prior(objective: type[Objective]) -> Loss:
    """An objective with a margin for each class and a prior."""
    formula = EAGER_OBJECTIVES.get(objective.name)

    def eager(x: Tensor, target: Tensor, classes: ClassVectors) -> Tensor:
        z = _with_margin(x, target, classes.margin[target]) + classes.log_prior
        return formula(_target_log_p(z, target)).mean()

    arguments = lambda classes: {  # noqa: E731
        "objective": objective(),
        "margin": classes.margin,
        "prior": ik.Prior(classes.counts),
    }
    return Loss(f"{objective.name}, margin and prior", arguments, eager if formula else None)


def _objective_loss(objective: type[Objective]) -> Loss:
    return Loss(objective.name, lambda classes: {"objective": objective()}, eager_objective(objective.name), limit=1.10)


PLAIN = Loss(CROSS_ENTROPY, lambda classes: {}, lambda x, target, classes: F.cross_entropy(x, target))

FOCAL_AND_PRIOR = Loss(
    FOCAL_ADJUSTED,
    lambda classes: {"objective": Focal(2.0), "prior": ik.Prior(classes.counts)},
    eager_focal_adjusted,
    limit=1.10,
)

WITH_PRIOR = Loss(
    LOGIT_ADJUSTMENT,
    lambda classes: {"prior": ik.Prior(classes.counts)},
    lambda x, target, classes: F.cross_entropy(x + classes.log_prior, target),
    limit=1.10,
)

WITH_FACTOR = Loss(
    "VS (prior and factor)",
    lambda classes: {"prior": ik.Prior(classes.counts), "factor": classes.factor},
    lambda x, target, classes: F.cross_entropy(classes.factor * x + classes.log_prior, target),
    beside=LOGIT_ADJUSTMENT,
    limit=1.15,
)

# On a GPU. Each of VECTOR_LOSSES reads one vector (C,) more than the one before it.
FOCAL_MARGIN_PRIOR = with_margin_and_prior(Focal)
VECTOR_LOSSES = (
    WITH_PRIOR,
    WITH_FACTOR,
    Loss(
        "VS with weighted smoothing",
        lambda classes: {
            **WITH_FACTOR.arguments(classes),
            "weight": classes.weight.float(),
            "label_smoothing": SMOOTHING,
        },
        eager=None,
    ),
)
OBJECTIVE_LOSSES = tuple(
    FOCAL_MARGIN_PRIOR if objective is Focal else with_margin_and_prior(objective) for objective in REGISTRY.values()
)

# Timed in every mode, against every candidate.
MAIN_LOSSES = (PLAIN, FOCAL_AND_PRIOR)

# Timed once, beside plain cross-entropy: an objective, margin or prior may cost 10 % more than it, a further class
# vector 15 % more than without that vector, smoothing with class weights 50 %.
OTHER_LOSSES = (
    *(_objective_loss(objective) for objective in REGISTRY.values() if objective is not CrossEntropy),
    WITH_PRIOR,
    FOCAL_AND_PRIOR,
    WITH_FACTOR,
    Loss(
        "LDAM (margin per class)",
        lambda classes: {"margin": classes.margin, "scale": LDAM_SCALE},
        eager_ldam,
        on_cosines=True,
        limit=1.10,
    ),
    Loss(
        "CosFace",
        lambda classes: {"margin": FACE_MARGIN, "scale": FACE_SCALE, "cosines": True},
        eager_cosface,
        on_cosines=True,
        limit=1.10,
    ),
    Loss(
        "ArcFace",
        lambda classes: {"margin": ik.AngularMargin(m2=ANGLE), "scale": FACE_SCALE},
        eager_arcface,
        on_cosines=True,
        limit=1.10,
    ),
    Loss(
        "Circle",
        lambda classes: {"margin": CircleMargin(CIRCLE_MARGIN), "scale": CIRCLE_SCALE},
        eager_circle,
        on_cosines=True,
    ),
    Loss(
        "class weight",
        lambda classes: {"weight": classes.weight.float()},
        lambda x, target, classes: F.cross_entropy(x, target, classes.weight),
        limit=1.15,
    ),
    Loss(
        "label smoothing",
        lambda classes: {"label_smoothing": SMOOTHING},
        lambda x, target, classes: F.cross_entropy(x, target, label_smoothing=SMOOTHING),
    ),
    Loss(
        "weighted smoothing",
        lambda classes: {"weight": classes.weight.float(), "label_smoothing": SMOOTHING},
        lambda x, target, classes: F.cross_entropy(x, target, classes.weight, label_smoothing=SMOOTHING),
        limit=1.50,
    ),
    Loss(
        "soft cap",
        lambda classes: {"softcap": SOFTCAP},
        lambda x, target, classes: F.cross_entropy(SOFTCAP * torch.tanh(x / SOFTCAP), target),
    ),
    Loss("z-loss", lambda classes: {"z_loss": Z_LOSS}, eager_z_loss),
)
