"""softmax_loss in Triton: value and gradient of any softmax-family loss in one trip over the logits.

The operations of csrc/bindings.cpp with their names and arguments, for NVIDIA, AMD and whatever else Triton compiles
for. Nothing of the logits' size but the gradient is ever allocated, nothing waits for the device, and a row's bits
depend on its own values alone, for one width, stride and alignment of rows: these decide how wide loads are, and so in
which order a row is summed.

- A row that fits one program (`_rows`) stays in registers between its sum and its gradient: N*C is read once and
  written once. Narrow rows share a program.
- A longer row does so too where a cluster of blocks can hold it (`_rows_over_clusters`).
- Elsewhere a longer row (`_long_rows`) is read twice by one program, the second time backwards, so that it begins with
  what the cache still holds; so few programs run that their rows stay in the cache together.
- Channels-first logits (B, C, P) have kernels of their own, in planes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imbalance_kernels.options import accumulate_dtype
from imbalance_kernels.softmax_row import RowTargets, highest_targets
from imbalance_kernels.triton_kernels.launch import (
    Constants,
    SplitArguments,
    check_logits,
    cluster_tile,
    constants_of,
    device_of,
    long_programs,
    long_tile,
    num_rows_of,
    number,
    on,
    partial_sums,
    row_tile,
    vector_of,
    widths_of,
)
from imbalance_kernels.triton_kernels.math import exp_quick
from imbalance_kernels.triton_kernels.objectives import OBJECTIVES
from imbalance_kernels.triton_kernels.planes import launch_planes
from imbalance_kernels.triton_kernels.rows import (
    SIZES,
    Reduction,
    Rows,
    Sizes,
    class_weight,
    load_block,
    load_rows,
    load_target,
    losses_and_gradients,
    place_of,
    sizes_of,
    spread,
    sweep_block,
    sweep_long_row,
    sweep_rows,
    widened,
)
from imbalance_kernels.triton_kernels.softmax_row import RowOptions

__all__ = ["scale_", "softmax_loss", "softmax_loss_", "softmax_loss_backward", "softmax_loss_backward_"]

SMALL_BLOCK = 4096  # elements of the small kernels: sums and scaling


@triton.jit(do_not_specialize=[*SIZES, "gradient_stride"])
def _rows(
    rows,  # logits (N, C) and how to split them
    d_logits,  # (N, C), may be the logits themselves; None for the losses alone
    losses,  # (N,), or their sums, one per program; None for the gradient alone
    reduction,
    num_rows,
    classes,
    stride,
    ignore_index,
    gradient_stride,
    objective: tl.constexpr,
    SUMMED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sizes = sizes_of(num_rows, classes, stride, ignore_index, UNIT)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = place_of(index, rows.labels, sizes, reduction.normalizer)
    target = load_target(rows, sizes, place, place.is_read)  # before any barrier: in place it is overwritten
    block = load_rows(0, rows, sizes, place, BLOCK)
    exponentials, split = sweep_rows(block, target, rows.labels)
    loss, gradient = losses_and_gradients(split, target, rows, place, reduction, objective)
    if d_logits is not None:
        tl.debug_barrier()  # rows that are not reduced across warps have met none
        d_target = gradient.target[:, None]
        d = spread(exponentials, block, rows, gradient.rest[:, None], gradient.weights[:, None], d_target)
        at = (index * gradient_stride * UNIT)[:, None] + block.columns[None, :]
        tl.store(d_logits + at, d.to(d_logits.dtype.element_ty), mask=block.inside[None, :] & place.exists[:, None])
    if losses is not None:  # after the gradient, whose registers are free by now
        if SUMMED:
            tl.store(losses + tl.program_id(0), tl.sum(loss, 0))
        else:
            tl.store(losses + index, loss, mask=place.exists)


@triton.jit(do_not_specialize=[*SIZES, "gradient_stride"])
def _long_rows(
    rows,  # logits (N, C) and how to split them
    d_logits,  # (N, C), may be the logits themselves; None for the losses alone
    losses,  # (N,); None for the gradient alone
    reduction,
    num_rows,
    classes,
    stride,
    ignore_index,
    gradient_stride,
    objective: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    sizes = sizes_of(num_rows, classes, stride, ignore_index, UNIT)
    blocks = tl.cdiv(sizes.classes, LANES * VECTOR)
    for taken in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        index = tl.cast(taken, tl.int64)
        place = place_of(index, rows.labels, sizes, reduction.normalizer)
        target = load_target(rows, sizes, place, place.is_read)
        split = sweep_long_row(rows, sizes, place, target, UNIT, LANES, VECTOR)
        loss, gradient = losses_and_gradients(split, target, rows, place, reduction, objective)
        if losses is not None:
            tl.store(losses + index, loss)
        if d_logits is not None:
            for swept in range(0, blocks):
                first = (blocks - 1 - swept) * (LANES * VECTOR)
                block = load_block(first, rows, sizes, place, UNIT, LANES, VECTOR, "evict_first")
                exponentials = exp_quick(block.z - split.shift)
                d = spread(exponentials, block, rows, gradient.rest, gradient.weights, gradient.target)
                at = index * gradient_stride * UNIT + block.columns
                d = d.to(d_logits.dtype.element_ty)
                tl.store(d_logits + at, d, mask=block.inside, eviction_policy="evict_first")


@triton.jit(do_not_specialize=[*SIZES, "gradient_stride"])
def _rows_over_clusters(
    rows,  # logits (N, C) and how to split them
    d_logits,  # (N, C), may be the logits themselves
    losses,  # (N,); None for the gradient alone
    reduction,
    num_rows,
    classes,
    stride,
    ignore_index,
    gradient_stride,
    objective: tl.constexpr,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One row over the blocks of a cluster, which reduce through one another's shared memory."""
    sizes = sizes_of(num_rows, classes, stride, ignore_index, UNIT)
    index = tl.program_id(0).to(tl.int64)
    place = place_of(index, rows.labels, sizes, reduction.normalizer)
    target = load_target(rows, sizes, place, place.is_read)  # before any barrier: in place it is overwritten
    block = load_block(0, rows, sizes, place, UNIT, LANES, VECTOR, "evict_first")
    exponentials, split = sweep_block(block, target, rows.labels)
    loss, gradient = losses_and_gradients(split, target, rows, place, reduction, objective)
    if losses is not None:
        tl.store(losses + index, loss)
    d = spread(exponentials, block, rows, gradient.rest, gradient.weights, gradient.target)
    tl.store(
        d_logits + index * gradient_stride * UNIT + block.columns, d.to(d_logits.dtype.element_ty), mask=block.inside
    )


@triton.jit(do_not_specialize=["num_rows", "num_classes", "ignore_index"])
def _row_weights(
    sums,  # one per program
    labels,
    sample_weight,  # (N,) or None
    num_rows,
    num_classes,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Sum sample weight * class weight over rows whose target is a class."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = place_of(index, labels, Sizes(num_rows, num_classes, 0, ignore_index), None)
    weight = tl.zeros((BLOCK,), sums.dtype.element_ty) + class_weight(labels, place)
    if sample_weight is not None:
        weight = weight * tl.load(sample_weight + index, mask=place.is_read, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(place.is_read, weight, 0.0), 0))


@triton.jit(do_not_specialize=["count"])
def _total(
    numbers,  # (count,)
    total,  # ()
    normalizer,  # () or None
    divisor,  # () or None
    count,
    BLOCK: tl.constexpr,
):
    """Sum numbers in an order that depends on their count alone, and divide: 0 where a normalizer is 0."""
    sums = tl.zeros((BLOCK,), numbers.dtype.element_ty)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(numbers + at, mask=at < count, other=0.0)
    result = tl.sum(sums, 0)
    if normalizer is not None:
        by = tl.load(normalizer)
        result = tl.where(by == 0, 0.0, result / tl.where(by == 0, 1.0, by))
    elif divisor is not None:
        result = result / tl.load(divisor)
    tl.store(total, result)


@triton.jit(do_not_specialize=["num_rows", "width", "stride"])
def _scale(gradient, factor, num_rows, width, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply rows of a gradient by a factor (); return at once where that is one."""
    by = widened(tl.load(factor))
    if by != 1:
        width = width.to(tl.int64) * UNIT
        blocks = tl.cdiv(width, BLOCK)
        for index in range(tl.program_id(0), num_rows * blocks, tl.num_programs(0)):
            columns = (index % blocks) * BLOCK + tl.arange(0, BLOCK)
            at = gradient + (index // blocks) * stride * UNIT + columns
            x = tl.load(at, mask=columns < width)
            tl.store(at, (widened(x) * by).to(x.dtype), mask=columns < width)


# ---------------------------------------------------------------- operations


class LossArguments(NamedTuple):
    """What the schema has after SplitArguments."""

    objective: str
    objective_parameters: Sequence[float]
    class_parameter: Tensor | None  # (C,)
    sample_weight: Tensor | None  # (N,)
    normalizer: Tensor | None  # ()
    reduction: str
    z_loss: float


def softmax_loss(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss and, where the last arguments ask for them, gradient, log_probs and correct; else (0,)."""
    *arguments, with_gradient, with_log_probs, with_correct = arguments
    d_logits = logits.new_empty(logits.shape) if with_gradient else None
    loss, *of_rows = _launch_reporting(logits, d_logits, target, arguments, with_log_probs, with_correct)
    return loss, logits.new_empty((0,)) if d_logits is None else d_logits, *of_rows


def softmax_loss_(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss, and log_probs and correct as above; the gradient takes the logits' memory."""
    *arguments, with_log_probs, with_correct = arguments
    if _arguments(arguments)[1].reduction == "none":
        raise ValueError("softmax_loss_ needs the upstream gradient of 'none': softmax_loss_backward_")
    return _launch_reporting(logits, logits, target, arguments, with_log_probs, with_correct)


def softmax_loss_backward(logits: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    """Return the gradient for the last argument, the upstream gradient."""
    *arguments, upstream = arguments
    d_logits = logits.new_empty(logits.shape)
    _launch(logits, d_logits, target, arguments, upstream)
    return d_logits


def softmax_loss_backward_(logits: Tensor, target: Tensor, *arguments: Any) -> None:
    """Write the gradient for the last argument, the upstream gradient, into the logits' memory."""
    *arguments, upstream = arguments
    _launch(logits, logits, target, arguments, upstream)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient (N, C) by a factor of one number; returns at once where that is one."""
    check_logits(gradient)
    if gradient.numel() == 0:
        return
    if gradient.is_contiguous():
        gradient = gradient.view(1, -1)  # narrow rows would not fill a block
    num_rows, width = gradient.shape
    (width_in_units, stride, _), unit = widths_of(gradient, gradient)
    programs = min(num_rows * triton.cdiv(width, SMALL_BLOCK), 8 * device_of(gradient.device).processors)
    with on(gradient):
        _scale[(programs,)](gradient, factor, num_rows, width_in_units, stride, UNIT=unit, BLOCK=SMALL_BLOCK)


def _launch_reporting(
    logits: Tensor,  # (N, C), or (B, C, P) where N is B * P
    d_logits: Tensor | None,  # in the logits' shape
    target: Tensor,  # (N,), or in the logits' shape
    arguments: Sequence[Any],  # SplitArguments, LossArguments
    with_log_probs: bool,
    with_correct: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, log_probs and correct; the latter takes one more read of the logits, before the gradient."""
    log_probs = logits.new_empty((0,), dtype=accumulate_dtype(logits.dtype))
    correct = logits.new_empty((0,), dtype=torch.bool)
    if not (with_log_probs or with_correct):
        return _launch(logits, d_logits, target, arguments), log_probs, correct
    if target.is_floating_point():
        raise ValueError("log_probs and correct need class indices")
    found = log_probs.new_empty(target.shape)
    if with_correct:  # before the gradient takes the logits' place
        split, call = _arguments(arguments)
        correct = highest_targets(logits, RowTargets.of(target, logits.shape[1], split.ignore_index))
        if call.normalizer is not None:
            correct = correct & (call.normalizer != 0)
    loss = _launch(logits, d_logits, target, arguments, log_probs=found)
    return loss, found if with_log_probs else log_probs, correct & ~found.isnan() if with_correct else correct


def _launch(
    logits: Tensor,  # (N, C), or (B, C, P) where N is B * P
    d_logits: Tensor | None,  # in the logits' shape
    target: Tensor,  # (N,), or in the logits' shape
    arguments: Sequence[Any],  # SplitArguments, LossArguments
    upstream: Tensor | None = None,  # () or (N,)
    log_probs: Tensor | None = None,  # (N,)
) -> Tensor | None:
    """Return the loss, () or (N,), and write the gradient to d_logits; with an upstream gradient the latter alone.

    Log-probabilities are written where there is room for them.
    """
    split, loss = _arguments(arguments)
    num_rows, summed = num_rows_of(logits), loss.reduction != "none"
    with on(logits):
        constants = constants_of(logits, target, split, planes=True)
        reduction = _reduction(logits, constants, split, loss, upstream)._replace(log_probs=log_probs)
        losses = None
        if upstream is None:
            count = partial_sums(logits) if summed else num_rows
            losses = logits.new_empty((count,), dtype=accumulate_dtype(logits.dtype))
        if num_rows > 0:
            rows = Rows(logits, constants.labels, constants.maps, _options(logits, constants, loss))
            objective, launch = OBJECTIVES[loss.objective], _launch_rows if logits.dim() == 2 else launch_planes
            launch(rows, d_logits, losses, reduction, split.ignore_index, objective, summed)
        return losses if losses is None or not summed else _sum(losses, reduction)


def _launch_rows(
    rows: Rows,
    d_logits: Tensor | None,  # (N, C)
    losses: Tensor | None,  # (N,), or their sums
    reduction: Reduction,
    ignore_index: int,
    objective: Any,
    summed: bool,
) -> None:
    logits: Tensor = rows.logits
    num_rows = logits.shape[0]
    (classes, stride, gradient_stride), unit = widths_of(logits, d_logits)
    everything = (rows, d_logits, losses, reduction, num_rows, classes, stride, ignore_index, gradient_stride)
    launch = {"objective": objective, "UNIT": unit}
    tile = row_tile(logits)
    if tile is not None:
        programs = triton.cdiv(num_rows, tile.rows)
        _rows[(programs,)](*everything, **launch, SUMMED=summed, **tile.options())
    elif d_logits is not None and (cluster := cluster_tile(logits)) is not None:
        _rows_over_clusters[(num_rows,)](*everything, **launch, **cluster.options())
    else:
        programs = long_programs(logits, reads_again=d_logits is not None)
        _long_rows[(programs,)](*everything, **launch, **long_tile(logits).options())


def _arguments(arguments: Sequence[Any]) -> tuple[SplitArguments, LossArguments]:
    width = len(SplitArguments._fields)
    loss = LossArguments(*arguments[width:])
    if loss.objective not in OBJECTIVES:
        raise ValueError(f"objective is '{loss.objective}', which the kernels do not know: use impl='reference'")
    if loss.reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is '{loss.reduction}'")
    return SplitArguments(*arguments[:width]), loss


def _options(logits: Tensor, constants: Constants, loss: LossArguments) -> RowOptions:
    first, second = (*loss.objective_parameters, 0.0, 0.0)[:2]
    return RowOptions(
        first_parameter=number(first, logits),
        second_parameter=number(second, logits),
        class_parameter=vector_of("class_parameter", loss.class_parameter, logits.shape[1], logits),
        kept=constants.kept,
        smoothing_per_class=constants.smoothing_per_class,
        z_loss=number(loss.z_loss, logits) if loss.z_loss > 0 else None,
    )


def _reduction(
    logits: Tensor, constants: Constants, split: SplitArguments, loss: LossArguments, upstream: Tensor | None
) -> Reduction:
    """Return what divides: a mean's divisor is found here, by two small launches."""
    sample_weight = vector_of("sample_weight", loss.sample_weight, num_rows_of(logits), logits)
    divisor = None
    if loss.reduction == "mean" and loss.normalizer is None:
        num_rows, num_classes = num_rows_of(logits), logits.shape[1]
        sums = logits.new_empty((triton.cdiv(num_rows, SMALL_BLOCK),), dtype=accumulate_dtype(logits.dtype))
        if num_rows > 0:
            sizes = (num_rows, num_classes, split.ignore_index)
            _row_weights[(sums.shape[0],)](sums, constants.labels, sample_weight, *sizes, BLOCK=SMALL_BLOCK)
        divisor = _sum(sums, None)
    step = tl.constexpr(0 if upstream is None or loss.reduction != "none" else 1)
    if upstream is not None and loss.reduction == "none":
        upstream = vector_of("upstream", upstream, num_rows_of(logits), logits)
    return Reduction(sample_weight, upstream, step, loss.normalizer, divisor)


def _sum(numbers: Tensor, reduction: Reduction | None) -> Tensor:
    """Return the sum () of numbers (n,), divided as the reduction says."""
    total = numbers.new_empty(())
    normalizer, divisor = (None, None) if reduction is None else (reduction.normalizer, reduction.divisor)
    _total[(1,)](numbers, total, normalizer, divisor, numbers.shape[0], BLOCK=SMALL_BLOCK)
    return total
