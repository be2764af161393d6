"""column_sums in Triton: sums over rows of p, of y p and of y, class by class, and their gradient.

p = sigmoid(x), or the softmax of a row. The operations of csrc/bindings.cpp with their names and arguments. A program
takes one block of classes over a stretch of rows, a tile at a time, and writes a part of the sums; the parts are added
up in float64, in their order, without atomics. Rows (N, C) and images (B, C, P) differ in their steps alone: a tile's
rows are rows, or pixels of one image.

Before the sums of a softmax a program of its own finds each row's highest logit and the sum of its exponentials, in one
sweep over the row's classes. Its gradient is p (g - sum p g), where g is that of p: the same sweep finds that sum too,
and a second one, backwards, so that it begins with what the cache still holds, writes the gradient. In a sure row both
g and the sum are nearly the g of the highest logit: that is taken off all of them first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imbalance_kernels.options import LOGIT_DTYPES, accumulate_dtype
from imbalance_kernels.triton_kernels.labels import Labels, counted_rows, labels_of, load_labels
from imbalance_kernels.triton_kernels.launch import device_of, num_rows_of, on, vector_of
from imbalance_kernels.triton_kernels.math import exp_quick
from imbalance_kernels.triton_kernels.rows import shift_of, widened

__all__ = ["column_sums", "column_sums_backward"]

TILE = 2048  # logits; of float64 half as many
SOFTMAX_WARPS = 8  # which holds exponentials, and g beside them
WIDEST = 128  # classes of a tile of rows; of pixels there are more, and of classes fewer
WIDEST_OF_IMAGES = 8
MOST_TILES = 64  # of a program: each number sums so many in float32
PROGRAMS = 8  # of a processor
UNITS = 16
VECTOR_BYTES = 16
SIZES = ["pixels", "classes", "image_stride", "stride", "ignore_index", "list_length", "tiles", "tiles_of_part"]
SIZES_OF_TILE = SIZES[:-2]


class Logits(NamedTuple):
    """Logits and what lies beside them."""

    logits: Any  # (N, C) or (B, C, P)
    labels: Labels
    sample_weight: Any  # (N,) or None
    softmax: Any  # (N, 2): each row's highest logit, and 1 / the sum of its exponentials; None: p is a sigmoid


class Rows(NamedTuple):
    """The rows of a tile; (ROWS, 1)."""

    image: Any  # a number
    at: Any  # in the image
    index: Any  # of all
    exist: Any
    is_read: Any
    label: Any
    weight: Any  # 0 of rows that do not count
    poison: Any  # NaN of rows whose label is wrong, else 0


class Block(NamedTuple):
    """A tile of logits (ROWS, BLOCK)."""

    x: Any  # 0 of rows that do not count
    y: Any
    contiguous: Any  # places in contiguous memory
    inside: Any  # below C; (1, BLOCK)


class Steps(NamedTuple):
    """How logits lie; a row of (N, C) is a pixel of one image."""

    pixels: Any
    classes: Any
    image_stride: Any
    stride: Any  # of rows; of images, whose pixels are neighbours, of classes


@triton.jit
def _steps(pixels, classes, image_stride, stride, IS_IMAGE: tl.constexpr, UNIT: tl.constexpr):
    """Return Steps; what decides how wide loads can be comes in units of `UNIT`."""
    image_stride = image_stride.to(tl.int64) * UNIT
    stride = stride.to(tl.int64) * UNIT
    if IS_IMAGE:
        return Steps(pixels * UNIT, classes, image_stride, stride)
    else:
        return Steps(pixels, classes * UNIT, image_stride, stride)


@triton.jit
def _rows_of(tensors, tile, steps, ignore_index, list_length, ROWS: tl.constexpr):
    """Return the Rows of a tile."""
    dtype: tl.constexpr = tl.float64 if tensors.logits.dtype.element_ty == tl.float64 else tl.float32
    tiles_of_image = tl.cdiv(steps.pixels, ROWS)
    image = (tile // tiles_of_image).to(tl.int64)
    at = (tile % tiles_of_image).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exist = at < steps.pixels
    index = image * steps.pixels + at
    counted = counted_rows(
        index, exist, steps.classes, ignore_index, list_length, tensors.labels, tensors.sample_weight, dtype
    )
    weight = tl.where(counted.is_read, counted.weight, 0.0)[:, None]
    poison = tl.where(counted.outside, float("nan"), 0.0).to(dtype)[:, None]
    is_read = counted.is_read[:, None]
    return Rows(image, at[:, None], index[:, None], exist[:, None], is_read, counted.label[:, None], weight, poison)


@triton.jit
def _load(
    tensors,
    rows,
    column_block,
    steps,
    ignore_index,
    list_length,
    IS_IMAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Return the Block of a tile."""
    columns = column_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = columns < steps.classes
    if IS_IMAGE:
        wide = columns.to(tl.int64)
        place = rows.image * steps.image_stride + wide * steps.stride + rows.at
        contiguous = rows.image * steps.classes * steps.pixels + wide * steps.pixels + rows.at
    else:
        place = rows.at * steps.stride + columns
        contiguous = rows.at * steps.classes + columns
    exists = rows.exist & inside  # not what is read: of pixels that would keep loads from being vectors
    x = tl.load(tensors.logits + place, mask=exists, other=0.0, eviction_policy=EVICTION)
    x = tl.where(rows.is_read, widened(x), 0.0)
    y = load_labels(
        tensors.labels, rows.index, columns, contiguous, rows.label, rows.is_read, inside, ignore_index, list_length
    ).to(x.dtype)
    return Block(x, y, contiguous, inside)


@triton.jit
def _sigmoid(x):
    """Return p and 1 - p."""
    small = exp_quick(-tl.abs(x))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(x > 0, larger, smaller), tl.where(x > 0, smaller, larger)


@triton.jit
def _of_p(block, d_predicted, d_true_positives, column_block, BLOCK: tl.constexpr):
    """Return the gradient of p."""
    columns = column_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    of_predicted = tl.load(d_predicted + columns, mask=block.inside, other=0.0)
    of_true_positives = tl.load(d_true_positives + columns, mask=block.inside, other=0.0)
    return of_predicted + tl.where(block.y == 0, 0.0, block.y * of_true_positives)


@triton.jit(do_not_specialize=SIZES)
def _sums(
    tensors,
    parts,  # (parts, 3, C)
    pixels,
    classes,
    image_stride,
    stride,
    ignore_index,
    list_length,
    tiles,
    tiles_of_part,
    IS_IMAGE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if tensors.logits.dtype.element_ty == tl.float64 else tl.float32
    steps = _steps(pixels, classes, image_stride, stride, IS_IMAGE, UNIT)
    predicted = tl.zeros((ROWS, BLOCK), dtype)
    true_positives = tl.zeros((ROWS, BLOCK), dtype)
    positives = tl.zeros((ROWS, BLOCK), dtype)
    part = tl.program_id(0).to(tl.int64)
    column_block = tl.program_id(1)
    for tile in range(part * tiles_of_part, tl.minimum((part + 1) * tiles_of_part, tiles)):
        rows = _rows_of(tensors, tile, steps, ignore_index, list_length, ROWS)
        block = _load(tensors, rows, column_block, steps, ignore_index, list_length, IS_IMAGE, BLOCK, "evict_first")
        if tensors.softmax is not None:
            shift = tl.load(tensors.softmax + 2 * rows.index, mask=rows.is_read, other=0.0)
            factor = tl.load(tensors.softmax + 2 * rows.index + 1, mask=rows.is_read, other=0.0)
            p = exp_quick(block.x - shift) * factor
        else:
            p, _ = _sigmoid(block.x)
        predicted += rows.weight * p + rows.poison
        true_positives += tl.where(block.y == 0, 0.0, rows.weight * (block.y * p)) + rows.poison
        positives += rows.weight * block.y
    columns = column_block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < steps.classes
    to = parts + part * 3 * steps.classes + columns
    tl.store(to, tl.sum(predicted, 0), mask=inside)
    tl.store(to + steps.classes, tl.sum(true_positives, 0), mask=inside)
    tl.store(to + 2 * steps.classes, tl.sum(positives, 0), mask=inside)


@triton.jit(do_not_specialize=SIZES_OF_TILE)
def _gradient(
    tensors,
    d_predicted,  # (C,)
    d_true_positives,  # (C,)
    d_logits,  # the logits' shape, contiguous
    pixels,
    classes,
    image_stride,
    stride,
    ignore_index,
    list_length,
    IS_IMAGE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    steps = _steps(pixels, classes, image_stride, stride, IS_IMAGE, UNIT)
    column_block = tl.program_id(1)
    rows = _rows_of(tensors, tl.program_id(0), steps, ignore_index, list_length, ROWS)
    block = _load(tensors, rows, column_block, steps, ignore_index, list_length, IS_IMAGE, BLOCK, "evict_first")
    p, n = _sigmoid(block.x)
    d = (rows.weight + rows.poison) * (p * n) * _of_p(block, d_predicted, d_true_positives, column_block, BLOCK)
    tl.store(d_logits + block.contiguous, d.to(d_logits.dtype.element_ty), mask=rows.exist & block.inside)


@triton.jit(do_not_specialize=SIZES_OF_TILE)
def _softmax(
    tensors,
    softmax,  # (N, 2), see Logits; None for the gradient
    d_predicted,  # (C,), as the next two None for what becomes `softmax`
    d_true_positives,  # (C,)
    d_logits,  # the logits' shape, contiguous
    pixels,
    classes,
    image_stride,
    stride,
    ignore_index,
    list_length,
    IS_IMAGE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if tensors.logits.dtype.element_ty == tl.float64 else tl.float32
    steps = _steps(pixels, classes, image_stride, stride, IS_IMAGE, UNIT)
    rows = _rows_of(tensors, tl.program_id(0), steps, ignore_index, list_length, ROWS)
    weight = rows.weight + rows.poison
    zero = tl.zeros((ROWS, 1), dtype)
    highest = zero - float("inf")
    total = zero
    of_highest = zero  # the g of the highest logit
    dot = zero  # sum of exponentials times g, relative to that
    blocks = tl.cdiv(steps.classes, BLOCK)
    for column_block in range(0, blocks):
        block = _load(tensors, rows, column_block, steps, ignore_index, list_length, IS_IMAGE, BLOCK, "evict_last")
        x = tl.where(block.inside, block.x, -float("inf"))
        before = highest
        highest = tl.maximum(before, tl.max(x, 1)[:, None])
        exponentials = exp_quick(x - shift_of(highest))
        scale = exp_quick(before - shift_of(highest))
        if d_logits is not None:
            of_p = _of_p(block, d_predicted, d_true_positives, column_block, BLOCK)
            of_block = tl.max(tl.where(x == highest, of_p, -float("inf")), 1)[:, None]
            of_before = of_highest
            of_highest = tl.where(highest > before, of_block, of_before)
            dot = (dot + (of_before - of_highest) * total) * scale
            dot += tl.sum(exponentials * (of_p - of_highest), 1)[:, None]
        total = total * scale + tl.sum(exponentials, 1)[:, None]
    shift = shift_of(highest)
    factor = 1.0 / total  # of nothing but masks inf, and p NaN
    if d_logits is None:
        tl.store(softmax + 2 * rows.index, shift, mask=rows.exist)
        tl.store(softmax + 2 * rows.index + 1, factor, mask=rows.exist)
    else:
        for swept in range(0, blocks):
            column_block = blocks - 1 - swept
            block = _load(tensors, rows, column_block, steps, ignore_index, list_length, IS_IMAGE, BLOCK, "evict_first")
            relative = _of_p(block, d_predicted, d_true_positives, column_block, BLOCK) - of_highest
            p = exp_quick(block.x - shift) * factor
            d = weight * p * (relative - dot * factor)
            tl.store(d_logits + block.contiguous, d.to(d_logits.dtype.element_ty), mask=rows.exist & block.inside)


# ---------------------------------------------------------------- operations


class Shape(NamedTuple):
    """How logits are cut."""

    sizes: tuple[int, int, int, int]  # Steps
    options: dict[str, Any]
    tiles: int
    column_blocks: int


def column_sums(
    logits: Tensor, target: Tensor, sample_weight: Tensor | None, ignore_index: int, from_softmax: bool
) -> tuple[Tensor, ...]:
    """Return the sums of p, of y p and of y, each (C,)."""
    tensors, list_length = _tensors(logits, target, sample_weight)
    dtype = accumulate_dtype(logits.dtype)
    num_classes = logits.shape[1]
    if logits.numel() == 0:
        return tuple(logits.new_zeros((num_classes,), dtype=dtype) for _ in range(3))
    shape = _shape_of(logits)
    programs = PROGRAMS * device_of(logits.device).processors
    tiles_of_part = min(MOST_TILES, triton.cdiv(shape.tiles * shape.column_blocks, programs))
    parts = logits.new_empty((triton.cdiv(shape.tiles, tiles_of_part), 3, num_classes), dtype=dtype)
    grid = (parts.shape[0], shape.column_blocks)
    with on(logits):
        if from_softmax:
            softmax = logits.new_empty((num_rows_of(logits), 2), dtype=dtype)
            _launch_softmax(tensors, softmax, None, None, None, ignore_index, list_length)
            tensors = tensors._replace(softmax=softmax)
        _sums[grid](
            tensors, parts, *shape.sizes, ignore_index, list_length, shape.tiles, tiles_of_part, **shape.options
        )
    sums = parts.sum(dim=0, dtype=torch.float64).to(dtype)
    return tuple(vector.clone() for vector in sums)  # no views of one another: torch asks for that


def column_sums_backward(
    logits: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    ignore_index: int,
    from_softmax: bool,
    d_predicted: Tensor,  # (C,)
    d_true_positives: Tensor,  # (C,)
) -> Tensor:
    """Return the gradient of the logits, contiguous."""
    tensors, list_length = _tensors(logits, target, sample_weight)
    d_logits = logits.new_empty(logits.shape)
    if logits.numel() == 0:
        return d_logits
    num_classes = logits.shape[1]
    upstream = (
        vector_of("d_predicted", d_predicted, num_classes, logits),
        vector_of("d_true_positives", d_true_positives, num_classes, logits),
    )
    with on(logits):
        if from_softmax:
            _launch_softmax(tensors, None, *upstream, d_logits, ignore_index, list_length)
        else:
            shape = _shape_of(logits)
            grid = (shape.tiles, shape.column_blocks)
            _gradient[grid](tensors, *upstream, d_logits, *shape.sizes, ignore_index, list_length, **shape.options)
    return d_logits


def _launch_softmax(
    tensors: Logits,
    softmax: Tensor | None,  # (N, 2), to be written; or the next three
    d_predicted: Tensor | None,  # (C,)
    d_true_positives: Tensor | None,  # (C,)
    d_logits: Tensor | None,  # the logits' shape, to be written
    ignore_index: int,
    list_length: int,
) -> None:
    """Launch the program that sweeps whole rows: a tile is as wide as a row, up to TILE."""
    shape = _shape_of(tensors.logits, widest=TILE)
    _softmax[(shape.tiles,)](
        tensors,
        softmax,
        d_predicted,
        d_true_positives,
        d_logits,
        *shape.sizes,
        ignore_index,
        list_length,
        **shape.options,
        num_warps=SOFTMAX_WARPS,
    )


def _tensors(logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> tuple[Logits, int]:
    """Return what the kernels read, and the lists' length.

    Raises:
        ValueError: logits are neither rows (N, C) nor images (B, C, P), or another shape does not fit.
        TypeError: a dtype that the kernels do not take.
    """
    if logits.dim() not in (2, 3) or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise ValueError("logits must be (N, C) rows or (B, C, P) images with a last dimension of stride 1")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"input has dtype {logits.dtype}, which the kernels do not take")
    num_rows = num_rows_of(logits)
    labels = labels_of(logits, target, num_rows)
    list_length = 0 if labels.lists is None else labels.lists.shape[1]
    weight = vector_of("sample_weight", sample_weight, num_rows, logits)
    return Logits(logits, labels, weight, softmax=None), list_length


def _shape_of(logits: Tensor, widest: int = WIDEST) -> Shape:
    """Return how logits are cut; integers in units that divide all widths, so that loads can be as wide."""
    is_image = logits.dim() == 3
    num_classes = logits.shape[1]
    tile = TILE // 2 if logits.dtype == torch.float64 else TILE
    if is_image:
        images, _, pixels = logits.shape
        widths = [pixels, logits.stride(0), logits.stride(1)]
        block = min(WIDEST_OF_IMAGES, triton.next_power_of_2(num_classes))
        rows = min(tile // block, triton.next_power_of_2(pixels))
    else:
        images, pixels = 1, logits.shape[0]
        widths = [num_classes, logits.stride(0)]
        block = min(widest, tile, max(2, triton.next_power_of_2(num_classes)))
        rows = tile // block
    unit = math.gcd(*widths, UNITS)
    if unit * logits.element_size() % VECTOR_BYTES != 0:
        unit = 1
    image_stride = logits.stride(0) // unit if is_image else 0
    stride = logits.stride(1 if is_image else 0) // unit
    sizes = (
        pixels // unit if is_image else pixels,
        num_classes if is_image else num_classes // unit,
        image_stride,
        stride,
    )
    options = {"IS_IMAGE": is_image, "UNIT": unit, "ROWS": rows, "BLOCK": block}
    return Shape(sizes, options, images * triton.cdiv(pixels, rows), triton.cdiv(num_classes, block))
