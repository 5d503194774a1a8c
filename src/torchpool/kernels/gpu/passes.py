"""Large overlapping windows an axis at a time: k + k work instead of k × k, and where an axis is
scanned a number of steps that does not grow with k.

A window of k elements that begins at place i of a block of k is the end of that block and the
beginning of the next (van Herk, Gil and Werman): both are running results of one block, so that no
window is read twice and no sum is subtracted from another.

The winner of a window has the offset that its own row gives it, whatever the row's window along
the other axes: so states are joined, and split again on the way back, an axis at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.gpu import accumulation, gathering, geometry, launching, selection
from torchpool.reductions import Accumulation, Mean, Selection, Sum
from torchpool.windows import Axis

DIRECT = 16
"""Windows of one axis up to this size are unrolled; longer ones are scanned."""
LONGEST = 1024
"""Windows of one axis that are scanned."""
_LANES = 2048
_RUN = 512
"""Windows of an axis that a program looks at together on the way back."""
_PROGRAMS = 2048
"""Programs that keep a GPU busy."""


@triton.jit
def larger(v, w):
    return tl.maximum(v, w, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(v, w):
    return tl.minimum(v, w, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sum(v, w):
    return v + w


@triton.jit
def _first_largest(v, i, w, j):
    second = (w > v) | ((w == v) & (j < i)) | ((w != w) & ((v == v) | (j > i)))
    return tl.where(second, w, v), tl.where(second, j, i)


@triton.jit
def _first_smallest(v, i, w, j):
    second = (w < v) | ((w == v) & (j < i)) | ((w != w) & ((v == v) | (j > i)))
    return tl.where(second, w, v), tl.where(second, j, i)


@triton.jit
def scan_kernel(
    x, y, state, carried, columns, inner, size, outs, kernel, stride, before, after,
    BK: tl.constexpr, BC: tl.constexpr, KIND: tl.constexpr,
    NEUTRAL: tl.constexpr, SAVE: tl.constexpr, SCALE: tl.constexpr, CARRY: tl.constexpr,
    MEAN: tl.constexpr, ADJOINT: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Windows of one axis in memory of (outer, size, inner): each program has a block of `kernel`
    windows of BC columns (outer × inner). MEAN divides them by their elements; where they are the
    ADJOINT of windows of stride 1 over `outs` inputs, it divides what is read by its windows'."""
    blocks = tl.cdiv((outs - 1) * stride + 1, kernel)
    block = tl.program_id(0) % blocks
    column = tl.program_id(0) // blocks * BC + tl.arange(0, BC)[None, :]
    i = tl.arange(0, BK)[:, None]
    live = (column < columns) & (i < kernel)
    outer, lane = (column // inner).to(tl.int64), column % inner
    source = x + outer * size * inner + lane
    begin = block * kernel - before  # of the block's first window
    ahead = begin + i
    beyond = begin + kernel - 1 + i
    in_ahead = live & (ahead >= 0) & (ahead < size)
    in_beyond = live & (i > 0) & (beyond >= 0) & (beyond < size)
    a = tl.load(source + ahead * inner, mask=in_ahead, other=NEUTRAL).to(WIDE)
    b = tl.load(source + beyond * inner, mask=in_beyond, other=NEUTRAL).to(WIDE)
    if MEAN and ADJOINT:
        a = a / _elements(ahead, kernel, outs, 1, kernel - 1 - before, after, PADDED)
        b = b / _elements(beyond, kernel, outs, 1, kernel - 1 - before, after, PADDED)
    if SAVE:
        # Places in the input, which no scan changes, and what the row's own winner brings.
        place_a = ahead * SCALE + tl.zeros_like(column)
        place_b = beyond * SCALE + tl.zeros_like(column)
        if CARRY:
            bring = carried + outer * size * inner + lane
            place_a += tl.load(bring + ahead * inner, mask=in_ahead, other=0).to(tl.int32)
            place_b += tl.load(bring + beyond * inner, mask=in_beyond, other=0).to(tl.int32)
        place_a = tl.where(in_ahead, place_a, 2147483647)
        place_b = tl.where(in_beyond, place_b, 2147483647)
        if KIND == "max":
            a, place_a = tl.associative_scan((a, place_a), 0, _first_largest, reverse=True)
            b, place_b = tl.associative_scan((b, place_b), 0, _first_largest)
            value, place = _first_largest(a, place_a, b, place_b)
        else:
            a, place_a = tl.associative_scan((a, place_a), 0, _first_smallest, reverse=True)
            b, place_b = tl.associative_scan((b, place_b), 0, _first_smallest)
            value, place = _first_smallest(a, place_a, b, place_b)
    elif KIND == "max":
        a = tl.associative_scan(a, 0, larger, reverse=True)
        value = larger(a, tl.associative_scan(b, 0, larger))
    elif KIND == "min":
        a = tl.associative_scan(a, 0, smaller, reverse=True)
        value = smaller(a, tl.associative_scan(b, 0, smaller))
    else:
        a = tl.associative_scan(a, 0, _sum, reverse=True)
        value = a + tl.associative_scan(b, 0, _sum)
    start = block * kernel + i
    o = start // stride
    if MEAN and not ADJOINT:
        value = value / _elements(o, kernel, size, stride, before, after, PADDED)
    written = live & (start % stride == 0) & (o < outs)
    at = outer * outs * inner + o * inner + lane
    tl.store(y + at, value.to(y.dtype.element_ty), mask=written)
    if SAVE:
        offset = place - ahead * SCALE
        tl.store(state + at, offset.to(state.dtype.element_ty), mask=written)


@triton.jit
def _elements(o, kernel, size, stride, before, after, PADDED: tl.constexpr):
    """Elements of window o inside the input, or inside the padded extent; at least 1."""
    begin = o * stride - before
    if PADDED:
        number = tl.minimum(kernel, size + after - begin)
    else:
        number = tl.minimum(begin + kernel, size) - tl.maximum(begin, 0)
    return tl.maximum(number, 1).to(tl.float32)


@triton.jit
def _send(sum, place, more, next):
    """Sums of neighbours with the same winner; a negative place sends nothing."""
    hole = next < 0
    return (
        tl.where(hole, sum, tl.where(next == place, sum + more, more)),
        tl.where(hole, place, next),
    )


@triton.jit
def _nearest(after, place):
    """The place of the nearest output that sends something, seen from behind."""
    return tl.where(place < 0, after, place)


@triton.jit
def runs_kernel(
    grad, state, gx, rest, columns, inner, size, outs, stride, before, scale,
    BK: tl.constexpr, BC: tl.constexpr, HOLES: tl.constexpr, KEEP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sums for every input what the windows that chose it send, along one axis of memory of (outer,
    size, inner); a program owns BC columns. Along an axis winners never go back, so windows with
    the same winner follow each other, and the last of them sends the sum of all. HOLES: negative
    states send nothing. KEEP: below the tap, which counts `scale`, states hold offsets that go to
    `rest`, which is negative where nothing was sent."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    exists = column < columns
    outer, lane = (column // inner).to(tl.int64), column % inner
    into = outer * size * inner + lane
    source = outer * outs * inner + lane
    i = tl.arange(0, BK)[:, None]
    for first in range(0, size, BK):
        at = into + (first + i) * inner
        inside = exists & (first + i < size)
        tl.store(gx + at, tl.zeros([BK, BC], gx.dtype.element_ty), mask=inside)
        if KEEP:
            tl.store(rest + at, tl.full([BK, BC], -1, rest.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    carried = tl.zeros([1, BC], WIDE)
    last = tl.full([1, BC], -1, tl.int32)
    below = tl.zeros([1, BC], tl.int32)
    for first in range(0, outs, BK):
        o = first + i
        inside = exists & (o < outs)
        chosen = tl.load(state + source + o * inner, mask=inside, other=-1).to(tl.int32)
        place = tl.where(chosen < 0, -1, o * stride - before + chosen // scale)
        place = tl.where(inside, place, -1)
        beyond = exists & (o + 1 < outs) & (i + 1 < BK)
        after = tl.load(state + source + (o + 1) * inner, mask=beyond, other=-1).to(tl.int32)
        after = tl.where(after < 0, -1, (o + 1) * stride - before + after // scale)
        after = tl.where(beyond, after, -1)
        g = tl.load(grad + source + o * inner, mask=inside, other=0).to(WIDE)
        sum, run = tl.associative_scan((g, place), 0, _send)
        if HOLES:
            after = tl.associative_scan(after, 0, _nearest, reverse=True)
        begin = tl.min(tl.where(place < 0, 2147483647, place), 0, keep_dims=True)
        done = exists & (last >= 0) & (last < size) & (begin != last) & (begin < 2147483647)
        tl.store(gx + into + last * inner, carried.to(gx.dtype.element_ty), mask=done)
        if KEEP:
            tl.store(rest + into + last * inner, below.to(rest.dtype.element_ty), mask=done)
        sum += tl.where(run == last, carried, 0)
        ends = inside & (place >= 0) & (place < size) & (after >= 0) & (after != place)
        tl.store(gx + into + place * inner, sum.to(gx.dtype.element_ty), mask=ends)
        if KEEP:
            own = chosen % scale
            tl.store(rest + into + place * inner, own.to(rest.dtype.element_ty), mask=ends)
            final = tl.max(tl.where(place < 0, -1, place * scale + own), 0, keep_dims=True)
            below = tl.where(final < 0, below, final % scale)
        top = tl.max(place, 0, keep_dims=True)
        total = tl.sum(tl.where(i == BK - 1, sum, 0), 0, keep_dims=True)
        carried = tl.where(top < 0, carried, total)
        last = tl.where(top < 0, last, top)
    done = exists & (last >= 0) & (last < size)
    tl.store(gx + into + last * inner, carried.to(gx.dtype.element_ty), mask=done)
    if KEEP:
        tl.store(rest + into + last * inner, below.to(rest.dtype.element_ty), mask=done)


class Rows:
    """A dense tensor (N, C, *S) whose axes are pooled one after another, in its memory order."""

    def __init__(self, x: Tensor, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.memory = x.movedim(1, -1) if channels_last else x
        self.first = 1 if channels_last else 2

    def along(self, axis: int) -> Tensor:
        """The same memory as (outer, inner, size), pooled along its last axis."""
        sizes = self.memory.shape
        d = self.first + axis
        flat = self.memory.reshape(math.prod(sizes[:d]), sizes[d], math.prod(sizes[d + 1 :]))
        return flat.movedim(-1, 1)

    def empty(self, axis: int, size: int, dtype: torch.dtype) -> Rows:
        """Room for the result of pooling one axis."""
        sizes = list(self.memory.shape)
        sizes[self.first + axis] = size
        memory = self.memory.new_empty(sizes, dtype=dtype)
        return Rows(memory.movedim(-1, 1) if self.channels_last else memory, self.channels_last)


def _pooled(axes: Sequence[Axis]) -> list[int]:
    return [
        i for i, axis in enumerate(axes) if (axis.kernel, axis.stride, axis.before) != (1, 1, 0)
    ]


def serve(x: Tensor, axes: Sequence[Axis]) -> bool:
    """Whether windows over x are large, overlap, and can be taken apart."""
    seen = geometry.view(x, axes)
    if seen.taps <= selection.FEW or seen.covers == 1 or not seen.regular:
        return False
    return all(
        axis.kernel <= DIRECT
        or (
            not axis.is_adaptive
            and axis.dilation == 1
            and axis.kernel <= LONGEST
            and x.shape[0] * x.shape[1] * math.prod(a.in_size for a in axes) < geometry.INT32
            and seen.taps * axis.in_size < geometry.INT32
        )
        for axis in axes
    )


def _scan(
    x: Tensor, y: Tensor, axis: Axis, state: Tensor | None = None, carried: Tensor | None = None,
    scale: int = 0, **constants: Any,
) -> None:  # fmt: skip
    columns, inner = x.shape[0] * x.shape[1], x.shape[1]
    rows = geometry.power(axis.kernel)
    width = min(geometry.power(columns), max(1, _LANES // rows))
    blocks = -(-((axis.out_size - 1) * axis.stride + 1) // axis.kernel)
    launching.launch(
        scan_kernel, blocks * -(-columns // width), x,
        x, y, y if state is None else state, y if carried is None else carried, columns, inner,
        axis.in_size, axis.out_size, axis.kernel, axis.stride, axis.before, axis.after,
        BK=rows, BC=width, SAVE=state is not None, SCALE=scale, CARRY=carried is not None,
        **constants,
    )  # fmt: skip


def select(x: Tensor, reduction: Selection, axes: Sequence[Axis], y: Tensor, state: Tensor) -> None:
    """Winners of windows that `serve` admits: along the last axis first, so that equals go to the
    first in row-major order."""
    save = bool(state.numel())
    channels_last = layout.is_channels_last(x)
    rows, carried, scale = Rows(x, channels_last), None, 1
    pooled = _pooled(axes)
    for i in reversed(pooled):
        axis = axes[i]
        if i == pooled[0]:
            into = Rows(y, channels_last)
            kept = Rows(state, channels_last) if save else None
        else:
            into = rows.empty(i, axis.out_size, x.dtype)
            dtype = layout.state_dtype(axes[i:])
            kept = rows.empty(i, axis.out_size, dtype) if save else None
        source, result = rows.along(i), into.along(i)
        offsets = state if kept is None else kept.along(i)
        below = None if carried is None else carried.along(i)
        if axis.kernel <= DIRECT:
            seen = geometry.view(source, [axis])
            selection.few(seen, source, None, reduction, result, offsets, below, scale)
        else:
            _scan(
                source, result, axis, offsets if save else None, below, scale, MEAN=False,
                ADJOINT=False, PADDED=False,
                KIND="max" if reduction.largest else "min",
                NEUTRAL=selection.worst(x.dtype, reduction.largest),
                WIDE=selection.compared(x.dtype, False),
            )  # fmt: skip
        rows, carried, scale = into, kept, scale * axis.kernel


def sends_runs(axes: Sequence[Axis]) -> bool:
    """Whether a window is too long to be unrolled, and along each axis winners never go back."""
    regular = all(not axis.is_adaptive and axis.dilation == 1 for axis in axes)
    return regular and any(axis.kernel > geometry.UNROLLED for axis in axes)


def send_back(grad: Tensor, state: Tensor, axes: Sequence[Axis], gx: Tensor) -> None:
    """Gradients of a selection by its inputs: along the first axis first, to the rows that hold the
    winners."""
    channels_last, runs = layout.is_channels_last(gx), sends_runs(axes)
    sums, states = Rows(grad, channels_last), Rows(state, channels_last)
    pooled = _pooled(axes)
    for i in pooled:
        axis = axes[i]
        below = math.prod(a.kernel for a in axes[i + 1 :])
        if i == pooled[-1]:
            into, rest = Rows(gx, channels_last), None
        else:
            into = sums.empty(i, axis.in_size, layout.compute_dtype(grad.dtype))
            kept = torch.int32 if runs else layout.state_dtype(axes[i + 1 :])
            rest = states.empty(i, axis.in_size, kept)
        result = into.along(i)
        offsets = None if rest is None else rest.along(i)
        if runs:
            _send_runs(sums.along(i), states.along(i), result, offsets, axis, below, i != pooled[0])
        else:
            selection.send_back(
                geometry.view(result, [axis]), sums.along(i), states.along(i), result, offsets,
                0 if rest is None else below,
            )  # fmt: skip
        sums, states = into, rest if rest is not None else states


def _send_runs(
    grad: Tensor, state: Tensor, gx: Tensor, rest: Tensor | None, axis: Axis, scale: int,
    holes: bool,
) -> None:  # fmt: skip
    columns, inner = gx.shape[0] * gx.shape[1], gx.shape[1]
    rows = min(geometry.power(axis.out_size), _RUN)
    width = min(2 * _RUN // rows, max(1, geometry.power(columns) // _PROGRAMS))
    launching.launch(
        runs_kernel, -(-columns // width), grad,
        grad, state, gx, state if rest is None else rest, columns, inner, axis.in_size,
        axis.out_size, axis.stride, axis.before, scale,
        BK=rows, BC=width, HOLES=holes, KEEP=rest is not None,
        WIDE=geometry.compute(grad.dtype),
    )  # fmt: skip


def _share(reduction: Accumulation, last: bool) -> Accumulation:
    """What one axis does for a reduction: its part of the division."""
    if isinstance(reduction, Mean) and reduction.divisor is not None and not last:
        return Sum()
    return reduction


def _scan_sums(
    x: Tensor, y: Tensor, reduction: Accumulation, axis: Axis, dtype: torch.dtype, adjoint: bool
) -> None:
    divisor = reduction.divisor if isinstance(reduction, Mean) else None
    _scan(
        x, y, axis, KIND="sum", NEUTRAL=0.0,
        MEAN=isinstance(reduction, Mean) and divisor is None, ADJOINT=adjoint,
        PADDED=isinstance(reduction, Mean) and reduction.count_include_pad,
        WIDE=geometry.compute(dtype),
    )  # fmt: skip
    if divisor is not None:
        y.div_(divisor)


def accumulate(x: Tensor, reduction: Accumulation, axes: Sequence[Axis], y: Tensor) -> None:
    """Sums or means of windows that `serve` admits."""
    channels_last, pooled = layout.is_channels_last(x), _pooled(axes)
    rows = Rows(x, channels_last)
    dtype = layout.compute_dtype(x.dtype)
    for i in reversed(pooled):
        axis, last = axes[i], i == pooled[0]
        into = Rows(y, channels_last) if last else rows.empty(i, axis.out_size, dtype)
        source, result, share = rows.along(i), into.along(i), _share(reduction, last)
        if axis.kernel <= DIRECT:
            seen = geometry.view(source, [axis])
            problem = accumulation.Problem(seen, source, None, None, None, share, dtype)
            accumulation.forward(problem, result, None)
        else:
            _scan_sums(source, result, share, axis, dtype, adjoint=False)
        rows = into


def accumulate_back(
    grad: Tensor, reduction: Accumulation, axes: Sequence[Axis], gx: Tensor
) -> None:
    """Gradients of sums and means by their inputs."""
    channels_last, pooled = layout.is_channels_last(gx), _pooled(axes)
    rows = Rows(grad, channels_last)
    dtype = layout.compute_dtype(grad.dtype)
    for i in pooled:
        axis, last = axes[i], i == pooled[-1]
        into = Rows(gx, channels_last) if last else rows.empty(i, axis.in_size, dtype)
        source, result, share = rows.along(i), into.along(i), _share(reduction, last)
        if axis.kernel > DIRECT and axis.stride == 1:
            # The outputs that see an input are a window, too.
            back = Axis(
                axis.out_size, axis.in_size, axis.kernel, 1, 1,
                axis.kernel - 1 - axis.before, axis.after,
            )  # fmt: skip
            _scan_sums(source, result, share, back, dtype, adjoint=True)
        else:
            seen = geometry.view(result, [axis])
            problem = accumulation.Problem(seen, None, None, None, None, share, dtype)
            gathering.backward(problem, source, None, result, None)
        rows = into
