"""A whole model before and after `torchpool.convert`: time, and bytes saved for the backward
pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from torchpool.analysis import saved_bytes
from torchpool.bench.contest import difference
from torchpool.bench.timing import Call, Timing, in_turns
from torchpool.convert import Report, convert


@dataclass(frozen=True)
class Comparison:
    """A model as it was and as it is with torchpool's layers."""

    report: Report
    """What was swapped."""
    times: tuple[tuple[str, Timing, Timing], ...]
    """What was timed, before and after."""
    saved_bytes: tuple[int, int]
    """Bytes kept at the end of the forward pass of a training step, before and after."""
    difference: str | None
    """How the results of the two differ in evaluation; None where they agree."""


def compare(model: nn.Module, x: Tensor, budget: float = 3.0) -> Comparison:
    """Times a model's inference and its training step with and without torchpool, in turns.

    Args:
        model: takes x; what it returns may be a tensor or any nest of tensors.
        budget: seconds of timing for each of the four.
    Raises:
        ValueError: the model does not take x, or returns nothing that has a gradient.
    """
    before, after = copy.deepcopy(model), copy.deepcopy(model)
    report = convert(after)
    models = (before, after)
    for m in models:
        m.eval()
    with torch.no_grad():
        results = [_tensors(_called(m, x)) for m in models]
    apart = next(filter(None, map(_difference, *results)), None)
    times = [("inference", *_times(models, partial(_infer, x=x), budget))]
    for m in models:
        m.train()
    times.append(("training step", *_times(models, partial(_train, x=x), budget)))
    kept = (saved_bytes(before, x), saved_bytes(after, x))
    return Comparison(report, tuple(times), kept, apart)


def _difference(found: Tensor, wanted: Tensor) -> str | None:
    return difference(wanted, found, 1e-3, 1e-4) if found.is_floating_point() else None


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _called(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        shape = ",".join(map(str, x.shape))
        raise ValueError(f"--input {shape}: the model does not take it: {reason}") from None


def _infer(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _train(model: nn.Module, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    losses = [t.float().mean() for t in _tensors(_called(model, x)) if t.requires_grad]
    if not losses:
        raise ValueError(
            "the model returns nothing that has a gradient, so it has no training step"
        )
    torch.stack(losses).sum().backward()


def _times(models: tuple[nn.Module, ...], work: Any, budget: float) -> tuple[Timing, Timing]:
    for model in models:
        work(model)
    before, after = in_turns([Call(partial(_ignoring, work, model)) for model in models], budget)
    return before, after


def _ignoring(work: Any, model: nn.Module, i: int) -> None:
    work(model)
