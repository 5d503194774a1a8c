"""What accumulates while a window is visited.

A goal says what: the best value, the winner and its offset, or the steps of an accumulation's own
formulas. An accumulator, a tuple of vectors, *takes* an element of each of several windows at a
time, or several elements of one window, whose lanes are brought together in the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from torchpool.kernels.cpu import formulas
from torchpool.kernels.cpu.formulas import (
    key,
    lift,
    lift_dp,
)
from torchpool.kernels.cpu.parts import INNER, inlined
from torchpool.kernels.cpu.scalars import Total, beats, identity, merge, outdoes
from torchpool.kernels.cpu.simd import (
    choose,
    lane_numbers,
    splat_as,
    turned,
    width,
)


class Value(NamedTuple):
    """Goal: the merged value."""

    unit: int = 0


class Winner(NamedTuple):
    """Goal: the winner and its offset in the window."""

    unit: int = 0


class Quick(NamedTuple):
    """Goal: the winner and its offset, as int32, where no element is NaN; and a sum that is NaN
    wherever one is."""

    unit: int = 0


class Anchor(NamedTuple):
    """Goal: the largest key."""

    unit: int = 0


class Centre(NamedTuple):
    """Goal: the weighted sum and the sum of weights, of which the mean is made."""

    unit: int = 0


class Lift(NamedTuple):
    """Goal: the sums of lifted elements, and the sum of weights."""

    unit: int = 0


class Slope(NamedTuple):
    """Goal: the derivative by the parameter through the lifted elements."""

    unit: int = 0


VALUE, WINNER, QUICK, ANCHOR, CENTRE = Value(), Winner(), Quick(), Anchor(), Centre()
LIFT, SLOPE = Lift(), Slope()


# Accumulators ---------------------------------------------------------------------


def keep(live: Any, new: Any, old: Any) -> Any:
    """`new` in the lanes that are live (None: all), else `old`."""


@inlined(keep)
def _keep(live, new, old):
    if live == types.none:
        return lambda live, new, old: new
    return lambda live, new, old: choose(live, new, old)


def both(a: Any, b: Any) -> Any:
    """Two masks as one; None stands for all lanes."""


@inlined(both)
def _both(a, b):
    if a == types.none:
        return lambda a, b: b
    if b == types.none:
        return lambda a, b: a
    return lambda a, b: a & b


def either(live: Any, seen: Any) -> Any:
    """The lanes of one mask or the other; None stands for all lanes."""


@inlined(either)
def _either(live, seen):
    if live == types.none:
        return lambda live, seen: seen | ~seen
    return lambda live, seen: seen | live


def add_all(live: Any, sums: Any, weight: Any, terms: Any) -> Any:
    """The sums with the weighted terms added in the lanes that are live."""


@inlined(add_all)
def _add_all(live, sums, weight, terms):
    def one(live, sums, weight, terms):
        return (add_one(live, sums[0], weight, terms[0]),)

    def two(live, sums, weight, terms):
        return (
            add_one(live, sums[0], weight, terms[0]),
            add_one(live, sums[1], weight, terms[1]),
        )

    def three(live, sums, weight, terms):
        return (
            add_one(live, sums[0], weight, terms[0]),
            add_one(live, sums[1], weight, terms[1]),
            add_one(live, sums[2], weight, terms[2]),
        )

    def four(live, sums, weight, terms):
        return (
            add_one(live, sums[0], weight, terms[0]),
            add_one(live, sums[1], weight, terms[1]),
            add_one(live, sums[2], weight, terms[2]),
            add_one(live, sums[3], weight, terms[3]),
        )

    return (one, two, three, four)[len(sums) - 1]


def add_one(live: Any, total: Any, weight: Any, term: Any) -> Any:
    """The same for one sum; a weight of None is 1."""


@inlined(add_one)
def _add_one(live, total, weight, term):
    if weight == types.none:
        return lambda live, total, weight, term: keep(live, total + term, total)
    return lambda live, total, weight, term: keep(live, total + weight * term, total)


def begin(goal: Any, tag: Any, like: Any, first: Any) -> Any:
    """An accumulator that has taken nothing; `first` is the offset that an all-losing window
    gets."""


@inlined(begin)
def _begin(goal, tag, like, first):
    kind = goal.instance_class
    if kind is Value:
        return lambda goal, tag, like, first: (splat_as(like, identity(tag, like)),)
    if kind is Winner:
        return lambda goal, tag, like, first: (
            splat_as(like, identity(tag, like)),
            first,
            lane_numbers(like) < 0,
        )
    if kind is Quick:
        return lambda goal, tag, like, first: (
            splat_as(like, identity(tag, like)),
            first,
            splat_as(like, 0.0),
        )
    if kind is Anchor:
        return lambda goal, tag, like, first: (splat_as(like, -np.inf),)
    if kind is Centre:
        return lambda goal, tag, like, first: (splat_as(like, 0.0), splat_as(like, 0.0))
    if kind is Slope:
        return lambda goal, tag, like, first: (splat_as(like, 0.0),)
    return lambda goal, tag, like, first: (formulas.zeros(tag, like), splat_as(like, 0.0))


def take(
    goal: Any, tag: Any, held: Any, x: Any, weight: Any, live: Any, code: Any, a: Any, p: Any
) -> Any:
    """The accumulator after one more element in each lane.

    Args:
        weight: of the element; of selections the mask; None where every weight is 1.
        live: lanes that have the element at all; None for all.
        code: its offset in the window.
        a: the anchor, where the goal is to lift; for a slope also the derivatives by the sums.
        p: the parameter.
    """


@inlined(take)
def _take(goal, tag, held, x, weight, live, code, a, p):
    kind = goal.instance_class
    if kind is Value:
        if weight == types.none:
            return lambda goal, tag, held, x, weight, live, code, a, p: (
                keep(live, merge(tag, held[0], x), held[0]),
            )
        return lambda goal, tag, held, x, weight, live, code, a, p: (
            keep(both(live, weight != 0), merge(tag, held[0], x), held[0]),
        )
    if kind is Winner:
        return _take_plain_winner if weight == types.none else _take_masked_winner
    if kind is Quick:
        return _take_quickly
    if kind is Anchor:
        return _take_anchor
    if kind is Centre:
        return _take_centre
    return _take_slope if kind is Slope else _take_lift


def _take_plain_winner(goal, tag, held, x, weight, live, code, a, p):
    wins = both(live, beats(tag, x, held[0]))
    codes = choose(wins, splat_as(held[1], code), held[1])
    return choose(wins, x, held[0]), codes, either(live, held[2])


def _take_masked_winner(goal, tag, held, x, weight, live, code, a, p):
    seen = both(live, weight != 0)
    wins = seen & (beats(tag, x, held[0]) | ~held[2])
    codes = choose(wins, splat_as(held[1], code), held[1])
    return choose(wins, x, held[0]), codes, held[2] | seen


def _take_quickly(goal, tag, held, x, weight, live, code, a, p):
    t = keep(live, x, splat_as(x, identity(tag, x)))
    wins = outdoes(tag, t, held[0])
    codes = choose(wins, splat_as(held[1], code), held[1])
    return choose(wins, t, held[0]), codes, held[2] + t


def _take_anchor(goal, tag, held, x, weight, live, code, a, p):
    k = key(tag, x, p)
    wins = both(present(live, weight), (k > held[0]) | (k != k))
    return (choose(wins, k, held[0]),)


def _take_centre(goal, tag, held, x, weight, live, code, a, p):
    seen = present(live, weight)
    return add_one(seen, held[0], weight, x), keep(live, held[1] + amount(weight), held[1])


def _take_lift(goal, tag, held, x, weight, live, code, a, p):
    seen = present(live, weight)
    sums = add_all(seen, held[0], weight, lift(tag, x, a, p))
    return sums, keep(live, held[1] + amount(weight), held[1])


def _take_slope(goal, tag, held, x, weight, live, code, a, p):
    seen = present(live, weight)
    return (add_one(seen, held[0], weight, dot(a[1], lift_dp(tag, x, a[0], p))),)


def dot(d: Any, terms: Any) -> Any:
    """The sum of products of two tuples."""


@inlined(dot)
def _dot(d, terms):
    return (
        lambda d, terms: d[0] * terms[0],
        lambda d, terms: d[0] * terms[0] + d[1] * terms[1],
        lambda d, terms: d[0] * terms[0] + d[1] * terms[1] + d[2] * terms[2],
        lambda d, terms: d[0] * terms[0] + d[1] * terms[1] + d[2] * terms[2] + d[3] * terms[3],
    )[len(d) - 1]


def present(live: Any, weight: Any) -> Any:
    """Lanes that have the element with a weight that is not 0."""


@inlined(present)
def _present(live, weight):
    if weight == types.none:
        return lambda live, weight: live
    return lambda live, weight: both(live, weight != 0)


def amount(weight: Any) -> Any:
    """How much an element counts."""


@inlined(amount)
def _amount(weight):
    return (lambda weight: 1.0) if weight == types.none else (lambda weight: weight)


def plus(first: Any, second: Any) -> Any:
    """The sums of two tuples."""


@inlined(plus)
def _plus(first, second):
    return (
        lambda first, second: (first[0] + second[0],),
        lambda first, second: (first[0] + second[0], first[1] + second[1]),
        lambda first, second: (first[0] + second[0], first[1] + second[1], first[2] + second[2]),
        lambda first, second: (
            first[0] + second[0],
            first[1] + second[1],
            first[2] + second[2],
            first[3] + second[3],
        ),
    )[len(second) - 1]


def adds(goal: Any, tag: Any) -> bool:
    """Whether a goal is of sums; asked of types."""
    kind = goal.instance_class
    return kind in (Centre, Lift, Slope) or (kind is Value and tag.instance_class is Total)


def added(goal: Any, held: Any, more: Any) -> Any:
    """Two accumulators of sums as one."""


@inlined(added)
def _added(goal, held, more):
    kind = goal.instance_class
    if kind is Lift:
        return lambda goal, held, more: (plus(held[0], more[0]), held[1] + more[1])
    if kind is Centre:
        return lambda goal, held, more: (held[0] + more[0], held[1] + more[1])
    return lambda goal, held, more: (held[0] + more[0],)


# From lanes to one window ------------------------------------------------------------


def across(goal: Any, tag: Any, held: Any) -> Any:
    """An accumulator whose lanes belong to one window, with what they have together in every
    lane."""


@inlined(across)
def _across(goal, tag, held):
    kind = goal.instance_class
    if kind is Value:
        return lambda goal, tag, held: (_merged(tag, held[0]),)
    if kind is Winner:
        return _across_winner
    if kind is Anchor:
        return lambda goal, tag, held: (_largest(held[0]),)
    if kind is Centre:
        return lambda goal, tag, held: (total_of(held[0]), total_of(held[1]))
    if kind is Slope:
        return lambda goal, tag, held: (total_of(held[0]),)

    def one(goal, tag, held):
        s, n = held
        return (total_of(s[0]),), total_of(n)

    def two(goal, tag, held):
        s, n = held
        return (total_of(s[0]), total_of(s[1])), total_of(n)

    def three(goal, tag, held):
        s, n = held
        return (total_of(s[0]), total_of(s[1]), total_of(s[2])), total_of(n)

    def four(goal, tag, held):
        s, n = held
        return (total_of(s[0]), total_of(s[1]), total_of(s[2]), total_of(s[3])), total_of(n)

    return (one, two, three, four)[len(held[0]) - 1]


@njit(**INNER)
def _merged(tag, v):
    if width(v) > 32:
        v = merge(tag, v, turned(v, 32))
    if width(v) > 16:
        v = merge(tag, v, turned(v, 16))
    if width(v) > 8:
        v = merge(tag, v, turned(v, 8))
    v = merge(tag, v, turned(v, 4))
    v = merge(tag, v, turned(v, 2))
    return merge(tag, v, turned(v, 1))


@njit(**INNER)
def _larger(a, b):
    return choose((b > a) | (b != b), b, a)


@njit(**INNER)
def _largest(v):
    if width(v) > 8:
        v = _larger(v, turned(v, 8))
    v = _larger(v, turned(v, 4))
    v = _larger(v, turned(v, 2))
    return _larger(v, turned(v, 1))


@njit(**INNER)
def total_of(v):
    """The sum of all lanes, in every lane."""
    if width(v) > 8:
        v += turned(v, 8)
    v += turned(v, 4)
    v += turned(v, 2)
    return v + turned(v, 1)


@njit(**INNER)
def _better(tag, held, other):
    """The winner of two in each lane, whichever comes first in the window."""
    v, c, seen = held
    u, d, also = other
    lost = v != v
    wins = (beats(tag, u, v) & ~lost) | ((u == v) & (d < c)) | ((u != u) & lost & (d > c))
    wins = also & (wins | ~seen)
    return choose(wins, u, v), choose(wins, d, c), seen | also


def _across_winner(goal, tag, held):
    v, c, s = held
    if width(v) > 32:
        v, c, s = _better(tag, (v, c, s), (turned(v, 32), turned(c, 32), turned(s, 32)))
    if width(v) > 16:
        v, c, s = _better(tag, (v, c, s), (turned(v, 16), turned(c, 16), turned(s, 16)))
    if width(v) > 8:
        v, c, s = _better(tag, (v, c, s), (turned(v, 8), turned(c, 8), turned(s, 8)))
    v, c, s = _better(tag, (v, c, s), (turned(v, 4), turned(c, 4), turned(s, 4)))
    v, c, s = _better(tag, (v, c, s), (turned(v, 2), turned(c, 2), turned(s, 2)))
    return _better(tag, (v, c, s), (turned(v, 1), turned(c, 1), turned(s, 1)))
