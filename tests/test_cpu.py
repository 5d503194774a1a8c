"""The CPU kernels against the oracle: values, winners, gradients, layouts, dtypes, threads, forks,
the cache."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from numba import njit
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d
from torch.utils._python_dispatch import TorchDispatchMode

from torchpool import (
    LogMeanExp,
    Lp,
    Max,
    Mean,
    Min,
    PowerMean,
    SoftmaxMean,
    Sum,
    Window,
    pool,
)
from torchpool.kernels import cpu, layout, reference
from torchpool.kernels.cpu import formulas, parts, prepared, scalars, shares, simd, threads
from torchpool.kernels.cpu import plan as plans
from torchpool.kernels.cpu.plan import COLUMNS, Plan
from torchpool.reductions import Accumulation, exp, log
from torchpool.windows import Adaptive, Global, Windows

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GEOMETRIES: list[tuple[tuple[int, ...], Windows]] = [
    ((2, 3, 9, 11), Window(3, stride=2, padding=1)),
    ((2, 3, 8, 10), Window(2)),
    ((1, 5, 7, 6), Window(3, stride=1, padding=1)),
    ((1, 2, 9, 8), Window((3, 2), (1, 2), ((2, 1), (3, 0)), (2, 1))),
    ((1, 2, 11, 9), Window(5, 3, 4, ceil_mode=True)),
    ((1, 3, 7, 9), Adaptive((3, 4))),
    ((2, 3, 6, 6), Adaptive((3, 2))),
    ((2, 3, 5, 6), Global()),
    ((1, 2, 40), Window(33, 1, 16)),
    ((1, 2, 5000), Window(17, 1, 8)),
    ((2, 2, 130), Window(15, 3, 7)),
    ((4, 5, 7, 7), Adaptive((6, 6))),
    ((1, 2, 4, 5, 4), Window(2, 1, 1)),
    ((1, 1, 3, 3, 2, 3), Window(2, 1)),
    ((3, 2, 11, 9), Window((5, 8), 1, ((1, 4), (6, 0)))),
    ((2, 3, 6, 5), Window((2, 3), 1, ((3, 2), (4, 5)))),
    ((2, 3, 5, 4, 20), Window((2, 3, 2), (2, 1, 1), (1, 0, 1), (2, 1, 1))),
    ((4, 3, 30), Window(3, 1, ((0, 2),))),
    ((1, 3, 3, 120), Adaptive((2, 1))),
    ((2, 20, 9, 12), Adaptive((2, 2))),
    ((1, 35, 11, 10), Window((4, 5), (5, 5), (1, 0), (2, 1))),
]
IDS = [
    f"{'x'.join(map(str, shape))}-{type(windows).__name__}{i}"
    for i, (shape, windows) in enumerate(GEOMETRIES)
]


def positions(windows: Windows, sizes: Any) -> list[list[list[int]]]:
    """Positions of every window per axis, by the oracle's own rules."""
    made = []
    for i, size in enumerate(sizes):
        if isinstance(windows, Window):
            axis = windows.axes(sizes)[i]
            numbers = (axis.kernel, axis.stride, axis.before, axis.after, axis.dilation)
            made.append(oracle.regular(size, *numbers, windows.ceil_mode))
        elif isinstance(windows, Adaptive):
            made.append(oracle.adaptive(size, windows.output_size[i]))  # type: ignore[index]
        else:
            made.append([list(range(size))])
    return made


def numbers(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False
) -> torch.Tensor:
    """Small integers: many ties, exact in every dtype."""
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return layout.to_layout(x, channels_last)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what kernels shall write with values that no result has."""
    original = layout.empty

    def poison(*args: Any) -> torch.Tensor:
        made = original(*args)
        return made.fill_(float("nan") if made.dtype.is_floating_point else 77)

    monkeypatch.setattr(layout, "empty", poison)


def flat_winners(
    state: torch.Tensor, taps: list[list[list[int]]], kernels: list[int], sizes: Any
) -> np.ndarray:
    """Flat input positions that offsets point to."""
    flat = np.empty(state.shape, dtype=np.int64)
    for at in np.ndindex(*state.shape):
        rest, place, scale = int(state[at]), 0, 1
        for axis in reversed(range(len(taps))):
            rest, tap = divmod(rest, kernels[axis])
            place += taps[axis][at[2 + axis]][tap] * scale
            scale *= sizes[axis]
        flat[at] = place
    return flat


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "windows"), GEOMETRIES, ids=IDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("scatters", [False, True], ids=["gathers", "scatters"])
def test_selection(
    shape: tuple[int, ...],
    windows: Windows,
    channels_last: bool,
    scatters: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    can_gather = lambda plan: plan.by_channel or plan.is_leaf  # noqa: E731
    ways = property(lambda plan: scatters or not can_gather(plan))
    monkeypatch.setattr(Plan, "scatters", ways)
    x = numbers(shape, torch.float32, channels_last)
    x[(0, 0, *(0,) * (len(shape) - 3), 1)] = float("nan")
    x[-1, -1] = -float("inf")
    axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
    for reduction, name in ((Max(), "Max"), (Min(), "Min")):
        values, indices = oracle.pool(x.double().numpy(), taps, name)
        y, state = cpu.select(x, None, None, reduction, axes, True)
        plain, nothing = cpu.select(x, None, None, reduction, axes, False)
        assert nothing.numel() == 0
        np.testing.assert_array_equal(y.numpy(), values)
        np.testing.assert_array_equal(plain.numpy(), values)
        found = flat_winners(state, taps, [axis.kernel for axis in axes], shape[2:])
        np.testing.assert_array_equal(np.where(indices < 0, -1, found), indices)
        grad = layout.to_layout(torch.randn(y.shape), channels_last)
        expected = np.zeros((*shape[:2], int(np.prod(shape[2:]))))
        for at in np.ndindex(*y.shape):
            if indices[at] >= 0:
                expected[at[0], at[1], indices[at]] += grad[at].item()
        gx = cpu.select_backward(grad, state, None, axes, channels_last)
        assert layout.is_channels_last(gx) == layout.is_channels_last(x)
        np.testing.assert_allclose(gx.numpy(), expected.reshape(shape), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "windows"), GEOMETRIES, ids=IDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_linear_accumulation(shape: tuple[int, ...], windows: Windows, channels_last: bool) -> None:
    x = numbers(shape, torch.float32, channels_last)
    axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
    for reduction, name in ((Sum(), "Sum"), (Mean(), "Mean")):
        values, _ = oracle.pool(x.double().numpy(), taps, name)
        y, stats = cpu.accumulate(x, None, None, None, reduction, axes, True)
        assert stats.numel() == 0
        np.testing.assert_allclose(y.numpy(), values, rtol=1e-5, atol=1e-6)
        # The adjoint: <pool(x), g> = <x, backward(g)>.
        grad = layout.to_layout(numbers(tuple(y.shape), torch.float32), channels_last)
        gx, _, _ = cpu.accumulate_backward(
            grad,
            x[:0],
            None,
            None,
            None,
            stats,
            reduction,
            axes,
            [True, False, False],
            channels_last,
        )
        assert layout.is_channels_last(gx) == layout.is_channels_last(x)
        torch.testing.assert_close(
            (y.double() * grad).sum(), (x.double() * gx).sum(), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("has_avx512", [False, True], ids=["in halves", "masked"])
def test_first_lanes(dtype: Any, has_avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of lanes, at the beginning, inside and at the end of the memory."""
    monkeypatch.setattr(simd, "has_avx512", lambda: has_avx512)

    @njit
    def copy(x: Any, y: Any, at: int, count: int) -> None:
        simd.store_first(y, at, simd.load_first(x, at, count), count)

    lanes, size = 64 // np.dtype(dtype).itemsize, 200
    x = np.arange(1, size + 1).astype(dtype)
    for at in (0, 7, size - lanes, size - lanes + 3, size - 2):
        for count in range(-2, lanes + 2):
            taken = max(0, min(count, lanes))
            if at + taken <= size:
                y = np.zeros(size, dtype)
                copy(x, y, at, count)
                np.testing.assert_array_equal(y[at : at + taken], x[at : at + taken])
                assert not y[:at].any()
                assert not y[at + taken :].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "windows"), GEOMETRIES, ids=IDS)
def test_rows_of_small_planes(
    shape: tuple[int, ...], windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What planes are reduced as whole, elsewhere, is right row by row."""
    x = numbers(shape, torch.float32)
    x[(0, 0, *(0,) * (len(shape) - 3), 1)] = float("nan")
    axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
    monkeypatch.setattr(plans, "plan", plans.plan.__wrapped__)
    monkeypatch.setattr(plans, "_are_small", lambda rows, row: False)
    for reduction in (Max(), Min()):
        values, _ = oracle.pool(x.double().numpy(), taps, type(reduction).__name__)
        y, _ = cpu.select(x, None, None, reduction, axes, False)
        np.testing.assert_array_equal(y.numpy(), values)
    for total in (Sum(), Mean()):
        values, _ = oracle.pool(x.double().numpy(), taps, type(total).__name__)
        y, _ = cpu.accumulate(x, None, None, None, total, axes, False)
        np.testing.assert_allclose(y.numpy(), values, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("windows", [Global(), Adaptive(1), Window(5, stride=1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_of_one_window_lie_as_the_input_does(
    windows: Windows, channels_last: bool
) -> None:
    x = numbers((2, 3, 5, 5), torch.float64, channels_last)
    axes, needs = windows.axes(x.shape[2:]), [True, False, False]
    beta = torch.full((3,), 0.5, dtype=torch.float64)
    _, state = cpu.select(x, None, None, Max(), axes, True)
    grad = torch.tensor([[[[1.0]], [[2.0]], [[-3.0]]]] * 2, dtype=torch.float64)
    pairs = [[b.select_backward(grad, state, None, axes, channels_last) for b in (cpu, reference)]]
    for reduction, p in ((Sum(), None), (Mean(), None), (SoftmaxMean(), beta)):
        stats = cpu.accumulate(x, None, None, p, reduction, axes, True)[1]
        given = (grad, x, None, None, p, stats, reduction, axes, needs, channels_last)
        pairs.append([b.accumulate_backward(*given)[0] for b in (cpu, reference)])
    for gx, wanted in pairs:
        assert gx.stride() == wanted.stride() == x.stride()
        torch.testing.assert_close(gx, wanted)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_dtypes(dtype: torch.dtype, channels_last: bool) -> None:
    for shape, windows in GEOMETRIES[:3]:
        x = numbers(shape, dtype, channels_last) * 0.37
        axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
        tolerance = TOLERANCE[dtype]
        y, state = cpu.select(x, None, None, Max(), axes, True)
        np.testing.assert_array_equal(
            y.double().numpy(), oracle.pool(x.double().numpy(), taps, "Max")[0]
        )
        grad = layout.to_layout(numbers(tuple(y.shape), dtype), channels_last)
        gx = cpu.select_backward(grad, state, None, axes, channels_last)
        assert gx.double().sum() == grad.double().sum()
        y, stats = cpu.accumulate(x, None, None, None, Mean(), axes, True)
        np.testing.assert_allclose(
            y.double().numpy(),
            oracle.pool(x.double().numpy(), taps, "Mean")[0],
            rtol=tolerance,
            atol=tolerance,
        )
        gx, _, _ = cpu.accumulate_backward(
            grad, x[:0], None, None, None, stats, Mean(), axes, [True, False, False], channels_last
        )
        torch.testing.assert_close(
            (y.double() * grad).sum(), (x.double() * gx).sum(), rtol=tolerance, atol=30 * tolerance
        )


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
)
def test_integers(dtype: torch.dtype) -> None:
    shape, windows = GEOMETRIES[0]
    x = numbers(shape, torch.int64).abs().to(dtype)
    axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
    y, _ = cpu.select(x, None, None, Max(), axes, False)
    assert y.dtype == dtype
    np.testing.assert_array_equal(
        y.to(torch.int64).numpy(), oracle.pool(x.to(torch.int64).numpy(), taps, "Max")[0]
    )
    total, _ = cpu.accumulate(x, None, None, None, Sum(), axes, False)
    assert total.dtype == torch.int64
    np.testing.assert_array_equal(
        total.numpy(), oracle.pool(x.to(torch.int64).numpy(), taps, "Sum")[0]
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("taps", [1, 2, 7, 511, 512, 40_000])
def test_sums_and_means_of_integers_are_exact(dtype: torch.dtype, taps: int) -> None:
    """The least, the largest and one less: where a quotient rounded to the nearest would be a whole
    number that the exact one is not, and where sums outgrow the format that they are made in."""
    limits = torch.iinfo(dtype)
    limit = limits.max if dtype != torch.int64 else 1 << 40
    rows = torch.full((3, 1, taps), limit, dtype=dtype)
    rows[1, 0, -1] -= 1
    rows[2] = limits.min if dtype != torch.int64 else -limit
    rows[2, 0, 0] += 1
    totals = [sum(row) for row in rows[:, 0].tolist()]

    def cut(total: int, divisor: int) -> int:
        return abs(total) // abs(divisor) * (1 if total * divisor > 0 else -1)

    for windows in (Global(), Window(taps)):
        assert pool(rows, Sum(), windows).flatten().tolist() == totals
        means = [cut(total, taps) for total in totals]
        assert pool(rows, Mean(), windows).flatten().tolist() == means
        assert torch.equal(
            pool(rows, Mean(divisor=2.9), windows), pool(rows, Mean(divisor=2), windows)
        )
        for divisor in (1, -3, 1 << 24):
            found = pool(rows, Mean(divisor=divisor), windows).flatten()
            exact = [cut(total, divisor) for total in totals]
            wrapped = [(e - limits.min) % (1 << limits.bits) + limits.min for e in exact]
            assert found.tolist() == wrapped, divisor


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize(
    ("size", "outs"),
    [
        ((10, 10), (7, 7)),
        ((60, 60), (6, 6)),
        ((5, 5), (8, 8)),
        ((13, 8), (6, 4)),
        ((300, 9), (7, 2)),
    ],
)
def test_gradients_of_adaptive_means(size: Any, outs: Any, channels: int, channels_last: bool):
    """Of windows that overlap, lie side by side, or are fewer than the outputs: torch's own."""
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weights = torch.randn(2, channels, *outs, dtype=torch.float64)
    found, known = (
        torch.autograd.grad((pooled(leaf) * weights).sum(), leaf)[0]
        for leaf, pooled in (
            (x.clone().requires_grad_(), lambda t: pool(t, Mean(), Adaptive(outs))),
            (x.clone().requires_grad_(), lambda t: adaptive_avg_pool2d(t, outs)),
        )
    )
    torch.testing.assert_close(found, known, rtol=1e-12, atol=1e-14)
    assert found.stride() == x.stride()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "padding", "ceil_mode"),
    [((2, 4), 0, False), ((5, 5), 2, False), ((3, 40), (1, 7), True), ((4, 17), 0, True)],
)
def test_gradients_whose_rows_are_alike(
    dtype: torch.dtype, kernel: Any, padding: Any, ceil_mode: bool
) -> None:
    """Of means and sums over windows side by side, which need not fill the input."""
    x = (torch.arange(3 * 2 * 23 * 83) % 7).reshape(3, 2, 23, 83).to(dtype)
    windows = Window(kernel, kernel, padding, ceil_mode=ceil_mode)
    for reduction, divisor in ((Mean(count_include_pad=True), None), (Sum(), 1)):
        leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
        y = pool(leaf, reduction, windows)
        wanted = avg_pool2d(twin, kernel, kernel, padding, ceil_mode, True, divisor)
        grad = (torch.arange(y.numel()) % 11 - 5.0).reshape(y.shape)
        (found,) = torch.autograd.grad(y, leaf, grad.to(dtype))
        (known,) = torch.autograd.grad(wanted, twin, grad.double())
        torch.testing.assert_close(found, known.to(dtype), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("windows", [Window(3, 2), Global()])
@pytest.mark.parametrize("reduction", [Max(), Lp(3.0)])
def test_no_gradient_is_made_for_what_is_kept(reduction: Any, windows: Windows) -> None:
    """Autograd would fill as many zeros as the forward pass keeps numbers."""

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    y = pool(x, reduction, windows)
    with Log():
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert any("torchpool" in name for name in called)
    assert not any("zero" in name for name in called), called


def test_huge_half_values_survive() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        limits = torch.finfo(dtype)
        row = [
            limits.max,
            -limits.max,
            limits.tiny,
            limits.smallest_normal / 4,
            0.0,
            -0.0,
            float("inf"),
            -float("inf"),
        ]
        x = torch.tensor(row, dtype=dtype).reshape(1, 1, -1)
        y, _ = cpu.select(x, None, None, Max(), Window(1).axes((8,)), False)
        assert torch.equal(y, x)


# Accumulations from formulas --------------------------------------------


@dataclass(frozen=True)
class Cubes(Accumulation):
    """The mean of cubes: a reduction that somebody wrote for themselves."""

    @staticmethod
    def lift(x, a, p):  # type: ignore[no-untyped-def]
        return (x * x * x,)

    @staticmethod
    def lift_dx(x, a, p):  # type: ignore[no-untyped-def]
        return (3.0 * x * x,)

    @staticmethod
    def finish(s, n, a, p):  # type: ignore[no-untyped-def]
        return s[0] / n

    @staticmethod
    def finish_grad(s, n, a, p):  # type: ignore[no-untyped-def]
        return (1.0 / n,), -s[0] / n / n, 0.0


@njit(**{**parts.JIT, "cache": False})
def _elementary(x, exponentials, less_one, logarithms):
    for i in range(0, x.size, simd.width(x)):
        v = simd.load(x, i)
        simd.store(exponentials, i, scalars.exp(v))
        simd.store(less_one, i, scalars.expm1(v))
        simd.store(logarithms, i, scalars.log(abs(v)))


def test_elementary_functions_are_as_precise_as_float32():
    """In units of the last place, against float64."""
    every = np.concatenate([np.linspace(-87, 88, 1 << 18), np.logspace(-30, 1.9, 1 << 16)])
    x = np.concatenate([every, -every[1 << 18 :]]).astype(np.float32)
    made = [np.empty_like(x) for _ in range(3)]
    parts.raising(_elementary)(x, *made)
    wide = x.astype(np.float64)
    exact = np.exp(wide), np.expm1(wide), np.log(np.abs(wide))
    for found, right, most in zip(made, exact, (1.1, 1.6, 0.9), strict=True):
        unit = np.spacing(np.abs(right).astype(np.float32)).astype(np.float64)
        assert (np.abs(found - right) / unit).max() < most


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "windows"), GEOMETRIES, ids=IDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_softmax_mean(shape: tuple[int, ...], windows: Windows, channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = layout.to_layout(torch.randn(shape, generator=generator), channels_last)
    mask = layout.to_layout(torch.rand(shape, generator=generator) > 0.3, channels_last)
    weights = layout.to_layout(torch.rand(shape, generator=generator), channels_last)
    beta = torch.linspace(0.5, 2.0, shape[1])
    axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
    for chosen, weighing in ((None, None), (mask, None), (None, weights), (mask, weights)):
        arrays = [None if t is None else t.numpy() for t in (chosen, weighing)]
        values, _ = oracle.pool(x.double().numpy(), taps, "SoftmaxMean", beta.numpy(), *arrays)
        y, _ = cpu.accumulate(x, chosen, weighing, beta, SoftmaxMean(), axes, True)
        np.testing.assert_allclose(y.numpy(), values, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("exponent", [2.0, 3.0])
@pytest.mark.parametrize("kind", [Lp, PowerMean])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_whole_exponents(kind: Any, exponent: float, channels_last: bool) -> None:
    """They have kernels of their own: products instead of exponentials."""
    special, general = (type(formulas.tag(kind, np.array([q]))) for q in (exponent, 2.5))
    assert special is not general
    shape, windows = (2, 17, 9, 11), Window(3, stride=2, padding=1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    x[0, 0], x[0, 1], x[0, 2], x[1, 3, 2] = 0.0, 3e30, -2e-30, math.inf
    x = layout.to_layout(x, channels_last)
    axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
    values, _ = oracle.pool(x.double().numpy(), taps, kind.__name__, exponent)
    p, near = torch.tensor([exponent]), torch.tensor([exponent * (1 + 2e-7)])
    y, stats = cpu.accumulate(x, None, None, p, kind(exponent), axes, True)
    np.testing.assert_allclose(y.numpy(), values, rtol=2e-6, atol=1e-30)
    grads = [
        cpu.accumulate_backward(
            torch.ones_like(y), x, None, None, q, stats, kind(exponent), axes,
            [True, False, False], channels_last,
        )
        for q in (p, near)
    ]  # fmt: skip
    for whole, general in zip(*grads, strict=True):
        torch.testing.assert_close(whole, general, rtol=1e-4, atol=1e-6, equal_nan=True)


SHARED = [Lp(3.0), PowerMean(-1.5), LogMeanExp(1.0), SoftmaxMean(-2.0)]
OVERLAPPING: list[tuple[tuple[int, ...], Windows]] = [
    ((2, 19, 9, 13), Window(3, 2, 1)),
    ((1, 3, 7, 35), Window((2, 5), (1, 3), ((0, 1), (2, 2)))),  # the last elements have no window
    ((1, 2, 5, 6, 7), Window(3, 1, 1, (1, 2, 1), True)),
    ((3, 2, 40), Window(4, 1)),
]


def with_outliers(shape: tuple[int, ...]) -> torch.Tensor:
    """Usual numbers, but for one huge row, a tiny one, zeros, NaN and a few large ones."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    rows = x.reshape(-1, shape[-1])
    rows[1], rows[2], rows[5] = rows[1] * 3e30, rows[2] * 1e-30 - 70, 0.0
    rows[-1, 3], rows[-2, 4], rows[-3, 6] = math.nan, 50.0, -50.0
    return x


@pytest.mark.parametrize("reduction", SHARED, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_overlapping_windows_share_what_elements_are_lifted_to(
    reduction: Accumulation, channels_last: bool
) -> None:
    p = torch.tensor([reduction.value])
    neutral = float(type(reduction).neutral(reduction.value))
    needs, nothing = [True, False, False], (None, None, p)
    for shape, windows in OVERLAPPING:
        axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
        usual = torch.randn(shape, generator=torch.Generator().manual_seed(7)).abs() + 0.1
        unusual = with_outliers(shape)
        if isinstance(reduction, PowerMean):  # in which a negative element is a tiny one
            unusual = unusual.abs()
        for x, is_usual in ((usual, True), (unusual, False)):
            x = layout.to_layout(x, channels_last)
            y, stats = cpu.accumulate(x, *nothing, reduction, axes, True)
            shared = stats[0] == neutral
            assert shared.all() if is_usual else shared.any() and not shared.all()
            name = type(reduction).__name__
            values, _ = oracle.pool(x.double().numpy(), taps, name, reduction.value)
            np.testing.assert_allclose(y.numpy(), values, rtol=4e-6, atol=4e-6)
            grad = layout.to_layout(torch.randn(y.shape), channels_last)
            case = (reduction, axes, needs, channels_last)
            wide, exact = x.double(), p.double()
            _, kept = reference.accumulate(wide, None, None, exact, reduction, axes, True)
            got = cpu.accumulate_backward(grad, x, *nothing, stats, *case)[0]
            want = reference.accumulate_backward(
                grad.double(), wide, None, None, exact, kept, *case
            )[0]
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=4e-6, equal_nan=True)


@dataclass(frozen=True)
class LogSumExp(Accumulation):
    """A user's own reduction whose windows share the anchor 0."""

    anchor = "max"
    shares = True

    @staticmethod
    def lift(x: Any, a: Any, p: Any) -> Any:
        return (exp(x - a),)

    @staticmethod
    def lift_dx(x: Any, a: Any, p: Any) -> Any:
        return (exp(x - a),)

    @staticmethod
    def finish(s: Any, n: Any, a: Any, p: Any) -> Any:
        return a + log(s[0])

    @staticmethod
    def finish_grad(s: Any, n: Any, a: Any, p: Any) -> Any:
        return (1.0 / s[0],), 0.0, 0.0


def test_ones_own_reduction_may_share() -> None:
    x = torch.randn((2, 3, 40), generator=torch.Generator().manual_seed(10)).requires_grad_()
    with torch.no_grad():
        x[0, 1, 7:20] -= 80.0
        x[1, 0, 9] = 90.0
    axes = Window(3, 1).axes((40,))
    _, stats = cpu.accumulate(x.detach(), None, None, None, LogSumExp(), axes, True)
    is_shared = stats[0] == 0
    assert is_shared.any()
    assert not is_shared.all()
    y, want = pool(x, LogSumExp(), Window(3, 1)), x.unfold(2, 3, 1).logsumexp(3)
    torch.testing.assert_close(y, want)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(11))
    torch.testing.assert_close(*(torch.autograd.grad(result, x, grad)[0] for result in (y, want)))


@pytest.mark.parametrize("beta", [0.25, 5.0])
def test_unusual_parameters_have_anchors_of_their_own(beta: float) -> None:
    """A small one, for the sake of the derivative by it, which is a difference of large numbers
    against any other anchor; a large one, whose exponentials are hardly ever usual."""
    x = 10 + torch.rand((1, 1, 9, 9), generator=torch.Generator().manual_seed(9))
    axes = Window(3).axes((9, 9))
    dense = Window(3, 1).axes((9, 9))
    for kind in (LogMeanExp, SoftmaxMean):
        for case in (axes, dense):
            _, stats = cpu.accumulate(x, None, None, torch.tensor([beta]), kind(), case, True)
            assert (stats[0] >= 10).all()


def slope(function: Any, t: torch.Tensor, direction: torch.Tensor) -> float:
    """Directional derivative by central differences."""
    step = 1e-6
    return float((function(t + step * direction) - function(t - step * direction)) / (2 * step))


@pytest.mark.parametrize("reduction", [SoftmaxMean(), Cubes()], ids=["SoftmaxMean", "own"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_formula_gradients(reduction: Accumulation, channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shape, windows = (2, 3, 6, 7), Window(3, stride=2, padding=1)
    axes = windows.axes(shape[2:])
    make = {"dtype": torch.float64, "generator": generator}
    x, weights, by_x, by_w = (
        layout.to_layout(torch.rand(shape, **make), channels_last) for _ in range(4)
    )
    params = torch.rand(3, **make) + 0.5
    by_p = torch.rand(3, **make)
    y, stats = cpu.accumulate(x, None, weights, params, reduction, axes, True)
    grad = layout.to_layout(torch.rand(y.shape, **make), channels_last)

    def loss(x: torch.Tensor, w: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return (cpu.accumulate(x, None, w, p, reduction, axes, False)[0] * grad).sum()

    gx, gw, gp = cpu.accumulate_backward(
        grad, x, None, weights, params, stats, reduction, axes, [True, True, True], channels_last
    )
    assert slope(lambda t: loss(t, weights, params), x, by_x) == pytest.approx(
        float((gx * by_x).sum()), rel=1e-5
    )
    assert slope(lambda t: loss(x, t, params), weights, by_w) == pytest.approx(
        float((gw * by_w).sum()), rel=1e-5
    )
    assert slope(lambda t: loss(x, weights, t), params, by_p) == pytest.approx(
        float((gp * by_p).sum()), rel=1e-5, abs=1e-8
    )


def test_masked_selection_and_mean() -> None:
    shape, windows = GEOMETRIES[0]
    for channels_last in (False, True):
        x = numbers(shape, torch.float32, channels_last)
        mask = layout.to_layout(
            torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.6, channels_last
        )
        x = x.masked_fill(~mask, float("nan"))
        axes, taps = windows.axes(shape[2:]), positions(windows, shape[2:])
        for name, y in (
            ("Max", cpu.select(x, mask, None, Max(), axes, True)[0]),
            ("Mean", cpu.accumulate(x, mask, None, None, Mean(), axes, False)[0]),
        ):
            values, _ = oracle.pool(x.double().numpy(), taps, name, mask=mask.numpy())
            np.testing.assert_allclose(y.numpy(), values, rtol=1e-5, atol=1e-6)


# Threads, processes, the cache --------------------------------------------


def everything(x: torch.Tensor) -> list[torch.Tensor]:
    """Results of every kernel, forward and backward."""
    axes = Window(3, stride=2, padding=1).axes(x.shape[2:])
    last = layout.is_channels_last(x)
    y, state = cpu.select(x, None, None, Max(), axes, True)
    mean, stats = cpu.accumulate(x, None, None, None, Mean(), axes, True)
    grads = [cpu.select_backward(y, state, None, axes, last)]
    grads += cpu.accumulate_backward(
        mean, x, None, None, None, stats, Mean(), axes, [True, False, False], last
    )
    beta = torch.ones(1)
    soft, stats = cpu.accumulate(x, None, None, beta, SoftmaxMean(), axes, True)
    grads += cpu.accumulate_backward(
        soft, x, None, None, beta, stats, SoftmaxMean(), axes, [True, False, True], last
    )
    return [y, state, mean, soft, *grads]


@pytest.fixture
def large() -> torch.Tensor:
    x = torch.randn(2, 8, 65, 67, generator=torch.Generator().manual_seed(5))
    x[1, 2, ::9, ::7] = 40.0  # windows that have anchors of their own beside such that share one
    return x


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("team", ["torch", "python"])
def test_same_bits_from_one_and_many_threads(
    team: str, large: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sys.platform != "linux" or shares._team() is not None
    if team == "python":
        monkeypatch.setattr(shares, "_team", lambda: None)
    monkeypatch.setattr(threads, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(threads, "SHARE_BYTES", 1)
    many = everything(large)
    torch.set_num_threads(1)
    one = everything(large)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_several_python_threads(large: torch.Tensor) -> None:
    expected = everything(large)
    failures: list[object] = []

    def work() -> None:
        for _ in range(5):
            if not all(torch.equal(a, b) for a, b in zip(everything(large), expected, strict=True)):
                failures.append("differs")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_forked_child(large: torch.Tensor) -> None:
    axes = Window(3, stride=2, padding=1).axes(large.shape[2:])
    expected, _ = cpu.select(large, None, None, Max(), axes, False)
    child = os.fork()
    if child == 0:
        same = torch.equal(cpu.select(large, None, None, Max(), axes, False)[0], expected)
        os._exit(0 if same and threads.count(1 << 30) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


_SECOND = """
import torch
from torchpool import Max, SoftmaxMean, Window
from torchpool.kernels import cpu
from torchpool.kernels.cpu import direct, leaf, shared
x, axes = torch.randn(1, 2, 8, 8), Window(3, 2, 1).axes((8, 8))
cpu.select(x, None, None, Max(), axes, True)
cpu.select(x, None, None, Max(), axes, False)
cpu.accumulate(x, None, None, torch.ones(1), SoftmaxMean(), axes, False)
stats = [kernel.stats for kernel in (direct.direct, leaf.leaf, shared.shared)]
print(sum(len(s.cache_misses) for s in stats), sum(len(s.cache_hits) for s in stats))
"""


def test_second_process_starts_from_the_cache() -> None:
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _SECOND], capture_output=True, text=True, check=True
        )
    assert done.stdout.split() == ["0", "3"]


def test_import_leaves_numba_alone() -> None:
    code = "import sys, torchpool; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_refusals_are_reasons() -> None:
    x, axes = torch.randn(1, 1, 4, 4), Window(2).axes((4, 4))
    assert cpu.why_not_select(x, None, None, Max(), axes) is None
    assert "plane" in str(cpu.why_not_select(x, None, torch.zeros(1), Max(), axes))
    assert "complex" in str(cpu.why_not_select(x.to(torch.complex64), None, None, Max(), axes))
    assert "at most 4 axes" in str(cpu.why_not_select(x, None, None, Max(), axes * 3))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_is_written_beside_the_result(dtype, channels_last, monkeypatch):
    """LLVM 22 stores 32 bits past the end where it knows that one 16-bit lane is masked in."""
    guard, buffers = 64, []

    def guarded(shape, stride, dtype):
        count = math.prod(shape)
        buffers.append(torch.full((count + 2 * guard,), 7, dtype=dtype))
        return buffers[-1].as_strided(shape, stride, guard)

    def guarded_like(x, sizes, last, dtype=None):
        shape = (x.shape[0], *sizes, x.shape[1]) if last else (*x.shape[:2], *sizes)
        made = torch.empty(shape, device="meta")
        made = made.movedim(-1, 1) if last else made
        return guarded(made.shape, made.stride(), dtype or x.dtype)

    def is_guarded(t):
        inside = t.data_ptr() - guard * t.element_size()
        return any(inside == buffer.data_ptr() for buffer in buffers)

    monkeypatch.setattr(layout, "empty", guarded_like)
    monkeypatch.setattr(prepared, "unwritten", guarded)
    x = torch.randn(2, 3, 7, 9).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    for windows in (Global(), Adaptive((2, 4)), Window(3, 2, 1), Window((1, 3)), Window(4)):
        for reduction in (Max(), Mean()):
            for save in (False, True):
                with torch.set_grad_enabled(save):
                    y = pool(x, reduction, windows)
                assert is_guarded(y)
                if save:
                    (gx,) = torch.autograd.grad(y.sum(), x)
                    assert is_guarded(gx)
    for buffer in buffers:
        assert (buffer[:guard] == 7).all()
        assert (buffer[-guard:] == 7).all()


def test_checked_accesses_fail_outside() -> None:
    """What `make boundscheck` relies on: tables and vectors know where their memory ends."""
    from numba import njit

    from torchpool.kernels.cpu.constants import constants
    from torchpool.kernels.cpu.simd import load, store

    @njit(boundscheck=True)
    def copy(x, y, at):
        store(y, at, load(x, at))

    @njit(boundscheck=True)
    def read(table, at):
        return constants(table)[at]

    @njit(boundscheck=True)
    def read_column(table, row, column):
        return constants(table)[row, column]

    x, y = np.arange(20, dtype=np.float32), np.zeros(20, np.float32)
    copy(x, y, 4)
    assert (y[4:] == x[4:]).all()
    geo = np.arange(4 * COLUMNS).reshape(4, COLUMNS)
    assert read(geo[0], COLUMNS - 1) == COLUMNS - 1
    assert read_column(geo, 3, 2) == 3 * COLUMNS + 2
    for outside in (
        lambda: copy(x, y, 5),
        lambda: copy(x, y, -1),
        lambda: read(geo[0], COLUMNS),
        lambda: read(geo[0], -1),
        lambda: read_column(geo, 4, 0),
    ):
        with pytest.raises(IndexError):
            outside()


@pytest.mark.parametrize("units", [1, 3])
def test_what_a_kernel_fails_with_is_raised(units):
    from numba import njit

    @njit(**{**parts.JIT, "cache": False})
    def spoil(begin, end, x):
        for i in range(begin, end):
            if x[i] > 2:
                raise ValueError("a formula refuses an element")
            x[i] = 3

    x = np.ones(units)
    threads.run(spoil, units, threads.PARALLEL_BYTES, x)
    assert (x == 3).all()
    with pytest.raises(ValueError, match="refuses"):
        threads.run(spoil, units, threads.PARALLEL_BYTES, x)


def test_parts_are_linked_after_all_that_call_them():
    class Library(parts._Part):
        def __init__(self, *called):
            self._linking_libraries = list(called)

    last = Library()
    middle = Library(last)
    early = Library(last, middle)
    kernel = [early, last, middle]
    assert parts._with_parts(kernel) == [early, middle, last]
    assert parts._with_parts(kernel[::-1]) == [early, middle, last]
