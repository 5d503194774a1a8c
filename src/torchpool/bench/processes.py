"""What needs a process of its own: first calls with cached kernels, and memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchpool import functional, interruption
from torchpool.bench.contest import OURS, Outcome, Result
from torchpool.bench.shapes import LAYOUTS
from torchpool.reductions import LogMeanExp, Lp, Max, Mean, PowerMean, Reduction, SoftmaxMean, Var
from torchpool.windows import Window

START = """
import json, sys, time
import torch
torch.set_num_threads({threads})
import torchpool as tp
x = torch.randn(8, 64, 56, 56, requires_grad={grad})
torch.nn.functional.relu(x).sum()
begin = time.perf_counter()
import torchpool.kernels.cpu, numba
imported = time.perf_counter()
y = tp.pool(x, {reduction}, tp.Window(3, 2, 1))
if {grad}:
    y.sum().backward()
print(json.dumps([imported - begin, time.perf_counter() - imported]))
"""
FIRST_CALLS = ("tp.Max()", "tp.Mean()", "tp.SoftmaxMean()", "tp.Lp(3.0)")


def first_calls(threads: int, quick: bool = False) -> list[Result]:
    """Seconds of the first call of a process, its kernels being cached by a process before."""
    results = []
    for reduction in FIRST_CALLS[: 1 if quick else None]:
        for grad in (False, True)[: 1 if quick else None]:
            code = START.format(threads=threads, reduction=reduction, grad=grad)
            imports, calls = zip(*(_json_of(code) for _ in range(2 if quick else 4)), strict=True)
            about = {"reduction": reduction, "grad": grad, "import_s": min(imports[1:])}
            results.append(Result("start", reduction, about, {OURS: _outcome(calls[1:])}))
    return results


def _outcome(samples: tuple[float, ...]) -> Outcome:
    low, *_, high = sorted(samples) if len(samples) > 1 else (samples[0], samples[0])
    median = sorted(samples)[len(samples) // 2]
    return Outcome("ok", "", median, low, high, len(samples))


def _json_of(code: str) -> Any:
    interruption.heed()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a process of the benchmark failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


# Memory

REDUCTIONS: tuple[Reduction, ...] = (
    Max(),
    Mean(),
    Lp(3.0),
    PowerMean(3.0),
    LogMeanExp(1.0),
    SoftmaxMean(1.0),
    Var(),
)
WINDOW = Window(3, 2, 1)


def memory(threads: int, quick: bool = False) -> list[Result]:
    """Bytes beyond input, output and what is saved, at the peak of a call; and the bytes saved."""
    if not Path("/proc/self/clear_refs").exists():
        return []
    call = f"print(json.dumps(memory_here({threads}, {quick})))"
    rows = _json_of(f"import json; from torchpool.bench.processes import memory_here; {call}")
    return [Result("memory", row["reduction"], row) for row in rows]


def memory_here(threads: int, quick: bool) -> list[dict[str, Any]]:
    """The rows of `memory`, measured in this process."""
    torch.set_num_threads(threads)
    shape = (4 if quick else 16, 64, 112, 112)
    rows = []
    for reduction in REDUCTIONS:
        for layout in LAYOUTS:
            x = torch.randn(shape)
            if layout == "channels_last":
                x = x.contiguous(memory_format=torch.channels_last)
            name = type(reduction).__name__
            rows.append({"reduction": name, "layout": layout, **_measured(x, reduction)})
    return rows


def _measured(x: Tensor, reduction: Reduction) -> dict[str, Any]:
    leaf = x.requires_grad_()

    def forward() -> Tensor:
        y: Tensor = functional.pool(leaf, reduction, WINDOW)
        return y

    y = forward()
    upstream = torch.ones_like(y)
    torch.autograd.grad(y, leaf, upstream)  # kernels are loaded now
    row = y.shape[-1] * x.element_size() * (y.shape[1] if _is_last(y) else 1)
    out = y.nbytes
    del y
    saved = _saved(forward, x)
    ahead = _peak(forward) - out - saved
    y = forward()
    behind = _peak(lambda: torch.autograd.grad(y, leaf, upstream)) - x.nbytes
    return {
        "input_bytes": x.nbytes,
        "output_bytes": out,
        "output_row_bytes": row,
        "saved_bytes": saved,
        "forward_extra_bytes": max(0, ahead),
        "backward_extra_bytes": max(0, behind),
    }


def _is_last(y: Tensor) -> bool:
    return not y.is_contiguous()


def _saved(forward: Callable[[], Tensor], x: Tensor) -> int:
    """Bytes of the storages that a call keeps, the input's aside: that is there anyway."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = forward()
    kept.pop(x.untyped_storage().data_ptr(), None)
    kept.pop(y.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def _peak(call: Callable[[], Any]) -> int:
    """Bytes by which the process's resident memory grows at the most during a call (Linux)."""
    _give_back()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident
    kept = call()
    peak = _resident("VmHWM")
    del kept
    return peak - before


def _give_back() -> None:
    import ctypes

    gc.collect()
    time.sleep(0.01)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
