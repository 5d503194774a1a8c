"""`pool` of samples of different lengths: padded, packed one after another, or nested."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchpool import forced, ops, ragged
from torchpool.functional.cases import check_types, is_fixed, pooled_axes, run_table
from torchpool.reductions import Reduction
from torchpool.windows import Global, Windows


def pool_ragged(
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
    check_types(x, reduction, windows)
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
    y = over_runs(x, reduction, windows, dim, lengths, others, runs)
    if y is not None:
        return y
    table = ragged.padded_table(windows, lengths, size, outputs, padding_side)
    return run_table(x, reduction, windows, table, dim, mask, weights, return_indices, fill, False)


def over_runs(
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
        is_fixed(reduction)
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
        and not forced.backend()
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
    pooled = pooled_axes(x, windows, dims)
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
    check_types(x, reduction, windows)
    dim = _ragged_axis(x, windows, 0 if dims is None else dims)
    offsets = ragged.check_offsets(offsets, x.shape[dim], x.device)
    runs = partial(ragged.packed_runs, offsets)
    others = (mask, weights, return_indices, fill)
    y = over_runs(x, reduction, windows, dim, offsets, others, runs)
    if y is not None:
        return y, torch.arange(offsets.shape[0])
    table, made = ragged.packed_table(windows, offsets, x.shape[dim])
    pooled = run_table(x, reduction, windows, table, dim, mask, weights, return_indices, fill, True)
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
    check_types(packed.values, reduction, windows)
    mask, weights = (
        None if t is None else _same_samples(t, x, packed, name)
        for t, name in ((mask, "mask"), (weights, "weights"))
    )
    axis = packed.dim if isinstance(x, PackedSequence) else packed.dim + 1
    if dims is not None and dims not in (axis, (axis,), [axis]):
        raise ValueError(f"dims={dims!r}: the axis of different lengths is {axis}; pool that one")
    table, made = ragged.packed_table(windows, packed.offsets, packed.values.shape[packed.dim])
    table = table._replace(rows=table.rows.to(packed.values.device))
    pooled = run_table(
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
