"""Defects of pooling elsewhere: each is a test that carries its row of the page
`docs/known-defects.md`. Run this file to write the page."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "known-defects.md"
_INTRO = """# Known pooling defects elsewhere

What users of pooling meet in PyTorch and in other libraries, and what torchpool does instead. Every
row is a test of torchpool, which also shows torch's own behaviour where the tested version has it
(marked *seen*); the page is made from those tests by `python tests/defects.py`.

| | defect | threads | torchpool | test |
|--|--|--|--|--|
"""


class Defect(NamedTuple):
    """A row of the page."""

    row: int
    pain: str
    here: str
    threads: str
    seen: bool
    test: str


_found: list[Defect] = []


def defect(
    row: int, pain: str, here: str, threads: str, seen: bool = False
) -> Callable[[Any], Any]:
    """Marks a test as the proof of a row.

    Args:
        row: number of the defect; rows with the same number stand below each other.
        pain: what happens elsewhere, one sentence.
        here: what torchpool does, one sentence.
        threads: where it was reported: "#123" of pytorch/pytorch, or "owner/name#123", with spaces.
        seen: whether the test also shows the defect in the tested version of torch.
    """

    def mark(test: Any) -> Any:
        place = f"{Path(test.__code__.co_filename).name}::{test.__name__}"
        _found.append(Defect(row, pain, here, threads, seen, place))
        return test

    return mark


def _link(thread: str) -> str:
    repository, _, number = thread.partition("#")
    address = f"https://github.com/{repository or 'pytorch/pytorch'}/issues/{number}"
    return f"[{thread}]({address})"


def page() -> str:
    """The page, from every test file that marks a defect."""
    for file in sorted(TESTS.glob("test_*.py")):
        if re.search(r"^@defect\(", file.read_text(encoding="utf-8"), re.MULTILINE):
            importlib.import_module(file.stem)
    rows = sorted(set(_found), key=lambda d: (d.row, d.test))
    return _INTRO + "".join(
        f"| {d.row} | {d.pain}{' *(seen)*' if d.seen else ''} | "
        f"{' '.join(map(_link, d.threads.split()))} | {d.here} | `{d.test}` |\n"
        for d in rows
    )


if __name__ == "__main__":
    sys.modules.setdefault("defects", sys.modules["__main__"])
    PAGE.write_text(page(), encoding="utf-8")
