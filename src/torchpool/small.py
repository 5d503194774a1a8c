"""Torch's own operators, for inputs so small that a call is all overhead."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 15
"""Elements up to which an input is small."""
_ORDINARY = 1 << 16
"""Arguments that are larger go to our kernels, which are sure to survive them."""
_OPERATORS: dict[str, Any] = {
    name: getattr(torch, name, None) or getattr(torch._C._nn, name)
    for d in (1, 2, 3)
    for name in (f"max_pool{d}d", f"avg_pool{d}d", f"adaptive_avg_pool{d}d")
}


def pooled(name: str, x: Any, *arguments: Any) -> Tensor | None:
    """What torch's operator gives for a small contiguous input: the same as our kernels, sooner.

    Returns:
        None where the input is not small, or torch refuses: then ours runs, or says what is wrong.
    """
    if not _is_small(x):
        return None
    try:
        y: Tensor | None = _OPERATORS[name](x, *arguments) if _is_ordinary(*arguments) else None
    except (RuntimeError, TypeError, ValueError):
        return None
    return y


def _is_small(x: Any) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.numel() <= SMALL
        and (x.dtype == torch.float32 or x.dtype == torch.float64)
        and x.is_cpu
        and x.is_contiguous()
        and not torch.compiler.is_compiling()
        and not os.environ.get("TORCHPOOL_BACKEND")
    )


@lru_cache(maxsize=1024)
def _is_ordinary(*arguments: Any) -> bool:
    """Whether all numbers in the arguments are of an ordinary size."""
    return all(
        argument is None
        or (_is_ordinary(*argument) if isinstance(argument, tuple) else argument < _ORDINARY)
        for argument in arguments
    )
