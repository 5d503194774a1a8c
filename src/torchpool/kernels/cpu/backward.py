"""Gradients by the input and the weights: each element gathers what the outputs that cover it send.

Every element is written once, by one thread, and adds its terms in one order. A piece of work is a
band of rows of a plane: first the *shares* of the outputs that cover the band are laid out side by
side (for a selection the gradient and the offset, for a mean the gradient over the count, for other
accumulations the derivatives by their sums), then each row of the band gathers from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from torchpool.kernels.cpu import formulas
from torchpool.kernels.cpu import plan as plans
from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.direct import ByChannel, ByOutput, ByWindow, fill_parameters, parameter
from torchpool.kernels.cpu.formulas import (
    alike,
    finish_grad,
    lift,
    lift_dx,
    neutral,
    num_sums,
    zeros,
)
from torchpool.kernels.cpu.lines import (
    advance,
    count_row,
    cover_rows,
    covering,
    covers_of,
    lead_count,
    most_at,
    most_covers,
    split,
    taps_of,
)
from torchpool.kernels.cpu.parts import APART, COPYING, INNER, JIT, inlined
from torchpool.kernels.cpu.plan import BEFORE, DILATION, KERNEL, OUT, SIZE, STRIDE
from torchpool.kernels.cpu.scalars import Total, empty_buffer
from torchpool.kernels.cpu.simd import (
    any_lane,
    braided_high,
    braided_low,
    choose,
    codes_as,
    gather,
    lane,
    lane_numbers,
    load,
    load_as,
    load_first,
    splat,
    splat_as,
    store,
    store_first,
    width,
)
from torchpool.kernels.cpu.slopes import kept_sums
from torchpool.kernels.cpu.taking import dot, plus
from torchpool.kernels.cpu.visits import Outputs, fits, strided


@njit(**INNER)
def load_up_to(x, at, count):
    """`load_first`, which is slower where all lanes are loaded."""
    return load(x, at) if count >= width(x) else load_first(x, at, count)


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


@inlined(fill_shares)
def _fill_shares(tag, shares, codes, at, g, state, row, count, size, counts, scale, p, params):
    if formulas.is_tag(tag):
        return _fill_derivatives
    if tag.instance_class is Total:
        return _fill_quotients
    return _fill_winners


def _fill_winners(tag, shares, codes, at, g, state, row, count, size, counts, scale, p, params):
    for i in range(0, count, width(g)):
        store(shares[0], at + i, load_up_to(g, row + i, count - i))
    for i in range(0, count, width(state)):
        store(codes, at + i, load_up_to(state, row + i, count - i))


def _fill_quotients(tag, shares, codes, at, g, state, row, count, size, counts, scale, p, params):
    for i in range(0, count, width(g)):
        v = load_up_to(g, row + i, count - i)
        if counts.size:
            v = v / (load_as(counts, i, v) * scale)
        store(shares[0], at + i, v)


def _fill_derivatives(tag, shares, codes, at, g, state, row, count, size, counts, scale, p, params):
    slots = num_sums(tag)
    for i in range(0, count, width(g)):
        left = count - i
        a = load_first(state, row + i, left)
        n = load_first(state, (slots + 1) * size + row + i, left)
        v = load_first(g, row + i, left)
        s = kept_sums(tag, Outputs(0, 0, None), state, row + i, left, size, v)
        q = parameter(params, p, i, v)
        d, dn, _ = finish_grad(tag, s, n, a, q)
        store_terms(shares, at + i, d, v, left)
        store_first(shares[slots], at + i, dn * v * scale, left)
        store_first(shares[slots + 1], at + i, a, left)
        store_first(shares[num_shares(tag) - 1], at + i, n, left)
        note_own(tag, shares, at + i, a, q, left)


def store_terms(shares: Any, at: Any, terms: Any, g: Any, count: Any) -> None:
    """Writes each of a tuple of derivatives, times the gradient."""


@inlined(store_terms)
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


def note_own(tag: Any, shares: Any, at: Any, a: Any, p: Any, count: Any) -> None:
    """Notes, as 1, which windows have anchors of their own, where some may share theirs."""


@inlined(note_own)
def _note_own(tag, shares, at, a, p, count):
    if not formulas.is_shared(tag):
        return lambda tag, shares, at, a, p, count: None

    def note(tag, shares, at, a, p, count):
        one, none = splat_as(a, 1), splat_as(a, 0)
        own = choose(a == neutral(tag, p), none, one)
        store_first(shares[num_sums(tag) + 2], at, own, count)

    return note


def shares_some(tag: Any, shares: Any, count: Any, line: Any, first: Any, outs: Any) -> bool:
    """Whether some window of `count` lines of `outs` windows, from `first` on, has no anchor of its
    own."""
    raise NotImplementedError


@inlined(shares_some)
def _shares_some(tag, shares, count, line, first, outs):
    if not (formulas.is_tag(tag) and formulas.is_shared(tag)):
        return lambda tag, shares, count, line, first, outs: False

    def look(tag, shares, count, line, first, outs):
        own = shares[num_sums(tag) + 2]
        for k in range(count):
            for i in range(first, first + outs):
                if own[k * line + i] == 0:
                    return True
        return False

    return look


def num_shares(tag: Any) -> int:
    """How many numbers make the share of an output, offsets aside."""
    raise NotImplementedError


@inlined(num_shares)
def _num_shares(tag):
    count = 1
    if formulas.is_tag(tag):
        count = formulas.sums_of(tag) + (4 if formulas.is_shared(tag) else 3)
    return lambda tag: count


# What an output sends to an element ---------------------------------------------------------


class Spread(NamedTuple):
    """A tag: formulas of windows that share the neutral anchor. What they send to an element is
    added up before it is multiplied by the derivative of what the element is lifted to."""

    formula: Any


class Probe(NamedTuple):
    """A tag: the question whether windows have anchors of their own."""

    formula: Any


def none_yet(tag: Any, like: Any) -> Any:
    """The totals of elements that nothing has been sent to."""


@inlined(none_yet)
def _none_yet(tag, like):
    if tag.instance_class is Spread:
        return lambda tag, like: zeros(tag.formula, like)
    if tag.instance_class is Probe:
        return lambda tag, like: like
    return lambda tag, like: (like, like)


def settled(tag: Any, total: Any, x: Any, p: Any) -> Any:
    """The gradients by some elements and by their weights, from the totals."""


@inlined(settled)
def _settled(tag, total, x, p):
    if tag.instance_class is not Spread:
        return lambda tag, total, x, p: total

    def by_formula(tag, total, x, p):
        slopes = lift_dx(tag.formula, x, neutral(tag.formula, p), p)
        nothing = splat_as(x, 0)  # is sent to elements without a window, of which some may be huge
        return choose(is_zero(total), nothing, dot(total, slopes)), nothing

    return by_formula


def send(
    tag: Any, total: Any, shares: Any, codes: Any, at: Any, code: Any, x: Any, weight: Any, p: Any
) -> Any:
    """The totals (by x, and by the weights) of some elements after what the outputs from `at` on
    send them; each is the tap `code` of its output's window."""


@inlined(send)
def _send(tag, total, shares, codes, at, code, x, weight, p):
    if tag.instance_class is Spread:
        return lambda tag, total, shares, codes, at, code, x, weight, p: plus(
            total, load_shares(tag.formula, shares, at, x)
        )
    if tag.instance_class is Probe:
        return lambda tag, total, shares, codes, at, code, x, weight, p: (
            total + load_as(shares[num_sums(tag.formula) + 2], at, total)
        )
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
        n = load_as(shares[num_shares(tag) - 1], at, x)
        sent = dot(load_shares(tag, shares, at, x), lift_dx(tag, x, a, p))
        return tally(tag, total, shares, at, n != alike(-np.inf, n), sent, x, weight, a, p)

    return by_formula


def is_zero(terms: Any) -> Any:
    """In which lanes all of a tuple are 0."""


@inlined(is_zero)
def _is_zero(terms):
    return (
        lambda terms: terms[0] == 0,
        lambda terms: (terms[0] == 0) & (terms[1] == 0),
        lambda terms: (terms[0] == 0) & (terms[1] == 0) & (terms[2] == 0),
        lambda terms: (terms[0] == 0) & (terms[1] == 0) & (terms[2] == 0) & (terms[3] == 0),
    )[len(terms) - 1]


def tally(
    tag: Any, total: Any, shares: Any, at: Any, live: Any, sent: Any, x: Any, weight: Any,
    a: Any, p: Any,
) -> Any:  # fmt: skip
    """The totals with one more term; the one by the weights only where there are weights."""


@inlined(tally)
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


@inlined(load_shares)
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


@inlined(elements)
def _elements(x, at, stride, count, like):
    if x == types.none:
        return lambda x, at, stride, count, like: None

    def read(x, at, stride, count, like):
        if stride <= 2 and count >= width(like) and fits(x, at, stride * width(like)):
            return strided(x, at, stride, like)
        lanes = lane_numbers(like)
        return gather(x, at, lanes * stride, lanes < count)

    return read


def gathered(gather: Any, tag: Any, some: Any, weights: Any, arguments: Any) -> Any:
    """What `gather` gives for a tag: by adding up first where all windows share their anchor, which
    `some` do at all."""


@inlined(gathered)
def _gathered(gather, tag, some, weights, arguments):
    if not (formulas.is_tag(tag) and formulas.is_shared(tag) and weights == types.none):
        return lambda gather, tag, some, weights, arguments: gather(tag, *arguments)

    def perhaps_shared(gather, tag, some, weights, arguments):
        if not some or is_any(gather(Probe(tag), *arguments)):
            return gather(tag, *arguments)
        return gather(Spread(tag), *arguments)

    return perhaps_shared


def is_any(found: Any) -> bool:
    """Whether some lane of a vector, or of two, is not 0."""
    raise NotImplementedError


@inlined(is_any)
def _is_any(found):
    if isinstance(found, types.BaseTuple):
        return lambda found: any_lane((found[0] != 0) | (found[1] != 0))
    return lambda found: any_lane(found != 0)


# Rows ---------------------------------------------------------------------------------------


@njit(**INNER)
def most_sources(geo):
    """At most so many taps reach an input position: those of one residue modulo the stride."""
    a, b = geo[3, DILATION], max(1, geo[3, STRIDE])
    while a:
        a, b = b % a, a
    period = max(1, geo[3, STRIDE]) // b
    return -(-geo[3, KERNEL] // period)


@njit(**INNER)
def sources(geo, taps):
    """For each residue of an input position modulo the stride: how many taps reach it, which, and
    by how much the output that sends lies before position // stride.

    Shape:
        taps (stride, 1 + 2 * most_sources)
    """
    stride = geo[3, STRIDE]
    taps[:, 0] = 0
    for j in range(geo[3, KERNEL]):
        back = j * geo[3, DILATION] - geo[3, BEFORE]
        r = back % stride
        count = taps[r, 0]
        taps[r, 1 + 2 * count] = j
        taps[r, 2 + 2 * count] = (back - r) // stride
        taps[r, 0] = count + 1


@njit(**INNER)
def residue(tag, r, m, size, x, weights, base, rows, bases, found, shares, codes, taps, stride,
            like, p):  # fmt: skip
    """The totals of the elements at `stride * m + r`, and so on."""
    total = none_yet(tag, like)
    at = stride * m + r
    count = (size - at + stride - 1) // stride
    v = elements(x, base + at, stride, count, like)
    w = elements(weights, base + at, stride, count, like)
    for k in range(found):
        for t in range(taps[r, 0]):
            place = rows[k] + m - taps[r, 2 + 2 * t]
            code = bases[k] + taps[r, 1 + 2 * t]
            total = send(tag, total, shares, codes, place, code, v, w, p)
    return settled(tag, total, v, p)


def put_first(array: Any, at: Any, value: Any, count: Any) -> None:
    """`store_first`, unless the array is None."""


@inlined(put_first)
def _put_first(array, at, value, count):
    if array == types.none:
        return lambda array, at, value, count: None
    return lambda array, at, value, count: store_first(array, at, value, count)


@njit(**INNER)
def singles(tag, m, size, x, weights, base, rows, bases, found, shares, codes, geo, like, p):
    """`residue` for stride 1 and at most three taps side by side."""
    total = none_yet(tag, like)
    v, w = elements(x, base + m, 1, size - m, like), elements(weights, base + m, 1, size - m, like)
    kernel, shift = geo[3, KERNEL], m + geo[3, BEFORE]
    for k in range(found):
        at = rows[k] + shift
        total = send(tag, total, shares, codes, at, bases[k], v, w, p)
        if kernel > 1:
            total = send(tag, total, shares, codes, at - 1, bases[k] + 1, v, w, p)
        if kernel > 2:
            total = send(tag, total, shares, codes, at - 2, bases[k] + 2, v, w, p)
    return settled(tag, total, v, p)


@njit(**INNER)
def pairs(tag, m, size, x, weights, base, rows, bases, found, shares, codes, geo, like, p):
    """The totals of the even and of the odd elements from 2 m on, for stride 2 and at most three
    taps side by side: taps 0 and 2 reach the one kind, tap 1 the other."""
    kernel, before = geo[3, KERNEL], geo[3, BEFORE]
    turned = before & 1
    outer, inner = none_yet(tag, like), none_yet(tag, like)
    left = size - 2 * m
    v = elements(x, base + 2 * m + turned, 2, (left - turned + 1) >> 1, like)
    w = elements(weights, base + 2 * m + turned, 2, (left - turned + 1) >> 1, like)
    vi = elements(x, base + 2 * m + 1 - turned, 2, (left + turned) >> 1, like)
    wi = elements(weights, base + 2 * m + 1 - turned, 2, (left + turned) >> 1, like)
    shift = m + ((before + 1) >> 1)
    for k in range(found):
        at = rows[k] + shift
        outer = send(tag, outer, shares, codes, at, bases[k], v, w, p)
        if kernel > 2:
            outer = send(tag, outer, shares, codes, at - 1, bases[k] + 2, v, w, p)
        if kernel > 1:
            inner = send(tag, inner, shares, codes, at - turned, bases[k] + 1, vi, wi, p)
    by_outer, by_inner = settled(tag, outer, v, p), settled(tag, inner, vi, p)
    return (by_inner, by_outer) if turned else (by_outer, by_inner)


@njit(**INNER)
def put_pairs(gx, at, even, odd, left):
    """Writes even and odd elements side by side; `left` of them exist."""
    if left >= 2 * width(even):
        store(gx, at, braided_low(even, odd))
        store(gx, at + width(even), braided_high(even, odd))
    else:
        store_first(gx, at, braided_low(even, odd), left)
        if left > width(even):
            store_first(gx, at + width(even), braided_high(even, odd), left - width(even))


def put_pairs_of(array: Any, at: Any, even: Any, odd: Any, left: Any) -> None:
    """`put_pairs`, unless the array is None."""


@inlined(put_pairs_of)
def _put_pairs_of(array, at, even, odd, left):
    if array == types.none:
        return lambda array, at, even, odd, left: None
    return lambda array, at, even, odd, left: put_pairs(array, at, even, odd, left)


@njit(**INNER)
def small_row(
    tag, some, x, weights, p, params, gx, gw, base, rows, bases, found, shares, codes, geo
):
    """One input row under windows of at most three taps side by side, at stride 1 or 2."""
    size = geo[3, SIZE]
    like = splat(gx, 0)
    lanes = width(like)
    q = parameter(params, p, 0, like)
    if geo[3, STRIDE] == 1:
        for m in range(0, size, lanes):
            arguments = m, size, x, weights, base, rows, bases, found, shares, codes, geo, like, q
            a = gathered(singles, tag, some, weights, arguments)
            store_first(gx, base + m, a[0], size - m)
            put_first(gw, base + m, a[1], size - m)
        return
    for m in range(0, (size + 1) >> 1, lanes):
        arguments = m, size, x, weights, base, rows, bases, found, shares, codes, geo, like, q
        a, b = gathered(pairs, tag, some, weights, arguments)
        put_pairs(gx, base + 2 * m, a[0], b[0], size - 2 * m)
        put_pairs_of(gw, base + 2 * m, a[1], b[1], size - 2 * m)


@njit(**APART)
def any_row(tag, some, x, weights, p, params, gx, gw, base, rows, bases, found, shares, codes, taps,
            row, geo):  # fmt: skip
    """One input row under any windows at a regular stride; lanes are elements a stride apart."""
    size, stride = geo[3, SIZE], geo[3, STRIDE]
    like = splat(gx, 0)
    lanes = width(like)
    q = parameter(params, p, 0, like)
    for m in range(0, (size + stride - 1) // stride, lanes):
        for r in range(stride):
            arguments = (r, m, size, x, weights, base, rows, bases, found, shares, codes, taps,
                         stride, like, q)  # fmt: skip
            a = gathered(residue, tag, some, weights, arguments)
            left = min(lanes, (size - stride * m - r - 1) // stride + 1)
            scatter(row, stride * m + r, stride, a[0], left)
            if gw is not None:
                scatter(row, size + stride * m + r, stride, a[1], left)
    flush(row, 0, gx, base, size)
    flush(row, size, gw, base, size)


def row_by_output(way, tag, some, x, weights, p, params, gx, gw, base, rows, bases, found, shares,
                  codes, taps, row, hits, wide, geo, tab, inner):  # fmt: skip
    """One input row whose windows lie at a regular stride."""
    if geo[3, KERNEL] <= 3 and geo[3, STRIDE] <= 2 and geo[3, DILATION] == 1:
        small_row(
            tag, some, x, weights, p, params, gx, gw, base, rows, bases, found, shares, codes, geo
        )
    else:
        any_row(tag, some, x, weights, p, params, gx, gw, base, rows, bases, found, shares, codes,
                taps, row, geo)  # fmt: skip


@njit(**INNER)
def scatter(row, at, stride, v, count):
    if stride == 1:
        store_first(row, at, v, count)
    else:
        for i in range(count):
            row[at + stride * i] = lane(v, i)


def flush(row: Any, begin: Any, array: Any, at: Any, size: Any) -> None:
    """Copies a computed row where it belongs, rounded; nothing to None."""


@inlined(flush)
def _flush(row, begin, array, at, size):
    if array == types.none:
        return lambda row, begin, array, at, size: None

    def copy(row, begin, array, at, size):
        for i in range(0, size, width(row)):
            store_first(array, at + i, load_first(row, begin + i, size - i), size - i)

    return copy


@njit(**INNER)
def channels(tag, c, v, w, hits, count, shares, codes, like, p):
    """The totals of the channels from `c` on, of what the outputs that `hits` lists send."""
    total = none_yet(tag, like)
    for h in range(count):
        total = send(tag, total, shares, codes, hits[0, h] + c, hits[1, h], v, w, p)
    return settled(tag, total, v, p)


def row_by_channel(way, tag, some, x, weights, p, params, gx, gw, base, rows, bases, found, shares,
                   codes, taps, row, hits, wide, geo, tab, inner):  # fmt: skip
    """One input row of positions of `inner` elements; lanes are channels."""
    like = splat(gx, 0)
    i = np.int64(0)
    while i < geo[3, SIZE]:
        begin, end = covers_of(geo, tab, 3, i)
        run = inner * covered_alike(geo, i)
        count = np.int64(0)
        for k in range(found):
            for e in range(begin, end):
                o, j = covering(geo, tab, 3, i, e)
                hits[0, count] = rows[k] + o * inner
                hits[1, count] = bases[k] + j
                count += 1
        for c in range(0, run, width(like)):
            at, left = base + i * inner + c, run - c
            v, w = elements(x, at, 1, left, like), elements(weights, at, 1, left, like)
            q = parameter(params, p, c, like)
            total = gathered(
                channels, tag, some, weights, (c, v, w, hits, count, shares, codes, like, q)
            )
            store_first(gx, at, total[0], left)
            put_first(gw, at, total[1], left)
        i += run // inner


@njit(**INNER)
def covered_alike(geo, i):
    """How many positions from `i` on are covered by all taps of windows at stride 1, so that their
    channels make one run; else 1."""
    span = (geo[3, KERNEL] - 1) * geo[3, DILATION]
    if geo[3, STRIDE] == 1 and span <= i + geo[3, BEFORE] < geo[3, OUT]:
        return min(geo[3, SIZE], geo[3, OUT] - geo[3, BEFORE]) - i
    return np.int64(1)


def row_by_window(way, tag, some, x, weights, p, params, gx, gw, base, rows, bases, found, shares,
                  codes, taps, row, hits, wide, geo, tab, inner):  # fmt: skip
    """One input row whose windows are long or irregular: what each window sends, one by one."""
    size = geo[3, SIZE]
    like = splat(gx, 0)
    q = parameter(params, p, 0, like)
    if not is_known(tag, rows, found, hits):
        row[:] = 0
        for k in range(found):
            for o in range(geo[3, OUT]):
                first, end, start = taps_of(geo, tab, 3, o)
                send_window(tag, x, weights, q, base, rows[k] + o, bases[k], shares, codes, row,
                            size, wide, first, end, start, geo[3, DILATION], like)  # fmt: skip
    flush(row, 0, gx, base, size)
    flush(row, size, gw, base, size)


def is_known(tag: Any, rows: Any, found: Any, hits: Any) -> bool:
    """Whether the same rows of shares send to a row as to the one before, which `hits` notes: then
    they send the same, where that does not depend on the elements."""
    raise NotImplementedError


@inlined(is_known)
def _is_known(tag, rows, found, hits):
    if formulas.is_tag(tag):
        return lambda tag, rows, found, hits: False

    def noted(tag, rows, found, hits):
        same = hits[1, 0] == found
        for k in range(found):
            same = same and hits[0, k] == rows[k]
            hits[0, k] = rows[k]
        hits[1, 0] = found
        return same

    return noted


def send_window(
    tag: Any, x: Any, weights: Any, p: Any, base: Any, at: Any, code: Any, shares: Any, codes: Any,
    row: Any, size: Any, wide: Any, first: Any, end: Any, start: Any, step: Any, like: Any,
) -> None:  # fmt: skip
    """Adds what the output at shares[:, at] sends to the elements of its window in one row."""


@inlined(send_window)
def _send_window(tag, x, weights, p, base, at, code, shares, codes, row, size, wide, first, end,
                 start, step, like):  # fmt: skip
    return _send_window_formula if formulas.is_tag(tag) else _send_window_total


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


def row_of(
    way: Any, tag: Any, some: Any, x: Any, weights: Any, p: Any, params: Any, gx: Any, gw: Any,
    base: Any, rows: Any, bases: Any, found: Any, shares: Any, codes: Any, taps: Any, row: Any,
    hits: Any, wide: Any, geo: Any, tab: Any, inner: Any,
) -> None:  # fmt: skip
    """One input row, in one of these ways. `some` says whether some windows share the neutral
    anchor."""


@inlined(row_of)
def _row_of(way, tag, some, x, weights, p, params, gx, gw, base, rows, bases, found, shares, codes,
            taps, row, hits, wide, geo, tab, inner):  # fmt: skip
    rows_by = {ByOutput: row_by_output, ByChannel: row_by_channel, ByWindow: row_by_window}
    return rows_by[way.instance_class]


lead_axis = njit(plans.lead_axis, **INNER)


@njit(**INNER)
def outputs_of(geo, tab, a, begin, end):
    """The outputs along axis `a` that cover some position of `begin .. end - 1`. Which taps reach a
    position repeats with the stride, so that a look at both ends is enough."""
    low, high = geo[a, OUT], np.int64(0)
    look = end - begin if geo[a, STRIDE] == 0 else geo[a, STRIDE] * geo[a, DILATION]
    for i in range(begin, min(end, begin + look)):
        first, past = covers_of(geo, tab, a, i)
        if first < past:
            low = min(low, covering(geo, tab, a, i, first)[0])
    for i in range(max(begin, end - look), end):
        first, past = covers_of(geo, tab, a, i)
        if first < past:
            high = max(high, covering(geo, tab, a, i, past - 1)[0] + 1)
    return low, max(low, high)


@njit(**INNER)
def rest_of(geo, lead, column):
    """Rows of a plane at one position along the leading axis."""
    rest = np.int64(1)
    for a in range(lead + 1, 3):
        rest *= geo[a, column]
    return rest


@njit(**INNER)
def bands_of(geo, tab, band):
    """The leading axis of a plane, how many bands it is cut into, and how many rows of outputs
    cover a band at most."""
    lead = lead_axis(geo)
    bands = -(-geo[lead, SIZE] // band)
    most = np.int64(0)
    for b in range(bands):
        low, high = outputs_of(geo, tab, lead, b * band, min((b + 1) * band, geo[lead, SIZE]))
        most = max(most, high - low)
    return lead, bands, most * rest_of(geo, lead, OUT)


@njit(**COPYING)
def place_room(geo, tab, inner):
    """Room for where shares lie: the rows that send to a row, the offsets of their taps, the taps
    of each residue, what sends to a position; and two counters of lines."""
    covers = most_covers(geo, tab)
    taps = np.empty((max(1, geo[3, STRIDE]), 1 + 2 * most_sources(geo)), np.int64)
    if geo[3, STRIDE] > 0 and inner == 1:
        sources(geo, taps)
    hits = np.empty((2, max(1, covers * most_at(geo, tab, 3))), np.int64)
    rows, bases = np.empty(covers, np.int64), np.empty(covers, np.int64)
    return rows, bases, taps, hits, np.zeros(3, np.int64), np.zeros(3, np.int64)


@njit(**COPYING)
def number_room(gx, slots, size, outs, period, most, counted):
    """Room for numbers: the shares, the parameters of a row and of its outputs, the share of one
    output in all lanes, a row of gradients, and `counted` divisors."""
    lanes = width(gx)
    number = empty_buffer(gx, 0).dtype.type
    shares = np.zeros((slots, most + 128), number)
    if slots > 1:
        shares[slots - 1, :] = -np.inf
    p, p_out = np.zeros(period + lanes, number), np.zeros(outs + lanes, number)
    wide, row = np.zeros((slots, lanes), number), np.zeros(2 * size + 4 * lanes, number)
    return shares, p, p_out, wide, row, np.ones(counted, number)


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
    geo, tab = constants(geo), constants(tab)
    size, outs = geo[3, SIZE] * inner, geo[3, OUT] * inner
    lead, bands, most = bands_of(geo, tab, band)
    each = rest_of(geo, lead, OUT)
    before = 0 if inner > 1 else (geo[3, KERNEL] + 1) * geo[3, DILATION]
    room = before + outs + before + 128
    rows, bases, taps, hits, o, i = place_room(geo, tab, inner)
    shares, p, p_out, wide, row, counts = number_room(
        gx, num_shares(tag), geo[3, SIZE], outs, inner if params is None else size, most * room,
        outs + width(gx) if column >= 0 else 0,
    )  # fmt: skip
    codes = empty_codes(state, tag, most * room + 128)
    number = shares.dtype.type
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
            fill_parameters(p, params, plane, inner, planes_each, channels)
            for k in range(outs):
                p_out[k] = p[k % inner]
            last = plane
        hits[1, 0] = -1
        low, high = outputs_of(geo, tab, lead, first, past)
        for k in range((high - low) * each):
            line = plane * plane_outs + low * each + k
            if k == 0:
                split(line, geo, OUT, o)
            else:
                advance(geo, OUT, o, plane)
            scale = number(1)
            if column >= 0 and fixed == 0:
                scale = number(lead_count(geo, tab, column, o))
            elif column < 0 and fixed != 0:
                scale = number(0)
            fill_shares(tag, shares, codes, k * room + before, g, state, line * outs, outs, g.size,
                        counts, scale, p_out, params)  # fmt: skip
        origin = before - low * each * room
        some = shares_some(tag, shares, (high - low) * each, room, before, outs)
        for k in range((past - first) * rest):
            line = plane * plane_rows + first * rest + k
            if k == 0:
                split(line, geo, SIZE, i)
            else:
                advance(geo, SIZE, i, plane)
            found = cover_rows(geo, tab, i, 0, room, rows, bases)
            for q in range(found):
                rows[q] += origin
            row_of(way, tag, some, x, weights, p, params, gx, gw, line * size, rows, bases, found,
                   shares, codes, taps, row, hits, wide, geo, tab, inner)  # fmt: skip


def empty_codes(state: Any, tag: Any, size: Any) -> Any:
    """Room for the offsets that a selection keeps; None for other reductions."""


@overload(empty_codes)
def _empty_codes(state, tag, size):
    if state == types.none or formulas.is_tag(tag):
        return lambda state, tag, size: None
    return lambda state, tag, size: np.empty(size, state.dtype)
