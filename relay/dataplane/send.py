"""Send: from a closed batch to SENDMSG entries in io_uring, and from completions to counters.

A batch leaves through an output as one message with UDP_SEGMENT, or as single messages where that
output cannot segment. Every message is MSG_DONTWAIT, so a full socket is a counted drop, never a wait.
The payloads are gathered from the packet ring: frames go back to the kernel only after `complete_all`.

A batch's failure to segment is known before anything later leaves through the same socket, because the
first segmented message of a socket is completed alone. So falling back never reorders.
"""

import errno
from typing import Any

from numba import njit

from logging_shm.atomics import int64, load_acquire_u32, store_i32, store_i64, store_release_u32, store_u16
from logging_shm.compiled import enabled, write_event
from relay.dataplane import events
from relay.dataplane.layout import (
    CMSG_IP_PKTINFO_BYTES,
    CMSG_IP_TTL_BYTES,
    CMSG_UDP_SEGMENT_BYTES,
    ERRNO_MAX,
    OUTPUT_CONNECTED,
    OUTPUT_PRESERVE_SOURCE,
    OUTPUT_TTL_DECREMENT,
    SEND_SLOT,
    DropCause,
    offset_of,
)
from relay.dataplane.memory import SQ_ENTRIES
from relay.dataplane.syscalls import io_uring_enter

IORING_OP_SENDMSG = 9
IORING_ENTER_GETEVENTS = 1
MSG_DONTWAIT = 0x40
MSG_NOSIGNAL = 0x4000
SOL_UDP = 17
UDP_SEGMENT = 103
IPPROTO_IP = 0
IP_TTL = 2
IP_PKTINFO = 8
CMSG_HEADER_BYTES = 16
SOCKADDR_IN_BYTES = 16
SEVERITY_WARNING = 4
SEVERITY_DEBUG = 7

# gso_state, by socket
GSO_UNKNOWN = 0
GSO_WORKS = 1
GSO_REFUSED = 2

EAGAIN = errno.EAGAIN
ENOBUFS = errno.ENOBUFS
EINTR = errno.EINTR
EINVAL = errno.EINVAL
EIO = errno.EIO
EMSGSIZE = errno.EMSGSIZE
EOPNOTSUPP = errno.EOPNOTSUPP
NAME_OFFSET = offset_of(SEND_SLOT, "name")
IOV_OFFSET = offset_of(SEND_SLOT, "iov")
CONTROL_OFFSET = offset_of(SEND_SLOT, "control")
DROP_TTL = int(DropCause.TTL)
DROP_EGRESS_FULL = int(DropCause.EGRESS_FULL)
DROP_SEND_ERROR = int(DropCause.SEND_ERROR)


@njit(cache=True, nogil=True, _nrt=False)
def swap32(value: int) -> int:
    """`value` with its four bytes reversed."""
    return ((value & 0xFF) << 24) | ((value & 0xFF00) << 8) | ((value >> 8) & 0xFF00) | ((value >> 24) & 0xFF)


@njit(cache=True, nogil=True, _nrt=False)
def write_control(control: int, segment_bytes: int, ttl: int, source: int) -> int:
    """Write the control messages at `control`; return their length. 0 leaves a message out.

    `source` is in host order. man 7 udp (UDP_SEGMENT), man 7 ip (IP_TTL, IP_PKTINFO's ipi_spec_dst).
    """
    at = control
    if segment_bytes:
        store_i64(at, CMSG_HEADER_BYTES + 2)
        store_i32(at + 8, SOL_UDP)
        store_i32(at + 12, UDP_SEGMENT)
        store_u16(at + CMSG_HEADER_BYTES, segment_bytes)
        at += CMSG_UDP_SEGMENT_BYTES
    if ttl:
        store_i64(at, CMSG_HEADER_BYTES + 4)
        store_i32(at + 8, IPPROTO_IP)
        store_i32(at + 12, IP_TTL)
        store_i32(at + CMSG_HEADER_BYTES, ttl)
        at += CMSG_IP_TTL_BYTES
    if source:
        store_i64(at, CMSG_HEADER_BYTES + 12)
        store_i32(at + 8, IPPROTO_IP)
        store_i32(at + 12, IP_PKTINFO)
        store_i32(at + CMSG_HEADER_BYTES, 0)
        store_i32(at + CMSG_HEADER_BYTES + 4, swap32(source))
        store_i32(at + CMSG_HEADER_BYTES + 8, 0)
        at += CMSG_IP_PKTINFO_BYTES
    return at - control


@njit(cache=True, nogil=True, _nrt=False)
def push(
    m: Any,
    t: Any,
    output_index: int,
    batch_index: int,
    iov: int,
    iovecs: int,
    datagrams: int,
    segment_bytes: int,
) -> None:
    """Fill the next SQE; the caller made sure that one is free.

    The message gathers `iovecs` IOVEC records at address `iov`; `segment_bytes` 0 sends it unsegmented.
    """
    state = m.state[0]
    index = state.sq_tail & state.sq_mask
    batch = m.batches[batch_index]
    output = t.outputs[output_index]
    slot = m.slots[index]
    message = slot.msg
    message.msg_iov = iov
    message.msg_iovlen = iovecs
    if output.flags & OUTPUT_CONNECTED:
        message.msg_name = 0
        message.msg_namelen = 0
    else:
        slot.name.sin_port = output.port
        slot.name.sin_addr = output.addr
        message.msg_name = m.slots.ctypes.data + index * m.slots.itemsize + NAME_OFFSET
        message.msg_namelen = SOCKADDR_IN_BYTES
    control = m.slots.ctypes.data + index * m.slots.itemsize + CONTROL_OFFSET
    ttl = int64(batch.ttl) - 1 if output.flags & OUTPUT_TTL_DECREMENT else 0
    source = int64(batch.src) if output.flags & OUTPUT_PRESERVE_SOURCE else 0
    control_bytes = write_control(control, segment_bytes, ttl, source)
    message.msg_control = control if control_bytes else 0
    message.msg_controllen = control_bytes
    slot.output = output_index
    slot.batch = batch_index
    slot.datagrams = datagrams
    slot.gso = segment_bytes

    sqe = m.sqes[index]
    sqe.opcode = IORING_OP_SENDMSG
    sqe.flags = 0
    sqe.fd = m.egress_fds[output.socket]
    sqe.addr = m.slots.ctypes.data + index * m.slots.itemsize
    sqe.len = 1
    sqe.msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL
    sqe.user_data = index
    state.sq_tail += 1
    state.queued += 1


@njit(cache=True, nogil=True, _nrt=False)
def count_sent(m: Any, output_index: int, datagrams: int, sent_bytes: int) -> None:
    """Account a completed send."""
    stats = m.output_stats[output_index]
    stats.packets += datagrams
    stats.bytes += sent_bytes
    m.stats[0].packets_relayed += datagrams
    m.stats[0].bytes_relayed += sent_bytes


@njit(cache=True, nogil=True, _nrt=False)
def count_failed(m: Any, output_index: int, datagrams: int, error: int) -> None:
    """Account a refused send under its cause: no room, or an error by its number."""
    stats = m.output_stats[output_index]
    if error in (EAGAIN, ENOBUFS):
        stats.drops_full += datagrams
        m.stats[0].drops[DROP_EGRESS_FULL] += datagrams
        return
    stats.drops_error += datagrams
    stats.last_errno = error
    m.stats[0].drops[DROP_SEND_ERROR] += datagrams
    m.stats[0].errno_counts[min(error, ERRNO_MAX - 1)] += datagrams


@njit(cache=True, nogil=True, _nrt=False)
def reap_one(m: Any, t: Any, index: int, result: int) -> None:
    """Account one completion; a refused segmentation is kept for `complete_all` to send singly."""
    state = m.state[0]
    slot = m.slots[index]
    socket = t.outputs[slot.output].socket
    if result >= 0:
        if slot.gso and m.gso_state[socket] == GSO_UNKNOWN:
            m.gso_state[socket] = GSO_WORKS
        count_sent(m, slot.output, slot.datagrams, result)
        if state.trace:
            written = (slot.output, slot.datagrams, result)
            write_event(m.log_egress, SEVERITY_DEBUG, events.SENT, state.now_ns, written)
        return
    error = -result
    if slot.gso and error in (EIO, EINVAL, EMSGSIZE, EOPNOTSUPP):
        if m.gso_state[socket] != GSO_REFUSED:
            m.gso_state[socket] = GSO_REFUSED
            write_event(m.log_egress, SEVERITY_WARNING, events.GSO_REFUSED, 0, (error, slot.output, slot.gso))
        m.retry[state.retries, 0] = slot.output
        m.retry[state.retries, 1] = slot.batch
        state.retries += 1
        return
    count_failed(m, slot.output, slot.datagrams, error)


@njit(cache=True, nogil=True, _nrt=False)
def submit_and_reap(m: Any, t: Any) -> None:
    """Submit every queued SQE and wait for all completions. Sends never block, so this is one call."""
    state = m.state[0]
    outstanding = state.queued
    unsubmitted = outstanding
    store_release_u32(state.sq_tail_ptr, state.sq_tail)
    m.stats[0].sends += outstanding
    state.queued = 0
    while outstanding > 0:  # each turn submits or reaps at least one, or the ring is broken
        result = io_uring_enter(state.uring_fd, unsubmitted, outstanding, IORING_ENTER_GETEVENTS, 0)
        if result > 0:
            unsubmitted -= result
        elif result < 0 and -result not in (EINTR, EAGAIN):
            raise RuntimeError("io_uring_enter failed")
        head = int64(load_acquire_u32(state.cq_head_ptr))
        tail = int64(load_acquire_u32(state.cq_tail_ptr))
        while head != tail:
            cqe = m.cqes[head & state.cq_mask]
            reap_one(m, t, cqe.user_data, cqe.res)
            outstanding -= 1
            head = (head + 1) & 0xFFFFFFFF
        store_release_u32(state.cq_head_ptr, head)


@njit(cache=True, nogil=True, _nrt=False)
def push_singly(m: Any, t: Any, output_index: int, batch_index: int) -> None:
    """Send each datagram of a batch as a message of its own."""
    batch = m.batches[batch_index]
    iov_base = m.slots.ctypes.data + IOV_OFFSET
    for i in range(batch.iovecs):
        source = m.iovecs[batch_index, i]
        offset = int64(0)
        for _ in range(batch.datagrams):
            index = m.state[0].sq_tail & m.state[0].sq_mask
            length = min(int64(batch.segment_bytes), source.iov_len - offset)
            m.slots[index].iov.iov_base = source.iov_base + offset
            m.slots[index].iov.iov_len = length
            push(m, t, output_index, batch_index, iov_base + index * m.slots.itemsize, 1, 1, 0)
            if m.state[0].queued == SQ_ENTRIES:
                submit_and_reap(m, t)
            offset += length
            if offset >= source.iov_len:
                break


@njit(cache=True, nogil=True, _nrt=False)
def complete_all(m: Any, t: Any) -> None:
    """Submit, reap, and send singly what could not leave segmented. Afterwards nothing is in flight."""
    state = m.state[0]
    if state.queued:
        submit_and_reap(m, t)
    retries = state.retries
    if retries == 0:
        return
    state.retries = 0
    for i in range(retries):
        push_singly(m, t, m.retry[i, 0], m.retry[i, 1])
    if state.queued:
        submit_and_reap(m, t)


@njit(cache=True, nogil=True, _nrt=False)
def send_batch(m: Any, t: Any, output_index: int, batch_index: int) -> None:
    """Queue a closed batch for one output."""
    state = m.state[0]
    batch = m.batches[batch_index]
    output = t.outputs[output_index]
    if output.flags & OUTPUT_TTL_DECREMENT and batch.ttl <= 1:
        m.output_stats[output_index].drops_ttl += batch.datagrams
        m.stats[0].drops[DROP_TTL] += batch.datagrams
        return
    if state.queued == SQ_ENTRIES:
        complete_all(m, t)
    iov = m.iovecs.ctypes.data + batch_index * m.iovecs.strides[0]
    if batch.datagrams == 1:
        push(m, t, output_index, batch_index, iov, 1, 1, 0)
        return
    gso = m.gso_state[output.socket]
    if gso == GSO_REFUSED or batch.segment_bytes > output.gso_segment_bytes_max:
        push_singly(m, t, output_index, batch_index)
        return
    if gso == GSO_UNKNOWN:
        complete_all(m, t)
    push(m, t, output_index, batch_index, iov, batch.iovecs, batch.datagrams, batch.segment_bytes)
    if gso == GSO_UNKNOWN:
        complete_all(m, t)


@njit(cache=True, nogil=True, _nrt=False)
def trace_is_on(m: Any) -> bool:
    """Whether per-packet records are wanted: asked once a pass."""
    return enabled(m.log_ingress, SEVERITY_DEBUG) or enabled(m.log_egress, SEVERITY_DEBUG)
