"""Any reduction, window by window: what becomes of the elements that a window sees.

A vector holds one element of each of several windows (outputs side by side, or channels), or
several elements of one window where that is long or its neighbours are irregular. Every kernel
*visits* the taps of its windows and lets an accumulator *take* them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from torchpool.kernels.cpu import formulas
from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.formulas import (
    finish,
    finish_grad,
    least,
    num_sums,
)
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
from torchpool.kernels.cpu.parts import APART, INNER, JIT, SELDOM, inlined
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
from torchpool.kernels.cpu.scalars import (
    Total,
    element,
    empty_buffer,
    identity,
    merge,
    merge3,
    over,
)
from torchpool.kernels.cpu.simd import (
    any_lane,
    can_pick,
    choose,
    codes_as,
    computed,
    converted,
    evens,
    gather,
    half_of,
    highs,
    is_float,
    joined,
    lane,
    lane_numbers,
    later_min,
    load,
    load_as,
    load_first,
    lows,
    odds,
    picked,
    splat,
    splat_as,
    store,
    store_first,
    thirds,
    turned,
    width,
    with_lane,
)
from torchpool.kernels.cpu.taking import (
    ANCHOR,
    CENTRE,
    LIFT,
    QUICK,
    SLOPE,
    VALUE,
    WINNER,
    Quick,
    across,
    begin,
    take,
    total_of,
)

# Reading taps -----------------------------------------------------------------------


def weights_at(weights: Any, at: Any, stride: Any, like: Any) -> Any:
    """The weights of the elements that `strided` reads; None where there are none."""


@inlined(weights_at)
def _weights_at(weights, at, stride, like):
    if weights == types.none:
        return lambda weights, at, stride, like: None
    return lambda weights, at, stride, like: strided(weights, at, stride, like)


def weights_in(weights: Any, base: Any, places: Any, live: Any) -> Any:
    """The same for elements that `gather` reads."""


@inlined(weights_in)
def _weights_in(weights, base, places, live):
    if weights == types.none:
        return lambda weights, base, places, live: None
    return lambda weights, base, places, live: gather(weights, base, places, live)


@njit(**INNER)
def strided(x, at, stride, like):
    """As many elements as `like` has lanes, `stride` apart; reads up to `stride * lanes`."""
    if stride == 1:
        return load_as(x, at, like)
    a, b = load_as(x, at, like), load_as(x, at + width(like), like)
    if stride == 2:
        return evens(a, b)
    if stride <= 4:
        c = load_as(x, at + 2 * width(like), like)
        if stride == 3:
            return thirds(a, b, c)
        return evens(evens(a, b), evens(c, load_as(x, at + 3 * width(like), like)))
    lanes = lane_numbers(like)
    return gather(x, at, lanes * stride, lanes >= 0)


@njit(**INNER)
def fits(x, at, count):
    return at >= 0 and at + count <= x.size


@njit(**APART)
def take_edge(goal, tag, held, x, weights, base, places, live, code, a, p):
    """`take` where only some lanes have the element."""
    t = gather(x, base, places, live)
    return take(goal, tag, held, t, weights_in(weights, base, places, live), live, code, a, p)


def visit_outputs(place, goal, tag, held, x, weights, lines, geo, a, p):
    """All taps of windows side by side along the last axis."""
    o, count = place
    rows, codes, found = lines
    stride, step, size = geo[3, STRIDE], geo[3, DILATION], geo[3, SIZE]
    like = splat(x, 0)
    lanes = width(like)
    for k in range(found):
        for j in range(geo[3, KERNEL]):
            place = o * stride - geo[3, BEFORE] + j * step
            at = rows[k] + place
            whole = place >= 0 and place + (count - 1) * stride < size
            if whole and at + stride * lanes <= x.size:
                t = strided(x, at, stride, like)
                w = weights_at(weights, at, stride, like)
                held = take(goal, tag, held, t, w, None, codes[k] + j, a, p)
            else:
                numbers = lane_numbers(like)
                places = numbers * stride + place
                live = (places >= 0) & (places < size) & (numbers < count)
                if stride <= 2 and fits(x, at, stride * lanes):
                    t = strided(x, at, stride, like)
                    w = weights_at(weights, at, stride, like)
                    held = take(goal, tag, held, t, w, live, codes[k] + j, a, p)
                else:
                    held = take_edge(
                        goal, tag, held, x, weights, rows[k], places, live, codes[k] + j, a, p
                    )
    return held


_visit_any_outputs = njit(visit_outputs, **INNER)


def visit_few_outputs(place, goal, tag, held, x, weights, lines, geo, a, p):
    """The same without a question per tap, where there are up to three in a row, at stride 1 or
    2."""
    o, count = place
    rows, codes, found = lines
    kernel, stride, size = geo[3, KERNEL], geo[3, STRIDE], geo[3, SIZE]
    begin = o * stride - geo[3, BEFORE]
    is_few = kernel <= 3 and stride <= 2 and geo[3, DILATION] == 1 and found > 0
    if not (
        is_few and rows[0] + begin >= 0 and rows[found - 1] + begin + 2 * width(x) + 2 <= x.size
    ):
        return _visit_any_outputs(place, goal, tag, held, x, weights, lines, geo, a, p)
    if begin >= 0 and begin + (count - 1) * stride + kernel <= size:
        for k in range(found):
            held = take_row(goal, tag, held, x, rows[k] + begin, codes[k], kernel, stride, None)
        return held
    places = lane_numbers(splat(x, 0)) * stride + begin
    live = (
        (places >= 0) & (places < size),
        (places >= -1) & (places < size - 1),
        (places >= -2) & (places < size - 2),
    )
    for k in range(found):
        held = take_row(goal, tag, held, x, rows[k] + begin, codes[k], kernel, stride, live)
    return held


def part(live: Any, j: Any) -> Any:
    """Entry `j` of a tuple; None of None."""


@inlined(part)
def _part(live, j):
    return (lambda live, j: None) if live == types.none else (lambda live, j: live[j])


@njit(**INNER)
def take_row(goal, tag, held, x, at, code, kernel, stride, live):
    """The accumulator after up to three taps side by side, the first at `at`; `live` has a mask for
    each, None for all lanes."""
    first, second, third = load(x, at), load(x, at + 1), load(x, at + 2)
    if stride == 2:
        more = load(x, at + width(x))
        first, second = evens(first, more), odds(first, more)
        third = evens(third, load(x, at + 2 + width(x)))
    held = take(goal, tag, held, first, None, part(live, 0), code, None, None)
    if kernel > 1:
        held = take(goal, tag, held, second, None, part(live, 1), code + 1, None, None)
    if kernel > 2:
        held = take(goal, tag, held, third, None, part(live, 2), code + 2, None, None)
    return held


def visit_inner(place, goal, tag, held, x, weights, lines, geo, a, p):
    """All taps of one window in some channels."""
    first, end, start, step, c, count, inner = place
    rows, codes, found = lines
    like = splat(x, 0)
    for k in range(found):
        for j in range(first, end):
            at = rows[k] + (start + j * step) * inner + c
            if at + width(like) <= x.size:
                t, w = load_as(x, at, like), weights_at(weights, at, 1, like)
                held = take(goal, tag, held, t, w, None, codes[k] + j, a, p)
            else:
                numbers = lane_numbers(like)
                live = numbers < count
                held = take_edge(goal, tag, held, x, weights, at, numbers, live, codes[k] + j, a, p)
    return held


@njit(**INNER)
def lowest(v):
    """The smallest lane, in all lanes."""
    if width(v) > 32:
        v = later_min(v, turned(v, 32))
    if width(v) > 16:
        v = later_min(v, turned(v, 16))
    if width(v) > 8:
        v = later_min(v, turned(v, 8))
    v = later_min(v, turned(v, 4))
    v = later_min(v, turned(v, 2))
    return later_min(v, turned(v, 1))


def picks(x: Any) -> bool:
    """Whether elements that lie close together are picked out of vectors faster than gathered."""
    raise NotImplementedError


@inlined(picks)
def _picks(x):
    does = can_pick(computed(x.dtype))
    return lambda x: does


def pick(x: Any, at: Any, places: Any, blocks: Any) -> Any:
    """Elements at `at + places`, which lie in so many pairs of vectors from `at` on."""


@inlined(pick)
def _pick(x, at, places, blocks):
    if not can_pick(computed(x.dtype)):
        return lambda x, at, places, blocks: splat(x, 0)

    def from_vectors(x, at, places, blocks):
        lanes = width(x)
        t = picked(load(x, at), load(x, at + lanes), places)
        for k in range(1, blocks):
            begin = 2 * k * lanes
            more = picked(load(x, at + begin), load(x, at + begin + lanes), places)
            t = choose(places >= begin, more, t)
        return t

    return from_vectors


def visit_listed(place, goal, tag, held, x, weights, lines, geo, a, p):
    """All taps of windows that are listed."""
    _, o, _, start, taps, steps, tab = place
    rows, codes, _ = lines
    numbers = lane_numbers(splat(x, 0))
    places = converted(load_as(tab, start + o, numbers), numbers)
    has = converted(load_as(tab, taps + o, numbers), numbers)
    base = lane(lowest(places), 0)
    places -= base
    pair, blocks = 2 * width(x), np.int64(1)
    while any_lane(places >= blocks * pair):
        blocks += 1
    base += rows[0]
    is_near = weights is None and picks(x) and blocks <= NEAR
    for j in range(geo[3, KERNEL]):
        live = (has & (np.int32(1) << np.int32(j))) != 0
        at = base + tab[steps + j]
        if is_near and at + blocks * pair <= x.size:
            held = take(
                goal, tag, held, pick(x, at, places, blocks), None, live, codes[0] + j, a, p
            )
        else:
            held = take_edge(goal, tag, held, x, weights, at, places, live, codes[0] + j, a, p)
    return held


NEAR = 4
"""Pairs of vectors up to which their elements are picked rather than gathered."""


def visit_tabled(place, goal, tag, held, x, weights, lines, geo, a, p):
    """All taps of windows that a table gives: windows a constant apart that have every tap are
    read as vectors."""
    _, longest, step, places, counts = place
    rows = lines[0]
    like = splat(x, 0)
    numbers = lane_numbers(like)
    at, has = load_as(places, 0, numbers), load_as(counts, 0, numbers)
    first, stride = np.int64(places[0]), np.int64(places[1]) - places[0]
    reach = first + (longest - 1) * step + stride * width(like)
    is_even = 1 <= stride <= 4 and fits(x, rows[0], reach)
    is_even = is_even and not any_lane((at - numbers * stride != first) | (has != longest))
    for j in range(longest):
        base = rows[0] + j * step
        if is_even:
            t = strided(x, base + first, stride, like)
            w = weights_at(weights, base + first, stride, like)
            held = take(goal, tag, held, t, w, None, j, a, p)
        else:
            held = take_edge(goal, tag, held, x, weights, base, at, has > j, j, a, p)
    return held


def visit_window(place, goal, tag, held, x, weights, lines, geo, a, p):
    """All elements of one window, several of a row at a time."""
    first, end, start = place
    rows, codes, found = lines
    like = splat(x, 0)
    numbers = lane_numbers(like)
    for k in range(found):
        for j in range(first, end, width(like)):
            at = rows[k] + start + j
            if j + width(like) <= end:
                t, w = load_as(x, at, like), weights_at(weights, at, 1, like)
                held = take(goal, tag, held, t, w, None, numbers + (codes[k] + j), a, p)
            elif weights is None:
                t, live = load_first(x, at, end - j), numbers < end - j
                held = take(goal, tag, held, t, None, live, numbers + (codes[k] + j), a, p)
            else:
                live = numbers < end - j
                held = take_edge(
                    goal, tag, held, x, weights, at, numbers, live, numbers + (codes[k] + j), a, p
                )
    return across(goal, tag, held)


@njit(**INNER)
def merge_window(tag, v, x, rows, found, window):
    """All elements of one window, merged into the lanes of v: four vectors at a time, so that the
    next four need not wait for each of them."""
    first, end, start = window
    lanes = width(v)
    for k in range(found):
        at, stop = rows[k] + start + first, rows[k] + start + end
        while at + 4 * lanes <= stop:
            t = merge3(tag, load(x, at), load(x, at + lanes), load(x, at + 2 * lanes))
            v = merge3(tag, v, t, load(x, at + 3 * lanes))
            at += 4 * lanes
        while at + lanes <= stop:
            v = merge(tag, v, load(x, at))
            at += lanes
        if at < stop:
            live = lane_numbers(v) < stop - at
            v = choose(live, merge(tag, v, load_first(x, at, stop - at)), v)
    return v


def merge_long_window(tag: Any, x: Any, rows: Any, found: Any, window: Any) -> Any:
    """All elements of one long window, merged into the lanes of a vector."""


@inlined(merge_long_window)
def _merge_long_window(tag, x, rows, found, window):
    if isinstance(x.dtype, types.Record):  # of which a vector is half a line or less
        return lambda tag, x, rows, found, window: merge_window(
            tag, splat(x, identity(tag, x)), x, rows, found, window
        )
    return _merge_by_halves


def _merge_by_halves(tag, x, rows, found, window):
    """Half a cache line at a time: processors that compute in halves of a line fetch it sooner."""
    first, end, start = window
    v = splat(x, identity(tag, x))
    lanes, half = width(v), width(v) // 2
    a = b = half_of(v)
    for k in range(found):
        at, stop = rows[k] + start + first, rows[k] + start + end
        while at + 2 * lanes <= stop:
            a = merge3(tag, a, load_as(x, at, a), load_as(x, at + lanes, a))
            b = merge3(tag, b, load_as(x, at + half, b), load_as(x, at + lanes + half, b))
            at += 2 * lanes
        if at + lanes <= stop:
            a, b = merge(tag, a, load_as(x, at, a)), merge(tag, b, load_as(x, at + half, b))
            at += lanes
        if at < stop:
            live = lane_numbers(v) < stop - at
            v = choose(live, merge(tag, v, load_first(x, at, stop - at)), v)
    return merge(tag, v, joined(a, b))


# Places: which windows the lanes of a vector are ------------------------------------------


class Outputs(NamedTuple):
    """`number` windows side by side along the last axis, from window `o` on."""

    o: int
    number: int


class Inner(NamedTuple):
    """One window in the channels `c .. c + number - 1` of `inner`: its valid taps along the last
    axis, where tap 0 lies, and how far taps lie apart."""

    first: int
    end: int
    start: int
    step: int
    c: int
    number: int
    inner: int


class Listed(NamedTuple):
    """`number` windows from window `o` on that a table lists: tab holds the place of their first
    taps from `start` on, which taps they have from `taps` on, as bits, and how far from the first
    each tap lies from `steps` on."""

    first: int
    o: int
    number: int
    start: int
    taps: int
    steps: int
    tab: Any


class Tabled(NamedTuple):
    """Windows that a table gives, a lane each: `longest` taps at most, `step` apart; `places` of
    their first taps and `counts` of their taps, int32."""

    first: int
    longest: int
    step: int
    places: Any
    counts: Any


class Whole(NamedTuple):
    """One window of single elements, many of its elements at a time."""

    first: int
    end: int
    start: int


def visit(
    place: Any, goal: Any, tag: Any, held: Any, x: Any, weights: Any, lines: Any, geo: Any,
    a: Any, p: Any,
) -> Any:  # fmt: skip
    """Lets an accumulator take every tap of the windows at a place. `lines` are the input rows of
    the windows, the offsets of their first taps, and how many there are."""


@inlined(visit)
def _visit(place, goal, tag, held, x, weights, lines, geo, a, p):
    if place.instance_class is Outputs and goal.instance_class is Quick:
        return visit_few_outputs
    return {
        Outputs: visit_outputs,
        Inner: visit_inner,
        Listed: visit_listed,
        Tabled: visit_tabled,
        Whole: visit_window,
    }[place.instance_class]


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
        return lambda way, o, count, geo, tab: Outputs(o, count)
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
            place = Inner(first, end, start, geo[3, DILATION], c, count, inner)
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
            place = Whole(first, end, start)
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
    """Way: lanes are windows side by side."""

    unit: int = 0


class ByChannel(NamedTuple):
    """Way: lanes are channels."""

    unit: int = 0


class ByWindow(NamedTuple):
    """Way: lanes are elements of one window."""

    unit: int = 0


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


# The derivative by the parameter ----------------------------------------------------------


def kept_of(place: Any, array: Any, at: Any, count: Any, like: Any) -> Any:
    """Numbers of the windows at a place: one of each lane, or the same in all lanes."""


@inlined(kept_of)
def _kept_of(place, array, at, count, like):
    if place.instance_class is Whole:
        return lambda place, array, at, count, like: splat_as(like, element(array, at))
    return lambda place, array, at, count, like: load_first(array, at, count)


def kept_sums(tag: Any, place: Any, state: Any, at: Any, count: Any, size: Any, like: Any) -> Any:
    """The sums that the forward pass kept."""


@inlined(kept_sums)
def _kept_sums(tag, place, state, at, count, size, like):
    def one(tag, place, state, at, count, size, like):
        return (kept_of(place, state, at + size, count, like),)

    def two(tag, place, state, at, count, size, like):
        return (
            kept_of(place, state, at + size, count, like),
            kept_of(place, state, at + 2 * size, count, like),
        )

    def three(tag, place, state, at, count, size, like):
        return (
            kept_of(place, state, at + size, count, like),
            kept_of(place, state, at + 2 * size, count, like),
            kept_of(place, state, at + 3 * size, count, like),
        )

    def four(tag, place, state, at, count, size, like):
        return (
            kept_of(place, state, at + size, count, like),
            kept_of(place, state, at + 2 * size, count, like),
            kept_of(place, state, at + 3 * size, count, like),
            kept_of(place, state, at + 4 * size, count, like),
        )

    return (one, two, three, four)[formulas.sums_of(tag) - 1]


@njit(**INNER)
def slope(place, tag, g, x, weights, lines, state, at, count, size, geo, p):
    """The derivative by the parameter of each of the windows at a place, times the gradient."""
    like = splat(x, 0)
    a = kept_of(place, state, at, count, like)
    n = kept_of(place, state, (num_sums(tag) + 1) * size + at, count, like)
    v = kept_of(place, g, at, count, like)
    d, _, dp = finish_grad(tag, kept_sums(tag, place, state, at, count, size, like), n, a, p)
    held = begin(SLOPE, tag, like, None)
    sent = visit(place, SLOPE, tag, held, x, weights, lines, geo, (a, d), p)[0]
    return choose((n != splat_as(n, -np.inf)) & (lane_numbers(like) < count), v * (dp + sent), like)


def slopes(
    way: Any, tag: Any, g: Any, x: Any, weights: Any, row: Any, state: Any, by_p: Any, to: Any,
    at: Any, lines: Any, geo: Any, tab: Any, inner: Any,
) -> None:  # fmt: skip
    """Adds the derivatives of one row of outputs to by_p[at] and following."""


@inlined(slopes)
def _slopes(way, tag, g, x, weights, row, state, by_p, to, at, lines, geo, tab, inner):
    rows = {ByOutput: slopes_of_outputs, ByChannel: slopes_of_channels, ByWindow: slopes_of_windows}
    return rows[way.instance_class]


def slopes_of_outputs(way, tag, g, x, weights, row, state, by_p, to, at, lines, geo, tab, inner):
    like = splat(x, 0)
    p = load_as(row, 0, like)
    total = like
    for o in range(0, geo[3, OUT], width(like)):
        count = min(width(like), geo[3, OUT] - o)
        place = Outputs(o, count)
        total += slope(place, tag, g, x, weights, lines, state, at + o, count, g.size, geo, p)
    by_p[to] += lane(total_of(total), 0)


def slopes_of_channels(way, tag, g, x, weights, row, state, by_p, to, at, lines, geo, tab, inner):
    like = splat(x, 0)
    for o in range(geo[3, OUT]):
        first, end, start = taps_of(geo, tab, 3, o)
        for c in range(0, inner, width(like)):
            count = min(width(like), inner - c)
            place = Inner(first, end, start, geo[3, DILATION], c, count, inner)
            i = at + o * inner + c
            p = load_as(row, c, like)
            v = slope(place, tag, g, x, weights, lines, state, i, count, g.size, geo, p)
            for k in range(count):
                by_p[to + c + k] += lane(v, k)


def slopes_of_windows(way, tag, g, x, weights, row, state, by_p, to, at, lines, geo, tab, inner):
    like = splat(x, 0)
    p = load_as(row, 0, like)
    for o in range(geo[3, OUT]):
        first, end, start = taps_of(geo, tab, 3, o)
        place = Whole(first, end, start)
        v = slope(place, tag, g, x, weights, lines, state, at + o, 1, g.size, geo, p)
        by_p[to] += lane(v, 0)


@njit(**JIT)
def by_parameter(begin, end, way, tag, g, x, weights, params, state, by_p, geo, tab, inner,
                 channels, planes_each):  # fmt: skip
    """Output rows `begin .. end - 1`: their derivatives by the parameter into by_p, which holds
    `inner` numbers for each row."""
    geo, tab = constants(geo), constants(tab)
    size, row_size = geo[3, SIZE] * inner, geo[3, OUT] * inner
    most = most_rows(geo)
    rows, codes, o = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(3, np.int64)
    row = empty_buffer(x, inner + width(x))
    plane = split(begin, geo, OUT, o)
    last = np.int64(-1)
    for unit in range(begin, end):
        if plane != last:
            fill_parameters(row, params, plane, inner, planes_each, channels)
            last = plane
        found = window_rows(geo, tab, o, plane, size, rows, codes)
        by_p[unit * inner : (unit + 1) * inner] = 0
        slopes(way, tag, g, x, weights, row, state, by_p, unit * inner, unit * row_size,
               (rows, codes, found), geo, tab, inner)  # fmt: skip
        plane = advance(geo, OUT, o, plane)
