"""What the benchmarks of this folder share: medians of calls that run in turns, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchpool as tp

ROUNDS = 9
SLOWEST = 1.5
"""Seconds that one call may take in all its rounds."""


def seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Median seconds of each call, run in turns; slow ones are run less often."""
    times: list[list[float]] = [[] for _ in calls]
    repeats = []
    for call in calls:
        call()
        begin = time.perf_counter()
        call()
        repeats.append(max(1, int(2e-3 / (time.perf_counter() - begin + 1e-9))))
    for _ in range(ROUNDS):
        for kept, call, repeat in zip(times, calls, repeats, strict=True):
            if sum(kept) * repeat > SLOWEST:
                continue
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            kept.append((time.perf_counter() - begin) / repeat)
    return [statistics.median(kept) for kept in times]


def trained(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Forward and backward; returns the gradient."""

    def run(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        return grad

    return run


def arguments(given: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words that a row's name must contain, and the file of `--json FILE`."""
    words = list(given)
    if "--json" not in words:
        return words, None
    at = words.index("--json")
    if at + 1 == len(words):
        raise SystemExit("--json names no file; write --json FILE")
    file = Path(words[at + 1])
    del words[at : at + 2]
    return words, file


def machine() -> dict[str, Any]:
    """Versions, threads and processor, for the JSON."""
    return {
        "torch": torch.__version__,
        "torchpool": tp.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
