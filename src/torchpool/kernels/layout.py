"""What all backends agree on: memory layouts, dtypes of states and results, empty outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchpool.reductions import Accumulation, Sum
from torchpool.windows import Axis


def is_channels_last(x: Tensor) -> bool:
    """Whether x (N, C, *S) lies in memory as (N, *S, C) and not also as (N, C, *S)."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def to_layout(x: Tensor, channels_last: bool) -> Tensor:
    """x (N, C, *S), copied only if it does not lie in that layout already."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def dense(x: Tensor) -> Tensor:
    """x in one of the two layouts that kernels take; other strides are copied."""
    return x if is_channels_last(x) else x.contiguous()


def empty_like(x: Tensor, sizes: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (N, C, *sizes) in the layout of x."""
    return empty(x, sizes, is_channels_last(x), dtype)


def empty(
    x: Tensor, sizes: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised (N, C, *sizes) of the samples and channels of x in that layout, which x does
    not tell where it has one position only."""
    n, c = x.shape[:2]
    if channels_last:
        return x.new_empty((n, *sizes, c), dtype=dtype).movedim(-1, 1)
    return x.new_empty((n, c, *sizes), dtype=dtype)


def state_dtype(axes: Sequence[Axis]) -> torch.dtype:
    """The narrowest dtype that holds an offset in the window."""
    taps = math.prod([axis.kernel for axis in axes])
    if taps <= 1 << 8:
        return torch.uint8
    if taps <= 1 << 16:
        return torch.uint16
    return torch.int32 if taps <= 1 << 31 else torch.int64


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float32 for half types, int64 for integers."""
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(dtype: torch.dtype, reduction: Accumulation) -> torch.dtype:
    """The dtype of the output: that of the input, but int64 for sums of integers."""
    return torch.int64 if isinstance(reduction, Sum) and not dtype.is_floating_point else dtype


def empty_stats(x: Tensor, sizes: Sequence[int], reduction: Accumulation, save: bool) -> Tensor:
    """Room for what an accumulation saves: a, the sums and n; nothing for linear
    ones."""
    dtype = compute_dtype(x.dtype)
    if not save or reduction.linear:
        return x.new_empty(0, dtype=dtype)
    return x.new_empty((reduction.num_sums + 2, *x.shape[:2], *sizes), dtype=dtype)
