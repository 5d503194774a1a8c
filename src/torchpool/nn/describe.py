"""How a layer shows its arguments."""

from typing import Any


def describe(*positional: Any, **named: Any) -> str:
    """Arguments as in a constructor's call; named ones that are None are left out.

    >>> describe(3, stride=2, dims=None)
    '3, stride=2'
    """
    pairs = [f"{name}={value!r}" for name, value in named.items() if value is not None]
    return ", ".join([*map(repr, positional), *pairs])
