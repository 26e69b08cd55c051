"""Raw memory accesses for compiled code: plain, and with acquire or release order.

Addresses are int64. Acquire loads and release stores become LLVM's `load atomic` and `store atomic`:
nothing else in this project orders memory between processes. Atomic accesses must be naturally aligned,
plain ones need not be. Every signed or unsigned width up to 32 bits promotes to int64 in arithmetic;
64-bit values are signed, as Numba turns a mix of int64 and uint64 into a float.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# Arithmetic of compiled code is int64 throughout; to a type checker its results are Any.
int64: Any = np.int64


def _load(width: int, numba_type: Any, ordering: str | None) -> Any:
    def typing(typing_context: Any, address: Any) -> Any:
        if not isinstance(address, types.Integer):
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(
                context.cast(builder, args[0], signature.args[0], types.int64), ir.IntType(width).as_pointer()
            )
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
            pointer = builder.inttoptr(
                context.cast(builder, args[0], signature.args[0], types.int64), ir.IntType(width).as_pointer()
            )
            stored = context.cast(builder, args[1], signature.args[1], numba_type)
            if ordering is None:
                builder.store(stored, pointer, align=1)
            else:
                builder.store_atomic(stored, pointer, ordering, align=width // 8)
            return context.get_dummy_value()

        return types.void(address, value), generate

    return intrinsic(typing)


load_u8 = _load(8, types.uint8, None)
load_u16 = _load(16, types.uint16, None)
load_u32 = _load(32, types.uint32, None)
load_i64 = _load(64, types.int64, None)
store_u8 = _store(8, types.uint8, None)
store_u16 = _store(16, types.uint16, None)
store_u32 = _store(32, types.uint32, None)
store_i32 = _store(32, types.int32, None)
store_i64 = _store(64, types.int64, None)
load_acquire_u8 = _load(8, types.uint8, "acquire")
load_acquire_u32 = _load(32, types.uint32, "acquire")
load_acquire_i64 = _load(64, types.int64, "acquire")
store_release_u8 = _store(8, types.uint8, "release")
store_release_u32 = _store(32, types.uint32, "release")
store_release_i64 = _store(64, types.int64, "release")
