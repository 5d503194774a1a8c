"""The formulas of reductions for Triton: the same source over its functions."""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from functools import lru_cache
from itertools import count
from typing import Any

import triton
import triton.language as tl

from torchpool import reductions


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


_TRITON = {
    reductions.exp: _exp,
    reductions.log: _log,
    reductions.log1p: _log1p,
    reductions.expm1: _expm1,
    reductions.sqrt: _sqrt,
    reductions.where: _where,
    abs: _abs,
}


@lru_cache(maxsize=256)
def formula(kind: Any, name: str) -> Any:
    """The formula `name` of a reduction's class as a Triton function."""
    return reductions.rebind(getattr(kind, name), _TRITON, _jit)


_numbers = count()


def _jit(function: Any) -> Any:
    """Compiles a plain function with Triton, which reads its source: of that only what Triton knows
    is kept (no annotations, decorators or descriptions); numbers of its module are constants."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        argument.annotation = None
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:]
    text = ast.unparse(definition) + "\n"
    file = f"<torchpool {function.__qualname__} {next(_numbers)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    scope = {
        name: tl.constexpr(value) if isinstance(value, (int, float)) else value
        for name, value in function.__globals__.items()
    }
    scope["tl"] = tl  # Triton's interpreter asks for it in every function
    exec(compile(text, file, "exec"), scope)
    return triton.jit(scope[definition.name])
