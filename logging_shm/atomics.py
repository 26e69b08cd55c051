"""Raw memory accesses for compiled code: plain, with acquire or release order, and read-modify-write.

Addresses are int64. Acquire loads, release stores and fences become LLVM's `load atomic`, `store atomic` and
`fence`: nothing else in this project orders memory between processes. Atomic accesses must be naturally aligned,
plain ones need not be. Every signed or unsigned width up to 32 bits promotes to int64 in arithmetic;
64-bit values are signed, as Numba turns a mix of int64 and uint64 into a float.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from logging_shm import cache
from logging_shm.layout import ARGUMENTS_MAX

cache.use_own()

# Arithmetic of compiled code is int64 throughout; to a type checker its results are Any.
int64: Any = np.int64


def pointer_at(context: Any, builder: Any, address: Any, numba_type: Any, pointee: Any) -> Any:
    """The pointer that an integer means, by way of an empty piece of assembly that hides the sum behind it.

    Numba links functions whose code was generated already into their callers and optimises anew. By then LLVM may
    have turned `at + i` into a pointer made of the loop's counter plus an offset; where the counter is known to be 0
    that is arithmetic on the null pointer, and the access is undefined: it was seen to store nothing.
    """
    wide = context.cast(builder, address, numba_type, types.int64)
    hidden = ir.InlineAsm(ir.FunctionType(ir.IntType(64), [ir.IntType(64)]), "", "=r,0", side_effect=False)
    return builder.inttoptr(builder.call(hidden, [wide], attrs=("readnone", "nounwind")), pointee.as_pointer())


def _load(width: int, numba_type: Any, ordering: str | None) -> Any:
    def typing(typing_context: Any, address: Any) -> Any:
        if not isinstance(address, types.Integer):
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointee = ir.DoubleType() if numba_type is types.float64 else ir.IntType(width)
            pointer = pointer_at(context, builder, args[0], signature.args[0], pointee)
            if ordering is None:
                return builder.load(pointer, align=1)
            return builder.load_atomic(pointer, ordering, align=width // 8)

        return numba_type(address), generate

    return intrinsic(typing)


def _store(width: int, numba_type: Any, ordering: str | None) -> Any:
    def typing(typing_context: Any, address: Any, value: Any) -> Any:
        if not isinstance(address, types.Integer) or not isinstance(value, types.Integer):
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = pointer_at(context, builder, args[0], signature.args[0], ir.IntType(width))
            stored = context.cast(builder, args[1], signature.args[1], numba_type)
            if ordering is None:
                builder.store(stored, pointer, align=1)
            else:
                builder.store_atomic(stored, pointer, ordering, align=width // 8)
            return context.get_dummy_value()

        return types.void(address, value), generate

    return intrinsic(typing)


def _fence(ordering: str) -> Any:
    def typing(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence(ordering)
            return context.get_dummy_value()

        return types.void(), generate

    return intrinsic(typing)


def _compare_exchange(typing_context: Any, address: Any, expected: Any, wanted: Any) -> Any:
    """Store `wanted` where `expected` is, at once; the value that was found. For one word that orders nothing else."""
    if not all(isinstance(kind, types.Integer) for kind in (address, expected, wanted)):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = pointer_at(context, builder, args[0], signature.args[0], ir.IntType(64))
        expected, wanted = (context.cast(builder, args[i], signature.args[i], types.int64) for i in (1, 2))
        return builder.extract_value(builder.cmpxchg(pointer, expected, wanted, "monotonic", "monotonic"), 0)

    return types.int64(address, expected, wanted), generate


def _add(typing_context: Any, address: Any, increment: Any) -> Any:
    """Add to an int64, at once; the value before. For one word that orders nothing else."""
    if not isinstance(address, types.Integer) or not isinstance(increment, types.Integer):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = pointer_at(context, builder, args[0], signature.args[0], ir.IntType(64))
        added = context.cast(builder, args[1], signature.args[1], types.int64)
        return builder.atomic_rmw("add", pointer, added, "monotonic")

    return types.int64(address, increment), generate


def _prefetch(for_write: bool) -> Any:
    """Have the cache line at an address fetched, without waiting for it."""

    def typing(typing_context: Any, address: Any) -> Any:
        if not isinstance(address, types.Integer):
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i8_pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            prefetch = builder.module.declare_intrinsic(
                "llvm.prefetch", (i8_pointer,), ir.FunctionType(ir.VoidType(), [i8_pointer, i32, i32, i32])
            )
            pointer = pointer_at(context, builder, args[0], signature.args[0], ir.IntType(8))
            builder.call(prefetch, [pointer, i32(int(for_write)), i32(3), i32(1)])
            return context.get_dummy_value()

        return types.void(address), generate

    return intrinsic(typing)


def _base_of(typing_context: Any, memory: Any) -> Any:
    """The address of an array's first byte; an integer is an address already."""
    if not isinstance(memory, types.Integer | types.Array):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        if isinstance(kind, types.Integer):
            return context.cast(builder, args[0], kind, types.int64)
        return builder.ptrtoint(context.make_array(kind)(context, builder, args[0]).data, ir.IntType(64))

    return types.int64(memory), generate


def _copy_bytes(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    """memcpy(3): `count` bytes from address `source` to address `target`, which don't overlap."""
    if not all(isinstance(kind, types.Integer) for kind in (target, source, count)):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i8_pointer, i64, i1 = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(1)
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [i8_pointer, i8_pointer, i64])
        target, source = (pointer_at(context, builder, args[i], signature.args[i], ir.IntType(8)) for i in (0, 1))
        count = context.cast(builder, args[2], signature.args[2], types.int64)
        builder.call(memcpy, [target, source, count, i1(0)])
        return context.get_dummy_value()

    return types.void(target, source, count), generate


def _store_arguments(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Store a tuple of integers and floats as eight bytes each from `address` on; return their number."""
    if not isinstance(address, types.Integer) or not isinstance(arguments, types.Tuple | types.UniTuple):
        return None
    if len(arguments.types) > ARGUMENTS_MAX:
        raise TypingError(f"{len(arguments.types)} arguments: a record holds at most {ARGUMENTS_MAX}")
    if not all(isinstance(kind, types.Integer | types.Float | types.Boolean) for kind in arguments.types):
        return None

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = pointer_at(context, builder, args[0], signature.args[0], ir.IntType(64))
        for index, kind in enumerate(arguments.types):
            value = builder.extract_value(args[1], index)
            wide = types.float64 if isinstance(kind, types.Float) else types.int64
            bits = context.cast(builder, value, kind, wide)
            if isinstance(kind, types.Float):
                bits = builder.bitcast(bits, ir.IntType(64))
            builder.store(bits, builder.gep(base, [ir.IntType(64)(index)]), align=8)
        return ir.IntType(64)(len(arguments.types))

    return types.int64(address, arguments), generate


load_u8 = _load(8, types.uint8, None)
load_u16 = _load(16, types.uint16, None)
load_u32 = _load(32, types.uint32, None)
load_i64 = _load(64, types.int64, None)
store_u8 = _store(8, types.uint8, None)
store_u16 = _store(16, types.uint16, None)
store_u32 = _store(32, types.uint32, None)
store_i32 = _store(32, types.int32, None)
store_i64 = _store(64, types.int64, None)
load_f64 = _load(64, types.float64, None)
load_acquire_u8 = _load(8, types.uint8, "acquire")
load_acquire_u32 = _load(32, types.uint32, "acquire")
load_acquire_i64 = _load(64, types.int64, "acquire")
store_release_u8 = _store(8, types.uint8, "release")
store_release_u32 = _store(32, types.uint32, "release")
store_release_i64 = _store(64, types.int64, "release")
compare_exchange_i64: Any = intrinsic(_compare_exchange)
add_atomic_i64: Any = intrinsic(_add)
fence_acquire: Any = _fence("acquire")
fence_release: Any = _fence("release")
prefetch_read: Any = _prefetch(for_write=False)
prefetch_write: Any = _prefetch(for_write=True)
base_of: Any = intrinsic(_base_of)
copy_bytes: Any = intrinsic(_copy_bytes)
store_arguments: Any = intrinsic(_store_arguments)
