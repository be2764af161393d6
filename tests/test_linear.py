"""Losses fused with a linear layer: value and gradients of input, weight and bias against the float64 oracle."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from contextlib import contextmanager

import oracle
import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config
from implementations import EMULATED, IMPLEMENTATIONS
from test_modules import COUNTS, LOSSES
from test_softmax_loss import OPTIONS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import imbalance_kernels as ik
from imbalance_kernels import functional as F
from imbalance_kernels.objectives import REGISTRY
from imbalance_kernels.ops import linear_kernels
from imbalance_kernels.ops.kernel_arguments import loss_arguments, split_arguments
from imbalance_kernels.ops.linear_kernels import SCHEMAS, operations, rows_of_chunk

D, C = 12, 29  # features, classes
REDUCTIONS = ("mean", "sum", "none")
CHUNKS = {  # rows and rows of a chunk
    "one chunk": (7, 40),
    "a chunk exactly": (7, 7),
    "whole chunks": (12, 4),
    "a rest": (13, 4),
    "a rest of one": (5, 4),
    "a row per chunk": (5, 1),
    "one row": (1, 4),
    "no rows": (0, 4),
}
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


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
    module = ik.SoftmaxLoss(objective, reduction=reduction, impl=impl, chunk_bytes=4 * C * dtype.itemsize)
    want = exact(operands, target, upstream, objective=name, parameters=objective.parameters(), reduction=reduction)
    assert_close(fused(module, operands, target, upstream), want, TOLERANCE[dtype])


def bytes_of(rows: int, dtype: torch.dtype, num_classes: int = C) -> int:
    return rows * num_classes * dtype.itemsize


@each_reduction
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@each_impl
@pytest.mark.parametrize("option", OPTIONS)
def test_option(option, impl, dtype, reduction):
    operands, target, upstream = operands_of(11, dtype), classes(11), upstream_of(reduction, 11)
    options = OPTIONS[option](C)
    for name in ("cross_entropy", "focal"):
        module = ik.SoftmaxLoss(
            REGISTRY[name](), **options, reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, dtype)
        )
        parameters = REGISTRY[name]().parameters()
        want = exact(operands, target, upstream, objective=name, parameters=parameters, reduction=reduction, **options)
        assert_close(fused(module, operands, target, upstream), want, 2 * TOLERANCE[dtype])


@each_reduction
@each_impl
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_every_loss_is_its_formula(loss, impl, reduction):
    """Of tests/test_modules.py, on logits that a layer makes, cosines where they should be."""
    num_classes, num_rows = len(COUNTS), 11
    input, weight = randn(num_rows, D), randn(num_classes, D, seed=2)
    target = torch.randint(num_classes, (num_rows,), generator=torch.Generator().manual_seed(1))
    onehot = torch.nn.functional.one_hot(target, num_classes).double()
    upstream = upstream_of(reduction, num_rows)

    def literal(input, weight):
        if loss.cosines:
            input, weight = (x / x.square().sum(1, keepdim=True).sqrt() for x in (input, weight))
        rows = loss.rows(loss.logits(input @ weight.t(), onehot), onehot)
        return rows if reduction == "none" else rows.sum() / (num_rows if reduction == "mean" else 1)

    leaves = [input.requires_grad_(), weight.requires_grad_()]
    value = literal(*leaves)
    want = value.detach(), gradients_of((value * upstream).sum(), leaves)
    chunk_bytes = bytes_of(4, torch.float64, num_classes)
    module = loss.module(**loss.arguments, reduction=reduction, impl=impl, chunk_bytes=chunk_bytes)
    layer = torch.nn.Linear(D, num_classes, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(weight.detach())
    owner = ik.LinearLoss.from_linear(layer, module, cosine=loss.cosines)
    value = owner(input, target)
    gradients = gradients_of((value * upstream).sum(), [input, layer.weight])
    assert relative_error(value.detach(), want[0]) < 1e-11
    for found, wanted in zip(gradients, want[1], strict=True):
        assert relative_error(found, wanted) < 1e-9


@each_reduction
@each_impl
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_boundary_of_chunks(chunk, impl, reduction):
    num_rows, rows = CHUNKS[chunk]
    operands, target = operands_of(num_rows, torch.float64), classes(num_rows)
    upstream = upstream_of(reduction, num_rows)
    module = ik.FocalLoss(reduction=reduction, impl=impl, chunk_bytes=bytes_of(rows, torch.float64))
    found = fused(module, operands, target, upstream)
    if num_rows == 0:
        assert math.isnan(found[0]) if reduction == "mean" else float(found[0].sum()) == 0
        assert [gradient.abs().sum().item() for gradient in found[1]] == [0, 0, 0]
        return
    want = exact(operands, target, upstream, objective="focal", parameters=(2.0,), reduction=reduction)
    assert_close(found, want, 1e-12)


def test_rows_of_a_chunk():
    """The budget decides, then all chunks are made alike; never the ratio of classes to features."""
    x = torch.empty(1, 1)
    assert rows_of_chunk(1000, 100, x, 4 * 100 * 300) == 256  # four chunks of 250, in units of 16 rows
    assert rows_of_chunk(1000, 100, x, 4 * 100 * 1000) == 1000
    assert rows_of_chunk(1000, 100, x, 4 * 100 * 999) == 512
    assert rows_of_chunk(1000, 100, x, 1) == 1
    assert rows_of_chunk(0, 100, x, 1) == 1
    assert rows_of_chunk(100, 7, x, 4 * 7 * 34) == 34  # a unit more would not fit the budget
    assert rows_of_chunk(10**6, 10**7, x, None) == 128  # below that products are slow, whatever the memory
    assert rows_of_chunk(10**6, 131072, x, None) == (256 << 20) // (131072 * 4)


@each_reduction
@pytest.mark.parametrize("option", ("plain", "prior", "softcap", "weighted smoothing", "z-loss"))
@each_impl
def test_class_probabilities(option, impl, reduction):
    operands = operands_of(11, torch.float64)
    target = randn(11, C, seed=4).softmax(1)
    options = {} if option == "plain" else OPTIONS[option](C)
    upstream = upstream_of(reduction, 11)
    module = ik.CrossEntropyLoss(**options, reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, torch.float64))
    want = exact(operands, target, upstream, reduction=reduction, **options)
    assert_close(fused(module, operands, target, upstream), want, 1e-6)  # the class vectors are float32


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("normalizer", (None, 7.0, torch.tensor(3)))
@each_impl
def test_weights_of_rows_and_normalizer(impl, normalizer, dtype):
    operands, target, rows = operands_of(11, dtype), classes(11), randn(11, seed=5).abs().float()
    weight = 1e6 * torch.linspace(0.1, 1, C)  # as 1 / prior of a rare class: more than float16 holds
    options = dict(sample_weight=rows, normalizer=normalizer)
    for reduction in ("mean", "sum"):
        share = 1.0 if reduction == "mean" and normalizer is None else 1e-6  # what is left to compare with
        upstream = torch.tensor(-share, dtype=torch.float64)
        module = ik.CrossEntropyLoss(weight, reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, dtype))
        want = exact(operands, target, upstream, weight=weight, reduction=reduction, **options)
        assert_close(fused(module, operands, target, upstream, **options), want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_impl
def test_nothing_valid(impl, dtype):
    operands, target, one = operands_of(5, dtype), torch.full((5,), -100), torch.ones(())
    module = ik.CrossEntropyLoss(impl=impl, chunk_bytes=bytes_of(2, dtype))
    value, gradients = fused(module, operands, target, one)
    assert math.isnan(value) and all(float(gradient.abs().sum()) == 0 for gradient in gradients)
    operands[0][3] = math.inf  # a divisor of zero gives zero, whatever the rows hold
    for normalizer in (0.0, torch.tensor(0)):
        for loss in (ik.CrossEntropyLoss, ik.SoftTruncationLoss, functools.partial(ik.RadiusMarginLoss, 0.3)):
            module = loss(impl=impl, chunk_bytes=bytes_of(2, dtype))
            value, gradients = fused(module, operands, classes(5, False), one, normalizer=normalizer)
            assert value == 0 and all(float(gradient.abs().sum()) == 0 for gradient in gradients)


IGNORING = {
    "focal": ik.FocalLoss,
    "two temperatures": ik.SoftTruncationLoss,
    "radius": functools.partial(ik.RadiusMarginLoss, 0.3),
}


@pytest.mark.parametrize("compacts", (True, False), ids=("left out", "multiplied as zeros"))
@pytest.mark.parametrize("loss", IGNORING)
@each_reduction
@each_impl
def test_what_ignored_rows_hold_does_not_matter(impl, reduction, loss, compacts, monkeypatch):
    """Left out on a CPU, and multiplied as zeros where the host would have to wait for their number."""
    monkeypatch.setattr(linear_kernels, "_compacts", lambda device: compacts)
    operands, target = operands_of(13, torch.float64), classes(13)
    upstream = upstream_of(reduction, 13)
    module = IGNORING[loss](reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, torch.float64))
    want = fused(module, operands, target, upstream)
    operands[0][target == -100] = math.nan
    value, gradients = fused(module, operands, target, upstream)
    assert torch.equal(value, want[0])
    assert all(torch.equal(found, wanted) for found, wanted in zip(gradients, want[1], strict=True))
    assert float(gradients[0][target == -100].abs().sum()) == 0


@each_reduction
@each_impl
def test_tied_weights(impl, reduction):
    """The layer's weight is the embedding that the input comes from."""
    embedding = randn(C, D, seed=2).requires_grad_()
    tokens, target = classes(11, False), classes(11)
    upstream = upstream_of(reduction, 11)
    module = ik.CrossEntropyLoss(reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, torch.float64))
    input = embedding[tokens].tanh()
    (found,) = torch.autograd.grad((module.linear(input, embedding, target) * upstream).sum(), embedding)
    logits = embedding[tokens].tanh() @ embedding.t()
    (wanted,) = torch.autograd.grad((oracle.loss(logits, target, reduction=reduction) * upstream).sum(), embedding)
    assert relative_error(found, wanted) < 1e-12


# ---------------------------------------------------------------- halves


def errors_of(found, wanted) -> list[float]:
    return [
        float((ours.double() - exact).norm() / exact.norm())
        for ours, exact in zip(found, wanted, strict=True)
        if exact is not None
    ]


@each_impl
def test_bfloat16_with_64_chunks_is_no_worse_than_eager(impl):
    num_rows, num_classes, width = 1020, 512, 64  # of which 1000 count: 1/1000 is rounded
    input, weight = randn(num_rows, width).bfloat16(), randn(num_classes, width, seed=2).div(4).bfloat16()
    target = torch.randint(num_classes, (num_rows,), generator=torch.Generator().manual_seed(1))
    target[::51] = -100
    one = torch.ones(())
    wanted = exact((input, weight, None), target, one)[1]
    leaves = [input.requires_grad_(), weight.requires_grad_()]
    eager = gradients_of(torch.nn.functional.cross_entropy((input @ weight.t()).float(), target), leaves)
    module = ik.CrossEntropyLoss(impl=impl, chunk_bytes=bytes_of(16, torch.bfloat16, num_classes))
    ours = fused(module, (input, weight, None), target, one)[1]
    for our_error, eager_error in zip(errors_of(ours, wanted), errors_of([*eager, None], wanted), strict=True):
        assert our_error <= 1.02 * eager_error
    module.accumulate = "weight"  # a sum of 64 roundings
    assert errors_of(fused(module, (input, weight, None), target, one)[1], wanted)[1] > 1.5 * errors_of(ours, wanted)[1]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@each_reduction
@each_impl
def test_a_tiny_share_of_a_row_does_not_underflow(impl, reduction, dtype):
    """1/N and the upstream gradient come after the products: float16's least number is 6e-8."""
    operands, target = operands_of(11, dtype), classes(11)
    scale = 2.0**18  # a gradient scaler's: it brings back to order one what was 1e-6
    call = {} if reduction == "none" else {"normalizer": 1e6}
    upstream = scale * (1e-6 if reduction == "none" else 1.0) * upstream_of(reduction, 11)
    module = ik.CrossEntropyLoss(reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, dtype))
    want = exact(operands, target, upstream, reduction=reduction, **call)
    assert_close(fused(module, operands, target, upstream, **call), want, TOLERANCE[dtype])
    tiny = upstream / scale  # the weight's own gradient is float32 where its master copy is
    master = operands[0], operands[1].float(), None
    _, found = fused(module, master, target, tiny, **call)
    assert found[1].dtype == torch.float32
    assert relative_error(found[1], exact(master, target, tiny, reduction=reduction, **call)[1][1]) < TOLERANCE[dtype]


HEAVY = {  # what a coefficient can be, far beyond float16 or below it: options, what is compared
    "class weights": dict(weight=torch.logspace(0, 6, C)),
    "light class weights": dict(weight=torch.logspace(-9, -7, C)),
    "smoothed class weights": dict(weight=torch.logspace(0, 6, C), label_smoothing=0.1),
    "z-loss beside light class weights": dict(weight=torch.logspace(-9, -7, C), z_loss=1e-2),
}


@pytest.mark.parametrize("samples", (1.0, 1e-8, 1e6))
@pytest.mark.parametrize("case", (*HEAVY, "class probabilities"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@each_reduction
@each_impl
def test_no_weight_leaves_the_range_of_halves(impl, reduction, dtype, case, samples):
    """The gradient of the weight's float32 master copy, which holds what halves do not."""
    operands = (operands_of(11, dtype)[0], randn(C, D, seed=2).float(), None)
    options = HEAVY.get(case, dict(weight=torch.logspace(0, 6, C)))
    target = randn(11, C, seed=4).softmax(1).float() if case == "class probabilities" else classes(11)
    rows = samples * (0.5 + randn(11, seed=5).abs().float())
    upstream = upstream_of(reduction, 11)
    module = ik.CrossEntropyLoss(**options, reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, dtype))
    found = fused(module, operands, target, upstream, sample_weight=rows)[1][1]
    wanted = exact(operands, target, upstream, reduction=reduction, sample_weight=rows, **options)[1][1]
    assert relative_error(found, wanted) < TOLERANCE[dtype]


@each_impl
def test_an_infinite_upstream_gradient_spoils_its_own_row(impl):
    operands, target = operands_of(7, torch.float16), classes(7, False)
    upstream = torch.ones(7)
    upstream[2] = math.inf
    module = ik.CrossEntropyLoss(reduction="none", impl=impl, chunk_bytes=bytes_of(4, torch.float16))
    d_input = fused(module, operands, target, upstream)[1][0]
    assert d_input[[0, 1, 3, 4, 5, 6]].isfinite().all() and not d_input[2].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@each_reduction
def test_autocast(reduction, dtype):
    """A float32 master copy gets a gradient that was never rounded to halves."""
    input, weight, bias = operands = operands_of(11, torch.float32)
    target, upstream = classes(11), upstream_of(reduction, 11)
    module = ik.FocalLoss(reduction=reduction, chunk_bytes=bytes_of(4, dtype))
    with torch.autocast("cpu", dtype=dtype):
        found = fused(module, operands, target, upstream)
        value = module.linear(input, weight, target, bias)
    assert [gradient.dtype for gradient in found[1]] == [torch.float32] * 3
    assert not torch.equal(found[1][1], found[1][1].to(dtype).float())
    halves = input.to(dtype), weight.to(dtype), bias.to(dtype)
    want = exact(halves, target, upstream, objective="focal", parameters=(2.0,), reduction=reduction)
    assert_close(found, want, TOLERANCE[dtype])
    assert torch.equal(value, module.linear(*halves[:2], target, halves[2])), "the same logits"


def test_accumulate_in_the_weights_dtype():
    operands, target = operands_of(11, torch.bfloat16), classes(11)
    module = ik.CrossEntropyLoss(accumulate="weight", chunk_bytes=bytes_of(4, torch.bfloat16))
    found = fused(module, operands, target, torch.tensor(1.7))
    assert_close(found, exact(operands, target, torch.tensor(1.7)), 3e-2)


# ---------------------------------------------------------------- only what is asked for


@contextmanager
def counted_products():
    """Count the matrix products, at the end."""
    found = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield found
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::matmul")
    found += [event.key for event in profiler.key_averages() for _ in range(event.count) if event.key in names]


PRODUCTS = {  # of the input, of the weight: products a chunk
    (True, True): {"mean": 3, "none": 4},
    (True, False): {"mean": 2, "none": 3},
    (False, True): {"mean": 2, "none": 3},
    (False, False): {"mean": 1, "none": 1},
}


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("asked", PRODUCTS)
def test_products_are_those_that_are_asked_for(asked, reduction, bias):
    input, weight, offset = operands_of(12, torch.float32)
    target = classes(12, False)
    module = ik.FocalLoss(reduction=reduction, chunk_bytes=bytes_of(4, torch.float32))
    input.requires_grad_(asked[0]), weight.requires_grad_(asked[1])
    with counted_products() as products:
        value = module.linear(input, weight, target, offset if bias else None)
        if any(asked):
            value.sum().backward()
    assert len(products) == 3 * PRODUCTS[asked][reduction], products
    assert (input.grad is not None, weight.grad is not None) == asked
    with counted_products() as products, torch.no_grad():
        module.linear(input, weight, target, offset if bias else None)
    assert len(products) == 3


@each_reduction
@pytest.mark.parametrize("frozen", (0, 1, 2))
@each_impl
def test_frozen_sides(frozen, impl, reduction):
    operands, target, upstream = operands_of(11, torch.float64), classes(11), upstream_of(reduction, 11)
    module = ik.FocalLoss(reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, torch.float64))
    _, want = fused(module, operands, target, upstream)
    leaves = [x.detach().clone().requires_grad_(side != frozen) for side, x in enumerate(operands)]
    (module.linear(leaves[0], leaves[1], target, leaves[2]) * upstream).sum().backward()
    for side, (leaf, wanted) in enumerate(zip(leaves, want, strict=True)):
        assert leaf.grad is None if side == frozen else torch.equal(leaf.grad, wanted)


MEMORY = """
import torch
from torch.profiler import ProfilerActivity, profile
import imbalance_kernels as ik

def high_water(reset=False):
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines["VmHWM"].split()[0])

def extra(num_rows, dtype, with_gradient=True, **options):
    input = torch.ones(num_rows, 64).to(dtype).requires_grad_(with_gradient)
    weight = torch.zeros(65536, 64).to(dtype).requires_grad_(with_gradient)
    target = torch.arange(num_rows)
    before = high_water(reset=True)
    value = ik.FocalLoss(chunk_bytes=32 << 20, **options).linear(input, weight, target)
    if with_gradient:
        value.sum().backward()
    return (high_water() - before) / 2**20

CASES
for options in cases:
    extra(130, **options)  # the code itself is loaded page by page
    print(extra(1024, **options))
"""
MEMORY_CASES = {  # MiB of a chunk and of the weight's gradient; the logits would be 256 and 128
    "dtype=torch.float32": 32 + 16,
    "dtype=torch.float32, reduction='none'": 32 + 16,
    "dtype=torch.float32, with_gradient=False": 32,
    "dtype=torch.bfloat16": 32 + 16,  # the sum in float32; it is rounded after the chunk is gone
    "dtype=torch.bfloat16, accumulate='weight'": 32 + 8,
    "dtype=torch.bfloat16, with_gradient=False": 32,
}


def test_peak_memory_is_a_chunk_and_the_gradients():
    """By Linux' high-water mark: 20 MB are for the input's gradient, vectors of N, and the products' own memory."""
    cases = "cases = [" + ", ".join(f"dict({options})" for options in MEMORY_CASES) + "]"
    script = MEMORY.replace("CASES", cases)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what is freed leaves the process
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    for (options, want), line in zip(MEMORY_CASES.items(), run.stdout.split(), strict=True):
        assert want - 4 < float(line) < want + 20, options


# ---------------------------------------------------------------- backward


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@each_reduction
@each_impl
def test_a_retained_graph_gives_2_and_then_3(impl, reduction, dtype):
    input, weight, bias = leaves = [x.requires_grad_() for x in operands_of(11, dtype)]
    module = ik.FocalLoss(reduction=reduction, impl=impl, chunk_bytes=bytes_of(4, dtype))
    target = classes(11)
    ones = torch.autograd.grad(module.linear(input, weight, target, bias).sum(), leaves)
    value = module.linear(input, weight, target, bias).sum()
    kept = []
    for upstream, retain in ((2.0, True), (3.0, True), (0.5, True), (3.0, False)):
        found = torch.autograd.grad(value, leaves, torch.tensor(upstream), retain_graph=retain)
        kept.append((upstream, found))
    for upstream, found in kept:  # at the end: the first is not changed by the next
        for gradient, one in zip(found, ones, strict=True):
            # Three times a gradient is rounded elsewhere than the gradient.
            assert relative_error(gradient, upstream * one) <= (1e-6 if dtype == torch.float32 else 2**-6)
    with pytest.raises(RuntimeError, match="second time|retain_graph"):
        torch.autograd.grad(value, leaves)


@each_reduction
@each_impl
def test_double_backward_raises(impl, reduction):
    input, weight, bias = (x.requires_grad_() for x in operands_of(5, torch.float32))
    value = ik.FocalLoss(reduction=reduction, impl=impl).linear(input, weight, classes(5), bias)
    (first,) = torch.autograd.grad(value.sum(), weight, create_graph=True)
    for named in ([input], [weight], [bias], [input, weight]):
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(first.square().sum(), named, retain_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.square().sum().backward()


def test_gradients_that_are_unscaled_are_not_copied():
    """An upstream gradient of one: what forward made is what .grad holds."""
    input, weight, _ = (x.requires_grad_() for x in operands_of(5, torch.float32))
    value = ik.CrossEntropyLoss().linear(input, weight, classes(5))
    made = {x.data_ptr() for x in value.grad_fn.next_functions[0][0].saved_tensors if x is not None and x.numel()}
    value.backward()
    assert {input.grad.data_ptr(), weight.grad.data_ptr()} == made


@pytest.mark.parametrize("name", ("weight", "bias"))
def test_what_backward_reads_again_must_not_change(name):
    input, weight, bias = (x.requires_grad_() for x in operands_of(5, torch.float32))
    value = ik.CrossEntropyLoss(reduction="none").linear(input, weight, classes(5), bias)
    with torch.no_grad():
        {"weight": weight, "bias": bias}[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# ---------------------------------------------------------------- the split, and what is written on it


@each_impl
def test_a_loss_of_ones_own(impl):
    """Random upstream gradients of every part, with a soft cap, a scale and a constant bias beside the learned one."""
    operands, target = operands_of(11, torch.float64), classes(11, False)
    options = dict(scale=1.7, softcap=3.0, bias=randn(C, seed=6))
    keywords = dict(impl=impl, chunk_bytes=bytes_of(4, torch.float64))
    uneven = randn(3, 11, seed=7)

    def own(target_logit, rest):
        return (uneven[0] * torch.relu(1 - (target_logit - rest)) + uneven[1] * target_logit + uneven[2] * rest).sum()

    def literal(input, weight, bias):
        z = 1.7 * (3 * torch.tanh(torch.nn.functional.linear(input, weight, bias) / 3)) + options["bias"]
        rest = z.scatter(1, target[:, None], -math.inf).logsumexp(1)
        return own(z.gather(1, target[:, None]).squeeze(1), rest)

    def ours(input, weight, bias):
        split = F.linear_target_and_rest(input, weight, target, linear_bias=bias, **options, **keywords)
        return own(split.target + split.shift, split.rest + split.shift)

    leaves = [x.requires_grad_() for x in operands]
    for found, wanted in zip(gradients_of(ours(*leaves), leaves), gradients_of(literal(*leaves), leaves), strict=True):
        assert relative_error(found, wanted) < 1e-11


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each_impl
def test_log_probabilities(impl, dtype):
    """Of sequences (B, S): the same as from logits, 0 where ignored, and their gradients for any upstream."""
    input, weight, bias = operands_of(12, dtype)
    input, target, upstream = input.reshape(3, 4, D), classes(12).reshape(3, 4), randn(3, 4, seed=9)
    leaves = [x.requires_grad_() for x in (input, weight, bias)]
    keywords = dict(scale=0.7, impl=impl)
    value = F.linear_log_probs(input, weight, target, linear_bias=bias, chunk_bytes=bytes_of(5, dtype), **keywords)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    log_p = (0.7 * torch.nn.functional.linear(*exact_leaves)).log_softmax(-1)
    index = torch.where(target < 0, 0, target)[..., None]
    wanted = torch.where(target < 0, 0.0, log_p.gather(-1, index).squeeze(-1))
    assert value.shape == (3, 4) and float(value.detach()[target < 0].abs().sum()) == 0
    found = value.detach(), gradients_of((value * upstream.to(value.dtype)).sum(), leaves)
    assert_close(found, (wanted.detach(), gradients_of((wanted * upstream).sum(), exact_leaves)), TOLERANCE[dtype])
    logits = torch.nn.functional.linear(input, weight, bias).detach()
    plain = F.target_log_probs(logits, target, class_dim=-1, **keywords)
    assert relative_error(value.detach(), plain) <= TOLERANCE[dtype]


# ---------------------------------------------------------------- LinearLoss

needs_torchs = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch 2.13 and later have LinearCrossEntropyLoss"
)


@needs_torchs
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@each_reduction
def test_linear_loss_is_torchs(reduction, bias, weighted, smoothing):
    options = dict(
        reduction=reduction, ignore_index=4, weight=randn(C).abs() if weighted else None, label_smoothing=smoothing
    )
    theirs = torch.nn.LinearCrossEntropyLoss(D, C, bias=bias, dtype=torch.float64, **options)
    ours = ik.LinearLoss(D, C, ik.CrossEntropyLoss(**options), bias=bias, dtype=torch.float64)
    if weighted:
        ours.loss.weight = torch.zeros(C, dtype=torch.float64)  # comes with the state
    ours.load_state_dict(theirs.state_dict())
    target, upstream = classes(9, False), upstream_of(reduction, 9)
    for module in (theirs, ours):
        (module(randn(9, D), target) * upstream).sum().backward()
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(found.grad, wanted.grad) < 1e-12
    if not weighted:
        theirs.load_state_dict(ours.state_dict())
    function = F.linear_cross_entropy(
        randn(9, D), ours.linear.weight, target, linear_bias=ours.linear.bias, **{**options, "ignore_index": 4}
    )
    wanted = torch.nn.functional.linear_cross_entropy(
        randn(9, D), ours.linear.weight, target, linear_bias=ours.linear.bias, **options
    )
    assert relative_error(function.detach(), wanted.detach()) < 1e-12


def test_a_single_sample_is_torchs():
    head = torch.nn.Linear(D, C, dtype=torch.float64)
    value = F.linear_cross_entropy(randn(D), head.weight, torch.tensor(3), linear_bias=head.bias, ignore_index=None)
    wanted = torch.nn.functional.cross_entropy(head(randn(D)), torch.tensor(3))
    assert value.shape == () and relative_error(value.detach(), wanted.detach()) < 1e-12


def test_from_linear_shares_the_layer():
    head = torch.nn.Linear(D, C)
    owner = ik.LinearLoss.from_linear(head, ik.FocalLoss())
    assert owner.linear is head and [*owner.parameters()] == [head.weight, head.bias]
    owner(randn(5, D, dtype=torch.float32), classes(5)).backward()
    assert head.weight.grad is not None and head.bias.grad is not None
    logits = owner.logits(randn(5, D, dtype=torch.float32))
    assert torch.equal(logits, head(randn(5, D, dtype=torch.float32)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@each_reduction
def test_cosines_of_ignored_rows_and_of_zeros(reduction, dtype):
    owner = ik.LinearLoss(D, C, ik.CosFaceLoss(reduction=reduction), cosine=True, dtype=dtype)
    input, target = randn(9, D).to(dtype), classes(9)
    input[target == -100] = math.nan
    input[4] = 0
    target[4] = 3
    (owner(input.requires_grad_(), target) * upstream_of(reduction, 9)).sum().backward()
    assert float(input.grad[target == -100].abs().sum()) == 0 and (target == -100).any()
    assert float(input.grad.abs().max()) < 1e4  # 64 for the scale, over the sum of few rows
    assert owner.linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@each_reduction
def test_cosines(reduction, dtype):
    """Input and weight of any length: the gradients go through their norms."""
    input, weight = 50 * randn(11, D).to(dtype), (randn(C, D, seed=2) / 100).to(dtype)
    owner = ik.LinearLoss(D, C, ik.CosFaceLoss(scale=4.0, reduction=reduction), cosine=True, dtype=dtype)
    owner.linear.weight.data.copy_(weight)
    target, upstream = classes(11), upstream_of(reduction, 11)
    leaves = [x.double().requires_grad_() for x in (input, weight)]
    cosines = torch.nn.functional.cosine_similarity(leaves[0][:, None], leaves[1][None], dim=-1)
    value = oracle.loss(cosines, target, margin=0.35, scale=4.0, reduction=reduction)
    want = gradients_of((value * upstream).sum(), leaves)
    input.requires_grad_()
    found = gradients_of((owner(input, target) * upstream).sum(), [input, owner.linear.weight])
    for ours, wanted in zip(found, want, strict=True):
        assert relative_error(ours, wanted) <= TOLERANCE[dtype]
    assert float(owner.logits(input).abs().max()) <= 1.01


RADIUS = torch.linspace(0, 0.5, C, dtype=torch.float64)


@each_reduction
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("radius", (0.3, RADIUS), ids=("number", "per class"))
@each_impl
def test_radius_margin_is_its_formula(impl, radius, dtype, reduction):
    """kexue 7708, with everything that composes."""
    operands, target, upstream = operands_of(11, dtype), classes(11), upstream_of(reduction, 11)
    class_weight, sample_weight = randn(C, seed=5).abs(), randn(11, seed=6).abs()

    def literal(input, weight, bias):
        valid = target >= 0
        t = torch.where(valid, target, 0)
        r = (RADIUS if isinstance(radius, Tensor) else torch.full((C,), radius, dtype=torch.float64))[t][:, None]
        norms = weight.square().sum(1).sqrt()
        onehot = torch.nn.functional.one_hot(t, C).bool()
        x = torch.nn.functional.linear(input, weight, bias)
        z = 1.3 * torch.where(onehot, x - r * norms, x + r * norms)
        log_p = z.log_softmax(1)
        rows = -0.9 * class_weight[t] * log_p.gather(1, t[:, None]).squeeze(1)
        rows = rows - 0.1 * (class_weight * log_p).mean(1) + 0.01 * z.logsumexp(1).square()
        rows = torch.where(valid, rows * sample_weight, 0.0)
        if reduction == "none":
            return rows
        return rows.sum() / ((valid * sample_weight * class_weight[t]).sum() if reduction == "mean" else 1)

    leaves = [x.double().requires_grad_() for x in operands]
    value = literal(*leaves)
    want = value.detach(), gradients_of((value * upstream).sum(), leaves)
    options = dict(scale=1.3, weight=class_weight, label_smoothing=0.1, z_loss=0.01, reduction=reduction)
    module = ik.RadiusMarginLoss(radius, **options, impl=impl, chunk_bytes=bytes_of(4, dtype))
    found = fused(module, operands, target, upstream, sample_weight=sample_weight)
    assert_close(found, want, 1e-11 if dtype == torch.float64 else 4e-2)


def test_radius_margin_survives_conversions():
    module = ik.RadiusMarginLoss(RADIUS).half().float()
    assert torch.equal(module._radius, RADIUS.float()) and list(module.state_dict()) == []


# ---------------------------------------------------------------- torch.compile

COMPILED = {
    "mean": ik.FocalLoss(chunk_bytes=bytes_of(4, torch.float32), weight=torch.linspace(0.5, 1, C)),
    "sum": ik.CrossEntropyLoss(reduction="sum", label_smoothing=0.1),
    "none": ik.FocalLoss(reduction="none", chunk_bytes=bytes_of(4, torch.float32)),
    "two temperatures": ik.SoftTruncationLoss(chunk_bytes=bytes_of(4, torch.float32)),
    "radius": ik.RadiusMarginLoss(0.2),
    "reference": ik.FocalLoss(impl="reference", chunk_bytes=bytes_of(4, torch.float32)),
    "triton": ik.CrossEntropyLoss(impl="triton"),
}


def compiled_step(owner, dtype):
    def step(input, target):
        return owner(input.tanh().to(dtype), target).sum()

    return step


@contextmanager
def compiled(function, backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    yield torch.compile(function, fullgraph=True, backend=counter), counter
    torch._dynamo.reset()


# The kernels that are compiled here, or emulated; a case may name another implementation.
native = pytest.mark.parametrize("impl", ("cuda",) if EMULATED else ("cpu",))


def owner_of(loss, dtype, cosine=False, impl=None):
    loss.impl = loss.impl or impl
    owner = ik.LinearLoss(D, C, loss, bias=not cosine, cosine=cosine, dtype=dtype)
    for parameter, value in zip(owner.parameters(), operands_of(1, dtype)[1:], strict=False):
        parameter.data.copy_(value)
    return owner


@native
@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, "aot_eager") for case in (*COMPILED, "bfloat16", "cosines")]
    + [(case, "inductor") for case in ("mean", "none", "bfloat16")],
)
def test_compile_once_for_every_number_of_rows(case, backend, impl):
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    loss = {"bfloat16": COMPILED["mean"], "cosines": ik.ArcFaceLoss(scale=4.0)}.get(case) or COMPILED[case]
    owner = owner_of(loss, dtype, cosine=case == "cosines", impl=impl)
    step = compiled_step(owner, dtype)
    with compiled(step, backend) as (run, counter):
        for num_rows in (9, 4, 33):
            found = []
            for function in (run, step):
                input, target = randn(num_rows, D, dtype=torch.float32).requires_grad_(), classes(num_rows)
                torch._dynamo.mark_dynamic(input, 0), torch._dynamo.mark_dynamic(target, 0)
                value = function(input, target)
                found.append([value.detach(), *torch.autograd.grad(value, [input, *owner.parameters()])])
            for got, want in zip(*found, strict=True):
                assert relative_error(got, want) < (2e-2 if dtype == torch.bfloat16 else 1e-5)
        assert counter.frame_count == 1


@native
def test_compile_under_autocast_and_without_a_gradient(impl):
    owner = owner_of(ik.CrossEntropyLoss(), torch.float32, impl=impl)

    def step(input, target):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return owner(input, target)

    input, target = randn(9, D, dtype=torch.float32), classes(9)
    with compiled(step, "aot_eager") as (run, _):
        gradients = [torch.autograd.grad(f(input, target), [*owner.parameters()]) for f in (run, step)]
        for got, want in zip(*gradients, strict=True):
            assert got.dtype == torch.float32 and relative_error(got, want) < 1e-6
        with torch.no_grad():
            assert torch.equal(run(input, target), step(input, target))


@native
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_compile_and_a_retained_graph(reduction, impl):
    owner = owner_of(ik.FocalLoss(reduction=reduction), torch.float32, impl=impl)
    step = compiled_step(owner, torch.float32)
    input, target = randn(9, D, dtype=torch.float32), classes(9)
    ones = torch.autograd.grad(step(input, target), [*owner.parameters()])
    not_donated = torch._functorch.config.patch(donated_buffer=False)
    with not_donated, compiled(step, "aot_eager") as (run, _):
        value = run(input, target)
        for upstream, retain in ((2.0, True), (3.0, True), (0.5, False)):
            found = torch.autograd.grad(value, [*owner.parameters()], torch.tensor(upstream), retain_graph=retain)
            for gradient, one in zip(found, ones, strict=True):
                assert relative_error(gradient, upstream * one) < 1e-6


# ---------------------------------------------------------------- opcheck and gradcheck


def op_arguments(op: str, impl: str, dtype: torch.dtype, probabilities: bool, num_rows: int, with_gradients: bool):
    input, weight, bias = operands_of(num_rows, dtype)
    total = torch.float64 if dtype == torch.float64 else torch.float32
    options = ik.SoftmaxLoss(label_smoothing=0.1, weight=torch.ones(C), reduction="sum")._options(input)
    options = options.to(torch.device("cpu"), total)
    target = randn(num_rows, C, seed=4).softmax(1).to(dtype) if probabilities else classes(num_rows)
    plan, wants = (impl, 4 * C * dtype.itemsize, "float32"), (with_gradients,) * 3
    rows = [randn(num_rows, seed=seed, dtype=total) for seed in range(5)]
    split, loss = (target, *split_arguments(options)), loss_arguments(target, options, rows[0].abs(), None)
    return {
        "linear_loss": (input, weight, bias, *loss, *(not probabilities,) * 2, *plan, *wants),
        "linear_loss_backward": (input, weight, bias, *loss._replace(reduction="none"), rows[1], *plan, *wants),
        "linear_split": (input, weight, bias, *split, *plan),
        "linear_split_backward": (input, weight, bias, *split, *rows, *plan, *wants),
    }[op]


@pytest.mark.parametrize("num_rows", (9, 0))
@pytest.mark.parametrize("with_gradients", (False, True))
@pytest.mark.parametrize("probabilities", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", SCHEMAS)
@each_impl
def test_opcheck(impl, op, dtype, probabilities, with_gradients, num_rows):
    arguments = op_arguments(op, impl, dtype, probabilities, num_rows, with_gradients)
    torch.library.opcheck(getattr(operations, op).default, arguments)


@each_impl
@each_reduction
def test_gradcheck(reduction, impl):
    operands, target = operands_of(4, torch.float64), torch.tensor([0, 2, -100, 28])
    leaves = [x.requires_grad_() for x in operands]
    keywords = dict(prior=ik.Prior(range(1, C + 1)), label_smoothing=0.1, z_loss=0.01, softcap=4.0)
    module = ik.FocalLoss(reduction=reduction, impl=impl, chunk_bytes=bytes_of(2, torch.float64), **keywords)
    assert torch.autograd.gradcheck(lambda x, w, b: module.linear(x, w, target, b), leaves, fast_mode=True)


# ---------------------------------------------------------------- errors name the argument


class DTensor(torch.Tensor):
    """Stands in for torch.distributed's, which is known by its name."""


def test_dtensor_raises_and_names_what_to_call():
    input, weight, bias = operands_of(5, torch.float32)
    target = classes(5)
    for loss in (ik.FocalLoss(), ik.SoftTruncationLoss(), ik.RadiusMarginLoss(0.1)):
        with pytest.raises(TypeError, match=r"linear_weight .*DTensor.*linear_weight\.full_tensor\(\)"):
            loss.linear(input, weight.as_subclass(DTensor), target)
        with pytest.raises(TypeError, match=r"linear_bias is a DTensor"):
            loss.linear(input, weight, target, bias.as_subclass(DTensor))
        with pytest.raises(TypeError, match=r"DTensor.*input\.to_local\(\)"):
            loss.linear(input.as_subclass(DTensor), weight, target)


X, W, B = operands_of(4, torch.float32)
T = torch.tensor([0, 1, 2, 28])
CE = ik.CrossEntropyLoss()
ERRORS = {
    "input's width": (lambda: CE.linear(X[:, :5], W, T), ValueError, r"input has shape \(4, 5\).*\(\.\.\., 12\)"),
    "no dimensions": (lambda: CE.linear(X[0, 0], W, T), ValueError, "input has shape"),
    "weight of K dimensions": (lambda: CE.linear(X, W[None], T), ValueError, r"linear_weight has shape \(1, 29, 12\)"),
    "bias": (lambda: CE.linear(X, W, T, B[1:]), ValueError, r"linear_bias has shape \(28,\).*\(29,\)"),
    "target": (lambda: CE.linear(X, W, T[:2]), ValueError, r"target has shape \(2,\).*\(4,\)"),
    "target's dtype": (lambda: CE.linear(X, W, T.short()), TypeError, "target has dtype torch.int16"),
    "target's range": (lambda: CE.linear(X, W, T + 1), IndexError, "target 29 is out of bounds"),
    "target's range, none": (
        lambda: ik.CrossEntropyLoss(reduction="none").linear(X, W, T - 1),
        IndexError,
        "target -1 is out of bounds",
    ),
    "probabilities": (lambda: CE.linear(X, W, X), ValueError, r"class probabilities.*shape \(4, 12\).*\(4, 29\)"),
    "probabilities with a gradient": (
        lambda: CE.linear(X, W, torch.ones(4, C, requires_grad=True)),
        ValueError,
        "target requires grad",
    ),
    "input's dtype": (lambda: CE.linear(X.long(), W, T), TypeError, "input has dtype torch.int64"),
    "weight's dtype": (lambda: CE.linear(X, W.double(), T), TypeError, "linear_weight has dtype torch.float64"),
    "halves with a float32 input": (
        lambda: CE.linear(X, W.half(), T),
        TypeError,
        "linear_weight has dtype torch.float16",
    ),
    "bias's dtype": (lambda: CE.linear(X, W, T, B.half()), TypeError, "linear_bias has dtype torch.float16"),
    "device": (lambda: CE.linear(X, W.to("meta"), T), ValueError, "linear_weight is on meta, but input is on cpu"),
    "class weights": (
        lambda: ik.CrossEntropyLoss(torch.ones(5)).linear(X, W, T),
        ValueError,
        r"weight has shape \(5,\).*29 classes",
    ),
    "sample_weight": (lambda: CE.linear(X, W, T, sample_weight=X), ValueError, "sample_weight has shape"),
    "chunk_bytes": (lambda: ik.CrossEntropyLoss(chunk_bytes=0).linear(X, W, T), ValueError, "chunk_bytes is 0"),
    "accumulate": (lambda: ik.CrossEntropyLoss(accumulate="half").linear(X, W, T), ValueError, "accumulate is 'half'"),
    "impl": (lambda: ik.CrossEntropyLoss(impl="tpu").linear(X, W, T), ValueError, "impl is 'tpu'"),
    "not cosines": (lambda: ik.ArcFaceLoss().linear(9 * X, W, T), ValueError, "cosines.*LinearLoss\\(cosine=True\\)"),
    "cosines with a bias": (lambda: ik.ArcFaceLoss().linear(X, W, T, B), ValueError, "linear_bias is given"),
    "cosine and bias": (lambda: ik.LinearLoss(D, C, bias=True, cosine=True), ValueError, "bias=True with cosine=True"),
    "a loss of torch's": (lambda: ik.LinearLoss(D, C, torch.nn.NLLLoss()), TypeError, "loss is a NLLLoss"),
    "not a layer": (lambda: ik.LinearLoss.from_linear(torch.nn.Embedding(C, D)), TypeError, "head is a Embedding"),
    "class_dim": (lambda: F.linear_cross_entropy(X, W, T, class_dim=1), TypeError, "class_dim"),
    "split of probabilities": (
        lambda: F.linear_target_and_rest(X, W, torch.ones(4, C)),
        ValueError,
        "linear_target_and_rest needs class indices",
    ),
    "split's bias": (lambda: F.linear_target_and_rest(X, W, T, bias=B[1:]), ValueError, r"bias has shape \(28,\)"),
    "radius on logits": (lambda: ik.RadiusMarginLoss(0.1)(X, T), TypeError, r"loss\.linear\(input.*LinearLoss"),
    "radius below 0": (lambda: ik.RadiusMarginLoss(-0.1), ValueError, "radius is -0.1"),
    "radius' shape": (lambda: ik.RadiusMarginLoss(torch.ones(3)).linear(X, W, T), ValueError, "radius has shape"),
    "radius and a margin": (lambda: ik.RadiusMarginLoss(0.1, margin=0.1), TypeError, "takes no margin"),
    "radius of probabilities": (
        lambda: ik.RadiusMarginLoss(0.1).linear(X, W, torch.ones(4, C)),
        ValueError,
        "a margin needs class indices",
    ),
}


@each_reduction
@each_impl
def test_a_bad_target_raises_before_anything_is_multiplied(impl, reduction):
    module = ik.FocalLoss(reduction=reduction, impl=impl, chunk_bytes=1)
    with counted_products() as products, pytest.raises(IndexError, match="target 29 is out of bounds"):
        module.linear(X, W, T + 1)
    assert products == []


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_names_the_argument(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()
