"""Selections that remember their winner, and their backward pass.

Rows are reduced along the last axis first, then vertically: in that order `beats` gives torch's
winner (the first of equals, the last NaN).
A ring of reduced rows keeps those that the next output row needs again.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from torchpool.kernels.cpu.plan import (
    COVER,
    COVER_OUT,
    COVER_TAP,
    DILATION,
    END,
    FIRST,
    HI,
    KERNEL,
    LO,
    OUT,
    REACH,
    SIZE,
    START,
    STRIDE,
)
from torchpool.kernels.cpu.scalars import INNER, JIT, beats, empty_row, narrow, target, widen

RING_BYTES = 4 << 20


@njit(**INNER)
def seed(best, offset, v, stride, tap):
    if stride == 1:
        for i in range(best.size):
            best[i] = v[i]
    elif stride == 2:
        for i in range(best.size):
            best[i] = v[2 * i]
    else:
        for i in range(best.size):
            best[i] = v[stride * i]
    for i in range(best.size):
        offset[i] = tap


@njit(**INNER)
def challenge(tag, best, offset, v, stride, tap):
    """Lets tap number `tap` of each window compete."""
    code = offset.dtype.type(tap)
    if stride == 1:
        for i in range(best.size):
            wins = beats(tag, v[i], best[i])
            best[i] = v[i] if wins else best[i]
            offset[i] = code if wins else offset[i]
    elif stride == 2:
        for i in range(best.size):
            wins = beats(tag, v[2 * i], best[i])
            best[i] = v[2 * i] if wins else best[i]
            offset[i] = code if wins else offset[i]
    else:
        for i in range(best.size):
            wins = beats(tag, v[stride * i], best[i])
            best[i] = v[stride * i] if wins else best[i]
            offset[i] = code if wins else offset[i]


@njit(**INNER)
def begin_window(best, offset, v, taps, base):
    for i in range(best.size):
        best[i] = v[i]
        offset[i] = taps[i] + base


@njit(**INNER)
def challenge_row(tag, best, offset, v, taps, base):
    """Lets a row of winners compete; theirs are the offsets `base + taps`."""
    code = offset.dtype.type(base)
    for i in range(best.size):
        wins = beats(tag, v[i], best[i])
        best[i] = v[i] if wins else best[i]
        offset[i] = taps[i] + code if wins else offset[i]


@njit(**INNER)
def reduce_one(tag, v, best, offset, geo, tab, o, inner):
    """Window `o` along the last axis; an empty one gets 0 and tap 0."""
    start, first, end = tab[geo[3, START] + o], tab[geo[3, FIRST] + o], tab[geo[3, END] + o]
    dilation = geo[3, DILATION]
    part, taps = best[o * inner : (o + 1) * inner], offset[o * inner : (o + 1) * inner]
    if first >= end:
        part[:] = 0
        taps[:] = 0
        return
    if inner == 1:
        winner = v[start + first * dilation]
        at = first
        for j in range(first + 1, end):
            candidate = v[start + j * dilation]
            if beats(tag, candidate, winner):
                winner = candidate
                at = j
        best[o] = winner
        offset[o] = at
        return
    seed(part, taps, v[(start + first * dilation) * inner :], 1, first)
    for j in range(first + 1, end):
        challenge(tag, part, taps, v[(start + j * dilation) * inner :], 1, j)


@njit(**INNER)
def reduce_row(tag, v, best, offset, geo, tab, inner):
    """Winners along the last axis: v (SIZE * inner) -> best, offset (OUT * inner)."""
    lo, hi = geo[3, LO], geo[3, HI]
    if inner > 1:
        lo = hi = 0
    if hi > lo:
        at = tab[geo[3, START] + lo]
        seed(best[lo:hi], offset[lo:hi], v[at:], geo[3, STRIDE], 0)
        for j in range(1, geo[3, KERNEL]):
            challenge(
                tag, best[lo:hi], offset[lo:hi], v[at + j * geo[3, DILATION] :], geo[3, STRIDE], j
            )
    for o in range(geo[3, OUT]):
        if o < lo or o >= hi:
            reduce_one(tag, v, best, offset, geo, tab, o, inner)


@njit(**INNER)
def zero_empty(out, offset, geo, tab, inner):
    """Windows with nothing in them along the last axis."""
    for o in range(geo[3, OUT]):
        if tab[geo[3, FIRST] + o] >= tab[geo[3, END] + o]:
            out[o * inner : (o + 1) * inner] = 0
            offset[o * inner : (o + 1) * inner] = 0


@njit(**JIT)
def winners(begin, end, tag, x, y, state, geo, tab, inner, any_empty):
    """Output rows `begin .. end - 1` with the offset of each winner in its window."""
    size, width = geo[3, SIZE] * inner, geo[3, OUT] * inner
    b0, b1 = empty_row(x, size), empty_row(x, width)
    ring = geo[1, REACH] * geo[2, REACH]
    if ring * width * 12 > RING_BYTES:
        ring = 1
    best = empty_row(x, ring * width)
    taps = np.empty(ring * width, state.dtype)
    held = np.full(ring, -1, np.int64)
    for unit in range(begin, end):
        o2 = unit % geo[2, OUT]
        o1 = unit // geo[2, OUT] % geo[1, OUT]
        o0 = unit // (geo[2, OUT] * geo[1, OUT]) % geo[0, OUT]
        outer = unit // (geo[2, OUT] * geo[1, OUT] * geo[0, OUT])
        row, offset = (
            y[unit * width : unit * width + width],
            state[unit * width : unit * width + width],
        )
        out = target(row, b1)
        fresh = True
        for j0 in range(tab[geo[0, FIRST] + o0], tab[geo[0, END] + o0]):
            i0 = tab[geo[0, START] + o0] + j0 * geo[0, DILATION]
            for j1 in range(tab[geo[1, FIRST] + o1], tab[geo[1, END] + o1]):
                i1 = tab[geo[1, START] + o1] + j1 * geo[1, DILATION]
                for j2 in range(tab[geo[2, FIRST] + o2], tab[geo[2, END] + o2]):
                    i2 = tab[geo[2, START] + o2] + j2 * geo[2, DILATION]
                    source = ((outer * geo[0, SIZE] + i0) * geo[1, SIZE] + i1) * geo[2, SIZE] + i2
                    slot = (i1 % geo[1, REACH] * geo[2, REACH] + i2 % geo[2, REACH]) % ring
                    b, t = (
                        best[slot * width : slot * width + width],
                        taps[slot * width : slot * width + width],
                    )
                    if held[slot] != source:
                        held[slot] = source
                        reduce_row(
                            tag,
                            widen(x[source * size : source * size + size], b0),
                            b,
                            t,
                            geo,
                            tab,
                            inner,
                        )
                    code = ((j0 * geo[1, KERNEL] + j1) * geo[2, KERNEL] + j2) * geo[3, KERNEL]
                    if fresh:
                        begin_window(out, offset, b, t, code)
                        fresh = False
                    else:
                        challenge_row(tag, out, offset, b, t, code)
        if fresh:
            out[:] = 0
            offset[:] = 0
        elif any_empty:
            zero_empty(out, offset, geo, tab, inner)
        narrow(out, row)


@njit(parallel=True, **JIT)
def winners_parallel(threads, units, tag, x, y, state, geo, tab, inner, any_empty):
    for t in prange(threads):
        winners(
            units * t // threads,
            units * (t + 1) // threads,
            tag,
            x,
            y,
            state,
            geo,
            tab,
            inner,
            any_empty,
        )


@njit(**INNER)
def masked_one(tag, x, mask, y, state, geo, tab, inner, at, corner, o, base):
    """One window over the elements where the mask holds."""
    found = False
    best = x[0]
    code = np.int64(0)
    for j0 in range(tab[geo[0, FIRST] + o[0]], tab[geo[0, END] + o[0]]):
        i0 = corner + tab[geo[0, START] + o[0]] + j0 * geo[0, DILATION]
        for j1 in range(tab[geo[1, FIRST] + o[1]], tab[geo[1, END] + o[1]]):
            i1 = i0 * geo[1, SIZE] + tab[geo[1, START] + o[1]] + j1 * geo[1, DILATION]
            for j2 in range(tab[geo[2, FIRST] + o[2]], tab[geo[2, END] + o[2]]):
                i2 = i1 * geo[2, SIZE] + tab[geo[2, START] + o[2]] + j2 * geo[2, DILATION]
                for j3 in range(tab[geo[3, FIRST] + o[3]], tab[geo[3, END] + o[3]]):
                    i = (
                        i2 * geo[3, SIZE] + tab[geo[3, START] + o[3]] + j3 * geo[3, DILATION]
                    ) * inner + base
                    if mask[i] and (not found or beats(tag, x[i], best)):
                        found = True
                        best = x[i]
                        code = ((j0 * geo[1, KERNEL] + j1) * geo[2, KERNEL] + j2) * geo[
                            3, KERNEL
                        ] + j3
    y[at] = best if found else 0
    if state.size:
        state[at] = code


@njit(**JIT)
def masked(begin, end, tag, x, mask, y, state, geo, tab, inner):
    """Planes `begin .. end - 1` (of outer * inner) under a mask; x in the format that is computed
    in."""
    plane = geo[0, OUT] * geo[1, OUT] * geo[2, OUT] * geo[3, OUT]
    o = np.empty(4, np.int64)
    for unit in range(begin, end):
        outer, base = unit // inner, unit % inner
        for k in range(plane):
            o[3] = k % geo[3, OUT]
            o[2] = k // geo[3, OUT] % geo[2, OUT]
            o[1] = k // (geo[3, OUT] * geo[2, OUT]) % geo[1, OUT]
            o[0] = k // (geo[3, OUT] * geo[2, OUT] * geo[1, OUT])
            at = (outer * plane + k) * inner + base
            masked_one(tag, x, mask, y, state, geo, tab, inner, at, outer * geo[0, SIZE], o, base)


@njit(parallel=True, **JIT)
def masked_parallel(threads, units, tag, x, mask, y, state, geo, tab, inner):
    for t in prange(threads):
        masked(
            units * t // threads,
            units * (t + 1) // threads,
            tag,
            x,
            mask,
            y,
            state,
            geo,
            tab,
            inner,
        )


# Backward: each thread owns rows of the input and gathers what the output rows that reach them
# send, in order ----------------


@njit(**INNER)
def send_tap(g, state, out, stride, code):
    """Adds to each tap with offset `code` what its window sends it."""
    if stride == 1:
        for i in range(g.size):
            out[i] += g[i] if state[i] == code else 0
    elif stride == 2:
        for i in range(g.size):
            out[2 * i] += g[i] if state[i] == code else 0
    else:
        for i in range(g.size):
            out[stride * i] += g[i] if state[i] == code else 0


@njit(**INNER)
def send_one(g, state, out, geo, tab, o, inner, code):
    """What window `o` sends into this input row; offsets that point outside are dropped."""
    start, size, dilation, kernel = (
        tab[geo[3, START] + o],
        geo[3, SIZE],
        geo[3, DILATION],
        geo[3, KERNEL],
    )
    for c in range(inner):
        tap = np.int64(state[o * inner + c]) - code
        i = start + tap * dilation
        if 0 <= tap < kernel and 0 <= i < size:
            out[i * inner + c] += g[o * inner + c]


@njit(**INNER)
def send_row(g, state, out, geo, tab, inner, code):
    """Adds what an output row sends into an input row; `code` is the offset of that row's first tap
    in the window."""
    kernel, dilation = geo[3, KERNEL], geo[3, DILATION]
    if inner > 1 and kernel <= 7:
        for o in range(geo[3, OUT]):
            start = tab[geo[3, START] + o]
            a, b = o * inner, (o + 1) * inner
            for j in range(tab[geo[3, FIRST] + o], tab[geo[3, END] + o]):
                i = (start + j * dilation) * inner
                send_tap(g[a:b], state[a:b], out[i : i + inner], 1, state.dtype.type(code + j))
        return
    lo, hi = (geo[3, LO], geo[3, HI]) if inner == 1 and kernel <= 4 else (0, 0)
    for o in range(lo):
        send_one(g, state, out, geo, tab, o, inner, code)
    if hi > lo:
        start = tab[geo[3, START] + lo]
        for j in range(kernel):
            send_tap(
                g[lo:hi],
                state[lo:hi],
                out[start + j * dilation :],
                geo[3, STRIDE],
                state.dtype.type(code + j),
            )
    for o in range(hi, geo[3, OUT]):
        send_one(g, state, out, geo, tab, o, inner, code)


@njit(**JIT)
def scatter(begin, end, g, state, gx, geo, tab, inner):
    """Input rows `begin .. end - 1` of the gradient of a selection."""
    size, width = geo[3, SIZE] * inner, geo[3, OUT] * inner
    b0, b1 = empty_row(g, width), empty_row(g, size)
    for unit in range(begin, end):
        i2 = unit % geo[2, SIZE]
        i1 = unit // geo[2, SIZE] % geo[1, SIZE]
        i0 = unit // (geo[2, SIZE] * geo[1, SIZE]) % geo[0, SIZE]
        outer = unit // (geo[2, SIZE] * geo[1, SIZE] * geo[0, SIZE])
        row = gx[unit * size : unit * size + size]
        out = target(row, b1)
        out[:] = 0
        for k0 in range(tab[geo[0, COVER] + i0], tab[geo[0, COVER] + i0 + 1]):
            r0, j0 = outer * geo[0, OUT] + tab[geo[0, COVER_OUT] + k0], tab[geo[0, COVER_TAP] + k0]
            for k1 in range(tab[geo[1, COVER] + i1], tab[geo[1, COVER] + i1 + 1]):
                r1, j1 = (
                    r0 * geo[1, OUT] + tab[geo[1, COVER_OUT] + k1],
                    j0 * geo[1, KERNEL] + tab[geo[1, COVER_TAP] + k1],
                )
                for k2 in range(tab[geo[2, COVER] + i2], tab[geo[2, COVER] + i2 + 1]):
                    r2, j2 = (
                        r1 * geo[2, OUT] + tab[geo[2, COVER_OUT] + k2],
                        j1 * geo[2, KERNEL] + tab[geo[2, COVER_TAP] + k2],
                    )
                    part = widen(g[r2 * width : r2 * width + width], b0)
                    send_row(
                        part,
                        state[r2 * width : r2 * width + width],
                        out,
                        geo,
                        tab,
                        inner,
                        j2 * geo[3, KERNEL],
                    )
        narrow(out, row)


@njit(parallel=True, **JIT)
def scatter_parallel(threads, units, g, state, gx, geo, tab, inner):
    for t in prange(threads):
        scatter(units * t // threads, units * (t + 1) // threads, g, state, gx, geo, tab, inner)
