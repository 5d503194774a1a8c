"""What a window becomes: scalar formulas as small frozen values.

Nothing here knows tensors, geometry or devices. A formula is a static method of plain scalars,
written with the functions that this module
exports (`exp`, `log`, `log1p`, `expm1`, `sqrt`, `where`, the built-in `abs`); each backend compiles
the same source for its own kind of number with `rebind`.

Write your own by subclassing `Accumulation` (a sum of lifted values, then a finish) or `Selection`
(one input wins).
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import exp, expm1, inf, log, log1p, sqrt
from types import FunctionType
from typing import Any, ClassVar

__all__ = [
    "Accumulation",
    "LogMeanExp",
    "Lp",
    "Max",
    "Mean",
    "Min",
    "PowerMean",
    "Reduction",
    "Selection",
    "SoftmaxMean",
    "Std",
    "Sum",
    "Var",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "where",
]

Scalar = Any
Scalars = tuple[Any, ...]
_classes: dict[str, type[Reduction]] = {}
SMALL_NUMBERS = (1, 2, 3)
"""Parameters that `Reduction.spec` tells."""


def where(condition: Scalar, yes: Scalar, no: Scalar) -> Scalar:
    """`yes` where the condition holds, else `no`."""
    return yes if condition else no


class Reduction:
    """A frozen value that says what a window becomes. Subclass `Selection` or `Accumulation`."""

    parameter: ClassVar[str | None] = None
    """Name of the field that is the numeric parameter p of the formulas; a float or a tensor with
    one value or one per channel."""
    domain: ClassVar[float] = -inf
    """Open lower bound of a learnable parameter."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _classes[f"{cls.__module__}.{cls.__qualname__}"] = cls

    def __new__(cls, *args: Any, **options: Any) -> Any:
        made_by = getattr(cls, "__dataclass_params__", None)
        if made_by is None or not made_by.frozen:
            raise TypeError(
                f"{cls.__name__} is no frozen dataclass, whose values can be compared; decorate "
                f"the class with @dataclass(frozen=True)"
            )
        return super().__new__(cls)

    @property
    def value(self) -> Any:
        """The parameter p: a float, a tensor, or None where there is none."""
        return None if self.parameter is None else getattr(self, self.parameter)

    def replace(self, value: Any) -> Any:
        """The same reduction with another parameter."""
        if self.parameter is None:
            raise ValueError(f"{self} has no parameter to replace")
        return replace(self, **{self.parameter: value})  # type: ignore[type-var]

    @property
    def spec(self) -> str:
        """The reduction as text: what an operator's schema carries. `from_spec` reads it. Of the
        parameter only small whole numbers are kept, for which backends have shorter formulas."""
        cls = type(self)
        text = f"{cls.__module__}.{cls.__qualname__}"
        for field in fields(self):  # type: ignore[arg-type]
            name, value = field.name, getattr(self, field.name)
            if name == self.parameter:
                if isinstance(value, (int, float)) and value in SMALL_NUMBERS:
                    text += f"|{name}={float(value)}"
            elif name != "learnable":
                text += f"|{name}={value!r}"
        return text


@lru_cache(maxsize=1024)
def from_spec(spec: str) -> Any:
    """The reduction that `spec` describes; its parameter is None unless it is told.

    Raises:
        ValueError: the class is not known in this process (import the module that defines it).
    """
    name, *options = spec.split("|")
    if name not in _classes:
        raise ValueError(
            f"reduction {name!r} is not known in this process; "
            f"import the module that defines it first"
        )
    cls = _classes[name]
    made = cls.__new__(cls)
    values = {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]
    if cls.parameter is not None:
        values[cls.parameter] = None
    values.update(
        (key, _literal(text)) for key, text in (option.split("=", 1) for option in options)
    )
    for key, value in values.items():
        object.__setattr__(made, key, value)
    return made


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return float(text)


def rebind(
    formula: Callable[..., Any], table: Mapping[Any, Any], wrap: Callable[[Any], Any] = lambda f: f
) -> Any:
    """The same source over other functions: each global that is a key of `table` becomes its value,
    and helper functions are rebound too.

    Args:
        formula: a plain function of scalars.
        table: from the functions of this module to those of a backend, as `{exp: torch.exp, ...}`.
        wrap: applied to every rebound function (a compiler, say).
    """
    scope = dict(formula.__globals__)
    for name in formula.__code__.co_names:
        value = scope.get(name, getattr(builtins, name, None))
        if callable(value) and value in table:
            scope[name] = table[value]
        elif isinstance(value, FunctionType):
            scope[name] = rebind(value, table, wrap)
    return wrap(
        FunctionType(
            formula.__code__, scope, formula.__name__, formula.__defaults__, formula.__closure__
        )
    )


def _check_parameter(reduction: Reduction, least: float | None = None) -> None:
    """Raises unless the parameter is a tensor or a number, not NaN, and greater than `least` where
    that is given."""
    value, name = reduction.value, f"{type(reduction).__name__}: {reduction.parameter}"
    if isinstance(value, (bool, str)) or value is None:
        raise TypeError(f"{name}={value!r} must be a number or a tensor")
    if not isinstance(value, (int, float)):
        return
    is_number = value <= 0 or value >= 0  # torch.compile cannot ask math.isnan of a layer's number
    if not is_number or (least is not None and value <= least):
        bound = "" if least is None else f" greater than {least}"
        raise ValueError(f"{name}={value!r} must be a number{bound}")


class Selection(Reduction):
    """One input of the window wins: the one with the largest (or smallest) key; the first of
    equals; a NaN wins over all.

    The state kept for the backward pass is the winner's offset in its window.
    """

    largest: ClassVar[bool] = True

    @staticmethod
    def key(x: Scalar) -> Scalar:
        """What is compared."""
        return x


@dataclass(frozen=True)
class Max(Selection):
    """The largest element.

    >>> Max()
    Max()
    """


@dataclass(frozen=True)
class Min(Selection):
    """The smallest element."""

    largest: ClassVar[bool] = False


class Accumulation(Reduction):
    """A sum over the window, `s_k = sum_i w_i lift_k(x_i)`, then `y = finish(s, n)` with `n = sum_i
    w_i` (the number of elements without weights).

    A subclass gives `lift` and `finish` with their derivatives, and perhaps an anchor `a`: a value
    of the window against which `lift` measures, for the sake of
    precision and range. The result must not depend on it mathematically, so that derivatives treat
    it as a constant.
    """

    anchor: ClassVar[str | None] = None
    """None; "max": a is the largest `key(x, p)` of the window; "mean": a is the (weighted) mean of
    the window."""
    linear: ClassVar[bool] = False
    """Whether y is linear in x, so that the backward pass needs neither x nor sums."""
    num_sums: ClassVar[int] = 1
    shares: ClassVar[bool] = False
    """Whether windows may share the anchor `neutral(p)` as long as the sums of the first term, of
    which an element at the anchor has about 1, are neither tiny nor huge. Overlapping windows then
    lift each element once."""

    @staticmethod
    def key(x: Scalar, p: Scalar) -> Scalar:
        """What the anchor is the largest of."""
        return x

    @staticmethod
    def neutral(p: Scalar) -> Scalar:
        """The anchor against which elements of usual size can be lifted."""
        return 0.0

    @staticmethod
    def least(p: Scalar) -> Scalar:
        """A window with n <= least(p) counts as empty."""
        return 0.0

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        """The terms of the sums."""
        raise NotImplementedError

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        """Derivative of each term by x."""
        raise NotImplementedError

    @staticmethod
    def lift_dp(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        """Derivative of each term by p; only for reductions with a parameter that gets
        gradients."""
        raise NotImplementedError

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        """The value of the window."""
        raise NotImplementedError

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        """Derivatives of `finish` by each sum (a tuple), by n and by p."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Accumulation):
    """The sum of the elements; integers are summed in int64."""

    linear: ClassVar[bool] = True

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return (x,)

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return (1.0,)

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        return s[0]

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        return (1.0,), 0.0, 0.0


@dataclass(frozen=True)
class Mean(Accumulation):
    """The mean of the elements.

    Args:
        count_include_pad: count padding as zeros (clipped to the padded extent under ceil_mode, as
            torch does).
        divisor: divide by this number instead of by the number of elements.
    """

    count_include_pad: bool = False
    divisor: float | None = None
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.divisor is not None and self.divisor == 0:
            raise ValueError("Mean: divisor must be not zero")

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return (x,)

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return (1.0,)

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        return s[0] / n

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        return (1.0 / n,), -s[0] / n / n, 0.0


def gap(k: Scalar, a: Scalar) -> Scalar:
    """k - a, and 0 where both are the same infinity."""
    return where((k == a) & (k - k != 0), 0.0, k - a)


def strength(p: Scalar) -> Scalar:
    """|p| kept inside (1e-30, 1e30), where the limits p -> 0 (the mean) and p -> inf (the maximum)
    are exact to rounding."""
    q = abs(p)
    return where(q < 1e-30, 1e-30, where(q > 1e30, 1e30, q))


def side(p: Scalar) -> Scalar:
    """-1 for negative p, which looks for the smallest element, else 1."""
    return where(p < 0, -1.0, 1.0)


def decay(q: Scalar, d: Scalar) -> Scalar:
    """e^(q d)."""
    return exp(q * d)


def decay_less_one(q: Scalar, d: Scalar) -> Scalar:
    """(e^(q d) - 1) / q: precise for tiny q, where it is d."""
    return expm1(q * d) * (1.0 / q)


def tapered(e: Scalar, d: Scalar) -> Scalar:
    """e d, and 0 where e = e^(q d) has vanished: d may be -infinity there."""
    return where(e == 0, 0.0, e * d)


def less_one(s: Scalars, n: Scalar, q: Scalar) -> Scalar:
    """The sum of (e^t - 1) / q, of the sums s of e^t and of that."""
    return s[1]


def log_mean(s0: Scalar, s1: Scalar, n: Scalar) -> Scalar:
    """log(s0 / n) for s0 = sum of e^t, s1 = sum of e^t - 1: precise for tiny and for large t."""
    return where(
        s0 > 0.5 * n,
        log1p(where(s0 > 0.5 * n, s1 / n, 0.0)),
        log(where(s0 > 0.0, s0 / n, 1.0 + 0.0 * s0)),
    )


def log_mean_at_once(s0: Scalar, s1: Scalar, n: Scalar) -> Scalar:
    """`log_mean` by one logarithm: near 1 that of 1 + s1 / n, and what the sum's rounding lost."""
    near = s0 > 0.5 * n
    less = where(near, s1 / n, 0.0)
    mean = where(near, 1.0 + less, where(s0 > 0.0, s0 / n, 1.0 + 0.0 * s0))
    return log(mean) + where(near, (less - (mean - 1.0)) / mean, 0.0)


@dataclass(frozen=True)
class SoftmaxMean(Accumulation):
    """The mean weighted by softmax: sum of e^(beta x) x over sum of e^(beta x).

    Args:
        beta: 0 is the mean, +inf the maximum, -inf the minimum.
        learnable: train beta in a Module (start: the given value).
    Source:
        Stergiou et al., SoftPool, 2101.00440; McFee et al., AutoPool, 1804.10070 (learned beta).
    """

    beta: Any = 1.0
    learnable: bool = False
    parameter: ClassVar[str | None] = "beta"
    anchor: ClassVar[str | None] = "max"
    num_sums: ClassVar[int] = 2
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_parameter(self)

    @staticmethod
    def key(x: Scalar, p: Scalar) -> Scalar:
        return side(p) * x

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        d = gap(side(p) * x, a)
        e = decay(strength(p), d)
        return e, tapered(e, d)

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        d = gap(side(p) * x, a)
        e = decay(strength(p), d)
        return side(p) * strength(p) * e, side(p) * tapered(e, 1.0 + strength(p) * d)

    @staticmethod
    def lift_dp(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        d = gap(side(p) * x, a)
        e = decay(strength(p), d)
        return side(p) * tapered(e, d), side(p) * tapered(tapered(e, d), d)

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        return side(p) * (a + s[1] / s[0])

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        return (-side(p) * s[1] / s[0] / s[0], side(p) / s[0]), 0.0, 0.0


@dataclass(frozen=True)
class LogMeanExp(Accumulation):
    """log(mean of e^(beta x)) / beta: a smooth maximum between the mean (beta -> 0) and the maximum
    (beta -> inf).

    Args:
        beta: sharpness; negative values lean to the minimum.
        learnable: train beta, kept > 0, in a Module.
    Source:
        Lowe et al., LogAvgExp, 2111.01742.
    """

    beta: Any = 1.0
    learnable: bool = False
    parameter: ClassVar[str | None] = "beta"
    domain: ClassVar[float] = 0.0
    anchor: ClassVar[str | None] = "max"
    num_sums: ClassVar[int] = 2
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_parameter(self)

    @staticmethod
    def key(x: Scalar, p: Scalar) -> Scalar:
        return side(p) * x

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        d = gap(side(p) * x, a)
        return decay(strength(p), d), decay_less_one(strength(p), d)

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return 0.0, side(p) * decay(strength(p), gap(side(p) * x, a))

    @staticmethod
    def lift_dp(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        q, d = strength(p), gap(side(p) * x, a)
        return 0.0, side(p) * (tapered(decay(q, d), d) - decay_less_one(q, d)) / q

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        q = strength(p)
        return side(p) * (a + log_mean(s[0], q * less_one(s, n, q), n) / q)

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        q = strength(p)
        less = less_one(s, n, q)
        dq = less / s[0] / q - log_mean(s[0], q * less, n) / q / q
        return (0.0 * s[0], side(p) / s[0]), -side(p) * less / s[0] / n, dq


def floored(x: Scalar, eps: Scalar) -> Scalar:
    """x, but not below eps; NaN stays."""
    return where(x < eps, eps, x)


def log_ratio(x: Scalar, a: Scalar) -> Scalar:
    """log(x / a) for x, a >= 0: 0 where both are 0 or both infinite, and for x = 0 a finite number
    whose exponential is 0, so that no derivative is NaN."""
    same = (x == a) & (x + x == x)
    return where(
        same, 0.0, where(x == 0, -1e30, log(where((x == 0) | same, 1.0, x) / where(a == 0, 1.0, a)))
    )


def power(x: Scalar, a: Scalar, q: Scalar) -> Scalar:
    """(x / a)^q for 0 <= x <= a; 1 where both are 0 or both infinite."""
    return exp(q * log_ratio(x, a))


def power_less_one(x: Scalar, a: Scalar, q: Scalar) -> Scalar:
    """`power` - 1, precise for tiny q."""
    return expm1(q * log_ratio(x, a))


def root(s: Scalar, q: Scalar) -> Scalar:
    """s^(1/q)."""
    return exp(log(s) / q)


def mean_root(s: Scalars, n: Scalar, sign: Scalar, q: Scalar) -> Scalar:
    """(s[0] / n)^(sign / q)."""
    return exp(sign * log_mean(s[0], q * less_one(s, n, q), n) / q)


def per(e: Scalar, x: Scalar) -> Scalar:
    """e / x, and 0 where x is 0."""
    return where(x == 0, 0.0, e / where(x == 0, 1.0, x))


# The same for whole exponents: products instead of exponentials.


def ratio(x: Scalar, a: Scalar, q: Scalar) -> Scalar:
    """`power` with q = 1."""
    same = (x == a) & (x + x == x)
    return where(same, 1.0, x / where(a == 0, 1.0, a))


def square(x: Scalar, a: Scalar, q: Scalar) -> Scalar:
    """`power` with q = 2."""
    r = ratio(x, a, q)
    return r * r


def cube(x: Scalar, a: Scalar, q: Scalar) -> Scalar:
    """`power` with q = 3."""
    r = ratio(x, a, q)
    return r * r * r


def power_and_less_one(x: Scalar, a: Scalar, q: Scalar) -> Scalar:
    """`power_less_one` where q is not tiny."""
    return power(x, a, q) - 1.0


def square_root(s: Scalar, q: Scalar) -> Scalar:
    """`root` with q = 2."""
    return sqrt(s)


WHOLE_POWERS: dict[int, dict[Any, Any]] = {
    2: {power: square, root: square_root},
    3: {power: cube},
}
"""What replaces the general functions in formulas whose exponent is one of these numbers."""


def nothing(x: Scalar, a: Scalar, q: Scalar) -> Scalar:
    """`power_less_one` where its sum is known from that of `power`."""
    return 0.0


def rest(s: Scalars, n: Scalar, q: Scalar) -> Scalar:
    """`less_one` without its own sum, where q is not tiny."""
    return (s[0] - n) / q


def log_of_mean(s0: Scalar, s1: Scalar, n: Scalar) -> Scalar:
    """`log_mean` where q is not tiny."""
    return log(s0 / n)


def root_of_mean(s: Scalars, n: Scalar, sign: Scalar, q: Scalar) -> Scalar:
    """`mean_root` for a positive exponent that is not tiny."""
    return root(s[0] / n, q)


GEM_FLOOR = 1e-6


@dataclass(frozen=True)
class PowerMean(Accumulation):
    """The generalised mean (mean of x^p)^(1/p), known as GeM: p = 1 is the mean, 2 the root mean
    square, -1 the harmonic mean, 0 the geometric mean, inf the maximum.

    Elements below 1e-6 count as 1e-6 (and get no gradient), as in GeM's reference, so that every p
    is defined for every x.

    Args:
        p: exponent, any number.
        learnable: train p, kept > 0, in a Module.
    Source:
        Radenovic et al., GeM, 1711.02512.
    """

    p: Any = 3.0
    learnable: bool = False
    parameter: ClassVar[str | None] = "p"
    domain: ClassVar[float] = 0.0
    anchor: ClassVar[str | None] = "max"
    num_sums: ClassVar[int] = 2
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_parameter(self)

    @staticmethod
    def key(x: Scalar, p: Scalar) -> Scalar:
        return side(p) * floored(x, GEM_FLOOR)

    @staticmethod
    def neutral(p: Scalar) -> Scalar:
        return side(p)

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        z, q = floored(x, GEM_FLOOR), strength(p)
        e = power(z, side(p) * a, q * side(p))
        return e, power_less_one(z, side(p) * a, q * side(p)) * (1.0 / q)

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        z = floored(x, GEM_FLOOR)
        e = power(z, side(p) * a, strength(p) * side(p))
        return 0.0, where(x < GEM_FLOOR, 0.0, side(p) * e / z)

    @staticmethod
    def lift_dp(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        q, d = strength(p), side(p) * log_ratio(floored(x, GEM_FLOOR), side(p) * a)
        return 0.0, side(p) * (tapered(decay(q, d), d) - decay_less_one(q, d)) / q

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        q = strength(p)
        return side(p) * a * mean_root(s, n, side(p), q)

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        q = strength(p)
        less = less_one(s, n, q)
        y = side(p) * a * mean_root(s, n, side(p), q)
        return (
            (0.0 * s[0], side(p) * y / s[0]),
            -side(p) * y * less / s[0] / n,
            y * (less / s[0] / q - log_mean(s[0], q * less, n) / q / q),
        )


@dataclass(frozen=True)
class Lp(Accumulation):
    """The norm (sum of |x|^p)^(1/p); no root of a negative number, no NaN gradient at 0, p = inf is
    max |x|.

    Args:
        p: exponent, > 0.
        learnable: train p, kept > 0, in a Module.
    Raises:
        ValueError: p <= 0.
    Source:
        Sermanet et al., 1204.3968; Gulcehre et al., Learned-norm pooling, 1311.1780 (learned p).
    """

    p: Any = 2.0
    learnable: bool = False
    parameter: ClassVar[str | None] = "p"
    domain: ClassVar[float] = 0.0
    anchor: ClassVar[str | None] = "max"
    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_parameter(self, 0.0)

    @staticmethod
    def key(x: Scalar, p: Scalar) -> Scalar:
        return abs(x)

    @staticmethod
    def neutral(p: Scalar) -> Scalar:
        return 1.0

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return (power(abs(x), a, strength(p)) / strength(p),)

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        e = power(abs(x), a, strength(p))
        return (per(e, x),)

    @staticmethod
    def lift_dp(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        q = strength(p)
        d = log_ratio(abs(x), a)
        e = decay(q, d)
        return ((tapered(e, d) - e / q) / q,)

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        return a * root(strength(p) * s[0], strength(p))

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        q = strength(p)
        y = a * root(q * s[0], q)
        return (y / (q * s[0]),), 0.0, y * (1.0 - log(q * s[0])) / q / q


@dataclass(frozen=True)
class Var(Accumulation):
    """The variance, in two passes against the window's mean (never E[x^2] - mean^2).

    Args:
        correction: subtracted from n in the divisor; 0 the population's, 1 the sample's variance. n
            <= correction counts as empty.
    Source:
        Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983 (corrected
        two-pass).
    """

    correction: Any = 0.0
    parameter: ClassVar[str | None] = "correction"
    anchor: ClassVar[str | None] = "mean"
    num_sums: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_parameter(self)

    @staticmethod
    def least(p: Scalar) -> Scalar:
        return where(p > 0, p, 0.0)

    @staticmethod
    def lift(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return x - a, (x - a) * (x - a)

    @staticmethod
    def lift_dx(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return 1.0, 2.0 * (x - a)

    @staticmethod
    def lift_dp(x: Scalar, a: Scalar, p: Scalar) -> Scalars:
        return 0.0, 0.0

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        v = (s[1] - s[0] * s[0] / n) / (n - p)
        return where(v < 0, 0.0, v)

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        m = s[0] / n
        v = (s[1] - s[0] * m) / (n - p)
        return (-2.0 * m / (n - p), 1.0 / (n - p)), (m * m - v) / (n - p), v / (n - p)


@dataclass(frozen=True)
class Std(Var):
    """The standard deviation, in two passes against the window's mean; its gradient is 0 where it
    is 0.

    Args:
        correction: as in `Var`.
    """

    @staticmethod
    def finish(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> Scalar:
        v = (s[1] - s[0] * s[0] / n) / (n - p)
        return where(v > 0, sqrt(where(v > 0, v, 1.0)), 0.0 * v)

    @staticmethod
    def finish_grad(s: Scalars, n: Scalar, a: Scalar, p: Scalar) -> tuple[Scalars, Scalar, Scalar]:
        m = s[0] / n
        v = (s[1] - s[0] * m) / (n - p)
        h = where(v > 0, 0.5 / sqrt(where(v > 0, v, 1.0)), 0.0 * v)
        return (-2.0 * m * h / (n - p), h / (n - p)), (m * m - v) * h / (n - p), v * h / (n - p)
