"""io_uring: set up through liburing, used by the compiled loop. Owned by one worker.

The loop fills SQEs in place, publishes the tail and enters the kernel once a drain. Every completion is
reaped before the next submission, so the queues can't overflow. An io_uring can do what seccomp forbids its process,
such as to open a file; so this one is restricted, for good, to sending: SENDMSG without flags, nothing registered.
Source: liburing.h (struct io_uring, io_uring_sq, io_uring_cq), man 2 io_uring_setup.
"""

import ctypes
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from relay.dataplane.layout import IO_URING_CQE, IO_URING_SQE, IORING_OP_SENDMSG
from relay.dataplane.syscalls import load_liburing
from relay.dataplane.uring_params import make_params
from relay.errors import PreflightError

IORING_RESTRICTION_SQE_OP = 1


class IoUringSq(ctypes.Structure):
    """struct io_uring_sq."""

    _fields_ = (
        ("khead", ctypes.c_void_p),
        ("ktail", ctypes.c_void_p),
        ("kring_mask", ctypes.c_void_p),
        ("kring_entries", ctypes.c_void_p),
        ("kflags", ctypes.c_void_p),
        ("kdropped", ctypes.c_void_p),
        ("array", ctypes.c_void_p),
        ("sqes", ctypes.c_void_p),
        ("sqe_head", ctypes.c_uint),
        ("sqe_tail", ctypes.c_uint),
        ("ring_sz", ctypes.c_size_t),
        ("ring_ptr", ctypes.c_void_p),
        ("ring_mask", ctypes.c_uint),
        ("ring_entries", ctypes.c_uint),
        ("pad", ctypes.c_uint * 2),
    )


class IoUringCq(ctypes.Structure):
    """struct io_uring_cq."""

    _fields_ = (
        ("khead", ctypes.c_void_p),
        ("ktail", ctypes.c_void_p),
        ("kring_mask", ctypes.c_void_p),
        ("kring_entries", ctypes.c_void_p),
        ("kflags", ctypes.c_void_p),
        ("koverflow", ctypes.c_void_p),
        ("cqes", ctypes.c_void_p),
        ("ring_sz", ctypes.c_size_t),
        ("ring_ptr", ctypes.c_void_p),
        ("ring_mask", ctypes.c_uint),
        ("ring_entries", ctypes.c_uint),
        ("pad", ctypes.c_uint * 2),
    )


class IoUring(ctypes.Structure):
    """struct io_uring."""

    _fields_ = (
        ("sq", IoUringSq),
        ("cq", IoUringCq),
        ("flags", ctypes.c_uint),
        ("ring_fd", ctypes.c_int),
        ("features", ctypes.c_uint),
        ("enter_ring_fd", ctypes.c_int),
        ("int_flags", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("pad2", ctypes.c_uint),
    )


class IoUringRestriction(ctypes.Structure):
    """struct io_uring_restriction, linux/io_uring.h; the second member is a union of bytes."""

    _fields_ = (
        ("opcode", ctypes.c_uint16),
        ("sqe_op", ctypes.c_uint8),
        ("resv", ctypes.c_uint8),
        ("resv2", ctypes.c_uint32 * 3),
    )


def _array_at(address: int, dtype: Any, count: int) -> Any:
    buffer = (ctypes.c_uint8 * (dtype.itemsize * count)).from_address(address)
    return np.frombuffer(buffer, dtype=dtype)


class Uring:
    """An io_uring of `entries` SQEs and twice as many CQEs. A context manager; close() ends it."""

    def __init__(self, entries: int, operations: Sequence[int] = (IORING_OP_SENDMSG,)) -> None:
        """Raises PreflightError when the kernel refuses io_uring."""
        self._library = load_liburing()
        self._ring = IoUring()
        params = make_params(entries)
        result = self._library.io_uring_queue_init_params(
            ctypes.c_uint(entries), ctypes.byref(self._ring), ctypes.byref(params)
        )
        if result < 0:
            raise PreflightError(
                f"io_uring_queue_init_params: {os.strerror(-result)}: needs Linux 6.1 and kernel.io_uring_disabled = 0"
            )
        self._restrict(operations)
        sq, cq = self._ring.sq, self._ring.cq
        self.fd: int = self._ring.ring_fd
        self.sqes = _array_at(sq.sqes, IO_URING_SQE, sq.ring_entries)
        self.cqes = _array_at(cq.cqes, IO_URING_CQE, cq.ring_entries)
        self.sq_tail_ptr: int = sq.ktail
        self.sq_mask: int = sq.ring_mask
        self.cq_head_ptr: int = cq.khead
        self.cq_tail_ptr: int = cq.ktail
        self.cq_mask: int = cq.ring_mask

    def _restrict(self, operations: Sequence[int]) -> None:
        """Allow these alone, and start. Raises PreflightError."""
        allowed = [IoUringRestriction(IORING_RESTRICTION_SQE_OP, operation) for operation in operations]
        restrictions = (IoUringRestriction * len(allowed))(*allowed)
        ring = ctypes.byref(self._ring)
        result = self._library.io_uring_register_restrictions(ring, restrictions, ctypes.c_uint(len(allowed)))
        result = result or self._library.io_uring_enable_rings(ring)
        if result < 0:
            self.close()
            raise PreflightError(f"io_uring_register_restrictions: {os.strerror(-result)}: needs Linux 6.1")

    def attach(self, state: Any) -> None:
        """Write the ring's addresses and masks into a STATE record."""
        state["uring_fd"] = self.fd
        state["sq_tail_ptr"] = self.sq_tail_ptr
        state["sq_mask"] = self.sq_mask
        state["sq_tail"] = 0
        state["cq_head_ptr"] = self.cq_head_ptr
        state["cq_tail_ptr"] = self.cq_tail_ptr
        state["cq_mask"] = self.cq_mask

    def close(self) -> None:
        """End the ring; what it held mapped is gone afterwards."""
        self._library.io_uring_queue_exit(ctypes.byref(self._ring))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
