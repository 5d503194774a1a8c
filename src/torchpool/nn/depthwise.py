"""One linear filter per channel over the windows of an `Axis`: what gates and blurs are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from torchpool.windows import Axis

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def depthwise(x: Tensor, weight: Tensor, axes: Sequence[Axis], ceil_mode: bool = False) -> Tensor:
    """The inner product of each window, with padding as zeros, and a filter.

    Args:
        x: floating tensor with 1 to 3 pooled axes.
        weight: the filters, one for all channels or one per channel.
        axes: regular windows.
        ceil_mode: whether windows may end beyond the padding.
    Shape:
        x (N, C, *S), weight (1, *K) or (C, *K) -> (N, C, *O)
    """
    channels = x.shape[1]
    padding = [axis.before for axis in axes]
    if ceil_mode or any(axis.before != axis.after for axis in axes):
        after = [_reach(axis) - axis.in_size if ceil_mode else axis.after for axis in axes]
        pairs = zip(reversed(padding), reversed(after), strict=True)
        x = F.pad(x, [size for pair in pairs for size in pair])
        padding = [0] * len(axes)
    filters = weight.to(x.dtype).unsqueeze(1).expand(channels, 1, *weight.shape[1:])
    y: Tensor = _CONVOLUTIONS[len(axes)](
        x,
        filters,
        stride=[axis.stride for axis in axes],
        padding=padding,
        dilation=[axis.dilation for axis in axes],
        groups=channels,
    )
    return y


def _reach(axis: Axis) -> int:
    """One more than the last position that a window reads."""
    last = (axis.out_size - 1) * axis.stride + (axis.kernel - 1) * axis.dilation
    return last + 1 - axis.before
