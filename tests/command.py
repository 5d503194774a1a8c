"""The command line, called by tests in their own process."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from torchpool.cli import main


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str, cwd: Path) -> Done:
    """Runs `torchpool ARGUMENTS` in a folder, whose modules are forgotten afterwards."""
    known = set(sys.modules)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        for file in cwd.glob("*.py"):
            patch.delitem(sys.modules, file.stem, raising=False)
        patch.setattr(sys, "argv", ["torchpool", *arguments])
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with streams[0], streams[1], pytest.raises(SystemExit) as end:
            main()
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(cwd)):
            del sys.modules[name]
    return Done(int(end.value.code or 0), out.getvalue(), err.getvalue())
