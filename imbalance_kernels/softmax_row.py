"""The row program in PyTorch: from the N-vectors of a row's split to its loss, and the reduction over rows.

It is the mirror of csrc/softmax_row.h: the reference uses it on its own split, losses with two temperatures on the
N-vectors of the kernels' `target_and_rest`. Autograd differentiates it; nothing here is larger than (N,).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalance_kernels.objectives import evaluate
from imbalance_kernels.options import SoftmaxOptions

__all__ = [
    "Loss",
    "LossOutput",
    "RowSplit",
    "RowTargets",
    "highest_targets",
    "log_probs_of",
    "reduce_rows",
    "returned",
    "row_losses",
    "row_weights",
    "without_rows",
]

# A Tensor, or a LossOutput where the call asks for more: a union of the two would ask every caller which it is.
Loss = Any


class LossOutput(NamedTuple):
    """What a softmax-family loss returns with ``return_log_probs=True`` or ``return_correct=True``.

    Example:
        >>> from imbalance_kernels.functional import cross_entropy
        >>> output = cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]), return_log_probs=True)
        >>> output.log_probs, output.correct
        (tensor([-1.3863,  0.0000]), None)
    """

    loss: Tensor  # what the call returns without these flags
    log_probs: Tensor | None = None  # of target's shape: log p_t, detached
    correct: Tensor | None = None  # of target's shape, bool: no logit is above the target's


class RowSplit(NamedTuple):
    """A row split into its target and the rest; target, rest and the sums are relative to the shift."""

    target: Tensor  # (N,) z_t - shift; -inf where the target is masked or the targets are class probabilities
    rest: Tensor  # (N,) log sum_{j != t} exp(z_j - shift)
    shift: Tensor  # (N,) max_{j != t} z_j, a constant of differentiation
    weighted_logits: Tensor | None = None  # (N,) sum_j u_j (z_j - shift), u = class weights or weighted probabilities
    weight_sum: Tensor | None = None  # (N,) sum_j u_j over unmasked classes, a constant

    @property
    def log_odds(self) -> Tensor:
        """log(p_t / (1 - p_t)) (N,)."""
        return self.target - self.rest

    @property
    def relative_logsumexp(self) -> Tensor:
        """log sum_j exp(z_j - shift) (N,); finite also where the target is masked."""
        return torch.logaddexp(self.target, self.rest)


class RowTargets(NamedTuple):
    """What the target of each row is."""

    indices: Tensor  # (N,) int64 class index, 0 where there is none
    valid: Tensor  # (N,) bool: the target is a class
    ignored: Tensor  # (N,) bool: the target is ignore_index; neither: no class, the row is NaN

    @classmethod
    def of(cls, target: Tensor, num_classes: int, ignore_index: int) -> RowTargets:
        """Sort class indices (N,) into valid, ignored and neither."""
        ignored = target == ignore_index
        valid = (target >= 0) & (target < num_classes) & ~ignored
        return cls(torch.where(valid, target, 0).long(), valid, ignored)


def without_rows(target: Tensor, options: SoftmaxOptions, normalizer: Tensor | None) -> Tensor:
    """Return class indices (N,), all ignored where the normalizer is 0: then what rows hold does not matter."""
    if normalizer is None:
        return target
    return torch.where(normalizer == 0, torch.full_like(target, options.ignore_index), target)


def log_probs_of(split: RowSplit, targets: RowTargets) -> Tensor:
    """Return log p_t of each row (N,), a constant: 0 where ignored, -inf where the target is masked."""
    log_probs = torch.nn.functional.logsigmoid(split.log_odds.detach())
    return torch.where(targets.ignored, torch.zeros_like(log_probs), log_probs)


def highest_targets(
    logits: Tensor,  # (N, C), or (B, C, P) where N is B * P
    targets: RowTargets,
) -> Tensor:
    """Return whether no raw logit is above the target's (N,); False where the target is no class.

    Such a row is correct if its log-probability is a number too. With ties the target is the highest, whichever index
    torch.argmax would return.
    """
    logits = logits.detach()
    if logits.shape[1] == 0:
        return torch.zeros_like(targets.valid)
    highest = logits.amax(dim=1, keepdim=True)  # (N, 1) or (B, 1, P)
    of_target = logits.gather(1, targets.indices.view_as(highest))
    return (of_target >= highest).flatten() & targets.valid


def returned(output: LossOutput, options: SoftmaxOptions, shape: torch.Size) -> Loss:
    """Return what the call asked for of an output, rows (N,) in the target's shape."""
    loss = output.loss.reshape(shape) if options.reduction == "none" else output.loss
    if not options.reports:
        return loss
    log_probs, correct = output.log_probs, output.correct
    return LossOutput(
        loss,
        log_probs.reshape(shape) if options.return_log_probs and log_probs is not None else None,
        correct.reshape(shape) if options.return_correct and correct is not None else None,
    )


def row_losses(
    split: RowSplit,
    targets: RowTargets | None,  # None for class probabilities
    options: SoftmaxOptions,
    sample_weight: Tensor | None,  # (N,)
    num_classes: int,
    value: Tensor | None = None,  # (N,) G, where it is not the objective of the log-odds
) -> Tensor:
    """Return the loss of each row (N,): weights, label smoothing and z-loss included, ignored rows exactly 0."""
    smoothing = options.label_smoothing
    if targets is None:
        assert split.weight_sum is not None and split.weighted_logits is not None
        loss = split.weight_sum * split.rest - split.weighted_logits
    else:
        loss = evaluate(options.objective.at(targets.indices), split.log_odds) if value is None else value
        if options.weight is not None:
            loss = loss * options.weight[targets.indices]
        if smoothing > 0:
            assert split.weight_sum is not None and split.weighted_logits is not None
            spread = split.weight_sum * split.relative_logsumexp - split.weighted_logits
            loss = (1 - smoothing) * loss + (smoothing / num_classes) * spread
    if options.z_loss > 0:
        relative = split.rest if targets is None else split.relative_logsumexp
        loss = loss + options.z_loss * (split.shift + relative).square()
    if sample_weight is not None:
        loss = loss * sample_weight
    return loss if targets is None else torch.where(targets.ignored, torch.zeros_like(loss), loss)


def reduce_rows(
    losses: Tensor,  # (N,)
    targets: RowTargets | None,
    options: SoftmaxOptions,
    sample_weight: Tensor | None,  # (N,)
    normalizer: Tensor | None,  # ()
) -> Tensor:
    """Return the reduced loss: () for "mean" and "sum", (N,) for "none"; a normalizer of zero gives 0."""
    if options.reduction == "none":
        return losses
    if normalizer is not None:
        zero = normalizer == 0
        total = torch.where(zero, torch.zeros_like(losses), losses).sum()  # an infinite row would make it NaN
        return total / torch.where(zero, torch.ones_like(normalizer), normalizer)
    if options.reduction == "sum":
        return losses.sum()
    return losses.sum() / row_weights(torch.ones_like(losses), targets, options, sample_weight).sum()


def row_weights(
    ones: Tensor,  # (N,)
    targets: RowTargets | None,
    options: SoftmaxOptions,
    sample_weight: Tensor | None,  # (N,)
) -> Tensor:
    """Return what a row counts for in a mean (N,), as torch has it: sample weight * class weight, 0 where not valid."""
    rows = ones if sample_weight is None else sample_weight
    if targets is None:
        return rows
    if options.weight is not None:
        rows = rows * options.weight[targets.indices]
    return torch.where(targets.valid, rows, torch.zeros_like(rows))
