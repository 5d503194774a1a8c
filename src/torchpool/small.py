"""Torch's own operators, for inputs so small that a call is all overhead."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchpool import forced

SMALL = 1 << 14
"""Elements up to which an input on the CPU is small."""
SMALL_BYTES = 1 << 20
"""Bytes up to which an input on a GPU is small. Derived, not measured: torch reads so much in about
a microsecond, and starts ten microseconds sooner."""
_ORDINARY = 1 << 16
"""Arguments that are larger go to our kernels, which are sure to survive them."""
_OPERATORS: dict[str, Any] = {
    name: getattr(torch, name, None) or getattr(torch._C._nn, name)
    for d in (1, 2, 3)
    for name in (f"max_pool{d}d", f"avg_pool{d}d", f"adaptive_avg_pool{d}d")
}


def pooled(name: str, x: Any, *arguments: Any) -> Tensor | None:
    """What torch's operator gives for a small input: the same as our kernels, sooner.

    Returns:
        None where the input is not small, or torch refuses: then ours runs, or says what is wrong.
    """
    if not _is_small(name, x, arguments):
        return None
    try:
        y: Tensor | None = _OPERATORS[name](x, *arguments) if _is_ordinary(*arguments) else None
    except (RuntimeError, TypeError, ValueError):
        return None
    return y


def _is_small(name: str, x: Any, arguments: tuple[Any, ...]) -> bool:
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and (
            _is_small_on_cpu(x) if x.is_cpu else x.is_cuda and _is_small_on_gpu(name, x, arguments)
        )
        and not forced.backend()
    )


def _is_small_on_cpu(x: Tensor) -> bool:
    return (
        x.numel() <= SMALL
        and (x.dtype == torch.float32 or x.dtype == torch.float64)
        and x.is_contiguous()
    )


def _is_small_on_gpu(name: str, x: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Over two axes alone, and with a gradient only where torch's is right and deterministic."""
    return (
        name in ("max_pool2d", "avg_pool2d")
        and x.nbytes <= SMALL_BYTES
        and x.dtype.is_floating_point
        and torch._C._functorch.peek_interpreter_stack() is None  # it hides who wants gradients
        and (
            not (x.requires_grad and torch.is_grad_enabled())
            or _has_good_gradient(name, x, arguments)
        )
    )


def _has_good_gradient(name: str, x: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Whether torch's gradient on a GPU is right and deterministic. For channels-last inputs, which
    an input with one channel may be taken for, that of a padded average is wrong."""
    if not x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return False
    return name == "avg_pool2d" or _stands_apart(*arguments)


def _stands_apart(kernel: Any, stride: Any, _padding: Any, dilation: Any, _ceil_mode: Any) -> bool:
    """Whether no element gets gradients of two maxima, which torch adds in any order, nor is torch
    asked to refuse that operator."""
    step = kernel if stride == () else stride
    return (
        not torch.are_deterministic_algorithms_enabled()
        and type(kernel) is type(step) is type(dilation) is int
        and step > dilation * (kernel - 1)
    )


@lru_cache(maxsize=1024)
def _is_ordinary(*arguments: Any) -> bool:
    """Whether all numbers in the arguments are of an ordinary size."""
    return all(
        argument is None
        or (_is_ordinary(*argument) if isinstance(argument, tuple) else argument < _ORDINARY)
        for argument in arguments
    )
