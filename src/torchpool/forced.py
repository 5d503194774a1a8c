"""The backend that the environment asks for."""

from __future__ import annotations

import os
from typing import Any

_NAME = "TORCHPOOL_BACKEND"
_encode: Any = getattr(os.environ, "encodekey", None)
_held: Any = getattr(os.environ, "_data", None)
_KEY: Any = None if _encode is None else _encode(_NAME)


def backend() -> str | None:
    """The value of TORCHPOOL_BACKEND, None where there is none; it may change at any time.

    `os.environ` says of a variable that is not set by an exception that it catches, which takes
    longer than the rest of a small call: whether there is one is asked of what it holds.
    """
    if _held is not None and _KEY not in _held:
        return None
    return os.environ.get(_NAME) or None
