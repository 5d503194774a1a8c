"""Formulas of reductions compiled for kernels."""

from __future__ import annotations


def why_not(kind: type) -> str | None:
    """Why the formulas of a reduction cannot be compiled; None where they can."""
    return f"{kind.__name__} has no CPU kernel"
