"""RunningPrior: the class prior of what a loss is trained on, counted batch by batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.priors.counts import all_reduced, checked_num_classes, count_indices
from imbalance_kernels.priors.fixed import checked_tau

__all__ = ["RunningPrior"]


class RunningPrior(torch.nn.Module):
    """A class prior counted while training: adds tau * log prior_j to the logits of a softmax-family loss.

    ``prior_j = (counts_j + pseudo_count) / sum_k (counts_k + pseudo_count)``

    A loss that is given one as `prior` counts the targets of a batch in training, before the loss is computed, so that
    these are in its prior already; in evaluation, or after ``prior.eval()``, counts stay. Before the first batch every
    class is as likely as any other. Targets that are ignored, and rows of sample_weight 0, do not count; all others
    count once, whatever they weigh. A call that raises has changed nothing.

    The counts are the state: they are in the state dict, stay exact when the module's precision changes, and are all
    that processes exchange, so that the prior is that of one process with all batches. One loss should count a prior's
    batches: two losses that share it count them twice. A function (imbalance_kernels.functional) never counts, but
    reads the prior as it stands: call `update` before it.

    Losses of sigmoids have another prior, which is no `RunningPrior`: see `BinaryPrior`.

    Args:
        num_classes: C.
        tau: temperature of the prior, an attribute that may be changed; 0 switches it off.
        momentum: None counts everything, exactly, in int64. A number in (0, 1] is how much of the counts before is kept
            with each batch, ``counts = momentum * counts + batch``, in float64: a window of about 1 / (1 - momentum)
            batches; 1 counts everything, and class probabilities too.
        process_group: a group of torch.distributed whose batches are counted together, such as
            torch.distributed.group.WORLD; each process calls its loss as often as the others. None is this process
            alone.
        pseudo_count: above 0; what each class has beside its counts, so that one that was not seen yet is not excluded.

    Raises:
        TypeError: num_classes is no integer.
        ValueError: a number that does not fit. Of a batch: class probabilities without momentum, which have no integer
            counts.

    Source: kexue.fm 7615; Menon et al. 2021, "Long-tail learning via logit adjustment".

    Example:
        >>> import imbalance_kernels as ik
        >>> prior = ik.RunningPrior(num_classes=3)
        >>> loss = ik.FocalLoss(prior=prior)
        >>> loss(torch.randn(6, 3, requires_grad=True), torch.tensor([0, 0, 1, 0, -100, 0])).backward()
        >>> prior.counts.tolist(), prior.probabilities.tolist()
        ([4, 1, 0], [0.625, 0.25, 0.125])
        >>> list(loss.state_dict())
        ['running_prior.counts']
    """

    counts: Tensor  # (C,) int64, or float64 with momentum

    def __init__(
        self,
        num_classes: int,
        tau: float = 1.0,
        momentum: float | None = None,
        process_group: Any = None,
        *,
        pseudo_count: float = 1.0,
    ) -> None:
        super().__init__()
        num_classes = checked_num_classes(num_classes)
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum is {momentum!r}, but it must be None (counts of everything) or in (0, 1]")
        if not 0 < pseudo_count < math.inf:
            raise ValueError(f"pseudo_count is {pseudo_count!r}, but it must be above 0 and finite")
        self.tau = checked_tau(tau)
        self.momentum = momentum
        self.process_group = process_group
        self.pseudo_count = float(pseudo_count)
        dtype = torch.int64 if momentum is None else torch.float64
        self.register_buffer("counts", torch.zeros(num_classes, dtype=dtype))

    @property
    def num_classes(self) -> int:
        """C."""
        return self.counts.numel()

    @property
    def log_prior(self) -> Tensor:
        """log prior (C,), float64."""
        return self._log_prior_of(self.counts)

    @property
    def bias(self) -> Tensor:
        """tau * log prior (C,), float64."""
        return self.bias_of(self.counts)

    @property
    def probabilities(self) -> Tensor:
        """The prior (C,), float64."""
        counts = self.counts.to(torch.float64) + self.pseudo_count
        return counts / counts.sum()

    def update(
        self, target: Tensor, *, ignore_index: int = -100, class_dim: int = 1, sample_weight: Tensor | None = None
    ) -> None:
        """Count a batch, also in evaluation: for losses that are functions, or to begin with a data set's counts.

        Args:
            target: class indices of any shape, int64 or int32; or class probabilities (N, C), (C,), (N, C, d1, ...).
            ignore_index: a target that does not count.
            class_dim: the dimension of class probabilities' classes, 1 as torch has it, or -1.
            sample_weight: weights of rows; those of weight 0 do not count.

        Raises:
            IndexError: on CPU, a target outside [0, C) that is not ignore_index (elsewhere it is not counted).
            TypeError, ValueError: a dtype or shape that does not fit.
        """
        counts = self.counts_with(target, ignore_index=ignore_index, class_dim=class_dim, sample_weight=sample_weight)
        if not target.is_floating_point() and target.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = ((target < 0) | (target >= self.num_classes)) & (target != ignore_index)
            if bool(outside.any()):
                raise IndexError(
                    f"target {int(target[outside][0])} is out of bounds: it must be in [0, {self.num_classes}) or "
                    f"ignore_index={ignore_index}"
                )
        self.keep(counts)

    @torch.no_grad()
    def counts_with(
        self, target: Tensor, *, ignore_index: int, class_dim: int, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Return the counts (C,) with a batch, without keeping them; a target out of bounds is left out.

        Processes of the group exchange their counts here, before values are checked, so that none of them waits for
        another that has found an error.
        """
        counts = all_reduced(self._count(target, ignore_index, class_dim, sample_weight), self.process_group)
        if self.momentum is None:
            return self.counts + counts
        return self.momentum * self.counts + counts

    @torch.no_grad()
    def keep(self, counts: Tensor) -> None:
        """Make counts (C,) of `counts_with` the prior's."""
        self.counts.copy_(counts)

    def bias_of(self, counts: Tensor) -> Tensor:
        """Return tau * log prior (C,), float64, of counts (C,)."""
        return self.tau * self._log_prior_of(counts)

    def reset(self) -> None:
        """Forget all counts."""
        self.counts.zero_()

    @torch.no_grad()
    def _log_prior_of(self, counts: Tensor) -> Tensor:
        counts = counts.to(torch.float64) + self.pseudo_count
        return torch.log(counts) - torch.log(counts.sum())

    def _count(self, target: Tensor, ignore_index: int, class_dim: int, sample_weight: Tensor | None) -> Tensor:
        """Return the counts of a batch (C,): int64 of class indices, float64 of class probabilities."""
        if not isinstance(target, Tensor):
            raise TypeError(f"target is a {type(target).__name__}, but it must be a tensor")
        if target.device != self.counts.device:
            raise ValueError(
                f"target is on {target.device}, but the RunningPrior is on {self.counts.device}: call .to() of the loss"
            )
        soft = target.is_floating_point()
        if not soft and target.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"target has dtype {target.dtype}, but it must be int64 or int32 class indices, or floating point"
            )
        if soft and self.momentum is None:
            raise ValueError(
                "target holds class probabilities, which have no integer counts: use RunningPrior(num_classes, "
                "momentum=1.0), which counts them in float64"
            )
        rows_shape = target.shape
        if soft:
            class_dim = 0 if target.dim() == 1 else class_dim
            if not (-target.dim() <= class_dim < target.dim() and target.shape[class_dim] == self.num_classes):
                raise ValueError(
                    f"target holds class probabilities of shape {tuple(target.shape)}, but the RunningPrior has "
                    f"{self.num_classes} classes, which dimension {class_dim} must be"
                )
            target = target.detach().movedim(class_dim, -1)
            rows_shape = target.shape[:-1]
        counts_row = None
        if sample_weight is not None:
            if sample_weight.shape != rows_shape:
                raise ValueError(
                    f"sample_weight has shape {tuple(sample_weight.shape)}, but it must be {tuple(rows_shape)}"
                )
            counts_row = sample_weight != 0
        if not soft:
            return count_indices(target, self.num_classes, ignore_index, counts_row)
        if counts_row is not None:
            target = torch.where(counts_row[..., None], target, torch.zeros_like(target))
        sums = target[None].sum(dim=tuple(range(target.dim())), dtype=torch.float64)
        # What is no probability must not be in the prior for good.
        return torch.where(torch.isfinite(sums).all(), sums.clamp_min(0), torch.zeros_like(sums))

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningPrior:
        """Copy everything but the process group, which is this process's connection to the same others."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        memo[id(self.process_group)] = self.process_group
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningPrior:
        """Move the counts, which keep their precision; those of a module made on meta begin at zero."""
        before = self.counts
        super()._apply(fn, recurse)
        if self.counts.dtype != before.dtype:
            self.counts = before.to(self.counts.device)
        if before.is_meta and not self.counts.is_meta:
            self.reset()
        return self

    def extra_repr(self) -> str:
        """Return the arguments that are not at their defaults."""
        shown = {
            "tau": None if self.tau == 1 else self.tau,
            "momentum": self.momentum,
            "pseudo_count": None if self.pseudo_count == 1 else self.pseudo_count,
        }
        parts = [f"{name}={value:g}" for name, value in shown.items() if value is not None]
        return ", ".join([f"num_classes={self.num_classes}", *parts])
