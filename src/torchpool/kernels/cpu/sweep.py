"""Large windows, axis by axis: the time for a window hardly grows with its size.

Each input row is reduced along the last axis in stages (windows of 1, 3, 9, ... elements, each from
three of the stage before), then a strip of columns at a time is reduced down the rows by the method
of van Herk (Pattern Recognition Letters 13, 1992) and Gil and Werman (IEEE PAMI 15, 1993): blocks
as long as a window, cumulated from both ends; a window is the end of one block and the beginning of
the next. Nothing is ever subtracted, so sums lose no precision.

In that order (along rows, then down) the later of two candidates wins only where it beats the
earlier, which gives torch's winner: the first of equals, the last NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from torchpool.kernels.cpu.constants import constants
from torchpool.kernels.cpu.direct import keep_state, scaled
from torchpool.kernels.cpu.lines import count_row, is_idle, request
from torchpool.kernels.cpu.parts import APART, INNER, JIT, inlined
from torchpool.kernels.cpu.plan import BEFORE, FIRST, KERNEL, OUT, SIZE, STRIDE
from torchpool.kernels.cpu.scalars import Total, beats, empty_buffer, identity, merge, merge3
from torchpool.kernels.cpu.simd import (
    choose,
    codes_as,
    gather,
    lane_numbers,
    load,
    load_as,
    load_first,
    per_line,
    splat,
    store,
    store_first,
    width,
)

CHUNK = 1024
"""Elements that are reduced along rows at a time."""
PIECE = 4096
"""Elements of a long row that are reduced along it at a time."""
DIRECT = 7
"""Windows of so many rows are merged row by row."""

# Candidates: a value, and where offsets are kept also the offset -----------------------------


def fetch(values: Any, codes: Any, at: Any, like: Any) -> Any:
    """The candidates at `at` and following."""


@inlined(fetch)
def _fetch(values, codes, at, like):
    if codes == types.none:
        return lambda values, codes, at, like: (load_as(values, at, like), None)
    return lambda values, codes, at, like: (load_as(values, at, like), load_as(codes, at, like))


def put(values: Any, codes: Any, at: Any, candidate: Any) -> None:
    """Writes candidates."""


@inlined(put)
def _put(values, codes, at, candidate):
    if codes == types.none:
        return lambda values, codes, at, candidate: store(values, at, candidate[0])

    def pair(values, codes, at, candidate):
        store(values, at, candidate[0])
        store(codes, at, candidate[1])

    return pair


def contest(tag: Any, first: Any, second: Any) -> Any:
    """The better of two candidates, of which the second comes later."""


@inlined(contest)
def _contest(tag, first, second):
    if first[1] == types.none:
        return lambda tag, first, second: (merge(tag, first[0], second[0]), None)

    def winner(tag, first, second):
        wins = beats(tag, second[0], first[0])
        return choose(wins, second[0], first[0]), choose(wins, second[1], first[1])

    return winner


def contest3(tag: Any, first: Any, second: Any, third: Any) -> Any:
    """The best of three candidates, each later than the one before."""


@inlined(contest3)
def _contest3(tag, first, second, third):
    if first[1] == types.none:
        return lambda tag, first, second, third: (merge3(tag, first[0], second[0], third[0]), None)
    return lambda tag, first, second, third: contest(tag, contest(tag, first, second), third)


def moved(candidate: Any, by: Any) -> Any:
    """The candidate with an offset that is larger by a number, modulo the range of offsets."""


@inlined(moved)
def _moved(candidate, by):
    if candidate[1] == types.none:
        return lambda candidate, by: candidate
    return lambda candidate, by: (candidate[0], candidate[1] + by)


def none_yet(like: Any, codes: Any) -> Any:
    """A candidate that loses against all."""


@inlined(none_yet)
def _none_yet(like, codes):
    if codes == types.none:
        return lambda like, codes: (like, None)
    return lambda like, codes: (like, codes_as(like, codes, 0))


def is_total(tag: Any) -> bool:
    """Whether no element may be merged twice."""
    raise NotImplementedError


@inlined(is_total)
def _is_total(tag):
    total = tag.instance_class is Total
    return lambda tag: total


def empty_offsets(state: Any, size: Any) -> Any:
    """Room for offsets; None where none are kept."""


@overload(empty_offsets)
def _empty_offsets(state, size):
    if state == types.none:
        return lambda state, size: None
    return lambda state, size: np.zeros(size, state.dtype)


def set_codes(codes: Any, begin: Any, end: Any, number: Any) -> None:
    """Sets a stretch of offsets; nothing where none are kept."""


@inlined(set_codes)
def _set_codes(codes, begin, end, number):
    if codes == types.none:
        return lambda codes, begin, end, number: None

    def fill(codes, begin, end, number):
        codes[begin:end] = number

    return fill


# Along a row ------------------------------------------------------------------------------------


@njit(**INNER)
def combine(tag, values, codes, to, a, b, by, n, like):
    """n candidates from `a` on against those from `b` on, whose offsets are larger by `by`."""
    for i in range(0, n, width(like)):
        second = moved(fetch(values, codes, b + i, like), by)
        put(values, codes, to + i, contest(tag, fetch(values, codes, a + i, like), second))


@njit(**INNER)
def duplicate(out, out_codes, to, values, codes, a, n, like):
    for i in range(0, n, width(like)):
        put(out, out_codes, to + i, fetch(values, codes, a + i, like))


@njit(**INNER)
def combine3(tag, values, codes, to, a, b, c, by, more, n, like):
    """The same of three, those from `c` on with offsets that are larger by `more`."""
    for i in range(0, n, width(like)):
        second = moved(fetch(values, codes, b + i, like), by)
        third = moved(fetch(values, codes, c + i, like), more)
        put(values, codes, to + i, contest3(tag, fetch(values, codes, a + i, like), second, third))


@njit(**INNER)
def stretches(kernel):
    """Stretches of candidates that `grown` needs."""
    count, size = 1, 3
    while size <= kernel:
        count, size = count + 1, 3 * size
    return count


@njit(**APART)
def grown(tag, values, codes, span, source, spare, kernel, step, n, like):
    """Windows of `kernel` elements, `step` apart, that begin at each of n places from `source` on:
    windows of 1, 3, 9, ... elements, each from three of the stage before, and then those of the
    stages that make the window. Returns where the results lie: at `source` if `kernel` is 1, else
    in one of the `stretches(kernel)` from `spare` on, of `span` candidates each, which it
    overwrites."""
    now, to, size, level = source, spare, 1, 0
    while 3 * size <= kernel:
        second, third = now + size * step, now + 2 * size * step
        combine3(tag, values, codes, to, now, second, third, size, 2 * size,
                 n + (kernel - 3 * size) * step, like)  # fmt: skip
        now, to, size, level = to, to + span, 3 * size, level + 1
    rest = kernel - size
    if rest == 0:
        return now
    if not is_total(tag):
        middle = min(size, rest)
        combine3(tag, values, codes, to, now, now + middle * step, now + rest * step, middle, rest,
                 n, like)  # fmt: skip
        return to
    done, waiting = size, np.int64(-1)
    while done < kernel:
        while done + size > kernel:
            size, level = size // 3, level - 1
        at = (source if level == 0 else spare + (level - 1) * span) + done * step
        done += size
        if waiting >= 0:
            combine3(tag, values, codes, to, now, waiting, at, 0, 0, n, like)
            now, waiting = to, -1
        elif done == kernel:
            combine(tag, values, codes, to, now, at, 0, n, like)
            now = to
        else:
            waiting = at
    return now


@njit(**INNER)
def spread_out(out, out_codes, to, values, codes, a, outs, stride, inner, like):
    """Every `stride`-th position of a row, side by side."""
    if stride == 1:
        duplicate(out, out_codes, to, values, codes, a, outs * inner, like)
    elif inner > 1:
        for o in range(outs):
            at = a + o * stride * inner
            duplicate(out, out_codes, to + o * inner, values, codes, at, inner, like)
    else:
        lanes = lane_numbers(like)
        for o in range(0, outs, width(like)):
            mask = lanes < outs - o
            store(out, to + o, gather(values, a + o * stride, lanes * stride, mask))
            pick_codes(out_codes, to + o, codes, a + o * stride, lanes * stride, mask)


def pick_codes(out: Any, to: Any, codes: Any, at: Any, places: Any, mask: Any) -> None:
    """Stores gathered offsets; nothing where none are kept."""


@inlined(pick_codes)
def _pick_codes(out, to, codes, at, places, mask):
    if out == types.none:
        return lambda out, to, codes, at, places, mask: None
    return lambda out, to, codes, at, places, mask: store(out, to, gather(codes, at, places, mask))


def clip(codes: Any, at: Any, begin: Any, outs: Any, geo: Any, tab: Any, inner: Any) -> None:
    """Where padding won along a row, all of the window is the smallest number there is: its first
    valid element wins. The outputs `begin .. begin + outs - 1` of the row lie at codes[at]."""


@inlined(clip)
def _clip(codes, at, begin, outs, geo, tab, inner):
    if codes == types.none:
        return lambda codes, at, begin, outs, geo, tab, inner: None

    def clipped(codes, at, begin, outs, geo, tab, inner):
        if is_idle(geo, 3):
            return
        for o in range(outs):
            first = tab[geo[3, FIRST] + begin + o]
            if first == 0:
                break
            for c in range(inner):
                i = at + o * inner + c
                if codes[i] < first:
                    codes[i] = first

    return clipped


@njit(**APART)
def along(tag, x, source, count, begin, outs, out, out_codes, to, pitch, values, codes, span, geo,
          tab, inner):  # fmt: skip
    """The outputs `begin .. begin + outs - 1` of `count` input rows, the first at x[source], along
    the last axis: reduced as if the rows were one, each with room for its padding. Results go to
    out[to], `pitch` apart."""
    nothing = splat(x, identity(tag, x))
    lanes = lane_numbers(nothing)
    stride, kernel, size = geo[3, STRIDE], geo[3, KERNEL], geo[3, SIZE] * inner
    line = ((outs - 1) * stride + kernel) * inner
    start = (begin * stride - geo[3, BEFORE]) * inner
    before = min(line, max(0, -start))
    held = max(0, min(size - max(0, start), line - before))
    for r in range(count):
        at, read = r * line + before, source + r * size + max(0, start)
        fill(values, r * line, at, nothing)
        for i in range(0, held, width(x)):
            if held - i >= width(x):
                store(values, at + i, load(x, read + i))
            else:
                v = load_first(x, read + i, held - i)
                store(values, at + i, choose(lanes < held - i, v, nothing))
        fill(values, at + held, (r + 1) * line, nothing)
    places = count * line - (kernel - 1) * inner
    found = grown(tag, values, codes, span, 0, span, kernel, inner, places, nothing)
    for r in range(count):
        spread_out(out, out_codes, to + r * pitch, values, codes, found + r * line, outs, stride,
                   inner, nothing)  # fmt: skip
        clip(out_codes, to + r * pitch, begin, outs, geo, tab, inner)


@njit(**INNER)
def fill(values, begin, end, v):
    for i in range(begin, end, width(v)):
        store_first(values, i, v, end - i)


# Down the rows ------------------------------------------------------------------------------------


@njit(**INNER)
def finish_strip(tag, y, state, at, candidate, count, counts, c, scale, is_mean, floor, firsts):
    """Writes a strip of a row of outputs. Offsets below `floor` are those of padding."""
    store_first(y, at, scaled(candidate[0], counts, c, scale, tag, is_mean), count)
    keep_state(state, at, valid_code(candidate[0], candidate[1], floor, firsts, c), count, y.size)


def valid_code(like: Any, code: Any, floor: Any, firsts: Any, c: Any) -> Any:
    """The offset, or that of the first valid element where padding won."""


@inlined(valid_code)
def _valid_code(like, code, floor, firsts, c):
    if code == types.none:
        return lambda like, code, floor, firsts, c: None

    def checked(like, code, floor, firsts, c):
        if floor == 0:
            return code
        return choose(code < floor, load_as(firsts, c, like) + floor, code)

    return checked


@njit(**APART)
def down(tag, buffer, codes, pitch, begin, count, c, ends, end_codes, y, state, to, row_size,
         counts, is_mean, fixed, column, firsts, geo, tab):  # fmt: skip
    """Outputs `begin .. begin + count - 1` along axis 2 of the strip of columns from c on. Row r of
    the buffer is position `begin * stride - before + r`; `ends` is room for the ends of a block."""
    like = splat(buffer, identity(tag, buffer))
    kernel, stride, unit = geo[2, KERNEL], geo[2, STRIDE], geo[3, KERNEL]
    left = row_size - c
    rows = (count - 1) * stride + kernel
    o, awaited = begin, np.int64(0)
    for block in range(0, rows, kernel):
        held = none_yet(like, codes)
        for k in range(kernel):
            r = kernel - 1 - k
            if block + r < rows:
                mine = moved(fetch(buffer, codes, (block + r) * pitch + c, like), r * unit)
                held = contest(tag, mine, held) if block + r + 1 < rows and k > 0 else mine
                put(ends, end_codes, r * width(like), held)
        held = none_yet(like, codes)
        for t in range(kernel):
            if t > 0:
                r = block + kernel + t - 1
                if r >= rows:
                    break
                mine = moved(fetch(buffer, codes, r * pitch + c, like), (t - 1) * unit)
                held = contest(tag, held, mine) if t > 1 else mine
            awaited -= 1
            if awaited >= 0 or o >= begin + count:
                continue
            awaited = stride - 1
            best = moved(fetch(ends, end_codes, t * width(like), like), -t * unit)
            if t > 0:
                best = contest(tag, best, moved(held, (kernel - t) * unit))
            first, scale = np.int64(0), counts.dtype.type(1)
            if not is_idle(geo, 2):
                first = tab[geo[2, FIRST] + o]
                if is_mean and fixed == 0:
                    scale = counts.dtype.type(max(1, tab[geo[2, column] + o]))
            at = to + (o - begin) * row_size + c
            finish_strip(tag, y, state, at, best, left, counts, c, scale, is_mean,
                         first * unit, firsts)  # fmt: skip
            o += 1


@njit(**APART)
def down_directly(tag, buffer, codes, pitch, begin, count, y, state, to, row_size, counts, is_mean,
                  fixed, column, firsts, geo, tab):  # fmt: skip
    """`down` for all columns, row by row: for windows of a few rows."""
    like = splat(buffer, identity(tag, buffer))
    kernel, stride, unit = geo[2, KERNEL], geo[2, STRIDE], geo[3, KERNEL]
    for k in range(count):
        first, scale = np.int64(0), counts.dtype.type(1)
        if not is_idle(geo, 2):
            first = tab[geo[2, FIRST] + begin + k]
            if is_mean and fixed == 0:
                scale = counts.dtype.type(max(1, tab[geo[2, column] + begin + k]))
        top = k * stride * pitch
        for c in range(0, row_size, width(like)):
            best = fetch(buffer, codes, top + c, like)
            for j in range(1, kernel):
                mine = moved(fetch(buffer, codes, top + j * pitch + c, like), j * unit)
                best = contest(tag, best, mine)
            finish_strip(tag, y, state, to + k * row_size + c, best, row_size - c, counts, c, scale,
                         is_mean, first * unit, firsts)  # fmt: skip


# Kernel --------------------------------------------------------------------------------


@njit(**INNER)
def piece_of(geo, inner):
    """Outputs of a row that are reduced at a time: all of a short one, else so many that windows
    read little twice."""
    most = max(PIECE // inner, 4 * geo[3, KERNEL]) // geo[3, STRIDE]
    pieces = -(-geo[3, OUT] // max(1, most))
    return -(-geo[3, OUT] // pieces)


def fill_firsts(firsts: Any, geo: Any, tab: Any, inner: Any) -> None:
    """The first valid tap along the last axis of each element of a row."""


@inlined(fill_firsts)
def _fill_firsts(firsts, geo, tab, inner):
    if firsts == types.none:
        return lambda firsts, geo, tab, inner: None

    def fill(firsts, geo, tab, inner):
        if not is_idle(geo, 3):
            for i in range(geo[3, OUT] * inner):
                firsts[i] = tab[geo[3, FIRST] + i // inner]

    return fill


@njit(**JIT)
def sweep(begin, end, tag, x, y, state, geo, tab, inner, block, column, fixed):
    """Blocks `begin .. end - 1` of `block` rows of outputs; windows at a regular stride without
    dilation along the last two axes, nothing pooled along the others.

    A mean divides by `fixed`, or where that is 0 by the count table `column`; a `column` of -1
    divides by nothing.
    """
    geo, tab = constants(geo), constants(tab)
    like = splat(x, identity(tag, x))
    lanes = width(like)
    row_size, in_size = geo[3, OUT] * inner, geo[3, SIZE] * inner
    pitch = -(-row_size // lanes) * lanes + lanes
    stride, kernel = geo[2, STRIDE], geo[2, KERNEL]
    most = (min(block, geo[2, OUT]) - 1) * stride + kernel
    buffer, codes = empty_buffer(x, most * pitch), empty_offsets(state, most * pitch)
    buffer[:] = identity(tag, x)
    piece = piece_of(geo, inner)
    line = ((piece - 1) * geo[3, STRIDE] + geo[3, KERNEL]) * inner
    chunk = max(1, CHUNK // line)
    span = chunk * line + 4 * lanes
    room = (1 + stretches(geo[3, KERNEL])) * span
    values, row_codes = empty_buffer(x, room), empty_offsets(state, room)
    values[:] = identity(tag, x)
    ends, end_codes = empty_buffer(x, kernel * lanes), empty_offsets(state, kernel * lanes)
    firsts = empty_offsets(state, row_size + lanes)
    fill_firsts(firsts, geo, tab, inner)
    counts = empty_buffer(x, row_size + lanes)
    is_mean = column >= 0
    if is_mean:
        count_row(counts, geo, tab, inner, column, fixed)
    blocks = -(-geo[2, OUT] // block)
    for unit in range(begin, end):
        plane, first = unit // blocks, unit % blocks * block
        count = min(block, geo[2, OUT] - first)
        rows = (count - 1) * stride + kernel
        top = first * stride - geo[2, BEFORE]
        low, high = min(rows, max(0, -top)), max(0, min(rows, geo[2, SIZE] - top))
        buffer[: low * pitch] = identity(tag, x)
        buffer[high * pitch : rows * pitch] = identity(tag, x)
        set_codes(codes, 0, low * pitch, 0)
        set_codes(codes, high * pitch, rows * pitch, 0)
        for r in range(low, high, chunk):
            some = min(chunk, high - r)
            source = (plane * geo[2, SIZE] + top + r) * in_size
            request(x, source + some * in_size, some * in_size // per_line(x) + 1)
            for o in range(0, geo[3, OUT], piece):
                outs = min(piece, geo[3, OUT] - o)
                along(tag, x, source, some, o, outs, buffer, codes, r * pitch + o * inner, pitch,
                      values, row_codes, span, geo, tab, inner)  # fmt: skip
        to = (plane * geo[2, OUT] + first) * row_size
        if kernel <= DIRECT:
            down_directly(tag, buffer, codes, pitch, first, count, y, state, to, row_size, counts,
                          is_mean, fixed, column, firsts, geo, tab)  # fmt: skip
            continue
        for c in range(0, row_size, lanes):
            down(tag, buffer, codes, pitch, first, count, c, ends, end_codes, y, state, to,
                 row_size, counts, is_mean, fixed, column, firsts, geo, tab)  # fmt: skip
