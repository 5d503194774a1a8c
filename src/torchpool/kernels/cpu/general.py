"""Any accumulation from its own formulas, forward and backward.

Work goes tap by tap over *tap rows*: the element that tap (j0, j1, j2, j3) finds in each window of
an output row, side by side in memory, with its weight (0 where the
window has no such element). Geometry, layout, dtype and masks end there; the formulas then run over
contiguous rows. Where rows are
short, those of several planes make one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu import formulas, threads
from torchpool.kernels.cpu import plan as plans
from torchpool.kernels.cpu.formulas import (
    anchor,
    finish,
    finish_grad,
    key,
    least,
    lift,
    lift_dp,
    lift_dx,
    num_sums,
)
from torchpool.kernels.cpu.plan import (
    COVER,
    COVER_OUT,
    DILATION,
    END,
    FIRST,
    KERNEL,
    OUT,
    PADDED,
    SIZE,
    START,
    STRIDE,
    VALID,
)
from torchpool.kernels.cpu.scalars import INNER, JIT, load, narrow, target
from torchpool.reductions import Accumulation, Mean
from torchpool.windows import Axis

ROW = 256
"""Elements that a row should have at least, where there are planes to make it of."""
_WORK = 8
"""What a tap costs, as bytes of traffic, when threads are counted."""


# Tap rows -----------------------------------------------------------------


@njit(**INNER)
def tap_ranges(geo, tab, ranges):
    """For each tap of the last axis the range of outputs that have it; windows at a regular stride
    only."""
    for j in range(geo[3, KERNEL]):
        ranges[j, 0] = geo[3, OUT]
        ranges[j, 1] = 0
        for o in range(geo[3, OUT]):
            if tab[geo[3, FIRST] + o] <= j < tab[geo[3, END] + o]:
                ranges[j, 0] = min(ranges[j, 0], o)
                ranges[j, 1] = o + 1


@njit(**INNER)
def pick(t, x, at, stride):
    if stride == 1:
        for i in range(t.size):
            t[i] = load(x, at + i)
    elif stride == 2:
        for i in range(t.size):
            t[i] = load(x, at + 2 * i)
    else:
        for i in range(t.size):
            t[i] = load(x, at + stride * i)


@njit(**INNER)
def tap_plane(t, w, x, weights, geo, tab, inner, base, j, ranges):
    """The tap row of one plane; `base` is where the input row begins. Returns whether every window
    has the tap, with weight 1."""
    outs, dilation, stride = geo[3, OUT], geo[3, DILATION], geo[3, STRIDE]
    if inner == 1 and stride > 0:
        lo, hi = ranges[j, 0], max(ranges[j, 0], ranges[j, 1])
        t[:lo] = 0
        t[hi:outs] = 0
        w[:lo] = 0
        w[hi:outs] = 0
        if hi > lo:
            at = base + tab[geo[3, START] + lo] + j * dilation
            pick(t[lo:hi], x, at, stride)
            if weights.size:
                pick(w[lo:hi], weights, at, stride)
            else:
                w[lo:hi] = 1
        return lo == 0 and hi == outs and weights.size == 0
    whole = weights.size == 0
    for o in range(outs):
        a = o * inner
        if tab[geo[3, FIRST] + o] <= j < tab[geo[3, END] + o]:
            at = base + (tab[geo[3, START] + o] + j * dilation) * inner
            pick(t[a : a + inner], x, at, 1)
            if weights.size:
                pick(w[a : a + inner], weights, at, 1)
            else:
                w[a : a + inner] = 1
        else:
            whole = False
            t[a : a + inner] = 0
            w[a : a + inner] = 0
    return whole


@njit(**INNER)
def tap_row(t, w, x, weights, geo, tab, inner, plane, planes, line, j, ranges):
    """Tap j of the last axis in input row `line` of several planes."""
    width = geo[3, OUT] * inner
    whole = True
    for g in range(planes):
        row = (plane + g) * geo[0, SIZE] * geo[1, SIZE] * geo[2, SIZE] + line
        a, b = g * width, (g + 1) * width
        whole = (
            tap_plane(
                t[a:b], w[a:b], x, weights, geo, tab, inner, row * geo[3, SIZE] * inner, j, ranges
            )
            and whole
        )
    return whole


@njit(**INNER)
def parameter_row(p, params, channels, plane, planes, width, inner):
    """The parameter of each element of a row."""
    for g in range(planes):
        for i in range(width):
            channel = i % inner if inner > 1 else (plane + g) % channels
            p[g * width + i] = params[channel if params.size > 1 else 0]


# Formulas over rows -------------------------------------------------------


@njit(**INNER)
def raise_anchor(tag, a, t, w, p):
    for i in range(a.size):
        k = key(tag, t[i], p[i])
        wins = (w[i] != 0) & ((k > a[i]) | (k != k))
        a[i] = k if wins else a[i]


@njit(**INNER)
def add_mean(a, n, t, w):
    for i in range(a.size):
        a[i] += w[i] * t[i] if w[i] != 0 else w[i]
        n[i] += w[i]


@njit(**INNER)
def end_mean(a, n):
    for i in range(a.size):
        a[i] = a[i] / n[i] if n[i] != 0 else a[i]


@njit(**INNER)
def add_lift(tag, s0, s1, s2, s3, n, t, w, a, p):
    count = num_sums(tag)
    for i in range(n.size):
        l0, l1, l2, l3 = lift(tag, t[i], a[i], p[i])
        live = w[i] != 0
        s0[i] += w[i] * l0 if live else w[i]
        if count > 1:
            s1[i] += w[i] * l1 if live else w[i]
        if count > 2:
            s2[i] += w[i] * l2 if live else w[i]
        if count > 3:
            s3[i] += w[i] * l3 if live else w[i]
        n[i] += w[i]


@njit(**INNER)
def add_lift_dp(tag, total, d0, d1, d2, d3, n, t, w, a, p):
    count = num_sums(tag)
    for i in range(total.size):
        l0, l1, l2, l3 = lift_dp(tag, t[i], a[i], p[i])
        sent = d0[i] * l0
        if count > 1:
            sent += d1[i] * l1
        if count > 2:
            sent += d2[i] * l2
        if count > 3:
            sent += d3[i] * l3
        total[i] = total[i] + w[i] * sent if (w[i] != 0) & (n[i] == n[i]) else total[i]


@njit(**INNER)
def add_lift_dx(tag, total, d0, d1, d2, d3, n, t, w, a, p):
    count = num_sums(tag)
    for i in range(total.size):
        l0, l1, l2, l3 = lift_dx(tag, t[i], a[i], p[i])
        sent = d0[i] * l0
        if count > 1:
            sent += d1[i] * l1
        if count > 2:
            sent += d2[i] * l2
        if count > 3:
            sent += d3[i] * l3
        total[i] = total[i] + w[i] * sent if (w[i] != 0) & (n[i] == n[i]) else total[i]


@njit(**INNER)
def add_dw(tag, total, d0, d1, d2, d3, dn, n, t, w, a, p):
    count = num_sums(tag)
    for i in range(total.size):
        l0, l1, l2, l3 = lift(tag, t[i], a[i], p[i])
        sent = d0[i] * l0 + dn[i]
        if count > 1:
            sent += d1[i] * l1
        if count > 2:
            sent += d2[i] * l2
        if count > 3:
            sent += d3[i] * l3
        total[i] = total[i] + sent if (w[i] != 0) & (n[i] == n[i]) else total[i]


@njit(**INNER)
def end_row(tag, out, s0, s1, s2, s3, n, a, p, extra, divisor, is_mean):
    """The values of a row; n becomes what the formulas divide by, and NaN where the window is
    empty."""
    zero, nan = out.dtype.type(0), out.dtype.type(np.nan)
    for i in range(out.size):
        seen = n[i] > least(tag, p[i])
        count = n[i]
        if is_mean:
            count = divisor[i] if divisor[i] != 0 else n[i] + extra[i]
        value = finish(tag, (s0[i], s1[i], s2[i], s3[i]), count, a[i], p[i])
        out[i] = value if seen else zero
        n[i] = count if seen else nan


@njit(**INNER)
def derive_row(tag, d0, d1, d2, d3, dn, dp, g, s0, s1, s2, s3, n, a, p):
    """What the gradient g of a row means for its sums, its n and the parameter."""
    count, zero = num_sums(tag), d0.dtype.type(0)
    for i in range(d0.size):
        e0, e1, e2, e3, en, ep = finish_grad(tag, (s0[i], s1[i], s2[i], s3[i]), n[i], a[i], p[i])
        d0[i] = load(g, i) * e0
        if count > 1:
            d1[i] = load(g, i) * e1
        if count > 2:
            d2[i] = load(g, i) * e2
        if count > 3:
            d3[i] = load(g, i) * e3
        dn[i] = load(g, i) * en
        dp[i] = load(g, i) * ep if n[i] == n[i] else zero


# Forward ------------------------------------------------------------------


@njit(**INNER)
def split(unit, geo, column):
    """Which row of a plane: positions along the leading axes, and the rest of the number."""
    i2 = unit % geo[2, column]
    i1 = unit // geo[2, column] % geo[1, column]
    i0 = unit // (geo[2, column] * geo[1, column]) % geo[0, column]
    return i0, i1, i2, unit // (geo[2, column] * geo[1, column] * geo[0, column])


@njit(**INNER)
def window_rows(geo, tab, o0, o1, o2, rows):
    """Fills `rows` with the input rows of an output row, numbered inside the plane. Returns how
    many there are."""
    found = 0
    for j0 in range(tab[geo[0, FIRST] + o0], tab[geo[0, END] + o0]):
        i0 = tab[geo[0, START] + o0] + j0 * geo[0, DILATION]
        for j1 in range(tab[geo[1, FIRST] + o1], tab[geo[1, END] + o1]):
            i1 = i0 * geo[1, SIZE] + tab[geo[1, START] + o1] + j1 * geo[1, DILATION]
            for j2 in range(tab[geo[2, FIRST] + o2], tab[geo[2, END] + o2]):
                rows[found] = i1 * geo[2, SIZE] + tab[geo[2, START] + o2] + j2 * geo[2, DILATION]
                found += 1
    return found


@njit(**INNER)
def sweep(
    goal, tag, x, weights, geo, tab, inner, plane, planes, rows, t, w, ones, ranges, s, n, a, p
):
    """Visits every tap of an output row: 0 raises the anchor, 1 sums for the mean, 2 sums lifts."""
    for line in rows:
        for j in range(geo[3, KERNEL]):
            whole = tap_row(t, w, x, weights, geo, tab, inner, plane, planes, line, j, ranges)
            v = ones if whole else w
            if goal == 0:
                raise_anchor(tag, a, t, v, p)
            elif goal == 1:
                add_mean(a, n, t, v)
            else:
                add_lift(tag, s[0], s[1], s[2], s[3], n, t, v, a, p)


@njit(**INNER)
def pad_rows(extra, divisors, geo, tab, inner, planes, o0, o1, o2, include_pad, divisor):
    """Padding that each window counts, and the fixed divisor."""
    width = geo[3, OUT] * inner
    padded = tab[geo[0, PADDED] + o0] * tab[geo[1, PADDED] + o1] * tab[geo[2, PADDED] + o2]
    valid = tab[geo[0, VALID] + o0] * tab[geo[1, VALID] + o1] * tab[geo[2, VALID] + o2]
    for i in range(planes * width):
        o = i % width // inner
        extra[i] = (
            padded * tab[geo[3, PADDED] + o] - valid * tab[geo[3, VALID] + o] if include_pad else 0
        )
        divisors[i] = divisor


@njit(**JIT)
def forward(
    begin,
    end,
    tag,
    x,
    weights,
    params,
    y,
    stats,
    geo,
    tab,
    inner,
    outer,
    channels,
    group,
    is_mean,
    include_pad,
    divisor,
):
    """Output rows of groups of planes."""
    width = geo[3, OUT] * inner
    length = group * width
    rows = geo[0, OUT] * geo[1, OUT] * geo[2, OUT]
    count = outer * rows * width
    work = np.empty((12, length), params.dtype)
    ones = np.ones(length, params.dtype)
    ranges = np.empty((geo[3, KERNEL], 2), np.int64)
    tap_ranges(geo, tab, ranges)
    window = np.empty(geo[0, KERNEL] * geo[1, KERNEL] * geo[2, KERNEL], np.int64)
    slots = num_sums(tag)
    for unit in range(begin, end):
        o0, o1, o2, block = split(unit, geo, OUT)
        plane = block * group
        planes = min(group, outer - plane)
        b = work[:, : planes * width]
        t, w, a, n, p, out, s = b[0], b[1], b[2], b[3], b[4], b[5], b[6:10]
        if unit == begin or params.size > 1:
            parameter_row(p, params, channels, plane, planes, width, inner)
        a[:] = 0
        n[:] = 0
        one = ones[: planes * width]
        reach = window[: window_rows(geo, tab, o0, o1, o2, window)]
        if anchor(tag) == 1:
            a[:] = -np.inf
            sweep(
                0,
                tag,
                x,
                weights,
                geo,
                tab,
                inner,
                plane,
                planes,
                reach,
                t,
                w,
                one,
                ranges,
                s,
                n,
                a,
                p,
            )
        elif anchor(tag) == 2:
            sweep(
                1,
                tag,
                x,
                weights,
                geo,
                tab,
                inner,
                plane,
                planes,
                reach,
                t,
                w,
                one,
                ranges,
                s,
                n,
                a,
                p,
            )
            end_mean(a, n)
            n[:] = 0
        s[:] = 0
        sweep(
            2, tag, x, weights, geo, tab, inner, plane, planes, reach, t, w, one, ranges, s, n, a, p
        )
        pad_rows(b[10], b[11], geo, tab, inner, planes, o0, o1, o2, include_pad, divisor)
        end_row(tag, out, s[0], s[1], s[2], s[3], n, a, p, b[10], b[11], is_mean)
        for g in range(planes):
            at = ((plane + g) * rows + unit % rows) * width
            part = slice(g * width, (g + 1) * width)
            store(out[part], y[at : at + width])
            if stats.size:
                stats[at : at + width] = a[part]
                for k in range(slots):
                    stats[(k + 1) * count + at : (k + 1) * count + at + width] = s[k, part]
                stats[(slots + 1) * count + at : (slots + 1) * count + at + width] = n[part]


@njit(**INNER)
def store(values, row):
    """Rounds computed values into storage."""
    out = target(row, values)
    for i in range(row.size):
        out[i] = values[i]
    narrow(out, row)


@njit(parallel=True, **JIT)
def forward_parallel(
    threads,
    units,
    tag,
    x,
    weights,
    params,
    y,
    stats,
    geo,
    tab,
    inner,
    outer,
    channels,
    group,
    is_mean,
    include_pad,
    divisor,
):
    for i in prange(threads):
        begin, end = units * i // threads, units * (i + 1) // threads
        forward(
            begin,
            end,
            tag,
            x,
            weights,
            params,
            y,
            stats,
            geo,
            tab,
            inner,
            outer,
            channels,
            group,
            is_mean,
            include_pad,
            divisor,
        )


# Backward: first each output's share, then each input row gathers what its outputs send -----


@njit(**INNER)
def fetch(buffer, source, slot, count, plane, planes, rows, row, width):
    """The rows of several planes side by side."""
    for g in range(planes):
        at = slot * count + ((plane + g) * rows + row) * width
        part = source[at : at + width]
        into = buffer[g * width : (g + 1) * width]
        for i in range(width):
            into[i] = part[i]


@njit(**JIT)
def shares(
    begin,
    end,
    tag,
    grad,
    x,
    weights,
    params,
    stats,
    share,
    by_p,
    geo,
    tab,
    inner,
    outer,
    channels,
    group,
    need_p,
    fixed,
):
    """Derivatives by the sums and n of each output into `share`, by the parameter into `by_p`, one
    per output row (and inner element)."""
    width = geo[3, OUT] * inner
    rows = geo[0, OUT] * geo[1, OUT] * geo[2, OUT]
    count = outer * rows * width
    length = group * width
    work = np.zeros((16, length), params.dtype)
    raw = np.empty(length, grad.dtype)
    ones = np.ones(length, params.dtype)
    ranges = np.empty((geo[3, KERNEL], 2), np.int64)
    tap_ranges(geo, tab, ranges)
    window = np.empty(geo[0, KERNEL] * geo[1, KERNEL] * geo[2, KERNEL], np.int64)
    slots = num_sums(tag)
    for unit in range(begin, end):
        o0, o1, o2, block = split(unit, geo, OUT)
        plane = block * group
        planes = min(group, outer - plane)
        row = unit % rows
        b = work[:, : planes * width]
        t, w, a, n, p, dn, dp, s, d = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[8:12], b[12:16]
        if unit == begin or params.size > 1:
            parameter_row(p, params, channels, plane, planes, width, inner)
        fetch(raw, grad, 0, count, plane, planes, rows, row, width)
        fetch(a, stats, 0, count, plane, planes, rows, row, width)
        fetch(n, stats, slots + 1, count, plane, planes, rows, row, width)
        for k in range(slots):
            fetch(s[k], stats, k + 1, count, plane, planes, rows, row, width)
        derive_row(tag, d[0], d[1], d[2], d[3], dn, dp, raw, s[0], s[1], s[2], s[3], n, a, p)
        if need_p:
            one = ones[: planes * width]
            for line in window[: window_rows(geo, tab, o0, o1, o2, window)]:
                for j in range(geo[3, KERNEL]):
                    whole = tap_row(
                        t, w, x, weights, geo, tab, inner, plane, planes, line, j, ranges
                    )
                    add_lift_dp(tag, dp, d[0], d[1], d[2], d[3], n, t, one if whole else w, a, p)
        for g in range(planes):
            at = ((plane + g) * rows + row) * width
            part = slice(g * width, (g + 1) * width)
            for k in range(slots):
                share[k * count + at : k * count + at + width] = d[k, part]
            for i in range(width):
                share[slots * count + at + i] = 0 if fixed else dn[g * width + i]
            if need_p:
                line = ((plane + g) * rows + row) * inner
                by_p[line : line + inner] = 0
                for i in range(width):
                    by_p[line + i % inner] += dp[g * width + i]


@njit(parallel=True, **JIT)
def shares_parallel(
    threads,
    units,
    tag,
    grad,
    x,
    weights,
    params,
    stats,
    share,
    by_p,
    geo,
    tab,
    inner,
    outer,
    channels,
    group,
    need_p,
    fixed,
):
    for i in prange(threads):
        begin, end = units * i // threads, units * (i + 1) // threads
        shares(
            begin,
            end,
            tag,
            grad,
            x,
            weights,
            params,
            stats,
            share,
            by_p,
            geo,
            tab,
            inner,
            outer,
            channels,
            group,
            need_p,
            fixed,
        )


@njit(**INNER)
def spread_taps(total, r, geo, tab, inner, planes, j):
    """Adds what tap j of each window sends to the elements of the input rows."""
    width, size = geo[3, OUT] * inner, geo[3, SIZE] * inner
    for g in range(planes):
        for o in range(geo[3, OUT]):
            if tab[geo[3, FIRST] + o] <= j < tab[geo[3, END] + o]:
                at = g * size + (tab[geo[3, START] + o] + j * geo[3, DILATION]) * inner
                for c in range(inner):
                    total[at + c] += r[g * width + o * inner + c]


@njit(**JIT)
def gather(
    begin,
    end,
    tag,
    x,
    weights,
    params,
    stats,
    share,
    gx,
    gw,
    geo,
    tab,
    inner,
    outer,
    channels,
    group,
):
    """Input rows of groups of planes: gradients by x (unless gx is empty) and by the weights
    (unless gw is empty)."""
    width, size = geo[3, OUT] * inner, geo[3, SIZE] * inner
    rows = geo[0, OUT] * geo[1, OUT] * geo[2, OUT]
    lines = geo[0, SIZE] * geo[1, SIZE] * geo[2, SIZE]
    count = outer * rows * width
    length = group * width
    work = np.zeros((13, length), params.dtype)
    ones = np.ones(length, params.dtype)
    totals = np.empty((2, group * size), params.dtype)
    ranges = np.empty((geo[3, KERNEL], 2), np.int64)
    tap_ranges(geo, tab, ranges)
    slots = num_sums(tag)
    for unit in range(begin, end):
        i0, i1, i2, block = split(unit, geo, SIZE)
        plane = block * group
        planes = min(group, outer - plane)
        line = unit % lines
        b = work[:, : planes * width]
        t, w, a, n, p, dn, rx, rw, d = b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8:12]
        if unit == begin or params.size > 1:
            parameter_row(p, params, channels, plane, planes, width, inner)
        totals[:] = 0
        for j3 in range(geo[3, KERNEL]):
            whole = tap_row(t, w, x, weights, geo, tab, inner, plane, planes, line, j3, ranges)
            v = ones[: planes * width] if whole else w
            rx[:] = 0
            rw[:] = 0
            for k0 in range(tab[geo[0, COVER] + i0], tab[geo[0, COVER] + i0 + 1]):
                for k1 in range(tab[geo[1, COVER] + i1], tab[geo[1, COVER] + i1 + 1]):
                    for k2 in range(tab[geo[2, COVER] + i2], tab[geo[2, COVER] + i2 + 1]):
                        row = (
                            tab[geo[0, COVER_OUT] + k0] * geo[1, OUT] + tab[geo[1, COVER_OUT] + k1]
                        )
                        row = row * geo[2, OUT] + tab[geo[2, COVER_OUT] + k2]
                        fetch(a, stats, 0, count, plane, planes, rows, row, width)
                        fetch(n, stats, slots + 1, count, plane, planes, rows, row, width)
                        for k in range(slots):
                            fetch(d[k], share, k, count, plane, planes, rows, row, width)
                        if gx.size:
                            add_lift_dx(tag, rx, d[0], d[1], d[2], d[3], n, t, v, a, p)
                        if gw.size:
                            fetch(dn, share, slots, count, plane, planes, rows, row, width)
                            add_dw(tag, rw, d[0], d[1], d[2], d[3], dn, n, t, v, a, p)
            if gx.size:
                spread_taps(totals[0], rx, geo, tab, inner, planes, j3)
            if gw.size:
                spread_taps(totals[1], rw, geo, tab, inner, planes, j3)
        for g in range(planes):
            at = ((plane + g) * lines + line) * size
            if gx.size:
                store(totals[0, g * size : (g + 1) * size], gx[at : at + size])
            if gw.size:
                gw[at : at + size] = totals[1, g * size : (g + 1) * size]


@njit(parallel=True, **JIT)
def gather_parallel(
    threads,
    units,
    tag,
    x,
    weights,
    params,
    stats,
    share,
    gx,
    gw,
    geo,
    tab,
    inner,
    outer,
    channels,
    group,
):
    for i in prange(threads):
        begin, end = units * i // threads, units * (i + 1) // threads
        gather(
            begin,
            end,
            tag,
            x,
            weights,
            params,
            stats,
            share,
            gx,
            gw,
            geo,
            tab,
            inner,
            outer,
            channels,
            group,
        )


# From tensors to kernels --------------------------------------------------


class _Case:
    """A call as arrays and numbers."""

    def __init__(
        self,
        x: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        params: Tensor | None,
        reduction: Accumulation,
        axes: Sequence[Axis],
    ) -> None:
        self.channels_last = layout.is_channels_last(x)
        self.plan = plans.plan(tuple(axes))
        self.outer, self.inner = plans.views(x, self.channels_last, len(axes))
        self.channels = x.shape[1]
        self.dtype = layout.compute_dtype(x.dtype)
        kind: Any = type(reduction)
        self.tag = formulas.tag(kind)
        self.x = self.flat(x)
        self.weights = self.flat(self._effective(x, mask, weights))
        self.params = (
            np.zeros(1, self.weights.dtype)
            if params is None
            else params.detach().to(self.dtype).contiguous().numpy()
        )
        width = int(self.plan.geo[3, plans.OUT]) * self.inner
        self.group = max(1, min(self.outer, ROW // max(1, width))) if self.inner == 1 else 1
        self.blocks = -(-self.outer // self.group)
        self.is_mean = isinstance(reduction, Mean)
        self.include_pad, self.divisor = False, 0.0
        if isinstance(reduction, Mean):
            self.include_pad, self.divisor = reduction.count_include_pad, reduction.divisor or 0.0
            self.divisor = float(self.divisor)
        self.work = _WORK * self.plan.num_out * self.plan.taps * x.shape[0] * x.shape[1]

    def flat(self, t: Tensor) -> Any:
        from torchpool.kernels import cpu

        return cpu._flat(t, self.channels_last and t.ndim > 1)

    def _effective(self, x: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
        """Weights that are 0 where the mask is False; empty where every weight is 1."""
        if mask is None and weights is None:
            return x.new_empty(0, dtype=self.dtype)
        if weights is None:
            assert mask is not None
            made = mask.to(self.dtype)
        else:
            made = weights.detach().to(self.dtype)
            made = made if mask is None else made.masked_fill(~mask, 0)
        return layout.to_layout(made.expand(x.shape), self.channels_last)

    def rows(self, column: int) -> int:
        """Pieces of work: rows of groups of planes."""
        units = self.blocks
        for axis in range(plans.AXES - 1):
            units *= int(self.plan.geo[axis, column])
        return units

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.plan.geo, self.plan.tab, self.inner, self.outer, self.channels, self.group


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Values of all windows and what the backward pass needs; the latter lies in memory in the
    order of the former."""
    sizes = [axis.out_size for axis in axes]
    y = layout.empty_like(x, sizes)
    stats = layout.empty_stats(x, sizes, reduction, save)
    if y.numel():
        _run_forward(_Case(x, mask, weights, params, reduction, axes), y, stats)
    return y, stats


def _run_forward(case: _Case, y: Tensor, stats: Tensor) -> None:
    arrays = (case.x, case.weights, case.params, case.flat(y), stats.reshape(-1).numpy())
    options = (case.is_mean, case.include_pad, case.divisor)
    threads.run(
        forward,
        forward_parallel,
        case.rows(plans.OUT),
        case.work,
        case.tag,
        *arrays,
        *case.geometry,
        *options,
    )


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
    """Gradients by x, weights and params; those not needed come as empty tensors."""
    shape = (*grad.shape[:2], *(axis.in_size for axis in axes))
    dtype = layout.compute_dtype(grad.dtype)
    if not x.numel():
        x = layout.to_layout(grad.new_zeros(shape), layout.is_channels_last(grad))
    sizes = [axis.in_size for axis in axes]
    gx = layout.empty_like(x, sizes, grad.dtype) if needs[0] else grad.new_empty(0)
    gw = layout.empty_like(x, sizes, dtype) if needs[1] else grad.new_empty(0, dtype=dtype)
    if not grad.numel() or not x.numel():
        gp = (
            params.new_zeros(params.shape)
            if needs[2] and params is not None
            else grad.new_empty(0, dtype=dtype)
        )
        return gx.zero_(), gw.zero_(), gp
    case = _Case(x, mask, weights, params, reduction, axes)
    grad = layout.to_layout(grad, case.channels_last)
    if not stats.numel():
        stats = grad.new_empty((reduction.num_sums + 2, *grad.shape), dtype=dtype)
        _run_forward(case, torch.empty_like(grad), stats)
    return gx, gw, _run_backward(case, grad, stats, gx, gw, reduction, needs)


def _run_backward(
    case: _Case,
    grad: Tensor,
    stats: Tensor,
    gx: Tensor,
    gw: Tensor,
    reduction: Accumulation,
    needs: Sequence[bool],
) -> Tensor:
    saved = stats.reshape(-1).numpy()
    share = np.empty((reduction.num_sums + 1) * grad.numel(), saved.dtype)
    by_p = np.empty(case.rows(plans.OUT) * case.group * case.inner if needs[2] else 0, saved.dtype)
    fixed = case.divisor != 0.0
    arrays = (case.flat(grad), case.x, case.weights, case.params, saved, share, by_p)
    options = (bool(needs[2]), fixed)
    threads.run(
        shares,
        shares_parallel,
        case.rows(plans.OUT),
        case.work,
        case.tag,
        *arrays,
        *case.geometry,
        *options,
    )
    if needs[0] or needs[1]:
        outputs = (case.flat(gx), case.flat(gw))
        arrays = (case.x, case.weights, case.params, saved, share, *outputs)
        threads.run(
            gather,
            gather_parallel,
            case.rows(plans.SIZE),
            case.work,
            case.tag,
            *arrays,
            *case.geometry,
        )
    return (
        _parameter_gradient(case, grad, by_p) if needs[2] else grad.new_empty(0, dtype=case.dtype)
    )


def _parameter_gradient(case: _Case, grad: Tensor, by_p: Any) -> Tensor:
    """Sums by channel in float64, in one order whatever the number of threads."""
    n, c = grad.shape[:2]
    by_p = by_p[: grad.numel() // int(case.plan.geo[3, plans.OUT])]
    by_p = (
        by_p.reshape(n, -1, c) if case.channels_last else by_p.reshape(n, c, -1).transpose(0, 2, 1)
    )
    total = by_p.sum((0, 1), dtype=np.float64)
    total = total.sum(keepdims=True) if case.params.size == 1 else total
    return torch.from_numpy(total).to(case.dtype)
