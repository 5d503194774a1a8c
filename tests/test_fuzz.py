"""Random calls of `pool` against the oracle: geometry × reduction × dtype × layout × threads × mask
and weights × gradients.

A failing example is printed as a `Case`; `check(Case(...))` runs it again. More cases, other ones
every time: `pytest tests/test_fuzz.py --hypothesis-profile deep`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import TOLERANCE, laid_out, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchpool as tp
from torchpool.kernels.cpu import threads

PROFILE = settings.get_current_profile_name()
FUZZ = settings.get_profile(PROFILE if PROFILE in ("brief", "deep") else "fuzz")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "channels_last", "strided", "pooled axes first")
STEP = 1e-6


@dataclass(frozen=True)
class Case:
    """One call, as plain values."""

    shape: tuple[int, ...]
    windows: Any
    reduction: Any
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    kind: str = "normal"
    num_threads: int = 1
    masked: bool = False
    weighted: bool = False
    per_channel: bool = False
    grad: bool = False
    fill: float = 0.0
    forced: bool = False
    """Whether Numba's kernels are asked for even where something else is the faster way."""
    seed: int = 0


# Drawing cases


@st.composite
def _axis(draw: Any, longest: int) -> tuple[int, int, int, tuple[int, int], int]:
    kernel = draw(st.integers(1, draw(st.sampled_from((3, 3, longest)))))
    dilation = draw(st.sampled_from((1, 1, 1, 2, 3)))
    stride = draw(st.sampled_from((1, 1, 2, 2, 3, kernel, kernel + 2)))
    pad = st.integers(0, draw(st.sampled_from((0, kernel // 2, kernel + 1))))
    before = draw(pad)
    after = draw(st.sampled_from((before, before, draw(pad))))
    reach = dilation * (kernel - 1) + 1
    size = max(draw(st.integers(1, longest)), reach - before - after)
    return size, kernel, stride, (before, after), dilation


@st.composite
def _geometry(draw: Any) -> tuple[tuple[int, ...], Any]:
    """(N, C, *S) and windows; now and then many channels or a long last axis, which is where vector
    code runs."""
    num_axes = draw(st.sampled_from((1, 2, 2, 2, 3)))
    longest = [{1: 12, 2: 6, 3: 4}[num_axes]] * num_axes
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    extent = draw(st.sampled_from(("small", "small", "long", "deep")))
    if extent == "long":
        longest = [2] * (num_axes - 1) + [draw(st.sampled_from((40, 140)))]
        batch = channels = 1
    if extent == "deep":
        longest = [3] * num_axes
        batch, channels = 1, draw(st.integers(8, 33))
    kind = draw(st.sampled_from(("window", "window", "window", "adaptive", "global")))
    if kind == "window":
        axes = [draw(_axis(top)) for top in longest]
        sizes, kernels, strides, pads, dilations = zip(*axes, strict=True)
        ceil = draw(st.booleans())
        return (batch, channels, *sizes), tp.Window(kernels, strides, pads, dilations, ceil)
    sizes = tuple(draw(st.integers(1, top)) for top in longest)
    if kind == "global":
        return (batch, channels, *sizes), tp.Global()
    outs = tuple(draw(st.integers(1, size + 1)) for size in sizes)
    return (batch, channels, *sizes), tp.Adaptive(outs)


def _cases(reductions: Any, variants: Any = None, **fields: Any) -> Any:
    """Cases of some reductions; a field that is not given is drawn or keeps its default.

    Args:
        variants: if given, what dtype, mask, weights and threads are drawn from together.
    """
    drawn = {
        "layout": st.sampled_from(LAYOUTS),
        "grad": st.booleans(),
        "fill": st.sampled_from((0.0, -1.5)),
        "forced": st.booleans(),
        "seed": st.integers(0, 1000),
    }
    if variants is None:
        drawn["dtype"] = st.sampled_from(FLOATS)
        drawn["num_threads"] = st.sampled_from((1, 2))
        drawn["masked"] = drawn["weighted"] = st.booleans()
        variants = ({},)
    return st.builds(
        lambda geometry, reduction, variant, **rest: Case(*geometry, reduction, **variant, **rest),
        _geometry(),
        st.sampled_from(reductions),
        st.sampled_from(variants),
        **{**drawn, **fields},
    )


# Each of these is a kernel of its own, which has to be compiled, for every formula.
FORMULA_VARIANTS = (
    {"num_threads": 1},
    {"num_threads": 2},
    {"masked": True},
    {"weighted": True},
    {"masked": True, "weighted": True},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16, "masked": True, "weighted": True},
)
SELECTIONS = _cases(
    (tp.Max(), tp.Min()), kind=st.sampled_from(("normal", "ties", "ties", "special"))
)
SUM_VARIANTS = (
    *({"dtype": dtype, "num_threads": n} for dtype in FLOATS for n in (1, 2)),
    {"masked": True},
    {"weighted": True},
    {"masked": True, "weighted": True, "dtype": torch.float64},
    {"masked": True, "dtype": torch.bfloat16},
    {"weighted": True, "dtype": torch.float16},
)
SUMS = _cases(
    (tp.Sum(), tp.Mean()), SUM_VARIANTS, kind=st.sampled_from(("normal", "ties", "special"))
)
DIVISORS = _cases(
    (tp.Mean(count_include_pad=True), tp.Mean(divisor=3.0), tp.Mean(True, 2.0)),
    masked=st.just(False),
    weighted=st.just(False),
)
POWERS = _cases(
    (tp.Lp(2.0), tp.Lp(1.0), tp.Lp(0.7), tp.Lp(3.5), tp.PowerMean(3.0), tp.PowerMean(-1.0)),
    FORMULA_VARIANTS,
    kind=st.just("positive"),
    per_channel=st.booleans(),
)
EXPONENTIALS = _cases(
    (tp.LogMeanExp(2.0), tp.LogMeanExp(-0.5), tp.SoftmaxMean(1.5), tp.SoftmaxMean(-2.0)),
    FORMULA_VARIANTS,
    per_channel=st.booleans(),
)
SPREADS = _cases((tp.Var(), tp.Std(), tp.Var(1.0), tp.Std(1.0)), FORMULA_VARIANTS)
WHOLE = _cases(
    (tp.Max(), tp.Min(), tp.Sum(), tp.Mean(), tp.Lp(2.0), tp.Var()),
    dtype=st.sampled_from(INTEGERS),
    kind=st.just("ties"),
    fill=st.sampled_from((0.0, 3.0)),
    weighted=st.just(False),
    grad=st.just(False),
)
BOOLS = _cases(
    (tp.Max(), tp.Min()),
    dtype=st.just(torch.bool),
    kind=st.just("ties"),
    fill=st.sampled_from((0.0, 1.0)),
    grad=st.just(False),
)


# What must come out


def _taps(case: Case) -> list[oracle.Taps]:
    sizes, w = case.shape[2:], case.windows
    if isinstance(w, tp.Global):
        return [[list(range(size))] for size in sizes]
    if isinstance(w, tp.Adaptive):
        return [oracle.adaptive(s, o) for s, o in zip(sizes, w.output_size, strict=True)]
    rows = zip(sizes, w.kernel, w.stride, w.padding, w.dilation, strict=True)
    return [oracle.regular(s, k, st_, *pads, d, w.ceil_mode) for s, k, st_, pads, d in rows]


def _divisors(case: Case, taps: list[oracle.Taps]) -> np.ndarray | float:
    """What Mean(count_include_pad or divisor) divides a sum by; windows without an element: inf."""
    sizes = case.shape[2:]
    inside = [
        [sum(0 <= q < size for q in window) for window in axis]
        for axis, size in zip(taps, sizes, strict=True)
    ]
    counts = inside
    if case.reduction.count_include_pad and isinstance(case.windows, tp.Window):
        counts = [
            [sum(q < size + after for q in window) for window in axis]
            for axis, size, (_, after) in zip(taps, sizes, case.windows.padding, strict=True)
        ]
    divisor = math.prod(np.ix_(*map(np.array, counts)))
    if case.reduction.divisor is not None:
        divisor = np.full(np.shape(divisor), case.reduction.divisor)
    empty = math.prod(np.ix_(*map(np.array, inside))) == 0
    return np.where(empty, np.inf, divisor)


@dataclass(frozen=True)
class Arrays:
    """The numbers of a case in float64, as the oracle takes them."""

    x: np.ndarray
    mask: np.ndarray | None
    weights: np.ndarray | None
    p: np.ndarray | None


def _expected(case: Case, taps: list[oracle.Taps], at: Arrays) -> tuple[np.ndarray, np.ndarray]:
    name = type(case.reduction).__name__
    own_divisor = name == "Mean" and case.reduction != tp.Mean()
    if own_divisor:
        sums, none = oracle.pool(at.x, taps, "Sum")
        divisor = _divisors(case, taps)
        return np.where(np.isinf(divisor), case.fill, sums / divisor), none
    p = 0.0 if at.p is None else at.p
    return oracle.pool(at.x, taps, name, p, at.mask, at.weights, case.fill)


# Running a case


def _inputs(case: Case) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = numbers(case.shape, case.seed, case.kind)
    generator = torch.Generator().manual_seed(case.seed + 1)
    if not case.dtype.is_floating_point:
        x = x.abs() if case.dtype in (torch.uint8, torch.bool) else x
        if case.dtype == torch.bool:
            x = x > 1
    mask = torch.rand(case.shape, generator=generator) > 0.4 if case.masked else None
    weights = None
    if case.weighted:
        weights = (
            torch.rand(case.shape, generator=generator, dtype=torch.float64) * 1.5 + 0.25
        ).to(case.dtype if case.dtype.is_floating_point else torch.float32)
        weights[torch.rand(case.shape, generator=generator) < 0.25] = 0
    return x.to(case.dtype), mask, weights


def _reduction(case: Case) -> Any:
    """The reduction with its parameter as a tensor where that is asked for."""
    if not case.per_channel:
        return case.reduction
    channels = case.shape[1]
    p = case.reduction.value * torch.linspace(1.0, 1.3, channels, dtype=torch.float64)
    return case.reduction.replace(p)


def _pool(case: Case, x: Tensor, mask: Any, weights: Any, reduction: Any) -> tuple[Tensor, Any]:
    indices = isinstance(reduction, (tp.Max, tp.Min))
    options: dict[str, Any] = {"fill": case.fill, "return_indices": indices}
    if case.layout == "pooled axes first":
        options["dims"] = tuple(range(1, x.ndim - 1))
        x, mask, weights = (None if t is None else t.movedim(1, -1) for t in (x, mask, weights))
    result = tp.pool(x, reduction, case.windows, mask=mask, weights=weights, **options)
    y, where = result if indices else (result, None)
    if case.layout == "pooled axes first":
        y, where = y.movedim(-1, 1), None if where is None else where.movedim(-1, 1)
    return y, where


def _with_backend(case: Case, *arguments: Any) -> tuple[Tensor, Any]:
    if not case.forced:
        return _pool(case, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHPOOL_BACKEND", "cpu")
        try:
            return _pool(case, *arguments)
        except ValueError as refusal:
            if "does not serve this case" not in str(refusal):
                raise
    return _pool(case, *arguments)


@dataclass(frozen=True)
class Results:
    """What a call gave."""

    y: Tensor
    indices: Tensor | None
    upstream: Tensor | None
    grads: tuple[Tensor | None, ...]
    """By x, weights and the parameter; None where there is none."""


def _run(case: Case) -> Results:
    x, mask, weights = _inputs(case)
    x = laid_out(x, case.layout)
    reduction = _reduction(case)
    leaves = [x, weights, reduction.value if case.per_channel else None]
    if case.grad:
        leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
        x, weights = leaves[0], leaves[1]
        reduction = reduction.replace(leaves[2]) if case.per_channel else reduction
    torch.set_num_threads(case.num_threads)
    y, indices = _with_backend(case, x, mask, weights, reduction)
    if not case.grad:
        return Results(y, indices, None, ())
    upstream = numbers(tuple(y.shape), case.seed + 2, "ties").to(y.dtype) / 4
    selects = isinstance(reduction, (tp.Max, tp.Min))
    wanted = [t for i, t in enumerate(leaves) if t is not None and not (i == 1 and selects)]
    found = iter(torch.autograd.grad(y, wanted, upstream))
    grads = tuple(
        None if t is None or (i == 1 and selects) else next(found) for i, t in enumerate(leaves)
    )
    return Results(y.detach(), indices, upstream, grads)


def check(case: Case) -> None:
    """Compares a call with the oracle: values, winners, gradients; and the bits of several threads
    with those of one."""
    results = _run(case)
    x, mask, weights = _inputs(case)
    value = _reduction(case).value
    at = Arrays(
        x.double().numpy(),
        None if mask is None else mask.numpy(),
        None if weights is None else weights.double().numpy(),
        None if value is None else np.asarray(value, dtype=np.float64),
    )
    taps = _taps(case)
    values, winners = _expected(case, taps, at)
    _check_values(case, results, values, winners)
    if case.grad:
        _check_finite(case, results)
        if results.indices is not None:
            _check_selection_gradient(case, results, winners)
        elif case.kind in ("normal", "positive"):
            _check_slope(case, results, taps, at)
    if case.num_threads > 1:
        other = _run(replace(case, num_threads=1))
        for one, two in zip((results.y, *results.grads), (other.y, *other.grads), strict=True):
            assert _same_bits(one, two), "one thread gives other bits"


def _check_values(case: Case, results: Results, values: np.ndarray, winners: np.ndarray) -> None:
    y = results.y
    sums_whole = isinstance(case.reduction, tp.Sum) and not case.dtype.is_floating_point
    whole = not case.dtype.is_floating_point
    exact = isinstance(case.reduction, (tp.Max, tp.Min, tp.Sum, tp.Mean))
    dtype = torch.int64 if sums_whole else case.dtype if exact or not whole else torch.float32
    assert y.dtype == dtype
    if results.indices is not None:
        np.testing.assert_array_equal(results.indices.numpy(), winners)
    if whole and exact:
        np.testing.assert_array_equal(y.long().numpy(), np.trunc(values).astype(np.int64))
        return
    tolerance = {"rtol": 0, "atol": 0} if results.indices is not None else TOLERANCE[dtype]
    torch.testing.assert_close(y.double(), torch.from_numpy(values), equal_nan=True, **tolerance)


def _check_finite(case: Case, results: Results) -> None:
    if case.kind != "special":
        assert all(g is None or bool(g.isfinite().all()) for g in results.grads)


def _check_selection_gradient(case: Case, results: Results, winners: np.ndarray) -> None:
    assert results.upstream is not None
    sent = results.upstream.double().numpy()
    wanted = np.zeros((*case.shape[:2], math.prod(case.shape[2:])))
    for place in np.ndindex(*winners.shape):
        if winners[place] >= 0:
            wanted[(*place[:2], winners[place])] += sent[place]
    (gx, *_) = results.grads
    assert gx is not None
    np.testing.assert_array_equal(gx.double().numpy(), wanted.reshape(case.shape))


def _check_slope(case: Case, results: Results, taps: list[oracle.Taps], at: Arrays) -> None:
    """The gradients along one random direction against central differences of the oracle."""
    generator = np.random.default_rng(case.seed)
    dx = generator.standard_normal(at.x.shape)
    dw = None if at.weights is None else generator.standard_normal(at.x.shape) * (at.weights != 0)
    dp = None if not case.per_channel or at.p is None else generator.standard_normal(at.p.shape)
    upstream = results.upstream
    assert upstream is not None

    def loss(step: float) -> float:
        moved = Arrays(
            at.x + step * dx,
            at.mask,
            at.weights if dw is None else at.weights + step * dw,  # type: ignore[operator]
            at.p if dp is None else at.p + step * dp,  # type: ignore[operator]
        )
        return float((_expected(case, taps, moved)[0] * upstream.double().numpy()).sum())

    parts = [
        g.double().numpy() * d
        for g, d in zip(results.grads, (dx, dw, dp), strict=True)
        if g is not None and d is not None
    ]
    found = sum(float(part.sum()) for part in parts)
    size = sum(float(np.abs(part).sum()) for part in parts)
    wanted = (loss(STEP) - loss(-STEP)) / (2 * STEP)
    allowed = max(TOLERANCE[case.dtype]["rtol"], 1e-6) * (1 + 4 * size)
    assert abs(found - wanted) <= allowed, f"slope {found}, by differences {wanted}"


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(torch.nan_to_num(a, nan=7.5), torch.nan_to_num(b, nan=7.5))


# The tests


@pytest.fixture(autouse=True, scope="module")
def parallel_however_small() -> Iterator[None]:
    """Lets tiny inputs run on two threads, and leaves threads and environment as they were."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "PARALLEL_BYTES", 0)
        yield
    torch.set_num_threads(before)
    assert "TORCHPOOL_BACKEND" not in os.environ


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(SELECTIONS, id="selections"),
        pytest.param(SUMS, id="sums"),
        pytest.param(DIVISORS, id="divisors"),
        pytest.param(POWERS, id="powers"),
        pytest.param(EXPONENTIALS, id="exponentials"),
        pytest.param(SPREADS, id="spreads"),
        pytest.param(WHOLE, id="integers"),
        pytest.param(BOOLS, id="bools"),
    ],
)
def test_pool_equals_the_oracle(family: Any) -> None:
    @FUZZ
    @given(case=family)
    def holds(case: Case) -> None:
        check(case)

    holds()
