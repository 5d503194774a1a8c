"""A call that is made again is worked out once: its result is that of the new elements, and nothing
that tells calls apart is forgotten."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import torchpool as tp
from torchpool import functional
from torchpool.functional.general import _ready_call
from torchpool.functional.torch_names import _known_window
from torchpool.ops import backends

PAIRS = [
    (lambda x: tp.pool(x, tp.Max(), tp.Window(3, 2, 1)), lambda x: F.max_pool2d(x, 3, 2, 1)),
    (
        lambda x: tp.pool(x, tp.Mean(count_include_pad=True), tp.Window(3, 2, 1)),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
    ),
    (
        lambda x: tp.pool(x, tp.Min(), tp.Window(2, dilation=2)),
        lambda x: -F.max_pool2d(-x, 2, 2, 0, 2),
    ),
    (lambda x: tp.pool(x, tp.Sum(), tp.Window(2)), lambda x: 4 * F.avg_pool2d(x, 2)),
    (lambda x: tp.pool(x, tp.Mean(), tp.Global()), lambda x: x.mean((2, 3), keepdim=True)),
    (lambda x: tp.pool(x, tp.Max(), tp.Adaptive(3)), lambda x: F.adaptive_max_pool2d(x, 3)),
    (
        lambda x: functional.max_pool2d(x, (3, 2), 1, (1, 0)),
        lambda x: F.max_pool2d(x, (3, 2), 1, (1, 0)),
    ),
    (lambda x: functional.lp_pool2d(x, 3.0, 2), lambda x: F.lp_pool2d(x.abs(), 3.0, 2)),
    (
        lambda x: tp.pool(x, tp.PowerMean(2.0), tp.Window(3, 2)),
        lambda x: F.avg_pool2d(x.clamp(min=1e-6).square(), 3, 2).sqrt(),
    ),
    (
        lambda x: tp.pool(x, tp.SoftmaxMean(0.5), tp.Global()),
        lambda x: ((x / 2).flatten(2).softmax(2) * x.flatten(2)).sum(2)[..., None, None],
    ),
]


def inputs():
    """The same shape with other elements, strides and dtypes, in turns."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for _ in range(2):
            x = torch.randn(2, 24, 23, 30).to(dtype)
            yield x
            yield x.to(memory_format=torch.channels_last)
            yield x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_every_call_pools_its_own_elements(ours, torchs):
    for x in inputs():
        y = ours(x)
        tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(y.double(), torchs(x.double()), rtol=tolerance, atol=tolerance)
        assert y.dtype == x.dtype


TRAINED = [
    *PAIRS,
    (lambda x: tp.pool(x, tp.Max(), tp.Global()), lambda x: F.adaptive_max_pool2d(x, 1)),
    (lambda x: tp.pool(x, tp.Max(), tp.Window(5)), lambda x: F.max_pool2d(x, 5)),
    (lambda x: tp.pool(x, tp.Max(), tp.Window(7, 1)), lambda x: F.max_pool2d(x, 7, 1)),
    (lambda x: tp.pool(x, tp.Max(), tp.Window(2, 2, 1)), lambda x: F.max_pool2d(x, 2, 2, 1)),
    (lambda x: tp.pool(x, tp.Mean(), tp.Window(5)), lambda x: F.avg_pool2d(x, 5)),
    (lambda x: tp.pool(x, tp.Mean(), tp.Adaptive(7)), lambda x: F.adaptive_avg_pool2d(x, 7)),
    (lambda x: tp.pool(x, tp.Mean(divisor=3), tp.Window(2)), lambda x: 4 * F.avg_pool2d(x, 2) / 3),
]


@pytest.mark.parametrize(("ours", "torchs"), TRAINED)
def test_every_gradient_is_that_of_its_call(ours, torchs):
    """Of calls in turns, each with gradients of other strides."""
    for x in inputs():
        leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
        y, wanted = ours(leaf), torchs(twin)
        grads = [torch.ones(()).expand(y.shape), torch.randn(y.shape[::-1]).permute(3, 2, 1, 0)]
        for grad in grads:
            grad = grad.to(x.dtype)
            (found,) = torch.autograd.grad(y, leaf, grad, retain_graph=True)
            (known,) = torch.autograd.grad(wanted, twin, grad.double(), retain_graph=True)
            tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found.double(), known, rtol=tolerance, atol=tolerance)
            assert found.stride() == x.stride() or not x.is_contiguous()


@pytest.mark.parametrize(("ours", "torchs"), TRAINED)
def test_prepared_gradients_can_be_differentiated_further(ours, torchs):
    x = torch.randn(1, 2, 11, 12, dtype=torch.float64)
    weights = torch.randn_like(torchs(x)).requires_grad_()
    found, known = [], []
    for pooled, sums in ((ours, found), (torchs, known)):
        leaf = x.clone().requires_grad_()
        (gx,) = torch.autograd.grad((pooled(leaf) * weights).sum(), leaf, create_graph=True)
        sums += torch.autograd.grad(gx.square().sum(), weights)
    torch.testing.assert_close(found, known)


@pytest.mark.parametrize("reduction", [tp.Max(), tp.SoftmaxMean(0.5), tp.Std()], ids=str)
def test_saved_tensors_may_come_back_in_other_strides(reduction):
    """As `save_on_cpu` with pinned memory gives them."""
    for windows in (tp.Window(2), tp.Global()):
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        y = tp.pool(x, reduction, windows)
        (wanted,) = torch.autograd.grad(y.sum(), x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, torch.Tensor.contiguous):
            y = tp.pool(x, reduction, windows)
        (found,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(found, wanted)


def test_reductions_of_ones_own_may_hold_anything():
    @dataclass(frozen=True)
    class Listed(tp.SoftmaxMean):
        extra: Any = ()

    @dataclass(eq=False, frozen=True)
    class Scaled(tp.Accumulation):
        factor: float = field(default=1.0, compare=False)

        def lift(x, a, p):
            return (x * x,)

        def lift_dx(x, a, p):
            return (2 * x,)

        def finish(s, n, a, p):
            return p * s[0]

        def finish_grad(s, n, a, p):
            return (p,), 0.0, s[0]

        parameter: ClassVar[str] = "factor"

    x = torch.randn(1, 2, 6)
    for again in range(2):
        y = tp.pool(x, Listed(0.5, False, [again]), tp.Global())
        torch.testing.assert_close(y, tp.pool(x, tp.SoftmaxMean(0.5), tp.Global()))
    for factor in (1.0, 3.0):
        y = tp.pool(x, Scaled(factor), tp.Global())
        torch.testing.assert_close(y, factor * x.square().sum(2, keepdim=True))


def test_a_repeated_call_is_not_prepared_again():
    x = torch.randn(3, 5, 41, 43)
    functional.max_pool2d(x, 3)
    caches = (_ready_call, _known_window)
    before = [cache.cache_info() for cache in caches]
    y = functional.max_pool2d(x + 1, 3)
    for cache, was in zip(caches, before, strict=True):
        now = cache.cache_info()
        assert (now.hits, now.misses) == (was.hits + 1, was.misses)
    torch.testing.assert_close(y, F.max_pool2d(x + 1, 3), rtol=0, atol=0)


def test_a_call_that_no_backend_prepares_is_remembered_too(monkeypatch):
    monkeypatch.setitem(backends._FIRST, "cpu", "reference")
    _ready_call.cache_clear()
    for reduction, pool in (
        (tp.Max(), F.max_pool2d),
        (tp.Mean(), F.avg_pool2d),
        (tp.Lp(2.0), lambda x, k: F.lp_pool2d(x, 2.0, k)),
    ):
        for x in torch.randn(2, 1, 2, 9, 9):
            torch.testing.assert_close(tp.pool(x, reduction, tp.Window(3)), pool(x, 3))
    _ready_call.cache_clear()


def test_parameters_tell_calls_apart():
    x = torch.rand(1, 2, 8, 8)
    for p in (1.0, 2.0, 2.5, 2.0, 1.0):
        y = tp.pool(x, tp.Lp(p), tp.Window(2))
        torch.testing.assert_close(y, F.lp_pool2d(x, p, 2))
        wanted = F.lp_pool2d(x, p, 2).amax()
        learned = torch.tensor(p, requires_grad=True)
        torch.testing.assert_close(tp.pool(x, tp.Lp(learned), tp.Window(2)).amax(), wanted)


def test_an_empty_window_is_empty_again():
    for _ in range(2):
        y = tp.pool(torch.ones(1, 2, 300, 300), tp.Max(), tp.Window(2, 2, 4))
        assert y[..., 0, 0].eq(0).all()
        assert y[..., 2:-2, 2:-2].eq(1).all()


def test_gradients_and_tangents_are_asked_for_after_a_call_without():
    x = torch.randn(2, 8, 40, 40, dtype=torch.float64)
    for _ in range(2):
        tp.pool(x, tp.Max(), tp.Window(2))
        leaf = x.clone().requires_grad_()
        tp.pool(leaf, tp.Max(), tp.Window(2)).sum().backward()
        assert leaf.grad.sum() == 2 * 8 * 20 * 20
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangent = forward_ad.unpack_dual(tp.pool(dual, tp.Max(), tp.Window(2))).tangent
        assert tangent.eq(1).all()


def test_another_backend_is_asked_after_a_call(monkeypatch):
    x = torch.randn(1, 2, 100, 100)
    tp.pool(x, tp.Max(), tp.Window(2))
    monkeypatch.setenv("TORCHPOOL_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="TORCHPOOL_BACKEND"):
        tp.pool(x, tp.Max(), tp.Window(2))


@pytest.mark.parametrize("kernel", [2.0, True, (2.0, 2), "2"])
def test_a_wrong_argument_that_equals_a_right_one_is_still_refused(kernel):
    x = torch.randn(1, 2, 100, 100)
    functional.max_pool2d(x, 2)
    functional.max_pool2d(x, (2, 2))
    with pytest.raises(TypeError, match="kernel"):
        functional.max_pool2d(x, kernel)
    functional.adaptive_max_pool2d(x, 2)
    with pytest.raises((TypeError, ValueError), match="output_size"):
        functional.adaptive_max_pool2d(x, kernel)
