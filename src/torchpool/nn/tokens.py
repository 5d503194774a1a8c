"""Sentence embeddings out of token embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchpool.nn.over_time import (
    OverTime,
    SequencePool,
    Valid,
    all_valid,
    check_choice,
    over_time,
    ranks,
    weighted_sum,
)
from torchpool.reductions import Max, Mean, Sum

__all__ = ["FirstToken", "LastToken", "SentencePool", "SqrtLenMean", "WeightedMeanTokens"]


class FirstToken(OverTime):
    """The first valid element: the class token of an encoder, on whichever side the padding lies.

    Args:
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C)
    Source:
        Devlin et al., BERT, 1810.04805.

    >>> x = torch.tensor([[[7.0, 8.0, 9.0]]])
    >>> FirstToken(padding_side="left")(x, lengths=torch.tensor([2]))
    tensor([[8.]])
    """

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        if valid is None:
            return x[:, :, 0]
        return _take(x, valid.ends()[0])


class LastToken(OverTime):
    """The last valid element: what a causal model, or a recurrent one, knows at the end.

    Args:
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C)
    Source:
        Muennighoff, SGPT: GPT sentence embeddings for semantic search, 2202.08904.

    >>> LastToken()(torch.tensor([[[7.0, 8.0, 9.0]]]), lengths=torch.tensor([2]))
    tensor([[8.]])
    """

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        if valid is None:
            return x[:, :, -1]
        return _take(x, valid.ends()[1])


def _take(x: Tensor, place: Tensor) -> Tensor:
    """x (N, C, T) at one place of each sample, (N,) -> (N, C)."""
    return x.gather(2, place.view(-1, 1, 1).expand(-1, x.shape[1], 1)).squeeze(2)


class WeightedMeanTokens(OverTime):
    """The mean weighted by position, sum of t x_t over sum of t: later tokens of a causal model
    have seen more.

    Args:
        positions: "valid" counts the valid elements from 1, so that a sample gives the same alone
            and in any batch; "absolute" counts the whole axis, padding included, as
            sentence-transformers does (the same for padding on the right).
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C)
    Raises:
        ValueError: other positions.
    Source:
        Muennighoff, SGPT: GPT sentence embeddings for semantic search, 2202.08904.

    >>> WeightedMeanTokens()(torch.tensor([[[1.0, 4.0]]]))
    tensor([[3.]])
    """

    def __init__(self, *, positions: str = "valid", **options: Any) -> None:
        super().__init__(**options)
        check_choice("positions", positions, ("valid", "absolute"))
        self.positions = positions

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        counted = all_valid(x) if valid is None or self.positions == "absolute" else valid
        weights = (ranks(counted) + 1).to(torch.promote_types(x.dtype, torch.float32))
        if counted.lengths is not None:
            n = counted.counts().to(weights.dtype)
            total = n * (n + 1) / 2
        else:
            total = (weights if valid is None else weights * valid.mask).sum(-1, keepdim=True)
        return weighted_sum(x, weights, valid) / total.clamp(min=1)

    def extra_repr(self) -> str:
        return self._described(positions=self.positions)


class SqrtLenMean(OverTime):
    """The sum of the elements over the square root of their number.

    Args:
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C)
    Source:
        Cer et al., Universal sentence encoder, 1803.11175.

    >>> SqrtLenMean()(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
    tensor([[5.]])
    """

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        counts = (all_valid(x) if valid is None else valid).counts()
        wide = torch.promote_types(x.dtype, torch.float32)
        total = over_time(x.to(wide), Sum(), valid)
        return total / counts.clamp(min=1).to(wide).sqrt()


class SentencePool(OverTime):
    """The pooling modes of sentence-transformers' `Pooling`: same names, same numbers.

    Several modes are put side by side in the order in which sentence-transformers puts them: cls,
    max, mean, mean_sqrt_len_tokens, weightedmean, lasttoken. The input is never written to, and
    padding may hold anything. Two results differ on purpose: "cls" takes the first valid token
    where the padding lies on the left, and a sample without any valid token gives `fill` (there
    "max" gives -1e9).

    Args:
        modes: one or several of the modes.
        layout: of x, by default (N, T, C), as transformers give it.
        padding_side, fill: as in `OverTime`.
    Shape:
        x (N, T, C), mask (N, T) bool or 0 and 1 -> (N, C * number of modes)
    Raises:
        ValueError: an unknown mode, or none.
    Source:
        Reimers and Gurevych, Sentence-BERT, 1908.10084; Muennighoff, SGPT, 2202.08904.

    >>> tokens, attention_mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)
    >>> SentencePool("mean")(tokens, attention_mask).shape
    torch.Size([2, 8])
    """

    MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

    def __init__(
        self, modes: str | Sequence[str] = "mean", *, layout: str = "NTC", **options: Any
    ) -> None:
        super().__init__(layout=layout, **options)
        asked = (modes,) if isinstance(modes, str) else tuple(modes)
        if not asked:
            raise ValueError(f"modes=() must name at least one of {', '.join(self.MODES)}")
        for mode in asked:
            check_choice("modes", mode, self.MODES)
        self.modes = tuple(mode for mode in self.MODES if mode in asked)
        self.layers: Any = nn.ModuleList([_by_mode(mode) for mode in self.modes])

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        return torch.cat([layer._pool(x, valid) for layer in self.layers], 1)

    def extra_repr(self) -> str:
        shown = self.modes[0] if len(self.modes) == 1 else self.modes
        return self._described(shown, layout=None if self.layout != "NCT" else "NCT")


def _by_mode(mode: str) -> OverTime:
    """The layer behind one of sentence-transformers' modes."""
    layers: dict[str, OverTime] = {
        "cls": FirstToken(),
        "max": SequencePool(Max()),
        "mean": SequencePool(Mean()),
        "mean_sqrt_len_tokens": SqrtLenMean(),
        "weightedmean": WeightedMeanTokens(positions="absolute"),
        "lasttoken": LastToken(),
    }
    return layers[mode]
