"""An independent oracle of the multi-label softmax and of batch statistics: each written literally in float64.

It shares nothing with the package: one-hot labels, plain exponentials, gradients left to autograd. It is meant for
moderate logits.
"""

import math

import torch
from sigmoid_oracle import one_hot
from torch import Tensor


def labels_of(target: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Dense labels (N, C) and which rows count (N,)."""
    if target.is_floating_point() or target.dtype == torch.bool:
        return target.double(), torch.ones(target.shape[0], dtype=torch.bool)
    keep = target != ignore_index if target.dim() == 1 else torch.ones(target.shape[0], dtype=torch.bool)
    return one_hot(target, num_classes, ignore_index), keep


def multilabel_softmax(
    logits: Tensor,  # (N, C)
    target: Tensor,  # (N,), (N, K), or (N, C)
    *,
    threshold=0.0,
    prior=None,
    ignore_index=-100,
    reduction="mean",
    sample_weight=None,
    normalizer=None,
) -> Tensor:
    """log(1 + sum (1 - y) e^z) + log(1 + sum y e^-z); rows that do not count are left out."""
    y, keep = labels_of(target, logits.shape[1], ignore_index)
    z = logits.double()[keep] - threshold
    if prior is not None:
        z = z + torch.log(prior.double() / (1 - prior.double()))
    y = y[keep]
    kept = torch.log1p(((1 - y) * torch.exp(z)).sum(dim=1)) + torch.log1p((y * torch.exp(-z)).sum(dim=1))
    if sample_weight is not None:
        kept = kept * sample_weight.double()[keep]
    if reduction == "none":
        return torch.zeros(logits.shape[0], dtype=torch.float64).masked_scatter(keep, kept)
    if normalizer is not None:
        return kept.sum() / normalizer
    return kept.sum() if reduction == "sum" else kept.sum() / (int(keep.sum()) or math.nan)


def column_sums(logits, target, *, ignore_index=-100, sample_weight=None, from_softmax=False):
    """The sums of p, of y p and of y, each (C,), and the rows' weight."""
    y, keep = labels_of(target, logits.shape[1], ignore_index)
    weight = torch.ones(logits.shape[0], dtype=torch.float64) if sample_weight is None else sample_weight.double()
    x, y, weight = logits.double()[keep], y[keep], weight[keep][:, None]
    p = torch.softmax(x, dim=1) if from_softmax else torch.sigmoid(x)
    return (weight * p).sum(dim=0), (weight * y * p).sum(dim=0), (weight * y).sum(dim=0), weight.sum()


def smooth_f1(logits, target, *, average="per_class", smooth=0.0, **options):
    """1 - F1 of probabilities; without smoothing classes without positives are left out one by one."""
    predicted, true_positives, positives, _ = column_sums(logits, target, **options)
    if average == "global":
        predicted, true_positives, positives = (count.sum()[None] for count in (predicted, true_positives, positives))
    losses = [
        1 - (2 * true_positives[c] + smooth) / (predicted[c] + positives[c] + smooth)
        for c in range(len(positives))
        if smooth > 0 or positives[c] > 0
    ]
    return torch.stack(losses).mean() if losses else 0 * logits.double().sum()


def f1_weighted_cross_entropy(
    logits, target, *, average="per_class", smooth=0.0, sample_weight=None, reduction="mean", ignore_index=-100
):
    """-(1 - F1/2) y log p - (F1/2) (1 - y) log(1 - p), F1 detached."""
    options = {"ignore_index": ignore_index, "sample_weight": sample_weight}
    predicted, true_positives, positives, _ = (count.detach() for count in column_sums(logits, target, **options))
    f1 = (2 * true_positives + smooth) / (predicted + positives + smooth)
    if average == "global":
        f1 = (2 * true_positives.sum() + smooth) / (predicted.sum() + positives.sum() + smooth)
    y, keep = labels_of(target, logits.shape[1], ignore_index)
    x = logits.double()
    log_p, log_n = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    losses = -(1 - f1 / 2) * y * log_p - f1 / 2 * (1 - y) * log_n
    if sample_weight is not None:
        losses = losses * sample_weight.double()[:, None]
    losses = torch.where(keep[:, None], losses, torch.zeros_like(losses))
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (int(keep.sum()) * logits.shape[1])
