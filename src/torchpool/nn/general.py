"""Any reduction over any windows as a Module, and the two mixtures of maximum and mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchpool.functional import pool
from torchpool.functional.cases import View, broadcast, pooled_axes
from torchpool.nn.depthwise import depthwise
from torchpool.nn.describe import describe
from torchpool.reductions import Max, Mean, Reduction
from torchpool.windows import Window, Windows

__all__ = ["Gated", "Mixed", "Pool"]

Dims = Sequence[int] | int | None

_SHARPNESS = 10.0
"""Of the softplus that keeps parameters in their domain: 2 above the bound it is the identity."""


def _constrain(raw: Tensor, bound: float) -> Tensor:
    """A value greater than `bound` for any raw number; half types are widened first."""
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    return raw if bound == -math.inf else bound + F.softplus(raw, beta=_SHARPNESS)


def _unconstrain(value: Tensor, bound: float) -> Tensor:
    """The inverse of `_constrain`, in double precision."""
    if bound == -math.inf:
        return value
    gap = value.double() - bound
    return gap + torch.log(-torch.expm1(-_SHARPNESS * gap)) / _SHARPNESS


class Pool(nn.Module):
    """Any reduction over any windows, `torchpool.pool` as a Module.

    A reduction with `learnable=True` has its parameter trained: it starts at the given value and
    stays greater than the reduction's `domain` (by a softplus). A tensor as parameter becomes a
    buffer (a `torch.nn.Parameter` stays one) and moves with the Module.

    Args:
        reduction: what a window becomes, as `PowerMean(3.0, learnable=True)`.
        windows: where to look, as `Adaptive(1)`.
        channels: learn one parameter per channel, for this many channels; by default one for all.
        dims: the pooled axes; by default all after the first two.
        fill: value of a window that has no valid element.
    Shape:
        x (N, C, *S) -> (N, C, *O) with O = windows.out_size(S); with `dims` the pooled axes change
        size where they are
    Raises:
        ValueError: channels without a learnable reduction, or a start outside of its domain.

    >>> from torchpool import Adaptive, PowerMean
    >>> Pool(PowerMean(3.0, learnable=True), Adaptive(1))
    Pool(PowerMean(p=3.0, learnable=True), Adaptive(output_size=1))
    """

    def __init__(
        self,
        reduction: Reduction,
        windows: Windows,
        *,
        channels: int | None = None,
        dims: Dims = None,
        fill: float = 0,
    ) -> None:
        super().__init__()
        _check_windows(windows)
        if not isinstance(reduction, Reduction):
            raise TypeError(f"reduction={reduction!r} must be an instance such as torchpool.Max()")
        self.reduction: Any = reduction
        self.windows = windows
        self.channels = channels
        self.dims = dims
        self.fill = fill
        self.learnable = bool(getattr(reduction, "learnable", False))
        if channels is not None and not self.learnable:
            raise ValueError(
                f"channels={channels} needs a reduction with learnable=True, not {reduction}"
            )
        self._tensor_name: str | None = None
        if self.learnable:
            self._learn(_start(reduction, channels))
        elif isinstance(reduction.value, Tensor):
            self._keep(reduction.value)

    def _learn(self, start: Tensor) -> None:
        bound = self.reduction.domain
        if not bool((start > bound).all()):
            raise ValueError(
                f"{self.reduction}: {self.reduction.parameter} must start greater than {bound} "
                f"to be learned"
            )
        self._tensor_name = f"raw_{self.reduction.parameter}"
        raw = _unconstrain(start, bound).to(start.dtype)
        self.register_parameter(self._tensor_name, nn.Parameter(raw))

    def _keep(self, value: Tensor) -> None:
        self._tensor_name = str(self.reduction.parameter)
        if isinstance(value, nn.Parameter):
            self.register_parameter(self._tensor_name, value)
        else:
            self.register_buffer(self._tensor_name, value)

    @property
    def value(self) -> Any:
        """The reduction's parameter as it is now.

        A tensor where it is learned or was given as one, else a float or None.
        """
        if self._tensor_name is None:
            return self.reduction.value
        held: Tensor = getattr(self, self._tensor_name)
        return _constrain(held, self.reduction.domain) if self.learnable else held

    def forward(
        self,
        x: Any,
        mask: Any = None,
        weights: Any = None,
        *,
        lengths: Tensor | None = None,
        padding_side: str = "right",
        offsets: Tensor | None = None,
    ) -> Any:
        """Pools x; the arguments and the result are those of `torchpool.pool`."""
        reduction = (
            self.reduction if self._tensor_name is None else self.reduction.replace(self.value)
        )
        return pool(
            x,
            reduction,
            self.windows,
            dims=self.dims,
            mask=mask,
            weights=weights,
            lengths=lengths,
            padding_side=padding_side,
            offsets=offsets,
            fill=self.fill,
        )

    def extra_repr(self) -> str:
        return describe(
            self.reduction,
            self.windows,
            channels=self.channels,
            dims=self.dims,
            fill=self.fill or None,
        )


def _start(reduction: Any, channels: int | None) -> Tensor:
    """The first value of a learnable parameter: a scalar, or one per channel."""
    value = reduction.value
    start = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
    if channels is None:
        return start
    if start.numel() not in (1, channels):
        raise ValueError(
            f"channels={channels} does not fit {reduction.parameter} of shape "
            f"{tuple(start.shape)}; give one value, or one per channel"
        )
    return start.reshape(-1).expand(channels).clone()


def _check_windows(windows: Any) -> None:
    if not isinstance(windows, Windows):
        raise TypeError(
            f"windows={windows!r} must be windows such as torchpool.Window(3, stride=2)"
        )


class _MaxMean(nn.Module):
    """share * max + (1 - share) * mean. A subclass says what the share is."""

    def __init__(self, windows: Windows, dims: Dims) -> None:
        super().__init__()
        _check_windows(windows)
        self.windows = windows
        self.dims = dims

    def _share(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The share of the maximum, broadcastable to the output, for x (N, C, *S)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        view = View(pooled_axes(x, self.windows, self.dims), x.shape)
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        mask = None if mask is None else view.canonical(broadcast(mask, x, "mask"))
        weights = None if weights is None else view.canonical(broadcast(weights, x, "weights"))
        x = view.canonical(x)
        dims = range(2, x.ndim)
        largest = pool(x, Max(), self.windows, dims=dims, mask=mask, weights=weights)
        mean = pool(x, Mean(), self.windows, dims=dims, mask=mask, weights=weights)
        share = self._share(x, mask)
        return view.restore((share * largest + (1 - share) * mean).to(x.dtype))


class Mixed(_MaxMean):
    """A mixture of maximum and mean: a * max + (1 - a) * mean.

    Args:
        windows: where to look.
        mix: a, the share of the maximum; learned through a sigmoid from this start.
        learnable: train a; otherwise it stays as given.
        channels: one a per channel, for this many channels; by default one for all.
        dims: the pooled axes; by default all after the first two.
    Shape:
        x (N, C, *S) -> (N, C, *O) with O = windows.out_size(S); mask and weights as in
        `torchpool.pool`
    Raises:
        ValueError: mix outside of [0, 1], or of (0, 1) where it is learned.
    Source:
        Lee, Gallagher and Tu, Generalizing pooling functions, 1509.08985 ("mixed" max-average
        pooling).
    """

    def __init__(
        self,
        windows: Windows,
        mix: float = 0.5,
        *,
        learnable: bool = True,
        channels: int | None = None,
        dims: Dims = None,
    ) -> None:
        super().__init__(windows, dims)
        if not 0 <= mix <= 1 or (learnable and mix in (0, 1)):
            raise ValueError(f"mix={mix!r} must lie in [0, 1], and in (0, 1) with learnable=True")
        self.start = mix
        self.learnable = learnable
        self.channels = channels
        if learnable:
            logit = math.log(mix) - math.log1p(-mix)
            self.raw_mix = nn.Parameter(torch.full((channels or 1,), logit))
        elif channels is not None:
            raise ValueError(f"channels={channels} needs learnable=True: a fixed mix is one number")

    @property
    def mix(self) -> Any:
        """The share of the maximum as it is now: a tensor where it is learned, else a float."""
        return torch.sigmoid(self.raw_mix) if self.learnable else self.start

    def _share(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mix = self.mix
        if not isinstance(mix, Tensor):
            return torch.full((), mix, dtype=x.dtype, device=x.device)
        if mix.numel() != 1 and mix.numel() != x.shape[1]:
            raise ValueError(
                f"Mixed was built for channels={self.channels}, but x has {x.shape[1]} channels"
            )
        return mix.view(-1, *(1,) * (x.ndim - 2))

    def extra_repr(self) -> str:
        return describe(
            self.windows,
            mix=self.start,
            learnable=self.learnable,
            channels=self.channels,
            dims=self.dims,
        )


class Gated(_MaxMean):
    """A mixture of maximum and mean in which each window chooses its share.

    g * max + (1 - g) * mean with g = sigmoid(w . window). The gating mask w is learned and starts
    at 0, where every share is one half. Padding and masked elements count as zeros in w . window.

    Args:
        windows: a `Window`; w has its kernel's shape.
        channels: one w per channel, for this many channels; by default one for the layer.
        num_axes: number of pooled axes, 1 to 3; by default what windows or dims tell, else 2.
        dims: the pooled axes; by default all after the first two.
    Shape:
        x (N, C, *S) -> (N, C, *O) with O = windows.out_size(S); mask and weights as in
        `torchpool.pool`
    Raises:
        TypeError: windows without one fixed kernel (`Adaptive`, `Global`, `Fractional`).
        ValueError: num_axes contradicts the windows or dims, or is not 1, 2 or 3.
    Source:
        Lee, Gallagher and Tu, Generalizing pooling functions, 1509.08985 ("gated" max-average
        pooling).
    """

    windows: Window

    def __init__(
        self,
        windows: Window,
        *,
        channels: int | None = None,
        num_axes: int | None = None,
        dims: Dims = None,
    ) -> None:
        super().__init__(windows, dims)
        if not isinstance(windows, Window):
            raise TypeError(
                f"windows={windows!r} must be a Window: Gated learns a mask of its kernel's shape"
            )
        self.channels = channels
        self.num_axes = _count_axes(windows, num_axes, dims)
        kernel = (windows.kernel,) if isinstance(windows.kernel, int) else tuple(windows.kernel)
        kernel = kernel * self.num_axes if len(kernel) == 1 else kernel
        self.weight = nn.Parameter(torch.zeros(channels or 1, *kernel))

    def _share(self, x: Tensor, mask: Tensor | None) -> Tensor:
        sizes = x.shape[2:]
        if len(sizes) != self.num_axes:
            raise ValueError(
                f"Gated was built for {self.num_axes} pooled axes, but x has {len(sizes)}: build "
                f"it with num_axes={len(sizes)}"
            )
        if self.channels is not None and self.channels != x.shape[1]:
            raise ValueError(
                f"Gated was built for channels={self.channels}, but x has {x.shape[1]} channels"
            )
        seen = x if mask is None else x.masked_fill(~mask, 0)
        return torch.sigmoid(
            depthwise(seen, self.weight, self.windows.axes(sizes), self.windows.ceil_mode)
        )

    def extra_repr(self) -> str:
        return describe(
            self.windows, channels=self.channels, num_axes=self.num_axes, dims=self.dims
        )


def _count_axes(windows: Window, num_axes: int | None, dims: Dims) -> int:
    told = {
        "windows": windows.num_axes,
        "num_axes": num_axes,
        "dims": None if dims is None else 1 if isinstance(dims, int) else len(dims),
    }
    counts = {count for count in told.values() if count is not None}
    if len(counts) > 1:
        raise ValueError(
            f"windows={windows!r}, num_axes={num_axes!r} and dims={dims!r} speak of different "
            f"numbers of axes"
        )
    count = counts.pop() if counts else 2
    if not 1 <= count <= 3:
        raise ValueError(f"Gated pools 1, 2 or 3 axes, not {count}")
    return count
