"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter on CPU tensors; and
what the compiler makes of them for compute capability 9.0, which needs no GPU.

The interpreter must be chosen before Triton is imported, so the checks run in processes of their
own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchpool.reductions import Lp, Max, Mean
from torchpool.windows import Adaptive, Window

HERE = Path(__file__).parent
GROUPS = (
    "selection",
    "selection_of_everything",
    "accumulation",
    "accumulation_of_everything",
    "functions",
    "forms",
    "extremes",
    "large",
    "split",
    "apart",
    "layers",
)


def _run(script: Path, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_gpu_is_there_where_it_is_required():
    if "gpu" in os.environ.get("TORCHPOOL_REQUIRE", "").split(","):
        assert torch.cuda.is_available()


@pytest.mark.parametrize("group", GROUPS)
def test_kernels(group):
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    assert "checked" in _run(HERE / "gpu_checks.py", group, TORCHPOOL_BACKEND="gpu", **interpret)


def test_frequent_kernels_load_vectors_and_spill_nothing(tmp_path):
    table = tmp_path / "kernels.json"
    benchmark = HERE.parent / "benchmarks" / "gpu_kernels.py"
    _run(benchmark, "--frequent", "--output", str(table))
    rows = json.loads(table.read_text())["kernels"]
    assert all(row["spilled_bytes"] == 0 for row in rows)
    maxima = [row for row in rows if row["kernel"].split(".")[0] in ("selection", "boxes")]
    assert len({(row["windows"], row["dtype"], row["layout"]) for row in maxima}) == 16
    for row in maxima:  # sixteen bytes of channels; two neighbours of a row
        pair = 2 * {"fp32": 4, "fp16": 2}[row["dtype"]]
        assert row["widest_load_bytes"] >= (16 if row["layout"] == "channels_last" else pair)
    formulas = {row["windows"] for row in rows if row["kernel"] == "gathering.near_kernel"}
    assert len(formulas) == 8  # each in both directions: what compiles is not only interpreted


@pytest.mark.parametrize(
    ("reduction", "windows", "size", "expected"),
    [
        (Max(), Window(3, 2, 1), 28, True),
        (Max(), Window(3, 2, 1, 2), 28, True),
        (Max(), Window(3, 2, 2), 28, False),  # torch refuses the padding
        (Max(), Window(3, 2, ((0, 1), (0, 1))), 28, False),
        (Max(), Window(3, 2, 0, 1, True), 28, False),  # one window more than fits
        (Max(), Adaptive(7), 28, False),
        (Max(), Window(2), 4096, False),  # not small
        (Mean(), Window(2), 28, True),
        (Mean(), Window(3, 2, 1), 28, False),  # torch counts the padding, as the next does
        (Mean(count_include_pad=True), Window(3, 2, 1), 28, True),
        (Mean(), Window(2, dilation=2), 28, False),
        (Lp(2.0), Window(2), 28, False),
    ],
)
def test_small_inputs_go_to_torch_where_it_gives_the_same(reduction, windows, size, expected):
    from torchpool.kernels.gpu import small

    axes = windows.axes((size, size))
    x = torch.randn(1, 1, size, size)
    assert small.prefers_torch(x, reduction, axes) is expected
    if expected:
        from torchpool.kernels import reference

        y = x.new_empty(1, 1, *(axis.out_size for axis in axes))
        small.run(x, reduction, axes, y)
        operation = reference.select if isinstance(reduction, Max) else reference.accumulate
        nones = (None, None) if isinstance(reduction, Max) else (None, None, None)
        torch.testing.assert_close(y, operation(x, *nones, reduction, axes, False)[0])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 55, 112, 65535, 65536, 2**30 + 1, 2**31 - 1])
def test_divisions_by_multiplication_are_exact(size):
    from torchpool.kernels.gpu.geometry import divisor

    multiplier, shift = divisor(size)
    numbers = {0, 1, size - 1, size, size + 1, 5 * size - 1, 5 * size, 2**31 - 1, 123456789}
    for n in (n for n in numbers if n < 2**31):
        assert ((n * (multiplier % 2**32) >> 32) + n) >> shift == n // size
