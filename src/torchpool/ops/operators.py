"""The operators, each defined once with `torch.library`: schemas, kernels, composites, fakes.

Windows travel as a flat list of integers (seven per `Axis`), reductions as text (`Reduction.spec`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchpool.kernels import layout, reference
from torchpool.ops.backends import backend_of
from torchpool.ops.plain import past_the_dispatcher
from torchpool.reductions import Accumulation, Max, Selection, from_spec
from torchpool.windows import Axis

library: Any = torch.library.Library("torchpool", "DEF")  # type: ignore[no-untyped-call]
library.define(
    "select(Tensor x, Tensor? mask, Tensor? starts, str reduction, "
    "SymInt[] axes, bool save) -> (Tensor, Tensor)"
)
library.define(
    "select_backward(Tensor grad, Tensor state, Tensor? starts, SymInt[] axes, "
    "bool channels_last) -> Tensor"
)
library.define("select_take(Tensor x, Tensor state, Tensor? starts, SymInt[] axes) -> Tensor")
library.define(
    "accumulate(Tensor x, Tensor? mask, Tensor? weights, Tensor? params, Tensor? "
    "starts, str reduction, SymInt[] axes, bool save) -> (Tensor, Tensor)"
)
library.define(
    "accumulate_backward(Tensor grad, Tensor x, Tensor? mask, Tensor? weights, "
    "Tensor? params, Tensor? starts, Tensor stats, str reduction, SymInt[] axes, "
    "bool channels_last, bool[] needs) -> (Tensor, Tensor, Tensor)"
)


def pack(axes: Sequence[Axis]) -> list[int]:
    """Axes as the flat list of integers that operators take."""
    return [number for axis in axes for number in axis]


def unpack(numbers: Sequence[int]) -> tuple[Axis, ...]:
    """The inverse of `pack`; tuples, which repeated calls give, are remembered."""
    return _known(numbers) if type(numbers) is tuple else _unpacked(numbers)


def _unpacked(numbers: Sequence[int]) -> tuple[Axis, ...]:
    width = len(Axis._fields)
    return tuple(Axis(*numbers[i : i + width]) for i in range(0, len(numbers), width))


_known = lru_cache(maxsize=1024)(_unpacked)


def select_kernel(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: str,
    axes: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    return run_select(x, mask, starts, from_spec(reduction), unpack(axes), save)


def run_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: tuple[Axis, ...],
    save: bool,
) -> tuple[Tensor, Tensor]:
    case = (layout.dense(x), mask, starts, reduction, axes)
    backend = backend_of("select", x.device, *case, table=reference.is_table(starts))
    result: tuple[Tensor, Tensor] = backend.select(*case, save)
    return result


def _select_backward(
    grad: Tensor,
    state: Tensor,
    starts: Tensor | None,
    axes: Sequence[int],
    channels_last: bool,
) -> Tensor:
    grad, state = (layout.to_layout(t, channels_last) for t in (grad, state))
    windows = unpack(axes)
    case = (grad, None, starts, Max(), windows)
    backend = backend_of("select", grad.device, *case, table=reference.is_table(starts))
    result: Tensor = backend.select_backward(grad, state, starts, windows, channels_last)
    return result


def _select_take(x: Tensor, state: Tensor, starts: Tensor | None, axes: Sequence[int]) -> Tensor:
    return reference.select_take(x, state, starts, unpack(axes))


def _from_starts(starts: Tensor, device: torch.device, *case: Any) -> ModuleType:
    """The backend of an accumulation over windows that `starts` gives."""
    if reference.is_table(starts):
        return backend_of("accumulate", device, *case, table=True)
    return reference


def accumulate_kernel(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    starts: Tensor | None,
    reduction: str,
    axes: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (x, mask, weights, params, starts)
    return run_accumulate(*tensors, from_spec(reduction), unpack(axes), save)


def run_accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    starts: Tensor | None,
    reduction: Accumulation,
    axes: tuple[Axis, ...],
    save: bool,
) -> tuple[Tensor, Tensor]:
    case = (layout.dense(x), mask, weights, params, reduction, axes)
    if starts is not None:
        backend = _from_starts(starts, x.device, *case)
        made: tuple[Tensor, Tensor] = backend.accumulate(*case, save, starts)
        return made
    backend = backend_of("accumulate", x.device, *case)
    result: tuple[Tensor, Tensor] = backend.accumulate(*case, save)
    return result


def _accumulate_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    starts: Tensor | None,
    stats: Tensor,
    reduction: str,
    axes: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad = layout.to_layout(grad, channels_last)
    kind, windows = from_spec(reduction), unpack(axes)
    x = layout.to_layout(x, channels_last) if x.numel() else x
    case = (x if x.numel() else grad, mask, weights, params, kind, windows)
    given = (grad, x, mask, weights, params, stats, kind, windows, needs, channels_last)
    if starts is not None:
        backend = _from_starts(starts, grad.device, *case)
        gx, gw, gp = backend.accumulate_backward(*given, starts)
    else:
        backend = backend_of("accumulate", grad.device, *case)
        gx, gw, gp = backend.accumulate_backward(*given)
    dtype = layout.compute_dtype(grad.dtype)
    return (
        gx if needs[0] else grad.new_empty(0),
        gw.to(dtype).contiguous() if needs[1] else grad.new_empty(0, dtype=dtype),
        gp if needs[2] else grad.new_empty(0, dtype=dtype),
    )


for _name, _kernel in {
    "select": select_kernel,
    "select_backward": _select_backward,
    "select_take": _select_take,
    "accumulate": accumulate_kernel,
    "accumulate_backward": _accumulate_backward,
}.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")


# Composites of the gradients: ordinary operators, through which tangents pass


def _composite_select_backward(
    grad: Tensor,
    state: Tensor,
    starts: Tensor | None,
    axes: Sequence[int],
    channels_last: bool,
) -> Tensor:
    return reference.select_backward(grad, state, starts, unpack(axes), channels_last)


def _composite_accumulate_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    starts: Tensor | None,
    stats: Tensor,
    reduction: str,
    axes: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    gx, gw, gp = reference.composite_accumulate_backward(
        grad,
        kept_or_zeros(x, grad, axes),
        mask,
        weights,
        params,
        from_spec(reduction),
        unpack(axes),
        needs,
        starts,
    )
    return None if gx is None else layout.to_layout(gx.to(grad.dtype), channels_last), gw, gp


def kept_or_zeros(x: Tensor, grad: Tensor, axes: Sequence[int]) -> Tensor:
    """The input, or zeros of its shape where it was not kept because no gradient reads it."""
    return x if x.numel() else grad.new_zeros(()).expand(*grad.shape[:2], *_ins(axes))


call_select_backward = past_the_dispatcher(
    "select_backward", _select_backward, _composite_select_backward, 3
)
call_select_take = past_the_dispatcher("select_take", _select_take, _select_take, 3)
call_accumulate_backward = past_the_dispatcher(
    "accumulate_backward", _accumulate_backward, _composite_accumulate_backward, 7
)


# Fakes


def _outs(axes: Sequence[int]) -> list[int]:
    return [axis.out_size for axis in unpack(axes)]


def _ins(axes: Sequence[int]) -> list[int]:
    return [axis.in_size for axis in unpack(axes)]


def _fake_select(
    x: Tensor, mask: Any, starts: Any, reduction: str, axes: Sequence[int], save: bool
) -> tuple[Tensor, Tensor]:
    y = layout.empty_like(x, _outs(axes))
    dtype = layout.state_dtype(unpack(axes))
    return y, layout.empty_like(x, _outs(axes), dtype) if save else x.new_empty(0, dtype=dtype)


def _fake_select_backward(
    grad: Tensor, state: Tensor, starts: Any, axes: Sequence[int], channels_last: bool
) -> Tensor:
    return layout.empty(grad, _ins(axes), channels_last)


def _fake_select_take(x: Tensor, state: Tensor, starts: Any, axes: Sequence[int]) -> Tensor:
    return layout.empty_like(state, _outs(axes), x.dtype)


def _fake_accumulate(
    x: Tensor,
    mask: Any,
    weights: Any,
    params: Any,
    starts: Any,
    reduction: str,
    axes: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    kind = from_spec(reduction)
    return layout.empty_like(
        x, _outs(axes), layout.result_dtype(x.dtype, kind)
    ), layout.empty_stats(x, _outs(axes), kind, save)


def _fake_accumulate_backward(
    grad: Tensor,
    x: Any,
    mask: Any,
    weights: Any,
    params: Tensor | None,
    starts: Any,
    stats: Any,
    reduction: str,
    axes: Sequence[int],
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*grad.shape[:2], *_ins(axes))
    dtype = layout.compute_dtype(grad.dtype)
    gx = layout.empty(grad, _ins(axes), channels_last) if needs[0] else grad.new_empty(0)
    gw = grad.new_empty(shape if needs[1] else (0,), dtype=dtype)
    gp = grad.new_empty(params.shape if needs[2] and params is not None else (0,), dtype=dtype)
    return gx, gw, gp


_fakes: dict[str, Any] = {
    "select": _fake_select,
    "select_backward": _fake_select_backward,
    "select_take": _fake_select_take,
    "accumulate": _fake_accumulate,
    "accumulate_backward": _fake_accumulate_backward,
}
for _name, _fake in _fakes.items():
    torch.library.register_fake(f"torchpool::{_name}", _fake, lib=library)
