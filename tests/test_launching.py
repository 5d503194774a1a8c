"""A kernel that was started is started again without asking Triton, for arguments that it was
compiled for and for no others."""

from __future__ import annotations

import pytest
import torch

from torchpool.kernels.gpu import geometry, launching
from torchpool.windows import Window


class Compiled:
    """Stands for a kernel that Triton compiled."""

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda *args: self.started.append((grid, args))


class Kernel:
    """Stands for a Triton function, and counts how often it is asked."""

    arg_names = ("x", "size", "strides", "WIDE", "MASKED")

    def __init__(self, makes=Compiled):
        self.made = []
        self.makes = makes

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **constants):
        self.made.append(self.makes())
        return self.made[-1]


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(launching, "_remembered", {})
    monkeypatch.setattr(launching, "CompiledKernel", Compiled)


def aligned(offset=0, dtype=torch.float32):
    return torch.zeros(64, dtype=dtype)[offset:]


def start(kernel, x, size=8, strides=(1, 2), programs=3, **constants):
    constants = {"WIDE": 4, "MASKED": False, **constants}
    launching.launch(kernel, programs, x, x, size, strides, **constants)


def test_a_repeated_start_asks_nobody():
    kernel, x, z = Kernel(), aligned(), aligned()
    start(kernel, x)
    start(kernel, z, programs=5, MASKED=False, WIDE=4)
    (compiled,) = kernel.made
    ((grid, args),) = compiled.started
    assert grid == (5, 1, 1)
    assert args[0] is z
    assert args[1:] == (8, (1, 2), 4, False)


@pytest.mark.parametrize(
    "other",
    [
        {"x": aligned(1)},
        {"x": aligned(dtype=torch.float16)},
        {"size": 1},
        {"size": 16},
        {"size": 1 << 40},
        {"strides": (1, 16)},
        {"WIDE": 2},
        {"MASKED": True},
    ],
    ids=str,
)
def test_what_triton_compiles_for_is_told_apart(other):
    kernel = Kernel()
    start(kernel, aligned())
    start(kernel, **{"x": aligned(), **other})
    assert len(kernel.made) == 2


def test_another_kernel_is_another():
    one, two = Kernel(), Kernel()
    for kernel in (one, two):
        start(kernel, aligned())
    assert len(one.made) == len(two.made) == 1


def test_what_is_not_compiled_is_not_remembered():
    kernel = Kernel(makes=lambda: None)  # as Triton's interpreter answers
    for _ in range(2):
        start(kernel, aligned())
    assert len(kernel.made) == 2


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(launching, "_MOST", 4)
    kernel = Kernel()
    for size in range(20):
        start(kernel, aligned(), size)
    assert len(launching._remembered) <= 4


def test_a_problem_has_one_view():
    x, axes = torch.zeros(2, 3, 8, 8), Window(2).axes((8, 8))
    assert geometry.view(x, axes) is geometry.view(x + 1, Window(2).axes((8, 8)))
