"""softmax_loss of channels-first logits (B, C, P) in Triton: images of P pixels, a class's logits being neighbours.

Row b * P + p is pixel p of image b. A program takes some neighbouring pixels of one image as a block (ROWS, BLOCK) of
rows.py, whose first axis is the one along memory: neighbouring threads have neighbouring pixels, and nothing is
permuted. Only few threads, whose number depends on C alone, share a pixel's classes: a pixel's bits depend on its own
values.

- Where a program holds all classes (`_planes`), the logits are read once and their gradient is written once.
- Elsewhere (`_long_planes`) they are read twice, block by block, the second time backwards, so that this begins with
  what the cache still holds; so few programs run that their pixels stay in the cache together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from imbalance_kernels.triton_kernels.launch import long_plane_programs, long_plane_tile, num_plane_tiles, plane_tile
from imbalance_kernels.triton_kernels.math import exp_quick
from imbalance_kernels.triton_kernels.rows import (
    Reduction,
    Rows,
    Sizes,
    advance,
    block_of,
    join,
    losses_and_gradients,
    place_of,
    shift_of,
    spread,
    start,
    sweep_rows,
    target_of,
    widened,
)

__all__ = ["Pixels", "launch_planes", "pixels_of"]

# Integers that no kernel is compiled anew for.
SIZES = ["images", "classes", "pixels", "stride", "class_stride", "ignore_index", "d_stride", "d_class_stride"]


class Pixels(NamedTuple):
    """Some pixels of an image."""

    image: Any
    index: Any  # (ROWS,) in the image, int64
    exist: Any  # (ROWS,)


@triton.jit
def pixels_of(tile, pixels, ROWS: tl.constexpr):
    """Return the Pixels of a tile."""
    tiles = tl.cdiv(pixels, ROWS)  # of an image
    tile = tl.cast(tile, tl.int64)
    index = (tile % tiles) * ROWS + tl.arange(0, ROWS)
    return Pixels(tile // tiles, index, index < pixels)


@triton.jit
def _place_of(part, pixels, sizes, labels, normalizer):
    """Return the Place of Pixels `part`."""
    rows = tl.where(part.exist, part.image * pixels + part.index, sizes.num_rows)
    return place_of(rows, labels, sizes, normalizer)


@triton.jit
def _target_of(rows, part, place, stride, class_stride):
    """Return the Target of Pixels `part`."""
    at = part.image * stride + part.index + place.target * class_stride
    return target_of(rows, at, place, place.is_read)


@triton.jit
def _load(first, rows, part, place, classes, pixels, stride, class_stride, BLOCK: tl.constexpr, EVICTION: tl.constexpr):
    """Load classes from `first` on of Pixels `part`, as a block (ROWS, BLOCK)."""
    columns = first + tl.arange(0, BLOCK)
    inside = columns < classes
    reads = place.is_read[:, None] & inside[None, :]
    at = part.image * stride + part.index[:, None] + (columns * class_stride)[None, :]
    x = widened(tl.load(rows.logits + at, mask=reads, other=-float("inf"), eviction_policy=EVICTION))
    at = part.image * classes * pixels + part.index[:, None] + (columns * pixels)[None, :]
    is_target = columns[None, :] == place.target[:, None]
    return block_of(x, columns, inside, is_target, reads, rows, at)


@triton.jit
def _store(d_logits, d, block, part, stride, class_stride):
    """Store the gradient of a block."""
    at = part.image * stride + part.index[:, None] + (block.columns * class_stride)[None, :]
    mask = part.exist[:, None] & block.inside[None, :]
    tl.store(d_logits + at, d.to(d_logits.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=SIZES)
def _planes(
    rows,  # logits (B, C, P) and how to split them
    d_logits,  # (B, C, P), may be the logits themselves; None for the losses alone
    losses,  # (N,), or their sums, one per program; None for the gradient alone
    reduction,
    images,
    classes,
    pixels,
    stride,
    class_stride,
    ignore_index,
    d_stride,
    d_class_stride,
    objective: tl.constexpr,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixels = pixels.to(tl.int64)
    stride = stride.to(tl.int64)
    class_stride = class_stride.to(tl.int64)
    sizes = Sizes(images * pixels, classes, stride, ignore_index)
    part = pixels_of(tl.program_id(0), pixels, ROWS)
    place = _place_of(part, pixels, sizes, rows.labels, reduction.normalizer)
    target = _target_of(rows, part, place, stride, class_stride)  # before any barrier: in place it is overwritten
    block = _load(0, rows, part, place, classes, pixels, stride, class_stride, BLOCK, "evict_first")
    exponentials, split = sweep_rows(block, target, rows.labels)
    loss, gradient = losses_and_gradients(split, target, rows, place, reduction, objective)
    if d_logits is not None:
        tl.debug_barrier()  # pixels that are not reduced across warps have met none
        d_target = gradient.target[:, None]
        d = spread(exponentials, block, rows, gradient.rest[:, None], gradient.weights[:, None], d_target)
        _store(d_logits, d, block, part, d_stride.to(tl.int64), d_class_stride.to(tl.int64))
    if losses is not None:  # after the gradient, whose registers are free by now
        if SUMMED:
            tl.store(losses + tl.program_id(0), tl.sum(tl.where(place.exists, loss, 0.0), 0))
        else:
            tl.store(losses + place.rows, loss, mask=place.exists)


@triton.jit(do_not_specialize=SIZES)
def _long_planes(
    rows,  # logits (B, C, P) and how to split them
    d_logits,  # (B, C, P), may be the logits themselves; None for the losses alone
    losses,  # (N,), or their sums, one per tile; None for the gradient alone
    reduction,
    images,
    classes,
    pixels,
    stride,
    class_stride,
    ignore_index,
    d_stride,
    d_class_stride,
    objective: tl.constexpr,
    SUMMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = tl.float64 if rows.logits.dtype.element_ty == tl.float64 else tl.float32
    pixels = pixels.to(tl.int64)
    stride = stride.to(tl.int64)
    class_stride = class_stride.to(tl.int64)
    sizes = Sizes(images * pixels, classes, stride, ignore_index)
    blocks = tl.cdiv(classes, BLOCK)
    for tile in range(tl.program_id(0), images * tl.cdiv(pixels, ROWS), tl.num_programs(0)):
        part = pixels_of(tile, pixels, ROWS)
        place = _place_of(part, pixels, sizes, rows.labels, reduction.normalizer)
        target = _target_of(rows, part, place, stride, class_stride)
        highest, total, weighted_logits, weight_sum = start(ROWS, dtype)
        for first in range(0, classes, BLOCK):
            block = _load(first, rows, part, place, classes, pixels, stride, class_stride, BLOCK, "evict_last")
            highest, total, weighted_logits, weight_sum = advance(
                block, highest, total, weighted_logits, weight_sum, rows.labels
            )
        split = join(target, total, shift_of(highest), weighted_logits, weight_sum)
        loss, gradient = losses_and_gradients(split, target, rows, place, reduction, objective)
        if losses is not None:
            if SUMMED:
                tl.store(losses + tile, tl.sum(tl.where(place.exists, loss, 0.0), 0))
            else:
                tl.store(losses + place.rows, loss, mask=place.exists)
        if d_logits is not None:
            tl.debug_barrier()
            for swept in range(0, blocks):
                first = (blocks - 1 - swept) * BLOCK
                block = _load(first, rows, part, place, classes, pixels, stride, class_stride, BLOCK, "evict_first")
                exponentials = exp_quick(block.z - split.shift[:, None])
                d_target = gradient.target[:, None]
                d = spread(exponentials, block, rows, gradient.rest[:, None], gradient.weights[:, None], d_target)
                _store(d_logits, d, block, part, d_stride.to(tl.int64), d_class_stride.to(tl.int64))


def launch_planes(
    rows: Rows,
    d_logits: Tensor | None,  # (B, C, P)
    losses: Tensor | None,  # (N,), or their sums, one per tile
    reduction: Reduction,
    ignore_index: int,
    objective: Any,
    summed: bool,
) -> None:
    """Launch the kernel that serves channels-first logits (B, C, P)."""
    logits: Tensor = rows.logits
    d_strides = (0, 0) if d_logits is None else d_logits.stride()[:2]
    sizes = (*logits.shape, *logits.stride()[:2], ignore_index, *d_strides)
    everything = (rows, d_logits, losses, reduction, *sizes)
    launch = {"objective": objective, "SUMMED": summed}
    tile, tiles = plane_tile(logits), num_plane_tiles(logits)
    if tile is not None:
        _planes[(tiles,)](*everything, **launch, **tile.options())
    else:
        tile = long_plane_tile(logits)
        programs = tiles if d_logits is None else long_plane_programs(logits, tiles, tile)
        _long_planes[(programs,)](*everything, **launch, **tile.options())
