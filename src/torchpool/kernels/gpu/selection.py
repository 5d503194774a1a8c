"""Selections: one input of each window wins; the state is its offset in the window.

Three kernels choose winners: `few` for small windows (lanes are outputs, taps are unrolled), `many`
for large ones (lanes are taps, too), and in `passes` an axis at a time for large overlapping ones.
One sends gradients back, and writes every input once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels.gpu import geometry, launching
from torchpool.kernels.gpu.formulas import formula
from torchpool.kernels.gpu.geometry import (
    View,
    count_inside,
    cover,
    first_tap,
    known,
    lanes_of,
    last_cover,
    own,
    reach_of,
    strided,
    tap_inside,
    taps_of,
    unpack_sizes,
    windows_of,
)
from torchpool.reductions import Selection

ELEMENTS = 1024
"""Elements that a program of four warps writes."""
FEW = 32
"""Windows up to this size are unrolled."""
ROWS_OF_A_LANE = 4
"""Neighbouring windows that share what they read."""
UNROLLED_COVERS = 16


@triton.jit
def better(v, best, LARGEST: tl.constexpr, FLOAT: tl.constexpr):
    """Whether a later tap wins: first of equals, last of NaNs."""
    wins = v > best if LARGEST else v < best
    if FLOAT:
        wins = wins | (v != v)
    return wins


@triton.jit
def extreme(v, w, LARGEST: tl.constexpr):
    """The larger (or smaller) of two values; NaN if one is."""
    if LARGEST:
        return tl.maximum(v, w, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.minimum(v, w, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _join(
    value, code, v, c,
    LARGEST: tl.constexpr, FLOAT: tl.constexpr, SAVE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The better of two candidates, of which the second comes later; FIRST: there is only one."""
    if FIRST:
        value = v
        if SAVE:
            code = c + code * 0
    elif SAVE:
        take = better(v, value, LARGEST, FLOAT)
        value = tl.where(take, v, value)
        code = tl.where(take, c, code)
    else:
        value = extreme(value, v, LARGEST)
    return value, code


@triton.jit
def few_kernel(
    x, y, state, mask, carried, planes, channels, ins, outs, mask_strides, divisors,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, V: tl.constexpr, ALONG: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ONES: tl.constexpr, KEY: tl.constexpr,
    LARGEST: tl.constexpr, WORST: tl.constexpr, FLOAT: tl.constexpr, SAVE: tl.constexpr,
    MASKED: tl.constexpr, CARRY: tl.constexpr, TRACK: tl.constexpr, REGULAR: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A lane owns HEIGHT windows along the axis ALONG (2 or 3) times WIDTH along the last; V are
    the spans of single windows, in W stands what they look at together. Every element is read once,
    and what is found in a row goes to all windows that see it. With CARRY every tap brings an
    offset of its own (`carried`, of x's shape), to which the tap is added CARRY times. TRACK
    remembers whether a tap took part; without it, taps outside the input hold the worst value."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    S: tl.constexpr = V[ALONG]
    Q: tl.constexpr = V[4]
    K2: tl.constexpr = S[0] if ALONG == 2 else A2[0]
    K3: tl.constexpr = S[0] if ALONG == 3 else A3[0]
    K4: tl.constexpr = Q[0]
    LONG: tl.constexpr = A4[0]
    ASIDE: tl.constexpr = Q[1] if WIDTH > 1 else 0
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
    payload = carried + plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    if MASKED:
        n, c = plane // channels, plane % channels
        allowed = mask + n.to(tl.int64) * mask_strides[0] + c.to(tl.int64) * mask_strides[1]
    f0, e0 = reach_of(a0, i0, o0, divisors[0], divisors[1], A0, INDEX)
    f1, e1 = reach_of(a1, i1, o1, divisors[2], divisors[3], A1, INDEX)
    f2, e2 = reach_of(a2, i2, b2, divisors[4], divisors[5], A2, INDEX)
    f3, e3 = reach_of(a3, i3, b3, divisors[6], divisors[7], A3, INDEX)
    f4, e4 = reach_of(a4, i4, b4, divisors[8], divisors[9], A4, INDEX)
    # The winner of a row: from its first tap where that lies inside, else from the worst value.
    INSIDE: tl.constexpr = A4[4] == 0 and (ALONG == 3 or A3[4] == 0) and not TRACK
    nothing = tl.full([ROWS, COLUMNS], WORST, WIDE)
    nowhere = tl.zeros([ROWS, COLUMNS], tl.int32)
    values = ()
    begin = ()
    for c in tl.static_range(WIDTH):
        code = nowhere
        if SAVE and not TRACK and not INSIDE:
            code += first_tap(f4 + c * ASIDE, A4)
            if ALONG == 2:
                code += first_tap(f3, A3) * K4
        values = values + (nothing,)
        begin = begin + (code,)
    best = ()
    key = ()
    offset = ()
    found = ()
    for o in tl.static_range(HEIGHT):
        for c in tl.static_range(WIDTH):
            best = best + (nothing,)
            key = key + (nothing,)
            found = found + (tl.zeros([ROWS, COLUMNS], tl.int1),)
            if SAVE and not TRACK:  # a window of the worst value: the offset of its first element
                t2 = first_tap(f2 + o * S[1], S) if ALONG == 2 else first_tap(f2, A2)
                t3 = first_tap(f3, A3) if ALONG == 2 else first_tap(f3 + o * S[1], S)
                rows = ((first_tap(f0, A0) * A1[0] + first_tap(f1, A1)) * K2 + t2) * K3 + t3
                offset = offset + (nowhere + rows * K4 + first_tap(f4 + c * ASIDE, A4),)
            else:
                offset = offset + (nowhere,)
    DEEP: tl.constexpr = 1 if ALONG == 2 else K2
    OUTER: tl.constexpr = A0[0] * A1[0] * DEEP
    TALL: tl.constexpr = A2[0] if ALONG == 2 else A3[0]
    INNER: tl.constexpr = A3[0] if ALONG == 2 else 1
    SIZE: tl.constexpr = S[0]
    STEP: tl.constexpr = S[1] if HEIGHT > 1 else 0
    ODD: tl.constexpr = A4[3] % 2
    KNOWN: tl.constexpr = A0[4] + A1[4] + A2[4] + A3[4] + A4[4] == 0 and not TRACK
    PAIRS: tl.constexpr = (
        A4[1] > 0 and A4[1] % 2 == 0 and A4[2] == 1 and LONG > 1 and IN % 2 == 0
        and not TRACK and not LAST
    )  # fmt: skip
    # Addresses go from pointer to pointer by steps that all lanes share: constants cost nothing.
    start = source + (((f0 * i1 + f1) * i2 + f2) * i3 + f3) * i4
    line = start + f4
    pair = start
    if PAIRS:
        pair = start + A4[1] * a4 + tl.arange(0, 2)[None, :]
    bring = payload + ((((f0 * i1 + f1) * i2 + f2) * i3 + f3) * i4 + f4)
    for t in tl.static_range(OUTER):
        p0, p1 = f0 + t // (A1[0] * DEEP) * A0[2], f1 + t // DEEP % A1[0] * A1[2]
        outer = live & tap_inside(p0, e0, t // (A1[0] * DEEP), A0)
        outer = outer & tap_inside(p1, e1, t // DEEP % A1[0], A1)
        if ALONG == 3:
            p2 = f2 + t % DEEP * A2[2]
            outer = outer & tap_inside(p2, e2, t % DEEP, A2)
        rows = ()
        codes = ()
        for r in tl.static_range(TALL):
            if ALONG == 2:
                p2 = f2 + r * A2[2]
                across = outer & tap_inside(p2, e2, r, A2)
            else:
                p3 = f3 + r * A3[2]
                across = outer & tap_inside(p3, e3, r, A3)
            winners = values
            places = begin
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
                        inside = here
                        if j < A4[4]:
                            inside = inside & (at >= A4[3] - j)
                        if j + 1 >= A4[5]:
                            inside = inside & (at < i4 + (A4[3] - j))
                        both = tl.load(pair + step + (j - A4[3]), mask=inside, other=WORST)
                        even, odd = tl.split(tl.reshape(both.to(WIDE), [ROWS, COLUMNS, 2]))
                        if j >= 0:
                            taps = taps + (even,)
                        if j + 1 < LONG:
                            taps = taps + (odd,)
                else:
                    for j in tl.static_range(LONG):
                        p4 = f4 + j * A4[2]
                        valid = here & tap_inside(p4, e4, j, A4)
                        if MASKED:
                            at = strided(p0, p1, p2, p3, p4, mask_strides)
                            valid = valid & (tl.load(allowed + at, mask=valid, other=0) != 0)
                        if MASKED or not (
                            known(t // (A1[0] * DEEP), A0) and known(t // DEEP % A1[0], A1)
                            and known(r if ALONG == 2 else t % DEEP, A2)
                            and known(u if ALONG == 2 else r, A3) and known(j, A4)
                        ):  # fmt: skip
                            read = tl.load(line + step + j * A4[2], mask=valid, other=WORST)
                        else:
                            read = tl.load(line + step + j * A4[2], mask=live)
                        v = read.to(WIDE)
                        if TRACK:
                            tap = ((t * TALL + r) * INNER + u) * K4 + j
                            if CARRY:
                                own = tl.load(bring + step + j * A4[2], mask=valid, other=0)
                                tap = tap * CARRY + own.to(tl.int32)
                            k = KEY(v)
                            take = valid & ((found[0] == 0) | better(k, key[0], LARGEST, FLOAT))
                            best = (tl.where(take, v, best[0]),)
                            key = (tl.where(take, k, key[0]),)
                            offset = (tl.where(take, tap, offset[0]),)
                            found = (found[0] | valid,)
                        taps = taps + (v,)
                if not TRACK:
                    more = ()
                    codes_of = ()
                    for c in tl.static_range(WIDTH):
                        value = winners[c]
                        code = places[c]
                        for j in tl.static_range(K4):
                            value, code = _join(
                                value, code, taps[c * ASIDE + j], u * K4 + j,
                                LARGEST, FLOAT, SAVE, INSIDE and u + j == 0,
                            )  # fmt: skip
                        more = more + (value,)
                        codes_of = codes_of + (code,)
                    winners = more
                    places = codes_of
            rows = rows + (winners,)
            codes = codes + (places,)
        if not TRACK:
            more = ()
            places = ()
            for o in tl.static_range(HEIGHT):
                for c in tl.static_range(WIDTH):
                    value = best[o * WIDTH + c]
                    code = offset[o * WIDTH + c]
                    for r in tl.static_range(SIZE):
                        value, code = _join(
                            value, code, rows[o * STEP + r][c],
                            codes[o * STEP + r][c] + (t * S[0] + r) * (INNER * K4),
                            LARGEST, FLOAT, SAVE, KNOWN and t + r == 0,
                        )  # fmt: skip
                    more = more + (value,)
                    places = places + (code,)
            best = more
            offset = places
    base = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    q2 = a2 * HEIGHT if ALONG == 2 else a2
    q3 = a3 * HEIGHT if ALONG == 3 else a3
    base += (((a0 * o1 + a1) * o2 + q2) * o3 + q3) * o4 + a4 * WIDTH
    to = y + base
    also = state + base
    for o in tl.static_range(HEIGHT):
        q2 = a2 * HEIGHT + o if ALONG == 2 else a2
        q3 = a3 * HEIGHT + o if ALONG == 3 else a3
        step = o * o3 * o4 if ALONG == 2 else o * o4
        inside = live & ((q2 < o2) if ALONG == 2 else (q3 < o3))
        if ALONG == 2:
            number = count_inside(f2 + o * S[1], e2, K2, S) * count_inside(f3, e3, K3, A3)
        else:
            number = count_inside(f2, e2, K2, A2) * count_inside(f3 + o * S[1], e3, K3, S)
        number = number * count_inside(f0, e0, A0[0], A0) * count_inside(f1, e1, A1[0], A1)
        for c in tl.static_range(WIDTH):
            value = best[o * WIDTH + c]
            code = offset[o * WIDTH + c]
            if not REGULAR and not TRACK:
                filled = live & (number * count_inside(f4 + c * ASIDE, e4, K4, Q) > 0)
                value, code = tl.where(filled, value, 0), tl.where(filled, code, 0)
            if TRACK:
                value, code = tl.where(found[o], value, 0), tl.where(found[o], code, 0)
            written = inside
            if WIDTH > 1:
                written = written & (a4 * WIDTH + c < o4)
            tl.store(to + (step + c), value.to(y.dtype.element_ty), mask=written)
            if SAVE:
                tl.store(also + (step + c), code.to(state.dtype.element_ty), mask=written)


@triton.jit
def find_winner(key, offset, taps, LARGEST: tl.constexpr, WORST: tl.constexpr, FLOAT: tl.constexpr):
    """Key and offset of the winners along the first axis, whatever the order of its entries;
    entries of offset `taps` hold nothing."""
    if LARGEST:
        top = tl.max(tl.where(key == key, key, WORST), 0, keep_dims=True)
    else:
        top = tl.min(tl.where(key == key, key, WORST), 0, keep_dims=True)
    winner = tl.min(tl.where(key == top, offset, taps), 0, keep_dims=True)
    if FLOAT:
        last = tl.max(tl.where(key != key, offset, -1), 0, keep_dims=True)
        winner = tl.where(last >= 0, last, winner)
        top = tl.where(last >= 0, float("nan"), top)
    return top, winner


@triton.jit
def many_kernel(
    x, y, state, mask, total, taps, channels, ins, outs, kernels, mask_strides,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr,
    KEY: tl.constexpr, KEYED: tl.constexpr, LARGEST: tl.constexpr, WORST: tl.constexpr,
    FLOAT: tl.constexpr, SAVE: tl.constexpr, MASKED: tl.constexpr, WHOLE: tl.constexpr,
    LAST: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Lanes are taps (BT) of outputs (BL). WHOLE: each plane is one window. LAST: channels-last."""
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    lane = tl.program_id(0).to(INDEX) * BL + tl.arange(0, BL)[None, :]
    live = lane < total
    plane, starts, stops = windows_of(lane, ins, outs, IN, OUT, W)
    source = x + plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    if MASKED:
        n, c = plane // channels, plane % channels
        allowed = mask + n.to(tl.int64) * mask_strides[0] + c.to(tl.int64) * mask_strides[1]
    best = tl.full([BT, BL], WORST, WIDE)
    key = best
    offset = tl.zeros([BT, BL], tl.int32) + taps
    for t0 in range(0, taps, BT):
        t = t0 + tl.arange(0, BT)[:, None]
        if WHOLE:
            valid = live & (t < taps)
            at = t * i4 + starts[4] if LAST else t
        else:
            at, inside, p = taps_of(t, starts, stops, ins, kernels, IN, W)
            valid = live & inside
        if MASKED:
            m = strided(p[0], p[1], p[2], p[3], p[4], mask_strides)
            valid = valid & (tl.load(allowed + m, mask=valid, other=0) != 0)
        v = tl.load(source + at, mask=valid, other=WORST).to(WIDE)
        k = KEY(v)
        # The taps of a lane come in their order; a lane that has seen none takes the first.
        take = valid & ((offset == taps) | better(k, key, LARGEST, FLOAT))
        if KEYED:
            best = tl.where(take, v, best)
        key = tl.where(take, k, key)
        offset = tl.where(take, t, offset)
    top, winner = find_winner(key, offset, taps, LARGEST, WORST, FLOAT)
    seen = winner < taps
    if KEYED:  # the value whose key won stands in the lane that holds the winner's offset
        top = tl.sum(tl.where(seen & (offset == winner), best, 0), 0, keep_dims=True)
    tl.store(y + lane, tl.where(seen, top, 0).to(y.dtype.element_ty), mask=live)
    if SAVE:
        tl.store(state + lane, tl.where(seen, winner, 0).to(state.dtype.element_ty), mask=live)


@triton.jit
def near_kernel(
    grad, state, gx, rest, planes, ins, outs, divisors,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, ALONG: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ONES: tl.constexpr, LAST: tl.constexpr, OUTER: tl.constexpr, UNROLL: tl.constexpr,
    CARRY: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A lane owns HEIGHT inputs along the axis ALONG times WIDTH along the next one, whose windows
    have places that are known when this is compiled; along the axes before it windows are
    searched. Each output is read once and sends to the input that it chose. With CARRY the state
    holds, below the tap times CARRY, offsets that go to `rest` where the input was chosen."""
    R: tl.constexpr = W[ALONG]
    Q: tl.constexpr = W[ALONG + 1]
    FIRST: tl.constexpr = -((R[0] - 1 - R[3]) // R[1])
    FINAL: tl.constexpr = (HEIGHT - 1 + R[3]) // R[1]
    LEFT: tl.constexpr = -((Q[0] - 1 - Q[3]) // Q[1])
    RIGHT: tl.constexpr = (WIDTH - 1 + Q[3]) // Q[1]
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
    if LAST:
        live = live & (a4 < s4)
        r, q, rows, columns, reach = a2 * (HEIGHT // R[1]), a3 * (WIDTH // Q[1]), o2, o3, o4
    else:
        r, q, rows, columns, reach = a3 * (HEIGHT // R[1]), a4 * (WIDTH // Q[1]), o3, o4, 1
    from_base = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    from_base += (r * columns + q) * reach
    if LAST:
        from_base += a4
    total = ()
    left = ()
    for k in tl.static_range(HEIGHT * WIDTH):
        total = total + (tl.zeros([ROWS, COLUMNS], WIDE),)
        left = left + (tl.zeros([ROWS, COLUMNS], tl.int32),)
    if UNROLL:
        for m in tl.static_range(OUTER):
            total, left = _from_plane(
                m, grad + from_base, state + from_base, live, a0, a1, a2, r, q, rows, columns,
                reach, total, left, ins, outs, IN, OUT, W, R, Q, FIRST, FINAL, LEFT, RIGHT, LAST,
                HEIGHT, WIDTH, CARRY, WIDE,
            )  # fmt: skip
    else:
        for m in range(OUTER):
            total, left = _from_plane(
                m, grad + from_base, state + from_base, live, a0, a1, a2, r, q, rows, columns,
                reach, total, left, ins, outs, IN, OUT, W, R, Q, FIRST, FINAL, LEFT, RIGHT, LAST,
                HEIGHT, WIDTH, CARRY, WIDE,
            )  # fmt: skip
    base = plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4)
    if LAST:
        base += (((a0 * i1 + a1) * i2 + a2 * HEIGHT) * i3 + a3 * WIDTH) * i4 + a4
        line, tall, wide, first, second = i3 * i4, i2, i3, a2 * HEIGHT, a3 * WIDTH
    else:
        base += (((a0 * i1 + a1) * i2 + a2) * i3 + a3 * HEIGHT) * i4 + a4 * WIDTH
        line, tall, wide, first, second = i4, i3, i4, a3 * HEIGHT, a4 * WIDTH
    next_one = i4 if LAST else 1
    for u in tl.static_range(HEIGHT):
        here = live & (first + u < tall)
        if WIDTH == 2 and not LAST and IN % 2 == 0 and not CARRY:
            both = tl.reshape(tl.join(total[2 * u], total[2 * u + 1]), [ROWS, 2 * COLUMNS])
            at = gx + base + u * line + tl.arange(0, 2)[None, :]
            tl.store(at, both.to(gx.dtype.element_ty), mask=here & (second < wide))
        else:
            for c in tl.static_range(WIDTH):
                written = here & (second + c < wide)
                at = base + u * line + c * next_one
                sent = total[u * WIDTH + c]
                tl.store(gx + at, sent.to(gx.dtype.element_ty), mask=written)
                if CARRY:
                    below = left[u * WIDTH + c]
                    tl.store(rest + at, below.to(rest.dtype.element_ty), mask=written)


@triton.jit
def _from_plane(
    m, grad, state, live, a0, a1, a2, r, q, rows, columns, reach, total, left, ins, outs,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, R: tl.constexpr, Q: tl.constexpr,
    FIRST: tl.constexpr, FINAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    LAST: tl.constexpr, HEIGHT: tl.constexpr, SIDE: tl.constexpr, CARRY: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What the m-th position of the outputs along the searched axes sends to the inputs."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    DEEP: tl.constexpr = 1 if LAST else A2[8]
    b0 = last_cover(a0, i0, o0, A0) - m // (A1[8] * DEEP)
    b1 = last_cover(a1, i1, o1, A1) - m // DEEP % A1[8]
    t0, in0 = cover(a0, b0, i0, o0, A0[0], A0)
    t1, in1 = cover(a1, b1, i1, o1, A1[0], A1)
    code = t0 * A1[0] + t1
    index = b0 * o1 + b1
    sent = live & in0 & in1
    if LAST:
        index = index * o2
    else:
        b2 = last_cover(a2, i2, o2, A2) - m % DEEP
        t2, in2 = cover(a2, b2, i2, o2, A2[0], A2)
        code = code * A2[0] + t2
        index = (index * o2 + b2) * o3
        sent = sent & in2
    index = index * columns * reach
    code = code * (R[0] * Q[0])
    for d in tl.static_range(FIRST, FINAL + 1):
        there = sent & (r + d < rows)
        if d < 0:
            there = there & (r + d >= 0)
        for e in tl.static_range(LEFT, RIGHT + 1):
            valid = there & (q + e < columns)
            if e < 0:
                valid = valid & (q + e >= 0)
            step = (d * columns + e) * reach
            chosen = tl.load(state + index + step, mask=valid, other=0).to(tl.int32)
            g = tl.load(grad + index + step, mask=valid, other=0).to(WIDE)
            below = chosen
            if CARRY:
                below = chosen % CARRY
                chosen = chosen // CARRY
            more = ()
            lower = ()
            for u in tl.static_range(HEIGHT):
                for c in tl.static_range(SIDE):
                    a = total[u * SIDE + c]
                    b = left[u * SIDE + c]
                    if (
                        u + R[3] - d * R[1] >= 0 and u + R[3] - d * R[1] < R[0]
                        and c + Q[3] - e * Q[1] >= 0 and c + Q[3] - e * Q[1] < Q[0]
                    ):  # fmt: skip
                        tap = (u + R[3] - d * R[1]) * Q[0] + (c + Q[3] - e * Q[1])
                        mine = chosen == code + tap
                        a += tl.where(mine, g, 0)
                        if CARRY:
                            b = tl.where(mine & valid, below, b)
                    more = more + (a,)
                    lower = lower + (b,)
            total = more
            left = lower
    return total, left


@triton.jit
def search_kernel(
    grad, state, gx, rest, planes, ins, outs, kernels,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr,
    CARRY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Lanes are inputs, each the sum of what the outputs that chose it send; their windows are
    searched along every axis. CARRY: see `near_kernel`."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    R: tl.constexpr = T[0] * T[1]
    C: tl.constexpr = T[2]
    COVERS: tl.constexpr = A0[8] * A1[8] * A2[8] * A3[8]
    plane, a0, a1, a2, a3, a4, first = own(planes, i0, i1, i2, i3, i4, T)
    live = (plane < planes) & (a3 < i3) & (a4 < i4)
    base = plane.to(tl.int64) * (o0 * o1 * o2 * o3 * o4)
    total = tl.zeros([R, C], WIDE)
    left = tl.zeros([R, C], tl.int32)
    h0 = last_cover(a0, i0, o0, A0)
    h1 = last_cover(a1, i1, o1, A1)
    h2 = last_cover(a2, i2, o2, A2)
    h3 = last_cover(a3, i3, o3, A3)
    if UNROLL:
        for m in tl.static_range(COVERS):
            row, code, sent = _sender(
                m, a0, a1, a2, a3, h0, h1, h2, h3, ins, outs, kernels, IN, OUT, W
            )
            total, left = _receive(
                grad + base + row * o4, state + base + row * o4, code * kernels[4], live & sent,
                a4, i4, o4, kernels[4], total, left, A4, CARRY, WIDE,
            )  # fmt: skip
    else:
        for m in range(COVERS):
            row, code, sent = _sender(
                m, a0, a1, a2, a3, h0, h1, h2, h3, ins, outs, kernels, IN, OUT, W
            )
            total, left = _receive(
                grad + base + row * o4, state + base + row * o4, code * kernels[4], live & sent,
                a4, i4, o4, kernels[4], total, left, A4, CARRY, WIDE,
            )  # fmt: skip
    at = plane.to(tl.int64) * (i0 * i1 * i2 * i3 * i4) + (((a0 * i1 + a1) * i2 + a2) * i3 + a3) * i4
    tl.store(gx + at + a4, total.to(gx.dtype.element_ty), mask=live)
    if CARRY:
        tl.store(rest + at + a4, left.to(rest.dtype.element_ty), mask=live)


@triton.jit
def _sender(
    m, a0, a1, a2, a3, h0, h1, h2, h3, ins, outs, kernels,
    IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The m-th row of outputs that may see a row of inputs: its number in the plane, the offset in
    the window of the rows' taps, and whether it does see it."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
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
    row = ((b0 * o1 + b1) * o2 + b2) * o3 + b3
    code = ((t0 * kernels[1] + t1) * kernels[2] + t2) * kernels[3] + t3
    return row, code, in0 & in1 & in2 & in3


@triton.jit
def _receive(
    grad, state, code, sent, a4, i4, o4, kernel, total, left,
    A: tl.constexpr, CARRY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What one row of outputs sends to a row of inputs."""
    h4 = last_cover(a4, i4, o4, A)
    for m in range(A[8]):
        tap, inside = cover(a4, h4 - m, i4, o4, kernel, A)
        valid = sent & inside
        chosen = tl.load(state + h4 - m, mask=valid, other=0).to(tl.int32)
        if CARRY:
            below = chosen % CARRY
            chosen = chosen // CARRY
        mine = valid & (chosen == code + tap)
        total += tl.load(grad + h4 - m, mask=mine, other=0).to(WIDE)
        if CARRY:
            left = tl.where(mine, below, left)
    return total, left


# Launching


def worst(dtype: torch.dtype, largest: bool) -> float | int:
    """The value that loses against every other."""
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    limits = torch.iinfo(dtype)
    return limits.min if largest else limits.max


def compared(dtype: torch.dtype, keyed: bool) -> Any:
    """What values are compared in: themselves, but bfloat16 (and all halves with a key) wider."""
    if dtype == torch.bfloat16 or (dtype == torch.float16 and keyed):
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def _common(x: Tensor, reduction: Selection, save: bool) -> dict[str, Any]:
    kind: Any = type(reduction)
    keyed = kind.key is not Selection.key
    return {
        "KEY": formula(kind, "key"),
        "LARGEST": reduction.largest,
        "WORST": worst(x.dtype, reduction.largest),
        "FLOAT": x.dtype.is_floating_point,
        "SAVE": save,
        "WIDE": compared(x.dtype, keyed),
    }


def few(
    seen: View, x: Tensor, mask: Tensor | None, reduction: Selection, y: Tensor, state: Tensor,
    carried: Tensor | None = None, scale: int = 0,
) -> None:  # fmt: skip
    """Winners of small windows; with `carried` offsets in the winners' own windows are kept below
    the tap, which counts `scale`."""
    keyed = type(reduction).key is not Selection.key
    track = keyed or mask is not None or carried is not None
    crowded = seen.channels_last and x.element_size() == 2 and state.numel()
    tall = 1 if track else ROWS_OF_A_LANE // 2 if crowded else ROWS_OF_A_LANE
    owned = geometry.lanes_of_windows(seen, x.element_size(), tall, 1 if track else 2)
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    along = owned.along
    spans = list(seen.spans)
    spans[along] = geometry.block_span(seen, along, owned.height)
    spans[4] = geometry.block_span(seen, 4, owned.width)
    deal = geometry.dealt(seen.planes, seen.outs, owned, seen.channels_last)
    launching.launch(
        few_kernel, deal.programs, x,
        x, y, state, x if mask is None else mask, state if carried is None else carried,
        seen.planes, seen.channels, ins, outs, geometry.mask_strides(mask, seen),
        deal.divisors,
        IN=in_width, OUT=out_width, W=geometry.constants(spans), V=geometry.constants(seen.spans),
        MASKED=mask is not None, CARRY=scale if carried is not None else 0, TRACK=track,
        REGULAR=seen.regular, LAST=seen.channels_last, **deal.constants,
        **_common(x, reduction, bool(state.numel())),
    )  # fmt: skip


def many(
    seen: View, x: Tensor, mask: Tensor | None, reduction: Selection, y: Tensor, state: Tensor
) -> None:
    """Winners of large windows."""
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    lanes, taps = geometry.split(seen, ELEMENTS)
    launching.launch(
        many_kernel, -(-y.numel() // lanes), x,
        x, y, state, x if mask is None else mask, y.numel(), seen.taps, seen.channels, ins, outs,
        seen.kernels, geometry.mask_strides(mask, seen),
        IN=in_width, OUT=out_width, W=geometry.constants(seen.loose), BT=taps, BL=lanes,
        KEYED=type(reduction).key is not Selection.key, MASKED=mask is not None,
        WHOLE=seen.whole and mask is None, LAST=seen.channels_last,
        INDEX=geometry.index(y.numel()), **_common(x, reduction, bool(state.numel())),
    )  # fmt: skip


def send_back(
    seen: View, grad: Tensor, state: Tensor, gx: Tensor, rest: Tensor | None = None, scale: int = 0
) -> None:
    """Sums for every input what the windows that chose it send. With `rest` states are split: the
    tap counts `scale`, what lies below goes to the inputs that were chosen."""
    ins, in_width = geometry.sizes(seen.ins)
    outs, out_width = geometry.sizes(seen.outs)
    tensors = (grad, state, gx, state if rest is None else rest)
    shared = {
        "IN": in_width, "OUT": out_width, "CARRY": scale, "WIDE": geometry.compute(grad.dtype),
    }  # fmt: skip
    owned = geometry.lanes_of_inputs(seen, grad.element_size(), ROWS_OF_A_LANE, rest is not None)
    if owned is not None:
        deal = geometry.dealt(seen.planes, seen.ins, owned, seen.channels_last)
        outer = math.prod(span.covers for span in seen.spans[: owned.along])
        launching.launch(
            near_kernel, deal.programs, grad, *tensors, seen.planes, ins, outs, deal.divisors,
            W=geometry.constants(seen.spans), LAST=seen.channels_last, OUTER=outer,
            UNROLL=seen.covers <= UNROLLED_COVERS, **deal.constants, **shared,
        )  # fmt: skip
        return
    tile = geometry.tile(seen.planes, *seen.ins[-2:], ELEMENTS)
    launching.launch(
        search_kernel, geometry.programs(seen.planes, seen.ins, tile), grad,
        *tensors, seen.planes, ins, outs, seen.kernels,
        W=geometry.constants(seen.loose), T=tuple(tile),
        UNROLL=seen.covers // seen.spans[-1].covers <= UNROLLED_COVERS, **shared,
    )  # fmt: skip
