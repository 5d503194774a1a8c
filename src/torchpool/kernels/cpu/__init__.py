"""The operations on the CPU, compiled by Numba: what each call is turned into.

Any number of pooled axes reads as four, the pooled ones last, and either layout as (outer, *S,
inner): see `plan`. From there
`values` serves selections without state and linear accumulations, `selection` remembers winners,
`general` runs any other accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu import plan as plans
from torchpool.kernels.cpu import selection, threads, values
from torchpool.kernels.cpu.scalars import Largest, Smallest, Total
from torchpool.reductions import Accumulation, Mean, Selection, Sum
from torchpool.windows import Axis

_FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
_WIDER = {
    torch.bool: torch.uint8,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}
_SERVED = _FLOATS | {torch.uint8, torch.int32, torch.int64} | set(_WIDER)
_LARGEST, _SMALLEST, _TOTAL = Largest(), Smallest(), Total()


def _flat(x: Tensor, channels_last: bool) -> Any:
    """The memory of a dense tensor as a flat array; half formats as their bits."""
    if channels_last:
        x = x.movedim(1, -1)
    x = x.detach().reshape(-1)
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy()
    return x.view(torch.int16).numpy() if x.dtype == torch.float16 else x.numpy()


def _why_not(x: Tensor, axes: Sequence[Axis]) -> str | None:
    if x.dtype not in _SERVED:
        return f"the CPU kernels do not serve {x.dtype}"
    if any(0 in axis.counts() for axis in axes):
        return "a window that lies in the padding alone is served by the reference"
    return (
        None
        if len(axes) <= plans.AXES
        else f"the CPU kernels pool at most {plans.AXES} axes, not {len(axes)}"
    )


def _tall(geo: Any, first: int, column: int, outer: int) -> int:
    """Number of rows: outer times the sizes of all axes but the last."""
    rows = outer
    for axis in range(first, plans.AXES - 1):
        rows *= int(geo[axis, column])
    return rows


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
    return _why_not(x, axes)


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
    if x.dtype in _WIDER:
        y, state = select(x.to(_WIDER[x.dtype]), mask, starts, reduction, axes, save)
        return y.to(x.dtype), state
    channels_last = layout.is_channels_last(x)
    y = layout.empty_like(x, [axis.out_size for axis in axes])
    state = (
        torch.empty_like(y, dtype=layout.state_dtype(axes))
        if save
        else x.new_empty(0, dtype=layout.state_dtype(axes))
    )
    if y.numel() == 0:
        return y, state
    plan = plans.plan(tuple(axes))
    outer, inner = plans.views(x, channels_last, len(axes))
    tag = _LARGEST if reduction.largest else _SMALLEST
    traffic = (x.numel() + y.numel()) * x.element_size()
    offsets = _flat(state, channels_last and save)
    if mask is not None:
        _select_masked(x, mask, y, offsets, tag, plan, outer, inner, channels_last)
        return y, state
    source, result = _flat(x, channels_last), _flat(y, channels_last)
    units = _tall(plan.geo, 0, plans.OUT, outer)
    if not save:
        args = (tag, source, result, plan.geo, plan.tab, inner, -1, 0.0)
        threads.run(values.values, values.values_parallel, units, traffic, *args)
        return y, state
    any_empty = bool(plan.geo[:, plans.EMPTY].any())
    args = (tag, source, result, offsets, plan.geo, plan.tab, inner, any_empty)
    threads.run(selection.winners, selection.winners_parallel, units, traffic, *args)
    return y, state


def _select_masked(
    x: Tensor,
    mask: Tensor,
    y: Tensor,
    offsets: Any,
    tag: Any,
    plan: plans.Plan,
    outer: int,
    inner: int,
    channels_last: bool,
) -> None:
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    found = torch.empty_like(y, dtype=wide.dtype) if wide is not x else y
    valid = layout.to_layout(mask, channels_last)
    arrays = [_flat(t, channels_last) for t in (wide, valid, found)]
    args = (tag, *arrays, offsets, plan.geo, plan.tab, inner)
    threads.run(selection.masked, selection.masked_parallel, outer * inner, 4 * x.numel(), *args)
    if found is not y:
        y.copy_(found)


def select_backward(
    grad: Tensor, state: Tensor, starts: Tensor | None, axes: Sequence[Axis]
) -> Tensor:
    """Sends the gradient of each window to its winner.

    Shape:
        grad, state (N, C, *O) -> (N, C, *S) in the layout of the state
    """
    channels_last = layout.is_channels_last(state)
    grad = layout.to_layout(grad, channels_last)
    gx = layout.empty_like(state, [axis.in_size for axis in axes], grad.dtype)
    if gx.numel() == 0:
        return gx
    plan = plans.plan(tuple(axes))
    outer, inner = plans.views(grad, channels_last, len(axes))
    arrays = [_flat(t, channels_last) for t in (grad, state, gx)]
    units = _tall(plan.geo, 0, plans.SIZE, outer)
    traffic = (gx.numel() + grad.numel()) * grad.element_size()
    threads.run(
        selection.scatter,
        selection.scatter_parallel,
        units,
        traffic,
        *arrays,
        plan.geo,
        plan.tab,
        inner,
    )
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
    if not _is_plain(reduction, mask, weights):
        if not x.dtype.is_floating_point:
            name = type(reduction).__name__
            return f"{name} of {x.dtype} with a mask or weights is served by the reference"
        from torchpool.kernels.cpu import formulas

        kind: Any = type(reduction)
        return formulas.why_not(kind) or _why_not(x, axes)
    return _why_not(x, axes)


def _is_plain(reduction: Accumulation, mask: Tensor | None, weights: Tensor | None) -> bool:
    return type(reduction) in (Sum, Mean) and mask is None and weights is None


def _divisor(reduction: Accumulation) -> tuple[int, float]:
    """The count table that a linear accumulation divides by (-1: none), and the number that it
    divides by instead (0.0: none)."""
    if not isinstance(reduction, Mean):
        return -1, 0.0
    column = plans.PADDED if reduction.count_include_pad else plans.VALID
    return column, 0.0 if reduction.divisor is None else float(reduction.divisor)


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
        num_sums, N, C, *O); (0,) unless `save`
    """
    if not _is_plain(reduction, mask, weights):
        from torchpool.kernels.cpu import general

        return general.accumulate(x, mask, weights, params, reduction, axes, save)
    if not x.dtype.is_floating_point:
        return _accumulate_integers(x, reduction, axes)
    y = layout.empty_like(x, [axis.out_size for axis in axes])
    _accumulate_linear(x, y, axes, *_divisor(reduction))
    return y, layout.empty_stats(x, [], reduction, False)


def _accumulate_linear(
    x: Tensor, y: Tensor, axes: Sequence[Axis], column: int, divisor: float
) -> None:
    if y.numel() == 0:
        return
    channels_last = layout.is_channels_last(x)
    plan = plans.plan(tuple(axes))
    outer, inner = plans.views(x, channels_last, len(axes))
    args = (
        _TOTAL,
        _flat(x, channels_last),
        _flat(y, channels_last),
        plan.geo,
        plan.tab,
        inner,
        column,
        divisor,
    )
    traffic = (x.numel() + y.numel()) * x.element_size()
    threads.run(
        values.values, values.values_parallel, _tall(plan.geo, 0, plans.OUT, outer), traffic, *args
    )


def _accumulate_integers(
    x: Tensor, reduction: Accumulation, axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    """Sums in int64; a mean is cut towards zero, as torch does."""
    sizes = [axis.out_size for axis in axes]
    total = layout.empty_like(x, sizes, torch.int64)
    _accumulate_linear(x.to(torch.int64), total, axes, -1, 0.0)
    stats = layout.empty_stats(x, [], reduction, False)
    column, divisor = _divisor(reduction)
    if column < 0:
        return total, stats
    counts: Tensor | int = int(divisor) or 1
    if not divisor:
        for i, axis in enumerate(axes):
            table = torch.tensor(axis.counts(column == plans.PADDED)).clamp(min=1)
            counts = counts * table.reshape(-1, *(1,) * (len(axes) - 1 - i))
    return torch.div(total, counts, rounding_mode="trunc").to(x.dtype), stats


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weights and params; those not needed come as empty tensors."""
    if not _is_plain(reduction, mask, weights):
        from torchpool.kernels.cpu import general

        return general.accumulate_backward(
            grad, x, mask, weights, params, stats, reduction, axes, needs
        )
    empty = grad.new_empty(0, dtype=layout.compute_dtype(grad.dtype))
    if not needs[0]:
        return grad.new_empty(0), empty, empty
    channels_last = layout.is_channels_last(grad)
    gx = layout.empty_like(grad, [axis.in_size for axis in axes])
    if gx.numel():
        plan = plans.plan(tuple(axes))
        outer, inner = plans.views(grad, channels_last, len(axes))
        column, divisor = _divisor(reduction)
        args = (
            _flat(grad, channels_last),
            _flat(gx, channels_last),
            plan.geo,
            plan.tab,
            inner,
            column,
            divisor,
        )
        traffic = (gx.numel() + grad.numel()) * grad.element_size()
        threads.run(
            values.adjoint,
            values.adjoint_parallel,
            _tall(plan.geo, 0, plans.SIZE, outer),
            traffic,
            *args,
        )
    return gx, empty, empty
