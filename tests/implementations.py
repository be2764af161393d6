"""Which implementations the tables run.

With IMBALANCE_KERNELS_EMULATED, the library that tests/emulation builds of the CUDA kernels, it is these alone, on the
CPU; such a run is started by `make test-emulated`, with `-k cuda`.
"""

import os

EMULATED = "IMBALANCE_KERNELS_EMULATED" in os.environ
KERNELS = ("cuda",) if EMULATED else ("cpu", "triton")
IMPLEMENTATIONS = KERNELS if EMULATED else ("reference", *KERNELS)

# Tests marked gpu run on CPU, as far as they go there: a trial of the tests themselves (bench/gpu_check.py --dry-run).
STAND_INS = os.environ.get("IMBALANCE_KERNELS_STAND_INS") == "1"
