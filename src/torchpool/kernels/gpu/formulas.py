"""The formulas of reductions for Triton: the same source over its functions.

In float32 the helpers that formulas share have short forms: one instruction for 2^x and one for
log2(x), both with an error of about 2^-22, and products with reciprocals, which the taps of a
window share, instead of quotients. An element as infinite as its anchor, or as much 0, costs no
comparison: infinity - infinity and 0 / 0 are NaN, which a minimum passes over. Float64 keeps the
formulas as they are written. Where a parameter is a small whole number, both have products instead
of exponentials.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import textwrap
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from torchpool import reductions
from torchpool.reductions import WHOLE_POWERS, Accumulation

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_NEAR = tl.constexpr(0.25)
"""Below this, e^t - 1 is a polynomial: the difference would lose digits."""
_TINY = tl.constexpr(1e-37)
"""Smaller magnitudes have no finite reciprocal in float32."""
_HUGE = tl.constexpr(1e30)


# Float64


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log(x):
    return tl.log(x)


@triton.jit
def _log1p(x):
    # Kahan's form: exact where 1 + x rounds.
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0.0, x, tl.log(u) * (x / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def _expm1(x):
    # Kahan's form; near 0 the quotient corrects the rounding of e^x.
    u = tl.exp(x)
    d = u - 1.0
    log_u = tl.log(tl.where(u > 0.0, u, 1.0))
    plain = (d == -1.0) | (log_u == 0.0)
    return tl.where(u == 1.0, x, tl.where(plain, d, d * (x / tl.where(plain, 1.0, log_u))))


@triton.jit
def _sqrt(x):
    return tl.sqrt(x)


@triton.jit
def _abs(x):
    return tl.abs(x)


@triton.jit
def _where(condition, yes, no):
    return tl.where(condition, yes, no)


# Known parameters


@triton.jit
def _one(p):
    return 1.0


@triton.jit
def _two(p):
    return 2.0


@triton.jit
def _three(p):
    return 3.0


_NUMBERS = {1: _one, 2: _two, 3: _three}


# Float32


@triton.jit
def _quick_exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _quick_log2(x):
    """log2(x): near 1 with a small absolute, not relative, error."""
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _quick_log(x):
    return _quick_log2(x) * _LN_2


@triton.jit
def _reciprocal(y):
    """1 / y. The instruction gives 0 beyond 2^126, so it gets a quarter."""
    if _INTERPRETED:
        return 1.0 / y
    else:
        return 0.25 * libdevice.fast_dividef(1.0, y * 0.25)


@triton.jit
def _quotient(x, y):
    return x * _reciprocal(y)


@triton.jit
def _quick_log1p(x):
    near = tl.abs(x) < 0.5
    s = tl.where(near, x, 0.0) * _reciprocal(2.0 + tl.where(near, x, 0.0))
    z = s * s
    series = 0.3333326044 + z * (0.2000734467 + z * (0.1406051185 + z * 0.1370038726))
    return tl.where(near, 2.0 * s * (1.0 + z * series), _quick_log(1.0 + x))


@triton.jit
def _slope_near_0(t):
    """(e^t - 1) / t for small t."""
    series = 0.1666663276 + t * (0.0417751624 + t * 0.0083507027)
    return 1.0 + t * (0.4999983093 + t * series)


@triton.jit
def _quick_expm1(t):
    return tl.where(tl.abs(t) < _NEAR, t * _slope_near_0(t), _quick_exp(t) - 1.0)


@triton.jit
def _quick_decay(q, d):
    return tl.exp2(d * (q * _LOG2_E))


@triton.jit
def _quick_decay_less_one(q, d):
    t = q * d
    one = _reciprocal(q)
    return tl.where(tl.abs(t) < _NEAR, d * _slope_near_0(t), _quick_decay(q, d) * one - one)


@triton.jit
def _quick_tapered(e, d):
    return e * tl.maximum(d, -_HUGE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_most(x, bound):
    """The smaller one, and `bound` where x is NaN."""
    if _INTERPRETED:
        return tl.where(x < bound, x, bound)
    else:
        return tl.minimum(x, bound)


@triton.jit
def _quick_gap(k, a):
    return _at_most(k - a, tl.where(a != a, a, 0.0))


@triton.jit
def _quick_floored(x, eps):
    return tl.maximum(x, eps, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quick_per(e, x):
    vanishes = tl.abs(x) < _TINY
    return tl.where(vanishes, 0.0, e * _reciprocal(tl.where(vanishes, 1.0, x)))


@triton.jit
def _quick_ratio(x, a, q):
    return _at_most(_quotient(x, a), tl.where(a != a, a, 1.0))


@triton.jit
def _log2_ratio(x, a):
    return _quick_log2(tl.where(x == a, 1.0, _quotient(x, a)))


@triton.jit
def _quick_log_ratio(x, a):
    return tl.maximum(_log2_ratio(x, a) * _LN_2, -_HUGE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _log2_power(x, a, q):
    """log2 of `power`, not above 0, to whichever side of 1 the ratio is rounded."""
    return tl.minimum(q * _log2_ratio(x, a), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quick_power(x, a, q):
    return tl.exp2(_log2_power(x, a, q))


@triton.jit
def _quick_power_less_one(x, a, q):
    t = _log2_power(x, a, q) * _LN_2
    return tl.where(tl.abs(t) < _NEAR, t * _slope_near_0(t), _quick_power(x, a, q) - 1.0)


@triton.jit
def _quick_root(s, q):
    return tl.exp2(_quick_log2(s) * _reciprocal(q))


_EXACT = {
    reductions.exp: _exp,
    reductions.log: _log,
    reductions.log1p: _log1p,
    reductions.expm1: _expm1,
    reductions.sqrt: _sqrt,
    reductions.where: _where,
    abs: _abs,
}
_QUICK = {
    **_EXACT,
    reductions.exp: _quick_exp,
    reductions.log1p: _quick_log1p,
    reductions.expm1: _quick_expm1,
    reductions.decay: _quick_decay,
    reductions.decay_less_one: _quick_decay_less_one,
    reductions.tapered: _quick_tapered,
    reductions.gap: _quick_gap,
    reductions.floored: _quick_floored,
    reductions.per: _quick_per,
    reductions.ratio: _quick_ratio,
    reductions.log_ratio: _quick_log_ratio,
    reductions.power: _quick_power,
    reductions.power_less_one: _quick_power_less_one,
    reductions.root: _quick_root,
}
_WHOLE: dict[Any, Any] = {
    reductions.power_less_one: reductions.nothing,
    reductions.less_one: reductions.rest,
    reductions.log_mean: reductions.log_of_mean,
    reductions.mean_root: reductions.root_of_mean,
}
"""What follows, for every whole exponent, from the sum of the powers alone."""


class Form(NamedTuple):
    """Which form of a reduction's formulas a kernel is compiled with."""

    is_single: bool = False
    """Computing in float32."""
    parameter: int = 0
    """The parameter, where it is a small whole number; 0: any."""


ANY = Form()
"""As formulas are written."""


@lru_cache(maxsize=256)
def _calls(function: Any, helper: Any) -> bool:
    """Whether a formula calls a helper, itself or through another."""
    called = [function.__globals__.get(name) for name in function.__code__.co_names]
    return helper in called or any(
        _calls(other, helper) for other in called if isinstance(other, FunctionType)
    )


@lru_cache(maxsize=256)
def _known(kind: Any, value: float) -> int:
    """A parameter for which a reduction's formulas have a form of their own, else 0."""
    shorter = WHOLE_POWERS if _calls(kind.lift, reductions.power) else _NUMBERS
    return int(value) if value in shorter and _calls(kind.lift, reductions.strength) else 0


def form(reduction: Accumulation, params: Tensor | None, compute: torch.dtype) -> Form:
    """The form for a reduction, which may tell its parameter."""
    kind: Any = type(reduction)
    value = reduction.value
    told = isinstance(value, float) and params is not None and params.numel() == 1
    return Form(compute != torch.float64, _known(kind, value) if told else 0)


@lru_cache(maxsize=256)
def formula(kind: Any, name: str, form: Form = ANY) -> Any:
    """The formula `name` of a reduction's class as a Triton function."""
    has_power = _calls(getattr(kind, "lift", kind.key), reductions.power)
    return reductions.rebind(getattr(kind, name), _table(form, has_power), _wrap(form))


@lru_cache(maxsize=256)
def moving(kind: Any) -> tuple[int, ...]:
    """Which sums of a reduction depend on x: those whose slope is not written as 0."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.lift_dx)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    slopes = [tuple_.elts for tuple_ in returned if isinstance(tuple_, ast.Tuple)]
    zero = ast.dump(ast.Constant(0.0))
    return tuple(
        k
        for k in range(kind.num_sums)
        if len(slopes) != len(returned) or any(ast.dump(terms[k]) != zero for terms in slopes)
    )


def _wrap(form: Form) -> Any:
    return _jit_single if form.is_single else _jit


@lru_cache(maxsize=16)
def _table(form: Form, has_power: bool) -> dict[Any, Any]:
    """What replaces the functions that formulas are written with."""
    table, wrap = dict(_QUICK if form.is_single else _EXACT), _wrap(form)

    def add(special: dict[Any, Any]) -> None:
        # Inside helpers an absolute error of a logarithm is a relative one of the result.
        inside = {**table, reductions.log: _quick_log} if form.is_single else table
        rebound = {old: reductions.rebind(new, inside, wrap) for old, new in special.items()}
        table.update(rebound)

    if form.parameter:
        table |= {reductions.side: _one, reductions.strength: _NUMBERS[form.parameter]}
    if form.parameter and has_power:
        add(WHOLE_POWERS[form.parameter])
        add(_WHOLE)
    else:
        add({reductions.log_mean: reductions.log_mean})
    return table


_numbers = count()


def _jit(function: Any, rewrite: Callable[[ast.AST], Any] = lambda tree: tree) -> Any:
    """Compiles a plain function with Triton, which reads its source: of that only what Triton knows
    is kept (no annotations, decorators or descriptions); numbers of its module are constants."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        argument.annotation = None
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    text = ast.unparse(rewrite(definition)) + "\n"
    file = f"<torchpool {function.__qualname__} {next(_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    scope = {
        name: tl.constexpr(value) if isinstance(value, (int, float)) else value
        for name, value in function.__globals__.items()
    }
    scope |= {"tl": tl, "_quotient": _quotient}  # Triton's interpreter asks for tl everywhere
    exec(compile(text, file, "exec"), scope)
    return triton.jit(scope[definition.name])


class _Quotients(ast.NodeTransformer):
    """Writes x / y as `_quotient(x, y)`."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        name = ast.Name("_quotient", ast.Load())
        return ast.copy_location(ast.Call(name, [node.left, node.right], []), node)


_jit_single = partial(_jit, rewrite=_Quotients().visit)
