"""Gradients of sums and means whose windows share few inputs: what a row of outputs sends is summed
once, and written to all rows of inputs that it covers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels.gpu import geometry, launching
from torchpool.kernels.gpu.gathering import axis_count
from torchpool.kernels.gpu.geometry import (
    LANES,
    Span,
    View,
    cover,
    last_cover,
    start_of,
    unpack_sizes,
)
from torchpool.kernels.gpu.selection import FEW
from torchpool.reductions import Accumulation, Mean

_LANES = 1024
_ROW = 16
_COVERS = 16
"""Windows that see an input, at most."""


@lru_cache(maxsize=4096)
def serve(seen: View) -> bool:
    """Whether windows are adaptive, or large in rows that are worth a program, and few of them see
    an input."""
    adaptive = any(span.stride == 0 for span in seen.spans)
    large = seen.taps > FEW and (seen.whole or seen.ins[-1] >= _ROW)
    return seen.covers <= _COVERS and (adaptive or large)


@triton.jit
def _share(
    b, size, outs, kernel,
    A: tl.constexpr, MEAN: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What an axis leaves of the gradient of its window b."""
    if MEAN:
        number = tl.zeros([1, 1], tl.int32) + axis_count(b, size, outs, kernel, A, PADDED)
        return 1.0 / tl.maximum(number, 1).to(WIDE)
    else:
        return 1.0


@triton.jit
def spread_kernel(
    grad, gx, planes, ins, outs, kernels,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    FIXED: tl.constexpr, SINGLE: tl.constexpr, MEAN: tl.constexpr, PADDED: tl.constexpr,
    FACTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Lanes are C neighbours of the last axis in P planes; a program writes the rows of inputs for
    which one row of outputs is the last that sees them. FIXED: the number of outputs along the last
    axis, where it is a constant of the model, so that divisions by it are cheap. SINGLE: that axis
    is one window."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    if FIXED > 0:
        o4 = FIXED
    M0: tl.constexpr = A0[8]
    M1: tl.constexpr = A1[8]
    M2: tl.constexpr = A2[8]
    M3: tl.constexpr = A3[8]
    M4: tl.constexpr = A4[8]
    zero = tl.zeros([1, 1], tl.int32)
    rest = tl.program_id(0)
    a4 = rest % tl.cdiv(i4, C) * C + tl.arange(0, C)[None, :]
    rest = rest // tl.cdiv(i4, C)
    b3 = rest % o3
    rest = rest // o3
    a2 = rest % i2 + zero
    rest = rest // i2
    a1 = rest % i1 + zero
    rest = rest // i1
    a0 = rest % i0 + zero
    plane = rest // i0 * P + tl.arange(0, P)[:, None]
    exists = plane < planes
    live = exists & (a4 < i4)
    source = grad + plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    h0 = last_cover(a0, i0, o0, A0)
    h1 = last_cover(a1, i1, o1, A1)
    h2 = last_cover(a2, i2, o2, A2)
    h4 = zero if SINGLE else last_cover(a4, i4, o4, A4)
    received = ()
    for m3 in tl.static_range(M3):
        total = tl.zeros([P, C], WIDE)
        for m in tl.static_range(M0 * M1 * M2):
            b0 = h0 - m // (M1 * M2)
            b1 = h1 - m // M2 % M1
            b2 = h2 - m % M2
            _, in0 = cover(a0, b0, i0, o0, kernels[0], A0)
            _, in1 = cover(a1, b1, i1, o1, kernels[1], A1)
            _, in2 = cover(a2, b2, i2, o2, kernels[2], A2)
            sent = exists & in0 & in1 & in2 & (b3 + zero >= m3)
            row = (((b0 * o1 + b1) * o2 + b2) * o3 + b3 - m3) * o4
            share = _share(b0, i0, o0, kernels[0], A0, MEAN, PADDED, WIDE)
            share = share * _share(b1, i1, o1, kernels[1], A1, MEAN, PADDED, WIDE)
            share = share * _share(b2, i2, o2, kernels[2], A2, MEAN, PADDED, WIDE)
            share = share * _share(b3 - m3, i3, o3, kernels[3], A3, MEAN, PADDED, WIDE)
            for m4 in tl.static_range(M4):
                if not SINGLE:
                    _, in4 = cover(a4, h4 - m4, i4, o4, kernels[4], A4)
                    sent_here = sent & in4 & (a4 < i4)
                else:
                    sent_here = sent
                g = tl.load(source + row + h4 - m4, mask=sent_here, other=0).to(WIDE) * FACTOR
                total += g * share * _share(h4 - m4, i4, o4, kernels[4], A4, MEAN, PADDED, WIDE)
        received = received + (total,)  # type: ignore[assignment]
    at = gx + plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    at += ((a0 * i1 + a1) * i2 + a2) * i3 * i4 + a4
    begin = tl.maximum(start_of(b3, i3, o3, A3), 0)
    end = tl.where(b3 == o3 - 1, i3, tl.minimum(start_of(b3 + 1, i3, o3, A3), i3))
    for a3 in range(begin, end):
        total = tl.zeros([P, C], WIDE)
        for m3 in tl.static_range(M3):
            tap, in3 = cover(a3 + zero, b3 - m3, i3, o3, kernels[3], A3)
            total += tl.where(in3, received[m3], 0)
        tl.store(at + a3 * i4, total.to(gx.dtype.element_ty), mask=live)


# Launching


@lru_cache(maxsize=4096)
def _flat(seen: View) -> View:
    """A plane that is one window, as one axis."""
    if seen.channels_last or not seen.whole:
        return seen
    one, size = Span(1, 1, 1, 0, 0, 1, 0, 0, 1), math.prod(seen.ins)
    spans = (one,) * (LANES - 1) + (Span(size, 1, 1, 0, 0, size, 0, 0, 1),)
    return replace(seen, ins=(1, 1, 1, 1, size), outs=(1,) * LANES, spans=spans)


def send_back(view: View, grad: Tensor, reduction: Accumulation, gx: Tensor) -> None:
    """Gradients of sums and means that `serve` admits."""
    seen = _flat(view)
    single = seen.outs[-1] == 1 and seen.kernels[-1] == seen.ins[-1] and not seen.spans[-1].before
    lanes = 2 * _LANES if single else _LANES
    columns = geometry.block(seen.ins[-1], lanes)
    planes = min(geometry.power(seen.planes), max(1, lanes // columns))
    blocks = -(-seen.planes // planes) * -(-seen.ins[-1] // columns)
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    mean = reduction if isinstance(reduction, Mean) else Mean(divisor=1.0)
    launching.launch(
        spread_kernel, blocks * math.prod(seen.ins[:3]) * seen.outs[3], grad,
        grad, gx, seen.planes, ins, outs, seen.kernels,
        IN=in_width, OUT=out_width, W=geometry.constants(seen.loose), P=planes, C=columns,
        FIXED=seen.outs[-1] if seen.spans[-1].stride == 0 else 0, SINGLE=single,
        MEAN=mean.divisor is None, PADDED=mean.count_include_pad,
        FACTOR=1.0 / (mean.divisor or 1.0), WIDE=geometry.compute(grad.dtype),
    )  # fmt: skip
