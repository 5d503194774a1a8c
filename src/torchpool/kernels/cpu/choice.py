"""Which kernel does a piece of work, and with which arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchpool.kernels import layout
from torchpool.kernels.cpu import backward as gradients
from torchpool.kernels.cpu import (
    direct,
    formulas,
    leaf,
    planes,
    scatter,
    shared,
    sweep,
    tables,
    threads,
    visits,
)
from torchpool.kernels.cpu import plan as plans
from torchpool.kernels.cpu.arrays import flat, holds_integers, lanes_of, whole
from torchpool.kernels.cpu.jobs import Job
from torchpool.kernels.cpu.plan import PADDED, VALID, Plan
from torchpool.kernels.cpu.scalars import Largest, Smallest, Total
from torchpool.kernels.cpu.simd import BYTES
from torchpool.reductions import Accumulation, Mean, Selection
from torchpool.windows import Adaptive, Axis

LARGEST, SMALLEST, TOTAL = Largest(), Smallest(), Total()
_SMALL = 3
"""Windows of so many taps side by side are spread by rows of their own."""
_FEW = 4
"""Windows of so many elements are spread in less time than it takes to divide by their sizes."""
WORK = 4
"""What an element of an accumulation costs, as bytes of traffic, when threads are counted."""
_EFFORT = 4
"""What a byte costs where windows are large."""


def plan_of(x: Tensor, axes: Sequence[Axis], channels_last: bool, joins: bool = False) -> Plan:
    """How the windows of a dense x (N, C, ...) in that layout are visited."""
    n, c = x.shape[:2]
    return plans.plan(tuple(axes), n, c, channels_last, joins)


def way_of(plan: Plan, added: int = 0) -> Any:
    """What the lanes of vectors are, and how many of the elements of a window, of which so many are
    to be added, are added one after another."""
    chain = None if added <= visits.CHAIN else int(visits.chain.py_func(added))
    if plan.by_channel:
        return direct.ByChannel(chain)
    if plan.by_list:
        return direct.ByList()
    return direct.ByWindow(chain) if plan.by_window else direct.ByOutput(chain)


def divisor_of(reduction: Accumulation) -> tuple[int, float]:
    """The count table that a linear accumulation divides by (-1: none), and the number that it
    divides by instead (0.0: none)."""
    if not isinstance(reduction, Mean):
        return -1, 0.0
    column = PADDED if reduction.count_include_pad else VALID
    return column, 0.0 if reduction.divisor is None else float(reduction.divisor)


def arrays_of(x: Tensor, y: Tensor, selects: bool, plan: Plan) -> tuple[Any, Any] | None:
    """The input and the values of all windows as kernels take them; None where sums of integers
    might not be exact."""
    last = plan.channels_last
    if selects or x.dtype.is_floating_point:
        return flat(x, last), flat(y, last)
    numbers = whole(x, last, plan.taps)
    if numbers is None:
        return None
    return numbers, flat(y, last) if y.dtype != x.dtype else whole(y, last, plan.taps)


def job_of(reduction: Selection | Accumulation, x: Any, plan: Plan) -> Job:
    """Which kernel makes the values of all windows of an array."""
    if isinstance(reduction, Selection):
        tag: Any = LARGEST if reduction.largest else SMALLEST
        return values(tag, lanes_of(x.dtype), -1, 0.0, plan)
    column, divisor = divisor_of(reduction)
    if divisor and holds_integers(x.dtype):
        divisor = float(int(divisor) or 1)
    return values(TOTAL, lanes_of(x.dtype), column, divisor, plan)


def values(tag: Any, lanes: int, column: int, divisor: float, plan: Plan) -> Job:
    """Which kernel makes the values of all windows, for vectors of so many lanes; its arrays are x
    and y."""
    geometry, ends = (plan.geo, plan.tab), (column, divisor)
    if plan.is_small:
        units = plan.rows_out // int(plan.geo[2, plans.OUT])
        effort = _EFFORT if plan.taps > plans.LARGE else 1
        return Job(planes.planes, units, lambda x, y: (tag, x, y, *geometry, *ends), effort)
    if plan.is_leaf:
        arguments = lambda x, y: (tag, x, y, *geometry, *ends)  # noqa: E731
        return Job(leaf.leaf, plan.rows_out, arguments, plan.moved)
    if plan.inner >= lanes and (plan.taps <= plans.LARGE or plan.is_apart):
        return Job(
            leaf.channels,
            plan.rows_out,
            lambda x, y: (tag, x, y, *geometry, plan.inner, *ends),
            plan.moved,
        )
    if not (plan.is_large and plan.overlaps):
        adds = tag is TOTAL and not plan.by_window
        way = way_of(plan, int(plan.geo[3, plans.KERNEL]) if adds else 0)
        return Job(
            leaf.merged, plan.rows_out, lambda x, y: (way, tag, x, y, *geometry, plan.inner, *ends)
        )
    return _large(tag, column, divisor, plan)


def _large(tag: Any, column: int, divisor: float, plan: Plan) -> Job:
    """The kernel of large windows; its arrays are x, y, and the offsets of the winners if they are
    kept."""
    options = (plan.geo, plan.tab, plan.inner, plan.block, column, divisor)
    units = plan.outer * -(-int(plan.geo[2, plans.OUT]) // plan.block)
    arguments = lambda x, y, state=None: (tag, x, y, state, *options)  # noqa: E731
    return Job(sweep.sweep, units, arguments, _EFFORT)


def winners(tag: Any, channels: int, plan: Plan) -> Job:
    """The kernel of a selection that is to be differentiated; its arrays are x, y and the
    offsets."""
    if plan.is_large and plan.covers > 1:
        return _large(tag, -1, 0.0, plan)
    return directly(tag, channels, -1, 0.0, plan)


def directly(tag: Any, channels: int, column: int, divisor: float, plan: Plan) -> Job:
    """The kernel of any windows; its arrays are x, y, what is kept, weights and parameters."""
    way = way_of(plan, 0 if isinstance(tag, (Largest, Smallest)) else plan.taps)
    options = plan.geo, plan.tab, plan.inner, channels, plan.planes_each, column, divisor

    def arguments(
        x: Any, y: Any, state: Any, weights: Any = None, params: Any = None
    ) -> tuple[Any, ...]:
        return way, tag, x, weights, params, y, state, *options

    return Job(direct.direct, plan.rows_out, arguments)


def of_formula(
    reduction: Accumulation, numbers: Any, weighs: bool, channels: int, plan: Plan
) -> Job:
    """The kernel of a reduction's own formulas; its arrays are those of `directly`.

    Args:
        numbers: its parameters.
        weighs: whether there are weights or a mask.
    """
    kind: Any = type(reduction)
    tag = formulas.tag(kind, numbers)
    if weighs or not (kind.shares and plan.slots and _is_usual(kind, numbers)):
        return directly(tag, channels, *divisor_of(reduction), plan)
    way, options = way_of(plan, plan.taps), (plan.geo, plan.tab, plan.inner, plan.slots)
    return Job(
        shared.shared,
        plan.rows_out,
        lambda x, y, state, weights, params: (way, tag, x, params, y, state, *options),
    )


def _is_usual(kind: Any, numbers: Any) -> bool:
    """Whether there is no parameter, or one that is neither small, so that derivatives by it would
    lose precision without an anchor of their own, nor so large that elements of usual size are not
    usual."""
    if kind.parameter is None:
        return True
    return numbers.size == 1 and 0.5 <= abs(float(numbers[0])) <= 4


def to_winners(gx: Tensor, axes: Sequence[Axis], channels_last: bool) -> Job:
    """The kernel of the gradient of a selection; its arrays are those by the values, the offsets
    and those by x."""
    if all(plans.is_whole(axis) for axis in axes) and gx.dtype in (torch.float32, torch.float64):
        return _to_one_winner(gx, channels_last)
    channels, plan = gx.shape[1], plan_of(gx, axes, channels_last)
    if not plan.scatters:
        return gradient(LARGEST, channels, -1, 0.0, plan)
    workers = threads.count(2 * gx.nbytes)
    wanted = 4 * workers if workers > 1 else 1
    is_wide = gx.dtype == layout.compute_dtype(gx.dtype)
    band, most, units = scatter.pieces(plan, wanted, is_wide)
    options = plan.geo, plan.tab, plan.inner, band, most
    return Job(scatter.scatter, units, lambda grad, state, gx: (grad, state, gx, *options))


def _to_one_winner(gx: Tensor, channels_last: bool) -> Job:
    """The same where each plane is one window."""
    n, c = gx.shape[:2]
    size, planes, inner = gx[0, 0].numel(), *((n, c) if channels_last else (n * c, 1))
    options = np.array([[[0, size, 0]]]), size, inner, 1, 1, 1
    return Job(tables.scatter, planes, lambda grad, state, gx: (grad, state, gx, *options))


def gradient(tag: Any, channels: int, column: int, divisor: float, plan: Plan) -> Job:
    """The kernel of any gradient; its arrays are those by the values, what was kept, those by x,
    and the input, weights, parameters and gradients by the weights."""
    way, units = way_of(plan), plan.outer * plan.bands
    options = plan.geo, plan.tab, plan.inner, channels, plan.planes_each, plan.band, column, divisor

    def arguments(
        grad: Any, state: Any, gx: Any, x: Any = None, weights: Any = None, params: Any = None,
        gw: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        return way, tag, grad, x, weights, params, state, gx, gw, *options

    return Job(gradients.backward, units, arguments)


def spreading(
    gx: Tensor, reduction: Accumulation, axes: Sequence[Axis], channels_last: bool
) -> tuple[Job | None, bool]:
    """The kernel of the gradient of a sum or mean, whose arrays are those by the values and by x,
    and whether it divides by the windows' sizes itself. None where each plane is one window."""
    if all(plans.is_whole(axis) for axis in axes):
        return None, False
    n, c = gx.shape[:2]
    plan = plan_of(gx, axes, channels_last)
    mirrored = [turned for axis in axes if (turned := _mirrored(axis)) is not None]
    if len(mirrored) == len(axes) and not _repeats(plan):
        turned_plan = plans.plan(tuple(mirrored), n, c, channels_last, True)
        if _gathers(turned_plan, plan, any(axis.is_adaptive for axis in mirrored)):
            lanes = BYTES // layout.compute_dtype(gx.dtype).itemsize
            return values(TOTAL, lanes, -1, 0.0, turned_plan), False
    if _repeats(plan):
        plan = plan._replace(by_window=True)
    job = gradient(TOTAL, c, *divisor_of(reduction), plan)
    return job._replace(arguments=lambda grad, gx: job.arguments(grad, None, gx)), True


def _repeats(plan: Plan) -> bool:
    """Whether rows of a gradient are alike, as those of windows side by side that are no small
    ones."""
    rows, last = plan.geo[2, plans.KERNEL], plan.geo[3, plans.KERNEL]
    return plan.inner == plan.covers == 1 and rows > 1 and last > _SMALL


def _gathers(turned: Plan, plan: Plan, is_adaptive: bool) -> bool:
    """Whether it is quicker to gather the outputs that cover an element than to spread each: of
    windows at stride 1 that are large, or of some elements on contiguous rows; of others where the
    outputs can be listed, unless windows are small ones side by side."""
    if not is_adaptive:
        return plan.is_large or turned.is_small or (turned.is_leaf and plan.taps > _FEW)
    return turned.by_list and (plan.by_window or int(plan.geo[3, plans.KERNEL]) > _SMALL)


def _mirrored(axis: Axis) -> Axis | None:
    """The windows in which the outputs that cover an element lie, where those are regular: at
    stride 1, and of windows that follow the input's size or lie side by side."""
    if axis.is_adaptive or (_lies_side_by_side(axis) and axis.kernel > 1):
        (turned,) = Adaptive(axis.in_size).axes((axis.out_size,))
        return turned._replace(kernel=max(turned.lengths()))
    if axis.stride != 1 or axis.dilation != 1:
        return None
    before = axis.kernel - 1 - axis.before
    after = axis.in_size - 1 + axis.before - (axis.out_size - 1)
    if before < 0 or after < 0:
        return None
    return Axis(axis.out_size, axis.in_size, axis.kernel, 1, 1, before, after)


def _lies_side_by_side(axis: Axis) -> bool:
    tiles = axis.kernel == axis.stride and axis.dilation == 1 and not axis.before
    return tiles and axis.in_size == axis.kernel * axis.out_size


def clear_empty(y: Tensor, axes: Sequence[Axis]) -> None:
    """Zeros where a window lies in the padding alone."""
    for dim, axis in enumerate(axes, 2):
        empty = [o for o, (first, end) in enumerate(axis.taps()) if first >= end]
        for o in empty if y.numel() else []:
            y.select(dim, o).zero_()


def counts_of(reduction: Accumulation, axes: Sequence[Axis], dtype: torch.dtype) -> Tensor | None:
    """What a mean divides by, window by window; None of a sum."""
    column, divisor = divisor_of(reduction)
    if column < 0:
        return None
    counts = torch.tensor(divisor or 1.0, dtype=dtype)
    for axis in axes if not divisor else ():
        table = torch.tensor(axis.counts(column == PADDED), dtype=dtype).clamp(min=1)
        counts = counts[..., None] * table
    return counts


def over(grad: Tensor, counts: Tensor | None) -> Tensor:
    """A gradient over the sizes of the windows, in the format that is computed in."""
    return grad if counts is None else grad.to(counts.dtype) / counts
