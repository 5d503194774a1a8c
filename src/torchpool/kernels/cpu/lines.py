"""Output rows as lists of input rows: what every kernel visits."""

from __future__ import annotations

import numpy as np
from numba import njit

from torchpool.kernels.cpu.parts import INNER
from torchpool.kernels.cpu.plan import (
    BEFORE,
    COVER,
    COVER_OUT,
    COVER_TAP,
    DILATION,
    END,
    FIRST,
    KERNEL,
    OUT,
    SIZE,
    START,
    STRIDE,
)
from torchpool.kernels.cpu.simd import (
    load,
    load_first,
    per_line,
    prefetch,
    store,
    store_first,
    width,
)


@njit(**INNER)
def is_idle(geo, a):
    """Whether nothing is pooled along axis `a`; such an axis has no tables."""
    is_plain = geo[a, KERNEL] == 1 and geo[a, STRIDE] == 1 and geo[a, BEFORE] == 0
    return is_plain and geo[a, SIZE] == geo[a, OUT]


@njit(**INNER)
def is_flat(geo):
    """Whether the first two axes are trivial."""
    return geo[0, SIZE] == 1 and geo[1, SIZE] == 1 and is_idle(geo, 0) and is_idle(geo, 1)


@njit(**INNER)
def split(unit, geo, column, o):
    """Which row: positions along the leading axes into `o`; returns the plane. `column` is OUT or
    SIZE."""
    for k in range(3):
        a = 2 - k
        o[a] = unit % geo[a, column]
        unit //= geo[a, column]
    return unit


@njit(**INNER)
def advance(geo, column, o, plane):
    """The row after `o` in row-major order, and its plane."""
    o[2] += 1
    if o[2] < geo[2, column]:
        return plane
    o[2] = 0
    o[1] += 1
    if o[1] < geo[1, column]:
        return plane
    o[1] = 0
    o[0] += 1
    if o[0] < geo[0, column]:
        return plane
    o[0] = 0
    return plane + 1


@njit(**INNER)
def taps_of(geo, tab, a, o):
    """The valid taps of window `o` along axis `a`: the first, the end, and where tap 0 lies."""
    if is_idle(geo, a):
        return np.int64(0), np.int64(1), o
    return tab[geo[a, FIRST] + o], tab[geo[a, END] + o], tab[geo[a, START] + o]


@njit(**INNER)
def window_rows(geo, tab, o, plane, size, rows, codes):
    """The input rows of an output row: where each begins, in elements, and the offset of its first
    tap in the window. Returns how many there are."""
    found = 0
    if is_flat(geo):
        first, end, start = taps_of(geo, tab, 2, o[2])
        for j in range(first, end):
            rows[found] = (plane * geo[2, SIZE] + start + j * geo[2, DILATION]) * size
            codes[found] = j * geo[3, KERNEL]
            found += 1
        return found
    first0, end0, start0 = taps_of(geo, tab, 0, o[0])
    first1, end1, start1 = taps_of(geo, tab, 1, o[1])
    first2, end2, start2 = taps_of(geo, tab, 2, o[2])
    for j0 in range(first0, end0):
        i0 = plane * geo[0, SIZE] + start0 + j0 * geo[0, DILATION]
        for j1 in range(first1, end1):
            i1 = i0 * geo[1, SIZE] + start1 + j1 * geo[1, DILATION]
            for j2 in range(first2, end2):
                i2 = i1 * geo[2, SIZE] + start2 + j2 * geo[2, DILATION]
                rows[found] = i2 * size
                codes[found] = ((j0 * geo[1, KERNEL] + j1) * geo[2, KERNEL] + j2) * geo[3, KERNEL]
                found += 1
    return found


@njit(**INNER)
def window_levels(geo, tab, o, plane, levels):
    """The planes of the last two axes that windows reach into: how many, the first of them, and how
    far each lies from the first, in elements, into `levels`."""
    first0, end0, start0 = taps_of(geo, tab, 0, o[0])
    first1, end1, start1 = taps_of(geo, tab, 1, o[1])
    found, base = 0, np.int64(0)
    for j0 in range(first0, end0):
        i0 = plane * geo[0, SIZE] + start0 + j0 * geo[0, DILATION]
        for j1 in range(first1, end1):
            i1 = i0 * geo[1, SIZE] + start1 + j1 * geo[1, DILATION]
            if found == 0:
                base = i1
            levels[found] = (i1 - base) * geo[2, SIZE] * geo[3, SIZE]
            found += 1
    return found, base


@njit(**INNER)
def covers_of(geo, tab, a, i):
    """Where the outputs that cover position `i` along axis `a` stand in the tables: begin, end."""
    if is_idle(geo, a):
        return i, i + 1
    return tab[geo[a, COVER] + i], tab[geo[a, COVER] + i + 1]


@njit(**INNER)
def covering(geo, tab, a, i, k):
    """An output that covers position `i` along axis `a`, and by which tap."""
    if is_idle(geo, a):
        return i, 0
    return tab[geo[a, COVER_OUT] + k], tab[geo[a, COVER_TAP] + k]


@njit(**INNER)
def cover_rows(geo, tab, i, plane, size, rows, codes):
    """The output rows that cover an input row, in order: where each begins, in elements, and the
    offset in its window of the row's first tap. Returns how many there are."""
    found = 0
    if is_flat(geo):
        begin, end = covers_of(geo, tab, 2, i[2])
        for k in range(begin, end):
            o, j = covering(geo, tab, 2, i[2], k)
            rows[found] = (plane * geo[2, OUT] + o) * size
            codes[found] = j * geo[3, KERNEL]
            found += 1
        return found
    begin0, end0 = covers_of(geo, tab, 0, i[0])
    begin1, end1 = covers_of(geo, tab, 1, i[1])
    begin2, end2 = covers_of(geo, tab, 2, i[2])
    for k0 in range(begin0, end0):
        o0, j0 = covering(geo, tab, 0, i[0], k0)
        for k1 in range(begin1, end1):
            o1, j1 = covering(geo, tab, 1, i[1], k1)
            for k2 in range(begin2, end2):
                o2, j2 = covering(geo, tab, 2, i[2], k2)
                row = ((plane * geo[0, OUT] + o0) * geo[1, OUT] + o1) * geo[2, OUT] + o2
                rows[found] = row * size
                codes[found] = ((j0 * geo[1, KERNEL] + j1) * geo[2, KERNEL] + j2) * geo[3, KERNEL]
                found += 1
    return found


@njit(**INNER)
def most_rows(geo):
    """At most so many input rows make an output row."""
    return max(1, geo[0, KERNEL] * geo[1, KERNEL] * geo[2, KERNEL])


@njit(**INNER)
def most_at(geo, tab, a):
    """At most so many outputs cover a position along axis `a`."""
    most = np.int64(1)
    if not is_idle(geo, a):
        for i in range(geo[a, SIZE]):
            most = max(most, tab[geo[a, COVER] + i + 1] - tab[geo[a, COVER] + i])
    return most


@njit(**INNER)
def most_covers(geo, tab):
    """At most so many output rows cover an input row."""
    return most_at(geo, tab, 0) * most_at(geo, tab, 1) * most_at(geo, tab, 2)


@njit(**INNER)
def count_of(geo, tab, a, column, o):
    """Elements of window `o` along axis `a`, at least 1."""
    return np.int64(1) if is_idle(geo, a) else max(1, tab[geo[a, column] + o])


@njit(**INNER)
def lead_count(geo, tab, column, o):
    """Elements of the windows of the row of outputs `o` along the leading axes, at least 1."""
    count = np.int64(1)
    for a in range(3):
        count *= count_of(geo, tab, a, column, o[a])
    return count


@njit(**INNER)
def count_row(counts, geo, tab, inner, column, fixed):
    """What each element of a row is divided by, but for the count along the leading axes; 1 past
    the row's end. `fixed` replaces counts unless it is 0."""
    counts[:] = 1
    for o in range(geo[3, OUT]):
        count = fixed
        if fixed == 0:
            count = count_of(geo, tab, 3, column, o)
        for c in range(inner):
            counts[o * inner + c] = count


# Asking for memory ahead of time: rows are read in an order that the hardware does not foresee, so
# that a request for the bytes that come next in memory, in order, is worth a factor of two.

AHEAD = 32
"""How far ahead, in cache lines."""
STREAM = 16
"""Lines of one step that are asked for; longer runs the hardware foresees."""
CACHED = 1 << 15
"""Inputs of fewer lines are taken to be in the cache."""


@njit(**INNER)
def share_of(x, units, steps):
    """Elements of x for each unit of work, and lines to ask for in each of its steps."""
    share = x.size / max(1, units)
    if x.size < CACHED * per_line(x):
        return share, np.int64(0)
    return share, np.int64(np.ceil(share / per_line(x) / max(1, steps)))


@njit(**INNER)
def load_some(x, at, count):
    """The elements from `at` on: `count` of them, and then whatever lies behind."""
    return load(x, at) if at + width(x) <= x.size else load_first(x, at, count)


@njit(**INNER)
def store_some(y, at, v, count, end):
    """The same way back: what lies behind the `count` lanes is to be written later, but nothing
    from y[end] on."""
    if at + width(v) <= end:
        store(y, at, v)
    else:
        store_first(y, at, v, count)


@njit(**INNER)
def lines_ahead(x):
    return AHEAD * per_line(x)


@njit(**INNER)
def request(x, at, lines):
    """Asks for the next lines from element `at` on; returns where to go on."""
    for _ in range(lines):
        prefetch(x, at)
        at += per_line(x)
    return at
