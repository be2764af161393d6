"""sigmoid_loss in Triton: value and gradient of any sigmoid-family loss, logit by logit, in one trip.

The operations of csrc/bindings.cpp with their names and arguments. Class labels and lists of classes never become
one-hot, channels-first images are read as they lie, nothing of the logits' size but the gradient (and the losses of
"none") is allocated, and nothing waits for the device. A program takes a tile, in one of three layouts:

- "flat": so many logits of rows that lie side by side, whatever their width: a row of one class wastes no lane, nor
  does one of 80. A vector of logits finds its row by a multiplication, or each logit does where rows cut vectors.
- "rows": pieces of wide rows, or of rows that are strided.
- "images": some pixels of some classes; the labels of a pixel serve all of these.

A label that is no class, nor the background, nor ignored makes its row NaN, an entry of a list too, and stays out of
the mean's divisor. Labels that are soft are found tile by tile: a tile without them takes the shorter way, and a hard
label's bits are the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imbalance_kernels.options import LOGIT_DTYPES, accumulate_dtype
from imbalance_kernels.triton_kernels.binary_objectives import BINARY_OBJECTIVES, EXPONENTS, Numbers, share_of
from imbalance_kernels.triton_kernels.launch import (
    UNITS,
    VECTOR_BYTES,
    Device,
    device_of,
    forms_of,
    num_rows_of,
    number,
    on,
    vector_of,
)
from imbalance_kernels.triton_kernels.objectives import truth_of
from imbalance_kernels.triton_kernels.rows import Reduction, widened
from imbalance_kernels.triton_kernels.softmax_loss import SMALL_BLOCK, _sum

__all__ = ["sigmoid_loss", "sigmoid_loss_", "sigmoid_loss_backward", "sigmoid_loss_backward_"]

TILE = 2048  # logits of a program
THREADS = 256  # of it: 8 logits a thread, a vector of halves
FLAT_CLASSES = 4 * TILE  # at most; pieces of wider rows waste less than a quarter of their lanes
MOST_HALVES = 16  # exponents up to 8 are products
WASTED = 4 / 3  # at most, lanes of a tile of classes over classes
QUOTIENT_BITS = tl.constexpr(30)  # exact for flat tiles: (TILE + FLAT_CLASSES) * FLAT_CLASSES < 2^30

SIZES = [  # integers that no kernel is compiled anew for
    "images",
    "classes",
    "pixels",
    "image_stride",
    "class_stride",
    "gradient_image_stride",
    "gradient_class_stride",
    "list_length",
    "ignore_index",
    "reciprocal",
]


class BinaryLabels(NamedTuple):
    """One of them is there."""

    classes: Any  # (N,) int64 in [0, C], C is the background
    lists: Any  # (N, K) int64 in [0, C), padded with ignore_index
    dense: Any  # the logits' shape, contiguous; bool as uint8


class ClassVectors(NamedTuple):
    """(C,) or None."""

    positive_weight: Any
    negative_weight: Any
    bias: Any
    parameter: Any  # the objective's first


class Weights(NamedTuple):
    """Numbers where there is no class vector; None is one."""

    positive: Any
    negative: Any


class Factors(NamedTuple):
    """What multiplies losses and gradients; what is None takes no part."""

    sample_weight: Any  # (N,), or the logits' shape
    of_logits: Any  # compile-time: the latter
    upstream: Any  # the gradient of the result, of the logits' shape or ()
    upstream_of_logits: Any  # compile-time: the former
    normalizer: Any  # (): given; where it is 0, so is everything
    divisor: Any  # (): of the mean
    inverse: Any  # number: of the mean over all logits


class Tile(NamedTuple):
    """Where a program's logits are. Rows and columns broadcast to the tile."""

    first_row: Any  # int64
    rows: Any  # relative to the first, int32
    columns: Any  # classes
    row_exists: Any
    class_exists: Any
    inside: Any  # of the tile's shape
    first: Any  # of what is contiguous in the logits' shape, int64
    within: Any  # relative to that
    logits_first: Any
    logits_within: Any
    gradient_first: Any
    gradient_within: Any


@triton.jit
def _flat_tile(num_rows, classes, reciprocal, UNIT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A tile of contiguous rows (LANES, VECTOR), each vector in or out; reciprocal is 2^30 / classes, rounded up.

    Classes are in units: of a vector where it divides them, so that each lies in one row, or of one.
    """
    first = tl.program_id(0).to(tl.int64) * (LANES * VECTOR)
    classes_of_row = classes * UNIT
    first_row = first // classes_of_row
    lanes = tl.arange(0, LANES)[:, None]
    of_lane = tl.arange(0, VECTOR)[None, :]
    within = lanes * VECTOR + of_lane
    inside = first // VECTOR + lanes < num_rows.to(tl.int64) * classes_of_row // VECTOR
    beyond = (first - first_row * classes_of_row).to(tl.int32)  # the first row's beginning
    if UNIT > 1:
        units = beyond // UNIT + lanes
        rows = tl.umulhi(units << (32 - QUOTIENT_BITS), reciprocal)
        columns = (units - rows * classes) * UNIT + of_lane
    else:
        units = beyond + within
        rows = tl.umulhi(units << (32 - QUOTIENT_BITS), reciprocal)
        columns = units - rows * classes
    return Tile(first_row, rows, columns, inside, inside, inside, first, within, first, within, first, within)


@triton.jit
def _row_tile(num_rows, classes, stride, gradient_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of rows (ROWS, COLUMNS)."""
    blocks = tl.cdiv(classes, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    first_row = (program // blocks) * ROWS
    first_column = (program % blocks) * COLUMNS
    rows = tl.arange(0, ROWS)[:, None]
    from_first = tl.arange(0, COLUMNS)[None, :]
    columns = first_column.to(tl.int32) + from_first
    row_exists = first_row + rows < num_rows
    class_exists = columns < classes
    far = rows.to(tl.int64)
    return Tile(
        first_row,
        rows,
        columns,
        row_exists,
        class_exists,
        row_exists & class_exists,
        first_row * classes + first_column,
        far * classes + from_first,
        first_row * stride + first_column,
        far * stride + from_first,
        first_row * gradient_stride + first_column,
        far * gradient_stride + from_first,
    )


@triton.jit
def _image_tile(
    classes,
    pixels,
    image_stride,
    class_stride,
    gradient_image_stride,
    gradient_class_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of one image (COLUMNS, ROWS): its pixels are rows. Classes go first: labels stay in the cache."""
    class_blocks = tl.cdiv(classes, COLUMNS)
    pixel_blocks = tl.cdiv(pixels, ROWS)
    program = tl.program_id(0).to(tl.int64)
    first_class = (program % class_blocks) * COLUMNS
    program = program // class_blocks
    first_pixel = (program % pixel_blocks) * ROWS
    image = program // pixel_blocks
    rows = tl.arange(0, ROWS)[None, :]
    from_first = tl.arange(0, COLUMNS)[:, None]
    columns = first_class.to(tl.int32) + from_first
    row_exists = first_pixel + rows < pixels
    class_exists = columns < classes
    far = from_first.to(tl.int64)
    return Tile(
        image * pixels + first_pixel,
        rows,
        columns,
        row_exists,
        class_exists,
        row_exists & class_exists,
        (image * classes + first_class) * pixels + first_pixel,
        far * pixels + rows,
        image * image_stride + first_class * class_stride + first_pixel,
        far * class_stride + rows,
        image * gradient_image_stride + first_class * gradient_class_stride + first_pixel,
        far * gradient_class_stride + rows,
    )


@triton.jit
def _is_positive(labels, tile, classes, list_length, ignore_index):
    """Return which logits' classes a row names, which rows are ignored, and which name what is no class."""
    if labels.classes is not None:
        label = tl.load(labels.classes + tile.first_row + tile.rows, mask=tile.row_exists, other=0)
        ignored = label == ignore_index
        outside = (label < 0) | (label > classes)
        # Of 32 bits from here on: it is compared with every class.
        positive = tl.where(ignored | outside, -1, label).to(tl.int32) == tile.columns
    else:
        positive = tile.rows + tile.columns < 0  # none
        outside = positive
        ignored = positive
        at = labels.lists + tile.first_row * list_length + tile.rows.to(tl.int64) * list_length
        for entry in range(0, list_length):
            label = tl.load(at + entry, mask=tile.row_exists, other=ignore_index)
            padding = label == ignore_index
            positive = positive | ((label == tile.columns) & (padding == 0))
            outside = outside | (((label < 0) | (label >= classes)) & (padding == 0))
    return positive, ignored, outside


@triton.jit
def _class_weight(x, vector, constant, tile):
    """Return a class vector of the tile's classes, or a number, or one."""
    if vector is not None:
        weight = tl.load(vector + tile.columns, mask=tile.class_exists, other=0.0)
    elif constant is not None:
        weight = tl.zeros_like(x) + constant
    else:
        weight = tl.zeros_like(x) + 1.0
    return weight


@triton.jit
def _hard_labels(x, positive, first, numbers, objective: tl.constexpr, hard: tl.constexpr):
    """Return value and slope in x where labels are 0 or 1, unweighted."""
    value, slope = hard(truth_of(tl.where(positive, x, -x)), positive, first, numbers, objective)
    return value, tl.where(positive, slope, -slope)


@triton.jit
def _soft_labels(x, y, positive_weight, negative_weight, first, numbers, objective: tl.constexpr, soft: tl.constexpr):
    """Return value and slope in x where labels are between, weighted."""
    value, slope, negative_value, negative_slope = soft(truth_of(x), y, first, numbers, objective)
    positive = y * positive_weight
    negative = (1.0 - y) * negative_weight
    return (
        share_of(positive, value) + share_of(negative, negative_value),
        share_of(positive, slope) + share_of(negative, negative_slope),
    )


@triton.jit(do_not_specialize=SIZES)
def _tiles(
    logits,  # rows (N, C), or images (B, C, P) with N = B * P
    d_logits,  # the same shape, may be the logits themselves; None for the losses alone
    losses,  # the logits' shape, contiguous, or their sums, one per program; None for the gradient alone
    labels,
    vectors,
    weights,
    numbers,
    factors,
    images,  # B, or N of rows
    classes,
    pixels,  # P
    image_stride,  # of rows too
    class_stride,
    gradient_image_stride,
    gradient_class_stride,
    list_length,
    ignore_index,
    reciprocal,
    objective: tl.constexpr,
    hard: tl.constexpr,
    soft: tl.constexpr,
    LAYOUT: tl.constexpr,
    SUMMED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image_stride = image_stride.to(tl.int64) * UNIT
    gradient_image_stride = gradient_image_stride.to(tl.int64) * UNIT
    if LAYOUT == "flat":
        tile = _flat_tile(images, classes, reciprocal, UNIT, ROWS, COLUMNS)
        classes = classes * UNIT
    elif LAYOUT == "rows":
        classes = classes * UNIT
        tile = _row_tile(images, classes, image_stride, gradient_image_stride, ROWS, COLUMNS)
    else:
        class_stride = class_stride.to(tl.int64) * UNIT
        gradient_class_stride = gradient_class_stride.to(tl.int64) * UNIT
        strides = (image_stride, class_stride, gradient_image_stride, gradient_class_stride)
        tile = _image_tile(classes, pixels.to(tl.int64) * UNIT, *strides, ROWS, COLUMNS)

    reads = tile.inside
    if factors.normalizer is not None:
        # A comparison, because the interpreter of 3.9 mistakes the "and" with one bool for a number.
        reads = reads.to(tl.int32) > tl.where(tl.load(factors.normalizer) == 0, 1, 0)
    at = logits + tile.logits_first
    x = widened(tl.load(at + tile.logits_within, mask=reads, other=0.0, eviction_policy="evict_first"))
    if vectors.bias is not None:
        x = x + tl.load(vectors.bias + tile.columns, mask=tile.class_exists, other=0.0)
    outside = reads == 2  # none
    counts = reads
    if labels.dense is None:
        positive, ignored, outside = _is_positive(labels, tile, classes, list_length, ignore_index)
        counts = counts & (ignored == 0)
    else:
        y = tl.load(labels.dense + tile.first + tile.within, mask=reads, other=0, eviction_policy="evict_first")
        positive = y == 1

    weighs: tl.constexpr = (
        vectors.positive_weight is not None
        or vectors.negative_weight is not None
        or weights.positive is not None
        or weights.negative is not None
    )
    # A number is never assigned to a name: that would make a float32 of a constant meant for float64.
    if vectors.parameter is None:
        value, slope = _hard_labels(x, positive, numbers.first, numbers, objective, hard)
    else:
        parameter = tl.load(vectors.parameter + tile.columns, mask=tile.class_exists, other=0.0)
        value, slope = _hard_labels(x, positive, parameter, numbers, objective, hard)
    positive_weight = _class_weight(x, vectors.positive_weight, weights.positive, tile)
    negative_weight = _class_weight(x, vectors.negative_weight, weights.negative, tile)
    if weighs:
        weight = tl.where(positive, positive_weight, negative_weight)
        value = share_of(weight, value)
        slope = share_of(weight, slope)
    if labels.dense is not None:
        if labels.dense.dtype.element_ty != tl.uint8:
            y = widened(y).to(x.dtype)
            is_soft = (y != 0) & (y != 1)
            if tl.max(is_soft.to(tl.int32)) != 0:
                both = (positive_weight, negative_weight)
                if vectors.parameter is None:
                    soft_value, soft_slope = _soft_labels(x, y, *both, numbers.first, numbers, objective, soft)
                else:
                    soft_value, soft_slope = _soft_labels(x, y, *both, parameter, numbers, objective, soft)
                value = tl.where(is_soft, soft_value, value)
                slope = tl.where(is_soft, soft_slope, slope)

    if factors.sample_weight is not None:
        if factors.of_logits:
            weight = tl.load(factors.sample_weight + tile.first + tile.within, mask=reads, other=0.0)
        else:
            weight = tl.load(factors.sample_weight + tile.first_row + tile.rows, mask=tile.row_exists, other=0.0)
        counts = counts & (weight != 0)
        value = value * weight
        slope = slope * weight
    value = tl.where(counts, tl.where(outside, float("nan"), value), 0.0)
    if d_logits is not None:
        if factors.upstream is not None:
            if factors.upstream_of_logits:
                slope = slope * tl.load(factors.upstream + tile.first + tile.within, mask=reads, other=0.0)
            else:
                slope = slope * tl.load(factors.upstream)
        if factors.normalizer is not None:
            slope = slope * (1.0 / tl.load(factors.normalizer))
        elif factors.divisor is not None:
            slope = slope * (1.0 / tl.load(factors.divisor))
        elif factors.inverse is not None:
            slope = slope * factors.inverse
        slope = tl.where(counts, tl.where(outside, float("nan"), slope), 0.0)
        at = d_logits + tile.gradient_first
        tl.store(at + tile.gradient_within, slope.to(d_logits.dtype.element_ty), mask=tile.inside)
    if losses is not None:
        if SUMMED:
            total = tl.sum(value)
            if factors.inverse is not None:
                total = total * factors.inverse
            tl.store(losses + tl.program_id(0), total)
        else:
            tl.store(losses + tile.first + tile.within, value, mask=tile.inside)


@triton.jit(do_not_specialize=["num_rows", "classes", "ignore_index"])
def _valid_logits(
    sums,  # one per program
    labels,  # (N,)
    num_rows,
    classes,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Count the logits of rows whose label is a class or the background."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + at, mask=at < num_rows, other=-1)
    valid = (label >= 0) & (label <= classes) & (label != ignore_index) & (at < num_rows)
    count = tl.sum(valid.to(tl.int32), 0).to(sums.dtype.element_ty)
    tl.store(sums + tl.program_id(0), count * classes)


# ---------------------------------------------------------------- operations


class SigmoidArguments(NamedTuple):
    """What the schema has after the logits."""

    target: Tensor  # (N,) or (N, K) classes, or the logits' shape in floating point or bool
    objective: str
    objective_parameters: Sequence[float]
    class_parameter: Tensor | None  # (C,)
    positive: float  # where positive_weight is None
    negative: float
    positive_weight: Tensor | None  # (C,)
    negative_weight: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    sample_weight: Tensor | None  # (N,), or the logits' shape
    normalizer: Tensor | None  # ()
    ignore_index: int
    reduction: str


def _launch(
    logits: Tensor,  # (N, C) or (B, C, P)
    d_logits: Tensor | None,  # the same shape
    call: SigmoidArguments,
    upstream: Tensor | None,  # () or the logits' shape
) -> Tensor | None:
    """Return the loss, () or the logits' shape, and write the gradient; with an upstream gradient the latter alone."""
    _check(logits, call)
    summed = call.reduction != "none"
    tile = tile_of(logits, d_logits)
    with on(logits):
        labels = _labels(logits, call)
        factors = _factors(logits, labels, call, upstream)
        losses = None
        if upstream is None:
            shape = (tile.programs,) if summed else logits.shape
            losses = logits.new_empty(shape, dtype=accumulate_dtype(logits.dtype))
        if tile.programs > 0:
            vectors = ClassVectors(
                *(
                    vector_of(name, getattr(call, name), logits.shape[1], logits)
                    for name in ("positive_weight", "negative_weight", "bias", "class_parameter")
                )
            )
            weights = Weights(
                *(
                    None if vector is not None or value == 1 else number(value, logits)
                    for vector, value in zip(vectors[:2], (call.positive, call.negative), strict=True)
                )
            )
            list_length = 0 if labels.lists is None else labels.lists.shape[1]
            _tiles[(tile.programs,)](
                logits,
                d_logits,
                losses,
                labels,
                vectors,
                weights,
                numbers_of(call.objective, call.objective_parameters, call.class_parameter is None, logits),
                factors,
                *tile.sizes,
                list_length,
                call.ignore_index,
                tile.reciprocal,
                **dict(zip(("objective", "hard", "soft"), BINARY_OBJECTIVES[call.objective], strict=True)),
                SUMMED=summed,
                **tile.options(device_of(logits.device)),
            )
        if losses is None or not summed:
            return losses
        if logits.numel() == 0 and call.reduction == "mean" and call.normalizer is None:
            return losses.new_full((), math.nan)
        return _sum(losses, Reduction(None, None, None, factors.normalizer, factors.divisor))


class LaunchTile(NamedTuple):
    """How many programs take which tiles."""

    layout: str
    programs: int
    sizes: tuple[int, ...]  # images, classes, pixels and the strides; what UNIT divides in units
    reciprocal: int
    unit: int
    rows: int
    columns: int

    def options(self, device: Device) -> dict[str, Any]:
        """Return a launch's keyword arguments."""
        num_warps = max(1, self.rows * self.columns * THREADS // (TILE * device.warp))
        shape = {"UNIT": self.unit, "ROWS": self.rows, "COLUMNS": self.columns}
        return {"LAYOUT": self.layout, **shape, "num_warps": num_warps}


def tile_of(logits: Tensor, d_logits: Tensor | None) -> LaunchTile:
    gradient = logits if d_logits is None else d_logits
    num_classes = logits.shape[1]
    if logits.dim() == 2:
        num_rows, stride, gradient_stride = logits.shape[0], logits.stride(0), gradient.stride(0)
        if logits.is_contiguous() and gradient.is_contiguous() and num_classes <= FLAT_CLASSES:
            vector = VECTOR_BYTES // logits.element_size()
            vector = vector if logits.numel() % vector == 0 else 1
            unit = vector if num_classes % vector == 0 else 1
            sizes = (num_rows, num_classes // unit, 1, 0, 0, 0, 0)
            reciprocal = triton.cdiv(1 << QUOTIENT_BITS.value, max(1, num_classes // unit))
            programs = triton.cdiv(logits.numel(), TILE)
            return LaunchTile("flat", programs, sizes, reciprocal, unit, TILE // vector, vector)
        unit = _unit(logits, num_classes, stride, gradient_stride)
        columns = min(triton.next_power_of_2(max(1, num_classes)), TILE)
        rows = TILE // columns
        programs = triton.cdiv(num_rows, rows) * triton.cdiv(num_classes, columns)
        sizes = (num_rows, num_classes // unit, 1, stride // unit, 0, gradient_stride // unit, 0)
        return LaunchTile("rows", programs, sizes, 0, unit, rows, columns)
    num_images, num_classes, num_pixels = logits.shape
    strides = (*logits.stride()[:2], *gradient.stride()[:2])
    unit = _unit(logits, num_pixels, *strides)
    rows = min(triton.next_power_of_2(max(1, num_pixels)), TILE)
    columns = max(16, TILE // rows)
    while columns > 1 and triton.cdiv(num_classes, columns) * columns > WASTED * num_classes:
        columns //= 2
    rows = min(rows, TILE // columns)
    programs = num_images * triton.cdiv(num_classes, columns) * triton.cdiv(num_pixels, rows)
    sizes = (num_images, num_classes, num_pixels // unit, *(stride // unit for stride in strides))
    return LaunchTile("images", programs, sizes, 0, unit, rows, columns)


def _unit(logits: Tensor, *widths: int) -> int:
    """Return what divides widths and strides, as launch.widths_of does: a multiple of 16 bytes, or 1."""
    unit = math.gcd(*widths, UNITS)
    return 1 if unit * logits.element_size() % VECTOR_BYTES != 0 else unit


def _check(logits: Tensor, call: SigmoidArguments) -> None:
    """Check what keeps memory safe when an operation is called directly; imbalance_kernels/ops checks for users."""
    if logits.dim() not in (2, 3) or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
        raise ValueError("logits must be (N, C) rows or (B, C, P) images, with a last dimension of stride 1")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"input has dtype {logits.dtype}, which the kernels do not take")
    if call.objective not in BINARY_OBJECTIVES:
        raise ValueError(f"objective is '{call.objective}', which the kernels do not know: use impl='reference'")
    if call.reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is '{call.reduction}'")


def _labels(logits: Tensor, call: SigmoidArguments) -> BinaryLabels:
    target = call.target
    is_dense = target.is_floating_point() or target.dtype == torch.bool
    fits = target.shape == logits.shape if is_dense else target.dim() in (1, 2) and len(target) == num_rows_of(logits)
    if not fits or target.device != logits.device:
        raise ValueError(f"target has shape {tuple(target.shape)} on {target.device}, which does not fit the logits")
    if not is_dense:
        target = target.to(torch.int64).contiguous()
        return BinaryLabels(target, None, None) if target.dim() == 1 else BinaryLabels(None, target, None)
    if target.dtype == torch.bool:
        return BinaryLabels(None, None, target.contiguous().view(torch.uint8))
    as_they_are = (logits.dtype, accumulate_dtype(logits.dtype))
    dense = target if target.dtype in as_they_are else target.to(accumulate_dtype(logits.dtype))
    return BinaryLabels(None, None, dense.contiguous())


def numbers_of(name: str, parameters: Sequence[float], products: bool, logits: Tensor) -> Numbers:
    """Return an objective's parameters; exponents whose powers are products are compile-time constants."""
    parameters = [*parameters, 0.0, 0.0, 0.0][:3]
    halves: list[Any] = [None, None]
    numbers: list[Any] = [number(value, logits) for value in parameters]
    for place, exponent in enumerate(parameters[: EXPONENTS.get(name, 0)]):
        if products and (2 * exponent).is_integer() and 2 * exponent <= MOST_HALVES:
            halves[place] = tl.constexpr(int(2 * exponent))
            numbers[place] = tl.constexpr(float(exponent))
    if name == "asymmetric" and parameters[2] == 0:  # no clip
        numbers[2] = None
    return Numbers(*numbers, *halves)


def _factors(logits: Tensor, labels: BinaryLabels, call: SigmoidArguments, upstream: Tensor | None) -> Factors:
    """Return what divides and weighs: a mean's divisor of labels is found here, by two small launches."""
    divisor = inverse = None
    if call.reduction == "mean" and call.normalizer is None and logits.numel() > 0:
        if labels.classes is None:
            inverse = number(1 / logits.numel(), logits)
        else:
            num_rows = num_rows_of(logits)
            sums = logits.new_empty((triton.cdiv(num_rows, SMALL_BLOCK),), dtype=accumulate_dtype(logits.dtype))
            sizes = (num_rows, logits.shape[1], call.ignore_index)
            _valid_logits[(sums.shape[0],)](sums, labels.classes, *sizes, BLOCK=SMALL_BLOCK)
            divisor = _sum(sums, None)
    weight = call.sample_weight
    of_logits = weight is not None and weight.shape == logits.shape
    if of_logits:
        weight = _like_logits("sample_weight", weight, logits)
    elif weight is not None:
        weight = vector_of("sample_weight", weight, num_rows_of(logits), logits)
    upstream_of_logits = upstream is not None and call.reduction == "none"
    if upstream_of_logits:
        upstream = _like_logits("upstream", upstream, logits)
    return Factors(
        weight,
        tl.constexpr(of_logits),
        upstream,
        tl.constexpr(upstream_of_logits),
        call.normalizer,
        divisor,
        inverse,
    )


def _like_logits(name: str, tensor: Tensor, logits: Tensor) -> Tensor:
    """Return what has a number for each logit, contiguous."""
    if tensor.shape != logits.shape or tensor.device != logits.device:
        raise ValueError(f"{name} must be {tuple(logits.shape)} on {logits.device}, but is {tuple(tensor.shape)}")
    if tensor.dtype != accumulate_dtype(logits.dtype):
        raise TypeError(f"{name} has dtype {tensor.dtype}, but it must be {accumulate_dtype(logits.dtype)}")
    return tensor.contiguous()


sigmoid_loss, sigmoid_loss_, sigmoid_loss_backward, sigmoid_loss_backward_ = forms_of(
    "sigmoid_loss", SigmoidArguments, _launch
)
