"""Truncation: whoever owns a file in /dev/shm may cut it short under those who map it, whose next access is a SIGBUS.

After `survive_truncation()` the page that is missing is replaced, for this process alone, by one of zeros, and the
access goes on: a reader finds no record there, counters are 0. The handler is compiled and calls nothing but mmap(2),
so it may run at any moment, in any thread, with the interpreter's lock or without.
"""

import ctypes
import mmap
import signal
from typing import Any

from numba import cfunc, types

from logging_shm.atomics import int64, load_i64, load_u32

# bits/siginfo-consts.h, asm-generic/siginfo.h, bits/sigaction.h; the layout is that of Linux on 64-bit machines
BUS_ADRERR = 2  # no such page in the file
SI_CODE = 8
SI_ADDR = 16
SA_SIGINFO = 4
SIGSET_BYTES = 128
SIGBUS = int(signal.SIGBUS)
SIG_DFL = 0
PAGE_BYTES = mmap.PAGESIZE
PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE
MAP_FIXED = 0x10
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED

# Their C prototypes: mmap(2), signal(2).
_mmap: Any = types.ExternalFunction(
    "mmap", types.int64(types.int64, types.int64, types.int32, types.int32, types.int32, types.int64)
)
_signal: Any = types.ExternalFunction("signal", types.int64(types.int32, types.int64))


class _SigAction(ctypes.Structure):
    """struct sigaction, bits/sigaction.h."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint8 * SIGSET_BYTES),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@cfunc(types.void(types.int32, types.int64, types.int64), cache=True)
def _replace_page(number: int, info: int, context: int) -> None:
    """The handler. What it can't put right kills when the access is repeated, as it does without a handler."""
    if load_u32(info + SI_CODE) == BUS_ADRERR:
        page = int64(load_i64(info + SI_ADDR)) & -PAGE_BYTES
        if _mmap(page, PAGE_BYTES, PROTECTION, FLAGS, -1, 0) == page:
            return
    _signal(SIGBUS, SIG_DFL)


def survive_truncation() -> None:
    """Have this process live on when a file that it maps is truncated. Raises OSError."""
    action = _SigAction(handler=_replace_page.address, flags=SA_SIGINFO)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sigaction(SIGBUS, ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "sigaction")
