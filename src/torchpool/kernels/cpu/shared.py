"""Formulas whose windows overlap: each element is lifted once, for all windows that see it.

A formula measures elements against an anchor, by default the largest of their window, so that no
exponential overflows and no sum vanishes. Elements of usual size need none of that: they are lifted
against a *neutral* anchor, which is the same everywhere. Rows of lifted elements are kept, with
zeros for the padding, as long as windows see them. Windows whose sum is too small or too large fall
back to anchors of their own. That depends on nothing but their elements, so that a window gives the
same however the work is shared out, and whatever lies beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.direct import ByChannel, alike_from, solve, with_window, write
from torchpool.kernels.cpu.formulas import finish, lift, neutral, num_sums, sums_of
from torchpool.kernels.cpu.lines import (
    advance,
    count_row,
    lead_count,
    lines_ahead,
    most_rows,
    request,
    share_of,
    split,
    taps_of,
    window_rows,
)
from torchpool.kernels.cpu.parts import INNER, JIT, SELDOM, inlined
from torchpool.kernels.cpu.plan import BEFORE, DILATION, KERNEL, OUT, SIZE, STRIDE, VALID
from torchpool.kernels.cpu.scalars import empty_buffer
from torchpool.kernels.cpu.simd import (
    any_lane,
    choose,
    lane_numbers,
    load,
    load_as,
    load_first,
    splat,
    splat_as,
    store,
    width,
)
from torchpool.kernels.cpu.visits import CHAIN, Inner, Outputs, is_long, strided

LEAST, MOST = 1e-7, 1e7
"""The sums of windows whose elements are precise against the neutral anchor."""


class Kept(NamedTuple):
    """Rows of lifted elements: `lifted` holds a line of `line` numbers for each term of each of
    some slots, the elements from `margin` on; `numbers` tells which row of the input a slot
    holds."""

    lifted: Any
    line: int
    margin: int
    numbers: Any


def store_terms(lifted: Any, at: Any, apart: Any, terms: Any, left: Any) -> None:
    """Writes the terms of `left` elements, `apart` from one another; zeros behind them."""


@inlined(store_terms)
def _store_terms(lifted, at, apart, terms, left):
    def one(lifted, at, apart, terms, left):
        store_term(lifted, at, terms[0], left)

    def two(lifted, at, apart, terms, left):
        store_term(lifted, at, terms[0], left)
        store_term(lifted, at + apart, terms[1], left)

    def three(lifted, at, apart, terms, left):
        store_term(lifted, at, terms[0], left)
        store_term(lifted, at + apart, terms[1], left)
        store_term(lifted, at + 2 * apart, terms[2], left)

    def four(lifted, at, apart, terms, left):
        store_term(lifted, at, terms[0], left)
        store_term(lifted, at + apart, terms[1], left)
        store_term(lifted, at + 2 * apart, terms[2], left)
        store_term(lifted, at + 3 * apart, terms[3], left)

    return (one, two, three, four)[len(terms) - 1]


@njit(**INNER)
def store_term(lifted, at, term, left):
    store(lifted, at, choose(lane_numbers(term) < left, term, splat_as(term, 0)))


@njit(**INNER)
def lift_row(tag, x, row, size, lifted, at, apart, p):
    """Lifts the elements of a row into lifted[at] and following."""
    a = neutral(tag, p)
    for i in range(0, size, width(x)):
        left = size - i
        v = load(x, row + i) if left >= width(x) else load_first(x, row + i, left)
        terms = lift(tag, v, a, p)
        store_terms(lifted, at + i, apart, terms, left)


@njit(**INNER)
def lift_rows(tag, x, rows, found, size, kept, places, p):
    """Lifts the rows that are not kept yet, and tells where each begins."""
    slots = kept.numbers.size
    once = 1 / size
    for k in range(found):
        number = np.int64(rows[k] * once + 0.5)
        slot = number & (slots - 1)
        places[k] = slot * kept.line
        if kept.numbers[slot] != number:
            kept.numbers[slot] = number
            at = places[k] + kept.margin
            lift_row(tag, x, rows[k], size, kept.lifted, at, slots * kept.line, p)


def sums_at(tag: Any, place: Any, kept: Any, places: Any, found: Any, geo: Any, like: Any) -> Any:
    """The sums of the lifted elements of the windows at a place."""


@inlined(sums_at)
def _sums_at(tag, place, kept, places, found, geo, like):
    def one(tag, place, kept, places, found, geo, like):
        return (total_at(place, kept, 0, places, found, geo, like),)

    def two(tag, place, kept, places, found, geo, like):
        return (
            total_at(place, kept, 0, places, found, geo, like),
            total_at(place, kept, 1, places, found, geo, like),
        )

    def three(tag, place, kept, places, found, geo, like):
        return (
            total_at(place, kept, 0, places, found, geo, like),
            total_at(place, kept, 1, places, found, geo, like),
            total_at(place, kept, 2, places, found, geo, like),
        )

    def four(tag, place, kept, places, found, geo, like):
        return (
            total_at(place, kept, 0, places, found, geo, like),
            total_at(place, kept, 1, places, found, geo, like),
            total_at(place, kept, 2, places, found, geo, like),
            total_at(place, kept, 3, places, found, geo, like),
        )

    return (one, two, three, four)[sums_of(tag) - 1]


def total_at(place: Any, kept: Any, term: Any, places: Any, found: Any, geo: Any, like: Any) -> Any:
    """The sums of one term."""


@inlined(total_at)
def _total_at(place, kept, term, places, found, geo, like):
    def plainly(place, kept, term, places, found, geo, like):
        offset, taps, step, stride = taps_at(place, geo)
        begin, total = term * kept.numbers.size * kept.line + offset, like
        for k in range(found):
            total = add_run(total, kept.lifted, begin + places[k], taps, step, stride)
        return total

    def in_pieces(place, kept, term, places, found, geo, like):
        offset, taps, step, stride = taps_at(place, geo)
        begin, total = term * kept.numbers.size * kept.line + offset, like
        for k in range(found):
            for j in range(0, taps, CHAIN):
                at, count = begin + places[k] + j * step, min(CHAIN, taps - j)
                total += add_run(like, kept.lifted, at, count, step, stride)
        return total

    return in_pieces if is_long(place) else plainly


def taps_at(place: Any, geo: Any) -> Any:
    """Where the windows at a place begin in each row, how many taps they have there, how far apart
    those are, and how far apart the windows are."""


@inlined(taps_at)
def _taps_at(place, geo):
    if place.instance_class is Outputs:
        return lambda place, geo: (
            place.o * geo[3, STRIDE],
            geo[3, KERNEL],
            geo[3, DILATION],
            geo[3, STRIDE],
        )

    def of_channels(place, geo):
        first, end, start, step, c, _, inner, _ = place
        return (start + first * step) * inner + c, end - first, step * inner, 1

    return of_channels


@njit(**INNER)
def add_run(total, lifted, at, taps, step, stride):
    """The total with some taps of one row added."""
    for j in range(taps):
        total += strided(lifted, at + j * step, stride, total)
    return total


@njit(**SELDOM)
def solve_apart(place, tag, x, lines, state, geo, p, pads):
    """The values of windows with anchors of their own."""
    return solve(place, tag, x, None, lines, state, geo, p, pads, 0, 0.0, False)


@njit(**INNER)
def solve_shared(place, count, tag, x, lines, state, geo, p, kept, places, n, pads):
    """As `direct.solve`."""
    a = neutral(tag, p)
    s = sums_at(tag, place, kept, places, lines[2], geo, splat(x, 0))
    v, found = finish(tag, s, n, a, p), (a, s, n)
    usual = (s[0] >= splat_as(n, LEAST)) & (s[0] <= splat_as(n, MOST))
    if any_lane(~usual & (lane_numbers(n) < count)):
        own = solve_apart(place, tag, x, lines, state, geo, p, pads)
        return with_window(~usual, own, (v, found))
    return v, found


def walk(
    way: Any, tag: Any, x: Any, p: Any, y: Any, state: Any, at: Any, lines: Any, geo: Any,
    tab: Any, inner: Any, kept: Any, places: Any, counts: Any, lead: Any, ahead: Any, ask: Any,
) -> None:  # fmt: skip
    """One row of outputs, which begins at y[at]. A window has as many elements as `counts` tells
    along the last axis, times `lead`."""


@inlined(walk)
def _walk(way, tag, x, p, y, state, at, lines, geo, tab, inner, kept, places, counts, lead, ahead,
          ask):  # fmt: skip
    return row_of_channels if way.instance_class is ByChannel else row_of_outputs


def row_of_outputs(way, tag, x, p, y, state, at, lines, geo, tab, inner, kept, places, counts, lead,
                   ahead, ask):  # fmt: skip
    """Lanes are windows side by side."""
    for o in range(0, geo[3, OUT], width(x)):
        ahead = request(x, ahead, ask)
        count = min(width(x), geo[3, OUT] - o)
        n = load_as(counts, o, p) * lead
        place = Outputs(o, count, way.chain)
        v, found = solve_shared(place, count, tag, x, lines, state, geo, p, kept, places, n, counts)
        write(y, state, at + o, v, found, count, counts, o, lead, tag, False)


def row_of_channels(way, tag, x, p, y, state, at, lines, geo, tab, inner, kept, places, counts,
                    lead, ahead, ask):  # fmt: skip
    """Lanes are channels."""
    o = np.int64(0)
    while o < geo[3, OUT]:
        first, end, start = taps_of(geo, tab, 3, o)
        whole = alike_from(geo, o)
        run = whole * inner
        n = splat_as(p, counts[o]) * lead
        for c in range(0, run, width(x)):
            ahead = request(x, ahead, ask)
            count = min(width(x), run - c)
            place = Inner(first, end, start, geo[3, DILATION], c, count, inner, way.chain)
            v, found = solve_shared(place, count, tag, x, lines, state, geo, p, kept, places, n,
                                    counts)  # fmt: skip
            i = o * inner + c
            write(y, state, at + i, v, found, count, counts, i, lead, tag, False)
        o += whole


@njit(**INNER)
def margins(geo, inner):
    """The elements of padding before and behind a row, where lanes are windows side by side."""
    if inner > 1:
        return np.int64(0), np.int64(0)
    last = (geo[3, OUT] - 1) * geo[3, STRIDE] + (geo[3, KERNEL] - 1) * geo[3, DILATION]
    return geo[3, BEFORE], max(0, last + 1 - geo[3, BEFORE] - geo[3, SIZE])


@njit(**JIT)
def shared(begin, end, way, tag, x, params, y, state, geo, tab, inner, slots):
    """Output rows `begin .. end - 1`.

    Args:
        params: one number.
        state: as that of `direct.direct`.
        slots: how many rows of lifted elements are kept, a power of two.
    """
    geo, tab = constants(geo), constants(tab)
    lanes, size, row_size = width(x), geo[3, SIZE] * inner, geo[3, OUT] * inner
    most = most_rows(geo)
    rows, codes, o = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(3, np.int64)
    places = np.empty(most, np.int64)
    before, behind = margins(geo, inner)
    line = before + -(-size // lanes) * lanes + behind
    beyond = lanes * (1 + geo[3, STRIDE])  # what idle lanes read
    lifted = empty_buffer(x, num_sums(tag) * slots * line + beyond)
    lifted[:] = 0
    kept = Kept(lifted, line, before, np.full(slots, -1, np.int64))
    counts = empty_buffer(x, geo[3, OUT] + lanes)
    count_row(counts, geo, tab, 1, VALID, 0.0)
    number = counts.dtype.type
    p = splat(x, params[0])
    share, ask = share_of(x, y.size // row_size, -(-row_size // lanes))
    plane = split(begin, geo, OUT, o)
    for unit in range(begin, end):
        found = window_rows(geo, tab, o, plane, size, rows, codes)
        lines = rows, codes, found
        lead = number(lead_count(geo, tab, VALID, o))
        ahead = np.int64(unit * share) + lines_ahead(x)
        lift_rows(tag, x, rows, found, size, kept, places, p)
        walk(way, tag, x, p, y, state, unit * row_size, lines, geo, tab, inner, kept, places,
             counts, lead, ahead, ask)  # fmt: skip
        plane = advance(geo, OUT, o, plane)
