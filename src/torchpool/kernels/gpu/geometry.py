"""Where kernels look: every problem as planes of five axes, and the tiles that programs own.

The last of the five axes is contiguous in memory: the last pooled axis of a contiguous input, the
channels of a channels-last one (as an axis that is not pooled). So one kernel serves both layouts,
and every load along a row is as wide as the memory's alignment allows.

What decides code (kernel, stride, dilation, padding, which taps can leave the input) is known when
a kernel is compiled; sizes are not, so that new sizes need no new kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels import layout
from torchpool.windows import Axis

AXES = 4
"""Pooled axes at most."""
LANES = 5
_TRIVIAL = Axis(1, 1, 1, 1, 1, 0, 0)
_WIDEST = 16
THREADS = 128
"""Of a program."""
UNROLLED = 36
"""Outputs that an input reads without a loop; above, gradients go an axis at a time."""
INT32 = 1 << 31


class Span(NamedTuple):
    """What a kernel is compiled for, along one axis."""

    kernel: int
    stride: int
    """0 for adaptive windows."""
    dilation: int
    before: int
    low: int
    """Taps below this one can lie before the input."""
    high: int
    """Taps from this one on can lie behind the input (or the end of an adaptive window)."""
    after: int
    big: int
    """1 where the products of adaptive windows need 64 bits."""
    covers: int
    """Outputs that can see one input, at most."""


def _span(axis: Axis) -> Span:
    if axis.is_adaptive:
        lengths = axis.lengths()
        most = -(-axis.out_size // axis.in_size) + 1
        divides = axis.in_size % axis.out_size == 0
        return Span(
            max(lengths), 0, 1, 0, 0, min(lengths), 0,
            int((axis.in_size + 1) * (axis.out_size + 1) >= INT32), 1 if divides else most,
        )  # fmt: skip
    last = (axis.out_size - 1) * axis.stride - axis.before
    high = (axis.in_size - 1 - last) // axis.dilation + 1
    low = -(-axis.before // axis.dilation)
    reach = (axis.kernel - 1) * axis.dilation
    return Span(
        axis.kernel, axis.stride, axis.dilation, axis.before, min(low, axis.kernel),
        min(max(high, 0), axis.kernel), axis.after, 0, min(reach // axis.stride + 1, axis.out_size),
    )  # fmt: skip


def _is_full(span: Span, size: int, outs: int, padded: bool) -> bool:
    """Whether every window of an axis has all its elements inside the (padded) input."""
    if span.stride == 0 or not padded:
        return span.low == 0 and span.high >= span.kernel
    end = (outs - 1) * span.stride - span.before + (span.kernel - 1) * span.dilation
    return end < size + span.after


def _free(axis: Axis) -> Axis:
    """The axis without the stride that a single window does not use: it would be compiled for."""
    if axis.out_size == 1 and axis.before == 0 and axis.kernel == axis.in_size > 1:
        return Axis(axis.in_size, 1, axis.kernel, 0, 1, 0, 0)
    return axis


@dataclass(frozen=True, eq=False)
class View:
    """A problem as kernels see it. Each has one view, so that what follows from it is worked out
    once."""

    planes: int
    channels: int
    """Planes of a sample; 1 for channels-last."""
    channels_last: bool
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    spans: tuple[Span, ...]
    regular: bool
    """Whether every window has an element inside the input."""

    @cached_property
    def taps(self) -> int:
        """Elements of a window."""
        return math.prod(span.kernel for span in self.spans)

    @cached_property
    def covers(self) -> int:
        """Outputs that can see one input, at most."""
        return math.prod(span.covers for span in self.spans)

    @cached_property
    def kernels(self) -> tuple[int, ...]:
        """Window sizes, where kernels take them as they take sizes."""
        return tuple(span.kernel for span in self.spans)

    @cached_property
    def loose(self) -> tuple[Span, ...]:
        """The spans for a kernel that takes window sizes as they come: of `low` and `high` remains
        whether any tap can leave the input."""
        return tuple(
            s._replace(kernel=1, low=min(s.low, 1), high=int(s.high >= s.kernel))
            for s in self.spans
        )

    def full(self, padded: bool) -> bool:
        """Whether every window has all its elements inside the input, or the padded input."""
        axes = zip(self.spans, self.ins, self.outs, strict=True)
        return all(_is_full(span, size, outs, padded) for span, size, outs in axes)

    @cached_property
    def whole(self) -> bool:
        """Whether each plane is one window."""
        pooled = list(zip(self.spans, self.ins, self.outs, strict=True))
        pooled = pooled[:-1] if self.channels_last else pooled
        return all(o == 1 and s.kernel == i and s.before == 0 for s, i, o in pooled)


@lru_cache(maxsize=4096)
def _view(n: int, c: int, axes: tuple[Axis, ...], channels_last: bool) -> View:
    tail = [Axis(c, c, 1, 1, 1, 0, 0)] if channels_last else []
    five = [_TRIVIAL] * (LANES - len(axes) - len(tail)) + [_free(axis) for axis in axes] + tail
    return View(
        n if channels_last else n * c,
        1 if channels_last else c,
        channels_last,
        tuple(axis.in_size for axis in five),
        tuple(axis.out_size for axis in five),
        tuple(_span(axis) for axis in five),
        all(0 not in axis.counts() for axis in axes),
    )


def view(x: Tensor, axes: Sequence[Axis]) -> View:
    """How the kernels see windows over x (N, C, *S), or over anything that lies as x does."""
    return _view(x.shape[0], x.shape[1], tuple(axes), layout.is_channels_last(x))


def why_not(axes: Sequence[Axis]) -> str | None:
    """Why the kernels cannot address these windows; None where they can."""
    if len(axes) > AXES:
        return f"the GPU kernels pool at most {AXES} axes, not {len(axes)}"
    if math.prod(axis.in_size for axis in axes) >= INT32:
        return "a plane has 2^31 elements or more"
    return None


def power(n: int) -> int:
    return int(triton.next_power_of_2(max(1, n)))


def alignment(size: int) -> int:
    """The largest power of two, up to 16, that divides a size."""
    return math.gcd(size, _WIDEST)


def block(size: int, most: int) -> int:
    """The largest power of two up to `most` that wastes, on a size, little more than any of 16 and
    above does."""
    most = min(power(most), power(size))
    choices = [1 << i for i in range(min(most, 16).bit_length() - 1, most.bit_length())]
    spent = {choice: -(-size // choice) * choice for choice in choices}
    return max(choice for choice in choices if 8 * spent[choice] <= 9 * min(spent.values()))


class Tile(NamedTuple):
    """What one program owns: planes, rows of the fourth axis, columns of the fifth."""

    planes: int
    rows: int
    columns: int


@lru_cache(maxsize=4096)
def tile(planes: int, rows: int, columns: int, elements: int) -> Tile:
    """The tile of about `elements` lanes that wastes few."""
    width = block(columns, min(elements, 256))
    height = block(rows, max(1, elements // width))
    return Tile(min(power(planes), max(1, elements // (width * height))), height, width)


@lru_cache(maxsize=4096)
def programs(planes: int, sizes: tuple[int, ...], owned: Tile) -> int:
    """Tiles that cover all planes."""
    *outer, rows, columns = sizes
    blocks = [-(-planes // owned.planes), -(-rows // owned.rows), -(-columns // owned.columns)]
    return math.prod(outer) * math.prod(blocks)


class Lanes(NamedTuple):
    """How the positions of all planes are dealt out: a lane owns `height` neighbours along one axis
    times `width` beside them, a program `rows` lanes times as many columns."""

    along: int
    height: int
    beside: int
    width: int
    rows: int
    columns: int
    """Channels of a channels-last tensor; 1 where lanes run along the columns, too."""


def lanes_of_windows(seen: View, item_bytes: int, tall: int, wide: int) -> Lanes:
    """Lanes that own up to `tall` windows, and of contiguous planes up to `wide` beside them."""
    along = 2 if seen.channels_last else 3
    tall = _together(seen, along, tall if seen.taps <= 25 else tall // 2)
    wide = _together(seen, 4, wide) if _worth_width(seen, seen.outs[4]) else 1
    return lanes(seen, seen.outs[-1], tall, 4, wide, _vector(seen, item_bytes))


def _worth_width(seen: View, columns: int) -> bool:
    """Whether a lane of contiguous planes is to own neighbours of a row. On an H200 windows at
    stride 2 lost by it (0.8 to 0.9 of the speed), and small ones in rows of fewer than 48; larger
    ones, and small ones in longer rows, won (1.1 to 2.1)."""
    beside = not seen.channels_last and seen.spans[4].stride == 1
    return beside and (columns >= 48 or seen.taps > 9)


def _together(seen: View, axis: int, most: int) -> int:
    """How many neighbouring windows of an axis share what they read."""
    span = seen.spans[axis]
    regular = span.stride > 0 and span.dilation == 1
    return max(1, min(most, power(seen.outs[axis]))) if regular else 1


def lanes_of_inputs(seen: View, item_bytes: int, most: int, carries: bool = False) -> Lanes | None:
    """Lanes that own about `most` inputs of a column, and neighbours along the next axis: whole
    strides of both. None where windows along the two are not regular, or too large to unroll.

    Args:
        carries: a second number goes with every input.
    """
    along = 2 if seen.channels_last else 3
    span, beside = seen.spans[along : along + 2]
    if not all(s.stride > 0 and s.dilation == 1 for s in (span, beside)):
        return None
    if span.kernel * beside.kernel > UNROLLED or span.stride * beside.stride > _WIDEST:
        return None
    wide = 2 if _worth_width(seen, seen.ins[4]) else 1
    if span.kernel == 1 and beside.kernel > 2:  # what a lane reads is shared along one axis alone
        most, wide = 1, 4
    elif seen.channels_last:  # a lane has registers for few
        most = min(most, 2 * item_bytes // beside.stride)
    height = span.stride * max(1, min(most, power(seen.ins[along])) // span.stride)
    width = beside.stride * max(1, min(wide, power(seen.ins[along + 1])) // beside.stride)
    elements = 1 if carries else _vector(seen, item_bytes)
    return lanes(seen, seen.ins[-1], height, along + 1, width, elements)


def _vector(seen: View, item_bytes: int) -> int:
    """Neighbouring channels that a thread has: 16 bytes, but at most four where windows are large
    and registers few."""
    return min(_WIDEST // item_bytes, _WIDEST if seen.taps <= 9 else 4)


def lanes(seen: View, columns: int, height: int, beside: int, width: int, elements: int) -> Lanes:
    """Lanes of `height` times `width` positions. A thread has at least four positions, or
    `elements` neighbouring channels of a channels-last tensor."""
    if not seen.channels_last:
        return Lanes(3, height, beside, width, THREADS * max(1, 4 // (height * width)), 1)
    channels = block(columns, 64)
    return Lanes(2, height, beside, width, max(1, THREADS * elements // channels), channels)


class Deal(NamedTuple):
    """Programs for the positions of all planes, and how their numbers become coordinates."""

    programs: int
    divisors: tuple[int, ...]
    constants: dict[str, Any]
    """What kernels are compiled for."""


@lru_cache(maxsize=4096)
def dealt(planes: int, sizes: tuple[int, ...], owned: Lanes, channels_last: bool) -> Deal:
    """The programs whose lanes own these positions."""
    blocks = in_blocks(sizes, owned.along, owned.height)
    blocks = in_blocks(blocks, owned.beside, owned.width)
    columns = blocks[-1] if channels_last else 1
    total = planes * math.prod(blocks) // columns
    constants = {
        "ALONG": owned.along,
        "HEIGHT": owned.height,
        "WIDTH": owned.width,
        "ROWS": owned.rows,
        "COLUMNS": owned.columns,
        "ONES": tuple(size == 1 for size in blocks),
        "INDEX": tl.int64 if total >= INT32 // 2 else tl.uint32,
    }
    programs = -(-total // owned.rows) * -(-columns // owned.columns)
    divisors = tuple(number for size in blocks for number in divisor(size))
    return Deal(programs, divisors, constants)


def divisor(size: int) -> tuple[int, int]:
    """Multiplier (as a signed number of 32 bits) and shift by which n // size is
    (n * multiplier // 2**32 + n) >> shift, for n below 2**31.

    Source: Granlund and Montgomery, "Division by invariant integers using multiplication",
    PLDI 1994, doi:10.1145/178243.178249.
    """
    shift = (size - 1).bit_length()
    multiplier = (1 << 32) * ((1 << shift) - size) // size + 1
    return multiplier - (1 << 32) if multiplier >= INT32 else multiplier, shift


def in_blocks(sizes: Sequence[int], along: int, height: int) -> tuple[int, ...]:
    """Sizes with one of them counted in blocks."""
    return (*sizes[:along], -(-sizes[along] // height), *sizes[along + 1 :])


def block_span(seen: View, along: int, height: int) -> Span:
    """The span of what `height` neighbouring windows look at together."""
    span, size, outs = seen.spans[along], seen.ins[along], seen.outs[along]
    if height == 1:
        return span
    kernel, stride = (height - 1) * span.stride + span.kernel, height * span.stride
    last = (-(-outs // height) - 1) * stride - span.before
    return span._replace(
        kernel=kernel, stride=stride, low=min(span.before, kernel),
        high=min(max(size - last, 0), kernel),
    )  # fmt: skip


def strides(t: Tensor, channels_last: bool) -> tuple[int, ...]:
    """Strides of an expanded tensor (N, C, *S) along samples, channels and the five axes."""
    n, c, *pooled = t.stride()
    tail = [c] if channels_last else []
    head = [0] * (LANES - len(pooled) - len(tail))
    return (n, 0 if channels_last else c, *head, *pooled, *tail)


@lru_cache(maxsize=4096)
def sizes(values: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Five sizes with the last divided by its alignment, and that alignment: a kernel that
    multiplies them again knows that rows begin at multiples of it."""
    width = alignment(values[-1])
    return (*values[:-1], values[-1] // width), width


def compute(dtype: torch.dtype) -> Any:
    """What kernels compute in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def mask_strides(mask: Tensor | None, seen: View) -> tuple[int, ...]:
    """`strides` of a mask or weights; zeros where there are none."""
    return (0,) * (LANES + 2) if mask is None else strides(mask, seen.channels_last)


def split(seen: View, elements: int) -> tuple[int, int]:
    """How many outputs, and how many taps of each, a program that reads large windows holds: with
    channels last neighbours in memory are outputs, otherwise taps."""
    if seen.channels_last:
        lanes = min(power(seen.outs[-1]), 64)
        return lanes, min(power(seen.taps), elements // lanes)
    taps = min(power(seen.taps), elements)
    return min(power(seen.planes * math.prod(seen.outs)), elements // taps), taps


def index(count: int) -> Any:
    """The type that counts lanes."""
    return tl.int64 if count >= INT32 // 2 else tl.int32


def constants(spans: Sequence[Span]) -> tuple[tuple[int, ...], ...]:
    """Spans as kernels take them."""
    return _plain_tuples(tuple(spans))


@lru_cache(maxsize=4096)
def _plain_tuples(spans: tuple[Span, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(span) for span in spans)


# Inside kernels. A Span arrives as the tuple of its fields, in their order.


@triton.jit
def unpack_sizes(sizes, WIDTH: tl.constexpr):
    """The five sizes that `sizes` packed."""
    return sizes[0], sizes[1], sizes[2], sizes[3], sizes[4] * WIDTH


@triton.jit
def own(planes, s0, s1, s2, s3, s4, T: tl.constexpr):
    """The elements of this program: planes (R, 1), their coordinates along the five axes (1, 1)
    three times, (R, 1) and (1, C), and the first column."""
    num_columns = tl.cdiv(s4, T[2])
    num_rows = tl.cdiv(s3, T[1])
    rest = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    column = rest % num_columns
    rest = rest // num_columns
    row = rest % num_rows
    rest = rest // num_rows
    a2 = rest % s2
    rest = rest // s2
    a1 = rest % s1
    rest = rest // s1
    a0 = rest % s0
    block = rest // s0
    lane = tl.arange(0, T[0] * T[1])[:, None]
    plane = block * T[0] + lane // T[1]
    a3 = row * T[1] + lane % T[1]
    first = column * T[2]
    a4 = first + tl.arange(0, T[2])[None, :]
    return plane, a0, a1, a2, a3, a4, first


@triton.jit
def split_by(n, size, multiplier, shift, ONE: tl.constexpr, INDEX: tl.constexpr):
    """n // size and n % size; without a division where n has 32 bits (see `divisor`)."""
    if ONE:
        return n, (n * 0).to(tl.int32)
    elif INDEX == tl.int64:
        return n // size, (n % size).to(tl.int32)
    else:
        high = tl.umulhi(n, multiplier + tl.zeros_like(n))
        quotient = (high + n) >> (shift + tl.zeros_like(n))
        return quotient, (n - quotient * size).to(tl.int32)


@triton.jit
def lanes_of(
    s0, s1, s2, s3, s4, divisors,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr, ONES: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Plane and coordinates of this program's lanes, (ROWS, 1) each; with LAST those along the last
    axis are (1, COLUMNS)."""
    program = tl.program_id(0)
    lane = tl.arange(0, ROWS)[:, None].to(INDEX)
    if LAST:
        blocks = tl.cdiv(s4, COLUMNS)
        a4 = program % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        rest = (program // blocks).to(INDEX) * ROWS + lane
    else:
        lane += program.to(INDEX) * ROWS
        rest, a4 = split_by(lane, s4, divisors[8], divisors[9], ONES[4], INDEX)
    rest, a3 = split_by(rest, s3, divisors[6], divisors[7], ONES[3], INDEX)
    rest, a2 = split_by(rest, s2, divisors[4], divisors[5], ONES[2], INDEX)
    rest, a1 = split_by(rest, s1, divisors[2], divisors[3], ONES[1], INDEX)
    rest, a0 = split_by(rest, s0, divisors[0], divisors[1], ONES[0], INDEX)
    return rest.to(tl.int32), a0, a1, a2, a3, a4


@triton.jit
def start_of(o, size, outs, A: tl.constexpr):
    """First position of window o."""
    if A[1] != 0:
        return o * A[1] - A[3]
    elif A[7]:
        return (o.to(tl.int64) * size // outs).to(tl.int32)
    else:
        return o * size // outs


@triton.jit
def stop_of(o, size, outs, A: tl.constexpr):
    """End of what window o may read."""
    if A[1] != 0:
        return size
    elif A[7]:
        return (((o + 1).to(tl.int64) * size + outs - 1) // outs).to(tl.int32)
    else:
        return ((o + 1) * size + outs - 1) // outs


@triton.jit
def reach_of(o, size, outs, multiplier, shift, A: tl.constexpr, INDEX: tl.constexpr):
    """First position of window o and the end of what it may read; the numbers are the `divisor` of
    `outs`, which spares adaptive windows their divisions."""
    if A[1] == 0 and not A[7] and INDEX == tl.uint32:
        begin = (o * size).to(tl.uint32)
        end = ((o + 1) * size + (outs - 1)).to(tl.uint32)
        begin, _ = split_by(begin, outs, multiplier, shift, False, INDEX)
        end, _ = split_by(end, outs, multiplier, shift, False, INDEX)
        return begin.to(tl.int32), end.to(tl.int32)
    else:
        return start_of(o, size, outs, A), stop_of(o, size, outs, A)


@triton.jit
def tap_inside(position, stop, J: tl.constexpr, A: tl.constexpr):
    """Whether tap J stands inside; a constant where that is known beforehand."""
    if J < A[4]:
        if J >= A[5]:
            return (position >= 0) & (position < stop)
        else:
            return position >= 0
    elif J >= A[5]:
        return position < stop
    else:
        return True


@triton.jit
def known(J: tl.constexpr, A: tl.constexpr):
    """Whether tap J stands inside the input for certain."""
    return J >= A[4] and J < A[5]


@triton.jit
def any_inside(position, stop, A: tl.constexpr):
    """Whether a tap that is not known beforehand stands inside."""
    if A[4] > 0 and A[5] < A[0]:
        return (position >= 0) & (position < stop)
    elif A[4] > 0:
        return position >= 0
    elif A[5] < A[0]:
        return position < stop
    else:
        return True


@triton.jit
def first_tap(start, A: tl.constexpr):
    """The first tap inside the input."""
    if A[4] > 0:
        return tl.maximum((A[2] - 1 - start) // A[2], 0)
    else:
        return 0


@triton.jit
def count_inside(start, stop, kernel, A: tl.constexpr):
    """Taps inside the input."""
    if A[4] > 0 or A[5] < A[0]:
        end = tl.minimum(kernel, tl.maximum((stop - start + A[2] - 1) // A[2], 0))
        return tl.maximum(end - first_tap(start, A), 0)
    else:
        return kernel


@triton.jit
def count_padded(start, stop, kernel, A: tl.constexpr):
    """Taps inside the padded extent, which ends `after` behind the input."""
    if A[1] == 0:
        return count_inside(start, stop, kernel, A)
    elif A[5] < A[0]:
        end = (stop + A[6] - start + A[2] - 1) // A[2]
        return tl.minimum(kernel, tl.maximum(end, 0))
    else:
        return kernel


@triton.jit
def last_cover(i, size, outs, A: tl.constexpr):
    """The last output whose window begins at or before input i."""
    if A[1] != 0:
        return tl.minimum((i + A[3]) // A[1], outs - 1)
    elif A[7]:
        return (((i + 1).to(tl.int64) * outs - 1) // size).to(tl.int32)
    else:
        return ((i + 1) * outs - 1) // size


@triton.jit
def cover(i, o, size, outs, kernel, A: tl.constexpr):
    """The tap of output o at which input i stands, and whether it is one."""
    reach = i - start_of(o, size, outs, A)
    tap = reach // A[2]
    inside = (o >= 0) & (o < outs) & (reach >= 0)
    if A[1] == 0:
        inside = inside & (i < stop_of(o, size, outs, A))
    else:
        inside = inside & (tap < kernel)
        if A[2] > 1:
            inside = inside & (reach % A[2] == 0)
    return tap, inside


@triton.jit
def windows_of(lane, ins, outs, IN: tl.constexpr, OUT: tl.constexpr, W: tl.constexpr):
    """The windows of flat outputs: their planes, and first positions and ends along the axes."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    o0, o1, o2, o3, o4 = unpack_sizes(outs, OUT)
    a4 = (lane % o4).to(tl.int32)
    rest = lane // o4
    a3 = (rest % o3).to(tl.int32)
    rest = rest // o3
    a2 = (rest % o2).to(tl.int32)
    rest = rest // o2
    a1 = (rest % o1).to(tl.int32)
    rest = rest // o1
    a0 = (rest % o0).to(tl.int32)
    plane = (rest // o0).to(tl.int32)
    starts = (
        start_of(a0, i0, o0, A0),
        start_of(a1, i1, o1, A1),
        start_of(a2, i2, o2, A2),
        start_of(a3, i3, o3, A3),
        start_of(a4, i4, o4, A4),
    )
    stops = (
        stop_of(a0, i0, o0, A0),
        stop_of(a1, i1, o1, A1),
        stop_of(a2, i2, o2, A2),
        stop_of(a3, i3, o3, A3),
        stop_of(a4, i4, o4, A4),
    )
    return plane, starts, stops


@triton.jit
def taps_of(t, starts, stops, ins, kernels, IN: tl.constexpr, W: tl.constexpr):
    """Positions of taps t of windows, and whether they stand inside."""
    A0: tl.constexpr = W[0]
    A1: tl.constexpr = W[1]
    A2: tl.constexpr = W[2]
    A3: tl.constexpr = W[3]
    A4: tl.constexpr = W[4]
    i0, i1, i2, i3, i4 = unpack_sizes(ins, IN)
    k0, k1, k2, k3, k4 = kernels[0], kernels[1], kernels[2], kernels[3], kernels[4]
    p4 = starts[4] + t % k4 * A4[2]
    rest = t // k4
    p3 = starts[3] + rest % k3 * A3[2]
    rest = rest // k3
    p2 = starts[2] + rest % k2 * A2[2]
    rest = rest // k2
    p1 = starts[1] + rest % k1 * A1[2]
    rest = rest // k1
    p0 = starts[0] + rest * A0[2]
    inside = (
        (rest < k0)
        & any_inside(p0, stops[0], A0)
        & any_inside(p1, stops[1], A1)
        & any_inside(p2, stops[2], A2)
        & any_inside(p3, stops[3], A3)
        & any_inside(p4, stops[4], A4)
    )
    return (((p0 * i1 + p1) * i2 + p2) * i3 + p3) * i4 + p4, inside, (p0, p1, p2, p3, p4)


@triton.jit
def strided(p0, p1, p2, p3, p4, steps):
    """Where positions lie in an expanded tensor, from the plane's first element."""
    at = p0.to(tl.int64) * steps[2] + p1.to(tl.int64) * steps[3] + p2.to(tl.int64) * steps[4]
    return at + p3.to(tl.int64) * steps[5] + p4.to(tl.int64) * steps[6]
