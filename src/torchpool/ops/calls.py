"""Calls of the operators, past the dispatcher where they can, and calls that are prepared once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.ops.backends import TABLES, backend_of, load
from torchpool.ops.derivatives import accumulate_directly, select_directly
from torchpool.ops.operators import (
    call_accumulate_backward,
    call_select_backward,
    pack,
    run_accumulate,
    run_select,
)
from torchpool.ops.plain import is_plain, is_watched
from torchpool.reductions import Accumulation, Selection, from_spec
from torchpool.windows import Axis


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: tuple[Axis, ...],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """`torchpool::select`, past the dispatcher where nothing there has anything to do."""
    tensors = (x, mask, starts)
    if not is_plain(*tensors):
        operator: Any = torch.ops.torchpool.select
    elif is_watched(*tensors):
        operator = select_directly
    else:
        return run_select(*tensors, reduction, axes, save)
    made: tuple[Tensor, Tensor] = operator(*tensors, reduction.spec, pack(axes), save)
    return made


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    starts: Tensor | None,
    reduction: Accumulation,
    axes: tuple[Axis, ...],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """`torchpool::accumulate`, likewise."""
    tensors = (x, mask, weights, params, starts)
    if not is_plain(*tensors):
        operator: Any = torch.ops.torchpool.accumulate
    elif is_watched(*tensors):
        operator = accumulate_directly
    else:
        # A parameter as an operator gets it: None, as in every cached description.
        return run_accumulate(*tensors, from_spec(reduction.spec), axes, save)
    made: tuple[Tensor, Tensor] = operator(*tensors, reduction.spec, pack(axes), save)
    return made


def ready(
    x: Tensor,
    reduction: Selection | Accumulation,
    axes: tuple[Axis, ...],
    on_cpu: bool,
    watched: bool,
) -> Any:
    """The values of all windows as a function of plain tensors like x, prepared once; None of a
    formula that no backend prepares.

    Args:
        on_cpu: where these tensors lie.
        watched: a gradient is asked for.
    """
    prepared = _prepared(x, reduction, axes, watched) if on_cpu else None
    if prepared is None and reduction.value is not None:
        return None
    if watched:
        return _ready_for_gradients(x, reduction, axes, prepared)
    if prepared is not None:
        return prepared
    if isinstance(reduction, Selection):
        return lambda x: run_select(x, None, None, reduction, axes, False)[0]
    return lambda x: run_accumulate(x, None, None, None, None, reduction, axes, False)[0]


def _prepared(
    x: Tensor, reduction: Selection | Accumulation, axes: tuple[Axis, ...], watched: bool
) -> Any:
    """What the CPU's backend prepares; None where that is nothing."""
    operation = "select" if isinstance(reduction, Selection) else "accumulate"
    others = (None,) * (2 if operation == "select" else 3)
    backend = backend_of(operation, torch.device("cpu"), x, *others, reduction, axes)
    prepare = getattr(backend, "ready_to_train" if watched else "ready", None)
    return None if prepare is None else prepare(x, reduction, axes)


def _ready_for_gradients(
    x: Tensor, reduction: Selection | Accumulation, axes: tuple[Axis, ...], prepared: Any
) -> Any:
    """The same where a gradient is asked for. What a backend prepared is not differentiable itself:
    further derivatives go through the operators of the gradient."""
    numbers, last = tuple(pack(axes)), layout.is_channels_last(x)
    if prepared is None:
        spec = reduction.spec
        if isinstance(reduction, Selection):
            return lambda x: select_directly(x, None, None, spec, numbers, True)[0]
        return lambda x: accumulate_directly(x, None, None, None, None, spec, numbers, True)[0]

    def by_operator(grad: Tensor, kept: Tensor | None, x: Tensor | None) -> Tensor:
        return _gradient(reduction, grad, kept, x, None, numbers, last)

    call: Any = _Ready.apply
    return lambda x: call(x, prepared, by_operator)


def over_runs(x: Tensor, reduction: Any, dim: int, table: Any) -> Tensor | None:
    """One value for each run of rows of a plain, contiguous tensor on the CPU; None where its
    backend serves it as everything else.

    Args:
        dim: the axis of the rows.
        table: int64 array (N or 1, runs, 3): first row, number of rows, 0.
    """
    backend, watched = load(TABLES["cpu"]), is_watched(x)
    if isinstance(backend, str):
        return None
    prepared = backend.over_runs(x, reduction, dim, table, watched)
    if prepared is None:
        return None
    if not watched:
        y: Tensor = prepared.forward(x)[0]
        return y
    shape, size = x.shape, x.shape[dim]

    def by_operator(grad: Tensor, kept: Tensor | None, x: Tensor | None) -> Tensor:
        def planes(t: Tensor) -> Tensor:
            return t.reshape(math.prod(shape[:dim]), t.shape[dim], -1).movedim(1, 2)

        numbers = tuple(pack([Axis(size, table.shape[1], size, 1, 1, 0, 0)]))
        grad, rows = planes(grad.contiguous()), torch.from_numpy(table)[:, None, None]
        if len(rows) > 1:
            rows = rows.repeat_interleave(len(grad) // len(rows), 0)
        last = layout.is_channels_last(grad)
        if isinstance(reduction, Selection) and kept is not None:
            kept = planes(kept)
        x = None if x is None else planes(x)
        gx = _gradient(reduction, grad, kept, x, rows, numbers, last)
        return gx.movedim(2, 1).reshape(shape)

    call: Any = _Ready.apply
    made: Tensor = call(x, prepared, by_operator)
    return made


def _gradient(
    reduction: Any,
    grad: Tensor,
    kept: Tensor | None,
    x: Tensor | None,
    starts: Tensor | None,
    numbers: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The gradient by x, by the operators, which are differentiable themselves. A selection kept
    its winners, a formula its sums and x, a sum or mean nothing."""
    if isinstance(reduction, Selection):
        by_winner: Tensor = call_select_backward(grad, kept, starts, numbers, channels_last)
        return by_winner
    empty, p = grad.new_empty(0), reduction.value
    dtype = layout.compute_dtype(grad.dtype)
    params = None if p is None else torch.full((1,), p, dtype=dtype, device=grad.device)
    given = (grad, empty if x is None else x, None, None, params, starts)
    stats = empty.to(dtype) if kept is None else kept
    options = (reduction.spec, numbers, channels_last, [True, False, False])
    gx: Tensor = call_accumulate_backward(*given, stats, *options)[0]
    return gx


class _Ready(torch.autograd.Function):
    """A call of which a backend has prepared both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prepared: Any, by_operator: Any) -> Tensor:
        y, state = prepared.forward(x)
        ctx.save_for_backward(state, x if prepared.keeps_x else None)
        ctx.prepared, ctx.by_operator = prepared, by_operator
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        state, x = ctx.saved_tensors
        is_first = is_plain(grad, x) and not is_watched(grad, x)
        is_as_saved = x is None or x.dtype == grad.dtype  # hooks may have changed it
        gradient = ctx.prepared.backward if is_first and is_as_saved else ctx.by_operator
        return gradient(grad, state, x), None, None
