"""Windows that a table gives: ragged batches, and segments of packed rows.

Elements lie as (plane, position, inner): (N, T, C) in memory has N planes of C inner elements, (N,
C, T) has N * C planes of one. A window is a run of taps: first position, number, and the table's
step between them. What it becomes depends on its own elements alone, in an order that only its own
number of taps decides, so that a sample gives the same bits alone and in any batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from torchpool.kernels.cpu import formulas
from torchpool.kernels.cpu.backward import (
    elements,
    fill_shares,
    load_up_to,
    num_shares,
    put_first,
    send,
)
from torchpool.kernels.cpu.direct import (
    ByChannel,
    fill_parameters,
    nothing_kept,
    parameter,
    scaled,
    solve,
    with_window,
    write,
)
from torchpool.kernels.cpu.parts import INNER, JIT, inlined
from torchpool.kernels.cpu.scalars import Total, empty_buffer, identity, merge, merge3
from torchpool.kernels.cpu.simd import (
    choose,
    lane,
    lane_numbers,
    load,
    load_as,
    splat,
    splat_as,
    store,
    store_first,
    turned,
    width,
)
from torchpool.kernels.cpu.slopes import slope
from torchpool.kernels.cpu.taking import VALUE, across
from torchpool.kernels.cpu.visits import Inner, Tabled, Whole, chain, merge_window

SHORT = 16
"""A window of fewer taps is a lane of its own; one of more is read along itself."""
FEW = 4
"""So many windows of a plane are written one by one, more of them as vectors."""
PART = 64
"""Windows of a plane that are one piece of work, as many as vectors have lanes at most."""
BLOCK = 256
"""Inner elements of a window that are one piece of work."""
FIRST, COUNT, PADDING = range(3)
"""Columns of a table."""
COPIED = 4096
"""Elements, about, that a row repeats at once: they stay in the nearest cache."""


# Forward ------------------------------------------------------------------------------------


def along(tag: Any, x: Any, weights: Any, lines: Any, state: Any, window: Any, p: Any, pads: Any,
          o: Any, fixed: Any, is_mean: Any) -> Any:  # fmt: skip
    """`solve` for one window that is read along itself; `window` is its first tap and how many."""


@inlined(along)
def _along(tag, x, weights, lines, state, window, p, pads, o, fixed, is_mean):
    if weights == state == types.none and not formulas.is_tag(tag):

        def merged(tag, x, weights, lines, state, window, p, pads, o, fixed, is_mean):
            none = splat(x, identity(tag, x))
            v = merge_window(tag, none, x, lines[0], 1, (0, window[1], window[0]))
            return across(VALUE, tag, (v,))[0], None

        return merged

    def solved(tag, x, weights, lines, state, window, p, pads, o, fixed, is_mean):
        place = Whole(0, window[1], window[0], chain(window[1] // width(x)))
        return solve(place, tag, x, weights, lines, state, None, p, pads, o, fixed, is_mean)

    return solved


@njit(**INNER)
def is_along(step, count):
    return step == 1 and count >= SHORT


@njit(**INNER)
def lay_out(table, begin, end, lanes, step, places, counts, pads, divisors, pad, fixed):
    """The windows `begin .. end - 1` of a table's rows as lanes, those that are read along
    themselves without taps. Returns the most taps of a lane, -1 where all are read along
    themselves, and whether any is."""
    longest, others = np.int64(-1), False
    for i in range(end - begin, lanes):
        places[i] = 0
        counts[i] = 0
    for i in range(end - begin):
        row = table[begin + i]
        count = row[COUNT]
        places[i] = row[FIRST]
        counts[i] = count
        if is_along(step, count):
            others = True
            counts[i] = 0
        else:
            longest = max(longest, count)
        pads[i] = pad * row[PADDING]
        divisors[i] = fixed if fixed != 0 else max(1, count + pad * row[PADDING])
    return longest, others


def quotient(tag: Any, value: Any, n: Any, is_mean: Any) -> Any:
    """A total divided by one number; any other value as it is."""


@inlined(quotient)
def _quotient(tag, value, n, is_mean):
    if tag.instance_class is not Total:
        return lambda tag, value, n, is_mean: value
    return lambda tag, value, n, is_mean: value / splat_as(value, n) if is_mean else value


def one_by_one(tag: Any, x: Any, weights: Any, y: Any, state: Any, at: Any, lines: Any, table: Any,
               step: Any, pad: Any, fixed: Any, is_mean: Any) -> Any:  # fmt: skip
    """Writes values alone of few windows that are read along themselves, up to the first that is
    not; returns how many."""


@inlined(one_by_one)
def _one_by_one(tag, x, weights, y, state, at, lines, table, step, pad, fixed, is_mean):
    if not weights == state == types.none or formulas.is_tag(tag):
        return lambda tag, x, weights, y, state, at, lines, table, step, pad, fixed, is_mean: 0

    def values(tag, x, weights, y, state, at, lines, table, step, pad, fixed, is_mean):
        none = splat(x, identity(tag, x))
        i = 0
        while i < table.shape[0] <= FEW and is_along(step, table[i, COUNT]):
            first, count = table[i, FIRST], table[i, COUNT]
            v = merge_window(tag, none, x, lines[0], 1, (0, count, first))
            v = across(VALUE, tag, (v,))[0]
            n = fixed if fixed != 0 else count + pad * table[i, PADDING]
            store_first(y, at + i, quotient(tag, v, n, is_mean), 1)
            i += 1
        return i

    return values


@njit(**INNER)
def part_of_plane(tag, x, weights, q, y, state, at, lines, table, step, room, pad, fixed, is_mean):
    """Windows of one plane with one inner element; `table` holds at most as many rows as a vector
    has lanes."""
    places, counts, pads, divisors = room
    like = splat(x, 0)
    lanes = lane_numbers(like)
    number = table.shape[0]
    longest, others = lay_out(table, 0, number, width(like), step, places, counts, pads, divisors,
                              pad, fixed)  # fmt: skip
    v, kept = like, nothing_kept(tag, like, state)
    if longest >= 0:
        place = Tabled(0, longest, step, places, counts)
        v, kept = solve(place, tag, x, weights, lines, state, None, q, pads, 0, fixed, is_mean)
        v = choose(load_as(counts, 0, lanes) > 0, v, like)
    if others:
        for i in range(number):
            window = table[i, FIRST], table[i, COUNT]
            if is_along(step, window[1]):
                found = along(tag, x, weights, lines, state, window, q, pads, i, fixed, is_mean)
                v, kept = with_window(lanes == i, found, (v, kept))
    one = divisors.dtype.type(1)
    write(y, state, at, v, kept, number, divisors, 0, one, tag, is_mean)


@njit(**INNER)
def four_of_window(tag, x, at, taps, step):
    """Four vectors of inner elements of one window from `at` on, merged tap by tap."""
    a = b = c = d = splat(x, identity(tag, x))
    most = chain(taps)
    for j in range(0, taps, most):
        e, f, g, h = four_of_run(tag, x, at + j * step, min(most, taps - j), step)
        a, b, c, d = merge(tag, a, e), merge(tag, b, f), merge(tag, c, g), merge(tag, d, h)
    return a, b, c, d


@njit(**INNER)
def four_of_run(tag, x, at, taps, step):
    """The same of taps that are merged one after another."""
    lanes = width(x)
    a = b = c = d = splat(x, identity(tag, x))
    j = 0
    while j + 1 < taps:
        to = at + step
        a = merge3(tag, a, load(x, at), load(x, to))
        b = merge3(tag, b, load(x, at + lanes), load(x, to + lanes))
        c = merge3(tag, c, load(x, at + 2 * lanes), load(x, to + 2 * lanes))
        d = merge3(tag, d, load(x, at + 3 * lanes), load(x, to + 3 * lanes))
        at = to + step
        j += 2
    if j < taps:
        a = merge(tag, a, load(x, at))
        b = merge(tag, b, load(x, at + lanes))
        c = merge(tag, c, load(x, at + 2 * lanes))
        d = merge(tag, d, load(x, at + 3 * lanes))
    return a, b, c, d


@njit(**INNER)
def run_of_window(tag, x, lines, first, count, inner):
    """One window whose inner elements divide a vector, read along itself: the value of each inner
    element."""
    none = splat(x, identity(tag, x))
    window = (0, count * inner, first * inner)
    v = merge_window(tag, none, x, lines[0], 1, window)
    distance = width(x) // 2
    while distance >= inner:
        v = merge(tag, v, turned_by(v, distance))
        distance //= 2
    return v


@njit(**INNER)
def turned_by(v, distance):
    """`turned` by a power of two that is known when it runs."""
    if distance == 1:
        return turned(v, 1)
    if distance == 2:
        return turned(v, 2)
    if distance == 4:
        return turned(v, 4)
    if distance == 8:
        return turned(v, 8)
    return turned(v, 16) if distance == 16 else turned(v, 32)


def whole_part(tag: Any, x: Any, weights: Any, y: Any, state: Any, at: Any, lines: Any, window: Any,
               step: Any, c: Any, end: Any, inner: Any, ones: Any, scale: Any, is_mean: Any,
               ) -> Any:  # fmt: skip
    """Writes values alone as far as they are whole vectors; returns the next inner element."""


@inlined(whole_part)
def _whole_part(tag, x, weights, y, state, at, lines, window, step, c, end, inner, ones, scale,
                is_mean):  # fmt: skip
    if not weights == state == types.none or formulas.is_tag(tag):
        return (
            lambda tag, x, weights, y, state, at, lines, window, step, c, end, inner, ones, scale,
            is_mean: c
        )  # fmt: skip

    def values(tag, x, weights, y, state, at, lines, window, step, c, end, inner, ones, scale,
               is_mean):  # fmt: skip
        first, count, _ = window
        if count == 0:
            return c
        lanes = width(x)
        if step == 1 and count >= SHORT and inner < lanes and lanes % inner == 0:
            v = run_of_window(tag, x, lines, first, count, inner)
            store_first(y, at, scaled(v, ones, 0, scale, tag, is_mean), inner)
            return inner
        while c + 4 * lanes <= end:
            begin = lines[0][0] + first * inner + c
            parts = four_of_window(tag, x, begin, count, step * inner)
            store(y, at + c, scaled(parts[0], ones, 0, scale, tag, is_mean))
            store(y, at + c + lanes, scaled(parts[1], ones, 0, scale, tag, is_mean))
            store(y, at + c + 2 * lanes, scaled(parts[2], ones, 0, scale, tag, is_mean))
            store(y, at + c + 3 * lanes, scaled(parts[3], ones, 0, scale, tag, is_mean))
            c += 4 * lanes
        return c

    return values


@njit(**INNER)
def block_of_window(tag, x, weights, params, row, y, state, at, lines, window, step, c, inner, room,
                    pad, fixed, is_mean):  # fmt: skip
    """One window in a block of the inner elements, from `c` on; lanes are inner elements."""
    _, _, pads, ones = room
    like = splat(x, 0)
    number = ones.dtype.type
    first, count, padding = window
    pads[0] = pad * padding
    scale = number(fixed if fixed != 0 else max(1, count + pad * padding))
    end = min(c + BLOCK, inner)
    done = whole_part(tag, x, weights, y, state, at, lines, window, step, c, end, inner, ones,
                      scale, is_mean)  # fmt: skip
    for k in range(done, end, width(like)):
        left = min(width(like), inner - k)
        place = Inner(0, count, first, step, k, left, inner, chain(count))
        p = parameter(params, row, k, like)
        v, kept = solve(place, tag, x, weights, lines, state, None, p, pads, 0, fixed, is_mean)
        if count == 0:
            v = like
        write(y, state, at + k, v, kept, left, ones, 0, scale, tag, is_mean)


def piece(
    way: Any, tag: Any, x: Any, weights: Any, params: Any, row: Any, y: Any, state: Any, plane: Any,
    part: Any, lines: Any, table: Any, step: Any, inner: Any, room: Any, pad: Any, fixed: Any,
    is_mean: Any,
) -> None:  # fmt: skip
    """The outputs of one piece of work."""


@inlined(piece)
def _piece(way, tag, x, weights, params, row, y, state, plane, part, lines, table, step, inner,
           room, pad, fixed, is_mean):  # fmt: skip
    return piece_of_channels if way.instance_class is ByChannel else piece_of_windows


def piece_of_windows(way, tag, x, weights, params, row, y, state, plane, part, lines, table, step,
                     inner, room, pad, fixed, is_mean):  # fmt: skip
    outs = table.shape[0]
    q = parameter(params, row, 0, splat(x, 0))
    begin, end = part * PART, min(outs, (part + 1) * PART)
    base = plane * outs
    begin += one_by_one(tag, x, weights, y, state, base + begin, lines, table[begin:end], step, pad,
                        fixed, is_mean)  # fmt: skip
    for o in range(begin, end, width(x)):
        some = table[o : min(end, o + width(x))]
        at = base + o
        part_of_plane(tag, x, weights, q, y, state, at, lines, some, step, room, pad, fixed,
                      is_mean)  # fmt: skip


def piece_of_channels(way, tag, x, weights, params, row, y, state, plane, part, lines, table, step,
                      inner, room, pad, fixed, is_mean):  # fmt: skip
    blocks = -(-inner // BLOCK)
    o, c = part // blocks, part % blocks * BLOCK
    window = table[o, FIRST], table[o, COUNT], table[o, PADDING]
    at = (plane * table.shape[0] + o) * inner
    block_of_window(tag, x, weights, params, row, y, state, at, lines, window, step, c, inner, room,
                    pad, fixed, is_mean)  # fmt: skip


@njit(**INNER)
def pieces(outs, inner):
    """Pieces of work of a plane."""
    return -(-outs // PART) if inner == 1 else outs * -(-inner // BLOCK)


@njit(**INNER)
def following(at, each, per, rows):
    """The piece after one: its plane, its part of the plane, the row of the table that the plane
    shares with others, and which of those it is."""
    plane, part, share, turn = at
    if part + 1 < each:
        return plane, part + 1, share, turn
    if turn + 1 < per:
        return plane + 1, 0, share, turn + 1
    return plane + 1, 0, share + 1 if share + 1 < rows else 0, 0


@njit(**JIT)
def forward(begin, end, way, tag, x, weights, params, y, state, table, size, inner, channels,
            planes_each, per, step, pad, fixed, is_mean):  # fmt: skip
    """Pieces `begin .. end - 1`: up to PART windows of a plane of single elements, or a BLOCK of
    the inner elements of one window.

    Args:
        weights, params, state: as those of `direct.direct`.
        table: int64 (rows, windows of a plane, 3); `per` planes share a row, in turns.
        size: positions of a plane.
        step: between the taps of a window.
        pad: whether a mean counts the padding that the table tells, 0 or 1.
        fixed: what a mean divides by instead of a number of taps; 0 for that.
    """
    lanes = width(x)
    row = empty_buffer(x, inner + lanes)
    places, counts = np.zeros(PART, np.int32), np.zeros(PART, np.int32)
    pads, divisors = empty_buffer(x, PART), empty_buffer(x, PART)
    pads[:] = 0
    divisors[:] = 1
    room = places, counts, pads, divisors
    lines = np.zeros(1, np.int64), np.zeros(1, np.int64), 1
    each = pieces(table.shape[1], inner)
    at = begin // each, begin % each, begin // each // per % table.shape[0], begin // each % per
    for unit in range(begin, end):
        plane, part, share, _ = at
        if part == 0 or unit == begin:
            if params is not None:
                fill_parameters(row, params, plane, inner, planes_each, channels)
            lines[0][0] = plane * size * inner
        piece(way, tag, x, weights, params, row, y, state, plane, part, lines, table[share], step,
              inner, room, pad, fixed, is_mean)  # fmt: skip
        at = following(at, each, per, table.shape[0])


# Backward -----------------------------------------------------------------------------------


def clear(out: Any, begin: Any, end: Any) -> None:
    """Zeros in the elements `begin .. end - 1`; None has none."""


@inlined(clear)
def _clear(out, begin, end):
    if out == types.none:
        return lambda out, begin, end: None

    def zeros(out, begin, end):
        none = splat(out, 0)
        for i in range(begin, end, width(out)):
            store_first(out, i, none, end - i)

    return zeros


def so_far(array: Any, at: Any, count: Any, like: Any) -> Any:
    """What elements have got already; zeros of None."""


@inlined(so_far)
def _so_far(array, at, count, like):
    if array == types.none:
        return lambda array, at, count, like: like
    return lambda array, at, count, like: load_up_to(array, at, count)


@njit(**INNER)
def send_run(tag, x, weights, params, p, gx, gw, at, length, shares, inner, is_fresh):
    """What a window sends to `length` elements side by side; fresh ones have got nothing yet.
    An `inner` of 1 says that shares and parameters are the same for every vector."""
    like = splat(gx, 0)
    for k in range(0, length, width(like)):
        left, c = length - k, k if inner > 1 else 0
        v, w = elements(x, at + k, 1, left, like), elements(weights, at + k, 1, left, like)
        held = like, like
        if not is_fresh:
            held = load_up_to(gx, at + k, left), so_far(gw, at + k, left, like)
        q = parameter(params, p, c, like)
        total = send(tag, held, shares, None, c, np.int64(0), v, w, q)
        store_first(gx, at + k, total[0], left)
        put_first(gw, at + k, total[1], left)


@njit(**INNER)
def repeat(out, at, period, length):
    """Fills `length` elements with what stands in the first `period` of them."""
    done, most = period, period * max(1, COPIED // period)
    while done < length:
        part = min(done, most, length - done)
        for k in range(0, part, width(out)):
            store_first(out, at + done + k, load_up_to(out, at + k, part - k), part - k)
        done += part


@njit(**INNER)
def fills_lanes(x, inner):
    """Whether the inner elements of several positions fill a vector."""
    return width(x) % inner == 0


@njit(**INNER)
def send_taps(tag, x, weights, params, p, gx, gw, at, taps, step, shares, inner, is_fresh):
    """What a window sends to `taps` of its taps, of which the first begins at element `at`."""
    if step == 1 and fills_lanes(gx, inner):
        send_run(tag, x, weights, params, p, gx, gw, at, taps * inner, shares, 1, is_fresh)
        return
    if x is None and is_fresh and step == 1 and taps > 1:
        send_run(tag, x, weights, params, p, gx, gw, at, inner, shares, inner, is_fresh)
        repeat(gx, at, inner, taps * inner)
        return
    for j in range(taps):
        begin = at + j * step * inner
        send_run(tag, x, weights, params, p, gx, gw, begin, inner, shares, inner, is_fresh)


@njit(**INNER)
def send_window(tag, x, weights, params, p, gx, gw, base, window, low, high, done, step, shares,
                inner):  # fmt: skip
    """What a window sends to the rows `low .. high - 1` of a plane that begins at element `base`.
    Rows from `done` on have got nothing yet; returns the first such row."""
    first, count = window
    start = max(0, -((first - low) // step))
    stop = min(count, (high - first + step - 1) // step)
    if stop <= start:
        return done
    fresh = stop
    if step == 1:
        if first + start > done:
            clear(gx, base + done * inner, base + (first + start) * inner)
            clear(gw, base + done * inner, base + (first + start) * inner)
            done = first + start
        fresh = min(stop, max(start, done - first))
        done = max(done, first + stop)
    at = base + (first + start * step) * inner
    send_taps(tag, x, weights, params, p, gx, gw, at, fresh - start, step, shares, inner, False)
    at = base + (first + fresh * step) * inner
    send_taps(tag, x, weights, params, p, gx, gw, at, stop - fresh, step, shares, inner, True)
    return done


@njit(**INNER)
def lay_shares(tag, shares, g, state, row, windows, begin, end, inner, counts, pad, fixed,
               p, params):  # fmt: skip
    """The shares of the windows `begin .. end - 1` of a plane, whose outputs begin at `row`."""
    scale = shares.dtype.type(1)
    if counts.size:
        for i in range(begin, end):
            n = fixed if fixed != 0 else max(1, windows[i, COUNT] + pad * windows[i, PADDING])
            for c in range(inner):
                counts[(i - begin) * inner + c] = n
    elif fixed != 0:
        scale = shares.dtype.type(0)
    fill_shares(tag, shares, None, 0, g, state, row + begin * inner, (end - begin) * inner, g.size,
                counts, scale, p, params)  # fmt: skip


@njit(**INNER)
def widen(wide, shares, at, inner):
    """The shares of a window's inner elements, again and again in all lanes."""
    for k in range(wide.shape[0]):
        for i in range(wide.shape[1]):
            wide[k, i] = shares[k, at + i % inner]


@njit(**JIT)
def backward(begin, end, tag, g, x, weights, params, state, gx, gw, table, size, inner, channels,
             planes_each, per, step, blocks, pad, fixed, is_mean):  # fmt: skip
    """Pieces `begin .. end - 1`: a block of the rows of a plane each, of which each row gets what
    its windows send, in their order.

    Args:
        state: what the forward pass kept; None for a linear accumulation.
        gw: None where there are no weights.
        is_mean: whether a linear accumulation divides.
    """
    lanes, outs = width(gx), table.shape[1]
    number = empty_buffer(gx, 0).dtype.type
    some = PART if inner == 1 else 1
    shares = np.zeros((num_shares(tag), some * inner + lanes), number)
    wide = np.zeros((num_shares(tag), lanes), number)
    counts = np.ones(some * inner + lanes if is_mean else 0, number)
    p = np.zeros(some * inner + lanes, number)
    last = np.int64(-1)
    for unit in range(begin, end):
        plane, block = unit // blocks, unit % blocks
        low, high = size * block // blocks, size * (block + 1) // blocks
        if params is not None and plane != last:
            fill_parameters(p, params, plane, inner, planes_each, channels)
            last = plane
        windows = table[plane // per % table.shape[0]]
        base, done = plane * size * inner, low
        if step > 1:
            clear(gx, base + low * inner, base + high * inner)
            clear(gw, base + low * inner, base + high * inner)
            done = high
        known, laid = np.int64(0), np.int64(0)
        for o in range(outs):
            first, count = windows[o, FIRST], windows[o, COUNT]
            if count == 0 or first >= high or first + (count - 1) * step < low:
                continue
            if o >= known:
                laid, known = o, min(outs, o + some)
                lay_shares(tag, shares, g, state, plane * outs * inner, windows, o, known,
                           inner, counts, pad, fixed, p, params)  # fmt: skip
            sent = shares
            if fills_lanes(gx, inner):
                widen(wide, shares, (o - laid) * inner, inner)
                sent = wide
            done = send_window(tag, x, weights, params, p, gx, gw, base, (first, count), low, high,
                               done, step, sent, inner)  # fmt: skip
        clear(gx, base + done * inner, base + high * inner)
        clear(gw, base + done * inner, base + high * inner)


# The derivative by the parameter ------------------------------------------------------------


def slopes(
    way: Any, tag: Any, g: Any, x: Any, weights: Any, params: Any, row: Any, state: Any, by_p: Any,
    plane: Any, part: Any, lines: Any, table: Any, step: Any, inner: Any, room: Any,
) -> None:  # fmt: skip
    """The derivatives of one piece of work."""


@inlined(slopes)
def _slopes(way, tag, g, x, weights, params, row, state, by_p, plane, part, lines, table, step,
            inner, room):  # fmt: skip
    return slopes_of_channels if way.instance_class is ByChannel else slopes_of_windows


def slopes_of_windows(way, tag, g, x, weights, params, row, state, by_p, plane, part, lines, table,
                      step, inner, room):  # fmt: skip
    places, counts, pads, divisors = room
    outs, like = table.shape[0], splat(x, 0)
    p = parameter(params, row, 0, like)
    for o in range(part * PART, min(outs, (part + 1) * PART), width(like)):
        end, at = min(outs, o + width(like)), plane * outs + o
        longest, others = lay_out(table, o, end, width(like), step, places, counts, pads, divisors,
                                  0, 0.0)  # fmt: skip
        place = Tabled(0, longest, step, places, counts)
        v = slope(place, tag, g, x, weights, lines, state, at, end - o, g.size, None, p)
        store_first(by_p, at, v, end - o)
        for i in range(o, end if others else o):
            if is_along(step, table[i, COUNT]):
                count = table[i, COUNT]
                one = Whole(0, count, table[i, FIRST], chain(count // width(x)))
                to = plane * outs + i
                v = slope(one, tag, g, x, weights, lines, state, to, 1, g.size, None, p)
                by_p[to] = lane(v, 0)


def slopes_of_channels(way, tag, g, x, weights, params, row, state, by_p, plane, part, lines, table,
                       step, inner, room):  # fmt: skip
    like = splat(x, 0)
    blocks = -(-inner // BLOCK)
    o, begin = part // blocks, part % blocks * BLOCK
    for c in range(begin, min(begin + BLOCK, inner), width(like)):
        left, at = min(width(like), inner - c), (plane * table.shape[0] + o) * inner + c
        count = table[o, COUNT]
        place = Inner(0, count, table[o, FIRST], step, c, left, inner, chain(count))
        p = parameter(params, row, c, like)
        v = slope(place, tag, g, x, weights, lines, state, at, left, g.size, None, p)
        store_first(by_p, at, v, left)


@njit(**JIT)
def by_parameter(begin, end, way, tag, g, x, weights, params, state, by_p, table, size, inner,
                 channels, planes_each, per, step):  # fmt: skip
    """The derivatives by the parameter, one for each output; pieces as those of `forward`."""
    row = empty_buffer(x, inner + width(x))
    places, counts = np.zeros(PART, np.int32), np.zeros(PART, np.int32)
    room = places, counts, empty_buffer(x, PART), empty_buffer(x, PART)
    lines = np.zeros(1, np.int64), np.zeros(1, np.int64), 1
    each = pieces(table.shape[1], inner)
    for unit in range(begin, end):
        plane, part = unit // each, unit % each
        if part == 0 or unit == begin:
            fill_parameters(row, params, plane, inner, planes_each, channels)
            lines[0][0] = plane * size * inner
        windows = table[plane // per % table.shape[0]]
        slopes(way, tag, g, x, weights, params, row, state, by_p, plane, part, lines,
               windows, step, inner, room)  # fmt: skip


# The gradient of a selection ----------------------------------------------------------------


@njit(**JIT)
def scatter(begin, end, g, state, gx, table, size, inner, per, step, blocks):
    """Pieces as those of `backward`: each winner gets its windows' gradients, in their order."""
    outs = table.shape[1]
    for unit in range(begin, end):
        plane, block = unit // blocks, unit % blocks
        low, high = size * block // blocks, size * (block + 1) // blocks
        base = plane * size * inner
        clear(gx, base + low * inner, base + high * inner)
        windows = table[plane // per % table.shape[0]]
        for o in range(outs):
            first, count = windows[o, FIRST], windows[o, COUNT]
            if count == 0 or first >= high or first + (count - 1) * step < low:
                continue
            at = (plane * outs + o) * inner
            for c in range(inner):
                row = first + np.int64(state[at + c]) * step
                if low <= row < high:
                    gx[base + row * inner + c] += g[at + c]
