"""The package as it is installed: names, documentation that runs, what is in the binary, and builds that must fail."""

import doctest
import importlib
import inspect
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import imbalance_kernels as ik
from imbalance_kernels import _C, functional, implementation, objectives, priors

ROOT = Path(__file__).parent.parent
PUBLIC = [
    importlib.import_module(name)
    for _, name, _ in pkgutil.walk_packages(ik.__path__, "imbalance_kernels.")
    if "._C" not in name
]
X86_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"


def python(code: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, away from the source tree unless `cwd` is there."""
    call = [sys.executable, "-c", code, *arguments]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


# ---------------------------------------------------------------- names and documentation


def test_triton_kernels_is_installed_inside_the_package_alone(tmp_path):
    """triton_kernels at top level is the name of a package of Triton's own."""
    code = """
import sys, imbalance_kernels
assert "triton_kernels" not in sys.modules
import imbalance_kernels.triton_kernels as ours
assert "triton_kernels" not in sys.modules and sys.modules["imbalance_kernels.triton_kernels"] is ours
import importlib.util
print(importlib.util.find_spec("triton_kernels"))
"""
    run = python(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert str(ROOT) not in run.stdout


def test_importing_is_light(tmp_path):
    """No package but torch and what torch imports."""
    code = "import sys, torch; before = set(sys.modules); import imbalance_kernels; print(set(sys.modules) - before)"
    imported = {name.split(".")[0] for name in eval(python(code, cwd=tmp_path).stdout)}
    assert imported - sys.stdlib_module_names == {"imbalance_kernels"}


@pytest.mark.parametrize("module", (ik, functional, objectives, priors), ids=lambda module: module.__name__)
def test_all_names_exist_and_are_documented(module):
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name
    classes_and_functions = {
        name
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
    }
    assert {name for name in classes_and_functions if not name.startswith("_")} <= set(module.__all__)


@pytest.mark.parametrize("module", [ik, *PUBLIC], ids=lambda module: module.__name__)
def test_examples_run(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


def test_every_public_loss_has_an_example():
    named = [getattr(ik, name) for name in ik.__all__] + [getattr(functional, name) for name in functional.__all__]
    without = {"TargetAndRest", "ColumnSums"}  # what functions return, whose examples show them
    for value in named:
        if inspect.isclass(value) or inspect.isfunction(value):
            assert ">>>" in inspect.getdoc(value) or value.__name__ in without, value.__name__


def test_the_package_is_typed():
    assert resources.files("imbalance_kernels").joinpath("py.typed").is_file()


def test_version():
    assert ik.__version__ == metadata.version("imbalance-kernels")


def test_show_config_says_what_was_built(capsys, monkeypatch):
    ik.show_config()
    shown = capsys.readouterr().out
    for part in (
        ik.__version__,
        torch.__version__,
        _C.build_info()["instruction_set"],
        "cuda",
        "triton",
        "reference",
        "cpu: cpu",
    ):
        assert part in shown
    monkeypatch.setattr(implementation, "_C", None)
    ik.show_config()
    shown = capsys.readouterr().out
    assert "not built" in shown and "--no-build-isolation" in shown and "cpu: reference" in shown
    assert "cuda       not built" in shown or implementation.emulates_cuda()


@pytest.mark.parametrize(
    "built, served",
    {
        "": [],
        "sm_80": ["8.0", "8.6", "8.9"],
        "sm_86 sm_90": ["8.6", "8.9", "9.0"],
        "sm_80 sm_90 sm_100 compute_100": ["8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"],
        "compute_90": ["9.0", "10.0", "10.3", "12.0"],
        "compute_100f": ["10.0", "10.3"],
        "sm_90a compute_100a": ["9.0", "10.0"],
    }.items(),
)
def test_the_gpus_that_the_cuda_kernels_serve(built, served, monkeypatch):
    """No GPU is needed to choose: what was built for others leaves Triton, or the reference, or an error."""
    monkeypatch.setattr(implementation, "_EMULATED_CUDA", None)
    monkeypatch.setattr(implementation, "_HAS_TRITON", True)
    monkeypatch.setattr(implementation, "_CUDA_TARGETS", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    logits = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    for capability in ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"):
        major, minor = map(int, capability.split("."))
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        monkeypatch.setattr(implementation, "_SERVED", {})
        if capability in served:
            assert implementation.choose(None, logits) == implementation.choose("cuda", logits) == "cuda"
            continue
        assert implementation.choose(None, logits) == "triton"
        with pytest.raises(ValueError if built else RuntimeError, match="impl='cuda'.*use impl='triton'"):
            implementation.choose("cuda", logits)


@pytest.fixture
def asked(monkeypatch):
    """Two GPUs, of which the kernels serve the second; the list of the questions that they were asked."""
    monkeypatch.setattr(implementation, "_EMULATED_CUDA", None)
    monkeypatch.setattr(implementation, "_CUDA_TARGETS", "sm_90")
    monkeypatch.setattr(implementation, "_SERVED", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    questions = []

    def properties(device):
        questions.append(device)
        return SimpleNamespace(major=8 + device.index, minor=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return questions


def test_a_gpu_is_asked_once(asked):
    devices = [torch.device("cuda", index) for index in (0, 1)]
    for _ in range(3):
        assert [implementation._cuda_serves(device) for device in devices] == [False, True]
    assert asked == devices


def test_a_gpu_that_did_not_answer_is_asked_again(asked, monkeypatch):
    device = torch.device("cuda", 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            implementation._cuda_serves(device)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert not implementation._cuda_serves(device)
    assert implementation._cuda_serves(device)


def test_a_compiled_choice_is_not_compiled_again_for_what_is_remembered(monkeypatch):
    monkeypatch.setattr(implementation, "_EMULATED_CUDA", None)
    monkeypatch.setattr(implementation, "_CUDA_TARGETS", "sm_90")
    monkeypatch.setattr(implementation, "_SERVED", {})
    gpu = SimpleNamespace(major=9, minor=0)
    cuda = SimpleNamespace(is_available=lambda: True, get_device_properties=lambda device: gpu)
    # Not torch.cuda itself, which the compiler asks too.
    monkeypatch.setattr(implementation, "torch", SimpleNamespace(cuda=cuda, compiler=torch.compiler))
    device, compiled = torch.device("cuda", 0), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    step = torch.compile(lambda x: x + implementation._cuda_serves(device), backend=backend, fullgraph=True)
    x = torch.ones(3)
    assert step(x).tolist() == [2, 2, 2] and implementation._cuda_serves(device) and step(x).tolist() == [2, 2, 2]
    assert len(compiled) == 1


# ---------------------------------------------------------------- the binary


def test_cpp_objectives_are_the_registrys_in_its_order():
    assert _C.objective_names() == list(objectives.REGISTRY)


AGAINST_REFERENCE = """
import sys, torch
import imbalance_kernels as ik
from imbalance_kernels import _C, functional, objectives

assert _C.build_info()["instruction_set"] == sys.argv[1], _C.build_info()
generator = torch.Generator().manual_seed(0)
worst = {}
for num_rows, num_classes in ((70, 3), (37, 33), (5, 1000), (2, 5003)):  # tiles of rows and a tail, rows, blocks
    x = 3 * torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    target[1] = -100
    x[0, (target[0] + 1) % num_classes] = -torch.inf
    prior = torch.rand(num_classes, generator=generator) + 0.1
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for objective in (cls() for cls in objectives.REGISTRY.values()):
            for reduction in ("none", "sum"):
                results = []
                options = dict(prior=prior / prior.sum(), weight=prior, softcap=20.0, label_smoothing=0.1, z_loss=1e-3)
                for impl, logits in (("cpu", x.to(dtype, copy=True)), ("reference", x.to(dtype).to(x, copy=True))):
                    logits.requires_grad_()
                    losses = functional.softmax_loss(
                        logits, target, objective, reduction=reduction, impl=impl, **options
                    )
                    losses.sum().backward()
                    results.append((losses.detach().double(), logits.grad.double()))
                for (ours, exact), kind in zip(zip(*results), ("loss", "gradient")):
                    error = float((ours - exact).abs().max() / exact.abs().max())
                    worst[dtype, kind] = max(worst.get((dtype, kind), 0.0), error)
for (dtype, kind), error in worst.items():
    precision = dtype if kind == "gradient" or dtype == torch.float64 else torch.float32
    assert error < 20 * torch.finfo(precision).eps, (dtype, kind, error)
print("checked", len(worst))
"""
SUPPORTED = {"DEFAULT": ["baseline"], "AVX2": ["baseline", "avx2"], "AVX512": ["baseline", "avx2", "avx512"]}


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_every_instruction_set_is_right(instruction_set, tmp_path):
    run = python(AGAINST_REFERENCE, instruction_set, cwd=tmp_path, IMBALANCE_KERNELS_INSTRUCTION_SET=instruction_set)
    if instruction_set in SUPPORTED.get(torch.backends.cpu.get_cpu_capability(), ["baseline"]):
        assert run.returncode == 0 and "checked 8" in run.stdout, run.stderr
    else:
        assert "ImportError: IMBALANCE_KERNELS_INSTRUCTION_SET" in run.stderr


def test_a_wrong_instruction_set_raises(tmp_path):
    run = python("import imbalance_kernels", cwd=tmp_path, IMBALANCE_KERNELS_INSTRUCTION_SET="sse9")
    assert run.returncode != 0
    assert "ImportError: IMBALANCE_KERNELS_INSTRUCTION_SET names an instruction set that" in run.stderr


def test_the_best_instruction_set_is_chosen():
    wanted = os.environ.get("IMBALANCE_KERNELS_INSTRUCTION_SET")
    supported = SUPPORTED.get(torch.backends.cpu.get_cpu_capability(), ["baseline"])
    assert (
        _C.build_info()["instruction_set"] == wanted
        or [name for name in _C.instruction_sets() if name in supported][-1]
    )


@pytest.mark.skipif(not X86_LINUX or not shutil.which("objdump"), reason="reads x86 machine code with binutils")
def test_no_shared_function_uses_avx():
    """The linker keeps one copy of a weak function: were it one for AVX, an older processor would stop there."""
    weak = {
        int(fields[0], 16)
        for fields in map(str.split, _output("nm", "--defined-only", _C.__file__).splitlines())
        if fields[1] in "WVu"
    }
    functions_with_avx: dict[int, str] = {}
    for line in _output("objdump", "--disassemble", "--no-show-raw-insn", _C.__file__).splitlines():
        if header := re.match(r"([0-9a-f]+) <(.+)>:$", line):
            address, name = int(header[1], 16), header[2]
        elif re.search(r":\s+v[a-z]|%[yz]mm", line):  # VEX and EVEX encodings
            functions_with_avx[address] = name
    assert weak and functions_with_avx, "the binary was read"
    assert [name for address, name in functions_with_avx.items() if address in weak] == []


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_without_the_extension_the_reference_works(tmp_path):
    """The pure wheel; kernels that are asked for by name raise."""
    code = """
import sys
sys.modules["imbalance_kernels._C"] = None
import torch, imbalance_kernels as ik
x, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, -100])
for reduction in ("none", "mean"):
    for loss in (ik.FocalLoss, ik.SoftTruncationLoss):
        loss(reduction=reduction)(x, target).sum().backward()
assert torch.isfinite(x.grad).all() and x.grad[:3].all()
try:
    ik.FocalLoss(impl="cpu")(x, target)
except RuntimeError as error:
    print(error)
"""
    run = python(code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "impl='cpu' needs the compiled extension" in run.stdout


# ---------------------------------------------------------------- the commands


def test_make_help_shows_every_command_first_things_first():
    shown = [line.split(maxsplit=2) for line in _output("make", "-C", str(ROOT), "-s", "help").splitlines()]
    shown = {words[1]: words[2] for words in shown if words[0] == "make"}
    documented = re.findall(r"^([a-z-]+):.*## (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shown == dict(documented)
    assert list(shown)[:4] == ["help", "demo", "test", "bench"]


# ---------------------------------------------------------------- the build

SETUP = """
import runpy, sys
HIDE
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""
HIDDEN = {
    "torch": ("sys.modules['torch'] = None", {}),
    "a C++ compiler": ("", {"CXX": "no-such-compiler"}),
}


@pytest.mark.parametrize("missing", HIDDEN)
def test_a_build_that_lacks_something_fails_and_says_what_to_do(missing, tmp_path):
    hide, environment = HIDDEN[missing]
    run = python(
        SETUP.replace("HIDE", hide), str(tmp_path), cwd=ROOT, **{"IMBALANCE_KERNELS_BUILD": "1", **environment}
    )
    assert run.returncode != 0
    for part in (f"cannot be built without {missing}", "--no-build-isolation", "IMBALANCE_KERNELS_BUILD=0"):
        assert part in run.stderr


TOOLKIT = """
import os, runpy, setuptools
setuptools.setup = lambda **arguments: None
found = runpy.run_path("setup.py")["has_toolkit"]("13.1")
print(found, os.environ.get("CUDA_HOME"), os.environ.get("TORCH_CUDA_ARCH_LIST"))
"""
NVCC = """#!/bin/sh
[ "$*" = "--dryrun -x cu /dev/null" ] || exit 1
echo '#$ TOP=/opt/cuda/bin/..' >&2
echo '#$ gcc -D__CUDACC__ -D__CUDACC_VER_MAJOR__=VERSION -D__CUDACC_VER_BUILD__=88 "/dev/null"' >&2
"""


@pytest.mark.parametrize(
    "version, listed, found",
    [
        ("13 -D__CUDACC_VER_MINOR__=0", None, "True /opt/cuda 8.0;9.0;10.0+PTX"),
        ("13 -D__CUDACC_VER_MINOR__=0", "9.0", "True /opt/cuda 9.0"),
        ("12 -D__CUDACC_VER_MINOR__=8", None, "False None None"),
        ("no version", None, "False None None"),
    ],
)
def test_the_build_asks_nvcc_for_its_toolkit(version, listed, found, tmp_path):
    """From a script on PATH, whose own folder is nothing; a toolkit that is not torch's is not used."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(NVCC.replace("VERSION", version))
    nvcc.chmod(0o755)
    unset = "".join(f"os.environ.pop('{name}', None); " for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST"))
    environment = {} if listed is None else {"TORCH_CUDA_ARCH_LIST": listed}
    code = f"import os; {unset}os.environ.update({environment}){TOOLKIT}"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = python(code, cwd=ROOT, PATH=path, IMBALANCE_KERNELS_BUILD="0")
    assert run.stdout.strip() == found, run.stderr


@pytest.mark.parametrize("missing", HIDDEN)
def test_a_pure_build_needs_neither(missing, tmp_path):
    hide, environment = HIDDEN[missing]
    run = python(
        SETUP.replace("HIDE", hide), str(tmp_path), cwd=ROOT, **{"IMBALANCE_KERNELS_BUILD": "0", **environment}
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("*.so"))
