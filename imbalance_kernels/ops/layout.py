"""How kernels see logits: as rows (N, C), or as images with channels first (B, C, P), whichever needs no copy.

All is decided by sizes and strides, which a compiled graph knows, and never by addresses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["are_planes", "are_rows", "as_planes", "as_rows", "has_memory_of_its_own"]


def as_rows(x: Tensor, class_dim: int) -> Tensor:
    """Return x as (N, C); class_dim is from 0."""
    classes_last = x.movedim(class_dim, -1)
    return classes_last.reshape(math.prod(classes_last.shape[:-1]), x.shape[class_dim])


def as_planes(x: Tensor, class_dim: int) -> Tensor:
    """Return x as (B, C, P); class_dim is from 0."""
    images, pixels = math.prod(x.shape[:class_dim]), math.prod(x.shape[class_dim + 1 :])
    if pixels == 1:  # as one image, of as many pixels
        return x.movedim(class_dim, 0).reshape(1, x.shape[class_dim], images)
    return x.reshape(images, x.shape[class_dim], pixels)


def are_rows(classes_last: Tensor) -> bool:
    """Return whether (..., C) is seen as (N, C) with a last stride of 1 without a copy."""
    *rows, (num_classes, stride) = zip(classes_last.shape, classes_last.stride(), strict=True)
    return classes_last.numel() == 0 or ((num_classes == 1 or stride == 1) and _flatten(rows))


def are_planes(input: Tensor, class_dim: int) -> bool:
    """Return whether (..., C, ...) is seen as (B, C, P) with a last stride of 1 without a copy."""
    dimensions = list(zip(input.shape, input.stride(), strict=True))
    images, pixels = dimensions[:class_dim], dimensions[class_dim + 1 :]
    if all(size == 1 for size, _ in pixels):
        images, pixels = [], images
    last = next((stride for size, stride in reversed(pixels) if size != 1), 1)
    return last == 1 and _flatten(images) and _flatten(pixels)


def _flatten(dimensions: Sequence[tuple[int, int]]) -> bool:
    """Return whether dimensions (size, stride) are seen as one without a copy: graphs have no addresses."""
    dimensions = [dimension for dimension in dimensions if dimension[0] != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in itertools.pairwise(dimensions))


def has_memory_of_its_own(logits: Tensor) -> bool:
    """Return whether each element of rows, or of channels-first logits, has an address of its own."""
    dimensions = list(zip(logits.shape, logits.stride(), strict=True))
    if logits.dim() == 2:
        return _nest(dimensions[::-1])
    images, classes, pixels = dimensions
    return _nest((pixels, classes, images)) or _nest((pixels, images, classes))


def _nest(dimensions: Sequence[tuple[int, int]]) -> bool:
    """Return whether each dimension (size, stride) steps over all that the dimensions before it span."""
    span = 1
    for size, stride in dimensions:
        if size > 1:
            if stride < span:
                return False
            span += stride * (size - 1)
    return True
