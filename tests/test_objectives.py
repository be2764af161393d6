"""The registry: each objective's slope is the derivative of its value, and both equal the literal formula."""

import math

import oracle
import pytest
import torch

from imbalance_kernels import objectives
from imbalance_kernels.objectives import REGISTRY, evaluate

PARAMETERS = {
    "cross_entropy": [()],
    "focal": [(0.0,), (0.25,), (0.5,), (1.0,), (2.0,), (5.0,)],
    "hard_truncation": [(0.5,), (0.2,), (1.0,)],
    "soft_truncation": [(0.5,), (1.0,), (4.0,)],
    "poly": [(0.0,), (1.0,), (-0.9,), (3.0,)],
    "poly_focal": [(2.0, 1.0), (0.0, 1.0), (0.5, -0.5)],
    "gce": [(0.7,), (1e-3,), (1.0,)],
    "smooth_accuracy": [()],
    "token_scaled": [()],
}
CASES = [(name, parameters) for name, many in PARAMETERS.items() for parameters in many]


def test_every_objective_has_cases_and_an_oracle():
    assert set(PARAMETERS) == set(REGISTRY) == set(oracle.OBJECTIVES)


@pytest.mark.parametrize("name, parameters", CASES)
def test_value_and_slope_equal_the_literal_formula(name, parameters):
    d = torch.linspace(-12, 12, 4000, dtype=torch.float64).requires_grad_(True)
    p, n = torch.sigmoid(d), torch.sigmoid(-d)
    literal = oracle.OBJECTIVES[name](torch.log(p), p, n, *parameters)
    (derivative,) = torch.autograd.grad(literal.sum(), d)
    objective = REGISTRY[name](*parameters)
    torch.testing.assert_close(objective.value(d), literal, rtol=1e-9, atol=1e-12)  # literal GCE with a small q cancels
    torch.testing.assert_close(objective.slope(d), derivative, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name, parameters", CASES)
def test_evaluate_differentiates_by_the_slope(name, parameters):
    objective = REGISTRY[name](*parameters)
    d = torch.randn(50, dtype=torch.float64).requires_grad_(True)
    upstream = torch.randn(50, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(evaluate(objective, d), d, upstream)
    torch.testing.assert_close(gradient, upstream * objective.slope(d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, parameters", CASES)
def test_ends_of_the_line(name, parameters, dtype):
    """Certainty costs nothing and moves nothing; a hopeless row has the limit of its loss, with a finite slope."""
    objective = REGISTRY[name](*parameters)
    d = torch.tensor([math.inf, -math.inf, 1e4, -1e4], dtype=dtype)
    value, slope = objective.value(d), objective.slope(d)
    assert value[0] == 0 and slope[0] == 0
    assert not torch.isnan(value).any() and not torch.isnan(slope).any()
    assert torch.isfinite(value[2:]).all() and torch.isfinite(slope).all()
    bounded = value[3] < 1e3
    assert value[1] == math.inf or bounded


def test_half_weight_at_the_threshold():
    objective = objectives.HardTruncation(0.5)
    zero = torch.zeros(1)
    assert objective.slope(zero) == -0.25 and objective.value(zero) == pytest.approx(0.5 * math.log(2))


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda: objectives.Focal(-1.0), "gamma"),
        (lambda: objectives.Focal(math.nan), "gamma"),
        (lambda: objectives.Focal(torch.tensor([1.0, -1.0])), "gamma"),
        (lambda: objectives.PolyFocal(-1.0, 1.0), "gamma"),
        (lambda: objectives.PolyFocal(1.0, math.inf), "epsilon"),
        (lambda: objectives.HardTruncation(0.0), "threshold"),
        (lambda: objectives.HardTruncation(1.5), "threshold"),
        (lambda: objectives.SoftTruncation(0.0), "sharpness"),
        (lambda: objectives.Poly(-1.5), "epsilon"),
        (lambda: objectives.GeneralizedCrossEntropy(0.0), "q is"),
        (lambda: objectives.GeneralizedCrossEntropy("0.7"), "q is"),
    ],
)
def test_parameters_out_of_range_raise(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()
