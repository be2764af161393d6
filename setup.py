"""Builds the extension imbalance_kernels._C; everything else stands in pyproject.toml.

The CUDA kernels are built where torch has CUDA and nvcc is of the same major version, for TORCH_CUDA_ARCH_LIST;
IMBALANCE_KERNELS_BUILD=cpu leaves them out. IMBALANCE_KERNELS_BUILD=0 leaves the extension out, which gives a pure
wheel. Nothing else does: a missing torch or compiler is an error, so that nobody gets the slow implementation without
asking for it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = os.environ.get("IMBALANCE_KERNELS_BUILD")

# Portable and exact: no -march=native (the kernels choose AVX2 or AVX-512 at run time) and no -ffast-math (masks are
# -inf). The two -fno flags drop errno and trap bookkeeping, which nobody reads and which keeps loops from vectorising.
COMPILE_ARGS = "-O3 -std=c++20 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi".split()
NVCC_ARGS = "-O3 -std=c++20 -Xcompiler -Wall,-Wextra,-Wno-psabi".split()
if sys.platform == "linux":
    # at::parallel_for is serial without it. Not among the link arguments: torch brings its own OpenMP library.
    COMPILE_ARGS.append("-fopenmp")


def files(*patterns):
    """Return paths relative to this file, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def has_toolkit(version):
    """Return whether there is a CUDA toolkit for torch's version, and tell torch where.

    nvcc is asked: torch takes the folder above it, which is wrong where the nvcc on PATH is a script.
    """
    nvcc = shutil.which("nvcc", path=os.path.expandvars("$CUDA_HOME/bin:$PATH:/usr/local/cuda/bin"))
    call = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    plan = subprocess.run(call, capture_output=True, text=True).stderr if nvcc else ""
    home = re.search(r"TOP=(.+)", plan)
    found = re.search(r"__CUDACC_VER_MAJOR__=(\d+) -D__CUDACC_VER_MINOR__=(\d+)", plan)
    if not home or not found or found[1] != version.partition(".")[0]:
        return False
    os.environ["CUDA_HOME"] = os.path.realpath(home[1])
    knows_blackwell = (int(found[1]), int(found[2])) >= (12, 8)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if knows_blackwell else "8.0;9.0+PTX")
    return True


TORCH_FOUND = WITH_CUDA = False
BuildExtension, TorchExtension = build_ext, Extension
try:
    import torch
except ImportError:
    pass
else:
    TORCH_FOUND = True
    if torch.version.cuda and BUILD not in ("0", "cpu"):
        WITH_CUDA = has_toolkit(torch.version.cuda)
    from torch.utils import cpp_extension  # finds the toolkit when it is imported

    BuildExtension = cpp_extension.BuildExtension
    TorchExtension = cpp_extension.CUDAExtension if WITH_CUDA else cpp_extension.CppExtension
    # -Wextra is for our headers, not for torch's
    COMPILE_ARGS += [f"-isystem{path}" for path in cpp_extension.include_paths("cuda" if WITH_CUDA else "cpu")]


class BuildOrExplain(BuildExtension):
    """Fails with one clear message, and only where something is compiled: an sdist needs neither torch nor compiler."""

    def run(self):
        """Build the extension."""
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        missing = []
        if not TORCH_FOUND:
            missing.append("torch (not installed, or hidden from the build by pip's build isolation)")
        if not shutil.which(compiler):
            missing.append(f"a C++ compiler ({compiler} not found; the variable CXX names another)")
        if missing:
            sys.exit(
                f"\nimbalance-kernels cannot be built without {' and '.join(missing)}.\n"
                "With torch, setuptools, ninja and a C++ compiler installed:  pip install --no-build-isolation ...\n"
                "Pure Python, without the C++ kernels:  IMBALANCE_KERNELS_BUILD=0 pip install ...\n"
            )
        if torch.version.cuda and not WITH_CUDA:
            reason = "as asked for" if BUILD == "cpu" else f"no nvcc of CUDA {torch.version.cuda} found"
            print(f"imbalance-kernels is built without its CUDA kernels: {reason}", file=sys.stderr)
        super().run()


if BUILD == "0":
    setup()
else:
    sources = ["csrc/bindings.cpp", *files("csrc/cpu/*.cpp")]
    if WITH_CUDA:
        architectures = re.findall(r",code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))
        COMPILE_ARGS.append(f'-DIMBALANCE_WITH_CUDA="{" ".join(sorted(architectures, key=len))}"')
        sources += files("csrc/cuda/*.cu")
    extension = TorchExtension(
        "imbalance_kernels._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=files("csrc/**/*.h", "csrc/**/*.cuh"),
        extra_compile_args={"cxx": COMPILE_ARGS, "nvcc": NVCC_ARGS},
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildOrExplain})
