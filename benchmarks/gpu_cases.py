"""What `gpu.py` times: poolings of real models, scaled until they move at least 64 MiB in the
smallest dtype, and their equals in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torchpool as tp
from torchpool.bench import compositions
from torchpool.bench.peers import function
from torchpool.bench.shapes import LAYOUTS, Problem, problems, window

LEAST_BYTES = 64 << 20
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMULAS = (
    (tp.SoftmaxMean(1.0), tp.Window(3, 2, 1)),
    (tp.LogMeanExp(1.0), tp.Window(3, 2, 1)),
    (tp.PowerMean(3.0), tp.Window(3, 2, 1)),
    (tp.Lp(3.0), tp.Window(3, 2, 1)),
    (tp.Var(), tp.Window(2)),
    (tp.Std(), tp.Window(2)),
)


@dataclass(frozen=True)
class Case:
    """One pooling in one dtype and layout, and its equal in torch."""

    name: str
    group: str
    shape: tuple[int, ...]
    ours: Callable[[Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]
    dtype: str = "fp32"
    layout: str = "contiguous"
    train: bool = False
    compiled: bool = True
    """Whether the eager form is timed under torch.compile, too, which takes long to compile."""

    @property
    def label(self) -> str:
        """Name, direction, dtype and layout."""
        return f"{self.name} {'training' if self.train else 'forward'} {self.dtype} {self.layout}"

    def placed(self, device: str) -> Tensor:
        """Random numbers in the case's layout."""
        x = torch.randn(self.shape, device=device, dtype=torch.float32)
        if self.group == "formulas":
            x = x.abs_().add_(0.1)  # where powers of negative numbers do not matter
        x = x.to(DTYPES[self.dtype])
        if self.layout == "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x


def distinct(f: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own, for which torch.compile keeps code of its own."""
    if not isinstance(f, FunctionType):
        return f
    code = f.__code__.replace(co_name=f"{f.__code__.co_name}_{id(f)}")
    return FunctionType(code, f.__globals__, code.co_name, f.__defaults__, f.__closure__)


def scaled(problem: Problem) -> Problem:
    """The problem with so many samples that it moves enough bytes."""
    n, *rest = problem.shape
    samples = -(-LEAST_BYTES // (problem.traffic(2) // n))
    return replace(problem, shape=(max(n, samples), *rest))


def _pooling(problem: Problem, group: str, **chosen: Any) -> Case:
    return Case(
        problem.name, group, problem.shape, function(problem, tp), function(problem, F), **chosen
    )


def _core() -> list[Problem]:
    """Each problem once, though it was written for several batch sizes."""
    kept: dict[Any, Problem] = {}
    for problem in map(scaled, problems("core")):
        kept.setdefault(replace(problem, name="", source=""), problem)
    return list(kept.values())


def _models(train: bool, dtypes: tuple[str, ...]) -> Iterator[Case]:
    group = "training" if train else "forward"
    for problem in _core():
        for dtype in dtypes:
            for layout in LAYOUTS:
                compiled = (dtype, layout) == ("fp32", "contiguous")
                yield _pooling(
                    problem, group, dtype=dtype, layout=layout, train=train, compiled=compiled
                )


def _growth() -> Iterator[Case]:
    """The same planes under growing windows; torch's way round k² is an axis at a time."""
    for k in (3, 31, 127):
        for op in ("max", "mean"):
            problem = window(f"k{k} {op}", op, (4, 64, 512, 512), k, 1, k // 2)
            case = _pooling(problem, "growth", compiled=False)
            column, row = (
                function(replace(problem, kernel=kernel, padding=padding), F)
                for kernel, padding in (((k, 1), (k // 2, 0)), ((1, k), (0, k // 2)))
            )
            by_axis = partial(_twice, column, row)
            for train in (False, True):
                yield replace(case, eager=by_axis if k > 3 else case.eager, train=train)


def _twice(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return second(first(x))


def _adaptive_maxima() -> Iterator[Case]:
    """What shapes of models lack: adaptive maxima, and adaptive windows over volumes."""
    for shape, size in (
        ((256, 256, 38, 38), (7, 7)),
        ((256, 256, 38, 38), (5, 5)),
        ((16, 64, 16, 56, 56), (4, 7, 7)),
        ((16, 64, 16, 55, 55), (3, 7, 7)),
    ):
        for op in ("max", "mean"):
            name = f"adaptive {op} {'x'.join(map(str, shape[2:]))} to {'x'.join(map(str, size))}"
            yield _pooling(Problem(name, op, shape, output=size), "adaptive", train=True)


def _formulas() -> Iterator[Case]:
    mean = {
        3: partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1, count_include_pad=False),
        2: partial(F.avg_pool2d, kernel_size=2),
    }
    for reduction, windows in FORMULAS:
        compose = compositions.COMPOSITIONS[reduction][0]
        average = mean[windows.kernel if isinstance(windows.kernel, int) else windows.kernel[0]]
        for train in (False, True):
            yield Case(
                type(reduction).__name__,
                "formulas",
                (64, 64, 112, 112),
                lambda x, r=reduction, w=windows: tp.pool(x, r, w),  # type: ignore[misc]
                lambda x, c=compose, a=average: c(x, a),  # type: ignore[misc]
                train=train,
            )


def cases() -> list[Case]:
    """What is timed, the most telling first."""
    chosen = [
        *_models(False, ("fp32", "fp16")),
        *_models(True, ("fp32", "fp16")),
        *_adaptive_maxima(),
        *_formulas(),
        *_growth(),
        *_models(False, ("bf16",)),
    ]
    assert all(math.prod(case.shape) for case in chosen)
    return chosen
