"""The gradients of the operators, and of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchpool.kernels import layout, reference
from torchpool.ops.operators import (
    accumulate_kernel,
    call_accumulate_backward,
    call_select_backward,
    call_select_take,
    kept_or_zeros,
    library,
    select_kernel,
    unpack,
)
from torchpool.reductions import Reduction, from_spec


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, starts, _, ctx.axes, save = inputs
    ctx.channels_last = layout.is_channels_last(x)
    _keep_aside(ctx, output[1])
    ctx.save_for_backward(output[1] if save else None, mask, starts)


def _keep_aside(ctx: Any, state: Tensor) -> None:
    """Says that an output has no gradient, of which autograd would otherwise make zeros."""
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _select_grad(ctx: Any, grad: Tensor | None, _state: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    state, mask, starts = ctx.saved_tensors
    if state is None:
        raise RuntimeError(
            "torchpool::select was called with save=False, so it cannot "
            "be differentiated; call it through tp.pool"
        )
    gx = call_select_backward(grad, state, starts, ctx.axes, ctx.channels_last)
    # A window with no valid element points to its first element: that gets nothing.
    return gx if mask is None else gx.masked_fill(~mask, 0), None, None, None, None, None


def _save_select_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, state, starts, ctx.axes, _ = inputs
    ctx.save_for_backward(state, starts)


def _select_backward_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    state, starts = ctx.saved_tensors
    return call_select_take(grad, state, starts, ctx.axes), None, None, None, None


def _save_select_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, state, starts, ctx.axes = inputs
    ctx.channels_last = layout.is_channels_last(x)
    ctx.save_for_backward(state, starts)


def _select_take_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    state, starts = ctx.saved_tensors
    gx = call_select_backward(grad, state, starts, ctx.axes, ctx.channels_last)
    return gx, None, None, None


def _save_accumulate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, weights, params, starts, ctx.reduction, ctx.axes, _ = inputs
    _keep_aside(ctx, output[1])
    kind: Reduction = from_spec(ctx.reduction)
    ctx.channels_last = layout.is_channels_last(x)
    keeps_x = not kind.linear or weights is not None  # type: ignore[attr-defined]
    ctx.save_for_backward(
        x if keeps_x else x.new_empty(0),
        mask,
        weights,
        params,
        starts,
        output[1] if output[1].numel() else None,
    )


def _accumulate_grad(ctx: Any, grad: Tensor | None, _stats: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    x, mask, weights, params, starts, stats = ctx.saved_tensors
    needs = [
        ctx.needs_input_grad[0],
        weights is not None and ctx.needs_input_grad[2],
        params is not None and ctx.needs_input_grad[3],
    ]
    stats = grad.new_empty(0, dtype=layout.compute_dtype(grad.dtype)) if stats is None else stats
    gx, gw, gp = call_accumulate_backward(
        grad,
        x,
        mask,
        weights,
        params,
        starts,
        stats,
        ctx.reduction,
        ctx.axes,
        ctx.channels_last,
        needs,
    )
    return (
        gx if needs[0] else None,
        None,
        gw.to(weights.dtype) if needs[1] else None,
        gp if needs[2] else None,
        None,
        None,
        None,
        None,
    )


def _save_accumulate_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    grad, x, mask, weights, params, starts, _, ctx.reduction, ctx.axes, _, ctx.needs = inputs
    ctx.save_for_backward(grad, x, mask, weights, params, starts)


def _accumulate_double_grad(ctx: Any, *outer: Any) -> tuple[Any, ...]:
    """Differentiates the composite of the hand-written derivatives."""
    grad, x, mask, weights, params, starts = ctx.saved_tensors
    kind, axes = from_spec(ctx.reduction), unpack(ctx.axes)
    inputs = (grad, kept_or_zeros(x, grad, ctx.axes), weights, params)

    def first(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        g, v, w, p = (None if t is None else next(rest) for t in inputs)
        assert g is not None
        assert v is not None
        made = reference.composite_accumulate_backward(
            g, v, mask, w, p, kind, axes, ctx.needs, starts
        )
        return tuple(m for m in made if m is not None)

    # Not torch.autograd.grad: what it gives here could not be differentiated once more.
    made, pull = torch.func.vjp(  # type: ignore[misc]
        first, *(t for t in inputs if t is not None)
    )
    above = [o for o, need in zip(outer, ctx.needs, strict=True) if need]
    found = iter(pull(tuple(o.to(m.dtype) for o, m in zip(above, made, strict=True))))
    gg, gx, gw, gp = (None if t is None else next(found) for t in inputs)
    return (
        gg,
        gx if x.numel() else None,
        None,
        gw,
        gp,
        None,
        None,
        None,
        None,
        None,
        None,
    )


def _without_dispatcher(kernel: Any, save: Any, gradient: Any) -> Any:
    """An operator of plain tensors, which need no dispatcher on their way to the same kernel and
    the same gradient."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            made = kernel(*args)
            save(ctx, args, made)
            return made

        backward = staticmethod(gradient)

    return Direct.apply


select_directly = _without_dispatcher(select_kernel, _save_select, _select_grad)
accumulate_directly = _without_dispatcher(accumulate_kernel, _save_accumulate, _accumulate_grad)


torch.library.register_autograd(
    "torchpool::select", _select_grad, setup_context=_save_select, lib=library
)
torch.library.register_autograd(
    "torchpool::select_backward",
    _select_backward_grad,
    setup_context=_save_select_backward,
    lib=library,
)
torch.library.register_autograd(
    "torchpool::select_take", _select_take_grad, setup_context=_save_select_take, lib=library
)
torch.library.register_autograd(
    "torchpool::accumulate", _accumulate_grad, setup_context=_save_accumulate, lib=library
)
torch.library.register_autograd(
    "torchpool::accumulate_backward",
    _accumulate_double_grad,
    setup_context=_save_accumulate_backward,
    lib=library,
)
