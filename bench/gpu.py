"""The softmax losses on a GPU: values first, then times, beside a copy of the logits and the peers that are installed.

    python bench/bench_softmax_loss.py --device cuda

A candidate's calls, one for each of several buffers that together exceed the L2 cache, are captured in a CUDA graph,
and a window of many replays is timed by the device's own events: no launch gap, no read from cache, no window shorter
than its subject. What cannot be captured is called instead, and marked. The normalizer is given. The unit is `copy_` of
the logits, timed in the same way; that of a loss alone is a kernel that only reads them (read_floor.py). In place, each
call but the first works on what the one before has left.

At the end stands a verdict on each thing that was promised: TARGETS, READ_LIMIT, VECTOR_LIMIT, PEAKED_LIMIT, and that
no other candidate is faster. With `--device cpu`, which tries the benchmark itself, there are none.
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
import read_floor
import torch
import triton
from candidates import BACKWARD, COMPILED, COPY, EAGER, FORWARD, IN_PLACE, Candidate, Formula, Problem, in_mode
from charts import GREY, LIGHT_RED, RED, STYLE, finish_bars, finish_figure, label_bar
from checks import check, truth_of
from formulas import FOCAL_MARGIN_PRIOR, OBJECTIVE_LOSSES, PLAIN, VECTOR_LOSSES, WITH_PRIOR, Loss
from peers import PEERS, WITHOUT_LOGITS, load
from torch import Tensor

from imbalance_kernels import implementation

# (N, C, dtype): copies that the CUDA kernels' loss and gradient may take, of any objective with margin and prior
TARGETS = {
    (8192, 128256, "bfloat16"): 1.10,
    (16384, 32000, "bfloat16"): 1.10,
    (8192, 32000, "float32"): 1.10,
    (32768, 1000, "bfloat16"): 1.25,
    (32768, 256, "bfloat16"): 1.25,
}
READ_LIMIT = 1 / 0.92  # read floors of a loss alone
VECTOR_LIMIT = 1.05  # of the time with one class vector less
PEAKED_LIMIT = 1.02  # of the time on random logits: no slower, but windows differ by a percent or two
NO_VERDICTS = "no verdicts: what is promised is promised of a GPU, and this ran on a CPU"

SMALL, LONG = 2048, 16384  # classes: Triton's rows that share a program, and rows that do not fit one
TRITON_TARGETS = {"small": 1.5, "fits": 1.15, "long": 1.4, "clusters": 1.15}  # copies

SURENESS = {"random": 0.0, "peaked": 6.0}  # mean log-odds of the truth: an untrained model, and a trained one
CACHES = 3  # buffers together are this many times the L2 cache
SAMPLES = 5
WINDOW = 0.025  # seconds of a sample, at least: two dozen calls of the largest shape
OURS = ("cuda", "triton")
READ = "read floor"
EVERY_MODE = (BACKWARD, IN_PLACE, FORWARD)
MAIN_LOSSES = (PLAIN, FOCAL_MARGIN_PRIOR)


@dataclass(frozen=True)
class Subject:
    """A loss, who computes it, and in which modes of ours."""

    loss: Loss
    impls: tuple[str, ...] = OURS
    modes: tuple[str, ...] = (BACKWARD,)
    beside_others: bool = False


SUBJECTS = {
    "random": (
        *(Subject(loss, modes=EVERY_MODE, beside_others=True) for loss in MAIN_LOSSES),
        Subject(WITH_PRIOR, modes=(BACKWARD, FORWARD)),
        *(Subject(loss) for loss in VECTOR_LOSSES if loss is not WITH_PRIOR),
        # Triton compiles each objective, which takes longer than all that is timed of it.
        *(Subject(loss, ("cuda",)) for loss in OBJECTIVE_LOSSES if loss not in MAIN_LOSSES),
    ),
    "peaked": tuple(Subject(loss, modes=EVERY_MODE, beside_others=True) for loss in MAIN_LOSSES),
}
# What TARGETS speaks of: neither factors nor smoothing.
WITH_TARGETS = {loss.name for loss in (*MAIN_LOSSES, *OBJECTIVE_LOSSES, WITH_PRIOR)}


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
    gigabytes: float  # a second: the logits read once and, but for a loss alone, written once
    no_graph: str  # why it was not captured
    limit: float | None = None  # of copies

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def name(self) -> str:
        mode = f", {self.mode}" if self.mode else ""
        return (
            f"{self.shape[0]} x {self.shape[1]} {self.dtype}, {self.logits} logits, {self.loss}, {self.candidate}{mode}"
        )


@dataclass
class Verdict:
    """A promise, and what came of it."""

    what: str
    figure: float  # at most the limit, if the promise is kept
    limit: float
    met: bool

    @classmethod
    def of(cls, what: str, figure: float, limit: float) -> Verdict:
        return cls(what, figure, limit, figure <= limit)

    def __str__(self) -> str:
        return f"{'met    ' if self.met else 'NOT MET'} {self.figure:6.3f}, at most {self.limit:.3f}: {self.what}"


@dataclass
class Report:
    machine: dict
    lines: list[Line] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    judged: bool = True  # whether the promises speak of this device


def judges(device: torch.device) -> bool:
    """Return whether the promises speak of a device: times of stand-ins on a CPU say nothing of a GPU."""
    return device.type == "cuda"


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


def normalizer_of(problem: Problem, loss: Loss) -> Tensor:
    """Return what the mean divides by, so that nobody has to sum it while the clock runs."""
    weight = loss.module(problem.classes).weight
    if weight is None:
        return torch.full((), float(problem.shape[0]), device=problem.logits.device)
    return weight.to(problem.logits.device).double()[problem.target].sum().float()


def formulas_of(
    problem: Problem, subject: Subject, compiled: bool, notes: list[str]
) -> Iterator[tuple[str, str, Formula]]:
    """Yield (candidate, mode, formula) of ours in each mode, then of the others."""
    loss = subject.loss
    normalizer = normalizer_of(problem, loss)
    for impl in OURS:
        try:
            implementation.choose(impl, problem.logits)
        except (RuntimeError, ValueError) as error:
            notes.append(f"impl={impl!r} NOT TIMED: {error}")
            continue
        for mode in subject.modes if impl in subject.impls else ():
            module = loss.module(problem.classes, impl=impl, inplace=mode == IN_PLACE).to(problem.logits.device)
            yield impl, mode, lambda logits, target, module=module: module(logits, target, normalizer=normalizer)
    if not subject.beside_others:
        return
    classes = problem.classes.to(problem.dtype)
    eager = lambda logits, target: loss.eager(logits, target, classes)  # noqa: E731
    yield EAGER, BACKWARD, eager
    yield EAGER, FORWARD, eager
    if compiled:
        yield COMPILED, BACKWARD, torch.compile(eager, dynamic=False, fullgraph=True)
    if loss is PLAIN:
        for peer in PEERS:
            formula, note = load(peer)
            if note:
                notes.append(note)
            if formula is not None:
                yield peer.name, peer.mode, formula
            if formula is not None and peer.mode == BACKWARD:  # without a gradient the other may still overwrite logits
                yield peer.name, FORWARD, formula


def read_floor_of(problems: list[Problem], clock: Clock, samples: int) -> tuple[list[float], str]:
    """Return samples of the fastest way to read the logits, each of which was seen to have read them all."""
    best: tuple[list[float], str] = ([math.inf], "")
    for block_bytes in read_floor.BLOCKS:
        found, right = (read(problems[0].logits, block_bytes) for read in (read_floor.read, read_floor.sums))
        torch.testing.assert_close(found.double(), right, rtol=0, atol=0.05)  # less than a vector of them
        calls = [lambda p=p, b=block_bytes: read_floor.read(p.logits, b) for p in problems]
        best = min(best, clock.samples(calls, samples), key=lambda found: min(found[0]))
    return best


def call_of(candidate: Candidate) -> Callable[[], Tensor | None]:
    """Return one call, which hands out its gradient for as long as the caller wants it kept."""

    def call() -> Tensor | None:
        candidate.step()
        gradient = candidate.gradient() if candidate.gradient is not None else None
        candidate.release()
        return gradient

    return call


def limit_of(shape: tuple[int, int], dtype: str, loss: str, candidate: str, mode: str) -> float | None:
    """Return how many copies our loss and gradient may take."""
    if mode == FORWARD or loss not in WITH_TARGETS or candidate not in OURS:
        return None
    if candidate == "cuda":
        return TARGETS.get((*shape, dtype))
    if shape[1] <= SMALL:
        return TRITON_TARGETS["small"]
    if shape[1] <= LONG:
        return TRITON_TARGETS["fits"]
    from imbalance_kernels.triton_kernels import launch

    clusters = torch.cuda.is_available() and launch.device_of(torch.device("cuda", 0)).has_clusters
    return TRITON_TARGETS["clusters" if clusters else "long"]


def time_shape(
    shape: tuple[int, int], dtype: torch.dtype, kind: str, arguments: argparse.Namespace, report: Report
) -> None:
    """Check and time every candidate on one shape."""
    device = torch.device(arguments.device)
    clock = Clock(device, arguments.window)
    problems = problems_of(shape, dtype, SURENESS[kind], device)
    first = problems[0]
    dtype_name = str(dtype)[6:]
    name = f"{shape[0]} x {shape[1]} {dtype_name}, {kind} logits"
    copies, no_graph = clock.samples([lambda p=p: p.buffer.copy_(p.logits) for p in problems], arguments.samples)
    unit = min(copies)

    def add(loss: str, candidate: str, mode: str, seconds: list[float], no_graph: str) -> None:
        best = min(seconds)
        limit = limit_of(shape, dtype_name, loss, candidate, mode) if report.judged else None
        speed = (1 if mode == FORWARD else 2) * first.logits_bytes / best / 1e9
        line = Line(shape, dtype_name, kind, loss, candidate, mode, seconds, best / unit, speed, no_graph, limit)
        report.lines.append(line)
        print(line_of(line), flush=True)

    print(f"\n{name}: {len(problems)} buffers")
    add("", COPY, "", copies, no_graph)
    add("", READ, FORWARD, *read_floor_of(problems, clock, arguments.samples))
    for subject in SUBJECTS[kind]:
        loss = subject.loss
        if time.perf_counter() > arguments.end:
            report.wrong.append(f"{name}: {loss.name} was not timed, out of time")
            continue
        truth = truth_of(first, loss)
        compiled = kind == "random" and not arguments.no_compile  # it takes longest to compile, and is no faster later
        for candidate_name, mode, formula in formulas_of(first, subject, compiled, report.notes):
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
        torch.compiler.reset()


def line_of(line: Line) -> str:
    verdict = ""
    if line.limit is not None:
        verdict = f"  at most {line.limit:.2f}: {'met' if line.copies <= line.limit else 'NOT MET'}"
    return (
        f"{line.loss:<34}{line.candidate:<15}{line.mode:<20}{1e3 * line.least:>9.3f} ms "
        f"({1e3 * statistics.median(line.seconds):.3f}){line.gigabytes:>8.0f} GB/s{figure_of(line.copies):>7} copies"
        f"{', no graph' if line.no_graph else ''}{verdict}"
    )


def machine_of(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: kernels emulated and interpreted"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "imbalance_kernels": implementation.version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def verdicts_of(report: Report) -> list[Verdict]:
    """Return one for each promise on each shape, of each of our implementations that was timed there."""
    by_key = {(x.shape, x.dtype, x.logits, x.loss, x.candidate, x.mode): x for x in report.lines}
    vectors = [loss.name for loss in (PLAIN, *VECTOR_LOSSES)]  # each reads one vector (C,) more than the one before
    verdicts: list[Verdict] = []
    if not report.judged:
        return verdicts
    for line in report.lines:
        if line.candidate not in OURS:
            continue

        def times(beside: Line, line: Line = line) -> float:
            return line.least / beside.least

        if line.limit is not None:
            verdicts.append(Verdict.of(f"{line.name}: copies", line.copies, line.limit))
        where = (line.shape, line.dtype, line.logits)
        if line.mode == FORWARD:
            floor = by_key[(*where, "", READ, FORWARD)]
            verdicts.append(Verdict.of(f"{line.name}: read floors", times(floor), READ_LIMIT))
        fewer = vectors[vectors.index(line.loss) - 1] if line.loss in vectors[1:] else None
        plainer = by_key.get((*where, fewer, line.candidate, line.mode))
        if plainer is not None:
            verdicts.append(Verdict.of(f"{line.name}: beside {fewer}", times(plainer), VECTOR_LIMIT))
        random = by_key.get((line.shape, line.dtype, "random", line.loss, line.candidate, line.mode))
        if line.logits == "peaked" and random is not None:
            verdicts.append(Verdict.of(f"{line.name}: beside random logits", times(random), PEAKED_LIMIT))
        for other in report.lines:
            is_other = other.candidate not in (*OURS, COPY, READ) and other.mode == line.mode
            if is_other and (other.shape, other.dtype, other.logits, other.loss) == (*where, line.loss):
                verdicts.append(Verdict.of(f"{line.name}: beside {other.candidate}", times(other), 1.0))
    return verdicts


def draw(report: Report, folder: Path) -> list[Path]:
    """Pictures with a panel for each shape: loss and gradient in copies, a loss alone in read floors, every loss."""
    device = report.machine["device"]
    pictures = []
    for kind in dict.fromkeys(line.logits for line in report.lines):
        lines = [line for line in report.lines if line.logits == kind and line.loss]
        main = [[line for line in lines if line.loss == loss.name] for loss in MAIN_LOSSES]
        both = [[line for line in group if line.mode in (BACKWARD, IN_PLACE)] for group in main]
        explanation = "Loss and gradient, the best of each candidate's windows. Figures: copies (time). Dashed: copy_."
        title = f"Softmax losses on {device}, {kind} logits"
        pictures.append(_picture(both, title, explanation, folder / f"softmax_loss_gpu_{kind}.png"))
        alone = [[line for line in group if line.mode == FORWARD] for group in main]
        explanation = (
            "No gradient. Figures: copies (time). A kernel that only reads the logits takes the dashed line's time."
        )
        title = f"The loss alone on {device}, {kind} logits"
        floors = {(x.shape, x.dtype): x.copies for x in report.lines if x.candidate == READ and x.logits == kind}
        path = folder / f"softmax_loss_gpu_{kind}_forward.png"
        pictures.append(_picture(alone, title, explanation, path, floors=floors))
    every = [x for x in report.lines if x.logits == "random" and x.candidate in OURS and x.mode == BACKWARD]
    explanation = (
        "Loss and gradient on random logits. Red: CUDA, light red: Triton. Figures: copies (time). Dashed: copy_."
    )
    path = folder / "softmax_loss_gpu_every_loss.png"
    title = f"Objectives and class vectors on {device}"
    pictures.append(_picture([every], title, explanation, path, label=lambda line: line.loss))
    return pictures


def figure_of(value: float) -> str:
    """Return three digits or all before the point: what is far off needs none behind it."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def time_of(seconds: float) -> str:
    return f"{figure_of(1e3 * seconds)} ms" if seconds >= 1e-4 else f"{figure_of(1e6 * seconds)} us"


def label_of(line: Line) -> str:
    return f"{line.candidate}, in place" if line.mode == IN_PLACE else line.candidate


def _picture(
    groups: list[list[Line]],
    title: str,
    explanation: str,
    path: Path,
    label: Callable[[Line], str] = label_of,
    floors: dict | None = None,
) -> Path:
    """A panel for each shape and group of lines: two columns, which stay legible in a page's width."""
    shapes = list(dict.fromkeys((line.shape, line.dtype) for lines in groups for line in lines))
    panels = [
        (shape, dtype, [line for line in lines if (line.shape, line.dtype) == (shape, dtype)])
        for shape, dtype in shapes
        for lines in groups
    ]
    rows = max(1, math.ceil(len(panels) / 2))
    most = max((len(bars) for _, _, bars in panels), default=1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, 2, figsize=(11, (0.27 * most + 1.0) * rows + 1.0), squeeze=False)
        for axis, (shape, dtype, bars) in zip(axes.flat, panels, strict=False):
            loss = "" if len({bar.loss for bar in bars}) != 1 else f"{bars[0].loss}\n"
            floor = 1.0 if floors is None else floors[shape, dtype]
            _panel(axis, bars, f"{loss}{shape[0]} x {shape[1]} {dtype}", label, floor)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis in axes.flat[max(0, len(panels) - 2) : len(panels)]:
            axis.set_xlabel("time, in copies of the logits")
        return finish_figure(figure, title, explanation, path)


def _panel(axis: plt.Axes, bars: list[Line], title: str, label: Callable[[Line], str], floor: float) -> None:
    colours = {"cuda": RED, "triton": LIGHT_RED}
    widths, shades = [bar.copies for bar in bars], [colours.get(bar.candidate, GREY) for bar in bars]
    axis.barh(range(len(bars)), widths, color=shades, height=0.72)
    for place, bar in enumerate(bars):
        label_bar(axis, f"{figure_of(bar.copies)}  ({time_of(bar.least)})", max(bar.copies, floor), place)
    finish_bars(axis, [label(bar) for bar in bars], floor)
    axis.set_title(title, loc="left", fontsize=10)


def benchmark(arguments: argparse.Namespace) -> Report:
    device = torch.device(arguments.device)
    report = Report(machine_of(device), judged=judges(device))
    print("  ".join(f"{key} {value}" for key, value in report.machine.items()))
    arguments.end = time.perf_counter() + arguments.seconds
    for rows, num_classes, dtype in arguments.shapes:
        for kind in SURENESS:
            time_shape((rows, num_classes), getattr(torch, dtype), kind, arguments, report)
    if not any(line.candidate in OURS for line in report.lines):
        report.wrong.append("none of our implementations was timed")
    report.notes = list(dict.fromkeys([*report.notes, WITHOUT_LOGITS]))
    if not report.judged:
        report.notes.insert(0, NO_VERDICTS)
    return report


def finish(report: Report, folder: Path) -> int:
    """Write results and pictures, print what was not met, and return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = verdicts_of(report)
    path = folder / "softmax_loss_gpu.json"
    path.write_text(json.dumps(asdict(report) | {"verdicts": [asdict(x) for x in verdicts]}, indent=1) + "\n")
    missed = [str(verdict) for verdict in verdicts if not verdict.met]
    print(f"\n{len(verdicts)} promises, {len(missed)} not met" if report.judged else "")
    for text in (*missed, *(f"WRONG: {wrong}" for wrong in report.wrong), *report.notes):
        print(f"  {text}")
    print("written:", ", ".join(map(str, [path, *draw(report, folder)])))
    return 1 if report.wrong else 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", metavar="NxCxDTYPE", help="such as 8192x128256xbfloat16")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows for each candidate")
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds of a window, at least")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which nothing more is timed")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, default=Path("bench-output"), help="folder for results and pictures")
    parsed = parser.parse_args(arguments)
    shapes = [shape.split("x") for shape in parsed.shapes or []]
    parsed.shapes = [(int(rows), int(classes), dtype) for rows, classes, dtype in shapes] or list(TARGETS)
    return parsed


def main() -> None:
    arguments = parse_arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("gpu.py: torch finds no GPU here")
    sys.exit(finish(benchmark(arguments), arguments.output))


if __name__ == "__main__":
    main()
