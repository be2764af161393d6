"""The highest memory in use over a part of a program."""

from __future__ import annotations

import re
from pathlib import Path

import torch


class MemoryPeak:
    """Bytes in use above the level at `start`, at their highest: the allocator's count on a GPU, the process's resident
    set on Linux (its high-water mark can be reset there); elsewhere None, since a guess is no measurement."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.available = device.type == "cuda" or (device.type == "cpu" and self._reset_resident_peak())

    @staticmethod
    def _reset_resident_peak() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    @staticmethod
    def _resident(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.available:
            self._reset_resident_peak()
            self.before = self._resident("VmRSS")

    def stop(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, self._resident("VmHWM") - self.before) if self.available else None
