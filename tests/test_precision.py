"""Sums of many numbers: their errors do not grow with their number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import torchpool as tp
from torchpool.kernels.cpu import shares

BOUND = 2e-6
"""Relative error of float32, some tens of roundings."""
TERMS = 400 * 400


def _mean_of(lift: Callable[[np.ndarray], np.ndarray], back: Callable) -> Callable:
    return lambda x: back(lift(x).mean(-1))


def _soft(x: np.ndarray) -> np.ndarray:
    return (np.exp(x) * x).sum(-1) / np.exp(x).sum(-1)


ORACLES: dict[str, tuple[tp.Reduction, Callable[[np.ndarray], np.ndarray]]] = {
    "Sum": (tp.Sum(), lambda x: x.sum(-1)),
    "Mean": (tp.Mean(), lambda x: x.mean(-1)),
    "Lp": (tp.Lp(2.0), lambda x: np.sqrt((x**2).sum(-1))),
    "PowerMean": (tp.PowerMean(3.0), _mean_of(lambda x: x**3, np.cbrt)),
    "LogMeanExp": (tp.LogMeanExp(1.0), _mean_of(np.exp, np.log)),
    "SoftmaxMean": (tp.SoftmaxMean(1.0), _soft),
    "Var": (tp.Var(), lambda x: x.var(-1)),
    "Std": (tp.Std(), lambda x: x.std(-1)),
}
each_reduction = pytest.mark.parametrize("name", ORACLES)


def _numbers(*shape: int) -> Tensor:
    """Of one sign, so that no sum cancels."""
    return 1 + torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _worst(found: Tensor, name: str, x: Tensor) -> float:
    """The greatest relative error; the last axis of x are the elements of a window."""
    wanted = ORACLES[name][1](x.double().numpy())
    return float(np.abs(found.double().numpy().reshape(wanted.shape) / wanted - 1).max())


def test_one_chain_of_additions_would_not_do() -> None:
    x = (_numbers(16, TERMS).numpy() - np.float32(1.5)) ** 2
    in_a_chain = np.add.accumulate(x, 1)[:, -1]
    assert np.abs(in_a_chain / x.astype(np.float64).sum(1) - 1).max() > 10 * BOUND


@each_reduction
@pytest.mark.parametrize("channels_last", [False, True])
def test_of_an_image(name: str, channels_last: bool) -> None:
    x = _numbers(1, 16, 400, 400)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = tp.pool(x.contiguous(memory_format=layout), ORACLES[name][0], tp.Global())
    assert _worst(y, name, x.flatten(2)) < BOUND


@each_reduction
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 100])
def test_of_windows(name: str, channels_last: bool, stride: int) -> None:
    x = _numbers(1, 16, 100, 110)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    given = x.contiguous(memory_format=layout)
    y = tp.pool(given, ORACLES[name][0], tp.Window((100, 95), stride=stride))
    windows = x.unfold(2, 100, stride).unfold(3, 95, stride).flatten(-2)
    assert _worst(y, name, windows) < BOUND


@pytest.mark.parametrize("sizes", [(3, 400), (400, 3)])
def test_small_and_large_windows_have_kernels_of_their_own(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "_entries", {})
    x = _numbers(1, 16, 400, 400).contiguous(memory_format=torch.channels_last)
    for size in sizes:
        y = tp.pool(x, tp.Var(), tp.Window(size, stride=400))
        assert _worst(y, "Var", x[:, :, :size, :size].flatten(2)) < BOUND


@pytest.mark.parametrize("name", ["Mean", "SoftmaxMean", "Var"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_of_weighted_elements(name: str, channels_last: bool) -> None:
    x = _numbers(1, 16, TERMS)
    given = x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x
    twice = torch.full_like(given, 2)
    y = tp.pool(given, ORACLES[name][0], tp.Global(), weights=twice)
    assert _worst(y, name, x) < BOUND


@each_reduction
@pytest.mark.parametrize("inner", [1, 8, 64])
def test_of_segments(name: str, inner: int) -> None:
    x = _numbers(TERMS, inner)
    y = tp.segment_pool(x, ORACLES[name][0], offsets=torch.tensor([0, TERMS - 10, TERMS]))
    assert _worst(y[0], name, x[:-10].T) < BOUND


def _slope_of_softmax_mean(x: np.ndarray, beta: float) -> np.ndarray:
    shares = np.exp(beta * x) / np.exp(beta * x).sum(-1, keepdims=True)
    mean = (shares * x).sum(-1)
    return (shares * x**2).sum(-1) - mean**2


def _slope_of_power_mean(x: np.ndarray, p: float) -> np.ndarray:
    mean, by_p = (x**p).mean(-1), (x**p * np.log(x)).mean(-1)
    return mean ** (1 / p) * (by_p / mean / p - np.log(mean) / p**2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("kind", "slope"),
    [(tp.SoftmaxMean, _slope_of_softmax_mean), (tp.PowerMean, _slope_of_power_mean)],
)
def test_of_derivatives_by_a_parameter(
    kind: Callable, slope: Callable, channels_last: bool
) -> None:
    x = _numbers(1, 16, TERMS)
    given = x.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else x
    p = torch.full((16,), 2.5, requires_grad=True)
    tp.pool(given, kind(p), tp.Global()).sum().backward()
    wanted = slope(x[0].double().numpy(), 2.5)
    assert p.grad is not None
    assert np.abs(p.grad.double().numpy() / wanted - 1).max() < 10 * BOUND  # terms that cancel
