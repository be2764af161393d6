"""What the CPU kernels are to reach, and what a run found: every verdict is computed from the run's measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from candidates import BACKWARD, CLONE, EAGER, FORWARD, IN_PLACE, OURS
from formulas import CROSS_ENTROPY, FOCAL_ADJUSTED, OTHER_LOSSES
from results import MAIN, OTHERS, Group, Run

WIDE_SHAPES = ((512, 128256), (4096, 8142))
NARROW_SHAPE = (65536, 91)

TIMES_FASTER = {CROSS_ENTROPY: 6.0, FOCAL_ADJUSTED: 8.0}
BACKWARD_COPIES = {"float32": 2.2, "bfloat16": 4.5}
ROW_VECTORS = 0.1  # of the logits' size: what vectors (N,) and a scratch row per thread may take

# By the limit that formulas.py gives a loss.
OPTIONS = {
    1.10: "objective, margin or prior: times cross-entropy",
    1.15: "a further class vector: times the loss without it",
    1.50: "smoothing with class weights: times cross-entropy",
}


@dataclass(frozen=True)
class Target:
    where: str
    what: str
    measured: float | None  # None: not in this run
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def targets_of(run: Run) -> list[Target]:
    """Every target, measured or not."""
    targets: list[Target] = []
    for shape in WIDE_SHAPES:
        for dtype in BACKWARD_COPIES:
            targets += _wide(Found(run, MAIN, shape, dtype))
        targets += _forward(Found(run, MAIN, shape, "float32"))
    targets += _narrow(Found(run, MAIN, NARROW_SHAPE, "float32"))
    for shape in (*WIDE_SHAPES, NARROW_SHAPE):
        targets += _memory(Found(run, MAIN, shape, "float32"))
        targets += _options(Found(run, OTHERS, shape, "float32"))
    return targets


class Found:
    """The figures of one group; None for whatever it lacks."""

    def __init__(self, run: Run, kind: str, shape: tuple[int, int], dtype: str) -> None:
        groups = (group for group in run.groups if (group.kind, group.shape, group.dtype) == (kind, shape, dtype))
        self.group: Group | None = next(groups, None)
        self.name = f"{shape[0]} x {shape[1]} {dtype}"

    def seconds(self, loss: str, mode: str, candidate: str = OURS) -> float | None:
        measurement = self.group and self.group.find(loss, candidate, mode)
        return measurement.minimum if measurement else None

    def copies(self, loss: str, mode: str) -> float | None:
        return self.group and _ratio(self.seconds(loss, mode), self.group.unit)

    def clones(self, loss: str, mode: str) -> float | None:
        return _ratio(self.seconds(loss, mode), self.seconds("", "", CLONE))

    def times_faster(self, loss: str) -> float | None:
        return _ratio(self.seconds(loss, BACKWARD, EAGER), self.seconds(loss, BACKWARD))

    def peak(self, loss: str, mode: str) -> float | None:
        measurement = self.group and self.group.find(loss, OURS, mode)
        return measurement.peak_bytes / self.group.logits_bytes if measurement else None


def _ratio(value: float | None, unit: float | None) -> float | None:
    return None if value is None or unit is None else value / unit


def _wide(found: Found) -> Iterator[Target]:
    single = found.name.endswith("float32")
    limit = BACKWARD_COPIES["float32" if single else "bfloat16"]
    for loss, times in TIMES_FASTER.items():
        what = f"{loss}, {BACKWARD}"
        yield Target(found.name, f"{what}: copies", found.copies(loss, BACKWARD), limit)
        yield Target(found.name, f"{what}: times faster than eager", found.times_faster(loss), times, at_most=False)
        if single:
            yield Target(found.name, f"{what}: clones", found.clones(loss, BACKWARD), 0.5)
            yield Target(found.name, f"{loss}, {IN_PLACE}: copies", found.copies(loss, IN_PLACE), 1.5)


def _narrow(found: Found) -> Iterator[Target]:
    what = f"{CROSS_ENTROPY}, {BACKWARD}"
    seconds = found.seconds(CROSS_ENTROPY, BACKWARD)
    yield Target(found.name, f"{what}: ms", seconds and 1e3 * seconds, 2.5)
    faster = found.times_faster(CROSS_ENTROPY)
    yield Target(found.name, f"{what}: times faster than eager", faster, 1.6, at_most=False)


def _forward(found: Found) -> Iterator[Target]:
    for loss in TIMES_FASTER:
        yield Target(found.name, f"{loss}, {FORWARD}: copies", found.copies(loss, FORWARD), 1.0)


def _memory(found: Found) -> Iterator[Target]:
    for mode, gradients in ((FORWARD, 0), (BACKWARD, 1), (IN_PLACE, 0)):
        _, peak = _worst(lambda loss, mode=mode: found.peak(loss, mode), list(TIMES_FASTER))
        yield Target(found.name, f"{mode}: memory allocated, in logits", peak, gradients + ROW_VECTORS)


def _options(found: Found) -> Iterator[Target]:
    losses = {loss.name: loss for loss in OTHER_LOSSES}
    for limit, what in OPTIONS.items():
        names = [name for name, loss in losses.items() if loss.limit == limit]
        worst, ratio = _worst(lambda name: found.group and found.group.ratio(losses[name], OURS), names)
        yield Target(found.name, f"{what} (most: {worst})", ratio, limit)


def _worst(figure: Callable[[str], float | None], names: list[str]) -> tuple[str, float | None]:
    """The highest figure and whose it is; nothing if one of them is missing."""
    figures = {name: figure(name) for name in names}
    if None in figures.values():
        return "", None
    name = max(figures, key=figures.__getitem__)
    return name, figures[name]
