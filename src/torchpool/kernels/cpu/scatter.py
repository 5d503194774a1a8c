"""Gradients of selections over large windows: each output sends to its winner, and to it alone.

A piece of work is a band of input rows of a plane. It visits the outputs whose windows reach the
band, in order, and adds what falls into it, so that every element has one writer and one order of
terms.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from torchpool.kernels.cpu.backward import lead_axis, outputs_of, rest_of
from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.lines import advance, is_idle, split
from torchpool.kernels.cpu.parts import INNER, JIT
from torchpool.kernels.cpu.plan import BEFORE, DILATION, KERNEL, OUT, SIZE, START, STRIDE
from torchpool.kernels.cpu.scalars import element, empty_buffer
from torchpool.kernels.cpu.simd import load_first, store_first, width


@njit(**INNER)
def start_of(geo, tab, a, o):
    """Where window `o` begins along axis `a`."""
    if is_idle(geo, a):
        return o
    if geo[a, STRIDE] > 0:
        return o * geo[a, STRIDE] - geo[a, BEFORE]
    return tab[geo[a, START] + o]


@njit(**INNER)
def places_of(geo, lead, inner, rows, columns):
    """For each offset in a window: how far its element lies from the window's first, along the
    leading axis, and in elements along the others."""
    for code in range(rows.size):
        rest, scale, place = code, inner, np.int64(0)
        for k in range(4):
            a = 3 - k
            tap = rest % geo[a, KERNEL]
            rest //= geo[a, KERNEL]
            if a == lead:
                rows[code] = tap * geo[a, DILATION]
            elif a > lead:
                place += tap * geo[a, DILATION] * scale
            scale *= geo[a, SIZE]
        columns[code] = place


@njit(**JIT)
def scatter(begin, end, g, state, gx, geo, tab, inner, band):
    """Bands `begin .. end - 1` of `band` positions along the leading axis of a plane each."""
    geo, tab = constants(geo), constants(tab)
    lead = lead_axis(geo)
    bands = -(-geo[lead, SIZE] // band)
    slab = rest_of(geo, lead, SIZE) * geo[3, SIZE] * inner
    each = rest_of(geo, lead, OUT)
    taps = geo[0, KERNEL] * geo[1, KERNEL] * geo[2, KERNEL] * geo[3, KERNEL]
    rows, columns = np.empty(taps, np.int32), np.empty(taps, np.int64)
    places_of(geo, lead, inner, rows, columns)
    total = empty_buffer(gx, band * slab + width(gx))
    o = np.zeros(3, np.int64)
    outs = geo[3, OUT] * inner
    for unit in range(begin, end):
        plane, first = unit // bands, unit % bands * band
        past = min(first + band, geo[lead, SIZE])
        total[:] = 0
        low, high = outputs_of(geo, tab, lead, first, past)
        for k in range((high - low) * each):
            line = plane * geo[lead, OUT] * each + low * each + k
            if k == 0:
                split(line, geo, OUT, o)
            else:
                advance(geo, OUT, o, plane)
            base, scale = np.int64(0), geo[3, SIZE] * inner
            for q in range(2 - lead):
                a = 2 - q
                base += start_of(geo, tab, a, o[a]) * scale
                scale *= geo[a, SIZE]
            top = start_of(geo, tab, lead, o[lead]) - first
            send_row(g, state, total, line * outs, base, top, past - first, slab, rows, columns,
                     geo, tab, inner)  # fmt: skip
        to = (plane * geo[lead, SIZE] + first) * slab
        count = (past - first) * slab
        for i in range(0, count, width(gx)):
            store_first(gx, to + i, load_first(total, i, count - i), count - i)


@njit(**INNER)
def send_row(g, state, total, line, base, top, height, slab, rows, columns, geo, tab, inner):
    """Adds what the winners of one row of outputs get. Runs of windows with the same winner are
    added up before they are written, which would else wait for each other."""
    held, place = total.dtype.type(0), np.int64(-1)
    for at in range(geo[3, OUT]):
        start = base + start_of(geo, tab, 3, at) * inner
        for c in range(inner):
            i = line + at * inner + c
            code = state[i]
            row = top + rows[code]
            if 0 <= row < height:
                spot = row * slab + start + columns[code] + c
                if spot == place:
                    held += element(g, i)
                    continue
                if place >= 0:
                    total[place] += held
                held, place = total.dtype.type(element(g, i)), spot
    if place >= 0:
        total[place] += held
