"""Starting kernels: on the device of their arguments and its current stream, without waiting."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


def why_not(x: Tensor) -> str | None:
    """Why Triton cannot read a tensor; None where it can."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the input lies on {x.device}, and TRITON_INTERPRET=1 is not set"
    return None


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """Runs `programs` programs of a kernel on the device of the tensor `on`."""
    if not on.is_cuda or on.device.index == torch.cuda.current_device():
        kernel[(programs,)](*args, **constants)
        return
    with torch.cuda.device(on.device):
        kernel[(programs,)](*args, **constants)
