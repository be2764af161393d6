"""imbalance_kernels/binary_objectives.py, the specification: slopes are derivatives, both equal literal formulas."""

import math

import pytest
import sigmoid_oracle
import torch
from binary_cases import CASES, EXPONENTS, PARAMETERS

from imbalance_kernels.binary_objectives import (
    BINARY_REGISTRY,
    Asymmetric,
    QualityFocal,
    Varifocal,
    side_slopes,
    side_values,
)
from imbalance_kernels.objectives import REGISTRY, CrossEntropy, Focal

DECLARED = ("hard_truncation", "token_scaled")  # their slopes are, not derived
LABELS = (0.0, 1.0, 0.3, 0.5, 0.85, 1e-3)


def test_every_objective_has_cases_and_an_oracle():
    assert list(PARAMETERS) == list(BINARY_REGISTRY) == list(sigmoid_oracle.OBJECTIVES)
    assert list(BINARY_REGISTRY)[: len(REGISTRY)] == list(REGISTRY)


@pytest.mark.parametrize("y", LABELS)
@pytest.mark.parametrize("name, parameters", CASES)
def test_values_and_slopes_equal_the_literal_formula(name, parameters, y):
    x = torch.linspace(-12, 12, 1500, dtype=torch.float64).requires_grad_(True)
    labels = torch.full_like(x, y)
    literal = sigmoid_oracle.OBJECTIVES[name](x, labels, *parameters)
    objective = BINARY_REGISTRY[name](*parameters)
    values, slopes = side_values(objective, x, labels), side_slopes(objective, x, labels)
    for value, slope, exact in zip(values, slopes, literal, strict=True):
        (derivative,) = torch.autograd.grad(exact.sum(), x, allow_unused=True, retain_graph=True)
        derivative = torch.zeros_like(x) if derivative is None else derivative
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-12)  # the literal GCE cancels
        torch.testing.assert_close(slope, derivative, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name, parameters", [case for case in CASES if case[0] not in DECLARED])
def test_slopes_are_derivatives_of_values(name, parameters):
    """By autograd through the specification itself."""
    x = (torch.randn(400, dtype=torch.float64) * 4).requires_grad_(True)
    y = torch.rand(400, dtype=torch.float64)
    objective = BINARY_REGISTRY[name](*parameters)
    for value, slope in zip(side_values(objective, x, y), side_slopes(objective, x, y), strict=True):
        if value.requires_grad:
            (derivative,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        else:  # V- of a varifocal loss's positives
            derivative = torch.zeros_like(x)
        torch.testing.assert_close(slope, derivative, rtol=1e-9, atol=1e-13)


def hard(objective, x, y):
    """What logits with hard labels cost, and its slope."""
    values, slopes = side_values(objective, x, y), side_slopes(objective, x, y)
    return (torch.where(y == 1, side.positive, side.negative) for side in (values, slopes))


# Far enough that n is 0 in either dtype, and the ends themselves.
WIDE = [*torch.linspace(-120, 120, 241).tolist(), 720.0, -720.0, 1e3, -1e3, 1e4, -1e4, math.inf, -math.inf]


def truth_objective(name, parameters, label):
    """The registry's objective that a hard label's cost is, but for the alpha of a varifocal loss and a clip."""
    if name == "quality_focal":
        return Focal(*parameters)
    if name == "varifocal":
        return CrossEntropy() if label else Focal(parameters[0])
    if name == "asymmetric":
        return Focal(parameters[1]) if label else Focal(parameters[0])
    return REGISTRY[name](*parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name, parameters", CASES)
def test_hard_labels_cost_what_the_registry_says(name, parameters, dtype):
    """G of the log-odds of the truth, (2 y - 1) x, from end to end."""
    x = torch.tensor(WIDE, dtype=dtype)
    for label in (0.0, 1.0):
        y = torch.full_like(x, label)
        of = truth_objective(name, parameters, label)
        factor = parameters[1] if name == "varifocal" and not label else 1.0
        if name == "asymmetric" and not label and parameters[2] > 0:
            continue  # see test_clip
        value, slope = hard(BINARY_REGISTRY[name](*parameters), x, y)
        sign = 2 * label - 1
        power = sum(parameters[: EXPONENTS.get(name, 0)])
        close = {"rtol": (1e-6 if dtype == torch.float32 else 1e-12) * (1 + 120 * power), "atol": 1e-30}
        torch.testing.assert_close(value, factor * of.value(sign * x), **close)
        torch.testing.assert_close(slope, factor * sign * of.slope(sign * x), **close)
        assert not value.isnan().any() and slope.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name, parameters", CASES)
def test_soft_labels_at_the_ends_of_the_line(name, parameters, dtype):
    """Finite, and the slope is the cross-entropy's limit times what the loss makes of it: no overflow, no 0 * inf."""
    x = torch.tensor([1e4, -1e4, 100.0, -100.0], dtype=dtype)
    for label in (1e-3, 0.5, 0.9):
        y = torch.full_like(x, label)
        objective = BINARY_REGISTRY[name](*parameters)
        exact = sigmoid_oracle.OBJECTIVES[name](x.double(), y.double(), *parameters)
        values, slopes = side_values(objective, x, y), side_slopes(objective, x, y)
        for value, slope, right in zip(values, slopes, exact, strict=True):
            assert value.isfinite().all() and slope.isfinite().all()
            # the literal poly_focal and GCE cancel, and a power of 1 - p_t is not accurate where that is 0
            known = right.isfinite()  # log(1 - m) of the literal asymmetric loss without a clip is not
            torch.testing.assert_close(value.double()[known], right[known], rtol=1e-4, atol=1e-6)
        if name == "focal":  # the mixed probability is 1 - y or y, and grows no more
            mixed = torch.where(x > 0, 1 - y, y)
            limit = mixed ** parameters[0] * torch.where(x > 0, 1 - y, -y)
            torch.testing.assert_close(slopes.positive[:2], limit[:2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma_neg, clip", [(4.0, 0.05), (0.0, 0.3), (1.5, 0.5), (1.0, 0.9)])
def test_clip(gamma_neg, clip):
    """Negatives below the clip cost nothing; above it the cost begins at 0, and no end is infinite."""
    objective = Asymmetric(gamma_neg, 1.0, clip)
    begin = math.log(clip) - math.log1p(-clip)
    x = torch.tensor([begin - 1e-3, -1e4, -math.inf, begin + 1e-3, 1e4, math.inf], dtype=torch.float64)
    value, slope = hard(objective, x, torch.zeros_like(x))
    assert (value[:3] == 0).all() and (slope[:3] == 0).all()
    m = torch.sigmoid(x[3]) - clip
    torch.testing.assert_close(value[3], -(m**gamma_neg) * torch.log1p(-m))
    torch.testing.assert_close(slope[3], slope[3].clamp_min(1e-30))
    limit = (1 - clip) ** gamma_neg * -math.log(clip)
    torch.testing.assert_close(value[4:], torch.full((2,), limit, dtype=torch.float64))
    assert (slope[4:] == 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_soft_focal_is_torchvisions(gamma):
    """torchvision.ops.sigmoid_focal_loss(x, y, alpha=0.3, gamma) with soft labels: alpha mixes by label, once."""
    x = (torch.randn(2000, dtype=torch.float64) * 4).requires_grad_(True)
    y = torch.rand(2000, dtype=torch.float64)
    p = torch.sigmoid(x)
    p_t = p * y + (1 - p) * (1 - y)
    literal = torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none") * (1 - p_t) ** gamma
    literal = (0.3 * y + 0.7 * (1 - y)) * literal
    (derivative,) = torch.autograd.grad(literal.sum(), x)

    def mixed(sides):
        return 0.3 * y * sides.positive + 0.7 * (1 - y) * sides.negative

    torch.testing.assert_close(mixed(side_values(Focal(gamma), x, y)), literal, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(mixed(side_slopes(Focal(gamma), x, y)), derivative, rtol=1e-9, atol=1e-13)


def test_a_score_that_is_met_costs_nothing():
    """|y - p|^beta is 0 there, and its slope the limit."""
    y = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    x = torch.log(y / (1 - y))
    for beta in (1.0, 2.0, 3.5):
        assert all((side.abs() < 1e-14).all() for side in side_values(QualityFocal(beta), x, y))
    zero = torch.zeros(1)
    assert side_slopes(QualityFocal(1.0), zero, zero + 0.5).positive == 0


def test_gamma_of_each_class():
    gamma = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64)
    for find in (side_values, side_slopes):
        together = find(Focal(gamma), x, y).positive
        alone = [find(Focal(float(gamma[c])), x[:, c], y[:, c]).positive for c in range(3)]
        torch.testing.assert_close(together, torch.stack(alone, dim=1), rtol=1e-14, atol=0)


def test_what_needs_a_label_has_no_softmax_form():
    for objective in (QualityFocal(), Varifocal(), Asymmetric()):
        for function in (objective.value, objective.slope):
            with pytest.raises(TypeError, match=f"{objective.name} is a loss of a logit and its label"):
                function(torch.zeros(1))


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda: QualityFocal(0.99), "beta"),
        (lambda: QualityFocal(math.inf), "beta"),
        (lambda: QualityFocal("2"), "beta"),
        (lambda: QualityFocal(True), "beta"),
        (lambda: Varifocal(-0.1), "gamma"),
        (lambda: Varifocal(math.nan), "gamma"),
        (lambda: Varifocal(2.0, -0.1), "alpha"),
        (lambda: Varifocal(2.0, math.inf), "alpha"),
        (lambda: Asymmetric(-0.1), "gamma_neg"),
        (lambda: Asymmetric(math.nan), "gamma_neg"),
        (lambda: Asymmetric(4.0, -0.1), "gamma_pos"),
        (lambda: Asymmetric(4.0, 1.0, -0.1), "clip"),
        (lambda: Asymmetric(4.0, 1.0, 1.0), "clip"),
        (lambda: Asymmetric(4.0, 1.0, math.nan), "clip"),
    ],
)
def test_parameters_out_of_range_raise(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def test_parameters_at_the_ends_of_their_ranges_do_not():
    QualityFocal(1.0), Varifocal(0.0, 0.0), Asymmetric(0.0, 0.0, 0.0)
