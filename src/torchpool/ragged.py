"""Samples of different lengths in one tensor: padded with lengths, packed with offsets, jagged
nested tensors, packed sequences.

Nothing here loops over samples or waits for a device. Values are checked where reading them costs
nothing, on plain CPU tensors; anywhere else (another device, a traced graph, under `torch.func`)
they are clamped into their range instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PADDING_SIDES = ("right", "left")


def is_readable(t: Tensor) -> bool:
    """Whether looking at values is free: a plain tensor on the CPU that nobody traces."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(t, FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def check_lengths(lengths: Any, size: int, device: torch.device, *, count: int | None) -> Tensor:
    """Lengths as int64, each within [0, size].

    Args:
        lengths: integer tensor (N,).
        size: elements of the axis that they speak of.
        device: where the values lie.
        count: how many there must be; None for any number.
    Raises:
        TypeError: not an integer tensor.
        ValueError: another shape or device, or (on the CPU) a length outside of [0, size].
    """
    lengths = _integers(lengths, "lengths", device)
    if lengths.ndim != 1 or (count is not None and lengths.shape[0] != count):
        wanted = "(N,)" if count is None else f"({count},), one length per sample"
        raise ValueError(f"lengths of shape {tuple(lengths.shape)} must have the shape {wanted}")
    if not is_readable(lengths):
        return lengths.clamp(0, size)
    wrong = (lengths < 0) | (lengths > size)
    if bool(wrong.any()):
        sample = int(wrong.nonzero()[0])
        raise ValueError(
            f"lengths[{sample}]={int(lengths[sample])} must lie in [0, {size}], "
            f"the elements along the axis"
        )
    return lengths


def check_offsets(offsets: Any, size: int, device: torch.device) -> Tensor:
    """Offsets as int64: segment i is the rows `offsets[i] .. offsets[i + 1] - 1`.

    Args:
        offsets: integer tensor (M + 1,), not decreasing, from 0 to `size`.
        size: rows of the packed values.
        device: where the values lie.
    Raises:
        TypeError: not an integer tensor.
        ValueError: another shape or device, or (on the CPU) values that are not sorted or do not
            run from 0 to `size`.
    """
    offsets = _integers(offsets, "offsets", device)
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(
            f"offsets of shape {tuple(offsets.shape)} must have the shape (segments + 1,)"
        )
    if not is_readable(offsets):
        return offsets.clamp(0, size)
    if int(offsets[0]) != 0 or int(offsets[-1]) != size:
        raise ValueError(
            f"offsets run from {int(offsets[0])} to {int(offsets[-1])}; they must run from 0 to "
            f"{size}, the number of packed rows"
        )
    falls = offsets[1:] < offsets[:-1]
    if bool(falls.any()):
        i = int(falls.nonzero()[0])
        raise ValueError(
            f"offsets must not decrease, but offsets[{i}]={int(offsets[i])} > "
            f"offsets[{i + 1}]={int(offsets[i + 1])}"
        )
    return offsets


def _integers(t: Any, name: str, device: torch.device) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be an integer torch.Tensor, not {type(t).__name__}")
    if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {t.dtype}; it must be an integer type ({name}.long())")
    if t.device != device:
        raise ValueError(
            f"{name} lies on {t.device}, the values on {device}; "
            f"move it with {name}.to({str(device)!r})"
        )
    return t.long()


def check_side(padding_side: Any) -> None:
    """Raises unless padding_side is "right" or "left"."""
    if padding_side not in PADDING_SIDES:
        raise ValueError(f"padding_side={padding_side!r} must be 'right' or 'left'")


def length_mask(lengths: Tensor, size: int, *, padding_side: str = "right") -> Tensor:
    """Which elements of a padded batch belong to a sample.

    Args:
        lengths: integer tensor, elements of each sample.
        size: elements along the padded axis.
        padding_side: "right" where samples begin at 0, "left" where they end at `size`.
    Shape:
        lengths (N,) -> bool (N, size)
    Raises:
        TypeError: lengths is not an integer tensor.
        ValueError: lengths has another shape, or holds a value outside of [0, size] (checked on the
            CPU; elsewhere values are clamped, so that nothing waits for the device).

    >>> length_mask(torch.tensor([2, 0, 3]), 3)
    tensor([[ True,  True, False],
            [False, False, False],
            [ True,  True,  True]])
    """
    check_side(padding_side)
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be an integer torch.Tensor, not {type(lengths).__name__}")
    lengths = check_lengths(lengths, size, lengths.device, count=None)
    places = torch.arange(size, device=lengths.device)
    if padding_side == "left":
        return places >= size - lengths.unsqueeze(-1)
    return places < lengths.unsqueeze(-1)
