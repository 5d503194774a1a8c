"""Numbers inside kernels: merging two candidates, half formats, and exponentials that vectorise.

Half formats travel as their bits, so that the array's type tells them apart: bfloat16 as uint16,
float16 as int16. Both compute in float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload, register_jitable

INNER: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
"""Options of functions that only other kernels call: what is cached on disk is the kernel that
holds them."""

JIT: dict[str, Any] = {"cache": True, **INNER}
"""Options of kernels."""


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


@overload(beats)
def _beats(tag, candidate, best):
    if tag.instance_class is Largest:
        return lambda tag, candidate, best: (candidate > best) | (candidate != candidate)
    if tag.instance_class is Smallest:
        return lambda tag, candidate, best: (candidate < best) | (candidate != candidate)
    return None


def merge(tag: Any, first: Any, second: Any) -> Any:
    """Both candidates as one value."""


@overload(merge)
def _merge(tag, first, second):
    if tag.instance_class is Largest:
        return lambda tag, first, second: second if (second > first) | (second != second) else first
    if tag.instance_class is Smallest:
        return lambda tag, first, second: second if (second < first) | (second != second) else first
    if tag.instance_class is Total:
        return lambda tag, first, second: first + second
    return None


# Bits -------------------------------------------------------------------


@intrinsic
def bits_of(context: Any, value: Any):
    """The bits of a float32 as uint32."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def float_of(context: Any, bits: Any):
    """The float32 of uint32 bits."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


_U = np.uint32


@njit(**INNER)
def half_to_float(h):
    magnitude = _U(h & 0x7FFF) << _U(13)
    scaled = bits_of(float_of(_U(magnitude)) * np.float32(2.0**112))
    special = _U(0x7F800000) if (h & 0x7C00) == 0x7C00 else _U(0)
    return float_of(_U(scaled | special | (_U(h & 0x8000) << _U(16))))


@njit(**INNER)
def float_to_half(f):
    bits = bits_of(f)
    sign = _U(bits & _U(0x80000000))
    bits = _U(bits ^ sign)
    huge = _U(0x7E00) if bits > _U(0x7F800000) else _U(0x7C00)
    tiny = _U(bits_of(float_of(bits) + np.float32(0.5)) - _U(0x3F000000))
    usual = _U(_U(bits + _U(0xC8000FFF) + _U((bits >> _U(13)) & _U(1))) >> _U(13))
    rounded = huge if bits >= _U(0x47800000) else (tiny if bits < _U(0x38800000) else usual)
    return _U(rounded | _U(sign >> _U(16)))


@njit(**INNER)
def float_to_brain(f):
    bits = bits_of(f)
    rounded = _U(_U(bits + _U(0x7FFF) + _U((bits >> _U(16)) & _U(1))) >> _U(16))
    return _U(_U(bits >> _U(16)) | _U(0x40)) if f != f else rounded


# Rows: a stretch of memory in storage format, or in the format that is computed in -------


def empty_row(like: Any, size: int) -> Any:
    """A buffer of the format that `like` is computed in."""


@overload(empty_row)
def _empty_row(like, size):
    if like.dtype in (types.uint16, types.int16):
        return lambda like, size: np.empty(size, np.float32)
    return lambda like, size: np.empty(size, like.dtype)


def widen(row: Any, buffer: Any) -> Any:
    """The row in the format that is computed in: the row itself, or converted into the buffer."""


@overload(widen)
def _widen(row, buffer):
    if row.dtype == types.uint16:

        def brain(row, buffer):
            for i in range(row.size):
                buffer[i] = float_of(_U(_U(row[i]) << _U(16)))
            return buffer[: row.size]

        return brain
    if row.dtype == types.int16:

        def half(row, buffer):
            for i in range(row.size):
                buffer[i] = half_to_float(np.int32(row[i]))
            return buffer[: row.size]

        return half
    return lambda row, buffer: row


def target(row: Any, buffer: Any) -> Any:
    """Where a result row is computed: in place, or in the buffer that `narrow` then converts."""


@overload(target)
def _target(row, buffer):
    if row.dtype in (types.uint16, types.int16):
        return lambda row, buffer: buffer[: row.size]
    return lambda row, buffer: row


def narrow(values: Any, row: Any) -> None:
    """Rounds computed values into a row of storage; nothing where `target` was the row itself."""


@overload(narrow)
def _narrow(values, row):
    if row.dtype == types.uint16:

        def brain(values, row):
            for i in range(row.size):
                row[i] = np.uint16(float_to_brain(values[i]))

        return brain
    if row.dtype == types.int16:

        def half(values, row):
            for i in range(row.size):
                row[i] = np.int16(float_to_half(values[i]))

        return half
    return lambda values, row: None


# Elementary functions: polynomials in float32 (an order of magnitude faster, since they vectorise),
# the C library in float64 ----------

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_MAGIC = np.float32(12582912.0)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)


@register_jitable
def _reduced(t):
    """exp(t) - 1 of the remainder of t modulo log 2, and the exponent as two powers of two."""
    t = np.float32(-104.0) if t < np.float32(-104.0) else t
    t = np.float32(89.0) if t > np.float32(89.0) else t
    z = t * _LOG2E + _MAGIC
    n = z - _MAGIC
    r = (t - n * _LN2_HIGH) - n * _LN2_LOW
    q = np.float32(1.9875691500e-4)
    q = q * r + np.float32(1.3981999507e-3)
    q = q * r + np.float32(8.3334519073e-3)
    q = q * r + np.float32(4.1665795894e-2)
    q = q * r + np.float32(1.6666665459e-1)
    q = q * r + np.float32(5.0000001201e-1)
    m = q * r * r + r
    k = np.int32(np.int32(bits_of(z)) - np.int32(0x4B400000))
    low = np.int32(k >> np.int32(1))
    first = float_of(_U(np.int32(low + np.int32(127)) << np.int32(23)))
    second = float_of(_U(np.int32(np.int32(k - low) + np.int32(127)) << np.int32(23)))
    return m, first, second


def exp(t: Any) -> Any:
    """e^t."""
    return math.exp(t)


@overload(exp)
def _exp(t):
    if t == types.float32:

        def polynomial(t):
            m, first, second = _reduced(t)
            return (m * first + first) * second

        return polynomial
    return lambda t: math.exp(t)


def expm1(t: Any) -> Any:
    """e^t - 1, precise near 0."""
    return math.expm1(t)


@overload(expm1)
def _expm1(t):
    if t == types.float32:

        def polynomial(t):
            m, first, second = _reduced(t)
            scale = first * second
            return (m * first) * second + (scale - _ONE)

        return polynomial
    return lambda t: math.expm1(t)


def log(x: Any) -> Any:
    """The natural logarithm; -inf at 0, NaN below."""
    return math.log(x)


@register_jitable
def _log_normal(x):
    """log of a positive normal or infinite float32."""
    bits = np.int32(bits_of(x))
    e = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = float_of(_U(np.int32(bits - np.int32(e << np.int32(23))))) - _ONE
    q = np.float32(7.0376836292e-2)
    q = q * f + np.float32(-1.1514610310e-1)
    q = q * f + np.float32(1.1676998740e-1)
    q = q * f + np.float32(-1.2420140846e-1)
    q = q * f + np.float32(1.4249322787e-1)
    q = q * f + np.float32(-1.6668057665e-1)
    q = q * f + np.float32(2.0000714765e-1)
    q = q * f + np.float32(-2.4999993993e-1)
    q = q * f + np.float32(3.3333331174e-1)
    square = f * f
    n = np.float32(e)
    return (f + (q * f * square + n * _LN2_LOW - _HALF * square)) + n * _LN2_HIGH


@overload(log)
def _log(x):
    if x == types.float32:

        def polynomial(x):
            small = x < np.float32(1.1754944e-38)
            scaled = x * np.float32(8388608.0) if small else x
            y = _log_normal(scaled) - (np.float32(15.942385) if small else np.float32(0.0))
            y = y if x < np.float32(np.inf) else x
            y = (
                y
                if x > np.float32(0.0)
                else (np.float32(-np.inf) if x == np.float32(0.0) else np.float32(np.nan))
            )
            return y if x == x else x

        return polynomial

    def library(x):
        return math.log(x) if x > 0 else (-np.inf if x == 0 else np.nan)

    return library


def log1p(x: Any) -> Any:
    """log(1 + x), precise near 0."""
    return math.log1p(x)


@overload(log1p)
def _log1p(x):
    if x == types.float32:

        def polynomial(x):
            u = _ONE + x
            y = log(u)
            lost = ((u - _ONE) - x) / u
            return y - lost if (u > np.float32(0.0)) & (u < np.float32(np.inf)) else y

        return polynomial

    def library(x):
        return math.log1p(x) if x > -1 else (-np.inf if x == -1 else np.nan)

    return library


def sqrt(x: Any) -> Any:
    """The square root; NaN below 0."""
    return math.sqrt(x)


@overload(sqrt)
def _sqrt(x):
    return lambda x: np.sqrt(x)


def where(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`."""
    return yes if condition else no


@overload(where)
def _where(condition, yes, no):
    return lambda condition, yes, no: yes if condition else no


def load(x: Any, i: Any) -> Any:
    """One element in the format that is computed in."""
    return x[i]


@overload(load)
def _load(x, i):
    if x.dtype == types.uint16:
        return lambda x, i: float_of(_U(_U(x[i]) << _U(16)))
    if x.dtype == types.int16:
        return lambda x, i: half_to_float(np.int32(x[i]))
    return lambda x, i: x[i]
