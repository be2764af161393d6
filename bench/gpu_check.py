"""Everything that needs a GPU, in one call and offline (`make gpu-check`): build, tests, benchmark, one JSON and plots.

    python bench/gpu_check.py OUTPUT

The environment is the machine's own, and nothing is installed: torch with Triton, pytest with xdist and hypothesis,
matplotlib, a C++ compiler. Steps that fail do not stop those after them; the exit status tells.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "triton", "pytest", "xdist", "hypothesis", "mpmath", "matplotlib")

# step: (command, seconds it may take); eight minutes in all
STEPS = {
    "build": ([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], 120),
    "tests": (
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "8", "-p", "no:cacheprovider", "--durations=10"],
        210,
    ),
    "benchmark": ([sys.executable, "bench/bench_softmax_loss.py", "--device", "cuda"], 150),
}


def run(name: str, folder: Path) -> dict:
    """Run one step; its output goes to the terminal's end and, whole, to a file."""
    command, limit = STEPS[name]
    extra = {"tests": [f"--junitxml={folder / 'tests.xml'}"], "benchmark": ["--output", str(folder)]}
    begin = time.perf_counter()
    with open(folder / f"{name}.log", "w") as log:
        try:
            command = [*command, *extra.get(name, [])]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = "ran out of time"
    lines = (folder / f"{name}.log").read_text().splitlines()
    print(f"== {name}: {status}", *lines[-60:], sep="\n", flush=True)
    return {"status": status, "seconds": round(time.perf_counter() - begin, 1), "end": lines[-5:]}


def counts(folder: Path) -> dict:
    """How many tests passed, failed and were left out."""
    path = folder / "tests.xml"
    if not path.exists():
        return {}
    suite = ElementTree.parse(path).getroot().find("testsuite")
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def link_kernels() -> None:
    """Do what an installation does: imbalance_kernels.triton_kernels is the folder triton_kernels."""
    link = ROOT / "imbalance_kernels" / "triton_kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "triton_kernels")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "bench-output").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    record: dict = {name: run(name, folder) for name in STEPS}
    record["tests"] |= counts(folder)
    benchmark = folder / "softmax_loss_gpu.json"
    record["figures"] = json.loads(benchmark.read_text()) if benchmark.exists() else None
    (folder / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")
    for name in STEPS:
        print(f"{name}: {record[name]['status']} in {record[name]['seconds']} s")
    print(record["tests"], f"-> {folder / 'gpu_check.json'}")
    passed = all(record[name]["status"] == 0 for name in STEPS) and record["tests"].get("tests", 0) > 0
    skipped = record["tests"].get("skipped", 0)
    sys.exit(0 if passed and not skipped else 1)


if __name__ == "__main__":
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu_check.py: {sys.executable} lacks {', '.join(missing)} (GPU_PYTHON= names another)")
    if not importlib.import_module("torch").cuda.is_available():
        sys.exit("gpu_check.py: torch finds no GPU here, so there is nothing to check")
    link_kernels()
    main()
