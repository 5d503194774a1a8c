"""Timing in turns: every contender of a row meets the same state of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

SHORTEST = 2e-3
"""Seconds that one sample lasts at least: shorter calls are repeated within it."""
SLOW = 1.0
"""Seconds of a first call beyond which it stays the only sample."""
LEAST, MOST = 3, 25
"""Samples of a contender that is not slow."""


SETTLE = 2e-3
"""Seconds of rest before a sample: worker threads of the contender before may still be spinning."""


class Call(NamedTuple):
    """Something to time."""

    run: Callable[[int], Any]
    """Runs on the i-th set of inputs, i counting up without end."""
    first: float
    """Seconds that a first call took."""
    before: Callable[[], None] | None = None
    """Runs before each sample, outside the timing."""


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    samples: int


def seconds(run: Callable[[int], Any], first: int, repeats: int) -> float:
    """Mean seconds of a call over `repeats` calls in a row, the i-th with argument first + i."""
    begin = time.perf_counter()
    for i in range(first, first + repeats):
        run(i)
    return (time.perf_counter() - begin) / repeats


def _sample(call: Call, first: int, repeats: int) -> float:
    time.sleep(SETTLE)
    if call.before is not None:
        call.before()
    if repeats > 1:
        call.run(first)  # what the contender before put into the caches is not its own
    return seconds(call.run, first, repeats)


def in_turns(calls: Sequence[Call], budget: float) -> list[Timing]:
    """Times calls in turns, one sample of each per round.

    Args:
        budget: seconds for each call; a call that has used it up sits out, though not before its
            third sample. A call whose first took longer than SLOW is not repeated.
    """
    samples = [[call.first] if call.first > SLOW else [] for call in calls]
    repeats = [
        1 if kept else max(1, round(SHORTEST / max(_sample(call, 1, 1), 1e-9)))
        for call, kept in zip(calls, samples, strict=True)
    ]
    used = [budget * len(kept) for kept in samples]
    for turn in range(MOST):
        for i, call in enumerate(calls):
            done = len(samples[i]) >= LEAST or call.first > SLOW
            if used[i] >= budget and done:
                continue
            took = _sample(call, 2 + turn * repeats[i], repeats[i])
            samples[i].append(took)
            used[i] += took * repeats[i]
    return [_timing(kept) for kept in samples]


def _timing(samples: Sequence[float]) -> Timing:
    low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
    return Timing(median, low, high, len(samples))
