"""A compiled kernel as a function of a share of its work, and the threads that run the shares.

A kernel's machine code takes all its arguments in Numba's own convention. Its entry, a few
instructions that are compiled and cached with it, reads them from an array of 64-bit words: numbers
as they are, arrays as the words of Numba's array structure (owner, parent, items, bytes of an item,
address, shape, strides).

The threads are those of the OpenMP runtime that torch itself runs on, entered by `GOMP_parallel`,
which GNU's, LLVM's and Intel's runtimes have but for Windows; Python's threads stand in where it is
missing. A second team of threads would have to fight for the cores with torch's, whose threads keep
spinning for milliseconds after each of its operators. Each thread takes the next share until none
is left, so that one that comes late holds nobody up.
"""

from __future__ import annotations

import ctypes
import gc
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

_WORD = ir.IntType(64)
_ENTRY = ir.FunctionType(_WORD, [_WORD, _WORD, _WORD])
_entries: dict[Any, int] = {}


class Call:
    """A kernel with its arguments, to be run any number of times, also by several Python threads at
    once.

    Args:
        kernel: `kernel(begin, end, *args)` does the pieces of work `begin .. end - 1`.
        units: how many pieces there are.
        changing: arrays among the arguments that each run finds at another address, in the order in
            which it is told where.
    """

    def __init__(
        self, kernel: Any, units: int, args: tuple[Any, ...], changing: tuple[Any, ...] = ()
    ) -> None:
        words = [0, 0, 0, _entry(kernel, args), units]
        places, self._kept = {}, []
        for arg in args:
            if changing and any(arg is other for other in changing):
                places[id(arg)] = len(words) + _ADDRESS
            else:
                self._kept.append(arg)
            _add_words(words, arg)
        self._places = [places[id(other)] for other in changing]
        self._words = array("q", words)

    def run(self, shares: int, threads: int, *addresses: int) -> bool:
        """Does all pieces in so many shares on so many threads; says whether it went well."""
        job = self._words[:]
        job[_SHARES] = shares
        for place, address in zip(self._places, addresses, strict=True):
            job[place] = address
        if threads > 1:
            _together(job, threads)
        else:
            _on_this_thread(job)
        return not job[_FAILED]


def _place_of(job: array[int]) -> int:
    return job.buffer_info()[0]


_SHARES, _NEXT, _FAILED, _CODE, _UNITS, _WORDS = range(6)
"""What a job is made of: the number of shares, the next one, how many failed, the address of the
kernel's entry, the pieces of work, and the words of the arguments."""
_ADDRESS = 4
"""Which word of an array is its address."""


@intrinsic
def _taken(typingctx, job, place, count):
    """A number of the job, which other threads find increased."""

    def codegen(context, builder, signature, args):
        numbers = zip(args[1:], signature.args[1:], strict=True)
        place, count = (context.cast(builder, *number, types.int64) for number in numbers)
        return builder.atomic_rmw("add", builder.gep(args[0], [place]), count, "monotonic")

    return types.int64(job, place, count), codegen


@intrinsic
def _call(typingctx, entry, begin, end, job, place):
    """Calls the machine code at an address with the words from a place on; returns what it says of
    errors, 0 if there was none."""

    def codegen(context, builder, signature, args):
        entry, begin, end, job, place = args
        place = context.cast(builder, place, signature.args[-1], types.int64)
        words = builder.ptrtoint(builder.gep(job, [place]), _WORD)
        return builder.call(builder.inttoptr(entry, _ENTRY.as_pointer()), [begin, end, words])

    return types.int64(types.int64, types.int64, types.int64, job, place), codegen


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def _work(job):
    """What each thread does."""
    units, shares = job[_UNITS], job[_SHARES]
    share = _taken(job, _NEXT, 1)
    while share < shares:
        begin, end = units * share // shares, units * (share + 1) // shares
        if _call(job[_CODE], begin, end, job, _WORDS) != 0:
            _taken(job, _FAILED, 1)
        share = _taken(job, _NEXT, 1)


_address: Any = _work.address
_alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_address)


def _on_this_thread(job: array[int]) -> None:
    _alone(_place_of(job))


def _together(job: array[int], threads: int) -> None:
    """Runs a job on several threads, this one among them."""
    enter = _team()
    if enter is not None:
        enter(_address, _place_of(job), threads, 0)
        return
    others = [_helpers().submit(_on_this_thread, job) for _ in range(threads - 1)]
    _on_this_thread(job)
    for other in others:
        if not other.cancel():
            other.result()


@lru_cache(maxsize=1)
def _team() -> Any:
    """`GOMP_parallel` of the OpenMP runtime that torch runs on; None where there is none."""
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    library = os.path.join(os.path.dirname(torch.__file__), "lib", name)
    try:
        enter: Any = ctypes.CDLL(library).GOMP_parallel  # found through what the library needs
    except (OSError, AttributeError):
        return None
    enter.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    enter.restype = None
    return enter


@lru_cache(maxsize=1)
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "torchpool")


def _add_words(words: list[int], arg: Any) -> None:
    """Appends an argument as the 64-bit words that its parts are."""
    if isinstance(arg, np.ndarray):
        address = arg.__array_interface__["data"][0]
        words += (0, 0, arg.size, arg.itemsize, address, *arg.shape, *arg.strides)
    elif type(arg) is int:
        words.append(arg)
    elif isinstance(arg, tuple):
        for part in arg:
            _add_words(words, part)
    elif isinstance(arg, float):
        words += struct.unpack("q", struct.pack("d", arg))
    elif isinstance(arg, np.float32):
        words += struct.unpack("i", struct.pack("f", arg))
    else:
        words.append(int(arg or 0))


def _kind(arg: Any) -> Any:
    """What tells the type of an argument: equal for arguments of one type."""
    if isinstance(arg, np.ndarray):
        return arg.dtype, arg.ndim
    return (type(arg), *map(_kind, arg)) if isinstance(arg, tuple) else type(arg)


def _entry(kernel: Any, args: tuple[Any, ...]) -> int:
    """The address of the kernel's entry for arguments of these types."""
    key = (kernel, *map(_kind, args))
    if key not in _entries:
        signature = (types.int64, types.int64, *map(numba.typeof, args))
        with _all_kept():
            kernel.compile(signature)
        made = kernel.overloads[signature]
        _entries[key] = made.library.get_pointer_to_function(_name_of_entry(made.fndesc))
    return _entries[key]


@contextmanager
def _all_kept() -> Iterator[None]:
    """Nobody looks for garbage: what a compiler makes lives to its end, and looking through
    it takes a seventh of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _name_of_entry(kernel: Any) -> str:
    return f"entry_of_{kernel.llvm_func_name}"


def add_entry(context: Any, library: Any, kernel: Any) -> None:
    """Adds a kernel's entry to its library: a function of (begin, end, address of the words).

    Args:
        context: Numba's, of the machine that the kernel is compiled for.
        kernel: Numba's description of the kernel.
    """
    native = context.call_conv.get_function_type(kernel.restype, kernel.argtypes)
    module = library.create_ir_module("entry")
    code = ir.Function(module, native, kernel.llvm_func_name)
    builder = ir.IRBuilder(ir.Function(module, _ENTRY, _name_of_entry(kernel)).append_basic_block())
    begin, end, words = builder.function.args
    returned, raised, *parameters = native.args
    args = [builder.alloca(returned.pointee), builder.alloca(raised.pointee), begin, end]
    words = builder.inttoptr(words, _WORD.as_pointer())
    for k, kind in enumerate(parameters[2:]):
        word = builder.load(builder.gep(words, [ir.Constant(_WORD, k)]))
        args.append(_as(builder, word, kind))
    status = builder.call(code, args)
    builder.ret(builder.sext(status, _WORD))
    library.add_ir_module(module)


def _as(builder: Any, word: Any, kind: Any) -> Any:
    if isinstance(kind, ir.PointerType):
        return builder.inttoptr(word, kind)
    if isinstance(kind, ir.DoubleType):
        return builder.bitcast(word, kind)
    if isinstance(kind, ir.FloatType):
        return builder.bitcast(builder.trunc(word, ir.IntType(32)), kind)
    return word if kind == _WORD else builder.trunc(word, kind)
