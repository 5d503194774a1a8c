"""Reductions written with torch's own operators, the way a user without torchpool would.

The fastest forms known; the first of each is also compiled. `mean` is the average pooling of the
row's windows, padding not counted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from torchpool.reductions import LogMeanExp, Lp, PowerMean, Reduction, SoftmaxMean, Std, Var

Mean = Callable[[Tensor], Tensor]


def cubes(x: Tensor, mean: Mean) -> Tensor:
    """Lp(3) from averages; the number of elements at the border is an average as well."""
    return (mean(x.abs() ** 3) * _counts(x, mean)) ** (1 / 3)


def lp_pool2d(x: Tensor, mean: Mean) -> Tensor:
    """Lp(3) by torch's own layer on a padded input."""
    return F.lp_pool2d(F.pad(x, (1, 1, 1, 1)), 3.0, 3, 2)


def power_mean(x: Tensor, mean: Mean) -> Tensor:
    """PowerMean(3), as GeM is usually written."""
    return mean(x.clamp(min=1e-6) ** 3) ** (1 / 3)


def log_mean_exp(x: Tensor, mean: Mean) -> Tensor:
    """LogMeanExp(1), without protection against overflow."""
    return mean(x.exp()).log()


def softmax_mean(x: Tensor, mean: Mean) -> Tensor:
    """SoftmaxMean(1), without protection against overflow."""
    e = x.exp()
    return mean(e * x) / mean(e)


def moments(x: Tensor, mean: Mean) -> Tensor:
    """Var() as the mean of squares less the square of the mean: inexact where the mean is large."""
    return mean(x * x) - mean(x) ** 2


def root_of_moments(x: Tensor, mean: Mean) -> Tensor:
    """Std() likewise."""
    return moments(x, mean).sqrt()


def _counts(x: Tensor, mean: Mean) -> Tensor:
    """Elements of each 3x3/2 window, as a constant of the shape of the output."""
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    return 9 * F.avg_pool2d(ones, 3, 2, 1)


COMPOSITIONS: dict[Reduction, tuple[Callable[[Tensor, Mean], Tensor], ...]] = {
    Lp(3.0): (cubes, lp_pool2d),
    PowerMean(3.0): (power_mean,),
    LogMeanExp(1.0): (log_mean_exp,),
    SoftmaxMean(1.0): (softmax_mean,),
    Var(): (moments,),
    Std(): (root_of_moments,),
}
