"""Starting kernels: on the device of their arguments and its current stream, without waiting.

Triton looks at every argument of every launch to find the kernel that it compiled for such
arguments, which takes longer than a small kernel runs. So what was started is remembered here by
all that Triton looks at, and started again without asking.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_ALIGNMENT = 16
"""Pointers that are multiples of it have kernels of their own."""
_MOST = 4096
"""Launches that are remembered at a time."""
_remembered: dict[Any, tuple[CompiledKernel, tuple[Any, ...]]] = {}
"""Compiled kernels, and the constants that follow their arguments, by what they are started with.
"""


def why_not(x: Tensor) -> str | None:
    """Why Triton cannot read a tensor; None where it can."""
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the input lies on {x.device}, and TRITON_INTERPRET=1 is not set"
    return None


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """Runs `programs` programs of a kernel on the device of the tensor `on`."""
    device = on.device.index if on.is_cuda else None
    if device is None or device == torch.cuda.current_device():
        _start(kernel, programs, device, args, constants)
        return
    with torch.cuda.device(device):
        _start(kernel, programs, device, args, constants)


def _start(
    kernel: Any, programs: int, device: int | None, args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    key = (kernel, device, *map(_kind, args), *constants, *constants.values())
    known = _remembered.get(key)
    if known is not None:
        compiled, rest = known
        compiled[programs, 1, 1](*args, *rest)
        return
    compiled = kernel[(programs,)](*args, **constants)
    if isinstance(compiled, CompiledKernel):  # not in Triton's interpreter
        _remember(key, compiled, tuple(constants[n] for n in kernel.arg_names[len(args) :]))


def _kind(argument: Any) -> Any:
    """All that a kernel may be compiled for: of a tensor its dtype and alignment; else the value,
    which tells more than Triton looks at (its type, whether it is 1 or divisible by 16)."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT == 0
    return argument


def _remember(key: Any, compiled: CompiledKernel, rest: tuple[Any, ...]) -> None:
    if len(_remembered) >= _MOST:
        _remembered.clear()
    _remembered[key] = compiled, rest
