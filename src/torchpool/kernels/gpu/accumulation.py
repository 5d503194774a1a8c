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
from torchpool.kernels.gpu.formulas import form, formula, moving
from torchpool.kernels.gpu.geometry import (
    View,
    count_inside,
    count_padded,
    cover,
    lanes_of,
    last_cover,
    own,
    reach_of,
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
ROWS_OF_A_LANE = 4
"""Neighbouring windows that share what they read."""
_ANCHORS = {None: 0, "max": 1, "mean": 2}
_BEFORE = tl.constexpr((0.0, float("-inf"), 0.0))
"""Each kind of anchor before the first tap."""


@triton.jit
def _tap(
    x, live, valid, weights, w_at, mask, m_at,
    READ: tl.constexpr, WEIGHTED: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Value (0 unless READ) and weight of the taps at x, and whether they take part: a weight of 0
    does not. Lanes that are not live read nothing."""
    if MASKED:
        valid = valid & (tl.load(mask + m_at, mask=live & valid, other=0) != 0)
    w = 1.0
    if WEIGHTED:
        w = tl.load(weights + w_at, mask=live & valid, other=0).to(WIDE)
        valid = valid & (w != 0)
    v = tl.zeros([1, 1], WIDE)
    if READ:
        v = tl.load(x, mask=live & valid, other=0).to(WIDE)
    return v, w, valid


@triton.jit
def _anchor_more(
    v, w, valid, p, anchor, seen,
    KEY: tl.constexpr, ANCHOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The anchor with one more tap: the largest key (NaN wins), or the weighted sum."""
    if ANCHOR == 1:
        k = tl.where(valid, KEY(v, p), float("-inf"))
        anchor = tl.maximum(anchor, k, propagate_nan=tl.PropagateNan.ALL)
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
    """Finishes windows and writes their values, and the rows SAVE of (anchor, derivatives by sums
    and by n)."""
    filled = ~(number <= LEAST(p))
    n = tl.where(filled, n, LEAST(p) + 1)
    safe = ()
    for k in tl.static_range(len(sums)):
        safe = safe + (tl.where(filled, sums[k], 1.0),)
    value = FINISH(safe, n, anchor, p)
    tl.store(y + at, tl.where(filled, value, 0).to(y.dtype.element_ty), mask=written)
    if len(SAVE):
        by_sums, by_n, by_p = GRAD(safe, n, anchor, p)
        rows = (anchor,)
        for k in tl.static_range(len(sums)):
            rows = rows + (tl.where(filled, by_sums[k], 0),)
        by_n = tl.where(filled, by_n, 0) if DIVISOR is None else tl.zeros_like(value)
        rows = rows + (by_n,)
        for k in tl.static_range(len(SAVE)):
            tl.store(saved + SAVE[k] * total.to(tl.int64) + at, rows[SAVE[k]], mask=written)


@triton.jit
def _put_by_parameter(
    parts, grad, at, written, number, n, sums, slopes, anchor, p,
    GRAD: tl.constexpr, LEAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes what each window adds to dL/dp."""
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
    tl.store(parts + at, tl.where(filled, g * part, 0), mask=written)


@triton.jit
def few_kernel(
    x, y, saved, ps, mask, weights, grad, planes, total, channels, ins, outs, mask_strides,
    weight_strides, divisors,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, V: tl.constexpr, ALONG: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ONES: tl.constexpr, KEY: tl.constexpr,
    TERMS: tl.constexpr, FINISH: tl.constexpr, GRAD: tl.constexpr, LEAST: tl.constexpr,
    SLOPES: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr, PARAMETER: tl.constexpr,
    PER_CHANNEL: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    PADDED: tl.constexpr, DIVISOR: tl.constexpr, EXACT: tl.constexpr, SAVE: tl.constexpr,
    BY_PARAMETER: tl.constexpr, READ: tl.constexpr, FACTOR: tl.constexpr, CLOSED: tl.constexpr,
    WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A lane owns HEIGHT windows along the axis ALONG (2 or 3) times WIDTH along the last; V are
    the spans of single windows, in W stands what they look at together. Every element is read once;
    without an anchor the sum of a row goes to all windows that see it. The value is the sum times
    FACTOR where that is known, the sum / n where CLOSED. BY_PARAMETER: writes the parts of dL/dp
    instead."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    S: tl.constexpr = V[ALONG]
    SIZE: tl.constexpr = S[0]
    STEP: tl.constexpr = S[1] if HEIGHT > 1 else 0
    Q: tl.constexpr = V[4]
    K4: tl.constexpr = Q[0]
    LONG: tl.constexpr = A4[0]
    ASIDE: tl.constexpr = Q[1] if WIDTH > 1 else 0
    DEEP: tl.constexpr = 1 if ALONG == 2 else A2[0]
    OUTER: tl.constexpr = A0[0] * A1[0] * DEEP
    TALL: tl.constexpr = A2[0] if ALONG == 2 else A3[0]
    INNER: tl.constexpr = A3[0] if ALONG == 2 else 1
    PAIRS: tl.constexpr = (
        A4[1] > 0 and A4[1] % 2 == 0 and A4[2] == 1 and LONG > 1 and IN % 2 == 0
        and READ and not MASKED and not WEIGHTED and not LAST
    )  # fmt: skip
    ODD: tl.constexpr = A4[3] % 2
    KEEP: tl.constexpr = ANCHOR != 0 or BY_PARAMETER
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    b2 = tl.cdiv(o2, HEIGHT) if ALONG == 2 else o2
    b3 = tl.cdiv(o3, HEIGHT) if ALONG == 3 else o3
    b4 = tl.cdiv(o4, WIDTH)
    plane, a0, a1, a2, a3, a4 = lanes_of(
        o0, o1, b2, b3, b4, divisors, ROWS, COLUMNS, LAST, ONES, INDEX
    )
    live = plane < planes
    if LAST:
        live = live & (a4 < o4)
    source = x + plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    n, c = (plane // channels).to(tl.int64), plane % channels
    weight = weights + n * weight_strides[0] + c * weight_strides[1]
    allowed = mask + n * mask_strides[0] + c * mask_strides[1]
    p = tl.zeros([1, 1], WIDE)
    if PARAMETER:
        channel = (a4 if LAST else c) if PER_CHANNEL else c * 0
        p = tl.load(ps + channel, mask=channel < (o4 if LAST else channels), other=1).to(WIDE)
    f0, e0 = reach_of(a0, i0, o0, divisors[0], divisors[1], A0, INDEX)
    f1, e1 = reach_of(a1, i1, o1, divisors[2], divisors[3], A1, INDEX)
    f2, e2 = reach_of(a2, i2, b2, divisors[4], divisors[5], A2, INDEX)
    f3, e3 = reach_of(a3, i3, b3, divisors[6], divisors[7], A3, INDEX)
    f4, e4 = reach_of(a4, i4, b4, divisors[8], divisors[9], A4, INDEX)
    nothing = tl.zeros([ROWS, COLUMNS], WIDE)
    none = ()
    for k in tl.static_range(SUMS):
        none = none + (nothing,)
    sums = ()
    numbers = ()
    for k in tl.static_range(HEIGHT * WIDTH):
        sums = sums + (none,)
        numbers = numbers + (nothing,)
    empty_row = ()
    empty_count = ()
    for c in tl.static_range(WIDTH):
        empty_row = empty_row + (none,)
        empty_count = empty_count + (nothing,)
    start = source + (((f0 * i1 + f1) * i2 + f2) * i3 + f3) * i4
    line = start + f4
    pair = start
    if PAIRS:
        pair = start + A4[1] * a4 + tl.arange(0, 2)[None, :]
    kept = ()
    for t in tl.static_range(OUTER):
        p0, p1 = f0 + t // (A1[0] * DEEP) * A0[2], f1 + t // DEEP % A1[0] * A1[2]
        outer = tap_inside(p0, e0, t // (A1[0] * DEEP), A0)
        outer = outer & tap_inside(p1, e1, t // DEEP % A1[0], A1)
        p2 = f2
        p3 = f3
        if ALONG == 3:
            p2 = f2 + t % DEEP * A2[2]
            outer = outer & tap_inside(p2, e2, t % DEEP, A2)
        rows = ()
        counts = ()
        for r in tl.static_range(TALL):
            if ALONG == 2:
                p2 = f2 + r * A2[2]
                across = outer & tap_inside(p2, e2, r, A2)
            else:
                p3 = f3 + r * A3[2]
                across = outer & tap_inside(p3, e3, r, A3)
            row = empty_row
            count = empty_count
            for u in tl.static_range(INNER):
                here = across
                if ALONG == 2:
                    p3 = f3 + u * A3[2]
                    here = here & tap_inside(p3, e3, u, A3)
                    below = r * A2[2] * i3 + u * A3[2]
                else:
                    below = t % DEEP * A2[2] * i3 + r * A3[2]
                above = t // (A1[0] * DEEP) * A0[2] * i1 + t // DEEP % A1[0] * A1[2]
                step = (above * i2 * i3 + below) * i4
                taps = ()
                if PAIRS:
                    for j in tl.static_range(-ODD, LONG, 2):  # even addresses
                        at = A4[1] * a4 + tl.arange(0, 2)[None, :]
                        inside = live & here
                        if j < A4[4]:
                            inside = inside & (at >= A4[3] - j)
                        if j + 1 >= A4[5]:
                            inside = inside & (at < i4 + (A4[3] - j))
                        both = tl.load(pair + step + (j - A4[3]), mask=inside, other=0).to(WIDE)
                        sides = tl.split(tl.reshape(both, [ROWS, COLUMNS, 2]))
                        for s in tl.static_range(2):
                            if j + s >= 0 and j + s < LONG:
                                valid = here & tap_inside(f4 + (j + s), e4, j + s, A4)
                                taps = taps + ((sides[s], 1.0, valid),)
                else:
                    for j in tl.static_range(LONG):
                        p4 = f4 + j * A4[2]
                        v, w, valid = _tap(
                            line + step + j * A4[2], live, here & tap_inside(p4, e4, j, A4),
                            weight, strided(p0, p1, p2, p3, p4, weight_strides),
                            allowed, strided(p0, p1, p2, p3, p4, mask_strides),
                            READ, WEIGHTED, MASKED, WIDE,
                        )  # fmt: skip
                        taps = taps + ((v, w, valid),)
                if KEEP:
                    kept = kept + taps
                else:
                    more = ()
                    counted = ()
                    for c in tl.static_range(WIDTH):
                        part = row[c]
                        number = count[c]
                        for j in tl.static_range(K4):
                            tap = taps[c * ASIDE + j]
                            part, number = _sums_more(
                                tap[0], tap[1], tap[2], nothing, p, part, number,
                                TERMS, EXACT, WIDE,
                            )  # fmt: skip
                        more = more + (part,)
                        counted = counted + (number,)
                    row = more
                    count = counted
            rows = rows + (row,)
            counts = counts + (count,)
        if not KEEP:
            more = ()
            weighed = ()
            for o in tl.static_range(HEIGHT):
                for c in tl.static_range(WIDTH):
                    window = sums[o * WIDTH + c]
                    number = numbers[o * WIDTH + c]
                    for r in tl.static_range(SIZE):
                        window = _added(window, rows[o * STEP + r][c])
                        number += counts[o * STEP + r][c]
                    more = more + (window,)
                    weighed = weighed + (number,)
            sums = more
            numbers = weighed
    kernels = (V[0][0], V[1][0], V[2][0], V[3][0], K4)
    base = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    base += (
        ((a0 * o1 + a1) * o2 + (a2 * HEIGHT if ALONG == 2 else a2)) * o3
        + (a3 * HEIGHT if ALONG == 3 else a3)
    ) * o4 + a4 * WIDTH
    for o in tl.static_range(HEIGHT):
        g2 = f2 + o * STEP if ALONG == 2 else f2
        g3 = f3 + o * STEP if ALONG == 3 else f3
        stops = (e0, e1, e2, e3, e4)
        inside = live & ((a2 * HEIGHT + o < o2) if ALONG == 2 else (a3 * HEIGHT + o < o3))
        for c in tl.static_range(WIDTH):
            starts = (f0, f1, g2, g3, f4 + c * ASIDE)
            at = base + (o * (o3 * o4 if ALONG == 2 else o4) + c)
            written = inside
            if WIDTH > 1:
                written = written & (a4 * WIDTH + c < o4)
            window = sums[o * WIDTH + c]
            if FACTOR is not None:
                tl.store(y + at, (window[0] * FACTOR).to(y.dtype.element_ty), mask=written)
            elif CLOSED:
                m = tl.maximum(_count(starts, stops, kernels, V, PADDED), 1)
                tl.store(y + at, (window[0] / m).to(y.dtype.element_ty), mask=written)
            else:
                anchor = nothing + _BEFORE[ANCHOR]
                slopes = none
                number = numbers[o * WIDTH + c]
                if ANCHOR:
                    for t in tl.static_range(OUTER):
                        for r in tl.static_range(SIZE * INNER):
                            for j in tl.static_range(K4):
                                tap = kept[
                                    ((t * TALL + o * STEP) * INNER + r) * LONG + c * ASIDE + j
                                ]
                                anchor, number = _anchor_more(
                                    tap[0], tap[1], tap[2], p, anchor, number, KEY, ANCHOR, WIDE
                                )
                    if ANCHOR == 2:
                        anchor = anchor / tl.where(number != 0, number, 1)
                    number = nothing
                if KEEP:
                    for t in tl.static_range(OUTER):
                        for r in tl.static_range(SIZE * INNER):
                            for j in tl.static_range(K4):
                                tap = kept[
                                    ((t * TALL + o * STEP) * INNER + r) * LONG + c * ASIDE + j
                                ]
                                if BY_PARAMETER:
                                    slopes, _ = _sums_more(
                                        tap[0], tap[1], tap[2], anchor, p, slopes, number,
                                        SLOPES, False, WIDE,
                                    )  # fmt: skip
                                window, number = _sums_more(
                                    tap[0], tap[1], tap[2], anchor, p, window, number,
                                    TERMS, EXACT, WIDE,
                                )  # fmt: skip
                if not MASKED and not WEIGHTED:
                    number = nothing + _count(starts, stops, kernels, V, False)
                m = _divisor(number, starts, stops, kernels, V, PADDED, DIVISOR, WIDE)
                if BY_PARAMETER:
                    _put_by_parameter(
                        y, grad, at, written, number, m, window, slopes, anchor, p,
                        GRAD, LEAST, WIDE,
                    )  # fmt: skip
                else:
                    _put(
                        y, saved, at, written, total, number, m, window, anchor, p,
                        FINISH, GRAD, LEAST, SAVE, DIVISOR,
                    )  # fmt: skip


@triton.jit
def _added(values, more):
    """Two tuples, element by element."""
    both = ()
    for k in tl.static_range(len(values)):
        both = both + (values[k] + more[k],)
    return both


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
    anchor = tl.full([BT, BL], _BEFORE[ANCHOR], WIDE)
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
            y, grad, lane, live, number, m, reduced, reduced_slopes, anchor, p, GRAD, LEAST, WIDE
        )
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
            source + at, live, live & (t < taps), weight, 0, allowed, 0,
            READ, WEIGHTED, MASKED, WIDE,
        )  # fmt: skip
    else:
        at, inside, p = taps_of(t, starts, stops, ins, kernels, IN, W)
        return _tap(
            source + at, live, live & inside, weight,
            strided(p[0], p[1], p[2], p[3], p[4], weight_strides), allowed,
            strided(p[0], p[1], p[2], p[3], p[4], mask_strides), READ, WEIGHTED, MASKED, WIDE,
        )  # fmt: skip


@triton.jit
def near_kernel(
    grad, x, gx, gw, saved, ps, mask, weights, planes, outputs, channels, ins, outs,
    mask_strides, weight_strides, divisors,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, ALONG: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ONES: tl.constexpr, OUTER: tl.constexpr, UNROLL: tl.constexpr,
    TERMS: tl.constexpr, SLOPES: tl.constexpr, FACTOR: tl.constexpr,
    CLOSED: tl.constexpr, LINEAR: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr,
    PARAMETER: tl.constexpr, PER_CHANNEL: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr, PADDED: tl.constexpr, TO_X: tl.constexpr, TO_WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A lane owns HEIGHT inputs along the axis ALONG times WIDTH along the next one, whose windows
    have places that are known when this is compiled; along the axes before it windows are
    searched. Each output is read once. The derivatives of the values are FACTOR where they are the
    same everywhere, 1 / n where CLOSED, else read from `saved`."""
    R: tl.constexpr = W[ALONG]
    Q: tl.constexpr = W[ALONG + 1]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    if LAST:
        s2, s3, s4 = tl.cdiv(i2, HEIGHT), tl.cdiv(i3, WIDTH), i4
    else:
        s2, s3, s4 = i2, tl.cdiv(i3, HEIGHT), tl.cdiv(i4, WIDTH)
    plane, a0, a1, a2, a3, a4 = lanes_of(
        i0, i1, s2, s3, s4, divisors, ROWS, COLUMNS, LAST, ONES, INDEX
    )
    live = plane < planes
    at = plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    start = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    if LAST:
        live = live & (a4 < s4)
        r, q, tall, wide = a2 * (HEIGHT // R[1]), a3 * (WIDTH // Q[1]), i2, i3
        first, second = a2 * HEIGHT, a3 * WIDTH
        at += (((a0 * i1 + a1) * i2 + first) * i3 + second) * i4 + a4
        start += (r * o3 + q) * o4 + a4
    else:
        r, q, tall, wide = a3 * (HEIGHT // R[1]), a4 * (WIDTH // Q[1]), i3, i4
        first, second = a3 * HEIGHT, a4 * WIDTH
        at += (((a0 * i1 + a1) * i2 + a2) * i3 + first) * i4 + second
        start += r * o4 + q
    line = i3 * i4 if LAST else i4
    beside = i4 if LAST else 1
    n, c = (plane // channels).to(tl.int64), plane % channels
    p = tl.zeros([1, 1], WIDE)
    if PARAMETER:
        channel = (a4 if LAST else c) if PER_CHANNEL else c * 0
        p = tl.load(ps + channel, mask=channel < (i4 if LAST else channels), other=1).to(WIDE)
    values = ()
    received = ()
    weighing = ()
    for u in tl.static_range(HEIGHT):
        for s in tl.static_range(WIDTH):
            v = tl.zeros([1, 1], WIDE)
            if not LINEAR or TO_WEIGHTS:
                inside = live & (first + u < tall) & (second + s < wide)
                v = tl.load(x + at + (u * line + s * beside), mask=inside, other=0).to(WIDE)
            values = values + (v,)
            received = received + (tl.zeros([ROWS, COLUMNS], WIDE),)
            weighing = weighing + (tl.zeros([ROWS, COLUMNS], WIDE),)
    if UNROLL:
        for m in tl.static_range(OUTER):
            received, weighing = _from_plane(
                m, grad, saved, start, outputs, live, a0, a1, a2, r, q, values, p,
                received, weighing, ins, outs, IN, OUT, W, R, Q, HEIGHT, WIDTH, TERMS, SLOPES,
                FACTOR, CLOSED, ANCHOR, SUMS, LAST, PADDED, TO_WEIGHTS, WIDE,
            )  # fmt: skip
    else:
        for m in range(OUTER):
            received, weighing = _from_plane(
                m, grad, saved, start, outputs, live, a0, a1, a2, r, q, values, p,
                received, weighing, ins, outs, IN, OUT, W, R, Q, HEIGHT, WIDTH, TERMS, SLOPES,
                FACTOR, CLOSED, ANCHOR, SUMS, LAST, PADDED, TO_WEIGHTS, WIDE,
            )  # fmt: skip
    weight = weights + n * weight_strides[0] + c * weight_strides[1]
    allowed = mask + n * mask_strides[0] + c * mask_strides[1]
    for u in tl.static_range(HEIGHT):
        here = live & (first + u < tall)
        if WIDTH == 2 and not LAST and IN % 2 == 0 and not MASKED and not WEIGHTED:
            both = tl.reshape(tl.join(received[2 * u], received[2 * u + 1]), [ROWS, 2 * COLUMNS])
            pair = gx + at + u * line + tl.arange(0, 2)[None, :]
            tl.store(pair, both.to(gx.dtype.element_ty), mask=here & (second < wide))
        else:
            for s in tl.static_range(WIDTH):
                written = here & (second + s < wide)
                takes_part = written
                total = received[u * WIDTH + s]
                if LAST:
                    p2, p3, p4 = first + u, second + s, a4
                else:
                    p2, p3, p4 = a2, first + u, second + s
                if MASKED:
                    there = allowed + strided(a0, a1, p2, p3, p4, mask_strides)
                    takes_part = takes_part & (tl.load(there, mask=written, other=0) != 0)
                if WEIGHTED:
                    there = weight + strided(a0, a1, p2, p3, p4, weight_strides)
                    w = tl.load(there, mask=written, other=0).to(WIDE)
                    takes_part = takes_part & (w != 0)
                    total = total * w
                to = at + (u * line + s * beside)
                if TO_X:
                    if MASKED or WEIGHTED:
                        total = tl.where(takes_part, total, 0)
                    tl.store(gx + to, total.to(gx.dtype.element_ty), mask=written)
                if TO_WEIGHTS:
                    total = tl.where(takes_part, weighing[u * WIDTH + s], 0)
                    tl.store(gw + to, total, mask=written)


@triton.jit
def _from_plane(
    m, grad, saved, start, outputs, live, a0, a1, a2, r, q, values, p, received, weighing, ins,
    outs,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
    HEIGHT: tl.constexpr, SIDE: tl.constexpr, TERMS: tl.constexpr, SLOPES: tl.constexpr,
    FACTOR: tl.constexpr, CLOSED: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr,
    LAST: tl.constexpr, PADDED: tl.constexpr, TO_WEIGHTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the m-th position of the outputs along the searched axes sends to the inputs."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    FIRST: tl.constexpr = -((R[0] - 1 - R[3]) // R[1])
    FINAL: tl.constexpr = (HEIGHT - 1 + R[3]) // R[1]
    LEFT: tl.constexpr = -((Q[0] - 1 - Q[3]) // Q[1])
    RIGHT: tl.constexpr = (SIDE - 1 + Q[3]) // Q[1]
    DEEP: tl.constexpr = 1 if LAST else A2[8]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    b0 = last_cover(a0, i0, o0, A0) - m // (A1[8] * DEEP)
    b1 = last_cover(a1, i1, o1, A1) - m // DEEP % A1[8]
    t0, in0 = cover(a0, b0, i0, o0, A0[0], A0)
    t1, in1 = cover(a1, b1, i1, o1, A1[0], A1)
    index = b0 * o1 + b1
    sent = live & in0 & in1
    number = axis_count(b0, i0, o0, A0[0], A0, PADDED) * axis_count(b1, i1, o1, A1[0], A1, PADDED)
    if LAST:
        index = index * (o2 * o3 * o4)
        rows, columns, reach, tall, wide = o2, o3, o4, i2, i3
    else:
        b2 = last_cover(a2, i2, o2, A2) - m % DEEP
        t2, in2 = cover(a2, b2, i2, o2, A2[0], A2)
        sent = sent & in2
        number = number * axis_count(b2, i2, o2, A2[0], A2, PADDED)
        index = (index * o2 + b2) * (o3 * o4)
        rows, columns, reach, tall, wide = o3, o4, 1, i3, i4
    for d in tl.static_range(FIRST, FINAL + 1):
        there = sent & (r + d < rows)
        if d < 0:
            there = there & (r + d >= 0)
        row_number = number * axis_count(r + d, tall, rows, R[0], R, PADDED)
        for e in tl.static_range(LEFT, RIGHT + 1):
            valid = there & (q + e < columns)
            if e < 0:
                valid = valid & (q + e >= 0)
            message = _message(
                grad, saved, start + (index + (d * columns + e) * reach), outputs, valid,
                row_number, axis_count(q + e, wide, columns, Q[0], Q, PADDED),
                FACTOR, CLOSED, ANCHOR, SUMS, TO_WEIGHTS, WIDE,
            )  # fmt: skip
            more = ()
            weighed = ()
            for u in tl.static_range(HEIGHT):
                for s in tl.static_range(SIDE):
                    a = received[u * SIDE + s]
                    b = weighing[u * SIDE + s]
                    if (
                        u + R[3] - d * R[1] >= 0 and u + R[3] - d * R[1] < R[0]
                        and s + Q[3] - e * Q[1] >= 0 and s + Q[3] - e * Q[1] < Q[0]
                    ):  # fmt: skip
                        gx, gw = _taken(
                            message, valid, values[u * SIDE + s], p,
                            TERMS, SLOPES, FACTOR, CLOSED, SUMS, TO_WEIGHTS,
                        )  # fmt: skip
                        a += gx
                        if TO_WEIGHTS:
                            b += gw
                    more = more + (a,)
                    weighed = weighed + (b,)
            received = more
            weighing = weighed
    return received, weighing


@triton.jit
def search_kernel(
    grad, x, gx, gw, saved, ps, mask, weights, planes, outputs, channels, ins, outs, kernels,
    mask_strides, weight_strides,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
    UNROLL: tl.constexpr, TERMS: tl.constexpr, SLOPES: tl.constexpr, FACTOR: tl.constexpr,
    CLOSED: tl.constexpr, LINEAR: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr,
    PARAMETER: tl.constexpr, PER_CHANNEL: tl.constexpr, LAST: tl.constexpr, MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr, PADDED: tl.constexpr, TO_X: tl.constexpr, TO_WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Lanes are inputs, whose windows are searched along every axis. Derivatives: see
    `near_kernel`."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    R: tl.constexpr = T[0] * T[1]
    C: tl.constexpr = T[2]
    COVERS: tl.constexpr = A0[8] * A1[8] * A2[8] * A3[8]
    plane, a0, a1, a2, a3, a4, first = own(planes, i0, i1, i2, i3, i4, T)
    live = (plane < planes) & (a3 < i3) & (a4 < i4)
    at = plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    at += (((a0 * i1 + a1) * i2 + a2) * i3 + a3) * i4 + a4
    base = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    n, c = (plane // channels).to(tl.int64), plane % channels
    p = tl.zeros([1, 1], WIDE)
    if PARAMETER:
        channel = (a4 if LAST else c) if PER_CHANNEL else c * 0
        p = tl.load(ps + channel, mask=channel < (i4 if LAST else channels), other=1).to(WIDE)
    v = tl.zeros([1, 1], WIDE)
    if not LINEAR or TO_WEIGHTS:
        v = tl.load(x + at, mask=live, other=0).to(WIDE)
    received = tl.zeros([R, C], WIDE)
    weighing = tl.zeros([R, C], WIDE)
    h0 = last_cover(a0, i0, o0, A0)
    h1 = last_cover(a1, i1, o1, A1)
    h2 = last_cover(a2, i2, o2, A2)
    h3 = last_cover(a3, i3, o3, A3)
    if UNROLL:
        for k in tl.static_range(COVERS):
            received, weighing = _from_row(
                k, grad, saved, base, outputs, live, a0, a1, a2, a3, a4, h0, h1, h2, h3, v, p,
                received, weighing, ins, outs, kernels, IN, OUT, W, TERMS, SLOPES, FACTOR,
                CLOSED, ANCHOR, SUMS, PADDED, TO_WEIGHTS, WIDE,
            )  # fmt: skip
    else:
        for k in range(COVERS):
            received, weighing = _from_row(
                k, grad, saved, base, outputs, live, a0, a1, a2, a3, a4, h0, h1, h2, h3, v, p,
                received, weighing, ins, outs, kernels, IN, OUT, W, TERMS, SLOPES, FACTOR,
                CLOSED, ANCHOR, SUMS, PADDED, TO_WEIGHTS, WIDE,
            )  # fmt: skip
    takes_part = live
    w = 1.0
    if MASKED:
        where = strided(a0, a1, a2, a3, a4, mask_strides)
        where += n * mask_strides[0] + c * mask_strides[1]
        takes_part = takes_part & (tl.load(mask + where, mask=live, other=0) != 0)
    if WEIGHTED:
        where = strided(a0, a1, a2, a3, a4, weight_strides)
        where += n * weight_strides[0] + c * weight_strides[1]
        w = tl.load(weights + where, mask=live, other=0).to(WIDE)
        takes_part = takes_part & (w != 0)
    if TO_X:
        total = received * w
        if MASKED or WEIGHTED:
            total = tl.where(takes_part, total, 0)
        tl.store(gx + at, total.to(gx.dtype.element_ty), mask=live)
    if TO_WEIGHTS:
        tl.store(gw + at, tl.where(takes_part, weighing, 0), mask=live)


@triton.jit
def _from_row(
    m, grad, saved, base, outputs, live, a0, a1, a2, a3, a4, h0, h1, h2, h3, v, p, received,
    weighing, ins, outs, kernels,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr,
    TERMS: tl.constexpr, SLOPES: tl.constexpr, FACTOR: tl.constexpr, CLOSED: tl.constexpr,
    ANCHOR: tl.constexpr, SUMS: tl.constexpr, PADDED: tl.constexpr, TO_WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
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
    rows = axis_count(b0, i0, o0, kernels[0], A0, PADDED)
    rows = rows * axis_count(b1, i1, o1, kernels[1], A1, PADDED)
    rows = rows * axis_count(b2, i2, o2, kernels[2], A2, PADDED)
    rows = rows * axis_count(b3, i3, o3, kernels[3], A3, PADDED)
    h4 = last_cover(a4, i4, o4, A4)
    for k in range(A4[8]):
        b4 = h4 - k
        tap, inside = cover(a4, b4, i4, o4, kernels[4], A4)
        message = _message(
            grad, saved, at + b4, outputs, sent & inside, rows,
            axis_count(b4, i4, o4, kernels[4], A4, PADDED),
            FACTOR, CLOSED, ANCHOR, SUMS, TO_WEIGHTS, WIDE,
        )  # fmt: skip
        gx, gw = _taken(
            message, sent & inside, v, p, TERMS, SLOPES, FACTOR, CLOSED, SUMS, TO_WEIGHTS
        )
        received += gx
        weighing += gw
    return received, weighing


@triton.jit
def axis_count(b, size, outs, kernel, A: tl.constexpr, PADDED: tl.constexpr):
    start, stop = start_of(b, size, outs, A), stop_of(b, size, outs, A)
    if PADDED:
        return count_padded(start, stop, kernel, A)
    else:
        return count_inside(start, stop, kernel, A)


@triton.jit
def _message(
    grad, saved, at, outputs, valid, rows, columns,
    FACTOR: tl.constexpr, CLOSED: tl.constexpr, ANCHOR: tl.constexpr, SUMS: tl.constexpr,
    TO_WEIGHTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What one output has for the inputs that it sees: the same for all of them where that is known
    (n is `rows` × `columns`), its anchor, and its gradient times the derivatives by its sums SUMS
    and by n."""
    g = tl.load(grad + at, mask=valid, other=0).to(WIDE)
    anchor = tl.zeros_like(g)
    derivatives = ()
    by_n = tl.zeros_like(g)
    if FACTOR is not None:
        g = g * FACTOR
    elif CLOSED:
        # 1 / n as the share of a row times the share of a column: one division for each.
        one = tl.zeros([1, 1], WIDE) + 1.0
        g = g * ((one / tl.maximum(rows, 1)) * (one / tl.maximum(columns, 1)))
    else:
        size = outputs.to(tl.int64)
        if ANCHOR:
            anchor = tl.load(saved + at, mask=valid, other=0)
        for k in tl.static_range(len(SUMS)):
            by_sum = tl.load(saved + (1 + SUMS[k]) * size + at, mask=valid, other=0)
            derivatives = derivatives + (g * by_sum,)
        if TO_WEIGHTS:  # then through all sums
            by_n = g * tl.load(saved + (1 + len(SUMS)) * size + at, mask=valid, other=0)
    return g, anchor, derivatives, by_n


@triton.jit
def _taken(
    message, valid, v, p,
    TERMS: tl.constexpr, SLOPES: tl.constexpr, FACTOR: tl.constexpr, CLOSED: tl.constexpr,
    SUMS: tl.constexpr, TO_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """What of a message goes to the input v and to its weight."""
    gx = message[0]
    gw = tl.zeros_like(gx)
    if FACTOR is None and not CLOSED:
        slopes = SLOPES(v, message[1], p)
        gx = tl.zeros_like(gx)
        for k in tl.static_range(len(SUMS)):
            gx += message[2][k] * slopes[SUMS[k]]
        gx = tl.where(valid, gx, 0)
        if TO_WEIGHTS:
            terms = TERMS(v, message[1], p)
            for k in tl.static_range(len(SUMS)):
                gw += message[2][k] * terms[SUMS[k]]
            gw = tl.where(valid, gw + message[3], 0)
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
        if self.seen.taps > FEW or not self.seen.full(self.reduction.count_include_pad):
            return None
        return 1.0 / self.seen.taps

    @property
    def sums(self) -> tuple[int, ...]:
        """Through which sums gradients come: by weights through all."""
        kind: Any = type(self.reduction)
        return moving(kind) if self.weights is None else tuple(range(kind.num_sums))

    @property
    def rows(self) -> tuple[int, ...]:
        """What is saved of the anchor, the derivatives by each sum and that by n."""
        anchor = () if self.reduction.anchor is None else (0,)
        by_n = () if self.weights is None else (1 + self.reduction.num_sums,)
        return (*anchor, *(1 + k for k in self.sums), *by_n)

    def formula(self, name: str) -> Any:
        """A formula of the reduction, in the form for its parameter. Derivatives by weights read
        every term, which the forms for known parameters leave out."""
        kind: Any = type(self.reduction)
        known = self.params if self.weights is None else None
        return formula(kind, name, form(self.reduction, known, self.compute))

    def common(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        mean = self.reduction if isinstance(self.reduction, Mean) else Mean()
        return {
            "TERMS": self.formula("lift"),
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
    outputs = seen.planes * math.prod(seen.outs)
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    shared = {
        **problem.common(),
        "IN": in_width,
        "OUT": out_width,
        "KEY": problem.formula("key"),
        "FINISH": problem.formula("finish"),
        "GRAD": problem.formula("finish_grad"),
        "LEAST": problem.formula("least"),
        "SLOPES": problem.formula("lift" if grad is None else "lift_dp"),
        "DIVISOR": reduction.divisor if isinstance(reduction, Mean) else None,
        "EXACT": reduction.linear,
        "SAVE": () if saved is None else problem.rows,
        "BY_PARAMETER": grad is not None,
        "READ": x is not None,
    }
    tensors = [y if t is None else t for t in (saved, params, mask, weights, grad)]
    arguments = (y if x is None else x, y, *tensors)
    steps = (geometry.mask_strides(mask, seen), geometry.mask_strides(weights, seen))
    if seen.taps <= FEW:
        most = (ROWS_OF_A_LANE, 2) if reduction.anchor is None else (ROWS_OF_A_LANE // 2, 1)
        most = most if grad is None else (1, 1)
        owned = geometry.lanes_of_windows(seen, y.element_size(), *most)
        spans = list(seen.spans)
        spans[owned.along] = geometry.block_span(seen, owned.along, owned.height)
        spans[4] = geometry.block_span(seen, 4, owned.width)
        deal = geometry.dealt(seen.planes, seen.outs, owned, seen.channels_last)
        launching.launch(
            few_kernel, deal.programs, y,
            *arguments, seen.planes, outputs, seen.channels, ins, outs, *steps, deal.divisors,
            W=geometry.constants(spans), V=geometry.constants(seen.spans), **deal.constants,
            CLOSED=problem.has_closed_form and saved is None and x is not None,
            FACTOR=problem.factor if saved is None and x is not None else None, **shared,
        )  # fmt: skip
        return
    lanes, taps = geometry.split(seen, ELEMENTS)
    launching.launch(
        many_kernel, -(-outputs // lanes), y,
        *arguments, outputs, seen.taps, seen.channels, ins, outs, seen.kernels, *steps,
        W=geometry.constants(seen.loose), BT=taps, BL=lanes,
        WHOLE=seen.whole and problem.is_bare, INDEX=geometry.index(outputs), **shared,
    )  # fmt: skip


def backward(
    problem: Problem, grad: Tensor, saved: Tensor | None, gx: Tensor | None, gw: Tensor | None
) -> None:
    """Gradients by x into gx, by weights into gw (of x's shape and layout)."""
    seen, x, mask, weights, params, reduction, _ = problem
    anywhere = gx if gx is not None else gw
    assert anywhere is not None
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    tensors = [anywhere if t is None else t for t in (x, gx, gw, saved, params, mask, weights)]
    sizes = (seen.planes, grad.numel(), seen.channels, ins, outs)
    steps = (geometry.mask_strides(mask, seen), geometry.mask_strides(weights, seen))
    shared = {
        **problem.common(),
        "IN": in_width, "OUT": out_width, "SLOPES": problem.formula("lift_dx"),
        "SUMS": problem.sums,
        "FACTOR": problem.factor, "CLOSED": saved is None, "LINEAR": reduction.linear,
        "TO_X": gx is not None, "TO_WEIGHTS": gw is not None,
    }  # fmt: skip
    most = ROWS_OF_A_LANE if reduction.linear else 2
    owned = geometry.lanes_of_inputs(seen, grad.element_size(), most)
    if owned is not None:
        deal = geometry.dealt(seen.planes, seen.ins, owned, seen.channels_last)
        outer = math.prod(span.covers for span in seen.spans[: owned.along])
        launching.launch(
            near_kernel, deal.programs, grad, grad, *tensors, *sizes, *steps, deal.divisors,
            W=geometry.constants(seen.spans), OUTER=outer,
            UNROLL=seen.covers <= UNROLLED_COVERS, **deal.constants, **shared,
        )  # fmt: skip
        return
    tile = geometry.tile(seen.planes, *seen.ins[-2:], ELEMENTS // 2)
    launching.launch(
        search_kernel, geometry.programs(seen.planes, seen.ins, tile), grad,
        grad, *tensors, *sizes, seen.kernels, *steps,
        W=geometry.constants(seen.loose), T=tuple(tile),
        UNROLL=seen.covers // seen.spans[-1].covers <= UNROLLED_COVERS, **shared,
    )  # fmt: skip


def by_parameter(problem: Problem, grad: Tensor) -> Tensor:
    """dL/dp, (1,) or (C,): what each window adds, then added in a fixed order."""
    seen, params = problem.seen, problem.params
    assert params is not None
    shape = (seen.planes, math.prod(seen.outs[:-1]), seen.outs[-1])
    parts = torch.empty(shape, dtype=problem.compute, device=grad.device)
    forward(problem, parts, None, grad)
    if params.numel() == 1:
        return parts.sum().reshape(1)
    return parts.sum((0, 1)) if seen.channels_last else _by_channel(parts, seen)


def _by_channel(parts: Tensor, seen: View) -> Tensor:
    return parts.reshape(-1, seen.channels, *parts.shape[1:]).sum((0, 2, 3))
