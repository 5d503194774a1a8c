"""A report as tables for the terminal; losses are printed as plainly as wins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from torchpool.bench.contest import COPY, OURS, Outcome, Result
from torchpool.bench.report import ALL, Report
from torchpool.bench.targets import verdicts

MIB = 1 << 20
TITLES = {
    "forward": "Forward, 2-D windows",
    "adaptive": "Forward: adaptive, global, 1-D and 3-D",
    "training": "Forward and backward",
    "half": "Half precision beside float32",
    "growth": "Growth of the window, stride 1",
    "formulas": "Forward and backward of reductions that torch does not have",
    "small": "Very small inputs",
    "scaling": "A second thread",
    "integers": "Integers and bool beside float32",
    "start": "First call of a process, kernels cached",
    "memory": "Memory",
}
BASES = {"half": "float32", "growth": "k=3", "scaling": "1 thread", "integers": "float32"}
"""What the other columns of a series are compared with."""


def tables(made: Report) -> Iterator[Table | _WideOrBrief]:
    """One table per group, and the targets."""
    for group in ALL:
        results = [r for r in made.results if r.group == group]
        if not results:
            continue
        if group == "memory":
            yield _memory(results)
        elif group == "start":
            yield _start(results)
        elif group in BASES:
            yield _series(group, results)
        else:
            yield _race(group, results)
    if made.results:
        yield _targets(made.results)


def faults(made: Report) -> list[str]:
    """Contenders that were not timed because their result was wrong or they failed."""
    return [
        f"{r.group} {r.name} {r.about.get('layout', '')}: {name} {o.status}: {o.note}"
        for r in made.results
        for name, o in r.outcomes.items()
        if o.status in ("wrong", "failed")
    ]


def _new(group: str, columns: Sequence[str]) -> Table:
    table = Table(title=TITLES[group], title_justify="left")
    table.add_column("row", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _name(result: Result) -> str:
    short = {"contiguous": "NC...", "channels_last": "N...C"}
    name = result.name.replace(", learnable=False", "")
    parts = [name, short.get(str(result.about.get("layout")), "")]
    if result.group == "small":
        parts += [str(result.about["op"]), "with grad" if result.about["grad"] else ""]
    return " ".join(filter(None, parts))


def milliseconds(seconds: float) -> str:
    """Three figures, in ms or us."""
    ms = 1e3 * seconds
    return f"{1e3 * ms:.1f} us" if ms < 0.1 else f"{ms:.3g} ms" if ms < 100 else f"{ms:,.0f} ms"


class _WideOrBrief:
    """A table as wide as it likes where there is room, else a brief one."""

    def __init__(self, wide: Table, brief: Table) -> None:
        self.wide, self.brief = wide, brief

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(max_width=1000), self.wide).maximum
        yield self.wide if needed <= options.max_width else self.brief


def _race(group: str, results: Sequence[Result]) -> _WideOrBrief:
    present = (n for r in results for n, o in r.outcomes.items() if o.status != "absent")
    rivals: dict[str, dict[str, None]] = {}
    for name in present:
        if not _is_own(name):
            rivals.setdefault(name.split(": ")[0], {})[name] = None
    wide = _new(group, [OURS, "of a copy", *rivals])
    brief = _new(group, [OURS, "of a\ncopy", "best\nother", ""])
    brief.columns[-1].justify = "left"
    for result in results:
        share = result.ratio(COPY)
        ours = result.outcomes[OURS]
        best = result.best_peer
        first = (
            _name(result),
            milliseconds(ours.seconds) if ours.is_ok else Text(ours.status, "bold red"),
            "" if share is None else f"{share:.0%}",
        )
        ratios = (_ratio(result, _quickest(result, names)) for names in rivals.values())
        wide.add_row(*first, *ratios)
        brief.add_row(*first, *(("-", "") if best is None else (_ratio(result, best), best)))
    for table in (wide, brief):
        table.caption = (
            "A number is how many times as long as torchpool a peer takes: "
            "below 1.00 torchpool loses."
        )
    return _WideOrBrief(wide, brief)


def _quickest(result: Result, names: Iterable[str]) -> str:
    """Of a peer's several ways the one that took the least time for a row."""

    def seconds(name: str) -> float:
        outcome = result.outcomes.get(name)
        return outcome.seconds if outcome is not None and outcome.is_ok else math.inf

    return min(names, key=seconds)


def _is_own(name: str) -> bool:
    return name == OURS or name.startswith(COPY)


def _ratio(result: Result, name: str) -> Text:
    outcome = result.outcomes.get(name)
    if outcome is None or outcome.status == "absent":
        return Text("-", "dim")
    ratio = result.ratio(name)
    if ratio is None:
        return Text(milliseconds(outcome.seconds) if outcome.is_ok else outcome.status, "yellow")
    style = "red" if ratio < 1 else "bold" if name == result.best_peer else ""
    return Text(f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}", style)


def _series(group: str, results: Sequence[Result]) -> Table:
    names = list(dict.fromkeys(n for r in results for n in r.outcomes))
    table = _new(group, names)
    per_byte = group == "integers"
    for result in results:
        base = result.outcomes.get(BASES[group])
        row = (_beside(result.outcomes.get(name), base, per_byte) for name in names)
        table.add_row(_name(result), *row)
    each = ", byte for byte" if per_byte else ""
    table.caption = f"In brackets: the time as a multiple of that of {BASES[group]}{each}."
    return table


def _beside(outcome: Outcome | None, base: Outcome | None, per_byte: bool) -> Text:
    if outcome is None:
        return Text("-", "dim")
    if not outcome.is_ok:
        return Text(outcome.status, "bold red")
    text = milliseconds(outcome.seconds)
    if base is None or base is outcome or not base.is_ok:
        return Text(text)
    ratio = outcome.seconds / base.seconds
    if per_byte:
        ratio *= base.traffic / outcome.traffic
    return Text(f"{text} ({ratio:.2f})")


def _start(results: Sequence[Result]) -> Table:
    table = _new("start", ["with gradients", "import of the kernels", "first call"])
    for r in results:
        grad = "yes" if r.about["grad"] else "no"
        first = "" if r.ours is None else milliseconds(r.ours.seconds)
        table.add_row(r.name, grad, milliseconds(r.about["import_s"]), first)
    return table


def _memory(results: Sequence[Result]) -> Table:
    keys = ("input", "output", "saved", "forward_extra", "backward_extra")
    table = _new("memory", [key.replace("_", " ") for key in keys])
    for r in results:
        table.add_row(_name(r), *(f"{r.about[f'{key}_bytes'] / MIB:.2f}" for key in keys))
    table.caption = "MiB. Extra: at the peak of the call, beyond input, result and saved."
    return table


def _targets(results: Sequence[Result]) -> Table:
    table = Table(title="Targets", title_justify="left")
    for name in ("target", "found", ""):
        table.add_column(name)
    for verdict in verdicts(results):
        word, style = ("met", "green") if verdict.is_met else ("missed", "red")
        table.add_row(verdict.target, verdict.found, Text(word, style))
    return table


def bars(made: Report) -> list[dict[str, Any]]:
    """What a chart shows of the contiguous rows of the group forward: speeds as shares of a
    copy's."""
    rows = []
    for r in made.results:
        copied = r.outcomes.get(COPY)
        if r.group != "forward" or r.about["layout"] != "contiguous" or copied is None:
            continue
        if r.ours is None or r.best_peer is None or not copied.is_ok:
            continue
        best = r.outcomes[r.best_peer]
        shares = {"ours": copied.seconds / r.ours.seconds, "peer": copied.seconds / best.seconds}
        rows.append({"title": r.name, "name": r.best_peer, **shares})
    return rows


def model_table(target: str, found: Any) -> Table:
    """Before and after `convert`."""
    table = Table(title=f"{target} before and after torchpool.convert", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "before / after"):
        table.add_column(name, justify="right")
    for name, before, after in found.times:
        ratio = Text(f"{before.median / after.median:.2f}x")
        if before.median < after.median:
            ratio.stylize("red")
        table.add_row(name, milliseconds(before.median), milliseconds(after.median), ratio)
    kept = [f"{size / MIB:,.2f} MiB" for size in found.saved_bytes]
    share = found.saved_bytes[0] / max(1, found.saved_bytes[1])
    table.add_row("saved for backward", *kept, f"{share:.2f}x")
    return table
