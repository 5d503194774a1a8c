"""Pooling calls of real models: what is measured, as plain numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Problem:
    """One pooling call.

    Adaptive problems have `output`, the others `kernel`, `stride`, `padding` and `dilation`, each
    with one number per pooled axis.
    """

    name: str
    op: str
    """"max" or "mean"."""
    shape: tuple[int, ...]
    """(N, C, *S)."""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    ceil: bool = False
    count_include_pad: bool = True
    divisor: int | None = None
    tier: str = "core"
    layout: str = "contiguous"
    source: str = ""

    @property
    def num_axes(self) -> int:
        """Number of pooled axes."""
        return len(self.shape) - 2

    @property
    def is_adaptive(self) -> bool:
        """Whether the output size is given instead of the window."""
        return bool(self.output)

    @property
    def out_sizes(self) -> tuple[int, ...]:
        """Output elements along each pooled axis, by torch's rule."""
        if self.is_adaptive:
            return self.output
        numbers = zip(
            self.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        return tuple(_out_size(*axis, self.ceil) for axis in numbers)

    @property
    def tiling(self) -> tuple[int, ...]:
        """The kernel per axis where windows lie side by side and cover the input; else ()."""
        sizes, outs = self.shape[2:], self.out_sizes
        if any(size % out for size, out in zip(sizes, outs, strict=True)):
            return ()
        steps = tuple(size // out for size, out in zip(sizes, outs, strict=True))
        plain = self.is_adaptive or (
            self.kernel == self.stride == steps
            and not any(self.padding)
            and set(self.dilation) == {1}
        )
        return steps if plain or (math.prod(outs) == 1 and self.kernel == sizes) else ()

    @property
    def elements(self) -> tuple[int, int]:
        """Number of input and of output elements."""
        planes = math.prod(self.shape[:2])
        return math.prod(self.shape), planes * math.prod(self.out_sizes)

    @property
    def taps(self) -> int:
        """Elements looked at by a loop over whole windows."""
        if self.is_adaptive:
            return self.elements[0]
        return self.elements[1] * math.prod(self.kernel)

    def traffic(self, item_bytes: int = 4) -> int:
        """Bytes that have to move: the input once, the output once."""
        return sum(self.elements) * item_bytes

    def within(self, traffic: int, taps: float = 4.1e9) -> Problem:
        """As many of its planes as move at most `traffic` bytes and have at most `taps` elements in
        their windows: fewer samples, then fewer channels."""
        n, c, *sizes = self.shape
        share = max(self.traffic() / traffic, self.taps / taps)
        planes = max(1, int(n * c / share)) if share > 1 else n * c
        n, c = max(1, min(n, planes // c)), min(c, planes)
        return replace(self, shape=(n, c, *sizes))


def _out_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = -(-room // stride) + 1 if ceil else room // stride + 1
    return out - 1 if ceil and (out - 1) * stride >= size + padding else out


def _problem(row: dict[str, Any]) -> Problem:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
    }
    fields["name"] = fields.pop("id")
    if "kernel" in fields:
        fields.setdefault("dilation", (1,) * len(fields["kernel"]))
    return Problem(**fields)


def problems(tier: str = "core") -> list[Problem]:
    """The calls of one tier, "core" or "edge"; each names the code or thread it comes from."""
    rows = json.loads(files(__package__).joinpath("shapes.json").read_text(encoding="utf-8"))
    return [p for p in map(_problem, rows) if p.tier == tier]


def window(
    name: str, op: str, shape: tuple[int, ...], kernel: int, stride: int, padding: int = 0
) -> Problem:
    """A problem with the same window along every axis."""
    d = len(shape) - 2
    return Problem(name, op, shape, (kernel,) * d, (stride,) * d, (padding,) * d, (1,) * d)
