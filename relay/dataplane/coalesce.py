"""Coalesce: neighbouring datagrams of one match, of equal size, become one batch that leaves at once.

A batch stays open for a pass over the ring, however many other streams lie between its datagrams, and is
closed by a datagram that does not fit it, by the limits of UDP_SEGMENT, or by the end of the pass. It never
waits. Closing sends it through every output of its entry, so those outputs share the same iovecs.
"""

from typing import Any

from logging_shm.atomics import int64, store_release_i64
from logging_shm.compiled import write_event_about
from logging_shm.jit import compiled
from relay.dataplane import events, layout
from relay.dataplane.guard import admits
from relay.dataplane.latency import end_latencies
from relay.dataplane.layout import (
    ENTRY_VARIES_BY_SOURCE,
    ENTRY_VARIES_BY_TTL,
    RINGS_MAX,
    RULE_NAME,
    UDP_PAYLOAD_MAX,
    UDP_SEGMENTS_MAX,
    DropCause,
    offset_of,
)
from relay.dataplane.match import entry_at
from relay.dataplane.memory import (
    BATCHES_MAX,
    batch_at,
    i64_at,
    iovec_at,
    open_batch_at,
    ring_at,
    rule_stats_at,
    stats_at,
)
from relay.dataplane.records import record_at
from relay.dataplane.send import complete_all, count_drops, send_batch

SEVERITY_INFO = 6
NO_BATCH = -1
RATE_LIMIT = int(DropCause.RATE_LIMIT)
# What becomes of a batch.
OPEN, SEALED, CLOSED = range(3)

route_at = record_at(layout.ROUTE)
route_output_at = record_at(layout.ROUTE_OUTPUT)
rule_name_at = record_at(RULE_NAME)
RULE_NAME_BYTES = RULE_NAME.itemsize
NAME_OFFSET = offset_of(RULE_NAME, "name")
RING_SENT_OFFSET = offset_of(layout.STATS_HEADER, "ring_sent")


@compiled
def close_batch(m: Any, t: Any, batch_index: int) -> None:
    """Account a batch to its rules and queue it for each of their outputs."""
    batch = batch_at(m.batches, batch_index)
    if batch.datagrams == 0:
        return
    entry = entry_at(t.entries, batch.entry)
    stats = stats_at(m.stats, 0)
    for r in range(entry.first_route, entry.first_route + entry.routes):
        route = route_at(t.routes, r)
        rule_stats = rule_stats_at(m.rule_stats, route.rule)
        if rule_stats.last_ns == 0:
            log_first_packet(m, t, route.rule, batch)
        rule_stats.packets += batch.datagrams
        rule_stats.bytes += batch.bytes
        rule_stats.last_ns = m.now_ns
        if route.guard and not admits(m, t, route, batch):
            rule_stats.drops_rate_limit += batch.datagrams
            count_drops(m, RATE_LIMIT, batch.datagrams)
            continue
        stats.deliveries += int64(batch.datagrams) * int64(route.outputs)
        for o in range(route.first_output, route.first_output + route.outputs):
            send_batch(m, t, int64(route_output_at(t.route_outputs, o).output), batch_index)
    batch.sealed = CLOSED


@compiled
def log_first_packet(m: Any, t: Any, rule: int, batch: Any) -> None:
    """Log the first packet of a rule."""
    name = rule_name_at(t.rule_names, rule)
    write_event_about(
        m.log_ingress, SEVERITY_INFO, events.FIRST_PACKET, 0, (batch.src, batch.sport),
        events.KEY_RULE, t.rule_names + int64(rule) * RULE_NAME_BYTES + NAME_OFFSET, name.length,
    )  # fmt: skip


@compiled
def mark_sent(m: Any) -> None:
    """Note up to which slot frames are handed to the kernel, for the worker that follows if this one is killed.

    A killed process finishes the system call that it is in, so what is noted right before it is sent.
    """
    for ring_index in range(RINGS_MAX):
        ring = ring_at(m.rings, ring_index)
        if ring.taken:
            sent = ring.cursor + ring.taken
            i64_at(m.stats + RING_SENT_OFFSET, ring_index).value = sent - ring.frames if sent >= ring.frames else sent
    if i64_at(m.journal, 0).value:  # JOURNAL.count: nothing of it is to be taken back any more
        store_release_i64(m.journal, 0)


@compiled
def drain(m: Any, t: Any) -> None:
    """Close every open batch, in the order of opening, and complete all sends. Buffers are free again."""
    for batch_index in range(m.batch_count):
        if batch_at(m.batches, batch_index).sealed != CLOSED:
            close_batch(m, t, batch_index)
    mark_sent(m)
    complete_all(m, t)
    end_latencies(m)
    m.batch_count = 0
    m.window += 1


@compiled
def open_batch(m: Any, t: Any, entry_index: int, datagram: Any) -> int:
    """Start an empty batch for an entry and return its index; drains first when none is left."""
    if m.batch_count == BATCHES_MAX:
        drain(m, t)
    batch_index = m.batch_count
    m.batch_count += 1
    batch = batch_at(m.batches, batch_index)
    batch.entry = entry_index
    batch.src = datagram.src
    batch.sport = datagram.sport
    batch.ttl = datagram.ttl
    batch.segment_bytes = datagram.segment_bytes
    batch.datagrams = 0
    batch.iovecs = 0
    batch.bytes = 0
    batch.sealed = OPEN
    opened = open_batch_at(m.open_batches, entry_index)
    opened.window = m.window
    opened.batch = batch_index
    return batch_index


@compiled
def fits(batch: Any, flags: int, datagram: Any) -> bool:
    """Whether a datagram or super-frame may join an open batch, given its entry's `flags`."""
    return (
        batch.sealed == OPEN
        and batch.segment_bytes >= datagram.segment_bytes
        and (batch.segment_bytes == datagram.segment_bytes or datagram.datagrams == 1)
        and datagram.payload_bytes > 0
        and batch.iovecs < UDP_SEGMENTS_MAX
        and batch.datagrams + datagram.datagrams <= UDP_SEGMENTS_MAX
        and batch.bytes + datagram.payload_bytes <= UDP_PAYLOAD_MAX
        and (not flags & ENTRY_VARIES_BY_SOURCE or batch.src == datagram.src)
        and (not flags & ENTRY_VARIES_BY_TTL or batch.ttl == datagram.ttl)
    )


@compiled
def append(m: Any, batch: Any, batch_index: int, payload: int, payload_bytes: int, datagrams: int) -> None:
    """Add `datagrams` datagrams that lie one behind the other to a batch in which there is room."""
    iovec = iovec_at(m.iovecs, batch_index * UDP_SEGMENTS_MAX + batch.iovecs)
    iovec.iov_base = payload
    iovec.iov_len = payload_bytes
    batch.iovecs += 1
    batch.datagrams += datagrams
    batch.bytes += payload_bytes
    # Only the last datagram of a segmented message may be shorter; an empty one goes alone.
    if payload_bytes < datagrams * batch.segment_bytes or payload_bytes == 0:
        batch.sealed = SEALED


@compiled
def add(m: Any, t: Any, entry_index: int, datagram: Any) -> None:
    """Add a matched datagram (a DATAGRAM record) to the open batch of its entry, or to a new one.

    A super-frame of more than UDP_SEGMENTS_MAX datagrams spans several batches.
    """
    opened = open_batch_at(m.open_batches, entry_index)
    batch_index = NO_BATCH
    if opened.window == m.window:
        batch_index = opened.batch
        if not fits(batch_at(m.batches, batch_index), entry_at(t.entries, entry_index).flags, datagram):
            close_batch(m, t, batch_index)
            batch_index = NO_BATCH
    left, left_bytes = int64(datagram.datagrams), int64(datagram.payload_bytes)
    payload = int64(datagram.payload)
    for _ in range(left):
        if batch_index == NO_BATCH:
            batch_index = open_batch(m, t, entry_index, datagram)
        count = min(left, UDP_SEGMENTS_MAX)
        taken = min(left_bytes, count * int64(datagram.segment_bytes))
        append(m, batch_at(m.batches, batch_index), batch_index, payload, taken, count)
        left -= count
        if left == 0:
            return
        left_bytes -= taken
        payload += taken
        close_batch(m, t, batch_index)
        batch_index = NO_BATCH
