"""Programs that run CUDA kernels on the CPU, compiled once for each sanitizer; and what is wrong with kernels: mutants.

The mutants of a program are all in one copy of the sources, each behind a condition on its number, since compiling is
what costs.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from emulation import build

CUDA = build.CSRC / "cuda"
FLAGS = ["-O0", "-g1"]  # optimizing takes longer than it saves
DTYPES = ("float32", "bfloat16", "float16", "float64")

RESULT = r"^\w+: wrong: (not the same in every order|.* should be |numbers between)"
RACE = r"WARNING: ThreadSanitizer: data race"
BEYOND = r"AddressSanitizer: heap-buffer-overflow"
MISALIGNED = r"error: address \w+ is not aligned to 16 bytes|runtime error: .* misaligned address"
OVERFLOW = r"runtime error: signed integer overflow"


class Mutant(NamedTuple):
    name: str
    place: str  # file: function
    edits: dict[str, str]  # expressions or, where they end with a semicolon, statements, which the function has once
    case: str
    found: str
    sanitizer: str = "address"


class Emulated:
    """A program, tests/emulation/<name>.cu, with the kernels of an operation; compiled where a test first wants it."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory, name: str, operation: str) -> None:
        build.require()
        self.folder = build.session_folder(tmp_path_factory)
        self.name, self.operation = name, operation

    def right(self) -> Path:
        """The program of the sources as they are, for every dtype, under the address sanitizer."""
        flags = [*build.SANITIZERS["address"], *FLAGS, "-Werror"]
        return build.compile_once(self._sources(CUDA, DTYPES), self.folder / f"{self.name}_address", flags)

    def mutated(self, mutants: Sequence[Mutant], sanitizer: str) -> Path:
        """The program of all mutants, for float32: the environment's MUTANT says which, from 1; 0 is none."""
        copy = self.folder / f"{self.name}_mutants"
        with build.locked(copy.with_suffix(".lock")):
            if not copy.exists():
                shutil.copytree(build.CSRC, copy / "csrc", ignore=shutil.ignore_patterns("cpu"))
                write_mutants(copy / "csrc" / "cuda", mutants)
                (copy / "mutant.h").write_text(
                    '#include <cstdlib>\ninline const int mutant = std::atoi(std::getenv("MUTANT"));\n'
                )
        flags = [*build.SANITIZERS[sanitizer], *FLAGS, "-DFLOAT32_ALONE", "-include", copy / "mutant.h"]
        output = self.folder / f"{self.name}_mutants_{sanitizer}"
        return build.compile_once(self._sources(copy / "csrc" / "cuda", ["float32"]), output, flags)

    def _sources(self, cuda: Path, dtypes: Sequence[str]) -> list[Path]:
        operation = [f"{self.operation}.cu", *(f"{self.operation}_{dtype}.cu" for dtype in dtypes)]
        return [build.EMULATION / f"{self.name}.cu", *(cuda / name for name in operation)]


def run(program, orders, cases, **environment):
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"} | environment
    command = [program, str(orders), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return done.returncode, done.stdout + done.stderr


def check_found(emulated: Emulated, mutants: Sequence[Mutant], number: int) -> None:
    """Assert that what is wrong with a mutant shows as it says."""
    mutant = mutants[number - 1]
    file, _, function = mutant.place.partition(": ")
    for wanted in mutant.edits:
        span((CUDA / file).read_text(), function, wanted)
    orders = 2 if mutant.sanitizer == "address" else 0
    code, output = run(emulated.mutated(mutants, mutant.sanitizer), orders, [mutant.case], MUTANT=str(number))
    assert code != 0, output
    assert re.search(mutant.found, output, re.MULTILINE), output


def span(text, function, wanted):
    """Where `wanted` is in a function; "#1" after it says that of several it is the second."""
    wanted, _, number = wanted.partition("#")
    start = text.find(f"{function}(")
    found = [start + match.start() for match in re.finditer(re.escape(wanted), text[start : text.find("\n}", start)])]
    assert len(found) == 1 or (number and int(number) < len(found)), f"{wanted} is {len(found)} times in {function}"
    begin = found[int(number or 0)]
    return begin, begin + len(wanted)


def write_mutants(cuda, mutants):
    """Put all mutants into the sources, each behind its number: an edit becomes two insertions, so that they nest."""
    insertions = {}
    for number, mutant in enumerate(mutants, 1):
        file, _, function = mutant.place.partition(": ")
        text = (cuda / file).read_text()
        for wanted, instead in mutant.edits.items():
            try:
                begin, end = span(text, function, wanted)
            except AssertionError:
                continue  # its own test says so
            before, after = f"(mutant == {number} ? {instead} : ", ")"
            if text[end - 1] == ";":
                before, after = f"if (mutant == {number}) {{ {instead} }} else {{ ", " }"
            at = insertions.setdefault(cuda / file, [])
            at.append((begin, "opens", -end, number, before))
            at.append((end, "closes", -begin, -number, after))
    for path, at in insertions.items():
        text = path.read_text()
        for position, *_, inserted in sorted(at, reverse=True):  # what closes there comes before what opens
            text = text[:position] + inserted + text[position:]
        path.write_text(text)
