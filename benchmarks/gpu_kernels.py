"""What the compiler makes of the GPU kernels for compute capability 9.0: registers, spills, widths
of loads, instructions. Needs no GPU.

    python benchmarks/gpu_kernels.py              a table, and results/gpu-kernels.json
    python benchmarks/gpu_kernels.py --frequent   few kernels
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_cases import DTYPES
from torch import Tensor

import torchpool as tp
from torchpool.bench.shapes import LAYOUTS

RESULTS = Path(__file__).parent / "results"


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


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu-kernels.json")
    parser.add_argument("--frequent", action="store_true", help="few kernels")
    options = parser.parse_args()
    kernels = compile_only(options.frequent)
    show_kernels(kernels)
    made = {"torch": torch.__version__, "triton": triton.__version__, "torchpool": tp.__version__}
    found = {"versions": made, "date": time.strftime("%Y-%m-%d")}
    found["kernels"] = [asdict(kernel) for kernel in kernels]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
