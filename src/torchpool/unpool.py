"""Max unpooling: values go back to where pooling found them, the rest is zero.

Where an index occurs more than once the last of its values, in row-major order of the pooled
tensor, wins; only the winner gets the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # no public name tells wrapped tensors

from torchpool.kernels import layout, lowering
from torchpool.windows import Size

__all__ = ["max_unpool1d", "max_unpool2d", "max_unpool3d"]


def max_unpool1d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """As `torch.nn.functional.max_unpool1d`; see `max_unpool2d`.

    Shape:
        (N, C, O) -> (N, C, L) or (C, O) -> (C, L)
    """
    return _max_unpool(1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Puts pooled values back where `max_pool2d` found them; the rest is zero.

    As `torch.nn.functional.max_unpool2d`, but where an index occurs more than once (windows
    overlap), the last of its values wins and only that one gets the gradient.

    Args:
        input: pooled values, any dtype.
        indices: their flat positions in the output's plane, int64, as `return_indices=True` gives.
        kernel_size: of the pooling, as are stride (by default the kernel) and padding; they give
            the size of the output.
        output_size: the size that was pooled, where several give the same pooled size: (H, W) or
            (N, C, H, W).
    Shape:
        (N, C, OH, OW) -> (N, C, H, W) or (C, OH, OW) -> (C, H, W) with H = (OH - 1) stride - 2
        padding + kernel_size, or output_size
    Raises:
        TypeError, ValueError: shapes differ, indices are not int64 or lie outside the output,
        output_size does not fit.

    >>> x = torch.tensor([[[[5.0, 7.0]]]])
    >>> max_unpool2d(x, torch.tensor([[[[3, 0]]]]), kernel_size=(2, 1))
    tensor([[[[7., 0.],
              [0., 5.]]]])
    """
    return _max_unpool(2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor,
    indices: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """As `torch.nn.functional.max_unpool3d`; see `max_unpool2d`.

    Shape:
        (N, C, OD, OH, OW) -> (N, C, D, H, W) or (C, OD, OH, OW) -> (C, D, H, W)
    """
    return _max_unpool(3, input, indices, kernel_size, stride, padding, output_size)


def _max_unpool(
    d: int,
    x: Tensor,
    indices: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    output_size: Sequence[int] | None,
) -> Tensor:
    _check_pair(x, indices, d)
    kernel, padding = _ints(kernel, d, "kernel_size"), _ints(padding, d, "padding")
    stride = kernel if stride is None else _ints(stride, d, "stride")
    sizes = _out_sizes(x, kernel, stride, padding, output_size)
    channels_last = x.ndim == d + 2 and layout.is_channels_last(x)
    y = _scatter_last(x.flatten(-d), indices.flatten(-d), sizes)
    return layout.to_layout(y, True) if channels_last else y


def _scatter_last(x: Tensor, indices: Tensor, sizes: Sequence[int]) -> Tensor:
    """Writes x (..., P) to positions of zeros (..., *sizes); the last of equal positions wins."""
    lead, count = x.shape[:-1], x.shape[-1]
    space = math.prod(sizes)
    _check_range(indices, sizes, space)
    dtype = torch.int32 if count < 1 << 31 else torch.int64
    order = torch.arange(count, dtype=dtype, device=x.device).expand(x.shape)
    winner = indices.new_full((*lead, space), -1, dtype=dtype)
    winner.scatter_reduce_(-1, indices, order, "amax")
    # Losers are added as zeros: the same sum in any order, and no gradient to them.
    kept = torch.where(
        winner.gather(-1, indices) == order, x, torch.zeros((), dtype=x.dtype, device=x.device)
    )
    return x.new_zeros((*lead, space)).scatter_add(-1, indices, kept).view(*lead, *sizes)


def _check_pair(x: Any, indices: Any, d: int) -> None:
    for name, value in (("input", x), ("indices", indices)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"max_unpool{d}d: {name} must be a torch.Tensor, not {type(value).__name__}"
            )
    if x.ndim not in (d + 1, d + 2):
        raise ValueError(
            f"max_unpool{d}d: input of shape {tuple(x.shape)} must have {d + 1} or {d + 2} axes: "
            f"(C, *S) or (N, C, *S)"
        )
    if indices.dtype != torch.int64:
        raise TypeError(
            f"max_unpool{d}d: indices have dtype {indices.dtype}; they must be torch.int64 "
            f"(indices.long())"
        )
    if indices.shape != x.shape:
        raise ValueError(
            f"max_unpool{d}d: indices of shape {tuple(indices.shape)} must have the shape of the "
            f"input, {tuple(x.shape)}"
        )
    if indices.device != x.device:
        raise ValueError(
            f"max_unpool{d}d: indices lie on {indices.device}, input on {x.device}; move them "
            f"with indices.to({str(x.device)!r})"
        )


def _ints(value: Any, d: int, name: str) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, d):
        raise ValueError(f"{name}={value!r} must be an int or {d} ints")
    return values * d if len(values) == 1 else values


def _out_sizes(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_size: Sequence[int] | None,
) -> tuple[int, ...]:
    d = len(kernel)
    default = tuple((x.shape[i - d] - 1) * stride[i] + kernel[i] - 2 * padding[i] for i in range(d))
    if output_size is None:
        if any(size < 0 for size in default):
            raise ValueError(
                f"input of shape {tuple(x.shape)} with kernel_size={kernel}, stride={stride}, "
                f"padding={padding} gives sizes {default} < 0"
            )
        return default
    sizes = tuple(output_size)[2:] if len(output_size) == d + 2 else tuple(output_size)
    if len(sizes) != d:
        raise ValueError(
            f"output_size={output_size!r} must have {d} or {d + 2} entries, not {len(output_size)}"
        )
    for i, (size, usual) in enumerate(zip(sizes, default, strict=True)):
        if not max(-1, usual - stride[i]) < size < usual + stride[i]:
            raise ValueError(
                f"output_size={output_size!r}: the size {size} of axis {i} must be greater than "
                f"{usual - stride[i]} and less than {usual + stride[i]}, "
                f"which is what kernel_size={kernel}, stride={stride}, padding={padding} can "
                f"have pooled to {tuple(x.shape[-d:])}"
            )
    return sizes


def _check_range(indices: Tensor, sizes: Sequence[int], space: int) -> None:
    if lowering.is_exporting():
        return
    if torch.compiler.is_compiling():
        inside = (indices >= 0) & (indices < space)
        torch._assert_async(
            inside.all(),
            "max_unpool: an index lies outside the output; pass the output_size that was pooled",
        )
        return
    # A batched tensor has no single truth value; what it wraps has.
    while _functorch.is_functorch_wrapped_tensor(indices):
        indices = _functorch.get_unwrapped(indices)
    if indices.is_meta or type(indices) is not Tensor or not indices.numel():
        return
    least, greatest = (int(bound) for bound in torch.stack(torch.aminmax(indices)).tolist())
    if least < 0 or greatest >= space:
        found = least if least < 0 else greatest
        raise ValueError(
            f"max_unpool: the index {found} lies outside the output of size {tuple(sizes)}; pass "
            f"the output_size that was pooled"
        )
