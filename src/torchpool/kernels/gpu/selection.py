"""Selections: one input of each window wins; the state is its offset in the window.

Three kernels choose winners: `few` for small windows (lanes are outputs, taps are unrolled), `many`
for large ones (lanes are taps, too), and in `passes` an axis at a time for large overlapping ones.
One sends gradients back, and writes every input once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels.gpu import geometry, launching
from torchpool.kernels.gpu.formulas import formula
from torchpool.kernels.gpu.geometry import (
    View,
    count_inside,
    cover,
    first_tap,
    last_cover,
    own,
    start_of,
    stop_of,
    strided,
    tap_inside,
    taps_of,
    unpack_sizes,
    windows_of,
)
from torchpool.reductions import Selection

ELEMENTS = 1024
"""Elements that a program of four warps writes."""
FEW = 32
"""Windows up to this size are unrolled."""
UNROLLED_COVERS = 16


@triton.jit
def better(v, best, LARGEST: tl.constexpr, FLOAT: tl.constexpr):
    """Whether a later tap wins: first of equals, last of NaNs."""
    wins = v > best if LARGEST else v < best
    if FLOAT:
        wins = wins | (v != v)
    return wins


@triton.jit
def extreme(v, w, LARGEST: tl.constexpr):
    """The larger (or smaller) of two values; NaN if one is."""
    if LARGEST:
        return tl.maximum(v, w, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.minimum(v, w, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _meet(
    v, valid, code, best, key, offset, found,
    KEY: tl.constexpr, LARGEST: tl.constexpr, FLOAT: tl.constexpr, SAVE: tl.constexpr,
    TRACK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One more tap: the value, key and offset of the winner so far. FIRST: there is none yet, and
    the offset is that of the first tap inside."""
    if FIRST and not TRACK:
        best = v
    elif TRACK:
        k = KEY(v)
        take = valid & ((found == 0) | better(k, key, LARGEST, FLOAT))
        best = tl.where(take, v, best)
        key = tl.where(take, k, key)
        offset = tl.where(take, code, offset)
        found = found | valid
    elif SAVE:
        take = better(v, best, LARGEST, FLOAT)
        best = tl.where(take, v, best)
        offset = tl.where(take, code, offset)
    else:
        best = extreme(best, v, LARGEST)
    return best, key, offset, found


@triton.jit
def few_kernel(
    x, y, state, mask, carried, planes, channels, ins, outs, mask_strides,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, T: tl.constexpr, KEY: tl.constexpr,
    LARGEST: tl.constexpr, WORST: tl.constexpr, FLOAT: tl.constexpr, SAVE: tl.constexpr,
    MASKED: tl.constexpr, CARRY: tl.constexpr, TRACK: tl.constexpr, REGULAR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Lanes are outputs. With CARRY every tap brings an offset of its own (`carried`, of x's
    shape), to which the tap is added CARRY times. TRACK remembers whether a tap took part; without
    it, taps outside the input hold the worst value."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    K4: tl.constexpr = A4[0]
    ODD: tl.constexpr = A4[3] % 2
    R: tl.constexpr = T[0] * T[1]
    C: tl.constexpr = T[2]
    plane, a0, a1, a2, a3, a4, first = own(planes, o0, o1, o2, o3, o4, T)
    live = (plane < planes) & (a3 < o3)
    source = x + plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    if CARRY:
        payload = carried + plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    if MASKED:
        n, c = plane // channels, plane % channels
        allowed = mask + n.to(tl.int64) * mask_strides[0] + c.to(tl.int64) * mask_strides[1]
    f0, e0 = start_of(a0, i0, o0, A0), stop_of(a0, i0, o0, A0)
    f1, e1 = start_of(a1, i1, o1, A1), stop_of(a1, i1, o1, A1)
    f2, e2 = start_of(a2, i2, o2, A2), stop_of(a2, i2, o2, A2)
    f3, e3 = start_of(a3, i3, o3, A3), stop_of(a3, i3, o3, A3)
    f4, e4 = start_of(a4, i4, o4, A4), stop_of(a4, i4, o4, A4)
    best = tl.full([R, C], WORST, WIDE)
    key = best
    found = tl.zeros([R, C], tl.int1)
    offset = tl.zeros([R, C], tl.int32)
    if SAVE and not TRACK:  # a window of the worst value has the offset of its first element
        offset += (
            ((first_tap(f0, A0) * A1[0] + first_tap(f1, A1)) * A2[0] + first_tap(f2, A2)) * A3[0]
            + first_tap(f3, A3)
        ) * A4[0] + first_tap(f4, A4)
    PAIRS: tl.constexpr = A4[1] == 2 and A4[2] == 1 and A4[0] > 1 and not TRACK
    for t in tl.static_range(A0[0] * A1[0] * A2[0] * A3[0]):
        p0 = f0 + t // (A1[0] * A2[0] * A3[0]) * A0[2]
        p1 = f1 + t // (A2[0] * A3[0]) % A1[0] * A1[2]
        p2 = f2 + t // A3[0] % A2[0] * A2[2]
        p3 = f3 + t % A3[0] * A3[2]
        here = (
            live
            & tap_inside(p0, e0, t // (A1[0] * A2[0] * A3[0]), A0)
            & tap_inside(p1, e1, t // (A2[0] * A3[0]) % A1[0], A1)
            & tap_inside(p2, e2, t // A3[0] % A2[0], A2)
            & tap_inside(p3, e3, t % A3[0], A3)
        )
        row = (((p0 * i1 + p1) * i2 + p2) * i3 + p3) * i4
        if PAIRS:
            twice = first * 2 + tl.arange(0, 2 * C)[None, :]
            for j in tl.static_range(-ODD, K4, 2):  # even addresses
                at = twice + (j - A4[3])
                inside = here & (twice < 2 * o4)
                if j < A4[4]:
                    inside = inside & (at >= 0)
                if j + 1 >= A4[5]:
                    inside = inside & (at < i4)
                both = tl.load(source + row + at, mask=inside, other=WORST).to(WIDE)
                even, odd = tl.split(tl.reshape(both, [R, C, 2]))
                if j >= 0:
                    best, key, offset, found = _meet(
                        even, True, t * A4[0] + j, best, key, offset, found,
                        KEY, LARGEST, FLOAT, SAVE, TRACK, t + j == 0,
                    )  # fmt: skip
                if j + 1 < A4[0]:
                    best, key, offset, found = _meet(
                        odd, True, t * A4[0] + j + 1, best, key, offset, found,
                        KEY, LARGEST, FLOAT, SAVE, TRACK, t + j + 1 == 0,
                    )  # fmt: skip
        else:
            for j in tl.static_range(K4):
                p4 = f4 + j * A4[2]
                valid = here & (a4 < o4) & tap_inside(p4, e4, j, A4)
                if MASKED:
                    at = strided(p0, p1, p2, p3, p4, mask_strides)
                    valid = valid & (tl.load(allowed + at, mask=valid, other=0) != 0)
                v = tl.load(source + row + p4, mask=valid, other=WORST).to(WIDE)
                code = t * A4[0] + j
                if CARRY:
                    code = code * CARRY + tl.load(payload + row + p4, mask=valid, other=0).to(
                        tl.int32
                    )
                best, key, offset, found = _meet(
                    v, valid, code, best, key, offset, found,
                    KEY, LARGEST, FLOAT, SAVE, TRACK, t + j == 0,
                )  # fmt: skip
    if not REGULAR and not TRACK:
        number = count_inside(f0, e0, A0[0], A0) * count_inside(f1, e1, A1[0], A1)
        number = number * count_inside(f2, e2, A2[0], A2) * count_inside(f3, e3, A3[0], A3)
        found = live & (number * count_inside(f4, e4, A4[0], A4) > 0)
    if TRACK or not REGULAR:
        best = tl.where(found, best, 0)
        offset = tl.where(found, offset, 0)
    at = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4) + (((a0 * o1 + a1) * o2 + a2) * o3 + a3) * o4
    written = live & (a4 < o4)
    tl.store(y + at + a4, best.to(y.dtype.element_ty), mask=written)
    if SAVE:
        tl.store(state + at + a4, offset.to(state.dtype.element_ty), mask=written)


@triton.jit
def find_winner(key, offset, taps, LARGEST: tl.constexpr, WORST: tl.constexpr, FLOAT: tl.constexpr):
    """Key and offset of the winners along the first axis, whatever the order of its entries;
    entries of offset `taps` hold nothing."""
    if LARGEST:
        top = tl.max(tl.where(key == key, key, WORST), 0, keep_dims=True)
    else:
        top = tl.min(tl.where(key == key, key, WORST), 0, keep_dims=True)
    winner = tl.min(tl.where(key == top, offset, taps), 0, keep_dims=True)
    if FLOAT:
        last = tl.max(tl.where(key != key, offset, -1), 0, keep_dims=True)
        winner = tl.where(last >= 0, last, winner)
        top = tl.where(last >= 0, float("nan"), top)
    return top, winner


@triton.jit
def many_kernel(
    x, y, state, mask, total, taps, channels, ins, outs, kernels, mask_strides,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    KEY: tl.constexpr, KEYED: tl.constexpr, LARGEST: tl.constexpr, WORST: tl.constexpr,
    FLOAT: tl.constexpr, SAVE: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Lanes are taps (BT) of outputs (BL). WHOLE: each plane is one window. LAST: channels-last."""
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    lane = tl.program_id(0).to(INDEX) * BL + tl.arange(0, BL)[None, :]
    live = lane < total
    plane, starts, stops = windows_of(lane, ins, outs, IN, OUT, W)
    source = x + plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    if MASKED:
        n, c = plane // channels, plane % channels
        allowed = mask + n.to(tl.int64) * mask_strides[0] + c.to(tl.int64) * mask_strides[1]
    best = tl.full([BT, BL], WORST, WIDE)
    key = best
    offset = tl.zeros([BT, BL], tl.int32) + taps
    for t0 in range(0, taps, BT):
        t = t0 + tl.arange(0, BT)[:, None]
        if WHOLE:
            valid = live & (t < taps)
            at = t * i4 + starts[4] if LAST else t
        else:
            at, inside, p = taps_of(t, starts, stops, ins, kernels, IN, W)
            valid = live & inside
        if MASKED:
            m = strided(p[0], p[1], p[2], p[3], p[4], mask_strides)
            valid = valid & (tl.load(allowed + m, mask=valid, other=0) != 0)
        v = tl.load(source + at, mask=valid, other=WORST).to(WIDE)
        k = KEY(v)
        # The taps of a lane come in their order; a lane that has seen none takes the first.
        take = valid & ((offset == taps) | better(k, key, LARGEST, FLOAT))
        if KEYED:
            best = tl.where(take, v, best)
        key = tl.where(take, k, key)
        offset = tl.where(take, t, offset)
    top, winner = find_winner(key, offset, taps, LARGEST, WORST, FLOAT)
    seen = winner < taps
    if KEYED:  # the value whose key won stands in the lane that holds the winner's offset
        top = tl.sum(tl.where(seen & (offset == winner), best, 0), 0, keep_dims=True)
    tl.store(y + lane, tl.where(seen, top, 0).to(y.dtype.element_ty), mask=live)
    if SAVE:
        tl.store(state + lane, tl.where(seen, winner, 0).to(state.dtype.element_ty), mask=live)


@triton.jit
def backward_kernel(
    grad, state, gx, rest, planes, ins, outs, kernels,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr,
    UNROLL: tl.constexpr, CARRY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Lanes are groups of GROUP neighbouring inputs of a row (0: single inputs whose windows are
    searched), each the sum of what the outputs that chose it send. With CARRY the state holds,
    below the tap times CARRY, offsets that go to `rest` where the input was chosen."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    SIDE: tl.constexpr = GROUP if GROUP > 0 else 1
    R: tl.constexpr = T[0] * T[1]
    C: tl.constexpr = T[2]
    plane, a0, a1, a2, a3, a4, first = own(planes, i0, i1, i2, i3, tl.cdiv(i4, SIDE), T)
    live = (plane < planes) & (a3 < i3)
    base = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    M0: tl.constexpr = A0[8]
    M1: tl.constexpr = A1[8]
    M2: tl.constexpr = A2[8]
    M3: tl.constexpr = A3[8]
    total = tl.zeros([R, C], WIDE)
    other = tl.zeros([R, C], WIDE)
    left = tl.zeros([R, C], tl.int32)
    h0 = last_cover(a0, i0, o0, A0)
    h1 = last_cover(a1, i1, o1, A1)
    h2 = last_cover(a2, i2, o2, A2)
    h3 = last_cover(a3, i3, o3, A3)
    if UNROLL:
        for m in tl.static_range(M0 * M1 * M2 * M3):
            row, code, sent = _sender(
                m, a0, a1, a2, a3, h0, h1, h2, h3, ins, outs, kernels, IN, OUT, W
            )
            total, other, left = _receive(
                grad + base + row * o4, state + base + row * o4, code * kernels[4], live & sent,
                a4, i4, o4, kernels[4], total, other, left, A4, GROUP, CARRY, WIDE,
            )  # fmt: skip
    else:
        for m in range(M0 * M1 * M2 * M3):
            row, code, sent = _sender(
                m, a0, a1, a2, a3, h0, h1, h2, h3, ins, outs, kernels, IN, OUT, W
            )
            total, other, left = _receive(
                grad + base + row * o4, state + base + row * o4, code * kernels[4], live & sent,
                a4, i4, o4, kernels[4], total, other, left, A4, GROUP, CARRY, WIDE,
            )  # fmt: skip
    at = plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4) + (((a0 * i1 + a1) * i2 + a2) * i3 + a3) * i4
    if SIDE == 2:
        column = first * 2 + tl.arange(0, 2 * C)[None, :]
        written = live & (column < i4)
        both = tl.interleave(total, other)
        tl.store(gx + at + column, both.to(gx.dtype.element_ty), mask=written)
    else:
        written = live & (a4 < i4)
        tl.store(gx + at + a4, total.to(gx.dtype.element_ty), mask=written)
        if CARRY:
            tl.store(rest + at + a4, left.to(rest.dtype.element_ty), mask=written)


@triton.jit
def _sender(
    m, a0, a1, a2, a3, h0, h1, h2, h3, ins, outs, kernels,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The m-th row of outputs that may see a row of inputs: its number in the plane, the offset in
    the window of the rows' taps, and whether it does see it."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    b0 = h0 - m // (A1[8] * A2[8] * A3[8])
    b1 = h1 - m // (A2[8] * A3[8]) % A1[8]
    b2 = h2 - m // A3[8] % A2[8]
    b3 = h3 - m % A3[8]
    t0, in0 = cover(a0, b0, i0, o0, kernels[0], A0)
    t1, in1 = cover(a1, b1, i1, o1, kernels[1], A1)
    t2, in2 = cover(a2, b2, i2, o2, kernels[2], A2)
    t3, in3 = cover(a3, b3, i3, o3, kernels[3], A3)
    row = ((b0 * o1 + b1) * o2 + b2) * o3 + b3
    code = ((t0 * kernels[1] + t1) * kernels[2] + t2) * kernels[3] + t3
    return row, code, in0 & in1 & in2 & in3


@triton.jit
def _receive(
    grad, state, code, sent, a4, i4, o4, kernel, total, other, left,
    A: tl.constexpr, GROUP: tl.constexpr, CARRY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What one row of outputs sends to a row of inputs."""
    if GROUP > 0:
        # The outputs at distance d from group q send to its r-th input through tap
        # r + before - d * stride.
        FROM: tl.constexpr = -((A[0] - 1 - A[3]) // GROUP)
        TO: tl.constexpr = (GROUP - 1 + A[3]) // GROUP
        for d in tl.static_range(FROM, TO + 1):
            b4 = a4 + d
            valid = sent & (b4 < o4)
            if d < 0:
                valid = valid & (b4 >= 0)
            chosen = tl.load(state + b4, mask=valid, other=0).to(tl.int32)
            g = tl.load(grad + b4, mask=valid, other=0).to(WIDE)
            if CARRY:
                below = chosen % CARRY
                chosen = chosen // CARRY
            for r in tl.static_range(GROUP):
                if r + A[3] - d * GROUP >= 0 and r + A[3] - d * GROUP < A[0]:
                    mine = chosen == code + (r + A[3] - d * GROUP)
                    if r == 0:
                        total += tl.where(mine, g, 0)
                    else:
                        other += tl.where(mine, g, 0)
                    if CARRY:
                        left = tl.where(mine & valid, below, left)
    else:
        h4 = last_cover(a4, i4, o4, A)
        for m in range(A[8]):
            tap, inside = cover(a4, h4 - m, i4, o4, kernel, A)
            valid = sent & inside & (a4 < i4)
            chosen = tl.load(state + h4 - m, mask=valid, other=0).to(tl.int32)
            if CARRY:
                below = chosen % CARRY
                chosen = chosen // CARRY
            mine = valid & (chosen == code + tap)
            total += tl.load(grad + h4 - m, mask=mine, other=0).to(WIDE)
            if CARRY:
                left = tl.where(mine, below, left)
    return total, other, left


# Launching


def worst(dtype: torch.dtype, largest: bool) -> float | int:
    """The value that loses against every other."""
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    limits = torch.iinfo(dtype)
    return limits.min if largest else limits.max


def compared(dtype: torch.dtype, keyed: bool) -> Any:
    """What values are compared in: themselves, but bfloat16 (and all halves with a key) wider."""
    if dtype == torch.bfloat16 or (dtype == torch.float16 and keyed):
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def _common(x: Tensor, reduction: Selection, save: bool) -> dict[str, Any]:
    kind: Any = type(reduction)
    keyed = kind.key is not Selection.key
    return {
        "KEY": formula(kind, "key"),
        "LARGEST": reduction.largest,
        "WORST": worst(x.dtype, reduction.largest),
        "FLOAT": x.dtype.is_floating_point,
        "SAVE": save,
        "WIDE": compared(x.dtype, keyed),
    }


def few(
    seen: View, x: Tensor, mask: Tensor | None, reduction: Selection, y: Tensor, state: Tensor,
    carried: Tensor | None = None, scale: int = 0,
) -> None:  # fmt: skip
    """Winners of small windows; with `carried` offsets in the winners' own windows are kept below
    the tap, which counts `scale`."""
    owned = geometry.tile(seen.planes, *seen.outs[-2:], ELEMENTS)
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    common = _common(x, reduction, bool(state.numel()))
    keyed = type(reduction).key is not Selection.key
    launching.launch(
        few_kernel, geometry.programs(seen.planes, seen.outs, owned), x,
        x, y, state, x if mask is None else mask, state if carried is None else carried,
        seen.planes, seen.channels, ins, outs, geometry.mask_strides(mask, seen),
        IN=in_width, OUT=out_width, W=geometry.constants(seen.spans), T=tuple(owned),
        MASKED=mask is not None, CARRY=scale if carried is not None else 0,
        TRACK=keyed or mask is not None or carried is not None, REGULAR=seen.regular, **common,
    )  # fmt: skip


def many(
    seen: View, x: Tensor, mask: Tensor | None, reduction: Selection, y: Tensor, state: Tensor
) -> None:
    """Winners of large windows."""
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    lanes, taps = geometry.split(seen, ELEMENTS)
    launching.launch(
        many_kernel, -(-y.numel() // lanes), x,
        x, y, state, x if mask is None else mask, y.numel(), seen.taps, seen.channels, ins, outs,
        seen.kernels, geometry.mask_strides(mask, seen),
        IN=in_width, OUT=out_width, W=geometry.constants(seen.loose), BT=taps, BL=lanes,
        KEYED=type(reduction).key is not Selection.key, MASKED=mask is not None,
        WHOLE=seen.whole and mask is None, LAST=seen.channels_last,
        INDEX=geometry.index(y.numel()), **_common(x, reduction, bool(state.numel())),
    )  # fmt: skip


def send_back(
    seen: View, grad: Tensor, state: Tensor, gx: Tensor, rest: Tensor | None = None, scale: int = 0
) -> None:
    """Sums for every input what the windows that chose it send. With `rest` states are split: the
    tap counts `scale`, what lies below goes to the inputs that were chosen."""
    spans = list(seen.loose)
    group = geometry.group(seen) if rest is None or seen.spans[-1].stride == 1 else 0
    if group:
        spans[-1] = seen.spans[-1]
    columns = -(-seen.ins[-1] // max(1, group))
    sides = (*seen.ins[:-1], columns)
    owned = geometry.tile(seen.planes, seen.ins[-2], columns, ELEMENTS // max(1, group))
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    rows = seen.covers // seen.spans[-1].covers
    launching.launch(
        backward_kernel, geometry.programs(seen.planes, sides, owned), grad,
        grad, state, gx, state if rest is None else rest, seen.planes, ins, outs, seen.kernels,
        IN=in_width, OUT=out_width, W=geometry.constants(spans), T=tuple(owned), GROUP=group,
        UNROLL=rows <= UNROLLED_COVERS, CARRY=scale, WIDE=geometry.compute(grad.dtype),
    )  # fmt: skip
