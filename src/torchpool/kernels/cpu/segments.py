"""Windows that a table gives: from tensors to the kernels of ragged batches, and of segments of
packed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu import formulas, tables, threads
from torchpool.kernels.cpu.arrays import by_channel, effective, flat, parameters
from torchpool.kernels.cpu.direct import ByChannel, ByWindow
from torchpool.kernels.cpu.jobs import Job, Prepared, Training, do
from torchpool.kernels.cpu.pages import in_large_pages
from torchpool.kernels.cpu.scalars import Largest, Smallest, Total
from torchpool.reductions import Accumulation, Mean, Selection, Sum
from torchpool.windows import Axis

_FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}
_LARGEST, _SMALLEST, _TOTAL = Largest(), Smallest(), Total()
_WORK = 4
"""What an element of an accumulation costs, as bytes of traffic, when threads are counted."""


class _Batch(NamedTuple):
    """A batch of windows as numbers and arrays."""

    channels_last: bool
    table: Any
    size: int
    planes: int
    inner: int
    channels: int
    planes_each: int
    per: int
    step: int

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What all kernels but `scatter` take beside the table."""
        return self[2:3] + self[4:]

    @property
    def way(self) -> Any:
        """What the lanes of a vector are."""
        return ByWindow() if self.inner == 1 else ByChannel()

    @property
    def pieces(self) -> int:
        """Pieces of work of all planes."""
        return self.planes * int(tables.pieces.py_func(self.table.shape[1], self.inner))

    @property
    def elements(self) -> int:
        """Elements that the windows read."""
        taps = int(self.table[:, :, 1].sum())
        return taps * self.planes * self.inner // int(self.table.shape[0])

    def row_blocks(self, traffic: int) -> int:
        """Into how many blocks of rows the planes are cut."""
        wanted = 4 * threads.count(traffic)
        return 1 if self.planes >= wanted else max(1, min(wanted // self.planes, self.size // 64))


def _batch(like: Tensor, starts: Tensor, axis: Axis, channels_last: bool) -> _Batch:
    n, c = like.shape[:2]
    table = np.ascontiguousarray(starts.numpy()[:, 0, 0])
    per = 1 if channels_last or table.shape[0] == 1 else c
    planes, inner, each = (n, c, 0) if channels_last else (n * c, 1, 1)
    return _Batch(channels_last, table, axis.in_size, planes, inner, c, each, per, axis.dilation)


class _Runs:
    """Both passes over runs of rows of contiguous tensors of one shape, whatever the rows.

    Args:
        shape, dtype: of the tensors.
        dim: the axis of the rows.
        runs: the shape of the table.
        reduction: without tensors.
        save: whether there will be a backward pass.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        dim: int,
        runs: torch.Size,
        reduction: Any,
        save: bool,
    ) -> None:
        size, planes, inner = shape[dim], math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        table = torch.zeros(runs, dtype=torch.int64, device="cpu")
        per = 1 if runs[0] == 1 else planes // runs[0]
        batch = _Batch(inner > 1, table.numpy(), size, planes, inner, inner, 0, per, 1)
        self._shape, self._outs = shape, (*shape[:dim], runs[1], *shape[dim + 1 :])
        self._dtype, self._wide = dtype, layout.compute_dtype(dtype)
        self._given = self._wide if isinstance(reduction, Selection) else dtype
        self._kept = self._room(reduction, size, save)
        x, y = _unwritten(shape, dtype), _unwritten(self._outs, dtype)
        gx, g = _unwritten(shape, self._wide), _unwritten(self._outs, self._given)
        kept = () if self._kept is None else (_unwritten(*self._kept),)
        formula = _plain_formula(reduction, self._wide)
        self._there = Prepared(
            _reading_runs(batch, formula, reduction), (x, y, *kept, table), _each
        )
        if save:
            values = () if formula.params is None else (x,)
            job = _sending_runs(batch, formula, reduction, gx.nbytes)
            self._back = Prepared(job, (g, *values, *kept, gx, table), _each)

    def _room(self, reduction: Any, size: int, save: bool) -> tuple[Any, torch.dtype] | None:
        """Shape and dtype of what the forward pass keeps; None where that is nothing."""
        if isinstance(reduction, Selection):
            state = layout.state_dtype([Axis(size, 1, size, 1, 1, 0, 0)])
            return (self._outs, state) if save else None
        if formulas.is_merged(reduction):
            return None
        return ((reduction.num_sums + 2, *self._outs) if save else (0,), self._wide)

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """The value of each run, and what is kept."""
        y = in_large_pages(x.new_empty(self._outs))
        if self._kept is None:
            self._there.run(x, y, table)
            return y, None
        kept = x.new_empty(self._kept[0], dtype=self._kept[1])
        self._there.run(x, y, kept, table)
        return y, kept

    def backward(
        self, grad: Tensor, kept: Tensor | None, x: Tensor | None, table: Tensor
    ) -> Tensor:
        """The gradient by x."""
        grad = grad.to(self._given).contiguous()
        gx = in_large_pages(grad.new_empty(self._shape, dtype=self._wide))
        given = (grad, x, kept, gx, table)
        self._back.run(*(t.contiguous() for t in given if t is not None))
        return gx.to(self._dtype)


def _unwritten(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _each(*tensors: Tensor) -> tuple[Any, ...]:
    """The memory of contiguous tensors, the last of which is a table."""
    *others, table = tensors
    return *(flat(t, False) for t in others), table.numpy()


def _plain_formula(reduction: Any, dtype: torch.dtype) -> _Formula:
    if formulas.is_merged(reduction):
        return _Formula(_tag(reduction), None, None)
    return _formula((), None, None, reduction.value, reduction, dtype, False)


def _reading_runs(batch: _Batch, formula: _Formula, reduction: Any) -> Job:
    """`_reading` without weights; its arrays are x, y, what is kept, and the table."""
    job = _reading(batch, formula.tag, reduction)

    def arguments(x: Any, y: Any, *others: Any) -> tuple[Any, ...]:
        kept = others[0] if len(others) > 1 else None
        return job.arguments(x, None, formula.params, y, kept, others[-1])

    effort = _WORK if formula.params is not None else 1
    return job._replace(arguments=arguments, effort=effort)


def _sending_runs(batch: _Batch, formula: _Formula, reduction: Any, traffic: int) -> Job:
    """The backward pass; its arrays are grad, x and what was kept if there are, the gradient by x,
    and the table."""
    if isinstance(reduction, Selection):
        return _sending(batch, traffic)
    job = _spreading(batch, formula.tag, traffic, reduction)

    def arguments(g: Any, *others: Any) -> tuple[Any, ...]:
        *kept, gx, table = others
        x, stats = kept or (None, None)
        return job.arguments(g, x, None, formula.params, stats, gx, None, table)

    return job._replace(arguments=arguments)


@lru_cache(maxsize=256)
def _runs(team: int, *case: Any) -> _Runs:
    """Kept for a number of threads: it decides into how many blocks rows are cut."""
    return _Runs(*case)


def over_runs(like: Tensor, reduction: Any, dim: int, table: Any, save: bool) -> Training | None:
    """Both passes over runs of rows, as functions of contiguous tensors like this one.

    Args:
        reduction: one of this library's, without tensors.
        dim: the axis of the rows.
        table: int64 (N or 1, M, 3): first row, number of rows, 0; N of the axes before dim together
            or of the first of them.
        save: whether there will be a backward pass.
    """
    if like.dtype not in _FLOATS or like.shape[dim] >= 1 << 31:
        return None
    rows = torch.from_numpy(table)
    case = like.shape, like.dtype, dim, rows.shape, reduction, save
    runs = _runs(torch.get_num_threads(), *case)
    return Training(
        lambda x: runs.forward(x, rows),
        lambda grad, kept, x: runs.backward(grad, kept, x, rows),
        not formulas.is_merged(reduction),
    )


def _why_not(starts: Tensor, axes: Sequence[Axis]) -> str | None:
    if starts.shape[1] != 1:
        return "windows that differ from channel to channel are served by the reference"
    if axes[0].in_size >= 1 << 31:
        return "an axis of 2^31 elements or more is served by the reference"
    return None


def why_not_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve a selection; None where they do."""
    if type(reduction).key is not Selection.key:
        return f"{type(reduction).__name__} has a key of its own"
    if x.dtype not in _FLOATS | _INTEGERS:
        return f"the CPU kernels do not serve {x.dtype}"
    assert starts is not None
    return _why_not(starts, axes)


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor,
    reduction: Selection,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Winners of all windows; see `reference.select`."""
    if x.dtype in _WIDER:
        y, state = select(x.to(_WIDER[x.dtype]), mask, starts, reduction, axes, save)
        return y.to(x.dtype), state
    dtype = layout.state_dtype(axes)
    last = layout.is_channels_last(x)
    y = in_large_pages(layout.empty(x, [axes[0].out_size], last))
    kept = save or mask is not None  # a mask is asked where winners are told
    state = torch.empty_like(y, dtype=dtype) if kept else x.new_empty(0, dtype=dtype)
    if y.numel():
        batch = _batch(x, starts, axes[0], last)
        live = None if mask is None else flat(layout.to_layout(mask.expand(x.shape), last), last)
        offsets = flat(state, last) if kept else None
        arrays = flat(x, last), live, None, flat(y, last), offsets, batch.table
        job = _reading(batch, _tag(reduction), reduction)
        do(job, batch.elements * x.element_size(), arrays)
    return y, state if save else x.new_empty(0, dtype=dtype)


def _tag(reduction: Any) -> Any:
    """How values merge."""
    if not isinstance(reduction, Selection):
        return _TOTAL
    return _LARGEST if reduction.largest else _SMALLEST


def _reading(batch: _Batch, tag: Any, reduction: Any) -> Job:
    """The forward pass; its arrays are x, weights or mask, parameters, y, what is kept, and the
    table."""
    options = *batch.geometry, *_divisor(reduction), isinstance(reduction, Mean)
    way = batch.way  # a job that is kept shall not keep a table
    arguments = lambda *arrays: (way, tag, *arrays, *options)  # noqa: E731
    return Job(tables.forward, batch.pieces, arguments)


def _divisor(reduction: Any) -> tuple[int, float]:
    """Whether a mean counts padding, and what it divides by instead of a count (0: by that)."""
    if not isinstance(reduction, Mean):
        return 0, 0.0
    fixed = 0.0 if reduction.divisor is None else float(reduction.divisor)
    return int(reduction.count_include_pad), fixed


def select_backward(
    grad: Tensor, state: Tensor, starts: Tensor, axes: Sequence[Axis], channels_last: bool
) -> Tensor:
    """Sends the gradient of each window to its winner; see `reference.select_backward`."""
    wide = layout.compute_dtype(grad.dtype)
    gx = in_large_pages(layout.empty(grad, [axes[0].in_size], channels_last, wide))
    if gx.numel():
        batch = _batch(state, starts, axes[0], channels_last)
        arrays = (flat(t, channels_last) for t in (grad.to(wide), state, gx))
        do(_sending(batch, gx.nbytes), gx.nbytes, (*arrays, batch.table))
    return gx.to(grad.dtype)


def _sending(batch: _Batch, traffic: int) -> Job:
    """The gradient of a selection; its arrays are grad, state, the gradient by x, and the table."""
    blocks = batch.row_blocks(traffic)
    options = batch.size, batch.inner, batch.per, batch.step, blocks
    return Job(tables.scatter, batch.planes * blocks, lambda *arrays: (*arrays, *options))


def why_not_accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve an accumulation; None where they do."""
    kind: Any = type(reduction)
    if x.dtype not in _FLOATS:
        return f"sums of {x.dtype} over such windows are served by the reference"
    return formulas.why_not(kind)


class _Formula(NamedTuple):
    """An accumulation as kernels take it: its tag, weights and parameters."""

    tag: Any
    weights: Any
    params: Any


def _formula(
    shape: Sequence[int],
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | float | None,
    reduction: Accumulation,
    dtype: torch.dtype,
    channels_last: bool,
) -> _Formula:
    if type(reduction) in (Sum, Mean) and mask is None and weights is None:
        return _Formula(_TOTAL, None, None)
    kind: Any = type(reduction)
    numbers = parameters(params, dtype)
    scale = effective(shape, mask, weights, dtype, channels_last)
    return _Formula(formulas.tag(kind, numbers), scale, numbers)


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    save: bool,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Values of all windows and what the backward pass needs; the latter lies in memory in the
    order of the former."""
    outs, last = [axes[0].out_size], layout.is_channels_last(x)
    y = in_large_pages(layout.empty(x, outs, last))
    stats = layout.empty_stats(x, outs, reduction, save)
    if y.numel():
        dtype = layout.compute_dtype(x.dtype)
        formula = _formula(x.shape, mask, weights, params, reduction, dtype, last)
        _accumulate(_batch(x, starts, axes[0], last), x, formula, y, stats, reduction)
    return y, stats


def _accumulate(
    batch: _Batch, x: Tensor, formula: _Formula, y: Tensor, stats: Tensor, reduction: Accumulation
) -> None:
    last, traffic = batch.channels_last, batch.elements * x.element_size()
    state = None
    if formula.tag is not _TOTAL:
        state, traffic = stats.reshape(-1).numpy(), _WORK * traffic
    arrays = flat(x, last), formula.weights, formula.params, flat(y, last), state, batch.table
    do(_reading(batch, formula.tag, reduction), traffic, arrays)


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
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weights and params; those not needed come as empty tensors."""
    dtype = layout.compute_dtype(grad.dtype)
    gx = in_large_pages(layout.empty(grad, [axes[0].in_size], channels_last, dtype))
    gw = torch.empty_like(gx) if needs[1] else gx.new_empty(0)
    gp = torch.zeros(0 if params is None or not needs[2] else params.shape, dtype=dtype)
    if not grad.numel():
        return gx.zero_().to(grad.dtype), gw.zero_(), gp
    batch = _batch(grad, starts, axes[0], channels_last)
    formula = _formula(gx.shape, mask, weights, params, reduction, dtype, channels_last)
    state = None
    if formula.tag is not _TOTAL:
        x = x if x.numel() else torch.zeros_like(gx)
        if not stats.numel():
            stats = grad.new_empty((reduction.num_sums + 2) * grad.numel(), dtype=dtype)
            _accumulate(batch, x, formula, torch.empty_like(grad), stats, reduction)
        state = stats.reshape(-1).numpy()
    values = None if state is None else flat(x, channels_last)
    given = (flat(grad, channels_last), values, formula.weights, formula.params, state)
    if needs[0] or needs[1]:
        by_weights = None
        if formula.weights is not None:
            by_weights = flat(gw if needs[1] else torch.empty_like(gx), channels_last)
        traffic = (1 if values is None else 2) * batch.elements * gx.element_size()
        job = _spreading(batch, formula.tag, traffic, reduction)
        do(job, traffic, (*given, flat(gx, channels_last), by_weights, batch.table))
    if needs[2]:
        by_p = np.empty(grad.numel(), formula.params.dtype)
        traffic = 2 * batch.elements * gx.element_size()
        threads.run(
            tables.by_parameter, batch.pieces, traffic, batch.way, formula.tag, *given, by_p,
            batch.table, *batch.geometry,
        )  # fmt: skip
        gp = by_channel(by_p, grad, formula.params.size, channels_last)
    return gx.to(grad.dtype), gw, gp


def _spreading(batch: _Batch, tag: Any, traffic: int, reduction: Any) -> Job:
    """The gradient of an accumulation; its arrays are grad, x, weights, parameters, state, the
    gradients by x and by the weights, and the table."""
    blocks = batch.row_blocks(traffic)
    is_mean = tag is _TOTAL and isinstance(reduction, Mean)
    options = *batch.geometry, blocks, *_divisor(reduction), is_mean
    arguments = lambda *arrays: (tag, *arrays, *options)  # noqa: E731
    return Job(tables.backward, batch.planes * blocks, arguments)
