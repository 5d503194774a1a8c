"""Calls that are prepared once, for tensors of one shape, strides and dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu import formulas
from torchpool.kernels.cpu.arrays import flat, parameters
from torchpool.kernels.cpu.choice import (
    LARGEST,
    SMALLEST,
    WORK,
    arrays_of,
    clear_empty,
    counts_of,
    divisor_of,
    gradient,
    job_of,
    of_formula,
    over,
    plan_of,
    spreading,
    to_winners,
    winners,
)
from torchpool.kernels.cpu.jobs import Prepared, Training, unwritten
from torchpool.kernels.cpu.pages import in_large_pages
from torchpool.reductions import Accumulation, Selection
from torchpool.windows import Axis


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
    plan = plan_of(like, axes, last, True)
    example = unwritten(like.shape, like.stride(), like.dtype)
    dtype = like.dtype if selects else layout.result_dtype(like.dtype, reduction)  # type: ignore
    result = layout.empty(example, outs, last, dtype)
    arrays = arrays_of(example, result, selects, plan)
    if arrays is None:
        return None
    job = job_of(reduction, arrays[0], plan)
    clears = selects and plan.has_empty
    shape, strides = result.shape, result.stride()
    prepared = Prepared(job, (example, result), lambda x, y: arrays_of(x, y, selects, plan))  # type: ignore

    def call(x: Tensor) -> Tensor:
        y = in_large_pages(unwritten(shape, strides, dtype))
        prepared.run(x, y)
        if clears:
            clear_empty(y, axes)
        return y

    return call


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


def _can_be_ready(like: Tensor, axes: Sequence[Axis]) -> bool:
    """Whether there is something to do, on dense memory."""
    if not like.numel() or not all(axis.out_size for axis in axes):
        return False
    return layout.is_channels_last(like) or like.is_contiguous()


def _select_ready(like: Tensor, reduction: Selection, axes: Sequence[Axis]) -> Training:
    last, channels = layout.is_channels_last(like), like.shape[1]
    shape, stride, dtype = like.shape, like.stride(), layout.state_dtype(axes)
    example = unwritten(shape, stride, like.dtype)
    result = layout.empty(example, [axis.out_size for axis in axes], last)
    outs, steps = result.shape, result.stride()
    kept = unwritten(outs, steps, dtype)
    plan = plan_of(like, axes, last, True)
    arrays = lambda *tensors: tuple(flat(t, last) for t in tensors)  # noqa: E731
    job = winners(LARGEST if reduction.largest else SMALLEST, channels, plan)
    there = Prepared(job, (example, result, kept), arrays)
    back = Prepared(to_winners(like, axes, last), (result, kept, example), arrays)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = in_large_pages(unwritten(outs, steps, x.dtype))
        state = unwritten(outs, steps, dtype)
        there.run(x, y, state)
        if plan.has_empty:
            clear_empty(y, axes)
            clear_empty(state, axes)
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
    counts = counts_of(reduction, axes, layout.compute_dtype(like.dtype))
    job, divides = spreading(like, reduction, axes, last)
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
            return gx.copy_(over(grad, counts))
        back.run(layout.to_layout(over(grad, counts), last), gx)
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
        numbers, plan = parameters(reduction.value, stats.dtype), plan_of(x, axes, last)
        read = of_formula(reduction, numbers, False, like.shape[1], plan)
        self._there = Prepared(
            read._replace(arguments=lambda kept, x, y: read.arguments(x, y, kept, None, numbers)),
            (stats, x, y),
            self._arrays,
            WORK * y.numel() * plan.taps,
        )
        if save:
            tag = formulas.tag(type(reduction), numbers)
            send = gradient(tag, like.shape[1], -1, divisor_of(reduction)[1], plan)
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
