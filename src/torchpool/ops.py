"""The engine: operator schemas, fakes, autograd, and which backend runs.

Each operator is defined once with `torch.library`. The device decides which kernels are asked first
(Numba on the CPU, Triton on CUDA); a kernel that does not
serve a case says why, and the reference runs. Windows travel as a flat list of integers (seven per
`Axis`), reductions as text (`Reduction.spec`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchpool import forced
from torchpool.kernels import layout, reference
from torchpool.reductions import Accumulation, Max, Reduction, Selection, from_spec
from torchpool.windows import Axis

_BACKENDS = {
    "cpu": "torchpool.kernels.cpu",
    "gpu": "torchpool.kernels.gpu",
    "reference": "torchpool.kernels.reference",
}
_TABLES = {
    "cpu": "torchpool.kernels.cpu.segments",
    "gpu": "torchpool.kernels.gpu_segments",
    "reference": "torchpool.kernels.reference",
}
"""Who serves windows that a table gives (see `reference.is_table`)."""
_FIRST = {"cpu": "cpu", "cuda": "gpu"}

_library: Any = torch.library.Library("torchpool", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "select(Tensor x, Tensor? mask, Tensor? starts, str reduction, "
    "SymInt[] axes, bool save) -> (Tensor, Tensor)"
)
_library.define(
    "select_backward(Tensor grad, Tensor state, Tensor? starts, SymInt[] axes, "
    "bool channels_last) -> Tensor"
)
_library.define("select_take(Tensor x, Tensor state, Tensor? starts, SymInt[] axes) -> Tensor")
_library.define(
    "accumulate(Tensor x, Tensor? mask, Tensor? weights, Tensor? params, Tensor? "
    "starts, str reduction, SymInt[] axes, bool save) -> (Tensor, Tensor)"
)
_library.define(
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


# Which backend runs


def refusals(
    operation: str, device: torch.device, *case: Any, table: bool = False
) -> tuple[ModuleType, dict[str, str]]:
    """The backend that serves a case, and why those asked before it do not.

    Args:
        operation: "select" or "accumulate".
        device: where the input lies.
        case: the arguments of the backends' `why_not_<operation>`.
        table: the windows come as a table.
    Raises:
        ValueError: TORCHPOOL_BACKEND names no backend, or one that does not serve the case.
    """
    asked = forced.backend()
    if asked is not None and asked not in _BACKENDS:
        raise ValueError(f"TORCHPOOL_BACKEND={asked!r} must be one of {', '.join(_BACKENDS)}")
    reasons: dict[str, str] = {}
    for name in (asked,) if asked else (_FIRST.get(device.type), "reference"):
        if name is None:
            continue
        backend = _load((_TABLES if table else _BACKENDS)[name])
        if isinstance(backend, str):
            reasons[name] = backend
            continue
        reason = getattr(backend, f"why_not_{operation}")(*case)
        if reason is None:
            return backend, reasons
        reasons[name] = reason
    raise ValueError(
        f"TORCHPOOL_BACKEND={asked!r} does not serve this case: {reasons[asked or 'reference']}"
    )


@cache
def _load(module: str) -> ModuleType | str:
    """A backend, or why there is none."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("torchpool"):
            raise
        return f"{error.name} is not installed"


def _backend(operation: str, device: torch.device, *case: Any, table: bool = False) -> ModuleType:
    return refusals(operation, device, *case, table=table)[0]


# Calls


def select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: tuple[Axis, ...],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """`torchpool::select`, past the dispatcher where nothing there has anything to do."""
    tensors = (x, mask, starts)
    if not is_plain(*tensors):
        operator: Any = torch.ops.torchpool.select
    elif is_watched(*tensors):
        operator = _select_directly
    else:
        return _run_select(*tensors, reduction, axes, save)
    made: tuple[Tensor, Tensor] = operator(*tensors, reduction.spec, pack(axes), save)
    return made


def accumulate(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    params: Tensor | None,
    starts: Tensor | None,
    reduction: Accumulation,
    axes: tuple[Axis, ...],
    save: bool,
) -> tuple[Tensor, Tensor]:
    """`torchpool::accumulate`, likewise."""
    tensors = (x, mask, weights, params, starts)
    if not is_plain(*tensors):
        operator: Any = torch.ops.torchpool.accumulate
    elif is_watched(*tensors):
        operator = _accumulate_directly
    else:
        # A parameter as an operator gets it: None, as in every cached description.
        return _run_accumulate(*tensors, from_spec(reduction.spec), axes, save)
    made: tuple[Tensor, Tensor] = operator(*tensors, reduction.spec, pack(axes), save)
    return made


def ready(
    x: Tensor,
    reduction: Selection | Accumulation,
    axes: tuple[Axis, ...],
    on_cpu: bool,
    watched: bool,
) -> Any:
    """The values of all windows as a function of plain tensors like x, prepared once; None of a
    formula that no backend prepares.

    Args:
        on_cpu: where these tensors lie.
        watched: a gradient is asked for.
    """
    prepared = _prepared(x, reduction, axes, watched) if on_cpu else None
    if prepared is None and reduction.value is not None:
        return None
    if watched:
        return _ready_for_gradients(x, reduction, axes, prepared)
    if prepared is not None:
        return prepared
    if isinstance(reduction, Selection):
        return lambda x: _run_select(x, None, None, reduction, axes, False)[0]
    return lambda x: _run_accumulate(x, None, None, None, None, reduction, axes, False)[0]


def _prepared(
    x: Tensor, reduction: Selection | Accumulation, axes: tuple[Axis, ...], watched: bool
) -> Any:
    """What the CPU's backend prepares; None where that is nothing."""
    operation = "select" if isinstance(reduction, Selection) else "accumulate"
    others = (None,) * (2 if operation == "select" else 3)
    backend = _backend(operation, torch.device("cpu"), x, *others, reduction, axes)
    prepare = getattr(backend, "ready_to_train" if watched else "ready", None)
    return None if prepare is None else prepare(x, reduction, axes)


def _ready_for_gradients(
    x: Tensor, reduction: Selection | Accumulation, axes: tuple[Axis, ...], prepared: Any
) -> Any:
    """The same where a gradient is asked for. What a backend prepared is not differentiable itself:
    further derivatives go through the operators of the gradient."""
    numbers, last = tuple(pack(axes)), layout.is_channels_last(x)
    if prepared is None:
        spec = reduction.spec
        if isinstance(reduction, Selection):
            return lambda x: _select_directly(x, None, None, spec, numbers, True)[0]
        return lambda x: _accumulate_directly(x, None, None, None, None, spec, numbers, True)[0]

    def by_operator(grad: Tensor, kept: Tensor | None, x: Tensor | None) -> Tensor:
        return _gradient(reduction, grad, kept, x, None, numbers, last)

    call: Any = _Ready.apply
    return lambda x: call(x, prepared, by_operator)


def over_runs(x: Tensor, reduction: Any, dim: int, table: Any) -> Tensor | None:
    """One value for each run of rows of a plain, contiguous tensor on the CPU; None where its
    backend serves it as everything else.

    Args:
        dim: the axis of the rows.
        table: int64 array (N or 1, runs, 3): first row, number of rows, 0.
    """
    backend, watched = _load(_TABLES["cpu"]), is_watched(x)
    if isinstance(backend, str):
        return None
    prepared = backend.over_runs(x, reduction, dim, table, watched)
    if prepared is None:
        return None
    if not watched:
        y: Tensor = prepared.forward(x)[0]
        return y
    shape, size = x.shape, x.shape[dim]

    def by_operator(grad: Tensor, kept: Tensor | None, x: Tensor | None) -> Tensor:
        def planes(t: Tensor) -> Tensor:
            return t.reshape(math.prod(shape[:dim]), t.shape[dim], -1).movedim(1, 2)

        numbers = tuple(pack([Axis(size, table.shape[1], size, 1, 1, 0, 0)]))
        grad, rows = planes(grad.contiguous()), torch.from_numpy(table)[:, None, None]
        if len(rows) > 1:
            rows = rows.repeat_interleave(len(grad) // len(rows), 0)
        last = layout.is_channels_last(grad)
        if isinstance(reduction, Selection) and kept is not None:
            kept = planes(kept)
        x = None if x is None else planes(x)
        gx = _gradient(reduction, grad, kept, x, rows, numbers, last)
        return gx.movedim(2, 1).reshape(shape)

    call: Any = _Ready.apply
    made: Tensor = call(x, prepared, by_operator)
    return made


def _gradient(
    reduction: Any,
    grad: Tensor,
    kept: Tensor | None,
    x: Tensor | None,
    starts: Tensor | None,
    numbers: Sequence[int],
    channels_last: bool,
) -> Tensor:
    """The gradient by x, by the operators, which are differentiable themselves. A selection kept
    its winners, a formula its sums and x, a sum or mean nothing."""
    if isinstance(reduction, Selection):
        by_winner: Tensor = _call_select_backward(grad, kept, starts, numbers, channels_last)
        return by_winner
    empty, p = grad.new_empty(0), reduction.value
    dtype = layout.compute_dtype(grad.dtype)
    params = None if p is None else torch.full((1,), p, dtype=dtype, device=grad.device)
    given = (grad, empty if x is None else x, None, None, params, starts)
    stats = empty.to(dtype) if kept is None else kept
    options = (reduction.spec, numbers, channels_last, [True, False, False])
    gx: Tensor = _call_accumulate_backward(*given, stats, *options)[0]
    return gx


class _Ready(torch.autograd.Function):
    """A call of which a backend has prepared both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prepared: Any, by_operator: Any) -> Tensor:
        y, state = prepared.forward(x)
        ctx.save_for_backward(state, x if prepared.keeps_x else None)
        ctx.prepared, ctx.by_operator = prepared, by_operator
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        state, x = ctx.saved_tensors
        is_first = is_plain(grad, x) and not is_watched(grad, x)
        is_as_saved = x is None or x.dtype == grad.dtype  # hooks may have changed it
        gradient = ctx.prepared.backward if is_first and is_as_saved else ctx.by_operator
        return gradient(grad, state, x), None, None


def _past_the_dispatcher(name: str, kernel: Any, composite: Any, count: int) -> Any:
    """An operator of `count` tensors and more: called directly where nothing else has anything to
    do, and written out as its composite where a tangent may come with them, which an operator
    would drop."""
    operator = getattr(torch.ops.torchpool, name)

    def call(*args: Any) -> Any:
        tensors = args[:count]
        if is_plain(*tensors) and not is_watched(*tensors):
            return kernel(*args)
        return composite(*args) if in_forward_mode() else operator(*args)

    return call


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents: torch's level of dual numbers is open, by
    `forward_ad.dual_level` or by `torch.func.jvp` and what is built on it."""
    return forward_ad._current_level >= 0


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no transform, mode, tracer or profiler asks for these tensors."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or in_forward_mode()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    return all(t is None or _is_memory(t) for t in tensors)


def _is_memory(t: Tensor) -> bool:
    """Whether a tensor's elements lie in memory as they are: not those of a batch of gradients,
    which `torch.autograd.grad` makes with is_grads_batched."""
    return type(t) in _PLAIN and torch._C._has_storage(t) and not t.is_neg()


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


# Kernels


def _select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: str,
    axes: Sequence[int],
    save: bool,
) -> tuple[Tensor, Tensor]:
    return _run_select(x, mask, starts, from_spec(reduction), unpack(axes), save)


def _run_select(
    x: Tensor,
    mask: Tensor | None,
    starts: Tensor | None,
    reduction: Selection,
    axes: tuple[Axis, ...],
    save: bool,
) -> tuple[Tensor, Tensor]:
    case = (layout.dense(x), mask, starts, reduction, axes)
    backend = _backend("select", x.device, *case, table=reference.is_table(starts))
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
    backend = _backend("select", grad.device, *case, table=reference.is_table(starts))
    result: Tensor = backend.select_backward(grad, state, starts, windows, channels_last)
    return result


def _select_take(x: Tensor, state: Tensor, starts: Tensor | None, axes: Sequence[int]) -> Tensor:
    return reference.select_take(x, state, starts, unpack(axes))


def _from_starts(starts: Tensor, device: torch.device, *case: Any) -> ModuleType:
    """The backend of an accumulation over windows that `starts` gives."""
    if reference.is_table(starts):
        return _backend("accumulate", device, *case, table=True)
    return reference


def _accumulate(
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
    return _run_accumulate(*tensors, from_spec(reduction), unpack(axes), save)


def _run_accumulate(
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
    result: tuple[Tensor, Tensor] = _backend("accumulate", x.device, *case).accumulate(*case, save)
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
        backend = _backend("accumulate", grad.device, *case)
        gx, gw, gp = backend.accumulate_backward(*given)
    dtype = layout.compute_dtype(grad.dtype)
    return (
        gx if needs[0] else grad.new_empty(0),
        gw.to(dtype).contiguous() if needs[1] else grad.new_empty(0, dtype=dtype),
        gp if needs[2] else grad.new_empty(0, dtype=dtype),
    )


for _name, _kernel in {
    "select": _select,
    "select_backward": _select_backward,
    "select_take": _select_take,
    "accumulate": _accumulate,
    "accumulate_backward": _accumulate_backward,
}.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


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
        _kept_or_zeros(x, grad, axes),
        mask,
        weights,
        params,
        from_spec(reduction),
        unpack(axes),
        needs,
        starts,
    )
    return None if gx is None else layout.to_layout(gx.to(grad.dtype), channels_last), gw, gp


def _kept_or_zeros(x: Tensor, grad: Tensor, axes: Sequence[int]) -> Tensor:
    """The input, or zeros of its shape where it was not kept because no gradient reads it."""
    return x if x.numel() else grad.new_zeros(()).expand(*grad.shape[:2], *_ins(axes))


_call_select_backward = _past_the_dispatcher(
    "select_backward", _select_backward, _composite_select_backward, 3
)
_call_select_take = _past_the_dispatcher("select_take", _select_take, _select_take, 3)
_call_accumulate_backward = _past_the_dispatcher(
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
    torch.library.register_fake(f"torchpool::{_name}", _fake, lib=_library)


# Autograd


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, starts, _, ctx.axes, save = inputs
    ctx.channels_last = layout.is_channels_last(x)
    _keep_aside(ctx, output[1])
    ctx.save_for_backward(output[1] if save else None, mask, starts)


def _keep_aside(ctx: Any, state: Tensor) -> None:
    """Says that an output has no gradient, of which autograd would otherwise make zeros."""
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _select_grad(ctx: Any, grad: Tensor | None, _state: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    state, mask, starts = ctx.saved_tensors
    if state is None:
        raise RuntimeError(
            "torchpool::select was called with save=False, so it cannot "
            "be differentiated; call it through tp.pool"
        )
    gx = _call_select_backward(grad, state, starts, ctx.axes, ctx.channels_last)
    # A window with no valid element points to its first element: that gets nothing.
    return gx if mask is None else gx.masked_fill(~mask, 0), None, None, None, None, None


def _save_select_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, state, starts, ctx.axes, _ = inputs
    ctx.save_for_backward(state, starts)


def _select_backward_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    state, starts = ctx.saved_tensors
    return _call_select_take(grad, state, starts, ctx.axes), None, None, None, None


def _save_select_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, state, starts, ctx.axes = inputs
    ctx.channels_last = layout.is_channels_last(x)
    ctx.save_for_backward(state, starts)


def _select_take_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    state, starts = ctx.saved_tensors
    gx = _call_select_backward(grad, state, starts, ctx.axes, ctx.channels_last)
    return gx, None, None, None


def _save_accumulate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, weights, params, starts, ctx.reduction, ctx.axes, _ = inputs
    _keep_aside(ctx, output[1])
    kind: Reduction = from_spec(ctx.reduction)
    ctx.channels_last = layout.is_channels_last(x)
    keeps_x = not kind.linear or weights is not None  # type: ignore[attr-defined]
    ctx.save_for_backward(
        x if keeps_x else x.new_empty(0),
        mask,
        weights,
        params,
        starts,
        output[1] if output[1].numel() else None,
    )


def _accumulate_grad(ctx: Any, grad: Tensor | None, _stats: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    x, mask, weights, params, starts, stats = ctx.saved_tensors
    needs = [
        ctx.needs_input_grad[0],
        weights is not None and ctx.needs_input_grad[2],
        params is not None and ctx.needs_input_grad[3],
    ]
    stats = grad.new_empty(0, dtype=layout.compute_dtype(grad.dtype)) if stats is None else stats
    gx, gw, gp = _call_accumulate_backward(
        grad,
        x,
        mask,
        weights,
        params,
        starts,
        stats,
        ctx.reduction,
        ctx.axes,
        ctx.channels_last,
        needs,
    )
    return (
        gx if needs[0] else None,
        None,
        gw.to(weights.dtype) if needs[1] else None,
        gp if needs[2] else None,
        None,
        None,
        None,
        None,
    )


def _save_accumulate_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    grad, x, mask, weights, params, starts, _, ctx.reduction, ctx.axes, _, ctx.needs = inputs
    ctx.save_for_backward(grad, x, mask, weights, params, starts)


def _accumulate_double_grad(ctx: Any, *outer: Any) -> tuple[Any, ...]:
    """Differentiates the composite of the hand-written derivatives."""
    grad, x, mask, weights, params, starts = ctx.saved_tensors
    kind, axes = from_spec(ctx.reduction), unpack(ctx.axes)
    inputs = (grad, _kept_or_zeros(x, grad, ctx.axes), weights, params)

    def first(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        g, v, w, p = (None if t is None else next(rest) for t in inputs)
        assert g is not None
        assert v is not None
        made = reference.composite_accumulate_backward(
            g, v, mask, w, p, kind, axes, ctx.needs, starts
        )
        return tuple(m for m in made if m is not None)

    # Not torch.autograd.grad: what it gives here could not be differentiated once more.
    made, pull = torch.func.vjp(  # type: ignore[misc]
        first, *(t for t in inputs if t is not None)
    )
    above = [o for o, need in zip(outer, ctx.needs, strict=True) if need]
    found = iter(pull(tuple(o.to(m.dtype) for o, m in zip(above, made, strict=True))))
    gg, gx, gw, gp = (None if t is None else next(found) for t in inputs)
    return (
        gg,
        gx if x.numel() else None,
        None,
        gw,
        gp,
        None,
        None,
        None,
        None,
        None,
        None,
    )


def _without_dispatcher(kernel: Any, save: Any, gradient: Any) -> Any:
    """An operator of plain tensors, which need no dispatcher on their way to the same kernel and
    the same gradient."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            made = kernel(*args)
            save(ctx, args, made)
            return made

        backward = staticmethod(gradient)

    return Direct.apply


_select_directly = _without_dispatcher(_select, _save_select, _select_grad)
_accumulate_directly = _without_dispatcher(_accumulate, _save_accumulate, _accumulate_grad)


torch.library.register_autograd(
    "torchpool::select", _select_grad, setup_context=_save_select, lib=_library
)
torch.library.register_autograd(
    "torchpool::select_backward",
    _select_backward_grad,
    setup_context=_save_select_backward,
    lib=_library,
)
torch.library.register_autograd(
    "torchpool::select_take", _select_take_grad, setup_context=_save_select_take, lib=_library
)
torch.library.register_autograd(
    "torchpool::accumulate", _accumulate_grad, setup_context=_save_accumulate, lib=_library
)
torch.library.register_autograd(
    "torchpool::accumulate_backward",
    _accumulate_double_grad,
    setup_context=_save_accumulate_backward,
    lib=_library,
)


# Batching (torch.vmap)


def _one_by_one(
    operator: Any, size: int, dims: Sequence[Any], args: Sequence[Any]
) -> tuple[Any, Any]:
    """Runs an operator for each sample of the mapped axis and stacks the results."""
    calls = [
        operator(
            *(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, dims, strict=True))
        )
        for i in range(size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])


def _fold(size: int, dim: int | None, t: Tensor | None) -> Tensor | None:
    """A mapped (or shared) tensor (N, C, ...) as one batch of size * N."""
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _map_folded(operator: Any, planes: Sequence[int]) -> Any:
    """A vmap rule that puts the mapped axis into the batch axis of the arguments at `planes`, where
    nothing else is mapped."""

    def rule(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        if any(isinstance(dim, int) and i not in planes for i, dim in enumerate(dims)):
            return _one_by_one(operator, info.batch_size, dims, args)
        folded = [
            _fold(info.batch_size, dims[i], a) if i in planes else a for i, a in enumerate(args)
        ]
        outputs = operator(*folded)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        made = tuple(
            o.unflatten(0, (info.batch_size, -1))
            if o.ndim > 1
            else o.expand(info.batch_size, *o.shape)
            for o in several
        )
        return (made, (0,) * len(made)) if isinstance(outputs, tuple) else (made[0], 0)

    return rule


def _map_accumulate(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    if from_spec(args[5]).linear or not args[7]:
        return _folded_accumulate(info, dims, *args)  # type: ignore[no-any-return]
    return _one_by_one(torch.ops.torchpool.accumulate, info.batch_size, dims, args)


def _map_accumulate_backward(info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    return _one_by_one(torch.ops.torchpool.accumulate_backward, info.batch_size, dims, args)


_folded_accumulate = _map_folded(torch.ops.torchpool.accumulate, (0, 1, 2, 4))
torch.library.register_vmap(
    "torchpool::select", _map_folded(torch.ops.torchpool.select, (0, 1, 2)), lib=_library
)
torch.library.register_vmap(
    "torchpool::select_backward",
    _map_folded(torch.ops.torchpool.select_backward, (0, 1, 2)),
    lib=_library,
)
torch.library.register_vmap(
    "torchpool::select_take", _map_folded(torch.ops.torchpool.select_take, (0, 1, 2)), lib=_library
)
torch.library.register_vmap("torchpool::accumulate", _map_accumulate, lib=_library)
torch.library.register_vmap(
    "torchpool::accumulate_backward", _map_accumulate_backward, lib=_library
)
