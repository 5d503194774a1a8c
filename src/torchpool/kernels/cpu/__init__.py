"""The operations on the CPU, compiled by Numba.

Any number of pooled axes reads as four, the pooled ones last, and either layout as (outer, *S,
inner): see `plan`. Values over small planes go to `planes`, of other small windows, and of whole
vectors of channels, to `leaf`, over large windows to `sweep`, formulas over windows that overlap to
`shared`, everything else forward to `direct`; gradients of selections go to `scatter`, all others
to `backward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu import formulas, slopes, threads
from torchpool.kernels.cpu import plan as plans
from torchpool.kernels.cpu.arrays import by_channel, effective, flat, lanes_of, parameters
from torchpool.kernels.cpu.choice import (
    LARGEST,
    SMALLEST,
    TOTAL,
    WORK,
    arrays_of,
    clear_empty,
    counts_of,
    directly,
    divisor_of,
    gradient,
    job_of,
    of_formula,
    over,
    plan_of,
    spreading,
    to_winners,
    values,
    way_of,
    winners,
)
from torchpool.kernels.cpu.jobs import do
from torchpool.kernels.cpu.pages import in_large_pages
from torchpool.kernels.cpu.plan import PADDED, Plan
from torchpool.kernels.cpu.prepared import ready, ready_to_train
from torchpool.reductions import Accumulation, Mean, Selection, Sum
from torchpool.windows import Axis

__all__ = [
    "accumulate",
    "accumulate_backward",
    "ready",
    "ready_to_train",
    "select",
    "select_backward",
    "why_not_accumulate",
    "why_not_select",
]

_FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _why_not(axes: Sequence[Axis]) -> str | None:
    if len(axes) > plans.AXES:
        return f"the CPU kernels pool at most {plans.AXES} axes, not {len(axes)}"
    return None


# Selection ------------------------------------------------------------


def why_not_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve a selection; None where they do."""
    if starts is not None:
        return "windows that differ from plane to plane are served by the reference"
    if type(reduction).key is not Selection.key:
        return f"{type(reduction).__name__} has a key of its own"
    if x.dtype not in _FLOATS | _INTEGERS | {torch.bool}:
        return f"the CPU kernels do not select among {x.dtype}"
    return _why_not(axes)


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Winners of all windows, as `reference.select`.

    Shape:
        x (N, C, *S) -> (N, C, *O) in the layout of x, and the offsets in the window of the same
        shape (0,) unless `save`
    """
    y = in_large_pages(layout.empty_like(x, [axis.out_size for axis in axes]))
    dtype = layout.state_dtype(axes)
    state = torch.empty_like(y, dtype=dtype) if save else x.new_empty(0, dtype=dtype)
    if y.numel():
        tag = LARGEST if reduction.largest else SMALLEST
        kept = state if save or mask is not None else None
        plan = plan_of(x, axes, layout.is_channels_last(x), True)
        _merge(tag, x, mask, y, kept, -1, 0.0, plan)
        if plan.has_empty:
            clear_empty(y, axes)
            clear_empty(state, axes)
    return y, state


def _merge(
    tag: Any,
    x: Tensor,
    mask: Tensor | None,
    y: Tensor,
    state: Tensor | None,
    column: int,
    divisor: float,
    plan: Plan,
) -> None:
    """Values of windows that are merged, and the offsets of the winners into `state`."""
    last = plan.channels_last
    traffic = x.nbytes + y.nbytes
    if state is None and mask is None:
        arrays: tuple[Any, ...] = flat(x, last), flat(y, last)
        do(values(tag, lanes_of(arrays[0].dtype), column, divisor, plan), traffic, arrays)
    elif mask is None:
        assert state is not None
        arrays = flat(x, last), flat(y, last), flat(state, last)
        do(winners(tag, x.shape[1], plan), traffic, arrays)
    else:
        _merge_directly(tag, x, mask, y, state, column, divisor, plan, traffic)


def _merge_directly(
    tag: Any,
    x: Tensor,
    mask: Tensor | None,
    y: Tensor,
    state: Tensor | None,
    column: int,
    divisor: float,
    plan: Plan,
    traffic: int,
) -> None:
    last = plan.channels_last
    weights = None if mask is None else flat(layout.to_layout(mask.expand(x.shape), last), last)
    kept = state
    if state is not None:
        kept = flat(state if state.numel() else torch.empty_like(y, dtype=state.dtype), last)
    arrays = flat(x, last), flat(y, last), kept, weights
    do(directly(tag, x.shape[1], column, divisor, plan), traffic, arrays)


def select_backward(
    grad: Tensor,
    state: Tensor,
    starts: Tensor | None,
    axes: Sequence[Axis],
    channels_last: bool,
) -> Tensor:
    """Sends the gradient of each window to its winner.

    Shape:
        grad, state (N, C, *O) -> (N, C, *S), all in that layout
    """
    gx = in_large_pages(layout.empty(grad, [axis.in_size for axis in axes], channels_last))
    if gx.numel():
        job = to_winners(gx, axes, channels_last)
        arrays = tuple(flat(t, channels_last) for t in (grad, state, gx))
        do(job, gx.nbytes + grad.nbytes, arrays)
    return gx


# Accumulation ---------------------------------------------------------


def why_not_accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve an accumulation; None where they do."""
    if x.dtype not in _FLOATS | _INTEGERS:
        return f"the CPU kernels do not add {x.dtype}"
    if not _is_plain(reduction, mask, weights):
        if not x.dtype.is_floating_point:
            name = type(reduction).__name__
            return f"{name} of {x.dtype} with a mask or weights is served by the reference"
        kind: Any = type(reduction)
        return formulas.why_not(kind) or _why_not(axes)
    return _why_not(axes)


def _is_plain(reduction: Accumulation, mask: Tensor | None, weights: Tensor | None) -> bool:
    return type(reduction) in (Sum, Mean) and mask is None and weights is None


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Values of all windows, as `reference.accumulate`.

    Shape:
        x (N, C, *S) -> (N, C, *O) in the layout of x, and what the backward pass needs (2 +
        num_sums, N, C, *O) in the order of the values; (0,) unless `save`
    """
    sizes = [axis.out_size for axis in axes]
    if not _is_plain(reduction, mask, weights):
        y = in_large_pages(layout.empty_like(x, sizes))
        stats = layout.empty_stats(x, sizes, reduction, save)
        if y.numel():
            plan = plan_of(x, axes, layout.is_channels_last(x))
            _accumulate_formulas(x, mask, weights, params, reduction, y, stats, plan)
        return y, stats
    if not x.dtype.is_floating_point:
        return _accumulate_integers(x, reduction, axes)
    y = in_large_pages(layout.empty_like(x, sizes))
    if y.numel():
        plan = plan_of(x, axes, layout.is_channels_last(x), True)
        _merge(TOTAL, x, None, y, None, *divisor_of(reduction), plan)
    return y, layout.empty_stats(x, [], reduction, False)


def _accumulate_integers(
    x: Tensor, reduction: Accumulation, axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    """Sums as int64; a mean is cut towards zero, as torch does.

    A quotient s / d that is no integer lies at least 1 / d from one, and its rounding error below
    that as long as s is exact: it is cut where the exact quotient would be.
    """
    last, outs = layout.is_channels_last(x), [axis.out_size for axis in axes]
    y = layout.empty(x, outs, last, layout.result_dtype(x.dtype, reduction))
    stats = layout.empty_stats(x, [], reduction, False)
    plan = plan_of(x, axes, last, True)
    arrays = arrays_of(x, y, False, plan)
    if arrays is None:
        return _accumulate_in_int64(x, reduction, axes), stats
    if y.numel():
        do(job_of(reduction, arrays[0], plan), x.nbytes + y.nbytes, arrays)
    return y, stats


def _accumulate_in_int64(x: Tensor, reduction: Accumulation, axes: Sequence[Axis]) -> Tensor:
    """The same of numbers whose sums floating point might round."""
    total = layout.empty_like(x, [axis.out_size for axis in axes], torch.int64)
    if total.numel():
        plan = plan_of(x, axes, layout.is_channels_last(x))
        _merge(TOTAL, x.to(torch.int64), None, total, None, -1, 0.0, plan)
    column, divisor = divisor_of(reduction)
    if column < 0:
        return total
    counts: Tensor | int = int(divisor) or 1
    if not divisor:
        for i, axis in enumerate(axes):
            table = torch.tensor(axis.counts(column == PADDED)).clamp(min=1)
            counts = counts * table.reshape(-1, *(1,) * (len(axes) - 1 - i))
    return torch.div(total, counts, rounding_mode="trunc").to(x.dtype)


def _accumulate_formulas(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    y: Tensor,
    stats: Tensor,
    plan: Plan,
) -> None:
    dtype = layout.compute_dtype(x.dtype)
    last, numbers = plan.channels_last, parameters(params, dtype)
    scale = effective(x.shape, mask, weights, dtype, last)
    job = of_formula(reduction, numbers, scale is not None, x.shape[1], plan)
    arrays = flat(x, last), flat(y, last), stats.reshape(-1).numpy(), scale, numbers
    do(job, WORK * y.numel() * plan.taps, arrays)


def accumulate_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    stats: Tensor,
    reduction: Accumulation,
    axes: Sequence[Axis],
    needs: Sequence[bool],
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weights and params; those not needed come as empty tensors. grad and x lie in
    that layout, and so does the gradient by x."""
    dtype = layout.compute_dtype(grad.dtype)
    empty = grad.new_empty(0, dtype=dtype)
    gx = in_large_pages(layout.empty(grad, [axis.in_size for axis in axes], channels_last))
    if _is_plain(reduction, mask, weights):
        if needs[0] and gx.numel():
            _spread(grad, gx, reduction, axes, channels_last)
        return gx if needs[0] else grad.new_empty(0), empty, empty
    gw = torch.empty_like(gx, dtype=dtype) if weights is not None else empty
    if not grad.numel() or not gx.numel():
        gp = empty if params is None else params.new_zeros(params.shape)
        return gx.zero_(), gw.zero_(), gp
    if not x.numel():
        x = torch.zeros_like(gx)
    plan = plan_of(gx, axes, channels_last)
    if not stats.numel():
        stats = grad.new_empty((reduction.num_sums + 2) * grad.numel(), dtype=dtype)
        y = torch.empty_like(grad)
        _accumulate_formulas(x, mask, weights, params, reduction, y, stats, plan)
    kind: Any = type(reduction)
    array, numbers = flat(x, channels_last), parameters(params, dtype)
    tag, saved = formulas.tag(kind, numbers), stats.reshape(-1).numpy()
    scale = effective(x.shape, mask, weights, dtype, channels_last)
    if needs[0] or needs[1]:
        by_weights = None
        if scale is not None:
            room = gw if gw.numel() else torch.empty_like(gx, dtype=dtype)
            by_weights = flat(room, channels_last)
        job = gradient(tag, grad.shape[1], -1, divisor_of(reduction)[1], plan)
        arrays = (flat(grad, channels_last), saved, flat(gx, channels_last))
        do(job, gx.nbytes + grad.nbytes, (*arrays, array, scale, numbers, by_weights))
    gp = _by_parameter(tag, grad, array, scale, numbers, saved, plan) if needs[2] else empty
    return gx, gw, gp


def _spread(
    grad: Tensor, gx: Tensor, reduction: Accumulation, axes: Sequence[Axis], last: bool
) -> None:
    """The gradient of a sum or mean: from each window to its elements, equally."""
    counts = counts_of(reduction, axes, layout.compute_dtype(grad.dtype))
    job, divides = spreading(gx, reduction, axes, last)
    if job is None:
        gx.copy_(over(grad, counts))
        return
    traffic = gx.nbytes + grad.nbytes
    do(job, traffic, (flat(grad if divides else over(grad, counts), last), flat(gx, last)))


def _by_parameter(
    tag: Any, grad: Tensor, x: Any, weights: Any, params: Any, saved: Any, plan: Plan
) -> Tensor:
    """The gradient by the parameter: sums by channel in float64, in one order whatever the number
    of threads."""
    last = plan.channels_last
    by_p = np.empty(plan.rows_out * plan.inner, params.dtype)
    threads.run(
        slopes.by_parameter,
        plan.rows_out,
        WORK * grad.numel() * plan.taps,
        way_of(plan, plan.taps),
        tag,
        flat(grad, last),
        x,
        weights,
        params,
        saved,
        by_p,
        plan.geo,
        plan.tab,
        plan.inner,
        grad.shape[1],
        plan.planes_each,
    )
    return by_channel(by_p, grad, params.size, last)
