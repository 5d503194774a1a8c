"""Every backend × reduction × windows × layout × dtype against the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import (
    ACCUMULATIONS,
    GEOMETRIES,
    LAYOUTS,
    SELECTIONS,
    TOLERANCE,
    Geometry,
    laid_out,
    numbers,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchpool as tp

names = {"ids": lambda v: v.name if isinstance(v, Geometry) else str(v)}


def expected(x, geometry, reduction, **options):  # type: ignore[no-untyped-def]
    p = reduction.value if reduction.value is not None else 0.0
    p = p.detach().numpy() if isinstance(p, torch.Tensor) else p
    y, i = oracle.pool(x.double().numpy(), geometry.taps, type(reduction).__name__, p, **options)
    return torch.from_numpy(y), torch.from_numpy(i)


@pytest.mark.parametrize("geometry", GEOMETRIES, **names)
@pytest.mark.parametrize("reduction", SELECTIONS, **names)
@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_selection(backend, geometry, reduction, kind, layout):
    x = numbers(geometry.shape, 1, kind)
    _, where = expected(x, geometry, reduction)
    for dtype in (torch.float32, torch.float64):
        given_x = laid_out(x.to(dtype), layout)
        y, i = tp.pool(given_x, reduction, geometry.windows, return_indices=True)
        assert torch.equal(
            torch.nan_to_num(y, nan=7.5),
            torch.nan_to_num(expected(given_x, geometry, reduction)[0].to(dtype), nan=7.5),
        )
        assert torch.equal(i, where)
        values = tp.pool(given_x, reduction, geometry.windows)
        assert torch.equal(torch.nan_to_num(values, nan=7.5), torch.nan_to_num(y, nan=7.5))
        if layout != "strided":
            assert y.stride() == laid_out(y, layout).stride()


@pytest.mark.parametrize("geometry", GEOMETRIES, **names)
@pytest.mark.parametrize("reduction", ACCUMULATIONS, **names)
def test_accumulation(backend, geometry, reduction):
    x = numbers(geometry.shape, 2)
    for dtype, layout in (
        (torch.float64, "contiguous"),
        (torch.float32, "channels_last"),
        (torch.float64, "strided"),
    ):
        given_x = laid_out(x.to(dtype), layout)
        y = tp.pool(given_x, reduction, geometry.windows)
        torch.testing.assert_close(
            y.double(), expected(given_x, geometry, reduction)[0], **TOLERANCE[dtype]
        )
        assert y.dtype == dtype


@pytest.mark.parametrize("reduction", [*SELECTIONS, *ACCUMULATIONS], **names)
@pytest.mark.parametrize("geometry", GEOMETRIES[:8], **names)
def test_masks_and_weights_hide_what_they_exclude(backend, geometry, reduction):
    x = numbers(geometry.shape, 3)
    mask = numbers(geometry.shape, 4) > 0
    mask[0, 0] = False
    weights = numbers(geometry.shape, 5, "positive") * (numbers(geometry.shape, 6) > -1)
    hidden = torch.where(mask, x, math.nan)
    y = tp.pool(hidden, reduction, geometry.windows, mask=mask)
    torch.testing.assert_close(
        y, expected(x, geometry, reduction, mask=mask.numpy())[0], **TOLERANCE[x.dtype]
    )
    y = tp.pool(hidden, reduction, geometry.windows, mask=mask, fill=-3.0)
    torch.testing.assert_close(
        y, expected(x, geometry, reduction, mask=mask.numpy(), fill=-3.0)[0], **TOLERANCE[x.dtype]
    )
    hidden = torch.where(weights != 0, x, math.nan)
    y = tp.pool(hidden, reduction, geometry.windows, weights=weights)
    torch.testing.assert_close(
        y, expected(x, geometry, reduction, weights=weights.numpy())[0], **TOLERANCE[x.dtype]
    )


DIFFERENTIATED = {  # as among GEOMETRIES, and smaller: every element is moved twice
    "dilated": ((1, 2, 7, 6), tp.Window((3, 2), (2, 1), 1, (2, 3))),
    "one-sided padding": ((1, 2, 4, 5), tp.Window(3, 2, ((2, 0), (0, 5)))),
    "adaptive": ((1, 2, 5, 7), tp.Adaptive((3, 4))),
    "1-D": ((1, 3, 13), tp.Window(4, 3, 1)),
}


@pytest.mark.parametrize("reduction", [*SELECTIONS, *ACCUMULATIONS], **names)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients(backend, name, reduction):
    shape, windows = DIFFERENTIATED[name]
    kind = "positive" if isinstance(reduction, tp.PowerMean) else "normal"
    x = numbers(shape, 7, kind).requires_grad_()
    mask = numbers(shape, 8) > -0.8

    def run(t):
        return tp.pool(t, reduction, windows)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradcheck(lambda t: tp.pool(t, reduction, windows, mask=mask), x)


@pytest.mark.parametrize(
    ("reduction", "theirs"),
    [
        (tp.Mean(), lambda x: F.avg_pool2d(x, 7)),
        (tp.Max(), lambda x: F.max_pool2d(x, 7)),
        (tp.Lp(2.0), lambda x: F.lp_pool2d(x, 2.0, 7)),
    ],
    ids=["Mean", "Max", "Lp"],
)
@pytest.mark.parametrize("windows", [tp.Global(), tp.Adaptive(1), tp.Window(7, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_one_window_lies_as_the_input_does(
    backend, layout, windows, reduction, theirs
):
    x = numbers((2, 5, 7, 7), 8).contiguous(memory_format=layout).requires_grad_()
    y = tp.pool(x, reduction, windows)
    upstream = torch.randn_like(y).requires_grad_()
    (gx,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    assert gx.stride() == x.stride()
    wanted = theirs(x)
    (wanted_gx,) = torch.autograd.grad(wanted, x, upstream, create_graph=True)
    torch.testing.assert_close((y, gx), (wanted, wanted_gx))
    second = [torch.autograd.grad(g.square().sum(), upstream)[0] for g in (gx, wanted_gx)]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("reduction", [*SELECTIONS, *ACCUMULATIONS], **names)
def test_second_derivatives_and_weights(backend, reduction):
    kind = "positive" if isinstance(reduction, tp.PowerMean) else "normal"
    x = numbers((1, 2, 3, 4), 9, kind).requires_grad_()
    weights = numbers((1, 2, 3, 4), 10, "positive").requires_grad_()
    window = tp.Window((2, 3), 2, padding=((1, 0), 1))
    assert torch.autograd.gradgradcheck(lambda t: tp.pool(t, reduction, window), x)
    if isinstance(reduction, tp.Accumulation):
        assert torch.autograd.gradcheck(
            lambda t, w: tp.pool(t, reduction, window, weights=w), (x, weights)
        )
        assert torch.autograd.gradgradcheck(
            lambda t, w: tp.pool(t, reduction, window, weights=w), (x, weights)
        )


@pytest.mark.parametrize(
    "reduction", [r for r in ACCUMULATIONS if r.parameter in ("p", "beta")], **names
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_parameters_get_gradients(backend, reduction, per_channel):
    shape = (1, 3, 4, 5)
    x = numbers(shape, 11, "positive").requires_grad_()
    p = torch.tensor(
        [0.7, 1.9, 2.4] if per_channel else 1.3, dtype=torch.float64, requires_grad=True
    )
    taps = [oracle.regular(4, 3, 2, 1, 1, 1, False), oracle.regular(5, 3, 2, 1, 1, 1, False)]
    window = tp.Window(3, 2, 1)
    geometry = Geometry("", shape, window, taps)
    y = tp.pool(x, reduction.replace(p), window)
    torch.testing.assert_close(
        y.detach(), expected(x.detach(), geometry, reduction.replace(p))[0], **TOLERANCE[x.dtype]
    )
    assert torch.autograd.gradcheck(lambda t, q: tp.pool(t, reduction.replace(q), window), (x, p))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", [*SELECTIONS, *ACCUMULATIONS], **names)
def test_half_types_are_computed_in_float32(backend, reduction, dtype, layout):
    geometry = GEOMETRIES[1]
    x = laid_out(numbers(geometry.shape, 12, "positive").to(dtype), layout)
    y = tp.pool(x, reduction, geometry.windows)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected(x, geometry, reduction)[0], **TOLERANCE[dtype])


INTEGERS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool])
def test_whole_numbers(backend, dtype, layout):
    geometry = GEOMETRIES[2]
    x = numbers(geometry.shape, 13).mul(40).abs().round()
    x = (x > 20 if dtype == torch.bool else x.clamp(max=120)).to(dtype)
    if dtype.is_signed:
        x = x - (x % 3) * 40
    x = laid_out(x, layout)
    wide = x.to(torch.float64)
    for reduction in SELECTIONS:
        y, i = tp.pool(x, reduction, geometry.windows, return_indices=True)
        want, where = expected(wide, geometry, reduction)
        assert y.dtype == dtype
        assert torch.equal(y.to(torch.float64), want)
        assert torch.equal(i, where)
    y = tp.pool(x, tp.Sum(), geometry.windows)
    assert y.dtype == torch.int64
    assert torch.equal(y, expected(wide, geometry, tp.Sum())[0].long())
    mean = expected(wide, geometry, tp.Mean())[0]
    if dtype == torch.bool:
        torch.testing.assert_close(
            tp.pool(x, tp.Mean(), geometry.windows).double(), mean, rtol=1e-6, atol=1e-6
        )
    else:
        assert torch.equal(tp.pool(x, tp.Mean(), geometry.windows).to(torch.float64), mean.trunc())


EXTREMES = [
    (tp.Lp(3.0), [0.0, 0.0, 0.0, 0.0], 0.0),
    (tp.Lp(3.0), [-1.0, -2.0, 0.0, 0.0], 9 ** (1 / 3)),
    (tp.Lp(8.0), [1e30, 1e30, 0.0, 0.0], 1e30 * 2 ** (1 / 8)),
    (tp.Lp(math.inf), [-5.0, 1.0, 2.0, 3.0], 5.0),
    (tp.PowerMean(math.inf), [0.5, 1.0, 2.0, 3.0], 3.0),
    (tp.PowerMean(-math.inf), [0.5, 1.0, 2.0, 3.0], 0.5),
    (tp.PowerMean(9.0), [1e30, 1e30, 1e30, 1e30], 1e30),
    (tp.PowerMean(3.0), [-1.0, -1.0, -1.0, -1.0], 1e-6),
    (tp.LogMeanExp(1e4), [0.0, 1.0, 2.0, 3.0], 3.0 - math.log(4) / 1e4),
    (tp.LogMeanExp(1e-12), [0.0, 1.0, 2.0, 3.0], 1.5),
    (tp.LogMeanExp(1.0), [1e4, 1e4, 1e4, 1e4], 1e4),
    (tp.SoftmaxMean(1e4), [0.0, 1.0, 2.0, 3.0], 3.0),
    (tp.SoftmaxMean(math.inf), [0.0, 1.0, 3.0, 3.0], 3.0),
    (tp.SoftmaxMean(-math.inf), [0.0, 1.0, 2.0, 3.0], 0.0),
    (tp.SoftmaxMean(0.0), [0.0, 1.0, 2.0, 3.0], 1.5),
    (tp.SoftmaxMean(1.0), [-math.inf, 1.0, 1.0, -math.inf], 1.0),
    (tp.SoftmaxMean(1.0), [math.inf, 1.0, 1.0, 0.0], math.inf),
    (tp.LogMeanExp(1.0), [-math.inf] * 4, -math.inf),
    (tp.Var(), [1e8, 1e8, 1e8, 1e8], 0.0),
    (tp.Std(), [2.0, 2.0, 2.0, 2.0], 0.0),
    (tp.Sum(), [math.inf, 1.0, 1.0, 1.0], math.inf),
]


@pytest.mark.parametrize(("reduction", "window", "want"), EXTREMES, ids=str)
def test_extremes_stay_finite_and_have_finite_gradients(backend, reduction, window, want):
    x = torch.tensor(window, dtype=torch.float32).reshape(1, 1, 4).requires_grad_()
    y = tp.pool(x, reduction, tp.Global())
    torch.testing.assert_close(y.item(), want, rtol=2e-6, atol=2e-6)
    y.backward()
    if all(map(math.isfinite, window)):
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("reduction", [*SELECTIONS, *ACCUMULATIONS], **names)
def test_nan_makes_its_windows_nan_and_no_others(backend, reduction):
    x = numbers((1, 2, 6, 6), 14, "positive")
    x[0, 0, 2, 3] = math.nan
    y = tp.pool(x, reduction, tp.Window(2))
    assert y[0, 0, 1, 1].isnan()
    assert y.isnan().sum() == 1


def test_sums_do_not_cancel(backend):
    x = torch.ones(1, 1, 64)
    x[0, 0, 10] = 1e12
    y = tp.pool(x, tp.Sum(), tp.Window(3, 1))
    assert torch.equal(y[0, 0, 11:], torch.full((51,), 3.0))
    assert torch.equal(
        tp.pool(torch.ones(1, 1, 64, 64, dtype=torch.float16), tp.Mean(), tp.Global()),
        torch.ones(1, 1, 1, 1, dtype=torch.float16),
    )


def test_any_axes_are_pooled_where_they_are(backend):
    tokens = numbers((2, 7, 5), 15)
    assert torch.equal(
        tp.pool(tokens, tp.Max(), tp.Window(3, 2), dims=(1,)),
        tp.pool(tokens.transpose(1, 2), tp.Max(), tp.Window(3, 2)).transpose(1, 2),
    )
    images = numbers((2, 6, 8, 3), 16)
    got = tp.pool(images, tp.Mean(), tp.Adaptive((2, 3)), dims=(1, 2))
    torch.testing.assert_close(
        got, tp.pool(images.permute(0, 3, 1, 2), tp.Mean(), tp.Adaptive((2, 3))).permute(0, 2, 3, 1)
    )
    swapped = tp.pool(images, tp.Max(), tp.Window((2, 4)), dims=(2, 1))
    assert torch.equal(
        swapped,
        tp.pool(images.permute(0, 3, 2, 1), tp.Max(), tp.Window((2, 4))).permute(0, 3, 2, 1),
    )
    line = numbers((9,), 17)
    assert tp.pool(line, tp.Max(), tp.Global(), dims=0).item() == line.max()
    unbatched = numbers((3, 6, 6), 18)
    assert torch.equal(
        tp.pool(unbatched, tp.Max(), tp.Window((2, 2))),
        tp.pool(unbatched[None], tp.Max(), tp.Window(2))[0],
    )
    assert tp.pool(torch.zeros(0, 3, 4, 4), tp.Max(), tp.Window(2)).shape == (0, 3, 2, 2)
    assert tp.pool(torch.zeros(2, 0, 4, 4), tp.Mean(), tp.Window(2)).shape == (2, 0, 2, 2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "reduction", [tp.Max(), tp.Mean(), tp.SoftmaxMean(2.0), tp.Lp(3.0)], **names
)
def test_same_bits_on_any_number_of_threads(reduction, threads):
    x = numbers((3, 16, 65, 67), 19).float().requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            y = tp.pool(x, reduction, tp.Window(3, 2, 1))
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for pair in results[1:] for a, b in zip(pair, results[0], strict=True)
    )


@dataclass(frozen=True)
class HarmonicMean(tp.Accumulation):
    """The example of docs/own-reduction.md."""

    def lift(x, a, p):
        return (1 / x,)

    def lift_dx(x, a, p):
        return (-1 / (x * x),)

    def finish(s, n, a, p):
        return n / s[0]

    def finish_grad(s, n, a, p):
        return (-n / (s[0] * s[0]),), 1 / s[0], 0.0


@dataclass(frozen=True)
class Loudest(tp.Selection):
    """The element of largest magnitude."""

    def key(x):
        return abs(x)


def test_own_reductions(backend):
    geometry = GEOMETRIES[1]
    x = numbers(geometry.shape, 20, "positive").requires_grad_()
    oracle.FORMULAS["HarmonicMean"] = lambda v, w, p: float(w.sum() / (w / v).sum())
    y = tp.pool(x, HarmonicMean(), geometry.windows)
    torch.testing.assert_close(
        y.detach(), expected(x.detach(), geometry, HarmonicMean())[0], **TOLERANCE[x.dtype]
    )
    mask = numbers(geometry.shape, 21) > 0
    assert torch.autograd.gradcheck(
        lambda t: tp.pool(t, HarmonicMean(), geometry.windows, mask=mask), x
    )
    assert torch.autograd.gradgradcheck(
        lambda t: tp.pool(t, HarmonicMean(), tp.Window(2)),
        x[:1, :1, :4, :4].detach().requires_grad_(),
    )
    z = numbers(geometry.shape, 22)
    y, i = tp.pool(z, Loudest(), geometry.windows, return_indices=True)
    want, where = oracle.pool(z.numpy(), geometry.taps, "Max", better=lambda v, b: abs(v) > abs(b))
    assert torch.equal(y, torch.from_numpy(want))
    assert torch.equal(i, torch.from_numpy(where))


class Undecorated(tp.Selection):
    """Lacks @dataclass(frozen=True)."""


@dataclass
class Thawed(tp.Selection):
    """The same."""


@pytest.mark.parametrize("kind", [Undecorated, Thawed])
def test_own_reductions_that_are_no_frozen_dataclasses(kind):
    with pytest.raises(TypeError, match=rf"{kind.__name__} .*@dataclass\(frozen=True\)"):
        tp.pool(torch.zeros(1, 1, 4), kind(), tp.Window(2))


@st.composite
def problems(draw):
    d = draw(st.integers(1, 3))
    axes, taps, sizes = [], [], []
    for _ in range(d):
        size = draw(st.integers(1, 12 if d < 3 else 6))
        kernel, stride, dilation = (
            draw(st.integers(1, 5)),
            draw(st.integers(1, 4)),
            draw(st.integers(1, 3)),
        )
        before, after = draw(st.integers(0, 6)), draw(st.integers(0, 6))
        before = max(before, dilation * (kernel - 1) + 1 - size - after)
        sizes.append(size)
        axes.append((kernel, stride, (before, after), dilation))
        taps.append((size, kernel, stride, before, after, dilation))
    ceil = draw(st.booleans())
    kernels, strides, paddings, dilations = zip(*axes, strict=True)
    window = tp.Window(kernels, strides, paddings, dilations, ceil)
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *sizes)
    geometry = Geometry("", shape, window, [oracle.regular(*t, ceil) for t in taps])
    kind = draw(st.sampled_from(["normal", "ties", "special"]))
    return (
        geometry,
        draw(st.sampled_from(SELECTIONS + ACCUMULATIONS)),
        kind,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 99)),
    )


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(problems())
def test_any_geometry(problem):
    geometry, reduction, kind, layout, seed = problem
    selects = isinstance(reduction, tp.Selection)
    x = laid_out(numbers(geometry.shape, seed, kind if selects else "normal"), layout)
    want, where = expected(x, geometry, reduction)
    if selects:
        y, i = tp.pool(x, reduction, geometry.windows, return_indices=True)
        assert torch.equal(torch.nan_to_num(y, nan=7.5), torch.nan_to_num(want, nan=7.5))
        assert torch.equal(i, where)
    else:
        y = tp.pool(x, reduction, geometry.windows)
        torch.testing.assert_close(y, want, **TOLERANCE[x.dtype])
    assert y.shape[2:] == geometry.windows.out_size(geometry.shape[2:])


@pytest.mark.parametrize(
    ("broken", "reduction"),
    [
        (lambda taps: [[p + 1 for p in w] for w in taps], tp.Max()),
        (lambda taps: [w[:-1] or w for w in taps], tp.Mean()),
        (lambda taps: [[*w, w[-1]] for w in taps], tp.Sum()),
    ],
    ids=["shifted", "short", "twice"],
)
def test_the_oracle_can_fail(broken, reduction):
    geometry = GEOMETRIES[1]
    x = numbers(geometry.shape, 23)
    wrong = geometry._replace(taps=[broken(geometry.taps[0]), geometry.taps[1]])
    assert not np.allclose(
        tp.pool(x, reduction, geometry.windows), expected(x, wrong, reduction)[0]
    )


def test_the_oracle_sees_a_wrong_tie_and_a_wrong_nan():
    geometry = GEOMETRIES[1]
    x = numbers(geometry.shape, 24, "ties")
    x[0, 0, 3:5, 3:5] = math.nan
    _, i = tp.pool(x, tp.Max(), geometry.windows, return_indices=True)
    _, last = oracle.pool(x.numpy(), geometry.taps, "Max", better=lambda v, b: v >= b)
    assert not torch.equal(i, torch.from_numpy(last))
    y, _ = oracle.pool(np.nan_to_num(x.numpy()), geometry.taps, "Max")
    assert not torch.equal(
        torch.nan_to_num(tp.pool(x, tp.Max(), geometry.windows), nan=7.5), torch.from_numpy(y)
    )


BAD = [
    (lambda x: tp.pool(x, tp.Max(), tp.Window(9)), ValueError, "kernel"),
    (lambda x: tp.pool(x, tp.Max(), tp.Window(0)), ValueError, "kernel=0"),
    (lambda x: tp.pool(x, tp.Max(), tp.Window(2, padding=-1)), ValueError, "padding"),
    (lambda x: tp.pool(x, tp.Max(), tp.Window(2, padding="some")), ValueError, "same_lower"),
    (lambda x: tp.pool(x, tp.Max(), tp.Window((2, 2, 2, 2))), ValueError, "4 axes"),
    (lambda x: tp.pool(x, tp.Max, tp.Window(2)), TypeError, "Max()"),
    (lambda x: tp.pool(x, tp.Max(), 2), TypeError, "windows=2"),
    (lambda x: tp.pool(x.numpy(), tp.Max(), tp.Window(2)), TypeError, "Tensor"),
    (lambda x: tp.pool(x.to(torch.complex64), tp.Max(), tp.Window(2)), TypeError, "complex64"),
    (lambda x: tp.pool(x.to_sparse(), tp.Max(), tp.Window(2)), TypeError, "sparse_coo.*to_dense"),
    (lambda x: tp.max_pool2d(x.to_sparse(), 2), TypeError, "sparse_coo.*to_dense"),
    (lambda x: tp.pool(x.to_mkldnn(), tp.Std(), tp.Window(2)), TypeError, "mkldnn.*to_dense"),
    (
        lambda x: tp.pool(x, tp.Mean(), tp.Window(2), return_indices=True),
        ValueError,
        "return_indices",
    ),
    (lambda x: tp.pool(x, tp.Mean(), tp.Window(2), mask=torch.ones(3)), TypeError, "bool"),
    (
        lambda x: tp.pool(x, tp.Mean(), tp.Window(2), mask=torch.ones(3, dtype=torch.bool)),
        ValueError,
        "broadcast",
    ),
    (
        lambda x: tp.pool(x, tp.Mean(), tp.Window(2), weights=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "floating",
    ),
    (lambda x: tp.pool(x, tp.Lp(torch.ones(2)), tp.Window(2)), ValueError, "per channel"),
    (lambda x: tp.pool(x, tp.Lp(0.0), tp.Window(2)), ValueError, "p=0.0"),
    (lambda x: tp.pool(x, tp.LogMeanExp(math.nan), tp.Window(2)), ValueError, "beta=nan"),
    (lambda x: tp.pool(x, tp.Max(), tp.Window(2), dims=(2, 2)), ValueError, "twice"),
    (lambda x: tp.pool(x, tp.Max(), tp.Window(2), dims=(7,)), ValueError, "out of range"),
    (lambda x: tp.pool(x, tp.Max(), tp.Adaptive(0)), ValueError, "empty output"),
    (lambda x: tp.pool(x[:, :, :0], tp.Max(), tp.Window(2)), ValueError, "size 0"),
    (lambda x: tp.pool(x, tp.Max(), tp.Fractional(2)), ValueError, "output_size"),
    (
        lambda x: tp.pool(x, tp.Max(), tp.Fractional(2, output_ratio=1.5)),
        ValueError,
        "output_ratio",
    ),
    (lambda x: tp.max_pool2d(x, 2, padding=2), ValueError, "half"),
    (lambda x: tp.max_pool2d(x[0, 0, 0], 2), ValueError, "axes"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD, ids=[text for *_, text in BAD])
def test_errors_name_the_argument(call, error, text):
    with pytest.raises(error, match="(?s).*" + text.replace("(", r"\(").replace(")", r"\)")):
        call(torch.randn(1, 3, 4, 4))


def test_explain_says_why_and_a_forced_backend_that_cannot_serve_says_so(monkeypatch):
    x = torch.zeros(2, 3, 8, 8)
    found = tp.explain(x, tp.Max(), tp.Window(2))
    assert found.saved_bytes == 2 * 3 * 4 * 4
    assert tp.explain(x, tp.Mean(), tp.Window(2)).saved_bytes == 0
    assert "kernel 2" in str(found)
    monkeypatch.setenv("TORCHPOOL_BACKEND", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        tp.pool(x, tp.Max(), tp.Window(2))


def test_fractional_windows_are_replayable():
    x = numbers((2, 3, 17, 23), 25)
    a, b = (
        tp.pool(
            x,
            tp.Max(),
            tp.Fractional(2, output_ratio=0.6, generator=torch.Generator().manual_seed(5)),
        )
        for _ in range(2)
    )
    assert torch.equal(a, b)
    y = tp.pool(x, tp.Mean(), tp.Fractional((3, 2), (6, 9), samples=torch.rand(2, 3, 2)))
    assert y.shape == (2, 3, 6, 9)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.uint8, -1.0),
        (torch.int8, 128.0),
        (torch.int32, 0.5),
        (torch.int64, float("nan")),
        (torch.int16, float("inf")),
        (torch.bool, 2.0),
    ],
)
def test_fill_must_fit_the_result(backend, dtype, fill):
    x = torch.zeros(1, 1, 4).to(dtype)
    with pytest.raises(ValueError, match=f"fill={fill!r} is not a value of {dtype}"):
        tp.pool(x, tp.Max(), tp.Window(2), fill=fill)
    mask = torch.tensor([True, True, False, False])
    assert tp.pool(x, tp.Max(), tp.Window(2), mask=mask, fill=1.0).tolist() == [[[0, 1]]]
