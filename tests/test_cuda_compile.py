"""The CUDA kernels compiled for devices that are not there: registers, spills, width of loads, instructions.

Each file of csrc/cuda is compiled by nvcc for every architecture, warnings as errors; what ptxas reports of a kernel
and its machine code (SASS) are read. The main kernels are the aligned ones without the options that few losses use.
"""

import collections
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import triton

CUDA = Path(__file__).parent.parent / "csrc/cuda"
SOURCES = [source for family in ("softmax_loss", "sigmoid_loss") for source in sorted(CUDA.glob(f"{family}*.cu"))]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
KERNELS = (
    *("rows_in_lanes<4>", "rows_in_lanes<8>", "rows_over_clusters", "rows_in_sweeps", "rows_in_pieces"),
    "rows_in_planes",
)
LOGIT_KERNELS = ("logits_of_labels", "logits_in_packs", "logits_apart")  # of sigmoid_loss
MAPS = ("plain", "affine", "general")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# By kernel, in that order.
THREADS = dict(zip(KERNELS, (128, 128, 256, 1024, 256, 128), strict=True))
BLOCKS = dict(zip(KERNELS, (5, 4, 2, 1, 3, 4), strict=True))  # of a multiprocessor
THREADS |= dict.fromkeys(LOGIT_KERNELS, 128)
BLOCKS |= dict(zip(LOGIT_KERNELS, (5, 4, 4), strict=True))
PACKS = dict(zip(KERNELS[:5], (4, 8, 8, 4, 4), strict=True))  # of 16 bytes, a thread
LOADS = dict(zip(KERNELS[:5], (2, 2, 4, 1, 1), strict=True))  # places that load a row: most load the next one ahead

SPILLED = 128  # bytes a thread that kernels beyond the main ones may spill
# Instructions for each number of a row of halves, in one trip: loaded, its maximum, its exponential twice, stored. A
# copy on an H200 leaves about 27 issue slots for each.
INSTRUCTIONS = {
    ("rows_in_lanes<4>", "plain"): 13,
    ("rows_in_lanes<4>", "affine"): 19.2,
    ("rows_in_lanes<8>", "plain"): 13,
    ("rows_in_lanes<8>", "affine"): 19.2,
    ("rows_over_clusters", "plain"): 12.8,
    ("rows_over_clusters", "affine"): 20,
}


def require_nvcc() -> None:
    """Leave a test out where there is no CUDA compiler; fail it where that was promised, as in CI."""
    if shutil.which("nvcc"):
        return
    message = "nvcc is not installed"
    if os.environ.get("IMBALANCE_KERNELS_TEST_ALL") == "1":
        pytest.fail(message)
    pytest.skip(message)


class Kernel(collections.namedtuple("Kernel", "name map aligned architecture stack spilled registers")):
    @property
    def is_main(self) -> bool:
        return self.aligned and self.map != "general"


def kind_of(symbol: str):
    """(name, map, aligned) of a mangled kernel of rows, (name, objective, True) of one of logits; None for others."""
    if found := re.search(r"\d(logits_[a-z_]+?)I(?:f|d|NS\w*?(?:BFloat16|Float16)E)(\w*)", symbol):
        return found[1], found[2].partition("EEEvNS")[0], True
    found = re.search(r"\d(rows_[a-z_]+?)I.*3MapE(\d)ELb(\d)E(?:Li(\d))?", symbol)
    return found and (found[1] + (f"<{found[4]}>" if found[4] else ""), MAPS[int(found[2])], found[3] == "1")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, worker_id, testrun_uid):
    """compile(source, architecture) -> (cubin, kernels of rows), once each, seldom twice by a run's workers."""
    require_nvcc()
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent / f"cubins-{testrun_uid}"
        folder.mkdir(exist_ok=True)

    @functools.cache
    def compile_source(source: Path, architecture: str):
        cubin = folder / f"{source.stem}.{architecture}.cubin"
        said = cubin.with_suffix(".ptxas")  # is there when the cubin is
        if not said.exists():
            part = folder / f"{worker_id}.{cubin.name}"
            command = ["nvcc", "-std=c++20", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-Werror"]
            command += ["all-warnings", "--expt-relaxed-constexpr", "-o", str(part), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            os.replace(part, cubin)
            part.write_text(done.stderr)
            os.replace(part, said)
        report = re.findall(
            r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) regi",
            said.read_text(),
            re.DOTALL,
        )
        assert report
        kernels = [
            Kernel(*kind, architecture, *map(int, numbers)) for symbol, *numbers in report if (kind := kind_of(symbol))
        ]
        return cubin, kernels

    return compile_source


def dtype_of(source: Path) -> str:
    return source.stem.rpartition("_")[2]


def source_of(family: str, dtype: str) -> Path:
    return next(source for source in SOURCES if source.stem == f"{family}_{dtype}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(compiled, source, architecture):
    _, kernels = compiled(source, architecture)
    names = {kernel.name for kernel in kernels}
    if source.stem.startswith("sigmoid"):
        expected = {"loss": set(), "float64": {"logits_apart"}}.get(dtype_of(source), set(LOGIT_KERNELS))
    else:
        expected = {"loss": set(), "float64": {"rows_in_sweeps", "rows_in_pieces", "rows_in_planes"}}
        expected = expected.get(dtype_of(source), set(KERNELS))
    assert names == expected
    for kernel in kernels:
        threads = THREADS[kernel.name]
        if kernel.name == "rows_in_sweeps" and not kernel.is_main:
            threads = 512
        assert kernel.registers * threads <= 65536, kernel
        if kernel.is_main:
            assert (kernel.stack, kernel.spilled) == (0, 0), kernel
            # Registers are given out to warps in units of eight a thread.
            assert -(-kernel.registers // 8) * 8 * threads * BLOCKS[kernel.name] <= 65536, kernel
        else:
            assert kernel.spilled <= SPILLED, kernel


def functions_of(cubin: Path) -> dict[tuple, list[tuple[int, str]]]:
    """The machine code of kernels of rows: kind -> (address, instruction)."""
    code = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    functions = {}
    for part in code.split("Function : ")[1:]:
        if kind := kind_of(part.split(maxsplit=1)[0]):
            found = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", part, re.MULTILINE)
            functions[kind] = [(int(address, 16), instruction) for address, instruction in found]
    return functions


def count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.search(pattern, instruction)) for instruction in instructions)


def hot_blocks(function: list[tuple[int, str]]) -> list[list[str]]:
    """The basic blocks that work on a thread's numbers: with four exponentials or maxima, or a vector of 16 bytes.

    Those with shuffles join what threads have found, once a row.
    """
    targets = {
        int(target, 16)
        for _, instruction in function
        for target in re.findall(r"(?:BRA|BSSY|CALL)\b.*?0x([0-9a-f]+)", instruction)
    }
    blocks: list[list[str]] = [[]]
    for address, instruction in function:
        if address in targets:
            blocks.append([])
        blocks[-1].append(instruction)
        if re.search(r"\b(BRA|EXIT|RET|BAR|CALL)\b", instruction):
            blocks.append([])
    return [
        block
        for block in blocks
        if count("SHFL", block) == 0
        and any(
            count(pattern, block) >= least
            for pattern, least in [(r"MUFU\.EX2", 4), ("[FH]MNMX", 4), (r"(LDG|STG)\S*\.128", 1)]
        )
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_machine_code(compiled, dtype):
    """sm_90: 16 bytes at a time, the exponentials that there must be, and few instructions beside."""
    source = source_of("softmax_loss", dtype)
    functions = functions_of(compiled(source, "sm_90")[0])
    width = 4 if dtype == "float32" else 8
    checked = set()
    for (name, mapping, aligned), function in functions.items():
        if not aligned or mapping == "general" or name == "rows_in_planes":
            continue
        packs, code = PACKS[name], [instruction for _, instruction in function]
        numbers = packs * width
        exponentials = 1 if name == "rows_in_pieces" else 2
        # A row is loaded and its gradient stored by packs; `fill` stores zeros by packs too. The one narrow store is
        # the target's. The first of two sweeps asks the caches to keep what it loads (and loads class vectors alike).
        assert count(r"LDG\S*\.EF\.128", code) == LOADS[name] * packs, (name, mapping)
        assert count(r"LDG\S*E\.128", code) >= (packs if name == "rows_in_sweeps" else 0), (name, mapping)
        assert count(r"STG\S*\.EF\.128", code) == 2 * packs, (name, mapping)
        if width == 8:
            assert count(r"STG\S*\.U16", code) == 1, (name, mapping)
        # Beside those of the numbers: of the lanes' sums, of the row program.
        assert exponentials * numbers <= count(r"MUFU\.EX2", code) <= exponentials * numbers + 24, (name, mapping)
        assert count("LDL|STL", code) == 0
        if (name, mapping) not in INSTRUCTIONS:
            continue
        checked.add((name, mapping))
        if mapping == "affine":  # the bias, in each of three passes
            assert count(r"LDS\.128", code) >= 3 * numbers // 4, (name, mapping)
        elif width == 8:  # maxima of two at a time
            assert count("HMNMX2", code) == (packs - 1) * 4, (name, mapping)
        if width == 8:
            blocks = hot_blocks(function)
            hot = sum(map(len, blocks))
            # Not part of a trip: places that load but one, and `fill`.
            loads = sorted(len(block) for block in blocks if count(r"LDG\S*\.128", block) == packs)
            assert len(loads) == LOADS[name], (name, mapping)
            trip = (hot - sum(loads[1:]) - packs * 9) / numbers
            assert 0.85 * INSTRUCTIONS[name, mapping] <= trip <= INSTRUCTIONS[name, mapping], (name, mapping, trip)
    assert checked == set(INSTRUCTIONS)


# Of a number of channels-first logits, from the first store of a gradient to the last: unpacked, its exponential,
# compared with the target, packed, stored.
PLANE_INSTRUCTIONS = {"plain": 8.5, "affine": 10.5}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_machine_code_of_planes(compiled, dtype):
    """sm_90: of each class four pixels at a time, in one load and one store."""
    source = source_of("softmax_loss", dtype)
    functions = functions_of(compiled(source, "sm_90")[0])
    bits, packs, width = (128, 12, 4) if dtype == "float32" else (64, 24, 4)
    for mapping, most in PLANE_INSTRUCTIONS.items():
        code = [instruction for _, instruction in functions["rows_in_planes", mapping, True]]
        # Of classes that are all held; else of a first sweep, whose loads the caches keep, and of a second.
        assert count(rf"LDG\S*\.EF\.{bits} ", code) == 2 * packs, mapping
        assert count(rf"LDG\S*E\.{bits} ", code) >= 2 * packs, mapping
        stores = [i for i, instruction in enumerate(code) if re.search(rf"STG\S*\.EF\.{bits} ", instruction)]
        assert len(stores) == packs, mapping
        assert (stores[-1] - stores[0]) / ((packs - 1) * width) <= most, mapping
        # Beside those of the numbers: of shifts, of groups that join, of the row program.
        assert 2 * packs * width <= count(r"MUFU\.EX2", code) <= 2 * packs * width + 64, mapping
        assert count(r"LDG\S*CONSTANT", code) == (3 * packs if mapping == "affine" else 0), mapping
        assert count("LDL|STL", code) == 0, mapping


# Instructions for each number of halves in rows with class labels, of packs without a positive and with one:
# unpacked, its two approximations, value and slope, summed. Beside them a pack has about 50, and a copy on an H200
# leaves about 27 issue slots for each number, 54 of float32.
LOGIT_INSTRUCTIONS = {
    "10OfRegistryILNS_13ObjectiveKindE0EE": (19.6, 24.4),  # cross-entropy
    "15FocalOfProductsINS_13FixedExponentILi4EEEE": (28, 32.4),  # gamma 2
    "10OfRegistryILNS_13ObjectiveKindE1EE": (35.2, 40.5),  # any gamma: one more exponential, no call
    "12QualityFocalINS_13FixedExponentILi4EEEE": (28, 32.4),
    "9VarifocalINS_13FixedExponentILi4EEEE": (30.2, 36.1),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_machine_code_of_logits(compiled, dtype):
    """sm_90: 16 bytes at a time, two approximations a number, and few instructions beside."""
    functions = functions_of(compiled(source_of("sigmoid_loss", dtype), "sm_90")[0])
    width = 4 if dtype == "float32" else 8
    checked = set()
    for (name, objective, _), function in functions.items():
        code = [instruction for _, instruction in function]
        assert count("LDL|STL", code) == 0, (name, objective)
        if name == "logits_of_labels":
            assert count(r"LDG\S*\.EF\.128", code) >= 4, objective  # the rest are upstream gradients
            # Gradients of most packs and of the others, and losses in float.
            assert count(r"STG\S*\.EF\.128", code) == 2 * 4 + 4 * width // 4, objective
        known = next((of for of in LOGIT_INSTRUCTIONS if objective.endswith(of)), None)
        if name != "logits_of_labels" or known is None:
            continue
        checked.add(known)
        blocks = [block for block in hot_blocks(function) if count(r"MUFU\.EX2", block) >= width]
        approximations = 3 if known.endswith("E1EE") else 2
        assert all(count("MUFU", block) == approximations * width for block in blocks), objective
        without, with_positive = (sorted(len(block) / width for block in blocks)[i : i + 4] for i in (0, 4))
        assert len(blocks) == 8, objective
        slack = 1.0 if width == 8 else 1.06  # the ends of a block weigh more where it has fewer numbers
        for trips, budget in zip((without, with_positive), LOGIT_INSTRUCTIONS[known], strict=True):
            assert 0.9 * budget <= min(trips) and max(trips) <= slack * budget, (objective, trips)
    assert checked == set(LOGIT_INSTRUCTIONS)
