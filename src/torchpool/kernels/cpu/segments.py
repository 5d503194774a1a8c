"""Windows that a table gives, compiled by Numba: ragged batches, and segments of packed rows.

A window is a run of taps of one sample: first position, number, and the table's step between them.
What a window becomes depends on its own elements alone, in an order that only its own number of
taps decides, so that a sample gives the same bits alone and in any batch, on any number of threads.

Elements lie as (plane, position, inner): (N, T, C) in memory has N planes of C inner elements, (N,
C, T) has N * C planes of one. Formulas run over *lanes* side by side in memory: the inner elements
of a row, or of a group of rows where those are few; short windows of planes with one inner element
take one lane per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from torchpool.kernels import layout, reference
from torchpool.kernels.cpu import formulas, threads
from torchpool.kernels.cpu.formulas import (
    anchor,
    finish,
    key,
    least,
    lift,
    lift_dp,
    lift_dx,
    num_sums,
    padded,
    trimmed,
)
from torchpool.kernels.cpu.scalars import (
    JIT_LOOPS,
    LOOPS,
    Largest,
    Smallest,
    beats,
    element,
    empty_buffer,
    merge,
)
from torchpool.kernels.cpu.simd import BRAIN, HALF
from torchpool.reductions import Accumulation, Mean, Selection
from torchpool.windows import Axis

LANES = 32
"""Lanes that a group of narrow rows is filled up to; a window of fewer taps is short."""
NARROW = 16
"""Inner elements below which rows are grouped."""

_FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
_WIDER = {
    torch.bool: torch.uint8,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
}
_INTEGERS = {torch.uint8, torch.int32, torch.int64} | set(_WIDER)
_LARGEST, _SMALLEST = Largest(), Smallest()


# Pieces of work -------------------------------------------------------------


@njit(**LOOPS)
def fetch(t, x, at, taps, step, width):
    """`taps` rows of `width` elements, `step` apart, side by side. Nothing where x is empty: the
    lanes then stay 0."""
    if x.size == 0:
        return
    if step == width:
        for i in range(taps * width):
            t[i] = element(x, at + i)
    else:
        for r in range(taps):
            for i in range(width):
                t[r * width + i] = element(x, at + r * step + i)


# Lanes: one flat array whose rows lie a constant apart, so that the compiler sees that they do not
# overlap -------------------------------------------------------------------------

U = np.uint64
ROOM = 256
"""Elements of a row of lanes."""
TAP, WEIGHT, ANCHOR, COUNT, PARAM, SENT, BY_N = (U(ROOM * k) for k in range(7))
S0, S1, S2, S3, D0, D1, D2, D3 = (U(ROOM * k) for k in range(7, 15))
ROWS = 15


@njit(**LOOPS)
def fill(b, row, m, value):
    for i in range(U(m)):
        b[row + i] = value


@njit(**LOOPS)
def repeat(b, row, width, times):
    """Copies the first `width` lanes `times` - 1 times behind themselves."""
    for i in range(U(width), U(width * times)):
        b[row + i] = b[row + i - U(width)]


@njit(**LOOPS)
def fold(b, row, width, times):
    """Adds `times` groups of lanes up into the first."""
    for r in range(1, times):
        for i in range(U(width)):
            b[row + i] += b[row + U(r * width) + i]


@njit(**LOOPS)
def take(b, row, source, at, width, times):
    """Reads the first `width` lanes of a row and repeats them."""
    for i in range(U(width)):
        b[row + i] = source[U(at) + i]
    repeat(b, row, width, times)


@njit(**LOOPS)
def parameters(b, params, plane, channels, inner, begin, width, times):
    """The parameter of each lane."""
    if params.size == 1:
        fill(b, PARAM, width * times, params[0])
        return
    for i in range(width):
        b[PARAM + U(i)] = params[begin + i if inner > 1 or channels == 1 else plane % channels]
    repeat(b, PARAM, width, times)


# Formulas over lanes ----------------------------------------------------------


@njit(**LOOPS)
def raise_anchor(tag, b, m, plain):
    for i in range(U(m)):
        k = key(tag, b[TAP + i], b[PARAM + i])
        wins = (plain | (b[WEIGHT + i] != 0)) & ((k > b[ANCHOR + i]) | (k != k))
        b[ANCHOR + i] = k if wins else b[ANCHOR + i]


@njit(**LOOPS)
def add_mean(b, m, plain):
    if plain:
        for i in range(U(m)):
            b[ANCHOR + i] += b[TAP + i]
        return
    for i in range(U(m)):
        w = b[WEIGHT + i]
        b[ANCHOR + i] += w * b[TAP + i] if w != 0 else w
        b[COUNT + i] += w


@njit(**LOOPS)
def add_lift_of(tag, b, x, at, m):
    """As `add_lift`, of elements that lie side by side in x and have no weights."""
    for i in range(U(m)):
        l0, l1, l2, l3 = padded(lift(tag, element(x, at + i), b[ANCHOR + i], b[PARAM + i]))
        b[S0 + i] += l0
        if num_sums(tag) > 1:
            b[S1 + i] += l1
        if num_sums(tag) > 2:
            b[S2 + i] += l2
        if num_sums(tag) > 3:
            b[S3 + i] += l3


@njit(**LOOPS)
def add_lift(tag, b, m, plain):
    if plain:
        for i in range(U(m)):
            l0, l1, l2, l3 = padded(lift(tag, b[TAP + i], b[ANCHOR + i], b[PARAM + i]))
            b[S0 + i] += l0
            if num_sums(tag) > 1:
                b[S1 + i] += l1
            if num_sums(tag) > 2:
                b[S2 + i] += l2
            if num_sums(tag) > 3:
                b[S3 + i] += l3
        return
    for i in range(U(m)):
        l0, l1, l2, l3 = padded(lift(tag, b[TAP + i], b[ANCHOR + i], b[PARAM + i]))
        w = b[WEIGHT + i]
        live = w != 0
        b[S0 + i] += w * l0 if live else w
        if num_sums(tag) > 1:
            b[S1 + i] += w * l1 if live else w
        if num_sums(tag) > 2:
            b[S2 + i] += w * l2 if live else w
        if num_sums(tag) > 3:
            b[S3 + i] += w * l3 if live else w
        b[COUNT + i] += w


@njit(**LOOPS)
def chain(tag, b, i, l0, l1, l2, l3):
    """Sum over k of dL/ds_k times the k-th term."""
    total = b[D0 + i] * l0
    if num_sums(tag) > 1:
        total += b[D1 + i] * l1
    if num_sums(tag) > 2:
        total += b[D2 + i] * l2
    if num_sums(tag) > 3:
        total += b[D3 + i] * l3
    return total


@njit(**LOOPS)
def add_lift_dp(tag, b, m, plain):
    for i in range(U(m)):
        l0, l1, l2, l3 = padded(lift_dp(tag, b[TAP + i], b[ANCHOR + i], b[PARAM + i]))
        sent = chain(tag, b, i, l0, l1, l2, l3)
        w = b[WEIGHT + i]
        b[S0 + i] += sent if plain else (w * sent if w != 0 else w)


@njit(**LOOPS)
def send_dx(tag, b, m, plain):
    """What a window sends to the elements of its taps."""
    if plain:
        for i in range(U(m)):
            l0, l1, l2, l3 = padded(lift_dx(tag, b[TAP + i], b[ANCHOR + i], b[PARAM + i]))
            b[SENT + i] = chain(tag, b, i, l0, l1, l2, l3)
        return
    for i in range(U(m)):
        l0, l1, l2, l3 = padded(lift_dx(tag, b[TAP + i], b[ANCHOR + i], b[PARAM + i]))
        w = b[WEIGHT + i]
        b[SENT + i] = w * chain(tag, b, i, l0, l1, l2, l3) if w != 0 else w


@njit(**LOOPS)
def send_dw(tag, b, m):
    """What a window sends to the weights of its taps."""
    zero = b.dtype.type(0)
    for i in range(U(m)):
        l0, l1, l2, l3 = padded(lift(tag, b[TAP + i], b[ANCHOR + i], b[PARAM + i]))
        sent = chain(tag, b, i, l0, l1, l2, l3) + b[BY_N + i]
        b[SENT + i] = sent if b[WEIGHT + i] != 0 else zero


@njit(**LOOPS)
def deliver(out, at, b, m, fresh):
    """Adds what was sent; `fresh` elements have got nothing yet."""
    if fresh:
        for i in range(U(m)):
            out[U(at) + i] = b[SENT + i]
    else:
        for i in range(U(m)):
            out[U(at) + i] += b[SENT + i]


# Accumulation, forward ----------------------------------------------------------


@njit(**LOOPS)
def sweep(goal, tag, b, x, weights, at, count, step, width, group):
    """Visits all taps of a window, `group` rows at a time: 0 raises the anchor, 1 sums for the
    mean, 2 sums lifts, 3 sums what the parameter gets."""
    plain = weights.size == 0
    for j in range(0, count, group):
        taps = min(group, count - j)
        m = taps * width
        if goal == 2 and plain and x.size and (step == width or taps == 1):
            add_lift_of(tag, b, x, U(at + j * step), m)
            continue
        fetch(b[TAP : TAP + U(m)], x, at + j * step, taps, step, width)
        if not plain:
            fetch(b[WEIGHT : WEIGHT + U(m)], weights, at + j * step, taps, step, width)
        if goal == 0:
            raise_anchor(tag, b, m, plain)
        elif goal == 1:
            add_mean(b, m, plain)
        elif goal == 2:
            add_lift(tag, b, m, plain)
        else:
            add_lift_dp(tag, b, m, plain)


@njit(**LOOPS)
def clear_sums(tag, b, m):
    zero = b.dtype.type(0)
    fill(b, COUNT, m, zero)
    for k in range(num_sums(tag)):
        fill(b, S0 + U(k * ROOM), m, zero)


@njit(**LOOPS)
def divide_anchor(b, m):
    for i in range(U(m)):
        n = b[COUNT + i]
        b[ANCHOR + i] = b[ANCHOR + i] / n if n != 0 else b[ANCHOR + i]


@njit(**LOOPS)
def reduce_window(tag, b, x, weights, at, count, step, width, group):
    """Anchor, sums and n of one window, in the first `width` lanes."""
    number = b.dtype.type
    used = min(group, count)
    m = used * width
    plain = weights.size == 0
    fill(b, ANCHOR, m, number(0))
    if anchor(tag) == 1:
        fill(b, ANCHOR, m, number(-np.inf))
        sweep(0, tag, b, x, weights, at, count, step, width, group)
        for r in range(1, used):
            for i in range(U(width)):
                k = b[ANCHOR + U(r * width) + i]
                b[ANCHOR + i] = k if (k > b[ANCHOR + i]) | (k != k) else b[ANCHOR + i]
        repeat(b, ANCHOR, width, used)
    elif anchor(tag) == 2:
        fill(b, COUNT, m, number(0))
        sweep(1, tag, b, x, weights, at, count, step, width, group)
        fold(b, ANCHOR, width, used)
        fold(b, COUNT, width, used)
        if plain:
            fill(b, COUNT, width, number(count))
        divide_anchor(b, width)
        repeat(b, ANCHOR, width, used)
    clear_sums(tag, b, m)
    sweep(2, tag, b, x, weights, at, count, step, width, group)
    fold(b, COUNT, width, used)
    for k in range(num_sums(tag)):
        fold(b, S0 + U(k * ROOM), width, used)
    if plain:
        fill(b, COUNT, width, number(count))


@njit(**LOOPS)
def end_window(tag, b, y, stats, at, width, step, extra, divisor):
    """Writes values and statistics of `width` lanes; n is -inf where the window is empty."""
    number = y.dtype.type
    zero, none = number(0), number(-np.inf)
    for k in range(width):
        i = U(k)
        n, a, p = b[COUNT + i], b[ANCHOR + i], b[PARAM + i]
        is_empty = n <= least(tag, p)
        counted = divisor if divisor != 0 else n + number(extra[k if extra.size > 1 else 0])
        sums = (b[S0 + i], b[S1 + i], b[S2 + i], b[S3 + i])
        value = finish(tag, trimmed(tag, sums), counted, a, p)
        y[at + k] = zero if is_empty else value
        if stats.size:
            stats[at + k] = a
            for slot in range(num_sums(tag)):
                stats[(slot + 1) * step + at + k] = sums[slot]
            stats[(num_sums(tag) + 1) * step + at + k] = none if is_empty else counted


@njit(**LOOPS)
def empty_window(tag, y, stats, at, width, step):
    for i in range(width):
        y[at + i] = 0
        if stats.size:
            for slot in range(num_sums(tag) + 1):
                stats[slot * step + at + i] = 0
            stats[(num_sums(tag) + 1) * step + at + i] = -np.inf


@njit(**JIT_LOOPS)
def forward(
    begin, end, tag, x, weights, params, y, stats, table, size, inner, channels, step, group,
    divisor,
):  # fmt: skip
    """One unit per window and block of inner elements."""
    width, blocks = min(inner, ROOM), (inner + ROOM - 1) // ROOM
    outs = table.shape[1]
    b = np.zeros(ROWS * ROOM, y.dtype)
    for unit in range(begin, end):
        block, window = unit % blocks, unit // blocks
        plane, o = window // outs, window % outs
        c = block * ROOM
        m = min(width, inner - c)
        first, count = table[plane % table.shape[0], o, 0], table[plane % table.shape[0], o, 1]
        at = window * inner + c
        if unit == begin or params.size > 1:
            parameters(b, params, plane, channels, inner, c, m if params.size > 1 else width, group)
        if count == 0:
            empty_window(tag, y, stats, at, m, y.size)
            continue
        begins = (plane * size + first) * inner + c
        reduce_window(tag, b, x, weights, begins, count, step * inner, m, group)
        extra = table[plane % table.shape[0], o, 2:3]
        end_window(tag, b, y, stats, at, m, y.size, extra, divisor)


@njit(**LOOPS)
def tap_lanes(b, x, weights, base, table, j, step):
    """Tap j of several windows, one lane each. Returns whether every window has it, with weight
    1."""
    zero, one = b.dtype.type(0), b.dtype.type(1)
    whole = weights.size == 0
    for k in range(table.shape[0]):
        has = j < table[k, 1]
        at = base + table[k, 0] + j * step if has else 0
        b[TAP + U(k)] = element(x, at) if has and x.size else zero
        if weights.size:
            b[WEIGHT + U(k)] = element(weights, at) if has else zero
        else:
            b[WEIGHT + U(k)] = one if has else zero
        whole = whole and has
    return whole


@njit(**LOOPS)
def count_tap(b, m, plain):
    """Counts a tap that every lane has."""
    if plain:
        one = b.dtype.type(1)
        for i in range(U(m)):
            b[COUNT + i] += one


@njit(**LOOPS)
def reduce_short(tag, b, x, weights, base, table, step, longest):
    """Anchors, sums and n of short windows, one lane each."""
    number = b.dtype.type
    m = table.shape[0]
    fill(b, ANCHOR, m, number(-np.inf if anchor(tag) == 1 else 0))
    if anchor(tag) == 1:
        for j in range(longest):
            raise_anchor(tag, b, m, tap_lanes(b, x, weights, base, table, j, step))
    elif anchor(tag) == 2:
        fill(b, COUNT, m, number(0))
        for j in range(longest):
            plain = tap_lanes(b, x, weights, base, table, j, step)
            add_mean(b, m, plain)
            count_tap(b, m, plain)
        divide_anchor(b, m)
    clear_sums(tag, b, m)
    for j in range(longest):
        plain = tap_lanes(b, x, weights, base, table, j, step)
        add_lift(tag, b, m, plain)
        count_tap(b, m, plain)


@njit(**JIT_LOOPS)
def forward_planes(
    begin, end, tag, x, weights, params, y, stats, table, size, channels, step, divisor, per
):
    """One unit per plane with one inner element; `per` planes share a row of the table."""
    outs = table.shape[1]
    b = np.zeros(ROWS * ROOM, y.dtype)
    for plane in range(begin, end):
        rows = table[plane // per % table.shape[0]]
        parameters(b, params, plane, channels, 1, 0, 1, ROOM)
        for o in range(0, outs, ROOM):
            part = rows[o : o + ROOM]
            longest = part[:, 1].max()
            at = plane * outs + o
            if longest < LANES:
                reduce_short(tag, b, x, weights, plane * size, part, step, longest)
                end_window(tag, b, y, stats, at, part.shape[0], y.size, part[:, 2], divisor)
                continue
            for i in range(part.shape[0]):
                first, count = part[i, 0], part[i, 1]
                if count == 0:
                    empty_window(tag, y, stats, at + i, 1, y.size)
                    continue
                reduce_window(tag, b, x, weights, plane * size + first, count, step, 1, LANES)
                end_window(tag, b, y, stats, at + i, 1, y.size, part[i, 2:3], divisor)


# Accumulation, backward ---------------------------------------------------------


@njit(**LOOPS)
def window_share(tag, b, share, stats, params, at, total, plane, channels, inner, c, width, used):
    """Coefficients, anchor, dL/dn and parameter of a window in lanes."""
    slots = num_sums(tag)
    for k in range(slots):
        take(b, D0 + U(k * ROOM), share, k * total + at, width, used)
    take(b, BY_N, share, slots * total + at, width, used)
    if stats.size:
        take(b, ANCHOR, stats, at, width, used)
    if params.size > 1:
        parameters(b, params, plane, channels, inner, c, width, used)


@njit(**JIT_LOOPS)
def parameter_sums(
    begin, end, tag, x, weights, params, stats, share, by_p, table, size, inner, channels,
    step, group, per,
):  # fmt: skip
    """What the parameter gets through the terms of each window; one unit per window and block of
    inner elements."""
    width, blocks = min(inner, ROOM), (inner + ROOM - 1) // ROOM
    outs = table.shape[1]
    b = np.zeros(ROWS * ROOM, params.dtype)
    parameters(b, params, 0, channels, inner, 0, 1, ROOM)
    for unit in range(begin, end):
        block, window = unit % blocks, unit // blocks
        plane, o = window // outs, window % outs
        c = block * ROOM
        m = min(width, inner - c)
        first = table[plane // per % table.shape[0], o, 0]
        count = table[plane // per % table.shape[0], o, 1]
        at = window * inner + c
        by_p[at : at + m] = 0
        if count == 0:
            continue
        used = min(group, count)
        window_share(
            tag, b, share, stats, params, at, by_p.size, plane, channels, inner, c, m, used
        )
        fill(b, S0, used * m, b.dtype.type(0))
        begins = (plane * size + first) * inner + c
        sweep(3, tag, b, x, weights, begins, count, step * inner, m, group)
        fold(b, S0, m, used)
        for i in range(m):
            by_p[at + i] = b[S0 + U(i)]


@njit(**LOOPS)
def send_rows(tag, b, x, weights, gx, gw, at, taps, step, width, group, fresh):
    """Sends a window's share to `taps` rows of `width` elements from `at` on, `step` apart."""
    plain = weights.size == 0
    for j in range(0, taps, group):
        rows = min(group, taps - j)
        m = rows * width
        here = at + j * step
        fetch(b[TAP : TAP + U(m)], x, here, rows, step, width)
        if not plain:
            fetch(b[WEIGHT : WEIGHT + U(m)], weights, here, rows, step, width)
        if gx.size:
            send_dx(tag, b, m, plain)
            deliver(gx, here, b, m, fresh)
        if gw.size:
            send_dw(tag, b, m)
            deliver(gw, here, b, m, fresh)


@njit(**LOOPS)
def clear(out, plane, size, inner, c, width, begin, end):
    """Zeros in some inner elements of the rows `begin` to `end` - 1."""
    if out.size and end > begin:
        if width == inner:
            out[(plane * size + begin) * inner : (plane * size + end) * inner] = 0
            return
        for row in range(begin, end):
            at = (plane * size + row) * inner + c
            out[at : at + width] = 0


@njit(**LOOPS)
def backward_block(
    tag, b, x, weights, params, stats, share, gx, gw, rows, size, inner, channels, step, group,
    plane, low, high, c, width,
):  # fmt: skip
    """A block of rows and inner elements. Each row gets what its windows send in their order;
    `done` is the first row that has got nothing yet."""
    outs, total = rows.shape[0], share.size // (num_sums(tag) + 1)
    done = low
    if step > 1:
        clear(gx, plane, size, inner, c, width, low, high)
        clear(gw, plane, size, inner, c, width, low, high)
        done = high
    for o in range(outs):
        first, count = rows[o, 0], rows[o, 1]
        if count == 0 or first >= high or first + (count - 1) * step < low:
            continue
        start = max(0, (low - first + step - 1) // step)
        stop = min(count, (high - first + step - 1) // step)
        if stop <= start:
            continue
        at = (plane * outs + o) * inner + c
        used = min(group, stop - start)
        window_share(tag, b, share, stats, params, at, total, plane, channels, inner, c, width,
                     used)  # fmt: skip
        if first > done:
            clear(gx, plane, size, inner, c, width, done, first)
            clear(gw, plane, size, inner, c, width, done, first)
            done = first
        known = stop if step > 1 else min(stop, max(start, done - first))
        for part in range(2):
            a, z = (start, known) if part == 0 else (known, stop)
            if z > a:
                begins = (plane * size + first + a * step) * inner + c
                send_rows(tag, b, x, weights, gx, gw, begins, z - a, step * inner, width, group,
                          part == 1)  # fmt: skip
        if step == 1:
            done = max(done, first + stop)
    clear(gx, plane, size, inner, c, width, done, high)
    clear(gw, plane, size, inner, c, width, done, high)


@njit(**JIT_LOOPS)
def backward(
    begin, end, tag, x, weights, params, stats, share, gx, gw, table, size, inner, channels,
    step, group, per, blocks,
):  # fmt: skip
    """One unit per plane and block of rows."""
    b = np.zeros(ROWS * ROOM, params.dtype)
    fill(b, WEIGHT, ROOM, params.dtype.type(1))
    parameters(b, params, 0, channels, inner, 0, 1, ROOM)
    for unit in range(begin, end):
        plane, block = unit // blocks, unit % blocks
        low, high = size * block // blocks, size * (block + 1) // blocks
        rows = table[plane // per % table.shape[0]]
        for c in range(0, inner, ROOM):
            backward_block(
                tag, b, x, weights, params, stats, share, gx, gw, rows, size, inner, channels,
                step, group, plane, low, high, c, min(ROOM, inner - c),
            )  # fmt: skip


# Selection ------------------------------------------------------------------------


@njit(**LOOPS)
def better(tag, value, where, best, held):
    """Whether a candidate wins over another of any place: NaN above all and the last of them, then
    the best, then the first of equals."""
    if where < 0:
        return False
    if held < 0:
        return True
    if value != value:
        return (best == best) | (where > held)
    if best != best:
        return False
    return beats(tag, value, best) or (where < held and not beats(tag, best, value))


@njit(**LOOPS)
def choose(tag, best, held, t, live, j, width):
    """Later candidates against the best so far; lane i holds tap `j + i // width`."""
    if live.size:
        for i in range(t.size):
            wins = (live[i] != 0) & ((held[i] < 0) | beats(tag, t[i], best[i]))
            best[i] = t[i] if wins else best[i]
            held[i] = np.int32(j + i // width) if wins else held[i]
    elif width == t.size:
        for i in range(t.size):
            wins = (held[i] < 0) | beats(tag, t[i], best[i])
            best[i] = t[i] if wins else best[i]
            held[i] = np.int32(j) if wins else held[i]
    else:
        for i in range(t.size):
            wins = (held[i] < 0) | beats(tag, t[i], best[i])
            best[i] = t[i] if wins else best[i]
            held[i] = np.int32(j + i // width) if wins else held[i]


@njit(**LOOPS)
def merge_lanes(tag, best, t):
    for i in range(t.size):
        best[i] = merge(tag, best[i], t[i])


@njit(**LOOPS)
def select_window(tag, best, held, t, x, mask, live, at, count, step, width, group, places):
    """The winner of one window in the first `width` lanes, with its place where `places` or under a
    mask."""
    used = min(group, count)
    if not places and mask.size == 0:
        fetch(best, x, at, used, step, width)
        for j in range(used, count, group):
            taps = min(group, count - j)
            fetch(t, x, at + j * step, taps, step, width)
            merge_lanes(tag, best[: taps * width], t[: taps * width])
        for r in range(1, used):
            merge_lanes(tag, best[:width], best[r * width : (r + 1) * width])
        return
    held[: used * width] = -1
    for j in range(0, count, group):
        taps = min(group, count - j)
        m = taps * width
        fetch(t, x, at + j * step, taps, step, width)
        if mask.size:
            fetch(live, mask, at + j * step, taps, step, width)
        choose(tag, best[:m], held[:m], t[:m], live[: m if mask.size else 0], j, width)
    for r in range(1, used):
        for i in range(width):
            k = r * width + i
            if better(tag, best[k], held[k], best[i], held[i]):
                best[i], held[i] = best[k], held[k]


@njit(**JIT_LOOPS)
def select_windows(begin, end, tag, x, mask, y, state, table, size, inner, step, group, per):
    """One unit per window and block of inner elements."""
    width, blocks = min(inner, ROOM), (inner + ROOM - 1) // ROOM
    outs = table.shape[1]
    best, t = empty_buffer(x, group * width), empty_buffer(x, group * width)
    held, live = np.empty(group * width, np.int32), np.empty(group * width, np.uint8)
    for unit in range(begin, end):
        block, window = unit % blocks, unit // blocks
        plane, o = window // outs, window % outs
        c = block * ROOM
        m = min(width, inner - c)
        row = table[plane // per % table.shape[0], o]
        at = window * inner + c
        held[:m] = -1
        if row[1]:
            begins = (plane * size + row[0]) * inner + c
            select_window(
                tag, best, held, t, x, mask, live, begins, row[1], step * inner, m, group,
                state.size > 0,
            )  # fmt: skip
        whole = row[1] > 0 and state.size == 0 and mask.size == 0
        for i in range(m):
            y[at + i] = best[i] if whole or held[i] >= 0 else y.dtype.type(0)
            if state.size:
                state[at + i] = max(held[i], np.int32(0))


@njit(**JIT_LOOPS)
def scatter(begin, end, grad, state, gx, table, size, inner, step, per, blocks):
    """One unit per plane and block of rows: each winner gets its windows' gradients."""
    outs = table.shape[1]
    for unit in range(begin, end):
        plane, block = unit // blocks, unit % blocks
        low, high = size * block // blocks, size * (block + 1) // blocks
        clear(gx, plane, size, inner, 0, inner, low, high)
        rows = table[plane // per % table.shape[0]]
        for o in range(outs):
            first, count = rows[o, 0], rows[o, 1]
            if count == 0 or first >= high or first + (count - 1) * step < low:
                continue
            at = (plane * outs + o) * inner
            for c in range(inner):
                row = first + state[at + c] * step
                if low <= row < high:
                    gx[(plane * size + row) * inner + c] += grad[at + c]


# From tensors to kernels ------------------------------------------------------------


def _flat(t: Tensor, channels_last: bool) -> Any:
    """The memory of a dense (N, C, *) as a flat array; half formats as their bits."""
    t = t.movedim(1, -1) if channels_last and t.ndim > 2 else t
    t = t.detach().reshape(-1)
    if t.dtype in (torch.bfloat16, torch.float16):
        record = BRAIN if t.dtype == torch.bfloat16 else HALF
        return t.view(torch.uint16).numpy().view(record)
    return t.view(torch.uint8).numpy() if t.dtype == torch.bool else t.numpy()


class _Batch(NamedTuple):
    """A batch of windows as numbers and arrays."""

    channels_last: bool
    table: Any
    size: int
    planes: int
    inner: int
    channels: int
    step: int
    group: int
    per: int

    @property
    def windows(self) -> int:
        """Number of windows of all planes."""
        return self.planes * int(self.table.shape[1])

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
    inner = c if channels_last else 1
    table = starts[:, 0, 0].contiguous().numpy()
    group = 1 if inner >= NARROW else max(1, LANES // inner)
    planes = n if channels_last else n * c
    per = 1 if channels_last or table.shape[0] == 1 else c
    return _Batch(channels_last, table, axis.in_size, planes, inner, c, axis.dilation, group, per)


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
    outs, dtype = [axes[0].out_size], layout.state_dtype(axes)
    if x.dtype in _WIDER:
        y, state = select(x.to(_WIDER[x.dtype]), mask, starts, reduction, axes, save)
        return y.to(x.dtype), state
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    y = layout.empty_like(x, outs, torch.float32 if is_half else None)
    state = torch.empty_like(y, dtype=torch.int32) if save else x.new_empty(0, dtype=torch.int32)
    if y.numel():
        channels_last = layout.is_channels_last(x)
        batch = _batch(x, starts, axes[0], channels_last)
        valid = x.new_empty(0, dtype=torch.bool)
        if mask is not None:
            valid = layout.to_layout(mask, channels_last)
        arrays = [_flat(t, channels_last) for t in (x, valid, y, state)]
        blocks = -(-batch.inner // ROOM)
        traffic = batch.elements * x.element_size()
        threads.run(
            select_windows, batch.windows * blocks, traffic,
            _LARGEST if reduction.largest else _SMALLEST, *arrays, batch.table, batch.size,
            batch.inner, batch.step, batch.group, batch.per,
        )  # fmt: skip
    return y.to(x.dtype), state.to(dtype)


def select_backward(
    grad: Tensor, state: Tensor, starts: Tensor, axes: Sequence[Axis], channels_last: bool
) -> Tensor:
    """Sends the gradient of each window to its winner; see `reference.select_backward`."""
    wide = layout.compute_dtype(grad.dtype)
    gx = layout.empty(grad, [axes[0].in_size], channels_last, wide)
    if gx.numel():
        batch = _batch(state, starts, axes[0], channels_last)
        arrays = [_flat(t, channels_last) for t in (grad.to(wide), state.to(torch.int32), gx)]
        traffic = gx.numel() * gx.element_size()
        blocks = batch.row_blocks(traffic)
        threads.run(
            scatter, batch.planes * blocks, traffic, *arrays, batch.table, batch.size, batch.inner,
            batch.step, batch.per, blocks,
        )  # fmt: skip
    return gx.to(grad.dtype)


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


class _Call(NamedTuple):
    """An accumulation as arrays."""

    batch: _Batch
    tag: Any
    x: Any
    weights: Any
    params: Any
    divisor: float
    dtype: torch.dtype


def _call(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    batch: _Batch,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> _Call:
    kind: Any = type(reduction)
    effective = x.new_empty(0, dtype=dtype)
    if mask is not None or weights is not None:
        effective = torch.ones((), dtype=dtype) if weights is None else weights.detach().to(dtype)
        effective = effective if mask is None else torch.where(mask, effective, 0)
        effective = layout.to_layout(effective.expand(shape), batch.channels_last)
    p = torch.zeros(1, dtype=dtype) if params is None else params.detach().to(dtype).contiguous()
    divisor = 0.0
    if isinstance(reduction, Mean) and reduction.divisor is not None:
        divisor = float(reduction.divisor)
    number = p.numpy().dtype.type
    return _Call(
        batch, formulas.tag(kind, p.numpy()), _flat(x, batch.channels_last),
        _flat(effective, batch.channels_last), p.numpy(), number(divisor), dtype,
    )  # fmt: skip


def _counted(batch: _Batch, reduction: Accumulation) -> Any:
    """The table, with no padding counted but by a mean that does."""
    if isinstance(reduction, Mean) and reduction.count_include_pad:
        return batch.table
    table = batch.table.copy()
    table[:, :, 2] = 0
    return table


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
    dtype = layout.compute_dtype(x.dtype)
    outs = [axes[0].out_size]
    y = layout.empty_like(x, outs, dtype)
    stats = layout.empty_stats(x, outs, reduction, save)
    if y.numel():
        channels_last = layout.is_channels_last(x)
        batch = _batch(x, starts, axes[0], channels_last)
        call = _call(x, mask, weights, params, reduction, batch, x.shape, dtype)
        _forward(call, _flat(y, channels_last), stats.reshape(-1).numpy(), reduction)
    return y.to(x.dtype), stats


def _forward(call: _Call, y: Any, stats: Any, reduction: Accumulation) -> None:
    batch = call.batch
    table = _counted(batch, reduction)
    traffic = batch.elements * y.itemsize
    arrays = (call.tag, call.x, call.weights, call.params, y, stats, table, batch.size)
    if batch.inner == 1:
        threads.run(
            forward_planes, batch.planes, traffic, *arrays, batch.channels, batch.step,
            call.divisor, batch.per,
        )  # fmt: skip
        return
    blocks = -(-batch.inner // ROOM)
    threads.run(
        forward, batch.windows * blocks, traffic, *arrays, batch.inner, batch.channels, batch.step,
        batch.group, call.divisor,
    )  # fmt: skip


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
    shape = (*grad.shape[:2], axes[0].in_size)
    gx, gw = (
        layout.empty(grad, [axes[0].in_size], channels_last, dtype)
        if needed
        else grad.new_empty(0, dtype=dtype)
        for needed in needs[:2]
    )
    gp = torch.zeros(0 if params is None or not needs[2] else params.shape, dtype=dtype)
    if not grad.numel():
        return gx.zero_().to(grad.dtype), gw.zero_(), gp
    batch = _batch(grad, starts, axes[0], channels_last)
    call = _call(x, mask, weights, params, reduction, batch, shape, dtype)
    if not stats.numel() and not (reduction.linear and weights is None and mask is None):
        stats = torch.zeros((reduction.num_sums + 2, grad.numel()), dtype=dtype)
        _forward(call, np.empty(grad.numel(), call.params.dtype), stats.reshape(-1).numpy(),
                 reduction)  # fmt: skip
    share, through = _shares(grad.to(dtype), stats, params, reduction, call)
    arrays = (call.tag, call.x, call.weights, call.params, stats.reshape(-1).numpy(), share)
    geometry = (batch.table, batch.size, batch.inner, batch.channels, batch.step, batch.group)
    traffic = batch.elements * gx.element_size() * 2
    if needs[0] or needs[1]:
        blocks = batch.row_blocks(traffic)
        made = (_flat(gx, channels_last), _flat(gw, channels_last))
        units = batch.planes * blocks
        group = batch.group if batch.step == 1 else 1
        threads.run(
            backward, units, traffic, *arrays, *made, *geometry[:-1], group, batch.per, blocks,
        )  # fmt: skip
    if needs[2]:
        by_p = np.empty(grad.numel(), share.dtype)
        blocks = -(-batch.inner // ROOM)
        threads.run(
            parameter_sums, batch.windows * blocks, traffic, *arrays, by_p, *geometry, batch.per,
        )  # fmt: skip
        gp = _parameter_gradient(by_p + through, grad, call)
    return gx.to(grad.dtype), gw, gp


def _shares(
    grad: Tensor, stats: Tensor, params: Tensor | None, reduction: Accumulation, call: _Call
) -> tuple[Any, Any]:
    """dL/ds_k and dL/dn of every window as one flat array, and dL/dp through `finish`, in the order
    of memory."""
    batch = call.batch
    n, c, outs = grad.shape
    shape, along = ((n, outs, c), (1, 1, -1)) if batch.channels_last else ((n, c, outs), (1, -1, 1))
    g = layout.to_layout(grad, batch.channels_last)
    g = g.movedim(1, -1) if batch.channels_last else g
    if stats.numel():
        a, *sums, number = stats.reshape(reduction.num_sums + 2, *shape).unbind(0)
    else:
        a, sums = torch.zeros(()), [torch.zeros(())] * reduction.num_sums
        table = torch.from_numpy(_counted(batch, reduction))
        number = (table[..., 1] + table[..., 2]).to(grad.dtype)
        number = torch.full_like(number, call.divisor) if call.divisor else number
        number = torch.where(table[..., 1] > 0, number, -torch.inf)
        number = number.unsqueeze(-1 if batch.channels_last else 1)
    p = torch.from_numpy(call.params).reshape(along)
    by_sums, by_p = reference.shares(reduction, g, a, sums, number, p, call.divisor)
    return by_sums.reshape(-1).numpy(), by_p.reshape(-1).numpy()


def _parameter_gradient(by_p: Any, grad: Tensor, call: _Call) -> Tensor:
    """Sums by channel in float64, in one order whatever the number of threads."""
    n, c, outs = grad.shape
    if call.batch.channels_last:
        by_p = by_p.reshape(n, outs, c)
    else:
        by_p = by_p.reshape(n, c, outs).transpose(0, 2, 1)
    total = by_p.sum((0, 1), dtype=np.float64)
    total = total.sum(keepdims=True) if call.params.size == 1 else total
    return torch.from_numpy(total).to(call.dtype)
