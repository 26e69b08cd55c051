"""The compiled receiver: takes datagrams from sockets and accounts each to its flow.

Owned by one process. UDP_GRO hands over trains of datagrams whole; they are checked one by one.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit

from logging_shm.atomics import int64, load_i64, load_u32
from relay.dataplane.layout import IOVEC, MMSGHDR
from relay.dataplane.memory import POLLFD
from relay.dataplane.syscalls import poll, recvmmsg
from tools.payload import find_header, is_intact, send_time_ns

SOL_SOCKET: Final = 1
SOL_UDP: Final = 17
UDP_GRO: Final = 104
SO_TIMESTAMPNS: Final = 35
SO_RXQ_OVFL: Final = 40
MSG_DONTWAIT: Final = 0x40
POLLIN: Final = 0x001
CMSG_HEADER_BYTES: Final = 16
CONTROL_BYTES: Final = 128
BATCH: Final = 64
BUFFER_BYTES: Final = 65_536
FLOWS_MAX: Final = 16_384
WINDOW: Final = 65_536  # how far back a duplicate is told from a late datagram
WINDOW_WORDS: Final = WINDOW // 32
LATENCY_SUBBUCKETS: Final = 32  # an octave: 3 % resolution
LATENCY_BUCKETS: Final = 64 * LATENCY_SUBBUCKETS

FLOW: Final = np.dtype(
    [
        ("datagrams", "<i8"),
        ("unique", "<i8"),
        ("duplicates", "<i8"),
        ("reordered", "<i8"),
        ("lost_before", "<i8"),  # in former runs of the sender
        ("first", "<i8"),
        ("last", "<i8"),
        ("run_unique", "<i8"),
        ("socket", "<i8"),  # a flow is a sender's number at one socket: copies in other groups are flows, too
        ("number", "<i8"),
        ("run", "<u4"),
        ("seen", "<u4"),
    ]
)
TOTALS: Final = np.dtype(
    [
        ("datagrams", "<i8"),
        ("bytes", "<i8"),
        ("corrupt", "<i8"),
        ("foreign", "<i8"),
        ("short", "<i8"),
        ("recorded", "<i8"),
        ("latency_ns_max", "<i8"),
    ]
)


class Receiver(NamedTuple):
    """Everything the compiled loop uses."""

    pollfds: Any  # POLLFD[sockets]
    overflows: Any  # i8[sockets]: what the kernel dropped at each
    flows: Any  # FLOW[FLOWS_MAX]
    windows: Any  # u4[FLOWS_MAX, WINDOW_WORDS]
    totals: Any  # TOTALS[1]
    latency: Any  # i8[LATENCY_BUCKETS]
    messages: Any  # MMSGHDR[BATCH]
    iovecs: Any  # IOVEC[BATCH]
    buffers: Any  # u1[BATCH, BUFFER_BYTES]
    control: Any  # u1[BATCH, CONTROL_BYTES]
    record: Any  # u1[n]: payloads in order of arrival, for --record


def make_receiver(fds: list[int], record_bytes: int) -> Receiver:
    """Allocate and link the receive buffers."""
    receiver = Receiver(
        pollfds=np.zeros(len(fds), POLLFD),
        overflows=np.zeros(len(fds), np.int64),
        flows=np.zeros(FLOWS_MAX, FLOW),
        windows=np.zeros((FLOWS_MAX, WINDOW_WORDS), np.uint32),
        totals=np.zeros(1, TOTALS),
        latency=np.zeros(LATENCY_BUCKETS, np.int64),
        messages=np.zeros(BATCH, MMSGHDR),
        iovecs=np.zeros(BATCH, IOVEC),
        buffers=np.zeros((BATCH, BUFFER_BYTES), np.uint8),
        control=np.zeros((BATCH, CONTROL_BYTES), np.uint8),
        record=np.zeros(record_bytes, np.uint8),
    )
    receiver.pollfds["fd"] = fds
    receiver.pollfds["events"] = POLLIN
    index = np.arange(BATCH)
    receiver.iovecs["iov_base"] = receiver.buffers.ctypes.data + index * BUFFER_BYTES
    receiver.iovecs["iov_len"] = BUFFER_BYTES
    header = receiver.messages["msg_hdr"]
    header["msg_iov"] = receiver.iovecs.ctypes.data + index * IOVEC.itemsize
    header["msg_iovlen"] = 1
    header["msg_control"] = receiver.control.ctypes.data + index * CONTROL_BYTES
    return receiver


@njit(cache=True, nogil=True)
def latency_bucket(latency_ns: int) -> int:
    """The bucket of a latency: LATENCY_SUBBUCKETS to an octave."""
    value = max(latency_ns, 1)
    octave = int64(0)
    while value >> octave >= 2 * LATENCY_SUBBUCKETS:
        octave += 1
    if value < LATENCY_SUBBUCKETS:
        return value
    return (octave + 1) * LATENCY_SUBBUCKETS + ((value >> octave) - LATENCY_SUBBUCKETS)


def bucket_ns(bucket: int) -> int:
    """The least latency in a bucket."""
    octave, rest = divmod(bucket, LATENCY_SUBBUCKETS)
    return rest if octave == 0 else (LATENCY_SUBBUCKETS + rest) << (octave - 1)


@njit(cache=True, nogil=True)
def was_seen(window: Any, sequence: int) -> bool:
    """Whether the bit of a sequence number is set; sets it."""
    place = sequence % WINDOW
    bit = int64(1) << (place & 31)
    word = int64(window[place >> 5])
    window[place >> 5] = word | bit
    return word & bit != 0


@njit(cache=True, nogil=True)
def forget_between(window: Any, last: int, sequence: int) -> None:
    """Clear the bits of the numbers after `last` up to `sequence`."""
    if sequence - last >= WINDOW:
        window[:] = 0
        return
    for number in range(last + 1, sequence + 1):
        place = number % WINDOW
        window[place >> 5] = int64(window[place >> 5]) & ~(int64(1) << (place & 31)) & 0xFFFFFFFF


@njit(cache=True, nogil=True)
def account(flow: Any, window: Any, sequence: int, run: int) -> None:
    """Account a sequence number to its flow (a FLOW record)."""
    flow.datagrams += 1
    if flow.seen == 0 or flow.run != run:
        if flow.seen:
            flow.lost_before += flow.last - flow.first + 1 - flow.run_unique
        flow.seen = 1
        flow.run = run
        flow.first = sequence
        flow.last = sequence
        flow.run_unique = 1
        flow.unique += 1
        window[:] = 0
        was_seen(window, sequence)
        return
    if sequence > flow.last:
        forget_between(window, flow.last, sequence)
        was_seen(window, sequence)
        flow.last = sequence
    else:
        if flow.last - sequence < WINDOW and was_seen(window, sequence):
            flow.duplicates += 1
            return
        flow.reordered += 1
        flow.first = min(flow.first, sequence)
    flow.run_unique += 1
    flow.unique += 1


@njit(cache=True, nogil=True)
def find_flow(r: Any, socket_index: int, number: int) -> int:
    """The place of a flow in the table, which is taken now if it is new; -1 when there is no room."""
    place = (number * 0x9E3779B1 + socket_index * 0x85EBCA77) % FLOWS_MAX
    for _ in range(FLOWS_MAX):
        flow = r.flows[place]
        if flow.seen == 0:
            flow.socket = socket_index
            flow.number = number
            return place
        if flow.socket == socket_index and flow.number == number:
            return place
        place = (place + 1) % FLOWS_MAX
    return -1


@njit(cache=True, nogil=True)
def take(r: Any, socket_index: int, payload: int, length: int, received_ns: int) -> None:
    """Check one datagram."""
    totals = r.totals[0]
    totals.datagrams += 1
    totals.bytes += length
    offset = find_header(payload, length)
    if offset < 0:
        if length < 32:
            totals.short += 1
        else:
            totals.foreign += 1
        return
    if not is_intact(payload, length, offset):
        totals.corrupt += 1
        return
    flow = find_flow(r, socket_index, int64(load_u32(payload + offset + 4)))
    if flow < 0:
        totals.foreign += 1
        return
    account(r.flows[flow], r.windows[flow], load_i64(payload + offset + 8), int64(load_u32(payload + offset + 24)))
    if received_ns:
        latency_ns = max(received_ns - send_time_ns(payload, offset), 0)
        r.latency[latency_bucket(latency_ns)] += 1
        totals.latency_ns_max = max(totals.latency_ns_max, latency_ns)


@njit(cache=True, nogil=True)
def record(r: Any, payload: Any, length: int) -> None:
    """Append a payload to the record, as far as there is room."""
    start = r.totals[0].recorded
    end = min(start + length, len(r.record))
    if end > start:
        r.record[start:end] = payload[: end - start]
        r.totals[0].recorded = end


@njit(cache=True, nogil=True)
def take_message(r: Any, index: int, socket_index: int) -> None:
    """Take one message: a datagram, or a train of them with its UDP_GRO control message."""
    length = int64(r.messages[index].msg_len)
    control = int64(r.control[index].ctypes.data)
    end = control + int64(r.messages[index].msg_hdr.msg_controllen)
    segment_bytes = length
    received_ns = int64(0)
    for _ in range(CONTROL_BYTES // CMSG_HEADER_BYTES):
        if control + CMSG_HEADER_BYTES > end:
            break
        cmsg_bytes = load_i64(control)
        level, kind = int64(load_u32(control + 8)), int64(load_u32(control + 12))
        data = control + CMSG_HEADER_BYTES
        if level == SOL_UDP and kind == UDP_GRO:
            segment_bytes = int64(load_u32(data))
        elif level == SOL_SOCKET and kind == SO_TIMESTAMPNS:
            received_ns = load_i64(data) * 1_000_000_000 + load_i64(data + 8)
        elif level == SOL_SOCKET and kind == SO_RXQ_OVFL:
            r.overflows[socket_index] = int64(load_u32(data))
        control += (cmsg_bytes + 7) & ~7
    payload = int64(r.buffers[index].ctypes.data)
    if len(r.record):
        record(r, r.buffers[index], length)
    if length == 0:
        take(r, socket_index, payload, 0, received_ns)
        return
    at = int64(0)
    while at < length:
        taken = min(segment_bytes, length - at)
        take(r, socket_index, payload + at, taken, received_ns)
        at += taken


@njit(cache=True, nogil=True)
def receive(r: Any, timeout_ms: int, rounds_max: int, count_max: int) -> int:
    """Take what arrives, until `timeout_ms` of silence, `rounds_max` reads or `count_max` datagrams in all.

    Returns the datagrams taken by this call.
    """
    before = r.totals[0].datagrams
    for _ in range(rounds_max):
        if r.totals[0].datagrams >= count_max:
            break
        if poll(r.pollfds.ctypes.data, len(r.pollfds), timeout_ms) <= 0:
            break
        for s in range(len(r.pollfds)):
            if r.pollfds[s].revents == 0:
                continue
            for i in range(BATCH):
                r.messages[i].msg_hdr.msg_controllen = CONTROL_BYTES
            count = recvmmsg(r.pollfds[s].fd, r.messages.ctypes.data, BATCH, MSG_DONTWAIT, 0)
            for i in range(count):
                take_message(r, i, s)
    return r.totals[0].datagrams - before
