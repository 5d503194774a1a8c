"""Checks and times the GPU kernels in one call, beside torch, torch.compile and a copy.

A figure is written only for a case whose result was checked in the same run. Several processes
compile side by side, then one case at a time has the GPU. Times are medians over calls whose inputs
are rotated past the L2 cache; the launches of a series are queued first, so that they measure the
GPU and not Python. What does not fit into the time given is listed, not run.

    python benchmarks/gpu.py                      everything, at most nine minutes
    python benchmarks/gpu.py --only stem k31      cases whose label holds one of the words
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
import queue
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Case, cases, distinct
from torch import Tensor

import torchpool as tp

RESULTS = Path(__file__).parent / "results"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PAST_L2 = 256 << 20
"""Bytes that inputs are rotated over: several times the L2 cache of an H200."""
ROUNDS = 40
PATIENCE = 300
"""Seconds that processes wait for each other while they compile."""
SERIES = 0.06
"""Seconds that a series of calls may take on the GPU."""


# Checking and timing


def step(pool: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor | None = None) -> Tensor:
    """The values, or the gradient by x."""
    if grad is None:
        return pool(x)
    leaf = x.detach().requires_grad_()
    (sent,) = torch.autograd.grad(pool(leaf), leaf, grad)
    return sent


def microseconds(call: Callable[[Tensor], Any], inputs: list[Tensor]) -> float:
    """Median time of a call on the GPU."""
    for x in inputs[:2]:
        call(x)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call(inputs[-1])
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    taken = time.perf_counter() - begin
    rounds = max(5, min(ROUNDS, int(SERIES / taken)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * rounds)]
    wait = 2e-3 + 1.5 * rounds * min(queued, 2e-3)
    torch.cuda._sleep(int(wait * 2e9))  # the GPU waits while the launches are queued
    for i in range(rounds):
        marks[2 * i].record()
        call(inputs[i % len(inputs)])
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(
        1e3 * marks[2 * i].elapsed_time(marks[2 * i + 1]) for i in range(rounds)
    )


def peak_bytes(call: Callable[[Tensor], Any], x: Tensor) -> int:
    """Most memory that a call holds beyond what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def prepare(case: Case) -> Callable[[Tensor], Tensor] | None:
    """Compiles what a case needs; returns its eager form under torch.compile, where it is asked
    for."""
    x = case.placed("cuda")
    grad = torch.randn_like(case.ours(x)) if case.train else None
    step(case.ours, x, grad)
    if not case.compiled:
        return None
    compiled = torch.compile(distinct(case.eager), dynamic=False)
    step(compiled, x, grad)
    return compiled


def measure(case: Case, compiled: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
    """One row; without times where the results differ."""
    x = case.placed("cuda")
    row: dict[str, Any] = {
        "case": case.name,
        "group": case.group,
        "training": case.train,
        "dtype": case.dtype,
        "layout": case.layout,
        "shape": case.shape,
    }
    with torch.no_grad():
        y = case.ours(x)
    grad = torch.randn_like(y) if case.train else None
    wide = [None if t is None else t.double().contiguous() for t in (x, grad)]
    known = step(case.eager, *wide)
    limit = (1.0 + float(known.abs().max())) * TOLERANCE[x.dtype]
    row["bytes"] = (x.nbytes + y.nbytes) * (2 if case.train else 1)
    del wide, y
    calls = {"ours": case.ours, "eager": case.eager}
    if compiled is not None:
        calls["compiled"] = compiled
    for name, pool in calls.items():
        difference = float((step(pool, x, grad).double() - known).abs_().max())
        row[f"{name}_difference"], row[f"{name}_correct"] = difference, difference <= limit
    row["correct"] = row["ours_correct"]
    del known
    if not row["correct"]:
        return row
    copies = max(2, -(-PAST_L2 // x.nbytes))
    inputs = [x, *(x.clone(memory_format=torch.preserve_format) for _ in range(copies - 1))]
    into = torch.empty(row["bytes"] // 2, dtype=torch.uint8, device="cuda")
    sources = [torch.empty_like(into) for _ in range(max(2, PAST_L2 // into.nbytes))]
    row["copy_us"] = microseconds(into.copy_, sources)
    del into, sources
    for name, pool in calls.items():
        call = partial(step, pool, grad=grad)
        row[f"{name}_us"] = microseconds(call, inputs)
        row[f"{name}_peak_bytes"] = peak_bytes(call, x)
    row["of_copy"] = row["copy_us"] / row["ours_us"]
    for peer in ("eager", "compiled"):
        if f"{peer}_us" in row:
            row[f"faster_than_{peer}"] = row[f"{peer}_us"] / row["ours_us"]
    return row


def line(label: str, row: dict[str, Any]) -> str:
    """A row for people."""
    if "error" in row:
        return f"{label:60} {row['error'][:200]}"
    if not row["correct"]:
        return f"{label:60} WRONG by {row['ours_difference']:.3g}"
    times = f"{row['ours_us']:9.1f} us {row['of_copy']:5.0%} of copy"
    compiled = f" {row['faster_than_compiled']:6.2f}x compiled" if "compiled_us" in row else ""
    wrong = "" if row["eager_correct"] else f" (which is wrong by {row['eager_difference']:.2g})"
    return f"{label:60} {times} {row['faster_than_eager']:7.2f}x eager{wrong}{compiled}"


# Checks that are not timed


def deterministic() -> dict[str, Any]:
    """Twenty runs of 3-D and adaptive gradients, with deterministic algorithms demanded."""
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for pool, shape in (
                (lambda x: tp.max_pool3d(x, 3, 2, 1), (2, 16, 8, 28, 28)),
                (lambda x: tp.avg_pool3d(x, 3, 2, 1), (2, 16, 8, 28, 28)),
                (lambda x: tp.adaptive_avg_pool2d(x, 5), (2, 16, 33, 31)),
                (lambda x: tp.adaptive_max_pool2d(x, 5), (2, 16, 33, 31)),
            ):
                x = torch.randn(shape, device="cuda")
                grad = torch.randn_like(pool(x))
                first = step(pool, x, grad)
                if not all(torch.equal(step(pool, x, grad), first) for _ in range(20)):
                    return {"correct": False}
    finally:
        torch.use_deterministic_algorithms(False)
    return {"correct": True}


def beyond_two_gigabytes() -> dict[str, Any]:
    """More than 2^31 elements: the last planes against the same planes alone."""
    x = torch.zeros(2**31 // (64 * 64) + 40, 1, 64, 64, dtype=torch.float16, device="cuda")
    x[-32:] = torch.randn(32, 1, 64, 64, device="cuda").half()
    tail = x[-32:].clone()
    pools = (lambda t: tp.max_pool2d(t, 3, 2, 1), lambda t: tp.avg_pool2d(t, 2))
    values = all(torch.equal(pool(x)[-32:], pool(tail)) for pool in pools)
    sent = [step(pools[0], t, torch.ones_like(pools[0](t)))[-32:] for t in (x, tail)]
    return {"correct": values and torch.equal(sent[0], sent[1]), "elements": x.numel()}


def graphs() -> dict[str, Any]:
    """A training step under torch.compile with CUDA graphs, and on another stream."""
    x = torch.randn(4, 8, 32, 32, device="cuda")

    def pool(t: Tensor) -> Tensor:
        return tp.pool(tp.max_pool2d(t, 3, 2, 1), tp.SoftmaxMean(1.0), tp.Window(2)) * 2

    grad = torch.ones_like(pool(x))
    want = step(pool, x, grad)
    fast = torch.compile(pool, mode="reduce-overhead", fullgraph=True)
    captured = all(torch.allclose(step(fast, x, grad), want, atol=1e-6) for _ in range(4))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        streamed = step(pool, x, grad)
    other.synchronize()
    return {"correct": captured and torch.equal(streamed, want)}


def overhead() -> dict[str, Any]:
    """Time of a call for a tiny input, most of it Python's, in microseconds: medians of series in
    turns."""
    x = torch.randn(1, 16, 28, 28, device="cuda")
    pools = {"torch": lambda t: F.max_pool2d(t, 2), "ours": lambda t: tp.max_pool2d(t, 2)}
    grads = {"forward": None, "training": torch.ones_like(F.max_pool2d(x, 2))}
    series: dict[str, list[float]] = {}
    for turn in range(8):
        for name, pool in pools.items():
            for kind, grad in grads.items():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(100):
                    step(pool, x, grad)
                torch.cuda.synchronize()
                if turn:
                    taken = 1e4 * (time.perf_counter() - begin)
                    series.setdefault(f"{name}_{kind}_us", []).append(taken)
    return {"correct": True, **{k: round(statistics.median(v), 1) for k, v in series.items()}}


CHECKS = {
    "deterministic": deterministic,
    "more than 2^31 elements": beyond_two_gigabytes,
    "CUDA graphs and streams": graphs,
    "launch overhead": overhead,
}


def checked() -> dict[str, Any]:
    """The result of every check; one that breaks must not cost the other figures."""
    found: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check()
        except Exception as error:
            found[name] = {"correct": False, "error": repr(error)[:500]}
        print(f"{name:32} {found[name]}", flush=True)
        torch.cuda.empty_cache()
    return found


# The whole run


def chosen(words: list[str], compiled: bool) -> list[Case]:
    """The cases whose label holds one of the words; all where there are none."""
    return [
        replace(case, compiled=case.compiled and compiled)
        for case in cases()
        if not words or any(word in case.label for word in words)
    ]


def work(
    number: int, workers: int, words: list[str], compiled: bool, end: float,
    start: Any, rows: Any, alone: Any,
) -> None:  # fmt: skip
    """One process: compiles its share of the cases, then times them, alone on the GPU."""
    share = chosen(words, compiled)[number::workers]
    prepared: list[Any] = []
    for case in share:
        try:
            prepared.append(None if time.time() > end else prepare(case))
        except Exception as error:
            prepared.append(error)
        torch.cuda.empty_cache()
    start.wait(PATIENCE)
    for case, peer in zip(share, prepared, strict=True):
        with alone:
            if time.time() > end:
                rows.put((case.label, None))
                continue
            try:
                if isinstance(peer, Exception):
                    raise peer
                row = measure(case, peer)
            except Exception as error:
                row = {
                    "case": case.name,
                    "group": case.group,
                    "training": case.train,
                    "dtype": case.dtype,
                    "layout": case.layout,
                    "correct": False,
                    "error": repr(error)[:500],
                }
            torch.cuda.empty_cache()
            rows.put((case.label, row))


def run(words: list[str], minutes: float, workers: int, compiled: bool) -> dict[str, Any]:
    """Checks and times everything that fits into the time."""
    end = time.time() + 60 * minutes
    checks = {} if words else checked()
    context = mp.get_context("spawn")
    start, rows, alone = context.Barrier(workers + 1), context.Queue(), context.Lock()
    processes = [
        context.Process(target=work, args=(i, workers, words, compiled, end, start, rows, alone))
        for i in range(workers)
    ]
    begin = time.time()
    for process in processes:
        process.start()
    start.wait(PATIENCE)
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    found: dict[str, Any] = {}
    labels = [case.label for case in chosen(words, compiled)]
    told = 0
    while told < len(labels):
        try:
            label, row = rows.get(timeout=5.0)
        except queue.Empty:
            if any(process.is_alive() for process in processes):
                continue
            break
        told += 1
        if row is not None:
            found[label] = row
            print(line(label, row), flush=True)
    for process in processes:
        process.join()
    kept = [found[label] for label in labels if label in found]
    return {
        **versions(),
        "checks": checks,
        "summary": summary(kept),
        "rows": kept,
        "not_run": [label for label in labels if label not in found],
    }


def versions() -> dict[str, Any]:
    """What the figures belong to."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False)
    made = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "torchpool": tp.__version__,
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip(),
        "cuda": str(torch.version.cuda),
    }
    return {"versions": made, "date": time.strftime("%Y-%m-%d")}


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Per group: median share of the copy's speed, geometric means of the ratios to peers whose
    results are right, rows whose peak of memory is above torch's."""
    made: dict[str, float] = {"wrong": sum(not row["correct"] for row in rows)}
    made["torch wrong"] = sum(not row.get("eager_correct", True) for row in rows)
    good = [row for row in rows if row["correct"]]
    for group in sorted({row["group"] for row in good}):
        for train in (False, True):
            for layout in ("contiguous", "channels_last"):
                some = [
                    r
                    for r in good
                    if (r["group"], r["training"], r["layout"]) == (group, train, layout)
                ]
                if not some:
                    continue
                kind = f"{group}, {'training' if train else 'values'}, {layout}"
                made[f"{kind}: rows"] = len(some)
                made[f"{kind}: of copy, median"] = statistics.median(r["of_copy"] for r in some)
                for peer in ("eager", "compiled"):
                    ratios = [r[f"faster_than_{peer}"] for r in some if r.get(f"{peer}_correct")]
                    if ratios:
                        mean = math.exp(statistics.fmean(map(math.log, ratios)))
                        made[f"{kind}: times {peer}, geometric mean"] = mean
                        made[f"{kind}: times {peer}, least"] = min(ratios)
                more = (r["ours_peak_bytes"] > r["eager_peak_bytes"] for r in some)
                made[f"{kind}: rows with more memory than torch"] = sum(more)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's label holds")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop beginning cases after")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 3))
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--no-compiled", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("No GPU that torch can use: nothing was run. gpu_kernels.py needs none.")
    found = run(options.only, options.minutes, options.workers, not options.no_compiled)
    for what, value in found["summary"].items():
        print(f"{what:70} {value:.2f}")
    name = f"gpu-{found['versions']['gpu'].replace(' ', '-')}.json"
    into = options.output or RESULTS / name
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
