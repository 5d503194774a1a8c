"""What `test_gpu.py` runs in processes of its own: every Triton kernel against the oracle, and its
gradients against those of the reference. Tensors that kernels shall fill hold NaN before."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import interpreter
import numpy as np
import oracle
import torch
import triton
import triton.language as tl
from cases import TOLERANCE, Geometry, _a, _w, laid_out, numbers
from torch import Tensor

import torchpool as tp
from torchpool import reductions
from torchpool.kernels import gpu, layout, reference
from torchpool.kernels.gpu import boxes, formulas, small

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("contiguous", "channels_last")
USUAL = [
    _w("2x2/2", (1, 2, 4, 6), 2, 2),
    _w("3x3/2 p1", (1, 3, 5, 6), 3, 2, 1),
    _w("3x3/1 p1", (1, 2, 3, 4), 3, 1, 1),
    _w("ceil", (2, 1, 4, 7), 3, 2, 1, 1, True),
    _w("dilated", (1, 2, 7, 6), (3, 2), (2, 1), 1, (2, 3)),
    _w("only padding", (1, 2, 2, 3), 2, 1, (3, 4)),
    _w("one-sided padding", (1, 2, 3, 4), 3, 2, ((2, 0), (0, 5))),
    _w("gaps", (1, 2, 4, 13), 2, 5),
    _w("1-D", (2, 3, 11), 4, 3, 1),
    _w("3-D", (1, 2, 3, 3, 5), (1, 2, 3), (1, 2, 2), (0, 1, 1)),
    _w("4-D", (1, 1, 2, 3, 2, 4), 2, (2, 1, 2, 2)),
    _a("adaptive", (1, 2, 4, 7), 3, 4),
    _a("adaptive upsampling", (1, 2, 2, 3), 3, 5),
]
LARGE = [  # lanes are taps
    _a("global", (2, 3, 6, 7), 1, 1),
    _a("adaptive large", (1, 2, 9, 14), 1, 2),
    _w("long and dilated", (1, 1, 43), 35, 1, 0, 1),
    _a("adaptive, not dividing", (1, 2, 13, 17), 2, 3),
    _a("adaptive volume, not dividing", (1, 2, 3, 7, 9), 2, 1, 2),
    _w("side by side, padded", (1, 3, 11, 17), (6, 7), (6, 7), (2, 3)),
    _w("side by side, dilated", (1, 2, 12, 26), (6, 7), (9, 13), (1, 0), (2, 2)),
]
APART = [  # an axis at a time
    _w("6x7/1", (1, 2, 4, 5), (6, 7), 1, 3),
    _w("scanned", (1, 2, 23), 17, 1, 8),
    _w("scanned, strided", (1, 2, 40), 33, 3, 16),
    _w("scanned, one-sided", (1, 1, 2, 20), (2, 18), 1, ((1, 0), (17, 0))),
    _w("4x4x4/1", (1, 1, 2, 3, 3), 4, 1, 2),
    _w("7x7/1", (1, 2, 9, 8), 7, 1, 3),
    _w("more windows than a program holds", (1, 1, 1300), 150, 2, 75),
]


@dataclass(frozen=True)
class AbsMax(tp.Selection):
    """The element of largest magnitude."""

    def key(x):
        return abs(x)


@dataclass(frozen=True)
class HarmonicMean(tp.Accumulation):
    """n / Σ 1/x."""

    def lift(x, a, p):
        return (1 / x,)

    def lift_dx(x, a, p):
        return (-1 / (x * x),)

    def finish(s, n, a, p):
        return n / s[0]

    def finish_grad(s, n, a, p):
        return (-n / (s[0] * s[0]),), 1 / s[0], 0.0


def poison() -> None:
    """Makes every new tensor hold what no result has."""
    new_empty, empty = Tensor.new_empty, torch.empty

    def fill(t):
        return t.fill_(float("nan") if t.dtype.is_floating_point else 77)

    Tensor.new_empty = lambda *args, **options: fill(new_empty(*args, **options))  # type: ignore
    torch.empty = lambda *args, **options: fill(empty(*args, **options))


def place(x: Tensor, form: str, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device, in one of the layouts."""
    return layout.dense(laid_out(x.to(dtype or x.dtype), form).to(DEVICE))


def winners(state: Tensor, geometry: Geometry) -> np.ndarray:
    """Flat input positions of offsets, by the oracle's own windows."""
    kernels = [max(map(len, taps)) for taps in geometry.taps]
    flat = np.empty(state.shape, dtype=np.int64)
    for at in np.ndindex(*state.shape):
        taps = np.unravel_index(int(state[at]), kernels)
        windows = zip(geometry.taps, at[2:], taps, strict=True)
        position = [taps_of[o][tap] for taps_of, o, tap in windows]
        inside = all(0 <= p < s for p, s in zip(position, geometry.shape[2:], strict=True))
        flat[at] = np.ravel_multi_index(position, geometry.shape[2:]) if inside else -1
    return flat


def scattered(grad: Tensor, indices: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """What each input is sent."""
    total = np.zeros((*shape[:2], int(np.prod(shape[2:]))))
    for at in np.ndindex(*grad.shape):
        if indices[at] >= 0:
            total[at[0], at[1], indices[at]] += float(grad[at])
    return torch.from_numpy(total.reshape(shape))


def same(got: Tensor, want: np.ndarray | Tensor, dtype: torch.dtype = torch.float64) -> None:
    want = torch.as_tensor(want).to(torch.float64)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.cpu().double(), want, equal_nan=True, **tolerance)


def selects(geometry: Geometry, x: Tensor, reduction: tp.Selection, mask=None, better=None) -> None:
    """Values with and without state, winners, gradients."""
    axes = geometry.windows.axes(geometry.shape[2:])
    name = "Min" if isinstance(reduction, tp.Min) else "Max"
    known = None if mask is None else mask.cpu().numpy()
    want, indices = oracle.pool(
        x.cpu().double().numpy(), geometry.taps, name, mask=known, better=better
    )
    y, state = gpu.select(x, mask, None, reduction, axes, True)
    same(y, want)
    assert y.stride() == layout.empty_like(x, y.shape[2:]).stride()
    found = np.where(indices < 0, -1, winners(state, geometry))
    np.testing.assert_array_equal(found, indices)
    same(gpu.select(x, mask, None, reduction, axes, False)[0], want)
    if not x.dtype.is_floating_point:
        return
    last = layout.is_channels_last(x)
    grad = layout.to_layout(torch.randn(y.shape).to(y), last)
    sent = gpu.select_backward(grad, state, None, axes, last)
    assert layout.is_channels_last(sent) == last
    if mask is not None:  # as autograd does
        sent = sent.masked_fill(~mask, 0)
    same(sent, scattered(grad, indices, geometry.shape), x.dtype)
    assert torch.equal(gpu.select_backward(grad, state, None, axes, last), sent) or mask is not None


def selection() -> None:
    for geometry, form in itertools.product(USUAL, LAYOUTS):
        kind = "special" if form == "contiguous" else "ties"
        x = place(numbers(geometry.shape, 1, kind), form, torch.float32)
        selects(geometry, x, tp.Max() if geometry.name != "3x3/2 p1" else tp.Min())


def large() -> None:
    for geometry, form in itertools.product(LARGE, LAYOUTS):
        first = form == "contiguous"
        x = place(numbers(geometry.shape, 1, "special" if first else "ties"), form)
        selects(geometry, x, tp.Max())
        x = place(numbers(geometry.shape, 2, "positive"), form)
        for reduction in (tp.Mean(), tp.Lp(3.0)) if first else (tp.Mean(), tp.Var()):
            accumulates(geometry, x, reduction)
    x = place(numbers(LARGE[1].shape, 3, "ties"), "contiguous")
    mask = place(torch.rand(LARGE[1].shape) < 0.2, "contiguous")
    selects(LARGE[1], x, tp.Min(), mask)
    accumulates(LARGE[1], x.abs() + 0.1, tp.LogMeanExp(2.0), mask=mask, per_channel=True)


def split() -> None:
    """Large windows whose parts several programs read."""
    boxes._STEPS = 1
    for kind, form, geometry in zip(
        itertools.cycle(("special", "ties", "ties", "special")),
        itertools.cycle(reversed(LAYOUTS)),
        LARGE,
        strict=False,
    ):
        selects(geometry, place(numbers(geometry.shape, 1, kind), form), tp.Max())
        accumulates(geometry, place(numbers(geometry.shape, 2), form), tp.Mean())
    worst = torch.full(LARGE[0].shape, -torch.inf)
    selects(LARGE[0], place(worst, "channels_last"), tp.Max())


def apart() -> None:
    for geometry, form in zip(APART, itertools.cycle(LAYOUTS), strict=False):
        for kind in ("special", "ties"):
            x = place(numbers(geometry.shape, 1, kind), form, torch.float32)
            selects(geometry, x, tp.Max() if kind == "ties" else tp.Min())
        for reduction in (tp.Mean(True), tp.Mean(divisor=3.0)):
            accumulates(geometry, place(numbers(geometry.shape, 2), form), reduction)


def selection_of_everything() -> None:
    """Masks, keys, dtypes."""
    for geometry, form in itertools.product((USUAL[1], USUAL[11]), LAYOUTS):
        x = place(numbers(geometry.shape, 4, "special"), form, torch.float32)
        mask = place(torch.rand(geometry.shape) < 0.4, form)
        selects(geometry, x, tp.Max(), mask)
    sequence = _w("tokens", (2, 3, 5), 5, 5)
    mask = (torch.arange(5) < torch.tensor([[[2]], [[0]]])).to(DEVICE).expand(2, 3, 5)
    selects(sequence, place(numbers(sequence.shape, 5), "channels_last"), tp.Max(), mask)
    x = place(numbers(USUAL[1].shape, 4, "ties"), "contiguous", torch.float32)
    selects(USUAL[1], x, AbsMax(), better=lambda v, b: abs(v) > abs(b))
    selects(LARGE[1], place(numbers(LARGE[1].shape), "contiguous"), AbsMax(), better=_larger)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        x = place(torch.randint(0, 5, USUAL[0].shape), "channels_last", dtype)
        selects(USUAL[0], x, tp.Min() if dtype == torch.uint8 else tp.Max())
    x = place(torch.rand(USUAL[0].shape) < 0.5, "contiguous")
    selects(USUAL[0], x, tp.Max())
    for dtype, form in ((torch.float16, "contiguous"), (torch.bfloat16, "channels_last")):
        selects(USUAL[1], place(numbers(USUAL[1].shape, 6, "special"), form, dtype), tp.Max())
        selects(LARGE[0], place(numbers(LARGE[0].shape, 6, "special"), form, dtype), tp.Max())


def _larger(v, b):
    return abs(v) > abs(b)


def accumulates(
    geometry: Geometry, x: Tensor, reduction, mask=None, weights=None, per_channel=False
) -> None:
    """Values against the oracle, gradients against the reference."""
    axes = geometry.windows.axes(geometry.shape[2:])
    params, p = None, 0.0
    if reduction.parameter is not None:
        p = reduction.value
        params = torch.full((x.shape[1] if per_channel else 1,), float(p)).to(x).double()
        if per_channel:
            params *= torch.linspace(0.8, 1.3, x.shape[1]).to(params)
        params = params.to(layout.compute_dtype(x.dtype))
    case = (mask, weights, params, reduction, axes)
    y, saved = gpu.accumulate(x, *case, True)
    same(y, reference.accumulate(x.double(), *case, False)[0].cpu(), x.dtype)
    known = [None if t is None else t.cpu().numpy() for t in (mask, weights)]
    if type(reduction).__name__ in oracle.FORMULAS and "divisor" not in repr(reduction):
        p = p if params is None else params.cpu().numpy()
        want, _ = oracle.pool(
            x.cpu().double().numpy(), geometry.taps, type(reduction).__name__, p, *known
        )
        same(y, want, x.dtype)
    assert y.stride() == layout.empty_like(x, y.shape[2:]).stride()
    last = layout.is_channels_last(x)
    grad = layout.to_layout(torch.randn(y.shape).to(y), last)
    needs = [True, weights is not None, reduction.domain != -torch.inf]
    keeps_x = not reduction.linear or weights is not None
    args = (x if keeps_x else x.new_empty(0), mask, weights, params)
    got = gpu.accumulate_backward(grad, *args, saved, reduction, axes, needs, last)
    wide = (x.double(), mask, weights, None if params is None else params.double())
    want = reference.accumulate_backward(
        grad.double(), *wide, x.new_empty(0), reduction, axes, needs, last
    )
    for g, w, need in zip(got, want, needs, strict=True):
        if need:
            same(g, w.cpu(), x.dtype)
    assert layout.is_channels_last(got[0]) == last


def accumulation() -> None:
    for geometry, form in zip(USUAL, itertools.cycle(LAYOUTS), strict=False):
        x = place(numbers(geometry.shape, 2, "positive"), form)
        accumulates(geometry, x, tp.Mean())
        if len(geometry.shape) <= 4:
            accumulates(geometry, x, tp.SoftmaxMean(1.5))
    for geometry, form in ((USUAL[1], "contiguous"), (USUAL[11], "channels_last")):
        x = place(numbers(geometry.shape, 2, "positive"), form)
        for reduction in (
            tp.Sum(),
            tp.Mean(True),
            tp.SoftmaxMean(-2.0),
            tp.LogMeanExp(2.0),
            tp.PowerMean(3.0),
            tp.Lp(3.0),
            tp.Var(),
            tp.Std(1.0),
            HarmonicMean(),
        ):
            accumulates(geometry, x, reduction, per_channel=True)


def accumulation_of_everything() -> None:
    """Masks, weights, dtypes, one parameter for all channels."""
    for geometry, form in ((USUAL[1], "contiguous"), (USUAL[11], "channels_last")):
        x = place(numbers(geometry.shape, 3, "positive"), form)
        mask = place(torch.rand(geometry.shape) < 0.6, form)
        weights = place(torch.rand(geometry.shape).double(), form) * mask
        for reduction in (tp.Mean(), tp.SoftmaxMean(1.5), tp.Var()):
            accumulates(geometry, x, reduction, mask=mask)
            accumulates(geometry, x, reduction, weights=weights)
    tokens = _w("tokens", (2, 3, 5), 5, 5)
    x = place(numbers(tokens.shape, 3, "positive"), "channels_last")
    shared = (torch.arange(5) < torch.tensor([[[2]], [[0]]])).to(DEVICE).expand(2, 3, 5)
    accumulates(tokens, x, tp.Mean(), mask=shared)
    accumulates(tokens, x, tp.Lp(2.5), weights=shared.double() * 0.5)
    for dtype, form in ((torch.float16, "contiguous"), (torch.bfloat16, "channels_last")):
        x = place(numbers(USUAL[1].shape, 6, "positive"), form, dtype)
        for reduction in (tp.Mean(), tp.SoftmaxMean(2.0)):
            accumulates(USUAL[1], x, reduction)


@triton.jit
def apply_kernel(x, y, size, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, FUNCTION(tl.load(x + at, mask=at < size)), mask=at < size)


def applied(function, x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The values of a Triton function, and the arguments as rounded to the dtype."""
    given = torch.from_numpy(x).to(DEVICE, dtype)
    y = torch.empty_like(given)
    apply_kernel[(1,)](given, y, len(x), function, triton.next_power_of_2(len(x)))
    return y.cpu().double().numpy(), given.cpu().double().numpy()


def functions() -> None:
    """Exponentials and logarithms: relative errors, against NumPy."""
    small = np.logspace(-30, -1, 200)
    below = np.concatenate([-small, np.linspace(-80, -0.1, 500)])
    around = np.concatenate([below, small, np.linspace(0.1, 80, 300)])
    above_minus_1 = np.concatenate([-small, small, np.linspace(-0.99, 20, 500)])
    positive = np.logspace(-30, 30, 500)
    cases = (
        (formulas._quick_exp, np.exp, around),
        (formulas._quick_expm1, np.expm1, around),
        (formulas._quick_log1p, np.log1p, above_minus_1),
        (formulas._quick_log, np.log, positive),
        (formulas._exp, np.exp, around),
        (formulas._expm1, np.expm1, around),
        (formulas._log1p, np.log1p, above_minus_1),
        (formulas._log, np.log, positive),
    )
    for function, known, grid in cases:
        single = "quick" in function.__name__
        found, x = applied(function, grid, torch.float32 if single else torch.float64)
        error = np.abs(found - known(x)) / np.abs(known(x))
        unit = 1e-6 if single else 2e-15
        # An exponential's argument is rounded after it is scaled.
        allowed = unit * (1 + 0.2 * np.abs(x)) if "exp" in function.__name__ else unit
        assert (error <= allowed).all(), (function.__name__, (error / allowed).max())


KNOWN = (
    tp.SoftmaxMean(1.0),
    tp.SoftmaxMean(-1.5),
    tp.LogMeanExp(2.0),
    tp.LogMeanExp(-0.7),
    tp.PowerMean(2.0),
    tp.PowerMean(3.0),
    tp.PowerMean(2.5),
    tp.PowerMean(-1.0),
    tp.PowerMean(np.inf),
    tp.Lp(2.0),
    tp.Lp(3.0),
    tp.Lp(0.7),
    tp.Lp(np.inf),
    tp.Var(),
    tp.Std(1.0),
)


def forms() -> None:
    """The formulas' short forms: float32, and small whole parameters told by a reduction."""
    for reduction in KNOWN:
        for kind, dtype in itertools.product(("positive", "ties"), (torch.float32, torch.float64)):
            if dtype == torch.float64 and reduction.value not in reductions.SMALL_NUMBERS:
                continue
            x = place(numbers(USUAL[1].shape, 2, kind), "contiguous", dtype)
            weights = torch.rand(x.shape).to(x) if kind == "positive" else None
            accumulates(USUAL[1], x, reduction, weights=weights)
        told = reductions.from_spec(reduction.spec).value
        assert told == (reduction.value if reduction.value in reductions.SMALL_NUMBERS else None)


def extremes() -> None:
    """Float32 windows of zeros, infinities, NaN and the largest numbers."""
    geometry = USUAL[0]
    huge = numbers(geometry.shape, 8, "ties").clamp(-4, 4)
    near_0 = (tp.PowerMean(1e-9), tp.LogMeanExp(1e-30), tp.LogMeanExp(1e-6))
    for kind, reduction in itertools.product(("special", "huge", "tiny"), (*KNOWN, *near_0)):
        if isinstance(reduction, tp.Var) or (kind != "special" and reduction.value in (0.7, 1e-9)):
            continue
        x = numbers(geometry.shape, 8, "special") if kind == "special" else huge
        x = place(x * {"special": 1.0, "huge": 4e37, "tiny": 1e-37}[kind], "contiguous").float()
        p = torch.tensor([reduction.value], dtype=torch.float32, device=DEVICE)
        case = (None, None, p, reduction, geometry.windows.axes(geometry.shape[2:]))
        y, saved = gpu.accumulate(x, *case, True)
        wide = (None, None, p.double(), *case[3:])
        want = reference.accumulate(x.double(), *wide, False)[0]
        same(y, want.float().cpu(), torch.float32)
        if kind != "special":
            args = (x, None, None, p, saved, *case[3:], [True, False, False], False)
            assert gpu.accumulate_backward(torch.ones_like(y), *args)[0].isfinite().all(), reduction


def layers() -> None:
    """Through the public function: autograd, double backward of what is linear, one parameter."""
    x = numbers((2, 3, 5, 6), 7).to(DEVICE).requires_grad_()
    p = torch.tensor(2.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = tp.pool(x, tp.Lp(p), tp.Window(3, 2, 1))
    got = torch.autograd.grad(y.sum(), (x, p))
    value, indices = tp.pool(x, tp.Max(), tp.Window(2), return_indices=True)
    known = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(value, known[0])
    assert torch.equal(indices, known[1])
    assert all(g is not None and g.isfinite().all() for g in got)


CHECKED_FOR_OVERFLOW = (
    "selection",
    "selection_of_everything",
    "accumulation_of_everything",
    "layers",
)
"""Groups that watch every integer, with kernels of all families among them."""


if __name__ == "__main__":
    interpreter.hasten(checks_overflow=sys.argv[1] in CHECKED_FOR_OVERFLOW)
    poison()
    small.BYTES = 0  # tiny inputs are checked, not handed to torch
    with np.errstate(all="ignore"):
        globals()[sys.argv[1]]()
    print("checked")
