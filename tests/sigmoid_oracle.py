"""An independent oracle of the sigmoid family: each loss written literally in float64, its gradient left to autograd.

It shares nothing with the package: one-hot labels, probabilities, and torchvision's own formula for focal loss. It is
meant for moderate logits.
"""

import math

import torch
from torch import Tensor


def cross_entropy(x, y):
    """-y log p - (1 - y) log(1 - p)."""
    return -y * torch.nn.functional.logsigmoid(x) - (1 - y) * torch.nn.functional.logsigmoid(-x)


def of_truth(value):
    """Positive and negative costs of an objective given as a function of log p, p and 1 - p of the truth."""

    def sides(x, y, *parameters):
        log_p, p, n = torch.nn.functional.logsigmoid(x), torch.sigmoid(x), torch.sigmoid(-x)
        log_n = torch.nn.functional.logsigmoid(-x)
        return value(log_p, p, n, *parameters), value(log_n, n, p, *parameters)

    return sides


def focal(x, y, gamma):
    """torchvision.ops.sigmoid_focal_loss without alpha, on both sides."""
    p = torch.sigmoid(x)
    p_t = p * y + (1 - p) * (1 - y)
    n_t = torch.where(y == 1, torch.sigmoid(-x), torch.where(y == 0, p, 1 - p_t))  # where 1 - p_t does not cancel
    value = cross_entropy(x, y) * n_t**gamma
    return value, value


def quality_focal(x, y, beta):
    """|y - p|^beta BCE."""
    p = torch.sigmoid(x)
    miss = torch.where(y == 1, torch.sigmoid(-x), (y - p).abs())
    value = miss**beta * cross_entropy(x, y)
    return value, value


def varifocal(x, y, gamma, alpha):
    """y BCE of positives, alpha p^gamma BCE of the rest."""
    negative = alpha * torch.sigmoid(x) ** gamma * -torch.nn.functional.logsigmoid(-x)
    return cross_entropy(x, y), torch.where(y > 0, torch.zeros_like(x), negative)


def asymmetric(x, y, gamma_neg, gamma_pos, clip):
    """ASL: -(1 - p)^gamma_pos log p, -m^gamma_neg log(1 - m)."""
    p = torch.sigmoid(x)
    m = (p - clip).clamp_min(0)
    safe = torch.where(m > 0, m, torch.ones_like(m) / 2)  # autograd of 0^gamma
    negative = torch.where(m > 0, -(safe**gamma_neg) * torch.log1p(-safe), torch.zeros_like(m))
    return -(torch.sigmoid(-x) ** gamma_pos) * torch.nn.functional.logsigmoid(x), negative


# name -> costs as a positive and as a negative, of logits, labels and parameters
OBJECTIVES = {
    "cross_entropy": of_truth(lambda log_p, p, n: -log_p),
    "focal": focal,
    "hard_truncation": of_truth(lambda log_p, p, n, threshold: -log_p * (p < threshold).double()),
    "soft_truncation": of_truth(lambda log_p, p, n, k: -log_p * n**k / (n**k + p**k)),
    "poly": of_truth(lambda log_p, p, n, epsilon: -log_p + epsilon * n),
    "poly_focal": of_truth(lambda log_p, p, n, gamma, epsilon: -(n**gamma) * log_p + epsilon * n ** (gamma + 1)),
    "gce": of_truth(lambda log_p, p, n, q: (1 - p**q) / q),
    "smooth_accuracy": of_truth(lambda log_p, p, n: n),
    "token_scaled": of_truth(lambda log_p, p, n: -p.detach() * log_p),
    "quality_focal": quality_focal,
    "varifocal": varifocal,
    "asymmetric": asymmetric,
}


def one_hot(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels (N, C) of class labels (N,), C the background, or of lists (N, K)."""
    listed = target[:, None] if target.dim() == 1 else target
    labels = torch.zeros(listed.shape[0], num_classes, dtype=torch.float64)
    for row, classes in enumerate(listed.tolist()):
        for c in classes:
            if c not in (ignore_index, num_classes):
                labels[row, c] = 1
    return labels


def loss(
    logits: Tensor,  # (N, C)
    target: Tensor,  # (N,), (N, K), or (N, C)
    objective: str = "cross_entropy",
    parameters: tuple = (),
    *,
    alpha=None,
    weight=None,
    pos_weight=None,
    prior=None,
    ignore_index=-100,
    reduction="mean",
    sample_weight=None,
    normalizer=None,
) -> Tensor:
    """The loss in float64; ignored rows are left out of it, and of the divisor."""
    x = logits.double()
    num_rows, num_classes = x.shape
    dense = target.is_floating_point() or target.dtype == torch.bool
    y = target.double() if dense else one_hot(target, num_classes, ignore_index)
    keep = torch.ones(num_rows, dtype=torch.bool)
    if target.dim() == 1 and not dense:
        keep = target != ignore_index
    x = torch.where(keep[:, None], x, torch.zeros_like(x))
    if prior is not None:
        x = x + torch.log(prior.double() / (1 - prior.double()))
    positive, negative = OBJECTIVES[objective](x, y, *(p.double() if isinstance(p, Tensor) else p for p in parameters))
    if alpha is not None:
        alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
        positive, negative = positive * alpha, negative * (1 - alpha)
    if pos_weight is not None:
        positive = positive * pos_weight.double()
    losses = y * positive + (1 - y) * negative
    if weight is not None:
        losses = losses * weight.double()
    if sample_weight is not None:
        sample = sample_weight.double()
        losses = losses * (sample if sample.dim() == 2 else sample[:, None])
    losses = losses * keep[:, None].double()
    if reduction == "none":
        return losses
    if normalizer is not None:
        return losses.sum() / normalizer
    return losses.sum() if reduction == "sum" else losses.sum() / (int(keep.sum()) * num_classes or math.nan)
