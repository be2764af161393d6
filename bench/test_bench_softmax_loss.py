"""The benchmark's kernels as pytest-benchmark cases (`pytest bench`), and tests of what the benchmark relies on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from candidates import (
    ALL_MODES,
    BACKWARD,
    EAGER,
    FORWARD,
    IN_PLACE,
    Candidate,
    Problem,
    baselines,
    eager,
    implementations,
    modes_of,
    ours,
)
from checks import check, truth_of
from formulas import MAIN_LOSSES, OTHER_LOSSES, PLAIN, Loss
from results import MAIN, OTHERS, Group, Run
from targets import WIDE_SHAPES, targets_of
from timing import Measurement, measure, peak_bytes

from imbalance_kernels.objectives import REGISTRY, CrossEntropy

CPU = torch.device("cpu")
SHAPES = ((32, 8142), (2048, 91))  # a row per pass, and rows in tiles
DTYPES = (torch.float32, torch.bfloat16)
ALL_LOSSES = tuple(dict.fromkeys((*MAIN_LOSSES, *OTHER_LOSSES)))
_problems: dict[tuple, Problem] = {}


def problem_of(shape: tuple[int, int], dtype: torch.dtype) -> Problem:
    key = (*shape, dtype)
    if key not in _problems:
        _problems[key] = Problem(*shape, dtype, CPU)
    return _problems[key]


def kernels() -> list[str]:
    return list(implementations(problem_of(SHAPES[0], torch.float32)))


def time_case(benchmark, candidate: Candidate, problem: Problem, loss: Loss) -> None:
    """Check, then time; pytest-benchmark prepares each round by a function without arguments for the call."""
    assert check(candidate, problem, truth_of(problem, loss)).passed
    benchmark.group = f"{problem.shape[0]} x {problem.shape[1]} {problem.dtype} {loss.name}, {candidate.mode}"

    def call() -> None:
        candidate.step()
        candidate.release()

    benchmark.pedantic(call, setup=candidate.prepare, rounds=9, warmup_rounds=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", MAIN_LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize(("impl", "mode"), [(impl, mode) for impl in kernels() for mode in modes_of(impl)])
def test_main_losses(benchmark, impl, mode, loss, dtype, shape) -> None:
    problem = problem_of(shape, dtype)
    time_case(benchmark, ours(problem, loss, impl, (mode,))[0], problem, loss)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", OTHER_LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("impl", [impl for impl in kernels() if impl != "reference"])
def test_other_losses(benchmark, impl, loss, shape) -> None:
    problem = problem_of(shape, torch.float32)
    time_case(benchmark, ours(problem, loss, impl, (BACKWARD,))[0], problem, loss)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", MAIN_LOSSES, ids=lambda loss: loss.name)
def test_eager(benchmark, loss, dtype, shape) -> None:
    problem = problem_of(shape, dtype)
    time_case(benchmark, eager(problem, loss, (BACKWARD,))[0], problem, loss)


@pytest.mark.parametrize("loss", [loss for loss in ALL_LOSSES if loss.eager], ids=lambda loss: loss.name)
def test_eager_formula_is_the_loss(loss) -> None:
    problem = problem_of((37, 1003), torch.float64)
    assert check(eager(problem, loss, (BACKWARD,))[0], problem, truth_of(problem, loss)).passed


def test_every_objective_is_timed() -> None:
    arguments = [loss.arguments(problem_of(SHAPES[0], torch.float32).classes) for loss in ALL_LOSSES]
    assert {chosen.get("objective", CrossEntropy()).name for chosen in arguments} == set(REGISTRY)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_wrong_value_is_noticed(mode) -> None:
    problem = problem_of(SHAPES[0], torch.float32)
    truth = truth_of(problem, PLAIN)
    candidate = ours(problem, PLAIN, kernels()[-1], (mode,))[0]
    assert check(candidate, problem, truth).passed
    assert not check(candidate, problem, replace(truth, loss=truth.loss * (1 + 1e-4))).passed
    assert not check(candidate, problem, replace(truth, loss=float("nan"))).passed
    if mode != FORWARD:
        one_row = truth.gradient.clone()
        one_row[-1] *= 1 + 1e-4
        assert not check(candidate, problem, replace(truth, gradient=one_row)).passed


def test_gradients_are_fresh_and_logits_refilled() -> None:
    problem = problem_of(SHAPES[1], torch.float32)
    before = problem.logits.clone()
    for candidate in ours(problem, PLAIN, kernels()[-1], ALL_MODES):
        for _ in range(2):  # a second call must find what the first one found
            assert check(candidate, problem, truth_of(problem, PLAIN)).passed
    assert torch.equal(problem.logits, before)


def test_samples_and_memory() -> None:
    problem = problem_of(SHAPES[1], torch.float32)
    copy, clone = baselines(problem)
    for measurement in measure([copy, clone], samples=3, shortest_sample=1e-4):
        assert len(measurement.samples) == 3
        assert 0 < measurement.minimum <= measurement.median
    assert peak_bytes(copy) == 0
    assert peak_bytes(clone) == problem.logits_bytes


def test_targets_are_computed() -> None:
    """The same figures twice as slow turn verdicts."""
    assert all(target.met is None for target in targets_of(Run(machine={})))
    fast, slow = (targets_of(_invented_run(seconds)) for seconds in (1.0, 2.0))
    verdicts = {target.what: target.met for target in fast if target.measured is not None}
    assert verdicts and all(verdicts.values())
    turned = {target.what: target.met for target in slow if target.measured is not None}
    assert turned.keys() == verdicts.keys()
    assert not any(met for what, met in turned.items() if "copies" in what or "faster" in what or "clones" in what)


def _invented_run(seconds: float) -> Run:
    """Ours takes so many seconds of each loss where a copy takes one."""
    groups = []
    for shape in WIDE_SHAPES:
        group = Group(MAIN, shape, "float32", logits_bytes=1)
        group.measurements = [Measurement("", "copy_", "", 1, [1.0]), Measurement("", "clone()", "", 1, [3.0])]
        for loss in MAIN_LOSSES:
            group.measurements.append(Measurement(loss.name, EAGER, BACKWARD, 1, [11.5]))
            for mode, times in ((BACKWARD, 1.4), (IN_PLACE, 1.0), (FORWARD, 0.8)):
                group.measurements.append(Measurement(loss.name, "cpu", mode, 1, [times * seconds], peak_bytes=0))
        others = Group(OTHERS, shape, "float32", logits_bytes=1)
        others.measurements = [Measurement(loss.name, "cpu", BACKWARD, 1, [1.0]) for loss in (PLAIN, *OTHER_LOSSES)]
        groups += [group, others]
    return Run(machine={}, groups=groups)
