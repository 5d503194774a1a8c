"""Which backend runs: the kernels of the device are asked first, and say why where they do not."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch

from torchpool import forced

_BACKENDS = {
    "cpu": "torchpool.kernels.cpu",
    "gpu": "torchpool.kernels.gpu",
    "reference": "torchpool.kernels.reference",
}
TABLES = {
    "cpu": "torchpool.kernels.cpu.segments",
    "gpu": "torchpool.kernels.gpu_segments",
    "reference": "torchpool.kernels.reference",
}
"""Who serves windows that a table gives (see `reference.is_table`)."""
_FIRST = {"cpu": "cpu", "cuda": "gpu"}


def refusals(
    operation: str, device: torch.device, *case: Any, table: bool = False
) -> tuple[ModuleType, dict[str, str]]:
    """The backend that serves a case, and why those asked before it do not.

    Args:
        operation: "select" or "accumulate".
        device: where the input lies.
        case: the arguments of the backends' `why_not_<operation>`.
        table: the windows come as a table.
    Raises:
        ValueError: TORCHPOOL_BACKEND names no backend, or one that does not serve the case.
    """
    asked = forced.backend()
    if asked is not None and asked not in _BACKENDS:
        raise ValueError(f"TORCHPOOL_BACKEND={asked!r} must be one of {', '.join(_BACKENDS)}")
    reasons: dict[str, str] = {}
    for name in (asked,) if asked else (_FIRST.get(device.type), "reference"):
        if name is None:
            continue
        backend = load((TABLES if table else _BACKENDS)[name])
        if isinstance(backend, str):
            reasons[name] = backend
            continue
        reason = getattr(backend, f"why_not_{operation}")(*case)
        if reason is None:
            return backend, reasons
        reasons[name] = reason
    raise ValueError(
        f"TORCHPOOL_BACKEND={asked!r} does not serve this case: {reasons[asked or 'reference']}"
    )


@cache
def load(module: str) -> ModuleType | str:
    """A backend, or why there is none."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("torchpool"):
            raise
        return f"{error.name} is not installed"


def backend_of(operation: str, device: torch.device, *case: Any, table: bool = False) -> ModuleType:
    """The backend that serves a case."""
    return refusals(operation, device, *case, table=table)[0]
