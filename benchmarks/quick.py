"""Times torch, torchpool and a copy of as many bytes, in turns, on the shapes that decide real
models; prints ratios of medians.

A speed is printed only for a case whose result agreed. Run: python benchmarks/quick.py [words that
a row's name must contain].
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torchpool as tp

SHAPES: list[tuple[tuple[int, ...], int, int, int]] = [
    ((8, 64, 112, 112), 3, 2, 1),
    ((8, 64, 224, 224), 2, 2, 0),
    ((8, 192, 35, 35), 3, 1, 1),
    ((8, 256, 20, 20), 5, 1, 2),
    ((8, 2048, 7, 7), 7, 1, 0),
    ((1, 16, 512, 512), 3, 1, 1),
    ((1, 16, 512, 512), 31, 1, 15),
    ((1, 16, 512, 512), 127, 1, 63),
    ((1, 1, 4, 4), 2, 2, 0),
    ((1, 16, 28, 28), 2, 2, 0),
]
ROUNDS, SLOWEST = 9, 1.5
TORCH: dict[str, Callable[..., Tensor]] = {"max": F.max_pool2d, "mean": F.avg_pool2d}
OURS: dict[str, Callable[..., Tensor]] = {"max": tp.max_pool2d, "mean": tp.avg_pool2d}


def seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Median seconds of each call, run in turns; slow ones are run less often."""
    times: list[list[float]] = [[] for _ in calls]
    repeats = []
    for call in calls:
        call()
        begin = time.perf_counter()
        call()
        repeats.append(max(1, int(2e-3 / (time.perf_counter() - begin + 1e-9))))
    for _ in range(ROUNDS):
        for kept, call, repeat in zip(times, calls, repeats, strict=True):
            if sum(kept) * repeat > SLOWEST:
                continue
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            kept.append((time.perf_counter() - begin) / repeat)
    return [statistics.median(kept) for kept in times]


def step(pool: Callable[..., Tensor], x: Tensor, window: tuple[int, int, int]) -> Tensor:
    """Forward and backward; returns the gradient."""
    leaf = x.detach().requires_grad_()
    y = pool(leaf, *window)
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return grad


def compare(name: str, x: Tensor, window: tuple[int, int, int], train: bool) -> str:
    """One row of the table."""
    run = step if train else lambda pool, x, window: pool(x, *window)
    calls = [lambda p=p: run(p[name], x, window) for p in (TORCH, OURS)]
    agree = torch.allclose(calls[0](), calls[1](), rtol=1e-4, atol=1e-5)
    if not agree:
        return "WRONG"
    out = OURS[name](x, *window)
    moved = (x.nbytes + out.nbytes) * (2 if train else 1)
    source = torch.empty(moved // 2, dtype=torch.uint8)
    into = torch.empty_like(source)
    theirs, ours, copied = seconds([*calls, lambda: into.copy_(source)])
    times = f"torch {theirs * 1e3:9.3f} ms  ours {ours * 1e3:8.3f} ms"
    return f"{times}  {theirs / ours:7.1f}x  {copied / ours:5.0%} of a copy"


def main(words: Sequence[str]) -> None:
    """Prints the table."""
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads; medians of {ROUNDS} rounds in turns")
    for shape, *numbers in SHAPES:
        window = (numbers[0], numbers[1], numbers[2])
        for name in TORCH:
            for layout, form in {
                "NCHW": torch.contiguous_format,
                "NHWC": torch.channels_last,
            }.items():
                for train in (False, True):
                    kind = "forward+backward" if train else "forward"
                    size = "x".join(map(str, shape))
                    label = f"{name} {size} k{window[0]}s{window[1]} {layout} {kind}"
                    if all(word in label.split() or word in label for word in words):
                        x = torch.randn(shape).contiguous(memory_format=form)
                        print(f"{label:55} {compare(name, x, window, train)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
