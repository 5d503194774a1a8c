"""A reduction's own formulas as code that kernels call.

A kernel takes a tag, a value whose type stands for the reduction, and is compiled once for each
type of tag. The name of that type carries a digest of the
formulas' code, so that kernels can be cached on disk: another process finds them by the name, and a
changed formula has another name.
"""

from __future__ import annotations

import hashlib
from collections import namedtuple
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from numba import njit, types

from torchpool import reductions
from torchpool.kernels.cpu import scalars
from torchpool.kernels.cpu.parts import INNER, inlined
from torchpool.kernels.cpu.scalars import is_single
from torchpool.kernels.cpu.simd import Vector, splat_as
from torchpool.reductions import Accumulation, Mean, Selection, Sum

MAX_SUMS = 4
_METHODS = ("key", "neutral", "least", "lift", "lift_dx", "lift_dp", "finish", "finish_grad")
_TABLE = {
    getattr(reductions, name): getattr(scalars, name)
    for name in ("exp", "expm1", "log", "log1p", "sqrt", "where")
}
_PREFIX = "Formulas_"
_tags: dict[str, type] = {}
_kinds: dict[str, tuple[Any, int]] = {}


def __getattr__(name: str) -> type:
    """The type of tag with that name: how another process's cached kernels find theirs."""
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _tags:
        made = namedtuple(name, ["unit"])  # type: ignore[misc]
        made.__module__ = __name__
        _tags[name] = made
    return _tags[name]


def _text(code: CodeType) -> str:
    constants = [
        _text(c) if isinstance(c, CodeType) else repr(c)
        for c in code.co_consts[1 if code.co_consts and isinstance(code.co_consts[0], str) else 0 :]
    ]
    return f"{code.co_code.hex()}{constants}{code.co_names}{code.co_varnames}"


def _source(formula: FunctionType, seen: set[Any]) -> str:
    """The code of a formula and of everything that it calls."""
    text = _text(formula.__code__) + repr(formula.__defaults__)
    for name in formula.__code__.co_names:
        value = formula.__globals__.get(name)
        if isinstance(value, FunctionType) and value not in _TABLE and value not in seen:
            seen.add(value)
            text += _source(value, seen)
        elif isinstance(value, (int, float)):
            text += repr(value)
    return text


@lru_cache(maxsize=256)
def _digest(kind: Any) -> tuple[str, bool]:
    """A digest of the formulas' code, and whether it raises to a power."""
    seen: set[Any] = set()
    text = f"{kind.anchor}{kind.num_sums}" + "".join(
        _source(getattr(kind, name), seen) for name in _METHODS
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16], reductions.power in seen


def tag(kind: Any, params: Any = None) -> Any:
    """The tag of a reduction's class, and of its exponent where that is a small whole number."""
    digest, has_power = _digest(kind)
    exponent = 0
    if has_power and params is not None and params.size == 1:
        exponent = next((q for q in reductions.WHOLE_POWERS if q == params[0]), 0)
    name = f"{_PREFIX}{kind.__name__}_{exponent or ''}_{digest}"
    _kinds[name] = kind, exponent
    return __getattr__(name)(0)


def is_merged(reduction: Any) -> bool:
    """Whether elements are compared or added as they are, without a formula."""
    return isinstance(reduction, Selection) or type(reduction) in (Sum, Mean)


@lru_cache(maxsize=256)
def why_not(kind: Any) -> str | None:
    """Why the formulas of a reduction cannot be compiled; None where they can."""
    if not 1 <= kind.num_sums <= MAX_SUMS:
        return f"{kind.__name__} keeps {kind.num_sums} sums, the CPU kernels at most {MAX_SUMS}"
    if any(getattr(kind, name).__closure__ for name in _METHODS):
        return f"a formula of {kind.__name__} is a closure"
    return None


def _single(value: Any) -> Any:
    """Python's numbers as float32, so that they do not drag arithmetic to float64."""
    if isinstance(value, tuple):
        return tuple(_single(v) for v in value)
    return np.float32(value) if isinstance(value, float) else value


def _compile(single: bool) -> Any:
    def wrap(formula: FunctionType) -> Any:
        if single:
            scope = {
                name: _single(v) if isinstance(v, float) else v
                for name, v in formula.__globals__.items()
            }
            code = formula.__code__.replace(
                co_consts=tuple(_single(c) for c in formula.__code__.co_consts)
            )
            formula = FunctionType(code, scope, formula.__name__, formula.__defaults__)
        return njit(formula, **INNER)

    return wrap


@lru_cache(maxsize=64)
def _table(exponent: int, single: bool) -> dict[Any, Any]:
    """What replaces the functions that formulas are written with."""
    table, wrap = dict(_TABLE), _compile(single)
    table[reductions.log_mean] = reductions.rebind(reductions.log_mean_at_once, table, wrap)
    special = reductions.WHOLE_POWERS.get(exponent, {})
    table |= {general: reductions.rebind(f, table, wrap) for general, f in special.items()}
    if special:
        less_one = reductions.rebind(reductions.power_and_less_one, table, wrap)
        table[reductions.power_less_one] = less_one
    return table


def _formula(tag: Any, name: str, single: bool) -> Any:
    kind, exponent = _kinds[tag.instance_class.__name__]
    return _formula_of(kind, exponent, name, single)


@lru_cache(maxsize=1024)
def _formula_of(kind: Any, exponent: int, name: str, single: bool) -> Any:
    return reductions.rebind(getattr(kind, name), _table(exponent, single), _compile(single))


def _kind(tag: Any) -> Any:
    return _kinds[tag.instance_class.__name__][0]


def is_tag(tag: Any) -> bool:
    """Whether a tag's type stands for formulas."""
    return tag.instance_class.__name__ in _kinds


def is_shared(tag: Any) -> bool:
    """Whether windows may share the neutral anchor of the reduction that a tag's type stands
    for."""
    shares: bool = _kind(tag).shares
    return shares


def sums_of(tag: Any) -> int:
    """How many sums the reduction that a tag's type stands for keeps."""
    return _kind(tag).num_sums


def anchor_of(tag: Any) -> str | None:
    """The anchor of the reduction that a tag's type stands for: None, "max" or "mean"."""
    kind: str | None = _kind(tag).anchor
    return kind


def alike(number: Any, like: Any) -> Any:
    """A number as one of the type of `like`: a scalar or a vector."""


@inlined(alike)
def _alike(number, like):
    if isinstance(like, Vector):
        return lambda number, like: splat_as(like, number)
    dtype = np.float32 if like == types.float32 else np.float64
    return lambda number, like: dtype(number)


def num_sums(tag: Any) -> int:
    """How many sums the reduction keeps."""
    raise NotImplementedError


@inlined(num_sums)
def _num_sums(tag):
    count = _kind(tag).num_sums
    return lambda tag: count


def key(tag: Any, x: Any, p: Any) -> Any:
    """What the anchor is the largest of."""
    raise NotImplementedError


@inlined(key)
def _key(tag, x, p):
    f = _formula(tag, "key", is_single(x))
    return lambda tag, x, p: alike(f(x, p), x)


def neutral(tag: Any, p: Any) -> Any:
    """The anchor that windows share."""
    raise NotImplementedError


@inlined(neutral)
def _neutral(tag, p):
    f = _formula(tag, "neutral", is_single(p))
    return lambda tag, p: alike(f(p), p)


def least(tag: Any, p: Any) -> Any:
    """A window with n <= least counts as empty."""
    raise NotImplementedError


@inlined(least)
def _least(tag, p):
    f = _formula(tag, "least", is_single(p))
    return lambda tag, p: alike(f(p), p)


def _terms(name: str) -> Any:
    """An implementation of `lift` and its derivatives: a tuple of `num_sums` terms."""

    def choose(tag, x, a, p):
        kind = _kind(tag)
        if getattr(kind, name) is getattr(Accumulation, name):
            return lambda tag, x, a, p: zeros(tag, x)
        f = _formula(tag, name, is_single(x))

        def one(tag, x, a, p):
            t = f(x, a, p)
            return (alike(t[0], x),)

        def two(tag, x, a, p):
            t = f(x, a, p)
            return alike(t[0], x), alike(t[1], x)

        def three(tag, x, a, p):
            t = f(x, a, p)
            return alike(t[0], x), alike(t[1], x), alike(t[2], x)

        def four(tag, x, a, p):
            t = f(x, a, p)
            return alike(t[0], x), alike(t[1], x), alike(t[2], x), alike(t[3], x)

        return (one, two, three, four)[kind.num_sums - 1]

    return choose


def lift(tag: Any, x: Any, a: Any, p: Any) -> Any:
    """The terms of the sums."""
    raise NotImplementedError


def lift_dx(tag: Any, x: Any, a: Any, p: Any) -> Any:
    """Derivative of each term by x."""
    raise NotImplementedError


def lift_dp(tag: Any, x: Any, a: Any, p: Any) -> Any:
    """Derivative of each term by p."""
    raise NotImplementedError


inlined(lift)(_terms("lift"))
inlined(lift_dx)(_terms("lift_dx"))
inlined(lift_dp)(_terms("lift_dp"))


def finish(tag: Any, s: Any, n: Any, a: Any, p: Any) -> Any:
    """The value of a window from its sums."""
    raise NotImplementedError


@inlined(finish)
def _finish(tag, s, n, a, p):
    f = _formula(tag, "finish", is_single(n))
    return lambda tag, s, n, a, p: alike(f(s, n, a, p), n)


def finish_grad(tag: Any, s: Any, n: Any, a: Any, p: Any) -> Any:
    """Derivatives by the sums (a tuple), by n and by p."""
    raise NotImplementedError


@inlined(finish_grad)
def _finish_grad(tag, s, n, a, p):
    kind = _kind(tag)
    f = _formula(tag, "finish_grad", is_single(n))

    def one(tag, s, n, a, p):
        d, dn, dp = f(s, n, a, p)
        return (alike(d[0], n),), alike(dn, n), alike(dp, n)

    def two(tag, s, n, a, p):
        d, dn, dp = f(s, n, a, p)
        return (alike(d[0], n), alike(d[1], n)), alike(dn, n), alike(dp, n)

    def three(tag, s, n, a, p):
        d, dn, dp = f(s, n, a, p)
        return (alike(d[0], n), alike(d[1], n), alike(d[2], n)), alike(dn, n), alike(dp, n)

    def four(tag, s, n, a, p):
        d, dn, dp = f(s, n, a, p)
        return (
            (alike(d[0], n), alike(d[1], n), alike(d[2], n), alike(d[3], n)),
            alike(dn, n),
            alike(dp, n),
        )

    return (one, two, three, four)[kind.num_sums - 1]


def zeros(tag: Any, like: Any) -> Any:
    """As many zeros as there are sums, of the type of `like`."""
    raise NotImplementedError


@inlined(zeros)
def _zeros(tag, like):
    return (
        lambda tag, like: (alike(0, like),),
        lambda tag, like: (alike(0, like), alike(0, like)),
        lambda tag, like: (alike(0, like), alike(0, like), alike(0, like)),
        lambda tag, like: (alike(0, like), alike(0, like), alike(0, like), alike(0, like)),
    )[_kind(tag).num_sums - 1]
