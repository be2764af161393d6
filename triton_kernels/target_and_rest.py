"""target_and_rest in Triton: each row split into its target and the log-sum-exp of the rest, and the backward of that.

The operations of csrc/bindings.cpp with their names and arguments. The split reads the logits once; its backward reads
them once and writes their gradient once. Nothing else of their size exists.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from imbalance_kernels.options import accumulate_dtype
from imbalance_kernels.triton_kernels.launch import (
    Constants,
    SplitArguments,
    block_tile,
    constants_of,
    long_tile,
    on,
    row_tile,
    vector_of,
    widths_of,
)
from imbalance_kernels.triton_kernels.math import exp_nonpositive, exp_quick
from imbalance_kernels.triton_kernels.rows import (
    SIZES,
    Rows,
    load_rows,
    load_target,
    place_of,
    sizes_of,
    spread,
    sweep_long_row,
    sweep_rows,
)
from imbalance_kernels.triton_kernels.softmax_row import RowOptions, log_rest

__all__ = ["target_and_rest", "target_and_rest_backward", "target_and_rest_backward_"]


class Vectors(NamedTuple):
    """The vectors of a split or their gradients; the weighted ones are None where no class weights are spread."""

    target_logit: Any  # (N,)
    rest: Any  # (N,)
    shift: Any  # (N,)
    weighted_logits: Any  # (N,)
    weight_sum: Any  # (N,)


@triton.jit
def _store(vectors, split, place):
    """Store a RowSplit: an ignored row is one class with logit 0, one whose target is no class is NaN."""
    uncounted = tl.where(place.outside, float("nan"), 0.0)
    rest = tl.where(place.is_read, log_rest(split.total), uncounted - float("inf"))
    tl.store(vectors.target_logit + place.rows, tl.where(place.is_read, split.target, uncounted), mask=place.exists)
    tl.store(vectors.rest + place.rows, rest, mask=place.exists)
    tl.store(vectors.shift + place.rows, tl.where(place.is_read, split.shift, uncounted), mask=place.exists)
    if vectors.weighted_logits is not None:
        weighted_logits = tl.where(place.is_read, split.weighted_logits, uncounted)
        weight_sum = tl.where(place.is_read, split.weight_sum, uncounted)
        tl.store(vectors.weighted_logits + place.rows, weighted_logits, mask=place.exists)
        tl.store(vectors.weight_sum + place.rows, weight_sum, mask=place.exists)


@triton.jit(do_not_specialize=SIZES)
def _rows(
    rows,  # logits (N, C) and how to split them
    vectors,  # to be written
    num_rows,
    classes,
    stride,
    ignore_index,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sizes = sizes_of(num_rows, classes, stride, ignore_index, UNIT)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = place_of(index, rows.labels, sizes, None)
    target = load_target(rows, sizes, place, place.is_read)
    _, split = sweep_rows(load_rows(0, rows, sizes, place, BLOCK), target, rows.labels)
    _store(vectors, split, place)


@triton.jit(do_not_specialize=SIZES)
def _long_rows(
    rows,  # logits (N, C) and how to split them
    vectors,  # to be written
    num_rows,
    classes,
    stride,
    ignore_index,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    sizes = sizes_of(num_rows, classes, stride, ignore_index, UNIT)
    place = place_of(tl.program_id(0).to(tl.int64), rows.labels, sizes, None)
    target = load_target(rows, sizes, place, place.is_read)
    _store(vectors, sweep_long_row(rows, sizes, place, target, UNIT, LANES, VECTOR), place)


@triton.jit(do_not_specialize=[*SIZES, "gradient_stride"])
def _backward(
    rows,  # logits (N, C) and how to split them
    d_logits,  # (N, C), may be the logits themselves
    vectors,  # rest and shift, of the forward
    gradients,  # of target_logit, rest and weighted_logits
    num_rows,
    classes,
    stride,
    ignore_index,
    gradient_stride,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of classes of some rows: the exponentials again, relative to the shift that the forward found."""
    sizes = sizes_of(num_rows, classes, stride, ignore_index, UNIT)
    blocks = tl.cdiv(sizes.classes, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    index = (program // blocks) * ROWS + tl.arange(0, ROWS)
    first = ((program % blocks) * BLOCK).to(tl.int32)
    place = place_of(index, rows.labels, sizes, None)
    # In place the target belongs to the program that overwrites it; others would read its gradient.
    owned = place.is_read & (place.target >= first) & (place.target < first + BLOCK)
    target = load_target(rows, sizes, place, owned)
    block = load_rows(first, rows, sizes, place, BLOCK)

    uncounted = tl.where(place.outside, float("nan"), 0.0)
    shift = tl.load(vectors.shift + index, mask=place.is_read, other=0.0)
    log_sum = tl.load(vectors.rest + index, mask=place.is_read, other=0.0)
    rest = tl.load(gradients.rest + index, mask=place.is_read, other=0.0)
    rest = tl.where(log_sum == -float("inf"), 0.0, rest * exp_nonpositive(-log_sum)) + uncounted
    weights = tl.zeros_like(rest)
    if gradients.weighted_logits is not None:
        weights = -tl.load(gradients.weighted_logits + index, mask=place.is_read, other=0.0)
    d_target = tl.load(gradients.target_logit + index, mask=owned, other=0.0)
    d_target = (d_target - weights * target.weight) * target.slope
    tl.debug_barrier()  # nothing was reduced, so no warp has waited for another's loads
    exponentials = exp_quick(block.z - shift[:, None])
    d = spread(exponentials, block, rows, rest[:, None], weights[:, None], d_target[:, None])
    at = (index * gradient_stride * UNIT)[:, None] + block.columns[None, :]
    tl.store(d_logits + at, d.to(d_logits.dtype.element_ty), mask=block.inside[None, :] & place.exists[:, None])


# ---------------------------------------------------------------- operations


def target_and_rest(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return target_logit, rest, shift, weighted_logits, weight_sum (N,); the last two (0,) where nothing is spread."""
    split = SplitArguments(*arguments)
    num_rows = logits.shape[0]
    dtype = accumulate_dtype(logits.dtype)
    spreads = target.is_floating_point() or split.label_smoothing > 0
    widths = [num_rows] * 3 + [num_rows if spreads else 0] * 2
    vectors = Vectors(*(logits.new_empty((width,), dtype=dtype) for width in widths))
    if num_rows == 0:
        return tuple(vectors)
    constants = constants_of(logits, target, split)
    out = vectors if spreads else vectors._replace(weighted_logits=None, weight_sum=None)
    (classes, stride, _), unit = widths_of(logits)
    common = (_rows_of(logits, constants), out, num_rows, classes, stride, split.ignore_index)
    tile = row_tile(logits)
    with on(logits):
        if tile is not None:
            _rows[(triton.cdiv(num_rows, tile.rows),)](*common, UNIT=unit, **tile.options())
        else:
            _long_rows[(num_rows,)](*common, UNIT=unit, **long_tile(logits).options())
    return tuple(vectors)


def target_and_rest_backward(logits: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    """Return the gradient (N, C) from rest, shift, d_target, d_rest, d_weighted_logits, the last arguments."""
    d_logits = logits.new_empty(logits.shape)
    _launch_backward(logits, d_logits, target, *arguments)
    return d_logits


def target_and_rest_backward_(logits: Tensor, target: Tensor, *arguments: Any) -> None:
    """Write the same gradient into the logits' memory."""
    _launch_backward(logits, logits, target, *arguments)


def _launch_backward(logits: Tensor, d_logits: Tensor, target: Tensor, *arguments: Any) -> None:
    *arguments, rest, shift, d_target, d_rest, d_weighted_logits = arguments
    if logits.numel() == 0:
        return
    split = SplitArguments(*arguments)
    constants = constants_of(logits, target, split)
    spreads = target.is_floating_point() or split.label_smoothing > 0
    as_vector = functools.partial(vector_of, size=logits.shape[0], logits=logits)
    found = Vectors(None, as_vector("rest", rest), as_vector("shift", shift), None, None)
    weighted = as_vector("d_weighted_logits", d_weighted_logits) if spreads else None
    gradients = Vectors(as_vector("d_target", d_target), as_vector("d_rest", d_rest), None, weighted, None)
    (classes, stride, gradient_stride), unit = widths_of(logits, d_logits)
    tile = block_tile(logits)
    num_rows, num_classes = logits.shape
    programs = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_classes, tile.block)
    with on(logits):
        _backward[(programs,)](
            _rows_of(logits, constants),
            d_logits,
            found,
            gradients,
            num_rows,
            classes,
            stride,
            split.ignore_index,
            gradient_stride,
            UNIT=unit,
            **tile.options(),
        )


def _rows_of(logits: Tensor, constants: Constants) -> Rows:
    row_options = RowOptions(None, None, None, constants.kept, constants.smoothing_per_class, None)
    return Rows(logits, constants.labels, constants.maps, row_options)
