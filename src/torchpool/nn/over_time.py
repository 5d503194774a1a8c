"""What every layer over time shares: layouts, masks, lengths, and samples without any element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchpool.functional import pool
from torchpool.nn.describe import describe
from torchpool.nn.general import Pool
from torchpool.ragged import check_lengths, is_readable, is_recorded, length_mask, lengths_of
from torchpool.reductions import Reduction, Sum
from torchpool.windows import Global

__all__ = ["OverTime", "SequencePool"]

LAYOUTS = ("NCT", "NTC")
SIDES = ("right", "left")


@dataclass(frozen=True)
class Valid:
    """Which elements of a padded batch take part: a mask, or lengths, which cost less."""

    size: int
    """T, the elements along the axis."""
    given: Tensor | None
    """bool (N, T); None where the lengths tell."""
    lengths: Tensor | None = None
    """int64 (N,), where each sample's valid elements are one run at an end of the axis."""
    padding_side: str = "right"

    @property
    def mask(self) -> Tensor:
        """bool (N, T)."""
        if self.given is not None:
            return self.given
        assert self.lengths is not None
        return length_mask(self.lengths, self.size, padding_side=self.padding_side)

    def counts(self) -> Tensor:
        """Valid elements of each sample, (N, 1)."""
        if self.lengths is not None:
            return self.lengths.unsqueeze(-1)
        return self.mask.sum(-1, keepdim=True)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Where each sample's first and last valid elements stand, (N,); anywhere if it has
        none."""
        if self.lengths is None:
            mask = self.mask.to(torch.uint8)
            return mask.argmax(-1), self.size - 1 - mask.flip(-1).argmax(-1)
        if self.padding_side == "right":
            return torch.zeros_like(self.lengths), (self.lengths - 1).clamp(min=0)
        first = (self.size - self.lengths).clamp(max=self.size - 1)
        return first, torch.full_like(self.lengths, self.size - 1)

    def some(self) -> Tensor:
        """Whether a sample has any valid element, (N,)."""
        return self.mask.any(-1) if self.lengths is None else self.lengths > 0

    def is_everywhere(self) -> bool:
        """Whether every sample is seen to have a valid element; False where looking costs."""
        lengths = self.lengths
        if lengths is None or not is_readable(lengths) or is_recorded():
            return False
        return bool(lengths.numpy().all())


class OverTime(nn.Module):
    """A layer that pools the time axis of a padded batch. A subclass says how, in `_pool`.

    An element that `mask` or `lengths` leave out takes no part, whatever it holds, NaN included,
    and gets no gradient: a sample gives the same result alone and in any batch.

    Args:
        layout: of x and of the result: "NCT" for (N, C, T), "NTC" for (N, T, C).
        padding_side: where `lengths` leave the padding, "right" or "left".
        fill: the result of a sample that has no valid element.
    Raises:
        ValueError: another layout or padding_side.
    """

    def __init__(
        self, *, layout: str = "NCT", padding_side: str = "right", fill: float = 0
    ) -> None:
        super().__init__()
        check_choice("layout", layout, LAYOUTS)
        check_choice("padding_side", padding_side, SIDES)
        self.layout = layout
        self.padding_side = padding_side
        self.fill = fill

    def forward(
        self, x: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Pools x.

        Args:
            x: (N, C, T), or (N, T, C) with layout="NTC".
            mask: (N, T), True (or 1) where an element is valid.
            lengths: (N,), valid elements of each sample. With both, an element must be in both.
        """
        x, valid = self._arrange(x, mask, lengths)
        y = self._pool(x, valid).to(x.dtype)
        if valid is not None and not valid.is_everywhere():
            y = torch.where(valid.some().view(-1, *(1,) * (y.ndim - 1)), y, self.fill)
        return y.transpose(1, 2) if y.ndim == 3 and self.layout == "NTC" else y

    def _arrange(
        self, x: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Valid | None]:
        """x as (N, C, T), and which of its elements are valid; None where all are."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, not {type(x).__name__}")
        if x.ndim != 3:
            axes = ", ".join(self.layout)
            raise ValueError(f"x of shape {tuple(x.shape)} must have three axes, ({axes})")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x has dtype {x.dtype}; convert it with x.float()")
        if self.layout == "NTC":
            x = x.transpose(1, 2)
        t = x.shape[2]
        if t == 0:
            raise ValueError(f"x of shape {tuple(x.shape)} (N, C, T) has no time; T must be >= 1")
        given = None if mask is None else _as_mask(mask, x)
        if lengths is None:
            return x, None if given is None else _of_mask(given)
        _check_lengths(lengths, x)
        known = check_lengths(lengths, t, x.device, count=None)
        valid = Valid(t, None, known, self.padding_side)
        return x, valid if given is None else _of_mask(given & valid.mask)

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        """(N, C, T) -> (N, D) or (N, D, K)."""
        raise NotImplementedError

    def _described(self, *positional: Any, **named: Any) -> str:
        """Arguments as in the constructor's call; those that have their usual value are left
        out."""
        usual = {"layout": "NCT", "padding_side": "right", "fill": 0.0}
        shared = {key: getattr(self, key) for key in usual if getattr(self, key) != usual[key]}
        return describe(*positional, **named, **shared)

    def extra_repr(self) -> str:
        return self._described()


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: Any) -> None:
    """Raises unless the value is a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1")


def check_channels(layer: nn.Module, channels: int, x: Tensor) -> None:
    """Raises unless x (N, C, T) has the channels that the layer was built for."""
    if x.shape[1] != channels:
        raise ValueError(
            f"{type(layer).__name__} was built for channels={channels}, but x has {x.shape[1]}: "
            f"build it with channels={x.shape[1]}, or give layout= the order of x's axes"
        )


def _as_mask(mask: Any, x: Tensor) -> Tensor:
    """A mask (N, T) as bool; whole numbers, as tokenizers give them, are valid where not 0."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, not {type(mask).__name__}")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask has dtype {mask.dtype}; it must be bool (mask > 0.5) or 0 and 1")
    if mask.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} must have the shape (N, T) = "
            f"{(x.shape[0], x.shape[2])}"
        )
    _check_device("mask", mask, x)
    return mask if mask.dtype == torch.bool else mask != 0


def _of_mask(mask: Tensor) -> Valid:
    """What a mask (N, T) tells, as lengths where it can be: nothing is read behind them."""
    found = lengths_of(mask)
    return Valid(mask.shape[1], mask) if found is None else Valid(mask.shape[1], mask, *found)


def _check_lengths(lengths: Any, x: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths must be a torch.Tensor, not {type(lengths).__name__}; "
            f"write torch.tensor(lengths)"
        )
    if lengths.shape != x.shape[:1]:
        raise ValueError(
            f"lengths of shape {tuple(lengths.shape)} must have the shape (N,) = ({x.shape[0]},)"
        )
    _check_device("lengths", lengths, x)


def _check_device(name: str, other: Tensor, x: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(
            f"{name} lies on {other.device}, x on {x.device}; "
            f"move it with {name}.to({str(x.device)!r})"
        )


def over_time(
    x: Tensor, reduction: Reduction, valid: Valid | None, weights: Tensor | None = None
) -> Tensor:
    """One value per channel: x (N, C, T), weights like x -> (N, C)."""
    y: Tensor = pool(x, reduction, Global(), weights=weights, **among(valid))
    return y.squeeze(-1)


def among(valid: Valid | None) -> dict[str, Any]:
    """Arguments of `pool` that keep it to the valid elements of (N, C, T). Lengths are the better
    ones: nothing is read behind them."""
    if valid is None:
        return {}
    if valid.lengths is None:
        return {"mask": valid.mask[:, None]}
    return {"lengths": valid.lengths, "padding_side": valid.padding_side}


def cleaned(x: Tensor, valid: Valid | None) -> Tensor:
    """x (N, C, T) with zeros for what is not valid, so that products do not meet a NaN there."""
    return x if valid is None else torch.where(valid.mask[:, None], x, 0.0)


def harmless(x: Tensor, valid: Valid | None) -> Tensor:
    """x (N, C, T) for products with weights that are 0 where an element is not valid: as it is
    where a look tells that they will be 0, else cleaned."""
    return x if valid is None or _is_moderate(x) else cleaned(x, valid)


def _is_moderate(x: Tensor) -> bool:
    """Whether all elements are so small that products of a few of them are finite. False where
    looking costs more than reading x once."""
    if not is_readable(x) or is_recorded() or not x.numel():
        return False
    low, high = x.detach().aminmax()
    limit: float = torch.finfo(x.dtype).max ** 0.25
    return float(low) >= -limit and float(high) <= limit


def weighted_sum(x: Tensor, weights: Tensor, valid: Valid | None) -> Tensor:
    """x (N, C, T) times weights (N or 1, T), at least float32, over the valid elements: (N, C)."""
    if weights.dtype != x.dtype or torch.is_autocast_enabled(x.device.type) or not _is_moderate(x):
        return over_time(x * weights[:, None], Sum(), valid)
    inside = weights if valid is None else weights * valid.mask
    return product_over_time(x, inside.expand(x.shape[0], -1).unsqueeze(1)).squeeze(2)


def product_over_time(x: Tensor, weights: Tensor) -> Tensor:
    """x (N, C, T) times weights (N, H, T): (N, C, H). Few rows on the left are multiplied
    faster on a CPU than few columns on the right."""
    return torch.bmm(weights, x.mT).mT


def softmax_over_time(scores: Tensor, valid: Valid | None) -> Tensor:
    """Weights over the valid elements, at least float32: (N, H, T) -> (N, H, T).

    They sum to 1; a sample without any valid element has zeros.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if valid is None:
        return scores.softmax(-1)
    outside = ~valid.mask[:, None]
    scores = scores.masked_fill(outside, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(outside, 0)


def ranks(valid: Valid) -> Tensor:
    """The position of each valid element among the valid ones, from 0: (N, T) int64, or (1, T)
    where it is the same in all samples. What is not valid has any."""
    if valid.lengths is None:
        return valid.mask.cumsum(-1) - 1
    places = torch.arange(valid.size, device=valid.lengths.device).unsqueeze(0)
    return places if valid.padding_side == "right" else places + valid.counts() - valid.size


def all_valid(x: Tensor) -> Valid:
    """Every element of an x (N, C, T) without padding."""
    return Valid(x.shape[2], x.new_ones((x.shape[0], x.shape[2]), dtype=torch.bool))


class SequencePool(OverTime):
    """Any reduction over the whole time axis of a padded batch.

    Args:
        reduction: what the valid elements become, as `Max()`, `Mean()` or
            `PowerMean(3.0, learnable=True)`.
        channels: learn one parameter per channel, for this many channels, as in `Pool`.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C)
    Raises:
        TypeError, ValueError: as in `Pool`.

    >>> from torchpool import Mean
    >>> x = torch.tensor([[[1.0, 3.0, float("nan")]]])
    >>> SequencePool(Mean())(x, lengths=torch.tensor([2]))
    tensor([[2.]])
    """

    def __init__(
        self, reduction: Reduction, *, channels: int | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.pool = Pool(reduction, Global(), channels=channels)

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        y: Tensor = self.pool(x, **among(valid))
        return y.squeeze(-1)

    def extra_repr(self) -> str:
        return self._described()
