"""Times every layer over time beside the composition of torch operators that is written by hand for
it, on a padded batch whose lengths vary 1:10.

A speed is printed only for a layer whose results agreed, gradients included. Run: python
benchmarks/sequences.py [--json FILE] [words that a row's name must contain].
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timing import arguments, machine, seconds, trained
from torch import Tensor, nn

import torchpool as tp

SAMPLES, CHANNELS, LONGEST = 32, 64, 400
HIDDEN, HEADS = 32, 4

ByHand = Callable[[Any, Tensor, Tensor], Tensor]
"""A composition over a layer (for its parameters), x (N, C, T) and the mask (N, 1, T)."""


def mean(x: Tensor, valid: Tensor) -> Tensor:
    return x.masked_fill(~valid, 0).sum(-1) / valid.sum(-1)


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights).sum(-1) / weights.sum(-1)


def statistics(x: Tensor, valid: Tensor) -> Tensor:
    centre = mean(x, valid)
    gap = (x - centre[..., None]).masked_fill(~valid, 0)
    return torch.cat([centre, (gap.square().sum(-1) / valid.sum(-1)).sqrt()], 1)


def softmax(scores: Tensor, valid: Tensor) -> Tensor:
    return scores.masked_fill(~valid, -math.inf).softmax(-1)


def power_mean(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    p = layer.pool.value[:, None]
    return mean(x.clamp(min=1e-6).pow(p), valid).pow(1 / p.squeeze(1))


def last(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    place = valid.sum(-1, keepdim=True) - 1
    return x.gather(2, place.expand(-1, x.shape[1], 1)).squeeze(2)


def attentive(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    context = statistics(x, valid)[..., None].expand(-1, -1, x.shape[2])
    hidden = F.relu(layer.tdnn["conv"]["conv"](torch.cat([x, context], 1)))
    norm = layer.tdnn["norm"]["norm"]
    hidden = F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weights = softmax(layer.conv["conv"](torch.tanh(hidden)), valid)
    centre = (weights * x).sum(-1)
    deviation = (weights * (x - centre[..., None]).square()).sum(-1).sqrt()
    return torch.cat([centre, deviation], 1)


def gated(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    hidden = torch.tanh(layer.value(x.mT)) * torch.sigmoid(layer.gate(x.mT))
    return (x * softmax(layer.score(hidden).mT, valid)).sum(-1)


def self_attentive(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    return x @ softmax(layer.score(torch.tanh(layer.hidden(x.mT))).mT, valid).mT


def multi_head(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    linear = (layer.query, layer.key, layer.value)
    queries = layer.queries[:, None].expand(-1, len(x), -1)
    tokens = x.permute(2, 0, 1)
    y, _ = F.multi_head_attention_forward(
        queries, tokens, tokens, CHANNELS, HEADS,
        torch.cat([each.weight for each in linear]), torch.cat([each.bias for each in linear]),
        None, None, False, 0.0, layer.out.weight, layer.out.bias,
        key_padding_mask=~valid.squeeze(1), need_weights=False,
    )  # fmt: skip
    return y[0]


def k_max(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    places = x.masked_fill(~valid, -math.inf).topk(layer.k).indices.sort(-1).values
    return x.gather(-1, places)


def sample_by_sample(x: Tensor, valid: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
    lengths = valid.sum((1, 2)).tolist()
    return torch.stack([pool(s[:, :n]) for s, n in zip(x, lengths, strict=True)])


def pyramid(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    return sample_by_sample(
        x, valid, lambda s: torch.cat([F.adaptive_max_pool1d(s, n) for n in layer.levels], -1)
    )


def segments(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    return sample_by_sample(x, valid, lambda s: F.adaptive_avg_pool1d(s, layer.num_segments))


def rank(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    count, time = valid.sum(-1, keepdim=True), torch.arange(x.shape[2])
    means = x.masked_fill(~valid, 0).cumsum(-1) / (time + 1)
    weights = (2 * time - count + 1) / (count * (count - 1) / 2)
    return (means * weights.masked_fill(~valid, 0)).sum(-1)


def gaussian(layer: Any, x: Tensor, valid: Tensor) -> Tensor:
    (before, after), stride = layer.windows.padding[0], layer.windows.stride
    taps = layer.taps()[:, None]

    def smooth(t: Tensor) -> Tensor:
        padded = F.pad(t, (before, after))
        return F.conv1d(padded, taps, stride=stride, groups=CHANNELS)

    total = smooth(valid.float().expand_as(x))
    return smooth(x.masked_fill(~valid, 0)) / total.clamp(min=1e-20)


def positions(valid: Tensor) -> Tensor:
    return torch.arange(1, valid.shape[-1] + 1) * valid


N = tp.nn
ROWS: dict[str, tuple[Callable[[], nn.Module], ByHand]] = {
    "SequencePool(Mean)": (lambda: N.SequencePool(tp.Mean()), lambda _, x, m: mean(x, m)),
    "SequencePool(Max)": (
        lambda: N.SequencePool(tp.Max()),
        lambda _, x, m: x.masked_fill(~m, -math.inf).amax(-1),
    ),
    "SequencePool(PowerMean)": (
        lambda: N.SequencePool(tp.PowerMean(3.0, learnable=True), channels=CHANNELS),
        power_mean,
    ),
    "StatisticsPool": (N.StatisticsPool, lambda _, x, m: statistics(x, m)),
    "AttentiveStatisticsPool": (
        lambda: N.AttentiveStatisticsPool(CHANNELS, HIDDEN).eval(),
        attentive,
    ),
    "AttentionPool": (lambda: N.AttentionPool(CHANNELS, num_heads=HEADS), multi_head),
    "GatedAttentionPool": (lambda: N.GatedAttentionPool(CHANNELS, HIDDEN), gated),
    "SelfAttentivePool": (lambda: N.SelfAttentivePool(CHANNELS, HIDDEN, HEADS), self_attentive),
    "KMaxPool": (lambda: N.KMaxPool(5), k_max),
    "TemporalPyramidPool": (N.TemporalPyramidPool, pyramid),
    "SegmentPool": (lambda: N.SegmentPool(3), segments),
    "RankPool": (N.RankPool, rank),
    "AutoPool": (
        lambda: N.AutoPool(CHANNELS),
        lambda layer, x, m: (x * softmax(layer.alpha[:, None] * x, m)).sum(-1),
    ),
    "LinearSoftmax": (N.LinearSoftmax, lambda _, x, m: weighted(x, x.masked_fill(~m, 0))),
    "GaussianPool": (lambda: N.GaussianPool(CHANNELS, 9, 4), gaussian),
    "FirstToken": (N.FirstToken, lambda _, x, m: x[:, :, 0]),
    "LastToken": (N.LastToken, last),
    "WeightedMeanTokens": (
        N.WeightedMeanTokens,
        lambda _, x, m: weighted(x, positions(m).to(x.dtype)),
    ),
    "SqrtLenMean": (
        N.SqrtLenMean,
        lambda _, x, m: x.masked_fill(~m, 0).sum(-1) / m.sum(-1).sqrt(),
    ),
}
"""How each layer is built, and what is written by hand for it."""


def compare(name: str, train: bool) -> dict[str, Any]:
    """One row: milliseconds of both ways, and whether they agreed."""
    torch.manual_seed(0)
    build, by_hand = ROWS[name]
    layer = build()
    lengths = (torch.linspace(0.1, 1.0, SAMPLES) * LONGEST).long()[torch.randperm(SAMPLES)]
    valid = tp.length_mask(lengths, LONGEST)[:, None]
    x = torch.rand(SAMPLES, CHANNELS, LONGEST).masked_fill(~valid, 0)
    ways = [lambda t: layer(t, lengths=lengths), lambda t: by_hand(layer, t, valid)]
    with torch.set_grad_enabled(train):
        if train:
            ways = [trained(way) for way in ways]
        ours, theirs = (way(x) for way in ways)
        agree = torch.allclose(ours.reshape_as(theirs), theirs, rtol=1e-3, atol=1e-5)
        row = {"layer": name, "train": train, "agree": agree}
        if agree:
            times = seconds([lambda way=way: way(x) for way in ways])
            row["ms"] = dict(zip(("layer", "by hand"), (1e3 * t for t in times), strict=True))
    return row


def text(row: dict[str, Any]) -> str:
    """A row as a line."""
    label = f"{row['layer']:24} {'forward+backward' if row['train'] else 'forward':17}"
    if not row["agree"]:
        return f"{label} WRONG"
    ours, theirs = row["ms"].values()
    note = "" if ours <= theirs else "  loses"
    return f"{label} {ours:8.3f} ms, by hand {theirs:8.3f} ms: {theirs / ours:5.2f}x{note}"


def main(words: Sequence[str]) -> None:
    """Prints the table; with --json also writes it."""
    words, file = arguments(words)
    shape = (SAMPLES, CHANNELS, LONGEST)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; x {shape}; medians")
    rows = []
    for name in ROWS:
        for train in (False, True):
            if all(word in f"{name} {'backward' if train else 'forward'}" for word in words):
                rows.append(compare(name, train))
                print(text(rows[-1]), flush=True)
    if file is not None:
        found = {"machine": machine(), "shape": shape, "rows": rows}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
