"""A validated call of `pool`, everything in canonical form, and how it runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchpool import ops, ragged
from torchpool.kernels import layout, lowering, reference
from torchpool.reductions import Accumulation, Mean, Reduction, Selection, Sum
from torchpool.windows import Adaptive, Axis, Fractional, Global, Windows


class View(NamedTuple):
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


class Case(NamedTuple):
    """A validated call: everything in canonical form."""

    x: Tensor
    mask: Tensor | None
    weights: Tensor | None
    params: Tensor | None
    starts: Tensor | None
    reduction: Any
    axes: tuple[Axis, ...]
    windows: Windows
    view: View
    is_packed: bool = False

    @property
    def is_exported_whole(self) -> bool:
        """Whether an exported graph holds one operator for it: written out, each window of packed
        samples would gather as many elements as the longest could have."""
        return self.is_packed and lowering.is_exporting()


def case_of(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    dims: Any,
    mask: Tensor | None,
    weights: Tensor | None,
    return_indices: bool,
) -> Case:
    """Validates what a user passes to `pool`; windows along whole axes of x."""
    check_types(x, reduction, windows)
    if return_indices and not isinstance(reduction, Selection):
        raise ValueError(
            f"return_indices=True needs a selection such as "
            f"Max() or Min(): {reduction} has no winner"
        )
    view = View(pooled_axes(x, windows, dims), x.shape)
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
    mask = None if mask is None else broadcast(mask, x, "mask")
    weights = None if weights is None else broadcast(weights, x, "weights")
    case = canonical_case(x, reduction, windows, view, axes, mask, weights)
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


def canonical_case(
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    view: View,
    axes: tuple[Axis, ...],
    mask: Tensor | None,
    weights: Tensor | None,
) -> Case:
    """The case of arguments that are validated; mask and weights have x's shape."""
    x = view.canonical(_promote(x, reduction))
    mask = None if mask is None else view.canonical(mask)
    weights = None if weights is None else view.canonical(weights)
    if weights is not None and isinstance(reduction, Selection):
        mask, weights = weights != 0 if mask is None else mask & (weights != 0), None
    params = _params(reduction, x)
    return Case(x, mask, weights, params, None, reduction, axes, windows, view)


def by_lengths(case: Case) -> Case:
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


def check_types(x: Any, reduction: Any, windows: Any) -> None:
    """Raises a TypeError where no call of `pool` takes such arguments."""
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


def is_fixed(reduction: Any) -> bool:
    """Whether a reduction is one of this library's, which numbers alone tell apart; a user's own
    may hold anything."""
    is_number = reduction.value is None or type(reduction.value) in (int, float)
    return is_number and type(reduction).__module__.startswith("torchpool.")


def pooled_axes(x: Tensor, windows: Windows, dims: Any) -> tuple[int, ...]:
    """The axes that `dims` names, or those after the batch and channels, as `windows` fit them."""
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


def broadcast(other: Any, x: Tensor, name: str) -> Tensor:
    """A mask or weights in the shape of x, as a view."""
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
    if value.numel() != 1 and value.numel() != x.shape[1]:  # in a tuple torch.compile finds no size
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


def run(case: Case, return_indices: bool) -> tuple[Tensor, Any]:
    """The pooled values, (N, C, *O), and the winners' indices where they are asked for."""
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


def _run_selection(case: Case, return_indices: bool) -> tuple[Tensor, Any]:
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


def filled(y: Tensor, case: Case, fill: float) -> Tensor:
    """Writes `fill` where a window holds too little: no element, or n <= least(p)."""
    _check_fill(fill, y.dtype)
    n = _contents(case)
    least: Any = 0.0
    if isinstance(case.reduction, Accumulation) and case.params is not None:
        kind: Any = type(case.reduction)
        p = case.params.detach().reshape(1, -1, *(1,) * len(case.axes))
        least = reference.formula(kind, "least")(p)
    return torch.where(n <= least, torch.tensor(fill, dtype=y.dtype, device=y.device), y)


def _contents(case: Case) -> Tensor:
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


def run_table(
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
    mask = None if mask is None else broadcast(mask, x, "mask")
    weights = None if weights is None else broadcast(weights, x, "weights")
    others = 1 if is_packed else 2  # axes that windows and parameters speak of, besides channels
    flat = x.ndim == others
    tensors = [t if t is None or not flat else t.unsqueeze(-1) for t in (x, mask, weights)]
    if table.axis.in_size == 0:  # no row at all: one that no window reads
        tensors = [None if t is None else _one_more(t, dim) for t in tensors]
        table = table._replace(axis=table.axis._replace(in_size=1, kernel=1))
    x, mask, weights = tensors  # type: ignore[assignment]
    view = View((dim,), x.shape)
    case = canonical_case(x, reduction, windows, view, (table.axis,), mask, weights)
    rows = table.rows
    if not is_packed and case.x.shape[0] != rows.shape[0]:
        rows = rows.repeat_interleave(case.x.shape[0] // rows.shape[0], 0)
    case = case._replace(starts=rows, is_packed=is_packed)
    y, indices = run(case, return_indices)
    if fill != 0:
        y = filled(y, case, fill)
    made = [view.restore(t) for t in ((y, indices) if return_indices else (y,))]
    made = [t.squeeze(-1) for t in made] if flat else made
    return tuple(made) if return_indices else made[0]


def _one_more(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = 1
    return torch.cat([x, x.new_zeros(shape)], dim)
