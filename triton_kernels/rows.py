"""What the kernels of softmax_loss and target_and_rest share: where a row is, its sweep, its loss and its spread.

A sweep splits a row into its target and the rest: the rest's maximum (the shift), the sum of its exponentials relative
to that, and two more sums where class weights are spread. The target is taken out before anything is summed, never
subtracted afterwards. A row that is ignored, or whose target is no class, is not read.

Rows come in two shapes. Rows that fit one program are a block (ROWS, BLOCK), every row reduced along the second axis. A
longer row is taken in blocks (LANES, VECTOR), where a vector is what a thread loads at once (or, where rows are not
aligned, as many numbers far apart): each lane reduces its own, without a word to the others until the row ends.
Channels-first logits (planes.py) are rows of the first shape too, whose classes are far apart.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from imbalance_kernels.triton_kernels.logit_map import (
    bend_slope,
    effective_logits,
    load_class_vector,
    target_logit,
)
from imbalance_kernels.triton_kernels.math import exp_quick
from imbalance_kernels.triton_kernels.softmax_row import RowGradient, RowSplit, log_probability, row_program

__all__ = [
    "SIZES",
    "Block",
    "Labels",
    "Place",
    "Reduction",
    "Rows",
    "Sizes",
    "Target",
    "class_weight",
    "join",
    "load_block",
    "load_rows",
    "load_target",
    "losses_and_gradients",
    "place_of",
    "advance",
    "block_of",
    "shift_of",
    "sizes_of",
    "spread",
    "start",
    "sweep_block",
    "sweep_long_row",
    "sweep_rows",
    "target_of",
    "widened",
]


SIZES = ["num_rows", "classes", "stride", "ignore_index"]  # integers that no kernel is compiled anew for


class Sizes(NamedTuple):
    """Integers, built in the kernel: do_not_specialize does not reach into a tuple that is an argument."""

    num_rows: Any  # N
    classes: Any  # C
    stride: Any  # of the logits' rows, int64
    ignore_index: Any


class Labels(NamedTuple):
    """What the rows are to be; either target or probabilities is None."""

    target: Any  # (N,) int64 class indices
    probabilities: Any  # contiguous class probabilities in the logits' shape
    class_weight: Any  # (C,)
    spreads: Any  # compile-time: class weights are spread over the row, by smoothing or as probabilities


class Reduction(NamedTuple):
    """What becomes of the rows' losses; what is None takes no part."""

    sample_weight: Any  # (N,)
    upstream: Any  # (N,) or (): the gradient of the result
    upstream_step: Any  # compile-time: 1 or 0
    normalizer: Any  # (): given; where it is 0, so is everything
    divisor: Any  # (): of the mean
    log_probs: Any = None  # (N,) of the targets, to be written


class Rows(NamedTuple):
    """What is to be split and how; always an argument, because a tuple that a kernel builds may hold tensors alone."""

    logits: Any  # (N, C), or (B, C, P) where N is B * P
    labels: Any  # Labels
    maps: Any  # LogitMap
    options: Any  # RowOptions


class Place(NamedTuple):
    """Which rows a program works on and what it is to do with them; (ROWS,), or numbers for one row."""

    rows: Any  # int64
    exists: Any  # below N
    target: Any  # class index, -1 where there is none
    is_read: Any
    outside: Any  # its target is no class: NaN


class Block(NamedTuple):
    """Logits of some rows (ROWS, BLOCK), or of one row (LANES, VECTOR), and what they mean."""

    x: Any  # -inf where nothing was read
    z: Any  # effective, as one of the rest; -inf where masked and at the target
    u: Any  # class weights, where they are spread
    is_target: Any
    columns: Any  # class indices; (BLOCK,) where rows share them
    inside: Any  # of the same shape: below C


class Target(NamedTuple):
    """The targets of rows; (ROWS,), or numbers for one row."""

    z: Any  # effective logit, -inf where masked or where there is none
    slope: Any  # dz_t / dx_t
    weight: Any  # u_t


@triton.jit
def widened(x):
    """Return x in the dtype of statistics."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def sizes_of(num_rows, classes, stride, ignore_index, UNIT: tl.constexpr):
    """Return Sizes; classes and stride come in units of `UNIT`, so that the compiler knows what divides them."""
    return Sizes(num_rows, classes * UNIT, stride.to(tl.int64) * UNIT, ignore_index)


@triton.jit
def place_of(index, labels, sizes, normalizer):
    """Return the Place of the rows at `index`; a normalizer () of 0 ignores them all."""
    exists = index < sizes.num_rows
    reads = exists
    if normalizer is not None:  # a limit, because the interpreter of 3.9 mistakes the "and" with one bool for a number
        reads = index < tl.where(tl.load(normalizer) == 0, 0, sizes.num_rows)
    target = index * 0 - 1  # of index's shape
    is_read = reads
    outside = index < 0
    if labels.target is not None:
        target = tl.load(labels.target + index, mask=exists, other=0)
        valid = (target >= 0) & (target < sizes.classes)
        reads = reads & (target != sizes.ignore_index)
        is_read = reads & valid
        outside = reads & (valid == 0)
        target = tl.where(is_read, target, -1)
    # Of 32 bits from here on: it is compared with every column.
    return Place(index, exists, target.to(tl.int32), is_read, outside)


@triton.jit
def class_weight(labels, place):
    """Return w_t."""
    weight = 1.0
    if labels.class_weight is not None:
        if labels.target is not None:
            weight = tl.load(labels.class_weight + place.target, mask=place.is_read, other=0.0)
    return weight


@triton.jit
def load_target(rows, sizes, place, owned):
    """Return the Target of the rows that are `owned`."""
    return target_of(rows, place.rows * sizes.stride + place.target, place, owned)


@triton.jit
def target_of(rows, at, place, owned):
    """Return the Target of the rows that are `owned`, whose raw logit is the one `at`."""
    dtype: tl.constexpr = tl.float64 if rows.logits.dtype.element_ty == tl.float64 else tl.float32
    zero = tl.where(owned, 0.0, 0.0).to(dtype)  # of owned's shape
    z = zero - float("inf")
    slope = zero
    weight = zero
    if rows.labels.target is not None:
        x = widened(tl.load(rows.logits + at, mask=owned, other=0.0))
        z, slope = target_logit(x, place.target, owned, rows.maps)
        if rows.labels.spreads:
            weight = tl.where(z == -float("inf"), 0.0, zero + class_weight(rows.labels, place))
    return Target(z, slope, weight)


@triton.jit
def block_of(x, columns, inside, is_target, reads, rows, at):
    """Return the Block of logits x, whose class probabilities are `at`."""
    z, masked = effective_logits(x, columns, inside, rows.maps)
    z = tl.where(is_target, -float("inf"), z)
    u = z
    if rows.labels.spreads:
        masked = masked | is_target | (reads == 0)
        u = tl.where(masked, 0.0, 1.0)
        if rows.labels.probabilities is not None:
            u = widened(tl.load(rows.labels.probabilities + at, mask=reads, other=0.0))
            u = tl.where(reads, u, 0.0)  # Triton before 3.8 fails to compile a loop's sum of a load as it is
            if rows.options.kept is not None:
                u = u * rows.options.kept
                u = tl.where(masked, u, u + rows.options.smoothing_per_class)
        if rows.labels.class_weight is not None:
            u = u * load_class_vector(rows.labels.class_weight, columns, inside, 0.0)
    return Block(x, z, u, is_target, columns, inside)


@triton.jit
def load_rows(first, rows, sizes, place, BLOCK: tl.constexpr):
    """Load classes from `first` on of rows, as a block (ROWS, BLOCK)."""
    columns = first + tl.arange(0, BLOCK)
    inside = columns < sizes.classes
    reads = inside[None, :] & place.is_read[:, None]
    at = (place.rows * sizes.stride)[:, None] + columns[None, :]
    x = widened(tl.load(rows.logits + at, mask=reads, other=-float("inf"), eviction_policy="evict_first"))
    is_target = columns[None, :] == place.target[:, None]
    at = place.rows[:, None] * sizes.classes + columns[None, :]
    return block_of(x, columns, inside, is_target, reads, rows, at)


@triton.jit
def load_block(
    first, rows, sizes, place, UNIT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVICTION: tl.constexpr
):
    """Load classes from `first` on of one row, as a block (LANES, VECTOR); neighbouring threads load neighbours."""
    lane_step: tl.constexpr = VECTOR if UNIT > 1 else 1
    vector_step: tl.constexpr = 1 if UNIT > 1 else LANES
    columns = first + tl.arange(0, LANES)[:, None] * lane_step + tl.arange(0, VECTOR)[None, :] * vector_step
    reads = columns < tl.where(place.is_read, sizes.classes, 0)
    at = place.rows * sizes.stride + columns
    x = widened(tl.load(rows.logits + at, mask=reads, other=-float("inf"), eviction_policy=EVICTION))
    inside = columns < sizes.classes
    at = place.rows * sizes.classes + columns
    return block_of(x, columns, inside, columns == place.target, reads, rows, at)


@triton.jit
def shift_of(highest):
    """Return the maximum, or 0 where everything is masked: -inf - -inf is NaN."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def _exponentials(block, shift, labels):
    """Return exp(z - shift), its sum along the second axis, and there too sum u (z - shift) and sum u."""
    relative = block.z - shift[:, None]
    exponentials = exp_quick(relative)
    total = tl.sum(exponentials, 1)
    weighted_logits = tl.zeros_like(total)
    weight_sum = tl.zeros_like(total)
    if labels.spreads:
        weighted_logits = tl.sum(tl.where(block.u == 0, 0.0, block.u * relative), 1)
        weight_sum = tl.sum(block.u, 1)
    return exponentials, total, weighted_logits, weight_sum


@triton.jit
def join(target, total, shift, weighted_logits, weight_sum):
    """Return the RowSplit of a target and the sums over the rest."""
    z = target.z - shift
    weighted_logits = weighted_logits + tl.where(target.weight == 0, 0.0, target.weight * z)
    return RowSplit(z, total, shift, weighted_logits, weight_sum + target.weight)


@triton.jit
def sweep_rows(block, target, labels):
    """Sweep whole rows, a block of load_rows; return their exponentials and RowSplit."""
    shift = shift_of(tl.max(block.z, 1))
    exponentials, total, weighted_logits, weight_sum = _exponentials(block, shift, labels)
    return exponentials, join(target, total, shift, weighted_logits, weight_sum)


@triton.jit
def sweep_block(block, target, labels):
    """Sweep one row that is a single block of load_block; return its exponentials and RowSplit."""
    shift = shift_of(tl.max(tl.max(block.z, 1), 0))
    relative = block.z - shift
    exponentials = exp_quick(relative)
    total = tl.sum(tl.sum(exponentials, 1), 0)
    weighted_logits = tl.zeros_like(total)
    weight_sum = tl.zeros_like(total)
    if labels.spreads:
        weighted_logits = tl.sum(tl.sum(tl.where(block.u == 0, 0.0, block.u * relative), 1), 0)
        weight_sum = tl.sum(tl.sum(block.u, 1), 0)
    return exponentials, join(target, total, shift, weighted_logits, weight_sum)


@triton.jit
def start(COUNT: tl.constexpr, dtype: tl.constexpr):
    """Return what `advance` starts from: highest, total, weighted_logits, weight_sum of nothing."""
    zero = tl.zeros((COUNT,), dtype)
    return zero - float("inf"), zero, zero, zero


@triton.jit
def advance(block, highest, total, weighted_logits, weight_sum, labels):
    """Return these numbers, (ROWS,) or of lanes, with a block's; sums are relative to the shift of highest."""
    before = highest
    highest = tl.maximum(highest, tl.max(block.z, 1))
    shift = shift_of(highest)
    _, of_block, weighted_of_block, weight_of_block = _exponentials(block, shift, labels)
    total = total * exp_quick(before - shift) + of_block
    if labels.spreads:
        weighted_logits += (shift_of(before) - shift) * weight_sum + weighted_of_block
        weight_sum += weight_of_block
    return highest, total, weighted_logits, weight_sum


@triton.jit
def sweep_long_row(rows, sizes, place, target, UNIT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Sweep one row block by block and return its RowSplit; every lane has a shift of its own until the end."""
    dtype: tl.constexpr = tl.float64 if rows.logits.dtype.element_ty == tl.float64 else tl.float32
    highest, total, weighted_logits, weight_sum = start(LANES, dtype)
    for first in range(0, tl.where(place.is_read, sizes.classes, 0), LANES * VECTOR):
        block = load_block(first, rows, sizes, place, UNIT, LANES, VECTOR, "evict_last")
        highest, total, weighted_logits, weight_sum = advance(
            block, highest, total, weighted_logits, weight_sum, rows.labels
        )
    shift = shift_of(tl.max(highest, 0))
    total = tl.sum(total * exp_quick(highest - shift), 0)
    if rows.labels.spreads:
        weighted_logits += (shift_of(highest) - shift) * weight_sum
    return join(target, total, shift, tl.sum(weighted_logits, 0), tl.sum(weight_sum, 0))


@triton.jit
def losses_and_gradients(split, target, rows, place, reduction, objective: tl.constexpr):
    """Return losses and RowGradient: ignored rows 0, outside ones NaN.

    Gradients are weighted and divided, losses weighted alone. The target's gradient is that of its raw logit; rest and
    weights have yet to be spread. Log-probabilities are stored where they are asked for.
    """
    parameter = 0.0
    if rows.options.class_parameter is not None:
        parameter = tl.load(rows.options.class_parameter + place.target, mask=place.is_read, other=0.0)
    has_target: tl.constexpr = rows.labels.target is not None
    weight = class_weight(rows.labels, place)
    loss, gradient = row_program(split, has_target, weight, parameter, rows.options, objective)
    d_target = (gradient.target - gradient.weights * target.weight) * target.slope
    factor = tl.zeros_like(loss) + 1.0
    if reduction.sample_weight is not None:
        factor = tl.load(reduction.sample_weight + place.rows, mask=place.is_read, other=0.0)
        loss = loss * factor
    if reduction.upstream is not None:
        at = place.rows * reduction.upstream_step
        factor = factor * tl.load(reduction.upstream + at, mask=place.is_read, other=0.0)
    if reduction.normalizer is not None:
        factor = factor * (1.0 / tl.load(reduction.normalizer))  # one division for all rows of a program
    elif reduction.divisor is not None:
        factor = factor * (1.0 / tl.load(reduction.divisor))
    uncounted = tl.where(place.outside, float("nan"), 0.0)
    if reduction.log_probs is not None:
        log_probs = tl.where(place.is_read, log_probability(split), uncounted)
        tl.store(reduction.log_probs + place.rows, log_probs, mask=place.exists)
    return tl.where(place.is_read, loss, uncounted), RowGradient(
        tl.where(place.is_read, d_target * factor, uncounted),
        tl.where(place.is_read, gradient.rest * factor, uncounted),
        tl.where(place.is_read, gradient.weights * factor, uncounted),
    )


@triton.jit
def spread(exponentials, block, rows, rest, weights, d_target):
    """Return the gradient of a block: rest * exp(z - shift) - weights * u, through the map, and d_target."""
    d = exponentials * rest
    if rows.labels.spreads:
        d = d - block.u * weights
    if rows.maps.softcap is not None or rows.maps.margin_kind == "circle":
        d = d * bend_slope(block.x, rows.maps)
    if rows.maps.scale is not None:
        d = d * rows.maps.scale
    if rows.maps.factor is not None:
        d = d * load_class_vector(rows.maps.factor, block.columns, block.inside, 0.0)
    return tl.where(block.is_target, d_target, d)
