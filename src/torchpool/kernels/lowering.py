"""What an exported graph holds: torch's own pooling operator where it means the same everywhere,
else gathers and plain arithmetic.

Torch's operators are compact and known to every runtime, but exporters mistranslate some of their
options (divisors under ceil_mode,
divisor_override, adaptive sizes that do not divide). Those cases are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchpool.kernels import layout, reference
from torchpool.reductions import Accumulation, Max, Mean, Selection
from torchpool.windows import Axis

_MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def is_exporting() -> bool:
    """Whether a graph is traced to be exported. Not `torch.compiler.is_exporting()`: the compiler
    of torch 2.10 and 2.11 answers that with True for every graph that it traces."""
    return torch.compiler._is_exporting_flag


def _is_plain(axis: Axis) -> bool:
    """Whether torch's operators take the axis without ceil_mode: a regular window, symmetric
    padding of at most half of it."""
    if axis.is_adaptive or axis.before != axis.after:
        return False
    # Imported here, while exporting: it brings sympy along.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    reach = axis.dilation * (axis.kernel - 1) + 1
    floor = (axis.in_size + 2 * axis.before - reach) // axis.stride + 1
    return axis.before <= reach // 2 and statically_known_true(axis.out_size == floor)


def _arguments(axes: Sequence[Axis]) -> dict[str, list[int]]:
    columns = {"kernel_size": "kernel", "stride": "stride", "padding": "before"}
    return {name: [getattr(axis, field) for axis in axes] for name, field in columns.items()}


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: Sequence[Axis],
) -> Tensor:
    """The values of a selection."""
    plain = (
        mask is None
        and starts is None
        and len(axes) in _MAX
        and x.dtype.is_floating_point
        and all(map(_is_plain, axes))
    )
    if plain and type(reduction) is Max:
        y: Tensor = _MAX[len(axes)](
            x, **_arguments(axes), dilation=[axis.dilation for axis in axes]
        )
        return y
    if not x.dtype.is_floating_point or type(reduction) is not Max:
        return reference.composite_select(x, mask, starts, reduction, axes)[0]
    windows, valid = reference.windows(x, mask, starts, axes)
    best = torch.where(valid, windows, -torch.inf).amax(-1)
    return torch.where(valid.any(-1), best, 0)


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    starts: Tensor | None,
    reduction: Accumulation,
    axes: Sequence[Axis],
) -> Tensor:
    """The values of an accumulation."""
    bare = mask is None and weights is None and starts is None and x.dtype.is_floating_point
    if bare and isinstance(reduction, Mean) and reduction.divisor is None:
        if all(
            axis.out_size == 1 and axis.kernel == axis.in_size and axis.before == axis.after == 0
            for axis in axes
        ):
            dims = list(range(2, x.ndim))
            return x.to(layout.compute_dtype(x.dtype)).mean(dims, keepdim=True).to(x.dtype)
        padded = any(axis.before for axis in axes)
        if len(axes) in _MEAN and all(axis.dilation == 1 and _is_plain(axis) for axis in axes):
            y: Tensor = _MEAN[len(axes)](
                x, **_arguments(axes), count_include_pad=reduction.count_include_pad or not padded
            )
            return y
    return reference.composite_accumulate(x, mask, weights, params, reduction, axes, starts)
