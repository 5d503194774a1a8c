"""Ctrl-C where Python drops it."""

from __future__ import annotations

import gc
import signal


def press_and_lose() -> None:
    """A Ctrl-C within a hook of the garbage collector, as JAX has one: its exception is lost."""

    def hook(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(hook)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(hook)
