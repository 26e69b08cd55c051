"""Send: from a closed batch to SENDMSG entries in io_uring, and from completions to counters.

A batch leaves through an output as one message with UDP_SEGMENT, or as single messages where that
output cannot segment. Every message is MSG_DONTWAIT, so a full socket is a counted drop, never a wait.
The payloads are gathered from the packet ring: frames go back to the kernel only after `complete_all`.

A batch's failure to segment is known before anything later leaves through the same socket, because the
first segmented message of a socket is completed alone. So falling back never reorders.
"""

import errno
from typing import Any

from logging_shm.atomics import int64, load_acquire_u32, store_i32, store_i64, store_release_u32, store_u16
from logging_shm.compiled import enabled, write_event
from logging_shm.jit import compiled
from relay.dataplane import events, layout
from relay.dataplane.layout import (
    CMSG_IP_PKTINFO_BYTES,
    CMSG_IPV6_PKTINFO_BYTES,
    CMSG_TTL_BYTES,
    CMSG_UDP_SEGMENT_BYTES,
    ERRNO_MAX,
    OUTPUT_CONNECTED,
    OUTPUT_IPV6,
    OUTPUT_PRESERVE_SOURCE,
    OUTPUT_TTL_DECREMENT,
    OUTPUT_WAITING,
    SEND_SLOT,
    UDP_SEGMENTS_MAX,
    DropCause,
    offset_of,
)
from relay.dataplane.memory import (
    SQ_ENTRIES,
    batch_at,
    cqe_at,
    i32_at,
    i64_at,
    iovec_at,
    output_stats_at,
    retry_at,
    slot_at,
    sqe_at,
    stats_at,
    u8_at,
)
from relay.dataplane.records import record_at
from relay.dataplane.syscalls import io_uring_enter

IORING_ENTER_GETEVENTS = 1
SOL_UDP = 17
UDP_SEGMENT = 103
IPPROTO_IP = 0
IP_TTL = 2
IP_PKTINFO = 8
IPPROTO_IPV6 = 41
IPV6_PKTINFO = 50
IPV6_HOPLIMIT = 52
CMSG_HEADER_BYTES = 16
SEVERITY_WARNING = 4
SEVERITY_DEBUG = 7

# gso_state, by socket
GSO_UNKNOWN = 0
GSO_WORKS = 1
GSO_REFUSED = 2

EAGAIN = errno.EAGAIN
ENOBUFS = errno.ENOBUFS
ENETDOWN = errno.ENETDOWN
EINTR = errno.EINTR
EINVAL = errno.EINVAL
EIO = errno.EIO
EMSGSIZE = errno.EMSGSIZE
EOPNOTSUPP = errno.EOPNOTSUPP
output_at = record_at(layout.OUTPUT)
SLOT_BYTES = SEND_SLOT.itemsize
IOVEC_BYTES = layout.IOVEC.itemsize
BATCH_IOVECS_BYTES = layout.UDP_SEGMENTS_MAX * IOVEC_BYTES
ERRNO_COUNTS_OFFSET = offset_of(layout.STATS_HEADER, "errno_counts")
DROPS_OFFSET = offset_of(layout.STATS_HEADER, "drops")
OUTPUT_BYTES = layout.OUTPUT.itemsize
NAME_OFFSET = offset_of(layout.OUTPUT, "name")
IOV_OFFSET = offset_of(SEND_SLOT, "iov")
CONTROL_OFFSET = offset_of(SEND_SLOT, "control")
DROP_TTL = int(DropCause.TTL)
DROP_EGRESS_FULL = int(DropCause.EGRESS_FULL)
DROP_SEND_ERROR = int(DropCause.SEND_ERROR)


@compiled
def write_header(at: int, payload_bytes: int, level: int, kind: int) -> None:
    """Write a cmsghdr."""
    store_i64(at, CMSG_HEADER_BYTES + payload_bytes)
    store_i32(at + 8, level)
    store_i32(at + 12, kind)


@compiled
def write_control(control: int, is_ipv6: bool, segment_bytes: int, ttl: int, src_first: int, src_second: int) -> int:
    """Write the control messages at `control`; return their length. 0 leaves a message out.

    man 7 udp (UDP_SEGMENT), man 7 ip (IP_TTL, IP_PKTINFO's ipi_spec_dst), RFC 3542 (IPV6_HOPLIMIT, IPV6_PKTINFO: the
    interface is the socket's).
    """
    at = control
    if segment_bytes:
        write_header(at, 2, SOL_UDP, UDP_SEGMENT)
        store_u16(at + CMSG_HEADER_BYTES, segment_bytes)
        at += CMSG_UDP_SEGMENT_BYTES
    if ttl:
        write_header(at, 4, IPPROTO_IPV6 if is_ipv6 else IPPROTO_IP, IPV6_HOPLIMIT if is_ipv6 else IP_TTL)
        store_i32(at + CMSG_HEADER_BYTES, ttl)
        at += CMSG_TTL_BYTES
    if src_first == 0 and src_second == 0:
        return at - control
    if is_ipv6:
        write_header(at, 20, IPPROTO_IPV6, IPV6_PKTINFO)
        store_i64(at + CMSG_HEADER_BYTES, src_first)
        store_i64(at + CMSG_HEADER_BYTES + 8, src_second)
        store_i32(at + CMSG_HEADER_BYTES + 16, 0)
        return at + CMSG_IPV6_PKTINFO_BYTES - control
    write_header(at, 12, IPPROTO_IP, IP_PKTINFO)
    store_i32(at + CMSG_HEADER_BYTES, 0)
    store_i32(at + CMSG_HEADER_BYTES + 4, src_second >> 32)
    store_i32(at + CMSG_HEADER_BYTES + 8, 0)
    return at + CMSG_IP_PKTINFO_BYTES - control


@compiled
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
    index = m.sq_tail & m.sq_mask
    batch = batch_at(m.batches, batch_index)
    output = output_at(t.outputs, output_index)
    flags = int64(output.flags)
    slot = slot_at(m.slots, index)
    address = m.slots + index * SLOT_BYTES
    message = slot.msg
    message.msg_iov = iov
    message.msg_iovlen = iovecs
    if flags & OUTPUT_CONNECTED:
        message.msg_name = 0
        message.msg_namelen = 0
    else:  # the table stays in place until all is sent
        message.msg_name = t.outputs + output_index * OUTPUT_BYTES + NAME_OFFSET
        message.msg_namelen = output.name_bytes
    control = address + CONTROL_OFFSET
    ttl = int64(batch.ttl) - 1 if flags & OUTPUT_TTL_DECREMENT else 0
    is_ipv6 = flags & OUTPUT_IPV6 != 0
    if flags & OUTPUT_PRESERVE_SOURCE:
        control_bytes = write_control(control, is_ipv6, segment_bytes, ttl, batch.src_first, batch.src_second)
    else:
        control_bytes = write_control(control, is_ipv6, segment_bytes, ttl, 0, 0)
    message.msg_control = control if control_bytes else 0
    message.msg_controllen = control_bytes
    slot.output = output_index
    slot.batch = batch_index
    slot.datagrams = datagrams
    slot.gso = segment_bytes
    sqe_at(m.sqes, index).fd = i32_at(m.egress_fds, output.socket).value
    m.sq_tail += 1
    m.queued += 1


@compiled
def count_sent(m: Any, output_index: int, datagrams: int, sent_bytes: int) -> None:
    """Account a completed send."""
    output = output_stats_at(m.output_stats, output_index)
    output.packets += datagrams
    output.bytes += sent_bytes
    stats = stats_at(m.stats, 0)
    stats.packets_relayed += datagrams
    stats.bytes_relayed += sent_bytes


@compiled
def count_drops(m: Any, cause: int, datagrams: int) -> None:
    """Account datagrams that go no further under their DropCause."""
    i64_at(m.stats + DROPS_OFFSET, cause).value += datagrams


@compiled
def count_failed(m: Any, output_index: int, datagrams: int, error: int) -> None:
    """Account a refused send under its cause: no room, or an error by its number."""
    output = output_stats_at(m.output_stats, output_index)
    if error in (EAGAIN, ENOBUFS):
        output.drops_full += datagrams
        count_drops(m, DROP_EGRESS_FULL, datagrams)
        return
    output.drops_error += datagrams
    output.last_errno = error
    count_drops(m, DROP_SEND_ERROR, datagrams)
    i64_at(m.stats + ERRNO_COUNTS_OFFSET, min(error, ERRNO_MAX - 1)).value += datagrams


@compiled
def reap_one(m: Any, t: Any, index: int, result: int) -> None:
    """Account one completion; a refused segmentation is kept for `complete_all` to send singly."""
    slot = slot_at(m.slots, index)
    gso_state = u8_at(m.gso_states, output_at(t.outputs, slot.output).socket)
    if result >= 0:
        if slot.gso and gso_state.value == GSO_UNKNOWN:
            gso_state.value = GSO_WORKS
        count_sent(m, slot.output, slot.datagrams, result)
        if m.trace:
            written = (slot.output, slot.datagrams, result)
            write_event(m.log_egress, SEVERITY_DEBUG, events.SENT, m.now_ns, written)
        return
    error = -result
    if slot.gso and error in (EIO, EINVAL, EMSGSIZE, EOPNOTSUPP):
        if gso_state.value != GSO_REFUSED:
            gso_state.value = GSO_REFUSED
            write_event(m.log_egress, SEVERITY_WARNING, events.GSO_REFUSED, 0, (error, slot.output, slot.gso))
        retry = retry_at(m.retries, m.retry_count)
        retry.output = slot.output
        retry.batch = slot.batch
        m.retry_count += 1
        return
    count_failed(m, slot.output, slot.datagrams, error)


@compiled
def submit_and_reap(m: Any, t: Any) -> None:
    """Submit every queued SQE and wait for all completions. Sends never block, so this is one call."""
    outstanding = m.queued
    unsubmitted = outstanding
    store_release_u32(m.sq_tail_ptr, m.sq_tail)
    stats_at(m.stats, 0).sends += outstanding
    m.queued = 0
    while outstanding > 0:  # each turn submits or reaps at least one, or the ring is broken
        result = io_uring_enter(m.uring_fd, unsubmitted, outstanding, IORING_ENTER_GETEVENTS, 0)
        if result > 0:
            unsubmitted -= result
        elif result < 0 and -result not in (EINTR, EAGAIN):
            raise RuntimeError("io_uring_enter failed")
        head = int64(load_acquire_u32(m.cq_head_ptr))
        tail = int64(load_acquire_u32(m.cq_tail_ptr))
        while head != tail:
            cqe = cqe_at(m.cqes, head & m.cq_mask)
            reap_one(m, t, cqe.user_data, cqe.res)
            outstanding -= 1
            head = (head + 1) & 0xFFFFFFFF
        store_release_u32(m.cq_head_ptr, head)


@compiled
def push_singly(m: Any, t: Any, output_index: int, batch_index: int) -> None:
    """Send each datagram of a batch as a message of its own."""
    batch = batch_at(m.batches, batch_index)
    for i in range(batch.iovecs):
        source = iovec_at(m.iovecs, batch_index * UDP_SEGMENTS_MAX + i)
        offset = int64(0)
        for _ in range(batch.datagrams):
            index = m.sq_tail & m.sq_mask
            length = min(int64(batch.segment_bytes), source.iov_len - offset)
            iovec = slot_at(m.slots, index).iov
            iovec.iov_base = source.iov_base + offset
            iovec.iov_len = length
            push(m, t, output_index, batch_index, m.slots + index * SLOT_BYTES + IOV_OFFSET, 1, 1, 0)
            if m.queued == SQ_ENTRIES:
                submit_and_reap(m, t)
            offset += length
            if offset >= source.iov_len:
                break


@compiled
def complete_all(m: Any, t: Any) -> None:
    """Submit, reap, and send singly what could not leave segmented. Afterwards nothing is in flight."""
    if m.queued:
        submit_and_reap(m, t)
    retries = m.retry_count
    if retries == 0:
        return
    m.retry_count = 0
    for i in range(retries):
        retry = retry_at(m.retries, i)
        push_singly(m, t, retry.output, retry.batch)
    if m.queued:
        submit_and_reap(m, t)


@compiled
def send_batch(m: Any, t: Any, output_index: int, batch_index: int) -> None:
    """Queue a closed batch for one output. What has no socket fails as on an interface that is down."""
    batch = batch_at(m.batches, batch_index)
    output = output_at(t.outputs, output_index)
    if output.flags & OUTPUT_TTL_DECREMENT and batch.ttl <= 1:
        output_stats_at(m.output_stats, output_index).drops_ttl += batch.datagrams
        count_drops(m, DROP_TTL, batch.datagrams)
        return
    if output.flags & OUTPUT_WAITING:
        count_failed(m, output_index, batch.datagrams, ENETDOWN)
        return
    if m.queued == SQ_ENTRIES:
        complete_all(m, t)
    iov = m.iovecs + batch_index * BATCH_IOVECS_BYTES
    if batch.datagrams == 1:
        push(m, t, output_index, batch_index, iov, 1, 1, 0)
        return
    gso = u8_at(m.gso_states, output.socket).value
    if gso == GSO_REFUSED or batch.segment_bytes > output.gso_segment_bytes_max:
        push_singly(m, t, output_index, batch_index)
        return
    if gso == GSO_UNKNOWN:
        complete_all(m, t)
    push(m, t, output_index, batch_index, iov, batch.iovecs, batch.datagrams, batch.segment_bytes)
    if gso == GSO_UNKNOWN:
        complete_all(m, t)


@compiled
def trace_is_on(m: Any) -> bool:
    """Whether per-packet records are wanted: asked once a pass."""
    return enabled(m.log_ingress, SEVERITY_DEBUG) or enabled(m.log_egress, SEVERITY_DEBUG)
