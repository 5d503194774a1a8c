"""Gradients of selections whose windows share few inputs and lie in contiguous planes: a program
fills its planes with zeros, then sends the gradient of each window to its winner.

Windows with the same winner are neighbours. The first of them sends the sum of all, in their order:
no input is written by two, and sums are rounded once.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels.gpu import geometry, launching
from torchpool.kernels.gpu.boxes import boxes
from torchpool.kernels.gpu.geometry import View, start_of
from torchpool.kernels.gpu.selection import FEW

_INPUTS = 4096
"""Inputs that a program fills."""
_LANES = 512
_COVERS = 8
_PLANES = 256
"""Planes that are worth a program each, however large they are."""
_SPARSE = 8
"""Inputs per output from which on zeros are most of the work."""


@lru_cache(maxsize=4096)
def serve(seen: View) -> bool:
    """Whether planes are contiguous and enough, and windows large, few, and hardly overlap."""
    few = _SPARSE * math.prod(seen.outs) <= math.prod(seen.ins) and seen.taps > FEW
    many = seen.planes >= _PLANES or math.prod(seen.ins) <= _INPUTS
    return few and many and not seen.channels_last and seen.covers <= _COVERS and seen.regular


@triton.jit
def _coordinates(lane, outs):
    """Of windows that are counted through planes, along the four axes."""
    a3 = lane % outs[3]
    rest = lane // outs[3]
    a2 = rest % outs[2]
    rest = rest // outs[2]
    return rest // outs[1] % outs[0], rest % outs[1], a2, a3


@triton.jit
def _winner(
    state, ins, outs, kernels, a0, a1, a2, a3, lane, live,
    W: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Where in its plane the winner of a window lies."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    offset = tl.load(state + lane, mask=live, other=0).to(tl.int32)
    if WHOLE:
        return offset
    else:
        p3 = start_of(a3, ins[3], outs[3], A3) + offset % kernels[3] * A3[2]
        offset = offset // kernels[3]
        p2 = start_of(a2, ins[2], outs[2], A2) + offset % kernels[2] * A2[2]
        offset = offset // kernels[2]
        p1 = start_of(a1, ins[1], outs[1], A1) + offset % kernels[1] * A1[2]
        p0 = start_of(a0, ins[0], outs[0], A0) + offset // kernels[1] * A0[2]
        return ((p0 * ins[1] + p1) * ins[2] + p2) * ins[3] + p3


@triton.jit
def scatter_kernel(
    grad, state, gx, places, planes, count, stride, total, ins, outs, kernels,
    W: tl.constexpr, B: tl.constexpr, Z: tl.constexpr, WHOLE: tl.constexpr, SHARED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns `stride` inputs: those of `count` planes. SHARED: how many windows along each
    axis see an input; `places` then holds the winners' positions in between."""
    S0: tl.constexpr = SHARED[0]
    S1: tl.constexpr = SHARED[1]
    S2: tl.constexpr = SHARED[2]
    S3: tl.constexpr = SHARED[3]
    begin = tl.program_id(0).to(tl.int64) * stride
    end = tl.minimum(begin + stride, total)
    for first in range(0, stride, Z):
        at = begin + first + tl.arange(0, Z)
        tl.store(gx + at, tl.zeros([Z], gx.dtype.element_ty), mask=at < end)
    o0, o1, o2, o3 = outs[0], outs[1], outs[2], outs[3]
    size = ins[0] * ins[1] * ins[2] * ins[3]
    windows = o0 * o1 * o2 * o3
    head = (tl.program_id(0) * count).to(tl.int64)
    owned = tl.minimum(planes - tl.program_id(0) * count, count) * windows
    ALONE: tl.constexpr = S0 * S1 * S2 * S3 == 1
    if ALONE:
        tl.debug_barrier()
    for first in range(0, owned, B):
        lane = first + tl.arange(0, B)
        live = lane < owned
        a0, a1, a2, a3 = _coordinates(lane, outs)
        place = _winner(
            state + head * windows, ins, outs, kernels, a0, a1, a2, a3, lane, live, W, WHOLE
        )
        if ALONE:
            g = tl.load(grad + head * windows + lane, mask=live, other=0)
            at = gx + begin + (lane // windows * size + place)
            tl.store(at, g.to(gx.dtype.element_ty), mask=live)
        else:
            tl.store(places + head * windows + lane, place, mask=live)
    if not ALONE:
        tl.debug_barrier()
        for first in range(0, owned, B):
            lane = first + tl.arange(0, B)
            live = lane < owned
            a0, a1, a2, a3 = _coordinates(lane, outs)
            own = grad + head * windows + lane
            known = places + head * windows + lane
            place = tl.load(known, mask=live, other=0)
            sum = tl.load(own, mask=live, other=0).to(WIDE)
            owner = live
            for d0 in tl.static_range(1 - S0, S0):
                for d1 in tl.static_range(1 - S1, S1):
                    for d2 in tl.static_range(1 - S2, S2):
                        for d3 in tl.static_range(1 - S3, S3):
                            if d0 != 0 or d1 != 0 or d2 != 0 or d3 != 0:
                                near = live & (a0 + d0 >= 0) & (a0 + d0 < o0)
                                near = near & (a1 + d1 >= 0) & (a1 + d1 < o1)
                                near = near & (a2 + d2 >= 0) & (a2 + d2 < o2)
                                near = near & (a3 + d3 >= 0) & (a3 + d3 < o3)
                                step = ((d0 * o1 + d1) * o2 + d2) * o3 + d3
                                same = near & (tl.load(known + step, mask=near, other=-1) == place)
                                if ((d0 * 16 + d1) * 16 + d2) * 16 + d3 < 0:
                                    owner = owner & (same == 0)
                                else:
                                    sum += tl.load(own + step, mask=same, other=0).to(WIDE)
            at = gx + begin + (lane // windows * size + place)
            tl.store(at, sum.to(gx.dtype.element_ty), mask=owner)


# Launching


def send_back(view: View, grad: Tensor, state: Tensor, gx: Tensor) -> None:
    """Gradients by the inputs of selections that `serve` admits."""
    seen = boxes(view)
    size, windows = math.prod(seen.ins), math.prod(seen.outs)
    count = max(1, 16 // geometry.alignment(size))
    while 2 * count * size <= _INPUTS:
        count *= 2
    shared = tuple(span.covers for span in seen.spans)
    alone = math.prod(shared) == 1
    places = grad.new_empty(0 if alone else seen.outputs, dtype=torch.int32)
    launching.launch(
        scatter_kernel, -(-seen.planes // count), grad,
        grad, state, gx, places, seen.planes, count, count * size, gx.numel(), seen.ins,
        seen.outs, seen.kernels,
        W=geometry.constants(tuple(s._replace(kernel=1, low=0, high=0) for s in seen.spans)),
        B=min(_LANES, geometry.power(count * windows)),
        Z=min(_INPUTS // 2, geometry.power(count * size)),
        WHOLE=seen.whole,
        SHARED=shared, WIDE=geometry.compute(grad.dtype),
    )  # fmt: skip
