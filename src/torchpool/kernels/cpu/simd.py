"""Vectors inside kernels: as many numbers as fill 64 bytes, in one value.

`load` and `store` move them between arrays and registers, and convert half formats on the way; the
operators of Python work on them lane by lane, so that formulas written for one number run on a
vector as they are. LLVM maps them to whatever registers the machine has.

With `NUMBA_BOUNDSCHECK=1` every access is checked.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, register_model

from torchpool.kernels.cpu.constants import memory
from torchpool.kernels.cpu.parts import inlined

BYTES = 64
"""Size of a vector in the format that is computed in."""


def record(name: str, stored: Any) -> Any:
    """How an array reaches kernels whose numbers are computed in another format than they are
    stored in: as records of one field, whose name says what the numbers are."""
    return np.dtype([(name, stored)])


BRAIN, HALF = record("bfloat16", np.uint16), record("float16", np.uint16)
SINGLE, DOUBLE = "whole_in_float32", "whole_in_float64"
"""Names of records that hold integers, computed in floating point."""

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


def has_avx512() -> bool:
    """Whether kernels are compiled for a processor that gathers, and picks out of two vectors."""
    return "+avx512f" in cpu_target.target_context.codegen()._tm_features


class Vector(types.Type):
    """The type of a vector: `lanes` numbers of type `dtype` (booleans: a mask)."""

    def __init__(self, dtype: Any, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")

    @property
    def key(self) -> Any:
        return self.dtype, self.lanes


def _scalar_ir(dtype: Any) -> Any:
    if isinstance(dtype, types.Record):
        return ir.IntType(8 * dtype.size)
    if dtype == types.boolean:
        return _I1
    if dtype == types.float32:
        return ir.FloatType()
    return ir.DoubleType() if dtype == types.float64 else ir.IntType(dtype.bitwidth)


def _vector_ir(vector: Vector) -> Any:
    return ir.VectorType(_scalar_ir(vector.dtype), vector.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, _vector_ir(fe_type))


def computed(dtype: Any) -> Any:
    """The format that numbers stored as `dtype` are computed in."""
    if not isinstance(dtype, types.Record):
        return dtype
    return types.float64 if DOUBLE in dtype.fields else types.float32


def _whole(dtype: Any) -> Any:
    """The integers that records hold; None where they hold others."""
    name = next((name for name in (SINGLE, DOUBLE) if name in dtype.fields), None)
    return None if name is None else dtype.fields[name].type


def vector_of(array: Any) -> Vector:
    """The vectors that an array is read in."""
    dtype = computed(array.dtype)
    return Vector(dtype, 8 * BYTES // dtype.bitwidth)


def is_float(dtype: Any) -> bool:
    """Whether a type is of floating point."""
    return isinstance(dtype, types.Float)


# From scalars -----------------------------------------------------------------


def _broadcast(builder: Any, scalar: Any, lanes: int) -> Any:
    kind = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


@lower_cast(types.Number, Vector)
@lower_cast(types.Boolean, Vector)
def _cast_number(context: Any, builder: Any, fromty: Any, toty: Vector, value: Any) -> Any:
    if toty.dtype == types.boolean:
        value = context.cast(builder, value, fromty, types.boolean)
        return _broadcast(builder, builder.trunc(value, _I1), toty.lanes)
    return _broadcast(builder, context.cast(builder, value, fromty, toty.dtype), toty.lanes)


@lower_cast(Vector, Vector)
def _cast_vector(context: Any, builder: Any, fromty: Vector, toty: Vector, value: Any) -> Any:
    return _converted(builder, value, fromty.dtype, toty)


def _converted(builder: Any, value: Any, dtype: Any, to: Vector) -> Any:
    """A vector of integers or floats in another format."""
    kind, target = _vector_ir(to), to.dtype
    if dtype == target:
        return value
    if dtype == types.boolean:
        one = builder.zext(value, ir.VectorType(_I32, to.lanes))
        return _converted(builder, one, types.int32, to)
    if is_float(dtype):
        if is_float(target):
            wider = target.bitwidth > dtype.bitwidth
            return builder.fpext(value, kind) if wider else builder.fptrunc(value, kind)
        return builder.fptosi(value, kind) if target.signed else builder.fptoui(value, kind)
    if is_float(target):
        return builder.sitofp(value, kind) if dtype.signed else builder.uitofp(value, kind)
    if target.bitwidth <= dtype.bitwidth:
        return builder.trunc(value, kind) if target.bitwidth < dtype.bitwidth else value
    return builder.sext(value, kind) if dtype.signed else builder.zext(value, kind)


@intrinsic
def splat(typingctx: Any, array: Any, number: Any) -> Any:
    """A number in every lane of a vector of the array's computed format."""
    vector = vector_of(array)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[1], number, vector)

    return vector(array, number), build


@intrinsic
def splat_as(typingctx: Any, like: Any, number: Any) -> Any:
    """A number (or a vector of as many lanes) as a vector of the type of `like`."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[1], number, like)

    return like(like, number), build


@intrinsic
def codes_as(typingctx: Any, like: Any, codes: Any, number: Any) -> Any:
    """A number (or a vector) in the type of an array of offsets, with as many lanes as `like`."""
    vector = Vector(codes.dtype, like.lanes)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.cast(builder, args[2], number, vector)

    return vector(like, codes, number), build


@intrinsic
def lane_numbers(typingctx: Any, like: Any) -> Any:
    """0, 1, 2, ... as int32, with as many lanes as `like`."""
    vector = Vector(types.int32, like.lanes)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(_vector_ir(vector), list(range(like.lanes)))

    return vector(like), build


def width(vector: Any) -> int:
    """How many lanes a vector (or a vector read from an array) has."""
    raise NotImplementedError


@inlined(width)
def _width(vector):
    lanes = vector.lanes if isinstance(vector, Vector) else vector_of(vector).lanes
    return lambda vector: lanes


# Memory -------------------------------------------------------------------------

LINE = 64
"""Bytes of a cache line."""


def per_line(array: Any) -> int:
    """How many elements of an array a cache line holds."""
    raise NotImplementedError


@inlined(per_line)
def _per_line(array):
    count = LINE // _size(array.dtype)
    return lambda array: count


@intrinsic
def address(typingctx: Any, array: Any) -> Any:
    """Where an array begins in memory."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data, _ = memory(context, builder, array, args[0])
        return builder.ptrtoint(data, _I64)

    return types.int64(array), build


def _address(context: Any, builder: Any, kind: Any, array: Any, at: Any, count: Any) -> Any:
    """Where element `at` lies; `count` elements from there on are touched, and checked if bounds
    are."""
    data, size = memory(context, builder, kind, array)
    if context.enable_boundscheck:
        with builder.if_then(builder.icmp_signed(">", count, _I64(0))):
            cgutils.do_boundscheck(context, builder, at, size)
            last = builder.sub(builder.add(at, count), _I64(1))
            cgutils.do_boundscheck(context, builder, last, size)
    return builder.gep(data, [at], inbounds=True)


def _size(dtype: Any) -> int:
    return int(dtype.size if isinstance(dtype, types.Record) else dtype.bitwidth // 8)


def _widened(builder: Any, raw: Any, dtype: Any, lanes: int) -> Any:
    """Stored bits in the format that is computed in."""
    if not isinstance(dtype, types.Record):
        return raw
    if _whole(dtype) is not None:
        return _converted(builder, raw, _whole(dtype), Vector(computed(dtype), lanes))
    single = ir.VectorType(ir.FloatType(), lanes)
    if "float16" in dtype.fields:
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), lanes)), single)
    wide = ir.VectorType(_I32, lanes)
    shifted = builder.shl(builder.zext(raw, wide), ir.Constant(wide, [16] * lanes))
    return builder.bitcast(shifted, single)


def _narrowed(builder: Any, value: Any, dtype: Any, lanes: int) -> Any:
    """The inverse of `_widened`, rounded to the nearest, ties to even; integers are cut towards
    zero, and those that are too large wrap round."""
    if not isinstance(dtype, types.Record):
        return value
    if _whole(dtype) is not None:
        wide = types.int64 if DOUBLE in dtype.fields else types.int32
        whole = _converted(builder, value, computed(dtype), Vector(wide, lanes))
        return _converted(builder, whole, wide, Vector(_whole(dtype), lanes))
    short = ir.VectorType(_I16, lanes)
    if "float16" in dtype.fields:
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
        return builder.bitcast(half, short)
    wide = ir.VectorType(_I32, lanes)

    def same(number: int) -> Any:
        return ir.Constant(wide, [number] * lanes)

    bits = builder.bitcast(value, wide)
    upper = builder.lshr(bits, same(16))
    odd = builder.and_(upper, same(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, same(0x7FFF))), same(16))
    nan = builder.fcmp_unordered("uno", value, value)
    chosen = builder.select(nan, builder.or_(upper, same(0x40)), rounded)
    return builder.trunc(chosen, short)


def _intrinsic_of(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _suffix(kind: Any) -> str:
    names = {"float": "f32", "double": "f64"}
    return f"v{kind.count}{names.get(str(kind.element), str(kind.element))}"


def _first_lanes(builder: Any, count: Any, lanes: int) -> Any:
    """A mask of the lanes below `count`.

    LLVM must not know the count: of a masked store to one 16-bit lane, known as such, LLVM 22 makes
    a store of 32 bits.
    """
    kind = ir.VectorType(_I32, lanes)
    same = ir.FunctionType(_I64, [_I64])
    count = builder.asm(same, "", "=r,0", [count], False)
    bound = _broadcast(builder, builder.trunc(count, _I32), lanes)
    return builder.icmp_signed("<", ir.Constant(kind, list(range(lanes))), bound)


@intrinsic
def load(typingctx: Any, array: Any, at: Any) -> Any:
    """A vector of consecutive elements from `at` on."""
    vector = vector_of(array)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        where = _address(context, builder, array, args[0], at, _I64(vector.lanes))
        kind = ir.VectorType(_scalar_ir(array.dtype), vector.lanes)
        raw = builder.load(builder.bitcast(where, kind.as_pointer()), align=_size(array.dtype))
        return _widened(builder, raw, array.dtype, vector.lanes)

    return vector(array, at), build


@intrinsic
def load_first(typingctx: Any, array: Any, at: Any, count: Any) -> Any:
    """The first `count` lanes of `load` (all, if there are not so many); 0 in the others."""
    vector = vector_of(array)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at, count = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 2))
        most = builder.icmp_signed(">", count, _I64(vector.lanes))
        count = builder.select(most, _I64(vector.lanes), count)
        where = _address(context, builder, array, args[0], at, count)
        kind = ir.VectorType(_scalar_ir(array.dtype), vector.lanes)
        pointer = builder.bitcast(where, kind.as_pointer())
        mask = _first_lanes(builder, count, vector.lanes)
        if has_avx512() or _size(array.dtype) >= 4:
            raw = _load_masked(builder, pointer, mask)
        else:
            end = builder.add(at, _I64(vector.lanes))
            size = memory(context, builder, array, args[0])[1]
            follow = builder.icmp_signed("<=", end, size)
            follow = builder.and_(follow, builder.icmp_signed(">=", at, _I64(0)))
            raw = _load_and_drop(builder, pointer, mask, count, follow)
        return _widened(builder, raw, array.dtype, vector.lanes)

    return vector(array, at, count), build


def _load_masked(builder: Any, pointer: Any, mask: Any) -> Any:
    kind = pointer.type.pointee
    name = f"llvm.masked.load.{_suffix(kind)}.p0"
    return _intrinsic_of(builder, name, kind, [pointer, _I32(1), mask, ir.Constant(kind, None)])


def _load_and_drop(builder: Any, pointer: Any, mask: Any, count: Any, follow: Any) -> Any:
    """Short numbers without AVX-512, of which LLVM would make a branch for each lane: all of them
    where all `follow` in memory, and only there."""
    kind = pointer.type.pointee
    with builder.if_else(follow) as (whole, part):
        with whole:
            every, from_whole = builder.load(pointer, align=1), builder.block
        with part:
            name, arguments = f"load.{_suffix(kind)}", [pointer, count]
            some = _apart(builder, name, kind, arguments, _define_load_of_some)
            from_part = builder.block
    raw = _joined(builder, (every, from_whole), (some, from_part))
    return builder.select(mask, raw, ir.Constant(kind, None))


def _apart(builder: Any, name: str, result: Any, arguments: list[Any], define: Any) -> Any:
    """Calls a function that stays apart, one for each name; `define` writes it."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"torchpool.{name}")
    if not function.blocks:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        define(ir.IRBuilder(function.append_basic_block()), *function.args)
    return builder.call(function, arguments)


def _define_load_of_some(builder: Any, pointer: Any, count: Any) -> None:
    kind = pointer.type.pointee
    room = builder.alloca(kind)
    builder.store(ir.Constant(kind, None), room)
    count = builder.select(builder.icmp_signed(">", count, _I64(0)), count, _I64(0))
    size = builder.mul(count, _I64(kind.element.width // 8))
    ends = [builder.bitcast(each, _I8.as_pointer()) for each in (room, pointer)]
    _intrinsic_of(builder, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [*ends, size, _I1(0)])
    builder.ret(builder.load(room))


@intrinsic
def prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Asks for the cache line of an element, which need not exist."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        made = context.make_array(array)(context, builder, args[0])
        where = builder.gep(made.data, [args[1]], inbounds=False)
        where = builder.bitcast(where, _I8.as_pointer())
        arguments = [where, _I32(0), _I32(3), _I32(1)]
        _intrinsic_of(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.none(array, types.intp), build


@intrinsic
def load_as(typingctx: Any, array: Any, at: Any, like: Any) -> Any:
    """As many consecutive elements from `at` on as `like` has lanes."""
    vector = Vector(computed(array.dtype), like.lanes)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        where = _address(context, builder, array, args[0], at, _I64(vector.lanes))
        kind = ir.VectorType(_scalar_ir(array.dtype), vector.lanes)
        raw = builder.load(builder.bitcast(where, kind.as_pointer()), align=_size(array.dtype))
        return _widened(builder, raw, array.dtype, vector.lanes)

    return vector(array, at, like), build


@intrinsic
def store(typingctx: Any, array: Any, at: Any, value: Any) -> Any:
    """Writes a vector to consecutive elements, rounded to the array's format."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at = context.cast(builder, args[1], sig.args[1], types.intp)
        where = _address(context, builder, array, args[0], at, _I64(value.lanes))
        raw = _stored(context, builder, array, args[2], value)
        pointer = builder.bitcast(where, raw.type.as_pointer())
        builder.store(raw, pointer, align=_size(array.dtype))
        return context.get_dummy_value()

    return types.none(array, at, value), build


def _stored(context: Any, builder: Any, array: Any, value: Any, kind: Vector) -> Any:
    inside = Vector(computed(array.dtype), kind.lanes)
    value = context.cast(builder, value, kind, inside)
    return _narrowed(builder, value, array.dtype, kind.lanes)


@intrinsic
def store_first(typingctx: Any, array: Any, at: Any, value: Any, count: Any) -> Any:
    """The first `count` lanes of `store` (all, if there are not so many)."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        at, count = (context.cast(builder, args[i], sig.args[i], types.intp) for i in (1, 3))
        has_all = builder.icmp_signed(">=", count, _I64(value.lanes))
        count = builder.select(has_all, _I64(value.lanes), count)
        where = _address(context, builder, array, args[0], at, count)
        raw = _stored(context, builder, array, args[2], value)
        pointer = builder.bitcast(where, raw.type.as_pointer())
        with builder.if_else(has_all) as (whole, part):
            with whole:
                builder.store(raw, pointer, align=_size(array.dtype))
            with part:
                some = _store_masked if has_avx512() else _store_in_halves
                some(builder, raw, pointer, count)
        return context.get_dummy_value()

    return types.none(array, at, value, count), build


def _store_masked(builder: Any, raw: Any, pointer: Any, count: Any) -> None:
    mask = _first_lanes(builder, count, raw.type.count)
    name = f"llvm.masked.store.{_suffix(raw.type)}.p0"
    _intrinsic_of(builder, name, ir.VoidType(), [raw, pointer, _I32(1), mask])


def _store_in_halves(builder: Any, raw: Any, pointer: Any, count: Any) -> None:
    """Masked stores of AMD's processors take as long as many others, and without AVX-512 there are
    none of short numbers."""
    arguments = [raw, pointer, count]
    name = f"store.{_suffix(raw.type)}"
    _apart(builder, name, ir.VoidType(), arguments, _define_store_in_halves)


def _define_store_in_halves(builder: Any, rest: Any, pointer: Any, count: Any) -> None:
    """Stores half of the lanes, a quarter, and so on, as the bits of the count say."""
    lanes = rest.type.count
    at = builder.bitcast(pointer, rest.type.element.as_pointer())
    count = builder.select(builder.icmp_signed(">", count, _I64(0)), count, _I64(0))
    while lanes > 1:
        lanes //= 2
        first = _shuffled(builder, rest, rest, list(range(lanes)))
        before = builder.block
        has_half = builder.icmp_unsigned("!=", builder.and_(count, _I64(lanes)), _I64(0))
        with builder.if_then(has_half):
            builder.store(first, builder.bitcast(at, first.type.as_pointer()), align=1)
            second = _shuffled(builder, rest, rest, list(range(lanes, 2 * lanes)))
            further, stored = builder.gep(at, [_I64(lanes)]), builder.block
        rest = _joined(builder, (first, before), (second, stored))
        at = _joined(builder, (at, before), (further, stored))
    builder.ret_void()


def _joined(builder: Any, *values: tuple[Any, Any]) -> Any:
    """One of some values: which comes from the block that was left."""
    phi = builder.phi(values[0][0].type)
    for value, block in values:
        phi.add_incoming(value, block)
    return phi


@intrinsic
def gather(typingctx: Any, array: Any, base: Any, places: Any, mask: Any) -> Any:
    """Elements at `base + places` of the lanes where the mask holds; 0 in the others."""
    vector = Vector(computed(array.dtype), places.lanes)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        made = context.make_array(array)(context, builder, args[0])
        base = context.cast(builder, args[1], sig.args[1], types.intp)
        lanes, scalar = vector.lanes, _scalar_ir(array.dtype)
        start = builder.gep(made.data, [base], inbounds=False)
        if context.enable_boundscheck:
            _check_lanes(context, builder, made, base, args[2], args[3], places)
        index = builder.sext(args[2], ir.VectorType(_I64, lanes))
        start = builder.bitcast(start, scalar.as_pointer())
        kind = ir.VectorType(scalar, lanes)
        pointers = _broadcast(builder, builder.ptrtoint(start, _I64), lanes)
        scale = ir.Constant(ir.VectorType(_I64, lanes), [_size(array.dtype)] * lanes)
        addresses = builder.add(pointers, builder.mul(index, scale))
        if has_avx512():
            raw = _gathered(builder, addresses, args[3], kind, _size(array.dtype))
        else:  # LLVM asks lane by lane what a mask says, unless it says yes
            first = _broadcast(builder, builder.ptrtoint(made.data, _I64), lanes)
            addresses = builder.select(args[3], addresses, first)
            every = ir.Constant(args[3].type, [True] * lanes)
            raw = _gathered(builder, addresses, every, kind, _size(array.dtype))
            raw = builder.select(args[3], raw, ir.Constant(kind, None))
        return _widened(builder, raw, array.dtype, lanes)

    return vector(array, base, places, mask), build


def _gathered(builder: Any, addresses: Any, mask: Any, kind: Any, align: int) -> Any:
    pointers = builder.inttoptr(addresses, ir.VectorType(kind.element.as_pointer(), kind.count))
    arguments = [pointers, _I32(align), mask, ir.Constant(kind, None)]
    name = f"llvm.masked.gather.{_suffix(kind)}.v{kind.count}p0"
    return _intrinsic_of(builder, name, kind, arguments)


def _check_lanes(
    context: Any, builder: Any, made: Any, base: Any, places: Any, mask: Any, kind: Vector
) -> None:
    for lane in range(kind.lanes):
        inside = builder.extract_element(mask, _I32(lane))
        with builder.if_then(inside):
            place = builder.sext(builder.extract_element(places, _I32(lane)), _I64)
            cgutils.do_boundscheck(context, builder, builder.add(base, place), made.nitems)


# Between lanes --------------------------------------------------------------------


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


@intrinsic
def evens(typingctx: Any, a: Any, b: Any) -> Any:
    """The even elements of two successive vectors."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], args[1], list(range(0, 2 * a.lanes, 2)))

    return a(a, b), build


@intrinsic
def odds(typingctx: Any, a: Any, b: Any) -> Any:
    """The odd elements of two successive vectors."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], args[1], list(range(1, 2 * a.lanes, 2)))

    return a(a, b), build


@intrinsic
def thirds(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Every third element of three successive vectors, from the first on."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = range(0, 3 * a.lanes, 3)
        first = [place for place in places if place < 2 * a.lanes]
        both = _shuffled(builder, args[0], args[1], first + [0] * (a.lanes - len(first)))
        last = [place - a.lanes for place in places if place >= 2 * a.lanes]
        return _shuffled(builder, both, args[2], [*range(len(first)), *last])

    return a(a, b, c), build


@intrinsic
def after1(typingctx: Any, a: Any, b: Any) -> Any:
    """The vector that begins one element into `a` and ends in the successive `b`."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], args[1], list(range(1, a.lanes + 1)))

    return a(a, b), build


@intrinsic
def after2(typingctx: Any, a: Any, b: Any) -> Any:
    """The vector that begins two elements into `a` and ends in the successive `b`."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], args[1], list(range(2, a.lanes + 2)))

    return a(a, b), build


def can_pick(dtype: Any) -> bool:
    """Whether one instruction brings elements of a format from any places of two vectors."""
    return has_avx512() and _size(dtype) >= 4


@intrinsic
def picked(typingctx: Any, a: Any, b: Any, places: Any) -> Any:
    """Of two successive vectors the elements at `places` (int32), counted round from a's first;
    of formats that `can_pick` names."""
    if not can_pick(a.dtype):
        return None
    index = Vector(types.int32 if _size(a.dtype) == 4 else types.int64, a.lanes)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        first, second, chosen = args
        chosen = _converted(builder, chosen, places.dtype, index)
        kind = {"f32": "ps", "f64": "pd", "i32": "d", "i64": "q"}[_suffix(first.type)[-3:]]
        name = f"llvm.x86.avx512.vpermi2var.{kind}.512"
        return _intrinsic_of(builder, name, first.type, [first, chosen, second])

    return a(a, b, places), build


@intrinsic(prefer_literal=True)
def turned(typingctx: Any, a: Any, by: Any) -> Any:
    """The lanes moved round by a constant."""
    step = getattr(by, "literal_value", None)
    if step is None:
        return None

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = [(i + step) % a.lanes for i in range(a.lanes)]
        return _shuffled(builder, args[0], args[0], lanes)

    return a(a, by), build


@intrinsic
def braided_low(typingctx: Any, a: Any, b: Any) -> Any:
    """a0, b0, a1, b1, ...: the first of two successive vectors whose evens are a, odds b."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        half = range(a.lanes // 2)
        return _shuffled(builder, args[0], args[1], [k for i in half for k in (i, a.lanes + i)])

    return a(a, b), build


@intrinsic
def braided_high(typingctx: Any, a: Any, b: Any) -> Any:
    """The second of the vectors of `braided_low`."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        half = range(a.lanes // 2, a.lanes)
        return _shuffled(builder, args[0], args[1], [k for i in half for k in (i, a.lanes + i)])

    return a(a, b), build


def _halves(a: Any, span: Any, offset: int) -> Any:
    """Every other `span` lanes, from `offset` times `span` on, of two vectors in turns."""
    step = getattr(span, "literal_value", None)
    if step is None:
        return None

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        starts = range(0, a.lanes, 2 * step)
        lanes = [
            start + source + offset * step + i
            for start in starts
            for source in (0, a.lanes)
            for i in range(step)
        ]
        return _shuffled(builder, args[0], args[1], lanes[: a.lanes])

    return build


@intrinsic(prefer_literal=True)
def lows(typingctx: Any, a: Any, b: Any, span: Any) -> Any:
    """Of each `2 * span` lanes the first half: a's and b's in turns. `span` is a constant."""
    build = _halves(a, span, 0)
    return None if build is None else (a(a, b, span), build)


@intrinsic(prefer_literal=True)
def highs(typingctx: Any, a: Any, b: Any, span: Any) -> Any:
    """The same of the second half."""
    build = _halves(a, span, 1)
    return None if build is None else (a(a, b, span), build)


@intrinsic
def half_of(typingctx: Any, vector: Any) -> Any:
    """The first half of the lanes of a vector, as a vector of its own."""
    half = Vector(vector.dtype, vector.lanes // 2)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], args[0], list(range(half.lanes)))

    return half(vector), build


@intrinsic
def joined(typingctx: Any, a: Any, b: Any) -> Any:
    """Two halves as one vector."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], args[1], list(range(2 * a.lanes)))

    return Vector(a.dtype, 2 * a.lanes)(a, b), build


@intrinsic
def lane(typingctx: Any, vector: Any, i: Any) -> Any:
    """One element of a vector."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i = context.cast(builder, args[1], sig.args[1], types.int32)
        return builder.extract_element(args[0], i)

    return vector.dtype(vector, i), build


@intrinsic
def with_lane(typingctx: Any, vector: Any, i: Any, number: Any) -> Any:
    """The vector with one element replaced."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        i = context.cast(builder, args[1], sig.args[1], types.int32)
        number_ = context.cast(builder, args[2], number, vector.dtype)
        return builder.insert_element(args[0], number_, i)

    return vector(vector, i, number), build


# Lane by lane ---------------------------------------------------------------------


@intrinsic
def choose(typingctx: Any, condition: Any, yes: Any, no: Any) -> Any:
    """`yes` in the lanes where the condition holds, else `no`; both of one vector type."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return yes(condition, yes, no), build


@intrinsic
def bits_of(typingctx: Any, vector: Any) -> Any:
    """The bits of a float32 vector as int32."""
    out = Vector(types.int32, vector.lanes)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _vector_ir(out))

    return out(vector), build


@intrinsic
def float_of(typingctx: Any, vector: Any) -> Any:
    """The float32 vector of int32 bits."""
    out = Vector(types.float32, vector.lanes)

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _vector_ir(out))

    return out(vector), build


@intrinsic
def converted(typingctx: Any, vector: Any, like: Any) -> Any:
    """The numbers of a vector in the type of another with as many lanes."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _converted(builder, args[0], vector.dtype, like)

    return like(vector, like), build


@intrinsic
def _root(typingctx: Any, vector: Any) -> Any:
    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = _vector_ir(vector)
        return _intrinsic_of(builder, f"llvm.sqrt.{_suffix(kind)}", kind, [args[0]])

    return vector(vector), build


def root(vector: Any) -> Any:
    """Square roots."""
    raise NotImplementedError


@inlined(root)
def _overload_root(vector):
    return lambda vector: _root(vector)


@intrinsic
def _fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    out = next((each for each in (a, b, c) if isinstance(each, Vector)), types.float32)
    name = f"v{out.lanes}f32" if isinstance(out, Vector) else "f32"

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        args = [
            context.cast(builder, *each, out) for each in zip(args, signature.args, strict=True)
        ]
        return _intrinsic_of(builder, f"llvm.fmuladd.{name}", args[0].type, args)

    return out(a, b, c), build


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32, rounded once where the processor has an instruction for that."""
    raise NotImplementedError


@inlined(fused)
def _overload_fused(a, b, c):
    return lambda a, b, c: _fused(a, b, c)


def _both(a: Any, b: Any) -> Vector | None:
    """The vector type that two operands meet in."""
    if isinstance(a, Vector) and isinstance(b, Vector):
        return a if a == b else None
    if isinstance(a, Vector) and isinstance(b, (types.Number, types.Boolean)):
        return a
    if isinstance(b, Vector) and isinstance(a, (types.Number, types.Boolean)):
        return b
    return None


def _operator(function: Any, by_float: Any, by_int: Any, *, compares: bool = False) -> None:
    """Lets an operator of Python work on vectors; numbers beside them count for every lane."""

    @infer_global(function)
    class _Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            meet = _both(*args) if len(args) == 2 else None
            if meet is None:
                return None
            result = Vector(types.boolean, meet.lanes) if compares else meet
            return signature(result, meet, meet)

    @lower_builtin(function, Vector, Vector)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        dtype = sig.args[0].dtype
        return (by_float if is_float(dtype) else by_int)(builder, *args, dtype)


def _compare(sign: str) -> Any:
    ordered = sign != "!="

    def by_float(b: Any, x: Any, y: Any, dtype: Any) -> Any:
        return b.fcmp_ordered(sign, x, y) if ordered else b.fcmp_unordered(sign, x, y)

    def by_int(b: Any, x: Any, y: Any, dtype: Any) -> Any:
        signed = getattr(dtype, "signed", False)
        return b.icmp_signed(sign, x, y) if signed else b.icmp_unsigned(sign, x, y)

    return by_float, by_int


_operator(operator.add, lambda b, x, y, t: b.fadd(x, y), lambda b, x, y, t: b.add(x, y))
_operator(operator.iadd, lambda b, x, y, t: b.fadd(x, y), lambda b, x, y, t: b.add(x, y))
_operator(operator.sub, lambda b, x, y, t: b.fsub(x, y), lambda b, x, y, t: b.sub(x, y))
_operator(operator.isub, lambda b, x, y, t: b.fsub(x, y), lambda b, x, y, t: b.sub(x, y))
_operator(operator.mul, lambda b, x, y, t: b.fmul(x, y), lambda b, x, y, t: b.mul(x, y))
_operator(operator.imul, lambda b, x, y, t: b.fmul(x, y), lambda b, x, y, t: b.mul(x, y))
_operator(operator.truediv, lambda b, x, y, t: b.fdiv(x, y), None)
_operator(operator.itruediv, lambda b, x, y, t: b.fdiv(x, y), None)
_operator(operator.and_, None, lambda b, x, y, t: b.and_(x, y))
_operator(operator.or_, None, lambda b, x, y, t: b.or_(x, y))
_operator(operator.iand, None, lambda b, x, y, t: b.and_(x, y))
_operator(operator.ior, None, lambda b, x, y, t: b.or_(x, y))
_operator(operator.xor, None, lambda b, x, y, t: b.xor(x, y))
_operator(operator.lshift, None, lambda b, x, y, t: b.shl(x, y))
_operator(operator.rshift, None, lambda b, x, y, t: b.ashr(x, y) if t.signed else b.lshr(x, y))
for _function, _sign in {
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
}.items():
    _by_float, _by_int = _compare(_sign)
    _operator(_function, _by_float, _by_int, compares=True)


@infer_global(operator.neg)
@infer_global(operator.pos)
@infer_global(abs)
class _Unary(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@infer_global(operator.invert)
class _Invert(AbstractTemplate):  # type: ignore[misc]
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(args[0], args[0]) if isinstance(args[0], Vector) else None


@lower_builtin(operator.neg, Vector)
def _lower_neg(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fneg(args[0]) if is_float(sig.args[0].dtype) else builder.neg(args[0])


@lower_builtin(operator.pos, Vector)
def _lower_pos(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return args[0]


@lower_builtin(operator.invert, Vector)
def _lower_invert(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.not_(args[0])


@lower_builtin(abs, Vector)
def _lower_abs(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    kind = _vector_ir(sig.args[0])
    if is_float(sig.args[0].dtype):
        return _intrinsic_of(builder, f"llvm.fabs.{_suffix(kind)}", kind, [args[0]])
    return _intrinsic_of(builder, f"llvm.abs.{_suffix(kind)}", kind, [args[0], _I1(0)])


@intrinsic
def any_lane(typingctx: Any, mask: Any) -> Any:
    """Whether a mask holds in some lane."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir.IntType(mask.lanes))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(mask), build


# Merging two candidates -------------------------------------------------------------


@intrinsic
def later_max(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of two; a where they are equal; where one is NaN, a."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_above(builder, args[1], args[0], a.dtype), args[1], args[0])

    return a(a, b), build


@intrinsic
def later_min(typingctx: Any, a: Any, b: Any) -> Any:
    """The smaller of two; a where they are equal; where one is NaN, a."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(_above(builder, args[0], args[1], a.dtype), args[1], args[0])

    return a(a, b), build


def _above(builder: Any, x: Any, y: Any, dtype: Any) -> Any:
    if is_float(dtype):
        return builder.fcmp_ordered(">", x, y)
    signed = dtype.signed
    return builder.icmp_signed(">", x, y) if signed else builder.icmp_unsigned(">", x, y)


@intrinsic
def or_nan(typingctx: Any, value: Any, a: Any, b: Any) -> Any:
    """The value, but NaN where a or b is NaN. Written as a sum, so that it costs one comparison for
    both and one masked instruction."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if not is_float(value.dtype):
            return args[0]
        nan = builder.fcmp_unordered("uno", args[1], args[2])
        return builder.select(nan, builder.fadd(args[1], args[2]), args[0])

    return value(value, a, b), build
