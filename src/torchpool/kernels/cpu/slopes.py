"""The derivative of a formula by its parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from torchpool.kernels.cpu import formulas
from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.direct import ByChannel, ByOutput, ByWindow, fill_parameters
from torchpool.kernels.cpu.formulas import finish_grad, num_sums
from torchpool.kernels.cpu.lines import advance, most_rows, split, taps_of, window_rows
from torchpool.kernels.cpu.parts import INNER, JIT, inlined
from torchpool.kernels.cpu.plan import DILATION, OUT, SIZE
from torchpool.kernels.cpu.scalars import element, empty_buffer
from torchpool.kernels.cpu.simd import (
    choose,
    lane,
    lane_numbers,
    load_as,
    load_first,
    splat,
    splat_as,
    width,
)
from torchpool.kernels.cpu.taking import SLOPE, begin, total_of
from torchpool.kernels.cpu.visits import Inner, Outputs, Whole, visit


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
        place = Outputs(o, count, way.chain)
        total += slope(place, tag, g, x, weights, lines, state, at + o, count, g.size, geo, p)
    by_p[to] += lane(total_of(total), 0)


def slopes_of_channels(way, tag, g, x, weights, row, state, by_p, to, at, lines, geo, tab, inner):
    like = splat(x, 0)
    for o in range(geo[3, OUT]):
        first, end, start = taps_of(geo, tab, 3, o)
        for c in range(0, inner, width(like)):
            count = min(width(like), inner - c)
            place = Inner(first, end, start, geo[3, DILATION], c, count, inner, way.chain)
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
        place = Whole(first, end, start, way.chain)
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
