"""The kernels that read labels, multilabel_softmax and column_sums, compiled for GPUs that are not there."""

import re
import subprocess

import pytest
import triton
import triton_compile
from test_cuda_compile import ARCHITECTURES, SOURCES, require_nvcc
from test_triton_compile import HALVES, results

CUDA = [SOURCES[0].parent / f"{stem}.cu" for stem in ("multilabel_softmax", "column_sums")]
KERNELS = {
    "multilabel_softmax": ("multilabel_in_lanes", "multilabel_in_sweeps", "multilabel_in_planes"),
    "column_sums": tuple(
        f"{kernel}_of_{shape}" for kernel in ("columns", "gradient", "softmax") for shape in ("rows", "images")
    ),
}
SPILLED = 32  # bytes a thread, of some forms
SPILLED_DOUBLE = 256  # of float64, which is for tests


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", CUDA, ids=lambda source: source.stem)
def test_cuda_compiles_and_spills_next_to_nothing(source, architecture, tmp_path):
    require_nvcc()
    command = ["nvcc", "-std=c++20", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["--expt-relaxed-constexpr", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) regi",
        done.stderr,
        re.DOTALL,
    )
    for kernel in KERNELS[source.stem]:
        assert sum(kernel in symbol for symbol, *_ in report) >= 4 * 4, kernel  # four dtypes, four forms
    for symbol, stack, spilled, _ in report:
        limit = SPILLED_DOUBLE if re.search(r"[a-z]Id", symbol) else SPILLED
        assert int(spilled) <= limit and int(stack) <= limit, symbol


def check(found):
    assert len(found) == len(triton_compile.LABELS)
    assert all(result["launches"] > 0 for result in found)
    compiled = [(result["case"], kernel) for result in found for kernel in result["compiled"]]
    assert len(compiled) >= 30
    for case, kernel in compiled:
        assert kernel["spilled"] <= SPILLED, (case, kernel)
        if kernel["kernel"].endswith("_planes"):  # a warp's threads lie along the pixels, each has one
            assert kernel["warps"] == ["32, 1"], (case, kernel)
            continue
        width = case.get("pixels") or case["classes"]
        if "total" not in kernel["kernel"] and width % 8 == 0 and case["dtype"] != "float64":
            assert kernel["loads"] > 0, (case, kernel)
    names = {kernel["kernel"].partition(".")[2] for _, kernel in compiled}
    assert {"_rows", "_long_rows", "_planes", "_long_planes", "_sums", "_gradient", "_softmax"} <= names


def test_triton_spills_next_to_nothing_and_loads_vectors():
    """In this environment's own version."""
    check(results(triton.__version__, "sm_90", "labels"))


@pytest.mark.parametrize("version, target", HALVES)
def test_triton_compiles_everywhere(version, target):
    found = results(version, target, "labels")
    assert len(found) == len(triton_compile.LABELS) and all(result["launches"] > 0 for result in found)


def test_no_compilation_but_the_first():
    """Not for another number of rows or of classes, nor for lists of another length."""
    compiled = {}
    for result in results(triton.__version__, "sm_90", "same labels"):
        operation = (result["case"]["operation"], "pixels" in result["case"])
        compiled.setdefault(operation, []).append(len(result["compiled"]))
    assert len(compiled) == 4
    assert all(first > 0 and not any(others) for first, *others in compiled.values()), compiled
