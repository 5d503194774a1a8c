"""Gradients of selections whose outputs each send to their winner, and to it alone.

A piece of work is a band of input rows of a plane, or some channels of it. It visits the outputs
whose windows reach the band, in order, and adds what falls into it, so that every element has one
writer and one order of terms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from torchpool.kernels.cpu import plan as plans
from torchpool.kernels.cpu.backward import lead_axis, outputs_of, rest_of
from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.lines import advance, is_idle, split, taps_of
from torchpool.kernels.cpu.parts import INNER, JIT, inlined
from torchpool.kernels.cpu.plan import BEFORE, DILATION, EMPTY, KERNEL, OUT, SIZE, START, STRIDE
from torchpool.kernels.cpu.scalars import element, empty_buffer
from torchpool.kernels.cpu.simd import computed, load_first, splat, store_first, width

NOWHERE = np.int64(np.iinfo(np.int64).min)


@njit(**INNER)
def start_of(geo, tab, a, o):
    """Where window `o` begins along axis `a`."""
    if is_idle(geo, a):
        return o
    if geo[a, STRIDE] > 0:
        return o * geo[a, STRIDE] - geo[a, BEFORE]
    return tab[geo[a, START] + o]


@njit(**INNER)
def is_empty(geo, tab, a, o):
    """Whether window `o` lies in the padding along axis `a`."""
    if geo[a, EMPTY] == 0:
        return False
    first, end, _ = taps_of(geo, tab, a, o)
    return first >= end


@njit(**INNER)
def places_of(geo, lead, apart, rows, places, starts, tab):
    """For each offset in a window: how far its element lies from the window's first, along the
    leading axis and in elements, if positions lie `apart`; and where windows begin along the last
    axis, NOWHERE if they lie in the padding."""
    for code in range(rows.size):
        rest, scale, place = code, apart, np.int64(0)
        for k in range(4):
            a = 3 - k
            step = rest % geo[a, KERNEL] * geo[a, DILATION]
            rest //= geo[a, KERNEL]
            place += step * scale
            if a == lead:
                rows[code] = step
            scale *= geo[a, SIZE]
        places[code] = place
    for k in range(starts.size):
        starts[k] = NOWHERE if is_empty(geo, tab, 3, k) else start_of(geo, tab, 3, k) * apart


def is_wide(gx: Any) -> bool:
    """Whether an array holds the format that is computed in."""
    raise NotImplementedError


@inlined(is_wide)
def _is_wide(gx):
    wide = computed(gx.dtype) == gx.dtype
    return lambda gx: wide


def totals(gx: Any, size: Any) -> Any:
    """Where gradients are added up: the result itself, or room for `size` of them in the format
    that is computed in."""


@overload(totals)
def _totals(gx, size):
    if computed(gx.dtype) == gx.dtype:
        return lambda gx, size: gx
    return lambda gx, size: empty_buffer(gx, size)


@njit(**INNER)
def clear(total, at, apart, count, block):
    """Zeros in `block` elements of each of `count` positions."""
    if block == apart:
        count, block = 1, count * block
    none = splat(total, 0)
    for k in range(count):
        for c in range(0, block, width(total)):
            store_first(total, at + k * apart + c, none, block - c)


@njit(**INNER)
def put_block(gx, to, inner, total, count, block):
    """Copies `block` elements of each of `count` positions where they belong, rounded."""
    if block == inner:
        count, block = 1, count * block
    for k in range(count):
        for c in range(0, block, width(gx)):
            left = block - c
            store_first(gx, to + k * inner + c, load_first(total, k * block + c, left), left)


@njit(**JIT)
def scatter(begin, end, g, state, gx, geo, tab, inner, band, most):
    """Pieces `begin .. end - 1`: a band of `band` positions along the leading axis of a plane each,
    of `most` inner elements at most."""
    geo, tab = constants(geo), constants(tab)
    lead = lead_axis(geo)
    bands, blocks = -(-geo[lead, SIZE] // band), -(-inner // most)
    slab = rest_of(geo, lead, SIZE) * geo[3, SIZE]
    each = rest_of(geo, lead, OUT)
    taps = geo[0, KERNEL] * geo[1, KERNEL] * geo[2, KERNEL] * geo[3, KERNEL]
    rows, places = np.empty(taps, np.int64), np.empty(taps, np.int64)
    starts, o = np.empty(geo[3, OUT], np.int64), np.zeros(3, np.int64)
    total = totals(gx, band * slab * most)
    looks = bands > 1 or geo[3, EMPTY] != 0
    laid = np.int64(-1)
    for unit in range(begin, end):
        part, c = unit // blocks, unit % blocks * most
        block = min(most, inner - c)
        plane, first = part // bands, part % bands * band
        past = min(first + band, geo[lead, SIZE])
        to = (plane * geo[lead, SIZE] + first) * slab * inner + c
        apart, origin = (inner, to) if is_wide(gx) else (block, np.int64(0))
        if apart != laid:
            laid = apart
            places_of(geo, lead, apart, rows, places, starts, tab)
        clear(total, origin, apart, (past - first) * slab, block)
        low, high = outputs_of(geo, tab, lead, first, past)
        for k in range((high - low) * each):
            line = plane * geo[lead, OUT] * each + low * each + k
            if k == 0:
                split(line, geo, OUT, o)
            else:
                advance(geo, OUT, o, plane)
            if (
                is_empty(geo, tab, 0, o[0])
                | is_empty(geo, tab, 1, o[1])
                | is_empty(geo, tab, 2, o[2])
            ):
                continue
            top = start_of(geo, tab, lead, o[lead]) - first
            base, scale = top * slab, geo[3, SIZE]
            for q in range(2 - lead):
                a = 2 - q
                base += start_of(geo, tab, a, o[a]) * scale
                scale *= geo[a, SIZE]
            send_row(g, state, total, line * geo[3, OUT] * inner + c, inner, origin + base * apart,
                     block, top, past - first if looks else 0, rows, places, starts)  # fmt: skip
        if not is_wide(gx):
            put_block(gx, to, inner, total, (past - first) * slab, block)


@njit(**INNER)
def send_row(g, state, total, line, inner, base, block, top, height, rows, places, starts):
    """Adds what the winners of one row of outputs get, as far as they lie in the band: in rows
    `0 .. height - 1` of it, if the windows begin in row `top`; all do if height is 0."""
    if height == 0 and block == 1 and inner == 1:
        first = np.uint64(line)
        for k in range(np.uint64(starts.size)):
            code = state[first + k]
            total[np.uint64(base + starts[k] + places[code])] += element(g, first + k)
        return
    for k in range(starts.size):
        if starts[k] == NOWHERE:
            continue
        start, first = base + starts[k], np.uint64(line + k * inner)
        if height == 0:
            for c in range(np.uint64(block)):
                code = state[first + c]
                total[np.uint64(start + places[code]) + c] += element(g, first + c)
        else:
            for c in range(np.uint64(block)):
                code = state[first + c]
                if np.uint64(top + rows[code]) < np.uint64(height):
                    total[np.uint64(start + places[code]) + c] += element(g, first + c)


def pieces(plan: plans.Plan, wanted: int, is_wide: bool) -> tuple[int, int, int]:
    """How many positions make a band, how many inner elements a piece takes at most, and how many
    pieces there are. Planes are cut where threads would find fewer pieces than `wanted`, or where a
    piece needs more room than it should: small ones by their inner elements, others into bands, of
    which each visits the windows that reach into it from others."""
    geo, inner, outer, slab = plan.geo, plan.inner, plan.outer, plan.slab
    lead = plans.lead_axis(geo)
    size, kernel = int(geo[lead, SIZE]), int(geo[lead, KERNEL] * max(1, geo[lead, DILATION]))
    most, band = inner, size
    if outer < wanted and inner > BLOCK and size * slab <= ROOM:
        most = max(BLOCK, inner * outer // wanted // BLOCK * BLOCK)
    else:
        bands = max(1 if is_wide else -(-size * slab // ROOM), -(-wanted // outer))
        band = min(size, max(-(-size // bands), 2 * kernel))
    return band, most, outer * -(-size // band) * -(-inner // most)


BLOCK = 64
"""Inner elements that are worth a piece of their own."""
ROOM = 1 << 17
"""Elements of a piece that needs room of its own, at most."""
