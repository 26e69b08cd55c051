"""Match: from a datagram to an entry of the rule table, in one probe for a flow that is known, two or three else.

The table is compiled by the supervisor (table.py); here it is only read. `t` is a TABLE record.
"""

from typing import Any

from logging_shm.atomics import int64
from logging_shm.jit import compiled
from relay.dataplane import hashing, layout
from relay.dataplane.layout import ENTRY_HAS_SOURCES, DropCause
from relay.dataplane.memory import FLOWS, STREAM_UNSOUGHT, flow_at
from relay.dataplane.records import record_at

NO_ENTRY = -1
NONE = int(DropCause.NONE)
NO_MATCH = int(DropCause.NO_MATCH)
OWN_EGRESS = int(DropCause.OWN_EGRESS)

fold = compiled(hashing.fold)
hash_key = compiled(hashing.hash_key)
key_at = record_at(layout.KEY)
entry_at = record_at(layout.ENTRY)
own_at = record_at(layout.OWN_SOURCE)


@compiled
def find_key(t: Any, dst_first: int, dst_second: int, port: int, ring: int, src_first: int, src_second: int) -> int:
    """The entry of exactly this key in the table, which is never full, or NO_ENTRY."""
    mask = t.keys_mask
    slot = hash_key(fold(dst_first, dst_second), port, ring, fold(src_first, src_second)) & mask
    for _ in range(mask + 1):
        key = key_at(t.keys, slot)
        if key.entry < 0:
            return NO_ENTRY
        if (
            key.dst_second == dst_second
            and key.dst_first == dst_first
            and key.port == port
            and key.ring == ring
            and key.src_second == src_second
            and key.src_first == src_first
        ):
            return int64(key.entry)
        slot = (slot + 1) & mask
    return NO_ENTRY


@compiled
def match(t: Any, addressed: Any, port: int, ring: int) -> int:
    """The entry for the addresses of a DATAGRAM or STREAM, or NO_ENTRY.

    The entry without a source comes first: it says whether any rule asks for a source at all.
    """
    dst_first, dst_second = addressed.dst_first, addressed.dst_second
    entry = find_key(t, dst_first, dst_second, port, ring, 0, 0)
    if entry == NO_ENTRY:
        return NO_ENTRY
    if entry_at(t.entries, entry).flags & ENTRY_HAS_SOURCES:
        specific = find_key(t, dst_first, dst_second, port, ring, addressed.src_first, addressed.src_second)
        if specific != NO_ENTRY:
            return specific
    if entry_at(t.entries, entry).routes == 0:
        return NO_ENTRY
    return entry


@compiled
def is_own_source(t: Any, datagram: Any) -> bool:
    """Whether a datagram left one of this relay's egress sockets."""
    mask = t.own_mask
    sport = int64(datagram.sport)
    slot = hash_key(0, sport, 0, 0) & mask
    for _ in range(mask + 1):
        sender = own_at(t.own, slot)
        if sender.used == 0:
            return False
        if sender.port == sport:
            if sender.src_first == 0 and sender.src_second == 0:
                if (
                    sender.dst_second == datagram.dst_second
                    and sender.dst_first == datagram.dst_first
                    and sender.dport == datagram.dport
                ):
                    return True
            elif sender.src_second == datagram.src_second and sender.src_first == datagram.src_first:
                return True
        slot = (slot + 1) & mask
    return False


@compiled
def learn(t: Any, flow: Any, datagram: Any, ports: int, ring: int) -> None:
    """Ask the table about the flow of a datagram, and keep what it says in the cache."""
    flow.src_first, flow.src_second = datagram.src_first, datagram.src_second
    flow.dst_first, flow.dst_second = datagram.dst_first, datagram.dst_second
    flow.ports = ports
    flow.ring = ring
    flow.generation = t.generation + 1
    flow.entry = match(t, datagram, int64(datagram.dport), ring)
    flow.stream = STREAM_UNSOUGHT
    flow.cause = NONE
    if flow.entry == NO_ENTRY:
        flow.cause = NO_MATCH
    elif is_own_source(t, datagram):
        flow.cause = OWN_EGRESS


@compiled
def flow_index(m: Any, t: Any, datagram: Any, ring: int) -> int:
    """The place in the flow cache that knows what to do with a datagram of interface `ring`."""
    ports = int64(datagram.sport) << 16 | int64(datagram.dport)
    src = fold(datagram.src_first, datagram.src_second) + int64(datagram.sport)
    dst = fold(datagram.dst_first, datagram.dst_second)
    index = hash_key(dst, datagram.dport, ring, src) & (FLOWS - 1)
    flow = flow_at(m.flows, index)
    if (
        flow.src_second != datagram.src_second
        or flow.dst_second != datagram.dst_second
        or flow.src_first != datagram.src_first
        or flow.dst_first != datagram.dst_first
        or flow.ports != ports
        or flow.ring != ring
        or flow.generation != t.generation + 1
    ):
        learn(t, flow, datagram, ports, ring)
    return index
