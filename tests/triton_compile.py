"""Compiles the Triton kernels for devices that are not there, by calling the launchers as a user's program would.

The active driver is replaced by one that names a target and launches nothing, so that what Triton compiles is what it
would compile there: the same specialisations, from the same launcher. Run as a script, it prints one line of JSON for
each case; test_triton_compile.py starts it for each target with each version of Triton.

    .venv/bin/python tests/triton_compile.py sm_90 main

`loads` and `stores` count instructions of 16 bytes; "compiled" is empty where a case shares an earlier one's kernel.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from imbalance_kernels.binary_objectives import BINARY_REGISTRY
from imbalance_kernels.logit_map import AngularMargin, CircleMargin, LogitMap
from imbalance_kernels.objectives import REGISTRY
from imbalance_kernels.ops.kernel_arguments import objective_arguments, split_arguments
from imbalance_kernels.options import SoftmaxOptions, accumulate_dtype
from imbalance_kernels.triton_kernels import (
    column_sums,
    launch,
    multilabel_softmax,
    planes,
    sigmoid_loss,
    softmax_loss,
    target_and_rest,
)

# What a target is, and the properties that a device of its kind reports.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), launch.Device(108, 32, 40 << 20, has_clusters=False)),
    "sm_90": (GPUTarget("cuda", 90, 32), launch.Device(132, 32, 50 << 20, has_clusters=False)),
    "sm_90 clusters": (GPUTarget("cuda", 90, 32), launch.Device(132, 32, 50 << 20, has_clusters=True)),
    "sm_100": (GPUTarget("cuda", 100, 32), launch.Device(148, 32, 126 << 20, has_clusters=False)),
    "sm_100 clusters": (GPUTarget("cuda", 100, 32), launch.Device(148, 32, 126 << 20, has_clusters=True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), launch.Device(304, 64, 4 << 20, has_clusters=False)),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}


class _Utilities:
    def load_binary(self, *_):
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, _):
        pass

    def get_device_properties(self, _):
        return {"max_shared_mem": 163 << 10, "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    """A device of which Triton only gets to know what it is."""

    utils = _Utilities()

    def __init__(self, target: GPUTarget):
        self.target = target
        self.launches = 0

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return self.target

    def launcher_cls(self, *_):
        def count(*_):
            self.launches += 1

        return count


def use(target: str) -> _Driver:
    """Make Triton compile for a target from now on."""
    gpu, device = TARGETS[target]
    driver = _Driver(gpu)
    triton.runtime.driver.set_active(driver)
    for module in (launch, softmax_loss, sigmoid_loss, column_sums):
        module.device_of = lambda _: device
    return driver


def kernels() -> list[triton.JITFunction]:
    """Every kernel that launchers launch."""
    modules = (softmax_loss, planes, target_and_rest, sigmoid_loss, multilabel_softmax, column_sums)
    found = [x for module in modules for x in vars(module).values() if isinstance(x, triton.JITFunction)]
    return [x for x in found if x.fn.__module__ in {module.__name__ for module in modules}]


def compiled() -> dict[int, tuple[triton.JITFunction, object]]:
    """All that has been compiled so far, by identity."""
    everything = {}
    for kernel in kernels():
        for cache, *_ in kernel.device_caches.values():
            everything |= {id(binary): (kernel, binary) for binary in cache.values()}
    return everything


def call(driver: _Driver, **case) -> None:
    """Call an operation as imbalance_kernels/ops would."""
    num_rows, num_classes = case.get("rows", 8), case["classes"]
    dtype = DTYPES[case["dtype"]]
    statistics = accumulate_dtype(dtype)

    def vector(size):
        return torch.ones(size, dtype=statistics)

    weighting = case.get("weighting", "")
    probabilities = weighting == "probabilities"
    name = "cross_entropy" if probabilities else case.get("objective", "cross_entropy")
    objective = REGISTRY[name]()
    if case.get("gamma") == "per class" and name in ("focal", "poly_focal"):
        objective = REGISTRY[name](vector(num_classes))
    maps = {
        "plain": lambda: {},
        "prior": lambda: {"bias": vector(num_classes)},
        "everything": lambda: {
            "scale": case.get("scale", 1.3),
            "factor": vector(num_classes),
            "bias": vector(num_classes),
            "softcap": 5.0,
        },
        "softcap": lambda: {"softcap": 30.0},
        "margin": lambda: {"margin": 0.35, "scale": 64.0},
        "class margins": lambda: {"margin": vector(num_classes), "scale": 30.0},
        "arc": lambda: {"margin": AngularMargin(m2=0.5), "scale": 64.0},
        "sphere": lambda: {"margin": AngularMargin(m1=1.3, m2=0.2), "scale": 64.0},
        "circle": lambda: {"margin": CircleMargin(0.25), "scale": 256.0},
    }
    map_name = case.get("map", "plain")
    if probabilities and map_name in ("margin", "class margins", "arc", "sphere", "circle"):
        map_name = "prior"
    options = SoftmaxOptions(
        objective=objective,
        logit_map=LogitMap(**maps[map_name]()),
        weight=vector(num_classes) if weighting in ("weight", "weighted smoothing") else None,
        label_smoothing=0.1 if "smoothing" in weighting else 0.0,
        z_loss=1e-4 if case.get("z_loss") else 0.0,
        ignore_index=case.get("ignore_index", -100),
    )
    operation = case.get("operation", "loss and gradient")
    reduction = case.get("reduction", "normalizer")
    if operation == "in place" and reduction == "none":  # knows no upstream gradient
        operation = "gradient"
    logits = torch.empty((num_rows, num_classes), dtype=dtype)
    if case.get("pixels") and "split" not in operation:  # of each image
        logits = torch.empty((num_rows, num_classes, case["pixels"]), dtype=dtype)
        num_rows = num_rows * case["pixels"]
    target = torch.zeros(logits.shape, dtype=dtype) if probabilities else torch.zeros(num_rows, dtype=torch.int64)
    split = split_arguments(options)
    normalizer = vector(()) if reduction == "normalizer" else None
    loss = (
        *objective_arguments(options.objective),
        vector(num_rows) if case.get("sample_weight") else None,
        normalizer,
        "sum" if reduction == "normalizer" else reduction,
        options.z_loss,
    )
    upstream = vector(num_rows if reduction == "none" else ())
    rows = vector(num_rows)
    reports = (bool(case.get("log_probs")) and not probabilities, False)
    calls = {
        "loss": lambda: softmax_loss.softmax_loss(logits, target, *split, *loss, False, *reports),
        "loss and gradient": lambda: softmax_loss.softmax_loss(logits, target, *split, *loss, True, *reports),
        "in place": lambda: softmax_loss.softmax_loss_(logits, target, *split, *loss, *reports),
        "gradient": lambda: softmax_loss.softmax_loss_backward(logits, target, *split, *loss, upstream),
        "split": lambda: target_and_rest.target_and_rest(logits, target, *split),
        "split backward": lambda: target_and_rest.target_and_rest_backward(
            logits, target, *split, rows, rows, rows, rows, rows
        ),
        "scale": lambda: softmax_loss.scale_(logits, vector(())),
    }
    calls[operation]()


def call_sigmoid(driver: _Driver, **case) -> None:
    """The same of the sigmoid family: logits of `shape`, labels of a kind."""
    shape, dtype = tuple(case["shape"]), DTYPES[case["dtype"]]
    statistics = accumulate_dtype(dtype)
    logits = torch.empty(shape, dtype=dtype)
    num_classes, num_rows = shape[1], shape[0] * (shape[2] if len(shape) == 3 else 1)
    target = {
        "labels": lambda: torch.zeros(num_rows, dtype=torch.int64),
        "lists": lambda: torch.zeros(num_rows, case.get("list_length", 3), dtype=torch.int64),
        "bool": lambda: torch.zeros(shape, dtype=torch.bool),
        "dense": lambda: torch.zeros(shape, dtype=dtype),
        "dense float32": lambda: torch.zeros(shape, dtype=statistics),
    }[case.get("labels", "labels")]()

    def vector(size):
        return torch.ones(size, dtype=statistics)

    objective = BINARY_REGISTRY[case["objective"]](*case.get("parameters", ()))
    weighting = case.get("weighting", "alpha")
    vectors = weighting == "vectors"
    of_class = vector(num_classes) if vectors and case["objective"] in ("focal", "poly_focal") else None
    sample_weight = {"rows": num_rows, "logits": shape}.get(case.get("sample_weight", ""))
    reduction = case.get("reduction", "normalizer")
    call = (
        target,
        *objective_arguments(objective)[:2],
        of_class,
        *((0.25, 0.75) if weighting == "alpha" else (1.0, 1.0)),
        vector(num_classes) if vectors else None,
        vector(num_classes) if vectors else None,
        vector(num_classes) if vectors else None,
        None if sample_weight is None else vector(sample_weight),
        vector(()) if reduction == "normalizer" else None,
        case.get("ignore_index", -100),
        "sum" if reduction == "normalizer" else reduction,
    )
    if reduction == "none":
        sigmoid_loss.sigmoid_loss(logits, *call, False)
        sigmoid_loss.sigmoid_loss_backward(logits, *call, vector(shape))
    else:
        sigmoid_loss.sigmoid_loss(logits, *call, True)


def call_with_labels(driver: _Driver, **case) -> None:
    """The same of multilabel_softmax and column_sums."""
    num_rows, num_classes = case.get("rows", 8), case["classes"]
    dtype = DTYPES[case["dtype"]]
    statistics = accumulate_dtype(dtype)
    pixels = case.get("pixels", 0)
    logits = torch.empty((num_rows, num_classes, pixels) if pixels else (num_rows, num_classes), dtype=dtype)
    num_rows = num_rows * max(1, pixels)
    target = {
        "labels": lambda: torch.zeros(num_rows, dtype=torch.int64),
        "lists": lambda: torch.zeros(num_rows, case.get("length", 5), dtype=torch.int64),
        "bool": lambda: torch.zeros(logits.shape, dtype=torch.bool),
        "float": lambda: torch.zeros(logits.shape, dtype=dtype),
    }[case["labels"]]()
    weight = torch.ones(num_rows, dtype=statistics) if case.get("sample_weight") else None
    bias = torch.ones(num_classes, dtype=statistics) if case.get("prior") else None
    ignore_index = case.get("ignore_index", -100)
    sums = (logits, target, weight, ignore_index, case.get("from_softmax", False))
    upstream = torch.ones(num_classes, dtype=statistics)
    losses = (logits, target, bias, weight, torch.ones((), dtype=statistics), ignore_index, "sum")
    {
        "sums": lambda: column_sums.column_sums(*sums),
        "sums backward": lambda: column_sums.column_sums_backward(*sums, upstream, upstream),
        "loss": lambda: multilabel_softmax.multilabel_softmax(*losses, False),
        "loss and gradient": lambda: multilabel_softmax.multilabel_softmax(*losses, True),
        "gradient": lambda: multilabel_softmax.multilabel_softmax_backward(*losses, torch.ones((), dtype=statistics)),
    }[case["operation"]]()


LABELS = [
    {"operation": operation, "dtype": dtype, "labels": labels, "classes": num_classes, **options}
    for operation, options in (
        ("loss and gradient", {"prior": True, "sample_weight": True}),
        ("loss", {}),
        ("gradient", {}),
        ("sums", {"sample_weight": True}),
        ("sums", {"from_softmax": True}),
        ("sums backward", {}),
        ("sums backward", {"from_softmax": True, "sample_weight": True}),
    )
    for dtype, labels, num_classes in (
        ("bfloat16", "labels", 91),
        ("bfloat16", "lists", 1000),
        ("bfloat16", "bool", 32000),
        ("float32", "float", 1000),
        ("float32", "lists", 32000),
        ("float16", "float", 3),
        ("float64", "bool", 1000),
    )
] + [
    {"operation": operation, "dtype": dtype, "labels": labels, "classes": 19, "pixels": 4096, **options}
    for operation, options in (
        *((name, options) for name in ("sums", "sums backward") for options in ({}, {"from_softmax": True})),
        *((name, {}) for name in ("loss and gradient", "loss", "gradient")),
    )
    for dtype, labels in (("bfloat16", "labels"), ("float32", "bool"), ("float16", "lists"), ("float64", "float"))
]
LABELS += [  # more classes than threads hold
    {"operation": "loss and gradient", "dtype": dtype, "labels": labels, "classes": 1000, "pixels": 4096}
    for dtype, labels in (("bfloat16", "labels"), ("float32", "float"))
]

# The lines of the benchmark: loss and gradient of cross-entropy and of focal + prior, with a normalizer.
MAIN = [
    {"dtype": dtype, "classes": num_classes, "objective": objective, "map": map_name}
    for dtype, num_classes in [
        ("bfloat16", 256),
        ("bfloat16", 1000),
        ("bfloat16", 8192),
        ("bfloat16", 32000),
        ("bfloat16", 128256),
        ("float32", 32000),
    ]
    for objective, map_name in [("cross_entropy", "plain"), ("focal", "prior")]
]

# Class probabilities are read as the logits are: they must be vectors too.
PROBABILITIES = [
    {"dtype": "bfloat16", "classes": num_classes, "weighting": "probabilities"} for num_classes in (8192, 32000)
]

# Channels-first, of few classes, of more than a thread holds, and of more than a program does.
PLANES = [
    {"dtype": dtype, "classes": num_classes, "pixels": 4096, "rows": 2, "objective": "focal", "map": map_name}
    for dtype, num_classes, map_name in [
        ("float32", 19, "plain"),
        ("float32", 21, "prior"),
        ("bfloat16", 19, "plain"),
        ("float32", 150, "plain"),
        ("bfloat16", 1000, "prior"),
    ]
]

FACTORS = {
    "target": ["sm_80", "sm_90", "sm_100", "gfx942"],
    "dtype": list(DTYPES),
    "classes": [2, 91, 1000, 16384, 20001, 32000],
    "pixels": [0, 0, 300],
    "operation": ["loss", "loss and gradient", "in place", "gradient", "split", "split backward"],
    "objective": list(REGISTRY),
    "map": ["plain", "prior", "everything", "softcap", "margin", "class margins", "arc", "sphere", "circle"],
    "weighting": ["", "weight", "smoothing", "weighted smoothing", "probabilities"],
    "reduction": ["mean", "sum", "normalizer", "none"],
    "gamma": ["number", "per class"],
    "z_loss": [False, True],
    "sample_weight": [False, True],
    "log_probs": [False, True],
}


# Rows side by side, whose vectors are of one row and of several; pieces of rows; images; and labels that may be soft.
SIGMOID = [
    {"shape": shape, "dtype": dtype, "objective": objective, "labels": labels}
    for shape, dtype, labels in [
        ((1000, 80), "bfloat16", "labels"),
        ((1000, 80), "float32", "labels"),
        ((1000, 91), "bfloat16", "labels"),
        ((4096, 1), "bfloat16", "labels"),
        ((16, 16000), "bfloat16", "labels"),
        ((4, 19, 4096), "bfloat16", "labels"),
        ((1000, 80), "bfloat16", "bool"),
        ((1000, 80), "bfloat16", "dense"),
    ]
    for objective in ("cross_entropy", "focal")
]

# Every objective, with one after the other of everything else; exponents that are products, and some that are not.
SIGMOID_ALL = [
    {
        "shape": ((1000, 80), (3, 91), (16, 16000), (4, 19, 4096), (2, 3, 7))[place % 5],
        "dtype": list(DTYPES)[place % 4],
        "objective": name,
        "parameters": parameters,
        "labels": ("dense", "labels", "dense float32", "lists", "bool", "dense", "dense float32")[place % 7],
        "weighting": ("alpha", "vectors", "none")[place % 3],
        "sample_weight": ("", "rows", "logits")[place // 2 % 3],
        "reduction": ("mean", "none", "normalizer", "sum")[place // 3 % 4],
    }
    for place, (name, parameters) in enumerate(
        [
            *((name, ()) for name in BINARY_REGISTRY),
            ("focal", (0.7,)),
            ("poly_focal", (0.5, 1.0)),
            ("quality_focal", (1.3,)),
            ("varifocal", (0.7, 0.75)),
            ("asymmetric", (3.3, 0.7, 0.05)),
            ("asymmetric", (4.0, 0.5, 0.0)),
        ]
    )
]

SIGMOID_SAME = [
    {"shape": (8, 80), "dtype": "bfloat16", "objective": "focal", "reduction": "mean", "labels": labels, **change}
    for labels in ("labels", "lists", "dense")
    for change in (
        {},
        {"shape": (1, 80)},
        {"shape": (4099, 80)},
        {"shape": (16, 8)},
        {"ignore_index": 1},
        {"ignore_index": 0},
        {"list_length": 1},
    )
]


def pairwise() -> list[dict]:
    """Cases in which each value of each factor meets each value of every other: greedily, and always the same."""
    chance = random.Random(20240229)
    names = list(FACTORS)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]}
    cases = []
    while missing:
        best, covered = {}, set()
        for _ in range(60):
            (a, x), (b, y) = chance.choice(sorted(missing, key=str))
            case = {name: chance.choice(FACTORS[name]) for name in names} | {a: x, b: y}
            pairs = set(itertools.combinations(((name, case[name]) for name in names), 2)) & missing
            if len(pairs) > len(covered):
                best, covered = case, pairs
        cases.append(best)
        missing -= covered
    return cases


def describe(kernel: triton.JITFunction, binary) -> dict:
    """What the compiler made of a kernel."""
    constants = {
        name: value for (index, *_), value in binary.src.constants.items() if (name := kernel.arg_names[index])
    }
    found = {
        "kernel": f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}",
        "threads": binary.metadata.num_warps * binary.metadata.target.warp_size,
        "blocks": getattr(binary.metadata, "num_ctas", 1),
        "shape": {k: v for k, v in constants.items() if k in ("UNIT", "ROWS", "COLUMNS", "BLOCK", "LANES", "VECTOR")},
        # How a warp's threads lie on blocks, and what passes between them through shared memory.
        "warps": sorted(set(re.findall(r"threadsPerWarp = \[(\d+, \d+)\]", binary.asm["ttgir"]))),
        "shared": binary.metadata.shared,
    }
    if "amdgcn" in binary.asm:
        assembly = binary.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])
        found["spilled"] = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1])
        found["loads"] = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly))
        found["stores"] = len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", assembly))
        return found
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        command = [str(tools / "cuobjdump"), "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
    found["spilled"] = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    found["loads"] = len(re.findall(r"ld\.global\S*\.v4\.b32", binary.asm["ptx"]))
    found["stores"] = len(re.findall(r"st\.global\S*\.v4\.b32", binary.asm["ptx"]))
    ptx = binary.asm["ptx"]
    barrier = ptx.find("barrier.cluster.arrive")
    narrow = [match.start() for match in re.finditer(r"ld\.global\S*\.b16", ptx)]  # a bfloat16 row's target
    found["reads_target_before_barrier"] = barrier >= 0 and bool(narrow) and max(narrow) < barrier
    return found


def run(target: str, cases: list[dict]) -> None:
    driver = use(target)
    for case in cases:
        before, launches = set(compiled()), driver.launches
        kind = call_sigmoid if "shape" in case else call_with_labels if "labels" in case else call
        kind(driver, **case)
        new = [describe(*found) for key, found in compiled().items() if key not in before]
        print(json.dumps({"case": case, "launches": driver.launches - launches, "compiled": new}), flush=True)


# Cases that must not compile anything new after the first: what may change from call to call.
SAME = [
    {"dtype": "bfloat16", "classes": 32000, "map": "everything", "objective": "focal", "reduction": reduction, **change}
    for reduction in ("mean", "none")
    for change in (
        {"rows": 8},
        {"rows": 1},
        {"rows": 16},
        {"rows": 4099},
        {"classes": 128256},
        {"ignore_index": 1},
        {"ignore_index": 0},
        {"scale": 2.0},
    )
]

SAME_LABELS = [
    {"operation": operation, "dtype": "bfloat16", "labels": "lists", "classes": 1024, **options, **change}
    for operation, options in (
        ("loss and gradient", {}),
        ("loss and gradient", {"pixels": 32}),
        ("sums", {}),
        ("sums backward", {"from_softmax": True}),
    )
    for change in (
        {"rows": 8},
        {"rows": 1},
        {"rows": 16},
        {"rows": 4099},
        {"classes": 992},
        {"length": 1},
        {"length": 16},
        {"ignore_index": 1},
    )
]

CLUSTERS = [{**case, "operation": "in place"} for case in MAIN if case["classes"] > 16384] + [
    {"dtype": "bfloat16", "classes": 250002, "objective": "focal", "map": "prior"},
    {"dtype": "float32", "classes": 128256, "weighting": "weighted smoothing"},
]


def main() -> None:
    sets = {"main": MAIN + PROBABILITIES, "same": SAME, "clusters": CLUSTERS, "planes": PLANES, "pairs": pairwise()}
    sets |= {"sigmoid": SIGMOID, "sigmoid all": SIGMOID_ALL, "sigmoid same": SIGMOID_SAME}
    sets |= {"labels": LABELS, "same labels": SAME_LABELS}
    if len(sys.argv) != 3 or sys.argv[1] not in TARGETS or sys.argv[2] not in sets:
        sys.exit(f"triton_compile.py: give a target ({', '.join(TARGETS)}) and a set of cases ({', '.join(sets)})")
    target, which = sys.argv[1:]
    cases = sets[which]
    cases = [case for case in cases if case.get("target", target) == target]
    print(json.dumps({"triton": triton.__version__}), flush=True)
    run(target, cases)


if __name__ == "__main__":
    main()
