"""The tables of a plan inside kernels, which only read them.

Numba's arrays can do more: functions that read geometry from arrays are twice as long in
intermediate code, and kernels read geometry everywhere.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

from torchpool.kernels.cpu.plan import COLUMNS


class Constants(types.Type):
    """The type of such a table: of rows of `columns` int64 numbers, or of single ones (0)."""

    dtype = types.int64

    def __init__(self, columns: int) -> None:
        self.columns = columns
        super().__init__(name=f"Constants({columns})")


@register_model(Constants)
class _ConstantsModel(models.StructModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Constants) -> None:
        members = [("data", types.CPointer(types.int64)), ("size", types.intp)]
        super().__init__(dmm, fe_type, members)


def memory(context: Any, builder: Any, kind: Any, array: Any) -> tuple[Any, Any]:
    """Where the elements of an array or a table begin, and how many there are."""
    if isinstance(kind, Constants):
        return builder.extract_value(array, 0), builder.extract_value(array, 1)
    made = context.make_array(kind)(context, builder, array)
    return made.data, made.nitems


@intrinsic
def constants(typingctx: Any, array: Any) -> Any:
    """An int64 array as a table: of a plan's `geo` if it has two axes, else of its `tab`."""
    kind = Constants(COLUMNS if array.ndim == 2 else 0)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return cgutils.make_anonymous_struct(builder, memory(context, builder, array, args[0]))

    return kind(array), build


@infer_global(operator.getitem)
class _Read(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(types.int64, *args) if isinstance(args[0], Constants) else None


@lower_builtin(operator.getitem, Constants, types.BaseTuple)
def _read_row(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    row, column = (
        context.cast(builder, builder.extract_value(args[1], i), sig.args[1][i], types.intp)
        for i in range(2)
    )
    start = builder.mul(row, ir.Constant(row.type, sig.args[0].columns))
    return _read(context, builder, sig.args[0], args[0], builder.add(start, column))


@lower_builtin(operator.getitem, Constants, types.Integer)
def _read_one(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    at = context.cast(builder, args[1], sig.args[1], types.intp)
    return _read(context, builder, sig.args[0], args[0], at)


def _read(context: Any, builder: Any, kind: Any, table: Any, at: Any) -> Any:
    data, size = memory(context, builder, kind, table)
    if context.enable_boundscheck:
        cgutils.do_boundscheck(context, builder, at, size)
    number = builder.load(builder.gep(data, [at], inbounds=True))
    number.set_metadata("invariant.load", builder.module.add_metadata([]))
    return number
