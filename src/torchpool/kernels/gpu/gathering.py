"""Gradients of accumulations: every input sums what the outputs that see it send, grad ×
derivative of the value × slope of the input's own term.

Where windows are small and regular it is known when a kernel is compiled which outputs see an
input; else they are searched.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels.gpu import geometry, launching
from torchpool.kernels.gpu.accumulation import ELEMENTS, ROWS_OF_A_LANE, Problem
from torchpool.kernels.gpu.geometry import (
    count_inside,
    count_padded,
    cover,
    lanes_of,
    last_cover,
    own,
    start_of,
    stop_of,
    strided,
    unpack_sizes,
)

UNROLLED_COVERS = 16


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
