"""The arms of a study of time series: temporal poolings by name, each with torchpool's layers and
as it is composed by hand, and the two encoders before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchpool as tp
from torchpool.study.series_data import Series
from torchpool.study.task import Arm, Examples, Inputs, Task, Words

WIDTH = 32
"""Channels that an encoder gives to the pooling."""
HIDDEN = 16
"""Channels of the networks inside attentive poolings."""
CUT = 0.1
"""Share of a series that may be cut off its ends to disturb it."""


class _Gru(nn.Module):
    """(N, C, T) -> (N, WIDTH, T). It runs forward in time, so padding on the right is seen by
    nothing that is valid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, WIDTH, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        states: Tensor = self.gru(x.mT)[0]
        return states.mT


class _Cnn(nn.Module):
    """Two convolutions, (N, C, T) -> (N, WIDTH, T). Padding is set back to zeros before each, so
    that it stays what lies beyond the ends of a series."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, WIDTH, 5, padding=2)
        self.second = nn.Conv1d(WIDTH, WIDTH, 5, padding=2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        outside = ~_valid(x, lengths)
        x = F.relu(self.first(x.masked_fill(outside, 0)))
        return F.relu(self.second(x.masked_fill(outside, 0)))


ENCODERS: dict[str, Callable[[int], nn.Module]] = {"gru": _Gru, "cnn": _Cnn}
"""Every encoder by the name that `--encoders` takes."""


# By hand


def _valid(x: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    return (x * valid).sum(-1) / valid.sum(-1)


def _max(x: Tensor, valid: Tensor) -> Tensor:
    return x.masked_fill(~valid, -torch.inf).amax(-1)


def _last(x: Tensor, valid: Tensor) -> Tensor:
    place = (valid.sum(-1) - 1).unsqueeze(-1).expand(-1, x.shape[1], 1)
    return x.gather(2, place).squeeze(2)


def _statistics(x: Tensor, valid: Tensor) -> Tensor:
    mean = _mean(x, valid)
    variance = ((x - mean[..., None]).square() * valid).sum(-1) / valid.sum(-1)
    return torch.cat([mean, variance.clamp(min=1e-12).sqrt()], 1)


def _softmax(scores: Tensor, valid: Tensor) -> Tensor:
    return scores.masked_fill(~valid, -torch.inf).softmax(-1)


def _power_mean(x: Tensor, valid: Tensor, p: Tensor) -> Tensor:
    return _mean(x.clamp(min=1e-6).pow(p), valid).pow(1 / p.squeeze(1))


def _log_mean_exp(x: Tensor, valid: Tensor, beta: Tensor) -> Tensor:
    largest = (beta * x).masked_fill(~valid, -torch.inf).amax(-1, keepdim=True).detach()
    mean = _mean(torch.exp(beta * x - largest), valid)
    return (mean.log() + largest.squeeze(-1)) / beta.squeeze(1)


def _auto(x: Tensor, valid: Tensor, alpha: Tensor) -> Tensor:
    return (x * _softmax(x * alpha, valid)).sum(-1)


def _k_max(x: Tensor, valid: Tensor) -> Tensor:
    x, valid = (F.pad(t, (0, max(0, 3 - x.shape[2]))) for t in (x, valid))
    top = x.masked_fill(~valid, -torch.inf).topk(3).indices.sort(-1).values
    return x.gather(-1, top) * (top < valid.sum(-1, keepdim=True))


def _pyramid(x: Tensor, valid: Tensor) -> Tensor:
    samples = zip(x, valid.sum((1, 2)).tolist(), strict=True)
    levels = [[F.adaptive_max_pool1d(s[:, :n], k) for k in (1, 2, 4)] for s, n in samples]
    return torch.stack([torch.cat(level, -1) for level in levels])


class _ByHand(nn.Module):
    """A composition of torch's own operators over (x, valid)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        return self.function(x, _valid(x, lengths))


class _LearnedByHand(nn.Module):
    """A composition over (x, valid, one learned parameter per channel)."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], start: float) -> None:
        super().__init__()
        self.function = function
        self.start = start
        self.parameter = nn.Parameter(torch.full((WIDTH, 1), start))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.parameter, self.start)

    def forward(self, x: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        return self.function(x, _valid(x, lengths), self.parameter)


class _AttentionByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.score = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        tokens = x.mT
        scores = self.score(torch.tanh(self.value(tokens)) * torch.sigmoid(self.gate(tokens)))
        return (x * _softmax(scores.mT, _valid(x, lengths))).sum(-1)


class _AttentiveByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3 * WIDTH, HIDDEN, 1), nn.BatchNorm1d(HIDDEN)
        self.last = nn.Conv1d(HIDDEN, WIDTH, 1)

    def forward(self, x: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        valid = _valid(x, lengths)
        context = _statistics(x, valid)[..., None].expand(-1, -1, x.shape[2])
        hidden = torch.tanh(self.norm(F.relu(self.first(torch.cat([x, context], 1)))))
        weights = _softmax(self.last(hidden), valid)
        mean = (weights * x).sum(-1)
        variance = (weights * (x - mean[..., None]).square()).sum(-1)
        return torch.cat([mean, variance.clamp(min=1e-12).sqrt()], 1)


ARMS: dict[str, Arm] = {
    "mean": Arm("mean", lambda: tp.nn.SequencePool(tp.Mean()), lambda: _ByHand(_mean)),
    "max": Arm("max", lambda: tp.nn.SequencePool(tp.Max()), lambda: _ByHand(_max)),
    "last": Arm("last element", tp.nn.LastToken, lambda: _ByHand(_last)),
    "statistics": Arm("mean and deviation", tp.nn.StatisticsPool, lambda: _ByHand(_statistics)),
    "powermean": Arm(
        "PowerMean, learned p (GeM)",
        lambda: tp.nn.SequencePool(tp.PowerMean(3.0, learnable=True), channels=WIDTH),
        lambda: _LearnedByHand(_power_mean, 3.0),
    ),
    "logmeanexp": Arm(
        "LogMeanExp, learned beta",
        lambda: tp.nn.SequencePool(tp.LogMeanExp(1.0, learnable=True), channels=WIDTH),
        lambda: _LearnedByHand(_log_mean_exp, 1.0),
    ),
    "autopool": Arm(
        "SoftmaxMean, learned alpha (AutoPool)",
        lambda: tp.nn.AutoPool(WIDTH),
        lambda: _LearnedByHand(_auto, 1.0),
    ),
    "attention": Arm(
        "gated attention", lambda: tp.nn.GatedAttentionPool(WIDTH, HIDDEN), _AttentionByHand
    ),
    "attentive": Arm(
        "attentive statistics",
        lambda: tp.nn.AttentiveStatisticsPool(WIDTH, HIDDEN),
        _AttentiveByHand,
    ),
    "kmax": Arm("3 largest in order", lambda: tp.nn.KMaxPool(3), lambda: _ByHand(_k_max)),
    "pyramid": Arm("pyramid 1, 2, 4 of max", tp.nn.TemporalPyramidPool, lambda: _ByHand(_pyramid)),
}
"""Every arm by its name."""


class Network(nn.Module):
    """An encoder, a pooling over time, and a linear layer.

    Shape:
        x (N, C, T), lengths (N,) -> (N, num_classes)
    """

    def __init__(
        self, encoder: nn.Module, pooling: nn.Module, channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        pooling.eval()  # batch norm's statistics are not to learn from the probe
        probe = pooling(torch.zeros(2, channels, 8), None, torch.tensor([8, 8]))
        pooling.train()
        self.head = nn.Linear(probe[0].numel(), num_classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        pooled = self.pooling(self.encoder(x, lengths), None, lengths)
        scores: Tensor = self.head(pooled.flatten(1))
        return scores


@dataclass(frozen=True)
class SeriesTask(Task):
    """Classification of series of varying length by an encoder and a pooling over time."""

    series: Series
    encoder: str = "gru"
    kind: ClassVar[str] = "series"
    arms: ClassVar[dict[str, Arm]] = ARMS
    threads: ClassVar[int | None] = 1
    """These networks are so small that more threads mostly wait for each other."""

    @property
    def batch(self) -> int:
        return max(8, min(32, len(self.train) // 8))  # few series still make some steps per epoch

    @property
    def data(self) -> str:
        return self.series.name

    @property
    def digest(self) -> str:
        return self.series.digest

    @property
    def classes(self) -> tuple[str, ...]:
        return self.series.classes

    @property
    def setting(self) -> dict[str, Any]:
        return {"encoder": self.encoder}

    @property
    def words(self) -> Words:
        names = {"gru": "a recurrent encoder (GRU)", "cnn": "two 1-D convolutions"}
        return Words(
            "series",
            f"{names[self.encoder]} before the pooling over time",
            "cut consistency",
            "up to a tenth of the series is cut off its ends",
            "the pooling layer",
            self.batch,
        )

    @property
    def train(self) -> Examples:
        return self.series.train

    @property
    def test(self) -> Examples:
        return self.series.test

    def network(self, arm: str, engine: str = "torchpool") -> nn.Module:
        encoder = ENCODERS[self.encoder](self.series.channels)
        pooling: nn.Module = getattr(self.arms[arm], engine)()
        return Network(encoder, pooling, WIDTH, len(self.classes))

    def disturbed(self, seed: int) -> Inputs:
        x, lengths = self.test.inputs
        return cut(x, lengths, seed)

    def pooling(self, net: nn.Module) -> nn.Module:
        assert isinstance(net, Network)
        return _WithLengths(net.pooling)

    def pooled_inputs(self) -> Inputs:
        x, lengths = self.train.part(slice(self.batch)).inputs
        return torch.randn(len(x), WIDTH, x.shape[2]), lengths


class _WithLengths(nn.Module):
    """A pooling that is called with x and lengths."""

    def __init__(self, pooling: nn.Module) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y: Tensor = self.pooling(x, None, lengths)
        return y


def cut(x: Tensor, lengths: Tensor, seed: int) -> Inputs:
    """Each series without up to a tenth of it, at the beginning, at the end, or at both.

    Shape:
        x (N, C, T), lengths (N,) -> the same, the padding zeros
    """
    generator = torch.Generator().manual_seed(seed)
    most = (lengths * CUT).ceil().long().clamp(max=lengths - 1)
    gone = (torch.rand(len(x), generator=generator) * (most + 1)).long()
    before = (torch.rand(len(x), generator=generator) * (gone + 1)).long()
    places = torch.arange(x.shape[2]) + before[:, None]
    kept = lengths - gone
    moved = x.gather(2, places.clamp(max=x.shape[2] - 1)[:, None].expand_as(x))
    return moved.masked_fill(~_valid(x, kept), 0), kept
