"""Losses fused with the linear layer: values first, then time and memory, in units of the three bare products.

The floor is three matrix products of the same operands into warm memory, unchunked: logits, the gradient of the input
and that of the weight. Peak memory is what a call holds at a time beyond those two gradients. On a GPU
(`--device cuda`) other packages are timed where they are installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which measures memory here, announces itself

import torch
from candidates import COMPILED, EAGER, Candidate
from formulas import OTHER_LOSSES, PLAIN, ClassVectors, Loss
from linear_peers import PEERS, load
from report import heading, machine_lines
from results import Run, machine
from timing import Measurement, measure, peak_bytes
from torch import Tensor

import imbalance_kernels as ik

CPU_SHAPES = ["1024x256x131072", "2048x512x32000"]  # rows x features x classes
GPU_SHAPES = ["4096x4096x128256", "2048x4096x128256", "2048x4096x32000", "8192x2304x256000"]
QUICK_SHAPES = ["128x64x8192"]
SMALL_SHAPE = (37, 24, 1003)  # where every loss is checked against float64
FLOOR, FRESH = "three products", "three products, fresh memory"
TORCHS, TORCHS_BEST = "torch's op, default options", "torch's op, best chunk"
SLOW = 10.0  # seconds
TORCHS_CHUNKS = (128, 256, 512, 1024)  # rows
MEBIBYTE = 1 << 20
FORMULA_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}  # of others: the same formula?
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of ours, a gradient's relative error
# What is promised of a CPU in float32.
TARGETS = {256: 1.15, 80: 1.30}  # MiB of a chunk -> times the floor
MEMORY_BEYOND_CHUNK = 20e6  # bytes
LOSS_LIMIT = 1.05  # of cross-entropy's time

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # input (N, D), weight (C, D), target (N,) -> loss ()


class Problem:
    """A layer's operands: logits of a classifier in training, classes by Zipf's law."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = num_rows, num_features, num_classes = shape
        random = torch.Generator(device).manual_seed(sum(shape))
        counts = (1e6 / torch.arange(1, num_classes + 1, device=device)).long().clamp_min(1)
        self.classes = ClassVectors.of(counts)
        self.target = torch.multinomial(counts.double(), num_rows, replacement=True, generator=random)  # (N,)
        weight = torch.randn(num_classes, num_features, generator=random, device=device)
        input = 2 * torch.randn(num_rows, num_features, generator=random, device=device) / math.sqrt(num_features)
        input += weight[self.target] * (torch.rand(num_rows, 1, generator=random, device=device) / 40)
        self.input = input.to(dtype).requires_grad_()  # (N, D)
        self.weight = weight.to(dtype).requires_grad_()  # (C, D)
        self.bias = torch.randn(num_classes, generator=random, device=device).to(dtype).requires_grad_()  # (C,)
        normalised = [torch.nn.functional.normalize(x.detach(), dim=1) for x in (self.input, self.weight)]
        self.cosines = [x.requires_grad_() for x in normalised]

    @property
    def name(self) -> str:
        return " x ".join(map(str, self.shape)) + " " + str(self.input.dtype).removeprefix("torch.")

    @property
    def gradient_bytes(self) -> int:
        return self.input.nbytes + self.weight.nbytes


@dataclass
class Result:
    """One shape."""

    name: str
    chunks: dict[str, float] = field(default_factory=dict)  # bytes of the candidates that have chunks
    errors: dict[str, float] = field(default_factory=dict)  # relative, of the weight's gradient
    measurements: list[Measurement] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)  # bytes beyond the gradients
    slow: list[Measurement] = field(default_factory=list)  # of one call, which the others do not wait for

    def ratio(self, name: str, to: str = FLOOR) -> float:
        """The median of ratios within a round: what disturbs falls on both."""
        found = {measurement.candidate: measurement.samples for measurement in self.measurements}
        return statistics.median(own / other for own, other in zip(found[name], found[to], strict=False))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="NxDxC", help="rows x features x classes")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--chunks", nargs="+", type=int, help="MiB of a chunk (default: 256 80, on a GPU 1024 512)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-losses", action="store_true", help="leave the other losses out")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_SHAPES)}, no torch.compile")
    parser.add_argument("--output", type=Path, default=Path("bench-output"), help="folder for linear.json")
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    if arguments.quick:
        arguments.shapes, arguments.no_compile = arguments.shapes or QUICK_SHAPES, True
    arguments.shapes = arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    arguments.shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes]
    arguments.dtypes = arguments.dtypes or (["bfloat16"] if on_gpu else ["float32"])
    arguments.dtypes = [getattr(torch, dtype) for dtype in arguments.dtypes]
    arguments.chunks = arguments.chunks or ([1024, 512] if on_gpu else [256, 80])
    return arguments


def training_step(problem: Problem, name: str, step: Step, operands: list[Tensor], loss: str = "") -> Candidate:
    """Forward and backward, the gradients given back."""

    def run() -> Tensor:
        value = step(*operands[:2], problem.target)
        value.backward()
        _wait(problem)
        return value

    def release() -> None:
        for operand in (*operands, problem.bias):
            operand.grad = None

    return Candidate(loss, name, "", run, release, gradient=lambda: operands[1].grad)


def _wait(problem: Problem) -> None:
    if problem.input.device.type == "cuda":
        torch.cuda.synchronize()


def floors(problem: Problem) -> list[Candidate]:
    """The bare products."""
    x, w = problem.input.detach(), problem.weight.detach()
    logits, d_input, d_weight = x @ w.t(), torch.empty_like(x), torch.empty_like(w)

    def warm() -> Tensor:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=d_input)
        torch.mm(logits.t(), x, out=d_weight)
        _wait(problem)
        return d_weight

    def fresh() -> Tensor:
        logits = x @ w.t()
        gradients = logits @ w, logits.t() @ x
        _wait(problem)
        return gradients[1]

    return [Candidate("", FLOOR, "", warm), Candidate("", FRESH, "", fresh)]


def eager(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((input @ weight.t()).float(), target)


def ours(problem: Problem, loss: Loss, mebibytes: int, name: str) -> Candidate:
    module = loss.module(problem.classes, chunk_bytes=mebibytes * MEBIBYTE)
    operands = problem.cosines if loss.on_cosines else [problem.input, problem.weight]
    return training_step(problem, name, module.linear, operands, loss.name)


def with_bias(problem: Problem, mebibytes: int) -> Candidate:
    module = ik.CrossEntropyLoss(chunk_bytes=mebibytes * MEBIBYTE)
    operands = [problem.input, problem.weight]

    def step(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return module.linear(input, weight, target, problem.bias)

    return training_step(problem, "bias", step, operands, "bias")


def torchs(rows: int | None) -> Step | None:
    """torch's own fused operation, where it has one."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    chosen = {} if rows is None else {"batch_chunk_size": rows, "chunking_method": None}
    options = torch.nn.LinearCrossEntropyOptions(**chosen)
    return lambda x, w, t: torch.nn.functional.linear_cross_entropy(x, w, t, options=options)


def others(problem: Problem, arguments: argparse.Namespace, run: Run) -> list[Candidate]:
    """Everybody else's cross-entropy."""
    steps: dict[str, Step | None] = {EAGER: eager}
    if not arguments.no_compile:
        steps[COMPILED] = torch.compile(eager, dynamic=False, fullgraph=True)
    steps[TORCHS] = torchs(None)
    if steps[TORCHS] is None:
        run.notes.append("this torch has no linear_cross_entropy in chunks")
    else:
        steps[TORCHS_BEST] = torchs(_best_chunk(problem))
    if problem.input.device.type == "cuda":
        for peer in PEERS:
            steps[peer.name], reason = load(peer)
            run.notes += [reason] if reason else []
    operands = [problem.input, problem.weight]
    return [training_step(problem, name, step, operands) for name, step in steps.items() if step is not None]


def _best_chunk(problem: Problem) -> int:
    """Rows of torch's fastest chunk, by one call each."""
    seconds = {}
    for rows in (rows for rows in TORCHS_CHUNKS if rows <= problem.shape[0]):
        candidate = training_step(problem, "", torchs(rows), [problem.input, problem.weight])
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            candidate.step()
            times.append(time.perf_counter() - begin)
            candidate.release()
        seconds[rows] = min(times)
    return min(seconds, key=seconds.get) if seconds else problem.shape[0]


def true_d_weight(problem: Problem) -> Tensor:
    """The gradient of cross-entropy's mean in the weight (C, D), literally, in float64."""
    x, w = problem.input.detach().double(), problem.weight.detach().double()
    total = torch.zeros_like(w)
    for rows in torch.arange(x.shape[0], device=x.device).split(128):
        d_logits = (x[rows] @ w.t()).softmax(dim=1)
        d_logits[torch.arange(len(rows), device=x.device), problem.target[rows]] -= 1
        total.addmm_(d_logits.t(), x[rows])
    return total / x.shape[0]


def error_of(candidate: Candidate, truth: Tensor) -> float:
    candidate.step()
    difference = candidate.gradient().double().sub_(truth)
    candidate.release()
    return float(difference.norm() / truth.norm())


def checked(
    candidates: list[Candidate], truth: Tensor, dtype: torch.dtype, result: Result, run: Run
) -> list[Candidate]:
    """Those that compute cross-entropy's gradient; a wrong one of ours fails the run at its end."""
    right = []
    for candidate in candidates:
        begin = time.perf_counter()
        try:
            error = error_of(candidate, truth)
        except Exception as exception:
            if candidate.name.startswith("ours"):
                raise
            reason = str(exception).strip().partition("\n")[0]
            run.notes.append(f"{result.name}: {candidate.name} not timed: {type(exception).__name__}: {reason}")
            continue
        seconds = time.perf_counter() - begin
        limit = (LIMIT if candidate.name.startswith("ours") else FORMULA_LIMIT)[dtype]
        result.errors[candidate.name] = error
        if error <= limit and not candidate.name.startswith("ours") and candidate.name != COMPILED and seconds > SLOW:
            result.slow.append(Measurement("", candidate.name, "", 1, [seconds]))
        elif error <= limit:
            right.append(candidate)
        else:
            run.notes.append(f"{result.name}: WRONG VALUE, not timed: {candidate.name}, relative error {error:.1e}")
    return right


def check_every_loss(device: torch.device) -> list[str]:
    """Each loss's gradient in the weight against its unfused form in float64; return the names of wrong ones."""
    problem = Problem(SMALL_SHAPE, torch.float32, device)
    wrong = []
    for loss in (PLAIN, *OTHER_LOSSES):
        operands = problem.cosines if loss.on_cosines else [problem.input, problem.weight]
        x, w = (operand.detach().double().requires_grad_() for operand in operands)
        logits = x @ w.t()
        value = loss.module(problem.classes, impl="reference")(logits, problem.target)
        (truth,) = torch.autograd.grad(value, w)
        module = loss.module(problem.classes, chunk_bytes=16 * 4 * SMALL_SHAPE[2])
        error = error_of(training_step(problem, "", module.linear, operands), truth)
        wrong += [loss.name] if not error <= LIMIT[torch.float32] else []
    return wrong


def peak_of(candidate: Candidate, problem: Problem) -> float:
    """Bytes that one call holds at a time, beyond the gradients of input and weight."""
    if problem.input.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        candidate.step()
        peak = torch.cuda.max_memory_allocated() - before
        candidate.release()
    else:
        peak = peak_bytes(candidate)
    return peak - problem.gradient_bytes


def time_cross_entropy(problem: Problem, arguments: argparse.Namespace, run: Run) -> Result:
    result = Result(problem.name)
    candidates = [ours(problem, PLAIN, mebibytes, f"ours, {mebibytes} MiB") for mebibytes in arguments.chunks]
    result.chunks = {f"ours, {mebibytes} MiB": mebibytes * MEBIBYTE for mebibytes in arguments.chunks}
    truth = true_d_weight(problem)
    right = checked(candidates + others(problem, arguments, run), truth, problem.input.dtype, result, run)
    del truth
    result.peaks = {candidate.name: peak_of(candidate, problem) for candidate in right}
    result.measurements = measure(floors(problem) + right, arguments.samples, 0.0, math.inf) + result.slow
    return result


def time_losses(problem: Problem, arguments: argparse.Namespace) -> Result:
    """Every loss of one temperature beside cross-entropy, at the first chunk; others make the logits twice or more."""
    mebibytes = arguments.chunks[0]
    result = Result(problem.name + ", every loss")
    candidates = [ours(problem, loss, mebibytes, loss.name) for loss in (PLAIN, *OTHER_LOSSES)]
    result.measurements = measure([*candidates, with_bias(problem, mebibytes)], arguments.samples, 0.0, math.inf)
    return result


def table(result: Result) -> str:
    lines = [heading(result.name)]
    lines.append(f"{'':<34}{'median ms':>10}{'x floor':>9}{'x fresh':>9}{'MB beyond gradients':>21}{'error':>9}")
    for measurement in result.measurements:
        name = measurement.candidate
        peak = f"{result.peaks[name] / 1e6:.0f}" if name in result.peaks else ""
        error = f"{result.errors[name]:.0e}" if name in result.errors else ""
        times = f"{1e3 * measurement.median:>10.1f}{result.ratio(name):>9.3f}{result.ratio(name, FRESH):>9.3f}"
        lines.append(f"{name:<34}{times}{peak:>21}{error:>9}")
    return "\n".join(lines)


def loss_table(result: Result, judged: bool) -> str:
    lines = [heading(f"{result.name}: times beside cross-entropy")]
    for measurement in result.measurements[1:]:
        name, found = measurement.candidate, result.ratio(measurement.candidate, PLAIN.name)
        lines.append(_verdict(name, found, LOSS_LIMIT) if judged else f"{name:<60}{found:>8.3f}")
    return "\n".join(lines)


def verdicts(result: Result) -> list[str]:
    """What is promised of a CPU in float32."""
    lines = []
    for mebibytes, limit in TARGETS.items():
        name = f"ours, {mebibytes} MiB"
        if name in result.peaks:
            found, beyond = result.ratio(name), result.peaks[name] - result.chunks[name]
            lines.append(_verdict(f"{name}: times the floor", found, limit))
            lines.append(_verdict(f"{name}: MB beyond chunk and gradients", beyond / 1e6, MEMORY_BEYOND_CHUNK / 1e6))
            lines += [
                _verdict(f"{name}: times {other}", result.ratio(name, other), 1.0)
                for other in (EAGER, TORCHS_BEST)
                if other in result.peaks
            ]
    return lines


def _verdict(what: str, found: float, limit: float) -> str:
    return f"{what:<60}{found:>8.3f}  at most {limit:<6.2f} {'met' if found <= limit else 'NOT MET'}"


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = Run(machine(arguments.threads))
    print(machine_lines(run))
    begin = time.perf_counter()
    wrong = check_every_loss(device)
    results = []
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            problem = Problem(shape, dtype, device)
            results.append(time_cross_entropy(problem, arguments, run))
            print(table(results[-1]), flush=True)
            if device.type == "cpu" and dtype == torch.float32 and not arguments.quick:  # which is too small to judge
                print("\n".join(verdicts(results[-1])), flush=True)
            if not arguments.no_losses:
                results.append(time_losses(problem, arguments))
                print(loss_table(results[-1], judged=not arguments.quick), flush=True)
            del problem  # before the next one is made
    path = arguments.output / "linear.json"
    record = {"machine": run.machine, "notes": run.notes, "wrong": wrong, "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print("\n" + "\n".join([*run.notes, *(f"WRONG VALUE: {name}" for name in wrong)]))
    print(f"{time.perf_counter() - begin:.0f} s; written: {path}")
    sys.exit(1 if wrong or any("WRONG VALUE" in note and ": ours" in note for note in run.notes) else 0)


if __name__ == "__main__":
    main()
