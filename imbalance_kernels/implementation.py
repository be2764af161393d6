"""Which implementation runs: what was built, what None chooses for a tensor, and how to say so."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from imbalance_kernels.options import LOGIT_DTYPES

try:
    _C: Any = importlib.import_module("imbalance_kernels._C")
except ModuleNotFoundError:  # the pure wheel, or a source tree that was not built
    _C = None

# What the CUDA kernels were compiled for, as in "sm_80 sm_90 compute_90": binaries, and PTX for later GPUs.
_CUDA_TARGETS = "" if _C is None else _C.build_info().get("cuda_architectures", "")
_SERVED: dict[int, bool] = {}  # by a GPU's index: whether these serve it, which is asked with every loss
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETS_TRITON = os.environ.get("TRITON_INTERPRET") == "1"  # on CPU, for tests
_EMULATED_CUDA = os.environ.get("IMBALANCE_KERNELS_EMULATED")  # a library with the CUDA kernels for CPU, for tests
if _EMULATED_CUDA:
    torch.ops.load_library(_EMULATED_CUDA)

__all__ = ["IMPLEMENTATIONS", "choose", "emulates_cuda", "extension", "show_config", "version"]

IMPLEMENTATIONS = ("reference", "cpu", "cuda", "triton")
TRITON_DEVICES = ("cuda", "xpu")  # ROCm's devices are called cuda too


def extension() -> Any | None:
    """Return the compiled extension module, or None where it was not built."""
    return _C


def emulates_cuda() -> bool:
    """Return whether impl="cuda" runs on CPU tensors, and on no other, because tests ask for it."""
    return bool(_EMULATED_CUDA)


def _cuda_serves(device: torch.device) -> bool:
    """Return whether the CUDA kernels were compiled for a device."""
    if emulates_cuda():
        return device.type == "cpu"
    if device.type != "cuda" or not _CUDA_TARGETS:
        return False
    compiling = torch.compiler.is_compiling()  # asks once anyway, and would guard on what is remembered
    served = None if compiling or device.index is None else _SERVED.get(device.index)
    if served is None:
        if not torch.cuda.is_available():  # now; no answer is remembered of a GPU that did not give one
            return False
        properties = torch.cuda.get_device_properties(device)
        served = _targets_serve(_CUDA_TARGETS, properties.major, properties.minor)
        if device.index is not None and not compiling:
            _SERVED[device.index] = served
    return served


def _targets_serve(targets: str, major: int, minor: int) -> bool:
    """Return whether one of nvcc's targets serves a GPU of this compute capability.

    A binary (sm_86) serves its generation from its own capability on, PTX (compute_86) also later generations, but
    with an "f" (compute_100f) not these, and with an "a" (sm_90a) no other.
    """
    for target in targets.split():
        kind, _, number = target.partition("_")
        built = int(number.rstrip("af"))
        generation, exact, family = built // 10, number.endswith("a"), number.endswith("f")
        if built == 10 * major + minor:
            return True
        if built < 10 * major + minor and not exact and (generation == major or (kind == "compute" and not family)):
            return True
    return False


def version() -> str:
    """Return the package's version."""
    try:
        return metadata.version("imbalance-kernels")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"


def choose(impl: str | None, logits: Tensor) -> str:
    """Return the implementation for `logits`: the one asked for, or for None the best one available.

    Args:
        impl: one of IMPLEMENTATIONS, or None.
        logits: on the device and in the dtype to be served.

    Raises:
        ValueError: `impl` is no implementation's name, or it does not serve the device or dtype of `logits`.
        RuntimeError: `impl` was not built, or is not installed.
    """
    device = logits.device.type
    cpu_serves = _C is not None and device == "cpu" and logits.dtype in LOGIT_DTYPES
    cuda_serves = _cuda_serves(logits.device)
    triton_serves = _HAS_TRITON and (device in TRITON_DEVICES or (device == "cpu" and _INTERPRETS_TRITON))
    if impl is None:
        if device == "cuda" and cuda_serves:
            return "cuda"
        if device in TRITON_DEVICES and triton_serves:
            return "triton"
        return "cpu" if cpu_serves else "reference"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, but it must be None or one of {IMPLEMENTATIONS}")
    if impl == "cuda" and not cuda_serves:
        if not _CUDA_TARGETS and not emulates_cuda():
            raise RuntimeError(
                "impl='cuda' needs the extension compiled with CUDA: install with torch's CUDA build and its nvcc by "
                "`pip install --no-build-isolation .`, or use impl='triton', 'reference' or None"
            )
        raise ValueError(
            f"impl='cuda' got logits on {logits.device}, but its kernels were compiled for "
            f"{_CUDA_TARGETS or 'tests on CPU'}: use impl='triton', 'reference' or None (TORCH_CUDA_ARCH_LIST names "
            "what the installation compiles for)"
        )
    if impl == "triton" and not _HAS_TRITON:
        raise RuntimeError("impl='triton' needs Triton: pip install 'triton>=3.6', or use impl='reference'")
    if impl == "triton" and not triton_serves:
        raise ValueError(
            f"impl='triton' got logits on {logits.device}, but it needs a GPU: use impl='cpu', 'reference' or None "
            "(for tests, TRITON_INTERPRET=1 set before Python starts runs it on CPU)"
        )
    if impl == "cpu" and _C is None:
        raise RuntimeError(
            "impl='cpu' needs the compiled extension: install with a C++ compiler by "
            "`pip install --no-build-isolation .` (IMBALANCE_KERNELS_BUILD unset), or use impl='reference'"
        )
    if impl == "cpu" and not cpu_serves:
        raise ValueError(f"impl='cpu' got logits on {logits.device} in {logits.dtype}: use impl='reference' or None")
    return impl


def show_config() -> None:
    """Print what was built and what ``impl=None`` would choose.

    Example:
        >>> show_config()  # doctest: +ELLIPSIS
        imbalance-kernels ...
    """
    print(f"imbalance-kernels {version()}, torch {torch.__version__}, Python {platform.python_version()}")
    if _C is None:
        print("  cpu        not built (pure wheel): pip install --no-build-isolation . with a C++ compiler builds it")
    else:
        info = _C.build_info()
        built = f"built by {info['compiler']} against torch {info['torch']}"
        print(f"  cpu        {built}, {torch.get_num_threads()} threads")
        print(f"             instruction set {info['instruction_set']} of {', '.join(_C.instruction_sets())}")
    if emulates_cuda():
        print(f"  cuda       emulated on CPU by {_EMULATED_CUDA}")
    elif _C is not None and _CUDA_TARGETS:
        print(f"  cuda       built by nvcc {_C.build_info()['cuda']} for {_CUDA_TARGETS}")
    else:
        print("  cuda       not built: pip install --no-build-isolation . with torch for CUDA and its nvcc builds it")
    if _HAS_TRITON:
        triton = importlib.import_module("triton")
        print(f"  triton     {triton.__version__}{', interpreted on CPU' if _INTERPRETS_TRITON else ''}")
    else:
        print("  triton     not installed: pip install 'triton>=3.6'")
    print("  reference  always there: plain PyTorch on any device")
    devices = ["cpu", *(device for device in TRITON_DEVICES if getattr(torch, device).is_available())]
    chosen = ", ".join(f"{device}: {choose(None, torch.empty(0, device=device))}" for device in devices)
    print(f"  impl=None chooses  {chosen}")
