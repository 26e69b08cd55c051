"""C functions that compiled code calls, resolved by LLVM's linker, so that caches stay valid.

liburing: the system's `liburing.so.2` or `liburing-ffi.so.2`, else the copy in the `liburing` wheel.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
from numba import types

from relay.errors import PreflightError

SYSTEM_LIBRARIES = ("liburing-ffi.so.2", "liburing.so.2")


def _candidates() -> list[str]:
    names = list(SYSTEM_LIBRARIES)
    spec = importlib.util.find_spec("liburing")
    if spec is not None and spec.origin is not None:
        names += sorted(str(path) for path in Path(spec.origin).parent.glob("liburing*.so*"))
    return names


@cache
def load_liburing() -> ctypes.CDLL:
    """Load liburing for ctypes and for compiled code.

    Raises PreflightError when neither the system nor the environment has one.
    """
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(library, "io_uring_enter") and hasattr(library, "io_uring_queue_init_params"):
            llvmlite.binding.load_library_permanently(name)
            return library
    raise PreflightError("no liburing found: install Debian's liburing2, or the package liburing by pip")


# Their C prototypes: liburing.h; poll(2), recvmmsg(2), clock_gettime(2), clock_nanosleep(2).
io_uring_enter: Any = types.ExternalFunction(
    "io_uring_enter",
    types.int32(types.uint32, types.uint32, types.uint32, types.uint32, types.intp),
)
poll: Any = types.ExternalFunction("poll", types.int32(types.intp, types.uint64, types.int32))
recvmmsg: Any = types.ExternalFunction(
    "recvmmsg", types.int32(types.int32, types.intp, types.uint32, types.int32, types.intp)
)
getsockopt: Any = types.ExternalFunction(
    "getsockopt", types.int32(types.int32, types.int32, types.int32, types.intp, types.intp)
)
clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
clock_nanosleep: Any = types.ExternalFunction(
    "clock_nanosleep", types.int32(types.int32, types.int32, types.intp, types.intp)
)
