"""The operations of a loss fused with a linear layer: chunks of rows through one buffer of logits.

    logits   = rows weight^T + bias      into the buffer           (n, C)
    d_logits                             in its place, by softmax_loss_ of the implementation
    d_input  = d_logits weight           (n, D)
    d_weight += d_logits^T rows          (C, D), in float32 for halves

Nothing else of a chunk's size exists, and nothing of size (N, C). The loop over chunks is one opaque operation of
torch.ops.imbalance_kernels_linear, so that a compiled graph serves every N.

On a CPU rows that are ignored are not multiplied. On an accelerator they are, as zeros: to leave them out the host
would have to wait for their number, and shapes would depend on data, which neither CUDA graphs nor compiled ones allow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalance_kernels import implementation
from imbalance_kernels.ops import reference_kernels
from imbalance_kernels.ops.kernel_arguments import LossArguments, SplitArguments
from imbalance_kernels.ops.kernels import (
    LOSS_SCHEMA,
    REPORTS_SCHEMA,
    SPLIT_BACKWARD_SCHEMA,
    SPLIT_SCHEMA,
    fake_reports,
    kernels,
)
from imbalance_kernels.ops.products import add_d_bias, add_d_weight, d_input_of, logits_of
from imbalance_kernels.options import accumulate_dtype

__all__ = ["SCHEMAS", "Plan", "Wants", "operations"]

# Bytes of logits in a chunk. Of 64, 80, 128 and 256 MiB the last is the fastest on a CPU: 1.21, 1.14, 1.11 and 1.06
# times the bare products (1024 x 256 x 131072, bench/bench_linear.py). On a GPU it is a choice that was not measured
# yet: 4096 rows of 128k classes in bfloat16.
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30, "xpu": 1 << 30}
FEWEST_ROWS = 128  # of a chunk, unless chunk_bytes says otherwise: below, products wait for the weight
ROWS_UNIT = 16  # chunks have a multiple of rows where they may


class Plan(NamedTuple):
    """How it is computed: what the schemas have last but `Wants`."""

    impl: str
    chunk_bytes: int | None
    accumulate: str  # "float32" or "weight": what the gradient of a half-precision weight is summed in


class Wants(NamedTuple):
    """The gradients that are asked for."""

    d_input: bool = False
    d_weight: bool = False
    d_bias: bool = False


_LINEAR = "Tensor input, Tensor linear_weight, Tensor? linear_bias"
_PLAN = "str impl, SymInt? chunk_bytes, str accumulate"
_WANTS = "bool with_d_input, bool with_d_weight, bool with_d_bias"
_GRADIENTS = "Tensor d_input, Tensor d_weight, Tensor d_bias"

SCHEMAS = {
    "linear_loss": (
        f"({_LINEAR}, {SPLIT_SCHEMA}, {LOSS_SCHEMA}, {REPORTS_SCHEMA}, {_PLAN}, {_WANTS}) -> "
        f"(Tensor loss, Tensor log_probs, Tensor correct, {_GRADIENTS})"
    ),
    "linear_loss_backward": (
        f"({_LINEAR}, {SPLIT_SCHEMA}, {LOSS_SCHEMA}, Tensor upstream, {_PLAN}, {_WANTS}) -> ({_GRADIENTS})"
    ),
    "linear_split": (
        f"({_LINEAR}, {SPLIT_SCHEMA}, {_PLAN}) -> "
        "(Tensor target_logit, Tensor rest, Tensor shift, Tensor weighted_logits, Tensor weight_sum)"
    ),
    "linear_split_backward": (
        f"({_LINEAR}, {SPLIT_SCHEMA}, {SPLIT_BACKWARD_SCHEMA}, {_PLAN}, {_WANTS}) -> ({_GRADIENTS})"
    ),
}

operations: Any = torch.ops.imbalance_kernels_linear

RowIndex = slice | Tensor  # a chunk's: consecutive, or indices (n,) where ignored rows lie between


class _Chunk(NamedTuple):
    rows: RowIndex
    input: Tensor  # (n, D)
    logits: Tensor  # (n, C), to be overwritten by their gradient


class _Chunks:
    """The linear layer, its one buffer of logits, and the gradients that are asked for."""

    def __init__(
        self,
        input: Tensor,  # (N, D)
        linear_weight: Tensor,  # (C, D)
        linear_bias: Tensor | None,  # (C,)
        arguments: LossArguments | SplitArguments,
        plan: Plan,
        wants: Wants,
    ) -> None:
        self.input = input
        self.weight = linear_weight.to(input.dtype)
        self.bias = None if linear_bias is None else linear_bias.to(input.dtype)
        self.wants = wants
        counts = _row_counts(arguments)
        compacts = _compacts(input.device)
        self.kept = _indices(counts) if compacts else None  # (K,) or None for all rows
        self.counts = None if compacts else counts  # (N,) bool or None for all rows
        self.num_rows = input.shape[0] if self.kept is None else self.kept.numel()
        self.rows_at_once = rows_of_chunk(self.num_rows, linear_weight.shape[0], input, plan.chunk_bytes)
        self.buffer = _fresh((min(self.rows_at_once, self.num_rows), linear_weight.shape[0]), input.dtype, input.device)

        d_input, d_weight, d_bias = _gradients_like(input, linear_weight, plan, wants, _fresh)
        self.d_input = d_input if self.kept is None else d_input.zero_()
        self.d_weight = d_weight if self.num_rows > 0 else d_weight.zero_()
        self.d_bias = d_bias.zero_()

    def __iter__(self) -> Iterator[_Chunk]:
        for first in range(0, self.num_rows, self.rows_at_once):
            last = min(first + self.rows_at_once, self.num_rows)
            rows = slice(first, last) if self.kept is None else self.kept[first:last]
            input = self.input[rows]
            if self.counts is not None:  # what they hold, NaN too, times a gradient of 0 is 0
                input = torch.where(self.counts[rows, None], input, 0)
            chunk = _Chunk(rows, input, self.buffer[: last - first])
            logits_of(chunk.input, self.weight, self.bias, chunk.logits)
            yield chunk
            if self.wants.d_input:
                self.d_input[rows] = d_input_of(chunk.logits, self.weight)
            if self.wants.d_weight:
                add_d_weight(chunk.logits, chunk.input, self.d_weight, first == 0)
            if self.wants.d_bias:
                add_d_bias(chunk.logits, self.d_bias)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return d_input (N, D), d_weight (C, D) and d_bias (C,), empty where not asked for."""
        return self.d_input, self.d_weight, self.d_bias

    def row_vector(self, of_ignored: float) -> Tensor:
        """Return a vector (N,) to be filled, with what ignored rows have."""
        return self.input.new_full(self.input.shape[:1], of_ignored, dtype=accumulate_dtype(self.input.dtype))


def rows_of_chunk(num_rows: int, num_classes: int, input: Tensor, chunk_bytes: int | None) -> int:
    """Return the rows of a chunk: as many as the budget holds, then spread evenly over as many chunks."""
    row_bytes = max(1, num_classes * input.element_size())
    fast = CHUNK_BYTES.get(input.device.type, CHUNK_BYTES["cpu"]) // row_bytes
    most = max(FEWEST_ROWS, fast) if chunk_bytes is None else max(1, chunk_bytes // row_bytes)
    if most >= num_rows:
        return max(1, num_rows)
    num_chunks = -(-num_rows // most)
    even = -(-num_rows // num_chunks)
    return min(most, -(-even // ROWS_UNIT) * ROWS_UNIT)


def _fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory that is not written yet; on a CPU in huge pages, since page faults are half of what it costs."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    extension = implementation.extension()
    if device.type == "cpu" and extension is not None:
        extension.ask_for_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def _compacts(device: torch.device) -> bool:
    """Return whether rows that do not count are left out: where the host need not wait to know their number."""
    return device.type == "cpu"


def _indices(counts: Tensor | None) -> Tensor | None:
    """Return the indices of rows that count (K,), or None for all; the host waits for their number."""
    return None if counts is None or bool(counts.all()) else counts.nonzero().squeeze(1)


def _row_counts(arguments: LossArguments | SplitArguments) -> Tensor | None:
    """Return which rows count (N,): not those that are ignored, and none with a normalizer of 0. None for all."""
    target, normalizer = arguments.target, getattr(arguments, "normalizer", None)
    counts = None if target.is_floating_point() else target != arguments.ignore_index
    if normalizer is None:
        return counts
    divides = (normalizer != 0).expand(target.shape[:1])
    return divides if counts is None else counts & divides


def _gradients_like(
    input: Tensor, linear_weight: Tensor, plan: Plan, wants: Wants, empty: Callable[..., Tensor] = torch.empty
) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for d_input, d_weight and d_bias, of no elements where not asked for."""
    total = accumulate_dtype(input.dtype)
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dtypes = (input.dtype, total if plan.accumulate == "float32" else linear_weight.dtype, total)
    d_input, d_weight, d_bias = (
        empty(shape if wanted else (0,), dtype=dtype, device=input.device)
        for shape, dtype, wanted in zip(shapes, dtypes, wants, strict=True)
    )
    return d_input, d_weight, d_bias


# ---------------------------------------------------------------- the operations

NUM_LOSS, NUM_SPLIT = len(LossArguments._fields), len(SplitArguments._fields)


def _kernels(plan: Plan) -> Any:
    return reference_kernels if plan.impl == "reference" else kernels(plan.impl)


def _linear_loss(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Return the loss, () or (N,), log_probs, correct, and gradients for an upstream gradient of one, () alone."""
    call, reports = LossArguments(*rest[:NUM_LOSS]), rest[NUM_LOSS : NUM_LOSS + 2]
    plan, wants = Plan(*rest[NUM_LOSS + 2 : -3]), Wants(*rest[-3:])
    chunks, kernel = _Chunks(input, linear_weight, linear_bias, call, plan, wants), _kernels(plan)
    loss = chunks.row_vector(0)
    log_probs, correct = (vector.zero_() for vector in fake_reports(loss, loss.shape[0], *reports))
    loss = loss if call.reduction == "none" else loss.new_zeros(())
    for chunk in chunks:
        arguments = call.rows(chunk.rows)
        if call.reduction != "none" and any(wants):
            of_chunk, *of_rows = kernel.softmax_loss_(chunk.logits, *arguments, *reports)
        else:
            of_chunk, _, *of_rows = kernel.softmax_loss(chunk.logits, *arguments, False, *reports)
        if call.reduction == "none":
            loss[chunk.rows] = of_chunk
        else:
            loss += of_chunk
        for vector, report, is_asked in zip((log_probs, correct), of_rows, reports, strict=True):
            if is_asked:
                vector[chunk.rows] = report
    return loss, log_probs, correct, *chunks.gradients()


def _linear_loss_backward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Return the gradients for an upstream gradient (N,); the logits are made again."""
    call, upstream = LossArguments(*rest[:NUM_LOSS]), rest[NUM_LOSS]
    plan, wants = Plan(*rest[NUM_LOSS + 1 : -3]), Wants(*rest[-3:])
    chunks = _Chunks(input, linear_weight, linear_bias, call, plan, wants)
    for chunk in chunks:
        _kernels(plan).softmax_loss_backward_(chunk.logits, *call.rows(chunk.rows), upstream[chunk.rows])
    return chunks.gradients()


def _linear_split(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Return the split of rows, as target_and_rest does."""
    call, plan = SplitArguments(*rest[:NUM_SPLIT]), Plan(*rest[NUM_SPLIT:])
    chunks = _Chunks(input, linear_weight, linear_bias, call, plan, Wants())
    target_logit, rest_, shift = chunks.row_vector(0), chunks.row_vector(-math.inf), chunks.row_vector(0)
    sums = [chunks.row_vector(0)[: None if _has_sums(call) else 0] for _ in range(2)]
    for chunk in chunks:
        split = _kernels(plan).target_and_rest(chunk.logits, *call.rows(chunk.rows))
        for vector, of_chunk in zip((target_logit, rest_, shift, *sums), split, strict=True):
            if of_chunk.numel() > 0:
                vector[chunk.rows] = of_chunk
    return target_logit, rest_, shift, *(vector.clone() for vector in sums)


def _linear_split_backward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of the split; the logits are made again."""
    call, vectors = SplitArguments(*rest[:NUM_SPLIT]), rest[NUM_SPLIT : NUM_SPLIT + 5]
    plan, wants = Plan(*rest[NUM_SPLIT + 5 : -3]), Wants(*rest[-3:])
    chunks = _Chunks(input, linear_weight, linear_bias, call, plan, wants)
    for chunk in chunks:
        of_chunk = (vector[chunk.rows] if vector.numel() > 0 else vector for vector in vectors)
        _kernels(plan).target_and_rest_backward_(chunk.logits, *call.rows(chunk.rows), *of_chunk)
    return chunks.gradients()


def _has_sums(call: SplitArguments) -> bool:
    return call.label_smoothing > 0 or call.target.is_floating_point()


def _fake_gradients(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients_like(input, linear_weight, Plan(*rest[-6:-3]), Wants(*rest[-3:]))


def _fake_linear_loss(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    shape = input.shape[:1] if LossArguments(*rest[:NUM_LOSS]).reduction == "none" else ()
    loss = input.new_empty(shape, dtype=accumulate_dtype(input.dtype))
    reports = fake_reports(loss, input.shape[0], *rest[NUM_LOSS : NUM_LOSS + 2])
    return loss, *reports, *_fake_gradients(input, linear_weight, linear_bias, *rest)


def _fake_linear_split(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *rest: Any) -> list[Tensor]:
    sums = input.shape[:1] if _has_sums(SplitArguments(*rest[:NUM_SPLIT])) else (0,)
    shapes = (input.shape[:1], input.shape[:1], input.shape[:1], sums, sums)
    return [input.new_empty(shape, dtype=accumulate_dtype(input.dtype)) for shape in shapes]


def _without_autocast(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Products inside an operation are of the dtypes that it was given."""

    @functools.wraps(operation)
    def run(input: Tensor, *arguments: Any) -> Any:
        with torch.autocast(input.device.type, enabled=False):
            return operation(input, *arguments)

    return run


_library = torch.library.Library("imbalance_kernels_linear", "DEF")  # lives as long as the registration should
_IMPLEMENTED = {
    "linear_loss": (_linear_loss, _fake_linear_loss),
    "linear_loss_backward": (_linear_loss_backward, _fake_gradients),
    "linear_split": (_linear_split, _fake_linear_split),
    "linear_split_backward": (_linear_split_backward, _fake_gradients),
}
for _name, (_implement, _fake) in _IMPLEMENTED.items():
    _library.define(_name + SCHEMAS[_name])
    _library.impl(_name, _without_autocast(_implement), "CompositeExplicitAutograd")
    torch.library.register_fake(f"imbalance_kernels_linear::{_name}", _fake, lib=_library)
