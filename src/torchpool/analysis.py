"""The pooling of a model in numbers: shapes, receptive field, bytes, shift consistency. Returns
values, draws nothing."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchpool.convert import convert
from torchpool.nn import BlurPool, Gated, MaxBlurPool, Mixed, Pool
from torchpool.windows import Window

_POOLS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
    Pool,
    Mixed,
    Gated,
    BlurPool,
    MaxBlurPool,
)


@dataclass(frozen=True)
class PoolingLayer:
    """One call of a pooling layer."""

    path: str
    """Where the layer stands in the model."""
    kind: str
    """Its class."""
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    receptive_field: tuple[int, ...]
    """Elements of the model's input that one output sees, per axis; empty where a layer on the way
    has no fixed window."""
    jump: tuple[int, ...]
    """Elements of the model's input between two neighbouring outputs, per axis."""
    saved_bytes: int
    """Kept for the backward pass as the model is."""
    torchpool_saved_bytes: int
    """Kept for the backward pass after `torchpool.convert`."""


def load(target: str) -> nn.Module:
    """The model that `module:factory` returns; the working directory is searched too.

    Raises:
        ValueError: the module or the factory is missing, or returns no Module.
    """
    name, _, factory = target.partition(":")
    if not (name and factory):
        raise ValueError(f"{target!r} must be MODULE:FACTORY, as mypackage.models:build")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(name), factory)
        model = made if isinstance(made, nn.Module) else made()
    except ModuleNotFoundError as error:
        hint = f"; write {name[:-3]}:{factory}" if name.endswith(".py") else ""
        raise ValueError(
            f"{target}: the module {name!r} cannot be imported ({error}){hint}"
        ) from None
    except Exception as error:  # the user's own code
        hint = (
            ""
            if isinstance(error, (AttributeError, ImportError))
            else "; run it in Python to see where"
        )
        raise ValueError(f"{target} fails: {type(error).__name__}: {error}{hint}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{target} returned {type(model).__name__}, not a torch.nn.Module; name a callable "
            "that returns the model"
        )
    return model


def saved_bytes(layer: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the distinct storages that a call keeps for its backward pass, parameters and
    buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = layer(*(t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs))
    del result
    return sum(kept.values())


def shift_consistency(
    model: nn.Module, images: Tensor, reach: int = 4, repeats: int = 3, seed: int = 0
) -> float:
    """Share of predicted classes that a random circular shift by up to `reach` pixels leaves
    unchanged.

    Args:
        model: (N, C, H, W) -> scores (N, classes).
        images: (N, C, H, W).
    Source:
        Zhang, Making convolutional networks shift-invariant again, 1904.11486.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            still = model(images).argmax(1)
            shares = []
            for _ in range(repeats):
                moves = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
                moved = model(images.roll(moves, dims=(-2, -1))).argmax(1)
                shares.append((moved == still).float().mean())
    finally:
        model.train(was_training)
    return float(torch.stack(shares).mean())


class _Field:
    """Receptive field of a chain of layers, per axis; unknown once a layer has no fixed window."""

    def __init__(self) -> None:
        self.size: tuple[int, ...] = ()
        self.jump: tuple[int, ...] = ()
        self.known = True

    def pass_through(self, layer: nn.Module, axes: int) -> None:
        window = _window(layer, axes)
        if window is None or not self.known:
            self.known = self.known and window is not None
            return
        size, jump = self.size or (1,) * axes, self.jump or (1,) * axes
        if len(size) != axes:
            self.known = False
            return
        self.size = tuple(
            s + (reach - 1) * j for s, (reach, _), j in zip(size, window, jump, strict=True)
        )
        self.jump = tuple(step * j for (_, step), j in zip(window, jump, strict=True))


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (int(value),) * axes


def _window(layer: nn.Module, axes: int) -> list[tuple[int, int]] | None:
    """Reach and stride of a layer per axis; None where it has no fixed window."""
    windows = getattr(layer, "windows", None)
    if isinstance(windows, Window):
        resolved = windows.axes((4096,) * axes)
        return [((axis.kernel - 1) * axis.dilation + 1, axis.stride) for axis in resolved]
    if isinstance(layer, MaxBlurPool):
        return None
    kernel = getattr(layer, "kernel_size", None)
    if kernel is None or isinstance(layer, (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return None
    stride = getattr(layer, "stride", None) or kernel
    dilation = getattr(layer, "dilation", 1)
    numbers = zip(
        _spread(kernel, axes), _spread(stride, axes), _spread(dilation, axes), strict=True
    )
    return [((k - 1) * d + 1, s) for k, s, d in numbers]


def inspect(model: nn.Module, *inputs: Tensor) -> list[PoolingLayer]:
    """Every call of a pooling layer during one forward pass.

    The receptive field follows the layers in the order in which they run: it is that of a chain
    (branches that run beside each other are counted one after the other).

    Args:
        inputs: arguments of the model.
    """
    found: list[PoolingLayer] = []
    field = _Field()

    def visit(path: str) -> Any:
        def hook(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            x = arguments[0]
            axes = max(1, x.ndim - 2)
            y = output[0] if isinstance(output, tuple) else output
            field.pass_through(layer, axes)
            if isinstance(layer, _POOLS):
                found.append(_describe(path, layer, x, y, field))

        return hook

    kinds = (*_POOLS, nn.modules.conv._ConvNd)
    handles = [
        m.register_forward_hook(visit(path or "(model)"))
        for path, m in model.named_modules()
        if isinstance(m, kinds)
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return found


def _describe(path: str, layer: nn.Module, x: Tensor, y: Tensor, field: _Field) -> PoolingLayer:
    bare = _without_hooks(layer)
    return PoolingLayer(
        path,
        type(layer).__name__,
        tuple(x.shape),
        tuple(y.shape),
        field.size if field.known else (),
        field.jump if field.known else (),
        saved_bytes(bare, x),
        saved_bytes(convert(bare).model, x),
    )


def _without_hooks(layer: nn.Module) -> nn.Module:
    """A shallow twin that shares parameters but runs no hooks."""
    twin = layer.__class__.__new__(layer.__class__)
    twin.__dict__ = dict(layer.__dict__)
    twin._forward_hooks = type(layer._forward_hooks)()
    return twin
