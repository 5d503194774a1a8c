"""The operations on the CPU, compiled by Numba: which kernel serves a call, and with what.

Any number of pooled axes reads as four, the pooled ones last, and either layout as (outer, *S,
inner): see `plan`. Values over small planes go to `planes`, of other small windows, and of whole
vectors of channels, to `leaf`, over large windows to `sweep`, formulas over windows that overlap to
`shared`, everything else forward to `direct`; gradients of selections go to `scatter`, all others
to `backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu import backward as gradients
from torchpool.kernels.cpu import (
    direct,
    formulas,
    leaf,
    planes,
    scatter,
    shared,
    slopes,
    sweep,
    tables,
    threads,
)
from torchpool.kernels.cpu import plan as plans
from torchpool.kernels.cpu.arrays import (
    by_channel,
    effective,
    flat,
    holds_integers,
    lanes_of,
    parameters,
    whole,
)
from torchpool.kernels.cpu.jobs import Job, Prepared, Training, do, unwritten
from torchpool.kernels.cpu.pages import in_large_pages
from torchpool.kernels.cpu.plan import PADDED, VALID, Plan
from torchpool.kernels.cpu.scalars import Largest, Smallest, Total
from torchpool.kernels.cpu.simd import BYTES
from torchpool.reductions import Accumulation, Mean, Selection, Sum
from torchpool.windows import Adaptive, Axis

_FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_LARGEST, _SMALLEST, _TOTAL = Largest(), Smallest(), Total()
_SMALL = 3
"""Windows of so many taps side by side are spread by rows of their own."""
_FEW = 4
"""Windows of so many elements are spread in less time than it takes to divide by their sizes."""
_WORK = 4
"""What an element of an accumulation costs, as bytes of traffic, when threads are counted."""
_EFFORT = 4
"""What a byte costs where windows are large."""


def _plan(x: Tensor, axes: Sequence[Axis], channels_last: bool, joins: bool = False) -> Plan:
    """How the windows of a dense x (N, C, ...) in that layout are visited."""
    n, c = x.shape[:2]
    return plans.plan(tuple(axes), n, c, channels_last, joins)


def _why_not(axes: Sequence[Axis]) -> str | None:
    if len(axes) > plans.AXES:
        return f"the CPU kernels pool at most {plans.AXES} axes, not {len(axes)}"
    return None


def _way(plan: Plan) -> Any:
    if plan.by_channel:
        return direct.ByChannel()
    if plan.by_list:
        return direct.ByList()
    return direct.ByWindow() if plan.by_window else direct.ByOutput()


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
        tag = _LARGEST if reduction.largest else _SMALLEST
        kept = state if save or mask is not None else None
        plan = _plan(x, axes, layout.is_channels_last(x), True)
        _merge(tag, x, mask, y, kept, -1, 0.0, plan)
        if plan.has_empty:
            _clear_empty(y, axes)
            _clear_empty(state, axes)
    return y, state


def _clear_empty(y: Tensor, axes: Sequence[Axis]) -> None:
    """Zeros where a window lies in the padding alone."""
    for dim, axis in enumerate(axes, 2):
        empty = [o for o, (first, end) in enumerate(axis.taps()) if first >= end]
        for o in empty if y.numel() else []:
            y.select(dim, o).zero_()


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
        do(_values(tag, lanes_of(arrays[0].dtype), column, divisor, plan), traffic, arrays)
    elif mask is None:
        assert state is not None
        arrays = flat(x, last), flat(y, last), flat(state, last)
        do(_winners(tag, x.shape[1], plan), traffic, arrays)
    else:
        _merge_directly(tag, x, mask, y, state, column, divisor, plan, traffic)


def _values(tag: Any, lanes: int, column: int, divisor: float, plan: Plan) -> Job:
    """Which kernel makes the values of all windows, for vectors of so many lanes; its arrays are x
    and y."""
    geometry, ends = (plan.geo, plan.tab), (column, divisor)
    if plan.is_small:
        units = plan.rows_out // int(plan.geo[2, plans.OUT])
        effort = _EFFORT if plan.taps > plans.LARGE else 1
        return Job(planes.planes, units, lambda x, y: (tag, x, y, *geometry, *ends), effort)
    if plan.is_leaf:
        arguments = lambda x, y: (tag, x, y, *geometry, *ends)  # noqa: E731
        return Job(leaf.leaf, plan.rows_out, arguments, plan.moved)
    if plan.inner >= lanes and (plan.taps <= plans.LARGE or plan.is_apart):
        return Job(
            leaf.channels,
            plan.rows_out,
            lambda x, y: (tag, x, y, *geometry, plan.inner, *ends),
            plan.moved,
        )
    way = _way(plan)
    if not (plan.is_large and plan.overlaps):
        return Job(
            leaf.merged, plan.rows_out, lambda x, y: (way, tag, x, y, *geometry, plan.inner, *ends)
        )
    return _large(tag, column, divisor, plan)


def _large(tag: Any, column: int, divisor: float, plan: Plan) -> Job:
    """The kernel of large windows; its arrays are x, y, and the offsets of the winners if they are
    kept."""
    options = (plan.geo, plan.tab, plan.inner, plan.block, column, divisor)
    units = plan.outer * -(-int(plan.geo[2, plans.OUT]) // plan.block)
    arguments = lambda x, y, state=None: (tag, x, y, state, *options)  # noqa: E731
    return Job(sweep.sweep, units, arguments, _EFFORT)


def _arrays(x: Tensor, y: Tensor, selects: bool, plan: Plan) -> tuple[Any, Any] | None:
    """The input and the values of all windows as kernels take them; None where sums of integers
    might not be exact."""
    last = plan.channels_last
    if selects or x.dtype.is_floating_point:
        return flat(x, last), flat(y, last)
    numbers = whole(x, last, plan.taps)
    if numbers is None:
        return None
    return numbers, flat(y, last) if y.dtype != x.dtype else whole(y, last, plan.taps)


def _job(reduction: Selection | Accumulation, x: Any, plan: Plan) -> Job:
    """Which kernel makes the values of all windows of an array."""
    if isinstance(reduction, Selection):
        tag: Any = _LARGEST if reduction.largest else _SMALLEST
        return _values(tag, lanes_of(x.dtype), -1, 0.0, plan)
    column, divisor = _divisor(reduction)
    if divisor and holds_integers(x.dtype):
        divisor = float(int(divisor) or 1)
    return _values(_TOTAL, lanes_of(x.dtype), column, divisor, plan)


def ready(
    like: Tensor, reduction: Selection | Accumulation, axes: Sequence[Axis]
) -> Callable[[Tensor], Tensor] | None:
    """The values of all windows, as a function of tensors like the given one: same shape, strides
    and dtype. What does not depend on the elements is worked out once. None where that is not
    worth it."""
    if not _can_be_ready(like, axes):
        return None
    if not formulas.is_merged(reduction):
        formula = _ReadyFormula(like, reduction, axes, False)
        return lambda x: formula.forward(x)[0]
    last, outs = layout.is_channels_last(like), [axis.out_size for axis in axes]
    selects = isinstance(reduction, Selection)
    plan = _plan(like, axes, last, True)
    example = unwritten(like.shape, like.stride(), like.dtype)
    dtype = like.dtype if selects else layout.result_dtype(like.dtype, reduction)  # type: ignore
    result = layout.empty(example, outs, last, dtype)
    arrays = _arrays(example, result, selects, plan)
    if arrays is None:
        return None
    job = _job(reduction, arrays[0], plan)
    clears = selects and plan.has_empty
    shape, strides = result.shape, result.stride()
    prepared = Prepared(job, (example, result), lambda x, y: _arrays(x, y, selects, plan))  # type: ignore

    def call(x: Tensor) -> Tensor:
        y = in_large_pages(unwritten(shape, strides, dtype))
        prepared.run(x, y)
        if clears:
            _clear_empty(y, axes)
        return y

    return call


def _can_be_ready(like: Tensor, axes: Sequence[Axis]) -> bool:
    """Whether there is something to do, on dense memory."""
    if not like.numel() or not all(axis.out_size for axis in axes):
        return False
    return layout.is_channels_last(like) or like.is_contiguous()


def ready_to_train(
    like: Tensor, reduction: Selection | Accumulation, axes: Sequence[Axis]
) -> Training | None:
    """As `ready`, of both passes."""
    if not like.dtype.is_floating_point or not _can_be_ready(like, axes):
        return None
    if isinstance(reduction, Selection):
        return _select_ready(like, reduction, axes)
    if not formulas.is_merged(reduction):
        formula = _ReadyFormula(like, reduction, axes, True)
        return Training(formula.forward, formula.backward, keeps_x=True)
    values, spread = ready(like, reduction, axes), _spread_ready(like, reduction, axes)
    if values is None:
        return None
    return Training(lambda x: (values(x), None), lambda grad, *_: spread(grad))


def _select_ready(like: Tensor, reduction: Selection, axes: Sequence[Axis]) -> Training:
    last, channels = layout.is_channels_last(like), like.shape[1]
    shape, stride, dtype = like.shape, like.stride(), layout.state_dtype(axes)
    example = unwritten(shape, stride, like.dtype)
    result = layout.empty(example, [axis.out_size for axis in axes], last)
    outs, steps = result.shape, result.stride()
    kept = unwritten(outs, steps, dtype)
    plan = _plan(like, axes, last, True)
    arrays = lambda *tensors: tuple(flat(t, last) for t in tensors)  # noqa: E731
    job = _winners(_LARGEST if reduction.largest else _SMALLEST, channels, plan)
    there = Prepared(job, (example, result, kept), arrays)
    back = Prepared(_to_winners(like, axes, last), (result, kept, example), arrays)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = in_large_pages(unwritten(outs, steps, x.dtype))
        state = unwritten(outs, steps, dtype)
        there.run(x, y, state)
        if plan.has_empty:
            _clear_empty(y, axes)
            _clear_empty(state, axes)
        return y, state

    def backward(grad: Tensor, state: Tensor | None, _: Tensor | None) -> Tensor:
        assert state is not None
        gx = in_large_pages(unwritten(shape, stride, grad.dtype))
        back.run(layout.to_layout(grad, last), layout.to_layout(state, last), gx)
        return gx

    return Training(forward, backward)


def _spread_ready(
    like: Tensor, reduction: Accumulation, axes: Sequence[Axis]
) -> Callable[[Tensor], Tensor]:
    last, shape, stride = layout.is_channels_last(like), like.shape, like.stride()
    counts = _counts(reduction, axes, layout.compute_dtype(like.dtype))
    job, divides = _spreading(like, reduction, axes, last)
    if divides:
        counts = None
    back = None
    if job is not None:
        example = unwritten(shape, stride, like.dtype)
        dtype = like.dtype if counts is None else counts.dtype
        grad = layout.empty(example, [axis.out_size for axis in axes], last, dtype)
        back = Prepared(job, (grad, example), lambda *ts: tuple(flat(t, last) for t in ts))

    def backward(grad: Tensor) -> Tensor:
        gx = in_large_pages(unwritten(shape, stride, grad.dtype))
        if back is None:
            return gx.copy_(_over(grad, counts))
        back.run(layout.to_layout(_over(grad, counts), last), gx)
        return gx

    return backward


class _ReadyFormula:
    """Both passes of one of this library's formulas, without tensors.

    Args:
        like: what it is done with tensors like.
        save: whether there will be a backward pass.
    """

    def __init__(self, like: Tensor, reduction: Any, axes: Sequence[Axis], save: bool) -> None:
        self._last = last = layout.is_channels_last(like)
        self._form = like.shape, like.stride()
        x = unwritten(*self._form, like.dtype)
        y = layout.empty(x, [axis.out_size for axis in axes], last)
        stats = layout.empty_stats(x, y.shape[2:], reduction, save).flatten()
        self._outs, self._room = (y.shape, y.stride()), (stats.shape, (1,), stats.dtype)
        numbers, plan = parameters(reduction.value, stats.dtype), _plan(x, axes, last)
        read = _formula(reduction, numbers, False, like.shape[1], plan)
        self._there = Prepared(
            read._replace(arguments=lambda kept, x, y: read.arguments(x, y, kept, None, numbers)),
            (stats, x, y),
            self._arrays,
            _WORK * y.numel() * plan.taps,
        )
        if save:
            tag = formulas.tag(type(reduction), numbers)
            send = _backward(tag, like.shape[1], -1, _divisor(reduction)[1], plan)
            self._back = Prepared(
                send._replace(
                    arguments=lambda kept, g, gx, x: send.arguments(g, kept, gx, x, None, numbers)
                ),
                (stats, y, torch.empty_like(x), x),
                self._arrays,
            )

    def _arrays(self, kept: Tensor, *others: Tensor) -> tuple[Any, ...]:
        return kept.numpy(), *(flat(t, self._last) for t in others)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The values of all windows, and what is kept."""
        y = in_large_pages(unwritten(*self._outs, x.dtype))
        kept = unwritten(*self._room)
        self._there.run(kept, x, y)
        return y, kept

    def backward(self, grad: Tensor, kept: Tensor | None, x: Tensor | None) -> Tensor:
        """The gradient by x."""
        assert kept is not None
        assert x is not None
        gx = in_large_pages(unwritten(*self._form, grad.dtype))
        grad, x = layout.to_layout(grad, self._last), layout.to_layout(x, self._last)
        self._back.run(kept.contiguous(), grad, gx, x)
        return gx


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
    do(_direct(tag, x.shape[1], column, divisor, plan), traffic, arrays)


def _winners(tag: Any, channels: int, plan: Plan) -> Job:
    """The kernel of a selection that is to be differentiated; its arrays are x, y and the
    offsets."""
    if plan.is_large and plan.covers > 1:
        return _large(tag, -1, 0.0, plan)
    return _direct(tag, channels, -1, 0.0, plan)


def _direct(tag: Any, channels: int, column: int, divisor: float, plan: Plan) -> Job:
    """The kernel of any windows; its arrays are x, y, what is kept, weights and parameters."""
    way = _way(plan)
    options = plan.geo, plan.tab, plan.inner, channels, plan.planes_each, column, divisor

    def arguments(
        x: Any, y: Any, state: Any, weights: Any = None, params: Any = None
    ) -> tuple[Any, ...]:
        return way, tag, x, weights, params, y, state, *options

    return Job(direct.direct, plan.rows_out, arguments)


def _formula(reduction: Accumulation, numbers: Any, weighs: bool, channels: int, plan: Plan) -> Job:
    """The kernel of a reduction's own formulas; its arrays are those of `_direct`.

    Args:
        numbers: its parameters.
        weighs: whether there are weights or a mask.
    """
    kind: Any = type(reduction)
    tag = formulas.tag(kind, numbers)
    if weighs or not (kind.shares and plan.slots and _is_usual(kind, numbers)):
        return _direct(tag, channels, *_divisor(reduction), plan)
    way, options = _way(plan), (plan.geo, plan.tab, plan.inner, plan.slots)
    return Job(
        shared.shared,
        plan.rows_out,
        lambda x, y, state, weights, params: (way, tag, x, params, y, state, *options),
    )


def _is_usual(kind: Any, numbers: Any) -> bool:
    """Whether there is no parameter, or one that is neither small, so that derivatives by it would
    lose precision without an anchor of their own, nor so large that elements of usual size are not
    usual."""
    if kind.parameter is None:
        return True
    return numbers.size == 1 and 0.5 <= abs(float(numbers[0])) <= 4


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
        job = _to_winners(gx, axes, channels_last)
        arrays = tuple(flat(t, channels_last) for t in (grad, state, gx))
        do(job, gx.nbytes + grad.nbytes, arrays)
    return gx


def _to_winners(gx: Tensor, axes: Sequence[Axis], channels_last: bool) -> Job:
    """The kernel of the gradient of a selection; its arrays are those by the values, the offsets
    and those by x."""
    if all(plans.is_whole(axis) for axis in axes) and gx.dtype in (torch.float32, torch.float64):
        return _to_one_winner(gx, channels_last)
    channels, plan = gx.shape[1], _plan(gx, axes, channels_last)
    if not plan.scatters:
        return _backward(_LARGEST, channels, -1, 0.0, plan)
    workers = threads.count(2 * gx.nbytes)
    wanted = 4 * workers if workers > 1 else 1
    is_wide = gx.dtype == layout.compute_dtype(gx.dtype)
    band, most, units = scatter.pieces(plan, wanted, is_wide)
    options = plan.geo, plan.tab, plan.inner, band, most
    return Job(scatter.scatter, units, lambda grad, state, gx: (grad, state, gx, *options))


def _to_one_winner(gx: Tensor, channels_last: bool) -> Job:
    """The same where each plane is one window."""
    n, c = gx.shape[:2]
    size, planes, inner = gx[0, 0].numel(), *((n, c) if channels_last else (n * c, 1))
    options = np.array([[[0, size, 0]]]), size, inner, 1, 1, 1
    return Job(tables.scatter, planes, lambda grad, state, gx: (grad, state, gx, *options))


def _backward(tag: Any, channels: int, column: int, divisor: float, plan: Plan) -> Job:
    """The kernel of any gradient; its arrays are those by the values, what was kept, those by x,
    and the input, weights, parameters and gradients by the weights."""
    way, units = _way(plan), plan.outer * plan.bands
    options = plan.geo, plan.tab, plan.inner, channels, plan.planes_each, plan.band, column, divisor

    def arguments(
        grad: Any, state: Any, gx: Any, x: Any = None, weights: Any = None, params: Any = None,
        gw: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        return way, tag, grad, x, weights, params, state, gx, gw, *options

    return Job(gradients.backward, units, arguments)


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


def _divisor(reduction: Accumulation) -> tuple[int, float]:
    """The count table that a linear accumulation divides by (-1: none), and the number that it
    divides by instead (0.0: none)."""
    if not isinstance(reduction, Mean):
        return -1, 0.0
    column = PADDED if reduction.count_include_pad else VALID
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
        num_sums, N, C, *O) in the order of the values; (0,) unless `save`
    """
    sizes = [axis.out_size for axis in axes]
    if not _is_plain(reduction, mask, weights):
        y = in_large_pages(layout.empty_like(x, sizes))
        stats = layout.empty_stats(x, sizes, reduction, save)
        if y.numel():
            plan = _plan(x, axes, layout.is_channels_last(x))
            _accumulate_formulas(x, mask, weights, params, reduction, y, stats, plan)
        return y, stats
    if not x.dtype.is_floating_point:
        return _accumulate_integers(x, reduction, axes)
    y = in_large_pages(layout.empty_like(x, sizes))
    if y.numel():
        plan = _plan(x, axes, layout.is_channels_last(x), True)
        _merge(_TOTAL, x, None, y, None, *_divisor(reduction), plan)
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
    plan = _plan(x, axes, last, True)
    arrays = _arrays(x, y, False, plan)
    if arrays is None:
        return _accumulate_in_int64(x, reduction, axes), stats
    if y.numel():
        do(_job(reduction, arrays[0], plan), x.nbytes + y.nbytes, arrays)
    return y, stats


def _accumulate_in_int64(x: Tensor, reduction: Accumulation, axes: Sequence[Axis]) -> Tensor:
    """The same of numbers whose sums floating point might round."""
    total = layout.empty_like(x, [axis.out_size for axis in axes], torch.int64)
    if total.numel():
        plan = _plan(x, axes, layout.is_channels_last(x))
        _merge(_TOTAL, x.to(torch.int64), None, total, None, -1, 0.0, plan)
    column, divisor = _divisor(reduction)
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
    job = _formula(reduction, numbers, scale is not None, x.shape[1], plan)
    arrays = flat(x, last), flat(y, last), stats.reshape(-1).numpy(), scale, numbers
    do(job, _WORK * y.numel() * plan.taps, arrays)


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
    plan = _plan(gx, axes, channels_last)
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
        job = _backward(tag, grad.shape[1], -1, _divisor(reduction)[1], plan)
        arrays = (flat(grad, channels_last), saved, flat(gx, channels_last))
        do(job, gx.nbytes + grad.nbytes, (*arrays, array, scale, numbers, by_weights))
    gp = _by_parameter(tag, grad, array, scale, numbers, saved, plan) if needs[2] else empty
    return gx, gw, gp


def _spread(
    grad: Tensor, gx: Tensor, reduction: Accumulation, axes: Sequence[Axis], last: bool
) -> None:
    """The gradient of a sum or mean: from each window to its elements, equally."""
    counts = _counts(reduction, axes, layout.compute_dtype(grad.dtype))
    job, divides = _spreading(gx, reduction, axes, last)
    if job is None:
        gx.copy_(_over(grad, counts))
        return
    traffic = gx.nbytes + grad.nbytes
    do(job, traffic, (flat(grad if divides else _over(grad, counts), last), flat(gx, last)))


def _spreading(
    gx: Tensor, reduction: Accumulation, axes: Sequence[Axis], channels_last: bool
) -> tuple[Job | None, bool]:
    """The kernel of the gradient of a sum or mean, whose arrays are those by the values and by x,
    and whether it divides by the windows' sizes itself. None where each plane is one window."""
    if all(plans.is_whole(axis) for axis in axes):
        return None, False
    n, c = gx.shape[:2]
    plan = _plan(gx, axes, channels_last)
    mirrored = [turned for axis in axes if (turned := _mirrored(axis)) is not None]
    if len(mirrored) == len(axes) and not _repeats(plan):
        turned_plan = plans.plan(tuple(mirrored), n, c, channels_last, True)
        if _gathers(turned_plan, plan, any(axis.is_adaptive for axis in mirrored)):
            lanes = BYTES // layout.compute_dtype(gx.dtype).itemsize
            return _values(_TOTAL, lanes, -1, 0.0, turned_plan), False
    if _repeats(plan):
        plan = plan._replace(by_window=True)
    job = _backward(_TOTAL, c, *_divisor(reduction), plan)
    return job._replace(arguments=lambda grad, gx: job.arguments(grad, None, gx)), True


def _repeats(plan: Plan) -> bool:
    """Whether rows of a gradient are alike, as those of windows side by side that are no small
    ones."""
    rows, last = plan.geo[2, plans.KERNEL], plan.geo[3, plans.KERNEL]
    return plan.inner == plan.covers == 1 and rows > 1 and last > _SMALL


def _gathers(turned: Plan, plan: Plan, is_adaptive: bool) -> bool:
    """Whether it is quicker to gather the outputs that cover an element than to spread each: of
    windows at stride 1 that are large, or of some elements on contiguous rows; of others where the
    outputs can be listed, unless windows are small ones side by side."""
    if not is_adaptive:
        return plan.is_large or turned.is_small or (turned.is_leaf and plan.taps > _FEW)
    return turned.by_list and (plan.by_window or int(plan.geo[3, plans.KERNEL]) > _SMALL)


def _mirrored(axis: Axis) -> Axis | None:
    """The windows in which the outputs that cover an element lie, where those are regular: at
    stride 1, and of windows that follow the input's size or lie side by side."""
    if axis.is_adaptive or (_lies_side_by_side(axis) and axis.kernel > 1):
        (turned,) = Adaptive(axis.in_size).axes((axis.out_size,))
        return turned._replace(kernel=max(turned.lengths()))
    if axis.stride != 1 or axis.dilation != 1:
        return None
    before = axis.kernel - 1 - axis.before
    after = axis.in_size - 1 + axis.before - (axis.out_size - 1)
    if before < 0 or after < 0:
        return None
    return Axis(axis.out_size, axis.in_size, axis.kernel, 1, 1, before, after)


def _lies_side_by_side(axis: Axis) -> bool:
    tiles = axis.kernel == axis.stride and axis.dilation == 1 and not axis.before
    return tiles and axis.in_size == axis.kernel * axis.out_size


def _counts(reduction: Accumulation, axes: Sequence[Axis], dtype: torch.dtype) -> Tensor | None:
    """What a mean divides by, window by window; None of a sum."""
    column, divisor = _divisor(reduction)
    if column < 0:
        return None
    counts = torch.tensor(divisor or 1.0, dtype=dtype)
    for axis in axes if not divisor else ():
        table = torch.tensor(axis.counts(column == PADDED), dtype=dtype).clamp(min=1)
        counts = counts[..., None] * table
    return counts


def _over(grad: Tensor, counts: Tensor | None) -> Tensor:
    """A gradient over the sizes of the windows, in the format that is computed in."""
    return grad if counts is None else grad.to(counts.dtype) / counts


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
        _WORK * grad.numel() * plan.taps,
        _way(plan),
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
