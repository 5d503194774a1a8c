"""Shared fixtures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(params=["reference", "device"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the reference, and with whatever the device's own kernels serve."""
    if request.param == "reference":
        monkeypatch.setenv("TORCHPOOL_BACKEND", "reference")
    else:
        monkeypatch.delenv("TORCHPOOL_BACKEND", raising=False)
    return str(request.param)
