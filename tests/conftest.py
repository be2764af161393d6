"""Hypothesis profiles, and the machinery that the tables of tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("full", settings.get_profile("default"), max_examples=4000, derandomize=False)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20240229)
