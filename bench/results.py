"""What a run found: groups of measurements that took turns with one another, and the machine they were made on."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
from candidates import BACKWARD, COPY, Problem
from checks import Check
from formulas import Loss
from timing import Measurement, huge_pages

from imbalance_kernels import implementation

MAIN = "main"  # two losses, every candidate, every mode
OTHERS = "others"  # every loss once


@dataclass
class Group:
    """One shape and dtype; every ratio is of minima within a group."""

    kind: str
    shape: tuple[int, int]
    dtype: str
    logits_bytes: int
    measurements: list[Measurement] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @classmethod
    def of(cls, kind: str, problem: Problem) -> Group:
        return cls(kind, problem.shape, str(problem.dtype).removeprefix("torch."), problem.logits_bytes)

    @property
    def name(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]} {self.dtype}"

    @property
    def unit(self) -> float:
        """Seconds of a warm copy_ of the logits."""
        return self.find("", COPY, "").minimum

    def find(self, loss: str, candidate: str, mode: str) -> Measurement | None:
        for measurement in self.measurements:
            if (measurement.loss, measurement.candidate, measurement.mode) == (loss, candidate, mode):
                return measurement
        return None

    def ratio(self, loss: Loss, candidate: str) -> float | None:
        """Forward + backward of a loss, beside the loss that it is compared with."""
        own, other = (self.find(name, candidate, BACKWARD) for name in (loss.name, loss.beside))
        return None if own is None or other is None else own.minimum / other.minimum


@dataclass
class Run:
    machine: dict
    groups: list[Group] = field(default_factory=list)
    checked_only: list[Group] = field(default_factory=list)
    clones: list[dict] = field(default_factory=list)  # copy_ and clone() in a process with huge pages
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    @property
    def failed(self) -> list[tuple[Group, Check]]:
        return [
            (group, check) for group in (*self.checked_only, *self.groups) for check in group.checks if not check.passed
        ]

    def clone_with_huge_pages(self, group: Group) -> dict | None:
        for clone in self.clones:
            if (tuple(clone["shape"]), clone["dtype"]) == (group.shape, group.dtype):
                return clone
        return None


def machine(threads: int) -> dict:
    """Whose figures these are."""
    extension = implementation.extension()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "imbalance_kernels": implementation.version(),
        "build": {} if extension is None else dict(extension.build_info()),
        "transparent_huge_pages": huge_pages(),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "not set"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
