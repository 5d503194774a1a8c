"""What torchpool sets out to reach, and whether a run shows it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torchpool.bench.contest import COPY, Result, shares

LARGE = 32 << 20
"""Bytes moved beyond which the memory is the limit."""


@dataclass(frozen=True)
class Verdict:
    """One target and what was found."""

    target: str
    found: str
    """The figure, and the row that it comes from where it is that of one row."""
    is_met: bool


@dataclass(frozen=True)
class _Figure:
    value: float
    row: str


def _label(result: Result) -> str:
    return " ".join(filter(None, (result.name, str(result.about.get("layout", "")))))


def _of(results: Iterable[Result], *groups: str) -> list[Result]:
    return [r for r in results if r.group in groups]


def _figures(results: Sequence[Result], measure: Callable[[Result], float | None]) -> list[_Figure]:
    pairs = [(measure(r), _label(r)) for r in results]
    return [_Figure(value, label) for value, label in pairs if value is not None]


def _geometric_mean(figures: Sequence[_Figure]) -> float:
    return math.exp(statistics.fmean(math.log(f.value) for f in figures))


def _lowest(
    target: str, figures: Sequence[_Figure], least: float, unit: str = "x"
) -> list[Verdict]:
    if not figures:
        return []
    worst = min(figures, key=lambda f: f.value)
    below = sum(f.value < least for f in figures)
    found = (
        f"{below} of {len(figures)} rows below; lowest {_number(worst.value, unit)} ({worst.row})"
    )
    return [Verdict(target, found, below == 0)]


def _highest(
    target: str, figures: Sequence[_Figure], most: float, unit: str = "x"
) -> list[Verdict]:
    if not figures:
        return []
    worst = max(figures, key=lambda f: f.value)
    above = sum(f.value > most for f in figures)
    found = (
        f"{above} of {len(figures)} rows above; highest {_number(worst.value, unit)} ({worst.row})"
    )
    return [Verdict(target, found, above == 0)]


def _mean(target: str, figures: Sequence[_Figure], least: float) -> list[Verdict]:
    if not figures:
        return []
    value = _geometric_mean(figures)
    found = f"{_number(value, 'x')} over {len(figures)} rows"
    return [Verdict(target, found, value >= least)]


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.0%}"
    return f"{value:.2f}x" if unit == "x" else f"{value:,.1f} {unit}"


def _best(result: Result) -> float | None:
    return None if result.best_peer is None else result.ratio(result.best_peer)


def _in(layout: str, results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.about.get("layout") == layout]


def _races(results: Sequence[Result]) -> list[Verdict]:
    forward, adaptive = _of(results, "forward"), _of(results, "adaptive")
    against_torch = _figures(_in("contiguous", forward), lambda r: r.ratio("torch"))
    return [
        *_lowest("forward: no row slower than the best peer", _figures(forward, _best), 1.0),
        *_mean("forward: 1.5x the best peer (geometric mean)", _figures(forward, _best), 1.5),
        *_mean("forward: 15x torch, contiguous (geometric mean)", against_torch, 15.0),
        *_memory_speed([*forward, *adaptive]),
        *_lowest(
            "adaptive, global, 1-D, 3-D: no row slower than the best peer",
            _figures(adaptive, _best),
            1.0,
        ),
    ]


def _memory_speed(results: Sequence[Result]) -> list[Verdict]:
    large = [(r, s) for r, s in shares(results) if r.ours is not None and r.ours.traffic >= LARGE]
    if not large:
        return []
    figures = [_Figure(share, _label(r)) for r, share in large]
    middle = statistics.median(share for _, share in large)
    found = f"{middle:.0%} over {len(large)} rows"
    return [
        Verdict("rows of 32 MiB and more: 80 % of a copy's speed (median)", found, middle >= 0.8),
        *_lowest("rows of 32 MiB and more: no row under 60 % of a copy", figures, 0.6, "%"),
    ]


def _training(results: Sequence[Result]) -> list[Verdict]:
    rows = _of(results, "training")
    verdicts = []
    for layout, least in (("contiguous", 10.0), ("channels_last", 3.0)):
        figures = _figures(_in(layout, rows), lambda r: r.ratio("torch"))
        verdicts += _mean(f"training: {least:g}x torch, {layout} (geometric mean)", figures, least)
    every = _figures(rows, lambda r: r.ratio("torch"))
    return [*verdicts, *_lowest("training: no row slower than torch", every, 1.0)]


def _quotient(over: str, under: str) -> Callable[[Result], float | None]:
    def measure(result: Result) -> float | None:
        a, b = result.outcomes.get(over), result.outcomes.get(under)
        if a is None or b is None or not (a.is_ok and b.is_ok):
            return None
        return a.seconds / b.seconds

    return measure


def _series(results: Sequence[Result]) -> list[Verdict]:
    half, growth = _of(results, "half"), _of(results, "growth")
    return [
        *_highest(
            "bfloat16: 0.7x the float32 time", _figures(half, _quotient("bfloat16", "float32")), 0.7
        ),
        *_highest(
            "float16: 0.7x the float32 time", _figures(half, _quotient("float16", "float32")), 0.7
        ),
        *_highest(
            "window 31: 2x the time of window 3", _figures(growth, _quotient("k=31", "k=3")), 2.0
        ),
        *_highest(
            "window 127: 3x the time of window 3", _figures(growth, _quotient("k=127", "k=3")), 3.0
        ),
        *_highest(
            "integers, bool: a byte takes as long as of float32 (1.1x, for noise)",
            _integer_figures(_of(results, "integers")),
            1.1,
        ),
        *_lowest(
            "second thread: 1.7x, on rows that are not at the copy's speed",
            _figures(_of(results, "scaling"), _gain),
            1.7,
        ),
    ]


def _integer_figures(results: Sequence[Result]) -> list[_Figure]:
    figures = []
    for result in results:
        base = result.outcomes.get("float32")
        if base is None or not base.is_ok:
            continue
        for name, outcome in result.outcomes.items():
            if name != "float32" and outcome.is_ok:
                per_byte = outcome.seconds / outcome.traffic
                value = per_byte / (base.seconds / base.traffic)
                figures.append(_Figure(value, f"{name} {_label(result)}"))
    return figures


def _gain(result: Result) -> float | None:
    """Speed of two threads over one; None where the copy is the limit already."""
    share = _quotient(f"{COPY}, 2 threads", "2 threads")(result)
    if share is not None and share >= 0.8:
        return None
    return _quotient("1 thread", "2 threads")(result)


def _formulas(results: Sequence[Result]) -> list[Verdict]:
    rows = _of(results, "formulas")

    def eager(result: Result) -> float | None:
        ratios = [result.ratio(name) for name in result.outcomes if name.startswith("torch: ")]
        return min((ratio for ratio in ratios if ratio is not None), default=None)

    compiled = _figures(rows, lambda r: r.ratio("torch.compile"))
    return [
        *_lowest("formulas, training: 10x the best eager composition", _figures(rows, eager), 10.0),
        *_lowest("formulas, training: 3x the compiled composition", compiled, 3.0),
    ]


def _excess(result: Result) -> float | None:
    """Microseconds beyond 1.2 times torch's own time and 2 us."""
    torch = result.outcomes.get("torch")
    if result.ours is None or torch is None or not torch.is_ok:
        return None
    return 1e6 * (result.ours.seconds - 1.2 * torch.seconds) - 2


def _small(results: Sequence[Result]) -> list[Verdict]:
    verdicts = []
    for grad, what in ((False, "without"), (True, "with")):
        rows = [r for r in _of(results, "small") if r.about.get("grad") is grad]
        target = f"very small inputs {what} gradients: at most 1.2x torch + 2 us"
        verdicts += _highest(target, _figures(rows, _excess), 0.0, "us beyond")
    return verdicts


def _processes(results: Sequence[Result]) -> list[Verdict]:
    start, memory = _of(results, "start"), _of(results, "memory")
    first = _figures(start, lambda r: None if r.ours is None else 1e3 * r.ours.seconds)

    def extra(key: str) -> list[_Figure]:
        return _figures(memory, lambda r: float(r.about[key]) / (1 << 20))

    return [
        *_highest("first call with cached kernels, beyond import: 50 ms", first, 50.0, "ms"),
        *_highest("forward: no hidden copies (1 MiB)", extra("forward_extra_bytes"), 1.0, "MiB"),
        *_highest("backward: no hidden copies (1 MiB)", extra("backward_extra_bytes"), 1.0, "MiB"),
    ]


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """Every target that the results can say something about."""
    parts = (_races, _training, _series, _formulas, _small, _processes)
    return [verdict for part in parts for verdict in part(results)]
