"""Large windows that share few inputs: global, adaptive, or as far apart as they are long.

The taps of a window are walked row by row, and the position of a row is one number for the whole
program: lanes are taps of the last pooled axis and outputs beside each other, and no lane divides.
Where there are too few windows to fill a GPU each is split over programs, whose results a second
kernel joins in the windows' order.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels.gpu import geometry, launching
from torchpool.kernels.gpu.geometry import (
    AXES,
    Span,
    View,
    count_inside,
    count_padded,
    first_tap,
    start_of,
    stop_of,
)
from torchpool.kernels.gpu.passes import larger, smaller
from torchpool.kernels.gpu.selection import FEW, better, compared, extreme, find_winner, worst
from torchpool.reductions import Accumulation, Mean, Selection

_LANES = 1024
_CHUNKS = 8
"""Loads of a thread that can be under way, in units of what it accumulates."""
_PROGRAMS = 2048
"""Programs that keep a GPU busy; with fewer, windows are split."""
_STEPS = 4
"""Steps that are worth a program."""
_NARROW = 32
"""Neighbouring outputs that a program owns at most, where they are regular."""
_WIDEST = 256
"""Adaptive windows along the last axis: a constant of kernels."""


class Boxes(NamedTuple):
    """A problem as planes of four pooled axes whose elements are `inner` numbers."""

    planes: int
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    spans: tuple[Span, ...]
    inner: int
    whole: bool
    """Whether each plane is one window, which then has one axis."""

    @property
    def kernels(self) -> tuple[int, ...]:
        return tuple(span.kernel for span in self.spans)

    @property
    def outputs(self) -> int:
        return self.planes * math.prod(self.outs) * self.inner


@lru_cache(maxsize=4096)
def boxes(seen: View) -> Boxes:
    """The problem without the axis that is not pooled."""
    pooled = slice(0, AXES) if seen.channels_last else slice(1, AXES + 1)
    ins, outs, spans = seen.ins[pooled], seen.outs[pooled], seen.spans[pooled]
    inner = seen.ins[-1] if seen.channels_last else 1
    if not seen.whole:
        return Boxes(seen.planes, ins, outs, spans, inner, False)
    size = math.prod(ins)
    one, all_taps = Span(1, 1, 1, 0, 0, 1, 0, 0, 1), Span(size, 1, 1, 0, 0, size, 0, 0, 1)
    spans = (one, one, one, all_taps)
    return Boxes(seen.planes, (1, 1, 1, size), (1, 1, 1, 1), spans, inner, True)


@lru_cache(maxsize=4096)
def serve(seen: View) -> bool:
    """Whether windows are large and read few inputs twice."""
    last = seen.spans[-1 - seen.channels_last]
    if seen.taps <= FEW or not seen.regular:
        return False
    if last.stride == 0 and seen.outs[-1 - seen.channels_last] > _WIDEST:
        return False
    taps = math.prod(span.kernel * out for span, out in zip(seen.spans, seen.outs, strict=True))
    return taps <= 2 * math.prod(seen.ins)


@triton.jit
def _end_tap(start, stop, kernel, A: tl.constexpr):
    """The tap behind the last one inside the input."""
    if A[5] < A[0]:
        return tl.minimum(kernel, tl.maximum((stop - start + A[2] - 1) // A[2], 0))
    else:
        return kernel


@triton.jit
def _count(start, stop, kernel, A: tl.constexpr, PADDED: tl.constexpr):
    """Elements of windows along an axis, inside the input or the padded extent."""
    if PADDED:
        return count_padded(start, stop, kernel, A)
    else:
        return count_inside(start, stop, kernel, A)


@triton.jit
def _next(t, low, high, carry):
    """The tap after t where there is a carry from the axis behind, and whether the axis before is
    to go on."""
    t += carry.to(tl.int32)
    ends = t >= high
    return tl.where(ends, low, t), ends


@triton.jit
def box_kernel(
    x, y, state, planes, total, splits, ins, outs, kernels, inner,
    IN: tl.constexpr, INNER: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr,
    LAST: tl.constexpr, WHOLE: tl.constexpr,
    SUM: tl.constexpr, LARGEST: tl.constexpr, WORST: tl.constexpr, FLOAT: tl.constexpr,
    SAVE: tl.constexpr, MEAN: tl.constexpr, PADDED: tl.constexpr, DIVISOR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Lanes are BT taps of BL outputs: of COLUMNS neighbours in several planes, or LAST of numbers
    of one element. FULL chunks of taps always lie inside, EVEN outputs do. With `splits` results
    are parts of windows, `total` outputs apart."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    i0, i1, i2, i3 = ins[0], ins[1], ins[2], ins[3] * IN
    o0, o1, o2 = outs[0], outs[1], outs[2]
    o3 = COLUMNS if A3[1] == 0 and COLUMNS > 1 else outs[3]  # a division by a constant is cheap
    k0, k1, k2, k3 = kernels[0], kernels[1], kernels[2], kernels[3]
    depth = inner * INNER
    lane = tl.arange(0, BL)[None, :]
    part = tl.program_id(0) % splits
    rest = tl.program_id(0) // splits
    if LAST:
        channel = rest % tl.cdiv(depth, BL) * BL + lane
        rest = rest // tl.cdiv(depth, BL)
        a3 = rest % o3
        rest = rest // o3
    else:
        channel = tl.zeros([1, BL], tl.int32)
        if COLUMNS == 1:
            a3 = rest % o3
            rest = rest // o3
        else:
            a3 = rest % tl.cdiv(o3, COLUMNS) * COLUMNS + lane % COLUMNS
            rest = rest // tl.cdiv(o3, COLUMNS)
    a2 = rest % o2
    rest = rest // o2
    a1 = rest % o1
    rest = rest // o1
    a0 = rest % o0
    if LAST:
        plane = rest // o0 + tl.zeros([1, BL], tl.int32)
        live = channel < depth
    else:
        plane = rest // o0 * (BL // COLUMNS) + lane // COLUMNS
        live = plane < planes
        if COLUMNS > 1:
            live = live & (lane < BL // COLUMNS * COLUMNS) & (a3 < o3)
    f0, e0 = start_of(a0, i0, o0, A0), stop_of(a0, i0, o0, A0)
    f1, e1 = start_of(a1, i1, o1, A1), stop_of(a1, i1, o1, A1)
    f2, e2 = start_of(a2, i2, o2, A2), stop_of(a2, i2, o2, A2)
    if WHOLE:
        f3, e3 = 0, i3
    else:
        f3, e3 = start_of(a3, i3, o3, A3), stop_of(a3, i3, o3, A3)
    low0, high0 = first_tap(f0, A0), _end_tap(f0, e0, k0, A0)
    low1, high1 = first_tap(f1, A1), _end_tap(f1, e1, k1, A1)
    low2, high2 = first_tap(f2, A2), _end_tap(f2, e2, k2, A2)
    low3, high3 = first_tap(f3, A3), _end_tap(f3, e3, k3, A3)
    # The steps of this part, and the taps of the first.
    blocks = tl.cdiv(k3, BT * CHUNKS)
    steps = (high0 - low0) * (high1 - low1) * (high2 - low2) * blocks
    share = tl.cdiv(steps, splits)
    begin = part * share
    block = begin % blocks
    row = begin // blocks
    t2 = low2 + row % (high2 - low2)
    row = row // (high2 - low2)
    t1 = low1 + row % (high1 - low1)
    t0 = low0 + row // (high1 - low1)
    tap = tl.arange(0, BT)[:, None]
    source = x + (plane.to(tl.int64) * (i0 * i1 * i2 * i3 * depth) + channel + f3 * depth)
    source += tap * A3[2] * depth
    best = tl.full([BT, BL], WORST, WIDE)
    offset = tl.zeros([BT, BL], tl.int32) + k0 * k1 * k2 * k3
    for _ in range(begin, tl.minimum(begin + share, steps)):
        first = block * (BT * CHUNKS)
        at = ((f0 + t0 * A0[2]) * i1 + f1 + t1 * A1[2]) * i2 + f2 + t2 * A2[2]
        at = (at * i3 + first * A3[2]) * depth
        code = ((t0 * k1 + t1) * k2 + t2) * k3 + first
        for c in tl.static_range(CHUNKS):
            read = source + at + c * BT * A3[2] * depth
            if c < FULL:
                v = tl.load(read) if EVEN else tl.load(read, mask=live, other=WORST)
            else:
                t = first + c * BT + tap
                valid = live & (t < high3)
                if A3[4] > 0:
                    valid = valid & (t >= low3)
                v = tl.load(read, mask=valid, other=WORST)
            v = v.to(WIDE)
            if SUM:
                best += v
            elif SAVE:
                take = better(v, best, LARGEST, FLOAT)
                best = tl.where(take, v, best)
                offset = tl.where(take, code + c * BT + tap, offset)
            else:
                best = extreme(best, v, LARGEST)
        block, carry = _next(block, 0, blocks, tl.full([], 1, tl.int1))
        t2, carry = _next(t2, low2, high2, carry)
        t1, carry = _next(t1, low1, high1, carry)
        t0 += carry.to(tl.int32)
    at = (((plane.to(tl.int64) * o0 + a0) * o1 + a1) * o2 + a2) * o3 + a3
    at = part.to(tl.int64) * total + at * depth + channel
    if SUM:
        value = tl.sum(best, 0, keep_dims=True)
        if MEAN:
            rows = _count(f0, e0, k0, A0, PADDED) * _count(f1, e1, k1, A1, PADDED)
            rows = rows * _count(f2, e2, k2, A2, PADDED)
            number = tl.zeros([1, BL], tl.int32) + rows * _count(f3, e3, k3, A3, PADDED)
            value = value / number.to(WIDE) if DIVISOR is None else value / DIVISOR
    elif SAVE:
        value, winner = find_winner(best, offset, k0 * k1 * k2 * k3, LARGEST, WORST, FLOAT)
        # Of nothing but the worst value the first tap wins.
        head = ((low0 * k1 + low1) * k2 + low2) * k3 + low3
        winner = tl.where((part == 0) & (winner == k0 * k1 * k2 * k3), head, winner)
        tl.store(state + at, winner.to(state.dtype.element_ty), mask=live)
    elif LARGEST:
        value = tl.reduce(best, 0, larger, keep_dims=True)
    else:
        value = tl.reduce(best, 0, smaller, keep_dims=True)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=live)


@triton.jit
def join_kernel(
    parts, places, y, state, total, splits,
    B: tl.constexpr, SUM: tl.constexpr, LARGEST: tl.constexpr, FLOAT: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """Lanes are outputs, whose parts follow each other."""
    lane = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    live = lane < total
    best = tl.load(parts + lane, mask=live, other=0)
    if SAVE:
        place = tl.load(places + lane, mask=live, other=0)
    for part in range(1, splits):
        lane += total
        v = tl.load(parts + lane, mask=live, other=0)
        if SUM:
            best += v
        elif SAVE:
            take = better(v, best, LARGEST, FLOAT)
            best = tl.where(take, v, best)
            place = tl.where(take, tl.load(places + lane, mask=live, other=0), place)
        else:
            best = extreme(best, v, LARGEST)
    lane = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(y + lane, best.to(y.dtype.element_ty), mask=live)
    if SAVE:
        tl.store(state + lane, place.to(state.dtype.element_ty), mask=live)


# Launching


class Tile(NamedTuple):
    """What a program reads at a time."""

    taps: int
    lanes: int
    columns: int
    chunks: int


def _tile(seen: Boxes, item: int) -> Tile:
    """Lanes that are neighbours in memory, at least 32 bytes of each row where rows are apart."""
    taps = seen.kernels[-1]
    if seen.inner > 1:
        lanes = geometry.block(seen.inner, 256)
        height = min(geometry.power(taps), _LANES // lanes)
        return Tile(height, lanes, 1, min(4, -(-taps // height)))
    last = seen.outs[-1]
    adaptive = seen.spans[-1].stride == 0
    columns = last if adaptive else geometry.block(last, _NARROW)
    least = 4 if columns > 1 else 32 // item
    height = min(max(least, geometry.power(taps) // _CHUNKS), 256)
    chunks = min(_CHUNKS, -(-taps // height))
    lanes = (_LANES if chunks <= 2 or item < 4 else _LANES // 2) // height
    while seen.outputs < 2 * _PROGRAMS * lanes and lanes * height > _LANES // 4:
        lanes //= 2
    return Tile(height, max(lanes, geometry.power(columns)), columns, chunks)


def _full(seen: Boxes, tile: Tile) -> int:
    """Chunks of taps that lie inside whatever the window."""
    last = seen.spans[-1]
    one_block = last.kernel <= tile.taps * tile.chunks
    return min(last.high, last.kernel) // tile.taps if one_block and last.low == 0 else 0


def _even(seen: Boxes, tile: Tile) -> bool:
    """Whether no lane is without an output."""
    if seen.inner > 1:
        return seen.inner % tile.lanes == 0
    planes = tile.lanes // tile.columns
    fits = tile.lanes % tile.columns == 0 and seen.outs[-1] % tile.columns == 0
    return fits and seen.planes % planes == 0


def _programs(seen: Boxes, tile: Tile) -> int:
    if seen.inner > 1:
        return seen.planes * math.prod(seen.outs) * -(-seen.inner // tile.lanes)
    blocks = -(-seen.outs[-1] // tile.columns)
    return -(-seen.planes // (tile.lanes // tile.columns)) * math.prod(seen.outs[:-1]) * blocks


def _splits(seen: Boxes, tile: Tile, programs: int) -> int:
    """Parts of each window."""
    steps = math.prod(seen.kernels[:-1]) * -(-seen.kernels[-1] // (tile.taps * tile.chunks))
    return max(1, min(_PROGRAMS // programs, steps // _STEPS))


def _loose(spans: tuple[Span, ...]) -> tuple[tuple[int, ...], ...]:
    """What of the spans decides code: not how long windows are, nor how many see an input."""
    return tuple(
        tuple(s._replace(kernel=1, low=min(s.low, 1), high=int(s.high >= s.kernel), covers=1))
        for s in spans
    )


def _run(
    view: View, x: Tensor, y: Tensor, state: Tensor, wide: torch.dtype, **constants: Any
) -> None:
    seen = boxes(view)
    tile = _tile(seen, x.element_size())
    programs = _programs(seen, tile)
    splits = _splits(seen, tile, programs)
    save, total = bool(state.numel()), seen.outputs
    parts, places = y, state
    if splits > 1:
        parts = y.new_empty(splits * total, dtype=wide)
        places = y.new_empty(splits * total if save else 0, dtype=torch.int32)
    aligned = 1 if seen.inner > 1 else geometry.alignment(seen.ins[-1])
    width = geometry.alignment(seen.inner)
    shared = {name: constants[name] for name in ("SUM", "LARGEST", "FLOAT")}
    launching.launch(
        box_kernel, programs * splits, x,
        x, parts, places, seen.planes, total, splits,
        (*seen.ins[:-1], seen.ins[-1] // aligned), seen.outs, seen.kernels, seen.inner // width,
        IN=aligned, INNER=width, W=_loose(seen.spans), BT=tile.taps, BL=tile.lanes,
        COLUMNS=tile.columns, CHUNKS=tile.chunks, FULL=_full(seen, tile), EVEN=_even(seen, tile),
        LAST=seen.inner > 1, WHOLE=seen.whole,
        SAVE=save, **constants,
    )  # fmt: skip
    if splits > 1:
        launching.launch(
            join_kernel, -(-total // 256), x,
            parts, places, y, state, total, splits, B=256, SAVE=save, **shared,
        )  # fmt: skip


def select(seen: View, x: Tensor, reduction: Selection, y: Tensor, state: Tensor) -> None:
    """Winners of windows that `serve` admits."""
    wide = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    _run(
        seen, x, y, state, wide,
        SUM=False, LARGEST=reduction.largest, WORST=worst(x.dtype, reduction.largest),
        FLOAT=x.dtype.is_floating_point, MEAN=False, PADDED=False, DIVISOR=None,
        WIDE=compared(x.dtype, False),
    )  # fmt: skip


def accumulate(seen: View, x: Tensor, reduction: Accumulation, y: Tensor) -> None:
    """Sums or means of windows that `serve` admits."""
    mean = isinstance(reduction, Mean)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    _run(
        seen, x, y, y.new_empty(0), wide,
        SUM=True, LARGEST=True, WORST=0.0, FLOAT=True, MEAN=mean,
        PADDED=isinstance(reduction, Mean) and reduction.count_include_pad,
        DIVISOR=reduction.divisor if isinstance(reduction, Mean) else None,
        WIDE=geometry.compute(x.dtype),
    )  # fmt: skip
