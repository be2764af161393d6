"""The operations in plain PyTorch: the specification that every kernel is tested against, and the fall-back.

Differentiable by autograd, float64-capable, on any device; it allocates several (N, C) temporaries, which is what the
kernels exist to avoid. Logits are (N, C) here, or channels-first (B, C, P) for a loss, which moves their classes; ops/
does checks, layouts and the choice of implementation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.binary_objectives import Sides, side_slopes, side_values
from imbalance_kernels.differentiation import declared, once_differentiable
from imbalance_kernels.options import MultilabelOptions, SigmoidOptions, SoftmaxOptions, accumulate_dtype
from imbalance_kernels.softmax_row import (
    LossOutput,
    RowSplit,
    RowTargets,
    highest_targets,
    log_probs_of,
    reduce_rows,
    row_losses,
    without_rows,
)

__all__ = ["column_sums", "dense_labels", "multilabel_softmax", "sigmoid_loss", "softmax_loss", "target_and_rest"]


def target_and_rest(
    logits: Tensor,  # (N, C)
    target: Tensor,  # (N,) class indices, or (N, C) class probabilities
    options: SoftmaxOptions,
) -> RowSplit:
    """Split each row of effective logits into its target and the log-sum-exp of the rest.

    A row whose target is ignored is split as if it had one class with logit 0 (target 0, rest -inf), so that its log
    probability is 0 and its gradient exactly 0; a row whose target is no class gives NaN. With class probabilities
    there is no target: it is -inf, and the rest is the whole row.
    """
    if target.is_floating_point():
        return _whole_row(logits, target, options)
    x = logits.to(accumulate_dtype(logits.dtype))
    targets = RowTargets.of(target, x.shape[1], options.ignore_index)
    outside = ~targets.valid & ~targets.ignored
    index = targets.indices[:, None]  # (N, 1)
    masked = options.logit_map.masked(x)  # (N, C)
    x = x * torch.where(outside, math.nan, 1.0).to(x.dtype)[:, None]
    x_target = _without(x.gather(1, index).squeeze(1), targets.ignored)
    x = _without(x, masked | targets.ignored[:, None])

    z = options.logit_map.every_class(x)  # (N, C)
    target_logit = options.logit_map.target(_unmasked(x_target), targets.indices)  # (N,)
    rest, shift = _logsumexp(z, masked.scatter(1, index, True))
    split_target = target_logit - shift + torch.where(x_target == -math.inf, -math.inf, 0.0)

    weighted_logits = weight_sum = None
    if options.label_smoothing > 0:
        weights = torch.ones_like(x) if options.weight is None else options.weight.expand_as(x)
        relative = (z - shift[:, None]).scatter(1, index, (target_logit - shift)[:, None])
        weighted_logits = torch.where(masked, 0.0, weights * relative).sum(dim=1)
        weight_sum = torch.where(masked, 0.0, weights).sum(dim=1)

    zero = torch.zeros_like(shift)
    return RowSplit(
        torch.where(targets.ignored, zero, split_target),
        torch.where(targets.ignored, -math.inf, rest),
        torch.where(targets.ignored, zero, shift),
        weighted_logits,
        weight_sum,
    )


def softmax_loss(
    logits: Tensor,  # (N, C), or (B, C, P) where N is B * P
    target: Tensor,  # (N,) class indices, or class probabilities in the logits' shape
    options: SoftmaxOptions,
    sample_weight: Tensor | None = None,  # (N,)
    normalizer: Tensor | None = None,  # ()
) -> LossOutput:
    """Return the reduced loss of `options`, and (N,) what they ask for; see imbalance_kernels.functional.softmax_loss.

    Of rows that do not count, ignored ones or all with a normalizer of 0, the log-probability is 0 and none is correct.
    """
    num_classes = logits.shape[1]
    if logits.dim() == 3:
        logits = logits.movedim(1, 2).reshape(-1, num_classes)
        target = target.movedim(1, 2).reshape(-1, num_classes) if target.is_floating_point() else target
    targets = None if target.is_floating_point() else RowTargets.of(target, num_classes, options.ignore_index)
    split = target_and_rest(logits, target, options)
    losses = row_losses(split, targets, options, sample_weight, num_classes)
    loss = reduce_rows(losses, targets, options, sample_weight, normalizer)
    if not options.reports:
        return LossOutput(loss)
    counted = RowTargets.of(without_rows(target, options, normalizer), num_classes, options.ignore_index)
    log_probs = log_probs_of(split, counted)
    correct = highest_targets(logits, counted) & ~log_probs.isnan() if options.return_correct else None
    return LossOutput(loss, log_probs, correct)


def sigmoid_loss(
    logits: Tensor,  # (N, C), or channels first (B, C, P)
    target: Tensor,  # labels (N,) in [0, C], lists of labels (N, K), or the logits' shape in floating point or bool
    options: SigmoidOptions,
    sample_weight: Tensor | None = None,  # (N,), or the logits' shape
    normalizer: Tensor | None = None,  # ()
) -> Tensor:
    """Return the reduced loss of `options`, or for "none" that of each logit; N = B * P where channels come first.

    A logit whose sample weight is 0 costs exactly 0, whatever it holds, and so does one whose row is ignored; a row
    whose target is neither a class nor the background, or lists what is no class, is NaN.
    """
    dtype = accumulate_dtype(logits.dtype)
    x = logits.to(dtype)
    y = dense_labels(target, logits, options.ignore_index).to(dtype)

    def per_class(vector: Tensor) -> Tensor:
        return vector if logits.dim() == 2 else vector[:, None]

    weight = None if sample_weight is None else _per_logit(sample_weight, logits)
    ignored = torch.zeros((), dtype=torch.bool, device=x.device) if weight is None else weight == 0
    if target.dim() == 1:
        rows = RowTargets.of(target, logits.shape[1] + 1, options.ignore_index)  # background is a label too
        ignored = ignored | _per_logit(rows.ignored, logits)
    wrong = _wrong_rows(target, logits.shape[1], options.ignore_index)
    if wrong is not None:
        x = _poisoned(x, _per_logit(wrong, logits))
    if normalizer is not None:
        ignored = ignored | (normalizer == 0)
    x = _without(x, ignored.expand_as(x))
    if options.bias is not None:
        x = x + per_class(options.bias)
    objective = options.objective
    parameter = objective.class_parameter()
    objective = objective if parameter is None else objective.with_class_parameter(per_class(parameter))
    weights = [
        per_class(value) if isinstance(value, Tensor) else value
        for value in (options.positive_weight, options.negative_weight)
    ]

    def mixed(sides: Sides) -> Tensor:
        shares = zip((y, 1 - y), weights, sides, strict=True)
        positive, negative = (torch.where(share == 0, 0.0, share * by * side) for share, by, side in shares)
        return positive + negative

    losses = declared(x, lambda x: mixed(side_values(objective, x, y)), lambda x: mixed(side_slopes(objective, x, y)))
    losses = losses if weight is None else losses * weight
    losses = _without(losses, ignored.expand_as(losses))
    if options.reduction == "none":
        return losses
    if normalizer is not None:
        return losses.sum() / torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
    if options.reduction == "sum":
        return losses.sum()
    if target.dim() != 1:
        return losses.sum() / losses.numel()
    return losses.sum() / (rows.valid.sum() * logits.shape[1])


def multilabel_softmax(
    logits: Tensor,  # (N, C), or channels first (B, C, P)
    target: Tensor,  # labels (N,) in [0, C], lists of labels (N, K), or the logits' shape in floating point or bool
    options: MultilabelOptions,
    sample_weight: Tensor | None = None,  # (N,)
    normalizer: Tensor | None = None,  # ()
) -> Tensor:
    """Return the reduced loss of `options`, or for "none" that of each row; N = B * P where channels come first.

    A label of 1 is no negative and one of 0 no positive: they are left out of a sum, never subtracted from it. So is a
    raw logit of -inf, of both sums. A row whose sample weight is 0, or whose label is ignored, costs exactly 0,
    whatever it holds; one whose label is neither a class nor the background, or that lists what is no class, is NaN.

    A logit of +inf costs a positive nothing. A negative it costs +inf; its own gradient is NaN then and that of the
    row's other negatives 0, as of torch.logsumexp.
    """
    x = logits.to(accumulate_dtype(logits.dtype))
    y = dense_labels(target, logits, options.ignore_index).to(x.dtype)
    if logits.dim() == 3:
        x, y = (each.transpose(1, 2).reshape(-1, logits.shape[1]) for each in (x, y))
    x, uncounted, num_valid = _counted_rows(x, target, options.ignore_index, sample_weight, normalizer)
    masked = x == -math.inf
    x = _without(x, masked)
    z = x if options.bias is None else x + options.bias
    negative = torch.where(masked | (y == 1), -math.inf, z)
    positive = torch.where(masked | (y == 0), -math.inf, -z)
    losses = _log_one_plus_sum(negative, 1 - y) + _log_one_plus_sum(positive, y)
    losses = losses if sample_weight is None else losses * sample_weight
    losses = _without(losses, uncounted)
    if options.reduction == "none":
        return losses
    if normalizer is not None:
        return losses.sum() / torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
    return losses.sum() if options.reduction == "sum" else losses.sum() / num_valid


def column_sums(
    logits: Tensor,  # (N, C), or channels first (B, C, P)
    target: Tensor,  # labels (N,) in [0, C], lists of labels (N, K), or the logits' shape in floating point or bool
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,  # (N,)
    *,
    from_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over rows of p, of y p and of y, each (C,) and weighted by sample_weight; N = B * P.

    p is a sigmoid, or the softmax of a row, where a logit of -inf is a masked class; a row of nothing else is NaN. A
    row whose sample weight is 0, or whose label is ignored, adds nothing, whatever it holds; one whose label is neither
    a class nor the background, or that lists what is no class, makes the sums of p and of y p NaN.
    """
    x = logits.to(accumulate_dtype(logits.dtype))
    y = dense_labels(target, logits, ignore_index).to(x.dtype)
    if logits.dim() == 3:
        x, y = (each.transpose(1, 2).reshape(-1, logits.shape[1]) for each in (x, y))
    x, uncounted, _ = _counted_rows(x, target, ignore_index, sample_weight, None)
    p = _Softmax.apply(x) if from_softmax else declared(x, torch.sigmoid, _sigmoid_slope)
    weight = torch.ones_like(uncounted, dtype=x.dtype) if sample_weight is None else sample_weight
    weight = torch.where(uncounted, 0.0, weight)[:, None]  # (N, 1)
    true_positive = torch.where(y == 0, torch.zeros_like(p), y * p)
    wrong = _wrong_rows(target, logits.shape[1], ignore_index)
    if wrong is not None:  # NaN in both sums, of all classes
        true_positive = true_positive + torch.where(wrong & ~uncounted, math.nan, 0.0).to(x.dtype)[:, None]
    return (weight * p).sum(dim=0), (weight * true_positive).sum(dim=0), (weight * y).sum(dim=0)


def dense_labels(target: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Return labels of the logits' shape: 1 at each class that a row's target names; dense ones as they are."""
    if target.is_floating_point() or target.dtype == torch.bool:
        return target
    num_classes = logits.shape[1]
    listed = target[:, None] if target.dim() == 1 else target  # (N, K)
    classes = torch.arange(num_classes, device=target.device)
    if listed.shape[1] == 1:
        labels = listed == classes  # (N, C)
    else:
        spare = torch.where((listed >= 0) & (listed < num_classes) & (listed != ignore_index), listed, num_classes)
        labels = torch.zeros(listed.shape[0], num_classes + 1, dtype=torch.bool, device=target.device)
        labels = labels.scatter(1, spare, True)[:, :num_classes]
    labels = labels & (classes != ignore_index)
    return labels if logits.dim() == 2 else _channels_first(labels, logits)


def _counted_rows(
    x: Tensor,  # (N, C)
    target: Tensor,  # (N,), (N, K) or the logits' shape
    ignore_index: int,
    sample_weight: Tensor | None,  # (N,)
    normalizer: Tensor | None,  # ()
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Return x with 0 in rows that cost nothing and NaN in those of wrong labels, which rows cost nothing, and N."""
    uncounted = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    num_valid: Tensor | int = x.shape[0]
    if sample_weight is not None:
        uncounted = sample_weight == 0
    if normalizer is not None:
        uncounted = uncounted | (normalizer == 0)
    if target.dim() == 1:
        rows = RowTargets.of(target, x.shape[1] + 1, ignore_index)  # background is a label too
        uncounted = uncounted | rows.ignored
        num_valid = rows.valid.sum()
    wrong = _wrong_rows(target, x.shape[1], ignore_index)
    if wrong is not None:
        x = _poisoned(x, (wrong & ~uncounted)[:, None])
    return _without(x, uncounted[:, None]), uncounted, num_valid


def _wrong_rows(target: Tensor, num_classes: int, ignore_index: int) -> Tensor | None:
    """Return whether a row's label is neither a class nor the background, or a list names what is no class (N,)."""
    if target.is_floating_point() or target.dtype == torch.bool:
        return None
    no_class = (target < 0) | (target > num_classes if target.dim() == 1 else target >= num_classes)
    wrong = no_class & (target != ignore_index)
    return wrong if target.dim() == 1 else wrong.any(dim=1)


def _poisoned(x: Tensor, wrong: Tensor) -> Tensor:
    """Return x with NaN where it is wrong, in its gradient too."""
    return x * torch.where(wrong, math.nan, 1.0).to(x.dtype)


def _sigmoid_slope(x: Tensor) -> Tensor:
    """Return p (1 - p), where autograd's own 1 - p has no digits left of a confident positive."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


class _Softmax(torch.autograd.Function):
    """p = softmax(x) of rows (N, C), and its gradient p (g - sum p g), g that of p.

    In a sure row both g and the sum are nearly the g of its highest logit, and autograd's difference has no digits
    left: that one is taken off all of them first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p = torch.softmax(x, dim=1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor]:
        (p,) = ctx.saved_tensors
        if p.shape[1] == 0:
            return (g,)
        relative = g - g.gather(1, p.argmax(dim=1, keepdim=True))
        return (p * (relative - (p * relative).sum(dim=1, keepdim=True)),)


def _log_one_plus_sum(u: Tensor, weight: Tensor) -> Tensor:
    """Return log(1 + sum_j weight_j exp(u_j)) (N,) of u (N, C), to full relative accuracy where it is small.

    The shift is finite: beside an exponent of +inf, whose sum is +inf, all others are nothing.
    """
    shift = torch.cat([u.new_zeros(u.shape[0], 1), u.detach()], dim=1).amax(dim=1).clamp(max=torch.finfo(u.dtype).max)
    total = (weight * torch.exp(u - shift[:, None])).sum(dim=1)
    return torch.where(shift == 0, torch.log1p(total), shift + torch.log(torch.exp(-shift) + total))


def _per_logit(vector: Tensor, logits: Tensor) -> Tensor:
    """Return a row vector (N,) so that it broadcasts against logits; what has their shape as it is."""
    if vector.shape == logits.shape:
        return vector
    return vector[:, None] if logits.dim() == 2 else vector.view(logits.shape[0], 1, logits.shape[2])


def _channels_first(rows: Tensor, logits: Tensor) -> Tensor:
    """Return rows (B * P, C) as (B, C, P)."""
    return rows.view(logits.shape[0], logits.shape[2], logits.shape[1]).transpose(1, 2)


def _whole_row(logits: Tensor, probabilities: Tensor, options: SoftmaxOptions) -> RowSplit:
    """The split for class probabilities (N, C): smoothed and weighted, over unmasked classes.

    A masked class of positive probability keeps its weight: its loss is infinite.
    """
    x = logits.to(accumulate_dtype(logits.dtype))
    masked = options.logit_map.masked(x)
    z = options.logit_map.every_class(_without(x, masked))
    rest, shift = _logsumexp(z, masked)
    smoothing = options.label_smoothing
    weights = (1 - smoothing) * probabilities.to(x.dtype) + (smoothing / x.shape[1]) * (~masked).to(x.dtype)
    weights = weights if options.weight is None else weights * options.weight
    relative = (z - shift[:, None]).masked_fill(masked, -math.inf)
    weighted_logits = torch.where(weights == 0, 0.0, weights * relative).sum(dim=1)
    return RowSplit(torch.full_like(rest, -math.inf), rest, shift, weighted_logits, weights.sum(dim=1))


def _without(x: Tensor, masked: Tensor) -> Tensor:
    """Return x with 0 where masked: nothing that such an entry holds (-inf, NaN) reaches the result or autograd."""
    return torch.where(masked, torch.zeros_like(x), x)


def _unmasked(x: Tensor) -> Tensor:
    """Return x with 0 for -inf, its gradient passed on: as in torch a masked target has the slope of a logit of 0."""
    return declared(x, lambda x: torch.where(x == -math.inf, torch.zeros_like(x), x), torch.ones_like)


def _logsumexp(z: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log sum_j exp(z_j - shift), shift), both (N,), over the entries of z (N, C) that are not excluded.

    The shift is their maximum, 0 where there is none; the sum is -inf there.
    """
    z = z.masked_fill(excluded, -math.inf)
    if z.shape[1] == 0:
        return z.sum(dim=1) - math.inf, z.sum(dim=1)
    highest = z.detach().amax(dim=1)
    shift = torch.where(highest == -math.inf, torch.zeros_like(highest), highest)
    total = torch.exp(z - shift[:, None]).sum(dim=1)
    empty = total == 0
    return torch.where(empty, -math.inf, torch.log(torch.where(empty, torch.ones_like(total), total))), shift
