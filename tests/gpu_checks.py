"""What `test_gpu.py` runs in a process of its own: every kernel against the oracle and the
gradients of the reference."""

from __future__ import annotations

import os
import sys

import oracle
import torch
from cases import GEOMETRIES, TOLERANCE, laid_out, numbers

import torchpool as tp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    g
    for g in GEOMETRIES
    if len(g.shape) <= 5 and g.name not in ("long window", "huge window", "1-D long")
]
FEW = [
    g for g in SHAPES if g.name in ("3x3/2 p1", "dilated", "adaptive", "1-D", "one-sided padding")
]
ACCUMULATIONS = [
    tp.Sum(),
    tp.Mean(),
    tp.Mean(True),
    tp.SoftmaxMean(1.5),
    tp.SoftmaxMean(-2.0),
    tp.LogMeanExp(2.0),
    tp.PowerMean(3.0),
    tp.Lp(3.0),
    tp.Var(),
    tp.Std(),
]


def _gradients(x, y, p=None):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    return torch.autograd.grad(y, [x] if p is None else [x, p], weights)


def _with_reference(function):
    os.environ["TORCHPOOL_BACKEND"] = "reference"
    try:
        return function()
    finally:
        os.environ["TORCHPOOL_BACKEND"] = "gpu"


def selection():
    for geometry in SHAPES:
        for reduction in (tp.Max(), tp.Min()):
            for kind, layout in (("special", "contiguous"), ("ties", "channels_last")):
                x = (
                    laid_out(numbers(geometry.shape, 1, kind).float(), layout)
                    .to(DEVICE)
                    .requires_grad_()
                )
                y, i = tp.pool(x, reduction, geometry.windows, return_indices=True)
                want, where = oracle.pool(
                    x.detach().double().cpu().numpy(), geometry.taps, type(reduction).__name__
                )
                assert torch.equal(
                    torch.nan_to_num(y.cpu().double(), nan=7.5),
                    torch.nan_to_num(torch.from_numpy(want), nan=7.5),
                ), geometry.name
                assert torch.equal(i.cpu(), torch.from_numpy(where)), geometry.name
                (got,) = _gradients(x, y)
                (expected,) = _with_reference(
                    lambda: _gradients(x, tp.pool(x, reduction, geometry.windows))
                )
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
                if geometry in FEW:
                    assert got.is_contiguous() == x.is_contiguous()


def accumulation():
    for geometry in SHAPES:
        for reduction in ACCUMULATIONS if geometry in FEW else ACCUMULATIONS[:4]:
            x = numbers(geometry.shape, 2, "positive").to(DEVICE).requires_grad_()
            y = tp.pool(x, reduction, geometry.windows)
            expected = _with_reference(lambda: tp.pool(x, reduction, geometry.windows))
            torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
            if reduction != tp.Mean(True):
                p = reduction.value or 0.0
                want, _ = oracle.pool(
                    x.detach().cpu().numpy(), geometry.taps, type(reduction).__name__, p
                )
                torch.testing.assert_close(
                    y.detach().cpu(), torch.from_numpy(want), **TOLERANCE[torch.float64]
                )
            torch.testing.assert_close(
                _gradients(x, y), _gradients(x, expected), rtol=1e-9, atol=1e-9
            )


def parameters():
    for geometry in FEW:
        for reduction in (tp.SoftmaxMean(), tp.LogMeanExp(), tp.PowerMean(), tp.Lp()):
            for per_channel in (False, True):
                x = numbers(geometry.shape, 3, "positive").to(DEVICE).requires_grad_()
                channels = geometry.shape[1]
                p = torch.linspace(
                    0.7, 2.1, channels if per_channel else 1, dtype=x.dtype, device=DEVICE
                ).requires_grad_()
                y = tp.pool(x, reduction.replace(p), geometry.windows)
                expected = _with_reference(
                    lambda: _gradients(x, tp.pool(x, reduction.replace(p), geometry.windows), p)
                )
                torch.testing.assert_close(_gradients(x, y, p), expected, rtol=1e-8, atol=1e-8)


def half():
    for dtype in (torch.float16, torch.bfloat16):
        for geometry in FEW:
            for reduction in (tp.Max(), tp.Mean(), tp.SoftmaxMean(2.0)):
                x = numbers(geometry.shape, 4).to(dtype).to(DEVICE).requires_grad_()
                y = tp.pool(x, reduction, geometry.windows)
                want, _ = oracle.pool(
                    x.detach().double().cpu().numpy(),
                    geometry.taps,
                    type(reduction).__name__,
                    reduction.value if hasattr(reduction, "beta") else 0.0,
                )
                torch.testing.assert_close(
                    y.detach().double().cpu(), torch.from_numpy(want), **TOLERANCE[dtype]
                )
                expected = _with_reference(
                    lambda: _gradients(x, tp.pool(x, reduction, geometry.windows))
                )
                torch.testing.assert_close(_gradients(x, y), expected, **TOLERANCE[dtype])


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("checked")
