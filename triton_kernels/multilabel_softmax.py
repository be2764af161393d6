"""multilabel_softmax in Triton: value and gradient of log(1 + sum_neg exp(z)) + log(1 + sum_pos exp(-z)) in one trip.

The operations of csrc/bindings.cpp with their names and arguments. A row that fits one program stays in registers
between its sums and its gradient; a longer row is read twice by one program, the second time backwards, so that it
begins with what the cache still holds. Every logit takes the side of its label, so that a positive is left out of the
first sum and a negative out of the second; neither is subtracted. Labels in floating point take both sides, weighted.

The shift of a sum is 0 where no logit is so large that it is needed: then small sums keep their digits, in log1p.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imbalance_kernels.options import accumulate_dtype
from imbalance_kernels.triton_kernels.labels import Labels, counted_rows, labels_of, load_labels
from imbalance_kernels.triton_kernels.launch import (
    check_logits,
    long_programs,
    long_tile,
    on,
    row_tile,
    vector_of,
    widths_of,
)
from imbalance_kernels.triton_kernels.math import exp_quick, log1p_unit
from imbalance_kernels.triton_kernels.rows import Reduction, widened
from imbalance_kernels.triton_kernels.softmax_loss import _sum

__all__ = [
    "multilabel_softmax",
    "multilabel_softmax_",
    "multilabel_softmax_backward",
    "multilabel_softmax_backward_",
]

NO_SHIFT = tl.constexpr(16.0)  # exponents up to here are summed as they are
SIZES = ["num_rows", "classes", "stride", "gradient_stride", "ignore_index", "list_length"]


class Rows(NamedTuple):
    """Logits and their labels."""

    logits: Any  # (N, C)
    labels: Labels
    bias: Any  # (C,) or None


class Sides(NamedTuple):
    """What a block's logits have to do with each of the two sums."""

    u: Any  # exponents of negatives, z; -inf where masked or a positive
    v: Any  # exponents of positives, -z; -inf where masked or a negative
    positive: Any  # weights of the second sum: bool, or numbers from 0 to 1


class Sums(NamedTuple):
    """The two sums, each relative to a shift."""

    negative: Any
    positive: Any
    shift: Any
    shift_of_positives: Any


@triton.jit
def _load(
    rows, index, columns, label, is_read, inside, stride, classes, ignore_index, list_length, EVICTION: tl.constexpr
):
    """Return the Sides of a block."""
    x = tl.load(
        rows.logits + index * stride + columns, mask=is_read & inside, other=-float("inf"), eviction_policy=EVICTION
    )
    x = widened(x)
    masked = x == -float("inf")
    z = x
    if rows.bias is not None:
        z = tl.where(masked, x, x + tl.load(rows.bias + columns, mask=inside, other=0.0))
    at = index * classes + columns
    y = load_labels(rows.labels, index, columns, at, label, is_read, inside, ignore_index, list_length)
    if y.dtype == tl.int1:
        return Sides(tl.where(y, -float("inf"), z), tl.where(masked | (y == 0), -float("inf"), -z), y)
    else:
        y = y.to(z.dtype)
        return Sides(tl.where(y == 1, -float("inf"), z), tl.where(masked | (y == 0), -float("inf"), -z), y)


@triton.jit
def _shift_of(highest):
    return tl.where(highest > NO_SHIFT, highest, 0.0)


@triton.jit
def _exponentials(sides, shift, shift_of_positives):
    """Return what each logit adds to the first sum and to the second."""
    if sides.positive.dtype == tl.int1:  # one exponential serves the side that there is
        e = exp_quick(tl.where(sides.positive, sides.v - shift_of_positives, sides.u - shift))
        return tl.where(sides.positive, 0.0, e), tl.where(sides.positive, e, 0.0)
    else:
        y = sides.positive
        return (1.0 - y) * exp_quick(sides.u - shift), y * exp_quick(sides.v - shift_of_positives)


@triton.jit
def _log_one_plus(total, shift):
    """Return log(1 + sum) and 1 + sum relative to the shift, of a sum relative to it."""
    one_plus = total + exp_quick(-shift)
    small = tl.where(total < 1.0, total, 1.0)
    log = tl.where((shift == 0) & (total < 1.0), log1p_unit(small), shift + tl.log(one_plus))
    return log, one_plus


@triton.jit
def _losses(sums, counted, reduction, index):
    """Return losses, and the factors of exponentials of negatives and of positives in the gradient."""
    negative, of_negatives = _log_one_plus(sums.negative, sums.shift)
    positive, of_positives = _log_one_plus(sums.positive, sums.shift_of_positives)
    loss = counted.weight * (negative + positive)
    factor = counted.weight
    if reduction.upstream is not None:
        factor = factor * tl.load(reduction.upstream + index * reduction.upstream_step, mask=counted.is_read, other=0.0)
    if reduction.normalizer is not None:
        factor = factor * (1.0 / tl.load(reduction.normalizer))
    elif reduction.divisor is not None:
        factor = factor * (1.0 / tl.load(reduction.divisor))
    uncounted = tl.where(counted.outside, float("nan"), 0.0).to(loss.dtype)
    return (
        tl.where(counted.is_read, loss, uncounted),
        tl.where(counted.is_read, factor / of_negatives, uncounted),
        tl.where(counted.is_read, factor / of_positives, uncounted),
    )


@triton.jit
def _counted(index, num_rows, classes, ignore_index, rows, reduction):
    """Return the Counted of rows; a normalizer of 0 reads none."""
    dtype: tl.constexpr = tl.float64 if rows.logits.dtype.element_ty == tl.float64 else tl.float32
    limit = num_rows
    if reduction.normalizer is not None:
        limit = tl.where(tl.load(reduction.normalizer) == 0, 0, num_rows)
    return counted_rows(index, index < limit, classes, ignore_index, rows.labels, reduction.sample_weight, dtype)


@triton.jit(do_not_specialize=SIZES)
def _rows(
    rows,
    d_logits,  # (N, C), may be the logits themselves; None for the losses alone
    losses,  # (N,), or their sums, one per program; None for the gradient alone
    reduction,
    num_rows,
    classes,
    stride,
    gradient_stride,
    ignore_index,
    list_length,
    SUMMED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    classes = classes * UNIT
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counted = _counted(index, num_rows, classes, ignore_index, rows, reduction)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < classes
    at = index[:, None]
    label = counted.label[:, None]
    is_read = counted.is_read[:, None]
    stride = stride.to(tl.int64) * UNIT
    sides = _load(rows, at, columns, label, is_read, inside, stride, classes, ignore_index, list_length, "evict_first")
    shift = _shift_of(tl.max(sides.u, 1))
    shift_of_positives = _shift_of(tl.max(sides.v, 1))
    negative, positive = _exponentials(sides, shift[:, None], shift_of_positives[:, None])
    sums = Sums(tl.sum(negative, 1), tl.sum(positive, 1), shift, shift_of_positives)
    loss, of_negatives, of_positives = _losses(sums, counted, reduction, index)
    exists = index < num_rows
    if d_logits is not None:
        d = negative * of_negatives[:, None] - positive * of_positives[:, None]
        to = d_logits + at * (gradient_stride.to(tl.int64) * UNIT) + columns
        tl.store(to, d.to(d_logits.dtype.element_ty), mask=inside & exists[:, None])
    if losses is not None:
        if SUMMED:
            tl.store(losses + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(losses + index, loss, mask=exists)


@triton.jit
def _columns(first, UNIT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return the columns (LANES, VECTOR) of a block; neighbouring threads have neighbours."""
    lane_step: tl.constexpr = VECTOR if UNIT > 1 else 1
    vector_step: tl.constexpr = 1 if UNIT > 1 else LANES
    return first + tl.arange(0, LANES)[:, None] * lane_step + tl.arange(0, VECTOR)[None, :] * vector_step


@triton.jit(do_not_specialize=SIZES)
def _long_rows(
    rows,
    d_logits,  # (N, C), may be the logits themselves; None for the losses alone
    losses,  # (N,); None for the gradient alone
    reduction,
    num_rows,
    classes,
    stride,
    gradient_stride,
    ignore_index,
    list_length,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if rows.logits.dtype.element_ty == tl.float64 else tl.float32
    classes = classes * UNIT
    stride = stride.to(tl.int64) * UNIT
    blocks = tl.cdiv(classes, LANES * VECTOR)
    for taken in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        index = tl.cast(taken, tl.int64)
        counted = _counted(index, num_rows, classes, ignore_index, rows, reduction)
        highest = tl.full((LANES,), -float("inf"), dtype)
        highest_positive = tl.full((LANES,), -float("inf"), dtype)
        total = tl.zeros((LANES,), dtype)
        total_positive = tl.zeros((LANES,), dtype)
        for first in range(0, tl.where(counted.is_read, classes, 0), LANES * VECTOR):
            columns = _columns(first, UNIT, LANES, VECTOR)
            inside = columns < classes
            sides = _load(
                rows, index, columns, counted.label, counted.is_read, inside, stride, classes, ignore_index,
                list_length, "evict_last",
            )  # fmt: skip
            before = _shift_of(highest)
            before_positive = _shift_of(highest_positive)
            highest = tl.maximum(highest, tl.max(sides.u, 1))
            highest_positive = tl.maximum(highest_positive, tl.max(sides.v, 1))
            shift = _shift_of(highest)
            shift_of_positives = _shift_of(highest_positive)
            negative, positive = _exponentials(sides, shift[:, None], shift_of_positives[:, None])
            total = total * exp_quick(before - shift) + tl.sum(negative, 1)
            total_positive = total_positive * exp_quick(before_positive - shift_of_positives) + tl.sum(positive, 1)
        shift = _shift_of(tl.max(highest, 0))
        shift_of_positives = _shift_of(tl.max(highest_positive, 0))
        total = tl.sum(total * exp_quick(_shift_of(highest) - shift), 0)
        total_positive = tl.sum(total_positive * exp_quick(_shift_of(highest_positive) - shift_of_positives), 0)
        sums = Sums(total, total_positive, shift, shift_of_positives)
        loss, of_negatives, of_positives = _losses(sums, counted, reduction, index)
        if losses is not None:
            tl.store(losses + index, loss)
        if d_logits is not None:
            for swept in range(0, blocks):
                columns = _columns((blocks - 1 - swept) * (LANES * VECTOR), UNIT, LANES, VECTOR)
                inside = columns < classes
                sides = _load(
                    rows, index, columns, counted.label, counted.is_read, inside, stride, classes, ignore_index,
                    list_length, "evict_first",
                )  # fmt: skip
                negative, positive = _exponentials(sides, shift, shift_of_positives)
                d = (negative * of_negatives - positive * of_positives).to(d_logits.dtype.element_ty)
                to = d_logits + index * (gradient_stride.to(tl.int64) * UNIT) + columns
                tl.store(to, d, mask=inside, eviction_policy="evict_first")


# ---------------------------------------------------------------- operations


class Arguments(NamedTuple):
    """What the schema has after the logits."""

    target: Tensor
    bias: Tensor | None  # (C,)
    sample_weight: Tensor | None  # (N,)
    normalizer: Tensor | None  # ()
    ignore_index: int
    reduction: str


def multilabel_softmax(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the loss and, where the last argument `with_gradient` asks for it, the gradient (N, C); else (0,)."""
    *arguments, with_gradient = arguments
    d_logits = logits.new_empty(logits.shape) if with_gradient else None
    loss = _launch(logits, d_logits, Arguments(*arguments))
    return loss, logits.new_empty((0,)) if d_logits is None else d_logits


def multilabel_softmax_(logits: Tensor, *arguments: Any) -> Tensor:
    """Return the loss; the gradient takes the logits' memory."""
    call = Arguments(*arguments)
    if call.reduction == "none":
        raise ValueError("multilabel_softmax_ needs the upstream gradient of 'none': multilabel_softmax_backward_")
    return _launch(logits, logits, call)


def multilabel_softmax_backward(logits: Tensor, *arguments: Any) -> Tensor:
    """Return the gradient (N, C) for the last argument, the upstream gradient."""
    *arguments, upstream = arguments
    d_logits = logits.new_empty(logits.shape)
    _launch(logits, d_logits, Arguments(*arguments), upstream)
    return d_logits


def multilabel_softmax_backward_(logits: Tensor, *arguments: Any) -> None:
    """Write the gradient for the last argument, the upstream gradient, into the logits' memory."""
    *arguments, upstream = arguments
    _launch(logits, logits, Arguments(*arguments), upstream)


def _launch(
    logits: Tensor,  # (N, C)
    d_logits: Tensor | None,  # (N, C)
    call: Arguments,
    upstream: Tensor | None = None,  # () or (N,)
) -> Tensor | None:
    """Return the loss, () or (N,), and write the gradient to d_logits; with an upstream gradient the latter alone."""
    check_logits(logits)
    if call.reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is '{call.reduction}'")
    num_rows, num_classes = logits.shape
    summed = call.reduction != "none"
    with on(logits):
        labels = labels_of(logits, call.target, num_rows)
        rows = Rows(logits, labels, vector_of("bias", call.bias, num_classes, logits))
        reduction = _reduction(logits, call, upstream)
        tile = row_tile(logits)
        losses = None
        if upstream is None:
            count = triton.cdiv(num_rows, tile.rows) if summed and tile is not None else num_rows
            losses = logits.new_empty((count,), dtype=accumulate_dtype(logits.dtype))
        if num_rows > 0:
            (classes, stride, gradient_stride), unit = widths_of(logits, d_logits)
            list_length = 0 if labels.lists is None else labels.lists.shape[1]
            sizes = (num_rows, classes, stride, gradient_stride, call.ignore_index, list_length)
            everything = (rows, d_logits, losses, reduction, *sizes)
            if tile is not None:
                programs = triton.cdiv(num_rows, tile.rows)
                _rows[(programs,)](*everything, SUMMED=summed, UNIT=unit, **tile.options())
            else:
                programs = long_programs(logits, reads_again=d_logits is not None)
                _long_rows[(programs,)](*everything, UNIT=unit, **long_tile(logits).options())
        return losses if losses is None or not summed else _sum(losses, reduction)


def _reduction(logits: Tensor, call: Arguments, upstream: Tensor | None) -> Reduction:
    """Return what divides: of a mean the number of rows that count, which stays on the device."""
    num_rows, num_classes = logits.shape
    sample_weight = vector_of("sample_weight", call.sample_weight, num_rows, logits)
    divisor = None
    if call.reduction == "mean" and call.normalizer is None:
        dtype = accumulate_dtype(logits.dtype)
        target = call.target
        if target.dim() == 1:
            valid = (target >= 0) & (target <= num_classes) & (target != call.ignore_index)
            divisor = valid.sum().to(dtype)
        else:
            divisor = torch.full((), num_rows, dtype=dtype, device=logits.device)
    step = tl.constexpr(0 if upstream is None or call.reduction != "none" else 1)
    if upstream is not None and call.reduction == "none":
        upstream = vector_of("upstream", upstream, num_rows, logits)
    return Reduction(sample_weight, upstream, step, call.normalizer, divisor)
