"""Shared fixtures."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

# Several test processes share the cores, so that threads that wait must not spin; torch reads this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

from torchpool import small

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(min(2, os.cpu_count() or 1))

# How much test_fuzz.py tries, per family of reductions: always the same cases, except when "deep".
_FUZZ = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("fuzz", _FUZZ, max_examples=320, derandomize=True)
settings.register_profile("brief", _FUZZ, max_examples=40, derandomize=True)
settings.register_profile("deep", _FUZZ, max_examples=5000, print_blob=True)


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: to look for garbage in it, as often as compilers
    leave some, takes a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries look at the end whether all that they made is gone


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are about our kernels, however small their inputs are."""
    monkeypatch.setattr(small, "SMALL", 0)


@pytest.fixture(params=["reference", "device"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the reference, and with whatever the device's own kernels serve."""
    if request.param == "reference":
        monkeypatch.setenv("TORCHPOOL_BACKEND", "reference")
    else:
        monkeypatch.delenv("TORCHPOOL_BACKEND", raising=False)
    return str(request.param)
