"""column_sums in Triton: sums over rows of p = sigmoid(x), of y p and of y, class by class, and their gradient.

The operations of csrc/bindings.cpp with their names and arguments. A program takes one block of classes over a stretch
of rows, a tile at a time, and writes a part of the sums; the parts are added up in float64, in their order, without
atomics. Rows (N, C) and images (B, C, P) differ in their steps alone: a tile's rows are rows, or pixels of one image.
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
from imbalance_kernels.triton_kernels.launch import device_of, on, vector_of
from imbalance_kernels.triton_kernels.math import exp_quick
from imbalance_kernels.triton_kernels.rows import widened

__all__ = ["column_sums", "column_sums_backward"]

TILE = 2048  # logits
WIDEST = 128  # classes of a tile of rows; of pixels there are more, and of classes fewer
WIDEST_OF_IMAGES = 8
MOST_TILES = 64  # of a program: each number sums so many in float32
PROGRAMS = 8  # of a processor
UNITS = 16
VECTOR_BYTES = 16
SIZES = ["pixels", "classes", "image_stride", "stride", "ignore_index", "list_length", "tiles", "tiles_of_part"]


class Logits(NamedTuple):
    """Logits and what lies beside them."""

    logits: Any  # (N, C) or (B, C, P)
    labels: Labels
    sample_weight: Any  # (N,) or None


class Block(NamedTuple):
    """A tile of logits (ROWS, BLOCK)."""

    p: Any
    n: Any  # 1 - p
    y: Any
    weight: Any  # (ROWS, 1); 0 of rows that do not count
    poison: Any  # (ROWS, 1); NaN of rows whose label is wrong, else 0
    contiguous: Any  # places in contiguous memory
    exists: Any


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
def _load(
    tensors,
    tile,
    column_block,
    steps,
    ignore_index,
    list_length,
    IS_IMAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the Block of a tile."""
    dtype: tl.constexpr = tl.float64 if tensors.logits.dtype.element_ty == tl.float64 else tl.float32
    tiles_of_image = tl.cdiv(steps.pixels, ROWS)
    image = (tile // tiles_of_image).to(tl.int64)
    at = (tile % tiles_of_image).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = at < steps.pixels
    index = image * steps.pixels + at
    counted = counted_rows(index, exists, steps.classes, ignore_index, tensors.labels, tensors.sample_weight, dtype)
    columns = column_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = columns < steps.classes
    index = index[:, None]
    at = at[:, None]
    is_read = counted.is_read[:, None]
    if IS_IMAGE:
        wide = columns.to(tl.int64)
        place = image * steps.image_stride + wide * steps.stride + at
        contiguous = image * steps.classes * steps.pixels + wide * steps.pixels + at
    else:
        place = at * steps.stride + columns
        contiguous = at * steps.classes + columns
    exists = exists[:, None] & inside  # not what is read: of pixels that would keep loads from being vectors
    x = tl.load(tensors.logits + place, mask=exists, other=0.0, eviction_policy="evict_first")
    x = tl.where(is_read, widened(x), 0.0)
    label = counted.label[:, None]
    y = load_labels(tensors.labels, index, columns, contiguous, label, is_read, inside, ignore_index, list_length).to(
        dtype
    )
    small = exp_quick(-tl.abs(x))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    weight = tl.where(counted.is_read, counted.weight, 0.0)[:, None]
    poison = tl.where(counted.outside, float("nan"), 0.0).to(dtype)[:, None]
    p = tl.where(x > 0, larger, smaller)
    n = tl.where(x > 0, smaller, larger)
    return Block(p, n, y, weight, poison, contiguous, exists)


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
        block = _load(tensors, tile, column_block, steps, ignore_index, list_length, IS_IMAGE, ROWS, BLOCK)
        predicted += block.weight * block.p + block.poison
        true_positives += tl.where(block.y == 0, 0.0, block.weight * (block.y * block.p)) + block.poison
        positives += block.weight * block.y
    columns = column_block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < steps.classes
    to = parts + part * 3 * steps.classes + columns
    tl.store(to, tl.sum(predicted, 0), mask=inside)
    tl.store(to + steps.classes, tl.sum(true_positives, 0), mask=inside)
    tl.store(to + 2 * steps.classes, tl.sum(positives, 0), mask=inside)


@triton.jit(do_not_specialize=SIZES[:-2])
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
    tile = tl.program_id(0)
    block = _load(tensors, tile, column_block, steps, ignore_index, list_length, IS_IMAGE, ROWS, BLOCK)
    columns = column_block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < steps.classes
    of_predicted = tl.load(d_predicted + columns, mask=inside, other=0.0)[None, :]
    of_true_positives = tl.load(d_true_positives + columns, mask=inside, other=0.0)[None, :]
    d = block.weight * (block.p * block.n) * (of_predicted + block.y * of_true_positives) + block.poison
    tl.store(d_logits + block.contiguous, d.to(d_logits.dtype.element_ty), mask=block.exists)


# ---------------------------------------------------------------- operations


class Shape(NamedTuple):
    """How logits are cut."""

    sizes: tuple[int, int, int, int]  # Steps
    options: dict[str, Any]
    tiles: int
    column_blocks: int


def column_sums(logits: Tensor, target: Tensor, sample_weight: Tensor | None, ignore_index: int) -> tuple[Tensor, ...]:
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
    d_predicted: Tensor,  # (C,)
    d_true_positives: Tensor,  # (C,)
) -> Tensor:
    """Return the gradient of the logits, contiguous."""
    tensors, list_length = _tensors(logits, target, sample_weight)
    d_logits = logits.new_empty(logits.shape)
    if logits.numel() == 0:
        return d_logits
    num_classes = logits.shape[1]
    of_predicted = vector_of("d_predicted", d_predicted, num_classes, logits)
    of_true_positives = vector_of("d_true_positives", d_true_positives, num_classes, logits)
    shape = _shape_of(logits)
    grid = (shape.tiles, shape.column_blocks)
    with on(logits):
        _gradient[grid](
            tensors, of_predicted, of_true_positives, d_logits, *shape.sizes, ignore_index, list_length, **shape.options
        )
    return d_logits


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
    num_rows = logits.shape[0] * math.prod(logits.shape[2:])
    labels = labels_of(logits, target, num_rows)
    list_length = 0 if labels.lists is None else labels.lists.shape[1]
    return Logits(logits, labels, vector_of("sample_weight", sample_weight, num_rows, logits)), list_length


def _shape_of(logits: Tensor) -> Shape:
    """Return how logits are cut; integers in units that divide all widths, so that loads can be as wide."""
    is_image = logits.dim() == 3
    num_classes = logits.shape[1]
    if is_image:
        images, _, pixels = logits.shape
        widths = [pixels, logits.stride(0), logits.stride(1)]
        block = min(WIDEST_OF_IMAGES, triton.next_power_of_2(num_classes))
        rows = min(TILE // block, triton.next_power_of_2(pixels))
    else:
        images, pixels = 1, logits.shape[0]
        widths = [num_classes, logits.stride(0)]
        block = min(WIDEST, max(2, triton.next_power_of_2(num_classes)))
        rows = TILE // block
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
