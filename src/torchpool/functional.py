"""`pool()` and torch's pooling functions: the one place that validates what a user passes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchpool import ops, ragged, small
from torchpool.kernels import layout, lowering, reference
from torchpool.reductions import Accumulation, Lp, Max, Mean, Min, Reduction, Selection, Sum
from torchpool.unpool import max_unpool1d, max_unpool2d, max_unpool3d
from torchpool.windows import Adaptive, Axis, Fractional, Global, Size, Window, Windows

__all__ = [
    "Explanation",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d",
    "adaptive_max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "explain",
    "fractional_max_pool2d",
    "fractional_max_pool2d_with_indices",
    "fractional_max_pool3d",
    "fractional_max_pool3d_with_indices",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d",
    "max_pool3d_with_indices",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
    "pool",
]

# The general form


def pool(
    x: Any,
    reduction: Reduction,
    windows: Windows,
    *,
    dims: Sequence[int] | int | None = None,
    mask: Any = None,
    weights: Any = None,
    lengths: Tensor | None = None,
    padding_side: str = "right",
    offsets: Tensor | None = None,
    return_indices: bool = False,
    fill: float = 0.0,
) -> Any:
    """Slides windows over x and turns each into one value.

    Samples of different lengths come padded (`lengths=`), packed one after another (`offsets=`), as
    a jagged nested tensor or as a `PackedSequence`; the result has the same form. Each sample gives
    what it gives alone, whatever the padding holds.

    Args:
        x: any real dtype; half types are computed in float32 and rounded once.
        reduction: what a window becomes: `Max()`, `Mean()`, `Lp(3)`, ... A tensor as its parameter
            has one value, or one per channel
            (the channel axis is the last one that is not pooled), and gets gradients.
        windows: where to look: `Window(3, stride=2)`, `Adaptive(7)`, `Global()`, `Fractional(2,
            output_ratio=0.7)`.
        dims: the pooled axes, in the order of the windows' entries; by default all after the first
            two (after the first,
            where the windows name one axis less than x has after the first two: x without a batch
            axis).
        mask: bool, broadcastable to x; elements where it is False take no part.
        weights: floating, broadcastable to x; the weight of each element in sums and means. An
            element of weight 0 takes no part.
            Gets gradients. A selection only asks whether the weight is 0.
        lengths: integer (N,), the elements of each sample of a padded batch along the one pooled
            axis. `windows.pool_lengths(lengths)` are those of the result; what lies behind them
            holds `fill`.
        padding_side: "right" or "left": where the padding stands in x, and in the result.
        offsets: integer (N + 1,): x is packed, sample i being the rows `offsets[i] .. offsets[i +
            1] - 1` of the pooled axis (by default the first). The result is the pair (values,
            offsets), packed likewise.
        return_indices: also return the flat positions of the winners over the pooled axes (int64);
            -1 for an empty window. Of nested tensors and packed sequences: positions inside the
            sample.
        fill: value of a window that has no valid element; one that the result's dtype can hold.
    Shape:
        x (N, C, *S) -> (N, C, *O) with O = windows.out_size(S); with `dims` the pooled axes change
        size where they are
    Returns:
        The pooled tensor in the memory layout of x (or in x's ragged form); with return_indices the
        pair (values, indices).
    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    >>> x = torch.arange(6.0).reshape(1, 1, 6)
    >>> pool(x, Mean(), Window(2))
    tensor([[[0.5000, 2.5000, 4.5000]]])
    >>> pool(x, Mean(), Window(2), lengths=torch.tensor([3]))
    tensor([[[0.5000, 0.0000, 0.0000]]])
    """
    if lengths is not None or offsets is not None or ragged.is_ragged(x):
        options = (dims, mask, weights, return_indices, fill)
        return _pool_ragged(x, reduction, windows, lengths, padding_side, offsets, options)
    if mask is None and weights is None and fill == 0 and not return_indices:
        call = _ready(x, reduction, windows, dims)
        if call is not None:
            return call(x)
    case = _by_lengths(_case(x, reduction, windows, dims, mask, weights, return_indices))
    y, indices = _run(case, return_indices)
    if fill != 0:
        y = _fill(y, case, fill)
    y = case.view.restore(y)
    return (y, case.view.restore(indices)) if return_indices else y


# Calls that were made before

_REPEATED: tuple[Any, ...] = (Max, Min, Sum, Mean, Window, Adaptive, Global)
"""Windows, and the reductions that are prepared on every device."""


def _ready(x: Any, reduction: Any, windows: Any, dims: Any) -> Any:
    """A call of `pool` for a plain tensor, as a function of x; None where more is asked of it."""
    if (
        type(windows) not in _REPEATED
        or (dims is not None and type(dims) is not range)
        or not isinstance(x, Tensor)
        or not (x.is_cpu or x.is_cuda)
        or not isinstance(reduction, Reduction)
        or not (type(reduction) in _REPEATED or (x.is_cpu and _is_fixed(reduction)))
        or not ops.is_plain(x)
        or os.environ.get("TORCHPOOL_BACKEND")
    ):
        return None
    shape, stride, watched = x.shape, x.stride(), ops.is_watched(x)
    return _ready_call(reduction, windows, dims, shape, stride, x.dtype, x.is_cpu, watched)


def _is_fixed(reduction: Any) -> bool:
    """Whether a reduction is one of this library's, which numbers alone tell apart; a user's own
    may hold anything."""
    is_number = reduction.value is None or type(reduction.value) in (int, float)
    return is_number and type(reduction).__module__.startswith("torchpool.")


@lru_cache(maxsize=1024)
def _ready_call(
    reduction: Any,
    windows: Any,
    dims: Any,
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    on_cpu: bool,
    watched: bool,
) -> Any:
    like = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    case = _case(like, reduction, windows, dims, None, None, False)
    if case.x.dtype != dtype or case.starts is not None:
        return None
    call = ops.ready(case.x, reduction, case.axes, on_cpu, watched)
    view = case.view
    if call is None or view.is_canonical:
        return call
    return lambda x: view.restore(call(view.canonical(x)))


# Samples of different lengths


def _pool_ragged(
    x: Any,
    reduction: Reduction,
    windows: Windows,
    lengths: Tensor | None,
    padding_side: str,
    offsets: Tensor | None,
    options: tuple[Any, ...],
) -> Any:
    """Chooses by the form of x. `options`: dims, mask, weights, return_indices, fill."""
    given = [
        name
        for name, there in (
            ("lengths", lengths is not None),
            ("offsets", offsets is not None),
            (f"x, a {type(x).__name__}", ragged.is_ragged(x)),
        )
        if there
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} both tell the lengths of the samples; give one")
    ragged.check_side(padding_side)
    if lengths is not None:
        return _pool_padded(x, reduction, windows, lengths, padding_side, *options)
    if offsets is not None:
        return _pool_packed(x, reduction, windows, offsets, *options)
    return _pool_nested(x, reduction, windows, *options)


def _pool_padded(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    lengths: Tensor,
    padding_side: str,
    dims: Any,
    mask: Tensor | None,
    weights: Tensor | None,
    return_indices: bool,
    fill: float,
) -> Any:
    _check_types(x, reduction, windows)
    dim = _ragged_axis(x, windows, 1 if dims is None and x.ndim == 2 else dims)
    if dim == 0:
        raise ValueError(
            f"lengths: axis 0 of x with shape {tuple(x.shape)} counts the samples, so it cannot be "
            f"pooled; name the padded axis with dims="
        )
    size = x.shape[dim]
    outputs = _ragged_outputs(x, windows, size)
    lengths = ragged.check_lengths(lengths, size, x.device, count=x.shape[0])
    runs = partial(ragged.padded_runs, lengths, size, padding_side)
    others = (mask, weights, return_indices, fill)
    y = _over_runs(x, reduction, windows, dim, lengths, others, runs)
    if y is not None:
        return y
    table = ragged.padded_table(windows, lengths, size, outputs, padding_side)
    return _run_table(x, reduction, windows, table, dim, mask, weights, return_indices, fill, False)


def _over_runs(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    dim: int,
    bounds: Tensor,
    others: tuple[Any, ...],
    runs: Callable[[], Any],
) -> Tensor | None:
    """One value of each sample of a plain tensor on the CPU, past what other cases need; None of
    any other case.

    Args:
        bounds: the lengths or offsets of the samples, from which
        runs: makes the rows of their table.
        others: mask, weights, return_indices, fill.
    """
    mask, weights, return_indices, fill = others
    is_frequent = (
        _is_fixed(reduction)
        and type(windows) is Global
        and mask is None
        and weights is None
        and not return_indices
        and fill == 0
        and x.is_cpu
        and x.is_contiguous()
        and x.numel() > 0
        and bounds.numel() > 1
        and ops.is_plain(x)
        and ragged.is_readable(bounds)
        and not os.environ.get("TORCHPOOL_BACKEND")
    )
    return ops.over_runs(x, reduction, dim, runs()) if is_frequent else None


def _ragged_outputs(x: Tensor, windows: Windows, size: int) -> int:
    """Windows of a sample without padding, which has the most."""
    outputs = windows.pool_lengths(size)
    if size == 0 or outputs < 1:
        raise ValueError(
            f"{windows} gives no window for x of shape {tuple(x.shape)}, whose padded axis has "
            f"{size} elements; use a smaller kernel or dilation, or more padding"
        )
    return int(outputs) if isinstance(outputs, int) else outputs


def _ragged_axis(x: Tensor, windows: Windows, dims: Any) -> int:
    pooled = _pooled_axes(x, windows, dims)
    if len(pooled) != 1:
        raise ValueError(
            f"lengths and offsets speak of one axis, but {len(pooled)} axes of x with shape "
            f"{tuple(x.shape)} are pooled: {pooled}; name one with dims=, or use mask="
        )
    return pooled[0]


def _pool_packed(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    offsets: Tensor,
    dims: Any,
    mask: Tensor | None,
    weights: Tensor | None,
    return_indices: bool,
    fill: float,
) -> Any:
    _check_types(x, reduction, windows)
    dim = _ragged_axis(x, windows, 0 if dims is None else dims)
    offsets = ragged.check_offsets(offsets, x.shape[dim], x.device)
    runs = partial(ragged.packed_runs, offsets)
    others = (mask, weights, return_indices, fill)
    y = _over_runs(x, reduction, windows, dim, offsets, others, runs)
    if y is not None:
        return y, torch.arange(offsets.shape[0])
    table, made = ragged.packed_table(windows, offsets, x.shape[dim])
    pooled = _run_table(
        x, reduction, windows, table, dim, mask, weights, return_indices, fill, True
    )
    return ((pooled[0], made), pooled[1]) if return_indices else (pooled, made)


def _pool_nested(
    x: Any,
    reduction: Reduction,
    windows: Windows,
    dims: Any,
    mask: Any,
    weights: Any,
    return_indices: bool,
    fill: float,
) -> Any:
    packed = ragged.unpack(x)
    _check_types(packed.values, reduction, windows)
    mask, weights = (
        None if t is None else _same_samples(t, x, packed, name)
        for t, name in ((mask, "mask"), (weights, "weights"))
    )
    axis = packed.dim if isinstance(x, PackedSequence) else packed.dim + 1
    if dims is not None and dims not in (axis, (axis,), [axis]):
        raise ValueError(f"dims={dims!r}: the axis of different lengths is {axis}; pool that one")
    table, made = ragged.packed_table(windows, packed.offsets, packed.values.shape[packed.dim])
    table = table._replace(rows=table.rows.to(packed.values.device))
    pooled = _run_table(
        packed.values, reduction, windows, table, packed.dim, mask, weights, return_indices, fill,
        True,
    )  # fmt: skip
    if not return_indices:
        return ragged.repack(x, pooled, made, packed.dim)
    values, rows = pooled
    sample = (
        torch.searchsorted(made, torch.arange(table.axis.out_size, device=made.device), right=True)
        - 1
    )
    begin = packed.offsets[sample].to(rows.device)
    begin = begin.reshape(-1, *(1,) * (rows.ndim - 1 - packed.dim))
    inside = torch.where(rows < 0, -1, rows - begin)
    return tuple(ragged.repack(x, t, made, packed.dim) for t in (values, inside))


def _same_samples(other: Any, x: Any, packed: ragged.Packed, name: str) -> Tensor:
    """The values of a mask or weights in the same ragged form as x."""
    if type(other) is not type(x) or not ragged.is_ragged(other):
        raise TypeError(
            f"{name} must be a {type(x).__name__} of the same lengths as x, not a "
            f"{type(other).__name__}"
        )
    values, offsets, dim = ragged.unpack(other)
    same = dim == packed.dim and offsets.shape == packed.offsets.shape
    if same and ragged.is_readable(offsets):
        same = torch.equal(offsets, packed.offsets)
    if not same:
        raise ValueError(f"{name} must have the lengths of x, sample by sample")
    return values


def _run_table(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    table: ragged.Table,
    dim: int,
    mask: Tensor | None,
    weights: Tensor | None,
    return_indices: bool,
    fill: float,
    is_packed: bool,
) -> Any:
    """Pools over windows that a table gives."""
    if return_indices and not isinstance(reduction, Selection):
        raise ValueError(
            f"return_indices=True needs a selection such as "
            f"Max() or Min(): {reduction} has no winner"
        )
    mask = None if mask is None else _broadcast(mask, x, "mask")
    weights = None if weights is None else _broadcast(weights, x, "weights")
    others = 1 if is_packed else 2  # axes that windows and parameters speak of, besides channels
    flat = x.ndim == others
    tensors = [t if t is None or not flat else t.unsqueeze(-1) for t in (x, mask, weights)]
    if table.axis.in_size == 0:  # no row at all: one that no window reads
        tensors = [None if t is None else _one_more(t, dim) for t in tensors]
        table = table._replace(axis=table.axis._replace(in_size=1, kernel=1))
    x, mask, weights = tensors  # type: ignore[assignment]
    view = _View((dim,), x.shape)
    case = _canonical_case(x, reduction, windows, view, (table.axis,), mask, weights)
    rows = table.rows
    if not is_packed and case.x.shape[0] != rows.shape[0]:
        rows = rows.repeat_interleave(case.x.shape[0] // rows.shape[0], 0)
    case = case._replace(starts=rows, is_packed=is_packed)
    y, indices = _run(case, return_indices)
    if fill != 0:
        y = _fill(y, case, fill)
    made = [view.restore(t) for t in ((y, indices) if return_indices else (y,))]
    made = [t.squeeze(-1) for t in made] if flat else made
    return tuple(made) if return_indices else made[0]


def _one_more(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat([x, x.new_zeros(shape)], dim)


class _View(NamedTuple):
    """How a tensor is seen as (N, C, *S): its pooled axes, in order, and the others."""

    pooled: tuple[int, ...]
    shape: torch.Size

    def canonical(self, x: Tensor) -> Tensor:
        if self.is_canonical:
            return x
        d = len(self.pooled)
        x = x.movedim(self.pooled, tuple(range(-d, 0)))
        lead = x.ndim - d
        return x.flatten(0, lead - 2) if lead > 2 else x[(None,) * (2 - lead)]

    @property
    def is_canonical(self) -> bool:
        return self.pooled == tuple(range(2, len(self.shape)))

    def restore(self, y: Tensor) -> Tensor:
        if self.is_canonical:
            return y
        d = len(self.pooled)
        lead = [size for dim, size in enumerate(self.shape) if dim not in self.pooled]
        return y.reshape(*lead, *y.shape[2:]).movedim(tuple(range(-d, 0)), self.pooled)


class _Case(NamedTuple):
    """A validated call: everything in canonical form."""

    x: Tensor
    mask: Tensor | None
    weights: Tensor | None
    params: Tensor | None
    starts: Tensor | None
    reduction: Any
    axes: tuple[Axis, ...]
    windows: Windows
    view: _View
    is_packed: bool = False

    @property
    def is_exported_whole(self) -> bool:
        """Whether an exported graph holds one operator for it: written out, each window of packed
        samples would gather as many elements as the longest could have."""
        return self.is_packed and lowering.is_exporting()


def _case(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    dims: Any,
    mask: Tensor | None,
    weights: Tensor | None,
    return_indices: bool,
) -> _Case:
    _check_types(x, reduction, windows)
    if return_indices and not isinstance(reduction, Selection):
        raise ValueError(
            f"return_indices=True needs a selection such as "
            f"Max() or Min(): {reduction} has no winner"
        )
    view = _View(_pooled_axes(x, windows, dims), x.shape)
    sizes = [x.shape[dim] for dim in view.pooled]
    if any(size == 0 for size in sizes):
        raise ValueError(
            f"x of shape {tuple(x.shape)} has a pooled axis of size "
            f"0; pooled axes need at least one element"
        )
    try:
        axes = _axes(windows, sizes)
    except ValueError as error:
        raise ValueError(
            f"{error} (x has shape {tuple(x.shape)}, pooled axes {view.pooled})"
        ) from None
    if any(axis.out_size == 0 for axis in axes):
        raise ValueError(
            f"{windows} gives an empty output for x of shape "
            f"{tuple(x.shape)}; output sizes must be at least 1"
        )
    mask = None if mask is None else _broadcast(mask, x, "mask")
    weights = None if weights is None else _broadcast(weights, x, "weights")
    case = _canonical_case(x, reduction, windows, view, axes, mask, weights)
    if isinstance(windows, Fractional):
        case = case._replace(starts=_fractional_starts(windows, case.x, axes))
    return case


def _axes(windows: Windows, sizes: Sequence[int]) -> tuple[Axis, ...]:
    if isinstance(windows, Adaptive) and lowering.is_exporting():
        return windows.axes(sizes, symbolic=True)
    if torch.compiler.is_compiling() or isinstance(windows, Fractional):
        return windows.axes(sizes)
    return _known_axes(windows, tuple(sizes))


@lru_cache(maxsize=1024)
def _known_axes(windows: Windows, sizes: tuple[int, ...]) -> tuple[Axis, ...]:
    return windows.axes(sizes)


def _canonical_case(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    view: _View,
    axes: tuple[Axis, ...],
    mask: Tensor | None,
    weights: Tensor | None,
) -> _Case:
    x = view.canonical(_promote(x, reduction))
    mask = None if mask is None else view.canonical(mask)
    weights = None if weights is None else view.canonical(weights)
    if weights is not None and isinstance(reduction, Selection):
        mask, weights = weights != 0 if mask is None else mask & (weights != 0), None
    params = _params(reduction, x)
    return _Case(x, mask, weights, params, None, reduction, axes, windows, view)


def _by_lengths(case: _Case) -> _Case:
    """The same case with lengths in place of a mask that tells them: nothing is read behind
    them."""
    mask, x = case.mask, case.x
    if mask is None or not isinstance(case.windows, Global) or len(case.axes) != 1:
        return case
    is_served = x.dtype.is_floating_point or isinstance(case.reduction, Selection)
    if not is_served or not ragged.is_readable(mask) or not x.numel():
        return case
    found = None
    if mask.shape[1] == 1 or mask.stride(1) == 0:  # the same in all channels
        found = ragged.lengths_of(mask[:, 0])
    if found is None:
        return case
    lengths, side = found
    table = ragged.padded_table(case.windows, lengths, x.shape[2], 1, side)
    return case._replace(mask=None, starts=table.rows, axes=(table.axis,))


def _check_types(x: Any, reduction: Any, windows: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
    if not isinstance(reduction, (Selection, Accumulation)):
        hint = (
            "an instance: write Max(), not Max"
            if isinstance(reduction, type)
            else "a reduction such as torchpool.Max()"
        )
        raise TypeError(f"reduction={reduction!r} must be {hint}")
    if not isinstance(windows, Windows):
        raise TypeError(
            f"windows={windows!r} must be windows such as torchpool.Window(3, stride=2)"
        )
    if x.dtype.is_complex or x.dtype == torch.uint64:
        raise TypeError(
            f"x has dtype {x.dtype}, which cannot be pooled; pool its parts or convert it first"
        )
    if x.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"x has the layout {x.layout}; pool x.to_dense()")


def _pooled_axes(x: Tensor, windows: Windows, dims: Any) -> tuple[int, ...]:
    bound = windows.num_axes
    if dims is None:
        first = 1 if bound is not None and x.ndim == bound + 1 else 2
        pooled = tuple(range(first, x.ndim))
    else:
        given = (dims,) if isinstance(dims, int) else tuple(dims)
        if any(not -x.ndim <= dim < x.ndim for dim in given):
            raise ValueError(f"dims={dims!r} is out of range for x of shape {tuple(x.shape)}")
        pooled = tuple(dim % x.ndim for dim in given)
        if len(set(pooled)) != len(pooled):
            raise ValueError(f"dims={dims!r} names an axis twice")
    if not 1 <= len(pooled) <= 4:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has {len(pooled)} pooled axes "
            f"({pooled}); 1 to 4 can be pooled: name them with dims="
        )
    if bound is not None and bound != len(pooled):
        raise ValueError(
            f"{windows} describes {bound} axes, but {len(pooled)} axes of x "
            f"with shape {tuple(x.shape)} are pooled: {pooled}"
        )
    return pooled


def _promote(x: Tensor, reduction: Reduction) -> Tensor:
    """Integers become floating where the result is not an integer."""
    exact = isinstance(reduction, (Selection, Sum)) or (
        isinstance(reduction, Mean) and x.dtype != torch.bool
    )
    return x if exact or x.dtype.is_floating_point else x.to(torch.get_default_dtype())


def _broadcast(other: Any, x: Tensor, name: str) -> Tensor:
    if not isinstance(other, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(other).__name__}")
    if name == "mask" and other.dtype != torch.bool:
        raise TypeError(
            f"mask has dtype {other.dtype}; it must be bool (mask "
            f"!= 0), floating weights go to weights="
        )
    if name == "weights" and not other.dtype.is_floating_point:
        raise TypeError(
            f"weights have dtype {other.dtype}; they must be floating (weights.float())"
        )
    if other.device != x.device:
        raise ValueError(
            f"{name} lies on {other.device}, x on {x.device}; "
            f"move it with {name}.to({str(x.device)!r})"
        )
    try:
        return other.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(other.shape)} does not "
            f"broadcast to x of shape {tuple(x.shape)}"
        ) from None


def _params(reduction: Any, x: Tensor) -> Tensor | None:
    value = reduction.value
    if value is None:
        return None
    dtype = layout.compute_dtype(x.dtype)
    if not isinstance(value, Tensor):
        return torch.full((1,), value, dtype=dtype, device=x.device)
    name = reduction.parameter
    if value.numel() not in (1, x.shape[1]):
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} must have one "
            f"value, or one per channel: {x.shape[1]}"
        )
    if value.device != x.device:
        raise ValueError(
            f"{name} lies on {value.device}, x on {x.device}; "
            f"move it with {name}.to({str(x.device)!r})"
        )
    return value.reshape(-1).to(dtype)


def _fractional_starts(windows: Fractional, x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """First position of each window, (N, C, d, max O): floor((o + u) a) - floor(u a), a = (I - K) /
    (O - 1), the last at I - K."""
    shape = (*x.shape[:2], len(axes))
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    samples = windows.samples
    if samples is None:
        samples = torch.rand(shape, dtype=dtype, device=x.device, generator=windows.generator)
    elif samples.shape != shape:
        raise ValueError(
            f"samples of shape {tuple(samples.shape)} must have "
            f"the shape (N, C, pooled axes) = {shape}"
        )
    starts = x.new_zeros((*shape, max(axis.out_size for axis in axes)), dtype=torch.int64)
    for i, axis in enumerate(axes):
        u = samples[:, :, i, None]
        if axis.out_size > 1:
            step = torch.tensor(axis.in_size - axis.kernel, dtype=u.dtype) / torch.tensor(
                axis.out_size - 1, dtype=u.dtype
            )
            outputs = torch.arange(axis.out_size - 1, dtype=u.dtype, device=x.device)
            starts[:, :, i, : axis.out_size - 1] = ((outputs + u) * step).long() - (u * step).long()
        starts[:, :, i, axis.out_size - 1] = axis.in_size - axis.kernel
    return starts


# Running a case


def _needs_composite() -> bool:
    """Whether ordinary torch operators are asked for: an exported graph, forward-mode derivatives,
    or torch.func's derivatives."""
    if torch.compiler.is_compiling():
        return lowering.is_exporting()
    if ops.in_forward_mode():
        return True
    transforms = torch._C._functorch.get_interpreter_stack()
    return transforms is not None and any(
        t.key() != torch._C._functorch.TransformType.Vmap for t in transforms
    )


def _run(case: _Case, return_indices: bool) -> tuple[Tensor, Any]:
    if isinstance(case.reduction, Selection):
        return _run_selection(case, return_indices)
    if lowering.is_exporting() and not case.is_packed:
        return lowering.accumulate(
            case.x, case.mask, case.weights, case.params, case.starts, case.reduction, case.axes
        ), None
    if _needs_composite() and not case.is_exported_whole:
        return reference.composite_accumulate(
            case.x, case.mask, case.weights, case.params, case.reduction, case.axes, case.starts
        ), None
    tensors = (case.x, case.weights, case.params)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    arguments = (case.x, case.mask, case.weights, case.params, case.starts)
    return ops.accumulate(*arguments, case.reduction, case.axes, save)[0], None


def _run_selection(case: _Case, return_indices: bool) -> tuple[Tensor, Any]:
    if lowering.is_exporting() and not case.is_packed and not return_indices:
        return lowering.select(case.x, case.mask, case.starts, case.reduction, case.axes), None
    if _needs_composite() and not case.is_exported_whole:
        return reference.composite_select(case.x, case.mask, case.starts, case.reduction, case.axes)
    save = return_indices or (torch.is_grad_enabled() and case.x.requires_grad)
    y, state = ops.select(case.x, case.mask, case.starts, case.reduction, case.axes, save)
    if not return_indices:
        return y, None
    flat, inside = reference.winners(state, case.starts, case.axes)
    if case.mask is not None:
        inside = inside & case.mask.flatten(2).gather(2, flat.flatten(2)).reshape(flat.shape)
    return y, torch.where(inside, flat, -1)


def _fill(y: Tensor, case: _Case, fill: float) -> Tensor:
    """Writes `fill` where a window holds too little: no element, or n <= least(p)."""
    _check_fill(fill, y.dtype)
    n = _contents(case)
    least: Any = 0.0
    if isinstance(case.reduction, Accumulation) and case.params is not None:
        kind: Any = type(case.reduction)
        p = case.params.detach().reshape(1, -1, *(1,) * len(case.axes))
        least = reference.formula(kind, "least")(p)
    return torch.where(n <= least, torch.tensor(fill, dtype=y.dtype, device=y.device), y)


def _contents(case: _Case) -> Tensor:
    """The number of elements of each window, or the sum of their weights."""
    if case.mask is None and case.weights is None and reference.is_table(case.starts):
        assert case.starts is not None
        return case.starts[:, :, 0, :, 1]
    ones = torch.ones((), device=case.x.device).expand(case.x.shape)
    if case.mask is not None:
        ones = ones * case.mask
    if case.weights is not None:
        ones = torch.where(ones != 0, case.weights.detach(), 0)
    return reference.accumulate(ones, None, None, None, Sum(), case.axes, False, case.starts)[0]


def _check_fill(fill: float, dtype: torch.dtype) -> None:
    if dtype.is_floating_point:
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not low <= fill <= high or fill != int(fill):
        raise ValueError(
            f"fill={fill!r} is not a value of {dtype}, the result's dtype; give a whole number "
            f"from {low} to {high}, or pool x.float()"
        )


# Why and where


@dataclass(frozen=True)
class Explanation:
    """How a call of `pool` would run."""

    backend: str
    """The backend that would run: "cpu", "gpu" or "reference"."""
    refusals: dict[str, str]
    """Why the backends asked before it do not serve the call."""
    axes: tuple[Axis, ...]
    """The resolved windows along each pooled axis."""
    input_bytes: int
    """Bytes read."""
    output_bytes: int
    """Bytes written."""
    saved_bytes: int
    """Bytes kept for the backward pass, the input included where it is needed."""

    def __str__(self) -> str:
        lines = [f"runs on        {self.backend}"]
        lines += [f"not on {name:<8}{reason}" for name, reason in self.refusals.items()]
        for axis in self.axes:
            kind = (
                "adaptive"
                if axis.is_adaptive
                else f"stride {axis.stride}, dilation {axis.dilation}, "
                f"padding ({axis.before}, {axis.after})"
            )
            lines.append(
                f"axis           {axis.in_size} -> {axis.out_size}: kernel {axis.kernel}, {kind}"
            )
        moved = self.input_bytes + self.output_bytes
        lines.append(
            f"moves          {moved:,} bytes (reads {self.input_bytes:,}, "
            f"writes {self.output_bytes:,})"
        )
        lines.append(f"saves          {self.saved_bytes:,} bytes for the backward pass")
        return "\n".join(lines)


def explain(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    *,
    dims: Sequence[int] | int | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Explanation:
    """Which backend runs a call of `pool` and why, its geometry, the bytes it moves and saves.
    Arguments as `pool`.

    >>> explain(torch.zeros(1, 1, 4, 4), Max(), Window(2)).saved_bytes
    4
    """
    case = _case(x, reduction, windows, dims, mask, weights, False)
    selects = isinstance(reduction, Selection)
    dense = layout.dense(case.x)
    middle = (case.starts,) if selects else (case.weights, case.params)
    operation = "select" if selects else "accumulate"
    arguments = (dense, case.mask, *middle, case.reduction, case.axes)
    if not selects and case.starts is not None:
        backend, reasons = (
            reference,
            {
                "cpu": "windows that differ from plane to plane",
                "gpu": "windows that differ from plane to plane",
            },
        )
    else:
        module, reasons = ops.refusals(operation, x.device, *arguments)
        backend = module
    outputs = math.prod((*case.x.shape[:2], *(axis.out_size for axis in case.axes)))
    item = case.x.element_size()
    return Explanation(
        backend.__name__.rsplit(".", 1)[-1],
        reasons,
        case.axes,
        case.x.numel() * item,
        outputs * item,
        _saved_bytes(case, outputs),
    )


def _saved_bytes(case: _Case, outputs: int) -> int:
    if isinstance(case.reduction, Selection):
        return outputs * layout.state_dtype(case.axes).itemsize
    kept = case.x.numel() * case.x.element_size()
    if case.reduction.linear:
        return kept if case.weights is not None else 0
    return int(
        kept + outputs * (case.reduction.num_sums + 2) * layout.compute_dtype(case.x.dtype).itemsize
    )


# Torch's functions


def _check_rank(x: Tensor, d: int, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: input must be a torch.Tensor, not {type(x).__name__}")
    if x.ndim not in (d + 1, d + 2):
        raise ValueError(
            f"{name}: input of shape {tuple(x.shape)} must have "
            f"{d + 1} or {d + 2} axes: (C, *S) or (N, C, *S)"
        )
    if x.ndim == d + 1 and x.shape[0] == 0:
        raise ValueError(
            f"{name}: input of shape {tuple(x.shape)} has no channels; "
            "only a batch axis may be empty"
        )


def _ints(value: Any, d: int, name: str) -> tuple[int, ...]:
    if type(value) is int:
        return (value,) * d
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, d):
        raise ValueError(f"{name}={value!r} must be an int or {d} ints")
    return values * d if len(values) == 1 else values


def _window(
    d: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Window:
    """A window with torch's limits: symmetric padding, at most half the (dilated) kernel."""
    numbers = (kernel, stride, padding, dilation)
    plain = not torch.compiler.is_compiling() and all(
        type(number) in (int, type(None)) for number in numbers
    )
    if plain:
        return _known_window(d, *numbers, bool(ceil_mode))
    return _checked_window(d, *numbers, ceil_mode)


@lru_cache(maxsize=1024)
def _known_window(*arguments: Any) -> Window:
    return _checked_window(*arguments)


def _checked_window(
    d: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Window:
    kernel, padding, dilation = (
        _ints(kernel, d, "kernel_size"),
        _ints(padding, d, "padding"),
        _ints(dilation, d, "dilation"),
    )
    stride = (
        kernel
        if stride is None or (isinstance(stride, Sequence) and not len(stride))
        else _ints(stride, d, "stride")
    )
    window = Window(kernel, stride, padding, dilation, ceil_mode)
    if not any(padding):
        return window
    for k, p, step in zip(kernel, padding, dilation, strict=True):
        if p > ((k - 1) * step + 1) // 2:
            raise ValueError(
                f"padding={padding} is more than half of the kernel {kernel} "
                f"(dilation {dilation}), which torch refuses; "
                f"torchpool.pool(x, reduction, torchpool.Window(..., "
                f"padding={p})) takes any padding"
            )
    return window


def _max_pool(d: int, x: Tensor, window: Any, return_indices: bool) -> Any:
    if not return_indices:
        kernel, stride, *rest = window
        y = small.pooled(f"max_pool{d}d", x, kernel, () if stride is None else stride, *rest)
        if y is not None:
            return y
    _check_rank(x, d, f"max_pool{d}d")
    return pool(
        x, Max(), _window(d, *window), dims=range(x.ndim - d, x.ndim), return_indices=return_indices
    )


def _avg_pool(
    d: int,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    include: bool,
    divisor: int | None,
) -> Tensor:
    window = (kernel, () if stride is None else stride, padding, ceil_mode, include)
    made = small.pooled(f"avg_pool{d}d", x, *window, *(() if d == 1 else (divisor,)))
    if made is not None:
        return made
    _check_rank(x, d, f"avg_pool{d}d")
    if x.dtype == torch.bool:
        raise TypeError(
            f"avg_pool{d}d: input has dtype torch.bool, which torch refuses; "
            f"pool(x, Mean(), ...) gives the share of True"
        )
    if divisor == 0:
        raise ValueError("divisor_override=0 must not be zero")
    reduction = Mean(count_include_pad=include, divisor=divisor)
    windows = _window(d, kernel, stride, padding, 1, ceil_mode)
    y: Tensor = pool(x, reduction, windows, dims=range(x.ndim - d, x.ndim))
    return y


def _adaptive(
    d: int, x: Tensor, reduction: Reduction, output_size: Any, return_indices: bool = False
) -> Any:
    if isinstance(reduction, Mean):
        y = small.pooled(f"adaptive_avg_pool{d}d", x, output_size)
        if y is not None:
            return y
    _check_rank(x, d, f"adaptive pooling over {d} axes")
    sizes = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * d
    if len(sizes) != d:
        raise ValueError(f"output_size={output_size!r} must be an int, None or {d} of them")
    plain = not torch.compiler.is_compiling() and all(
        type(size) in (int, type(None)) for size in sizes
    )
    windows = _known_adaptive(sizes) if plain else Adaptive(sizes)
    return pool(
        x, reduction, windows, dims=range(x.ndim - d, x.ndim), return_indices=return_indices
    )


@lru_cache(maxsize=1024)
def _known_adaptive(sizes: tuple[int | None, ...]) -> Adaptive:
    return Adaptive(sizes)


def _lp_pool(
    d: int, x: Tensor, norm_type: float, kernel: Any, stride: Any, ceil_mode: bool
) -> Tensor:
    _check_rank(x, d, f"lp_pool{d}d")
    window = _window(d, kernel, stride, 0, 1, ceil_mode)
    y: Tensor = pool(x, Lp(float(norm_type)), window, dims=range(x.ndim - d, x.ndim))
    if not ceil_mode:
        return y
    # Torch multiplies a mean by the whole kernel: a window that sticks out counts as if it went on
    # like that.
    scale = torch.ones((), dtype=layout.compute_dtype(y.dtype), device=y.device)
    for i, axis in enumerate(window.axes(x.shape[-d:])):
        outputs = torch.arange(axis.out_size, device=y.device)
        counts = (axis.in_size - outputs * axis.stride).clamp(max=axis.kernel)
        scale = scale * (axis.kernel / counts).pow(1 / norm_type).reshape(-1, *(1,) * (d - 1 - i))
    return (y * scale).to(y.dtype)


def _fractional(
    d: int,
    x: Tensor,
    kernel: Any,
    output_size: Any,
    output_ratio: Any,
    return_indices: bool,
    samples: Tensor | None,
) -> Any:
    _check_rank(x, d, f"fractional_max_pool{d}d")
    if output_size is None and output_ratio is None:
        raise ValueError(f"fractional_max_pool{d}d: give output_size or output_ratio")
    lead = (x.shape[0] if x.ndim == d + 2 else 1, x.shape[-d - 1])
    if samples is None:
        samples = torch.rand(*lead, d, dtype=x.dtype, device=x.device)
    if samples.shape != (*lead, d):
        raise ValueError(
            f"_random_samples of shape {tuple(samples.shape)} must "
            f"have the shape (N, C, {d}) = {(*lead, d)}"
        )
    if d == 2:  # torch's 2-D operator takes the sample of the width first
        samples = samples.flip(-1)
    windows = Fractional(
        kernel,
        None if output_size is None else _ints(output_size, d, "output_size"),
        output_ratio if output_size is None else None,
        samples,
    )
    return pool(x, Max(), windows, dims=range(x.ndim - d, x.ndim), return_indices=return_indices)


def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As `torch.nn.functional.max_pool1d`. Shape: (N, C, L) or (C, L)."""
    return _max_pool(1, input, (kernel_size, stride, padding, dilation, ceil_mode), return_indices)


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As `torch.nn.functional.max_pool2d`. Shape: (N, C, H, W) or (C, H, W)."""
    return _max_pool(2, input, (kernel_size, stride, padding, dilation, ceil_mode), return_indices)


def max_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """As `torch.nn.functional.max_pool3d`. Shape: (N, C, D, H, W) or (C, D, H, W)."""
    return _max_pool(3, input, (kernel_size, stride, padding, dilation, ceil_mode), return_indices)


def max_pool1d_with_indices(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `torch.nn.functional.max_pool1d_with_indices`: always the pair (values, indices)."""
    pair: tuple[Tensor, Tensor] = _max_pool(
        1, input, (kernel_size, stride, padding, dilation, ceil_mode), True
    )
    return pair


def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `torch.nn.functional.max_pool2d_with_indices`: always the pair (values, indices)."""
    pair: tuple[Tensor, Tensor] = _max_pool(
        2, input, (kernel_size, stride, padding, dilation, ceil_mode), True
    )
    return pair


def max_pool3d_with_indices(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `torch.nn.functional.max_pool3d_with_indices`: always the pair (values, indices)."""
    pair: tuple[Tensor, Tensor] = _max_pool(
        3, input, (kernel_size, stride, padding, dilation, ceil_mode), True
    )
    return pair


def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """As `torch.nn.functional.avg_pool1d`. Shape: (N, C, L) or (C, L)."""
    return _avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As `torch.nn.functional.avg_pool2d`. Shape: (N, C, H, W) or (C, H, W)."""
    return _avg_pool(
        2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def avg_pool3d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """As `torch.nn.functional.avg_pool3d`. Shape: (N, C, D, H, W) or (C, D, H, W)."""
    return _avg_pool(
        3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def lp_pool1d(
    input: Tensor,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """As `torch.nn.functional.lp_pool1d`, of |x|: torch sums x^p, which has no root where negative
    values prevail under an odd p."""
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """As `torch.nn.functional.lp_pool2d`, of |x| (see `lp_pool1d`)."""
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """As `torch.nn.functional.lp_pool3d`, of |x| (see `lp_pool1d`)."""
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As `torch.nn.functional.adaptive_max_pool1d`. Shape: (N, C, L) or (C, L)."""
    return _adaptive(1, input, Max(), output_size, return_indices)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As `torch.nn.functional.adaptive_max_pool2d`. Shape: (N, C, H, W) or (C, H, W)."""
    return _adaptive(2, input, Max(), output_size, return_indices)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """As `torch.nn.functional.adaptive_max_pool3d`. Shape: (N, C, D, H, W) or (C, D, H, W)."""
    return _adaptive(3, input, Max(), output_size, return_indices)


def adaptive_max_pool1d_with_indices(
    input: Tensor, output_size: Any, return_indices: bool = False
) -> Any:
    """As `torch.nn.functional.adaptive_max_pool1d_with_indices`: always the pair (values,
    indices)."""
    return _adaptive(1, input, Max(), output_size, True)


def adaptive_max_pool2d_with_indices(
    input: Tensor, output_size: Any, return_indices: bool = False
) -> Any:
    """As `torch.nn.functional.adaptive_max_pool2d_with_indices`: always the pair (values,
    indices)."""
    return _adaptive(2, input, Max(), output_size, True)


def adaptive_max_pool3d_with_indices(
    input: Tensor, output_size: Any, return_indices: bool = False
) -> Any:
    """As `torch.nn.functional.adaptive_max_pool3d_with_indices`: always the pair (values,
    indices)."""
    return _adaptive(3, input, Max(), output_size, True)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """As `torch.nn.functional.adaptive_avg_pool1d`. Shape: (N, C, L) or (C, L)."""
    y: Tensor = _adaptive(1, input, Mean(), output_size)
    return y


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """As `torch.nn.functional.adaptive_avg_pool2d`. Shape: (N, C, H, W) or (C, H, W)."""
    y: Tensor = _adaptive(2, input, Mean(), output_size)
    return y


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """As `torch.nn.functional.adaptive_avg_pool3d`. Shape: (N, C, D, H, W) or (C, D, H, W)."""
    y: Tensor = _adaptive(3, input, Mean(), output_size)
    return y


def fractional_max_pool2d(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """As `torch.nn.functional.fractional_max_pool2d`. Shape: (N, C, H, W) or (C, H, W)."""
    return _fractional(
        2, input, kernel_size, output_size, output_ratio, return_indices, _random_samples
    )


def fractional_max_pool3d(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """As `torch.nn.functional.fractional_max_pool3d`. Shape: (N, C, D, H, W) or (C, D, H, W)."""
    return _fractional(
        3, input, kernel_size, output_size, output_ratio, return_indices, _random_samples
    )


def fractional_max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """As `torch.nn.functional.fractional_max_pool2d_with_indices`: always the pair (values,
    indices)."""
    return _fractional(2, input, kernel_size, output_size, output_ratio, True, _random_samples)


def fractional_max_pool3d_with_indices(
    input: Tensor,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: Any = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """As `torch.nn.functional.fractional_max_pool3d_with_indices`: always the pair (values,
    indices)."""
    return _fractional(3, input, kernel_size, output_size, output_ratio, True, _random_samples)
