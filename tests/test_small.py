"""Small inputs go to torch's own operators: the values are the oracle's, whoever computes them."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

from torchpool import functional, small

OPERATORS = [f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg") for d in (1, 2, 3)]


@pytest.fixture(autouse=True)
def own_kernels():
    """Small inputs are small here."""


def asked(name, *arguments, **options):
    """What our function gives, and whether torch's operator was asked for it."""
    with mock.patch.dict(small._OPERATORS, {name: mock.Mock(wraps=small._OPERATORS[name])}):
        return getattr(functional, name)(*arguments, **options), small._OPERATORS[name].called


def arguments_of(name):
    return (2,) if name.startswith("adaptive") else (3, 2, 1)


def taps_of(name, size):
    return (
        oracle.adaptive(size, 2)
        if name.startswith("adaptive")
        else oracle.regular(size, 3, 2, 1, 1, 1, False)
    )


@pytest.mark.parametrize("special", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_are_the_oracles(name, special):
    d = int(name[-2])
    x = torch.randn(2, 3, *(5, 4, 6)[:d], dtype=torch.float64)
    if special is not None:
        x.flatten()[::3] = special
    y, by_torch = asked(name, x, *arguments_of(name))
    assert by_torch
    taps = [taps_of(name, size) for size in x.shape[2:]]
    with np.errstate(invalid="ignore"):
        expected, _ = oracle.pool(x.numpy(), taps, "Max" if name.startswith("max") else "Sum")
    if "avg" in name:
        window = 3**d if not name.startswith("adaptive") else None
        count, _ = oracle.pool(np.ones(x.shape), taps, "Sum")
        expected = expected / (window or count)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-12)
    if special is None:
        assert not np.allclose(y.numpy(), expected + 1e-6, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_our_kernels_give_the_same_with_gradients(name, monkeypatch):
    d = int(name[-2])
    x = torch.randn(2, 3, *(5, 4, 6)[:d], dtype=torch.float64, requires_grad=True)
    y, by_torch = asked(name, x, *arguments_of(name))
    monkeypatch.setattr(small, "SMALL", 0)
    ours, by_ours = asked(name, x, *arguments_of(name))
    assert by_torch
    assert not by_ours
    torch.testing.assert_close(y, ours)
    upstream = torch.randn(y.shape, dtype=y.dtype)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, upstream)[0] for t in (y, ours)))


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(1, 1, 200, 200),
        torch.ones(1, 4, 4, 3).movedim(-1, 1),
        torch.ones(1, 1, 4, 4, dtype=torch.bfloat16),
        torch.ones(1, 1, 4, 4, dtype=torch.int32),
        torch.ones(1, 1, 4, 4, device="meta"),
    ],
    ids=["large", "channels_last", "bfloat16", "integers", "meta"],
)
def test_others_go_to_our_kernels(x):
    y, by_torch = asked("max_pool2d", x, 2)
    assert not by_torch
    assert y.shape[2:] == tuple(size // 2 for size in x.shape[2:])


def test_a_forced_backend_is_obeyed(monkeypatch):
    monkeypatch.setenv("TORCHPOOL_BACKEND", "reference")
    assert not asked("max_pool2d", torch.ones(1, 1, 4, 4), 2)[1]


def test_indices_are_ours():
    (_, i), by_torch = asked("max_pool2d", torch.ones(1, 1, 4, 4), 2, return_indices=True)
    assert not by_torch
    assert i.tolist() == [[[[0, 2], [8, 10]]]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2, 0), "stride"),
        ((9,), "kernel"),
        ((2, 2, 3), "padding"),
        ((1 << 40,), "kernel"),
        ((2.0,), "kernel"),
        (("2",), "kernel"),
    ],
)
def test_bad_arguments_are_named_by_us(arguments, words):
    x = torch.ones(1, 1, 4, 4)
    for function in (functional.max_pool2d, functional.avg_pool2d):
        with pytest.raises((ValueError, TypeError), match=words):
            function(x, *arguments)


def test_lists_of_arguments():
    x = torch.randn(1, 1, 8, 8)
    y = functional.max_pool2d(x, [2, 3], [2, 1])
    assert torch.equal(y, F.max_pool2d(x, [2, 3], [2, 1]))


def on_gpu(shape, dtype=torch.float32, layout=torch.contiguous_format, gradient=False):
    """A tensor that stands for one on a GPU."""
    return torch.zeros(shape, dtype=dtype).to(memory_format=layout).requires_grad_(gradient)


SHAPE = (1, 16, 28, 28)
MAX, AVG = (2, (), 0, 1, False), (3, 2, 1, False, True, None)


@pytest.mark.parametrize(
    ("name", "arguments", "options", "expected"),
    [
        ("max_pool2d", MAX, {}, True),
        ("max_pool2d", (3, 2, 1, 1, False), {}, True),
        ("max_pool2d", MAX, {"dtype": torch.bfloat16}, True),
        ("max_pool2d", MAX, {"dtype": torch.int32}, False),
        ("max_pool2d", MAX, {"shape": (1, 1, 513, 513)}, False),  # not small
        ("max_pool2d", MAX, {"layout": torch.channels_last}, True),
        ("avg_pool2d", AVG, {"layout": torch.channels_last}, True),
        ("max_pool3d", MAX, {"shape": (1, 2, 4, 4, 4)}, False),
        ("adaptive_avg_pool2d", (7,), {}, False),
        ("max_pool2d", MAX, {"gradient": True}, True),
        ("max_pool2d", (2, 2, 0, 1, False), {"gradient": True}, True),
        ("max_pool2d", (3, 2, 1, 1, False), {"gradient": True}, False),  # windows overlap
        ("max_pool2d", (2, (), 0, 2, False), {"gradient": True}, False),
        ("max_pool2d", (2, 3, 0, 2, False), {"gradient": True}, True),
        ("max_pool2d", ([2, 2], (), 0, 1, False), {"gradient": True}, False),
        ("max_pool2d", MAX, {"gradient": True, "layout": torch.channels_last}, False),
        ("avg_pool2d", AVG, {"gradient": True}, True),
        ("avg_pool2d", AVG, {"gradient": True, "shape": (16, 28, 28)}, True),
        ("avg_pool2d", AVG, {"gradient": True, "layout": torch.channels_last}, False),
        ("avg_pool2d", AVG, {"gradient": True, "shape": (2, 1, 28, 28)}, False),
    ],
)
def test_which_are_small_on_a_gpu(name, arguments, options, expected):
    x = on_gpu(**{"shape": SHAPE, **options})
    assert small._is_small_on_gpu(name, x, arguments) is expected


def test_gradients_that_torch_would_refuse_are_ours():
    x = on_gpu(SHAPE, gradient=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert not small._is_small_on_gpu("max_pool2d", x, MAX)
        assert small._is_small_on_gpu("max_pool2d", x.detach(), MAX)
        assert small._is_small_on_gpu("avg_pool2d", x, AVG)
    finally:
        torch.use_deterministic_algorithms(False)


def test_transforms_go_to_our_kernels_on_a_gpu():
    answers = []

    def function(x):
        answers.append(small._is_small_on_gpu("max_pool2d", x, MAX))
        return x.sum()

    torch.func.vmap(torch.func.grad(function))(on_gpu(SHAPE))
    assert answers == [False]


@pytest.mark.parametrize("kernel", [2, (2, 2), [2, 2]])
@pytest.mark.parametrize("gradient", [False, True])
def test_arguments_of_any_form_reach_the_rules_of_a_gpu(kernel, gradient, monkeypatch):
    monkeypatch.setattr(small, "_is_small", small._is_small_on_gpu)
    x = torch.randn(SHAPE, requires_grad=gradient)
    torch.testing.assert_close(functional.max_pool2d(x, kernel), F.max_pool2d(x, kernel))
    torch.testing.assert_close(functional.avg_pool2d(x, kernel), F.avg_pool2d(x, kernel))
