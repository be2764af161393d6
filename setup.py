"""Builds the extension imbalance_kernels._C; everything else stands in pyproject.toml.

IMBALANCE_KERNELS_BUILD=0 leaves the extension out, which gives a pure wheel. Nothing else does: a missing torch or
compiler is an error, so that nobody gets the slow implementation without asking for it.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = ["csrc/bindings.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))]
HEADERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))

# Portable and exact: no -march=native (the kernels choose AVX2 or AVX-512 at run time) and no -ffast-math (masks are
# -inf). The two -fno flags drop errno and trap bookkeeping, which nobody reads and which keeps loops from vectorising.
COMPILE_ARGS = "-O3 -std=c++20 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi".split()
if sys.platform == "linux":
    # at::parallel_for is serial without it. Not among the link arguments: torch brings its own OpenMP library.
    COMPILE_ARGS.append("-fopenmp")

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError:
    BuildExtension, CppExtension = build_ext, Extension
    TORCH_FOUND = False
else:
    TORCH_FOUND = True
    COMPILE_ARGS += [f"-isystem{path}" for path in include_paths()]  # -Wextra is for our headers, not for torch's


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
        super().run()


if os.environ.get("IMBALANCE_KERNELS_BUILD") == "0":
    setup()
else:
    extension = CppExtension(
        "imbalance_kernels._C",
        SOURCES,
        include_dirs=[str(ROOT / "csrc")],
        depends=HEADERS,
        extra_compile_args=COMPILE_ARGS,
    )
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildOrExplain})
