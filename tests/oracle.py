"""An independent oracle: every softmax-family loss written literally in float64, its gradient left to autograd.

It shares nothing with the package: probabilities instead of log-odds, one-hot masks instead of a split, `p.detach()`
    where a
slope is declared. It is meant for moderate logits (p and 1 - p representable), which is where literal formulas hold.
"""

import math

import torch
from torch import Tensor

# name -> G as a function of (log p, p, n) with n = 1 - p, and of the parameters
OBJECTIVES = {
    "cross_entropy": lambda log_p, p, n: -log_p,
    "focal": lambda log_p, p, n, gamma: -(n**gamma) * log_p,
    "hard_truncation": lambda log_p, p, n, threshold: -log_p * (p < threshold).double(),
    "soft_truncation": lambda log_p, p, n, sharpness: -log_p * n**sharpness / (n**sharpness + p**sharpness),
    "poly": lambda log_p, p, n, epsilon: -log_p + epsilon * n,
    "poly_focal": lambda log_p, p, n, gamma, epsilon: -(n**gamma) * log_p + epsilon * n ** (gamma + 1),
    "gce": lambda log_p, p, n, q: (1 - p**q) / q,
    "smooth_accuracy": lambda log_p, p, n: n,
    "token_scaled": lambda log_p, p, n: -p.detach() * log_p,
}


def effective_logits(
    x: Tensor,  # (N, C) float64
    target: Tensor | None,  # (N,)
    *,
    scale=1.0,
    factor=None,
    prior=None,
    softcap=None,
    margin=None,
) -> Tensor:
    """z (N, C); `prior` is a tensor of probabilities, `margin` a number, tensor (C,), ("arc", m) or ("circle", m)."""
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    if target is not None and margin is not None:
        at_target = torch.nn.functional.one_hot(target, x.shape[1]).bool()
        if isinstance(margin, tuple) and margin[0] == "arc":
            moved = torch.cos(torch.arccos(z.clamp(-1, 1)) + margin[1])
        elif isinstance(margin, tuple):
            m = margin[1]
            pull, push = (1 + m - z).clamp_min(0).detach(), (z + m).clamp_min(0).detach()
            moved, z = pull * (z - (1 - m)), push * (z - m)
        else:
            moved = z - margin
        z = torch.where(at_target, moved, z)
    z = z * scale
    if factor is not None:
        z = z * factor.double()
    return z if prior is None else z + torch.log(prior.double() / prior.double().sum())


def loss(
    logits: Tensor,  # (N, C)
    target: Tensor,  # (N,) or (N, C) probabilities
    objective: str = "cross_entropy",
    parameters: tuple = (),
    *,
    weight=None,
    label_smoothing=0.0,
    z_loss=0.0,
    ignore_index=-100,
    reduction="mean",
    sample_weight=None,
    normalizer=None,
    **logit_map,
) -> Tensor:
    """The reduced loss in float64; an ignored row is left out, not multiplied by 0."""
    x = logits.double()
    num_rows, num_classes = x.shape
    w = torch.ones(num_classes, dtype=torch.float64) if weight is None else weight.double()
    sample = torch.ones(num_rows, dtype=torch.float64) if sample_weight is None else sample_weight.double()
    if target.is_floating_point():
        z = effective_logits(x, None, **logit_map)
        smoothed = (1 - label_smoothing) * target.double() + label_smoothing / num_classes
        lse = torch.logsumexp(z, dim=1)
        rows = (w * smoothed * (lse[:, None] - z)).sum(dim=1) + z_loss * lse**2
        rows, total = rows * sample, sample.sum()
    else:
        keep = target != ignore_index
        t = target[keep].long()
        z = effective_logits(x[keep], t, **logit_map)
        probabilities = torch.softmax(z, dim=1)
        others = 1 - torch.nn.functional.one_hot(t, num_classes).double()
        p = probabilities.gather(1, t[:, None]).squeeze(1)
        n = torch.where(p < 0.5, 1 - p, (probabilities * others).sum(dim=1))  # each where its gradient does not cancel
        log_p = torch.log_softmax(z, dim=1).gather(1, t[:, None]).squeeze(1)
        lse = torch.logsumexp(z, dim=1)
        picked = [value[t].double() if isinstance(value, Tensor) else value for value in parameters]
        kept = (1 - label_smoothing) * w[t] * OBJECTIVES[objective](log_p, p, n, *picked)
        if label_smoothing > 0:
            kept = kept + label_smoothing / num_classes * (w * (lse[:, None] - z)).sum(dim=1)
        kept = (kept + z_loss * lse**2) * sample[keep]
        rows = torch.zeros(num_rows, dtype=torch.float64).masked_scatter(keep, kept)
        total = (sample[keep] * w[t]).sum()
    if reduction == "none":
        return rows
    if reduction == "sum" and normalizer is None:
        return rows.sum()
    return rows.sum() / (total if normalizer is None else normalizer)


def log_probs(
    logits: Tensor,  # (N, C)
    target: Tensor,  # (N,)
    ignore_index: int = -100,
    **logit_map,
) -> Tensor:
    """log p_t of each row (N,) in float64; 0 for an ignored one."""
    keep = target != ignore_index
    z = effective_logits(logits.double()[keep], target[keep].long(), **logit_map)
    found = torch.log_softmax(z, dim=1).gather(1, target[keep].long()[:, None]).squeeze(1)
    return torch.zeros(target.shape, dtype=torch.float64).masked_scatter(keep, found)


def correct(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Whether no entry of a row of raw logits (N, C) is above its target's (N,); False for an ignored row."""
    rows = zip(logits.double().tolist(), target.tolist(), strict=True)
    return torch.tensor([t != ignore_index and not any(x > row[t] for x in row) for row, t in rows], dtype=torch.bool)


def loss_and_gradient(logits: Tensor, upstream: Tensor | float, function=loss, **options) -> tuple[Tensor, Tensor]:
    """(loss, gradient of (loss * upstream).sum() in the logits), both float64."""
    x = logits.detach().double().requires_grad_(True)
    value = function(x, **options)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), x)
    return value.detach(), gradient


def worst_row_error(ours: Tensor, exact: Tensor) -> float:
    """The largest error of a gradient (N, C), each row relative to its own largest entry (NaN anywhere is infinite)."""
    if exact.numel() == 0:
        return 0.0
    size = exact.abs().amax(dim=-1, keepdim=True)
    error = (ours.double() - exact).abs() / torch.where(size == 0, math.inf, size)
    untouched = (ours.double() != 0) & (size == 0)
    return math.inf if bool(torch.isnan(error).any() or untouched.any()) else float(error.max())
