"""Triton kernels for NVIDIA GPUs. One lane per output forward, one lane per input backward: every
element is written once, without atomics, so that results are the same bits every time.

The pooled axes are seen as three; both layouts are read through strides. A reduction's own formulas
are compiled into the accumulation kernels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool import reductions as formulas
from torchpool.kernels import layout, reference
from torchpool.reductions import Accumulation, Max, Mean, Min, Selection
from torchpool.windows import Axis

AXES = 3
BLOCK = 256
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_TRIVIAL = Axis(1, 1, 1, 1, 1, 0, 0)


# The functions of formulas, for Triton


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
    formulas.exp: _exp,
    formulas.log: _log,
    formulas.log1p: _log1p,
    formulas.expm1: _expm1,
    formulas.sqrt: _sqrt,
    formulas.where: _where,
    abs: _abs,
}


@lru_cache(maxsize=256)
def _formula(kind: Any, name: str) -> Any:
    return formulas.rebind(getattr(kind, name), _TRITON, _jit)


def _jit(formula: Any) -> Any:
    formula.__globals__["tl"] = tl  # Triton's interpreter asks for it in every function
    return triton.jit(formula)


# Geometry inside kernels


@triton.jit
def _start(o, size, outs, STRIDE: tl.constexpr, BEFORE: tl.constexpr):
    return o * size // outs if STRIDE == 0 else o * STRIDE - BEFORE


@triton.jit
def _stop(o, size, outs, STRIDE: tl.constexpr):
    return ((o + 1) * size + outs - 1) // outs if STRIDE == 0 else size + o * 0


@triton.jit
def _last_cover(i, size, outs, STRIDE: tl.constexpr, BEFORE: tl.constexpr):
    """The last output whose window begins at or before input i."""
    return ((i + 1) * outs - 1) // size if STRIDE == 0 else (i + BEFORE) // STRIDE


@triton.jit
def _cover(i, o, size, outs, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, B: tl.constexpr):
    """The tap of output o at which input i stands, and whether it is one."""
    reach = i - _start(o, size, outs, S, B)
    tap = reach // D
    inside = (reach >= 0) & (reach % D == 0) & (tap < K) & (o >= 0) & (o < outs)
    return tap, inside & (i < _stop(o, size, outs, S))


# Selection


@triton.jit
def select_kernel(
    x,
    y,
    state,
    total,
    channels,
    xn,
    xc,
    x0,
    x1,
    x2,
    yn,
    yc,
    y0,
    y1,
    y2,
    i0,
    i1,
    i2,
    o0,
    o1,
    o2,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    LARGEST: tl.constexpr,
    SAVE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One lane per output: its value, and the offset of the winner in the window."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = lane < total
    a2, rest = lane % o2, lane // o2
    a1, rest = rest % o1, rest // o1
    a0, plane = rest % o0, rest // o0
    n, c = plane // channels, plane % channels
    source = x + n * xn + c * xc
    f0, f1, f2 = _start(a0, i0, o0, S0, B0), _start(a1, i1, o1, S1, B1), _start(a2, i2, o2, S2, B2)
    e0, e1, e2 = _stop(a0, i0, o0, S0), _stop(a1, i1, o1, S1), _stop(a2, i2, o2, S2)
    best = tl.zeros([BLOCK], WIDE)
    offset = tl.zeros([BLOCK], tl.int64)
    found = tl.zeros([BLOCK], tl.int1)
    for k0 in range(K0):
        p0 = f0 + k0 * D0
        for k1 in range(K1):
            p1 = f1 + k1 * D1
            for k2 in range(K2):
                p2 = f2 + k2 * D2
                inside = (
                    live & (p0 >= 0) & (p0 < e0) & (p1 >= 0) & (p1 < e1) & (p2 >= 0) & (p2 < e2)
                )
                v = tl.load(source + p0 * x0 + p1 * x1 + p2 * x2, mask=inside, other=0.0).to(WIDE)
                better = (v > best) if LARGEST else (v < best)
                take = inside & ((found == 0) | better | (v != v))
                best = tl.where(take, v, best)
                offset = tl.where(take, (k0 * K1 + k1) * K2 + k2, offset)
                found = found | inside
    at = n * yn + c * yc + a0 * y0 + a1 * y1 + a2 * y2
    tl.store(y + at, best.to(y.dtype.element_ty), mask=live)
    if SAVE:
        tl.store(state + at, offset.to(state.dtype.element_ty), mask=live)


@triton.jit
def select_backward_kernel(
    grad,
    state,
    gx,
    total,
    channels,
    yn,
    yc,
    y0,
    y1,
    y2,
    xn,
    xc,
    x0,
    x1,
    x2,
    i0,
    i1,
    i2,
    o0,
    o1,
    o2,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    M0: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One lane per input: the sum of what the outputs that chose it send."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = lane < total
    a2, rest = lane % i2, lane // i2
    a1, rest = rest % i1, rest // i1
    a0, plane = rest % i0, rest // i0
    n, c = plane // channels, plane % channels
    base = n * yn + c * yc
    h0 = _last_cover(a0, i0, o0, S0, B0)
    h1 = _last_cover(a1, i1, o1, S1, B1)
    h2 = _last_cover(a2, i2, o2, S2, B2)
    sum = tl.zeros([BLOCK], WIDE)
    for m0 in range(M0):
        t0, in0 = _cover(a0, h0 - m0, i0, o0, K0, S0, D0, B0)
        for m1 in range(M1):
            t1, in1 = _cover(a1, h1 - m1, i1, o1, K1, S1, D1, B1)
            for m2 in range(M2):
                t2, in2 = _cover(a2, h2 - m2, i2, o2, K2, S2, D2, B2)
                inside = live & in0 & in1 & in2
                at = base + (h0 - m0) * y0 + (h1 - m1) * y1 + (h2 - m2) * y2
                chosen = tl.load(state + at, mask=inside, other=0).to(tl.int64)
                mine = inside & (chosen == (t0 * K1 + t1) * K2 + t2)
                sum += tl.load(grad + at, mask=mine, other=0.0).to(WIDE)
    at = n * xn + c * xc + a0 * x0 + a1 * x1 + a2 * x2
    tl.store(gx + at, sum.to(gx.dtype.element_ty), mask=live)


# Accumulation


@triton.jit
def accumulate_kernel(
    x,
    y,
    stats,
    params,
    counts,
    coefficients,
    total,
    channels,
    xn,
    xc,
    x0,
    x1,
    x2,
    yn,
    yc,
    y0,
    y1,
    y2,
    i0,
    i1,
    i2,
    o0,
    o1,
    o2,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    KEY: tl.constexpr,
    TERMS: tl.constexpr,
    FINISH: tl.constexpr,
    LEAST: tl.constexpr,
    ANCHOR: tl.constexpr,
    SUMS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    SAVE: tl.constexpr,
    BY_PARAMETER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One lane per output: the anchor, the sums of the terms, the finish. With BY_PARAMETER the
    terms are weighted by `coefficients` instead of finished: a window's part of dL/dp."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = lane < total
    a2, rest = lane % o2, lane // o2
    a1, rest = rest % o1, rest // o1
    a0, plane = rest % o0, rest // o0
    n, c = plane // channels, plane % channels
    source = x + n * xn + c * xc
    f0, f1, f2 = _start(a0, i0, o0, S0, B0), _start(a1, i1, o1, S1, B1), _start(a2, i2, o2, S2, B2)
    e0, e1, e2 = _stop(a0, i0, o0, S0), _stop(a1, i1, o1, S1), _stop(a2, i2, o2, S2)
    p = tl.load(params + c * PER_CHANNEL, mask=live, other=1.0)
    seen = tl.zeros([BLOCK], WIDE)
    anchor = tl.zeros([BLOCK], WIDE)
    if ANCHOR != 0:
        for k0 in range(K0):
            p0 = f0 + k0 * D0
            for k1 in range(K1):
                p1 = f1 + k1 * D1
                for k2 in range(K2):
                    p2 = f2 + k2 * D2
                    inside = (
                        live & (p0 >= 0) & (p0 < e0) & (p1 >= 0) & (p1 < e1) & (p2 >= 0) & (p2 < e2)
                    )
                    v = tl.load(source + p0 * x0 + p1 * x1 + p2 * x2, mask=inside, other=0.0).to(
                        WIDE
                    )
                    if ANCHOR == 1:
                        k = KEY(v, p)
                        anchor = tl.where(
                            inside & ((seen == 0) | (k > anchor) | (k != k)), k, anchor
                        )
                    else:
                        anchor += tl.where(inside, v, 0.0)
                    seen += inside.to(WIDE)
        if ANCHOR == 2:
            anchor = anchor / tl.where(seen > 0, seen, 1.0)
    first = tl.zeros([BLOCK], WIDE)
    second = tl.zeros([BLOCK], WIDE)
    number = tl.zeros([BLOCK], WIDE)
    for k0 in range(K0):
        p0 = f0 + k0 * D0
        for k1 in range(K1):
            p1 = f1 + k1 * D1
            for k2 in range(K2):
                p2 = f2 + k2 * D2
                inside = (
                    live & (p0 >= 0) & (p0 < e0) & (p1 >= 0) & (p1 < e1) & (p2 >= 0) & (p2 < e2)
                )
                v = tl.load(source + p0 * x0 + p1 * x1 + p2 * x2, mask=inside, other=0.0).to(WIDE)
                terms = TERMS(v, anchor, p)
                first += tl.where(inside, terms[0], 0.0)
                if SUMS == 2:
                    second += tl.where(inside, terms[1], 0.0)
                number += inside.to(WIDE)
    filled = number > LEAST(p)
    m = tl.load(counts + (a0 * o1 + a1) * o2 + a2, mask=live, other=1.0)
    dense = ((plane * o0 + a0) * o1 + a1) * o2 + a2
    if BY_PARAMETER:
        value = first * tl.load(coefficients + dense, mask=live, other=0.0)
        if SUMS == 2:
            value += second * tl.load(coefficients + total + dense, mask=live, other=0.0)
    elif SUMS == 2:
        value = FINISH((first, second), m, anchor, p)
    else:
        value = FINISH((first,), m, anchor, p)
    at = n * yn + c * yc + a0 * y0 + a1 * y1 + a2 * y2
    tl.store(y + at, tl.where(filled, value, 0.0).to(y.dtype.element_ty), mask=live)
    if SAVE:
        tl.store(stats + dense, anchor, mask=live)
        tl.store(stats + total + dense, first, mask=live)
        if SUMS == 2:
            tl.store(stats + 2 * total + dense, second, mask=live)
        tl.store(stats + (SUMS + 1) * total + dense, m, mask=live)


@triton.jit
def accumulate_backward_kernel(
    x,
    gx,
    anchors,
    params,
    coefficients,
    total,
    outputs,
    channels,
    xn,
    xc,
    x0,
    x1,
    x2,
    i0,
    i1,
    i2,
    o0,
    o1,
    o2,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    M0: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    SLOPES: tl.constexpr,
    LINEAR: tl.constexpr,
    SUMS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One lane per input: over the outputs that see it, the sum of coefficient times slope."""
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = lane < total
    a2, rest = lane % i2, lane // i2
    a1, rest = rest % i1, rest // i1
    a0, plane = rest % i0, rest // i0
    n, c = plane // channels, plane % channels
    at = n * xn + c * xc + a0 * x0 + a1 * x1 + a2 * x2
    h0 = _last_cover(a0, i0, o0, S0, B0)
    h1 = _last_cover(a1, i1, o1, S1, B1)
    h2 = _last_cover(a2, i2, o2, S2, B2)
    sum = tl.zeros([BLOCK], WIDE)
    if not LINEAR:
        v = tl.load(x + at, mask=live, other=0.0).to(WIDE)
        p = tl.load(params + c * PER_CHANNEL, mask=live, other=1.0)
    for m0 in range(M0):
        _, in0 = _cover(a0, h0 - m0, i0, o0, K0, S0, D0, B0)
        for m1 in range(M1):
            _, in1 = _cover(a1, h1 - m1, i1, o1, K1, S1, D1, B1)
            for m2 in range(M2):
                _, in2 = _cover(a2, h2 - m2, i2, o2, K2, S2, D2, B2)
                inside = live & in0 & in1 & in2
                o = ((plane * o0 + h0 - m0) * o1 + h1 - m1) * o2 + h2 - m2
                weight = tl.load(coefficients + o, mask=inside, other=0.0)
                if LINEAR:
                    sum += weight
                else:
                    slopes = SLOPES(v, tl.load(anchors + o, mask=inside, other=0.0), p)
                    part = weight * slopes[0]
                    if SUMS == 2:
                        other = tl.load(coefficients + outputs + o, mask=inside, other=0.0)
                        part += other * slopes[1]
                    sum += tl.where(inside, part, 0.0)
    tl.store(gx + at, sum.to(gx.dtype.element_ty), mask=live)


# Launching


def _axes(axes: Sequence[Axis]) -> list[Axis]:
    return [_TRIVIAL] * (AXES - len(axes)) + list(axes)


def _strides(t: Tensor) -> list[int]:
    n, c, *pooled = t.stride()
    return [n, c, *[0] * (AXES - len(pooled)), *pooled]


def _sizes(axes: Sequence[Axis]) -> list[int]:
    three = _axes(axes)
    return [*(axis.in_size for axis in three), *(axis.out_size for axis in three)]


def _constants(axes: Sequence[Axis]) -> dict[str, int]:
    fields = {"K": "kernel", "S": "stride", "D": "dilation", "B": "before"}
    three = _axes(axes)
    return {
        f"{letter}{i}": getattr(a, f) for letter, f in fields.items() for i, a in enumerate(three)
    }


def _covers(axes: Sequence[Axis]) -> dict[str, int]:
    """Per axis the most outputs, from the last that begins early enough, that can see one input."""
    most = {}
    for i, axis in enumerate(_axes(axes)):
        if axis.is_adaptive:
            most[f"M{i}"] = -(-axis.out_size // axis.in_size) + 1
        else:
            most[f"M{i}"] = (axis.kernel - 1) * axis.dilation // axis.stride + 1
    return most


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _on(t: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the device of their arguments."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _grid(total: int) -> tuple[int]:
    return (triton.cdiv(total, BLOCK),)


def _why_not(x: Tensor, axes: Sequence[Axis]) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x.device.type != "cuda" and not interpreted:
        return f"the input lies on {x.device}, and TRITON_INTERPRET=1 is not set"
    if x.dtype not in _FLOATS:
        return f"the GPU kernels do not serve {x.dtype}"
    if len(axes) > AXES:
        return f"the GPU kernels pool at most {AXES} axes, not {len(axes)}"
    return None if x.numel() else "the input is empty"


def why_not_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve a selection; None where they do."""
    if mask is not None:
        return "a selection under a mask is served by the reference"
    if starts is not None:
        return "windows that differ from plane to plane are served by the reference"
    if type(reduction) not in (Max, Min):
        return f"{type(reduction).__name__} compares keys of its own"
    return _why_not(x, axes)


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Winners of all windows; see `reference.select`."""
    outs = [axis.out_size for axis in axes]
    y = layout.empty_like(x, outs)
    dtype = layout.state_dtype(axes)
    state = layout.empty_like(x, outs, dtype) if save else x.new_empty(0, dtype=dtype)
    with _on(x):
        select_kernel[_grid(y.numel())](
            x, y, state, y.numel(), x.shape[1], *_strides(x), *_strides(y), *_sizes(axes),
            **_constants(axes), LARGEST=reduction.largest, SAVE=save, WIDE=_wide(x.dtype),
            BLOCK=BLOCK,
        )  # fmt: skip
    return y, state


def select_backward(
    grad: Tensor, state: Tensor, starts: Tensor | None, axes: Sequence[Axis]
) -> Tensor:
    """Sends the gradient of each window to its winner; see `reference.select_backward`."""
    gx = layout.empty_like(state, [axis.in_size for axis in axes], grad.dtype)
    with _on(grad):
        select_backward_kernel[_grid(gx.numel())](
            grad, state, gx, gx.numel(), grad.shape[1], *_strides(state), *_strides(gx),
            *_sizes(axes), **_constants(axes), **_covers(axes), WIDE=_wide(grad.dtype), BLOCK=BLOCK,
        )  # fmt: skip
    return gx


def why_not_accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve an accumulation; None where they do."""
    if mask is not None or weights is not None:
        return "masks and weights are served by the reference"
    if reduction.num_sums > 2:
        return f"{type(reduction).__name__} has {reduction.num_sums} sums, these kernels hold 2"
    return _why_not(x, axes)


def _counts(reduction: Accumulation, axes: Sequence[Axis], x: Tensor) -> Tensor:
    """n of each window, (O0, O1, O2) in compute dtype."""
    dtype = layout.compute_dtype(x.dtype)
    include = isinstance(reduction, Mean) and reduction.count_include_pad
    total = torch.ones((), dtype=dtype)
    for axis in _axes(axes):
        total = total.unsqueeze(-1) * torch.tensor(axis.counts(include), dtype=dtype)
    if isinstance(reduction, Mean) and reduction.divisor is not None:
        total = torch.full_like(total, reduction.divisor)
    return torch.where(total > 0, total, 1).to(x.device)


def _forward(
    x: Tensor,
    y: Tensor,
    stats: Tensor,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    coefficients: Tensor | None = None,
) -> None:
    """Runs the forward kernel; with coefficients, for the gradient by the parameter."""
    kind: Any = type(reduction)
    dtype = layout.compute_dtype(x.dtype)
    p = torch.zeros(1, dtype=dtype, device=x.device) if params is None else params
    by_parameter = coefficients is not None
    with _on(x):
        accumulate_kernel[_grid(y.numel())](
            x, y, stats, p, _counts(reduction, axes, x),
            stats if coefficients is None else coefficients,
            y.numel(), x.shape[1], *_strides(x), *_strides(y), *_sizes(axes), **_constants(axes),
            KEY=_formula(kind, "key"), TERMS=_formula(kind, "lift_dp" if by_parameter else "lift"),
            FINISH=_formula(kind, "finish"), LEAST=_formula(kind, "least"),
            ANCHOR={None: 0, "max": 1, "mean": 2}[reduction.anchor], SUMS=reduction.num_sums,
            PER_CHANNEL=int(p.numel() > 1), SAVE=bool(stats.numel()) and not by_parameter,
            BY_PARAMETER=by_parameter, WIDE=_wide(x.dtype), BLOCK=BLOCK,
        )  # fmt: skip


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Values of all windows; see `reference.accumulate`."""
    outs = [axis.out_size for axis in axes]
    y = layout.empty_like(x, outs)
    stats = layout.empty_stats(x, outs, reduction, save)
    _forward(x, y, stats, params, reduction, axes)
    return y, stats


def accumulate_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    stats: Tensor,
    reduction: Accumulation,
    axes: Sequence[Axis],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x and params; see `reference.accumulate_backward`."""
    dtype = layout.compute_dtype(grad.dtype)
    channels = grad.shape[1]
    p = torch.zeros(1, dtype=dtype, device=grad.device) if params is None else params
    coefficients, by_p = _coefficients(grad, stats, p, reduction, axes)
    kind: Any = type(reduction)
    gx = gp = grad.new_empty(0)
    if needs[0]:
        gx = layout.empty_like(grad, [axis.in_size for axis in axes])
        with _on(grad):
            accumulate_backward_kernel[_grid(gx.numel())](
                x, gx, stats, p, coefficients, gx.numel(), grad.numel(), channels, *_strides(gx),
                *_sizes(axes), **_constants(axes), **_covers(axes),
                SLOPES=_formula(kind, "lift_dx"), LINEAR=reduction.linear,
                SUMS=reduction.num_sums, PER_CHANNEL=int(p.numel() > 1), WIDE=_wide(grad.dtype),
                BLOCK=BLOCK,
            )  # fmt: skip
    if needs[2]:
        parts = torch.empty(grad.shape, dtype=dtype, device=grad.device)
        _forward(x, parts, stats, params, reduction, axes, coefficients)
        gp = (parts + by_p).sum([0, *range(2, grad.ndim)])
        gp = gp.sum(0, keepdim=True) if p.numel() == 1 else gp
    return gx, grad.new_empty(0), gp


def _coefficients(
    grad: Tensor, stats: Tensor, p: Tensor, reduction: Accumulation, axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    """dL/ds_k of every window, (num_sums, N, C, *O), and dL/dp through `finish`."""
    d = len(axes)
    outs = [axis.out_size for axis in axes]
    g = grad.to(layout.compute_dtype(grad.dtype)).contiguous()
    n = _counts(reduction, axes, grad).reshape(outs)
    shaped = p.reshape(1, -1, *(1,) * d)
    a, sums = torch.zeros_like(g), (torch.zeros_like(g),) * reduction.num_sums
    if stats.numel():
        a, sums = stats[0], tuple(stats[1:-1])
    kind: Any = type(reduction)
    filled = _filled(axes, grad) > reference.formula(kind, "least")(shaped)
    sums = tuple(torch.where(filled, s, 1) for s in sums)
    n = torch.where(filled, n, reference.formula(kind, "least")(shaped) + 1)
    by_sums, _, by_p = reference.formula(kind, "finish_grad")(sums, n, a, shaped)
    g = torch.where(filled, g, 0)
    return torch.stack([g * s for s in by_sums]), g * by_p


def _filled(axes: Sequence[Axis], like: Tensor) -> Tensor:
    """Elements of each window that lie inside the input, (*O)."""
    total = torch.ones(())
    for axis in axes:
        total = total.unsqueeze(-1) * torch.tensor(axis.counts(), dtype=torch.float32)
    return total.to(like.device)
