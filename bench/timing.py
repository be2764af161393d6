"""How things are timed: candidates take turns, a sample is a batch of calls, and a clock is read nowhere else.

A device that works asynchronously will need its synchronisation (or its own events) in `_timed`, and nothing else.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from candidates import CLONE, COPY, Candidate, Problem, baselines
from torch.profiler import ProfilerActivity, profile

# Seconds. Shorter calls get an untimed one before each sample: whoever finds the memory that others gave back pays for
# that, and ten times its own cost where a virtual machine's host has taken it meanwhile.
LONG_CALL = 1.0


@dataclass
class Measurement:
    """Seconds per call of a candidate, one number per sample."""

    loss: str
    candidate: str
    mode: str
    calls: int  # per sample
    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # allocated beyond what was there before the call

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def _timed(candidate: Candidate, calls: int) -> float:
    """Seconds per call. What must be prepared before each call is left out, so those calls are timed one by one."""
    if candidate.prepare is None:
        begin = time.perf_counter()
        for _ in range(calls):
            candidate.step()
            candidate.release()
        return (time.perf_counter() - begin) / calls
    seconds = 0.0
    for _ in range(calls):
        candidate.prepare()
        begin = time.perf_counter()
        candidate.step()
        candidate.release()
        seconds += time.perf_counter() - begin
    return seconds / calls


def measure(
    candidates: list[Candidate], samples: int, shortest_sample: float, long_call: float = LONG_CALL
) -> list[Measurement]:
    """Time the candidates in turn, so that whatever else the machine does falls on all of them.

    Each has been called before. A sample lasts at least `shortest_sample` seconds.
    """
    gc.collect()
    gc.disable()
    try:
        seconds = [min(_timed(candidate, 1), _timed(candidate, 1)) for candidate in candidates]
        measurements = [
            Measurement(candidate.loss, candidate.name, candidate.mode, max(1, math.ceil(shortest_sample / call)))
            for candidate, call in zip(candidates, seconds, strict=True)
        ]
        for _ in range(samples):
            for candidate, measurement, call in zip(candidates, measurements, seconds, strict=True):
                if call < long_call:
                    _timed(candidate, 1)
                measurement.samples.append(_timed(candidate, measurement.calls))
    finally:
        gc.enable()
    return measurements


def peak_bytes(candidate: Candidate) -> int:
    """The most that one call holds at a time of what it allocates, by the allocator's own events."""
    if candidate.prepare is not None:
        candidate.prepare()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = candidate.step()
    del result
    candidate.release()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = highest = 0
    for _, change in changes:
        held += change
        highest = max(highest, held)
    return highest


def huge_pages() -> str:
    """The system's setting of transparent huge pages."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        return "unknown"
    options = path.read_text().split()
    return next((option.strip("[]") for option in options if option.startswith("[")), "unknown")


def clone_with_huge_pages(
    shapes: list[tuple[int, int]], dtypes: list[torch.dtype], threads: int, samples: int
) -> list[dict]:
    """copy_ and clone() where torch's allocator asks for huge pages, which it decides once per process."""
    job = {
        "cases": [(*shape, str(dtype).removeprefix("torch.")) for shape in shapes for dtype in dtypes],
        "threads": threads,
        "samples": samples,
    }
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    command = [sys.executable, __file__, json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _clone_job(job: dict) -> list[dict]:
    torch.set_num_threads(job["threads"])
    results = []
    for rows, num_classes, dtype in job["cases"]:
        problem = Problem(rows, num_classes, getattr(torch, dtype), torch.device("cpu"))
        best = {m.candidate: m.minimum for m in measure(baselines(problem), job["samples"], 0.005)}
        results.append({"shape": [rows, num_classes], "dtype": dtype, COPY: best[COPY], CLONE: best[CLONE]})
    return results


if __name__ == "__main__":
    print(json.dumps(_clone_job(json.loads(sys.argv[1]))))
