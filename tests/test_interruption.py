"""Ctrl-C, noted and heeded."""

from __future__ import annotations

import contextlib
import signal
import sys

import pytest
from ctrl_c import press_and_lose

from torchpool import interruption


def test_an_interruption_is_noted_where_python_drops_it(capfd):
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with interruption.noted():
        interruption.heed()
        press_and_lose()
        with pytest.raises(KeyboardInterrupt):
            interruption.heed()
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
    assert capfd.readouterr().err == ""
    interruption.heed()


def test_an_interruption_that_is_not_dropped_is_raised_at_once():
    with interruption.noted(), contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not raised")
    interruption.heed()


def test_an_interruption_waits_where_it_is_held():
    done = []
    with interruption.noted(), interruption.held():
        signal.raise_signal(signal.SIGINT)
        done.append("the transaction")
        with pytest.raises(KeyboardInterrupt), interruption.released():
            done.append("work")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # the second one
    assert done == ["the transaction"]
    with interruption.noted(), interruption.held():
        with pytest.raises(KeyboardInterrupt), interruption.released():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interruption.heed()
