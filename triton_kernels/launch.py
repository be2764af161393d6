"""From the operations' arguments to launches: constants for the kernels, shapes of blocks, devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imbalance_kernels.options import LOGIT_DTYPES, accumulate_dtype
from imbalance_kernels.triton_kernels.logit_map import LogitMap, margin_numbers
from imbalance_kernels.triton_kernels.rows import Labels

__all__ = [
    "Constants",
    "Device",
    "Forms",
    "LongTile",
    "RowTile",
    "SplitArguments",
    "block_tile",
    "check_logits",
    "cluster_tile",
    "constants_of",
    "device_of",
    "forms_of",
    "long_plane_programs",
    "long_plane_tile",
    "long_programs",
    "long_tile",
    "num_plane_tiles",
    "num_rows_of",
    "number",
    "on",
    "partial_sums",
    "plane_tile",
    "row_tile",
    "vector_of",
    "widths_of",
]

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
if VERSION < (3, 6):
    raise RuntimeError(f"impl='triton' needs Triton 3.6 or later, but found {triton.__version__}")

UNITS = 16  # elements: the largest unit of widths that a load could profit from
RESIDENT_BYTES = 65536  # of a row's statistics in one block: 32 numbers a thread of 512; twice that spills
WARP_BYTES = 4096  # the same 32 numbers a thread
TILE_BYTES = 8192  # of rows that share a program of 128 threads: half of that, since each thread has several rows
TILE_ROWS = 128  # at most, one a thread
CLUSTER = 16  # blocks, at most: what Hopper and the Blackwell of data centres allow, beyond the portable 8
VECTOR_BYTES = 16
PLANE_BYTES = 128  # of a pixel's statistics that a thread of channels-first logits holds
PLANE_GROUPS = 16  # of threads that share a pixel's classes, at most
LONG_PLANE_GROUPS = 8  # where its classes are taken in blocks, and threads hold half
PLANE_THREADS = 128  # of a program, where that many pixels do not each need more
LONG_THREADS = 1024  # of a program that takes a row in blocks; four vectors a thread spill
IN_FLIGHT = 0.7  # of the L2 cache, for rows that are to be read again


class Device(NamedTuple):
    """What launches depend on."""

    processors: int
    warp: int  # threads
    cache_bytes: int  # L2
    has_clusters: bool  # blocks that read each other's shared memory, and a Triton that reduces through it


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return the properties of an accelerator; a CPU, which only the interpreter serves, is a very small one."""
    if device.type == "cpu":
        return Device(processors=2, warp=32, cache_bytes=1 << 20, has_clusters=False)
    properties = torch.get_device_module(device).get_device_properties(device)
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return Device(
        processors=getattr(properties, "multi_processor_count", 64),
        warp=getattr(properties, "warp_size", 32),
        # Elsewhere a larger cache lies behind the one that is reported: rows need not share it.
        cache_bytes=properties.L2_cache_size if is_nvidia else 1 << 40,
        has_clusters=VERSION >= (3, 8) and is_nvidia and properties.major in (9, 10),
    )


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the one that Triton launches on."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


class RowTile(NamedTuple):
    """The shape of a program that takes whole rows."""

    rows: int
    block: int  # at least C
    num_warps: int

    def options(self) -> dict[str, int]:
        """Return a launch's keyword arguments."""
        return {"ROWS": self.rows, "BLOCK": self.block, "num_warps": self.num_warps}


class LongTile(NamedTuple):
    """The shape of a program that takes a row in blocks, or at once over a cluster."""

    lanes: int
    vector: int
    num_warps: int
    num_ctas: int = 1  # blocks of the cluster

    def options(self) -> dict[str, int]:
        """Return a launch's keyword arguments."""
        options = {"LANES": self.lanes, "VECTOR": self.vector, "num_warps": self.num_warps}
        return options if self.num_ctas == 1 else {**options, "num_ctas": self.num_ctas}


def partial_sums(logits: Tensor) -> int:
    """Return how many sums of losses the kernels leave."""
    if logits.dim() == 3:
        return num_plane_tiles(logits)
    tile, num_rows = row_tile(logits), logits.shape[0]
    return num_rows if tile is None else triton.cdiv(num_rows, tile.rows)


def row_tile(logits: Tensor) -> RowTile | None:
    """Return the tile for rows of logits (N, C) that fit one program, or None."""
    number_bytes = accumulate_dtype(logits.dtype).itemsize
    block = max(2, triton.next_power_of_2(logits.shape[1]))
    if block * number_bytes > RESIDENT_BYTES:
        return None
    rows = min(TILE_ROWS, max(1, TILE_BYTES // (block * number_bytes)))
    return RowTile(rows, block, num_warps=min(16, max(4, block * number_bytes // WARP_BYTES)))


def cluster_tile(logits: Tensor) -> LongTile | None:
    """Return the tile for rows that fit a cluster and nothing smaller, or None."""
    number_bytes = accumulate_dtype(logits.dtype).itemsize
    block = triton.next_power_of_2(logits.shape[1])
    num_ctas = block * number_bytes // RESIDENT_BYTES
    if not device_of(logits.device).has_clusters or not 1 < num_ctas <= CLUSTER:
        return None
    vector = VECTOR_BYTES // logits.element_size()
    return LongTile(block // vector, vector, num_warps=16, num_ctas=num_ctas)


def block_tile(logits: Tensor) -> RowTile:
    """Return the tile for blocks of classes, of one row or of several narrow ones."""
    number_bytes = accumulate_dtype(logits.dtype).itemsize
    block = min(max(2, triton.next_power_of_2(logits.shape[1])), TILE_BYTES // number_bytes)
    return RowTile(min(TILE_ROWS, TILE_BYTES // (block * number_bytes)), block, num_warps=4)


def plane_tile(logits: Tensor) -> RowTile | None:
    """Return the tile for channels-first logits (B, C, P) where a program holds all classes of its pixels, or None."""
    groups = _plane_groups(logits)
    return None if groups > PLANE_GROUPS else _plane_tile(logits, groups, PLANE_BYTES)


def long_plane_tile(logits: Tensor) -> RowTile:
    """Return the tile for more classes than that: its block is a part of them."""
    return _plane_tile(logits, LONG_PLANE_GROUPS, PLANE_BYTES // 2)


def num_plane_tiles(logits: Tensor) -> int:
    """Return how many tiles cover channels-first logits (B, C, P)."""
    tile = plane_tile(logits) or long_plane_tile(logits)
    return logits.shape[0] * triton.cdiv(logits.shape[2], tile.rows)


def _plane_groups(logits: Tensor) -> int:
    """Return how many threads share the classes of a pixel."""
    number_bytes = accumulate_dtype(logits.dtype).itemsize
    return max(1, triton.next_power_of_2(logits.shape[1]) * number_bytes // PLANE_BYTES)


def _plane_tile(logits: Tensor, groups: int, thread_bytes: int) -> RowTile:
    """Return a tile of whole warps of pixels, whose block is as many classes as threads hold.

    How many pixels there are does not change who sums which classes of one, nor so its bits.
    """
    number_bytes, warp = accumulate_dtype(logits.dtype).itemsize, device_of(logits.device).warp
    block = min(max(2, triton.next_power_of_2(logits.shape[1])), groups * thread_bytes // number_bytes)
    most = max(warp, PLANE_THREADS // groups)
    rows = min(most, max(warp, triton.next_power_of_2(logits.shape[2])))
    return RowTile(rows, block, num_warps=rows * groups // warp)


def long_tile(logits: Tensor) -> LongTile:
    """Return the tile for rows that do not fit: as many threads as a program may have, with two vectors each."""
    num_warps = LONG_THREADS // device_of(logits.device).warp
    return LongTile(2 * LONG_THREADS, VECTOR_BYTES // logits.element_size(), num_warps)


def num_rows_of(logits: Tensor) -> int:
    """Return N of logits (N, C), or of channels-first ones (B, C, P), whose pixels are rows."""
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]


def long_programs(logits: Tensor, reads_again: bool) -> int:
    """Return how many programs take rows in turn.

    A processor holds one. Where rows are read again there are so few that they stay in the cache together (though half
    of the processors at least); else one for each row, so that the device can balance them.
    """
    num_rows = logits.shape[0]
    if not reads_again:
        return num_rows
    device = device_of(logits.device)
    return min(num_rows, device.processors, _fitting(logits, 1))


def long_plane_programs(logits: Tensor, tiles: int, tile: RowTile) -> int:
    """Return how many programs take such tiles of channels-first logits in turn: so that the cache holds them."""
    return min(tiles, _fitting(logits, tile.rows))


def _fitting(logits: Tensor, rows: int) -> int:
    """Return how many programs of so many rows the cache holds, or half of the processors if that is more."""
    device = device_of(logits.device)
    fitting = int(IN_FLIGHT * device.cache_bytes / (rows * logits.shape[1] * logits.element_size()))
    return max(device.processors // 2, fitting, 1)


class Forms(NamedTuple):
    """A loss as its schemas have it (imbalance_kernels/ops/kernels.py)."""

    loss: Callable[..., tuple[Tensor, Tensor]]  # ""
    loss_: Callable[..., Tensor]  # "_"
    backward: Callable[..., Tensor]  # "_backward"
    backward_: Callable[..., None]  # "_backward_"


def forms_of(name: str, call_of: Callable[..., Any], launch: Callable[..., Any]) -> Forms:
    """Return the forms of a loss.

    `call_of` makes a call, which has a reduction, of what the schemas have after the logits. `launch(logits, d_logits,
    call, upstream)` returns the loss and writes the gradient to d_logits if that is not None; with an upstream gradient
    the latter alone.
    """

    def loss(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and, where the last argument `with_gradient` asks for it, the gradient; else (0,)."""
        *arguments, with_gradient = arguments
        d_logits = logits.new_empty(logits.shape) if with_gradient else None
        value = launch(logits, d_logits, call_of(*arguments), None)
        return value, logits.new_empty((0,)) if d_logits is None else d_logits

    def loss_(logits: Tensor, *arguments: Any) -> Tensor:
        """Return the loss; the gradient takes the logits' memory."""
        call = call_of(*arguments)
        if call.reduction == "none":
            raise ValueError(f"{name}_ needs the upstream gradient of 'none': {name}_backward_")
        return launch(logits, logits, call, None)

    def backward(logits: Tensor, *arguments: Any) -> Tensor:
        """Return the gradient for the last argument, the upstream gradient."""
        *arguments, upstream = arguments
        d_logits = logits.new_empty(logits.shape)
        launch(logits, d_logits, call_of(*arguments), upstream)
        return d_logits

    def backward_(logits: Tensor, *arguments: Any) -> None:
        """Write the gradient for the last argument, the upstream gradient, into the logits' memory."""
        *arguments, upstream = arguments
        launch(logits, logits, call_of(*arguments), upstream)

    return Forms(loss, loss_, backward, backward_)


def number(value: float, logits: Tensor) -> Any:
    """Return a number as kernels take it: a float32, or a compile-time constant where that has not enough digits.

    So in float64, which is for tests, each value of a number compiles a kernel of its own. The interpreter keeps
    Python's floats as they are.
    """
    if logits.dtype == torch.float64 and not triton.knobs.runtime.interpret:
        return tl.constexpr(float(value))
    return float(value)


class SplitArguments(NamedTuple):
    """The arguments that split a row, in the order of the schema (csrc/bindings.cpp)."""

    scale: float
    factor: Tensor | None  # (C,)
    bias: Tensor | None  # (C,)
    softcap: float | None
    margin_kind: str
    margin_parameters: Sequence[float]
    class_margin: Tensor | None  # (C,)
    class_weight: Tensor | None  # (C,)
    label_smoothing: float
    ignore_index: int


class Constants(NamedTuple):
    """The same, as kernels take them."""

    labels: Labels
    maps: LogitMap
    kept: Any  # 1 - label smoothing, or None
    smoothing_per_class: Any  # label smoothing / C, or None


def constants_of(logits: Tensor, target: Tensor, split: SplitArguments, planes: bool = False) -> Constants:
    """Return the constants of a split; what changes nothing is None, which compiles to nothing."""
    check_logits(logits, planes)
    is_class = not target.is_floating_point()
    shape = (num_rows_of(logits),) if is_class else tuple(logits.shape)
    if target.shape != shape or target.device != logits.device:
        found = f"{tuple(target.shape)} on {target.device}"
        raise ValueError(f"target must be of shape {shape} on {logits.device}, but is {found}")
    if is_class:
        target = target.to(torch.int64)
    elif target.dtype != logits.dtype:
        target = target.to(accumulate_dtype(logits.dtype))
    as_vector = functools.partial(vector_of, size=logits.shape[1], logits=logits)
    smooths = split.label_smoothing > 0
    kind, margin, declared_slope = margin_numbers(split.margin_kind, split.margin_parameters)
    labels = Labels(
        target=target.contiguous() if is_class else None,
        probabilities=None if is_class else target.contiguous(),
        class_weight=as_vector("weight", split.class_weight),
        spreads=tl.constexpr(smooths or not is_class),
    )
    maps = LogitMap(
        scale=None if split.scale == 1 else number(split.scale, logits),
        factor=as_vector("factor", split.factor),
        bias=as_vector("bias", split.bias),
        softcap=None if split.softcap is None else number(split.softcap, logits),
        margin_kind=None if kind is None else tl.constexpr(kind),
        margin=tuple(number(value, logits) for value in margin),
        declared_slope=tl.constexpr(declared_slope),
        class_margin=as_vector("margin", split.class_margin),
    )
    return Constants(
        labels,
        maps,
        kept=number(1 - split.label_smoothing, logits) if smooths else None,
        smoothing_per_class=number(split.label_smoothing / max(1, logits.shape[1]), logits) if smooths else None,
    )


def widths_of(logits: Tensor, d_logits: Tensor | None = None) -> tuple[tuple[int, int, int], int]:
    """Return classes, stride and gradient_stride in units, and UNIT, which divides them all: loads can be as wide.

    A unit is a multiple of 16 bytes, or 1: then all rows are aligned alike, and a row's bits are the same wherever it
    stands among others of its width and stride.
    """
    widths = [logits.shape[1], logits.stride(0), logits.shape[1] if d_logits is None else d_logits.stride(0)]
    unit = math.gcd(*widths, UNITS)
    if unit * logits.element_size() % VECTOR_BYTES != 0:
        unit = 1
    return (widths[0] // unit, widths[1] // unit, widths[2] // unit), unit


def check_logits(logits: Tensor, planes: bool = False) -> None:
    """Check what keeps memory safe when an operation is called directly; imbalance_kernels/ops checks for users.

    Raises:
        ValueError: logits are not (N, C) rows, nor with `planes` channels-first.
        TypeError: logits have a dtype that kernels do not take.
    """
    if logits.dim() == 3 and planes:
        if logits.shape[2] > 1 and logits.stride(2) != 1:
            raise ValueError("channels-first logits must be (B, C, P) of pixels")
    elif logits.dim() != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError("logits must be (N, C) rows")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"input has dtype {logits.dtype}, which the kernels do not take")


def vector_of(name: str, vector: Tensor | None, size: int, logits: Tensor) -> Tensor | None:
    """Return a vector whose elements are neighbours.

    Raises:
        ValueError: it has not `size` elements, or is on another device.
        TypeError: it has not the dtype of statistics.
    """
    if vector is None:
        return None
    if vector.shape != (size,) or vector.device != logits.device:
        raise ValueError(
            f"{name} must be ({size},) on {logits.device}, but is {tuple(vector.shape)} on {vector.device}"
        )
    if vector.dtype != accumulate_dtype(logits.dtype):
        raise TypeError(f"{name} has dtype {vector.dtype}, but it must be {accumulate_dtype(logits.dtype)}")
    return vector.contiguous()
