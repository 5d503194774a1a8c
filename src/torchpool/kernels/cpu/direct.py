"""Any reduction, window by window: what becomes of the elements that a window sees, and how it is
written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from torchpool.kernels.cpu import formulas
from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.formulas import finish, least
from torchpool.kernels.cpu.lines import (
    STREAM,
    advance,
    count_row,
    is_idle,
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
from torchpool.kernels.cpu.plan import (
    BEFORE,
    DILATION,
    HI,
    KERNEL,
    LO,
    OUT,
    PADDED,
    SIZE,
    START,
    STEPS,
    STRIDE,
    TAPS,
    VALID,
)
from torchpool.kernels.cpu.scalars import Total, empty_buffer, identity, merge, over
from torchpool.kernels.cpu.simd import (
    any_lane,
    choose,
    codes_as,
    computed,
    converted,
    highs,
    is_float,
    lane_numbers,
    load,
    load_as,
    lows,
    splat,
    splat_as,
    store,
    store_first,
    width,
    with_lane,
)
from torchpool.kernels.cpu.taking import ANCHOR, CENTRE, LIFT, QUICK, VALUE, WINNER, across, begin
from torchpool.kernels.cpu.visits import (
    Inner,
    Listed,
    Outputs,
    Tabled,
    Whole,
    merge_long_window,
    merge_window,
    visit,
)


def first_code(place: Any, like: Any, codes: Any, state: Any, geo: Any) -> Any:
    """The offset of the first valid element of each window; None where offsets are not kept."""


@inlined(first_code)
def _first_code(place, like, codes, state, geo):
    if state == types.none:
        return lambda place, like, codes, state, geo: None
    if place.instance_class is not Outputs:
        return lambda place, like, codes, state, geo: codes_as(like, state, codes[0] + place[0])

    def of_outputs(place, like, codes, state, geo):
        first = codes_as(like, state, codes[0])
        o = place[0]
        if o * geo[3, STRIDE] < geo[3, BEFORE]:
            step = geo[3, STRIDE]
            for i in range(min(place[1], -(-(geo[3, BEFORE] - o * step) // step))):
                missing = geo[3, BEFORE] - (o + i) * step
                tap = (missing + geo[3, DILATION] - 1) // geo[3, DILATION]
                first = with_lane(first, i, codes[0] + tap)
        return first

    return of_outputs


def divisors(place: Any, like: Any, pads: Any, o: Any) -> Any:
    """Padding that the windows at a place count, one number for each."""


@inlined(divisors)
def _divisors(place, like, pads, o):
    if place.instance_class in (Outputs, Listed, Tabled):
        return lambda place, like, pads, o: load_as(pads, o, like)
    return lambda place, like, pads, o: splat_as(like, pads[o])


def solve(
    place: Any, tag: Any, x: Any, weights: Any, lines: Any, state: Any, geo: Any, p: Any,
    pads: Any, o: Any, fixed: Any, is_mean: Any,
) -> Any:  # fmt: skip
    """The values of the windows at a place, and what is kept for the backward pass: offsets, or
    the anchor, the sums and n."""


@inlined(solve)
def _solve(place, tag, x, weights, lines, state, geo, p, pads, o, fixed, is_mean):
    if formulas.is_tag(tag):
        return _solve_formulas
    if state == types.none:
        return _solve_value
    return _solve_winner


def _solve_value(place, tag, x, weights, lines, state, geo, p, pads, o, fixed, is_mean):
    like = splat(x, 0)
    held = begin(VALUE, tag, like, None)
    return visit(place, VALUE, tag, held, x, weights, lines, geo, None, None)[0], None


def _solve_winner(place, tag, x, weights, lines, state, geo, p, pads, o, fixed, is_mean):
    first = first_code(place, splat(x, 0), lines[1], state, geo)
    return winner(place, tag, x, weights, lines, geo, first)


def winner(place: Any, tag: Any, x: Any, weights: Any, lines: Any, geo: Any, first: Any) -> Any:
    """The winners of the windows at a place and their offsets: `first` where there is none."""


@inlined(winner)
def _winner(place, tag, x, weights, lines, geo, first):
    if place.instance_class is Whole or weights != types.none or not is_float(computed(x.dtype)):
        return _any_winner
    return _quick_winner


def _any_winner(place, tag, x, weights, lines, geo, first):
    like = splat(x, 0)
    held = begin(WINNER, tag, like, first)
    held = visit(place, WINNER, tag, held, x, weights, lines, geo, None, None)
    if weights is not None:
        return choose(held[2], held[0], like), held[1]
    return held[0], held[1]


_winner_of_nan = njit(_any_winner, **SELDOM)


def _quick_winner(place, tag, x, weights, lines, geo, first):
    like, numbers = splat(x, 0), lane_numbers(splat(x, 0))
    held = begin(QUICK, tag, like, converted(first, numbers))
    held = visit(place, QUICK, tag, held, x, weights, lines, geo, None, None)
    if any_lane(held[2] != held[2]):
        return _winner_of_nan(place, tag, x, weights, lines, geo, first)
    return held[0], converted(held[1], first)


def anchored(
    place: Any, tag: Any, x: Any, weights: Any, lines: Any, geo: Any, like: Any, p: Any
) -> Any:
    """The anchors of the windows at a place; zeros of formulas without one."""


@inlined(anchored)
def _anchored(place, tag, x, weights, lines, geo, like, p):
    kind = formulas.anchor_of(tag)
    if kind is None:
        return lambda place, tag, x, weights, lines, geo, like, p: like
    if kind == "max":
        return lambda place, tag, x, weights, lines, geo, like, p: visit(
            place, ANCHOR, tag, begin(ANCHOR, tag, like, None), x, weights, lines, geo, None, p
        )[0]

    def mean(place, tag, x, weights, lines, geo, like, p):
        total, n = visit(
            place, CENTRE, tag, begin(CENTRE, tag, like, None), x, weights, lines, geo, None, p
        )
        return choose(n != 0, total / n, total)

    return mean


def _solve_formulas(place, tag, x, weights, lines, state, geo, p, pads, o, fixed, is_mean):
    like = splat(x, 0)
    a = anchored(place, tag, x, weights, lines, geo, like, p)
    s, n = visit(place, LIFT, tag, begin(LIFT, tag, like, None), x, weights, lines, geo, a, p)
    is_empty = n <= least(tag, p)
    count = n
    if is_mean:
        count = splat_as(n, fixed) if fixed != 0 else n + divisors(place, like, pads, o)
    value = choose(is_empty, like, finish(tag, s, count, a, p))
    return value, (a, s, choose(is_empty, splat_as(n, -np.inf), count))


# Writing ------------------------------------------------------------------------------------


def keep_state(state: Any, at: Any, kept: Any, count: Any, size: Any) -> None:
    """Writes what `solve` keeps; `size` is the number of outputs."""


@inlined(keep_state)
def _keep_state(state, at, kept, count, size):
    if kept == types.none:
        return lambda state, at, kept, count, size: None
    if not isinstance(kept, types.BaseTuple):
        return lambda state, at, kept, count, size: store_first(state, at, kept, count)

    def one(state, at, kept, count, size):
        if state.size:
            store_first(state, at, kept[0], count)
            store_first(state, at + size, kept[1][0], count)
            store_first(state, at + 2 * size, kept[2], count)

    def two(state, at, kept, count, size):
        if state.size:
            store_first(state, at, kept[0], count)
            store_first(state, at + size, kept[1][0], count)
            store_first(state, at + 2 * size, kept[1][1], count)
            store_first(state, at + 3 * size, kept[2], count)

    def three(state, at, kept, count, size):
        if state.size:
            store_first(state, at, kept[0], count)
            store_first(state, at + size, kept[1][0], count)
            store_first(state, at + 2 * size, kept[1][1], count)
            store_first(state, at + 3 * size, kept[1][2], count)
            store_first(state, at + 4 * size, kept[2], count)

    def four(state, at, kept, count, size):
        if state.size:
            store_first(state, at, kept[0], count)
            store_first(state, at + size, kept[1][0], count)
            store_first(state, at + 2 * size, kept[1][1], count)
            store_first(state, at + 3 * size, kept[1][2], count)
            store_first(state, at + 4 * size, kept[1][3], count)
            store_first(state, at + 5 * size, kept[2], count)

    return (one, two, three, four)[len(kept[1]) - 1]


def scaled(value: Any, counts: Any, at: Any, scale: Any, tag: Any, is_mean: Any) -> Any:
    """A total divided by its count; any other value as it is."""


@inlined(scaled)
def _scaled(value, counts, at, scale, tag, is_mean):
    if tag.instance_class is not Total:
        return lambda value, counts, at, scale, tag, is_mean: value
    return lambda value, counts, at, scale, tag, is_mean: (
        over(value, counts, at, scale) if is_mean else value
    )


def parameter(params: Any, row: Any, c: Any, like: Any) -> Any:
    """The parameter of the lanes from position `c` of a row on; None without one."""


@inlined(parameter)
def _parameter(params, row, c, like):
    if params == types.none:
        return lambda params, row, c, like: None
    return lambda params, row, c, like: load_as(row, c, like)


@njit(**INNER)
def fill_parameters(row, params, plane, inner, planes_each, channels):
    """The parameter of each position of a row of `inner` elements; `planes_each` planes lie beside
    each other in a channel, 0 if channels are the fastest axis."""
    for c in range(row.size):
        channel = plane // planes_each % channels if planes_each else c % inner % channels
        row[c] = params[channel if params.size > 1 else 0]


@njit(**INNER)
def fill_pads(pads, geo, tab, o, include_pad):
    """Padding that the windows of a row of outputs count."""
    pads[:] = 0
    if include_pad:
        padded, valid = lead_count(geo, tab, PADDED, o), np.int64(1)
        for k in range(3):
            valid *= 1 if is_idle(geo, k) else tab[geo[k, VALID] + o[k]]
        for i in range(geo[3, OUT]):
            last, inside = np.int64(1), np.int64(1)
            if not is_idle(geo, 3):
                last, inside = tab[geo[3, PADDED] + i], tab[geo[3, VALID] + i]
            pads[i] = padded * last - valid * inside
    return


# Kernels: what the lanes are decides how a row of outputs is walked ------------------------


@njit(**INNER)
def write(y, state, at, v, kept, count, counts, o, scale, tag, is_mean):
    store_first(y, at, scaled(v, counts, o, scale, tag, is_mean), count)
    keep_state(state, at, kept, count, y.size)


def side_by_side(way: Any, o: Any, count: Any, geo: Any, tab: Any) -> Any:
    """The place of `count` windows from window `o` on."""


@inlined(side_by_side)
def _side_by_side(way, o, count, geo, tab):
    if way.instance_class is ByOutput:
        return lambda way, o, count, geo, tab: Outputs(o, count, way.chain)
    return lambda way, o, count, geo, tab: Listed(
        0, o, count, geo[3, START], geo[3, TAPS], geo[3, STEPS], tab
    )


def row_of_outputs(way, tag, x, weights, params, row, y, state, at, lines, geo, tab, inner, means,
                   ahead, ask):  # fmt: skip
    """Lanes are windows side by side."""
    like = splat(x, 0)
    pads, counts, scale, fixed, is_mean = means
    p = parameter(params, row, 0, like)
    for o in range(0, geo[3, OUT], width(like)):
        ahead = request(x, ahead, ask)
        count = min(width(like), geo[3, OUT] - o)
        place = side_by_side(way, o, count, geo, tab)
        v, kept = solve(place, tag, x, weights, lines, state, geo, p, pads, o, fixed, is_mean)
        write(y, state, at + o, v, kept, count, counts, o, scale, tag, is_mean)


@njit(**INNER)
def alike_from(geo, o):
    """How many windows from `o` on lie inside the input and side by side at stride 1, so that their
    channels make one run; else 1."""
    if geo[3, STRIDE] == 1 and geo[3, LO] <= o < geo[3, HI]:
        return geo[3, HI] - o
    return np.int64(1)


def row_of_channels(way, tag, x, weights, params, row, y, state, at, lines, geo, tab, inner, means,
                    ahead, ask):  # fmt: skip
    """Lanes are channels."""
    like = splat(x, 0)
    pads, counts, scale, fixed, is_mean = means
    o = np.int64(0)
    while o < geo[3, OUT]:
        first, end, start = taps_of(geo, tab, 3, o)
        whole = alike_from(geo, o)
        run = whole * inner
        for c in range(0, run, width(like)):
            ahead = request(x, ahead, ask)
            count = min(width(like), run - c)
            place = Inner(first, end, start, geo[3, DILATION], c, count, inner, way.chain)
            p = parameter(params, row, c, like)
            v, kept = solve(place, tag, x, weights, lines, state, geo, p, pads, o, fixed, is_mean)
            i = o * inner + c
            write(y, state, at + i, v, kept, count, counts, i, scale, tag, is_mean)
        o += whole


def row_of_windows(way, tag, x, weights, params, row, y, state, at, lines, geo, tab, inner, means,
                   ahead, ask):  # fmt: skip
    """Lanes are elements of one window; as many windows as there are lanes are written at once."""
    like = splat(x, 0)
    lanes = lane_numbers(like)
    pads, counts, scale, fixed, is_mean = means
    p = parameter(params, row, 0, like)
    ask = ask if ask <= STREAM else 0
    for o in range(0, geo[3, OUT], width(like)):
        ahead = request(x, ahead, ask)
        count = min(width(like), geo[3, OUT] - o)
        v, kept = like, nothing_kept(tag, like, state)
        for i in range(count):
            first, end, start = taps_of(geo, tab, 3, o + i)
            place = Whole(first, end, start, way.chain)
            found = solve(place, tag, x, weights, lines, state, geo, p, pads, o + i, fixed, is_mean)
            v, kept = with_window(lanes == i, found, (v, kept))
        write(y, state, at + o, v, kept, count, counts, o, scale, tag, is_mean)


@njit(**INNER)
def merge_windows(tag, x, rows, found, kernel, start, stride, b):
    """As many windows as a vector has lanes, a lane each: halves of vectors are merged until one
    lane is left of each window. `b` is room for as many vectors."""
    lanes = width(x)
    half = lanes // 2
    none = splat(x, identity(tag, x))
    for i in range(lanes):  # in the order of memory
        window = (0, kernel, start + i * stride)
        store(b, i * lanes, merge_window(tag, none, x, rows, found, window))
    for i in range(half):
        v, w = load(b, i * lanes), load(b, (i + half) * lanes)
        if lanes == 16:
            v = merge(tag, lows(v, w, 8), highs(v, w, 8))
        else:
            v = merge(tag, lows(v, w, 4), highs(v, w, 4))
        store(b, i * lanes, v)
    if lanes == 16:
        for i in range(4):
            v, w = load(b, i * lanes), load(b, (i + 4) * lanes)
            store(b, i * lanes, merge(tag, lows(v, w, 4), highs(v, w, 4)))
    for i in range(2):
        v, w = load(b, i * lanes), load(b, (i + 2) * lanes)
        store(b, i * lanes, merge(tag, lows(v, w, 2), highs(v, w, 2)))
    v, w = load(b, 0), load(b, lanes)
    return merge(tag, lows(v, w, 1), highs(v, w, 1))


def row_of_values(way, tag, x, weights, params, row, y, state, at, lines, geo, tab, inner, means,
                  ahead, ask):  # fmt: skip
    """`row_of_windows` of values alone; `row` is room for as many vectors as they have lanes."""
    rows, _, found = lines
    _, counts, scale, _, is_mean = means
    kernel, stride, outs = geo[3, KERNEL], geo[3, STRIDE], geo[3, OUT]
    none = splat(x, identity(tag, x))
    lanes = width(x)
    ask = ask if ask <= STREAM else 0
    for o in range(0, outs, lanes):
        count = min(lanes, outs - o)
        ahead = request(x, ahead, ask)
        if lanes <= 16 and kernel <= SHORT * lanes and geo[3, LO] <= o and o + lanes <= geo[3, HI]:
            start = o * stride - geo[3, BEFORE]
            v = merge_windows(tag, x, rows, found, kernel, start, stride, row)
        else:
            v = none
            for i in range(count):
                window = taps_of(geo, tab, 3, o + i)
                one = merge_long_window(tag, x, rows, found, window)
                v = choose(lane_numbers(v) == i, across(VALUE, tag, (one,))[0], v)
        store_first(y, at + o, scaled(v, counts, o, scale, tag, is_mean), count)


SHORT = 16
"""Vectors of a window up to which it takes as long to bring their lanes together."""


def nothing_kept(tag: Any, like: Any, state: Any) -> Any:
    """Room in vectors for what `solve` keeps of as many windows as there are lanes."""


@inlined(nothing_kept)
def _nothing_kept(tag, like, state):
    if formulas.is_tag(tag):
        return lambda tag, like, state: (like, formulas.zeros(tag, like), like)
    if state == types.none:
        return lambda tag, like, state: None
    return lambda tag, like, state: codes_as(like, state, 0)


def with_window(lane: Any, found: Any, held: Any) -> Any:
    """What is held of several windows, a lane each, with what was found of one in its lane."""


@inlined(with_window)
def _with_window(lane, found, held):
    if held == types.none:
        return lambda lane, found, held: None
    if not isinstance(held, types.BaseTuple):
        return lambda lane, found, held: choose(lane, found, held)

    def one(lane, found, held):
        return (with_window(lane, found[0], held[0]),)

    def two(lane, found, held):
        return with_window(lane, found[0], held[0]), with_window(lane, found[1], held[1])

    def three(lane, found, held):
        return (
            with_window(lane, found[0], held[0]),
            with_window(lane, found[1], held[1]),
            with_window(lane, found[2], held[2]),
        )

    def four(lane, found, held):
        return (
            with_window(lane, found[0], held[0]),
            with_window(lane, found[1], held[1]),
            with_window(lane, found[2], held[2]),
            with_window(lane, found[3], held[3]),
        )

    return (one, two, three, four)[len(held) - 1]


class ByOutput(NamedTuple):
    """Way: lanes are windows side by side. For `chain` see their places."""

    chain: Any = None


class ByChannel(NamedTuple):
    """Way: lanes are channels."""

    chain: Any = None


class ByWindow(NamedTuple):
    """Way: lanes are elements of one window."""

    chain: Any = None


class ByList(NamedTuple):
    """Way: lanes are windows side by side, listed tap by tap."""

    unit: int = 0


def walk(
    way: Any, tag: Any, x: Any, weights: Any, params: Any, row: Any, y: Any, state: Any, at: Any,
    lines: Any, geo: Any, tab: Any, inner: Any, means: Any, ahead: Any, ask: Any,
) -> None:  # fmt: skip
    """One row of outputs, which begins at y[at], in one of these ways."""


@inlined(walk)
def _walk(way, tag, x, weights, params, row, y, state, at, lines, geo, tab, inner, means, ahead,
          ask):  # fmt: skip
    if way.instance_class in (ByOutput, ByList):
        return row_of_outputs
    if way.instance_class is ByChannel:
        return row_of_channels
    keeps_value = weights == state == types.none and not formulas.is_tag(tag)
    return row_of_values if keeps_value else row_of_windows


@njit(**JIT)
def direct(begin, end, way, tag, x, weights, params, y, state, geo, tab, inner, channels,
           planes_each, column, fixed):  # fmt: skip
    """Output rows `begin .. end - 1`.

    Args:
        weights: of the elements, or for selections the mask, in the order of x; None for none.
        params: one number, or one per channel; None for none.
        state: room for what the backward pass needs: offsets, or the anchor, the sums and n one
            after another; of size 0 or None for nothing.
        column: the count table that a mean divides by, -1 for none.
        fixed: what it divides by instead, 0 for the counts.
    """
    geo, tab = constants(geo), constants(tab)
    size, row_size = geo[3, SIZE] * inner, geo[3, OUT] * inner
    most = most_rows(geo)
    rows, codes, o = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(3, np.int64)
    lanes = width(x)
    number = empty_buffer(x, 0).dtype.type
    row = empty_buffer(x, lanes * lanes if params is None else row_size + lanes)
    pads = empty_buffer(x, geo[3, OUT] + lanes)
    counts = empty_buffer(x, row_size + lanes)
    is_mean = column >= 0
    if is_mean:
        count_row(counts, geo, tab, inner, column, fixed)
    steps = geo[3, OUT] * (-(-inner // lanes)) if inner > 1 else -(-geo[3, OUT] // lanes)
    share, ask = share_of(x, y.size // row_size, steps)
    plane = split(begin, geo, OUT, o)
    last = np.int64(-1)
    for unit in range(begin, end):
        if params is not None and plane != last:
            fill_parameters(row, params, plane, inner, planes_each, channels)
            last = plane
        found = window_rows(geo, tab, o, plane, size, rows, codes)
        scale = number(lead_count(geo, tab, column, o) if is_mean and fixed == 0 else 1)
        if is_mean:
            fill_pads(pads, geo, tab, o, column == PADDED)
        ahead = np.int64(unit * share) + lines_ahead(x)
        means = pads, counts, scale, number(fixed), is_mean
        walk(way, tag, x, weights, params, row, y, state, unit * row_size, (rows, codes, found),
             geo, tab, inner, means, ahead, ask)  # fmt: skip
        plane = advance(geo, OUT, o, plane)
