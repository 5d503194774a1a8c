"""Ctrl-C, heard wherever it arrives.

Python drops an exception that is raised in a finalizer or in a hook of the garbage collector, and a
library may take it for a failure of its own; a long run then goes on as if nobody had asked it to
stop.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["heed", "held", "noted", "released"]

_noted: list[int] = []
_holds: list[bool] = [False]


@contextmanager
def noted() -> Iterator[None]:
    """Notes every Ctrl-C besides what it does, until the block ends; those that Python drops come
    without the traceback that it prints then."""

    def note(number: int, frame: Any) -> None:
        _noted.append(number)
        if not _holds[-1] or len(_noted) > 1:
            signal.default_int_handler(number, frame)

    def report(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            reported(dropped)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled, reported = signal.signal(signal.SIGINT, note), sys.unraisablehook
    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = reported
        signal.signal(signal.SIGINT, handled)
        _noted.clear()


@contextmanager
def held() -> Iterator[None]:
    """Within `noted`: the first Ctrl-C waits for `released` or `heed`, so that it does not cut a
    transaction in two, whose lock would stay; the second one does not wait."""
    _holds.append(True)
    try:
        yield
    finally:
        _holds.pop()


@contextmanager
def released() -> Iterator[None]:
    """Within `held`: a Ctrl-C is raised at once, one that waits before the block begins."""
    _holds.append(False)
    try:
        heed()
        yield
    finally:
        _holds.pop()


def heed() -> None:
    """Call it where stopping is easy.

    Raises:
        KeyboardInterrupt: a Ctrl-C was noted, whatever became of it.
    """
    if _noted:
        raise KeyboardInterrupt
