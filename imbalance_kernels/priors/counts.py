"""How often each class occurs: counted from targets, once over a data set or batch by batch, and checked as given."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["all_reduced", "checked_counts", "checked_num_classes", "class_counts", "count_indices", "count_weights"]


def class_counts(
    targets_or_batches: Tensor | Iterable[Any] | Any,
    num_classes: int,
    ignore_index: int = -100,
    *,
    process_group: Any = None,
    progress: bool = True,
) -> Tensor:
    """How often each class occurs in targets, or in all batches of a data loader.

    Args:
        targets_or_batches: class indices of any shape and integer dtype: a tensor, NumPy array or list; or an iterable
            of batches of them, such as a DataLoader, whose batches may also be pairs (inputs, targets). Of other
            batches give the targets: ``(batch["labels"] for batch in loader)``.
        num_classes: C.
        ignore_index: a target that does not count.
        process_group: a group of torch.distributed over whose processes counts are summed up, such as
            torch.distributed.group.WORLD; each of them has its own part of the data. None is this process alone.
        progress: show a progress bar over batches, on a terminal and if tqdm is installed.

    Returns:
        Counts (C,) int64, on the targets' device; zero where a class does not occur (see `Prior`'s zero_count).

    Raises:
        IndexError: a target outside [0, C) that is not ignore_index.
        TypeError: targets that are no integers (class probabilities have no counts), a batch that is neither targets
            nor a pair.
        ValueError: num_classes below 1.

    Example:
        >>> class_counts([0, 0, 2, -100, 0], num_classes=4).tolist()
        [3, 0, 1, 0]
        >>> loader = [(torch.randn(2, 8), torch.tensor([1, 1])), (torch.randn(1, 8), torch.tensor([0]))]
        >>> class_counts(loader, num_classes=2).tolist()
        [1, 2]
    """
    num_classes = checked_num_classes(num_classes)
    counts: Tensor | None = None
    if _is_targets(targets_or_batches):
        counts = _counted(targets_or_batches, num_classes, ignore_index)
    elif not isinstance(targets_or_batches, Iterable) or isinstance(targets_or_batches, str | dict):
        raise TypeError(
            f"targets_or_batches is a {type(targets_or_batches).__name__}, but it must be targets or an iterable of "
            "batches of targets"
        )
    else:
        for batch in _with_progress(targets_or_batches) if progress else targets_or_batches:
            of_batch = _counted(_targets_of(batch), num_classes, ignore_index)
            counts = of_batch if counts is None else counts + of_batch.to(counts.device)
    if counts is None:
        counts = torch.zeros(num_classes, dtype=torch.int64)
    return all_reduced(counts, process_group)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _is_targets(value: Any) -> bool:
    """Return whether a value is targets, no batches of them."""
    if isinstance(value, list | tuple | range):
        return all(map(_is_scalar, value))
    return _is_array(value) or _is_scalar(value)


def _targets_of(batch: Any) -> Any:
    """Return the targets of a batch, which is nothing else or a pair (inputs, targets)."""
    if _is_targets(batch):
        return batch
    if isinstance(batch, list) and not any(map(_is_array, batch)):
        return batch  # of lists
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[1]
    kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, list | tuple) else type(batch).__name__
    raise TypeError(
        f"targets_or_batches has a batch that is a {kind}, but it must be targets or a pair (inputs, targets): give "
        "the targets alone, as (batch['labels'] for batch in loader)"
    )


def _counted(targets: Any, num_classes: int, ignore_index: int) -> Tensor:
    """Return the counts (C,) of class indices, checked."""
    found = _checked_targets(targets, num_classes, ignore_index, "targets_or_batches")
    return count_indices(found, num_classes, ignore_index)


def _checked_targets(targets: Any, num_classes: int, ignore_index: int | None, argument: str) -> Tensor:
    """Return class indices as int64, all of them in [0, C) or ignored."""
    if isinstance(targets, Tensor):
        found = targets
    else:  # a copy: an array may be read-only
        found = torch.tensor(targets.__array__() if hasattr(targets, "__array__") else targets)
    if found.numel() == 0:
        return found.to(torch.int64)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{argument} holds {found.dtype}, but targets are class indices, integers")
    found = found.to(torch.int64)
    outside = (found < 0) | (found >= num_classes)
    if ignore_index is not None:
        outside &= found != ignore_index
    if bool(outside.any()):
        ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise IndexError(
            f"{argument} holds {int(found[outside][0])}, which is out of bounds: it must be in [0, {num_classes})"
            + ignored
        )
    return found


def count_weights(targets: Tensor | Any, weights: Tensor, num_classes: int) -> Tensor:
    """Return the sum of the weights (N,) of each class's samples, (C,), of targets (N,)."""
    found = _checked_targets(targets, num_classes, None, "targets").cpu()
    if found.shape != weights.shape:
        raise ValueError(
            f"targets has shape {tuple(found.shape)}, but the sampler has {weights.numel()} weights: it must be "
            f"({weights.numel()},)"
        )
    return torch.zeros(num_classes, dtype=weights.dtype).index_add_(0, found, weights)


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc="counting classes", unit="batch", dynamic_ncols=True, leave=False, disable=None)


def count_indices(target: Tensor, num_classes: int, ignore_index: int, counts_row: Tensor | None = None) -> Tensor:
    """Return how often each class occurs in target, (C,) int64; what is out of bounds is left out.

    `counts_row`, bool of target's shape, says which rows count. The result depends neither on chance nor on values that
    the host would wait for, which torch.bincount does.
    """
    target = target.to(torch.int64)
    keep = (target >= 0) & (target < num_classes) & (target != ignore_index)
    if counts_row is not None:
        keep = keep & counts_row
    bins = torch.where(keep, target, num_classes).reshape(-1)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=target.device)
    return counts.index_add_(0, bins, torch.ones_like(bins))[:num_classes]


def all_reduced(counts: Tensor, process_group: Any) -> Tensor:
    """Return counts summed over a process group, or as they are where there is none."""
    if process_group is None:
        return counts
    total = counts.clone()
    torch.distributed.all_reduce(total, group=process_group)
    return total


def checked_num_classes(num_classes: int) -> int:
    """Return the number of classes.

    Raises:
        TypeError: it is no integer. ValueError: it is below 1.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes is a {type(num_classes).__name__}, but it must be an integer")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, but it must be at least 1")
    return num_classes


def checked_counts(class_counts: Tensor | Any, argument: str = "class_counts") -> Tensor:
    """Return counts (C,) as float64 on CPU.

    Raises:
        TypeError: a prior.
        ValueError: not one-dimensional, empty, negative, not finite, or all zero.
    """
    if isinstance(class_counts, Tensor):
        if class_counts.requires_grad:
            raise ValueError(f"{argument} requires grad, but it is a constant: pass {argument}.detach()")
        counts = class_counts.detach().to(device="cpu", dtype=torch.float64)
    elif hasattr(class_counts, "bias") and hasattr(class_counts, "num_classes"):
        raise TypeError(
            f"{argument} is a {type(class_counts).__name__}, but it must be one number per class, (C,): give it as "
            "prior= to a loss that takes one"
        )
    else:
        counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
    if counts.dim() != 1 or counts.numel() == 0:
        raise ValueError(f"{argument} has shape {tuple(counts.shape)}, but it must be one number per class, (C,)")
    if torch.compiler.is_compiling():  # which cannot read values
        return counts.clone()
    if not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        raise ValueError(f"{argument} must be finite and at least 0, got {class_counts!r}")
    if not bool(counts.sum() > 0):
        raise ValueError(f"{argument} is zero for every class")
    return counts.clone()
