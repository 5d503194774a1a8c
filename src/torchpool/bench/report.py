"""A whole run: its rows, as JSON and back."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchpool import interruption
from torchpool.bench import peers, processes
from torchpool.bench.contest import Outcome, Result, Row, contend
from torchpool.bench.groups import GROUPS, Settings
from torchpool.bench.targets import verdicts

SCHEMA = 1
PROCESSES = {"start": processes.first_calls, "memory": processes.memory}
ALL = (*GROUPS, *PROCESSES)


@dataclass(frozen=True)
class Report:
    """The rows of a run and what they were measured with."""

    results: list[Result]
    about: dict[str, Any]
    """Date, machine, threads, versions."""


def machine() -> dict[str, Any]:
    """The processor, its number of usable cores, the system."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), model)
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "simd": capability,
        "system": platform.platform(),
    }


@dataclass(frozen=True)
class Step:
    """A part of a run that the progress bar counts."""

    name: str
    run: Callable[[], list[Result]]


def plan(settings: Settings, groups: Sequence[str] = (), words: str = "") -> list[Step]:
    """The steps of some groups (all of them, if none is named) whose group, name or layout contains
    every one of `words`.

    Raises:
        ValueError: a group does not exist.
    """
    for name in groups:
        if name not in ALL:
            raise ValueError(f"--group {name} is not one of {', '.join(ALL)}")
    steps = []
    for name in groups or ALL:
        if name in GROUPS:
            steps += [
                Step(_text(row), partial(_run, row, settings)) for row in GROUPS[name](settings)
            ]
        else:
            steps.append(Step(name, partial(PROCESSES[name], settings.threads, settings.quick)))
    return [step for step in steps if all(word in step.name for word in words.split())]


def _text(row: Row) -> str:
    return f"{row.group} {row.name} {row.about.get('layout', '')}"


def _run(row: Row, settings: Settings) -> list[Result]:
    torch.set_num_threads(settings.threads)
    return [contend(row, settings.budget)]


def measure(
    steps: Sequence[Step], on_step: Callable[[str], None] = lambda name: None
) -> Iterator[list[Result]]:
    """Runs steps one after the other; `on_step` is told each before it begins.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; what the step at work has found is not to be trusted.
    """
    before = torch.get_num_threads()
    try:
        with interruption.noted():
            for step in steps:
                on_step(step.name)
                found = step.run()
                interruption.heed()
                yield found
    finally:
        torch.set_num_threads(before)


def report(results: Sequence[Result], settings: Settings) -> Report:
    """Results with what they were measured with."""
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": settings.threads,
        "quick": settings.quick,
        "versions": peers.versions(),
    }
    return Report(list(results), about)


def check_alike(earlier: Report, about: dict[str, Any]) -> None:
    """Raises unless a run on this machine, with these threads, of this kind can update another."""
    for name in ("machine", "threads", "quick"):
        was, now = earlier.about[name], about[name]
        if was != now:
            raise ValueError(
                f"--update: {name} was {was} and is {now}; rows of both do not belong in one "
                f"table: give another file with --out"
            )


def updated(earlier: Report, later: Report) -> Report:
    """The rows of an earlier run with those that a later one measured again in their place, and
    what is new behind them.

    Raises:
        ValueError: the runs are not of the same machine, threads and kind.
    """
    check_alike(earlier, later.about)
    rows = {_identity(result): result for result in (*earlier.results, *later.results)}
    return Report(list(rows.values()), {**later.about, "earlier": earlier.about["date"]})


_MEASURED = ("_s", "_bytes")
"""How the names of those facts about a row end that are figures of the run."""


def _identity(result: Result) -> str:
    about = {name: fact for name, fact in result.about.items() if not name.endswith(_MEASURED)}
    return json.dumps([result.group, result.name, about])


def write(made: Report, path: Path) -> None:
    """Writes a report as JSON.

    Raises:
        ValueError: the file cannot be written.
    """
    found = [asdict(verdict) for verdict in verdicts(made.results)]
    rows = [result.as_dict() for result in made.results]
    whole = {"schema": SCHEMA, **made.about, "targets": found, "rows": rows}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from None


def read(path: Path, option: str = "--from") -> Report:
    """The report that `write` wrote; `option` named the file.

    Raises:
        ValueError: there is no such report.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        rows = whole.pop("rows")
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError):
        raise ValueError(f"{option} {path} is not a report of `torchpool bench`") from None
    if whole.pop("schema") != SCHEMA:
        raise ValueError(f"{option} {path} was written by another version of `torchpool bench`")
    whole.pop("targets")
    return Report([_result(row) for row in rows], whole)


def _result(row: dict[str, Any]) -> Result:
    outcomes = {name: Outcome(**fields) for name, fields in row["outcomes"].items()}
    return Result(row["group"], row["name"], row["about"], outcomes)
