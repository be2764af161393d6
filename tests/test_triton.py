"""What is Triton's own: its functions, block boundaries, targets that are no class, approximations, other versions.

The kernels run in Triton's interpreter where there is no GPU (conftest.py). The tables of the other files run them
through everything that all implementations share.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import oracle
import pytest
import sigmoid_oracle
import torch
import triton
import triton.language as tl
from binary_cases import (
    CASES,
    logits_and_labels,
    product_halves,
    specification,
    tolerance,
    worst,
)
from test_triton_compile import VERSIONS, folder, require
from triton.runtime import interpreter

from imbalance_kernels.binary_objectives import BINARY_REGISTRY
from imbalance_kernels.functional import sigmoid_loss, softmax_loss
from imbalance_kernels.objectives import REGISTRY
from imbalance_kernels.ops.kernel_arguments import objective_arguments, split_arguments
from imbalance_kernels.ops.kernels import SCHEMAS
from imbalance_kernels.ops.kernels import kernels as operations_of
from imbalance_kernels.options import SoftmaxOptions
from imbalance_kernels.triton_kernels import binary_objectives, launch, objectives
from imbalance_kernels.triton_kernels import math as functions
from imbalance_kernels.triton_kernels import sigmoid_loss as sigmoid_kernels
from imbalance_kernels.triton_kernels import softmax_loss as kernels


def test_operations_have_the_schemas_of_the_extension():
    for name in SCHEMAS:
        ours, theirs = (
            getattr(getattr(torch.ops, namespace), name).default._schema
            for namespace in ("imbalance_kernels_triton", "imbalance_kernels")
        )
        assert str(ours).partition("::")[2] == str(theirs).partition("::")[2].replace("imbalance_kernels", "")


def test_every_objective_of_the_registry_is_there():
    assert list(objectives.OBJECTIVES) == list(REGISTRY)


@triton.jit
def _evaluate(d, first, second, value, slope, objective: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    found = objective(objectives.truth_of(tl.load(d + at)), tl.load(first + at), tl.load(second))
    tl.store(value + at, found[0])
    tl.store(slope + at, found[1])


# Some of each kind: where powers are products (0, 1, 2), and where they are not.
PARAMETERS = {
    "cross_entropy": [()],
    "focal": [(0.0,), (0.5,), (1.0,), (2.0,), (5.0,)],
    "hard_truncation": [(0.5,), (0.9,), (1.0,)],
    "soft_truncation": [(1.0,), (3.3,)],
    "poly": [(1.0,), (-1.0,)],
    "poly_focal": [(2.0, 1.0), (0.5, -0.7)],
    "gce": [(0.7,), (1.0,), (1e-3,)],
    "smooth_accuracy": [()],
    "token_scaled": [()],
}
CANCELLING = {"focal", "soft_truncation", "poly", "poly_focal"}  # values or slopes that are a difference somewhere


def test_every_objective_has_parameters_to_try():
    assert list(PARAMETERS) == list(REGISTRY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [(name, p) for name in PARAMETERS for p in PARAMETERS[name]], ids=str)
def test_objectives_equal_the_registry(case, dtype):
    """Value and slope at a thousand log-odds, and at both ends."""
    name, parameters = case
    d = torch.cat([torch.linspace(-60, 60, 1019), torch.tensor([0.0, -1e4, 1e4, -math.inf, math.inf])]).to(dtype)
    objective = REGISTRY[name](*parameters)
    first, second = (*objective.kernel_parameters(), 0.0, 0.0)[:2]
    numbers = torch.full_like(d, first), torch.tensor(second, dtype=dtype)
    value, slope = torch.empty_like(d), torch.empty_like(d)
    _evaluate[(1,)](d, *numbers, value, slope, objectives.OBJECTIVES[name], d.numel())
    away = torch.ones_like(d, dtype=torch.bool)
    if name == "hard_truncation":  # the limit in float32 and in float64 lies on two sides of what is near it
        away = (d.double() - first).abs() > 1e-5
        away |= d.double() == first
    exact_value, exact_slope = objective.value(d.double()), objective.slope(d.double())
    unit = torch.finfo(dtype).eps
    # Relative to what is compared, or to its terms where they cancel; powers lose what their exponents are large.
    term = -torch.nn.functional.logsigmoid(d.double()) if name in CANCELLING else torch.zeros_like(exact_value)
    term = torch.where(d.isinf(), 0.0, term)
    for found, exact in ((value, exact_value), (slope, exact_slope)):
        size = torch.maximum(exact.abs(), term)
        same = (found.double() == exact) | ((found.double() - exact).abs() <= 150 * unit * size + 1e-37)
        assert same[away].all(), d[away & ~same]


# ---------------------------------------------------------------- binary objectives


def test_every_binary_objective_of_the_registry_is_there():
    assert list(binary_objectives.BINARY_OBJECTIVES) == list(BINARY_REGISTRY)


@triton.jit
def _evaluate_sides(
    x,
    y,
    exponent,
    numbers,
    results,  # (6, BLOCK): both sides with slopes; value and slope of a hard label
    objective: tl.constexpr,
    hard: tl.constexpr,
    soft: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    logits = tl.load(x + at)
    labels = tl.load(y + at)
    positive = labels == 1
    t = objectives.truth_of(logits)
    of_truth = objectives.truth_of(tl.where(positive, logits, -logits))
    if exponent is None:
        sides = soft(t, labels, numbers.first, numbers, objective)
        found = hard(of_truth, positive, numbers.first, numbers, objective)
    else:
        sides = soft(t, labels, tl.load(exponent + at), numbers, objective)
        found = hard(of_truth, positive, tl.load(exponent + at), numbers, objective)
    tl.store(results + at, sides[0])
    tl.store(results + BLOCK + at, sides[1])
    tl.store(results + 2 * BLOCK + at, sides[2])
    tl.store(results + 3 * BLOCK + at, sides[3])
    tl.store(results + 4 * BLOCK + at, found[0])
    tl.store(results + 5 * BLOCK + at, found[1])


def evaluate_sides(name, parameters, x, y, products):
    """Both sides with their slopes, and what a hard label costs; exponents as products where they can be, if asked."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    results = torch.empty(6, len(x), dtype=x.dtype)
    numbers = sigmoid_kernels.numbers_of(name, BINARY_REGISTRY[name](*parameters).kernel_parameters(), products, x)
    first = None if products or not parameters else torch.full_like(x, float(numbers.first))
    _evaluate_sides[(1,)](x, y, first, numbers, results, *binary_objectives.BINARY_OBJECTIVES[name], len(x))
    return list(results.numpy())


def padded(*arrays):
    """To a power of two, as blocks are."""
    size = 1 << (len(arrays[0]) - 1).bit_length()
    return [np.concatenate([array, np.full(size - len(array), array[-1])]) for array in arrays]


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name, parameters", CASES)
def test_binary_objectives_equal_the_registry(name, parameters, dtype):
    """Both sides of soft labels and hard ones, and hard labels by their own function."""
    x, y = padded(*logits_and_labels(dtype, name, parameters))
    exact = specification(name, parameters, x, y)
    allowed = tolerance(name, parameters, x, y, exact, np.finfo(dtype).eps, np.finfo(dtype).tiny)
    for products in (False, True) if product_halves(name, parameters) else (False,):
        *sides, value, slope = evaluate_sides(name, parameters, x, y, products)
        missed = worst(sides, exact, allowed, x, y)
        assert not missed, (products, missed)
        for label, sign, of_value in ((1, 1, 0), (0, -1, 2)):
            of = y == label
            found = [value[of], sign * slope[of]] * 2
            right = [exact[of_value][of], exact[of_value + 1][of]] * 2
            missed = worst(found, right, [allowed[of_value][of], allowed[of_value + 1][of]] * 2, x[of], y[of])
            assert not missed, (products, "hard", missed)


@pytest.mark.parametrize("name, parameters", CASES)
def test_binary_objectives_equal_the_registry_at_the_ends(name, parameters):
    """Of hard labels: infinite where the specification is, finite slopes, and a NaN stays one."""
    for dtype in (np.float32, np.float64):
        x = np.tile(np.array([math.inf, -math.inf, 1e4, -1e4, 0.0, math.nan, 1e3, -1e3], dtype), 2)
        y = np.repeat(np.array([0.0, 1.0], dtype), 8)
        exact = specification(name, parameters, x, y)
        for products in (False, True) if product_halves(name, parameters) else (False,):
            *sides, value, slope = evaluate_sides(name, parameters, x, y, products)
            for label, sign, of_value in ((1, 1, 0), (0, -1, 2)):
                of = y == label
                for found, right in (
                    (sides[of_value], exact[of_value]),
                    (sides[of_value + 1], exact[of_value + 1]),
                    (value, exact[of_value]),
                    (sign * slope, exact[of_value + 1]),
                ):
                    np.testing.assert_allclose(found[of], right[of], rtol=3e-5, atol=1e-30)
                    assert np.isnan(found[of]).tolist() == [False] * 5 + [True] + [False] * 2


def test_binary_objectives_equal_the_registry_where_a_score_is_met():
    """Nothing is missed: cost and slope are exactly 0, of beta 1 too, whose slope jumps there."""
    for dtype in (np.float32, np.float64):
        x, y = np.zeros(4, dtype), np.full(4, 0.5, dtype)
        for beta in (1.0, 1.3, 2.0):
            for products in (False, True):
                *sides, _, _ = evaluate_sides("quality_focal", (beta,), x, y, products)
                assert all((side == 0).all() for side in sides)


def test_exponents_are_products_where_they_can_be():
    """A compile-time number of halves; a class vector's exponents never are."""
    logits = torch.empty(0)
    for name, parameters in CASES:
        numbers = sigmoid_kernels.numbers_of(name, BINARY_REGISTRY[name](*parameters).kernel_parameters(), True, logits)
        halves = [getattr(x, "value", x) for x in numbers[3:]]
        assert halves == [*product_halves(name, parameters), None, None][:2]
        assert sigmoid_kernels.numbers_of(name, parameters, False, logits)[3:] == (None, None)


# ---------------------------------------------------------------- elementary functions


@triton.jit
def _apply(x, y, function: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, function(tl.load(x + at)))


def apply(function, x, device="cpu"):
    x = x.to(device)
    y = torch.empty_like(x)
    _apply[(1,)](x, y, function, x.numel())
    return y.cpu()


SMALL = np.geomspace(1e-30, 1, 1024)
UNIT = np.linspace(0, 1, 1024)

# function: (exact, inputs, units in the last place in float32, and in float64); those measured, rounded up
FUNCTIONS = {
    functions.exp_nonpositive: (mpmath.exp, -85 * UNIT, 3, 2),
    functions.expm1_nonpositive: (mpmath.expm1, -np.concatenate([SMALL, 80 * UNIT]), 4, 3),
    functions.log1p_unit: (mpmath.log1p, np.concatenate([SMALL, UNIT]), 4, 4),
    functions.tanh_slope: (lambda x: mpmath.sech(x) ** 2, np.geomspace(1e-6, 30, 2048), 8, 6),
    functions.arccos: (mpmath.acos, np.concatenate([0.999999 - 1.999 * UNIT, 0.6 - 1.2 * UNIT]), 4, 4),
}


def check_function(function, dtype, device="cpu"):
    exact_function, inputs, single, double = FUNCTIONS[function]
    x = torch.tensor(inputs).to(dtype)
    found = apply(function, x, device)
    with mpmath.workprec(120):
        right = [exact_function(mpmath.mpf(at)) for at in x.tolist()]
        error = torch.tensor([float(abs(mpmath.mpf(y) - r)) for y, r in zip(found.tolist(), right, strict=True)])
    unit = torch.tensor(np.spacing(np.abs(np.array([float(r) for r in right], str(dtype)[6:]))))
    assert float((error / unit).max()) <= (single if dtype == torch.float32 else double)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_in_units_in_the_last_place(function, dtype):
    check_function(function, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh(dtype):
    """To a few units of the result in float32, of 1 in float64."""
    x = torch.cat([torch.logspace(-6, 1, 1024), torch.linspace(-3, 3, 1024)]).to(dtype)
    right = torch.tensor([float(mpmath.tanh(at)) for at in x.tolist()], dtype=torch.float64)
    found = apply(functions.tanh, x).double()
    unit = torch.finfo(dtype).eps
    assert ((found - right).abs() <= 3 * unit * (right.abs() if dtype == torch.float32 else 1)).all()


def test_ends_of_the_functions():
    inf, nan = math.inf, math.nan
    for function, x, right in (
        (functions.exp_nonpositive, [0, -inf, nan, -1e4], [1, 0, nan, 0]),
        (functions.expm1_nonpositive, [0, -inf, nan, -1e4], [0, -1, nan, -1]),
        (functions.log1p_unit, [0, nan, 0, 0], [0, nan, 0, 0]),
        (functions.tanh, [inf, -inf, nan, 0], [1, -1, nan, 0]),
        (functions.tanh_slope, [inf, -inf, nan, 0], [0, 0, nan, 1]),
    ):
        for dtype in (torch.float32, torch.float64):
            found = apply(function, torch.tensor(x, dtype=dtype))
            torch.testing.assert_close(found, torch.tensor(right, dtype=dtype), rtol=0, atol=1e-30, equal_nan=True)


# ---------------------------------------------------------------- shapes


def loss_and_gradient(logits, target, device="cpu", impl="triton", **options):
    leaf = logits.to(device, copy=True).requires_grad_()
    loss = softmax_loss(leaf, target.to(device), impl=impl, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach().cpu(), gradient.cpu()


# On each side of: a block, a unit of widths, rows that share a program, the longest row of one program (16384 in
# float32, 8192 in float64), one and two blocks of a long one.
WIDTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 128, 129, 1000, 2047, 8192, 8193, 16384, 16385, 24577]


def check_block_boundary(num_classes, dtype, device="cpu", impl="triton"):
    """The target first, last and in between, masks beside it; then class weights spread over the rows."""
    target = torch.tensor([0, num_classes - 1, num_classes // 2, 0])
    logits = torch.randn(4, num_classes).to(dtype)
    if num_classes > 2:
        logits[:, 1 : num_classes - 1 : 3] = -math.inf
        target[2] = target[2] // 3 * 3
    options = {"prior": torch.softmax(torch.randn(num_classes), 0)}
    right, exact = oracle.loss_and_gradient(logits, 1.0, target=target, **options)
    loss, gradient = loss_and_gradient(logits, target, device, impl, **options)
    assert float(loss) == pytest.approx(float(right), rel=1e-5, abs=1e-6)
    assert oracle.worst_row_error(gradient, exact) <= (8e-3 if dtype == torch.bfloat16 else 1e-5)
    logits = torch.randn(4, num_classes).to(dtype)
    options = {"label_smoothing": 0.2, "weight": torch.rand(num_classes) + 0.5, "z_loss": 1e-3}
    for labels in (target, torch.softmax(torch.randn(4, num_classes), 1).to(dtype)):
        right, exact = oracle.loss_and_gradient(logits, 1.0, target=labels, **options)
        moved = {**options, "weight": options["weight"].to(device)}
        loss, gradient = loss_and_gradient(logits, labels, device, impl, **moved)
        assert float(loss) == pytest.approx(float(right), rel=1e-5)
        if num_classes == 1:  # all but the z-loss cancels: relative to the terms, which are weights of up to 1.5
            assert float((gradient.double() - exact).abs().max()) <= 1e-6
            continue
        assert oracle.worst_row_error(gradient, exact) <= (8e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_classes", WIDTHS)
def test_across_every_block_boundary(num_classes, dtype):
    check_block_boundary(num_classes, dtype)


def test_more_programs_than_one_turn_of_long_rows():
    """Programs of long rows take several, each from where the last left off."""
    assert launch.long_programs(torch.empty(7, 20000), reads_again=True) < 7
    logits, target = torch.randn(7, 20000), torch.randint(20000, (7,))
    right, exact = oracle.loss_and_gradient(logits, 1.0, target=target)
    loss, gradient = loss_and_gradient(logits, target)
    assert float(loss) == pytest.approx(float(right), rel=1e-5)
    assert oracle.worst_row_error(gradient, exact) < 1e-5


def test_rows_over_a_cluster(monkeypatch):
    """The interpreter has no clusters, but it has the kernel that they run: a row of more than 16384 at once."""
    device = launch.device_of(torch.device("cpu"))._replace(has_clusters=True)
    monkeypatch.setattr(launch, "device_of", lambda _: device)
    logits = torch.empty(1, 40000)
    assert launch.row_tile(logits) is None and launch.cluster_tile(logits).num_ctas == 4
    logits, target = torch.randn(3, 40000), torch.tensor([0, 39999, 17000])
    right, exact = oracle.loss_and_gradient(logits, 1.0, target=target, label_smoothing=0.1)
    loss, gradient = loss_and_gradient(logits, target, label_smoothing=0.1)
    assert float(loss) == pytest.approx(float(right), rel=1e-5)
    assert oracle.worst_row_error(gradient, exact) < 1e-5


@pytest.mark.parametrize("num_classes", [2**20, 2**20 - 1])
def test_a_million_classes(num_classes):
    logits, target = torch.randn(1, num_classes), torch.tensor([num_classes - 1])
    right, exact = oracle.loss_and_gradient(logits, 1.0, target=target)
    loss, gradient = loss_and_gradient(logits, target)
    assert float(loss) == pytest.approx(float(right), rel=1e-5)
    assert oracle.worst_row_error(gradient, exact) < 1e-5


@pytest.mark.parametrize("num_classes", [50, 20000])
def test_offsets_beyond_32_bits(num_classes, monkeypatch):
    """In place, on rows so far apart that the memory between them is never touched."""
    # The interpreter would copy all of it onto itself.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    stride = 2**31 + 16
    storage = torch.empty(2 * stride + num_classes, dtype=torch.bfloat16)
    far = storage.as_strided((3, num_classes), (stride, 1)).copy_(torch.randn(3, num_classes))
    near, target = far.contiguous(), torch.tensor([0, 7, num_classes - 1])
    loss, *_ = kernels.softmax_loss_(far, target, *arguments(), False, False)
    assert torch.equal(loss, kernels.softmax_loss_(near, target, *arguments(), False, False)[0])
    assert torch.equal(far, near)


# ---------------------------------------------------------------- targets that are no class, and nothing to do


def arguments(options=None, sample_weight=None, normalizer=None, reduction="sum"):
    options = SoftmaxOptions() if options is None else options
    return (
        *split_arguments(options),
        *objective_arguments(options.objective),
        sample_weight,
        normalizer,
        reduction,
        options.z_loss,
    )


class Reads:
    """Which bytes the interpreter reads through unmasked lanes."""

    def __init__(self, monkeypatch):

        self.addresses = []
        load = interpreter._interpreter.load

        def record(pointers, mask, other, dtype):
            self.addresses.append(np.asarray(pointers)[np.asarray(mask)].ravel())
            return load(pointers, mask, other, dtype)

        monkeypatch.setattr(interpreter, "_interpreter", Recorder(interpreter._interpreter, record))

    def rows(self, tensor):
        """The rows of a tensor (N, C) that were read."""
        begin, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
        everything = np.concatenate(self.addresses).astype(np.int64)
        inside = everything[(everything >= begin) & (everything < begin + step * tensor.shape[0])]
        return sorted(set(((inside - begin) // step).tolist()))


class Recorder:
    def __init__(self, module, load):
        self.load = load
        self.store = module.store


@pytest.mark.parametrize("num_classes", [50, 20000])
def test_rows_without_a_class_are_not_read(num_classes, monkeypatch):
    """Not ignored ones, nor those whose target is outside: DESIGN.md's rule for a GPU, where nothing raises."""
    logits = torch.randn(5, num_classes)
    target = torch.tensor([3, -100, num_classes, -1, 2**40])
    reads = Reads(monkeypatch)
    loss, gradient, *_ = kernels.softmax_loss(logits, target, *arguments(reduction="mean"), True, False, False)
    assert reads.rows(logits) == [0]
    assert math.isnan(loss) and gradient[2:].isnan().all() and (gradient[1] == 0).all()
    assert torch.isfinite(gradient[0]).all()


def check_targets_outside(num_classes, smoothing, device="cpu", impl="triton"):
    """A row whose target is no class is NaN, out of the divisor, and no other row notices."""
    operations = operations_of(impl)
    options = SoftmaxOptions(label_smoothing=smoothing)
    logits = torch.randn(6, num_classes).to(device)
    target = torch.tensor([3, num_classes, 7, -1, -100, 0]).to(device)
    good = [0, 2, 4, 5]
    asked, not_asked = (True, True), (False, False)  # for log_probs and correct
    none, mean = (arguments(options, reduction=reduction) for reduction in ("none", "mean"))
    losses, _, *of_rows = operations.softmax_loss(logits, target, *none, False, *asked)
    alone, _, *of_good_rows = operations.softmax_loss(logits[good], target[good], *none, False, *asked)
    assert torch.equal(losses[good], alone) and losses[[1, 3]].isnan().all()
    assert all(torch.equal(vector[good], right) for vector, right in zip(of_rows, of_good_rows, strict=True))
    assert of_rows[0][[1, 3]].isnan().all() and not of_rows[1][[1, 3]].any()
    mean, gradient, *_ = operations.softmax_loss(logits, target, *mean, True, *not_asked)
    _, of_good, *_ = operations.softmax_loss(
        logits[good], target[good], *arguments(options, reduction="mean"), True, *not_asked
    )
    assert mean.isnan() and torch.equal(gradient[good], of_good) and gradient[[1, 3]].isnan().all()
    split = operations.target_and_rest(logits, target, *split_arguments(options))
    assert all(vector[[1, 3]].isnan().all() for vector in split if vector.numel())
    upstream = [torch.randn(6, device=device) for _ in range(3)]
    backward = operations.target_and_rest_backward(logits, target, *split_arguments(options), *split[1:3], *upstream)
    assert backward[[1, 3]].isnan().all() and torch.isfinite(backward[good]).all()


@pytest.mark.parametrize("num_classes", [50, 20000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_outside_makes_its_row_nan_and_no_other(num_classes, smoothing):
    check_targets_outside(num_classes, smoothing)


def test_an_upstream_gradient_of_one_costs_one_number(monkeypatch):
    gradient = torch.randn(100, 1000)
    before = gradient.clone()
    reads = Reads(monkeypatch)
    kernels.scale_(gradient, torch.tensor(1.0))
    assert reads.rows(gradient) == [] and torch.equal(gradient, before)
    kernels.scale_(gradient, torch.tensor(-0.5))
    assert len(reads.rows(gradient)) == 100 and torch.equal(gradient, -0.5 * before)


@pytest.mark.parametrize("num_classes", [30, 20000])
def test_a_normalizer_of_zero_reads_no_row(num_classes, monkeypatch):
    logits, target = torch.full((4, num_classes), math.nan), torch.arange(4)
    reads = Reads(monkeypatch)
    none = arguments(normalizer=torch.zeros(()))
    loss, gradient, *_ = kernels.softmax_loss(logits, target, *none, True, False, False)
    assert reads.rows(logits) == [] and loss == 0 and (gradient == 0).all()
    kernels.softmax_loss(logits, target, *arguments(normalizer=torch.ones(())), True, False, False)
    assert reads.rows(logits) == [0, 1, 2, 3]


def test_operations_called_directly_check_what_they_get():
    x, target = torch.randn(6, 5), torch.arange(5) % 5
    good, nothing = arguments(), (False, False, False)
    with pytest.raises(ValueError, match="must be .N, C. rows"):
        kernels.softmax_loss(x.t(), torch.zeros(5, dtype=torch.long), *good, *nothing)
    with pytest.raises(ValueError, match="target must be of shape .6,."):
        kernels.softmax_loss(x, target, *good, *nothing)
    with pytest.raises(ValueError, match="upstream gradient of 'none'"):
        kernels.softmax_loss_(x, torch.zeros(6, dtype=torch.long), *arguments(reduction="none"), False, False)
    with pytest.raises(ValueError, match="sample_weight must be .6,."):
        kernels.softmax_loss(x, torch.zeros(6, dtype=torch.long), *arguments(sample_weight=torch.ones(5)), *nothing)
    with pytest.raises(TypeError, match="sample_weight has dtype"):
        half = arguments(sample_weight=torch.ones(6).half())
        kernels.softmax_loss(x, torch.zeros(6, dtype=torch.long), *half, *nothing)
    with pytest.raises(ValueError, match="'mine', which the kernels do not know"):
        kernels.softmax_loss(x, torch.zeros(6, dtype=torch.long), *good[:10], "mine", *good[11:], *nothing)
    with pytest.raises(ValueError, match="reduction is 'average'"):
        kernels.softmax_loss(x, torch.zeros(6, dtype=torch.long), *arguments(reduction="average"), *nothing)
    with pytest.raises(ValueError, match="upstream must be .6,."):
        none = arguments(reduction="none")
        kernels.softmax_loss_backward(x, torch.zeros(6, dtype=torch.long), *none, torch.ones(5))


def test_a_unit_is_16_bytes_or_one_element():
    """So that all rows of a tensor are aligned alike, and summed in the same order."""
    for num_classes, dtype, unit in (
        (1000, torch.bfloat16, 8),
        (1004, torch.bfloat16, 1),
        (1004, torch.float32, 4),
        (8142, torch.float32, 1),
        (8142, torch.float64, 2),
        (128256, torch.bfloat16, 16),
    ):
        for logits in (torch.empty(3, num_classes, dtype=dtype), torch.empty(3, num_classes, dtype=dtype)[1:2]):
            widths, found = launch.widths_of(logits, logits)
            assert found == unit and widths == (num_classes // unit,) * 3
    assert launch.widths_of(torch.empty(3, 1001)[:, :1000])[1] == 1


def test_programs_of_long_rows():
    """One for each processor, fewer where their rows would not stay in the cache: never a second, mostly idle wave."""
    device = launch.Device(processors=132, warp=32, cache_bytes=50 << 20, has_clusters=False)
    for num_rows, num_classes, dtype, programs in (
        (8192, 32000, torch.bfloat16, 132),
        (8192, 128256, torch.bfloat16, 132),
        (8192, 128256, torch.float32, 71),
        (8192, 1 << 20, torch.float32, 66),  # half of the processors at least
        (5, 128256, torch.bfloat16, 5),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "device_of", lambda _: device)
            assert (
                launch.long_programs(torch.empty(num_rows, num_classes, dtype=dtype, device="meta"), True) == programs
            )
            assert launch.long_programs(torch.empty(num_rows, 20000, device="meta"), False) == num_rows


def test_a_long_sum_of_losses():
    """More rows than one program sums at once, and than one block of its sum."""
    logits, target = torch.randn(9001, 2), torch.randint(2, (9001,))
    weight = torch.rand(9001)
    loss, _ = loss_and_gradient(logits, target, sample_weight=weight)
    right, _ = oracle.loss_and_gradient(logits, 1.0, target=target, sample_weight=weight)
    assert float(loss) == pytest.approx(float(right), rel=1e-6)


# ---------------------------------------------------------------- sigmoid_loss


def sigmoid_call(logits, target, upstream=1.0, **options):
    leaf = logits.clone().requires_grad_()
    loss = sigmoid_loss(leaf, target, impl="triton", **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss))
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", [1, 2, 7, 8, 16, 91, 80, 2047, 2048, 2049, 8192, 8193, 20000])
def test_sigmoid_loss_across_every_tile_boundary(num_classes, dtype):
    """Vectors within rows, over rows, and none; tiles of several rows, of one, and pieces; beside them strided rows."""
    for num_rows in (1, 5, 8):
        wide = torch.randn(num_rows, num_classes + 8).to(dtype)
        target = torch.randint(num_classes + 1, (num_rows,))
        target[0] = num_classes - 1
        weight = torch.rand(num_classes)
        for logits in (wide[:, :num_classes], wide[:, :num_classes].contiguous()):
            options = {"pos_weight": weight, "reduction": "sum"}
            right, exact = oracle.loss_and_gradient(logits, 1.0, function=sigmoid_oracle.loss, target=target, **options)
            loss, gradient = sigmoid_call(logits, target, **options)
            assert float(loss) == pytest.approx(float(right), rel=2e-6)
            assert oracle.worst_row_error(gradient, exact) <= (8e-3 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("shape", [(2, 3, 1), (3, 1, 70), (2, 21, 100), (1, 19, 2100), (2, 40, 9), (2, 7, 16)], ids=str)
def test_sigmoid_loss_across_the_tiles_of_images(shape):
    images = torch.randn(shape)
    num_rows = shape[0] * shape[2]
    rows = images.transpose(1, 2).reshape(num_rows, shape[1])
    target = torch.randint(shape[1] + 1, (num_rows,))
    right, exact = oracle.loss_and_gradient(rows, 1.0, function=sigmoid_oracle.loss, target=target)
    loss, gradient = sigmoid_call(images, target.view(shape[0], shape[2]))
    assert float(loss) == pytest.approx(float(right), rel=2e-6)
    assert oracle.worst_row_error(gradient.transpose(1, 2).reshape(rows.shape), exact) <= 2e-6


def test_the_quotient_of_flat_tiles_is_exact():
    """Of every number that a tile may divide by every width that it may have."""
    beyond = np.arange(sigmoid_kernels.TILE + sigmoid_kernels.FLAT_CLASSES, dtype=np.uint64)
    bits = sigmoid_kernels.QUOTIENT_BITS.value
    assert ((beyond << np.uint64(32 - bits)) < 2**31).all()
    for num_classes in range(1, sigmoid_kernels.FLAT_CLASSES + 1):
        logits = torch.empty(1, num_classes, device="meta")
        tile = sigmoid_kernels.tile_of(logits, None)
        assert tile.layout == "flat" and tile.reciprocal < 2**31
        here = beyond[: sigmoid_kernels.TILE + num_classes]
        quotient = ((here << np.uint64(32 - bits)) * np.uint64(tile.reciprocal)) >> np.uint64(32)
        assert (quotient == here // np.uint64(num_classes // tile.unit)).all()


@pytest.mark.parametrize("num_classes", [50, 9000])
def test_sigmoid_offsets_beyond_32_bits(num_classes, monkeypatch):
    """In place, on rows so far apart that the memory between them is never touched; then images and their classes."""
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    stride = 2**31 + 16
    storage = torch.empty(2 * stride + num_classes, dtype=torch.bfloat16)
    call = ("focal", [2.0], None, 0.25, 0.75, None, None, None, None, None, -100, "sum")
    for shape, strides in (((3, num_classes), (stride, 1)), ((1, 3, num_classes), (stride, stride, 1))):
        far = storage.as_strided(shape, strides).copy_(torch.randn(shape))
        near = far.contiguous()
        target = torch.randint(4, (3 if len(shape) == 2 else num_classes,))
        loss = sigmoid_kernels.sigmoid_loss_(far, target, *call)
        torch.testing.assert_close(loss, sigmoid_kernels.sigmoid_loss_(near, target, *call), rtol=1e-6, atol=0)
        assert torch.equal(far, near)


@pytest.mark.parametrize("as_images", [False, True])
@pytest.mark.parametrize("as_lists", [False, True])
def test_a_label_outside_makes_its_row_nan_and_no_other(as_images, as_lists):
    """Out of the divisor of labels. A sample weight of 0 wins over it, a class weight of 0 does not."""
    logits = torch.randn(6, 5)
    target = torch.tensor([3, 6, 5, -1, -100, 2**40])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    if as_lists:  # where the background is no class
        target = torch.stack([torch.tensor([3, 6, 0, -1, -100, 2**40]), torch.full((6,), -100)], dim=1)
    given = logits.t()[None].contiguous() if as_images else logits
    call = (target, "cross_entropy", [], None, 1.0, 0.0, None, None, None, weight, None, -100)
    losses, _ = sigmoid_kernels.sigmoid_loss(given, *call, "none", False)
    upstream = torch.rand(given.shape)
    gradient = sigmoid_kernels.sigmoid_loss_backward(given, *call, "none", upstream)
    mean, of_mean = sigmoid_kernels.sigmoid_loss(given, *call, "mean", True)
    assert mean.isnan()
    for found in (losses, gradient, of_mean):
        found = found[0].t() if as_images else found
        assert found.isnan().all(dim=1).tolist() == [False, True, False, True, False, False]
        assert found.isnan().any(dim=1).tolist() == [False, True, False, True, False, False]
        assert (found[4:] == 0).all()
    of_mean = of_mean[0].t() if as_images else of_mean
    divisor = 6 * 5 if as_lists else 2 * 5  # logits, or those of the rows with a class and the background
    slope = torch.sigmoid(logits[0, 3]) - 1
    assert float(of_mean[0, 3]) == pytest.approx(float(slope) / divisor, rel=1e-5)


def test_a_hard_labels_bits_are_the_same_among_soft_ones():
    """Soft labels take another way, found tile by tile."""
    logits, labels = torch.randn(64, 16) * 4, (torch.rand(64, 16) < 0.3).float()
    for name in ("focal", "quality_focal", "asymmetric"):
        options = {"objective": BINARY_REGISTRY[name](), "reduction": "none"}
        alone = sigmoid_call(logits, labels, **options)
        soft = labels.clone()
        soft[::3, ::5] = 0.37
        among = sigmoid_call(logits, soft, **options)
        for before, after in zip(alone, among, strict=True):
            assert torch.equal(before[soft == labels], after[soft == labels])
            assert not torch.equal(before, after)


def test_sigmoid_operations_called_directly_check_what_they_get():
    x, target = torch.randn(6, 5), torch.zeros(6, dtype=torch.long)

    def call(target=target, objective="focal", weight=None, sample_weight=None, reduction="sum"):
        return (target, objective, [2.0], None, 1.0, 1.0, weight, None, None, sample_weight, None, -100, reduction)

    loss = sigmoid_kernels.sigmoid_loss
    for message, arguments in (
        ("logits must be .N, C. rows or .B, C, P. images", (x.t(), *call(torch.zeros(5)))),
        ("target has shape", (x, *call(target[:5]))),
        ("target has shape", (x, *call(torch.zeros(6, 4)))),
        ("'mine', which the kernels do not know", (x, *call(objective="mine"))),
        ("reduction is 'average'", (x, *call(reduction="average"))),
        ("positive_weight must be .5,.", (x, *call(weight=torch.ones(4)))),
        ("sample_weight must be .6,.", (x, *call(sample_weight=torch.ones(5)))),
    ):
        with pytest.raises(ValueError, match=message):
            loss(*arguments, False)
    for message, arguments in (
        ("input has dtype", (x.long(), *call())),
        ("positive_weight has dtype", (x, *call(weight=torch.ones(5).half()))),
        ("sample_weight has dtype", (x, *call(sample_weight=torch.ones(6, 5).half()))),
    ):
        with pytest.raises(TypeError, match=message):
            loss(*arguments, False)
    with pytest.raises(ValueError, match="upstream gradient of 'none'"):
        sigmoid_kernels.sigmoid_loss_(x, *call(reduction="none"))
    with pytest.raises(ValueError, match="upstream must be .6, 5."):
        sigmoid_kernels.sigmoid_loss_backward(x, *call(reduction="none"), torch.ones(6))


# ---------------------------------------------------------------- approximate instructions


def test_accuracy_with_the_approximations_of_a_gpu(monkeypatch):
    """tl.exp and tl.log are approximations on a GPU; here NumPy's, with noise as large as PTX allows ex2 and lg2."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    generator = np.random.default_rng(0)

    def noise(data):
        return generator.uniform(-1, 1, data.shape)

    def exp2(self, x):  # ex2.approx: two units in the last place
        y = np.exp2(x.data)
        return TensorHandle((y * (1 + 2.0**-22 * noise(y))).astype(x.data.dtype), x.dtype.scalar)

    def exp(self, x):  # ex2.approx of the rounded product with log2 e
        return exp2(self, TensorHandle((x.data * np.float32(1.4426950408889634)).astype(x.data.dtype), x.dtype.scalar))

    def log(self, x):  # lg2.approx: 2^-22.6 absolutely between 1/2 and 2, 2^-22 relatively elsewhere
        y = np.log2(x.data.astype(np.float64))
        y = np.where(np.abs(y) < 1, y + 2.0**-22.6 * noise(y), y * (1 + 2.0**-22 * noise(y)))
        return TensorHandle((y * math.log(2)).astype(x.data.dtype), x.dtype.scalar)

    for name, function in (("exp2", exp2), ("exp", exp), ("log", log)):
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", function)
    d = torch.cat([torch.linspace(-30, 30, 301), torch.tensor([15.0, 16.5, 80.0, -1e4, 1e4])])
    logits = torch.stack([d, torch.zeros_like(d), torch.zeros_like(d)], dim=1)
    target = torch.zeros(len(d), dtype=torch.long)
    for name, objective in {name: objective() for name, objective in REGISTRY.items()}.items():
        leaf = logits.clone().requires_grad_()
        loss = softmax_loss(leaf, target, objective=objective, impl="triton", reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        exact = logits[:, 0].double() - math.log(2)
        for found, right in ((loss.detach(), objective.value(exact)), (gradient[:, 0], objective.slope(exact))):
            size = right.abs().clamp_min(1e-30)
            if name == "soft_truncation" or name == "focal":  # two terms that cancel where the slope changes its sign
                size = torch.maximum(size, objective.value(exact).abs())
            away = (exact.abs() > 0.01) if name == "hard_truncation" else torch.ones_like(exact, dtype=torch.bool)
            assert float(((found.double() - right).abs() / size)[away].max()) < 5e-6, name


# ---------------------------------------------------------------- other versions of Triton


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_in_the_interpreter_of_another_version(version):
    require(version)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", "triton and (float32 or bfloat16) and (cross_entropy or test_option or probabilities)"]
    command += [str(Path(__file__).with_name("test_softmax_loss.py"))]
    search = os.pathsep.join(filter(None, [str(folder(version)), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": search})
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 60
