"""Everything that needs a GPU, in one call and offline (`make gpu-check OUT=folder`).

    python bench/gpu_check.py OUT [--dry-run]

It builds the extension for this GPU, looks whether it is the one that is chosen, runs the tests marked gpu, a few cases
under compute-sanitizer, and the benchmarks; all that came out is in OUT/gpu_check.json, with a picture or log of each.
The environment is the machine's own, and nothing is installed: torch with Triton, pytest with xdist and hypothesis,
mpmath, matplotlib, setuptools 77 or later, ninja, a C++ compiler and nvcc. Steps that fail do not stop those after
them; the exit status tells.

--dry-run goes through the same steps without a GPU, on tiny shapes: nothing is built, tests and benchmark run Triton's
kernels in its interpreter, and the CUDA ones where IMBALANCE_KERNELS_EMULATED, or .venv/emulated.so, is their emulation
for CPU. It measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# What is imported, and the distribution that has it.
NEEDED = {
    "torch": "torch",
    "triton": "triton",
    "pytest": "pytest",
    "xdist": "pytest-xdist",
    "hypothesis": "hypothesis",
    "mpmath": "mpmath",
    "matplotlib": "matplotlib",
    "setuptools": "setuptools>=77",
}
OLDEST_SETUPTOOLS = 77  # an older one does not read our pyproject.toml
VERSIONS = ("torch", "triton", "numpy", "liger-kernel", "flash-linear-attention", "quack-kernels", "cut-cross-entropy")

# Seconds that a step may take, beside what those before it have left; eight minutes in all.
SECONDS = {
    **{"build": 130, "kernels": 15, "tests": 130, "memcheck": 40, "racecheck": 40},
    **{"benchmark": 70, "linear": 30, "sigmoid": 25},
}

KERNELS = """
import sys, torch, imbalance_kernels as ik
ik.show_config()
impl, device = sys.argv[1:]
chosen = ik.implementation.choose(None if impl == "None" else impl, torch.empty(1, device=device))
sys.exit(0 if chosen == "cuda" else f"{chosen} kernels would run, not the CUDA ones")
"""
DTYPES = ["bfloat16", "float32"]
NOT_FOUND = "compute-sanitizer not found in the toolkit or on PATH"
NOT_EMULATED = "no emulation of the CUDA kernels: make test-emulated builds one"
PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "failed", "out of time", "not run"


@dataclass
class Step:
    """One command, and what it changes in the environment; or why there is none."""

    name: str
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    not_run: str = ""


def sanitizer() -> str | None:
    """Return compute-sanitizer's path: it is on PATH in some toolkits, and in a folder beside bin in all."""
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:  # asked, because what is on PATH may be a wrapper from elsewhere
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        folders += [line.partition("TOP=")[2] for line in plan.splitlines() if "TOP=" in line]
    places = [str(Path(folder) / name) for folder in folders if folder for name in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


def steps_on_gpu(folder: Path) -> list[Step]:
    import torch

    capabilities = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    architectures = ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
    workers = min(16, os.cpu_count() or 1)
    tool = sanitizer()

    def sanitize(name: str, environment: Mapping[str, str]) -> Step:
        # No filter by kernel: one that matches nothing would find nothing.
        command = [tool or "", "--tool", name, "--error-exitcode", "9", sys.executable, "bench/gpu_cases.py"]
        return Step(name, command, environment, not_run="" if tool else NOT_FOUND)

    return [
        # --force: what is there already may be compiled for another GPU, or for none.
        Step(
            "build",
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"],
            {"TORCH_CUDA_ARCH_LIST": architectures},
        ),
        Step("kernels", [sys.executable, "-c", KERNELS, "None", "cuda"]),
        Step("tests", [*pytest_command(folder), "-n", str(workers)]),
        sanitize("memcheck", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),  # each tensor an allocation that it knows
        sanitize("racecheck", {}),
        Step("benchmark", [*benchmark_command(folder), "--device", "cuda"]),
        Step("linear", [*linear_command(folder), "--device", "cuda", "--dtypes", "bfloat16", "--no-compile"]),
        Step(
            "sigmoid", [*sigmoid_command(folder), "--device", "cuda", "--dtypes", "bfloat16", "float32", "--no-compile"]
        ),
    ]


def steps_on_cpu(folder: Path) -> list[Step]:
    """The same steps on stand-ins."""
    stand_ins: dict[str, str] = {"TRITON_INTERPRET": "1", "IMBALANCE_KERNELS_STAND_INS": "1"}
    library = os.environ.get("IMBALANCE_KERNELS_EMULATED", str(ROOT / ".venv" / "emulated.so"))
    not_run = "" if Path(library).is_file() else NOT_EMULATED
    if not not_run:
        sys.path.append(str(ROOT / "tests"))
        build = importlib.import_module("emulation.build")
        stand_ins |= {**build.address_environment(), "IMBALANCE_KERNELS_EMULATED": library}
    few = "(test_objective and focal and float32 and 91) or test_opcheck_scale_ or test_in_a_graph or first_use"
    cases = [sys.executable, "bench/gpu_cases.py", "cpu"]
    tiny = ["--device", "cpu", "--shapes", "4x91xfloat32", "2x1003xfloat32", "--samples", "1", "--window", "0.0001"]
    return [
        Step(
            "build",
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            {"IMBALANCE_KERNELS_BUILD": "0"},  # which does all but compile
        ),
        Step("kernels", [sys.executable, "-c", KERNELS, "cuda", "cpu"], stand_ins, not_run),
        Step("tests", [*pytest_command(folder), "-k", few], stand_ins),
        Step("memcheck", cases, stand_ins, not_run),
        Step("racecheck", cases, stand_ins, not_run),
        Step("benchmark", [*benchmark_command(folder), *tiny, "--no-compile"], stand_ins),
        Step("linear", [*linear_command(folder), "--device", "cpu", "--quick"]),
        Step("sigmoid", [*sigmoid_command(folder), "--device", "cpu", "--quick", "--samples", "2"]),
    ]


def pytest_command(folder: Path) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=10"]
    return [*command, f"--junitxml={folder / 'tests.xml'}", "tests/test_gpu.py"]


def benchmark_command(folder: Path) -> list[str]:
    return [sys.executable, "bench/bench_softmax_loss.py", "--output", str(folder)]


def linear_command(folder: Path) -> list[str]:
    return [sys.executable, "bench/bench_linear.py", "--no-losses", "--output", str(folder)]


def sigmoid_command(folder: Path) -> list[str]:
    return [sys.executable, "bench/bench_sigmoid_loss.py", "--output", str(folder)]


def run(step: Step, folder: Path, limit: float) -> dict:
    """Run one step; its output goes to the terminal's end and, whole, to a file."""
    result: dict = {"status": NOT_RUN, "reason": step.not_run, "exit_status": None, "seconds": 0.0, "end": []}
    if step.not_run:
        print(f"== {said(step.name, result)}", flush=True)
        return result
    begin = time.perf_counter()
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    search = {"PYTHONPATH": packages, "PATH": search_path()}
    # What is measured is written at the end, so the benchmark gets to know when that is.
    extra = ["--seconds", str(int(0.85 * limit))] if step.name == "benchmark" else []
    with open(folder / f"{step.name}.log", "w") as log:
        try:
            done = subprocess.run(
                [*step.command, *extra],
                cwd=ROOT,
                env={**os.environ, **step.environment, **search},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
            )
            result["exit_status"] = done.returncode
            result["status"] = PASSED if done.returncode == 0 else FAILED
            result["reason"] = "" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            result["status"] = OUT_OF_TIME
        except OSError as error:
            result |= {"status": FAILED, "reason": str(error)}
    result["seconds"] = round(time.perf_counter() - begin, 1)
    lines = (folder / f"{step.name}.log").read_text(errors="replace").splitlines()
    result["end"] = lines[-5:]
    print(f"== {said(step.name, result)}", *lines[-60:], sep="\n", flush=True)
    return result


def said(name: str, result: dict) -> str:
    """Return what came of a step, in words."""
    reason = f" ({result['reason']})" if result["reason"] else ""
    took = f" in {result['seconds']:.0f} s" if result["status"] != NOT_RUN else ""
    return f"{name}: {result['status']}{reason}{took}"


def counts(folder: Path) -> dict:
    """How many tests passed, failed and were left out."""
    path = folder / "tests.xml"
    if not path.exists():
        return {}
    suite = ElementTree.parse(path).getroot().find("testsuite")
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def output_of(*command: str) -> str:
    """Return what a command prints, or "" where there is none."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine(dry_run: bool) -> dict:
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpus": "none, a dry run"
        if dry_run
        else output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm", "--format=csv"),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "nvcc": output_of("nvcc", "--version")[-80:],
        "compute-sanitizer": sanitizer() or "absent",
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "versions": versions,
    }


def link_kernels() -> None:
    """Do what an installation does: imbalance_kernels.triton_kernels is the folder triton_kernels."""
    link = ROOT / "imbalance_kernels" / "triton_kernels"
    if not link.exists() and importlib.util.find_spec("imbalance_kernels.triton_kernels") is None:
        link.symlink_to(Path("..") / "triton_kernels")


def search_path() -> str:
    """Return PATH and then this Python's own folder of programs, where pip puts ninja."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def lacking() -> list[str]:
    """Return what the steps call and this Python or PATH does not have, as pip names it."""
    lacks = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    setuptools = NEEDED["setuptools"]
    if setuptools not in lacks and int(metadata.version("setuptools").partition(".")[0]) < OLDEST_SETUPTOOLS:
        lacks.append(setuptools)
    # torch would build without it, one file after the other, which takes longer than the step may.
    return lacks if shutil.which("ninja", path=search_path()) else [*lacks, "ninja"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("bench-output"), help="folder for all that comes out")
    parser.add_argument("--dry-run", action="store_true", help="on stand-ins, without a GPU")
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for left in ("tests.xml", "softmax_loss_gpu.json"):  # of an earlier run
        (folder / left).unlink(missing_ok=True)

    begin = time.perf_counter()
    steps = (steps_on_cpu if arguments.dry_run else steps_on_gpu)(folder)
    end = begin
    record: dict = {"dry_run": arguments.dry_run, "machine": machine(arguments.dry_run), "steps": {}}
    for step in steps:
        end += SECONDS[step.name]
        record["steps"][step.name] = run(step, folder, end - time.perf_counter())
    tests = record["tests"] = counts(folder)
    figures = folder / "softmax_loss_gpu.json"
    record["figures"] = json.loads(figures.read_text()) if figures.exists() else None
    (folder / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")

    print(f"\n{time.perf_counter() - begin:.0f} s, GPUs: {record['machine']['gpus']}")
    for name, done in record["steps"].items():
        print(said(name, done))
    if tests:
        wrong = tests["failures"] + tests["errors"]
        print(f"of {tests['tests']} tests {wrong} failed and {tests['skipped']} were left out")
    print(f"written: {folder / 'gpu_check.json'}")
    failed = [done for done in record["steps"].values() if done["status"] in (FAILED, OUT_OF_TIME)]
    left_out = tests.get("skipped", 0) if not arguments.dry_run else 0
    sys.exit(1 if failed or left_out or not tests.get("tests", 0) else 0)


if __name__ == "__main__":
    if missing := lacking():
        sys.exit(f"gpu_check.py: {sys.executable} lacks {', '.join(missing)} (GPU_PYTHON= names another)")
    if "--dry-run" not in sys.argv and not importlib.import_module("torch").cuda.is_available():
        sys.exit("gpu_check.py: torch finds no GPU here, so there is nothing to check (--dry-run tries the steps)")
    sys.path.append(str(ROOT))
    link_kernels()
    main()
