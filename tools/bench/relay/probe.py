"""The latency probe: one thread that sends evenly and, between two sends, takes what came back.

A receiver of its own would compete with the sender for a core, and be measured with the relay. Here sender and
receiver can't get in each other's way. Latency is from the moment before the send to the sink kernel's receive time
(SO_TIMESTAMPNS), so that when the datagram is read makes no difference.

The datagram begins with sequence number and send time, both i8; the rest is never looked at.
"""

import socket
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit

from logging_shm.atomics import int64, load_i64, load_u32, store_i64
from relay.dataplane.layout import IOVEC, MMSGHDR
from relay.dataplane.syscalls import clock_gettime, clock_nanosleep, recvmmsg
from tools.netns import enter_namespace
from tools.receiving import (
    LATENCY_BUCKETS,
    MSG_DONTWAIT,
    SO_TIMESTAMPNS,
    SOL_SOCKET,
    bucket_ns,
    latency_bucket,
)
from tools.sending import CLOCK_MONOTONIC, CLOCK_REALTIME, TIMER_ABSTIME, sendmmsg

SO_RCVBUFFORCE: Final = 33
RECEIVE_BUFFER_BYTES: Final = 256 << 20
HEADER_BYTES: Final = 16
CONTROL_BYTES: Final = 64
CMSG_HEADER_BYTES: Final = 16
BATCH: Final = 8  # datagrams taken at a time: about 2 us, less than the least interval
READ_NS: Final = 5_000  # the least time before the next send in which reading is begun
SPIN_NS: Final = 100_000  # a sleep may wake so late: the rest is spun
SETTLE_NS: Final = 200_000_000  # what is not back by then is lost
PERCENTILES: Final = (50, 99, 99.9)

STATE: Final = np.dtype([("sent", "<i8"), ("received", "<i8"), ("latency_ns_max", "<i8"), ("errors", "<i8")])


class Probe(NamedTuple):
    """What the generator process is asked for; see ProbeOrder."""

    rate: float
    seconds: float
    size: int
    namespace: str
    group: str
    port: int


class Memory(NamedTuple):
    """Everything the compiled loop uses."""

    state: Any  # STATE[1]
    latency: Any  # i8[LATENCY_BUCKETS]
    payload: Any  # u1[size]
    message: Any  # MMSGHDR[1]
    iovec: Any  # IOVEC[1]
    messages: Any  # MMSGHDR[BATCH]
    iovecs: Any  # IOVEC[BATCH]
    heads: Any  # i8[BATCH, 2]
    control: Any  # u1[BATCH, CONTROL_BYTES]
    timespec: Any  # i8[2]


def make_memory(size: int) -> Memory:
    """Allocate and link."""
    m = Memory(
        state=np.zeros(1, STATE),
        latency=np.zeros(LATENCY_BUCKETS, np.int64),
        payload=np.zeros(size, np.uint8),
        message=np.zeros(1, MMSGHDR),
        iovec=np.zeros(1, IOVEC),
        messages=np.zeros(BATCH, MMSGHDR),
        iovecs=np.zeros(BATCH, IOVEC),
        heads=np.zeros((BATCH, 2), np.int64),
        control=np.zeros((BATCH, CONTROL_BYTES), np.uint8),
        timespec=np.zeros(2, np.int64),
    )
    m.iovec["iov_base"], m.iovec["iov_len"] = m.payload.ctypes.data, size
    m.message["msg_hdr"]["msg_iov"], m.message["msg_hdr"]["msg_iovlen"] = m.iovec.ctypes.data, 1
    index = np.arange(BATCH)
    m.iovecs["iov_base"], m.iovecs["iov_len"] = m.heads.ctypes.data + index * HEADER_BYTES, HEADER_BYTES
    header = m.messages["msg_hdr"]
    header["msg_iov"], header["msg_iovlen"] = m.iovecs.ctypes.data + index * IOVEC.itemsize, 1
    header["msg_control"] = m.control.ctypes.data + index * CONTROL_BYTES
    return m


@njit(cache=True, nogil=True)
def now_ns(m: Any, clock: int) -> int:
    """A clock in nanoseconds."""
    address = m.timespec.ctypes.data
    clock_gettime(clock, address)
    return load_i64(address) * 1_000_000_000 + load_i64(address + 8)


@njit(cache=True, nogil=True)
def take(m: Any, fd: int) -> int:
    """Take at most BATCH datagrams into the histogram; return their number."""
    for i in range(BATCH):
        m.messages[i].msg_hdr.msg_controllen = CONTROL_BYTES
    count = recvmmsg(fd, m.messages.ctypes.data, BATCH, MSG_DONTWAIT, 0)
    state = m.state[0]
    for i in range(count):
        control = int64(m.control[i].ctypes.data)
        if int64(load_u32(control + 8)) != SOL_SOCKET or int64(load_u32(control + 12)) != SO_TIMESTAMPNS:
            state.errors += 1
            continue
        data = control + CMSG_HEADER_BYTES
        received_ns = load_i64(data) * 1_000_000_000 + load_i64(data + 8)
        latency_ns = max(received_ns - m.heads[i, 1], 0)
        m.latency[latency_bucket(latency_ns)] += 1
        state.latency_ns_max = max(state.latency_ns_max, latency_ns)
        state.received += 1
    return max(count, 0)


@njit(cache=True, nogil=True)
def wait_and_take(m: Any, fd: int, deadline_ns: int) -> None:
    """Take what is there while there is time; then sleep, then spin, until the deadline."""
    present = now_ns(m, CLOCK_MONOTONIC)
    while deadline_ns - present > READ_NS:
        if take(m, fd) == 0:
            if deadline_ns - present > SPIN_NS:
                m.timespec[0] = (deadline_ns - SPIN_NS) // 1_000_000_000
                m.timespec[1] = (deadline_ns - SPIN_NS) % 1_000_000_000
                clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, m.timespec.ctypes.data, 0)
            break
        present = now_ns(m, CLOCK_MONOTONIC)
    while now_ns(m, CLOCK_MONOTONIC) < deadline_ns:
        pass


@njit(cache=True, nogil=True)
def run(m: Any, send_fd: int, receive_fd: int, interval_ns: float, count: int) -> None:
    """Send `count` datagrams, one each interval."""
    state = m.state[0]
    next_ns = float(now_ns(m, CLOCK_MONOTONIC))
    for sequence in range(count):
        wait_and_take(m, receive_fd, int64(next_ns))
        # One that comes late is not made up for: the intervals are what is asked for, or longer.
        next_ns = max(next_ns, float(now_ns(m, CLOCK_MONOTONIC)) - interval_ns) + interval_ns
        payload = m.payload.ctypes.data
        store_i64(payload, sequence)
        store_i64(payload + 8, now_ns(m, CLOCK_REALTIME))
        if sendmmsg(send_fd, m.message.ctypes.data, 1, 0) == 1:
            state.sent += 1
        else:
            state.errors += 1
    end_ns = now_ns(m, CLOCK_MONOTONIC) + SETTLE_NS
    while state.received < state.sent and now_ns(m, CLOCK_MONOTONIC) < end_ns:
        take(m, receive_fd)


def open_receiver(namespace: str, group: str, port: int, address: str) -> socket.socket:
    """A socket in another namespace that has joined the group on the interface with this address."""
    with enter_namespace(Path("/run/netns") / namespace):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    receiver.bind((group, port))
    receiver.setsockopt(
        socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + socket.inet_aton(address)
    )
    return receiver


def run_probe(sender: socket.socket, probe: Probe, to: tuple[str, int], address: str = "10.2.0.2") -> Memory:
    """Send and receive; return what was found."""
    memory = make_memory(probe.size)
    with (
        open_receiver(probe.namespace, probe.group, probe.port, address) as receiver,
        socket.fromfd(sender.fileno(), sender.family, sender.type) as connected,
    ):
        connected.connect(to)
        time.sleep(0.05)  # what an earlier load has left on its way arrives, and is no part of this
        while take(memory, receiver.fileno()):
            pass
        memory.state[:], memory.latency[:] = 0, 0
        run(memory, connected.fileno(), receiver.fileno(), 1e9 / probe.rate, int(probe.rate * probe.seconds))
    return memory


def warm_up() -> None:
    """Compile or load the loop."""
    memory = make_memory(HEADER_BYTES)
    take(memory, -1)
    run(memory, -1, -1, 1.0, 0)


def percentile_us(latency: Any, percent: float) -> float:
    """The latency that `percent` of the datagrams did not exceed."""
    cumulative = np.cumsum(latency)
    return bucket_ns(int(np.searchsorted(cumulative, cumulative[-1] * percent / 100))) / 1000


def histogram_summary(m: Memory) -> dict[str, float]:
    """The figures as JSON takes them."""
    state = m.state[0]
    summary: dict[str, float] = {key: int(state[key]) for key in ("sent", "received", "errors")}
    if state["received"]:
        summary |= {f"p{percent:g}": percentile_us(m.latency, percent) for percent in PERCENTILES}
        summary["max"] = int(state["latency_ns_max"]) / 1000
    return summary
