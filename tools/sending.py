"""The compiled sender: fills datagrams and sends them on time, many in one message where the rate asks for it.

Owned by one process. Each tick sends `per_tick` datagrams of one flow, back to back; flows take turns.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit, types

from logging_shm.atomics import int64, load_i64, load_u32, store_i32, store_i64, store_u16
from relay.dataplane.layout import IOVEC, MMSGHDR, UDP_PAYLOAD_MAX, UDP_SEGMENTS_MAX
from relay.dataplane.send import CMSG_HEADER_BYTES, SOL_UDP, UDP_SEGMENT
from relay.dataplane.syscalls import clock_gettime, clock_nanosleep
from tools.payload import HEADER_BYTES, fill

CLOCK_REALTIME: Final = 0
CLOCK_MONOTONIC: Final = 1
TIMER_ABSTIME: Final = 1
SPIN_NS: Final = 80_000  # a sleep wakes up to this late: the rest is spun, so that pacing is even
RETRY_NS: Final = 20_000
CMSG_SPACE_BYTES: Final = 24
SLOT_BYTES: Final = 65_536
EAGAIN: Final = 11
ENOBUFS: Final = 105
sendmmsg: Any = types.ExternalFunction("sendmmsg", types.int32(types.int32, types.intp, types.uint32, types.int32))
errno_location: Any = types.ExternalFunction("__errno_location", types.intp())

STATE: Final = np.dtype(
    [
        ("next_tick_ns", "<i8"),
        ("interval_ns", "<f8"),
        ("tick", "<i8"),
        ("datagrams", "<i8"),
        ("bytes", "<i8"),
        ("errors", "<i8"),
        ("last_errno", "<i8"),
        ("remaining", "<i8"),
        ("late_ns_max", "<i8"),
    ]
)


class Sender(NamedTuple):
    """Everything the compiled loop uses."""

    state: Any  # STATE[1]
    fds: Any  # i4[flows]
    sequences: Any  # i8[flows]
    sizes: Any  # i8[n], taken in turn
    buffer: Any  # u1[UDP_SEGMENTS_MAX * SLOT_BYTES]
    messages: Any  # MMSGHDR[UDP_SEGMENTS_MAX]
    iovecs: Any  # IOVEC[UDP_SEGMENTS_MAX]
    control: Any  # u1[CMSG_SPACE_BYTES]
    timespec: Any  # i8[2]


def make_sender(fds: list[int], sizes: Any, template: Any, rate: float, per_tick: int, count: int) -> Sender:
    """Allocate; `template` u1[SLOT_BYTES] is every datagram's content, `rate` 0 sends as fast as it goes."""
    sender = Sender(
        state=np.zeros(1, STATE),
        fds=np.array(fds, np.int32),
        sequences=np.zeros(len(fds), np.int64),
        sizes=np.array(sizes, np.int64),
        buffer=np.tile(template, UDP_SEGMENTS_MAX),
        messages=np.zeros(UDP_SEGMENTS_MAX, MMSGHDR),
        iovecs=np.zeros(UDP_SEGMENTS_MAX, IOVEC),
        control=np.zeros(CMSG_SPACE_BYTES, np.uint8),
        timespec=np.zeros(2, np.int64),
    )
    sender.state[0]["interval_ns"] = per_tick * 1e9 / rate if rate else 0.0
    sender.state[0]["remaining"] = count
    header = sender.messages["msg_hdr"]
    header["msg_iov"] = sender.iovecs.ctypes.data + np.arange(UDP_SEGMENTS_MAX) * IOVEC.itemsize
    return sender


@njit(cache=True, nogil=True)
def now_ns(s: Any, clock: int) -> int:
    """A clock in nanoseconds."""
    address = s.timespec.ctypes.data
    clock_gettime(clock, address)
    return load_i64(address) * 1_000_000_000 + load_i64(address + 8)


@njit(cache=True, nogil=True)
def wait_until(s: Any, deadline_ns: int) -> int:
    """Sleep, then spin, until CLOCK_MONOTONIC reaches the deadline; return how late it is then."""
    present = now_ns(s, CLOCK_MONOTONIC)
    if deadline_ns - present > SPIN_NS:
        wake_ns = deadline_ns - SPIN_NS
        s.timespec[0] = wake_ns // 1_000_000_000
        s.timespec[1] = wake_ns % 1_000_000_000
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, s.timespec.ctypes.data, 0)
        present = now_ns(s, CLOCK_MONOTONIC)
    while present < deadline_ns:
        present = now_ns(s, CLOCK_MONOTONIC)
    return present - deadline_ns


@njit(cache=True, nogil=True)
def send_messages(s: Any, fd: int, count: int) -> int:
    """Send the first `count` messages; return how many left. No buffer space is waited for."""
    sent = 0
    while sent < count:
        result = sendmmsg(fd, s.messages.ctypes.data + sent * s.messages.itemsize, count - sent, 0)
        if result > 0:
            sent += result
            continue
        error = int64(load_u32(errno_location()))
        if error in (EAGAIN, ENOBUFS):
            wait_until(s, now_ns(s, CLOCK_MONOTONIC) + RETRY_NS)
            continue
        s.state[0].errors += 1
        s.state[0].last_errno = error
        return sent
    return sent


@njit(cache=True, nogil=True)
def send_tick(s: Any, per_tick: int, gso: bool, kind: int, offset: int, run: int) -> None:
    """Send the datagrams of one tick."""
    state = s.state[0]
    flow = state.tick % len(s.fds)
    size = s.sizes[state.tick % len(s.sizes)]
    count = min(per_tick, state.remaining)
    segmented = gso and count > 1 and size > 0
    if segmented:
        count = min(count, UDP_PAYLOAD_MAX // size)
    present = now_ns(s, CLOCK_REALTIME)
    base = s.buffer.ctypes.data
    stride = size if segmented else SLOT_BYTES
    for i in range(count):
        fill(base + i * stride, size, kind, offset, flow, s.sequences[flow] + i, present, run)
        s.iovecs[i].iov_base = base + i * stride
        s.iovecs[i].iov_len = size
        s.messages[i].msg_hdr.msg_iovlen = 1
        s.messages[i].msg_hdr.msg_control = 0
        s.messages[i].msg_hdr.msg_controllen = 0
    messages = count
    if segmented and count > 1:
        messages = 1
        s.iovecs[0].iov_len = size * count
        control = s.control.ctypes.data
        store_i64(control, CMSG_HEADER_BYTES + 2)
        store_i32(control + 8, SOL_UDP)
        store_i32(control + 12, UDP_SEGMENT)
        store_u16(control + CMSG_HEADER_BYTES, size)
        s.messages[0].msg_hdr.msg_control = control
        s.messages[0].msg_hdr.msg_controllen = CMSG_SPACE_BYTES
    sent = send_messages(s, s.fds[flow], messages)
    if messages == 1:
        sent = count * sent
    state.tick += 1
    state.remaining -= count
    if size >= offset + HEADER_BYTES:  # what has no room for a number takes none
        s.sequences[flow] += count
    state.datagrams += sent
    state.bytes += sent * size


@njit(cache=True, nogil=True)
def send_until(s: Any, end_ns: int, pause_ns: int, per_tick: int, gso: bool, kind: int, offset: int, run: int) -> int:
    """Send until `end_ns`, or until nothing remains; return to the interpreter after `pause_ns` at the latest.

    A tick that comes late is made up for, so the average rate holds. Returns the datagrams that remain.
    """
    state = s.state[0]
    start_ns = now_ns(s, CLOCK_MONOTONIC)
    if state.next_tick_ns == 0:
        state.next_tick_ns = start_ns
    behind = float(0)
    while state.remaining > 0:
        present = now_ns(s, CLOCK_MONOTONIC)
        if present >= end_ns or present - start_ns >= pause_ns:
            break
        if state.interval_ns > 0:
            if state.next_tick_ns - present > pause_ns:
                wait_until(s, present + pause_ns)
                break
            late = wait_until(s, state.next_tick_ns)
            state.late_ns_max = max(state.late_ns_max, late)
            behind += state.interval_ns
            whole = int64(behind)
            behind -= whole
            state.next_tick_ns += whole
        send_tick(s, per_tick, gso, kind, offset, run)
    return state.remaining
