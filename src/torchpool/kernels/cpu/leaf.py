"""Values alone, the frequent case: of small windows over contiguous rows, two or three taps along
the last axis, and of windows whose channels are the fastest axis.

The input rows of a window are merged in registers, column by column, and each vector of columns is
used for as many taps as reach it: every element is loaded once for each output row, and nothing is
written but results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.direct import walk
from torchpool.kernels.cpu.lines import (
    STREAM,
    advance,
    count_of,
    count_row,
    is_flat,
    lead_count,
    lines_ahead,
    load_some,
    most_rows,
    request,
    share_of,
    split,
    store_some,
    taps_of,
    window_levels,
    window_rows,
)
from torchpool.kernels.cpu.parts import APART, COPYING, INNER, JIT, SELDOM
from torchpool.kernels.cpu.plan import BEFORE, DILATION, KERNEL, LARGE, OUT, SIZE, STRIDE
from torchpool.kernels.cpu.scalars import empty_buffer, identity, merge, merge3, over
from torchpool.kernels.cpu.simd import (
    address,
    after1,
    after2,
    choose,
    evens,
    gather,
    lane_numbers,
    load,
    load_as,
    odds,
    splat,
    store,
    width,
)
from torchpool.kernels.cpu.visits import chain


@njit(**INNER)
def level(tag, x, at, step, found):
    """As many columns as a vector has lanes, of `found` rows that lie `step` apart, merged."""
    v = load(x, at)
    if found == 3:
        return merge3(tag, v, load(x, at + step), load(x, at + 2 * step))
    if found == 2:
        return merge(tag, v, load(x, at + step))
    k = 1
    while k + 1 < found:
        v = merge3(tag, v, load(x, at + k * step), load(x, at + (k + 1) * step))
        k += 2
    if k < found:
        v = merge(tag, v, load(x, at + k * step))
    return v


@njit(**SELDOM)
def gathered(tag, x, levels, count, first, step, found, at, size):
    """`columns` element by element: at the ends of the memory."""
    none = splat(x, identity(tag, x))
    lanes = lane_numbers(none)
    live = (lanes + at >= 0) & (lanes + at < size)
    v = none
    for i in range(count):
        for k in range(found):
            row = first + levels[i] + k * step
            v = merge(tag, v, choose(live, gather(x, row + at, lanes, live), none))
    return v


@njit(**INNER)
def columns(tag, x, rows, at, size):
    """Columns `at .. at + lanes - 1` of all rows, merged; those outside hold what never wins."""
    levels, count, first, step, found, is_inside = rows
    if at >= size:
        return splat(x, identity(tag, x))
    if not is_inside:
        return gathered(tag, x, levels, count, first, step, found, at, size)
    v = level(tag, x, first + at, step, found)
    for i in range(1, count):
        v = merge(tag, v, level(tag, x, first + levels[i] + at, step, found))
    if at < 0 or at + width(x) > size:
        place = lane_numbers(v) + at
        v = choose((place >= 0) & (place < size), v, splat(x, identity(tag, x)))
    return v


@njit(**INNER)
def emit(y, at, end, o, outs, v, counts, scale, is_mean):
    """Outputs from o on of the row at y[at]; the next row follows, unless y[end] does."""
    if is_mean:
        v = over(v, counts, o, scale)
    store_some(y, at + o, v, outs - o, end)


@njit(**INNER)
def row_by_one(tag, x, rows, y, at, end, geo, counts, scale, is_mean, ahead, lines):
    """One output row at stride 1."""
    size, outs, kernel, before = geo[3, SIZE], geo[3, OUT], geo[3, KERNEL], geo[3, BEFORE]
    lanes = width(x)
    this = columns(tag, x, rows, -before, size)
    for o in range(0, outs, lanes):
        ahead = request(x, ahead, lines)
        following = columns(tag, x, rows, o + lanes - before, size)
        v = this
        if kernel == 2:
            v = merge(tag, v, after1(this, following))
        elif kernel == 3:
            v = merge3(tag, v, after1(this, following), after2(this, following))
        emit(y, at, end, o, outs, v, counts, scale, is_mean)
        this = following


@njit(**INNER)
def row_by_two(tag, x, rows, y, at, end, geo, counts, scale, is_mean, ahead, lines):
    """One output row at stride 2."""
    size, outs, kernel, before = geo[3, SIZE], geo[3, OUT], geo[3, KERNEL], geo[3, BEFORE]
    lanes = width(x)
    a = columns(tag, x, rows, -before, size)
    b = columns(tag, x, rows, lanes - before, size)
    for o in range(0, outs, lanes):
        ahead = request(x, ahead, lines)
        v, odd = evens(a, b), odds(a, b)
        start = 2 * (o + lanes) - before
        more = o + lanes < outs
        if more or kernel > 2:
            a = columns(tag, x, rows, start, size)
        if more:
            b = columns(tag, x, rows, start + lanes, size)
        if kernel == 2:
            v = merge(tag, v, odd)
        elif kernel == 3:
            v = merge3(tag, v, odd, after1(v, evens(a, b)))
        emit(y, at, end, o, outs, v, counts, scale, is_mean)


@njit(**INNER)
def row_of(tag, x, rows, y, at, end, geo, counts, scale, is_mean, ahead, lines):
    if geo[3, STRIDE] == 1:
        row_by_one(tag, x, rows, y, at, end, geo, counts, scale, is_mean, ahead, lines)
    else:
        row_by_two(tag, x, rows, y, at, end, geo, counts, scale, is_mean, ahead, lines)


@njit(**SELDOM)
def row_at_the_end(tag, x, rows, y, at, end, geo, counts, scale, is_mean):
    row_of(tag, x, rows, y, at, end, geo, counts, scale, is_mean, 0, 0)


@njit(**INNER)
def reach(x, geo):
    """Columns that `row_of` reads at most, from the beginning of a row."""
    vectors = -(-geo[3, OUT] // width(x)) + 1
    return vectors * width(x) * geo[3, STRIDE] - geo[3, BEFORE]


@njit(**JIT)
def leaf(begin, end, tag, x, y, geo, tab, column, fixed):
    """Output rows `begin .. end - 1`. A mean divides by `fixed`, or where that is 0 by the count
    table `column`; a `column` of -1 divides by nothing."""
    geo, tab = constants(geo), constants(tab)
    size, outs, before = geo[3, SIZE], geo[3, OUT], geo[3, BEFORE]
    rows_in, dilation, most = geo[2, SIZE], geo[2, DILATION], reach(x, geo)
    step, is_single = dilation * size, is_flat(geo)
    levels = np.zeros(most_rows(geo), np.int64)
    o = np.empty(3, np.int64)
    is_mean = column >= 0
    by_count = is_mean and fixed == 0
    counts = empty_buffer(x, outs + width(x))
    number = counts.dtype.type
    if is_mean:
        count_row(counts, geo, tab, 1, column, fixed)
    plane = split(begin, geo, OUT, o)
    share, lines = share_of(x, y.size // outs, -(-outs // width(x)))
    for unit in range(begin, end):
        tap, last, start = taps_of(geo, tab, 2, o[2])
        found, count, first, scale = last - tap, 1, plane, number(1)
        if not is_single:
            count, first = window_levels(geo, tab, o, plane, levels)
            scale = number(lead_count(geo, tab, column, o) if by_count else 1)
        elif by_count:
            scale = number(count_of(geo, tab, 2, column, o[2]))
        first = (first * rows_in + start + tap * dilation) * size
        end_of = first + levels[count - 1] + (found - 1) * step + most
        is_inside = found > 0 and count > 0 and first >= before and end_of <= x.size
        ahead = np.int64(unit * share) + lines_ahead(x)
        at, limit = unit * outs, end * outs
        if not is_inside:
            rows = (levels, count, first, step, found, False)
            row_at_the_end(tag, x, rows, y, at, limit, geo, counts, scale, is_mean)
        elif found == 3 and count == 1:
            rows = (levels, 1, first, step, 3, True)
            row_of(tag, x, rows, y, at, limit, geo, counts, scale, is_mean, ahead, lines)
        elif found == 2 and count == 1:
            rows = (levels, 1, first, step, 2, True)
            row_of(tag, x, rows, y, at, limit, geo, counts, scale, is_mean, ahead, lines)
        else:
            rows = (levels, count, first, step, found, True)
            row_of(tag, x, rows, y, at, limit, geo, counts, scale, is_mean, ahead, lines)
        plane = advance(geo, OUT, o, plane)


# Channels last ------------------------------------------------------------------------------


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


@njit(**INNER)
def windows_of_channels(tag, x, rows, found, at, step, taps):
    """One window in as many channels as a vector has lanes: `taps` places, `step` apart."""
    if found == 0 or taps <= 0:
        return splat(x, identity(tag, x))
    v = whole(tag, x, rows, found, at)
    j = 1
    while j + 1 < taps:
        following = whole(tag, x, rows, found, at + (j + 1) * step)
        v = merge3(tag, v, whole(tag, x, rows, found, at + j * step), following)
        j += 2
    if j < taps:
        v = merge(tag, v, whole(tag, x, rows, found, at + j * step))
    return v


@njit(**INNER)
def put_channels(y, at, i, v, counts, scale, is_mean):
    store(y, at + i, over(v, counts, i, scale) if is_mean else v)


@njit(**INNER)
def windows_of_one(x, a, y, at, place, inner, counts, scale, is_mean):
    """One window of one element, from a on, in all channels; the last vector of channels overlaps
    the one before."""
    lanes = width(x)
    for block in range(0, inner, lanes):
        c = min(block, inner - lanes)
        put_channels(y, at, place + c, load(x, a + c), counts, scale, is_mean)


@njit(**INNER)
def windows_of_four(tag, x, a, b, step, y, at, place, inner, counts, scale, is_mean):
    """The same of two places, `step` apart, in each of two rows, from a and b on."""
    lanes = width(x)
    for block in range(0, inner, lanes):
        c = min(block, inner - lanes)
        v = merge3(tag, load(x, a + c), load(x, b + c), load(x, a + step + c))
        v = merge(tag, v, load(x, b + step + c))
        put_channels(y, at, place + c, v, counts, scale, is_mean)


@njit(**INNER)
def windows_of_nine(tag, x, a, b, c, step, y, at, place, inner, counts, scale, is_mean):
    """The same of three places in each of three rows."""
    lanes = width(x)
    for block in range(0, inner, lanes):
        k = min(block, inner - lanes)
        first = merge3(tag, load(x, a + k), load(x, b + k), load(x, c + k))
        k1, k2 = k + step, k + 2 * step
        second = merge3(tag, load(x, a + k1), load(x, b + k1), load(x, c + k1))
        third = merge3(tag, load(x, a + k2), load(x, b + k2), load(x, c + k2))
        v = merge3(tag, first, second, third)
        put_channels(y, at, place + k, v, counts, scale, is_mean)


@njit(**INNER)
def take_channels(tag, x, at, inner, buffer):
    """Merges one place in all channels with those in the buffer."""
    like = splat(x, 0)
    for c in range(0, inner, width(x)):
        v = load_some(x, at + c, inner - c)
        store(buffer, c, merge(tag, load_as(buffer, c, like), v))


PAGE = 4096
"""A load waits for a store before it whose address has the same last twelve bits."""


@njit(**COPYING)
def rows_apart(x, size):
    """Two rows of scratch that begin half a page from where x does, so that nothing that is loaded
    from there waits for what was stored here a moment ago, where rows are whole pages."""
    itemsize = empty_buffer(x, 0).itemsize
    page = PAGE // itemsize
    pitch = -(-size // page) * page
    room = empty_buffer(x, 2 * pitch + page)
    start = (address(x) + PAGE // 2 - address(room)) % PAGE // itemsize
    return room[start : start + pitch], room[start + pitch : start + 2 * pitch]


@njit(**INNER)
def empty_row(tag, x, buffer, inner):
    none = splat(x, identity(tag, x))
    for c in range(0, inner, width(x)):
        store(buffer, c, none)


@njit(**APART)
def many_places(tag, x, rows, found, first, end, begin, step, inner, buffer, some):
    """As in `long_windows`; `some` is a row of channels for the places that are merged one after
    another."""
    empty_row(tag, x, some, inner)
    most, taken = max(LONG, chain(found * (end - first))), 0
    for k in range(found):
        for j in range(first, end):
            take_channels(tag, x, rows[k] + begin + j * step, inner, some)
            taken += 1
            if taken == most:
                put_together(tag, x, some, inner, buffer)
                taken = 0
    put_together(tag, x, some, inner, buffer)


@njit(**SELDOM)
def put_together(tag, x, some, inner, buffer):
    """Merges a row of channels with that in the buffer, and empties it."""
    like = splat(x, 0)
    for c in range(0, inner, width(x)):
        store(buffer, c, merge(tag, load_as(buffer, c, like), load_as(some, c, like)))
    empty_row(tag, x, some, inner)


LONG = 256
"""So many places are merged one after another at least: each time that it ends, memory is read in
vain for some time."""


@njit(**INNER)
def long_windows(tag, x, rows, found, y, at, geo, tab, inner, counts, scale, is_mean, scratch):
    """Windows of many places: each is read once, in the order of memory, in all channels, and
    merged into a row of them."""
    buffer, some = scratch
    lanes, step, like = width(x), geo[3, DILATION] * inner, splat(x, 0)
    for o in range(geo[3, OUT]):
        first, end, start = taps_of(geo, tab, 3, o)
        begin = start * inner
        empty_row(tag, x, buffer, inner)
        if found * (end - first) > LONG:
            many_places(tag, x, rows, found, first, end, begin, step, inner, buffer, some)
        else:
            for k in range(found):
                for j in range(first, end):
                    take_channels(tag, x, rows[k] + begin + j * step, inner, buffer)
        for block in range(0, inner, lanes):
            c = min(block, inner - lanes)
            put_channels(y, at, o * inner + c, load_as(buffer, c, like), counts, scale, is_mean)


@njit(**INNER)
def any_windows(tag, x, rows, found, first_out, past, y, at, geo, tab, inner, counts, scale,
                is_mean):  # fmt: skip
    """The outputs `first_out .. past - 1` of a row, of windows of any size."""
    lanes, step = width(x), geo[3, DILATION] * inner
    for o in range(first_out, past):
        first, end, start = taps_of(geo, tab, 3, o)
        begin = start * inner + first * step
        for block in range(0, inner, lanes):
            c = min(block, inner - lanes)
            v = windows_of_channels(tag, x, rows, found, begin + c, step, end - first)
            put_channels(y, at, o * inner + c, v, counts, scale, is_mean)


@njit(**INNER)
def row_of_channels(tag, x, rows, found, y, at, geo, tab, inner, counts, scale, is_mean):
    """One output row; frequent windows are square."""
    outs, step = geo[3, OUT], geo[3, DILATION] * inner
    if found > 3 or found != geo[3, KERNEL]:
        any_windows(tag, x, rows, found, 0, outs, y, at, geo, tab, inner, counts, scale, is_mean)
        return
    for o in range(outs):
        first, end, start = taps_of(geo, tab, 3, o)
        begin, place = start * inner + first * step, o * inner
        a, b, c = rows[0] + begin, rows[found // 2] + begin, rows[found - 1] + begin
        if end - first != found:
            any_windows(tag, x, rows, found, o, o + 1, y, at, geo, tab, inner, counts, scale,
                        is_mean)  # fmt: skip
        elif found == 1:
            windows_of_one(x, a, y, at, place, inner, counts, scale, is_mean)
        elif found == 2:
            windows_of_four(tag, x, a, b, step, y, at, place, inner, counts, scale, is_mean)
        else:
            windows_of_nine(tag, x, a, b, c, step, y, at, place, inner, counts, scale, is_mean)


@njit(**JIT)
def channels(begin, end, tag, x, y, geo, tab, inner, column, fixed):
    """Output rows as `leaf`, of windows of any size; `inner` channels, at least a vector of them,
    are the fastest axis."""
    geo, tab = constants(geo), constants(tab)
    row = geo[3, OUT] * inner
    most = most_rows(geo)
    rows, codes = np.empty(most, np.int64), np.empty(most, np.int64)
    o = np.empty(3, np.int64)
    is_mean = column >= 0
    counts, scratch = empty_buffer(x, row), rows_apart(x, inner + width(x))
    if is_mean:
        count_row(counts, geo, tab, inner, column, fixed)
    taps = geo[0, KERNEL] * geo[1, KERNEL] * geo[2, KERNEL] * geo[3, KERNEL]
    plane = split(begin, geo, OUT, o)
    for unit in range(begin, end):
        found = window_rows(geo, tab, o, plane, geo[3, SIZE] * inner, rows, codes)
        scale = counts.dtype.type(1)
        if is_mean and fixed == 0:
            scale = counts.dtype.type(lead_count(geo, tab, column, o))
        at = unit * row
        if taps > LARGE:
            long_windows(tag, x, rows, found, y, at, geo, tab, inner, counts, scale, is_mean,
                         scratch)  # fmt: skip
        else:
            row_of_channels(tag, x, rows, found, y, at, geo, tab, inner, counts, scale, is_mean)
        plane = advance(geo, OUT, o, plane)


# Any windows --------------------------------------------------------------------------------


def source_of(x: Any, buffer: Any, is_single: Any) -> Any:
    """Where a row of outputs is read: from the input where that is one row of numbers, else from
    the buffer."""


@overload(source_of, jit_options=COPYING)  # type: ignore[arg-type]
def _source_of(x, buffer, is_single):
    if isinstance(x.dtype, types.Record):
        return lambda x, buffer, is_single: (buffer, False)
    return lambda x, buffer, is_single: (x if is_single else buffer, is_single)


BLOCK = 2048
"""Elements of a row that stay in the first cache while the rows of a window are merged."""


@njit(**INNER)
def within(tag, x, rows, found, at, size):
    """`whole`, of which columns past the end hold what never wins."""
    if found > 0 and at + width(x) <= size:
        return whole(tag, x, rows, found, at)
    none = splat(x, identity(tag, x))
    v = none
    for k in range(found):
        v = merge(tag, v, load_some(x, rows[k] + at, size - at))
    return choose(lane_numbers(v) < size - at, v, none)


@njit(**INNER)
def merge_few(tag, x, rows, found, begin, end, size, buffer, ahead, lines):
    """Columns `begin .. end - 1` of a few rows, merged, into the buffer."""
    for at in range(begin, end, width(x)):
        ahead = request(x, ahead, lines)
        store(buffer, at, within(tag, x, rows, found, at, size))
    return ahead


@njit(**INNER)
def merge_more(tag, x, rows, begin, end, size, buffer):
    """Columns `begin .. end - 1` of four rows, merged with those in the buffer."""
    r0, r1, r2, r3 = rows[0], rows[1], rows[2], rows[3]
    like = splat(x, 0)
    at = begin
    while at + width(x) <= end:
        v = merge3(tag, load(x, r0 + at), load(x, r1 + at), load(x, r2 + at))
        store(buffer, at, merge3(tag, load_as(buffer, at, like), v, load(x, r3 + at)))
        at += width(x)
    if at < end:
        v = within(tag, x, rows, FEW, at, size)
        store(buffer, at, merge(tag, load_as(buffer, at, like), v))


@njit(**INNER)
def merge_rows(tag, x, rows, found, size, buffer, ahead, lines):
    """The rows of one row of outputs as one row, in the buffer: some columns at a time, so that
    memory is read in long pieces."""
    few = min(found, 1 + (found - 1) % FEW)
    for begin in range(0, size, BLOCK):
        end = min(size, begin + BLOCK)
        ahead = merge_few(tag, x, rows, few, begin, end, size, buffer, ahead, lines)
        for k in range(few, found, FEW):
            merge_more(tag, x, rows[k:], begin, end, size, buffer)


FEW = 4
"""Rows that are merged in registers."""


@njit(**JIT)
def merged(begin, end, way, tag, x, y, geo, tab, inner, column, fixed):
    """Output rows as `leaf`, of any windows: their rows are merged into one, which is then read as
    by `direct`. `way` says what the lanes are there."""
    geo, tab = constants(geo), constants(tab)
    size, row_size, lanes = geo[3, SIZE] * inner, geo[3, OUT] * inner, width(x)
    most = most_rows(geo)
    rows, codes, o = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(3, np.int64)
    row, code = np.zeros(1, np.int64), np.zeros(1, np.int64)
    buffer = empty_buffer(x, size + lanes)
    number = buffer.dtype.type
    is_mean = column >= 0
    counts, room = empty_buffer(x, row_size + lanes), empty_buffer(x, lanes * lanes)
    if is_mean:
        count_row(counts, geo, tab, inner, column, fixed)
    steps = geo[3, OUT] * (-(-inner // lanes)) if inner > 1 else -(-geo[3, OUT] // lanes)
    share, ask = share_of(x, y.size // row_size, steps)
    _, ask_columns = share_of(x, y.size // row_size, -(-size // lanes))
    ask_columns = ask_columns if ask_columns <= STREAM else 0
    plane = split(begin, geo, OUT, o)
    for unit in range(begin, end):
        found = window_rows(geo, tab, o, plane, size, rows, codes)
        scale = number(lead_count(geo, tab, column, o) if is_mean and fixed == 0 else 1)
        ahead = np.int64(unit * share) + lines_ahead(x)
        source, is_single = source_of(x, buffer, found == 1)
        row[0] = rows[0] if is_single else 0
        if not is_single:
            merge_rows(tag, x, rows, found, size, buffer, ahead, ask_columns)
        walk(way, tag, source, None, None, room, y, None, unit * row_size, (row, code, 1),
             geo, tab, inner, (counts, counts, scale, number(fixed), is_mean), ahead,
             ask if is_single else 0)  # fmt: skip
        plane = advance(geo, OUT, o, plane)
