"""Who is timed, and on what: the logits of one shape and dtype, and every candidate as one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from formulas import ClassVectors, Loss
from torch import Tensor

from imbalance_kernels import implementation

FORWARD = "forward only"
BACKWARD = "forward + backward"
UPSTREAM = "upstream 1/8"
IN_PLACE = "in place"
ALL_MODES = (FORWARD, BACKWARD, UPSTREAM, IN_PLACE)
UPSTREAM_OF = {BACKWARD: 1.0, UPSTREAM: 1 / 8, IN_PLACE: 1.0}

OURS = "cpu"  # the implementation that has targets and bars
EAGER = "eager"
COMPILED = "torch.compile"
COPY = "copy_"
CLONE = "clone()"


class Problem:
    """Logits of a classifier in training: classes by Zipf's law, rows from hopeless to sure (log-odds 0 +- 4).

    `sureness` is added to the log-odds: a trained classifier is sure of nearly every row.
    """

    def __init__(
        self, rows: int, num_classes: int, dtype: torch.dtype, device: torch.device, sureness: float = 0.0
    ) -> None:
        self.shape = (rows, num_classes)
        self.dtype = dtype
        random = torch.Generator(device).manual_seed(rows + num_classes)
        counts = (1e6 / torch.arange(1, num_classes + 1, device=device)).long().clamp_min(1)
        self.classes = ClassVectors.of(counts)
        self.target = torch.multinomial(counts.double(), rows, replacement=True, generator=random)  # (N,)

        logits = 2 * torch.randn(rows, num_classes, generator=random, device=device)
        log_odds = sureness + 4 * torch.randn(rows, generator=random, device=device)
        index = self.target[:, None]
        logits.scatter_(1, index, (logits.logsumexp(dim=1) + log_odds)[:, None])
        self.logits = logits.to(dtype)  # (N, C)

        cosines = logits.mul_(0.1).clamp_(-0.9, 0.9)
        cosines.scatter_(1, index, torch.rand(rows, 1, generator=random, device=device) * 1.2 - 0.3)
        self.cosines = cosines.to(dtype)  # (N, C)

        self.buffer = torch.empty_like(self.logits).copy_(self.logits)  # (N, C), its pages touched

    @property
    def logits_bytes(self) -> int:
        return self.logits.numel() * self.logits.element_size()

    def input(self, loss: Loss) -> Tensor:
        return self.cosines if loss.on_cosines else self.logits


@dataclass
class Candidate:
    """One thing to time. `step` and `release` are timed, `prepare` is not; `gradient` may be read between the two."""

    loss: str
    name: str
    mode: str
    step: Callable[[], Tensor]
    release: Callable[[], None] = lambda: None
    prepare: Callable[[], Any] | None = None
    gradient: Callable[[], Tensor] | None = None


class Produce(torch.autograd.Function):
    """Stands for the layer that made the logits: hands them out as no leaf, and has no use for their gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[None, None]:
        return None, None  # parameter, logits


Formula = Callable[[Tensor, Tensor], Tensor]  # logits (N, C), target (N,) -> loss ()


def in_mode(problem: Problem, loss: Loss, name: str, formula: Formula, mode: str) -> Candidate:
    """Return the candidate that computes `formula` in `mode`."""
    if mode == FORWARD:
        return _forward_only(problem, loss, name, formula)
    if mode == IN_PLACE:
        return _in_place(problem, loss, name, formula)
    leaf = problem.input(loss).detach().requires_grad_()
    upstream = UPSTREAM_OF[mode]

    def step() -> Tensor:
        value = formula(leaf, problem.target)
        (value if upstream == 1 else value * upstream).backward()
        return value

    def release() -> None:
        leaf.grad = None  # so that the next call gets a fresh gradient; each candidate pays for giving back its own

    return Candidate(loss.name, name, mode, step, release, gradient=lambda: leaf.grad)


def _forward_only(problem: Problem, loss: Loss, name: str, formula: Formula) -> Candidate:
    logits = problem.input(loss)

    def step() -> Tensor:
        with torch.no_grad():
            return formula(logits, problem.target)

    return Candidate(loss.name, name, FORWARD, step)


def _in_place(problem: Problem, loss: Loss, name: str, formula: Formula) -> Candidate:
    parameter = torch.zeros((), device=problem.logits.device, requires_grad=True)

    def step() -> Tensor:
        value = formula(Produce.apply(parameter, problem.buffer), problem.target)
        value.backward()
        return value

    def prepare() -> None:
        problem.buffer.copy_(problem.input(loss))

    return Candidate(loss.name, name, IN_PLACE, step, prepare=prepare, gradient=lambda: problem.buffer)


def baselines(problem: Problem) -> list[Candidate]:
    """The unit of time, and what fresh memory alone costs."""
    return [
        Candidate("", COPY, "", lambda: problem.buffer.copy_(problem.logits)),
        Candidate("", CLONE, "", lambda: problem.logits.clone()),
    ]


def implementations(problem: Problem) -> Iterator[str]:
    """The values of impl= that serve these logits."""
    for impl in implementation.IMPLEMENTATIONS:
        try:
            yield implementation.choose(impl, problem.logits)
        except (RuntimeError, ValueError):  # not built, or not for this device
            continue


def modes_of(impl: str) -> tuple[str, ...]:
    """The reference has nothing in place, and autograd for any upstream gradient."""
    return (FORWARD, BACKWARD) if impl == "reference" else ALL_MODES


def ours(problem: Problem, loss: Loss, impl: str, modes: tuple[str, ...]) -> list[Candidate]:
    """The package's own candidates, in those of `modes` that the implementation has."""
    return [
        in_mode(problem, loss, impl, loss.module(problem.classes, impl=impl, inplace=mode == IN_PLACE), mode)
        for mode in modes
        if mode in modes_of(impl)
    ]


def eager(problem: Problem, loss: Loss, modes: tuple[str, ...], compiled: bool = False) -> list[Candidate]:
    """The formula written eagerly, as it is or compiled; nothing where a loss has none."""
    if loss.eager is None:
        return []
    classes = problem.classes.to(problem.dtype)
    write = loss.eager

    def formula(logits: Tensor, target: Tensor) -> Tensor:
        return write(logits, target, classes)

    name = COMPILED if compiled else EAGER
    # fullgraph: a compiler that gives up raises, and is not timed as what it fell back to.
    formula = torch.compile(formula, dynamic=False, fullgraph=True) if compiled else formula
    return [in_mode(problem, loss, name, formula, mode) for mode in modes if mode != IN_PLACE]
