"""The functions of torch.nn.functional that pool: same names, arguments and results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchpool import small
from torchpool.functional.general import pool
from torchpool.kernels import layout
from torchpool.reductions import Lp, Max, Mean, Reduction
from torchpool.windows import Adaptive, Fractional, Size, Window


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
