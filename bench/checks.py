"""Values first: the loss and the gradient of every candidate against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from candidates import UPSTREAM_OF, Candidate, Problem
from formulas import Loss
from torch import Tensor

from imbalance_kernels.implementation import IMPLEMENTATIONS

FEWEST_ROWS, MOST_ROWS, MOST_LOGITS = 16, 64, 1 << 21  # whose gradient is checked
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # logits of a float64 chunk: its temporaries stay in cache, or fill a GPU

# Ours: the largest relative error of a row's gradient, so that sure rows, whose gradients are small, count as much.
ROW_LIMIT = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-8}
# The others, which keep few digits in such rows: the relative error of all of them together, and only to see that it is
# the same formula. bfloat16 formulas round every intermediate result.
FORMULA_LIMIT = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.25}
LOSS_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}
FORMULA_LOSS_LIMIT = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass
class Truth:
    """What a loss is, in float64."""

    loss: float | None  # the mean over all rows, if it was computed
    rows: Tensor  # (R,) the rows whose gradient is held
    gradient: Tensor  # (R, C)


@dataclass
class Check:
    """How far a candidate is from the truth."""

    loss: str
    candidate: str
    mode: str
    loss_error: float | None
    gradient_error: float | None  # of the checked rows together
    row_error: float | None  # of the worst row
    passed: bool


def truth_of(problem: Problem, loss: Loss, whole: bool = True) -> Truth:
    """The gradient of some rows, or of all where they are few, and of the `whole` the mean loss."""
    module = loss.module(problem.classes, impl="reference", reduction="sum")
    logits, target = problem.input(loss), problem.target
    num_rows, num_classes = logits.shape
    divisor = num_rows if module.weight is None else float(module.weight.double()[target].sum())
    rows_at_once = max(1, CHUNK[logits.device.type] // num_classes)

    total = 0.0
    with torch.no_grad():
        for first in range(0, num_rows if whole else 0, rows_at_once):
            chunk = slice(first, first + rows_at_once)
            total += float(module(logits[chunk].double(), target[chunk]))

    rows_checked = min(num_rows, MOST_ROWS, max(FEWEST_ROWS, MOST_LOGITS // num_classes))
    rows = torch.linspace(0, num_rows - 1, rows_checked).round().long()
    gradients = []
    for chunk in rows.split(rows_at_once):
        x = logits[chunk].double().requires_grad_()
        module(x, target[chunk]).backward()
        gradients.append(x.grad)
    return Truth(total / divisor if whole else None, rows, torch.cat(gradients) / divisor)


def check(candidate: Candidate, problem: Problem, truth: Truth) -> Check:
    """Run the candidate once and compare."""
    if candidate.prepare is not None:
        candidate.prepare()
    value = float(candidate.step().detach())
    loss_error = None if truth.loss is None else abs(value - truth.loss) / abs(truth.loss)
    gradient_error = row_error = None
    if candidate.gradient is not None:
        wanted = truth.gradient * UPSTREAM_OF[candidate.mode]
        difference = candidate.gradient()[truth.rows].double() - wanted
        gradient_error = float(difference.norm() / wanted.norm())
        size = wanted.norm(dim=1)
        row_errors = difference.norm(dim=1) / torch.where(size == 0, 1.0, size)  # a truncated row: exactly 0
        row_error = float(row_errors.max())
        del difference
    candidate.release()
    passed = _passes(candidate, problem.dtype, loss_error, gradient_error, row_error)
    return Check(candidate.loss, candidate.name, candidate.mode, loss_error, gradient_error, row_error, passed)


def _passes(
    candidate: Candidate,
    dtype: torch.dtype,
    loss_error: float | None,
    gradient_error: float | None,
    row_error: float | None,
) -> bool:
    if candidate.name not in IMPLEMENTATIONS:
        return _within(gradient_error, FORMULA_LIMIT[dtype]) and _within(loss_error, FORMULA_LOSS_LIMIT[dtype])
    return _within(row_error, ROW_LIMIT[dtype]) and _within(loss_error, LOSS_LIMIT[dtype])


def _within(error: float | None, limit: float) -> bool:
    return error is None or error <= limit  # a NaN is not
