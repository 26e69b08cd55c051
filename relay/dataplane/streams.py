"""Streams: the datagrams of one sender to one input, on one interface, counted and looked into on their way.

    flow cache ─▶ stream ─▶ observe ─┬─▶ packets, bytes, gaps
    (match.py)                       ├─▶ rtp.py      ─┐
                                     └─▶ mpegts.py  ◀─┘ cells in RTP

Records are in the stats segment: written by this worker alone, read by anyone, at any time (relay/health.py). There are
STREAMS_MAX of them, found by an index of the worker's own. Who comes when all are taken gets that of a stream
that has been silent for SILENT_NS, else its datagrams are counted as untracked: senders cost no memory.
"""

from typing import Any

from logging_shm.atomics import int64, store_i64, store_release_i64
from logging_shm.jit import compiled
from relay.dataplane import mpegts, rtp
from relay.dataplane.layout import PID, PIDS_MAX, STREAM, STREAMS_MAX, Payload
from relay.dataplane.match import NO_ENTRY, fold, hash_key, match
from relay.dataplane.memory import (
    FLOWS,
    NO_STREAM,
    STREAM_INDEX_SLOTS,
    STREAM_UNSOUGHT,
    flow_at,
    health_at,
    i32_at,
    stream_at,
)

STREAM_BYTES = STREAM.itemsize
PIDS_BYTES = PIDS_MAX * PID.itemsize
SILENT_NS = 60_000_000_000
LOOKS_MAX = 64  # for a free record, before a stream is left untracked for now
RETRY_FRAMES = 64
GAP_NS_MIN = 10_000_000  # the least that a rule can call a stall
OFF, ONLY_RTP, FULL = range(3)
UDP = int(Payload.UDP)
RTP = int(Payload.RTP)
MPEG_TS = int(Payload.MPEG_TS)


@compiled
def index_slot(addressed: Any, ring: int) -> int:
    """Where to look first for the stream of a DATAGRAM, or for a STREAM."""
    src, dst = fold(addressed.src_first, addressed.src_second), fold(addressed.dst_first, addressed.dst_second)
    sport, dport = int64(addressed.sport), int64(addressed.dport)
    return hash_key(dst, dport, ring, src + sport * 0x10001) & (STREAM_INDEX_SLOTS - 1)


@compiled
def rebuild_index(m: Any) -> None:
    """Find every record again: at the beginning, and when one has gone."""
    for slot in range(STREAM_INDEX_SLOTS):
        i32_at(m.stream_index, slot).value = 0
    for number in range(STREAMS_MAX):
        stream = stream_at(m.streams, number)
        if stream.number:
            slot = index_slot(stream, int64(stream.ring))
            while i32_at(m.stream_index, slot).value:
                slot = (slot + 1) & (STREAM_INDEX_SLOTS - 1)
            i32_at(m.stream_index, slot).value = number + 1


@compiled
def empty(m: Any, number: int) -> None:
    """Empty a record, for readers first. The index is rebuilt by the caller."""
    address = m.streams + number * STREAM_BYTES
    store_release_i64(address, 0)
    for at in range(0, STREAM_BYTES, 8):
        store_i64(address + at, 0)
    for at in range(0, PIDS_BYTES, 8):
        store_i64(m.pids + number * PIDS_BYTES + at, 0)


@compiled
def free_record(m: Any) -> int:
    """An empty record, or that of a stream that has ended; NO_STREAM when none is found soon."""
    for _ in range(LOOKS_MAX):
        number = m.evict_next
        m.evict_next = (number + 1) & (STREAMS_MAX - 1)
        stream = stream_at(m.streams, number)
        if stream.number == 0:
            empty(m, number)  # a worker that was killed may have left something
            return number
        if m.now_ns - stream.last_ns > SILENT_NS:
            empty(m, number)
            rebuild_index(m)
            for i in range(FLOWS):
                if flow_at(m.flows, i).stream == number:
                    flow_at(m.flows, i).stream = STREAM_UNSOUGHT
            health_at(m.health, 0).streams_evicted += 1
            return number
    return NO_STREAM


@compiled
def find_stream(m: Any, datagram: Any, ring: int) -> int:
    """The record of a DATAGRAM's stream, a new one if need be; NO_STREAM when there is no room."""
    slot = index_slot(datagram, ring)
    while i32_at(m.stream_index, slot).value:
        number = int64(i32_at(m.stream_index, slot).value) - 1
        known = stream_at(m.streams, number)
        if (
            known.src_second == datagram.src_second
            and known.src_first == datagram.src_first
            and known.dst_second == datagram.dst_second
            and known.dst_first == datagram.dst_first
            and known.sport == datagram.sport
            and known.dport == datagram.dport
            and known.ring == ring
        ):
            return number
        slot = (slot + 1) & (STREAM_INDEX_SLOTS - 1)
    number = free_record(m)
    if number == NO_STREAM:
        return NO_STREAM
    stream = stream_at(m.streams, number)
    stream.src_first, stream.src_second = datagram.src_first, datagram.src_second
    stream.dst_first, stream.dst_second = datagram.dst_first, datagram.dst_second
    stream.sport, stream.dport, stream.ring = datagram.sport, datagram.dport, ring
    stream.first_ns = stream.last_ns = m.now_ns
    stream.received_ns = datagram.received_ns
    slot = index_slot(datagram, ring)  # the index may have been rebuilt
    while i32_at(m.stream_index, slot).value:
        slot = (slot + 1) & (STREAM_INDEX_SLOTS - 1)
    i32_at(m.stream_index, slot).value = number + 1
    health = health_at(m.health, 0)
    health.streams_seen += 1
    store_release_i64(m.streams + number * STREAM_BYTES, health.streams_seen)
    return number


@compiled
def prune(m: Any, t: Any) -> None:
    """Empty the records of streams that no rule asks for any more. Between two passes."""
    for number in range(STREAMS_MAX):
        stream = stream_at(m.streams, number)
        if stream.number and match(t, stream, int64(stream.dport), int64(stream.ring)) == NO_ENTRY:
            empty(m, number)
    rebuild_index(m)
    for i in range(FLOWS):
        flow_at(m.flows, i).stream = STREAM_UNSOUGHT


@compiled
def seek(m: Any, flow: Any, datagram: Any, ring: int) -> int:
    """As find_stream, for the datagram of a FLOW that has none. Where there is no room it is asked for now and then."""
    if flow.stream == STREAM_UNSOUGHT:
        flow.stream = find_stream(m, datagram, ring)
        if flow.stream != NO_STREAM:
            return int64(flow.stream)
    health = health_at(m.health, 0)
    health.frames_untracked += 1
    if health.frames_untracked % RETRY_FRAMES == 0:
        flow.stream = STREAM_UNSOUGHT
    return NO_STREAM


@compiled
def observe(m: Any, flow: Any, datagram: Any, ring: int) -> None:
    """Take a matched DATAGRAM of interface `ring` into its stream, the FLOW's."""
    if m.stream_health == OFF:
        return
    number = int64(flow.stream)
    if number < 0:
        number = seek(m, flow, datagram, ring)
        if number == NO_STREAM:
            return
    stream = stream_at(m.streams, number)
    stream.packets += datagram.datagrams
    stream.bytes += datagram.payload_bytes
    former_ns, received_ns = int64(stream.received_ns), int64(datagram.received_ns)
    silent_ns = m.now_ns - stream.last_ns
    if silent_ns >= GAP_NS_MIN:
        end_gap(m, stream, silent_ns, received_ns - former_ns)
    stream.last_ns = m.now_ns
    stream.received_ns = received_ns
    if datagram.datagrams == 1:
        look_into(m, stream, number, datagram.payload, int64(datagram.payload_bytes), former_ns, received_ns)
        return
    segment_bytes, left_bytes = int64(datagram.segment_bytes), int64(datagram.payload_bytes)
    payload = int64(datagram.payload)
    for _ in range(datagram.datagrams):
        taken = min(segment_bytes, left_bytes)
        look_into(m, stream, number, payload, taken, former_ns, received_ns)
        former_ns = received_ns
        payload += taken
        left_bytes -= taken


@compiled
def cells_at(m: Any, flow: Any, datagram: Any, slot: int, slot_bytes: int) -> int:
    """Where in its slot a DATAGRAM's transport stream packets begin; 0 without, or where it is a copy."""
    if flow.stream < 0:
        return 0
    kind = int64(stream_at(m.streams, int64(flow.stream)).kind)
    if not kind & MPEG_TS:
        return 0
    at = datagram.payload - slot + (rtp.HEADER_BYTES if kind & RTP else 0)
    return at if 0 < at < slot_bytes else 0


@compiled
def end_gap(m: Any, stream: Any, silent_ns: int, arrival_gap_ns: int) -> None:
    """Note a gap that has ended: only if none came, and not if this worker was late, or a clock was set."""
    gap_ns = min(silent_ns, arrival_gap_ns)
    if gap_ns < GAP_NS_MIN:
        return
    stream.gap_ns = gap_ns
    stream.gap_end_ns = m.now_ns
    stream.gap_ns_max = max(stream.gap_ns_max, gap_ns)
    stream.gaps += 1


@compiled
def look_into(
    m: Any, stream: Any, number: int, payload: int, payload_bytes: int, former_ns: int, received_ns: int
) -> None:
    """Follow what the stream carries, or find out what that is."""
    kind = int64(stream.kind)
    if kind & RTP:
        header_bytes = rtp.follow(stream, payload, payload_bytes, former_ns, received_ns)
        if header_bytes == 0:
            if stream.misfits >= rtp.FORGOTTEN_AFTER:
                forget(stream)
            return
        payload += header_bytes
        payload_bytes -= header_bytes
    elif kind == UDP and rtp.header_bytes(payload, payload_bytes):
        if rtp.recognise(stream, payload, former_ns, received_ns):
            stream.kind = RTP
        return
    if kind & MPEG_TS:
        mpegts.follow(stream, m.pids + number * PIDS_BYTES, payload, payload_bytes, received_ns)
        if stream.sync_run <= mpegts.FORGOTTEN_AFTER:
            forget(stream)
    elif m.stream_health == FULL and mpegts.recognise(stream, payload, payload_bytes):
        stream.kind = kind | MPEG_TS


@compiled
def forget(stream: Any) -> None:
    """The stream carries something else by now: find out what."""
    stream.kind = UDP
    stream.rtp_run = 0
    stream.cell_run = 0
    stream.misfits = 0
