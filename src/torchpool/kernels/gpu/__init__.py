"""The operations on NVIDIA GPUs, compiled by Triton: which kernels each call is turned into.

Both layouts are read as planes of five axes, the last contiguous: see `geometry`. Every element of
an output or a gradient is written once, by one program, without atomics: the same bits every time.
Nothing waits for the GPU and nothing is copied to it, so that calls can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.gpu import (
    accumulation,
    boxes,
    gathering,
    geometry,
    launching,
    passes,
    scatter,
    selection,
    small,
    spread,
)
from torchpool.reductions import Accumulation, Selection
from torchpool.windows import Axis


def why_not_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
) -> str | None:
    """Why these kernels do not serve a selection; None where they do."""
    if starts is not None:
        return "windows that differ from plane to plane are served by the reference"
    return launching.why_not(x) or geometry.why_not(axes)


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Winners of all windows; see `reference.select`."""
    if x.dtype == torch.bool:
        y, state = select(x.view(torch.uint8), mask, starts, reduction, axes, save)
        return y.view(torch.bool), state
    outs = [axis.out_size for axis in axes]
    seen = geometry.view(x, axes)
    plain = mask is None and type(reduction).key is Selection.key
    y = layout.empty_like(x, outs)
    dtype = layout.state_dtype(axes)
    state = layout.empty_like(x, outs, dtype) if save else x.new_empty(0, dtype=dtype)
    if y.numel() == 0:
        return y, state
    if x.is_cuda and not save and mask is None and small.prefers_torch(x, reduction, axes):
        small.run(x, reduction, axes, y)
    elif plain and boxes.serve(seen):
        boxes.select(seen, x, reduction, y, state)
    elif plain and passes.serve(x, axes):
        passes.select(x, reduction, axes, y, state)
    else:
        run = selection.few if seen.taps <= selection.FEW else selection.many
        run(seen, x, None if mask is None else mask.expand(x.shape), reduction, y, state)
    return y, state


def select_backward(
    grad: Tensor,
    state: Tensor,
    starts: Tensor | None,
    axes: Sequence[Axis],
    channels_last: bool,
) -> Tensor:
    """Sends the gradient of each window to its winner; see `reference.select_backward`."""
    gx = layout.empty(grad, [axis.in_size for axis in axes], channels_last)
    if gx.numel() == 0:
        return gx
    seen = geometry.view(gx, axes)
    if scatter.serve(seen):
        scatter.send_back(seen, grad, state, gx)
    elif seen.covers > geometry.UNROLLED and (len(axes) > 1 or passes.sends_runs(axes)):
        passes.send_back(grad, state, axes, gx)
    else:
        selection.send_back(seen, grad, state, gx)
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
    if not x.dtype.is_floating_point:
        return f"sums of {x.dtype} are served by the reference"
    return launching.why_not(x) or geometry.why_not(axes)


def _problem(
    like: Tensor,
    x: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
) -> accumulation.Problem:
    """The problem whose inputs lie as `like` does, (N, C, *S)."""
    return accumulation.Problem(
        geometry.view(like, axes),
        x,
        None if mask is None else mask.expand(like.shape),
        None if weights is None else weights.expand(like.shape),
        params,
        reduction,
        layout.compute_dtype(like.dtype),
    )


def _empty_saved(like: Tensor, reduction: Accumulation) -> Tensor:
    """Room for the anchor and the derivatives, in the memory order of the outputs."""
    shape = (reduction.num_sums + 2, *like.shape)
    return like.new_empty(shape, dtype=layout.compute_dtype(like.dtype))


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Values of all windows; see `reference.accumulate`. What is saved only this backend reads."""
    y = layout.empty_like(x, [axis.out_size for axis in axes])
    saved = _empty_saved(y, reduction) if save and not reduction.linear else None
    if y.numel():
        problem = _problem(x, x, mask, weights, params, reduction, axes)
        if x.is_cuda and problem.is_bare and small.prefers_torch(x, reduction, axes):
            small.run(x, reduction, axes, y)
        elif problem.has_closed_form and boxes.serve(problem.seen):
            boxes.accumulate(problem.seen, x, reduction, y)
        elif problem.has_closed_form and passes.serve(x, axes):
            passes.accumulate(x, reduction, axes, y)
        else:
            accumulation.forward(problem, y, saved)
    empty = x.new_empty(0, dtype=layout.compute_dtype(x.dtype))
    return y, empty if saved is None else saved


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weights and params; see `reference.accumulate_backward`."""
    empty = grad.new_empty(0)
    like = layout.empty(grad, [axis.in_size for axis in axes], channels_last)
    if not like.numel():
        zeros = torch.zeros_like(like, dtype=layout.compute_dtype(like.dtype))
        gp = empty if params is None else torch.zeros_like(params)
        return like, zeros if needs[1] else empty, gp
    problem = _problem(like, x if x.numel() else None, mask, weights, params, reduction, axes)
    gw = torch.empty_like(like, dtype=problem.compute) if needs[1] else None
    if needs[0] and problem.has_closed_form and spread.serve(problem.seen):
        spread.send_back(problem.seen, grad, reduction, like)
    elif needs[0] and problem.has_closed_form and passes.serve(like, axes):
        passes.accumulate_back(grad, reduction, axes, like)
    elif needs[0] or needs[1]:
        saved = stats if stats.numel() else _derivatives(problem, grad)
        gathering.backward(problem, grad, saved, like if needs[0] else None, gw)
    gp = accumulation.by_parameter(problem, grad) if needs[2] else empty
    return like if needs[0] else empty, empty if gw is None else gw, gp


def _derivatives(problem: accumulation.Problem, grad: Tensor) -> Tensor | None:
    """What a linear reduction did not save, where it is not known in closed form."""
    if problem.has_closed_form:
        return None
    saved = _empty_saved(grad, problem.reduction)
    accumulation.forward(problem, torch.empty_like(grad), saved)
    return saved
