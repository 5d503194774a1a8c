"""Values of small windows over contiguous rows: two or three taps along the last axis.

The input rows of a window are merged in registers, column by column, and each vector of columns is
used for as many taps as reach it: every element is loaded once for each output row, and nothing is
written but results.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from torchpool.kernels.cpu.lines import (
    advance,
    count_row,
    lead_count,
    lines_ahead,
    most_rows,
    request,
    share_of,
    split,
    window_rows,
)
from torchpool.kernels.cpu.plan import BEFORE, KERNEL, OUT, SIZE, STRIDE
from torchpool.kernels.cpu.scalars import (
    APART,
    INNER,
    JIT,
    empty_buffer,
    identity,
    merge,
    merge3,
    over,
)
from torchpool.kernels.cpu.simd import (
    after1,
    after2,
    choose,
    evens,
    gather,
    lane_numbers,
    load,
    odds,
    splat,
    store,
    store_first,
    width,
)


@njit(**INNER)
def whole(tag, x, rows, found, at):
    """Columns `at .. at + lanes - 1` of all rows, merged; all of them exist."""
    v = load(x, rows[0] + at)
    if found == 1:
        return v
    if found == 2:
        return merge(tag, v, load(x, rows[1] + at))
    v = merge3(tag, v, load(x, rows[1] + at), load(x, rows[2] + at))
    k = 3
    while k + 1 < found:
        v = merge3(tag, v, load(x, rows[k] + at), load(x, rows[k + 1] + at))
        k += 2
    if k < found:
        v = merge(tag, v, load(x, rows[k] + at))
    return v


@njit(**APART)
def gathered(tag, x, rows, found, at, size):
    """Columns of which some lie outside the row, element by element: at the ends of the memory."""
    none = splat(x, identity(tag, x))
    lanes = lane_numbers(none)
    live = (lanes + at >= 0) & (lanes + at < size)
    v = none
    for k in range(found):
        v = merge(tag, v, choose(live, gather(x, rows[k] + at, lanes, live), none))
    return v


@njit(**INNER)
def columns(tag, x, rows, found, at, size):
    """Columns `at .. at + lanes - 1` of all rows, merged; those outside hold what never wins."""
    if at >= 0 and at + width(x) <= size and found > 0:
        return whole(tag, x, rows, found, at)
    none = splat(x, identity(tag, x))
    if at >= size or at + width(x) <= 0 or found == 0:
        return none
    if rows[0] + at >= 0 and rows[found - 1] + at + width(x) <= x.size:
        place = lane_numbers(none) + at
        return choose((place >= 0) & (place < size), whole(tag, x, rows, found, at), none)
    return gathered(tag, x, rows, found, at, size)


@njit(**INNER)
def emit(y, at, o, outs, v, counts, scale, is_mean):
    if is_mean:
        v = over(v, counts, o, scale)
    if o + width(y) <= outs:
        store(y, at + o, v)
    else:
        store_first(y, at + o, v, outs - o)


@njit(**INNER)
def row_by_one(tag, x, rows, found, y, at, geo, counts, scale, is_mean, ahead, lines):
    """One output row at stride 1."""
    size, outs, kernel, before = geo[3, SIZE], geo[3, OUT], geo[3, KERNEL], geo[3, BEFORE]
    lanes = width(x)
    this = columns(tag, x, rows, found, -before, size)
    for o in range(0, outs, lanes):
        ahead = request(x, ahead, lines)
        following = columns(tag, x, rows, found, o + lanes - before, size) if kernel > 1 else this
        v = this
        if kernel == 2:
            v = merge(tag, v, after1(this, following))
        elif kernel == 3:
            v = merge3(tag, v, after1(this, following), after2(this, following))
        emit(y, at, o, outs, v, counts, scale, is_mean)
        this = following if kernel > 1 else columns(tag, x, rows, found, o + lanes - before, size)


@njit(**INNER)
def row_by_two(tag, x, rows, found, y, at, geo, counts, scale, is_mean, ahead, lines):
    """One output row at stride 2."""
    size, outs, kernel, before = geo[3, SIZE], geo[3, OUT], geo[3, KERNEL], geo[3, BEFORE]
    lanes = width(x)
    a = columns(tag, x, rows, found, -before, size)
    b = columns(tag, x, rows, found, lanes - before, size)
    for o in range(0, outs, lanes):
        ahead = request(x, ahead, lines)
        v = evens(a, b)
        if kernel > 1:
            odd = odds(a, b)
        start = 2 * (o + lanes) - before
        more = o + lanes < outs
        if more or kernel > 2:
            a = columns(tag, x, rows, found, start, size)
            b = columns(tag, x, rows, found, start + lanes, size)
        if kernel == 2:
            v = merge(tag, v, odd)
        elif kernel == 3:
            v = merge3(tag, v, odd, after1(v, evens(a, b)))
        emit(y, at, o, outs, v, counts, scale, is_mean)


@njit(**JIT)
def leaf(begin, end, tag, x, y, geo, tab, column, fixed):
    """Output rows `begin .. end - 1`. A mean divides by `fixed`, or where that is 0 by the count
    table `column`; a `column` of -1 divides by nothing."""
    size, outs = geo[3, SIZE], geo[3, OUT]
    most = most_rows(geo)
    rows, codes = np.empty(most, np.int64), np.empty(most, np.int64)
    o = np.empty(3, np.int64)
    is_mean = column >= 0
    counts = empty_buffer(x, outs + width(x))
    if is_mean:
        count_row(counts, geo, tab, 1, column, fixed)
    plane = split(begin, geo, OUT, o)
    share, lines = share_of(x, y.size // outs, -(-outs // width(x)))
    for unit in range(begin, end):
        found = window_rows(geo, tab, o, plane, size, rows, codes)
        ahead = np.int64(unit * share) + lines_ahead(x)
        scale = counts.dtype.type(1)
        if is_mean and fixed == 0:
            scale = counts.dtype.type(lead_count(geo, tab, column, o))
        if geo[3, STRIDE] == 1:
            row_by_one(
                tag, x, rows, found, y, unit * outs, geo, counts, scale, is_mean, ahead, lines
            )
        else:
            row_by_two(
                tag, x, rows, found, y, unit * outs, geo, counts, scale, is_mean, ahead, lines
            )
        plane = advance(geo, OUT, o, plane)
