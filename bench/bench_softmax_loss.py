"""The softmax losses: values first, then times, beside a copy of the logits (README.md of this folder).

On CPU; with `--device cuda` on a GPU (gpu.py, `--device cuda --help`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which measures memory here, announces itself

import charts
import gpu
import report
import torch
from candidates import ALL_MODES, BACKWARD, COMPILED, EAGER, Candidate, Problem, baselines, eager, implementations, ours
from checks import check, truth_of
from formulas import MAIN_LOSSES, OTHER_LOSSES, PLAIN, Loss
from results import MAIN, OTHERS, Group, Run, machine
from timing import clone_with_huge_pages, measure, peak_bytes

SHAPES = [
    "512x128256",
    "4096x8142",
    "65536x91",
]  # a language model's tokens, a species classifier, a detector's anchors
QUICK_SHAPES = ["64x128256", "1024x8142", "16384x91"]
ODD_SHAPE = (37, 1003)  # no multiple of a vector's or a tile's length
SHORTEST_SAMPLE = 0.005  # seconds
DEVICE = torch.device("cpu")
BEGIN = time.perf_counter()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxC", help="rows x classes")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float64"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=9, help="samples per candidate, of at least 5 ms each")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_SHAPES)} in float32, no torch.compile")
    parser.add_argument(
        "--output", type=Path, default=Path("bench-output"), help="folder for results.json and pictures"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.dtypes, arguments.no_compile = QUICK_SHAPES, ["float32"], True
    arguments.shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes]
    arguments.dtypes = [getattr(torch, dtype) for dtype in arguments.dtypes]
    return arguments


def progress(text: str) -> None:
    print(f"  [{time.perf_counter() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


def main_candidates(problem: Problem, loss: Loss, compiled: bool) -> list[Candidate]:
    """Everybody in every mode."""
    candidates = eager(problem, loss, ALL_MODES)
    if compiled:
        candidates += eager(problem, loss, ALL_MODES, compiled=True)
    for impl in implementations(problem):
        candidates += ours(problem, loss, impl, ALL_MODES)
    return candidates


def other_candidates(problem: Problem, loss: Loss) -> list[Candidate]:
    """Forward + backward of our kernels (of the reference where none was built) and of eager torch."""
    kernels = [impl for impl in implementations(problem) if impl != "reference"] or ["reference"]
    candidates = [candidate for impl in kernels for candidate in ours(problem, loss, impl, (BACKWARD,))]
    return candidates + eager(problem, loss, (BACKWARD,))


def verified(problem: Problem, loss: Loss, candidates: list[Candidate], group: Group, run: Run) -> list[Candidate]:
    """The candidates that compute the loss. Others are not timed; a wrong value fails the run at its end."""
    truth = truth_of(problem, loss, whole=group.kind != OTHERS)
    right: list[Candidate] = []
    cannot_compile = False
    for candidate in candidates:
        if candidate.name == COMPILED and cannot_compile:
            continue
        try:
            result = check(candidate, problem, truth)
        except Exception as error:
            if candidate.name != COMPILED:
                raise
            cannot_compile = True
            reason = str(error).strip().partition("\n")[0]
            run.notes.append(f"{group.name}: {COMPILED} of {loss.name} skipped, it cannot compile: {reason}")
            continue
        group.checks.append(result)
        if result.passed:
            right.append(candidate)
    return right


def check_odd_shape(dtype: torch.dtype, run: Run) -> None:
    """Every row of every loss, implementation and mode on a small shape; nothing is timed."""
    problem = Problem(*ODD_SHAPE, dtype, DEVICE)
    run.checked_only.append(group := Group.of("checks", problem))
    for loss in dict.fromkeys((*MAIN_LOSSES, *OTHER_LOSSES)):
        verified(problem, loss, main_candidates(problem, loss, compiled=False), group, run)


def time_main(problem: Problem, arguments: argparse.Namespace, run: Run) -> None:
    """The main losses in every mode, and what each call allocates."""
    torch.compiler.reset()  # compiled functions are counted, and those before are of another shape
    run.groups.append(group := Group.of(MAIN, problem))
    candidates = baselines(problem)
    for loss in MAIN_LOSSES:
        progress(f"{group.name}: values of {loss.name}")
        everybody = main_candidates(problem, loss, compiled=not arguments.no_compile)
        candidates += verified(problem, loss, everybody, group, run)
    time_group(group, candidates, arguments)
    for candidate, measurement in zip(candidates, group.measurements, strict=True):
        measurement.peak_bytes = peak_bytes(candidate)


def time_others(problem: Problem, arguments: argparse.Namespace, run: Run) -> None:
    """Every loss once."""
    run.groups.append(group := Group.of(OTHERS, problem))
    candidates = []
    progress(f"{group.name}: values of every loss")
    for loss in (PLAIN, *OTHER_LOSSES):
        candidates += verified(problem, loss, other_candidates(problem, loss), group, run)
    candidates.sort(key=lambda candidate: candidate.name == EAGER)  # those whose ratios are taken follow one another
    time_group(group, baselines(problem) + candidates, arguments)


def time_group(group: Group, candidates: list[Candidate], arguments: argparse.Namespace) -> None:
    progress(f"{group.name}: {arguments.samples} samples of {len(candidates)} candidates")
    group.measurements = measure(candidates, arguments.samples, SHORTEST_SAMPLE)


def benchmark(arguments: argparse.Namespace) -> Run:
    run = Run(machine(arguments.threads))
    print(report.machine_lines(run))
    progress("values on a small shape")
    for dtype in arguments.dtypes:
        check_odd_shape(dtype, run)
    progress("clone() with huge pages, in a process of its own")
    run.clones = clone_with_huge_pages(arguments.shapes, arguments.dtypes, arguments.threads, arguments.samples)
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            problem = Problem(*shape, dtype, DEVICE)
            time_main(problem, arguments, run)
            print(report.group_table(run.groups[-1], run), flush=True)
            if dtype == arguments.dtypes[0]:
                time_others(problem, arguments, run)
                print(report.group_table(run.groups[-1], run), flush=True)
            del problem  # before the next one is made
    return run


def main() -> None:
    if "--device" in sys.argv:  # on a GPU other clocks, shapes and peers
        gpu.main()
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = benchmark(arguments)
    print(report.targets_table(run))
    written = [report.write_json(run, arguments.output / "results.json"), *charts.draw(run, arguments.output)]
    print(report.closing_lines(run, written, time.perf_counter() - BEGIN))
    sys.exit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
