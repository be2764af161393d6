"""multilabel_softmax in Triton: value and gradient of log(1 + sum_neg exp(z)) + log(1 + sum_pos exp(-z)) in one trip.

The operations of csrc/bindings.cpp with their names and arguments. A row that fits one program stays in registers
between its sums and its gradient (`_rows`); a longer row is read twice by one program, the second time backwards, so
that it begins with what the cache still holds (`_long_rows`). Channels-first logits (B, C, P) go the same two ways
(`_planes`, `_long_planes`), their pixels as rows: a program takes neighbouring pixels of an image, as in planes.py.

Every logit takes the side of its label, so that a positive is left out of the first sum and a negative out of the
second; neither is subtracted. Labels in floating point take both sides, weighted. A label that is no class, nor the
background, nor ignored makes its row NaN, an entry of a list too.

The shift of a sum is 0 where no logit is so large that it is needed: then small sums keep their digits, in log1p. It is
finite where a logit is not, so that a negative of +inf makes the sum +inf and nothing NaN but its own gradient.
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
    forms_of,
    long_plane_programs,
    long_plane_tile,
    long_programs,
    long_tile,
    num_plane_tiles,
    num_rows_of,
    on,
    partial_sums,
    plane_tile,
    row_tile,
    vector_of,
    widths_of,
)
from imbalance_kernels.triton_kernels.math import exp_quick, log1p_unit
from imbalance_kernels.triton_kernels.planes import pixels_of
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
PLANE_SIZES = [
    "images",
    "classes",
    "pixels",
    "stride",
    "class_stride",
    "ignore_index",
    "list_length",
    "gradient_stride",
    "gradient_class_stride",
]


class Rows(NamedTuple):
    """Logits and their labels."""

    logits: Any  # (N, C), or (B, C, P) where N is B * P
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
def _load(rows, place, at, index, columns, label, is_read, inside, ignore_index, list_length, EVICTION: tl.constexpr):
    """Return the Sides of a block: of logits at `place`, which are the `at`-th of contiguous memory."""
    x = widened(tl.load(rows.logits + place, mask=is_read & inside, other=-float("inf"), eviction_policy=EVICTION))
    masked = x == -float("inf")
    z = x
    if rows.bias is not None:
        z = tl.where(masked, x, x + tl.load(rows.bias + columns, mask=inside, other=0.0))
    y = load_labels(rows.labels, index, columns, at, label, is_read, inside, ignore_index, list_length)
    if y.dtype == tl.int1:
        return Sides(tl.where(y, -float("inf"), z), tl.where(masked | (y == 0), -float("inf"), -z), y)
    else:
        y = y.to(z.dtype)
        return Sides(tl.where(y == 1, -float("inf"), z), tl.where(masked | (y == 0), -float("inf"), -z), y)


@triton.jit
def _shift_of(highest):
    most: tl.constexpr = 1.7976931348623157e308 if highest.dtype == tl.float64 else 3.4028234663852886e38
    shift = tl.where(highest > NO_SHIFT, highest, 0.0)
    return tl.where(shift == float("inf"), most, shift)


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
def _counted(index, num_rows, classes, ignore_index, list_length, rows, reduction):
    """Return the Counted of rows; a normalizer of 0 reads none."""
    dtype: tl.constexpr = tl.float64 if rows.logits.dtype.element_ty == tl.float64 else tl.float32
    limit = num_rows
    if reduction.normalizer is not None:
        limit = tl.where(tl.load(reduction.normalizer) == 0, 0, num_rows)
    return counted_rows(
        index, index < limit, classes, ignore_index, list_length, rows.labels, reduction.sample_weight, dtype
    )


@triton.jit
def _with_more(sides, highest, highest_positive, total, total_positive):
    """Return the highest exponents (ROWS,) and the sums relative to them, with a block of sides (ROWS, BLOCK) more."""
    before = _shift_of(highest)
    before_positive = _shift_of(highest_positive)
    highest = tl.maximum(highest, tl.max(sides.u, 1))
    highest_positive = tl.maximum(highest_positive, tl.max(sides.v, 1))
    shift = _shift_of(highest)
    shift_of_positives = _shift_of(highest_positive)
    negative, positive = _exponentials(sides, shift[:, None], shift_of_positives[:, None])
    total = total * exp_quick(before - shift) + tl.sum(negative, 1)
    total_positive = total_positive * exp_quick(before_positive - shift_of_positives) + tl.sum(positive, 1)
    return highest, highest_positive, total, total_positive


@triton.jit
def _sums_of(sides):
    """Return what each logit of rows (ROWS, BLOCK) adds to the two Sums, and these."""
    shift = _shift_of(tl.max(sides.u, 1))
    shift_of_positives = _shift_of(tl.max(sides.v, 1))
    negative, positive = _exponentials(sides, shift[:, None], shift_of_positives[:, None])
    return negative, positive, Sums(tl.sum(negative, 1), tl.sum(positive, 1), shift, shift_of_positives)


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
    counted = _counted(index, num_rows, classes, ignore_index, list_length, rows, reduction)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < classes
    at = index[:, None]
    label = counted.label[:, None]
    is_read = counted.is_read[:, None]
    place = at * (stride.to(tl.int64) * UNIT) + columns
    sides = _load(
        rows, place, at * classes + columns, at, columns, label, is_read, inside, ignore_index, list_length,
        "evict_first",
    )  # fmt: skip
    negative, positive, sums = _sums_of(sides)
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
        counted = _counted(index, num_rows, classes, ignore_index, list_length, rows, reduction)
        highest = tl.full((LANES,), -float("inf"), dtype)
        highest_positive = tl.full((LANES,), -float("inf"), dtype)
        total = tl.zeros((LANES,), dtype)
        total_positive = tl.zeros((LANES,), dtype)
        for first in range(0, tl.where(counted.is_read, classes, 0), LANES * VECTOR):
            columns = _columns(first, UNIT, LANES, VECTOR)
            inside = columns < classes
            sides = _load(
                rows, index * stride + columns, index * classes + columns, index, columns, counted.label,
                counted.is_read, inside, ignore_index, list_length, "evict_last",
            )  # fmt: skip
            highest, highest_positive, total, total_positive = _with_more(
                sides, highest, highest_positive, total, total_positive
            )
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
                    rows, index * stride + columns, index * classes + columns, index, columns, counted.label,
                    counted.is_read, inside, ignore_index, list_length, "evict_first",
                )  # fmt: skip
                negative, positive = _exponentials(sides, shift, shift_of_positives)
                d = (negative * of_negatives - positive * of_positives).to(d_logits.dtype.element_ty)
                to = d_logits + index * (gradient_stride.to(tl.int64) * UNIT) + columns
                tl.store(to, d, mask=inside, eviction_policy="evict_first")


@triton.jit
def _load_pixels(
    rows, first, part, index, counted, classes, pixels, stride, class_stride, ignore_index, list_length,
    BLOCK: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Return the Sides of Pixels `part`, classes from `first` on, as a block (ROWS, BLOCK)."""
    columns = first + tl.arange(0, BLOCK)[None, :]
    pixel = part.index[:, None]
    place = part.image * stride + pixel + columns * class_stride
    at = part.image * classes * pixels + pixel + columns * pixels
    return _load(
        rows, place, at, index[:, None], columns, counted.label[:, None], counted.is_read[:, None], columns < classes,
        ignore_index, list_length, EVICTION,
    )  # fmt: skip


@triton.jit
def _store_pixels(d_logits, d, first, part, classes, stride, class_stride, BLOCK: tl.constexpr):
    """Store the gradient of a block."""
    columns = first + tl.arange(0, BLOCK)[None, :]
    to = d_logits + part.image * stride + part.index[:, None] + columns * class_stride
    mask = part.exist[:, None] & (columns < classes)
    tl.store(to, d.to(d_logits.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=PLANE_SIZES)
def _planes(
    rows,  # of logits (B, C, P)
    d_logits,  # (B, C, P), may be the logits themselves; None for the losses alone
    losses,  # (N,), or their sums, one per program; None for the gradient alone
    reduction,
    images,
    classes,
    pixels,
    stride,
    class_stride,
    ignore_index,
    list_length,
    gradient_stride,
    gradient_class_stride,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixels = pixels.to(tl.int64)
    num_rows = images * pixels
    part = pixels_of(tl.program_id(0), pixels, ROWS)
    index = tl.where(part.exist, part.image * pixels + part.index, num_rows)
    counted = _counted(index, num_rows, classes, ignore_index, list_length, rows, reduction)
    sides = _load_pixels(
        rows, 0, part, index, counted, classes, pixels, stride.to(tl.int64), class_stride.to(tl.int64), ignore_index,
        list_length, BLOCK, "evict_first",
    )  # fmt: skip
    negative, positive, sums = _sums_of(sides)
    loss, of_negatives, of_positives = _losses(sums, counted, reduction, index)
    if d_logits is not None:
        d = negative * of_negatives[:, None] - positive * of_positives[:, None]
        strides = (gradient_stride.to(tl.int64), gradient_class_stride.to(tl.int64))
        _store_pixels(d_logits, d, 0, part, classes, strides[0], strides[1], BLOCK)
    if losses is not None:
        if SUMMED:
            tl.store(losses + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(losses + index, loss, mask=part.exist)


@triton.jit(do_not_specialize=PLANE_SIZES)
def _long_planes(
    rows,  # of logits (B, C, P)
    d_logits,  # (B, C, P), may be the logits themselves; None for the losses alone
    losses,  # (N,), or their sums, one per tile; None for the gradient alone
    reduction,
    images,
    classes,
    pixels,
    stride,
    class_stride,
    ignore_index,
    list_length,
    gradient_stride,
    gradient_class_stride,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if rows.logits.dtype.element_ty == tl.float64 else tl.float32
    pixels = pixels.to(tl.int64)
    stride = stride.to(tl.int64)
    class_stride = class_stride.to(tl.int64)
    num_rows = images * pixels
    blocks = tl.cdiv(classes, BLOCK)
    for tile in range(tl.program_id(0), images * tl.cdiv(pixels, ROWS), tl.num_programs(0)):
        part = pixels_of(tile, pixels, ROWS)
        index = tl.where(part.exist, part.image * pixels + part.index, num_rows)
        counted = _counted(index, num_rows, classes, ignore_index, list_length, rows, reduction)
        highest = tl.full((ROWS,), -float("inf"), dtype)
        highest_positive = tl.full((ROWS,), -float("inf"), dtype)
        total = tl.zeros((ROWS,), dtype)
        total_positive = tl.zeros((ROWS,), dtype)
        for first in range(0, classes, BLOCK):
            sides = _load_pixels(
                rows, first, part, index, counted, classes, pixels, stride, class_stride, ignore_index, list_length,
                BLOCK, "evict_last",
            )  # fmt: skip
            highest, highest_positive, total, total_positive = _with_more(
                sides, highest, highest_positive, total, total_positive
            )
        shift = _shift_of(highest)
        shift_of_positives = _shift_of(highest_positive)
        sums = Sums(total, total_positive, shift, shift_of_positives)
        loss, of_negatives, of_positives = _losses(sums, counted, reduction, index)
        if losses is not None:
            if SUMMED:
                tl.store(losses + tile, tl.sum(loss, 0))
            else:
                tl.store(losses + index, loss, mask=part.exist)
        if d_logits is not None:
            for swept in range(0, blocks):
                first = (blocks - 1 - swept) * BLOCK
                sides = _load_pixels(
                    rows, first, part, index, counted, classes, pixels, stride, class_stride, ignore_index,
                    list_length, BLOCK, "evict_first",
                )  # fmt: skip
                negative, positive = _exponentials(sides, shift[:, None], shift_of_positives[:, None])
                d = negative * of_negatives[:, None] - positive * of_positives[:, None]
                strides = (gradient_stride.to(tl.int64), gradient_class_stride.to(tl.int64))
                _store_pixels(d_logits, d, first, part, classes, strides[0], strides[1], BLOCK)


# ---------------------------------------------------------------- operations


class Arguments(NamedTuple):
    """What the schema has after the logits."""

    target: Tensor
    bias: Tensor | None  # (C,)
    sample_weight: Tensor | None  # (N,)
    normalizer: Tensor | None  # ()
    ignore_index: int
    reduction: str


def _launch(
    logits: Tensor,  # (N, C), or (B, C, P) where N is B * P
    d_logits: Tensor | None,  # in the logits' shape
    call: Arguments,
    upstream: Tensor | None,  # () or (N,)
) -> Tensor | None:
    """Return the loss, () or (N,), and write the gradient to d_logits; with an upstream gradient the latter alone."""
    check_logits(logits, planes=True)
    if call.reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is '{call.reduction}'")
    num_rows, summed = num_rows_of(logits), call.reduction != "none"
    with on(logits):
        labels = labels_of(logits, call.target, num_rows)
        rows = Rows(logits, labels, vector_of("bias", call.bias, logits.shape[1], logits))
        reduction = _reduction(logits, call, upstream)
        losses = None
        if upstream is None:
            count = partial_sums(logits) if summed else num_rows
            losses = logits.new_empty((count,), dtype=accumulate_dtype(logits.dtype))
        if num_rows > 0:
            launch = _launch_rows if logits.dim() == 2 else _launch_planes
            launch(rows, d_logits, losses, reduction, call.ignore_index, summed)
        return losses if losses is None or not summed else _sum(losses, reduction)


def _launch_rows(
    rows: Rows,
    d_logits: Tensor | None,  # (N, C)
    losses: Tensor | None,  # (N,), or their sums
    reduction: Reduction,
    ignore_index: int,
    summed: bool,
) -> None:
    logits: Tensor = rows.logits
    (classes, stride, gradient_stride), unit = widths_of(logits, d_logits)
    sizes = (logits.shape[0], classes, stride, gradient_stride, ignore_index, _list_length(rows))
    everything = (rows, d_logits, losses, reduction, *sizes)
    tile = row_tile(logits)
    if tile is not None:
        programs = triton.cdiv(logits.shape[0], tile.rows)
        _rows[(programs,)](*everything, SUMMED=summed, UNIT=unit, **tile.options())
    else:
        programs = long_programs(logits, reads_again=d_logits is not None)
        _long_rows[(programs,)](*everything, UNIT=unit, **long_tile(logits).options())


def _launch_planes(
    rows: Rows,
    d_logits: Tensor | None,  # (B, C, P)
    losses: Tensor | None,  # (N,), or their sums
    reduction: Reduction,
    ignore_index: int,
    summed: bool,
) -> None:
    logits: Tensor = rows.logits
    d_strides = (0, 0) if d_logits is None else d_logits.stride()[:2]
    sizes = (*logits.shape, *logits.stride()[:2], ignore_index, _list_length(rows), *d_strides)
    everything = (rows, d_logits, losses, reduction, *sizes)
    tile, tiles = plane_tile(logits), num_plane_tiles(logits)
    if tile is not None:
        _planes[(tiles,)](*everything, SUMMED=summed, **tile.options())
    else:
        tile = long_plane_tile(logits)
        programs = tiles if d_logits is None else long_plane_programs(logits, tiles, tile)
        _long_planes[(programs,)](*everything, SUMMED=summed, **tile.options())


def _list_length(rows: Rows) -> int:
    return 0 if rows.labels.lists is None else rows.labels.lists.shape[1]


def _reduction(logits: Tensor, call: Arguments, upstream: Tensor | None) -> Reduction:
    """Return what divides: of a mean the number of rows that count, which stays on the device."""
    num_rows, num_classes = num_rows_of(logits), logits.shape[1]
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


multilabel_softmax, multilabel_softmax_, multilabel_softmax_backward, multilabel_softmax_backward_ = forms_of(
    "multilabel_softmax", Arguments, _launch
)
