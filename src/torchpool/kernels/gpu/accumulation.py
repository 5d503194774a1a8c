"""Accumulations: the sum of a reduction's own terms over each window, then its own finish.

Forward, `few` has lanes that are outputs and unrolls small windows, `many` has lanes that are taps,
too, for large ones. What is saved for the backward pass are the anchor and the derivatives of the
value by each sum and by n, so that the backward pass is one gather: every input sums, over the
outputs that see it, grad × derivative × slope of its own term. Where the value is linear in x and
nothing is masked or weighted, the derivatives are computed anew and nothing is saved.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels.gpu import geometry, launching
from torchpool.kernels.gpu.formulas import formula
from torchpool.kernels.gpu.geometry import (
    View,
    count_inside,
    count_padded,
    cover,
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
from torchpool.reductions import Accumulation, Mean, Sum

ELEMENTS = 1024
"""Elements that a program of four warps writes."""
FEW = 32
"""Windows up to this size are unrolled."""
UNROLLED_COVERS = 16
_ANCHORS = {None: 0, "max": 1, "mean": 2}


@triton.jit
def _tap(
    x, at, valid, weights, w_at, mask, m_at,
    READ: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Value (0 unless READ) and weight of taps, and whether they take part: a weight of 0 does
    not."""
    if MASKED:
        valid = valid & (tl.load(mask + m_at, mask=valid, other=0) != 0)
    w = 1.0
    if WEIGHTED:
        w = tl.load(weights + w_at, mask=valid, other=0).to(WIDE)
        valid = valid & (w != 0)
    v = tl.zeros([1, 1], WIDE)
    if READ:
        v = tl.load(x + at, mask=valid, other=0).to(WIDE)
    return v, w, valid


@triton.jit
def _anchor_more(
    v, w, valid, p, anchor, seen,
    KEY: tl.constexpr, ANCHOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The anchor with one more tap: the largest key (NaN wins), or the weighted sum."""
    if ANCHOR == 1:
        k = KEY(v, p)
        anchor = tl.where(valid & ((seen == 0) | (k > anchor) | (k != k)), k, anchor)
        seen = tl.where(valid, 1, seen)
    else:
        anchor += tl.where(valid, w * v, 0)
        seen += tl.where(valid, w + tl.zeros_like(seen), 0)
    return anchor, seen


@triton.jit
def _sums_more(
    v, w, valid, anchor, p, sums, number,
    TERMS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums with one more tap. EXACT: an element that takes no part adds its term of 0."""
    terms = TERMS(v, anchor, p)
    more = ()
    for k in tl.static_range(len(sums)):
        if EXACT:
            more = more + (sums[k] + w * terms[k],)
        else:
            more = more + (sums[k] + tl.where(valid, w * terms[k], 0),)
    return more, number + tl.where(valid, w + tl.zeros_like(number), 0)


@triton.jit
def _count(
    starts, stops, kernels, W: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Elements of windows inside the input, or inside the padded extent."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    if PADDED:
        number = count_padded(starts[0], stops[0], kernels[0], A0)
        number = number * count_padded(starts[1], stops[1], kernels[1], A1)
        number = number * count_padded(starts[2], stops[2], kernels[2], A2)
        number = number * count_padded(starts[3], stops[3], kernels[3], A3)
        return number * count_padded(starts[4], stops[4], kernels[4], A4)
    else:
        number = count_inside(starts[0], stops[0], kernels[0], A0)
        number = number * count_inside(starts[1], stops[1], kernels[1], A1)
        number = number * count_inside(starts[2], stops[2], kernels[2], A2)
        number = number * count_inside(starts[3], stops[3], kernels[3], A3)
        return number * count_inside(starts[4], stops[4], kernels[4], A4)


@triton.jit
def _divisor(
    number, starts, stops, kernels,
    W: tl.constexpr, PADDED: tl.constexpr, DIVISOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """n of windows from the number (or weight) of what took part."""
    if DIVISOR is not None:
        return number * 0.0 + DIVISOR
    elif PADDED:
        padding = _count(starts, stops, kernels, W, True) - _count(starts, stops, kernels, W, False)
        return number + (number * 0.0 + padding)
    else:
        return number


@triton.jit
def _put(
    y, saved, at, written, total, number, n, sums, anchor, p,
    FINISH: tl.constexpr, GRAD: tl.constexpr, LEAST: tl.constexpr, SAVE: tl.constexpr,
    DIVISOR: tl.constexpr,
):  # fmt: skip
    """Finishes windows and writes their values, and (anchor, derivatives by sums and n)."""
    filled = ~(number <= LEAST(p))
    n = tl.where(filled, n, LEAST(p) + 1)
    safe = ()
    for k in tl.static_range(len(sums)):
        safe = safe + (tl.where(filled, sums[k], 1.0),)
    value = FINISH(safe, n, anchor, p)
    tl.store(y + at, tl.where(filled, value, 0).to(y.dtype.element_ty), mask=written)
    if SAVE:
        by_sums, by_n, by_p = GRAD(safe, n, anchor, p)
        tl.store(saved + at, anchor, mask=written)
        for k in tl.static_range(len(sums)):
            slot = saved + (1 + k) * total.to(tl.int64)
            tl.store(slot + at, tl.where(filled, by_sums[k], 0), mask=written)
        by_n = tl.where(filled, by_n, 0) if DIVISOR is None else tl.zeros_like(value)
        tl.store(saved + (1 + len(sums)) * total.to(tl.int64) + at, by_n, mask=written)


@triton.jit
def _put_by_parameter(
    parts, grad, at, written, place, number, n, sums, slopes, anchor, p,
    GRAD: tl.constexpr, LEAST: tl.constexpr, AXIS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes what the windows of a program add to dL/dp, summed along AXIS."""
    filled = ~(number <= LEAST(p))
    n = tl.where(filled, n, LEAST(p) + 1)
    safe = ()
    for k in tl.static_range(len(sums)):
        safe = safe + (tl.where(filled, sums[k], 1.0),)
    by_sums, by_n, by_p = GRAD(safe, n, anchor, p)
    part = by_p + tl.zeros_like(anchor)
    for k in tl.static_range(len(sums)):
        part += by_sums[k] * slopes[k]
    g = tl.load(grad + at, mask=written, other=0).to(WIDE)
    part = tl.sum(tl.where(filled & written, g * part, 0), AXIS, keep_dims=True)
    tl.store(parts + place[0], part, mask=place[1])


@triton.jit
def few_kernel(
    x, y, saved, ps, mask, weights, grad, planes, total, channels, ins, outs, mask_strides,
    weight_strides,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, T: tl.constexpr, KEY: tl.constexpr,
    TERMS: tl.constexpr, FINISH: tl.constexpr, GRAD: tl.constexpr, LEAST: tl.constexpr,
    SLOPES: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr, PARAMETER: tl.constexpr,
    PER_CHANNEL: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    PADDED: tl.constexpr, DIVISOR: tl.constexpr, EXACT: tl.constexpr, SAVE: tl.constexpr,
    BY_PARAMETER: tl.constexpr, READ: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Lanes are outputs. BY_PARAMETER: writes the parts of dL/dp instead of the values."""
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
    n, c = (plane // channels).to(tl.int64), plane % channels
    weight = weights + n * weight_strides[0] + c * weight_strides[1]
    allowed = mask + n * mask_strides[0] + c * mask_strides[1]
    p = tl.zeros([1, 1], WIDE)
    if PARAMETER:
        channel = (a4 if LAST else c) if PER_CHANNEL else c * 0
        p = tl.load(ps + channel, mask=channel < (o4 if LAST else channels), other=1).to(WIDE)
    f0, e0 = start_of(a0, i0, o0, A0), stop_of(a0, i0, o0, A0)
    f1, e1 = start_of(a1, i1, o1, A1), stop_of(a1, i1, o1, A1)
    f2, e2 = start_of(a2, i2, o2, A2), stop_of(a2, i2, o2, A2)
    f3, e3 = start_of(a3, i3, o3, A3), stop_of(a3, i3, o3, A3)
    f4, e4 = start_of(a4, i4, o4, A4), stop_of(a4, i4, o4, A4)
    anchor = tl.zeros([R, C], WIDE)
    number = tl.zeros([R, C], WIDE)
    sums = ()
    slopes = ()
    for k in tl.static_range(SUMS):
        sums = sums + (tl.zeros([R, C], WIDE),)
        slopes = slopes + (tl.zeros([R, C], WIDE),)
    PAIRS: tl.constexpr = (
        A4[1] == 2 and A4[2] == 1 and A4[0] > 1 and READ and not MASKED and not WEIGHTED
    )
    for turn in tl.static_range(0 if ANCHOR else 1, 2):
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
                    both = tl.load(source + row + at, mask=inside, other=0).to(WIDE)
                    pair = tl.split(tl.reshape(both, [R, C, 2]))
                    for side in tl.static_range(2):
                        if j + side >= 0 and j + side < A4[0]:
                            p4 = f4 + (j + side)
                            valid = here & (a4 < o4) & tap_inside(p4, e4, j + side, A4)
                            if turn == 0:
                                anchor, number = _anchor_more(
                                    pair[side], 1.0, valid, p, anchor, number, KEY, ANCHOR, WIDE
                                )
                            else:
                                if BY_PARAMETER:
                                    slopes, _ = _sums_more(
                                        pair[side], 1.0, valid, anchor, p, slopes, number,
                                        SLOPES, False, WIDE,
                                    )  # fmt: skip
                                sums, number = _sums_more(
                                    pair[side], 1.0, valid, anchor, p, sums, number,
                                    TERMS, EXACT, WIDE,
                                )  # fmt: skip
            else:
                for j in tl.static_range(K4):
                    p4 = f4 + j * A4[2]
                    valid = here & (a4 < o4) & tap_inside(p4, e4, j, A4)
                    v, w, valid = _tap(
                        source, row + p4, valid,
                        weight, strided(p0, p1, p2, p3, p4, weight_strides),
                        allowed, strided(p0, p1, p2, p3, p4, mask_strides),
                        READ, WEIGHTED, MASKED, WIDE,
                    )  # fmt: skip
                    if turn == 0:
                        anchor, number = _anchor_more(
                            v, w, valid, p, anchor, number, KEY, ANCHOR, WIDE
                        )
                    else:
                        if BY_PARAMETER:
                            slopes, _ = _sums_more(
                                v, w, valid, anchor, p, slopes, number, SLOPES, False, WIDE
                            )
                        sums, number = _sums_more(
                            v, w, valid, anchor, p, sums, number, TERMS, EXACT, WIDE
                        )
        if turn == 0:
            if ANCHOR == 2:
                anchor = anchor / tl.where(number != 0, number, 1)
            number = tl.zeros([R, C], WIDE)
    starts, stops = (f0, f1, f2, f3, f4), (e0, e1, e2, e3, e4)
    kernels = (A0[0], A1[0], A2[0], A3[0], A4[0])
    if not MASKED and not WEIGHTED:
        number = tl.zeros([R, C], WIDE) + _count(starts, stops, kernels, W, False)
    n = _divisor(number, starts, stops, kernels, W, PADDED, DIVISOR, WIDE)
    at = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4) + (((a0 * o1 + a1) * o2 + a2) * o3 + a3) * o4
    written = live & (a4 < o4)
    if BY_PARAMETER:
        if LAST:  # (program's rows, channel)
            block = tl.program_id(0) // tl.cdiv(o4, C)
            place = (block.to(tl.int64) * o4 + a4, a4 < o4)
        else:  # (channels first: plane and row of outputs, block of columns)
            line = ((plane.to(tl.int64) * o0 + a0) * o1 + a1) * o2 + a2
            line = (line * o3 + a3) * tl.cdiv(o4, C) + first // C
            place = (line, live)
        _put_by_parameter(
            y, grad, at + a4, written, place, number, n, sums, slopes, anchor, p,
            GRAD, LEAST, 0 if LAST else 1, WIDE,
        )  # fmt: skip
    else:
        _put(
            y, saved, at + a4, written, total, number, n, sums, anchor, p,
            FINISH, GRAD, LEAST, SAVE, DIVISOR,
        )  # fmt: skip


@triton.jit
def many_kernel(
    x, y, saved, ps, mask, weights, grad, total, taps, channels, ins, outs, kernels,
    mask_strides, weight_strides,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    KEY: tl.constexpr, TERMS: tl.constexpr, FINISH: tl.constexpr, GRAD: tl.constexpr,
    LEAST: tl.constexpr, SLOPES: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr,
    PARAMETER: tl.constexpr, PER_CHANNEL: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr, PADDED: tl.constexpr, DIVISOR: tl.constexpr, EXACT: tl.constexpr,
    SAVE: tl.constexpr, BY_PARAMETER: tl.constexpr, WHOLE: tl.constexpr, READ: tl.constexpr,
    WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Lanes are taps (BT) of outputs (BL). WHOLE: each plane is one window."""
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    lane = tl.program_id(0).to(INDEX) * BL + tl.arange(0, BL)[None, :]
    live = lane < total
    plane, starts, stops = windows_of(lane, ins, outs, IN, OUT, W)
    source = x + plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    n, c = (plane // channels).to(tl.int64), plane % channels
    weight = weights + n * weight_strides[0] + c * weight_strides[1]
    allowed = mask + n * mask_strides[0] + c * mask_strides[1]
    p = tl.zeros([1, 1], WIDE)
    if PARAMETER:
        channel = (starts[4] if LAST else c) if PER_CHANNEL else c * 0
        p = tl.load(ps + channel, mask=live, other=1).to(WIDE)
    anchor = tl.zeros([BT, BL], WIDE)
    number = tl.zeros([BT, BL], WIDE)
    if ANCHOR:
        for t0 in range(0, taps, BT):
            v, w, valid = _block_of_taps(
                t0, source, weight, allowed, live, taps, starts, stops, ins, kernels,
                weight_strides, mask_strides, IN, W, BT, WHOLE, LAST, READ, WEIGHTED, MASKED, WIDE,
            )  # fmt: skip
            anchor, number = _anchor_more(v, w, valid, p, anchor, number, KEY, ANCHOR, WIDE)
        if ANCHOR == 1:
            nan = tl.max((anchor != anchor).to(tl.int32), 0, keep_dims=True)
            usable = (number != 0) & (anchor == anchor)
            any_usable = tl.max(usable.to(tl.int32), 0, keep_dims=True)
            anchor = tl.max(tl.where(usable, anchor, float("-inf")), 0, keep_dims=True)
            anchor = tl.where(any_usable != 0, anchor, 0)
            anchor = tl.where(nan != 0, float("nan"), anchor)
        else:
            weighed = tl.sum(number, 0, keep_dims=True)
            anchor = tl.sum(anchor, 0, keep_dims=True) / tl.where(weighed != 0, weighed, 1)
        number = tl.zeros([BT, BL], WIDE)
    else:
        anchor = tl.zeros([1, BL], WIDE)
    sums = ()
    slopes = ()
    for k in tl.static_range(SUMS):
        sums = sums + (tl.zeros([BT, BL], WIDE),)
        slopes = slopes + (tl.zeros([BT, BL], WIDE),)
    for t0 in range(0, taps, BT):
        v, w, valid = _block_of_taps(
            t0, source, weight, allowed, live, taps, starts, stops, ins, kernels,
            weight_strides, mask_strides, IN, W, BT, WHOLE, LAST, READ, WEIGHTED, MASKED, WIDE,
        )  # fmt: skip
        if BY_PARAMETER:
            slopes, _ = _sums_more(v, w, valid, anchor, p, slopes, number, SLOPES, False, WIDE)
        sums, number = _sums_more(v, w, valid, anchor, p, sums, number, TERMS, EXACT, WIDE)
    reduced = ()
    reduced_slopes = ()
    for k in tl.static_range(SUMS):
        reduced = reduced + (tl.sum(sums[k], 0, keep_dims=True),)
        reduced_slopes = reduced_slopes + (tl.sum(slopes[k], 0, keep_dims=True),)
    number = tl.sum(number, 0, keep_dims=True)
    m = _divisor(number, starts, stops, kernels, W, PADDED, DIVISOR, WIDE)
    if BY_PARAMETER:
        _put_by_parameter(
            y, grad, lane, live, (lane, live), number, m, reduced, reduced_slopes, anchor, p,
            GRAD, LEAST, 0, WIDE,
        )  # fmt: skip
    else:
        _put(
            y, saved, lane, live, total, number, m, reduced, anchor, p,
            FINISH, GRAD, LEAST, SAVE, DIVISOR,
        )  # fmt: skip


@triton.jit
def _block_of_taps(
    t0, source, weight, allowed, live, taps, starts, stops, ins, kernels, weight_strides,
    mask_strides,
    IN: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, WHOLE: tl.constexpr, LAST: tl.constexpr,
    READ: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t = t0 + tl.arange(0, BT)[:, None]
    if WHOLE:
        at = t * (ins[4] * IN) + starts[4] if LAST else t
        return _tap(
            source, at, live & (t < taps), weight, 0, allowed, 0, READ, WEIGHTED, MASKED, WIDE
        )
    else:
        at, inside, p = taps_of(t, starts, stops, ins, kernels, IN, W)
        return _tap(
            source, at, live & inside, weight,
            strided(p[0], p[1], p[2], p[3], p[4], weight_strides), allowed,
            strided(p[0], p[1], p[2], p[3], p[4], mask_strides), READ, WEIGHTED, MASKED, WIDE,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    grad, x, gx, gw, saved, ps, mask, weights, planes, outputs, channels, ins, outs, kernels,
    mask_strides, weight_strides,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, T: tl.constexpr, GROUP: tl.constexpr,
    UNROLL: tl.constexpr, TERMS: tl.constexpr, SLOPES: tl.constexpr, FACTOR: tl.constexpr,
    CLOSED: tl.constexpr, LINEAR: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr,
    PARAMETER: tl.constexpr, PER_CHANNEL: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr, PADDED: tl.constexpr, TO_X: tl.constexpr, TO_WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Lanes are groups of GROUP neighbouring inputs of a row (0: single inputs whose windows are
    searched). The derivatives of the values are FACTOR where they are the same everywhere, 1 / n
    where CLOSED, else read from `saved`."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    SIDE: tl.constexpr = GROUP if GROUP > 0 else 1
    R: tl.constexpr = T[0] * T[1]
    C: tl.constexpr = T[2]
    ROWS: tl.constexpr = A0[8] * A1[8] * A2[8] * A3[8]
    plane, a0, a1, a2, a3, a4, first = own(planes, i0, i1, i2, i3, tl.cdiv(i4, SIDE), T)
    live = (plane < planes) & (a3 < i3)
    at = plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4) + (((a0 * i1 + a1) * i2 + a2) * i3 + a3) * i4
    base = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    n, c = (plane // channels).to(tl.int64), plane % channels
    p = tl.zeros([1, 1], WIDE)
    if PARAMETER:
        channel = (a4 if LAST else c) if PER_CHANNEL else c * 0
        p = tl.load(ps + channel, mask=channel < (i4 if LAST else channels), other=1).to(WIDE)
    column = first * SIDE + tl.arange(0, SIDE * C)[None, :]
    written = live & (column < i4)
    value = tl.zeros([R, SIDE * C], WIDE)
    if not LINEAR or TO_WEIGHTS:
        value = tl.load(x + at + column, mask=written, other=0).to(WIDE)
    values = _sides(value, SIDE, R, C)
    received = _nothing(SIDE, R, C, WIDE)
    weighing = _nothing(SIDE, R, C, WIDE)
    h0 = last_cover(a0, i0, o0, A0)
    h1 = last_cover(a1, i1, o1, A1)
    h2 = last_cover(a2, i2, o2, A2)
    h3 = last_cover(a3, i3, o3, A3)
    if UNROLL:
        for m in tl.static_range(ROWS):
            received, weighing = _from_row(
                m, grad, saved, base, outputs, live, a0, a1, a2, a3, a4, h0, h1, h2, h3, values, p,
                received, weighing, ins, outs, kernels, IN, OUT, W, GROUP, TERMS, SLOPES, FACTOR,
                CLOSED, LINEAR, ANCHOR, SUMS, PADDED, TO_X, TO_WEIGHTS, WIDE,
            )  # fmt: skip
    else:
        for m in range(ROWS):
            received, weighing = _from_row(
                m, grad, saved, base, outputs, live, a0, a1, a2, a3, a4, h0, h1, h2, h3, values, p,
                received, weighing, ins, outs, kernels, IN, OUT, W, GROUP, TERMS, SLOPES, FACTOR,
                CLOSED, LINEAR, ANCHOR, SUMS, PADDED, TO_X, TO_WEIGHTS, WIDE,
            )  # fmt: skip
    takes_part = written
    w = 1.0
    if MASKED:
        where = strided(a0, a1, a2, a3, column, mask_strides)
        where += n * mask_strides[0] + c * mask_strides[1]
        takes_part = takes_part & (tl.load(mask + where, mask=written, other=0) != 0)
    if WEIGHTED:
        where = strided(a0, a1, a2, a3, column, weight_strides)
        where += n * weight_strides[0] + c * weight_strides[1]
        w = tl.load(weights + where, mask=written, other=0).to(WIDE)
        takes_part = takes_part & (w != 0)
    if TO_X:
        total = _joined(received, SIDE) * w
        if MASKED or WEIGHTED:
            total = tl.where(takes_part, total, 0)
        tl.store(gx + at + column, total.to(gx.dtype.element_ty), mask=written)
    if TO_WEIGHTS:
        total = tl.where(takes_part, _joined(weighing, SIDE), 0)
        tl.store(gw + at + column, total, mask=written)


@triton.jit
def _sides(value, SIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """A row as its groups' members."""
    if SIDE == 2:
        even, odd = tl.split(tl.reshape(value, [R, C, 2]))
        return (even, odd)
    else:
        return (value,)


@triton.jit
def _nothing(SIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    if SIDE == 2:
        return (tl.zeros([R, C], WIDE), tl.zeros([R, C], WIDE))
    else:
        return (tl.zeros([R, C], WIDE),)


@triton.jit
def _joined(sides, SIDE: tl.constexpr):
    """The groups' members as a row."""
    if SIDE == 2:
        return tl.interleave(sides[0], sides[1])
    else:
        return sides[0]


@triton.jit
def _from_row(
    m, grad, saved, base, outputs, live, a0, a1, a2, a3, a4, h0, h1, h2, h3, values, p, received,
    weighing, ins, outs, kernels,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr,
    TERMS: tl.constexpr, SLOPES: tl.constexpr, FACTOR: tl.constexpr, CLOSED: tl.constexpr,
    LINEAR: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr, PADDED: tl.constexpr,
    TO_X: tl.constexpr, TO_WEIGHTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the m-th row of outputs that may see a row of inputs sends to it."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
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
    sent = live & in0 & in1 & in2 & in3
    at = base + (((b0 * o1 + b1) * o2 + b2) * o3 + b3) * o4
    rows = _row_count(b0, b1, b2, b3, ins, outs, kernels, IN, OUT, W, PADDED)
    if GROUP > 0:
        # The outputs at distance d from group q see its r-th input through tap
        # r + before - d * stride.
        FROM: tl.constexpr = -((A4[0] - 1 - A4[3]) // GROUP)
        TO: tl.constexpr = (GROUP - 1 + A4[3]) // GROUP
        for d in tl.static_range(FROM, TO + 1):
            b4 = a4 + d
            valid = sent & (b4 < o4) & (b4 >= 0) if d < 0 else sent & (b4 < o4)
            for r in tl.static_range(GROUP):
                if r + A4[3] - d * GROUP >= 0 and r + A4[3] - d * GROUP < A4[0]:
                    gx, gw = _from_output(
                        grad, saved, at + b4, outputs, valid, rows, b4, i4, o4, kernels[4],
                        values[r], p, A4, TERMS, SLOPES, FACTOR, CLOSED, LINEAR, ANCHOR, SUMS,
                        PADDED, TO_X, TO_WEIGHTS, WIDE,
                    )  # fmt: skip
                    received = _added(received, gx, r)
                    weighing = _added(weighing, gw, r)
    else:
        h4 = last_cover(a4, i4, o4, A4)
        for m4 in range(A4[8]):
            tap, inside = cover(a4, h4 - m4, i4, o4, kernels[4], A4)
            gx, gw = _from_output(
                grad, saved, at + h4 - m4, outputs, sent & inside & (a4 < i4), rows, h4 - m4, i4,
                o4, kernels[4], values[0], p, A4, TERMS, SLOPES, FACTOR, CLOSED, LINEAR, ANCHOR,
                SUMS, PADDED, TO_X, TO_WEIGHTS, WIDE,
            )  # fmt: skip
            received = _added(received, gx, 0)
            weighing = _added(weighing, gw, 0)
    return received, weighing


@triton.jit
def _added(sides, more, r: tl.constexpr):
    if r == 1:
        return (sides[0], sides[1] + more)
    elif len(sides) == 2:
        return (sides[0] + more, sides[1])
    else:
        return (sides[0] + more,)


@triton.jit
def _row_count(
    b0, b1, b2, b3, ins, outs, kernels,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Elements of windows along all axes but the last."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    number = axis_count(b0, ins[0], outs[0], kernels[0], A0, PADDED)
    number = number * axis_count(b1, ins[1], outs[1], kernels[1], A1, PADDED)
    number = number * axis_count(b2, ins[2], outs[2], kernels[2], A2, PADDED)
    return number * axis_count(b3, ins[3], outs[3], kernels[3], A3, PADDED)


@triton.jit
def axis_count(b, size, outs, kernel, A: tl.constexpr, PADDED: tl.constexpr):
    start, stop = start_of(b, size, outs, A), stop_of(b, size, outs, A)
    if PADDED:
        return count_padded(start, stop, kernel, A)
    else:
        return count_inside(start, stop, kernel, A)


@triton.jit
def _from_output(
    grad, saved, at, outputs, valid, rows, b4, i4, o4, kernel, v, p,
    A: tl.constexpr, TERMS: tl.constexpr, SLOPES: tl.constexpr, FACTOR: tl.constexpr,
    CLOSED: tl.constexpr, LINEAR: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr,
    PADDED: tl.constexpr, TO_X: tl.constexpr, TO_WEIGHTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What one output sends to the input v and to its weight."""
    g = tl.load(grad + at, mask=valid, other=0).to(WIDE)
    gw = tl.zeros_like(g)
    if FACTOR is not None:
        gx = g * FACTOR
    elif CLOSED:
        # 1 / n as the share of a row times the share of a column: one division for each.
        columns = axis_count(b4, i4, o4, kernel, A, PADDED)
        one = tl.zeros([1, 1], WIDE) + 1.0
        gx = g * ((one / tl.maximum(rows, 1)) * (one / tl.maximum(columns, 1)))
    else:
        size = outputs.to(tl.int64)
        anchor = tl.zeros_like(g)
        if ANCHOR:
            anchor = tl.load(saved + at, mask=valid, other=0)
        slopes = SLOPES(v, anchor, p)
        terms = slopes
        if TO_WEIGHTS:
            terms = TERMS(v, anchor, p)
        gx = tl.zeros_like(g)
        for k in tl.static_range(SUMS):
            by_sum = tl.load(saved + (1 + k) * size + at, mask=valid, other=0)
            gx += by_sum * slopes[k]
            gw += by_sum * terms[k]
        gx = tl.where(valid, g * gx, 0)
        if TO_WEIGHTS:
            gw += tl.load(saved + (1 + SUMS) * size + at, mask=valid, other=0)
            gw = tl.where(valid, g * gw, 0)
    return gx, gw


# Launching


class Problem(NamedTuple):
    """An accumulation over given tensors: what forward and backward share."""

    seen: View
    x: Tensor | None
    """None where the values do not matter: derivatives of a linear reduction."""
    mask: Tensor | None
    weights: Tensor | None
    params: Tensor | None
    reduction: Accumulation
    compute: torch.dtype

    @property
    def is_bare(self) -> bool:
        """Whether every element inside the input counts 1."""
        return self.mask is None and self.weights is None

    @property
    def has_closed_form(self) -> bool:
        """Whether the derivative of every value is 1 or 1 / n with n known from the geometry."""
        return self.is_bare and type(self.reduction) in (Sum, Mean)

    @property
    def factor(self) -> float | None:
        """The derivative of every value by every element, where that is one number, known when a
        kernel is compiled."""
        if not self.has_closed_form:
            return None
        if isinstance(self.reduction, Sum):
            return 1.0
        assert isinstance(self.reduction, Mean)
        if self.reduction.divisor is not None:
            return 1.0 / self.reduction.divisor
        padded = self.reduction.count_include_pad
        full = all(
            (padded or span.low == 0) and span.high >= span.kernel for span in self.seen.spans
        )
        return 1.0 / self.seen.taps if full and self.seen.taps <= FEW else None

    def common(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        kind: Any = type(self.reduction)
        mean = self.reduction if isinstance(self.reduction, Mean) else Mean()
        return {
            "TERMS": formula(kind, "lift"),
            "ANCHOR": _ANCHORS[self.reduction.anchor],
            "SUMS": self.reduction.num_sums,
            "PARAMETER": self.params is not None,
            "PER_CHANNEL": self.params is not None and self.params.numel() > 1,
            "LAST": self.seen.channels_last,
            "MASKED": self.mask is not None,
            "WEIGHTED": self.weights is not None,
            "PADDED": mean.count_include_pad,
            "WIDE": geometry.compute(self.compute),
        }


def forward(problem: Problem, y: Tensor, saved: Tensor | None, grad: Tensor | None = None) -> None:
    """Values of all windows into y, and what the backward pass needs into `saved` (num_sums + 2,
    outputs in the memory order of y); with grad instead the parts of dL/dp into y."""
    seen, x, mask, weights, params, reduction, _ = problem
    kind: Any = type(reduction)
    outputs = seen.planes * math.prod(seen.outs)
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    shared = {
        **problem.common(),
        "IN": in_width,
        "OUT": out_width,
        "KEY": formula(kind, "key"),
        "FINISH": formula(kind, "finish"),
        "GRAD": formula(kind, "finish_grad"),
        "LEAST": formula(kind, "least"),
        "SLOPES": formula(kind, "lift" if grad is None else "lift_dp"),
        "DIVISOR": reduction.divisor if isinstance(reduction, Mean) else None,
        "EXACT": reduction.linear,
        "SAVE": saved is not None,
        "BY_PARAMETER": grad is not None,
        "READ": x is not None,
    }
    tensors = [y if t is None else t for t in (saved, params, mask, weights, grad)]
    arguments = (y if x is None else x, y, *tensors)
    steps = (geometry.mask_strides(mask, seen), geometry.mask_strides(weights, seen))
    if uses_few(seen):
        owned = few_tile(problem)
        launching.launch(
            few_kernel, geometry.programs(seen.planes, seen.outs, owned), y,
            *arguments, seen.planes, outputs, seen.channels, ins, outs, *steps,
            W=geometry.constants(seen.spans), T=tuple(owned), **shared,
        )  # fmt: skip
        return
    lanes, taps = geometry.split(seen, ELEMENTS)
    launching.launch(
        many_kernel, -(-outputs // lanes), y,
        *arguments, outputs, seen.taps, seen.channels, ins, outs, seen.kernels, *steps,
        W=geometry.constants(seen.loose), BT=taps, BL=lanes,
        WHOLE=seen.whole and problem.is_bare, INDEX=geometry.index(outputs), **shared,
    )  # fmt: skip


def uses_few(seen: View) -> bool:
    """Whether windows are unrolled."""
    return seen.taps <= FEW


def few_tile(problem: Problem) -> geometry.Tile:
    """The outputs that a program of `few_kernel` owns: fewer where formulas need registers."""
    elements = ELEMENTS if problem.reduction.linear else ELEMENTS // 2
    return geometry.tile(problem.seen.planes, *problem.seen.outs[-2:], elements)


def backward(
    problem: Problem, grad: Tensor, saved: Tensor | None, gx: Tensor | None, gw: Tensor | None
) -> None:
    """Gradients by x into gx, by weights into gw (of x's shape and layout)."""
    seen, x, mask, weights, params, reduction, _ = problem
    kind: Any = type(reduction)
    anywhere = gx if gx is not None else gw
    assert anywhere is not None
    spans = list(seen.loose)
    group = geometry.group(seen)
    if group:
        spans[-1] = seen.spans[-1]
    columns = -(-seen.ins[-1] // max(1, group))
    owned = geometry.tile(seen.planes, seen.ins[-2], columns, ELEMENTS // 2)
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    tensors = [anywhere if t is None else t for t in (x, gx, gw, saved, params, mask, weights)]
    launching.launch(
        backward_kernel, geometry.programs(seen.planes, (*seen.ins[:-1], columns), owned), grad,
        grad, *tensors, seen.planes, grad.numel(), seen.channels, ins, outs, seen.kernels,
        geometry.mask_strides(mask, seen), geometry.mask_strides(weights, seen),
        IN=in_width, OUT=out_width, W=geometry.constants(spans), T=tuple(owned), GROUP=group,
        UNROLL=seen.covers // seen.spans[-1].covers <= UNROLLED_COVERS,
        SLOPES=formula(kind, "lift_dx"), FACTOR=problem.factor, CLOSED=saved is None,
        LINEAR=reduction.linear, TO_X=gx is not None, TO_WEIGHTS=gw is not None,
        **problem.common(),
    )  # fmt: skip


def by_parameter(problem: Problem, grad: Tensor) -> Tensor:
    """dL/dp, (1,) or (C,). Each program writes the sum of its windows' parts, which are then added
    in a fixed order."""
    seen, params = problem.seen, problem.params
    assert params is not None
    columns = seen.outs[-1]
    if not uses_few(seen):
        shape: tuple[int, ...] = (seen.planes, math.prod(seen.outs[:-1]), columns)
    elif seen.channels_last:
        owned = few_tile(problem)
        rows = geometry.programs(seen.planes, seen.outs, owned) // -(-columns // owned.columns)
        shape = (rows, 1, columns)
    else:
        blocks = -(-columns // few_tile(problem).columns)
        shape = (seen.planes, math.prod(seen.outs[:-1]), blocks)
    parts = torch.empty(shape, dtype=problem.compute, device=grad.device)
    forward(problem, parts, None, grad)
    if params.numel() == 1:
        return parts.sum().reshape(1)
    return parts.sum((0, 1)) if seen.channels_last else _by_channel(parts, seen)


def _by_channel(parts: Tensor, seen: View) -> Tensor:
    return parts.reshape(-1, seen.channels, *parts.shape[1:]).sum((0, 2, 3))
