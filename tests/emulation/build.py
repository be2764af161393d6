"""Compiles CUDA sources with g++ against emulator.h, into programs and libraries that run their kernels on the CPU."""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

EMULATION = Path(__file__).parent
CSRC = EMULATION.parent.parent / "csrc"
COMPILER = "g++"  # clang has other names for which sanitizers are on
FLAGS = [
    *("-std=c++20", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing"),
    "-fno-gnu-unique",  # two libraries in one process share no emulator
    "-pthread",
]
LIBRARY = ["-shared", "-fPIC"]
SANITIZERS = {
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
    "none": ["-O1"],
}


@functools.cache
def toolkit() -> Path | None:
    """The CUDA toolkit's folder, by its compiler: what is on PATH may be a wrapper from elsewhere."""
    if not shutil.which("nvcc"):
        return None
    done = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr + done.stdout, re.MULTILINE)
    return Path(found[1]).resolve() if found else None


def missing() -> str | None:
    """What is not there, and without which nothing can be compiled."""
    if not shutil.which(COMPILER):
        return f"{COMPILER} is not installed"
    if toolkit() is None:
        return "no CUDA toolkit: nvcc is not on PATH, or does not say where it is"
    if not (toolkit() / "include" / "cuda_bf16.h").is_file():
        return f"no CUDA headers in {toolkit() / 'include'}"
    return None


def require() -> None:
    """Leave a test out where nothing can be compiled; fail it where that was promised, as in CI."""
    if message := missing():
        if os.environ.get("IMBALANCE_KERNELS_TEST_ALL") == "1":
            pytest.fail(message)
        pytest.skip(message)


def compile(sources: Iterable[Path], output: Path, flags: Iterable[str] = ()) -> Path:
    """Compile `sources` into `output`; what g++ says about them is in the error."""
    include = ["-isystem", toolkit() / "include", "-I", EMULATION, "-I", CSRC]
    command = [COMPILER, *FLAGS, *flags, *include, "-x", "c++", *sources, "-o", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{done.args}\n{done.stderr}")
    return output


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time in."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_once(sources: Iterable[Path], output: Path, flags: Iterable[str] = ()) -> Path:
    """The same, where several processes may want the output and one is to make it."""
    with locked(output.with_suffix(".lock")):
        if not output.exists():
            os.replace(compile(sources, output.with_suffix(".part"), flags), output)
    return output


def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder that all workers of a test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulation"
    folder.mkdir(exist_ok=True)
    return folder


def address_environment() -> Mapping[str, str]:
    """The environment of a Python that loads a library compiled for the address sanitizer."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):  # it looks for the second's exceptions when it starts, and never again
        command = [COMPILER, f"-print-file-name={name}"]
        libraries.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    options = "detect_leaks=0"  # Python's own
    return os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": options}
