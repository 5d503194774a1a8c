"""`pool()` and torch's pooling functions: the one place that validates what a user passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchpool import ops
from torchpool.kernels import layout, lowering, reference
from torchpool.reductions import Accumulation, Lp, Max, Mean, Reduction, Selection, Sum
from torchpool.unpool import max_unpool1d, max_unpool2d, max_unpool3d
from torchpool.windows import Adaptive, Axis, Fractional, Size, Window, Windows

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
    x: Tensor,
    reduction: Reduction,
    windows: Windows,
    *,
    dims: Sequence[int] | int | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    return_indices: bool = False,
    fill: float = 0.0,
) -> Any:
    """Slides windows over x and turns each into one value.

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
        return_indices: also return the flat positions of the winners over the pooled axes (int64);
            -1 for an empty window.
        fill: value of a window that has no valid element; one that the result's dtype can hold.
    Shape:
        x (N, C, *S) -> (N, C, *O) with O = windows.out_size(S); with `dims` the pooled axes change
        size where they are
    Returns:
        The pooled tensor in the memory layout of x; with return_indices the pair (values, indices).
    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    >>> x = torch.arange(6.0).reshape(1, 1, 6)
    >>> pool(x, Mean(), Window(2))
    tensor([[[0.5000, 2.5000, 4.5000]]])
    """
    case = _case(x, reduction, windows, dims, mask, weights, return_indices)
    y, indices = _run(case, return_indices)
    if fill != 0:
        y = _fill(y, case, fill)
    y = case.view.restore(y)
    return (y, case.view.restore(indices)) if return_indices else y


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
        symbolic = torch.compiler.is_exporting() and isinstance(windows, Adaptive)
        axes = windows.axes(sizes, symbolic=True) if symbolic else windows.axes(sizes)  # type: ignore[call-arg]
    except ValueError as error:
        raise ValueError(
            f"{error} (x has shape {tuple(x.shape)}, pooled axes {view.pooled})"
        ) from None
    if any(axis.out_size == 0 for axis in axes):
        raise ValueError(
            f"{windows} gives an empty output for x of shape "
            f"{tuple(x.shape)}; output sizes must be at least 1"
        )
    canonical = view.canonical(_promote(x, reduction))
    mask = None if mask is None else view.canonical(_broadcast(mask, x, "mask"))
    weights = None if weights is None else view.canonical(_broadcast(weights, x, "weights"))
    if weights is not None and isinstance(reduction, Selection):
        mask, weights = weights != 0 if mask is None else mask & (weights != 0), None
    starts = (
        _fractional_starts(windows, canonical, axes) if isinstance(windows, Fractional) else None
    )
    return _Case(
        canonical,
        mask,
        weights,
        _params(reduction, canonical),
        starts,
        reduction,
        axes,
        windows,
        view,
    )


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
        return torch.compiler.is_exporting()
    if forward_ad._current_level >= 0:
        return True
    transforms = torch._C._functorch.get_interpreter_stack()
    return transforms is not None and any(
        t.key() != torch._C._functorch.TransformType.Vmap for t in transforms
    )


def _run(case: _Case, return_indices: bool) -> tuple[Tensor, Any]:
    if isinstance(case.reduction, Selection):
        return _run_selection(case, return_indices)
    if torch.compiler.is_exporting():
        return lowering.accumulate(
            case.x, case.mask, case.weights, case.params, case.starts, case.reduction, case.axes
        ), None
    if _needs_composite():
        return reference.composite_accumulate(
            case.x, case.mask, case.weights, case.params, case.reduction, case.axes, case.starts
        ), None
    tensors = (case.x, case.weights, case.params)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _ = torch.ops.torchpool.accumulate(
        case.x,
        case.mask,
        case.weights,
        case.params,
        case.starts,
        case.reduction.spec,
        ops.pack(case.axes),
        save,
    )
    return y, None


def _run_selection(case: _Case, return_indices: bool) -> tuple[Tensor, Any]:
    if torch.compiler.is_exporting() and not return_indices:
        return lowering.select(case.x, case.mask, case.starts, case.reduction, case.axes), None
    if _needs_composite():
        return reference.composite_select(case.x, case.mask, case.starts, case.reduction, case.axes)
    save = return_indices or (torch.is_grad_enabled() and case.x.requires_grad)
    y, state = torch.ops.torchpool.select(
        case.x, case.mask, case.starts, case.reduction.spec, ops.pack(case.axes), save
    )
    if not return_indices:
        return y, None
    flat, inside = reference.winners(state, case.starts, case.axes)
    if case.mask is not None:
        inside = inside & case.mask.flatten(2).gather(2, flat.flatten(2)).reshape(flat.shape)
    return y, torch.where(inside, flat, -1)


def _fill(y: Tensor, case: _Case, fill: float) -> Tensor:
    """Writes `fill` where a window holds too little: no element, or n <= least(p)."""
    _check_fill(fill, y.dtype)
    ones = torch.ones((), device=y.device).expand(case.x.shape)
    if case.mask is not None:
        ones = ones * case.mask
    if case.weights is not None:
        ones = ones * case.weights.detach()
    n = reference.accumulate(ones, None, None, None, Sum(), case.axes, False, case.starts)[0]
    least: Any = 0.0
    if isinstance(case.reduction, Accumulation) and case.params is not None:
        kind: Any = type(case.reduction)
        p = case.params.detach().reshape(1, -1, *(1,) * len(case.axes))
        least = reference.formula(kind, "least")(p)
    return torch.where(n > least, y, torch.tensor(fill, dtype=y.dtype, device=y.device))


def _check_fill(fill: float, dtype: torch.dtype) -> None:
    if dtype.is_floating_point:
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not low <= fill <= high or fill != int(fill):
        raise ValueError(
            f"fill={fill!r} is not a value of {dtype}, the dtype of the result; give a whole number "
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
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, d):
        raise ValueError(f"{name}={value!r} must be an int or {d} ints")
    return values * d if len(values) == 1 else values


def _window(
    d: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Window:
    """A window with torch's limits: symmetric padding, at most half the (dilated) kernel."""
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
    _check_rank(x, d, f"avg_pool{d}d")
    if x.dtype == torch.bool:
        raise TypeError(
            f"avg_pool{d}d: input has dtype torch.bool, which torch refuses; "
            f"pool(x, Mean(), ...) gives the share of True"
        )
    if divisor == 0:
        raise ValueError("divisor_override=0 must not be zero")
    window = _window(d, kernel, stride, padding, 1, ceil_mode)
    y: Tensor = pool(
        x, Mean(count_include_pad=include, divisor=divisor), window, dims=range(x.ndim - d, x.ndim)
    )
    return y


def _adaptive(
    d: int, x: Tensor, reduction: Reduction, output_size: Any, return_indices: bool = False
) -> Any:
    _check_rank(x, d, f"adaptive pooling over {d} axes")
    sizes = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * d
    if len(sizes) != d:
        raise ValueError(f"output_size={output_size!r} must be an int, None or {d} of them")
    return pool(
        x, reduction, Adaptive(sizes), dims=range(x.ndim - d, x.ndim), return_indices=return_indices
    )


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
        counts = torch.tensor(axis.counts(), dtype=scale.dtype, device=y.device)
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
