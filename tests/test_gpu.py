"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter on CPU tensors.

The interpreter must be chosen before Triton is imported, so the checks run in a process of their
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def _check(group: str) -> None:
    environment = {**os.environ, "TORCHPOOL_BACKEND": "gpu"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(HERE / "gpu_checks.py"), group]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked" in done.stdout


def test_a_gpu_is_there_where_it_is_required():
    if "gpu" in os.environ.get("TORCHPOOL_REQUIRE", "").split(","):
        assert torch.cuda.is_available()


@pytest.mark.parametrize("group", ["selection", "accumulation", "parameters", "half"])
def test_triton_kernels(group):
    _check(group)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torchpool.kernels import gpu

kernel = gpu.select_kernel
names = kernel.arg_names
fixed = {f"{k}{i}": v for k, v in dict(K=3, S=2, D=1, B=1).items() for i in range(3)}
fixed |= {"LARGEST": True, "SAVE": True, "WIDE": gpu.tl.float32, "BLOCK": 256}
for kind in ("fp32", "fp16"):
    pointers = {"x": f"*{kind}", "y": f"*{kind}", "state": "*u8"}
    signature = {n: pointers.get(n, "constexpr" if n in fixed else "i32") for n in names}
    constants = {(names.index(n),): value for n, value in fixed.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "ld.global" in made.asm["ptx"]
    print(kind, "ok")
"""


def test_kernels_compile_for_sm_90_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["fp32", "ok", "fp16", "ok"]
