"""csrc/binary_objectives.h, without the kernels, against the specification in float64.

tests/binary_objectives_harness.cpp is compiled for each instruction set that this processor has; the mutants of
tests/mutate_objectives.py go through here too.
"""

import ctypes
import math
import shutil
import subprocess

import numpy as np
import pytest
from binary_cases import CASES, SIDES, logits_and_labels, product_halves, specification, tolerance, worst
from test_objectives_cpp import COMPILER, DTYPES, FLAGS, LANES, ROOT, WIDEST

from imbalance_kernels.binary_objectives import BINARY_REGISTRY


class Harness:
    """The compiled harness: arrays in, arrays out."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def objective_names(self):
        count = ctypes.c_int()
        self.library.objective_names.restype = ctypes.POINTER(ctypes.c_char_p)
        names = self.library.objective_names(ctypes.byref(count))
        return [names[i].decode() for i in range(count.value)]

    def evaluate(self, number, name, parameters, x, y, products):
        """V+, its slope, V- and its slope; exponents as products where they can be, if so asked."""
        dtype = DTYPES[number]
        size = -(-len(x) // 16) * 16
        logits, labels = np.zeros(size, dtype), np.zeros(size, dtype)
        logits[: len(x)], labels[: len(x)] = x, y
        numbers = np.array([*BINARY_REGISTRY[name](*parameters).kernel_parameters(), 0, 0, 0][:3], dtype)
        halves = np.full(2, -1, np.int32)
        for place, exponent in enumerate(product_halves(name, parameters) if products else []):
            halves[place] = -1 if exponent is None else exponent
        results = np.empty((4, size), dtype)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (logits, labels, numbers, halves, results)]
        kind = list(BINARY_REGISTRY).index(name)
        getattr(self.library, f"evaluate_{number}")(ctypes.c_int(kind), ctypes.c_int64(size), *pointers)
        return list(results[:, : len(x)])


@pytest.fixture(scope="module", params=list(LANES)[:WIDEST])
def harness(request, tmp_path_factory):
    if not shutil.which(COMPILER[0]):
        pytest.skip(f"no C++ compiler: {COMPILER[0]}")
    flags, lane_bytes = LANES[request.param]
    library = tmp_path_factory.mktemp("harness") / f"{request.param}.so"
    source = ROOT / "tests" / "binary_objectives_harness.cpp"
    command = [*COMPILER, *FLAGS, *flags, f"-DLANE_BYTES={lane_bytes}", f"-I{ROOT / 'csrc'}", source, "-o", library]
    subprocess.run(list(map(str, command)), check=True)
    return Harness(library)


def test_names_in_the_registrys_order(harness):
    assert harness.objective_names() == list(BINARY_REGISTRY)


def forms(name, parameters):
    """Whether exponents are to be products: both, where they can be."""
    return (False, True) if any(halves is not None for halves in product_halves(name, parameters)) else (False,)


@pytest.mark.parametrize("name, parameters", CASES)
def test_values_and_slopes_of_both_sides(harness, name, parameters):
    for number, dtype in DTYPES.items():
        x, y = logits_and_labels(dtype, name, parameters)
        exact = specification(name, parameters, x, y)
        allowed = tolerance(name, parameters, x, y, exact, np.finfo(dtype).eps / 2, np.finfo(dtype).tiny)
        for products in forms(name, parameters):
            found = harness.evaluate(number, name, parameters, x, y, products)
            missed = worst(found, exact, allowed, x, y)
            assert not missed, (number, products, missed)


@pytest.mark.parametrize("name, parameters", CASES)
def test_hard_labels_at_the_ends_of_the_line(harness, name, parameters):
    """Of the side that counts: infinite where the specification is, finite slopes, and a NaN stays one."""
    for number, dtype in DTYPES.items():
        x = np.tile(np.array([math.inf, -math.inf, 1e4, -1e4, 0.0, math.nan], dtype), 2)
        y = np.repeat(np.array([0.0, 1.0], dtype), 6)
        exact = specification(name, parameters, x, y)
        for products in forms(name, parameters):
            found = harness.evaluate(number, name, parameters, x, y, products)
            for side, ours, right in zip(SIDES, found, exact, strict=True):
                where = (y == 1) == ("+" in side)
                np.testing.assert_allclose(ours[where], right[where], rtol=3e-5, atol=np.finfo(dtype).tiny)
                assert np.isnan(ours[where]).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("number", DTYPES)
def test_a_clip_leaves_nothing_below_it(harness, number):
    """Exactly 0, value and slope; a cost above it, from the first logit on."""
    dtype = DTYPES[number]
    x = np.array([-2.9445, -2.9444, -3.5, -30, -1e4, -2.9443, -2.94], dtype)  # logit(0.05) is -2.944439
    for parameters in ((4.0, 1.0, 0.05), (0.0, 0.0, 0.05), (0.7, 1.0, 0.05)):
        *_, value, slope = harness.evaluate(number, "asymmetric", parameters, x, np.zeros_like(x), products=True)
        assert (value[[0, 2, 3, 4]] == 0).all() and (slope[[0, 2, 3, 4]] == 0).all()
        assert (value[5:] > 0).all() and (slope[5:] > 0).all()


@pytest.mark.parametrize("number", DTYPES)
def test_a_score_that_is_met_costs_nothing(harness, number):
    dtype = DTYPES[number]
    zero, half = np.zeros(3, dtype), np.full(3, 0.5, dtype)
    for beta in (1.0, 1.3, 2.0):
        for products in (False, True):
            assert all(
                (side == 0).all() for side in harness.evaluate(number, "quality_focal", (beta,), zero, half, products)
            )
