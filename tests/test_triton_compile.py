"""The Triton kernels compiled for devices that are not there: every option, registers, spills, width of loads.

A script (triton_compile.py) calls the launchers for each target, with the oldest version of Triton that the package
supports (the one of torch 2.11), the first whose reductions cross the blocks of a cluster, and the newest: installed
beside this environment's own by `make triton-versions`, else left out.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton_compile

OLDEST, NEWEST = VERSIONS = ("3.6.0", "3.9.0")
WITH_CLUSTERS = ("3.8.0", NEWEST)
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
CLUSTERS = ("sm_90 clusters", "sm_100 clusters")

# The most registers a thread that the main variants took on any NVIDIA target when this was written, rounded up to
# eight: (dtype, classes) -> by version. Above 64 (of 1024 threads) or 128 (of 512) a program would not even start.
REGISTERS = {
    ("bfloat16", 256): (72, 72),
    ("bfloat16", 1000): (64, 64),
    ("bfloat16", 8192): (96, 96),
    ("bfloat16", 32000): (64, 56),
    ("float32", 32000): (64, 64),
}
PLANE_REGISTERS = 128  # of 128 or 256 threads
SPILLED = 400  # bytes a thread that options beyond the main ones may spill; sines of float64 take memory too
CLUSTER_REGISTERS = 88  # of 512 threads, two or eight blocks a row


def folder(version: str) -> Path:
    return Path(sys.prefix) / "triton" / version


def require(version: str) -> None:
    """Leave a test out where a version of Triton is not installed; fail it where that was promised, as in CI."""
    if version == triton.__version__ or (folder(version) / "triton").is_dir():
        return
    message = f"Triton {version} is not installed: make triton-versions"
    if os.environ.get("IMBALANCE_KERNELS_TEST_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)


@functools.cache
def results(version: str, target: str, which: str) -> list[dict]:
    """What triton_compile.py prints."""
    require(version)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    search = os.pathsep.join(filter(None, [str(folder(version)), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", triton_compile.__file__, target, which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": search})
    assert done.returncode == 0, done.stderr[-3000:]
    first, *lines = map(json.loads, done.stdout.splitlines())
    assert first == {"triton": version}
    return lines


def row_kernels(version: str, target: str, which: str):
    """(case, kernel) of the kernels that go over the logits."""
    for result in results(version, target, which):
        for kernel in result["compiled"]:
            if "rows" in kernel["kernel"] and "weights" not in kernel["kernel"]:
                yield result["case"], kernel


def bytes_of(dtype: str) -> int:
    return triton_compile.DTYPES[dtype].itemsize


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("version", VERSIONS)
def test_main_variants_spill_nothing_and_load_vectors(version, target):
    found = list(row_kernels(version, target, "main"))
    assert len(found) == 12  # six shapes, of which two share their kernels, two losses each; probabilities
    for case, kernel in found:
        shape = kernel["shape"]
        block = shape.get("ROWS", 1) * shape["BLOCK"] if "BLOCK" in shape else shape["LANES"] * shape["VECTOR"]
        vectors = block * bytes_of(case["dtype"]) // (16 * kernel["threads"])
        reads = (2 if "LANES" in shape else 1) * (2 if "weighting" in case else 1)
        assert kernel["stores"] == vectors and kernel["loads"] >= reads * vectors, (case, kernel)
        if "weighting" in case:
            continue
        assert kernel["spilled"] == 0, (case, kernel)
        if target in NVIDIA:
            limit = REGISTERS[case["dtype"], case["classes"]][VERSIONS.index(version)]
            assert kernel["registers"] <= limit, (case, kernel)


def test_this_environments_own_version():
    """Whatever it is, and without the others: the main variants compile, and spill nothing."""
    found = [kernel for case, kernel in row_kernels(triton.__version__, "sm_90", "main") if "weighting" not in case]
    assert len(found) == 10 and all(kernel["spilled"] == 0 and kernel["loads"] > 0 for kernel in found)


@pytest.mark.parametrize("target", CLUSTERS)
@pytest.mark.parametrize("version", WITH_CLUSTERS)
def test_rows_over_a_cluster(version, target):
    """A block takes 16384 numbers of the row; in place, its target is read before another block may overwrite it."""
    found = list(row_kernels(version, target, "clusters"))
    assert len(found) == len(triton_compile.CLUSTERS)
    for case, kernel in found:
        assert kernel["blocks"] == -(-case["classes"] // 16384) and kernel["threads"] == 512
        if case.get("operation") == "in place":  # the main variants
            assert kernel["spilled"] == 0 and kernel["registers"] <= CLUSTER_REGISTERS, (case, kernel)
        if case["dtype"] == "bfloat16" and case["classes"] % 8 == 0:
            assert kernel["reads_target_before_barrier"], (case, kernel)
            assert kernel["stores"] == 4


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("version", sorted({*VERSIONS, triton.__version__}))
def test_channels_first(version, target):
    """A warp's threads lie along the pixels, where memory does, and blocks are stored as they are loaded."""
    found = [
        (result["case"], kernel)
        for result in results(version, target, "planes")
        for kernel in result["compiled"]
        if kernel["kernel"].startswith("planes.")
    ]
    names = [kernel["kernel"] for _, kernel in found]
    assert names == ["planes._planes"] * 4 + ["planes._long_planes"]
    for case, kernel in found:
        warp = 64 if target == "gfx942" else 32
        assert kernel["warps"] == [f"{warp}, 1"], (case, kernel)
        # A number of each pixel for each warp that shares it; a whole block would be more.
        assert kernel["shared"] <= 8 * kernel["threads"], (case, kernel)
        spilled = 16 if "long" in kernel["kernel"] else 0  # 3.9 allows it but 64 registers
        assert kernel["spilled"] <= spilled and kernel["registers"] <= PLANE_REGISTERS, (case, kernel)


def sigmoid_kernels(version: str, target: str, which: str):
    """(case, kernel) of sigmoid_loss: its one kernel over the logits."""
    for result in results(version, target, which):
        for kernel in result["compiled"]:
            if kernel["kernel"] == "sigmoid_loss._tiles":
                yield result["case"], kernel


# Of 256 threads, measured and rounded up to eight: soft labels take two ways, and eight pixels a thread eight labels.
SIGMOID_REGISTERS = {"dense": 112, "images": 72, "rows": 64}


def check_sigmoid_variants(version: str, target: str) -> None:
    """Logits go by 16 bytes, also where rows cut vectors, and dense labels as they do; nothing spills."""
    found = list(sigmoid_kernels(version, target, "sigmoid"))
    assert len(found) == len(triton_compile.SIGMOID) - 2  # rows of one class share the kernel of rows of 91
    for case, kernel in found:
        vectors = bytes_of(case["dtype"]) // 2
        assert kernel["threads"] == 256 and kernel["stores"] == vectors, (case, kernel)
        assert kernel["loads"] >= vectors * (2 if case["labels"] == "dense" else 1), (case, kernel)
        assert kernel["spilled"] == 0, (case, kernel)
        if target in NVIDIA:
            kind = "dense" if case["labels"] == "dense" else "images" if len(case["shape"]) == 3 else "rows"
            assert kernel["registers"] <= SIGMOID_REGISTERS[kind], (case, kernel)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("version", VERSIONS)
def test_main_variants_of_sigmoid_loss(version, target):
    check_sigmoid_variants(version, target)


def test_sigmoid_loss_with_this_environments_own_version():
    for target in ("sm_90", "gfx942"):
        check_sigmoid_variants(triton.__version__, target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_sigmoid_objective_compiles(target):
    """With labels of every kind, in every layout and dtype, with and without powers that are products."""
    found = results(triton.__version__, target, "sigmoid all")
    assert len(found) == len(triton_compile.SIGMOID_ALL) and all(result["launches"] > 0 for result in found)
    for case, kernel in sigmoid_kernels(triton.__version__, target, "sigmoid all"):
        assert kernel["spilled"] <= (SPILLED if case["dtype"] == "float64" else 0), (case, kernel)
        assert kernel["registers"] * kernel["threads"] <= (65536 if target in NVIDIA else 131072), (case, kernel)


def test_sigmoid_loss_compiles_nothing_but_the_first():
    """Not for another number of rows, classes or entries of a list, or another ignore_index."""
    found = results(triton.__version__, "sm_90", "sigmoid same")
    compiled = [
        [kernel for kernel in result["compiled"] if kernel["kernel"].startswith("sigmoid_loss")] for result in found
    ]
    per_kind = len(found) // 3
    for first in range(0, len(found), per_kind):
        assert compiled[first] and not any(compiled[first + 1 : first + per_kind]), found


def test_few_launches_of_sigmoid_loss():
    """Loss and gradient with a normalizer are two launches, a mean over labels four, over all logits two."""
    launches = {result["launches"] for result in results(triton.__version__, "sm_90", "sigmoid")}
    assert launches == {2}
    same = results(triton.__version__, "sm_90", "sigmoid same")
    assert [result["launches"] for result in same[:: len(same) // 3]] == [4, 2, 2]


# Both versions compile half of the targets, so that every pair of options is compiled once.
HALVES = [(OLDEST, "sm_80"), (OLDEST, "gfx942"), (NEWEST, "sm_90"), (NEWEST, "sm_100")]


@pytest.mark.parametrize("version, target", HALVES)
def test_every_pair_of_options_compiles(version, target):
    found = results(version, target, "pairs")
    assert len(found) > 15
    for result in found:
        assert result["launches"] > 0
        for kernel in result["compiled"]:
            assert kernel["registers"] * kernel["threads"] <= (65536 if target in NVIDIA else 131072), result
            assert kernel["spilled"] <= SPILLED, result


@pytest.mark.parametrize("version", VERSIONS)
def test_no_compilation_but_the_first(version):
    """Not for another number of rows or classes, another ignore_index (1 and 0 are special to Triton) or scale."""
    found = results(version, "sm_90", "same")
    compiled = [len(result["compiled"]) for result in found]
    half = len(found) // 2
    assert compiled[0] > 0 and compiled[half] > 0
    assert sum(compiled) == compiled[0] + compiled[half], found


def test_few_launches():
    """Loss and gradient with a normalizer are two launches, a mean four, a gradient alone one."""
    launches: dict[str, set[int]] = {}
    for result in results(NEWEST, "sm_90", "same") + results(NEWEST, "sm_90", "main"):
        launches.setdefault(result["case"].get("reduction", "normalizer"), set()).add(result["launches"])
    assert launches == {"normalizer": {2}, "mean": {4}, "none": {1}}
