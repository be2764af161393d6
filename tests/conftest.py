"""Hypothesis profiles, and whether Triton's kernels are interpreted or run on a GPU."""

import importlib
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from implementations import STAND_INS

settings.register_profile(
    "default",
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("full", settings.get_profile("default"), max_examples=4000, derandomize=False)
settings.load_profile("default")


def pytest_configure(config):
    """`-m gpu` runs the kernels on a GPU; all other tests run them in Triton's interpreter, also where there is one."""
    if config.option.markexpr != "gpu" or STAND_INS:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
        importlib.import_module("interpreter")


def pytest_collection_modifyitems(items):
    """Leave out what is for a GPU where kernels are interpreted."""
    if STAND_INS:
        return
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="for a GPU: make gpu-check"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20240229)
