"""`pool`, any reduction over any windows, and `explain`, how a call of it would run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchpool import forced, ops, ragged
from torchpool.functional.cases import Case, by_lengths, case_of, filled, is_fixed, run
from torchpool.functional.samples import pool_ragged
from torchpool.kernels import layout, reference
from torchpool.reductions import Max, Mean, Min, Reduction, Selection, Sum
from torchpool.windows import Adaptive, Axis, Global, Window, Windows


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
    fill: float = 0,
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
        return pool_ragged(x, reduction, windows, lengths, padding_side, offsets, options)
    if mask is None and weights is None and fill == 0 and not return_indices:
        call = _ready(x, reduction, windows, dims)
        if call is not None:
            return call(x)
    case = by_lengths(case_of(x, reduction, windows, dims, mask, weights, return_indices))
    y, indices = run(case, return_indices)
    if fill != 0:
        y = filled(y, case, fill)
    y = case.view.restore(y)
    return (y, case.view.restore(indices)) if return_indices else y


_REPEATED: tuple[Any, ...] = (Max, Min, Sum, Mean, Window, Adaptive, Global)
"""Windows, and reductions, whose calls are prepared on every device."""


def _ready(x: Any, reduction: Any, windows: Any, dims: Any) -> Any:
    """A call of `pool` for a plain tensor, as a function of x; None where more is asked of it."""
    if (
        type(windows) not in _REPEATED
        or (dims is not None and type(dims) is not range)
        or not isinstance(x, Tensor)
        or not (x.is_cpu or x.is_cuda)
        or not isinstance(reduction, Reduction)
        or not (type(reduction) in _REPEATED or (x.is_cpu and is_fixed(reduction)))
        or not ops.is_plain(x)
        or forced.backend()
    ):
        return None
    shape, stride, watched = x.shape, x.stride(), ops.is_watched(x)
    return _ready_call(reduction, windows, dims, shape, stride, x.dtype, x.is_cpu, watched)


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
    case = case_of(like, reduction, windows, dims, None, None, False)
    if case.x.dtype != dtype or case.starts is not None:
        return None
    call = ops.ready(case.x, reduction, case.axes, on_cpu, watched)
    view = case.view
    if call is None or view.is_canonical:
        return call
    return lambda x: view.restore(call(view.canonical(x)))


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
    case = case_of(x, reduction, windows, dims, mask, weights, False)
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


def _saved_bytes(case: Case, outputs: int) -> int:
    if isinstance(case.reduction, Selection):
        return outputs * layout.state_dtype(case.axes).itemsize
    kept = case.x.numel() * case.x.element_size()
    if case.reduction.linear:
        return kept if case.weights is not None else 0
    return int(
        kept + outputs * (case.reduction.num_sums + 2) * layout.compute_dtype(case.x.dtype).itemsize
    )
