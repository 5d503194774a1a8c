"""A row of a benchmark: contenders that are checked, then timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchpool import interruption
from torchpool.bench.peers import NotOffered
from torchpool.bench.timing import Call, Timing, in_turns

OURS, COPY = "torchpool", "copy"


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a row, ready to run."""

    run: Callable[[int], Any]
    """Does the work on the i-th set of inputs."""
    check: Callable[[Any], str | None]
    """What is wrong with the result of `run(0)`; None if nothing is."""
    traffic: int = 0
    """Bytes that have to move; 0 where the row has no such floor."""
    before: Callable[[], None] | None = None
    """Runs before each sample, outside the timing."""


@dataclass(frozen=True)
class Row:
    """A row that can be run: nothing large exists yet."""

    group: str
    name: str
    about: Mapping[str, Any]
    """What distinguishes the row: shape, layout, reduction, ..."""
    build: Callable[[], Mapping[str, Callable[[], Contender]]]
    """Makes the inputs, and says how each contender is made from them."""


@dataclass(frozen=True)
class Outcome:
    """How a contender fared."""

    status: str
    """"ok"; "wrong" or "failed" and therefore not timed; "absent": it does not offer this."""
    note: str = ""
    median_s: float | None = None
    low_s: float | None = None
    """First quartile."""
    high_s: float | None = None
    """Third quartile."""
    samples: int = 0
    traffic: int = 0
    """Bytes that have to move."""

    @property
    def is_ok(self) -> bool:
        """Whether the result was right, so that there is a time."""
        return self.status == "ok"

    @property
    def seconds(self) -> float:
        """Median seconds; only where `is_ok`."""
        if self.median_s is None:
            raise ValueError(f"no time was taken: {self.status} ({self.note})")
        return self.median_s


@dataclass(frozen=True)
class Result:
    """A row that was run."""

    group: str
    name: str
    about: Mapping[str, Any]
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def ours(self) -> Outcome | None:
        """torchpool's outcome, if it was timed."""
        outcome = self.outcomes.get(OURS)
        return outcome if outcome is not None and outcome.is_ok else None

    def ratio(self, name: str) -> float | None:
        """How many times longer than torchpool a contender takes; None without both times."""
        other = self.outcomes.get(name)
        if self.ours is None or other is None or not other.is_ok:
            return None
        return other.seconds / self.ours.seconds

    @property
    def best_peer(self) -> str | None:
        """The fastest contender besides torchpool and the copies; None without one."""
        timed = [n for n, o in self.outcomes.items() if o.is_ok and not n.startswith((OURS, COPY))]
        return min(timed, key=lambda name: self.outcomes[name].seconds, default=None)

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON takes it."""
        return asdict(self)


def contend(row: Row, budget: float) -> Result:
    """Checks every contender of a row, then times those that were right.

    Args:
        budget: seconds of timing for each contender.
    """
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, Contender] = {}
    for name, make in row.build().items():
        made = _checked(make)
        interruption.heed()
        if isinstance(made, Outcome):
            outcomes[name] = made
        else:
            outcomes[name] = Outcome("ok")  # keeps its place until it is timed
            ready[name] = made
    timings = in_turns([Call(c.run, c.before) for c in ready.values()], budget)
    for (name, contender), timing in zip(ready.items(), timings, strict=True):
        outcomes[name] = _timed(timing, contender.traffic)
    ready.clear()
    gc.collect()
    return Result(row.group, row.name, row.about, outcomes)


def _checked(make: Callable[[], Contender]) -> Outcome | Contender:
    """A contender that gave the right result; else what became of it."""
    try:
        contender = make()
        if contender.before is not None:
            contender.before()
        fault = contender.check(contender.run(0))
    except NotOffered as reason:
        return Outcome("absent", str(reason))
    except ModuleNotFoundError as missing:
        return Outcome("absent", f"{missing.name} is not installed")
    except Exception as error:  # a peer may raise whatever it likes: the row says so and goes on
        text = str(error).strip() or type(error).__name__
        return Outcome("failed", text.splitlines()[0][:200])
    if fault is not None:
        return Outcome("wrong", fault)
    return contender


def _timed(timing: Timing, traffic: int) -> Outcome:
    median, low, high, samples = timing
    return Outcome("ok", "", median, low, high, samples, traffic)


# Checks


ROUNDINGS = 4 * torch.finfo(torch.float32).eps
"""What a sum in float32 may be off by, as a share of the sum of its terms' magnitudes."""


def difference(
    found: Tensor, wanted: Tensor, rtol: float, atol: float, terms: Tensor | None = None
) -> str | None:
    """How a result differs from the one that is wanted; None where it does not. `terms` are the
    sums of the magnitudes of what was added up, where that may be much more than the result."""
    if found.shape != wanted.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    found = found.to(wanted.dtype)
    if torch.allclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True):
        return None
    apart = (found.double() - wanted.double()).abs()
    allowed = atol + rtol * wanted.double().abs() + (0 if terms is None else ROUNDINGS * terms)
    outside = ~(apart <= allowed) & ~(found.isnan() & wanted.isnan()) & (found != wanted)
    if not outside.any():
        return None
    share = float(outside.double().mean())
    return f"{share:.1%} of the values differ, by up to {float(apart[outside].max()):.3g}"


def unchecked(result: Any) -> None:
    """The check of what has no result, such as a copy."""


def copy(traffic: int, sets: int = 1) -> Callable[[], Contender]:
    """A copy that moves as many bytes: half of them read, half written, into memory that is there
    already."""

    def make() -> Contender:
        sources = [torch.zeros(max(1, traffic // 2), dtype=torch.uint8) for _ in range(sets)]
        into = torch.empty_like(sources[0])
        return Contender(lambda i: into.copy_(sources[i % sets]), unchecked, traffic)

    return make


def input_sets(traffic: int, large: int = 1 << 25, rotate_over: int = 1 << 27) -> int:
    """How many sets of inputs a row rotates over: rows that move `large` bytes shall not find
    theirs in a cache."""
    return 1 if traffic < large else max(1, min(4, -(-rotate_over // traffic)))


def shares(results: Sequence[Result]) -> list[tuple[Result, float]]:
    """The rows that a copy ran in, each with torchpool's share of the copy's speed."""
    found = []
    for result in results:
        share = result.ratio(COPY)
        if share is not None:
            found.append((result, share))
    return found
