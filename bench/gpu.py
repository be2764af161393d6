"""The softmax losses on a GPU: values first, then times, beside a copy of the logits and the peers that are installed.

    python bench/bench_softmax_loss.py --device cuda

A candidate's calls, one for each of several buffers that together exceed the L2 cache, are captured in a CUDA graph,
and a window of many replays is timed by the device's own events: no launch gap, no read from cache, no window shorter
than its subject. What cannot be captured is called instead, and marked. The normalizer is given. The unit is `copy_` of
the logits, timed in the same way. In place, each call but the first works on what the one before has left.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import triton
from candidates import BACKWARD, COMPILED, COPY, EAGER, FORWARD, IN_PLACE, Candidate, Formula, Problem, in_mode
from charts import GREY, RED, STYLE, finish_bars, finish_figure
from checks import check, truth_of
from formulas import CROSS_ENTROPY, MAIN_LOSSES, Loss
from peers import PEERS, WITHOUT_LOGITS, load
from torch import Tensor

from imbalance_kernels import implementation

SHAPES = [
    (8192, 128256, "bfloat16"),
    (16384, 32000, "bfloat16"),
    (8192, 32000, "float32"),
    (32768, 1000, "bfloat16"),
    (32768, 256, "bfloat16"),
]
SURENESS = {"random": 0.0, "peaked": 6.0}  # mean log-odds of the truth: an untrained model, and a trained one
CACHES = 3  # buffers together are this many times the L2 cache
SAMPLES = 7
WINDOW = 0.05  # seconds of a sample, at least
OURS = ("triton", "cuda")
SMALL, LONG = 2048, 16384  # classes: rows that share a program, and rows that do not fit one
LIMITS = {"small": 1.5, "fits": 1.15, "long": 1.4, "clusters": 1.15}  # copies, of loss and gradient


@dataclass
class Line:
    """One candidate on one shape."""

    shape: tuple[int, int]
    dtype: str
    logits: str  # of SURENESS
    loss: str
    candidate: str
    mode: str
    seconds: list[float]  # per call, one for each sample
    copies: float  # of the least
    gigabytes: float  # a second, counting a read and a write of the logits
    no_graph: str  # why it was not captured
    limit: float | None = None

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def group(self) -> tuple:
        """What is compared with one another."""
        return self.shape, self.dtype, self.logits, self.loss


@dataclass
class Report:
    machine: dict
    lines: list[Line] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Clock:
    """Times calls on a device; on a CPU, which only tests do, by the clock on the wall."""

    def __init__(self, device: torch.device, window: float) -> None:
        self.on_gpu = device.type == "cuda"
        self.window = window

    def samples(self, calls: list[Callable[[], object]], count: int) -> tuple[list[float], str]:
        """Return seconds per call, and why the calls were not captured in a graph ("" where they were)."""
        for call in calls:
            call()
        replay, reason = self._captured(calls) if self.on_gpu else (None, "no GPU")
        if replay is None:
            replay = lambda: [call() for call in calls]  # noqa: E731
        once = self._window(replay, 1)
        times = max(1, math.ceil(self.window / max(once, 1e-7)))
        return [self._window(replay, times) / len(calls) for _ in range(count)], reason

    def _captured(self, calls: list[Callable[[], object]]) -> tuple[Callable[[], object] | None, str]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                calls[0]()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                kept = [call() for call in calls]  # their gradients stay apart, as their logits do
        except RuntimeError as error:  # it waits for the device, say
            torch.cuda.synchronize()
            return None, str(error).partition("\n")[0]

        def replay(results: list = kept) -> None:
            graph.replay()

        return replay, ""

    def _window(self, replay: Callable[[], object], times: int) -> float:
        """Return seconds of one replay, from a window of several."""
        if not self.on_gpu:
            begin = time.perf_counter()
            for _ in range(times):
                replay()
            return (time.perf_counter() - begin) / times
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(times):
            replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / times


def problems_of(shape: tuple[int, int], dtype: torch.dtype, sureness: float, device: torch.device) -> list[Problem]:
    """Return as many problems as it takes to leave the cache behind; the first is the one that is checked."""
    size = shape[0] * shape[1] * dtype.itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else size
    return [Problem(*shape, dtype, device, sureness) for _ in range(min(24, max(1, math.ceil(CACHES * cache / size))))]


def formulas_of(problem: Problem, loss: Loss, compiled: bool, notes: list[str]) -> Iterator[tuple[str, str, Formula]]:
    """Yield (candidate, mode, formula) of ours in each mode, then of the others."""
    rows = torch.full((), float(problem.shape[0]), device=problem.logits.device)
    for impl in OURS:
        try:
            implementation.choose(impl, problem.logits)
        except (RuntimeError, ValueError) as error:
            notes.append(f"impl={impl!r} not timed: {error}")
            continue
        for mode in (BACKWARD, IN_PLACE, FORWARD):
            module = loss.module(problem.classes, impl=impl, inplace=mode == IN_PLACE).to(problem.logits.device)
            yield impl, mode, lambda logits, target, module=module: module(logits, target, normalizer=rows)
    classes = problem.classes.to(problem.dtype)
    eager = lambda logits, target: loss.eager(logits, target, classes)  # noqa: E731
    yield EAGER, BACKWARD, eager
    if compiled:
        yield COMPILED, BACKWARD, torch.compile(eager, dynamic=False, fullgraph=True)
    if loss.name == CROSS_ENTROPY:
        for peer in PEERS:
            formula, note = load(peer)
            if note:
                notes.append(note)
            if formula is not None:
                yield peer.name, peer.mode, formula


def call_of(candidate: Candidate) -> Callable[[], Tensor | None]:
    """Return one call, which hands out its gradient for as long as the caller wants it kept."""

    def call() -> Tensor | None:
        candidate.step()
        gradient = candidate.gradient() if candidate.gradient is not None else None
        candidate.release()
        return gradient

    return call


def limit_of(num_classes: int, candidate: str, mode: str) -> float | None:
    """Return how many copies our loss and gradient may take."""
    if candidate not in OURS or mode == FORWARD:
        return None
    if num_classes <= SMALL:
        return LIMITS["small"]
    if num_classes <= LONG:
        return LIMITS["fits"]
    from imbalance_kernels.triton_kernels import launch

    clusters = torch.cuda.is_available() and launch.device_of(torch.device("cuda", 0)).has_clusters
    return LIMITS["clusters" if clusters else "long"]


def time_shape(
    shape: tuple[int, int], dtype: torch.dtype, kind: str, arguments: argparse.Namespace, report: Report
) -> None:
    """Check and time every candidate on one shape."""
    device = torch.device(arguments.device)
    clock = Clock(device, arguments.window)
    problems = problems_of(shape, dtype, SURENESS[kind], device)
    first = problems[0]
    name = f"{shape[0]} x {shape[1]} {str(dtype)[6:]}, {kind} logits"
    copies, no_graph = clock.samples([lambda p=p: p.buffer.copy_(p.logits) for p in problems], arguments.samples)
    unit = min(copies)

    def add(loss: str, candidate: str, mode: str, seconds: list[float], no_graph: str) -> None:
        best = min(seconds)
        limit = limit_of(shape[1], candidate, mode)
        speed = 2 * first.logits_bytes / best / 1e9
        line = Line(shape, str(dtype)[6:], kind, loss, candidate, mode, seconds, best / unit, speed, no_graph, limit)
        report.lines.append(line)

    add("", COPY, "", copies, no_graph)
    print(f"\n{name}: {len(problems)} buffers, copy_ {1e3 * unit:.3f} ms")
    for loss in MAIN_LOSSES:
        truth = truth_of(first, loss)
        compiled = kind == "random" and not arguments.no_compile  # it takes longest to compile, and is no faster later
        for candidate_name, mode, formula in formulas_of(first, loss, compiled, report.notes):
            candidates = [in_mode(problem, loss, candidate_name, formula, mode) for problem in problems]
            try:
                found = check(candidates[0], first, truth)
                if not found.passed:
                    errors = f"relative errors of loss {found.loss_error}, gradient {found.gradient_error}"
                    text = f"{name}: {loss.name}, {candidate_name}, {mode}: {errors}, worst row {found.row_error}"
                    if candidate_name in OURS:
                        report.wrong.append(text)
                        continue
                    report.notes.append(f"inaccurate, but timed: {text}")
                if candidates[0].prepare is not None:
                    for candidate in candidates:
                        candidate.prepare()
                seconds, no_graph = clock.samples([call_of(candidate) for candidate in candidates], arguments.samples)
            except Exception as error:
                if candidate_name in OURS:
                    raise
                report.notes.append(f"{name}: {candidate_name} of {loss.name}: {type(error).__name__}: {error}"[:300])
                continue
            if no_graph and clock.on_gpu:
                text = f"{name}: {loss.name}, {candidate_name}, {mode} was not captured in a graph: {no_graph}"
                (report.wrong if candidate_name in OURS else report.notes).append(text)
            add(loss.name, candidate_name, mode, seconds, no_graph)
            print(line_of(report.lines[-1]), flush=True)
            first.logits.copy_(problems[-1].logits) if len(
                problems
            ) > 1 else None  # who overwrites logits, as liger does
        torch.compiler.reset()


def line_of(line: Line) -> str:
    verdict = ""
    if line.limit is not None:
        verdict = f"  at most {line.limit:.2f}: {'met' if line.copies <= line.limit else 'NOT MET'}"
    return (
        f"{line.loss:<26}{line.candidate:<15}{line.mode:<20}{1e3 * line.least:>9.3f} ms "
        f"({1e3 * statistics.median(line.seconds):.3f}){line.gigabytes:>8.0f} GB/s{line.copies:>7.2f} copies"
        f"{', no graph' if line.no_graph else ''}{verdict}"
    )


def machine_of(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, by Triton's interpreter"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "imbalance_kernels": implementation.version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def slower_than_peers(report: Report) -> list[str]:
    """Return where a peer, torch.compile or eager torch is faster than ours."""
    found = []
    for line in report.lines:
        if line.candidate != "triton" or line.mode != BACKWARD:
            continue
        same = [
            x
            for x in report.lines
            if (x.shape, x.dtype, x.logits, x.loss) == (line.shape, line.dtype, line.logits, line.loss)
        ]
        for other in same:
            if other.mode == BACKWARD and other.candidate not in OURS and other.least < line.least:
                found.append(f"{line.shape} {line.dtype} {line.logits} {line.loss}: {other.candidate} is faster")
    return found


def draw(report: Report, folder: Path) -> list[Path]:
    """One picture for each kind of logits: loss and gradient in copies, a panel for each shape and loss."""
    pictures = []
    for kind in dict.fromkeys(line.logits for line in report.lines):
        lines = [
            line for line in report.lines if line.logits == kind and line.loss and line.mode in (BACKWARD, IN_PLACE)
        ]
        shapes = list(dict.fromkeys((line.shape, line.dtype) for line in lines))
        with plt.rc_context(STYLE):
            size = (4.0 * len(shapes) + 1.5, 2.8 * len(MAIN_LOSSES) + 1.0)
            figure, axes = plt.subplots(len(MAIN_LOSSES), len(shapes), figsize=size, squeeze=False)
            for row, loss in enumerate(MAIN_LOSSES):
                for column, (shape, dtype) in enumerate(shapes):
                    bars = [x for x in lines if (x.shape, x.dtype, x.loss) == (shape, dtype, loss.name)]
                    panel(axes[row][column], bars, f"{loss.name}\n{shape[0]} x {shape[1]} {dtype}")
            for axis in axes[-1]:
                axis.set_xlabel("time, in copies of the logits")
            explanation = (
                "Loss and gradient, the best of each candidate's windows. Figures: copies (time).\nDashed: copy_."
            )
            title = f"Softmax losses on {report.machine['device']}, {kind} logits"
            pictures.append(finish_figure(figure, title, explanation, folder / f"softmax_loss_gpu_{kind}.png"))
    return pictures


def panel(axis: plt.Axes, bars: list[Line], title: str) -> None:
    labels = [f"{bar.candidate}, in place" if bar.mode == IN_PLACE else bar.candidate for bar in bars]
    colours = [RED if bar.candidate in OURS else GREY for bar in bars]
    axis.barh(range(len(bars)), [bar.copies for bar in bars], color=colours, height=0.72)
    for place, bar in enumerate(bars):
        text = f"{bar.copies:.2f}  ({1e3 * bar.least:.2f} ms)"
        axis.annotate(text, (max(bar.copies, 1.0), place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    finish_bars(axis, labels)
    axis.set_title(title, loc="left", fontsize=10)


def benchmark(arguments: argparse.Namespace) -> Report:
    report = Report(machine_of(torch.device(arguments.device)))
    print("  ".join(f"{key} {value}" for key, value in report.machine.items()))
    for rows, num_classes, dtype in arguments.shapes:
        for kind in SURENESS:
            time_shape((rows, num_classes), getattr(torch, dtype), kind, arguments, report)
    if not any(line.candidate in OURS for line in report.lines):
        report.wrong.append("none of our implementations was timed")
    report.notes = list(dict.fromkeys([*report.notes, WITHOUT_LOGITS]))
    return report


def finish(report: Report, folder: Path) -> int:
    """Write results and pictures, print what was not met, and return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    missed = [line_of(line) for line in report.lines if line.limit is not None and line.copies > line.limit]
    slower = slower_than_peers(report)
    record = asdict(report) | {"missed": missed, "slower_than": slower}
    path = folder / "softmax_loss_gpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{sum(line.limit is not None for line in report.lines)} limits, {len(missed)} missed")
    for text in (*missed, *slower, *(f"WRONG: {wrong}" for wrong in report.wrong), *report.notes):
        print(f"  {text}")
    print("written:", ", ".join(map(str, [path, *draw(report, folder)])))
    return 1 if report.wrong else 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", metavar="NxCxDTYPE", help="such as 8192x128256xbfloat16")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows for each candidate")
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds of a window, at least")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, default=Path("bench-output"), help="folder for results and pictures")
    parsed = parser.parse_args(arguments)
    shapes = [shape.split("x") for shape in parsed.shapes or []]
    parsed.shapes = [(int(rows), int(classes), dtype) for rows, classes, dtype in shapes] or SHAPES
    return parsed


def main() -> None:
    arguments = parse_arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("gpu.py: torch finds no GPU here")
    sys.exit(finish(benchmark(arguments), arguments.output))


if __name__ == "__main__":
    main()
