"""Geometry as integer tables that kernels read: four axes always, the pooled ones last."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from torchpool.windows import Axis

# Columns of `Plan.geo`, one row per axis. LO and HI bound the outputs whose window lies inside the
# input; the rest are offsets into `Plan.tab`.
(
    SIZE,
    OUT,
    KERNEL,
    STRIDE,
    DILATION,
    LO,
    HI,
    START,
    FIRST,
    END,
    VALID,
    PADDED,
    COVER,
    COVER_OUT,
    COVER_TAP,
    EMPTY,
    REACH,
) = range(17)
COLUMNS = 17
AXES = 4
_TRIVIAL = Axis(1, 1, 1, 1, 1, 0, 0)


class Plan(NamedTuple):
    """Tables of some windows.

    `geo` (4, 17) int64: numbers of each axis. `tab` int64, of each axis: START, FIRST and END
    (range of valid taps), VALID and PADDED (counts)
    per output; the outputs that cover input i, in order, at COVER[i] .. COVER[i + 1] of COVER_OUT
    and COVER_TAP.
    """

    geo: Any
    tab: Any
    taps: int
    num_in: int
    num_out: int


def regular(axis: Axis) -> Axis:
    """An adaptive axis whose sizes divide has windows at a regular stride."""
    if (
        axis.stride == 0
        and axis.out_size > 0
        and axis.in_size % axis.out_size == 0
        and axis.in_size > 0
    ):
        step = axis.in_size // axis.out_size
        return axis._replace(kernel=step, stride=step)
    return axis


@lru_cache(maxsize=512)
def plan(axes: tuple[Axis, ...]) -> Plan:
    """The tables of these axes."""
    padded = (_TRIVIAL,) * (AXES - len(axes)) + tuple(regular(axis) for axis in axes)
    geo = np.zeros((AXES, COLUMNS), np.int64)
    parts: list[Any] = []
    at = 0
    for row, axis in zip(geo, padded, strict=True):
        tables = _tables(axis)
        row[SIZE], row[OUT], row[KERNEL], row[STRIDE], row[DILATION] = axis[:5]
        row[LO], row[HI] = _interior(axis, tables[1], tables[2])
        row[EMPTY] = int((tables[1] == tables[2]).any())
        row[REACH] = (axis.kernel - 1) * axis.dilation + 1
        for column, table in zip(range(START, COVER_TAP + 1), tables, strict=True):
            row[column] = at
            at += len(table)
        parts += tables
    taps = 1
    for axis in axes:
        taps *= axis.kernel
    num_in, num_out = (int(np.prod([axis[i] for axis in axes], dtype=np.int64)) for i in (0, 1))
    return Plan(geo, np.concatenate(parts), taps, num_in, num_out)


def _tables(axis: Axis) -> list[Any]:
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
    return [start, first, end, counts, padded, cover, cover_out[order], cover_tap[order]]


def _interior(axis: Axis, first: Any, end: Any) -> tuple[int, int]:
    if axis.is_adaptive:
        return 0, 0
    whole = np.flatnonzero((first == 0) & (end == axis.kernel))
    return (int(whole[0]), int(whole[-1]) + 1) if len(whole) else (0, 0)


def views(x: Any, channels_last: bool, num_axes: int) -> tuple[int, int]:
    """How a dense (N, C, *S) reads as (outer, *S, inner): the sizes of outer and inner."""
    n, c = x.shape[:2]
    return (n, c) if channels_last else (n * c, 1)


def leading(axes: Sequence[Axis]) -> int:
    """The row of the first pooled axis in `Plan.geo`."""
    return AXES - len(axes)
