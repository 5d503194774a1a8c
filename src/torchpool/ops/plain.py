"""Whether a call can pass torch's dispatcher by: nothing there has anything to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents: torch's level of dual numbers is open, by
    `forward_ad.dual_level` or by `torch.func.jvp` and what is built on it."""
    return forward_ad._current_level >= 0


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no transform, mode, tracer or profiler asks for these tensors."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or in_forward_mode()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    return all(t is None or _is_memory(t) for t in tensors)


def _is_memory(t: Tensor) -> bool:
    """Whether a tensor's elements lie in memory as they are: not those of a batch of gradients,
    which `torch.autograd.grad` makes with is_grads_batched."""
    return type(t) in _PLAIN and torch._C._has_storage(t) and not t.is_neg()


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def past_the_dispatcher(name: str, kernel: Any, composite: Any, count: int) -> Any:
    """An operator of `count` tensors and more: called directly where nothing else has anything to
    do, and written out as its composite where a tangent may come with them, which an operator
    would drop."""
    operator = getattr(torch.ops.torchpool, name)

    def call(*args: Any) -> Any:
        tensors = args[:count]
        if is_plain(*tensors) and not is_watched(*tensors):
            return kernel(*args)
        return composite(*args) if in_forward_mode() else operator(*args)

    return call
