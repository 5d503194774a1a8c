"""How the taps of windows are read: a vector holds one element of each of several windows (outputs
side by side, or channels), or several elements of one window where that is long or its neighbours
are irregular. Every kernel *visits* the taps of its windows and lets an accumulator *take* them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from torchpool.kernels.cpu.parts import APART, INNER, inlined
from torchpool.kernels.cpu.plan import BEFORE, DILATION, KERNEL, SIZE, STRIDE
from torchpool.kernels.cpu.scalars import identity, merge, merge3
from torchpool.kernels.cpu.simd import (
    any_lane,
    can_pick,
    choose,
    computed,
    converted,
    evens,
    gather,
    half_of,
    joined,
    lane,
    lane_numbers,
    later_min,
    load,
    load_as,
    load_first,
    odds,
    picked,
    splat,
    thirds,
    turned,
    width,
)
from torchpool.kernels.cpu.taking import Quick, across, added, adds, begin, take


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


def visit_outputs(place, span, goal, tag, held, x, weights, lines, geo, a, p):
    """All taps of windows side by side along the last axis."""
    o, count, _ = place
    rows, codes, _ = lines
    stride, step, size = geo[3, STRIDE], geo[3, DILATION], geo[3, SIZE]
    like = splat(x, 0)
    lanes = width(like)
    for k in range(span.row, span.past):
        for j in range(span.first, span.end):
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


def visit_few_outputs(place, span, goal, tag, held, x, weights, lines, geo, a, p):
    """The same without a question per tap, where there are up to three in a row, at stride 1 or
    2."""
    o, count, _ = place
    rows, codes, found = lines
    kernel, stride, size = geo[3, KERNEL], geo[3, STRIDE], geo[3, SIZE]
    begin = o * stride - geo[3, BEFORE]
    is_few = kernel <= 3 and stride <= 2 and geo[3, DILATION] == 1 and found > 0
    if not (
        is_few and rows[0] + begin >= 0 and rows[found - 1] + begin + 2 * width(x) + 2 <= x.size
    ):
        return _visit_any_outputs(place, span, goal, tag, held, x, weights, lines, geo, a, p)
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


def visit_inner(place, span, goal, tag, held, x, weights, lines, geo, a, p):
    """All taps of one window in some channels."""
    _, _, start, step, c, count, inner, _ = place
    rows, codes, _ = lines
    like = splat(x, 0)
    for k in range(span.row, span.past):
        for j in range(span.first, span.end):
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


def visit_listed(place, span, goal, tag, held, x, weights, lines, geo, a, p):
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
    for j in range(span.first, span.end):
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


def visit_tabled(place, span, goal, tag, held, x, weights, lines, geo, a, p):
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
    for j in range(span.first, span.end):
        base = rows[0] + j * step
        if is_even:
            t = strided(x, base + first, stride, like)
            w = weights_at(weights, base + first, stride, like)
            held = take(goal, tag, held, t, w, None, j, a, p)
        else:
            held = take_edge(goal, tag, held, x, weights, base, at, has > j, j, a, p)
    return held


def visit_window(place, span, goal, tag, held, x, weights, lines, geo, a, p):
    """All elements of one window, several of a row at a time."""
    end, start = span.end, place.start
    rows, codes, _ = lines
    like = splat(x, 0)
    numbers = lane_numbers(like)
    for k in range(span.row, span.past):
        for j in range(span.first, end, width(like)):
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
    return held


CHAIN = 64
"""Up to so many numbers are added one after another."""


@njit(**INNER)
def chain(n):
    """How many of n numbers to add one after another: a sum of so many such sums errs as much as
    one of them."""
    return CHAIN if n <= CHAIN * CHAIN else np.int64(np.sqrt(n))


@njit(**INNER)
def longest_run(step, n):
    """The same of elements of which `step` are added at once."""
    return chain(n // step) * step


@njit(**INNER)
def merge_window(tag, v, x, rows, found, window):
    """All elements of one window, merged into the lanes of v."""
    first, end, start = window
    most = longest_run(4 * width(v), found * (end - first))
    if found * (end - first) <= most:
        for k in range(found):
            v = merge_run(tag, v, x, rows[k] + start + first, rows[k] + start + end)
        return v
    none = splat(x, identity(tag, x))
    for k in range(found):
        for j in range(first, end, most):
            at = rows[k] + start
            v = merge(tag, v, merge_run(tag, none, x, at + j, at + min(end, j + most)))
    return v


@njit(**INNER)
def merge_run(tag, v, x, at, stop):
    """The elements `at .. stop - 1`, merged into the lanes of v: four vectors at a time, so that
    the next four need not wait for each of them."""
    lanes = width(v)
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
    first, end, start = window
    v = splat(x, identity(tag, x))
    none = half_of(v), half_of(v), v
    most = longest_run(2 * width(v), found * (end - first))
    if found * (end - first) <= most:
        held = none
        for k in range(found):
            held = run_by_halves(tag, held, x, rows[k] + start + first, rows[k] + start + end)
        return whole_of(tag, held)
    for k in range(found):
        for j in range(first, end, most):
            at = rows[k] + start
            held = run_by_halves(tag, none, x, at + j, at + min(end, j + most))
            v = merge(tag, v, whole_of(tag, held))
    return v


@njit(**INNER)
def whole_of(tag, held):
    """Two halves and a whole vector, merged."""
    return merge(tag, held[2], joined(held[0], held[1]))


@njit(**INNER)
def run_by_halves(tag, held, x, at, stop):
    """The elements `at .. stop - 1`, merged into two halves of a vector and what is left at the end
    into a whole one: processors that compute in halves of a cache line fetch it sooner."""
    a, b, v = held
    lanes, half = width(v), width(v) // 2
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
    return a, b, v


# Places: which windows the lanes of a vector are. Where windows are large, `chain` is how many
# vectors are added one after another; None for all of a window ------------------------------


class Outputs(NamedTuple):
    """`number` windows side by side along the last axis, from window `o` on."""

    o: int
    number: int
    chain: Any


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
    chain: Any


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
    chain: Any


class Span(NamedTuple):
    """Elements of windows: of the rows `row .. past - 1` the taps `first .. end - 1`."""

    row: int
    past: int
    first: int
    end: int


def span_of(place: Any, lines: Any, geo: Any) -> Any:
    """All elements of the windows at a place."""


@inlined(span_of)
def _span_of(place, lines, geo):
    if place.instance_class is Tabled:
        return lambda place, lines, geo: Span(0, 1, 0, place.longest)
    if place.instance_class in (Inner, Whole):
        return lambda place, lines, geo: Span(0, lines[2], place.first, place.end)
    return lambda place, lines, geo: Span(0, lines[2], 0, geo[3, KERNEL])


def read(
    place: Any, span: Any, goal: Any, tag: Any, held: Any, x: Any, weights: Any, lines: Any,
    geo: Any, a: Any, p: Any,
) -> Any:  # fmt: skip
    """Lets an accumulator take a span of the windows at a place. `lines` are the input rows of the
    windows, the offsets of their first taps, and how many there are."""


@inlined(read)
def _read(place, span, goal, tag, held, x, weights, lines, geo, a, p):
    if place.instance_class is Outputs and goal.instance_class is Quick:
        return visit_few_outputs
    return {
        Outputs: visit_outputs,
        Inner: visit_inner,
        Listed: visit_listed,
        Tabled: visit_tabled,
        Whole: visit_window,
    }[place.instance_class]


def visit_in_spans(place, goal, tag, held, x, weights, lines, geo, a, p):
    """Sums of sums."""
    like = splat(x, 0)
    _, past, first, end = span_of(place, lines, geo)
    taps = place.chain * step_of(place, like)
    rows = max(1, taps // max(1, end - first))
    for k in range(0, past, rows):
        for j in range(first, end, taps):
            span = Span(k, min(past, k + rows), j, min(end, j + taps))
            some = begin(goal, tag, like, None)
            some = read(place, span, goal, tag, some, x, weights, lines, geo, a, p)
            held = added(goal, held, some)
    return gathered(place, goal, tag, held)


def step_of(place: Any, like: Any) -> Any:
    """How many taps of a window are read at once."""


@inlined(step_of)
def _step_of(place, like):
    if place.instance_class is Whole:
        return lambda place, like: width(like)
    return lambda place, like: 1


def is_long(place: Any) -> bool:
    """Whether windows are so large that their elements are not added one after another; asked of
    types."""
    fields = dict(zip(place.instance_class._fields, place.types, strict=True))
    return fields.get("chain", types.none) != types.none


def visit_at_once(place, goal, tag, held, x, weights, lines, geo, a, p):
    """All elements one after another."""
    span = span_of(place, lines, geo)
    held = read(place, span, goal, tag, held, x, weights, lines, geo, a, p)
    return gathered(place, goal, tag, held)


def gathered(place: Any, goal: Any, tag: Any, held: Any) -> Any:
    """An accumulator of the windows at a place, with what belongs to one of them together."""


@inlined(gathered)
def _gathered(place, goal, tag, held):
    if place.instance_class is Whole:
        return lambda place, goal, tag, held: across(goal, tag, held)
    return lambda place, goal, tag, held: held


def visit(
    place: Any, goal: Any, tag: Any, held: Any, x: Any, weights: Any, lines: Any, geo: Any,
    a: Any, p: Any,
) -> Any:  # fmt: skip
    """Lets an accumulator take every tap of the windows at a place; see `read`."""


@inlined(visit)
def _visit(place, goal, tag, held, x, weights, lines, geo, a, p):
    return visit_in_spans if adds(goal, tag) and is_long(place) else visit_at_once
