"""The definition of every kernel in plain torch: any device, any dtype, any windows and reduction.

Windows are gathered by flat index and reduced along one axis. Two faces:
* `select`, `accumulate` and their backward: what the operators run where no faster kernel serves;
bounded memory, deterministic, hand-written derivatives.
* `composite`: the same result as ordinary differentiable torch operators; what is exported,
forward-mode differentiated and differentiated twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from torchpool import reductions as formulas
from torchpool.kernels import layout
from torchpool.reductions import Accumulation, Mean, Selection
from torchpool.windows import Axis

MAX_GATHERED = 1 << 24
"""Elements of windows held at a time by the operators; longer work goes in bands of output rows."""

TIGHT = 64
"""Taps up to which a bound on the longest window of a table is as good as reading its counts."""


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return (
        torch.where(condition, yes, no)
        if isinstance(condition, Tensor)
        else (yes if condition else no)
    )


_TORCH = {
    formulas.exp: torch.exp,
    formulas.log: torch.log,
    formulas.log1p: torch.log1p,
    formulas.expm1: torch.expm1,
    formulas.sqrt: torch.sqrt,
    formulas.where: _where,
}


def formula(kind: Any, name: str) -> Any:
    """The formula `name` of a reduction's class over torch's functions."""
    return _rebound(kind, name)


@lru_cache(maxsize=256)
def _rebound(kind: Any, name: str) -> Any:
    return formulas.rebind(getattr(kind, name), _TORCH)


# Geometry: where the taps of each window lie


class Corner(NamedTuple):
    """One axis of the windows: first position and end of each, shaped to broadcast over (N, C, *O,
    taps)."""

    axis: Axis
    start: Tensor
    stop: Tensor | int
    padded: Tensor | None = None
    """Of a table: taps in the padding that a mean may count."""


def is_table(starts: Tensor | None) -> bool:
    """Whether `starts` says of each window where it begins, how many taps it has and how much
    padding it may count, (N, 1, 1, O, 3), and not only where it begins, (N, C, d, max O)."""
    return starts is not None and starts.ndim == 5


def _table_corner(axis: Axis, table: Tensor) -> Corner:
    first, count, padded = table[:, :, 0].unsqueeze(-1).unbind(-2)
    return Corner(
        axis._replace(kernel=_longest(count, axis.kernel)),
        first,
        first + count * axis.dilation,
        padded,
    )


def _longest(counts: Tensor, bound: int) -> int:
    """The most taps of a window. Reads the counts where the bound is loose and nobody traces: this
    is the one place that may wait for a device."""
    tracing = torch.compiler.is_compiling() or isinstance(counts, FakeTensor)
    if tracing or torch._C._functorch.is_batchedtensor(counts) or bound <= TIGHT:
        return bound
    return max(1, int(counts.max())) if counts.numel() else 1


def corners(axes: Sequence[Axis], starts: Tensor | None, device: torch.device) -> list[Corner]:
    """The windows of each axis; `starts` (N, C, d, max O) gives the first positions per plane
    instead of the axis, or is a table (see `is_table`)."""
    if starts is not None and is_table(starts):
        return [_table_corner(axes[0], starts)]
    made = []
    for i, axis in enumerate(axes):
        shape = (1,) * i + (axis.out_size,) + (1,) * (len(axes) - i)
        outputs = torch.arange(axis.out_size, device=device)
        stop: Tensor | int = axis.in_size
        if starts is not None:
            start = starts[:, :, i, : axis.out_size].reshape(*starts.shape[:2], *shape)
        elif axis.is_adaptive:
            start = (outputs * axis.in_size // axis.out_size).reshape(1, 1, *shape)
            stop = (((outputs + 1) * axis.in_size + axis.out_size - 1) // axis.out_size).reshape(
                1, 1, *shape
            )
        else:
            start = (outputs * axis.stride - axis.before).reshape(1, 1, *shape)
        made.append(Corner(axis, start, stop))
    return made


def locate(offsets: Tensor, corners: Sequence[Corner]) -> tuple[Tensor, Tensor]:
    """Where the taps `offsets` (row-major number inside the window) of each window lie.

    Shape:
        offsets broadcastable to (N, C, *O, taps) -> flat positions in the input (int64), and
        whether they lie inside it
    """
    flat: Tensor | int = 0
    inside: Tensor | bool = True
    for i, (axis, start, stop, _) in enumerate(corners):
        rest = math.prod([corner.axis.kernel for corner in corners[i + 1 :]])
        tap = offsets // rest
        offsets = offsets - tap * rest  # exporters do not know the remainder by a free size
        position = start + tap * axis.dilation
        inside = inside & (position >= 0) & (position < stop)
        flat = flat * axis.in_size + position.clamp(0, axis.in_size - 1)
    assert isinstance(flat, Tensor)
    assert isinstance(inside, Tensor)
    return flat, inside


def winners(state: Tensor, starts: Tensor | None, axes: Sequence[Axis]) -> tuple[Tensor, Tensor]:
    """Flat input position (int64) that each state points to, and whether it lies inside the
    input."""
    flat, inside = locate(state.to(torch.int64).unsqueeze(-1), corners(axes, starts, state.device))
    return flat.squeeze(-1), inside.squeeze(-1)


def _bands(
    axes: Sequence[Axis], starts: Tensor | None, x: Tensor
) -> Iterator[tuple[slice, list[Corner]]]:
    """Bands of output rows whose windows fit in MAX_GATHERED elements."""
    first, *rest = corners(axes, starts, x.device)
    per_row = (
        x.shape[0]
        * x.shape[1]
        * first.axis.kernel
        * math.prod([c.axis.out_size * c.axis.kernel for c in rest])
    )
    rows = max(1, MAX_GATHERED // max(1, per_row))
    for begin in range(0, first.axis.out_size, rows):
        band = slice(begin, min(begin + rows, first.axis.out_size))
        stop = first.stop if isinstance(first.stop, int) else first.stop[:, :, band]
        padded = None if first.padded is None else first.padded[:, :, band]
        yield band, [Corner(first.axis, first.start[:, :, band], stop, padded), *rest]


def _windows_of(corners: Sequence[Corner]) -> tuple[Tensor, Tensor]:
    """Flat positions of all taps, (1 | N, 1 | C, *O, prod K), and whether they lie inside the
    input."""
    taps = math.prod([corner.axis.kernel for corner in corners])
    return locate(torch.arange(taps, device=corners[0].start.device), corners)


def _gather(x: Tensor, flat: Tensor) -> Tensor:
    """x (N, C, *S) -> its elements at `flat` (1 | N, 1 | C, *O, taps) -> (N, C, *O, taps)."""
    x = x.flatten(2)
    if flat.shape[0] == flat.shape[1] == 1:
        return x[:, :, flat[0, 0]]
    return x.gather(2, flat.expand(*x.shape[:2], *flat.shape[2:]).flatten(2)).reshape(
        *x.shape[:2], *flat.shape[2:]
    )


def _scatter(values: Tensor, flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """The adjoint of `_gather`, into (N, C, *sizes); sums in a fixed order on every device (no
    float atomics)."""
    n, c = values.shape[:2]
    size = math.prod(sizes)
    planes = torch.arange(n * c, device=flat.device).reshape(n, c, *(1,) * (flat.ndim - 2))
    index = (flat + planes * size).expand(values.shape).reshape(-1)
    total = values.new_zeros(n * c * size)
    if values.device.type == "cpu":
        total = total.index_add(0, index, values.reshape(-1))
    else:
        total = total.index_put((index,), values.reshape(-1), accumulate=True)
    return total.reshape(n, c, *sizes)


def windows(
    x: Tensor, mask: Tensor | None, starts: Tensor | None, axes: Sequence[Axis]
) -> tuple[Tensor, Tensor]:
    """All windows of x (N, C, *S) -> (N, C, *O, taps), and which taps take part."""
    flat, inside = _windows_of(corners(axes, starts, x.device))
    return _gather(x, flat), inside if mask is None else inside & _gather(mask, flat)


# Selection

_WIDE = {torch.bool: torch.uint8, torch.uint16: torch.int32, torch.uint32: torch.int64}
"""Dtypes that torch can store but hardly compute with, and what stands in for them."""


def why_not_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
) -> str | None:
    """None: the reference serves everything."""
    return None


def _choose(windows: Tensor, valid: Tensor, reduction: Selection) -> tuple[Tensor, Tensor]:
    """The winning offset of each window (..., taps) -> (...), and whether the window has a valid
    element."""
    keys = formula(type(reduction), "key")(windows)
    if not reduction.largest and keys.dtype.is_floating_point:
        keys = -keys
    smallest = not reduction.largest and not keys.dtype.is_floating_point
    limits = torch.finfo(keys.dtype) if keys.dtype.is_floating_point else torch.iinfo(keys.dtype)
    worst = limits.max if smallest else (-math.inf if keys.dtype.is_floating_point else limits.min)
    filled = torch.where(valid, keys, worst)
    best = filled.amin(-1, keepdim=True) if smallest else filled.amax(-1, keepdim=True)
    first = (valid & (keys == best)).to(torch.uint8).argmax(-1)
    is_nan = (valid & (keys != keys)).to(torch.uint8)
    last_nan = windows.shape[-1] - 1 - is_nan.flip(-1).argmax(-1)
    return torch.where(is_nan.any(-1).bool(), last_nan, first), valid.any(-1).expand(first.shape)


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Winners of all windows: values (N, C, *O) and their offsets in the window (see
    `layout.state_dtype`)."""
    wide = x.to(_WIDE.get(x.dtype, x.dtype))
    y = layout.empty_like(x, [axis.out_size for axis in axes])
    state = (
        torch.empty_like(y, dtype=layout.state_dtype(axes))
        if save
        else x.new_empty(0, dtype=layout.state_dtype(axes))
    )
    for band, part in _bands(axes, starts, x):
        flat, inside = _windows_of(part)
        valid = inside if mask is None else inside & _gather(mask, flat)
        windows = _gather(wide, flat)
        offset, seen = _choose(windows, valid, reduction)
        y[:, :, band] = torch.where(
            seen, windows.gather(-1, offset.unsqueeze(-1)).squeeze(-1), 0
        ).to(x.dtype)
        if save:
            state[:, :, band] = torch.where(seen, offset, 0).to(state.dtype)
    return y, state


def select_backward(
    grad: Tensor,
    state: Tensor,
    starts: Tensor | None,
    axes: Sequence[Axis],
    channels_last: bool,
) -> Tensor:
    """Sends the gradient of each window to its winner: (N, C, *O) -> (N, C, *S), in that layout."""
    flat, inside = winners(state, starts, axes)
    values = torch.where(inside, grad, 0).to(layout.compute_dtype(grad.dtype))
    total = _scatter(values, flat, [axis.in_size for axis in axes])
    return layout.to_layout(total.to(grad.dtype), channels_last)


def select_take(x: Tensor, state: Tensor, starts: Tensor | None, axes: Sequence[Axis]) -> Tensor:
    """The adjoint of `select_backward`: the element of x that each state points to, 0 where it
    points outside."""
    flat, inside = winners(state, starts, axes)
    taken = torch.where(inside, _gather(x, flat.unsqueeze(-1)).squeeze(-1), 0)
    return layout.to_layout(taken, layout.is_channels_last(state))


# Accumulation


class _Windows(NamedTuple):
    """Everything the formulas need about a band of windows, in compute dtype; x, w (N, C, *O,
    taps)."""

    x: Tensor
    valid: Tensor
    w: Tensor | None
    n: Tensor
    seen: Tensor
    a: Tensor
    p: Tensor


def why_not_accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
) -> str | None:
    """None: the reference serves everything."""
    return None


def _padded_count(part: Sequence[Corner]) -> Tensor:
    """Per window the taps that lie in the padding but inside the padded extent, (1, 1, *O)."""
    if part[0].padded is not None:
        return part[0].padded.squeeze(-1)
    counts = []
    for limits in (True, False):
        product: Tensor | int = 1
        for axis, start, stop, _ in part:
            position = start + torch.arange(axis.kernel, device=start.device) * axis.dilation
            low, high = (
                (-axis.before, axis.in_size + axis.after)
                if limits and not axis.is_adaptive
                else (0, stop)
            )
            product = product * ((position >= low) & (position < high)).sum(-1)
        counts.append(product)
    padded = counts[0] - counts[1]
    assert isinstance(padded, Tensor)
    return padded


def _prepare(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    part: Sequence[Corner],
) -> _Windows:
    flat, inside = _windows_of(part)
    dtype = layout.compute_dtype(x.dtype)
    valid = inside if mask is None else inside & _gather(mask, flat)
    w = None
    if weights is not None:
        w = _gather(weights, flat).to(dtype)
        valid = valid & (w != 0)
        w = torch.where(valid, w, 0)
    real = dtype if dtype.is_floating_point else torch.float64
    p = (
        torch.zeros((), dtype=real, device=x.device)
        if params is None
        else params.reshape(1, -1, *(1,) * (flat.ndim - 2))
    )
    windows = _gather(x, flat).to(dtype)
    # Elements that take no part stand in as a valid one of the same window: the formulas then stay
    # in range, and no NaN leaks through a derivative.
    key = (
        windows
        if reduction.anchor != "max"
        else torch.where(valid, formula(type(reduction), "key")(windows, p), -math.inf)
    )
    proxy = (
        valid.to(torch.uint8).argmax(-1, keepdim=True)
        if reduction.anchor != "max"
        else torch.where(key != key, math.inf, key).argmax(-1, keepdim=True)
    )
    stand_in = windows.gather(-1, proxy.expand(*windows.shape[:-1], 1)).detach()
    some = valid.any(-1, keepdim=True)
    windows = torch.where(valid, windows, torch.where(some, stand_in, 1))
    total = valid.sum(-1).to(real) if w is None else w.sum(-1)
    least = formula(type(reduction), "least")(p.squeeze(-1) if p.ndim else p)
    seen = ~(total <= least)  # a NaN among the weights is seen
    n = torch.where(seen, _count(total, reduction, part), least + 1)
    a = torch.zeros((), dtype=real, device=x.device)
    if reduction.anchor == "max":
        a = torch.where(some, torch.where(valid, key, -math.inf).amax(-1, keepdim=True), 0).detach()
    elif reduction.anchor == "mean":
        terms = torch.where(valid, windows, 0) if w is None else w * windows
        a = (terms.sum(-1, keepdim=True) / torch.where(total != 0, total, 1).unsqueeze(-1)).detach()
    return _Windows(windows, valid, w, n, seen, a, p)


def _count(total: Tensor, reduction: Accumulation, part: Sequence[Corner]) -> Tensor:
    if not isinstance(reduction, Mean):
        return total
    if reduction.divisor is not None:
        return torch.full_like(total, reduction.divisor)
    return total + _padded_count(part) if reduction.count_include_pad else total


def _sums(kind: type, name: str, v: _Windows, weighted: bool = True) -> tuple[Tensor, ...]:
    """Sums over each window of the terms that the formula `name` gives."""
    terms = (
        torch.where(v.valid, torch.as_tensor(t, dtype=v.x.dtype, device=v.x.device), 0)
        for t in formula(kind, name)(v.x, v.a, v.p)
    )
    return tuple((t if v.w is None else v.w * t).expand(v.x.shape).sum(-1) for t in terms)


def _finish(v: _Windows, reduction: Accumulation, sums: tuple[Tensor, ...]) -> Tensor:
    a, p = (t.squeeze(-1) if t.ndim else t for t in (v.a, v.p))
    safe = tuple(torch.where(v.seen, s, 1) for s in sums)
    if not v.x.dtype.is_floating_point:
        total = (
            sums[0]
            if not isinstance(reduction, Mean)
            else torch.div(sums[0], v.n.to(v.x.dtype), rounding_mode="trunc")
        )
        return torch.where(v.seen, total, 0)
    y = formula(type(reduction), "finish")(safe, v.n, a, p)
    return torch.where(v.seen, y, 0)


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    save: bool,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values (N, C, *O) of all windows, and for the backward pass a, the sums and n of each
    (stacked, in compute dtype)."""
    outs = [axis.out_size for axis in axes]
    y = layout.empty_like(x, outs, layout.result_dtype(x.dtype, reduction))
    stats = layout.empty_stats(x, outs, reduction, save)
    for band, part in _bands(axes, starts, x):
        v = _prepare(x, mask, weights, params, reduction, part)
        sums = _sums(type(reduction), "lift", v)
        y[:, :, band] = _finish(v, reduction, sums).to(y.dtype)
        if stats.numel():
            for slot, value in zip(
                stats, (v.a.squeeze(-1) if v.a.ndim else v.a, *sums, v.n), strict=True
            ):
                slot[:, :, band] = value
    return y, stats


class _Terms(NamedTuple):
    """Gradients of a band: by each tap's x and weight (None where not needed), and by p for each
    channel."""

    x: Tensor | None
    w: Tensor | None
    p: Tensor | None


def _as(value: Any, like: Tensor) -> Tensor:
    """A term of a formula, which may be a plain number, as a tensor of the windows' dtype."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _chain(by_sums: Sequence[Tensor], name: str, v: _Windows, kind: Any) -> Tensor:
    """Sum over k of dL/ds_k times the k-th term of the formula `name`, per tap."""
    total = torch.zeros((), dtype=v.x.dtype, device=v.x.device)
    for by_sum, term in zip(by_sums, formula(kind, name)(v.x, v.a, v.p), strict=True):
        total = total + by_sum.unsqueeze(-1) * _as(term, v.x)
    return total


def _backward_terms(
    grad: Tensor, v: _Windows, reduction: Accumulation, needs: Sequence[bool]
) -> _Terms:
    """The chain rule over the hand-written derivatives; itself differentiable."""
    kind: Any = type(reduction)
    a, p = (t.squeeze(-1) if t.ndim else t for t in (v.a, v.p))
    sums = tuple(torch.where(v.seen, s, 1) for s in _sums(kind, "lift", v))
    by_sums, by_n, by_p = formula(kind, "finish_grad")(sums, v.n, a, p)
    grad = torch.where(v.seen, grad.to(v.x.dtype), 0)
    by_sums = [grad * _as(d, v.x) for d in by_sums]
    gx = gw = gp = None
    if needs[0]:
        gx = _chain(by_sums, "lift_dx", v, kind)
        gx = torch.where(v.valid, gx if v.w is None else gx * v.w, 0)
    if needs[1]:
        fixed = isinstance(reduction, Mean) and reduction.divisor is not None
        through_n = _as(0.0, v.x) if fixed else (grad * _as(by_n, v.x)).unsqueeze(-1)
        gw = torch.where(v.valid, _chain(by_sums, "lift", v, kind) + through_n, 0)
    if needs[2]:
        gp = grad * _as(by_p, v.x)
        for by_sum, term in zip(by_sums, _sums(kind, "lift_dp", v), strict=True):
            gp = gp + by_sum * term
        gp = gp.sum([0, *range(2, gp.ndim)])
    return _Terms(gx, gw, gp)


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
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x (in the layout of x, which `channels_last` tells), weights and params; those
    not needed come as empty tensors. The reference reads no stats."""
    sizes = [axis.in_size for axis in axes]
    shape = (*grad.shape[:2], *sizes)
    if not x.numel():
        x = grad.new_zeros(()).expand(shape)
    dtype = layout.compute_dtype(grad.dtype)
    empty = grad.new_empty(0)
    gx = torch.zeros(shape, dtype=dtype, device=grad.device) if needs[0] else empty
    gw = torch.zeros(shape, dtype=dtype, device=grad.device) if needs[1] else empty
    gp = torch.zeros(grad.shape[1], dtype=dtype, device=grad.device) if needs[2] else empty
    for band, part in _bands(axes, starts, x):
        v = _prepare(x, mask, weights, params, reduction, part)
        terms = _backward_terms(grad[:, :, band], v, reduction, needs)
        flat, _ = _windows_of(part)
        if terms.x is not None:
            gx += _scatter(terms.x.expand(*shape[:2], *flat.shape[2:]), flat, sizes)
        if terms.w is not None:
            gw += _scatter(terms.w.expand(*shape[:2], *flat.shape[2:]), flat, sizes)
        if terms.p is not None:
            gp += terms.p
    if needs[2] and params is not None:
        gp = gp.sum(0, keepdim=True) if params.numel() == 1 else gp
    return layout.to_layout(gx.to(grad.dtype), channels_last) if needs[0] else gx, gw, gp


def shares(
    reduction: Accumulation,
    grad: Tensor,
    a: Tensor,
    sums: Sequence[Tensor],
    n: Tensor,
    p: Tensor,
    divisor: float,
) -> tuple[Tensor, Tensor]:
    """What the gradient of each window means for its sums and its n (stacked), and for the
    parameter, from saved statistics; n is -inf where the window is empty. All broadcast to grad."""
    kind: Any = type(reduction)
    filled = n != -torch.inf
    n = torch.where(filled, n, formula(kind, "least")(p) + 1)
    safe = tuple(torch.where(filled, s, 1) for s in sums)
    by_sums, by_n, by_p = formula(kind, "finish_grad")(safe, n, torch.where(filled, a, 0), p)
    by_n = 0.0 if divisor else by_n
    parts = [torch.where(filled, grad * d, 0).expand(grad.shape) for d in (*by_sums, by_n, by_p)]
    return torch.stack(parts[:-1]), parts[-1]


# Composites: ordinary differentiable operators


def composite_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
) -> tuple[Tensor, Tensor]:
    """Values and flat positions (int64, -1 for an empty window) of all windows."""
    taken, valid = windows(x.to(_WIDE.get(x.dtype, x.dtype)), mask, starts, axes)
    offset, seen = _choose(taken.detach(), valid, reduction)
    y = torch.where(seen, taken.gather(-1, offset.unsqueeze(-1)).squeeze(-1), 0).to(x.dtype)
    indices = winners(offset, starts, axes)[0]
    return y, torch.where(seen, indices, -1)


def composite_accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    starts: Tensor | None = None,
) -> Tensor:
    """Values of all windows."""
    v = _prepare(x, mask, weights, params, reduction, corners(axes, starts, x.device))
    return _finish(v, reduction, _sums(type(reduction), "lift", v)).to(
        layout.result_dtype(x.dtype, reduction)
    )


def composite_accumulate_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    needs: Sequence[bool],
    starts: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by x, weights and params as differentiable operators."""
    part = corners(axes, starts, x.device)
    v = _prepare(x, mask, weights, params, reduction, part)
    terms = _backward_terms(grad, v, reduction, needs)
    flat, _ = _windows_of(part)
    sizes = [axis.in_size for axis in axes]
    gx, gw = (
        None if t is None else _scatter(t.expand(*x.shape[:2], *flat.shape[2:]), flat, sizes)
        for t in (terms.x, terms.w)
    )
    gp = (
        terms.p.sum(0, keepdim=True)
        if terms.p is not None and params is not None and params.numel() == 1
        else terms.p
    )
    return gx, gw, gp
