"""What the tests and the benchmarks run over: reductions, windows, edge inputs."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import torch
from torch import Tensor

import torchpool as tp


class Geometry(NamedTuple):
    """Windows over an input shape, and the same positions for the oracle."""

    name: str
    shape: tuple[int, ...]
    windows: tp.Windows
    taps: list[oracle.Taps]


def _w(
    name: str,
    shape: tuple[int, ...],
    kernel: object,
    stride: object,
    padding: object = 0,
    dilation: object = 1,
    ceil: bool = False,
) -> Geometry:
    d = len(shape) - 2

    def each(value: object) -> list:  # type: ignore[type-arg]
        return list(value) if isinstance(value, tuple) else [value] * d

    pairs = [p if isinstance(p, tuple) else (p, p) for p in each(padding)]
    rows = zip(shape[2:], each(kernel), each(stride), pairs, each(dilation), strict=True)
    taps = [oracle.regular(s, k, st, p[0], p[1], dl, ceil) for s, k, st, p, dl in rows]
    window = tp.Window(kernel, stride, padding, dilation, ceil)  # type: ignore[arg-type]
    return Geometry(name, shape, window, taps)


def _a(name: str, shape: tuple[int, ...], *outs: int) -> Geometry:
    taps = [oracle.adaptive(s, o) for s, o in zip(shape[2:], outs, strict=True)]
    return Geometry(name, shape, tp.Adaptive(outs), taps)


GEOMETRIES = [
    _w("2x2/2", (2, 3, 6, 8), 2, 2),
    _w("3x3/2 p1", (2, 3, 9, 11), 3, 2, 1),
    _w("3x3/1 p1", (1, 4, 7, 5), 3, 1, 1),
    _w("ceil", (2, 2, 8, 9), 3, 2, 1, 1, True),
    _w("1x1/2", (1, 3, 5, 7), 1, 2),
    _w("identity", (1, 2, 4, 5), 1, 1),
    _w("dilated", (1, 2, 12, 11), (3, 2), (2, 1), 1, (2, 3)),
    _w("more padding than kernel", (1, 2, 4, 5), 2, 1, (3, 4)),
    _w("one-sided padding", (1, 2, 6, 7), 3, 2, ((2, 0), (0, 5))),
    _w("gaps between windows", (1, 2, 11, 13), 2, 5),
    _w("huge window", (1, 2, 6, 7), (13, 15), 1, (6, 7)),
    _w("long window", (1, 1, 40, 3), (33, 1), 1, (16, 0)),
    _w("one element", (1, 1, 1, 1), 1, 1),
    _w("1-D", (2, 3, 21), 4, 3, 1),
    _w("1-D long", (1, 2, 300), 128, 1),
    _w("3-D", (1, 2, 5, 6, 7), (1, 2, 3), (1, 2, 2), (0, 1, 1)),
    _w("3-D overlapping", (1, 2, 5, 4, 6), 3, 1, 1),
    _w("4-D", (1, 2, 4, 3, 5, 4), 2, (2, 1, 2, 2)),
    _a("adaptive dividing", (2, 3, 8, 6), 4, 3),
    _a("adaptive", (2, 3, 7, 11), 3, 4),
    _a("adaptive upsampling", (1, 2, 3, 4), 5, 7),
    _a("global", (2, 3, 7, 5), 1, 1),
    _a("adaptive 1-D", (1, 2, 17), 5),
    _a("adaptive 3-D", (1, 2, 5, 4, 3), 2, 3, 2),
]

SELECTIONS = [tp.Max(), tp.Min()]
ACCUMULATIONS = [
    tp.Sum(),
    tp.Mean(),
    tp.Lp(2.0),
    tp.Lp(1.0),
    tp.Lp(3.7),
    tp.PowerMean(3.0),
    tp.PowerMean(-1.0),
    tp.PowerMean(0.0),
    tp.LogMeanExp(2.0),
    tp.LogMeanExp(-0.5),
    tp.SoftmaxMean(1.5),
    tp.SoftmaxMean(-2.0),
    tp.Var(),
    tp.Var(1.0),
    tp.Std(),
]

LAYOUTS = ["contiguous", "channels_last", "strided"]

TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 3e-5, "atol": 3e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}
"""How far a result of each dtype may lie from float64 arithmetic on the same input. Half types: two
roundings of the result."""


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another place in memory."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        wide = torch.full(
            (*x.shape[:-1], 2 * x.shape[-1] + 1),
            float("nan") if x.is_floating_point() else 0,
            dtype=x.dtype,
        )
        wide[..., 1::2] = x
        return wide[..., 1::2]
    return x.contiguous()


def numbers(shape: tuple[int, ...], seed: int = 0, kind: str = "normal") -> Tensor:
    """Float64 inputs: "normal", "ties" (small integers), "special" (with NaN, infinities and both
    zeros), "positive"."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        return (2 * x).round()
    if kind == "positive":
        return x.abs() + 0.05
    if kind == "special":
        special = torch.tensor(
            [float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=torch.float64
        )
        pick = torch.randint(0, 40, shape, generator=generator)
        x = torch.where(pick < 5, special[pick.clamp(max=4)], x)
        x.reshape(-1)[: x.numel() // 3] = -float("inf")
    return x
