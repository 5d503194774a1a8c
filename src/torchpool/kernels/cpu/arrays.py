"""Tensors as the arrays that kernels take, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu.simd import BRAIN, BYTES, DOUBLE, HALF, SINGLE, record


def flat(x: Tensor, channels_last: bool) -> Any:
    """The memory of a dense tensor (N, C, ...) as a flat array; half formats as records."""
    if channels_last:
        x = x.movedim(1, -1)
    x = x.detach().reshape(-1)
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy().view(BRAIN)
    if x.dtype == torch.float16:
        return x.view(torch.uint16).numpy().view(HALF)
    return (x.view(torch.uint8) if x.dtype == torch.bool else x).numpy()


def lanes_of(dtype: Any) -> int:
    """How many numbers of such an array a vector holds."""
    if dtype.names:
        return BYTES // (8 if DOUBLE in dtype.names else 4)
    return int(BYTES // dtype.itemsize)


def whole(x: Tensor, channels_last: bool, terms: int) -> Any:
    """As `flat` for integers of which sums of `terms` are made: as records that are computed in
    floating point where every such sum is exact there; None where it need not be."""
    most = terms * -torch.iinfo(x.dtype).min if x.dtype.is_signed else terms * 255
    name = next((name for name, limit in _EXACT.items() if most < limit), None)
    if name is None or x.dtype == torch.int64:
        return None
    numbers = flat(x, channels_last)
    return numbers.view(record(name, numbers.dtype))


_EXACT = {SINGLE: 1 << 24, DOUBLE: 1 << 53}


def holds_integers(dtype: Any) -> bool:
    """Whether an array is one that `whole` makes."""
    return any(name in _EXACT for name in dtype.names or ())


def effective(
    shape: Sequence[int],
    mask: Tensor | None,
    weights: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Any:
    """Weights that are 0 where the mask is False, in the order of an x of that shape; None where
    all are 1."""
    if mask is None and weights is None:
        return None
    if weights is None:
        assert mask is not None
        made = _once(mask).to(dtype)
    else:
        made = _once(weights.detach()).to(dtype)
        made = made if mask is None else torch.where(_once(mask), made, 0)
    return flat(layout.to_layout(made.expand(shape), channels_last), channels_last)


def _once(t: Tensor) -> Tensor:
    """The elements of an expanded tensor, each once."""
    for dim, step in enumerate(t.stride()):
        t = t.narrow(dim, 0, 1) if step == 0 and t.shape[dim] > 1 else t
    return t


def parameters(params: Tensor | float | None, dtype: torch.dtype) -> Any:
    """One number, or one per channel; 0 without a parameter."""
    if isinstance(params, Tensor):
        return params.detach().to(dtype).contiguous().reshape(-1).numpy()
    return np.full(1, params or 0.0, np.float64 if dtype == torch.float64 else np.float32)


def by_channel(by_p: Any, grad: Tensor, count: int, channels_last: bool) -> Tensor:
    """Derivatives by the parameter, one or more for each channel of grad (N, C, ...), as `count`
    sums in float64, in one order whatever the number of threads."""
    n, c = grad.shape[:2]
    by_p = by_p.reshape(n, -1, c) if channels_last else by_p.reshape(n, c, -1).transpose(0, 2, 1)
    total = by_p.sum((0, 1), dtype=np.float64)
    total = total.sum(keepdims=True) if count == 1 else total
    return torch.from_numpy(total).to(layout.compute_dtype(grad.dtype))
