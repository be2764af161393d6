"""Random shapes, masks and options: the kernels against the reference in float64, and what must not change a loss.

`make test-full` runs thousands of cases of each test (conftest.py has the profiles).
"""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS, KERNELS
from torch import Tensor

from imbalance_kernels import Prior, reference
from imbalance_kernels.functional import softmax_loss
from imbalance_kernels.keywords import options_of
from imbalance_kernels.logit_map import AngularMargin, CircleMargin
from imbalance_kernels.objectives import REGISTRY

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BLOCK = 4096  # classes that the CPU kernels take at a time


def number(low, high):
    return st.floats(low, high, width=32)  # exact in every dtype that a kernel computes in


GAMMA = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), number(0, 6))
PARAMETERS = {
    "cross_entropy": (),
    "focal": (GAMMA,),
    "hard_truncation": (number(0.0625, 1),),
    "soft_truncation": (number(0.125, 8),),
    "poly": (number(-0.5, 4),),
    "poly_focal": (GAMMA, number(-0.5, 4)),
    "gce": (number(0.015625, 1),),
    "smooth_accuracy": (),
    "token_scaled": (),
}


def test_every_objective_has_parameters_to_draw():
    assert set(PARAMETERS) == set(REGISTRY)


@dataclass
class Case:
    """Rows, targets, and how their loss is called."""

    storage: Tensor  # (N, C + padding), of which logits is a part
    offset: int
    num_classes: int
    target: Tensor  # (N,) class indices or (N, C) probabilities
    upstream: Tensor
    options: dict = field(default_factory=dict)

    @property
    def logits(self):
        return self.storage[:, self.offset : self.offset + self.num_classes]

    def run(self, impl, dtype=None):
        """Value and gradient; an in-place loss gets a tensor that may be overwritten."""
        leaf = self.storage.to(dtype or self.storage.dtype, copy=True).requires_grad_(True)
        whole = leaf.clone()
        x = whole[:, self.offset : self.offset + self.num_classes]
        value = softmax_loss(x, self.target, impl=impl, **self.options)
        (gradient,) = torch.autograd.grad(value, leaf, self.upstream.to(value.dtype))
        beside = torch.ones_like(leaf, dtype=torch.bool)
        beside[:, self.offset : self.offset + self.num_classes] = False
        assert torch.equal(whole[beside], leaf[beside]) and (gradient[beside] == 0).all()
        return value.detach(), gradient[:, self.offset : self.offset + self.num_classes]


@st.composite
def cases(draw, kind="logits", dtypes=DTYPES, **fixed):
    """Draw a case: `kind` is "logits", "cosines" or "probabilities"; `fixed` options are not drawn.

    Hypothesis draws what shapes the computation; the numbers come from torch, seeded by it.
    """
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    num_rows = draw(st.sampled_from([5, 9, 2, 7, 3, 8, 6, 4, 1, 0]))
    num_classes = draw(st.sampled_from([7, 16, 33, 2, 3, 40, 11, 24, 5, 19, 1, 37, BLOCK - 1, BLOCK, 2 * BLOCK + 37]))

    def uniform(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=random)

    def chosen(name, strategy):
        return fixed[name] if name in fixed else draw(strategy)

    # numbers
    padding = draw(st.integers(0, 3))
    shape = (num_rows, num_classes + padding)
    if kind == "cosines":  # on a grid that keeps away from the ends, and from where a relu of Circle loss bends
        storage = torch.randint(-60, 61, shape, generator=random) / 64
    else:
        storage = draw(st.sampled_from([0.25, 1.0, 4.0, 12.0])) * torch.randn(shape, generator=random)
        storage = storage + draw(st.sampled_from([0.0, 0.0, -5.0, 50.0]))
    offset = draw(st.integers(0, padding))
    logits = storage[:, offset : offset + num_classes]

    # targets; masks and excluded classes leave them out
    excluded = uniform(num_classes) < chosen("exclude", st.sampled_from([0.0, 0.0, 0.3]))
    excluded[int(torch.randint(num_classes, (), generator=random))] = False
    target = torch.multinomial((~excluded).float(), num_rows, replacement=True, generator=random) if num_rows else None
    target = torch.zeros(0, dtype=torch.long) if target is None else target
    masked = uniform(num_rows, num_classes) < chosen("mask", st.sampled_from([0.0, 0.0, 0.2, 0.9]))
    masked[torch.arange(num_rows), target] = False
    softcap = None if kind == "cosines" else chosen("softcap", st.sampled_from([None, None, 1.5, 30.0]))
    if draw(st.booleans()) and kind == "logits":  # sure rows
        logits[torch.arange(num_rows), target] += 12
    if softcap is not None:  # beyond, the slope of the cap loses what it has in common with 1
        logits.clamp_(-2 * softcap, 2 * softcap)
    logits[masked] = -math.inf

    # options
    options = {"softcap": softcap, "scale": draw(st.sampled_from([1.0, 1.0, -1.5, 0.25, 8.0]))}
    options["reduction"] = chosen("reduction", st.sampled_from(["mean", "sum", "none"]))
    options["label_smoothing"] = chosen("label_smoothing", st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    options["z_loss"] = chosen("z_loss", st.sampled_from([0.0, 0.0, 0.001, 0.1]))
    options["inplace"] = draw(st.booleans())
    if bool(excluded.any()) or draw(st.booleans()):
        counts = torch.randint(1, 10 ** draw(st.integers(1, 9)), (num_classes,), generator=random)
        counts[excluded] = 0
        options["prior"] = Prior(counts, tau=draw(st.sampled_from([1.0, 0.0, 0.5, 2.0])), zero_count="exclude")
    if draw(st.booleans()):
        options["weight"] = uniform(num_classes, low=0.1, high=2.0)
    if draw(st.booleans()):
        options["factor"] = uniform(num_classes, low=draw(st.sampled_from([-1.0, 0.5])), high=2.0)
    if draw(st.booleans()):
        options["sample_weight"] = uniform(num_rows, low=0.25, high=2.0)
        if draw(st.booleans()):
            options["sample_weight"][1::3] = 0
    if options["reduction"] != "none" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([0.0, 1.0, 3.5, torch.tensor(7.0)]))
    if kind != "probabilities":
        name = draw(st.sampled_from(list(REGISTRY)))
        parameters = list(draw(st.tuples(*PARAMETERS[name])))
        if name in ("focal", "poly_focal") and draw(st.booleans()):
            parameters[0] = uniform(num_classes, high=4.0)
        options["objective"] = REGISTRY[name](*parameters)
        margins = [st.none(), number(-1, 2), st.just(uniform(num_classes, high=2.0))]
        if kind == "cosines":
            angular = st.builds(
                AngularMargin, st.sampled_from([1.0, 1.0, 1.25, 4.0]), number(0, 1), number(0, 0.5), st.booleans()
            )
            circle = st.builds(CircleMargin, st.sampled_from([0.2578125, 0.1328125]), st.booleans())
            margins = [angular, circle, number(0, 0.5)]
            options["cosines"] = True
        options["margin"] = chosen("margin", st.one_of(*margins))
        target[uniform(num_rows) < draw(st.sampled_from([0.3, 0.0, 0.3, 0.0, 0.6, 1.0]))] = -100
        target = target.to(draw(st.sampled_from([torch.int64, torch.int32])))
    else:
        target = torch.softmax(2 * torch.randn(num_rows, num_classes, generator=random), dim=1)
        target = (target.masked_fill(masked | excluded, 0)).to(draw(st.sampled_from([dtype, torch.float32])))
    upstream = torch.randn(num_rows if options["reduction"] == "none" else (), generator=random, dtype=torch.float64)
    return Case(storage.to(dtype), offset, num_classes, target, upstream, options)


# ---------------------------------------------------------------- what may differ, and how much


def sensitivity(objective) -> float:
    """How many times a small error of the log-odds shows in the slope, relative to the slope (LOSSES.md section 1)."""
    parameters = [float(p.max()) if isinstance(p, Tensor) and p.numel() else p for p in objective.parameters()]
    parameters = [0.0 if isinstance(p, Tensor) else p for p in parameters]
    return {
        "focal": lambda gamma: gamma + 3,
        "soft_truncation": lambda sharpness: 2 * sharpness + 3,
        "poly": lambda epsilon: 6,  # epsilon = -1/2 cancels half
        "poly_focal": lambda gamma, epsilon: 3 * (gamma + 4),
    }.get(objective.name, lambda *_: 3)(*parameters)


@dataclass
class Allowed:
    """The errors of a case that roundings explain, with u the rounding of the statistics' dtype.

    An effective logit of size Z has an error of some u Z before anything is computed from it, which the objective
    multiplies by its sensitivity S; sums over C classes add their own. Relative to the size of what is compared, and of
    the terms that it is a difference of (smoothing, class probabilities, z-loss):  u (6 + C / 64 + S Z).
    """

    value: Tensor
    gradient: Tensor


def allowed(case: Case, value: Tensor, gradient: Tensor) -> Allowed:
    options, dtype = case.options, case.storage.dtype
    hard = not case.target.is_floating_point()
    row_options = {name: options[name] for name in options.keys() - {"sample_weight", "normalizer"}}
    resolved = options_of(**row_options).to(torch.device("cpu"), torch.float64)
    logit_map = resolved.logit_map
    logits = case.logits.double()
    split = reference.target_and_rest(logits, case.target, resolved)
    logsumexp = split.shift + (split.relative_logsumexp if hard else split.rest)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2

    def largest(values: Tensor) -> Tensor:
        return values.where(torch.isfinite(values), torch.zeros_like(values)).abs().amax(dim=-1)

    margin, one = logit_map.margin, torch.ones(case.num_classes)
    slope = abs(logit_map.scale) * largest(one if logit_map.factor is None else logit_map.factor)
    size = largest(logits) + (largest(margin) if isinstance(margin, Tensor) else 2.0)  # (N,)
    size = slope * size + largest(0 * one if logit_map.bias is None else logit_map.bias)
    steep = torch.ones_like(size)
    if logit_map.softcap is not None:
        steep = 1 / (1 - torch.tanh(largest(logits) / logit_map.softcap) ** 2)
    if isinstance(margin, AngularMargin):
        steep, slope = 8 * margin.m1**2 * steep, slope * 4 * margin.m1
    elif isinstance(margin, CircleMargin):
        slope = slope * 4
    relative = unit * (6 + case.num_classes / 64 + sensitivity(resolved.objective) * size) * steep

    objective = resolved.objective
    if hard and objective.name == "hard_truncation" and objective.threshold < 1:
        limit = math.log(objective.threshold) - math.log1p(-objective.threshold)
        assume(bool(((split.log_odds - limit).abs() > 16 * unit * (size + 1)).all()))
    if hard and isinstance(margin, AngularMargin) and margin.m1 == 1:
        cosines = logits.gather(1, case.target.long().clamp_min(0)[:, None])
        assume(bool(((cosines + math.cos(margin.m2)).abs() > 1e-4).all()))

    weight = one if resolved.weight is None else resolved.weight
    per_row = options.get("sample_weight", torch.ones(len(logits))).double()
    terms = (resolved.label_smoothing if hard else 1.0) * largest(weight) + 2 * resolved.z_loss * (logsumexp.abs() + 1)
    divisor = 1.0
    if options["reduction"] != "none":
        divisor = options.get("normalizer")
        if divisor is None and options["reduction"] == "mean":
            counted = per_row * (weight[case.target.long().clamp_min(0)] if hard else 1.0)
            divisor = counted[(case.target != -100) if hard else ...].sum()
        divisor = 1.0 if divisor is None or float(divisor) == 0 else float(divisor)
    if options["reduction"] == "none":
        lost = relative * (value.abs() + per_row * terms)
    else:
        each = {name: options[name] for name in options.keys() - {"normalizer"}} | {"reduction": "none"}
        rows, _ = replace(case, options=each, upstream=torch.ones(len(logits))).run("reference", torch.float64)
        lost = (relative * (rows.abs() + per_row * terms)).sum() / divisor
    own = gradient.abs().amax(dim=1)
    scaled = (case.upstream.abs() * per_row / divisor * slope * terms).expand_as(own)
    rounded_twice = dtype == torch.bfloat16 and options["reduction"] != "none"  # the exception of DESIGN.md section 3
    stored = torch.finfo(dtype).eps / 2 * (2 if rounded_twice else 1.001)
    below = torch.finfo(dtype).smallest_normal * (4 * stored if dtype == torch.float16 else 64 * (1 + slope))
    return Allowed(lost + 1e-36, (relative * (own + scaled) + stored * own + below)[:, None])


each_kernel = pytest.mark.parametrize("impl", KERNELS)


def check_against_reference(case: Case, impl: str):
    value, gradient = case.run(impl)
    exact, exact_gradient = case.run("reference", torch.float64)
    assert value.dtype == (torch.float64 if case.storage.dtype == torch.float64 else torch.float32)
    if torch.isnan(exact).any():  # the mean of nothing, or of rows that weigh nothing
        assert torch.isnan(value).all() and (gradient[case.target == -100] == 0).all()
        return
    bounds = allowed(case, exact, exact_gradient)
    assert ((value.double() - exact).abs() <= bounds.value).all()
    assert ((gradient.double() - exact_gradient).abs() <= bounds.gradient).all()
    masked = case.logits == -math.inf
    assert (gradient[masked] == 0).all()


@each_kernel
@given(case=cases("logits"))
def test_kernels_equal_the_reference(impl, case):
    check_against_reference(case, impl)


@each_kernel
@given(case=cases("cosines"))
def test_kernels_equal_the_reference_on_cosines(impl, case):
    check_against_reference(case, impl)


@each_kernel
@given(case=cases("probabilities"))
def test_kernels_equal_the_reference_with_class_probabilities(impl, case):
    check_against_reference(case, impl)


# ---------------------------------------------------------------- what must not change a loss

every_impl = st.sampled_from(IMPLEMENTATIONS)
in_float64 = {"dtypes": [torch.float64]}


def on_classes(case: Case, order: Tensor) -> Case:
    """The case with its classes in another order (C',), which may leave masked ones out."""
    options = dict(case.options)
    for name, value in options.items():
        if isinstance(value, Tensor) and value.shape == (case.num_classes,) and name != "sample_weight":
            options[name] = value[order]
    if "prior" in options:
        options["prior"] = Prior(options["prior"].counts[order], tau=options["prior"].tau, zero_count="exclude")
    options["objective"] = options["objective"].at(order)
    place = torch.full((case.num_classes,), -100).scatter(0, order, torch.arange(len(order)))
    target = torch.where(case.target == -100, -100, place[case.target.long().clamp_min(0)])
    return Case(case.logits[:, order], 0, len(order), target, case.upstream, options)


def check_same(case: Case, found, right, roundings=1000):
    """Value and gradient equal but for float64 roundings: of the cancelling terms too, and of the soft cap's slope."""
    (value, gradient), (exact, exact_gradient) = found, right
    if torch.isnan(exact).any():
        assert torch.isnan(value).all()
        return
    bounds = allowed(case, exact, exact_gradient)
    assert ((value - exact).abs() <= 2 * bounds.value).all()
    assert ((gradient - exact_gradient).abs() <= 2 * bounds.gradient).all()


@given(cases("logits", softcap=None, z_loss=0.0, **in_float64), every_impl, st.sampled_from([-1024.0, 3.0, 512.0]))
def test_a_common_shift_changes_nothing(case, impl, shift):
    assume("factor" not in case.options)
    moved = replace(case, storage=case.storage + shift)
    check_same(moved, moved.run(impl), case.run(impl))


@given(st.one_of(cases("logits", **in_float64), cases("cosines", **in_float64)), every_impl, st.integers(0, 2**31))
def test_the_order_of_classes_changes_nothing(case, impl, seed):
    order = torch.randperm(case.num_classes, generator=torch.Generator().manual_seed(seed))
    value, gradient = case.run(impl)
    check_same(case, on_classes(case, order).run(impl), (value, gradient[:, order]))


@given(cases("logits", label_smoothing=0.0, exclude=0.0, **in_float64), every_impl, st.integers(1, 20))
def test_classes_masked_in_every_row_change_nothing(case, impl, more):
    """Padding a vocabulary: without smoothing, which divides by all classes."""
    num_classes = case.num_classes
    padded = {}
    for name, value in case.options.items():
        vector = isinstance(value, Tensor) and value.shape == (num_classes,) and name != "sample_weight"
        padded[name] = torch.cat([value, torch.ones(more)]) if vector else value
    if "prior" in padded:  # probabilities of what is there, and some number for the rest
        prior = padded.pop("prior")
        padded["prior"] = Prior(torch.cat([prior.counts, torch.ones(more)]), tau=prior.tau)
        constant = prior.tau * float(torch.log(prior.counts.sum() / padded["prior"].counts.sum()))
        assume(case.options["z_loss"] == 0 or constant == 0)
    objective = padded["objective"]
    if objective.class_parameter() is not None:
        objective = objective.with_class_parameter(torch.cat([objective.class_parameter(), torch.ones(more)]))
    masked = torch.full((len(case.logits), more), -math.inf, dtype=torch.float64)
    wide = Case(
        torch.cat([case.logits, masked], dim=1),
        0,
        num_classes + more,
        case.target,
        case.upstream,
        padded | {"objective": objective},
    )
    value, gradient = wide.run(impl)
    assume(not torch.isnan(value).any())  # a mean over rows of weight 0 is 0 / 0, as in torch, its gradient too
    assert (gradient[:, num_classes:] == 0).all()
    check_same(case, (value, gradient[:, :num_classes]), case.run(impl))


def some_rows(case: Case, rows: Tensor) -> Case:
    upstream = case.upstream[rows] if case.upstream.dim() else case.upstream
    options = dict(case.options)
    if "sample_weight" in options:
        options["sample_weight"] = options["sample_weight"][rows]
    return Case(case.storage[rows], case.offset, case.num_classes, case.target[rows], upstream, options)


@given(st.one_of(cases("logits"), cases("cosines")), every_impl)
def test_ignoring_a_row_is_dropping_it(case, impl):
    """To the bit in the gradient of those that stay; the value is summed in another order."""
    keep = (case.target != -100).nonzero().squeeze(1)
    value, gradient = case.run(impl)
    alone, alone_gradient = some_rows(case, keep).run(impl)
    assert (gradient[case.target == -100] == 0).all()
    rows = value[keep] if value.dim() else value
    digits = 1e-12 if value.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(rows, alone, rtol=digits, atol=0, equal_nan=True)
    if case.options["reduction"] == "mean":  # so is its divisor
        digits = max(digits, torch.finfo(gradient.dtype).eps)
        torch.testing.assert_close(gradient[keep], alone_gradient, rtol=digits, atol=0, equal_nan=True)
    else:
        assert torch.equal(gradient[keep], alone_gradient)


@given(st.one_of(cases("logits", reduction="sum"), cases("probabilities", reduction="sum")), every_impl)
def test_a_sample_weight_of_two_is_the_row_twice(case, impl):
    case.options.pop("normalizer", None)
    case.options.pop("sample_weight", None)
    num_rows = len(case.logits)
    twice = torch.arange(num_rows) % 2 == 0
    rows = torch.cat([torch.arange(num_rows), torch.arange(num_rows)[twice]])
    weighted = replace(case, options=case.options | {"sample_weight": 1.0 + twice.float()})
    value, gradient = weighted.run(impl)
    repeated, repeated_gradient = some_rows(case, rows).run(impl)
    tolerance = 1e-12 if value.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(value, repeated, rtol=tolerance, atol=0)
    single = repeated_gradient[:num_rows].double()
    right = torch.where(twice[:, None], 2 * single, single)
    below = torch.finfo(gradient.dtype).smallest_normal
    torch.testing.assert_close(gradient.double(), right, rtol=2 * torch.finfo(gradient.dtype).eps, atol=2 * below)
