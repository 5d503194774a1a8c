"""How many threads run a kernel, and in how many shares."""

from __future__ import annotations

import os
from typing import Any

import torch

from torchpool.kernels.cpu.parts import raising
from torchpool.kernels.cpu.shares import Call

PARALLEL_BYTES = 1 << 20
"""Bytes of traffic below which waking a second thread costs more than it saves."""
SHARE_BYTES = 1 << 18
"""Bytes of traffic of a share, at least; a thread has SHARES of them at most."""
SHARES = 8

_forked = False


def _mark_child() -> None:
    # GNU OpenMP ends a forked child that enters a parallel region after its parent did.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_child)


def count(traffic: int) -> int:
    """Threads for a kernel that moves `traffic` bytes: torch's number, or 1 where more would not
    pay or not be safe."""
    if _forked or traffic < PARALLEL_BYTES:
        return 1
    return torch.get_num_threads()


def split(units: int, traffic: int) -> tuple[int, int]:
    """Into how many shares `units` pieces of work are split, and for how many threads."""
    threads = min(count(traffic), units)
    if threads <= 1:
        return 1, 1
    return min(units, max(threads, min(SHARES * threads, traffic // SHARE_BYTES))), threads


def run(kernel: Any, units: int, traffic: int, *args: Any) -> None:
    """Runs a kernel over `units` independent pieces of work.

    Args:
        kernel: `kernel(begin, end, *args)` does the pieces `begin .. end - 1`.
        traffic: bytes moved, which decides whether threads pay.
    """
    if not Call(kernel, units, args).run(*split(units, traffic)):
        fail(kernel, units, args)


def fail(kernel: Any, units: int, args: tuple[Any, ...]) -> None:
    """Raises what a kernel failed with and, called past Python, could not say.

    Raises:
        Exception: always.
    """
    raising(kernel)(0, units, *args)
    raise RuntimeError(f"{kernel.__name__} failed, and did not when it was called again")
