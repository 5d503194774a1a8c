"""Values alone, of windows at stride 1 over small contiguous planes: whole planes as single rows.

Short rows leave vectors half empty and end before they have begun. A plane is laid out in the cache
with padding behind each row, so that a window that begins anywhere reads what it shall; from there
on it is one row, which is reduced along itself and then in steps of a row, by `grown`. Only what is
written are rows again.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.direct import scaled
from torchpool.kernels.cpu.lines import (
    advance,
    count_of,
    load_some,
    split,
    store_some,
    window_levels,
)
from torchpool.kernels.cpu.parts import APART, INNER, JIT
from torchpool.kernels.cpu.plan import BEFORE, KERNEL, OUT, SIZE
from torchpool.kernels.cpu.scalars import empty_buffer, identity, merge
from torchpool.kernels.cpu.simd import choose, lane_numbers, load_as, splat, store, width
from torchpool.kernels.cpu.sweep import grown, stretches


@njit(**INNER)
def pitch_of(geo):
    """From one row to the next: the windows of a row read its own elements and padding alone, and
    their results do not meet those of the next row."""
    size, outs, before = geo[3, SIZE], geo[3, OUT], geo[3, BEFORE]
    after = outs + geo[3, KERNEL] - 1 - size - before
    return max(size + max(before, after), outs)


@njit(**APART)
def lay_out(tag, x, first, levels, count, plane, geo, pitch):
    """The elements of a plane, merged with those of the planes at further levels of its windows.
    What is written past the end of a row is padding, or is written again by the next row."""
    none = splat(x, identity(tag, x))
    lanes, size = lane_numbers(none), geo[3, SIZE]
    for r in range(geo[2, SIZE]):
        read = first + r * size
        to = (geo[2, BEFORE] + r) * pitch + geo[3, BEFORE]
        for i in range(0, size, width(x)):
            left = size - i
            v = load_some(x, read + i, left)
            for k in range(1, count):
                v = merge(tag, v, load_some(x, read + levels[k] + i, left))
            store(plane, to + i, choose(lanes < left, v, none) if left < width(x) else v)


@njit(**APART)
def write_rows(tag, plane, at, pitch, y, to, end, geo, counts, scale, is_mean):
    """The outputs of a plane, row by row; further planes follow up to y[end]."""
    like, outs = splat(plane, 0), geo[3, OUT]
    for r in range(geo[2, OUT]):
        for o in range(0, outs, width(like)):
            v = load_as(plane, at + r * pitch + o, like)
            v = scaled(v, counts, r * pitch + o, scale, tag, is_mean)
            store_some(y, to + o, v, outs - o, end)
        to += outs


@njit(**INNER)
def fill_counts(counts, geo, tab, pitch, column, fixed):
    """What the outputs of a plane are divided by, but for the count along the leading axes."""
    counts[:] = 1
    for r in range(geo[2, OUT]):
        rows = count_of(geo, tab, 2, column, r)
        for o in range(geo[3, OUT]):
            count = fixed if fixed != 0 else rows * count_of(geo, tab, 3, column, o)
            counts[r * pitch + o] = count


@njit(**JIT)
def planes(begin, end, tag, x, y, geo, tab, column, fixed):
    """Planes of outputs `begin .. end - 1`; windows at stride 1 without dilation along the last two
    axes. A mean divides by `fixed`, or where that is 0 by the count table `column`; a `column` of
    -1 divides by nothing."""
    geo, tab = constants(geo), constants(tab)
    like = splat(x, identity(tag, x))
    lanes, pitch, outs = width(x), pitch_of(geo), geo[2, OUT] * geo[3, OUT]
    places = (geo[2, OUT] + geo[2, KERNEL] - 1) * pitch
    span = places + geo[3, KERNEL] + 2 * lanes
    more = 1 + stretches(geo[3, KERNEL])
    room = empty_buffer(x, (more + stretches(geo[2, KERNEL])) * span)
    room[:] = identity(tag, x)
    is_mean = column >= 0
    counts = empty_buffer(x, geo[2, OUT] * pitch + lanes if is_mean else 1)
    if is_mean:
        fill_counts(counts, geo, tab, pitch, column, fixed)
    levels, o = np.zeros(max(1, geo[0, KERNEL] * geo[1, KERNEL]), np.int64), np.empty(3, np.int64)
    plane = split(begin * geo[2, OUT], geo, OUT, o)
    for unit in range(begin, end):
        count, first = window_levels(geo, tab, o, plane, levels)
        scale = counts.dtype.type(1)
        if is_mean and fixed == 0:
            lead = count_of(geo, tab, 0, column, o[0]) * count_of(geo, tab, 1, column, o[1])
            scale = counts.dtype.type(lead)
        if count == 0:
            room[:span] = identity(tag, x)
        else:
            start = first * geo[2, SIZE] * geo[3, SIZE]
            lay_out(tag, x, start, levels, count, room, geo, pitch)
        at = grown(tag, room, None, span, 0, span, geo[3, KERNEL], 1, places, like)
        at = grown(tag, room, None, span, at, more * span, geo[2, KERNEL], pitch,
                   geo[2, OUT] * pitch, like)  # fmt: skip
        write_rows(tag, room, at, pitch, y, unit * outs, end * outs, geo, counts, scale, is_mean)
        o[2] = geo[2, OUT] - 1
        plane = advance(geo, OUT, o, plane)
