"""How many threads run a kernel, and when the parallel one may be entered at all."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numba
import numpy as np
import torch

from torchpool.kernels.cpu import shares

PARALLEL_BYTES = 1 << 20
"""Bytes of traffic below which waking a second thread costs more than it saves."""

config: Any = numba.config  # numba fills it in while it is imported
_forked = False
_guard: AbstractContextManager[Any] | None = None
_first_entry = threading.Lock()


def _mark_child() -> None:
    # GNU OpenMP ends a forked child that enters a parallel region after its parent did.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_child)


def _prefer_openmp() -> None:
    """Asks numba for OpenMP, which several Python threads may enter at once, unless the user chose
    a layer."""
    if config.THREADING_LAYER != "default":
        return
    try:
        import numba.np.ufunc.omppool  # noqa: F401
    except ImportError:
        return
    config.THREADING_LAYER = "omp"


_prefer_openmp()


def count(traffic: int) -> int:
    """Threads for a kernel that moves `traffic` bytes: torch's number, or 1 where more would not
    pay or not be safe."""
    if _forked or traffic < PARALLEL_BYTES:
        return 1
    return int(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))


def run(kernel: Any, units: int, traffic: int, *args: Any, ends: Any = None) -> None:
    """Runs a kernel over `units` independent pieces of work.

    Args:
        kernel: `kernel(begin, end, *args)` does the pieces `begin .. end - 1`.
        traffic: bytes moved, which decides whether threads pay.
        ends: a function that gives the running sum of the work of the pieces; by default all are
            as much.
    """
    threads = min(count(traffic), units)
    if threads <= 1:
        kernel(0, units, *args)
        return
    bounds = np.array([units * t // threads for t in range(threads + 1)], np.int64)
    if ends is not None:
        work = ends()
        bounds = np.searchsorted(work, work[-1] * np.arange(threads + 1) // threads, side="right")
        bounds[-1] = units
    numba.set_num_threads(threads)
    with _entry():
        shares.run(kernel, bounds, args)


def _layer() -> str:
    layer: Any = numba.threading_layer  # type: ignore[attr-defined]
    return str(layer())


def _entry() -> AbstractContextManager[Any]:
    """A lock where the threading layer cannot be entered by two Python threads at once."""
    global _guard
    if _guard is None:
        with _first_entry:
            _start_layer(2)
            _guard = threading.Lock() if _layer() == "workqueue" else nullcontext()
    return _guard


@numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator]
def _start_layer(pieces: int) -> int:
    total = 0
    for i in numba.prange(pieces):
        total += i
    return total
