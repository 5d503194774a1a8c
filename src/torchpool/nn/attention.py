"""Layers over time in which a small network says how much each element counts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchpool.nn.over_time import (
    OverTime,
    Valid,
    check_channels,
    check_count,
    cleaned,
    harmless,
    over_time,
    product_over_time,
    softmax_over_time,
)
from torchpool.reductions import Mean, Std

__all__ = [
    "AttentionPool",
    "AttentiveStatisticsPool",
    "GatedAttentionPool",
    "SelfAttentivePool",
]


class _Scored(OverTime):
    """The means over time, weighted by softmax over the scores of H heads."""

    def __init__(self, channels: int, attention_channels: int, **options: Any) -> None:
        super().__init__(**options)
        check_count("channels", channels)
        check_count("attention_channels", attention_channels)
        self.channels = channels
        self.attention_channels = attention_channels

    def _scores(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, H)."""
        raise NotImplementedError

    def attention(
        self, x: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """The weight of each element, (N, H, T): 0 where it is not valid; they sum to 1."""
        x, valid = self._arrange(x, mask, lengths)
        return self._weights(harmless(x, valid), valid)

    def _weights(self, x: Tensor, valid: Valid | None) -> Tensor:
        check_channels(self, self.channels, x)
        return softmax_over_time(self._scores(x.mT).mT, valid)

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        x = harmless(x, valid)
        y = product_over_time(x, self._weights(x, valid).to(x.dtype))
        return y.to(x.dtype)  # autocast multiplies in its own type


class GatedAttentionPool(_Scored):
    """The mean over time weighted by attention, for bags of instances: softmax over
    w . (tanh(V x) * sigmoid(U x)).

    Args:
        channels: of x.
        attention_channels: rows of V and U.
        gated: False leaves the sigmoid out, the paper's first form.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C)
    Raises:
        ValueError: x has another number of channels.
    Source:
        Ilse, Tomczak and Welling, Attention-based deep multiple instance learning, 1802.04712.
    """

    def __init__(
        self, channels: int, attention_channels: int = 128, *, gated: bool = True, **options: Any
    ) -> None:
        super().__init__(channels, attention_channels, **options)
        self.gated = gated
        self.value = nn.Linear(channels, attention_channels)
        self.gate = nn.Linear(channels, attention_channels) if gated else None
        self.score = nn.Linear(attention_channels, 1)

    def _scores(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.value(x))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(x))
        scores: Tensor = self.score(hidden)
        return scores

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        return super()._pool(x, valid).squeeze(-1)

    def extra_repr(self) -> str:
        return self._described(self.channels, self.attention_channels, gated=self.gated)


class SelfAttentivePool(_Scored):
    """Several means over time, each with attention of its own: A = softmax(W2 tanh(W1 x)), then
    A x.

    Args:
        channels: of x.
        attention_channels: rows of W1.
        num_heads: rows of W2, one mean each.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C, num_heads); `.flatten(1)` makes a vector of it
    Raises:
        ValueError: x has another number of channels.
    Source:
        Lin et al., A structured self-attentive sentence embedding, 1703.03130.
    """

    def __init__(
        self, channels: int, attention_channels: int = 128, num_heads: int = 1, **options: Any
    ) -> None:
        super().__init__(channels, attention_channels, **options)
        check_count("num_heads", num_heads)
        self.num_heads = num_heads
        self.hidden = nn.Linear(channels, attention_channels, bias=False)
        self.score = nn.Linear(attention_channels, num_heads, bias=False)

    def _scores(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(torch.tanh(self.hidden(x)))
        return scores

    @staticmethod
    def redundancy(weights: Tensor) -> Tensor:
        """The paper's penalty |A A^T - I|^2 of each sample, for what `attention` returns: how much
        the heads look at the same elements.

        Shape:
            (N, num_heads, T) -> (N,)
        """
        eye = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
        return (weights @ weights.mT - eye).square().sum((-2, -1))

    def extra_repr(self) -> str:
        return self._described(self.channels, self.attention_channels, self.num_heads)


class AttentionPool(OverTime):
    """Multi-head attention of learned queries to the elements: pooling of sets (PMA).

    Args:
        channels: of x, a multiple of num_heads.
        num_queries: learned queries; by default one, whose axis is dropped.
        num_heads: parts of the channels that attend on their own.
        block: also the residual connection, layer norms and row-wise feed-forward of the paper's
            attention block; without, the bare attention.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, C); with num_queries (N, C, num_queries)
    Raises:
        ValueError: channels is no multiple of num_heads, or x has another number of channels.
    Source:
        Lee et al., Set transformer, 1810.00825.
    """

    def __init__(
        self,
        channels: int,
        num_queries: int | None = None,
        num_heads: int = 1,
        *,
        block: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_count("channels", channels)
        check_count("num_heads", num_heads)
        if num_queries is not None:
            check_count("num_queries", num_queries)
        if channels % num_heads:
            raise ValueError(f"channels={channels} must be a multiple of num_heads={num_heads}")
        self.channels = channels
        self.num_queries = num_queries
        self.num_heads = num_heads
        self.block = block
        self.queries = nn.Parameter(torch.empty(num_queries or 1, channels))
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        if block:
            self.norm1 = nn.LayerNorm(channels)
            self.feed_forward = nn.Sequential(nn.Linear(channels, channels), nn.ReLU())
            self.norm2 = nn.LayerNorm(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the queries anew."""
        nn.init.xavier_uniform_(self.queries)

    def _heads(self, t: Tensor) -> Tensor:
        """(N, L, C) -> (N, num_heads, L, C / num_heads)."""
        parts: Tensor = t.unflatten(-1, (self.num_heads, -1))
        return parts.transpose(1, 2)

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        check_channels(self, self.channels, x)
        tokens = harmless(x, valid).mT
        queries = self.queries.expand(x.shape[0], -1, -1)
        q, k, v = self.query(queries), self.key(tokens), self.value(tokens)
        attended = None
        if valid is not None:  # a sample without any element attends to all, and is filled later
            attended = (valid.mask | ~valid.mask.any(-1, keepdim=True))[:, None, None]
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attended)
        y = self.out(y.transpose(1, 2).flatten(2))
        if self.block:
            y = self.norm1(queries + y)
            y = self.norm2(y + self.feed_forward(y))
        y = y.mT
        made: Tensor = y.squeeze(-1) if self.num_queries is None else y
        return made

    def extra_repr(self) -> str:
        return self._described(
            self.channels, self.num_queries, self.num_heads, block=self.block or None
        )


class AttentiveStatisticsPool(OverTime):
    """The mean and the standard deviation over time, both weighted by attention, with weights per
    channel: softmax over conv(tanh(norm(relu(tdnn x)))).

    With global_context the attention also sees the mean and the deviation of the whole sample, as
    in ECAPA-TDNN. Parameters have the names and shapes of SpeechBrain's
    `AttentiveStatisticsPooling`, so that its weights load. Where SpeechBrain raises a deviation of
    less than 1e-6 to 1e-6, this one is 0. In training, the batch norm looks at valid elements only.

    Args:
        channels: of x.
        attention_channels: of the hidden layer.
        global_context: ECAPA's context; False is the paper's first form.
        layout, padding_side, fill: as in `OverTime`.
    Shape:
        x (N, C, T) -> (N, 2 C): the means, then the deviations
    Raises:
        ValueError: x has another number of channels.
    Source:
        Okabe, Koshinaka and Shinoda, Attentive statistics pooling for deep speaker embedding,
        1803.10963; context: Desplanques, Thienpondt and Demuynck, ECAPA-TDNN, 2005.07143.
    """

    def __init__(
        self,
        channels: int,
        attention_channels: int = 128,
        global_context: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_count("channels", channels)
        check_count("attention_channels", attention_channels)
        self.channels = channels
        self.attention_channels = attention_channels
        self.global_context = global_context
        seen = channels * 3 if global_context else channels
        first, norm = nn.Conv1d(seen, attention_channels, 1), _MaskedBatchNorm(attention_channels)
        self.tdnn = nn.ModuleDict(
            {"conv": nn.ModuleDict({"conv": first}), "norm": nn.ModuleDict({"norm": norm})}
        )
        self.conv = nn.ModuleDict({"conv": nn.Conv1d(attention_channels, channels, 1)})

    def _pool(self, x: Tensor, valid: Valid | None) -> Tensor:
        check_channels(self, self.channels, x)
        weights = softmax_over_time(self._scores(cleaned(x, valid), valid), valid)
        mean = over_time(x, Mean(), valid, weights)
        return torch.cat([mean, over_time(x, Std(), valid, weights)], 1)

    def _scores(self, x: Tensor, valid: Valid | None) -> Tensor:
        """What each element counts for each channel before the softmax, (N, C, T)."""
        first: Any = self.tdnn["conv"]["conv"]  # type: ignore[index]
        norm: Any = self.tdnn["norm"]["norm"]  # type: ignore[index]
        last = self.conv["conv"]
        mask = None if valid is None else valid.mask
        hidden = F.conv1d(x, first.weight[:, : self.channels], first.bias)
        if self.global_context:  # the same for all times, so it is multiplied once per sample
            statistics = [over_time(x, Mean(), valid), over_time(x, Std(), valid)]
            context = torch.cat(statistics, 1).unsqueeze(-1)
            hidden = hidden + F.conv1d(context, first.weight[:, self.channels :])
        scores: Tensor = last(torch.tanh(norm(F.relu(hidden), mask)))
        return scores

    def extra_repr(self) -> str:
        return self._described(
            self.channels, self.attention_channels, global_context=self.global_context
        )


class _MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm whose statistics, in training, are those of the valid elements."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.training:
            return super().forward(input)
        keep = mask[:, None].to(input.dtype)
        count = keep.sum().clamp(min=1)
        mean = (input * keep).sum((0, 2)) / count
        centred = (input - mean[:, None]) * keep
        variance = centred.square().sum((0, 2)) / count
        self._remember(mean.detach(), variance.detach(), count)
        scale = (self.weight * torch.rsqrt(variance + self.eps))[:, None]
        return centred * scale + self.bias[:, None]

    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Moves the running statistics, as batch norm does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        share = self.momentum or 0.0
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
