"""Windows that a table gives: from tensors to the kernels of ragged batches, and of segments of
packed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu import Training, formulas, tables, threads
from torchpool.kernels.cpu.arrays import by_channel, effective, flat, parameters
from torchpool.kernels.cpu.direct import ByChannel, ByWindow
from torchpool.kernels.cpu.pages import in_large_pages
from torchpool.kernels.cpu.scalars import Largest, Smallest, Total
from torchpool.reductions import Accumulation, Mean, Reduction, Selection, Sum
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
        """What all kernels but `scatter` take."""
        return self[1:3] + self[4:]

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


def over_runs(
    like: Tensor, reduction: Reduction, dim: int, table: Any, save: bool
) -> Training | None:
    """Both passes over runs of rows, as functions of contiguous tensors like this one.

    Args:
        dim: the axis of the rows.
        table: int64 (N or 1, M, 3): first row, number of rows, 0; N of the axes before dim together
            or of the first of them.
        save: whether there will be a backward pass.
    """
    shape, size = like.shape, like.shape[dim]
    if like.dtype not in _FLOATS or size >= 1 << 31:
        return None
    planes, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    per = 1 if len(table) == 1 else planes // len(table)
    batch = _Batch(inner > 1, table, size, planes, inner, inner, 0, per, 1)
    outs = (*shape[:dim], table.shape[1], *shape[dim + 1 :])
    traffic = batch.elements * like.element_size()
    selects = isinstance(reduction, Selection)
    dtype = layout.state_dtype([Axis(size, 1, size, 1, 1, 0, 0)])
    tag: Any = _TOTAL
    if isinstance(reduction, Selection):
        tag = _LARGEST if reduction.largest else _SMALLEST

    def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = in_large_pages(x.new_empty(outs))
        state = x.new_empty(outs, dtype=dtype) if selects and save else None
        kept = None if state is None else flat(state, False)
        _forward(batch, tag, (flat(x, False), None, None, flat(y, False), kept), traffic, reduction)
        return y, state

    def backward(grad: Tensor, state: Tensor | None) -> Tensor:
        grad = grad.to(layout.compute_dtype(grad.dtype)).contiguous()
        gx = in_large_pages(grad.new_empty(shape))
        arrays = flat(grad, False), flat(gx, False)
        if state is None:
            _spread(batch, _TOTAL, (arrays[0], None, None, None, None), arrays[1], None, reduction)
        else:
            _to_winners(batch, arrays[0], flat(state, False), arrays[1])
        return gx.to(like.dtype)

    return Training(forward, backward)


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
        tag = _LARGEST if reduction.largest else _SMALLEST
        arrays = flat(x, last), live, None, flat(y, last), flat(state, last) if kept else None
        _forward(batch, tag, arrays, batch.elements * x.element_size(), None)
    return y, state if save else x.new_empty(0, dtype=dtype)


def _forward(
    batch: _Batch, tag: Any, arrays: tuple[Any, ...], traffic: int, reduction: Any
) -> None:
    """`arrays`: x, weights or mask, parameters, y, state."""
    threads.run(
        tables.forward, batch.pieces, traffic, batch.way, tag, *arrays, *batch.geometry,
        *_divisor(reduction), isinstance(reduction, Mean),
    )  # fmt: skip


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
        _to_winners(batch, *(flat(t, channels_last) for t in (grad.to(wide), state, gx)))
    return gx.to(grad.dtype)


def _to_winners(batch: _Batch, g: Any, state: Any, gx: Any) -> None:
    blocks = batch.row_blocks(gx.nbytes)
    threads.run(
        tables.scatter, batch.planes * blocks, gx.nbytes, g, state, gx, batch.table, batch.size,
        batch.inner, batch.per, batch.step, blocks,
    )  # fmt: skip


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
    params: Tensor | None,
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
    arrays = flat(x, last), formula.weights, formula.params, flat(y, last), state
    _forward(batch, formula.tag, arrays, traffic, reduction)


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
        _spread(batch, formula.tag, given, flat(gx, channels_last), by_weights, reduction)
    if needs[2]:
        by_p = np.empty(grad.numel(), formula.params.dtype)
        traffic = 2 * batch.elements * gx.element_size()
        threads.run(
            tables.by_parameter, batch.pieces, traffic, batch.way, formula.tag, *given, by_p,
            *batch.geometry,
        )  # fmt: skip
        gp = by_channel(by_p, grad, formula.params.size, channels_last)
    return gx.to(grad.dtype), gw, gp


def _spread(
    batch: _Batch, tag: Any, given: tuple[Any, ...], gx: Any, gw: Any, reduction: Any
) -> None:
    """`given`: grad, x, weights, parameters, state."""
    traffic = (1 if given[1] is None else 2) * batch.elements * gx.itemsize
    blocks = batch.row_blocks(traffic)
    is_mean = tag is _TOTAL and isinstance(reduction, Mean)
    threads.run(
        tables.backward, batch.planes * blocks, traffic, tag, *given, gx, gw, *batch.geometry,
        blocks, *_divisor(reduction), is_mean,
    )  # fmt: skip
