"""What tests of binary objectives share: parameters, logits and labels to try, the specification, and tolerances."""

import math

import numpy as np
import torch

from imbalance_kernels.binary_objectives import BINARY_REGISTRY, side_slopes, side_values

# Powers that are products (with a root or without), and powers that are not.
PARAMETERS = {
    "cross_entropy": [()],
    "focal": [(0.0,), (0.25,), (0.5,), (1.0,), (1.5,), (2.0,), (3.3,), (5.0,), (8.0,)],
    "hard_truncation": [(0.5,), (0.3,), (1.0,)],
    "soft_truncation": [(0.5,), (1.0,), (3.3,)],
    "poly": [(0.0,), (1.0,), (-0.5,)],
    "poly_focal": [(2.0, 1.0), (0.0, 1.0), (0.5, -0.5), (0.7, 1.0)],
    "gce": [(0.7,), (1.0,)],
    "smooth_accuracy": [()],
    "token_scaled": [()],
    "quality_focal": [(1.0,), (1.3,), (2.0,), (2.5,), (3.0,)],
    "varifocal": [(2.0, 0.75), (0.0, 1.0), (0.5, 2.0), (1.7, 0.25)],
    "asymmetric": [
        (4.0, 1.0, 0.05),
        (4.0, 1.0, 0.0),
        (0.0, 0.0, 0.05),
        (1.5, 0.5, 0.3),
        (2.0, 0.7, 0.6),
        (0.7, 2.0, 0.05),
        (1.3, 2.0, 0.0),
    ],
}
CASES = [(name, parameters) for name, many in PARAMETERS.items() for parameters in many]
EXPONENTS = {"focal": 1, "poly_focal": 1, "quality_focal": 1, "varifocal": 1, "asymmetric": 2}
SIDES = ("V+", "slope of V+", "V-", "slope of V-")

ROUNDINGS = 24  # of sums and products; see `tolerance`
ROUNDINGS_OF_EXPONENT = 4


def is_product(exponent: float) -> bool:
    """Whether kernels make its powers of products."""
    return (2 * exponent).is_integer() and exponent <= 8


def product_halves(name: str, parameters: tuple) -> list[int | None]:
    """Halves of the exponents among the first parameters, None where powers are no products."""
    exponents = parameters[: EXPONENTS.get(name, 0)]
    return [int(2 * exponent) if is_product(exponent) else None for exponent in exponents]


def logits_and_labels(dtype: np.dtype, name: str, parameters: tuple) -> tuple[np.ndarray, np.ndarray]:
    """From far below to far above, each with both hard labels and some soft ones, but where a loss begins."""
    x = np.concatenate([np.linspace(-60, 60, 961), [0.0], np.geomspace(1e-5, 1e4, 60), -np.geomspace(1e-5, 1e4, 60)])
    y = np.array([0.0, 1.0, 0.5, 0.25, 0.9, 1e-3])
    x, y = (grid.ravel().astype(dtype) for grid in np.meshgrid(x, y))
    beginning = parameters[2] if name == "asymmetric" else parameters[0] if name == "hard_truncation" else 0.0
    if 0 < beginning < 1:
        limit = math.log(beginning) - math.log1p(-beginning)
        near = 0.02 if name == "asymmetric" else 1e-5
        away = (np.abs(x - limit) > near) & (np.abs(x + limit) > near)
        x, y = x[away], y[away]
    if name == "quality_focal":  # nor where a score is met, which only rounding tells from a miss
        miss = np.abs(1 / (1 + np.exp(-np.clip(x.astype(np.float64), -700, None))) - y)
        away = (miss > 1e-3 * y) | (y == 0) | (y == 1)
        x, y = x[away], y[away]
    return x, y


def specification(name: str, parameters: tuple, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """V+, its slope, V- and its slope by imbalance_kernels/binary_objectives.py, in float64."""
    objective = BINARY_REGISTRY[name](*parameters)
    logits, labels = torch.from_numpy(x.astype(np.float64)), torch.from_numpy(y.astype(np.float64))
    values, slopes = side_values(objective, logits, labels), side_slopes(objective, logits, labels)
    return [side.numpy() for side in (values.positive, slopes.positive, values.negative, slopes.negative)]


def tolerance(
    name: str, parameters: tuple, x: np.ndarray, y: np.ndarray, exact: list[np.ndarray], unit: float, tiny: float
) -> list[np.ndarray]:
    """How far each of `exact` may be missed: some roundings of it, or of the terms that cancel in it.

    A power multiplies the roundings of its exponent (gamma log n); p - y cancels where a soft label is met, and
    m = p - clip beyond the clip; what is below the type's least normal number may be lost.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    p, n = 1 / (1 + np.exp(-np.clip(x, -700, None))), 1 / (1 + np.exp(np.clip(x, None, 700)))
    cost = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    gross = y * n + (1 - y) * p
    miss = np.abs((1 - y) * p - y * n)
    sizes = [np.abs(side) for side in exact]
    first = parameters[0] if parameters else 0.0
    if name == "focal":
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = np.where(y == 1, p, np.where(y == 0, n, np.abs(1 - 2 * y) * p * n / gross))
            terms = gross**first * (gross + first * np.where(growth == 0, 0, growth * cost))
        sizes[1] = sizes[3] = terms
    elif name == "quality_focal":
        with np.errstate(divide="ignore", invalid="ignore"):
            lost = 1 + first * np.where(miss == 0, 1, gross / miss)
            terms = miss ** (first - 1) * (miss * miss + first * p * n * cost)
        sizes = [sizes[0] * lost, terms * lost, sizes[2] * lost, terms * lost]
    elif name == "varifocal":
        sizes[1] = gross
    elif name == "asymmetric" and parameters[2] > 0:
        m = np.maximum(p - parameters[2], 1e-300)
        lost = 1 + (first + 1) * np.where(p > parameters[2], p / m, 0)
        sizes[2:] = [side * lost for side in sizes[2:]]
    exponent = sum(parameters[: EXPONENTS.get(name, 0)]) + (first if name in ("soft_truncation", "gce") else 0)
    relative = unit * (ROUNDINGS + ROUNDINGS_OF_EXPONENT * exponent * (1 + np.abs(x)))
    floor = tiny * (2 + abs(sum(parameters))) * np.maximum(1, np.abs(x))
    return [relative * size + floor for size in sizes]


def worst(found: list, exact: list, allowed: list, x: np.ndarray, y: np.ndarray) -> str:
    """Where something is missed by most of what is allowed, if by more than that; else nothing."""
    for what, ours, right, by in zip(SIDES, found, exact, allowed, strict=True):
        with np.errstate(invalid="ignore"):
            excess = np.where(ours == right, -1.0, np.abs(ours.astype(np.float64) - right) - by)
        at = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
        if not excess[at] <= 0:
            return f"{what} at x = {x[at]}, y = {y[at]}: {ours[at]}, but {right[at]} is right"
    return ""
