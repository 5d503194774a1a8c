"""Samples of different lengths in one padded batch."""

from __future__ import annotations

import torch
from torch import Tensor

_SIDES = ("right", "left")


def length_mask(lengths: Tensor, size: int, *, padding_side: str = "right") -> Tensor:
    """Which elements of a padded axis belong to the sample.

    Args:
        lengths: valid elements of each sample, integers from 0 to size.
        size: elements of the padded axis.
        padding_side: where the padding lies, "right" or "left".
    Shape:
        lengths (N,) -> bool (N, size)
    Raises:
        TypeError, ValueError: lengths are no vector of integers, or no such padding_side.

    >>> length_mask(torch.tensor([2, 0]), 3)
    tensor([[ True,  True, False],
            [False, False, False]])
    """
    if padding_side not in _SIDES:
        raise ValueError(f"padding_side={padding_side!r} must be one of {', '.join(_SIDES)}")
    if lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise TypeError(f"lengths have dtype {lengths.dtype}; they must be integers")
    if lengths.ndim != 1:
        raise ValueError(f"lengths of shape {tuple(lengths.shape)} must have the shape (N,)")
    positions = torch.arange(size, device=lengths.device)
    if padding_side == "left":
        positions = positions.flip(0)
    return positions < lengths[:, None]
