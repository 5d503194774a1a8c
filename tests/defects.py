"""Defects of pooling elsewhere: each is a test that carries its entry of the page
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

What users of pooling meet in PyTorch and in other libraries, and what torchpool does instead. Each
entry is a test of torchpool; where it says "seen", the test also shows the defect in the version of
torch that is tested. The page is made from the tests by `python tests/defects.py`.
"""


class Defect(NamedTuple):
    """An entry of the page."""

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
    """Marks a test as the proof of an entry.

    Args:
        row: number of the defect; entries with the same number stand below each other.
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
    return _INTRO + "".join(map(_entry, sorted(set(_found), key=lambda d: (d.row, d.test))))


def _entry(d: Defect) -> str:
    threads = ", ".join(map(_link, d.threads.split()))
    seen = " Seen in torch." if d.seen else ""
    return f"\n**{d.row}. {d.pain}** {d.here}\n\n> Reported in {threads}.{seen} Test: `{d.test}`\n"


if __name__ == "__main__":
    sys.modules.setdefault("defects", sys.modules["__main__"])
    PAGE.write_text(page(), encoding="utf-8")
