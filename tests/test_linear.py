"""Losses fused with a linear layer: value and gradients of input, weight and bias against the float64 oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from implementations import IMPLEMENTATIONS
from torch import Tensor

from imbalance_kernels import modules
from imbalance_kernels.objectives import REGISTRY

D, C = 12, 29  # features, classes
REDUCTIONS = ("mean", "sum", "none")
CHUNKS = {
    "one chunk": (7, 40),
    "whole chunks": (12, 4),
    "a rest": (13, 4),
    "a row per chunk": (5, 1),
    "one row": (1, 4),
    "no rows": (0, 4),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classes(num_rows: int, ignored: bool = True) -> Tensor:
    target = torch.randint(C, (num_rows,), generator=torch.Generator().manual_seed(1))
    if ignored and num_rows > 2:
        target[1::3] = -100
    return target


def relative_error(got: Tensor, want: Tensor) -> float:
    size = float(want.abs().max()) if want.numel() else 0.0
    error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
    return error if size == 0 else error / size


def exact(operands, target, upstream, **options):
    """Value and gradients of the operands (input, weight, bias or None) in float64, by autograd of the oracle."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in operands]
    logits = torch.nn.functional.linear(*leaves)
    value = oracle.loss(logits, target, **options)
    return value.detach(), gradients_of((value * upstream.double()).sum(), leaves)


def gradients_of(value: Tensor, leaves) -> list[Tensor | None]:
    asked = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(value, asked))
    return [None if leaf is None else next(found) for leaf in leaves]


def fused(module, operands, target, upstream, **call):
    """Value and gradients of a module's fused form."""
    input, weight, bias = leaves = [None if x is None else x.detach().clone().requires_grad_() for x in operands]
    value = module.linear(input, weight, target, bias, **call)
    assert value.dtype == (torch.float64 if input.dtype == torch.float64 else torch.float32)
    return value.detach(), gradients_of((value * upstream.to(value.dtype)).sum(), leaves)


def operands_of(num_rows: int, dtype: torch.dtype, bias: bool = True):
    return (
        randn(num_rows, D, dtype=dtype),
        randn(C, D, seed=2).div(3).to(dtype),
        randn(C, seed=3, dtype=dtype) if bias else None,
    )


def upstream_of(reduction: str, num_rows: int) -> Tensor:
    return randn(*((num_rows,) if reduction == "none" else ()), seed=9)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def assert_close(got, want, tolerance):
    (value, gradients), (value_wanted, gradients_wanted) = got, want
    assert relative_error(value, value_wanted) <= tolerance
    for name, found, wanted in zip(("input", "weight", "bias"), gradients, gradients_wanted, strict=True):
        if wanted is not None:
            assert relative_error(found, wanted) <= tolerance, name


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", REGISTRY)
def test_objective(name, impl, dtype, reduction):
    """Every objective, in chunks of four rows with ignored rows among them, under a random upstream gradient."""
    operands, target, upstream = operands_of(11, dtype), classes(11), upstream_of(reduction, 11)
    objective = REGISTRY[name]()
    module = modules.SoftmaxLoss(objective, reduction=reduction, impl=impl, chunk_bytes=4 * C * dtype.itemsize)
    want = exact(operands, target, upstream, objective=name, parameters=objective.parameters(), reduction=reduction)
    assert_close(fused(module, operands, target, upstream), want, TOLERANCE[dtype])
