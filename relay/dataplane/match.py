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

hash_key = compiled(hashing.hash_key)
key_at = record_at(layout.KEY)
entry_at = record_at(layout.ENTRY)
own_at = record_at(layout.OWN_SOURCE)


@compiled
def find_key(t: Any, dst: int, port: int, ring: int, src: int) -> int:
    """The entry of exactly this key in the table, which is never full, or NO_ENTRY."""
    mask = t.keys_mask
    slot = hash_key(dst, port, ring, src) & mask
    for _ in range(mask + 1):
        key = key_at(t.keys, slot)
        if key.entry < 0:
            return NO_ENTRY
        if key.dst == dst and key.port == port and key.ring == ring and key.src == src:
            return int64(key.entry)
        slot = (slot + 1) & mask
    return NO_ENTRY


@compiled
def match(t: Any, dst: int, port: int, ring: int, src: int) -> int:
    """The entry for a datagram from `src`, all in host order, or NO_ENTRY.

    The entry without a source comes first: it says whether any rule asks for a source at all.
    """
    entry = find_key(t, dst, port, ring, 0)
    if entry == NO_ENTRY:
        return NO_ENTRY
    if entry_at(t.entries, entry).flags & ENTRY_HAS_SOURCES:
        specific = find_key(t, dst, port, ring, src)
        if specific != NO_ENTRY:
            return specific
    if entry_at(t.entries, entry).routes == 0:
        return NO_ENTRY
    return entry


@compiled
def is_own_source(t: Any, src: int, sport: int, dst: int, dport: int) -> bool:
    """Whether a datagram left one of this relay's egress sockets."""
    mask = t.own_mask
    slot = hash_key(0, sport, 0, 0) & mask
    for _ in range(mask + 1):
        sender = own_at(t.own, slot)
        if sender.used == 0:
            return False
        if sender.port == sport:
            if sender.addr == 0:
                if sender.dst == dst and sender.dport == dport:
                    return True
            elif sender.addr == src:
                return True
        slot = (slot + 1) & mask
    return False


@compiled
def learn(t: Any, flow: Any, datagram: Any, ports: int, ring: int) -> None:
    """Ask the table about the flow of a datagram, and keep what it says in the cache."""
    src, dst = int64(datagram.src), int64(datagram.dst)
    sport, dport = int64(datagram.sport), int64(datagram.dport)
    flow.src = src
    flow.dst = dst
    flow.ports = ports
    flow.ring = ring
    flow.generation = t.generation + 1
    flow.entry = match(t, dst, dport, ring, src)
    flow.stream = STREAM_UNSOUGHT
    flow.cause = NONE
    if flow.entry == NO_ENTRY:
        flow.cause = NO_MATCH
    elif is_own_source(t, src, sport, dst, dport):
        flow.cause = OWN_EGRESS


@compiled
def flow_index(m: Any, t: Any, datagram: Any, ring: int) -> int:
    """The place in the flow cache that knows what to do with a datagram of interface `ring`."""
    ports = int64(datagram.sport) << 16 | int64(datagram.dport)
    index = hash_key(datagram.dst, datagram.dport, ring, int64(datagram.src) + int64(datagram.sport)) & (FLOWS - 1)
    flow = flow_at(m.flows, index)
    if (
        flow.src != datagram.src
        or flow.dst != datagram.dst
        or flow.ports != ports
        or flow.ring != ring
        or flow.generation != t.generation + 1
    ):
        learn(t, flow, datagram, ports, ring)
    return index
