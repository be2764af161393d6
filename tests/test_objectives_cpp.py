"""csrc/objectives.h and the functions of csrc/cpu/simd.h, without the kernels, against the registry in float64.

tests/objectives_harness.cpp is compiled for each instruction set that this processor has; the mutants of
tests/mutate_objectives.py go through here too.
"""

import ctypes
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from imbalance_kernels.objectives import REGISTRY

ROOT = Path(__file__).parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# As setup.py compiles the kernels; -ffp-contract lets the wider sets fuse a multiplication and an addition.
FLAGS = "-O2 -std=c++20 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -fPIC -shared".split()
LANES = {  # name -> flags, bytes to a pack
    "baseline": ([], 16),
    "avx2": (["-mavx2", "-mfma"], 32),
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"], 64),
}
WIDEST = {"AVX512": 3, "AVX2": 2}.get(torch.backends.cpu.get_cpu_capability(), 1)
DTYPES = {"float": np.float32, "double": np.float64, "float_lanes": np.float32, "double_lanes": np.float64}

PARAMETERS = {
    "cross_entropy": [()],
    "focal": [(0.0,), (0.25,), (0.5,), (1.0,), (2.0,), (5.0,)],
    "hard_truncation": [(0.5,), (0.3,), (1.0,)],
    "soft_truncation": [(0.5,), (1.0,), (3.3,)],
    "poly": [(0.0,), (1.0,), (-0.5,), (10.0,)],
    "poly_focal": [(2.0, 1.0), (0.0, 1.0), (1.0, 1.0), (0.5, -0.5)],
    "gce": [(0.7,), (0.01,), (1.0,)],
    "smooth_accuracy": [()],
    "token_scaled": [()],
}
CASES = [(name, parameters) for name, many in PARAMETERS.items() for parameters in many]

# Bounds of the relative error in roundings (half a unit in the last place), measured and rounded up: of sums and
# products, and for each unit of the exponent of a power (gamma log n, K d, q log p), whose own roundings it multiplies.
ROUNDINGS = {
    "cross_entropy": 5,
    "focal": 8,
    "hard_truncation": 5,
    "soft_truncation": 8,
    "poly": 12,  # epsilon -0.5 cancels half
    "poly_focal": 12,
    "gce": 6,
    "smooth_accuracy": 5,
    "token_scaled": 5,
}
ROUNDINGS_OF_EXPONENT = 3

# From far below to far above, dense in between, so that an odds ratio underflows on the way; the ends are tested apart.
LOG_ODDS = np.concatenate([np.linspace(-120, 120, 9601), np.geomspace(1e-6, 1e4, 200), -np.geomspace(1e-6, 1e4, 199)])


class Harness:
    """The compiled harness: arrays in, arrays out."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))

    def objective_names(self):
        count = ctypes.c_int()
        self.library.objective_names.restype = ctypes.POINTER(ctypes.c_char_p)
        names = self.library.objective_names(ctypes.byref(count))
        return [names[i].decode() for i in range(count.value)]

    def evaluate(self, number, objective, d, parameters):
        """Value and slope of an objective at d."""
        first, second = (*REGISTRY[objective](*parameters).kernel_parameters(), 0.0, 0.0)[:2]
        kind = list(REGISTRY).index(objective)
        scalar = ctypes.c_float if DTYPES[number] == np.float32 else ctypes.c_double
        return self._call(f"evaluate_{number}", number, kind, d, (scalar(first), scalar(second)), 2)

    def function(self, number, which, x):
        """exp, expm1, log or log1p of x."""
        return self._call(f"function_{number}", number, which, x, (), 1)[0]

    def _call(self, name, number, which, x, extra, outputs):
        padded = np.zeros(-(-len(x) // 16) * 16, DTYPES[number])
        padded[: len(x)] = x
        results = [np.empty_like(padded) for _ in range(outputs)]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (padded, *results)]
        getattr(self.library, name)(
            ctypes.c_int(which), ctypes.c_int64(len(padded)), pointers[0], *extra, *pointers[1:]
        )
        return [result[: len(x)] for result in results]


@pytest.fixture(scope="module", params=list(LANES)[:WIDEST])
def harness(request, tmp_path_factory):
    if not shutil.which(COMPILER[0]):
        pytest.skip(f"no C++ compiler: {COMPILER[0]}")
    flags, lane_bytes = LANES[request.param]
    library = tmp_path_factory.mktemp("harness") / f"{request.param}.so"
    source = ROOT / "tests" / "objectives_harness.cpp"
    command = [*COMPILER, *FLAGS, *flags, f"-DLANE_BYTES={lane_bytes}", f"-I{ROOT / 'csrc'}", source, "-o", library]
    subprocess.run(list(map(str, command)), check=True)
    return Harness(library)


def specification(objective, d, parameters):
    """Value and slope by the registry, in float64."""
    function = REGISTRY[objective](*parameters)
    d = torch.from_numpy(d.astype(np.float64))
    return function.value(d).numpy(), function.slope(d).numpy()


def test_names_in_the_registrys_order(harness):
    assert harness.objective_names() == list(REGISTRY) == list(PARAMETERS)


@pytest.mark.parametrize("number", DTYPES)
@pytest.mark.parametrize("name, parameters", CASES)
def test_value_and_slope_of_every_objective(harness, name, parameters, number):
    """Relative errors; what is below the type's least normal number may be lost, times the size of the parameters."""
    unit = np.finfo(DTYPES[number]).eps / 2
    floor = np.finfo(DTYPES[number]).tiny * (2 + abs(sum(parameters)))
    d = LOG_ODDS.astype(DTYPES[number])
    if (
        name == "hard_truncation" and parameters[0] < 1
    ):  # the limit is rounded too: see test_half_weight_at_the_threshold
        limit = math.log(parameters[0]) - math.log1p(-parameters[0])
        d = d[np.abs(d - limit) > 1e-6 * abs(limit)]
    power = {"focal": 0, "soft_truncation": 0, "gce": 0, "poly_focal": 1}.get(name)
    exponent = 0 if power is None else (power + parameters[0]) * (1 + np.abs(d.astype(np.float64)))
    relative = unit * (ROUNDINGS[name] + ROUNDINGS_OF_EXPONENT * exponent)
    found = harness.evaluate(number, name, d, parameters)
    for what, ours, exact in zip(("value", "slope"), found, specification(name, d, parameters), strict=True):
        excess = np.abs(ours - exact) - relative * np.abs(exact) - floor * np.maximum(1, np.abs(d))
        worst = int(np.argmax(excess))
        assert excess[worst] <= 0, f"{what} at d = {d[worst]}: {ours[worst]}, but {exact[worst]} is right"


@pytest.mark.parametrize("number", DTYPES)
@pytest.mark.parametrize("name, parameters", CASES)
def test_ends_of_the_line(harness, name, parameters, number):
    d = np.array([math.inf, -math.inf, math.nan, 1e4, -1e4], DTYPES[number])
    tiny = np.finfo(DTYPES[number]).tiny
    found = harness.evaluate(number, name, d, parameters)
    for ours, exact in zip(found, specification(name, d, parameters), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=3e-5, atol=tiny)  # NaN where NaN, infinite where infinite
        assert np.isnan(ours).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("number", DTYPES)
def test_half_weight_at_the_threshold(harness, number):
    for threshold in (0.5, 0.25):
        at = DTYPES[number](math.log(threshold) - math.log1p(-threshold))
        near = np.array([np.nextafter(at, -np.inf), at, np.nextafter(at, np.inf)], DTYPES[number])
        _, slopes = harness.evaluate(number, "hard_truncation", near, (threshold,))
        np.testing.assert_allclose(slopes * -(1 + np.exp(near)), [1, 0.5, 0], rtol=1e-6)
    value, slope = harness.evaluate(number, "hard_truncation", np.zeros(1), (0.5,))
    assert slope[0] == -0.25 and value[0] == pytest.approx(0.5 * math.log(2), rel=1e-6)


# name -> (function, where the kernels use it); the bounds, in units in the last place, are those measured, rounded up.
FUNCTIONS = {
    "exp": (mpmath.exp, lambda limit: -np.linspace(0, limit, 4001)),
    "expm1": (mpmath.expm1, lambda limit: -np.concatenate([np.linspace(0, limit, 3001), np.geomspace(1e-30, 1, 1001)])),
    "log": (mpmath.log, lambda limit: np.concatenate([np.geomspace(1e-30, 1e30, 2001), np.linspace(0.5, 2, 2001)])),
    "log1p_unit": (mpmath.log1p, lambda limit: np.concatenate([np.linspace(0, 1, 3001), np.geomspace(1e-30, 1, 1001)])),
    "log1p": (
        mpmath.log1p,
        lambda limit: np.concatenate(
            [np.linspace(-0.999, 9, 5001), np.geomspace(1e-30, 1, 999), -np.geomspace(1e-30, 0.9, 999)]
        ),
    ),
    "sqrt": (mpmath.sqrt, lambda limit: np.concatenate([np.geomspace(1e-30, 1e30, 2001), np.linspace(0, 2, 2001)])),
}
ULP = {"exp": 1.25, "expm1": 1.25, "log": 2.5, "log1p_unit": 2.5, "log1p": 3.5, "sqrt": 0.5}


@pytest.mark.parametrize("number", ["float_lanes", "double_lanes"])
@pytest.mark.parametrize("which", FUNCTIONS)
def test_functions_of_the_lanes_in_units_in_the_last_place(harness, which, number):
    exact_function, inputs = FUNCTIONS[which]
    dtype = DTYPES[number]
    x = inputs(87.3 if dtype == np.float32 else 708.3).astype(dtype)
    found = harness.function(number, list(FUNCTIONS).index(which), x)
    with mpmath.workprec(120):
        exact = [exact_function(mpmath.mpf(float(at))) for at in x]
        error = np.array([float(mpmath.mpf(float(y)) - right) for y, right in zip(found, exact, strict=True)])
    unit = np.spacing(np.abs(np.array([float(right) for right in exact], dtype)))
    worst = int(np.argmax(np.abs(error) / unit))
    assert np.abs(error[worst]) / unit[worst] <= ULP[which], f"{which}({x[worst]!r})"


@pytest.mark.parametrize("number", ["float_lanes", "double_lanes"])
def test_ends_of_the_lanes_functions(harness, number):
    inf, nan = math.inf, math.nan
    ends = {
        "exp": ([0, -0.0, -inf, nan, -1e4, -1e30], [1, 1, 0, nan, 0, 0]),
        "expm1": ([0, -0.0, -inf, nan, -1e4, -1e30], [0, 0, -1, nan, -1, -1]),
        "log": ([1, 0, nan], [0, -inf, nan]),
        "log1p_unit": ([0, nan], [0, nan]),
        "log1p": ([0, nan], [0, nan]),
        "sqrt": ([0, 1, inf, nan], [0, 1, inf, nan]),
    }
    for which, (x, exact) in ends.items():
        found = harness.function(number, list(FUNCTIONS).index(which), np.array(x, DTYPES[number]))
        np.testing.assert_array_equal(found, np.array(exact, DTYPES[number]), err_msg=which)
