"""A compiled kernel as a function of a share of its work, so that one small parallel loop, compiled
once, runs every kernel on several threads.

A kernel's machine code takes all its arguments in Numba's own convention. A stub of a few
instructions reads them from an array of 64-bit words instead: numbers as they are, arrays as the
words of Numba's array structure (owner, parent, items, bytes of an item, address, shape, strides).
"""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

_WORD = ir.IntType(64)
_STUB = ir.FunctionType(_WORD, [_WORD, _WORD, _WORD])
_stubs: dict[Any, tuple[int, Any]] = {}


def run(kernel: Any, bounds: Any, args: tuple[Any, ...]) -> None:
    """Runs `kernel(begin, end, *args)` for the shares between neighbours in `bounds` (int64), a
    thread each.

    Raises:
        Exception: what the kernel raised.
    """
    words = np.array(_words(args), np.int64)
    if _run(bounds, _stub(kernel, args), words):
        for begin, end in itertools.pairwise(bounds):
            kernel(begin, end, *args)
        raise RuntimeError(f"{kernel.__name__} failed on several threads, not on one")


@njit(parallel=True, nogil=True, cache=True)
def _run(bounds, stub, words):
    failed = 0
    for share in prange(bounds.size - 1):
        failed += _call(stub, bounds[share], bounds[share + 1], words.ctypes.data) != 0
    return failed


@intrinsic
def _call(typingctx, stub, begin, end, words):
    """Calls the machine code at an address; returns what it says of errors, 0 if there was none."""

    def codegen(context, builder, signature, args):
        return builder.call(builder.inttoptr(args[0], _STUB.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


def _words(args: tuple[Any, ...]) -> list[int]:
    """Arguments as the 64-bit words that their parts are."""
    words: list[int] = []
    for arg in args:
        if isinstance(arg, np.ndarray):
            address = arg.__array_interface__["data"][0]
            words += (0, 0, arg.size, arg.itemsize, address, *arg.shape, *arg.strides)
        elif isinstance(arg, tuple):
            words += _words(arg)
        elif isinstance(arg, float):
            words += struct.unpack("q", struct.pack("d", arg))
        else:
            words.append(arg or 0)
    return words


def _kind(arg: Any) -> Any:
    """What tells the type of an argument: equal for arguments of one type."""
    return (arg.dtype, arg.ndim) if isinstance(arg, np.ndarray) else type(arg)


def _stub(kernel: Any, args: tuple[Any, ...]) -> int:
    """The address of the stub for arguments of these types."""
    key = (kernel, *map(_kind, args))
    if key not in _stubs:
        signature = (types.int64, types.int64, *map(numba.typeof, args))
        kernel.compile(signature)
        _stubs[key] = _make_stub(kernel.overloads[signature])
    return _stubs[key][0]


@global_compiler_lock  # type: ignore[untyped-decorator]
def _make_stub(kernel: Any) -> tuple[int, Any]:
    """A function of (begin, end, address of the words) that calls the kernel; with its library,
    which keeps it alive."""
    context, result = kernel.target_context, kernel.signature.return_type
    native = context.call_conv.get_function_type(result, kernel.signature.args)
    name = f"share_of_{kernel.fndesc.llvm_func_name}"
    library = context.codegen().create_library(name)
    module = library.create_ir_module(name)
    function = ir.Function(module, _STUB, name)
    builder = ir.IRBuilder(function.append_basic_block())
    begin, end, words = function.args
    returned, raised, *parameters = native.args
    args = [builder.alloca(returned.pointee), builder.alloca(raised.pointee), begin, end]
    words = builder.inttoptr(words, _WORD.as_pointer())
    for k, kind in enumerate(parameters[2:]):
        word = builder.load(builder.gep(words, [ir.Constant(_WORD, k)]))
        args.append(_as(builder, word, kind))
    address = kernel.library.get_pointer_to_function(kernel.fndesc.llvm_func_name)
    code = builder.inttoptr(ir.Constant(_WORD, address), native.as_pointer())
    status = builder.call(code, args)
    builder.ret(builder.sext(status, _WORD))
    library.add_ir_module(module)
    library.finalize()
    return library.get_pointer_to_function(name), library


def _as(builder: Any, word: Any, kind: Any) -> Any:
    if isinstance(kind, ir.PointerType):
        return builder.inttoptr(word, kind)
    if isinstance(kind, ir.DoubleType):
        return builder.bitcast(word, kind)
    return word if kind == _WORD else builder.trunc(word, kind)
