"""Tests of what bench_linear.py relies on: its checks, its floor, its memory."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from bench_linear import (
    FLOOR,
    MEBIBYTE,
    Problem,
    check_every_loss,
    checked,
    error_of,
    floors,
    others,
    ours,
    peak_of,
    time_cross_entropy,
    true_d_weight,
)
from bench_linear import Result as LinearResult
from formulas import PLAIN
from results import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem((64, 32, 4096), torch.float32, CPU)


def test_every_loss_is_right() -> None:
    assert check_every_loss(CPU) == []


def test_a_wrong_value_is_not_timed(problem) -> None:
    truth, candidate, run = true_d_weight(problem), ours(problem, PLAIN, 1, "ours"), Run(machine={})
    assert error_of(candidate, truth) < 1e-5
    assert checked([candidate], truth, torch.float32, LinearResult(""), run) == [candidate] and run.notes == []
    assert checked([candidate], 1.001 * truth, torch.float32, LinearResult(""), run) == []
    assert "WRONG VALUE" in run.notes[0]


def test_peak_memory_is_the_chunk(problem) -> None:
    logits = 64 * 4096 * 4
    assert logits == MEBIBYTE
    assert abs(peak_of(ours(problem, PLAIN, 1, ""), problem) - logits) < 500_000  # and a row of scratch for each thread
    eager = next(candidate for candidate in others(problem, Namespace(no_compile=True), Run(machine={})))
    assert peak_of(eager, problem) > 1.9 * logits


def test_ratios_are_to_the_floor(problem) -> None:
    arguments = Namespace(no_compile=True, chunks=[1], samples=2)
    result = time_cross_entropy(problem, arguments, Run(machine={}))
    assert result.ratio(FLOOR) == 1.0
    assert {"ours, 1 MiB", "eager"} <= result.peaks.keys()
    assert all(len(measurement.samples) == 2 for measurement in result.measurements)
    assert torch.equal(floors(problem)[1].step(), floors(problem)[0].step())
