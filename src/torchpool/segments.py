"""Pooling of segments: packed rows that belong together by offsets or by an index."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchpool import ragged
from torchpool.functional.cases import check_types, run_table
from torchpool.functional.samples import over_runs
from torchpool.kernels import layout
from torchpool.reductions import Reduction
from torchpool.windows import Global

__all__ = ["segment_median", "segment_pool", "segment_quantile"]

_WHOLE = Global()
INTERPOLATIONS = ("linear", "lower", "higher", "nearest", "midpoint")


class _Segments(NamedTuple):
    """Segments as runs of rows: of the rows as given, or in the order `order`."""

    offsets: Tensor
    order: Tensor | None

    def sorted(self, rows: Tensor | None, dim: int) -> Tensor | None:
        """Rows in the order of the segments."""
        if rows is None or self.order is None or rows.ndim == 0 or rows.shape[dim] == 1:
            return rows
        return rows.index_select(dim, self.order)


def _segments(
    size: int, device: torch.device, offsets: Any, index: Any, num_segments: int | None
) -> _Segments:
    if (offsets is None) == (index is None):
        raise ValueError("give either offsets (sorted runs of rows) or index (one number per row)")
    if index is None:
        if num_segments is not None:
            raise ValueError(f"num_segments={num_segments} belongs to index; offsets tell theirs")
        return _Segments(ragged.check_offsets(offsets, size, device), None)
    index = ragged.check_index(index, size, device, num_segments)
    if num_segments is None:
        num_segments = int(index.max()) + 1 if size else 0
    order = None
    if not ragged.is_readable(index) or bool((index[1:] < index[:-1]).any()):
        index, order = index.sort(stable=True)
    marks = torch.arange(num_segments + 1, device=device)
    return _Segments(torch.searchsorted(index, marks), order)


def segment_pool(
    values: Tensor,
    reduction: Reduction,
    *,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
    num_segments: int | None = None,
    dim: int = 0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    return_indices: bool = False,
    fill: float = 0,
) -> Any:
    """Turns each segment of rows into one row.

    Args:
        values: packed rows, any real dtype.
        reduction: what a segment becomes: `Max()`, `Mean()`, `SoftmaxMean(1.0)`, ... A tensor as
            its parameter has one value, or one per channel (the last axis that is not `dim`).
        offsets: integer (M + 1,): segment i is the rows `offsets[i] .. offsets[i + 1] - 1`; or
        index: integer (P,), the segment of each row, sorted or not.
        num_segments: how many segments `index` speaks of; by default its largest entry + 1, which
            waits for the device. Rows of a larger index are refused on the CPU and left out
            elsewhere.
        dim: the axis of the rows.
        mask: bool, broadcastable to values; elements where it is False take no part.
        weights: floating, broadcastable to values, as in `torchpool.pool`.
        return_indices: also return the row of each winner (int64); -1 for an empty segment.
        fill: value of a segment that has no valid element.
    Shape:
        values (P, *) -> (M, *)
    Returns:
        One row per segment; with return_indices the pair (values, indices).
    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    >>> from torchpool import Mean
    >>> rows = torch.arange(10.0).reshape(5, 2)
    >>> segment_pool(rows, Mean(), offsets=torch.tensor([0, 2, 2, 5]))
    tensor([[1., 2.],
            [0., 0.],
            [6., 7.]])
    """
    check_types(values, reduction, _WHOLE)
    dim = _row_axis(values, dim)
    segments = _segments(values.shape[dim], values.device, offsets, index, num_segments)
    size = values.shape[dim]
    if mask is not None:
        mask = segments.sorted(_aligned(mask, values, "mask"), dim)
    if weights is not None:
        weights = segments.sorted(_aligned(weights, values, "weights"), dim)
    rows = segments.sorted(values, dim)
    assert rows is not None
    others = (mask, weights, return_indices, fill)
    runs = partial(ragged.packed_runs, segments.offsets)
    y = over_runs(rows, reduction, _WHOLE, dim, segments.offsets, others, runs)
    if y is not None:
        return y
    table = ragged.segment_table(segments.offsets, size)
    pooled = run_table(
        rows, reduction, _WHOLE, table, dim, mask, weights, return_indices, fill, True
    )
    if not return_indices or segments.order is None:
        return pooled
    y, places = pooled
    return y, torch.where(places < 0, -1, segments.order[places.clamp(min=0)])


def _aligned(other: Any, values: Tensor, name: str) -> Any:
    """A mask or weights with as many axes as the values, so that its rows can be put in order."""
    if not isinstance(other, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(other).__name__}")
    return other[(None,) * (values.ndim - other.ndim)] if other.ndim < values.ndim else other


def _row_axis(values: Tensor, dim: int) -> int:
    if not -values.ndim <= dim < values.ndim:
        raise ValueError(f"dim={dim!r} is out of range for values of shape {tuple(values.shape)}")
    return dim % values.ndim


def segment_quantile(
    values: Tensor,
    q: float,
    *,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
    num_segments: int | None = None,
    dim: int = 0,
    interpolation: str = "linear",
    fill: float = 0,
) -> Tensor:
    """The q-th quantile of each segment, by sorting all rows at once by segment and value.

    Args:
        values: packed rows, floating.
        q: in [0, 1].
        offsets, index, num_segments, dim: as in `segment_pool`.
        interpolation: where the quantile lies between two elements: "linear", "lower", "higher",
            "nearest" or "midpoint", as in `torch.quantile`.
        fill: value of an empty segment.
    Shape:
        values (P, *) -> (M, *)
    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    >>> rows = torch.tensor([[1.0], [5.0], [2.0], [7.0]])
    >>> segment_quantile(rows, 0.5, offsets=torch.tensor([0, 3, 4])).T
    tensor([[2., 7.]])
    """
    _check_quantile(values, q, interpolation)
    dim = _row_axis(values, dim)
    segments = _segments(values.shape[dim], values.device, offsets, index, num_segments)
    rows = segments.sorted(values, dim)
    assert rows is not None
    rows = rows.movedim(dim, 0)
    shape = rows.shape[1:]
    flat = rows.reshape(rows.shape[0], -1)
    ordered = flat.gather(0, _within_segments(flat.detach(), segments.offsets))
    y = _between(ordered, segments.offsets, q, interpolation, fill)
    return y.reshape(-1, *shape).movedim(0, dim)


def segment_median(
    values: Tensor,
    *,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
    num_segments: int | None = None,
    dim: int = 0,
    fill: float = 0,
) -> Tensor:
    """The median of each segment; of an even number of elements the lower of the two in the middle,
    as `torch.median`.

    Args:
        values, offsets, index, num_segments, dim, fill: as in `segment_quantile`.
    Shape:
        values (P, *) -> (M, *)
    """
    return segment_quantile(
        values, 0.5, offsets=offsets, index=index, num_segments=num_segments, dim=dim,
        interpolation="lower", fill=fill,
    )  # fmt: skip


def _check_quantile(values: Any, q: Any, interpolation: str) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a torch.Tensor, not {type(values).__name__}")
    if not values.dtype.is_floating_point:
        raise TypeError(f"values have dtype {values.dtype}; quantiles need floating values")
    if not isinstance(q, (int, float)) or not 0 <= q <= 1:
        raise ValueError(f"q={q!r} must be a number in [0, 1]")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} must be one of {INTERPOLATIONS}")


def _within_segments(flat: Tensor, offsets: Tensor) -> Tensor:
    """The order (P, C) that sorts each segment's rows of each channel, segment after segment."""
    by_value = flat.sort(dim=0, stable=True).indices
    row = torch.arange(flat.shape[0], device=flat.device)
    segment = torch.searchsorted(offsets, row, right=True)
    by_segment = segment[by_value].sort(dim=0, stable=True).indices
    return by_value.gather(0, by_segment)


def _between(ordered: Tensor, offsets: Tensor, q: float, interpolation: str, fill: float) -> Tensor:
    """The quantile of runs that are sorted; a run that holds a NaN (sorted last) gives NaN."""
    if ordered.shape[0] == 0:
        return ordered.new_full((offsets.shape[0] - 1, ordered.shape[1]), fill)
    count = offsets.diff()
    last = (count - 1).clamp(min=0)
    place = q * last.double()
    if interpolation == "nearest":
        place = place.round()
    low, high = place.floor().long(), place.ceil().long()
    share = (place - low).unsqueeze(-1)
    if interpolation in ("lower", "higher", "midpoint"):
        share = torch.full_like(
            share, {"lower": 0.0, "higher": 1.0, "midpoint": 0.5}[interpolation]
        )
    wide = ordered.to(layout.compute_dtype(ordered.dtype))
    below, above, worst = (
        wide[(offsets[:-1] + at).clamp(max=wide.shape[0] - 1)] for at in (low, high, last)
    )
    # Equal neighbours stand for themselves: the difference of two infinities is no number.
    step = torch.where(below == above, 0, above - torch.where(below == above, above, below))
    share = share.to(wide.dtype)
    y = torch.where(share == 0, below, torch.where(share == 1, above, below + share * step))
    y = torch.where(worst.isnan(), math.nan, y)
    return torch.where((count > 0).unsqueeze(-1), y, fill).to(ordered.dtype)
