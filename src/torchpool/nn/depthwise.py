"""One linear filter per channel over the windows of an `Axis`: what gates and blurs are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from torchpool.windows import Axis

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def depthwise(x: Tensor, weight: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The inner product of each window, with padding as zeros, and a filter.

    Args:
        x: floating tensor with 1 to 3 pooled axes.
        weight: the filters, one for all channels or one per channel.
        axes: regular windows.
    Shape:
        x (N, C, *S), weight (1, *K) or (C, *K) -> (N, C, *O)
    """
    channels = x.shape[1]
    padding = [axis.before for axis in axes]
    if any(_symmetric_count(axis) != axis.out_size for axis in axes):
        x = F.pad(
            x,
            [
                size
                for axis in reversed(axes)
                for size in (axis.before, _reach(axis) - axis.before - axis.in_size)
            ],
        )
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
    """Positions from the first that any window reads to the last, inclusive."""
    return (axis.out_size - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1


def _symmetric_count(axis: Axis) -> int:
    """Outputs of a convolution that pads `before` on both sides."""
    return (
        axis.in_size + 2 * axis.before - (axis.kernel - 1) * axis.dilation - 1
    ) // axis.stride + 1
