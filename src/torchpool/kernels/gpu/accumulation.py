"""Accumulations: the sum of a reduction's own terms over each window, then its own finish.

`few` has lanes that are outputs and unrolls small windows, `many` has lanes that are taps, too, for
large ones. What is saved for the backward pass (`gathering`) are the anchor and the derivatives of
the value by each sum and by n. Where the value is linear in x and nothing is masked or weighted,
the derivatives are computed anew and nothing is saved.
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
    lanes_of,
    reach_of,
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
