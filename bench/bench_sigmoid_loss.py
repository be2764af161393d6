"""The sigmoid family, channels-first images, and Dice: values first, then time and memory, in units of a warm copy_.

The floor of a loss with its gradient in place is copy_ of the logits into warm memory: one read and one write. Eager
losses are written as torchvision and users write them: class labels become one-hot, images are permuted into rows.
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
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, which measures memory here, announces itself

import torch
import torch.nn.functional as F
from candidates import CLONE, COMPILED, COPY, Candidate
from report import heading, machine_lines
from results import Run, machine
from timing import Measurement, measure, peak_bytes
from torch import Tensor

from imbalance_kernels.binary_objectives import BINARY_REGISTRY
from imbalance_kernels.functional import column_sums, dice_loss, focal_loss, sigmoid_focal_loss, sigmoid_loss

JUDGED = (262144, 80)  # the shape of what is promised of a CPU
SHAPES = [JUDGED, (1_000_000, 80), (100_000, 1203), (16, 80, 128, 128)]
IMAGES = (8, 19, 512, 1024)
QUICK_SHAPES, QUICK_IMAGES = [(4096, 80), (2, 80, 16, 16)], (1, 19, 64, 64)
POSITIVES = 0.01  # of rows, or of pixels
IGNORED = 0.01
ALPHA, GAMMA = 0.25, 2.0
LABELS, DENSE = "class labels", "dense labels"
OURS, IN_PLACE, LOSS_ONLY = "ours", "ours, in place", "ours, loss alone"
TORCHVISION, BCE = "torchvision's formula", "F.binary_cross_entropy_with_logits"
PERMUTED = "permute + eager"
EAGER_DICE, REFERENCE = "Dice in eager torch, one-hot", "impl='reference'"
COMPARED = 4096  # logits of the first rows or images that are compared with float64
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of a gradient's error, relative to its size
# What is promised of a CPU in float32.
EAGER_TARGET = 10.0  # times faster than torchvision's formula from class labels
COPY_TARGET, COPY_AIM = 4.0, 2.5  # copies, in place
OBJECTIVE_LIMIT = 1.10  # of focal's time, gamma 2
IMAGES_TARGET = 4.0  # times faster than permute + eager
MEMORY_BEYOND_GRADIENT = 1 << 20  # bytes

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, target, normalizer () -> loss ()


class Problem:
    """Logits of a detector in training, and its labels: nearly all of them background."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        random = torch.Generator(device).manual_seed(sum(shape))
        self.shape, self.num_classes = shape, shape[1]
        rows = (shape[0], *shape[2:])
        chance = torch.rand(rows, generator=random, device=device)
        classes = torch.randint(self.num_classes, rows, generator=random, device=device)
        self.labels = torch.where(chance < POSITIVES, classes, self.num_classes)
        self.labels = torch.where(chance > 1 - IGNORED, -100, self.labels)
        self.dense = one_hot(self.labels, self.num_classes).to(dtype).contiguous()
        self.normalizer = ((self.labels >= 0) & (self.labels < self.num_classes)).sum().clamp_min(1).float()
        self.logits = (2 * torch.randn(shape, generator=random, device=device) - 3).to(dtype)
        self.buffer = self.logits.clone()

    @property
    def name(self) -> str:
        return " x ".join(map(str, self.shape)) + " " + str(self.logits.dtype).removeprefix("torch.")


@dataclass
class Result:
    """One shape; ratios are medians of ratios within a round, so that what disturbs falls on both."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # bytes
    measurements: list[Measurement] = field(default_factory=list)

    def ratio(self, name: str, to: str = COPY) -> float:
        found = {_label(measurement): measurement.samples for measurement in self.measurements}
        return statistics.median(own / other for own, other in zip(found[name], found[to], strict=True))


def _label(measured: Measurement | Candidate) -> str:
    name = measured.candidate if isinstance(measured, Measurement) else measured.name
    return f"{name}, {measured.mode}" if measured.mode else name


# ---------------------------------------------------------------- the losses


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels of the logits' shape, as users make them; ignored ones are background here."""
    return F.one_hot(labels.clamp(0, num_classes), num_classes + 1)[..., :num_classes].movedim(-1, 1)


def torchvision_formula(logits: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss, reduction="sum", divided."""
    p = torch.sigmoid(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    p_t = p * target + (1 - p) * (1 - target)
    alpha_t = ALPHA * target + (1 - ALPHA) * (1 - target)
    return (alpha_t * cross_entropy * (1 - p_t) ** GAMMA).sum() / normalizer


def from_labels(formula: Loss, num_classes: int) -> Loss:
    def loss(logits: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
        kept = (labels >= 0).to(logits.dtype).unsqueeze(1)
        return formula(logits, one_hot(labels, num_classes).to(logits.dtype) * kept, normalizer)

    return loss


def bce(logits: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / normalizer


def eager_softmax_focal(logits: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
    """Images permuted into rows, as focal losses for segmentation do."""
    rows = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    log_p = -F.cross_entropy(rows, labels.reshape(-1), reduction="none")
    return (-((1 - log_p.exp()) ** GAMMA) * log_p).sum() / normalizer


def eager_sigmoid_focal(logits: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
    """The same by torchvision's formula: rows, and one-hot labels."""
    rows = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    target = F.one_hot(labels.reshape(-1), logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    return torchvision_formula(rows, target, normalizer)


def eager_dice(logits: Tensor, labels: Tensor, normalizer: Tensor) -> Tensor:
    """Dice of a softmax, class by class, as libraries of segmentation write it."""
    kept = (labels >= 0).unsqueeze(1)
    p = torch.softmax(logits, dim=1) * kept
    y = one_hot(labels, logits.shape[1]) * kept
    rows = [0, *range(2, logits.dim())]
    return 1 - ((2 * (p * y).sum(rows) + 1) / ((p + y).sum(rows) + 1)).mean()


def ours_dice(**keywords: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
        return dice_loss(logits, target, smooth=1.0, from_softmax=True, **keywords)

    return loss


def ours_sigmoid(**keywords: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, target, ALPHA, GAMMA, "sum", normalizer=normalizer, **keywords)

    return loss


def ours_softmax(**keywords: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
        return focal_loss(logits, target, GAMMA, reduction="sum", normalizer=normalizer, **keywords)

    return loss


# ---------------------------------------------------------------- candidates


class _Produce(torch.autograd.Function):
    """Stands for the layer that made the logits: hands them out as no leaf, and has no use for their gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[None, None]:
        return None, None  # parameter, logits


def training(problem: Problem, name: str, labels: str, loss: Loss, target: Tensor) -> Candidate:
    leaf = problem.logits.detach().requires_grad_()

    def step() -> Tensor:
        value = loss(leaf, target, problem.normalizer)
        value.backward()
        _wait(problem)
        return value

    def release() -> None:
        leaf.grad = None

    return Candidate("", name, labels, step, release, gradient=lambda: leaf.grad)


def in_place(problem: Problem, name: str, labels: str, loss: Loss, target: Tensor) -> Candidate:
    parameter = torch.zeros((), device=problem.logits.device, requires_grad=True)

    def step() -> Tensor:
        value = loss(_Produce.apply(parameter, problem.buffer), target, problem.normalizer)
        value.backward()
        _wait(problem)
        return value

    def prepare() -> None:
        problem.buffer.copy_(problem.logits)
        _wait(problem)

    return Candidate("", name, labels, step, prepare=prepare, gradient=lambda: problem.buffer)


def loss_alone(problem: Problem, name: str, labels: str, loss: Loss, target: Tensor) -> Candidate:
    def step() -> Tensor:
        with torch.no_grad():
            value = loss(problem.logits, target, problem.normalizer)
        _wait(problem)
        return value

    return Candidate("", name, labels, step)


def floors(problem: Problem) -> list[Candidate]:
    def copy() -> Tensor:
        problem.buffer.copy_(problem.logits)
        _wait(problem)
        return problem.buffer

    def clone() -> Tensor:
        cloned = problem.logits.clone()
        _wait(problem)
        return cloned

    return [Candidate("", COPY, "", copy), Candidate("", CLONE, "", clone)]


def _wait(problem: Problem) -> None:
    if problem.logits.device.type == "cuda":
        torch.cuda.synchronize()


def sigmoid_candidates(problem: Problem, compiles: bool) -> list[Candidate]:
    labels, dense = problem.labels, problem.dense
    eager = from_labels(torchvision_formula, problem.num_classes)
    found = [
        training(problem, OURS, LABELS, ours_sigmoid(), labels),
        in_place(problem, IN_PLACE, LABELS, ours_sigmoid(inplace=True), labels),
        loss_alone(problem, LOSS_ONLY, LABELS, ours_sigmoid(), labels),
        training(problem, OURS, DENSE, ours_sigmoid(), dense),
        training(problem, TORCHVISION, LABELS, eager, labels),
        training(problem, TORCHVISION, DENSE, torchvision_formula, dense),
        training(problem, BCE, DENSE, bce, dense),
    ]
    if compiles:
        compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        found.append(training(problem, COMPILED, LABELS, compiled, labels))
        compiled = torch.compile(torchvision_formula, dynamic=False, fullgraph=True)
        found.append(training(problem, COMPILED, DENSE, compiled, dense))
    return found


# ---------------------------------------------------------------- what is checked, timed and said


def true_gradient(problem: Problem, loss: Loss, target: Tensor, first: int) -> Tensor:
    """The gradient of the first rows or images in float64."""
    x = problem.logits[:first].double().requires_grad_()
    given = target[:first].double() if target.is_floating_point() else target[:first]
    (gradient,) = torch.autograd.grad(loss(x, given, problem.normalizer.double()), x)
    return gradient


def true_dice_gradient(problem: Problem, first: int) -> Tensor:
    """The same of Dice, whose sums are of all rows or images: in float64 they are made a few at a time."""
    total = None
    for begin in range(0, problem.shape[0], first):
        x, labels = problem.logits[begin : begin + first].double(), problem.labels[begin : begin + first]
        sums = torch.stack(column_sums(x, labels, from_softmax=True, impl="reference")[:3])
        total = sums if total is None else total + sums
    predicted, true_positives = total[:2].requires_grad_()
    loss = 1 - ((2 * true_positives + 1) / (predicted + total[2].detach() + 1)).mean()
    upstream = torch.autograd.grad(loss, (predicted, true_positives))
    x = problem.logits[:first].double().requires_grad_()
    sums = column_sums(x, problem.labels[:first], from_softmax=True, impl="reference")
    (gradient,) = torch.autograd.grad(sums[:2], x, upstream)
    return gradient


def error_of(candidate: Candidate, truth: Tensor) -> float:
    if candidate.prepare is not None:
        candidate.prepare()
    candidate.step()
    found = candidate.gradient()[: truth.shape[0]].double()
    kept = torch.isfinite(truth)
    error = ((found - truth).abs() * kept).max() / truth.abs().max()
    candidate.release()
    return float(error)


def checked(problem: Problem, candidates: list[Candidate], truths: dict[str, Tensor], result: Result, run: Run):
    """Those whose gradient is right; a wrong one of ours fails the run at its end."""
    right = []
    for candidate in candidates:
        name = _label(candidate)
        truth = truths.get(name, truths.get(candidate.mode))
        if candidate.gradient is None or truth is None:
            candidate.step()
            right.append(candidate)
            continue
        try:
            error = error_of(candidate, truth)
        except Exception as exception:
            if candidate.name.startswith("ours"):
                raise
            reason = str(exception).strip().partition("\n")[0]
            run.notes.append(f"{result.name}: {name} not timed: {type(exception).__name__}: {reason}")
            continue
        result.errors[name] = error
        if error <= LIMIT[problem.logits.dtype]:
            right.append(candidate)
        else:
            run.notes.append(f"{result.name}: WRONG VALUE, not timed: {name}, relative error {error:.1e}")
    return right


def time_sigmoid(problem: Problem, arguments: argparse.Namespace, run: Run) -> Result:
    result = Result(problem.name)
    first = max(1, COMPARED // math.prod(problem.shape[1:]))
    eager = from_labels(torchvision_formula, problem.num_classes)
    truths = {
        LABELS: true_gradient(problem, eager, problem.labels, first),
        DENSE: true_gradient(problem, torchvision_formula, problem.dense, first),
        f"{BCE}, {DENSE}": true_gradient(problem, bce, problem.dense, first),
    }
    # An ignored label is background with weight 0, in one-hot form as in ours.
    ignored = (problem.labels[:first] == -100).unsqueeze(1)
    truths[f"{OURS}, {LABELS}"] = truths[f"{IN_PLACE}, {LABELS}"] = truths[LABELS].masked_fill(ignored, 0.0)
    candidates = checked(problem, sigmoid_candidates(problem, not arguments.no_compile), truths, result, run)
    if problem.logits.device.type == "cpu":
        result.peaks = {_label(c): peak_bytes(c) for c in candidates if c.gradient is not None}
    result.measurements = measure(floors(problem) + candidates, arguments.samples, 0.0, math.inf)
    return result


def time_objectives(problem: Problem, arguments: argparse.Namespace) -> Result:
    """Every objective in place beside focal loss with gamma 2; and powers that are products, a root, and neither."""
    result = Result(problem.name + ", every objective")
    objectives = {"focal, gamma 2": BINARY_REGISTRY["focal"](2.0)}
    gammas = (0.0, 0.5, 1.0, 3.0, 5.0, 1.7)
    objectives |= {f"focal, gamma {gamma:g}": BINARY_REGISTRY["focal"](gamma) for gamma in gammas}
    objectives |= {name: objective() for name, objective in BINARY_REGISTRY.items() if name != "focal"}

    def candidate(name: str) -> Candidate:
        def loss(logits: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
            return sigmoid_loss(logits, target, objectives[name], alpha=ALPHA, normalizer=normalizer, inplace=True)

        return in_place(problem, name, "", loss, problem.labels)

    result.measurements = measure([candidate(name) for name in objectives], arguments.samples, 0.0, math.inf)
    return result


def time_images(shape: tuple[int, ...], arguments: argparse.Namespace, device: torch.device, run: Run) -> list[Result]:
    """Softmax and sigmoid focal loss of images with classes first, beside permute + eager."""
    results = []
    for family, eager, ours in (
        ("softmax focal", eager_softmax_focal, ours_softmax),
        ("sigmoid focal", eager_sigmoid_focal, ours_sigmoid),
    ):
        problem = Problem(shape, torch.float32, device)
        problem.labels = torch.randint(shape[1], problem.labels.shape, device=device)
        result = Result(f"{problem.name}, {family} of images")
        truths = {LABELS: true_gradient(problem, eager, problem.labels, 1)}
        candidates = [
            training(problem, OURS, LABELS, ours(), problem.labels),
            in_place(problem, IN_PLACE, LABELS, ours(inplace=True), problem.labels),
            training(problem, PERMUTED, LABELS, eager, problem.labels),
        ]
        time_beside(eager, problem, candidates, truths, result, arguments, run)
        results.append(result)
    return results


def time_dice(shape: tuple[int, ...], arguments: argparse.Namespace, device: torch.device, run: Run) -> Result:
    """Dice of a softmax from class labels, of rows or of images, beside what it is in PyTorch."""
    problem = Problem(shape, torch.float32, device)
    labels = torch.randint(shape[1], problem.labels.shape, device=device)
    problem.labels = torch.where(problem.labels == -100, problem.labels, labels)
    result = Result(f"{problem.name}, Dice of a softmax")
    truths = {LABELS: true_dice_gradient(problem, 1 if len(shape) > 2 else max(1, shape[0] // 8))}
    candidates = [
        training(problem, OURS, LABELS, ours_dice(), problem.labels),
        training(problem, REFERENCE, LABELS, ours_dice(impl="reference"), problem.labels),
        training(problem, EAGER_DICE, LABELS, eager_dice, problem.labels),
    ]
    time_beside(eager_dice, problem, candidates, truths, result, arguments, run)
    return result


def time_beside(
    eager: Loss,
    problem: Problem,
    candidates: list[Candidate],
    truths: dict[str, Tensor],
    result: Result,
    arguments: argparse.Namespace,
    run: Run,
) -> None:
    """Check candidates, and eager compiled beside them, then put their times and peaks into result."""
    if not arguments.no_compile:
        compiled = torch.compile(eager, dynamic=False, fullgraph=True)
        candidates = [*candidates, training(problem, COMPILED, LABELS, compiled, problem.labels)]
    right = checked(problem, candidates, truths, result, run)
    if problem.logits.device.type == "cpu":
        result.peaks = {_label(c): peak_bytes(c) for c in right}
    result.measurements = measure(floors(problem) + right, arguments.samples, 0.0, math.inf)


def table(result: Result) -> str:
    lines = [heading(result.name), f"{'':<52}{'median ms':>10}{'copies':>9}{'peak MB':>9}{'error':>9}"]
    for measurement in result.measurements:
        name = _label(measurement)
        peak = f"{result.peaks[name] / 1e6:.0f}" if name in result.peaks else ""
        error = f"{result.errors[name]:.0e}" if name in result.errors else ""
        lines.append(f"{name:<52}{1e3 * measurement.median:>10.1f}{result.ratio(name):>9.2f}{peak:>9}{error:>9}")
    return "\n".join(lines)


def objective_table(result: Result, judged: bool) -> str:
    lines = [heading(f"{result.name}: times beside focal loss with gamma 2")]
    first = result.measurements[0].candidate
    for measurement in result.measurements[1:]:
        name, found = measurement.candidate, result.ratio(measurement.candidate, first)
        lines.append(_verdict(name, found, OBJECTIVE_LIMIT) if judged else f"{name:<60}{found:>8.3f}")
    return "\n".join(lines)


def verdicts(result: Result, gradient_bytes: int) -> list[str]:
    """What is promised of a CPU in float32."""
    ours, inside, eager = (f"{name}, {LABELS}" for name in (OURS, IN_PLACE, TORCHVISION))
    faster = result.ratio(eager, ours)
    beyond = result.peaks[ours] - gradient_bytes
    return [
        _verdict("times faster than torchvision's formula, class labels", faster, EAGER_TARGET, at_least=True),
        _verdict(f"copies in place (the aim is {COPY_AIM})", result.ratio(inside), COPY_TARGET),
        _verdict("MB beyond one gradient", beyond / 1e6, MEMORY_BEYOND_GRADIENT / 1e6),
    ]


def image_verdicts(result: Result) -> list[str]:
    faster = result.ratio(f"{PERMUTED}, {LABELS}", f"{OURS}, {LABELS}")
    return [_verdict("times faster than permute + eager", faster, IMAGES_TARGET, at_least=True)]


def _verdict(what: str, found: float, limit: float, at_least: bool = False) -> str:
    met = found >= limit if at_least else found <= limit
    return f"{what:<60}{found:>8.2f}  at {'least' if at_least else 'most'} {limit:<6.2f} {'met' if met else 'NOT MET'}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="NxC", help="rows x classes, or images x classes x H x W")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="small shapes, no torch.compile")
    parser.add_argument("--output", type=Path, default=Path("bench-output"), help="folder for sigmoid_loss.json")
    arguments = parser.parse_args()
    arguments.no_compile = arguments.no_compile or arguments.quick
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    if arguments.shapes:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes]
    arguments.shapes = shapes
    arguments.dtypes = [getattr(torch, dtype) for dtype in arguments.dtypes]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = Run(machine(arguments.threads))
    print(machine_lines(run))
    begin = time.perf_counter()
    results = []
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            problem = Problem(shape, dtype, device)
            results.append(time_sigmoid(problem, arguments, run))
            print(table(results[-1]), flush=True)
            judged = shape == JUDGED and dtype == torch.float32 and device.type == "cpu"
            if judged:
                print("\n".join(verdicts(results[-1], problem.logits.nbytes)), flush=True)
            if judged or arguments.quick:
                results.append(time_objectives(problem, arguments))
                print(objective_table(results[-1], judged), flush=True)
            del problem  # before the next one is made
    if torch.float32 in arguments.dtypes:
        for result in time_images(QUICK_IMAGES if arguments.quick else IMAGES, arguments, device, run):
            results.append(result)
            print(table(result), flush=True)
            if device.type == "cpu" and not arguments.quick:
                print("\n".join(image_verdicts(result)), flush=True)
        for shape in (QUICK_SHAPES[0], QUICK_IMAGES) if arguments.quick else (JUDGED, IMAGES):
            results.append(time_dice(shape, arguments, device, run))
            print(table(results[-1]), flush=True)
    path = arguments.output / "sigmoid_loss.json"
    record = {"machine": run.machine, "notes": run.notes, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print("\n" + "\n".join(run.notes))
    print(f"{time.perf_counter() - begin:.0f} s; written: {path}")
    sys.exit(1 if any("WRONG VALUE" in note and ": ours" in note for note in run.notes) else 0)


if __name__ == "__main__":
    main()
