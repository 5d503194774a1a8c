"""Checks and times the GPU kernels in one call, beside torch, torch.compile and a copy.

A figure is written only for a case whose result was checked in the same run. Times are medians over
calls whose inputs are rotated past the L2 cache; the launches of a series are queued first, so that
they measure the GPU and not Python. What does not fit into the time given is listed, not run.

    python benchmarks/gpu.py                      everything, at most nine minutes
    python benchmarks/gpu.py --only stem k31      cases whose name holds one of the words
    python benchmarks/gpu.py --compile-only       no GPU: registers, spills and widths of loads
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torchpool as tp

RESULTS = Path(__file__).parent / "results"
LAYOUTS = ("contiguous", "channels_last")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PAST_L2 = 256 << 20
"""Bytes that inputs are rotated over: several times the L2 cache of an H200."""
ROUNDS = 60


def placed(shape: tuple[int, ...], dtype: torch.dtype, form: str, device: str) -> Tensor:
    """Random numbers in one of the layouts."""
    x = torch.randn(shape, device=device).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if form == "channels_last" else x


# Cases


@dataclass(frozen=True)
class Case:
    """One pooling and its equals in torch."""

    name: str
    shape: tuple[int, ...]
    ours: Callable[[Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    layouts: tuple[str, ...] = LAYOUTS
    train: bool = False
    compiled: bool = False
    """Whether torch.compile of the eager composition is timed, too."""


def _window(name: str, shape: tuple[int, ...], k: Any, s: Any, p: Any = 0, **more: Any) -> Any:
    """Maximum and mean of one window, forward; the maximum forward and backward."""
    d = len(shape) - 2
    pools = {"max": f"max_pool{d}d", "mean": f"avg_pool{d}d"}
    for kind, pool in pools.items():
        ours, eager = getattr(tp, pool), getattr(F, pool)
        yield Case(
            f"{name} {kind}", shape, lambda x, f=ours: f(x, k, s, p),
            lambda x, f=eager: f(x, k, s, p), **more,
        )  # fmt: skip
        yield Case(
            f"{name} {kind} training", shape, lambda x, f=ours: f(x, k, s, p),
            lambda x, f=eager: f(x, k, s, p), train=True, **{**more, "dtypes": ("fp32", "fp16")},
        )  # fmt: skip


def _softmax_mean(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax((2, 3), keepdim=True))
    return F.avg_pool2d(e * x, 3, 2, 1) / F.avg_pool2d(e, 3, 2, 1)


def _log_mean_exp(x: Tensor) -> Tensor:
    top = x.amax((2, 3), keepdim=True)
    mean = F.avg_pool2d(torch.exp(x - top), 3, 2, 1, count_include_pad=False)
    return top + torch.log(mean)


def _power_mean(x: Tensor) -> Tensor:
    cubes = x.clamp(min=1e-6).pow(3.0)
    return F.avg_pool2d(cubes, 3, 2, 1, count_include_pad=False).pow(1 / 3.0)


def _lp(x: Tensor) -> Tensor:
    cubes = x.abs().pow(3.0)
    return F.avg_pool2d(cubes, 3, 2, 1, divisor_override=1).pow(1 / 3.0)


def _var(x: Tensor) -> Tensor:
    mean = F.avg_pool2d(x, 2)
    wide = mean.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return F.avg_pool2d((x - wide) ** 2, 2)


def _formulas() -> Iterator[Case]:
    """The reductions that torch does not have, against compositions that can be compiled."""
    window, shape = tp.Window(3, 2, 1), (32, 64, 112, 112)
    rows: list[tuple[str, tp.Reduction, tp.Windows, Callable[[Tensor], Tensor]]] = [
        ("SoftmaxMean", tp.SoftmaxMean(1.0), window, _softmax_mean),
        ("LogMeanExp", tp.LogMeanExp(1.0), window, _log_mean_exp),
        ("PowerMean", tp.PowerMean(3.0), window, _power_mean),
        ("Lp", tp.Lp(3.0), window, _lp),
        ("Var", tp.Var(), tp.Window(2), _var),
        ("Std", tp.Std(), tp.Window(2), lambda x: _var(x).sqrt()),
    ]
    for name, reduction, windows, eager in rows:
        for train in (False, True):
            yield Case(
                f"formula {name}{' training' if train else ''}", shape,
                lambda x, r=reduction, w=windows: tp.pool(x, r, w), eager, ("fp32",),
                ("contiguous",), train, True,
            )  # fmt: skip


def cases() -> Iterator[Case]:
    """What is timed, the most telling first."""
    core: dict[str, Any] = {
        "compiled": True,
        "layouts": ("contiguous",),
        "dtypes": ("fp32", "fp16"),
    }
    yield from _window("stem", (32, 64, 112, 112), 3, 2, 1, **core)
    yield from _window("vgg", (8, 64, 224, 224), 2, 2, **core)
    yield from _window("3-D", (8, 64, 16, 56, 56), 2, 2, **core)
    for size in (7, 5):
        yield Case(
            f"adaptive {size} max training", (64, 256, 38, 38),
            lambda x, s=size: tp.adaptive_max_pool2d(x, s),
            lambda x, s=size: F.adaptive_max_pool2d(x, s), ("fp32",), train=True, compiled=True,
        )  # fmt: skip
        yield Case(
            f"adaptive {size} mean training", (64, 256, 38, 38),
            lambda x, s=size: tp.adaptive_avg_pool2d(x, s),
            lambda x, s=size: F.adaptive_avg_pool2d(x, s), ("fp32",), train=True, compiled=True,
        )  # fmt: skip
    for k in (3, 31, 127):
        size = (1, 64, 1024, 1024) if k == 127 else (4, 64, 512, 512)
        yield from _window(f"k{k}", size, k, 1, k // 2, dtypes=("fp32",), layouts=("contiguous",))
    yield from _formulas()
    yield from _window("stem, layouts", (32, 64, 112, 112), 3, 2, 1)
    yield from _window("inception 3x3/1", (64, 192, 35, 35), 3, 1, 1)
    yield from _window("vgg, layouts", (8, 64, 224, 224), 2, 2)
    yield from _window("googlenet 3x3/2", (64, 192, 56, 56), 3, 2, 1)
    yield from _window("spp 5x5/1", (256, 256, 20, 20), 5, 1, 2)
    yield from _window("spp 13x13/1", (256, 256, 13, 13), 13, 1, 6)
    yield from _window("detector 3x3/2", (4, 64, 400, 672), 3, 2, 1)
    yield from _window("audio k3", (64, 256, 4000), 3, 3)
    yield from _window("global 7x7", (512, 2048, 7, 7), 7, 1)
    yield from _window("3-D 3x3x3/2", (8, 64, 16, 56, 56), 3, 2, 1, dtypes=("fp32",))


# Checking and timing


def step(pool: Callable[[Tensor], Tensor], x: Tensor, train: bool) -> Tensor:
    """The values, or after a training step the gradient."""
    if not train:
        return pool(x)
    leaf = x.detach().requires_grad_()
    y = pool(leaf)
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return grad


def microseconds(call: Callable[[Tensor], Any], inputs: list[Tensor]) -> float:
    """Median time of a call on the GPU."""
    for x in inputs[:3]:
        call(x)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * ROUNDS)]
    torch.cuda._sleep(20_000_000)  # the GPU waits while the launches are queued
    for i in range(ROUNDS):
        marks[2 * i].record()
        call(inputs[i % len(inputs)])
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(
        1e3 * marks[2 * i].elapsed_time(marks[2 * i + 1]) for i in range(ROUNDS)
    )


def peak_bytes(call: Callable[[Tensor], Any], x: Tensor) -> int:
    """Most memory that a call holds beyond what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, dtype: str, form: str) -> dict[str, Any]:
    """One row; without times where the results differ."""
    x = placed(case.shape, DTYPES[dtype], form, "cuda")
    row: dict[str, Any] = {"case": case.name, "dtype": dtype, "layout": form, "shape": case.shape}
    known = step(case.eager, x.double() if x.numel() < 1 << 26 else x, case.train)
    ours = step(case.ours, x, case.train)
    row["difference"] = float((ours.double() - known.double()).abs().max())
    scale = 1.0 + float(known.abs().max())
    row["correct"] = row["difference"] <= scale * TOLERANCE[x.dtype]
    if not row["correct"]:
        return row
    copies = max(2, -(-PAST_L2 // x.nbytes))
    inputs = [x, *(x.clone(memory_format=torch.preserve_format) for _ in range(copies - 1))]
    with torch.no_grad():
        y = case.ours(x)
    row["bytes"] = (x.nbytes + y.nbytes) * (2 if case.train else 1)
    into = torch.empty(row["bytes"] // 2, dtype=torch.uint8, device="cuda")
    sources = [torch.empty_like(into) for _ in range(max(2, PAST_L2 // into.nbytes))]
    row["copy_us"] = microseconds(into.copy_, sources)
    calls = {"ours": case.ours, "eager": case.eager}
    if case.compiled:
        torch._dynamo.reset()
        calls["compiled"] = torch.compile(case.eager, dynamic=False)
    for name, pool in calls.items():
        row[f"{name}_us"] = microseconds(lambda x, p=pool: step(p, x, case.train), inputs)
        row[f"{name}_peak_bytes"] = peak_bytes(lambda x, p=pool: step(p, x, case.train), x)
    row["of_copy"] = row["copy_us"] / row["ours_us"]
    row["faster_than_eager"] = row["eager_us"] / row["ours_us"]
    if case.compiled:
        row["faster_than_compiled"] = row["compiled_us"] / row["ours_us"]
    return row


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    name = f"{row['case']:32} {row['dtype']} {row['layout']:13}"
    if not row["correct"]:
        return f"{name} WRONG by {row['difference']:.3g}"
    times = f"{row['ours_us']:9.1f} us {row['of_copy']:5.0%} of copy"
    compiled = f" {row['faster_than_compiled']:6.2f}x compiled" if "compiled_us" in row else ""
    return f"{name} {times} {row['faster_than_eager']:6.2f}x eager{compiled}"


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
                first = step(pool, x, True)
                if not all(torch.equal(step(pool, x, True), first) for _ in range(20)):
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
    gradient = torch.equal(step(pools[0], x, True)[-32:], step(pools[0], tail, True))
    return {"correct": values and gradient, "elements": x.numel()}


def graphs() -> dict[str, Any]:
    """A training step under torch.compile with CUDA graphs, and on another stream."""
    x = torch.randn(4, 8, 32, 32, device="cuda")

    def pool(t: Tensor) -> Tensor:
        return tp.pool(tp.max_pool2d(t, 3, 2, 1), tp.SoftmaxMean(1.0), tp.Window(2)) * 2

    want = step(pool, x, True)
    fast = torch.compile(pool, mode="reduce-overhead", fullgraph=True)
    captured = all(torch.allclose(step(fast, x, True), want, atol=1e-6) for _ in range(4))
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        streamed = step(pool, x, True)
    other.synchronize()
    return {"correct": captured and torch.equal(streamed, want)}


def overhead() -> dict[str, Any]:
    """Seconds of Python per call for a tiny input, in microseconds."""
    x = torch.randn(1, 16, 28, 28, device="cuda")
    found: dict[str, Any] = {"correct": True}
    for name, pool in {
        "torch": lambda t: F.max_pool2d(t, 2),
        "ours": lambda t: tp.max_pool2d(t, 2),
    }.items():
        for train in (False, True):
            for _ in range(20):
                step(pool, x, train)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(300):
                step(pool, x, train)
            torch.cuda.synchronize()
            taken = 1e6 * (time.perf_counter() - begin) / 300
            found[f"{name}_{'training' if train else 'forward'}_us"] = round(taken, 1)
    return found


CHECKS = {
    "deterministic": deterministic,
    "more than 2^31 elements": beyond_two_gigabytes,
    "CUDA graphs and streams": graphs,
    "launch overhead": overhead,
}


# What the compiler makes of the kernels


@dataclass
class Kernel:
    """One kernel as compiled for compute capability 9.0."""

    windows: str
    dtype: str
    layout: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load_bytes: int
    instructions: int
    accesses: dict[str, int] = field(default_factory=dict)


class Compiler:
    """Stands where kernels are launched, and compiles them instead."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.label = ("", "", "")

    def launch(self, kernel: Any, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = kernel.arg_names
        signature: dict[str, Any] = {}
        fixed: dict[tuple[int, ...], Any] = {}
        hints: dict[tuple[int, ...], Any] = {}
        for i, (name, value) in enumerate(zip(names, args, strict=False)):
            signature[name] = self._describe((i,), value, fixed, hints)
        for name, value in constants.items():
            signature[name] = "constexpr"
            fixed[(names.index(name),)] = value
        source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=hints)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        module = kernel.fn.__module__.rsplit(".", 1)[-1]
        ptx = made.asm["ptx"]
        found = re.findall(r"(?:ld|st)\.global[\w.:]*", ptx)
        counts = {access: found.count(access) for access in sorted(set(found))}
        registers, spilled, instructions = assembled(ptx)
        name = f"{module}.{kernel.fn.__name__}"
        widest = max(map(width, counts))
        numbers = (registers, spilled, made.metadata.shared, widest, instructions)
        self.kernels.append(Kernel(*self.label, name, *numbers, counts))

    def _describe(self, path: Any, value: Any, fixed: Any, hints: Any) -> Any:
        """How Triton specialises an argument when it is launched."""
        if isinstance(value, tuple):
            return tuple(self._describe((*path, i), v, fixed, hints) for i, v in enumerate(value))
        if isinstance(value, Tensor):
            hints[path] = [["tt.divisibility", 16]]
            bits = str(value.dtype).removeprefix("torch.").replace("uint", "u")
            return "*" + bits.replace("bfloat", "bf").replace("float", "fp").replace("int", "i")
        if value == 1:
            fixed[path] = 1
            return "constexpr"
        if value % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return "i32" if value < 1 << 31 else "i64"


def width(access: str) -> int:
    """Bytes of a load such as ld.global.v4.b32; 0 for a store."""
    if not access.startswith("ld"):
        return 0
    lanes = re.search(r"\.v(\d)", access)
    bits = re.search(r"\.[a-z]+(\d+)$", access)
    return (int(lanes[1]) if lanes else 1) * (int(bits[1]) if bits else 0) // 8


def assembled(ptx: str) -> tuple[int, int, int]:
    """Registers of a thread, spilled bytes and instructions, from the assembler that Triton has."""
    from triton.backends.nvidia import compiler as nvidia

    find = getattr(nvidia, "get_ptxas", None)
    assembler = find(90) if find else nvidia._path_to_binary("ptxas")
    path = str(getattr(assembler, "path", assembler[0] if isinstance(assembler, tuple) else ""))
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(binary)]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
        text = log.stdout + log.stderr
        used = re.search(r"Used (\d+) registers", text)
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        shown = Path(path).with_name("nvdisasm")
        command = [str(shown), "-c", str(binary)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*[0-9a-f]{4,5}\*/ +(?!NOP)\S", sass)
    return int(used[1]) if used else -1, spilled, len(lines)


FREQUENT: dict[str, tuple[tuple[int, ...], tp.Windows]] = {
    "2x2/2": ((8, 64, 112, 112), tp.Window(2)),
    "3x3/2 p1": ((32, 64, 112, 112), tp.Window(3, 2, 1)),
    "3x3/1 p1": ((8, 192, 56, 56), tp.Window(3, 1, 1)),
    "global 8x8": ((64, 512, 8, 8), tp.Global()),
}


FORMULAS: tuple[tp.Accumulation, ...] = (
    tp.Sum(),
    tp.Mean(),
    tp.SoftmaxMean(),
    tp.LogMeanExp(),
    tp.PowerMean(),
    tp.Lp(),
    tp.Var(),
    tp.Std(),
)


def compile_only(frequent: bool) -> list[Kernel]:
    """Compiles the maxima (with state) of the frequent windows, and every reduction's formulas both
    ways; unless only the `frequent` are asked for, also maxima without state and backward, means,
    gradients by parameters, large windows and scans."""
    from torchpool.kernels import gpu, layout
    from torchpool.kernels.gpu import launching

    compiler = Compiler()
    launching.launch = compiler.launch

    def accumulate(x: Tensor, reduction: tp.Accumulation, windows: tp.Windows, by_p: bool) -> None:
        p = None if reduction.parameter is None else x.new_empty(1, dtype=torch.float32)
        axes = windows.axes(x.shape[2:])
        y, saved = gpu.accumulate(x, None, None, p, reduction, axes, True)
        kept = x[:0] if reduction.linear else x
        needs = [True, False, by_p and reduction.domain != -math.inf]
        last = layout.is_channels_last(x)
        gpu.accumulate_backward(y, kept, None, None, p, saved, reduction, axes, needs, last)

    def select(x: Tensor, windows: tp.Windows, save: bool, back: bool) -> None:
        axes = windows.axes(x.shape[2:])
        y, state = gpu.select(x, None, None, tp.Max(), axes, save)
        if back:
            gpu.select_backward(y, state, None, axes, layout.is_channels_last(x))

    for name, (shape, windows) in FREQUENT.items():
        for dtype in ("fp32", "fp16"):
            for form in LAYOUTS:
                compiler.label = (name, dtype, form)
                x = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
                if form == "channels_last":
                    x = x.to(memory_format=torch.channels_last)
                select(x, windows, True, not frequent)
                if not frequent:
                    select(x, windows, False, False)
                    accumulate(x, tp.Mean(), windows, False)
    x = torch.empty(FREQUENT["3x3/2 p1"][0], device="meta")
    for reduction in FORMULAS:
        compiler.label = (type(reduction).__name__, "fp32", "contiguous")
        accumulate(x, reduction, tp.Window(3, 2, 1), not frequent)
    if not frequent:
        for name, large in {"31x31/1": tp.Window(31, 1, 15), "5x7/1": tp.Window((5, 7))}.items():
            compiler.label = (name, "fp32", "contiguous")
            select(x, large, True, True)
            accumulate(x, tp.Mean(), large, False)
            accumulate(x, tp.SoftmaxMean(), large, False)
    return compiler.kernels


def show_kernels(kernels: list[Kernel]) -> None:
    """The table, on the terminal."""
    print(f"{'windows':12}{'dtype':6}{'layout':14}{'kernel':30} regs spill shared load  SASS")
    for k in kernels:
        print(
            f"{k.windows:12}{k.dtype:6}{k.layout:14}{k.kernel:30}{k.registers:5}"
            f"{k.spilled_bytes:6}{k.shared_bytes:7}{k.widest_load_bytes:5}{k.instructions:6}"
        )


# The whole run


def versions() -> dict[str, Any]:
    """What the figures belong to."""
    import triton

    made = {"torch": torch.__version__, "triton": triton.__version__, "torchpool": tp.__version__}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        made["gpu"] = torch.cuda.get_device_name()
        made["driver"] = subprocess.run(
            query, capture_output=True, text=True, check=False
        ).stdout.strip()
        made["cuda"] = str(torch.version.cuda)
    return {"versions": made, "date": time.strftime("%Y-%m-%d")}


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median share of the copy's speed, geometric means of the ratios to peers."""
    good = [row for row in rows if row["correct"]]
    made: dict[str, float] = {}
    for train in (False, True):
        some = [row for row in good if ("training" in row["case"]) is train]
        kind = "training" if train else "forward"
        if some:
            made[f"{kind}: of the copy, median"] = statistics.median(r["of_copy"] for r in some)
        for peer in ("eager", "compiled"):
            ratios = [r[f"faster_than_{peer}"] for r in some if f"faster_than_{peer}" in r]
            if ratios:
                mean = math.exp(statistics.fmean(map(math.log, ratios)))
                made[f"{kind}: times {peer}, geometric mean"] = mean
    return made


def run(words: list[str], minutes: float) -> dict[str, Any]:
    """Checks and times everything that fits into the time."""
    end = time.monotonic() + 60 * minutes
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    checks: dict[str, Any] = {}
    for name, check in () if words else CHECKS.items():
        try:
            checks[name] = check()
        except Exception as error:  # one broken check must not cost the other figures
            checks[name] = {"correct": False, "error": repr(error)[:500]}
        print(f"{name:32} {checks[name]}", flush=True)
    for case in cases():
        for dtype in case.dtypes:
            for form in case.layouts:
                label = f"{case.name} {dtype} {form}"
                if words and not any(word in label for word in words):
                    continue
                if form == "channels_last" and len(case.shape) == 3:
                    continue
                if time.monotonic() > end:
                    left.append(label)
                    continue
                try:
                    rows.append(measure(case, dtype, form))
                    print(line(rows[-1]), flush=True)
                except Exception as error:
                    row = {"case": case.name, "dtype": dtype, "layout": form, "correct": False}
                    rows.append({**row, "difference": math.nan, "error": repr(error)[:500]})
                    print(f"{label}: {error!r}"[:300], flush=True)
                torch.cuda.empty_cache()
    return {**versions(), "checks": checks, "summary": summary(rows), "rows": rows, "not_run": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name holds")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop beginning cases after")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--compile-only", action="store_true", help="needs no GPU")
    parser.add_argument("--frequent", action="store_true", help="with --compile-only: few kernels")
    chosen = parser.parse_args()
    if chosen.compile_only:
        kernels = compile_only(chosen.frequent)
        show_kernels(kernels)
        found = {**versions(), "kernels": [asdict(kernel) for kernel in kernels]}
        name = "gpu-kernels.json"
    elif not torch.cuda.is_available():
        sys.exit("No GPU that torch can use: nothing was run. --compile-only needs none.")
    else:
        found = run(chosen.only, chosen.minutes)
        name = f"gpu-{found['versions']['gpu'].replace(' ', '-')}.json"
        for what, value in found["summary"].items():
            print(f"{what:50} {value:.2f}")
    into = chosen.output or RESULTS / name
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
