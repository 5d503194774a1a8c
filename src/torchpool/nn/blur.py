"""Anti-aliased downsampling: a blur before every stride."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchpool.functional import pool
from torchpool.functional.cases import View, pooled_axes
from torchpool.nn.depthwise import depthwise
from torchpool.nn.describe import describe
from torchpool.reductions import Max
from torchpool.windows import Size, Window

__all__ = ["BlurPool", "MaxBlurPool"]

_PAD_MODES = {
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
    "zeros": "constant",
}


class BlurPool(nn.Module):
    """A binomial blur with a stride: downsampling that changes little when the input is shifted.

    The filter is a row of Pascal's triangle along each axis, over its sum: [1, 1] / 2,
    [1, 2, 1] / 4, [1, 3, 3, 1] / 8, ... It is fixed, so that the Module has neither parameters nor
    entries in the state_dict.

    Args:
        kernel: taps of the filter along each axis, 1 to 7; 1 only strides.
        stride: step between outputs.
        padding_mode: "reflect" (as the paper's reference), "replicate", "circular" or "zeros": what
            the (kernel - 1) // 2 elements before and the kernel // 2 after the input are.
        dims: the pooled axes, 1 to 3; by default all after the first two.
    Shape:
        x (N, C, *S) -> (N, C, *O) with O = ceil(S / stride)
    Raises:
        ValueError: another kernel, stride or padding_mode, or an input too small to be reflected.
    Source:
        Zhang, Making convolutional networks shift-invariant again, 1904.11486.

    >>> BlurPool(3)(torch.tensor([[[0.0, 0.0, 4.0, 0.0, 0.0]]]))
    tensor([[[0., 2., 0.]]])
    """

    taps: Tensor

    def __init__(
        self,
        kernel: int = 3,
        stride: Size = 2,
        *,
        padding_mode: str = "reflect",
        dims: Sequence[int] | int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(kernel, bool) or not isinstance(kernel, int) or not 1 <= kernel <= 7:
            raise ValueError(f"kernel={kernel!r} must be an int from 1 to 7")
        if padding_mode not in _PAD_MODES:
            raise ValueError(
                f"padding_mode={padding_mode!r} must be one of {', '.join(_PAD_MODES)}"
            )
        self.kernel = kernel
        self.windows = Window(kernel, stride)
        self.padding_mode = padding_mode
        self.dims = dims
        row = [math.comb(kernel - 1, i) / 2 ** (kernel - 1) for i in range(kernel)]
        self.register_buffer("taps", torch.tensor(row), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"x has dtype {x.dtype}, which cannot be blurred; convert it with x.float()"
            )
        view = View(pooled_axes(x, self.windows, self.dims), x.shape)
        x = view.canonical(x)
        d = x.ndim - 2
        if d > 3:
            raise ValueError(
                f"x of shape {tuple(view.shape)} has {d} pooled axes; 1 to 3 can be blurred: "
                f"name them with dims="
            )
        before, after = (self.kernel - 1) // 2, self.kernel // 2
        if self.kernel > 1:
            self._check_room(x, after)
            x = F.pad(x, (before, after) * d, _PAD_MODES[self.padding_mode])
        taps = torch.ones(1, dtype=self.taps.dtype, device=x.device)
        for _ in range(d):
            taps = taps.unsqueeze(-1) * self.taps
        return view.restore(depthwise(x, taps, self.windows.axes(x.shape[2:])))

    def _check_room(self, x: Tensor, after: int) -> None:
        """Torch's own message about padding does not say what to do."""
        least = {"reflect": after + 1, "circular": after}.get(self.padding_mode, 1)
        if any(size < least for size in x.shape[2:]):
            raise ValueError(
                f"padding_mode={self.padding_mode!r} with kernel={self.kernel} needs at least "
                f"{least} elements along each pooled axis, "
                f"but they have the sizes {tuple(x.shape[2:])}; use padding_mode='replicate' or "
                f"a smaller kernel"
            )

    def extra_repr(self) -> str:
        named = {
            "stride": self.windows.stride,
            "padding_mode": self.padding_mode,
            "dims": self.dims,
        }
        return describe(kernel=self.kernel, **named)


class MaxBlurPool(nn.Module):
    """Anti-aliased max pooling: the maximum at every position, then a blur that takes the stride.

    It stands in for `MaxPool(kernel, stride, padding)`; its outputs usually have the same size.

    Args:
        kernel: of the maximum.
        stride: of the whole; by default the kernel.
        blur: taps of the binomial filter, 1 to 7.
        padding, dilation: of the maximum, as in `Window`.
        padding_mode: of the blur, as in `BlurPool`.
        dims: the pooled axes, 1 to 3; by default all after the first two.
    Shape:
        x (N, C, *S) -> (N, C, *O) with O = ceil(Window(kernel, 1, padding, dilation).out_size(S) /
        stride)
    Source:
        Zhang, Making convolutional networks shift-invariant again, 1904.11486.
    """

    def __init__(
        self,
        kernel: Size = 2,
        stride: Size | None = None,
        blur: int = 3,
        *,
        padding: Size = 0,
        dilation: Size = 1,
        padding_mode: str = "reflect",
        dims: Sequence[int] | int | None = None,
    ) -> None:
        super().__init__()
        self.stride = kernel if stride is None else stride
        self.windows = Window(kernel, 1, padding, dilation)
        self.dims = dims
        self.blur = BlurPool(blur, self.stride, padding_mode=padding_mode, dims=dims)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        largest: Tensor = pool(x, Max(), self.windows, dims=self.dims, mask=mask)
        blurred: Tensor = self.blur(largest)
        return blurred

    def extra_repr(self) -> str:
        window = self.windows
        named = {"stride": self.stride, "padding": window.padding, "dilation": window.dilation}
        return describe(kernel=window.kernel, **named)
