"""Runs the tables of tests with impl="cuda" on the CPU, emulated, under the address and undefined-behaviour sanitizers.

    PYTHONPATH=tests python -m emulation.tables LIBRARY [arguments for pytest]

LIBRARY is made of csrc/cuda and csrc/bindings.cpp, where it is older than they are.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from emulation import build
from torch.utils import cpp_extension

TESTS = build.EMULATION.parent
TABLES = (
    *("cuda", "softmax_loss", "log_probs", "sigmoid_loss", "channels_first", "linear", "numerics", "modules"),
    *("properties", "behaviour", "multilabel_softmax", "batch_statistics", "sigmoid_modules"),
)
SOURCES = [build.CSRC / "bindings.cpp", *sorted(build.CSRC.glob("cuda/*.cu"))]


def make_library(output: Path) -> None:
    """Compile the CUDA kernels and their bindings against the emulator, one process for each file."""
    inputs = [path for folder in (build.CSRC, build.EMULATION) for path in folder.rglob("*") if path.is_file()]
    if output.exists() and output.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return
    print("compiling the CUDA kernels for the CPU, which takes 1-2 minutes on 2 cores ...", flush=True)
    begin = time.perf_counter()
    flags = [*build.SANITIZERS["address"], "-fPIC", '-DIMBALANCE_WITH_CUDA="emulated"', "-DIMBALANCE_EMULATED"]
    for path in cpp_extension.include_paths():
        flags += ["-isystem", path]
    objects = output.with_suffix(".objects")
    objects.mkdir(parents=True, exist_ok=True)

    def compile_source(source: Path) -> Path:
        return build.compile([source], objects / f"{source.name}.o", [*flags, "-c"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compile_source, SOURCES))
    libraries = Path(torch.__file__).parent / "lib"
    link = [build.COMPILER, *build.LIBRARY, *build.SANITIZERS["address"], *made, "-o", output.with_suffix(".part")]
    link += [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    subprocess.run(list(map(str, link)), check=True)
    os.replace(output.with_suffix(".part"), output)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)


def main() -> int:
    if message := build.missing():
        print(f"impl='cuda' is not tested: {message}")
        return os.environ.get("IMBALANCE_KERNELS_TEST_ALL") == "1"
    library = Path(sys.argv[1]).resolve()
    make_library(library)
    environment = {**build.address_environment(), "IMBALANCE_KERNELS_EMULATED": str(library)}
    # The sanitizer reports a crash better than Python's fault handler, which would be asked first.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:faulthandler", "-k", "cuda"]
    command += [*(TESTS / f"test_{name}.py" for name in TABLES), *sys.argv[2:]]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
