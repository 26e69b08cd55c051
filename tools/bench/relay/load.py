"""The compiled load: as many datagrams as the schedule asks for, filled once, cheap to send.

Owned by the generator process. Payloads are never touched again: what is lost is counted at the sink, so the
generator's core is left to the kernel. A tick sends all that is due since the start; between ticks the thread sleeps
and never spins, so that its CPU time is what sending costs (a spinning sender hides the kernel's work in its own time).
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit

from logging_shm.atomics import int64, load_i64, load_u32, store_i32, store_i64, store_u16
from relay.dataplane.layout import IOVEC, MMSGHDR, SOCKADDR_IN, UDP_PAYLOAD_MAX, UDP_SEGMENTS_MAX
from relay.dataplane.send import CMSG_HEADER_BYTES, SOL_UDP, UDP_SEGMENT
from relay.dataplane.syscalls import clock_gettime, clock_nanosleep
from tools.sending import (
    CLOCK_MONOTONIC,
    CMSG_SPACE_BYTES,
    TIMER_ABSTIME,
    errno_location,
    sendmmsg,
)

MESSAGES_MAX: Final = 64  # in one sendmmsg
FORGIVEN_NS: Final = 1_000_000  # a sender that was kept from its core for longer doesn't make up for it in one burst

STATE: Final = np.dtype([("datagrams", "<i8"), ("next_stream", "<i8"), ("errors", "<i8"), ("last_errno", "<i8")])


class Load(NamedTuple):
    """Everything the compiled loop uses."""

    state: Any  # STATE[1]
    names: Any  # SOCKADDR_IN[streams]
    payload: Any  # u1[UDP_PAYLOAD_MAX]
    messages: Any  # MMSGHDR[MESSAGES_MAX]
    iovecs: Any  # IOVEC[MESSAGES_MAX]
    control: Any  # u1[CMSG_SPACE_BYTES]
    timespec: Any  # i8[2]


def make_load(names: Any, size: int) -> Load:
    """Allocate and link; `names` is SOCKADDR_IN[streams], `size` the payload's bytes."""
    load = Load(
        state=np.zeros(1, STATE),
        names=names,
        payload=(np.arange(UDP_PAYLOAD_MAX, dtype=np.int64) * 31 % 251).astype(np.uint8),
        messages=np.zeros(MESSAGES_MAX, MMSGHDR),
        iovecs=np.zeros(MESSAGES_MAX, IOVEC),
        control=np.zeros(CMSG_SPACE_BYTES, np.uint8),
        timespec=np.zeros(2, np.int64),
    )
    load.iovecs["iov_base"] = load.payload.ctypes.data
    header = load.messages["msg_hdr"]
    header["msg_iov"] = load.iovecs.ctypes.data + np.arange(MESSAGES_MAX) * IOVEC.itemsize
    header["msg_iovlen"] = 1
    header["msg_namelen"] = SOCKADDR_IN.itemsize
    control = load.control.ctypes.data
    store_control(control, size)
    return load


@njit(cache=True, nogil=True)
def store_control(control: int, size: int) -> None:
    """Write the control message UDP_SEGMENT. man 7 udp."""
    store_i64(control, CMSG_HEADER_BYTES + 2)
    store_i32(control + 8, SOL_UDP)
    store_i32(control + 12, UDP_SEGMENT)
    store_u16(control + CMSG_HEADER_BYTES, size)


@njit(cache=True, nogil=True)
def segments_of(size: int) -> int:
    """The datagrams of `size` bytes that one message can carry."""
    return min(UDP_SEGMENTS_MAX, UDP_PAYLOAD_MAX // max(size, 1))


@njit(cache=True, nogil=True)
def monotonic_ns(s: Any) -> int:
    """CLOCK_MONOTONIC."""
    address = s.timespec.ctypes.data
    clock_gettime(CLOCK_MONOTONIC, address)
    return load_i64(address) * 1_000_000_000 + load_i64(address + 8)


@njit(cache=True, nogil=True)
def sleep_until(s: Any, deadline_ns: int) -> None:
    """Sleep until CLOCK_MONOTONIC says so."""
    s.timespec[0] = deadline_ns // 1_000_000_000
    s.timespec[1] = deadline_ns % 1_000_000_000
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, s.timespec.ctypes.data, 0)


@njit(cache=True, nogil=True)
def send_some(s: Any, fd: int, size: int, segments: int, due: int) -> int:
    """Send at most `due` datagrams with one sendmmsg, messages of `segments`, each of the next stream; return them."""
    state = s.state[0]
    planned = int64(0)
    count = int64(0)
    while count < MESSAGES_MAX and planned < due:
        datagrams = min(segments, due - planned)
        header = s.messages[count].msg_hdr
        header.msg_name = s.names.ctypes.data + state.next_stream * s.names.itemsize
        header.msg_control = s.control.ctypes.data if datagrams > 1 else 0
        header.msg_controllen = CMSG_SPACE_BYTES if datagrams > 1 else 0
        s.iovecs[count].iov_len = datagrams * size
        state.next_stream = state.next_stream + 1 if state.next_stream + 1 < len(s.names) else 0
        planned += datagrams
        count += 1
    result = sendmmsg(fd, s.messages.ctypes.data, count, 0)
    if result < count:
        state.errors += 1
        state.last_errno = int64(load_u32(errno_location()))
    sent = int64(0)
    for i in range(result):
        sent += s.iovecs[i].iov_len // size
    state.datagrams += sent
    return planned


@njit(cache=True, nogil=True)
def send_paced(
    s: Any, fd: int, size: int, segments: int, rate: float, tick_ns: int, duration_ns: int, count_max: int
) -> int:
    """Send `rate` datagrams/s, 0 for as many as go, for a time or until they are `count_max`.

    Returns the nanoseconds that it took.
    """
    start_ns = monotonic_ns(s)
    end_ns = start_ns + duration_ns
    origin_ns = start_ns
    scheduled = int64(0)  # since origin_ns
    while True:
        present = monotonic_ns(s)
        remaining = count_max - s.state[0].datagrams
        if present >= end_ns or remaining <= 0:
            return present - start_ns
        if rate == 0.0:
            send_some(s, fd, size, segments, min(MESSAGES_MAX * segments, remaining))
            continue
        due = int64(float(present - origin_ns) * rate / 1e9) - scheduled
        if float(due) * 1e9 > rate * (FORGIVEN_NS + tick_ns):
            origin_ns = present
            scheduled = 0
            due = int64(1)
        while due > 0:
            sent = send_some(s, fd, size, segments, due)
            due -= sent
            scheduled += sent
        next_ns = origin_ns + int64(float(scheduled + 1) * 1e9 / rate)
        sleep_until(s, max(next_ns, present + tick_ns))
