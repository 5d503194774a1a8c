"""Geometry as integer tables that kernels read: four axes always, the pooled ones last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from torchpool.windows import Axis

# Columns of `Plan.geo`, one row per axis; those from START on are offsets into `Plan.tab`.
(
    SIZE,
    OUT,
    KERNEL,
    STRIDE,
    DILATION,
    BEFORE,
    LO,
    HI,
    EMPTY,
    START,
    FIRST,
    END,
    VALID,
    PADDED,
    COVER,
    COVER_OUT,
    COVER_TAP,
    TAPS,
    STEPS,
) = range(19)
COLUMNS = 19
AXES = 4
LANES = 64
"""Lists of windows are filled up to a multiple of the lanes that vectors have at most."""
_TRIVIAL = Axis(1, 1, 1, 1, 1, 0, 0)


class Plan(NamedTuple):
    """Windows over the memory of a dense tensor, read as (outer, *S, inner) with four axes.

    Axes along which nothing is pooled are a part of `outer` and `inner`.

    `geo` (4, 19) int64: numbers of each axis; LO and HI bound the outputs whose window lies inside
    the input, EMPTY says whether some window lies outside, BEFORE is the padding. `tab` int64, of
    each axis: START, FIRST and END (range of valid taps), VALID and PADDED (counts) per output; the
    outputs that cover input i, in order, at COVER[i] .. COVER[i + 1] of COVER_OUT and COVER_TAP; of
    windows that are listed, as bits, the TAPS of each output, and the STEPS from tap 0 to each.

    `by_channel` and `by_window` say what the lanes of a vector are (else windows side by side),
    `by_list` that such windows are listed one by one, `is_leaf` whether windows are small and lie
    on contiguous rows, `is_small` whether planes are and windows are at stride 1, `is_large`
    whether windows are large and may be reduced axis by axis, `block` rows of outputs at a time,
    `overlaps` whether many windows share an element. `taps` is the size of a window; `covers`
    outputs cover an element at most. `planes_each` is how many planes of `outer` a channel has (0:
    channels are the fastest axis, `channels_last`). A band is so many positions along the leading
    axis. `slots` rows of lifted elements are kept for the windows that share them; 0 for none.
    """

    geo: Any
    tab: Any
    outer: int
    inner: int
    rows_out: int
    planes_each: int
    taps: int
    channels_last: bool
    by_channel: bool
    by_window: bool
    by_list: bool
    is_leaf: bool
    is_large: bool
    is_small: bool
    overlaps: bool
    block: int
    has_empty: bool
    covers: int
    band: int
    bands: int
    slots: int

    @property
    def slab(self) -> int:
        """Elements at one position along the leading axis."""
        lead = lead_axis(self.geo)
        return self.inner * math.prod(int(n) for n in self.geo[lead + 1 :, SIZE])

    @property
    def moved(self) -> float:
        """The share of inputs and outputs that is read and written."""
        outs, ins = self._sizes
        return (min(ins, outs * self.taps) + outs) / max(1, ins + outs)

    @property
    def is_apart(self) -> bool:
        """Whether windows share so few elements that each may as well read its own."""
        outs, ins = self._sizes
        return outs * self.taps <= 1.5 * ins

    @property
    def _sizes(self) -> tuple[int, int]:
        """Outputs and inputs of a plane."""
        outs, ins = (math.prod(int(n) for n in self.geo[:, column]) for column in (OUT, SIZE))
        return outs, ins

    @property
    def scatters(self) -> bool:
        """Whether the gradient of a selection asks each window for its winner, not each element for
        its windows: which is quicker, by nanoseconds for each element as they were measured."""
        outs, ins = self._sizes
        share = outs / max(1, ins)
        if self.by_channel:
            apart = 1.2 + int(self.geo[lead_axis(self.geo), KERNEL]) * self.slab / FAR
            position = 0 if self.geo[3, STRIDE] == 1 else 12 / self.inner
            return 0.15 + apart * share < position + 0.2 + 0.085 * self.taps * share
        if not self.is_leaf:
            return True
        return 1.4 * share < 35 / int(self.geo[3, SIZE]) + 0.1 * self.taps * share


def _regular(axis: Axis) -> Axis:
    """An adaptive axis whose sizes divide has windows at a regular stride."""
    divides = axis.is_adaptive and axis.kernel * axis.out_size == axis.in_size > 0
    return axis._replace(stride=axis.kernel) if divides else axis


def is_whole(axis: Axis) -> bool:
    """Whether the one window along an axis is all of it."""
    return axis.out_size == 1 and axis.kernel == axis.in_size and not (axis.before or axis.after)


def _is_idle(axis: Axis) -> bool:
    return axis.kernel == axis.stride == 1 and axis.in_size == axis.out_size and not axis.before


def _merged(first: Axis, whole: Axis) -> Axis:
    """Two axes, the second wholly inside each window, as one axis."""
    size = whole.in_size
    return Axis(
        first.in_size * size,
        first.out_size,
        first.kernel * size,
        first.stride * size,
        1,
        first.before * size,
        first.after * size,
    )


def _canonical(axes: tuple[Axis, ...]) -> tuple[list[Axis], int, int]:
    """The same windows with as few axes as possible, and the factors of outer and inner."""
    kept: list[Axis] = []
    for axis in map(_regular, axes):
        previous = kept[-1] if kept else None
        if (
            previous is not None
            and not previous.is_adaptive
            and (previous.dilation == 1 or previous.kernel == 1)
            and not _is_idle(previous)
            and is_whole(axis)
            and axis.dilation == 1
        ):
            kept[-1] = _merged(previous, axis)
        else:
            kept.append(axis)
    outer = inner = 1
    while len(kept) > 1 and _is_idle(kept[0]):
        outer *= kept.pop(0).in_size
    while len(kept) > 1 and _is_idle(kept[-1]):
        inner *= kept.pop().in_size
    return kept, outer, inner


@lru_cache(maxsize=512)
def plan(
    axes: tuple[Axis, ...], planes: int, channels: int, channels_last: bool, joins: bool = False
) -> Plan:
    """How the windows of a dense tensor of `planes` times `channels` planes are visited. With
    `joins` small planes may be joined: those that are one window each to rows of windows, those
    with small irregular windows to a list of windows."""
    kept, more_outer, more_inner = _canonical(axes)
    outer, inner = (planes, channels) if channels_last else (planes * channels, 1)
    outer, inner = outer * more_outer, inner * more_inner
    listed = None
    if joins and inner == len(kept) == 1 and is_whole(kept[0]) and kept[0].dilation == 1:
        size = kept[0].in_size
        count = _divisor(outer, JOINED // max(1, size))
        kept, outer = [Axis(size * count, count, size, size, 1, 0, 0)], outer // count
    elif joins and inner == 1 and _is_listed(kept):
        count = _divisor(outer, JOINED // _listed_taps(kept))
        listed = _Listed(kept, count)
        kept, outer = [listed.axis], outer // count
    elif joins and inner == len(kept) == 1 and (rows := _rows_joined(kept[0], outer)) > 1:
        kept, outer = [_idle(rows), kept[0]], outer // rows
    elif joins and len(kept) == 1 and _is_large((_TRIVIAL,) * 3 + (kept[0],), _is_long(kept[0])):
        kept, outer = [_idle(outer), kept[0]], 1  # many rows at a time
    if inner > 1 and len(kept) < AXES and is_whole(kept[-1]):
        kept.append(_TRIVIAL)  # what windows hold along all of an axis are rows to be merged
    padded = (*(_TRIVIAL,) * (AXES - len(kept)), *kept)
    geo = np.zeros((AXES, COLUMNS), np.int64)
    parts: list[Any] = []
    at = 0
    for row, axis in zip(geo, padded, strict=True):
        tables = listed.tables if listed and axis is listed.axis else _tables(axis)
        row[SIZE], row[OUT], row[KERNEL], row[STRIDE], row[DILATION] = axis[:5]
        row[BEFORE] = axis.before
        row[LO], row[HI] = (0, axis.out_size) if _is_idle(axis) else _interior(axis, *tables[1:3])
        row[EMPTY] = int((tables[1] == tables[2]).any())
        for column, table in zip(range(START, COLUMNS), tables, strict=True):
            row[column] = at
            at += len(table)
        parts += tables
    last = padded[-1]
    is_long = _is_long(last)
    band, bands = _bands(geo, inner)
    return Plan(
        geo,
        np.concatenate(parts),
        outer,
        inner,
        outer * math.prod(int(out) for out in geo[:-1, OUT]),
        0 if channels_last else more_outer,
        math.prod(axis.kernel for axis in axes),
        channels_last,
        inner > 1,
        inner == 1 and listed is None and (last.is_adaptive or is_long),
        listed is not None,
        inner == 1 and last.kernel <= 3 and last.dilation == 1 and last.stride in (1, 2),
        _is_large(padded, is_long and inner == 1),
        inner == 1 and listed is None and _are_small(*padded[2:]),
        _overlaps(padded[2]) or (padded[2].kernel == 1 and _overlaps(last)),
        _block(geo, inner, outer),
        bool(geo[:, EMPTY].any()),
        math.prod(map(_covers, padded)),
        band,
        bands,
        0 if listed else _slots(padded, geo, inner),
    )


def _slots(axes: Sequence[Axis], geo: Any, inner: int) -> int:
    """A power of two of rows of the input among which those of a window lie, where windows overlap,
    none is empty, and so many rows stay in the second cache; else 0."""
    reach, apart = 0, 1
    for axis in reversed(axes[:-1]):
        reach += (axis.kernel - 1) * axis.dilation * apart
        apart *= axis.in_size
    slots = 1 << reach.bit_length()
    outs, ins = (math.prod(axis[column] for axis in axes) for column in (1, 0))
    overlaps = outs * math.prod(axis.kernel for axis in axes) >= SHARED * ins
    regular = all(axis.stride > 0 for axis in axes) and not _is_long(axes[-1])
    fits = slots * axes[-1].in_size * inner <= SCRATCH
    return slots if overlaps and regular and fits and not geo[:, EMPTY].any() else 0


def _listed_taps(axes: Sequence[Axis]) -> int:
    return math.prod(axis.out_size * axis.kernel for axis in axes)


def _is_listed(axes: Sequence[Axis]) -> bool:
    """Whether the windows of a plane are small, irregular along the last axis, and few."""
    return (
        axes[-1].is_adaptive
        and not any(axis.before for axis in axes)
        and math.prod(axis.kernel for axis in axes) <= FEW_TAPS
        and 0 < _listed_taps(axes) <= JOINED
    )


class _Listed:
    """The windows of some planes as one row of windows, of which each tap is listed.

    Attributes:
        axis: the row of windows.
        tables: its tables; nothing asks what covers an element.
    """

    def __init__(self, axes: Sequence[Axis], planes: int) -> None:
        start, steps = np.arange(planes), np.zeros(1, np.int64)
        has = np.ones((1, planes), bool)  # (taps, outputs)
        for axis in axes:
            taps = np.arange(axis.kernel)
            first, end = np.array(axis.taps(), np.int64).reshape(-1, 2).T
            inside = (taps[:, None] >= first) & (taps[:, None] < end)
            has = (has[:, None, :, None] & inside[None, :, None, :]).reshape(
                len(has) * axis.kernel, -1
            )
            start = np.add.outer(start * axis.in_size, axis.starts()).reshape(-1)
            steps = np.add.outer(steps * axis.in_size, taps * max(1, axis.dilation)).reshape(-1)
        outs, size = len(start), planes * math.prod(axis.in_size for axis in axes)
        counts, zeros, none = has.sum(0), np.zeros(outs, np.int64), np.empty(0, np.int64)
        bits = (has << np.arange(len(steps))[:, None]).sum(0)
        start, bits = (np.pad(table, (0, -outs % LANES), "edge") for table in (start, bits))
        self.axis = Axis(size, outs, len(steps), 0, 1, 0, 0)
        self.tables = [start, zeros, counts, counts, counts, none, none, none, bits, steps]


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not larger than `most`, or 1."""
    return next((d for d in range(min(number, most), 1, -1) if number % d == 0), 1)


JOINED = 1 << 12
"""Elements of planes that are joined, or taps of their windows if those are listed."""
FEW_TAPS = 16
"""Irregular windows of at most so many elements are listed."""
LONG = 16
"""Windows of so many taps are read along themselves, unless they overlap much."""
SCRATCH = 1 << 15
"""Elements of the shares of a band that stay in the second cache."""
SHARED = 1.5
"""Windows in which an element takes part, on average, from which on it is lifted once for all."""
FAR = 50_000
"""Elements between the first and the last that a window selects from, by which the time doubles
that it takes to add to one of them."""


OVERLAP = 4
"""Elements that belong to more windows along an axis are reduced axis by axis where possible."""
LARGE = 12
"""Windows of more elements are reduced axis by axis where that is possible."""
SHORT = 64
"""Rows of up to so many elements, or twice as many if windows are large, are better reduced as one
row than one by one."""
PLANE = 1 << 13
"""Elements of a plane that is reduced as one row: its stages stay in the second cache."""
BLOCKS = 8
"""Blocks that a call should have."""
BUFFER = 1 << 17
"""Elements of the rows of a block that stay in the second cache."""


def _is_long(axis: Axis) -> bool:
    return axis.kernel >= LONG and OVERLAP * axis.stride >= axis.kernel and axis.dilation == 1


def _overlaps(axis: Axis) -> bool:
    return axis.kernel > OVERLAP * axis.stride


def _idle(size: int) -> Axis:
    return Axis(size, size, 1, 1, 1, 0, 0)


def _is_large(axes: Sequence[Axis], is_long: bool) -> bool:
    first, second, *last = axes
    regular = all(axis.dilation == 1 and axis.stride > 0 for axis in last)
    return (
        first.in_size == second.in_size == first.kernel == second.kernel == 1
        and regular
        and not is_long
        and last[0].kernel * last[1].kernel > LARGE
    )


def _are_small(rows: Axis, row: Axis) -> bool:
    regular = all(axis.dilation == axis.stride == 1 for axis in (rows, row))
    short = SHORT if rows.kernel * row.kernel <= LARGE else 2 * SHORT
    places = math.prod(axis.in_size + axis.before + axis.after for axis in (rows, row))
    return regular and rows.in_size > 1 and row.in_size <= short and places <= PLANE


def _rows_joined(row: Axis, number: int) -> int:
    """How many of a number of rows are reduced as one plane, in the first cache."""
    return _divisor(number, PLANE // (4 * row.in_size)) if _are_small(_idle(2), row) else 1


def _block(geo: Any, inner: int, outer: int) -> int:
    """Rows of outputs of a block: as many as the cache holds, or fewer where threads would find too
    few blocks, but not fewer than twice a window."""
    row = int(geo[-1, OUT]) * inner
    kernel, stride, outs = (int(geo[2, column]) for column in (KERNEL, STRIDE, OUT))
    least = max(2 * kernel // max(1, stride), 8)
    most = max((BUFFER // max(1, row) - kernel) // max(1, stride), least)
    count = max(-(-outs // most), min(-(-BLOCKS // max(1, outer)), outs // least))
    return max(1, -(-outs // max(1, count)))


def _covers(axis: Axis) -> int:
    """How many windows cover an element at most."""
    if axis.is_adaptive:
        return -(-axis.out_size // max(1, axis.in_size)) + 1
    return -(-axis.kernel // axis.stride)


def lead_axis(geo: Any) -> int:
    """The first of the leading axes that has more than one position."""
    if geo[0, SIZE] > 1 or geo[0, OUT] > 1:
        return 0
    return 1 if geo[1, SIZE] > 1 or geo[1, OUT] > 1 else 2


def _bands(geo: Any, inner: int) -> tuple[int, int]:
    """Positions of a band along the leading axis, and how many bands a plane has."""
    lead = lead_axis(geo)
    size, kernel = int(geo[lead, SIZE]), int(geo[lead, KERNEL])
    stride = max(1, int(geo[lead, STRIDE]))
    row = int(geo[-1, OUT]) * inner * math.prod(int(out) for out in geo[lead + 1 : -1, OUT])
    most = SCRATCH // max(1, row) * stride
    band = max(1, min(size, max(most, 2 * kernel, 8), -(-size // 2) if size > 8 else size))
    return band, -(-size // band)


def _tables(axis: Axis) -> list[Any]:
    if _is_idle(axis):  # kernels do not ask, and there may be millions of rows
        return [np.empty(0, np.int64)] * (COLUMNS - START)
    outs = np.arange(axis.out_size)
    taps = np.array(axis.taps(), np.int64).reshape(-1, 2)
    start = np.array(axis.starts(), np.int64)
    first, end = taps[:, 0], taps[:, 1]
    counts = end - first
    cover_out = np.repeat(outs, counts)
    cover_tap = (
        np.arange(len(cover_out))
        - np.repeat(np.cumsum(counts) - counts, counts)
        + np.repeat(first, counts)
    )
    position = start[cover_out] + cover_tap * axis.dilation
    order = np.argsort(position, kind="stable")
    cover = np.searchsorted(position[order], np.arange(axis.in_size + 1))
    padded = counts if axis.is_adaptive else np.array(axis.counts(True), np.int64)
    none = np.empty(0, np.int64)
    order_of = cover_out[order], cover_tap[order]
    return [start, first, end, counts, padded, cover, *order_of, none, none]


def _interior(axis: Axis, first: Any, end: Any) -> tuple[int, int]:
    if axis.is_adaptive:
        return 0, 0
    whole = np.flatnonzero((first == 0) & (end == axis.kernel))
    return (int(whole[0]), int(whole[-1]) + 1) if len(whole) else (0, 0)
