"""When torch's own operator is the fastest way to the same result: an input so small that starting
a kernel takes longer than running it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchpool.reductions import Max, Mean, Reduction
from torchpool.small import SMALL_BYTES
from torchpool.windows import Axis


def prefers_torch(x: Tensor, reduction: Reduction, axes: Sequence[Axis]) -> bool:
    """Whether torch's operator is meant for a small input and gives the same values: maxima and
    means of regular windows over two axes, without state."""
    if x.nbytes > SMALL_BYTES or len(axes) != 2 or not x.dtype.is_floating_point:
        return False
    if isinstance(reduction, Mean):
        padded = any(axis.before for axis in axes) and not reduction.count_include_pad
        plain = reduction.divisor is None and not padded
        if not plain or any(axis.dilation > 1 for axis in axes):
            return False
    elif type(reduction) is not Max:
        return False
    return all(map(_is_plain, axes))


def _is_plain(axis: Axis) -> bool:
    """Whether torch takes the axis: as many windows as fit, padding of at most half of one."""
    reach = axis.dilation * (axis.kernel - 1) + 1
    return (
        not axis.is_adaptive
        and axis.before == axis.after
        and axis.before <= axis.kernel // 2
        and axis.out_size == (axis.in_size + 2 * axis.before - reach) // axis.stride + 1
    )


def run(x: Tensor, reduction: Reduction, axes: Sequence[Axis], y: Tensor) -> None:
    """Torch's operator, into y."""
    kernel, stride, padding, dilation = (
        [getattr(axis, name) for axis in axes]
        for name in ("kernel", "stride", "before", "dilation")
    )
    if isinstance(reduction, Max):
        indices = torch.empty_like(y, dtype=torch.int64)
        torch.ops.aten.max_pool2d_with_indices.out(
            x, kernel, stride, padding, dilation, False, out=y, indices=indices
        )
    else:
        torch.ops.aten.avg_pool2d.out(x, kernel, stride, padding, False, True, None, out=y)
