"""What torchpool's own results are checked against: torch's operators in float64, on a few
planes."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from torchpool.bench.peers import function
from torchpool.bench.shapes import Problem

PLANES = (1, 2)
"""Samples and channels that are checked."""


def few(x: Tensor) -> Tensor:
    """The planes that are checked."""
    return x[: PLANES[0], : PLANES[1]]


def pooled(p: Problem, x: Tensor) -> Tensor:
    """The problem on the first planes of x, in float64, one axis after the other where that is the
    same. Differentiable."""
    x = few(x).double().contiguous()
    part = replace(p, shape=tuple(x.shape), layout="contiguous")
    if p.num_axes == 1 or p.is_adaptive or not _separates(p):
        return function(part, F)(x)
    for axis in range(p.num_axes):
        x = function(_along(replace(part, shape=tuple(x.shape)), axis), F)(x)
    return x


def _separates(p: Problem) -> bool:
    return p.op == "max" or (p.divisor is None and not p.ceil)


def _along(p: Problem, axis: int) -> Problem:
    def only(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
        return tuple(v if i == axis else neutral for i, v in enumerate(values))

    return replace(
        p,
        kernel=only(p.kernel, 1),
        stride=only(p.stride, 1),
        padding=only(p.padding, 0),
        dilation=only(p.dilation, 1),
    )


def gradient(p: Problem, x: Tensor, upstream: Tensor) -> Tensor:
    """Gradient of <pool(x), upstream> by x on the first planes, in float64."""
    leaf = few(x).detach().double().requires_grad_()
    (grad,) = torch.autograd.grad(pooled(p, leaf), leaf, few(upstream).double())
    return grad
