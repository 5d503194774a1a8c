"""The operators under `torch.vmap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchpool.ops.operators import library
from torchpool.reductions import from_spec


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
    "torchpool::select", _map_folded(torch.ops.torchpool.select, (0, 1, 2)), lib=library
)
torch.library.register_vmap(
    "torchpool::select_backward",
    _map_folded(torch.ops.torchpool.select_backward, (0, 1, 2)),
    lib=library,
)
torch.library.register_vmap(
    "torchpool::select_take", _map_folded(torch.ops.torchpool.select_take, (0, 1, 2)), lib=library
)
torch.library.register_vmap("torchpool::accumulate", _map_accumulate, lib=library)
torch.library.register_vmap("torchpool::accumulate_backward", _map_accumulate_backward, lib=library)
