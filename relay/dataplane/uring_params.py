"""What the relay asks of io_uring_setup(2), and a trial of it: whether the kernel lets this process have some.

Without liburing and NumPy, so that the trial can be made before anything is loaded.
Source: linux/io_uring.h, man 2 io_uring_setup, io_uring_enter, io_uring_register.
"""

import ctypes
import os

IORING_SETUP_CQSIZE = 1 << 3
IORING_SETUP_R_DISABLED = 1 << 6
IORING_SETUP_SUBMIT_ALL = 1 << 7
IORING_SETUP_SINGLE_ISSUER = 1 << 12
IORING_SETUP_DEFER_TASKRUN = 1 << 13
FLAGS = (
    IORING_SETUP_CQSIZE
    | IORING_SETUP_SUBMIT_ALL
    | IORING_SETUP_R_DISABLED
    | IORING_SETUP_SINGLE_ISSUER
    | IORING_SETUP_DEFER_TASKRUN
)
IORING_REGISTER_ENABLE_RINGS = 12
SQ_ENTRIES = 1024  # of a worker's ring
# asm-generic/unistd.h; the same on every architecture
NR_IO_URING_SETUP = 425
NR_IO_URING_ENTER = 426
NR_IO_URING_REGISTER = 427


class IoUringParams(ctypes.Structure):
    """struct io_uring_params, linux/io_uring.h; the kernel's offsets at its end are liburing's affair."""

    _fields_ = (
        ("sq_entries", ctypes.c_uint32),
        ("cq_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32),
        ("sq_thread_idle", ctypes.c_uint32),
        ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32),
        ("resv", ctypes.c_uint32 * 3),
        ("sq_off", ctypes.c_uint8 * 40),
        ("cq_off", ctypes.c_uint8 * 40),
    )


def make_params(entries: int) -> IoUringParams:
    """Parameters of a ring of `entries` SQEs and twice as many CQEs."""
    params = IoUringParams()
    params.flags = FLAGS
    params.cq_entries = 2 * entries
    return params


def try_io_urings(entries: int, count: int) -> None:
    """Set up, enable and enter as many rings at once. Raises OSError with the call that is refused as its filename."""
    descriptors = []
    try:
        for _ in range(count):
            params = make_params(entries)
            ring = _call("io_uring_setup", NR_IO_URING_SETUP, entries, ctypes.byref(params))
            descriptors.append(ring)
            _call("io_uring_register", NR_IO_URING_REGISTER, ring, IORING_REGISTER_ENABLE_RINGS, None, 0)
            _call("io_uring_enter", NR_IO_URING_ENTER, ring, 0, 0, 0, None, 0)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _call(name: str, number: int, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result = int(library.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
    return result
