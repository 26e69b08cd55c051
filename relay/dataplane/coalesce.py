"""Coalesce: neighbouring datagrams of one match, of equal size, become one batch that leaves at once.

A batch stays open for a pass over the ring, however many other streams lie between its datagrams, and is
closed by a datagram that does not fit it, by the limits of UDP_SEGMENT, or by the end of the pass. It never
waits. Closing sends it through every output of its entry, so those outputs share the same iovecs.
"""

from typing import Any

from numba import njit

from logging_shm.atomics import int64
from logging_shm.compiled import write_event_about
from relay.dataplane import events
from relay.dataplane.layout import (
    ENTRY_VARIES_BY_SOURCE,
    ENTRY_VARIES_BY_TTL,
    RINGS_MAX,
    UDP_PAYLOAD_MAX,
    UDP_SEGMENTS_MAX,
)
from relay.dataplane.memory import BATCHES_MAX
from relay.dataplane.send import complete_all, send_batch

SEVERITY_INFO = 6
NO_BATCH = -1


@njit(cache=True, nogil=True, _nrt=False)
def close_batch(m: Any, t: Any, batch_index: int) -> None:
    """Account a batch to its rules and queue it for each of their outputs."""
    batch = m.batches[batch_index]
    if batch.datagrams == 0:
        return
    entry = t.entries[batch.entry]
    for r in range(entry.first_route, entry.first_route + entry.routes):
        route = t.routes[r]
        m.rule_stats[route.rule].packets += batch.datagrams
        m.rule_stats[route.rule].bytes += batch.bytes
        m.rule_stats[route.rule].last_ns = m.state[0].now_ns
        m.stats[0].deliveries += int64(batch.datagrams) * int64(route.outputs)
        for o in range(route.first_output, route.first_output + route.outputs):
            send_batch(m, t, int64(t.route_outputs[o]), batch_index)
    batch.sealed = 2


@njit(cache=True, nogil=True, _nrt=False)
def mark_sent(m: Any) -> None:
    """Note up to which slot frames are handed to the kernel, for the worker that follows if this one is killed.

    A killed process finishes the system call that it is in, so what is noted right before it is sent.
    """
    for ring_index in range(RINGS_MAX):
        ring = m.rings[ring_index]
        if ring.taken:
            m.stats[0].ring_sent[ring_index] = (ring.cursor + ring.taken) % ring.frames


@njit(cache=True, nogil=True, _nrt=False)
def drain(m: Any, t: Any) -> None:
    """Close every open batch, in the order of opening, and complete all sends. Buffers are free again."""
    state = m.state[0]
    for batch_index in range(state.batches):
        if m.batches[batch_index].sealed != 2:
            close_batch(m, t, batch_index)
    mark_sent(m)
    complete_all(m, t)
    state.batches = 0
    state.window += 1


@njit(cache=True, nogil=True, _nrt=False)
def open_batch(m: Any, t: Any, entry_index: int, src: int, ttl: int, segment_bytes: int) -> int:
    """Start an empty batch for an entry and return its index; drains first when none is left."""
    state = m.state[0]
    if state.batches == BATCHES_MAX:
        drain(m, t)
    batch_index = state.batches
    state.batches += 1
    batch = m.batches[batch_index]
    batch.entry = entry_index
    batch.src = src
    batch.ttl = ttl
    batch.segment_bytes = segment_bytes
    batch.datagrams = 0
    batch.iovecs = 0
    batch.bytes = 0
    batch.sealed = 0
    m.open_batch[entry_index, 0] = state.window
    m.open_batch[entry_index, 1] = batch_index
    return batch_index


@njit(cache=True, nogil=True, _nrt=False)
def fits(batch: Any, flags: int, datagram: Any) -> bool:
    """Whether a datagram or super-frame may join an open batch, given its entry's `flags`."""
    return (
        batch.sealed == 0
        and batch.segment_bytes >= datagram.segment_bytes
        and (batch.segment_bytes == datagram.segment_bytes or datagram.datagrams == 1)
        and datagram.payload_bytes > 0
        and batch.iovecs < UDP_SEGMENTS_MAX
        and batch.datagrams + datagram.datagrams <= UDP_SEGMENTS_MAX
        and batch.bytes + datagram.payload_bytes <= UDP_PAYLOAD_MAX
        and (not flags & ENTRY_VARIES_BY_SOURCE or batch.src == datagram.src)
        and (not flags & ENTRY_VARIES_BY_TTL or batch.ttl == datagram.ttl)
    )


@njit(cache=True, nogil=True, _nrt=False)
def add(m: Any, t: Any, entry_index: int, datagram: Any) -> None:
    """Add a matched datagram (a DATAGRAM record) to the open batch of its entry, or to a new one.

    A super-frame of more than UDP_SEGMENTS_MAX datagrams spans several batches.
    """
    state = m.state[0]
    flags = int64(t.entries[entry_index].flags)
    batch_index = NO_BATCH
    if m.open_batch[entry_index, 0] == state.window:
        batch_index = m.open_batch[entry_index, 1]
        if not fits(m.batches[batch_index], flags, datagram):
            close_batch(m, t, batch_index)
            batch_index = NO_BATCH
    left_bytes = int64(datagram.payload_bytes)
    left = int64(datagram.datagrams)
    payload = int64(datagram.payload)
    segment_bytes = int64(datagram.segment_bytes)
    for _ in range(left):
        if batch_index == NO_BATCH:
            batch_index = open_batch(m, t, entry_index, datagram.src, datagram.ttl, segment_bytes)
        batch = m.batches[batch_index]
        count = min(left, UDP_SEGMENTS_MAX)
        taken = min(left_bytes, count * segment_bytes)
        m.iovecs[batch_index, batch.iovecs].iov_base = payload
        m.iovecs[batch_index, batch.iovecs].iov_len = taken
        batch.iovecs += 1
        batch.datagrams += count
        batch.bytes += taken
        # Only the last datagram of a segmented message may be shorter; an empty one goes alone.
        if taken < count * batch.segment_bytes or segment_bytes == 0:
            batch.sealed = 1
        left -= count
        left_bytes -= taken
        payload += taken
        if left == 0:
            return
        close_batch(m, t, batch_index)
        batch_index = NO_BATCH


@njit(cache=True, nogil=True, _nrt=False)
def log_first_packets(m: Any, t: Any, entry_index: int, datagram: Any) -> None:
    """Log the first packet of each rule of an entry; rules that have counted before cost one load."""
    entry = t.entries[entry_index]
    for r in range(entry.first_route, entry.first_route + entry.routes):
        rule = t.routes[r].rule
        if m.rule_stats[rule].last_ns == 0:
            m.rule_stats[rule].last_ns = m.state[0].now_ns
            name = t.rule_names[rule]
            write_event_about(
                m.log_ingress, SEVERITY_INFO, events.FIRST_PACKET, 0, (datagram.src, datagram.sport),
                events.KEY_RULE, name.name, name.length,
            )  # fmt: skip
