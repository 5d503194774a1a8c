"""Model surgery: torch's pooling layers become torchpool's, with a report, and back again.

A layer keeps its identity: only its class changes (torch does the same when it parametrizes or when
a lazy Module takes shape). So hooks, the training flag, buffers, and every reference to the layer,
wherever a model keeps one, stay as they are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from torchpool import nn as layers
from torchpool.nn import torch_layers

__all__ = ["FunctionalCall", "Left", "Report", "Swap", "convert"]

_REPLACEMENTS: dict[type, type] = {
    getattr(nn, name): getattr(layers, name) for name in torch_layers.__all__
}


@dataclass(frozen=True)
class Swap:
    """A layer that torchpool computes now."""

    path: str
    """Where it stands in the model; "" is the model itself."""
    module: nn.Module = field(repr=False)
    before: type
    after: type


@dataclass(frozen=True)
class Left:
    """A pooling layer that stays as it was."""

    path: str
    module: nn.Module = field(repr=False)
    reason: str


@dataclass(frozen=True)
class FunctionalCall:
    """A call of a torch pooling function in the code of a Module: it stays as it was."""

    path: str
    """The Module whose code calls it."""
    function: str
    """Its name as written, as "F.max_pool2d"."""
    location: str
    """File and line."""


@dataclass
class Report:
    """What `convert` did to a model."""

    model: nn.Module = field(repr=False)
    """The model, changed in place."""
    swapped: tuple[Swap, ...]
    left: tuple[Left, ...]
    functional: tuple[FunctionalCall, ...]
    unread: tuple[str, ...]
    """Paths of Modules whose source is not at hand: functional calls in it go unnoticed."""

    def undo(self) -> nn.Module:
        """Gives swapped layers their class back, unless that changed since; returns the model."""
        for swap in self.swapped:
            if type(swap.module) is swap.after:
                swap.module.__class__ = swap.before  # type: ignore[assignment]
        return self.model

    def __str__(self) -> str:
        lines = [
            f"torchpool.convert: {len(self.swapped)} swapped, {len(self.left)} left, "
            f"{len(self.functional)} functional calls not swapped"
        ]
        lines += _section(
            "swapped",
            [(swap.path, f"{swap.before.__name__} -> torchpool.nn") for swap in self.swapped],
        )
        lines += _section(
            "left",
            [(left.path, f"{type(left.module).__name__}: {left.reason}") for left in self.left],
        )
        calls = [(call.path, f"{call.function} at {call.location}") for call in self.functional]
        lines += _section(
            "functional calls (call torchpool's function of the same name instead)", calls
        )
        lines += _section(
            "source not at hand, functional calls in it go unnoticed",
            [(path, "") for path in self.unread],
        )
        return "\n".join(lines)


def _section(title: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    width = max(len(path or "(model)") for path, _ in rows)
    lines = (f"    {path or '(model)':{width}}  {text}".rstrip() for path, text in rows)
    return [f"  {title}:", *lines]


def convert(model: nn.Module) -> Report:
    """Lets torchpool compute the `torch.nn` pooling layers of a model, in place.

    Results, state_dict and repr stay the same. Nested and shared layers are found wherever they
    stand. A subclass of a torch layer is swapped
    if it does not have a `forward` of its own.
    Calls of pooling functions cannot be swapped: the code of the model's Modules is read, without
    running it, and they are reported.

    Args:
        model: any Module, also a pooling layer itself.
    Returns:
        A `Report`; `print` it, `report.undo()` takes everything back.
    Raises:
        TypeError: model is not a Module.

    >>> report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)))
    >>> print(report)
    torchpool.convert: 1 swapped, 0 left, 0 functional calls not swapped
      swapped:
        1  MaxPool2d -> torchpool.nn
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    found = list(_walk(model))
    calls, unread = _find_calls(found)
    swapped: list[Swap] = []
    left: list[Left] = []
    plan = {id(module): (type(module), _replacement(module)) for _, module in found}
    for path, module in found:
        before, after = plan[id(module)]
        if isinstance(after, str):
            left.append(Left(path, module, after))
        elif after is not None:
            module.__class__ = after
            swapped.append(Swap(path, module, before, after))
    return Report(model, tuple(swapped), tuple(left), tuple(calls), tuple(unread))


def _walk(
    module: nn.Module, path: str = "", above: frozenset[int] = frozenset()
) -> Iterator[tuple[str, nn.Module]]:
    """Every place in a model; a Module inside itself is not entered again."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and id(child) not in above | {id(module)}:
            yield from _walk(child, f"{path}.{name}" if path else name, above | {id(module)})


# Which class --------------------------------------------------------------------------------------


def _replacement(module: nn.Module) -> type | str | None:
    """The class to give a Module, or why a pooling layer gets none; None for other Modules."""
    if isinstance(module, torch.jit.ScriptModule):
        is_pool = module.original_name in torch_layers.__all__
        return "it is scripted; convert the model before scripting it" if is_pool else None
    kind: Any = type(module)
    origin = next((base for base in kind.__mro__ if base in _REPLACEMENTS), None)
    if origin is None:
        return None
    if issubclass(kind, torch_layers.TorchLayer):
        return "torchpool computes it already"
    if kind.forward is not origin.forward:
        return f"its class {kind.__qualname__} has a forward of its own"
    if "forward" in vars(module):
        return "this instance has a forward of its own"
    if module._compiled_call_impl is not None:
        return "it is compiled; convert the model before compiling it"
    return (
        _REPLACEMENTS[origin] if kind is origin else _swapped_subclass(kind, _REPLACEMENTS[origin])
    )


@functools.cache
def _swapped_subclass(kind: Any, replacement: Any) -> Any:
    """A user's subclass with torchpool's forward; pickles name the class of the user."""
    members = {
        "forward": replacement.forward,
        "_pool": vars(replacement)["_pool"],
        "__reduce_ex__": _reduce_swapped,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (torch_layers.TorchLayer, kind), members)


def _reduce_swapped(self: nn.Module, protocol: int) -> Any:
    kind = type(self).__mro__[2]
    return _rebuild_swapped, (kind,), self.__dict__


def _rebuild_swapped(kind: Any) -> nn.Module:
    made: nn.Module = kind.__new__(kind)
    made.__class__ = _replacement(made)  # type: ignore[assignment]
    return made


# Functional calls ---------------------------------------------------------------------------------


_STEMS = ("max_pool", "avg_pool", "lp_pool", "max_unpool")
_POOLING = {
    value
    for space in (torch, torch.nn.functional, torch._C._nn)
    for name, value in vars(space).items()
    if callable(value) and any(stem in name for stem in _STEMS)
}


def _find_calls(modules: list[tuple[str, nn.Module]]) -> tuple[list[FunctionalCall], list[str]]:
    calls: list[FunctionalCall] = []
    unread: list[str] = []
    for path, module in modules:
        reader = _Reader(module)
        if isinstance(module, torch.fx.GraphModule):
            reader.read_graph(module)
        else:
            reader.read(inspect.getattr_static(module, "forward"))
        calls += [FunctionalCall(path, name, location) for name, location in reader.calls]
        if reader.is_unread:
            unread.append(path)
    return calls, unread


class _Reader:
    """Looks for pooling functions in a Module's forward, and in what that calls outside of
    torch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls: list[tuple[str, str]] = []
        self.is_unread = False
        self._seen: set[Any] = set()

    def read(self, value: Any) -> None:
        """Follows a function or method that is not torch's or ours; other values have no code."""
        function = _plain_function(value)
        if function is None or function in self._seen:
            return
        is_first = not self._seen
        self._seen.add(function)
        if _is_torch(function.__module__) or not (is_first or _knows_torch(function)):
            return
        try:
            place, first, tree = _source(function)
        except (OSError, TypeError, SyntaxError):
            self.is_unread = True
            return
        scope = self._scope(function, tree)
        for node, value in _named_values(tree, scope):
            self._meet(value, ast.unparse(node), f"{place}:{first + node.lineno - 1}")

    def read_graph(self, module: torch.fx.GraphModule) -> None:
        """A traced graph says what it calls."""
        for node in module.graph.nodes:
            if node.op == "call_function":
                self._meet(
                    node.target,
                    getattr(node.target, "__name__", str(node.target)),
                    f"graph node {node.name}",
                )

    def _meet(self, value: Any, name: str, location: str) -> None:
        while isinstance(value, functools.partial):
            value = value.func
        if _is_pooling(value):
            self.calls.append((name, location))
        else:
            self.read(value)

    def _scope(self, function: FunctionType, tree: ast.AST) -> dict[str, Any]:
        """What names mean in the function: globals, closure, its imports, the Module as self."""
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        scope = {
            **function.__globals__,
            **{name: cell.cell_contents for name, cell in cells if _is_filled(cell)},
        }
        code = function.__code__
        for name in code.co_varnames + code.co_cellvars:  # a local hides a global of its name
            scope.pop(name, None)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                scope.update(_imported(node))
        if code.co_varnames[:1] == ("self",):
            scope["self"] = self.module
        return scope


@functools.lru_cache(maxsize=256)
def _source(function: FunctionType) -> tuple[str, int, ast.AST]:
    """File, first line and syntax tree of a function."""
    lines, first = inspect.getsourcelines(function)
    return inspect.getsourcefile(function) or "?", first, ast.parse(textwrap.dedent("".join(lines)))


def _is_torch(name: Any) -> bool:
    return str(name).split(".")[0] in ("torch", "torchpool")


def _knows_torch(function: FunctionType) -> bool:
    """Whether torch's names are in reach of a function; numpy's, say, cannot call its pooling."""
    return any(
        _is_torch(getattr(value, "__name__" if inspect.ismodule(value) else "__module__", ""))
        for value in function.__globals__.values()
    )


def _is_pooling(value: Any) -> bool:
    if isinstance(value, torch._ops.OpOverload):
        return any(stem in value.__name__ for stem in _STEMS)
    try:
        return value in _POOLING
    except TypeError:  # not hashable, so no function
        return False


def _plain_function(value: Any) -> FunctionType | None:
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, Any]:
    """What an import inside a function binds, as far as the modules are loaded already."""
    bound: dict[str, Any] = {}
    for alias in node.names:
        if isinstance(node, ast.Import):
            name = alias.name if alias.asname else alias.name.split(".")[0]
            bound[alias.asname or name] = sys.modules.get(name)
        else:
            source = sys.modules.get(node.module or "")
            value = getattr(source, alias.name, None) or sys.modules.get(
                f"{node.module}.{alias.name}"
            )
            bound[alias.asname or alias.name] = value
    return bound


def _named_values(tree: ast.AST, scope: dict[str, Any]) -> Iterator[tuple[ast.expr, Any]]:
    """Every name and dotted name of the code that means something in the scope, the longest only,
    without running anything."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in inner:
            try:
                yield node, _resolve(node, scope)
            except (AttributeError, KeyError):
                continue


def _resolve(node: ast.expr, scope: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return scope[node.id]
    if isinstance(node, ast.Attribute):
        return inspect.getattr_static(_resolve(node.value, scope), node.attr)
    raise KeyError(ast.unparse(node))
