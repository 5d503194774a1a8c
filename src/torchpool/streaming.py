"""Pooling a signal that arrives in chunks: concatenated, the same bits as from one chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchpool import ragged
from torchpool.functional.cases import check_types, run_table
from torchpool.nn import Pool
from torchpool.reductions import Lp, Max, Mean, Reduction
from torchpool.windows import Axis, Window, Windows

__all__ = ["Stream", "streaming"]


class Stream:
    """Pools a signal chunk by chunk; made by `streaming`.

    A call takes a chunk of any size (also none, also one element) and returns the outputs whose
    windows it completes; `flush` ends the signal and returns the rest. All together they are the
    outputs of the whole signal. What is kept between calls is the part of the signal that
    windows to come still need: less than one window.

    Shape:
        chunk (*, T_i, *) along `dim` -> (*, O_i, *); all chunks agree in the other axes
    """

    def __init__(self, source: Reduction | nn.Module, window: Window, dim: int) -> None:
        self._source = source
        self.window = window
        self.dim = dim
        self.reset()

    @property
    def reduction(self) -> Any:
        """What a window becomes, with the parameter as it is now."""
        if isinstance(self._source, Pool):
            reduction = self._source.reduction
            return reduction if reduction.value is None else reduction.replace(self._source.value)
        return self._source

    def reset(self) -> None:
        """Forgets the signal; the next chunk begins another one."""
        self._seen = 0
        self._made = 0
        self._begin = 0
        self._kept: dict[str, Tensor] = {}

    def __call__(
        self, chunk: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> Any:
        """The outputs that the chunk completes.

        Args:
            chunk: the next elements along `dim`.
            mask, weights: of the chunk, broadcastable to it, as in `torchpool.pool`; in every call
                or in none.
        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        reduction = self.reduction
        check_types(chunk, reduction, self.window)
        if not -chunk.ndim <= self.dim < chunk.ndim:
            raise ValueError(f"dim={self.dim} is out of range for a chunk of {tuple(chunk.shape)}")
        given = {"x": chunk, "mask": mask, "weights": weights}
        self._append({name: t for name, t in given.items() if t is not None}, chunk)
        self._seen += chunk.shape[self.dim]
        kernel, stride, dilation = self.window.single()
        before = -self.window.spans(1, 0).low
        complete = (self._seen + before - dilation * (kernel - 1) - 1) // stride + 1
        return self._emit(reduction, max(complete, self._made))

    def flush(self) -> Any:
        """Ends the signal: the outputs whose windows reach beyond its end. The next chunk begins
        another signal.

        Raises:
            ValueError: no chunk has come, or the whole signal is too short for a window.
        """
        if "x" not in self._kept:
            raise ValueError(
                "flush() before the first chunk: its shape and dtype are not known yet"
            )
        outputs = self.window.pool_lengths(self._seen)
        if outputs == 0:
            raise ValueError(
                f"{self.window} does not fit a signal of {self._seen} elements; use a smaller "
                f"kernel or dilation, or more padding"
            )
        y = self._emit(self.reduction, outputs)
        self.reset()
        return y

    def _append(self, given: dict[str, Tensor], chunk: Tensor) -> None:
        given = {name: t if name == "x" else t.expand(chunk.shape) for name, t in given.items()}
        if self._kept and given.keys() != self._kept.keys():
            raise ValueError(
                f"this call gives {sorted(given)}, the calls before gave {sorted(self._kept)}; "
                f"give mask and weights in every call or in none"
            )
        for name, t in given.items():
            before = self._kept.get(name)
            if before is not None:
                _check_match(name, before, t, self.dim)
                t = torch.cat([before, t], self.dim)
            self._kept[name] = t

    def _emit(self, reduction: Any, outputs: int) -> Any:
        """The windows from the last made up to `outputs`; drops what no later window needs."""
        x, mask, weights = (self._kept.get(name) for name in ("x", "mask", "weights"))
        assert x is not None
        output = torch.arange(self._made, outputs)
        length = torch.tensor(self._seen)
        span = self.window.spans(length, output)
        rows = ragged.rows(span, length, output >= 0, -self._begin)[None, None, None]
        kernel, stride, dilation = self.window.single()
        size = x.shape[self.dim]
        axis = Axis(size, len(output), kernel, 1, dilation, 0, 0)
        table = ragged.Table(rows.to(x.device), axis)
        dim = self.dim % x.ndim
        y = run_table(x, reduction, self.window, table, dim, mask, weights, False, self._fill, True)
        self._made = outputs
        needed = outputs * stride + self.window.spans(1, 0).low
        drop = min(max(0, needed - self._begin), size)
        self._begin += drop
        self._kept = {
            name: t.narrow(dim, drop, size - drop).clone() if drop else t
            for name, t in self._kept.items()
        }
        return y

    @property
    def _fill(self) -> float:
        return float(getattr(self._source, "fill", 0.0))

    def state_dict(self) -> dict[str, Any]:
        """The state between two calls: numbers, and tensors of the part of the signal that is
        kept. `torch.save` takes it."""
        return {
            "seen": self._seen,
            "made": self._made,
            "begin": self._begin,
            "kept": {name: t.detach().clone() for name, t in self._kept.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, in this or another process.

        Raises:
            ValueError: not the state of a stream.
        """
        if state.keys() != {"seen", "made", "begin", "kept"}:
            raise ValueError(f"state with the entries {sorted(state)} is not that of a Stream")
        self._seen, self._made, self._begin = (int(state[k]) for k in ("seen", "made", "begin"))
        self._kept = {name: t.clone() for name, t in state["kept"].items()}

    def __repr__(self) -> str:
        return f"Stream({self._source!r}, {self.window!r}, dim={self.dim})"


def streaming(
    layer: Reduction | nn.Module, windows: Windows | None = None, *, dim: int | None = None
) -> Stream:
    """A stream that pools a signal chunk by chunk, `torchpool.pool` for what arrives over time.

    Concatenated, its outputs are the same bits for any cut into chunks, and those of `pool` with
    `lengths=` on the whole signal. Windows that look ahead come late by as much; with "causal"
    padding and stride 1 every element has its output at once.

    Args:
        layer: a reduction, with `windows`; or a layer: `nn.Pool` over a `Window`, or a MaxPool1d,
            AvgPool1d or LPPool1d of torch or torchpool.
        windows: a `Window` over one axis, with any stride, dilation and padding whose beginning
            does not depend on the length of the signal.
        dim: the axis of time; by default what the layer says, else the last.
    Raises:
        TypeError: no reduction, no windows, or a layer that is not known.
        ValueError: windows that depend on the total length (`Adaptive`, `Global`, "same" with a
            stride).

    >>> from torchpool import Max, Window
    >>> stream = streaming(Max(), Window(2, 2))
    >>> stream(torch.tensor([[1.0, 5.0, 2.0]])), stream(torch.tensor([[3.0]]))
    (tensor([[5.]]), tensor([[3.]]))
    """
    if isinstance(layer, nn.Module):
        if windows is not None:
            raise ValueError(f"{type(layer).__name__} has windows of its own; leave out windows=")
        source, windows, own = _layer(layer)
        dim = own if dim is None else dim
    else:
        source = layer
    if not isinstance(windows, Window):
        raise _refusal(windows)
    _, stride, _ = windows.single()
    if windows.padding in ("same", "same_lower") and stride > 1:
        raise ValueError(
            f"{windows}: with stride {stride}, where padding={windows.padding!r} begins depends on "
            f"the length of the whole signal; use padding='causal' or numbers"
        )
    check_types(torch.zeros(1), source if isinstance(source, Reduction) else Max(), windows)
    if not isinstance(source, (Reduction, Pool)):
        raise TypeError(f"{source!r} must be a reduction such as torchpool.Max(), or a layer")
    return Stream(source, windows, -1 if dim is None else dim)


def _refusal(windows: Any) -> Exception:
    if isinstance(windows, Windows):
        return ValueError(
            f"{windows} depends on the length of the whole signal, so it has no stream; use a "
            f"Window, or collect the signal and pool it at its end"
        )
    return TypeError(f"windows={windows!r} must be a Window such as torchpool.Window(3, stride=2)")


def _layer(layer: Any) -> tuple[Any, Any, int | None]:
    """Reduction (or the layer that has it), windows and axis of a layer."""
    if isinstance(layer, Pool):
        dims = layer.dims
        if dims is not None and not isinstance(dims, int):
            if len(dims) != 1:
                raise ValueError(f"{layer} pools the axes {tuple(dims)}; a stream has one axis")
            dims = dims[0]
        return layer, layer.windows, dims
    if isinstance(layer, nn.MaxPool1d):
        window = Window(layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                        layer.ceil_mode)  # fmt: skip
        if layer.return_indices:
            raise ValueError(f"{layer}: a stream gives values only; use return_indices=False")
        return Max(), window, -1
    if isinstance(layer, nn.AvgPool1d):
        window = Window(layer.kernel_size, layer.stride, layer.padding, 1, layer.ceil_mode)
        return Mean(count_include_pad=layer.count_include_pad), window, -1
    if isinstance(layer, nn.LPPool1d) and not layer.ceil_mode:
        return Lp(float(layer.norm_type)), Window(layer.kernel_size, layer.stride), -1
    raise TypeError(
        f"{layer} has no stream; give a reduction and a Window, nn.Pool, MaxPool1d, AvgPool1d, or "
        f"LPPool1d without ceil_mode"
    )


def _check_match(name: str, before: Tensor, chunk: Tensor, dim: int) -> None:
    shapes = [list(t.shape) for t in (before, chunk)]
    for shape in shapes:
        if len(shape) == before.ndim:
            shape[dim] = 0
    if shapes[0] != shapes[1] or before.dtype != chunk.dtype or before.device != chunk.device:
        raise ValueError(
            f"{name} of shape {tuple(chunk.shape)}, {chunk.dtype} on {chunk.device} does not go on "
            f"with the chunk before, of shape {tuple(before.shape)}, {before.dtype} on "
            f"{before.device}"
        )
