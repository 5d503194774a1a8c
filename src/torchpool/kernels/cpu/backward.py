"""Gradients by the input and the weights: each element gathers what the outputs that cover it send.

Every element is written once, by one thread, and adds its terms in one order. A piece of work is a
band of rows of a plane: first the *shares* of the outputs that cover the band are laid out side by
side (for a selection the gradient and the offset, for a mean the gradient over the count, for other
accumulations the derivatives by their sums), then each row of the band gathers from them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from torchpool.kernels.cpu import formulas
from torchpool.kernels.cpu.direct import (
    ByChannel,
    ByOutput,
    ByWindow,
    Outputs,
    dot,
    fill_parameters,
    fits,
    kept_sums,
    parameter,
    strided,
)
from torchpool.kernels.cpu.formulas import finish_grad, lift, lift_dx, num_sums
from torchpool.kernels.cpu.lines import (
    count_row,
    cover_rows,
    covering,
    covers_of,
    lead_count,
    most_covers,
    split,
    taps_of,
)
from torchpool.kernels.cpu.plan import BEFORE, DILATION, KERNEL, OUT, SIZE, STRIDE
from torchpool.kernels.cpu.scalars import APART, INNER, JIT, Total, empty_buffer
from torchpool.kernels.cpu.simd import (
    braided_high,
    braided_low,
    choose,
    codes_as,
    gather,
    lane,
    lane_numbers,
    load_as,
    load_first,
    splat,
    splat_as,
    store_first,
    width,
)

# Shares ---------------------------------------------------------------------------------


def fill_shares(
    tag: Any, shares: Any, codes: Any, at: Any, g: Any, state: Any, row: Any, count: Any,
    size: Any, counts: Any, scale: Any, p: Any, params: Any,
) -> None:  # fmt: skip
    """The shares of the outputs `row .. row + count - 1`, into shares[:, at] and codes[at].

    Args:
        g: gradients by the outputs.
        state: what the forward pass kept; `size` is the number of outputs.
        counts: what a mean divides by, times `scale`; of size 0 for nothing. For formulas a scale
            of 0 says that n does not matter.
        p: the parameters of the row's elements.
    """


@overload(fill_shares)
def _fill_shares(tag, shares, codes, at, g, state, row, count, size, counts, scale, p, params):
    if formulas.is_tag(tag):
        return _fill_derivatives
    if tag.instance_class is Total:
        return _fill_quotients
    return _fill_winners


def _fill_winners(tag, shares, codes, at, g, state, row, count, size, counts, scale, p, params):
    for i in range(0, count, width(g)):
        store_first(shares[0], at + i, load_first(g, row + i, count - i), count - i)
    for i in range(count):
        codes[at + i] = state[row + i]


def _fill_quotients(tag, shares, codes, at, g, state, row, count, size, counts, scale, p, params):
    for i in range(0, count, width(g)):
        v = load_first(g, row + i, count - i)
        if counts.size:
            v = v / (load_as(counts, i, v) * scale)
        store_first(shares[0], at + i, v, count - i)


def _fill_derivatives(tag, shares, codes, at, g, state, row, count, size, counts, scale, p, params):
    slots = num_sums(tag)
    for i in range(0, count, width(g)):
        left = count - i
        a = load_first(state, row + i, left)
        n = load_first(state, (slots + 1) * size + row + i, left)
        v = load_first(g, row + i, left)
        s = kept_sums(tag, Outputs(0, 0), state, row + i, left, size, v)
        d, dn, _ = finish_grad(tag, s, n, a, parameter(params, p, i, v))
        store_terms(shares, at + i, d, v, left)
        store_first(shares[slots], at + i, dn * v * scale, left)
        store_first(shares[slots + 1], at + i, a, left)
        store_first(shares[slots + 2], at + i, n, left)


def store_terms(shares: Any, at: Any, terms: Any, g: Any, count: Any) -> None:
    """Writes each of a tuple of derivatives, times the gradient."""


@overload(store_terms)
def _store_terms(shares, at, terms, g, count):
    def one(shares, at, terms, g, count):
        store_first(shares[0], at, terms[0] * g, count)

    def two(shares, at, terms, g, count):
        store_first(shares[0], at, terms[0] * g, count)
        store_first(shares[1], at, terms[1] * g, count)

    def three(shares, at, terms, g, count):
        store_first(shares[0], at, terms[0] * g, count)
        store_first(shares[1], at, terms[1] * g, count)
        store_first(shares[2], at, terms[2] * g, count)

    def four(shares, at, terms, g, count):
        store_first(shares[0], at, terms[0] * g, count)
        store_first(shares[1], at, terms[1] * g, count)
        store_first(shares[2], at, terms[2] * g, count)
        store_first(shares[3], at, terms[3] * g, count)

    return (one, two, three, four)[len(terms) - 1]


def num_shares(tag: Any) -> int:
    """How many numbers make the share of an output, offsets aside."""
    raise NotImplementedError


@overload(num_shares)
def _num_shares(tag):
    count = formulas.sums_of(tag) + 3 if formulas.is_tag(tag) else 1
    return lambda tag: count


# What an output sends to an element ---------------------------------------------------------


def send(
    tag: Any, total: Any, shares: Any, codes: Any, at: Any, code: Any, x: Any, weight: Any, p: Any
) -> Any:
    """The totals (by x, and by the weights) of some elements after what the outputs from `at` on
    send them; each is the tap `code` of its output's window."""


@overload(send)
def _send(tag, total, shares, codes, at, code, x, weight, p):
    if not formulas.is_tag(tag):
        if tag.instance_class is Total:
            return lambda tag, total, shares, codes, at, code, x, weight, p: (
                total[0] + load_as(shares[0], at, total[0]), total[1],
            )  # fmt: skip

        def winner(tag, total, shares, codes, at, code, x, weight, p):
            g = load_as(shares[0], at, total[0])
            mine = load_as(codes, at, g) == codes_as(g, codes, code)
            return choose(mine, total[0] + g, total[0]), total[1]

        return winner

    def by_formula(tag, total, shares, codes, at, code, x, weight, p):
        slots = num_sums(tag)
        a = load_as(shares[slots + 1], at, x)
        n = load_as(shares[slots + 2], at, x)
        sent = dot(load_shares(tag, shares, at, x), lift_dx(tag, x, a, p))
        return tally(tag, total, shares, at, n == n, sent, x, weight, a, p)

    return by_formula


def tally(
    tag: Any, total: Any, shares: Any, at: Any, live: Any, sent: Any, x: Any, weight: Any,
    a: Any, p: Any,
) -> Any:  # fmt: skip
    """The totals with one more term; the one by the weights only where there are weights."""


@overload(tally)
def _tally(tag, total, shares, at, live, sent, x, weight, a, p):
    if weight == types.none:
        return lambda tag, total, shares, at, live, sent, x, weight, a, p: (
            choose(live, total[0] + sent, total[0]), total[1],
        )  # fmt: skip

    def weighted(tag, total, shares, at, live, sent, x, weight, a, p):
        seen = live & (weight != 0)
        by_w = dot(load_shares(tag, shares, at, x), lift(tag, x, a, p))
        by_w += load_as(shares[num_sums(tag)], at, x)
        return (
            choose(seen, total[0] + weight * sent, total[0]),
            choose(seen, total[1] + by_w, total[1]),
        )

    return weighted


def load_shares(tag: Any, shares: Any, at: Any, like: Any) -> Any:
    """The derivatives by the sums, as a tuple."""


@overload(load_shares)
def _load_shares(tag, shares, at, like):
    return (
        lambda tag, shares, at, like: (load_as(shares[0], at, like),),
        lambda tag, shares, at, like: (
            load_as(shares[0], at, like),
            load_as(shares[1], at, like),
        ),
        lambda tag, shares, at, like: (
            load_as(shares[0], at, like),
            load_as(shares[1], at, like),
            load_as(shares[2], at, like),
        ),
        lambda tag, shares, at, like: (
            load_as(shares[0], at, like),
            load_as(shares[1], at, like),
            load_as(shares[2], at, like),
            load_as(shares[3], at, like),
        ),
    )[formulas.sums_of(tag) - 1]


def elements(x: Any, at: Any, stride: Any, count: Any, like: Any) -> Any:
    """The elements that some lanes stand for, 0 past the first `count`; None of None."""


@overload(elements)
def _elements(x, at, stride, count, like):
    if x == types.none:
        return lambda x, at, stride, count, like: None

    def read(x, at, stride, count, like):
        if stride <= 2 and count >= width(like) and fits(x, at, stride * width(like)):
            return strided(x, at, stride, like)
        lanes = lane_numbers(like)
        return gather(x, at, lanes * stride, lanes < count)

    return read


# Rows ---------------------------------------------------------------------------------------


@njit(**INNER)
def sources(geo, taps):
    """For each residue of an input position modulo the stride: how many taps reach it, which, and
    by how much the output that sends lies before position // stride.

    Shape:
        taps (stride, 1 + 2 * kernel)
    """
    stride, before = geo[3, STRIDE], geo[3, BEFORE]
    for r in range(stride):
        count = np.int64(0)
        for j in range(geo[3, KERNEL]):
            back = j * geo[3, DILATION] - before - r
            if back % stride == 0:
                taps[r, 1 + 2 * count] = j
                taps[r, 2 + 2 * count] = back // stride
                count += 1
        taps[r, 0] = count


@njit(**INNER)
def residue(tag, r, m, size, x, weights, base, rows, bases, found, shares, codes, taps, stride,
            like, p):  # fmt: skip
    """The totals of the elements at `stride * m + r`, and so on."""
    total = like, like
    at = stride * m + r
    count = (size - at + stride - 1) // stride
    v = elements(x, base + at, stride, count, like)
    w = elements(weights, base + at, stride, count, like)
    for k in range(found):
        for t in range(taps[r, 0]):
            place = rows[k] + m - taps[r, 2 + 2 * t]
            code = bases[k] + taps[r, 1 + 2 * t]
            total = send(tag, total, shares, codes, place, code, v, w, p)
    return total


def put_first(array: Any, at: Any, value: Any, count: Any) -> None:
    """`store_first`, unless the array is None."""


@overload(put_first)
def _put_first(array, at, value, count):
    if array == types.none:
        return lambda array, at, value, count: None
    return lambda array, at, value, count: store_first(array, at, value, count)


@njit(**INNER)
def row_by_output(tag, x, weights, p, params, gx, gw, base, rows, bases, found, shares, codes, taps,
                  row, wide, geo, tab, inner):  # fmt: skip
    """One input row whose windows lie at a regular stride; lanes are elements `stride` apart."""
    size, stride = geo[3, SIZE], geo[3, STRIDE]
    like = splat(gx, 0)
    lanes = width(like)
    q = parameter(params, p, 0, like)
    for m in range(0, (size + stride - 1) // stride, lanes):
        left = size - stride * m
        if stride == 1:
            a = residue(tag, 0, m, size, x, weights, base, rows, bases, found, shares, codes, taps,
                        1, like, q)  # fmt: skip
            store_first(gx, base + m, a[0], left)
            put_first(gw, base + m, a[1], left)
        elif stride == 2:
            a = residue(tag, 0, m, size, x, weights, base, rows, bases, found, shares, codes, taps,
                        2, like, q)  # fmt: skip
            b = residue(tag, 1, m, size, x, weights, base, rows, bases, found, shares, codes, taps,
                        2, like, q)  # fmt: skip
            at = base + 2 * m
            store_first(gx, at, braided_low(a[0], b[0]), left)
            put_first(gw, at, braided_low(a[1], b[1]), left)
            if left > lanes:
                store_first(gx, at + lanes, braided_high(a[0], b[0]), left - lanes)
                put_first(gw, at + lanes, braided_high(a[1], b[1]), left - lanes)
        else:
            for r in range(stride):
                a = residue(tag, r, m, size, x, weights, base, rows, bases, found, shares, codes,
                            taps, stride, like, q)  # fmt: skip
                scatter(row, stride * m + r, stride, a[0], min(lanes, (left - r - 1) // stride + 1))
                if gw is not None:
                    scatter(row, size + stride * m + r, stride, a[1],
                            min(lanes, (left - r - 1) // stride + 1))  # fmt: skip
    if stride > 2:
        flush(row, 0, gx, base, size)
        flush(row, size, gw, base, size)


@njit(**APART)
def scatter(row, at, stride, v, count):
    for i in range(count):
        row[at + stride * i] = lane(v, i)


def flush(row: Any, begin: Any, array: Any, at: Any, size: Any) -> None:
    """Copies a computed row where it belongs, rounded; nothing to None."""


@overload(flush)
def _flush(row, begin, array, at, size):
    if array == types.none:
        return lambda row, begin, array, at, size: None

    def copy(row, begin, array, at, size):
        for i in range(0, size, width(row)):
            store_first(array, at + i, load_first(row, begin + i, size - i), size - i)

    return copy


@njit(**INNER)
def row_by_channel(tag, x, weights, p, params, gx, gw, base, rows, bases, found, shares, codes,
                   taps, row, wide, geo, tab, inner):  # fmt: skip
    """One input row of positions of `inner` elements; lanes are channels."""
    like = splat(gx, 0)
    for i in range(geo[3, SIZE]):
        begin, end = covers_of(geo, tab, 3, i)
        for c in range(0, inner, width(like)):
            at, left = base + i * inner + c, inner - c
            v, w = elements(x, at, 1, left, like), elements(weights, at, 1, left, like)
            q = parameter(params, p, c, like)
            total = like, like
            for k in range(found):
                for e in range(begin, end):
                    o, j = covering(geo, tab, 3, i, e)
                    place = rows[k] + o * inner + c
                    total = send(tag, total, shares, codes, place, bases[k] + j, v, w, q)
            store_first(gx, at, total[0], left)
            put_first(gw, at, total[1], left)


@njit(**INNER)
def row_by_window(tag, x, weights, p, params, gx, gw, base, rows, bases, found, shares, codes, taps,
                  row, wide, geo, tab, inner):  # fmt: skip
    """One input row whose windows are long or irregular: what each window sends, one by one."""
    size = geo[3, SIZE]
    like = splat(gx, 0)
    q = parameter(params, p, 0, like)
    row[:] = 0
    for k in range(found):
        for o in range(geo[3, OUT]):
            first, end, start = taps_of(geo, tab, 3, o)
            send_window(tag, x, weights, q, base, rows[k] + o, bases[k], shares, codes, row, size,
                        wide, first, end, start, geo[3, DILATION], like)  # fmt: skip
    flush(row, 0, gx, base, size)
    flush(row, size, gw, base, size)


def send_window(
    tag: Any, x: Any, weights: Any, p: Any, base: Any, at: Any, code: Any, shares: Any, codes: Any,
    row: Any, size: Any, wide: Any, first: Any, end: Any, start: Any, step: Any, like: Any,
) -> None:  # fmt: skip
    """Adds what the output at shares[:, at] sends to the elements of its window in one row."""


@overload(send_window)
def _send_window(tag, x, weights, p, base, at, code, shares, codes, row, size, wide, first, end,
                 start, step, like):  # fmt: skip
    if formulas.is_tag(tag):
        return _send_window_formula
    return _send_window_total if tag.instance_class is Total else _send_window_winner


def _send_window_winner(tag, x, weights, p, base, at, code, shares, codes, row, size, wide, first,
                        end, start, step, like):  # fmt: skip
    tap = np.int64(codes[at]) - code
    if first <= tap < end:
        row[start + tap * step] += shares[0, at]


def _send_window_total(tag, x, weights, p, base, at, code, shares, codes, row, size, wide, first,
                       end, start, step, like):  # fmt: skip
    if step != 1:
        for j in range(first, end):
            row[start + j * step] += shares[0, at]
        return
    g = splat_as(like, shares[0, at])
    for i in range(start + first, start + end, width(like)):
        left = start + end - i
        store_first(row, i, load_first(row, i, left) + g, left)


def _send_window_formula(tag, x, weights, p, base, at, code, shares, codes, row, size, wide, first,
                         end, start, step, like):  # fmt: skip
    for k in range(num_shares(tag)):
        for i in range(width(like)):
            wide[k, i] = shares[k, at]
    for j in range(first, end, width(like)):
        left = min(width(like), end - j)
        i = start + j * step
        v, w = (
            elements(x, base + i, step, left, like),
            elements(weights, base + i, step, left, like),
        )
        total = send(tag, (like, like), wide, codes, 0, code, v, w, p)
        for k in range(left):
            row[i + k * step] += lane(total[0], k)
            row[size + i + k * step] += lane(total[1], k)


# Kernel -------------------------------------------------------------------------------------


def row_of(way: Any, *args: Any) -> None:
    """One input row, in one of these ways."""


@overload(row_of)
def _row_of(way, *args):
    rows = {ByOutput: row_by_output, ByChannel: row_by_channel, ByWindow: row_by_window}
    row = rows[way.instance_class]
    return lambda way, *args: row(*args)


@njit(**INNER)
def lead_axis(geo):
    """The first of the leading axes that has more than one position."""
    if geo[0, SIZE] > 1 or geo[0, OUT] > 1:
        return 0
    return 1 if geo[1, SIZE] > 1 or geo[1, OUT] > 1 else 2


@njit(**INNER)
def outputs_of(geo, tab, a, begin, end):
    """The outputs along axis `a` that cover some position of `begin .. end - 1`."""
    low, high = geo[a, OUT], np.int64(0)
    for i in range(begin, end):
        first, past = covers_of(geo, tab, a, i)
        if first < past:
            low = min(low, covering(geo, tab, a, i, first)[0])
            high = max(high, covering(geo, tab, a, i, past - 1)[0] + 1)
    return low, max(low, high)


@njit(**INNER)
def rest_of(geo, lead, column):
    """Rows of a plane at one position along the leading axis."""
    rest = np.int64(1)
    for a in range(lead + 1, 3):
        rest *= geo[a, column]
    return rest


@njit(**JIT)
def backward(begin, end, way, tag, g, x, weights, params, state, gx, gw, geo, tab, inner, channels,
             planes_each, band, column, fixed):  # fmt: skip
    """Bands `begin .. end - 1` of `band` positions along the leading axis of a plane each.

    Args:
        x, weights: as in the forward pass, None where they are not needed.
        state: what the forward pass kept; None for a linear accumulation.
        gw: None where there are no weights.
        column, fixed: what a mean divides by, as in the forward pass.
    """
    size, outs = geo[3, SIZE] * inner, geo[3, OUT] * inner
    lanes = width(gx)
    number = empty_buffer(gx, 0).dtype.type
    lead = lead_axis(geo)
    bands = -(-geo[lead, SIZE] // band)
    most = np.int64(0)
    for b in range(bands):
        low, high = outputs_of(geo, tab, lead, b * band, min((b + 1) * band, geo[lead, SIZE]))
        most = max(most, high - low)
    each = rest_of(geo, lead, OUT)
    before = 0 if inner > 1 else (geo[3, KERNEL] + 1) * geo[3, DILATION]
    room = before + outs + before + 2 * lanes
    shares = np.empty((num_shares(tag), most * each * room + lanes), number)
    shares[:] = 0
    if shares.shape[0] > 1:
        shares[shares.shape[0] - 1, :] = np.nan
    codes = empty_codes(state, tag, most * each * room + lanes)
    covers = most_covers(geo, tab)
    rows, bases = np.empty(covers, np.int64), np.empty(covers, np.int64)
    taps = np.empty((max(1, geo[3, STRIDE]), 1 + 2 * geo[3, KERNEL]), np.int64)
    if geo[3, STRIDE] > 0 and inner == 1:
        sources(geo, taps)
    o, i = np.zeros(3, np.int64), np.zeros(3, np.int64)
    p = np.zeros(inner + lanes, number)
    p_out = np.zeros(outs + lanes, number)
    wide = np.zeros((num_shares(tag), lanes), number)
    row = np.zeros(2 * geo[3, SIZE] + 4 * lanes, number)
    counts = np.ones(outs + lanes if column >= 0 else 0, number)
    if column >= 0:
        count_row(counts, geo, tab, inner, column, fixed)
    plane_outs = geo[0, OUT] * geo[1, OUT] * geo[2, OUT]
    plane_rows = geo[0, SIZE] * geo[1, SIZE] * geo[2, SIZE]
    rest = rest_of(geo, lead, SIZE)
    last = np.int64(-1)
    for unit in range(begin, end):
        plane, b = unit // bands, unit % bands
        first, past = b * band, min((b + 1) * band, geo[lead, SIZE])
        if params is not None and plane != last:
            fill_parameters(p, params, plane, planes_each, channels)
            for k in range(outs):
                p_out[k] = p[k % inner]
            last = plane
        low, high = outputs_of(geo, tab, lead, first, past)
        for k in range((high - low) * each):
            line = plane * plane_outs + low * each + k
            split(line, geo, OUT, o)
            scale = number(1)
            if column >= 0 and fixed == 0:
                scale = number(lead_count(geo, tab, column, o))
            elif column < 0 and fixed != 0:
                scale = number(0)
            fill_shares(tag, shares, codes, k * room + before, g, state, line * outs, outs, g.size,
                        counts, scale, p_out, params)  # fmt: skip
        origin = before - low * each * room
        for k in range((past - first) * rest):
            line = plane * plane_rows + first * rest + k
            split(line, geo, SIZE, i)
            found = cover_rows(geo, tab, i, 0, room, rows, bases)
            for q in range(found):
                rows[q] += origin
            row_of(way, tag, x, weights, p, params, gx, gw, line * size, rows, bases, found, shares,
                   codes, taps, row, wide, geo, tab, inner)  # fmt: skip


@njit(parallel=True, **JIT)
def backward_parallel(threads, units, way, tag, g, x, weights, params, state, gx, gw, geo, tab,
                      inner, channels, planes_each, band, column, fixed):  # fmt: skip
    for t in prange(threads):
        backward(
            units * t // threads, units * (t + 1) // threads, way, tag, g, x, weights, params,
            state, gx, gw, geo, tab, inner, channels, planes_each, band, column, fixed,
        )  # fmt: skip


def empty_codes(state: Any, tag: Any, size: Any) -> Any:
    """Room for the offsets that a selection keeps; None for other reductions."""


@overload(empty_codes)
def _empty_codes(state, tag, size):
    if state == types.none or formulas.is_tag(tag):
        return lambda state, tag, size: None
    return lambda state, tag, size: np.empty(size, state.dtype)
