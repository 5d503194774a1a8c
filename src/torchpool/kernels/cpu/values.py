"""Values of selections and linear accumulations: rows are merged vertically first, then along the
last axis.

One output row (all of the last axis) is one piece of work; everything it touches is a few rows in
the first-level cache.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from torchpool.kernels.cpu.plan import (
    COVER,
    COVER_OUT,
    DILATION,
    END,
    FIRST,
    HI,
    KERNEL,
    LO,
    OUT,
    SIZE,
    START,
    STRIDE,
)
from torchpool.kernels.cpu.scalars import INNER, JIT, empty_row, load, merge, narrow, target, widen

U = np.uint64


@njit(**INNER)
def copy(out, a):
    for i in range(out.size):
        out[i] = a[i]


@njit(**INNER)
def merge2(tag, out, a, b):
    for i in range(out.size):
        out[i] = merge(tag, a[i], b[i])


@njit(**INNER)
def merge3(tag, out, a, b, c):
    for i in range(out.size):
        out[i] = merge(tag, merge(tag, a[i], b[i]), c[i])


@njit(**INNER)
def into2(tag, out, a, b):
    """Merges two more into what is there; apart from `merge3`, since a possible overlap would keep
    that from vectorising."""
    for i in range(out.size):
        out[i] = merge(tag, merge(tag, out[i], a[i]), b[i])


@njit(**INNER)
def strided2(tag, out, v):
    """Two taps side by side, stride 2."""
    for i in range(out.size):
        out[i] = merge(tag, v[2 * i], v[2 * i + 1])


@njit(**INNER)
def strided3(tag, out, v):
    """Three taps side by side, stride 2."""
    for i in range(out.size):
        out[i] = merge(tag, merge(tag, v[2 * i], v[2 * i + 1]), v[2 * i + 2])


@njit(**INNER)
def first_tap(out, v, stride):
    if stride == 1:
        for i in range(out.size):
            out[i] = v[i]
    elif stride == 2:
        for i in range(out.size):
            out[i] = v[2 * i]
    else:
        for i in range(out.size):
            out[i] = v[stride * i]


@njit(**INNER)
def next_tap(tag, out, v, stride):
    if stride == 1:
        for i in range(out.size):
            out[i] = merge(tag, out[i], v[i])
    elif stride == 2:
        for i in range(out.size):
            out[i] = merge(tag, out[i], v[2 * i])
    else:
        for i in range(out.size):
            out[i] = merge(tag, out[i], v[stride * i])


@njit(**INNER)
def along_window(tag, v):
    """All of a contiguous run as one value, in 16 lanes."""
    n = v.size
    if n < 32:
        best = v[0]
        for i in range(1, n):
            best = merge(tag, best, v[i])
        return best
    lanes = np.empty(16, v.dtype)
    copy(lanes, v[:16])
    blocks = n // 16
    for b in range(1, blocks):
        part = v[b * 16 : b * 16 + 16]
        for i in range(16):
            lanes[i] = merge(tag, lanes[i], part[i])
    for i in range(blocks * 16, n):
        lanes[i - blocks * 16] = merge(tag, lanes[i - blocks * 16], v[i])
    best = lanes[0]
    for i in range(1, 16):
        best = merge(tag, best, lanes[i])
    return best


@njit(**INNER)
def slide_one(tag, v, out, geo, tab, o):
    """The window `o` of a row with inner size 1."""
    start, first, end = tab[geo[3, START] + o], tab[geo[3, FIRST] + o], tab[geo[3, END] + o]
    if first >= end:
        out[o] = 0
        return
    step = geo[3, DILATION]
    if step == 1:
        out[o] = along_window(tag, v[start + first : start + end])
        return
    best = v[start + first * step]
    for j in range(first + 1, end):
        best = merge(tag, best, v[start + j * step])
    out[o] = best


@njit(**INNER)
def slide_interior(tag, v, out, kernel, stride, dilation):
    """Whole windows of a row with inner size 1; v begins at the first tap of the first window."""
    if dilation == 1 and stride == 1 and kernel == 3:
        merge3(tag, out, v, v[1:], v[2:])
    elif dilation == 1 and stride == 2 and kernel == 2:
        strided2(tag, out, v)
    elif dilation == 1 and stride == 2 and kernel == 3:
        strided3(tag, out, v)
    else:
        first_tap(out, v, stride)
        for j in range(1, kernel):
            next_tap(tag, out, v[j * dilation :], stride)


@njit(**INNER)
def slide(tag, v, out, geo, tab, inner):
    """Merges along the last axis: v (SIZE * inner) -> out (OUT * inner)."""
    kernel, stride, dilation = geo[3, KERNEL], geo[3, STRIDE], geo[3, DILATION]
    outs = geo[3, OUT]
    if inner == 1:
        lo, hi = geo[3, LO], geo[3, HI]
        if kernel >= 32 and stride * 4 >= kernel:
            lo = hi = 0
        for o in range(lo):
            slide_one(tag, v, out, geo, tab, o)
        if hi > lo:
            slide_interior(tag, v[tab[geo[3, START] + lo] :], out[lo:hi], kernel, stride, dilation)
        for o in range(hi, outs):
            slide_one(tag, v, out, geo, tab, o)
        return
    for o in range(outs):
        start, first, end = tab[geo[3, START] + o], tab[geo[3, FIRST] + o], tab[geo[3, END] + o]
        part = out[o * inner : (o + 1) * inner]
        if first >= end:
            part[:] = 0
            continue
        at = (start + first * dilation) * inner
        step = dilation * inner
        count = end - first
        if count == 1:
            copy(part, v[at : at + inner])
        elif count == 2:
            merge2(tag, part, v[at : at + inner], v[at + step : at + step + inner])
        else:
            merge3(
                tag,
                part,
                v[at : at + inner],
                v[at + step : at + step + inner],
                v[at + 2 * step : at + 2 * step + inner],
            )
            for j in range(3, count):
                next_tap(tag, part, v[at + j * step : at + j * step + inner], 1)


@njit(**INNER)
def window_rows(geo, tab, unit, rows):
    """Fills `rows` with the input rows of an output row, in row-major order. Returns how many there
    are."""
    o2 = unit % geo[2, OUT]
    o1 = unit // geo[2, OUT] % geo[1, OUT]
    o0 = unit // (geo[2, OUT] * geo[1, OUT]) % geo[0, OUT]
    outer = unit // (geo[2, OUT] * geo[1, OUT] * geo[0, OUT])
    found = 0
    for j0 in range(tab[geo[0, FIRST] + o0], tab[geo[0, END] + o0]):
        i0 = outer * geo[0, SIZE] + tab[geo[0, START] + o0] + j0 * geo[0, DILATION]
        for j1 in range(tab[geo[1, FIRST] + o1], tab[geo[1, END] + o1]):
            i1 = i0 * geo[1, SIZE] + tab[geo[1, START] + o1] + j1 * geo[1, DILATION]
            for j2 in range(tab[geo[2, FIRST] + o2], tab[geo[2, END] + o2]):
                rows[found] = i1 * geo[2, SIZE] + tab[geo[2, START] + o2] + j2 * geo[2, DILATION]
                found += 1
    return found


@njit(**INNER)
def leading_count(geo, tab, column, unit):
    """Product of a count table over the leading axes of an output row."""
    o2 = unit % geo[2, OUT]
    o1 = unit // geo[2, OUT] % geo[1, OUT]
    o0 = unit // (geo[2, OUT] * geo[1, OUT]) % geo[0, OUT]
    return tab[geo[0, column] + o0] * tab[geo[1, column] + o1] * tab[geo[2, column] + o2]


@njit(**INNER)
def merge_rows(tag, x, rows, found, size, b0, b1, b2, v):
    """Merges input rows vertically; returns the merged row, which is the input itself where there
    is only one."""
    r0 = widen(x[rows[0] * size : rows[0] * size + size], b0)
    if found == 1:
        return r0
    r1 = widen(x[rows[1] * size : rows[1] * size + size], b1)
    if found == 2:
        merge2(tag, v, r0, r1)
        return v
    merge3(tag, v, r0, r1, widen(x[rows[2] * size : rows[2] * size + size], b2))
    k = 3
    while k + 1 < found:
        r0 = widen(x[rows[k] * size : rows[k] * size + size], b0)
        into2(tag, v, r0, widen(x[rows[k + 1] * size : rows[k + 1] * size + size], b1))
        k += 2
    if k < found:
        next_tap(tag, v, widen(x[rows[k] * size : rows[k] * size + size], b0), 1)
    return v


@njit(**INNER)
def divide(out, counts, scale):
    for i in range(out.size):
        out[i] = out[i] / (counts[i] * scale)


@njit(**INNER)
def count_row(geo, tab, column, inner, counts):
    """The last axis's count of each element of an output row, at least 1."""
    for o in range(geo[3, OUT]):
        for c in range(inner):
            counts[o * inner + c] = max(1, tab[geo[3, column] + o])


# Leaf: windows of two or three taps on rows with inner size 1. Unsigned positions keep the check
# for negative indices out of these loops.


@njit(**INNER)
def load1(v, x, a):
    a = U(a)
    for i in range(v.size):
        v[i] = load(x, a + U(i))


@njit(**INNER)
def load2(tag, v, x, a, b):
    a, b = U(a), U(b)
    for i in range(v.size):
        v[i] = merge(tag, load(x, a + U(i)), load(x, b + U(i)))


@njit(**INNER)
def load3(tag, v, x, a, b, c):
    a, b, c = U(a), U(b), U(c)
    for i in range(v.size):
        v[i] = merge(tag, merge(tag, load(x, a + U(i)), load(x, b + U(i))), load(x, c + U(i)))


@njit(**INNER)
def square2(tag, out, x, a, b):
    """2x2 windows at stride 2."""
    a, b = U(a), U(b)
    for i in range(out.size):
        k = U(2) * U(i)
        upper = merge(tag, load(x, a + k), load(x, a + k + U(1)))
        out[i] = merge(tag, upper, merge(tag, load(x, b + k), load(x, b + k + U(1))))


@njit(**INNER)
def slide2(tag, out, o, n, v, at, stride):
    o, at = U(o), U(at)
    if stride == 1:
        for i in range(n):
            k = at + U(i)
            out[o + U(i)] = merge(tag, v[k], v[k + U(1)])
    else:
        for i in range(n):
            k = at + U(2) * U(i)
            out[o + U(i)] = merge(tag, v[k], v[k + U(1)])


@njit(**INNER)
def slide3(tag, out, o, n, v, at, stride):
    o, at = U(o), U(at)
    if stride == 1:
        for i in range(n):
            k = at + U(i)
            out[o + U(i)] = merge(tag, merge(tag, v[k], v[k + U(1)]), v[k + U(2)])
    else:
        for i in range(n):
            k = at + U(2) * U(i)
            out[o + U(i)] = merge(tag, merge(tag, v[k], v[k + U(1)]), v[k + U(2)])


@njit(**INNER)
def is_leaf(geo, inner):
    """Whether `leaf_row` serves: at most two axes, two or three adjacent taps along the last at
    stride 1 or 2, and up to three rows."""
    last = (
        (geo[3, KERNEL] == 2 or geo[3, KERNEL] == 3)
        and 1 <= geo[3, STRIDE] <= 2
        and geo[3, DILATION] == 1
    )
    return inner == 1 and last and geo[2, KERNEL] <= 3 and geo[0, SIZE] == 1 and geo[1, SIZE] == 1


@njit(**INNER)
def leaf_row(tag, x, out, v, base, found, step, geo, tab, lo, hi, at):
    """One output row from `found` (1 to 3) input rows, the first at `base`; the interior lies
    between `lo` and `hi` and begins at `at`."""
    outs, kernel, stride = geo[3, OUT], geo[3, KERNEL], geo[3, STRIDE]
    if found == 2 and kernel == 2 and stride == 2 and lo == 0 and hi == outs:
        square2(tag, out, x, base + at, base + step + at)
        return
    if found == 1:
        load1(v, x, base)
    elif found == 2:
        load2(tag, v, x, base, base + step)
    else:
        load3(tag, v, x, base, base + step, base + 2 * step)
    if kernel == 2:
        slide2(tag, out, lo, hi - lo, v, at, stride)
    else:
        slide3(tag, out, lo, hi - lo, v, at, stride)
    for edge in range(lo + outs - hi):
        o = edge if edge < lo else hi + edge - lo
        start, first, end = tab[geo[3, START] + o], tab[geo[3, FIRST] + o], tab[geo[3, END] + o]
        total = v[max(0, min(start + first, v.size - 1))]
        for j in range(first + 1, end):
            total = merge(tag, total, v[start + j])
        out[o] = total if end > first else 0


@njit(**INNER)
def leaf(begin, end, tag, x, y, geo, tab, column, counts, divisor):
    size, width = geo[3, SIZE], geo[3, OUT]
    v, b = empty_row(x, size), empty_row(x, width)
    scale = empty_row(x, 1)
    lo, hi = geo[3, LO], geo[3, HI]
    at = tab[geo[3, START] + lo] if hi > lo else 0
    o2, outer = begin % geo[2, OUT], begin // geo[2, OUT]
    for unit in range(begin, end):
        row = y[unit * width : unit * width + width]
        out = target(row, b)
        first, found = tab[geo[2, FIRST] + o2], tab[geo[2, END] + o2] - tab[geo[2, FIRST] + o2]
        if found <= 0:
            out[:] = 0
        else:
            line = outer * geo[2, SIZE] + tab[geo[2, START] + o2] + first * geo[2, DILATION]
            leaf_row(
                tag, x, out, v, line * size, found, size * geo[2, DILATION], geo, tab, lo, hi, at
            )
            if column >= 0:
                scale[0] = 1 if divisor != 0 else tab[geo[2, column] + o2]
                divide(out, counts, scale[0])
        narrow(out, row)
        o2 += 1
        if o2 == geo[2, OUT]:
            o2 = 0
            outer += 1


@njit(**JIT)
def values(begin, end, tag, x, y, geo, tab, inner, column, divisor):
    """Output rows `begin .. end - 1`. A mean divides by `divisor`, or where it is 0 by the count
    table `column`; a `column` of -1 divides by nothing."""
    size, width = geo[3, SIZE] * inner, geo[3, OUT] * inner
    b0, b1, b2 = empty_row(x, size), empty_row(x, size), empty_row(x, size)
    v, b3 = empty_row(x, size), empty_row(x, width)
    counts = empty_row(x, width)
    rows = np.empty(max(1, geo[0, KERNEL] * geo[1, KERNEL] * geo[2, KERNEL]), np.int64)
    if column >= 0:
        if divisor == 0:
            count_row(geo, tab, column, inner, counts)
        else:
            counts[:] = divisor
    if is_leaf(geo, inner):
        leaf(begin, end, tag, x, y, geo, tab, column, counts, divisor)
        return
    for unit in range(begin, end):
        row = y[unit * width : unit * width + width]
        out = target(row, b3)
        found = window_rows(geo, tab, unit, rows)
        if found == 0:
            out[:] = 0
        else:
            slide(tag, merge_rows(tag, x, rows, found, size, b0, b1, b2, v), out, geo, tab, inner)
            if column >= 0:
                divide(
                    out,
                    counts,
                    counts.dtype.type(1 if divisor != 0 else leading_count(geo, tab, column, unit)),
                )
        narrow(out, row)


@njit(parallel=True, **JIT)
def values_parallel(threads, units, tag, x, y, geo, tab, inner, column, divisor):
    for t in prange(threads):
        values(
            units * t // threads,
            units * (t + 1) // threads,
            tag,
            x,
            y,
            geo,
            tab,
            inner,
            column,
            divisor,
        )


# The adjoint of a linear accumulation -------------------------------------


@njit(**INNER)
def add_scaled(out, g, counts, scale, plain):
    if plain:
        for i in range(out.size):
            out[i] += g[i]
    else:
        for i in range(out.size):
            out[i] += g[i] / (counts[i] * scale)


@njit(**INNER)
def spread_tap(out, g, stride):
    if stride == 1:
        for i in range(g.size):
            out[i] += g[i]
    elif stride == 2:
        for i in range(g.size):
            out[2 * i] += g[i]
    else:
        for i in range(g.size):
            out[stride * i] += g[i]


@njit(**INNER)
def spread_whole(out, g, stride):
    """Disjoint windows that touch each other: each value goes to `stride` neighbours."""
    if stride == 2:
        for i in range(g.size):
            out[2 * i] = g[i]
            out[2 * i + 1] = g[i]
    else:
        for i in range(g.size):
            for j in range(stride):
                out[stride * i + j] = g[i]


@njit(**INNER)
def spread(g, out, geo, tab, inner):
    """The adjoint of `slide` for sums: g (OUT * inner) -> out (SIZE * inner)."""
    kernel, stride, dilation = geo[3, KERNEL], geo[3, STRIDE], geo[3, DILATION]
    lo, hi = geo[3, LO], geo[3, HI]
    if inner > 1:
        for i in range(geo[3, SIZE]):
            part = out[i * inner : (i + 1) * inner]
            first, end = tab[geo[3, COVER] + i], tab[geo[3, COVER] + i + 1]
            part[:] = 0
            for k in range(first, end):
                o = tab[geo[3, COVER_OUT] + k]
                spread_tap(part, g[o * inner : (o + 1) * inner], 1)
        return
    out[:] = 0
    if hi > lo:
        start = tab[geo[3, START] + lo]
        if kernel == stride and dilation == 1:
            spread_whole(out[start:], g[lo:hi], stride)
        else:
            for j in range(kernel):
                spread_tap(out[start + j * dilation :], g[lo:hi], stride)
    for o in range(geo[3, OUT]):
        if o < lo or o >= hi:
            for j in range(tab[geo[3, FIRST] + o], tab[geo[3, END] + o]):
                out[tab[geo[3, START] + o] + j * dilation] += g[o]


@njit(**JIT)
def adjoint(begin, end, g, gx, geo, tab, inner, column, divisor):
    """Input rows `begin .. end - 1` of the gradient; `column` and `divisor` as in `values`."""
    size, width = geo[3, SIZE] * inner, geo[3, OUT] * inner
    b0, total, b1, counts = (
        empty_row(g, width),
        empty_row(g, width),
        empty_row(g, size),
        empty_row(g, width),
    )
    plain = column < 0
    if column >= 0:
        if divisor == 0:
            count_row(geo, tab, column, inner, counts)
        else:
            counts[:] = divisor
    for unit in range(begin, end):
        i2 = unit % geo[2, SIZE]
        i1 = unit // geo[2, SIZE] % geo[1, SIZE]
        i0 = unit // (geo[2, SIZE] * geo[1, SIZE]) % geo[0, SIZE]
        outer = unit // (geo[2, SIZE] * geo[1, SIZE] * geo[0, SIZE])
        total[:] = 0
        for k0 in range(tab[geo[0, COVER] + i0], tab[geo[0, COVER] + i0 + 1]):
            r0 = outer * geo[0, OUT] + tab[geo[0, COVER_OUT] + k0]
            for k1 in range(tab[geo[1, COVER] + i1], tab[geo[1, COVER] + i1 + 1]):
                r1 = r0 * geo[1, OUT] + tab[geo[1, COVER_OUT] + k1]
                for k2 in range(tab[geo[2, COVER] + i2], tab[geo[2, COVER] + i2 + 1]):
                    r2 = r1 * geo[2, OUT] + tab[geo[2, COVER_OUT] + k2]
                    scale = counts.dtype.type(1)
                    if column >= 0 and divisor == 0:
                        scale = counts.dtype.type(leading_count(geo, tab, column, r2))
                    add_scaled(
                        total, widen(g[r2 * width : r2 * width + width], b0), counts, scale, plain
                    )
        row = gx[unit * size : unit * size + size]
        out = target(row, b1)
        spread(total, out, geo, tab, inner)
        narrow(out, row)


@njit(parallel=True, **JIT)
def adjoint_parallel(threads, units, g, gx, geo, tab, inner, column, divisor):
    for t in prange(threads):
        adjoint(
            units * t // threads,
            units * (t + 1) // threads,
            g,
            gx,
            geo,
            tab,
            inner,
            column,
            divisor,
        )
