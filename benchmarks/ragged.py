"""Times ragged pooling beside what is written by hand: a padded batch with a mask of torch
operators, and torch.segment_reduce on packed rows; lengths vary 1:10.

A speed is printed only for a case whose results agreed. Run: python benchmarks/ragged.py [--json
FILE] [words that a row's name must contain].
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import arguments, machine, seconds, trained
from torch import Tensor

import torchpool as tp

SHAPES = [(32, 1000, 64), (64, 400, 256), (16, 2000, 8)]
"""Samples, longest length, channels."""

Call = Callable[[Tensor], Tensor]


def lengths_of(samples: int, longest: int) -> Tensor:
    """Lengths from a tenth of the longest to the longest, in no order."""
    spread = torch.linspace(0.1, 1.0, samples) * longest
    return spread.long()[torch.randperm(samples, generator=torch.Generator().manual_seed(0))]


def by_hand(name: str, valid: Tensor) -> Call:
    """The usual composition over padded (N, T, C) with a mask (N, T, 1)."""
    count = valid.sum(1)

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~valid, 0).sum(1) / count

    def std(x: Tensor) -> Tensor:
        gap = (x - mean(x).unsqueeze(1)).masked_fill(~valid, 0)
        return (gap.square().sum(1) / count).sqrt()

    def softmax(x: Tensor) -> Tensor:
        share = x.masked_fill(~valid, -math.inf).softmax(1)
        return (share * x.masked_fill(~valid, 0)).sum(1)

    return {
        "sum": lambda x: x.masked_fill(~valid, 0).sum(1),
        "mean": mean,
        "max": lambda x: x.masked_fill(~valid, -math.inf).amax(1),
        "min": lambda x: x.masked_fill(~valid, math.inf).amin(1),
        "std": std,
        "softmax": softmax,
    }[name]


REDUCTIONS: dict[str, Any] = {
    "sum": tp.Sum(),
    "mean": tp.Mean(),
    "max": tp.Max(),
    "min": tp.Min(),
    "std": tp.Std(),
    "softmax": tp.SoftmaxMean(1.0),
}


def compare(name: str, shape: tuple[int, int, int], train: bool) -> dict[str, Any]:
    """One row: milliseconds of each way, and whether all agreed."""
    samples, longest, channels = shape
    lengths = lengths_of(samples, longest)
    valid = tp.length_mask(lengths, longest).unsqueeze(-1)
    padded = torch.randn(samples, longest, channels)
    packed = padded[valid.squeeze(-1)]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    reduction = REDUCTIONS[name]
    ways: dict[str, tuple[Call, Tensor]] = {
        "by hand": (by_hand(name, valid), padded),
        "lengths": (
            lambda x: tp.pool(x, reduction, tp.Global(), lengths=lengths, dims=1).squeeze(1),
            padded,
        ),
        "segments": (lambda x: tp.segment_pool(x, reduction, offsets=offsets), packed),
    }
    if name in ("sum", "mean", "max", "min"):
        reduce = lambda x: torch.segment_reduce(x, name, offsets=offsets, axis=0)  # noqa: E731
        ways["segment_reduce"] = (reduce, packed)
    if train:
        ways = {way: (trained(call), x) for way, (call, x) in ways.items()}
    results = {way: call(x) for way, (call, x) in ways.items()}
    kept = {w: r[valid.squeeze(-1)] if r.ndim == 3 else r for w, r in results.items()}
    agree = all(torch.allclose(kept["by hand"], r, rtol=1e-3, atol=1e-4) for r in kept.values())
    times = seconds([lambda c=call, x=x: c(x) for call, x in ways.values()])
    row = {"reduction": name, "shape": shape, "train": train, "agree": agree}
    return row | {"ms": {way: 1e3 * t for way, t in zip(ways, times, strict=True)}}


def text(row: dict[str, Any]) -> str:
    """A row as a line."""
    kind = "forward+backward" if row["train"] else "forward"
    label = f"{row['reduction']} {'x'.join(map(str, row['shape']))} {kind}"
    if not row["agree"]:
        return f"{label:44} WRONG"
    ms = row["ms"]
    parts = [f"{way} {t:8.3f}" for way, t in ms.items()]
    ratios = f"{ms['by hand'] / ms['lengths']:5.1f}x {ms['by hand'] / ms['segments']:5.1f}x by hand"
    if "segment_reduce" in ms:
        ratios += f" {ms['segment_reduce'] / ms['segments']:5.1f}x segment_reduce"
    return f"{label:44} ms: {'  '.join(parts)}   {ratios}"


def main(words: Sequence[str]) -> None:
    """Prints the table; with --json also writes it."""
    words, file = arguments(words)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians, in turns")
    rows = []
    for shape in SHAPES:
        for name in REDUCTIONS:
            for train in (False, True):
                label = f"{name} {'x'.join(map(str, shape))} {'backward' if train else 'forward'}"
                if all(word in label for word in words):
                    rows.append(compare(name, shape, train))
                    print(text(rows[-1]), flush=True)
    if file is not None:
        file.write_text(
            json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
