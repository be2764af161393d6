"""The numerics contract: each line of DESIGN.md section 5 on CPU, and each numerical trap of LOSSES.md section 7.

Formulas are written literally (mpmath, or float64 in a form that holds there); where a whole loss is the measure it is
the reference on float64 copies of the same logits.
"""

import math

import mpmath
import pytest
import torch
from implementations import IMPLEMENTATIONS
from torch import Tensor

from imbalance_kernels import Prior, functional
from imbalance_kernels.functional import softmax_loss
from imbalance_kernels.logit_map import AngularMargin, CircleMargin
from imbalance_kernels.objectives import (
    CrossEntropy,
    Focal,
    GeneralizedCrossEntropy,
    HardTruncation,
    Poly,
    PolyFocal,
    SmoothAccuracy,
    SoftTruncation,
    TokenScaled,
)

INF, NAN = math.inf, math.nan
FLOATS = [torch.float32, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
NATIVE = ("reference", "cpu")
INTERPRETED = 1 if torch.cuda.is_available() else 17  # Triton's interpreter takes 100 rows a second: every 17th case

OBJECTIVES = [
    CrossEntropy(),
    *map(Focal, (0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 50.0)),
    *map(HardTruncation, (1e-3, 0.5, 1.0)),
    *map(SoftTruncation, (0.1, 1.0, 3.3, 1000.0)),
    *map(Poly, (-1.0, -0.5, 0.0, 1.0, 100.0)),
    *(PolyFocal(gamma, epsilon) for gamma, epsilon in ((0.0, 1.0), (0.25, -1.0), (2.0, 1.0), (5.0, 10.0))),
    *map(GeneralizedCrossEntropy, (1e-6, 0.3, 0.7, 1.0)),
    SmoothAccuracy(),
    TokenScaled(),
]


def name_of(objective):
    return "-".join([objective.name, *map(str, objective.parameters())])


def id_of(argument):
    return name_of(argument) if hasattr(argument, "parameters") else str(argument).removeprefix("torch.")


every_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=id_of)
every_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=id_of)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=id_of)
every_dtype = pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=id_of)


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def solve(logits, target, objective=None, *, reduction="sum", upstream=None, loss=softmax_loss, **options):
    """A loss and the gradient of its logits."""
    x = torch.as_tensor(logits).detach().clone().requires_grad_(True)
    arguments = [] if objective is None else [objective]
    value = loss(x, torch.as_tensor(target), *arguments, reduction=reduction, **options)
    (gradient,) = torch.autograd.grad(
        value, x, torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    )
    return value.detach(), gradient


def solve_exactly(logits, target, objective=None, **options):
    """The reference on float64 copies; class vectors are constants and keep their values."""
    return solve(torch.as_tensor(logits).double(), target, objective, impl="reference", **options)


def row_error(gradient: Tensor, exact: Tensor) -> float:
    """The largest error of a gradient (N, C), each row relative to its own largest entry."""
    gradient = gradient.double()
    assert torch.isfinite(exact).all() and torch.isfinite(gradient).all()
    size = exact.abs().amax(dim=1, keepdim=True)
    assert (gradient[(size == 0).expand_as(gradient)] == 0).all()
    return float(((gradient - exact).abs() / size.where(size > 0, torch.ones_like(size))).max())


# ---------------------------------------------------------------- value and slope of every objective

# Bounds of relative errors in roundings: of sums and products, and of each unit of a power's exponent (gamma log n).
ROUNDINGS, ROUNDINGS_OF_EXPONENT = 12, 3


def exact_value(name, d, *parameters):
    """G(d) as LOSSES.md has it, in mpmath."""
    p, n = 1 / (1 + mpmath.exp(-d)), 1 / (1 + mpmath.exp(d))
    log_p = mpmath.log(p)
    first, second = (*map(mpmath.mpf, parameters), mpmath.mpf(0), mpmath.mpf(0))[:2]
    return {
        "cross_entropy": lambda: -log_p,
        "focal": lambda: -(n**first) * log_p,
        "hard_truncation": lambda: -log_p if p < first else mpmath.mpf(0),
        "soft_truncation": lambda: -log_p / (1 + mpmath.exp(first * d)),
        "poly": lambda: -log_p + first * n,
        "poly_focal": lambda: -(n**first) * log_p + second * n ** (first + 1),
        "gce": lambda: (1 - p**first) / first,
        "smooth_accuracy": lambda: n,
        "token_scaled": lambda: -p * log_p,
    }[name]()


def exact_slope(name, d, *parameters):
    """G'(d) by differences; token scaling holds its factor p constant."""
    if name == "token_scaled":
        return -1 / (2 + mpmath.exp(d) + mpmath.exp(-d))
    return mpmath.diff(lambda at: exact_value(name, at, *parameters), d)


def relative_bound(objective, d: Tensor, dtype) -> Tensor:
    """The relative error (n,) that value and slope at d (n,) float64 may have."""
    first = (*objective.parameters(), 0.0)[0]
    power = {"focal": first, "poly_focal": first + 1, "soft_truncation": first, "gce": first}.get(objective.name, 0.0)
    return unit(dtype) * (ROUNDINGS + ROUNDINGS_OF_EXPONENT * power * (1 + d.abs()))


def without_cancelled_term(objective):
    """The objective whose size limits the accuracy: where epsilon is negative, poly's two terms cancel."""
    negative = objective.name in ("poly", "poly_focal") and objective.epsilon < 0
    if not negative:
        return objective
    return Poly(0.0) if objective.name == "poly" else Focal(objective.gamma)


def check_accuracy(objective, d: Tensor, found: Tensor, exact: Tensor, size: Tensor, dtype, what: str):
    """Errors within relative_bound of `size`; results below the least normal number may be lost."""
    lost = torch.finfo(dtype).tiny * (2 + sum(map(abs, objective.parameters()))) * d.abs().clamp_min(1)
    excess = (found.double() - exact).abs() - relative_bound(objective, d, dtype) * size.abs() - lost
    worst = int(excess.argmax())
    assert excess[worst] <= 0, f"{what} at d = {d[worst]:.6g} is {found[worst]:.9g}, but should be {exact[worst]:.9g}"


def away_from_the_limit(objective, d: Tensor, dtype) -> Tensor:
    """Leave out log-odds that hard truncation's limit, rounded to dtype, may put on the wrong side."""
    if objective.name != "hard_truncation" or objective.threshold == 1:
        return d
    limit = math.log(objective.threshold) - math.log1p(-objective.threshold)
    return d[(d - limit).abs() > 8 * torch.finfo(dtype).eps * max(1, abs(limit))]


@every_objective
def test_registry_against_mpmath(objective):
    """The specification itself: float64 against the literal formula with digits enough, from -120 to 120."""
    d = torch.cat([torch.linspace(-120, 120, 61), torch.linspace(-9.9, 9.9, 45)]).double()
    d = away_from_the_limit(objective, d, torch.float64)
    base = without_cancelled_term(objective)
    for what, exact in (("value", exact_value), ("slope", exact_slope)):
        with mpmath.workprec(600):  # 1 - p at 120 takes 174 bits, its differences as many again
            right, size = (
                torch.tensor([exact(o.name, mpmath.mpf(x), *o.parameters()) for x in d.tolist()], dtype=torch.float64)
                for o in (objective, base)
            )
        check_accuracy(objective, d, getattr(objective, what)(d), right, size, torch.float64, what)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@every_float
@every_impl
@every_objective
def test_dense_sweep_of_log_odds(objective, impl, dtype, reduction):
    """Two classes whose logits are (d, 0): value and target gradient are the objective's own, at 24,000 log-odds."""
    d = torch.cat([torch.linspace(-100, 100, 20001), torch.linspace(-2, 2, 4001)])
    d = d[:: 1 if impl in NATIVE else INTERPRETED].to(dtype).double()
    d = away_from_the_limit(objective, d, dtype)
    logits = torch.stack([d, torch.zeros_like(d)], dim=1).to(dtype)
    target = torch.zeros(len(d), dtype=torch.long)
    value, gradient = solve(logits, target, objective, impl=impl, reduction=reduction)
    size = without_cancelled_term(objective)
    if reduction == "none":
        check_accuracy(objective, d, value, objective.value(d), size.value(d), dtype, "value")
    else:
        assert float(value) == pytest.approx(float(objective.value(d).sum()), rel=100 * unit(dtype))
    check_accuracy(objective, d, gradient[:, 0], objective.slope(d), size.slope(d), dtype, "slope")
    assert torch.equal(gradient[:, 1], -gradient[:, 0])


@pytest.mark.parametrize("log_odds", [15.0, 16.5, 30.0])
@every_impl
@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if without_cancelled_term(o) is o], ids=id_of)
def test_confident_rows_keep_seven_digits(objective, impl, log_odds):
    """Where p rounds to 1 in float32: relative errors of the loss and of every entry of the gradient."""
    others = (0.0, -1.0, -2.5)
    with mpmath.workprec(400):
        rest = [mpmath.exp(mpmath.mpf(x)) for x in others]
        d = mpmath.mpf(log_odds) - mpmath.log(sum(rest))
        value = exact_value(objective.name, d, *objective.parameters())
        slope = exact_slope(objective.name, d, *objective.parameters())
        exact = [
            torch.tensor(x, dtype=torch.float64) for x in (value, [[slope, *(-slope * x / sum(rest) for x in rest)]])
        ]
    found = solve(torch.tensor([[log_odds, *others]]), [0], objective, impl=impl)
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-36)  # less than that may be lost


@pytest.mark.parametrize("log_odds", [15.0, 16.5, 30.0])
@every_impl
def test_confident_rows_keep_seven_digits_with_z_loss(impl, log_odds):
    """Each entry of the rest is (2 beta lse + 1) n q_j, whatever the target's own size."""
    logits, z_loss = torch.tensor([[log_odds, 0.0, -1.0, -2.5]]), 0.01
    rest = torch.exp(logits[0, 1:].double())
    logsumexp = log_odds + math.log1p(float(rest.sum()) * math.exp(-log_odds))
    right = (2 * z_loss * logsumexp + 1) * rest * math.exp(-logsumexp)
    for reduction in ("none", "sum"):
        _, gradient = solve(logits, [0], impl=impl, reduction=reduction, z_loss=z_loss)
        torch.testing.assert_close(gradient[0, 1:].double(), right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name, second", [(Focal, ()), (PolyFocal, (0.7,))])
def test_gamma_per_class_is_as_a_number(name, second):
    """Also at the ends, where n ** 0 is 1."""
    d = torch.tensor([INF, 1e4, 20.0, 0.0, -3.0, -1e4, -INF], dtype=torch.float64)
    gammas = torch.tensor([0.0, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    target = torch.arange(5).repeat_interleave(len(d))
    per_class = name(gammas, *second).at(target)
    for what in ("value", "slope"):
        right = torch.cat([getattr(name(gamma, *second), what)(d) for gamma in gammas.tolist()])
        torch.testing.assert_close(getattr(per_class, what)(d.repeat(5)), right, rtol=1e-14, atol=0)


def test_the_usual_form_has_no_digits_there():
    """What the test above guards against: 1 - softmax in float32 at log-odds 15 and 16.5."""
    for log_odds, error in ((15.0, 0.1), (16.5, 0.5)):
        p = torch.softmax(torch.tensor([log_odds, 0.0]), 0)[0]
        assert abs(float(1 - p) * (1 + math.exp(log_odds)) - 1) > error


# ---------------------------------------------------------------- finite, whatever the logits

FAR = [0.0, 1e-3, 0.5, 5.0, 17.0, 30.0, 60.0, 87.0, 88.5, 104.0, 120.0, 745.0, 1e3, 1e4]


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@every_dtype
@every_impl
@every_objective
def test_finite_logits_give_finite_loss_and_gradient(objective, impl, dtype, offset):
    """Log-odds of -1e4 to 1e4, on top of a common offset, with a masked class; the gradient sums to 0."""
    d = torch.tensor([*FAR, *(-x for x in FAR)])
    rest = torch.tensor([0.0, -1.0, -INF]).expand(len(d), 3)
    logits = (torch.cat([d[:, None], rest], dim=1) + offset).to(dtype)
    for reduction in ("sum", "none"):
        value, gradient = solve(
            logits, torch.zeros(len(d), dtype=torch.long), objective, impl=impl, reduction=reduction
        )
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert (gradient[:, 3] == 0).all()
        gradient = gradient.double()
        tiny = torch.finfo(dtype).smallest_normal * (4 if dtype == torch.float16 else 1)
        assert (gradient.sum(dim=1).abs() <= 4 * unit(dtype) * gradient.abs().sum(dim=1) + tiny).all()


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0, 2.0, 5.0])
@every_float
@every_impl
def test_focal_at_any_log_odds(gamma, impl, dtype):
    """Trap 1. Elsewhere: NaN from log-odds 17 with gamma < 1, zero gradients on the hardest rows."""
    d = torch.linspace(-120, 120, 961, dtype=torch.float64)
    logits = torch.stack([torch.full_like(d, -INF), d + 1, torch.ones_like(d), torch.full_like(d, -INF)], dim=1).to(
        dtype
    )
    target = torch.ones(len(d), dtype=torch.long)
    value, gradient = solve(logits, target, Focal(gamma), impl=impl, reduction="none")
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    assert (gradient.sum(dim=1) == 0).all()
    assert (gradient[:, [0, 3]] == 0).all()
    hard = d <= 0
    assert (gradient[hard, 1] < -0.2 * 0.5**gamma).all() and (value[hard] > 0).all()
    d = logits[:, 1].double() - 1
    check_accuracy(Focal(gamma), d, gradient[:, 1], Focal(gamma).slope(d), Focal(gamma).slope(d), dtype, "slope")


@every_dtype
@every_impl
def test_a_common_offset_costs_nothing(impl, dtype):
    """At 1e4, m and log s kept as one number would lose 1e-3 of the gradient; smoothing and z-loss stay exact too."""
    logits = (2 * torch.randn(20, 37) + 1e4).to(dtype)  # the oracle gets the rounded logits
    target = torch.randint(37, (20,))
    cases = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-4}, {"label_smoothing": 0.1, "z_loss": 1e-4}]
    for options in cases:
        for reduction in ("sum", "none"):
            value, gradient = solve(logits, target, Focal(2.0), impl=impl, reduction=reduction, **options)
            exact, exact_gradient = solve_exactly(logits, target, Focal(2.0), reduction=reduction, **options)
            torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=0)
            assert row_error(gradient, exact_gradient) <= 30 * unit(torch.float32) + 1.001 * unit(dtype)
    literal = logits.double().requires_grad_(True)
    lse = torch.logsumexp(literal, dim=1)
    smooth = 0.9 * torch.nn.functional.cross_entropy(literal, target, reduction="none")
    smooth = smooth + 0.1 * (lse - literal.mean(dim=1)) + 1e-4 * lse**2
    (right,) = torch.autograd.grad(smooth.sum(), literal)
    value, gradient = solve(logits, target, impl=impl, label_smoothing=0.1, z_loss=1e-4)
    assert float(value) == pytest.approx(float(smooth.detach().sum()), rel=1e-6)
    assert row_error(gradient, right) <= 30 * unit(torch.float32) + 1.001 * unit(dtype)


# ---------------------------------------------------------------- gradients are rounded once


@pytest.mark.parametrize("objective", [CrossEntropy(), Focal(2.0), Poly(1.0), GeneralizedCrossEntropy(0.7)], ids=id_of)
@every_half
@every_impl
def test_a_confident_targets_gradient_is_the_slope_rounded_once(objective, impl, dtype):
    """Trap 7. Elsewhere 0.9995 was stored as 0.99609: p rounded before one was subtracted."""
    d = torch.linspace(0, 16, 257)
    logits = torch.stack([d, torch.zeros_like(d)], dim=1).to(dtype)
    target = torch.zeros(len(d), dtype=torch.long)
    slope = objective.slope(logits[:, 0].double())
    _, gradient = solve(logits, target, objective, impl=impl)
    below = torch.finfo(dtype).smallest_normal
    for found, exact in ((gradient[:, 0], slope), (gradient[:, 1], -slope)):
        normal = exact.abs() >= below
        assert int(normal.sum()) > 50
        error = ((found.double() - exact) / exact)[normal].abs()
        assert float(error.max()) <= unit(dtype) * (1 + 1e-3)
        assert ((found.double() - exact)[~normal].abs() <= below * unit(dtype) * (1 + 1e-3)).all()


@every_half
@every_impl
def test_halves_are_rounded_to_nearest_and_ties_to_even(impl, dtype):
    """A gradient of -1/2 times any upstream gradient, denormal and infinite ones among them, as torch converts it."""
    ties = 1 + torch.arange(1, 64, 2) * unit(dtype)
    upstream = torch.cat(
        [torch.randn(4000) * 2.0 ** torch.randint(-30, 17, (4000,)), *(ties * 2.0**k for k in range(-24, 16))]
    )
    target = torch.zeros(len(upstream), dtype=torch.long)
    logits = torch.zeros(len(upstream), 2, dtype=dtype)
    _, gradient = solve(logits, target, impl=impl, reduction="none", upstream=upstream)
    assert torch.equal(gradient[:, 0], (-0.5 * upstream).to(dtype))
    assert torch.equal(gradient[:, 1], (0.5 * upstream).to(dtype))


@every_half
@every_impl
def test_every_half_is_read_as_what_it_is(impl, dtype):
    """All 65,536 of them, against the same numbers in float32."""
    halves = torch.arange(2**16)[:: 1 if impl in NATIVE else INTERPRETED].to(torch.int16).view(dtype)
    logits = torch.stack([halves, torch.zeros_like(halves)], dim=1)
    target = torch.arange(len(halves)) % 2
    value, _ = solve(logits, target, SmoothAccuracy(), impl=impl, reduction="none")
    right, _ = solve(logits.float(), target, SmoothAccuracy(), impl=impl, reduction="none")
    torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_classes", [2, 5, 91, 4097])
@every_dtype
@every_impl
@every_objective
def test_a_rows_gradient_sums_to_its_true_sum(objective, impl, dtype, num_classes):
    """0, or what the z-loss adds: the target's entry is not lost in the others, nor they in it."""
    logits = (3 * torch.randn(6, num_classes)).to(dtype)
    target = torch.randint(num_classes, (6,))
    logits[torch.arange(3), target[:3]] += 9
    for reduction, z_loss in (("sum", 0.0), ("none", 0.0), ("sum", 1e-3)):
        _, gradient = solve(logits, target, objective, impl=impl, reduction=reduction, z_loss=z_loss)
        lse = torch.logsumexp(logits.double(), dim=1)
        # A log-sum-exp near 0 is the difference of two numbers of the logits' size.
        added = 2 * z_loss * torch.maximum(lse.abs(), logits.double().abs().amax(dim=1))
        entries = gradient.double()
        roundings = 2 * unit(dtype) + (16 + num_classes / 16) * unit(
            torch.float64 if dtype == torch.float64 else torch.float32
        )
        denormal = torch.finfo(dtype).smallest_normal * (unit(dtype) if dtype in HALVES else 1) * num_classes
        error = (entries.sum(dim=1) - 2 * z_loss * lse).abs()
        assert (error <= roundings * (entries.abs().sum(dim=1) + added) + denormal).all()


@pytest.mark.parametrize("num_classes", [5, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_impl
def test_logits_near_the_ends_of_their_range(impl, dtype, num_classes):
    """Many mask with the lowest finite number; then the rest, or the row, has no other."""
    lowest, highest = torch.finfo(dtype).min, torch.finfo(dtype).max
    rows = {
        "all but the target masked": ([1.5], lowest),
        "all but one masked": ([lowest, 1.5], lowest),
        "all masked": ([], lowest),
        "all at the top": ([], highest),
        "one at the top": ([1.5, highest], -1.5),
        "far up": ([2.0**30, 2.0**30 - 2.0**24], 2.0**30),
        "just below that": ([2.0**30 - 2.0**22, 2.0**30 - 2.0**23], 2.0**29),
        "far down": ([-(2.0**31), -(2.0**31)], -(2.0**31)),
    }
    logits = torch.stack([torch.tensor(first + [fill] * (num_classes - len(first))) for first, fill in rows.values()])
    logits, target = logits.to(dtype), torch.zeros(len(rows), dtype=torch.int64)
    value, gradient = solve(logits, target, CrossEntropy(), impl=impl, reduction="none")
    right = logits.double().requires_grad_()
    right_value = F.cross_entropy(right, target, reduction="none")
    (right_gradient,) = torch.autograd.grad(right_value.sum(), right)
    torch.testing.assert_close(value.double(), right_value.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=8 * torch.finfo(dtype).eps, atol=1e-12)


# ---------------------------------------------------------------- equalities of the definitions (trap 2)


def moderate(dtype=torch.float32, num_rows=50, num_classes=7):
    return (3 * torch.randn(num_rows, num_classes)).to(dtype), torch.randint(num_classes, (num_rows,))


@every_dtype
@every_impl
def test_parameters_that_switch_off_give_cross_entropy_to_the_bit(impl, dtype):
    logits, target = moderate(dtype)
    off = [
        (Focal(0.0), {}),
        (Focal(torch.zeros(7)), {}),
        (Poly(0.0), {}),
        (PolyFocal(0.0, 0.0), {}),
        (HardTruncation(1.0), {}),
        (CrossEntropy(), {"prior": Prior(torch.arange(1, 8), tau=0.0)}),
        (CrossEntropy(), {"weight": torch.ones(7)}),
        (CrossEntropy(), {"margin": 0.0}),
        (CrossEntropy(), {"factor": torch.ones(7)}),
        (CrossEntropy(), {"sample_weight": torch.ones(50)}),
    ]
    for reduction in ("mean", "none"):
        plain, plain_gradient = solve(logits, target, impl=impl, reduction=reduction)
        for objective, options in off:
            value, gradient = solve(logits, target, objective, impl=impl, reduction=reduction, **options)
            assert torch.equal(value, plain) and torch.equal(gradient, plain_gradient), (objective, options)


@pytest.mark.parametrize(
    "one, other, tolerance",
    [
        (SoftTruncation(1.0), Focal(1.0), 1e-14),
        (GeneralizedCrossEntropy(1.0), SmoothAccuracy(), 1e-14),
        (GeneralizedCrossEntropy(1e-9), CrossEntropy(), 1e-7),
        (PolyFocal(2.0, 0.0), Focal(2.0), 1e-14),
        (PolyFocal(0.0, 3.0), Poly(3.0), 1e-14),
        (SoftTruncation(1e5), HardTruncation(0.5), 1e-14),
    ],
    ids=id_of,
)
@every_impl
def test_objectives_that_are_equal(one, other, tolerance, impl):
    logits, target = moderate(torch.float64)
    logits[0, target[0]] += 20  # the literal gce is 100 % wrong here
    for reduction in ("sum", "none"):
        first = solve(logits, target, one, impl=impl, reduction=reduction)
        second = solve(logits, target, other, impl=impl, reduction=reduction)
        torch.testing.assert_close(first, second, rtol=tolerance, atol=1e-300)


def binary():
    """Two classes, and the log-odds of the truth with x = x_1 - x_0 and y the target: (2 y - 1) x."""
    logits, target = torch.randn(60, 2, dtype=torch.float64) * 4, torch.arange(60) % 2
    return logits, target, (2 * target - 1) * (logits[:, 1] - logits[:, 0])


def check_binary(found, objective, target, d):
    slope = (2 * target - 1) * objective.slope(d)
    atol = 1e-300 if without_cancelled_term(objective) is objective else 1e-15
    torch.testing.assert_close(found[0], objective.value(d), rtol=2e-11, atol=atol)
    torch.testing.assert_close(found[1], torch.stack([-slope, slope], dim=1), rtol=2e-11, atol=atol)


@every_impl
@every_objective
def test_two_classes_equal_the_sigmoid_of_their_difference(objective, impl):
    logits, target, d = binary()
    check_binary(solve(logits, target, objective, impl=impl, reduction="none"), objective, target, d)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.3])
@pytest.mark.parametrize("form", ["softmax_neg", "one_minus_softmax", "log_odds"])
@every_impl
def test_every_form_of_soft_truncation_is_the_same_for_two_classes(impl, form, sharpness):
    logits, target, d = binary()
    options = {"loss": functional.soft_truncation_loss, "sharpness": sharpness, "form": form}
    found = solve(logits, target, impl=impl, reduction="none", **options)
    check_binary(found, SoftTruncation(sharpness), target, d)


# ---------------------------------------------------------------- masks, excluded classes, ignored rows

MASKED = [1, 4, 6]  # of 7 classes
MAPS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "negative scale": {"scale": -1.5},
    "negative scale and softcap": {"scale": -1.5, "softcap": 3.0},
    "factor": {"factor": torch.tensor([1.0, 0.0, -1.0, 2.0, 0.0, 0.5, 3.0])},
    "prior": {"prior": Prior(torch.arange(1, 8))},
    "margin": {"margin": 0.35, "scale": 5.0},
    "z-loss": {"z_loss": 0.01},
    "circle": {"margin": CircleMargin(0.25), "scale": 5.0, "cosines": True},
    "arc": {"margin": AngularMargin(m2=0.3), "scale": 5.0},
}


def kept_classes(options, kept):
    """The same options for some of the classes."""
    vectors = {name: value[kept] for name, value in options.items() if isinstance(value, Tensor)}
    if "prior" in options:  # the same bias, up to a constant that only the z-loss would see
        vectors["prior"] = Prior(options["prior"].counts[kept])
    return options | vectors


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@every_float
@every_impl
def test_a_masked_class_is_as_if_it_were_not_there(impl, dtype, options):
    """Traps 8 and 12: -inf is tested on the raw logit, before soft cap, scale (of any sign) and factor (also 0)."""
    kept = [j for j in range(7) if j not in MASKED]
    logits = torch.rand(30, 7, dtype=dtype) * 1.8 - 0.9
    target = torch.randint(len(kept), (30,))
    exact = solve_exactly(logits[:, kept], target, Focal(1.0), reduction="none", **kept_classes(options, kept))
    logits[:, MASKED] = -INF
    for reduction in ("none", "sum"):
        value, gradient = solve(
            logits, torch.tensor(kept)[target], Focal(1.0), impl=impl, reduction=reduction, **options
        )
        right = exact[0] if reduction == "none" else exact[0].sum()
        torch.testing.assert_close(value.double(), right, rtol=30 * unit(dtype), atol=0)
        assert (gradient[:, MASKED] == 0).all()
        assert row_error(gradient[:, kept], exact[1]) <= 60 * unit(dtype)


@pytest.mark.parametrize("name", ["softcap", "negative scale", "factor", "prior", "plain"])
@every_float
@every_impl
def test_smoothing_and_probabilities_run_over_unmasked_classes(impl, dtype, name):
    """Literally, with weights: eps / C keeps the C of the input; a zero-probability class may be masked."""
    options, smoothing = MAPS[name], 0.2
    kept = [j for j in range(7) if j not in MASKED]
    logits, weight = torch.randn(30, 7, dtype=dtype), torch.rand(7, dtype=dtype) + 0.5
    logits[:, MASKED] = -INF
    index = torch.tensor(kept)[torch.randint(len(kept), (30,))]
    probabilities = torch.zeros(30, 7, dtype=dtype)
    probabilities[:, kept] = torch.softmax(torch.randn(30, len(kept), dtype=dtype), dim=1)
    one_hot = torch.nn.functional.one_hot(index, 7).double()[:, kept]

    def literal(x, hard):
        z = x[:, kept].double()
        z = z if "softcap" not in options else options["softcap"] * torch.tanh(z / options["softcap"])
        z = z * options.get("scale", 1.0)
        z = z if "factor" not in options else z * options["factor"][kept].double()
        z = z if "prior" not in options else z + options["prior"].bias[kept]
        wanted = one_hot if hard else probabilities[:, kept].double()
        wanted = weight[kept].double() * ((1 - smoothing) * wanted + smoothing / 7)
        return (wanted * (torch.logsumexp(z, dim=1, keepdim=True) - z)).sum(dim=1)

    for target in (index, probabilities):
        x = logits.clone().requires_grad_(True)
        right = literal(x, hard=target is index)
        (right_gradient,) = torch.autograd.grad(right.sum(), x)
        for reduction in ("none", "sum"):
            value, gradient = solve(
                logits, target, impl=impl, reduction=reduction, weight=weight, label_smoothing=smoothing, **options
            )
            expected = right.detach() if reduction == "none" else right.detach().sum()
            torch.testing.assert_close(value.double(), expected, rtol=30 * unit(dtype), atol=0)
            assert (gradient[:, MASKED] == 0).all()
            assert row_error(gradient, right_gradient.double()) <= 300 * unit(
                dtype
            )  # where the two terms nearly cancel


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@every_dtype
@every_impl
def test_a_masked_target_is_as_in_torch(impl, dtype, options):
    """Loss infinite, target gradient -1 (times the slope of the map at 0), the others their softmax."""
    logits = torch.tensor([[0.5, -INF, -0.125, -INF]], dtype=dtype)
    options = kept_classes(options, [0, 1, 2, 3])
    for reduction in ("none", "sum"):
        value, gradient = solve(logits, [1], impl=impl, reduction=reduction, **options)
        assert value == INF
        assert gradient[0, 3] == 0 and gradient[0, 0] != 0 and gradient[0, 2] != 0
        if not options:
            plain, plain_gradient = solve(logits, [1], loss=torch.nn.functional.cross_entropy, reduction=reduction)
            assert plain == INF
            torch.testing.assert_close(gradient, plain_gradient)
            assert gradient[0, 1] == -1


@every_float
@every_impl
@every_objective
def test_a_masked_target_under_every_objective(objective, impl, dtype):
    """The limit of the objective at log-odds -inf, in value and in slope."""
    end = torch.tensor(-INF, dtype=torch.float64)
    for reduction in ("none", "sum"):
        value, gradient = solve(
            torch.tensor([[-INF, 0.0, 0.0]], dtype=dtype), [0], objective, impl=impl, reduction=reduction
        )
        torch.testing.assert_close(value.double().squeeze(), objective.value(end), rtol=1e-6, atol=0)
        slope = objective.slope(end)
        torch.testing.assert_close(
            gradient[0].double(), torch.stack([slope, -slope / 2, -slope / 2]), rtol=1e-6, atol=0
        )


@every_dtype
@every_impl
@every_objective
def test_an_all_masked_row_is_nan_and_stays_alone(objective, impl, dtype):
    logits = torch.randn(3, 6).to(dtype)
    logits[1] = -INF
    target = torch.tensor([0, 3, 5])
    value, gradient = solve(logits, target, objective, impl=impl, reduction="none")
    alone, alone_gradient = solve(logits[[0, 2]], target[[0, 2]], objective, impl=impl, reduction="none")
    assert torch.isnan(value[1]) and torch.equal(value[[0, 2]], alone)
    assert torch.equal(gradient[[0, 2]], alone_gradient)
    total, gradient = solve(logits, target, objective, impl=impl)
    assert torch.isnan(total) and torch.isfinite(gradient[[0, 2]]).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@every_dtype
@every_impl
def test_an_excluded_class_takes_no_part(impl, dtype, smoothing):
    """A zero count that excludes: bias -inf, gradient 0; as a target it is as a masked one."""
    prior = Prior([5, 0, 3, 0, 2], zero_count="exclude")
    logits = torch.randn(20, 5).to(dtype)
    target = torch.tensor([0, 2, 4]).repeat(7)[:20]
    masked = logits.clone()
    masked[:, [1, 3]] = -INF
    without = torch.tensor([0.5, 1.0, 0.3, 1.0, 0.2])  # the same prior where it counts
    for reduction in ("none", "sum"):
        options = {"impl": impl, "reduction": reduction, "label_smoothing": smoothing}
        value, gradient = solve(logits, target, Focal(1.0), prior=prior, **options)
        exact = solve_exactly(
            masked, target, Focal(1.0), reduction=reduction, label_smoothing=smoothing, prior=Prior(without)
        )
        assert (gradient[:, [1, 3]] == 0).all()
        torch.testing.assert_close(value.double(), exact[0], rtol=30 * unit(torch.float32), atol=0)
        assert row_error(gradient, exact[1]) <= 1.001 * unit(dtype) + 60 * unit(torch.float32)
        value, gradient = solve(logits[:1], [3], prior=prior, **options)
        assert value == INF and gradient[0, 1] == 0
        assert float(gradient[0, 3]) == pytest.approx(-(1 - smoothing), rel=2 * unit(dtype))


@pytest.mark.parametrize("held", [NAN, INF, -INF, 1e30])
@every_dtype
@every_impl
@every_objective
def test_an_ignored_row_is_exactly_zero(objective, impl, dtype, held):
    """Trap 12: whatever its logits hold. The others do not notice."""
    logits = torch.randn(3, 9).to(dtype)
    alone = logits[[0, 2]]
    logits[1] = held
    logits[1, 4] = NAN
    for reduction in ("none", "sum", "mean"):
        options = {"impl": impl, "reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0}
        value, gradient = solve(logits, [3, -100, 8], objective, **options)
        right, right_gradient = solve(alone, [3, 8], objective, **options)
        assert (gradient[1] == 0).all() and torch.equal(gradient[[0, 2]], right_gradient)
        if reduction == "none":
            assert value[1] == 0 and torch.equal(value[[0, 2]], right)
        else:
            torch.testing.assert_close(value, right)


@pytest.mark.parametrize("num_classes", [9, 1500, 4097])
@every_dtype
@every_impl
def test_a_nan_logit_spoils_its_own_row_alone(impl, dtype, num_classes):
    for place in (0, 3, num_classes - 1):  # the target, a class, the last one
        logits = torch.randn(3, num_classes).to(dtype)
        logits[1, place] = NAN
        value, gradient = solve(logits, [1, 0, 2], Focal(2.0), impl=impl, reduction="none")
        assert torch.isnan(value).tolist() == [False, True, False]
        assert torch.isnan(gradient[1]).all() and torch.isfinite(gradient[[0, 2]]).all()


# ---------------------------------------------------------------- soft cap, blocks, strides


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5, 15, 17, 33, 63, 91, 129, 4095, 4097, 4111, 8193])
@every_float
@every_impl
def test_softcap_with_any_number_of_classes(impl, dtype, num_classes):
    """Trap 8. Elsewhere the lanes behind the last class became -softcap and leaked into the sum."""
    logits = (4 * torch.randn(3, num_classes)).to(dtype) - 6  # where exp(-softcap) would be seen
    target = torch.randint(num_classes, (3,))
    x = logits.double().requires_grad_(True)
    right = torch.nn.functional.cross_entropy(0.5 * (2 * torch.tanh(x / 2)), target, reduction="none")
    (right_gradient,) = torch.autograd.grad(right.sum(), x)
    for reduction in ("none", "sum"):
        value, gradient = solve(logits, target, impl=impl, reduction=reduction, softcap=2.0, scale=0.5)
        expected = right.detach() if reduction == "none" else right.detach().sum()
        roundings = 30 + num_classes / 16
        torch.testing.assert_close(value.double(), expected, rtol=roundings * unit(dtype), atol=0)
        steep = 1 / (1 - torch.tanh(x.detach() / 2).square().max())  # 1 - tanh^2 loses what tanh shares with 1
        assert row_error(gradient, right_gradient) <= roundings * unit(dtype) * float(steep)


@pytest.mark.parametrize("rise", [8.0, -8.0, 0.0], ids=["rising", "falling", "level"])
@pytest.mark.parametrize("hard", [True, False], ids=["classes", "probabilities"])
@every_dtype
@every_impl
def test_rows_of_many_blocks(impl, dtype, hard, rise):
    """The maximum moves on from block to block, or never after the first; targets in each; every sum over classes."""
    num_classes = 3 * 4096 + 5
    logits = (torch.randn(5, num_classes) + torch.linspace(-rise, rise, num_classes)).to(dtype)
    target = torch.tensor([0, 4095, 4096, 9000, num_classes - 1])
    probabilities = torch.softmax(torch.randn(5, num_classes), dim=1)
    weight = torch.rand(num_classes) + 0.5
    for options in ({}, {"label_smoothing": 0.5, "weight": weight, "z_loss": 1e-3}):
        x = logits.double().requires_grad_(True)
        wanted = torch.nn.functional.one_hot(target, num_classes).double() if hard else probabilities.double()
        smoothing = options.get("label_smoothing", 0.0)
        wanted = (1 - smoothing) * wanted + smoothing / num_classes
        wanted = wanted * weight if "weight" in options else wanted
        lse = torch.logsumexp(x, dim=1, keepdim=True)
        right = (wanted * (lse - x)).sum(dim=1) + options.get("z_loss", 0.0) * lse.squeeze(1) ** 2
        (right_gradient,) = torch.autograd.grad(right.sum(), x)
        for reduction in ("none", "sum"):
            value, gradient = solve(
                logits, target if hard else probabilities, impl=impl, reduction=reduction, **options
            )
            expected = right.detach() if reduction == "none" else right.detach().sum()
            digits = 1e-12 if dtype == torch.float64 else 2e-6
            torch.testing.assert_close(value.double(), expected, rtol=digits, atol=0)
            below = torch.finfo(dtype).smallest_normal * unit(dtype) / float(right_gradient.abs().amax(dim=1).min())
            assert row_error(gradient, right_gradient) <= 20 * digits + 1.001 * unit(dtype) + below


@every_dtype
@every_impl
@pytest.mark.parametrize("num_classes", [7, 33, 4099])
def test_a_rows_bits_are_its_own(impl, dtype, num_classes):
    """Trap 13: the same alone and in a batch of any size, strided or not, unaligned, again and again."""
    num_rows = 150 if impl in NATIVE or num_classes <= 33 else 24
    storage = (4 * torch.randn(num_rows, num_classes + 3)).to(dtype)
    logits = storage[:, 1 : num_classes + 1]  # odd stride, pointers at no multiple of anything
    target = torch.randint(num_classes, (num_rows,))
    target[::11] = -100
    options = {"impl": impl, "label_smoothing": 0.1, "z_loss": 1e-3, "prior": Prior(torch.arange(1, num_classes + 1))}
    for objective in (CrossEntropy(), Focal(0.5)):
        _, gradient = solve(logits, target, objective, **options)
        value, spread = solve(logits, target, objective, reduction="none", **options)
        batches = [slice(0, num_rows), slice(3, 4), slice(5, 7), slice(13, 80)]
        for rows in batches:
            part = logits[rows].contiguous()
            assert torch.equal(solve(part, target[rows], objective, **options)[1], gradient[rows])
            again = solve(part, target[rows], objective, reduction="none", **options)
            assert torch.equal(again[0], value[rows]) and torch.equal(again[1], spread[rows])


@every_dtype
def test_row_offsets_beyond_32_bits(dtype):
    """Trap 10, with rows so far apart that memory in between is never touched."""
    stride = 2**31 + 8
    try:
        storage = torch.empty(stride + 16, dtype=dtype)
    except RuntimeError:
        pytest.skip("no address space for 2^31 elements")
    logits = storage.as_strided((2, 5), (stride, 1))
    logits.copy_(torch.randn(2, 5))
    copy = logits.contiguous()
    for reduction in ("sum", "none"):
        found = solve_without_copy(logits, [1, 4], reduction)
        right = solve(copy, [1, 4], impl="cpu", reduction=reduction)
        assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])


def solve_without_copy(logits, target, reduction):
    x = logits.detach().requires_grad_(True)
    value = softmax_loss(x, torch.tensor(target), impl="cpu", reduction=reduction)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


# ---------------------------------------------------------------- nothing to count, as in torch (trap 3)

FEW = {  # shape and targets
    "one class": ((4, 1), [0, 0, -100, 0]),
    "no rows": ((0, 5), []),
    "nothing valid": ((3, 5), [-100, -100, -100]),
    "one row": ((1, 5), [2]),
    "some ignored": ((4, 5), [2, -100, 0, 4]),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", FEW)
@every_float
@every_impl
def test_few_classes_or_rows_as_in_torch(impl, dtype, case, reduction, weighted, smoothing):
    shape, target = FEW[case]
    logits, target = torch.randn(shape, dtype=dtype), torch.tensor(target, dtype=torch.long)
    weight = torch.linspace(0.5, 2, logits.shape[1], dtype=dtype) if weighted else None
    options = {"reduction": reduction, "weight": weight, "label_smoothing": smoothing}
    right, right_gradient = solve(logits, target, loss=torch.nn.functional.cross_entropy, **options)
    value, gradient = solve(logits, target, impl=impl, **options)
    torch.testing.assert_close(value, right, equal_nan=True)
    assert case != "nothing valid" or (gradient == 0).all()
    torch.testing.assert_close(gradient, right_gradient, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-12)
    if reduction != "none":
        options["normalizer"] = 0.0 if case in ("no rows", "nothing valid") else 3.0
        value, gradient = solve(logits, target, impl=impl, **options)
        total, _ = solve(logits, target, impl=impl, **(options | {"normalizer": None, "reduction": "sum"}))
        torch.testing.assert_close(value, total / 3)
        assert torch.isfinite(gradient).all()


# ---------------------------------------------------------------- priors


def test_a_prior_is_exactly_tau_log_prior():
    """In float64 from integers: within the rounding of two logarithms."""
    counts = [1, 3, 65_504, 65_505, 10**7, 10**12, 999_999]
    for tau in (0.0, 0.5, 1.0, 2.0, -1.0):
        bias = Prior(counts, tau=tau).bias
        assert bias.dtype == torch.float64
        exact = [mpmath.mpf(tau) * mpmath.log(mpmath.mpf(n) / sum(counts)) for n in counts]
        error = [abs(float(mpmath.mpf(b) - x)) for b, x in zip(bias.tolist(), exact, strict=True)]
        assert max(error) <= 4 * 2**-53 * abs(tau) * math.log(sum(counts))
    assert Prior([10**7 - 1, 1], tau=2.0).bias[1] == pytest.approx(-32.2361913, abs=1e-7)  # others: -27.6, -32.05
    assert Prior.from_probabilities([1 - 1e-7, 1e-7], tau=2.0).bias[1] == pytest.approx(-32.2361913, abs=1e-7)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@every_half
@every_impl
def test_halves_with_a_prior_of_1e_7(impl, dtype, tau):
    """Trap 4: 1e-7 is no normal float16, counts of ten millions no float16 at all."""
    counts = torch.tensor([10_000_000, 70_000, 65_505, 300, 1])
    prior = Prior(counts, tau=tau)
    logits, target = torch.randn(25, 5).to(dtype), torch.arange(25) % 5
    bias = torch.tensor([tau * math.log(n / int(counts.sum())) for n in counts.tolist()], dtype=torch.float64)
    x = logits.double().requires_grad_(True)
    right = torch.nn.functional.cross_entropy(x + bias, target, reduction="none")
    (right_gradient,) = torch.autograd.grad(right.sum(), x)
    for reduction in ("none", "sum"):
        value, gradient = solve(logits, target, impl=impl, reduction=reduction, prior=prior)
        expected = right.detach() if reduction == "none" else right.detach().sum()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
        assert row_error(gradient, right_gradient) <= 1.001 * unit(dtype) + 1e-5
    assert float(gradient.double().abs()[target == 4].max()) > 0.9  # the rare class is what trains


@pytest.mark.parametrize("zero_count, counted", [("laplace", [8, 1, 3, 1]), ("floor", [7, 1, 2, 1])])
@every_dtype
@every_impl
def test_zero_counts(impl, dtype, zero_count, counted):
    logits, target = torch.randn(12, 4).to(dtype), torch.arange(12) % 4
    given = solve(logits, target, impl=impl, prior=Prior([7, 0, 2, 0], zero_count=zero_count))
    same = solve(logits, target, impl=impl, prior=Prior(counted))
    assert torch.isfinite(given[0]) and torch.equal(given[0], same[0]) and torch.equal(given[1], same[1])
    with pytest.raises(ValueError, match="zero_count"):
        Prior([7, 0, 2, 0])


# ---------------------------------------------------------------- margins on cosines

COSINES = torch.tensor(
    [-1.0, -0.9999999, -0.999, -0.95, -0.88, -0.8, -0.5, -0.1, 0.0, 0.3, 0.7, 0.95, 0.999, 0.9999999, 1.0]
)


def margin_case(margin, impl, dtype, scale, **options):
    """The target's effective logit and its slope, seen through two classes: loss = softplus(-(scale psi(x) - 0))."""
    x = COSINES.to(dtype)
    logits = torch.stack([torch.zeros_like(x), x], dim=1)
    target = torch.ones(len(x), dtype=torch.long)
    value, gradient = solve(logits, target, impl=impl, reduction="none", margin=margin, scale=scale, **options)
    log_odds = -torch.log(torch.expm1(value.double()))
    slope = gradient[:, 1].double() / -torch.sigmoid(-log_odds)
    return x.double(), log_odds / scale, slope / scale


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize(
    "m1, m2, m3", [(1, 0.5, 0), (1, 1.2, 0.1), (1, 0, 0.35), (4, 0, 0), (2, 0, 0), (1.3, 0.2, 0.1)]
)
@every_float
@every_impl
def test_angular_margin(impl, dtype, m1, m2, m3, straight_through):
    """Past theta + m2 = pi too, and where |x| = 1, whose infinite slope is held by sin(theta) >= 1e-3."""
    margin = AngularMargin(m1, m2, m3, straight_through)
    x, psi, slope = margin_case(margin, impl, dtype, scale=2.0)
    exact, exact_slope = [], []
    for at in x.tolist():
        theta = mpmath.acos(at)
        sine = max(mpmath.sin(theta), mpmath.mpf(1e-3))
        if m1 == 1 and theta + m2 > mpmath.pi:
            exact.append(at - m2 * mpmath.sin(m2) - m3)
            exact_slope.append(1)
        elif m1 == 1:
            exact.append(mpmath.cos(theta + m2) - m3)
            exact_slope.append(mpmath.cos(m2) + at * mpmath.sin(m2) / sine)
        else:
            phi = m1 * theta + m2
            turn = mpmath.floor(phi / mpmath.pi)
            exact.append((-1) ** int(turn) * mpmath.cos(phi) - 2 * turn - m3)
            exact_slope.append((-1) ** int(turn) * m1 * mpmath.sin(phi) / sine)
    exact, exact_slope = (torch.tensor(list(map(float, y)), dtype=torch.float64) for y in (exact, exact_slope))
    exact_slope = torch.ones_like(exact_slope) if straight_through else exact_slope
    # Around |x| = 1 a rounding of theta (times m1) is divided by a sine of 1e-3.
    steep = 1 / torch.sqrt((1 - x) * (1 + x)).clamp_min(1e-3)
    assert torch.isfinite(psi).all() and torch.isfinite(slope).all()
    torch.testing.assert_close(psi, exact, rtol=0, atol=300 * unit(dtype))
    assert ((slope - exact_slope).abs() <= 300 * unit(dtype) * (1 + steep)).all()


def test_angular_margins_fall_with_the_angle():
    """psi is monotone, so that a worse angle never costs less: also past pi, and for factors of the angle."""
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    for margin in (AngularMargin(m2=0.5), AngularMargin(m2=1.2), AngularMargin(m1=4.0), AngularMargin(1.3, 0.2, 0.1)):
        assert (margin.value(x).diff() > -1e-9).all() and (margin.slope(x) > -1e-9).all()


@pytest.mark.parametrize("detach", [True, False])
@every_float
@every_impl
def test_circle_margin(impl, dtype, detach):
    """Literally, with relu's factors held constant or not; cosines at and beyond where a factor is 0."""
    m, scale, num_classes = 0.25, 4.0, 6
    logits = (torch.rand(40, num_classes) * 2 - 1).to(dtype)
    logits[0, :3] = torch.tensor([-1.0, -0.26, 1.0])
    target = torch.randint(num_classes, (40,))
    x = logits.double().requires_grad_(True)
    pull, push = (1 + m - x).clamp_min(0), (x + m).clamp_min(0)
    pull, push = (pull.detach(), push.detach()) if detach else (pull, push)
    at_target = torch.nn.functional.one_hot(target, num_classes).bool()
    z = scale * torch.where(at_target, pull * (x - (1 - m)), push * (x - m))
    right = torch.nn.functional.cross_entropy(z, target, reduction="none")
    (right_gradient,) = torch.autograd.grad(right.sum(), x)
    for reduction in ("none", "sum"):
        value, gradient = solve(
            logits, target, impl=impl, reduction=reduction, margin=CircleMargin(m, detach), scale=scale
        )
        expected = right.detach() if reduction == "none" else right.detach().sum()
        torch.testing.assert_close(value.double(), expected, rtol=60 * unit(dtype), atol=0)
        assert row_error(gradient, right_gradient) <= 60 * unit(dtype)


# ---------------------------------------------------------------- never less accurate than the eager formula

COUNTS = torch.tensor([1000, 400, 160, 64, 26, 10, 4, 2])


def eager(objective, *, margin=None, scale=1.0, prior=None, factor=None, softcap=None, smoothing=0.0, z_loss=0.0):
    """The usual formula in PyTorch, in the dtype of its logits: rows of losses."""

    def loss(x, target):
        def at_target(z):
            return z.gather(1, target[:, None]).squeeze(1)

        hit = torch.nn.functional.one_hot(target, x.shape[1]).bool()
        z = x if softcap is None else softcap * torch.tanh(x / softcap)
        if isinstance(margin, AngularMargin):
            z = torch.where(hit, torch.cos(torch.arccos(z) + margin.m2), z)
        elif isinstance(margin, CircleMargin):
            m = margin.margin
            pull, push = (1 + m - z).clamp_min(0).detach(), (z + m).clamp_min(0).detach()
            z = torch.where(hit, pull * (z - (1 - m)), push * (z - m))
        elif margin is not None:
            z = torch.where(hit, z - torch.as_tensor(margin, dtype=x.dtype), z)
        z = scale * z
        z = z if factor is None else factor.to(x.dtype) * z
        z = z if prior is None else z + prior.bias.to(x.dtype)
        log_p = at_target(torch.log_softmax(z, dim=1))
        value = (1 - smoothing) * objective(log_p, torch.exp(log_p), z, target)
        if smoothing:
            value = value + smoothing * torch.nn.functional.cross_entropy(
                z, torch.full_like(z, 1 / z.shape[1]), reduction="none"
            )
        return value + z_loss * torch.logsumexp(z, dim=1) ** 2 if z_loss else value

    return loss


def _ratio(temperature):
    return lambda z, target: torch.softmax(temperature * z, dim=1).gather(1, target[:, None]).squeeze(1)


EAGER = {
    "cross_entropy": lambda log_p, p, z, t: -log_p,
    "focal": lambda log_p, p, z, t: -((1 - p) ** 2) * log_p,
    "focal_half": lambda log_p, p, z, t: -((1 - p) ** 0.5) * log_p,
    "hard_truncation": lambda log_p, p, z, t: -log_p * (p < 0.5).to(p.dtype),
    "poly": lambda log_p, p, z, t: -log_p + (1 - p),
    "gce": lambda log_p, p, z, t: (1 - p**0.7) / 0.7,
    "smooth_accuracy": lambda log_p, p, z, t: 1 - p,
    "softmax_neg": lambda log_p, p, z, t: -_ratio(-2.0)(z, t) * log_p,
    "one_minus_softmax": lambda log_p, p, z, t: -(1 - _ratio(2.0)(z, t)) * log_p,
}
F = functional
VERSUS = {  # name -> ours, the eager objective, the eager options; class counts are of 8 classes
    "cross_entropy": (F.cross_entropy, {}, "cross_entropy", {}),
    "smoothing": (F.cross_entropy, {"label_smoothing": 0.1}, "cross_entropy", {"smoothing": 0.1}),
    "z-loss": (F.cross_entropy, {"z_loss": 1e-3}, "cross_entropy", {"z_loss": 1e-3}),
    "softcap": (F.cross_entropy, {"softcap": 30.0}, "cross_entropy", {"softcap": 30.0}),
    "logit adjusted": (
        F.logit_adjusted_loss,
        {"class_counts": COUNTS, "tau": 1.5},
        "cross_entropy",
        {"prior": Prior(COUNTS, tau=1.5)},
    ),
    "balanced softmax": (F.balanced_softmax_loss, {"class_counts": COUNTS}, "cross_entropy", {"prior": Prior(COUNTS)}),
    "focal": (F.focal_loss, {"gamma": 2.0}, "focal", {}),
    "focal 0.5": (F.focal_loss, {"gamma": 0.5}, "focal_half", {}),
    "focal adjusted": (F.focal_loss, {"gamma": 2.0, "prior": Prior(COUNTS)}, "focal", {"prior": Prior(COUNTS)}),
    "hard truncation": (F.hard_truncation_loss, {}, "hard_truncation", {}),
    "soft truncation": (F.soft_truncation_loss, {"sharpness": 2.0}, "softmax_neg", {}),
    "its reader's form": (
        F.soft_truncation_loss,
        {"sharpness": 2.0, "form": "one_minus_softmax"},
        "one_minus_softmax",
        {},
    ),
    "poly": (F.poly_loss, {}, "poly", {}),
    "gce": (F.generalized_cross_entropy, {}, "gce", {}),
    "smooth accuracy": (F.smooth_accuracy_loss, {}, "smooth_accuracy", {}),
    "ldam": (
        F.ldam_loss,
        {"class_counts": COUNTS},
        "cross_entropy",
        {"margin": 0.5 * (2 / COUNTS) ** 0.25, "scale": 30.0},
    ),
    "cosface": (F.cosface_loss, {}, "cross_entropy", {"margin": 0.35, "scale": 64.0}),
    "arcface": (F.arcface_loss, {}, "cross_entropy", {"margin": AngularMargin(m2=0.5), "scale": 64.0}),
    "circle": (F.circle_loss, {}, "cross_entropy", {"margin": CircleMargin(0.25), "scale": 256.0}),
    "vs": (
        F.vs_loss,
        {"class_counts": COUNTS},
        "cross_entropy",
        {"prior": Prior(COUNTS), "factor": (COUNTS / 1000) ** 0.3},
    ),
}
ON_COSINES = {"ldam", "cosface", "arcface", "circle"}


@pytest.mark.parametrize("name", VERSUS)
@every_dtype
@every_impl
def test_never_less_accurate_than_eager(impl, dtype, name):
    """|ours - oracle| <= |eager in this dtype - oracle| + a tolerance, row by row, in loss and gradient.

    The tolerance: 20 roundings of the statistics' dtype of the row's size, for each unit of its largest logit, and one
    rounding of the logits' dtype for the gradient (two for the sum of two temperatures).
    """
    ours, options, objective, eager_options = VERSUS[name]
    logits = torch.randn(40, 8) * torch.linspace(0.1, 2, 40)[:, None]
    target = torch.arange(40) % 8
    logits[torch.arange(20), target[:20]] += torch.linspace(0, 10, 20)  # from unsure to confident
    logits = (torch.tanh(logits / 3) * 0.95 if name in ON_COSINES else logits).to(dtype)
    exact, exact_gradient = solve_exactly(logits, target, loss=ours, reduction="none", **options)
    x = logits.clone().requires_grad_(True)
    usual = eager(EAGER[objective], **eager_options)(x, target)
    (usual_gradient,) = torch.autograd.grad(usual.sum(), x)
    usual_error = (usual.detach().double() - exact).abs().nan_to_num(INF)
    size = exact_gradient.abs().amax(dim=1)
    usual_gradient_error = (usual_gradient.double() - exact_gradient).abs().nan_to_num(INF).amax(dim=1)
    rounding = unit(dtype) * (2 if objective in ("softmax_neg", "one_minus_softmax") and dtype in HALVES else 1.001)
    statistics = unit(torch.float64 if dtype == torch.float64 else torch.float32)
    largest = (logits.double().abs().amax(dim=1) + 8) * eager_options.get("scale", 1.0)
    for reduction in ("none", "sum"):
        value, gradient = solve(logits, target, loss=ours, impl=impl, reduction=reduction, **options)
        tolerance = 20 * statistics * largest
        error = (gradient.double() - exact_gradient).abs().amax(dim=1)
        below = torch.finfo(dtype).smallest_normal * unit(dtype) * 2
        assert (error <= usual_gradient_error + (tolerance + rounding) * size + below).all()
        assert (error <= (tolerance + rounding) * size + below).all()  # whatever eager does
        if reduction == "none":
            assert ((value.double() - exact).abs() <= usual_error + tolerance * exact).all()
            assert ((value.double() - exact).abs() <= tolerance * exact + 1e-37).all()
        else:
            assert (value.double() - exact.sum()).abs() <= (tolerance * exact).sum()


@every_impl
def test_cosines_beyond_one_by_a_rounding_are_one(impl):
    """bfloat16 has 1.0078 next to 1."""
    beyond = torch.tensor([[0.25, 1.0078125], [0.25, -1.0078125]], dtype=torch.bfloat16)
    for margin in (AngularMargin(m2=0.5), AngularMargin(m1=4.0), AngularMargin(1.3, 0.2, 0.1)):
        options = {"impl": impl, "margin": margin, "scale": 8.0, "reduction": "none"}
        value, gradient = solve(beyond, [1, 1], **options)
        right, right_gradient = solve(beyond.clamp(-1, 1), [1, 1], **options)
        assert torch.equal(value, right) and torch.equal(gradient, right_gradient)
