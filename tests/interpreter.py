"""Triton's interpreter, quicker."""

from __future__ import annotations

import dataclasses
import os
from typing import Any


def hasten(*, checks_overflow: bool) -> None:
    """Makes the interpreter patch its language once for each launch, and not again for every
    function that a kernel calls, where it looks at a thousand names and finds nothing left to do.

    Args:
        checks_overflow: whether every sum and product of integers is made in 64 bits as well, which
            takes as long as all the rest.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(function: Any) -> Any:
        seen = {name for name in (tl, tl.core) if name in function.__globals__.values()}
        if seen <= patched:
            return interpreter._LangPatchScope()
        scope = patch(function)
        restore, new = scope.restore, seen - patched
        patched.update(new)
        scope.restore = lambda: (patched.difference_update(new), restore())
        return scope

    interpreter._patch_lang = once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=checks_overflow)
