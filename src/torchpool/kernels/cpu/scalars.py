"""Numbers inside kernels: merging candidates, and elementary functions, on scalars and on vectors.

The elementary functions are polynomials in float32, where they run on whole vectors, and the C
library's in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload, register_jitable

from torchpool.kernels.cpu import simd
from torchpool.kernels.cpu.parts import APART, INNER, inlined
from torchpool.kernels.cpu.simd import (
    Vector,
    choose,
    fused,
    later_max,
    later_min,
    load_as,
    or_nan,
    splat_as,
)


class Largest(NamedTuple):
    """Tag: the larger of two candidates, NaN above all, the first of equals."""

    unit: int = 0


class Smallest(NamedTuple):
    """Tag: the smaller of two candidates, NaN above all, the first of equals."""

    unit: int = 0


class Total(NamedTuple):
    """Tag: the sum."""

    unit: int = 0


def beats(tag: Any, candidate: Any, best: Any) -> Any:
    """Whether a later candidate wins over the best so far."""


@inlined(beats)
def _beats(tag, candidate, best):
    if tag.instance_class is Largest:
        return lambda tag, candidate, best: (candidate > best) | (candidate != candidate)
    if tag.instance_class is Smallest:
        return lambda tag, candidate, best: (candidate < best) | (candidate != candidate)
    return None


def outdoes(tag: Any, candidate: Any, best: Any) -> Any:
    """The same of numbers that are not NaN."""


@inlined(outdoes)
def _outdoes(tag, candidate, best):
    if tag.instance_class is Largest:
        return lambda tag, candidate, best: candidate > best
    return lambda tag, candidate, best: candidate < best


def merge(tag: Any, first: Any, second: Any) -> Any:
    """Both candidates as one value."""


@inlined(merge)
def _merge(tag, first, second):
    if tag.instance_class is Total:
        return lambda tag, first, second: first + second
    largest = tag.instance_class is Largest
    if not isinstance(first, Vector):
        if largest:
            return lambda tag, first, second: (
                second if (second > first) | (second != second) else first
            )
        return lambda tag, first, second: second if (second < first) | (second != second) else first
    if largest:
        return lambda tag, first, second: or_nan(later_max(first, second), first, second)
    return lambda tag, first, second: or_nan(later_min(first, second), first, second)


def merge3(tag: Any, first: Any, second: Any, third: Any) -> Any:
    """Three vectors of candidates as one: a NaN in the first stays by itself, one comparison finds
    those of the others."""


@inlined(merge3)
def _merge3(tag, first, second, third):
    if tag.instance_class is Total:
        return lambda tag, first, second, third: first + second + third
    if tag.instance_class is Largest:
        return lambda tag, first, second, third: or_nan(
            later_max(later_max(first, second), third), second, third
        )
    return lambda tag, first, second, third: or_nan(
        later_min(later_min(first, second), third), second, third
    )


def identity(tag: Any, like: Any) -> Any:
    """What never changes a merge, in the format that `like` is computed in: what padding holds."""


@inlined(identity)
def _identity(tag, like):
    dtype = simd.computed(like.dtype)
    if tag.instance_class is Total:
        return lambda tag, like: dtype(0)
    low, high = (
        (-np.inf, np.inf) if isinstance(dtype, types.Float) else (dtype.minval, dtype.maxval)
    )
    number = low if tag.instance_class is Largest else high
    return lambda tag, like: dtype(number)


def over(total: Any, counts: Any, at: Any, scale: Any) -> Any:
    """A vector of totals over their counts, times `scale`; integers stay totals."""


@inlined(over)
def _over(total, counts, at, scale):
    if not simd.is_float(total.dtype):
        return lambda total, counts, at, scale: total
    return lambda total, counts, at, scale: total / (load_as(counts, at, total) * scale)


# Single elements --------------------------------------------------------------------


@intrinsic
def _float_of_brain(typingctx: Any, raw: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def _float_of_half(typingctx: Any, raw: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), build


def element(x: Any, i: Any) -> Any:
    """One element in the format that is computed in."""
    return x[i]


@inlined(element)
def _element(x, i):
    if not isinstance(x.dtype, types.Record):
        return lambda x, i: x[i]
    if "float16" in x.dtype.fields:
        return lambda x, i: _float_of_half(x[i].float16)
    return lambda x, i: _float_of_brain(x[i].bfloat16)


def empty_buffer(like: Any, size: int) -> Any:
    """An uninitialised array of the format that `like` is computed in, beginning where a cache line
    does: what is written across two lines is slow to be read again."""


@overload(empty_buffer)
def _empty_buffer(like, size):
    dtype = simd.computed(like.dtype)
    width = dtype.bitwidth // 8
    line = simd.LINE
    spare = line // width

    def aligned(like, size):
        room = np.empty(size + spare, dtype)
        start = -simd.address(room) % line // width
        return room[start : start + size]

    return aligned


# Elementary functions -----------------------------------------------------------------


@intrinsic
def _scalar_bits(typingctx: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), build


@intrinsic
def _scalar_float(typingctx: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


def bits_of(x: Any) -> Any:
    """The bits of a float32 as int32."""


@inlined(bits_of)
def _bits_of(x):
    if isinstance(x, Vector):
        return lambda x: simd.bits_of(x)
    return lambda x: _scalar_bits(x)


def float_of(bits: Any) -> Any:
    """The float32 of int32 bits."""


@inlined(float_of)
def _float_of(bits):
    if isinstance(bits, Vector):
        return lambda bits: simd.float_of(bits)
    return lambda bits: _scalar_float(np.int32(bits))


def where(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`."""
    return yes if condition else no


@inlined(where)
def _where(condition, yes, no):
    if not isinstance(condition, Vector):
        if isinstance(yes, Vector) and not isinstance(no, Vector):
            return lambda condition, yes, no: yes if condition else splat_as(yes, no)
        if isinstance(no, Vector) and not isinstance(yes, Vector):
            return lambda condition, yes, no: splat_as(no, yes) if condition else no
        return lambda condition, yes, no: yes if condition else no
    if isinstance(yes, Vector):
        return lambda condition, yes, no: choose(condition, yes, splat_as(yes, no))
    if isinstance(no, Vector):
        return lambda condition, yes, no: choose(condition, splat_as(no, yes), no)
    return lambda condition, yes, no: choose(
        condition, _constant(condition, yes), _constant(condition, no)
    )


@intrinsic
def _constant(typingctx: Any, condition: Any, number: Any) -> Any:
    """A number in as many lanes as a mask has."""
    vector = Vector(types.float32 if condition.lanes == 16 else types.float64, condition.lanes)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], number, vector)

    return vector(condition, number), build


def is_single(x: Any) -> bool:
    """Whether a Numba type is a float32 or a vector of them."""
    return (x.dtype if isinstance(x, Vector) else x) == types.float32


def _by_lane(function: Any) -> Any:
    """A function of float64 scalars on each lane of a vector."""
    scalar = njit(function, **APART)

    def run(x):
        y = x
        for i in range(simd.width(x)):
            y = simd.with_lane(y, i, scalar(simd.lane(x, i)))
        return y

    return run


_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_MAGIC = np.float32(12582912.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_ZERO = np.float32(0.0)
_INF = np.float32(np.inf)
_NAN = np.float32(np.nan)
_LEAST, _MOST = np.float32(-104.0), np.float32(89.0)
_E = tuple(
    np.float32(c)
    for c in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
_L = tuple(
    np.float32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
_TINY, _TWO23 = np.float32(1.1754944e-38), np.float32(8388608.0)
_LOG_TWO23 = np.float32(15.942385)


@register_jitable(**INNER)
def _reduced(t):
    """exp(t) - 1 of the remainder of t modulo log 2, and the exponent as two powers of two."""
    t = where(t < _LEAST, _LEAST, t)
    t = where(t > _MOST, _MOST, t)
    z = fused(t, _LOG2E, _MAGIC)
    n = z - _MAGIC
    r = fused(n, -_LN2_LOW, fused(n, -_LN2_HIGH, t))
    square = r * r  # terms in pairs, so that few wait for one another
    q = fused(fused(r, _E[0], _E[1]), square, fused(r, _E[2], _E[3]))
    q = fused(q, square, fused(r, _E[4], _E[5]))
    m = fused(q, square, r)
    k = bits_of(z) - 0x4B400000
    low = k >> 1
    return m, float_of((low + 127) << 23), float_of((k - low + 127) << 23)


def exp(x: Any) -> Any:
    """e^x."""
    return math.exp(x)


@inlined(exp)
def _exp(x):
    if is_single(x):

        def polynomial(x):
            m, first, second = _reduced(x)
            return fused(m, first, first) * second

        return polynomial
    return _by_lane(lambda x: math.exp(x)) if isinstance(x, Vector) else lambda x: math.exp(x)


def expm1(x: Any) -> Any:
    """e^x - 1, precise near 0."""
    return math.expm1(x)


@inlined(expm1)
def _expm1(x):
    if is_single(x):

        def polynomial(x):
            m, first, second = _reduced(x)
            return fused(m * first, second, fused(first, second, -_ONE))

        return polynomial
    return _by_lane(lambda x: math.expm1(x)) if isinstance(x, Vector) else lambda x: math.expm1(x)


@register_jitable(**INNER)
def _log_normal(x):
    """log of a positive normal or infinite float32."""
    bits = bits_of(x)
    e = (bits - 0x3F3504F3) >> 23
    f = float_of(bits - (e << 23)) - _ONE
    square = f * f  # terms in pairs, so that few wait for one another
    q = fused(square, _L[0], fused(f, _L[1], _L[2]))
    q = fused(q, square, fused(f, _L[3], _L[4]))
    q = fused(q, square, fused(f, _L[5], _L[6]))
    q = fused(q, square, fused(f, _L[7], _L[8]))
    n = float_from(e, f)
    low = fused(q * f, square, n * _LN2_LOW) - square * _HALF
    return fused(n, _LN2_HIGH, f + low)


def float_from(number: Any, like: Any) -> Any:
    """An integer (or a vector of them) as a number of the type of `like`."""


@inlined(float_from)
def _float_from(number, like):
    if isinstance(like, Vector):
        return lambda number, like: simd.converted(number, like)
    return lambda number, like: np.float32(number)


def log(x: Any) -> Any:
    """The natural logarithm; -inf at 0, NaN below."""
    return math.log(x)


@register_jitable(**INNER)
def _log_library(x):
    return math.log(x) if x > 0 else (-np.inf if x == 0 else np.nan)


@inlined(log)
def _log(x):
    if is_single(x):

        def polynomial(x):
            small = x < _TINY
            y = _log_normal(where(small, x * _TWO23, x)) - where(small, _LOG_TWO23, _ZERO)
            y = where(x < _INF, y, x)
            y = where(x > _ZERO, y, where(x == _ZERO, -_INF, _NAN))
            return where(x == x, y, x)

        return polynomial
    return _by_lane(_log_library) if isinstance(x, Vector) else lambda x: _log_library(x)


def log1p(x: Any) -> Any:
    """log(1 + x), precise near 0."""
    return math.log1p(x)


@register_jitable(**INNER)
def _log1p_library(x):
    return math.log1p(x) if x > -1 else (-np.inf if x == -1 else np.nan)


@inlined(log1p)
def _log1p(x):
    if is_single(x):

        def polynomial(x):
            u = x + _ONE
            y = log(u)
            lost = ((u - _ONE) - x) / u
            return where((u > _ZERO) & (u < _INF), y - lost, y)

        return polynomial
    return _by_lane(_log1p_library) if isinstance(x, Vector) else lambda x: _log1p_library(x)


def sqrt(x: Any) -> Any:
    """The square root; NaN below 0."""
    return math.sqrt(x)


@inlined(sqrt)
def _sqrt(x):
    if isinstance(x, Vector):
        return lambda x: simd.root(x)
    return lambda x: np.sqrt(x)
