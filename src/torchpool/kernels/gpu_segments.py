"""Triton kernels for windows that a table gives: ragged batches, and segments of packed rows.

Forward, one program per window and block of channels runs over the window's taps tile by tile.
Backward, one program per block of positions and channels gathers what the windows that cover it
send. Every element is written once, without atomics, so that results are the same bits every time.
Both layouts are read through strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchpool.kernels import layout, reference
from torchpool.kernels.gpu import launching
from torchpool.kernels.gpu.formulas import formula
from torchpool.kernels.gpu.geometry import compute
from torchpool.reductions import Accumulation, Max, Mean, Min, Selection
from torchpool.windows import Axis

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
TILE = 512
"""Elements of a tile of taps (or positions) and channels."""


# Inside kernels


@triton.jit
def _lanes(block, channels, COLS: tl.constexpr):
    c = block * COLS + tl.arange(0, COLS)[None, :]
    return c, c < channels


# Forward


@triton.jit
def select_kernel(
    x, mask, y, state, table, blocks, outs, channels, tables,
    xn, xc, xt, yn, yc, yo, step,
    LARGEST: tl.constexpr, MASKED: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The winner of one window for a block of channels, and its tap."""
    program = tl.program_id(0).to(tl.int64)
    c, live = _lanes(program % blocks, channels, COLS)
    window = program // blocks
    n, o = window // outs, window % outs
    row = table + ((n % tables) * outs + o) * 3
    first, count = tl.load(row), tl.load(row + 1)
    source = n * xn + c * xc
    best = tl.full([ROWS, COLS], float("-inf"), WIDE)
    held = tl.full([ROWS, COLS], -1, tl.int64)
    for begin in range(0, count, ROWS):
        tap = begin + tl.arange(0, ROWS)[:, None]
        inside = (tap < count) & live
        at = source + (first + tap * step) * xt
        v = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
        if MASKED:
            inside = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
        k = v if LARGEST else -v
        take = inside & ((held < 0) | (k > best) | (k != k))
        best = tl.where(take, k, best)
        held = tl.where(take, tap + held * 0, held)
    bad = (held >= 0) & (best != best)
    last_nan = tl.max(tl.where(bad, held, -1), axis=0)
    rank = tl.where((held >= 0) & (best == best), best, float("-inf"))
    top = tl.max(rank, axis=0)
    good = (held >= 0) & (best == best) & (rank == top[None, :])
    earliest = tl.min(tl.where(good, held, 1 << 62), axis=0)
    winner = tl.where(last_nan >= 0, last_nan, tl.where(earliest < (1 << 62), earliest, -1))
    found = (winner >= 0)[None, :] & live
    tap = tl.where(winner >= 0, winner, 0)[None, :]
    value = tl.load(x + source + (first + tap * step) * xt, mask=found, other=0.0)
    at = n * yn + c * yc + o * yo
    tl.store(y + at, value, mask=live)
    if SAVE:
        tl.store(state + at, tap.to(state.dtype.element_ty), mask=live)


@triton.jit
def accumulate_kernel(
    x, weights, y, stats, ps, coefficients, table, total, blocks, outs, channels, tables,
    xn, xc, xt, yn, yc, yo, step, divisor,
    KEY: tl.constexpr, TERMS: tl.constexpr, FINISH: tl.constexpr, LEAST: tl.constexpr,
    ANCHOR: tl.constexpr, SUMS: tl.constexpr, PER_CHANNEL: tl.constexpr, WEIGHTED: tl.constexpr,
    SAVE: tl.constexpr, BY_PARAMETER: tl.constexpr, PADDED: tl.constexpr, DIVIDED: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Anchor, sums and value of one window for a block of channels. With BY_PARAMETER the terms are
    weighted by `coefficients` instead of finished: a window's part of dL/dp."""
    program = tl.program_id(0).to(tl.int64)
    c, live = _lanes(program % blocks, channels, COLS)
    window = program // blocks
    n, o = window // outs, window % outs
    row = table + ((n % tables) * outs + o) * 3
    first, count = tl.load(row), tl.load(row + 1)
    source = n * xn + c * xc
    dense = (n * channels + c) * outs + o
    p = tl.load(ps + c * PER_CHANNEL, mask=live, other=1.0)
    anchor = tl.zeros([1, COLS], WIDE)
    if BY_PARAMETER:
        anchor = tl.load(stats + dense, mask=live, other=0.0)
    elif ANCHOR != 0:
        top = tl.full([ROWS, COLS], float("-inf") if ANCHOR == 1 else 0.0, WIDE)
        weight = tl.zeros([ROWS, COLS], WIDE)
        nans = tl.zeros([ROWS, COLS], WIDE)
        for begin in range(0, count, ROWS):
            tap = begin + tl.arange(0, ROWS)[:, None]
            inside = (tap < count) & live
            at = source + (first + tap * step) * xt
            v = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
            w = inside.to(WIDE)
            if WEIGHTED:
                w = tl.load(weights + at, mask=inside, other=0.0).to(WIDE)
                inside = inside & (w != 0.0)
            if ANCHOR == 1:
                k = KEY(v, p)
                nans += tl.where(inside & (k != k), 1.0, 0.0)
                top = tl.where(inside & (k > top), k, top)
            else:
                top += tl.where(inside, w * v, 0.0)
                weight += tl.where(inside, w, 0.0)
        if ANCHOR == 1:
            highest = tl.max(top, axis=0)[None, :]
            anchor = tl.where(tl.sum(nans, axis=0)[None, :] > 0.0, float("nan"), highest)
        else:
            whole = tl.sum(weight, axis=0)[None, :]
            anchor = tl.sum(top, axis=0)[None, :] / tl.where(whole != 0.0, whole, 1.0)
    s0 = tl.zeros([ROWS, COLS], WIDE)
    s1 = tl.zeros([ROWS, COLS], WIDE)
    number = tl.zeros([ROWS, COLS], WIDE)
    for begin in range(0, count, ROWS):
        tap = begin + tl.arange(0, ROWS)[:, None]
        inside = (tap < count) & live
        at = source + (first + tap * step) * xt
        v = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
        w = inside.to(WIDE)
        if WEIGHTED:
            w = tl.load(weights + at, mask=inside, other=0.0).to(WIDE)
            inside = inside & (w != 0.0)
        terms = TERMS(v, anchor, p)
        s0 += tl.where(inside, w * terms[0], 0.0)
        if SUMS == 2:
            s1 += tl.where(inside, w * terms[1], 0.0)
        number += tl.where(inside, w, 0.0)
    first_sum = tl.sum(s0, axis=0)[None, :]
    second_sum = tl.sum(s1, axis=0)[None, :]
    contents = tl.sum(number, axis=0)[None, :]
    filled = ~(contents <= LEAST(p))
    m = contents
    if PADDED:
        m += tl.load(row + 2).to(WIDE)
    if DIVIDED:
        m = m * 0.0 + divisor
    if BY_PARAMETER:
        value = first_sum * tl.load(coefficients + dense, mask=live, other=0.0)
        if SUMS == 2:
            value += second_sum * tl.load(coefficients + total + dense, mask=live, other=0.0)
    elif SUMS == 2:
        value = FINISH((first_sum, second_sum), m, anchor, p)
    else:
        value = FINISH((first_sum,), m, anchor, p)
    at = n * yn + c * yc + o * yo
    tl.store(y + at, tl.where(filled, value, 0.0).to(y.dtype.element_ty), mask=live)
    if SAVE:
        tl.store(stats + dense, anchor, mask=live)
        tl.store(stats + total + dense, first_sum, mask=live)
        if SUMS == 2:
            tl.store(stats + 2 * total + dense, second_sum, mask=live)
        tl.store(stats + (SUMS + 1) * total + dense, tl.where(filled, m, float("-inf")), mask=live)


# Backward


@triton.jit
def select_backward_kernel(
    grad, state, gx, table, low, high, row_blocks, blocks, size, outs, channels, tables,
    xn, xc, xt, yn, yc, yo, step, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Positions and channels of one sample: the sum of what the windows that chose them send."""
    program = tl.program_id(0).to(tl.int64)
    c, live = _lanes(program % blocks, channels, COLS)
    rest = program // blocks
    n = rest // row_blocks
    t = (rest % row_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    here = t < size
    begin = tl.load(low + (n % tables) * size + t, mask=here, other=0)
    end = tl.load(high + (n % tables) * size + t, mask=here, other=0)
    sum = tl.zeros([ROWS, COLS], WIDE)
    for m in range(0, tl.max(end - begin)):
        o = begin + m
        sees = here & (o < end)
        row = table + ((n % tables) * outs + o) * 3
        first = tl.load(row, mask=sees, other=0)
        count = tl.load(row + 1, mask=sees, other=0)
        at = n * yn + c * yc + o * yo
        inside = sees & live & (count > 0)
        chosen = tl.load(state + at, mask=inside, other=0).to(tl.int64)
        mine = inside & (first + chosen * step == t)
        sum += tl.load(grad + at, mask=mine, other=0.0).to(WIDE)
    at = n * xn + c * xc + t * xt
    tl.store(gx + at, sum.to(gx.dtype.element_ty), mask=here & live)


@triton.jit
def accumulate_backward_kernel(
    x, weights, gx, gw, anchors, ps, coefficients, table, low, high, total, row_blocks, blocks,
    size, outs, channels, tables, xn, xc, xt, step,
    TERMS: tl.constexpr, SLOPES: tl.constexpr, LINEAR: tl.constexpr, SUMS: tl.constexpr,
    PER_CHANNEL: tl.constexpr, WEIGHTED: tl.constexpr, BY_X: tl.constexpr, BY_W: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Positions and channels of one sample: over the windows that cover them, the sum of
    coefficient times slope."""
    program = tl.program_id(0).to(tl.int64)
    c, live = _lanes(program % blocks, channels, COLS)
    rest = program // blocks
    n = rest // row_blocks
    t = (rest % row_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    here = t < size
    at = n * xn + c * xc + t * xt
    begin = tl.load(low + (n % tables) * size + t, mask=here, other=0)
    end = tl.load(high + (n % tables) * size + t, mask=here, other=0)
    p = tl.load(ps + c * PER_CHANNEL, mask=live, other=1.0)
    v = tl.zeros([ROWS, COLS], WIDE)
    if not LINEAR:
        v = tl.load(x + at, mask=here & live, other=0.0).to(WIDE)
    w = tl.full([ROWS, COLS], 1.0, WIDE)
    if WEIGHTED:
        w = tl.load(weights + at, mask=here & live, other=0.0).to(WIDE)
    by_x = tl.zeros([ROWS, COLS], WIDE)
    by_w = tl.zeros([ROWS, COLS], WIDE)
    for m in range(0, tl.max(end - begin)):
        o = begin + m
        sees = here & (o < end)
        row = table + ((n % tables) * outs + o) * 3
        reach = t - tl.load(row, mask=sees, other=0)
        count = tl.load(row + 1, mask=sees, other=0)
        covered = (reach >= 0) & (reach % step == 0) & (reach // step < count)
        inside = sees & live & covered & (w != 0.0)
        dense = (n * channels + c) * outs + o
        d0 = tl.load(coefficients + dense, mask=inside, other=0.0)
        anchor = tl.load(anchors + dense, mask=inside, other=0.0)
        slopes = SLOPES(v, anchor, p)
        terms = TERMS(v, anchor, p)
        sent = d0 * slopes[0]
        told = d0 * terms[0]
        if SUMS == 2:
            d1 = tl.load(coefficients + total + dense, mask=inside, other=0.0)
            sent += d1 * slopes[1]
            told += d1 * terms[1]
        by_x += tl.where(inside, w * sent, 0.0)
        if BY_W:
            through = tl.load(coefficients + SUMS * total + dense, mask=inside, other=0.0)
            by_w += tl.where(inside, told + through, 0.0)
    if BY_X:
        tl.store(gx + at, by_x.to(gx.dtype.element_ty), mask=here & live)
    if BY_W:
        tl.store(gw + at, by_w, mask=here & live)


# Launching


class _Launch(NamedTuple):
    """What all kernels are told: the table, tiles, strides."""

    table: Tensor
    blocks: int
    outs: int
    channels: int
    tables: int
    tile: dict[str, int]


def _launch(x: Tensor, starts: Tensor, channels_last: bool) -> _Launch:
    """Tiles run over channels where those lie side by side, else over taps."""
    channels = x.shape[1]
    cols = min(64, triton.next_power_of_2(channels)) if channels_last else 1
    table = starts[:, 0, 0].contiguous()
    tile = {"ROWS": TILE // max(cols, 4), "COLS": cols}
    return _Launch(
        table, triton.cdiv(channels, cols), table.shape[1], channels, table.shape[0], tile
    )


def _cover(launch: _Launch, size: int, step: int) -> tuple[Tensor, Tensor]:
    """Per position a range of windows that holds all that cover it, (tables, size) twice."""
    first, count = launch.table[..., 0], launch.table[..., 1]
    last = torch.where(count > 0, first + (count - 1) * step, -1).cummax(1).values
    first = torch.where(count > 0, first, size).flip(1).cummin(1).values.flip(1)
    places = torch.arange(size, device=first.device).expand(launch.tables, size).contiguous()
    return (
        torch.searchsorted(last.contiguous(), places),
        torch.searchsorted(first.contiguous(), places, right=True),
    )


def _on(t: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the device of their arguments."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _why_not(x: Tensor) -> str | None:
    if x.dtype not in _FLOATS:
        return f"the GPU kernels for tables of windows do not serve {x.dtype}"
    return launching.why_not(x) if x.numel() else "the input is empty"


def why_not_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve a selection; None where they do."""
    if type(reduction) not in (Max, Min):
        return f"{type(reduction).__name__} compares keys of its own"
    if starts is not None and starts.shape[1] != 1:
        return "windows that differ from channel to channel are served by the reference"
    return _why_not(x)


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor,
    reduction: Selection,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Winners of all windows; see `reference.select`."""
    y = layout.empty_like(x, [axes[0].out_size])
    dtype = layout.state_dtype(axes)
    state = layout.empty_like(x, [axes[0].out_size], dtype) if save else x.new_empty(0, dtype=dtype)
    if not y.numel():
        return y, state
    channels_last = layout.is_channels_last(x)
    launch = _launch(x, starts, channels_last)
    valid = x if mask is None else layout.to_layout(mask, channels_last).view(torch.uint8)
    with _on(x):
        select_kernel[(x.shape[0] * launch.outs * launch.blocks,)](
            x, valid, y, state, launch.table, launch.blocks, launch.outs, launch.channels,
            launch.tables, *x.stride(), *y.stride(), axes[0].dilation,
            LARGEST=reduction.largest, MASKED=mask is not None, SAVE=save, WIDE=compute(x.dtype),
            **launch.tile,
        )  # fmt: skip
    return y, state


def select_backward(
    grad: Tensor, state: Tensor, starts: Tensor, axes: Sequence[Axis], channels_last: bool
) -> Tensor:
    """Sends the gradient of each window to its winner; see `reference.select_backward`."""
    size, step = axes[0].in_size, axes[0].dilation
    gx = layout.empty(grad, [size], channels_last)
    if not grad.numel():
        return gx.zero_()
    launch = _launch(state, starts, channels_last)
    rows = triton.cdiv(size, launch.tile["ROWS"])
    with _on(grad):
        select_backward_kernel[(grad.shape[0] * rows * launch.blocks,)](
            grad, state, gx, launch.table, *_cover(launch, size, step), rows, launch.blocks, size,
            launch.outs, launch.channels, launch.tables, *gx.stride(), *state.stride(), step,
            WIDE=compute(grad.dtype), **launch.tile,
        )  # fmt: skip
    return gx


def why_not_accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve an accumulation; None where they do."""
    if reduction.num_sums > 2:
        return f"{type(reduction).__name__} has {reduction.num_sums} sums, these kernels hold 2"
    return _why_not(x)


class _Call(NamedTuple):
    """What an accumulation brings along besides x."""

    weights: Tensor | None
    params: Tensor
    divisor: float
    counts_padding: bool


def _call(
    x_shape: Sequence[int],
    channels_last: bool,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    like: Tensor,
) -> _Call:
    dtype = layout.compute_dtype(like.dtype)
    w = weights
    if mask is not None:
        w = torch.where(mask, 1.0 if w is None else w, 0.0)
    if w is not None:
        w = layout.to_layout(w.to(dtype).expand(x_shape), channels_last)
    p = torch.zeros(1, dtype=dtype, device=like.device) if params is None else params
    is_mean = isinstance(reduction, Mean)
    divisor = float(reduction.divisor or 0.0) if is_mean else 0.0  # type: ignore[attr-defined]
    counts = is_mean and reduction.count_include_pad  # type: ignore[attr-defined]
    return _Call(w, p, divisor, counts)


def _forward(
    x: Tensor,
    y: Tensor,
    stats: Tensor,
    call: _Call,
    reduction: Accumulation,
    axis: Axis,
    starts: Tensor,
    coefficients: Tensor | None = None,
) -> None:
    """Runs the forward kernel; with coefficients, for the gradient by the parameter."""
    kind: Any = type(reduction)
    launch = _launch(x, starts, layout.is_channels_last(x))
    by_parameter = coefficients is not None
    with _on(x):
        accumulate_kernel[(x.shape[0] * launch.outs * launch.blocks,)](
            x, x if call.weights is None else call.weights, y, stats, call.params,
            stats if coefficients is None else coefficients, launch.table, y.numel(),
            launch.blocks, launch.outs, launch.channels, launch.tables, *x.stride(), *y.stride(),
            axis.dilation, call.divisor,
            KEY=formula(kind, "key"), TERMS=formula(kind, "lift_dp" if by_parameter else "lift"),
            FINISH=formula(kind, "finish"), LEAST=formula(kind, "least"),
            ANCHOR={None: 0, "max": 1, "mean": 2}[reduction.anchor], SUMS=reduction.num_sums,
            PER_CHANNEL=int(call.params.numel() > 1), WEIGHTED=call.weights is not None,
            SAVE=bool(stats.numel()) and not by_parameter, BY_PARAMETER=by_parameter,
            PADDED=call.counts_padding, DIVIDED=call.divisor != 0.0, WIDE=compute(x.dtype),
            **launch.tile,
        )  # fmt: skip


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    save: bool,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Values of all windows; see `reference.accumulate`."""
    y = layout.empty_like(x, [axes[0].out_size])
    stats = layout.empty_stats(x, [axes[0].out_size], reduction, save)
    if y.numel():
        call = _call(x.shape, layout.is_channels_last(x), mask, weights, params, reduction, x)
        _forward(x, y, stats, call, reduction, axes[0], starts)
    return y, stats


def accumulate_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    stats: Tensor,
    reduction: Accumulation,
    axes: Sequence[Axis],
    needs: Sequence[bool],
    channels_last: bool,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weights and params; those not needed come as empty tensors."""
    size, step = axes[0].in_size, axes[0].dilation
    dtype = layout.compute_dtype(grad.dtype)
    shape = (*grad.shape[:2], size)
    call = _call(shape, channels_last, mask, weights, params, reduction, grad)
    empty = grad.new_empty(0, dtype=dtype)
    gx = layout.empty(grad, [size], channels_last) if needs[0] else grad.new_empty(0)
    gw = layout.empty(grad, [size], channels_last, dtype) if needs[1] else empty
    if not grad.numel():
        return gx.zero_(), gw.zero_(), torch.zeros_like(call.params) if needs[2] else empty
    if not stats.numel() and call.weights is not None:
        stats = grad.new_zeros((reduction.num_sums + 2, *grad.shape), dtype=dtype)
        x = x if x.numel() else layout.empty(grad, [size], channels_last).zero_()
        _forward(x, torch.empty_like(grad), stats, call, reduction, axes[0], starts)
    share, through = _shares(grad.to(dtype).contiguous(), stats, call, reduction, starts)
    launch = _launch(grad, starts, channels_last)
    kind: Any = type(reduction)
    rows = triton.cdiv(size, launch.tile["ROWS"])
    like = gx if needs[0] else gw
    source = x if x.numel() else grad
    if needs[0] or needs[1]:
        with _on(grad):
            accumulate_backward_kernel[(grad.shape[0] * rows * launch.blocks,)](
                source, source if call.weights is None else call.weights, gx, gw,
                stats if stats.numel() else share, call.params, share, launch.table,
                *_cover(launch, size, step), grad.numel(), rows, launch.blocks, size, launch.outs,
                launch.channels, launch.tables, *like.stride(), step,
                TERMS=formula(kind, "lift"), SLOPES=formula(kind, "lift_dx"),
                LINEAR=not x.numel(), SUMS=reduction.num_sums,
                PER_CHANNEL=int(call.params.numel() > 1), WEIGHTED=call.weights is not None,
                BY_X=needs[0], BY_W=needs[1], WIDE=compute(grad.dtype), **launch.tile,
            )  # fmt: skip
    gp = empty
    if needs[2]:
        parts = torch.empty(grad.shape, dtype=dtype, device=grad.device)
        _forward(x, parts, stats, call, reduction, axes[0], starts, share)
        gp = (parts + through).sum([0, 2])
        gp = gp.sum(0, keepdim=True) if call.params.numel() == 1 else gp
    return gx, gw, gp


def _shares(
    grad: Tensor, stats: Tensor, call: _Call, reduction: Accumulation, starts: Tensor
) -> tuple[Tensor, Tensor]:
    """dL/ds_k and dL/dn of every window, (num_sums + 1, N, C, O), and dL/dp through `finish`."""
    if stats.numel():
        a, *sums, number = stats.unbind(0)
    else:
        a = torch.zeros_like(grad)
        sums = [a] * reduction.num_sums
        count, padding = starts[:, :, 0, :, 1], starts[:, :, 0, :, 2]
        number = (count + padding if call.counts_padding else count).to(grad.dtype)
        number = torch.full_like(number, call.divisor) if call.divisor else number
        number = torch.where(count > 0, number, -torch.inf)
    p = call.params.unsqueeze(-1)
    return reference.shares(reduction, grad, a, sums, number, p, call.divisor)
