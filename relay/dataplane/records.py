"""Records at addresses: how compiled code sees memory that it does not own - kernel rings, shared segments, tables.

    ring_at = record_at(RING)
    ring = ring_at(m.rings, 3)      # the fourth RING from the address m.rings on; reads and stores go to that memory

A record is a bare pointer. Arrays would be seven words each, passed with every call, and counted: an atomic increment
and decrement a use, which together were four fifths of a datagram's cost. Nothing is checked: callers keep to counts.
A function can take records but not return one: Numba would return a copy.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from logging_shm.atomics import pointer_at


def record_at(dtype: Any) -> Any:
    """A function of compiled code: (address, index) → record `index` of an array of `dtype` at the address."""
    record_type = from_dtype(dtype)

    def typing(typing_context: Any, base: Any, index: Any) -> Any:
        if not isinstance(base, types.Integer) or not isinstance(index, types.Integer):
            return None

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            base, index = (context.cast(builder, args[i], signature.args[i], types.int64) for i in (0, 1))
            address = builder.add(base, builder.mul(index, ir.IntType(64)(dtype.itemsize)))
            pointee = context.get_value_type(record_type).pointee
            return pointer_at(context, builder, address, types.int64, pointee)

        return record_type(base, index), generate

    return intrinsic(typing)
