"""From logits to decisions under a prior, and first biases of a last layer: what surrounds a loss with a prior."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from imbalance_kernels.options import LOGIT_DTYPES, accumulate_dtype
from imbalance_kernels.priors.arguments import AnyPrior, prior_bias
from imbalance_kernels.priors.fixed import BinaryPrior, checked_tau

__all__ = ["adjust_logits", "best_threshold", "init_focal_bias_", "init_prior_bias_", "predict"]

RULES = ("overall", "balanced")
TRAININGS = ("cross_entropy", "adjusted")
METRICS = ("f1", "balanced_accuracy", "accuracy")

# What is added to the logits, in units of tau * log prior, before the argmax: see `predict`.
SHIFTS = {
    ("overall", "cross_entropy"): 0,
    ("balanced", "cross_entropy"): -1,
    ("overall", "adjusted"): 1,
    ("balanced", "adjusted"): 0,
}

Layer = TypeVar("Layer", bound=torch.nn.Module)


def adjust_logits(
    logits: Tensor, prior: AnyPrior | BinaryPrior, tau: float | None = None, *, class_dim: int = 1
) -> Tensor:
    """Return ``logits + tau * log prior``: the logits whose softmax the loss with this prior is of.

    Of a model trained with that loss these are the logits of the data's probabilities. With ``tau=-1`` it is post-hoc
    adjustment, of a model trained without a prior; `predict` chooses between them.

    Args:
        logits: (N, C), (C,), (N, C, d1, ...) or, with ``class_dim=-1``, (..., C); float32, float64, bfloat16 or
            float16.
        prior: a `Prior`, a `RunningPrior`, class probabilities (C,), or for logits of sigmoids a `BinaryPrior`, whose
            log-odds are added.
        tau: instead of the prior's own; that of probabilities is 1.
        class_dim: 1 as torch has it, or -1 for classes last.

    Returns:
        The logits' shape, in float32 (float64 for float64); differentiable in the logits. -inf for an excluded class.

    Raises:
        ValueError, TypeError: a shape, dtype or prior that does not fit.

    Source: kexue.fm 7615; Menon et al. 2021.

    Example:
        >>> adjust_logits(torch.zeros(1, 2), torch.tensor([0.5, 0.5])).exp().tolist()
        [[0.5, 0.5]]
    """
    bias = _bias(prior, tau)
    return _shifted(logits, bias, _class_dim(logits, bias, class_dim))


def predict(
    logits: Tensor,
    prior: AnyPrior,
    *,
    rule: str,
    trained_with: str,
    tau: float | None = None,
    class_dim: int = 1,
) -> Tensor:
    """Return the class that is predicted from logits f, by one of two rules, for a model trained in one of two ways.

    What a model learns are the probabilities of its data, ``P(y | x)``, proportional to ``P(x | y) prior_y``: with
    cross-entropy ``softmax(f)`` is P(y | x); with a loss that adds the prior ``softmax(f + tau log prior)`` is. The
    most probable class makes the fewest errors over all (rule "overall"). To recognise every class equally well
    ("balanced": the mean of the classes' recalls) the prior is taken off again, ``P(y | x) / prior_y``:

    ==============  ==============================  ==============================
    rule            trained_with="cross_entropy"    trained_with="adjusted"
    ==============  ==============================  ==============================
    "overall"       argmax f                        argmax f + tau log prior
    "balanced"      argmax f - tau log prior        argmax f
    ==============  ==============================  ==============================

    With ``tau = 1`` these are Bayes' rules. Both arguments must be given: which correction is right depends on what the
    training has corrected already. After class weights or a sampler the prior is that of `effective_prior`.

    Args:
        logits: f, (N, C), (C,), (N, C, d1, ...) or, with ``class_dim=-1``, (..., C).
        prior: a `Prior`, a `RunningPrior` or class probabilities (C,); of the training, whatever the rule.
        rule: "overall" or "balanced".
        trained_with: "cross_entropy", or "adjusted" by a loss with this prior.
        tau: instead of the prior's own; that of probabilities is 1.
        class_dim: 1 as torch has it, or -1 for classes last.

    Returns:
        Class indices int64, of the logits' shape without its classes. A class that the prior excludes is never
        predicted.

    Raises:
        ValueError: rule or trained_with is none; a shape that does not fit.
        TypeError: a prior or dtype that does not fit. Of a `BinaryPrior` each class has a threshold instead: it is
            present where its logit, or that of `adjust_logits`, is above 0.

    Source: kexue.fm 7615; Menon et al. 2021, sections 4.1 and 4.2.

    Example:
        >>> logits, prior = torch.tensor([[1.0, 0.0]]), torch.tensor([0.9, 0.1])
        >>> int(predict(logits, prior, rule="overall", trained_with="cross_entropy"))
        0
        >>> int(predict(logits, prior, rule="balanced", trained_with="cross_entropy"))
        1
    """
    for name, value, allowed in (("rule", rule, RULES), ("trained_with", trained_with, TRAININGS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, but it must be one of {allowed}")
    if isinstance(prior, BinaryPrior):
        raise TypeError(
            "prior is a BinaryPrior, whose classes are present or absent each on its own: none is chosen among them; "
            "compare logits (balanced), or those of adjust_logits (overall), with 0"
        )
    bias = prior_bias(prior, tau)
    dim = _class_dim(logits, bias, class_dim)
    bias = torch.where(bias == -math.inf, bias, SHIFTS[rule, trained_with] * bias)
    return _shifted(logits.detach(), bias, dim).argmax(dim)


def _bias(prior: AnyPrior | BinaryPrior, tau: float | None) -> Tensor:
    """Return what any prior adds to the logits (C,), in float64."""
    if isinstance(prior, BinaryPrior):
        return prior.bias if tau is None else checked_tau(tau) * prior.log_prior
    return prior_bias(prior, tau)


def _class_dim(logits: Tensor, bias: Tensor, class_dim: int) -> int:
    """Return the dimension of the logits' classes, checked."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits is a {type(logits).__name__}, but it must be a tensor")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits has dtype {logits.dtype}, but it must be one of {', '.join(map(str, LOGIT_DTYPES))}")
    dim = 0 if logits.dim() == 1 else class_dim
    if not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"class_dim is {class_dim}, but logits has shape {tuple(logits.shape)}")
    if bias.shape != (logits.shape[dim],):
        raise ValueError(
            f"prior has shape {tuple(bias.shape)}, but logits {tuple(logits.shape)} has {logits.shape[dim]} classes in "
            f"dimension {dim}"
        )
    return dim


def _shifted(logits: Tensor, bias: Tensor, dim: int) -> Tensor:
    dtype = accumulate_dtype(logits.dtype)
    classes_last = logits.to(dtype).movedim(dim, -1) + bias.to(logits.device, dtype)
    return classes_last.movedim(-1, dim)


def init_prior_bias_(linear: Layer, prior: AnyPrior | BinaryPrior, tau: float | None = None) -> Layer:
    """Set the bias of a last layer to ``tau * log prior``, in place, and return the layer.

    With cross-entropy training starts from the prior instead of having to learn it first. To start with, the loss is
    that of `LogitAdjustedLoss`; but here the prior is part of the logits: it is in them at prediction (which then is as
    after cross-entropy), and the bias learns on. Give a prior to the layer or to the loss, not to both.

    Args:
        linear: a layer whose bias is (C,), or (A * C,) of a detector's A anchors: Linear, Conv2d, LinearLoss.linear.
        prior: a `Prior`, a `RunningPrior`, class probabilities (C,), or for a loss of sigmoids a `BinaryPrior`, whose
            log-odds it becomes.
        tau: instead of the prior's own; that of probabilities is 1.

    Raises:
        ValueError: the layer has no bias, or not one for each class; a class that the prior excludes.

    Source: kexue.fm 7615; Karpathy 2019, "A recipe for training neural networks".

    Example:
        >>> head = init_prior_bias_(torch.nn.Linear(8, 3), torch.tensor([0.5, 0.25, 0.25]))
        >>> head.bias.exp().tolist()
        [0.5, 0.25, 0.25]
    """
    bias = _layer_bias(linear, "linear")
    values = _bias(prior, tau)
    if bias.dim() != 1 or bias.numel() % values.numel() != 0:
        raise ValueError(
            f"linear has a bias of shape {tuple(bias.shape)}, but prior has {values.numel()} classes: it must be "
            f"({values.numel()},), or so many for each anchor"
        )
    if not values.is_meta and not bool(torch.isfinite(values).all()):
        raise ValueError("prior excludes a class, whose bias would be -inf: give it a count, zero_count='laplace'")
    with torch.no_grad():
        bias.copy_(values.repeat(bias.numel() // values.numel()))
    return linear


def init_focal_bias_(layer: Layer, prior: float = 0.01) -> Layer:
    """Set the bias of a last layer to ``-log((1 - prior) / prior)``, in place, and return the layer.

    RetinaNet's start: every sigmoid gives `prior` at first, so that the negatives, which are nearly all labels, do not
    swamp the first steps. With a probability for each class it is `init_prior_bias_` of a `BinaryPrior`.

    Args:
        layer: any layer with a bias: Linear, Conv2d.
        prior: the probability that a label is positive, between 0 and 1.

    Raises:
        ValueError: prior is not between 0 and 1; the layer has no bias.

    Source: Lin et al. 2017, "Focal loss for dense object detection", section 4.1.

    Example:
        >>> head = init_focal_bias_(torch.nn.Conv2d(16, 80, 3))
        >>> round(head.bias[0].sigmoid().item(), 6)
        0.01
    """
    bias = _layer_bias(layer, "layer")
    if isinstance(prior, Tensor | BinaryPrior):
        raise TypeError("prior is one number here: use init_prior_bias_ with a BinaryPrior for one of each class")
    if not 0 < prior < 1:
        raise ValueError(f"prior is {prior!r}, but it must be between 0 and 1")
    with torch.no_grad():
        bias.fill_(math.log(prior) - math.log1p(-prior))
    return layer


def _layer_bias(layer: Any, argument: str) -> Tensor:
    bias = getattr(layer, "bias", None)
    if not isinstance(layer, torch.nn.Module) or not isinstance(bias, Tensor):
        raise ValueError(f"{argument} is a {type(layer).__name__} without a bias, which is what is set")
    return bias


def best_threshold(scores: Tensor, targets: Tensor, metric: str = "f1") -> Tensor:
    """Return the threshold of scores at which ``scores >= threshold`` is best by a metric: exact, in N log N.

    All cuts between different scores are compared, each column on its own. A threshold is the midpoint of the two
    scores beside it; inf where nothing at all should be predicted, the lowest score where everything should. Of equally
    good cuts it is the highest. Search on validation data, not on those that the result is reported for.

    Args:
        scores: (N,), or (N, C) for a threshold of each column: logits, probabilities or any other score, floating
            point.
        targets: of scores' shape: bool, or numbers 0 and 1.
        metric: "f1", "balanced_accuracy" (the mean of the recalls of positives and negatives, or the one that there is)
            or "accuracy". Without positives nothing should be predicted, by any of them.

    Returns:
        Thresholds () or (C,), in scores' dtype and on their device.

    Raises:
        ValueError: shapes that do not fit, no rows, scores that are NaN, targets other than 0 and 1, another metric.
        TypeError: scores are not floating point.

    Source: Lipton et al. 2014, "Optimal thresholding of classifiers to maximize F1 measure".

    Example:
        >>> scores, targets = torch.tensor([0.9, 0.6, 0.4, 0.2]), torch.tensor([1, 1, 0, 0])
        >>> threshold = best_threshold(scores, targets)
        >>> float(threshold), (scores >= threshold).tolist()
        (0.5, [True, True, False, False])
    """
    scores, hits = _checked_scores(scores, targets, metric)
    num_rows = scores.shape[0]
    columns, hits = scores.reshape(num_rows, -1), hits.reshape(num_rows, -1)
    columns, order = columns.sort(dim=0, descending=True)
    zero = torch.zeros_like(hits[:1])
    found = torch.cat([zero, hits.gather(0, order).cumsum(0)])  # (N + 1, C) true positives among the k highest
    predicted = torch.arange(num_rows + 1, device=scores.device)[:, None]  # (N + 1, 1) k
    quality = _quality(metric, found, predicted)

    # No threshold lies between equal scores, nor above inf.
    above, below = columns[:-1], columns[1:]
    end = torch.ones_like(hits[:1], dtype=torch.bool)
    cuts = torch.cat([columns[:1] != math.inf, above > below, end])
    best = torch.where(cuts, quality, -1).argmax(0)  # the first of equals, which has the highest threshold

    # A midpoint may be rounded to the lower score, which must stay below.
    middle = above / 2 + below / 2
    middle = torch.where((middle > below) & (middle <= above), middle, above)
    thresholds = torch.cat([torch.full_like(columns[:1], math.inf), middle, columns[-1:]])
    return thresholds.gather(0, best[None]).reshape(scores.shape[1:])


def _checked_scores(scores: Tensor, targets: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Return scores and targets as int64, checked."""
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, but it must be one of {METRICS}")
    for name, value in (("scores", scores), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, but it must be a tensor")
    if not scores.is_floating_point():
        raise TypeError(f"scores has dtype {scores.dtype}, but it must be floating point")
    if scores.dim() not in (1, 2) or scores.shape[0] == 0:
        raise ValueError(f"scores has shape {tuple(scores.shape)}, but it must be (N,) or (N, C) with N above 0")
    if targets.shape != scores.shape:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, but it must be scores', {tuple(scores.shape)}")
    if targets.device != scores.device:
        raise ValueError(f"targets is on {targets.device}, but scores is on {scores.device}")
    scores, hits = scores.detach(), targets.detach() == 1
    if bool(scores.isnan().any()):
        raise ValueError("scores holds NaN, which is neither above nor below a threshold")
    if not bool((hits | (targets == 0)).all()):
        raise ValueError("targets must be 0 or 1, or bool: the labels of each column")
    return scores, hits.to(torch.int64)


def _quality(metric: str, found: Tensor, predicted: Tensor) -> Tensor:
    """Return what is maximised, (N + 1, C): F1, or integers in the order of the metric, in which equals are equal.

    Without positives all cuts are alike, or fewer predictions better: the first, of none, is chosen.
    """
    positives, num_rows = found[-1:], predicted[-1:]
    negatives = num_rows - positives
    rejected = negatives - (predicted - found)  # true negatives
    if metric == "accuracy":
        return found + rejected
    if metric == "balanced_accuracy":
        return found * negatives.clamp_min(1) + rejected * positives
    return 2 * found.double() / (predicted + positives).clamp_min(1)
