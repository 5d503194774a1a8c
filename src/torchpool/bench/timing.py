"""Timing in turns: every contender of a row meets the same state of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchpool import interruption

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


def _sample(call: Call, first: int, repeats: int) -> float:
    """Mean seconds of a call, over `repeats` calls in a row."""
    interruption.heed()
    time.sleep(SETTLE)
    if call.before is not None:
        call.before()
    if repeats > 1:
        call.run(first)  # what the contender before put into the caches is not its own
    begin = time.perf_counter()
    for i in range(first, first + repeats):
        call.run(i)
    return (time.perf_counter() - begin) / repeats


def _estimate(call: Call) -> float:
    """Seconds of a call: the least of three, or one where that is slow."""
    least = _sample(call, 0, 1)
    for i in range(1, 3):
        if least < SLOW:
            least = min(least, _sample(call, i, 1))
    return least


def in_turns(calls: Sequence[Call], budget: float) -> list[Timing]:
    """Times calls that ran before in turns, one sample of each per round.

    Args:
        budget: seconds for each call; a call that has used it up sits out, though not before its
            third sample. A call that takes longer than SLOW is timed once.
    """
    estimates = [_estimate(call) for call in calls]
    samples = [[seconds] if seconds > SLOW else [] for seconds in estimates]
    repeats = [max(1, round(SHORTEST / max(seconds, 1e-9))) for seconds in estimates]
    used = [0.0] * len(calls)
    for turn in range(MOST):
        for i, call in enumerate(calls):
            if estimates[i] > SLOW or (used[i] >= budget and len(samples[i]) >= LEAST):
                continue
            took = _sample(call, turn * repeats[i], repeats[i])
            samples[i].append(took)
            used[i] += took * repeats[i]
    return [_timing(kept) for kept in samples]


def _timing(samples: Sequence[float]) -> Timing:
    low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
    return Timing(median, low, high, len(samples))
